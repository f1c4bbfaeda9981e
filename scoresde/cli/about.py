"""What a run folder says of the data that a model was trained on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from scoresde.data import TrainingData
from scoresde.errors import CheckpointError
from scoresde.files import sealed, unsealed, warn_unsealed, write_whole
from scoresde.pictures import is_picture

__all__ = ["ABOUT", "About"]

ABOUT = "data.json"


@dataclass(frozen=True)
class About:
    """What a model was trained on.

    Attributes:
        shape: of an item.
        levels: how many it had, None for floating-point data.
        num_classes: that the network is conditional on, or None.
        classes: their names, or None.
        conditions: what else the network is told, in words.
        skipped: the files that were left out, as they could not be read; None where all were to be.
        latent: the shape of an item's latent, where that is diffused.
    """

    shape: tuple[int, ...]
    levels: int | None = None
    num_classes: int | None = None
    classes: list[str] | None = None
    conditions: tuple[str, ...] = ()
    skipped: tuple[str, ...] | None = None
    latent: tuple[int, ...] | None = None

    @classmethod
    def of(cls, data: TrainingData, latent: tuple[int, ...] | None = None) -> About:
        told = tuple(repr(condition) for condition in data.conditions)
        skipped = None if data.skipped is None else tuple(data.skipped)
        return cls(data.shape, data.levels, data.num_classes, data.classes, told, skipped, latent)

    @property
    def pictures(self) -> bool:
        """Whether items are images in [-1, 1]."""
        return self.levels is not None and is_picture(self.shape)

    def write(self, folder: Path) -> None:
        found = asdict(self)
        for name in ("skipped", "latent"):
            if found[name] is None:
                del found[name]
        text = sealed(found, indent=1) + "\n"
        write_whole(folder / ABOUT, lambda file: file.write(text.encode()))

    @classmethod
    def read(cls, folder: Path) -> About | None:
        """What a run folder says; None if it does not.

        Raises:
            CheckpointError: if the file is damaged.
        """
        path = folder / ABOUT
        if not path.exists():
            return None
        try:
            found, whole = unsealed(path.read_text("utf-8"))
            if not isinstance(found, dict):
                raise TypeError(f"it holds a {type(found).__name__}, expected names with values")
            told = tuple(map(str, found.get("conditions", ())))  # which runs of before they were there have not
            skipped = None if found.get("skipped") is None else tuple(map(str, found["skipped"]))
            shape = tuple(int(n) for n in found["shape"])
            latent = None if found.get("latent") is None else tuple(int(n) for n in found["latent"])
            about = cls(**{**found, "shape": shape, "conditions": told, "skipped": skipped, "latent": latent})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"{path} is damaged: {error} (`scoresde train --out {folder}` writes it anew; or else give `--shape`)"
            ) from error
        if not whole:
            warn_unsealed(path)
        return about
