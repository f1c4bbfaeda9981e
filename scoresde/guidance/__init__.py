"""Guidance: conditional generation and inverse problems, as denoisers that wrap denoisers."""

from scoresde.guidance.branches import Conditioned
from scoresde.guidance.classifier import Classifier, classifier_loss
from scoresde.guidance.classifier_free import Autoguidance, ClassifierFree
from scoresde.guidance.composition import Mixture, Product
from scoresde.guidance.energy import Energy, class_means, distance, similarity

__all__ = [
    "Autoguidance",
    "Classifier",
    "ClassifierFree",
    "Conditioned",
    "Energy",
    "Mixture",
    "Product",
    "class_means",
    "classifier_loss",
    "distance",
    "similarity",
]
