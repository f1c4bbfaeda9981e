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

    def __init__(self, mask: Tensor, *, per_sample: bool | None = None) -> None:
        self.mask, self.per_sample = _boolean(mask, "mask", per_sample), per_sample
        self.samples = len(self.mask) if per_sample else None
        self._rows_differ = mask.ndim > 0 and bool((self.mask != self.mask[:1]).any())

    @classmethod
    def of_batch(cls, mask: Tensor, batch: Tensor) -> Mask:
        """A tensor as the mask of a batch, (B, *event): one per sample if it has as many dimensions."""
        alike = isinstance(mask, Tensor) and isinstance(batch, Tensor) and mask.ndim == batch.ndim > 1
        return cls(mask, per_sample=alike or None)

    def of(self, which: Tensor) -> Mask:
        return self if self.samples is None else Mask(self.mask[which.to(self.mask.device)], per_sample=True)

    def check_batch(self, x: Tensor) -> None:
        super().check_batch(x)
        self._check(x)

    def _check(self, x: Tensor) -> None:
        shape, event = self.mask.shape[self.samples is not None :], x.shape[1:]
        try:
            fits = torch.broadcast_shapes(shape, event) == event
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"a mask of shape {tuple(shape)} does not broadcast to events of shape {tuple(event)}"
                + (": one per sample is said by Mask(mask, per_sample=True)" if self.per_sample is None else "")
            )
        if self._rows_differ:
            _check_clear(self.mask, self.per_sample, x)

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) == 1:  # which the masks of several samples measure, each
            self._check(x)
        else:
            self.check_batch(x)
        return torch.where(_spread(self.mask, self.samples, x), x, torch.zeros((), dtype=x.dtype, device=x.device))

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
        per_sample: whether it has a batch dimension before these d; as for `Mask`.

    Raises:
        ValueError: if mask holds other numbers or knows nothing, or by the call, if its size is not that of x, or if
            per_sample is to be said.
    """

    def __init__(self, mask: Tensor, *, per_sample: bool | None = None) -> None:
        self.mask, self.per_sample = _boolean(mask, "mask", per_sample), per_sample
        self.samples, self._rank = len(mask) if per_sample else None, mask.ndim - bool(per_sample)
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
        return tuple(range(-self._rank, 0))

    def of(self, which: Tensor) -> FourierSampling:
        return self if self.samples is None else FourierSampling(self.mask[which.to(self.mask.device)], per_sample=True)

    def check_batch(self, x: Tensor) -> None:
        super().check_batch(x)
        self._check(x)

    def _check(self, x: Tensor) -> None:
        size = tuple(self.mask.shape[self.samples is not None :])
        if x.ndim <= len(size) or tuple(x.shape[-len(size) :]) != size:
            raise ValueError(f"x has shape {tuple(x.shape)}: expected trailing dimensions {size}")
        _check_clear(self.mask, self.per_sample, x)

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) == 1:
            self._check(x)
        else:
            self.check_batch(x)
        return self.observed(torch.view_as_real(torch.fft.fftn(x, dim=self._dims, norm="ortho")))

    def observed(self, y: Tensor) -> Tensor:
        return torch.where(_spread(self._read, self.samples, y), y, torch.zeros((), dtype=y.dtype, device=y.device))

    def adjoint(self, y: Tensor) -> Tensor:
        known = torch.view_as_complex(self.observed(y).contiguous())
        return torch.fft.ifftn(known, dim=self._dims, norm="ortho").real

    def ridge(self, y: Tensor, rho: float | Tensor) -> Tensor:
        if self.singular_value is not None:
            return super().ridge(y, rho)
        squared = torch.where(self.mask, self._squared, 1.0).to(y)[..., None]
        return self.adjoint(y / (_spread(squared, self.samples, y) + over(rho, y)))

    def __repr__(self) -> str:
        return f"FourierSampling({int(self.mask.sum())} of {self.mask.numel()} known, shape={tuple(self.mask.shape)})"


def _spread(mask: Tensor, samples: int | None, x: Tensor) -> Tensor:
    """A mask on the device of x, one per sample shaped to go with it."""
    mask = mask.to(x.device)
    if samples is None:
        return mask
    return mask.reshape(samples, *[1] * (x.ndim - mask.ndim), *mask.shape[1:])


def _check_clear(mask: Tensor, per_sample: bool | None, x: Tensor) -> None:
    """Raises ValueError if the first dimension of a mask may be the event's first and the batch's, and nobody said."""
    if per_sample is None and mask.ndim == x.ndim - 1 >= 2 and len(x) == x.shape[1] == len(mask) > 1:
        raise ValueError(
            f"a mask of shape {tuple(mask.shape)} for x of shape {tuple(x.shape)} may be one per sample or one for "
            "all: say which, Mask(mask, per_sample=True) or False"
        )


def _boolean(mask: Tensor, name: str, per_sample: bool | None = None) -> Tensor:
    if per_sample and isinstance(mask, Tensor) and mask.ndim < 2:
        raise ValueError(f"{name} has shape {tuple(mask.shape)}: one per sample has a batch dimension and the event's")
    if not isinstance(mask, Tensor) or not bool(((mask == 0) | (mask == 1)).all()) or not bool(mask.any()):
        raise ValueError(f"{name} is {described(mask)}: expected true or 1 where x is known, false or 0 elsewhere")
    return own(mask.detach().bool())
