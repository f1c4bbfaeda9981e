"""Reads tensors out of files from elsewhere; nothing in them is ever executed."""

from __future__ import annotations

import hashlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scoresde.checks import ArgumentError
from scoresde.errors import CheckpointError, some
from scoresde.interop.pickles import check_names
from scoresde.tensors import check_device as check_there

__all__ = ["check_dense", "check_device", "check_digest", "check_stored", "fill", "hashed", "read_torch", "state_of"]


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
        raise FileNotFoundError(
            f"{path} is a folder: expected a file" if path.is_dir() else f"{path}: there is no such file"
        )
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    check_digest(path, found, sha256)
    return found


def check_digest(path: Path | str, found: str, sha256: str | None) -> None:
    """Raises CheckpointError unless that is how the sha256 of a file begins; ArgumentError if it is none."""
    if sha256 is None:
        return
    if not (isinstance(sha256, str) and re.fullmatch("[0-9a-fA-F]{8,64}", sha256)):
        raise ArgumentError(f"sha256={sha256!r}: expected the file's, 64 hexadecimal digits, or the first 8 or more")
    if not found.startswith(sha256.lower()):
        raise CheckpointError(f"{path} has sha256 {found}, not {sha256}: another file, or a damaged one")


def check_device(device: torch.device | str | None) -> None:
    """Raises ArgumentError if a network cannot be moved there."""
    if device is None:
        return
    try:
        check_there(device)
    except (ValueError, TypeError) as error:
        raise ArgumentError(str(error)) from error
    if torch.device(device).type == "meta":
        raise ArgumentError("device='meta': it has shapes and no numbers; expected 'cpu', or an accelerator")


def read_torch(path: Path) -> Any:
    """What torch.save wrote, of tensors, numbers and containers alone; its tensors stay on disk until they are read.

    Raises:
        CheckpointError: if it holds anything else, naming it, or is damaged.
    """
    check_stored(path)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # what it cannot read it refuses
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # the format of before torch 1.6 cannot be mapped
                return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named, protocol = (re.search(pattern, str(error)) for pattern in (r"GLOBAL (\S+)", r"operand (\d+)"))
        if named is None:
            check_names(path)
        what = "what torch.save does not write of tensors alone, or damage"
        if named is not None:
            what = f"{named[1]}, which is no tensor"
        elif protocol is not None and int(protocol[1]) >= 140:  # the opcodes of protocol 4
            what = "a pickle of a later protocol than torch.save's own, 2"
        raise CheckpointError(f"{path} holds {what}: it is not read, for a pickle can run code") from error
    except Exception as error:  # whatever a damaged program does to the stack
        told = f"{type(error).__name__}: {error}" if path.stat().st_size else "it is empty"
        raise CheckpointError(f"{path} is no file of torch.save, or damaged: {told}") from error


def check_stored(path: Path) -> None:
    """Raises CheckpointError if a file is an archive of TorchScript, or one whose entries are compressed, as torch.save
    never does: a small one may unfold to any size.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if any("/code/__torch__" in entry.filename for entry in archive.infolist()):
                raise CheckpointError(f"{path} is a program of TorchScript, which is not run: save its state_dict()")
            if packed := [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]:
                raise CheckpointError(
                    f"{path} has compressed entries, {some(packed)}, which torch.save does not write: it is not read"
                )
    except (zipfile.BadZipFile, ValueError, NotImplementedError):  # none, or damaged
        return


def state_of(found: Any, path: Path | str, what: str = "a state dict") -> dict[str, Tensor]:
    """What was read, as a state dict: names and tensors of numbers.

    Raises:
        CheckpointError: if it is something else, naming the first entry that is none.
    """
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{path} holds {type(found).__name__} where {what} was expected, names and their tensors")
    for name in found:
        if not isinstance(name, str):
            raise CheckpointError(
                f"{path} holds an entry named {name!r} where {what} was expected: no name of a tensor"
            )
    check_dense(found.items(), path, what)
    return dict(found)


def check_dense(named: Iterable[tuple[Any, Any]], path: Path | str, what: str) -> None:
    """Raises CheckpointError unless they are tensors, and no larger than their numbers in the file: one number may
    stand for any size, which would be filled when it is cast.
    """
    for name, tensor in named:
        if not isinstance(tensor, Tensor):
            found = type(tensor).__name__
        elif tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            found = f"a tensor of {tensor.layout}{' on the meta device' * tensor.is_meta}, {tensor.dtype}"
        elif tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            found = f"a tensor of shape {tuple(tensor.shape)} that repeats fewer numbers"
        else:
            continue
        raise CheckpointError(f"{path}: {name} of {what} is {found}, expected a tensor of numbers")


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
        if own[name].is_floating_point() and not tensor.is_floating_point():
            raise CheckpointError(f"{path}: {name} has numbers of {tensor.dtype}, expected floating point")
    net.load_state_dict(dict(tensors), assign=True)
    return net.eval().requires_grad_(False)
