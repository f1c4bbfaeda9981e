"""Runge-Kutta solvers of the probability-flow ODE (Song et al., 2021, eq. 13), in one of two variables:

    "t":      dx/dt = velocity = f x - g^2 score / 2
    "sigma":  dy/du = eps,  y = x / alpha,  u = sigma / alpha    (Karras et al., 2022: the linear part is exact)

A step to sigma = 0 has no derivative at its end, and a step from alpha = 0 no u at its start: both are first order,
x_0 = D and DDIM's step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from scoresde.grid import Grid
from scoresde.solvers.base import Solver
from scoresde.tableau import Tableau
from scoresde.views import view_of_mean

__all__ = ["Euler", "Heun"]


@dataclass(frozen=True)
class _ProbabilityFlow(Solver):
    """A Runge-Kutta method; `variable` as in the module's docstring.

    Raises:
        ValueError: on another variable.
    """

    variable: Literal["sigma", "t"] = "sigma"

    def __post_init__(self) -> None:
        if self.variable not in ("sigma", "t"):
            raise ValueError(f"variable={self.variable!r}: expected 'sigma' or 't'")

    def _table(self, grid: Grid, second_order: bool) -> Tableau:
        alpha_t, sigma_t, alpha_s, sigma_s = grid.pairs()
        if self.variable == "t":
            view, A, B = "velocity", torch.ones_like(alpha_t), grid.times.diff()
        else:
            view, A, B = "eps", alpha_s / alpha_t, sigma_s - alpha_s * sigma_t / alpha_t
        singular = sigma_s == 0
        if self.variable == "sigma":  # Euler's step is DDIM's everywhere, and better written without 1 / alpha_t
            singular |= (alpha_t == 0) | (not second_order)
        stages = torch.where(singular | (not second_order), 1, 2)
        step = torch.arange(grid.steps, device="cpu").repeat_interleave(stages)
        second = torch.cat([step[:1] < 0, step.diff() == 0])
        t = grid.times[step + second]
        p, q = view_of_mean(view, grid.sde, t)
        # First stage: x' = A x + B F. Second: A x + B (F + F') / 2 = x' + (B / 2) (F' - F).
        a = torch.where(second, 1.0, A[step])
        b0, b1 = torch.where(second, B[step] / 2, B[step]), torch.where(second, -B[step] / 2, 0.0)
        # The exceptions, as steps of DDIM in x0: x_s = alpha_s D + sigma_s (x_t - alpha_t D) / sigma_t.
        lone = singular[step]
        ratio = (sigma_s / sigma_t)[step]
        b0 = torch.where(lone, alpha_s[step] - ratio * alpha_t[step], b0)
        a, p, q = (torch.where(lone, y, x) for x, y in ((a, ratio), (p, 0.0), (q, 1.0)))
        b = torch.stack([b0, b1], 1) if second_order else b0
        return Tableau(grid, a=a, b=b, view=(p, q), t=t, step=step)


@dataclass(frozen=True)
class Euler(_ProbabilityFlow):
    """Euler's method on the probability-flow ODE, first order, one evaluation a step.

    Args:
        variable: "sigma", where it is DDIM's deterministic step, or "t".
    """

    def tableau(self, grid: Grid) -> Tableau:
        return self._table(grid, second_order=False)


@dataclass(frozen=True)
class Heun(_ProbabilityFlow):
    """Heun's method on the probability-flow ODE (Karras et al., 2022, algorithm 1), second order, two evaluations a
    step and one on the last to sigma = 0: 2 N - 1 in all (and one on a first step from alpha = 0 in sigma: 2 N - 2).

    In sigma the correction adds (u_t / u_s - 1) / 2 times the change of D over the step: keep the ratio of u from one
    time to the next below about 4 (a Karras or log-SNR grid of enough steps). A uniform grid of few steps on a VP SDE
    or a chain begins with far larger ratios, worst on the cosine chain: take variable="t" there.

    Args:
        variable: "sigma", the paper's choice, or "t", its algorithm for the SDE's own alpha(t) and sigma(t).
    """

    def tableau(self, grid: Grid) -> Tableau:
        return self._table(grid, second_order=True)
