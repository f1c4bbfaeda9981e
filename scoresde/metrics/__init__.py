"""Distances between samples and data, in any feature space, with their errors and their floor.

    frechet.py      frechet_distance, and Statistics: mean and covariance of a stream, merged, saved and loaded
    kernel.py       mmd and kid: maximum mean discrepancy without bias, of polynomial and Gaussian kernels
    neighbours.py   precision, recall, density and coverage
    transport.py    sliced Wasserstein and energy distance
    forecasts.py    of sample paths: CRPS, energy score and the coverage of intervals
    entropy.py      what a classifier finds in them: the Inception score's formula
    features.py     feature spaces: pixels, principal components, random layers, networks, Inception
    classifier.py   small classifiers whose hidden layer is a feature space, and those that come with the package
    spaces.py       a set in a feature space, for what is compared more than once
    evaluate.py     all of it in one call: values, standard errors, and what real data scores against real data

No such number means anything without its feature space, sample sizes and floor: quote them with it.
"""

from scoresde.metrics import entropy, forecasts, frechet, kernel, neighbours, transport
from scoresde.metrics.classifier import Classifier, classifier_features, load_classifier
from scoresde.metrics.entropy import *
from scoresde.metrics.evaluate import METRICS, Evaluation, Score, evaluate
from scoresde.metrics.features import PCA, Features, NetworkFeatures, Pixels, RandomFeatures, SetFeatures, inception
from scoresde.metrics.forecasts import *
from scoresde.metrics.frechet import *
from scoresde.metrics.kernel import *
from scoresde.metrics.neighbours import *
from scoresde.metrics.spaces import Embedded, check_space, embedded
from scoresde.metrics.transport import *

__all__ = [
    "METRICS",
    "PCA",
    "Classifier",
    "Embedded",
    "Evaluation",
    "Features",
    "NetworkFeatures",
    "Pixels",
    "RandomFeatures",
    "Score",
    "SetFeatures",
    "check_space",
    "classifier_features",
    "embedded",
    "evaluate",
    "inception",
    "load_classifier",
]
__all__ += entropy.__all__
__all__ += forecasts.__all__
__all__ += frechet.__all__
__all__ += kernel.__all__
__all__ += neighbours.__all__
__all__ += transport.__all__
