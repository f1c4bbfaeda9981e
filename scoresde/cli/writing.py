"""Where samples go: a picture, an array or a folder of files; and what is finished when a command is stopped."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoresde.checks import ArgumentError, check_count
from scoresde.cli.common import SessionOptions, check_file, check_folder
from scoresde.cli.drawing import gathered
from scoresde.cli.models import About
from scoresde.cli.options import Options, option
from scoresde.files import write_whole
from scoresde.levels import to_levels
from scoresde.pictures import enlarged, grid, write_png
from scoresde.training import parallel

__all__ = ["OutOptions", "Writer"]


@dataclass(frozen=True, kw_only=True)
class OutOptions(Options):
    """Where samples go."""

    out: Path = option("FILE.png, FILE.npz, or a folder", metavar="PATH", required=True)
    columns: int | None = option("of the grid (a square)", metavar="N")
    enlarge: int | None = option(
        "enlarge pictures so many times, a pixel being S x S of them (a grid: until images have 32 pixels)",
        metavar="S", flags=("--scale", "--enlarge"))  # fmt: skip
    floating: bool = option("into .npz also `x`, float32, unrounded", flags=("--float",))


class Writer:
    """Where samples of a model go. What cannot be written is refused at once."""

    def __init__(self, options: OutOptions, about: About) -> None:
        self.options, self.out, self.about = options, options.out, about
        self.folder = self.out.suffix == "" or self.out.is_dir()
        self.picture = self.out.suffix == ".png" and not self.folder
        if not self.folder:
            check_file(self.out, ".png", ".npz")
        if (self.out.suffix != ".npz" or self.folder) and not about.pictures:
            raise ValueError(f"--out {self.out}: items {about.shape} are no pictures; give a file .npz")
        if options.enlarge is not None:
            check_count(enlarge=options.enlarge)
            if self.out.suffix == ".npz" and not self.folder:
                raise ArgumentError(f"enlarge= is for pictures, not for --out {self.out}")
        if options.floating and self.out.suffix != ".npz":
            raise ValueError("--float is for a file .npz")
        if self.folder:
            check_folder(self.out)
            self.out.mkdir(parents=True, exist_ok=True)

    def collect(
        self,
        parts: Iterable[tuple[range, Tensor]],
        finish: Callable[[Tensor], None],
        total: int,
        session: SessionOptions,
        what: str = "samples",
    ) -> Tensor | None:
        """All of the parts, of all processes, in the first; None in the others. Where that is stopped, by Ctrl-C,
        SIGTERM or numbers that are not finite, what is finished is written nevertheless.

        Args:
            parts: this process's, with their numbers; into a folder they go at once.
            finish: writes what there is.
            total: how many there are to be.
            session: what says how many there are.
            what: they are called.
        """
        kept: list[Tensor] = []
        try:
            for which, x in parts:
                if self.folder:
                    for i, image in zip(which, to_levels(x), strict=True):
                        write_png(self.out / f"{i:06d}.png", enlarged(image, self.options.enlarge or 1))
                kept.append(x)
        except (KeyboardInterrupt, SystemExit, ArithmeticError):
            if kept and parallel.world() == 1:
                finish(done := torch.cat(kept))
                session.say(f"\n{len(done)} of {total} {what} are in {self.out}")
            raise
        if (whole := gathered(kept, self.about.shape)) is not None:
            finish(whole)
        return whole

    def finish(self, x: Tensor, labels: Tensor | None = None, more: Mapping[str, Tensor] | None = None) -> None:
        """All samples; into .npz their classes and more arrays, too."""
        if self.folder:
            return
        if self.picture:
            write_png(self.out, grid(to_levels(x), self.options.columns, self.options.enlarge))
            return
        arrays: dict[str, Any] = {}
        if self.about.pictures:
            arrays["images"] = to_levels(x).numpy()
        if self.options.floating or not arrays:
            arrays["x"] = x.float().numpy()
        if labels is not None:
            arrays["labels"] = labels.cpu().numpy().astype(np.int64)
        arrays |= {name: value.numpy() for name, value in (more or {}).items()}
        file = io.BytesIO()
        np.savez(file, **arrays)
        write_whole(self.out, lambda out: out.write(file.getvalue()))
