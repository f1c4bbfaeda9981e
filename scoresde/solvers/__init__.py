"""Solvers: each turns a `Grid` into a `Tableau`. Options go to the constructor."""

from scoresde.solvers.base import Solver
from scoresde.solvers.first_order import DDIM, DDPM, EulerMaruyama
from scoresde.solvers.runge_kutta import Euler, Heun

__all__ = ["DDIM", "DDPM", "Euler", "EulerMaruyama", "Heun", "Solver"]
