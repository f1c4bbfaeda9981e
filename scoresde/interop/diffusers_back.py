"""The way back: a scheduler of diffusers from an SDE of ours, and a pipeline where the network came from them.

    ours                        theirs
    DDPMChain                   DDIMScheduler: a named schedule where its betas are one, else trained_betas
    VPSDE, CosineVPSDE          DDIMScheduler, trained_betas: the chain of T steps at t = n / T t_max, beta_n = 1 -
                                (alpha_n / alpha_{n-1})^2; its label is n - 1, not what the network is told here
    EDMSDE                      EDMEulerScheduler with sigma_min, sigma_max, sigma_data
    FlowSDE                     FlowMatchEulerDiscreteScheduler

What has alpha^2 + sigma^2 other than 1, or levels that theirs cannot have, sub-VP and VE, has none.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from scoresde.chain import DDPMChain
from scoresde.checks import ArgumentError, check_count
from scoresde.denoiser import Denoiser, EDMDenoiser, NetworkDenoiser
from scoresde.interop.diffusers import library
from scoresde.interop.diffusers_kinds import completed
from scoresde.interop.diffusers_networks import Called
from scoresde.interop.diffusers_schedulers import betas_of, schedule_of
from scoresde.schedules import EDMSDE, FlowSDE
from scoresde.sde import SDE, VariancePreserving
from scoresde.variance import LearnedRangeDenoiser
from scoresde.wrappers import Clip, DynamicThreshold, Latent, Limit, Wrapper

__all__ = ["scheduler_config", "to_diffusers"]

_WORDS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
_NAMED: tuple[dict[str, Any], ...] = (
    {"beta_schedule": "linear"},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "linear", "beta_start": 0.0015, "beta_end": 0.0195},
    {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195},
)
"""The schedules of published models, for a configuration that a person can read."""


def scheduler_config(model: Denoiser | SDE, *, steps: int = 1000) -> dict[str, Any]:
    """The configuration of the scheduler that a model or SDE has there, `_class_name` included, made without diffusers.

    Args:
        model: a denoiser, whose network's prediction, clipping and precision count too, or an SDE, of an eps network.
        steps: T of the chain for an SDE that is continuous.

    Raises:
        ArgumentError: if theirs have none, naming what stands against it.

    >>> from scoresde import DDPMChain, SubVPSDE
    >>> scheduler_config(DDPMChain.linear(1000))["beta_schedule"]
    'linear'
    """
    check_count(steps=steps)
    sde = model if isinstance(model, SDE) else model.sde
    network, wrappers = (None, []) if isinstance(model, SDE) else _unwrapped(model)
    predicts = "eps" if network is None else network.predicts
    if isinstance(sde, EDMSDE | FlowSDE):
        if wrappers := [w for w in wrappers if isinstance(w, Limit | LearnedRangeDenoiser)]:
            raise _none(sde, f"which would clip or have a learned variance, as {type(wrappers[0]).__name__} does")
        config = _edm(sde, network, predicts) if isinstance(sde, EDMSDE) else _flow(sde, network, predicts)
        _check_label(network, config)
        return config
    if not isinstance(sde, VariancePreserving) or not _preserves(sde):
        raise _none(sde, "their chains have alpha^2 + sigma^2 = 1, their EDM schedulers sigma = t")
    if predicts not in _WORDS:
        raise _none(sde, f"a network that predicts {predicts}: theirs predict eps, x0 or v")
    config = {"_class_name": "DDIMScheduler", "prediction_type": _WORDS[predicts], "clip_sample": False}
    for wrapper in wrappers:
        if (said := _said(wrapper)) is not None:
            config |= {"_class_name": "DDPMScheduler", **said}
        elif isinstance(wrapper, Limit):
            told = (
                f"{type(wrapper).__name__} with these bounds: theirs clip to [-c, c], or threshold at 1, interpolating"
            )
            raise _none(sde, told)
    betas = _betas(sde, steps)
    config["num_train_timesteps"] = len(betas)
    for named in _NAMED:
        whole = completed({**config, **named})[0]
        if bool(((betas_of(whole) - betas).abs() <= 1e-12).all()):
            config |= named
            break
    else:
        config["trained_betas"] = betas.tolist()
    _check_label(network, config)
    return config


def _said(wrapper: Wrapper) -> dict[str, Any] | None:
    """What DDPMScheduler's configuration says of a wrapper; None where it says nothing."""
    if isinstance(wrapper, Clip) and wrapper.low == -wrapper.high:
        return {"clip_sample": True, "clip_sample_range": wrapper.high}
    if isinstance(wrapper, DynamicThreshold) and wrapper.bound == 1 and wrapper.interpolate:
        cap = min(wrapper.cap, 1e9)  # JSON has no infinity
        ratio = {"dynamic_thresholding_ratio": wrapper.quantile, "sample_max_value": cap}
        return {"thresholding": True, **ratio}
    return {"variance_type": "learned_range"} if isinstance(wrapper, LearnedRangeDenoiser) else None


def _check_label(network: NetworkDenoiser | None, config: Mapping[str, Any]) -> None:
    """Warns if the network is told another label here than their scheduler would tell it at the same level."""
    if network is None:
        return
    theirs = schedule_of(config).adapter(network.net)
    share = torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64, device="cpu")
    own, found = network.label(share * network.sde.t_max).double(), theirs.label(share * theirs.sde.t_max).double()
    if own.shape != found.shape or not torch.allclose(own, found, rtol=1e-6):
        warnings.warn(
            f"the network is told {own.tolist()} here where {config['_class_name']} tells it {found.tolist()}: "
            "there it needs a wrapper that makes its own label of theirs",
            stacklevel=4,
        )


def _none(sde: SDE, why: str) -> ArgumentError:
    return ArgumentError(f"diffusers has no scheduler for {type(sde).__name__}: ", why)


def _unwrapped(model: Denoiser) -> tuple[NetworkDenoiser, list[Wrapper]]:
    """The network's denoiser, and what is around it.

    Raises:
        ArgumentError: if that is no network's, or a wrapper has nothing there that does the same.
    """
    wrappers: list[Wrapper] = []
    while isinstance(model, Wrapper):
        wrappers.append(model)
        model = model.denoiser
    if not isinstance(model, NetworkDenoiser):
        raise ArgumentError(f"model is {type(model).__name__}: ", "expected a network's denoiser, or the SDE alone")
    known = ("Clip", "DynamicThreshold", "Latent", "LearnedRangeDenoiser", "Published")
    if other := [type(wrapper).__name__ for wrapper in wrappers if type(wrapper).__name__ not in known]:
        raise ArgumentError(f"{', '.join(other)} has nothing in diffusers that does the same: ", "give what it wraps")
    return model, wrappers


def _flow(sde: FlowSDE, network: NetworkDenoiser | None, predicts: str) -> dict[str, Any]:
    if network is not None and predicts != "velocity":
        raise _none(sde, f"a network that predicts {predicts}: FlowMatchEulerDiscreteScheduler takes a velocity")
    inverted = network is not None and _sign(network) == -1
    return {"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": inverted}


def _sign(network: NetworkDenoiser) -> int:
    return network.net.sign if isinstance(network.net, Called) else 1


def _edm(sde: EDMSDE, network: NetworkDenoiser | None, predicts: str) -> dict[str, Any]:
    config: dict[str, Any] = {"_class_name": "EDMEulerScheduler", "sigma_min": sde.t_min, "sigma_max": sde.t_max}
    if network is None:
        return config
    if not isinstance(network, EDMDenoiser):
        raise _none(sde, f"a network that predicts {predicts}: EDMEulerScheduler's is preconditioned, F")
    word = "epsilon" if _sign(network) == 1 else "v_prediction"
    return {**config, "sigma_data": network.sigma_data, "prediction_type": word}


def _preserves(sde: SDE) -> bool:
    t = torch.linspace(0.1, 0.9, 9, dtype=torch.float64, device="cpu") * sde.t_max
    return bool(((sde.alpha(t) ** 2 + sde.sigma(t) ** 2 - 1).abs() < 1e-9).all())


def _betas(sde: VariancePreserving, steps: int) -> Tensor:
    """The betas of a chain, or of n / T t_max, n = 1..T."""
    if isinstance(sde, DDPMChain):
        return sde.betas
    B = sde.integrated_beta(torch.linspace(0, sde.t_max, steps + 1, dtype=torch.float64, device="cpu"))
    return -torch.expm1(-B.diff())


def to_diffusers(model: Denoiser | SDE, *, pipeline: bool | None = None, steps: int = 1000) -> Any:
    """A scheduler of diffusers from our SDE, or, where the network came from there, the pipeline.

    Args:
        model: a denoiser or an SDE.
        pipeline: True is a pipeline or an error, False is a scheduler; by default a pipeline where there is one.
        steps: as for `scheduler_config`. A continuous VP process becomes a chain of so many steps, equal to it at t =
            n / T t_max, whose network is told n - 1. One that was told t, or 999 t, needs a wrapper there that makes
            its label; a warning says so.

    Raises:
        ImportError: if there is no diffusers.
        ArgumentError: if theirs have no such scheduler, or a pipeline is asked for and the network is not one of
            theirs, naming what stands against it.

    >>> to_diffusers(VPSDE()).config.num_train_timesteps                                        # doctest: +SKIP
    1000
    """
    config = scheduler_config(model, steps=steps)
    diffusers = library()
    scheduler = getattr(diffusers, config["_class_name"])(**{k: v for k, v in config.items() if k != "_class_name"})
    if pipeline is False or isinstance(model, SDE):
        if pipeline:
            raise ArgumentError("pipeline=True: an SDE has no network")
        return scheduler
    network, wrappers = _unwrapped(model)
    called: Any = network.net
    made = _PIPELINES.get(called.kind) if isinstance(called, Called) else None
    vae = next((_autoencoder(w) for w in wrappers if isinstance(w, Latent)), None)
    if made is None:
        if pipeline:
            raise ArgumentError(
                "pipeline=True: ",
                f"the network is {type(network.net).__name__}: expected {' or '.join(_PIPELINES)}, of diffusers",
            )
        return scheduler
    return made(diffusers, called.net, scheduler, vae)


def _autoencoder(latent: Latent) -> nn.Module | None:
    vae = getattr(getattr(latent.codec, "encoder", None), "vae", None)
    return vae if isinstance(vae, nn.Module) else None


def _dit(diffusers: Any, net: nn.Module, scheduler: Any, vae: nn.Module | None) -> Any:
    return diffusers.DiTPipeline(transformer=net, vae=vae, scheduler=scheduler)


def _ddpm(diffusers: Any, net: nn.Module, scheduler: Any, vae: nn.Module | None) -> Any:
    ddim = type(scheduler).__name__ == "DDIMScheduler"
    return (diffusers.DDIMPipeline if ddim else diffusers.DDPMPipeline)(unet=net, scheduler=scheduler)


_PIPELINES: Mapping[str, Callable[..., Any]] = {"UNet2DModel": _ddpm, "DiTTransformer2DModel": _dit}
"""Pipelines that are a network, a scheduler and an autoencoder; those with text have more, which is not kept here."""
