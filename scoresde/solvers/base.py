"""What a solver is: it turns a grid into a table, or it is a loop of the same call shape."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, cast, final

import torch
from torch import Tensor

from scoresde.checks import ArgumentError, check_count
from scoresde.denoiser import Denoiser, check_denoiser
from scoresde.grid import Grid
from scoresde.masked import begun
from scoresde.masks import mask_name
from scoresde.noise import Noise, NoiseSource, as_source
from scoresde.sde import SDE
from scoresde.solvers.kept import ready
from scoresde.solvers.rows import Rows
from scoresde.tableau import State, Tableau

__all__ = ["Around", "SameTable", "SingleStep", "Solver", "check_decreasing"]


class Solver:
    """A sampler. It holds options only, never state: use it as often, on as many batches and from as many threads as
    you like. A subclass gives `tableau(grid)`, if its coefficients are known beforehand, or else `loop`.

    Attributes:
        adaptive: whether it chooses its own times, so that `sample` needs no steps=, nfe= or grid=: the grid then only
            says where it starts, where it ends and at which times between a state is reported.
        draws, goes_up: of a loop: whether it draws noise, and whether it runs on an increasing grid too.
        power: of the `Grid.sampling` that `sample(steps=...)` takes where no grid is given, chosen by measurement
            (benchmarks/results/step_counts); None for the SDE's customary grid.
        masks: of a loop of its own: whether it knows of items of various sizes (`scoresde.Masked`).
        between: whether that grid may stand between a chain's nodes, where the denoiser's time label is continuous.
    """

    adaptive: ClassVar[bool] = False
    draws: ClassVar[bool] = True
    goes_up: ClassVar[bool] = False
    masks: ClassVar[bool] = False
    power: ClassVar[float | None] = None
    between: ClassVar[bool] = False

    @property
    def has_table(self) -> bool:
        """Whether its coefficients are known beforehand, so that `tableau` gives them."""
        return type(self).tableau is not Solver.tableau

    @property
    def by_rows(self) -> Solver:
        """The solver as one whose `iterate` shows every row, and goes on from a state that its driver has changed:
        itself. One that runs as a whole, `Captured` say, gives the solver that it wraps.
        """
        return self

    def tableau(self, grid: Grid) -> Tableau:
        """The table of coefficients on that grid.

        Raises:
            TypeError: if the solver is a loop whose coefficients depend on the values it meets.
        """
        raise TypeError(f"{type(self).__name__} has no table: its coefficients depend on the states it meets")

    def grid(self, sde: SDE, steps: int, *, end: float = 0.0) -> Grid:
        """The grid that `sample(steps=...)` uses where none is given. For encoding, which cannot start from the data
        itself, its `end` is t_min.
        """
        if self.power is None:
            return Grid.customary(sde, steps, end=end)
        return Grid.sampling(sde, steps, power=self.power, end=end)

    def evaluations(self, grid: Grid) -> int | None:
        """Evaluations of the denoiser on that grid, or None where they are not known beforehand. Solvers that can tell
        without their table do: the budget of `sample(nfe=)` asks several times.
        """
        return self.tableau(grid).nfe

    def within(self, sde: SDE, nfe: int) -> tuple[Solver, Grid]:
        """The solver and grid that `sample(nfe=...)` uses: as many steps as fit the budget `nfe`.

        Raises:
            ValueError: if not even one step fits.
        """
        return self, self.grid(sde, self.steps_within(sde, nfe))

    def steps_within(
        self, sde: SDE, nfe: int, *, end: float = 0.0, spacing: Callable[[SDE, int], Grid] | None = None
    ) -> int:
        """The largest number of steps, on the grid to `end`, or of a spacing, whose evaluations fit the budget `nfe`.

        Raises:
            ValueError: if not even one step fits.
        """
        check_count(nfe=nfe)
        most = int(min(nfe, sde.most_steps - math.ceil(end)))
        grid = spacing or (partial(self.grid, end=end) if end else self.grid)
        if most >= 1 and (self.evaluations(grid(sde, most)) or 0) <= nfe:  # one evaluation a step
            return most
        steps = bisect_right(range(1, most), nfe, key=lambda n: self.evaluations(grid(sde, n)) or 0)
        if steps == 0:
            raise ArgumentError(f"{self!r} needs more than nfe={nfe} evaluations for a single step")
        return steps

    @final
    def iterate(
        self,
        denoiser: Denoiser,
        x: Tensor,
        grid: Grid,
        noise: Noise | None = None,
        cond: Mapping[str, Any] | None = None,
    ) -> Iterator[State]:
        """Run from x on the grid, yielding a `State` after each row.

        Args:
            denoiser: the model.
            x: x_T, shape (B, ...), in the dtype that the state is to have.
            grid: where to step.
            noise: where the z_i come from, a function (row, x) or a source of `scoresde.noise`.
            cond: keyword arguments for the denoiser.

        Raises:
            TypeError: if the denoiser is none.
            ValueError: before any evaluation, if the denoiser's SDE is not the grid's, the grid goes a way that the
                solver cannot, it draws noise and is given none, or the denoiser is masked and it knows of no masks.
        """
        check_denoiser(denoiser)
        grid.check_sde(denoiser.sde)
        if not self.masks and type(self).loop is not Solver.loop and mask_name(denoiser) is not None:
            raise ArgumentError(
                f"{self!r} does not know of masks, and would count the entries that fill up among an item's own: take "
                "a solver with a table, UniPC() or DDPM() say, or items of one size without Masked"
            )
        denoiser, x, noise = begun(denoiser, x, noise, cond)
        if not self.has_table:  # of a table `Tableau` says all this
            if grid.increasing and not self.goes_up:
                check_decreasing(grid, self)
            if noise is None and self.draws:
                raise ValueError(
                    f"{self!r} draws noise: pass noise=, a function (row, x) such as scoresde.noise.SeededNoise"
                )
        return self.loop(denoiser, x, grid, None if noise is None else as_source(noise), dict(cond or {}))

    def loop(
        self, denoiser: Denoiser, x: Tensor, grid: Grid, noise: NoiseSource | None, cond: dict[str, Any]
    ) -> Iterator[State]:
        """What `iterate` runs once it has checked its arguments: the table; a solver that has none gives a loop."""
        return ready(self, self.tableau, grid, denoiser, x.dtype).run(denoiser, x, noise, cond)


class SingleStep(Solver, ABC):
    """A solver whose steps remember nothing: each is a few rows that depend on its own two times only. Others are made
    of it: predictor-corrector, Restart, time travel.
    """

    @abstractmethod
    def rows(self, sde: SDE, t: Tensor, s: Tensor) -> Rows:
        """The rows of the moves t -> s, each of shape (M,), s < t. Where nothing is drawn, s > t is right as well, up
        to alpha_s = 0 even.
        """

    def stages(self, sde: SDE, t: Tensor, s: Tensor) -> Tensor:
        """Evaluations of each of the moves t -> s, int64, shape (M,): one a row. Count them without rows if you can."""
        return torch.bincount(self.rows(sde, t, s).move, minlength=len(t))

    def tableau(self, grid: Grid) -> Tableau:
        return self.rows(grid.sde, grid.times[:-1], grid.times[1:]).tableau(grid)

    def evaluations(self, grid: Grid) -> int:
        return int(self.stages(grid.sde, grid.times[:-1], grid.times[1:]).sum())


class Around(Solver):
    """A solver around another, on whose grid it steps and whose evaluations it makes."""

    solver: Solver

    def grid(self, sde: SDE, steps: int, *, end: float = 0.0) -> Grid:
        return self.solver.grid(sde, steps, end=end)

    def evaluations(self, grid: Grid) -> int | None:
        return self.solver.evaluations(grid)


class SameTable(Around):
    """A dataclass around a solver, whose table it runs in another way, on the solver's own grid."""

    @property
    def between(self) -> bool:  # type: ignore[override]
        return self.solver.between

    def tableau(self, grid: Grid) -> Tableau:
        return self.solver.tableau(grid)

    def within(self, sde: SDE, nfe: int) -> tuple[Solver, Grid]:
        solver, grid = self.solver.within(sde, nfe)
        return (self if solver is self.solver else replace(cast(Any, self), solver=solver)), grid


def check_decreasing(grid: Grid, solver: Solver) -> None:
    """Raises ValueError on an increasing grid: for loops that go from noise to data only. (Of tables that draw noise
    `Tableau` says so.)
    """
    if grid.increasing:
        raise ValueError(
            f"an increasing grid, from data to noise, is for deterministic solvers with a table and for AdaptiveODE, "
            f"not for {solver!r}"
        )
