"""Whether a run may go on from a checkpoint, and what will not be as it was."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from scoresde.errors import CheckpointError
from scoresde.training.config import TrainConfig
from scoresde.training.folder import Checkpoint
from scoresde.training.identity import FREE, versions

__all__ = ["check_resume"]

PROGRESS = {"losses", "evaluations", "seconds", "interval"}


def check_resume(found: Checkpoint, made_for: Mapping[str, Any], config: TrainConfig) -> None:
    """Check that a run may go on from a checkpoint. Another version, and with a cosine another number of steps, are
    warned of.

    Args:
        found: the checkpoint.
        made_for: what the run's checkpoints are made for, `identity_of_run`.
        config: of the run.

    Raises:
        CheckpointError: if it was made for something else, naming each difference, or lacks something.
    """
    found.check(made_for, free=[f"config.{name}" for name in FREE])
    manifest = found.manifest
    if set(manifest["progress"]) != PROGRESS:
        raise CheckpointError(f"{found.path} has the keys {sorted(manifest['progress'])}, expected {sorted(PROGRESS)}")
    if manifest["versions"] != versions():
        warnings.warn(
            f"{found.path} was written with {manifest['versions']}, this is {versions()}: the run goes on, but its "
            "last bits will be others",
            stacklevel=5,
        )
    if config.schedule != "constant" and (steps := manifest["config"]["steps"]) != config.steps:
        warnings.warn(
            f"{found.path} is of a run of {steps} steps, this is one of {config.steps}: from here on the learning rate "
            "goes down to zero at its end",
            stacklevel=5,
        )
