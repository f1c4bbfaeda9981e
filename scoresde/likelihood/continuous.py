"""The bound in continuous time: with ever more steps the denoising terms of a chain become, with SNR = e^{2 lambda},

    sum  ->  int E |x_0 - D|^2 dSNR / 2  =  int_{lambda_T}^{lambda_min} E |eps - eps_hat|^2 dlambda

since |x_0 - D|^2 = e^{-2 lambda} |eps - eps_hat|^2: the likelihood-weighted score matching loss with t drawn uniformly
in lambda, here stratified, and with |eps|^2, whose mean is known, as a control variate. The exact denoiser makes this
bound tight for every x_0, up to the two ends; with a finite chain the Gaussian p(x_s | x_t) leaves a gap that closes as
steps are added.

Sources: Kingma et al. (2021), Variational diffusion models; Song, Durkan, Murray and Ermon (2021), Maximum likelihood
training of score-based diffusion models.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scoresde.denoiser import Denoiser
from scoresde.grid import Grid
from scoresde.likelihood.decoder import Data, Decoder, Draws, Terms, Tick, check_finite, relative_noise, square_norm
from scoresde.sde import SDE
from scoresde.solvers.motion import legs
from scoresde.tensors import expand_like, shown

__all__ = ["Continuous", "variance_of_strata"]


@shown
class Continuous(NamedTuple):
    """The bound in continuous time.

    Attributes:
        sde: the SDE.
        start: where the integral begins: t_max, or, where alpha is zero there and lambda minus infinity (`FlowSDE`),
            the time with lambda = -9, as for solvers in lambda. What x_T still knows of x_0 there, |x_0|^2 times 1e-8
            nats, the prior counts: it is the exact bound of the model that starts there.
        times: one of each stratum, float64, shape (K, B).
        width: of the integral, lambda(t_min) - lambda(start).
        draw: where the noise comes from.
        decodings: draws of the reconstruction.
    """

    sde: SDE
    start: float
    times: Tensor
    width: float
    draw: Draws
    decodings: int

    @classmethod
    def of(cls, sde: SDE, strata: int, draw: Draws) -> Continuous:
        start = legs(Grid(sde, [sde.t_max, sde.t_min]), free=True)[-1].t
        low, high = sde.half_log_snr(torch.tensor([start, sde.t_min], dtype=torch.float64, device="cpu")).tolist()
        share = (torch.arange(strata, dtype=torch.float64, device="cpu")[:, None] + draw.uniform(strata)) / strata
        times = sde.time_at(low + (high - low) * share).clamp(sde.t_min, start)
        return cls(sde, start, times, high - low, draw, max(2, strata // 16))

    @property
    def nfe(self) -> int:
        return len(self.times) + self.decodings

    @property
    def decoder(self) -> float:
        return relative_noise(self.sde, self.sde.t_min)

    def terms(self, denoiser: Denoiser, data: Data, decode: Decoder, cond: dict[str, Any], tick: Tick) -> Terms:
        last = torch.full((self.decodings, self.times.shape[1]), self.sde.t_min, dtype=torch.float64, device="cpu")
        times = torch.cat([self.times, last])
        denoiser.check_times(times.flatten())
        r, s = denoiser.affine(times)
        alpha, sigma = self.sde.alpha(times), self.sde.sigma(times)
        k, m, K = r * alpha - 1, r * sigma, len(self.times)  # D - x_0 = k x_0 + m eps + s N
        rows, excess = [], []
        for i, t in enumerate(times):
            x0 = data()
            eps = self.draw.noise(i, x0)
            N = denoiser.output(self.sde.perturb(x0, t, eps), t.to(x0.device), **cond)
            scale = (alpha[i] / sigma[i]) if i < K else torch.ones_like(t)  # to |eps - eps_hat|
            error = sum(expand_like(scale * f[i], x0) * y for f, y in ((k, x0), (m, eps), (s, N)))
            assert isinstance(error, Tensor)
            own = denoiser.own(x0.shape, cond)
            rows.append(square_norm(error, own) if i < K else decode(error))
            excess.append(square_norm(eps, own) - own.dims)
            tick()
        terms, c = torch.stack(rows), torch.stack(excess)
        check_finite(terms, times)
        dim = own.dims
        strata, variance, doubt = _sum_of_strata(terms[:K], c[:K], dim)
        beta = _share(terms[K - min(K, 4) : K].mean(0), dim)
        decoded = terms[K:] + decode.of_noise(self.decoder) * beta * c[K:]
        step, of_decoded = self.width / K, decoded.var(0) / len(decoded)
        doubt = step**4 * doubt + 2 * of_decoded**2 / (len(decoded) - 1)
        return Terms(-step * strata, decoded.mean(0), step**2 * variance, of_decoded, doubt)


def _share(y: Tensor, dim: int | Tensor) -> Tensor:
    """The control variate's coefficient, from |eps - eps_hat|^2 of other draws: the square of the share of the noise
    that the network cannot tell, which is the best one where that is the same in every direction.
    """
    return (y / dim).clamp(0, 1) ** 2


def _sum_of_strata(y: Tensor, c: Tensor, dim: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of y = |eps - eps_hat|^2, shape (K, B), over neighbouring strata with one draw each, its variance, and
    the variance of that.

    Most of the noise of y is that of |eps|^2, where the network cannot tell it, so beta c is taken off, with c =
    |eps|^2 - dim, of mean zero, and beta from up to 8 strata at odd distances: not from its own, so no bias comes in.
    """
    K = len(y)
    lag = (torch.arange(K, device=y.device)[:, None] - torch.arange(K, device=y.device)).abs()
    near = ((lag % 2 == 1) & (lag < 8)).to(y)
    n = near.sum(1, keepdim=True).clamp(min=1)
    beta = _share(near @ y / n, dim)
    # beta_j reads y_k and beta_k reads y_j, so the terms are correlated, by 16 beta^2 / n in all at most: n partners,
    # and for each (dbeta/dy Cov(c, y))^2 = (2 sqrt(beta) / (n dim) * 2 dim sqrt(beta))^2; none where beta is cut at 1.
    shared = torch.where(beta < 1, 16 * beta**2 / n, 0.0).sum(0)
    variance, doubt = variance_of_strata(y - beta * c)
    return (y - beta * c).sum(0), variance + shared, doubt


def variance_of_strata(y: Tensor) -> tuple[Tensor, Tensor]:
    """Variance of the sum of y, shape (K, B), one draw in each of K neighbouring strata, from second differences: a
    slope of the mean from stratum to stratum cancels in them, a bend makes the result too large, not too small. And the
    variance of that, each difference counting as one normal number.
    """
    K = len(y)
    if K == 1:
        return torch.full_like(y[0], math.nan), torch.full_like(y[0], math.nan)
    if K == 2:
        variance = y.diff(dim=0)[0] ** 2
        return variance, 2 * variance**2
    each = y.diff(n=2, dim=0) ** 2 * K / (6 * (K - 2))
    # Differences one and two apart have correlations of -2/3 and 1/6, their squares of 4/9 and 1/36.
    together = 1 + 2 * (4 / 9 * (K - 3) + 1 / 36 * max(0, K - 4)) / (K - 2)
    return each.sum(0), 2 * together * (each**2).sum(0)
