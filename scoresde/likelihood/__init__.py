"""Likelihoods: log-densities by the ODE, bits per dimension of images, variational bounds, and codes.

flow.py         log_prob: the density that the probability-flow ODE gives a sample
volume.py       the volume along the way, by a table or an adaptive integrator
divergence.py   the trace of a derivative, exact or by random probes, its variance, and how well that is known
interval.py     intervals by Student's t from such a variance
discrete.py     bits_per_dim: whole levels, dequantised
bound.py        elbo: the variational bound, of a chain's steps or in continuous time
coding.py       encode and decode, and what to do with a latent
"""

from scoresde.levels import outer_edges
from scoresde.likelihood.bound import Elbo, elbo
from scoresde.likelihood.coding import Encoding, decode, encode, interpolate, rescale
from scoresde.likelihood.discrete import BitsPerDim, bits_per_dim, dequantized
from scoresde.likelihood.divergence import Divergence
from scoresde.likelihood.flow import LogProb, log_prob

__all__ = [
    "BitsPerDim",
    "Divergence",
    "Elbo",
    "Encoding",
    "LogProb",
    "bits_per_dim",
    "decode",
    "dequantized",
    "elbo",
    "encode",
    "interpolate",
    "log_prob",
    "outer_edges",
    "rescale",
]
