"""The optimal reverse variance (Bao et al., 2022): tables, heads, and optimal trajectories.

    table.py          VarianceTable: E|eps_hat|^2 / d at times, hence E Var[x_0 | x_t], saved and loaded
    estimate.py       estimate: the table of a denoiser on data, by Monte Carlo
    denoiser.py       AnalyticDenoiser: a denoiser whose Posterior.var is the table's
    solver.py         OptimalVariance(solver): samples with Posterior.var
    trunk.py          TrunkWithHead, SplitOutput: networks whose second output is a head's
    heads.py          SN, NPR and OCM: elementwise variances that are learned
    learned_range.py  improved DDPM's learned variance of each step
    losses.py         what these are trained by
    costs.py          what the steps of a chain cost in its bound, from one pass of the network
    trajectory.py     the grid of K steps with the best bound, by dynamic programming

`elbo(..., variance="posterior")` is the bound of the chain that `OptimalVariance` samples.
"""

from scoresde.variance.costs import Costs, analytic_costs, kl_costs, least_cost_path, measure_errors
from scoresde.variance.denoiser import AnalyticDenoiser
from scoresde.variance.estimate import estimate
from scoresde.variance.heads import NPRDenoiser, OCMDenoiser, SNDenoiser
from scoresde.variance.learned_range import LearnedRangeDenoiser
from scoresde.variance.losses import hybrid_loss, npr_loss, ocm_loss, sn_loss, training_loss
from scoresde.variance.solver import OptimalVariance, optimal_tableau
from scoresde.variance.table import VarianceTable
from scoresde.variance.trajectory import optimal_grid
from scoresde.variance.trunk import SplitOutput, TrunkWithHead

__all__ = [
    "AnalyticDenoiser",
    "Costs",
    "LearnedRangeDenoiser",
    "NPRDenoiser",
    "OCMDenoiser",
    "OptimalVariance",
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
    "optimal_tableau",
    "sn_loss",
    "training_loss",
]
