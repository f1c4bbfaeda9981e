"""Latents kept on disk: a data set that is encoded once, and read without being read whole.

    F/latents.npy     (N, views, 1 or 2, *latent), float32: of each item the mean of q(z | x), and its standard
                      deviation where the encoder has noise; as it is and, where training mirrors items, mirrored too
    F/latents.json    what they were encoded of and by, with a hash of the array; written last, with one of itself

A latent of a mirrored image is no mirrored latent: convolutions trained on images need not commute with a mirror. So a
mirrored item is encoded as such, and a batch has the one or the other by the same coin as `TrainingData(flip=True)`.
Other augmentations would have to be encoded likewise, and none is made of latents. z is drawn from q(z | x) anew in
each epoch, by numbers that are functions of the seed, the epoch and the item.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from scoresde.checks import ArgumentError, check_count
from scoresde.codecs import Codec, Encoded
from scoresde.data import Batch, Captions, Given, GivenContext, Raw, Shown, TrainingData
from scoresde.data.shown import flips, mirrored
from scoresde.errors import CheckpointError, NonFiniteError, not_finite, some
from scoresde.files import sealed, sync, unsealed, write_whole, writing
from scoresde.tensors import evenly
from scoresde.training.autoencoders import codec_in_words

__all__ = ["LatentData"]

ARRAY, ABOUT = "latents.npy", "latents.json"


@dataclass(frozen=True, eq=False)
class LatentData:
    """A data set as its latents: a `DataSource` for a `Trainer`; made by `LatentData.of`.

    Attributes:
        told: the items without what they are: their number, labels and conditions, their seed, and whether they are
            mirrored.
        codec: by which they were encoded.
        folder: that has the files.
        fingerprint: what tells them from others.
        draw: whether z is drawn from q(z | x), or is its mean.
    """

    told: TrainingData
    codec: Codec
    folder: Path
    fingerprint: str
    draw: bool = True
    _array: Any = field(default=None, repr=False)

    lazy = False
    levels = None

    @classmethod
    def of(
        cls,
        data: TrainingData | Tensor,
        codec: Codec,
        folder: str | Path,
        *,
        draw: bool = True,
        batch_size: int = 64,
        progress: bool = False,
    ) -> LatentData:
        """The latents of data, encoded into a folder, or found there.

        Args:
            data: floating-point or of levels, as `TrainingData` has it, whose flips, labels, dropping and seed stay.
            codec: what encodes them.
            folder: for the files, a run's say.
            draw: z from q(z | x) where the encoder has noise; else its mean.
            batch_size: items that are encoded at a time.
            progress: show a bar.

        Raises:
            ValueError: if items have conditions that are made of the item itself: a network of latents is told what has
                the latent's places, and no image of another size.
            CheckpointError: if the folder has latents of another codec or other data, or damaged ones.
            NonFiniteError: naming the items, if a latent is not finite.
        """
        data = TrainingData(data) if isinstance(data, Tensor) else data
        for condition in data.conditions:
            if condition.key == "image" or not isinstance(condition, Given | GivenContext | Raw | Captions):
                raise ArgumentError(
                    f"{condition!r} is made of the item, and of its size: of latents a network can be told classes, "
                    "texts, and vectors and contexts that were given"
                )
        check_count(batch_size=batch_size)
        folder = Path(folder)
        about = {"codec": codec_in_words(codec), "data": data.items_fingerprint}
        if not (folder / ABOUT).exists():
            _encode(data, codec, folder, about, batch_size, progress)
        array = _opened(folder, about)
        blank = torch.zeros(1).expand(len(data), data.shape[0], *[1] * (len(data.shape) - 1))
        told = replace(data, x=blank, levels=None)
        how = "" if array.shape[2] == 1 else ", drawn" if draw else ", means"
        of = ", ".join([about["data"], *data.told_fingerprints])
        words = f"latents{how}, of {of}, by {about['codec']}"
        return cls(told, codec, folder, words, draw, array)

    def __len__(self) -> int:
        return len(self.told)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an item of z."""
        return tuple(self._array.shape[3:])

    @property
    def labels(self) -> Tensor | None:
        return self.told.labels

    @property
    def num_classes(self) -> int | None:
        return self.told.num_classes

    @property
    def network_options(self) -> dict[str, int]:
        """As `TrainingData.network_options`."""
        return self.told.network_options

    def batch(self, items: Tensor, epochs: Tensor | int = 0) -> Batch:
        """Some items' z, and what a network is told of them; see `TrainingData.batch`."""
        shown, views = Shown(items, len(self), epochs, self.told.seed), self._array.shape[1]
        view = flips(shown).long().numpy() if views == 2 else np.zeros(len(shown), np.int64)
        found = torch.from_numpy(np.ascontiguousarray(self._array[shown.items.numpy(), view]))
        z = found[:, 0]
        if self.draw and found.shape[1] == 2:
            z = Encoded(z, found[:, 1]).draw(shown.normal(self.shape))
        return Batch(z, self.told.batch(items, epochs).cond)

    def std(self, n: int = 2048) -> float:
        """The standard deviation of n of the items, evenly chosen."""
        return float(self.batch(evenly(len(self), n)).x.double().std(correction=0))


@torch.no_grad()
def _encode(
    data: TrainingData, codec: Codec, folder: Path, about: Mapping[str, str], batch_size: int, progress: bool
) -> None:
    """Write the files."""
    plain = replace(data, labels=None, num_classes=None, classes=None, flip=False, conditions=(), drop=0.0)
    views = 2 if data.flip else 1
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".{ARRAY}.{os.getpid()}.partial"
    array: Any = None
    try:
        with tqdm(desc="encode", total=len(data), unit="item", disable=not progress, leave=False) as bar:
            for items in torch.arange(len(data), device="cpu").split(batch_size):
                x = plain.batch(items).x
                for view, shown in enumerate((x, mirrored(x, torch.ones(len(x), dtype=torch.bool)))[:views]):
                    law = codec.encoding(shown)
                    found = torch.stack([*law] if law is not None else [codec.encode(shown)], 1).float().cpu()
                    if bad := not_finite(found):
                        names = [int(items[i]) for i in bad]
                        raise NonFiniteError(f"the latents of items {some(names)} are not finite", None, None, names)
                    if array is None:
                        with writing(path):
                            shape = (len(data), views, *found.shape[1:])
                            array = np.lib.format.open_memmap(path, "w+", np.float32, shape)
                    array[items.numpy(), view] = found.numpy()
                bar.update(len(items))
        with writing(path):
            array.flush()
            sync(path)
        hashed = _sha256(path)
        path.rename(folder / ARRAY)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    text = sealed({"format": "scoresde-latents-1", **about, "sha256 of the array": hashed}, indent=1) + "\n"
    write_whole(folder / ABOUT, lambda file: file.write(text.encode()))


def _opened(folder: Path, about: Mapping[str, str]) -> Any:
    """The array of the files, mapped."""
    where, path = folder / ABOUT, folder / ARRAY
    hint = f"remove {where} to encode the data anew, or give another folder"
    try:
        found, whole = unsealed(where.read_text("utf-8"))
        if not whole or found["format"] != "scoresde-latents-1":
            raise ValueError("it is no description of latents, or has no hash of itself")
        theirs = {key: found[key] for key in about}
        hashed = found["sha256 of the array"]
    except (OSError, ValueError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{where} is damaged: {error} ({hint})") from error
    if different := [key for key in about if theirs[key] != about[key]]:
        which = "; ".join(f"{key}: {theirs[key]} there, {about[key]} here" for key in different)
        raise CheckpointError(f"{folder} has latents of something else. {which} ({hint})")
    try:
        if _sha256(path) != hashed:
            raise ValueError("its hash is another")
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is truncated or damaged: {error} ({hint})") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
