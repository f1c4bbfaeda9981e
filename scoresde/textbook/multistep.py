"""The papers' exponential multistep algorithms, transcribed literally: what `solvers.exponential` must equal.

One step at a time with plain tensors, in each paper's own form: phi functions with ratios r_k and differences D1, D2
(DPM-Solver++), a Vandermonde system for rho (UniPC), integrals by `scipy.integrate.quad` (DEIS, SA-Solver, ER-SDE).
Nothing here knows of tables, views or rows.

Shared by all: times are t_0 > ... > t_N, z[i] is the noise of step i, a step to sigma = 0 is the denoiser's mean, the
first steps use as many values as there are, and a step that leaves alpha = 0 is first order, its value forgotten.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from numpy.polynomial import Polynomial
from scipy.integrate import quad
from torch import Tensor

from scoresde.denoiser import Denoiser
from scoresde.sde import SDE

__all__ = ["Function", "Times", "ddim_update", "deis_log_rho", "deis_rho_ab", "deis_t_ab", "dpm_solver_pp",
           "exponential_ab", "ipndm", "lagrange_weights", "quadrature", "run", "sde_dpm_solver_pp"]  # fmt: skip

Function = Callable[[float], float]


class Times:
    """alpha, sigma, lambda = log(alpha / sigma) and u = sigma / alpha at each time, as Python numbers."""

    def __init__(self, sde: SDE, times: Tensor) -> None:
        self.t = times.tolist()
        self.alpha, self.sigma = sde.alpha(times).tolist(), sde.sigma(times).tolist()
        self.lam = sde.half_log_snr(times).tolist()
        self.u = [sigma / alpha if alpha > 0 else math.inf for alpha, sigma in zip(self.alpha, self.sigma, strict=True)]

    def h(self, i: int) -> float:
        """lambda_{i+1} - lambda_i, the step that leaves t_i."""
        return self.lam[i + 1] - self.lam[i]


def quadrature(f: Function, a: float, b: float, breaks: Sequence[float] = ()) -> float:
    """int_a^b f, in pieces: at `breaks` f may have a kink."""
    inside = sorted((p for p in breaks if min(a, b) < p < max(a, b)), reverse=b < a)
    pieces = pairwise([a, *inside, b])
    return sum(float(quad(f, low, high, epsabs=0.0, epsrel=1e-12, limit=200)[0]) for low, high in pieces)


def _lagrange(nodes: Sequence[float], j: int, x: float) -> float:
    """l_j(x): 1 at nodes[j], 0 at the others."""
    return math.prod((x - node) / (nodes[j] - node) for k, node in enumerate(nodes) if k != j)


def lagrange_weights(
    nodes: Sequence[float], kernel: Function, a: float, b: float, chi: Function | None = None, breaks: Any = ()
) -> list[float]:
    """int_a^b kernel(omega) l_j(chi(omega)) domega for each j; chi is the identity by default."""

    def weight(j: int) -> float:
        return quadrature(
            lambda omega: kernel(omega) * _lagrange(nodes, j, omega if chi is None else chi(omega)), a, b, breaks
        )

    return [weight(j) for j in range(len(nodes))]


def ddim_update(T: Times, i: int, x: Tensor, D: Tensor) -> Tensor:
    """Song, Meng and Ermon (2021), eq. 12 with eta = 0; it has no division by alpha_t."""
    eps = (x - T.alpha[i] * D) / T.sigma[i]
    return T.alpha[i + 1] * D + T.sigma[i + 1] * eps


def run(
    denoiser: Denoiser,
    x: Tensor,
    times: Tensor,
    view: str,
    first: Callable[[Times, int, Tensor, Tensor], Tensor],
    step: Callable[[Times, int, Tensor, list[tuple[int, Tensor]]], Tensor],
) -> Tensor:
    """The loop that all methods without a corrector have: `step` gets the history [(i, F_i), (i - 1, F_{i-1}), ...]."""
    T = Times(denoiser.sde, times)
    history: list[tuple[int, Tensor]] = []
    for i, t in enumerate(times[:-1]):
        D = denoiser(x, t).mean
        if T.sigma[i + 1] == 0:
            return D
        if T.alpha[i] == 0 and view != "v":
            x = first(T, i, x, D)
            continue
        F = D if view == "x0" else denoiser.view(view, x, t)
        history.insert(0, (i, F))
        x = step(T, i, x, history)
    return x


# Exponential Adams-Bashforth.


def exponential_ab(
    denoiser: Denoiser, x: Tensor, times: Tensor, order: int, view: str = "x0", variable: str | None = None
) -> Tensor:
    """Variation of constants, with the Lagrange interpolant of F in `variable` for F (Hochbruck and Ostermann, 2010,
    section 2.5): d(x / sigma) = D d(e^lambda), d(x / alpha) = eps d(sigma / alpha), d(x / r) = (v / r) d(angle).
    """
    sde = denoiser.sde
    variable = variable or ("angle" if view == "v" else "half_log_snr")

    def number(t: float, what: str) -> float:
        alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
        return {
            "half_log_snr": lambda: float(sde.half_log_snr(t)),
            "sigma": lambda: sigma / alpha,
            "t": lambda: float(t),
            "angle": lambda: math.atan2(sigma, alpha),
            "radius": lambda: math.hypot(alpha, sigma),
            "softplus": lambda: math.log((alpha + sigma) / (alpha + sigma / 1000)),
        }[what]()

    def of_lambda(lam: float) -> float:
        """The interpolation variable at that half log-SNR."""
        return {
            "half_log_snr": lambda: lam,
            "sigma": lambda: math.exp(-lam),
            "t": lambda: float(sde.time_at(lam)),
            "angle": lambda: math.atan(math.exp(-lam)),
            "softplus": lambda: math.log((1 + math.exp(-lam)) / (1 + math.exp(-lam) / 1000)),
        }[variable]()

    def of_angle(psi: float) -> float:
        return psi if variable == "angle" else of_lambda(-math.log(math.tan(psi)))

    def step(T: Times, i: int, x: Tensor, history: list[tuple[int, Tensor]]) -> Tensor:
        used = history[:order]
        nodes = [number(T.t[j], variable) for j, _ in used]
        values = [F for _, F in used]
        lam_t, lam_s = T.lam[i], T.lam[i + 1]
        psi_t, psi_s, r_t, r_s = (number(t, what) for what in ("angle", "radius") for t in T.t[i : i + 2])
        if view == "x0":  # scaled by e^{-lambda_s}, so that nothing overflows
            w = lagrange_weights(nodes, lambda lam: math.exp(lam - lam_s), lam_t, lam_s, of_lambda)
        elif view == "eps":
            w = lagrange_weights(nodes, lambda lam: -math.exp(-lam), lam_t, lam_s, of_lambda)
        else:
            w = lagrange_weights(nodes, lambda psi: 1.0, psi_t, psi_s, of_angle)
            values = [F / number(T.t[j], "radius") for j, F in used]
        total = torch.stack([w_j * F for w_j, F in zip(w, values, strict=True)]).sum(0)
        if view == "x0":
            return T.sigma[i + 1] / T.sigma[i] * x + T.alpha[i + 1] * total
        if view == "eps":
            return T.alpha[i + 1] * (x / T.alpha[i] + total)
        return r_s * (x / r_t + total)

    return run(denoiser, x, times, view, ddim_update, step)


# DPM-Solver++.


def dpm_solver_pp(
    denoiser: Denoiser, x: Tensor, times: Tensor, order: int, rule: str = "midpoint", as_published: bool = False
) -> Tensor:
    """Lu et al. (2022b), multistep: algorithm 2 (2M), and the third order of the authors' code (3M).

    rule: of the second-order update, "midpoint" (the paper's 2M) or "exact", the Taylor term with its own phi.
    as_published: D2 of the authors' code, half of h^2 D''.
    """

    def step(T: Times, i: int, x: Tensor, history: list[tuple[int, Tensor]]) -> Tensor:
        h = T.h(i)
        phi_1 = math.expm1(-h)
        out = T.sigma[i + 1] / T.sigma[i] * x - T.alpha[i + 1] * phi_1 * history[0][1]
        n = min(order, len(history))
        m = [F for _, F in history[:n]]
        if n == 1:
            return out
        r0 = T.h(history[1][0]) / h
        D1_0 = (m[0] - m[1]) / r0
        phi_2 = phi_1 / h + 1
        if n == 2:
            if rule == "midpoint":
                return out - 0.5 * T.alpha[i + 1] * phi_1 * D1_0
            return out + T.alpha[i + 1] * phi_2 * D1_0
        r1 = T.h(history[2][0]) / h
        D1_1 = (m[1] - m[2]) / r1
        D1 = D1_0 + r0 / (r0 + r1) * (D1_0 - D1_1)
        D2 = (D1_0 - D1_1) / (r0 + r1) * (1 if as_published else 2)
        phi_3 = phi_2 / h - 0.5
        return out + T.alpha[i + 1] * phi_2 * D1 - T.alpha[i + 1] * phi_3 * D2

    return run(denoiser, x, times, "x0", ddim_update, step)


def sde_dpm_solver_pp(
    denoiser: Denoiser,
    x: Tensor,
    times: Tensor,
    z: Sequence[Tensor],
    order: int,
    rule: str = "midpoint",
    as_published: bool = False,
) -> Tensor:
    """Lu et al. (2022b), SDE-DPM-Solver++(2M) of section 5: e^{-h} x and 1 - e^{-2h}; the third order by the same
    differences with H = 2h in the phi functions.
    """

    def first(T: Times, i: int, x: Tensor, D: Tensor) -> Tensor:
        return T.alpha[i + 1] * D + T.sigma[i + 1] * z[i]  # h = inf

    def step(T: Times, i: int, x: Tensor, history: list[tuple[int, Tensor]]) -> Tensor:
        h = T.h(i)
        H = 2 * h
        noise = T.sigma[i + 1] * math.sqrt(-math.expm1(-2 * h)) * z[i]
        m = [F for _, F in history]
        out = T.sigma[i + 1] / T.sigma[i] * math.exp(-h) * x - T.alpha[i + 1] * math.expm1(-H) * m[0] + noise
        n = min(order, len(history))
        if n == 1:
            return out
        r0 = T.h(history[1][0]) / h
        D1_0 = (m[0] - m[1]) / r0
        phi_2 = math.expm1(-H) / H + 1
        if n == 2:
            if rule == "midpoint":
                return out - 0.5 * T.alpha[i + 1] * math.expm1(-H) * D1_0
            return out + T.alpha[i + 1] * phi_2 * D1_0
        r1 = T.h(history[2][0]) / h
        D1_1 = (m[1] - m[2]) / r1
        D1 = D1_0 + r0 / (r0 + r1) * (D1_0 - D1_1)
        D2 = (D1_0 - D1_1) / (r0 + r1) * (1 if as_published else 2)
        phi_3 = phi_2 / H - 0.5
        return out + T.alpha[i + 1] * phi_2 * D1 - T.alpha[i + 1] * phi_3 * D2

    return run(denoiser, x, times, "x0", first, step)


# DEIS and iPNDM, in y = x / alpha and u = sigma / alpha: dy = eps du.


def deis_t_ab(denoiser: Denoiser, x: Tensor, times: Tensor, order: int, breaks: Sequence[float] = ()) -> Tensor:
    """Zhang and Chen (2023), tAB-DEIS: C_j = int u'(tau) prod_k (tau - t_k) / (t_j - t_k) dtau, by quadrature in t."""
    sde = denoiser.sde

    def u_dot(tau: float) -> float:
        alpha, sigma = float(sde.alpha(tau)), float(sde.sigma(tau))
        alpha_dot, sigma_dot = (float(rate) for rate in sde.rates(tau))
        return (sigma_dot * alpha - sigma * alpha_dot) / alpha**2

    def step(T: Times, i: int, x: Tensor, history: list[tuple[int, Tensor]]) -> Tensor:
        used = history[:order]
        C = lagrange_weights([T.t[j] for j, _ in used], u_dot, T.t[i], T.t[i + 1], breaks=breaks)
        y = x / T.alpha[i] + torch.stack([C_j * eps for C_j, (_, eps) in zip(C, used, strict=True)]).sum(0)
        return T.alpha[i + 1] * y

    return run(denoiser, x, times, "eps", ddim_update, step)


def deis_rho_ab(denoiser: Denoiser, x: Tensor, times: Tensor, order: int) -> Tensor:
    """Zhang and Chen (2023), rhoAB-DEIS: the same in rho = u, where the integrand is a polynomial."""

    def step(T: Times, i: int, x: Tensor, history: list[tuple[int, Tensor]]) -> Tensor:
        used = history[:order]
        width = T.u[i + 1] - T.u[i]
        # In (u - u_i) / width, whose integral runs from 0 to 1.
        nodes = [(T.u[j] - T.u[i]) / width for j, _ in used]
        y = x / T.alpha[i]
        for k, (_, eps) in enumerate(used):
            l = Polynomial([1.0])  # noqa: E741
            for m, node in enumerate(nodes):
                if m != k:
                    l = l * Polynomial([-node, 1.0]) / (nodes[k] - node)  # noqa: E741
            y = y + width * float(l.integ()(1.0)) * eps
        return T.alpha[i + 1] * y

    return run(denoiser, x, times, "eps", ddim_update, step)


def deis_log_rho(denoiser: Denoiser, x: Tensor, times: Tensor, order: int, lower_final: bool = False) -> Tensor:
    """The same with polynomials in log rho, the "logrho" of diffusers: by parts, int L^k drho = rho L^k - k int L^{k-1}
    drho with L = log(rho / rho_i). With lower_final the last steps take as many values as there are steps left.
    """

    def integral(k: int, r: float) -> float:
        return r if k == 0 else r * math.log(r) ** k - k * integral(k - 1, r)

    def step(T: Times, i: int, x: Tensor, history: list[tuple[int, Tensor]]) -> Tensor:
        used = history[: min(order, len(T.t) - 1 - i) if lower_final else order]
        nodes = [math.log(T.u[j] / T.u[i]) for j, _ in used]
        y = x / T.alpha[i]
        for k, (_, eps) in enumerate(used):
            l = Polynomial([1.0])  # noqa: E741
            for m, node in enumerate(nodes):
                if m != k:
                    l = l * Polynomial([-node, 1.0]) / (nodes[k] - node)  # noqa: E741
            end = T.u[i + 1] / T.u[i]
            C = T.u[i] * sum(float(c) * (integral(n, end) - integral(n, 1.0)) for n, c in enumerate(l.coef))
            y = y + C * eps
        return T.alpha[i + 1] * y

    return run(denoiser, x, times, "eps", ddim_update, step)


def ipndm(denoiser: Denoiser, x: Tensor, times: Tensor, order: int) -> Tensor:
    """Zhang and Chen (2023), iPNDM: the fixed Adams-Bashforth weights on eps, lower orders at the start."""
    weights = [[1.0], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]

    def step(T: Times, i: int, x: Tensor, history: list[tuple[int, Tensor]]) -> Tensor:
        n = min(order, len(history))
        eps = sum(w * F for w, (_, F) in zip(weights[n - 1], history[:n], strict=True))
        return T.alpha[i + 1] * (x / T.alpha[i] + (T.u[i + 1] - T.u[i]) * eps)

    return run(denoiser, x, times, "eps", ddim_update, step)
