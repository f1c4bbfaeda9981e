"""scoresde: continuous-time score-based generative models in three nouns.

- an `SDE` is its pair of scales, x_t = alpha_t x_0 + sigma_t eps;
- a `Denoiser` is what is known of x_0 given x_t, `Posterior(mean, var)`;
- a solver (`scoresde.solvers`) turns a time `Grid` into a `Tableau`, and one loop runs it.

`sample(denoiser, shape, solver, steps=20)` puts the three together.
"""

from importlib.metadata import version

from scoresde import chain, denoiser, schedules, sde
from scoresde.cascade import Cascade, Stage
from scoresde.chain import *
from scoresde.denoiser import *
from scoresde.diagnose import diagnose
from scoresde.editing import decode, encode
from scoresde.grid import Grid
from scoresde.likelihood import bits_per_dim, elbo, log_prob
from scoresde.masked import Masked
from scoresde.masks import batch_of
from scoresde.noise import sample_seeds
from scoresde.processes import SDES, sde_of
from scoresde.run import Solution
from scoresde.sampling import NonFiniteError, sample
from scoresde.schedules import *
from scoresde.sde import *
from scoresde.tableau import State, Tableau
from scoresde.training import load
from scoresde.wrappers import Clip, DynamicThreshold, Latent, Tempered

__version__ = version("scoresde")

__all__ = [
    "SDES",
    "Cascade",
    "Clip",
    "DynamicThreshold",
    "Grid",
    "Latent",
    "Masked",
    "NonFiniteError",
    "Solution",
    "Stage",
    "State",
    "Tableau",
    "Tempered",
    "__version__",
    "batch_of",
    "bits_per_dim",
    "decode",
    "diagnose",
    "elbo",
    "encode",
    "load",
    "log_prob",
    "sample",
    "sample_seeds",
    "sde_of",
]
__all__ += chain.__all__
__all__ += denoiser.__all__
__all__ += schedules.__all__
__all__ += sde.__all__
