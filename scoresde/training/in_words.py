"""Denoisers in words: what TOML, a command line and a checkpoint's manifest can say of one, and its building."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import scoresde.nn as networks
from scoresde.categorical import CategoricalDenoiser, CategoricalProcess
from scoresde.checks import ArgumentError, check_keys, check_option, made_of
from scoresde.denoiser import (
    EDMDenoiser,
    EpsDenoiser,
    NetworkDenoiser,
    ScoreDenoiser,
    VDenoiser,
    VelocityDenoiser,
    X0Denoiser,
)
from scoresde.networks import seeded_global_generators
from scoresde.processes import sde_name, sde_of
from scoresde.training.whole_files import read_weights

__all__ = ["CategoricalConfig", "ModelConfig", "sizes_of"]

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
        _as_json(self, "sde_options", "options", "encoders")
        sde_of(self.sde, self.sde_options)  # raises on options that it has not
        _check_network(self.network, self.preset, self.options)
        for name, encoder in self.encoders.items():
            object.__setattr__(self, "encoders", {**self.encoders, name: _described(name, encoder)})
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
        net = _network(self.network, self.preset, self.options)
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


@dataclass(frozen=True)
class CategoricalConfig:
    """A denoiser of whole states in words: a network for floating-point data (`scoresde.nn.OneHot` around it).

    Args:
        process: "uniform" or "absorbing", of `CategoricalProcess`.
        process_options: keyword arguments of that: states, schedule, steps.
        network, preset, options, time_scale: as for `ModelConfig`; the network has the process's states as its
            channels, `scoresde.nn.OneHot.sizes` says how many.
        channels: whether items have an axis of channels, as images do.
        logits: as for `CategoricalDenoiser`.

    Raises:
        ValueError: as `ModelConfig`.

    >>> config = CategoricalConfig("uniform", {"states": 2}, options={"event_shape": (2, 20), "width": 16})
    >>> config.build()
    CategoricalDenoiser(OneHot, CategoricalProcess.uniform(states=2, schedule='binomial'))
    """

    process: str = "absorbing"
    process_options: dict[str, Any] = field(default_factory=dict)
    network: str = "mlp"
    preset: int | str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    time_scale: float | None = None
    channels: bool = False
    logits: Literal["others", "posterior"] = "others"

    def __post_init__(self) -> None:
        check_option(("uniform", "absorbing"), process=self.process)
        _as_json(self, "process_options", "options")
        self._process()
        _check_network(self.network, self.preset, self.options)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> CategoricalConfig:
        """From a mapping, as `ModelConfig.of`."""
        check_keys(cls.__name__, settings, (f.name for f in fields(cls)))
        return cls(**settings)

    def to_dict(self) -> dict[str, Any]:
        """What `of` takes, of JSON's types."""
        return asdict(self)

    def _process(self) -> CategoricalProcess:
        return made_of(f"process {self.process!r}", getattr(CategoricalProcess, self.process), self.process_options)

    def build(self, seed: int | None = None) -> CategoricalDenoiser:
        """The denoiser, with initial weights, as `ModelConfig.build`."""
        with seeded_global_generators(seed):
            return self.around(self.net())

    def net(self) -> nn.Module:
        """The network, with weights drawn from the global generator."""
        process = self._process()
        return networks.OneHot(_network(self.network, self.preset, self.options), process.size, channels=self.channels)

    def around(self, net: nn.Module) -> CategoricalDenoiser:
        """The denoiser around a network."""
        time = None if self.time_scale is None else _Scaled(self.time_scale)
        return CategoricalDenoiser(net, self._process(), time=time, logits=self.logits)


def _as_json(config: Any, *names: str) -> None:
    """Tables as they will be when they have been read back: lists for tuples."""
    for name in names:
        try:
            object.__setattr__(config, name, json.loads(json.dumps(dict(getattr(config, name)))))
        except TypeError as error:
            raise ValueError(f"{name}={getattr(config, name)!r}: JSON cannot hold it ({error})") from error


def _check_network(network: str, preset: int | str | None, options: Mapping[str, Any]) -> None:
    """Raises ValueError on a network that is not known, or an option or preset that it has not."""
    check_option([key for key, name in NETWORKS.items() if hasattr(networks, name)], network=network)
    kind = getattr(networks, NETWORKS[network])
    check_keys(f"network {network!r}", options, inspect.signature(kind).parameters)
    if preset is not None and not hasattr(kind, "preset"):
        raise ArgumentError(f"preset={preset!r}: network {network!r} has no presets")


def _network(network: str, preset: int | str | None, options: Mapping[str, Any]) -> nn.Module:
    """The network, with weights drawn from the global generator; raises ValueError if it cannot be made."""
    kind: Any = getattr(networks, NETWORKS[network])
    return made_of(f"network {network!r}", kind if preset is None else partial(kind.preset, preset), options)


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
