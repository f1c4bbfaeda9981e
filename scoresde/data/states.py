"""Data of levels as whole states, for the denoisers of `scoresde.categorical`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from scoresde.checks import ArgumentError
from scoresde.data.training import Batch, TrainingData
from scoresde.levels import scaled

__all__ = ["StateData", "pictured", "states_of"]


def states_of(x: Tensor, levels: int, states: int) -> Tensor:
    """Levels 0 to L - 1 as K states, int64: floor(K x / L), so that K = 2 is a threshold at half.

    >>> import torch
    >>> states_of(torch.arange(17), 17, 2).tolist()
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]
    """
    return x.long() * states // levels


def pictured(x: Tensor, states: int) -> Tensor:
    """States as images in [-1, 1], float32, both ends exactly."""
    return scaled(x, states)


@dataclass(frozen=True, eq=False)
class StateData:
    """A `TrainingData` of levels as a source of whole states, with what it tells of its items.

    Args:
        data: of whole levels.
        states: K, at most its levels.

    Raises:
        ValueError: if the data are floating-point numbers, or have fewer levels.
    """

    data: TrainingData
    states: int

    def __post_init__(self) -> None:
        if self.data.levels is None:
            raise ArgumentError("the data are floating-point numbers: whole states are made of whole levels")
        if not 2 <= self.states <= self.data.levels:
            raise ArgumentError(f"states={self.states}: expected 2 to the {self.data.levels} levels of the data")

    def __len__(self) -> int:
        return len(self.data)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an item."""
        return self.data.shape

    @property
    def labels(self) -> Tensor | None:
        return self.data.labels

    @property
    def fingerprint(self) -> str:
        """What tells it from other data."""
        return f"{self.states} states of {self.data.fingerprint}"

    def look(self) -> None:
        """As `TrainingData.look`."""
        self.data.look()

    def first(self, n: int) -> StateData:
        """The first n items."""
        return replace(self, data=self.data.first(n))

    def batch(self, items: Tensor, epochs: Tensor | int = 0) -> Batch:
        """Some items' states, and what a network is told of them; see `TrainingData.batch`."""
        found: Any = self.data.batch(items, epochs)
        levels = self.data.levels
        assert levels is not None
        level = ((found.x.double() + 1) * ((levels - 1) / 2)).round()
        return Batch(states_of(level, levels, self.states), found.cond)
