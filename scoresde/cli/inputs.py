"""Given images as items of a model: what `edit` and `restore` begin with."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import Tensor

from scoresde.cli.common import DATA_HELP
from scoresde.cli.models import Model
from scoresde.data import ImageFolder, scaled
from scoresde.data.folder import read_image
from scoresde.data.sources import find_data

__all__ = ["add_input_arguments", "read_inputs"]

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def add_input_arguments(group: Any, help: str = f"an image file; {DATA_HELP}") -> None:
    """--input, --limit and --levels.

    Args:
        group: of a parser.
        help: of --input.
    """
    group.add_argument("--input", required=True, metavar="DATA", help=help)
    group.add_argument("--limit", type=int, metavar="N", help="the first N of them (all)")
    group.add_argument("--levels", type=int, metavar="L", help="of whole numbers (256, or a built-in data set's own)")


def read_inputs(args: argparse.Namespace, model: Model, labels: bool) -> tuple[Tensor, Tensor | None]:
    """The inputs, float32, shape (N, *event), in the model's units; and their labels, if they are wanted.

    Raises:
        ValueError, OSError, ImportError: if they cannot be read, or are no items of the model's shape.
    """
    source, shape, found = args.input, model.about.shape, None
    levels, kind = args.levels or 256, Path(args.input).suffix.lower()
    path, pictures = Path(source), model.about.pictures
    if kind in IMAGES and not path.is_dir():
        if not pictures:
            raise ValueError(f"--input {source} is an image, and the model's items {shape} are none")
        x = read_image(path, shape)[None]
    elif path.is_dir() and pictures:
        folder = ImageFolder(path, size=(shape[1], shape[2]), mode="L" if shape[0] == 1 else "RGB")
        x = folder.batch(range(len(folder))[: args.limit])
    else:
        data = find_data(source, labels=labels)
        if isinstance(data, ImageFolder):
            raise ValueError(f"--input {source} is a folder of images, and the model's items {shape} are none")
        x, found, levels = data.x, data.labels if labels else None, args.levels or data.levels or 256
    if labels and found is None:
        raise ValueError(f"the model has classes, and --input {source} no labels: say --from-class K")
    x = x[: args.limit]
    if tuple(x.shape[1:]) != shape:
        raise ValueError(f"--input {source} has items {tuple(x.shape[1:])}, the model {shape}")
    if not x.is_floating_point():
        if int(x.min()) < 0 or int(x.max()) >= levels:
            raise ValueError(f"--input {source} has numbers from {x.min()} to {x.max()}: --levels says how many levels")
        x = scaled(x, levels)
    if not bool(x.isfinite().all()):
        raise ValueError(f"--input {source} has numbers that are not finite")
    found = None if found is None else found[: args.limit].long()
    if found is not None and not bool(((found >= 0) & (found < int(model.about.num_classes or 0))).all()):
        raise ValueError(f"--input {source} has labels from {found.min()} to {found.max()}, the model "
                         f"{model.about.num_classes} classes")  # fmt: skip
    return x.float(), found
