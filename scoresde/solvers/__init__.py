"""Solvers: each turns a `Grid` into a `Tableau`, or is a loop of the same call shape. Options go to the constructor."""

from scoresde.solvers.base import SingleStep, Solver
from scoresde.solvers.first_order import DDIM, DDPM, Ancestral, EulerMaruyama, ExponentialSDE, ReverseDiffusion
from scoresde.solvers.multistep import DEIS, ERSDE, IPNDM, DPMSolverPP, ExponentialAB, SASolver, UniPC
from scoresde.solvers.runge_kutta import Euler, Heun, RungeKutta

__all__ = [
    "DDIM",
    "DDPM",
    "DEIS",
    "ERSDE",
    "IPNDM",
    "Ancestral",
    "DPMSolverPP",
    "Euler",
    "EulerMaruyama",
    "ExponentialAB",
    "ExponentialSDE",
    "Heun",
    "ReverseDiffusion",
    "RungeKutta",
    "SASolver",
    "SingleStep",
    "Solver",
    "UniPC",
]
