"""Forecasts: sample paths of a model over time, step by step, and the likelihood of each step.

    h_k = state(u_1, ..., u_k),    z_k ~ p(z | h_k) by any solver,    u_{k+1} = (z_k, c_{k+1}),    x = s z

(Rasul et al., 2021, "Autoregressive denoising diffusion models for multivariate probabilistic time series forecasting",
algorithm 2). All paths of all series are one batch. Of a series the scale s is that of its context, the mean absolute
value of each of its d numbers; densities have its volume, log p(x_k) = log p(z_k) - sum_i log s_i.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from scoresde.checks import check_count
from scoresde.data.series import context_scale, step_inputs
from scoresde.denoiser import Denoiser, check_denoiser
from scoresde.entries import entries_of
from scoresde.errors import not_finite, some
from scoresde.grid import Grid
from scoresde.likelihood.flow import log_prob
from scoresde.networks import first_parameter, networks
from scoresde.nn import Stepwise
from scoresde.noise import CounterNoise, sample_seeds, seeds_of, stream_seeds
from scoresde.sampling import sample
from scoresde.solvers.base import Solver
from scoresde.tensors import told

__all__ = ["Rollout", "StepLogProb", "rollout", "step_log_prob"]

State = Callable[..., tuple[Tensor, Any]]


@dataclass(frozen=True)
class Rollout:
    """Sample paths.

    Attributes:
        x: shape (B, paths, horizon, d).
        nfe: evaluations of the denoiser, each of B * paths states.
    """

    x: Tensor
    nfe: int

    __repr__ = told


@dataclass(frozen=True)
class StepLogProb:
    """Log-densities of steps, given those before them.

    Attributes:
        value: nats, shape (B, K).
        stderr: of each, from the probes of its trace; 0 where that was exact.
        nfe: evaluations of the denoiser.
    """

    value: Tensor
    stderr: Tensor
    nfe: int

    __repr__ = told


def rollout(
    denoiser: Denoiser,
    past: Tensor,
    horizon: int,
    solver: Solver,
    *,
    paths: int = 100,
    steps: int | None = None,
    nfe: int | None = None,
    grid: Grid | None = None,
    seed: int | Sequence[int] | None = None,
    covariates: Tensor | None = None,
    state: State | None = None,
    scaled: bool | None = None,
    key: str | None = None,
    cond: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Rollout:
    """Sample paths of what comes after the past of B series.

    Args:
        denoiser: of one step z (B, d), told the state before it: around a `scoresde.nn.Stepwise`, or any other with
            `state`.
        past: x_0, ..., x_{L-1}, shape (B, L, d), the context.
        horizon: H, how many steps to go on.
        solver, steps, nfe, grid: of each step, as for `sample`.
        paths: of each series.
        seed: one integer, or one for each series. Path p of a series depends on its seed, its past and p alone, to
            rounding (an adaptive solver's tolerance): not on the batch, the number of paths or the horizon.
        covariates: c_0, ..., c_{L+H-1}, shape (B, L + H, c), known beforehand.
        state: instead of the network's, a function (inputs (B, L, c), memory) -> (states (B, L, ...), memory) as those
            of `scoresde.nn` are; memory is None at first, and then a tensor (B, ...), or None.
        scaled, key: whether values are divided by the context's mean absolute value, and the keyword by which the
            denoiser is told the state: those of its `Stepwise`, which was trained so; with `state`, False and "vector".
        cond: other conditions, with an entry for each series or one for all.
        progress: show a progress bar.

    Returns:
        The paths, of the past's dtype.

    Raises:
        ValueError: if shapes do not fit, the past is not finite, or there is no network of states.
        NonFiniteError: if a step's samples are not finite.

    >>> from scoresde import Latent, VPSDE
    >>> from scoresde.codecs import Shift
    >>> from scoresde.exact import Gaussian
    >>> from scoresde.guidance import Conditioned
    >>> from scoresde.solvers import DDIM
    >>> noise = Gaussian(mean=[0.0], std=1.0).denoiser(VPSDE())
    >>> walk = Latent(Conditioned(noise, drop="vector"), Shift(lambda vector: vector))  # x_k = x_{k-1} + noise
    >>> found = rollout(walk, torch.ones(3, 5, 1), 4, DDIM(), paths=10, steps=5, seed=0, state=lambda u, m: (u, None))
    >>> found.x.shape, found.nfe
    (torch.Size([3, 10, 4, 1]), 20)
    """
    check_count(horizon=horizon, paths=paths)
    check_denoiser(denoiser)
    state, scaled, key = _told(denoiser, state, scaled, key)
    z, scale = _scaled(past, None, scaled)
    B, L, d = past.shape
    if covariates is not None and covariates.shape[1] != L + horizon:
        raise ValueError(f"covariates of {covariates.shape[1]} steps: expected past and horizon, {L} + {horizon}")
    seeds = [path for one in seeds_of(seed, B) for path in sample_seeds(one, paths)]
    known = None if covariates is None else covariates[:, : L + 1]
    states, memory = _states(state, step_inputs(z, known), None)
    now = states[:, -1].repeat_interleave(paths, 0)
    memory = None if memory is None else memory.repeat_interleave(paths, 0)
    start = denoiser.sde.t_max if grid is None else float(grid.times[0])
    found, calls = [], 0
    others = entries_of(cond, torch.arange(B).repeat_interleave(paths), B)
    for k in tqdm(range(horizon), desc="rollout", disable=not progress, leave=False):
        noise = CounterNoise(stream_seeds(seeds, k), past.device)
        x_T = noise.prior(denoiser.sde, (B * paths, d), past.dtype, start)
        step = sample(denoiser, x_T, solver, steps=steps, nfe=nfe, grid=grid, noise=noise, cond={**others, key: now})
        found.append(step.x)
        calls += step.nfe
        if k + 1 < horizon:
            last = step.x[:, None]
            if covariates is not None:
                c = covariates[:, L + k + 1 : L + k + 2].to(last)
                last = torch.cat([last, c.repeat_interleave(paths, 0)], 2)
            states, memory = _states(state, last, memory)
            now = states[:, -1]
    return Rollout(torch.stack(found, 1).reshape(B, paths, horizon, d) * scale[:, None], calls)


def step_log_prob(
    denoiser: Denoiser,
    series: Tensor,
    context: int,
    *,
    covariates: Tensor | None = None,
    state: State | None = None,
    scaled: bool | None = None,
    key: str | None = None,
    cond: Mapping[str, Any] | None = None,
    seed: int | Sequence[int] | None = None,
    **options: Any,
) -> StepLogProb:
    """log p(x_k | x_0, ..., x_{k-1}) of each step after the context, with its standard error, in the units of x.

    Args:
        denoiser, covariates, state, scaled, key, cond: as for `rollout`; covariates (B, L, c).
        series: x_0, ..., x_{L-1}, shape (B, L, d): windows, in which the scale is that of the first `context` steps.
        context: C; the densities are of the K = L - C steps after it.
        seed: of the probes: one integer, or one for each series.
        options: of `log_prob`: steps=, divergence=, probes=, ...

    Raises:
        ValueError: as `rollout`, and as `log_prob`.
    """
    check_count(context=context)
    check_denoiser(denoiser)
    state, scaled, key = _told(denoiser, state, scaled, key)
    z, scale = _scaled(series, context, scaled)
    (B, L, d), K = series.shape, series.shape[1] - context
    if K < 1:
        raise ValueError(f"a series of {L} steps: expected more than context={context}")
    states, _ = _states(state, step_inputs(z[:, :-1], covariates), None)
    seeds = [step for one in seeds_of(seed, B) for step in sample_seeds(one, K)]
    others = entries_of(cond, torch.arange(B).repeat_interleave(K), B)
    told_all = {**others, key: states[:, context - 1 :].flatten(0, 1)}
    found = log_prob(denoiser, z[:, context:].reshape(B * K, d), seed=seeds, cond=told_all, **options)
    volume = scale.double().log().sum((1, 2)).to(found.value)[:, None]
    return StepLogProb(found.value.reshape(B, K) - volume, found.stderr.reshape(B, K), found.nfe)


def _scaled(series: Tensor, context: int | None, scaled: bool) -> tuple[Tensor, Tensor]:
    """z and the scale s, (B, 1, d), that of the first steps, or of all."""
    if not isinstance(series, Tensor) or series.ndim != 3 or not series.is_floating_point() or 0 in series.shape:
        found = (
            f"{series.dtype} of shape {tuple(series.shape)}" if isinstance(series, Tensor) else type(series).__name__
        )
        raise ValueError(f"series are {found}: expected floating-point numbers (B, L, d); of one, x[None]")
    if bad := not_finite(series):
        raise ValueError(f"series {some(bad)} are not finite")
    scale = context_scale(series[:, :context]) if scaled else torch.ones_like(series[:, :1])
    return series / scale, scale


def _told(denoiser: Denoiser, state: State | None, scaled: bool | None, key: str | None) -> tuple[State, bool, str]:
    """These as given, or those of the network that the denoiser is around."""
    if state is not None:
        return state, bool(scaled), key or "vector"
    found = [net for net in networks(denoiser) if isinstance(net, Stepwise)]
    if not found:
        raise ValueError(f"{denoiser!r} has no network of states, as a scoresde.nn.Stepwise has: give state=")
    if scaled not in (None, found[0].scaled) or key not in (None, found[0].key):
        raise ValueError(f"the network was made with scaled={found[0].scaled}, key={found[0].key!r}: leave them out")
    return found[0].state, found[0].scaled, found[0].key


def _states(state: State, inputs: Tensor, memory: Any) -> tuple[Tensor, Any]:
    """States in the dtype of the inputs; a network sees its own, on its own device."""
    at = first_parameter(state)
    with torch.no_grad():
        states, memory = state(inputs if at is None else inputs.to(at), memory)
    return states.to(inputs), memory
