"""The files of a sharded checkpoint, by torch.distributed.checkpoint in safetensors: each process writes what it holds,
and any number of processes, one included, reads what it needs.

    shard-RRRRR-model-KKKKK-of-NNNNN.safetensors     of rank R - 1, group K: network, average, ..., optimiser

Why not its own default: that has an index that is a pickle, which reading would execute. The safetensors storage says
in the header of each file, in JSON, where its tensors belong, and needs no index. Why not the whole weights in one file
beside it: gathering them costs the time and the memory that sharding is to save; `scoresde.load` reads shards as well.

A tensor is named after its group, network.body.0.weight say, and one of the optimiser's after its kind and its weight,
optimiser.exp_avg.body.0.weight.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from scoresde.errors import CheckpointError
from scoresde.training.whole_files import OPTIMISER, weights_file

__all__ = ["contents", "read_optimiser", "read_weights", "write"]

NAME = re.compile(r"shard-\d+-model-(\d+)-of-(\d+)\.safetensors")


class _Writer(HuggingFaceStorageWriter):
    """Knows, in rank 0 and at the end, the files of all processes."""

    files: list[str]

    def finish(self, metadata: Any, results: Any) -> None:
        self.files = sorted({result.storage_data.relative_path for each in results for result in each})


def write(
    folder: Path,
    networks: Mapping[str, nn.Module],
    optimiser: torch.optim.Optimizer,
    hosts: Any,
    background: bool,
) -> Callable[[], list[str]]:
    """Write networks, of which the first is the optimiser's, and the optimiser's state; every process calls it.

    Args:
        folder: where to; it exists.
        networks: file name -> network.
        optimiser: its state.
        hosts: the group of processes, on gloo, which must not be used for anything else meanwhile.
        background: whether to take a copy now and leave the writing to a thread; else what is returned writes.

    Returns:
        what waits for the end; in rank 0 it gives the files' names.
    """
    groups = {Path(name).stem: _tensors(net) for name, net in networks.items()}
    groups["optimiser"] = _slots(optimiser, next(iter(networks.values())))
    state = {f"{group}.{name}": value for group, named in groups.items() for name, value in named.items()}
    numbers = {f"{group}.{name}": i for i, group in enumerate(groups, 1) for name in groups[group]}
    writer = _Writer(str(folder), numbers, save_distributed=True)

    def rest() -> list[str]:
        try:
            if future is None:
                save(state, storage_writer=writer, process_group=hosts)
            else:
                future.result()
        except CheckpointException as error:  # no Exception
            raise OSError(f"{folder} was not written: {_reasons(error)}") from error
        return getattr(writer, "files", [])

    future: Any = async_save(state, storage_writer=writer, process_group=hosts) if background else None
    return rest


def contents(folder: Path, files: Collection[str]) -> dict[str, list[str]]:
    """For everything that a checkpoint holds, by the name that its file would have if it were whole, the files that it
    is in.

    Raises:
        CheckpointError: if the folder has shards besides these files.
    """
    if strangers := {p.name for p in folder.glob("*.safetensors")} - set(files):
        raise CheckpointError(f"{folder} has {', '.join(sorted(strangers))} besides its files: it was altered")
    found: dict[str, list[str]] = {}
    for file in sorted(files, key=lambda file: file.partition("-model-")[2]):
        if name := NAME.fullmatch(file):
            k, n = map(int, name.groups())
            found.setdefault(OPTIMISER if k == n else weights_file(None if k == 1 else k - 2), []).append(file)
    return found


def read_weights(folder: Path, files: Collection[str], name: str, net: nn.Module) -> None:
    """Load weights into a network, whole or sharded.

    Args:
        folder: of the checkpoint.
        files: those that they are in, by `contents`; no other is opened.
        name: of the weights.
        net: the network.

    Raises:
        CheckpointError: if they do not fit.
    """
    _read(folder, files, _stored(folder, files), Path(name).stem, _tensors(net))


def read_optimiser(folder: Path, files: Collection[str], optimiser: torch.optim.Optimizer, net: nn.Module) -> None:
    """Load the optimiser's state, whole or sharded as its network is.

    Args:
        folder: of the checkpoint.
        files: those that it is in, by `contents`; no other is opened.
        optimiser: whose state it is to be.
        net: its network.

    Raises:
        CheckpointError: if it does not fit.
    """
    stored, wanted = _stored(folder, files), {}
    state: dict[int, dict[str, Tensor]] = {}
    parameters = dict(net.named_parameters())
    numbers = {name: i for i, name in enumerate(parameters)}
    for key, (size, dtype) in stored.items():
        group, _, rest = key.partition(".")
        slot, _, name = rest.partition(".")
        if group == "optimiser" and (parameter := parameters.get(name)) is not None:
            like = parameter.detach()
            slots = state.setdefault(numbers[name], {})
            slots[slot] = wanted[rest] = (
                torch.zeros_like(like, dtype=dtype) if size == like.shape else torch.zeros(size, dtype=dtype)
            )
    _read(folder, files, stored, "optimiser", wanted)
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


def _tensors(net: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that are saved, by name; one that has several names by its first."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, value in net.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise TypeError(f"the network's state holds {name}, {type(value).__name__}: only tensors can be saved")
        found.setdefault(id(value), (name, value.detach()))
    return dict(found.values())


def _slots(optimiser: torch.optim.Optimizer, net: nn.Module) -> dict[str, Tensor]:
    """The optimiser's tensors, by kind and weight."""
    return {
        f"{slot}.{name}": value
        for name, parameter in net.named_parameters()
        for slot, value in optimiser.state.get(parameter, {}).items()
    }


class _Files(FileSystem):
    """As if there were no others in their folder: torch's reader opens all that it sees."""

    def __init__(self, paths: list[str]) -> None:
        self._paths = paths

    def ls(self, path: str | os.PathLike[str]) -> list[str]:
        return self._paths


def _reader(folder: Path, files: Collection[str]) -> HuggingFaceStorageReader:
    found = HuggingFaceStorageReader(str(folder))
    found.fs = _Files([str(folder / file) for file in files])
    return found


def _stored(folder: Path, files: Collection[str]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shapes and types, by name."""
    from safetensors import SafetensorError

    try:
        found = _reader(folder, files).read_metadata().state_dict_metadata
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(_unreadable(folder, files, error)) from error
    return {key: (value.size, value.properties.dtype) for key, value in found.items()}  # type: ignore[union-attr]


def _read(
    folder: Path,
    files: Collection[str],
    stored: Mapping[str, tuple[torch.Size, torch.dtype]],
    group: str,
    wanted: Mapping[str, Tensor],
) -> None:
    """Fill these tensors, or the shards that they are."""
    prefix = f"{group}."
    shapes = {key.removeprefix(prefix): tuple(size) for key, (size, _) in stored.items() if key.startswith(prefix)}
    here = {name: tuple(value.shape) for name, value in wanted.items()}
    if wrong := [name for name in sorted({*shapes, *here}) if shapes.get(name) != here.get(name)]:
        told = "; ".join(f"{n}: {shapes.get(n, 'nothing')} there, {here.get(n, 'nothing')} here" for n in wrong[:4])
        raise CheckpointError(f"{folder}, {group}, does not fit this network. {told}")
    try:
        with warnings.catch_warnings():  # it tells of no_dist: each process reads what it needs, and asks no other
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            state = {prefix + name: value for name, value in wanted.items()}
            load(state, storage_reader=_reader(folder, files), no_dist=True)
    except CheckpointException as error:
        raise CheckpointError(_unreadable(folder, files, _reasons(error))) from error


def _unreadable(folder: Path, files: Collection[str], why: object) -> str:
    return f"{folder}: its {', '.join(files)} cannot be read ({why})"


def _reasons(error: CheckpointException) -> str:
    return "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items())
