"""score_sde's networks (.pth; Song et al., 2021): the "ncsnpp" and "ddpm" of score_sde_pytorch.

A checkpoint holds numbers alone: "model", the state of a DataParallel, "module." before each name; "ema", the averages
of the parameters *that take gradients*, a list without names; "optimizer" and "step". What they are numbers of is in a
configuration of Python's, which the file does not hold: it is given, or named.

                 label            the network's output F     our denoiser
    vp, subvp    999 t            eps = F                     `EpsDenoiser` on `VPSDE`, `SubVPSDE`
    vp, discrete n - 1            eps = F                     on `DDPMChain`
    ve           ln sigma         score = F / sigma           on `VESDE`, with -F
    ve, discrete (N - 1) (1 - t)  score = F / sigma           the same

Their VE networks are told x in [0, 1], of which they make y = 2 x - 1 themselves. Here the diffusion is that of y: data
in [-1, 1], as everywhere, and every sigma twice theirs. (Score and likelihood are then those of y; and where theirs
starts from noise about x = 0, which is y = -1, ours is about y = 0: at sigma = 100 it is all the same.)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scoresde.chain import DDPMChain
from scoresde.checks import check_option
from scoresde.denoiser import EpsDenoiser
from scoresde.errors import CheckpointError, some
from scoresde.interop.formats import refuse
from scoresde.interop.model import Published, published, uniform_to_data
from scoresde.interop.reading import check_dense, check_device, fill, hashed, read_torch, state_of
from scoresde.nn import SongUNet
from scoresde.nn.blocks import ResidualBlock
from scoresde.schedules import VESDE, VPSDE, SubVPSDE
from scoresde.sde import SDE

__all__ = ["CIFAR10", "SCORE_SDE", "from_score_sde", "network_of", "process_of"]


def from_score_sde(
    path: str | Path,
    config: str | Mapping[str, Any],
    *,
    data: Tensor | None = None,
    sha256: str | None = None,
    device: torch.device | str | None = None,
) -> Published:
    """The network of a checkpoint of score_sde_pytorch: its average, or where the file has none, the network itself.

    `.grid(steps)` is uniform in t from 1 to their end, 1e-3 for VP and sub-VP, 1e-5 for VE, then 0: their "denoised"
    samples. A discrete network's label between its nodes is the number between theirs.

    Args:
        path: of the .pth.
        config: a name in `SCORE_SDE`, that of its file in their `configs`, such as "ve/cifar10_ncsnpp_continuous"; or
            the configuration, its sections "training", "data" and "model" as dictionaries, or all in one.
        data: images in [-1, 1], VE's too, to check the wiring with.
        sha256: what the file's must be.
        device: of the network; the CPU by default.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the configuration is not known by that name, lacks an entry, or asks for what no network here is.
        CheckpointError: if the file is another than sha256 says, is damaged, holds more than tensors, or is of another
            network than the configuration says.
    """
    check_device(device)
    path, options = Path(path), _configuration(config)
    refuse(path, "score_sde")
    digest = hashed(path, sha256)
    held = read_torch(path)
    if not isinstance(held, dict) or "model" not in held:
        raise CheckpointError(f"{path} holds no 'model': expected a checkpoint of score_sde_pytorch")
    with torch.device("meta"):
        net = network_of(options)
    names = list(_names(net, options))
    tensors = {key.removeprefix("module."): t for key, t in state_of(held["model"], path, "'model'").items()}
    if average := held.get("ema"):
        shadow = average.get("shadow_params") if isinstance(average, Mapping) else None
        if not isinstance(shadow, list):
            raise CheckpointError(
                f"{path} has an 'ema' without shadow_params, a list: no checkpoint of score_sde_pytorch"
            )
        check_dense(enumerate(shadow), path, "shadow_params")
        tensors.update(_averages(shadow, names, tensors, path))
    fill(net, _renamed(net, names, tensors, path, negate=options["sde"] == "vesde"), path)
    sde, label = process_of(options)
    about = {
        "format": "score_sde",
        "files": {path.name: digest},
        "parameters": sum(p.numel() for p in net.parameters()),
        "weights": "ema" if average else "model",
        "predicts": "eps",
        "sde": repr(sde),
        "config": config if isinstance(config, str) else None,
        "options": options,
        "range": [-1.0, 1.0],
        "their range": [-1.0, 1.0] if options["centered"] else [0.0, 1.0],
    }
    C, size = options["num_channels"], options["image_size"]
    last = 1e-5 if isinstance(sde, VESDE) else 1e-3
    grid = None if sde.nodes is not None else lambda steps: uniform_to_data(sde, steps, last)
    return published(EpsDenoiser(net.to(device), sde, time=label), (C, size, size), about, grid, data=data)


# ---- configurations ----

CIFAR10: dict[str, Any] = {"sde": "vesde", "continuous": True, "image_size": 32, "num_channels": 3, "centered": False}
CIFAR10 |= {"sigma_min": 0.01, "sigma_max": 50, "num_scales": 1000, "beta_min": 0.1, "beta_max": 20.0, "dropout": 0.1}
CIFAR10 |= {"name": "ncsnpp", "scale_by_sigma": True, "nf": 128, "ch_mult": (1, 2, 2, 2), "num_res_blocks": 4}
CIFAR10 |= {"attn_resolutions": (16,), "resamp_with_conv": True, "conditional": True, "nonlinearity": "swish"}
CIFAR10 |= {"fir": True, "fir_kernel": (1, 3, 3, 1), "skip_rescale": True, "resblock_type": "biggan"}
CIFAR10 |= {"progressive": "none", "progressive_input": "residual", "progressive_combine": "sum"}
CIFAR10 |= {"embedding_type": "fourier"}

_VP: dict[str, Any] = {"sde": "vpsde", "centered": True, "scale_by_sigma": False, "embedding_type": "positional"}
_PLUS: dict[str, Any] = {**_VP, "fir": False, "progressive_input": "none"}
_OLD: dict[str, Any] = {"name": "ddpm", "num_res_blocks": 2, "fir": False, "fir_kernel": (1, 3, 3, 1)}
_OLD |= {"skip_rescale": False, "resblock_type": "ddpm", "progressive": "none", "progressive_input": "none"}
_OLD |= {"progressive_combine": "sum", "embedding_type": "positional"}
_DDPM: dict[str, Any] = {**_VP, **_OLD}
_STEPS: dict[str, Any] = {"continuous": False, "embedding_type": "positional"}
_LARGE: dict[str, Any] = {"image_size": 256, "ch_mult": (1, 1, 2, 2, 2, 2, 2), "num_res_blocks": 2, "dropout": 0.0}
_LARGE |= {"sigma_max": 378, "num_scales": 2000, "progressive": "output_skip", "progressive_input": "input_skip"}
_HUGE: dict[str, Any] = {**_LARGE, "image_size": 1024, "nf": 16, "ch_mult": (1, 2, 4, 8, 16, 32, 32, 32)}
_HUGE |= {"num_res_blocks": 1, "sigma_max": 1348}
_DEEP, _SUB = {"num_res_blocks": 8}, {"sde": "subvpsde"}
_CELEBA = {"sigma_max": 90.0, "num_scales": 1000, "dropout": 0.1}

SCORE_SDE: dict[str, dict[str, Any]] = {
    "ve/cifar10_ncsnpp": _STEPS,
    "ve/cifar10_ncsnpp_continuous": {},
    "ve/cifar10_ncsnpp_deep_continuous": _DEEP,
    "ve/cifar10_ddpm": {**_DDPM, **_STEPS, "sde": "vesde", "centered": False, "scale_by_sigma": True},
    "ve/celeba_ncsnpp": {**_STEPS, **_CELEBA, "image_size": 64},
    "ve/bedroom_ncsnpp_continuous": _LARGE,
    "ve/church_ncsnpp_continuous": {**_LARGE, "sigma_max": 380},
    "ve/celebahq_256_ncsnpp_continuous": {**_LARGE, "sigma_max": 348},
    "ve/ffhq_256_ncsnpp_continuous": {**_LARGE, "sigma_max": 348},
    "ve/celebahq_ncsnpp_continuous": _HUGE,
    "ve/ffhq_ncsnpp_continuous": _HUGE,
    "vp/cifar10_ddpm": {**_DDPM, **_STEPS},
    "vp/cifar10_ddpm_continuous": _DDPM,
    "vp/cifar10_ddpmpp": {**_PLUS, **_STEPS},
    "vp/cifar10_ddpmpp_continuous": _PLUS,
    "vp/cifar10_ddpmpp_deep_continuous": {**_PLUS, **_DEEP},
    "vp/cifar10_ncsnpp": {**_VP, **_STEPS},
    "vp/cifar10_ncsnpp_continuous": _VP,
    "vp/cifar10_ncsnpp_deep_continuous": {**_VP, **_DEEP},
    "subvp/cifar10_ddpm_continuous": {**_DDPM, **_SUB},
    "subvp/cifar10_ddpmpp_continuous": {**_PLUS, **_SUB},
    "subvp/cifar10_ddpmpp_deep_continuous": {**_PLUS, **_DEEP, **_SUB},
    "subvp/cifar10_ncsnpp_continuous": {**_VP, **_SUB},
    "subvp/cifar10_ncsnpp_deep_continuous": {**_VP, **_DEEP, **_SUB},
}
"""The published networks: in what each configuration differs from that of ve/cifar10_ncsnpp_continuous."""

_KNOWN: dict[str, tuple[Any, ...]] = {
    "sde": ("vpsde", "subvpsde", "vesde"),
    "name": ("ncsnpp", "ddpm"),
    "conditional": (True,),
    "nonlinearity": ("swish",),
    "resamp_with_conv": (True,),
    "resblock_type": ("biggan", "ddpm"),
    "progressive": ("none", "output_skip"),
    "progressive_input": ("none", "input_skip", "residual"),
    "progressive_combine": ("sum",),
    "embedding_type": ("positional", "fourier"),
}


def _configuration(config: str | Mapping[str, Any]) -> dict[str, Any]:
    """Every entry that counts, in one dictionary, checked."""
    if isinstance(config, str):
        check_option(SCORE_SDE, config=config)
        return {**CIFAR10, **SCORE_SDE[config]}
    if not isinstance(config, Mapping):
        raise TypeError(f"config is {type(config).__name__}: expected a name in SCORE_SDE, or a dict")
    given = dict(config.items())
    for section in ("training", "data", "model"):
        if not isinstance(found := given.pop(section, {}), Mapping):
            raise TypeError(f"config has a {section} that is {type(found).__name__}: expected a dict")
        given.update(dict(found.items()))
    if given.get("name") == "ddpm":
        given.update({key: value for key, value in _OLD.items() if key != "num_res_blocks"})
    options: dict[str, Any] = {key: given.get(key) for key in CIFAR10}
    if missing := [key for key, value in options.items() if value is None]:
        raise ValueError(f"the configuration lacks {', '.join(missing)}: give the sections training, data and model")
    for key, known in _KNOWN.items():
        options[key] = options[key].lower() if isinstance(options[key], str) else options[key]
        check_option(known, **{key: options[key]})
    exploding = options["sde"] == "vesde"
    if options["scale_by_sigma"] is not exploding or not (options["centered"] or exploding):
        raise ValueError(
            f"sde={options['sde']}, scale_by_sigma={options['scale_by_sigma']}, centered={options['centered']}: "
            "expected networks of VE that are scaled by sigma, and others that are not, on centred data"
        )
    if (options["embedding_type"] == "fourier") is not (exploding and options["continuous"]):
        raise ValueError("the features of the noise are Fourier's: expected them of continuous VE, and there alone")
    if (options["resblock_type"] == "ddpm") is not (options["name"] == "ddpm"):
        raise ValueError("resblock_type='ddpm': it is known of the network 'ddpm' alone")
    if options["name"] == "ddpm" and options["nf"] % 128:
        raise ValueError(f"nf={options['nf']}: the network 'ddpm' has 32 groups, expected a multiple of 128 features")
    if options["progressive_input"] == "residual" and not (options["fir"] and options["skip_rescale"]):
        raise ValueError("progressive_input='residual': expected fir and skip_rescale with it")
    return options


# ---- the network ----


def network_of(options: Mapping[str, Any]) -> SongUNet:
    size, multipliers = options["image_size"], options["ch_mult"]
    return SongUNet(
        options["num_channels"],
        options["nf"],
        multipliers,
        options["num_res_blocks"],
        [n for n in range(len(multipliers)) if size // 2**n in options["attn_resolutions"]],
        options["dropout"],
        fourier=16.0 if options["embedding_type"] == "fourier" else None,
        fir=options["fir_kernel"] if options["fir"] else None,
        entrance={"none": "standard", "input_skip": "skip"}.get(options["progressive_input"], "residual"),  # type: ignore[arg-type]
        exit="skip" if options["progressive"] == "output_skip" else "standard",
        skip_scale=math.sqrt(0.5) if options["skip_rescale"] else 1.0,
        resample="conv" if options["name"] == "ddpm" else "block",
    )


_BLOCK = {"GroupNorm_0": "norm1", "Conv_0": "conv1", "Dense_0": "modulate", "GroupNorm_1": "norm2", "Conv_1": "conv2"}
_ATTENTION = {"GroupNorm_0": "norm", "NIN_0": "qkv", "NIN_1": "qkv", "NIN_2": "qkv", "NIN_3": "project"}
_FREQUENCIES = "embedding.frequencies"


def _names(net: SongUNet, options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Their name and ours of every tensor of the network, in the order in which theirs registers them. Three of theirs,
    q, k and v, are one of ours.
    """
    modules, number = dict(net.named_modules()), itertools.count()
    shortcut = "NIN_0" if options["name"] == "ddpm" else "Conv_2"

    def layer(ours: str, inside: str = "") -> Iterator[tuple[str, str]]:
        yield from _leaves(f"all_modules.{next(number)}{inside}", ours)

    def parts(name: str, inside: Mapping[str, str]) -> Iterator[tuple[str, str]]:
        n = next(number)
        for theirs, own in inside.items():
            yield from _leaves(f"all_modules.{n}.{theirs}", f"{name}.{own}")

    def block(name: str) -> Iterator[tuple[str, str]]:
        if not isinstance(module := modules[name], ResidualBlock):
            yield from layer(f"{name}.conv", ".Conv_0")
        else:
            yield from parts(name, _BLOCK if isinstance(module.skip, nn.Identity) else {**_BLOCK, shortcut: "skip"})

    def stages(way: str, blocks: int) -> Iterator[tuple[str, str]]:
        for name in (f"{way}.{i}" for i in range(blocks)):
            yield from block(f"{name}.0")
            if f"{name}.1" in modules:
                yield from parts(f"{name}.1", _ATTENTION)

    if options["embedding_type"] == "fourier":
        yield f"all_modules.{next(number)}.W", _FREQUENCIES
    yield from layer("embedding.inward")
    yield from layer("embedding.outward")
    yield from layer("inward")
    levels, blocks = len(net.down), options["num_res_blocks"]
    for n in range(levels):
        if n:
            yield from block(f"down.{n}.resample")
            if net.entrance == "skip":
                yield from layer(f"down.{n}.merge", ".Conv_0")
            elif net.entrance == "residual":
                yield from layer(f"down.{n}.merge.conv", ".Conv2d_0")
        yield from stages(f"down.{n}.stages", blocks)
    yield from stages("middle", 2)
    for n in range(levels):
        if n:
            yield from block(f"up.{n}.resample")
        yield from stages(f"up.{n}.stages", blocks + 1)
        if f"up.{n}.readout" in modules:
            yield from layer(f"up.{n}.readout.0")
            yield from layer(f"up.{n}.readout.2")


def _leaves(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
    """Their NIN, a matrix over the channels, has names of its own."""
    matrix = "NIN_" in theirs
    yield f"{theirs}.{'W' if matrix else 'weight'}", f"{ours}.weight"
    yield f"{theirs}.{'b' if matrix else 'bias'}", f"{ours}.bias"


def _averages(
    shadow: list[Tensor], names: list[tuple[str, str]], tensors: Mapping[str, Tensor], path: Path
) -> dict[str, Tensor]:
    """The averages by their names: they have none, but are those of the parameters that take gradients, in order."""
    trained = [theirs for theirs, ours in names if ours != _FREQUENCIES]
    if len(trained) != len(shadow):
        raise CheckpointError(
            f"{path} has {len(shadow)} averages, and the network of this configuration {len(trained)} parameters that "
            "take gradients: another configuration"
        )
    for name, tensor in zip(trained, shadow, strict=True):
        if name in tensors and tensors[name].shape != tensor.shape:
            found, expected = tuple(tensor.shape), tuple(tensors[name].shape)
            raise CheckpointError(f"{path}: the average of {name} has shape {found}, the parameter {expected}")
    return dict(zip(trained, shadow, strict=True))


def _renamed(
    net: SongUNet, names: list[tuple[str, str]], tensors: Mapping[str, Tensor], path: Path, negate: bool
) -> dict[str, Tensor]:
    """Their tensors by our names; with `negate` the network's output changes sign."""
    left = {key: tensor for key, tensor in tensors.items() if key != "sigmas"}
    if missing := [theirs for theirs, _ in names if theirs not in left]:
        raise CheckpointError(f"{path} is of another network than the configuration says: without {some(missing)}")
    found = {name: buffer for name, buffer in net.named_buffers() if name.endswith("kernel")}
    for theirs, ours in names:
        tensor = left.pop(theirs)
        if theirs.endswith(".W") and ours != _FREQUENCIES:
            tensor = tensor.t().contiguous()[:, :, None, None]
        if ours == _FREQUENCIES:
            tensor = 2 * math.pi * tensor
        elif ".qkv." in ours and ours in found:
            tensor = torch.cat([found[ours], tensor])
        elif negate and ".readout.2." in ours:
            tensor = -tensor
        found[ours] = tensor
    return {**found, **left}


# ---- the process ----


def process_of(options: Mapping[str, Any]) -> tuple[SDE, Callable[[Tensor], Tensor]]:
    """The SDE, and the label of its times."""
    low, high, N = options["beta_min"], options["beta_max"], options["num_scales"]
    if options["sde"] == "vesde":
        unit = 1 if options["centered"] else 2
        ve = VESDE(unit * options["sigma_min"], unit * options["sigma_max"])
        if options["continuous"]:
            return ve, lambda t: (ve.sigma(t) / unit).log()
        return ve, lambda t: (N - 1) * (1 - t)
    if options["sde"] == "subvpsde":
        return SubVPSDE(low, high), lambda t: 999 * t
    if options["continuous"]:
        return VPSDE(low, high), lambda t: 999 * t
    chain = DDPMChain.linear(N, low / N, high / N)
    return chain, chain.label
