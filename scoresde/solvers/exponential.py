"""The exponential multistep methods by their names: which values, view and variable each takes.

    ExponentialAB    the polynomial through the last values, in any view and variable
    DPMSolverPP      x0 in lambda, 2M and 3M (Lu et al., 2022b)
    Adams            the recommended one: flow in softplus, of an order that rises with the number of steps
    DEIS, IPNDM      eps in t or sigma (Zhang and Chen, 2023; Liu et al., 2022)
    UniPC            with a corrector of one order more (Zhao et al., 2023)
    SASolver, ERSDE  with noise (Xue et al., 2023; Cui et al., 2023)

What they share, steps, weights and the table, is `scoresde.solvers.multistep`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from scoresde.checks import check_nonnegative, check_option, check_order
from scoresde.grid import Grid
from scoresde.sde import SDE
from scoresde.solvers.multistep import (
    CHI,
    CURVES,
    LANDINGS,
    Kernel,
    Landing,
    Multistep,
    Rule,
    Steps,
    Variable,
    View,
    steps_in,
)
from scoresde.tableau import Tableau

__all__ = ["DEIS", "ERSDE", "IPNDM", "Adams", "DPMSolverPP", "ExponentialAB", "SASolver", "UniPC"]


def _check_published(order: int, as_published: bool) -> None:
    if as_published and order != 3:
        raise ValueError(f"as_published is a variant of order 3, not of order {order}")


@dataclass(frozen=True)
class ExponentialAB(Multistep):
    """Exponential Adams-Bashforth: the polynomial through the last `order` values of F, integrated exactly. In x0 and
    lambda it is UniP (Zhao et al., 2023), in eps and t DEIS-tAB (Zhang and Chen, 2023), in v and flow plain
    Adams-Bashforth on a curve without a linear part.

    Args:
        order: 1 to 4.
        view: "x0", "eps", "v" or "flow".
        variable: of interpolation, "half_log_snr" (the default in x0 and eps), "sigma" for sigma / alpha, "t", "angle"
            (the default in v), "flow" for sigma / (alpha + sigma) (the default in flow) or "softplus".
        tau: noise level, 0 for the ODE. Outside x0 c^2 exceeds sigma_s^2 on long steps (in eps where h > 0.35), so that
            it wants 20 steps or more.
        lower_final: lower orders for the last steps, as many values as there are steps left.
        landing: the step to sigma = 0: "denoise", which is D, of first order, or "polynomial", through the last values
            as in other steps (in sigma / alpha where the variable is infinite there). It keeps the order, but
            overshoots on a few long steps and where the data have detail below the last sigma, the more in x0. With
            noise, in views other than x0, it is D.

    Raises:
        ValueError: on another order, view, variable or landing, or a tau that is negative.
    """

    order: int = 3
    view: View = "x0"
    variable: Variable | None = None
    tau: float = 0.0
    lower_final: bool = False
    landing: Landing = "denoise"

    def __post_init__(self) -> None:
        check_order(4, order=self.order)
        check_option(("x0", "eps", *CURVES), view=self.view)
        check_option((None, *CHI), variable=self.variable)
        check_option(LANDINGS, landing=self.landing)
        check_nonnegative(tau=self.tau)

    def tableau(self, grid: Grid) -> Tableau:
        steps = steps_in(grid, self.view, self.variable, self.tau, self.landing)
        return steps.tableau(steps.weights(self.order, lower_final=self.lower_final))


@dataclass(frozen=True)
class DPMSolverPP(Multistep):
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
        landing: on sigma = 0, as of `ExponentialAB`.

    Raises:
        ValueError: on another order, rule, view or landing, or as_published without order 3.
    """

    order: int = 2
    stochastic: bool = False
    rule: Literal["midpoint", "exact"] = "midpoint"
    as_published: bool = False
    view: Literal["x0", "eps"] = "x0"
    lower_final: bool = False
    landing: Landing = "denoise"

    def __post_init__(self) -> None:
        check_order(3, order=self.order)
        check_option(("midpoint", "exact"), rule=self.rule)
        check_option(("x0", "eps"), view=self.view)
        check_option(LANDINGS, landing=self.landing)
        _check_published(self.order, self.as_published)

    def tableau(self, grid: Grid) -> Tableau:
        steps = steps_in(grid, self.view, tau=float(self.stochastic), landing=self.landing)
        rule: Rule = "B2" if self.rule == "midpoint" else "exact"
        w = steps.weights(self.order, rule=rule, lower_final=self.lower_final)
        if self.order == 3 and self.as_published:
            w = _without_half_of_the_second_difference(steps, w)
        return steps.tableau(w)


def _without_half_of_the_second_difference(steps: Steps, w: Tensor) -> Tensor:
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
class DEIS(Multistep):
    """Diffusion exponential integrator sampler (Zhang and Chen, 2023), the view eps: tAB and rhoAB.

    What diffusers calls DEIS, "logrho", is neither: the polynomial is one in log(sigma / alpha), which is the multistep
    DPM-Solver in eps. Its scheduler is DEIS(2, "half_log_snr", lower_final=steps < 15) on a grid that ends at the
    chain's first node, with no step to t = 0: `Grid.strided(chain, steps, like="diffusers-multistep", end=1)`. Left
    out, each of these three is a difference of 1e-2 of the data or more, and the lower orders of their whole scale.

    Args:
        order: number of values, 1 to 4: the paper's tAB-k is order k + 1.
        variable: of interpolation, "t" (tAB, on the paper's quadratic grid), "sigma" for sigma / alpha (rhoAB) or
            "half_log_snr" (that of diffusers).
        lower_final: lower orders for the last steps, as many values as there are steps left.

    Raises:
        ValueError: on another order or variable.
    """

    order: int = 3
    variable: Literal["t", "sigma", "half_log_snr"] = "t"
    lower_final: bool = False

    def __post_init__(self) -> None:
        check_order(4, order=self.order)
        check_option(("t", "sigma", "half_log_snr"), variable=self.variable)

    def tableau(self, grid: Grid) -> Tableau:
        return ExponentialAB(self.order, "eps", self.variable, lower_final=self.lower_final).tableau(grid)


@dataclass(frozen=True)
class IPNDM(Multistep):
    """Improved pseudo-numerical method (Liu et al., 2022; Zhang and Chen, 2023): DDIM's step with eps replaced by the
    Adams-Bashforth combination of equal steps, whatever the steps are. Its order shows only on steps that are equal in
    sigma / alpha, and is two where the ratio of neighbouring steps tends to one; at few evaluations it is often good.

    Args:
        order: 1 to 4.

    Raises:
        ValueError: on another order.
    """

    order: int = 4

    def __post_init__(self) -> None:
        check_order(4, order=self.order)

    def tableau(self, grid: Grid) -> Tableau:
        steps = steps_in(grid, "eps")
        adams = {1: [1.0], 2: [3 / 2, -1 / 2], 3: [23 / 12, -16 / 12, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}
        table = torch.tensor([w + [0.0] * (4 - len(w)) for w in adams.values()], dtype=torch.float64, device="cpu")
        values = torch.cumsum(steps.regular, 0).clamp(1, self.order)
        total = steps.weights(1)
        return steps.tableau(total * table[values - 1][:, : self.order])


@dataclass(frozen=True)
class UniPC(Multistep):
    """UniPC (Zhao et al., 2023): the predictor UniP-p and the corrector UniC-p, which adds the newest value and one
    order, at one evaluation a step. There is no corrector on the last step.

    Args:
        order: p, 1 to 4.
        view: "x0" or "eps", the paper's; "v" or "flow", Adams-Bashforth-Moulton along the curves of `ExponentialAB`.
        rule: the paper's B(h), which matters only for two values (UniP-2 and UniC-1, where it takes rho = 1/2): "B2",
            e^h - 1, "B1", h, or "exact", the exact weight.
        corrector: False for UniP alone.
        lower_final: lower orders for the last steps, as the official code has it.
        landing: on sigma = 0, as of `ExponentialAB`.
        variable: of interpolation, as of `ExponentialAB`; by default the view's own. Order 3 in v and half_log_snr is
            the default of `log_prob`.

    Raises:
        ValueError: on another order, view, rule, landing or variable.
    """

    order: int = 3
    view: View = "x0"
    rule: Rule = "B2"
    corrector: bool = True
    lower_final: bool = False
    landing: Landing = "denoise"
    variable: Variable | None = None

    def __post_init__(self) -> None:
        check_order(4, order=self.order)
        check_option(("x0", "eps", *CURVES), view=self.view)
        check_option(("exact", "B1", "B2"), rule=self.rule)
        check_option(LANDINGS, landing=self.landing)
        check_option((None, *CHI), variable=self.variable)

    def tableau(self, grid: Grid) -> Tableau:
        steps = steps_in(grid, self.view, self.variable, landing=self.landing)
        predictor = steps.weights(self.order, False, self.rule, self.lower_final)
        corrector = steps.weights(self.order + 1, True, self.rule, self.lower_final) if self.corrector else None
        return steps.tableau(predictor, corrector)


@dataclass(frozen=True)
class Adams(Multistep):
    """The recommended solver of the ODE: Adams' predictor and corrector (as of `UniPC`) along the straight line of flow
    matching, whose F = eps - x_0 / c changes little where data are near a surface. F is interpolated in softplus: in
    -lambda at noise, where D changes with every octave of it and a polynomial in the line's own variable overshoots,
    and in sigma / alpha at the data, where the landing on sigma = 0 is then a step like the others. With fewer than 8
    steps it is D that is interpolated.

    On exact problems and on networks it is the best of the solvers here, or near it, at 5 to 100 evaluations
    (measured: benchmarks/results/users_view).

    Args:
        order: of the predictor, 1 to 4, the corrector having one more; by default it rises with the number of steps: 2
            below 10, 3 below 15, 4 from there on.
        landing: on sigma = 0, as of `ExponentialAB`.

    Raises:
        ValueError: on another order or landing.
    """

    power: ClassVar[float | None] = 2.5

    order: int | None = None
    landing: Landing = "polynomial"

    def __post_init__(self) -> None:
        if self.order is not None:
            check_order(4, order=self.order)
        check_option(LANDINGS, landing=self.landing)

    def on(self, steps: int) -> UniPC:
        """What it is with that number of steps."""
        order = self.order or (2 if steps < 10 else 3 if steps < 15 else 4)
        return UniPC(order, "flow" if steps >= 8 else "x0", "exact", variable="softplus", landing=self.landing)

    def tableau(self, grid: Grid) -> Tableau:
        return self.on(grid.steps).tableau(grid)


@dataclass(frozen=True)
class SASolver(Multistep):
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
        steps, final = steps_in(grid, tau=tau), self.lower_final
        corrector = steps.weights(self.corrector, new=True, lower_final=final) if self.corrector else None
        return steps.tableau(steps.weights(self.predictor, lower_final=final), corrector)


def recommended_noise_scale(u: Tensor) -> Tensor:
    """phi(u) = u (e^{u^0.3} + 10), the choice of the ER-SDE paper (Cui et al., 2023)."""
    return u * ((u**0.3).exp() + 10)


@dataclass(frozen=True)
class ERSDE(Multistep):
    """Extended reverse-time SDE solver (Cui et al., 2023), of a noise scale phi(u), u = sigma / alpha: the view x0
    interpolated in u, with r = phi(u_s) / phi(u_t),

        x_s = (alpha_s / alpha_t) r x_t + alpha_s sum_j w_j D_j + alpha_s sqrt(u_s^2 - r^2 u_t^2) z
        w_j = int_{u_s}^{u_t} phi(u_s) phi'(u) / phi(u)^2 l_j(u) du

    The published third order takes the backward difference for D' beside a D'': measured, it is second order. The
    default here is the polynomial through three values, which is third for noise_scale="ode"; the law of the stochastic
    ones is of order 2 in the end, as with every method of this kind, if from a smaller error.

    Args:
        order: 1, 2 or 3.
        noise_scale: phi, a function of u, or "ode" (phi = u, no noise), "sde" (phi = u^2, tau = 1) or "recommended",
            the paper's u (e^{u^0.3} + 10) with u in units of the SDE's `data_scale`.
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

    def _phi(self, sde: SDE, u: Tensor) -> Tensor:
        if callable(self.noise_scale):
            return self.noise_scale(u)
        if self.noise_scale == "recommended":
            return recommended_noise_scale(u / sde.data_scale)
        return u if self.noise_scale == "ode" else u**2

    def tableau(self, grid: Grid) -> Tableau:
        _, sigma_t, alpha_s, sigma_s = grid.pairs()
        # Infinite where alpha = 0: phi / u then is at its limit, if it has one.
        u = (grid.sde.sigma(grid.times) / grid.sde.alpha(grid.times)).clamp(max=1e30)
        phi = self._phi(grid.sde, u)
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
                    phi = self._phi(grid.sde, leaf)
                    (rate,) = torch.autograd.grad(phi.sum(), leaf)
                return phi_s[n, None] * rate / phi.detach() ** 2 * u  # du = -u dlambda

            return at

        a, c2 = keep * sigma_s / sigma_t, sigma_s**2 * lost
        steps = Steps(grid, "x0", "sigma", a, alpha_s, c2, kernel, slope=torch.zeros_like(a))
        w = steps.weights(self.order)
        if self.order == 3 and self.as_published:
            n = (w[:, 2] != 0).nonzero().flatten()
            x = steps.chi[n[:, None] - torch.arange(3, device="cpu")] - steps.chi[n, None]
            first_moment = (w[n] * x).sum(1)
            # D' of the polynomial is the backward difference plus half the step before times D''.
            w[n] += (first_moment * x[:, 1] / 2)[:, None] * _second_derivative(x)
        return steps.tableau(w)
