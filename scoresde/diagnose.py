"""A check of the wiring: is this network what the adapter says, and is it told the right time?

A wrong parameterisation, time label, sign or data range raises no error: it gives dim or noisy samples. But it denoises
worse than a straight line. With v the variance of the data and s = sigma / alpha, the best linear guess of x_0 from
x_t / alpha has the mean squared error v s^2 / (v + s^2) per dimension (Wiener); a network that was trained at all, and
is asked the right question, is below it wherever signal and noise are comparable.

Finer mistakes, a schedule of another name or a label off by one, cost a few percent or less. They show beside their
neighbours: of all labels that a network could be told of x_t the right one makes the error least, as the posterior mean
has the least of all. So the same x_0 and eps, as alpha x_0 + sigma eps of another SDE at the time of the same s, are
given with the label that belongs there, and with labels one off. With D one's own mean, D' an alternative's, and

    gain = |D - x_0|^2 - |D' - x_0|^2,    change = |D - D'|^2

the expected gain is change where D' is the posterior mean, and -change where D is. An alternative is told where the sum
of gains over the levels, weighted by E change / Var gain as is best for telling the two apart, is above five standard
errors, and no level's gain is below minus five.

And of the process: sampling begins with noise, so x_T must be noise.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoresde.chain import DDPMChain
from scoresde.denoiser import Denoiser, NetworkDenoiser, check_call
from scoresde.processes import SDES
from scoresde.sde import NOT_NOISE, SDE
from scoresde.tensors import check_batch
from scoresde.wrappers import Latent

__all__ = ["Diagnosis", "diagnose", "left_of_data"]

_CLEAR = 5.0  # standard errors from which on a difference is one


@dataclass(frozen=True)
class Diagnosis:
    """Errors of a denoiser against the best linear one, from high noise to low; print it.

    Attributes:
        t: the times, shape (L,).
        error: mean squared error of the posterior mean per dimension, shape (L,).
        linear: that of the best linear guess, shape (L,).
        stderr: standard error of error, from the samples, shape (L,).
        better: another wiring of the network with which its error is clearly lower, of several the lowest, in a
            sentence; empty if there is none.
        remark: what `left_of_data` says of the SDE, or None.
    """

    t: Tensor
    error: Tensor
    linear: Tensor
    stderr: Tensor
    better: str = ""
    remark: str | None = None

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
        """Whether it is worse anywhere, or another wiring better: wired wrongly, or hardly trained."""
        return bool(self.worse.any()) or bool(self.better)

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
        remarks = [self.better] if self.better else []
        remarks += [] if self.remark is None else [self.remark]
        return "\n".join([*lines, verdict, *remarks])


def left_of_data(sde: SDE, size: float) -> str | None:
    """A sentence if t_max is not noise yet, else None.

    Args:
        size: root of the mean square of the data.

    >>> from scoresde import DDPMChain, VPSDE
    >>> left_of_data(VPSDE(), 1.0)
    >>> print(left_of_data(DDPMChain.linear(10), 1.0).partition(" of ")[0])
    at t_max = 10 data are 3.1 times the noise
    """
    signal = size * sde.for_data(1.0).signal_at(sde.t_max)
    if signal <= NOT_NOISE:
        return None
    return (
        f"at t_max = {sde.t_max:.6g} data are {signal:.2g} times the noise of {sde!r}, and sampling begins with noise "
        f"alone: {NOT_NOISE} at most are hardly seen. Let the schedule go on (a short chain needs larger betas), or "
        "data be of a smaller scale"
    )


@torch.no_grad()
def diagnose(
    denoiser: Denoiser, x0: Tensor, *, cond: Mapping[str, Any] | None = None, levels: int = 8, seed: int = 0
) -> Diagnosis:
    """Compare a denoiser with the best linear guess, at noise levels s from 4 down to 1/20 of the data's width; and an
    adapter of a network with itself on other schedules, those of `SDES`, and with labels off by one.

    Args:
        denoiser: the model. A level is one call of the network on all of x0, and of an adapter about ten.
        x0: clean data as the network was trained on, shape (B, ...): z = `denoiser.codec.encode(x)` where there is a
            codec, which is not used here. Some hundred samples are plenty, of few dimensions thousands: a label off by
            one of a thousand shows from about 3 10^5 numbers in all on.
        cond: keyword arguments for the network.
        levels: number of noise levels.
        seed: of the noise.

    Raises:
        TypeError: if the denoiser is none.
        ValueError: if x0 is not floating point or has no variance, or as for `sample`.

    >>> from scoresde import EpsDenoiser, VPSDE
    >>> from scoresde.exact import Gaussian
    >>> target = Gaussian(mean=[0.0], std=0.5)
    >>> x0, exact = target.sample(1000, torch.Generator().manual_seed(0)), target.denoiser(VPSDE())
    >>> diagnose(exact, x0).suspicious
    False
    >>> diagnose(EpsDenoiser(lambda x, t: -exact.eps(x, t), VPSDE()), x0).suspicious  # the wrong sign
    True
    """
    while isinstance(denoiser, Latent):  # of z: alternatives are of the adapter inside
        denoiser = denoiser.denoiser
    check_batch(x0, "x0")
    variance = float((x0.double() - x0.double().mean(0)).square().mean())
    if not (math.isfinite(variance) and variance > 0):
        raise ValueError(f"x0 has the variance {variance}: give at least two different, finite samples")
    check_call(denoiser, x0, cond)
    sde = denoiser.sde
    s = math.sqrt(variance) * torch.logspace(math.log10(4), math.log10(1 / 20), levels, dtype=torch.float64)
    t = sde.time_at(-s.log()).clamp(sde.t_min, sde.t_max)
    t = sde.snapped(t) if levels <= sde.most_steps else t  # to a chain's nodes, where labels are exact
    s2 = (-2 * sde.half_log_snr(t)).exp()
    generator = torch.Generator(x0.device).manual_seed(seed)
    others = dict(_alternatives(denoiser)) if isinstance(denoiser, NetworkDenoiser) else {}
    own: list[Tensor] = []
    gains: dict[str, list[Tensor]] = {name: [] for name in others}
    changes: dict[str, list[Tensor]] = {name: [] for name in others}

    def squares(difference: Tensor) -> Tensor:
        return difference.double().square().reshape(len(x0), -1).mean(1).cpu()

    linear = variance * s2 / (variance + s2)
    for time, lam, unit in zip(t.tolist(), sde.half_log_snr(t).tolist(), linear.tolist(), strict=True):
        noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype, device=x0.device)
        mean = denoiser(sde.perturb(x0, time, noise), time, **(cond or {})).mean.clone()  # some reuse their memory
        own.append(squares(mean - x0))
        for name, other in others.items():
            at = time if other.sde is sde else float(other.sde.time_at(lam))
            if other.sde.t_min <= at <= other.sde.t_max:  # else it has no such noise
                found = other(other.sde.perturb(x0, at, noise), at, **(cond or {})).mean
                gains[name].append((own[-1] - squares(found - x0)) / unit)
                changes[name].append(squares(found - mean) / unit)
    told = [_told(name, torch.stack(gains[name]), torch.stack(changes[name])) for name in others if gains[name]]
    error, stderr = torch.stack(own).mean(1), torch.stack(own).std(1) / math.sqrt(len(x0))
    remark = left_of_data(sde, float(x0.double().square().mean().sqrt()))
    return Diagnosis(t, error, linear, stderr, max(told, default=(0.0, ""))[1], remark)


def _told(name: str, gain: Tensor, change: Tensor) -> tuple[float, str]:
    """The gain of an alternative, and a sentence on it, where it is clear, gain and change being of shape (L, B) and in
    units of the linear error.
    """
    mean, c, noise = gain.mean(1), change.mean(1), gain.std(1) / math.sqrt(gain.shape[1])
    tells = noise > 0  # where the label is another at all
    mean, c, noise = mean[tells], c[tells], noise[tells]
    z = float((c * mean / noise**2).sum() / (c / noise).norm()) if len(c) else 0.0
    if not (z > _CLEAR and bool((mean > -_CLEAR * noise).all())):
        return 0.0, ""
    lower = f"its error is lower, by {z:.0f} standard errors; is that what it was trained with?"
    return float(mean.sum()), f"better with {name}: {lower}"


def _alternatives(denoiser: NetworkDenoiser) -> Iterator[tuple[str, NetworkDenoiser]]:
    """The network on other SDEs whose times run as far, and with labels off by one, by what they are called; told no
    label beyond those of the run.
    """
    sde = denoiser.sde
    ends = denoiser.label(torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64, device="cpu"))
    if ends.ndim != 1 or len(ends) != 2:  # of another kind, or the same for all times
        return
    low, high = sorted(ends.tolist())

    def wired(other: SDE, shift: float) -> NetworkDenoiser:
        made, told = copy.copy(denoiser), copy.copy(denoiser)
        made.sde = told.sde = other
        made.time = lambda t: (told.label(t) + (shift if ends.is_floating_point() else int(shift))).clamp(low, high)
        return made

    for name, make in SDES.items():
        other = make(sde.steps) if isinstance(sde, DDPMChain) and name.endswith("chain") else make()
        if other != sde and abs(other.t_max / sde.t_max - 1) < 0.02:
            yield f"the SDE {name!r}", wired(other, 0)
    one = 1.0 if not ends.is_floating_point() or high - low > 50 else (high - low) / 1000
    for shift, word in ((one, "larger"), (-one, "smaller")):
        yield f"time labels {word} by {one:.3g}", wired(sde, shift)
