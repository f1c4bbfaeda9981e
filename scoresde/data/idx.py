"""MNIST, Fashion-MNIST and others in IDX files: gzipped or not, read strictly."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from scoresde.checks import ArgumentError, check_option
from scoresde.data.download import fetch
from scoresde.levels import scaled

__all__ = ["FASHION_MNIST", "fashion_mnist", "fashion_mnist_levels", "mnist", "mnist_levels"]

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts its files."""

Split = Literal["train", "test"]

_SPLITS = {"train": "train", "test": "t10k"}  # as the files are called

# Where they are, and the checksums of the gzipped files, as torchvision publishes both.
_MNIST = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    {
        "train-images-idx3": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1": "ec29112dd5afa0611ce80d1b7f02629c",
    },
)
_FASHION = (
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    {
        "train-images-idx3": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1": "bb300cfdad3c16e7a12a480ee83cd310",
    },
)


def fashion_mnist(
    path: str | Path | None = None, split: Split = "train", *, download: bool = False
) -> tuple[Tensor, Tensor]:
    """Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017): 60,000 photographs of clothes to train on and 10,000 to test.

    Args:
        path: a folder with the four IDX files, gzipped or not; by default that of Debian's package
            dataset-fashion-mnist (`FASHION_MNIST`).
        split: "train" or "test".
        download: into `path`, the files of the split that are not there.

    Returns:
        images: float32, shape (N, 1, 28, 28), in [-1, 1] (256 grey levels, level k at 2 k / 255 - 1).
        labels: int64, shape (N,), 0 to 9.

    Raises:
        FileNotFoundError: if the files are not there; the message says how to get them.
        ValueError: on another split; or if a file is damaged or holds something else, naming it.
        ConnectionError: if they cannot be downloaded.
    """
    images, labels = fashion_mnist_levels(path, split, download=download)
    return scaled(images), labels


def fashion_mnist_levels(
    path: str | Path | None = None, split: Split = "train", *, download: bool = False
) -> tuple[Tensor, Tensor]:
    """The images of `fashion_mnist` as raw levels, uint8, 0 to 255, shape (N, 1, 28, 28), and the labels.

    Level 0 is at -1 and level 255 at 1 in `fashion_mnist`, so that their bins fill (-256 / 255, 256 / 255). Arguments
    and errors: `fashion_mnist`.
    """
    check_option(_SPLITS, split=split)
    if download:
        _download(path, split, *_FASHION)
    try:
        return _read(FASHION_MNIST if path is None else Path(path), split)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}. On Debian and Ubuntu: apt-get install dataset-fashion-mnist; else say which folder they are in"
        ) from None


def mnist(path: str | Path, split: Split = "train", *, download: bool = False) -> tuple[Tensor, Tensor]:
    """MNIST (LeCun, Cortes and Burges, 1998), or another set in its files. All as in `fashion_mnist`."""
    images, labels = mnist_levels(path, split, download=download)
    return scaled(images), labels


def mnist_levels(path: str | Path, split: Split = "train", *, download: bool = False) -> tuple[Tensor, Tensor]:
    """The images of `mnist` as raw levels, and the labels. All as in `fashion_mnist_levels`."""
    check_option(_SPLITS, split=split)
    if download:
        _download(path, split, *_MNIST)
    return _read(Path(path), split)


def _download(path: str | Path | None, split: Split, source: str, md5: dict[str, str]) -> None:
    """
    Raises:
        ValueError: if it is not said where to.
    """
    if path is None:
        raise ArgumentError("download=True needs path=, a folder to download into")
    for name in _names(split):
        if not (Path(path) / f"{name}-ubyte").exists():
            fetch(Path(path) / f"{name}-ubyte.gz", [f"{source}{name}-ubyte.gz"], md5[name])


def _names(split: str) -> tuple[str, str]:
    """Of the files with the images and the labels."""
    return f"{_SPLITS[split]}-images-idx3", f"{_SPLITS[split]}-labels-idx1"


def _read(folder: Path, split: Split) -> tuple[Tensor, Tensor]:
    images_at, labels_at = (_find_idx(folder, name) for name in _names(split))
    images, labels = _read_idx(images_at, (28, 28)), _read_idx(labels_at, ())
    if len(images) != len(labels):
        raise ValueError(f"{images_at} has {len(images)} images, {labels_at} {len(labels)} labels")
    if int(labels.max()) > 9:
        raise ValueError(f"{labels_at} has the label {int(labels.max())}: expected 0 to 9")
    return images[:, None], labels.long()


def _find_idx(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}-ubyte", folder / f"{name}-ubyte.gz"):
        if path.exists():
            return path
    names = ", ".join(f"{name}-ubyte" for split in _SPLITS for name in _names(split))
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
