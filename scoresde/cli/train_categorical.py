"""`scoresde train-categorical`: a network of whole states on data of levels, in a run folder that survives anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scoresde.categorical import KEPT
from scoresde.cli.common import DATA_HELP, SessionOptions, check_folder, going_on
from scoresde.cli.config import CATEGORICAL, CategoricalRun, DataConfig, check_installed, check_sections, section
from scoresde.cli.config import write_toml as write
from scoresde.cli.kept import CONFIG, settings_of
from scoresde.cli.models import About
from scoresde.cli.options import Options, option, part
from scoresde.data import StateData, TrainingData
from scoresde.errors import CheckpointError
from scoresde.training import Trainer, parallel
from scoresde.training.folder import MismatchError
from scoresde.training.lock import held_by_first

TEXT = """train a network of whole states (bits, classes, few levels) on data of levels; goes on where it stopped

Levels become K states, 2 of them by a threshold at half, and a uniform or masked process takes them to noise. The
network is trained by its bound. `scoresde sample OUT`, `scoresde likelihood OUT --bound` and `scoresde export OUT` take
the run; commands that step in numbers refuse it."""

EXAMPLES = """
scoresde train-categorical --data digits --states 2 --out runs/bits
scoresde train-categorical --data fashion-mnist --states 8 --process uniform --classes --out runs/fm8
scoresde train-categorical --data rows.npy --set data.levels=5 --states 5 --steps 3000 --out runs/rows
scoresde train-categorical --out runs/bits                         goes on
scoresde sample runs/bits --solver ancestral --steps 100 --out bits.png
scoresde likelihood runs/bits --data digits --bound --out nats.json
"""


@dataclass(frozen=True, kw_only=True)
class ShortOptions(Options):
    """Short for --set: what is parsed has the entry's name."""

    process: str | None = option(
        "model.process: absorbing (a mask) or uniform (absorbing)", choices=("absorbing", "uniform"),
        dest="model.process")  # fmt: skip
    states: int | None = option("model.process_options.states, K (2)", metavar="K", dest="model.process_options.states")
    schedule: str | None = option(
        "model.process_options.schedule (linear)", choices=KEPT, dest="model.process_options.schedule"
    )
    classes: bool = option("data.classes=true: conditional on the data's classes", dest="data.classes")
    drop: float | None = option("data.drop: tell it nothing with this probability (0)", metavar="P", dest="data.drop")
    size: int | None = option("data.size, to make of a folder's images", metavar="PIXELS", dest="data.size")
    steps: int | None = option("train.steps (2000 on a CPU, 20000)", dest="train.steps")
    batch_size: int | None = option("train.batch_size (64)", metavar="N", dest="train.batch_size")
    lr: float | None = option("train.lr, the largest learning rate (0.001)", dest="train.lr")
    seed: int | None = option("train.seed, of everything random (0)", dest="train.seed")


@dataclass(frozen=True, kw_only=True)
class TrainCategoricalOptions(Options):
    """The arguments of `train-categorical`."""

    out: Path = option("of the run", metavar="FOLDER", required=True)
    data: str | None = option(DATA_HELP, metavar="DATA", dest="data.source")
    config: Path | None = option("sections data, model and train", metavar="FILE.toml", reads=True)
    changes: list[str] = option(
        "an entry of the configuration, as in TOML; as often as you like", [], "SECTION.KEY=VALUE", flags=("--set",),
        action="append")  # fmt: skip
    short: ShortOptions = part("short for --set")
    session: SessionOptions


def completed(settings: Mapping[str, Mapping[str, Any]], data: TrainingData, cpu: bool) -> CategoricalRun:
    """A configuration with what it leaves open chosen: K = 2; an MLP for vectors, else a U-Net, small on a CPU, with
    the data's channels, axes and conditions; steps and learning rate.

    Raises:
        ValueError: as `CategoricalRun.of`.
    """
    check_sections(settings, CATEGORICAL)
    found = {name: dict(settings.get(name, {})) for name in CATEGORICAL}
    model, shape = found["model"], data.shape
    process = {"states": 2, **model.get("process_options", {})}
    size = process["states"] + (model.get("process", "absorbing") == "absorbing")
    network = model.setdefault("network", "mlp" if len(shape) == 1 else "unet")
    options = dict(model.get("options", {}))
    if network == "mlp":
        options.setdefault("event_shape", [size, *shape])
    else:
        model.setdefault("preset", 8 if cpu or max(shape[1:]) <= 12 else 28)
        options.setdefault("image_channels", size * shape[0])
        if len(shape) != 3:
            options.setdefault("dims", len(shape) - 1)
    model.update(process_options=process, channels=len(shape) > 1, options={**data.network_options, **options})
    model.setdefault("time_scale", 999.0)
    train = found["train"]
    for name, value in {"steps": 2000 if cpu else 20_000, "batch_size": 64, "lr": 1e-3}.items():
        train.setdefault(name, value)
    return CategoricalRun.of(found)


def run(options: TrainCategoricalOptions) -> None:
    """Run the command.

    Raises:
        TypeError, ValueError, ImportError, OSError, CheckpointError: if an argument or a file is wrong, before a step
            is done.
        NonFiniteLossError: if the loss is not finite.
    """
    check_installed()
    settings = settings_of(options, CATEGORICAL)
    check_folder(options.out)
    with options.session.start() as device:
        data = section(DataConfig, "data", settings["data"]).open(seed=settings.get("train", {}).get("seed", 0))
        config = completed(settings, data, device.type == "cpu")
        with held_by_first(options.out):
            trainer = prepare(config, data, options.out, device)
            if parallel.rank() == 0:
                write(options.out / CONFIG, config.to_dict())
                About.of(data).write(options.out)
            if trainer.step:
                options.session.say(f"{options.out} is at step {trainer.step} of {config.train.steps}")
            options.session.say(f"{trainer.denoiser}, on {len(data)} items, {device}")
            with going_on(f"scoresde train-categorical --out {options.out} goes on from the last checkpoint"):
                trainer.fit(progress=not options.session.quiet, locked=True)
        if parallel.rank() == 0:
            loss = f", {trainer.losses[-1][1]:.5f} nats an entry" if trainer.losses else ""
            print(f"{options.out}: {trainer.step} steps{loss}")


def prepare(config: CategoricalRun, data: TrainingData, out: Path, device: torch.device) -> Trainer[Any]:
    """The trainer, continued from the folder's checkpoint if there is one."""
    denoiser = config.model.build(config.train.seed)
    assert isinstance(denoiser.net, torch.nn.Module)
    denoiser.net.to(device)
    items = StateData(data, denoiser.process.states)
    settings = config.to_dict()
    try:
        return Trainer(denoiser, items, config.train, folder=out, model=config.model, settings=settings)
    except MismatchError as error:
        raise CheckpointError(
            f"{error} (`scoresde train-categorical --out {out}` goes on with that run; another --out begins another)"
        ) from error
