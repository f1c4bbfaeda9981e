"""The volume along the probability-flow ODE by torchdiffeq: with the state w = x / r of `scoresde.solvers.motion`,

    dw = a (D / c - a w) dlambda,    log |det| = dim log(r_end / r_start) + int tr(a (r / c) dD/dx - a^2) dlambda

the second term being part of what is integrated, with probes that change every 0.75 of half log-SNR. The variable of
integration is the angle theta = atan(sigma / (alpha c)), dlambda = -dtheta / (sin(theta) cos(theta)), along which both
ends, where in lambda little happens for long, are short: measured, fewer calls than in lambda or t at the same error.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from scoresde.entries import leaves
from scoresde.errors import NonFiniteError, not_finite, some
from scoresde.likelihood.divergence import Products
from scoresde.likelihood.spread import Spreads
from scoresde.likelihood.volume import Progress, Volume
from scoresde.networks import networks
from scoresde.solvers.adaptive_ode import underflow
from scoresde.solvers.first_order import DDIM
from scoresde.solvers.motion import Leg, Motion, NonFinite, OutOfBudget

__all__ = ["AdaptiveVolume"]

_LONGEST = 0.5  # step in the angle: a longer one can pass over all that happens, and not notice
_REDRAWN = 0.75  # half log-SNR for which an adaptive solve keeps its probes


class AdaptiveVolume(Volume):
    """By the formula of the module's docstring. The state of a sample is w, the part of the trace's
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
        self.own = self.denoiser.own(x.shape, self.cond)
        log_det = x.new_zeros(len(x), dtype=torch.float64)
        self.error = self.variance = self.doubt = torch.zeros_like(log_det)
        spread, first = Spreads(self.trace.distribution, self.own), self.first_step
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
            self.variance, self.doubt = spread.told(self.error)
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
        change = self.own.dims * math.log(a) + b / a * (u * self.own.dims + w * found.trace)
        return x * (a + b * u) + found.N * (b * w), change, b / a * w * found.u.movedim(0, 1)

    def _integrate(self, x: Tensor, leg: Leg, first: float) -> tuple[Tensor, Tensor, Tensor, float]:
        """The end state, the volume, the products' part in it, (B, K, n), and the first step to propose on the next."""
        import torchdiffeq  # which takes a while to import

        motion, n = self.motion, self.n
        motion.reached = leg.t, x
        motion.check(x, leg.t)
        r_t, r_s = motion.radius(leg.t), motion.radius(leg.s)
        w = (x.double() / r_t).reshape(len(x), n)
        y = torch.cat([w, w.new_zeros(len(w), 1 + len(self._v) * n)], 1)
        lambdas = self.denoiser.sde.half_log_snr(torch.tensor([leg.t, leg.s], dtype=torch.float64, device="cpu"))
        angles = torch.atan((-lambdas).exp() / self.denoiser.sde.data_scale).to(x.device)
        ends = dict(zip(angles.tolist(), lambdas.tolist(), strict=True))
        watched = _Watched(self, first, ends)
        options = {"norm": watched.norm, "step_t": angles[1:], "first_step": first, "max_step": _LONGEST}
        solve, more = torchdiffeq.odeint, {}
        if self.adjoint:
            solve = torchdiffeq.odeint_adjoint
            wanted: list[Tensor] = [p for net in networks(self.denoiser) for p in net.parameters()]
            wanted += [c for c in leaves(self.cond) if isinstance(c, Tensor)]
            more = {
                "adjoint_params": tuple(p for p in wanted if p.requires_grad),
                "adjoint_rtol": self.rtol,
                "adjoint_atol": self.atol,
                "adjoint_options": {"norm": _rms_of_state_and_adjoint},
            }
        # rtol = 0, atol = 1: the norm is given the error itself, and holds it against the tolerances.
        path = solve(watched, y, angles, rtol=0.0, atol=1.0, method=self.method, options=options, **more)
        y = path[-1]
        x = (r_s * y[:, :n]).reshape(len(x), *self.event).to(self.dtype)
        u = y[:, n + 1 :].reshape(len(x), -1, n)
        return x, self.own.dims * math.log(r_s / r_t) + self._volume(y), u, watched.step

    @property
    def _v(self) -> Tensor:
        """The probes that the trace is estimated with, (K, B, n)."""
        return self.own.rows(self.trace.estimating(self.probes)).double()

    def _volume(self, y: Tensor) -> Tensor:
        """The log-volume that a state holds."""
        known, u = y[:, self.n], y[:, self.n + 1 :].reshape(len(y), -1, self.n)
        return known + self.own.total(self._v.movedim(0, 1) * u).mean(1) if u.shape[1] else known


class _Tracing(Motion):
    """The motion, with the trace of every output."""

    def __init__(self, volume: AdaptiveVolume, dtype: torch.dtype, progress: Progress) -> None:
        super().__init__(volume.denoiser, volume.cond, dtype, volume.times, 0.0, volume.budget)
        self.volume, self.progress, self.nfe = volume, progress, volume.looked

    def products(self, x: Tensor, t: float, probes: Tensor) -> Products:
        """One evaluation at x."""
        if self.nfe >= self.budget:
            raise OutOfBudget
        volume, x = self.volume, x.to(self.dtype)
        create_graph = volume.create_graph and torch.is_grad_enabled()
        output = lambda y: self.denoiser.output(y, t, **self.cond)  # noqa: E731
        slope = float(volume._slope(torch.tensor(t, dtype=torch.float64, device="cpu")))
        found = volume.trace(output, x, probes, create_graph, slope, volume.own)
        if self.nfe == volume.looked:
            volume.smoothing = volume._smoothing(t, x, found)
        self.nfe += found.calls
        self.progress(found.calls)
        trace = found.trace.detach().to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        self.check(x, t, found.N + 0 * trace)
        return found


class _Watched:
    """The rate of change of the state as torchdiffeq calls it, its error norm, and an eye on its steps."""

    def __init__(self, volume: AdaptiveVolume, step: float, ends: dict[float, float]) -> None:
        self.volume, self.step, self.ends = volume, step, ends
        self.probes = volume.probes  # for the adjoint too, which comes back when others are in use
        self.y = self.error = torch.empty(0)
        self.last: tuple[float, Tensor, Tensor] | None = None

    def _half_log_snr(self, angle: Tensor) -> float:
        """At the ends to the last digit, and beyond them, where the adjoint steps over, that of the end."""
        at = min(max(float(angle.detach()), min(self.ends)), max(self.ends))
        return self.ends[at] if at in self.ends else -math.log(math.tan(at) * self.volume.denoiser.sde.data_scale)

    def __call__(self, angle: Tensor, y: Tensor) -> Tensor:
        volume, motion, n = self.volume, self.volume.motion, self.volume.n
        at = self._half_log_snr(angle)
        w = y[:, :n].reshape(len(y), *volume.event)
        (t, signal, sigma, r), (u, v) = motion.scales(at), motion.affine(at)
        per_angle = -(r**2) / (signal * sigma)  # dlambda / dtheta
        u, v = per_angle * u, per_angle * v  # dw = (u w + v N) dtheta
        found = motion.products(r * w, float(t), self.probes)
        rate = w * u + found.N.to(w.dtype) * v
        self.last = at, w.detach().reshape(len(y), n), rate.detach().reshape(len(y), n)
        known = u * volume.own.dims + v * r * found.base
        products = (v * r * found.u).movedim(0, 1).flatten(1)
        return torch.cat([rate.reshape(len(y), n), known[:, None], products], 1)

    def norm(self, error: Tensor) -> Tensor:
        """The worst sample's error against its tolerance."""
        volume, n = self.volume, self.volume.n
        self.error, y = error.detach(), self.y
        error = self.error
        of_w = error[:, :n] / (volume.atol + volume.rtol * y[:, :n].abs())
        tolerance = volume.atol * volume.own.root + volume.rtol * volume._volume(y).abs()
        return torch.maximum(volume.own.mean(of_w.pow(2)).sqrt(), (volume._volume(error) / tolerance).abs()).max()

    def callback_step(self, angle: Tensor, y: Tensor, step: Tensor) -> None:
        motion, at = self.volume.motion, self._half_log_snr(angle)
        self.step, self.y = float(step), y.detach()
        if float(angle) + self.step == float(angle):
            raise underflow(motion, at, "the step size underflows")
        motion.accept(at, self.y[:, : self.volume.n].reshape(len(y), *self.volume.event))

    def callback_accept_step(self, angle: Tensor, y: Tensor, step: Tensor) -> None:
        volume, n = self.volume, self.volume.n
        assert self.last is not None
        at, w, rate = self.last  # at the step's end: dw = -(D / c - a w) / b dtheta, a = cos(theta), b = sin(theta)
        _, signal, sigma, _ = volume.motion.scales(at)
        gradient = -(signal / sigma) * rate - w  # of log p in w: r (alpha D - r w) / sigma^2
        change = volume.own.sum(gradient * self.error[:, :n]) + volume._volume(self.error)
        volume.error = volume.error + change.abs()


def _rms_of_state_and_adjoint(parts: Sequence[Tensor]) -> Tensor:
    """Of the errors, against the adjoint's own tolerances, of (t, state, adjoint, parameters' adjoints)."""
    return torch.stack([part.detach().pow(2).mean().sqrt() for part in parts[1:3]]).max()
