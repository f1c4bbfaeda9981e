"""Scores of forecasts that are M sample paths, against what came: proper ones, and the coverage of intervals.

Continuous ranked probability score (Matheson and Winkler, 1976; Gneiting and Raftery, 2007, "Strictly proper scoring
rules, prediction, and estimation", eq. 21), and the energy score (eq. 22), X and X' independent paths:

    CRPS(F, y) = E|X - y| - E|X - X'| / 2        ES(F, y) = E||X - y|| - E||X - X'|| / 2

The fair versions (Ferro, 2014, "Fair scores for ensemble forecasts") take E|X - X'| over pairs of different paths, so
that their mean does not depend on M; with pairs of a path and itself, as in the other, the score of M paths of the true
law is above its limit by E|X - X'| / (2 M). The numbers are those of the package scoringrules.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scoresde.errors import not_finite, some

__all__ = ["coverage", "crps", "crps_sum", "energy_score"]


def crps(paths: Tensor, truth: Tensor, *, fair: bool = True) -> Tensor:
    """The score of each number of the truth, in its unit: the lower, the better. The mean over many is what counts.

    Args:
        paths: shape (B, M, ...), M >= 2, as `Rollout.x`.
        truth: shape (B, ...).
        fair: without the bias of finitely many paths; a single score may then be below 0.

    Returns:
        float64, shape (B, ...).

    Raises:
        ImportError: without the package scoringrules.
        ValueError: if shapes do not fit, or a number is not finite.
    """
    rules = _rules()
    paths, truth = _pair(paths, truth)
    # of its estimators "pwm" is the fair one, "qd" the other, of sorted paths, without a matrix of all pairs
    how = "pwm" if fair else "qd"
    found: Tensor = rules.crps_ensemble(truth, paths.movedim(1, -1), estimator=how, backend="torch")
    return found


def crps_sum(paths: Tensor, truth: Tensor, *, fair: bool = True) -> Tensor:
    """The score of the sum of the d series at each step, (B, M, K, d) and (B, K, d) to (B, K).

    Published figures (Salinas et al., 2019; Rasul et al., 2021) are sums of it over steps and series of forecasts,
    divided by the sum of the |y_1 + ... + y_d|, and of M paths without `fair`. Arguments and errors as for `crps`.
    """
    return crps(paths.double().sum(-1), truth.double().sum(-1), fair=fair)


def energy_score(paths: Tensor, truth: Tensor, *, fair: bool = True) -> Tensor:
    """The score of each item as one vector, with Euclidean distances, (B, M, ...) and (B, ...) to (B,): unlike `crps`
    it sees how numbers and steps go together, though not as well as how they are spread.

    Arguments and errors as for `crps`.
    """
    rules = _rules()
    paths, truth = _pair(paths, truth)
    how = {"estimator": "fair" if fair else "nrg", "backend": "torch"}
    # one by one, for it makes the differences of all pairs of paths
    scores = [
        rules.es_ensemble(y.flatten()[None], x.flatten(1)[None], **how) for x, y in zip(paths, truth, strict=True)
    ]
    return torch.cat(scores)


def coverage(paths: Tensor, truth: Tensor, level: float = 0.9) -> Tensor:
    """Whether each number of the truth is in the central interval of that level, bool, (B, M, ...) and (B, ...) to
    (B, ...); the share of them is the coverage.

    The ends are where a number of the paths' own law comes with that probability, whatever the law: between the k-th
    smallest and the k-th largest of M paths, k = (1 - level) (M + 1) / 2, between neighbours linearly. (Quantiles of
    the empirical law, as most programs have them, would be narrower, and cover less than the level.)

    Raises:
        ValueError: as `crps`, or if there are too few paths: (1 - level) (M + 1) / 2 is to be 1 or more.
    """
    paths, truth = _pair(paths, truth)
    M = paths.shape[1]
    k = (1 - level) * (M + 1) / 2
    if not 1 - 1e-9 <= k <= (M + 1) / 2:
        raise ValueError(f"an interval of level {level} of {M} paths: expected 0 <= level <= {(M - 1) / (M + 1):.4g}")
    ordered, first = paths.sort(1).values, min(int(k + 1e-9), M - 1)
    share = k - first
    low = torch.lerp(ordered[:, first - 1], ordered[:, first], share)
    high = torch.lerp(ordered[:, M - first], ordered[:, M - first - 1], share)
    return (low <= truth) & (truth <= high)


def _pair(paths: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64, checked."""
    shapes = tuple(paths.shape), tuple(truth.shape)
    if paths.ndim < 2 or paths.shape[1] < 2 or (*shapes[0][:1], *shapes[0][2:]) != shapes[1]:
        raise ValueError(f"paths {shapes[0]} and truth {shapes[1]}: expected (B, M, ...), M >= 2, and (B, ...)")
    for name, x in (("paths", paths), ("truth", truth)):
        if bad := not_finite(x):
            raise ValueError(f"{name} {some(bad)} are not finite")
    return paths.double(), truth.double().to(paths.device)


def _rules() -> Any:
    try:
        import scoringrules
    except ImportError as error:
        raise ImportError("scores of forecasts are those of scoringrules: pip install scoresde[forecasts]") from error
    return scoringrules
