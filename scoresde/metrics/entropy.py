"""How sure a classifier is of each sample, and how varied it finds them together: the Inception score (Salimans et al.,
2016, "Improved techniques for training GANs", section 4) with a classifier p(y | x) in Inception's place.

    exp( E_x KL(p(y | x) || p(y)) ) = exp( H(p(y)) - E_x H(p(y | x)) ),    p(y) = E_x p(y | x)

It lies between 1, where every sample gets the same probabilities, and the number of classes K, where each sample is
surely of one class and all classes are as frequent. It compares with no data: one clear sample of each class has K.
"""

from __future__ import annotations

import math

import torch

from scoresde.metrics.checks import as_features

__all__ = ["entropy_score"]


def entropy_score(logits: torch.Tensor) -> float:
    """The score, in float64, p(y) being the mean over all samples (published Inception scores are means over ten parts
    of them, each with its own).

    Args:
        logits: of the classifier, or log-probabilities, shape (n, K).

    Raises:
        ValueError: if they are none, or not finite.

    >>> sure = 100 * torch.eye(4)
    >>> round(entropy_score(sure), 6), entropy_score(torch.zeros(5, 4)), round(entropy_score(sure[[0, 0, 1, 1]]), 6)
    (4.0, 1.0, 2.0)
    """
    log_p = as_features(logits, "logits").log_softmax(1)
    p = log_p.exp()
    marginal = p.mean(0)
    # xlogy is 0 at 0, where p(y) underflows
    divergence = (p * log_p).sum(1).mean() - torch.xlogy(marginal, marginal).sum()
    return math.exp(max(0.0, float(divergence)))
