"""How real, and how varied: where the k nearest neighbours say that one set has samples and the other has not.

With B(z) the ball around z whose radius is the distance to its k-th nearest neighbour in its own set,

    precision = share of the x in any B(y)                    recall   = share of the y in any B(x)
    density   = mean over x of #{y: x in B(y)} / k            coverage = share of the y whose B(y) has an x

x being samples and y real data. Precision and recall are those of Kynkaanniemi et al. (2019, "Improved precision and
recall metric for assessing generative models"); one outlier's ball can make them high. Density and coverage are those
of Naeem et al. (2020, "Reliable fidelity and diversity metrics for generative models"), who mend that; density may
exceed 1, and is 1 on average for samples of the data's law.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from scoresde.checks import check_count
from scoresde.metrics.checks import as_pair
from scoresde.metrics.pairwise import blocks, squared_distances

__all__ = ["PrecisionRecall", "precision_recall"]


class PrecisionRecall(NamedTuple):
    """What `precision_recall` returns; all but density are in [0, 1]."""

    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall(x: Tensor, y: Tensor, k: int = 5) -> PrecisionRecall:
    """Precision, recall, density and coverage of samples x of the law that y is from, in float64.

    Quote them with k, n and m: with the sizes the balls shrink.

    Args:
        x: features of the samples, shape (n, d), n > k.
        y: features of real data, shape (m, d), m > k.
        k: which nearest neighbour sets the radius: 3 in Kynkaanniemi et al., 5 in Naeem et al.

    Raises:
        ValueError: if the shapes do not fit, a feature is not finite, or there are not more than k samples.

    >>> x = torch.arange(12.0)[:, None]
    >>> precision_recall(x, x + 100, k=3), precision_recall(x, x, k=3)[:2]
    (PrecisionRecall(precision=0.0, recall=0.0, density=0.0, coverage=0.0), (1.0, 1.0))
    """
    check_count(k=k)
    x, y = as_pair(x, y, k + 1)
    centre = y.mean(0)
    x, y = x - centre, y - centre
    radii_x, radii_y = _radii(x, k), _radii(y, k)
    # On the sphere counts as inside: rounding must not decide, for equal samples are on it where k of them coincide.
    slack = 64 * torch.finfo(torch.float64).eps * float(torch.cat([x, y]).square().sum(1).max())
    inside, holding = 0, torch.zeros(len(y), dtype=torch.bool, device=x.device)
    recalled, counted = holding.clone(), 0
    for rows, part in blocks(x, len(y)):
        squares = squared_distances(part, y) - slack
        in_y = squares <= radii_y
        inside += int(in_y.any(1).sum())
        counted += int(in_y.sum())
        holding |= in_y.any(0)
        recalled |= (squares <= radii_x[rows, None]).any(0)
    n, m = len(x), len(y)
    return PrecisionRecall(inside / n, int(recalled.sum()) / m, counted / (k * n), int(holding.sum()) / m)


def _radii(z: Tensor, k: int) -> Tensor:
    """Squared distance of each to its k-th nearest neighbour, itself not counted."""
    radii = []
    for rows, part in blocks(z, len(z)):
        squares = squared_distances(part, z)
        squares.diagonal(rows.start).fill_(torch.inf)
        radii.append(squares.topk(k, largest=False).values[:, -1])
    return torch.cat(radii)
