"""A check of the wiring: is this network what the adapter says, and is it told the right time?

A wrong parameterisation, time label, sign or data range raises no error: it gives dim or noisy samples. But it denoises
worse than a straight line. With v the variance of the data and s = sigma / alpha, the best linear guess of x_0 from
x_t / alpha has the mean squared error v s^2 / (v + s^2) per dimension (Wiener); a network that was trained at all, and
is asked the right question, is below it wherever signal and noise are comparable. (Not every mistake shows: a wrong
noise schedule of the same family costs a few percent, and a label off by one nothing that can be measured.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoresde.denoiser import Denoiser, check_call
from scoresde.tensors import check_batch

__all__ = ["Diagnosis", "diagnose"]


@dataclass(frozen=True)
class Diagnosis:
    """Errors of a denoiser against the best linear one, from high noise to low; print it.

    Attributes:
        t: the times, shape (L,).
        error: mean squared error of the posterior mean per dimension, shape (L,).
        linear: that of the best linear guess, shape (L,).
        stderr: standard error of error, from the samples, shape (L,).
    """

    t: Tensor
    error: Tensor
    linear: Tensor
    stderr: Tensor

    @property
    def ratio(self) -> Tensor:
        """error / linear, shape (L,): below 1 for a network that learned anything."""
        return self.error / self.linear

    @property
    def worse(self) -> Tensor:
        """Where the error is above that of the best linear guess by more than 2 % and five standard errors, (L,)."""
        return ~(self.error - 5 * self.stderr <= 1.02 * self.linear)  # so written, a NaN is worse too

    @property
    def suspicious(self) -> bool:
        """Whether it is worse anywhere: wired wrongly, or hardly trained."""
        return bool(self.worse.any())

    def __repr__(self) -> str:
        lines = ["         t     error    linear     ratio"]
        columns = (self.t, self.error, self.linear, self.ratio, self.worse)
        for *numbers, worse in zip(*(column.tolist() for column in columns), strict=True):
            lines.append("".join(f"{x:10.4g}" for x in numbers) + ("   worse than linear" if worse else ""))
        verdict = (
            "suspicious: check what the network predicts, its time label, the SDE and the range of the data"
            if self.suspicious
            else "plausible"
        )
        return "\n".join([*lines, verdict])


@torch.no_grad()
def diagnose(
    denoiser: Denoiser, x0: Tensor, *, cond: Mapping[str, Any] | None = None, levels: int = 8, seed: int = 0
) -> Diagnosis:
    """Compare a denoiser with the best linear guess, at noise levels s from 4 down to 1/20 of the data's width.

    Args:
        denoiser: the model.
        x0: clean data as the model was trained on, shape (B, ...); some hundred samples are plenty.
        cond: keyword arguments for the network.
        levels: number of noise levels.
        seed: of the noise.

    Raises:
        TypeError: if the denoiser is none.
        ValueError: if x0 is not floating point or has no variance.

    >>> from scoresde import EpsDenoiser, VPSDE
    >>> from scoresde.exact import Gaussian
    >>> target = Gaussian(mean=[0.0], std=0.5)
    >>> x0, exact = target.sample(1000, torch.Generator().manual_seed(0)), target.denoiser(VPSDE())
    >>> diagnose(exact, x0).suspicious
    False
    >>> diagnose(EpsDenoiser(lambda x, t: -exact.eps(x, t), VPSDE()), x0).suspicious  # the wrong sign
    True
    """
    check_batch(x0, "x0")
    check_call(denoiser, x0, cond)
    variance = float((x0.double() - x0.double().mean(0)).square().mean())
    if not (math.isfinite(variance) and variance > 0):
        raise ValueError(f"x0 has the variance {variance}: give at least two different, finite samples")
    sde = denoiser.sde
    s = math.sqrt(variance) * torch.logspace(math.log10(4), math.log10(1 / 20), levels, dtype=torch.float64)
    t = sde.time_at(-s.log()).clamp(sde.t_min, sde.t_max)
    s2 = (-2 * sde.half_log_snr(t)).exp()
    generator = torch.Generator(x0.device).manual_seed(seed)
    errors, stderrs = [], []
    for time in t.tolist():
        noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype, device=x0.device)
        mean = denoiser(sde.perturb(x0, time, noise), time, **(cond or {})).mean
        error = (mean - x0).double().square().reshape(len(x0), -1).mean(1)
        errors.append(float(error.mean()))
        stderrs.append(float(error.std()) / math.sqrt(len(x0)))
    linear = variance * s2 / (variance + s2)
    return Diagnosis(t, torch.tensor(errors).double(), linear, torch.tensor(stderrs).double())
