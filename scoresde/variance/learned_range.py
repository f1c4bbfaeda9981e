"""The learned variance of improved DDPM: of each step t -> s of a chain, by a head h.

v = (h + 1) / 2 stands for a step's variance between the two choices of DDPM, its smaller one being the posterior's:

    log v_step = v log(sigma_t^2 w) + (1 - v) log(sigma_s^2 w),    w = 1 - e^{-2 (lambda_s - lambda_t)}

A denoiser says it by Var[x_0 | x_t], with which the step's variance is c^2 + b^2 Var, c^2 = sigma_s^2 w, b = alpha_s w:

    Var = (v_step - c^2) / b^2

The last step, to s = 0, ends at D: there Var = v_step, the decoder's variance, and the smaller choice, which would be
zero, is that of the step before.

The head is trained by the bound of that chain, and the mean by L_simple: `scoresde.variance.losses.hybrid_loss`.

Source: Nichol and Dhariwal (2021), "Improved Denoising Diffusion Probabilistic Models".
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from scoresde.denoiser import Denoiser
from scoresde.grid import Grid
from scoresde.sde import SDE
from scoresde.tensors import expand_like, shown
from scoresde.variance.heads import HeadDenoiser
from scoresde.variance.trunk import Head

__all__ = ["LearnedRangeDenoiser", "Step", "chain_grid"]


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
        self.grid = chain_grid(denoiser.sde, grid)

    def _variance(self, t: Tensor, x: Tensor, N: Tensor, h: Tensor) -> Tensor:
        step = Step.of(self.grid, t)
        low, v = expand_like(step.log_low, x), (h + 1) / 2
        excess = torch.expm1(v * (expand_like(step.log_high, x) - low)) + expand_like(step.last, x)
        return (low - expand_like(step.log_b2, x)).exp() * excess


# ---- steps of a chain ----


@shown
class Step(NamedTuple):
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
    def of(cls, grid: Grid, t: Tensor) -> Step:
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


def chain_grid(sde: SDE, grid: Grid | None) -> Grid:
    """The grid of a chain with learned variance."""
    if grid is None:
        if sde.nodes is None:
            raise ValueError(f"{sde!r} is no DDPMChain, whose steps the learned variance would be of: give grid=")
        grid = Grid(sde, torch.cat([sde.nodes.flip(0), sde.nodes.new_zeros(1)]))
    grid.check_sde(sde)
    if grid.steps < 2 or float(grid.times[-1]) != 0:
        raise ValueError(f"{grid!r}: expected at least two steps, the last to t = 0")
    return grid
