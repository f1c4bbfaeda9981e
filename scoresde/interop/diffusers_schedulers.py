"""What diffusers' schedulers say of a network: a configuration, a dict as scheduler_config.json holds it, becomes an
SDE, what the network predicts, its label, the times of its steps and its clipping. Nothing of diffusers is imported.

    theirs                                  ours
    timestep k = 0..T-1, abar_k             node t = k + 1 of DDPMChain, alpha_t^2 = abar_k; the label is k = t - 1
    sigma of Euler, DPM-Solver, UniPC       sigma_t / alpha_t
    epsilon, v_prediction, sample           eps, v = alpha eps - sigma x_0, x_0
    "epsilon" of the EDM schedulers         F of EDM's preconditioning, label ln(sigma) / 4; "v_prediction" is -F
    sigma, timestep of the flows            t = sigma of FlowSDE, label T t; the output is dx/dt = eps - x_0

Traps that raise no error there, and what is done here:

- Defaults differ by class, and a file may leave any key out: beta_start is 0.0001, but 0.00085 with Heun, KDPM2 and
  DPM-Solver-SDE; clip_sample is on for DDPM and DDIM; set_alpha_to_one is on for DDIM and off for PNDM.
- A key of another class is ignored (PNDM's files say clip_sample): so it is here, and `Schedule.ignored` names it.
- `thresholding` with the default sample_max_value, 1, clips to [-1, 1].
- DDIM steps with the clipped mean and the eps of the mean before it, DDPM with the eps that follows the clipped mean;
  here that is the solver's business: `RawEps(DDIM())`, and `DDPM()`.
- `rescale_betas_zero_snr` makes the last abar 0 for DDIM and DDPM, of which an eps network says nothing, and 2^-24 for
  Euler, DPM-Solver and UniPC.
- With set_alpha_to_one=False and a last timestep of 0, the last evaluation is of a step that goes nowhere: our grid is
  one step shorter.
- DPM-Solver and UniPC round the labels of Karras' levels, and cut those of flows to whole numbers: the network is told
  another level than x has. Here it is told that of x (measured on random networks: states differ by 7e-4 and 3e-3).
- `invert_sigmas` counts a flow's time from noise to data: the label is T (1 - t), and the output x_0 - eps.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from scoresde.chain import DDPMChain
from scoresde.checks import ArgumentError, check_option
from scoresde.denoiser import (
    Denoiser,
    EDMDenoiser,
    EpsDenoiser,
    NetworkDenoiser,
    ScoreDenoiser,
    VDenoiser,
    VelocityDenoiser,
    X0Denoiser,
)
from scoresde.grid import Grid
from scoresde.interop.diffusers_kinds import KINDS, completed
from scoresde.interop.diffusers_times import chain_grid, edm_times, flow_times, rule_of
from scoresde.interop.model import uniform_to_data
from scoresde.schedules import EDMSDE, VESDE, FlowSDE
from scoresde.sde import SDE
from scoresde.strides import Toolkit
from scoresde.wrappers import Clip, DynamicThreshold

__all__ = ["Schedule", "betas_of", "schedule_of"]


def betas_of(config: Mapping[str, Any], least_snr: float = 0.0) -> Tensor:
    """The betas of a completed configuration, float64 (theirs are float32).

    linear          beta uniform
    scaled_linear   sqrt(beta) uniform
    squaredcos_cap_v2   1 - abar(n) / abar(n - 1), at most 0.999, abar(n) = cos^2(pi / 2 (n / T + 0.008) / 1.008)
    sigmoid         beta_start + (beta_end - beta_start) / (1 + e^-u), u uniform from -6 to 6
    rescale_betas_zero_snr   sqrt(abar) moved and scaled so that its first is kept and its last is zero (Lin et al.,
        2024, algorithm 1)

    Args:
        config: complete.
        least_snr: what the last abar is set to, where it is rescaled to zero.
    """
    T, low, high = config["num_train_timesteps"], config["beta_start"], config["beta_end"]
    name = config["beta_schedule"]

    def uniform(low: float, high: float) -> Tensor:
        return torch.linspace(low, high, T, dtype=torch.float64, device="cpu")

    if config["trained_betas"] is not None:
        betas = torch.as_tensor(np.asarray(config["trained_betas"], dtype=np.float64))
    elif name == "linear":
        betas = uniform(low, high)
    elif name == "scaled_linear":
        betas = uniform(math.sqrt(low), math.sqrt(high)) ** 2
    elif name == "squaredcos_cap_v2":
        betas = DDPMChain.cosine(T).betas
    elif name == "sigmoid":
        betas = low + (high - low) * torch.sigmoid(uniform(-6, 6))
    else:
        check_option(("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"), beta_schedule=name)
    if not config.get("rescale_betas_zero_snr"):
        return betas
    root = (1 - betas).cumprod(0).sqrt()
    abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    if abar[-2] <= least_snr:
        warnings.warn(
            f"{config['_class_name']} sets the last abar to {least_snr:.2g}, above the one before, {abar[-2]:.2g}: "
            "its sigmas go down, up and down. Here it is 0, as rescale_betas_zero_snr means it",
            stacklevel=2,
        )
        least_snr = 0.0
    abar[-1] = least_snr
    return 1 - abar / torch.cat([abar.new_ones(1), abar[:-1]])


@dataclass(frozen=True)
class Schedule:
    """A scheduler's configuration, read.

    Attributes:
        sde: the forward process.
        adapter: of (network, SDE) to a denoiser of what it predicts.
        predicts: the adapter's word.
        sign: of the network's output: -1 where theirs is the negative of ours.
        grid: their times, of n steps; a warning says where they are not quite theirs.
        config: complete.
        ignored: keys that its class does not read.
        clips: whether the configuration clips or thresholds the mean.
    """

    sde: SDE
    adapter: Callable[[Callable[..., Tensor]], NetworkDenoiser]
    predicts: str
    sign: int
    grid: Callable[[int], Grid]
    config: dict[str, Any]
    ignored: dict[str, Any]

    @property
    def implied(self) -> Mapping[str, Any]:
        """What its class does without a key for it, which stands in `config` too."""
        return KINDS[self.config["_class_name"]].implied

    @property
    def clips(self) -> bool:
        return bool(self.config.get("thresholding") or self.config.get("clip_sample"))

    def clipped(self, denoiser: Denoiser) -> Denoiser:
        """The denoiser, clipped or thresholded as the configuration says."""
        config = self.config
        if config.get("thresholding"):
            ratio, cap = config["dynamic_thresholding_ratio"], config["sample_max_value"]
            if cap < 1:
                raise ArgumentError(f"sample_max_value={cap}: below 1 theirs leaves [-1, 1] and scales it up")
            return Clip(denoiser) if cap == 1 else DynamicThreshold(denoiser, ratio, cap=cap, interpolate=True)
        if config.get("clip_sample"):
            return Clip(denoiser, -config["clip_sample_range"], config["clip_sample_range"])
        return denoiser


_ADAPTERS: dict[str, type[NetworkDenoiser]] = {
    "epsilon": EpsDenoiser,
    "v_prediction": VDenoiser,
    "sample": X0Denoiser,
    "flow_prediction": VelocityDenoiser,
}


def schedule_of(config: Mapping[str, Any], *, mu: float | None = None, own_sigmas: bool = False) -> Schedule:
    """A scheduler's configuration, read.

    Args:
        config: as scheduler_config.json holds it, `_class_name` included.
        mu: of a flow's dynamic shift; needed by `grid` alone.
        own_sigmas: as in `flow_times`.

    Raises:
        ArgumentError: on a class, key or value that is not known here, naming it.

    >>> schedule = schedule_of({"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "steps_offset": 1})
    >>> schedule.predicts, schedule.grid(4).times.tolist()
    ('eps', [752.0, 502.0, 252.0, 2.0, 0.0])
    """
    whole, ignored = completed(config)
    kind, name = KINDS[whole["_class_name"]], whole["_class_name"]
    if ignored.get("rescale_betas_zero_snr"):
        warnings.warn(f"{name} ignores rescale_betas_zero_snr, and so its betas are as they were", stacklevel=2)
    check_option(("zero", "sigma_min"), final_sigmas_type=whole.get("final_sigmas_type", "zero"))
    if kind.dialect == "flow" or whole.get("use_flow_sigmas"):
        return _flow(whole, ignored, mu, own_sigmas)
    if kind.dialect == "ve":
        sde = VESDE(whole["sigma_min"], whole["sigma_max"])
        return Schedule(
            sde,
            lambda net: ScoreDenoiser(net, sde, time=sde.sigma),
            "score",
            1,
            lambda steps: uniform_to_data(sde, steps, whole["sampling_eps"]),
            whole,
            ignored,
        )
    continuous = whole.get("timestep_type") == "continuous" and whole["prediction_type"] == "v_prediction"
    if kind.dialect == "edm" or continuous:
        return _edm(whole, ignored, continuous)
    if whole.get("interpolation_type", "linear") != "linear":
        raise ArgumentError(f"interpolation_type={whole['interpolation_type']!r} of {name} is not read: 'linear' is")
    check_option(("epsilon", "v_prediction", "sample"), prediction_type=whole["prediction_type"])
    adapter = _ADAPTERS[whole["prediction_type"]]
    chain = DDPMChain(betas_of(whole, kind.least_snr))
    return Schedule(
        chain,
        lambda net: adapter(net, chain, time=chain.label),
        adapter.predicts,
        1,
        lambda steps: chain_grid(whole, chain, steps, cast(Toolkit, kind.dialect), kind.own_steps),
        whole,
        ignored,
    )


def _edm(config: dict[str, Any], ignored: dict[str, Any], continuous: bool) -> Schedule:
    """EDM's schedulers; and Euler's with continuous timesteps, whose sigma_data is 1."""
    if continuous:
        if not (config["use_karras_sigmas"] and config["sigma_min"] and config["sigma_max"]):
            raise ArgumentError(
                "EulerDiscreteScheduler has timestep_type='continuous' without use_karras_sigmas, sigma_min and "
                "sigma_max: its levels are then those of betas that its network has never seen"
            )
        config = {**config, "sigma_data": 1.0, "sigma_schedule": "karras", "rho": 7.0}
    check_option(("epsilon", "v_prediction"), prediction_type=config["prediction_type"])
    sde = EDMSDE(config["sigma_min"], config["sigma_max"])
    return Schedule(
        sde,
        lambda net: EDMDenoiser(net, sde, sigma_data=config["sigma_data"]),
        "F",
        -1 if config["prediction_type"] == "v_prediction" else 1,
        lambda steps: Grid(sde, edm_times(config, steps)),
        config,
        ignored,
    )


def _flow(config: dict[str, Any], ignored: dict[str, Any], mu: float | None, own_sigmas: bool) -> Schedule:
    predicts = config.setdefault("prediction_type", "flow_prediction")
    check_option(tuple(_ADAPTERS), prediction_type=predicts)
    adapter, inverted = _ADAPTERS[predicts], config.get("invert_sigmas")
    sde, T = FlowSDE(), config["num_train_timesteps"]
    if config.get("use_flow_sigmas") and rule_of(config):
        raise ArgumentError(f"{config['_class_name']} has use_flow_sigmas and other sigmas on: expected one of them")

    def label(t: Tensor) -> Tensor:
        return T * (1 - t) if inverted else T * t

    return Schedule(
        sde,
        lambda net: adapter(net, sde, time=label),
        adapter.predicts,
        -1 if inverted else 1,
        lambda steps: Grid(sde, flow_times(config, steps, mu, own_sigmas)),
        config,
        ignored,
    )
