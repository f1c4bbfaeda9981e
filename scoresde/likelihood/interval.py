"""Intervals from a standard error that is an estimate itself.

With V an estimate of the variance of a value, and W one of the variance of V, V is taken to be spread like chi^2 with

    nu = 2 V^2 / W

degrees of freedom (Satterthwaite, 1946, "An approximate distribution of estimates of variance components"), and

    value -+ t_{(1 + level) / 2}(nu) sqrt(V)

covers the expected value with probability `level`, t(nu) the quantiles of Student's t: 1.96 for 95 % where nu is large,
12.7 where it is one.
"""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

__all__ = ["degrees_of_freedom", "student", "student_interval"]


def degrees_of_freedom(variance: Tensor, doubt: Tensor) -> Tensor:
    """nu of the module's docstring, V = variance and W = doubt of one shape; at least 1, infinity where either is 0,
    and NaN where V is unknown.
    """
    known = (variance == 0) | (doubt == 0)
    return (2 * variance**2 / doubt).clamp(min=1).masked_fill(known, math.inf)


def student(dof: Tensor, level: float = 0.95) -> Tensor:
    """The quantile t_{(1 + level) / 2}, in the shape, dtype and device of dof.

    Raises:
        ValueError: unless level is a number in (0, 1).

    >>> student(torch.tensor([1.0, 10.0, math.inf])).round(decimals=2)
    tensor([12.7100,  2.2300,  1.9600])
    """
    if isinstance(level, bool) or not isinstance(level, Real) or not 0 < level < 1:
        raise ValueError(f"level={level!r}: expected the share that the interval is to cover, in (0, 1), 0.95 say")
    from scipy.special import stdtrit  # which takes a while to import

    finite = dof.detach().cpu().double().clamp(max=1e10)  # where it is the normal distribution's to the last digits
    quantile = stdtrit(finite.numpy(), (1 + float(level)) / 2)
    return torch.as_tensor(quantile, dtype=dof.dtype, device=dof.device)


def student_interval(value: Tensor, stderr: Tensor, dof: Tensor, level: float = 0.95) -> tuple[Tensor, Tensor]:
    """The interval's ends, of the shape of value.

    Raises:
        ValueError: as `student`.
    """
    half = torch.where(stderr == 0, 0.0, student(dof, level) * stderr)
    return value - half, value + half
