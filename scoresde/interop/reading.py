"""Reads tensors out of files from elsewhere; nothing in them is ever executed."""

from __future__ import annotations

import hashlib
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scoresde.errors import CheckpointError, some

__all__ = ["fill", "hashed", "read_torch"]


def hashed(path: Path, sha256: str | None = None) -> str:
    """The sha256 of a file, in hexadecimal.

    Args:
        path: of the file.
        sha256: what it must be, or the first 8 digits of it or more.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is another.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 is not None and not (len(sha256) >= 8 and found.startswith(sha256.lower())):
        raise CheckpointError(f"{path} has sha256 {found}, not {sha256}: another file, or a damaged one")
    return found


def read_torch(path: Path) -> Any:
    """What torch.save wrote, of tensors, numbers and containers alone; its tensors stay on disk until they are read.

    Raises:
        CheckpointError: if it holds anything else, naming it, or is damaged.
    """
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format of before torch 1.6 cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"{named[1]}, which is no tensor" if named else str(error).splitlines()[0]
        raise CheckpointError(f"{path} holds {what}: it is not read, for a pickle can run code") from error
    except (EOFError, RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is no file of torch.save, or damaged: {error}") from error


def fill(net: nn.Module, tensors: Mapping[str, Tensor], path: Path | str) -> nn.Module:
    """The network with these as its parameters and buffers, without a copy, in eval mode and without gradients. It may
    have been built on the meta device.

    Raises:
        CheckpointError: if one is missing, unexpected or of another shape, naming them.
    """
    own = net.state_dict()
    missing, unexpected = [n for n in own if n not in tensors], [n for n in tensors if n not in own]
    if missing or unexpected:
        told = [f"{what} {some(names)}" for what, names in (("without", missing), ("with", unexpected)) if names]
        raise CheckpointError(f"{path} is of another network: {', '.join(told)}")
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            found, expected = tuple(tensor.shape), tuple(own[name].shape)
            raise CheckpointError(f"{path} is of another network: {name} has shape {found}, expected {expected}")
    net.load_state_dict(dict(tensors), assign=True)
    return net.eval().requires_grad_(False)
