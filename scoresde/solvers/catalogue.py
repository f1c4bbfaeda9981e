"""Every solver there is, with what a reader wants to know before choosing one. `scoresde solvers` prints the list."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from inspect import signature
from typing import Any

from scoresde.checks import ArgumentError, check_keys, one_of
from scoresde.files import parsed
from scoresde.solvers import (
    adaptive_ode,
    adaptive_sde,
    annealed,
    composite,
    exponential,
    first_order,
    predictor_corrector,
    reverse_sde,
    runge_kutta,
    single_step,
)
from scoresde.solvers.base import Solver
from scoresde.solvers.parallel import Parallel

__all__ = ["ALIASES", "SOLVERS", "Entry", "available", "call_of", "solver_of"]


@dataclass(frozen=True)
class Entry:
    """A solver with usual options.

    Attributes:
        name: a short name, as the command line takes it.
        solver: the solver itself, ready to use.
        family: "first order", "multistep", "Runge-Kutta", "Langevin" or "adaptive".
        order: measured order of convergence, of the ODE's solution or, for a stochastic solver, of its law on Gaussian
            data; None where there is none to measure (adaptive steps, Langevin dynamics). Of multistep methods, what is
            measured before the error of their first-order first step shows, at some 100 to 500 steps.
        evaluations: of the denoiser in N steps that end at t = 0, as a formula; empty where it depends on more.
        deterministic: whether it draws no noise.
        view: what it steps in.
        source: paper.
    """

    name: str
    solver: Solver
    family: str
    order: int | None
    evaluations: str
    deterministic: bool
    view: str
    source: str

    @property
    def adaptive(self) -> bool:
        """Whether it chooses its own times."""
        return self.solver.adaptive

    @property
    def call(self) -> str:
        """How to make the solver, with the options that are not the defaults."""
        return call_of(self.solver)

    def line(self) -> tuple[str, ...]:
        """The entry as text, under `HEADER`."""
        order = "" if self.order is None else str(self.order)
        noise = "no" if self.deterministic else "yes"
        return self.name, self.call, self.family, order, self.evaluations, noise, self.view, self.source


def call_of(solver: Solver) -> str:
    """How to make a solver, with the options that are not the defaults.

    >>> call_of(exponential.DPMSolverPP(2)), call_of(first_order.DDIM(0.5))
    ('DPMSolverPP()', 'DDIM(eta=0.5)')
    """
    if not is_dataclass(solver):
        return repr(solver)
    given = [(f, getattr(solver, f.name)) for f in fields(solver) if f.init]
    text = ", ".join(f"{f.name}={value!r}" for f, value in given if value != f.default)
    return f"{type(solver).__name__}({text})"


HEADER = ("name", "solver", "family", "order", "evaluations", "stochastic", "view", "source")


def available() -> list[Entry]:
    """All solvers, each with usual options; `[e.solver for e in available() if e.deterministic]` is a race.

    >>> [entry.name for entry in available() if entry.order == 5]
    ['adams', 'unipc4', 'unipc4-v']
    """
    return list(_ENTRIES)


def markdown(entries: Sequence[Entry]) -> str:
    """The entries as the table of docs/solvers.md."""
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    for entry in entries:
        name, solver, *rest = entry.line()
        lines.append("| " + " | ".join([name, f"`{solver}`", *rest]) + " |")
    return "\n".join(lines)


_ANGLE = "Salimans and Ho (2022), for the angle"
_FLOW = "Lipman et al. (2023), for the line"
_CUI = "Cui et al. (2023)"
_DDIM = "Song, Meng and Ermon (2021)"
_EDM = "Karras et al. (2022)"
_GOTTA = "Jolicoeur-Martineau et al. (2021)"
_LU = "Lu et al. (2022)"
_LU_PP = "Lu et al. (2022b)"
_NCSN = "Song and Ermon (2019, 2020)"
_SONG = "Song et al. (2021)"
_ZHANG = "Zhang and Chen (2023)"
_ZHAO = "Zhao et al. (2023)"

# (name, solver, order, evaluations, deterministic, view, source) of each, by family.
_FAMILIES: dict[str, list[tuple[str, Solver, int | None, str, bool, str, str]]] = {
    "first order": [
        ("ddpm", first_order.DDPM(), 1, "N", False, "x0", "Ho et al. (2020)"),
        ("ddpm-beta", first_order.DDPM("beta"), 1, "N", False, "x0", "Ho et al. (2020)"),
        ("ddim", first_order.DDIM(), 1, "N", True, "x0", _DDIM),
        ("ddim-0.5", first_order.DDIM(0.5), 1, "N", False, "x0", _DDIM),
        ("ddim-raw-eps", first_order.RawEps(), None, "N", True, "x0", _DDIM),
        ("ancestral", first_order.Ancestral(), 1, "N", False, "x0", _SONG),
        ("reverse-diffusion", first_order.ReverseDiffusion(), 1, "N", False, "x0", _SONG),
        ("reverse-diffusion-ode", first_order.ReverseDiffusion(probability_flow=True), 1, "N", True, "x0", _SONG),
        ("euler-maruyama", first_order.EulerMaruyama(), 1, "N", False, "x0", _SONG),
        ("euler-maruyama-sigma", first_order.EulerMaruyama("sigma"), 1, "N", False, "x0", _SONG),
        ("euler", runge_kutta.Euler("t"), 1, "N", True, "velocity", _SONG),
        ("exponential-sde", first_order.ExponentialSDE(), 1, "N", False, "x0", _LU_PP),
        ("er-sde1", exponential.ERSDE(1), 1, "N", False, "x0", _CUI),
    ],
    "multistep": [
        ("adams", exponential.Adams(), 5, "N", True, "flow", _ZHAO),
        ("dpm++2m", exponential.DPMSolverPP(2), 2, "N", True, "x0", _LU_PP),
        ("dpm++3m", exponential.DPMSolverPP(3), 3, "N", True, "x0", _LU_PP),
        ("dpm++3m-published", exponential.DPMSolverPP(3, as_published=True), 2, "N", True, "x0", _LU_PP),
        ("deis2", exponential.DEIS(2), 2, "N", True, "eps", _ZHANG),
        ("deis3", exponential.DEIS(3), 3, "N", True, "eps", _ZHANG),
        ("deis4", exponential.DEIS(4), 4, "N", True, "eps", _ZHANG),
        ("deis3-rho", exponential.DEIS(3, "sigma"), 3, "N", True, "eps", _ZHANG),
        ("ipndm3", exponential.IPNDM(3), 2, "N", True, "eps", "Liu et al. (2022)"),
        ("ipndm4", exponential.IPNDM(4), 2, "N", True, "eps", "Liu et al. (2022)"),
        ("eab3-eps", exponential.ExponentialAB(3, "eps"), 3, "N", True, "eps", _ZHANG),
        ("eab4-eps", exponential.ExponentialAB(4, "eps"), 4, "N", True, "eps", _ZHANG),
        ("eab2-v", exponential.ExponentialAB(2, "v"), 2, "N", True, "v", _ANGLE),
        ("eab3-v", exponential.ExponentialAB(3, "v"), 3, "N", True, "v", _ANGLE),
        ("eab4-v", exponential.ExponentialAB(4, "v"), 4, "N", True, "v", _ANGLE),
        ("eab4-v-lambda", exponential.ExponentialAB(4, "v", "half_log_snr"), 4, "N", True, "v", _ANGLE),
        ("eab3-flow", exponential.ExponentialAB(3, "flow"), 3, "N", True, "flow", _FLOW),
        ("eab4-flow", exponential.ExponentialAB(4, "flow"), 4, "N", True, "flow", _FLOW),
        ("eab2-v-sde", exponential.ExponentialAB(2, "v", tau=1.0), 2, "N", False, "v", _ANGLE),
        ("eab2-flow-sde", exponential.ExponentialAB(2, "flow", tau=1.0), 2, "N", False, "flow", _FLOW),
        ("unip2", exponential.UniPC(2, corrector=False), 2, "N", True, "x0", _ZHAO),
        ("unip3", exponential.UniPC(3, corrector=False), 3, "N", True, "x0", _ZHAO),
        ("unipc2", exponential.UniPC(2), 3, "N", True, "x0", _ZHAO),
        ("unipc3", exponential.UniPC(3), 4, "N", True, "x0", _ZHAO),
        ("unipc4", exponential.UniPC(4), 5, "N", True, "x0", _ZHAO),
        ("unipc4-v", exponential.UniPC(4, "v"), 5, "N", True, "v", _ZHAO),
        ("unipc3-v", exponential.UniPC(3, "v", variable="half_log_snr"), 4, "N", True, "v", _ZHAO),
        ("unipc3-eps", exponential.UniPC(3, "eps"), 4, "N", True, "eps", _ZHAO),
        ("dpm++2m-sde", exponential.DPMSolverPP(2, stochastic=True), 2, "N", False, "x0", _LU_PP),
        ("dpm++3m-sde", exponential.DPMSolverPP(3, stochastic=True), 2, "N", False, "x0", _LU_PP),
        ("sa-solver", exponential.SASolver(), 2, "N", False, "x0", "Xue et al. (2023)"),
        ("er-sde2", exponential.ERSDE(2), 2, "N", False, "x0", _CUI),
        ("er-sde3", exponential.ERSDE(3), 2, "N", False, "x0", _CUI),
        ("er-sde3-published", exponential.ERSDE(3, as_published=True), 2, "N", False, "x0", _CUI),
    ],
    "Runge-Kutta": [
        ("heun", runge_kutta.Heun(), 2, "2N - 1", True, "eps", _EDM),
        ("heun-t", runge_kutta.Heun("t"), 2, "2N - 1", True, "velocity", _EDM),
        ("heun-angle", runge_kutta.Heun("angle"), 2, "2N - 1", True, "v", _ANGLE),
        ("midpoint", runge_kutta.RungeKutta("midpoint"), 2, "2N - 1", True, "eps", _EDM),
        ("ralston", runge_kutta.RungeKutta("ralston"), 2, "2N - 1", True, "eps", _EDM),
        ("kutta3", runge_kutta.RungeKutta("kutta3"), 3, "3N - 2", True, "eps", _ZHANG),
        ("rk4", runge_kutta.RungeKutta("rk4"), 4, "4N - 3", True, "eps", _ZHANG),
        ("rk4-lambda", runge_kutta.RungeKutta("rk4", "half_log_snr"), 4, "4N - 3", True, "eps", _EDM),
        ("rk4-angle", runge_kutta.RungeKutta("rk4", "angle"), 4, "4N - 3", True, "v", _ANGLE),
        ("rk4-flow", runge_kutta.RungeKutta("rk4", "flow"), 4, "4N - 3", True, "flow", _FLOW),
        ("dpm-solver2", single_step.DPMSolver(2), 2, "2N - 1", True, "eps", _LU),
        ("dpm-solver3", single_step.DPMSolver(3), 3, "3N - 2", True, "eps", _LU),
        ("dpm-solver-fast", single_step.DPMSolver(3, fast=True), 3, "3N - 2", True, "eps", _LU),
        ("dpm++2s", single_step.DPMSolver(2, "x0"), 2, "2N - 1", True, "x0", _LU_PP),
        ("dpm++3s", single_step.DPMSolver(3, "x0"), 3, "3N - 2", True, "x0", _LU_PP),
        ("exponential-heun", single_step.ExponentialHeun(), 2, "2N - 1", True, "x0", "Hochbruck and Ostermann (2010)"),
        ("edm-stochastic", composite.EDMStochastic(), 2, "2N - 1", False, "eps", _EDM),
        ("restart", composite.Restart(), None, "2N - 1 + 8", False, "eps", "Xu et al. (2023)"),
        ("time-travel", composite.TimeTravel(jump=2, repeats=2), 1, "", False, "x0", "Lugmayr et al. (2022)"),
    ],
    "Langevin": [
        ("annealed-langevin", annealed.AnnealedLangevin(), None, "5N + 1", False, "score", _NCSN),
        ("pc", predictor_corrector.PredictorCorrector(), None, "2N - 1", False, "score", _SONG),
        ("pc-ald", predictor_corrector.PredictorCorrector(corrector="ald"), None, "2N - 1", False, "score", _SONG),
    ],
    "adaptive": [
        ("ode-dopri5", adaptive_ode.AdaptiveODE(), None, "", True, "eps", "torchdiffeq"),
        ("ode-rk45", adaptive_ode.AdaptiveODE("RK45"), None, "", True, "eps", "scipy"),
        ("dpm-solver23", adaptive_sde.DPMSolverAdaptive(3), None, "", True, "eps", _LU),
        ("dpm-solver12", adaptive_sde.DPMSolverAdaptive(2), None, "", True, "eps", _LU),
        ("adaptive-sde", adaptive_sde.AdaptiveSDE(), None, "", False, "score", _GOTTA),
        ("reverse-sde", reverse_sde.ReverseSDE(), None, "N", False, "eps", "torchsde"),
    ],
}

_ENTRIES = [
    Entry(name, solver, family, order, evaluations, deterministic, view, source)
    for family, entries in _FAMILIES.items()
    for name, solver, order, evaluations, deterministic, view, source in entries
]

SOLVERS = {entry.name: entry for entry in available()}
ALIASES = {"unipc": "unipc3", "dpm++": "dpm++2m", "deis": "deis3", "ipndm": "ipndm4"}
_CLASSES = {type(entry.solver).__name__: type(entry.solver) for entry in _ENTRIES} | {"Parallel": Parallel}


def solver_of(text: str) -> Solver:
    """The solver of a name that `scoresde solvers` lists, or of a call: unipc3, 'DDIM(eta=0.2)', 'Parallel(DDPM())'.

    Raises:
        ValueError: if there is none.

    >>> solver_of("DDIM(0.2)"), solver_of("heun")
    (DDIM(eta=0.2), Heun(variable='sigma'))
    """
    if (name := ALIASES.get(text, text)) in SOLVERS:
        return SOLVERS[name].solver
    try:
        call = parsed(lambda text: ast.parse(text, mode="eval").body, text.strip())
    except (SyntaxError, ValueError):
        call = None
    if not isinstance(call, ast.Call):
        listed = one_of(text, [*SOLVERS, *ALIASES])
        raise ArgumentError(f"solver={text!r}: {listed} that `scoresde solvers` lists, or a call, 'DDIM(eta=0.2)' say")
    return _called(text, call)


def _called(text: str, call: ast.Call) -> Solver:
    """The solver of a call in a text, which may have others among its arguments."""
    name = call.func.id if isinstance(call.func, ast.Name) else ast.unparse(call.func)
    if (made := _CLASSES.get(name)) is None:
        raise ArgumentError(f"solver={text!r}: {one_of(name, _CLASSES)} to call, 'DDIM(eta=0.2)' say")

    def value(node: ast.expr) -> Any:
        return _called(text, node) if isinstance(node, ast.Call) else ast.literal_eval(node)

    try:
        args = [value(arg) for arg in call.args]
        options = {str(keyword.arg): value(keyword.value) for keyword in call.keywords}
    except ArgumentError:
        raise
    except (ValueError, TypeError) as error:
        raise ArgumentError(f"solver={text!r}: expected numbers, texts, lists and solvers for its arguments") from error
    try:
        check_keys(made.__name__, options, (known := signature(made)).parameters)
        known.bind(*args, **options)
        return made(*args, **options)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"solver={text!r}: ", str(error)) from error
