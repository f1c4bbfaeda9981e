"""The papers' algorithms, transcribed literally, one step at a time: what every tableau must equal, and what a reader
of a paper finds again.

They take the denoiser, x_T, the times and the noise, and know nothing of tables, views or rows. All share one
convention: on a step to t = 0, where sigma = 0, the result is the denoiser's mean. `textbook_of` finds a solver's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from scoresde.denoiser import Denoiser
from scoresde.solvers.base import Solver
from scoresde.solvers.composite import EDMStochastic
from scoresde.solvers.exponential import DEIS, ERSDE, IPNDM, DPMSolverPP, ExponentialAB, SASolver, UniPC
from scoresde.solvers.first_order import DDIM, DDPM, EulerMaruyama, ExponentialSDE, ReverseDiffusion
from scoresde.solvers.runge_kutta import Euler, Heun, RungeKutta
from scoresde.solvers.single_step import DPMSolver, ExponentialHeun
from scoresde.textbook import corrected, first_order, multistep, stages

__all__ = ["Textbook", "textbook_of"]


class Textbook(NamedTuple):
    """A transcription, called as (denoiser, x, times, draw).

    Attributes:
        function, options: of it.
        noise: how it takes its noise: "none", "z" as a sequence of one for each step, or "draw" as a function that
            gives the next.
    """

    function: Callable[..., Tensor]
    options: Mapping[str, Any] = {}
    noise: Literal["none", "z", "draw"] = "none"

    def __call__(self, denoiser: Denoiser, x: Tensor, times: Tensor, draw: Callable[[int], Tensor]) -> Tensor:
        """The sample; draw(k) is the k-th noise, of step k where each step has one."""
        if self.noise == "none":
            return self.function(denoiser, x, times, **self.options)
        if self.noise == "z":
            return self.function(denoiser, x, times, [draw(i) for i in range(len(times) - 1)], **self.options)
        count = iter(range(10**9))
        return self.function(denoiser, x, times, lambda: draw(next(count)), **self.options)


def textbook_of(solver: Solver) -> Textbook | None:
    """The transcription of a solver with its options, or None: not all of their combinations are in a paper."""
    match solver:
        case DDPM(variance=variance):
            return Textbook(first_order.ddpm, {"variance": variance}, "z")
        case DDIM(eta=eta):
            return Textbook(first_order.ddim, {"eta": eta}, "z")
        case ExponentialSDE(tau=1.0):
            return Textbook(multistep.sde_dpm_solver_pp, {"order": 1}, "z")
        case EulerMaruyama(variable="t"):
            return Textbook(first_order.euler_maruyama, {}, "z")
        case EulerMaruyama():
            return Textbook(stages.euler_maruyama_sigma, {}, "draw")
        case ReverseDiffusion(probability_flow=False):
            return Textbook(first_order.reverse_diffusion, {}, "z")
        case Euler(variable="sigma"):
            return Textbook(first_order.heun_edm, {"order": 1})
        case Euler(variable="t"):
            return Textbook(first_order.euler_t)
        case Heun(variable="sigma"):
            return Textbook(first_order.heun_edm)
        case Heun(variable="t"):
            return Textbook(first_order.heun_t)
        case Heun(variable=variable):
            return Textbook(stages.runge_kutta, {"method": "heun", "variable": variable})
        case RungeKutta(method=method, variable=variable) if method != "euler":
            return Textbook(stages.runge_kutta, {"method": method, "variable": variable})
        case DPMSolver(order=order, view=view, fast=False, orders=None):
            single = stages.dpm_solver if view == "eps" or order == 1 else stages.dpm_solver_pp_single
            return Textbook(single, {"order": order})
        case ExponentialHeun(view=view):
            return Textbook(stages.exponential_heun, {"view": view})
        case EDMStochastic(S_churn=S_churn, S_min=S_min, S_max=S_max, S_noise=S_noise):
            churn = {"S_churn": S_churn, "S_min": S_min, "S_max": S_max, "S_noise": S_noise}
            return Textbook(stages.edm_stochastic, churn, "draw")
    return _of_several_steps(solver)


def _of_several_steps(solver: Solver) -> Textbook | None:
    if getattr(solver, "landing", "denoise") != "denoise":
        return None
    match solver:
        case ExponentialAB(order=order, view=("x0" | "eps" | "v") as view, variable=variable, tau=0.0):
            if solver.lower_final or variable == "flow":
                return None
            return Textbook(multistep.exponential_ab, {"order": order, "view": view, "variable": variable})
        case ExponentialAB(order=order, view="eps", variable=None, tau=tau) if not solver.lower_final:
            return Textbook(corrected.sa_noise_prediction, {"order": order, "tau": tau}, "z")
        case DPMSolverPP(view="x0", lower_final=False):
            own: dict[str, Any] = {"order": solver.order, "rule": solver.rule, "as_published": solver.as_published}
            if solver.stochastic:
                return Textbook(multistep.sde_dpm_solver_pp, own, "z")
            return Textbook(multistep.dpm_solver_pp, own)
        case DEIS(order=order, variable="half_log_snr", lower_final=lower_final):
            return Textbook(multistep.deis_log_rho, {"order": order, "lower_final": lower_final})
        case DEIS(order=order, variable=variable, lower_final=False):
            return Textbook(multistep.deis_t_ab if variable == "t" else multistep.deis_rho_ab, {"order": order})
        case IPNDM(order=order):
            return Textbook(multistep.ipndm, {"order": order})
        case UniPC(view=("x0" | "eps") as view, variable=None, lower_final=False):
            own = {"order": solver.order, "view": view, "rule": solver.rule, "corrector": solver.corrector}
            return Textbook(corrected.unipc, own)
        case SASolver(tau=tau, lower_final=False):
            own = {"predictor": solver.predictor, "corrector": solver.corrector, "tau": _of_numbers(tau)}
            return Textbook(corrected.sa_solver, own, "z")
        case ERSDE(order=order, noise_scale=scale):
            named = {"recommended": corrected.recommended, "ode": corrected.same, "sde": corrected.squared}
            phi = named[scale] if isinstance(scale, str) else _of_numbers(scale)
            return Textbook(corrected.er_sde, {"order": order, "phi": phi, "as_published": solver.as_published}, "z")
    return None


def _of_numbers(function: Any) -> Any:
    """A function of tensors as one of numbers; anything else as it is."""
    if not callable(function):
        return function
    return lambda at: float(function(torch.tensor(at, dtype=torch.float64)))
