"""Trajectories with the best bound: K of N times, by dynamic programming (Watson et al., 2021; Bao et al., 2022).

What a step of a chain costs, F(s, t), is a function of s, t and one number a time (`scoresde.variance.costs`). So one
pass of the network at each of the N times gives all N^2 terms, and the path of least cost with K steps obeys

    least(k, t) = min_{s < t} least(k - 1, s) + F(s, t),    least(0, 0) = 0,    F(0, t) = the decoder's cost from t

The best bound makes no better samples: by Frechet distance even steps were ahead in the papers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scoresde.checks import check_count
from scoresde.grid import Grid
from scoresde.variance.costs import analytic_costs, least_cost_path
from scoresde.variance.table import VarianceTable

__all__ = ["optimal_grid"]


def optimal_grid(
    table: VarianceTable,
    steps: int,
    *,
    times: Tensor | Grid | None = None,
    data_range: tuple[float, float] | None = None,
    consistent: bool = True,
    even_tail: bool = False,
) -> Grid:
    """The grid whose chain has the best bound with the optimal variance (Bao et al., 2022, section 4).

    The smallest of the times is always the last noisy one, so that the decoder is the same for every number of steps;
    for the same reason a single step goes from the last time to 0. For likelihoods: samples want other grids.

    Args:
        table: of E|eps_hat|^2 / d; what it is read of is its `sde`, `at` and `covariance`.
        steps: K, of the grid: K noisy times and t = 0.
        times: to choose from, increasing or a `Grid`; by default a chain's nodes 1..N, or the 500 noisy times of
            `Grid.power(sde, 500)`.
        data_range: (lo, hi), of bounded data, which bounds C_t.
        consistent: raise C_t where it is too small to be true, given those at smaller t (`analytic_costs`).
        even_tail: the remedy of the authors' code for networks that err at large t, which E|eps_hat|^2 / d > 1 shows.
            From the first such time on, number n of N, the last 2 (N - n + 1) times are taken for unsound and get
            evenly spaced steps, 0.8 of their share of the steps and at least one; the rest is optimised.

    Raises:
        ValueError: if steps is not from 1 to N, times do not fit, C_t is not finite (alpha = 0), or the unsound tail of
            even_tail=True is everything.

    >>> from scoresde import DDPMChain
    >>> class UnitGaussian:  # eps_hat = sigma x, every trajectory has the same bound: ties go to the earlier node
    ...     sde = DDPMChain.linear(100)
    ...     def at(self, t):
    ...         return self.sde.sigma(t) ** 2
    ...     def covariance(self, t):
    ...         return self.sde.sigma(t) ** 2
    >>> grid = optimal_grid(UnitGaussian(), 10)
    >>> grid.steps, grid.times[[0, -2, -1]].tolist()
    (10, [100.0, 1.0, 0.0])
    """
    check_count(steps=steps)
    costs = analytic_costs(table, times, data_range=data_range, consistent=consistent)
    N = len(costs.times) - 1
    if steps > N:
        raise ValueError(f"steps={steps}, but there are only {N} times to choose from")
    if steps == 1:
        return Grid(costs.sde, costs.times[[N, 0]])
    head, head_steps = N, steps
    if even_tail:
        head, head_steps = _sound(table.at(costs.times[1:]) > 1, steps)
    # A single node cannot be both the first and the last of the sound part: it is the first.
    path = (
        torch.tensor([0, 1]) if head_steps == 1 else least_cost_path(costs.matrix[: head + 1, : head + 1], head_steps)
    )
    rest = steps - head_steps
    tail = torch.arange(1, rest + 1, dtype=torch.float64, device="cpu") * ((N - head) / max(rest, 1))
    return Grid(costs.sde, costs.times[torch.cat([path, head + tail.round().long()])].flip(0))


def _sound(unsound: Tensor, steps: int) -> tuple[int, int]:
    """How many of the times are optimised, and with how many of the 2 or more steps: `optimal_grid`'s even_tail."""
    N = len(unsound)
    if not bool(unsound.any()):
        return N, steps
    bad = 2 * (N - int(unsound.int().argmax()))
    if bad >= N:
        raise ValueError(
            f"E|eps_hat|^2 / d exceeds 1 from time {N - bad // 2 + 1} of {N} on: nothing is left to optimise. Leave "
            "even_tail out, or look at the network"
        )
    wished = min(math.ceil((1 - 0.8 * bad / N) * steps), N - bad, steps - 1)
    return N - bad, max(wished, steps - bad, 1)
