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

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from scoresde.errors import CheckpointError

if TYPE_CHECKING:
    from scoresde.training.folder import Checkpoint

__all__ = ["read_optimiser", "read_weights", "write"]


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


def read_weights(checkpoint: Checkpoint, name: str, net: nn.Module) -> None:
    """Load the weights that would be in the file of that name into a network, whole or sharded.

    Raises:
        CheckpointError: if there are none, or they do not fit.
    """
    group, stored = Path(name).stem, _stored(checkpoint)
    if not any(key.startswith(f"{group}.") for key in stored):
        there = ", ".join(f"{stem}.safetensors" for stem in dict.fromkeys(key.partition(".")[0] for key in stored))
        raise CheckpointError(f"{checkpoint.path} has no {name}, but {there}")
    _read(checkpoint, stored, group, _tensors(net))


def read_optimiser(checkpoint: Checkpoint, optimiser: torch.optim.Optimizer, net: nn.Module) -> None:
    """Load the optimiser's state, whole or sharded as its network is.

    Raises:
        CheckpointError: if it does not fit.
    """
    stored, wanted = _stored(checkpoint), {}
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
    _read(checkpoint, stored, "optimiser", wanted)
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


def _reader(checkpoint: Checkpoint) -> HuggingFaceStorageReader:
    """Of the files that the manifest knows and no others."""
    if strangers := {p.name for p in checkpoint.path.glob("*.safetensors")} - set(checkpoint.manifest["files"]):
        raise CheckpointError(f"{checkpoint.path} has {', '.join(sorted(strangers))} besides its files: it was altered")
    return HuggingFaceStorageReader(str(checkpoint.path))


def _stored(checkpoint: Checkpoint) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shapes and types, by name."""
    from safetensors import SafetensorError

    try:
        found = _reader(checkpoint).read_metadata().state_dict_metadata
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(_unreadable(checkpoint, error)) from error
    return {key: (value.size, value.properties.dtype) for key, value in found.items()}  # type: ignore[union-attr]


def _read(
    checkpoint: Checkpoint,
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
        raise CheckpointError(f"{checkpoint.path}, {group}, does not fit this network. {told}")
    try:
        with warnings.catch_warnings():  # it tells of no_dist: each process reads what it needs, and asks no other
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            state = {prefix + name: value for name, value in wanted.items()}
            load(state, storage_reader=_reader(checkpoint), no_dist=True)
    except CheckpointException as error:
        raise CheckpointError(_unreadable(checkpoint, _reasons(error))) from error


def _unreadable(checkpoint: Checkpoint, why: object) -> str:
    return f"{checkpoint.path}: its {', '.join(checkpoint.manifest['files'])} cannot be read ({why})"


def _reasons(error: CheckpointException) -> str:
    return "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items())
