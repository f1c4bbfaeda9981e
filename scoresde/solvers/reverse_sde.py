"""The reverse SDE by torchsde's integrators, along one Brownian path per sample.

In half log-SNR lambda, with r = sqrt(alpha^2 + sigma^2), a = alpha / r and D = E[x_0 | x], the state w = x / r follows

    dw = [2 a D - (1 + a^2) w] dlambda + sqrt(2) (sigma / r) dW

which is dy = -2 u eps dlambda + sqrt(2) u dW for y = x / alpha, u = sigma / alpha, turned so that w is of order one at
every noise level (`scoresde.solvers.motion`, tau = 1). The noise does not depend on the state: Ito and
Stratonovich mean the same, Milstein's method is Euler's, and Euler's has strong order 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from scoresde.brownian import BrownianPath
from scoresde.checks import ArgumentError, check_count, check_option, check_positive
from scoresde.denoiser import Denoiser
from scoresde.grid import Grid
from scoresde.noise import NoiseSource
from scoresde.sde import SDE
from scoresde.solvers.base import Solver
from scoresde.solvers.first_order import DDPM
from scoresde.solvers.motion import Budgeted, Motion, legs
from scoresde.tableau import State

__all__ = ["ReverseSDE"]

_EVALUATIONS = {"euler": 1, "milstein": 1, "srk": 3}
"""Evaluations a step."""


@dataclass(frozen=True)
class ReverseSDE(Budgeted):
    """The reverse SDE by a method of torchsde (Li et al., 2020), stepped on the grid's times or to a tolerance.

    The Brownian path of a sample depends on its seed alone, so the same sample converges as steps are added. On a step
    to sigma = 0 the result is D, and a first step from alpha = 0 (`FlowSDE`) is a draw of its own, N(alpha_s D,
    sigma_s^2). Steps should be shorter than about 1 in half log-SNR, where explicit methods become unstable.

    Args:
        method: "euler" or "milstein" (the same here; strong order 1, one evaluation a step), "srk" (Roessler, 2010;
            order 1.5, three evaluations).
        adaptive_steps: choose the steps by step doubling, to the tolerance, on the same path. The grid then only says
            where the run starts and ends and where to report; the steps are one for the batch, and each sample is held
            to its own tolerance as in `AdaptiveODE`. No step is shorter than 2^-10 in half
            log-SNR; a tolerance that asks for shorter ones is not met, and a warning says so (nor is one below 1e-7,
            which torchsde takes for 1e-7). Tolerances are dear, the order on a path being low: on 16 images of
            3 x 8 x 8, rtol = atol = 1e-2, 1e-3 and 1e-4 took 381, 1658 and 7578 evaluations with "euler", 416, 888 and
            2125 with "srk". Every time of the grid ends a step.
        rtol, atol: tolerances of the local error of w, where adaptive_steps.
        max_nfe: evaluations at most, where adaptive_steps, as in `AdaptiveODE`.
        first_step: first step, in half log-SNR, where adaptive_steps.

    Raises:
        ValueError: on an unknown method, or options that are not positive; by `iterate`, before any evaluation,
            if the noise is a bare function: a path needs seed= or generator=.

    >>> from scoresde import VPSDE, sample
    >>> from scoresde.exact import Gaussian
    >>> denoiser = Gaussian(mean=[3.0, -1.0], std=0.5).denoiser(VPSDE())
    >>> sample(denoiser, (4, 2), ReverseSDE("srk"), steps=20, seed=0).nfe
    58
    """

    masks: ClassVar[bool] = True

    method: Literal["euler", "milstein", "srk"] = "euler"
    adaptive_steps: bool = False
    rtol: float = 1e-2
    atol: float = 1e-2
    max_nfe: int = 10_000
    first_step: float = 0.01

    def __post_init__(self) -> None:
        check_option(_EVALUATIONS, method=self.method)
        check_positive(rtol=self.rtol, atol=self.atol, first_step=self.first_step)
        check_count(max_nfe=self.max_nfe)

    @property
    def adaptive(self) -> bool:  # type: ignore[override]
        return self.adaptive_steps

    def evaluations(self, grid: Grid) -> int | None:
        if self.adaptive_steps:
            return None
        parts = legs(grid, free=False)
        steps = sum(not leg.jump for leg in parts)
        return len(parts) - steps + steps * _EVALUATIONS[self.method]

    def within(self, sde: SDE, nfe: int) -> tuple[Solver, Grid]:
        return super().within(sde, nfe) if self.adaptive_steps else Solver.within(self, sde, nfe)

    def loop(
        self, denoiser: Denoiser, x: Tensor, grid: Grid, noise: NoiseSource | None, cond: dict[str, Any]
    ) -> Iterator[State]:
        from scoresde.solvers.torchsde_legs import Legs  # torchsde takes a while to import

        assert noise is not None
        own = denoiser.own(x.shape, cond)
        if own.mask is not None and self.adaptive_steps:
            raise ArgumentError(
                f"{self!r} with masks: torchsde's error is a mean over the batch, with the entries that fill up; take "
                "adaptive_steps=False, or AdaptiveSDE()"
            )
        parts = legs(grid, free=self.adaptive_steps)
        denoiser.check_times(torch.tensor([leg.t for leg in parts], dtype=torch.float64, device="cpu"))
        budget = self.max_nfe if self.adaptive_steps else math.inf
        motion = Motion(denoiser, cond, x.dtype, grid.times, 1.0, budget)
        path = BrownianPath(noise.entropies(len(x)), x.shape[1:], area=True, own=own)
        run = Legs(motion, path, self.method, self.first_step if self.adaptive_steps else None, self.rtol, self.atol)
        return motion.follow(
            x, parts, lambda x, leg: motion.jump(x, leg, DDPM(), noise) if leg.jump else run.follow(x, leg)
        )
