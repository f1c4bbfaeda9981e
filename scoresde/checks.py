"""Checks of arguments: each raises an ArgumentError, a ValueError that names what was given and what was expected."""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from numbers import Integral, Real
from typing import Any, SupportsFloat, TypeVar

__all__ = [
    "ArgumentError",
    "check_count",
    "check_finite",
    "check_keys",
    "check_nonnegative",
    "check_option",
    "check_order",
    "check_ordered",
    "check_positive",
    "check_range",
    "check_whole",
    "made_of",
    "nearest",
    "one_of",
]


T = TypeVar("T")


class ArgumentError(ValueError):
    """An argument is wrong. The message names it as Python does, with its value or without: `n=0: ...`, `give size=`.
    So a command line, whose flags they were, can name these in their place (`scoresde.cli.common.command_parser`).

    Args:
        message: its arguments are called otherwise on a command line.
        quoted: what follows it: of another's arguments, whose names stay.

    >>> error = ArgumentError("n=0: expected 1 at least; DDIM(n=2) goes without size=")
    >>> str(error)
    'n=0: expected 1 at least; DDIM(n=2) goes without size='
    >>> error.by({"n": "--number", "size": "--size"})
    '--number 0: expected 1 at least; DDIM(n=2) goes without --size'
    """

    def __init__(self, message: str, quoted: str = "") -> None:
        super().__init__(message + quoted)
        self.message, self.quoted = message, quoted

    def by(self, names: Mapping[str, str]) -> str:
        """The message with other names for arguments; what stands in the parentheses of a call is the call's."""
        depth = 0

        def renamed(found: re.Match[str]) -> str:
            nonlocal depth
            if found[0] in "()":
                depth = max(0, depth + (1 if found[0] == "(" else -1)) if depth or found["call"] else 0
                return found[0]
            if depth or found["name"] not in names:
                return found[0]
            name = names[found["name"]]
            return name + ("" if found["alone"] is not None or name.endswith("=") else " ")

        return _NAMED.sub(renamed, self.message) + self.quoted


_NAMED = re.compile(r"(?P<call>(?<=\w)\()|[()]|(?<![\w.])(?P<name>[a-z_]+)=(?P<alone>(?=[\s,;:.]|$))?")


def nearest(value: object, options: Iterable[object]) -> Any:
    """The option that a mistyped text is nearest to, or None.

    >>> nearest("unipc9", ["ddim", "unipc3"]), nearest("toaster", ["ddim", "unipc3"])
    ('unipc3', None)
    """
    texts = {str(option).lower(): option for option in options}
    found = difflib.get_close_matches(str(value).lower(), texts, 1)
    return texts[found[0]] if found else None


def one_of(value: object, options: Collection[object]) -> str:
    """What was expected in a value's place, in words: the nearest of the options first, and all unless they are many.

    >>> one_of("karas", ["uniform", "karras"]), one_of("a", ["uniform", "karras"])
    ("expected 'karras', or one of 'uniform'", "expected one of 'uniform', 'karras'")
    >>> one_of("dppm3", [f"dpm{n}" for n in range(30)])
    "expected 'dpm3', or one of 29 others"
    """
    near = nearest(value, options)
    others = [option for option in options if near is None or option != near]
    names = ", ".join(map(repr, others)) if len(others) < 24 else f"{len(others)}{'' if near is None else ' others'}"
    return f"expected {'' if near is None else f'{near!r}, or '}one of {names}"


def check_option(options: Collection[Any], **values: Any) -> None:
    """Raises ArgumentError unless the named values are among the options."""
    for name, value in values.items():
        if value not in tuple(options):
            raise ArgumentError(f"{name}={value!r}: {one_of(value, options)}")


def check_count(**values: int) -> None:
    """Raises ArgumentError unless the named values are whole numbers >= 1, and such as a computer counts to."""
    _check(Integral, lambda n: n >= 1, "a whole number >= 1", values)
    _check(Integral, lambda n: n < 2**63, "a whole number below 2^63", values)


def check_whole(**values: int) -> None:
    """Raises ArgumentError unless the named values are whole numbers >= 0."""
    _check(Integral, lambda n: n >= 0, "a whole number >= 0", values)


def check_order(highest: int, **values: int) -> None:
    """Raises ArgumentError unless the named values are whole numbers from 1 to highest."""
    _check(Integral, lambda n: 1 <= n <= highest, f"a whole number from 1 to {highest}", values)


def check_finite(**values: float) -> None:
    """Raises ArgumentError unless the named values are finite numbers."""
    _check(Real, math.isfinite, "a finite number", values)


def check_nonnegative(**values: float) -> None:
    """Raises ArgumentError unless the named values are finite numbers >= 0."""
    _check(Real, lambda x: 0 <= x < math.inf, "a finite number >= 0", values)


def check_positive(**values: float) -> None:
    """Raises ArgumentError unless the named numbers, tensors of one among them, are finite and > 0."""
    _check(SupportsFloat, lambda x: 0 < x < math.inf, "a finite number > 0", values)


def check_ordered(**values: float) -> None:
    """Raises ArgumentError unless the named numbers are finite, > 0 and strictly increase."""
    check_positive(**values)
    numbers = list(values.values())
    if any(low >= high for low, high in itertools.pairwise(numbers)):
        given = ", ".join(f"{k}={v}" for k, v in values.items())
        raise ArgumentError(f"{given}: expected {' < '.join(values)}")


def check_range(data_range: tuple[float, float]) -> float:
    """Half the width of (lo, hi); ValueError unless they are two finite numbers and lo < hi."""
    numbers = list(data_range) if isinstance(data_range, tuple | list) else []
    if len(numbers) != 2 or not all(math.isfinite(x) for x in numbers) or not numbers[0] < numbers[1]:
        raise ArgumentError(f"data_range={data_range!r}: expected (lo, hi), two finite numbers, lo < hi")
    return (numbers[1] - numbers[0]) / 2


def check_keys(name: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises ValueError, naming each, if some of the given keys are not known."""
    known = list(known)
    if unknown := [key for key in given if key not in known]:
        near = [repr(found) for key in unknown if (found := nearest(key, known)) is not None]
        hint = f" (nearest: {', '.join(dict.fromkeys(near))})" if near else ""
        raise ValueError(f"{name} has no {', '.join(map(repr, unknown))}: it knows {', '.join(known)}{hint}")


def made_of(name: str, make: Callable[..., T], options: Mapping[str, Any]) -> T:
    """What a constructor makes of options that stand in a file or on a command line; where one is of a kind that Python
    itself refuses, a ValueError that names them.

    >>> made_of("range", lambda stop: range(stop), {"stop": "ten"})
    Traceback (most recent call last):
    ValueError: range with stop='ten': 'str' object cannot be interpreted as an integer
    """
    try:
        return make(**options)
    except TypeError as error:
        given = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise ValueError(f"{name} with {given}: {error}") from error


def _check(kind: type, holds: Callable[[Any], bool], expected: str, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, kind) or not holds(value):
            raise ArgumentError(f"{name}={value!r}: expected {expected}")
