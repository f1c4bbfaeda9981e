"""What samples are measured by: real data, and a feature space by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor

from scoresde.checks import nearest
from scoresde.cli.common import BACKGROUND_HELP, DATA_HELP, SKIP_HELP, SessionOptions
from scoresde.cli.config import DataConfig
from scoresde.cli.models import Model
from scoresde.cli.options import Options, option, part
from scoresde.data.pictures import Mode
from scoresde.data.training import Batch
from scoresde.metrics import METRICS, PCA, Pixels, RandomFeatures, check_space, classifier_features, inception
from scoresde.metrics.classifier import WEIGHTS
from scoresde.metrics.evaluate import least_size
from scoresde.report import attribute, theirs

__all__ = [
    "FEATURES_HELP",
    "DataOptions",
    "Measure",
    "MeasureOptions",
    "check_measurable",
    "features_of",
    "items_of",
    "measures",
    "reference_of",
]

FEATURES_HELP = (
    "digits or fashion-mnist (classifiers of this package), a classifier's file .npz, random (two random layers), "
    "pixels, pca:N, inception, or MODULE:NAME, a function of a batch (the data's own, where there is one; else random)"
)


@dataclass(frozen=True, kw_only=True)
class DataOptions(Options):
    """Which data, and what is made of a folder's images."""

    data: str | None = option(
        f"real data, best such as were not trained on (what the run was trained on): {DATA_HELP}", metavar="DATA"
    )
    size: int | None = option("to make of a folder's images", metavar="PIXELS")
    mode: Mode | None = option("to make of a folder's images: grey or colour", choices=get_args(Mode))
    background: str | None = option(BACKGROUND_HELP, metavar="COLOUR")
    skip: bool = option(SKIP_HELP, flags=("--skip-unreadable",))
    levels: int | None = option("of whole numbers (256, or a built-in data set's own)", metavar="L")
    download: bool = option("a data set that is not at its PATH, into it")

    def config(self, default: DataConfig | None, source: str | None = None) -> DataConfig:
        """What --data, or `source`, names; by default the data of the model's run.

        Raises:
            ValueError: if there is neither.
        """
        source = self.data if source is None else source
        if source is None:
            if default is None:
                raise ValueError("give --data")
            for name in self.given("size", "mode", "background"):
                raise ValueError(f"--{name} is for the images of --data: give that, too")
            own = default.plain()
            return replace(own, skip=own.skip or self.skip, download=own.download or self.download)
        # A folder beside the one that a run was trained on is to be made alike.
        alike = {} if default is None else default.beside(source).alike
        return DataConfig(source, **alike | self.given("size", "mode", "background", "skip", "levels", "download"))


@dataclass(frozen=True, kw_only=True)
class MeasureOptions(DataOptions):
    """What samples are measured by, and against which data."""

    features: str | None = option(FEATURES_HELP, metavar="SPACE")
    metrics: list[str] = option("", metavar="NAME", nargs="+")
    floor: str | None = option("further real data, to measure in the samples' place (half of --data)", metavar="DATA")
    limit: int | None = option("the first N of the real data (all)", metavar="N")

    def open(self, model: Model | None, session: SessionOptions, device: torch.device) -> Measure:
        """The real data and the feature space.

        Args:
            model: whose samples are measured, and whose run's data are taken where no others are named.
            session: which says so.
            device: of networks.

        Raises:
            ValueError: if there are none, or they are no items of the model's shape, or a metric needs another feature
                space; as `features_of`.
            FileNotFoundError, ImportError: if a file or a package is missing.
        """
        own = None if model is None else model.data()
        chosen = self.config(own)
        if own is not None and self.data is None:
            session.say(f"measuring against {chosen.source}, which the network was trained on: --data names other data")
        reference = reference_of(chosen, self.limit)
        if model is not None and model.about.shape != tuple(reference.shape[1:]):
            raise ValueError(
                f"{chosen.source} has items {tuple(reference.shape[1:])}, the model's are {model.about.shape}"
            )
        features = features_of(self.features, chosen.source, reference, device)
        check_space(self.metrics, features)
        floor = None if self.floor is None else reference_of(self.config(own, self.floor))
        return Measure(chosen, reference, floor, features)


@dataclass(frozen=True)
class Measure:
    """What samples are measured by.

    Attributes:
        data: where the real data are from.
        reference: these.
        floor: further ones to measure in the samples' place, or None.
        features: the space.
    """

    data: DataConfig
    reference: Tensor
    floor: Tensor | None
    features: Callable[[Tensor], Tensor]


def measures(*metrics: str) -> Any:
    """`MeasureOptions` with these metrics by default."""
    names = f"precision_recall (four of them), {', '.join(METRICS)} ({' '.join(metrics)})"
    return part(metrics={"default": list(metrics), "help": names})


def items_of(data: DataConfig, limit: int | None = None) -> Batch:
    """Items in floating point, images in [-1, 1], all in memory; and what a network is told of them, as data says."""
    found = data.open()
    items = torch.arange(len(found) if limit is None else min(limit, len(found)), device="cpu")
    batch = found.batch(items)
    return batch if batch.x.is_floating_point() else batch._replace(x=batch.x.float())


def reference_of(data: DataConfig, limit: int | None = None) -> Tensor:
    """The items alone, in float32 at least."""
    return items_of(data, limit).x


def check_measurable(metrics: Sequence[str], **sizes: int) -> None:
    """Raises ValueError if a metric is not known, or one of the sets is too small for them."""
    least = least_size(metrics)
    for what, n in sizes.items():
        if n < least:
            raise ValueError(f"{what}: {n} of them, and {', '.join(metrics)} needs {least} at least")


def features_of(
    name: str | None, source: str, reference: Tensor, device: torch.device | str
) -> Callable[[Tensor], Tensor]:
    """A feature space by its name; by default that of the data set.

    Args:
        name: as FEATURES_HELP says, or None.
        source: the real data's name.
        reference: the real data.
        device: of networks.

    Raises:
        ValueError: if there is none of that name, or it is none for such data.
        FileNotFoundError, ImportError: if a file or a package is missing.
    """
    if name is None:
        known = source.partition(":")[0].removesuffix("-test")
        name = known if known in WEIGHTS else "random"
    kind, _, argument = name.partition(":")
    found: Any
    if name in WEIGHTS or name.endswith(".npz"):
        found = classifier_features(name, device=device)
    elif name == "random":
        return RandomFeatures(reference.shape[1:])
    elif name == "pixels":
        return Pixels()
    elif kind == "pca" and argument.isdecimal():
        return PCA(reference, int(argument))
    elif name == "inception":
        return inception(device=device)
    elif kind and argument:
        found = attribute("--features", name)[0]
        with theirs(f"--features {name}, given two items"):
            found(reference[:2])
        return found
    else:
        near = nearest(name, (*WEIGHTS, "random", "pixels", "inception"))
        raise ValueError(f"--features {name!r}: expected {'' if near is None else f'{near!r}, or '}{FEATURES_HELP}")
    found(reference[:2])  # images that do not fit it are named here, before any work
    return found
