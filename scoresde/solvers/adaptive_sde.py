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
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from scoresde.denoiser import Denoiser
from scoresde.grid import Grid
from scoresde.noise import NoiseSource
from scoresde.sde import SDE
from scoresde.solvers.base import Solver, check_count
from scoresde.tableau import State
from scoresde.tensors import expand_like

__all__ = ["AdaptiveSDE", "DPMSolverAdaptive"]

_FIRST = -math.log(1000)  # half log-SNR to which the one step from alpha = 0 goes: its error is of order 1e-6


class _View(Protocol):
    def __call__(self, name: str, x: Tensor, t: Tensor, /) -> Tensor: ...


def _where(chosen: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Samples of x where chosen, shape (B,), holds, else of y."""
    return torch.where(chosen.reshape(-1, *[1] * (x.ndim - 1)), x, y)


class _FreshNoise:
    """Brownian increments drawn anew at every attempt, sqrt(h) z."""

    def __init__(self, clock: Tensor, x: Tensor) -> None:
        self.full = torch.zeros((), dtype=torch.bool, device=x.device)

    def increment(self, clock: Tensor, h: Tensor, z: Tensor) -> Tensor:
        return expand_like(h.sqrt(), z) * z

    def move(self, accept: Tensor, clock: Tensor) -> None:
        """After an attempt: which samples accepted it, and where the clock now is."""

    def grow(self) -> None:
        """Make room, if `full` said so."""


class _BrownianPath(_FreshNoise):
    """A Brownian path for each sample that remembers where it was seen, at the ends s of attempts. Between two such
    points, l and r, it is a bridge, W(s) = W_l + (s - l) / (r - l) (W_r - W_l) + sqrt((s - l) (r - s) / (r - l)) z.

    Slots hold the points seen, in any order, shape (S, B); one that the sample has passed, or -inf, is free.
    """

    def __init__(self, clock: Tensor, x: Tensor) -> None:
        super().__init__(clock, x)
        self.at, self.seen = clock.new_full((1, len(clock)), -math.inf), torch.zeros_like(x)[None]
        self.here = self.end = torch.zeros_like(x)

    def increment(self, clock: Tensor, h: Tensor, z: Tensor) -> Tensor:
        s, sample = clock + h, torch.arange(len(clock), device=clock.device)
        l, i = torch.where(self.at <= s, self.at, -math.inf).max(0)  # noqa: E741
        r, j = torch.where(self.at > s, self.at, math.inf).min(0)
        W_l = _where(l > clock, self.seen[i, sample], self.here)
        l = torch.maximum(l, clock)  # noqa: E741
        share = (s - l) / (r - l)  # 0 where nothing was seen beyond
        bridge = expand_like(share, z) * (self.seen[j, sample] - W_l)
        W = W_l + bridge + expand_like(((s - l) * (1 - share)).sqrt(), z) * z
        free = self.at.argmin(0)
        self.at[free, sample], self.seen[free, sample] = s, W
        self.end = W
        return W - self.here

    def move(self, accept: Tensor, clock: Tensor) -> None:
        self.here = _where(accept, self.end, self.here)
        self.full = (self.at > clock).all(0).any()

    def grow(self) -> None:
        self.at = torch.cat([self.at, torch.full_like(self.at[:1], -math.inf)])
        self.seen = torch.cat([self.seen, torch.zeros_like(self.seen[:1])])


class _Adaptive(Solver):
    """The loop of the module's docstring; a subclass gives the clock and the attempt."""

    adaptive: ClassVar[bool] = True
    draws: ClassVar[bool]

    rtol: float
    atol: float
    h_init: float
    safety: float
    growth: float
    max_nfe: int

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
        for name in ("rtol", "atol", "h_init"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name}={value!r}: expected a finite number > 0")
        if not 0 < self.safety < 1:
            raise ValueError(f"safety={self.safety}: expected a number between 0 and 1")
        if not self.growth > 1:
            raise ValueError(f"growth={self.growth}: expected a number > 1, math.inf for no limit")
        check_count(max_nfe=self.max_nfe)

    def _path(self, clock: Tensor, x: Tensor) -> _FreshNoise:
        return _FreshNoise(clock, x)

    def evaluations(self, grid: Grid) -> None:
        return None

    def within(self, sde: SDE, nfe: int) -> tuple[Solver, Grid]:
        """The same solver with max_nfe = `nfe`, on the grid from t_max to 0."""
        check_count(nfe=nfe)
        return replace(self, max_nfe=int(nfe)), self.grid(sde, 1)  # type: ignore[type-var]

    def iterate(
        self,
        denoiser: Denoiser,
        x: Tensor,
        grid: Grid,
        noise: NoiseSource | None = None,
        cond: Mapping[str, Any] | None = None,
    ) -> Iterator[State]:
        if denoiser.sde != grid.sde:
            raise ValueError(f"the grid was made for {grid.sde!r}, the denoiser for {denoiser.sde!r}")
        if noise is None and self.draws:
            raise ValueError(f"{type(self).__name__} draws noise: pass noise=, a function (row, x)")
        denoiser.check_times(grid.times[grid.times > 0])
        return self._loop(denoiser, x, grid, noise, dict(cond or {}))

    def _loop(
        self, denoiser: Denoiser, x: Tensor, grid: Grid, noise: NoiseSource | None, cond: dict[str, Any]
    ) -> Iterator[State]:
        sde, times, view = grid.sde, grid.times.tolist(), partial(denoiser.view, **cond)
        lands = times[-1] == 0
        stops = [s for s in times[1:] if s > 0]
        if lands and times[-2] > sde.t_min:
            stops.append(sde.t_min)  # x_0 is D there, or at the last time of the grid before 0
        budget, row, nfe, t = self.max_nfe - lands, 0, 0, times[0]
        if float(sde.alpha(t)) == 0 and stops and budget >= 1:
            # x is noise that says nothing of x_0, and lambda is -inf: a step of DDIM, in which eps = x / sigma_t.
            s = max(stops[0], float(sde.time_at(_FIRST)))
            D = denoiser(x, t, **cond).mean
            x = float(sde.alpha(s)) * D + float(sde.sigma(s) / sde.sigma(t)) * x
            yield State(0, 1, 0, s == times[1], t, x)
            row, nfe, t = 1, 1, s

        L, B, n = len(stops), len(x), x[0].numel()
        real = {"dtype": torch.float32 if x.device.type == "mps" else torch.float64, "device": x.device}
        marks = torch.tensor([self._clock(sde, s) for s in stops], **real)  # type: ignore[arg-type]
        clock = torch.full((B,), self._clock(sde, t), **real)  # type: ignore[call-overload]
        h = torch.full((B,), self._first_step(sde), **real)  # type: ignore[call-overload]
        passed = sum(s >= t for s in stops)  # stops that all samples have passed
        k = torch.full((B,), passed, device=x.device)  # and those that each has
        sample = torch.arange(B, device=x.device)
        at_stop = x.expand(L, *x.shape).clone()
        previous = x / expand_like(self._unit(sde, clock), x)
        path = self._path(clock, x)
        while passed < L:
            if nfe + self._cost > budget:
                yield State(row, nfe, passed, False, t, x)
                return
            here = k.clamp(max=L - 1)
            active = k < L
            step = torch.where(active, torch.minimum(h, marks[here] - clock), 0.0)
            dw = path.increment(clock, step, noise(row, x)) if noise is not None and self.draws else None
            low, high = self._attempt(sde, view, x, clock, step, dw)
            unit = expand_like(self._unit(sde, clock + step), x)
            delta = (self.rtol * torch.maximum((low / unit).abs(), previous.abs())).clamp(min=self.atol)
            E = ((high - low) / unit / delta).to(h.dtype).reshape(B, -1).norm(dim=1) / math.sqrt(n)
            bad, accept = active & ~E.isfinite(), active & (E <= 1)
            arrive = accept & (clock + step >= marks[here])
            x = _where(bad, high - low, _where(accept, high, x))
            previous = _where(accept, low / unit, previous)
            clock = torch.where(arrive, marks[here], torch.where(accept, clock + step, clock))
            factor = (self.safety * E**-self._exponent).clamp(1 / self.growth, self.growth)
            h = torch.where(active, factor * step, h)
            path.move(accept, clock)
            at_stop[here, sample] = _where(arrive, x, at_stop[here, sample])
            k = k + arrive
            failed, slowest, latest, full = torch.stack([bad.any(), k.min(), clock.min(), path.full]).tolist()
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
                yield State(row - 1, nfe, passed, t in times, t, at_stop[passed].clone())
                passed += 1
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
        atol: epsilon_abs, in the units of x; the paper's (y_max - y_min) / 256, here for data in [-1, 1].
        h_init: first step, in units of t_max.
        safety: theta.
        exponent: r, between 0.5 and 1.
        growth: of a step from one attempt to the next, at most, and of its shrinking; math.inf in the paper.
        memory: an attempt that follows a rejected one sees the same Brownian path, filled in between the points already
            seen (in the manner of Rackauckas and Nie, 2017). False draws afresh, as the paper does; that favours small
            increments, hardly in hundreds of dimensions, but in a few the law is wrong, and more so the smaller the
            tolerance (2 dimensions on VE, rtol = 0.02 and 0.005: the std 1.6 and 1.9 times too large).
        max_nfe: when the next attempt would exceed it, the run ends where it is with status "max_nfe".

    Raises:
        ValueError: unless rtol, atol, h_init and exponent are > 0, 0 < safety < 1 and max_nfe >= 1; by `iterate`,
            before any evaluation, if the SDEs differ, there is no noise, or the denoiser is undefined at a grid time.
    """

    draws: ClassVar[bool] = True

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

    def _path(self, clock: Tensor, x: Tensor) -> _FreshNoise:
        return _BrownianPath(clock, x) if self.memory else _FreshNoise(clock, x)

    def _first_step(self, sde: SDE) -> float:
        return self.h_init * sde.t_max

    def _clock(self, sde: SDE, t: float) -> float:
        return -t

    def _time(self, sde: SDE, clock: Tensor) -> Tensor:
        return -clock

    def _unit(self, sde: SDE, clock: Tensor) -> Tensor:
        return torch.ones_like(clock)

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

    Errors are those of x / sqrt(alpha^2 + sigma^2), which is x on VP, where the paper has it; in x itself a long step
    on VE or EDM might be wrong by a share of the noise that it starts from. Deterministic. `order` evaluations an
    attempt, and one more for x_0 = D at the end of a grid to t = 0. Its times are its own: a grid says where to start,
    where to end and at which times between to report.

    Args:
        order: 2 (r_1 = 1/2) or 3 (r_1 = 1/3, r_2 = 2/3), of the solution that is kept.
        rtol, atol: of the tolerance, atol in the units of x; the paper's, for data in [-1, 1].
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
        return torch.hypot(sde.alpha(t), sde.sigma(t))

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
