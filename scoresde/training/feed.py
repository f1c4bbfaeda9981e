"""What a step sees: the items of a batch (`scoresde.data.Order`), where they come from, and how they are split into
parts, of which part k of M takes those from floor(k B / M) on.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from scoresde.checks import ArgumentError
from scoresde.data.arrays import digest
from scoresde.data.loader import loader
from scoresde.data.order import Order
from scoresde.entries import check_cond, entries_of, named
from scoresde.errors import not_finite, some
from scoresde.tensors import check_batch
from scoresde.training import parallel

__all__ = ["DataSource", "InMemory", "batches", "digest", "look_at", "source_of", "split"]


@runtime_checkable
class DataSource(Protocol):
    """Data that is fetched by index, `scoresde.data.TrainingData` for one.

    An attribute `fingerprint`, if there is one, tells it from other data: a checkpoint is refused on another. What has
    an attribute `lazy` that is true is fetched by other processes (`scoresde.data.loader`). What has a method `look` is
    asked to look, in one process, before a run's first step: it raises ValueError if items cannot be fetched.
    """

    def __len__(self) -> int: ...

    def batch(self, items: Tensor, epochs: Tensor, /) -> tuple[Tensor, Tensor | Mapping[str, Any] | None]:
        """Items by their numbers, (B,), floating point, (B, ...), as they are in these epochs, (B,); and for them the
        network's keyword arguments, or its `label` alone."""
        ...


class InMemory:
    """Tensors as a `DataSource`.

    Args:
        data: shape (N, ...), floating point; of whole states, if asked for, integers.
        cond: as `scoresde.entries` has it, tensors and lists of strings of N entries.

    Raises:
        TypeError, ValueError: if data is not floating point, empty or not finite, or cond has not N entries.
    """

    def __init__(self, data: Tensor, cond: Mapping[str, Any], whole: bool = False) -> None:
        if not whole:
            check_batch(data, "data")
        if len(data) == 0:
            raise ValueError(f"data has shape {tuple(data.shape)}: expected (N, ...), N >= 1")
        if bad := not_finite(data):
            raise ValueError(f"data items {some(bad)} are not finite")
        check_cond(cond, len(data), exactly=True)
        entries_of(cond, slice(1), len(data))  # says what cannot be taken apart
        self.data, self.cond = data, dict(cond)

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, items: Tensor, epochs: Tensor, /) -> tuple[Tensor, dict[str, Any]]:
        return self.data[items], entries_of(self.cond, items, len(self.data))

    @property
    def made_for(self) -> dict[str, str]:
        """What tells this data from other."""
        data = self.data
        return {
            "data": f"{tuple(data.shape)} in [{data.min():.4g}, {data.max():.4g}], {digest(data)}",
            "cond": ", ".join(sorted(f"{name} {_digest(leaf)}" for name, leaf in named(self.cond))) or "none",
        }


def _digest(leaf: Any) -> str:
    """What tells a condition from others: of strings and what is for all items, its repr's."""
    return digest(leaf if isinstance(leaf, Tensor) else torch.tensor(list(repr(leaf).encode())))


def source_of(
    data: Tensor | DataSource, cond: Mapping[str, Any] | None, whole: bool = False
) -> tuple[DataSource, dict[str, str]]:
    """Data as a `DataSource`, and what tells it from other data; a tensor of integers only if `whole`.

    Raises:
        TypeError: if it is neither a tensor nor has `batch` and a length.
        ValueError: as `InMemory`; if it is empty, or a source of its own is given conditions.
    """
    if isinstance(data, Tensor):
        source = InMemory(data, cond or {}, whole)
        return source, source.made_for
    if not isinstance(data, DataSource):
        raise TypeError(f"data is {type(data).__name__}: expected a tensor (N, ...), or an object with len and batch")
    if cond:
        raise ValueError("cond= goes with tensors: this data returns its own, batch(items, epochs) -> (x, cond)")
    if len(data) == 0:
        raise ValueError(f"data, {type(data).__name__}, has no items")
    about = f"{type(data).__name__} of {len(data)} items"
    fingerprint = getattr(data, "fingerprint", None)
    labels = getattr(data, "labels", None)
    return data, {
        "data": about if fingerprint is None else f"{about}, {fingerprint}",
        "cond": f"label {digest(labels)}" if isinstance(labels, Tensor) else "its own",
    }


def look_at(source: DataSource) -> None:
    """Raises ValueError if it looks, and items cannot be fetched; in the other processes RuntimeError."""
    look = getattr(source, "look", None)
    parallel.by_first(lambda: look() if look is not None and parallel.rank() == 0 else None)


def batches(
    source: DataSource, order: Order, start: int, stop: int, workers: int
) -> Generator[tuple[Tensor, dict[str, Any]], None, None]:
    """The steps' items, and the network's keyword arguments for them, one step after the other.

    Raises:
        ValueError: if these have neither one entry nor one per item.
    """
    found: Iterable[tuple[Tensor, Any]]
    if getattr(source, "lazy", False):
        found = loader(source, order, start, stop, workers=workers)  # type: ignore[arg-type]
    else:
        found = (source.batch(order.items(step), order.epochs(step)) for step in range(start, stop))
    for x, about in found:
        cond = {} if about is None else {"label": about} if isinstance(about, Tensor) else dict(about)
        check_cond(cond, len(x))
        yield x, cond


def split(size: int, accumulate: int, rank: int, world: int) -> list[tuple[int, int]]:
    """(start, stop) of the parts of a batch that a process takes: M = at least `accumulate` parts in all, as many in
    each process, equal but for one item.

    Raises:
        ValueError: if there are more parts than items.

    >>> split(10, 1, 0, 1), split(10, 3, 1, 2)
    ([(0, 10)], [(5, 7), (7, 10)])
    """
    each = -(-accumulate // world)
    M = each * world
    if size < M:
        raise ArgumentError(f"batch_size={size}: {world} processes and accumulate={accumulate} make {M} parts of it")
    edges = [size * k // M for k in range(M + 1)]
    return [(edges[k], edges[k + 1]) for k in range(rank * each, (rank + 1) * each)]
