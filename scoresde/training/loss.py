"""Denoising score matching (Vincent, 2011; Song and Ermon, 2019; Ho et al., 2020):

    E_{t, x_0, eps} [ w(t) |eps_hat(alpha x_0 + sigma eps, t) - eps|^2 / d ]

for any denoiser. The error is taken in what the network itself predicts, N with D = r x + s N: its target is
N* = (x_0 - r x_t) / s = ((1 - r alpha) x_0 - r sigma eps) / s, and |eps_hat - eps| = |alpha s / sigma| |N - N*|, so no
digit is lost at either end and one formula serves eps, x0, v, score, velocity and EDM networks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from scoresde.denoiser import Denoiser
from scoresde.sde import SDE
from scoresde.tensors import as_time, check_batch, expand_like, known_any
from scoresde.training.weights import TimeSampler, UniformTimes, Weighting, simple
from scoresde.views import check_time, combine

__all__ = ["NoisyBatch", "dsm_loss", "noisy_batch"]


def dsm_loss(
    denoiser: Denoiser,
    x0: Tensor,
    *,
    weighting: Weighting = simple,
    times: TimeSampler | None = None,
    t: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    cond: Mapping[str, Any] | None = None,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """The denoising score matching loss of a batch.

    Args:
        denoiser: the model; its network must be differentiable.
        x0: clean data, shape (B, ...), floating point.
        weighting: w(sde, t), the weight of the noise error; see `scoresde.training.weights`.
        times: the distribution of t; uniform and stratified by default.
        t: instead of drawing, the times, shape () or (B,), above 0.
        noise: instead of drawing, eps, shape of x0.
        generator: where t and noise are drawn from, on its own device; freshly seeded if not given.
        cond: keyword arguments for the network.
        reduction: "mean" over the batch, or "none" for shape (B,).

    Returns:
        The loss, at least float32: a scalar, or (B,).

    Raises:
        ValueError: if x0 is not floating point, shapes do not fit, t and times are both given, or a t is 0 or outside
            the SDE.
    """
    sde = denoiser.sde
    check_batch(x0, "x0")
    if t is not None and times is not None:
        raise ValueError("give t= or times=, not both")
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction={reduction!r}: expected 'mean' or 'none'")
    t, ratio, noise, x_t, _ = noisy_batch(sde, x0, times, t, noise, generator)
    (r, s), alpha, sigma = denoiser.affine(t), sde.alpha(t), sde.sigma(t)
    target = combine((1 - r * alpha) / s, x0, -r * sigma / s, noise)
    error = denoiser.output(x_t, t.to(x0.device), **(cond or {})) - target
    scale = ratio * weighting(sde, t) * (alpha * s / sigma) ** 2
    loss = expand_like(scale, error).reshape(-1) * error.reshape(len(x0), -1).square().mean(1)
    return loss.mean() if reduction == "mean" else loss


class NoisyBatch(NamedTuple):
    """Noisy data x_t = alpha x_0 + sigma noise at t (B,), float64, the weights `ratio` (B,) of the times that were
    drawn, and the generator that drew.
    """

    t: Tensor
    ratio: Tensor
    noise: Tensor
    x_t: Tensor
    generator: torch.Generator


def noisy_batch(
    sde: SDE,
    x0: Tensor,
    times: TimeSampler | None,
    t: Tensor | None,
    noise: Tensor | None,
    generator: torch.Generator | None,
) -> NoisyBatch:
    """What the losses see of a batch: t and noise as given, or drawn, times before noise. Arguments and errors as for
    `dsm_loss`.
    """
    if generator is None:
        generator = torch.Generator(x0.device)
        generator.seed()
    times = times or UniformTimes()
    if t is None:
        t = times.draw(sde, len(x0), generator)
        ratio = times.ratio(sde, t)
    else:
        t = as_time(t).double()
        check_time(t, len(x0), sde, sde.t_max)
        t = t.expand(len(x0))
        if known_any(t == 0):
            raise ValueError("t = 0: the data itself holds no noise to be learned, so its loss is undefined")
        ratio = torch.ones_like(t)
    if noise is None:
        noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype, device=generator.device).to(x0.device)
    x_t = sde.perturb(x0, t, noise)
    return NoisyBatch(t, ratio, noise, x_t, generator)
