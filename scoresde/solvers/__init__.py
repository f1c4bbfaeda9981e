"""Solvers: each turns a `Grid` into a `Tableau`, or is a loop of the same call shape. Options go to the constructor.

`available()` lists them all, with their orders, costs and papers.
"""

from scoresde.solvers.adaptive_ode import AdaptiveODE
from scoresde.solvers.adaptive_sde import AdaptiveSDE, DPMSolverAdaptive
from scoresde.solvers.annealed import AnnealedLangevin
from scoresde.solvers.base import SingleStep, Solver
from scoresde.solvers.catalogue import Entry, available
from scoresde.solvers.composite import EDMStochastic, Restart, TimeTravel
from scoresde.solvers.exponential import DEIS, ERSDE, IPNDM, DPMSolverPP, ExponentialAB, SASolver, UniPC
from scoresde.solvers.first_order import DDIM, DDPM, Ancestral, EulerMaruyama, ExponentialSDE, ReverseDiffusion
from scoresde.solvers.langevin import langevin
from scoresde.solvers.predictor_corrector import PredictorCorrector
from scoresde.solvers.reverse_sde import ReverseSDE
from scoresde.solvers.runge_kutta import Euler, Heun, RungeKutta
from scoresde.solvers.single_step import DPMSolver, ExponentialHeun

__all__ = [
    "DDIM",
    "DDPM",
    "DEIS",
    "ERSDE",
    "IPNDM",
    "AdaptiveODE",
    "AdaptiveSDE",
    "Ancestral",
    "AnnealedLangevin",
    "DPMSolver",
    "DPMSolverAdaptive",
    "DPMSolverPP",
    "EDMStochastic",
    "Entry",
    "Euler",
    "EulerMaruyama",
    "ExponentialAB",
    "ExponentialHeun",
    "ExponentialSDE",
    "Heun",
    "PredictorCorrector",
    "Restart",
    "ReverseDiffusion",
    "ReverseSDE",
    "RungeKutta",
    "SASolver",
    "SingleStep",
    "Solver",
    "TimeTravel",
    "UniPC",
    "available",
    "langevin",
]
