"""Langevin dynamics with step sizes known beforehand, and its annealing from noise to data (NCSN).

    x <- x + tau score(x, t) + sqrt(2 tau) z

leaves p_t unchanged in the limit of small tau. All published rules make tau a share of the level's variance,

    tau = 2 (r sigma_t)^2

    rule       step   tau on VE                              paper
    "snr"      r      2 (r sigma_i)^2                        Song et al. (2021), annealed Langevin corrector
    "ncsn"     eps    eps sigma_i^2 / (2 sigma_L^2)          Song and Ermon (2019), algorithm 1: alpha_i = 2 tau
    "ncsnv2"   eps    eps sigma_i^2 / sigma_L^2              Song and Ermon (2020), algorithm 1: alpha_i = tau

with sigma_L the smallest level; on another SDE sigma / alpha takes the place of sigma, and tau that of tau / alpha^2.
How many levels, and which step, `levels_for` and `step_for` say for data of D dimensions and steps of T a level:

    Phi(sqrt(2 D) (gamma - 1) + 3 gamma) - Phi(sqrt(2 D) (gamma - 1) - 3 gamma) = 1/2
    (1 - e)^{2 T} (gamma^2 - V) + V,  V = 2 e / (1 - (1 - e)^2),  e = 2 r^2, as near 1 as can be

(Song and Ermon, 2020, techniques 2 and 4), gamma being the ratio of a level to the next and Phi the normal distribution
function. By the first, half of a level's noise is as long as that of the level before, within three of its standard
deviations; the second is the variance that T steps leave of the noise of the level before, in units of the level's own.

Song's corrector sets tau = 2 (r |z| / |score|)^2 instead; for x ~ p_t the norm of the score is near |z| / sigma_t
(exactly where the data is a point), which gives "snr" again, with nothing to measure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor

from scoresde.checks import check_count, check_option
from scoresde.grid import Grid
from scoresde.sde import SDE
from scoresde.solvers.base import Solver
from scoresde.solvers.first_order import DDIM
from scoresde.solvers.rows import Rows
from scoresde.solvers.runge_kutta import has_no_stages
from scoresde.tableau import Tableau
from scoresde.views import view_of_mean

__all__ = ["AnnealedLangevin", "levels_for", "step_for"]

Rule = Literal["snr", "ncsn", "ncsnv2"]


def levels_for(ratio: float, dimensions: int) -> int:
    """L, the levels that lead from the largest to the smallest (Song and Ermon, 2020, technique 2): half of each
    level's noise is as long as that of the level before. Their own numbers, 232 for CIFAR-10 and 500 for CelebA, are
    6 % more.

    Args:
        ratio: of the largest level to the smallest, > 1. The largest is about the largest distance between two data
            points (their technique 1).
        dimensions: D of the data.

    Raises:
        ValueError: unless ratio > 1 and dimensions is a whole number >= 1.

    >>> levels_for(50 / 0.01, 3 * 32 * 32)
    220
    """
    check_count(dimensions=dimensions)
    if not 1 < ratio < math.inf:
        raise ValueError(f"ratio={ratio}: expected the largest level over the smallest, > 1")
    middle, phi, (low, high) = math.sqrt(2 * dimensions), NormalDist().cdf, (0.0, math.log(ratio))
    for _ in range(60):  # the overlap falls as gamma rises
        log_gamma = (low + high) / 2
        gamma = math.exp(log_gamma)
        away = middle * (gamma - 1)
        if phi(away + 3 * gamma) - phi(away - 3 * gamma) > 0.5:
            low = log_gamma
        else:
            high = log_gamma
    return 1 + math.ceil(round(math.log(ratio) / high, 6))


def step_for(gamma: float, steps_per_level: int) -> float:
    """r, the step by the rule "snr" with which T steps bring a level's noise nearest to the next level's (Song and
    Ermon, 2020, technique 4).

    Args:
        gamma: ratio of a level to the next, > 1.
        steps_per_level: T.

    Raises:
        ValueError: unless gamma > 1 and steps_per_level is a whole number >= 1.

    >>> round(step_for(5000 ** (1 / 231), 5), 3)  # CIFAR-10: 6.2e-6 by the rule "ncsnv2" at sigma_L = 0.01
    0.176
    """
    check_count(steps_per_level=steps_per_level)
    if not 1 < gamma < math.inf:
        raise ValueError(f"gamma={gamma}: expected the ratio of a level to the next, > 1")
    e = torch.logspace(-6, -1e-3, 20_001, base=10, dtype=torch.float64, device="cpu")
    V = 2 * e / (1 - (1 - e) ** 2)
    left = (1 - e) ** (2 * steps_per_level) * (gamma**2 - V) + V
    return math.sqrt(float(e[(left - 1).abs().argmin()]) / 2)


def langevin_rows(sde: SDE, t: Tensor, r: Tensor | float) -> Rows:
    """A step of Langevin dynamics at each of the times t, shape (M,), where sigma > 0, with tau = 2 (r sigma_t)^2.

    Args:
        r: signal-to-noise ratio of the step, a number or shape (M,): 0.16 to 0.22 in the papers. score_sde's corrector
            multiplies its tau by alpha_i = 1 - beta_i on VP: give sqrt(alpha_i) r for that.
    """
    sigma = sde.sigma(t)
    r = torch.as_tensor(r, dtype=torch.float64, device="cpu")
    p, q = view_of_mean("eps", sde, t)
    # tau score = -2 r^2 sigma eps, and sqrt(2 tau) = 2 r sigma
    b = (-2 * r**2 * sigma)[:, None]
    return Rows(torch.arange(len(t), device="cpu"), t, p, q, torch.ones_like(sigma), b, 2 * r * sigma)


@dataclass(frozen=True)
class AnnealedLangevin(Solver):
    """Annealed Langevin dynamics, the sampler of NCSN (Song and Ermon, 2019, algorithm 1; 2020, algorithm 1).

    All noisy times of the grid are levels, `steps_per_level` steps each; from one to the next x keeps x / alpha. A grid
    to t = 0 ends with the denoiser's mean of the last level (NCSNv2's denoising step), a grid to a noisy time, as NCSN,
    with the last Langevin step. The papers' levels are a geometric sequence: `Grid.log_snr`, or `Grid.uniform` on VE.
    x at grid.times[i], i > 0, is the state after that level's steps. A level with alpha = 0 is the prior itself, and
    DDIM's step takes x from it. Evaluations: `steps_per_level` for each level, and 1 for the step to t = 0.

    The noise that x brings from a higher level falls by (1 - 2 r^2)^T at each, T being `steps_per_level`. Where that is
    more than the levels fall by themselves, it stays in x to the end: take T >= log(ratio) / (2 r^2), ratio > 1 being
    that of u from a level to the next, so more levels or more steps at each (at r = 0.176 and T = 5, ratio < 1.36).

    Args:
        steps_per_level: T of the papers: NCSN has 100 on 10 levels, NCSNv2 5 on 232 (CIFAR-10).
        step: r or eps, as `step_rule` says. NCSNv2's 6.2e-6 for sigma_L = 0.01 is r = 0.176; NCSN's 2e-5 is r = 0.224
            by its algorithm 1, and r = 0.316 by its code, which steps as "ncsnv2".
        step_rule: "snr", "ncsn" or "ncsnv2", as in the module's docstring.

    Raises:
        ValueError: unless steps_per_level is a whole number >= 1, step > 0 and the rule one of these; by `tableau`,
            where r >= 1, with which the dynamics would diverge.
    """

    steps_per_level: int = 5
    step: float = 0.176
    step_rule: Rule = "snr"

    def __post_init__(self) -> None:
        check_count(steps_per_level=self.steps_per_level)
        check_option(("snr", "ncsn", "ncsnv2"), step_rule=self.step_rule)
        if not 0 < self.step < math.inf:
            raise ValueError(f"step={self.step}: expected a finite number > 0")

    def grid(self, sde: SDE, steps: int, *, end: float = 0.0) -> Grid:
        make = Grid.log_snr if float(sde.alpha(sde.t_max)) > 0 else Grid.customary
        return make(sde, steps, end=end)

    def evaluations(self, grid: Grid) -> int:
        ends = has_no_stages(grid.sde, grid.times[:-1], grid.times[1:])
        return self.steps_per_level * len(self._levels(grid)) + int(ends.sum())

    def _levels(self, grid: Grid) -> Tensor:
        """Which times of the grid are levels."""
        u = (-grid.sde.half_log_snr(grid.times)).exp()
        return ((u > 0) & (u < math.inf)).nonzero().flatten()

    def tableau(self, grid: Grid) -> Tableau:
        sde, times = grid.sde, grid.times
        alpha, u = sde.alpha(times), (-sde.half_log_snr(times)).exp()
        levels = self._levels(grid)
        r = self._ratio(float(u[levels].min())) if len(levels) else 0.0
        # Step i goes on to time i + 1 and stays there; the first stays at its start, too.
        i = levels.repeat_interleave(self.steps_per_level)
        stay = langevin_rows(sde, times[i], r).numbered((i - 1).clamp(min=0))
        return Rows.merge([stay.take(i == 0), self._go_on(grid, alpha), stay.take(i > 0)]).tableau(grid)

    def _go_on(self, grid: Grid, alpha: Tensor) -> Rows:
        """From each level to the next: x / alpha unchanged, which takes no row on VE; at the ends DDIM's step."""
        t, s = grid.times[:-1], grid.times[1:]
        rows, ends = DDIM().rows(grid.sde, t, s), has_no_stages(grid.sde, t, s)
        rows = rows._replace(
            a=torch.where(ends, rows.a, alpha[1:] / alpha[:-1]), b=torch.where(ends[:, None], rows.b, 0.0)
        )
        return rows.take(ends | (rows.a != 1))

    def _ratio(self, u_L: float) -> float:
        r2 = {"snr": self.step**2, "ncsn": self.step / (4 * u_L**2), "ncsnv2": self.step / (2 * u_L**2)}[self.step_rule]
        if r2 >= 1:
            raise ValueError(
                f"step={self.step} by the rule {self.step_rule!r} is r = {math.sqrt(r2):.3g} on these levels: expected "
                "r < 1; take a smaller step, or a grid whose last noisy level is higher"
            )
        return math.sqrt(r2)
