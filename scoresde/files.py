"""Files that are written whole or not at all; and texts that were in files, read."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["parsed", "sync", "write_flushed", "write_whole"]


def parsed(parse: Callable[[str], Any], text: str) -> Any:
    """What `json.loads`, `tomllib.loads` or another parser makes of a text.

    Raises:
        ValueError: as the parser; and where the text is nested too deeply for it.
    """
    try:
        return parse(text)
    except (RecursionError, MemoryError) as error:
        raise ValueError("it is nested too deeply to be read") from error


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file atomically: to a temporary one beside it, flushed to the disk, then renamed over `path`. The folder
    is made if there is none.

    Args:
        path: where to.
        write: called with the temporary file, open for bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{path.name}.{secrets.token_hex(4)}.partial"
    try:
        write_flushed(temporary, write)
        os.replace(temporary, path)
        sync(path.parent)  # the rename too
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def write_flushed(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a new file, to the disk; `write` is called with it, open for bytes."""
    with path.open("xb") as file:  # with the permissions of any new file, which mkstemp's has not
        write(file)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """A file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
