"""Distances between samples and data."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["frechet_distance"]


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
    d = x.shape[1]
    C_x, C_y = x.T.cov().reshape(d, d), y.T.cov().reshape(d, d)
    values, vectors = torch.linalg.eigh(C_x)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.mT  # eigenvalues of a covariance are >= 0 but for rounding
    cross = torch.linalg.eigvalsh(root @ C_y @ root).clamp(min=0).sqrt().sum()
    return float((x.mean(0) - y.mean(0)).square().sum() + C_x.trace() + C_y.trace() - 2 * cross)
