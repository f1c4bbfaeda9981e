"""Rules: what is made of the predictions F_1 of a good model and F_0 of a poor one, of the same view:

    F' = F_0 + w (F_1 - F_0)        w = 1 is F_1 alone, w = 0 is F_0 alone, and beyond 1 is away from what F_0 would do

Its weights sum to one, so it is the same formula in every view, and is computed in what the network itself predicts: no
digits are lost, and eps, x0, v and score networks give the same D'. Other rules name the view that they are of, and
are F_1 at w = 1 too:

- CFG-Zero* (Fan et al., 2025), in the velocity: F_0 is replaced by its multiple that is nearest to F_1.
- Projection (Sadat et al., 2025, adaptive projected guidance), in D: of delta = D_1 - D_0, cut to a norm, the part
  parallel to D_1 is scaled by a factor, D' = D_1 + (w - 1) (delta_orthogonal + factor delta_parallel). Their momentum
  between steps is left out: a denoiser remembers nothing.
- Rescaling (Lin et al., 2024, section 3.4), in D: D' is multiplied by phi std(D_1) / std(D') + 1 - phi, the standard
  deviations over each sample's elements. (They give it for what the network predicts, which then matters.)

A rule more is a function and its line in `RULES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from scoresde.checks import check_option
from scoresde.guidance.base import ratio, scaled
from scoresde.tensors import dot, expand_like
from scoresde.views import VIEWS

__all__ = ["RULES", "Rule", "cfg_zero", "extrapolated", "projected", "projection"]


@dataclass(frozen=True, repr=False)
class Rule:
    """F' = function(F_1, F_0, w), a function of two predictions in a view.

    Args:
        function: of F_1 and F_0, shape (B, ...), and w, of a shape that multiplies them; F_1 at w = 1.
        view: what F is, a key of `VIEWS`. None is for a function that is the same in every view, and F_0 at w = 0,
            which then is evaluated alone.
        options: further arguments of the function, by keyword.

    Raises:
        TypeError: if the function is none.
        ValueError: on another view.
    """

    function: Callable[..., Tensor]
    view: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"a rule's function is {type(self.function).__name__}: expected one of (F_1, F_0, w)")
        check_option([None, *VIEWS], view=self.view)

    def __call__(self, F_1: Tensor, F_0: Tensor, w: Tensor) -> Tensor:
        """F', for w of shape () or (B,)."""
        return self.function(F_1, F_0, expand_like(w, F_1), **self.options)

    def __repr__(self) -> str:
        name = getattr(self.function, "__name__", repr(self.function))
        options = "".join(f", {key}={value!r}" for key, value in self.options.items())
        return next((repr(key) for key, rule in RULES.items() if rule == self), f"Rule({name}, {self.view!r}{options})")


def projection(a: Tensor, b: Tensor) -> Tensor:
    """The part of a that is parallel to b, <a, b> / |b|^2 b of each sample; 0 where b is."""
    return scaled(b, ratio(dot(a, b), dot(b, b)))


def extrapolated(F_1: Tensor, F_0: Tensor, w: Tensor) -> Tensor:
    """F_0 + w (F_1 - F_0)."""
    return F_0 + w * (F_1 - F_0)


def cfg_zero(v_1: Tensor, v_0: Tensor, w: Tensor) -> Tensor:
    """CFG-Zero* (Fan et al., 2025): v' = s v_0 + w (v_1 - s v_0), s = <v_1, v_0> / |v_0|^2 of each sample. (Their
    zeros for the first steps are left out.)
    """
    return extrapolated(v_1, projection(v_1, v_0), w)


def projected(
    D_1: Tensor,
    D_0: Tensor,
    w: Tensor,
    *,
    rescale: float = 0.0,
    parallel: float = 1.0,
    max_norm: float | None = None,
) -> Tensor:
    """D' = D_1 + (w - 1) delta with delta = D_1 - D_0 projected, and D' rescaled, as the module's docstring says.

    Args:
        D_1, D_0, w: as of any rule.
        rescale: phi, from 0 (not at all) to 1.
        parallel: the factor of the part of delta that is parallel to D_1; 1 leaves it.
        max_norm: to which each sample's delta is cut.
    """
    delta = D_1 - D_0
    if max_norm is not None:
        norm = delta.reshape(len(delta), -1).norm(dim=1)
        over = norm > max_norm
        delta = scaled(delta, torch.where(over, max_norm / torch.where(over, norm, 1.0), 1.0))
    if parallel != 1:
        delta = delta + (parallel - 1) * projection(delta, D_1)
    D = D_1 + (w - 1) * delta
    if rescale == 0:
        return D
    std, std_1 = (y.reshape(len(y), -1).std(1, correction=0) for y in (D, D_1))
    return scaled(D, rescale * ratio(std_1, std) + (1 - rescale))


RULES: dict[str, Rule] = {
    "cfg": Rule(extrapolated),
    "cfg-zero": Rule(cfg_zero, "velocity"),
    "apg": Rule(projected, "x0", {"parallel": 0.0}),
    "rescale": Rule(projected, "x0", {"rescale": 0.7}),
}
"""The rules by name, with the options of their papers."""
