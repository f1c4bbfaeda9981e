"""`scoresde train`: a network on data, in a run folder that survives anything."""

from __future__ import annotations

import json
import math
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from scoresde.cli.common import BACKGROUND_HELP, DATA_HELP, SKIP_HELP, SessionOptions, check_folder, going_on
from scoresde.cli.config import (
    SECTIONS,
    DataConfig,
    EvaluateConfig,
    LossConfig,
    RunConfig,
    check_installed,
    section,
    write_toml,
)
from scoresde.cli.defaults import CHOSEN, chosen, completed
from scoresde.cli.drawing import Recipe, draw
from scoresde.cli.kept import CONFIG, mismatch, settings_of
from scoresde.cli.latents import items_of
from scoresde.cli.measuring import features_of, reference_of
from scoresde.cli.models import About, Model, parameters
from scoresde.cli.options import Options, option, part
from scoresde.codecs import Codec
from scoresde.data import Given, TrainingData
from scoresde.data.pictures import Mode
from scoresde.denoiser import Denoiser, NetworkDenoiser
from scoresde.diagnose import left_of_data
from scoresde.errors import NonFiniteError
from scoresde.levels import rounded, to_levels
from scoresde.metrics import check_space, evaluate
from scoresde.pictures import grid, write_png
from scoresde.processes import SDES
from scoresde.solvers.catalogue import solver_of
from scoresde.training import LatentData, Trainer, parallel, two_term_loss
from scoresde.training.folder import MismatchError
from scoresde.training.lock import held_by_first
from scoresde.training.loss import Draws
from scoresde.training.step import Loss, check_trainable
from scoresde.wrappers import Clip, Latent

TEXT = """train a network on images, vectors or a built-in data set; goes on where it stopped

Everything about a run can be left to its defaults, written in a TOML file (--config), or set one by one (--set); the
whole configuration is kept in OUT/config.toml. The same command again goes on with the run from its last checkpoint, on
any number of processes (torchrun); `scoresde train --out OUT` does too, and --steps may be more. What is left open is
chosen for the data and the device, and said."""

EXAMPLES = """
scoresde train --data my_folder --size 32 --out runs/mine          a folder of images, cropped and resized
scoresde train --data fashion-mnist --classes --out runs/fm        a network conditional on the class
scoresde train --data two-moons:10000 --steps 3000 --out runs/moons
scoresde train --data cifar10:/data/cifar --set data.download=true --set data.flip=true --out runs/cifar
scoresde train --config run.toml --set train.steps=3000 --set model.options.channels=64 --out runs/small
scoresde train --data fashion-mnist --set evaluate.data=fashion-mnist-test --out runs/fm     Frechet distance on the way
scoresde train --data my_folder --size 64 --set train.precision=bfloat16 --set train.compile=true --out runs/mine
scoresde train --data my_folder --size 64 --condition super-resolution:4 --out runs/sr     details of small images
scoresde train --data fashion-mnist --codec runs/codec --out runs/latent     a diffusion of an autoencoder's latents
scoresde train --data fashion-mnist --classes --drop 0.1 --out runs/guided     for guidance without a classifier
scoresde train --data my_folder --size 64 --captions my_folder/captions.csv --drop 0.1 --out runs/text      from text
torchrun --nproc-per-node=4 -m scoresde train --data my_folder --size 64 --out runs/mine
torchrun --nproc-per-node=8 -m scoresde train --config large.toml --set train.shard=true --out runs/large
scoresde train --out runs/mine                                     goes on
"""

FILES = """files in OUT:
  config.toml     the configuration, all of it; sections data, model, loss, train, evaluate
  log.csv         loss, learning rate, speed and metrics
  threads.json    of a CPU, as they were chosen: train.threads
  checkpoints/    the last few; `scoresde sample OUT` and `scoresde.load(OUT)` read the newest
  codec/          with --codec: the autoencoder; and latents/, the data as it encodes them
  samples/        a grid of samples every train.evaluate_every steps (images)"""


@dataclass(frozen=True, kw_only=True)
class ShortOptions(Options):
    """Short for --set: what is parsed has the entry's name."""

    classes: bool = option("data.classes=true: conditional on the data's classes", dest="data.classes")
    condition: str | None = option(
        "data.condition, an image that the network is told of: super-resolution:4, "
        "augmented-super-resolution:4:0.5, inpainting, uncropping, "
        "colourisation, jpeg:5-30, several of these with + between (one of them for each item), or given:PATH, one for "
        "each item",
        metavar="TASK",
        dest="data.condition",
    )
    captions: str | None = option(
        "data.captions, what is said of each item, which the network reads: a file .txt, .csv or .jsonl, or a folder "
        "that has one",
        metavar="FILE",
        dest="data.captions",
    )
    tokens: str | None = option(
        "data.tokens of captions: bytes, words (by the library tokenizers), or hf:NAME, an encoder of Hugging Face "
        "(bytes)",
        dest="data.tokens",
    )
    codec: str | None = option(
        "data.codec, a run of `scoresde train-autoencoder`: what is diffused are the items' latents, encoded once; the "
        "run has a copy of it",
        metavar="FOLDER",
        dest="data.codec",
    )
    drop: float | None = option("data.drop: tell it nothing with this probability (0)", metavar="P", dest="data.drop")
    size: int | None = option("data.size, to make of a folder's images", metavar="PIXELS", dest="data.size")
    mode: Mode | None = option(
        "data.mode, to make of a folder's images: grey or colour", choices=get_args(Mode), dest="data.mode"
    )
    background: str | None = option(f"data.background, {BACKGROUND_HELP}", metavar="COLOUR", dest="data.background")
    skip: bool = option(f"data.skip=true: {SKIP_HELP}", flags=("--skip-unreadable",), dest="data.skip")
    steps: int | None = option("train.steps (by the number of items, and the device)", dest="train.steps")
    batch_size: int | None = option("train.batch_size (64)", metavar="N", dest="train.batch_size")
    lr: float | None = option("train.lr, the largest learning rate (by the network's size)", dest="train.lr")
    preset: str | None = option(
        "model.preset: 8, 28, 32 or 64, the size of the network (by the images, and the device)",
        dest="model.preset",
    )
    sde: str | None = option(f"model.sde: {', '.join(SDES)} (vp)", dest="model.sde")
    predicts: str | None = option(
        "model.predicts: eps, v, x0, score, velocity or edm (by the SDE)", dest="model.predicts"
    )
    seed: int | None = option("train.seed, of everything random (0)", dest="train.seed")


@dataclass(frozen=True, kw_only=True)
class TrainOptions(Options):
    """The arguments of `train`."""

    out: Path = option("of the run", metavar="FOLDER", required=True)
    data: str | None = option(DATA_HELP, metavar="DATA", dest="data.source")
    config: Path | None = option("sections data, model, loss, train and evaluate", metavar="FILE.toml", reads=True)
    changes: list[str] = option(
        "an entry of the configuration, as in TOML; as often as you like", [], "SECTION.KEY=VALUE", flags=("--set",),
        action="append")  # fmt: skip
    short: ShortOptions = part("short for --set")
    session: SessionOptions

    @classmethod
    def flags(cls, **changes: Any) -> dict[str, str]:
        """With --set for what has no flag of its own."""
        entries = {f.name: f"--set {name}.{f.name}=" for name, kind in SECTIONS.items() for f in fields(kind)}
        return entries | super().flags(**changes)


def _keys() -> str:
    """What --set and --config can say."""
    lines = ["keys of --set and --config, with their defaults where these do not depend on the data:"]
    for name, kind in SECTIONS.items():
        plain = [f.name for f in fields(kind) if f.default in (MISSING, None) or f"{name}.{f.name}" in CHOSEN]
        keys = [f.name if f.name in plain else f"{f.name}={json.dumps(f.default)}" for f in fields(kind)]
        text = ", ".join(keys)
        lines += textwrap.wrap(text, 118, initial_indent=f"  {name:9s} ", subsequent_indent=" " * 12)
    return "\n".join(lines)


EXAMPLES += f"\n{FILES}\n\n{_keys()}"


def run(options: TrainOptions) -> None:
    """Run the command.

    Raises:
        TypeError, ValueError, ImportError, OSError, CheckpointError: if an argument or a file is wrong, before a step
            is done.
        NonFiniteLossError: if the loss is not finite.
    """
    check_installed()
    settings = settings_of(options, SECTIONS)
    check_folder(options.out)
    data_config = section(DataConfig, "data", settings["data"])
    with options.session.start() as device:
        data_config = replace(data_config, skip=left_out(data_config, options))
        data = data_config.open(seed=settings.get("train", {}).get("seed", 0))
        with held_by_first(options.out):  # what another run is at is neither read nor written
            items = items_of(data_config, data, options.out, device, options.session.progress)
            config = completed(settings, items, device.type == "cpu")
            trainer = prepare(config, data, items, options.out, device)
            if parallel.rank() == 0:
                write_toml(options.out / CONFIG, config.to_dict())
                about_of(data, items).write(options.out)
            remarks(options, config, trainer, device, chosen(settings, config))
            again = f"scoresde train --out {options.out} goes on from the last checkpoint"
            with going_on(again):
                trainer.fit(progress=not options.session.quiet, locked=True)
        if parallel.rank() == 0:
            print(summary(trainer, options.out))


def left_out(data: DataConfig, options: TrainOptions) -> bool | tuple[str, ...]:
    """The files that a run leaves out of its data: those of its first session, else what the first process finds."""
    if data.skip is not True:
        return data.skip
    if (about := About.read(options.out)) is not None and about.skipped is not None:
        return about.skipped
    found = parallel.by_first(lambda: data.skipped() if parallel.rank() == 0 else {})
    if found:
        options.session.say("\n".join([f"{len(found)} files of {data.source} are left out:", *found.values()]))
    return tuple(found)


def about_of(data: TrainingData, items: TrainingData | LatentData) -> About:
    """What a run says of its data."""
    return About.of(data, items.shape if isinstance(items, LatentData) else None)


def prepare(
    config: RunConfig, data: TrainingData, items: TrainingData | LatentData, out: Path, device: torch.device
) -> Trainer:
    """The trainer, continued from the folder's checkpoint if there is one; `items` are what it is trained on, the data
    or their latents."""
    denoiser = config.model.build(config.train.seed)
    assert isinstance(denoiser.net, nn.Module)
    try:
        check_trainable(denoiser)
    except ValueError as error:
        hint = f"--predicts {denoiser.sde.customary_prediction}, say, or a smaller --set model.sde_options.t_max"
        raise ValueError(f"--sde {config.model.sde} --predicts {config.model.predicts}: {error} ({hint})") from error
    if not (config.train.shard and parallel.world() > 1):  # FSDP2 moves a shard of it
        denoiser.net.to(device)
    if len(items.shape) == 3:
        denoiser.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a tenth faster on a CPU
    evaluation = Evaluation.of(config, data, items, out, device)
    if isinstance(items, TrainingData) and device.type == "cuda" and isinstance(items.x, torch.Tensor):
        items = items.to(device) if items.x.nbytes < 2**31 and not items.lazy else items
    loss: dict[str, Any] = {"weighting": config.loss.weight(config.model.sigma_data), "times": config.loss.sampler()}
    try:
        return Trainer(
            denoiser,
            items,
            config.train,
            **({"loss": two_terms(config.loss, data.num_classes, loss)} if config.loss.unconditional else loss),
            folder=out,
            evaluate=evaluation,
            model=config.model,
            settings=config.to_dict(),
        )
    except MismatchError as error:
        raise mismatch(error, out, config) from error


def two_terms(config: LossConfig, num_classes: int | None, options: Mapping[str, Any]) -> Loss:
    """What loss.unconditional asks for; a checkpoint knows it by its name."""

    def train(denoiser: Denoiser, x0: torch.Tensor, draws: Draws, cond: Mapping[str, Any]) -> torch.Tensor:
        run: dict[str, Any] = {"unconditional": config.unconditional, "num_classes": num_classes, "generator": draws}
        return two_term_loss(denoiser, x0, cond, **run, **options)

    train.__name__ = f"two terms of {config}"
    return train


def remarks(
    options: TrainOptions, config: RunConfig, trainer: Trainer, device: torch.device, chosen: list[str]
) -> None:
    """What is trained, on what, and from where; and what was chosen for that."""
    if trainer.step:
        what = "done" if trainer.step >= config.train.steps else "going on"
        options.session.say(f"{options.out} is at step {trainer.step} of {config.train.steps}: {what}")
    size = parameters(trainer.denoiser)
    items = trainer.data if isinstance(trainer.data, TrainingData | LatentData) else None
    what = " as latents" * isinstance(items, LatentData)
    what += "" if items is None or items.num_classes is None else f" of {items.num_classes} classes"
    options.session.say(
        f"{trainer.denoiser}, {size / 1e6:.3g} million parameters, on {len(trainer.data)} items{what}, {device}"
    )
    if chosen:
        options.session.say(
            f"chosen for {len(trainer.data)} items on {device.type}: {' '.join(chosen)} (--set changes it)"
        )
    if items is not None and (left := left_of_data(trainer.denoiser.sde, items.std(64))):
        options.session.say(left)
    if device.type == "cpu" and size > 10e6:
        options.session.say("this network is large for a CPU: without --preset, a small one is chosen")


def summary(trainer: Trainer, out: Path) -> str:
    """What came of it."""
    text = f"{out}: {trainer.step} steps"
    if trainer.losses:
        text += f", loss {trainer.losses[-1][1]:.5f}"
    if trainer.evaluations:
        text += "".join(f", {name} {value:.4g}" for name, value in trainer.evaluations[-1][1].items())
    return text


class Evaluation:
    """What is drawn and measured during a run: a `scoresde.training.trainer.Evaluate`.

    Args:
        config: what.
        about: the training data.
        told: items with their conditions, where the network is told some.
        out: run folder; pictures go to samples/STEP.png.
        reference, features: of the metrics, or None for none.
        codec: of a run on latents, else None.
    """

    def __init__(
        self,
        config: EvaluateConfig,
        about: About,
        told: TrainingData | None,
        out: Path,
        reference: Any,
        features: Any,
        codec: Codec | None,
    ) -> None:
        self.config, self.about, self.told, self.out = config, about, told, out
        self.reference, self.features, self.codec = reference, features, codec
        self.solver = solver_of(config.solver)

    @classmethod
    def of(
        cls,
        config: RunConfig,
        data: TrainingData,
        items: TrainingData | LatentData,
        out: Path,
        device: torch.device,
    ) -> Evaluation | None:
        """None if there is nothing to do. Everything is read here, before a step is done."""
        about, wanted = about_of(data, items), config.evaluate
        codec = items.codec if isinstance(items, LatentData) else None
        if codec is not None and wanted.clip:
            raise ValueError("evaluate.clip = true is for images in [-1, 1], and this is a run on latents")
        solver_of(wanted.solver)
        if not about.pictures or wanted.grid == 0:
            wanted = replace(wanted, grid=0)
        told = replace(data, flip=False, drop=0.0) if data.conditions else None
        if wanted.data is None:
            return cls(wanted, about, told, out, None, None, codec) if wanted.grid else None
        reference = reference_of(replace(config.data.plain().beside(wanted.data), classes=False))
        if len(reference) < 12:
            raise ValueError(f"evaluate.data {wanted.data} has {len(reference)} items: expected 12 at least")
        if tuple(reference.shape[1:]) != about.shape:
            raise ValueError(f"evaluate.data {wanted.data}: items {tuple(reference.shape[1:])}, not {about.shape}")
        if told is not None and not any(isinstance(condition, Given) for condition in data.conditions):
            told = config.data.told(wanted.data)
        features = features_of(wanted.features, wanted.data, reference, device)
        check_space(wanted.metrics, features)
        return cls(wanted, about, told, out, reference, features, codec)

    def __call__(self, denoiser: NetworkDenoiser, step: int) -> dict[str, float]:
        """A picture of samples, and metrics by name."""
        whole: Denoiser = denoiser if self.codec is None else Latent(denoiser, self.codec)
        config, model = self.config, Model(whole, self.about, {})
        shown = Clip(whole) if config.clip else whole
        made = Recipe(model, shown, self.solver, {}, config.seed, told=self.told)
        if not self.solver.adaptive:
            made = replace(made, options={"nfe": config.nfe})
        n = max(config.grid, config.n if self.reference is not None else 0)
        try:
            x = torch.cat([part for _, part in draw(made, range(n), config.batch_size, progress=False)])
        except NonFiniteError as error:
            print(f"\nscoresde: no picture and metrics of step {step}: {error}", file=sys.stderr)
            return {}
        if config.grid:
            write_png(self.out / "samples" / f"{step:08d}.png", grid(to_levels(x[: config.grid])))
        if self.reference is None:
            return {}
        x = rounded(x[: config.n]) if self.about.pictures else x[: config.n]
        found = evaluate(x, self.reference, config.metrics, self.features, halves=0, floors=0)
        return {name: score.value for name, score in found.scores.items() if math.isfinite(score.value)}
