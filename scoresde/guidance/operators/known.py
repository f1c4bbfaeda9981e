"""Some entries of x, or of its Fourier transform, and nothing of the others."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from scoresde.guidance.operators.base import LinearOperator, described, over, own

__all__ = ["FourierSampling", "Mask", "box_mask", "random_mask"]


class Mask(LinearOperator):
    """y = m x: inpainting. y has the shape of x and is zero where m is; what a measurement says there is not read.

    Args:
        mask: m, true where x is known: bool, or numbers 0 and 1, of a shape that broadcasts to the event, so without a
            batch dimension: (H, W) or (1, H, W) for images (C, H, W).

    Raises:
        ValueError: if mask holds other numbers, or knows nothing.

    >>> Mask(torch.tensor([True, False]))(torch.tensor([[3.0, 4.0]]))
    tensor([[3., 0.]])
    """

    singular_value = 1.0

    def __init__(self, mask: Tensor) -> None:
        self.mask = _boolean(mask, "mask")

    def __call__(self, x: Tensor) -> Tensor:
        mask = self.mask.to(x.device)
        try:
            fits = torch.broadcast_shapes(mask.shape, x.shape[1:]) == x.shape[1:]
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"a mask of shape {tuple(mask.shape)} does not broadcast to events of shape {tuple(x.shape[1:])}"
            )
        return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))

    def observed(self, y: Tensor) -> Tensor:
        return self(y)

    def adjoint(self, y: Tensor) -> Tensor:
        return self(y)

    def __repr__(self) -> str:
        return f"Mask({int(self.mask.sum())} of {self.mask.numel()} known, shape={tuple(self.mask.shape)})"


def box_mask(shape: Sequence[int], low: Sequence[int], high: Sequence[int]) -> Mask:
    """The mask of a hole: everything is known but the box low <= index < high.

    Args:
        shape: of the mask, of any rank: (H, W) for all channels of images (C, H, W).
        low, high: the box's corners, one number for each dimension.

    Raises:
        ValueError: unless 0 <= low < high <= shape in every dimension, or if the box is all there is.

    >>> box_mask((4,), (1,), (3,)).mask.tolist()
    [True, False, False, True]
    """
    if not len(shape) == len(low) == len(high) or not all(
        0 <= a < b <= n for n, a, b in zip(shape, low, high, strict=True)
    ):
        raise ValueError(f"box from {tuple(low)} to {tuple(high)}: expected 0 <= low < high <= {tuple(shape)} each")
    mask = torch.ones(tuple(shape), dtype=torch.bool, device="cpu")
    mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = False
    return Mask(mask)


def random_mask(shape: Sequence[int], keep: float, seed: int) -> Mask:
    """The mask that knows a random set of entries: round(keep x their number) of them, at least one.

    Args:
        shape: of the mask, of any rank: (H, W) for all channels of images (C, H, W).
        keep: the share that is known, in (0, 1].
        seed: of the choice; the global generator is not touched.

    Raises:
        ValueError: unless 0 < keep <= 1.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep={keep}: expected a share in (0, 1]")
    n = math.prod(shape)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(n, dtype=torch.bool, device="cpu")
    mask[order[: max(1, round(keep * n))]] = True
    return Mask(mask.reshape(tuple(shape)))


class FourierSampling(LinearOperator):
    """y = m F x, the orthonormal Fourier transform of real x where m is true, as in magnetic resonance imaging: real
    pairs (B, *event, 2), zero where m is; what a measurement says there is not read. Nor is the imaginary part of a
    frequency that is its own mirror image, which is zero for real x.

    A frequency k that is known without its mirror image -k, its conjugate for real x, has the singular value
    sqrt(1/2), others have 1.

    Args:
        mask: m, bool or 0 and 1, of rank d and the size of the last d dimensions, which are transformed. Frequencies
            are in the order of `torch.fft.fftn`, zero first (`torch.fft.ifftshift` of a mask with zero in the middle).

    Raises:
        ValueError: if mask holds other numbers or knows nothing, or by the call, if its size is not that of x.
    """

    def __init__(self, mask: Tensor) -> None:
        self.mask = _boolean(mask, "mask")
        dims = tuple(range(mask.ndim))

        def mirrored(k: Tensor) -> Tensor:
            return k.flip(dims).roll([1] * mask.ndim, dims)

        with torch.inference_mode(False):  # autograd may save them
            k = torch.arange(mask.numel(), device=mask.device).reshape(mask.shape)
            self._read = torch.stack([self.mask, self.mask & (k != mirrored(k))], dim=-1)
            # of the singular values, where m is
            self._squared = (self.mask.double() + mirrored(self.mask).double()) / 2
        if torch.equal(self.mask, mirrored(self.mask)):
            self.singular_value = 1.0

    @property
    def _dims(self) -> tuple[int, ...]:
        return tuple(range(-self.mask.ndim, 0))

    def __call__(self, x: Tensor) -> Tensor:
        if x.ndim <= self.mask.ndim or x.shape[-self.mask.ndim :] != self.mask.shape:
            raise ValueError(f"x has shape {tuple(x.shape)}: expected trailing dimensions {tuple(self.mask.shape)}")
        return self.observed(torch.view_as_real(torch.fft.fftn(x, dim=self._dims, norm="ortho")))

    def observed(self, y: Tensor) -> Tensor:
        return torch.where(self._read.to(y.device), y, torch.zeros((), dtype=y.dtype, device=y.device))

    def adjoint(self, y: Tensor) -> Tensor:
        known = torch.view_as_complex(self.observed(y).contiguous())
        return torch.fft.ifftn(known, dim=self._dims, norm="ortho").real

    def ridge(self, y: Tensor, rho: float | Tensor) -> Tensor:
        if self.singular_value is not None:
            return super().ridge(y, rho)
        squared = torch.where(self.mask, self._squared, 1.0).to(y)
        return self.adjoint(y / (squared[..., None] + over(rho, y)))

    def __repr__(self) -> str:
        return f"FourierSampling({int(self.mask.sum())} of {self.mask.numel()} known, shape={tuple(self.mask.shape)})"


def _boolean(mask: Tensor, name: str) -> Tensor:
    if not isinstance(mask, Tensor) or not bool(((mask == 0) | (mask == 1)).all()) or not bool(mask.any()):
        raise ValueError(f"{name} is {described(mask)}: expected true or 1 where x is known, false or 0 elsewhere")
    return own(mask.detach().bool())
