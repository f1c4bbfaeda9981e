"""Any linear operator, as a dense matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from scoresde.guidance.operators.base import LinearOperator, described, over, own

__all__ = ["Matrix"]


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
            raise ValueError(f"A is {described(A)}: expected a finite floating-point matrix (M, D)")
        self.A = own(A.detach().double())
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
        return ((y @ U) * (S / (S**2 + over(rho, y))) @ Vh).reshape(len(y), *self.event_shape)

    def __repr__(self) -> str:
        return f"Matrix({tuple(self.A.shape)}, event_shape={self.event_shape})"
