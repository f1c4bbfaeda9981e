"""Measurements that are not linear: JPEG-like quantisation, the magnitude of a Fourier transform."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scoresde.checks import check_count
from scoresde.guidance.operators.base import Operator

__all__ = ["PhaseMagnitude", "Quantise"]


class Quantise(Operator):
    """What JPEG keeps of an image: the orthonormal cosine transform of each block of 8 x 8 pixels, rounded to multiples
    of Q, and back. Not linear; its gradient is taken to be that of the identity ("straight-through"), as rounding's own
    is zero. Measuring what was measured changes nothing.

    Q is the standard's luminance table (ITU-T T.81, table K.1) for every channel, scaled by the quality as by the
    Independent JPEG Group. Neither colour transform nor clipping. At the border of sizes that 8 does not divide, the
    blocks are smaller, with the table's entries at the same share of the highest frequency.

    Args:
        quality: 1 to 100.
        span: black to white, 255 of the table's units: 2 for data in [-1, 1].

    Raises:
        ValueError: if quality or span is out of range.
    """

    def __init__(self, quality: float = 50, *, span: float = 2.0) -> None:
        if not 1 <= quality <= 100 or not 0 < span < math.inf:
            raise ValueError(f"quality={quality}, span={span}: expected a quality from 1 to 100, and a span > 0")
        self.quality, self.span = quality, span

    def __call__(self, x: Tensor) -> Tensor:
        if x.ndim < 3:
            raise ValueError(f"x has shape {tuple(x.shape)}: expected (B, ..., H, W)")
        (rows, v), (columns, u) = (_cosine_blocks(n) for n in x.shape[-2:])
        table = torch.tensor(_LUMINANCE, dtype=torch.float64, device="cpu")
        scale = 5000 / self.quality if self.quality < 50 else 200 - 2 * self.quality
        Q = ((table * scale + 50) / 100).floor().clamp(1, 255)[v][:, u] * (self.span / 255)
        rows, columns, Q = (part.to(x) for part in (rows, columns, Q))
        c = (rows @ x @ columns.T) / Q
        c = c + (c.round() - c).detach()  # which is c.round(), to the last digit
        return rows.T @ (c * Q) @ columns

    def __repr__(self) -> str:
        return f"Quantise(quality={self.quality:g}, span={self.span:g})"


class PhaseMagnitude(Operator):
    """y = |F x|, the orthonormal Fourier transform without its phase, of x with zeros around it: phase retrieval. Not
    linear; x, its mirror image and (without zeros around) its shifts measure the same.

    Args:
        dims: how many trailing dimensions are transformed.
        oversample: the transform is `oversample` times as long as x in each of them.

    Raises:
        ValueError: unless both are whole numbers >= 1.
    """

    def __init__(self, dims: int = 2, *, oversample: int = 2) -> None:
        check_count(dims=dims, oversample=oversample)
        self.dims, self.oversample = dims, oversample

    def __call__(self, x: Tensor) -> Tensor:
        if x.ndim <= self.dims:
            raise ValueError(f"x has shape {tuple(x.shape)}: expected {self.dims} dimensions beside the batch")
        sizes = [n * self.oversample for n in x.shape[-self.dims :]]
        return torch.fft.fftn(x, s=sizes, dim=tuple(range(-self.dims, 0)), norm="ortho").abs()

    def __repr__(self) -> str:
        return f"PhaseMagnitude(dims={self.dims}, oversample={self.oversample})"


def _cosine_blocks(n: int) -> tuple[Tensor, Tensor]:
    """The orthonormal cosine transform of blocks of 8, (n, n), the last block being what is left; and each line's row
    in the table of 8 frequencies.
    """
    blocks = [8] * (n // 8) + [n % 8] * (n % 8 > 0)
    transforms, rows = [], []
    for size in blocks:
        j = torch.arange(size, dtype=torch.float64, device="cpu")
        C = (math.pi / size * (j + 0.5) * j[:, None]).cos() * math.sqrt(2 / size)
        C[0] /= math.sqrt(2)
        transforms.append(C)
        rows.append(torch.arange(size, device="cpu") * 8 // size)
    return torch.block_diag(*transforms), torch.cat(rows)


_LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
"""ITU-T T.81, table K.1: down, vertical frequency; across, horizontal."""
