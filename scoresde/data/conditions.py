"""What a network is told of an item x beside x_t: its class, a vector, an image, a context; a function of the item.

    label     the class, 0 to K - 1, which `TrainingData` has by itself
    vector    a given row of numbers
    image     A(x, u), of the size of x, concatenated to x_t: what a task leaves of x (`scoresde.data.tasks`), or a
              given image (segmentation: x is its mask)
    context   tokens of any number, with context_mask, which of them count: of a text, say
    others    what a network of its own makes one of these of (`scoresde.nn.Encoding`): the item itself, token ids, ...

For guidance without a classifier (Ho and Salimans, 2022) a network is told nothing with probability p, and then all of
it is nothing at once. **Nothing** is K, the null class, for a label, zeros for a vector and an image (mid-grey in
[-1, 1]; of an inpainting that fills with zeros just what it is where no pixel is known), and tokens of zeros, of
which none counts where there is a mask: `nothing`, `dropped`. The mask of items of various sizes is no condition: it
stays (`scoresde.masks.is_mask`).

All that is random, u and who is told nothing, is a function of the seed, the epoch and the item alone (`Shown`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from scoresde.checks import ArgumentError
from scoresde.data.arrays import digest
from scoresde.data.folder import ImageFolder
from scoresde.data.shown import Shown, mirrored
from scoresde.entries import check_cond, counted, mapped, named
from scoresde.errors import not_finite, some
from scoresde.levels import scaled, signed
from scoresde.masks import is_mask

__all__ = ["Condition", "Given", "GivenContext", "dropped", "nothing", "nothing_like", "null_of", "same_number"]


def nothing(cond: Mapping[str, Any], num_classes: int | None = None) -> dict[str, Any]:
    """The same keys, and nothing told: for `label` the null class, `num_classes`; for others zeros, which is False in
    the mask of a context, and empty strings. The mask of items of various sizes, `mask`, stays as it is.

    Args:
        cond: of a network, by keyword.
        num_classes: K; needed where there is a label.

    Raises:
        ValueError: if there is a label, and it is not given.

    >>> nothing({"label": torch.tensor([3, 1]), "vector": torch.ones(2, 1)}, num_classes=10)
    {'label': tensor([10, 10]), 'vector': tensor([[0.],
            [0.]])}
    """
    return {
        key: value if is_mask(key, value) else nothing_like(value, null_of(key, num_classes))
        for key, value in cond.items()
    }


def nothing_like(value: Any, null: int) -> Any:
    """A condition of the same structure, which the number `null`, and empty strings, fill."""

    def filled(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return torch.full_like(leaf, null)
        return null if counted(leaf) is None else [""] * len(leaf)

    return mapped(filled, value)


def null_of(key: str, num_classes: int | None = None) -> int:
    """The number that tells a network nothing, throughout a condition of that name. Arguments and errors: `nothing`."""
    if key != "label":
        return 0
    if num_classes is None:
        raise ValueError("a label's null class is num_classes: say how many classes there are")
    return num_classes


def dropped(cond: Mapping[str, Any], which: Tensor, num_classes: int | None = None) -> dict[str, Any]:
    """The conditions, and `nothing` where `which` says so.

    Args:
        cond: of a network, by keyword, B entries each.
        which: bool, shape (B,).
        num_classes: as in `nothing`.

    Raises:
        ValueError: if a condition has not B entries; as `nothing`.

    >>> dropped({"label": torch.tensor([3, 1, 4])}, torch.tensor([False, True, False]), num_classes=10)
    {'label': tensor([ 3, 10,  4])}
    """
    n = len(which)
    check_cond(cond, n, exactly=True)
    for name, leaf in named(cond):
        if counted(leaf) is None:
            raise ValueError(f"condition {name} is {type(leaf).__name__}, for all samples: expected {n} entries")

    def chosen(leaf: Any, null: Any) -> Any:
        if isinstance(leaf, Tensor):
            return torch.where(which.to(leaf.device).reshape(-1, *[1] * (leaf.ndim - 1)), null, leaf)
        return ["" if drop else text for drop, text in zip(which.tolist(), leaf, strict=True)]

    null = nothing(cond, num_classes)
    return {key: mapped(chosen, value, null[key]) for key, value in cond.items()}


class Condition(ABC):
    """condition(x, shown): what a network is told of the items x, shape (B, C, ...), floating point.

    x is as it is shown, mirrored where it is; levels are in [-1, 1].
    """

    @property
    def key(self) -> str:
        """The keyword by which the networks of `scoresde.nn` take it: "image", "vector" or "context"; or another, by
        which an encoder does."""
        return "image"

    @property
    def lazy(self) -> bool:
        """Whether it is made on the CPU, slowly: `loader` does it in other processes."""
        return False

    @property
    def fingerprint(self) -> str:
        """What tells it from others."""
        return repr(self)

    @abstractmethod
    def channels(self, shape: Sequence[int]) -> int:
        """How many channels (of a vector: entries; of tokens: the width) it has for items of that shape:
        `image_condition` of a network, `vector` or `context`.

        Raises:
            ValueError: if it is none for such items.
        """

    def options(self, shape: Sequence[int]) -> dict[str, int]:
        """What a network of `scoresde.nn` is to be built with to be told it: nothing, where an encoder takes it."""
        if self.key not in ("image", "vector", "context"):
            return {}
        return {"image_condition" if self.key == "image" else self.key: self.channels(shape)}

    @abstractmethod
    def __call__(self, x: Tensor, shown: Shown) -> Tensor:
        """Floating point, on the device of x: an image (B, channels, ...) of the size of x, a vector (B, channels), or
        tokens (B, n, channels).

        Raises:
            ValueError: if there are not as many items as `shown` says.
        """

    def told(self, x: Tensor, shown: Shown) -> dict[str, Tensor]:
        """The same by the network's keywords."""
        return {self.key: self(x, shown)}

    def check(self, shape: Sequence[int], n: int) -> None:
        """Raises ValueError unless it is for n items of that shape."""
        self.channels(shape)

    def taken(self, y: Tensor, shape: Sequence[int]) -> Tensor:
        """What a network is told where y has been measured already, and x is not known: y itself; but small images are
        enlarged for super-resolution, colour is taken from them for colourisation, and what is not known is filled.

        Args:
            y: shape (B, ...), floating point; of masked images with a last channel that is positive where they are
                known.
            shape: of an item x.

        Raises:
            ValueError: if y is none of this condition.
        """
        expected = (self.channels(shape), *(shape[1:] if self.key == "image" else ()))
        if tuple(y.shape[1:]) != expected:
            raise ValueError(f"{self!r}: measurements of shape {tuple(y.shape[1:])}, expected {expected}")
        return y

    def measured(self, y: Tensor, shape: Sequence[int]) -> tuple[Condition, ...]:
        """The same as conditions of items that are not known."""
        return (Given(self.taken(y, shape)),)

    def to(self, device: torch.device | str) -> Condition:
        """The same, with what it holds in another device's memory."""
        return self

    @property
    def folder(self) -> ImageFolder | None:
        """Of images that are decoded when they are wanted."""
        return None

    def in_memory(self) -> Condition:
        """The same, with all of them decoded."""
        return self

    def without(self, names: Collection[str]) -> Condition:
        """The same, less those of a folder's images that have these names (`ImageFolder.without`)."""
        return self

    def first(self, n: int) -> Condition:
        """The same, for the first n items alone."""
        return self


def same_number(x: Tensor, shown: Shown) -> None:
    if len(x) != len(shown):
        raise ValueError(f"x has {len(x)} items, but {len(shown)} are shown: give the items that x is of")


@dataclass(frozen=True, eq=False)
class Given(Condition):
    """What was given for each item: a vector (N, length); or an image (N, channels, ...), of the size of x, which is
    mirrored with it. For segmentation x is the mask, and the image is given.

    Args:
        values: N of them; whole levels become float32 in [-1, 1]. Or an `ImageFolder`, decoded when wanted.
        levels: how many there are, 256 in 8-bit images; None for floating-point values.

    Raises:
        ValueError: if values and levels do not go together, or a number is not finite.
    """

    values: Tensor | ImageFolder
    levels: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.values, ImageFolder):
            if self.levels not in (None, 256):
                raise ArgumentError(f"levels={self.levels}: a folder's images have 256")
            object.__setattr__(self, "levels", 256)
            return
        object.__setattr__(self, "values", signed(self.values))
        values = self.values
        if values.ndim < 2 or values.numel() == 0 or values.is_complex() or values.dtype == torch.bool:
            raise ValueError(
                f"values are {values.dtype} of shape {tuple(values.shape)}: expected (N, length) or (N, channels, ...)"
            )
        if values.is_floating_point():
            if self.levels is not None or not bool(values.isfinite().all()):
                raise ArgumentError(
                    f"values are {values.dtype}, levels={self.levels}: expected finite numbers, no levels"
                )
            return
        if self.levels is None or self.levels < 2 or int(values.min()) < 0 or int(values.max()) >= self.levels:
            raise ArgumentError(
                f"values are whole, {int(values.min())} to {int(values.max())}, and levels={self.levels}: expected 0 "
                "to levels - 1"
            )

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        return f"Given({self.key} {self._shape}: {len(self)})"

    @property
    def _shape(self) -> tuple[int, ...]:
        return self.values.shape if isinstance(self.values, ImageFolder) else tuple(self.values.shape[1:])

    @property
    def key(self) -> Literal["image", "vector"]:
        return "vector" if len(self._shape) == 1 else "image"

    @property
    def lazy(self) -> bool:
        return isinstance(self.values, ImageFolder)

    @property
    def fingerprint(self) -> str:
        values = self.values
        return f"{self!r}, {values.digest() if isinstance(values, ImageFolder) else digest(values)}"

    def channels(self, shape: Sequence[int]) -> int:
        if self.key == "image" and self._shape[1:] != tuple(shape[1:]):
            raise ValueError(f"{self!r} is for items of {self._shape[1:]}: an item has the shape {tuple(shape)}")
        return self._shape[0]

    def check(self, shape: Sequence[int], n: int) -> None:
        self.channels(shape)
        if len(self) != n:
            raise ValueError(f"{self!r} has {len(self)} entries for {n} items: give one for each")

    def __call__(self, x: Tensor, shown: Shown) -> Tensor:
        same_number(x, shown)
        values = self.values
        if isinstance(values, ImageFolder):
            found = values.batch(shown.items)
        else:
            found = values.index_select(0, shown.items.to(values.device))
        found = (found if self.levels is None else scaled(found, self.levels)).to(x)
        return mirrored(found, shown.mirrored) if self.key == "image" else found

    @property
    def folder(self) -> ImageFolder | None:
        return self.values if isinstance(self.values, ImageFolder) else None

    def in_memory(self) -> Condition:
        if isinstance(self.values, ImageFolder):
            return replace(self, values=self.values.batch(range(len(self.values))))
        return self

    def without(self, names: Collection[str]) -> Condition:
        return replace(self, values=self.values.without(names)) if isinstance(self.values, ImageFolder) else self

    def to(self, device: torch.device | str) -> Condition:
        if isinstance(self.values, ImageFolder):
            raise ValueError(f"{self.values!r} is not in memory: give it as a tensor")
        return replace(self, values=self.values.to(device))

    def first(self, n: int) -> Condition:
        if isinstance(self.values, ImageFolder):
            raise ValueError(f"{self.values!r} is not in memory: give it as a tensor")
        return replace(self, values=self.values[:n])


@dataclass(frozen=True, eq=False)
class GivenContext(Condition):
    """Tokens that were given for each item: `GivenContext(**scoresde.nn.padded(tokens))` of a list of them.

    Args:
        context: floating point, shape (N, n, width).
        context_mask: which count, bool, shape (N, n).

    Raises:
        ValueError: if these do not fit, or a token that counts is not finite.
    """

    context: Tensor
    context_mask: Tensor

    def __post_init__(self) -> None:
        context, mask = self.context, self.context_mask
        if context.ndim != 3 or not context.is_floating_point() or len(context) == 0:
            raise ValueError(
                f"context is {context.dtype} of shape {tuple(context.shape)}: expected floating point (N, n, width)"
            )
        if mask.dtype != torch.bool or mask.shape != context.shape[:2]:
            raise ValueError(
                f"context_mask is {mask.dtype} of shape {tuple(mask.shape)}: expected bool {tuple(context.shape[:2])}"
            )
        object.__setattr__(self, "context", torch.where(mask[:, :, None], context, 0))
        if bad := not_finite(self.context):
            raise ValueError(f"context of items {some(bad)} has tokens that count and are not finite")

    def __len__(self) -> int:
        return len(self.context)

    def __repr__(self) -> str:
        return f"GivenContext({tuple(self.context.shape[1:])}: {len(self)})"

    @property
    def key(self) -> Literal["context"]:
        return "context"

    @property
    def fingerprint(self) -> str:
        return f"{self!r}, {digest(self.context)}, {digest(self.context_mask)}"

    def channels(self, shape: Sequence[int]) -> int:
        return self.context.shape[2]

    def check(self, shape: Sequence[int], n: int) -> None:
        if len(self) != n:
            raise ValueError(f"{self!r} has {len(self)} entries for {n} items: give one for each")

    def __call__(self, x: Tensor, shown: Shown) -> Tensor:
        same_number(x, shown)
        return self.context.index_select(0, shown.items.to(self.context.device)).to(x)

    def told(self, x: Tensor, shown: Shown) -> dict[str, Tensor]:
        mask = self.context_mask.index_select(0, shown.items.to(self.context_mask.device))
        return {"context": self(x, shown), "context_mask": mask.to(x.device)}

    def taken(self, y: Tensor, shape: Sequence[int]) -> Tensor:
        if y.ndim != 3 or y.shape[2] != self.channels(shape):
            raise ValueError(f"{self!r}: tokens of shape {tuple(y.shape)}, expected (B, n, {self.channels(shape)})")
        return y

    def to(self, device: torch.device | str) -> Condition:
        return replace(self, context=self.context.to(device), context_mask=self.context_mask.to(device))

    def first(self, n: int) -> Condition:
        return replace(self, context=self.context[:n], context_mask=self.context_mask[:n])
