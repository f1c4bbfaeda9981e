"""One run at a time in a folder: F/.lock, which the operating system holds for a process and frees when that dies."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from scoresde.errors import CheckpointError
from scoresde.training import parallel

__all__ = ["InUseError", "held", "held_by_first"]

LOCK = ".lock"

_mine: set[Path] = set()  # what this process holds: the system's lock is between processes


class InUseError(CheckpointError):
    """Another process writes into the run folder."""


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other runs from writing into a folder, which is made if there is none, and gone at the end if nothing was
    written into it.

    The lock is POSIX's, of the process: forked data workers do not inherit it, so that a run that was killed can be
    taken up at once. The file is removed at the end; after a kill it stays, and locks nothing. Where the file system
    knows no locks there is a warning instead.

    Raises:
        InUseError: if another run has it, naming the folder and the process.
    """
    import fcntl  # not on every system that can read checkpoints

    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.resolve() / LOCK
    if path in _mine:
        raise InUseError(_message(folder, str(os.getpid())))
    while True:
        file = path.open("a+", errors="replace")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().strip()
            file.close()
            raise InUseError(_message(folder, holder)) from None
        except OSError as error:
            warnings.warn(
                f"{folder} cannot be locked ({error}): see to it that one run alone writes there", stacklevel=3
            )
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()  # its holder removed it since it was opened: that file is not the folder's any more
    _mine.add(path)
    try:
        file.truncate(0)
        file.write(f"{os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        _mine.discard(path)
        file.close()
        if made:
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def held_by_first(folder: Path | None) -> Iterator[None]:
    """Rank 0 of a group holds it, for all; nothing if there is none.

    Raises:
        InUseError: as `held`; RuntimeError in the others.
    """
    with ExitStack() as stack:
        if folder is not None:
            parallel.by_first(lambda: stack.enter_context(held(folder)))
        yield


def _message(folder: Path, holder: str) -> str:
    return (
        f"another run is writing into {folder}, process {holder or 'unknown'}: wait for it, stop it, or take another "
        "folder"
    )
