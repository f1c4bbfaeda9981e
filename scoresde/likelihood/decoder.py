"""What every bound is made of: the decoder p(x_0 | x_t), the draws of a sample, its terms and their checks.

The decoder is N(D, std^2), as a density, or for whole levels the probability of the bin of x_0, whose first and last
go on to infinity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scoresde.checks import check_count, check_range
from scoresde.codecs import Encoded
from scoresde.errors import NonFiniteError, some
from scoresde.masked import masked_noise
from scoresde.masks import Own
from scoresde.noise import NoiseSource, SeededNoise, derive_seed, seeds_of
from scoresde.sde import SDE
from scoresde.solvers.rows import forgotten
from scoresde.tensors import shown, told

__all__ = [
    "Data",
    "Decoder",
    "Draws",
    "Terms",
    "Tick",
    "check_finite",
    "decoder_std",
    "float64",
    "gaussian_kl",
    "log_probability",
    "relative_noise",
    "square_norm",
    "total",
]

Tick = Callable[[], object]

Data = Callable[[], Tensor]
"""x_0 of an evaluation, (B, ...): the same each time, or a draw of its law, of which the bound is the mean."""

# Streams of a seed; `sample` has 0 to 2, `estimate` 5 and 6, and x may have been drawn with the same seed.
_NOISE, _TIMES, _CODES = 3, 4, 7


@shown
class Terms(NamedTuple):
    """The two random parts, their variances, and the variance of the sum of these, float64, each of shape (B,)."""

    denoising: Tensor
    reconstruction: Tensor
    of_denoising: Tensor
    of_reconstruction: Tensor
    doubt: Tensor


@dataclass(frozen=True)
class Draws:
    """The random numbers of each sample, from its seed alone."""

    noise: NoiseSource
    seeds: list[int]

    @classmethod
    def of(cls, x: Tensor, seed: int | Sequence[int] | None, own: Own) -> Draws:
        seeds = seeds_of(seed, len(x))
        return cls(masked_noise(SeededNoise([derive_seed(s, _NOISE) for s in seeds], x.device), own), seeds)

    def data(self, encoded: Encoded) -> Data:
        """z ~ q(z | x), another one each time, of an encoder with noise."""
        noise = SeededNoise([derive_seed(s, _CODES) for s in self.seeds], encoded.mean.device)
        return lambda: float64(encoded.draw(noise(0, encoded.mean)))

    def uniform(self, n: int) -> Tensor:
        """Numbers in [0, 1), float64 on the host, shape (n, B)."""
        streams = [torch.Generator("cpu").manual_seed(derive_seed(s, _TIMES)) for s in self.seeds]
        return torch.stack([torch.rand(n, generator=g, dtype=torch.float64, device="cpu") for g in streams], dim=1)


@dataclass(frozen=True)
class Decoder:
    """log p(x_0 | x_t) of N(mean, std^2), as a density or as the probability of the bin of x_0.

    Attributes:
        std: of the decoder.
        below, above: edges of the bin, less x_0, shape (B, ...); None for the density.
        own: which entries there are; None for all.
    """

    std: float
    below: Tensor | None = None
    above: Tensor | None = None
    own: Own | None = None

    __repr__ = told

    @classmethod
    def of(
        cls, x0: Tensor, std: float, levels: int | None, data_range: tuple[float, float], own: Own | None = None
    ) -> Decoder:
        if isinstance(std, bool) or not isinstance(std, int | float) or not 0 < std < math.inf:
            raise ValueError(f"decoder={std!r}: expected its standard deviation, a finite number > 0")
        own = None if own is None or own.mask is None else own  # of z, whose shape may be another, all
        if levels is None:
            return cls(std, own=own)
        check_count(levels=levels)
        check_range(data_range)
        lo, hi = data_range
        x, width = float64(x0), (hi - lo) / levels
        if own is not None and own.mask is not None:
            x = torch.where(own.mask, x, lo)  # where nothing is, nothing is out of range
        if bool(((x - lo < -1e-6 * (hi - lo)) | (x - hi > 1e-6 * (hi - lo))).any()):
            raise ValueError(
                f"x runs from {float(x.min()):.6g} to {float(x.max()):.6g}, outside data_range={data_range!r}: give "
                "the range that the levels' bins fill"
            )
        level = ((x - lo) / width).floor().clamp(0, levels - 1)
        below = torch.where(level == 0, -math.inf, lo + level * width - x)
        above = torch.where(level == levels - 1, math.inf, lo + (level + 1) * width - x)
        return cls(std, below, above, own)

    def of_noise(self, relative_noise: float) -> float:
        """Minus the factor of |eps - eps_hat|^2 in the log density; 0 for the probability of a bin."""
        return 0.0 if self.below is not None else (relative_noise / self.std) ** 2 / 2

    def __call__(self, error: Tensor) -> Tensor:
        """Shape (B,), float64, for error = mean - x_0, shape (B, ...)."""
        own = self.own or Own(error.shape)
        if self.below is None or self.above is None:
            return -square_norm(error, own) / (2 * self.std**2) - own.dims * math.log(self.std * math.sqrt(2 * math.pi))
        error = float64(error)
        return total(log_probability((self.below - error) / self.std, (self.above - error) / self.std), own)


def log_probability(low: Tensor, high: Tensor) -> Tensor:
    """log(Phi(high) - Phi(low)), low < high, exact in both tails: the interval is turned to lie left of zero, where
    log Phi keeps its digits, and the difference is taken of the logarithms.
    """
    right = low + high > 0
    low, high = torch.where(right, -high, low), torch.where(right, -low, high)
    log_low, log_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    return log_high + torch.log(-torch.expm1(log_low - log_high))


def check_finite(terms: Tensor, times: Tensor) -> None:
    """Raises NonFiniteError for terms that are not finite, with their times on the host, both of shape (R, B)."""
    if bool(terms.isfinite().all()):
        return
    bad = ~terms.isfinite().cpu()
    row = int(bad.any(1).nonzero()[0])
    samples: list[int] = bad[row].nonzero().flatten().tolist()
    time = float(times[row, samples[0]])
    which = f"sample{'s' * (len(samples) > 1)} {some(samples)}"
    message = f"the bound's term {row}, at t = {time:.6g}, is not finite for {which}"
    raise NonFiniteError(message, row, time, samples)


def gaussian_kl(dim: int | Tensor, ratio: Any, square: Tensor) -> Tensor:
    """KL(q | p) of Gaussians: ratio = var_q / var_p in each dimension, square = |mean_p - mean_q|^2 / var_p."""
    excess = ratio - 1
    log = torch.log1p(excess) if isinstance(excess, Tensor) else math.log1p(excess)
    return (dim * (excess - log) + square) / 2


def decoder_std(sde: SDE, t: float) -> float:
    """The decoder's standard deviation, by the rule of `elbo`, of a chain whose last noisy time is t."""
    if sde.nodes is not None and len(sde.nodes) > 1 and t == float(sde.nodes[0]):
        one, two = sde.nodes[:2]
        return float(sde.sigma(one) * forgotten(sde, two, one).sqrt())
    return relative_noise(sde, t)


def relative_noise(sde: SDE, t: float) -> float:
    """sigma / alpha, the standard deviation of x_0 given x_t alone."""
    return float((-sde.half_log_snr(t)).exp())


def float64(x: Tensor) -> Tensor:
    """x in float64, in float32 on a device that has none."""
    return x if x.device.type == "mps" else x.double()


def total(x: Tensor, own: Own | None = None) -> Tensor:
    """Over each sample's entries, by default all, shape (B,), in float64."""
    return (own or Own(x.shape)).sum(float64(x))


def square_norm(x: Tensor, own: Own | None = None) -> Tensor:
    return total(float64(x) ** 2, own)
