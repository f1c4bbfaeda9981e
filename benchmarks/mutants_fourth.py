"""A fourth set of twenty wrong solvers, in the form of `mutants` and with its letters, none of which repeats one of the
other three sets: four each of a sign, a factor, an index, a square or root that is missing, and two things exchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from mutants import VARIABLES, Make, Mutant, adding_to, entry, evaluation, instead, stages, weights
from torch import Tensor

from scoresde import SDE, Grid
from scoresde.solvers import (
    DDPM,
    DEIS,
    ERSDE,
    DPMSolver,
    DPMSolverPP,
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
    runge_kutta,
    single_step,
)
from scoresde.solvers.composite import Move
from scoresde.solvers.multistep import Steps
from scoresde.solvers.rows import Rows, stage_rows
from scoresde.tableau import Tableau
from scoresde.views import Affine

__all__ = ["FOURTH"]

FOURTH: list[Mutant] = []
mutant = adding_to(FOURTH)


# Of one evaluation a step.


def _grown(sde: SDE, t: Tensor, s: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (sde.sigma(s) / sde.sigma(t)) ** 2 / a, b, c


def _no_root(sde: SDE, t: Tensor, s: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    A = sde.alpha(t) / sde.alpha(s)
    return a + A - A**2, b, c


def _a_step_short(real: Any, self: TimeTravel, grid: Grid) -> list[Move]:
    t = grid.times.tolist()
    return [move._replace(s=t[t.index(move.s) + 1]) if move.s > move.t else move for move in real(self, grid)]


fault = "x_t enters with (sigma_s / sigma_t) e^{tau^2 h} for (sigma_s / sigma_t) e^{-tau^2 h}."
mutant("exponential-sde: e^{+ tau^2 h}", ExponentialSDE(0.5), 1, "sign", fault, evaluation(_grown))

wrong = instead(exponential, "Steps", lambda real, *args, **options: _unscaled(real(*args, **options)))
fault = "D enters with 1 - r for alpha_s (1 - r), as in y = x / alpha (the same where alpha = 1)."
mutant("er-sde-1: no alpha_s", ERSDE(1), 1, "factor", fault, wrong)

fault = "The way up ends a step too low: it adds the noise of t_{i+1}, and the way down starts from t_i."
mutant(
    "time travel: a step short",
    TimeTravel(jump=3, repeats=2),
    1,
    "index",
    fault,
    instead(TimeTravel, "moves", _a_step_short),
)

fault = "x_s = (2 - A^2) x_t + ... for (2 - A) x_t + ..., on VP 1 + beta for 2 - sqrt(1 - beta)."
mutant("reverse diffusion: missing root", ReverseDiffusion(), 1, "square", fault, evaluation(_no_root))

wrong = evaluation(lambda sde, t, s, a, b, c: (b, a, c))
fault = "The posterior mean's weights of x_t and D are exchanged."
mutant("ddpm: weights of x_t and D", DDPM(), 1, "swapped", fault, wrong)


# Runge-Kutta, in all three kinds.


def with_entries(wrong: Callable[[Tensor], dict[tuple[int, int], Tensor]]) -> Callable[[Tensor], Tensor]:
    """The weights W, (M, S, S), with others in some of their entries."""

    def other(W: Tensor) -> Tensor:
        new = W.clone()
        for (row, column), value in wrong(W).items():
            new[:, row, column] = value
        return new

    return other


def _last_at_the_midpoint(real: Any, t: Tensor, m: Tensor, p: Tensor, q: Tensor, W: Tensor) -> Rows:
    return real(*(torch.cat([x[:, :3], x[:, 2:3], x[:, 4:]], 1) for x in (t, m, p, q)), W)


def _without_h(real: Any, sde: SDE, t: Tensor, s: Tensor, *args: Any) -> Rows:
    h = sde.half_log_snr(s) - sde.half_log_snr(t)
    less = with_entries(lambda W: {(1, 0): W[:, 1, 0] + W[:, 1, 1] * (1 - 1 / h), (1, 1): W[:, 1, 1] / h})
    with patch.object(single_step, "stage_rows", lambda t, m, p, q, W: stage_rows(t, m, p, q, less(W))):
        return real(sde, t, s, *args)


def _sigma_eps_less_alpha_x0(sde: SDE, t: Tensor) -> Affine:
    r = sde.radius(t)
    return 1 / r, -2 * sde.alpha(t) / r  # sigma eps = x - alpha D


wrong = stages(runge_kutta, with_entries(lambda W: {(1, 0): -W[:, 1, 0]}))
fault = "The third stage is y + h (F_1 + 2 F_2) for y + h (-F_1 + 2 F_2)."
mutant("kutta3 in flow: + F_1", RungeKutta("kutta3", "flow"), 3, "sign", fault, wrong)

wrong = stages(single_step, with_entries(lambda W: {(1, 0): W[:, 1, 0] + 2 * W[:, 1, 1], (1, 1): -W[:, 1, 1]}))
fault = "The slope's term in the second stage, (eps_1 - eps_0) r_2 / r_1, has the other sign."
mutant("dpm-solver-3: second stage against the slope", DPMSolver(3), 3, "sign", fault, wrong)

wrong = stages(runge_kutta, lambda W: torch.cat([W[:, :1], 2 * W[:, 1:]], 1))
mutant("heun: sum of the slopes", Heun(), 2, "factor", "y + h (F_1 + F_2) for y + h (F_1 + F_2) / 2.", wrong)

wrong = stages(single_step, with_entries(lambda W: {(1, 0): W[:, 1, 1] / 2, (1, 1): W[:, 1, 1] / 2}))
fault = "The result takes D_t + (D_m - D_t) / 2, an average as in Heun's method, for D_t + (D_m - D_t)."
mutant("dpm-solver++ 2S: average of D", DPMSolver(2, "x0"), 2, "factor", fault, wrong)

wrong = instead(runge_kutta, "stage_rows", _last_at_the_midpoint)
fault = "The fourth stage is taken to be at t + h / 2 for t + h: c = (0, 1/2, 1/2, 1/2)."
mutant("rk4: fourth stage at the midpoint", RungeKutta("rk4"), 4, "index", fault, wrong)

wrong = instead(single_step, "exponential_rows", _without_h)
fault = "The slope (eps_s - eps_t) / h has h phi_2 for h^2 phi_2, phi_2 of h as in exponential integrators."
mutant("exponential-heun in eps: h for h^2", ExponentialHeun("eps"), 2, "square", fault, wrong)

wrong = instead(
    composite, "forward_rows", lambda real, sde, t, s, c: (up := real(sde, t, s, c))._replace(c=up.c**2 / sde.alpha(s))
)
fault = "The way up adds alpha_s (u_max^2 - u_min^2) z for alpha_s sqrt(u_max^2 - u_min^2) z."
mutant("restart: missing root", Restart([(65, 1, 1.0, 2.0)]), 2, "square", fault, wrong)

wrong = stages(single_step, with_entries(lambda W: {(1, 0): W[:, 1, 1], (1, 1): W[:, 1, 0]}))
fault = "The second stage's weights of D_0 and D_1 are exchanged."
mutant("dpm-solver++ 3S: D_0 and D_1", DPMSolver(3, "x0"), 3, "swapped", fault, wrong)

wrong = entry(VARIABLES, "angle", VARIABLES["angle"]._replace(F=_sigma_eps_less_alpha_x0))
fault = "v = sigma eps - alpha x0 for alpha eps - sigma x0."
mutant("kutta3 in the angle: alpha and sigma", RungeKutta("kutta3", "angle"), 3, "swapped", fault, wrong)


# Multistep.


def second_difference(change: Callable[[Tensor, Tensor], Tensor]) -> Make:
    """With change(int x, int x^2) more in the weight of D'', which is int x^2 / 2, x = chi - chi_n."""

    def other(real: Any, self: Steps, order: int, *args: Any, **options: Any) -> Tensor:
        w = real(self, order, *args, **options).clone()
        n = (w[:, 2] != 0).nonzero().flatten()
        x = self.chi[n[:, None] - torch.arange(3)] - self.chi[n, None]
        more = change((w[n] * x).sum(1), (w[n] * x**2).sum(1))
        w[n] += more[:, None] * exponential._second_derivative(x)
        return w

    return instead(Steps, "weights", other)


def of_the_steps(wrong: Callable[[Steps], Steps]) -> Make:
    """With wrong(steps) for the `Steps` that `exponential` gets from `steps_in`."""
    return instead(exponential, "steps_in", lambda real, *args, **options: wrong(real(*args, **options)))


def _unscaled(steps: Steps) -> Steps:
    return replace(steps, scale=torch.ones_like(steps.scale))


def _no_decay(steps: Steps) -> Steps:
    _, sigma_t, _, sigma_s = steps.grid.pairs()
    return replace(steps, a=sigma_s / sigma_t)


def _noise_of_alpha(steps: Steps) -> Steps:
    _, _, alpha_s, sigma_s = steps.grid.pairs()
    return replace(steps, c2=torch.where(sigma_s > 0, steps.c2 * (alpha_s / sigma_s) ** 2, 0.0))


def _of_the_step_before(w: Tensor) -> Tensor:
    before = torch.cat([w[:1], w[:-1]])
    return torch.where((before != 0).any(1, keepdim=True), before, w)


def _told_the_end(solver: Solver, grid: Grid) -> Tableau:
    own = solver.tableau(grid)
    end = grid.times[own.step + 1]
    at = torch.where(end > 0, end, own.t)
    return Tableau(grid, a=own.a, b=own.b, c=own.c, view=(own.p, own.q), t=at, step=own.step)


fault = "The term of D'' is subtracted."
mutant("er-sde-3: - D''", ERSDE(3), 2, "sign", fault, second_difference(lambda x, x2: -x2))

fault = "x_t enters with sigma_s / sigma_t, as in the ODE, for (sigma_s / sigma_t) e^{-tau^2 h}."
mutant("sa-solver: no e^{-tau^2 h}", SASolver(tau=0.5), 2, "factor", fault, of_the_steps(_no_decay))

fault = "The denoiser is told t_{n+1} beside x_n, but for the last step's, where that is 0."
mutant("unipc: time of the step's end", UniPC(2), 3, "index", fault, _told_the_end)

fault = "A step takes the weights that were computed for the step before it, the first its own."
mutant("deis in sigma: weights a step late", DEIS(3, "sigma"), 3, "index", fault, weights(_of_the_step_before))

fault = "D'' enters with x / 2 for x^2 / 2 under the integral, x = lambda - lambda_n."
wrong = second_difference(lambda x, x2: (x - x2) / 2)
mutant("dpm-solver++ 3M: missing square", DPMSolverPP(3), 3, "square", fault, wrong)

fault = "The noise is alpha_s sqrt(1 - e^{-2h}) z for sigma_s sqrt(1 - e^{-2h}) z."
original = DPMSolverPP(2, stochastic=True)
mutant("sde-dpm-solver++ 2M: alpha for sigma", original, 2, "swapped", fault, of_the_steps(_noise_of_alpha))
