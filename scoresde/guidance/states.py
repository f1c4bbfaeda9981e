"""Classifier-free guidance of whole states, in log-probabilities:

    log p'(x_0 | x_t) = log p_u + w (log p_c - log p_u) + const        each entry by itself

w = 1 is the conditional model and 0 the unconditional one, as in `scoresde.guidance.ClassifierFree`, which makes this
of a denoiser of whole states. q(x_t | x_0) cancels in the difference, so it is the networks' logits that are mixed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from scoresde.categorical import ProbabilityDenoiser
from scoresde.checks import ArgumentError, check_option
from scoresde.data.conditions import nothing_like, null_of
from scoresde.guidance.base import Scale, check_scale, known_all, scale_at
from scoresde.guidance.branches import replaced
from scoresde.networks import networks
from scoresde.tensors import Time

__all__ = ["ClassifierFreeStates"]


class ClassifierFreeStates(ProbabilityDenoiser):
    """A denoiser of whole states, guided; `ClassifierFree(denoiser, ...)` makes it.

    Args:
        denoiser: a conditional denoiser that was trained with the null condition too.
        weight, null, convention: as for `ClassifierFree`; null are values, or names of what is left out.
        others: refused, by name: what mixes numbers, noise levels and variances.

    Raises:
        TypeError: if the denoiser has more than whole states.
        ValueError: on another option; by the call, if the condition that null names is missing.
    """

    def __init__(
        self,
        denoiser: ProbabilityDenoiser,
        weight: Scale = 2.0,
        *,
        null: Mapping[str, Any] | Sequence[str] | None = None,
        convention: str = "scale",
        **others: Any,
    ) -> None:
        if not isinstance(denoiser, ProbabilityDenoiser):
            raise TypeError(f"ClassifierFree mixes log-probabilities of whole states: {denoiser!r} has numbers as well")
        if others:
            raise ArgumentError(
                f"{', '.join(others)}: of numbers; guidance of whole states has weight, null, convention"
            )
        check_option(("scale", "strength"), convention=convention)
        check_scale("weight", weight)
        self.denoiser, self.process, self.weight, self.convention = denoiser, denoiser.process, weight, convention
        if null is None:
            null = {
                name: null_of(name, size)
                for net in networks(denoiser)
                for name, size in getattr(net, "condition_sizes", {}).items()
            } or None
            self._fill: Callable[..., Any] | None = nothing_like
        else:
            self._fill = None
        self.null = (null,) if isinstance(null, str) else null

    @property
    def device(self) -> torch.device:
        return self.denoiser.device

    def log_probs(self, x: Tensor, t: Time, /, **cond: Any) -> Tensor:
        w = scale_at("weight", self.weight, t, len(x)) + (self.convention == "strength")
        nulled = self._nulled(cond, len(x))
        if known_all(w == 1):
            return self.denoiser.log_probs(x, t, **cond)
        poor = self.denoiser.log_probs(x, t, **nulled)
        if known_all(w == 0):
            return poor
        good = self.denoiser.log_probs(x, t, **cond)
        w = w.to(device=good.device, dtype=good.dtype)
        w = w.reshape(-1, *[1] * (good.ndim - 1)) if w.ndim else w
        possible = good.isfinite() & poor.isfinite()
        mixed = torch.where(possible, poor, 0) + w * (torch.where(possible, good, 0) - torch.where(possible, poor, 0))
        return torch.where(
            good.isnan() | poor.isnan(), torch.nan, torch.where(possible, mixed, -torch.inf)
        ).log_softmax(-1)

    def _nulled(self, cond: Mapping[str, Any], n: int) -> dict[str, Any]:
        missing = [name for name in self.null or () if name not in cond]
        if not cond or (missing and (self._fill is None or len(missing) == len(self.null or ()))):
            raise ValueError(
                f"classifier-free guidance without a condition ({', '.join(missing) or 'any'}): pass cond={{'label': "
                "labels}} say, give null= if it has another name, or sample the denoiser that it wraps"
            )
        if self._fill is not None and isinstance(self.null, Mapping):
            return {k: self._fill(v, self.null[k]) if k in self.null else v for k, v in cond.items()}
        if isinstance(self.null, Mapping):
            return replaced(cond, self.null, n)
        left_out = cond.keys() if self.null is None else set(self.null)
        return {k: v for k, v in cond.items() if k not in left_out}

    def __repr__(self) -> str:
        return f"ClassifierFree({self.denoiser!r}, weight={self.weight!r}, null={self.null!r})"
