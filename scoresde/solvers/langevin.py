"""Langevin dynamics at one noise level: a Markov chain that leaves p_t unchanged as the step goes to zero,

    x_{k+1} = x_k + (step / 2) score(x_k, t) + sqrt(step) z_k,    z_k ~ N(0, I)

It is exact in the limit of many small steps only, and between modes that low density separates it hardly moves: what
annealing over noise levels is for (Song and Ermon, 2019, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from scoresde.checks import check_count
from scoresde.denoiser import Denoiser, check_call
from scoresde.errors import NonFiniteError, narrowed, not_finite
from scoresde.masked import masked_noise, own_of
from scoresde.noise import Noise, noise_source
from scoresde.tensors import check_batch, precise, widen

__all__ = ["langevin"]


def langevin(
    denoiser: Denoiser,
    x: Tensor,
    t: float,
    *,
    step_size: float,
    steps: int,
    seed: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    noise: Noise | None = None,
    cond: Mapping[str, Any] | None = None,
    trajectory: bool = False,
) -> Tensor:
    """Run the chain at the noise level of t; `steps` evaluations.

    Args:
        denoiser: the model; its score at t is the chain's drift.
        x: where the chains start, shape (B, ...).
        t: the time, one for all chains, 0 < t <= t_max.
        step_size: step of the module's docstring (Song and Ermon's epsilon), in squared units of x; well below
            sigma_t^2, or at the least below 4 times the smallest variance of p_t, where the chain diverges.
        steps: number of steps.
        seed, generator, noise, cond: as for `sample`.
        trajectory: return all states instead of the last.

    Returns:
        The last state, shape (B, ...), or the states from the start on, shape (steps + 1, B, ...), in the dtype of x.

    Raises:
        TypeError: if the denoiser is none.
        ValueError: on bad arguments, before any evaluation.
        NonFiniteError: if the result is not finite.

    >>> from scoresde import VESDE
    >>> from scoresde.exact import Gaussian
    >>> denoiser = Gaussian(mean=[2.0], std=1.0).denoiser(VESDE())
    >>> x = langevin(denoiser, torch.zeros(1000, 1), 1e-3, step_size=0.1, steps=100, seed=0)
    >>> bool((x.mean() - 2).abs() < 0.2)
    True
    """
    check_batch(x, "x")
    denoiser, own = own_of(denoiser, x.shape, cond)
    x = own.only(x)
    check_call(denoiser, x, cond, masks=True)
    check_count(steps=steps)
    if not 0 < step_size < math.inf:
        raise ValueError(f"step_size={step_size}: expected a finite number > 0")
    if isinstance(t, Tensor) and t.ndim > 0:
        raise ValueError(f"t has shape {tuple(t.shape)}: expected one time for all chains")
    t = float(t)
    if not 0 < t <= denoiser.sde.t_limit:
        raise ValueError(f"t={t}: expected a time in (0, {denoiser.sde.t_limit}] of {denoiser.sde!r}")
    denoiser.check_times(precise(t).reshape(1))
    source = masked_noise(noise_source(x.device, x, seed, generator, noise), own)
    state, states = widen(x), [x]
    with torch.no_grad():
        told = denoiser.prepared(cond)
        for k in range(steps):
            score = denoiser.score(state, t, **told)
            state = state + step_size / 2 * score + math.sqrt(step_size) * source(k, state)
            if trajectory:
                states.append(narrowed(state, x.dtype, "the chains"))
    if not bool(state.isfinite().all()):
        bad = not_finite(state)
        where = f"{len(bad)} of {len(state)} chains are not finite at t = {t:.6g}"
        raise NonFiniteError(f"{where}: the network is, or step_size={step_size} is too large", None, t, bad)
    return torch.stack(states) if trajectory else narrowed(state, x.dtype, "the chains")
