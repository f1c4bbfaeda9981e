"""`scoresde sample`: samples of a trained network, as a picture, an array or files."""

from __future__ import annotations

import argparse
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoresde.checks import check_count
from scoresde.cli.common import add_quiet, check_file, command_parser, say, session
from scoresde.cli.drawing import Recipe, add_solver_arguments, draw, gathered, recipe, share
from scoresde.cli.images import check_pillow, grid, write_png
from scoresde.cli.models import Model, add_model_arguments, open_model
from scoresde.files import write_whole
from scoresde.levels import to_levels
from scoresde.training import parallel

__all__ = ["add_parser", "run"]

TEXT = """draw samples from a trained network: a PNG grid, a .npz file, or a folder of PNG files

Sample i depends on the seed and i alone: it is the same in any number of samples, batch size (up to rounding; with
adaptive solvers, their tolerance) and number of processes. A .npz file holds `images`, 8-bit, (N, C, H, W), where the
data were images, else `x`, float32; and `labels`, where the network has classes. After Ctrl-C or SIGTERM the file holds
what was finished.

A network that was trained with --condition (super-resolution, inpainting, ...) is told that of --condition-from: these
are whole images, of which the condition is made as in training; or with --measured, and where training was told
given:PATH, the conditions themselves. Sample i is for item i; with another --seed it is another one for the same."""

EXAMPLES = """
scoresde sample runs/fm --out samples.png                          64 of them, UniPC, 20 evaluations
scoresde sample runs/fm --n 5000 --solver ddim --nfe 50 --out samples.npz
scoresde sample runs/fm --class 3 --solver 'DDIM(eta=0.2)' --steps 100 --clip --out threes.png
scoresde sample runs/fm --class 3 --guidance 2 --out typical_threes.png       of a run of `scoresde train --drop 0.1`
scoresde sample runs/fm --solver ddpm --nfe 50 --variance table.npz --out analytic.png
scoresde sample runs/fm --n 1000 --out folder/                     a PNG file each
scoresde sample runs/sr --condition-from test_folder --out again.png          from large images, made small
scoresde sample runs/sr --condition-from small_folder --measured --out large.png
scoresde sample --denoiser my_model:load --checkpoint model.pt --shape 3 32 32 --out samples.png
torchrun --nproc-per-node=4 -m scoresde sample runs/fm --number 50000 --batch-size 256 --out samples.npz
"""


def add_parser(commands: Any) -> None:
    """The arguments of `sample`."""
    parser = command_parser(commands, "sample", TEXT, EXAMPLES)
    add_model_arguments(parser)
    add_solver_arguments(parser)
    add_out_arguments(parser, "a square")
    add_quiet(parser)
    parser.set_defaults(action=run)


def add_out_arguments(parser: argparse.ArgumentParser, columns: str | None) -> None:
    """--out, --columns (which by default are as it says; None for no choice) and --float: what a `Writer` takes."""
    parser.add_argument("--out", type=Path, required=True, metavar="PATH", help="FILE.png, FILE.npz, or a folder")
    if columns is None:
        parser.set_defaults(columns=None)
    else:
        parser.add_argument("--columns", type=int, metavar="N", help=f"of the grid ({columns})")
    parser.add_argument("--float", dest="floating", action="store_true", help="into .npz also `x`, float32, unrounded")


def run(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        TypeError, ValueError, ImportError, OSError, CheckpointError: if an argument or a file is wrong, before the
            first evaluation.
        ArithmeticError: if samples are not finite, or a budget ran out.
    """
    check_count(n=args.n, **({} if args.columns is None else {"columns": args.columns}))
    with session(args.device) as device:
        model = open_model(args, device)
        made = recipe(args, model)
        if made.told is not None and args.condition_from is None:
            say(args, "conditions are those of what the network was trained on: --condition-from names other items")
        writer = Writer(args, model)
        mine = share(args.n)
        kept: list[Tensor] = []
        try:
            for which, x in draw(made, mine, args.batch_size, not args.quiet and parallel.rank() == 0):
                writer.add(which, x)
                kept.append(x)
        except (KeyboardInterrupt, SystemExit, ArithmeticError):
            if kept and parallel.world() == 1:
                done = torch.cat(kept)
                writer.finish(done, made)
                say(args, f"\n{len(done)} of {args.n} samples are in {args.out}")
            raise
        whole = gathered(torch.cat(kept) if kept else torch.empty(0, *model.about.shape))
        if whole is not None:
            writer.finish(whole, made)
            print(f"{args.out}: {len(whole)} samples of {made.solver!r}, {_count(made)}, seed {args.seed}")


def _count(made: Recipe) -> str:
    if "grid" in made.options:
        return f"{made.options['grid'].steps} steps"
    return ", ".join(f"{name}={value}" for name, value in made.options.items()) or "adaptive"


class Writer:
    """Where samples go. What cannot be written is refused at once."""

    def __init__(self, args: argparse.Namespace, model: Model) -> None:
        self.out, self.model, self.label = args.out, model, args.label
        self.columns, self.floating = args.columns, args.floating
        self.folder = self.out.suffix == "" or self.out.is_dir()
        if not self.folder:
            check_file(self.out, ".png", ".npz")
        if self.out.suffix != ".npz" or self.folder:
            if not model.about.pictures:
                raise ValueError(f"--out {self.out}: items {model.about.shape} are no pictures; give a file .npz")
            check_pillow()
        if self.floating and self.out.suffix != ".npz":
            raise ValueError("--float is for a file .npz")
        if self.folder:
            self.out.mkdir(parents=True, exist_ok=True)

    def add(self, which: range, x: Tensor) -> None:
        """Some samples: into a folder, at once."""
        if self.folder:
            for i, image in zip(which, to_levels(x), strict=True):
                write_png(self.out / f"{i:06d}.png", image)

    def finish(self, x: Tensor, made: Recipe, more: Mapping[str, Tensor] | None = None) -> None:
        """All samples; into .npz more arrays, too."""
        if self.folder:
            return
        if self.out.suffix == ".png":
            write_png(self.out, grid(to_levels(x), self.columns))
            return
        arrays: dict[str, Any] = {}
        if self.model.about.pictures:
            arrays["images"] = to_levels(x).numpy()
        if self.floating or not arrays:
            arrays["x"] = x.float().numpy()
        if (labels := made.labels(range(len(x)))) is not None:
            arrays["labels"] = labels.cpu().numpy().astype(np.int64)
        arrays |= {name: value.numpy() for name, value in (more or {}).items()}
        file = io.BytesIO()
        np.savez(file, **arrays)
        write_whole(self.out, lambda out: out.write(file.getvalue()))
