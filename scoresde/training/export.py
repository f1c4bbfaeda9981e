"""A trained model to give away: a checkpoint of averaged weights alone, a few files that `scoresde.load` reads."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from torch import nn

from scoresde.checks import check_option
from scoresde.errors import CheckpointError
from scoresde.training.folder import WHOLE, Checkpoint, seal
from scoresde.training.model import built, opened
from scoresde.training.snapshots import averaged
from scoresde.training.whole_files import weights_file, write_weights

__all__ = ["DTYPES", "export"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def export(
    run: str | Path | Checkpoint,
    out: str | Path,
    *,
    average: int = 0,
    dtype: str = "float32",
    length: float | None = None,
) -> Path:
    """Write the averaged weights of a run into a folder of their own, without what only training needs.

    Args:
        run: as `scoresde.load` takes it.
        out: the folder, which must not exist.
        average: which of the averages.
        dtype: of the file: "float32", "float16" or "bfloat16". What is loaded from it is float32 again, with numbers of
            11 and 8 significant bits.
        length: of the power average to write instead, whether the run kept it or it is to be made of its snapshots; see
            `scoresde.training.snapshots.averaged`. The manifest's progress says it.

    Returns:
        the folder, for `scoresde.load(out)` and `scoresde sample OUT`.

    Raises:
        FileExistsError: if `out` exists.
        FileNotFoundError, CheckpointError: as `scoresde.load` does; if a weight is too large for the dtype.
        ValueError: on another dtype; if it is no length.
    """
    check_option(DTYPES, dtype=dtype)
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists: give another folder, or remove it")
    found = opened(run, weights_file(average))
    denoiser = built(found, average) if length is None else averaged(found, length)
    assert isinstance(denoiser.net, nn.Module)
    net = denoiser.net.to(DTYPES[dtype])
    progress = {**found.manifest["progress"], **({} if length is None else {"length": length})}
    if bad := [name for name, value in net.state_dict().items() if not bool(value.isfinite().all())]:
        raise CheckpointError(f"{dtype} cannot hold the weights of {', '.join(bad)}")
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        write_weights(partial / weights_file(0), net)
        seal(partial, [weights_file(0)], {**found.manifest, "format": WHOLE, "progress": progress})
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return out
