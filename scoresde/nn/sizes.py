"""Half and twice the size, for data of one, two or three axes, (B, C, n_1, ..., n_dims).

    halve        y_i = sum_k f_k x_{2 i + k - p},     p = (len(f) - 1) // 2
    double       y_i = 2 sum_j f_{i + p - 2 j} x_j
    halving conv y_i = sum_k w_k z_{2 i + k - 1},  z_i = sum_k f_k x_{i + k - p},  of three w_k

f is the filter, whose taps sum to 1; beyond its edges x goes on as its last value, or as zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde.checks import check_option
from scoresde.tensors import placed

__all__ = ["Double", "Edge", "Halve", "HalvingConv", "filter_taps"]

Edge = Literal["replicate", "zero"]
"""What x is beyond its edges, where a filter reaches them: its last value, or zero as in NCSN++ and StyleGAN."""


def filter_taps(fir: Sequence[float]) -> tuple[float, ...]:
    """The taps of a filter, divided by their sum.

    Raises:
        ValueError: unless there are two at least, symmetric, their sum is positive, and the even ones have the sum of
            the odd ones: else doubling would not keep a constant.
    """
    taps = tuple(float(f) for f in fir)
    if len(taps) < 2 or taps != taps[::-1] or not sum(taps) > 0 or not math.isclose(sum(taps[::2]), sum(taps[1::2])):
        raise ValueError(
            f"fir={tuple(fir)}: expected a symmetric filter whose even and odd taps have one positive sum, such as "
            "(1, 3, 3, 1)"
        )
    return tuple(f / sum(taps) for f in taps)


class _Resample(nn.Module):
    """Holds the filter, (1, 1, len(f), ...), as a buffer: it moves with the network."""

    kernel: Tensor | None

    def __init__(self, dims: int, fir: Sequence[float] | None, edge: Edge, gain: float = 1.0) -> None:
        super().__init__()
        check_option(("replicate", "zero"), edge=edge)
        self.dims, self.length = dims, 0 if fir is None else len(fir)
        self.mode = "replicate" if edge == "replicate" else "constant"
        kernel = None
        if fir is not None:
            kernel = torch.ones(1, 1, *dims * (1,), device="cpu")
            for axis in range(dims):
                shape = [-1 if d == axis else 1 for d in range(dims)]
                kernel = kernel * (gain * torch.tensor(filter_taps(fir), device="cpu")).reshape(1, 1, *shape)
        self.register_buffer("kernel", None if kernel is None else placed(kernel))

    def filtered(self, x: Tensor, before: int, after: int, stride: int) -> Tensor:
        """x filtered, with so many entries beyond its edges; one more after it where the size is odd."""
        assert self.kernel is not None
        C, pads = x.shape[1], [p for n in reversed(x.shape[2:]) for p in (before, after + n % 2)]
        kernel = self.kernel.expand(C, 1, *self.kernel.shape[2:])
        convolve = (F.conv1d, F.conv2d, F.conv3d)[self.dims - 1]
        return convolve(F.pad(x, pads, mode=self.mode), kernel, stride=stride, groups=C)


class Halve(_Resample):
    """Half the size, rounded up: means over blocks of pixels (at an odd edge, of those there are), or the filter fir,
    of which they are the case (1, 1).
    """

    def __init__(self, dims: int = 2, fir: Sequence[float] | None = None, edge: Edge = "replicate") -> None:
        super().__init__(dims, fir, edge)

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """x (B, C, n, ...) to (B, C, ceil(n / 2), ...); `size` is for the interface of `Double`."""
        if self.kernel is None:
            if self.dims < 3:
                return (F.avg_pool1d, F.avg_pool2d)[self.dims - 1](x, 2, ceil_mode=True)
            # torch 2.13 has no avg_pool3d for an axis of length 1, nor, on the CPU, in half precision.
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            wide = F.pad(wide, [p for n in reversed(x.shape[2:]) for p in (0, n % 2)], mode="replicate")
            return F.avg_pool3d(wide, 2).to(x.dtype)
        before = (self.length - 1) // 2
        return self.filtered(x, before, self.length - 2 - before, stride=2)


class Double(_Resample):
    """Twice the size, or one less, as the skip that it meets: nearest neighbours, or the filter fir, of which they are
    the case (1, 1).
    """

    def __init__(self, dims: int = 2, fir: Sequence[float] | None = None, edge: Edge = "replicate") -> None:
        super().__init__(dims, fir, edge, gain=2.0)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """x (B, C, n, ...) to (B, C, *size)."""
        if self.kernel is None:
            return F.interpolate(x, size=size, mode="nearest")
        C, p = x.shape[1], (self.length - 1) // 2
        before, after = (self.length - 1 - p) // 2, (p + 1) // 2
        kernel = self.kernel.expand(C, 1, *self.kernel.shape[2:])
        convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[self.dims - 1]
        h = convolve(F.pad(x, self.dims * [before, after], mode=self.mode), kernel, stride=2, groups=C)
        for axis, n in enumerate(size, start=2):
            h = h.narrow(axis, 2 * before + p, n)
        return h


class HalvingConv(_Resample):
    """A convolution of three taps an axis that halves what the filter has smoothed, at its full size: half the size,
    rounded up.

    Args:
        inputs, outputs: channels.
        dims, fir, edge: as for `Halve`; without fir means of two, the filter (1, 1).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        dims: int = 2,
        fir: Sequence[float] | None = None,
        edge: Edge = "replicate",
    ) -> None:
        super().__init__(dims, fir or (1, 1), edge)
        self.conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](inputs, outputs, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, inputs, n, ...) to (B, outputs, ceil(n / 2), ...)."""
        before = (self.length - 1) // 2
        h: Tensor = self.conv(self.filtered(x, before + 1, before + 1, stride=1))
        return h
