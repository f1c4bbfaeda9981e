"""Codecs with a volume: orthonormal maps, standardising, a shift by what the condition says."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from scoresde.checks import ArgumentError
from scoresde.codecs.base import Codec
from scoresde.tensors import precise

__all__ = ["Orthonormal", "Shift", "Standardise"]


class Orthonormal(Codec):
    """z = Q x on the entries of an item, Q Q^T = I, and x = Q^T z. A density of z is one of x: log |det| = 0.

    Noise is the same in both, so a diffusion of z is one of x, and samples and densities are those of x to rounding.
    With fewer rows than columns Q leads onto a subspace, decode(encode(x)) is the projection on it, and there is no
    volume.

    Args:
        forward: Q, shape (K, D) with K <= D, or a function of x (B, ...) that is such a map: a wavelet or cosine
            transform, `torch.nn.PixelUnshuffle(2)`, ...
        inverse: of a function, its inverse. (That both are orthonormal is not checked.)
        shape: of an item of z, for a matrix; (K,) or, where K = D, that of x by default.
        data_shape: of an item of x, for a matrix; (D,) or, where K = D, that of z by default.

    Raises:
        ValueError: if the rows of a matrix are not orthonormal, shapes do not fit it, or a function has no inverse.

    >>> codec = Orthonormal(torch.tensor([[0.6, 0.8], [-0.8, 0.6]]))
    >>> codec.encode(torch.tensor([[3.0, 4.0]])), codec.decode(torch.tensor([[5.0, 0.0]]))
    (tensor([[5., 0.]]), tensor([[3., 4.]]))
    """

    def __init__(
        self,
        forward: Tensor | Callable[[Tensor], Tensor],
        inverse: Callable[[Tensor], Tensor] | None = None,
        *,
        shape: Sequence[int] | None = None,
        data_shape: Sequence[int] | None = None,
    ) -> None:
        self.forward, self.inverse = forward, inverse
        if not isinstance(forward, Tensor):
            if inverse is None or shape is not None or data_shape is not None:
                raise ArgumentError("Orthonormal(forward, inverse) takes two functions, and shapes are for a matrix")
            return
        kind = f"{forward.dtype} of shape {tuple(forward.shape)}"
        if forward.ndim != 2 or not forward.is_floating_point() or len(forward) > forward.shape[1]:
            raise ArgumentError(f"Orthonormal of {kind}: expected a floating-point matrix (K, D), K <= D")
        if inverse is not None:
            raise ArgumentError("inverse= is for two functions: a matrix has its transpose")
        Q = precise(forward)
        error = float((Q @ Q.T - torch.eye(len(Q)).to(Q)).abs().max())
        if not error < 100 * torch.finfo(forward.dtype).eps * math.sqrt(Q.shape[1]):
            raise ArgumentError(
                f"the rows of Orthonormal's matrix are not orthonormal, Q Q^T - I reaches {error:.2g}: take "
                "torch.linalg.qr(matrix.T).Q.T, in float64"
            )
        square = len(Q) == Q.shape[1]
        self.shape = _of_items(shape, len(Q), square, "shape")
        self.data_shape = _of_items(data_shape, Q.shape[1], square, "data_shape")

    def encode(self, x: Tensor, /, **cond: Any) -> Tensor:
        if not isinstance(self.forward, Tensor):
            return self.forward(x)
        return _through(self.forward.T, x, self.shape or x.shape[1:])

    def decode(self, z: Tensor, /, **cond: Any) -> Tensor:
        if not isinstance(self.forward, Tensor):
            assert self.inverse is not None
            return self.inverse(z)
        return _through(self.forward, z, self.data_shape or z.shape[1:])

    def log_volume(self, x: Tensor, /, **cond: Any) -> Tensor | None:
        kept = self.encode(x[:1]).numel() == x[:1].numel()
        return precise(torch.zeros(len(x), device=x.device)) if kept else None

    def __repr__(self) -> str:
        return f"Orthonormal({tuple(self.forward.shape) if isinstance(self.forward, Tensor) else self.forward!r})"


def _of_items(shape: Sequence[int] | None, entries: int, square: bool, name: str) -> tuple[int, ...] | None:
    """The shape of items with so many entries; None where it is to be that of the input."""
    if shape is None:
        return None if square else (entries,)
    if math.prod(shape) != entries:
        raise ArgumentError(f"{name}={tuple(shape)}: expected a shape of {entries} entries, as the matrix has")
    return tuple(shape)


def _through(matrix: Tensor, x: Tensor, shape: Sequence[int]) -> Tensor:
    """The items of x, flat, times the matrix."""
    flat = x.reshape(len(x), -1)
    if flat.shape[1] != len(matrix):
        raise ValueError(f"items of shape {tuple(x.shape[1:])} have {flat.shape[1]} entries, the codec's {len(matrix)}")
    return (flat.to(matrix) @ matrix).reshape(len(x), *shape).to(x)


class Standardise(Codec):
    """z = (x - mean) / std, log |det| = -sum log std over the entries of an item.

    Args:
        mean, std: numbers, or tensors that broadcast to an item: (C, 1, 1) of an image's channels. std > 0.

    Raises:
        ValueError: unless they are finite and std > 0.

    >>> codec = Standardise(mean=2.0, std=0.5)
    >>> codec.encode(torch.tensor([[3.0, 2.0]])), codec.log_volume(torch.zeros(1, 2)).exp()
    (tensor([[2., 0.]]), tensor([4.], dtype=torch.float64))
    """

    def __init__(self, mean: Tensor | float = 0.0, std: Tensor | float = 1.0) -> None:
        self.mean, self.std = (
            y if isinstance(y, Tensor) else torch.tensor(float(y), dtype=torch.float64, device="cpu")
            for y in (mean, std)
        )
        if not bool(self.mean.isfinite().all() and (self.std.isfinite() & (self.std > 0)).all()):
            raise ArgumentError("Standardise: expected a finite mean and a finite std > 0")

    def encode(self, x: Tensor, /, **cond: Any) -> Tensor:
        mean, std = self._on(x)
        return _as_given((x - mean) / std, x)

    def decode(self, z: Tensor, /, **cond: Any) -> Tensor:
        mean, std = self._on(z)
        return _as_given(mean + std * z, z)

    def log_volume(self, x: Tensor, /, **cond: Any) -> Tensor:
        log_std = precise(self.std.to(x.device)).log().expand(x.shape[1:])
        return (-log_std.sum()).expand(len(x))

    def _on(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # numbers stay on the host: a copy would stall a GPU
        mean, std = (y if y.ndim == 0 else y.to(x.device) for y in (self.mean, self.std))
        return mean, std

    def __repr__(self) -> str:
        return f"Standardise(mean={_brief(self.mean)}, std={_brief(self.std)})"


class Shift(Codec):
    """z = x - mean, where the mean may be what a condition says: of the fine image given the coarse one, say, so that a
    diffusion has but the residual to make (Mardani et al., 2023, "Residual corrective diffusion modeling"). log |det|
    is 0. A network that is not to be told that condition is wrapped, `Latent(Conditioned(denoiser, drop="low"), codec)`
    with `scoresde.guidance.Conditioned`.

    Args:
        mean: a tensor that broadcasts to an item, or a function mean(**cond) of the call's condition that returns one
            for each sample, shape (B, ...) or (1, ...) of x. With `scoresde.Tempered` it is the mean of a prior too.

    Raises:
        ValueError: by the first call, if what a function returns has not as many axes as x: a mean (B,) or (D,) of x
            (B, D) would be taken for the other where B = D.

    >>> codec = Shift(lambda low, **_: low.repeat_interleave(2, dim=1))
    >>> codec.decode(torch.zeros(1, 4), low=torch.tensor([[1.0, 2.0]]))
    tensor([[1., 1., 2., 2.]])
    """

    def __init__(self, mean: Tensor | float | Callable[..., Tensor]) -> None:
        self.mean = mean

    def encode(self, x: Tensor, /, **cond: Any) -> Tensor:
        return _as_given(x - self._mean(x, cond), x)

    def decode(self, z: Tensor, /, **cond: Any) -> Tensor:
        return _as_given(z + self._mean(z, cond), z)

    def log_volume(self, x: Tensor, /, **cond: Any) -> Tensor:
        return precise(torch.zeros(len(x), device=x.device))

    def _mean(self, x: Tensor, cond: dict[str, Any]) -> Tensor:
        if isinstance(self.mean, Tensor) or not callable(self.mean):
            return torch.as_tensor(self.mean, device=x.device)
        mean = self.mean(**cond)
        if isinstance(mean, Tensor) and mean.ndim != x.ndim:
            raise ValueError(
                f"the mean that Shift's function returns has shape {tuple(mean.shape)}, x {tuple(x.shape)}: expected "
                "as many axes, (B, ...) of a sample each or (1, ...) of all"
            )
        return torch.as_tensor(mean, device=x.device)

    def __repr__(self) -> str:
        return f"Shift({_brief(self.mean)})"


def _as_given(y: Tensor, x: Tensor) -> Tensor:
    """y, made of x, in its dtype; an error if it is of another shape."""
    if y.shape != x.shape:
        raise ValueError(f"the codec's numbers make {tuple(y.shape)} of {tuple(x.shape)}: let them broadcast to it")
    return y.to(x.dtype)


def _brief(y: Any) -> str:
    return repr(y) if not isinstance(y, Tensor) else f"{float(y):g}" if y.ndim == 0 else f"{tuple(y.shape)}"
