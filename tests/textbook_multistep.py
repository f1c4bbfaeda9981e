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

import numpy as np
import torch
from numpy.polynomial import Polynomial
from scipy.integrate import quad
from torch import Tensor

from scoresde import SDE, Denoiser

Function = Callable[[float], float]


class _Times:
    """alpha, sigma, lambda = log(alpha / sigma) and u = sigma / alpha at each time, as Python numbers."""

    def __init__(self, sde: SDE, times: Tensor) -> None:
        self.t = times.tolist()
        self.alpha, self.sigma = sde.alpha(times).tolist(), sde.sigma(times).tolist()
        self.lam = sde.half_log_snr(times).tolist()
        self.u = [sigma / alpha if alpha > 0 else math.inf for alpha, sigma in zip(self.alpha, self.sigma, strict=True)]

    def h(self, i: int) -> float:
        """lambda_{i+1} - lambda_i, the step that leaves t_i."""
        return self.lam[i + 1] - self.lam[i]


def _integral(f: Function, a: float, b: float, breaks: Sequence[float] = ()) -> float:
    """int_a^b f, in pieces: at `breaks` f may have a kink."""
    inside = sorted((p for p in breaks if min(a, b) < p < max(a, b)), reverse=b < a)
    pieces = pairwise([a, *inside, b])
    return sum(float(quad(f, low, high, epsabs=0.0, epsrel=1e-12, limit=200)[0]) for low, high in pieces)


def _lagrange(nodes: Sequence[float], j: int, x: float) -> float:
    """l_j(x): 1 at nodes[j], 0 at the others."""
    return math.prod((x - node) / (nodes[j] - node) for k, node in enumerate(nodes) if k != j)


def _weights(
    nodes: Sequence[float], kernel: Function, a: float, b: float, chi: Function | None = None, breaks: Any = ()
) -> list[float]:
    """int_a^b kernel(omega) l_j(chi(omega)) domega for each j; chi is the identity by default."""

    def weight(j: int) -> float:
        return _integral(
            lambda omega: kernel(omega) * _lagrange(nodes, j, omega if chi is None else chi(omega)), a, b, breaks
        )

    return [weight(j) for j in range(len(nodes))]


def _ddim(T: _Times, i: int, x: Tensor, D: Tensor) -> Tensor:
    """Song, Meng and Ermon (2021), eq. 12 with eta = 0; it has no division by alpha_t."""
    eps = (x - T.alpha[i] * D) / T.sigma[i]
    return T.alpha[i + 1] * D + T.sigma[i + 1] * eps


def _run(
    denoiser: Denoiser,
    x: Tensor,
    times: Tensor,
    view: str,
    first: Callable[[_Times, int, Tensor, Tensor], Tensor],
    step: Callable[[_Times, int, Tensor, list[tuple[int, Tensor]]], Tensor],
) -> Tensor:
    """The loop that all methods without a corrector have: `step` gets the history [(i, F_i), (i - 1, F_{i-1}), ...]."""
    T = _Times(denoiser.sde, times)
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
        }[what]()

    def of_lambda(lam: float) -> float:
        """The interpolation variable at that half log-SNR."""
        return {
            "half_log_snr": lambda: lam,
            "sigma": lambda: math.exp(-lam),
            "t": lambda: float(sde.time_at(lam)),
            "angle": lambda: math.atan(math.exp(-lam)),
        }[variable]()

    def of_angle(psi: float) -> float:
        return psi if variable == "angle" else of_lambda(-math.log(math.tan(psi)))

    def step(T: _Times, i: int, x: Tensor, history: list[tuple[int, Tensor]]) -> Tensor:
        used = history[:order]
        nodes = [number(T.t[j], variable) for j, _ in used]
        values = [F for _, F in used]
        lam_t, lam_s = T.lam[i], T.lam[i + 1]
        psi_t, psi_s, r_t, r_s = (number(t, what) for what in ("angle", "radius") for t in T.t[i : i + 2])
        if view == "x0":  # scaled by e^{-lambda_s}, so that nothing overflows
            w = _weights(nodes, lambda lam: math.exp(lam - lam_s), lam_t, lam_s, of_lambda)
        elif view == "eps":
            w = _weights(nodes, lambda lam: -math.exp(-lam), lam_t, lam_s, of_lambda)
        else:
            w = _weights(nodes, lambda psi: 1.0, psi_t, psi_s, of_angle)
            values = [F / number(T.t[j], "radius") for j, F in used]
        total = torch.stack([w_j * F for w_j, F in zip(w, values, strict=True)]).sum(0)
        if view == "x0":
            return T.sigma[i + 1] / T.sigma[i] * x + T.alpha[i + 1] * total
        if view == "eps":
            return T.alpha[i + 1] * (x / T.alpha[i] + total)
        return r_s * (x / r_t + total)

    return _run(denoiser, x, times, view, _ddim, step)


# DPM-Solver++.


def dpm_solver_pp(
    denoiser: Denoiser, x: Tensor, times: Tensor, order: int, rule: str = "midpoint", as_published: bool = False
) -> Tensor:
    """Lu et al. (2022b), multistep: algorithm 2 (2M), and the third order of the authors' code (3M).

    rule: of the second-order update, "midpoint" (the paper's 2M) or "exact", the Taylor term with its own phi.
    as_published: D2 of the authors' code, half of h^2 D''.
    """

    def step(T: _Times, i: int, x: Tensor, history: list[tuple[int, Tensor]]) -> Tensor:
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

    return _run(denoiser, x, times, "x0", _ddim, step)


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

    def first(T: _Times, i: int, x: Tensor, D: Tensor) -> Tensor:
        return T.alpha[i + 1] * D + T.sigma[i + 1] * z[i]  # h = inf

    def step(T: _Times, i: int, x: Tensor, history: list[tuple[int, Tensor]]) -> Tensor:
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

    return _run(denoiser, x, times, "x0", first, step)


# DEIS and iPNDM, in y = x / alpha and u = sigma / alpha: dy = eps du.


def deis_t_ab(denoiser: Denoiser, x: Tensor, times: Tensor, order: int, breaks: Sequence[float] = ()) -> Tensor:
    """Zhang and Chen (2023), tAB-DEIS: C_j = int u'(tau) prod_k (tau - t_k) / (t_j - t_k) dtau, by quadrature in t."""
    sde = denoiser.sde

    def u_dot(tau: float) -> float:
        alpha, sigma = float(sde.alpha(tau)), float(sde.sigma(tau))
        alpha_dot, sigma_dot = (float(rate) for rate in sde.rates(tau))
        return (sigma_dot * alpha - sigma * alpha_dot) / alpha**2

    def step(T: _Times, i: int, x: Tensor, history: list[tuple[int, Tensor]]) -> Tensor:
        used = history[:order]
        C = _weights([T.t[j] for j, _ in used], u_dot, T.t[i], T.t[i + 1], breaks=breaks)
        y = x / T.alpha[i] + torch.stack([C_j * eps for C_j, (_, eps) in zip(C, used, strict=True)]).sum(0)
        return T.alpha[i + 1] * y

    return _run(denoiser, x, times, "eps", _ddim, step)


def deis_rho_ab(denoiser: Denoiser, x: Tensor, times: Tensor, order: int) -> Tensor:
    """Zhang and Chen (2023), rhoAB-DEIS: the same in rho = u, where the integrand is a polynomial."""

    def step(T: _Times, i: int, x: Tensor, history: list[tuple[int, Tensor]]) -> Tensor:
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

    return _run(denoiser, x, times, "eps", _ddim, step)


def ipndm(denoiser: Denoiser, x: Tensor, times: Tensor, order: int) -> Tensor:
    """Zhang and Chen (2023), iPNDM: the fixed Adams-Bashforth weights on eps, lower orders at the start."""
    weights = [[1.0], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]

    def step(T: _Times, i: int, x: Tensor, history: list[tuple[int, Tensor]]) -> Tensor:
        n = min(order, len(history))
        eps = sum(w * F for w, (_, F) in zip(weights[n - 1], history[:n], strict=True))
        return T.alpha[i + 1] * (x / T.alpha[i] + (T.u[i + 1] - T.u[i]) * eps)

    return _run(denoiser, x, times, "eps", _ddim, step)


# UniPC.


def _unipc_integrals(h: float, n: int, sign: int) -> list[float]:
    """h int_0^1 e^{sign (1 - theta) h} theta^k dtheta for k = 0..n: h^{k+1} k! phi_{k+1} of the paper, for eps
    (sign = 1) or for data (sign = -1).
    """

    def integral(k: int) -> float:
        return h * _integral(lambda theta: math.exp(sign * (1 - theta) * h) * theta**k, 0.0, 1.0)

    return [integral(k) for k in range(n + 1)]


def unipc(
    denoiser: Denoiser,
    x: Tensor,
    times: Tensor,
    order: int,
    view: str = "x0",
    rule: str = "B2",
    corrector: bool = True,
) -> tuple[Tensor, list[Tensor]]:
    """Zhao et al. (2023), algorithms 1 and 2 (UniC-p, UniP-p) in PEC form, and the states it was evaluated at.

    rule: B(h) of the two shortcuts rho = 1/2 (UniP-2 and UniC-1): h, or e^h - 1 (|e^{-h} - 1| for data); with "exact"
        rho is solved for there too.
    """
    T = _Times(denoiser.sde, times)
    sign = 1 if view == "eps" else -1

    def update(i: int, x: Tensor, F: Tensor, others: list[tuple[float, Tensor]], shortcut: bool) -> Tensor:
        """From t_i to t_{i+1} by F at t_i and F_m at lambda_i + r_m h for (r_m, F_m) in `others`."""
        h = T.h(i)
        G = _unipc_integrals(h, len(others), sign)
        B = h if rule == "B1" else sign * math.expm1(sign * h)
        r = np.array([r_m for r_m, _ in others])
        R = np.stack([r**k for k in range(len(r))]) if len(r) else np.zeros((0, 0))
        rho = [0.5] if shortcut and rule != "exact" else np.linalg.solve(R, np.array(G[1:]) / B) if len(r) else []
        combined = G[0] * F + sum(B * p / r_m * (F_m - F) for p, (r_m, F_m) in zip(rho, others, strict=True))
        if view == "eps":
            return T.alpha[i + 1] / T.alpha[i] * x - T.sigma[i + 1] * combined
        return T.sigma[i + 1] / T.sigma[i] * x + T.alpha[i + 1] * combined

    history: list[tuple[int, Tensor]] = []
    before: tuple[int, Tensor, list[tuple[float, Tensor]]] | None = None  # step, corrected start and nodes of it
    seen = []
    for i, t in enumerate(times[:-1]):
        seen.append(x)
        D = denoiser(x, t).mean
        if T.sigma[i + 1] == 0:
            return D, [*seen, D]
        if T.alpha[i] == 0:
            x = _ddim(T, i, x, D)
            continue
        F = D if view == "x0" else denoiser.eps(x, t)
        if corrector and before is not None:
            j, start, nodes = before  # the step j -> j + 1 = i once more, now with F at its end: r = 1
            x = update(j, start, history[0][1], [*nodes, (1.0, F)], shortcut=not nodes)
        history.insert(0, (i, F))
        nodes = [((T.lam[j] - T.lam[i]) / T.h(i), F_j) for j, F_j in history[1:order]]
        before = (i, x, nodes)
        x = update(i, x, F, nodes, shortcut=len(nodes) == 1)
    return x, [*seen, x]


# SA-Solver.


def sa_solver(
    denoiser: Denoiser,
    x: Tensor,
    times: Tensor,
    z: Sequence[Tensor],
    predictor: int,
    corrector: int,
    tau: Callable[[float], float],
) -> Tensor:
    """Xue et al. (2023), algorithm 1 in data prediction, PEC: SA-Predictor with `predictor` values, SA-Corrector with
    `corrector` values, that at the predicted state among them (the authors' code counts so), and the predictor's noise.

    b_j = sigma_s int e^{-tau^2 (lambda_s - lambda)} (1 + tau^2) e^lambda l_j(lambda) dlambda, tau that of the step's
    start, noise sigma_s sqrt(1 - e^{-2 tau^2 h}).
    """
    T = _Times(denoiser.sde, times)

    def update(i: int, x: Tensor, values: list[tuple[int, Tensor]]) -> Tensor:
        tau2, h, end = tau(T.t[i]) ** 2, T.h(i), T.lam[i + 1]
        x = T.sigma[i + 1] / T.sigma[i] * math.exp(-tau2 * h) * x

        def kernel(lam: float) -> float:
            return math.exp(-tau2 * (end - lam)) * (1 + tau2) * math.exp(lam - end)

        b = _weights([T.lam[j] for j, _ in values], kernel, T.lam[i], end)
        for b_j, (_, D) in zip(b, values, strict=True):
            x = x + T.alpha[i + 1] * b_j * D
        return x + T.sigma[i + 1] * math.sqrt(-math.expm1(-2 * tau2 * h)) * z[i]

    history: list[tuple[int, Tensor]] = []
    before: tuple[int, Tensor] | None = None
    for i, t in enumerate(times[:-1]):
        D = denoiser(x, t).mean
        if T.sigma[i + 1] == 0:
            return D
        if T.alpha[i] == 0:  # e^{-tau^2 h} with h = inf
            noisy = T.alpha[i + 1] * D + T.sigma[i + 1] * z[i]
            x = noisy if tau(T.t[i]) > 0 else _ddim(T, i, x, D)
            continue
        history.insert(0, (i, D))
        if corrector and before is not None:
            x = update(before[0], before[1], history[:corrector])
        before = (i, x)
        x = update(i, x, history[:predictor])
    return x


def sa_noise_prediction(
    denoiser: Denoiser, x: Tensor, times: Tensor, z: Sequence[Tensor], order: int, tau: float
) -> Tensor:
    """Xue et al. (2023), SA-Predictor in noise prediction: x_s = (alpha_s / alpha_t) x_t
    - (1 + tau^2) alpha_s sum_j int e^{-lambda} l_j(lambda) dlambda eps_j + tau sigma_s sqrt(e^{2h} - 1) z.
    """

    def first(T: _Times, i: int, x: Tensor, D: Tensor) -> Tensor:
        return T.alpha[i + 1] * D + T.sigma[i + 1] * z[i]

    def step(T: _Times, i: int, x: Tensor, history: list[tuple[int, Tensor]]) -> Tensor:
        used = history[:order]
        b = _weights([T.lam[j] for j, _ in used], lambda lam: math.exp(-lam), T.lam[i], T.lam[i + 1])
        total = torch.stack([b_j * eps for b_j, (_, eps) in zip(b, used, strict=True)]).sum(0)
        noise = tau * T.sigma[i + 1] * math.sqrt(math.expm1(2 * T.h(i))) * z[i]
        return T.alpha[i + 1] / T.alpha[i] * x - (1 + tau**2) * T.alpha[i + 1] * total + noise

    return _run(denoiser, x, times, "eps", first, step)


# ER-SDE.


def recommended(u: float) -> float:
    """Cui et al. (2023), the noise scale SDE_5 of their experiments."""
    return u * (math.exp(u**0.3) + 10)


def er_sde(
    denoiser: Denoiser,
    x: Tensor,
    times: Tensor,
    z: Sequence[Tensor],
    order: int,
    phi: Function = recommended,
    as_published: bool = False,
) -> Tensor:
    """Cui et al. (2023), ER-SDE-Solver-1, -2, -3 by Taylor expansion of D in u = sigma / alpha.

    as_published: D' of the third order is the backward difference; else it has the term that makes it the derivative at
    u_n, half the last spacing times D''.
    """

    def first(T: _Times, i: int, x: Tensor, D: Tensor) -> Tensor:
        # u_t = inf: of the noise (phi_s / u_s) / (phi_t / u_t) is kept, in the limit.
        far = 1e30
        try:
            keep = phi(T.u[i + 1]) / T.u[i + 1] / (phi(far) / far)
        except OverflowError:
            keep = 0.0
        noise = math.sqrt(1 - keep**2) * z[i] if keep < 1 - 1e-13 else 0.0
        return T.sigma[i + 1] / T.sigma[i] * keep * x + T.alpha[i + 1] * D + T.sigma[i + 1] * noise

    def step(T: _Times, i: int, x: Tensor, history: list[tuple[int, Tensor]]) -> Tensor:
        u_t, u_s, alpha_s = T.u[i], T.u[i + 1], T.alpha[i + 1]
        r = phi(u_s) / phi(u_t)
        variance = u_s**2 - r**2 * u_t**2
        # Zero for phi(u) = u, but for rounding (the authors' code clips it too).
        noise = alpha_s * math.sqrt(variance) * z[i] if variance > 1e-13 * u_s**2 else 0.0
        D = history[0][1]
        out = alpha_s / T.alpha[i] * r * x + alpha_s * (1 - r) * D + noise
        n = min(order, len(history))
        if n == 1:
            return out

        # Over log u: the integrand spans decades.
        def integral(f: Function) -> float:
            return _integral(lambda a: f(math.exp(a)) * math.exp(a), math.log(u_s), math.log(u_t))

        index = [j for j, _ in history[:n]]
        slope = (D - history[1][1]) / (u_t - T.u[index[1]])
        w1 = u_s - u_t + phi(u_s) * integral(lambda u: 1 / phi(u))
        if n == 2:
            return out + alpha_s * w1 * slope
        slope_before = (history[1][1] - history[2][1]) / (T.u[index[1]] - T.u[index[2]])
        curvature = 2 * (slope - slope_before) / (u_t - T.u[index[2]])
        if not as_published:
            slope = slope + 0.5 * (u_t - T.u[index[1]]) * curvature
        w2 = (u_s - u_t) ** 2 / 2 + phi(u_s) * integral(lambda u: (u - u_t) / phi(u))
        return out + alpha_s * (w1 * slope + w2 * curvature)

    return _run(denoiser, x, times, "x0", first, step)
