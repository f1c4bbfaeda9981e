"""Distances and kernels of all pairs, a block of rows at a time, so that 10,000 x 10,000 of them fit any memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["blocks", "distances", "squared_distances"]

BLOCK = 2**23
"""Entries of a block: 64 MiB in float64."""

_DIRECT = 16
"""Up to so many dimensions the differences themselves are summed, which costs no more and loses no digit."""


def blocks(x: Tensor, m: int) -> Iterator[tuple[slice, Tensor]]:
    """Rows of x such that a matrix of them by m has at most `BLOCK` entries, and which they are."""
    size = max(1, BLOCK // max(1, m))
    for start in range(0, len(x), size):
        part = slice(start, min(start + size, len(x)))
        yield part, x[part]


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_j|^2, shape (n, m), never below 0; exact to about eps (|x|^2 + |y|^2), so centre the features first."""
    if x.shape[1] <= _DIRECT:
        return distances(x, y).square_()
    squares = torch.addmm(y.square().sum(1), x, y.T, beta=1, alpha=-2)
    return squares.add_(x.square().sum(1, keepdim=True)).clamp_(min=0)


def distances(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_j|, shape (n, m)."""
    if x.shape[1] <= _DIRECT:
        return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    return squared_distances(x, y).sqrt_()
