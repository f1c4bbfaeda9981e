"""Raw conditions: what no network of `scoresde.nn` takes as it is, and an encoder makes a condition of
(`scoresde.nn.Encoding`). An item whose raw condition is zero throughout is told nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scoresde.checks import ArgumentError
from scoresde.data.arrays import digest
from scoresde.data.conditions import Condition, same_number
from scoresde.data.shown import Shown, mirrored
from scoresde.errors import not_finite, some

__all__ = ["Itself", "Raw"]


@dataclass(frozen=True)
class Itself(Condition):
    """The item itself, of which an encoder makes a condition: of a diffusion autoencoder (`scoresde.nn.Encoding`).

    Args:
        name: of the raw condition.
    """

    name: str = "source"

    @property
    def key(self) -> str:
        return self.name

    def channels(self, shape: Sequence[int]) -> int:
        return shape[0]

    def __call__(self, x: Tensor, shown: Shown) -> Tensor:
        return x


@dataclass(frozen=True, eq=False)
class Raw(Condition):
    """What was given for each item, as it is, of which an encoder makes a condition: the ids of a text's tokens, say.

    Args:
        name: of the raw condition.
        values: N of them, (N, ...), of any dtype. One that is zero throughout is nothing. The mask of items of various
            sizes (`scoresde.Masked`) is one, `Raw("mask", mask)`, bool; what it says is no condition, and `drop` leaves
            it as it is.
        flips: whether values are images, (N, ..., W), that are mirrored with their items, where `TrainingData(flip=)`
            mirrors these. None is refused there if values have two axes or more: images, maps and masks want True,
            what has no left and right, a list of embeddings say, False.

    Raises:
        ValueError: if values have no entries, or a number is not finite; if one number, or one row of them, is to be
            mirrored; by `TrainingData`, as said.
    """

    name: str
    values: Tensor
    flips: bool | None = None

    def __post_init__(self) -> None:
        if self.values.ndim < 2 or self.values.numel() == 0:
            raise ValueError(f"values have the shape {tuple(self.values.shape)}: expected (N, ...), N >= 1")
        if bad := not_finite(self.values):
            raise ValueError(f"{self.name} of items {some(bad)} is not finite")
        if self.flips and self.values.ndim < 3:
            raise ArgumentError(f"flips=True: {self.name} has the shape {tuple(self.values.shape)}, and is no image")

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        return f"Raw({self.name} {tuple(self.values.shape[1:])}: {len(self)}{', flips' if self.flips else ''})"

    @property
    def key(self) -> str:
        return self.name

    @property
    def fingerprint(self) -> str:
        return f"{self!r}, {digest(self.values)}"

    def channels(self, shape: Sequence[int]) -> int:
        return self.values.shape[1]

    def check(self, shape: Sequence[int], n: int) -> None:
        if len(self) != n:
            raise ValueError(f"{self!r} has {len(self)} entries for {n} items: give one for each")

    def __call__(self, x: Tensor, shown: Shown) -> Tensor:
        same_number(x, shown)
        found = self.values.index_select(0, shown.items.to(self.values.device)).to(x.device)
        return mirrored(found, shown.mirrored) if self.flips else found

    def check_flips(self) -> None:
        """Raises ValueError if it is not said whether it is mirrored with its items, and may be an image."""
        if self.flips is None and self.values.ndim > 2:
            raise ArgumentError(
                f"flip=True: {self!r} may be images, which are to be mirrored with their items; say so, "
                f"Raw({self.name!r}, values, flips=True), or flips=False where they have no left and right"
            )

    def taken(self, y: Tensor, shape: Sequence[int]) -> Tensor:
        return y

    def to(self, device: torch.device | str) -> Condition:
        return replace(self, values=self.values.to(device))

    def first(self, n: int) -> Condition:
        return replace(self, values=self.values[:n])
