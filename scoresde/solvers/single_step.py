"""Exponential Runge-Kutta solvers of the probability-flow ODE. With y = x / m its flow is an integral over lambda,

    y_s = y_t + int_{lambda_t}^{lambda_s} k e^{k lambda} F dlambda,    h = lambda_s - lambda_t

    view   F     m       k
    eps    eps   alpha   -1     (DPM-Solver)
    x0     D     sigma   +1     (DPM-Solver++)

and stage j, like the result, takes for F the polynomial in lambda through chosen earlier stages,

    y_j = y_t + e^{k lambda_j} sum_l w_{j,l} F_l,    lambda_j = lambda_t + r_j h,    w of `scoresde.solvers.weights`

A step to sigma = 0, or with alpha = 0 at an end, where h is infinite, is DDIM's single row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from scoresde.checks import check_count, check_option, check_order
from scoresde.grid import Grid
from scoresde.sde import SDE
from scoresde.solvers.base import SingleStep, Solver
from scoresde.solvers.first_order import DDIM
from scoresde.solvers.rows import Rows, stage_rows
from scoresde.solvers.runge_kutta import has_no_stages, rows_by_kind
from scoresde.solvers.weights import exponential_kernel, interpolation_weights
from scoresde.views import view_of_mean

__all__ = ["DPMSolver", "ExponentialHeun"]

View = Literal["eps", "x0"]
Stages = list[tuple[float, list[int]]]
"""(r_j, the stages l < j whose F are interpolated) for j = 1..S; stage 0 is the start, r_S = 1 the result."""

DPM_SOLVER: dict[int, Stages] = {
    2: [(1 / 2, [0]), (1.0, [1])],
    3: [(1 / 3, [0]), (2 / 3, [0, 1]), (1.0, [0, 2])],
}
EXPONENTIAL_HEUN: Stages = [(1.0, [0]), (1.0, [0, 1])]


def exponential_rows(sde: SDE, t: Tensor, s: Tensor, view: View, stages: Stages) -> Rows:
    """The moves t -> s by the stages of the module's docstring, with half log-SNR finite at both ends."""
    m, k = (sde.alpha, -1) if view == "eps" else (sde.sigma, 1)
    lambda_t, h = sde.half_log_snr(t), sde.half_log_snr(s) - sde.half_log_snr(t)
    r = [0.0, *(r_j for r_j, _ in stages)]
    times = torch.stack([t if x == 0 else s if x == 1 else sde.time_at(lambda_t + x * h) for x in r], 1)
    nodes = lambda_t[:, None] + h[:, None] * torch.tensor(r, dtype=torch.float64, device="cpu")
    S = len(stages)
    W = nodes.new_zeros(len(t), S, S)
    for j, (_, chosen) in enumerate(stages):
        lambda_j = nodes[:, j + 1]
        w = interpolation_weights(nodes[:, chosen], lambda_t, lambda_j, exponential_kernel(k, lambda_j))
        W[:, j, chosen] = (k * lambda_j).exp()[:, None] * w
    p, q = view_of_mean(view, sde, times[:, :-1])
    return stage_rows(times[:, :-1], m(times), p, q, W)


@dataclass(frozen=True)
class DPMSolver(SingleStep):
    """DPM-Solver-1, -2 and -3 (Lu et al., 2022, algorithms 1 and 2, r_1 = 1/2; r_1 = 1/3, r_2 = 2/3) and, in the x0
    view, the single-step solvers 2S and 3S of DPM-Solver++ (Lu et al., 2022b): `order` evaluations a step, and one on
    the last to sigma = 0. Measured orders are 1, 2 and 3 in both views.

    Order 1 is DDIM. Order 2 takes F at the midpoint for the whole step. Order 3 takes straight lines through F_0, F_1
    for its second stage and through F_0, F_2 for the result. Stages lie between the times of the grid, on a `DDPMChain`
    between its nodes: the network's time label must allow that.

    Args:
        order: 1, 2 or 3.
        view: "eps" is DPM-Solver, "x0" DPM-Solver++.
        fast: `sample(nfe=...)` fills its budget exactly (their DPM-Solver-fast): as many steps of `order` as leave one
            to `order` evaluations over, which lower orders take, [..., 3, 3, 2, 1], [..., 3, 3, 1] or [..., 3, 3, 2],
            and one evaluation for the step to sigma = 0. It has no say in `sample(steps=...)`.
        orders: the order of each step instead, for a grid of as many; the last step to sigma = 0 is first order
            whatever is written.

    Raises:
        ValueError: on another order or view, no order in `orders`, or `orders` and `fast` at once; by `tableau`, if
            `orders` has not one number for each step; by `within`, if `orders` is given.

    >>> from scoresde import VPSDE
    >>> solver, grid = DPMSolver(fast=True).within(VPSDE(), 10)
    >>> solver.orders, solver.evaluations(grid)
    ((3, 3, 2, 1, 1), 10)
    """

    power: ClassVar[float | None] = 4.0
    order: int = 3
    view: View = "eps"
    fast: bool = False
    orders: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_option(("eps", "x0"), view=self.view)
        check_order(3, order=self.order)
        if self.orders is None:
            return
        if not isinstance(self.orders, Sequence) or len(self.orders) == 0:
            raise ValueError(f"orders={self.orders!r}: expected the order of each step, (3, 3, 2, 1) say, or None")
        object.__setattr__(self, "orders", tuple(self.orders))  # hashable
        for order in self.orders:
            check_order(3, order=order)
        if self.fast:
            raise ValueError("orders= fixes the steps that fast=True would choose: give one of them")

    def stages(self, sde: SDE, t: Tensor, s: Tensor) -> Tensor:
        orders = self.orders or (self.order,) * len(t)
        if len(orders) != len(t):
            raise ValueError(f"orders={orders} for a grid of {len(t)} steps: give one order for each step")
        return torch.where(has_no_stages(sde, t, s), 1, torch.tensor(orders, dtype=torch.int64, device="cpu"))

    def rows(self, sde: SDE, t: Tensor, s: Tensor) -> Rows:
        return rows_by_kind(t, s, self.stages(sde, t, s), lambda k, t, s: self._rows(k, sde, t, s))

    def _rows(self, order: int, sde: SDE, t: Tensor, s: Tensor) -> Rows:
        return DDIM().rows(sde, t, s) if order == 1 else exponential_rows(sde, t, s, self.view, DPM_SOLVER[order])

    def within(self, sde: SDE, nfe: int) -> tuple[Solver, Grid]:
        if self.orders is not None:
            raise ValueError("orders= fixes the steps: give steps= or grid=, not nfe=")
        if not self.fast:
            return super().within(sde, nfe)
        check_count(nfe=nfe)
        whole = self.grid(sde, 1)
        # Steps from alpha = 0 and to sigma = 0 take one evaluation each; a lone step may be both.
        first = [1] if float(sde.alpha(whole.times[0])) == 0 else []
        last = [1] if float(sde.sigma(whole.times[-1])) == 0 else []
        orders = [*first, *_fast(nfe - len(first + last), self.order), *last][:nfe]
        if len(orders) > sde.most_steps:
            return super().within(sde, nfe)
        return replace(self, fast=False, orders=tuple(orders)), self.grid(sde, len(orders))


def _fast(nfe: int, order: int) -> list[int]:
    """Orders that sum to nfe: `order` repeated, then lower ones."""
    if nfe <= 0:
        return []
    whole, rest = divmod(nfe, order)
    if rest:
        return [order] * whole + [rest]
    return [order] * (whole - 1) + ([2, 1] if order == 3 else [order])


@dataclass(frozen=True)
class ExponentialHeun(SingleStep):
    """Heun's method with an exact linear part: DDIM's step, then the integral of the straight line through F at its two
    ends, the two-stage exponential Runge-Kutta method of order 2 (Hochbruck and Ostermann, 2010). Two
    evaluations a step, one on the last to sigma = 0.

        x_s = (sigma_s / sigma_t) x_t + alpha_s [(phi_1 - phi_2) D_t + phi_2 D_s],
        phi_1 = 1 - e^{-h},  phi_2 = 1 - phi_1 / h                                        (view x0)

    Args:
        view: "x0" or "eps", the F that is interpolated.

    Raises:
        ValueError: on another view.
    """

    power: ClassVar[float | None] = 4.0
    view: View = "x0"

    def __post_init__(self) -> None:
        check_option(("x0", "eps"), view=self.view)

    def stages(self, sde: SDE, t: Tensor, s: Tensor) -> Tensor:
        return torch.where(has_no_stages(sde, t, s), 1, len(EXPONENTIAL_HEUN))

    def rows(self, sde: SDE, t: Tensor, s: Tensor) -> Rows:
        def make(alone: bool, t: Tensor, s: Tensor) -> Rows:
            return DDIM().rows(sde, t, s) if alone else exponential_rows(sde, t, s, self.view, EXPONENTIAL_HEUN)

        return rows_by_kind(t, s, has_no_stages(sde, t, s), make)
