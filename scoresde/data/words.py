"""Conditions by name, for the command line."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from scoresde.checks import ArgumentError, check_option, one_of
from scoresde.data.augmented import AugmentedSuperResolution
from scoresde.data.conditions import Condition, Given
from scoresde.data.folder import ImageFolder
from scoresde.data.raw import Itself
from scoresde.data.sources import find_data
from scoresde.data.tasks import (
    Colourisation,
    Fill,
    Inpainting,
    JPEGRestoration,
    OneOf,
    SuperResolution,
    Uncropping,
)

__all__ = ["TASKS", "condition_of"]


def _fill(argument: str) -> Fill:
    check_option(("", "zeros", "noise"), fill=argument)
    return "noise" if argument == "noise" else "zeros"


def _super_resolution(argument: str) -> Condition:
    if not argument.isdecimal():
        raise ValueError("expected a factor, super-resolution:4 say")
    return SuperResolution(int(argument))


def _colourisation(argument: str) -> Condition:
    if argument:
        raise ValueError("it takes no argument")
    return Colourisation()


def _jpeg_restoration(argument: str) -> Condition:
    lowest, _, highest = argument.partition("-")
    if not lowest.isdecimal() or not (highest or lowest).isdecimal():
        raise ValueError("expected a quality or a range of them, jpeg:5-30 say")
    return JPEGRestoration(int(lowest), int(highest or lowest))


def _augmented(argument: str) -> Condition:
    factor, _, noise = argument.partition(":")
    if not factor.isdecimal():
        raise ValueError("expected a factor and the largest share of noise, augmented-super-resolution:2:0.5 say")
    return AugmentedSuperResolution(int(factor), noise=(0.0, float(noise or 0.5)))


TASKS: dict[str, Callable[[str], Condition]] = {
    "super-resolution": lambda argument: _super_resolution(argument or "4"),
    "augmented-super-resolution": lambda argument: _augmented(argument or "2"),
    "inpainting": lambda argument: Inpainting(fill=_fill(argument)),
    "uncropping": lambda argument: Uncropping(fill=_fill(argument)),
    "colourisation": _colourisation,
    "itself": lambda argument: Itself(argument or "source"),
    "jpeg": lambda argument: _jpeg_restoration(argument or "5-30"),
}
"""The conditions that `condition_of` knows by name, each a function of what stands after the colon."""


def condition_of(
    text: str,
    *,
    size: int | tuple[int, int] | None = None,
    background: str | None = None,
    skip: bool | Collection[str] = False,
    lazy: bool = True,
) -> Condition:
    """A condition by name.

    Args:
        text: super-resolution:4, augmented-super-resolution:2:0.5 (up to what share of noise), inpainting or
            inpainting:noise, uncropping likewise, colourisation, jpeg:5-30; several of them with + between, for one of
            them each (`OneOf`); itself, of which an encoder makes a condition; or given:PATH, a file .npy, .npz or
            .safetensors, or a folder of images.
        size, background, skip: of such a folder's images; see `ImageFolder`.
        lazy: they are decoded when they are wanted; False: once, into memory.

    Raises:
        ValueError: if there is none of that name, or its argument is none.
        FileNotFoundError: if there is no such file or folder.

    >>> condition_of("super-resolution:2"), condition_of("jpeg:10")
    (SuperResolution(factor=2), JPEGRestoration(lowest=10, highest=10))
    >>> condition_of("super-resolution:2+colourisation")
    OneOf(tasks=(SuperResolution(factor=2), Colourisation()))
    """
    name, _, argument = text.partition(":")
    if name != "given" and "+" in text:
        return OneOf(tuple(condition_of(part) for part in text.split("+")))
    if name == "given" and argument:
        alike: dict[str, Any] = {"size": size, "background": background, "skip": skip}
        found = find_data(argument, **alike if Path(argument).is_dir() else {})
        if isinstance(found, ImageFolder):
            return Given(found if lazy else found.batch(range(len(found))), 256)
        return Given(found.x, found.levels or (256 if found.x.dtype == torch.uint8 else None))
    if name not in TASKS:
        raise ArgumentError(f"condition={text!r}: {one_of(name, TASKS)}, or given:PATH")
    try:
        return TASKS[name](argument)
    except ValueError as error:
        raise ArgumentError(f"condition={text!r}: ", str(error)) from error
