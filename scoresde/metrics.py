"""Distances between samples and data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["RandomFeatures", "frechet_distance"]


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Frechet distance between Gaussians fitted to two sets of features (Heusel et al., 2017, eq. 6), in float64:

        |mu_x - mu_y|^2 + tr C_x + tr C_y - 2 tr (C_x^{1/2} C_y C_x^{1/2})^{1/2}

    (the squared 2-Wasserstein distance of the Gaussians). For finite samples of the same law it is above zero, by about
    d / n: quote it with the floor that real data gives against real data of the same sizes.

    Args:
        x, y: features, shapes (n, d) and (m, d), n, m >= 2.

    Raises:
        ValueError: if the shapes do not fit or a feature is not finite.

    >>> x = torch.tensor([[0.0], [2.0]])
    >>> frechet_distance(x, x + 3)
    9.0
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(
            f"features of shapes {tuple(x.shape)} and {tuple(y.shape)}: expected (n, d) and (m, d), n, m >= 2"
        )
    x, y = x.detach().double(), y.detach().double()
    if not bool(x.isfinite().all() & y.isfinite().all()):
        raise ValueError("a feature is not finite")
    # With C = R^T R the root's trace is the sum of the singular values of R_x R_y^T: no eigenvalue is rooted that is
    # zero but for rounding.
    R_x, R_y = (torch.linalg.qr(z - z.mean(0), mode="r").R / (len(z) - 1) ** 0.5 for z in (x, y))
    cross = torch.linalg.svdvals(R_x @ R_y.mT).sum()
    return float((x.mean(0) - y.mean(0)).square().sum() + R_x.square().sum() + R_y.square().sum() - 2 * cross)


class RandomFeatures:
    """A fixed, never trained feature space: relu(relu(x W_1) W_2) of the flattened event, the weights N(0, 2 / inputs)
    from a seed.

    A Frechet distance of raw pixels sees their mean and covariance only, so a Gaussian fitted to the data would score
    as well as the data. The two layers bend the space, so that moments of every order count; and since nothing is
    learned, the features favour neither the training set nor any model. They do not know what a digit is: compare
    numbers within one such space only.

    Args:
        event_shape: shape of one sample.
        width: units of the first layer.
        features: units of the second, the dimension d of the space.
        seed: of the weights.
    """

    def __init__(self, event_shape: Sequence[int], width: int = 256, features: int = 64, seed: int = 0) -> None:
        sizes = [math.prod(event_shape), width, features]
        generator = torch.Generator().manual_seed(seed)
        self.event_shape = tuple(event_shape)
        self.weights = [
            torch.randn(a, b, generator=generator, dtype=torch.float64) * math.sqrt(2 / a)
            for a, b in itertools.pairwise(sizes)
        ]

    def __call__(self, x: Tensor) -> Tensor:
        """x (B, *event_shape) to float64 features (B, d), on the CPU.

        Raises:
            ValueError: if x has another event shape.
        """
        if tuple(x.shape[1:]) != self.event_shape:
            raise ValueError(f"x has shape {tuple(x.shape)}: expected (B, {', '.join(map(str, self.event_shape))})")
        h = x.detach().reshape(len(x), -1).to("cpu", torch.float64)
        for weight in self.weights:
            h = (h @ weight).relu()
        return h
