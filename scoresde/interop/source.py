"""A network of another toolkit by one word, FORMAT:PATH, as the command line has it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from scoresde.checks import ArgumentError, one_of
from scoresde.files import parsed
from scoresde.interop.model import Published

__all__ = ["FORMATS", "from_source", "source_of"]

FORMATS: dict[str, Callable[..., Published]] = {}
"""The function that reads each format, by its name."""

NAMED: tuple[str, ...] = ()  # formats whose files do not say what network they are of


def source_of(text: str | Path) -> tuple[str, Path] | None:
    """(format, path) of FORMAT:PATH; None for anything else, the path of a file say.

    >>> source_of("diffusers:models/ddpm")
    ('diffusers', PosixPath('models/ddpm'))
    """
    name, colon, path = str(text).partition(":")
    return (name, Path(path)) if colon and path and name in FORMATS else None


def from_source(text: str | Path, name: str | None = None, device: torch.device | str | None = None) -> Published:
    """The network of FORMAT:PATH.

    Args:
        text: FORMAT:PATH, of a format in `FORMATS`.
        name: where the file does not say what network it is of, that of a published one; or a file .json of its flags.
        device: where it is to be.

    Raises:
        ValueError: if it is no such text, or the name is missing or not wanted; as the format's function.
        FileNotFoundError, CheckpointError: if a file is not there or cannot be read.
    """
    found = source_of(text)
    if found is None:
        raise ValueError(f"{text}: expected FORMAT:PATH, {one_of(str(text).partition(':')[0], FORMATS)}")
    kind, path = found
    more: dict[str, Any] = {} if device is None else {"device": device}
    if kind not in NAMED:
        if name is not None:
            raise ArgumentError(f"name={name}: {text} says itself what network it is of")
        return FORMATS[kind](path, **more)
    if name is None:
        raise ArgumentError(f"{text} does not say what network it is of: give name=, or a JSON file of its flags")
    flags: Any = name
    if name.endswith(".json"):
        try:
            flags = parsed(json.loads, Path(name).read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{name} is no JSON: {error}") from error
    return FORMATS[kind](path, flags, **more)
