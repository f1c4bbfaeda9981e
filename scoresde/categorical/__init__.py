"""Whole states: discrete diffusion, with its own processes, denoisers and samplers.

process.py    CategoricalProcess: uniform (K = 2 is the binomial process), absorbing (masked), or any matrices
denoiser.py   CategoricalDenoiser: a network's logits as probabilities of x_0
exact.py      Table: data whose law is known, with the exact denoiser
solvers.py    Ancestral, TauLeaping: what `scoresde.sample` takes
product.py    ProductProcess, ProductDenoiser: an item of a continuous and a categorical part

`scoresde.sample`, `scoresde.elbo` and `scoresde.training.Trainer` take these denoisers as they take any other.
"""

from scoresde.categorical.denoiser import CategoricalDenoiser, CategoricalPosterior, ProbabilityDenoiser, StateDenoiser
from scoresde.categorical.exact import Table
from scoresde.categorical.process import KEPT, CategoricalProcess
from scoresde.categorical.product import ProductDenoiser, ProductPosterior, ProductProcess
from scoresde.categorical.solvers import STATE_SOLVERS, Ancestral, StateSolver, TauLeaping

__all__ = [
    "KEPT",
    "STATE_SOLVERS",
    "Ancestral",
    "CategoricalDenoiser",
    "CategoricalPosterior",
    "CategoricalProcess",
    "ProbabilityDenoiser",
    "ProductDenoiser",
    "ProductPosterior",
    "ProductProcess",
    "StateDenoiser",
    "StateSolver",
    "Table",
    "TauLeaping",
]
