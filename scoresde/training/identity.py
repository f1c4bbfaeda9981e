"""What weights and checkpoints are only good for, in words that two sessions can compare."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from scoresde.categorical import CategoricalDenoiser, ProductDenoiser
from scoresde.data.arrays import digest
from scoresde.denoiser import NetworkDenoiser
from scoresde.nn.encoding import Encoding
from scoresde.sde import SDE
from scoresde.training.config import TrainConfig
from scoresde.training.step import Loss, Trainable
from scoresde.training.weights import TimeSampler, Weighting

__all__ = ["FREE", "config_in_words", "identity", "identity_of_run", "network_in_words", "network_name", "probe"]
__all__ += ["sde_in_words", "values_of", "versions", "weights_digest"]

# What may differ between two sessions of a run, rounding aside.
FREE = (
    *("steps", "checkpoint_every", "log_every", "evaluate_every", "keep", "tensorboard", "workers", "accumulate"),
    *("compile", "shard", "async_save", "threads", "snapshot_every"),
)


def probe(sde: SDE) -> Tensor:
    """A few times: functions cannot be compared, so their values there are."""
    return torch.linspace(sde.t_min, sde.t_min + 0.9 * (sde.t_max - sde.t_min), 4, dtype=torch.float64)


def sde_in_words(sde: SDE) -> str:
    """Its class, and its scales at a few times."""
    t = probe(sde)
    return f"{type(sde).__name__}, alpha {values_of(sde.alpha(t))}, sigma {values_of(sde.sigma(t))} at t {values_of(t)}"


def identity(denoiser: Trainable) -> dict[str, Any]:
    """What a network's weights are only good for."""
    if not isinstance(denoiser, NetworkDenoiser):
        return _identity_of_states(denoiser)
    t = probe(denoiser.sde)
    assert isinstance(denoiser.net, nn.Module)
    return {
        "sde": sde_in_words(denoiser.sde),
        "parameterisation": type(denoiser).__name__,
        "scale of the output": values_of(denoiser.affine(t)[1]),
        "time label": values_of(denoiser.label(t)),
        "network": network_in_words(denoiser.net),
        **frozen_parts(denoiser.net),
    }


def _identity_of_states(denoiser: CategoricalDenoiser | ProductDenoiser) -> dict[str, Any]:
    process = denoiser.process
    nodes = torch.linspace(0, process.t_max, 5, dtype=torch.float64).round() if process.nodes is not None else None
    t = torch.linspace(0, process.t_max, 5, dtype=torch.float64) if nodes is None else nodes
    words = {"kind": "categorical", "process": repr(process), "parameterisation": type(denoiser).__name__}
    if isinstance(denoiser, CategoricalDenoiser):
        last = denoiser.process.matrix(0.0, process.t_max) @ denoiser.process.matrix(0.0, float(t[2]))
        words |= {"logits": denoiser.logits, "matrices": values_of(last)}
    else:
        words |= {"kind": "product", "predicts": denoiser.predicts, "sde": sde_in_words(denoiser.process.sde)}
    assert isinstance(denoiser.net, nn.Module)
    net = {"time label": values_of(denoiser.label(t)), "network": network_in_words(denoiser.net)}
    return {**words, **net, **frozen_parts(denoiser.net)}


def frozen_parts(net: nn.Module) -> dict[str, str]:
    """What a checkpoint does not hold: a digest of each frozen encoder. None on the meta device, where there is
    nothing."""
    return {
        f"frozen {name}": weights_digest([encoder])
        for name, encoder in (net.frozen if isinstance(net, Encoding) else {}).items()
        if not any(x.is_meta for x in encoder.state_dict().values() if isinstance(x, Tensor))
    }


def identity_of_run(
    denoiser: Trainable,
    data: Mapping[str, Any],
    config: TrainConfig,
    weighting: Weighting,
    times: TimeSampler,
    loss: Loss | None,
) -> dict[str, Any]:
    """What a run's checkpoints are made for; `data` says it of its data. How long a run is, and how often it reports,
    may change between sessions."""
    return {
        **identity(denoiser),
        **data,
        **({} if not isinstance(denoiser, NetworkDenoiser) else _in_words(denoiser.sde, weighting, times)),
        **({} if loss is None else {"loss": getattr(loss, "__name__", type(loss).__name__)}),
        **config_in_words(config),
    }


def _in_words(sde: SDE, weighting: Weighting, times: TimeSampler) -> dict[str, str]:
    u = torch.linspace(0.1, 0.9, 4, dtype=torch.float64)
    return {
        "weighting": values_of(weighting(sde, probe(sde))),
        "times": f"{type(times).__name__}, quantiles {values_of(times.quantile(sde, u))}",
    }


def config_in_words(config: TrainConfig) -> dict[str, Any]:
    """What a checkpoint is made for of a run's configuration."""
    settings = {name: value for name, value in config.to_dict().items() if name not in FREE}
    if not config.power:
        del settings["power"]  # which earlier versions did not have
    return {f"config.{name}": value for name, value in settings.items()}


def network_in_words(net: nn.Module) -> str:
    """Its class, and how large it is."""
    return f"{network_name(net)}, {sum(p.numel() for p in net.parameters())} parameters"


def weights_digest(nets: Iterable[nn.Module]) -> str:
    """A hash of the weights and buffers of networks; "none" where there are no networks."""
    nets, total = list(nets), hashlib.sha256()
    for net in nets:
        for name, value in net.state_dict().items():
            if isinstance(value, Tensor):
                total.update(f"{name} {digest(value)}".encode())
    return f"sha256 {total.hexdigest()[:12]}" if nets else "none"


def network_name(net: nn.Module) -> str:
    """Its class, of which FSDP2 makes one of its own."""
    return type(net).__name__.removeprefix("FSDP")


def versions() -> str:
    return f"scoresde {version('scoresde')}, torch {torch.__version__}"


def values_of(x: Tensor) -> str:
    """The numbers, to the six digits that name a function and not its rounding."""
    return ", ".join(f"{value:.6g}" for value in x.detach().cpu().double().flatten().tolist())
