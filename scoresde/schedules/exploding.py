"""SDEs that leave the data as they are and add noise.

VESDE         alpha = 1,  sigma geometric in t               Song et al. (2021), eq. 9
EDMSDE        alpha = 1,  sigma = t                          Karras et al. (2022)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from scoresde.checks import check_ordered
from scoresde.sde import SDE
from scoresde.tensors import Time, as_time

__all__ = ["EDMSDE", "VESDE"]


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

    customary_prediction: ClassVar[str] = "edm"

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

    customary_prediction: ClassVar[str] = "edm"

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
