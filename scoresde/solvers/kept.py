"""What a run needs before its first evaluation, kept for the next: its grid, its table, and the rows as numbers.

Solvers, grids and the SDEs of this package are values, so what was made of them is good for as long as they are the
same to the last bit (`scoresde.tensors.frozen`). A solver, an SDE or a denoiser of a class of your own may read what
changes, and so may a function that one of the package's holds: of these nothing is kept, and all is made anew.

What is kept lies on the host and is reached by no caller: no network, no state, nothing that can be written to.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Any, TypeVar

import torch

from scoresde.denoiser import Denoiser
from scoresde.grid import Grid
from scoresde.sde import SDE
from scoresde.tableau import Ready, Tableau
from scoresde.tensors import frozen

__all__ = ["KEPT", "Kept", "grid_of", "ready"]

T = TypeVar("T")


class Kept:
    """Things by their keys, those asked for last.

    Args:
        most: the sum of their sizes; what was not asked for the longest goes first.
        least: that each counts for, whatever its size.
    """

    def __init__(self, most: int, least: int = 1) -> None:
        self.most, self.least, self.size = most, least, 0
        self._things: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Hashable, make: Callable[[], T], size: Callable[[T], int]) -> T:
        """What was made under that key, or is now."""
        with self._lock:
            if key in self._things:
                self._things.move_to_end(key)
                kept: T = self._things[key][0]
                return kept
        with torch.inference_mode(False):  # a tensor of that mode would not do outside of it
            made = make()
        counts = max(size(made), self.least)
        with self._lock:
            if key not in self._things and counts <= self.most:
                self._things[key] = made, counts
                self.size += counts
            while self.size > self.most:
                self.size -= self._things.popitem(last=False)[1][1]
        return made

    def __len__(self) -> int:
        return len(self._things)

    def clear(self) -> None:
        with self._lock:
            self._things.clear()
            self.size = 0


KEPT = Kept(most=2**14, least=2**6)
"""Of a process: 256 runs at most, of 16,384 rows in all, some 20 MB."""


def grid_of(solver: object, sde: SDE, numbers: Hashable, make: Callable[[], tuple[T, Grid]]) -> tuple[T, Grid]:
    """The solver and the grid of a run that `make` finds from these three alone. The grid is the caller's own."""
    held = frozen(solver), frozen(sde), frozen(numbers)
    if None in held:
        return make()

    def kept() -> tuple[T, Grid]:
        chosen, grid = make()
        return chosen, _apart(grid, sde)

    chosen, grid = KEPT.get(("grid", *held), kept, lambda found: len(found[1]))
    return chosen, _apart(grid, sde)


def ready(
    solver: object, tableau: Callable[[Grid], Tableau], grid: Grid, denoiser: Denoiser, dtype: torch.dtype
) -> Ready:
    """The solver's table on the grid, ready for the denoiser and a state of that dtype. Errors: those of both."""
    held = frozen(solver), frozen(grid.sde)
    if None in held or type(grid) is not Grid:
        return tableau(grid).ready(denoiser, dtype)

    def table() -> Tableau:
        return tableau(_apart(grid, grid.sde))

    key = (*held, grid.times.numpy().tobytes())
    if (of := frozen(denoiser)) is None:
        return KEPT.get(("table", *key), table, len).ready(denoiser, dtype)
    return KEPT.get(("ready", *key, of, dtype), lambda: table().ready(denoiser, dtype), len)


def _apart(grid: Grid, sde: SDE) -> Grid:
    """The grid again, for that SDE, in memory of its own."""
    again = copy.copy(grid)
    again.sde, again.times = sde, grid.times.clone()
    return again
