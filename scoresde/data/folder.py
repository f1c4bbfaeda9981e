"""Image files: one, or a folder of them, each decoded when it is wanted."""

from __future__ import annotations

import copy
import hashlib
import math
import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from scoresde.checks import ArgumentError
from scoresde.data.pictures import SUFFIXES, Decoder, Mode, bombs_refused

__all__ = ["ImageFolder", "read_image"]

T = TypeVar("T")

_QUICK = 2**30
"""Pixels that are decoded in less than a minute."""


class ImageFolder:
    """The images in a folder and all its folders, in the order of their names.

    Args:
        folder: of files .png, .jpg, .jpeg, .webp and .bmp; others, and those whose names begin with a dot, are left
            out. Photographs are turned upright where their EXIF entry says how; 16 bits become 8; of a file with
            several pictures, an animation say, it is the first.
        size: the height and width to make of each, or one number for both: cropped around the centre to that ratio, and
            resized (Lanczos). Without it, all must be of one size.
        mode: "L" (grey) or "RGB", to make of each. Without it, all must be grey, or all in colour.
        background: what shows through where they are transparent, a colour as Pillow knows it, "#808080" say; by
            default "white".
        skip: True leaves out the files that cannot be read: all are decoded to find them. Or the names of files to
            leave out, what `skipped` was when a run began; one that is not there is the file with another ending.
        labels: the classes are the folders that lie directly in `folder`, in the order of their names, and every image
            must be in one.

    Attributes:
        shape: of an image, (C, H, W).
        names: of the files, within the folder.
        skipped: of those that were left out, with the reason.
        labels: int64, shape (N,), or None.
        classes: their names, or None.

    Raises:
        ValueError: if there is no image; without size= and mode=, if files cannot be opened, naming all of them, or one
            is unlike the first.
        ImportError: if Pillow is not installed.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        size: int | tuple[int, int] | None = None,
        mode: Mode | None = None,
        background: str | None = None,
        skip: bool | Collection[str] = False,
        labels: bool = False,
    ) -> None:
        self.folder, self.decoder = Path(folder), Decoder(size, mode, background)
        paths = sorted(path for path in self.folder.rglob("*") if _is_image(path))
        if not paths:
            raise ValueError(f"{folder} holds no image: expected files {', '.join(SUFFIXES)}")
        self.names = [str(path.relative_to(self.folder)) for path in paths]
        self.skipped: dict[str, str] = {}
        if skip is True:
            self.skipped = self._undecodable(self.names)
        elif skip:
            self.skipped = dict.fromkeys(self._named([skip] if isinstance(skip, str) else skip), "left out before")
        if len(self.skipped) == len(self.names):
            raise ArgumentError(f"{folder}: all of its images are left out\n" + "\n".join(self.skipped.values()))
        self.names = [name for name in self.names if name not in self.skipped]
        self.labels: Tensor | None = None
        self.classes: list[str] | None = None
        if labels:
            self.labels, self.classes = self._classes()
        if self.decoder.made is not None:  # whatever they are, they become that
            self.shape = self.decoder.made
        else:
            found = self._each(self.decoder.shape, self.names)
            if any(isinstance(one, ValueError) for one in found):  # then all that is wrong is told, not the heads alone
                unreadable(self.look())
            shapes = _whole(found)
            self.shape = shapes[0]
            self._check(shapes)

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        left = f", {len(self.skipped)} left out" if self.skipped else ""
        return f"ImageFolder({str(self.folder)!r}: {len(self)} images {self.shape}{left})"

    def batch(self, items: Sequence[int] | Tensor) -> Tensor:
        """These images, uint8, shape (B, C, H, W).

        Raises:
            ValueError: if some cannot be read, naming all of them; if one has become another.
        """
        names = [self.names[int(i)] for i in items]
        with bombs_refused():
            arrays = _whole([_tried(self.decoder.array, self.folder / name) for name in names])
        self._check([array.shape for array in arrays], names)
        return torch.from_numpy(np.stack(arrays))

    def look(self) -> list[str]:
        """What is wrong with the files that cannot be read, each named, without keeping them: all are opened, and
        decoded, or as many of them as have 2^30 pixels together, evenly chosen."""
        sizes = self._each(self.decoder.pixels, self.names)
        every = max(1, math.ceil(sum(n for n in sizes if isinstance(n, int)) / _QUICK))
        wrong = {name: str(n) for name, n in zip(self.names, sizes, strict=True) if isinstance(n, ValueError)}
        chosen = [name for name in self.names[::every] if name not in wrong]
        return list((wrong | self._undecodable(chosen)).values())

    def without(self, names: Collection[str]) -> ImageFolder:
        """The same, less the files of these names, as those that `skip` names; all classes stay."""
        found, gone = copy.copy(self), dict.fromkeys(self._named(names), "what goes with it cannot be read")
        kept = [i for i, name in enumerate(self.names) if name not in gone]
        found.names = [self.names[i] for i in kept]
        found.labels = None if self.labels is None else self.labels[kept]
        found.skipped = self.skipped | gone
        return found

    def digest(self) -> str:
        """A hash of the files' names and lengths, and of the background where one is chosen: what tells the folder
        from others without reading it."""
        found = hashlib.sha256()
        for name in self.names:
            found.update(f"{name}\0{(self.folder / name).stat().st_size}\0".encode())
        if self.decoder.background is not None:
            found.update(self.decoder.background.encode())
        return f"sha256 {found.hexdigest()[:12]}"

    def _named(self, names: Collection[str]) -> list[str]:
        """Of these files those of that name, or, where there is none, of that name with another ending."""
        here, wanted = {*self.names, *self.skipped}, set(names)
        stems = {Path(name).with_suffix("") for name in wanted - here}
        return [name for name in self.names if name in wanted or Path(name).with_suffix("") in stems]

    def _classes(self) -> tuple[Tensor, list[str]]:
        folders = []
        for name in self.names:
            first, *rest = Path(name).parts
            if not rest:
                raise ValueError(f"{self.folder / name} has no class: expected it in {self.folder}/CLASS/")
            folders.append(first)
        classes = sorted(set(folders))
        numbers = {name: k for k, name in enumerate(classes)}
        return torch.tensor([numbers[first] for first in folders]), classes

    def _each(self, function: Callable[[Path], T], names: Sequence[str]) -> list[T | ValueError]:
        """What it makes of these files, or what is wrong with them."""
        pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
        try:
            with bombs_refused():
                found = pool.map(lambda name: _tried(function, self.folder / name), names)
                bar = tqdm(
                    found, f"looking at {self.folder}", len(names), leave=False, unit="file", delay=5, disable=None
                )
                return list(bar)
        finally:
            pool.shutdown(cancel_futures=True)

    def _undecodable(self, names: Sequence[str]) -> dict[str, str]:
        """Those of these files that cannot be decoded, and what is wrong."""

        def decode(path: Path) -> None:
            self.decoder.array(path)

        found = zip(names, self._each(decode, names), strict=True)
        return {name: str(wrong) for name, wrong in found if wrong is not None}

    def _check(self, shapes: Sequence[tuple[int, ...]], names: Sequence[str] | None = None) -> None:
        """Raises ArgumentError unless images of these names, by default all, have the shape of the first."""
        other = [i for i, shape in enumerate(shapes) if shape != self.shape]
        if other:
            name, more = (names or self.names)[other[0]], f" (and {len(other) - 1} more are others)" * (len(other) > 1)
            raise ArgumentError(
                f"{self.folder / name} is {shapes[other[0]]}, {self.folder / self.names[0]} {self.shape}{more}: "
                "expected images of one size, all grey or all RGB; size= and mode= make them so"
            )


def unreadable(wrong: Sequence[str]) -> None:
    """Raises ArgumentError if files cannot be read: one list of all."""
    wrong = list(dict.fromkeys(wrong))
    if wrong:
        first = f"{len(wrong)} files cannot be read; skip= leaves them out:\n" if len(wrong) > 1 else ""
        raise ArgumentError(first + "\n".join(wrong) + "; skip= leaves it out" * (len(wrong) == 1))


def read_image(path: Path, shape: tuple[int, ...], background: str | None = None) -> Tensor:
    """An image file, cropped around the centre and resized, uint8, of that shape (C, H, W); before that background
    where it is transparent, by default white."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    decoder = Decoder((shape[1], shape[2]), "L" if shape[0] == 1 else "RGB", background)
    with bombs_refused():
        return torch.from_numpy(decoder.array(path))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and not path.is_dir()


def _tried(function: Callable[[Path], T], path: Path) -> T | ValueError:
    try:
        return function(path)
    except ValueError as error:
        return ValueError(str(error))  # which holds no frames


def _whole(found: Sequence[T | ValueError]) -> list[T]:
    """What was found; ArgumentError, naming all that is wrong, if something is."""
    unreadable([str(one) for one in found if isinstance(one, ValueError)])
    return [one for one in found if not isinstance(one, ValueError)]
