"""Guidance by the difference of two models, a good one D_1 and a poor one D_0:

    D' = D_0 + w (D_1 - D_0)        w = 1 is D_1 alone, w = 0 is D_0 alone, and beyond 1 is away from what D_0 would do

or another of the rules of `scoresde.guidance.rules`. Classifier-free guidance (Ho and Salimans, 2022) has the
conditional model for D_1 and the unconditional one, the same network with a null condition, for D_0: the score then is
score_1 + (w - 1) grad_x log p(y | x_t). Autoguidance (Karras et al., 2024) has a smaller or less trained model of the
same condition for D_0.

Two conventions of the weight are in use: w above, the "guidance scale" of Imagen (Saharia et al., 2022) and of most
code, and the "strength" w - 1 of Ho and Salimans, D' = (1 + w) D_1 - w D_0.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from scoresde.categorical import StateDenoiser
from scoresde.checks import ArgumentError, check_option, check_whole
from scoresde.data.conditions import nothing_like, null_of
from scoresde.denoiser import Denoiser, Posterior
from scoresde.guidance.base import Scale, check_scale, known_all, scale_at
from scoresde.guidance.branches import (
    NULL,
    Branch,
    Branching,
    Combined,
    evaluate,
    nested,
    replaced,
    samples_of,
    times_of,
)
from scoresde.guidance.rules import RULES, Rule, extrapolated, projected
from scoresde.guidance.states import ClassifierFreeStates
from scoresde.masks import mask_name
from scoresde.networks import networks
from scoresde.tensors import Time, known_any, precise
from scoresde.views import combine
from scoresde.wrappers import lacks_variance

__all__ = ["Autoguidance", "ClassifierFree"]

Convention = Literal["scale", "strength"]


class _Extrapolation(Branching):
    """A rule of D_1, the wrapped denoiser under the call's conditions, and D_0, which a subclass gives. Arguments as
    for `ClassifierFree`.
    """

    def __init__(
        self,
        denoisers: Sequence[Denoiser],
        weight: Scale,
        convention: Convention,
        interval: tuple[float, float] | None,
        rule: Rule,
        channels: Sequence[int] | None = None,
        batched: bool = True,
    ) -> None:
        super().__init__(denoisers, rule.view, batched)
        check_scale("weight", weight)
        check_option(("scale", "strength"), convention=convention)
        if interval is not None and not (len(interval) == 2 and 0 <= interval[0] < interval[1]):
            raise ArgumentError(f"interval={interval!r}: expected noise levels (low, high), 0 <= low < high")
        self.weight, self.convention, self.interval, self.rule = weight, convention, interval, rule
        self.channels = None if channels is None else tuple(channels)
        if self.channels is not None:
            check_whole(**{f"channels[{i}]": channel for i, channel in enumerate(self.channels)})
            if len(set(self.channels)) < len(self.channels) or not self.channels:
                raise ArgumentError(f"channels={self.channels}: expected different channels, and one at least")

    def good(self, cond: Mapping[str, Any]) -> Mapping[str, Any]:
        """The conditions of D_1."""
        return self.told(self.denoiser, cond)

    @property
    def masks(self) -> bool:  # type: ignore[override]
        return self.rule.function is extrapolated  # the others take norms and products over all of an event

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

    def branches(self, x: Tensor, t: Time, cond: Mapping[str, Any]) -> tuple[list[Branch], Combined | None]:
        w, good, poor = self.weight_at(t, x.shape[0]), (self.denoiser, self.good(cond)), self.poor(x, cond)
        if known_all(w == 1):
            return [good], None
        if known_all(w == 0) and self.rule.view is None and self.channels is None:
            return [poor], None
        if self.channels is not None and (x.ndim < 2 or max(self.channels) >= x.shape[1]):
            raise ArgumentError(f"channels={self.channels}, but x has shape {tuple(x.shape)}, (B, C, ...)")
        return [good, poor], lambda F_1, F_0: self.guided(F_1, F_0, w)

    def outputs(self, times: Tensor) -> Callable[[int, Tensor, Mapping[str, Any]], Tensor]:
        """Whether D_1 runs alone at a time is found here, on the host: where the loop is traced, nothing can be."""
        numbers, both, good = times.tolist(), super().outputs(times), self.denoiser.outputs(times)
        alone = [known_all(self.weight_at(t) == 1) for t in numbers]

        def at(i: int, x: Tensor, cond: Mapping[str, Any]) -> Tensor:
            if not alone[i]:
                return both(i, x, cond)
            self.poor(x, cond)  # its conditions are checked all the same
            return self._own(good(i, x, self.good(cond)), self.denoiser, x, numbers[i])

        return at

    def guided(self, F_1: Tensor, F_0: Tensor, w: Tensor) -> Tensor:
        """What the rule makes of the channels that are guided, and F_1 in the others."""
        if self.channels is None:
            return self.rule(F_1, F_0, w)
        good, poor = F_1.unbind(1), F_0.unbind(1)  # no index on the device: to make it there would stall it
        some_1, some_0 = (torch.stack([F[i] for i in self.channels], 1) for F in (good, poor))
        guided = dict(zip(self.channels, self.rule(some_1, some_0, w).unbind(1), strict=True))
        return torch.stack([guided.get(i, F) for i, F in enumerate(good)], 1)

    def _options(self) -> str:
        usual = {"convention": "scale", "interval": None, "rule": RULES["cfg"], "channels": None}
        given = {name: getattr(self, name) for name in usual}
        return "".join(f", {name}={value!r}" for name, value in given.items() if value != usual[name])


class ClassifierFree(_Extrapolation):
    """Classifier-free guidance (Ho and Salimans, 2022): D' = D_u + w (D_c - D_u).

    An evaluation is one call of the network on both branches, 2 B samples; at w = 1 and w = 0, where that is known on
    the host, one of B: the conditional or unconditional model itself, bit for bit. The solution's nfe counts either as
    one. Of whole states (`scoresde.categorical`) it mixes log-probabilities (`scoresde.guidance.states`), by weight,
    null and convention.

    Args:
        denoiser: a conditional denoiser, that has been trained with the null condition too.
        weight: w of the convention: a number, one per sample (B,), or a function of t.
        null: what makes the condition null: values of conditions, {"label": 10} or {"text": ""}, in the shape of one
            sample's or with a batch, and of the same structure, or one value for all of a structure; or names,
            ("text",), of conditions that the network is not given, which takes two calls. By default
            nothing is told, as `TrainingData(drop=)` trains the networks of `scoresde.nn`: the null class, zeros for a
            vector, an image and a context, of which no token counts, whichever of them are given; to others all
            conditions are left out, unless they have `condition_sizes` too. A network that was always told its image
            wants null={"label": 10}, which keeps that. Other tokens, a negative text say, are given with their mask.
        convention: "scale": w = 1 is the conditional model and 0 the unconditional one (Imagen's guidance scale, that
            of most code); "strength": 0 is the conditional model and -1 the unconditional one (Ho and Salimans:
            (1 + w) D_c - w D_u).
        interval: noise levels sigma / alpha, low < level <= high, that are guided; at all others the conditional model
            runs by itself, in a call of B (Kynkaanniemi et al., 2024: better and cheaper).
        rule: a `Rule`, or its name in `RULES`: "cfg" is D' above; "cfg-zero", "apg" and "rescale" are not for events
            of one number.
        rescale: instead, phi, the share of rescaling; 0.7 is theirs.
        parallel, max_norm: and of the projection: the factor of what is parallel to D_c, and the largest norm of the
            difference; 0 and a norm about that of the data's spread are theirs.
        channels: those that are guided, range(3) say, and that a rule sees; in the others the conditional model is left
            as it is. The published samplers of DiT (Peebles and Xie, 2023) guide the first three of a latent's four.
        batched: False makes two calls of B samples instead of one of 2 B, in half the memory. So do conditions that
            cannot be put together, objects that are not the same for both say.
        variance: "conditional": the posterior variance is the conditional model's, though the mean is guided, as in the
            samplers of guided diffusion (Dhariwal and Nichol, 2021) and DiT (Peebles and Xie, 2023), whose networks
            have a learned variance: `OptimalVariance(DDPM())` with a `LearnedRangeDenoiser` inside. It is not that of
            the guided law, so no bound takes it. By default the variance is passed on where one model runs alone, else
            None.

    Raises:
        TypeError: if denoiser is none.
        ValueError: on another option, or if the denoiser is known to have no variance to pass on; by the call, before
            the network's, if a condition that null names is missing, the null does not fit it, a label is outside the
            classes, or a weight has neither one entry nor one per sample.

    >>> from scoresde import EpsDenoiser, VPSDE
    >>> denoiser = EpsDenoiser(lambda x, t, label: x * label[:, None], VPSDE())  # label 0 is null
    >>> guided = ClassifierFree(denoiser, weight=3.0, null={"label": 0})
    >>> guided.eps(torch.ones(2, 1), 0.5, label=torch.tensor([1, 2])).flatten()
    tensor([3., 6.])
    """

    def __new__(cls, denoiser: Any = None, *args: Any, **options: Any) -> Any:
        if isinstance(denoiser, StateDenoiser):
            return ClassifierFreeStates(denoiser, *args, **options)  # type: ignore[arg-type]
        return super().__new__(cls)

    def __init__(
        self,
        denoiser: Denoiser,
        weight: Scale = 2.0,
        *,
        null: Mapping[str, Any] | Sequence[str] | None = None,
        convention: Convention = "scale",
        interval: tuple[float, float] | None = None,
        rule: Rule | str = "cfg",
        rescale: float = 0.0,
        parallel: float = 1.0,
        max_norm: float | None = None,
        channels: Sequence[int] | None = None,
        batched: bool = True,
        variance: Literal["conditional"] | None = None,
    ) -> None:
        check_option((None, "conditional"), variance=variance)
        rule = _rule(rule, rescale, parallel, max_norm)
        super().__init__([denoiser], weight, convention, interval, rule, channels, batched)
        nothing = _nothing(denoiser)
        self.classes, self.by_default = nothing.get("label"), null is None
        if null is None:
            null = nothing or None
        if isinstance(null, str):
            null = (null,)
        if null is not None and not len(null):
            raise ValueError("null names no condition: give values, {'label': 10} say, or names")
        self.null, self.variance = null, variance
        if variance is not None and lacks_variance(denoiser):
            raise ValueError(
                f"variance={variance!r}, but {denoiser!r} knows none: wrap it in a LearnedRangeDenoiser, another head "
                "or an AnalyticDenoiser"
            )

    @property
    def borrowed(self) -> bool:
        return self.variance is not None or super().borrowed

    def covariance(self, t: Time) -> Tensor | None:
        return None if self.variance is None else self.denoiser.covariance(t)

    def prepared(self, cond: Mapping[str, Any] | None) -> dict[str, Any]:
        """The null, of a negative text say, is encoded once as well, and goes with the conditions from then on; unless
        it is the default of all that is made of these.
        """
        given, found, null = dict(cond or {}), self.denoiser.prepared(cond), tuple(self.null or ())
        known = self.by_default and found.keys() - given.keys() <= {*null, "context_mask"}
        if not nested(found) and (known or not any(name in given and name not in found for name in null)):
            return found
        if NULL in found:  # of guidance around guidance
            return given
        self._check_conditions(given)
        values = self.null if isinstance(self.null, Mapping) else None
        return {**found, NULL: self.denoiser.prepared(self._nulled(given, samples_of(given, values)))}

    def good(self, cond: Mapping[str, Any]) -> Mapping[str, Any]:
        return {name: value for name, value in cond.items() if name != NULL}

    def posterior(self, x: Tensor, t: Time, /, **cond: Any) -> Posterior:
        w = self.weight_at(t, len(x))
        if self.variance is None or known_all(w == 1):
            return super().posterior(x, t, **cond)
        variances: list[Tensor | None] = []

        def call(denoiser: Denoiser, many: Tensor, cond: Mapping[str, Any]) -> Tensor:
            times = times_of(t, len(many) // len(x))
            D, var = denoiser.posterior(many, times, **cond)
            variances.append(var)
            r, s = denoiser.affine(times)
            return combine(1 / s, D, -r / s, many)

        found = evaluate([(self.denoiser, self.good(cond)), self.poor(x, cond)], x, call, self.batched)
        F_1, F_0 = (self._own(N, self.denoiser, x, t) for N in found)
        r, s = self.affine(t)
        var = variances[0]  # of the conditional branch, which comes first
        var = var[: len(x)] if var is not None and var.ndim == x.ndim else var
        return Posterior(combine(r, x, s, self.guided(F_1, F_0, w)), var)

    def poor(self, x: Tensor, cond: Mapping[str, Any]) -> Branch:
        if NULL in cond:
            return self.denoiser, cond[NULL]
        self._check_conditions(cond)
        return self.denoiser, self._nulled(cond, x.shape[0])

    def _nulled(self, cond: Mapping[str, Any], n: int) -> dict[str, Any]:
        """The conditions of D_0 for n samples."""
        if isinstance(self.null, Mapping) and self.by_default:
            return {k: nothing_like(v, self.null[k]) if k in self.null else v for k, v in cond.items()}
        if isinstance(self.null, Mapping):
            return replaced(cond, self.null, n)
        kept = () if self.null is None else cond.keys() - set(self.null)
        return {k: v for k, v in cond.items() if k in kept or k == mask_name(self.denoiser)}

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
        variance = "" if self.variance is None else f", variance={self.variance!r}"
        return (
            f"ClassifierFree({self.denoiser!r}, weight={self.weight!r}, null={self.null!r}{self._options()}{variance})"
        )


class Autoguidance(_Extrapolation):
    """Guidance by a bad version of the model itself (Karras et al., 2024): D' = D_0 + w (D_1 - D_0).

    Args:
        denoiser: D_1, the model.
        weak: D_0: smaller, or less trained, on the same data, and of the same SDE; it may predict something else. It is
            given the same conditions: take `Conditioned(weak, drop=("label",))` for an unconditional one.
        weight, convention, interval, rule, rescale, parallel, max_norm, channels: as for `ClassifierFree`.

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
        rule: Rule | str = "cfg",
        rescale: float = 0.0,
        parallel: float = 1.0,
        max_norm: float | None = None,
        channels: Sequence[int] | None = None,
    ) -> None:
        rule = _rule(rule, rescale, parallel, max_norm)
        super().__init__([denoiser, weak], weight, convention, interval, rule, channels)
        self.weak = weak

    def poor(self, x: Tensor, cond: Mapping[str, Any]) -> Branch:
        return self.weak, self.told(self.weak, cond)

    def __repr__(self) -> str:
        return f"Autoguidance({self.denoiser!r}, {self.weak!r}, weight={self.weight!r}{self._options()})"


def _rule(rule: Rule | str, rescale: float, parallel: float, max_norm: float | None) -> Rule:
    """The rule of that name, or with these options.

    Raises:
        ValueError: if there is none, or an option is out of range or of another rule.
    """
    if not (0 <= rescale <= 1 and math.isfinite(parallel) and (max_norm is None or max_norm > 0)):
        raise ValueError(
            f"rescale={rescale}, parallel={parallel}, max_norm={max_norm}: expected a share in [0, 1], a finite "
            "factor, and a norm > 0 or None"
        )
    if (rescale, parallel, max_norm) != (0, 1, None):
        if rule != "cfg":
            raise ValueError(f"rescale, parallel and max_norm make a rule of their own: leave rule={rule!r} away")
        return Rule(projected, "x0", {"rescale": rescale, "parallel": parallel, "max_norm": max_norm})
    if isinstance(rule, Rule):
        return rule
    check_option(RULES, rule=rule)
    return RULES[rule]


def _nothing(denoiser: Denoiser) -> dict[str, int]:
    """What tells the networks that say what they can be told (`condition_sizes`) nothing of it; empty for others."""
    sizes: dict[str, int] = {}
    for net in networks(denoiser):
        for module in net.modules():
            sizes = {**getattr(module, "condition_sizes", {}), **sizes}
    return {name: null_of(name, sizes.get("label")) for name in sizes}
