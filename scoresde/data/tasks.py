"""The conditions of image-to-image tasks: what is left of an item x, as an image of its size.

    inpainting         [m x + (1 - m) f, m]        m = 1 where x is known, 0 in random boxes; f = 0 or noise
    uncropping         the same, m = 0 on one side of the image, or all around
    colourisation      0.299 R + 0.587 G + 0.114 B
    JPEG restoration   decode(encode(x, quality u))
    super-resolution   up(down(x)), both bicubic
    several            one of them for each item: [what is left of it, m], m = 1 wherever nothing is masked

The tasks are those of Palette (Saharia et al., 2022, "Palette: Image-to-image diffusion models") and SR3 (Saharia et
al., 2022, "Image super-resolution via iterative refinement"). Palette takes the loss of its first two in the unknown
pixels only and has no channel m; here it is taken everywhere, so that one loss serves every task: the known pixels are
soon copied, and add little to it.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from scoresde.checks import check_count, check_option
from scoresde.data.conditions import Condition, Given, GivenContext, same_number
from scoresde.data.shown import Shown, choices
from scoresde.levels import scaled

__all__ = [
    "Colourisation",
    "Inpainting",
    "JPEGRestoration",
    "OneOf",
    "SuperResolution",
    "Uncropping",
]

Fill = Literal["zeros", "noise"]


def _images(condition: Condition, shape: Sequence[int], channels: Sequence[int] = ()) -> None:
    if len(shape) != 3 or (channels and shape[0] not in channels):
        wanted = f"of {' or '.join(map(str, channels))} channels" if channels else "(C, H, W)"
        raise ValueError(f"{condition!r} is for images {wanted}: an item has the shape {tuple(shape)}")


@dataclass(frozen=True)
class Inpainting(Condition):
    """What is known of x outside of random boxes, and where that is: C + 1 channels, [m x + (1 - m) f, m].

    For images, series (gaps in time) and volumes.

    Args:
        least, most: the boxes' sides as fractions of the item's, uniform between them.
        boxes: how many; they may overlap.
        fill: f, "zeros" or standard normal "noise" (Palette's).

    Raises:
        ValueError: unless 0 < least <= most <= 1 and boxes >= 1.
    """

    least: float = 0.25
    most: float = 0.75
    boxes: int = 1
    fill: Fill = "zeros"

    def __post_init__(self) -> None:
        check_count(boxes=self.boxes)
        check_option(("zeros", "noise"), fill=self.fill)
        if not 0 < self.least <= self.most <= 1:
            raise ValueError(f"least={self.least}, most={self.most}: expected fractions, 0 < least <= most <= 1")

    def channels(self, shape: Sequence[int]) -> int:
        return _masked_channels(self, shape)

    def __call__(self, x: Tensor, shown: Shown) -> Tensor:
        same_number(x, shown)
        n = _axes(x)
        u = shown.uniform(2 * len(n) * self.boxes).reshape(len(x), self.boxes, 2, len(n))
        fraction = self.least + (self.most - self.least) * u[:, :, 0]
        length = (fraction * n).round().clamp(min=1).minimum(n)
        start = (u[:, :, 1] * (n - length + 1)).floor()
        known = torch.ones(len(x), 1, *x.shape[2:], dtype=torch.bool, device="cpu")
        for k in range(self.boxes):
            known &= ~_box(x.shape[2:], start[:, k], length[:, k])
        return _masked(x, known, self.fill, shown)

    def taken(self, y: Tensor, shape: Sequence[int]) -> Tensor:
        return _masked_taken(super().taken(y, shape), self.fill)


@dataclass(frozen=True)
class Uncropping(Condition):
    """What is known of x on one side, or around its middle; the task is the rest: channels as of `Inpainting`.

    Either end of each axis is cut off, or all ends alike, each with the same probability (5 ways of an image).

    Args:
        keep: share of the item that is known (Palette's 1/2).
        fill: as of `Inpainting`.

    Raises:
        ValueError: unless 0 < keep < 1.
    """

    keep: float = 0.5
    fill: Fill = "zeros"

    def __post_init__(self) -> None:
        check_option(("zeros", "noise"), fill=self.fill)
        if not 0 < self.keep < 1:
            raise ValueError(f"keep={self.keep}: expected a share, 0 < keep < 1")

    def channels(self, shape: Sequence[int]) -> int:
        return _masked_channels(self, shape)

    def __call__(self, x: Tensor, shown: Shown) -> Tensor:
        same_number(x, shown)
        n = _axes(x)
        way = (shown.uniform(1) * (2 * len(n) + 1)).long()  # 2 k: the end of axis k is cut off; 2 k + 1: its beginning
        along, around = way // 2 == torch.arange(len(n), device="cpu"), way == 2 * len(n)
        side = torch.where(around, self.keep ** (1 / len(n)), torch.where(along, self.keep, 1.0))
        length = (side * n).round().clamp(min=1)
        start = torch.where(around, ((n - length) / 2).floor(), torch.where(along & (way % 2 == 1), n - length, 0))
        return _masked(x, _box(x.shape[2:], start, length), self.fill, shown)

    def taken(self, y: Tensor, shape: Sequence[int]) -> Tensor:
        return _masked_taken(super().taken(y, shape), self.fill)


def _masked_taken(y: Tensor, fill: Fill) -> Tensor:
    """[m x, m] with whatever stood where m = 0 filled, m being 1 where the last channel is positive (white)."""
    shown = Shown(torch.arange(len(y), device="cpu"), len(y))
    return _masked(y[:, :-1], y[:, -1:] > 0, fill, shown)


def _masked_channels(condition: Condition, shape: Sequence[int]) -> int:
    if len(shape) < 2:
        raise ValueError(f"{condition!r} is for items (C, ...) with axes: an item has the shape {tuple(shape)}")
    return shape[0] + 1


def _axes(x: Tensor) -> Tensor:
    """The axes' lengths, float32, on the CPU."""
    return torch.tensor(x.shape[2:], dtype=torch.float32, device="cpu")


def _box(axes: Sequence[int], start: Tensor, length: Tensor) -> Tensor:
    """Where start <= i < start + length along all axes: bool, (B, 1, *axes), of start and length (B, len(axes))."""
    inside = torch.ones(len(start), 1, *axes, dtype=torch.bool, device="cpu")
    for axis, n in enumerate(axes):
        i = torch.arange(n, device="cpu") - start[:, axis, None]
        along = (i >= 0) & (i < length[:, axis, None])
        inside &= along.reshape(len(start), 1, *[n if k == axis else 1 for k in range(len(axes))])
    return inside


def _masked(x: Tensor, known: Tensor, fill: Fill, shown: Shown) -> Tensor:
    known = known.to(x.device)
    f = shown.normal(x.shape[1:]).to(x) if fill == "noise" else torch.zeros_like(x)
    return torch.cat([torch.where(known, x, f), known.to(x.dtype)], dim=1)


@dataclass(frozen=True)
class Colourisation(Condition):
    """The luma of a colour image: one channel, 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601, as Pillow's "L")."""

    def channels(self, shape: Sequence[int]) -> int:
        _images(self, shape, (3,))
        return 1

    def __call__(self, x: Tensor, shown: Shown) -> Tensor:
        same_number(x, shown)
        return _luma(x)

    def taken(self, y: Tensor, shape: Sequence[int]) -> Tensor:
        return super().taken(_luma(y) if y.ndim == 4 and y.shape[1] == 3 else y, shape)


def _luma(x: Tensor) -> Tensor:
    red, green, blue = x.split(1, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue  # a product of matrices would round with the batch


@dataclass(frozen=True)
class JPEGRestoration(Condition):
    """The image after Pillow's JPEG, at a quality that is uniform among the whole numbers from lowest to highest.

    Args:
        lowest, highest: of Pillow's scale (Palette's 5 and 30).

    Raises:
        ValueError: unless 1 <= lowest <= highest <= 95; by the call, if x is not in [-1, 1].
        ImportError: if Pillow is not installed, where it is checked or called.
    """

    lowest: int = 5
    highest: int = 30

    def __post_init__(self) -> None:
        check_count(lowest=self.lowest, highest=self.highest)
        if not self.lowest <= self.highest <= 95:
            raise ValueError(f"lowest={self.lowest}, highest={self.highest}: expected 1 <= lowest <= highest <= 95")

    @property
    def lazy(self) -> bool:
        return True

    def channels(self, shape: Sequence[int]) -> int:
        _images(self, shape, (1, 3))
        _pillow()
        return shape[0]

    def __call__(self, x: Tensor, shown: Shown) -> Tensor:
        same_number(x, shown)
        if len(x) and float(x.abs().max()) > 1 + 1e-6:
            raise ValueError(f"{self!r}: x is in [{x.min():.4g}, {x.max():.4g}], expected images in [-1, 1]")
        quality = self.lowest + (shown.uniform(1)[:, 0] * (self.highest - self.lowest + 1)).long()
        levels = x.detach().cpu().float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).numpy()
        after = [_jpeg(image, int(q)) for image, q in zip(levels, quality, strict=True)]
        return scaled(torch.from_numpy(np.stack(after)) if after else torch.from_numpy(levels)).to(x)


def _jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """Encoded and decoded: uint8, (1, H, W) or (3, H, W)."""
    Image, file = _pillow(), io.BytesIO()
    grey = len(image) == 1
    Image.fromarray(image[0] if grey else image.transpose(1, 2, 0)).save(file, "JPEG", quality=quality)
    with Image.open(file) as decoded:
        array = np.array(decoded)
    return array[None] if grey else array.transpose(2, 0, 1)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("JPEG files are made with Pillow: pip install scoresde[data]") from error
    return Image


@dataclass(frozen=True)
class SuperResolution(Condition):
    """up(down(x)): the image as one `factor` times smaller shows it, SR3's condition; as many channels as x.

    down and up are bicubic interpolation (a = -1/2, as Pillow's), the first widened to take means of `factor` pixels;
    sides that it does not divide are rounded up. Linear in x: where x jumps, they overshoot its range.

    Args:
        factor: >= 2.

    Raises:
        ValueError: if it is less.
    """

    factor: int = 4

    def __post_init__(self) -> None:
        check_count(factor=self.factor)
        if self.factor < 2:
            raise ValueError(f"factor={self.factor}: expected 2 at least")

    def channels(self, shape: Sequence[int]) -> int:
        _images(self, shape)
        return shape[0]

    def __call__(self, x: Tensor, shown: Shown) -> Tensor:
        same_number(x, shown)
        return resized(self.small(x), x.shape[2:])

    def small(self, x: Tensor) -> Tensor:
        """down(x)."""
        return resized(x, self._small(x.shape[1:]))

    def taken(self, y: Tensor, shape: Sequence[int]) -> Tensor:
        small = tuple(y.shape[1:]) == (shape[0], *self._small(shape))
        return super().taken(resized(y, shape[1:]) if small else y, shape)

    def _small(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(-(-n // self.factor) for n in shape[1:])


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """Images of another size, by the interpolation of `SuperResolution`."""
    return F.interpolate(x, size=tuple(size), mode="bicubic", antialias=True)


@dataclass(frozen=True)
class OneOf(Condition):
    """One of several tasks for each item, in each epoch anew and all alike likely: for one network that does them all
    (Palette, section 5.4), and is not told which it is.

    An item of C channels has C + 1: what a task leaves of it, a single channel being repeated, and m, 1 where nothing
    is masked. With one task alone it is that task in this form.

    Args:
        tasks: of this module.

    Raises:
        ValueError: if there is none, or one is an image that was given.
    """

    tasks: tuple[Condition, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        if not self.tasks or any(isinstance(task, Given | GivenContext | OneOf) for task in self.tasks):
            raise ValueError(f"tasks={self.tasks!r}: expected one or more that are functions of the item")

    @property
    def lazy(self) -> bool:
        return any(task.lazy for task in self.tasks)

    def channels(self, shape: Sequence[int]) -> int:
        for task in self.tasks:
            if (found := task.channels(shape)) not in (1, shape[0], shape[0] + 1):
                raise ValueError(f"{task!r} has {found} channels: expected 1, {shape[0]} or, masked, {shape[0] + 1}")
        return shape[0] + 1

    def __call__(self, x: Tensor, shown: Shown) -> Tensor:
        same_number(x, shown)
        found = x.new_ones(len(x), x.shape[1] + 1, *x.shape[2:])
        chosen = choices(shown, len(self.tasks))
        for k, task in enumerate(self.tasks):
            if len(mine := (chosen == k).nonzero()[:, 0]):
                y = task(x[mine.to(x.device)], shown.some(mine))
                found[mine.to(x.device), : max(y.shape[1], x.shape[1])] = y
        return found
