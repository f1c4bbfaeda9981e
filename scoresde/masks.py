"""Items of various sizes in one batch: sets of atoms or points, sounds, texts. A **mask** says which entries there are;
the others fill up, and count for nothing.

A batch x has the shape (B, ...) of its largest item, and the mask, bool, as many dimensions, each as x has it or 1: for
sets of points (B, N, d) it is (B, N, 1), for sounds (B, C, L) it is (B, 1, L), and it may be of the shape of x. (Fewer
dimensions are refused: which of x's they are would be a guess.) True is where an entry exists.

An item's **own** entries are numbered as they stand in it, from the first to its `dims`-th. Everything that adds up
over an item's entries, a norm, a mean, a density, is made here, in that numbering: they are brought to the front, zeros
behind them, and neighbours are added up, pairs of pairs, as a tree,

    ((e_1 + e_2) + (e_3 + e_4)) + ((e_5 + 0) + (0 + 0))

to which more zeros add exactly nothing. So a sum is the same to the last bit however far a batch is filled up, and
with whatever; and it is as exact as sums by pairs are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from scoresde.checks import ArgumentError
from scoresde.networks import Holder, contents
from scoresde.tensors import known_any

__all__ = ["MASK", "Own", "batch_of", "is_mask", "mask_name", "masks_of", "refuse_masks"]

MASK = "mask"
"""The condition that is a mask, where `scoresde.Masked` is not told another name."""


def is_mask(name: str, value: Any) -> bool:
    """Whether a condition of that name is a mask: bool, and called `MASK`. What it says is true of an item in any case:
    it is never dropped, nor made nothing.

    >>> is_mask("mask", torch.tensor([[True]])), is_mask("mask", torch.tensor([[1.0]]))
    (True, False)
    """
    return name == MASK and isinstance(value, Tensor) and value.dtype == torch.bool


class Own:
    """The own entries of the items of a batch: all of them, where there is no mask.

    Attributes:
        shape: of the batch, (B, ...).
        mask: bool, of that shape; None where all entries are own.
        dims: how many each item has: float64, shape (B,), with a mask; else one number for all.

    >>> own = Own((2, 3, 1), torch.tensor([[[True], [True], [False]], [[True], [False], [False]]]))
    >>> own.dims, own.mean(torch.tensor([[[1.0], [2.0], [9.0]], [[5.0], [9.0], [9.0]]]))
    (tensor([2., 1.], dtype=torch.float64), tensor([1.5000, 5.0000]))
    """

    def __init__(self, shape: Sequence[int], mask: Tensor | None = None) -> None:
        """
        Args:
            shape: (B, ...).
            mask: as the module says; of one item for all.

        Raises:
            TypeError: if the mask is no tensor.
            ValueError: if it is not bool, or its shape does not fit.
        """
        self.shape = tuple(shape)
        self.mask = None if mask is None else _checked(mask, self.shape)

    @cached_property
    def dims(self) -> Any:  # a number or a tensor: arithmetic with coefficients is the same
        n = math.prod(self.shape[1:])
        if self.mask is None:
            return n
        return self.mask.reshape(-1, n).sum(1).to(torch.float32 if self.mask.device.type == "mps" else torch.float64)

    @property
    def most(self) -> int:
        """The largest of dims; it looks at the device."""
        return int(self.dims if self.mask is None else self.dims.max())

    @property
    def root(self) -> Any:
        """The square root of dims."""
        return math.sqrt(self.dims) if self.mask is None else self.dims.sqrt()

    @cached_property
    def _order(self) -> Tensor:
        """Of each item the places of its own entries, then the others, (B, n)."""
        assert self.mask is not None
        return (~self.mask).flatten(1).byte().argsort(dim=1, stable=True)

    @cached_property
    def _number(self) -> Tensor:
        """Of each place the number of the entry there among the own, from 0, (B, n)."""
        assert self.mask is not None
        return self.mask.flatten(1).cumsum(1).sub(1).clamp(min=0)

    def __repr__(self) -> str:
        return f"Own({self.shape}{'' if self.mask is None else ', a mask'})"

    def check(self) -> None:
        """Raises ValueError if an item has no entry, where looking does not stall a device."""
        if self.mask is not None and known_any(empty := self.dims == 0):
            raise ValueError(f"the mask leaves items {empty.nonzero().flatten().tolist()} without any entry")

    def only(self, x: Tensor) -> Tensor:
        """x, shape (..., B, ...), and exactly zero where an entry is not own, whatever x holds there."""
        return x if self.mask is None else torch.where(self.mask, x, 0)

    def rows(self, x: Tensor) -> Tensor:
        """The own entries of each item in their order and then zeros: x of shape (*k, B, ...) as (*k, B, n)."""
        lead = x.shape[: x.ndim - len(self.shape)]
        flat = x.reshape(*lead, self.shape[0], math.prod(self.shape[1:]))
        if self.mask is None:
            return flat
        there = torch.arange(flat.shape[-1], device=flat.device) < self.dims[:, None]
        return torch.where(there, flat.gather(-1, self._order.expand(flat.shape)), 0)

    def placed(self, rows: Tensor) -> Tensor:
        """The inverse of `rows`, zero where an entry is not own: (*k, B, m) as (*k, B, ...), m >= the largest dims."""
        lead = rows.shape[:-2]
        if self.mask is None:
            return rows.reshape(*lead, *self.shape)
        at = self._number.clamp(max=rows.shape[-1] - 1).expand(*lead, -1, -1)
        return self.only(rows.gather(-1, at).reshape(*lead, *self.shape))

    def sum(self, x: Tensor) -> Tensor:
        """Over the own entries of each item, shape (B,), for x of shape (B, ...)."""
        if self.mask is None:
            return x.reshape(x.shape[0], -1).sum(1)
        return self.total(self.rows(x.reshape(self.shape)))

    def total(self, rows: Tensor) -> Tensor:
        """The sum over the last dimension of what `rows` made."""
        if self.mask is None:
            return rows.sum(-1)
        while (n := rows.shape[-1]) > 1:
            rows = F.pad(rows, (0, n % 2))
            rows = rows[..., ::2] + rows[..., 1::2]
        return rows[..., 0]

    def mean(self, x: Tensor) -> Tensor:
        """Over the own entries of each item, shape (B,), for x of shape (B, ...)."""
        if self.mask is None:
            return x.reshape(x.shape[0], -1).mean(1)
        return self.sum(x) / self.dims.to(x.dtype)

    def norm(self, x: Tensor) -> Tensor:
        """Of each item, shape (B,), for x of shape (B, ...)."""
        return x.reshape(x.shape[0], -1).norm(dim=1) if self.mask is None else self.sum(x**2).sqrt()

    def take(self, which: Tensor | Sequence[int]) -> Own:
        """Of some of the items."""
        if self.mask is None:
            return Own((len(which), *self.shape[1:]))
        mask = self.mask[which]
        return Own(mask.shape, mask)

    def alike(self) -> list[tuple[int, Tensor | slice]]:
        """The items by their number of own entries: each number, and which have it. It looks at the device."""
        if self.mask is None:
            return [(self.dims, slice(None))]
        return [(int(n), (self.dims == n).nonzero().flatten()) for n in self.dims.unique().tolist()]


def _checked(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The mask, in that shape."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"the mask is {type(mask).__name__}: expected a tensor, bool, True where an entry exists")
    fits = mask.ndim == len(shape) and all(m in (1, n) for m, n in zip(mask.shape, shape, strict=True))
    if mask.dtype != torch.bool or not fits:
        raise ValueError(
            f"the mask is {mask.dtype} of shape {tuple(mask.shape)} for a batch of shape {shape}: expected bool, True "
            "where an entry exists, with as many dimensions, each of that size or 1; (B, N, 1) for sets (B, N, d), "
            "(B, 1, L) for sounds (B, C, L)"
        )
    return mask.expand(shape)


def batch_of(items: Sequence[Tensor], length: int | None = None, dim: int = 0) -> tuple[Tensor, Tensor]:
    """Items of various lengths as one batch, filled up with zeros, and its mask.

    Args:
        items: of each sample a tensor, (n_i, ...): alike but for the length n_i, which may be 0.
        length: N of the batch, by default the largest n_i.
        dim: of an item, which is of various lengths: 0 for sets (n_i, d), -1 for sounds (C, L_i).

    Returns:
        x, (B, N, ...), and the mask, bool, of as many dimensions, (B, N, 1, ...).

    Raises:
        ValueError: if there are none, they differ in more than the length, or one is longer than that.

    >>> x, mask = batch_of([torch.ones(2, 3), torch.ones(1, 3)])
    >>> x.shape, mask[..., 0]
    (torch.Size([2, 2, 3]), tensor([[ True,  True],
            [ True, False]]))
    """
    shapes = [tuple(item.shape) for item in items]
    ranks = {len(shape) for shape in shapes}
    if len(ranks) != 1 or not -(rank := ranks.pop()) <= dim < rank:
        raise ValueError(
            f"items of shapes {shapes}, dim={dim}: expected tensors of as many dimensions, dim one of them"
        )
    dim %= rank
    rest = {shape[:dim] + shape[dim + 1 :] for shape in shapes}
    longest = max(shape[dim] for shape in shapes)
    N = longest if length is None else length
    if len(rest) != 1 or longest > N:
        raise ValueError(f"items of shapes {shapes}, length={length}: expected them alike but for dim={dim}, n_i <= N")
    after = rank - 1 - dim
    x = torch.stack([F.pad(item, (0, 0) * after + (0, N - item.shape[dim])) for item in items])
    counts = torch.tensor([shape[dim] for shape in shapes], device=x.device)
    mask = torch.arange(N, device=x.device) < counts[:, None]
    return x, mask.reshape(len(items), *[1] * dim, N, *[1] * after)


def mask_name(holder: Holder) -> str | None:
    """The condition by which a denoiser, or one inside of it, is given its mask (`scoresde.Masked`); None without.

    Raises:
        ValueError: if there are several.
    """
    found = {name for part in (holder, *contents(holder)) if (name := getattr(part, "mask_name", None)) is not None}
    if len(found) > 1:
        raise ArgumentError(f"masks by several conditions, {', '.join(sorted(found))}: give all Masked one name")
    return found.pop() if found else None


def refuse_masks(holder: Holder, what: str = "this") -> None:
    """Raises ValueError if a denoiser is masked: for what would count entries that an item does not have."""
    if mask_name(holder) is not None:
        raise ArgumentError(
            f"{what} does not know of masks, and would count the entries that fill up among an item's own, so it takes "
            "no Masked denoiser: give items of one size at a time, without"
        )


def masks_of(cond: Mapping[str, Any], name: str) -> Tensor:
    """The mask among the conditions.

    Raises:
        ValueError: if it is not there.
    """
    if name not in cond:
        raise ValueError(
            f"a Masked denoiser without its mask: pass cond={{{name!r}: mask}}, bool, one entry per sample"
        )
    mask: Tensor = cond[name]
    return mask
