"""A network of another toolkit by one word, FORMAT:PATH, as the command line has it."""

from __future__ import annotations

import json
from collections.abc import Callable
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import torch

from scoresde.checks import ArgumentError
from scoresde.errors import CheckpointError
from scoresde.files import parsed
from scoresde.interop.diffusers import from_diffusers
from scoresde.interop.edm import from_edm
from scoresde.interop.formats import recognise
from scoresde.interop.guided_diffusion import from_consistency_edm, from_guided_diffusion
from scoresde.interop.model import Published
from scoresde.interop.score_sde import from_score_sde

__all__ = ["READERS", "from_source", "source_of"]

READERS: dict[str, Callable[..., Published]] = {
    "diffusers": from_diffusers,
    "guided_diffusion": from_guided_diffusion,
    "consistency_edm": from_consistency_edm,
    "edm": from_edm,
    "score_sde": from_score_sde,
}
"""The function that reads each format, by its name."""


def source_of(text: str | Path) -> tuple[str, Path] | None:
    """(format, path) of FORMAT:PATH, or of a path alone where its names tell the format; None for anything else.

    >>> source_of("edm:models/net.pkl")
    ('edm', PosixPath('models/net.pkl'))
    """
    name, colon, path = str(text).partition(":")
    if colon and path and name in READERS:
        return name, Path(path)
    found = recognise(text) if Path(text).exists() else None
    return (found.name, Path(text)) if found is not None and found.name in READERS else None


def from_source(text: str | Path, name: str | None = None, device: torch.device | str | None = None) -> Published:
    """The network of FORMAT:PATH.

    Args:
        text: FORMAT:PATH, of a format in `READERS`.
        name: where the file does not say what network it is of, that of a published one; or a file .json of its flags.
        device: where it is to be.

    Raises:
        ValueError: if it is no such text, or the name is missing or not wanted; as the format's function.
        FileNotFoundError, CheckpointError: if a file is not there or cannot be read.
    """
    found = source_of(text)
    if found is None:
        known = recognise(text) if Path(text).exists() else None
        if known is not None:
            raise CheckpointError(f"{text} is {known.what}: {known.read}")
        why = "is of no format that is known by its names" if Path(text).exists() else "is no file or folder"
        formats = ", ".join(READERS)
        raise ValueError(f"{text} {why}, nor FORMAT:PATH, with FORMAT one of {formats}")
    kind, path = found
    more: dict[str, Any] = {} if device is None else {"device": device}
    described = [p for p in signature(READERS[kind]).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
    if name is None:
        if described and described[0].default is Parameter.empty:
            raise ArgumentError(
                f"{text} does not say what network it is of: give name=, a published model's, or a .json file of its "
                f"{described[0].name}"
            )
        return READERS[kind](path, **more)
    if not described:
        raise ArgumentError(f"name={name}: {text} says itself what network it is of")
    flags: Any = name
    if name.endswith(".json"):
        try:
            flags = parsed(json.loads, Path(name).read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{name} is no JSON: {error}") from error
        if not isinstance(flags, dict):
            raise ValueError(f"{name} is no JSON object: expected {described[0].name} by their names")
    return READERS[kind](path, flags, **more)
