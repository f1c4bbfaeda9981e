"""Arrays from files .npy, .npz and .safetensors: numbers only, nothing is executed."""

from __future__ import annotations

import hashlib
import math
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoresde.errors import not_finite, some
from scoresde.levels import signed

__all__ = ["ARRAYS", "digest", "read_arrays"]

ARRAYS = (".npy", ".npz", ".safetensors")

Opened = tuple[Collection[str], Callable[[str], Tensor]]
"""The names of a file's arrays, and what reads one."""

_EXPECTED = "expected integers or floating-point numbers (of these 16, 32 or 64 bits)"


def digest(x: Tensor) -> str:
    """A hash of a tensor's content."""
    content: Any = x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return f"sha256 {hashlib.sha256(content).hexdigest()[:12]}"


def read_arrays(path: Path, labels: bool = False) -> tuple[Tensor, Tensor | None]:
    """The array of a file, in the machine's byte order; and its labels on request.

    Args:
        path: a .npy file; or a .npz or .safetensors file with one array, or with one named "images".
        labels: read the array "labels" too, one whole number for each item: not from a .npy file.

    Raises:
        ValueError: if the file is damaged or holds something else; the message names it.
        ImportError: if safetensors is not installed, for its files.
    """
    opened = _open_safetensors if path.suffix == ".safetensors" else _open_numpy
    try:
        with opened(path) as (names, get):
            others = [name for name in names if name != "labels"]
            name = others[0] if len(others) == 1 else "images"
            if name not in names:
                raise ValueError(f"it holds the arrays {sorted(names)}: expected one, or one named 'images'")
            x = get(name)
            _check_items(x)
            if not labels:
                return x, None
            if "labels" not in names:
                held = f"the arrays {sorted(names)}" if any(names) else "one array without a name"
                raise ValueError(f"it holds {held}: there is none named 'labels'")
            y = get("labels")
    except (ValueError, TypeError, EOFError, OSError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read as an array of numbers: {error}") from error
    if y.is_floating_point() or y.shape != (len(x),):
        raise ValueError(f"{path}: labels are {y.dtype} of shape {tuple(y.shape)}, expected {len(x)} whole numbers")
    return x, y.long()


@contextmanager
def _open_numpy(path: Path) -> Iterator[Opened]:
    """The names of its arrays ("" of the only one in a .npy file), and what gives them."""
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            yield [""], lambda name: _read_npy(file, path.stat().st_size)
            return
        with zipfile.ZipFile(file) as members:
            places = {member.filename.removesuffix(".npy"): member for member in members.infolist()}

            def get(name: str) -> Tensor:
                with members.open(places[name]) as member:
                    return _read_npy(member, places[name].file_size)

            yield places, get


def _read_npy(file: Any, size: int) -> Tensor:
    """The array in a file's `size` bytes, whose head is believed once it is known that they suffice."""
    file.seek(0)
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:  # made for names of columns
        raise TypeError(f"its format is numpy's {'.'.join(map(str, version))}, expected 1.0 or 2.0")
    shape, _, dtype = read(file)
    if dtype.kind not in "uif" or dtype.itemsize > 8:
        raise TypeError(f"its entries are {dtype}, {_EXPECTED}")
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > size - file.tell():
        raise ValueError(f"it has {size - file.tell()} bytes, and its shape {shape} says {math.prod(shape)} entries")
    file.seek(0)
    array = np.lib.format.read_array(file, allow_pickle=False)
    return signed(torch.from_numpy(array.astype(dtype.newbyteorder("="), order="C", copy=False)))


@contextmanager
def _open_safetensors(path: Path) -> Iterator[Opened]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(f"{path} is read with safetensors: pip install scoresde[data]") from error
    try:
        with safe_open(path, framework="pt") as file:

            def get(name: str) -> Tensor:
                x: Tensor = file.get_tensor(name)
                if x.is_complex() or x.dtype == torch.bool or (x.is_floating_point() and x.itemsize == 1):
                    raise TypeError(f"its entries are {x.dtype}, {_EXPECTED}")
                return signed(x)

            yield list(file.keys()), get
    except SafetensorError as error:
        raise ValueError(error) from error


def _check_items(x: Tensor) -> None:
    """Raises ValueError unless it is some items that have axes, of finite numbers."""
    if x.ndim < 2 or x.numel() == 0:
        hint = "; (N, 1) where an item is one number" if x.ndim == 1 else ""
        raise ValueError(f"its shape is {tuple(x.shape)}, expected (N, ...), N items with axes of their own{hint}")
    if bad := not_finite(x):
        raise ValueError(f"it is not finite in items {some(bad)}")
