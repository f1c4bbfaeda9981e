"""Twenty more wrong solvers, in the form of `mutants` and with its letters, none of which repeats one of those."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from mutants import (
    METHODS,
    VARIABLES,
    Make,
    Mutant,
    adding_to,
    entry,
    evaluation,
    instead,
    stages,
    variance,
    weights,
)
from torch import Tensor

from scoresde import SDE, Grid
from scoresde.solvers import (
    DDIM,
    ERSDE,
    DPMSolver,
    DPMSolverPP,
    ExponentialAB,
    ExponentialHeun,
    ExponentialSDE,
    Heun,
    Restart,
    ReverseDiffusion,
    RungeKutta,
    SASolver,
    Solver,
    TimeTravel,
    UniPC,
    composite,
    exponential,
    single_step,
)
from scoresde.solvers.multistep import Steps
from scoresde.tableau import Tableau
from scoresde.views import Affine, view_of_mean

__all__ = ["SECOND"]

SECOND: list[Mutant] = []
mutant = adding_to(SECOND)


# Of one evaluation a step.


def _less_of_the_mean(sde: SDE, t: Tensor, s: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    shrink = sde.alpha(t) * sde.sigma(s) / (sde.alpha(s) * sde.sigma(t))  # e^{-h}
    return a, sde.alpha(s) * (1 - shrink ** (1 - 0.5**2)), c


fault = "D enters with alpha_s (1 - e^{-(1 - tau^2) h}) for alpha_s (1 - e^{-(1 + tau^2) h})."
mutant("exponential-sde: 1 - tau^2", ExponentialSDE(0.5), 1, "sign", fault, evaluation(_less_of_the_mean))

wrong = evaluation(lambda sde, t, s, a, b, c: (a, b, c / 0.6**0.5))
fault = "The noise's variance is eta sigma_s^2 (1 - e^{-2h}), eta for eta^2; the direction is shortened as for eta^2."
mutant("ddim: eta for eta^2", DDIM(0.6), 1, "square", fault, wrong)


def _missing_square(sde: SDE, t: Tensor, s: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    A = sde.alpha(t) / sde.alpha(s)
    pull = (1 - A * (sde.sigma(s) / sde.sigma(t)) ** 2) / 2  # G^2 / (2 sigma_t^2)
    return 2 - A - pull, pull * sde.alpha(t), torch.zeros_like(A)


fault = "G^2 = sigma_t^2 - A sigma_s^2 for sigma_t^2 - A^2 sigma_s^2, A = alpha_t / alpha_s."
original = ReverseDiffusion(probability_flow=True)
mutant("reverse diffusion's ODE: A for A^2", original, 1, "square", fault, evaluation(_missing_square))


# Runge-Kutta, in all three kinds.


def _sum_in_flow(sde: SDE, t: Tensor) -> Affine:
    (signal, sigma), c = sde.scales(t), sde.data_scale
    return 1 / sigma, (sigma - signal) / (c * sigma)


def _half_of_the_drift(sde: SDE, t: Tensor) -> Affine:
    p, q = view_of_mean("velocity", sde, t)
    return p - sde.drift(t) / 2, q


def half_of_the_change(stage: int) -> Make:
    """With half of the weight of F_1 - F_0 in one stage."""

    def other(W: Tensor) -> Tensor:
        W = W.clone()
        W[:, stage, 1] /= 2
        W[:, stage, 0] += W[:, stage, 1]
        return W

    return stages(single_step, other)


def _told_the_start(solver: Solver, grid: Grid) -> Tableau:
    own = solver.tableau(grid)
    at = grid.times[own.step]
    return Tableau(grid, a=own.a, b=own.b, c=own.c, view=(own.p, own.q), t=at, step=own.step)


wrong = entry(VARIABLES, "flow", VARIABLES["flow"]._replace(F=_sum_in_flow))
mutant("rk4 in flow: eps + x0", RungeKutta("rk4", "flow"), 4, "sign", "F = eps + x0 for eps - x0.", wrong)

wrong = entry(VARIABLES, "t", VARIABLES["t"]._replace(F=_half_of_the_drift))
fault = "dx/dt = (f x - g^2 score) / 2 for f x - g^2 score / 2."
mutant("heun: f x halved too", Heun("t"), 2, "drift", fault, wrong)

wrong = entry(METHODS, "ralston", [[2 / 3], [3 / 4, 1 / 4]])
fault = "Weights (3/4, 1/4) for (1/4, 3/4)."
mutant("ralston: weights swapped", RungeKutta("ralston"), 2, "swapped", fault, wrong)

wrong = entry(METHODS, "rk4", [[1 / 2], [0.0, 1.0], [0.0, 0.0, 1.0], [1 / 6, 1 / 3, 1 / 3, 1 / 6]])
fault = "The third stage is y + h F_2, at the step's end, for y + h F_2 / 2."
mutant("rk4 in lambda: whole step", RungeKutta("rk4", "half_log_snr"), 4, "factor", fault, wrong)

fault = "The slope's term in the second stage, (eps_1 - eps_0) r_2 / r_1, lacks its r_2 / r_1 = 2."
mutant("dpm-solver-3: no r_2 / r_1", DPMSolver(3), 3, "factor", fault, half_of_the_change(1))

fault = "phi_2 is half as large: x_s = ... + alpha_s [(phi_1 - phi_2 / 2) D_t + phi_2 D_s / 2]."
mutant("exponential-heun: phi_2 / 2", ExponentialHeun(), 2, "factor", fault, half_of_the_change(1))

fault = "At the midpoint the denoiser is told t, the step's start, beside the midpoint's state."
mutant("dpm-solver++ 2S: time of the start", DPMSolver(2, "x0"), 2, "index", fault, _told_the_start)


# Multistep.


def _first_derivative_backwards(real: Any, self: Steps, order: int, *args: Any, **options: Any) -> Tensor:
    """With D1_0 - D1_1 = D'' (h_0 + h_1) / 2, of nodes at distances h_0 and h_1, D' is less by 2 (D'' h_0 / 2)."""
    w = real(self, order, *args, **options).clone()
    n = (w[:, 2] != 0).nonzero().flatten()
    x = self.chi[n[:, None] - torch.arange(3)] - self.chi[n, None]
    w[n] += ((w[n] * x).sum(1) * x[:, 1])[:, None] * exponential._second_derivative(x)
    return w


def _one_older(w: Tensor) -> Tensor:
    """The weights of D_{n+1}, D_n, D_{n-1}, ... for D_{n+1}, D_{n-1}, D_{n-2}, ..., where those are."""
    kept, shifted = torch.cat([w, 0 * w[:, :1]], 1), torch.cat([w[:, :1], 0 * w[:, :1], w[:, 1:]], 1)
    return torch.where((torch.arange(len(w)) >= w.shape[1] - 1)[:, None], shifted, kept)


def _scale_of_the_start(real: Any, grid: Grid, view: str, *args: Any) -> Steps:
    return replace(real(grid, view, *args), scale=VARIABLES["flow"].m(grid.sde, grid.times[:-1]))


def _noise_on_the_ode(solver: Any, grid: Grid) -> Tableau:
    own, ode = solver.tableau(grid), replace(solver, tau=0.0).tableau(grid)
    return Tableau(grid, a=ode.a, b=ode.b, c=own.c, view=(ode.p, ode.q), t=ode.t, step=ode.step)


wrong = instead(Steps, "weights", _first_derivative_backwards)
fault = "D' = D1_0 - r_0 / (r_0 + r_1) (D1_0 - D1_1) for D1_0 + r_0 / (r_0 + r_1) (D1_0 - D1_1)."
mutant("dpm-solver++ 3M: D' backwards", DPMSolverPP(3), 3, "sign", fault, wrong)

wrong = weights(lambda w: torch.cat([-w[:, :1], w[:, 1:2] + 2 * w[:, :1], w[:, 2:]], 1), corrector=True)
fault = "The corrector's term w (F_{n+1} - F_n) is subtracted."
mutant("unipc in flow: against the correction", UniPC(2, "flow"), 3, "sign", fault, wrong)

wrong = weights(_one_older, corrector=True)
fault = "The corrector reads eps_{n-1}, eps_{n-2}, eps_{n-3} for eps_n, eps_{n-1}, eps_{n-2}, beside eps_{n+1}."
mutant("unipc in eps: history one older", UniPC(3, "eps"), 4, "index", fault, wrong)

wrong = weights(lambda w: torch.cat([w[:, :1], w[:, 1:2] + w[:, 2:], 0 * w[:, 2:]], 1))
fault = "The oldest of the three values is F_{n-1} once more, for F_{n-2}."
mutant("adams in v: F_{n-1} twice", ExponentialAB(3, "v"), 3, "index", fault, wrong)

wrong = instead(exponential, "steps_in", _scale_of_the_start)
fault = "x_s = (m_s / m_t) x_t + m_t sum_j w_j F_j, m_t for m_s, m = alpha + sigma."
mutant("adams in flow: m of the start", ExponentialAB(3, "flow"), 3, "index", fault, wrong)

fault = "The noise of tau = 1 is added to the step of the ODE, whose drift takes none of it back."
adams = ExponentialAB(2, "flow", tau=1.0)
mutant("adams in flow: noise on the ODE", adams, 2, "extra noise", fault, _noise_on_the_ode)

wrong = variance("Steps", lambda c2, sigma_t, sigma_s: sigma_s**2 * (1 - (1 - c2 / sigma_s**2).sqrt()))
fault = "c^2 = sigma_s^2 (1 - r u_t / u_s) for sigma_s^2 (1 - (r u_t / u_s)^2), r = phi_s / phi_t."
mutant("er-sde-2: missing square", ERSDE(2), 2, "square", fault, wrong)

wrong = weights(lambda w: w[:, [1, 0, 2, 3]], corrector=True)
fault = "The corrector's weights of D_{n+1} and D_n are exchanged."
mutant("sa-solver: corrector's weights swapped", SASolver(), 2, "swapped", fault, wrong)


# Composite.

wrong = instead(
    composite, "forward_rows", lambda real, sde, t, s, c: (up := real(sde, t, s, c))._replace(c=up.c / sde.alpha(s))
)
fault = "The way up adds sqrt(u_s^2 - u_t^2) z for alpha_s sqrt(u_s^2 - u_t^2) z."
mutant("time travel: no alpha_s", TimeTravel(jump=2, repeats=2), 1, "factor", fault, wrong)

wrong = instead(
    composite, "forward_rows", lambda real, sde, t, s, c: real(sde, t, s, c)._replace(a=sde.alpha(t) / sde.alpha(s))
)
fault = "The way up takes (alpha_t / alpha_s) x_t for (alpha_s / alpha_t) x_t (the same where alpha is constant)."
mutant("restart: alpha_t / alpha_s", Restart([(65, 1, 1.0, 2.0)]), 2, "swapped", fault, wrong)
