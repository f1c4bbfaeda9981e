"""First-order solvers: one evaluation a step, x_s = a x_t + b D(x_t, t) + c z.

DDPM and DDIM share the marginal-preserving step: any c^2 in [0, sigma_s^2] with

    a = sqrt(sigma_s^2 - c^2) / sigma_t,    b = alpha_s - a alpha_t

maps alpha_t x_0 + sigma_t eps to the law of alpha_s x_0 + sigma_s eps. With h = lambda_s - lambda_t, the posterior
variance of the forward process is sigma_s^2 (1 - e^{-2h}) ("beta tilde"), and its one-step variance from s to t is
sigma_t^2 (1 - e^{-2h}) ("beta").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from scoresde.grid import Grid
from scoresde.solvers.base import Solver, one_step
from scoresde.tableau import Tableau

__all__ = ["DDIM", "DDPM", "EulerMaruyama"]


def _forgotten(grid: Grid) -> Tensor:
    """1 - e^{-2h} of each step, in [0, 1]: the share of x_t's noise that x_s does not keep."""
    half_log_snr = grid.sde.half_log_snr(grid.times)
    return -torch.expm1(-2 * half_log_snr.diff())


@dataclass(frozen=True)
class DDIM(Solver):
    """Denoising diffusion implicit model (Song, Meng and Ermon, 2021, eq. 12 and 16), on any SDE and any sub-sequence.

    x_s = alpha_s D + sqrt(sigma_s^2 - c^2) eps + c z,    c^2 = eta^2 sigma_s^2 (1 - e^{-2h})

    Args:
        eta: 0 is deterministic (and is DPM-Solver-1), 1 is DDPM with the posterior variance.

    Raises:
        ValueError: unless eta >= 0 is finite; by `tableau`, where eta > 1 would ask for more noise than sigma_s.
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta < math.inf:
            raise ValueError(f"eta={self.eta}: expected a finite number >= 0")

    def tableau(self, grid: Grid) -> Tableau:
        alpha_t, sigma_t, alpha_s, sigma_s = grid.pairs()
        c2 = (self.eta * sigma_s) ** 2 * _forgotten(grid)
        if bool((c2 > sigma_s**2).any()):
            raise ValueError(f"eta={self.eta} asks for more noise than sigma_s on a step of {grid!r}: take eta <= 1")
        a = (sigma_s**2 - c2).sqrt() / sigma_t
        return one_step(grid, a, alpha_s - a * alpha_t, c2.sqrt())


@dataclass(frozen=True)
class DDPM(Solver):
    """Ancestral sampling of DDPM (Ho et al., 2020, algorithm 2), on any SDE and any sub-sequence.

    x_s = (alpha_s / alpha_t) e^{-2h} x_t + alpha_s (1 - e^{-2h}) D + c z,  e^{-h} = alpha_t sigma_s / (alpha_s sigma_t)

    Args:
        variance: "posterior" is c^2 = sigma_s^2 (1 - e^{-2h}), beta tilde of the paper, right for data that is a point;
            "beta" is c^2 = sigma_t^2 (1 - e^{-2h}), right for data that is N(0, I) on a VP SDE. No noise is added on
            the last step, to sigma_s = 0.

    Raises:
        ValueError: on another variance.
    """

    variance: Literal["posterior", "beta"] = "posterior"

    def __post_init__(self) -> None:
        if self.variance not in ("posterior", "beta"):
            raise ValueError(f"variance={self.variance!r}: expected 'posterior' or 'beta'")

    def tableau(self, grid: Grid) -> Tableau:
        alpha_t, sigma_t, alpha_s, sigma_s = grid.pairs()
        forgotten = _forgotten(grid)
        a = sigma_s * (1 - forgotten).sqrt() / sigma_t
        c = (sigma_s if self.variance == "posterior" else sigma_t) * forgotten.sqrt()
        return one_step(grid, a, alpha_s - a * alpha_t, c)


@dataclass(frozen=True)
class EulerMaruyama(Solver):
    """Euler-Maruyama on the reverse SDE (Song et al., 2021, eq. 6), with h = t - s and coefficients at t:

    x_s = x_t - h (f x_t - g^2 score) + g sqrt(h) z

    The last step, to sigma = 0, is the denoiser's mean: the SDE's own drift is infinite there. Likewise the first from
    alpha = 0 (`FlowSDE`), where f and g are infinite, is the exact draw N(alpha_s D, sigma_s^2). The method is first
    order in the step of t, so it wants many steps, and on `EDMSDE` (where g^2 = 2 t) more than any other solver.
    """

    def tableau(self, grid: Grid) -> Tableau:
        t, h = grid.times[:-1], -grid.times.diff()
        alpha_t, sigma_t, _, _ = grid.pairs()
        f, g = grid.sde.drift(t), grid.sde.diffusion(t)
        pull = h * (g / sigma_t) ** 2  # h g^2 score = pull (alpha D - x)
        return one_step(grid, 1 - h * f - pull, pull * alpha_t, g * h.sqrt())
