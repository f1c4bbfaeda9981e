"""Arrays from files .npy, .npz and .safetensors: numbers only, nothing is executed."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["ARRAYS", "digest", "read_arrays"]

ARRAYS = (".npy", ".npz", ".safetensors")


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
        names, get = opened(path)
        others = [name for name in names if name != "labels"]
        name = others[0] if len(others) == 1 else "images"
        if name not in names:
            raise ValueError(f"it holds the arrays {sorted(names)}: expected one, or one named 'images'")
        x = _checked(get(name))
        if not labels:
            return x, None
        if "labels" not in names:
            raise ValueError(f"it holds the arrays {sorted(names)}: there is none named 'labels'")
        y = _checked(get("labels"))
    except (ValueError, TypeError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read as an array of numbers: {error}") from error
    if y.is_floating_point() or y.shape != (len(x),):
        raise ValueError(f"{path}: labels are {y.dtype} of shape {tuple(y.shape)}, expected {len(x)} whole numbers")
    return x, y.long()


def _open_numpy(path: Path) -> tuple[Collection[str], Callable[[str], Any]]:
    """The names of its arrays ("" of the only one in a .npy file), and what gives them."""
    with path.open("rb") as file:  # np.load leaves a damaged one open
        found: Any = np.load(file, allow_pickle=False)
        if isinstance(found, np.lib.npyio.NpzFile):
            arrays = {name: found[name] for name in found.files if name in ("images", "labels") or _few(found.files)}
            return found.files, arrays.__getitem__
    return [""], lambda name: found


def _few(names: Collection[str]) -> bool:
    return len([name for name in names if name != "labels"]) == 1


def _open_safetensors(path: Path) -> tuple[Collection[str], Callable[[str], Any]]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(f"{path} is read with safetensors: pip install scoresde[data]") from error
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            wanted = [name for name in names if name in ("images", "labels") or _few(names)]
            tensors = {name: file.get_tensor(name) for name in wanted}
    except SafetensorError as error:
        raise ValueError(error) from error
    return names, tensors.__getitem__


def _checked(array: np.ndarray | Tensor) -> Tensor:
    """The array as a tensor.

    Raises:
        TypeError: if its entries are no real numbers.
        ValueError: if it is empty, or has no dimension.
    """
    if isinstance(array, Tensor):
        real = not array.dtype.is_complex and array.dtype != torch.bool
    else:
        real = array.dtype.kind in "uif"
    if not real:
        raise TypeError(f"its entries are {array.dtype}, expected integers or floating-point numbers")
    if array.ndim == 0 or 0 in array.shape:
        raise ValueError(f"its shape is {tuple(array.shape)}, expected (N, ...)")
    if isinstance(array, Tensor):
        return array
    return torch.from_numpy(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="))))
