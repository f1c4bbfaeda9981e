"""What cameras do to images, linearly: grey, blur, fewer pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from scoresde.checks import check_count, check_option, check_positive
from scoresde.guidance.operators.base import LinearOperator, described, over, own

__all__ = ["Blur", "Downsample", "Grey"]


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

    def as_event(self, y: Tensor) -> Tensor:
        return y.expand(-1, len(self.weights), *y.shape[2:])

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
            raise ValueError(
                f"kernel is {described(kernel)}: expected finite numbers, not all zero, in d >= 1 dimensions"
            )
        if boundary not in ("circular", "zero"):
            raise ValueError(f"boundary={boundary!r}: expected 'circular' or 'zero'")
        self.kernel, self.boundary, self.rtol = own(kernel.detach().double()), boundary, rtol
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
            squared = gain**2 + over(rho, y)
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
        check_count(factor=factor, dims=dims)
        check_option(("area", "bicubic"), method=method)
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

    def as_event(self, y: Tensor) -> Tensor:
        for dim in range(-self.dims, 0):
            y = y.repeat_interleave(self.factor, dim)
        return y

    def ridge(self, y: Tensor, rho: float | Tensor) -> Tensor:
        if self.singular_value is not None:
            return super().ridge(y, rho)
        axes = [self._axis(n * self.factor, y) for n in y.shape[-self.dims :]]
        S = torch.ones((), dtype=y.dtype, device=y.device)
        for dim, axis in enumerate(axes, start=-self.dims):
            y = _along(dim, axis.U.T, y)
            S = S[..., None] * axis.S
        y = y * (S / (S**2 + over(rho, y)))
        for dim, axis in enumerate(axes, start=-self.dims):
            y = _along(dim, axis.Vh.T, y)
        return y

    def __repr__(self) -> str:
        return f"Downsample({self.factor}, {self.method!r}, dims={self.dims})"


def _gaussian(std: float, dims: int) -> Tensor:
    check_positive(std=std)
    check_count(dims=dims)
    r = math.ceil(4 * std)
    line = (-((torch.arange(-r, r + 1, dtype=torch.float64, device="cpu") / std) ** 2) / 2).exp()
    kernel = torch.ones((), dtype=torch.float64, device="cpu")
    for _ in range(dims):
        kernel = kernel[..., None] * line
    return kernel / kernel.sum()


def _area(n: int, factor: int) -> Tensor:
    return torch.eye(n // factor, dtype=torch.float64, device="cpu").repeat_interleave(factor, dim=1) / factor


def _bicubic(n: int, factor: int) -> Tensor:
    """Keys' kernel with a = -1/2, at the pixels' distances from the middle of each new one in units of `factor`."""
    middle = (torch.arange(n // factor, dtype=torch.float64, device="cpu") + 0.5) * factor
    d = ((torch.arange(n, dtype=torch.float64, device="cpu") + 0.5 - middle[:, None]) / factor).abs()
    near, far = 1.5 * d**3 - 2.5 * d**2 + 1, -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
    W = torch.where(d <= 1, near, torch.where(d < 2, far, 0.0))
    return W / W.sum(1, keepdim=True)


class _Axis(NamedTuple):
    W: Tensor
    U: Tensor
    S: Tensor
    Vh: Tensor


def _along(dim: int, W: Tensor, x: Tensor) -> Tensor:
    """W applied to one dimension of x."""
    return (x.movedim(dim, -1) @ W.T).movedim(-1, dim)
