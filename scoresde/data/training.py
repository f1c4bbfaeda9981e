"""What a network trains on: levels in memory, or images decoded when they are wanted, in [-1, 1] in a batch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scoresde.data.folder import ImageFolder, Mode
from scoresde.data.levels import scaled
from scoresde.data.order import check_whole
from scoresde.data.sources import find_data
from scoresde.likelihood.discrete import outer_edges
from scoresde.noise import derive_seed

__all__ = ["Batch", "TrainingData", "training_data"]


class Batch(NamedTuple):
    """Some items.

    Attributes:
        x: floating point, shape (B, ...).
        labels: shape (B, ...), or None.
    """

    x: Tensor
    labels: Tensor | None


@dataclass(frozen=True, eq=False)
class TrainingData:
    """Items, and how they become a network's input.

    Args:
        x: shape (N, ...). Whole levels, uint8 images (N, C, H, W) say, become float32 in [-1, 1], both ends exactly
            (`scaled`); floating-point data are taken as they are. Or an `ImageFolder`.
        labels: of the items, N entries.
        levels: how many there are, 256 in 8-bit images; None for floating-point data.
        flip: mirror each image, left to right, with probability 1/2, anew in every epoch: a function of the seed, the
            epoch and the item alone.
        seed: of the flips.
        classes: what the labels stand for.

    Raises:
        ValueError: if these do not go together, a level is out of range or a number is not finite, naming the items.
    """

    x: Tensor | ImageFolder
    labels: Tensor | None = None
    levels: int | None = None
    flip: bool = False
    seed: int = 0
    classes: list[str] | None = None

    def __post_init__(self) -> None:
        check_whole(seed=self.seed)
        _ = self.data_range  # raises on a wrong number of levels
        if isinstance(self.x, Tensor):
            _check(self.x, self.levels)
        elif self.levels != 256:
            raise ValueError(f"levels={self.levels}: a folder's images have 256")
        if self.labels is not None and (self.labels.ndim == 0 or len(self.labels) != len(self)):
            raise ValueError(f"labels have the shape {tuple(self.labels.shape)}: expected one for each of {len(self)}")
        if self.flip and len(self.shape) != 3:
            raise ValueError(f"flip=True is for images (C, H, W): an item has the shape {self.shape}")

    def __len__(self) -> int:
        return len(self.x)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an item."""
        return tuple(self.x.shape[1:]) if isinstance(self.x, Tensor) else self.x.shape

    @property
    def data_range(self) -> tuple[float, float] | None:
        """What the bins of the levels fill, for bits/dim; None for floating-point data."""
        return None if self.levels is None else outer_edges(-1.0, 1.0, self.levels)

    @property
    def lazy(self) -> bool:
        """Whether items are decoded when they are wanted: `loader` does it in other processes."""
        return not isinstance(self.x, Tensor)

    def batch(self, items: Tensor, epochs: Tensor | int = 0) -> Batch:
        """Some items, on the data's device.

        Args:
            items: which, int64, shape (B,): `Order.items`.
            epochs: in which epoch each is shown: `Order.epochs`. Flips depend on it, nothing else.

        Raises:
            ValueError: if a file is damaged; the message names it.
        """
        labels = None if self.labels is None else self.labels.index_select(0, items.to(self.labels.device))
        x = self.x.index_select(0, items.to(self.x.device)) if isinstance(self.x, Tensor) else self.x.batch(items)
        if self.flip:
            which = self._flipped(items, epochs).nonzero().flatten().to(x.device)
            x.index_copy_(0, which, x.index_select(0, which).flip(-1))
        return Batch(x if self.levels is None else scaled(x, self.levels), labels)

    def to(self, device: torch.device | str) -> TrainingData:
        """The same in another device's memory: a small set is fastest on the GPU itself.

        Raises:
            ValueError: if the images are decoded when they are wanted.
        """
        if not isinstance(self.x, Tensor):
            raise ValueError(f"{self.x!r} is not in memory: training_data(..., lazy=False) reads it")
        return replace(self, x=self.x.to(device), labels=None if self.labels is None else self.labels.to(device))

    @property
    def fingerprint(self) -> str:
        """What tells these data from others, for a checkpoint: a hash of the content; of a folder, of its files' names
        and lengths."""
        if isinstance(self.x, Tensor):
            content: Any = self.x.detach().cpu().contiguous().view(torch.uint8).numpy()
            digest = f"sha256 {hashlib.sha256(content).hexdigest()[:12]}"
            text = f"{tuple(self.x.shape)} in [{self.x.min():.4g}, {self.x.max():.4g}], {digest}"
        else:
            text = f"{(len(self), *self.shape)} images, {self.x.digest()}"
        levels = "" if self.levels is None else f", {self.levels} levels"
        return text + levels + (f", flips from seed {self.seed}" if self.flip else "")

    def _flipped(self, items: Tensor, epochs: Tensor | int) -> Tensor:
        """Whether each is, bool, shape (B,)."""
        items = items.cpu()
        epochs = torch.as_tensor(epochs, device="cpu").expand(len(items))
        flipped = torch.empty(len(items), dtype=torch.bool, device="cpu")
        for epoch in epochs.unique().tolist():
            shown = epochs == epoch
            flipped[shown] = _coins(len(self), self.seed, epoch)[items[shown]]
        return flipped


def training_data(
    source: str | Path,
    *,
    labels: bool = False,
    levels: int | None = None,
    size: int | tuple[int, int] | None = None,
    mode: Mode | None = None,
    flip: bool = False,
    seed: int = 0,
    lazy: bool = True,
    download: bool = False,
) -> TrainingData:
    """Data to train on, by name or from the disk.

    Args:
        source, size, mode, download: as in `read_data`.
        labels: keep them; from a folder, the classes are its folders.
        levels: of integers that are not uint8, or not 0 to 255: how many.
        flip, seed: see `TrainingData`.
        lazy: a folder's images are decoded when they are wanted; False: once, into memory.

    Raises:
        As `read_data`; and ValueError if there are no labels, or the levels are not known.
    """
    found = find_data(source, labels=labels, size=size, mode=mode, download=download)
    classes = found.classes if labels else None
    if labels and found.labels is None:
        raise ValueError(f"{source} has no labels")
    kept = found.labels if labels else None
    if isinstance(found, ImageFolder):
        x: Tensor | ImageFolder = found if lazy else found.batch(range(len(found)))
        known: int | None = 256
    else:
        x = found.x
        known = found.levels or (256 if x.dtype == torch.uint8 else None)
        if levels is not None and found.levels not in (None, levels):
            raise ValueError(f"levels={levels}: {source} has {found.levels}")
    try:
        return TrainingData(x, kept, levels or known, flip, seed, classes)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _check(x: Tensor, levels: int | None) -> None:
    """
    Raises:
        ValueError: unless they are items: levels in their range, or finite numbers.
    """
    if x.ndim == 0 or x.numel() == 0 or x.is_complex() or x.dtype == torch.bool:
        raise ValueError(f"x is {x.dtype} of shape {tuple(x.shape)}: expected numbers (N, ...), N >= 1")
    if x.is_floating_point():
        if levels is not None:
            raise ValueError(f"levels={levels}: floating-point data have none")
        if not bool(x.isfinite().all()):
            bad = (~x.reshape(len(x), -1).isfinite().all(1)).nonzero().flatten().tolist()
            raise ValueError(f"data items {bad[:8]} are not finite")
        return
    if levels is None:
        raise ValueError(f"x is {x.dtype}: say how many levels there are, levels=256 say")
    lo, hi = int(x.min()), int(x.max())
    if lo < 0 or hi >= levels:
        raise ValueError(f"x has levels from {lo} to {hi}: expected 0 to {levels - 1}, for levels={levels}")
    if x.ndim == 4 and x.shape[-1] in (1, 3) and x.shape[1] not in (1, 2, 3, 4):
        raise ValueError(f"x has the shape {tuple(x.shape)}: images are (N, C, H, W), take x.movedim(-1, 1)")


@lru_cache(maxsize=4)
def _coins(n: int, seed: int, epoch: int) -> Tensor:
    """Of every item in an epoch, bool; a stream beside that of the epoch's permutation."""
    generator = torch.Generator("cpu").manual_seed(derive_seed(seed, 0, epoch, 1))
    return torch.rand(n, generator=generator, device="cpu") < 0.5
