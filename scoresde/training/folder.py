"""Run folders: a run's checkpoints, each a folder that is written whole or not at all.

    F/checkpoints/00000500/network.safetensors      the weights as they were trained
                           average.safetensors      the averaged ones; average-1, average-2, ... of further averages
                           optimiser.pt             read as data only
                           manifest.json            what it is, what it was made for, a hash of each other file and,
                                                    last, one of itself
    F/log.csv
    F/.lock                                         while a run writes there

A sharded run has, instead of the first three, shard-RRRRR-model-KKKKK-of-NNNNN.safetensors: what process R holds of the
network (K = 1), the averages (K = 2, 3, ...) and the optimiser (K = N); see `scoresde.training.shard_files`.

A checkpoint is made in a folder of another name, each file flushed to the disk and the manifest last, and then renamed.
A file is hashed before it is read, and no other is: who goes on with a run needs them all, who samples the weights that
are asked for. Reading takes the newest checkpoint of which those are whole, and says which one it had to pass over.
Nothing in a file is ever executed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scoresde.errors import CheckpointError
from scoresde.files import sealed, sync, unsealed, warn_unsealed, write_flushed
from scoresde.training import whole_files
from scoresde.training.whole_files import OPTIMISER, check_safetensors

__all__ = [
    "SHARDED",
    "WHOLE",
    "Checkpoint",
    "MismatchError",
    "begin",
    "checkpoints",
    "finish",
    "folder_of",
    "newest",
    "seal",
]

WHOLE, SHARDED = "scoresde-run-1", "scoresde-shards-1"
KEYS = {"format", "step", "made_for", "config", "model", "settings", "progress", "versions", "files"}
MANIFEST = "manifest.json"


class DamagedError(CheckpointError):
    """A checkpoint is not whole, or not one: an older one may be."""


class MismatchError(CheckpointError):
    """A checkpoint was made for something else."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, each file of which is hashed once, before it is read.

    Attributes:
        path: its folder.
        manifest: what its manifest says.
    """

    path: Path
    manifest: dict[str, Any]
    _whole: set[str] = field(default_factory=set, repr=False, compare=False)

    @classmethod
    def open(cls, path: Path, name: str | None = None) -> Checkpoint:
        """Read the manifest, and hash the files that are to be read.

        Args:
            path: the checkpoint's folder.
            name: of the weights that are wanted, by `weights_file`; None for everything.

        Raises:
            CheckpointError: if one of those files is missing, damaged, or not what it should be; the message names it.
                If there are no such weights.
        """
        where = path / MANIFEST
        try:
            manifest, whole = unsealed(where.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise DamagedError(f"{where} cannot be read: missing, truncated or damaged ({error})") from error
        if not isinstance(manifest, dict) or manifest.get("format") not in (WHOLE, SHARDED):
            raise DamagedError(f"{where} is not the manifest of a scoresde checkpoint")
        manifest.setdefault("settings", None)  # which earlier versions did not keep
        if set(manifest) != KEYS:
            unknown, lacking = sorted(set(manifest) - KEYS), sorted(KEYS - set(manifest))
            raise (CheckpointError if whole else DamagedError)(
                f"{where} has unknown keys {unknown} and lacks {lacking}: it is from another version, or altered"
            )
        if not whole:
            warn_unsealed(where)
        files = manifest["files"]
        if not isinstance(files, dict) or not all(isinstance(expected, str) for expected in files.values()):
            raise DamagedError(f"{where} is damaged: its files are not names with a hash each")
        for file in files:
            if Path(file).name != file:
                raise CheckpointError(f"{where} names a file outside its folder, {file!r}: it was altered")
        found = cls(path, manifest)
        if name is None:
            found._check_whole(files)
        else:
            found._files(name)
        return found

    def check(self, made_for: Mapping[str, Any], *, whole: bool = True, free: Collection[str] = ()) -> None:
        """Check that the checkpoint was made for that, and, if whole, for nothing besides but what is free.

        Raises:
            MismatchError: naming each difference.
        """
        theirs = {key: value for key, value in self.manifest["made_for"].items() if key not in free}
        different = [
            f"{key}: {theirs.get(key, 'nothing')} in the file, {made_for.get(key, 'nothing')} here"
            for key in (sorted({*theirs, *made_for}) if whole else made_for)
            if theirs.get(key) != made_for.get(key)
        ]
        if different:
            raise MismatchError(f"{self.path} was made for something else. " + "; ".join(different))

    def weights(self, name: str, net: nn.Module) -> None:
        """Load weights, by the name that `weights_file` gives, into a network; both may be whole or sharded.

        Raises:
            CheckpointError: if there are none of that name, they are damaged, or do not fit.
        """
        check_safetensors()
        self._kind.read_weights(self.path, self._files(name), name, net)

    def optimiser(self, optimiser: torch.optim.Optimizer, net: nn.Module) -> None:
        """Load the optimiser's state, whole or sharded as its network is.

        Raises:
            CheckpointError: if it is not one of tensors and numbers, is damaged, or does not fit.
        """
        self._kind.read_optimiser(self.path, self._files(OPTIMISER), optimiser, net)

    @property
    def _kind(self) -> Any:
        """The module that reads its files."""
        if self.manifest["format"] == WHOLE:
            return whole_files
        from scoresde.training import shard_files  # torch's distributed checkpoints take a while to import

        return shard_files

    def _files(self, name: str) -> list[str]:
        """The files of that content; they are whole."""
        contents: dict[str, list[str]] = self._kind.contents(self.path, self.manifest["files"])
        if name not in contents:
            there = ", ".join(other for other in contents if other != OPTIMISER)
            raise CheckpointError(f"{self.path} has no {name}, but {there}")
        self._check_whole(contents[name])
        return contents[name]

    def _check_whole(self, files: Iterable[str]) -> None:
        for file in files:
            if file in self._whole:
                continue
            path = self.path / file
            try:
                found = _sha256(path)
            except (OSError, ValueError) as error:
                raise DamagedError(f"{path} cannot be read ({error})") from error
            if found != self.manifest["files"][file]:
                raise DamagedError(f"{path} is truncated or damaged: its hash is not the manifest's")
            self._whole.add(file)


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
    seal(partial, files, manifest)
    step, parent = manifest["step"], partial.parent
    path = parent / f"{step:08d}"
    if path.exists():  # a damaged one, which the run has come past again
        _remove(path)
    partial.rename(path)
    sync(parent)
    for old in [other for other in checkpoints(parent.parent) if int(other.name) <= step][keep:]:
        _remove(old)
    return path


def seal(folder: Path, files: Iterable[str], manifest: Mapping[str, Any]) -> None:
    """Make a checkpoint of a folder whose files are written: the manifest, with their hashes, and the flush."""
    text = sealed({**manifest, "files": {name: _sha256(folder / name) for name in files}}, indent=1) + "\n"
    write_flushed(folder / MANIFEST, lambda file: file.write(text.encode()))
    sync(folder)


def folder_of(found: Checkpoint) -> Path:
    """The folder that says what a checkpoint's data were: that of its run; of `scoresde export`, its own."""
    return found.path.parents[1] if found.path.parent.name == "checkpoints" else found.path


def checkpoints(folder: Path) -> list[Path]:
    """The folders of a run's checkpoints, newest first, whole or not."""
    found = (folder / "checkpoints").glob("[0-9]*")
    return sorted((p for p in found if p.name.isdigit() and p.is_dir()), key=lambda p: int(p.name), reverse=True)


def newest(path: Path, name: str | None = None) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None if there is none at all. Of one that is passed over a warning tells.

    Args:
        path: the run folder, its folder of checkpoints, or one checkpoint's folder, which then it must be.
        name: of the weights that are wanted, by `weights_file`: nothing else of it need be whole, or is looked at.

    Raises:
        CheckpointError: if there are some, and none is whole.
    """
    if (path / MANIFEST).exists() or (path.is_dir() and path.name.isdigit() and path.parent.name == "checkpoints"):
        return Checkpoint.open(path, name)
    folder = path.parent if path.name == "checkpoints" else path
    passed: list[DamagedError] = []
    for candidate in checkpoints(folder):
        try:
            found = Checkpoint.open(candidate, name)
        except DamagedError as error:
            passed.append(error)
            continue
        for damage in passed:
            warnings.warn(f"{damage}; the older checkpoint {candidate} is used instead", stacklevel=3)
        return found
    if passed:
        raise CheckpointError(f"no checkpoint in {folder} can be used: " + "; ".join(map(str, passed)))
    return None


def _remove(path: Path) -> None:
    """Remove a checkpoint; killed on the way, it is none any more, and not a damaged one."""
    gone = path.with_name(f".{path.name}.{os.getpid()}.old.partial")
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
