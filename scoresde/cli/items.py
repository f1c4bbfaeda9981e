"""What a run trains on, or what is measured, in words: the section `data` of a configuration."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from scoresde.checks import ArgumentError, check_count
from scoresde.data import Condition, Given, ImageFolder, Shown, TrainingData, condition_of, training_data

__all__ = ["DataConfig"]


@dataclass(frozen=True)
class DataConfig:
    """What is trained on, or measured: `scoresde.data.training_data`.

    Args:
        source: a name, file or folder.
        classes: keep the labels: the network is conditional on them.
        size, mode, background: to make of a folder's images.
        skip: leave out the folder's files that cannot be read; a run goes on with those that were left out at its
            beginning. Or their names.
        levels: of integers that are not 8-bit.
        flip: mirror images at random.
        condition: what else the network is told, a function of the item; several of them as a list.
            "super-resolution:4" (the image as one 4 times smaller shows it; "augmented-super-resolution:4:0.5", spoiled
            by noise of a share up to 0.5, which the network is told), "inpainting" (with random boxes cut out;
            "inpainting:noise" fills them with noise), "uncropping" (likewise, with one side or all cut off),
            "colourisation" (in grey), "jpeg:5-30" (after JPEG of such a quality), "given:PATH" (a vector or an image
            for each item, from a file or folder), "itself" (as `source`, for one of `model.encoders`).
        captions: what is said of each item, which the network then reads (`scoresde.data.read_captions`): a file, or a
            folder that has one.
        tokens: of captions: "bytes"; "words", those of the captions, by the library tokenizers, kept here; "hf:NAME",
            those of a text encoder of Hugging Face, which then reads them (`scoresde.nn.PretrainedText`).
        drop: the probability of telling it nothing (no class, zeros, no text), for guidance without a classifier: 0.1.
        limit: the first N items only.
        in_memory: decode a folder's images once, into memory.
        download: a data set that is not at its folder, into it.
        codec: a run folder of `scoresde train-autoencoder`: what is diffused are the items' latents.
    """

    source: str
    classes: bool = False
    size: int | tuple[int, int] | None = None
    mode: Literal["L", "RGB"] | None = None
    background: str | None = None
    skip: bool | tuple[str, ...] = False
    levels: int | None = None
    flip: bool = False
    condition: str | tuple[str, ...] | None = None
    captions: str | None = None
    tokens: str = "bytes"
    drop: float = 0.0
    limit: int | None = None
    in_memory: bool = False
    download: bool = False
    codec: str | None = None

    def open(self, *, seed: int = 0, lazy: bool | None = None) -> TrainingData:
        """The data.

        Args:
            seed: of the flips, conditions and dropping.
            lazy: decode a folder's images when they are wanted; by default unless in_memory.

        Raises:
            As `training_data`; ValueError if limit is no number of items.
        """
        data = training_data(
            self.source,
            labels=self.classes,
            levels=self.levels,
            size=self.size,
            mode=self.mode,
            background=self.background,
            skip=self.skip,
            flip=self.flip,
            conditions=self.conditions,
            captions=self.captions,
            tokenizer=self.tokens,
            drop=self.drop,
            seed=seed,
            lazy=not self.in_memory if lazy is None else lazy,
            download=self.download,
        )
        if self.limit is None:
            return data
        check_count(limit=self.limit)
        if isinstance(data.x, ImageFolder):
            raise ArgumentError(f"limit={self.limit} needs the images of {self.source} in memory: in_memory=true")
        return data.first(self.limit)

    def skipped(self) -> dict[str, str]:
        """The files of a folder that cannot be read, with the reason: all are decoded to find them."""
        return replace(self, limit=None).open(lazy=True).skipped or {}

    @property
    def conditions(self) -> tuple[str, ...]:
        """What else the network is told, one by one."""
        told = self.condition or ()
        return (told,) if isinstance(told, str) else told

    def plain(self) -> DataConfig:
        """The same items, unmirrored, and nothing told of them but their classes."""
        return replace(self, flip=False, condition=None, captions=None, drop=0.0)

    @property
    def alike(self) -> dict[str, Any]:
        """What is made of a folder's images."""
        return {"size": self.size, "mode": self.mode, "background": self.background}

    def beside(self, source: str) -> DataConfig:
        """Other data, all of them: a folder's images are made alike, none being left out."""
        alike = replace(self, source=source, limit=None, skip=False, captions=self.captions_of(source))
        return alike if Path(source).is_dir() else replace(alike, size=None, mode=None, background=None)

    def captions_of(self, source: str) -> str | None:
        """Where the captions of these items are: of others than those of the training, in their own folder."""
        return self.captions if source == self.source or self.captions is None else source

    def told(self, source: str | None = None, shape: tuple[int, ...] = (), measured: bool = False) -> TrainingData:
        """The items whose conditions samples are drawn for: as in training, but not mirrored, none dropped, random ones
        from seed 0.

        Args:
            source: other items than those of the training; where the condition was given ("given:PATH"), the conditions
                themselves.
            shape: of an item, where these are not known.
            measured: source has what the network is told already (`Condition.taken`), not the items.

        Raises:
            As `open`; ValueError if source cannot be both, or does not fit the condition.
        """
        own = replace(self, flip=False, drop=0.0)
        if source is None:
            return own.open()
        if not measured and not any(told.startswith("given:") for told in self.conditions):
            return replace(own.beside(source), in_memory=False).open()
        if len(self.conditions) > 1:
            raise ValueError(f"{source}: the network is told {', '.join(self.conditions)}; only its own data have all")
        alike = self.beside(source)
        size = None if measured else alike.size
        given = condition_of(f"given:{source}", size=size, background=alike.background, lazy=not measured)
        assert isinstance(given, Given)
        x = torch.zeros(1).expand(n := len(given), *shape)
        if not measured:
            return TrainingData(x, conditions=(given,))
        y = given(torch.zeros(n), Shown(torch.arange(n, device="cpu"), n))
        return TrainingData(x, conditions=self._own_condition().measured(y, shape))

    def _own_condition(self) -> Condition:
        return condition_of(self.conditions[0], size=self.size)
