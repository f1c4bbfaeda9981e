"""Guidance: conditional generation and inverse problems, as denoisers that wrap denoisers.

ClassifierFree(denoiser, weight=2.0)                    where the denoiser goes: in `sample`, `log_prob`, the race
MomentMatching(denoiser, operator, y, noise_std=0.05)   the same, for a measurement y = A(x) + noise
Replacement(DDPM(), mask, y), TwistedSMC(particles=64)  where the solver goes: they change the state
"""

from scoresde.guidance.branches import Conditioned
from scoresde.guidance.classifier import Classifier, classifier_loss
from scoresde.guidance.classifier_free import Autoguidance, ClassifierFree
from scoresde.guidance.composition import Mixture, Product
from scoresde.guidance.energy import Energy, class_means, distance, similarity
from scoresde.guidance.operators import (
    Blur,
    Downsample,
    FourierSampling,
    Grey,
    LinearOperator,
    Mask,
    Matrix,
    Operator,
    PhaseMagnitude,
    Quantise,
    box_mask,
    check_adjoint,
    operator_of,
    random_mask,
)
from scoresde.guidance.particles import Particles, Potential, Twisted, TwistedSMC, systematic, twisted_smc
from scoresde.guidance.posterior_sampling import DPS, MomentMatching, PiGDM
from scoresde.guidance.projections import DDNM
from scoresde.guidance.replacement import RePaint, Replacement
from scoresde.guidance.rules import RULES, Rule

__all__ = [
    "DDNM",
    "DPS",
    "RULES",
    "Autoguidance",
    "Blur",
    "Classifier",
    "ClassifierFree",
    "Conditioned",
    "Downsample",
    "Energy",
    "FourierSampling",
    "Grey",
    "LinearOperator",
    "Mask",
    "Matrix",
    "Mixture",
    "MomentMatching",
    "Operator",
    "Particles",
    "PhaseMagnitude",
    "PiGDM",
    "Potential",
    "Product",
    "Quantise",
    "RePaint",
    "Replacement",
    "Rule",
    "Twisted",
    "TwistedSMC",
    "box_mask",
    "check_adjoint",
    "class_means",
    "classifier_loss",
    "distance",
    "operator_of",
    "random_mask",
    "similarity",
    "systematic",
    "twisted_smc",
]
