"""Given images as items of a model: what `edit` and `restore` begin with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from scoresde.cli.common import DATA_HELP
from scoresde.cli.models import About
from scoresde.cli.options import Options, option
from scoresde.data import ImageFolder, scaled
from scoresde.data.folder import read_image
from scoresde.data.sources import find_data

__all__ = ["InputOptions"]

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True, kw_only=True)
class InputOptions(Options):
    """Which images are given."""

    input: str = option(f"an image file; {DATA_HELP}", metavar="DATA", required=True)
    limit: int | None = option("the first N of them (all)", metavar="N")
    levels: int | None = option("of whole numbers (256, or a built-in data set's own)", metavar="L")

    def read(self, about: About, labels: bool = False) -> tuple[Tensor, Tensor | None]:
        """The inputs, float32, shape (N, *event), in the model's units; and their labels, if they are wanted.

        Args:
            about: what the model was trained on.
            labels: whether they are wanted.

        Raises:
            ValueError, OSError, ImportError: if they cannot be read, or are no items of the model's shape.
        """
        source, path, shape, found = self.input, Path(self.input), about.shape, None
        levels = self.levels or 256
        if path.suffix.lower() in IMAGES and not path.is_dir():
            if not about.pictures:
                raise ValueError(f"--input {source} is an image, and the model's items {shape} are none")
            x = read_image(path, shape)[None]
        elif path.is_dir() and about.pictures:
            folder = ImageFolder(path, size=(shape[1], shape[2]), mode="L" if shape[0] == 1 else "RGB")
            x = folder.batch(range(len(folder))[: self.limit])
        else:
            data = find_data(source, labels=labels)
            if isinstance(data, ImageFolder):
                raise ValueError(f"--input {source} is a folder of images, and the model's items {shape} are none")
            x, found, levels = data.x, data.labels if labels else None, self.levels or data.levels or 256
        if labels and found is None:
            raise ValueError(f"the model has classes, and --input {source} no labels: say --from-class K")
        x = x[: self.limit]
        if tuple(x.shape[1:]) != shape:
            raise ValueError(f"--input {source} has items {tuple(x.shape[1:])}, the model {shape}")
        if not x.is_floating_point():
            if int(x.min()) < 0 or int(x.max()) >= levels:
                raise ValueError(
                    f"--input {source} has numbers from {x.min()} to {x.max()}: --levels says how many levels"
                )
            x = scaled(x, levels)
        if not bool(x.isfinite().all()):
            raise ValueError(f"--input {source} has numbers that are not finite")
        found = None if found is None else found[: self.limit].long()
        if found is not None and not bool(((found >= 0) & (found < int(about.num_classes or 0))).all()):
            raise ValueError(f"--input {source} has labels from {found.min()} to {found.max()}, the model "
                             f"{about.num_classes} classes")  # fmt: skip
        return x.float(), found
