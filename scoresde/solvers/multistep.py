"""What exponential multistep solvers share: one evaluation a step, and the F of earlier ones.

The linear part of each step is exact, and F is replaced by the polynomial through its last values, in one of three
views (the weights w_j are those of `scoresde.solvers.weights`):

    x_s = a x_t + scale sum_j w_j F_j + c z

    view   F      a                                  scale                 c^2                             integral over
    x0     D      (sigma_s / sigma_t) e^{-tau^2 h}   alpha_s               sigma_s^2 (1 - e^{-2 tau^2 h})  lambda
    eps    eps    alpha_s / alpha_t                  (1 + tau^2) sigma_s   tau^2 sigma_s^2 (e^{2h} - 1)    lambda
    v      v / m  (m_s / m_t) k_t                    m_s                   m_s^2 (1 - k_t^2)               theta
    flow   eps-D  (m_s / m_t) k_t                    m_s                   m_s^2 (1 - k_t^2 - g)           sigma / m

In v theta = atan(sigma / alpha) and m^2 = alpha^2 + sigma^2, along the circle that a VP SDE follows; in flow
m = alpha + sigma, along the straight line of flow matching; in both x_0 and alpha stand for x_0 / c and alpha c, as in
`scoresde.solvers.runge_kutta`. k_t = (m_s alpha_t / (m_t alpha_s))^{tau^2}, the kernel of
their integral is (1 + tau^2) k, and g = 2 tau^2 / (2 tau^2 + 1) (alpha_s / m_s - k_t^2 alpha_t / m_t). Both are finite
at alpha = 0. tau = 0 is the probability-flow ODE, tau = 1 the reverse SDE.

A predictor reads F_n, F_{n-1}, ... A corrector repeats the step with F_{n+1}, evaluated at the predicted state, among
its values, at no further evaluation (PEC): both start from the same state with the same noise, so that they differ by F
terms alone, and these are added to the next row. The states between rows are therefore the predicted ones. The first
steps use the orders that the history allows. A step to sigma = 0 is D, or taken by the polynomial as the others are:
the landing. One from alpha = 0, in x0 and eps, is first order and leaves no value behind. One up to alpha = 0 is first
order, too, and the step before it then has no corrector.

A method that starts with a first-order step has an error of order 2 from it, or 3 with a corrector. It is small where
the start is nearly pure noise, and shows at some 100 to 500 steps: higher orders are those measured before that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from scoresde.grid import Grid
from scoresde.schedules import EDMSDE
from scoresde.sde import SDE
from scoresde.solvers.base import Solver
from scoresde.solvers.first_order import marginal_preserving
from scoresde.solvers.rows import forgotten
from scoresde.solvers.runge_kutta import VARIABLES
from scoresde.solvers.weights import exponential_kernel, interpolation_weights, lagrange_basis
from scoresde.tableau import Tableau
from scoresde.tensors import told
from scoresde.views import view_of_mean

__all__ = [
    "CHI",
    "CURVES",
    "LANDINGS",
    "Kernel",
    "Landing",
    "Multistep",
    "Rule",
    "Steps",
    "Variable",
    "View",
    "steps_in",
]

View = Literal["x0", "eps", "v", "flow"]
Variable = Literal["half_log_snr", "sigma", "t", "angle", "flow", "softplus"]
Rule = Literal["exact", "B1", "B2"]
Landing = Literal["denoise", "polynomial"]
Kernel = Callable[[Tensor], Tensor]

LANDINGS = get_args(Landing)

NOISE = 1000.0
"""K of softplus: sigma / (alpha c) from which more noise is all the same."""


def _softplus(sde: SDE, t: Tensor) -> Tensor:
    """log (1 + u) / (1 + u / K), u = sigma / (alpha c): of -lambda, u at the data and log u at noise."""
    signal, sigma = sde.scales(t)
    return ((signal + sigma) / (signal + sigma / NOISE)).log()


CHI: dict[str, Callable[[SDE, Tensor], Tensor]] = {
    **{name: coordinates.psi for name, coordinates in VARIABLES.items()},
    "softplus": _softplus,
}
"""Variables of interpolation, as functions of (sde, t)."""

CURVES: dict[str, Variable] = {"v": "angle", "flow": "flow"}
"""Views whose flow is the integral of F alone, and the variable it is over: a key of `runge_kutta.VARIABLES`."""

_NO_SIGNAL = 0.0025  # of alpha c / sigma, a third of what is left of it at t_max of VP, EDM and VE


class Multistep(Solver):
    """A solver of one evaluation a step, which reads those of earlier steps too."""

    power: ClassVar[float | None] = 4.0
    between: ClassVar[bool] = True

    def evaluations(self, grid: Grid) -> int:
        return grid.steps


@dataclass(frozen=True)
class Steps:
    """The N steps of a grid in one view, with the columns of the module's docstring, each of shape (N,).

    `kernel(n)` is that of steps n, `slope` its leading order (h times its value), and c2 the noise's variance.
    """

    grid: Grid
    view: str
    variable: str
    a: Tensor
    scale: Tensor
    c2: Tensor
    kernel: Callable[[Tensor], Kernel]
    slope: Tensor
    landing: Landing = "denoise"

    __repr__ = told

    @cached_property
    def lands(self) -> Tensor:
        """Whether a step to sigma = 0 is taken by the polynomial."""
        return (self.grid.pairs()[3] == 0) & (self.landing == "polynomial")

    @cached_property
    def regular(self) -> Tensor:
        """Whether the view can take a step."""
        alpha_t, _, alpha_s, sigma_s = self.grid.pairs()
        reach = (alpha_t > 0) & (alpha_s > 0)  # up to alpha = 0, too, half log-SNR is infinite
        regular = (self.chi[:-1].isfinite() & reach) | (self.view in CURVES)
        return ((sigma_s > 0) | self.lands) & regular

    @cached_property
    def omega(self) -> Tensor:
        """The variable of integration at all times, (N + 1,)."""
        return VARIABLES[self._integrated].psi(self.grid.sde, self.grid.times)

    @property
    def _integrated(self) -> str:
        return CURVES.get(self.view, "half_log_snr")

    @cached_property
    def chi(self) -> Tensor:
        """The variable of interpolation at all times, (N + 1,)."""
        return CHI[self.variable](self.grid.sde, self.grid.times)

    def _chi_at(self, omega: Tensor) -> Tensor:
        return self._chi_of(VARIABLES[self._integrated].time(self._levels, omega), self.variable)

    @cached_property
    def _levels(self) -> SDE:
        """The process of the same levels whose time is sigma / alpha: one may have none below its smallest."""
        return EDMSDE().for_data(self.grid.sde.data_scale)

    def _chi_of(self, u: Tensor, variable: str) -> Tensor:
        if variable == "t":
            return self.grid.sde.time_at(-u.log())
        return CHI[variable](self._levels, u)

    def _own(self, order: int, new: bool) -> Tensor:
        """Whether a step is interpolated in the variable of integration itself, (N,). In v and flow also where one of
        its times, or those of its values, has next to no signal: half log-SNR makes long steps there, or infinite ones.
        """
        N = self.grid.steps
        if self.variable == self._integrated:
            return torch.ones(N, dtype=torch.bool, device="cpu")
        if self.view not in CURVES or self.variable not in ("half_log_snr", "sigma"):  # those that grow without end
            return torch.zeros(N, dtype=torch.bool, device="cpu")
        signal, sigma = self.grid.sde.scales(self.grid.times)
        told = signal > _NO_SIGNAL * sigma
        back = torch.arange(N, device="cpu")[:, None] + 1 - torch.arange(order + 1 - int(new), device="cpu")
        return ~told[back.clamp(min=0)].all(1)

    def weights(self, order: int, new: bool = False, rule: Rule = "exact", lower_final: bool = False) -> Tensor:
        """w_j through the last `order` values of F, or as many as there are, shape (N, order). Lag 0 is the step's own
        F or, with `new`, that at its end. On two values B1 and B2 are UniPC's short cuts. With `lower_final` no step
        takes more values than there are steps left, its own included.
        """
        N = self.grid.steps
        n = torch.arange(N, device="cpu")
        values = torch.cumsum(self.regular, 0)
        values = (torch.minimum(values, N - n) if lower_final else values).add(new).clamp(max=order)
        w = torch.zeros(N, order, dtype=torch.float64, device="cpu")
        for J in range(1, order + 1):
            on, to_end = self.regular & (values == J), self.omega[1:].isinf()
            end = n[on & to_end]
            if len(end) and not new:  # there is no corrector on the last step
                w[end, :J] = self._landing(end[:, None] - torch.arange(J, device="cpu"))
            for own in (True, False):
                at = n[on & ~to_end & (self._own(order, new) == own)]
                if len(at):
                    variable, through = (self.omega, None) if own else (self.chi, self._chi_at)
                    nodes = variable[at[:, None] + int(new) - torch.arange(J, device="cpu")]
                    ends = self.omega[at], self.omega[at + 1]
                    w[at, :J] = interpolation_weights(nodes, *ends, self.kernel(at), through)
        two = n[self.regular & (values == 2) & ~self.omega[1:].isinf()]
        if rule != "exact" and len(two):
            # sum_j w_j F_j = total F_n + B / 2 (F_o - F_n) h / (lambda_o - lambda_n), F_o the other value.
            here, other = (1, 0) if new else (0, 1)
            total = w[two].sum(1)
            B = total if rule == "B2" else self.slope[two]
            reach = self.omega[two + 1 - 2 * other] - self.omega[two]
            w[two, other] = B / 2 * (self.omega[two + 1] - self.omega[two]) / reach
            w[two, here] = total - w[two, other]
        return w

    def _landing(self, at: Tensor) -> Tensor:
        """w_j of a step to sigma = 0 in x0 or eps, through the values at times number `at`, shape (M, J): D at its end,
        or the integral of eps over sigma / alpha.
        """
        variable = self.variable if bool(self.chi[-1].isfinite()) else "sigma"
        sde, times = self.grid.sde, self.grid.times[at]
        nodes, end = CHI[variable](sde, times), torch.zeros(len(at), dtype=torch.float64, device="cpu")
        if self.view == "x0":
            return lagrange_basis(nodes, end[:, None])[:, 0]  # chi is 0 where sigma is
        start = CHI["sigma"](sde, times[:, 0])
        return interpolation_weights(nodes, start, end, torch.ones_like, lambda u: self._chi_of(u, variable))

    def tableau(self, predictor: Tensor, corrector: Tensor | None = None) -> Tableau:
        """The table of weights (N, K), lag 0 being a step's own F, and of a corrector's, lag 0 being F at its end."""
        b = torch.where(self.regular[:, None], self.scale[:, None] * predictor, 0.0)
        if corrector is not None:
            K = max(predictor.shape[1] + 1, corrector.shape[1])
            change = self.scale[:, None] * (
                pad(corrector, (0, K - corrector.shape[1])) - pad(predictor, (1, K - 1))[:, :K]
            )
            change = torch.where(self.regular[:, None], change, 0.0)
            b = pad(b, (0, K - b.shape[1]))
            b[1:] += self.a[1:, None] * change[:-1]
        sde, t, s = self.grid.sde, self.grid.times[:-1], self.grid.times[1:]
        first_order = marginal_preserving(sde, t, s, self.c2)
        p, q, a, c = torch.zeros_like(t), torch.ones_like(t), first_order.a, first_order.c
        on = self.regular
        curve = CURVES.get(self.view)
        p[on], q[on] = VARIABLES[curve].F(sde, t[on]) if curve else view_of_mean(self.view, sde, t[on])
        b[~on] = pad(first_order.b, (0, b.shape[1] - 1))[~on]
        return Tableau(self.grid, a=torch.where(on, self.a, a), b=b, c=torch.where(on, self.c2.sqrt(), c), view=(p, q))


def steps_in(
    grid: Grid,
    view: View = "x0",
    variable: Variable | None = None,
    tau: Tensor | float = 0.0,
    landing: Landing = "denoise",
) -> Steps:
    """The steps of the module's docstring; tau is a number or shape (N,)."""
    alpha_t, sigma_t, alpha_s, sigma_s = grid.pairs()
    tau = torch.as_tensor(tau, dtype=torch.float64, device="cpu").expand(grid.steps)
    if view != "x0" and float(tau[-1]) > 0:  # outside x0 noise does not vanish with sigma_s
        landing = "denoise"
    if view in CURVES:
        curve = CURVES[view]
        m_t, m_s = (m := VARIABLES[curve].m(grid.sde, grid.times))[:-1], m[1:]
        signal, _ = grid.sde.scales(grid.times)
        part_t, part = (signal / m)[:-1], (signal / m)[1:]  # cos(theta), 1 - sigma / m
        keep = (part_t / part) ** tau**2
        lost = 1 - keep**2
        if view == "flow":
            lost = lost - 2 * tau**2 / (2 * tau**2 + 1) * (part - keep**2 * part_t)

        def kernel(n: Tensor) -> Kernel:
            gain, level, at_s = (1 + tau[n, None] ** 2), tau[n, None] ** 2, part[n, None]
            return lambda at: gain * ((at.cos() if view == "v" else 1 - at) / at_s) ** level

        if not grid.increasing:  # there noise would have a negative variance, of which `Tableau` is to hear
            lost = lost.clamp(min=0)
        slope = (1 + tau**2) * VARIABLES[curve].psi(grid.sde, grid.times).diff()
        return Steps(grid, view, variable or curve, m_s / m_t * keep, m_s, m_s**2 * lost, kernel, slope, landing)
    lambda_ = grid.sde.half_log_snr(grid.times)
    h = lambda_.diff()
    c2 = sigma_s**2 * forgotten(grid.sde, grid.times[:-1], grid.times[1:], tau)
    if view == "x0":
        k, a, scale = 1 + tau**2, sigma_s / sigma_t * torch.where(sigma_s > 0, -(tau**2) * h, 0.0).exp(), alpha_s
    else:
        k, a, scale = (
            -torch.ones_like(tau),
            alpha_s / alpha_t,
            (1 + tau**2) * torch.where(sigma_s > 0, sigma_s, alpha_s),
        )
        c2 = torch.where((tau > 0) & h.isfinite(), (tau * sigma_s) ** 2 * torch.expm1(2 * h), c2)
    return Steps(
        grid,
        view,
        variable or "half_log_snr",
        a,
        scale,
        c2,
        lambda n: exponential_kernel(k[n], lambda_[n + 1]),
        slope=k * h,
        landing=landing,
    )
