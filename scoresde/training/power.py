"""Averages whose length is chosen after training (Karras et al., 2024, arXiv 2312.02696, section 3 and appendix C).

    average_gamma(t) = (gamma + 1) / t^(gamma + 1)  int_0^t  tau^gamma theta(tau) dtau
    step by step       average <- beta average + (1 - beta) theta,    beta = (1 - 1/t)^(gamma + 1)
    length             s = (gamma + 1)^(1/2) (gamma + 2)^(-1) (gamma + 3)^(-1/2)

s, the paper's sigma_rel, is the standard deviation of the weighting of the past, as a share of training so far. A run
that keeps two such averages, and snapshots of them, has every other length too: the profile that is wanted, p(tau) =
(gamma + 1) tau^gamma / t^(gamma + 1) up to t, is approached by those of the snapshots,

    min over x, sum x = 1, of  || p - sum_i x_i p_i ||^2,
    <p_a, p_b> = (gamma_a + 1) (gamma_b + 1) / (gamma_a + gamma_b + 1) (t_a / t_b)^gamma_b / t_b,    t_a <= t_b

and its weights are the same sum of the snapshots'. (The paper leaves the sum of x free; it is the weight of what never
changes.) With theta constant within each step the second line is the first, exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from scoresde.checks import ArgumentError

__all__ = ["LONGEST", "Profile", "combination", "exponent", "inner", "kept", "length_of"]

LONGEST = 12**-0.5  # gamma = 0: the mean of all steps


class Profile(NamedTuple):
    """The weighting of the past by an average of exponent gamma, after t steps."""

    gamma: float
    t: float


def length_of(gamma: float) -> float:
    """s of an exponent gamma >= 0.

    >>> round(length_of(16.97), 3), round(length_of(6.94), 3)
    (0.05, 0.1)
    """
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def exponent(length: float) -> float:
    """gamma of a length s, the largest root of (gamma + 2)^2 (gamma + 3) = v (gamma + 1) with v = s^-2.

    Raises:
        ValueError: if it is not in (0, 12^(-1/2)]: longer than that of the mean of all steps is none.
    """
    if not 0 < length <= LONGEST:
        raise ArgumentError(
            f"length {length!r} of a power average: expected a number in (0, {LONGEST:.4f}], its standard deviation as "
            "a share of training; 0.05 and 0.1 are usual"
        )
    v = length**-2
    return max(0.0, float(np.roots([1, 7, 16 - v, 12 - v]).real.max()))


def kept(gamma: float, n: int) -> float:
    """beta of the update that follows n updates: the share of the average that stays.

    >>> kept(1.0, 0), kept(1.0, 1)
    (0.0, 0.25)
    """
    return float((n / (n + 1)) ** (gamma + 1))


def inner(a: Profile, b: Profile) -> float:
    """<p_a, p_b>, the integral of the product."""
    if a.t > b.t:
        a, b = b, a
    return (a.gamma + 1) * (b.gamma + 1) / (a.gamma + b.gamma + 1) * (a.t / b.t) ** b.gamma / b.t


def combination(snapshots: Sequence[Profile], wanted: Profile) -> tuple[Tensor, float]:
    """The weights x of the snapshots, whose sum is 1, for a profile.

    Args:
        snapshots: of what there is.
        wanted: the profile.

    Returns:
        x, float64, and what it misses, || p - sum_i x_i p_i || / || p ||: 0 for a profile that is there.

    A profile that is among the snapshots is taken as it is.
    """
    if wanted in snapshots:
        return torch.eye(len(snapshots), dtype=torch.float64)[list(snapshots).index(wanted)], 0.0
    every = [*snapshots, wanted]
    gram = np.array([[inner(a, b) for b in every] for a in every])
    scale = gram.diagonal() ** -0.5
    gram *= scale[:, None] * scale
    # Unknown are x_i relative to scale_i, and the multiplier of their sum. The matrix of many snapshots is singular up
    # to rounding: the least squares of least norm.
    A, aim, sums = gram[:-1, :-1], gram[:-1, -1], scale[:-1] / scale[-1]
    rows = np.block([[A, sums[:, None]], [sums, np.zeros(1)]])
    y = np.linalg.lstsq(rows, np.append(aim, 1.0), rcond=None)[0][:-1]
    x = torch.from_numpy(y * sums)
    return x / x.sum(), math.sqrt(max(0.0, 1 - 2 * float(y @ aim) + float(y @ A @ y)))
