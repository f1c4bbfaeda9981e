"""Measurements y = A(x) + noise: what an inverse problem knows of x.

An operator takes a batch of events, (B, *event), to a batch of measurements, (B, *measurement), in the dtype and on the
device of its argument. A linear one has its adjoint, <A x, y> = <x, A^T y>, and the inverses

    A^+ y                          the pseudo-inverse: least squares, and of these the shortest
    A^T (A A^T + rho I)^-1 y       `ridge`: argmin_x |A x - y|^2 + rho |x|^2, which is A^+ y at rho = 0

in closed form where there is one, else by conjugate gradients. Where every non-zero singular value of A is the same s
(`singular_value`), A A^T is s^2 on the range of A, and both are A^T y / (s^2 + rho).

Complex measurements are real pairs, in a last dimension of size 2.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Literal, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from scoresde.errors import not_finite, some
from scoresde.tensors import dot, expand_like

__all__ = [
    "Blur",
    "Downsample",
    "FourierSampling",
    "Grey",
    "LinearOperator",
    "Mask",
    "Matrix",
    "Operator",
    "PhaseMagnitude",
    "Quantise",
    "box_mask",
    "check_adjoint",
    "check_finite",
    "check_linear",
    "match_measurement",
    "random_mask",
]

_CG_RTOL = 1e-9
"""Conjugate gradients, in float64, end where |A^T (y - A x) - rho x| is this much of |A^T y|."""


class Operator(ABC):
    """A measurement y = A(x), (B, *event) -> (B, *measurement). `A @ B` is A(B(x)).

    >>> operator = Downsample(2) @ Grey()
    >>> operator(torch.zeros(5, 3, 8, 8)).shape
    torch.Size([5, 1, 4, 4])
    """

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """A(x), for x of shape (B, *event).

        Raises:
            ValueError: if the operator does not take events of that shape.
        """

    def observed(self, y: Tensor) -> Tensor:
        """y with zeros where it says nothing of x, whatever is there: noise, or NaN. (B, *measurement) -> the same."""
        return y

    def informative(self, y: Tensor) -> int:
        """How many numbers of one measurement say something, for y of shape (B, *measurement)."""
        return int(self.observed(torch.ones_like(y[:1])).sum())

    def __matmul__(self, other: Operator) -> Operator:
        if not isinstance(other, Operator):
            return NotImplemented
        return _Composition(self, other)


class LinearOperator(Operator):
    """A linear measurement. Subclasses give `__call__` and `adjoint`; those that know more override `ridge`.

    Attributes:
        singular_value: s, where all the non-zero singular values of A are s; None where they differ or are not known.
    """

    singular_value: float | None = None

    @overload
    def __matmul__(self, other: LinearOperator) -> LinearOperator: ...
    @overload
    def __matmul__(self, other: Operator) -> Operator: ...
    def __matmul__(self, other: Operator) -> Operator:
        return _LinearComposition(self, other) if isinstance(other, LinearOperator) else super().__matmul__(other)

    @property
    def closed_form(self) -> bool:
        """Whether `ridge` is in closed form, without conjugate gradients."""
        return self.singular_value is not None or type(self).ridge is not LinearOperator.ridge

    @abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y, (B, *measurement) -> (B, *event)."""

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """A^+ y, (B, *measurement) -> (B, *event).

        Raises:
            ArithmeticError: where there is no closed form and conjugate gradients do not converge.
        """
        return self.ridge(y, 0.0)

    def ridge(self, y: Tensor, rho: float | Tensor) -> Tensor:
        """A^T (A A^T + rho I)^-1 y, (B, *measurement) -> (B, *event); A^+ y at rho = 0.

        Args:
            rho: >= 0, one number or one per sample, in units of the squared singular values of A: sigma_y^2 / r^2 for
                measurement noise of standard deviation sigma_y where x is known to r. At infinity the result is 0.

        Raises:
            ArithmeticError: where there is no closed form and conjugate gradients do not converge.
        """
        if self.singular_value is not None:
            x = self.adjoint(y)
            return x / (self.singular_value**2 + _over(rho, x))
        return _conjugate_gradients(self, y, rho)

    def matrix(self, event_shape: Sequence[int]) -> Tensor:
        """A as a matrix of shape (M, D) in float64, over flattened measurements and events. For small events."""
        D = math.prod(event_shape)
        columns = self(torch.eye(D, dtype=torch.float64, device="cpu").reshape(D, *event_shape))
        return columns.reshape(D, -1).T.contiguous()


class _Composition(Operator):
    def __init__(self, outer: Operator, inner: Operator) -> None:
        self.outer, self.inner = outer, inner

    def __call__(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x))

    def observed(self, y: Tensor) -> Tensor:
        return self.outer.observed(y)

    def __repr__(self) -> str:
        return f"{self.outer!r} @ {self.inner!r}"


class _LinearComposition(LinearOperator):
    def __init__(self, outer: LinearOperator, inner: LinearOperator) -> None:
        self.outer, self.inner = outer, inner

    def __call__(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x))

    def observed(self, y: Tensor) -> Tensor:
        return self.outer.observed(y)

    def adjoint(self, y: Tensor) -> Tensor:
        return self.inner.adjoint(self.outer.adjoint(y))

    def __repr__(self) -> str:
        return f"{self.outer!r} @ {self.inner!r}"


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


class Matrix(LinearOperator):
    """y = A x by a dense matrix, on events flattened.

    Args:
        A: shape (M, D), floating point.
        event_shape: of x, D numbers in all; (D,) by default. Measurements have the shape (M,).
        rtol: singular values below rtol times the largest count as zero in the inverses; by default as in
            `torch.linalg.pinv`, max(M, D) times float64's eps.

    Raises:
        ValueError: if the shapes do not fit, or A is not finite.
    """

    def __init__(self, A: Tensor, event_shape: Sequence[int] | None = None, *, rtol: float | None = None) -> None:
        if not isinstance(A, Tensor) or A.ndim != 2 or not A.is_floating_point() or not bool(A.isfinite().all()):
            raise ValueError(f"A is {_found(A)}: expected a finite floating-point matrix (M, D)")
        self.A = _own(A.detach().double())
        self.event_shape = (A.shape[1],) if event_shape is None else tuple(event_shape)
        if math.prod(self.event_shape) != A.shape[1]:
            raise ValueError(
                f"event_shape={self.event_shape} for a matrix of shape {tuple(A.shape)}: expected D numbers"
            )
        rtol = max(A.shape) * torch.finfo(torch.float64).eps if rtol is None else rtol
        with torch.inference_mode(False):  # autograd may save them
            U, S, Vh = torch.linalg.svd(self.A, full_matrices=False)
            kept = rtol * S[0] < S
            self._U, self._S, self._Vh = U[:, kept], S[kept], Vh[kept]
        if len(self._S) and bool(self._S[0] - self._S[-1] <= 1e-12 * self._S[0]):
            self.singular_value = float(self._S[0])

    def __call__(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != self.event_shape:
            raise ValueError(f"x has shape {tuple(x.shape)}: expected (B, {', '.join(map(str, self.event_shape))})")
        return x.reshape(len(x), -1) @ self.A.to(x).T

    def adjoint(self, y: Tensor) -> Tensor:
        return (y @ self.A.to(y)).reshape(len(y), *self.event_shape)

    def ridge(self, y: Tensor, rho: float | Tensor) -> Tensor:
        U, S, Vh = self._U.to(y), self._S.to(y), self._Vh.to(y)
        return ((y @ U) * (S / (S**2 + _over(rho, y))) @ Vh).reshape(len(y), *self.event_shape)

    def __repr__(self) -> str:
        return f"Matrix({tuple(self.A.shape)}, event_shape={self.event_shape})"


class Grey(LinearOperator):
    """y = sum_c w_c x_c, one channel (B, 1, ...) of images (B, C, ...) of any rank.

    Args:
        weights: w, one number per channel, not all zero; for three channels, their mean, by default. (0.299, 0.587,
            0.114) is video's luma; (1, 1, 1) / sqrt(3) is the first axis of Song et al. (2021)'s colourisation, which
            restores the same as the mean does.

    Raises:
        ValueError: if the weights are no finite numbers, all zero, or not one per channel.
    """

    def __init__(self, weights: Sequence[float] = (1 / 3, 1 / 3, 1 / 3)) -> None:
        self.weights = tuple(float(w) for w in weights)
        self.singular_value = math.hypot(*self.weights)
        if not 0 < self.singular_value < math.inf:
            raise ValueError(f"weights={self.weights}: expected finite numbers, one per channel, not all zero")

    def _columns(self, x: Tensor) -> Tensor:
        weights = torch.tensor(self.weights, dtype=x.dtype, device="cpu").to(x.device, non_blocking=True)
        return weights.reshape(-1, *[1] * (x.ndim - 2))

    def __call__(self, x: Tensor) -> Tensor:
        if x.ndim < 2 or x.shape[1] != len(self.weights):
            raise ValueError(
                f"x has shape {tuple(x.shape)} for {len(self.weights)} weights: expected (B, {len(self.weights)}, ...)"
            )
        return (self._columns(x) * x).sum(1, keepdim=True)

    def adjoint(self, y: Tensor) -> Tensor:
        return self._columns(y) * y

    def __repr__(self) -> str:
        return f"Grey(({', '.join(f'{w:.4g}' for w in self.weights)}))"


class Blur(LinearOperator):
    """y = k * x, the convolution over the trailing dimensions, by FFT: y_i = sum_j k_j x_{i - j}, where the kernel's
    middle (index n // 2) is j = 0.

    Args:
        kernel: k, of any rank d, over the last d dimensions; or a number, the standard deviation in pixels of a
            Gaussian that is cut at 4 of them and sums to one.
        dims: rank of the Gaussian.
        boundary: outside of the image x goes on periodically ("circular", with inverses in closed form), or is "zero"
            (with inverses by conjugate gradients, which do not converge for wide kernels unless the ridge helps).
        rtol: frequencies that A shrinks to less than rtol of its largest gain are lost to A^+; by default the square
            root of the dtype's eps, where rounding errors, divided by the gain, become as large as what is lost. Take
            more for a noisy y, or state the noise.

    Raises:
        ValueError: unless the kernel is finite and not zero, or the number positive.
    """

    def __init__(
        self,
        kernel: Tensor | float,
        *,
        dims: int = 2,
        boundary: Literal["circular", "zero"] = "circular",
        rtol: float | None = None,
    ) -> None:
        self.std = None if isinstance(kernel, Tensor) else float(kernel)
        if self.std is not None:
            kernel = _gaussian(self.std, dims)
        assert isinstance(kernel, Tensor)
        if kernel.ndim == 0 or kernel.is_complex() or not bool(kernel.isfinite().all()) or not bool(kernel.any()):
            raise ValueError(f"kernel is {_found(kernel)}: expected finite numbers, not all zero, in d >= 1 dimensions")
        if boundary not in ("circular", "zero"):
            raise ValueError(f"boundary={boundary!r}: expected 'circular' or 'zero'")
        self.kernel, self.boundary, self.rtol = _own(kernel.detach().double()), boundary, rtol
        self._transfers: dict[tuple[tuple[int, ...], torch.dtype, torch.device], Tensor] = {}

    @property
    def _dims(self) -> tuple[int, ...]:
        return tuple(range(-self.kernel.ndim, 0))

    def _period(self, x: Tensor) -> tuple[int, ...]:
        """Sizes of the transform: where x is zero outside, no end meets the other."""
        if x.ndim <= self.kernel.ndim:
            raise ValueError(
                f"x has shape {tuple(x.shape)}: the kernel has {self.kernel.ndim} dimensions beside the batch"
            )
        sizes = x.shape[-self.kernel.ndim :]
        if self.boundary == "circular":
            return tuple(sizes)
        return tuple(n + k - 1 for n, k in zip(sizes, self.kernel.shape, strict=True))

    def _transfer(self, x: Tensor) -> Tensor:
        """The kernel's transform, complex, for the size of x."""
        period = self._period(x)
        key = (period, x.dtype, x.device)
        if key not in self._transfers:
            with torch.inference_mode(False):  # what is kept outlives the mode, and autograd may save it
                k = self.kernel.to("cpu")
                for dim, n in enumerate(period):  # index j of the kernel goes to j - middle, modulo the period
                    at = (torch.arange(k.shape[dim], device="cpu") - self.kernel.shape[dim] // 2) % n
                    shape = (*k.shape[:dim], n, *k.shape[dim + 1 :])
                    k = k.new_zeros(shape).index_add(dim, at, k)
                wide = torch.complex128 if x.dtype == torch.float64 else torch.complex64
                self._transfers[key] = torch.fft.rfftn(k).to(x.device, wide)
        return self._transfers[key]

    def _filter(self, x: Tensor, response: Callable[[Tensor], Tensor]) -> Tensor:
        """x with its transform multiplied, in the part of the period that x fills."""
        period = self._period(x)
        out = torch.fft.irfftn(
            torch.fft.rfftn(x, s=period, dim=self._dims) * response(self._transfer(x)), s=period, dim=self._dims
        )
        return out[(..., *(slice(n) for n in x.shape[-self.kernel.ndim :]))]

    def __call__(self, x: Tensor) -> Tensor:
        return self._filter(x, lambda k: k)

    @property
    def closed_form(self) -> bool:
        return self.boundary == "circular"

    def adjoint(self, y: Tensor) -> Tensor:
        return self._filter(y, torch.conj)

    def ridge(self, y: Tensor, rho: float | Tensor) -> Tensor:
        if self.boundary == "zero":
            return super().ridge(y, rho)
        rtol = math.sqrt(torch.finfo(y.dtype).eps) if self.rtol is None else self.rtol

        def response(k: Tensor) -> Tensor:
            gain = k.abs()
            squared = gain**2 + _over(rho, y)
            lost = squared <= (rtol * gain.max()) ** 2
            return k.conj() * torch.where(lost, 0.0, 1 / torch.where(lost, 1.0, squared))  # complex / inf is NaN

        return self._filter(y, response)

    def __repr__(self) -> str:
        kernel = f"kernel {tuple(self.kernel.shape)}" if self.std is None else f"{self.std:g}, dims={self.kernel.ndim}"
        return f"Blur({kernel}, boundary={self.boundary!r})"


class Downsample(LinearOperator):
    """Every `factor` pixels of the trailing dimensions become one.

    The weights of a line of y are of one form for all dimensions, so that A is the Kronecker product of a matrix for
    each, and the inverses follow from their singular values.

    Args:
        factor: a whole number >= 1, which divides the sizes of x.
        method: "area", the mean of factor^dims pixels, or "bicubic": Keys' kernel (1981) with a = -1/2 stretched by
            the factor, cut at the border and summing to one (Pillow's, and torch's with antialias=True).
        dims: how many trailing dimensions.

    Raises:
        ValueError: on another method or factor, or by the call, if it does not divide the sizes.

    >>> Downsample(2, dims=1)(torch.tensor([[1.0, 3.0, 5.0, 5.0]]))
    tensor([[2., 5.]])
    """

    def __init__(self, factor: int, method: Literal["area", "bicubic"] = "area", *, dims: int = 2) -> None:
        for name, value in (("factor", factor), ("dims", dims)):
            if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
                raise ValueError(f"{name}={value!r}: expected a whole number >= 1")
        if method not in ("area", "bicubic"):
            raise ValueError(f"method={method!r}: expected 'area' or 'bicubic'")
        self.factor, self.method, self.dims = int(factor), method, int(dims)
        if method == "area":
            self.singular_value = self.factor ** (-self.dims / 2)
        self._kept: dict[tuple[int, torch.dtype, torch.device], _Axis] = {}

    def _axis(self, n: int, like: Tensor) -> _Axis:
        """The matrix of a dimension of size n and its singular values."""
        key = (n, like.dtype, like.device)
        if key not in self._kept:
            with torch.inference_mode(False):  # what is kept outlives the mode, and autograd may save it
                W = _area(n, self.factor) if self.method == "area" else _bicubic(n, self.factor)
                self._kept[key] = _Axis(*(part.to(like) for part in (W, *torch.linalg.svd(W, full_matrices=False))))
        return self._kept[key]

    def __call__(self, x: Tensor) -> Tensor:
        sizes = x.shape[1:][-self.dims :]
        if len(sizes) < self.dims or any(n % self.factor for n in sizes):
            raise ValueError(
                f"x has shape {tuple(x.shape)}: expected {self.dims} trailing dimensions of multiples of {self.factor}"
            )
        for dim in range(-self.dims, 0):
            x = _along(dim, self._axis(x.shape[dim], x).W, x)
        return x

    def adjoint(self, y: Tensor) -> Tensor:
        for dim in range(-self.dims, 0):
            y = _along(dim, self._axis(y.shape[dim] * self.factor, y).W.T, y)
        return y

    def ridge(self, y: Tensor, rho: float | Tensor) -> Tensor:
        if self.singular_value is not None:
            return super().ridge(y, rho)
        axes = [self._axis(n * self.factor, y) for n in y.shape[-self.dims :]]
        S = torch.ones((), dtype=y.dtype, device=y.device)
        for dim, axis in enumerate(axes, start=-self.dims):
            y = _along(dim, axis.U.T, y)
            S = S[..., None] * axis.S
        y = y * (S / (S**2 + _over(rho, y)))
        for dim, axis in enumerate(axes, start=-self.dims):
            y = _along(dim, axis.Vh.T, y)
        return y

    def __repr__(self) -> str:
        return f"Downsample({self.factor}, {self.method!r}, dims={self.dims})"


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
        return self.adjoint(y / (squared[..., None] + _over(rho, y)))

    def __repr__(self) -> str:
        return f"FourierSampling({int(self.mask.sum())} of {self.mask.numel()} known, shape={tuple(self.mask.shape)})"


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
        for name, value in (("dims", dims), ("oversample", oversample)):
            if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
                raise ValueError(f"{name}={value!r}: expected a whole number >= 1")
        self.dims, self.oversample = dims, oversample

    def __call__(self, x: Tensor) -> Tensor:
        if x.ndim <= self.dims:
            raise ValueError(f"x has shape {tuple(x.shape)}: expected {self.dims} dimensions beside the batch")
        sizes = [n * self.oversample for n in x.shape[-self.dims :]]
        return torch.fft.fftn(x, s=sizes, dim=tuple(range(-self.dims, 0)), norm="ortho").abs()

    def __repr__(self) -> str:
        return f"PhaseMagnitude(dims={self.dims}, oversample={self.oversample})"


def check_adjoint(operator: LinearOperator, event: Tensor | Sequence[int], *, rtol: float = 1e-7) -> None:
    """The dot-product test, in float64 on one fixed pair: <A x, y> = <x, A^T y>. Cheap: every method that takes a
    linear operator makes it once.

    Args:
        event: shape of an event, or a batch of them, (B, *event), on the device to be tested on.
        rtol: largest |<A x, y> - <x, A^T y>| allowed, in units of |A x| |y| + |x| |A^T y|.

    Raises:
        TypeError: if the operator is no `LinearOperator`.
        ValueError: with the mismatch, if the test fails, or the adjoint has another shape than x.
    """
    check_linear(operator, check_adjoint.__name__)
    shape, device = (event.shape[1:], event.device) if isinstance(event, Tensor) else (event, torch.device("cpu"))
    rng = np.random.default_rng(0)  # no torch generator: it may be called under vmap

    def probe(shape: Sequence[int]) -> Tensor:
        wide = torch.float32 if device.type == "mps" else torch.float64
        return torch.from_numpy(rng.standard_normal(tuple(shape))).to(device, wide)

    with torch.no_grad():
        x = probe((1, *shape))
        Ax = operator(x)
        y = probe(Ax.shape)
        back = operator.adjoint(y)
        if back.shape != x.shape:
            raise ValueError(f"{operator!r}: the adjoint returns {tuple(back.shape)} for x of shape {tuple(x.shape)}")
        left, right = (Ax * y).sum(), (x * back).sum()
        scale = Ax.norm() * y.norm() + x.norm() * back.norm()
        mismatch = float((left - right).abs() / scale) if float(scale) else 0.0
    if not mismatch <= (rtol if x.dtype == torch.float64 else max(rtol, 1e-4)):
        raise ValueError(
            f"{operator!r} fails the dot-product test: <A x, y> = {float(left):.6g}, <x, A^T y> = {float(right):.6g}, "
            f"{mismatch:.2g} apart relative to the vectors: its adjoint is not that of the operator"
        )


def check_linear(operator: object, method: object) -> None:
    """Raises TypeError unless it is a linear operator, as the method needs."""
    if not isinstance(operator, LinearOperator):
        name = method if isinstance(method, str) else type(method).__name__
        found = repr(operator) if isinstance(operator, Operator) else type(operator).__name__
        raise TypeError(f"{name} needs a LinearOperator, for its adjoint, not {found}: Mask, Blur, Matrix, ...")


def match_measurement(operator: Operator, y: Tensor, x: Tensor) -> Tensor:
    """y in the dtype and on the device of x, (B, *event): checked to be one measurement, or one per sample.

    Raises:
        ValueError: if y has another shape than measurements of x, or neither one entry nor one per sample.
    """
    with torch.no_grad():
        expected = operator(x[:1]).shape[1:]
    if not isinstance(y, Tensor) or not y.is_floating_point() or y.ndim == 0 or y.shape[1:] != expected:
        raise ValueError(
            f"y is {_found(y)}, but {operator!r} of events of shape {tuple(x.shape[1:])} gives (B, "
            f"{', '.join(map(str, expected))}): give y with a batch dimension, of one entry or one per sample"
        )
    if len(y) not in (1, len(x)):
        raise ValueError(f"y has {len(y)} entries for {len(x)} samples: expected 1 or as many")
    return y.to(x)


def check_finite(known: Tensor) -> None:
    """Raises ValueError unless A^+ y, or what is observed of y, is finite: a NaN where a mask is false is no harm."""
    if bad := not_finite(known):
        raise ValueError(f"y is not finite where the operator looks, in entries {some(bad)}")


def _conjugate_gradients(operator: LinearOperator, y: Tensor, rho: float | Tensor) -> Tensor:
    """argmin |A x - y|^2 + rho |x|^2 from x = 0 (CGLS; Hestenes and Stiefel, 1952), each sample with steps of its own.
    At rho = 0 the iterates lie in the range of A^T, so their limit is A^+ y, whether or not y is in the range of A.
    """
    b = y if y.device.type == "mps" else y.double()
    rho = rho if isinstance(rho, Tensor) else torch.tensor(rho, dtype=torch.float64, device="cpu")
    nothing = rho.isinf()  # of y counts there: a system whose solution is 0
    b, rho = expand_like(1.0 - nothing.to(b.dtype), b) * b, torch.where(nothing, 1.0, rho)
    residual = b
    gradient = operator.adjoint(b)
    x, p = torch.zeros_like(gradient), gradient
    rho = expand_like(rho, x)
    gamma = first = dot(gradient, gradient)
    target = _CG_RTOL**2 * first if b.dtype == torch.float64 else 1e-10 * first
    limit = 10 * max(gradient[0].numel(), 10)
    for _ in range(min(limit, 2000)):
        if bool((gamma <= target).all()):
            break
        Ap = operator(p)
        curvature = dot(Ap, Ap) + dot(rho * p, p)
        going = gamma > target  # a sample that has converged stays
        step = torch.where(going, gamma / torch.where(going, curvature, 1.0), 0.0)
        x = x + _over(step, x) * p
        residual = residual - _over(step, residual) * Ap
        gradient = operator.adjoint(residual) - rho * x
        before, gamma = gamma, dot(gradient, gradient)
        p = gradient + _over(torch.where(going, gamma / torch.where(going, before, 1.0), 0.0), p) * p
    else:
        reached = float(torch.where(first == 0, 0.0, gamma / first).detach().max().sqrt())
        raise ArithmeticError(
            f"conjugate gradients for the inverse of {operator!r} reached a relative residual of {reached:.2g}, not "
            f"{_CG_RTOL:g}: A is too ill-conditioned; state the noise of y (noise_std > 0), or give a Matrix with rtol="
        )
    return x.to(y.dtype)


def _over(c: Tensor | float, x: Tensor) -> Tensor | float:
    """A number, or one per sample, to go with x."""
    return expand_like(c, x) if isinstance(c, Tensor) else c


def _boolean(mask: Tensor, name: str) -> Tensor:
    if not isinstance(mask, Tensor) or not bool(((mask == 0) | (mask == 1)).all()) or not bool(mask.any()):
        raise ValueError(f"{name} is {_found(mask)}: expected true or 1 where x is known, false or 0 elsewhere")
    return _own(mask.detach().bool())


def _own(value: Tensor) -> Tensor:
    """A copy that autograd may save, made under inference_mode or not."""
    with torch.inference_mode(False):
        return value.clone()


def _found(value: object) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


class _Axis(NamedTuple):
    W: Tensor
    U: Tensor
    S: Tensor
    Vh: Tensor


def _along(dim: int, W: Tensor, x: Tensor) -> Tensor:
    """W applied to one dimension of x."""
    return (x.movedim(dim, -1) @ W.T).movedim(-1, dim)


def _area(n: int, factor: int) -> Tensor:
    return torch.eye(n // factor, dtype=torch.float64, device="cpu").repeat_interleave(factor, dim=1) / factor


def _bicubic(n: int, factor: int) -> Tensor:
    """Keys' kernel with a = -1/2, at the pixels' distances from the middle of each new one in units of `factor`."""
    middle = (torch.arange(n // factor, dtype=torch.float64, device="cpu") + 0.5) * factor
    d = ((torch.arange(n, dtype=torch.float64, device="cpu") + 0.5 - middle[:, None]) / factor).abs()
    near, far = 1.5 * d**3 - 2.5 * d**2 + 1, -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
    W = torch.where(d <= 1, near, torch.where(d < 2, far, 0.0))
    return W / W.sum(1, keepdim=True)


def _gaussian(std: float, dims: int) -> Tensor:
    if not 0 < std < math.inf or isinstance(dims, bool) or not isinstance(dims, Integral) or dims < 1:
        raise ValueError(
            f"Blur({std}, dims={dims}): expected a standard deviation > 0, in a whole number of dimensions"
        )
    r = math.ceil(4 * std)
    line = (-((torch.arange(-r, r + 1, dtype=torch.float64, device="cpu") / std) ** 2) / 2).exp()
    kernel = torch.ones((), dtype=torch.float64, device="cpu")
    for _ in range(dims):
        kernel = kernel[..., None] * line
    return kernel / kernel.sum()


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
