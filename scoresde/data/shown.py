"""How items are shown in training, and the random numbers that are theirs: functions of the seed, the epoch and the
item alone, so that a run goes on in the middle of an epoch as it would have, and any number of processes shows what one
shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from scoresde.noise import derive_seed
from scoresde.tensors import told

__all__ = ["Shown", "choices", "drops", "flips", "mirrored", "picked"]

# Streams beside that of the epoch's permutation, derive_seed(seed, 0, epoch).
_FLIPS, _DROPS, _TASK, _NOISE, _CHOICE = 1, 2, 3, 4, 5


@dataclass(frozen=True, eq=False)
class Shown:
    """How items are shown: which, in which epochs, mirrored or not, and the random numbers that are theirs.

    Args:
        items: which, int64, shape (B,).
        of: N, how many items there are.
        epochs: in which epoch each is shown, shape (B,), or one for all.
        seed: of all that is random.
        mirrored: bool, shape (B,), or None where no item is.

    Raises:
        ValueError: if there is not one epoch for each item, or an item is none of the N.
    """

    items: Tensor
    of: int
    epochs: Tensor | int = 0
    seed: int = 0
    mirrored: Tensor | None = None

    __repr__ = told

    def __post_init__(self) -> None:
        items = torch.as_tensor(self.items).cpu()
        epochs = torch.as_tensor(self.epochs, device="cpu")
        if items.ndim != 1 or items.is_floating_point() or epochs.shape not in ((), items.shape):
            raise ValueError(
                f"items of shape {tuple(items.shape)} in epochs of shape {tuple(epochs.shape)}: expected whole numbers "
                "(B,), and one epoch for each or for all"
            )
        if len(items) and not 0 <= int(items.min()) <= int(items.max()) < self.of:
            raise ValueError(f"items {int(items.min())} to {int(items.max())}: there are {self.of}, from 0 on")
        object.__setattr__(self, "items", items)
        object.__setattr__(self, "epochs", epochs.expand(len(items)))

    def __len__(self) -> int:
        return len(self.items)

    def some(self, which: Tensor) -> Shown:
        """Those of the items, at these places (B'), int64, as they are shown here."""
        mirrored = None if self.mirrored is None else self.mirrored[which.to(self.mirrored.device)]
        return Shown(self.items[which], self.of, torch.as_tensor(self.epochs)[which], self.seed, mirrored)

    def uniform(self, count: int, stream: int = _TASK) -> Tensor:
        """`count` numbers in [0, 1) for each item: float32, shape (B, count), on the CPU.

        An epoch's are drawn once for all N items, and kept.
        """
        u = torch.empty(len(self), count, dtype=torch.float32, device="cpu")
        epochs = torch.as_tensor(self.epochs)
        for epoch in epochs.unique().tolist():
            here = epochs == epoch
            u[here] = _uniform(self.of, count, self.seed, epoch, stream)[self.items[here]]
        return u

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers of that shape for each item: float32, (B, *shape), on the CPU."""
        z = torch.empty(len(self), *shape, dtype=torch.float32, device="cpu")
        for one, item, epoch in zip(z, self.items.tolist(), torch.as_tensor(self.epochs).tolist(), strict=True):
            one.normal_(generator=torch.Generator("cpu").manual_seed(derive_seed(self.seed, 0, epoch, _NOISE, item)))
        return z

    def chosen(self, probability: float, stream: int) -> Tensor:
        """Which items a coin of that probability chooses: bool, shape (B,)."""
        return self.uniform(1, stream)[:, 0] < probability


@lru_cache(maxsize=8)  # two epochs, where a batch spans them, of every stream
def _uniform(n: int, count: int, seed: int, epoch: int, stream: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(derive_seed(seed, 0, epoch, stream))
    return torch.rand(n, count, generator=generator, device="cpu", dtype=torch.float32)


def flips(shown: Shown) -> Tensor:
    """Which items are mirrored, with probability 1/2: bool, shape (B,)."""
    return shown.chosen(0.5, _FLIPS)


def drops(shown: Shown, probability: float) -> Tensor:
    """Of which items a network is told nothing: bool, shape (B,)."""
    return shown.chosen(probability, _DROPS)


def choices(shown: Shown, n: int) -> Tensor:
    """One of n for each item, all alike likely: int64, shape (B,)."""
    return picked(shown, torch.full((len(shown),), n, device="cpu"))


def picked(shown: Shown, counts: Tensor) -> Tensor:
    """For each item one of its own number (B,), all alike likely: int64, shape (B,)."""
    chosen = (shown.uniform(1, _CHOICE)[:, 0] * counts).long()
    return torch.minimum(chosen, counts - 1)  # the product may have been rounded up


def mirrored(x: Tensor, which: Tensor | None) -> Tensor:
    """x with these of its images, bool (B,), left to right."""
    if which is None:
        return x
    index = which.nonzero().flatten().to(x.device)
    return x.index_copy(0, index, x.index_select(0, index).flip(-1))
