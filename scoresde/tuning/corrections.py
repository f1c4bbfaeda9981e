"""What is added to a solver's table, and where in the labels of its evaluations it is told to look."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from scoresde.tableau import Tableau

__all__ = ["Corrections", "wide"]


class Corrections(NamedTuple):
    """Additive corrections to a table of R rows that draws no noise:

        x_{i+1} = (a_i + a'_i) x_i + sum_k (b_{i,k} + b'_{i,k}) F_{i-k},    F_i = p_i x_i + q_i D(x_i, t'_i)

    with p and q as they were: only what D is told of the time is moved, and the state stands where it stood.

    Attributes:
        t: the times t'_i, R numbers.
        a: a'_i, R numbers.
        b: b'_{i,k}, R lines of R numbers, zero where k > i.
    """

    t: tuple[float, ...]
    a: tuple[float, ...]
    b: tuple[tuple[float, ...], ...]

    def checked(self) -> Corrections:
        """Itself, of floats.

        Raises:
            ValueError: unless the shapes are those above and all is finite.
        """
        t, a, b = (torch.tensor(column, dtype=torch.float64) for column in self)
        R = len(t)
        if t.shape != (R,) or a.shape != (R,) or b.shape != (R, R):
            raise ValueError(f"corrections of shapes {tuple(t.shape)}, {tuple(a.shape)} and {tuple(b.shape)}")
        if not all(map(math.isfinite, [*t.tolist(), *a.tolist(), *b.flatten().tolist()])):
            raise ValueError("the corrections are not finite")
        return Corrections(tuple(t.tolist()), tuple(a.tolist()), tuple(map(tuple, b.tolist())))

    def onto(self, table: Tableau) -> Tableau:
        """The table with them.

        Raises:
            ValueError: if it has another number of rows, or as `Tableau`.
        """
        if len(self.t) != len(table):
            raise ValueError(f"corrections of {len(self.t)} rows to a table of {len(table)}")
        t, a, b = (torch.tensor(column, dtype=torch.float64, device="cpu") for column in self)
        return Tableau(
            table.grid,
            a=table.a + a,
            b=wide(table.b) + b,
            c=table.c,
            view=(table.p, table.q),
            t=t,
            step=table.step,
        )


def wide(b: Tensor) -> Tensor:
    """The factors b of a table, (R, K), with a column for every lag, (R, R)."""
    R = len(b)
    return torch.nn.functional.pad(b[:, :R], (0, R - min(R, b.shape[1])))
