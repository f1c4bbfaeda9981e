"""What a network trains on: levels in memory, or images decoded when they are wanted, in [-1, 1] in a batch; and what
it is told of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scoresde.checks import ArgumentError, check_whole
from scoresde.data.arrays import digest
from scoresde.data.captions import Captions, read_captions
from scoresde.data.conditions import Condition, Given, dropped
from scoresde.data.folder import ImageFolder, unreadable
from scoresde.data.pictures import Mode
from scoresde.data.raw import Raw
from scoresde.data.shown import Shown, drops, flips, mirrored
from scoresde.data.sources import find_data
from scoresde.data.words import condition_of
from scoresde.errors import not_finite, some
from scoresde.levels import outer_edges, scaled, signed
from scoresde.masks import MASK
from scoresde.nn.tokens import Tokenizer, WordTokens, tokenizer_of
from scoresde.tensors import evenly, shown, told

__all__ = ["Batch", "TrainingData", "training_data"]


@shown
class Batch(NamedTuple):
    """Some items.

    Attributes:
        x: floating point, shape (B, ...).
        cond: what a network is told of them, by its keyword: label, vector, image, context and context_mask; B entries
            each.
    """

    x: Tensor
    cond: dict[str, Tensor]

    @property
    def labels(self) -> Tensor | None:
        """cond["label"], or None; the null class where it was dropped."""
        return self.cond.get("label")


@dataclass(frozen=True, eq=False)
class TrainingData:
    """Items, and how they become a network's input.

    All that is random is a function of the seed, the epoch and the item alone.

    Args:
        x: shape (N, ...). Whole levels, uint8 images (N, C, H, W) say, become float32 in [-1, 1], both ends exactly
            (`scaled`), those of uint16 and uint32 being kept as int32 and int64; floating-point data are taken as they
            are. Or an `ImageFolder`.
        labels: of the items, N entries.
        levels: how many there are, 256 in 8-bit images; None for floating-point data.
        flip: mirror each image, left to right, with probability 1/2, anew in every epoch; not where a caption says left
            or right.
        seed: of the flips, of random conditions and of dropping.
        classes: what the labels stand for.
        num_classes: K, how many classes there are, in whole labels (N,): as many as have names, or occur.
        conditions: what else the network is told: functions of the item, as it is shown (`scoresde.data.conditions`).
            Several images are concatenated, and several vectors, and the tokens of several contexts.
        drop: the probability of telling it nothing, as guidance without a classifier needs (0.1 say): the null class K
            for the label, zeros for vector and image, no token of a context, all at once. The mask of items of various
            sizes (`scoresde.masks.is_mask`) is never dropped.
        skipped: the files that were left out, as they could not be read, with the reason; None where all were to be.

    Raises:
        ValueError: if these do not go together, a level is out of range or a number is not finite, naming the items; if
            a label is none of the classes, or drop no probability.
    """

    x: Tensor | ImageFolder
    labels: Tensor | None = None
    levels: int | None = None
    flip: bool = False
    seed: int = 0
    classes: list[str] | None = None
    num_classes: int | None = None
    conditions: tuple[Condition, ...] = ()
    drop: float = 0.0
    skipped: dict[str, str] | None = None

    __repr__ = told

    def __post_init__(self) -> None:
        check_whole(seed=self.seed)
        _ = self.data_range  # raises on a wrong number of levels
        if isinstance(self.x, Tensor):
            object.__setattr__(self, "x", signed(self.x))
            _check(self.x, self.levels)
        elif self.levels != 256:
            raise ArgumentError(f"levels={self.levels}: a folder's images have 256")
        if self.labels is not None:
            object.__setattr__(self, "labels", signed(self.labels))
        if self.labels is not None and (self.labels.ndim == 0 or len(self.labels) != len(self)):
            raise ValueError(f"labels have the shape {tuple(self.labels.shape)}: expected one for each of {len(self)}")
        if self.flip and len(self.shape) != 3:
            raise ArgumentError(f"flip=True is for images (C, H, W): an item has the shape {self.shape}")
        object.__setattr__(self, "num_classes", self._count())
        object.__setattr__(self, "conditions", tuple(self.conditions))
        for condition in self.conditions:
            condition.check(self.shape, len(self))
            _check_names(self.x, condition)
            if self.flip and isinstance(condition, Captions) and condition.sides is not None:
                raise ArgumentError(f"flip=True: of a mirrored image {condition.sides!r} is not true")
            if self.flip and isinstance(condition, Raw):
                condition.check_flips()
        if not 0 <= self.drop <= 1:
            raise ArgumentError(f"drop={self.drop}: expected a probability, 0 <= drop <= 1")
        dropping = [condition for condition in self.conditions if condition.key != MASK]
        if self.drop and not dropping and self.labels is None:
            raise ArgumentError(f"drop={self.drop}: there are no labels and no conditions to drop")
        if self.drop and self.labels is not None and self.num_classes is None:
            raise ArgumentError(
                f"drop={self.drop}: labels are {_described(self.labels)}, expected classes, whole numbers (N,)"
            )

    def __len__(self) -> int:
        return len(self.x)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an item."""
        return tuple(self.x.shape[1:]) if isinstance(self.x, Tensor) else self.x.shape

    @property
    def data_range(self) -> tuple[float, float] | None:
        """What the bins of the levels fill, for bits/dim; None for floating-point data."""
        return None if self.levels is None else outer_edges(-1.0, 1.0, self.levels)

    @property
    def lazy(self) -> bool:
        """Whether items, or what is told of them, are made when wanted: `loader` does it in other processes."""
        return not isinstance(self.x, Tensor) or any(condition.lazy for condition in self.conditions)

    @property
    def network_options(self) -> dict[str, int]:
        """What a network of `scoresde.nn` is to be built with to be told the conditions: num_classes, and the channels
        image_condition, the length vector and the width context.

        Raises:
            ValueError: if there are several contexts of other widths.
        """
        found: dict[str, int] = {} if self.num_classes is None else {"num_classes": self.num_classes}
        for condition in self.conditions:
            for option, channels in condition.options(self.shape).items():
                if option == "context" and found.get(option, channels) != channels:
                    raise ValueError(
                        f"contexts with tokens of {found[option]} and of {channels} entries: give one width"
                    )
                found[option] = channels if option == "context" else channels + found.get(option, 0)
        return found

    def first(self, n: int) -> TrainingData:
        """The first n items alone.

        Raises:
            ValueError: if the images are decoded when they are wanted.
        """
        if not isinstance(self.x, Tensor):
            raise ValueError(f"{self.x!r} is not in memory: training_data(..., lazy=False) reads it")
        labels = None if self.labels is None else self.labels[:n]
        conditions = tuple(condition.first(n) for condition in self.conditions)
        return replace(self, x=self.x[:n], labels=labels, conditions=conditions)

    def std(self, n: int = 2048) -> float:
        """The standard deviation of n of the items, evenly chosen."""
        items = evenly(len(self), n)
        return float(replace(self, conditions=(), drop=0.0).batch(items).x.double().std(correction=0))

    def look(self) -> None:
        """Look at the files that are read when they are wanted, as `ImageFolder.look`. A `Trainer` does, before its
        first step.

        Raises:
            ValueError: if some cannot be read, naming all of them.
        """
        folders = (None if isinstance(self.x, Tensor) else self.x, *(condition.folder for condition in self.conditions))
        unreadable([wrong for folder in folders if folder is not None for wrong in folder.look()])

    def batch(self, items: Tensor, epochs: Tensor | int = 0) -> Batch:
        """Some items, on the data's device.

        Args:
            items: which, int64, shape (B,): `Order.items`.
            epochs: in which epoch each is shown: `Order.epochs`. What is random depends on it, nothing else.

        Raises:
            ValueError: if a file is damaged; the message names it. If there is not one epoch for each item.
        """
        shown = Shown(items, len(self), epochs, self.seed)
        x = self.x.index_select(0, items.to(self.x.device)) if isinstance(self.x, Tensor) else self.x.batch(items)
        if self.flip:
            shown = replace(shown, mirrored=flips(shown))
            x = mirrored(x, shown.mirrored)
        x = x if self.levels is None else scaled(x, self.levels)
        cond = {} if self.labels is None else {"label": self.labels.index_select(0, items.to(self.labels.device))}
        for condition in self.conditions:
            for key, value in condition.told(x, shown).items():
                cond[key] = torch.cat([cond[key], value], 1) if key in cond else value
        return Batch(x, dropped(cond, drops(shown, self.drop), self.num_classes) if self.drop else cond)

    def to(self, device: torch.device | str) -> TrainingData:
        """The same in another device's memory: a small set is fastest on the GPU itself.

        Raises:
            ValueError: if images are decoded when they are wanted.
        """
        if not isinstance(self.x, Tensor):
            raise ValueError(f"{self.x!r} is not in memory: training_data(..., lazy=False) reads it")
        labels = None if self.labels is None else self.labels.to(device)
        conditions = tuple(condition.to(device) for condition in self.conditions)
        return replace(self, x=self.x.to(device), labels=labels, conditions=conditions)

    @property
    def fingerprint(self) -> str:
        """What tells these data from others, for a checkpoint: a hash of the content; of a folder, of its files' names
        and lengths."""
        return ", ".join([self.items_fingerprint, *self.told_fingerprints])

    @property
    def items_fingerprint(self) -> str:
        """Of the items as they are shown, and not of what is told of them."""
        if isinstance(self.x, Tensor):
            text = f"{tuple(self.x.shape)} in [{self.x.min():.4g}, {self.x.max():.4g}], {digest(self.x)}"
        else:
            text = f"{(len(self), *self.shape)} images, {self.x.digest()}"
        parts = [text] if self.levels is None else [text, f"{self.levels} levels"]
        if self.flip:
            parts.append(f"flips from seed {self.seed}")
        return ", ".join(parts)

    @property
    def told_fingerprints(self) -> list[str]:
        """Of the conditions and of dropping them."""
        parts = [f"{condition.fingerprint} from seed {self.seed}" for condition in self.conditions]
        return [*parts, f"drop {self.drop} from seed {self.seed}"] if self.drop else parts

    def _count(self) -> int | None:
        """How many classes there are, or None where the labels are none.

        Raises:
            ValueError: if a label is none of them.
        """
        labels = self.labels
        if labels is None or labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
            if self.num_classes is not None:
                found = "there are no labels" if labels is None else f"labels are {_described(labels)}"
                raise ArgumentError(f"num_classes={self.num_classes}: {found}, expected whole numbers (N,)")
            return None
        lo, hi = int(labels.min()), int(labels.max())
        K = self.num_classes or (len(self.classes) if self.classes else hi + 1)
        if lo < 0 or hi >= K:
            raise ValueError(f"labels are {lo} to {hi}: there are {K} classes, 0 to {K - 1}")
        return K


def training_data(
    source: str | Path,
    *,
    labels: bool = False,
    levels: int | None = None,
    size: int | tuple[int, int] | None = None,
    mode: Mode | None = None,
    background: str | None = None,
    skip: bool | Collection[str] = False,
    flip: bool = False,
    conditions: Sequence[Condition | str] = (),
    captions: str | Path | Sequence[str | Sequence[str]] | None = None,
    tokenizer: Tokenizer | str = "bytes",
    drop: float = 0.0,
    seed: int = 0,
    lazy: bool = True,
    download: bool = False,
) -> TrainingData:
    """Data to train on, by name or from the disk.

    Args:
        source, size, mode, background, download: as in `read_data`.
        skip: as there; and of a folder with given images, both or neither of a pair.
        labels: keep them; from a folder, the classes are its folders.
        levels: of integers that are not uint8, or not 0 to 255: how many.
        flip, drop, seed: see `TrainingData`.
        conditions: `scoresde.data.conditions`, or their names, "super-resolution:4" say (`condition_of`).
        captions: what is said of each image: a file, or a folder that has one (`read_captions`), or a text or several
            for each. What the network is told of an item's caption then is `text`, its tokens (`Captions`).
        tokenizer: of the captions (`scoresde.nn.tokens`); "bytes", or "words", those of these captions.
        lazy: a folder's images are decoded when they are wanted; False: once, into memory.

    Raises:
        ValueError: as `read_data`, and if there are no labels, or the levels are not known.
    """
    found = find_data(source, labels=labels, size=size, mode=mode, background=background, skip=skip, download=download)
    alike: dict[str, Any] = {"size": size, "background": background, "skip": skip}
    told = [condition_of(c, **alike) if isinstance(c, str) else c for c in conditions]
    if captions is not None:
        left = found.skipped if isinstance(found, ImageFolder) else ()
        names = None if found.names is None else sorted([*found.names, *left], key=Path)
        told.append(_captions(captions, names, tokenizer))
    if isinstance(found, ImageFolder):
        found, told = _paired(found, told)
    if not lazy:
        told = [condition.in_memory() for condition in told]
    if labels and found.labels is None:
        raise ValueError(f"{source} has no labels")
    kept, classes = (found.labels, found.classes) if labels else (None, None)
    if isinstance(found, ImageFolder):
        x: Tensor | ImageFolder = found if lazy else found.batch(range(len(found)))
        known: int | None = 256
    else:
        x = found.x
        known = found.levels or (256 if x.dtype == torch.uint8 else None)
        if levels is not None and found.levels not in (None, levels):
            raise ArgumentError(f"levels={levels}: {source} has {found.levels}")
    try:
        chosen = known if levels is None else levels
        skipped = found.skipped if isinstance(found, ImageFolder) and skip is not False else None
        return TrainingData(x, kept, chosen, flip, seed, classes, None, tuple(told), drop, skipped)
    except ValueError as error:
        raise ArgumentError(f"{source}: {error}") from error


def _captions(
    captions: str | Path | Sequence[str | Sequence[str]], names: Sequence[str] | None, tokenizer: Tokenizer | str
) -> Captions:
    """Of items whose files have these names."""
    given = read_captions(captions, names) if isinstance(captions, str | Path) else captions
    if tokenizer == "words":
        tokenizer = WordTokens.trained([t for texts in given for t in ([texts] if isinstance(texts, str) else texts)])
    return Captions(given, tokenizer_of(tokenizer) if isinstance(tokenizer, str) else tokenizer, names=names)


def _paired(x: ImageFolder, told: Sequence[Condition]) -> tuple[ImageFolder, list[Condition]]:
    """Less what one of them leaves out: an item goes with what was given for it."""
    folders = (x, *(condition.folder for condition in told))
    gone = {name for folder in folders if folder is not None for name in folder.skipped}
    return x.without(gone), [condition.without(gone) for condition in told]


def _check(x: Tensor, levels: int | None) -> None:
    """
    Raises:
        ValueError: unless they are items: levels in their range, or finite numbers.
    """
    if x.ndim == 0 or x.numel() == 0 or x.is_complex() or x.dtype == torch.bool:
        raise ValueError(f"x is {x.dtype} of shape {tuple(x.shape)}: expected numbers (N, ...), N >= 1")
    if x.is_floating_point():
        if levels is not None:
            raise ArgumentError(f"levels={levels}: floating-point data have none")
        if bad := not_finite(x):
            raise ValueError(f"data items {some(bad)} are not finite")
        return
    if levels is None:
        raise ArgumentError(f"x is whole, {int(x.min())} to {int(x.max())}: say how many levels there are, levels=")
    lo, hi = int(x.min()), int(x.max())
    if lo < 0 or hi >= levels:
        raise ArgumentError(f"x has levels from {lo} to {hi}: expected 0 to {levels - 1}, for levels={levels}")
    if x.ndim == 4 and x.shape[-1] in (1, 3) and x.shape[1] not in (1, 2, 3, 4):
        raise ValueError(f"x has the shape {tuple(x.shape)}: images are (N, C, H, W), take x.movedim(-1, 1)")


def _check_names(x: Tensor | ImageFolder, condition: Condition) -> None:
    """Raises ValueError if items and given images are files whose names differ in more than their endings."""
    if isinstance(condition, Given) and isinstance(condition.values, ImageFolder) and isinstance(x, ImageFolder):
        for one, other in zip(x.names, condition.values.names, strict=True):
            if Path(one).with_suffix("") != Path(other).with_suffix(""):
                raise ValueError(
                    f"{x.folder / one} and {condition.values.folder / other} have other names: expected a pair"
                )


def _described(x: Tensor) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)}"
