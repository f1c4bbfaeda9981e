"""UniPC, SA-Solver and ER-SDE, transcribed literally from their papers, as `multistep` is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from scoresde.denoiser import Denoiser
from scoresde.textbook.multistep import Function, Times, ddim_update, lagrange_weights, quadrature, run

__all__ = ["er_sde", "recommended", "sa_noise_prediction", "sa_solver", "same", "squared", "unipc"]

# UniPC.


def _unipc_integrals(h: float, n: int, sign: int) -> list[float]:
    """h int_0^1 e^{sign (1 - theta) h} theta^k dtheta for k = 0..n: h^{k+1} k! phi_{k+1} of the paper, for eps
    (sign = 1) or for data (sign = -1).
    """

    def integral(k: int) -> float:
        return h * quadrature(lambda theta: math.exp(sign * (1 - theta) * h) * theta**k, 0.0, 1.0)

    return [integral(k) for k in range(n + 1)]


def unipc(
    denoiser: Denoiser,
    x: Tensor,
    times: Tensor,
    order: int,
    view: str = "x0",
    rule: str = "B2",
    corrector: bool = True,
) -> Tensor:
    """Zhao et al. (2023), algorithms 1 and 2 (UniC-p, UniP-p) in PEC form.

    rule: B(h) of the two shortcuts rho = 1/2 (UniP-2 and UniC-1): h, or e^h - 1 (|e^{-h} - 1| for data); with "exact"
        rho is solved for there too.
    """
    T = Times(denoiser.sde, times)
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
    for i, t in enumerate(times[:-1]):
        D = denoiser(x, t).mean
        if T.sigma[i + 1] == 0:
            return D
        if T.alpha[i] == 0:
            x = ddim_update(T, i, x, D)
            continue
        F = D if view == "x0" else denoiser.eps(x, t)
        if corrector and before is not None:
            j, start, nodes = before  # the step j -> j + 1 = i once more, now with F at its end: r = 1
            x = update(j, start, history[0][1], [*nodes, (1.0, F)], shortcut=not nodes)
        history.insert(0, (i, F))
        nodes = [((T.lam[j] - T.lam[i]) / T.h(i), F_j) for j, F_j in history[1:order]]
        before = (i, x, nodes)
        x = update(i, x, F, nodes, shortcut=len(nodes) == 1)
    return x


# SA-Solver.


def sa_solver(
    denoiser: Denoiser,
    x: Tensor,
    times: Tensor,
    z: Sequence[Tensor],
    predictor: int,
    corrector: int,
    tau: float | Callable[[float], float],
) -> Tensor:
    """Xue et al. (2023), algorithm 1 in data prediction, PEC: SA-Predictor with `predictor` values, SA-Corrector with
    `corrector` values, that at the predicted state among them (the authors' code counts so), and the predictor's noise.

    b_j = sigma_s int e^{-tau^2 (lambda_s - lambda)} (1 + tau^2) e^lambda l_j(lambda) dlambda, tau that of the step's
    start, noise sigma_s sqrt(1 - e^{-2 tau^2 h}).
    """
    T = Times(denoiser.sde, times)

    def tau_at(t: float) -> float:
        return tau(t) if callable(tau) else tau

    def update(i: int, x: Tensor, values: list[tuple[int, Tensor]]) -> Tensor:
        tau2, h, end = tau_at(T.t[i]) ** 2, T.h(i), T.lam[i + 1]
        x = T.sigma[i + 1] / T.sigma[i] * math.exp(-tau2 * h) * x

        def kernel(lam: float) -> float:
            return math.exp(-tau2 * (end - lam)) * (1 + tau2) * math.exp(lam - end)

        b = lagrange_weights([T.lam[j] for j, _ in values], kernel, T.lam[i], end)
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
            x = noisy if tau_at(T.t[i]) > 0 else ddim_update(T, i, x, D)
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

    def first(T: Times, i: int, x: Tensor, D: Tensor) -> Tensor:
        return T.alpha[i + 1] * D + T.sigma[i + 1] * z[i]

    def step(T: Times, i: int, x: Tensor, history: list[tuple[int, Tensor]]) -> Tensor:
        used = history[:order]
        b = lagrange_weights([T.lam[j] for j, _ in used], lambda lam: math.exp(-lam), T.lam[i], T.lam[i + 1])
        total = torch.stack([b_j * eps for b_j, (_, eps) in zip(b, used, strict=True)]).sum(0)
        noise = tau * T.sigma[i + 1] * math.sqrt(math.expm1(2 * T.h(i))) * z[i]
        return T.alpha[i + 1] / T.alpha[i] * x - (1 + tau**2) * T.alpha[i + 1] * total + noise

    return run(denoiser, x, times, "eps", first, step)


# ER-SDE.


def recommended(u: float) -> float:
    """Cui et al. (2023), the noise scale SDE_5 of their experiments."""
    return u * (math.exp(u**0.3) + 10)


def same(u: float) -> float:
    """phi(u) = u: no noise."""
    return u


def squared(u: float) -> float:
    """phi(u) = u^2: the reverse SDE."""
    return u * u


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

    def first(T: Times, i: int, x: Tensor, D: Tensor) -> Tensor:
        # u_t = inf: of the noise (phi_s / u_s) / (phi_t / u_t) is kept, in the limit.
        far = 1e30
        try:
            keep = phi(T.u[i + 1]) / T.u[i + 1] / (phi(far) / far)
        except OverflowError:
            keep = 0.0
        noise = math.sqrt(1 - keep**2) * z[i] if keep < 1 - 1e-13 else 0.0
        return T.sigma[i + 1] / T.sigma[i] * keep * x + T.alpha[i + 1] * D + T.sigma[i + 1] * noise

    def step(T: Times, i: int, x: Tensor, history: list[tuple[int, Tensor]]) -> Tensor:
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
            return quadrature(lambda a: f(math.exp(a)) * math.exp(a), math.log(u_s), math.log(u_t))

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

    return run(denoiser, x, times, "x0", first, step)
