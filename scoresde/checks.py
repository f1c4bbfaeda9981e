"""Checks of arguments: each raises a ValueError that names what was given and what was expected."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable
from numbers import Integral, Real
from typing import Any

__all__ = [
    "check_count",
    "check_keys",
    "check_nonnegative",
    "check_option",
    "check_order",
    "check_ordered",
    "check_positive",
    "check_range",
    "check_tolerances",
    "check_whole",
]


def check_option(options: Collection[Any], **values: Any) -> None:
    """Raises ValueError unless the named values are among the options."""
    for name, value in values.items():
        if value not in tuple(options):
            raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, options))}")


def check_count(**values: int) -> None:
    """Raises ValueError unless the named values are whole numbers >= 1."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name}={value!r}: expected a whole number >= 1")


def check_whole(**values: int) -> None:
    """Raises ValueError unless the named values are whole numbers >= 0."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 0:
            raise ValueError(f"{name}={value!r}: expected a whole number >= 0")


def check_order(highest: int, **values: int) -> None:
    """Raises ValueError unless the named values are whole numbers from 1 to highest."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or not 1 <= value <= highest:
            raise ValueError(f"{name}={value!r}: expected a whole number from 1 to {highest}")


def check_nonnegative(**values: float) -> None:
    """Raises ValueError unless the named values are finite numbers >= 0."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < math.inf:
            raise ValueError(f"{name}={value!r}: expected a finite number >= 0")


def check_tolerances(**values: float) -> None:
    """Raises ValueError unless the named values are finite and > 0."""
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value}: expected a finite number > 0")


def check_positive(**values: float) -> None:
    """Raises ValueError unless the named numbers are finite and > 0."""
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value}: expected a finite number > 0")


def check_ordered(**values: float) -> None:
    """Raises ValueError unless the named numbers are finite, > 0 and strictly increase."""
    check_positive(**values)
    numbers = list(values.values())
    if any(low >= high for low, high in itertools.pairwise(numbers)):
        raise ValueError(", ".join(f"{k}={v}" for k, v in values.items()) + f": expected {' < '.join(values)}")


def check_range(data_range: tuple[float, float]) -> float:
    """Half the width of (lo, hi); ValueError unless they are two finite numbers and lo < hi."""
    numbers = list(data_range) if isinstance(data_range, tuple | list) else []
    if len(numbers) != 2 or not all(math.isfinite(x) for x in numbers) or not numbers[0] < numbers[1]:
        raise ValueError(f"data_range={data_range!r}: expected (lo, hi), two finite numbers, lo < hi")
    return (numbers[1] - numbers[0]) / 2


def check_keys(name: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises ValueError, naming each, if some of the given keys are not known."""
    known = list(known)
    if unknown := [key for key in given if key not in known]:
        raise ValueError(f"{name} has no {', '.join(map(repr, unknown))}: it knows {', '.join(known)}")
