"""Solvers: each turns a `Grid` into a `Tableau`, or is a loop of the same call shape. Options go to the constructor.

A file a family, with the names that it gives in its own `__all__`; `catalogue.py` has every solver by name, in a line
of its own, and `available()` lists them with their orders, costs and papers.
"""

from scoresde.solvers import (
    adaptive_ode,
    adaptive_sde,
    annealed,
    captured,
    composite,
    exponential,
    first_order,
    parallel,
    predictor_corrector,
    reverse_sde,
    runge_kutta,
    single_step,
)
from scoresde.solvers.adaptive_ode import *
from scoresde.solvers.adaptive_sde import *
from scoresde.solvers.annealed import *
from scoresde.solvers.base import SingleStep, Solver
from scoresde.solvers.captured import *
from scoresde.solvers.catalogue import Entry, available, solver_of
from scoresde.solvers.composite import *
from scoresde.solvers.exponential import *
from scoresde.solvers.first_order import *
from scoresde.solvers.langevin import langevin
from scoresde.solvers.parallel import *
from scoresde.solvers.predictor_corrector import *
from scoresde.solvers.reverse_sde import *
from scoresde.solvers.runge_kutta import *
from scoresde.solvers.single_step import *

__all__ = ["Entry", "SingleStep", "Solver", "available", "langevin", "solver_of"]
__all__ += adaptive_ode.__all__
__all__ += adaptive_sde.__all__
__all__ += annealed.__all__
__all__ += captured.__all__
__all__ += composite.__all__
__all__ += exponential.__all__
__all__ += first_order.__all__
__all__ += parallel.__all__
__all__ += predictor_corrector.__all__
__all__ += reverse_sde.__all__
__all__ += runge_kutta.__all__
__all__ += single_step.__all__
