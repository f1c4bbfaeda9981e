"""The times on which diffusers' schedulers step, of their configuration alone; nothing of diffusers is imported.

Its timesteps k = 0..T-1 are our nodes t = k + 1 of a `DDPMChain`, and t = 0 is the data; which n of them a spacing has
depends on the scheduler (`Grid.strided`). Or their noise levels sigma / alpha are spaced by a rule. Flows have sigma =
t, so no chain, and EDM's schedulers have sigma itself.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from scoresde.chain import DDPMChain
from scoresde.checks import ArgumentError, check_count, check_option, check_positive
from scoresde.grid import Grid
from scoresde.schedules import FlowSDE
from scoresde.strides import Spacing, Toolkit, stride

__all__ = ["chain_grid", "edm_times", "flow_times", "rule_of"]

Array = NDArray[np.float64]


def chain_grid(config: Mapping[str, Any], chain: DDPMChain, steps: int, like: Toolkit, own_steps: bool = False) -> Grid:
    """Our grid of n of their steps; a warning says what is done differently.

    Args:
        config: complete (`scoresde.interop.diffusers_kinds.completed`).
        chain: of its betas.
        steps: n.
        like: which of their dialects (`Grid.strided`).
        own_steps: whether a step goes from timestep k to k - T // n, wherever the next one is, as DDIM's and PNDM's do.
    """
    T, spacing = chain.steps, config["timestep_spacing"]
    check_option(("leading", "trailing", "linspace"), timestep_spacing=spacing)
    check_count(steps=steps)
    end = 1.0 if _ends_noisy(config) else 0.0
    offset = config["steps_offset"] if spacing == "leading" else 0
    if (respaced := rule_of(config)) is not None:
        if like == "diffusers-sigmas":  # of the sigmas that the spacing has, else of all
            high, low = (float(-chain.half_log_snr(t)) for t in _node_ends(T, steps, spacing, offset))
        else:
            high, low = (float(-chain.half_log_snr(t)) for t in (T, 1))
        levels = _levels(
            respaced, config.get("sigma_max") or math.exp(high), config.get("sigma_min") or math.exp(low), steps
        )
        return Grid(chain, _to(chain.time_at(-torch.from_numpy(levels).log()).clamp(1.0, float(T)), end))
    last = T - int(
        (
            chain.half_log_snr(torch.arange(1.0, T + 1, dtype=torch.float64, device="cpu"))
            < config.get("lambda_min_clipped", -math.inf)
        ).sum()
    )
    if last < T:
        k = np.arange(last, 0, -T / steps).round()[::-1] - 1
        k = k if spacing == "trailing" else stride(last, steps, spacing, like) + offset
        return Grid(chain, _to(torch.from_numpy(np.unique(k[k >= 0])).flip(0) + 1, end))
    grid = Grid.strided(chain, steps, spacing, like=like, offset=offset, end=end)
    k = stride(T, steps, spacing, like)[::-1]
    k = k[k >= 0] + offset
    if own_steps and (bool((k[:-1] - T // steps != k[1:]).any()) or k[-1] >= T // steps):
        warnings.warn(
            f"{config['_class_name']} with {spacing} timesteps in {steps} steps of {T} goes {T // steps} at a "
            "step, and its timesteps are not that apart: its x is then not at the level that the network is told. Here "
            "every step goes to the next timestep, and the last to the end",
            stacklevel=3,
        )
    return grid


def _node_ends(T: int, steps: int, spacing: Spacing, offset: int) -> tuple[float, float]:
    """The largest and the smallest node of a spacing."""
    k = stride(T, steps, spacing, "diffusers-sigmas")
    return float(k.max()) + 1 + offset, max(float(k.min()), 0.0) + 1 + offset


def _ends_noisy(config: Mapping[str, Any]) -> bool:
    """Whether the last step ends at node 1, timestep 0, and not at the data."""
    if "set_alpha_to_one" in config:
        return not config["set_alpha_to_one"]
    return bool(config["final_sigmas_type"] == "sigma_min")


def _to(times: Tensor, end: float) -> Tensor:
    """The times with a last step to `end`, unless they end there: a step that leaves x as it is."""
    return torch.cat([times, times.new_tensor([end])]) if times[-1] > end + 1e-9 else times


def rule_of(config: Mapping[str, Any]) -> str | None:
    """The rule of levels that the configuration has on, or None."""
    on = [name for name in ("karras", "exponential", "beta", "lu") if config.get(_FLAGS[name])]
    if len(on) > 1:
        raise ArgumentError(f"the scheduler has {' and '.join(_FLAGS[name] for name in on)} on: expected one of them")
    return on[0] if on else None


_FLAGS = {
    "karras": "use_karras_sigmas",
    "exponential": "use_exponential_sigmas",
    "beta": "use_beta_sigmas",
    "lu": "use_lu_lambdas",
}


def _levels(rule: str, high: float, low: float, steps: int, rho: float = 7.0) -> Array:
    """n levels from high to low: sigma^(1 / rho) uniform (Karras et al., 2022, eq. 5), log sigma uniform, or by the
    quantiles of Beta(0.6, 0.6) (Lee et al., 2024, "Beta sampling is all you need").
    """
    share = np.linspace(0, 1, steps)
    if rule == "karras":
        return np.asarray((high ** (1 / rho) + share * (low ** (1 / rho) - high ** (1 / rho))) ** rho)
    if rule == "beta":
        return np.asarray(low + (high - low) * stats.beta.ppf(1 - share, 0.6, 0.6))
    return np.asarray(np.exp(math.log(high) + share * (math.log(low) - math.log(high))))


def edm_times(config: Mapping[str, Any], steps: int) -> Tensor:
    """Levels of EDM's schedulers, sigma_max to sigma_min, then the data; `sigma_schedule` says by which rule."""
    check_option(("karras", "exponential"), sigma_schedule=config["sigma_schedule"])
    check_option(("zero", "sigma_min"), final_sigmas_type=config["final_sigmas_type"])
    check_count(steps=steps)
    low = config["sigma_min"]
    levels = torch.as_tensor(_levels(config["sigma_schedule"], config["sigma_max"], low, steps, config["rho"]))
    levels = levels.clamp(low, config["sigma_max"])  # rounding
    return _to(levels, low if config["final_sigmas_type"] == "sigma_min" else 0.0)


def _shifted(times: Array, config: Mapping[str, Any], mu: float | None) -> Array:
    """A flow's times moved towards noise, sigma / alpha s times as large: t' = s t / (1 + (s - 1) t), by `shift`, or by
    what depends on the image's size, s = e^mu ("exponential") or mu ("linear").

    Raises:
        ArgumentError: if it is dynamic, and mu is not given.
    """
    if not config.get("use_dynamic_shifting"):
        s = config.get("shift", config.get("flow_shift", 1.0))
    elif mu is None:
        raise ArgumentError(
            f"{config['_class_name']} has use_dynamic_shifting on, and its times need mu=, which depends on the "
            "image's size: give mu=, or shape="
        )
    else:
        s = math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu
    check_positive(shift=s)
    sde = FlowSDE()
    return np.asarray(sde.time_at(sde.half_log_snr(torch.from_numpy(times)) - math.log(s)).numpy())


def flow_times(config: Mapping[str, Any], steps: int, mu: float | None = None, own_sigmas: bool = False) -> Tensor:
    """Times t = sigma of a flow's n steps, the last to the data.

    FlowMatchEuler's and FlowMatchHeun's last level is 1 / T shifted twice, once when they are made and once when they
    are told of n: so it is here. (With 50 steps and a shift of 3 it is 0.0089 for 1/1000.)

    Args:
        config: complete.
        steps: n.
        mu: of dynamic shifting.
        own_sigmas: 1, ..., 1/n before the shift, as Flux' pipeline gives the scheduler itself.
    """
    check_count(steps=steps)
    T = config["num_train_timesteps"]
    if config.get("use_flow_sigmas"):  # the solvers of VP chains, on a flow
        if "shift_terminal" in config:  # UniPC
            t = _shifted(np.linspace(1, 1 / T, steps + 1)[:-1].copy(), config, mu)
            t[0] = min(t[0], 1 - 1e-6) if abs(t[0] - 1) < 1e-6 else t[0]
        else:
            t = _shifted((1 - np.linspace(1, 1 / T, steps + 1))[:0:-1].copy(), config, mu)
    elif own_sigmas:
        t = _shifted(np.linspace(1, 1 / steps, steps), config, mu)
    else:
        ends = np.array([1.0, 1 / T])
        high, low = ends if config.get("use_dynamic_shifting") else _shifted(ends, config, None)
        t = _shifted(np.linspace(high, low, steps), config, mu)
    if config.get("shift_terminal"):
        t = 1 - (1 - t) * (1 - config["shift_terminal"]) / (1 - t[-1])
    if (respaced := rule_of(config)) is not None:
        t = _levels(respaced, t[0], t[-1], steps)
    times = torch.as_tensor(t.copy()).clamp(max=1.0)
    return times if config["final_sigmas_type"] == "sigma_min" else _to(times, 0.0)
