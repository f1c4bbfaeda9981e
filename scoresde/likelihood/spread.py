"""How well a sum of random traces is known: its variance from the probes themselves, and the variance of that."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from scoresde.masks import Own

__all__ = ["Spread", "Spreads"]


class Spread:
    """The variance V of a weighted sum of estimates, each the mean of K probes of its own, of derivatives that change
    little from one to the next, and the variance W of V.

    V is estimated from the differences of d within each estimate. Of a single probe it is 2 (q - d . d'), with q =
    |u|^2 of its own evaluation and d' of the ones before and after: where J is large at one evaluation, and the weights
    change from one to the next, nothing of it is counted by another's weight. K signs that are alike, +-v, are a single
    probe. They are with probability p = 2^{-(n - 1)(K - 1)}, which leaves 1 / K - p of one probe's variance to the
    others.

    W is that of q, taken without what d is on average, which two probes tell in two ways:

        (q - q')^2 / 2 = Var q,    2 (u . u')^2 = 2 tr J^4 = Var q    on average, or about that for signs

    The sum of both is taken, of single probes, whose J need not be the same, with the first of them twice. That is two
    or three times what it should be where J is the same for both. It is cut at what one large direction would make of
    V, the square of one normal number for each probe but one, or for a single probe. Signs are too few in two
    dimensions for that (a pair of them is alike or all there is, so that pairs are counted), and single ones up to
    three, where |d - d'|^2 by the weight of the later is all that is taken.
    """

    def __init__(self, distribution: str) -> None:
        self.signs = distribution == "rademacher"
        self.variance: Tensor | float = 0.0
        self.doubt: Tensor | float = 0.0
        self._last: _Single | None = None

    def add(self, v: Tensor, u: Tensor, weight: float = 1.0) -> None:
        """The next estimate, by its probes and products (K, B, n). `variance`, (B,), is then V of the sum so far, and
        `doubt` W.
        """
        K, n, u = len(v), v.shape[2], u.detach()
        if K == 0 or (n == 1 and self.signs):
            return
        d, kept = v * u, 1.0
        if self.signs and n > 3:
            # The squares lose Var(trace) / n more than the pairs do, and Var(trace) is 2 (squares - pairs).
            d, kept = d - d.mean(2, keepdim=True), 1 - 2 / n
            u = v * d
        scale = weight**2 / kept
        if K == 1:
            V, W = self._single(d[0], u[0], scale)
        else:
            V, W = self._several(v, d, u, scale)
        self.variance, self.doubt = self.variance + V, self.doubt + W

    def _single(self, d: Tensor, u: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """What one probe adds to V and W, and what it changes of the one before, whose neighbour it is."""
        q, last = torch.linalg.vecdot(u, u), self._last
        self._last = one = _Single(d, u, q, scale)
        if last is None:
            return one.V, one.W
        if self.signs and d.shape[1] <= 3:
            if not last.neighbours:
                scale, self.variance, self.doubt = scale + last.scale, 0.0, 0.0
            self._last = one._replace(neighbours=1)
            V = scale * self._apart(one, last)
            return V, 2 * V**2
        both = torch.linalg.vecdot(d, last.d) if self.signs else torch.zeros_like(q)
        var = (q - last.q) ** 2 + 2 * torch.linalg.vecdot(u, last.u) ** 2
        settled, self._last = last.beside(both, var), (one := one.beside(both, var))
        return one.V + settled.V - last.V, one.W + settled.W - last.W

    def _several(self, v: Tensor, d: Tensor, u: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """V and W of the mean of K probes."""
        K, n = len(d), d.shape[2]
        p = 2.0 ** -((n - 1) * (K - 1)) if self.signs else 0.0
        p, last = p if p > 1e-16 else 0.0, self._last
        products = torch.einsum("kbn,lbn->bkl", u, u)
        q = products.diagonal(dim1=1, dim2=2)
        overlap = ((products**2).sum((1, 2)) - (q**2).sum(1)) / (K * (K - 1))
        half = q.mean(1)  # of one probe's variance
        if self.signs:
            half = half - ((d.sum(0) ** 2).sum(1) - q.sum(1)) / (K * (K - 1))  # less the mean of d_k d_l over k != l
        share = 2 * scale * (1 / K if last is None else 1 / K - p)
        V, counted = share * half, K * (K - 1) if n == 2 and self.signs else K - 1
        W = torch.minimum(share**2 * (q.var(1) + 2 * overlap) / K, 2 * V**2 / counted)
        if p:
            self._last = _Single(d[0], u[0], torch.linalg.vecdot(u[0], u[0]), scale)
            if last is not None:  # alike ones, which have no neighbour, tell nothing there
                lone = scale * self._apart(self._last, last)
                alike = ((v[0] * v).sum(2).abs() == n).all(0)
                V, W = torch.where(alike, lone, V), torch.where(alike, 2 * lone**2, W)
        return V, W

    def _apart(self, one: _Single, other: _Single) -> Tensor:
        """A single probe's variance, of two for which J is the same."""
        change = one.d - other.d
        return torch.linalg.vecdot(change, change) if self.signs else one.q + other.q


class _Single(NamedTuple):
    """A single probe: d, u and q, and on average over its neighbours d . d' and Var q."""

    d: Tensor
    u: Tensor
    q: Tensor
    scale: float
    both: Tensor | float = 0.0
    var: Tensor | float = math.inf
    neighbours: int = 0

    def beside(self, both: Tensor, var: Tensor) -> _Single:
        """With one neighbour more."""
        if self.neighbours:
            both, var = (self.both + both) / 2, (self.var + var) / 2
        return self._replace(both=both, var=var, neighbours=1)

    @property
    def V(self) -> Tensor:
        return 2 * self.scale * (self.q - self.both)

    @property
    def W(self) -> Tensor:
        return (2 * self.scale) ** 2 * torch.minimum(2 * self.q**2, torch.as_tensor(self.var, dtype=self.q.dtype))


class Spreads:
    """The `Spread` of each item, of any number of own entries: one for those of each number."""

    def __init__(self, distribution: str, own: Own) -> None:
        self._parts = [(n, which, Spread(distribution)) for n, which in own.alike()]

    def add(self, v: Tensor, u: Tensor, weight: float = 1.0) -> None:
        """As `Spread.add`, own entries first."""
        for n, which, spread in self._parts:
            spread.add(v[:, which, :n], u[:, which, :n], weight)

    def told(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The variance of the sum so far and its `doubt`, each of the shape (B,) and dtype of like."""
        variance, doubt = torch.zeros_like(like), torch.zeros_like(like)
        for _, which, spread in self._parts:
            variance[which], doubt[which] = spread.variance, spread.doubt
        return variance, doubt
