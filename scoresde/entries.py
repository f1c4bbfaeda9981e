"""Conditions: what a network is told beside x_t and the time, `cond` of everything that calls one, for n samples.

A condition is a tensor, of n entries or of one for all; a list or tuple of strings, likewise; or a structure of these,
dicts, lists and tuples as torch's pytrees know them, in which every tensor and list of strings has n entries or one.
All else, numbers, a single string, None, objects, is for all samples, wherever it stands.

What has n entries is taken apart, repeated and joined here, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree  # private by its name alone: torch's own interfaces are made of it

__all__ = [
    "check_cond",
    "check_entries",
    "counted",
    "entries_of",
    "joined",
    "leaves",
    "like",
    "mapped",
    "named",
    "repeated",
]


def mapped(function: Callable[..., Any], value: Any, *others: Any) -> Any:
    """The structure with function(leaf, ...) in place of each leaf; others have the same structure.

    >>> mapped(counted, {"tokens": torch.zeros(2, 77), "texts": ["a", "b"], "scale": 0.5})
    {'tokens': 2, 'texts': 2, 'scale': None}
    """
    return pytree.tree_map(function, value, *others, is_leaf=_whole)


def leaves(value: Any) -> list[Any]:
    """Tensors, lists of strings, and whatever else is in the structure."""
    return pytree.tree_leaves(value, is_leaf=_whole)


def named(cond: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The leaves with their names.

    >>> named({"label": 3, "text": {"tokens": 0.5}})
    [('label', 3), ("text['tokens']", 0.5)]
    """
    return [
        (f"{key}{pytree.keystr(path)}", leaf)
        for key, value in cond.items()
        for path, leaf in pytree.tree_leaves_with_path(value, is_leaf=_whole)
    ]


def counted(leaf: Any) -> int | None:
    """How many entries a tensor or a list of strings has; None for what is for all samples."""
    if isinstance(leaf, Tensor):
        return leaf.shape[0] if leaf.ndim else None  # not len(): that would fix the batch of what is traced
    return len(leaf) if _strings(leaf) else None


def check_entries(name: str, leaf: Any, n: int, exactly: bool = False) -> None:
    """Raises ValueError if a tensor, or a list of strings, has neither n entries nor, unless exactly, one for all."""
    count = counted(leaf)
    if count not in (None, n) and (exactly or count != 1):
        expected = f"expected {n}" if exactly else "expected 1 or as many"
        raise ValueError(f"{name} has {count} entries for {n} samples: {expected}")


def check_cond(cond: Mapping[str, Any] | None, n: int, exactly: bool = False) -> None:
    """What can be known before the first call.

    Args:
        cond: by keyword.
        n: samples.
        exactly: one entry for all does not do.

    Raises:
        TypeError: if cond is no mapping.
        ValueError: if a tensor, or a list of strings, has neither one entry nor one per sample.
    """
    if cond is not None and not isinstance(cond, Mapping):
        raise TypeError(f"cond is {type(cond).__name__}: expected a mapping, {{'label': labels}} say")
    for path, leaf in pytree.tree_leaves_with_path(dict(cond or {}), is_leaf=_whole):
        check_entries(f"cond{pytree.keystr(path)}", leaf, n, exactly)


def entries_of(cond: Mapping[str, Any] | None, which: Tensor | Sequence[int] | slice, n: int) -> dict[str, Any]:
    """The conditions of those of n samples, each as often as it is named.

    Raises:
        ValueError: if something other than tensors and strings may have an entry per sample.

    >>> entries_of({"label": torch.tensor([3, 1, 4]), "text": ("a", "b", "c"), "scale": 0.5}, [2, 0, 2], 3)
    {'label': tensor([4, 3, 4]), 'text': ['c', 'a', 'c'], 'scale': 0.5}
    """
    index = which if isinstance(which, slice) else torch.as_tensor(which, device="cpu")

    def of(path: pytree.KeyPath, leaf: Any) -> Any:
        if n > 1 and counted(leaf) is None and _unclear(leaf, n):
            array = hasattr(leaf, "__len__") and not isinstance(leaf, Mapping) and len(leaf) == n
            told = "a tensor, of an entry for each or of one for all" if array else "a dict"
            raise ValueError(
                f"cond{pytree.keystr(path)} is {type(leaf).__name__} with entries for {n} samples, and cannot be taken "
                f"apart: give {told}"
            )
        if counted(leaf) != n:
            return leaf
        if isinstance(index, slice):
            return leaf[index]
        return leaf[index.to(leaf.device)] if isinstance(leaf, Tensor) else [leaf[i] for i in index.tolist()]

    return pytree.tree_map_with_path(of, dict(cond or {}), is_leaf=_whole)


def repeated(cond: Mapping[str, Any] | None, k: int, n: int) -> dict[str, Any]:
    """The conditions of k batches one after the other, from those of one of n samples. Errors: `entries_of`."""
    return entries_of(cond, torch.arange(n, device="cpu").repeat(k), n)


def joined(conds: Sequence[Mapping[str, Any]], x: Tensor) -> dict[str, Any] | None:
    """The conditions of one call on as many batches of the size of x, one after the other, from those of each; or None
    where they cannot be put together, and a call for each is to be made. What is the same for all samples of all
    batches stays as it is.
    """

    def join(*values: Any) -> Any:
        first, n = values[0], x.shape[0]
        for_all = (counted(first) is None and not _unclear(first, n)) or counted(first) == 1 < n
        if for_all and all(_same(value, first) for value in values):
            return first
        parts = [_each(value, x) for value in values]
        if all(isinstance(part, list) for part in parts):
            return [text for part in parts for text in part]
        if not all(isinstance(part, Tensor) and part.shape == parts[0].shape for part in parts):
            raise ValueError
        return torch.cat(parts)

    if any(cond.keys() != conds[0].keys() for cond in conds):
        return None
    try:
        return {name: mapped(join, *(cond[name] for cond in conds)) for name in conds[0]}
    except ValueError:  # of structures that differ, too
        return None


def like(before: Any, value: Any, n: int, name: str) -> Any:
    """A condition of n samples in place of another: shaped like its tensors and lists of strings, all of them if the
    value has no structure; else, where the two do not go together, the value by itself.

    Raises:
        ValueError: if a tensor cannot be shaped so, or has neither one entry nor one per sample.

    >>> like({"tokens": torch.ones(2, 3), "texts": ["a", "b"]}, {"tokens": 0, "texts": ""}, 2, "text")
    {'tokens': tensor([[0., 0., 0.],
            [0., 0., 0.]]), 'texts': ['', '']}
    """

    def shaped(before: Any, value: Any) -> Any:
        if isinstance(before, Tensor):
            shape = (n, *before.shape[1:])
            if isinstance(value, int | float):
                return torch.full(shape, value, dtype=before.dtype, device=before.device)
            if isinstance(value, Tensor):
                try:
                    return value.to(before).expand(shape)
                except RuntimeError as error:
                    raise ValueError(
                        f"{name} of shape {tuple(value.shape)} cannot stand for one of shape {shape}: give one entry, "
                        "or one per sample"
                    ) from error
        if _strings(before) and (isinstance(value, str) or counted(value) == 1):
            return [value if isinstance(value, str) else value[0]] * n
        check_cond({name: value}, n)
        return value

    if pytree.tree_is_leaf(value, is_leaf=_whole):
        return mapped(lambda leaf: shaped(leaf, value), before)
    if pytree.tree_structure(before, is_leaf=_whole) == pytree.tree_structure(value, is_leaf=_whole):
        return mapped(shaped, before, value)
    check_cond({name: value}, n)
    return value


def _whole(value: Any) -> bool:
    """Whether a list or tuple is a leaf: of strings, or with no tensor and no string in it."""
    if not isinstance(value, list | tuple) or not value:
        return False
    flat = all(pytree.tree_is_leaf(item) and not isinstance(item, Tensor) for item in value)
    return flat or not any(isinstance(leaf, Tensor | str) for leaf in pytree.tree_leaves(value))


def _strings(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, str) for item in value)


def _unclear(leaf: Any, n: int) -> bool:
    """Whether something that is neither a tensor nor strings, a list of numbers or an array say, may have n entries."""
    if isinstance(leaf, Tensor | str | bytes) or _strings(leaf):
        return False
    if not hasattr(leaf, "__len__"):  # an object, which may hold some
        return any(counted(held) == n for held in leaves(getattr(leaf, "__dict__", {})))
    if isinstance(leaf, list | tuple) and any(_unclear(item, n) for item in leaf):
        return True
    try:
        return isinstance(leaf, Mapping) or len(leaf) == n
    except TypeError:  # an array of no dimension
        return False


def _same(value: Any, first: Any) -> bool:
    return value is first or (isinstance(value, int | float | str) and not isinstance(first, Tensor) and value == first)


def _each(value: Any, x: Tensor) -> Any:
    """A condition with an entry per sample, or None where it has none to give."""
    n = x.shape[0]
    if isinstance(value, int | float) and not isinstance(value, bool):
        dtype = torch.int64 if isinstance(value, int) else x.dtype
        return torch.full((n,), value, dtype=dtype, device=x.device)
    if isinstance(value, str):
        return [value] * n
    if isinstance(value, Tensor) and value.ndim == 0:
        return value.expand(n)
    if (count := counted(value)) not in (1, n):
        return None
    if count == n:
        return value if isinstance(value, Tensor) else list(value)
    return value.expand(n, *value.shape[1:]) if isinstance(value, Tensor) else list(value) * n
