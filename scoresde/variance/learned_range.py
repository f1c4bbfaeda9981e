"""The learned variance of improved DDPM: of each step t -> s of a chain, by a head h.

v = (h + 1) / 2 stands for a step's variance between the two choices of DDPM, its smaller one being the posterior's:

    log v_step = v log(sigma_t^2 w) + (1 - v) log(sigma_s^2 w),    w = 1 - e^{-2 (lambda_s - lambda_t)}

A denoiser says it by Var[x_0 | x_t], with which the step's variance is c^2 + b^2 Var, c^2 = sigma_s^2 w, b = alpha_s w:

    Var = (v_step - c^2) / b^2

The last step, to s = 0, ends at D: there Var = v_step, the decoder's variance, and the smaller choice, which would be
zero, is that of the step before.

The head is trained by the bound of that chain, for a step the Kullback-Leibler divergence between two Gaussians,

    2 KL = c^2 / v_step - 1 + log(v_step / c^2) + b^2 (D - x_0)^2 / v_step

elementwise, and for the last one -log N(x_0; D, v_step) or that of its bin, and the mean by L_simple.

Source: Nichol and Dhariwal (2021), "Improved Denoising Diffusion Probabilistic Models".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scoresde.chain import DDPMChain
from scoresde.checks import check_nonnegative
from scoresde.denoiser import Denoiser
from scoresde.grid import Grid
from scoresde.sde import SDE
from scoresde.tensors import expand_like
from scoresde.training.weights import TimeSampler
from scoresde.variance.heads import HeadDenoiser, Reduction, Regression, noisy
from scoresde.variance.trunk import Head, Pair

__all__ = ["LearnedRangeDenoiser", "hybrid_loss"]


class LearnedRangeDenoiser(HeadDenoiser):
    """The learned variance of improved DDPM, as a Var[x_0 | x_t]: c and b of the module's docstring are DDPM's, so on
    the grid's own steps DDPM's chain with the posterior variance is improved DDPM's, re-spaced or not.

    Args:
        denoiser, head, data_range, average: as in `SNDenoiser`; a head trained by `hybrid_loss`. v < 0, a variance
            below DDPM's smaller one, counts as 0.
        grid: whose steps are meant, ending at t = 0; by default all steps of a `DDPMChain`. At a time between two of
            its times, s is the next below.

    Raises:
        TypeError, ValueError: as for `SNDenoiser`; and if the grid has another SDE, fewer than two steps, does not end
            at 0, or is missing for an SDE that is no chain.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        head: Head | None = None,
        *,
        grid: Grid | None = None,
        data_range: tuple[float, float] | None = None,
        average: bool = False,
    ) -> None:
        super().__init__(denoiser, head, data_range=data_range, average=average)
        self.grid = _whole(denoiser.sde, grid)

    def _variance(self, t: Tensor, x: Tensor, N: Tensor, h: Tensor) -> Tensor:
        step = _Step.of(self.grid, t)
        low, v = expand_like(step.log_low, x), (h + 1) / 2
        excess = torch.expm1(v * (expand_like(step.log_high, x) - low)) + expand_like(step.last, x)
        return (low - expand_like(step.log_b2, x)).exp() * excess


def hybrid_loss(
    denoiser: Denoiser,
    head: Head | None,
    x0: Tensor,
    *,
    grid: Grid | None = None,
    weight: float = 1e-3,
    levels: int | None = None,
    data_range: tuple[float, float] = (-1.0, 1.0),
    t: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    cond: Mapping[str, Any] | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Improved DDPM's L_simple + weight L_vlb (Nichol and Dhariwal, 2021, section 3.1), which trains mean and head
    together: L_simple = E |eps_hat - eps|^2 / d, and L_vlb is the bound of the chain with the learned variance, in nats
    per dimension, but for the prior's part; its gradients reach the head alone.

    Args:
        denoiser: the model, trained by L_simple.
        head: as in `sn_loss`; v = (h + 1) / 2.
        x0: clean data, shape (B, ...), floating point.
        grid: whose steps make the chain, as in `LearnedRangeDenoiser`. One step of it, uniformly drawn and stratified,
            stands for all.
        weight: of L_vlb.
        levels, data_range: of the decoder, as in `scoresde.likelihood.elbo`; without levels it is a density.
        t: instead of drawing, times of the grid, shape () or (B,).
        noise, generator, cond, reduction: as in `sn_loss`.

    Raises:
        TypeError, ValueError: as `sn_loss` and `LearnedRangeDenoiser`; if weight is negative, or x0 is outside the
            data range of the levels.
    """
    check_nonnegative(weight=weight)
    pair, whole = Pair.of(denoiser, head), _whole(denoiser.sde, grid)
    batch = noisy(pair, x0, _NodesOf(whole) if t is None else None, t, noise, generator)
    task = Regression(pair, batch, cond or {}, reduction)
    N, h = task.both()
    error = task.residual(N)
    # D - x_0 = -(sigma / alpha) (eps_hat - eps)
    distance = expand_like(-(-denoiser.sde.half_log_snr(batch.t)).exp(), h) * error.detach()
    nats = _nats(_Step.of(whole, batch.t), h, x0, distance, levels, data_range)
    return task.loss(error) + weight * whole.steps * task.reduce(nats.reshape(len(nats), -1).mean(1))


def _nats(
    step: _Step, h: Tensor, x0: Tensor, distance: Tensor, levels: int | None, data_range: tuple[float, float]
) -> Tensor:
    """A step's part of the bound, elementwise: KL, or the code length of x_0 for the last. distance: D - x_0."""
    low, last = expand_like(step.log_low, h), expand_like(step.last, h).bool()
    log_ratio = (h + 1) / 2 * (expand_like(step.log_high, h) - low)  # log(v_step / c^2)
    square = (expand_like(step.log_b2, h) - low).exp() * distance**2
    kl = ((-log_ratio).expm1() + log_ratio + square * (-log_ratio).exp()) / 2
    # Where a branch is not taken, its input must be harmless: an infinity times zero is a NaN in the gradient.
    std = torch.where(last, (low + log_ratio) / 2, 0.0).exp()
    return torch.where(last, _code_length(x0, torch.where(last, distance, 0.0), std, levels, data_range), kl)


def _code_length(
    x0: Tensor, distance: Tensor, std: Tensor, levels: int | None, data_range: tuple[float, float]
) -> Tensor:
    """-log N(x_0; x_0 + distance, std^2) of each element, as a density or of its level's bin, shape of x0."""
    if levels is None:
        return (distance / std) ** 2 / 2 + std.log() + math.log(2 * math.pi) / 2
    # Here, since it imports the solvers, and one of these imports this package.
    from scoresde.likelihood.bound import _Decoder, _log_probability

    bins = _Decoder.of(x0, 1.0, levels, data_range)
    assert bins.below is not None
    assert bins.above is not None
    far = 1e3 * (data_range[1] - data_range[0])  # for the outer bins, whose infinity would be a NaN in the gradient
    below, above = bins.below.clamp(min=-far), bins.above.clamp(max=far)
    low, high = ((edge - distance.double()) / std.double() for edge in (below, above))
    return -_log_probability(low, high).to(std.dtype)


# ---- steps of a chain ----


class _Step(NamedTuple):
    """What the steps t -> s of a grid make of v, each float64, of the shape of t.

    Attributes:
        log_low: log(sigma_s^2 w), the posterior variance; for the last step, whose own is 0, of the step before.
        log_high: log(sigma_t^2 w).
        log_b2: log (alpha_s w)^2.
        last: 1 for the last step, else 0.
    """

    log_low: Tensor
    log_high: Tensor
    log_b2: Tensor
    last: Tensor

    @classmethod
    def of(cls, grid: Grid, t: Tensor) -> _Step:
        sde, times = grid.sde, grid.times.flip(0).to(t.device)
        # The next time below; t may be one of the grid's in float32.
        i = torch.searchsorted(times, (t * (1 - 1e-6)).contiguous()) - 1
        last = i <= 0
        s = torch.where(last, times[1], times[i.clamp(min=0)])
        above = torch.where(last, times[2], t)
        lam = sde.half_log_snr(s)
        w = -torch.expm1(2 * (sde.half_log_snr(above) - lam))
        high = torch.where(last, sde.sigma(t), sde.sigma(t) * w.sqrt())
        b = torch.where(last, 1.0, sde.alpha(s) * w)
        return cls(2 * sde.sigma(s).log() + w.log(), 2 * high.log(), 2 * b.log(), last.to(t))


class _NodesOf(TimeSampler):
    """The noisy times of a grid, each as likely."""

    stratified = True

    def __init__(self, grid: Grid) -> None:
        self.times = grid.times[:-1].flip(0)

    def quantile(self, sde: SDE, u: Tensor) -> Tensor:
        return self.times.to(u.device)[(u * len(self.times)).long()]


def _whole(sde: SDE, grid: Grid | None) -> Grid:
    """The grid of a chain with learned variance."""
    if grid is None:
        if not isinstance(sde, DDPMChain):
            raise ValueError(f"{sde!r} is no DDPMChain, whose steps the learned variance would be of: give grid=")
        grid = Grid(sde, torch.arange(sde.steps, -1, -1, dtype=torch.float64, device="cpu"))
    grid.check_sde(sde)
    if grid.steps < 2 or float(grid.times[-1]) != 0:
        raise ValueError(f"{grid!r}: expected at least two steps, the last to t = 0")
    return grid
