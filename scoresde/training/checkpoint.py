"""Single files of tensors and numbers: written whole or not at all, and read without executing anything. A training
run has a folder instead (`scoresde.training.folder`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from scoresde.errors import CheckpointError
from scoresde.files import write_whole

__all__ = ["read_checkpoint", "write_checkpoint"]

FORMAT = "scoresde-checkpoint-1"


def write_checkpoint(path: str | Path, content: dict[str, Any], made_for: dict[str, Any]) -> None:
    """Write atomically: to a temporary file beside it, flushed to the disk, then renamed over `path`.

    Args:
        path: where to.
        content: tensors, numbers, strings and containers of them.
        made_for: what the content is only good for; `read_checkpoint` refuses another.
    """
    whole = {"format": FORMAT, "made_for": made_for, "content": content}
    write_whole(Path(path), lambda file: torch.save(whole, file))


def read_checkpoint(path: str | Path, made_for: dict[str, Any], *, whole: bool = True) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU.

    Args:
        path: the file.
        made_for: what it must have been made for.
        whole: whether it must have been made for nothing else besides.

    Raises:
        FileNotFoundError: if there is none.
        CheckpointError: if the file is truncated, is not a checkpoint of ours, holds more than data, or was made for
            something other than `made_for`; the message names each difference.
    """
    path = Path(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: truncated, damaged, or not a checkpoint ({error})") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a scoresde checkpoint")
    unknown = set(found) - {"format", "made_for", "content"}
    if unknown:
        raise CheckpointError(f"{path} has unknown keys {sorted(unknown)}: it is from another version, or altered")
    check_made_for(path, found["made_for"], made_for, whole=whole)
    content: dict[str, Any] = found["content"]
    return content


def check_made_for(path: Path, theirs: Mapping[str, Any], made_for: Mapping[str, Any], *, whole: bool) -> None:
    """Check that what a checkpoint was made for is `made_for`, and, if whole, nothing besides.

    Raises:
        CheckpointError: naming each difference.
    """
    different = [
        f"{key}: {theirs.get(key, 'nothing')} in the file, {made_for.get(key, 'nothing')} here"
        for key in (sorted({*theirs, *made_for}) if whole else made_for)
        if theirs.get(key) != made_for.get(key)
    ]
    if different:
        raise CheckpointError(f"{path} was made for something else. " + "; ".join(different))
