"""Run folders: a run's checkpoints, each a folder that is written whole or not at all.

    F/checkpoints/00000500/network.safetensors      the weights as they were trained
                           average.safetensors      the averaged ones; average-1, average-2, ... of further averages
                           optimiser.pt             read as data only
                           manifest.json            what it is, what it was made for, and a hash of each other file
    F/log.csv
    F/.lock                                         while a run writes there

A sharded run has, instead of the first three, shard-RRRRR-model-KKKKK-of-NNNNN.safetensors: what process R holds of the
network, the averages (K = 1, 2, ...) and the optimiser (K = N); see `scoresde.training.shard_files`.

A checkpoint is made in a folder of another name, each file flushed to the disk and the manifest last, and then renamed.
Reading takes the newest that is whole, and says which one it had to pass over. Nothing in a file is ever executed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scoresde.errors import CheckpointError
from scoresde.training.checkpoint import check_made_for

__all__ = [
    "SHARDED",
    "WHOLE",
    "Checkpoint",
    "average_file",
    "begin",
    "check_safetensors",
    "checkpoints",
    "finish",
    "newest",
    "snapshot",
    "write_files",
]

WHOLE, SHARDED = "scoresde-run-1", "scoresde-shards-1"
KEYS = {"format", "step", "made_for", "config", "model", "progress", "versions", "files"}
NETWORK, OPTIMISER, MANIFEST = "network.safetensors", "optimiser.pt", "manifest.json"


class DamagedError(CheckpointError):
    """A checkpoint is not whole, or not one: an older one may be."""


def average_file(i: int) -> str:
    """The name of the i-th average's file."""
    return f"average-{i}.safetensors" if i else "average.safetensors"


def check_safetensors() -> None:
    """Raises ImportError, saying what to install, if safetensors is not there."""
    try:
        import safetensors.torch  # noqa: F401
    except ImportError as error:
        raise ImportError("checkpoints need safetensors: pip install scoresde[train]") from error


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files have been found to be whole.

    Attributes:
        path: its folder.
        manifest: what its manifest says.
    """

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Read the manifest, and hash the files.

        Raises:
            CheckpointError: if a file is missing, damaged, or not what it should be; the message names it.
        """
        where = path / MANIFEST
        try:
            manifest = json.loads(where.read_text())
        except (OSError, ValueError) as error:
            raise DamagedError(f"{where} cannot be read: missing, truncated or damaged ({error})") from error
        if not isinstance(manifest, dict) or manifest.get("format") not in (WHOLE, SHARDED):
            raise DamagedError(f"{where} is not the manifest of a scoresde checkpoint")
        if set(manifest) != KEYS:
            unknown, lacking = sorted(set(manifest) - KEYS), sorted(KEYS - set(manifest))
            raise CheckpointError(
                f"{where} has unknown keys {unknown} and lacks {lacking}: it is from another version, or altered"
            )
        files = manifest["files"]
        if not isinstance(files, dict) or not all(isinstance(expected, str) for expected in files.values()):
            raise DamagedError(f"{where} is damaged: its files are not names with a hash each")
        for name, expected in files.items():
            if Path(name).name != name:
                raise CheckpointError(f"{where} names a file outside its folder, {name!r}: it was altered")
            try:
                found = _sha256(path / name)
            except (OSError, ValueError) as error:
                raise DamagedError(f"{path / name} cannot be read ({error})") from error
            if found != expected:
                raise DamagedError(f"{path / name} is truncated or damaged: its hash is not the manifest's")
        return cls(path, manifest)

    def check(self, made_for: Mapping[str, Any], *, whole: bool = True) -> None:
        """Raises CheckpointError if the checkpoint was made for something other than made_for, or, unless whole is
        False, for something besides, naming each difference."""
        check_made_for(self.path, self.manifest["made_for"], made_for, whole=whole)

    def weights(self, name: str, net: nn.Module) -> None:
        """Load a file of weights into a network, whole or sharded.

        Raises:
            CheckpointError: if there is none of that name, or it does not fit.
        """
        check_safetensors()
        if self.manifest["format"] == SHARDED:
            from scoresde.training import shard_files

            return shard_files.read_weights(self, name, net)
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if name not in self.manifest["files"]:
            there = ", ".join(file for file in self.manifest["files"] if file.endswith(".safetensors"))
            raise CheckpointError(f"{self.path} has no {name}, but {there}")
        try:
            wanted = net.state_dict()
            found = load_file(self.path / name)
            net.load_state_dict({key: _laid_out(value, wanted.get(key)) for key, value in found.items()})
        except (SafetensorError, RuntimeError, OSError) as error:
            raise CheckpointError(f"{self.path / name} does not fit this network: {error}") from error

    def optimiser(self, optimiser: torch.optim.Optimizer, net: nn.Module) -> None:
        """Load the optimiser's state, whole or sharded as its network is.

        Raises:
            CheckpointError: if it is not one of tensors and numbers, or does not fit.
        """
        if self.manifest["format"] == SHARDED:
            from scoresde.training import shard_files

            return shard_files.read_optimiser(self, optimiser, net)
        path = self.path / OPTIMISER
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


def begin(folder: Path, step: int) -> Path:
    """A new folder for a checkpoint in the making; what killed runs left of theirs is removed."""
    check_safetensors()
    parent = folder / "checkpoints"
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.glob(".*.partial"):
        shutil.rmtree(left, ignore_errors=True)
    partial = parent / f".{step:08d}.{os.getpid()}.partial"
    partial.mkdir()
    return partial


def snapshot(
    folder: Path, networks: Mapping[str, nn.Module], optimiser: torch.optim.Optimizer, copied: bool
) -> Callable[[], list[str]]:
    """Writes networks, by file name, and the optimiser's state, whole.

    Args:
        folder: where to; it exists.
        networks: file name -> network.
        optimiser: its state.
        copied: whether what is written is the state of now, and not that of when it is written.

    Returns:
        what writes, and gives the files' names.
    """
    contents = {name: _tensors(net, copied) for name, net in networks.items()}
    state = _on_cpu(optimiser.state_dict()) if copied else optimiser.state_dict()

    def write() -> list[str]:
        for name, content in contents.items():
            _save(folder / name, content)
        _write(folder / OPTIMISER, lambda file: torch.save(state, file))
        return [*contents, OPTIMISER]

    return write


def finish(partial: Path, files: Iterable[str], manifest: Mapping[str, Any], keep: int) -> Path:
    """Make a checkpoint of a folder that `begin` gave and whose files are written: the manifest, the flush, the name.
    Then remove those that are too many.

    Args:
        partial: the folder.
        files: their names.
        manifest: all of it but their hashes.
        keep: how many checkpoints there are to be up to this one.

    Returns:
        its folder.
    """
    _seal(partial, files, manifest)
    step, parent = manifest["step"], partial.parent
    path = parent / f"{step:08d}"
    if path.exists():  # a damaged one, which the run has come past again
        _remove(path)
    partial.rename(path)
    _sync(parent)
    for old in [other for other in checkpoints(parent.parent) if int(other.name) <= step][keep:]:
        _remove(old)
    return path


def write_files(folder: Path, networks: Mapping[str, nn.Module], manifest: Mapping[str, Any]) -> None:
    """Write networks, by file name, and the manifest, into a folder that exists: what `Checkpoint.open` reads."""
    check_safetensors()
    for name, net in networks.items():
        _save(folder / name, _tensors(net, copied=False))
    _seal(folder, networks, manifest)


def checkpoints(folder: Path) -> list[Path]:
    """The folders of a run's checkpoints, newest first, whole or not."""
    found = (folder / "checkpoints").glob("[0-9]*")
    return sorted((p for p in found if p.name.isdigit() and p.is_dir()), key=lambda p: int(p.name), reverse=True)


def newest(path: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None if there is none at all. Of one that is passed over a warning tells.

    Args:
        path: the run folder, its folder of checkpoints, or one checkpoint's folder, which then it must be.

    Raises:
        CheckpointError: if there are some, and none is whole.
    """
    if (path / MANIFEST).exists() or (path.is_dir() and path.name.isdigit() and path.parent.name == "checkpoints"):
        return Checkpoint.open(path)
    folder = path.parent if path.name == "checkpoints" else path
    passed: list[DamagedError] = []
    for candidate in checkpoints(folder):
        try:
            found = Checkpoint.open(candidate)
        except DamagedError as error:
            passed.append(error)
            continue
        for damage in passed:
            warnings.warn(f"{damage}; the older checkpoint {candidate} is used instead", stacklevel=3)
        return found
    if passed:
        raise CheckpointError(f"no checkpoint in {folder} can be used: " + "; ".join(map(str, passed)))
    return None


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
    from safetensors.torch import save_file

    save_file(tensors, path)
    _sync(path)


def _seal(folder: Path, files: Iterable[str], manifest: Mapping[str, Any]) -> None:
    """Write the manifest, with the hashes of the files, which are written, and flush the folder."""
    text = json.dumps({**manifest, "files": {name: _sha256(folder / name) for name in files}}, indent=1) + "\n"
    _write(folder / MANIFEST, lambda file: file.write(text.encode()))
    _sync(folder)


def _on_cpu(content: Any) -> Any:
    """Containers with copies of their tensors, in main memory."""
    if isinstance(content, Tensor):
        return content.detach().to("cpu", copy=True)
    if isinstance(content, dict):
        return {key: _on_cpu(value) for key, value in content.items()}
    return [_on_cpu(value) for value in content] if isinstance(content, list) else content


def _write(path: Path, write: Callable[[Any], Any]) -> None:
    with path.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    """A file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    """Remove a checkpoint; killed on the way, it is none any more, and not a damaged one."""
    gone = path.with_name(f".{path.name}.{os.getpid()}.old.partial")
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
