"""Runge-Kutta solvers of the probability-flow ODE (Song et al., 2021, eq. 13). In the variable psi and the scaled state
y = x / m it reads dy/dpsi = F, and a Butcher tableau (A, c) with the weights in A's last line makes the step

    y_j = y_0 + (psi_s - psi_t) sum_{l < j} A_{j,l} F_l,    F_l evaluated at psi_t + c_l (psi_s - psi_t)

    variable        psi               m               F
    t               t                 1               velocity = f x - g^2 score / 2
    sigma           sigma / alpha     alpha           eps                 (Karras et al., 2022)
    half_log_snr    lambda            alpha           -(sigma / alpha) eps
    angle           atan(sigma/alpha) r               v / r,   r = sqrt(alpha^2 + sigma^2)
    flow            sigma / m         alpha + sigma   eps - x0, flow matching's straight line from data to noise

The last two are of x_0 / c with its scale alpha c in the place of alpha, c = `SDE.data_scale`: a circle and a line that
go through levels in any unit as through those of data of order one.

In all but t the linear part is exact. A step to sigma = 0 has no derivative at its end, and in sigma and half_log_snr
one from alpha = 0 has no start, one up to it no end: all are first order, x_0 = D and DDIM's step. On a `DDPMChain`,
whose beta(t) jumps at the nodes, a method in t keeps no order; the other four do.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from scoresde.checks import check_option
from scoresde.grid import Grid
from scoresde.sde import SDE
from scoresde.solvers.base import SingleStep
from scoresde.solvers.first_order import DDIM
from scoresde.solvers.rows import Rows, stage_rows
from scoresde.views import Affine, view_of_mean

__all__ = ["Euler", "Heun", "RungeKutta"]

Variable = Literal["sigma", "half_log_snr", "t", "angle", "flow"]
Method = Literal["euler", "heun", "midpoint", "ralston", "kutta3", "rk4"]


class _Coordinates(NamedTuple):
    """psi(t), its inverse, m(t) and (p, q) of F, for an SDE."""

    psi: Callable[[SDE, Tensor], Tensor]
    time: Callable[[SDE, Tensor], Tensor]
    m: Callable[[SDE, Tensor], Tensor]
    F: Callable[[SDE, Tensor], Affine]


def _v(sde: SDE, t: Tensor) -> Affine:
    """r F = alpha c eps - sigma x_0 / c."""
    signal, sigma = sde.scales(t)
    return signal / sigma, -(signal**2 + sigma**2) / (sde.data_scale * sigma)


def _at_snr(sde: SDE, snr: Tensor) -> Tensor:
    """The time at which alpha c / sigma is reached, given as its logarithm."""
    return sde.time_at(snr - math.log(sde.data_scale))


def _scaled(affine: Affine, factor: Tensor) -> Affine:
    return affine[0] * factor, affine[1] * factor


VARIABLES: dict[str, _Coordinates] = {
    "t": _Coordinates(
        psi=lambda sde, t: t,
        time=lambda sde, psi: psi,
        m=lambda sde, t: torch.ones_like(t),
        F=lambda sde, t: view_of_mean("velocity", sde, t),
    ),
    "sigma": _Coordinates(
        psi=lambda sde, t: sde.sigma(t) / sde.alpha(t),
        time=lambda sde, psi: sde.time_at(-psi.log()),
        m=lambda sde, t: sde.alpha(t),
        F=lambda sde, t: view_of_mean("eps", sde, t),
    ),
    "half_log_snr": _Coordinates(
        psi=lambda sde, t: sde.half_log_snr(t),
        time=lambda sde, psi: sde.time_at(psi),
        m=lambda sde, t: sde.alpha(t),
        F=lambda sde, t: _scaled(view_of_mean("eps", sde, t), -sde.sigma(t) / sde.alpha(t)),
    ),
    "angle": _Coordinates(
        psi=lambda sde, t: torch.atan2(*sde.scales(t)[::-1]),
        time=lambda sde, psi: _at_snr(sde, -psi.tan().log()),
        m=lambda sde, t: sde.radius(t),
        F=lambda sde, t: _scaled(_v(sde, t), 1 / sde.radius(t)),
    ),
    "flow": _Coordinates(
        psi=lambda sde, t: sde.sigma(t) / torch.add(*sde.scales(t)),
        time=lambda sde, psi: _at_snr(sde, ((1 - psi) / psi).log()),
        m=lambda sde, t: torch.add(*sde.scales(t)),
        F=lambda sde, t: (1 / sde.sigma(t), -torch.add(*sde.scales(t)) / (sde.data_scale * sde.sigma(t))),
    ),
}

METHODS: dict[str, list[list[float]]] = {
    "euler": [[1.0]],
    "heun": [[1.0], [1 / 2, 1 / 2]],
    "midpoint": [[1 / 2], [0.0, 1.0]],
    "ralston": [[2 / 3], [1 / 4, 3 / 4]],
    "kutta3": [[1 / 2], [-1.0, 2.0], [1 / 6, 2 / 3, 1 / 6]],
    "rk4": [[1 / 2], [0.0, 1 / 2], [0.0, 0.0, 1.0], [1 / 6, 1 / 3, 1 / 3, 1 / 6]],
}
"""Lines j = 1..S of A for each method; the last are its weights, the sums of the others its c_j."""


def has_no_stages(sde: SDE, t: Tensor, s: Tensor) -> Tensor:
    """Whether a move t -> s ends at sigma = 0, or has alpha = 0 at an end, where half log-SNR is infinite: a method
    with stages takes DDIM's single row there.
    """
    return (sde.sigma(s) == 0) | (sde.alpha(t) == 0) | (sde.alpha(s) == 0)


def rows_by_kind(t: Tensor, s: Tensor, kind: Tensor, make: Callable[[Any, Tensor, Tensor], Rows]) -> Rows:
    """The rows of moves t -> s of several kinds, those of kind k made together by make(k, t, s); all of shape (M,)."""
    parts = []
    for k in kind.unique().tolist():
        where = (kind == k).nonzero().flatten()
        parts.append(make(k, t[where], s[where]).numbered(where))
    return Rows.merge(parts)


@dataclass(frozen=True)
class RungeKutta(SingleStep):
    """An explicit Runge-Kutta method of S stages, S evaluations a step and one on a step to sigma = 0.

    All methods but "euler" and "heun" evaluate between the times of the grid, on a `DDPMChain` between its nodes: a
    network whose label is the number of a node sees it rounded.

    Args:
        method: "euler" (order 1), "heun", "midpoint" or "ralston" (2), "kutta3" (3) or "rk4" (4). (On Gaussian data the
            midpoint rule in sigma and flow is of order 3: its h^3 error vanishes on y = sqrt(std^2 + u^2).)
        variable: as in the module's docstring. "half_log_snr" needs some 20 steps: its first ones are too large before.

    Raises:
        ValueError: on another method or variable.
    """

    method: Method = "rk4"
    variable: Variable = "sigma"

    def __post_init__(self) -> None:
        check_option(METHODS, method=self.method)
        check_option(VARIABLES, variable=self.variable)

    def grid(self, sde: SDE, steps: int, *, end: float = 0.0) -> Grid:
        power = {"sigma": 2.0, "t": 2.5, "half_log_snr": 1.5}.get(self.variable, 4.0)  # measured
        return Grid.power(sde, steps, power=power, end=end)

    def stages(self, sde: SDE, t: Tensor, s: Tensor) -> Tensor:
        return torch.where(self._singular(sde, t, s), 1, len(METHODS[self.method]))

    def rows(self, sde: SDE, t: Tensor, s: Tensor) -> Rows:
        singular = self._singular(sde, t, s)
        return rows_by_kind(
            t, s, singular, lambda kind, t, s: DDIM().rows(sde, t, s) if kind else self._stages(sde, t, s)
        )

    def _singular(self, sde: SDE, t: Tensor, s: Tensor) -> Tensor:
        return has_no_stages(sde, t, s) if self.variable in ("sigma", "half_log_snr") else sde.sigma(s) == 0

    def _stages(self, sde: SDE, t: Tensor, s: Tensor) -> Rows:
        x = VARIABLES[self.variable]
        S = len(METHODS[self.method])
        A = torch.tensor(
            [line + [0.0] * (S - len(line)) for line in METHODS[self.method]], dtype=torch.float64, device="cpu"
        )
        h = x.psi(sde, s) - x.psi(sde, t)
        inner = [t if c == 0 else s if c == 1 else x.time(sde, x.psi(sde, t) + c * h) for c in [0, *A.sum(1).tolist()]]
        times = torch.stack(inner, 1)
        p, q = x.F(sde, times[:, :-1])
        return stage_rows(times[:, :-1], x.m(sde, times), p, q, h[:, None, None] * A)


class _Named(SingleStep, ABC):
    """One of the methods under its own name, in a variable."""

    variable: Variable

    def __post_init__(self) -> None:
        check_option(VARIABLES, variable=self.variable)

    @property
    @abstractmethod
    def method(self) -> SingleStep:
        """What it is."""

    def grid(self, sde: SDE, steps: int, *, end: float = 0.0) -> Grid:
        return self.method.grid(sde, steps, end=end)

    def stages(self, sde: SDE, t: Tensor, s: Tensor) -> Tensor:
        return self.method.stages(sde, t, s)

    def rows(self, sde: SDE, t: Tensor, s: Tensor) -> Rows:
        return self.method.rows(sde, t, s)


@dataclass(frozen=True)
class Euler(_Named):
    """Euler's method on the probability-flow ODE, first order, one evaluation a step.

    Args:
        variable: "sigma", where it is DDIM's deterministic step, or another of the module's docstring.
    """

    variable: Variable = "sigma"

    @property
    def method(self) -> SingleStep:
        return DDIM() if self.variable == "sigma" else RungeKutta("euler", self.variable)


@dataclass(frozen=True)
class Heun(_Named):
    """Heun's method on the probability-flow ODE (Karras et al., 2022, algorithm 1), second order, two evaluations a
    step and one on the last to sigma = 0: 2 N - 1 in all (and one on a first step from alpha = 0 in sigma: 2 N - 2).

    In sigma the correction adds (u_t / u_s - 1) / 2 times the change of D over the step: keep the ratio of u from one
    time to the next below about 4 (a Karras or log-SNR grid of enough steps). A uniform grid of few steps on a VP SDE
    or a chain begins with far larger ratios, worst on the cosine chain: take variable="t" there.

    Args:
        variable: "sigma", the paper's choice, "t", its algorithm for the SDE's own alpha(t) and sigma(t), or another of
            the module's docstring.

    Its grid in sigma is the customary one on `EDMSDE`, the paper's, and below 10 steps, where of all grids that suffers
    least; else `RungeKutta`'s, `Grid.power` with power 2.
    """

    variable: Variable = "sigma"

    @property
    def method(self) -> SingleStep:
        return RungeKutta("heun", self.variable)

    def grid(self, sde: SDE, steps: int, *, end: float = 0.0) -> Grid:
        if self.variable == "sigma" and (steps < 10 or sde.customary_grid == "karras"):
            return Grid.customary(sde, steps, end=end)
        return super().grid(sde, steps, end=end)
