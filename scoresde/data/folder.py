"""Image files: one, or a folder of them, each decoded when it is wanted."""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from scoresde.checks import check_count, check_option

__all__ = ["ImageFolder", "read_image"]

Mode = Literal["L", "RGB"]

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_CHANNELS = {"L": 1, "RGB": 3, "P": 3}  # a palette's entries are RGB
_CONVERTED = (*_CHANNELS, "1", "CMYK", "YCbCr")  # what is taken where mode= says what to make of it
_ORIENTATION = 0x0112  # EXIF: 5 to 8 are on their side


class ImageFolder:
    """The images in a folder and all its folders, in the order of their names.

    Args:
        folder: of files .png, .jpg, .jpeg, .webp and .bmp; others, and those whose names begin with a dot, are left
            out. Photographs are turned upright where their EXIF entry says how.
        size: the height and width to make of each, or one number for both: cropped around the centre to that ratio, and
            resized (Lanczos). Without it, all must be of one size.
        mode: "L" (grey) or "RGB", to make of each. Without it, all must be grey, or all RGB.
        labels: the classes are the folders that lie directly in `folder`, in the order of their names, and every image
            must be in one.

    Attributes:
        shape: of an image, (C, H, W).
        names: of the files, within the folder.
        labels: int64, shape (N,), or None.
        classes: their names, or None.

    Raises:
        ValueError: if there is no image; without size= and mode=, if one cannot be opened, or is unlike the first. The
            message names it.
        ImportError: if Pillow is not installed.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        size: int | tuple[int, int] | None = None,
        mode: Mode | None = None,
        labels: bool = False,
    ) -> None:
        self.folder, self.mode = Path(folder), mode
        self.size = (size, size) if isinstance(size, int) else size
        if self.size is not None:
            check_count(height=self.size[0], width=self.size[1])
        if mode is not None:
            check_option(("L", "RGB"), mode=mode)
        check_pillow()
        paths = sorted(path for path in self.folder.rglob("*") if _is_image(path))
        if not paths:
            raise ValueError(f"{folder} holds no image: expected files {', '.join(_SUFFIXES)}")
        self.names = [str(path.relative_to(self.folder)) for path in paths]
        self.labels: Tensor | None = None
        self.classes: list[str] | None = None
        if labels:
            self.labels, self.classes = self._classes()
        self.shape = self._header(self.names[0])
        if self.size is None or mode is None:  # else whatever they are, they become alike
            for name in self.names:
                self._check(name, self._header(name))

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"ImageFolder({str(self.folder)!r}: {len(self)} images {self.shape})"

    def batch(self, items: Sequence[int] | Tensor) -> Tensor:
        """These images, uint8, shape (B, C, H, W).

        Raises:
            ValueError: if one is damaged, or has become another; the message names it.
        """
        return torch.from_numpy(np.stack([self._decoded(self.names[int(i)]) for i in items]))

    def digest(self) -> str:
        """A hash of the files' names and lengths: what tells the folder from others without reading it."""
        found = hashlib.sha256()
        for name in self.names:
            found.update(f"{name}\0{(self.folder / name).stat().st_size}\0".encode())
        return f"sha256 {found.hexdigest()[:12]}"

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

    def _header(self, name: str) -> tuple[int, int, int]:
        """The shape that an image will have, without decoding it."""
        with self._opened(name) as image:
            width, height = image.size
            if image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8):
                width, height = height, width
            return (_CHANNELS[self.mode or image.mode], *(self.size or (height, width)))

    def _decoded(self, name: str) -> np.ndarray:
        from PIL import Image, ImageOps

        with self._opened(name) as image:
            upright = ImageOps.exif_transpose(image)
            wanted = self.mode or ("RGB" if image.mode == "P" else image.mode)
            if upright.mode != wanted:
                upright = upright.convert(wanted)
            if self.size is not None:
                height, width = self.size
                upright = ImageOps.fit(upright, (width, height), method=Image.Resampling.LANCZOS)
            array = np.array(upright)
        array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
        self._check(name, array.shape)
        return array

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        if shape != self.shape:
            raise ValueError(
                f"{self.folder / name} is {shape}, {self.folder / self.names[0]} {self.shape}: expected images of one "
                "size, all grey or all RGB; size= and mode= make them so"
            )

    @contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        path, Image = self.folder / name, check_pillow()
        try:
            with Image.open(path) as image:
                if image.mode not in (_CONVERTED if self.mode else _CHANNELS) or "transparency" in image.info:
                    raise ValueError(f"its mode is {image.mode}, expected 8-bit grey or RGB without transparency")
                yield image
        except (
            OSError,
            SyntaxError,
            ValueError,
            EOFError,
            struct.error,
            zlib.error,
            Image.DecompressionBombError,
        ) as error:
            raise ValueError(f"{path} cannot be read as an image: {error}") from error


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in _SUFFIXES and not path.name.startswith(".") and not path.is_dir()


def check_pillow() -> Any:
    """Pillow's Image, or ImportError, saying what to install."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "image files are read and written with Pillow: pip install pillow, or scoresde[data]"
        ) from error
    return Image


def read_image(path: Path, shape: tuple[int, ...]) -> Tensor:
    """An image file, cropped around the centre and resized, uint8, of that shape (C, H, W)."""
    Image = check_pillow()
    from PIL import ImageOps

    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        with Image.open(path) as opened:
            upright = ImageOps.exif_transpose(opened).convert("L" if shape[0] == 1 else "RGB")
            fitted = ImageOps.fit(upright, (shape[2], shape[1]), method=Image.Resampling.LANCZOS)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    array = np.array(fitted)
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())
