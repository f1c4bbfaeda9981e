"""What a solver is: it turns a grid into a table, or it is a loop of the same call shape."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from scoresde.chain import DDPMChain
from scoresde.checks import check_count
from scoresde.denoiser import Denoiser
from scoresde.grid import Grid
from scoresde.noise import NoiseSource
from scoresde.sde import SDE
from scoresde.solvers.rows import Rows
from scoresde.tableau import State, Tableau

__all__ = ["SingleStep", "Solver"]


class Solver:
    """A sampler. It holds options only, never state: use it as often, on as many batches and from as many threads as
    you like. A subclass gives `tableau(grid)`, if its coefficients are known beforehand, or else `iterate`.

    Attributes:
        adaptive: whether it chooses its own times, so that `sample` needs no steps=, nfe= or grid=: the grid then only
            says where it starts, where it ends and at which times between a state is reported.
        power: of the `Grid.sampling` that `sample(steps=...)` takes where no grid is given, chosen by measurement
            (benchmarks/results/step_counts); None for the SDE's customary grid.
    """

    adaptive: ClassVar[bool] = False
    power: ClassVar[float | None] = None

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
        """Evaluations of the denoiser on that grid, or None where they are not known beforehand."""
        return self.tableau(grid).nfe

    def within(self, sde: SDE, nfe: int) -> tuple[Solver, Grid]:
        """The solver and grid that `sample(nfe=...)` uses: as many steps as fit the budget `nfe`.

        Raises:
            ValueError: if not even one step fits.
        """
        return self, self.grid(sde, self.steps_within(sde, nfe))

    def steps_within(self, sde: SDE, nfe: int, *, end: float = 0.0) -> int:
        """The largest number of steps, on the grid to `end`, whose evaluations fit the budget `nfe`.

        Raises:
            ValueError: if not even one step fits.
        """
        check_count(nfe=nfe)
        most = min(int(nfe), sde.steps - math.ceil(end)) if isinstance(sde, DDPMChain) else int(nfe)
        grid = partial(self.grid, end=end) if end else self.grid
        steps = bisect_right(range(1, most + 1), nfe, key=lambda n: self.evaluations(grid(sde, n)) or 0)
        if steps == 0:
            raise ValueError(f"{self!r} needs more than nfe={nfe} evaluations for a single step")
        return steps

    def iterate(
        self,
        denoiser: Denoiser,
        x: Tensor,
        grid: Grid,
        noise: NoiseSource | None = None,
        cond: Mapping[str, Any] | None = None,
    ) -> Iterator[State]:
        """Run from x on the grid, yielding a `State` after each row."""
        return self.tableau(grid).iterate(denoiser, x, noise, cond)


class SingleStep(Solver, ABC):
    """A solver whose steps remember nothing: each is a few rows that depend on its own two times only. Others are made
    of it: predictor-corrector, Restart, time travel.
    """

    @abstractmethod
    def rows(self, sde: SDE, t: Tensor, s: Tensor) -> Rows:
        """The rows of the moves t -> s, each of shape (M,), s < t. Where nothing is drawn, s > t is right as well, up
        to alpha_s = 0 even.
        """

    def tableau(self, grid: Grid) -> Tableau:
        return self.rows(grid.sde, grid.times[:-1], grid.times[1:]).tableau(grid)


def check_decreasing(grid: Grid, solver: Solver) -> None:
    """Raises ValueError on an increasing grid: for loops that go from noise to data only. (Of tables that draw noise
    `Tableau` says so.)
    """
    if grid.increasing:
        raise ValueError(
            f"an increasing grid, from data to noise, is for deterministic solvers with a table and for AdaptiveODE, "
            f"not for {solver!r}"
        )
