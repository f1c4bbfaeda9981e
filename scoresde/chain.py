"""Discrete diffusion chains as SDEs: the VP SDE whose exact discretisation is the chain."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from scoresde.checks import check_positive
from scoresde.sde import VariancePreserving
from scoresde.tensors import Time, as_time

__all__ = ["DDPMChain"]


class DDPMChain(VariancePreserving):
    """A discrete DDPM chain, exact at its nodes t = 1..N and continuous between them (Ho et al., 2020).

    Node n has alpha_n^2 = prod_{i<=n} (1 - beta_i), and t = 0 is the data. Between nodes log alpha is linear in t: the
    VP SDE of rate beta(t) = -log(1 - beta_n) on (n - 1, n], which has the chain as its exact discretisation.

    With beta_N = 1 node N is pure noise (zero terminal SNR; Lin et al., 2024, "Common diffusion noise schedules and
    sample steps are flawed"), which x0, v and velocity networks can be trained on and sampled from. Log alpha has no
    line to minus infinity, so between the last two nodes alpha itself is linear in t, as on `FlowSDE`.

    Args:
        betas: beta_1..beta_N, each in (0, 1), but that beta_N may be 1; by default the linear schedule of DDPM with
            N = 1000.

    Raises:
        ValueError: if betas is not one-dimensional, is empty, or leaves (0, 1); if it is no schedule of betas: falling
            from above 1/2, as alphas and their products do, or with no signal left in float32 before the last node, as
            1 minus these products.

    >>> DDPMChain.cosine(1000).t_max
    1000.0
    """

    customary_grid: ClassVar[str] = "strided"

    def __init__(self, betas: Tensor | Sequence[float] | None = None) -> None:
        betas = _linear_betas(1000) if betas is None else torch.as_tensor(betas, dtype=torch.float64, device="cpu")
        if betas.ndim != 1 or len(betas) == 0:
            raise ValueError(f"betas has shape {tuple(betas.shape)}: expected one dimension, beta_1..beta_N")
        inside = (betas > 0) & (betas < 1)
        inside[-1] |= betas[-1] == 1
        if not bool(inside.all()):
            worst = int(inside.int().argmin())
            raise ValueError(
                f"beta_{worst + 1} = {float(betas[worst])}: each beta must lie in (0, 1), the last one may be 1"
            )
        _check_meaning(betas)
        self.betas = betas.detach().clone()
        self.steps = len(betas)
        self._ends_in_noise = bool(betas[-1] == 1)
        self.t_min, self.t_max = 1.0, float(self.steps)
        self.nodes = torch.arange(1, self.steps + 1, dtype=torch.float64, device="cpu")
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    @classmethod
    def linear(cls, steps: int = 1000, beta_min: float = 1e-4, beta_max: float = 0.02) -> DDPMChain:
        """Linear betas (Ho et al., 2020, section 4); for another N pass the range scaled by 1000 / N yourself."""
        return cls(_linear_betas(steps, beta_min, beta_max))

    @classmethod
    def cosine(cls, steps: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> DDPMChain:
        """Cosine betas, beta_n = min(1 - abar_n / abar_{n-1}, max_beta) (Nichol and Dhariwal, 2021, eq. 17); with
        max_beta = 1 the last is 1.
        """
        check_positive(steps=steps, s=s, max_beta=max_beta)
        t = torch.linspace(0, 1, steps + 1, dtype=torch.float64, device="cpu")
        cos2 = torch.cos((t + s) / (1 + s) * math.pi / 2) ** 2
        return cls((1 - cos2[1:] / cos2[:-1]).clamp(max=max_beta))

    def label(self, t: Tensor) -> Tensor:
        """t - 1, a time label for networks that count the chain's nodes from 0: `EpsDenoiser(net, chain,
        time=chain.label)`. At the nodes it is the row of a table, between them it is continuous, as adaptive solvers
        want it. (A network with a table of rows, torch.nn.Embedding say, takes whole numbers alone:
        `time=lambda t: t.round().long() - 1`.)
        """
        return t - 1

    def _rates_and_integral(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """beta of each interval, (N,), and B at nodes 0..N, on the device and in the dtype of `like`; kept, so that a
        loop on a GPU copies them once. The last interval counts nothing where beta_N = 1: there alpha is linear.
        """
        key = (like.device, like.dtype)
        if key not in self._tables:
            rates = torch.where(self.betas == 1, 0.0, -torch.log1p(-self.betas))
            B = torch.cat([rates.new_zeros(1), rates.cumsum(0)])
            self._tables[key] = rates.to(like), B.to(like)
        return self._tables[key]

    def _interval(self, t: Tensor) -> Tensor:
        """n of the interval (n - 1, n] that holds t."""
        return t.ceil().clamp(1, self.steps).long()

    def _to_noise(self, t: Tensor) -> Tensor:
        """Where alpha is linear in t, down to zero, if the chain ends in noise."""
        return self._interval(t) == self.steps

    def beta(self, t: Time) -> Tensor:
        t = as_time(t)
        rates = self._rates_and_integral(t)[0][self._interval(t) - 1]
        return torch.where(self._to_noise(t), 2 / (self.steps - t), rates) if self._ends_in_noise else rates

    def alpha_dot(self, t: Time) -> Tensor:
        if not self._ends_in_noise:
            return super().alpha_dot(t)
        t = as_time(t)
        before = (-self._rates_and_integral(t)[1][-1] / 2).exp()  # alpha_{N-1}
        return torch.where(self._to_noise(t), -before, super().alpha_dot(t))

    def integrated_beta(self, t: Time) -> Tensor:
        t = as_time(t)
        (_, B), n = self._rates_and_integral(t), self._interval(t)
        found = torch.lerp(B[n - 1], B[n], t - (n - 1))
        if not self._ends_in_noise:
            return found
        # alpha = alpha_{N-1} (N - t); elsewhere the argument is harmless, to the gradient too
        return found - 2 * torch.where(self._to_noise(t), self.steps - t, torch.ones_like(t)).log()

    def time_at_integrated_beta(self, integrated_beta: Tensor) -> Tensor:
        rates, B = self._rates_and_integral(integrated_beta)
        n = torch.searchsorted(B, integrated_beta.contiguous()).clamp(1, self.steps)
        excess, rate = integrated_beta - B[n - 1], rates[n - 1]
        if not self._ends_in_noise:
            return (n - 1) + excess / rate
        return (n - 1) + torch.where(rate == 0, -torch.expm1(-excess / 2), excess / rate)

    def frozen_state(self) -> dict[str, Any]:
        """All but what is kept of the rest (see `scoresde.tensors.frozen`)."""
        return {name: value for name, value in vars(self).items() if name != "_tables"}

    def arrays(self) -> dict[str, Tensor]:
        return {"betas": self.betas}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DDPMChain) and torch.equal(self.betas, other.betas) and self.data_std == other.data_std

    def __hash__(self) -> int:
        return hash((self.steps, float(self.betas.sum())))

    def _call(self) -> str:
        digest = hashlib.sha256(self.betas.numpy().tobytes()).hexdigest()[:8]
        return f"DDPMChain(N={self.steps}, beta_1={self.betas[0]:.4g}, beta_N={self.betas[-1]:.4g}, sha256={digest})"


def _check_meaning(betas: Tensor) -> None:
    """Raises ValueError if they must be something else of the schedule: what the field also has an array of."""
    first, last, before = float(betas[0]), float(betas[-1]), betas[:-1]
    if last < first and first > 0.5 and bool((betas.diff() <= 0).all()):
        raise ValueError(
            f"betas fall from {first:.6g} to {last:.6g}, as alphas and their products do: give 1 - alphas, or of "
            "the products abar 1 - abar_n / abar_{n-1} (abar_0 = 1)"
        )
    if float(torch.log1p(-before).sum() / 2) < math.log(torch.finfo(torch.float32).tiny):
        raise ValueError(
            f"betas up to {last:.6g} leave no signal before the last node (alpha_{{N-1}} = 0 in float32), as 1 "
            "minus the products abar would: give 1 - abar_n / abar_{n-1} (abar_0 = 1)"
        )


def _linear_betas(steps: int, beta_min: float = 1e-4, beta_max: float = 0.02) -> Tensor:
    check_positive(steps=steps, beta_min=beta_min, beta_max=beta_max)
    return torch.linspace(beta_min, beta_max, steps, dtype=torch.float64, device="cpu")
