"""What a run is stopped by, and the words of its message."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["CheckpointError", "NonFiniteError", "all_finite", "given_to", "items_of", "narrowed", "not_finite", "some"]


class NonFiniteError(ArithmeticError):
    """A run met a NaN or an infinity.

    Attributes:
        step: the grid step, or None if the replay did not meet it again.
        time: the time of the evaluation, or None.
        samples: indices of the samples that were not finite.
    """

    def __init__(self, message: str, step: int | None, time: float | None, samples: list[int]) -> None:
        super().__init__(message)
        self.step, self.time, self.samples = step, time, samples

    def of(self, what: str, which: list[int]) -> NonFiniteError:
        """The same, of these samples of more than the run had, called what they are."""
        where = "" if self.step is None else f" in step {self.step}, at t = {self.time:.6g}"
        return NonFiniteError(f"{what} {some(which)} became non-finite{where}", self.step, self.time, which)


def all_finite(x: Tensor) -> bool:
    """Whether x is finite throughout: a look at the device. A sum that is finite, the cheapest one, has no term that is
    not; one that is not may be an overflow.
    """
    return bool(x.detach().sum().isfinite()) or bool(x.detach().isfinite().all())


def not_finite(x: Tensor) -> list[int]:
    """The samples of x, shape (B, ...), that are not finite: a look at the device."""
    if all_finite(x):
        return []
    bad: list[int] = (~x.detach().isfinite().reshape(len(x), x.shape[1:].numel()).all(1)).nonzero().flatten().tolist()
    return bad


def narrowed(x: Tensor, dtype: torch.dtype, what: str, batch: int = 0) -> Tensor:
    """x, whose dimension `batch` is that of the samples, in another dtype; a look at the device where that holds less.

    Raises:
        NonFiniteError: where a finite number overflows.
    """
    out = x.to(dtype)
    if out.dtype != x.dtype and torch.finfo(out.dtype).max < torch.finfo(x.dtype).max:
        overflow = out.detach().isinf() & x.detach().isfinite()
        if samples := overflow.movedim(batch, 0).reshape(x.shape[batch], -1).any(1).nonzero().flatten().tolist():
            largest = float(x.detach().abs()[overflow].max())
            raise NonFiniteError(
                f"{what}: samples {some(samples)} reach {largest:.4g}, which {dtype} does not hold; start from an x in "
                "float32",
                None,
                None,
                samples,
            )
    return out


def some(samples: Sequence[object]) -> str:
    """The first of them, for a message."""
    return ", ".join(map(str, samples[:8])) + (f", ... ({len(samples)} in all)" if len(samples) > 8 else "")


def items_of(x: Tensor) -> str:
    """What a batch is, in words."""
    return f"{len(x)} item{'s' * (len(x) != 1)} of shape {tuple(x.shape[1:])}"


def given_to(net: object, x: Tensor, time: Tensor, cond: Mapping[str, Any]) -> str:
    """A sentence on what a network was called with, for an error of its own."""
    try:
        span = f" from {time.min().item():.6g} to {time.max().item():.6g}"
    except RuntimeError:  # the device may be lost by now
        span = ""
    labels = f"time labels {tuple(time.shape)} {time.dtype}{span}"
    told = [f"x of shape {tuple(x.shape)}, {items_of(x)}, {x.dtype}", labels]
    for name, value in cond.items():
        found = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        told.append(f"{name} {found}")
    layers = net.modules() if isinstance(net, torch.nn.Module) else ()
    rows = [layer.num_embeddings for layer in layers if isinstance(layer, torch.nn.Embedding)]
    table = f"; it holds torch.nn.Embedding of {' and '.join(map(str, rows))} rows, which take whole numbers from 0"
    return f"the network was called with {', '.join(told)}{table if rows else ''}"


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, foreign, or was made for something else."""
