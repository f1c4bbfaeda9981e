"""`scoresde train-autoencoder`: the autoencoder of a latent diffusion, in a run folder that survives anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from scoresde.checks import ArgumentError
from scoresde.cli.common import BACKGROUND_HELP, DATA_HELP, SKIP_HELP, SessionOptions, check_folder, going_on
from scoresde.cli.config import (
    DataConfig,
    InSections,
    check_installed,
    section,
    write_toml,
)
from scoresde.cli.kept import CONFIG, settings_of
from scoresde.cli.options import Options, option, part
from scoresde.data import TrainingData
from scoresde.data.pictures import Mode
from scoresde.errors import CheckpointError
from scoresde.levels import to_levels
from scoresde.metrics.errors import psnr
from scoresde.nn import Autoencoder
from scoresde.pictures import grid, is_picture, write_png
from scoresde.training import AutoencoderConfig, AutoencoderLoss, AutoencoderTrainer, TrainConfig, parallel
from scoresde.training.folder import MismatchError
from scoresde.training.lock import held_by_first

TEXT = """train the autoencoder of a latent diffusion on images; goes on where it stopped

A KL autoencoder, or one with a codebook, by an absolute error, a perceptual distance and, with --adversarial, a
discriminator of patches. `scoresde train --codec OUT` then trains a diffusion of its latent. The same command again
goes on with the run from its last checkpoint; `scoresde train-autoencoder --out OUT` does too, and --steps may be
more."""

EXAMPLES = """
scoresde train-autoencoder --data fashion-mnist --out runs/codec
scoresde train-autoencoder --data my_folder --size 64 --factor 8 --adversarial 0.5 --start 5000 --out runs/codec
scoresde train-autoencoder --data my_folder --size 64 --kind vq --set autoencoder.options.codes=1024 --out runs/vq
scoresde train-autoencoder --data fashion-mnist --features digits --set loss.perceptual=0.1 --out runs/codec
scoresde train-autoencoder --out runs/codec                        goes on
scoresde train --data fashion-mnist --codec runs/codec --out runs/latent

files in OUT:
  config.toml     the configuration, all of it; sections data, autoencoder, loss, train
  log.csv         the loss and its parts, learning rate, speed, PSNR
  checkpoints/    the last few
  codec.json      at the end: the scale and shift of the latent, the decoder's standard deviation
  samples/        images and their reconstructions every train.evaluate_every steps"""

SECTIONS: dict[str, type[Any]] = {
    "data": DataConfig,
    "autoencoder": AutoencoderConfig,
    "loss": AutoencoderLoss,
    "train": TrainConfig,
}


@dataclass(frozen=True)
class AutoencoderRun(InSections):
    """A training run of an autoencoder."""

    sections = SECTIONS

    data: DataConfig
    autoencoder: AutoencoderConfig
    train: TrainConfig
    loss: AutoencoderLoss = field(default_factory=AutoencoderLoss)

    def __post_init__(self) -> None:
        if self.data.codec is not None:
            raise ArgumentError(
                f"data.codec={self.data.codec}: an autoencoder is of data, not of latents; leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class ShortOptions(Options):
    """Short for --set: what is parsed has the entry's name."""

    size: int | None = option("data.size, to make of a folder's images", metavar="PIXELS", dest="data.size")
    mode: Mode | None = option(
        "data.mode, to make of a folder's images: grey or colour", choices=get_args(Mode), dest="data.mode"
    )
    background: str | None = option(f"data.background, {BACKGROUND_HELP}", metavar="COLOUR", dest="data.background")
    skip: bool = option(f"data.skip=true: {SKIP_HELP}", flags=("--skip-unreadable",), dest="data.skip")
    kind: str | None = option(
        "autoencoder.autoencoder: kl or vq (kl)", choices=("kl", "vq"), dest="autoencoder.autoencoder"
    )
    latent: int | None = option(
        "autoencoder.options.latent_channels (4)", metavar="C", flags=("--latent-channels",),
        dest="autoencoder.options.latent_channels")  # fmt: skip
    features: str | None = option(
        "loss.features, of the perceptual distance: digits, fashion-mnist, a classifier's .npz, or LPIPS of files that "
        "you have, lpips:VGG16.pth,HEADS.pth (of grey images digits, else none)", dest="loss.features")  # fmt: skip
    adversarial: float | None = option(
        "loss.adversarial, weight of the discriminator's say; 0.5, say (0, none)", metavar="W", dest="loss.adversarial"
    )
    start: int | None = option("loss.start, the step from which on it has one (0)", metavar="STEP", dest="loss.start")
    steps: int | None = option("train.steps (by the device)", dest="train.steps")
    batch_size: int | None = option("train.batch_size (64)", metavar="N", dest="train.batch_size")
    lr: float | None = option("train.lr, the largest learning rate (by the device)", dest="train.lr")
    seed: int | None = option("train.seed, of everything random (0)", dest="train.seed")


@dataclass(frozen=True, kw_only=True)
class TrainAutoencoderOptions(Options):
    """The arguments of `train-autoencoder`."""

    out: Path = option("of the run", metavar="FOLDER", required=True)
    data: str | None = option(DATA_HELP, metavar="DATA", dest="data.source")
    config: Path | None = option("sections data, autoencoder, loss and train", metavar="FILE.toml", reads=True)
    factor: int | None = option("f, of how many pixels an axis a place of the latent is: 2, 4, 8, ... (4)", metavar="F")
    changes: list[str] = option(
        "an entry of the configuration, as in TOML; as often as you like", [], "SECTION.KEY=VALUE", flags=("--set",),
        action="append")  # fmt: skip
    short: ShortOptions = part("short for --set")
    session: SessionOptions


def completed(
    settings: Mapping[str, Mapping[str, Any]], data: TrainingData, factor: int | None, cpu: bool
) -> AutoencoderRun:
    """A configuration with what it leaves open chosen: the network's channels and axes by the data; f by `factor`, on a
    CPU the first two of it as a patch, with 32 features; digits' features for grey images; steps and learning rate.

    Raises:
        ValueError: as `AutoencoderRun.of`; if f is no power of two from 2 on, or does not divide the images' sizes.
    """
    found = {name: dict(settings.get(name, {})) for name in SECTIONS}
    options = dict(found["autoencoder"].get("options", {}))
    if factor is not None and (factor < 2 or factor & (factor - 1)):
        raise ValueError(f"--factor {factor}: expected a power of two, 2 at least")
    options.setdefault("image_channels", data.shape[0])
    if len(data.shape) != 3:
        options.setdefault("dims", len(data.shape) - 1)
    if "multipliers" not in options:
        patch = options.setdefault("patch", 2 if cpu else 1)
        levels = max(1, (factor or 4) // patch).bit_length()
        options["multipliers"] = [min(2**i, 4) for i in range(levels)]
    options.setdefault("channels", 32 if cpu else 64)
    found["autoencoder"]["options"] = options
    own = options.get("patch", 1) * 2 ** (len(options["multipliers"]) - 1)
    if factor not in (None, own):
        raise ValueError(f"--factor {factor}: autoencoder.options make f = {own}; leave one of them out")
    if data.shape[0] == 1 and len(data.shape) == 3:
        found["loss"].setdefault("features", "digits")
        found["loss"].setdefault("perceptual", 0.1)
    found["train"].setdefault("batch_size", 64)
    found["train"].setdefault("steps", 2000 if cpu else 20_000)
    found["train"].setdefault("lr", 1e-3 if cpu else 2e-4)
    found["train"].setdefault("evaluate_every", 1000)
    return AutoencoderRun.of(found)


def run(options: TrainAutoencoderOptions) -> None:
    """Run the command.

    Raises:
        TypeError, ValueError, ImportError, OSError, CheckpointError: if an argument or a file is wrong, before a step
            is done.
        NonFiniteLossError: if the loss is not finite.
    """
    check_installed()
    settings = settings_of(options, SECTIONS)
    check_folder(options.out)
    with options.session.start() as device:
        data_config = section(DataConfig, "data", settings["data"])
        data = data_config.open(seed=settings.get("train", {}).get("seed", 0))
        config = completed(settings, data, options.factor, device.type == "cpu")
        with held_by_first(options.out):
            trainer = prepare(config, data, options.out, device)
            if parallel.rank() == 0:
                write_toml(options.out / CONFIG, config.to_dict())
            remarks(options, trainer)
            with going_on(f"scoresde train-autoencoder --out {options.out} goes on from the last checkpoint"):
                trainer.fit(progress=not options.session.quiet, locked=True)
        if parallel.rank() == 0:
            last = trainer.evaluations[-1][1] if trainer.evaluations else {}
            print(f"{options.out}: {trainer.step} steps" + "".join(f", {k} {v:.4g}" for k, v in last.items()))


def prepare(config: AutoencoderRun, data: TrainingData, out: Path, device: torch.device) -> AutoencoderTrainer:
    """The trainer, continued from the folder's checkpoint if there is one."""
    net = config.autoencoder.build(config.train.seed).to(device)
    if net.dims == 2:
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    shown = data.batch(torch.arange(min(16, len(data)))).x
    try:
        return AutoencoderTrainer(
            net,
            replace(data, conditions=(), drop=0.0),
            config.train,
            loss=config.loss,
            folder=out,
            evaluate=Evaluation(shown.to(device), out),
            model=config.autoencoder,
            settings=config.to_dict(),
        )
    except MismatchError as error:
        raise CheckpointError(
            f"{error} (`scoresde train-autoencoder --out {out}` goes on with that run; another --out begins another)"
        ) from error


def remarks(options: TrainAutoencoderOptions, trainer: AutoencoderTrainer) -> None:
    """What is trained, on what, and from where."""
    net, steps = trainer.autoencoder, trainer.config.steps
    if trainer.step:
        what = "done" if trainer.step >= steps else "going on"
        options.session.say(f"{options.out} is at step {trainer.step} of {steps}: {what}")
    size = sum(p.numel() for p in net.parameters())
    options.session.say(
        f"{type(net).__name__}, {size / 1e6:.3g} million parameters, f = {net.factor}, on {len(trainer.data)} items, "
        f"{trainer.device}"
    )


class Evaluation:
    """PSNR of some items, and a picture: each above what becomes of it.

    Args:
        x: the items.
        out: run folder; pictures go to samples/STEP.png.
    """

    def __init__(self, x: Tensor, out: Path) -> None:
        self.x, self.out = x, out

    @torch.no_grad()
    def __call__(self, net: Autoencoder, step: int) -> dict[str, float]:
        m = net.encode(self.x)
        y = net.decode(m if isinstance(m, Tensor) else m.mean).clamp(-1, 1)
        if is_picture(self.x.shape[1:]):
            n = len(self.x)
            rows = [half for k in range(0, n, 8) for half in (self.x[k : k + 8], y[k : k + 8])]
            write_png(self.out / "samples" / f"{step:08d}.png", grid(to_levels(torch.cat(rows).cpu()), columns=8))
        return {"psnr": float(psnr(y, self.x).mean())}
