"""Solvers whose step size follows an estimate of the error, for each sample on its own.

An attempt makes two solutions of different order over a step h of the solver's own clock, x_low and x_high, from the
same evaluations. With n the number of components of a sample and the error measured in units of a mixed tolerance,

    delta = max(atol, rtol max(|x_low|, |x_low of the last accepted attempt|))         elementwise
    E     = sqrt(sum(((x_high - x_low) / delta)^2) / n)

the sample takes x_high if E <= 1 and else stays, and in either case its next step is safety h E^-exponent, or as much
of that as is left. Clocks: -t for `AdaptiveSDE`, the half log-SNR lambda for `DPMSolverAdaptive`. Unlike the papers, a
step may not differ from the last by more than a factor `growth`: where the error is no power of h, as when a long step
reaches the steep end near t = 0, the rule alone can swing between attempts far too long and far too short.

The whole batch makes its attempts in lockstep, each sample at its own time, so that attempt k of a sample always has
its k-th noise, whatever the others do. A sample that has arrived waits unchanged; it costs its share of the evaluations
until the slowest is there. The loop asks the device once an attempt whether to go on.

Every time of the grid ends a step, so each time to report at may cost an attempt; the step size is taken up again after
it. A batch of states is held for each such time that the furthest sample has passed and the slowest has not.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from scoresde.brownian import BridgeNoise, FreshNoise, where_sample
from scoresde.checks import check_count, check_positive
from scoresde.denoiser import Denoiser
from scoresde.grid import Grid
from scoresde.noise import NoiseSource
from scoresde.sde import SDE
from scoresde.solvers.motion import Budgeted
from scoresde.tableau import State
from scoresde.tensors import expand_like

__all__ = ["AdaptiveSDE", "DPMSolverAdaptive"]

_FIRST = -math.log(1000)  # log(alpha c / sigma) to which one step goes from below: its error is of order 1e-6


class _View(Protocol):
    def __call__(self, name: str, x: Tensor, t: Tensor, /) -> Tensor: ...


class _Adaptive(Budgeted):
    """The loop of the module's docstring; a subclass gives the clock and the attempt."""

    masks: ClassVar[bool] = True

    rtol: float
    atol: float
    h_init: float
    safety: float
    growth: float

    @property
    @abstractmethod
    def _cost(self) -> int:
        """Evaluations of an attempt."""

    @property
    @abstractmethod
    def _exponent(self) -> float: ...

    @abstractmethod
    def _first_step(self, sde: SDE) -> float:
        """In units of the clock."""

    @abstractmethod
    def _clock(self, sde: SDE, t: float) -> float:
        """It goes forward as t falls."""

    @abstractmethod
    def _time(self, sde: SDE, clock: Tensor) -> Tensor:
        """The inverse of the clock."""

    @abstractmethod
    def _unit(self, sde: SDE, clock: Tensor) -> Tensor:
        """What x is measured in, at the clock, shape (B,)."""

    @abstractmethod
    def _attempt(
        self, sde: SDE, view: _View, x: Tensor, clock: Tensor, h: Tensor, dw: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(x_low, x_high) at clock + h, each of shape (B,); dw is the Brownian increment, if the solver draws."""

    def __post_init__(self) -> None:
        check_positive(rtol=self.rtol, atol=self.atol, h_init=self.h_init)
        if not 0 < self.safety < 1:
            raise ValueError(f"safety={self.safety}: expected a number between 0 and 1")
        if not self.growth > 1:
            raise ValueError(f"growth={self.growth}: expected a number > 1, math.inf for no limit")
        check_count(max_nfe=self.max_nfe)

    def _path(self, clock: Tensor, x: Tensor) -> FreshNoise:
        return FreshNoise(clock, x)

    def loop(
        self, denoiser: Denoiser, x: Tensor, grid: Grid, noise: NoiseSource | None, cond: dict[str, Any]
    ) -> Iterator[State]:
        denoiser.check_times(grid.times[grid.times > 0])
        return self._loop(denoiser, x, grid, noise, cond)

    def _loop(
        self, denoiser: Denoiser, x: Tensor, grid: Grid, noise: NoiseSource | None, cond: dict[str, Any]
    ) -> Iterator[State]:
        sde, times, view = grid.sde, grid.times.tolist(), partial(denoiser.view, **cond)
        lands = times[-1] == 0
        stops = [s for s in times[1:] if s > 0]
        if lands and times[-2] > sde.t_min:
            stops.append(sde.t_min)  # x_0 is D there, or at the last time of the grid before 0
        budget, row, nfe, t = self.max_nfe - lands, 0, 0, times[0]
        first = _FIRST - math.log(sde.data_scale)
        if float(sde.half_log_snr(t)) < first - 1e-9 and stops and budget >= 1:
            # x says next to nothing of x_0, and lambda is -inf or its steps are many: a step of DDIM.
            s = max(stops[0], float(sde.time_at(first)))
            a = float(sde.sigma(s) / sde.sigma(t))
            x = a * x + (float(sde.alpha(s)) - a * float(sde.alpha(t))) * denoiser(x, t, **cond).mean
            yield State(0, 1, 0, s == times[1], t, x)
            row, nfe, t = 1, 1, s

        L, B, own = len(stops), len(x), denoiser.own(x.shape, cond)
        real = {"dtype": torch.float32 if x.device.type == "mps" else torch.float64, "device": x.device}
        marks = torch.tensor([self._clock(sde, s) for s in stops], **real)  # type: ignore[arg-type]
        clock = torch.full((B,), self._clock(sde, t), **real)  # type: ignore[call-overload]
        h = torch.full((B,), self._first_step(sde), **real)  # type: ignore[call-overload]
        passed = sum(s >= t for s in stops)  # stops that all samples have passed
        k = torch.full((B,), passed, device=x.device)  # and those that each has
        sample = torch.arange(B, device=x.device)
        at_stop = x[None].clone()  # states at the stops from `passed` on to the furthest sample's next
        previous = x / expand_like(self._unit(sde, clock), x)
        path = self._path(clock, x)
        while passed < L:
            if nfe + self._cost > budget:
                yield State(row, nfe, passed, False, t, x)
                return
            here = k.clamp(max=L - 1)
            active = k < L
            left = marks[here] - clock
            step = torch.where(active, torch.minimum(h, left), 0.0)
            dw = path.increment(clock, step, noise(row, x)) if noise is not None and self.draws else None
            low, high = self._attempt(sde, view, x, clock, step, dw)
            unit = expand_like(self._unit(sde, clock + step), x)
            delta = (self.rtol * torch.maximum((low / unit).abs(), previous.abs())).clamp(min=self.atol)
            # The choice of steps is no part of the solution's gradient, and that of E^-r at E = 0 is infinite.
            E = own.norm(((high - low) / unit / delta).detach().to(h.dtype)) / own.root
            bad, accept = active & ~E.isfinite(), active & (E <= 1)
            arrive = accept & (step == left)  # clock + left may round to before the mark
            x = where_sample(bad, high - low, where_sample(accept, high, x))
            previous = where_sample(accept, low / unit, previous)
            clock = torch.where(arrive, marks[here], torch.where(accept, clock + step, clock))
            factor = (self.safety * E**-self._exponent).clamp(1 / self.growth, self.growth)
            # A step that a stop has cut short says nothing against the longer one that was proposed.
            h = torch.where(active, torch.where(arrive, torch.maximum(h, factor * step), factor * step), h)
            path.move(accept, clock)
            at_stop[here - passed, sample] = where_sample(arrive, x, at_stop[here - passed, sample])
            k = k + arrive
            look = torch.stack([bad.any(), k.min(), k.max(), clock.min(), path.full])
            failed, slowest, furthest, latest, full = look.tolist()
            if full:
                path.grow()
            row, nfe = row + 1, nfe + self._cost
            t = float(self._time(sde, torch.tensor(latest, dtype=torch.float64, device="cpu")))
            if failed or slowest == passed:
                yield State(row - 1, nfe, passed, False, t, x)
                if failed:
                    return
            else:
                t = stops[passed]
                yield State(row - 1, nfe, passed, t in times, t, at_stop[0].clone())
                passed, at_stop = passed + 1, at_stop[1:]
            if min(int(furthest), L - 1) >= passed + len(at_stop):
                at_stop = torch.cat([at_stop, x[None]])
        if lands:
            yield State(row, nfe + 1, grid.steps - 1, True, t, denoiser(x, t, **cond).mean)


@dataclass(frozen=True)
class AdaptiveSDE(_Adaptive):
    """The reverse SDE with a step size per sample ("Gotta Go Fast", Jolicoeur-Martineau et al., 2021, algorithm 1):
    Euler-Maruyama, and stochastic improved Euler with the same noise as its extrapolation,

        x_low   = x - h (f x - g^2 score)(x, t) + sqrt(h) g(t) z
        x_tilde = x - h (f x - g^2 score)(x_low, t - h) + sqrt(h) g(t - h) z
        x_high  = (x_low + x_tilde) / 2

    Two evaluations an attempt, and one more for x_0 = D at the end of a grid to t = 0. Its times are its own: a grid
    says where to start, where to end and at which times between to report.

    Args:
        rtol: epsilon_rel; 0.01 to 0.05 in the paper.
        atol: epsilon_abs, in units of the SDE's `data_scale`; the paper's (y_max - y_min) / 256, here for [-1, 1].
        h_init: first step, in units of t_max.
        safety: theta.
        exponent: r, between 0.5 and 1.
        growth: of a step from one attempt to the next, at most, and of its shrinking; math.inf in the paper.
        memory: an attempt that follows a rejected one sees the same Brownian path, filled in between the points already
            seen (in the manner of Rackauckas and Nie, 2017). False draws afresh, as the paper does; that favours small
            increments, hardly in hundreds of dimensions, but in a few the law is wrong, and more so the smaller the
            tolerance (2 dimensions on VE, rtol = 0.02 and 0.005: the std 1.6 and 1.9 times too large). The path is as
            rough as Brownian motion is: rounding of a step, as of the network in another batch, becomes its square
            root, and after some steps another sample of the same law.
        max_nfe: when the next attempt would exceed it, the run ends where it is with status "max_nfe".

    Raises:
        ValueError: unless rtol, atol, h_init and exponent are > 0, 0 < safety < 1 and max_nfe >= 1; by `iterate`,
            before any evaluation, if the SDEs differ, there is no noise, or the denoiser is undefined at a grid time.
    """

    rtol: float = 0.02
    atol: float = 2 / 256
    h_init: float = 0.01
    safety: float = 0.9
    exponent: float = 0.9
    growth: float = 5.0
    memory: bool = True
    max_nfe: int = 10_000

    _cost: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.exponent < math.inf:
            raise ValueError(f"exponent={self.exponent}: expected a finite number > 0, 0.5 to 1 in the paper")

    @property
    def _exponent(self) -> float:
        return self.exponent

    def _path(self, clock: Tensor, x: Tensor) -> FreshNoise:
        return BridgeNoise(clock, x) if self.memory else FreshNoise(clock, x)

    def _first_step(self, sde: SDE) -> float:
        return self.h_init * sde.t_max

    def _clock(self, sde: SDE, t: float) -> float:
        return -t

    def _time(self, sde: SDE, clock: Tensor) -> Tensor:
        return -clock

    def _unit(self, sde: SDE, clock: Tensor) -> Tensor:
        return torch.full_like(clock, sde.data_scale)

    def _attempt(
        self, sde: SDE, view: _View, x: Tensor, clock: Tensor, h: Tensor, dw: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert dw is not None

        def euler_maruyama(at: Tensor, t: Tensor) -> Tensor:
            f, g = sde.drift(t), sde.diffusion(t)
            move = expand_like(-h * f, x) * at + expand_like(h * g**2, x) * view("score", at, t)
            return x + move + expand_like(g, x) * dw

        low = euler_maruyama(x, -clock)
        return low, (low + euler_maruyama(low, -clock - h)) / 2


@dataclass(frozen=True)
class DPMSolverAdaptive(_Adaptive):
    """DPM-Solver-12 and -23 (Lu et al., 2022, appendix C) with a step size per sample: orders 1 and 2 or 2 and 3 of
    DPM-Solver share their evaluations. With h = lambda_s - lambda_t, t_i at lambda_t + r_i h and
    eps_i = eps(u_i, t_i), eps_0 = eps(x_t, t),

        DPM-Solver-1  (alpha_s / alpha_t) x_t - sigma_s (e^h - 1) eps_0
        DPM-Solver-2  that - sigma_s / (2 r_1) (e^h - 1) (eps_1 - eps_0),            u_1 = DPM-Solver-1 to t_1
        DPM-Solver-3  DPM-Solver-1 - sigma_s / r_2 ((e^h - 1) / h - 1) (eps_2 - eps_0),
                      u_2 = DPM-Solver-1 to t_2 - sigma_2 (r_2 / r_1) ((e^{r_2 h} - 1) / (r_2 h) - 1) (eps_1 - eps_0)

    Errors are those of x / r, r = sqrt(alpha^2 c^2 + sigma^2) with the SDE's `data_scale` c, which is x on VP, where
    the paper has it; in x itself a long step on VE or EDM might be wrong by a share of the noise that it starts from.
    Deterministic. `order` evaluations an attempt, and one more for x_0 = D at the end of a grid to t = 0. Its times are
    its own: a grid says where to start, where to end and at which times between to report.

    Args:
        order: 2 (r_1 = 1/2) or 3 (r_1 = 1/3, r_2 = 2/3), of the solution that is kept.
        rtol, atol: of the tolerance for x / r; the paper's, for data in [-1, 1].
        h_init: first step, in half log-SNR.
        safety: theta.
        growth: of a step from one attempt to the next, at most, and of its shrinking; math.inf in the paper.
        max_nfe: when the next attempt would exceed it, the run ends where it is with status "max_nfe".

    Raises:
        ValueError: on another order, unless rtol, atol and h_init are > 0, 0 < safety < 1 and max_nfe >= 1; by
            `iterate`, before any evaluation, if the SDEs differ or the denoiser is undefined at a time of the grid.
    """

    draws: ClassVar[bool] = False

    order: Literal[2, 3] = 3
    rtol: float = 0.05
    atol: float = 0.0078
    h_init: float = 0.05
    safety: float = 0.9
    growth: float = 5.0
    max_nfe: int = 10_000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in (2, 3):
            raise ValueError(f"order={self.order!r}: expected 2 (DPM-Solver-12) or 3 (DPM-Solver-23)")

    @property
    def _cost(self) -> int:
        return self.order

    @property
    def _exponent(self) -> float:
        return 1 / self.order

    def _first_step(self, sde: SDE) -> float:
        return self.h_init

    def _clock(self, sde: SDE, t: float) -> float:
        return float(sde.half_log_snr(t))

    def _time(self, sde: SDE, clock: Tensor) -> Tensor:
        return sde.time_at(clock)

    def _unit(self, sde: SDE, clock: Tensor) -> Tensor:
        t = sde.time_at(clock)
        return sde.radius(t)

    def _attempt(
        self, sde: SDE, view: _View, x: Tensor, clock: Tensor, h: Tensor, dw: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        t = sde.time_at(clock)
        eps_0 = view("eps", x, t)

        def solution(r: float, correction: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
            """At lambda_t + r h: DPM-Solver-1, less sigma weight correction."""
            s = sde.time_at(clock + r * h)
            u = expand_like(sde.alpha(s) / sde.alpha(t), x) * x
            u = u - expand_like(sde.sigma(s) * torch.expm1(r * h), x) * eps_0
            if correction is not None and weight is not None:
                u = u - expand_like(sde.sigma(s) * weight, x) * correction
            return u

        def slope(r: float) -> Tensor:
            """(e^{r h} - 1) / (r h) - 1, zero at h = 0."""
            return torch.where(h > 0, torch.expm1(r * h) / (r * h) - 1, 0.0)

        def change(r: float, u: Tensor) -> Tensor:
            return view("eps", u, sde.time_at(clock + r * h)) - eps_0

        r_1 = 1 / self.order
        change_1 = change(r_1, solution(r_1))
        second = solution(1.0, change_1, torch.expm1(h) / (2 * r_1))
        if self.order == 2:
            return solution(1.0), second
        r_2 = 2 / 3
        change_2 = change(r_2, solution(r_2, change_1, r_2 / r_1 * slope(r_2)))
        return second, solution(1.0, change_2, slope(1.0) / r_2)
