"""The reverse SDE by torchsde's integrators, along one Brownian path per sample.

In half log-SNR lambda, with r = sqrt(alpha^2 + sigma^2), a = alpha / r and D = E[x_0 | x], the state w = x / r follows

    dw = [2 a D - (1 + a^2) w] dlambda + sqrt(2) (sigma / r) dW

which is dy = -2 u eps dlambda + sqrt(2) u dW for y = x / alpha, u = sigma / alpha, turned so that w is of order one at
every noise level (`scoresde.solvers.motion`, tau = 1). The noise does not depend on the state: Ito and
Stratonovich mean the same, Milstein's method is Euler's, and Euler's has strong order 1.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torchsde
from torch import Tensor

from scoresde.brownian import BrownianPath, TorchsdePath
from scoresde.checks import check_count, check_option, check_tolerances
from scoresde.denoiser import Denoiser
from scoresde.grid import Grid
from scoresde.noise import NoiseSource
from scoresde.sde import SDE
from scoresde.solvers.base import Solver
from scoresde.solvers.first_order import DDPM
from scoresde.solvers.motion import Budgeted, Leg, Motion, NonFinite, OutOfBudget, legs
from scoresde.tableau import State

__all__ = ["ReverseSDE"]

_EVALUATIONS = {"euler": 1, "milstein": 1, "srk": 3, "reversible_heun": 2}
"""Evaluations a step."""

_SHORTEST = 2**-10  # of adaptive steps; below, its halves would lie in one cell of the path


@dataclass(frozen=True)
class ReverseSDE(Budgeted):
    """The reverse SDE by a method of torchsde (Li et al., 2020), stepped on the grid's times or to a tolerance.

    The Brownian path of a sample depends on its seed alone, so the same sample converges as steps are added. On a step
    to sigma = 0 the result is D, and a first step from alpha = 0 (`FlowSDE`) is a draw of its own, N(alpha_s D,
    sigma_s^2). Steps should be shorter than about 1 in half log-SNR, where explicit methods become unstable.

    Args:
        method: "euler" or "milstein" (the same here; strong order 1, one evaluation a step), "srk" (Roessler, 2010;
            order 1.5, three evaluations), "reversible_heun" (Kidger et al., 2021; order 1, two evaluations: its second
            state is taken up anew in each step. Carried from step to step, as the paper has it, a step would cost one
            evaluation, but the two states part where the drift contracts, as it does here: on data in two modes the
            error at 512 steps was still 100 times that of "euler").
        adaptive_steps: choose the steps by step doubling, to the tolerance, on the same path. The grid then only says
            where the run starts and ends and where to report; the steps are one for the batch, and each sample is held
            to its own tolerance as in `AdaptiveODE`. Not for "reversible_heun". No step is shorter than 2^-10 in half
            log-SNR; a tolerance that asks for shorter ones is not met, and a warning says so (nor is one below 1e-7,
            which torchsde takes for 1e-7). Tolerances are dear, the order on a path being low: on 16 images of
            3 x 8 x 8, rtol = atol = 1e-2, 1e-3 and 1e-4 took 381, 1658 and 7578 evaluations with "euler", 416, 888 and
            2125 with "srk". Every time of the grid ends a step.
        rtol, atol: tolerances of the local error of w, where adaptive_steps.
        max_nfe: evaluations at most, where adaptive_steps, as in `AdaptiveODE`.
        first_step: first step, in half log-SNR, where adaptive_steps.
        path: the samples' Brownian paths, "tree" for `scoresde.brownian.BrownianPath` or "interval" for torchsde's
            BrownianInterval, other numbers of the same law, 2 to 5 times as slow on batches of small samples.

    Raises:
        ValueError: on an unknown method or path, or options that are not positive; by `iterate`, before any evaluation,
            if the noise is a bare function: a path needs seed= or generator=.

    >>> from scoresde import VPSDE, sample
    >>> from scoresde.exact import Gaussian
    >>> denoiser = Gaussian(mean=[3.0, -1.0], std=0.5).denoiser(VPSDE())
    >>> sample(denoiser, (4, 2), ReverseSDE("srk"), steps=20, seed=0).nfe
    58
    """

    method: Literal["euler", "milstein", "srk", "reversible_heun"] = "euler"
    adaptive_steps: bool = False
    rtol: float = 1e-2
    atol: float = 1e-2
    max_nfe: int = 10_000
    first_step: float = 0.01
    path: Literal["tree", "interval"] = "tree"

    def __post_init__(self) -> None:
        if self.method not in _EVALUATIONS:
            raise ValueError(f"method={self.method!r}: expected one of {', '.join(_EVALUATIONS)}")
        check_option(("tree", "interval"), path=self.path)
        if self.adaptive_steps and self.method == "reversible_heun":
            raise ValueError("adaptive_steps=True with 'reversible_heun': use 'euler' or 'srk', or fixed steps")
        check_tolerances(rtol=self.rtol, atol=self.atol, first_step=self.first_step)
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
        assert noise is not None
        parts = legs(grid, free=self.adaptive_steps)
        denoiser.check_times(torch.tensor([leg.t for leg in parts], dtype=torch.float64, device="cpu"))
        budget = self.max_nfe if self.adaptive_steps else math.inf
        motion = Motion(denoiser, cond, x.dtype, grid.times, 1.0, budget)
        return self._loop(motion, x, parts, noise, noise.entropies(len(x)))

    def _loop(
        self, motion: Motion, x: Tensor, parts: list[Leg], noise: NoiseSource, entropies: list[int]
    ) -> Iterator[State]:
        event = (x[0].numel(),)
        path = BrownianPath(entropies, event, area=True) if self.path == "tree" else TorchsdePath(entropies, event)
        run = _Run(self, motion, path)
        for row, leg in enumerate(parts):
            try:
                x = motion.jump(x, leg, DDPM(), noise) if leg.jump else run.leg(x, leg)
            except OutOfBudget:
                assert motion.reached is not None
                yield State(row, motion.nfe, leg.step, False, *motion.reached)
                return
            except NonFinite as stop:
                yield State(row, motion.nfe, leg.step, False, stop.t, stop.x)
                return
            yield State(row, motion.nfe, leg.step, leg.done, leg.s, x)


class _Run(torchsde.BaseBrownian):
    """What torchsde is given: f and g of the module's docstring and the Brownian increments, over one leg at a time, in
    time from 0 to the leg's length (so that a leg is a step exactly, whatever lambda rounds to).
    """

    noise_type = "diagonal"
    levy_area_approximation = "space-time"
    # torchsde asks for them; BaseBrownian has them abstract.
    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    device: torch.device | None = None

    def __init__(self, solver: ReverseSDE, motion: Motion, path: BrownianPath | TorchsdePath) -> None:
        self.solver, self.motion, self.path = solver, motion, path
        self.sde_type = "stratonovich" if solver.method == "reversible_heun" else "ito"
        self.shape = path.shape
        self._queries, self._at_accepted = 0, False
        self._at_the_floor, self._warned = False, False
        # torchsde evaluates one point several times: to see f's shape, in every later stage, after a rejected step.
        self._known: deque[tuple[float, Tensor, Tensor]] = deque(maxlen=4)

    def leg(self, x: Tensor, leg: Leg) -> Tensor:
        """The state at the leg's end."""
        motion, solver = self.motion, self.solver
        self.event, self.dtype, self.device = x.shape, x.dtype, x.device
        ends = motion.sde.half_log_snr(torch.tensor([leg.t, leg.s], dtype=torch.float64, device="cpu"))
        self.start, self.end = ends.tolist()
        h = self.end - self.start
        motion.reached = leg.t, x
        w = (x / motion.radius(leg.t)).reshape(len(x), -1)
        self._queries, self._at_accepted = 0, False
        self._known.clear()
        share = math.sqrt(len(x))  # as for scipy in `AdaptiveODE`: torchsde's error, too, is the RMS over the batch
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Hitting minimum allowed step size")  # `_warn` says it once, and why
                path = torchsde.sdeint(
                    self,
                    w,
                    torch.tensor([0.0, h], dtype=torch.float64, device="cpu"),
                    bm=self,
                    # By another name: torchsde warns of adaptive Euler, not knowing that the noise is additive.
                    method="milstein" if solver.method == "euler" else solver.method,
                    dt=min(solver.first_step, h) if solver.adaptive_steps else h,
                    adaptive=solver.adaptive_steps,
                    rtol=solver.rtol / share,
                    atol=solver.atol / share,
                    dt_min=_SHORTEST,
                )
        finally:
            self._warn()
        return (path[-1] * motion.radius(leg.s)).reshape(x.shape)

    def _warn(self) -> None:
        if self._at_the_floor and not self._warned:
            self._warned = True
            warnings.warn(
                f"steps reached the shortest, 2^-10 in half log-SNR, and the tolerance rtol={self.solver.rtol}, "
                f"atol={self.solver.atol} is not met there: raise rtol and atol, or take method='srk'",
                stacklevel=5,  # the caller of `sample`
            )

    def f(self, time: Tensor, w: Tensor) -> Tensor:
        at = float(time)
        if self._at_accepted:
            self.motion.accept(self._half_log_snr(time), w.reshape(self.event))
            self._at_accepted = False
        for i, known in enumerate(self._known):
            # The last stage of srk is its first again, to which zeros were added.
            if known[0] == at and (known[1] is w or (self.solver.method == "srk" and torch.equal(known[1], w))):
                del self._known[i]
                self._known.append(known)
                return known[2]
        F = self.motion.drift(self._half_log_snr(time), w.reshape(self.event)).reshape(w.shape)
        self._known.append((at, w, F))
        return F

    def g(self, time: Tensor, w: Tensor) -> Tensor:
        _, _, sigma, r = self.motion.scales(self._half_log_snr(time))
        return torch.full_like(w, math.sqrt(2) * sigma / r)

    def __call__(self, ta: Tensor, tb: Tensor, return_U: bool = False, return_A: bool = False) -> Any:
        # Each attempt at an adaptive step asks for the increment of the whole step, and then of its halves.
        self._at_accepted = self.solver.adaptive_steps and self._queries % 3 == 0
        self._queries += 1
        self._at_the_floor |= self._at_accepted and math.isclose(float(tb - ta), _SHORTEST, rel_tol=1e-6)
        W, U = (
            None if part is None else part.to(dtype=self.dtype, device=self.device)
            for part in self.path.between(self._half_log_snr(ta), self._half_log_snr(tb))
        )
        return (W, U) if return_U else W

    def _half_log_snr(self, time: Tensor) -> float:
        return self.end if float(time) == self.end - self.start else self.start + float(time)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.solver!r})"
