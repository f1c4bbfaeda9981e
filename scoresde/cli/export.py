"""`scoresde export`: a trained model to give away."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from scoresde.cli.models import ABOUT, CONFIG, folder_of
from scoresde.cli.options import Options, option
from scoresde.training.autoencoders import CODEC_FOLDER, export_codec
from scoresde.training.export import DTYPES, export
from scoresde.training.model import opened
from scoresde.training.whole_files import weights_file

TEXT = """write a run's averaged weights into a folder to give away, without what only training needs

The commands and `scoresde.load` take the folder as they take the run. It has no optimiser and no other averages, and so
is a quarter of a checkpoint's size or less, and cannot be trained on. Beside the weights are the run's config.toml and
data.json, which say what it was trained on."""

EXAMPLES = """
scoresde export runs/fm --out fashion-mnist
scoresde export runs/fm --out fashion-mnist-small --dtype float16          half the size; it is computed in float32
scoresde export runs/fm --out fashion-mnist-long --length 0.15             an average of another length (train.power)
"""


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Options):
    """The arguments of `export`."""

    run: Path = option("a run folder of `scoresde train`, or one of its checkpoints", flags=("run",))
    out: Path = option("which must not exist", metavar="FOLDER", required=True)
    average: int = option("which averaged weights (0)", 0, "I")
    length: float | None = option(
        "the power average of that length instead, of a run with train.power: its snapshots give any", None, "S"
    )
    dtype: str = option("of the file (float32)", "float32", choices=DTYPES)


def run(options: ExportOptions) -> None:
    """Run the command.

    Raises:
        ValueError, ImportError, OSError, CheckpointError: if an argument or a file is wrong.
    """
    if not options.run.exists():
        raise FileNotFoundError(f"{options.run}: there is no such run folder")
    found = opened(options.run, weights_file(options.average))
    folder = folder_of(found)
    out = export(found, options.out, average=options.average, dtype=options.dtype, length=options.length)
    for name in (CONFIG, ABOUT):
        if (folder / name).exists():
            shutil.copy(folder / name, out / name)
    if (folder / CODEC_FOLDER).exists():
        export_codec(folder / CODEC_FOLDER, out / CODEC_FOLDER)
    size = sum(path.stat().st_size for path in out.rglob("*"))
    print(f"{out}: {size / 1e6:.1f} MB, {options.dtype}")
