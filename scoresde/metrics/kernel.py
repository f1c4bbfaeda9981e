"""Maximum mean discrepancy: the distance of two laws' means in a kernel's feature space (Gretton et al., 2012, "A
kernel two-sample test"), its square without bias, the means of the first two terms over i != j:

    MMD^2 = mean k(x_i, x_j) + mean k(y_i, y_j) - 2 mean k(x_i, y_j)

so it is zero on average, and below zero often, where the laws are equal. With k(x, y) = (x . y / d + 1)^3 in Inception
features it is the kernel Inception distance, a mean over subsets (Binkowski et al., 2018, "Demystifying MMD GANs").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from scoresde.checks import check_count
from scoresde.metrics.checks import as_features, as_pair
from scoresde.metrics.pairwise import blocks, distances, squared_distances
from scoresde.noise import derive_seed
from scoresde.tensors import evenly

__all__ = ["KID", "GaussianKernel", "Kernel", "PolynomialKernel", "kid", "median_distance", "mmd"]

Kernel = Callable[[Tensor, Tensor], Tensor]
"""k(x, y): features (n, d) and (m, d) to (n, m), symmetric and positive definite."""


@dataclass(frozen=True)
class PolynomialKernel:
    """k(x, y) = (scale x . y + offset)^degree; scale 1 / d where it is None. The defaults are KID's."""

    degree: int = 3
    scale: float | None = None
    offset: float = 1.0

    def __post_init__(self) -> None:
        check_count(degree=self.degree)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        scale = 1 / x.shape[1] if self.scale is None else self.scale
        return (x @ y.T).mul_(scale).add_(self.offset).pow_(self.degree)


class GaussianKernel:
    """k(x, y) = mean over s of exp(-|x - y|^2 / (2 s^2)).

    Args:
        bandwidths: s, one or several, in the units of the features: a mean over a few, a factor of two apart say, needs
            no good guess.

    Raises:
        ValueError: unless they are numbers > 0.
    """

    def __init__(self, *bandwidths: float) -> None:
        if not bandwidths or not all(isinstance(s, Real) and 0 < float(s) < math.inf for s in bandwidths):
            raise ValueError(f"bandwidths {bandwidths!r}: expected one number > 0 at least")
        self.bandwidths = tuple(float(s) for s in bandwidths)

    @classmethod
    def median(cls, x: Tensor, y: Tensor, factors: Sequence[float] = (1.0,)) -> GaussianKernel:
        """With the bandwidths factor * `median_distance(x, y)`."""
        s = median_distance(x, y)
        return cls(*(factor * s for factor in factors))

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        centre = y.mean(0)  # nearer the origin fewer digits of the differences are lost
        squares = squared_distances(x - centre, y - centre)
        total = torch.zeros_like(squares)
        for s in self.bandwidths:
            total += (squares * (-0.5 / s**2)).exp_()
        return total.div_(len(self.bandwidths))

    def __repr__(self) -> str:
        return f"GaussianKernel({', '.join(f'{s:.6g}' for s in self.bandwidths)})"


def median_distance(x: Tensor, y: Tensor | None = None, most: int = 2000) -> float:
    """Median distance of two different samples of the pooled sets, the usual bandwidth (Gretton et al., 2012).

    Args:
        x, y: features, shapes (n, d) and (m, d); or one set alone.
        most: of a larger pool this many are looked at, evenly spaced.

    Raises:
        ValueError: if the features are not as said, or more than half of the pairs coincide.
    """
    pool = as_features(x, "x", 2) if y is None else torch.cat(as_pair(x, y))
    pool = pool - pool.mean(0)
    if len(pool) > most:
        pool = pool[evenly(len(pool), most)]
    i, j = torch.triu_indices(len(pool), len(pool), 1, device="cpu")
    median = float(distances(pool, pool).cpu()[i, j].median())
    if median == 0:
        raise ValueError("the median distance is 0: more than half of the pairs coincide; give a bandwidth")
    return median


def mmd(x: Tensor, y: Tensor, kernel: Kernel | None = None) -> float:
    """Squared maximum mean discrepancy, unbiased (Gretton et al., 2012), in float64.

    Args:
        x, y: features, shapes (n, d) and (m, d), n, m >= 2.
        kernel: `PolynomialKernel(...)`, `GaussianKernel(...)`, or another function k(x, y); by default Gaussian with
            the median distance as its bandwidth.

    Raises:
        ValueError: if the shapes do not fit or a feature is not finite.

    >>> x = torch.tensor([[0.0], [2.0]])
    >>> mmd(x, x + 1, PolynomialKernel(degree=1))  # the squared distance of the means, less what their noise adds
    -1.0
    """
    x, y = as_pair(x, y, 2)
    return _mmd(x, y, GaussianKernel.median(x, y) if kernel is None else kernel)


def _mmd(x: Tensor, y: Tensor, kernel: Kernel) -> float:
    """The formula of the module, from checked features."""
    cross = sum(float(kernel(part, y).sum()) for _, part in blocks(x, len(y)))
    within = [0.0, 0.0]
    for i, z in enumerate((x, y)):
        for rows, part in blocks(z, len(z)):
            values = kernel(part, z)
            within[i] += float(values.sum() - values.diagonal(rows.start).sum())
    n, m = len(x), len(y)
    return within[0] / (n * (n - 1)) + within[1] / (m * (m - 1)) - 2 * cross / (n * m)


class KID(NamedTuple):
    """What `kid` returns.

    Attributes:
        value: mean over the subsets.
        stderr: its standard error as an estimate for the two laws; see `kid`.
        std: standard deviation over the subsets, which is what papers quote behind the +-.
    """

    value: float
    stderr: float
    std: float


def kid(
    x: Tensor,
    y: Tensor,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
    kernel: Kernel | None = None,
) -> KID:
    """Kernel Inception distance (Binkowski et al., 2018): the mean of `mmd` over pairs of subsets. In other features
    than Inception's it is the same formula under another name.

    The subsets are cut from random orders of each set, one after the other, so that those of one pass are independent.
    There are q = min(n, m) // subset_size such, and further passes see the same samples again: hence the standard
    error is std / sqrt(min(subsets, q)), which is right for one pass and somewhat too large for many.

    Args:
        x, y: features, shapes (n, d) and (m, d).
        subsets: how many pairs.
        subset_size: samples in each, at least 2, at most half of n and of m.
        seed: of the orders.
        kernel: by default `PolynomialKernel()`, (x . y / d + 1)^3.

    Raises:
        ValueError: if the shapes do not fit, a feature is not finite, or a subset is too large.
    """
    check_count(subsets=subsets, subset_size=subset_size)
    x, y = as_pair(x, y, 4)
    least = min(len(x), len(y))
    if not 2 <= subset_size <= least // 2 or subsets < 2:
        raise ValueError(
            f"subsets={subsets} of subset_size={subset_size} from {len(x)} and {len(y)} samples: expected two or more, "
            f"of 2 to {least // 2} each, for there is no standard error without two that share no sample"
        )
    kernel = PolynomialKernel() if kernel is None else kernel
    pairs = zip(*(_cuts(len(z), subsets, subset_size, derive_seed(seed, i)) for i, z in enumerate((x, y))), strict=True)
    values = torch.tensor([_mmd(x[a.to(x.device)], y[b.to(y.device)], kernel) for a, b in pairs], dtype=torch.float64)
    std = float(values.std())
    return KID(float(values.mean()), std / math.sqrt(min(subsets, least // subset_size)), std)


def _cuts(n: int, subsets: int, size: int, seed: int) -> list[Tensor]:
    """Indices of the subsets, those of one pass over a random order disjoint."""
    generator = torch.Generator().manual_seed(seed)
    cuts: list[Tensor] = []
    while len(cuts) < subsets:
        order = torch.randperm(n, generator=generator)
        cuts += [order[i * size : (i + 1) * size] for i in range(n // size)]
    return cuts[:subsets]
