"""How well a sum of random traces is known: its variance from the probes themselves, and the variance of that."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Spread"]


class Spread:
    """The variance V of a weighted sum of estimates, each the mean of K probes of its own, of derivatives that change
    little from one to the next, and the variance W of V.

    V is estimated from the differences of d within each estimate, and of single probes from those of neighbours: what
    changes of the derivative meanwhile is counted too. K signs that are alike, +-v, are a single probe. They are with
    probability p = 2^{-(n - 1)(K - 1)}, which leaves 1 / K - p of one probe's variance to the others.

    W is that of q = |u|^2, taken without what d is on average, which two probes tell in two ways:

        (q - q')^2 / 2 = Var q,    2 (u . u')^2 = 2 tr J^4 = Var q    on average, or about that for signs

    The sum of both is taken: twice what it should be where J is the same for both, half of it where J has one large
    direction, at one evaluation alone. It is cut at what one large direction would make of V, the square of one normal
    number for each probe but one, or for a single probe. Signs are too few in two dimensions for that (a pair of them
    is alike or all there is, so that pairs are counted), and single ones up to three.
    """

    def __init__(self, distribution: str) -> None:
        self.signs = distribution == "rademacher"
        self.variance: Tensor | float = 0.0
        self.doubt: Tensor | float = 0.0
        self._before: tuple[Tensor, Tensor, Tensor] | None = None
        self._first = 0.0

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
        """V and W of one probe; of the first, until it has a neighbour, its squares are all there is to know."""
        alone = self._before is None
        apart, doubt = self._apart(d, u)
        if self._first:
            scale, self.variance, self.doubt = scale + self._first, 0.0, 0.0
        self._first = scale if alone else 0.0
        return scale * apart, 4 * scale**2 * doubt

    def _several(self, v: Tensor, d: Tensor, u: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """V and W of the mean of K probes."""
        K, n = len(d), d.shape[2]
        p = 2.0 ** -((n - 1) * (K - 1)) if self.signs else 0.0
        p, first = p if p > 1e-16 else 0.0, self._before is None
        products = torch.einsum("kbn,lbn->bkl", u, u)
        q = products.diagonal(dim1=1, dim2=2)
        overlap = ((products**2).sum((1, 2)) - (q**2).sum(1)) / (K * (K - 1))
        half = q.mean(1)  # of one probe's variance
        if self.signs:
            half = half - ((d.sum(0) ** 2).sum(1) - q.sum(1)) / (K * (K - 1))  # less the mean of d_k d_l over k != l
        share = 2 * scale * (1 / K if first else 1 / K - p)
        V, counted = share * half, K * (K - 1) if n == 2 and self.signs else K - 1
        W = torch.minimum(share**2 * (q.var(1) + 2 * overlap) / K, 2 * V**2 / counted)
        if p:
            lone = scale * self._apart(d[0], u[0])[0]
            if not first:  # alike ones, which have no neighbour, tell nothing there
                alike = ((v[0] * v).sum(2).abs() == n).all(0)
                V, W = torch.where(alike, lone, V), torch.where(alike, 2 * lone**2, W)
        return V, W

    def _apart(self, d: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """One probe's variance, by it and the one before, and Var q."""
        q = torch.linalg.vecdot(u, u)
        before, self._before = self._before, (d, u, q)
        if before is None:
            return 2 * q, 2 * q**2
        d_, u_, q_ = before
        change = d - d_
        apart = torch.linalg.vecdot(change, change) if self.signs else q + q_
        if self.signs and d.shape[1] <= 3:
            return apart, apart**2 / 2
        return apart, torch.minimum((q - q_) ** 2 / 2 + 2 * torch.linalg.vecdot(u, u_) ** 2, apart**2 / 2)
