"""The optimal reverse variance of any one-step solver: Analytic-DPM and its elementwise successors, as one rule.

A row of a one-step table, read with F = p x + q D, is x_s = a' x + b' D + c z, a' = a + b p, b' = b q. It replaces the
step a' x + b' x_0 + c z, in which the true x_0 stands, by its mean given x_t; matching the variance too gives

    x_s = a' x + b' D + sqrt(c^2 + b'^2 Var[x_0 | x_t]) z

For a step that preserves the marginals, q(x_s | x_t, x_0) = N(a' x_t + (alpha_s - a' alpha_t) x_0, c^2), this is the
Gaussian nearest to q in KL among all of that mean: never worse in the bound on the likelihood than c^2 alone, or than
any other variance. DDPM's Markov step has (beta / alpha) (1 - beta Gamma) there, beta and alpha of the step.

Var is one number a time, from a `VarianceTable` (Analytic-DPM: Bao et al., ICLR 2022), or elementwise, from a head
(SN-, NPR-DPM: Bao et al., ICML 2022): `Posterior.var` either way. The first is known beforehand, so it is a `Tableau`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from scoresde.checks import check_nonnegative
from scoresde.denoiser import Denoiser
from scoresde.grid import Grid
from scoresde.noise import NoiseSource
from scoresde.solvers.base import Around, Solver
from scoresde.solvers.first_order import DDIM
from scoresde.tableau import State, Tableau
from scoresde.variance.table import VarianceTable
from scoresde.wrappers import lacks_variance

__all__ = ["OptimalVariance", "optimal_tableau", "quiet_last"]


@dataclass(frozen=True)
class OptimalVariance(Around):
    """A one-step solver with the optimal variance: OptimalVariance(DDPM()) is Analytic-DDPM, OptimalVariance(DDIM())
    Analytic-DDIM, and with a denoiser whose variance is elementwise SN- or NPR-DPM. One evaluation a step, on the
    solver's own grid. No noise is added on the last step, to sigma = 0.

    The denoiser must know its variance, `AnalyticDenoiser(denoiser, table)` say. With that one, whose
    `covariance` is known beforehand, and without `clamp` the run is that of the table `optimal_tableau`; else a loop
    reads mean and variance from each evaluation. A negative
    variance is no variance: it ends in a `NonFiniteError`, unless c^2 outweighs it.

    Args:
        solver: of one evaluation a step that reads no earlier ones: DDPM(), DDIM(eta), ExponentialSDE(tau), ...
            The rule also goes with one that preserves no marginals (EulerMaruyama), but is then the optimum of nothing.
        last: the largest E |noise| of an entry on the last noisy step: its standard deviation is cut at
            last sqrt(pi / 2). The reference does so for images, where the noise of that step is seen: by y = 1 or 2
            grey levels, last = y * 2 / 255 on data in [-1, 1] (Bao et al., 2022, appendix F.2). Of sampling only.
        clamp: (lo, hi), the range of D, as the reference clamps it: in the DDIM family beside the raw eps,

                x_s = alpha_s clip(D) + sqrt(sigma_s^2 - c^2) (x_t - alpha_t D) / sigma_t + ...        (DDIM)
                x_s = a' x_t + b' clip(D) + ...                                                        (all others)

            which agree only where nothing is clipped, DDIM(eta=1) and DDPM() too. To have eps follow the clipped mean,
            wrap the denoiser in `Clip` instead.

    Raises:
        TypeError: if solver is none.
        ValueError: if the solver has no table, last is negative or clamp no interval; on a run, before any evaluation,
            if the solver has steps of several evaluations, memory of earlier ones, or noise that already allows for the
            variance (DDPM("beta")), the grid increases, or the denoiser is known to have no variance; after the first
            if that was not known.

    >>> from scoresde import VPSDE, Grid, sample
    >>> from scoresde.exact import Gaussian
    >>> from scoresde.solvers.first_order import DDPM
    >>> denoiser = Gaussian(mean=[3.0, -1.0], std=0.5).denoiser(VPSDE())  # knows its variance
    >>> grid = Grid.uniform(VPSDE(), 3, end=1e-5)
    >>> for solver in (DDPM(), OptimalVariance(DDPM())):
    ...     x = sample(denoiser, (4000, 2), solver, grid=grid, seed=0).x
    ...     print(f"std {x.std(0).mean():.2f}")
    std 0.15
    std 0.50
    """

    masks: ClassVar[bool] = True

    solver: Solver
    last: float | None = field(default=None, kw_only=True)
    clamp: tuple[float, float] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.solver, Solver):
            raise TypeError(f"OptimalVariance wraps a solver, DDPM() say, not {self.solver!r}")
        if not self.solver.has_table:
            raise ValueError(f"{self.solver!r} has no table, so its steps have no variance to set: {_HINT}")
        _check_last(self.last)
        if self.clamp is not None:
            bounds = list(self.clamp) if isinstance(self.clamp, tuple | list) else []
            if len(bounds) != 2 or not -math.inf < bounds[0] < bounds[1] < math.inf:
                raise ValueError(f"clamp={self.clamp!r}: expected (lo, hi), two finite numbers, lo < hi")

    @property
    def has_table(self) -> bool:
        return False

    def evaluations(self, grid: Grid) -> int:
        return len(_one_step(self.solver, grid))

    def tableau(self, grid: Grid) -> Tableau:
        raise TypeError(
            "OptimalVariance has a table only with a denoiser's: optimal_tableau(solver, grid, table). It runs by "
            "sample(denoiser, shape, OptimalVariance(solver), ...); the bound on the likelihood is "
            "elbo(denoiser, x, solver, grid, variance='posterior')"
        )

    def loop(
        self, denoiser: Denoiser, x: Tensor, grid: Grid, noise: NoiseSource | None, cond: dict[str, Any]
    ) -> Iterator[State]:
        C = denoiser.covariance(grid.times[:-1])
        if C is not None and self.clamp is None:
            return _with_covariance(self.solver, grid, C, self.last).iterate(denoiser, x, noise, cond)
        rows = self._rows(grid)
        if lacks_variance(denoiser):
            raise ValueError(_no_variance(denoiser))
        denoiser.check_times(grid.times[:-1])
        return self._loop(rows, denoiser, x, noise, cond)

    def _rows(self, grid: Grid) -> list[_Row]:
        base, alpha_t = _one_step(self.solver, grid), grid.sde.alpha(grid.times[:-1])
        a, b = base.in_x0()
        raw = torch.zeros_like(a)
        if self.clamp is not None and isinstance(self.solver, DDIM):
            raw = -a * alpha_t  # a' x + b' D = a' (x - alpha_t D) + (b' + a' alpha_t) D
        noisy = grid.sde.sigma(grid.times[1:]) > 0
        columns = (base.t, a, b - raw, raw, base.c**2, b**2, noisy, _most(grid, self.last))
        return [_Row(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]

    def _loop(
        self, rows: list[_Row], denoiser: Denoiser, x: Tensor, noise: NoiseSource | None, cond: dict[str, Any]
    ) -> Iterator[State]:
        for i, row in enumerate(rows):
            D, var = denoiser(x, row.t, **cond)
            # The multiples of x and D also where they are 0: a NaN must reach the end.
            before, x = x, x * row.x + (D if self.clamp is None else D.clamp(*self.clamp)) * row.mean
            if row.raw != 0.0:
                x = x + D * row.raw
            if row.noisy:
                if var is None:
                    raise ValueError(_no_variance(denoiser))
                std = (row.c2 + row.b2 * var).sqrt().clamp(max=row.most)
                assert noise is not None
                x = x + std * noise(i, before)
            yield State(i, i + 1, i, True, row.t, x)


@dataclass(frozen=True)
class _Row:
    """x_s = x x_t + mean clip(D) + raw D + min(sqrt(c2 + b2 var), most) z, the noise only if noisy."""

    t: float
    x: float
    mean: float
    raw: float
    c2: float
    b2: float
    noisy: bool
    most: float


def optimal_tableau(
    solver: Solver,
    grid: Grid,
    table: VarianceTable,
    data_range: tuple[float, float] | None = None,
    last: float | None = None,
) -> Tableau:
    """The solver's table with c^2 + b'^2 C_t in place of c^2: Analytic-DPM as numbers, in the solver's own view.

    Args:
        solver: as in `OptimalVariance`.
        grid: where it steps. The last step, to sigma = 0, has no noise.
        table: of C_t, for the grid's SDE.
        data_range: of the data, if bounded, as in `VarianceTable.covariance`.
        last: as in `OptimalVariance`.

    Raises:
        ValueError: if the table is of another SDE, or as for `OptimalVariance`.

    >>> from scoresde import VPSDE, Grid
    >>> from scoresde.analysis import gaussian_law
    >>> from scoresde.solvers.first_order import DDIM
    >>> sde, grid = VPSDE(), Grid.uniform(VPSDE(), 2, end=1e-5)
    >>> S = 0.25 * sde.alpha(grid.times) ** 2 + sde.sigma(grid.times) ** 2  # data of variance 0.25
    >>> exact = VarianceTable(sde, grid.times.flip(0), (sde.sigma(grid.times) ** 2 / S).flip(0), 0 * S, samples=1)
    >>> gaussian_law(optimal_tableau(DDIM(), grid, exact), (0.0, 0.25), x_T="exact").variances
    tensor([0.2500], dtype=torch.float64)
    """
    grid.check_sde(table.sde)
    _check_last(last)
    return _with_covariance(solver, grid, table.covariance(grid.times[:-1], data_range), last)


def _with_covariance(solver: Solver, grid: Grid, C: Tensor, last: float | None) -> Tableau:
    """The table of `optimal_tableau`, by C at the starts of the steps, shape (N,)."""
    base = _one_step(solver, grid)
    _, b = base.in_x0()
    c = (base.c**2 + b**2 * C).sqrt()
    c = torch.where(grid.sde.sigma(grid.times[1:]) == 0, 0.0, c)
    return Tableau(
        grid, a=base.a, b=base.b, c=quiet_last(grid, c, last), view=(base.p, base.q), t=base.t, step=base.step
    )


_HINT = "take a solver of one evaluation a step, DDPM(), DDIM(eta) or ExponentialSDE(tau)"


def _one_step(solver: Solver, grid: Grid) -> Tableau:
    """The solver's table; ValueError unless each row is a step by its own F, with no more noise than q has."""
    table = solver.tableau(grid)
    if not table.one_step:
        raise ValueError(f"{solver!r} has steps of several evaluations, or steps that read those before them: {_HINT}")
    alpha_t, sigma_t, alpha_s, sigma_s = grid.pairs()
    a, b = table.in_x0()
    preserves = (a * alpha_t + b - alpha_s).abs() <= 1e-9 * alpha_s
    over = preserves & (sigma_s > 0) & (table.c**2 > (1 + 1e-6) * (sigma_s**2 - (a * sigma_t) ** 2) + 1e-9 * sigma_s**2)
    if bool(over.any()):
        raise ValueError(
            f"{solver!r} adds more noise than its mean leaves room for, c^2 > sigma_s^2 - a^2 sigma_t^2 in the step "
            f"from t = {float(table.t[over][0]):.6g}: it allows for the variance of x_0 already, which would count "
            "twice; take DDPM() for DDPM('beta') or Ancestral()"
        )
    return table


def quiet_last(grid: Grid, c: Tensor, last: float | None) -> Tensor:
    """c, the standard deviations of a grid's N steps, with that of the last noisy one cut as `OptimalVariance(last=)`
    says.
    """
    return c.minimum(_most(grid, last))


def _most(grid: Grid, last: float | None) -> Tensor:
    """The largest standard deviation of each step, shape (N,): of the last that lands where there is noise that of
    E |noise| = last, E |N(0, s^2)| = s sqrt(2 / pi).
    """
    most = torch.full((grid.steps,), math.inf, dtype=torch.float64, device="cpu")
    if last is not None:
        most[(grid.sde.sigma(grid.times[1:]) > 0).nonzero().flatten()[-1:]] = last * math.sqrt(math.pi / 2)
    return most


def _check_last(last: float | None) -> None:
    if last is not None:
        check_nonnegative(last=last)


def _no_variance(denoiser: Denoiser) -> str:
    return (
        f"{denoiser!r} knows no Var[x_0 | x_t]: wrap it, AnalyticDenoiser(denoiser, estimate(denoiser, data)), or take "
        "one with a variance head"
    )
