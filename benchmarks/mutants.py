"""Wrong solvers: scoresde's own with one mistake each, as somebody might mistype or misunderstand a formula.

A mistake is made where the formula stands: a function or a table of coefficients of a solver's module is replaced while
`tableau(grid)` is computed (so not in two threads at once), and all that stands around it stays right. Letters mean
what they mean in the modules of `scoresde.solvers`: t -> s is the step, h its half log-SNR, u = sigma / alpha.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import pad

from scoresde import SDE, Grid
from scoresde.solvers import (
    DDIM,
    DDPM,
    DEIS,
    ERSDE,
    Ancestral,
    DPMSolver,
    DPMSolverPP,
    EDMStochastic,
    Euler,
    EulerMaruyama,
    ExponentialAB,
    Heun,
    Restart,
    ReverseDiffusion,
    RungeKutta,
    SASolver,
    Solver,
    UniPC,
    composite,
    exponential,
    first_order,
    multistep,
    runge_kutta,
    single_step,
)
from scoresde.solvers import weights as quadrature
from scoresde.solvers.multistep import Steps
from scoresde.solvers.rows import Rows, forgotten
from scoresde.tableau import Tableau

__all__ = ["MUTANTS", "Mutant"]

Make = Callable[[Solver, Grid], Tableau]


@dataclass(frozen=True)
class Mutant:
    """A wrong solver.

    Attributes:
        name: of the original, and of its mistake.
        solver: the wrong one.
        original: the right one.
        kind: of mistake: "sign", "factor", "index", "square", "swapped", "drift", "extra noise", "beta for beta-tilde",
            "last step skipped", "second difference halved", "float32 coefficients" or "rounded times".
        fault: what is wrong, in one sentence.
        order: of convergence that the original has, measured, and that the wrong one claims.
    """

    name: str
    solver: Solver
    original: Solver
    kind: str
    fault: str
    order: int


@dataclass(frozen=True)
class Wrong(Solver):
    """What `make` makes of the original, on the original's grids."""

    original: Solver
    make: Make = field(repr=False)

    def grid(self, sde: SDE, steps: int, *, end: float = 0.0) -> Grid:
        return self.original.grid(sde, steps, end=end)

    def tableau(self, grid: Grid) -> Tableau:
        return self.make(self.original, grid)


MUTANTS: list[Mutant] = []


def adding_to(mutants: list[Mutant]) -> Callable[[str, Solver, int, str, str, Make], None]:
    """A function (name, original, order, kind, fault, make) that adds a mutant."""

    def mutant(name: str, original: Solver, order: int, kind: str, fault: str, make: Make) -> None:
        mutants.append(Mutant(name, Wrong(original, make), original, kind, fault, order))

    return mutant


mutant = adding_to(MUTANTS)


# How a mistake is made.


def instead(owner: Any, name: str, wrong: Callable[..., Any]) -> Make:
    """With wrong(real, *args) in the place of a module's function or a class's method, real(*args)."""
    real = getattr(owner, name)

    def make(solver: Solver, grid: Grid) -> Tableau:
        with patch.object(owner, name, lambda *args, **options: wrong(real, *args, **options)):
            return solver.tableau(grid)

    return make


def entry(table: dict[Any, Any], key: Any, value: Any) -> Make:
    """With another entry in a module's table of coefficients."""

    def make(solver: Solver, grid: Grid) -> Tableau:
        with patch.dict(table, {key: value}):
            return solver.tableau(grid)

    return make


def rows(wrong: Callable[..., Rows]) -> Make:
    """With wrong(rows, sde, t, s) for the rows of a single-step solver's moves."""

    def make(solver: Any, grid: Grid) -> Tableau:
        ends = grid.sde, grid.times[:-1], grid.times[1:]
        return wrong(solver.rows(*ends), *ends).tableau(grid)

    return make


def evaluation(wrong: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Make:
    """With (a, b, c) = wrong(sde, t, s, a, b, c) of first-order steps; their two ends, sigma_s = 0 say, stay exact."""
    return instead(
        first_order, "one_evaluation", lambda real, sde, t, s, *abc: real(sde, t, s, *wrong(sde, t, s, *abc))
    )


def stages(module: Any, wrong: Callable[[Tensor], Tensor]) -> Make:
    """With the weights wrong(W), (M, S, S), of `stage_rows`."""
    return instead(module, "stage_rows", lambda real, t, m, p, q, W: real(t, m, p, q, wrong(W)))


def weights(wrong: Callable[[Tensor], Tensor], corrector: bool = False) -> Make:
    """With wrong(w) for the weights (N, K) of F_n, F_{n-1}, ... of a predictor; of F_{n+1}, F_n, ... of a corrector."""

    def other(real: Any, self: Steps, order: int, new: bool = False, *args: Any, **options: Any) -> Tensor:
        w = real(self, order, new, *args, **options)
        return wrong(w) if new == corrector else w

    return instead(Steps, "weights", other)


def variance(name: str, wrong: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Make:
    """With c2 = wrong(c2, sigma_t, sigma_s) in the `Steps` that `name` gives to `exponential`; 0 at sigma_s = 0."""

    def other(real: Any, *args: Any, **options: Any) -> Steps:
        steps = real(*args, **options)
        _, sigma_t, _, sigma_s = steps.grid.pairs()
        return replace(steps, c2=torch.where(sigma_s > 0, wrong(steps.c2, sigma_t, sigma_s), 0.0))

    return instead(exponential, name, other)


def told(label: Callable[[Tensor, SDE], Tensor]) -> Make:
    """The same table, whose denoiser is told label(t, sde) for t."""

    def make(solver: Solver, grid: Grid) -> Tableau:
        own = solver.tableau(grid)
        at = label(own.t, grid.sde)
        return Tableau(grid, a=own.a, b=own.b, c=own.c, view=(own.p, own.q), t=at, step=own.step)

    return make


def ending(a: float, b: float) -> Make:
    """All steps but the last, which is a x + b D."""

    def make(solver: Solver, grid: Grid) -> Tableau:
        own = solver.tableau(Grid(grid.sde, grid.times[:-1]))
        t, step = torch.cat([own.t, grid.times[-2:-1]]), torch.cat([own.step, own.step[-1:] + 1])
        columns = pad(torch.stack([own.p, own.q, own.a, own.c]), (0, 1))
        columns[:, -1] = torch.tensor([0.0, 1.0, a, 0.0])
        p, q, x, c = columns
        F = pad(own.b, (0, 0, 0, 1))
        F[-1, 0] = b
        return Tableau(grid, a=x, b=F, c=c, view=(p, q), t=t, step=step)

    return make


# Of one evaluation a step.

wrong = instead(first_order, "marginal_preserving", lambda real, *ends_c2: real(*ends_c2)._replace(c=ends_c2[-1]))
mutant("ddpm: variance for deviation", DDPM(), 1, "square", "The noise is c^2 z for c z: a root is missing.", wrong)

wrong = rows(lambda rows, sde, t, s: rows._replace(c=sde.sigma(t) * forgotten(sde, t, s).sqrt()))
fault = "c = sigma_t sqrt(1 - e^{-2h}) on the step to sigma_s = 0 too, where there is to be no noise."
mutant("ddpm: noise on the last step", DDPM("beta"), 1, "extra noise", fault, wrong)

wrong = evaluation(lambda sde, t, s, a, b, c: (a := sde.sigma(s) / sde.sigma(t), sde.alpha(s) - a * sde.alpha(t), c))
fault = "x_s = alpha_s D + sigma_s eps + c z: sigma_s for the sqrt(sigma_s^2 - c^2) that makes room for the noise."
mutant("ddim: direction not shortened", DDIM(0.5), 1, "extra noise", fault, wrong)

wrong = evaluation(lambda sde, t, s, a, b, c: (a, (1 - a) * sde.alpha(s), c))
fault = "eps = (x_t - alpha_s D) / sigma_t for (x_t - alpha_t D) / sigma_t (the same where alpha is constant)."
mutant("ddim: alpha of the wrong end", DDIM(), 1, "index", fault, wrong)

wrong = evaluation(lambda sde, t, s, a, b, c: (a + b / (2 * sde.alpha(t)), b / 2, c))
fault = "The drift is f x - g^2 score / 2, that of the probability flow, beside the noise of the reverse SDE."
mutant("euler-maruyama: half the score", EulerMaruyama(), 1, "drift", fault, wrong)

wrong = evaluation(lambda sde, t, s, a, b, c: (a, b, c / 2**0.5))
fault = "The noise is sqrt(u_t (u_t - u_s)) z, without the 2 under the root."
mutant("euler-maruyama in sigma: sqrt(2)", EulerMaruyama("sigma"), 1, "factor", fault, wrong)

wrong = evaluation(lambda sde, t, s, a, b, c: (a + 2 * (sde.alpha(t) / sde.alpha(s) - 1), b, c))
fault = (
    "x_s = A x_t + G^2 score + G z for (2 - A) x_t + ...: f x goes the wrong way (the same where alpha is constant)."
)
mutant("reverse diffusion: A for 2 - A", ReverseDiffusion(), 1, "sign", fault, wrong)

wrong = rows(lambda rows, sde, t, s: rows._replace(c=2**0.5 * rows.c))
fault = "z is drawn in the posterior's sample, and once more by the loop around it."
mutant("ancestral: noise drawn twice", Ancestral(), 1, "extra noise", fault, wrong)


# Runge-Kutta, in all three kinds.


def _whole_score(sde: SDE, t: Tensor) -> tuple[Tensor, Tensor]:
    pull = (sde.diffusion(t) / sde.sigma(t)) ** 2
    return sde.drift(t) + pull, -pull * sde.alpha(t)


METHODS, VARIABLES, DPM_SOLVER = runge_kutta.METHODS, runge_kutta.VARIABLES, single_step.DPM_SOLVER

wrong = entry(VARIABLES, "t", VARIABLES["t"]._replace(F=_whole_score))
mutant("euler: whole score", Euler("t"), 1, "drift", "dx/dt = f x - g^2 score, for f x - g^2 score / 2.", wrong)

wrong = stages(runge_kutta, lambda W: torch.cat([0 * W[:, :1], W[:, 1:]], 1))
fault = "The second eps is that of y_t at s: the state before Euler's step for the one after it."
mutant("heun: second evaluation before the step", Heun(), 2, "index", fault, wrong)

wrong = told(lambda t, sde: (1000 * t / sde.t_max).long().clamp(min=1) * sde.t_max / 1000)
fault = "The denoiser is told int(1000 t / t_max), at least 1, in thousandths of t_max, beside the coefficients of t."
mutant("heun: a thousand labels", Heun("t"), 2, "rounded times", fault, wrong)

wrong = entry(METHODS, "kutta3", [[1 / 2], [2.0, -1.0], [1 / 6, 2 / 3, 1 / 6]])
fault = "The third stage is y + h (2 F_1 - F_2) for y + h (-F_1 + 2 F_2)."
mutant("kutta3: third stage swapped", RungeKutta("kutta3"), 3, "swapped", fault, wrong)

wrong = entry(METHODS, "rk4", [[1 / 2], [0.0, 1 / 2], [0.0, 0.0, 1.0], [1 / 3, 1 / 6, 1 / 6, 1 / 3]])
mutant("rk4: weights swapped", RungeKutta("rk4"), 4, "swapped", "Weights (2, 1, 1, 2) / 6 for (1, 2, 2, 1) / 6.", wrong)

wrong = entry(METHODS, "rk4", [[1 / 2], [1 / 2, 0.0], [0.0, 0.0, 1.0], [1 / 6, 1 / 3, 1 / 3, 1 / 6]])
fault = "The third stage is y + h F_1 / 2 again, for y + h F_2 / 2."
mutant("rk4 in the angle: F_1 for F_2", RungeKutta("rk4", "angle"), 4, "index", fault, wrong)

wrong = stages(single_step, lambda W: torch.cat([2 * W[:, :1], W[:, 1:]], 1))
fault = "The coefficient of eps on the way to the midpoint is twice as large, for the step h in the place of h / 2."
mutant("dpm-solver-2: whole step to the midpoint", DPMSolver(2), 2, "factor", fault, wrong)

wrong = entry(DPM_SOLVER, 3, [(2 / 3, [0]), (1 / 3, [0, 1]), (1.0, [0, 2])])
fault = "r_1 = 2/3 and r_2 = 1/3 for r_1 = 1/3 and r_2 = 2/3."
mutant("dpm-solver-3: r_1 and r_2 swapped", DPMSolver(3), 3, "swapped", fault, wrong)

wrong = entry(DPM_SOLVER, 3, [(1 / 3, [0]), (2 / 3, [0, 1]), (1.0, [0, 1])])
fault = "The result takes the line through D_0 and D_1, the stage at r_1 h, for that through D_0 and D_2."
mutant("dpm-solver++ 3S: slope of the first stage", DPMSolver(3, "x0"), 3, "index", fault, wrong)


# Multistep.


def difference(factor: float) -> Callable[[Tensor], Tensor]:
    """The older value less the newer, times a factor."""
    return lambda w: torch.cat([w[:, :1] + (1 - factor) * w[:, 1:2], factor * w[:, 1:2], w[:, 2:]], 1)


def _last_two_exchanged(w: Tensor) -> Tensor:
    return torch.where(w[:, -1:] != 0, torch.cat([w[:, :-2], w[:, -2:].flip(1)], 1), w)


def _half_second_difference(real: Any, self: Steps, order: int, *args: Any, **options: Any) -> Tensor:
    """D'' x^2 / 4 for D'' x^2 / 2, x = chi - chi_n, in the polynomial through three values."""
    w, lag = real(self, order, *args, **options), torch.arange(3)
    n = (w[:, 2] != 0).nonzero().flatten()
    x = self.chi[n[:, None] - lag] - self.chi[n, None]
    w[n] -= (w[n] * x**2).sum(1, keepdim=True) / 4 * exponential._second_derivative(x)
    return w


def _nodes_of_the_ends(real: Any, self: Steps, *args: Any, **options: Any) -> Tensor:
    shifted = replace(self)
    shifted.__dict__["chi"] = torch.cat([self.chi[1:], self.chi[-1:]])
    return real(shifted, *args, **options)


def _phi_in_float32(real: Any, nodes: Tensor, start: Tensor, end: Tensor, *_: Any) -> Tensor:
    """int_0^1 h e^{-h (1 - r)} r^j dr, from 1 - (j / h) times the one before, and Vandermonde's system."""
    h, J = (end - start).float(), nodes.shape[1]
    moments = [1 - (-h).exp()]
    for j in range(1, J):
        moments.append(1 - j / h * moments[-1])
    r = (nodes - start[:, None]) / h[:, None]
    return torch.linalg.solve(r[:, None] ** torch.arange(J)[:, None], torch.stack(moments, 1).double())


def _powers_in_float32(real: Any, *args: Any) -> Tensor:
    """The Lagrange polynomials as sums of powers, whose coefficients come from Vandermonde's system."""

    def basis(nodes: Tensor, at: Tensor) -> Tensor:
        j = torch.arange(nodes.shape[1])
        return (at.float()[:, :, None] ** j @ torch.linalg.inv(nodes.float()[:, :, None] ** j)).double()

    with patch.object(quadrature, "lagrange_basis", basis):
        return real(*args)


fault = "D_n - (D_n - D_{n-1}) / (2 r) for D_n + (D_n - D_{n-1}) / (2 r)."
mutant("dpm-solver++ 2M: against the slope", DPMSolverPP(2), 2, "sign", fault, weights(difference(-1.0)))

fault = "The loop ends a step early, range(N - 1), and x at t_{N-1} is returned for that at t_N."
mutant("dpm-solver++ 2M: a step less", DPMSolverPP(2), 2, "last step skipped", fault, ending(1.0, 0.0))

fault = "The last step returns D whatever sigma_s is, right on a grid to sigma_s = 0 only."
mutant("deis in sigma: last step denoises", DEIS(2, "sigma"), 2, "last step skipped", fault, ending(0.0, 1.0))

fault = "eps_n + (eps_n - eps_{n-1}) / r for eps_n + (eps_n - eps_{n-1}) / (2 r)."
mutant("dpm-solver 2M: 1 / r", DPMSolverPP(2, view="eps"), 2, "factor", fault, weights(difference(2.0)))

wrong = instead(Steps, "weights", _half_second_difference)
fault = "D'' enters with half of its weight, as in the authors' code."
mutant("dpm-solver++ 3M: D'' / 2", DPMSolverPP(3), 3, "second difference halved", fault, wrong)
fault = "D'' by u enters with half of its weight."
mutant("er-sde-3: D'' / 2", ERSDE(3, "ode"), 3, "second difference halved", fault, wrong)

wrong = instead(multistep, "exponential_kernel", lambda real, k, lambda_s: real(torch.ones_like(k), lambda_s))
fault = "D enters with 1 - e^{-h} for 1 - e^{-2h}, beside x_t and z as the SDE has them."
mutant("sde-dpm-solver++ 2M: half the drift", DPMSolverPP(2, stochastic=True), 2, "drift", fault, wrong)

wrong = variance("steps_in", lambda c2, sigma_t, sigma_s: c2 * (sigma_t / sigma_s) ** 2)
fault = "c^2 = sigma_t^2 (1 - e^{-2h}) for sigma_s^2 (1 - e^{-2h})."
mutant("sde-dpm-solver++ 2M: beta", DPMSolverPP(2, stochastic=True), 2, "beta for beta-tilde", fault, wrong)

wrong = variance("Steps", lambda c2, sigma_t, sigma_s: c2 * (sigma_t / sigma_s) ** 2)
fault = "c^2 = sigma_t^2 (1 - (r u_t / u_s)^2) for sigma_s^2 (1 - (r u_t / u_s)^2), r = phi_s / phi_t."
mutant("er-sde-2: beta", ERSDE(2), 2, "beta for beta-tilde", fault, wrong)

wrong = instead(Steps, "weights", _nodes_of_the_ends)
fault = "The polynomial's nodes are t_{n+1-j} for t_{n-j}: an eps counts as that of its step's end."
mutant("deis: times of the ends", DEIS(3), 3, "index", fault, wrong)

wrong = instead(multistep, "interpolation_weights", _powers_in_float32)
fault = "The Lagrange polynomials are sums of powers of t with coefficients from Vandermonde's system, in float32."
mutant("deis: polynomials in float32", DEIS(3), 3, "float32 coefficients", fault, wrong)

wrong = instead(multistep, "interpolation_weights", _phi_in_float32)
fault = "The phi-functions of h, each from the one before by a division by h, are computed in float32."
mutant("unipc: phi in float32", UniPC(3), 4, "float32 coefficients", fault, wrong)

fault = "The denoiser is told t in bfloat16, its network's dtype; all coefficients are those of t."
mutant("unipc: half a time", UniPC(3), 4, "rounded times", fault, told(lambda t, sde: t.bfloat16().double()))

fault = "The predictor's weights of D_{n-1} and D_{n-2} are exchanged."
mutant("unipc: history reversed", UniPC(3), 4, "swapped", fault, weights(_last_two_exchanged))

wrong = weights(lambda w: torch.cat([2 * w[:, :1], w[:, 1:2] - w[:, :1], w[:, 2:]], 1), corrector=True)
fault = "The corrector's difference D_{n+1} - D_n has twice its weight."
mutant("unipc: double correction", UniPC(2), 3, "factor", fault, wrong)

wrong = instead(Steps, "tableau", lambda real, self, predictor, corrector=None: real(self, predictor))
fault = "The next step starts from the predicted x_n, and nobody reads the corrected one."
mutant("unipc: goes on from the prediction", UniPC(3), 4, "index", fault, wrong)

fault = "The weights of F_n and F_{n-1} are exchanged: -1/2 and 3/2 on equal steps."
mutant("adams in v: b_0 and b_1", ExponentialAB(2, "v"), 2, "swapped", fault, weights(_last_two_exchanged))

wrong = weights(lambda w: torch.cat([1.5 * w[:1], w[1:]]))
fault = "The first step takes 3/2 F_0 - 1/2 F_{-1} out of a history that begins as zeros."
mutant("adams in eps: empty history", ExponentialAB(2, "eps"), 2, "index", fault, wrong)

wrong = instead(multistep, "forgotten", lambda real, sde, t, s, tau=1.0: real(sde, t, s, tau / 2**0.5))
fault = "c^2 = sigma_s^2 (1 - e^{-tau^2 h}) for sigma_s^2 (1 - e^{-2 tau^2 h})."
mutant("sa-solver: e^{-h} in the noise", SASolver(), 2, "factor", fault, wrong)

wrong = instead(multistep, "exponential_kernel", lambda real, k, lambda_s: real(1 + (k - 1).sqrt(), lambda_s))
fault = "The kernel is k e^{k (lambda - lambda_s)} with k = 1 + tau for 1 + tau^2."
mutant("sa-solver: tau for tau^2", SASolver(tau=0.5), 2, "square", fault, wrong)


# Composite: moves up by the forward process, forward_rows(sde, t, s, scale), and down by a solver.


def _difference_of_levels(real: Any, sde: SDE, t: Tensor, s: Tensor, *scale: float) -> Rows:
    return real(sde, t, s, *scale)._replace(c=sde.sigma(s) - sde.alpha(s) / sde.alpha(t) * sde.sigma(t))


def _from_below(real: Any, self: EDMStochastic, grid: Grid) -> list[composite.Move]:
    t = grid.times.tolist()
    return [move._replace(t=t[move.step]) if move.s < move.t else move for move in real(self, grid)]


wrong = instead(composite, "forward_rows", _difference_of_levels)
mutant("edm: u^ - u", EDMStochastic(), 2, "square", "The churn is (u^ - u) z for sqrt(u^^2 - u^2) z.", wrong)

wrong = instead(EDMStochastic, "moves", _from_below)
fault = "The step after the churn is that from t, for t^, whose noise x now has."
mutant("edm: step from t", EDMStochastic(), 2, "index", fault, wrong)

wrong = instead(composite, "forward_rows", lambda real, sde, t, s, c: real(sde, t, s, c)._replace(c=sde.sigma(s)))
fault = "The way up adds u_max z for sqrt(u_max^2 - u_min^2) z, as if x had no noise yet."
mutant("restart: u_max z", Restart([(65, 1, 1.0, 2.0)]), 2, "extra noise", fault, wrong)
