"""Linear forward SDEs. An SDE *is* its pair of scales:

    x_t = alpha_t x_0 + sigma_t eps,    eps ~ N(0, I)
    dx  = f(t) x dt + g(t) dw,          f = (log alpha)',    g^2 = (sigma^2)' - 2 f sigma^2 = -2 sigma^2 lambda'
    lambda_t = half_log_snr(t) = log(alpha_t / sigma_t)

Data is at t = 0, where alpha = 1 and sigma = 0 exactly. Every method takes a time of any shape, on any device, as a
float or a tensor, and returns a tensor of that shape in its dtype (a Python number counts as float64, a half-precision
time is raised to float32). Nothing here subtracts nearly equal numbers, so t = 1e-5 is accurate in float32.

Source: Song et al. (2021), "Score-Based Generative Modeling through Stochastic Differential Equations", sections 3.4
and B; the other families name theirs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from scoresde.checks import check_ordered, check_positive
from scoresde.tensors import Time, as_time, check_batch, expand_like

__all__ = ["EDMSDE", "SDE", "VESDE", "VPSDE", "CosineVPSDE", "FlowSDE", "SubVPSDE"]


class SDE(ABC):
    """A linear forward SDE. A subclass gives alpha, sigma, t_min and t_max; everything else follows from them, and what
    it knows in closed form it may give too.

    >>> class Cosine(SDE):
    ...     t_min, t_max = 1e-3, 0.99
    ...
    ...     def alpha(self, t):
    ...         return torch.cos(torch.pi / 2 * as_time(t))
    ...
    ...     def sigma(self, t):
    ...         return torch.sin(torch.pi / 2 * as_time(t))
    >>> print(f"{Cosine().diffusion(0.5):.4f} {Cosine().time_at(0.0):.4f}")
    1.7725 0.5000

    Attributes:
        t_min: the smallest time that training draws and that logarithmic grids end at; in (0, t_max).
        t_max: the time of the prior.
        prior_std: standard deviation of the prior N(0, prior_std^2 I) that sampling starts from.
        customary_grid: name of the `Grid` constructor that `sample(steps=N)` uses where the solver has no wish.
    """

    t_min: float
    t_max: float
    customary_grid: ClassVar[str] = "uniform"

    @abstractmethod
    def alpha(self, t: Time) -> Tensor:
        """Scale of the data, alpha_t."""

    @abstractmethod
    def sigma(self, t: Time) -> Tensor:
        """Standard deviation of the noise, sigma_t."""

    def half_log_snr(self, t: Time) -> Tensor:
        """lambda_t = log(alpha_t / sigma_t), strictly decreasing in t; +inf at sigma = 0 and -inf at alpha = 0."""
        return self.alpha(t).log() - self.sigma(t).log()

    def time_at(self, half_log_snr: Time) -> Tensor:
        """The time at which `half_log_snr` is reached: zero at +inf. Closed forms for the SDEs here, else bisection."""
        wanted = as_time(half_log_snr)
        low, high = torch.zeros_like(wanted), torch.full_like(wanted, self.t_max)
        for _ in range(64):
            middle = (low + high) / 2
            noisier = self.half_log_snr(middle) < wanted
            low, high = torch.where(noisier, low, middle), torch.where(noisier, middle, high)
        return torch.where(wanted == math.inf, torch.zeros_like(low), (low + high) / 2)

    def drift(self, t: Time) -> Tensor:
        """f(t) = (log alpha)', the factor of x in the drift, per unit of time."""
        return self.rates(t)[0] / self.alpha(t)

    def diffusion(self, t: Time) -> Tensor:
        """g(t), the diffusion coefficient (not its square)."""
        sigma, (_, sigma_dot) = self.sigma(t), self.rates(t)
        return (2 * sigma * (sigma_dot - self.drift(t) * sigma)).sqrt()

    def rates(self, t: Time) -> tuple[Tensor, Tensor]:
        """(alpha', sigma') at t, so that the probability-flow velocity is alpha' E[x0|x] + sigma' E[eps|x]. In closed
        form for the SDEs here, else by automatic differentiation.
        """
        t = as_time(t)
        alpha_dot, sigma_dot = (
            torch.func.jvp(scale, (t,), (torch.ones_like(t),))[1] for scale in (self.alpha, self.sigma)
        )
        return alpha_dot, sigma_dot

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(type(self))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in vars(self).items())})"

    def prior_std_at(self, t: float) -> float:
        """Width of the prior for a run that starts at t instead of t_max."""
        return 1.0

    @property
    def prior_std(self) -> float:
        return self.prior_std_at(self.t_max)

    @property
    def t_limit(self) -> float:
        """The largest time at which the scales are defined: where a solver that adds noise (EDM's churn) may stand."""
        return self.t_max

    def perturb(self, x0: Tensor, t: Time, noise: Tensor) -> Tensor:
        """x_t = alpha_t x0 + sigma_t noise.

        Args:
            x0: data, shape (B, ...), floating point.
            t: time, shape () or (B,).
            noise: standard normal, shape of x0.

        Raises:
            ValueError: if x0 is not floating point, or the shapes of x0, noise and t do not fit.
        """
        check_batch(x0, "x0")
        if noise.shape != x0.shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, x0 {tuple(x0.shape)}: they must be equal")
        t = as_time(t)
        return expand_like(self.alpha(t), x0) * x0 + expand_like(self.sigma(t), x0) * noise

    def prior(
        self,
        shape: Sequence[int],
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        t: float | None = None,
    ) -> Tensor:
        """A draw from N(0, prior_std^2 I).

        Args:
            shape: (B, ...).
            generator: drawn from, on its own device; without one, a freshly seeded generator on `device`.
            device: where the result lies; the generator's device by default.
            t: where the run starts, if not at t_max: on VE and EDM the prior's width is sigma_t.
        """
        if generator is None:
            generator = torch.Generator(device or "cpu")
            generator.seed()
        std = self.prior_std if t is None else self.prior_std_at(t)
        x = std * torch.randn(tuple(shape), generator=generator, dtype=dtype, device=generator.device)
        return x if device is None else x.to(device)

    def prior_log_prob(self, x: Tensor) -> Tensor:
        """log N(x; 0, prior_std^2 I) in nats, shape (B,), for x of shape (B, ...)."""
        z = x.reshape(x.shape[0], -1) / self.prior_std
        return -0.5 * (z**2).sum(-1) - z.shape[1] * (math.log(self.prior_std) + 0.5 * math.log(2 * math.pi))


class VariancePreserving(SDE):
    """alpha^2 + sigma^2 = 1, by B(t) = int_0^t beta: alpha = e^{-B/2}, f = -beta / 2, g^2 = beta."""

    @abstractmethod
    def beta(self, t: Time) -> Tensor:
        """Noise rate beta(t), per unit of time."""

    @abstractmethod
    def integrated_beta(self, t: Time) -> Tensor:
        """B(t) = int_0^t beta = -2 log alpha."""

    @abstractmethod
    def time_at_integrated_beta(self, integrated_beta: Tensor) -> Tensor:
        """Inverse of `integrated_beta`."""

    def alpha(self, t: Time) -> Tensor:
        return (-self.integrated_beta(t) / 2).exp()

    def sigma(self, t: Time) -> Tensor:
        return (-torch.expm1(-self.integrated_beta(t))).sqrt()

    def half_log_snr(self, t: Time) -> Tensor:
        B = self.integrated_beta(t)
        return -(B + (-torch.expm1(-B)).log()) / 2

    def time_at(self, half_log_snr: Time) -> Tensor:
        minus_log_snr = -2 * as_time(half_log_snr)
        return self.time_at_integrated_beta(torch.logaddexp(minus_log_snr, torch.zeros_like(minus_log_snr)))

    def drift(self, t: Time) -> Tensor:
        return -self.beta(t) / 2

    def diffusion(self, t: Time) -> Tensor:
        return self.beta(t).sqrt()

    def rates(self, t: Time) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.alpha(t), self.sigma(t)
        alpha_dot = self.drift(t) * alpha
        return alpha_dot, -alpha * alpha_dot / sigma  # f sigma + g^2 / (2 sigma) would cancel where B is large


class _LinearBeta(VariancePreserving):
    """beta(t) = beta_min + (beta_max - beta_min) t on [0, 1]."""

    beta_min: float
    beta_max: float

    def __post_init__(self) -> None:
        check_positive(beta_min=self.beta_min)
        if not (math.isfinite(self.beta_max) and self.beta_max >= self.beta_min):
            raise ValueError(f"beta_max={self.beta_max}: expected a finite number >= beta_min={self.beta_min}")
        check_ordered(t_min=self.t_min, t_max=self.t_max)

    def beta(self, t: Time) -> Tensor:
        return self.beta_min + (self.beta_max - self.beta_min) * as_time(t)

    def integrated_beta(self, t: Time) -> Tensor:
        t = as_time(t)
        return t * (self.beta_min + (self.beta_max - self.beta_min) * t / 2)

    def time_at_integrated_beta(self, integrated_beta: Tensor) -> Tensor:
        # The root of slope t^2 / 2 + beta_min t = B in its form without cancellation at small B.
        slope = self.beta_max - self.beta_min
        return 2 * integrated_beta / (self.beta_min + (self.beta_min**2 + 2 * slope * integrated_beta).sqrt())


@dataclass(frozen=True)
class VPSDE(_LinearBeta):
    """Variance-preserving SDE with linear beta (Song et al., 2021, eq. 11): the limit of DDPM.

    Args:
        beta_min, beta_max: noise rate at t = 0 and t = 1, per unit of time.

    Raises:
        ValueError: unless 0 < beta_min <= beta_max and 0 < t_min < t_max.

    >>> sde = VPSDE()
    >>> print(f"{sde.alpha(0.5):.4f} {sde.sigma(0.5):.4f} {sde.half_log_snr(0.5):.4f}")
    0.2812 0.9597 -1.2276
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-5
    t_max: float = 1.0


@dataclass(frozen=True)
class SubVPSDE(_LinearBeta):
    """Sub-VP SDE (Song et al., 2021, eq. 12): sigma = 1 - e^{-B}, below that of VP at every time.

    Arguments and errors as for `VPSDE`.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-5
    t_max: float = 1.0

    def sigma(self, t: Time) -> Tensor:
        return -torch.expm1(-self.integrated_beta(t))

    def half_log_snr(self, t: Time) -> Tensor:
        B = self.integrated_beta(t)
        return -B / 2 - (-torch.expm1(-B)).log()

    def time_at(self, half_log_snr: Time) -> Tensor:
        # sigma / alpha = 2 sinh(B / 2)
        return self.time_at_integrated_beta(2 * torch.asinh((-as_time(half_log_snr)).exp() / 2))

    def diffusion(self, t: Time) -> Tensor:
        return (self.beta(t) * -torch.expm1(-2 * self.integrated_beta(t))).sqrt()

    def rates(self, t: Time) -> tuple[Tensor, Tensor]:
        alpha = self.alpha(t)
        alpha_dot = self.drift(t) * alpha
        return alpha_dot, -2 * alpha * alpha_dot  # finite at t = 0


@dataclass(frozen=True)
class CosineVPSDE(VariancePreserving):
    """VP SDE with alpha(t) = cos(th_t) / cos(th_0), th_t = (pi / 2) (t + s) / (1 + s) (Nichol and Dhariwal, 2021).

    Args:
        s: offset that keeps the noise rate at t = 0 above zero.
        t_max: the default, 0.9946, is where Lu et al. (2022, DPM-Solver, appendix D) stop; at t = 1 alpha is zero, so
            eps and score networks cannot start there.

    Raises:
        ValueError: unless s > 0 and 0 < t_min < t_max <= 1.
    """

    s: float = 0.008
    t_min: float = 1e-5
    t_max: float = 0.9946

    def __post_init__(self) -> None:
        check_positive(s=self.s)
        check_ordered(t_min=self.t_min, t_max=self.t_max)
        if self.t_max > 1:
            raise ValueError(f"t_max={self.t_max}: alpha is zero at t = 1 and negative beyond; expected t_max <= 1")

    @property
    def _rate(self) -> float:
        return math.pi / 2 / (1 + self.s)

    def _sines(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """sin^2 th_t - sin^2 th_0 as sin(th_t - th_0) sin(th_t + th_0), and cos th_t, by differences that are exact."""
        return torch.sin(self._rate * t) * torch.sin(self._rate * (t + 2 * self.s)), torch.sin(self._rate * (1 - t))

    def alpha(self, t: Time) -> Tensor:
        return self._sines(as_time(t))[1] / math.sin(self._rate)

    def sigma(self, t: Time) -> Tensor:
        return self._sines(as_time(t))[0].sqrt() / math.sin(self._rate)

    def half_log_snr(self, t: Time) -> Tensor:
        sin2, cos = self._sines(as_time(t))
        return cos.log() - sin2.log() / 2

    def beta(self, t: Time) -> Tensor:
        t = as_time(t)
        return 2 * self._rate * torch.sin(self._rate * (t + self.s)) / self._sines(t)[1]

    def integrated_beta(self, t: Time) -> Tensor:
        return -torch.log1p(-(self.sigma(t) ** 2))

    def time_at_integrated_beta(self, integrated_beta: Tensor) -> Tensor:
        th_0 = self._rate * self.s
        sin2 = -torch.expm1(-integrated_beta) * math.cos(th_0) ** 2
        sin, cos = (math.sin(th_0) ** 2 + sin2).sqrt(), (-integrated_beta / 2).exp() * math.cos(th_0)
        # th_t - th_0 from its sine and cosine, the sine as sin2 / sin(th_t + th_0): no cancellation at either end.
        difference = torch.atan2(
            sin2 / (sin * math.cos(th_0) + cos * math.sin(th_0)), cos * math.cos(th_0) + sin * math.sin(th_0)
        )
        return difference / self._rate

    def rates(self, t: Time) -> tuple[Tensor, Tensor]:
        t = as_time(t)
        alpha_dot = -self._rate * torch.sin(self._rate * (t + self.s)) / math.cos(self._rate * self.s)
        return alpha_dot, -self.alpha(t) * alpha_dot / self.sigma(t)  # finite at alpha = 0, where f is not


@dataclass(frozen=True)
class VESDE(SDE):
    """Variance-exploding SDE (Song et al., 2021, eq. 9): alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t.

    The formula holds for t in (0, 1]; sigma(0) = 0, as in the paper's appendix C, so a grid may end on the data itself.

    Args:
        sigma_min, sigma_max: noise level at t -> 0 and at t = 1, in units of the data; sigma_max is about the largest
            distance between two data points (Song and Ermon, 2020, technique 1).

    Raises:
        ValueError: unless 0 < sigma_min < sigma_max and 0 < t_min < t_max.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    t_min: float = 1e-5
    t_max: float = 1.0

    def __post_init__(self) -> None:
        check_ordered(sigma_min=self.sigma_min, sigma_max=self.sigma_max)
        check_ordered(t_min=self.t_min, t_max=self.t_max)

    @property
    def t_limit(self) -> float:
        return math.inf

    def prior_std_at(self, t: float) -> float:
        return float(self.sigma(t))

    @property
    def _log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def alpha(self, t: Time) -> Tensor:
        return torch.ones_like(as_time(t))

    def sigma(self, t: Time) -> Tensor:
        t = as_time(t)
        return torch.where(t == 0, torch.zeros_like(t), self.sigma_min * (self._log_ratio * t).exp())

    def half_log_snr(self, t: Time) -> Tensor:
        t = as_time(t)
        return torch.where(t == 0, torch.full_like(t, math.inf), -math.log(self.sigma_min) - self._log_ratio * t)

    def time_at(self, half_log_snr: Time) -> Tensor:
        # What lies between sigma_min and the data, where sigma jumps to zero, is reached only at t = 0.
        return ((-as_time(half_log_snr) - math.log(self.sigma_min)) / self._log_ratio).clamp(min=0)

    def drift(self, t: Time) -> Tensor:
        return torch.zeros_like(as_time(t))

    def diffusion(self, t: Time) -> Tensor:
        return self.sigma(t) * math.sqrt(2 * self._log_ratio)

    def rates(self, t: Time) -> tuple[Tensor, Tensor]:
        t = as_time(t)  # sigma' at t = 0 is its limit from above: sigma jumps there
        return torch.zeros_like(t), self.sigma_min * self._log_ratio * (self._log_ratio * t).exp()


@dataclass(frozen=True)
class EDMSDE(SDE):
    """alpha = 1, sigma = t: time is the noise level (Karras et al., 2022, section 4).

    Args:
        t_min, t_max: smallest and largest noise level, sigma_min and sigma_max of the paper, in units of the data.

    Raises:
        ValueError: unless 0 < t_min < t_max.
    """

    t_min: float = 0.002
    t_max: float = 80.0
    customary_grid: ClassVar[str] = "karras"

    def __post_init__(self) -> None:
        check_ordered(t_min=self.t_min, t_max=self.t_max)

    @property
    def t_limit(self) -> float:
        return math.inf

    def prior_std_at(self, t: float) -> float:
        return float(self.sigma(t))

    def alpha(self, t: Time) -> Tensor:
        return torch.ones_like(as_time(t))

    def sigma(self, t: Time) -> Tensor:
        return as_time(t).clone()

    def half_log_snr(self, t: Time) -> Tensor:
        return -as_time(t).log()

    def time_at(self, half_log_snr: Time) -> Tensor:
        return (-as_time(half_log_snr)).exp()

    def drift(self, t: Time) -> Tensor:
        return torch.zeros_like(as_time(t))

    def diffusion(self, t: Time) -> Tensor:
        return (2 * as_time(t)).sqrt()

    def rates(self, t: Time) -> tuple[Tensor, Tensor]:
        t = as_time(t)
        return torch.zeros_like(t), torch.ones_like(t)


@dataclass(frozen=True)
class FlowSDE(SDE):
    """alpha = 1 - t, sigma = t: the straight path of rectified flow and flow matching (Liu et al., 2023; Lipman et al.,
    2023), with noise at t = 1. There alpha is zero, f and g are infinite and eps and score networks are undefined;
    velocity and x0 networks are not.

    Raises:
        ValueError: unless 0 < t_min < t_max <= 1.
    """

    t_min: float = 1e-5
    t_max: float = 1.0

    def __post_init__(self) -> None:
        check_ordered(t_min=self.t_min, t_max=self.t_max)
        if self.t_max > 1:
            raise ValueError(f"t_max={self.t_max}: alpha = 1 - t is negative beyond t = 1; expected t_max <= 1")

    def alpha(self, t: Time) -> Tensor:
        return 1 - as_time(t)

    def sigma(self, t: Time) -> Tensor:
        return as_time(t).clone()

    def half_log_snr(self, t: Time) -> Tensor:
        t = as_time(t)
        return torch.log1p(-t) - t.log()

    def time_at(self, half_log_snr: Time) -> Tensor:
        return torch.sigmoid(-as_time(half_log_snr))

    def drift(self, t: Time) -> Tensor:
        return -1 / (1 - as_time(t))

    def diffusion(self, t: Time) -> Tensor:
        t = as_time(t)
        return (2 * t / (1 - t)).sqrt()

    def rates(self, t: Time) -> tuple[Tensor, Tensor]:
        t = as_time(t)
        return -torch.ones_like(t), torch.ones_like(t)
