"""What a solver is: it turns a grid into a table, or into a loop of the same call shape."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from scoresde.chain import DDPMChain
from scoresde.denoiser import Denoiser
from scoresde.grid import Grid
from scoresde.noise import NoiseSource
from scoresde.sde import SDE
from scoresde.tableau import State, Tableau

__all__ = ["Solver", "one_step"]


class Solver(ABC):
    """A sampler whose coefficients are known beforehand. It holds options only, never state: use it as often, on
    as many batches and from as many threads as you like.
    """

    @abstractmethod
    def tableau(self, grid: Grid) -> Tableau:
        """The table of coefficients on that grid."""

    def grid(self, sde: SDE, steps: int) -> Grid:
        """The grid that `sample(steps=...)` uses where none is given."""
        return Grid.customary(sde, steps)

    def steps_within(self, sde: SDE, nfe: int) -> int:
        """The largest number of steps whose evaluations fit the budget `nfe`.

        Raises:
            ValueError: if not even one step fits.
        """
        if isinstance(nfe, bool) or not isinstance(nfe, Integral) or nfe < 1:
            raise ValueError(f"nfe={nfe!r}: expected a whole number >= 1")
        most = min(int(nfe), sde.steps) if isinstance(sde, DDPMChain) else int(nfe)
        steps = bisect_right(range(1, most + 1), nfe, key=lambda n: self.tableau(self.grid(sde, n)).nfe)
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
        """Run from x on the grid, yielding a `State` after each evaluation."""
        return self.tableau(grid).iterate(denoiser, x, noise, cond)


def one_step(grid: Grid, a: Tensor, b: Tensor, c: Tensor) -> Tableau:
    """The table of a one-evaluation step x_s = a x_t + b D + c z, with its two ends made exact.

    On a step to sigma_s = 0, x_s is D. On one from alpha_t = 0, x_t is pure noise that says nothing of x_0, and the
    step is a draw from N(alpha_s D, sigma_s^2) if the method is stochastic there, else the coefficients' own limit.
    """
    alpha_t, _, alpha_s, sigma_s = grid.pairs()
    forgets = (alpha_t == 0) & ~(a.isfinite() & b.isfinite() & c.isfinite())
    lands = sigma_s == 0
    zero = torch.zeros_like(a)
    return Tableau(
        grid,
        a=torch.where(forgets | lands, zero, a),
        b=torch.where(forgets | lands, alpha_s, b),
        c=torch.where(lands, zero, torch.where(forgets, sigma_s, c)),
    )
