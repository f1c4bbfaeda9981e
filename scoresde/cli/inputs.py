"""Given images as items of a model: what `edit` and `restore` begin with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from scoresde.cli.common import BACKGROUND_HELP, DATA_HELP, SKIP_HELP
from scoresde.cli.models import About
from scoresde.cli.options import Options, option
from scoresde.data import ImageFolder, scaled
from scoresde.data.folder import read_image
from scoresde.data.pictures import SUFFIXES, Mode
from scoresde.data.sources import read_data

__all__ = ["InputOptions"]


@dataclass(frozen=True, kw_only=True)
class InputOptions(Options):
    """Which images are given."""

    input: str = option(f"an image file; {DATA_HELP}", metavar="DATA", required=True)
    limit: int | None = option("the first N of them (all)", metavar="N")
    levels: int | None = option("of whole numbers (256, or a built-in data set's own)", metavar="L")
    background: str | None = option(f"{BACKGROUND_HELP[:-1]}, or the run's)", metavar="COLOUR")
    skip: bool = option(SKIP_HELP, flags=("--skip-unreadable",))

    def read(self, about: About, labels: bool = False, background: str | None = None) -> tuple[Tensor, Tensor | None]:
        """The inputs, float32, shape (N, *event), in the model's units; and their labels, if they are wanted.

        Args:
            about: what the model was trained on.
            labels: whether they are wanted.
            background: of images, where these options say none.

        Raises:
            ValueError, OSError, ImportError: if they cannot be read, or are no items of the model's shape.
        """
        source, path, shape, found, levels = self.input, Path(self.input), about.shape, None, 256
        is_file, is_folder = path.suffix.lower() in SUFFIXES and not path.is_dir(), source != "" and path.is_dir()
        if is_file or is_folder:
            if not about.pictures:
                what = "an image" if is_file else "a folder of images"
                raise ValueError(f"--input {source} is {what}, and the model's items {shape} are none")
            if self.levels not in (None, 256):
                raise ValueError(f"--levels {self.levels}: images have 256")
            if is_file and self.skip:
                raise ValueError(f"--skip-unreadable is for a folder of images, not --input {source}")
        if is_file:
            x = read_image(path, shape, self.background or background)[None]
        elif is_folder:
            mode: Mode = "L" if shape[0] == 1 else "RGB"
            folder = ImageFolder(
                path, size=(shape[1], shape[2]), mode=mode, background=self.background or background, skip=self.skip
            )
            x = folder.batch(range(len(folder))[: self.limit])
        else:
            data = read_data(source, labels=labels, background=self.background, skip=self.skip)
            x, found = data.x, data.labels if labels else None
            if self.levels is not None and (x.is_floating_point() or data.levels not in (None, self.levels)):
                raise ValueError(f"--levels {self.levels}: --input {source} has {data.levels or 'none'}")
            levels = self.levels or data.levels or 256
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
