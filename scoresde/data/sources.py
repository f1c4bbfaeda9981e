"""Data by name or from the disk: `read_data`."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from scoresde.checks import ArgumentError, nearest
from scoresde.data.arrays import ARRAYS, read_arrays
from scoresde.data.cifar import CIFAR10_CLASSES, cifar10_levels
from scoresde.data.folder import ImageFolder
from scoresde.data.idx import Split, fashion_mnist_levels, mnist_levels
from scoresde.data.pictures import Mode
from scoresde.data.toys import TOYS
from scoresde.levels import outer_edges, scaled
from scoresde.tensors import shown

__all__ = ["BUILT_IN", "Data", "digit_levels", "digits", "find_data", "read_data"]


@shown
class Data(NamedTuple):
    """What `read_data` returns.

    Attributes:
        x: shape (N, ...): integer levels (uint8 images), or floating-point data.
        names: of the items, where they have any: files' names.
        levels: how many there are, where it is known.
        data_range: what the bins of the levels fill (`scoresde.levels.outer_edges`), where it is known.
        labels: int64, shape (N,), where there are any (and, from files, where they were asked for).
        classes: what the labels stand for, where they have names.
    """

    x: Tensor
    names: list[str] | None = None
    levels: int | None = None
    data_range: tuple[float, float] | None = None
    labels: Tensor | None = None
    classes: list[str] | None = None


def digits() -> tuple[Tensor, Tensor]:
    """The 1,797 handwritten digits of scikit-learn (Alpaydin and Kaynak, 1998), from its wheel: no network needed.

    Returns:
        images: float32, shape (1797, 1, 8, 8), in [-1, 1] (17 grey levels).
        labels: int64, shape (1797,), 0 to 9.

    Raises:
        ImportError: if scikit-learn is not installed.
    """
    images, labels = digit_levels()
    return scaled(images, 17), labels


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


# --- by name ---------------------------------------------------------------------------------------------------------


def _levels(x: Tensor, labels: Tensor, levels: int = 256, classes: list[str] | None = None) -> Data:
    return Data(x, None, levels, outer_edges(-1.0, 1.0, levels), labels, classes)


def _digits(argument: str, download: bool) -> Data:
    if argument:
        raise ValueError(f"digits:{argument}: digits are in scikit-learn's wheel; leave the path out")
    return _levels(*digit_levels(), levels=17)


def _mnist(split: Split) -> Callable[[str, bool], Data]:
    return lambda path, download: _levels(*mnist_levels(_given(path, "mnist"), split, download=download))


def _fashion_mnist(split: Split) -> Callable[[str, bool], Data]:
    def read(path: str, download: bool) -> Data:
        where = _given(path, "fashion-mnist") if download else path or None
        return _levels(*fashion_mnist_levels(where, split, download=download))

    return read


def _cifar10(split: Split) -> Callable[[str, bool], Data]:
    def read(path: str, download: bool) -> Data:
        images, labels = cifar10_levels(_given(path, "cifar10"), split, download=download)
        return _levels(images, labels, classes=list(CIFAR10_CLASSES))

    return read


def _toy(name: str) -> Callable[[str, bool], Data]:
    def draw(argument: str, download: bool) -> Data:
        if not argument.isdecimal() or int(argument) == 0:
            raise ValueError(f"{name}:{argument}: expected the number of points, {name}:10000 say")
        x, labels = TOYS[name](int(argument))
        return Data(x, labels=labels)

    return draw


def _given(path: str, name: str) -> str:
    if not path:
        raise ValueError(f"{name}: say where it is, {name}:/data/{name} say")
    return path


BUILT_IN: dict[str, Callable[[str, bool], Data]] = {
    "digits": _digits,
    "mnist": _mnist("train"),
    "mnist-test": _mnist("test"),
    "fashion-mnist": _fashion_mnist("train"),
    "fashion-mnist-test": _fashion_mnist("test"),
    "cifar10": _cifar10("train"),
    "cifar10-test": _cifar10("test"),
    **{name: _toy(name) for name in TOYS},
}
"""The data sets that `read_data` knows by name, each a function of what stands after the colon, and of whether to
download: "digits" is all of them; "fashion-mnist" and others without "-test" what there is to train on."""


# --- by name or from the disk ----------------------------------------------------------------------------------------


def read_data(
    source: str | Path,
    *,
    labels: bool = False,
    size: int | tuple[int, int] | None = None,
    mode: Mode | None = None,
    background: str | None = None,
    skip: bool | Collection[str] = False,
    download: bool = False,
) -> Data:
    """Data by its name or from the disk, all in memory.

    Args:
        source: a name in `BUILT_IN`, alone or with its argument after a colon:

            - digits, fashion-mnist, fashion-mnist-test (Debian's package);
            - mnist:FOLDER, fashion-mnist:FOLDER, cifar10:FOLDER (or its archive), each also as mnist-test:FOLDER;
            - two-moons:N and the other `TOYS`: N points, from seed 0.

            Or a file .npy; a file .npz or .safetensors with one array, or with one named "images"; or a folder of
            images, with all that is in its folders (`ImageFolder`). Files are taken as they are: integers are raw
            levels, (N, C, H, W) say, and floating-point data are data, and finite. (Integers of 16 and 32 bits
            without a sign get one, and twice the bits: torch hardly computes with them.)
        labels: from files too: the array "labels", or the names of a folder's folders.
        size, mode, background, skip: of a folder's images; see `ImageFolder`.
        download: a data set that is not at its FOLDER, into it.

    Raises:
        FileNotFoundError: if there is no such name, file or folder; or if a built-in data set is not installed.
        ValueError: if a file is damaged, or holds something else; the message names it. If an argument does not go with
            the source.
        ImportError: if Pillow, safetensors or scikit-learn is not installed, where it is needed.
        ConnectionError: if a download fails.
    """
    found = find_data(source, labels=labels, size=size, mode=mode, background=background, skip=skip, download=download)
    if isinstance(found, ImageFolder):
        return Data(found.batch(range(len(found))), found.names, labels=found.labels, classes=found.classes)
    return found


def find_data(
    source: str | Path,
    *,
    labels: bool = False,
    size: int | tuple[int, int] | None = None,
    mode: Mode | None = None,
    background: str | None = None,
    skip: bool | Collection[str] = False,
    download: bool = False,
) -> Data | ImageFolder:
    """As `read_data`, but a folder of images is not decoded."""
    if not str(source):
        raise ValueError("the data have no name: expected a file, a folder of images or a built-in data set")
    path, (name, _, argument) = Path(source), str(source).partition(":")
    known = source in BUILT_IN or (name in BUILT_IN and bool(argument) and not path.exists())
    if not known and path.is_dir():
        return ImageFolder(path, size=size, mode=mode, background=background, skip=skip, labels=labels)
    if not known and not path.exists():
        near = nearest(name, BUILT_IN)
        hint = "" if near is None else f"{near}, say; "
        raise FileNotFoundError(
            f"{source}: no such file or folder, nor a built-in data set ({hint}these are {', '.join(BUILT_IN)})"
        )
    if size is not None or mode is not None or background is not None or skip:
        raise ArgumentError(f"{source}: size=, mode=, background= and skip= are for a folder of images")
    if known:
        return BUILT_IN[name](argument, download)
    if path.suffix not in ARRAYS:
        raise ValueError(f"{path}: expected a .npy or .npz file, a .safetensors file, or a folder of images")
    x, y = read_arrays(path, labels)
    return Data(x, labels=y)
