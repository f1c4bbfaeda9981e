"""A fifth set of twenty wrong solvers, in the form of `mutants` and with its letters, none of which repeats one of the
other four sets: four each of a sign, a factor, an index, a square or root that is missing, and two things exchanged.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from mutants import METHODS, VARIABLES, Mutant, adding_to, entry, evaluation, instead, stages, weights
from torch import Tensor

from scoresde import SDE, Grid
from scoresde.solvers import (
    DDIM,
    DDPM,
    DEIS,
    ERSDE,
    DPMSolver,
    DPMSolverPP,
    EDMStochastic,
    ExponentialSDE,
    Heun,
    ReverseDiffusion,
    RungeKutta,
    SASolver,
    TimeTravel,
    UniPC,
    composite,
    exponential,
    runge_kutta,
    single_step,
)
from scoresde.solvers import weights as quadrature
from scoresde.solvers.multistep import Kernel, Steps
from scoresde.solvers.rows import forgotten
from scoresde.tableau import Tableau
from scoresde.views import Affine

__all__ = ["FIFTH"]

FIFTH: list[Mutant] = []
mutant = adding_to(FIFTH)


# Of one evaluation a step.


def _shrink(sde: SDE, t: Tensor, s: Tensor) -> Tensor:
    """e^{-h}."""
    return sde.alpha(t) * sde.sigma(s) / (sde.alpha(s) * sde.sigma(t))


def _minus_h(sde: SDE, t: Tensor, s: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    pull = sde.sigma(s) * (1 - _shrink(sde, t, s)) / sde.sigma(t)
    return sde.alpha(s) / sde.alpha(t) - pull, pull * sde.alpha(t), c


def _eps_outside(sde: SDE, t: Tensor, s: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    share = forgotten(sde, t, s)
    return sde.alpha(s) / sde.alpha(t) - share, share * sde.alpha(t), c


def _step_before(sde: SDE, t: Tensor, s: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    A, G = (torch.cat([x[:1], x[:-1]]) for x in (sde.alpha(t) / sde.alpha(s), c))
    pull = (G / sde.sigma(t)) ** 2
    return 2 - A - pull, pull * sde.alpha(t), G


def _exponents(sde: SDE, t: Tensor, s: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    shrink, tau2 = _shrink(sde, t, s), 0.5**2
    return a, sde.alpha(s) * (1 - shrink ** (2 * tau2)), sde.sigma(s) * (1 - shrink ** (1 + tau2)).sqrt()


fault = "x_s = (alpha_s / alpha_t) x_t - sigma_s (1 - e^{-h}) eps for ... - sigma_s (e^h - 1) eps."
mutant("ddim: e^{-h} for e^h", DDIM(), 1, "sign", fault, evaluation(_minus_h))

fault = (
    "x_s = x_t / A - (G^2 / sigma_t) eps + c z for (x_t - (G^2 / sigma_t) eps) / A + c z, A = alpha_t / alpha_s "
    "(the same where alpha is constant)."
)
mutant("ddpm: eps outside the brackets", DDPM("beta"), 1, "factor", fault, evaluation(_eps_outside))

fault = "A and G are those of the step before, beta_{i+1} for beta_i on VP; the first step has its own."
mutant("reverse diffusion: beta of the step before", ReverseDiffusion(), 1, "index", fault, evaluation(_step_before))

wrong = evaluation(lambda sde, t, s, a, b, c: (a, b - sde.alpha(s) + sde.alpha(s) ** 2, c))
fault = "x_s = alpha_s^2 D + ... for alpha_s D + ..., alpha bar for its root (the same where alpha = 1)."
mutant("ddim: alpha bar for its root", DDIM(0.5), 1, "square", fault, wrong)

fault = (
    "D enters with alpha_s (1 - e^{-2 tau^2 h}) and z with sigma_s sqrt(1 - e^{-(1 + tau^2) h}): each has the other's."
)
mutant("exponential-sde: exponents exchanged", ExponentialSDE(0.5), 1, "swapped", fault, evaluation(_exponents))


# Runge-Kutta, in all three kinds, and moves up.


def _against_the_slope(W: Tensor) -> Tensor:
    W = W.clone()
    W[:, 2, 0] += 2 * W[:, 2, 2]
    W[:, 2, 2] *= -1
    return W


def _eps_without_alpha(sde: SDE, t: Tensor) -> Affine:
    return 1 / sde.sigma(t), -1 / sde.sigma(t)


def _score_over_sigma(sde: SDE, t: Tensor) -> Affine:
    pull = sde.diffusion(t) ** 2 / (2 * sde.sigma(t))
    return sde.drift(t) + pull, -pull * sde.alpha(t)


def _rates_exchanged(sde: SDE, t: Tensor) -> Affine:
    (alpha_dot, sigma_dot), sigma = sde.rates(t), sde.sigma(t)
    return alpha_dot / sigma, sigma_dot - alpha_dot * sde.alpha(t) / sigma


def _length_from_t(solver: Any, grid: Grid) -> Tableau:
    start = {move.s: move.t for move in solver.moves(grid) if move.s > move.t}  # of t^, its t
    own = VARIABLES["sigma"]

    def psi(sde: SDE, t: Tensor) -> Tensor:
        return own.psi(sde, torch.tensor([start.get(x, x) for x in t.tolist()], dtype=t.dtype))

    with patch.dict(VARIABLES, {"sigma": own._replace(psi=psi)}):
        return solver.tableau(grid)


fault = "The slope's term in the result, phi_2 (D_2 - D_0) / r_2, has the other sign."
original = DPMSolver(3, "x0")
mutant("dpm-solver++ 3S: against the slope", original, 3, "sign", fault, stages(single_step, _against_the_slope))

wrong = entry(VARIABLES, "sigma", VARIABLES["sigma"]._replace(F=_eps_without_alpha))
fault = "eps = (x_t - D) / sigma_t for (x_t - alpha_t D) / sigma_t, as where alpha = 1."
mutant("ralston: no alpha_t", RungeKutta("ralston"), 2, "factor", fault, wrong)

wrong = entry(METHODS, "rk4", [[1 / 2], [0.0, 1 / 2], [0.0, 0.0, 1.0], [1 / 8, 3 / 8, 3 / 8, 1 / 8]])
fault = "Weights (1, 3, 3, 1) / 8, of the rule at thirds, for (1, 2, 2, 1) / 6."
mutant("rk4 in lambda: weights of the 3/8 rule", RungeKutta("rk4", "half_log_snr"), 4, "factor", fault, wrong)

wrong = instead(
    runge_kutta, "stage_rows", lambda real, t, m, p, q, W: real(t, m, *(x[:, :1].expand_as(x) for x in (p, q)), W)
)
fault = "The second eps is (x_s - alpha_t D_s) / sigma_t for (x_s - alpha_s D_s) / sigma_s."
mutant("heun: second eps over sigma_t", Heun(), 2, "index", fault, wrong)

fault = "The steps have the length u_s - u_t for u_s - u^, from the state at t^ and with its eps."
mutant("edm: length from t", EDMStochastic(), 2, "index", fault, _length_from_t)

wrong = entry(VARIABLES, "t", VARIABLES["t"]._replace(F=_score_over_sigma))
fault = "The score is (alpha D - x) / sigma for (alpha D - x) / sigma^2."
mutant("midpoint in t: sigma for sigma^2", RungeKutta("midpoint", "t"), 2, "square", fault, wrong)

wrong = instead(
    composite,
    "forward_rows",
    lambda real, sde, t, s, c: (up := real(sde, t, s, c))._replace(c=up.c / (1 + up.a).sqrt()),
)
fault = "The noise of the way up has, on VP, the variance 1 - A for 1 - A^2, A = alpha_s / alpha_t: 1 / (1 + A) of it."
mutant("time travel: A for A^2", TimeTravel(jump=2, repeats=3), 1, "square", fault, wrong)

wrong = entry(VARIABLES, "t", VARIABLES["t"]._replace(F=_rates_exchanged))
fault = "dx/dt = alpha' eps + sigma' x0 for alpha' x0 + sigma' eps."
mutant("kutta3 in t: alpha' and sigma'", RungeKutta("kutta3", "t"), 3, "swapped", fault, wrong)


# Multistep.


def _growing_noise(real: Any, grid: Grid, *args: Any, **options: Any) -> Steps:
    steps, (*_, sigma_s) = real(grid, *args, **options), grid.pairs()
    share = torch.where(sigma_s > 0, steps.c2 / sigma_s**2, 0.0)
    return replace(steps, c2=sigma_s**2 * share / (1 - share))


def _no_factorials(real: Any, self: Steps, order: int, new: bool = False, *args: Any, **options: Any) -> Tensor:
    """The moments sum_j w_j x_j^k, x = chi - chi_n, divided by k!."""
    w = real(self, order, new, *args, **options).clone()
    values = (w != 0).sum(1)
    for J in range(3, order + 1):
        n, k = (values == J).nonzero().flatten(), torch.arange(J)
        x = self.chi[n[:, None] + int(new) - k] - self.chi[n, None]
        powers = x[:, None] ** k[:, None]
        moments = (powers @ w[n, :J, None]) / (k.double() + 1).lgamma().exp()[:, None]
        w[n, :J] = torch.linalg.solve(powers, moments).squeeze(-1)
    return w


def _node_of_its_own(real: Any, nodes: Tensor, at: Tensor) -> Tensor:
    basis = real(nodes, at)
    if nodes.shape[1] == 3:
        basis[..., 1] *= (at - nodes[:, 1:2]) / (at - nodes[:, 2:])
    return basis


def _logarithm(real: Any, grid: Grid, *args: Any, **options: Any) -> Steps:
    steps, half_log_snr = real(grid, *args, **options), grid.sde.half_log_snr(grid.times[1:])

    def phi(half_log_snr: Tensor) -> Tensor:
        return exponential.recommended_noise_scale((-half_log_snr).exp() / grid.sde.data_scale)

    def kernel(n: Tensor) -> Kernel:
        right = steps.kernel(n)
        return lambda at: right(at) * phi(at) / phi(half_log_snr[n, None])

    return replace(steps, kernel=kernel)


def _ratio_inverted(real: Any, self: Steps, *args: Any, **options: Any) -> Tensor:
    w, h = real(self, *args, **options).clone(), self.chi.diff()
    less = torch.where(w[1:, 1] != 0, w[1:, 1] * (1 - (h[:-1] / h[1:]) ** 2), 0.0)
    w[1:, 0] += less
    w[1:, 1] -= less
    return w


def _ratios_exchanged(real: Any, self: Steps, *args: Any, **options: Any) -> Tensor:
    """With D1_0 - D1_1 = D'' (h_0 + h_1) / 2, of nodes at distances h_0 and h_1, D' is more by (h_1 - h_0) D'' / 2."""
    w = real(self, *args, **options).clone()
    n = (w[:, 2] != 0).nonzero().flatten()
    x = self.chi[n[:, None] - torch.arange(3)] - self.chi[n, None]
    more = (w[n] * x).sum(1) * (2 * x[:, 1] - x[:, 2]) / 2
    w[n] += more[:, None] * exponential._second_derivative(x)
    return w


wrong = weights(lambda w: torch.cat([w[:, :2], -w[:, 2:]], 1), corrector=True)
fault = "The corrector has (5 F_{n+1} + 8 F_n + F_{n-1}) / 12, on equal steps, for ... - F_{n-1}."
mutant("unipc in v: + F_{n-1}", UniPC(2, "v"), 3, "sign", fault, wrong)

fault = "The noise is sigma_s sqrt(e^{2 tau^2 h} - 1) z for sigma_s sqrt(1 - e^{-2 tau^2 h}) z."
wrong = instead(exponential, "steps_in", _growing_noise)
mutant("sa-solver: e^{2 tau^2 h} - 1", SASolver(tau=0.5), 2, "sign", fault, wrong)

fault = "The right side of the system for rho lacks its k!, in the predictor and the corrector."
mutant("unipc: no k!", UniPC(3), 4, "factor", fault, instead(Steps, "weights", _no_factorials))

fault = "The polynomial of eps_{n-1} has (t - t_n) (t - t_{n-1}) above its line for (t - t_n) (t - t_{n-2})."
mutant("deis: t_{n-1} for t_{n-2}", DEIS(3), 3, "index", fault, instead(quadrature, "lagrange_basis", _node_of_its_own))

fault = "D is integrated with phi' / phi for phi_s phi' / phi^2, so that log(phi_t / phi_s) stands for 1 - r."
mutant("er-sde-3: phi for phi^2", ERSDE(3), 2, "square", fault, instead(exponential, "Steps", _logarithm))

fault = "r = h_n / h_{n-1} for h_{n-1} / h_n in D_n + (D_n - D_{n-1}) / (2 r)."
mutant("dpm-solver++ 2M: r inverted", DPMSolverPP(2), 2, "swapped", fault, instead(Steps, "weights", _ratio_inverted))

fault = "D' = D1_0 + r_1 / (r_0 + r_1) (D1_0 - D1_1) for D1_0 + r_0 / (r_0 + r_1) (D1_0 - D1_1)."
original = DPMSolverPP(3, stochastic=True)
wrong = instead(Steps, "weights", _ratios_exchanged)
mutant("sde-dpm-solver++ 3M: r_0 and r_1", original, 2, "swapped", fault, wrong)
