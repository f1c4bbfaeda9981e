"""Volumes along the probability-flow ODE: log |det dx_end / dx_start| beside the state, and what their errors are.

By a table. With xi_i and phi_i the weights of x_i and of F_i = p_i x_i + q_i D_i in its output, every F held fixed
(`analysis.responses`), its own method applied to the volume is dim log xi_0 + sum_i (phi_i / xi_i) tr(dF_i / dx): the
same order, no further evaluation, on any deterministic table, corrector and all, in both directions. It is taken of the
difference from unit Gaussian data, where the volume is (r_R / r_0)^dim, r^2 = alpha^2 + sigma^2, and dF_i / dx is
f_i = p_i + q_i alpha_i / r_i^2,

    log |det dx_R / dx_0| = dim log(r_R / r_0) + sum_i (phi_i / xi_i) (tr(dF_i / dx) - dim f_i)

with errors that are far smaller in the views x0 and eps, whose f is large. The traces do not feed back, so that every
evaluation can have new probes: their errors, independent, average out along the way.

By an adaptive integrator, with the state w = x / r of `scoresde.solvers.motion`,

    dw = a (D - a w) dlambda,    log |det| = dim log(r_end / r_start) + int tr(a r dD/dx - a^2) dlambda

the second term being part of what is integrated, with probes that change every 1.5 of half log-SNR.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torchdiffeq
from torch import Tensor

from scoresde.denoiser import Denoiser, networks
from scoresde.errors import NonFiniteError, not_finite, some
from scoresde.grid import Grid
from scoresde.likelihood.divergence import Divergence, Products, Spread
from scoresde.noise import GeneratorNoise, NoiseSource, SeededNoise
from scoresde.solvers.adaptive_ode import underflow
from scoresde.solvers.base import Solver
from scoresde.solvers.first_order import DDIM
from scoresde.solvers.motion import Leg, Motion, NonFinite, OutOfBudget
from scoresde.tableau import Tableau, responses
from scoresde.views import view_of_mean
from scoresde.wrappers import SameMean

__all__ = ["AdaptiveVolume", "TableVolume", "Volume"]

Progress = Callable[[int], Any]
"""Called with the number of evaluations made since the last call."""

_LONGEST = 1.0  # step in half log-SNR: a longer one can pass over all that happens, and not notice
_REDRAWN = 0.75  # half log-SNR for which an adaptive solve keeps its probes


class Volume(ABC):
    """A run of the ODE that keeps the volume. After `solve`:

    Attributes:
        nfe: evaluations.
        variance: of the log-volume, from the probes, (B,); `doubt` is the variance of that (`Spread`).
        error: what is known of the discretisation error of a density at the end of the run, (B,).
        smoothing: |eps|^2 - dim + alpha tr dD/dx at the start of the run, (B,).
        t: the time reached.
        status: "complete", or "max_nfe" where the budget ran out.

    And before it `calls`, the evaluations of a table, None where they are not known.
    """

    calls: int | None = None

    nfe: int
    variance: Tensor
    doubt: Tensor
    error: Tensor
    smoothing: Tensor
    t: float
    status: Literal["complete", "max_nfe"]

    def __init__(
        self,
        denoiser: Denoiser,
        trace: Divergence,
        noise: NoiseSource,
        cond: Mapping[str, Any] | None,
        create_graph: bool,
    ) -> None:
        self.denoiser, self.trace, self.noise, self.cond = denoiser, trace, noise, dict(cond or {})
        self.create_graph = create_graph

    @abstractmethod
    def solve(self, x: Tensor, progress: Progress = lambda _: None) -> tuple[Tensor, Tensor]:
        """The end state, and the log-volume, float64 (B,).

        Raises:
            NonFiniteError: where the state or a trace is not finite, if the run looks; else `locate` says.
        """

    def locate(self, x: Tensor, bad: list[int]) -> NonFiniteError:
        """Where the samples `bad` of a run from x became non-finite."""
        return NonFiniteError(f"samples {some(bad)} are not finite at the end of the run", None, None, bad)

    def _slope(self, t: Tensor) -> Tensor:
        """dN/dx of the output N on unit Gaussian data, where D = alpha x / (alpha^2 + sigma^2), shape of t."""
        r, s = self.denoiser.affine(t)  # D = r x + s N
        alpha, sigma = self.denoiser.sde.alpha(t), self.denoiser.sde.sigma(t)
        return (alpha / (alpha**2 + sigma**2) - r) / s

    def _smoothing(self, t: float, x: Tensor, found: Products) -> Tensor:
        at = torch.tensor(t, dtype=torch.float64, device="cpu")
        view = view_of_mean("eps", self.denoiser.sde, at)
        u, w = (float(c) for c in self.denoiser.view_of_output(*view, at))  # eps = u x + w N
        eps, dim = (u * x + w * found.N).double(), x[0].numel()
        tr = u * dim + w * found.trace
        return (eps**2).reshape(len(x), -1).sum(1) - float(self.denoiser.sde.sigma(at)) * tr


class TableVolume(Volume):
    """By a table, the first formula of the module's docstring, added up evaluation by evaluation.

    The error is estimated from the same evaluations: the table on every other time of the grid, fed with the F of this
    run, gives another end state, and twice the difference of the log-densities of the prior there is taken. It has no
    part of the probes. Measured on mixtures and rotated Gaussians, seven solvers, 20 to 80 steps, its median is 0.1 to
    10 times that of the true error, and for UniPC in x0 up to 200 times; it says little below about 15 steps. Tables
    with several evaluations a step have none (NaN), nor have runs that do not end at the prior.

    Args:
        table: of a deterministic solver, ending where sigma > 0.
        coarse: the same solver's on every other time, or None.

    Raises:
        ValueError: if the table draws noise, or ends at sigma = 0.
    """

    def __init__(self, *run: Any, table: Tableau, coarse: Tableau | None = None) -> None:
        super().__init__(*run)
        if bool((table.c > 0).any()):
            raise ValueError("this table draws noise: a density is that of the ODE, take a deterministic solver")
        self.table, self.t, self.status = table, float(table.grid.times[-1]), "complete"
        self.calls = table.nfe
        _, _, self.kappa = _weights(table)
        sde = table.grid.sde
        r = torch.hypot(sde.alpha(table.grid.times), sde.sigma(table.grid.times))
        alpha, sigma = sde.alpha(table.t), sde.sigma(table.t)
        f = torch.where(table.evaluates, table.p + table.q * alpha / (alpha**2 + sigma**2), 0.0)
        self.log_scale = float((r[-1] / r[0]).log() - (self.kappa * f).sum())
        self.coarse = None if coarse is None else _among(coarse, table)
        self._checked = False

    def solve(self, x: Tensor, progress: Progress = lambda _: None) -> tuple[Tensor, Tensor]:
        self.log_det = x.new_full((len(x),), x[0].numel() * self.log_scale, dtype=torch.float64)
        self.nfe = 0
        self._spread = Spread(self.trace.distribution)
        self.x_coarse = None if self.coarse is None else x.detach() * self.coarse[0]
        evaluations = 0
        for state in self.table.iterate(_Traced(self), x, None, self.cond):
            progress(state.nfe - evaluations)
            evaluations = state.nfe
        nothing = torch.zeros_like(self.log_det)
        self.variance, self.doubt = self._spread.variance + nothing, self._spread.doubt + nothing
        prior = self.denoiser.sde.prior_log_prob
        self.error = torch.full_like(self.log_det, math.nan)
        if self.x_coarse is not None:
            self.error = 2 * (prior(state.x.detach().double()) - prior(self.x_coarse.double())).abs()
        return state.x, self.log_det

    def locate(self, x: Tensor, bad: list[int]) -> NonFiniteError:
        self._checked = True
        if isinstance(self.noise, SeededNoise | GeneratorNoise):
            self.noise.rewind()
        try:
            with torch.no_grad():
                self.solve(x)
        except NonFiniteError as error:
            return error
        return super().locate(x, bad)

    def add(self, row: int, x: Tensor, found: Products, u: float, w: float) -> None:
        """The evaluation of a row, F = u x + w N."""
        k = float(self.kappa[row])
        self.nfe += found.calls
        if row == 0:
            self.smoothing = self._smoothing(float(self.table.t[0]), x, found)
        self.log_det = self.log_det + k * (u * x[0].numel() + w * found.trace)
        self._spread.add(found.v, found.u * w, k)
        if self.x_coarse is not None and self.coarse is not None:
            self.x_coarse = self.x_coarse + float(self.coarse[1][row]) * (u * x + w * found.N).detach()
        if self._checked and (bad := not_finite(self.log_det + x.reshape(len(x), -1).sum(1))):
            t = float(self.table.t[row])
            message = f"samples {some(bad)} became non-finite at the evaluation at t = {t:.6g}"
            raise NonFiniteError(message, int(self.table.step[row]), t, bad)


class _Traced(SameMean):
    """A denoiser whose every evaluation is added to a volume."""

    def __init__(self, volume: TableVolume) -> None:
        super().__init__(volume.denoiser)
        self.volume = volume

    def outputs(self, times: Tensor) -> Callable[[int, Tensor, Mapping[str, Any]], Tensor]:
        volume, table, output = self.volume, self.volume.table, self.denoiser.outputs(times)
        on = table.evaluates
        u, w, c = torch.zeros(3, len(table), dtype=torch.float64, device="cpu")
        u[on], w[on] = self.view_of_output(table.p[on], table.q[on], times[on])
        c[on] = volume._slope(times[on])
        u_i, w_i, c_i = u.tolist(), w.tolist(), c.tolist()

        def at(i: int, x: Tensor, cond: Mapping[str, Any]) -> Tensor:
            probes = volume.trace.draw(x, volume.noise, i)
            found = volume.trace(lambda y: output(i, y, cond), x, probes, volume.create_graph, c_i[i])
            volume.add(i, x, found, u_i[i], w_i[i])
            return found.N

        return at


def _weights(table: Tableau) -> tuple[float, Tensor, Tensor]:
    """xi_0, phi and phi / xi of the module's docstring, the last two of shape (R,)."""
    flat = torch.zeros(len(table), 1, dtype=torch.float64, device="cpu")
    xi, phi = (response[:, 0] for response in responses(table, flat))
    if not bool((xi > 0).all()):
        raise ValueError("the table forgets its start (a = 0), so that volumes vanish: end the grid where sigma > 0")
    return float(xi[0]), phi, phi / xi[:-1]


def _among(coarse: Tableau, table: Tableau) -> tuple[float, Tensor] | None:
    """xi_0, and phi at the rows of the whole table, of a coarse one; None unless its F are among the whole one's."""
    rows = torch.arange(0, len(table), 2, device="cpu")
    if len(rows) != len(coarse) or not torch.equal(coarse.t, table.t[rows]):
        return None
    on = coarse.evaluates
    if not all(torch.allclose(getattr(coarse, k)[on], getattr(table, k)[rows][on]) for k in ("p", "q")):
        return None
    xi, phi, _ = _weights(coarse)
    return xi, torch.zeros_like(table.a).index_put((rows,), phi)


def every_other(solver: Solver, grid: Grid) -> Tableau | None:
    """The table of every other time of an increasing grid, its end among them; None where that leaves one step."""
    if grid.steps < 3:
        return None
    times = torch.cat([grid.times[:-1:2], grid.times[-1:]])
    return solver.tableau(Grid(grid.sde, times.flip(0)).reversed())


class AdaptiveVolume(Volume):
    """By torchdiffeq, the second formula of the module's docstring. The state of a sample is w, the part of the trace's
    integral that is known, and the integrals of its K products.

    The error is the sum over steps of what the estimated local error (dw, dv) of state and log-volume makes of the
    density at the end, log p being constant along the exact flow: |grad log p . dw + dv|.

    Args:
        parts: of the run, in either direction.
        adjoint: whether gradients come from torchdiffeq's odeint_adjoint.
        budget: evaluations at most.
        rtol, atol, method, first_step: as for `log_prob`.
    """

    def __init__(
        self,
        *run: Any,
        parts: Sequence[Leg],
        adjoint: bool,
        budget: int,
        rtol: float,
        atol: float,
        method: str,
        first_step: float,
    ) -> None:
        super().__init__(*run)
        self.rtol, self.atol, self.method, self.first_step = rtol, atol, method, first_step
        self.adjoint, self.budget = adjoint, budget
        self.times = torch.tensor([parts[0].t, *(leg.s for leg in parts)], dtype=torch.float64, device="cpu")
        self.denoiser.check_times(self.times[:-1])
        self.parts = list(parts) if self.trace.kind == "exact" else [p for leg in parts for p in self._redrawn(leg)]

    def _redrawn(self, leg: Leg) -> list[Leg]:
        """A leg in parts, each with probes of its own: their errors average out."""
        if leg.jump:
            return [leg]
        sde = self.denoiser.sde
        start, end = sde.half_log_snr(torch.tensor([leg.t, leg.s], dtype=torch.float64, device="cpu")).tolist()
        count = max(1, round(abs(end - start) / _REDRAWN))
        inner = sde.time_at(torch.linspace(start, end, count + 1, dtype=torch.float64, device="cpu")[1:-1]).tolist()
        return [Leg(t, s, False, leg.step, leg.done) for t, s in itertools.pairwise([leg.t, *inner, leg.s])]

    def solve(self, x: Tensor, progress: Progress = lambda _: None) -> tuple[Tensor, Tensor]:
        self.motion = motion = _Tracing(self, x.dtype, progress)
        self.dtype, self.event, self.n = x.dtype, x.shape[1:], x[0].numel()
        log_det = x.new_zeros(len(x), dtype=torch.float64)
        nothing = self.error = self.variance = self.doubt = torch.zeros_like(log_det)
        spread, first = Spread(self.trace.distribution), self.first_step
        self.t, self.status, self.nfe = self.parts[0].t, "complete", 0
        for row, leg in enumerate(self.parts):
            self.probes = self.trace.draw(x, self.noise, row)
            try:
                if leg.jump:
                    x, change, u = self._jump(x, leg)
                else:
                    x, change, u, first = self._integrate(x, leg, first)
            except OutOfBudget:
                assert motion.reached is not None
                (self.t, x), self.status, self.nfe = motion.reached, "max_nfe", motion.nfe
                return x, log_det
            except NonFinite as stop:
                bad = not_finite(stop.x)
                message = f"samples {some(bad)} became non-finite at the evaluation at t = {stop.t:.6g}"
                raise NonFiniteError(message, leg.step, stop.t, bad) from None
            log_det, self.t, self.nfe = log_det + change, leg.s, motion.nfe
            spread.add(self._v, u.movedim(1, 0))
            self.variance, self.doubt = spread.variance + nothing, spread.doubt + nothing
        motion.budget, motion.progress = math.inf, lambda _: None  # the adjoint evaluates again
        return x, log_det

    def _jump(self, x: Tensor, leg: Leg) -> tuple[Tensor, Tensor, Tensor]:
        """DDIM's step to or from alpha = 0, x_s = a x + b D: a table of one row."""
        t, s = (torch.tensor([time], dtype=torch.float64, device="cpu") for time in (leg.t, leg.s))
        rows = DDIM().rows(self.denoiser.sde, t, s)
        a, b = float(rows.a), float(rows.b)
        u, w = (float(c) for c in self.denoiser.view_of_output(torch.zeros_like(t), torch.ones_like(t), t))
        self.motion.reached = leg.t, x
        found = self.motion.products(x, leg.t, self.probes)
        change = self.n * math.log(a) + b / a * (u * self.n + w * found.trace)
        return x * (a + b * u) + found.N * (b * w), change, b / a * w * found.u.movedim(0, 1)

    def _integrate(self, x: Tensor, leg: Leg, first: float) -> tuple[Tensor, Tensor, Tensor, float]:
        """The end state, the volume, the products' part in it, (B, K, n), and the first step to propose on the next."""
        motion, n = self.motion, self.n
        motion.reached = leg.t, x
        motion.check(x, leg.t)
        r_t, r_s = motion.radius(leg.t), motion.radius(leg.s)
        w = (x.double() / r_t).reshape(len(x), n)
        y = torch.cat([w, w.new_zeros(len(w), 1 + len(self._v) * n)], 1)
        lambdas = self.denoiser.sde.half_log_snr(torch.tensor([leg.t, leg.s], dtype=torch.float64, device="cpu"))
        lambdas = lambdas.to(x.device)
        watched = _Watched(self, first)
        options = {"norm": watched.norm, "step_t": lambdas[1:], "first_step": first, "max_step": _LONGEST}
        solve, more = torchdiffeq.odeint, {}
        if self.adjoint:
            solve = torchdiffeq.odeint_adjoint
            wanted: list[Tensor] = [p for net in networks(self.denoiser) for p in net.parameters()]
            wanted += [c for c in self.cond.values() if isinstance(c, Tensor)]
            more = {
                "adjoint_params": tuple(p for p in wanted if p.requires_grad),
                "adjoint_rtol": self.rtol,
                "adjoint_atol": self.atol,
                "adjoint_options": {"norm": _rms_of_state_and_adjoint},
            }
        # rtol = 0, atol = 1: the norm is given the error itself, and holds it against the tolerances.
        path = solve(watched, y, lambdas, rtol=0.0, atol=1.0, method=self.method, options=options, **more)
        y = path[-1]
        x = (r_s * y[:, :n]).reshape(len(x), *self.event).to(self.dtype)
        u = y[:, n + 1 :].reshape(len(x), -1, n)
        return x, n * math.log(r_s / r_t) + self._volume(y), u, watched.step

    @property
    def _v(self) -> Tensor:
        """The probes that the trace is estimated with, (K, B, n)."""
        v = self.trace.estimating(self.probes)
        return v.reshape(*v.shape[:2], self.n).double()

    def _volume(self, y: Tensor) -> Tensor:
        """The log-volume that a state holds."""
        known, u = y[:, self.n], y[:, self.n + 1 :].reshape(len(y), -1, self.n)
        return known + (self._v.movedim(0, 1) * u).sum(2).mean(1) if u.shape[1] else known


class _Tracing(Motion):
    """The motion, with the trace of every output."""

    def __init__(self, volume: AdaptiveVolume, dtype: torch.dtype, progress: Progress) -> None:
        super().__init__(volume.denoiser, volume.cond, dtype, volume.times, 0.0, volume.budget)
        self.volume, self.progress = volume, progress

    def products(self, x: Tensor, t: float, probes: Tensor) -> Products:
        """One evaluation at x."""
        if self.nfe >= self.budget:
            raise OutOfBudget
        volume, x = self.volume, x.to(self.dtype)
        create_graph = volume.create_graph and torch.is_grad_enabled()
        output = lambda y: self.denoiser.output(y, t, **self.cond)  # noqa: E731
        slope = float(volume._slope(torch.tensor(t, dtype=torch.float64, device="cpu")))
        found = volume.trace(output, x, probes, create_graph, slope)
        if self.nfe == 0:
            volume.smoothing = volume._smoothing(t, x, found)
        self.nfe += found.calls
        self.progress(found.calls)
        trace = found.trace.detach().to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        self.check(x, t, found.N + 0 * trace)
        return found


class _Watched:
    """The rate of change of the state as torchdiffeq calls it, its error norm, and an eye on its steps."""

    def __init__(self, volume: AdaptiveVolume, step: float) -> None:
        self.volume, self.step = volume, step
        self.probes = volume.probes  # for the adjoint too, which comes back when others are in use
        self.y = self.error = torch.empty(0)
        self.last: tuple[float, Tensor, Tensor] | None = None

    def __call__(self, half_log_snr: Tensor, y: Tensor) -> Tensor:
        volume, motion, n = self.volume, self.volume.motion, self.volume.n
        at = float(half_log_snr.detach())
        w = y[:, :n].reshape(len(y), *volume.event)
        (t, _, _, r), (u, v) = motion.scales(at), motion.affine(at)  # dw = u w + v N
        found = motion.products(r * w, float(t), self.probes)
        rate = w * u + found.N.to(w.dtype) * v
        self.last = at, w.detach().reshape(len(y), n), rate.detach().reshape(len(y), n)
        known = u * n + v * r * found.base
        products = (v * r * found.u).movedim(0, 1).flatten(1)
        return torch.cat([rate.reshape(len(y), n), known[:, None], products], 1)

    def norm(self, error: Tensor) -> Tensor:
        """The worst sample's error against its tolerance."""
        volume, n = self.volume, self.volume.n
        self.error, y = error.detach(), self.y
        error = self.error
        of_w = error[:, :n] / (volume.atol + volume.rtol * y[:, :n].abs())
        tolerance = volume.atol * math.sqrt(n) + volume.rtol * volume._volume(y).abs()
        return torch.maximum(of_w.pow(2).mean(1).sqrt(), (volume._volume(error) / tolerance).abs()).max()

    def callback_step(self, half_log_snr: Tensor, y: Tensor, step: Tensor) -> None:
        motion, at = self.volume.motion, float(half_log_snr)
        self.step, self.y = float(step), y.detach()
        if at + self.step == at:
            raise underflow(motion, at, "the step size underflows")
        motion.accept(at, self.y[:, : self.volume.n].reshape(len(y), *self.volume.event))

    def callback_accept_step(self, half_log_snr: Tensor, y: Tensor, step: Tensor) -> None:
        volume, n = self.volume, self.volume.n
        assert self.last is not None
        at, w, rate = self.last  # at the step's end: dw = a (D - a w)
        _, alpha, sigma, r = volume.motion.scales(at)
        a = alpha / r
        gradient = (r / sigma) ** 2 * (rate + (a**2 - 1) * w)  # of log p in w: r (alpha D - r w) / sigma^2
        change = (gradient * self.error[:, :n]).sum(1) + volume._volume(self.error)
        volume.error = volume.error + change.abs()


def _rms_of_state_and_adjoint(parts: Sequence[Tensor]) -> Tensor:
    """Of the errors, against the adjoint's own tolerances, of (t, state, adjoint, parameters' adjoints)."""
    return torch.stack([part.detach().pow(2).mean().sqrt() for part in parts[1:3]]).max()
