"""Distances by quantiles and by mean distances: neither fits a law, and both are zero for equal laws only.

Sliced Wasserstein distance of order p (Bonneel et al., 2015, "Sliced and Radon Wasserstein barycenters of measures"), F
and G the quantile functions of the projections on a direction theta:

    SW_p = (mean over theta of int_0^1 |F_theta(u) - G_theta(u)|^p du)^{1/p}

Energy distance (Szekely and Rizzo, 2013, "Energy statistics: a class of statistics based on distances"):

    E^2 = 2 E|x - y| - E|x - x'| - E|y - y'|
"""

from __future__ import annotations

import math
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from scoresde.checks import check_count
from scoresde.metrics.checks import as_pair
from scoresde.metrics.pairwise import BLOCK, blocks, distances

__all__ = ["energy_distance", "sliced_wasserstein"]


def sliced_wasserstein(x: Tensor, y: Tensor, projections: int | Tensor = 256, order: float = 2, seed: int = 0) -> float:
    """Sliced Wasserstein distance SW_p of two sets, exact on each direction, whatever their sizes, in float64.

    A shift by s costs about |s| / sqrt(d) in SW_2, for the mean square of a coordinate is what a direction sees.

    Args:
        x, y: features, shapes (n, d) and (m, d).
        projections: how many random directions; or the directions, shape (P, d), taken to unit length.
        order: p >= 1.
        seed: of the directions.

    Raises:
        ValueError: if the shapes do not fit, a feature is not finite, a direction is zero, or p < 1.

    >>> x = torch.tensor([[0.0], [2.0]])
    >>> sliced_wasserstein(x, x + 3), sliced_wasserstein(x, torch.tensor([[0.0]]), order=1)
    (3.0, 1.0)
    """
    x, y = as_pair(x, y)
    if isinstance(order, bool) or not isinstance(order, Real) or not 1 <= order < math.inf:
        raise ValueError(f"order={order!r}: expected a number p >= 1")
    theta = _directions(projections, x.shape[1], seed).to(x.device)
    i, j, share = _steps(len(x), len(y), x.device)
    total = 0.0
    for part in theta.split(max(1, BLOCK // len(share))):
        gaps = (x @ part.T).sort(0).values[i] - (y @ part.T).sort(0).values[j]
        total += float(share @ gaps.abs_().pow_(float(order)).sum(1))
    return (total / len(theta)) ** (1 / float(order))


def _directions(projections: int | Tensor, d: int, seed: int) -> Tensor:
    """Unit vectors, shape (P, d)."""
    if not isinstance(projections, Tensor):
        check_count(projections=projections)
        theta = torch.randn(projections, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return theta / theta.norm(dim=1, keepdim=True)
    lengths = projections.double().norm(dim=-1, keepdim=True)
    if projections.ndim != 2 or projections.shape[1] != d or len(projections) == 0 or not bool((lengths > 0).all()):
        raise ValueError(
            f"projections of shape {tuple(projections.shape)}: expected directions (P, {d}), none of them 0"
        )
    return projections.double() / lengths


def _steps(n: int, m: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Where both quantile functions are constant: the entries i of n and j of m that they take there, and how long the
    piece is. The n + m - gcd(n, m) pieces, counted in whole numbers of 1 / (n m), so that none is lost to rounding.
    """
    ends = np.union1d(np.arange(1, n + 1, dtype=np.int64) * m, np.arange(1, m + 1, dtype=np.int64) * n)
    starts = np.concatenate([[0], ends[:-1]])
    share = torch.from_numpy((ends - starts) / (n * m))
    return torch.from_numpy(starts // m).to(device), torch.from_numpy(starts // n).to(device), share.to(device)


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Energy distance of the two sets as they are, in float64: the root E, as `scipy.stats.energy_distance` in one
    dimension. Between samples of one law it is not zero but about sqrt(E|x - x'| (1/n + 1/m)).

    Args:
        x, y: features, shapes (n, d) and (m, d).

    Raises:
        ValueError: if the shapes do not fit or a feature is not finite.

    >>> energy_distance(torch.tensor([[0.0]]), torch.tensor([[3.0, 4.0]])[:, :1])  # two points: sqrt(2 * 3)
    2.449489742783178
    """
    x, y = as_pair(x, y)
    centre = (x.mean(0) + y.mean(0)) / 2
    x, y = x - centre, y - centre
    square = 2 * _mean_distance(x, y) - _mean_distance(x, x) - _mean_distance(y, y)
    return math.sqrt(max(square, 0.0))  # it is none below zero, but for rounding


def _mean_distance(x: Tensor, y: Tensor) -> float:
    return sum(float(distances(part, y).sum()) for _, part in blocks(x, len(y))) / (len(x) * len(y))
