"""Some entries of x, or of its Fourier transform, and nothing of the others."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from scoresde.guidance.operators.base import LinearOperator, described, over, own

__all__ = ["FourierSampling", "Mask", "box_mask", "random_mask"]


class _Masked(LinearOperator):
    """What a mask chooses, the same for all samples or, per_sample, of each its own."""

    def __init__(self, mask: Tensor, *, per_sample: bool | None = None) -> None:
        if per_sample and isinstance(mask, Tensor) and mask.ndim < 2:
            raise ValueError(
                f"mask has shape {tuple(mask.shape)}: one per sample has a batch dimension and the event's"
            )
        if not isinstance(mask, Tensor) or not bool(((mask == 0) | (mask == 1)).all()) or not bool(mask.any()):
            raise ValueError(f"mask is {described(mask)}: expected true or 1 where x is known, false or 0 elsewhere")
        self.mask, self.per_sample = own(mask.detach().bool()), per_sample
        self.samples = len(mask) if per_sample else None

    @property
    def _shape(self) -> torch.Size:
        """Of the mask of one sample."""
        return self.mask.shape[1:] if self.per_sample else self.mask.shape

    def of(self, which: Tensor) -> Self:
        return self if self.samples is None else type(self)(self.mask[which.to(self.mask.device)], per_sample=True)

    def check_batch(self, x: Tensor) -> None:
        super().check_batch(x)
        self._check(x)

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) == 1:  # which the masks of several samples measure, each
            self._check(x)
        else:
            self.check_batch(x)
        return self._measured(x)

    def _check(self, x: Tensor) -> None:
        self._check_fits(x)
        m = self.mask
        alike = self.per_sample is None and m.ndim == x.ndim - 1 >= 2 and len(x) == x.shape[1] == len(m) > 1
        if alike and self._rows_differ:
            raise ValueError(
                f"a mask of shape {tuple(m.shape)} for x of shape {tuple(x.shape)} may be one per sample or one for "
                "all: say which, Mask(mask, per_sample=True) or False"
            )

    @abstractmethod
    def _check_fits(self, x: Tensor) -> None:
        """Raises ValueError unless the events of x have a shape for the mask."""

    @abstractmethod
    def _measured(self, x: Tensor) -> Tensor:
        """A(x), of an x that is checked."""

    @cached_property
    def _rows_differ(self) -> bool:
        return bool((self.mask != self.mask[:1]).any())

    def _spread(self, c: Tensor, x: Tensor) -> Tensor:
        """c, of the shape of the mask and more, on the device of x; one per sample shaped to go with it."""
        c = c.to(x.device)
        return c.reshape(len(c), *[1] * (x.ndim - c.ndim), *c.shape[1:]) if self.per_sample else c

    def __repr__(self) -> str:
        known = f"{int(self.mask.sum())} of {self.mask.numel()} known"
        return f"{type(self).__name__}({known}, shape={tuple(self.mask.shape)})"


class Mask(_Masked):
    """y = m x: inpainting. y has the shape of x and is zero where m is; what a measurement says there is not read.

    Args:
        mask: m, true where x is known: bool, or numbers 0 and 1, of a shape that broadcasts to the event: (H, W) or
            (1, H, W) for images (C, H, W); one per sample has a batch dimension before.
        per_sample: whether it has: (B, H, W) or (B, 1, H, W) then. Without a word it has none; but where the first
            dimension may be the channels and the batch as well, it is to be said.

    Raises:
        ValueError: if mask holds other numbers, or knows nothing; by the call, if it does not broadcast to the events,
            is of another number of samples, or if per_sample is to be said.

    >>> Mask(torch.tensor([True, False]))(torch.tensor([[3.0, 4.0]]))
    tensor([[3., 0.]])
    >>> Mask(torch.tensor([[True, False], [False, True]]), per_sample=True)(torch.tensor([[3.0, 4.0], [5.0, 6.0]]))
    tensor([[3., 0.],
            [0., 6.]])
    """

    singular_value = 1.0

    @classmethod
    def of_batch(cls, mask: Tensor, batch: Tensor) -> Mask:
        """A tensor as the mask of a batch, (B, *event): one per sample if it has as many dimensions."""
        alike = isinstance(mask, Tensor) and isinstance(batch, Tensor) and mask.ndim == batch.ndim > 1
        return cls(mask, per_sample=alike or None)

    def _check_fits(self, x: Tensor) -> None:
        shape, event = self._shape, x.shape[1:]
        try:
            fits = torch.broadcast_shapes(shape, event) == event
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"a mask of shape {tuple(shape)} does not broadcast to events of shape {tuple(event)}"
                + (": one per sample is said by Mask(mask, per_sample=True)" if self.per_sample is None else "")
            )

    def _measured(self, x: Tensor) -> Tensor:
        return torch.where(self._spread(self.mask, x), x, torch.zeros((), dtype=x.dtype, device=x.device))

    def observed(self, y: Tensor) -> Tensor:
        return self(y)

    def adjoint(self, y: Tensor) -> Tensor:
        return self(y)


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
    return Mask(mask, per_sample=False)


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
    return Mask(mask.reshape(tuple(shape)), per_sample=False)


class FourierSampling(_Masked):
    """y = m F x, the orthonormal Fourier transform of real x where m is true, as in magnetic resonance imaging: real
    pairs (B, *event, 2), zero where m is; what a measurement says there is not read. Nor is the imaginary part of a
    frequency that is its own mirror image, which is zero for real x.

    A frequency k that is known without its mirror image -k, its conjugate for real x, has the singular value
    sqrt(1/2), others have 1.

    Args:
        mask: m, bool or 0 and 1, of rank d and the size of the last d dimensions, which are transformed. Frequencies
            are in the order of `torch.fft.fftn`, zero first (`torch.fft.ifftshift` of a mask with zero in the middle).
        per_sample: whether it has a batch dimension before these d; as for `Mask`.

    Raises:
        ValueError: if mask holds other numbers or knows nothing, or by the call, if its size is not that of x, or if
            per_sample is to be said.
    """

    def __init__(self, mask: Tensor, *, per_sample: bool | None = None) -> None:
        super().__init__(mask, per_sample=per_sample)
        dims = self._dims

        def mirrored(k: Tensor) -> Tensor:
            return k.flip(dims).roll([1] * len(dims), dims)

        with torch.inference_mode(False):  # autograd may save them
            k = torch.arange(mask.numel(), device=mask.device).reshape(mask.shape)
            self._read = torch.stack([self.mask, self.mask & (k != mirrored(k))], dim=-1)
            # of the singular values, where m is
            self._squared = (self.mask.double() + mirrored(self.mask).double()) / 2
        if torch.equal(self.mask, mirrored(self.mask)):
            self.singular_value = 1.0

    @property
    def _dims(self) -> tuple[int, ...]:
        return tuple(range(-len(self._shape), 0))

    def _check_fits(self, x: Tensor) -> None:
        size = self._shape
        if x.ndim <= len(size) or x.shape[-len(size) :] != size:
            raise ValueError(f"x has shape {tuple(x.shape)}: expected trailing dimensions {tuple(size)}")

    def _measured(self, x: Tensor) -> Tensor:
        return self.observed(torch.view_as_real(torch.fft.fftn(x, dim=self._dims, norm="ortho")))

    def observed(self, y: Tensor) -> Tensor:
        return torch.where(self._spread(self._read, y), y, torch.zeros((), dtype=y.dtype, device=y.device))

    def adjoint(self, y: Tensor) -> Tensor:
        known = torch.view_as_complex(self.observed(y).contiguous())
        return torch.fft.ifftn(known, dim=self._dims, norm="ortho").real

    def ridge(self, y: Tensor, rho: float | Tensor) -> Tensor:
        if self.singular_value is not None:
            return super().ridge(y, rho)
        squared = torch.where(self.mask, self._squared, 1.0).to(y)[..., None]
        return self.adjoint(y / (self._spread(squared, y) + over(rho, y)))
