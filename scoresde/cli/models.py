"""The model that a command works on: a run folder of `scoresde train`, or a denoiser of the user's own."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from scoresde.checks import check_count, one_of
from scoresde.cli.about import ABOUT, About
from scoresde.cli.common import SessionOptions
from scoresde.cli.config import CategoricalRun, DataConfig, RunConfig
from scoresde.cli.kept import CONFIG, run_settings
from scoresde.cli.options import Options, option
from scoresde.data import TrainingData
from scoresde.data.arrays import digest
from scoresde.denoiser import Denoiser
from scoresde.interop.model import Published
from scoresde.interop.source import READERS, from_source, source_of
from scoresde.networks import networks
from scoresde.pictures import is_picture
from scoresde.report import attribute, theirs
from scoresde.training.autoencoders import latent_codec
from scoresde.training.folder import Checkpoint, folder_of
from scoresde.training.identity import weights_digest
from scoresde.training.model import load_categorical, loaded, opened
from scoresde.training.whole_files import weights_file
from scoresde.wrappers import Latent

__all__ = [
    "ABOUT",
    "CONFIG",
    "NAME_HELP",
    "RUN_HELP",
    "About",
    "DenoiserOptions",
    "Model",
    "ModelOptions",
    "check_takes",
    "digest",
    "folder_of",
    "load_denoiser",
    "open_published",
    "run_config",
]

RUN_HELP = f"a run folder of `scoresde train`; or FORMAT:PATH, a network of elsewhere: {', '.join(READERS)}"
NAME_HELP = "of a FORMAT:PATH that does not say what network it is: a published one's, or a file .json of its flags"


@dataclass(frozen=True)
class Model:
    """A denoiser, and what is known of it.

    Attributes:
        denoiser: on its device, in eval mode.
        about: the data that it was trained on, as far as it is known.
        made_for: what tells it from others.
        checkpoint: that it is of, or None.
    """

    denoiser: Denoiser
    about: About
    made_for: dict[str, str]
    checkpoint: Checkpoint | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an item of what is diffused: of data, or of a latent of theirs."""
        own = self.denoiser.shape if isinstance(self.denoiser, Published) else self.about.latent
        return own or self.about.shape

    @property
    def folder(self) -> Path | None:
        """Of its run, or None."""
        return None if self.checkpoint is None else folder_of(self.checkpoint)

    @property
    def config(self) -> RunConfig | CategoricalRun | None:
        """Of its run, if it is known."""
        return run_config(self.folder) if self.folder is not None and (self.folder / CONFIG).exists() else None

    def data(self) -> DataConfig | None:
        """The data of its run, if it is known: without the files that it left out."""
        if (config := self.config) is None:
            return None
        return config.data if self.about.skipped is None else replace(config.data, skip=self.about.skipped)

    @property
    def blind(self) -> bool | None:
        """Whether its run told it nothing at times; None if that is not known."""
        return None if (config := self.config) is None else config.blind

    @property
    def background(self) -> str | None:
        """Of its run's images, where they are transparent."""
        return None if (own := self.data()) is None else own.background

    def told(
        self, source: str | None = None, measured: bool = False, classes: bool = True, captions: bool = True
    ) -> TrainingData | None:
        """The items whose conditions samples are drawn for; None if the network is told nothing but a class.

        Args:
            source: other items than those of the run.
            measured: it has what the network is told already.
            classes, captions: whether the items' classes, and captions, are wanted, too.

        Raises:
            ValueError: if there is a source and no condition, or none of the run's configuration; as `DataConfig.told`.
        """
        if measured and source is None:
            raise ValueError("--measured says what --condition-from DATA is: give that, too")
        if not self.about.conditions:
            if source is not None:
                raise ValueError(
                    f"--condition-from {source}: the model has no condition but a class (`scoresde train "
                    "--condition` makes them)"
                )
            return None
        own = self._own_data()
        own = replace(own, classes=own.classes and classes, captions=own.captions if captions else None)
        if not own.conditions and own.captions is None and not captions:
            return None
        return _told(own, source, self.about.shape, measured)

    def told_of(self, data: DataConfig) -> DataConfig:
        """The same items with what the network is told of each: its class and conditions, random ones from seed 0.

        Raises:
            ValueError: if conditions were given ("given:PATH") and these are other items; if there is none of the run's
                configuration.
        """
        data = replace(data, classes=self.about.num_classes is not None)
        if not self.about.conditions:
            return data
        own = self._own_data()
        if data.source != own.source and any(told.startswith("given:") for told in own.conditions):
            raise ValueError(f"--data {data.source}: the network is told {', '.join(own.conditions)}, known of "
                             f"{own.source} alone")  # fmt: skip
        return replace(data, condition=own.condition, captions=own.captions_of(data.source), tokens=own.tokens)

    def _own_data(self) -> DataConfig:
        if (own := self.data()) is None:
            raise ValueError(f"{self.folder} has no {CONFIG}, which says what the network is told of an item")
        return own

    def class_of(self, text: str | None, flag: str = "--class") -> int | None:
        """The number of a class, by its number or name, which the flag gave.

        Raises:
            ValueError: if there is none.
        """
        K, names = self.about.num_classes, self.about.classes or []
        if text is None or text in names:
            return None if text is None else names.index(text)
        if K is None:
            raise ValueError(f"{flag} {text}: the model has no classes (`scoresde train --classes` makes them)")
        if not text.isdecimal() or int(text) >= K:
            named = f"; by name, {one_of(text, names)}" if names else ""
            raise ValueError(f"{flag} {text}: there are {K}, 0 to {K - 1}{named}")
        return int(text)

    def labels(self, chosen: int | None, items: range) -> dict[str, Tensor]:
        """The condition of these samples: the class chosen, or the classes in turn."""
        K = self.about.num_classes
        if K is None:
            return {}
        labels = [i % K if chosen is None else chosen for i in items]
        return {"label": torch.tensor(labels, device=self.denoiser.device)}


@lru_cache(maxsize=1)  # a comparison asks for every solver
def _told(own: DataConfig, source: str | None, shape: tuple[int, ...], measured: bool) -> TrainingData:
    return own.told(source, shape, measured)


def run_config(folder: Path) -> RunConfig | CategoricalRun:
    """The configuration of a run folder."""
    settings = run_settings(folder)
    return (CategoricalRun if "process" in settings.get("model", {}) else RunConfig).of(settings)


@dataclass(frozen=True, kw_only=True)
class DenoiserOptions(Options):
    """A denoiser of the user's own."""

    denoiser: str | None = option("a Denoiser, or a function that returns one", metavar="MODULE:NAME")
    checkpoint: Path | None = option("given to that function, as its only argument", metavar="FILE", reads=True)

    def load(self, moved: torch.device | None) -> tuple[Denoiser, dict[str, str]]:
        """It, moved to a device unless that is None, and what tells it from others: as `load_denoiser` and `placed`."""
        assert self.denoiser is not None
        denoiser, made_for = load_denoiser(self.denoiser, self.checkpoint)
        return placed(denoiser, None if moved is None else str(moved)), made_for


@dataclass(frozen=True, kw_only=True)
class ModelOptions(DenoiserOptions):
    """Which model: a run folder, or --denoiser."""

    run: Path | None = option(RUN_HELP, flags=("run",), group="", nargs="?")
    name: str | None = option(NAME_HELP)
    shape: list[int] | None = option("of an item, C H W of images: with --denoiser", metavar="N", nargs="+")
    average: int = option("which averaged weights of a run (0)", 0, "I")

    def open(self, session: SessionOptions, device: torch.device, states: bool = False) -> Model:
        """The model on the session's device; one of whole states only if the command knows of them.

        Raises:
            ValueError: if none is named, or two; if its data's shape is not known.
            FileNotFoundError, CheckpointError, ImportError: as `scoresde.training.load` and `load_denoiser`.
        """
        if (self.run is None) == (self.denoiser is None):
            raise ValueError("name one model: a run folder, or --denoiser MODULE:NAME")
        if self.run is not None and source_of(self.run):
            return open_published(str(self.run), self.name, device, self.shape)
        if self.name is not None:
            raise ValueError(f"--name {self.name} is for FORMAT:PATH, a network of another toolkit")
        if self.run is not None:
            return open_run(self.run, self.average, device, self.shape, states)
        if not self.shape:
            raise ValueError("--denoiser needs --shape, that of one item: --shape 3 32 32")
        for n in self.shape:
            check_count(shape=n)
        denoiser, made_for = self.load(None if session.device is None else device)
        check_takes(self.denoiser, denoiser, tuple(self.shape))
        return Model(denoiser, About(tuple(self.shape), 256 if is_picture(self.shape) else None), made_for)


def open_run(
    path: Path,
    average: int = 0,
    device: torch.device | str = "cpu",
    shape: list[int] | None = None,
    states: bool = False,
) -> Model:
    """The model of a run folder, or of one of its checkpoints; one of whole states only if they are known of.

    Raises:
        FileNotFoundError, CheckpointError: as `scoresde.training.load`.
        ValueError: if the run does not say what its data were, and no shape is given.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such run folder")
    found = opened(path, weights_file(average))
    folder = folder_of(found)
    if "process" in (found.manifest["model"] or {}):
        if not states:
            raise ValueError(f"{path} is a run of whole states, kind 'categorical': this command steps in numbers; "
                             "sample, likelihood and export take it")  # fmt: skip
        return _of_states(found, average, device)
    denoiser: Denoiser = loaded(found, average, device)
    if (codec := latent_codec(found, device=device)) is not None:
        denoiser = Latent(denoiser, codec)
    about = About.read(folder)
    if about is None:
        if not shape:
            raise ValueError(f"{folder} does not say what its data were, no {ABOUT}: give --shape, that of one item")
        options = found.manifest["model"]["options"]
        about = About(tuple(shape), 256 if is_picture(shape) else None, options.get("num_classes"))
    weights = {
        "weights": weights_digest(networks(denoiser)),
        "sde": repr(denoiser.sde),
        "denoiser": type(denoiser).__name__,
    }
    return Model(denoiser, about, weights, found)


def _of_states(found: Checkpoint, average: int, device: torch.device | str) -> Model:
    """The model of a run of `scoresde train-categorical`."""
    if (about := About.read(folder_of(found))) is None:
        raise ValueError(f"{found.path} does not say what its data were, no {ABOUT}")
    denoiser: Any = load_categorical(found, average, device)
    weights = {"weights": weights_digest(networks(denoiser)), "process": repr(denoiser.process)}
    return Model(denoiser, about, {**weights, "denoiser": type(denoiser).__name__}, found)


def open_published(text: str, name: str | None, device: torch.device | str, shape: list[int] | None = None) -> Model:
    """The model of FORMAT:PATH, a network of another toolkit.

    Raises:
        ValueError, FileNotFoundError, CheckpointError: as `from_source`; and if neither the file nor --shape says what
            shape its items have.
    """
    model = from_source(text, name, device)
    if (items := model.data_shape or tuple(shape or ())) == ():
        raise ValueError(f"{text} does not say what shape its items have: give --shape, that of one item")
    about = About(items, 256 if is_picture(items) else None, model.about.get("classes") or None)
    return Model(model, about, {"files": json.dumps(model.about["files"], sort_keys=True), "sde": repr(model.sde)})


def is_run(path: Path) -> bool:
    """Whether it is a run folder, or a checkpoint."""
    return (path / "checkpoints").is_dir() or (path / "manifest.json").exists() or (path / CONFIG).exists()


def load_denoiser(text: str, checkpoint: Path | None = None) -> tuple[Denoiser, dict[str, str]]:
    """The denoiser that module:name is or makes, and what tells it from others: hashes of the module, the checkpoint
    and the weights.

    Raises:
        ImportError: if the module cannot be imported.
        ValueError: if it has no such name, or that is no Denoiser and makes none; if it raises something itself.
    """
    found, module = attribute("--denoiser", text)
    if isinstance(found, Denoiser) and checkpoint is not None:
        raise ValueError(f"--denoiser {text} is a Denoiser already: with --checkpoint, name a function of its path")
    if not isinstance(found, Denoiser) and callable(found):
        with theirs(f"--denoiser {text}"):
            found = found() if checkpoint is None else found(checkpoint)
    if not isinstance(found, Denoiser):
        raise ValueError(f"--denoiser {text} gives {type(found).__name__}: expected a scoresde Denoiser")
    return found, {
        "denoiser": f"{text}, {_source_digest(module)}",
        "checkpoint": "none" if checkpoint is None else sha(checkpoint.read_bytes()),
        "weights": weights_digest(networks(found)),
    }


def check_takes(text: str | None, denoiser: Denoiser, shape: tuple[int, ...]) -> None:
    """Raises ValueError, with what the network says, if --denoiser takes no item of that shape: one evaluation."""
    sde = denoiser.sde
    t = sde.snapped(torch.tensor([sde.t_max / 2], dtype=torch.float64, device="cpu"))
    with torch.no_grad(), theirs(f"--denoiser {text}, given an item of shape {shape}"):
        denoiser(torch.zeros(1, *shape, device=denoiser.device), t)


def placed(denoiser: Denoiser, device: str | None) -> Denoiser:
    """The denoiser with its network on that device, in eval mode.

    Raises:
        ValueError: if it cannot be moved there.
    """
    try:
        for net in networks(denoiser):
            net.eval()
            if device is not None:
                net.to(device)
        device = None if device is None else torch.device(device).type
    except (RuntimeError, AssertionError) as error:  # no such device, or not in this build
        raise ValueError(f"--device {device}: {error}") from error
    if device is not None and denoiser.device.type != device:
        raise ValueError(f"--device {device}: {denoiser!r} is on {denoiser.device} and has no network to move")
    return denoiser


def parameters(denoiser: Denoiser) -> int:
    """How many numbers its networks have."""
    return sum(math.prod(p.shape) for net in networks(denoiser) for p in net.parameters())


def _source_digest(module: ModuleType) -> str:
    source = inspect.getsourcefile(module)
    return "no source" if source is None else sha(Path(source).read_bytes())


def sha(content: Any) -> str:
    """A hash of bytes."""
    return f"sha256 {hashlib.sha256(content).hexdigest()[:12]}"
