"""A third set of twenty wrong solvers, in the form of `mutants` and with its letters, none of which repeats one of the
other two sets: four each of a sign, a factor, an index, a square or root that is missing, and two things exchanged.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from mutants import (
    METHODS,
    VARIABLES,
    Mutant,
    adding_to,
    difference,
    entry,
    evaluation,
    instead,
    stages,
    weights,
)
from torch import Tensor
from torch.nn.functional import pad

from scoresde import SDE, Grid
from scoresde.solvers import (
    DDIM,
    DDPM,
    DEIS,
    ERSDE,
    IPNDM,
    DPMSolver,
    DPMSolverPP,
    EulerMaruyama,
    ExponentialAB,
    ExponentialSDE,
    Heun,
    RungeKutta,
    UniPC,
    exponential,
    runge_kutta,
    single_step,
)
from scoresde.solvers.multistep import Steps
from scoresde.solvers.rows import Rows
from scoresde.views import Affine

__all__ = ["THIRD"]

THIRD: list[Mutant] = []
mutant = adding_to(THIRD)


# Of one evaluation a step.


def _lengthened(sde: SDE, t: Tensor, s: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    a = (sde.sigma(s) ** 2 + c**2).sqrt() / sde.sigma(t)
    return a, sde.alpha(s) - a * sde.alpha(t), c


def _twice_the_decay(sde: SDE, t: Tensor, s: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return a * sde.alpha(t) * sde.sigma(s) / (sde.alpha(s) * sde.sigma(t)), b, c  # a e^{-h}


def _exchanged(sde: SDE, t: Tensor, s: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    a, c = c / sde.sigma(t), a * sde.sigma(t)
    return a, sde.alpha(s) - a * sde.alpha(t), c


fault = "x_s = alpha_s D + sqrt(sigma_s^2 + c^2) eps + c z for ... + sqrt(sigma_s^2 - c^2) eps + c z."
mutant("ddim: sigma_s^2 + c^2", DDIM(0.5), 1, "sign", fault, evaluation(_lengthened))

fault = "x_t enters with (sigma_s / sigma_t) e^{-2 tau^2 h} for (sigma_s / sigma_t) e^{-tau^2 h}, here at tau = 1."
mutant("exponential-sde: twice the decay", ExponentialSDE(), 1, "factor", fault, evaluation(_twice_the_decay))

wrong = evaluation(lambda sde, t, s, a, b, c: (a, b - sde.alpha(s) + sde.alpha(t), c))
fault = "x_s = alpha_t D + sigma_s eps for alpha_s D + sigma_s eps."
mutant("ddim: alpha_t D", DDIM(), 1, "index", fault, wrong)

wrong = evaluation(lambda sde, t, s, a, b, c: (a, b, c * (t - s).sqrt()))
mutant("euler-maruyama: h for sqrt(h)", EulerMaruyama(), 1, "square", "The noise is g h z for g sqrt(h) z.", wrong)

fault = "x_s = alpha_s D + c eps + sqrt(sigma_s^2 - c^2) z for alpha_s D + sqrt(sigma_s^2 - c^2) eps + c z."
mutant("ddpm: eps and z swapped", DDPM(), 1, "swapped", fault, evaluation(_exchanged))


# Runge-Kutta, in all three kinds.


def _g_for_its_square(sde: SDE, t: Tensor) -> Affine:
    pull = sde.diffusion(t) / (2 * sde.sigma(t) ** 2)
    return sde.drift(t) + pull, -pull * sde.alpha(t)


def _backwards_to_the_midpoint(W: Tensor) -> Tensor:
    return torch.cat([-W[:, :1], W[:, 1:]], 1)


def _slope_undivided(W: Tensor) -> Tensor:
    """The result's W_0 D_0 + W_2 D_2 with W_2 = phi_2 / r_2: phi_2 in its place."""
    W = W.clone()
    W[:, 2, 0] += W[:, 2, 2] / 3
    W[:, 2, 2] *= 2 / 3
    return W


def _ends_exchanged(W: Tensor) -> Tensor:
    return torch.cat([W[:, :2], W[:, 2:].flip(2)], 1)


def _sigma_of_the_midpoint(real: Any, sde: SDE, t: Tensor, s: Tensor, *args: Any) -> Rows:
    rows, b = (own := real(sde, t, s, *args)), own.b.clone()
    b[1::2, 0] *= sde.sigma(rows.t[1::2]) / sde.sigma(s)  # eps of the midpoint, in the result
    return rows._replace(b=b)


wrong = stages(runge_kutta, _backwards_to_the_midpoint)
fault = "The state at the midpoint is y - h F_0 / 2 for y + h F_0 / 2."
mutant("midpoint: backwards", RungeKutta("midpoint", "angle"), 2, "sign", fault, wrong)

wrong = entry(METHODS, "ralston", [[3 / 4], [1 / 4, 3 / 4]])
fault = "The second stage is at t + 3 h / 4 for t + 2 h / 3, beside the weights (1/4, 3/4)."
mutant("ralston: 3/4 for 2/3", RungeKutta("ralston"), 2, "factor", fault, wrong)

fault = "The slope's term in the result, phi_2 (D_2 - D_0) / r_2, lacks its 1 / r_2 = 3/2."
mutant("dpm-solver++ 3S: no 1 / r_2", DPMSolver(3, "x0"), 3, "factor", fault, stages(single_step, _slope_undivided))

wrong = entry(METHODS, "rk4", [[1 / 2], [0.0, 1 / 2], [0.0, 1.0], [1 / 6, 1 / 3, 1 / 3, 1 / 6]])
fault = "The fourth stage is y + h F_2 for y + h F_3, stages counted from 1."
mutant("rk4 in flow: F_2 for F_3", RungeKutta("rk4", "flow"), 4, "index", fault, wrong)

wrong = instead(single_step, "exponential_rows", _sigma_of_the_midpoint)
fault = "The result's eps has -sigma_m (e^h - 1) for -sigma_s (e^h - 1), m the midpoint that it was evaluated at."
mutant("dpm-solver-2: sigma of the midpoint", DPMSolver(2), 2, "index", fault, wrong)

wrong = entry(VARIABLES, "t", VARIABLES["t"]._replace(F=_g_for_its_square))
mutant("heun: g for g^2", Heun("t"), 2, "square", "dx/dt = f x - g score / 2 for f x - g^2 score / 2.", wrong)

wrong = entry(METHODS, "kutta3", [[1 / 2], [-1.0, 2.0], [2 / 3, 1 / 6, 1 / 6]])
fault = "Weights (4, 1, 1) / 6 for (1, 4, 1) / 6."
mutant("kutta3: weights swapped", RungeKutta("kutta3"), 3, "swapped", fault, wrong)

fault = "The result's weights of eps_0 and eps_2 are exchanged."
mutant("dpm-solver-3: eps_0 and eps_2", DPMSolver(3), 3, "swapped", fault, stages(single_step, _ends_exchanged))


# Multistep.


def _last_added(w: Tensor) -> Tensor:
    return torch.cat([w[:, :3], -w[:, 3:]], 1)


def _against_the_oldest(w: Tensor) -> Tensor:
    return torch.cat([w[:, :1] + 2 * w[:, 2:], w[:, 1:2], -w[:, 2:]], 1)


def _one_too_old(w: Tensor) -> Tensor:
    """The weights of F_n and F_{n-1} for F_n and F_{n-2}, where that is."""
    shifted = torch.cat([w[:, :1], 0 * w[:, :1], w[:, 1:]], 1)
    return torch.where((torch.arange(len(w)) >= 2)[:, None], shifted, pad(w, (0, 1)))


def _oldest_first(w: Tensor) -> Tensor:
    return torch.where(w[:, -1:] != 0, w.flip(1), w)


def _share_for_its_root(real: Any, grid: Grid, *args: Any, **options: Any) -> Steps:
    steps, (*_, sigma_s) = real(grid, *args, **options), grid.pairs()
    return replace(steps, c2=torch.where(sigma_s > 0, (steps.c2 / sigma_s) ** 2, 0.0))


def _k_for_its_square(real: Any, grid: Grid, *args: Any, **options: Any) -> Steps:
    steps, m2 = real(grid, *args, **options), grid.sde.radius(grid.times[1:]) ** 2
    return replace(steps, c2=m2 * (1 - (1 - steps.c2 / m2).sqrt()))


wrong = instead(Steps, "tableau", lambda real, self, w: real(self, _last_added(w)))
fault = "(55 eps_n - 59 eps_{n-1} + 37 eps_{n-2} + 9 eps_{n-3}) / 24 for ... - 9 eps_{n-3}."
mutant("ipndm-4: + 9", IPNDM(4), 2, "sign", fault, wrong)

fault = "The term rho_2 (D_{n-2} - D_n) / r_2 is subtracted."
unip = UniPC(3, corrector=False)
mutant("unip-3: against D_{n-2} - D_n", unip, 3, "sign", fault, weights(_against_the_oldest))

fault = "The term of D' = (D_n - D_{n-1}) / (u_n - u_{n-1}) is half as large."
mutant("er-sde-2: D' / 2", ERSDE(2), 2, "factor", fault, weights(difference(0.5)))

fault = "The second value is eps_{n-2}, with the weight of eps_{n-1}."
mutant("deis-2: eps_{n-2} for eps_{n-1}", DEIS(2), 2, "index", fault, weights(_one_too_old))

wrong = instead(exponential, "steps_in", _share_for_its_root)
fault = "The noise is sigma_s (1 - e^{-2h}) z for sigma_s sqrt(1 - e^{-2h}) z."
mutant("sde-dpm-solver++ 3M: missing root", DPMSolverPP(3, stochastic=True), 2, "square", fault, wrong)

wrong = instead(exponential, "steps_in", _k_for_its_square)
fault = "c^2 = m_s^2 (1 - k_t) for m_s^2 (1 - k_t^2)."
mutant("adams in v: k for k^2", ExponentialAB(2, "v", tau=1.0), 2, "square", fault, wrong)

fault = "The weights are in reverse order: that of F_n stands at F_{n-3}, and so on."
mutant("adams in flow: oldest first", ExponentialAB(4, "flow"), 4, "swapped", fault, weights(_oldest_first))
