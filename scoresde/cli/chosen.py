"""The solver that was chosen for a model and a budget, beside its run: RUN/tuned/nfe-N.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scoresde.cli.models import Model
from scoresde.denoiser import Denoiser
from scoresde.noise import derive_seed
from scoresde.training import parallel
from scoresde.tuning import TunedSolver, choose
from scoresde.variance.table import fingerprint

__all__ = ["CHOSEN", "fitting", "read", "taken"]

CHOSEN = "chosen"
"""What --solver calls it."""


def _path(model: Model, nfe: int) -> Path | None:
    return None if model.folder is None else model.folder / "tuned" / f"nfe-{nfe}.json"


def read(path: Path, denoiser: Denoiser) -> TunedSolver:
    """A solver's own file, which must have been made for this denoiser.

    Raises:
        FileNotFoundError, CheckpointError: as `TunedSolver.load`.
        ValueError: if it was made for another.
    """
    found = TunedSolver.load(path, denoiser.sde)
    found.check_model(denoiser)
    return found


def fitting(model: Model, denoiser: Denoiser, nfe: int) -> TunedSolver | None:
    """That of the model's run, if there is one for this budget and this denoiser: other guidance is another one."""
    path = _path(model, nfe)
    if path is None or not path.exists():
        return None
    found = TunedSolver.load(path, denoiser.sde)
    return found if found.model == fingerprint(denoiser) else None


def taken(
    model: Model, denoiser: Denoiser, nfe: int, cond: Mapping[str, Any], n: int, seed: int, progress: bool
) -> TunedSolver:
    """The same, and if there is none, it is chosen now, on n samples of other noise than those of the seed, and kept.

    Raises:
        ValueError: as `choose`.
    """
    if (found := fitting(model, denoiser, nfe)) is not None:
        return found
    shape = (n, *model.shape)
    found = choose(denoiser, shape, nfe=nfe, seed=derive_seed(seed, 10**9), cond=cond, progress=progress)
    path = _path(model, nfe)
    if path is not None and parallel.rank() == 0:
        path.parent.mkdir(exist_ok=True)
        found.save(path)
    return found
