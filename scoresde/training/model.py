"""A model in words: what TOML, a command line and a checkpoint's manifest can say of a denoiser, and its building."""

from __future__ import annotations

import copy
import inspect
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import scoresde.nn as networks
from scoresde.checks import ArgumentError, check_keys, check_option, made_of
from scoresde.denoiser import (
    EDMDenoiser,
    EpsDenoiser,
    NetworkDenoiser,
    ScoreDenoiser,
    VDenoiser,
    VelocityDenoiser,
    X0Denoiser,
    check_denoiser,
)
from scoresde.errors import CheckpointError
from scoresde.networks import seeded_global_generators
from scoresde.processes import sde_name, sde_of
from scoresde.training.folder import Checkpoint, newest
from scoresde.training.identity import identity
from scoresde.training.whole_files import read_weights, weights_file

__all__ = ["ModelConfig", "check_model", "load", "load_ema", "loaded", "opened", "sizes_of"]

PREDICTIONS: dict[str, type[NetworkDenoiser]] = {
    "eps": EpsDenoiser,
    "v": VDenoiser,
    "x0": X0Denoiser,
    "score": ScoreDenoiser,
    "velocity": VelocityDenoiser,
    "edm": EDMDenoiser,
}
NETWORKS = {"unet": "UNet", "dit": "DiT", "mlp": "MLP", "set": "SetTransformer"}
ENCODERS = {"image": "ImageEncoder", "text": "TextEncoder", "pretrained-text": "PretrainedText"}


@dataclass(frozen=True)
class ModelConfig:
    """A denoiser in words.

    Args:
        sde: a name in `scoresde.SDES`: "vp", "flow", "chain", ...
        sde_options: keyword arguments of what that makes it by, `VPSDE`, `DDPMChain.linear`, ...
        network: "unet", "dit", "mlp", or "set" for `SetTransformer`: the classes of `scoresde.nn`.
        preset: a size or name that the network's class has a preset for, `UNet.preset(32, **options)` say.
        options: keyword arguments of the network's class, or on top of the preset.
        predicts: "eps", "v", "x0", "score", "velocity", or "edm" for Karras preconditioning.
        time_scale: the network is told time_scale * t; by default t itself (ln(sigma / alpha) / 4 for "edm").
        sigma_data: of "edm" alone, standard deviation of the data.
        encoders: of conditions that other networks compute (`scoresde.nn.Encoding`), by the raw condition's name: a
            mapping of `network`, "image", "text" or "pretrained-text" for `ImageEncoder`, `TextEncoder` or
            `PretrainedText` (by default that of the condition's name, if there is one, else "image"), its `options`,
            the `key` of what it makes, "vector" by default, and `frozen`: false, or the path of a safetensors file of
            its weights, which then stay as they are and in that file alone; or true, the default of a network that
            brings its own, as it says by `pretrained`.

    Raises:
        ValueError: on another name, an option that is not known (naming it), or one that JSON cannot hold.

    >>> config = ModelConfig(network="mlp", options={"event_shape": 2, "width": 16}, predicts="v", time_scale=999)
    >>> config.build()
    VDenoiser(MLP, VPSDE(beta_min=0.1, beta_max=20.0, t_min=1e-05, t_max=1.0))
    """

    sde: str = "vp"
    sde_options: dict[str, Any] = field(default_factory=dict)
    network: str = "unet"
    preset: int | str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    predicts: str = "eps"
    time_scale: float | None = None
    sigma_data: float | None = None
    encoders: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sde", sde_name(self.sde))
        check_option(PREDICTIONS, predicts=self.predicts)
        check_option([key for key, name in NETWORKS.items() if hasattr(networks, name)], network=self.network)
        for name in ("sde_options", "options", "encoders"):
            try:
                # As they will be when they have been read back: lists for tuples.
                object.__setattr__(self, name, json.loads(json.dumps(dict(getattr(self, name)))))
            except TypeError as error:
                raise ValueError(f"{name}={getattr(self, name)!r}: JSON cannot hold it ({error})") from error
        sde_of(self.sde, self.sde_options)  # raises on options that it has not
        check_keys(f"network {self.network!r}", self.options, inspect.signature(self._class).parameters)
        for name, encoder in self.encoders.items():
            object.__setattr__(self, "encoders", {**self.encoders, name: _described(name, encoder)})
        if self.preset is not None and not hasattr(self._class, "preset"):
            raise ArgumentError(f"preset={self.preset!r}: network {self.network!r} has no presets")
        if self.sigma_data is not None and self.predicts != "edm":
            raise ValueError(f"sigma_data={self.sigma_data} is of predicts='edm', not of {self.predicts!r}")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> ModelConfig:
        """From a mapping, what TOML or JSON gives.

        Raises:
            ValueError: on a key that is none of the arguments, naming it, and as the class does.
        """
        check_keys(cls.__name__, settings, (f.name for f in fields(cls)))
        return cls(**settings)

    def to_dict(self) -> dict[str, Any]:
        """What `of` takes, of JSON's types."""
        found = asdict(self)
        if not self.encoders:
            del found["encoders"]  # which earlier versions did not have
        return found

    @property
    def _class(self) -> type[nn.Module]:
        found: type[nn.Module] = getattr(networks, NETWORKS[self.network])
        return found

    def build(self, seed: int | None = None) -> NetworkDenoiser:
        """The denoiser, with initial weights.

        Args:
            seed: of the weights; drawn by the operating system if None. The global generator stays as it is.
        """
        with seeded_global_generators(seed):
            return self.around(self.net())

    def net(self) -> nn.Module:
        """The network, with weights drawn from the global generator.

        Raises:
            ValueError: if it cannot be made of the options.
        """
        make: Callable[..., nn.Module] = self._class
        if self.preset is not None:
            make = partial(getattr(self._class, "preset"), self.preset)  # noqa: B009
        net = made_of(f"network {self.network!r}", make, self.options)
        if not self.encoders:
            return net
        made = {name: _encoder(name, encoder) for name, encoder in self.encoders.items()}
        keys = {name: encoder["key"] for name, encoder in self.encoders.items()}
        frozen = [name for name, encoder in self.encoders.items() if encoder["frozen"]]
        return networks.Encoding(net, made, keys=keys, frozen=frozen)

    def around(self, net: nn.Module) -> NetworkDenoiser:
        """The denoiser around a network."""
        kind, sde = PREDICTIONS[self.predicts], sde_of(self.sde, self.sde_options)
        time = None if self.time_scale is None else _Scaled(self.time_scale)
        more = {} if self.sigma_data is None else {"sigma_data": self.sigma_data}
        return kind(net, sde, time=time, **more)


def _described(name: str, encoder: Mapping[str, Any]) -> dict[str, Any]:
    """An encoder in words, whole and checked."""
    if not isinstance(encoder, Mapping):
        raise TypeError(f"encoders[{name!r}] is {encoder!r}: expected a mapping, {{'network': 'image', ...}}")
    check_keys(f"encoder {name!r}", encoder, ("network", "options", "key", "frozen"))
    found = {
        "network": name if name in ENCODERS else "image",
        "options": {},
        "key": "vector",
        **encoder,
    }
    check_option(ENCODERS, network=found["network"])
    kind = _encoder_class(found)
    found.setdefault("frozen", getattr(kind, "pretrained", False))
    check_keys(f"encoder {found['network']!r}", found["options"], inspect.signature(kind).parameters)
    if found["frozen"] is True and not getattr(kind, "pretrained", False):
        raise ArgumentError(
            f"encoders[{name!r}] is frozen, and {kind.__name__} brings no weights: give the path of a safetensors file "
            "of them as frozen"
        )
    return found


def _encoder_class(encoder: Mapping[str, Any]) -> type[nn.Module]:
    found: type[nn.Module] = getattr(networks, ENCODERS[encoder["network"]])
    return found


def sizes_of(encoder: Mapping[str, Any]) -> dict[str, int]:
    """The options of a network that is told what an encoder of texts, in these words, finds.

    Raises:
        ValueError: if it cannot be made of its options.
    """
    with torch.device("meta"):
        made = made_of("encoder", _encoder_class(encoder), encoder["options"])
    return dict(getattr(made, "sizes", {}))


def _encoder(name: str, encoder: Mapping[str, Any]) -> nn.Module:
    """What the words say, with the weights of its file where it has one.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if the options or the file do not fit.
    """
    made = made_of(f"encoder {name!r}", _encoder_class(encoder), encoder["options"])
    path = encoder["frozen"]
    if isinstance(path, str) and not any(p.is_meta for p in made.parameters()):
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}, of the frozen encoder {name!r}, is not there")
        read_weights(Path(path).parent, [], Path(path).name, made)
    return made


@dataclass(frozen=True)
class _Scaled:
    """t to factor t."""

    factor: float

    def __call__(self, t: Tensor) -> Tensor:
        return self.factor * t


def load(path: str | Path | Checkpoint, average: int | None = 0, device: torch.device | str = "cpu") -> NetworkDenoiser:
    """A trained denoiser, ready to sample from: built anew from what the run's manifest says, in eval mode.

    Args:
        path: the run folder of a `Trainer(..., model=ModelConfig(...), folder=...)`, one of its checkpoints, or what
            `opened` gave.
        average: which of the averaged weights, where there are several; None for the weights without averaging.
        device: where to.

    Of a run on latents it is the denoiser of these, of which a warning tells: `load_latent` has the codec, too.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        CheckpointError: if these weights are whole in none (of a checkpoint that is passed over a warning tells; its
            other files are not looked at), the model's description is missing, from another version or not of what
            the weights were made for, or there is no such average.
    """
    found = opened(path, weights_file(average))
    denoiser = loaded(found, average, device)
    if str(found.manifest["made_for"].get("data", "")).startswith("LatentData"):
        warnings.warn(
            f"{found.path} was trained on latents, and its samples are latents: scoresde.training.load_latent decodes",
            stacklevel=2,
        )
    return denoiser


def loaded(found: Checkpoint, average: int | None, device: torch.device | str = "cpu") -> NetworkDenoiser:
    """A checkpoint's denoiser, as `load`: of a run on latents that of these."""
    name = weights_file(average)
    if found.manifest["model"] is None:
        raise CheckpointError(
            f"{found.path} does not say what the model is, the Trainer having been given no model=ModelConfig(...): "
            "build the denoiser as for training, and call scoresde.training.load_ema(path, denoiser)"
        )
    try:
        config = ModelConfig.of(found.manifest["model"])
        denoiser = config.build()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{found.path} describes a model that this version cannot build: {error}") from error
    assert isinstance(denoiser.net, nn.Module)
    found.check(identity(denoiser), whole=False)
    found.weights(name, denoiser.net)
    denoiser.net.to(device).eval().requires_grad_(False)
    return denoiser


def load_ema(path: str | Path | Checkpoint, denoiser: NetworkDenoiser, average: int = 0) -> NetworkDenoiser:
    """The denoiser with the averaged weights of a trainer's checkpoint, in eval mode: to sample without the data.

    Args:
        path: the run folder of a `Trainer`, for its newest checkpoint, one checkpoint's folder, or what `opened` gave.
        denoiser: built as for training; its network's weights do not matter, and are not changed.
        average: which of the averages, where there are several.

    Raises:
        FileNotFoundError: if there is none.
        CheckpointError: as `load` does; if it was made for another SDE, parameterisation, time label or network.
    """
    check_denoiser(denoiser)
    if not isinstance(denoiser.net, nn.Module):
        raise ValueError(f"load_ema needs an adapter around an nn.Module, not {denoiser!r}")
    found = opened(path, name := weights_file(average))
    found.check(identity(denoiser), whole=False)
    net = copy.deepcopy(denoiser.net)
    found.weights(name, net)
    return denoiser.with_net(net.eval().requires_grad_(False))


def opened(path: str | Path | Checkpoint, name: str | None = None) -> Checkpoint:
    """The newest checkpoint there, or the one that has this folder; one that is open already, as it is.

    Args:
        path: the run folder, a checkpoint's, or a checkpoint.
        name: of the weights that are wanted, by `weights_file`, if nothing else of it need be whole.

    Raises:
        FileNotFoundError: if there is none.
        CheckpointError: if none is whole, or there are no such weights.
    """
    if isinstance(path, Checkpoint):
        return path
    found = newest(Path(path), name)
    if found is None:
        raise FileNotFoundError(f"there is no checkpoint in {path}")
    return found


def check_model(model: ModelConfig, denoiser: NetworkDenoiser) -> None:
    """Raises ValueError if the words are of another denoiser."""
    with torch.device("meta"):
        net = model.net()
    assert isinstance(denoiser.net, nn.Module)
    theirs, ours = identity(model.around(net)), identity(denoiser)
    if different := [f"{key}: {theirs[key]} in words, {ours[key]} given" for key in theirs if theirs[key] != ours[key]]:
        raise ValueError("model= describes another denoiser (model.build() makes its own). " + "; ".join(different))
