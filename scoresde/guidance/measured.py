"""What the guidances by a measurement y = A(x_0) + noise_std eta, eta ~ N(0, I), share (`scoresde.guidance.DPS`, ...):
y, checked and of the device and dtype of the state, the variance of its noise, and its likelihood,

    log p(y | x_0) = -|y - A(x_0)|^2 / (2 noise_std^2) - (m / 2) log(2 pi noise_std^2)
"""

from __future__ import annotations

import math
from typing import cast

from torch import Tensor

from scoresde.checks import ArgumentError
from scoresde.denoiser import Denoiser
from scoresde.entries import check_entries
from scoresde.guidance.base import Scale
from scoresde.guidance.gradients import Forward, usable
from scoresde.guidance.operators import LinearOperator, Operator
from scoresde.guidance.operators.checks import check_adjoint, check_finite, match_measurement
from scoresde.guidance.particles import Twisted
from scoresde.tensors import dot, known_any, precise

__all__ = ["Measured"]


class Measured(Twisted):
    """A guidance by a measurement, and its likelihood. Arguments and errors: `scoresde.guidance.DPS`."""

    def __init__(
        self,
        denoiser: Denoiser,
        operator: Forward,
        y: Tensor,
        noise_std: Tensor | float | None,
        scale: Scale,
    ) -> None:
        super().__init__(denoiser, scale)
        if not callable(operator):
            raise TypeError(f"operator is {type(operator).__name__}: expected an Operator, or a function of x")
        if noise_std is not None:
            std = precise(noise_std)
            if std.ndim > 1 or known_any(~(std.isfinite() & (std >= 0))):
                raise ArgumentError(f"noise_std={noise_std}: expected finite numbers >= 0, one or one per sample")
        self.operator, self.y, self.noise_std = operator, y, noise_std
        self._tested = set[tuple[int, ...]]()

    def __repr__(self) -> str:
        operator = repr(self.operator) if isinstance(self.operator, LinearOperator) else _name(self.operator)
        std = f"tensor of {self.noise_std.numel()}" if isinstance(self.noise_std, Tensor) else self.noise_std
        return f"{type(self).__name__}({self.denoiser!r}, {operator}, noise_std={std})"

    def variance(self, batch: int) -> Tensor:
        """noise_std^2, float64, of shape () or (B,)."""
        if self.noise_std is None:
            raise ArgumentError(
                f"{type(self).__name__} without noise_std= has no log p(y | x): give the noise of the measurement"
            )
        std = precise(self.noise_std)
        check_entries("noise_std", std, batch)
        return std**2

    def measurement(self, x: Tensor) -> Tensor:
        """y for events of the shape of x, checked before the network is called: (1, *measurement) or (B, ...)."""
        first = tuple(x.shape[1:]) not in self._tested
        if first and isinstance(self.operator, LinearOperator):
            check_adjoint(self.operator, x.shape[1:])
        y = match_measurement(self.operator, self.y, x)  # type: ignore[arg-type]
        if isinstance(self.operator, Operator):
            y = self.operator.observed(y)
        if first:  # and not again: it is a look at the device
            check_finite(y)
            self._tested.add(tuple(x.shape[1:]))
        return cast(Tensor, usable(y))

    def _known(self, y: Tensor) -> Tensor | int:
        """Numbers in a measurement that say something."""
        return self.operator.informative(y) if isinstance(self.operator, Operator) else y[0].numel()

    def log_likelihood(self, x0: Tensor) -> Tensor:
        y, n = self.measurement(x0), self.variance(len(x0)).to(x0.device)
        e = (y - self.operator(x0)).double()
        squares = dot(e, e)
        return -squares / (2 * n) - self._known(y) / 2 * (2 * math.pi * n).log()

    def check_groups(self, x: Tensor, particles: int) -> None:
        n, y = self.variance(len(x)), self.measurement(x)
        if known_any(n == 0):
            raise ValueError("noise_std is 0, so p(y | x) is no density to weigh particles by: give a number > 0")
        values = [("y", y), ("noise_std", n)]
        if isinstance(self.operator, Operator) and self.operator.samples is not None:
            values.append(("mask", self.operator(x[:1].expand_as(x))))
        for name, value in values:
            if value.ndim and len(value) == len(x) > 1:
                group = value.reshape(-1, particles, *value.shape[1:])
                if known_any(group != group[:, :1]):
                    raise ValueError(
                        f"{name} differs within a group of {particles} particles: give the measurement of each group "
                        f"as often, {name}.repeat_interleave({particles}, dim=0)"
                    )


def _name(function: object) -> str:
    return getattr(function, "__name__", type(function).__name__)
