"""The known solver that is nearest to a sampler, and the rows of the two in its view.

    x_{i+1} = a_i x_base + sum_k b_ik F_{i-k} + c_i z,    F = p x + q D

one row an evaluation, x_base the state at which its step begins: what is wrong in one stage then is in no other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scoresde.auditing.table import Responses, responses_of
from scoresde.grid import Grid
from scoresde.sde import SDE
from scoresde.solvers.base import Solver
from scoresde.solvers.catalogue import SOLVERS, call_of
from scoresde.solvers.exponential import DEIS, ERSDE, DPMSolverPP, ExponentialAB, SASolver, UniPC
from scoresde.solvers.first_order import DDIM, ExponentialSDE
from scoresde.solvers.runge_kutta import VARIABLES, Heun, RungeKutta
from scoresde.solvers.single_step import ExponentialHeun
from scoresde.tableau import Tableau
from scoresde.tensors import shown

__all__ = ["Nearest", "Rows", "by_lag", "candidates", "differ", "in_view", "known_on", "rows_of"]


@shown
class Rows(NamedTuple):
    """a (R,), b (R, R), b[i, k] being the weight of F_{i-k}, and c (R,)."""

    a: Tensor
    b: Tensor
    c: Tensor


def in_view(found: Responses, p: Tensor, q: Tensor) -> Tensor:
    """The states and the output as sums of x_T, of the F_j and of noise, shape (R + 1, 1 + R + K)."""
    R, full = len(found.t), torch.cat([found.A[:, None], found.B / q, found.C], 1)
    into = found.B * (p / q)  # D = (F - p x) / q put in for each answer
    states = torch.linalg.solve_triangular(
        torch.eye(R, dtype=torch.float64) + into[:R], full[:R], upper=False, unitriangular=True
    )
    return torch.cat([states, full[R:] - into[R:] @ states])


def by_lag(weights: Tensor) -> Tensor:
    """Weights of F_j as weights of F_{i-k}."""
    R = len(weights)
    lag = torch.arange(R)[:, None] - torch.arange(R)
    return torch.where(lag >= 0, weights.gather(1, lag.clamp(min=0)), 0.0)


def rows_of(full: Tensor, base: Tensor) -> Rows:
    """The rows of what `in_view` returns, each from the state of its base."""
    R = len(full) - 1
    before, after = full[base], full[1:]
    a = torch.where(before[:, 0] == 0, 0.0, after[:, 0] / before[:, 0])
    step = after - a[:, None] * before
    return Rows(a, by_lag(step[:, 1 : R + 1]), step[:, R + 1 :].norm(dim=1))


@shown
@dataclass(frozen=True)
class Nearest:
    """A known solver beside a sampler.

    Attributes:
        name, solver, table: the solver, and its table on the same grid.
        found, answers: how the sampler answers, and how the solver.
        own, right: the rows of the sampler, and of the solver.
        stage: of each row, its place in its step.
        same_times: whether the two ask their model at the same times.
        differs: which of their numbers a, b_0, b_1, ..., c do, bool, shape (R, R + 2).
        score: how much does.
    """

    name: str
    solver: Solver
    table: Tableau
    found: Responses
    answers: Responses
    own: Rows
    right: Rows
    stage: Tensor
    same_times: bool
    differs: Tensor
    score: tuple[float, float]

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        """The times t and s of the step that each row belongs to."""
        step, times = self.table.step[self.table.evaluates], self.table.grid.times
        return times[step], times[step + 1]

    @property
    def wrong(self) -> Tensor:
        """Which rows differ, bool, shape (R,)."""
        return self.differs.any(1)

    @property
    def columns_alike(self) -> int:
        """How many of a, b_0, b_1, ... and c are the same in all rows."""
        return int((~self.differs.any(0)).sum())

    @property
    def equal(self) -> bool:
        """Whether the sampler is that solver, to rounding."""
        return self.same_times and not bool(self.wrong.any())

    @property
    def order(self) -> int | None:
        """The order of the solver, where it is known."""
        if self.name in SOLVERS:
            return SOLVERS[self.name].order
        order = getattr(self.solver, "order", None)
        return None if order is None else int(order)


def _each(make: Callable[..., Solver], **options: Collection[Any]) -> Iterator[Solver]:
    """The solver with every combination of options."""
    for values in itertools.product(*options.values()):
        yield make(**dict(zip(options, values, strict=True)))


@cache
def known() -> tuple[tuple[str, Solver], ...]:
    """The solvers that are right, by name: those of the catalogue that have a table, and with other options."""
    found = {
        name: entry.solver
        for name, entry in SOLVERS.items()
        if entry.solver.has_table and not name.endswith("-published")
    }
    either = (False, True)
    more = [
        *_each(DPMSolverPP, order=(2, 3), rule=("midpoint", "exact"), stochastic=either, lower_final=either),
        *_each(DPMSolverPP, order=(2, 3), view=("eps",), lower_final=either),
        *_each(RungeKutta, method=("midpoint", "ralston", "kutta3", "rk4"), variable=VARIABLES),
        *_each(Heun, variable=("half_log_snr", "flow")),
        *_each(ExponentialHeun, view=("eps",)),
        *_each(UniPC, order=(1, 2, 3, 4), view=("x0", "eps"), rule=("B1", "B2"), corrector=either),
        *_each(UniPC, order=(1, 2, 3, 4), view=("v", "flow"), corrector=(True,)),
        *_each(
            ExponentialAB, order=(2, 3, 4), view=("x0", "eps", "v", "flow"), variable=("half_log_snr", "sigma", "t")
        ),
        *_each(DEIS, order=(2, 3, 4), variable=("sigma",)),
        *_each(ERSDE, order=(2, 3), noise_scale=("ode",)),
        *_each(SASolver, tau=(0.0, 0.2, 0.5, 0.8)),
        *_each(DDIM, eta=(0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0)),
        *_each(ExponentialSDE, tau=(0.25, 0.5, 0.75, 1.5, 2.0)),
    ]
    ours = set(map(repr, found.values()))
    return (*found.items(), *((call_of(s), s) for s in dict.fromkeys(more) if repr(s) not in ours))


class _Known(NamedTuple):
    """A known solver on a grid: its table, what it answers, and where each row's step begins."""

    name: str
    solver: Solver
    table: Tableau
    answers: Responses
    base: Tensor


@lru_cache(maxsize=8)
def _on(sde: SDE, times: tuple[float, ...]) -> tuple[_Known, ...]:
    grid, found = Grid(sde, times), []
    for name, solver in known():
        try:
            table = solver.tableau(grid)
        except (ValueError, TypeError):  # it cannot begin, or end, there
            continue
        on = table.evaluates
        if bool(on.any()) and not bool((table.q[on] == 0).any()):
            step = table.step[on]
            found.append(_Known(name, solver, table, responses_of(table), torch.searchsorted(step, step)))
    return tuple(found)


def known_on(grid: Grid) -> tuple[_Known, ...]:
    """The known solvers that have a table on a grid."""
    return _on(grid.sde, tuple(grid.times.tolist()))


def differ(own: Tensor, right: Tensor, size: Tensor, tol: float) -> Tensor:
    """Where two numbers are not the same to `tol` of a size."""
    return ~((own - right).abs() <= tol * size)


def candidates(found: Responses, grid: Grid, most: int = 40) -> list[Nearest]:
    """The known solvers with the fewest other numbers, nearest first, of those that ask as often; and if any asks at
    the same times, those alone.
    """
    out: list[Nearest] = []
    for name, solver, table, answers, base in known_on(grid):
        if len(answers.t) != len(found.t):
            continue
        on = table.evaluates
        own, right = (rows_of(in_view(it, table.p[on], table.q[on]), base) for it in (found, answers))
        same_times = bool(torch.allclose(found.t, answers.t, rtol=1e-5, atol=0))
        size = torch.maximum(right.b.abs(), own.b.abs()).amax(1, keepdim=True)
        noise = torch.maximum(own.c, right.c) + 1e-12
        differs = torch.cat(
            [
                differ(own.a, right.a, right.a.abs().clamp(min=1e-9), found.tol)[:, None],
                differ(own.b, right.b, size.clamp(min=1e-300), found.tol),
                differ(own.c, right.c, noise, found.tol)[:, None],
            ],
            1,
        )
        off = float(
            ((own.b - right.b) / size.clamp(min=1e-300)).square().sum()
            + (own.a - right.a).square().sum()
            + ((own.c - right.c) / noise).square().sum()
        )
        if math.isfinite(off):
            score = float(differs.sum()) / len(found.t) + 0.5 * float(differs.any(0).sum())
            stage = torch.arange(len(base)) - base
            out.append(
                Nearest(name, solver, table, found, answers, own, right, stage, same_times, differs, (score, off))
            )
    if any(near.same_times for near in out):
        out = [near for near in out if near.same_times]
    out.sort(key=lambda near: near.score)
    return out[:most]
