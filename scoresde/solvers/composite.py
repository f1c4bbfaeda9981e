"""Solvers made of moves: down t -> s < t by the steps of a single-step solver, up t -> s > t by the forward process,

    x_s = (alpha_s / alpha_t) x_t + alpha_s sqrt(u_s^2 - u_t^2) S_noise z,    u = sigma / alpha,

which evaluates nothing. EDM's churn goes up a little before each step, Restart goes up and down over an interval,
time travel over blocks of steps. Levels are given in u, the sigma of a model with alpha = 1.

Rows belong to the grid's steps so that the last row of step i (`State.done`) leaves x at grid.times[i + 1] for good:
what a trajectory keeps are the states that the samples came from.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from scoresde.checks import check_count, check_nonnegative
from scoresde.denoiser import Denoiser
from scoresde.grid import Grid
from scoresde.noise import NoiseSource
from scoresde.sde import SDE
from scoresde.solvers.base import Around, SingleStep, check_decreasing
from scoresde.solvers.first_order import DDPM
from scoresde.solvers.rows import Rows, forward_rows
from scoresde.solvers.runge_kutta import Heun
from scoresde.tableau import State, Tableau

__all__ = ["EDMStochastic", "Restart", "TimeTravel"]


class Move(NamedTuple):
    t: float
    s: float
    step: int


def _level(sde: SDE, t: Tensor | float) -> Tensor:
    """u = sigma / alpha."""
    return (-sde.half_log_snr(t)).exp()


def _ends(moves: Sequence[Move]) -> Tensor:
    """(t, s) of moves, float64, each of shape (M,)."""
    return torch.tensor([move[:2] for move in moves], dtype=torch.float64, device="cpu").T


class _Composite(Around, ABC):
    """A solver whose moves down are another's steps, on the grid that is its custom."""

    solver: SingleStep
    S_noise: float = 1.0  # factor of the forward process's noise

    @abstractmethod
    def moves(self, grid: Grid) -> list[Move]:
        """The moves in their order: down by the solver, up by the forward process."""

    def evaluations(self, grid: Grid) -> int:
        check_decreasing(grid, self)
        t, s = _ends(self.moves(grid))
        return int(self.solver.stages(grid.sde, t[s < t], s[s < t]).sum())

    def tableau(self, grid: Grid) -> Tableau:
        check_decreasing(grid, self)
        moves = self.moves(grid)
        t, s = _ends(moves)
        step = torch.tensor([move.step for move in moves], device="cpu")
        up, down = (s > t).nonzero().flatten(), (s < t).nonzero().flatten()
        rows = Rows.merge(
            [
                forward_rows(grid.sde, t[up], s[up], self.S_noise).numbered(up),
                self.solver.rows(grid.sde, t[down], s[down]).numbered(down),
            ]
        )
        return rows.tableau(grid, step)

    def _check_solver(self) -> None:
        if not isinstance(self.solver, SingleStep):
            raise ValueError(f"solver={self.solver!r}: expected a solver of single steps, Heun() or DDPM() say")


@dataclass(frozen=True)
class EDMStochastic(_Composite):
    """EDM's stochastic sampler (Karras et al., 2022, algorithm 2): before each step, noise is added,

        t -> t^,    u_t^ = (1 + gamma) u_t,    gamma = min(S_churn / N, sqrt(2) - 1) where S_min <= u_t <= S_max, else 0

    and the step goes from t^. On any SDE, in u = sigma / alpha. t^ stops at the SDE's t_limit: infinite on VE and EDM,
    elsewhere t_max, so that a first step from there adds no noise. On a `DDPMChain` t^ lies between the nodes: the
    network's time label must allow that. Evaluations are the solver's, 2 N - 1 with Heun.

    Args:
        S_churn: amount of noise, spread over the N steps: 0 is `solver` itself. The paper's ImageNet-64 setting is 40
            with S_min = 0.05, S_max = 50, S_noise = 1.003.
        S_min, S_max: levels u between which noise is added.
        S_noise: factor of the noise, a little above 1 in the paper, against the smoothing of a trained denoiser; at 1
            the marginals are exact in the limit of many steps.
        solver: makes the steps.

    Raises:
        ValueError: unless S_churn >= 0, 0 <= S_min <= S_max, S_noise >= 0 and solver is a `SingleStep`.
    """

    S_churn: float = 40.0
    S_min: float = 0.0
    S_max: float = math.inf
    S_noise: float = 1.0
    solver: SingleStep = Heun()  # noqa: RUF009 (frozen)

    def __post_init__(self) -> None:
        check_nonnegative(S_churn=self.S_churn, S_noise=self.S_noise)
        if not 0 <= self.S_min <= self.S_max:
            raise ValueError(f"S_min={self.S_min}, S_max={self.S_max}: expected 0 <= S_min <= S_max")
        self._check_solver()

    def moves(self, grid: Grid) -> list[Move]:
        sde, t = grid.sde, grid.times[:-1]
        gamma = min(self.S_churn / grid.steps, math.sqrt(2) - 1)
        u = _level(sde, t)
        churned = (gamma > 0) & (self.S_min <= u) & (u <= self.S_max) & (u < math.inf)
        t_hat = sde.time_at(sde.half_log_snr(t) - math.log1p(gamma)).clamp(max=sde.t_limit)
        t_hat = torch.where(churned, torch.maximum(t, t_hat), t)
        moves = []
        for i, (start, top, end) in enumerate(zip(t.tolist(), t_hat.tolist(), grid.times[1:].tolist(), strict=True)):
            if top > start:
                moves.append(Move(start, top, i))
            moves.append(Move(top, end, i))
        return moves


@dataclass(frozen=True)
class Restart(_Composite):
    """Restart sampling (Xu et al., 2023, algorithm 1): a deterministic solver goes down the grid and, at the grid time
    nearest to the u_min of an interval, K times over goes up to u_max by the forward process and down again.

    Evaluations with Heun on a grid of N steps to t = 0: 2 N - 1, and 2 K (n - 1) for each interval. The paper's CIFAR
    example of 18 steps with [(3, 2, 0.06, 0.30)] has 35 + 8 = 43.

    Args:
        intervals: (n, K, u_min, u_max) each, as in the paper's tables: n points, both ends included, so n - 1 steps,
            from u_max to the grid time, equally spaced in u^(1 / rho); K repetitions; u = sigma / alpha. By default
            the paper's example, its levels times the SDE's `data_scale`. Where two share a grid time the first is
            first. A grid too coarse to have a noisy time below u_max, but for its start, does not meet the interval:
            `tableau` then leaves it out, and `iterate`, so `sample`, refuses. The n points lie between the times of
            the grid, on a `DDPMChain` between its nodes: a network whose label is the number of a node sees it rounded.
        solver: makes the steps.
        rho: spacing of the n points.
        S_noise: factor of the noise; at 1 the marginals are exact in the limit of many steps.

    Raises:
        ValueError: on an interval that is no (n >= 2, K >= 1, 0 < u_min < u_max), rho <= 0, S_noise < 0 or another kind
            of solver; by `tableau`, if u_max lies above the SDE's t_max; by `iterate`, before any evaluation, if the
            grid does not meet an interval.
    """

    masks: ClassVar[bool] = True

    intervals: Sequence[tuple[int, int, float, float]] | None = None
    solver: SingleStep = Heun()  # noqa: RUF009 (frozen)
    rho: float = 7.0
    S_noise: float = 1.0

    def __post_init__(self) -> None:
        given = [] if self.intervals is None else self.intervals
        if not isinstance(given, Sequence) or not all(isinstance(v, Sequence) for v in given):
            raise ValueError(
                f"intervals={self.intervals!r}: expected a list of (n, K, u_min, u_max), [(3, 2, 0.06, 0.3)] say"
            )
        if self.intervals is not None:
            object.__setattr__(self, "intervals", tuple(tuple(interval) for interval in given))  # hashable
        for interval in given:
            if len(interval) != 4:
                raise ValueError(f"interval {interval}: expected (n, K, u_min, u_max)")
            n, K, u_min, u_max = interval
            check_count(n=n, K=K)
            if n < 2 or not 0 < u_min < u_max < math.inf:
                raise ValueError(f"interval {interval}: expected n >= 2 points and 0 < u_min < u_max")
        if not self.rho > 0:
            raise ValueError(f"rho={self.rho}: expected a number > 0")
        check_nonnegative(S_noise=self.S_noise)
        self._check_solver()

    def grid(self, sde: SDE, steps: int, *, end: float = 0.0) -> Grid:
        """The solver's own, or `Grid.power` where that does not meet an interval."""
        grid = super().grid(sde, steps, end=end)
        return Grid.power(sde, steps, power=2.0, end=end) if self._unmet(grid) else grid

    def moves(self, grid: Grid) -> list[Move]:
        times, loops = grid.times.tolist(), self._loops(grid)
        moves = []
        for i in range(grid.steps):
            path = [times[i], times[i + 1], *loops.get(i + 1, [])]
            moves += [Move(t, s, i) for t, s in pairwise(path)]
        return moves

    def loop(
        self, denoiser: Denoiser, x: Tensor, grid: Grid, noise: NoiseSource | None, cond: dict[str, Any]
    ) -> Iterator[State]:
        check_decreasing(grid, self)
        for interval in self._unmet(grid):
            raise ValueError(
                f"{grid!r} has no noisy time below u_max={interval[3]} after its start, so the interval {interval} "
                "would not run: take more steps, or a grid with more times near the data, Grid.power say"
            )
        return super().loop(denoiser, x, grid, noise, cond)

    def _intervals(self, sde: SDE) -> Sequence[tuple[int, int, float, float]]:
        return [(3, 2, 0.06 * sde.data_scale, 0.3 * sde.data_scale)] if self.intervals is None else self.intervals

    def _unmet(self, grid: Grid) -> list[tuple[int, int, float, float]]:
        return [interval for interval in self._intervals(grid.sde) if _nearest(grid, interval) is None]

    def _loops(self, grid: Grid) -> dict[int, list[float]]:
        """The times to visit after grid time i, up and down again, all intervals and repetitions in one list."""
        sde, loops = grid.sde, dict[int, list[float]]()
        u_limit = float(_level(sde, sde.t_max))
        for n, K, u_min, u_max in self._intervals(sde):
            if u_max > u_limit * (1 + 1e-9):
                raise ValueError(f"the interval {(n, K, u_min, u_max)} leaves {sde!r}: u is {u_limit:.6g} at its t_max")
            top = min(float(sde.time_at(-math.log(u_max))), sde.t_max)
            i = _nearest(grid, (n, K, u_min, u_max))
            if i is not None:
                down = Grid.karras(sde, n - 1, rho=self.rho, start=top, end=float(grid.times[i])).times.tolist()
                loops.setdefault(i, []).extend(down * K)
        return loops


def _nearest(grid: Grid, interval: tuple[int, int, float, float]) -> int | None:
    """i > 0 of the noisy grid time below u_max that is nearest to u_min, if there is one."""
    _, _, u_min, u_max = interval
    u = _level(grid.sde, grid.times[1:])
    distance = torch.where((u > 0) & (u < u_max), (u - u_min).abs(), math.inf)
    return int(distance.argmin()) + 1 if float(distance.min()) < math.inf else None


@dataclass(frozen=True)
class TimeTravel(_Composite):
    """Time travel, the resampling of RePaint (Lugmayr et al., 2022, algorithm 1): after each `jump` steps down, the
    forward process goes back up over them, `repeats` - 1 times, so that a state that a condition has pushed off the
    model's distribution finds back to it.

    The way up is one draw of x_s given x_t, which evaluates nothing; each block of `jump` steps costs `repeats` times
    its evaluations. The paper's jump is 10, its repeats 10. As there, there is no way back from the data (t = 0): the
    block that reaches it, like a last block of fewer steps, is made once.

    Args:
        solver: makes the steps.
        jump: steps of a block.
        repeats: how often each block is made: 1 is `solver` itself.
        u_min: blocks that end below this level, u = sigma / alpha, are made once too: where the condition is one that
            holds above it only, the model alone would take back what the condition has brought.

    Raises:
        ValueError: unless jump and repeats are whole numbers >= 1, u_min >= 0 and solver is a `SingleStep`.
    """

    solver: SingleStep = DDPM()  # noqa: RUF009 (frozen)
    jump: int = 10
    repeats: int = 10
    u_min: float = 0.0

    def __post_init__(self) -> None:
        check_count(jump=self.jump, repeats=self.repeats)
        check_nonnegative(u_min=self.u_min)
        self._check_solver()

    def moves(self, grid: Grid) -> list[Move]:
        times, moves = grid.times.tolist(), list[Move]()
        noisy = (_level(grid.sde, grid.times) > self.u_min).tolist()
        for i in range(grid.steps):
            end = i + self.jump
            if i % self.jump == 0 and end <= grid.steps and noisy[end]:
                # All but the last pass belong to the block's first step, so that only the last leaves states for good.
                round_trip = [*pairwise(times[i : end + 1]), (times[end], times[i])]
                moves += [Move(t, s, i) for t, s in round_trip] * (self.repeats - 1)
            moves.append(Move(times[i], times[i + 1], i))
        return moves
