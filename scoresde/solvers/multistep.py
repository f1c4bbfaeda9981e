"""Exponential multistep solvers: one evaluation a step, and the F of earlier ones.

The linear part of each step is exact, and F is replaced by the polynomial through its last values, in one of three
views (the weights w_j are those of `scoresde.solvers.weights`):

    x_s = a x_t + scale sum_j w_j F_j + c z

    view   F      a                                  scale                 c^2                             integral over
    x0     D      (sigma_s / sigma_t) e^{-tau^2 h}   alpha_s               sigma_s^2 (1 - e^{-2 tau^2 h})  lambda
    eps    eps    alpha_s / alpha_t                  (1 + tau^2) sigma_s   tau^2 sigma_s^2 (e^{2h} - 1)    lambda
    v      v / m  (m_s / m_t) k_t                    m_s                   m_s^2 (1 - k_t^2)               theta
    flow   eps-D  (m_s / m_t) k_t                    m_s                   m_s^2 (1 - k_t^2 - g)           sigma / m

In v theta = atan(sigma / alpha) and m^2 = alpha^2 + sigma^2, along the circle that a VP SDE follows; in flow
m = alpha + sigma, along the straight line of flow matching. k_t = (m_s alpha_t / (m_t alpha_s))^{tau^2}, the kernel of
their integral is (1 + tau^2) k, and g = 2 tau^2 / (2 tau^2 + 1) (alpha_s / m_s - k_t^2 alpha_t / m_t). Both are finite
at alpha = 0. tau = 0 is the probability-flow ODE, tau = 1 the reverse SDE.

A predictor reads F_n, F_{n-1}, ... A corrector repeats the step with F_{n+1}, evaluated at the predicted state, among
its values, at no further evaluation (PEC): both start from the same state with the same noise, so that they differ by F
terms alone, and these are added to the next row. The states between rows are therefore the predicted ones. The first
steps use the orders that the history allows. A step to sigma = 0 is D, and one from alpha = 0, in x0 and eps, is first
order and leaves no value behind. One up to alpha = 0 is first order, too, and the step before it then has no corrector.

A method that starts with a first-order step has an error of order 2 from it, or 3 with a corrector. It is small where
the start is nearly pure noise, and shows at some 100 to 500 steps: higher orders are those measured before that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from scoresde.checks import check_nonnegative, check_option, check_order
from scoresde.grid import Grid
from scoresde.solvers.base import Solver
from scoresde.solvers.first_order import marginal_preserving
from scoresde.solvers.rows import forgotten
from scoresde.solvers.runge_kutta import VARIABLES
from scoresde.solvers.weights import exponential_kernel, interpolation_weights
from scoresde.tableau import Tableau
from scoresde.views import view_of_mean

__all__ = ["DEIS", "ERSDE", "IPNDM", "DPMSolverPP", "ExponentialAB", "SASolver", "UniPC"]

View = Literal["x0", "eps", "v", "flow"]
Variable = Literal["half_log_snr", "sigma", "t", "angle", "flow"]
Rule = Literal["exact", "B1", "B2"]
Kernel = Callable[[Tensor], Tensor]

_CURVES: dict[str, Variable] = {"v": "angle", "flow": "flow"}
"""Views whose flow is the integral of F alone, and the variable it is over: a key of `runge_kutta.VARIABLES`."""


@dataclass(frozen=True)
class _Steps:
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

    @cached_property
    def regular(self) -> Tensor:
        """Whether the view can take a step."""
        alpha_t, _, alpha_s, sigma_s = self.grid.pairs()
        reach = (alpha_t > 0) & (alpha_s > 0)  # up to alpha = 0, too, half log-SNR is infinite
        return (sigma_s > 0) & self.chi[:-1].isfinite() & (reach | (self.view in _CURVES))

    @cached_property
    def omega(self) -> Tensor:
        """The variable of integration at all times, (N + 1,)."""
        return VARIABLES[self._integrated].psi(self.grid.sde, self.grid.times)

    @property
    def _integrated(self) -> str:
        return _CURVES.get(self.view, "half_log_snr")

    @cached_property
    def chi(self) -> Tensor:
        """The variable of interpolation at all times, (N + 1,)."""
        return VARIABLES[self.variable].psi(self.grid.sde, self.grid.times)

    def _chi_at(self, omega: Tensor) -> Tensor:
        if self.variable == self._integrated:
            return omega
        sde = self.grid.sde
        return VARIABLES[self.variable].psi(sde, VARIABLES[self._integrated].time(sde, omega))

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
            at = n[self.regular & (values == J)]
            if len(at):
                nodes = self.chi[at[:, None] + int(new) - torch.arange(J, device="cpu")]
                ends = self.omega[at], self.omega[at + 1]
                w[at, :J] = interpolation_weights(nodes, *ends, self.kernel(at), self._chi_at)
        two = n[self.regular & (values == 2)]
        if rule != "exact" and len(two):
            # sum_j w_j F_j = total F_n + B / 2 (F_o - F_n) h / (lambda_o - lambda_n), F_o the other value.
            own, other = (1, 0) if new else (0, 1)
            total = w[two].sum(1)
            B = total if rule == "B2" else self.slope[two]
            reach = self.omega[two + 1 - 2 * other] - self.omega[two]
            w[two, other] = B / 2 * (self.omega[two + 1] - self.omega[two]) / reach
            w[two, own] = total - w[two, other]
        return w

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
        curve = _CURVES.get(self.view)
        p[on], q[on] = VARIABLES[curve].F(sde, t[on]) if curve else view_of_mean(self.view, sde, t[on])
        b[~on] = pad(first_order.b, (0, b.shape[1] - 1))[~on]
        return Tableau(self.grid, a=torch.where(on, self.a, a), b=b, c=torch.where(on, self.c2.sqrt(), c), view=(p, q))


def _steps(grid: Grid, view: View = "x0", variable: Variable | None = None, tau: Tensor | float = 0.0) -> _Steps:
    """The steps of the module's docstring; tau is a number or shape (N,)."""
    alpha_t, sigma_t, alpha_s, sigma_s = grid.pairs()
    tau = torch.as_tensor(tau, dtype=torch.float64, device="cpu").expand(grid.steps)
    if view in _CURVES:
        curve = _CURVES[view]
        m_t, m_s = (m := VARIABLES[curve].m(grid.sde, grid.times))[:-1], m[1:]
        part = alpha_s / m_s  # cos(theta_s), 1 - sigma_s / m_s
        keep = (alpha_t / m_t / part) ** tau**2
        lost = 1 - keep**2
        if view == "flow":
            lost = lost - 2 * tau**2 / (2 * tau**2 + 1) * (part - keep**2 * alpha_t / m_t)

        def kernel(n: Tensor) -> Kernel:
            gain, level, at_s = (1 + tau[n, None] ** 2), tau[n, None] ** 2, part[n, None]
            return lambda at: gain * ((at.cos() if view == "v" else 1 - at) / at_s) ** level

        if not grid.increasing:  # there noise would have a negative variance, of which `Tableau` is to hear
            lost = lost.clamp(min=0)
        slope = (1 + tau**2) * VARIABLES[curve].psi(grid.sde, grid.times).diff()
        return _Steps(grid, view, variable or curve, m_s / m_t * keep, m_s, m_s**2 * lost, kernel, slope)
    lambda_ = grid.sde.half_log_snr(grid.times)
    h = lambda_.diff()
    c2 = sigma_s**2 * forgotten(grid.sde, grid.times[:-1], grid.times[1:], tau)
    if view == "x0":
        k, a, scale = 1 + tau**2, sigma_s / sigma_t * (-(tau**2) * h).exp(), alpha_s
    else:
        k, a, scale = -torch.ones_like(tau), alpha_s / alpha_t, (1 + tau**2) * sigma_s
        c2 = torch.where((tau > 0) & h.isfinite(), (tau * sigma_s) ** 2 * torch.expm1(2 * h), c2)
    return _Steps(
        grid,
        view,
        variable or "half_log_snr",
        a,
        scale,
        c2,
        lambda n: exponential_kernel(k[n], lambda_[n + 1]),
        slope=k * h,
    )


def _check_published(order: int, as_published: bool) -> None:
    if as_published and order != 3:
        raise ValueError(f"as_published is a variant of order 3, not of order {order}")


@dataclass(frozen=True)
class ExponentialAB(Solver):
    """Exponential Adams-Bashforth: the polynomial through the last `order` values of F, integrated exactly. In x0 and
    lambda it is UniP (Zhao et al., 2023), in eps and t DEIS-tAB (Zhang and Chen, 2023), in v and flow plain
    Adams-Bashforth on a curve without a linear part.

    Args:
        order: 1 to 4.
        view: "x0", "eps", "v" or "flow".
        variable: of interpolation, "half_log_snr" (the default in x0 and eps), "sigma" for sigma / alpha, "t", "angle"
            (the default in v) or "flow" for sigma / (alpha + sigma) (the default in flow).
        tau: noise level, 0 for the ODE. Outside x0 c^2 exceeds sigma_s^2 on long steps (in eps where h > 0.35), so that
            it wants 20 steps or more.
        lower_final: lower orders for the last steps, as many values as there are steps left.

    Raises:
        ValueError: on another order, view or variable, or a tau that is negative.
    """

    power: ClassVar[float | None] = 4.0

    order: int = 3
    view: View = "x0"
    variable: Variable | None = None
    tau: float = 0.0
    lower_final: bool = False

    def __post_init__(self) -> None:
        check_order(4, order=self.order)
        check_option(("x0", "eps", *_CURVES), view=self.view)
        check_option((None, *VARIABLES), variable=self.variable)
        check_nonnegative(tau=self.tau)

    def tableau(self, grid: Grid) -> Tableau:
        steps = _steps(grid, self.view, self.variable, self.tau)
        return steps.tableau(steps.weights(self.order, lower_final=self.lower_final))


@dataclass(frozen=True)
class DPMSolverPP(Solver):
    """DPM-Solver++ 2M and 3M and their SDE forms (Lu et al., 2022b, algorithm 2 and appendix): the view x0 in lambda.

    The official code's 3M takes half of the second difference, and so does every code that follows it: measured, it is
    second order. The default here is the whole of it, exponential Adams-Bashforth of order 3, which is third.

    Args:
        order: 1, 2 (2M) or 3 (3M).
        stochastic: the reverse SDE (SDE-DPM-Solver++) in place of the ODE.
        rule: of steps with two values, all but the first of order 2 and the second of order 3: "midpoint", phi_2
            replaced by phi_1 / 2 as published, or "exact" (the "heun" of k-diffusion, whose 3M takes it too).
        as_published: order 3 with half of the second difference, as in the official code.
        view: "x0", or "eps" for the multistep form of DPM-Solver (Lu et al., 2022).
        lower_final: lower orders for the last steps, as the official code has it where steps are few.

    Raises:
        ValueError: on another order, rule or view, or as_published without order 3.
    """

    power: ClassVar[float | None] = 4.0

    order: int = 2
    stochastic: bool = False
    rule: Literal["midpoint", "exact"] = "midpoint"
    as_published: bool = False
    view: Literal["x0", "eps"] = "x0"
    lower_final: bool = False

    def __post_init__(self) -> None:
        check_order(3, order=self.order)
        check_option(("midpoint", "exact"), rule=self.rule)
        check_option(("x0", "eps"), view=self.view)
        _check_published(self.order, self.as_published)

    def tableau(self, grid: Grid) -> Tableau:
        steps = _steps(grid, self.view, tau=float(self.stochastic))
        rule: Rule = "B2" if self.rule == "midpoint" else "exact"
        w = steps.weights(self.order, rule=rule, lower_final=self.lower_final)
        if self.order == 3 and self.as_published:
            w = _without_half_of_the_second_difference(steps, w)
        return steps.tableau(w)


def _without_half_of_the_second_difference(steps: _Steps, w: Tensor) -> Tensor:
    """From the polynomial through three values, D_n + D' x + D'' x^2 / 2 with x = lambda - lambda_n, to D'' / 2."""
    n = (w[:, 2] != 0).nonzero().flatten()
    x = steps.omega[n[:, None] - torch.arange(3, device="cpu")] - steps.omega[n, None]
    half_square = (w[n] * x**2).sum(1) / 2  # int kernel x^2 / 2, for which three values are exact
    w = w.clone()
    w[n] -= half_square[:, None] / 2 * _second_derivative(x)
    return w


def _second_derivative(x: Tensor) -> Tensor:
    """Weights of D'' on values at x, shape (M, 3)."""
    x0, x1, x2 = x.T
    return 2 / torch.stack([(x0 - x1) * (x0 - x2), (x1 - x0) * (x1 - x2), (x2 - x0) * (x2 - x1)], 1)


@dataclass(frozen=True)
class DEIS(Solver):
    """Diffusion exponential integrator sampler (Zhang and Chen, 2023), the view eps: tAB and rhoAB.

    Args:
        order: number of values, 1 to 4: the paper's tAB-k is order k + 1.
        variable: of interpolation, "t" (tAB, on the paper's quadratic grid) or "sigma" for sigma / alpha (rhoAB).

    Raises:
        ValueError: on another order or variable.
    """

    power: ClassVar[float | None] = 4.0

    order: int = 3
    variable: Literal["t", "sigma"] = "t"

    def __post_init__(self) -> None:
        check_order(4, order=self.order)
        check_option(("t", "sigma"), variable=self.variable)

    def tableau(self, grid: Grid) -> Tableau:
        return ExponentialAB(self.order, "eps", self.variable).tableau(grid)


@dataclass(frozen=True)
class IPNDM(Solver):
    """Improved pseudo-numerical method (Liu et al., 2022; Zhang and Chen, 2023): DDIM's step with eps replaced by the
    Adams-Bashforth combination of equal steps, whatever the steps are. Its order shows only on steps that are equal in
    sigma / alpha, and is two where the ratio of neighbouring steps tends to one; at few evaluations it is often good.

    Args:
        order: 1 to 4.

    Raises:
        ValueError: on another order.
    """

    power: ClassVar[float | None] = 4.0

    order: int = 4

    def __post_init__(self) -> None:
        check_order(4, order=self.order)

    def tableau(self, grid: Grid) -> Tableau:
        steps = _steps(grid, "eps")
        adams = {1: [1.0], 2: [3 / 2, -1 / 2], 3: [23 / 12, -16 / 12, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}
        table = torch.tensor([w + [0.0] * (4 - len(w)) for w in adams.values()], dtype=torch.float64, device="cpu")
        values = torch.cumsum(steps.regular, 0).clamp(1, self.order)
        total = steps.weights(1)
        return steps.tableau(total * table[values - 1][:, : self.order])


@dataclass(frozen=True)
class UniPC(Solver):
    """UniPC (Zhao et al., 2023): the predictor UniP-p and the corrector UniC-p, which adds the newest value and one
    order, at one evaluation a step. There is no corrector on the last step.

    Args:
        order: p, 1 to 4.
        view: "x0" or "eps", the paper's; "v" or "flow", Adams-Bashforth-Moulton along the curves of `ExponentialAB`.
        rule: the paper's B(h), which matters only for two values (UniP-2 and UniC-1, where it takes rho = 1/2): "B2",
            e^h - 1, "B1", h, or "exact", the exact weight.
        corrector: False for UniP alone.
        lower_final: lower orders for the last steps, as the official code has it.

    Raises:
        ValueError: on another order, view or rule.
    """

    power: ClassVar[float | None] = 4.0

    order: int = 3
    view: View = "x0"
    rule: Rule = "B2"
    corrector: bool = True
    lower_final: bool = False

    def __post_init__(self) -> None:
        check_order(4, order=self.order)
        check_option(("x0", "eps", *_CURVES), view=self.view)
        check_option(("exact", "B1", "B2"), rule=self.rule)

    def tableau(self, grid: Grid) -> Tableau:
        steps = _steps(grid, self.view)
        predictor = steps.weights(self.order, False, self.rule, self.lower_final)
        corrector = steps.weights(self.order + 1, True, self.rule, self.lower_final) if self.corrector else None
        return steps.tableau(predictor, corrector)


@dataclass(frozen=True)
class SASolver(Solver):
    """SA-Solver (Xue et al., 2023): stochastic Adams with predictor and corrector in the view x0, one evaluation a
    step; the corrector takes the predictor's noise.

    Args:
        predictor: number of values of the predictor, 1 to 4.
        corrector: number of values of the corrector, the newest among them, 0 for none, up to 5.
        tau: noise level, a number, or a function of the time at which a step starts, float64 of shape (N,) -> (N,).
            The paper's choice is 1 on the middle of the trajectory and 0 at its ends, which on `VPSDE` is
            `lambda t: ((0.2 <= t) & (t <= 0.8)).double()`.
        lower_final: lower orders for the last steps, as many values as there are steps left.

    Raises:
        ValueError: on other numbers, or a tau that is negative; by `tableau` if the function's values are.
    """

    power: ClassVar[float | None] = 4.0

    predictor: int = 3
    corrector: int = 4
    tau: float | Callable[[Tensor], Tensor] = 1.0
    lower_final: bool = False

    def __post_init__(self) -> None:
        check_order(4, predictor=self.predictor)
        if self.corrector != 0:
            check_order(5, corrector=self.corrector)
        if not callable(self.tau):
            check_nonnegative(tau=self.tau)

    def tableau(self, grid: Grid) -> Tableau:
        tau = (
            self.tau(grid.times[:-1])
            if callable(self.tau)
            else torch.tensor(self.tau, dtype=torch.float64, device="cpu")
        )
        if not isinstance(tau, Tensor) or tau.shape not in ((), (grid.steps,)):
            found = tuple(tau.shape) if isinstance(tau, Tensor) else type(tau).__name__
            raise ValueError(f"tau(t) returned {found} for t of shape {(grid.steps,)}: expected a tensor of that shape")
        if not bool((tau >= 0).all() and tau.isfinite().all()):
            raise ValueError(f"tau = {tau}: expected finite numbers >= 0")
        steps, final = _steps(grid, tau=tau), self.lower_final
        corrector = steps.weights(self.corrector, new=True, lower_final=final) if self.corrector else None
        return steps.tableau(steps.weights(self.predictor, lower_final=final), corrector)


def recommended_noise_scale(u: Tensor) -> Tensor:
    """phi(u) = u (e^{u^0.3} + 10), the choice of the ER-SDE paper (Cui et al., 2023)."""
    return u * ((u**0.3).exp() + 10)


@dataclass(frozen=True)
class ERSDE(Solver):
    """Extended reverse-time SDE solver (Cui et al., 2023), of a noise scale phi(u), u = sigma / alpha: the view x0
    interpolated in u, with r = phi(u_s) / phi(u_t),

        x_s = (alpha_s / alpha_t) r x_t + alpha_s sum_j w_j D_j + alpha_s sqrt(u_s^2 - r^2 u_t^2) z
        w_j = int_{u_s}^{u_t} phi(u_s) phi'(u) / phi(u)^2 l_j(u) du

    The published third order takes the backward difference for D' beside a D'': measured, it is second order. The
    default here is the polynomial through three values, which is third for noise_scale="ode"; the law of the stochastic
    ones is of order 2 in the end, as with every method of this kind, if from a smaller error.

    Args:
        order: 1, 2 or 3.
        noise_scale: phi, a function of u, or "recommended", "ode" (phi = u, no noise) or "sde" (phi = u^2, tau = 1).
        as_published: order 3 with the backward difference.

    Raises:
        ValueError: on another order or name; by `tableau`, unless phi(u) / u grows with u.
    """

    power: ClassVar[float | None] = 2.0

    order: int = 3
    noise_scale: Literal["recommended", "ode", "sde"] | Callable[[Tensor], Tensor] = "recommended"
    as_published: bool = False

    def __post_init__(self) -> None:
        check_order(3, order=self.order)
        _check_published(self.order, self.as_published)
        if not callable(self.noise_scale):
            check_option(("recommended", "ode", "sde"), noise_scale=self.noise_scale)

    def _phi(self, u: Tensor) -> Tensor:
        if callable(self.noise_scale):
            return self.noise_scale(u)
        return {"recommended": recommended_noise_scale, "ode": lambda u: u, "sde": torch.square}[self.noise_scale](u)

    def tableau(self, grid: Grid) -> Tableau:
        _, sigma_t, alpha_s, sigma_s = grid.pairs()
        # Infinite where alpha = 0: phi / u then is at its limit, if it has one.
        u = (grid.sde.sigma(grid.times) / grid.sde.alpha(grid.times)).clamp(max=1e30)
        phi = self._phi(u)
        growth = phi / u
        phi_s, keep = phi[1:], torch.where(u[1:] > 0, growth[1:] / growth[:-1], 0.0)  # of the noise in x_t
        lost = 1 - keep**2
        lost = torch.where(lost.abs() < 1e-12, 0.0, lost)  # phi = u draws none
        if bool((lost < 0).any()) and not grid.increasing:
            raise ValueError("noise_scale: phi(u) / u must grow with u, or the noise would have a negative variance")

        def kernel(n: Tensor) -> Kernel:
            def at(half_log_snr: Tensor) -> Tensor:
                u = (-half_log_snr).exp()
                with torch.enable_grad():
                    leaf = u.detach().requires_grad_()
                    phi = self._phi(leaf)
                    (rate,) = torch.autograd.grad(phi.sum(), leaf)
                return phi_s[n, None] * rate / phi.detach() ** 2 * u  # du = -u dlambda

            return at

        a, c2 = keep * sigma_s / sigma_t, sigma_s**2 * lost
        steps = _Steps(grid, "x0", "sigma", a, alpha_s, c2, kernel, slope=torch.zeros_like(a))
        w = steps.weights(self.order)
        if self.order == 3 and self.as_published:
            n = (w[:, 2] != 0).nonzero().flatten()
            x = steps.chi[n[:, None] - torch.arange(3, device="cpu")] - steps.chi[n, None]
            first_moment = (w[n] * x).sum(1)
            # D' of the polynomial is the backward difference plus half the step before times D''.
            w[n] += (first_moment * x[:, 1] / 2)[:, None] * _second_derivative(x)
        return steps.tableau(w)
