"""What the commands share: how they begin and stop, what they say, the files they leave."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch

from scoresde.checks import ArgumentError
from scoresde.cli.options import Options, option
from scoresde.data import BUILT_IN
from scoresde.info import environment
from scoresde.training import parallel

__all__ = [
    "BACKGROUND_HELP",
    "DATA_HELP",
    "SKIP_HELP",
    "SessionOptions",
    "Terminated",
    "check_file",
    "check_folder",
    "command_parser",
    "going_on",
    "record",
    "sigterm",
]

Kind = TypeVar("Kind", bound=Options)

DATA_HELP = (
    f"{', '.join(BUILT_IN)} (name:PATH says where it is, name:N how many points); a file .npy, .npz or "
    ".safetensors; or a folder of images"
)
BACKGROUND_HELP = "what shows through where images are transparent: black, '#808080', ... (white)"
SKIP_HELP = "leave out a folder's files that cannot be read: all are looked at first"


@dataclass(frozen=True, kw_only=True)
class SessionOptions(Options):
    """Where a command runs, and whether it says more than results."""

    device: str | None = option("cpu, cuda, ... (a GPU where there is one)")
    quiet: bool = option("results only: no progress bars, no remarks")

    @contextlib.contextmanager
    def start(self) -> Iterator[torch.device]:
        """This process's device; under torchrun, in the group of all (`scoresde.training.start`).

        Raises:
            ValueError: if there is no such device.
        """
        try:
            chosen = None if self.device is None else torch.device(self.device)
            if chosen is not None and chosen.type == "cuda" and not torch.cuda.is_available():
                raise RuntimeError("there is no GPU that torch can use")
            if chosen is not None and chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
                raise RuntimeError(f"there are {torch.cuda.device_count()} GPUs, cuda:0 the first")
            if chosen is not None and chosen.type != "cuda":  # which would open the first GPU in every process
                torch.zeros(1, device=chosen).item()  # meta, say, holds no number
        except (RuntimeError, AssertionError) as error:  # no such device, or not in this build
            raise ValueError(f"--device {self.device}: {str(error).splitlines()[0]}") from error
        with parallel.start(chosen) as found:
            yield found

    @property
    def progress(self) -> bool:
        """Whether this process shows progress bars."""
        return not self.quiet and parallel.rank() == 0

    def say(self, text: str) -> None:
        """A remark, on stderr."""
        if self.progress:
            print(text, file=sys.stderr)


class Terminated(SystemExit):
    """SIGTERM came: what is finished is kept, and the status is 143."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


@contextlib.contextmanager
def sigterm() -> Iterator[None]:
    """While it is open, in the main thread, SIGTERM raises `Terminated`, where nobody else handles it."""
    before: Any = None
    mine = threading.current_thread() is threading.main_thread()
    if mine and (mine := signal.getsignal(signal.SIGTERM) == signal.SIG_DFL):

        def stop(number: int, frame: FrameType | None) -> None:
            raise Terminated

        before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if mine:
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def going_on(text: str) -> Iterator[None]:
    """On Ctrl-C, SIGTERM and an error of the system, a full disk say, tell how to go on; they go on their way."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, OSError):
        if parallel.rank() == 0:
            print(f"\nscoresde: stopped; {text}", file=sys.stderr)
        raise


def command_parser(
    commands: Any, name: str, text: str, examples: str, run: Callable[[Kind], None], kind: type[Kind]
) -> None:
    """Add a command's parser.

    Args:
        commands: what it is added to.
        name: of the command.
        text: its help.
        examples: what that ends in, a line each; and after an empty line anything more.
        run: what it does.
        kind: its options, which `run` is given.
    """
    lines, *more = examples.strip().split("\n\n")
    made: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text.partition("\n")[0],
        description=text,
        epilog="\n\n".join(["\n  ".join(["examples:", *lines.splitlines()]), *more]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kind.add_to({"": made})

    def act(args: Any) -> None:
        try:
            run(kind.of(args))
        except ArgumentError as error:
            raise ArgumentError(error.by(kind.flags())) from error

    made.set_defaults(action=act)


def check_file(path: Path, *suffixes: str) -> None:
    """Raises ValueError if --out is a folder, or has none of the suffixes; OSError if it cannot be written there."""
    if path.is_dir():
        raise ValueError(f"--out {path} is a folder: give a file")
    if suffixes and path.suffix not in suffixes:
        raise ValueError(f"--out {path}: expected a file {' or '.join(suffixes)}")
    check_folder(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)


def check_folder(path: Path) -> None:
    """Raises ValueError if --out is a file; OSError if nothing can be written there. A folder need not be there yet."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"--out {path} is a file: give a folder")
    there = next((folder for folder in (path, *path.parents) if os.path.lexists(folder)), Path())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise PermissionError(f"--out {path}: nothing can be written in {there} ({error.strerror})") from error


def record(options: Options, device: torch.device) -> dict[str, Any]:
    """How numbers came about, for the file that they are in."""
    plain = (str, int, float, list, type(None))
    arguments = {name: value if isinstance(value, plain) else str(value) for name, value in options.flat().items()}
    return {"arguments": arguments, "environment": environment(device)}
