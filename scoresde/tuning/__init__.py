"""The best solver and grid for one's own model and a budget of evaluations, and the best table.

No static rule wins everywhere: which grid and solver are best at few evaluations depends on the data. But the model can
be asked: its own fine solution from the same noise says how far off each of some named solvers and grids is.
`choose` tries them on a few samples; `tune` learns, from the best of them, the times and coefficients themselves. What
they return is a solver, kept in a small file that names the model.
"""

from scoresde.tuning.chosen import choose
from scoresde.tuning.corrections import Corrections
from scoresde.tuning.solver import TunedSolver
from scoresde.tuning.tuned import tune

__all__ = ["Corrections", "TunedSolver", "choose", "tune"]
