"""Data sets that need no download, and data from files."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["BUILT_IN", "Data", "digit_levels", "digits", "read_data"]

_SUFFIXES = (".png", ".jpg", ".jpeg")


class Data(NamedTuple):
    """What `read_data` returns.

    Attributes:
        x: shape (N, ...): integer levels (uint8 images), or floating-point data.
        names: of the items, where they have any: files' names.
        levels: how many there are, where it is known.
        data_range: what the bins of the levels fill (`scoresde.likelihood.discrete.outer_edges`), where it is known.
    """

    x: Tensor
    names: list[str] | None = None
    levels: int | None = None
    data_range: tuple[float, float] | None = None


def digits() -> tuple[Tensor, Tensor]:
    """The 1,797 handwritten digits of scikit-learn (Alpaydin and Kaynak, 1998), from its wheel: no network needed.

    Returns:
        images: float32, shape (1797, 1, 8, 8), in [-1, 1] (17 grey levels).
        labels: int64, shape (1797,), 0 to 9.

    Raises:
        ImportError: if scikit-learn is not installed.
    """
    images, labels = digit_levels()
    return images.float() / 8 - 1, labels


def digit_levels() -> tuple[Tensor, Tensor]:
    """The images of `digits` as raw levels, uint8, 0 to 16, shape (1797, 1, 8, 8), and the labels.

    Level 0 is at -1 and level 16 at 1 in `digits`, so that their bins fill (-1.0625, 1.0625).

    Raises:
        ImportError: if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("digits() reads them from scikit-learn: pip install scoresde[data]") from error
    bunch = load_digits()
    return torch.from_numpy(bunch.images).to(torch.uint8)[:, None], torch.from_numpy(bunch.target).long()


BUILT_IN: dict[str, Callable[[], Data]] = {
    "digits": lambda: Data(digit_levels()[0], levels=17, data_range=(-1.0625, 1.0625))
}
"""The data sets that `read_data` knows by name."""


def read_data(source: str | Path) -> Data:
    """Data by its name or from the disk.

    Args:
        source: a name in `BUILT_IN`; a file .npy; a file .npz with one array, or with one named "images"; or a folder
            of PNG and JPEG images, all of one size, with all that is in its folders, in the order of their names. Files
            are taken as they are: integers are raw levels, (N, C, H, W) say, and floating-point data are data.

    Raises:
        FileNotFoundError: if there is no such name, file or folder.
        ValueError: if a file is damaged, or holds something else; the message names it.
        ImportError: if Pillow is not installed, for a folder.
    """
    if source in BUILT_IN:
        return BUILT_IN[str(source)]()
    path = Path(source)
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{source}: no such file or folder, nor a built-in data set ({', '.join(BUILT_IN)} is what there is)"
        )
    if path.suffix not in (".npy", ".npz"):
        raise ValueError(f"{path}: expected a .npy or .npz file, or a folder of images")
    return Data(_read_array(path))


def _read_array(path: Path) -> Tensor:
    try:
        with path.open("rb") as file:  # np.load leaves a damaged one open
            found: Any = np.load(file, allow_pickle=False)
            if isinstance(found, np.lib.npyio.NpzFile):
                name = found.files[0] if len(found.files) == 1 else "images"
                if name not in found.files:
                    raise ValueError(f"it holds the arrays {found.files}: expected one, or one named 'images'")
                found = found[name]
        return _as_tensor(found)
    except (ValueError, TypeError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as an array of numbers: {error}") from error


def _as_tensor(array: np.ndarray) -> Tensor:
    """The array as a tensor, in the machine's byte order.

    Raises:
        TypeError: if its entries are no real numbers.
        ValueError: if it is empty, or has no dimension.
    """
    if array.dtype.kind not in "uif":
        raise TypeError(f"its entries are {array.dtype}, expected integers or floating-point numbers")
    if array.ndim == 0 or array.size == 0:
        raise ValueError(f"its shape is {array.shape}, expected (N, ...)")
    return torch.from_numpy(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="))))


def _read_folder(folder: Path) -> Data:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ImportError(f"{folder}: a folder of images is read with Pillow: pip install pillow") from error
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    if not paths:
        raise ValueError(f"{folder} holds no image: expected files {', '.join(_SUFFIXES)}")
    images: list[np.ndarray] = []
    for path in paths:
        try:
            with Image.open(path) as image:
                if image.mode not in ("L", "RGB", "P") or "transparency" in image.info:
                    raise ValueError(f"its mode is {image.mode}, expected 8-bit grey or RGB without transparency")
                array = np.asarray(image.convert("RGB") if image.mode == "P" else image)
        except (OSError, SyntaxError, ValueError, UnidentifiedImageError) as error:
            raise ValueError(f"{path} cannot be read as an image: {error}") from error
        images.append(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))
        if images[-1].shape != images[0].shape:
            raise ValueError(f"{path} is {images[-1].shape}, {paths[0]} {images[0].shape}: expected images of one size")
    return Data(_as_tensor(np.stack(images)), [str(path.relative_to(folder)) for path in paths])
