"""`scoresde export`: a trained model to give away."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from scoresde.cli.common import command_parser
from scoresde.cli.models import ABOUT, CONFIG, folder_of
from scoresde.training.export import DTYPES, export
from scoresde.training.model import opened
from scoresde.training.whole_files import weights_file

__all__ = ["add_parser", "run"]

TEXT = """write a run's averaged weights into a folder to give away, without what only training needs

The commands and `scoresde.load` take the folder as they take the run. It has no optimiser and no other averages, and so
is a quarter of a checkpoint's size or less, and cannot be trained on. Beside the weights are the run's config.toml and
data.json, which say what it was trained on."""

EXAMPLES = """
scoresde export runs/fm --out fashion-mnist
scoresde export runs/fm --out fashion-mnist-small --dtype float16          half the size; it is computed in float32
"""


def add_parser(commands: Any) -> None:
    """The arguments of `export`."""
    parser = command_parser(commands, "export", TEXT, EXAMPLES)
    add = parser.add_argument
    add("run", type=Path, help="a run folder of `scoresde train`, or one of its checkpoints")
    add("--out", type=Path, required=True, metavar="FOLDER", help="which must not exist")
    add("--average", type=int, default=0, metavar="I", help="which averaged weights (0)")
    add("--dtype", choices=DTYPES, default="float32", help="of the file (float32)")
    parser.set_defaults(action=run)


def run(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        ValueError, ImportError, OSError, CheckpointError: if an argument or a file is wrong.
    """
    if not args.run.exists():
        raise FileNotFoundError(f"{args.run}: there is no such run folder")
    found = opened(args.run, weights_file(args.average))
    folder = folder_of(found)
    out = export(found, args.out, average=args.average, dtype=args.dtype)
    for name in (CONFIG, ABOUT):
        if (folder / name).exists():
            shutil.copy(folder / name, out / name)
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: {size / 1e6:.1f} MB, {args.dtype}")
