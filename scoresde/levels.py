"""Whole levels and the data that they stand for: x = (2 k - (L - 1)) / (L - 1) for level k of L, the lowest at -1 and
the highest at 1. Level k fills the bin of width 2 / (L - 1) around its x.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scoresde.checks import ArgumentError, check_count, check_range

__all__ = ["check_levels", "outer_edges", "rounded", "rounding_std", "scaled", "signed", "to_levels"]


def scaled(k: Tensor, levels: int = 256) -> Tensor:
    """The levels in float32, in [-1, 1], both ends exactly; it rounds but once. Their bins fill
    `outer_edges(-1, 1, levels)`.

    Args:
        k: integers, 0 to levels - 1, of any shape; not changed.
        levels: L, how many there are, at least 2.

    Raises:
        ValueError: if there are fewer.

    >>> import torch
    >>> scaled(torch.tensor([0, 8, 16]), levels=17)
    tensor([-1.,  0.,  1.])
    """
    check_levels(levels)
    return k.float().mul_(2).sub_(levels - 1).div_(levels - 1)


def outer_edges(lo: float, hi: float, levels: int) -> tuple[float, float]:
    """The data_range of data whose lowest level is *at* lo and highest *at* hi: half a level wider on each side.

    `bits_per_dim` takes the range that the bins fill: score_sde's data (u + k) / 256. Where the model was trained on
    k / 255 instead (torchvision's `ToTensor`), its levels are hi - lo over levels - 1 apart and stand in the middle of
    their bins, so that the first bin begins below lo. With the range (lo, hi) itself the images would be shrunk by
    255 / 256, which is small, or by 16 / 17 for the digits, which is not.

    Args:
        lo, hi: of the data.
        levels: at least 2.

    Raises:
        ValueError: unless lo < hi, both finite, and levels is a whole number >= 2.

    >>> outer_edges(-1.0, 1.0, 17)  # scikit-learn's digits, as `scoresde.data.digits` scales them
    (-1.0625, 1.0625)
    """
    check_levels(levels, (lo, hi))
    half = (hi - lo) / (levels - 1) / 2
    return lo - half, hi + half


def check_levels(levels: int, data_range: tuple[float, float] = (-1.0, 1.0)) -> None:
    """Raises ValueError unless levels is a whole number >= 2 and data_range two finite numbers lo < hi."""
    check_count(levels=levels)
    if levels == 1:
        raise ArgumentError("levels=1: one level says nothing of an item; expected a whole number >= 2")
    check_range(data_range)


_SIGNED = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.int64}


def signed(k: Tensor) -> Tensor:
    """The same numbers in a dtype that torch computes with: of uint16, uint32 and uint64 it knows little but the names.

    Raises:
        ValueError: if one is 2^63 or more.

    >>> signed(torch.tensor([65535], dtype=torch.uint16))
    tensor([65535], dtype=torch.int32)
    """
    found = k.to(_SIGNED.get(k.dtype, k.dtype))
    if k.dtype == torch.uint64 and bool((found < 0).any()):
        raise ValueError("numbers are 2^63 or more: expected such as int64 has")
    return found


def to_levels(x: Tensor) -> Tensor:
    """Images in [-1, 1], cut to it, as uint8: to the nearest of 256 levels."""
    return x.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).cpu()


def rounding_std(x: Tensor, levels: int = 256) -> float:
    """The standard deviation of what rounding to levels of [-1, 1] took from x, a uniform number as wide as a bin:
    2 / ((L - 1) sqrt(12)); 0 if x is not rounded.

    >>> round(rounding_std(torch.tensor([-1.0, 1.0])), 4), rounding_std(torch.tensor([0.3]))
    (0.0023, 0.0)
    """
    width = 2 / max(levels - 1, 1)
    k = (x.double() + 1) / width
    return width / math.sqrt(12) if bool(((k - k.round()).abs() < 1e-3).all()) else 0.0


def rounded(x: Tensor) -> Tensor:
    """Images as they are once they have been files: of 256 levels, in [-1, 1]."""
    return scaled(to_levels(x), 256)
