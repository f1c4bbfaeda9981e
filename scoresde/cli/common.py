"""What the commands share: how they stop, what they say, the files they leave."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from scoresde.data import BUILT_IN
from scoresde.info import environment
from scoresde.training import parallel

__all__ = [
    "DATA_HELP",
    "Terminated",
    "add_quiet",
    "check_file",
    "command_parser",
    "going_on",
    "record",
    "say",
    "session",
    "sigterm",
]

DATA_HELP = (
    f"{', '.join(BUILT_IN)} (name:PATH says where it is, name:N how many points); a file .npy, .npz or "
    ".safetensors; or a folder of images"
)


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
    """On Ctrl-C and SIGTERM, say how to go on; both go on their way."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        if parallel.rank() == 0:
            print(f"\nscoresde: stopped; {text}", file=sys.stderr)
        raise


@contextlib.contextmanager
def session(device: str | None) -> Iterator[torch.device]:
    """This process's device; under torchrun, in the group of all (`scoresde.training.start`).

    Raises:
        ValueError: if there is no such device.
    """
    try:
        chosen = None if device is None else torch.device(device)
        if chosen is not None and chosen.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("there is no GPU that torch can use")
        if chosen is not None and chosen.type != "cuda":  # which would open the first GPU in every process
            torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:  # no such device, or not in this build
        raise ValueError(f"--device {device}: {error}") from error
    with parallel.start(chosen) as found:
        yield found


def command_parser(commands: Any, name: str, text: str, examples: str) -> argparse.ArgumentParser:
    """A parser whose help ends in examples, a line each."""
    made: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text.partition("\n")[0],
        description=text,
        epilog="examples:\n" + "\n".join(f"  {line}" for line in examples.strip().splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return made


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """--device and --quiet."""
    parser.add_argument("--device", help="cpu, cuda, ... (a GPU where there is one)")
    parser.add_argument("--quiet", action="store_true", help="results only: no progress bars, no remarks")


def say(args: argparse.Namespace, text: str) -> None:
    """A remark, on stderr."""
    if not args.quiet and parallel.rank() == 0:
        print(text, file=sys.stderr)


def check_file(path: Path, *suffixes: str) -> None:
    """Raises ValueError if --out is a folder, or has none of the suffixes; OSError if it cannot be written there."""
    if path.is_dir():
        raise ValueError(f"--out {path} is a folder: give a file")
    if suffixes and path.suffix not in suffixes:
        raise ValueError(f"--out {path}: expected a file {' or '.join(suffixes)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"--out {path}: {path.parent} cannot be written to")


def record(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """How numbers came about, for the file that they are in."""
    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    arguments = {name: value for name, value in arguments.items() if not callable(value)}
    return {"arguments": arguments, "environment": environment(device)}
