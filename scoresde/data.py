"""Data sets that need no download, and data from files."""

from __future__ import annotations

import gzip
import math
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scoresde.solvers.base import check_option

__all__ = [
    "BUILT_IN",
    "FASHION_MNIST",
    "Data",
    "digit_levels",
    "digits",
    "fashion_mnist",
    "fashion_mnist_levels",
    "mnist",
    "mnist_levels",
    "read_data",
]

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts its files."""

_SUFFIXES = (".png", ".jpg", ".jpeg")
_SPLITS = {"train": "train", "test": "t10k"}  # as the files are called


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


def fashion_mnist(path: str | Path | None = None, split: Literal["train", "test"] = "train") -> tuple[Tensor, Tensor]:
    """Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017): 60,000 photographs of clothes to train on and 10,000 to test.

    Args:
        path: a folder with the four IDX files, gzipped or not; by default that of Debian's package
            dataset-fashion-mnist (`FASHION_MNIST`). Nothing is downloaded.
        split: "train" or "test".

    Returns:
        images: float32, shape (N, 1, 28, 28), in [-1, 1] (256 grey levels, level k at 2 k / 255 - 1).
        labels: int64, shape (N,), 0 to 9.

    Raises:
        FileNotFoundError: if the files are not there; the message says how to get them.
        ValueError: on another split; or if a file is damaged or holds something else, naming it.
    """
    return _at_ends(*fashion_mnist_levels(path, split))


def fashion_mnist_levels(
    path: str | Path | None = None, split: Literal["train", "test"] = "train"
) -> tuple[Tensor, Tensor]:
    """The images of `fashion_mnist` as raw levels, uint8, 0 to 255, shape (N, 1, 28, 28), and the labels.

    Level 0 is at -1 and level 255 at 1 in `fashion_mnist`, so that their bins fill (-256 / 255, 256 / 255). Arguments
    and errors: `fashion_mnist`.
    """
    try:
        return mnist_levels(FASHION_MNIST if path is None else path, split)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}. On Debian and Ubuntu: apt-get install dataset-fashion-mnist; else give path="
        ) from None


def mnist(path: str | Path, split: Literal["train", "test"] = "train") -> tuple[Tensor, Tensor]:
    """MNIST (LeCun, Cortes and Burges, 1998), or another set in its files. All as in `fashion_mnist`."""
    return _at_ends(*mnist_levels(path, split))


def mnist_levels(path: str | Path, split: Literal["train", "test"] = "train") -> tuple[Tensor, Tensor]:
    """The images of `mnist` as raw levels, and the labels. All as in `fashion_mnist_levels`."""
    check_option(_SPLITS, split=split)
    images_at = _find_idx(Path(path), f"{_SPLITS[split]}-images-idx3")
    labels_at = _find_idx(Path(path), f"{_SPLITS[split]}-labels-idx1")
    images, labels = _read_idx(images_at, (28, 28)), _read_idx(labels_at, ())
    if len(images) != len(labels):
        raise ValueError(f"{images_at} has {len(images)} images, {labels_at} {len(labels)} labels")
    if int(labels.max()) > 9:
        raise ValueError(f"{labels_at} has the label {int(labels.max())}: expected 0 to 9")
    return images[:, None], labels.long()


def _at_ends(levels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(2 k - 255) / 255 of each level k, which rounds but once; and the labels."""
    return levels.float().mul_(2).sub_(255).div_(255), labels


def _find_idx(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}-ubyte", folder / f"{name}-ubyte.gz"):
        if path.exists():
            return path
    names = ", ".join(f"{split}-{kind}-ubyte" for split in _SPLITS.values() for kind in ("images-idx3", "labels-idx1"))
    raise FileNotFoundError(f"there is no {name}-ubyte in {folder}: expected a folder with {names}, gzipped or not")


def _read_idx(path: Path, sizes: tuple[int, ...]) -> Tensor:
    """The entries of an IDX file of unsigned bytes, shape (N, *sizes), N > 0.

    The file begins with the bytes 0, 0, 8 (unsigned bytes) and the number of dimensions; these follow as big-endian
    32-bit integers, then the entries.

    Raises:
        ValueError: if it is anything else.
    """
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        head = 4 * (len(sizes) + 2)
        if content[:4] != bytes([0, 0, 8, len(sizes) + 1]):
            raise ValueError(f"it begins with the bytes {content[:4].hex(' ')}, expected 00 00 08 {len(sizes) + 1:02x}")
        if len(content) < head:
            raise ValueError(f"it ends within its head, after {len(content)} bytes")
        found = struct.unpack(f">{len(sizes) + 1}I", content[4:head])
        if found[0] == 0 or found[1:] != sizes:
            raise ValueError(f"its shape is {found}, expected {('N', *sizes)}".replace("'", ""))
        if len(content) != head + math.prod(found):
            raise ValueError(f"it has {len(content) - head} entries, its shape {found} says {math.prod(found)}")
    except (ValueError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read as an IDX file: {error}") from error
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=head).reshape(found)


def _fashion_mnist(split: Literal["train", "test"]) -> Data:
    return Data(fashion_mnist_levels(split=split)[0], levels=256, data_range=(-256 / 255, 256 / 255))


BUILT_IN: dict[str, Callable[[], Data]] = {
    "digits": lambda: Data(digit_levels()[0], levels=17, data_range=(-1.0625, 1.0625)),
    "fashion-mnist": partial(_fashion_mnist, "train"),
    "fashion-mnist-test": partial(_fashion_mnist, "test"),
}
"""The data sets that `read_data` knows by name: "digits" is all of them, "fashion-mnist" the 60,000 to train on."""


def read_data(source: str | Path) -> Data:
    """Data by its name or from the disk.

    Args:
        source: a name in `BUILT_IN`; a file .npy; a file .npz with one array, or with one named "images"; or a folder
            of PNG and JPEG images, all of one size, with all that is in its folders, in the order of their names. Files
            are taken as they are: integers are raw levels, (N, C, H, W) say, and floating-point data are data.

    Raises:
        FileNotFoundError: if there is no such name, file or folder; or if a built-in data set is not installed.
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
            f"{source}: no such file or folder, nor a built-in data set (these are {', '.join(BUILT_IN)})"
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
