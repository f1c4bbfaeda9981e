"""The optimal reverse variance (Bao et al., 2022): tables, heads, and optimal trajectories.

    table.py          VarianceTable: E|eps_hat|^2 / d at times, hence E Var[x_0 | x_t], saved and loaded
    estimate.py       estimate: the table of a denoiser on data, by Monte Carlo
    denoiser.py       AnalyticDenoiser: a denoiser whose Posterior.var is the table's
    trunk.py          TrunkWithHead, SplitOutput: networks whose second output is a head's
    heads.py          SN, NPR and OCM: elementwise variances that are learned, and their losses
    learned_range.py  improved DDPM's learned variance of each step, and its loss
    trajectory.py     the grid of K steps with the best bound, by dynamic programming

`scoresde.solvers.OptimalVariance(solver)` samples with `Posterior.var`, `elbo(..., variance="posterior")` is its bound.
"""

from scoresde.variance.denoiser import AnalyticDenoiser
from scoresde.variance.estimate import estimate
from scoresde.variance.heads import (
    NPRDenoiser,
    OCMDenoiser,
    SNDenoiser,
    npr_loss,
    ocm_loss,
    sn_loss,
    training_loss,
)
from scoresde.variance.learned_range import LearnedRangeDenoiser, hybrid_loss
from scoresde.variance.table import VarianceTable
from scoresde.variance.trajectory import (
    Costs,
    analytic_costs,
    kl_costs,
    least_cost_path,
    measure_errors,
    optimal_grid,
)
from scoresde.variance.trunk import SplitOutput, TrunkWithHead

__all__ = [
    "AnalyticDenoiser",
    "Costs",
    "LearnedRangeDenoiser",
    "NPRDenoiser",
    "OCMDenoiser",
    "SNDenoiser",
    "SplitOutput",
    "TrunkWithHead",
    "VarianceTable",
    "analytic_costs",
    "estimate",
    "hybrid_loss",
    "kl_costs",
    "least_cost_path",
    "measure_errors",
    "npr_loss",
    "ocm_loss",
    "optimal_grid",
    "sn_loss",
    "training_loss",
]
