"""The papers' loops whose steps depend on the values they meet, transcribed literally; the adaptive ones for a batch of
one sample. As in `textbook`, a step to t = 0 gives the denoiser's mean. `z` is the noise, one draw after the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from scoresde import Denoiser
from scoresde.textbook.first_order import ddpm, euler_maruyama, reverse_diffusion


def predict(denoiser: Denoiser, predictor: str, x: Tensor, t: Tensor, s: Tensor, z: Tensor) -> Tensor:
    """A step t -> s of Song et al. (2021), appendices E and F; the step to t = 0 without noise."""
    sde, times = denoiser.sde, torch.stack([t, s])
    if s == 0:
        return denoiser(x, t).mean
    if predictor == "euler-maruyama":
        return euler_maruyama(denoiser, x, times, [z])
    if predictor == "ancestral":
        return ddpm(denoiser, x, times, [z], "posterior" if sde.alpha(t) == sde.alpha(s) else "beta")
    return reverse_diffusion(denoiser, x, times, [z])


def correct(denoiser: Denoiser, rule: str, snr: float, a: Tensor, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
    """A step of algorithm 4 or 5, or of annealed Langevin dynamics, for x of shape (B, ...)."""
    score, result = denoiser.score(x, t), []
    z_norms = torch.stack([z_i.square().sum().sqrt() for z_i in z])
    score_norms = torch.stack([s_i.square().sum().sqrt() for s_i in score])
    for i in range(len(x)):
        if rule == "langevin":
            eps = 2 * a * (snr * z_norms[i] / score_norms[i]) ** 2
        elif rule == "langevin batch":
            eps = 2 * a * (snr * z_norms.mean() / score_norms.mean()) ** 2
        else:
            eps = 2 * a * (snr * denoiser.sde.sigma(t)) ** 2
        result.append(x[i] + eps * score[i] + (2 * eps).sqrt() * z[i])
    return torch.stack(result)


def predictor_corrector(
    denoiser: Denoiser, x: Tensor, times: Tensor, z: Iterator[Tensor], *, predictor: str, rule: str, snr: float, M: int
) -> Tensor:
    """Song et al. (2021), algorithm 1: predictor, then M corrector steps at the new time."""
    sde = denoiser.sde
    for t, s in pairwise(times):
        a = sde.alpha(t) ** 2 / sde.alpha(s) ** 2
        x = predict(denoiser, predictor, x, t, s, next(z))
        if s > 0:
            for _ in range(M):
                x = correct(denoiser, rule, snr, a, x, s, next(z))
    return x


def corrector_predictor(
    denoiser: Denoiser, x: Tensor, times: Tensor, z: Iterator[Tensor], *, predictor: str, rule: str, snr: float, M: int
) -> Tensor:
    """The authors' code: corrector at t, then the predictor."""
    sde = denoiser.sde
    for t, s in pairwise(times):
        a = sde.alpha(t) ** 2 / sde.alpha(s) ** 2
        for _ in range(M):
            x = correct(denoiser, rule, snr, a, x, t, next(z))
        x = predict(denoiser, predictor, x, t, s, next(z))
    return x


def gotta_go_fast(
    denoiser: Denoiser,
    x: Tensor,
    t: float,
    end: float,
    z: Iterator[Tensor],
    *,
    h: float,
    atol: float,
    rtol: float,
    theta: float,
    r: float,
    growth: float = math.inf,
    path: dict[float, Tensor] | None = None,
) -> tuple[Tensor, int]:
    """Jolicoeur-Martineau et al. (2021), algorithm 1, from t to end for one sample, and the number of attempts.

    Beyond the paper: growth limits the change of h, and with `path`, times and values of a Brownian motion that runs
    down from path = {t: 0}, every value seen is kept and later ones are drawn given their two neighbours.
    """
    sde, x_prev, attempts = denoiser.sde, x, 0
    while t > end + 1e-12:
        h = min(h, t - end)
        noise, attempts = next(z), attempts + 1
        if path is not None:
            above = min(time for time in path if time >= t - h)
            below = max((time for time in path if time < t - h), default=-math.inf)
            if below == -math.inf:
                value = path[above] + math.sqrt(above - (t - h)) * noise
            else:
                share = (above - (t - h)) / (above - below)
                variance = (above - (t - h)) * (t - h - below) / (above - below)
                value = path[above] + share * (path[below] - path[above]) + math.sqrt(variance) * noise
            path[t - h] = value
            noise = (value - path[t]) / math.sqrt(h)
        f, g = sde.drift(t), sde.diffusion(t)
        x1 = x - h * f * x + h * g**2 * denoiser.score(x, t) + math.sqrt(h) * g * noise
        f, g = sde.drift(t - h), sde.diffusion(t - h)
        x2 = x - h * f * x1 + h * g**2 * denoiser.score(x1, t - h) + math.sqrt(h) * g * noise
        extrapolated = (x1 + x2) / 2
        delta = torch.maximum(torch.tensor(atol), rtol * torch.maximum(x1.abs(), x_prev.abs()))
        E = float((((x1 - extrapolated) / delta) ** 2).mean().sqrt())
        if E <= 1:
            x, t, x_prev = extrapolated, t - h, x1
        h = h * min(max(theta * E ** (-r), 1 / growth), growth)
    return x, attempts


def dpm_solver_adaptive(
    denoiser: Denoiser, x: Tensor, t: float, end: float, *, order: int, h: float, atol: float, rtol: float, theta: float
) -> tuple[Tensor, int]:
    """Lu et al. (2022), algorithms 1, 2 and appendix C (DPM-Solver-12 and -23), from t to end for one sample of a VP
    SDE, and the number of attempts.
    """
    sde, x_prev, attempts = denoiser.sde, x, 0
    lam, lam_end = float(sde.half_log_snr(t)), float(sde.half_log_snr(end))

    def alpha(lam):
        return sde.alpha(sde.time_at(lam))

    def sigma(lam):
        return sde.sigma(sde.time_at(lam))

    def eps(x, lam):
        return denoiser.eps(x, sde.time_at(lam))

    def solver_1(x, h):
        return alpha(lam + h) / alpha(lam) * x - sigma(lam + h) * math.expm1(h) * eps(x, lam)

    def solver_2(x, h, r1):
        u = alpha(lam + r1 * h) / alpha(lam) * x - sigma(lam + r1 * h) * math.expm1(r1 * h) * eps(x, lam)
        D = eps(u, lam + r1 * h) - eps(x, lam)
        return solver_1(x, h) - sigma(lam + h) / (2 * r1) * math.expm1(h) * D

    def solver_3(x, h, r1=1 / 3, r2=2 / 3):
        u1 = alpha(lam + r1 * h) / alpha(lam) * x - sigma(lam + r1 * h) * math.expm1(r1 * h) * eps(x, lam)
        D1 = eps(u1, lam + r1 * h) - eps(x, lam)
        u2 = alpha(lam + r2 * h) / alpha(lam) * x - sigma(lam + r2 * h) * math.expm1(r2 * h) * eps(x, lam)
        u2 = u2 - sigma(lam + r2 * h) * r2 / r1 * (math.expm1(r2 * h) / (r2 * h) - 1) * D1
        D2 = eps(u2, lam + r2 * h) - eps(x, lam)
        return solver_1(x, h) - sigma(lam + h) / r2 * (math.expm1(h) / h - 1) * D2

    while lam < lam_end - 1e-12:
        h, attempts = min(h, lam_end - lam), attempts + 1
        low = solver_1(x, h) if order == 2 else solver_2(x, h, 1 / 3)
        high = solver_2(x, h, 1 / 2) if order == 2 else solver_3(x, h)
        delta = torch.maximum(torch.tensor(atol), rtol * torch.maximum(low.abs(), x_prev.abs()))
        E = float((((high - low) / delta) ** 2).mean().sqrt())
        if E <= 1:
            x, lam, x_prev = high, lam + h, low
        h = theta * h * E ** (-1 / order)
    return x, attempts
