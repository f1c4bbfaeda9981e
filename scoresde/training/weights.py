"""Where denoising score matching puts its effort: the weight of each time, and how often it is drawn.

The loss is E_t[ ratio(t) w(t) E |eps_hat - eps|^2 / d ], eps_hat being the denoiser's noise prediction and d the number
of dimensions. Weightings are functions (sde, t) -> w on that scale. With lambda the half log-SNR and
SNR = (alpha / sigma)^2 = e^{2 lambda}:

    simple      1                           Ho et al. (2020), eq. 14
    likelihood  g^2 / sigma^2 = -2 lambda'  Song, Durkan, Murray and Ermon (2021): |score error|^2 weighted by g^2
    edm         (s^2 + sd^2) / sd^2         Karras et al. (2022), table 1: |D - x_0|^2 times (s^2 + sd^2) / (s sd)^2
    min_snr     min(SNR, gamma) / SNR       Hang et al. (2023): |D - x_0|^2 weighted by min(SNR, gamma)
    discrete_bound   beta^2 / (2 c^2 alpha (1 - abar))    Ho et al. (2020), eq. 12: a chain's variational bound

with s = sigma / alpha, since |D - x_0|^2 = s^2 |eps_hat - eps|^2. `uniform_in(view)` is weight 1 on the error of x0, v,
velocity (flow matching's loss) or score instead. Mind the first for an x0 network: its error counts as 1 / s^2 times
itself, without bound at small t, so train it with min_snr, edm or uniform_in("x0").

At alpha = 0 the noise error vanishes, whatever the network, and likelihood, edm and the weights of x0, v and velocity
are infinite. Their product, the loss, has a limit there: they are written as `OnX0`, by their weight on |D - x_0|^2.

Times are drawn by inverting a distribution function, so each sampler can be stratified over the batch: sample i of n
takes its uniform number from [i/n, (i+1)/n), which lowers the variance of the loss and leaves its mean alone.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from scoresde.checks import check_count, check_finite, check_option, check_positive
from scoresde.grid import Grid
from scoresde.sde import SDE
from scoresde.tensors import drawn_from
from scoresde.views import VIEWS, view_of_mean

__all__ = [
    "ImportanceTimes",
    "LevelTimes",
    "LogNormalTimes",
    "OnX0",
    "TimeSampler",
    "UniformTimes",
    "Weighting",
    "discrete_bound",
    "edm",
    "likelihood",
    "min_snr",
    "simple",
    "uniform_in",
]

Weighting = Callable[[SDE, Tensor], Tensor]
"""weighting(sde, t): the weight of the loss at each time, shape (B,)."""


@dataclass(frozen=True)
class OnX0:
    """A weighting by its part in the error of x_0, w |eps_hat - eps|^2 = |root (D - x_0)|^2: for one that is infinite
    at alpha = 0, where the loss of x0, v, velocity and EDM networks is finite all the same.

    Args:
        root: a function (sde, t) -> root, finite for every t > 0.

    >>> from scoresde import FlowSDE
    >>> OnX0(lambda sde, t: torch.ones_like(t))(FlowSDE(), torch.tensor([0.5, 1.0]))  # uniform_in("x0")
    tensor([1., inf])
    """

    root: Callable[[SDE, Tensor], Tensor]

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        alpha = sde.alpha(t)
        return torch.where(alpha == 0, math.inf, (self.root(sde, t) * sde.sigma(t) / alpha) ** 2)


def simple(sde: SDE, t: Tensor) -> Tensor:
    """Weight 1 on the noise error: the simple loss (Ho et al., 2020, eq. 14). It is NCSN's, lambda(sigma) = sigma^2 on
    |s - grad log q|^2 (Song and Ermon, 2019, section 4.2), since sigma s = -eps_hat; lambda = 1 is uniform_in("score").
    """
    return torch.ones_like(t)


def uniform_in(view: str) -> Weighting:
    """Weight 1 on the error of that view ("x0", "v", "velocity", ...): |F_hat - F|^2 / d. "eps" is `simple`."""
    check_option(VIEWS, view=view)
    if view == "eps":
        return simple
    if view == "score":  # finite at alpha = 0, as the score of pure noise is
        return lambda sde, t: sde.sigma(t) ** -2
    return OnX0(lambda sde, t: view_of_mean(view, sde, t)[1])


def _likelihood(sde: SDE, t: Tensor) -> Tensor:
    """sqrt(-d SNR / dt), from g^2 / sigma^2 = -2 lambda' = 2 (alpha sigma' - alpha' sigma) / (alpha sigma)."""
    (alpha_dot, sigma_dot), alpha, sigma = sde.rates(t), sde.alpha(t), sde.sigma(t)
    return (2 * alpha * (alpha * sigma_dot - alpha_dot * sigma) / sigma).sqrt() / sigma


likelihood = OnX0(_likelihood)
"""Weight g^2 / sigma^2 on the noise error (Song et al., 2021, "Maximum Likelihood Training of Score-Based Diffusion
Models", theorem 1): half of its integral over t bounds the KL divergence, per dimension, in nats."""


def discrete_bound(variance: Literal["posterior", "beta"] = "posterior") -> Weighting:
    """A chain's variational bound, L_{n-1} per dimension in nats, where the step n -> n - 1 has a fixed variance c^2:

        beta_n^2 / (2 c^2 alpha_n (1 - abar_n))        alpha_n = 1 - beta_n

    on the noise error (Ho et al., 2020, eq. 12; "simple" leaves it out), which is (SNR_{n-1} - SNR_n) / 2 on the error
    of x_0 if c^2 is the posterior variance. N times the mean over the N nodes is what of the bound depends on the
    network, for `likelihood`'s integral over t is twice its limit. The step from the first node to the data, where the
    posterior variance is 0, has beta_1.

    Args:
        variance: c^2, as `DDPM` names it: "posterior", beta tilde, or "beta".

    Raises:
        ValueError: on another variance; by the loss, on a process that is no chain.
    """
    check_option(("posterior", "beta"), variance=variance)

    def root(sde: SDE, t: Tensor) -> Tensor:
        if sde.nodes is None:
            raise ValueError(f"discrete_bound is of a chain's steps, and {sde!r} has none: take likelihood, its limit")
        s, sigma = t - 1, sde.sigma(t)
        snr, before = (sde.alpha(t) / sigma) ** 2, (sde.alpha(s) / sde.sigma(s)) ** 2
        beta = (sde.alpha(s) / sigma) ** 2 * (1 - snr / before) / 2
        return torch.where(before.isfinite() & (variance == "posterior"), (before - snr) / 2, beta).sqrt()

    return OnX0(root)


def edm(sigma_data: float = 0.5) -> Weighting:
    """EDM's weight for data of that standard deviation (Karras et al., 2022, table 1)."""
    check_positive(sigma_data=sigma_data)
    return OnX0(lambda sde, t: torch.hypot(sde.alpha(t) / sde.sigma(t), torch.full_like(t, 1 / sigma_data)))


def min_snr(gamma: float = 5.0) -> Weighting:
    """Min-SNR-gamma (Hang et al., 2023, section 3.4)."""
    check_positive(gamma=gamma)

    def weight(sde: SDE, t: Tensor) -> Tensor:
        return (gamma * (-2 * sde.half_log_snr(t)).exp()).clamp(max=1)

    return weight


class TimeSampler(ABC):
    """A distribution of training times."""

    stratified: bool

    @abstractmethod
    def quantile(self, sde: SDE, u: Tensor) -> Tensor:
        """The time below which the distribution has mass u, for u in [0, 1)."""

    def ratio(self, sde: SDE, t: Tensor) -> Tensor:
        """Importance ratio by which the loss at t is multiplied."""
        return torch.ones_like(t)

    def draw(
        self, sde: SDE, n: int, generator: torch.Generator | None, device: torch.device | str | None = None
    ) -> Tensor:
        """n times, float64, shape (n,), on the generator's device."""
        generator = drawn_from(generator, device or "cpu")
        u = torch.rand(n, dtype=torch.float64, generator=generator, device=generator.device)
        if self.stratified:
            u = (torch.arange(n, device=u.device) + u) / n
        return self.quantile(sde, u)


@dataclass(frozen=True)
class UniformTimes(TimeSampler):
    """t uniform on [t_min, t_max]; on a `DDPMChain` uniform on its nodes 1..N.

    Args:
        stratified: spread the batch evenly over the distribution.
    """

    stratified: bool = True

    def quantile(self, sde: SDE, u: Tensor) -> Tensor:
        if sde.nodes is not None:
            return (u * len(sde.nodes)).floor() + 1
        return sde.t_min + (sde.t_max - sde.t_min) * u


@dataclass(frozen=True)
class LevelTimes(TimeSampler):
    """L noise levels, each as often as the others: sigma / alpha in a geometric sequence from t_max to t_min (Song and
    Ermon, 2019, section 4.2). They are those of `Grid.log_snr(sde, levels)`, at which `AnnealedLangevin` steps.

    Args:
        levels: L: 10 in that paper; for the next one's choice see `scoresde.solvers.annealed.levels_for`.
        stratified: spread the batch evenly over the levels.

    Raises:
        ValueError: unless levels is a whole number >= 1; by the draw, where alpha is zero at t_max.

    >>> from scoresde import EDMSDE
    >>> LevelTimes(3, stratified=True).draw(EDMSDE(t_min=0.25, t_max=4.0), 6, None)
    tensor([0.2500, 0.2500, 1.0000, 1.0000, 4.0000, 4.0000], dtype=torch.float64)
    """

    levels: int = 10
    stratified: bool = True

    def __post_init__(self) -> None:
        check_count(levels=self.levels)

    def quantile(self, sde: SDE, u: Tensor) -> Tensor:
        rising = Grid.log_snr(sde, self.levels).times[:-1].flip(0).to(u.device)
        return rising[(u * self.levels).long()]


@dataclass(frozen=True)
class LogNormalTimes(TimeSampler):
    """log(sigma / alpha) ~ N(mean, std^2), cut to [t_min, t_max] (Karras et al., 2022, table 1). Part of EDM's
    objective, so the loss is not divided by its density.

    Args:
        mean, std: of log(sigma / alpha).
        stratified: spread the batch evenly over the distribution.

    Raises:
        ValueError: unless both are finite and std > 0.
    """

    mean: float = -1.2
    std: float = 1.2
    stratified: bool = True

    def __post_init__(self) -> None:
        check_finite(mean=self.mean)
        check_positive(std=self.std)

    def quantile(self, sde: SDE, u: Tensor) -> Tensor:
        ends = torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64, device="cpu")
        low, high = torch.special.ndtr((-sde.half_log_snr(ends) - self.mean) / self.std).tolist()
        return sde.time_at(-(self.mean + self.std * torch.special.ndtri(low + (high - low) * u)))


@dataclass(frozen=True)
class ImportanceTimes(TimeSampler):
    """Importance sampling for the likelihood weighting: t with density proportional to g^2 / sigma^2 = -2 lambda',
    which is lambda uniform, by the SDE's closed form (Song et al., 2021, "Maximum Likelihood ...", section 5.1).

    The loss is divided by the density, normalisation included, so its mean is that under `UniformTimes` (of
    continuous t): only its variance changes. With `likelihood` the product of weight and ratio is the same for every t.

    Args:
        stratified: spread the batch evenly over the distribution.

    Raises:
        ValueError: by the draw, where lambda is infinite at t_max (alpha = 0) and there is no such density.
    """

    stratified: bool = True

    def quantile(self, sde: SDE, u: Tensor) -> Tensor:
        low, high = self._range(sde)
        return sde.time_at(high - (high - low) * u).clamp(sde.t_min, sde.t_max)

    def ratio(self, sde: SDE, t: Tensor) -> Tensor:
        low, high = self._range(sde)
        return 2 * (high - low) / (sde.t_max - sde.t_min) / likelihood(sde, t)

    def _range(self, sde: SDE) -> tuple[float, float]:
        low, high = sde.half_log_snr(torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64, device="cpu")).tolist()
        if not math.isfinite(low):
            raise ValueError(f"half_log_snr is -inf at t_max of {sde!r}: give the SDE a t_max where alpha > 0")
        return low, high
