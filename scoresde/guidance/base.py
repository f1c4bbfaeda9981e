"""What every guidance does to a denoiser, written once. With g = grad_x log p(y | x_t) and scale w, Bayes' rule adds
w g to the score, and by Tweedie's formula, score = (alpha D - x) / sigma^2, that is

    score' = score + w g        D' = D + w (sigma^2 / alpha) g        eps' = eps - w sigma g

and in the network's own output N, of D = r x + s N,

    N' = N + w k g,    k = sigma^2 / (alpha s)

which is what the wrappers here compute, so that no digits are lost on the way to D and back. The second form is the
mean shift of Dhariwal and Nichol (2021), the third their form for DDIM: see `scoresde.guidance.classifier`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from scoresde.checks import ArgumentError
from scoresde.denoiser import Denoiser, Posterior
from scoresde.entries import check_entries
from scoresde.sde import SDE
from scoresde.tensors import Time, expand_like, known_any, precise
from scoresde.views import Affine, combine
from scoresde.wrappers import Wrapper

__all__ = ["Guidance", "Scale", "check_scale", "known_all", "ratio", "scale_at", "scaled", "shifted"]


def shifted(mean: Tensor, gradient: Tensor, sde: SDE, t: Time) -> Tensor:
    """D + (sigma^2 / alpha) g, the posterior mean where g is added to the score, shape of mean.

    Where alpha = 0, x_t holds nothing of the data and any g = grad_x log p(y | x_t) is zero: the mean is left as it is.
    (Its limit as alpha -> 0 is E[x_0 | y] - E[x_0], of which g then tells nothing; start the grid a little later.)

    Args:
        mean: D, shape (B, ...).
        gradient: g, shape of mean.
        sde: the SDE.
        t: time, shape () or (B,).
    """
    t = precise(t)
    return mean + scaled(gradient, ratio(sde.sigma(t) ** 2, sde.alpha(t)))


def scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """factor g for a coefficient of shape () or (B,)."""
    return expand_like(factor, gradient) * gradient


Scale = float | Tensor | Callable[[Tensor], Tensor | float]
"""A factor: one number, one per sample (B,), or a function of t, float64 of shape () or (B,), to either."""


def check_scale(name: str, scale: Scale) -> None:
    """Raises ValueError unless the scale is a finite number, a tensor of shape () or (B,), or a function."""
    if isinstance(scale, Tensor):
        if scale.ndim > 1 or scale.dtype == torch.bool or scale.is_complex():
            raise ValueError(f"{name} is {scale.dtype} of shape {tuple(scale.shape)}: expected one number, or (B,)")
        if known_any(~scale.isfinite()):
            raise ValueError(f"{name}={scale.tolist()}: expected finite numbers")
    elif isinstance(scale, bool) or not (callable(scale) or (isinstance(scale, Real) and math.isfinite(scale))):
        raise ArgumentError(f"{name}={scale!r}: expected a finite number, one per sample, or a function of t")


def scale_at(name: str, scale: Scale, t: Time, batch: int | None = None) -> Tensor:
    """The scale at t, float64, of shape () or (B,).

    Raises:
        ValueError: if a function returned no number, or there is neither one entry nor one per sample.
    """
    value = scale(precise(t)) if callable(scale) else scale
    if callable(scale):
        check_scale(f"{name}(t)", value)
    value = precise(value)
    if batch is not None:
        check_entries(name, value, batch)
    return value


def known_all(condition: Tensor) -> bool:
    """Whether it holds everywhere; False where looking would stall a device, or cannot be done."""
    return known_any(condition) and not known_any(~condition)


class Guidance(Wrapper):
    """A wrapper that adds a gradient to the score, score' = score + w g. A subclass gives `guided`.

    It steps in the wrapped network's own output. The posterior variance is None where something is added, for it is not
    that of the wrapped one; where w = 0, known on the host, the wrapped denoiser is called as it is, bit for bit.

    Args:
        denoiser: the denoiser to wrap.
        scale: w: a number, one per sample (B,), or a function of t.

    Raises:
        TypeError: if denoiser is none.
        ValueError: on another kind of scale; by the call, if it has neither one entry nor one per sample.
    """

    def __init__(self, denoiser: Denoiser, scale: Scale = 1.0) -> None:
        super().__init__(denoiser)
        check_scale("scale", scale)
        self.scale = scale

    @abstractmethod
    def guided(self, x: Tensor, t: Time, cond: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """N of the wrapped denoiser, and g, which is added to the score w times, each of the shape of x."""

    def passed_on(self, cond: Mapping[str, Any]) -> Mapping[str, Any]:
        """The conditions that the wrapped denoiser is given."""
        return cond

    def off(self, t: Time) -> bool:
        """Whether nothing is added at t, known on the host."""
        return known_all(scale_at("scale", self.scale, t) == 0)

    def posterior(self, x: Tensor, t: Time, /, **cond: Any) -> Posterior:
        if self.off(t):
            return self.denoiser.posterior(x, t, **self.passed_on(cond))
        N = self.output(x, t, **cond)
        r, s = self.affine(t)
        return Posterior(combine(r, x, s, N))

    def view(self, name: str, x: Tensor, t: Time, /, **cond: Any) -> Tensor:
        if self.off(t):
            return self.denoiser.view(name, x, t, **self.passed_on(cond))
        return super().view(name, x, t, **cond)

    def output(self, x: Tensor, t: Time, /, **cond: Any) -> Tensor:
        w = scale_at("scale", self.scale, t, len(x))
        if known_all(w == 0):
            return self.denoiser.output(x, t, **self.passed_on(cond))
        N, g = self.guided(x, t, cond)
        t = precise(t)
        s = self.affine(t)[1]
        k = ratio(self.sde.sigma(t) ** 2, self.sde.alpha(t) * s)
        return N + scaled(g, (w.to(k.device) if k.ndim else w) * k)

    def outputs(self, times: Tensor) -> Callable[[int, Tensor, Mapping[str, Any]], Tensor]:
        numbers, unguided = times.tolist(), self.denoiser.outputs(times)
        off = [self.off(t) for t in numbers]
        return lambda i, x, cond: unguided(i, x, self.passed_on(cond)) if off[i] else self.output(x, numbers[i], **cond)

    def affine(self, t: Time) -> Affine:
        return self.denoiser.affine(t)

    def check_times(self, t: Tensor) -> None:
        self.denoiser.check_times(t)


def ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is."""
    zero = b == 0
    return torch.where(zero, 0.0, a / torch.where(zero, 1.0, b))
