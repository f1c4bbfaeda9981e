"""Snapshots of a run's power averages, and the average of any length that follows from them: `scoresde.training.power`.

F/snapshots/checkpoints/00000500/    of a run folder F: laid out as a checkpoint, with those averages alone,
                                     never removed, and written again by a run that comes past it again
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scoresde.denoiser import NetworkDenoiser, check_denoiser
from scoresde.errors import CheckpointError
from scoresde.training import parallel
from scoresde.training.average import tensors
from scoresde.training.config import TrainConfig
from scoresde.training.folder import WHOLE, Checkpoint, begin, checkpoints, finish
from scoresde.training.layout import Layout
from scoresde.training.model import load_ema, loaded, opened
from scoresde.training.power import Profile, combination, exponent
from scoresde.training.whole_files import weights_file, write_weights

__all__ = ["averaged", "due", "write"]

MISSED = 0.1  # of the norm of a profile, from which on it is warned of


def due(config: TrainConfig, step: int) -> bool:
    """Whether a run takes a snapshot after that many steps."""
    every = config.snapshot_every or config.checkpoint_every
    return bool(config.power) and (step == config.steps or step % every == 0)


def write(
    folder: Path, step: int, networks: Mapping[str, nn.Module], layout: Layout, manifest: Mapping[str, Any]
) -> None:
    """Write a snapshot; every process calls it.

    Args:
        folder: of the run.
        step: of the run.
        networks: the power averages, by the names that they have in a checkpoint.
        layout: of the run: what is sharded is gathered.
        manifest: the rest of it.
    """
    nets = {name: layout.whole(net) for name, net in networks.items()}

    def work() -> None:
        partial = begin(folder / "snapshots", step)
        for name, net in nets.items():
            write_weights(partial / name, net)
        finish(partial, nets, {"format": WHOLE, "step": step, **manifest}, keep=sys.maxsize)

    parallel.by_first(work)


@torch.no_grad()
def averaged(run: str | Path | Checkpoint, length: float, denoiser: NetworkDenoiser | None = None) -> NetworkDenoiser:
    """The denoiser with the power average of any length, up to a run's newest checkpoint, in eval mode.

    Args:
        run: the folder of a run with TrainConfig(power=...), one of its checkpoints, or what `opened` gave.
        length: s, in (0, 12^(-1/2)].
        denoiser: built as for training, where the checkpoint does not say what it is; only copied.

    Raises:
        FileNotFoundError, CheckpointError: as `load` and `load_ema` do; if the run keeps no power averages.
        ValueError: if it is no length.

    A snapshot that is damaged, or of another run, is passed over with a warning; another says if the snapshots are too
    few for that length.
    """
    if denoiser is not None:
        check_denoiser(denoiser)
    gamma, newest = exponent(length), opened(run)
    config = TrainConfig.of(newest.manifest["config"])
    averages = {len(config.ema_decays) + i: exponent(s) for i, s in enumerate(config.power)}
    if not averages:
        raise CheckpointError(
            f"{newest.path} has no power averages to make others of: TrainConfig(power=(0.05, 0.1)) has a run keep them"
        )
    found = loaded(newest, 0) if denoiser is None else load_ema(newest, denoiser)
    assert isinstance(found.net, nn.Module)
    step = newest.manifest["step"]
    there = [(at, i, Profile(g, at.manifest["step"])) for at in [*_before(newest), newest] for i, g in averages.items()]
    x, missed = combination([profile for *_, profile in there], Profile(gamma, step))
    if missed > MISSED:
        warnings.warn(
            f"{newest.path}: {len(there)} averages up to step {step} give one of length {length} up to {missed:.2g} of "
            "its profile; TrainConfig(snapshot_every=...) takes more of them",
            stacklevel=2,
        )
    values = list(tensors(found.net))
    sums = [torch.zeros_like(value, dtype=torch.float64) for value in values]
    for share, (at, i, _) in zip(x.tolist(), there, strict=True):
        if share:
            at.weights(weights_file(i), found.net)
            for total, value in zip(sums, values, strict=True):
                total.add_(value.double(), alpha=share)
    for total, value in zip(sums, values, strict=True):
        if value.is_floating_point():  # a counter stays the last one
            value.copy_(total)
    return found


def _before(newest: Checkpoint) -> list[Checkpoint]:
    """The snapshots of the same run from before a checkpoint, the oldest first."""
    found = []
    for path in reversed(checkpoints(newest.path.parents[1] / "snapshots")):
        if int(path.name) < newest.manifest["step"]:
            try:
                snapshot = Checkpoint.open(path)
                snapshot.check(newest.manifest["made_for"])
                found.append(snapshot)
            except CheckpointError as error:
                warnings.warn(f"{error}; this snapshot is passed over", stacklevel=3)
    return found
