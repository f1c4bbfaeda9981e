"""What a run is stopped by."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["CheckpointError", "NonFiniteError", "narrowed", "not_finite", "some"]


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


def not_finite(x: Tensor) -> list[int]:
    """The samples of x, shape (B, ...), that are not finite: a look at the device."""
    bad: list[int] = (~x.detach().isfinite().reshape(len(x), -1).all(1)).nonzero().flatten().tolist()
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


def some(samples: list[int]) -> str:
    """The first of them, for a message."""
    return ", ".join(map(str, samples[:8])) + (f", ... ({len(samples)} in all)" if len(samples) > 8 else "")


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, foreign, or was made for something else."""
