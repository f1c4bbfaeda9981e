"""The files of a checkpoint, each whole: one of every network, and the optimiser's state. `shard_files` has the same
functions for those that several processes share.

What a checkpoint holds is named, here and there, after the files that it has here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scoresde.checks import check_whole
from scoresde.errors import CheckpointError
from scoresde.files import sync, write_flushed, writing

__all__ = [
    "OPTIMISER",
    "check_safetensors",
    "contents",
    "read_optimiser",
    "read_weights",
    "weights_file",
    "write",
    "write_weights",
]

OPTIMISER = "optimiser.pt"


def weights_file(average: int | None) -> str:
    """The name of an average's file, or of the network's as it was trained where that is None."""
    if average is None:
        return "network.safetensors"
    check_whole(average=average)
    return f"average-{average}.safetensors" if average else "average.safetensors"


def check_safetensors() -> None:
    """Raises ImportError, saying what to install, if safetensors is not there."""
    try:
        import safetensors.torch  # noqa: F401
    except ImportError as error:
        raise ImportError("checkpoints need safetensors: pip install scoresde[train]") from error


def write(
    folder: Path, networks: Mapping[str, nn.Module], optimiser: torch.optim.Optimizer, copied: bool
) -> Callable[[], list[str]]:
    """Write networks and the optimiser's state.

    Args:
        folder: where to; it exists.
        networks: file name -> network.
        optimiser: its state.
        copied: whether what is written is the state of now, and not that of when it is written.

    Returns:
        what writes, and gives the files' names.
    """
    weights = {name: _tensors(net, copied) for name, net in networks.items()}
    state = _on_cpu(optimiser.state_dict()) if copied else optimiser.state_dict()

    def rest() -> list[str]:
        for name, tensors in weights.items():
            _save(folder / name, tensors)
        write_flushed(folder / OPTIMISER, lambda file: torch.save(state, file))
        return [*weights, OPTIMISER]

    return rest


def write_weights(path: Path, net: nn.Module) -> None:
    """Write one network's file."""
    check_safetensors()
    _save(path, _tensors(net, copied=False))


def contents(folder: Path, files: Iterable[str]) -> dict[str, list[str]]:
    """For the name of everything that a checkpoint holds, the files that it is in."""
    return {name: [name] for name in files}


def read_weights(folder: Path, files: Collection[str], name: str, net: nn.Module) -> None:
    """Load weights into a network, whole or sharded.

    Args:
        folder: of the checkpoint.
        files: those that they are in, by `contents`.
        name: of the weights.
        net: the network.

    Raises:
        CheckpointError: if they do not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        wanted = net.state_dict()
        found = load_file(folder / name)
        net.load_state_dict({key: _laid_out(value, wanted.get(key)) for key, value in found.items()})
    except (SafetensorError, RuntimeError, OSError) as error:
        raise CheckpointError(f"{folder / name} does not fit this network: {error}") from error


def read_optimiser(folder: Path, files: Collection[str], optimiser: torch.optim.Optimizer, net: nn.Module) -> None:
    """Load the optimiser's state, whole or sharded as its network is.

    Args:
        folder: of the checkpoint.
        files: those that it is in, by `contents`.
        optimiser: whose state it is to be.
        net: its network.

    Raises:
        CheckpointError: if it is not one of tensors and numbers, or does not fit.
    """
    path = folder / OPTIMISER
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: damaged, or not a file of tensors ({error})") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds {type(found).__name__}: expected an optimiser's state")
    parameters = list(net.parameters())
    try:
        found["state"] = {
            i: {slot: _laid_out(value, parameters[i]) for slot, value in slots.items()}
            for i, slots in found["state"].items()
        }
        optimiser.load_state_dict(found)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} does not fit this network ({type(error).__name__}: {error})") from error


def _laid_out(value: Any, wanted: Any) -> Any:
    """A whole tensor as the one that it is for: this process's shard of it, if that is sharded and of its shape."""
    if not isinstance(value, Tensor) or not hasattr(wanted, "placements") or value.shape != wanted.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    # Every process has read the whole, so nothing has to be sent.
    return distribute_tensor(value, wanted.device_mesh, wanted.placements, src_data_rank=None)


def _tensors(net: nn.Module, copied: bool) -> dict[str, Tensor]:
    """A state_dict as safetensors takes it: contiguous, each with memory of its own; if copied, not the network's."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in net.state_dict().items():
        if not isinstance(value, Tensor):
            raise TypeError(f"the network's state holds {name}, {type(value).__name__}: only tensors can be saved")
        tensor = value.detach().cpu().contiguous()
        shared = copied and tensor.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
        if shared or tensor.untyped_storage().data_ptr() in seen or tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        found[name] = tensor
    return found


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        with writing(path):
            save_file(tensors, path)
            sync(path)
    except SafetensorError as error:  # a full disk, say
        raise OSError(f"{path} was not written: {error}") from error


def _on_cpu(content: Any) -> Any:
    """Containers with copies of their tensors, in main memory."""
    if isinstance(content, Tensor):
        return content.detach().to("cpu", copy=True)
    if isinstance(content, dict):
        return {key: _on_cpu(value) for key, value in content.items()}
    return [_on_cpu(value) for value in content] if isinstance(content, list) else content
