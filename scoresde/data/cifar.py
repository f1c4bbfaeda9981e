"""CIFAR-10 (Krizhevsky, 2009) from its archives, extracted or not; no code that a file may hold is executed.

The binary version is records of a label and 3,072 pixels. The python version is pickles: they are read with an
unpickler that knows the names of numpy's arrays only, and gives for each of them an object that does nothing but keep
what it is told.
"""

from __future__ import annotations

import io
import pickle
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from scoresde.checks import check_option
from scoresde.data.download import fetch
from scoresde.levels import scaled

__all__ = ["CIFAR10_CLASSES", "cifar10", "cifar10_levels"]

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""What the labels 0 to 9 stand for."""

Split = Literal["train", "test"]

_FILES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
_PER_FILE = 10_000
_SHAPE = (3, 32, 32)
_RECORD = 1 + 3 * 32 * 32
_ARCHIVES = ("cifar-10-binary.tar.gz", "cifar-10-python.tar.gz")
_FOLDERS = ("cifar-10-batches-bin", "cifar-10-batches-py")
_SUFFIXES = (".bin", "")

_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"  # as the data set's page publishes it


def cifar10(path: str | Path, split: Split = "train", *, download: bool = False) -> tuple[Tensor, Tensor]:
    """CIFAR-10: 50,000 photographs of ten kinds of things to train on and 10,000 to test.

    Args:
        path: one of the archives cifar-10-binary.tar.gz and cifar-10-python.tar.gz, the folder that was extracted from
            it, or a folder that holds any of these (the binary version is taken first).
        split: "train" or "test".
        download: the binary archive (162 MB) into the folder `path`, if nothing of the set is there.

    Returns:
        images: float32, shape (N, 3, 32, 32), in [-1, 1] (256 levels, level k at 2 k / 255 - 1).
        labels: int64, shape (N,), 0 to 9, of `CIFAR10_CLASSES`.

    Raises:
        FileNotFoundError: if it is not there; the message says what is expected.
        ValueError: on another split; or if a file is damaged or holds something else, naming it.
        ConnectionError: if it cannot be downloaded.
    """
    images, labels = cifar10_levels(path, split, download=download)
    return scaled(images), labels


def cifar10_levels(path: str | Path, split: Split = "train", *, download: bool = False) -> tuple[Tensor, Tensor]:
    """The images of `cifar10` as raw levels, uint8, 0 to 255, shape (N, 3, 32, 32), and the labels.

    Level 0 is at -1 and level 255 at 1 in `cifar10`. Arguments and errors: `cifar10`.
    """
    check_option(_FILES, split=split)
    path = Path(path)
    place = _find(path, split)
    if place is None and download:
        place = fetch(path / _ARCHIVES[0], [_URL], _MD5)
    if place is None:
        raise FileNotFoundError(
            f"there is no CIFAR-10 at {path}: expected {' or '.join(_ARCHIVES)}, what is extracted from it, or a "
            "folder with one of these; download fetches it"
        )
    parts = _from_folder(place, split) if place.is_dir() else _from_archive(place, split)
    images, labels = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(labels)


def _find(path: Path, split: str) -> Path | None:
    """The archive, or the folder with the files; None if there is neither."""
    if path.is_file():
        return path
    first = _FILES[split][0]
    for archive, folder, suffix in zip(_ARCHIVES, _FOLDERS, _SUFFIXES, strict=True):
        for place in (path, path / folder):
            if (place / f"{first}{suffix}").is_file():
                return place
        if (path / archive).is_file():
            return path / archive
    return None


def _from_folder(folder: Path, split: str) -> list[tuple[Tensor, Tensor]]:
    suffix, parse = (".bin", _binary) if (folder / f"{_FILES[split][0]}.bin").is_file() else ("", _python)
    paths = [folder / f"{name}{suffix}" for name in _FILES[split]]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"there is no {path.name} in {folder}: CIFAR-10 was not extracted whole")
    return [_parsed(parse, path.read_bytes(), str(path)) for path in paths]


def _from_archive(archive: Path, split: str) -> list[tuple[Tensor, Tensor]]:
    """Its files are read from where they are: nothing is extracted."""
    wanted = {f"{name}{suffix}" for name in _FILES[split] for suffix in _SUFFIXES}
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                name = Path(member.name).name
                if member.isfile() and name in wanted:
                    if member.size > 2 * _PER_FILE * _RECORD:
                        raise ValueError(f"its {name} has {member.size} bytes")
                    content = tar.extractfile(member)
                    assert content is not None  # it is a file
                    found[name] = content.read()
    except (ValueError, EOFError, OSError, tarfile.TarError, zlib.error) as error:
        raise ValueError(f"{archive} cannot be read as an archive of CIFAR-10: {error}") from error
    for suffix, parse in ((".bin", _binary), ("", _python)):
        if all(f"{name}{suffix}" in found for name in _FILES[split]):
            names = [f"{name}{suffix}" for name in _FILES[split]]
            return [_parsed(parse, found[name], f"{archive}: {name}") for name in names]
    missing = sorted(wanted - set(found))
    raise ValueError(f"{archive} cannot be read as an archive of CIFAR-10: it lacks {', '.join(missing)}")


def _parsed(parse: Callable[[bytes], tuple[Tensor, Tensor]], content: bytes, name: str) -> tuple[Tensor, Tensor]:
    try:
        images, labels = parse(content)
        if int(labels.min()) < 0 or int(labels.max()) > 9:
            raise ValueError(f"it has labels from {int(labels.min())} to {int(labels.max())}, expected 0 to 9")
    except ValueError as error:
        raise ValueError(f"{name} cannot be read as a file of CIFAR-10: {error}") from error
    return images, labels


def _binary(content: bytes) -> tuple[Tensor, Tensor]:
    if len(content) != _PER_FILE * _RECORD:
        raise ValueError(f"it has {len(content)} bytes, expected {_PER_FILE} records of {_RECORD}")
    records = torch.frombuffer(bytearray(content), dtype=torch.uint8).reshape(_PER_FILE, _RECORD)
    return records[:, 1:].reshape(_PER_FILE, *_SHAPE).clone(), records[:, 0].long()


# --- the python version ----------------------------------------------------------------------------------------------


class _Inert:
    """Stands for an array, its type or its maker: keeps the arguments and the state that the file gives, unread."""

    args: tuple[Any, ...]
    state: Any = None

    def __new__(cls, *args: Any) -> _Inert:
        self = super().__new__(cls)
        self.args = args
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Knows the names of numpy's arrays, as `_Inert`, and no other: whatever is called, it is that."""

    _KNOWN = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),  # numpy 2
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
        }
    )

    def find_class(self, module: str, name: str) -> type[_Inert]:
        if (module, name) not in self._KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which arrays and labels do not need")
        return _Inert


def _python(content: bytes) -> tuple[Tensor, Tensor]:
    try:
        batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ValueError(f"not a pickle of arrays and labels: {error}") from error
    if not isinstance(batch, dict) or not {b"data", b"labels"} <= set(batch):
        raise ValueError("it holds no dict with the entries 'data' and 'labels'")
    images, labels = _bytes_of(batch[b"data"]), batch[b"labels"]
    if not isinstance(labels, list) or len(labels) != _PER_FILE or not all(type(k) is int for k in labels):
        raise ValueError(f"its labels are no list of {_PER_FILE} whole numbers")
    if min(labels) < 0 or max(labels) > 9:
        raise ValueError(f"it has labels from {min(labels)} to {max(labels)}, expected 0 to 9")
    return images, torch.tensor(labels)


def _bytes_of(array: Any) -> Tensor:
    """The entries of numpy's array, from the state (version, shape, dtype, whether in Fortran's order, content)."""
    shape = (_PER_FILE, _RECORD - 1)
    state = getattr(array, "state", None)
    if not isinstance(state, tuple) or len(state) != 5:
        raise ValueError("its data are no array")
    _, found, dtype, fortran, content = state
    kind = dtype.args[0] if isinstance(dtype, _Inert) and dtype.args else None
    if found != shape or kind not in ("u1", b"u1") or fortran not in (False, 0) or type(content) is not bytes:
        raise ValueError(f"its data are no array of bytes of shape {shape}")
    if len(content) != shape[0] * shape[1]:
        raise ValueError(f"its data have {len(content)} bytes, expected {shape[0] * shape[1]}")
    entries: np.ndarray = np.frombuffer(bytearray(content), dtype=np.uint8)
    return torch.from_numpy(entries).reshape(_PER_FILE, *_SHAPE)
