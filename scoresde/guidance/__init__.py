"""Guidance: conditional generation and inverse problems, as denoisers that wrap denoisers.

ClassifierFree(denoiser, weight=2.0)                    where the denoiser goes: in `sample`, `log_prob`, the race
MomentMatching(denoiser, operator, y, noise_std=0.05)   the same, for a measurement y = A(x) + noise
Replacement(DDPM(), mask, y), TwistedSMC(particles=64)  where the solver goes: they change the state
"""

from scoresde.guidance import (
    classifier,
    classifier_free,
    composition,
    energy,
    operators,
    posterior_sampling,
    projections,
    replacement,
    trained,
)
from scoresde.guidance.branches import Conditioned
from scoresde.guidance.classifier import *
from scoresde.guidance.classifier_free import *
from scoresde.guidance.composition import *
from scoresde.guidance.energy import *
from scoresde.guidance.operators import *
from scoresde.guidance.particles import Particles, Potential, Twisted, TwistedSMC, systematic, twisted_smc
from scoresde.guidance.posterior_sampling import *
from scoresde.guidance.projections import *
from scoresde.guidance.replacement import *
from scoresde.guidance.rules import RULES, Rule
from scoresde.guidance.trained import *

__all__ = [
    "RULES",
    "Conditioned",
    "Particles",
    "Potential",
    "Rule",
    "Twisted",
    "TwistedSMC",
    "systematic",
    "twisted_smc",
]
__all__ += classifier.__all__
__all__ += classifier_free.__all__
__all__ += composition.__all__
__all__ += energy.__all__
__all__ += operators.__all__
__all__ += posterior_sampling.__all__
__all__ += projections.__all__
__all__ += replacement.__all__
__all__ += trained.__all__
