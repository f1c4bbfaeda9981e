"""The straight path, alpha = 1 - t, sigma = t: rectified flow and flow matching."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from scoresde.checks import check_ordered
from scoresde.sde import SDE
from scoresde.tensors import Time, as_time

__all__ = ["FlowSDE"]


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
