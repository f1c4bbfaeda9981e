"""Likelihoods: log-densities by the ODE, bits per dimension of images, variational bounds.

flow.py         log_prob: the density that the probability-flow ODE gives a sample
volume.py       the volume along the way by a table; adaptive.py by an adaptive integrator
divergence.py   the trace of a derivative, exact or by random probes; spread.py its variance, and how well that is known
interval.py     intervals by Student's t from such a variance
bits.py         bits_per_dim: whole levels, dequantised
bound.py        elbo: the variational bound, of a chain's steps (chain.py) or in continuous time (continuous.py), and
                what both are made of (decoder.py)
"""

from scoresde.levels import outer_edges
from scoresde.likelihood.bits import BitsPerDim, bits_per_dim, dequantized
from scoresde.likelihood.bound import Elbo, elbo
from scoresde.likelihood.divergence import Divergence
from scoresde.likelihood.flow import LogProb, log_prob

__all__ = [
    "BitsPerDim",
    "Divergence",
    "Elbo",
    "LogProb",
    "bits_per_dim",
    "dequantized",
    "elbo",
    "log_prob",
    "outer_edges",
]
