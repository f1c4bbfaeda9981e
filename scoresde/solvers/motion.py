"""What the solvers with steps of their own share: the motion in half log-SNR, its parts, its budget.

In half log-SNR lambda, with c the scale of the data (`SDE.data_scale`), r = sqrt(alpha^2 c^2 + sigma^2),
a = alpha c / r and D = E[x_0 | x], the state w = x / r follows

    dw = [(1 + tau^2) a D / c - (tau^2 + a^2) w] dlambda + sqrt(2) tau (sigma / r) dW

tau = 0 is the probability-flow ODE (`AdaptiveODE`), tau = 1 the reverse SDE (`ReverseSDE`). It is
dy = -(1 + tau^2) u eps dlambda + sqrt(2) tau u dW for y = x / alpha, u = sigma / alpha, turned so that w is of order
one at every noise level and changes slowly at both ends (for tau = 0 by a v / r of the angle atan u): tolerances mean
the same everywhere, the same on every SDE, and in every unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from scoresde.checks import check_count
from scoresde.denoiser import Denoiser
from scoresde.grid import Grid
from scoresde.noise import NoiseSource
from scoresde.sde import SDE
from scoresde.solvers.base import SingleStep, Solver
from scoresde.tableau import State

__all__ = ["Budgeted", "Leg", "Motion", "NonFinite", "OutOfBudget", "legs"]

_NEARLY_NOISE = -9.0  # log(alpha c / sigma) to which a first step from alpha = 0 goes: D / c changes by about e^-9


class Budgeted(Solver):
    """A solver that chooses its own times, and has a budget of evaluations among its options."""

    adaptive: ClassVar[bool] = True
    max_nfe: int

    def evaluations(self, grid: Grid) -> int | None:
        return None

    def within(self, sde: SDE, nfe: int) -> tuple[Solver, Grid]:
        """The same solver with max_nfe = `nfe`, on the grid from t_max to 0."""
        check_count(nfe=nfe)
        return replace(self, max_nfe=int(nfe)), self.grid(sde, 1)  # type: ignore[type-var]


class Leg(NamedTuple):
    """A part of a run, from t to s, in the grid's step `step`: by a single step if `jump`; its last if `done`."""

    t: float
    s: float
    jump: bool
    step: int
    done: bool


def legs(grid: Grid, free: bool) -> list[Leg]:
    """The parts of a run on a grid: jumps where lambda is infinite, from alpha = 0 and to sigma = 0.

    Args:
        free: whether the solver may stand at times of its own. Then a jump from alpha = 0 goes to lambda = -9 at most,
            and one to sigma = 0 starts at t_min at most.

    On an increasing grid they are those of its `reversed`, each the other way.
    """
    if grid.increasing:
        down = legs(grid.reversed(), free)[::-1]
        ends = [part.step for part in down[1:]] + [-1]
        return [
            Leg(leg.s, leg.t, leg.jump, grid.steps - 1 - leg.step, leg.step != after)
            for leg, after in zip(down, ends, strict=True)
        ]
    sde, found = grid.sde, []
    for step, (t, s) in enumerate(pairwise(grid.times.tolist())):
        if float(sde.alpha(t)) == 0:
            m = max(s, float(sde.time_at(_NEARLY_NOISE - math.log(sde.data_scale)))) if free else s
            found.append(Leg(t, m, True, step, m == s))
            t = m
        last = s if s > 0 else min(t, sde.t_min) if free else t
        if last < t:
            found.append(Leg(t, last, False, step, last == s))
        if s == 0 and t > 0:
            found.append(Leg(last, s, True, step, True))
    return found


class OutOfBudget(Exception):
    """Raised by the evaluation that would exceed the budget."""


class NonFinite(Exception):
    """Raised by an evaluation that is not finite, at t; x is the state with NaN in the samples concerned."""

    def __init__(self, t: float, x: Tensor) -> None:
        self.t, self.x = t, x


class Motion:
    """The drift of the module's docstring over one run: it counts evaluations, stops at a NaN or at the end of the
    budget, and remembers the last state that was accepted.

    Args:
        denoiser, cond: what is evaluated.
        dtype: of the x that the denoiser sees.
        times: of the run; no evaluation leaves their range.
        tau: 0 or 1, as in the module's docstring.
        budget: evaluations at most.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        cond: Mapping[str, Any] | None,
        dtype: torch.dtype,
        times: Tensor,
        tau: float,
        budget: float,
    ) -> None:
        self.denoiser, self.cond, self.dtype, self.tau, self.budget = denoiser, dict(cond or {}), dtype, tau, budget
        self.sde, self.nfe = denoiser.sde, 0
        self.reached: tuple[float, Tensor] | None = None
        self._low, self._high = float(times.min()), float(times.max())
        self.scales = lru_cache(maxsize=8)(self._scales)  # torchsde asks for the same many times
        self.affine = lru_cache(maxsize=8)(self._affine)
        self._exact = dict(zip(self.sde.half_log_snr(times).tolist(), times.tolist(), strict=True))

    def time(self, half_log_snr: float) -> Tensor:
        """t, float64 of shape (); where half_log_snr is that of one of the run's times, that time to the last digit."""
        if half_log_snr in self._exact:
            return torch.tensor(self._exact[half_log_snr], dtype=torch.float64, device="cpu")
        return self.sde.time_at(half_log_snr).clamp(self._low, self._high)  # the inverse may round to beyond the ends

    def _scales(self, half_log_snr: float) -> tuple[Tensor, float, float, float]:
        """t, alpha c, sigma and r."""
        t = self.time(half_log_snr)
        signal, sigma = (float(scale) for scale in self.sde.scales(t))
        return t, signal, sigma, math.hypot(signal, sigma)

    def _affine(self, half_log_snr: float) -> tuple[float, float]:
        """(u, v) of the drift u w + v N, N the output of the denoiser at x = r w."""
        t, signal, _, r = self.scales(half_log_snr)
        a, tau2 = signal / r, self.tau**2
        q = t.new_tensor((1 + tau2) * a / self.sde.data_scale)
        u, v = self.denoiser.view_of_output(t.new_tensor(-(tau2 + a**2) / r), q, t)
        return float(u) * r, float(v)

    def radius(self, t: Tensor | float) -> float:
        """r = sqrt(alpha^2 c^2 + sigma^2)."""
        return math.hypot(*(float(scale) for scale in self.sde.scales(t)))

    def drift(self, half_log_snr: float, w: Tensor) -> Tensor:
        """(1 + tau^2) a D / c - (tau^2 + a^2) w, in the dtype of w."""
        (t, _, _, r), (u, v) = self.scales(half_log_snr), self.affine(half_log_snr)
        return w * u + self._output(r * w, float(t)).to(w.dtype) * v

    def jump(self, x: Tensor, leg: Leg, solver: SingleStep, noise: NoiseSource | None = None) -> Tensor:
        """One step of a solver that evaluates once, in either direction."""
        t, s = (torch.tensor([time], dtype=torch.float64, device="cpu") for time in (leg.t, leg.s))
        rows = solver.rows(self.sde, t, s)
        self.reached = leg.t, x
        u, v = self.denoiser.view_of_output(torch.zeros_like(t), torch.ones_like(t), t)  # D = u x + v N
        a, b, c = float(rows.a), float(rows.b), float(rows.c)
        x = x * (a + b * float(u)) + self._output(x, leg.t) * (b * float(v))
        return x if c == 0 else x + c * noise(0, x)  # type: ignore[misc]

    def follow(self, x: Tensor, parts: Sequence[Leg], move: Callable[[Tensor, Leg], Tensor]) -> Iterator[State]:
        """The states at the ends of the parts, each made by move(x, leg); the last one where a NaN or the end of the
        budget stops the run.
        """
        for row, leg in enumerate(parts):
            try:
                x = move(x, leg)
            except OutOfBudget:
                assert self.reached is not None
                yield State(row, self.nfe, leg.step, False, *self.reached)
                return
            except NonFinite as stop:
                yield State(row, self.nfe, leg.step, False, stop.t, stop.x)
                return
            yield State(row, self.nfe, leg.step, leg.done, leg.s, x)

    def accept(self, half_log_snr: float, w: Tensor) -> None:
        """The state and its time are where the run stands."""
        t, _, _, r = self.scales(half_log_snr)
        self.reached = float(t), (r * w).to(self.dtype)

    def _output(self, x: Tensor, t: float) -> Tensor:
        if self.nfe >= self.budget:
            raise OutOfBudget
        N = self.denoiser.output(x.to(self.dtype), t, **self.cond)
        self.nfe += 1
        self.check(x, t, N)
        return N

    def check(self, x: Tensor, t: float, N: Tensor | None = None) -> None:
        """Raises NonFinite unless x and N are finite. (Control of the step size looks at the device anyway.)"""
        bad = ~(x.isfinite() if N is None else x.isfinite() & N.isfinite()).reshape(len(x), -1).all(1)
        if bool(bad.any()):
            x = x.to(self.dtype).clone()
            x[bad] = math.nan
            raise NonFinite(t, x)
