"""Whole states whose law is known: a table of items and their probabilities, with its exact denoiser.

p(x_0^i = k | x_t) ~ sum_n weight_n [x_n^i = k] prod_j q(x_t^j | x_0^j = x_n^j)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from scoresde.categorical.denoiser import ProbabilityDenoiser, wide
from scoresde.categorical.process import CategoricalProcess, drawn
from scoresde.checks import ArgumentError
from scoresde.tensors import Time, brief, drawn_from

__all__ = ["Table"]

_NEVER = -1e30  # log of zero, as a number that can be counted


class Table:
    """The law of items x_n with probability w_n, and the exact posterior of each entry under any process.

    Args:
        data: the items, integers, shape (N, ...); each different.
        weights: their probabilities, shape (N,), of any sum; equal ones by default.

    Raises:
        ValueError: if data are not whole, or weights are not N numbers >= 0 with a sum above 0.

    >>> coin = Table(torch.tensor([[0], [1]]), weights=[0.1, 0.9])
    >>> coin.log_prob(torch.tensor([[1]])).exp()
    tensor([0.9000], dtype=torch.float64)
    """

    def __init__(self, data: Tensor, weights: Any = None) -> None:
        if not isinstance(data, Tensor) or data.is_floating_point() or data.ndim < 1 or not len(data):
            raise ArgumentError(f"data is {brief(data)}: expected whole states, an integer tensor (N, ...)")
        w = torch.ones(len(data)) if weights is None else torch.as_tensor(weights)
        w = w.to(device="cpu", dtype=torch.float64)
        if w.shape != (len(data),) or not bool((w >= 0).all()) or not 0 < float(w.sum()) < torch.inf:
            raise ArgumentError(f"weights is {brief(w)}: expected {len(data)} numbers >= 0 of a sum > 0")
        self.data, self.weights = data.long().cpu(), w / w.sum()

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n items, shape (n, ...)."""
        noise = torch.randn(n, dtype=torch.float64, generator=drawn_from(generator, "cpu"))
        return self.data[drawn(self.weights.expand(n, -1), noise)]

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x), shape (B,), float64: minus infinity for what is not in the table."""
        same = (x.reshape(len(x), 1, -1).cpu() == self.data.reshape(1, len(self.data), -1)).all(2)
        return (same * self.weights).sum(1).log()

    def denoiser(self, process: CategoricalProcess) -> ProbabilityDenoiser:
        """The exact posterior, entry by entry. Of an x_t that no item of the table could have come to, which steps of
        several entries at once make of a masked process, it is that of the items that disagree in the fewest entries.

        Raises:
            ValueError: if the process has fewer states than the data.
        """
        process.check(self.data, name="data")
        return _Exact(self, process)


class _Exact(ProbabilityDenoiser):
    def __init__(self, table: Table, process: CategoricalProcess) -> None:
        self.table, self.process = table, process

    def log_probs(self, x: Tensor, t: Time, /, **cond: Any) -> Tensor:
        B, data = len(x), self.table.data.to(x.device).reshape(len(self.table.data), -1)
        L = wide(self.process.likelihood(x, t)).reshape(B, -1, self.process.states)
        hot = F.one_hot(data, self.process.states).to(L)  # (N, D, K)
        log = L.log().clamp(min=_NEVER)
        each = log[:, torch.arange(data.shape[1], device=x.device), data].sum(2)  # (B, N)
        posterior = (each + self.table.weights.to(each).log()).softmax(1)
        probs = torch.einsum("bn,ndk->bdk", posterior, hot) * (L > 0)
        total = probs.sum(-1, keepdim=True)  # zero where the table's nearest items do not have what x shows
        return (
            torch.where(total > 0, probs / total.clamp(min=1e-300), L / L.sum(-1, keepdim=True))
            .log()
            .reshape(*x.shape, -1)
        )

    def __repr__(self) -> str:
        return f"Table({len(self.table.data)} items).denoiser({self.process!r})"
