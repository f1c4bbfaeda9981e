"""The probability-flow ODE by the integrators of torchdiffeq and scipy, which choose their own steps.

With c the scale of the data (`SDE.data_scale`), r = sqrt(alpha^2 c^2 + sigma^2), a = alpha c / r, D = E[x_0 | x], the
state w = x / r follows in half log-SNR lambda

    dw = a (D / c - a w) dlambda

(`scoresde.solvers.motion`, tau = 0), with w of order one at every noise level: tolerances mean the same everywhere.

Each sample's local error is held to its own tolerance: it is accepted if, for every sample b of B,

    E_b = RMS over its elements of  error / (atol + rtol |w|)  <=  1

torchdiffeq is given the norm max_b E_b. scipy has the RMS over the whole batch E = sqrt(sum_b E_b^2 / B), so its
tolerances are divided by sqrt(B): E sqrt(B) = sqrt(sum_b E_b^2) <= 1 implies E_b <= 1. The step size is one for the
batch, hence a sample depends on its neighbours, within its tolerance.

All of this takes D to be continuous in time, which a network that looks its label up in a table is not
(`scoresde.continuity`). That is looked at before the first step, at two evaluations or up to four, and `jumps` says
what is done then.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from scoresde.checks import ArgumentError, check_count, check_option, check_positive
from scoresde.continuity import in_steps
from scoresde.denoiser import Denoiser
from scoresde.grid import Grid
from scoresde.masks import Own
from scoresde.noise import NoiseSource
from scoresde.solvers.exponential import UniPC
from scoresde.solvers.first_order import DDIM
from scoresde.solvers.motion import Budgeted, Leg, Motion, legs
from scoresde.tableau import State

__all__ = ["AdaptiveODE"]

TORCHDIFFEQ = ("dopri5", "dopri8", "bosh3", "adaptive_heun")
_SCIPY = ("RK45", "RK23", "DOP853", "Radau", "BDF", "LSODA")
_NO_GRADIENTS = "method={!r} of scipy records no gradients, which x or the network wants: use 'dopri5', or no_grad"
TABLE, TABLE_STEPS = UniPC(3, view="v", variable="half_log_snr"), 100  # in place of steps that jumps make thousands of
TABLE_CALL = "UniPC(3, view='v', variable='half_log_snr')"
_APART = 0.02  # half log-SNR between times of its own grid and those given, at least
_DIGITS = 1e-13  # the least rtol at which float64, and scipy, can tell the error from rounding


@dataclass(frozen=True)
class AdaptiveODE(Budgeted):
    """The probability-flow ODE to a tolerance (Song et al., 2021, section 4.3, who use RK45 in t on x).

    A grid says where it starts, where it ends and where to report between; `sample(denoiser, shape, AdaptiveODE())`
    needs none. A grid to t = 0 is integrated to its last noisy time, t_min at the latest, from where x_0 = D; one from
    alpha = 0 begins with a step of DDIM to half_log_snr = -9, and one up to it, `Grid.reversed`, ends with it. The
    network is evaluated at any time between the ends, not at a chain's nodes only. The state is in float64 (hence not
    on MPS, which has none), the denoiser sees the dtype of x_T. To the estimate of the error, rounding in the network
    is noise: one in float32 can be solved to 1e-6 or so, one in half precision has no 1e-9, and hardly 1e-3. Every time
    of the grid ends a step.

    Args:
        method: torchdiffeq's "dopri5", "dopri8", "bosh3" or "adaptive_heun", whose result has gradients; or
            scipy's "RK45", "RK23", "DOP853", "Radau", "BDF" or "LSODA", on the CPU and without gradients. The implicit
            ones, Radau, BDF and LSODA, take Jacobians by differences, one evaluation per element of a sample: for
            small events. For LSODA, whose error norm is a maximum, and DOP853, which mixes two estimates, the bound of
            the module's docstring is approximate.
        rtol, atol: relative and absolute tolerance of the local error of w = x / r, the module's.
        max_nfe: evaluations at most; where they run out the solution's status is "max_nfe", and it holds the last
            accepted state and its time.
        first_step: first step, in half log-SNR.
        jumps: where the denoiser is found to be in steps, as of integer time labels: "warn", and go on; or "table",
            warn and take UniPC(3, view="v", variable="half_log_snr") instead, on 100 steps (or as many as max_nfe
            allows) of its own grid and the times of the one given.

    Raises:
        ValueError: on an unknown method or options that are not positive; by `iterate`, if scipy's methods are
            asked for gradients, or if rtol is below 1e-13 (for scipy's times sqrt(B)), digits that float64 lacks.
        ArithmeticError: if the step size underflows, because the tolerances ask for more than the denoiser's precision
            or the denoiser is not continuous.

    >>> from scoresde import VPSDE, sample
    >>> from scoresde.exact import Gaussian
    >>> target = Gaussian(mean=[3.0, -1.0], std=0.5)
    >>> x_T = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> solution = sample(target.denoiser(VPSDE()), x_T, AdaptiveODE(rtol=1e-6, atol=1e-6))
    >>> bool((solution.x - target.flow(x_T, VPSDE(), 1.0, 1e-5)).abs().max() < 1e-4)
    True
    """

    draws: ClassVar[bool] = False
    goes_up: ClassVar[bool] = True

    masks: ClassVar[bool] = True

    method: str = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    max_nfe: int = 10_000
    first_step: float = 0.05
    jumps: Literal["warn", "table"] = "warn"

    def __post_init__(self) -> None:
        check_option(("warn", "table"), jumps=self.jumps)
        if self.method not in TORCHDIFFEQ + _SCIPY:
            raise ValueError(
                f"method={self.method!r}: expected one of torchdiffeq's {', '.join(TORCHDIFFEQ)} or scipy's "
                f"{', '.join(_SCIPY)}"
            )
        check_positive(rtol=self.rtol, atol=self.atol, first_step=self.first_step)
        check_count(max_nfe=self.max_nfe)

    def loop(
        self, denoiser: Denoiser, x: Tensor, grid: Grid, noise: NoiseSource | None, cond: dict[str, Any]
    ) -> Iterator[State]:
        parts = legs(grid, free=True)
        times = torch.tensor([time for leg in parts for time in (leg.t, leg.s)], dtype=torch.float64, device="cpu")
        starts = [leg.t for leg in parts] + [leg.s for leg in parts if not leg.jump]
        denoiser.check_times(torch.tensor(starts, dtype=torch.float64, device="cpu"))
        if self.method in _SCIPY and torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(_NO_GRADIENTS.format(self.method))
        own = denoiser.own(x.shape, cond)
        if own.mask is not None and self.method in _SCIPY:
            raise ArgumentError(
                f"method={self.method!r} with masks: scipy's error is a mean over the batch, with the entries that "
                f"fill up; take one of torchdiffeq's, {', '.join(TORCHDIFFEQ)}"
            )
        share = self._share(len(x))
        if self.rtol / share < _DIGITS:
            raise ArgumentError(
                f"rtol={self.rtol} for {len(x)} samples: float64 does not have the digits, take {_DIGITS * share:.1g}"
            )
        motion, first = Motion(denoiser, cond, x.dtype, times, 0.0, self.max_nfe), self.first_step
        found, motion.nfe = in_steps(denoiser, x, float(grid.times[0]), times.tolist(), cond, self.max_nfe)
        if found:
            steps = min(TABLE_STEPS, self.max_nfe - motion.nfe - grid.steps) if self.jumps == "table" else 0
            if steps > 0:
                fine = table_grid(grid, steps)
                warn_of_steps(found, f"it takes {fine.steps} steps of {TABLE_CALL}", 5)
                return _on_table(denoiser, x, grid, fine, motion.nfe, cond)
            warn_of_steps(found, "take a table, UniPC(3) say, or jumps='table'", 5)

        def move(x: Tensor, leg: Leg) -> Tensor:
            nonlocal first
            if leg.jump:
                return motion.jump(x, leg, DDIM())
            x, first = self._integrate(motion, x, leg, first)
            return x

        return motion.follow(x, parts, move)

    def _integrate(self, motion: Motion, x: Tensor, leg: Leg, first: float) -> tuple[Tensor, float]:
        """The state at the end of a leg and the first step to propose on the next."""
        lambdas = motion.sde.half_log_snr(torch.tensor([leg.t, leg.s], dtype=torch.float64, device="cpu"))
        motion.reached = leg.t, x
        motion.check(x, leg.t)  # scipy has an error of its own
        w = x.double() / motion.radius(leg.t)
        w, first = (self._torchdiffeq if self.method in TORCHDIFFEQ else self._scipy)(motion, w, lambdas, first)
        return (motion.radius(leg.s) * w).to(x.dtype), first

    def _torchdiffeq(self, motion: Motion, w: Tensor, lambdas: Tensor, first: float) -> tuple[Tensor, float]:
        import torchdiffeq  # here, and scipy below: they take a while to import

        watched = _Watched(motion, first)
        lambdas = lambdas.to(w.device)
        # Without step_t torchdiffeq steps over the end and interpolates; without first_step it tries one of any length.
        own = motion.denoiser.own(w.shape, motion.cond)
        options = {"norm": partial(_worst_sample, own), "step_t": lambdas[1:], "first_step": first}
        path = torchdiffeq.odeint(
            watched, w, lambdas, rtol=self.rtol, atol=self.atol, method=self.method, options=options
        )
        return path[-1], watched.step

    def _scipy(self, motion: Motion, w: Tensor, lambdas: Tensor, first: float) -> tuple[Tensor, float]:
        import scipy.integrate
        import scipy.sparse

        start, end = lambdas.tolist()
        share, n = self._share(len(w)), w[0].numel()
        options: dict[str, Any] = {"rtol": self.rtol / share, "atol": self.atol / share}
        if len(w) > 1 and self.method in ("Radau", "BDF"):
            options["jac_sparsity"] = scipy.sparse.kron(scipy.sparse.eye(len(w)), np.ones((n, n)))
        if len(w) > 1 and self.method == "LSODA":
            options["lband"] = options["uband"] = n - 1

        def state(flat: np.ndarray) -> Tensor:
            return torch.from_numpy(flat.copy()).reshape(w.shape).to(w.device)

        stop: Exception | None = None

        def drift(half_log_snr: float, flat: np.ndarray) -> np.ndarray:
            nonlocal stop
            try:
                F = motion.drift(float(half_log_snr), state(flat))
                if F.requires_grad:
                    raise ValueError(_NO_GRADIENTS.format(self.method))
            except Exception as exception:  # LSODA's own code does not pass them on reliably
                stop = exception
                raise
            return F.cpu().numpy().ravel()

        flat = w.detach().cpu().numpy().ravel()
        solver = getattr(scipy.integrate, self.method)(
            drift, start, flat, end, first_step=min(first, abs(end - start)), **options
        )
        while solver.status == "running":
            message = solver.step()
            if stop is not None:
                raise stop
            if solver.status == "failed":
                raise underflow(motion, float(solver.t), message)
            motion.accept(float(solver.t), state(solver.y))
            first = max(first, float(solver.step_size))
        return state(solver.y), first

    def _share(self, batch: int) -> float:
        """What the tolerances are divided by: scipy's, save LSODA's, whose norm is a maximum already."""
        return math.sqrt(batch) if self.method in _SCIPY and self.method != "LSODA" else 1.0


class _Watched:
    """The drift as torchdiffeq calls it, which tells of each step that it is about to try."""

    def __init__(self, motion: Motion, step: float) -> None:
        self.motion, self.step = motion, step

    def __call__(self, half_log_snr: Tensor, w: Tensor) -> Tensor:
        return self.motion.drift(float(half_log_snr), w)

    def callback_step(self, half_log_snr: Tensor, w: Tensor, step: Tensor) -> None:
        at, self.step = float(half_log_snr), float(step)
        if at + self.step == at:
            raise underflow(self.motion, at, "the step size underflows")
        self.motion.accept(at, w)


def table_grid(grid: Grid, steps: int) -> Grid:
    """The times of a grid, and between them those of `TABLE`'s own: as many steps, or a chain's most."""
    down = grid.reversed() if grid.increasing else grid
    sde, end = grid.sde, float(down.times[-1])
    own = TABLE.grid(sde, int(min(steps, sde.most_steps - math.ceil(end))), end=end).times
    apart = (sde.half_log_snr(own)[:, None] - sde.half_log_snr(down.times)).abs().gt(_APART).all(1)
    inside = own[apart & (own < down.times[0]) & (own > end)]
    fine = Grid(sde, torch.cat([down.times, inside]).sort(descending=True).values)
    return fine.reversed() if grid.increasing else fine


def _on_table(
    denoiser: Denoiser, x: Tensor, grid: Grid, fine: Grid, calls: int, cond: dict[str, Any]
) -> Iterator[State]:
    """The states of the table on a finer grid, told by the steps of the grid itself, after calls made before."""
    ends = fine.times[1:].tolist()
    passed = {end: step for step, end in enumerate(grid.times[1:].tolist())}
    step = 0
    for state in TABLE.tableau(fine).iterate(denoiser, x, None, cond):
        end = ends[state.step]
        done = state.done and end in passed
        yield state._replace(nfe=state.nfe + calls, step=step, done=done)
        step += done


def warn_of_steps(found: str, then: str, stacklevel: int) -> None:
    """Warn that a denoiser is in steps where adaptive steps were asked for, and say what is done, or could be."""
    warnings.warn(
        f"{found}, and its jumps can cost adaptive steps hundreds or thousands of evaluations: {then} (a "
        "floating-point label, t - 1 of DDPMChain.label say, has the same values at a chain's nodes, and no jumps)",
        stacklevel=stacklevel + 1,
    )


def _worst_sample(own: Own, error: Tensor) -> Tensor:
    """max_b E_b."""
    return own.mean(error.detach().pow(2)).max().sqrt()


def underflow(motion: Motion, half_log_snr: float, message: str) -> ArithmeticError:
    return ArithmeticError(
        f"at t = {float(motion.time(half_log_snr)):.6g} after {motion.nfe} evaluations: {message}. The tolerances "
        "ask for more than the denoiser's precision, or it is not continuous: raise them, or compute in float64"
    )
