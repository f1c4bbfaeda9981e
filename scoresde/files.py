"""Files that are written whole or not at all; JSON that has a hash of itself; and texts that were in files, read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["parsed", "sealed", "sync", "unsealed", "warn_unsealed", "write_flushed", "write_whole", "writing"]

_HASH = ', "sha256": "'


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
    with writing(path), path.open("xb") as file:  # with the permissions of any new file, which mkstemp's has not
        write(file)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, that file is written: an error of the system, a full disk say, names it, also where a library has raised
    another in its place.

    Raises:
        OSError: that error.
    """
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None or cause.errno is None:
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error


def sync(path: Path) -> None:
    """A file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sealed(content: Mapping[str, Any], indent: int | None = None) -> str:
    """JSON of an object that is not empty, its last entry "sha256" being a hash of the text before it: no bit of it can
    change unseen.

    >>> unsealed(sealed({"a": 1}))
    ({'a': 1}, True)
    """
    head = json.dumps(content, indent=indent)[:-1].rstrip()
    return f'{head}{_HASH}{_sha256(head)}"}}'


def unsealed(text: str) -> tuple[Any, bool]:
    """What `sealed` was given; and whether there is a hash, which other JSON has not.

    Raises:
        ValueError: if it is no JSON, or the hash is another's.
    """
    content = parsed(json.loads, text)
    head, mark, tail = text.rstrip("\n").rpartition(_HASH)
    if not mark:
        return content, False
    if tail != f'{_sha256(head)}"}}':
        raise ValueError("its hash is not that of its text")
    del content["sha256"]
    return content, True


def warn_unsealed(path: Path) -> None:
    """Warn of a file without a hash."""
    warnings.warn(
        f"{path} has no hash of itself, as earlier versions wrote it: not all damage to it would be seen", stacklevel=3
    )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
