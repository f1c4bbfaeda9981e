"""The forward SDEs of the field, each a pair (alpha_t, sigma_t) with what is known of it in closed form.

VPSDE         alpha^2 + sigma^2 = 1,  beta(t) linear         Song et al. (2021), eq. 11
SubVPSDE      sigma = 1 - alpha^2                            Song et al. (2021), eq. 12
CosineVPSDE   alpha = cos, sigma = sin, but for an offset    Nichol and Dhariwal (2021)
VESDE         alpha = 1,  sigma geometric in t               Song et al. (2021), eq. 9
EDMSDE        alpha = 1,  sigma = t                          Karras et al. (2022)
FlowSDE       alpha = 1 - t,  sigma = t                      rectified flow
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from scoresde.checks import check_ordered, check_positive
from scoresde.sde import SDE, VariancePreserving
from scoresde.tensors import Time, as_time

__all__ = ["EDMSDE", "VESDE", "VPSDE", "CosineVPSDE", "FlowSDE", "SubVPSDE"]


@dataclass(frozen=True)
class _LinearBeta(VariancePreserving):
    """beta(t) = beta_min + (beta_max - beta_min) t on [0, 1]."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-5
    t_max: float = 1.0

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


@dataclass(frozen=True)
class SubVPSDE(_LinearBeta):
    """Sub-VP SDE (Song et al., 2021, eq. 12): sigma = 1 - e^{-B}, below that of VP at every time.

    Arguments and errors as for `VPSDE`.
    """

    def sigma(self, t: Time) -> Tensor:
        return -torch.expm1(-self.integrated_beta(t))

    def width_at(self, t: float) -> float:
        return SDE.width_at(self, t)  # below 1, unlike VP's

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

    def alpha_dot(self, t: Time) -> Tensor:
        return -self._rate * torch.sin(self._rate * (as_time(t) + self.s)) / math.cos(self._rate * self.s)


class _VarianceExploding(SDE):
    """alpha = 1: the data stay where they are under noise that grows without bound."""

    customary_prediction: ClassVar[str] = "edm"

    _customary: ClassVar[tuple[float, float]]  # the smallest and the largest level for data of scale 1

    @property
    @abstractmethod
    def _levels(self) -> tuple[float, float]:
        """The smallest and the largest noise level."""

    @property
    def data_scale(self) -> float:
        # alpha = 1 and sigma have no unit but that of the data, and the levels tell it: by their geometric mean.
        if self.data_std is not None:
            return self.data_std
        return math.sqrt(math.prod(self._levels) / math.prod(self._customary))

    @property
    def t_limit(self) -> float:
        return math.inf

    def width_at(self, t: float) -> float:
        return float(self.sigma(t)) if self.data_std is None else super().width_at(t)

    def alpha(self, t: Time) -> Tensor:
        return torch.ones_like(as_time(t))

    def drift(self, t: Time) -> Tensor:
        return torch.zeros_like(as_time(t))


@dataclass(frozen=True)
class VESDE(_VarianceExploding):
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
    _customary: ClassVar[tuple[float, float]] = (0.01, 50.0)

    def __post_init__(self) -> None:
        check_ordered(sigma_min=self.sigma_min, sigma_max=self.sigma_max)
        check_ordered(t_min=self.t_min, t_max=self.t_max)

    @property
    def _levels(self) -> tuple[float, float]:
        return self.sigma_min, self.sigma_max

    @property
    def _log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def sigma(self, t: Time) -> Tensor:
        t = as_time(t)
        return torch.where(t == 0, torch.zeros_like(t), self.sigma_min * (self._log_ratio * t).exp())

    def half_log_snr(self, t: Time) -> Tensor:
        t = as_time(t)
        return torch.where(t == 0, torch.full_like(t, math.inf), -math.log(self.sigma_min) - self._log_ratio * t)

    def time_at(self, half_log_snr: Time) -> Tensor:
        # What lies between sigma_min and the data, where sigma jumps to zero, is reached only at t = 0.
        return ((-as_time(half_log_snr) - math.log(self.sigma_min)) / self._log_ratio).clamp(min=0)

    def diffusion(self, t: Time) -> Tensor:
        return self.sigma(t) * math.sqrt(2 * self._log_ratio)

    def rates(self, t: Time) -> tuple[Tensor, Tensor]:
        t = as_time(t)  # sigma' at t = 0 is its limit from above: sigma jumps there
        return torch.zeros_like(t), self.sigma_min * self._log_ratio * (self._log_ratio * t).exp()


@dataclass(frozen=True)
class EDMSDE(_VarianceExploding):
    """alpha = 1, sigma = t: time is the noise level (Karras et al., 2022, section 4).

    Args:
        t_min, t_max: smallest and largest noise level, sigma_min and sigma_max of the paper, in units of the data.

    Raises:
        ValueError: unless 0 < t_min < t_max.
    """

    t_min: float = 0.002
    t_max: float = 80.0
    customary_grid: ClassVar[str] = "karras"
    _customary: ClassVar[tuple[float, float]] = (0.002, 80.0)

    def __post_init__(self) -> None:
        check_ordered(t_min=self.t_min, t_max=self.t_max)

    @property
    def _levels(self) -> tuple[float, float]:
        return self.t_min, self.t_max

    def sigma(self, t: Time) -> Tensor:
        return as_time(t).clone()

    def half_log_snr(self, t: Time) -> Tensor:
        return -as_time(t).log()

    def time_at(self, half_log_snr: Time) -> Tensor:
        return (-as_time(half_log_snr)).exp()

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

    customary_prediction: ClassVar[str] = "velocity"

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
