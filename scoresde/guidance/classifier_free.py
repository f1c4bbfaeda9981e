"""Guidance by the difference of two models, a good one D_1 and a poor one D_0:

    D' = D_0 + w (D_1 - D_0)        w = 1 is D_1 alone, w = 0 is D_0 alone, and beyond 1 is away from what D_0 would do

Classifier-free guidance (Ho and Salimans, 2022) has the conditional model for D_1 and the unconditional one, the same
network with a null condition, for D_0: the score then is score_1 + (w - 1) grad_x log p(y | x_t). Autoguidance (Karras
et al., 2024) has a smaller or less trained model of the same condition for D_0.

Two conventions of the weight are in use: w above, the "guidance scale" of Imagen (Saharia et al., 2022) and of most
code, and the "strength" w - 1 of Ho and Salimans, D' = (1 + w) D_1 - w D_0.

The weights sum to one, so the same formula holds for what the network itself predicts, in which it is computed: no
digits are lost, and eps, x0, v and score networks give the same D'. What is not linear is done in D:

- rescaling (Lin et al., 2024, section 3.4): D' is multiplied by phi std(D_1) / std(D') + 1 - phi, the standard
  deviations over each sample's elements. (They give it for what the network predicts, which then matters.)
- projection (Sadat et al., 2025, adaptive projected guidance): of delta = D_1 - D_0, cut to a norm, the part parallel
  to D_1 is scaled by a factor, D' = D_1 + (w - 1) (delta_orthogonal + factor delta_parallel). Their momentum between
  steps is left out: a denoiser remembers nothing.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from scoresde.checks import check_option
from scoresde.denoiser import Denoiser, networks
from scoresde.guidance.base import Scale, check_scale, known_all, ratio, scale_at, scaled
from scoresde.guidance.branches import Branch, Branching, Call, evaluate, replaced, translated
from scoresde.nn import MLP, DiT, UNet
from scoresde.nn.embedding import TimeEmbedding
from scoresde.tensors import Time, known_any, precise
from scoresde.views import Affine, combine

__all__ = ["Autoguidance", "ClassifierFree"]

Convention = Literal["scale", "strength"]


class _Extrapolation(Branching):
    """D_0 + w (D_1 - D_0), D_1 being the wrapped denoiser under the call's conditions. A subclass gives D_0; arguments
    as for `ClassifierFree`.
    """

    def __init__(
        self,
        denoisers: Sequence[Denoiser],
        weight: Scale,
        convention: Convention,
        interval: tuple[float, float] | None,
        rescale: float,
        parallel: float,
        max_norm: float | None,
        batched: bool,
    ) -> None:
        super().__init__(denoisers)
        check_scale("weight", weight)
        check_option(("scale", "strength"), convention=convention)
        if interval is not None and not (len(interval) == 2 and 0 <= interval[0] < interval[1]):
            raise ValueError(f"interval={interval!r}: expected noise levels (low, high), 0 <= low < high")
        if not (0 <= rescale <= 1 and math.isfinite(parallel) and (max_norm is None or max_norm > 0)):
            raise ValueError(
                f"rescale={rescale}, parallel={parallel}, max_norm={max_norm}: expected a share in [0, 1], a finite "
                "factor, and a norm > 0 or None"
            )
        self.weight, self.convention, self.interval, self.batched = weight, convention, interval, batched
        self.rescale, self.parallel, self.max_norm = rescale, parallel, max_norm

    @abstractmethod
    def poor(self, x: Tensor, cond: Mapping[str, Any]) -> Branch:
        """D_0 and its conditions."""

    def weight_at(self, t: Time, batch: int | None = None) -> Tensor:
        """w, 1 outside of the interval, float64 of shape () or (B,)."""
        w = scale_at("weight", self.weight, t, batch) + (self.convention == "strength")
        if self.interval is None:
            return w
        t = precise(t)
        level, (low, high) = (-self.sde.half_log_snr(t)).exp(), self.interval
        w = w.to(level.device) if level.ndim else w
        return torch.where((level > low) & (level <= high), w, 1.0)

    @property
    def linear(self) -> bool:
        """Whether nothing is done in D, so that what the network predicts can be combined."""
        return self.rescale == 0 and self.parallel == 1 and self.max_norm is None

    def affine(self, t: Time) -> Affine:
        return super().affine(t) if self.linear else Denoiser.affine(self, t)

    def alone(self, x: Tensor, t: Time, cond: Mapping[str, Any]) -> Branch | None:
        w = self.weight_at(t, len(x))
        if known_all(w == 1):
            return self.denoiser, cond
        return self.poor(x, cond) if known_all(w == 0) and self.linear else None

    def combined(self, x: Tensor, t: Time, cond: Mapping[str, Any], call: Call) -> Tensor:
        w, good, poor = self.weight_at(t, len(x)), (self.denoiser, cond), self.poor(x, cond)
        if known_all(w == 1):
            return self._output(evaluate([good], x, call, False)[0], x, t)
        if known_all(w == 0) and self.linear:
            return translated(evaluate([poor], x, call, False)[0], poor[0], self.denoiser, x, t)
        N_1, N_0 = evaluate([good, poor], x, call, self.batched)
        N_0 = translated(N_0, poor[0], self.denoiser, x, t)
        if self.linear:
            return N_0 + scaled(N_1 - N_0, w)
        return self._projected(self._output(N_1, x, t), self._output(N_0, x, t), w)

    def _output(self, N: Tensor, x: Tensor, t: Time) -> Tensor:
        """What this denoiser steps in: D unless it is linear."""
        if self.linear:
            return N
        r, s = self.denoiser.affine(t)
        return combine(r, x, s, N)

    def _projected(self, D_1: Tensor, D_0: Tensor, w: Tensor) -> Tensor:
        """D' with projection and rescaling, of the module's docstring."""
        flat, delta = D_1.reshape(len(D_1), -1), (D_1 - D_0).reshape(len(D_1), -1)
        if self.max_norm is not None:
            norm = delta.norm(dim=1, keepdim=True)
            over = norm > self.max_norm
            delta = delta * torch.where(over, self.max_norm / torch.where(over, norm, 1.0), 1.0)
        if self.parallel != 1:
            share = ratio((delta * flat).sum(1, keepdim=True), flat.square().sum(1, keepdim=True))
            delta = delta + (self.parallel - 1) * share * flat
        D = D_1 + scaled(delta.reshape(D_1.shape), w - 1)
        if self.rescale == 0:
            return D
        std, std_1 = (y.reshape(len(y), -1).std(1, correction=0) for y in (D, D_1))
        return scaled(D, self.rescale * ratio(std_1, std) + (1 - self.rescale))

    def _options(self) -> str:
        given = {name: getattr(self, name) for name in ("convention", "interval", "rescale", "parallel", "max_norm")}
        usual = {"convention": "scale", "interval": None, "rescale": 0.0, "parallel": 1.0, "max_norm": None}
        return "".join(f", {name}={value!r}" for name, value in given.items() if value != usual[name])


class ClassifierFree(_Extrapolation):
    """Classifier-free guidance (Ho and Salimans, 2022): D' = D_u + w (D_c - D_u).

    An evaluation is one call of the network on both branches, 2 B samples; at w = 1 and w = 0, where that is known on
    the host, one of B: the conditional or unconditional model itself, bit for bit. The solution's nfe counts either as
    one.

    Args:
        denoiser: a conditional denoiser, that has been trained with the null condition too.
        weight: w of the convention: a number, one per sample (B,), or a function of t.
        null: what makes the condition null: values of conditions, {"label": 10}, in the shape of one sample's or with a
            batch; or names, ("text",), of conditions that the network is not given, which takes two calls. By default
            nothing is told, as `TrainingData(drop=)` trains the networks of `scoresde.nn`: the null class, zeros for a
            vector and an image, whichever of them are given; for others all conditions are left out. A network that
            was always told its image wants null={"label": 10}, which keeps that.
        convention: "scale": w = 1 is the conditional model and 0 the unconditional one (Imagen's guidance scale, that
            of most code); "strength": 0 is the conditional model and -1 the unconditional one (Ho and Salimans:
            (1 + w) D_c - w D_u).
        interval: noise levels sigma / alpha, low < level <= high, that are guided; at all others the conditional model
            runs by itself, in a call of B (Kynkaanniemi et al., 2024: better and cheaper).
        rescale: phi, the share of rescaling; 0.7 is theirs. Not for events of one number.
        parallel, max_norm: of the projection: the factor of what is parallel to D_c, and the largest norm of the
            difference; 0 and a norm about that of the data's spread are theirs.
        batched: False makes two calls of B samples instead of one of 2 B, in half the memory. So does a condition that
            is no tensor and no number.

    The posterior variance is passed on where one model runs alone, else None.

    Raises:
        TypeError: if denoiser is none.
        ValueError: on another option; by the call, before the network's, if a condition that null names is missing, the
            null does not fit it, a label is outside the classes, or a weight has neither one entry nor one per sample.

    >>> from scoresde import EpsDenoiser, VPSDE
    >>> denoiser = EpsDenoiser(lambda x, t, label: x * label[:, None], VPSDE())  # label 0 is null
    >>> guided = ClassifierFree(denoiser, weight=3.0, null={"label": 0})
    >>> guided.eps(torch.ones(2, 1), 0.5, label=torch.tensor([1, 2])).flatten()
    tensor([3., 6.])
    """

    def __init__(
        self,
        denoiser: Denoiser,
        weight: Scale = 2.0,
        *,
        null: Mapping[str, Any] | Sequence[str] | None = None,
        convention: Convention = "scale",
        interval: tuple[float, float] | None = None,
        rescale: float = 0.0,
        parallel: float = 1.0,
        max_norm: float | None = None,
        batched: bool = True,
    ) -> None:
        super().__init__([denoiser], weight, convention, interval, rescale, parallel, max_norm, batched)
        nothing = _nothing(denoiser)
        self.classes, self.by_default = nothing.get("label"), null is None
        if null is None:
            null = nothing or None
        if isinstance(null, str):
            null = (null,)
        if null is not None and not len(null):
            raise ValueError("null names no condition: give values, {'label': 10} say, or names")
        self.null = null

    def poor(self, x: Tensor, cond: Mapping[str, Any]) -> Branch:
        self._check_conditions(cond)
        if isinstance(self.null, Mapping) and self.by_default:
            return self.denoiser, {k: _filled(v, self.null[k]) if k in self.null else v for k, v in cond.items()}
        if isinstance(self.null, Mapping):
            return self.denoiser, replaced(cond, self.null, x)
        return self.denoiser, {k: v for k, v in cond.items() if self.null is not None and k not in self.null}

    def _check_conditions(self, cond: Mapping[str, Any]) -> None:
        """Raises ValueError unless the condition that is to be null is there, and fits."""
        names = list(self.null or ())
        missing = [name for name in names if name not in cond]
        if not cond or (missing and not (self.by_default and len(missing) < len(names))):
            raise ValueError(
                f"classifier-free guidance without a condition ({', '.join(missing) or 'any'}): pass "
                "cond={'label': labels} say, give null= if the condition has another name, or sample the denoiser that "
                "it wraps"
            )
        if self.classes is not None and "label" in cond:
            label = torch.as_tensor(cond["label"])
            if known_any((label < 0) | (label > self.classes)):
                raise ValueError(
                    f"label {label.tolist()} is outside the {self.classes} classes of the network: expected 0 to "
                    f"{self.classes - 1}, or {self.classes} for none"
                )

    def __repr__(self) -> str:
        return f"ClassifierFree({self.denoiser!r}, weight={self.weight!r}, null={self.null!r}{self._options()})"


class Autoguidance(_Extrapolation):
    """Guidance by a bad version of the model itself (Karras et al., 2024): D' = D_0 + w (D_1 - D_0).

    Args:
        denoiser: D_1, the model.
        weak: D_0: smaller, or less trained, on the same data, and of the same SDE; it may predict something else. It is
            given the same conditions: take `Conditioned(weak, drop=("label",))` for an unconditional one.
        weight, convention, interval, rescale, parallel, max_norm: as for `ClassifierFree`.

    An evaluation, which the solution's nfe counts as one, is a call of each. The posterior variance is passed on where
    one model runs alone, else None.

    Raises:
        TypeError: if either is no denoiser.
        ValueError: if they are of different SDEs, or on another option.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        weak: Denoiser,
        weight: Scale = 2.0,
        *,
        convention: Convention = "scale",
        interval: tuple[float, float] | None = None,
        rescale: float = 0.0,
        parallel: float = 1.0,
        max_norm: float | None = None,
    ) -> None:
        super().__init__([denoiser, weak], weight, convention, interval, rescale, parallel, max_norm, True)
        self.weak = weak

    def poor(self, x: Tensor, cond: Mapping[str, Any]) -> Branch:
        return self.weak, cond

    def __repr__(self) -> str:
        return f"Autoguidance({self.denoiser!r}, {self.weak!r}, weight={self.weight!r}{self._options()})"


def _nothing(denoiser: Denoiser) -> dict[str, int]:
    """What tells a network of `scoresde.nn` nothing, of each condition that it takes; empty for others."""
    modules = [module for net in networks(denoiser) for module in net.modules()]
    classes = [m.classes.num_embeddings for m in modules if isinstance(m, TimeEmbedding) and m.classes is not None]
    found = {"label": classes[0]} if classes else {}
    ours = [module for module in modules if isinstance(module, MLP | UNet | DiT)]
    if any(net.time.vectors is not None for net in ours):
        found["vector"] = 0
    if any(getattr(net, "image_condition", 0) for net in ours):
        found["image"] = 0
    return found


def _filled(value: Any, null: int) -> Any:
    """The null in the shape of a condition."""
    return torch.full_like(value, null) if isinstance(value, Tensor) else null
