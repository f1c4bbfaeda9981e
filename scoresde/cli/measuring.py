"""What samples are measured by: real data, and a feature space by name."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scoresde.checks import check_option
from scoresde.cli.common import DATA_HELP
from scoresde.cli.config import DataConfig
from scoresde.cli.models import attribute
from scoresde.data.training import Batch
from scoresde.metrics import METRICS, PCA, Pixels, RandomFeatures, classifier_features, inception
from scoresde.metrics.classifier import WEIGHTS

__all__ = [
    "FEATURES_HELP",
    "add_data_arguments",
    "add_measure_arguments",
    "check_measurable",
    "data_config",
    "features_of",
    "items_of",
    "reference_of",
]

FEATURES_HELP = (
    "digits or fashion-mnist (classifiers of this package), a classifier's file .npz, random (two random layers), "
    "pixels, pca:N, inception, or MODULE:NAME, a function of a batch (the data's own, where there is one; else random)"
)


def add_data_arguments(parser: argparse.ArgumentParser, what: str, required: bool = False) -> None:
    """--data and what is made of a folder's images."""
    parser.add_argument("--data", metavar="DATA", required=required, help=f"{what}: {DATA_HELP}")
    parser.add_argument("--size", type=int, metavar="PIXELS", help="to make of a folder's images")
    parser.add_argument("--mode", choices=("L", "RGB"), help="to make of a folder's images: grey or colour")
    parser.add_argument("--download", action="store_true", help="a data set that is not at its PATH, into it")


def add_measure_arguments(parser: argparse.ArgumentParser, metrics: list[str]) -> None:
    """--features, --metrics and --floor."""
    add = parser.add_argument
    add("--features", metavar="SPACE", help=FEATURES_HELP)
    add("--metrics", nargs="+", default=metrics, metavar="NAME",
        help=f"precision_recall (four of them), {', '.join(METRICS)} ({' '.join(metrics)})")  # fmt: skip
    add("--floor", metavar="DATA", help="further real data, to measure in the samples' place (half of --data)")


def data_config(args: argparse.Namespace, default: DataConfig | None, source: str | None = None) -> DataConfig:
    """What --data, or `source`, names; by default the data of the model's run.

    Raises:
        ValueError: if there is neither.
    """
    source = source or args.data
    if source is None:
        if default is None:
            raise ValueError("give --data")
        return default.plain()
    folder = Path(source).is_dir()
    # A folder beside the one that a run was trained on is to be made alike.
    size = args.size or (default.size if default and folder else None)
    mode = args.mode or (default.mode if default and folder else None)
    return DataConfig(source, size=size, mode=mode, download=args.download)


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
    for name in metrics:
        check_option(("precision_recall", *METRICS), metrics=name)
    plain = {"frechet", "kid", "mmd", "sliced_wasserstein", "energy"}
    least = 8 if plain.issuperset(metrics) else 12
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
    else:
        raise ValueError(f"--features {name!r}: expected {FEATURES_HELP}")
    found(reference[:2])  # images that do not fit it are named here, before any work
    return found
