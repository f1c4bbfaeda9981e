"""What is known of diffusers' schedulers: the keys of each class, their defaults, and what it does that no key says.
These are facts of published files, up to diffusers 0.42.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from scoresde.checks import ArgumentError, one_of
from scoresde.strides import Toolkit

__all__ = ["KINDS", "Kind", "completed"]

_TABLE = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
}
_SPACED = {"timestep_spacing": "linspace", "steps_offset": 0}
_LEADING = {"timestep_spacing": "leading", "steps_offset": 0}
_ZERO_SNR = {"rescale_betas_zero_snr": False}
_THRESHOLD = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_CLIP = {"clip_sample": True, "clip_sample_range": 1.0}
_RESPACED = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_FLOW = {"use_flow_sigmas": False, "flow_shift": 1.0, "use_dynamic_shifting": False, "time_shift_type": "exponential"}
_CLIPPED_LAMBDA = {"lambda_min_clipped": -math.inf, "variance_type": None}
_VP = {**_TABLE, **_THRESHOLD, **_RESPACED, **_FLOW}
_K = {**_TABLE, **_RESPACED, **_SPACED}
_LATENT = {"beta_start": 0.00085, "beta_end": 0.012}
_DDPM = {**_TABLE, **_CLIP, **_THRESHOLD, **_LEADING, **_ZERO_SNR, "variance_type": "fixed_small"}
_DDIM = {**_TABLE, **_CLIP, **_THRESHOLD, **_LEADING, **_ZERO_SNR, "set_alpha_to_one": True}
_EDM = {
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "sigma_data": 0.5,
    "sigma_schedule": "karras",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "rho": 7.0,
    "final_sigmas_type": "zero",
}
_FLOW_MATCH = {
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": False,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "invert_sigmas": False,
    "shift_terminal": None,
    **_RESPACED,
    "time_shift_type": "exponential",
}
_ENDS = {"final_sigmas_type": "zero"}
_STEPPING = {
    "solver_order",
    "solver_type",
    "algorithm_type",
    "lower_order_final",
    "euler_at_final",
    "predict_x0",
    "disable_corrector",
    "solver_p",
    "skip_prk_steps",
    "predictor_order",
    "corrector_order",
    "tau_func",
    "noise_sampler_seed",
    "snr",
    "correct_steps",
    "stochastic_sampling",
    "tensor_format",  # of the first releases, "pt" always
}
"""Keys that say how a solver of theirs steps, which ours does by its own."""


@dataclass(frozen=True)
class Kind:
    """A class of schedulers.

    Attributes:
        dialect: of `Grid.strided`, or "edm", "flow", "ve".
        keys: that it reads of a configuration, with its defaults.
        implied: what it does without a key for it.
        own_steps: as in `chain_grid`.
        least_snr: the last abar of a chain that ends in noise.
    """

    dialect: Toolkit | Literal["edm", "flow", "ve"]
    keys: Mapping[str, Any]
    implied: Mapping[str, Any] = field(default_factory=dict)
    own_steps: bool = False
    least_snr: float = 0.0


_TINY = 2.0**-24
_TO_DATA = {"set_alpha_to_one": True}
_TO_NODE_1 = {"final_sigmas_type": "sigma_min"}
_DPM_KEYS = {**_VP, **_CLIPPED_LAMBDA, "use_lu_lambdas": False, **_ENDS}
KINDS: dict[str, Kind] = {
    "DDPMScheduler": Kind("diffusers", _DDPM, _TO_DATA),
    "DDPMParallelScheduler": Kind("diffusers", _DDPM, _TO_DATA),
    "DDIMScheduler": Kind("diffusers", _DDIM, own_steps=True),
    "DDIMParallelScheduler": Kind("diffusers", _DDIM, own_steps=True),
    "PNDMScheduler": Kind("diffusers", {**_TABLE, **_LEADING, "set_alpha_to_one": False}, own_steps=True),
    "DPMSolverMultistepScheduler": Kind("diffusers-multistep", {**_DPM_KEYS, **_SPACED, **_ZERO_SNR}, least_snr=_TINY),
    "DPMSolverSinglestepScheduler": Kind("diffusers-multistep", _DPM_KEYS, _SPACED),
    "UniPCMultistepScheduler": Kind(
        "diffusers-multistep",
        {**_VP, **_SPACED, **_ENDS, **_ZERO_SNR, "sigma_min": None, "sigma_max": None, "shift_terminal": None},
        least_snr=_TINY,
    ),
    "DEISMultistepScheduler": Kind("diffusers-multistep", {**_VP, **_SPACED}, _TO_NODE_1),
    "SASolverScheduler": Kind("diffusers-multistep", {**_VP, **_SPACED, **_CLIPPED_LAMBDA}, _TO_NODE_1),
    "EulerDiscreteScheduler": Kind(
        "diffusers-sigmas",
        {
            **_K,
            **_ENDS,
            **_ZERO_SNR,
            "interpolation_type": "linear",
            "sigma_min": None,
            "sigma_max": None,
            "timestep_type": "discrete",
        },
        least_snr=_TINY,
    ),
    "EulerAncestralDiscreteScheduler": Kind(
        "diffusers-sigmas", {**_TABLE, **_SPACED, **_ZERO_SNR}, _ENDS, least_snr=_TINY
    ),
    "HeunDiscreteScheduler": Kind(
        "diffusers-sigmas", {**_K, **_LATENT, "clip_sample": False, "clip_sample_range": 1.0}, _ENDS
    ),
    "LMSDiscreteScheduler": Kind("diffusers-sigmas", _K, _ENDS),
    "KDPM2DiscreteScheduler": Kind("diffusers-sigmas", {**_K, **_LATENT}, _ENDS),
    "KDPM2AncestralDiscreteScheduler": Kind("diffusers-sigmas", {**_K, **_LATENT}, _ENDS),
    "DPMSolverSDEScheduler": Kind("diffusers-sigmas", {**_K, **_LATENT}, _ENDS),
    "EDMEulerScheduler": Kind("edm", _EDM),
    "EDMDPMSolverMultistepScheduler": Kind("edm", {**_EDM, **_THRESHOLD}),
    "FlowMatchEulerDiscreteScheduler": Kind("flow", _FLOW_MATCH, _ENDS),
    "FlowMatchHeunDiscreteScheduler": Kind("flow", {"num_train_timesteps": 1000, "shift": 1.0}, _ENDS),
    "ScoreSdeVeScheduler": Kind(
        "ve", {"num_train_timesteps": 2000, "sigma_min": 0.01, "sigma_max": 1348.0, "sampling_eps": 1e-5}
    ),
}
"""The schedulers that are read, by class."""

_ELSEWHERE = {
    "LCMScheduler": "its network is distilled to jump to the data: no posterior mean, so no SDE",
    "TCDScheduler": "its network is distilled to jump: no posterior mean, so no SDE",
    "CMStochasticIterativeScheduler": "a consistency model jumps to the data: no posterior mean, so no SDE",
    "KarrasVeScheduler": "it is deprecated there; take EDMEulerScheduler",
}


def completed(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A configuration with the defaults of its class, and the keys that its class ignores, with their values.

    Raises:
        ArgumentError: if the class is not known here, or a key is that no class is known to have, unless it is off.
    """
    name = config.get("_class_name")
    if name in _ELSEWHERE:
        raise ArgumentError(f"{name} is not read: ", _ELSEWHERE[name])
    if name not in KINDS:
        raise ArgumentError(f"_class_name={name!r}: {one_of(name, KINDS)} schedulers")
    kind = KINDS[name]
    known = {key for each in KINDS.values() for key in each.keys} | _STEPPING
    given = {key: value for key, value in config.items() if not key.startswith("_") and key not in _STEPPING}
    if unknown := sorted(key for key, value in given.items() if key not in known and value not in (None, False)):
        told = ", ".join(f"{key}={given[key]!r}" for key in unknown)
        raise ArgumentError(f"{name} has ", f"{told} in its configuration, which is not known here: it may change all")
    for key, value in given.items():
        _check_type(name, key, value, kind.keys.get(key))
    ignored = {key: value for key, value in given.items() if key not in kind.keys}
    own = {key: value for key, value in given.items() if key in kind.keys}
    return {"_class_name": name, **kind.implied, **kind.keys, **own}, ignored


def _check_type(name: str, key: str, value: Any, default: Any) -> None:
    """Raises ArgumentError unless a value is of its default's type: a number, or whether something is on."""
    if isinstance(default, bool):
        right = isinstance(value, bool | None)
    elif isinstance(default, int):
        right = isinstance(value, int) and 0 <= value <= 1_000_000
    else:
        right = not isinstance(default, float) or (isinstance(value, int | float) and not math.isnan(value))
    if not right:
        expected = f"a {type(default).__name__}{', 0 to 1000000' if type(default) is int else ''}"
        raise ArgumentError(f"{name} has ", f"{key}={value!r} in its configuration: expected {expected}")
