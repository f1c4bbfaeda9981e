"""The papers' algorithms, transcribed literally, one step at a time: what every tableau must equal.

Each takes the denoiser, x_T, the times and the noise z of each step, and knows nothing of tables, views or rows. All
share one convention: on a step to t = 0, where sigma = 0, the result is the denoiser's mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from scoresde.chain import DDPMChain
from scoresde.denoiser import Denoiser

__all__ = ["ddim", "ddpm", "ddpm_chain", "euler_maruyama", "euler_t", "heun_edm", "heun_t", "probability_flow",
           "reverse_diffusion", "steps_in"]  # fmt: skip


def steps_in(times: Tensor, z: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    return list(zip(times[:-1], times[1:], z, strict=True))


def ddpm_chain(
    chain: DDPMChain, eps: Callable[[Tensor, int], Tensor], x: Tensor, z: Sequence[Tensor], variance: str
) -> Tensor:
    """Ho, Jain and Abbeel (2020), algorithm 2, on a whole chain; sigma_n^2 is beta_n or beta tilde_n (section 3.2)."""
    alpha = 1 - chain.betas
    abar = torch.cumprod(alpha, 0)
    for n in range(chain.steps, 0, -1):
        beta_n, alpha_n, abar_n = chain.betas[n - 1], alpha[n - 1], abar[n - 1]
        x = (x - beta_n / (1 - abar_n).sqrt() * eps(x, n)) / alpha_n.sqrt()
        if n > 1:
            sigma2 = beta_n if variance == "beta" else (1 - abar[n - 2]) / (1 - abar_n) * beta_n
            x = x + sigma2.sqrt() * z[chain.steps - n]
    return x


def ddpm(denoiser: Denoiser, x: Tensor, times: Tensor, z: Sequence[Tensor], variance: str) -> Tensor:
    """Ancestral sampling from q(x_s | x_t, x_0 = D) for any alpha, sigma: Kingma et al. (2021), appendix A."""
    sde = denoiser.sde
    for t, s, noise in steps_in(times, z):
        D = denoiser(x, t).mean
        if s == 0:
            return D
        alpha_ts = sde.alpha(t) / sde.alpha(s)
        var_ts = sde.sigma(t) ** 2 - alpha_ts**2 * sde.sigma(s) ** 2
        mean = alpha_ts * sde.sigma(s) ** 2 / sde.sigma(t) ** 2 * x + sde.alpha(s) * var_ts / sde.sigma(t) ** 2 * D
        var = var_ts if variance == "beta" else var_ts * sde.sigma(s) ** 2 / sde.sigma(t) ** 2
        x = mean + var.sqrt() * noise
    return x


def ddim(
    denoiser: Denoiser,
    x: Tensor,
    times: Tensor,
    z: Sequence[Tensor],
    eta: float,
    limit: Callable[[Tensor], Tensor] = lambda x0: x0,
) -> Tensor:
    """Song, Meng and Ermon (2021), eq. 12 and 16, with abar_t = alpha_t^2 and 1 - abar_t = sigma_t^2.

    Beyond VP the "beta" 1 - abar_t / abar_s of eq. 16 is the variance of x_t given x_s, which it equals on VP. What
    limits the predicted x_0, clipping say, leaves eps alone, as in the code of Analytic-DPM (Bao et al., 2022).
    """
    sde = denoiser.sde
    for t, s, noise in steps_in(times, z):
        eps = denoiser.eps(x, t)
        predicted_x0 = limit((x - sde.sigma(t) * eps) / sde.alpha(t))
        if s == 0:
            return predicted_x0
        var_ts = sde.sigma(t) ** 2 - (sde.alpha(t) / sde.alpha(s)) ** 2 * sde.sigma(s) ** 2
        std = eta * (sde.sigma(s) / sde.sigma(t)) * var_ts.sqrt()
        x = sde.alpha(s) * predicted_x0 + (sde.sigma(s) ** 2 - std**2).sqrt() * eps + std * noise
    return x


def euler_maruyama(denoiser: Denoiser, x: Tensor, times: Tensor, z: Sequence[Tensor]) -> Tensor:
    """Euler-Maruyama on dx = [f x - g^2 score] dt + g dw, Song et al. (2021), eq. 6."""
    sde = denoiser.sde
    for t, s, noise in steps_in(times, z):
        if s == 0:
            return denoiser(x, t).mean
        drift = sde.drift(t) * x - sde.diffusion(t) ** 2 * denoiser.score(x, t)
        x = x + drift * (s - t) + sde.diffusion(t) * (t - s).sqrt() * noise
    return x


def reverse_diffusion(denoiser: Denoiser, x: Tensor, times: Tensor, z: Sequence[Tensor]) -> Tensor:
    """Song et al. (2021), appendix E, eq. 46: x_t = A x_s + G z turned round."""
    sde = denoiser.sde
    for t, s, noise in steps_in(times, z):
        if s == 0:
            return denoiser(x, t).mean
        A = sde.alpha(t) / sde.alpha(s)
        G2 = sde.sigma(t) ** 2 - A**2 * sde.sigma(s) ** 2
        x = (2 - A) * x + G2 * denoiser.score(x, t) + G2.sqrt() * noise
    return x


def probability_flow(denoiser: Denoiser, x: Tensor, t: Tensor) -> Tensor:
    """dx/dt of Song et al. (2021), eq. 13."""
    sde = denoiser.sde
    return sde.drift(t) * x - 0.5 * sde.diffusion(t) ** 2 * denoiser.score(x, t)


def euler_t(denoiser: Denoiser, x: Tensor, times: Tensor) -> Tensor:
    """Euler's method on the probability-flow ODE."""
    for t, s in pairwise(times):
        x = denoiser(x, t).mean if s == 0 else x + (s - t) * probability_flow(denoiser, x, t)
    return x


def heun_t(denoiser: Denoiser, x: Tensor, times: Tensor) -> Tensor:
    """Karras et al. (2022), algorithm 1, for the SDE's own alpha(t), sigma(t)."""
    for t, s in pairwise(times):
        if s == 0:
            return denoiser(x, t).mean
        d = probability_flow(denoiser, x, t)
        euler = x + (s - t) * d
        x = x + (s - t) * (d + probability_flow(denoiser, euler, s)) / 2
    return x


def heun_edm(denoiser: Denoiser, x: Tensor, times: Tensor, order: int = 2) -> Tensor:
    """Karras et al. (2022), algorithm 1 with sigma(t) = t and s(t) = 1, in y = x / alpha and u = sigma / alpha."""
    sde = denoiser.sde
    u = sde.sigma(times) / sde.alpha(times)
    y = x / sde.alpha(times[0])
    for i, (t, s) in enumerate(pairwise(times)):
        d = (y - denoiser(sde.alpha(t) * y, t).mean) / u[i]
        y_next = y + (u[i + 1] - u[i]) * d
        if u[i + 1] != 0 and order == 2:
            d_next = (y_next - denoiser(sde.alpha(s) * y_next, s).mean) / u[i + 1]
            y_next = y + (u[i + 1] - u[i]) * (d / 2 + d_next / 2)
        y = y_next
    return y * sde.alpha(times[-1])
