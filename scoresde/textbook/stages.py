"""Single-step, composite and Langevin algorithms of the papers, transcribed literally: what their tables must equal.

Like `first_order`, they know nothing of tables, views or rows. `draw()` gives the next noise, called in the order
of the algorithm; on a step to t = 0, where sigma = 0, the result is the denoiser's mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from scoresde.denoiser import Denoiser
from scoresde.sde import SDE

__all__ = ["annealed_langevin", "ddim_step", "dpm_solver", "dpm_solver_pp_single", "edm_stochastic",
           "euler_maruyama_sigma", "exponential_heun", "repaint", "restart", "rk_step", "runge_kutta"]  # fmt: skip

Draw = Callable[[], Tensor]
Scale = Callable[[Tensor], Tensor]


def ddim_step(denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The deterministic step of Song, Meng and Ermon (2021), eq. 12."""
    sde = denoiser.sde
    D = denoiser(x, t).mean
    return sde.alpha(s) * D + sde.sigma(s) * (x - sde.alpha(t) * D) / sde.sigma(t)


# Exponential single steps. In the papers' terms t_{i-1} is t here, t_i is s.


def dpm_solver(denoiser: Denoiser, x: Tensor, times: Tensor, order: int) -> Tensor:
    """Lu et al. (2022, DPM-Solver): DPM-Solver-1, algorithm 1 (order 2) and algorithm 2 (order 3)."""
    sde, eps = denoiser.sde, denoiser.eps
    alpha, sigma, lam, t_lam = sde.alpha, sde.sigma, sde.half_log_snr, sde.time_at
    for t, s in pairwise(times):
        if s == 0:
            return denoiser(x, t).mean
        h = lam(s) - lam(t)
        if order == 1:
            x = alpha(s) / alpha(t) * x - sigma(s) * torch.expm1(h) * eps(x, t)
        elif order == 2:
            m = t_lam((lam(t) + lam(s)) / 2)
            u = alpha(m) / alpha(t) * x - sigma(m) * torch.expm1(h / 2) * eps(x, t)
            x = alpha(s) / alpha(t) * x - sigma(s) * torch.expm1(h) * eps(u, m)
        else:
            r1, r2 = 1 / 3, 2 / 3
            s1, s2 = t_lam(lam(t) + r1 * h), t_lam(lam(t) + r2 * h)
            eps_t = eps(x, t)
            u1 = alpha(s1) / alpha(t) * x - sigma(s1) * torch.expm1(r1 * h) * eps_t
            D1 = eps(u1, s1) - eps_t
            u2 = (
                alpha(s2) / alpha(t) * x
                - sigma(s2) * torch.expm1(r2 * h) * eps_t
                - sigma(s2) * r2 / r1 * (torch.expm1(r2 * h) / (r2 * h) - 1) * D1
            )
            D2 = eps(u2, s2) - eps_t
            x = (
                alpha(s) / alpha(t) * x
                - sigma(s) * torch.expm1(h) * eps_t
                - sigma(s) / r2 * (torch.expm1(h) / h - 1) * D2
            )
    return x


def dpm_solver_pp_single(denoiser: Denoiser, x: Tensor, times: Tensor, order: int) -> Tensor:
    """Lu et al. (2022b, DPM-Solver++): algorithm 1 (2S, r = 1/2), and 3S by the same rule from DPM-Solver-3."""
    sde = denoiser.sde
    alpha, sigma, lam, t_lam = sde.alpha, sde.sigma, sde.half_log_snr, sde.time_at

    def x0(x: Tensor, t: Tensor) -> Tensor:
        return denoiser(x, t).mean

    for t, s in pairwise(times):
        D = x0(x, t)
        if s == 0:
            return D
        h = lam(s) - lam(t)
        if order == 2:
            r = 1 / 2
            m = t_lam(lam(t) + r * h)
            u = sigma(m) / sigma(t) * x - alpha(m) * torch.expm1(-r * h) * D
            D = (1 - 1 / (2 * r)) * D + 1 / (2 * r) * x0(u, m)
            x = sigma(s) / sigma(t) * x - alpha(s) * torch.expm1(-h) * D
        else:
            r1, r2 = 1 / 3, 2 / 3
            s1, s2 = t_lam(lam(t) + r1 * h), t_lam(lam(t) + r2 * h)
            u1 = sigma(s1) / sigma(t) * x - alpha(s1) * torch.expm1(-r1 * h) * D
            D1 = x0(u1, s1) - D
            u2 = (
                sigma(s2) / sigma(t) * x
                - alpha(s2) * torch.expm1(-r2 * h) * D
                + r2 / r1 * alpha(s2) * (torch.expm1(-r2 * h) / (r2 * h) + 1) * D1
            )
            D2 = x0(u2, s2) - D
            x = (
                sigma(s) / sigma(t) * x
                - alpha(s) * torch.expm1(-h) * D
                + alpha(s) / r2 * (torch.expm1(-h) / h + 1) * D2
            )
    return x


def exponential_heun(denoiser: Denoiser, x: Tensor, times: Tensor, view: str) -> Tensor:
    """DDIM's step, then the exact integral of the straight line through the two values of x0 or eps."""
    sde = denoiser.sde
    for t, s in pairwise(times):
        D, eps = denoiser(x, t).mean, denoiser.eps(x, t)
        if s == 0:
            return D
        h = sde.half_log_snr(s) - sde.half_log_snr(t)
        predicted = ddim_step(denoiser, x, t, s)
        if view == "x0":
            phi_1 = 1 - (-h).exp()
            phi_2 = 1 - phi_1 / h
            line = (phi_1 - phi_2) * D + phi_2 * denoiser(predicted, s).mean
            x = sde.sigma(s) / sde.sigma(t) * x + sde.alpha(s) * line
        else:
            phi_1 = h.exp() - 1
            phi_2 = phi_1 / h - 1
            line = (phi_1 - phi_2) * eps + phi_2 * denoiser.eps(predicted, s)
            x = sde.alpha(s) / sde.alpha(t) * x - sde.sigma(s) * line
    return x


# Runge-Kutta methods for dy/dpsi = f(y, psi), each as textbooks write it.


def rk_step(method: str, f: Callable[[Tensor, Tensor], Tensor], y: Tensor, psi: Tensor, h: Tensor) -> Tensor:
    k1 = f(y, psi)
    if method == "heun":
        return y + h / 2 * (k1 + f(y + h * k1, psi + h))
    if method == "midpoint":
        return y + h * f(y + h / 2 * k1, psi + h / 2)
    if method == "ralston":
        return y + h * (k1 / 4 + 3 / 4 * f(y + 2 / 3 * h * k1, psi + 2 / 3 * h))
    if method == "kutta3":
        k2 = f(y + h / 2 * k1, psi + h / 2)
        k3 = f(y - h * k1 + 2 * h * k2, psi + h)
        return y + h / 6 * (k1 + 4 * k2 + k3)
    assert method == "rk4"
    k2 = f(y + h / 2 * k1, psi + h / 2)
    k3 = f(y + h / 2 * k2, psi + h / 2)
    k4 = f(y + h * k3, psi + h)
    return y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def runge_kutta(denoiser: Denoiser, x: Tensor, times: Tensor, method: str, variable: str) -> Tensor:
    """A step of the method on the probability-flow ODE, written in one of five variables psi."""
    sde = denoiser.sde

    def radius(t: Tensor) -> Tensor:
        return (sde.alpha(t) ** 2 + sde.sigma(t) ** 2).sqrt()

    def field_t(x: Tensor, t: Tensor) -> Tensor:  # Song et al. (2021), eq. 13
        return sde.drift(t) * x - 0.5 * sde.diffusion(t) ** 2 * denoiser.score(x, t)

    def field_u(y: Tensor, u: Tensor) -> Tensor:  # d(x / alpha) / du = eps, u = sigma / alpha
        t = sde.time_at(-u.log())
        return denoiser.eps(sde.alpha(t) * y, t)

    def field_lambda(y: Tensor, lam: Tensor) -> Tensor:  # du = -u dlambda
        return -torch.exp(-lam) * field_u(y, torch.exp(-lam))

    def field_angle(y: Tensor, angle: Tensor) -> Tensor:  # x = r (cos(angle) x0 + sin(angle) eps): its derivative
        t = sde.time_at(-angle.tan().log())
        x = radius(t) * y
        return -angle.sin() * denoiser(x, t).mean + angle.cos() * denoiser.eps(x, t)

    def field_flow(y: Tensor, psi: Tensor) -> Tensor:  # y = (1 - psi) x0 + psi eps: its derivative
        t = sde.time_at(torch.log(1 / psi - 1))
        x = (sde.alpha(t) + sde.sigma(t)) * y
        return denoiser.eps(x, t) - denoiser(x, t).mean

    variables: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Scale, Scale]] = {
        "t": (field_t, lambda t: t, torch.ones_like),
        "sigma": (field_u, lambda t: sde.sigma(t) / sde.alpha(t), sde.alpha),
        "half_log_snr": (field_lambda, sde.half_log_snr, sde.alpha),
        "angle": (field_angle, lambda t: torch.atan(sde.sigma(t) / sde.alpha(t)), radius),
        "flow": (
            field_flow,
            lambda t: sde.sigma(t) / (sde.alpha(t) + sde.sigma(t)),
            lambda t: sde.alpha(t) + sde.sigma(t),
        ),
    }
    f, psi, m = variables[variable]
    for t, s in pairwise(times):
        if s == 0:
            return denoiser(x, t).mean
        x = m(s) * rk_step(method, f, x / m(t), psi(t), psi(s) - psi(t))
    return x


def euler_maruyama_sigma(denoiser: Denoiser, x: Tensor, times: Tensor, draw: Draw) -> Tensor:
    """Euler-Maruyama on the reverse SDE of y = x / alpha in u = sigma / alpha, dy = -2 u score du + sqrt(2 u) dw with
    u score = -eps: Song et al. (2021), eq. 6, for f = 0, g^2 = 2 u.
    """
    sde = denoiser.sde
    for t, s in pairwise(times):
        u_t, u_s = sde.sigma(t) / sde.alpha(t), sde.sigma(s) / sde.alpha(s)
        if s == 0:
            return denoiser(x, t).mean
        y = x / sde.alpha(t) - 2 * (u_t - u_s) * denoiser.eps(x, t) + (2 * u_t * (u_t - u_s)).sqrt() * draw()
        x = sde.alpha(s) * y
    return x


# Samplers that go back up.


def edm_stochastic(
    denoiser: Denoiser,
    x: Tensor,
    times: Tensor,
    draw: Draw,
    S_churn: float,
    S_min: float,
    S_max: float,
    S_noise: float,
) -> Tensor:
    """Karras et al. (2022), algorithm 2, sigma(t) = t and s(t) = 1 there being u = sigma / alpha and alpha here, with
    t^ at most the SDE's largest time.
    """
    sde = denoiser.sde
    N = len(times) - 1

    def u(t: Tensor) -> Tensor:
        return sde.sigma(t) / sde.alpha(t)

    for t, s in pairwise(times):
        gamma = min(S_churn / N, math.sqrt(2) - 1) if S_min <= u(t) <= S_max else 0.0
        t_hat = t
        if gamma > 0 and t < sde.t_limit:
            t_hat = sde.time_at(-(u(t) + gamma * u(t)).log())
            t_hat = min(t_hat, torch.tensor(sde.t_limit, dtype=torch.float64))
            noise = (u(t_hat) ** 2 - u(t) ** 2).sqrt() * S_noise * draw()
            x = sde.alpha(t_hat) / sde.alpha(t) * x + sde.alpha(t_hat) * noise
        y = x / sde.alpha(t_hat)
        d = (y - denoiser(x, t_hat).mean) / u(t_hat)
        y_next = y + (u(s) - u(t_hat)) * d
        if s != 0:
            d_next = (y_next - denoiser(sde.alpha(s) * y_next, s).mean) / u(s)
            y_next = y + (u(s) - u(t_hat)) * (d / 2 + d_next / 2)
        x = sde.alpha(s) * y_next
    return x


def restart(
    denoiser: Denoiser,
    x: Tensor,
    times: Tensor,
    draw: Draw,
    step: Callable[[Denoiser, Tensor, Tensor], Tensor],
    intervals: Sequence[tuple[int, int, float, float]],
) -> Tensor:
    """Xu et al. (2023), algorithm 1, in u = sigma / alpha; step(denoiser, x, times) solves along the times."""
    sde, rho = denoiser.sde, 7

    def u(t: Tensor) -> Tensor:
        return sde.sigma(t) / sde.alpha(t)

    at = {}
    for n, K, u_min, u_max in intervals:
        distance = [abs(float(u(t)) - u_min) if t > 0 else math.inf for t in times[1:]]
        at[1 + distance.index(min(distance))] = (n, K, u_max)
    for i in range(len(times) - 1):
        x = step(denoiser, x, times[i : i + 2])
        if i + 1 in at:
            n, K, u_max = at[i + 1]
            low = u(times[i + 1])
            j = torch.arange(n, dtype=torch.float64)
            nodes = (u_max ** (1 / rho) + j / (n - 1) * (low ** (1 / rho) - u_max ** (1 / rho))) ** rho
            inner = sde.time_at(-nodes.log())
            for _ in range(K):
                y = x / sde.alpha(times[i + 1]) + (u_max**2 - low**2).sqrt() * draw()
                x = step(denoiser, sde.alpha(inner[0]) * y, inner)
    return x


def repaint(denoiser: Denoiser, x: Tensor, times: Tensor, draw: Draw, jump: int, repeats: int) -> Tensor:
    """Lugmayr et al. (2022), algorithm 1 without a mask, on DDPM's steps; blocks of `jump` steps, the way up in one
    draw from q(x_s | x_t).
    """
    sde = denoiser.sde

    def down(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        D = denoiser(x, t).mean
        if s == 0:
            return D
        alpha_ts = sde.alpha(t) / sde.alpha(s)
        var_ts = sde.sigma(t) ** 2 - alpha_ts**2 * sde.sigma(s) ** 2
        mean = alpha_ts * sde.sigma(s) ** 2 / sde.sigma(t) ** 2 * x + sde.alpha(s) * var_ts / sde.sigma(t) ** 2 * D
        return mean + (var_ts * sde.sigma(s) ** 2 / sde.sigma(t) ** 2).sqrt() * draw()

    N = len(times) - 1
    for i in range(0, N, jump):
        end = min(i + jump, N)
        whole = end == i + jump and times[end] > 0
        for again in range(repeats if whole else 1):
            if again:
                alpha_ts = sde.alpha(times[i]) / sde.alpha(times[end])
                var_ts = sde.sigma(times[i]) ** 2 - alpha_ts**2 * sde.sigma(times[end]) ** 2
                x = alpha_ts * x + var_ts.sqrt() * draw()
            for t, s in pairwise(times[i : end + 1]):
                x = down(x, t, s)
    return x


def annealed_langevin(
    denoiser: Denoiser, x: Tensor, levels: Tensor, draw: Draw, T: int, eps: float, version: int, denoise: bool
) -> Tensor:
    """Song and Ermon (2019), algorithm 1, for version 1, and (2020), algorithm 1, for version 2, in y = x / alpha,
    whose score is alpha times that of x.
    """
    sde: SDE = denoiser.sde
    u = sde.sigma(levels) / sde.alpha(levels)
    y = x / sde.alpha(levels[0])

    def score(y: Tensor, t: Tensor) -> Tensor:
        return sde.alpha(t) * denoiser.score(sde.alpha(t) * y, t)

    for t, u_i in zip(levels, u, strict=True):
        a = eps * u_i**2 / u[-1] ** 2
        for _ in range(T):
            if version == 1:
                y = y + a / 2 * score(y, t) + a.sqrt() * draw()
            else:
                y = y + a * score(y, t) + (2 * a).sqrt() * draw()
    if denoise:
        return y + u[-1] ** 2 * score(y, levels[-1])
    return y * sde.alpha(levels[-1])
