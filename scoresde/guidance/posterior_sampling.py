"""Posterior sampling for inverse problems, y = A(x_0) + noise_std eta with eta ~ N(0, I). With D = E[x_0 | x_t],
J = dD/dx_t and the residual e = y - A(D), four guesses of grad log p(y | x_t):

    DPS              J^T A^T e / noise_std^2
    reconstruction   J^T A^T e / (noise_std^2 + sigma^2 / alpha^2)
    PiGDM            J^T A^T (noise_std^2 I + r_t^2 A A^T)^-1 e
    moment matching  J^T A^T (noise_std^2 I + A V A^T)^-1 e,          V = Cov[x_0 | x_t] = (sigma^2 / alpha) J

Each is the score of N(y; A D, S) in which S is taken not to depend on x_t: S = noise_std^2 I leaves out that x_0 is
uncertain given x_t, the second takes what is measured to be as uncertain as the noise of x_t alone would leave it,
S = noise_std^2 I + r_t^2 A A^T takes all of x_0 to be uncertain alike, and the last has the first two moments of
p(y | x_t) right (Tweedie's second-order formula), so it is exact where the data is Gaussian. Where A is not linear it
is replaced in S and in front of e by its derivative at D.

DPS is biased, however many the steps. On data N(m, v) and y = x_0 + noise of variance n, the ODE ends in a Gaussian
with (F the Dawson function, k = v / (2 n); exact is mean m + (y - m) v / (v + n), variance v n / (v + n))

    mean  m + (y - m) 2 sqrt(k) F(sqrt(k)),    variance  v e^{-2 k}

so for accurate measurements its spread is exponentially too small: at n = v the mean goes 0.72 instead of 0.5 of the
way, with a standard deviation of 0.61 sqrt(v) instead of 0.71 sqrt(v).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from scoresde.checks import ArgumentError, check_count, check_option, check_positive
from scoresde.denoiser import Denoiser
from scoresde.guidance.base import Scale, known_all, ratio, scaled, shifted
from scoresde.guidance.gradients import (
    Forward,
    Mean,
    Product,
    derivative,
    differentiated,
    gradient_of_mean,
    usable,
    usable_gradients,
)
from scoresde.guidance.measured import Measured
from scoresde.guidance.operators import LinearOperator
from scoresde.guidance.particles import Twist
from scoresde.schedules import VPSDE
from scoresde.tensors import Time, dot, expand_like, known_any, precise

__all__ = ["DPS", "MomentMatching", "PiGDM", "ReconstructionGuidance"]


_LEAST_R2 = 1e-20
"""r_t^2 where there is no noise: its inverse, the size of the gradient, is a number in single precision too."""


class _Plain(Measured):
    """g = -grad |e|^2 / (2 S), of a number S."""

    def plain(self, x: Tensor, t: Time, cond: Mapping[str, Any], precision: Tensor | None) -> Twist:
        """The twist for 1 / S of shape () or (B,); None for 2."""
        y, t = self.measurement(x), usable(t)
        half = None if precision is None else usable((precision / 2).to(x))

        def log_density(D: Tensor) -> Tensor:
            e = y - self.operator(D)
            squares = dot(e, e)
            return -squares if half is None else -squares * half

        return Twist(*gradient_of_mean(self.denoiser, log_density, x, t, cond))


class DPS(_Plain):
    """Diffusion posterior sampling (Chung et al., 2023, "Diffusion posterior sampling for general noisy inverse
    problems"), for any operator that can be differentiated: with e = y - A(D(x_t)),

        noise_std given    g = -grad |e|^2 / (2 noise_std^2)      with N(y; A(D), noise_std^2 I) for p(y | x_t)
        noise_std None     g = -(N / beta(t)) grad |e|^2 / |e|    the published step, normalised

    The second is the limit of the paper's algorithm 1, x_s <- x_s - zeta grad |e|^2 / |e| after each of N steps of
    DDPM, with the scale as zeta and `steps` as N: on the VP SDE with N equal steps in t, and DDPM, it is that algorithm
    but for terms of order 1 / N. beta(t) is that SDE's at the same half log-SNR: so it means the same on every SDE.
    It is no likelihood, and its law is not that of x_0 given y.

    Both are biased, the first as the module says, however many the steps; with a small noise_std it also needs many. As
    a proposal in `TwistedSMC` the first is exact.

    Args:
        denoiser: the model.
        operator: A, a function of (B, *event), differentiable. Where the denoiser has a codec it is one of z: of data
            `lambda z: A(denoiser.codec.decode(z))`.
        y: shape (1, *measurement) or (B, *measurement).
        scale: w, in the second form zeta, for which the paper has 0.3 to 1.
        noise_std: standard deviation of the measurement's noise, one number or (B,).
        steps: N of the second form.

    Raises:
        TypeError: if the denoiser is none, or the operator no function.
        ValueError: on numbers out of range; by the call, if y, noise_std or scale have neither one entry nor one per
            sample, y is not of the operator's shape, or the operator's adjoint is not its own.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        operator: Forward,
        y: Tensor,
        scale: Scale = 1.0,
        *,
        noise_std: Tensor | float | None = None,
        steps: int = 100,
    ) -> None:
        super().__init__(denoiser, operator, y, noise_std, scale)
        if noise_std is not None and known_any(precise(noise_std) == 0):
            raise ArgumentError("noise_std=0: DPS divides by it; leave it away for the published step")
        check_count(steps=steps)
        self.steps = steps

    def twist(self, x: Tensor, t: Time, cond: Mapping[str, Any]) -> Twist:
        if self.noise_std is not None:
            return self.plain(x, t, cond, 1 / self.variance(len(x)))
        found = self.plain(x, t, cond, None)
        norm = (-found.log_prob).sqrt()
        g = scaled(found.gradient, torch.where(norm > 0, self._rate(t).to(norm) / norm, 0.0))
        return found._replace(gradient=g)

    def _rate(self, t: Time) -> Tensor:
        """N / beta at the time of the VP SDE that has the half log-SNR of t, shape () or (B,); at its end if there is
        more noise.
        """
        vp = VPSDE()
        level = self.sde.half_log_snr(precise(t)).clamp(min=float(vp.half_log_snr(vp.t_max)))
        return self.steps / vp.beta(vp.time_at(level))


class ReconstructionGuidance(_Plain):
    """Reconstruction guidance (Ho et al., 2022, "Video diffusion models", section 3.1), for any operator that can be
    differentiated: with e = y - A(D(x_t)),

        D' = D - (w alpha / 2) grad |e|^2        that is        g = -grad |e|^2 / (2 sigma^2 / alpha^2)

    with N(y; A D, (sigma^2 / alpha^2) I) for p(y | x_t): what x_t itself says of A x_0, and nothing that is known of
    the data. A measurement's own noise, which the paper has not, adds its variance there.

    For a mask it is `PiGDM` of data without bound (data_std -> infinity), where it is exact; of data N(m, s^2 I) it is
    too weak, by (alpha^2 s^2 + sigma^2) / (alpha^2 s^2), most where the noise is large: so the paper takes w > 1. It
    also puts the known part of the state at its own noise level, which is the solver's part here:

        sample(ReconstructionGuidance(denoiser, mask, y, scale=2.0), shape, Replacement(DDPM(), mask, y), steps=100)

    Args:
        denoiser, operator, y: as for `DPS`.
        scale: w, w_r in the paper.
        noise_std: standard deviation of the measurement's noise, one number or (B,).

    Raises:
        TypeError, ValueError: as `DPS`; if noise_std is None.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        operator: Forward,
        y: Tensor,
        scale: Scale = 1.0,
        *,
        noise_std: Tensor | float = 0.0,
    ) -> None:
        super().__init__(denoiser, operator, y, _given(noise_std, type(self).__name__), scale)

    def twist(self, x: Tensor, t: Time, cond: Mapping[str, Any]) -> Twist:
        alpha2, sigma2, n = self.sde.alpha(precise(t)) ** 2, self.sde.sigma(precise(t)) ** 2, self.variance(len(x))
        S = sigma2 + alpha2 * (n.to(alpha2.device) if alpha2.ndim else n)  # alpha^2 of it: finite where alpha is 0
        return self.plain(x, t, cond, alpha2 / S.clamp(min=_LEAST_R2))


def _given(noise_std: Tensor | float | None, method: str) -> Tensor | float:
    if noise_std is None:
        raise ArgumentError(f"noise_std=None: {method} needs the noise of the measurement, 0 if it has none")
    return noise_std


class _Matched(Measured):
    """g = J^T A^T S^-1 e, S = noise_std^2 I + A V A^T, by conjugate gradients."""

    def __init__(
        self,
        denoiser: Denoiser,
        operator: Forward,
        y: Tensor,
        noise_std: Tensor | float,
        scale: Scale,
        iterations: int,
    ) -> None:
        super().__init__(denoiser, operator, y, _given(noise_std, type(self).__name__), scale)
        check_count(iterations=iterations)
        self.iterations = iterations

    wants_variance = False

    @abstractmethod
    def _covariance(self, found: Mean, x: Tensor, t: Time) -> Product:
        """v -> V v."""

    @usable_gradients()
    def twist(self, x: Tensor, t: Time, cond: Mapping[str, Any]) -> Twist:
        y, n, t = self.measurement(x), usable(self.variance(len(x))), usable(t)
        found = differentiated(self.denoiser, x, t, cond, self.wants_variance)
        value, forward, adjoint = derivative(self.operator, found.mean)
        by_mean, squares = self._solved(y - value, n, self._covariance(found, x, t), forward, adjoint, t)
        return Twist(found.output, found.mean, -squares / 2, found.transposed(by_mean))

    def _solved(
        self, e: Tensor, n: Tensor, V: Product, forward: Product, adjoint: Product, t: Time
    ) -> tuple[Tensor, Tensor]:
        """A^T S^-1 e, of the shape of x, and e^T S^-1 e, shape (B,)."""

        def S(u: Tensor) -> Tensor:
            return expand_like(n, u) * u + forward(V(adjoint(u)))

        u = _conjugate_gradients(S, e, self.iterations, n)
        return adjoint(u), dot(e, u)


class PiGDM(_Matched):
    """Pseudo-inverse guidance (Song et al., 2023, "Pseudoinverse-guided diffusion models for inverse problems"): x_0
    given x_t is taken to be N(D, r_t^2 I), with

        r_t^2 = s^2 sigma^2 / (alpha^2 s^2 + sigma^2)

    which is right for data N(m, s^2 I), where it is exact; at s = 1 it is the paper's choice, at noise_std = 0 the
    gradient is J^T A^+ e / r_t^2. (The paper then multiplies by weights of its own: a function of t as `scale`.) One
    call of the network and one backward pass through it.

    Args:
        denoiser, operator, y: as for `DPS`; an operator that is not linear is linearised at D.
        noise_std: standard deviation of the measurement's noise, one number or (B,), 0 allowed.
        data_std: s, in the units of x; the SDE's `data_scale` by default.
        r2: instead, the function from t, float64 of shape () or (B,), to r_t^2 > 0, of the same shape.
        scale: w.
        iterations: of conjugate gradients for S, at most, where the operator's `ridge` has no closed form; they
            evaluate the operator only, and end when they have converged.

    Raises:
        TypeError, ValueError: as `DPS`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        operator: Forward,
        y: Tensor,
        noise_std: Tensor | float,
        *,
        data_std: float | None = None,
        r2: Callable[[Tensor], Tensor] | None = None,
        scale: Scale = 1.0,
        iterations: int = 100,
    ) -> None:
        super().__init__(denoiser, operator, y, noise_std, scale, iterations)
        data_std = self.sde.data_scale if data_std is None else data_std
        check_positive(data_std=data_std)
        if r2 is not None and not callable(r2):
            raise TypeError(f"r2 is {type(r2).__name__}: expected a function of t")
        self.data_std, self._r2 = data_std, r2

    def r2(self, t: Time) -> Tensor:
        """r_t^2, float64, of the shape of t."""
        t = precise(t)
        if self._r2 is not None:
            return precise(self._r2(t))
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        return (self.data_std * sigma / torch.hypot(alpha * self.data_std, sigma)) ** 2

    def _covariance(self, found: Mean, x: Tensor, t: Time) -> Product:
        r2 = self.r2(t)
        return lambda v: scaled(v, r2)

    def _solved(
        self, e: Tensor, n: Tensor, V: Product, forward: Product, adjoint: Product, t: Time
    ) -> tuple[Tensor, Tensor]:
        """A^T S^-1 e = A^T (A A^T + (n / r^2) I)^-1 e / r^2, what A loses left out as in its pseudo-inverse: at n = 0
        conjugate gradients would divide the rounding of y by the smallest gains.
        """
        if not (isinstance(self.operator, LinearOperator) and self.operator.closed_form):
            return super()._solved(e, n, V, forward, adjoint, t)
        r2 = self.r2(t).clamp(min=_LEAST_R2)
        n = n.to(r2.device) if r2.ndim else n
        v = scaled(self.operator.ridge(e, n / r2), 1 / r2)
        # With v = A^T u, u = S^-1 e: e^T u = u^T S u = n |u|^2 + r^2 |v|^2, where n u = e - r^2 A v; at n = 0 of the
        # part of e that A can make.
        nu = e - forward(scaled(v, r2))
        return v, dot(v, scaled(v, r2)) + scaled(dot(nu, nu), ratio(torch.ones_like(n), n))


class MomentMatching(_Matched):
    """Moment matching with the posterior covariance (Rozet et al., 2024, MMPS; Boys et al., 2023, "Tweedie moment
    projected diffusions for inverse problems"), exact for Gaussian data in the limit of many steps.

    covariance
    "jacobian"   V = (sigma^2 / alpha) J, in products only: MMPS. One call of the network and 1 + iterations backward
                 passes
    "row sum"    V = diag((sigma^2 / alpha) J^T 1), of Boys et al.: two backward passes. Sums of rows can be negative
                 where the data is anti-correlated, and are then taken to be 0
    "variance"   V = diag(Posterior.var), of a denoiser that knows it (an `AnalyticDenoiser`, or the exact ones): one
                 backward pass

    J is symmetric where D is a posterior mean; of a network it is nearly so. Where V is found not to be positive,
    conjugate gradients end for that sample with what they have. At noise_std = 0 the system is as ill-conditioned as
    A V A^T. Means are clipped outside, `Clip(MomentMatching(denoiser, ...))`: a clip inside takes J its symmetry.

    Args:
        denoiser, operator, y: as for `DPS`; an operator that is not linear is linearised at D.
        noise_std: standard deviation of the measurement's noise, one number or (B,), 0 allowed.
        covariance: see above.
        scale: w.
        iterations: of conjugate gradients for S, at most; as many as y has entries are exact. By default 2 for
            "jacobian", of whose product a network makes an asymmetric one (inpainting with a network trained on
            Fashion-MNIST: rms error 0.19, 0.18 and 0.23 with 1, 2 and 5), and 100 for the others, which need the
            operator only and end when they have converged.

    Raises:
        TypeError, ValueError: as `DPS`; on another covariance; by the call, for "variance", if the denoiser knows none.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        operator: Forward,
        y: Tensor,
        noise_std: Tensor | float,
        *,
        covariance: Literal["jacobian", "row sum", "variance"] = "jacobian",
        scale: Scale = 1.0,
        iterations: int | None = None,
    ) -> None:
        check_option(("jacobian", "row sum", "variance"), covariance=covariance)
        iterations = (2 if covariance == "jacobian" else 100) if iterations is None else iterations
        super().__init__(denoiser, operator, y, noise_std, scale, iterations)
        self.kind, self.wants_variance = covariance, covariance == "variance"
        if self.wants_variance and denoiser.borrowed:
            raise ValueError(
                f"covariance='variance', but that of {denoiser!r} is another law's than its mean's: take 'jacobian'"
            )

    def _covariance(self, found: Mean, x: Tensor, t: Time) -> Product:
        if self.kind == "jacobian":
            return lambda v: self._times_ratio(found.transposed(v), t)
        if self.kind == "row sum":
            diagonal = self._times_ratio(found.transposed(torch.ones_like(x)), t).clamp(min=0)
        else:
            assert found.var is not None
            diagonal = found.var
        return lambda v: diagonal * v

    def _times_ratio(self, v: Tensor, t: Time) -> Tensor:
        """(sigma^2 / alpha) v; 0 where alpha is, where J is zero and V not known by it."""
        return shifted(torch.zeros_like(v), v, self.sde, t)


def _conjugate_gradients(product: Product, b: Tensor, iterations: int, least: Tensor) -> Tensor:
    """u with product(u) = b from u = 0 (Hestenes and Stiefel, 1952), for a symmetric product whose eigenvalues are not
    below `least`, of shape () or (B,), each sample with steps of its own. One that has converged, or along whose
    direction the product is less than that, as a network's Jacobian may make it, stays: its step would be far too long.
    Where it is not finite u is NaN: zero would pass for a measurement that says nothing.
    """
    least = (1 - 1e-3) * least.to(b)
    u, residual, p = torch.zeros_like(b), b, b
    rr = dot(b, b)
    target = (8 * torch.finfo(b.dtype).eps) ** 2 * rr
    finite = rr.isfinite()
    for _ in range(min(iterations, b[0].numel())):
        q = product(p)
        curvature = dot(p, q)
        finite = finite & curvature.isfinite()
        on = (rr > target) & (curvature > 0) & (curvature >= least * dot(p, p))
        if known_all(~on):  # on a GPU, where a look would stall it, all iterations are made
            break
        step = torch.where(on, rr, 0.0) / torch.where(on, curvature, 1.0)
        u = u + expand_like(step, u) * p
        residual = residual - expand_like(step, q) * q
        before, rr = rr, dot(residual, residual)
        finite = finite & rr.isfinite()
        p = (
            torch.where(expand_like(on.to(b.dtype), p) == 1, residual, 0.0)
            + expand_like(torch.where(on, rr, 0.0) / torch.where(on, before, 1.0), p) * p
        )
    return torch.where(expand_like(finite.to(u.dtype), u) == 1, u, math.nan)
