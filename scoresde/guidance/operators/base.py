"""What every operator is: A(x), of a linear one the adjoint and the inverses; compositions; conjugate gradients."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from scoresde.errors import not_finite, some
from scoresde.noise import derive_seed
from scoresde.tensors import dot, expand_like

__all__ = ["LinearOperator", "Operator", "check_finite", "described", "over", "own"]

_CG_RTOL = 1e-9
"""Conjugate gradients, in float64, end where |A^T (y - A x) - rho x| is this much of |A^T y|."""


class Operator(ABC):
    """A measurement y = A(x), (B, *event) -> (B, *measurement). `A @ B` is A(B(x)).

    >>> from scoresde.guidance.operators import Downsample, Grey
    >>> operator = Downsample(2) @ Grey()
    >>> operator(torch.zeros(5, 3, 8, 8)).shape
    torch.Size([5, 1, 4, 4])

    Attributes:
        samples: how many samples it has a measurement each for; None where that is the same for all, of any batch.
    """

    samples: int | None = None

    def of(self, which: Tensor) -> Operator:
        """The operator of these samples, by their numbers: itself, where it is the same for all."""
        return self

    def check_batch(self, x: Tensor) -> None:
        """Raises ValueError unless it is one for that batch, (B, *event), and all is clear about it."""
        if self.samples not in (None, len(x)):
            raise ValueError(f"{self!r} is of {self.samples} samples, and the batch has {len(x)}: expected as many")

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """A(x), for x of shape (B, *event).

        Raises:
            ValueError: if the operator does not take events of that shape.
        """

    def observed(self, y: Tensor) -> Tensor:
        """y with zeros where it says nothing of x, whatever is there: noise, or NaN. (B, *measurement) -> the same."""
        return y

    def informative(self, y: Tensor) -> Tensor:
        """How many numbers of a measurement say something, for y of shape (B, *measurement): whole numbers of shape
        (1,), or (B,) where samples have one each.
        """
        says = self.observed(torch.ones_like(y[:1] if self.samples is None else y))
        return says.reshape(len(says), -1).sum(1).long()

    def measure(self, x: Tensor, noise_std: float = 0.0, seed: int = 0) -> Tensor:
        """y = A(x) + noise_std z, where z of item i is from its own stream: the same alone as among others."""
        y = self(x)
        if noise_std == 0:
            return y
        streams = (torch.Generator("cpu").manual_seed(derive_seed(seed, i, 1)) for i in range(len(y)))
        return y + noise_std * torch.stack([torch.randn(y.shape[1:], generator=z, device="cpu") for z in streams]).to(y)

    def residual(self, x: Tensor, y: Tensor) -> Tensor:
        """The root mean square of A(x) - y over the numbers of y that say something, shape (B,); 0 where none does."""
        e = self(x) - y
        return e.reshape(len(e), -1).square().sum(1).div(self.informative(y).clamp(min=1)).sqrt()

    def shown(self, y: Tensor, shape: Sequence[int]) -> Tensor:
        """Measurements to look at beside items of that shape: y itself where it has it, else as `as_event` makes it."""
        return y if tuple(y.shape[1:]) == tuple(shape) else self.as_event(y)

    def as_event(self, y: Tensor) -> Tensor:
        """Something like y, of the shape of an event.

        Raises:
            TypeError: if there is nothing of the kind.
        """
        raise TypeError(f"what {self!r} measures is no picture: measurements are {tuple(y.shape[1:])}")

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

    def as_event(self, y: Tensor) -> Tensor:
        """A^T y, or what is nearer to y to the eye."""
        return self.adjoint(y)

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
            return x / (self.singular_value**2 + over(rho, x))
        return _conjugate_gradients(self, y, rho)

    def matrix(self, event_shape: Sequence[int]) -> Tensor:
        """A as a matrix of shape (M, D) in float64, over flattened measurements and events. For small events."""
        D = math.prod(event_shape)
        columns = self(torch.eye(D, dtype=torch.float64, device="cpu").reshape(D, *event_shape))
        return columns.reshape(D, -1).T.contiguous()


class _Composition(Operator):
    def __init__(self, outer: Operator, inner: Operator) -> None:
        self.outer, self.inner = outer, inner
        counts = [part.samples for part in (outer, inner) if part.samples is not None]
        if len(set(counts)) > 1:
            raise ValueError(f"{outer!r} is of {counts[0]} samples, {inner!r} of {counts[1]}: expected as many")
        self.samples = counts[0] if counts else None

    def of(self, which: Tensor) -> Operator:
        return self.outer.of(which) @ self.inner.of(which)

    def check_batch(self, x: Tensor) -> None:
        self.inner.check_batch(x)
        with torch.no_grad():
            inner = self.inner(x[:1])
        self.outer.check_batch(inner.expand(len(x), *inner.shape[1:]))

    def __call__(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x))

    def observed(self, y: Tensor) -> Tensor:
        return self.outer.observed(y)

    def __repr__(self) -> str:
        return f"{self.outer!r} @ {self.inner!r}"


class _LinearComposition(_Composition, LinearOperator):
    outer: LinearOperator
    inner: LinearOperator

    def adjoint(self, y: Tensor) -> Tensor:
        return self.inner.adjoint(self.outer.adjoint(y))


def _conjugate_gradients(operator: LinearOperator, y: Tensor, rho: float | Tensor) -> Tensor:
    """argmin |A x - y|^2 + rho |x|^2 from x = 0 (CGLS; Hestenes and Stiefel, 1952), each sample with steps of its own.
    At rho = 0 the iterates lie in the range of A^T, so their limit is A^+ y, whether or not y is in the range of A.
    """
    b = y if y.device.type == "mps" else y.double()
    check_finite(operator.observed(b))
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
        x = x + over(step, x) * p
        residual = residual - over(step, residual) * Ap
        gradient = operator.adjoint(residual) - rho * x
        before, gamma = gamma, dot(gradient, gradient)
        p = gradient + over(torch.where(going, gamma / torch.where(going, before, 1.0), 0.0), p) * p
    else:
        reached = float(torch.where(first == 0, 0.0, gamma / first).detach().max().sqrt())
        raise ArithmeticError(
            f"conjugate gradients for the inverse of {operator!r} reached a relative residual of {reached:.2g}, not "
            f"{_CG_RTOL:g}: A is too ill-conditioned; state the noise of y (noise_std > 0), or give a Matrix with rtol="
        )
    return x.to(y.dtype)


def check_finite(known: Tensor) -> None:
    """Raises ValueError unless A^+ y, or what is observed of y, is finite: a NaN where a mask is false is no harm."""
    if bad := not_finite(known):
        raise ValueError(f"y is not finite where the operator looks, in entries {some(bad)}")


def over(c: Tensor | float, x: Tensor) -> Tensor | float:
    """A number, or one per sample, to go with x."""
    return expand_like(c, x) if isinstance(c, Tensor) else c


def own(value: Tensor) -> Tensor:
    """A copy that autograd may save, made under inference_mode or not."""
    with torch.inference_mode(False):
        return value.clone()


def described(value: object) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
