"""EDM's and EDM2's networks (.pkl with torch_utils.persistence; Karras et al., 2022 and 2024).

Such a file holds Python's source beside the numbers, to run it when it is loaded. Here it is not run: the numbers, and
the arguments that the network was made with, go into networks of our own. Theirs is D(x; sigma) on data of [-1, 1] for
x = x_0 + sigma eps, by one of

    EDMPrecond, Precond    D = c_skip x + c_out F(c_in x, ln(sigma) / 4)        `EDMDenoiser` on `EDMSDE`
    VPPrecond              D = x - sigma F(alpha x, (M - 1) t)                  F is eps, on `VPSDE`
    VEPrecond              D = x + sigma F(x, ln(sigma / 2))                    F is -eps, on `VESDE`
    iDDPMPrecond           D = x - sigma F(alpha x, n - 1), F of 2 C channels   eps and a learned range, on `DDPMChain`
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scoresde.chain import DDPMChain
from scoresde.checks import check_option
from scoresde.denoiser import Denoiser, EDMDenoiser, EpsDenoiser
from scoresde.errors import CheckpointError
from scoresde.grid import Grid
from scoresde.interop.formats import refuse
from scoresde.interop.model import Published, published
from scoresde.interop.pickles import Record, read_pickle
from scoresde.interop.reading import check_device, fill, hashed
from scoresde.nn import MagnitudeUNet, SongUNet
from scoresde.schedules import EDMSDE, VESDE, VPSDE
from scoresde.sde import SDE
from scoresde.variance import LearnedRangeDenoiser, SplitOutput

__all__ = ["from_edm"]


def from_edm(
    path: str | Path,
    *,
    data: Tensor | None = None,
    label: Tensor | int | None = None,
    sha256: str | None = None,
    device: torch.device | str | None = None,
) -> Published:
    """The network of one of EDM's files, its average ("ema") as it was saved, in float32: what theirs computes with
    `force_fp32=True`.

    Classes are integers, `cond={"label": labels}`; theirs are one-hot. No class, or label `label_dim`, is what theirs
    is without `class_labels`. The augmentation that the network was trained with is none. `.grid(steps)` is that of
    their sampler: rho = 7, from 80 or the network's largest sigma to 0.002 or its smallest, then 0; of iDDPM's network
    the nearest of its own levels, each once.

    EDM2's networks of 512 pixels diffuse latents of an autoencoder that the file names and does not hold
    (`about["autoencoder"]`), standardised: z = (raw - m) / (2 s), by channel m = 5.81, 3.25, 0.12, -2.15 and s = 4.17,
    4.62, 3.71, 3.28. Theirs are of pixels in [0, 1], where others give it [-1, 1].

    Nothing in the file is run (`scoresde.interop.pickles`).

    Args:
        path: of the .pkl.
        data: images in [-1, 1] to check the wiring with.
        label: their classes.
        sha256: what the file's must be.
        device: of the network; the CPU by default.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is another than sha256 says, is damaged, names what is no part of a network, or holds a
            network that is not known here, saying which.
    """
    check_device(device)
    path = Path(path)
    refuse(path, "edm")
    digest = hashed(path, sha256)
    held = read_pickle(path)
    try:
        kind, state, network, options, tensors, autoencoder = _read(held, path)
        _check_size(options, tensors, path)
        with torch.device("meta"):
            net = _magnitude(options) if network == "UNet" else _song(network, options, path)
        fill(net, _renamed(net, tensors, network, options, negate=kind == "VEPrecond"), path)
        denoiser, grid = _DENOISERS[kind](net.to(device), state)
    except CheckpointError:
        raise
    except Exception as error:  # whatever its records are where numbers and tensors should be
        raise CheckpointError(f"{path} is not laid out as EDM's files are: {type(error).__name__}: {error}") from error
    about = {
        "format": "EDM",
        "files": {path.name: digest},
        "parameters": sum(p.numel() for p in net.parameters()),
        "predicts": {"VPPrecond": "eps", "VEPrecond": "eps", "iDDPMPrecond": "eps, and a learned range"}.get(kind, "F"),
        "sde": repr(denoiser.sde),
        "preconditioning": kind,
        "network": network,
        "options": options,
        "range": [-1.0, 1.0],
        "classes": options["label_dim"],
    }
    if autoencoder is not None:
        about |= {"range": None, "autoencoder": autoencoder}
    C, size = options.get("in_channels") or options["img_channels"], options["img_resolution"]
    cond = None if label is None else {"label": label}
    return published(denoiser, (C, size, size), about, grid, data=data, cond=cond)


# ---- what the file holds ----


def _read(held: Any, path: Path) -> tuple[str, dict[str, Any], str, dict[str, Any], dict[str, Tensor], str | None]:
    """The average's class and attributes, its network's class, arguments and tensors, and the autoencoder's name."""
    entries = _entries(held)
    if not isinstance(entries, dict) or "ema" not in entries:
        entries = {"ema": held}
    kind, state = _opened(entries["ema"], path)
    if kind not in _DENOISERS:
        raise CheckpointError(f"{path} holds a {kind}: expected one of {', '.join(_DENOISERS)}")
    inner = next(module for name, module in state["_modules"].items() if name in ("model", "unet"))
    network, within = _opened(inner, path)
    if network not in _OPTIONS:
        raise CheckpointError(f"{path} holds a {network}: expected one of {', '.join(_OPTIONS)}")
    given = dict(zip(_OPTIONS[network], within.get("_init_args") or (), strict=False))
    options = {**_OPTIONS[network], **given, **_entries(within.get("_init_kwargs") or {})}
    if unknown := sorted(set(options) - set(_OPTIONS[network])):
        raise CheckpointError(f"{path} holds a {network} with {', '.join(unknown)}, which is not known here")
    autoencoder = None
    if (encoder := entries.get("encoder")) is not None:
        encoding, made = _opened(encoder, path)
        if encoding == "StabilityVAEEncoder":
            autoencoder = made.get("vae_name", "stabilityai/sd-vae-ft-mse")
        elif encoding != "StandardRGBEncoder":
            raise CheckpointError(f"{path} diffuses what a {encoding} makes of images, which is not known here")
    return kind, state, network, options, dict(_tensors(inner, path)), autoencoder


def _check_size(options: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raises CheckpointError if the arguments are no numbers and words, or would make more layers than there are."""
    for name, value in options.items():
        for each in value if isinstance(value, list | tuple) else [value]:
            if not isinstance(each, int | float | str | None):
                raise CheckpointError(f"{path} holds a network with {name}={value!r}: expected a number")
    layers = options["num_blocks"] * len(options["channel_mult"])
    if layers > len(tensors):
        raise CheckpointError(
            f"{path} says that its network has {layers} blocks or more, and holds {len(tensors)} tensors"
        )


def _entries(held: Any) -> Any:
    """What is in a dictionary, or in a record of one (dnnlib's EasyDict)."""
    return held.entries if isinstance(held, Record) else held


def _opened(record: Any, path: Path) -> tuple[str, dict[str, Any]]:
    """The class and the attributes of a module that persistence wrote."""
    if not isinstance(record, Record) or record.name != "torch_utils.persistence._reconstruct_persistent_obj":
        raise CheckpointError(f"{path} holds {record!r} where a network of EDM's was expected")
    assert record.args is not None
    (meta,) = record.args
    return meta["class_name"], meta["state"]


def _tensors(record: Any, path: Path, prefix: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of a module and of those in it, by their full names; each module stands once."""
    seen = set() if seen is None else seen
    if id(record) in seen:
        raise CheckpointError(f"{path} holds a module twice, as {prefix}")
    seen.add(id(record))
    state = record.state if isinstance(record, Record) and record.state else _opened(record, path)[1]
    for name, tensor in {**state["_parameters"], **state["_buffers"]}.items():
        if tensor is not None:
            if not isinstance(tensor, Tensor):
                raise CheckpointError(f"{path}: {prefix}{name} is {tensor!r}, expected a tensor")
            yield prefix + name, tensor
    for name, module in state["_modules"].items():
        if module is not None:
            yield from _tensors(module, path, f"{prefix}{name}.", seen)


# ---- networks ----

_SHARED: dict[str, Any] = {"img_resolution": None, "in_channels": None, "out_channels": None, "label_dim": 0}
_SHARED |= {"augment_dim": 0, "model_channels": 128, "channel_mult": [1, 2, 2, 2], "channel_mult_emb": 4}
_SHARED |= {"num_blocks": 4, "attn_resolutions": [16], "dropout": 0.1, "label_dropout": 0}
_SONG: dict[str, Any] = {"embedding_type": "positional", "channel_mult_noise": 1, "encoder_type": "standard"}
_SONG |= {"decoder_type": "standard", "resample_filter": [1, 1]}
_ADM: dict[str, Any] = {"model_channels": 192, "channel_mult": [1, 2, 3, 4], "num_blocks": 3}
_EDM2: dict[str, Any] = {"img_resolution": None, "img_channels": None, "label_dim": 0, **_ADM}
_EDM2 |= {"channel_mult_noise": None, "channel_mult_emb": None, "num_blocks": 3, "attn_resolutions": [16, 8]}
_EDM2 |= {"label_balance": 0.5, "concat_balance": 0.5, "resample_filter": [1, 1], "channels_per_head": 64}
_EDM2 |= {"dropout": 0.0, "res_balance": 0.3, "attn_balance": 0.3, "clip_act": 256}
_OPTIONS = {
    "UNet": _EDM2,
    "SongUNet": {**_SHARED, **_SONG},
    "DhariwalUNet": {**_SHARED, **_ADM, "attn_resolutions": [32, 16, 8]},
}
"""The arguments of their networks, in order, with what they are where a file does not say it."""


def _common(options: Mapping[str, Any]) -> tuple[Any, ...]:
    size, multipliers = options["img_resolution"], options["channel_mult"]
    levels = [n for n in range(len(multipliers)) if size >> n in options["attn_resolutions"]]
    sizes = (options["model_channels"], multipliers, options["num_blocks"], levels)
    return *sizes, options["dropout"], options["label_dim"] or None


def _fir(options: Mapping[str, Any]) -> list[float] | None:
    return None if list(options["resample_filter"]) == [1, 1] else list(options["resample_filter"])


def _magnitude(options: Mapping[str, Any]) -> MagnitudeUNet:
    """Our network for EDM2's."""
    base = options["model_channels"]
    features, embedding = (n and base * n for n in (options["channel_mult_noise"], options["channel_mult_emb"]))
    return MagnitudeUNet(
        options["img_channels"],
        *_common(options),
        head_channels=options["channels_per_head"],
        features=features,
        embedding=embedding,
        fir=_fir(options),
        balance=(options["res_balance"], options["attn_balance"]),
        label_balance=options["label_balance"],
        concat_balance=options["concat_balance"],
        clip=options["clip_act"],
    )


def _song(network: str, options: Mapping[str, Any], path: Path) -> SongUNet:
    """Our network for theirs."""
    if options["channel_mult_emb"] != 4:
        raise CheckpointError(f"{path} has channel_mult_emb={options['channel_mult_emb']}: only 4 is known here")
    own: dict[str, Any] = {"kind": "adm"}
    if network == "SongUNet":
        check_option(("positional", "fourier"), embedding_type=options["embedding_type"])
        own = {
            "fourier": 16.0 if options["embedding_type"] == "fourier" else None,
            "features": options["model_channels"] * options["channel_mult_noise"],
            "fir": _fir(options),
            "entrance": options["encoder_type"],
            "exit": options["decoder_type"],
        }
    return SongUNet(
        options["in_channels"],
        *_common(options),
        augment=options["augment_dim"] or None,
        out_channels=options["out_channels"],
        **own,
    )


_EMBEDDING = {"map_layer0": "inward", "map_layer1": "outward", "map_label": "classes", "map_augment": "augment"}
_BLOCK = {"norm0": "norm1", "conv0": "conv1", "affine": "modulate", "norm1": "norm2", "conv1": "conv2", "skip": "skip"}
_ATTENTION = {"norm2": "norm", "qkv": "qkv", "proj": "project"}


def _names(levels: int, size: int, blocks: int) -> Iterator[tuple[str, str]]:
    """Their name and ours of each layer."""
    yield from ((theirs, f"embedding.{ours}") for theirs, ours in _EMBEDDING.items())
    yield "map_noise", "embedding"
    yield f"enc.{size}x{size}_conv", "inward"

    def block(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
        yield from ((f"{theirs}.{a}", f"{ours}.{b}") for a, b in _BLOCK.items())

    def stage(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
        yield from block(theirs, f"{ours}.0")
        yield from ((f"{theirs}.{a}", f"{ours}.1.{b}") for a, b in _ATTENTION.items())

    for n in range(levels):
        at = f"enc.{size >> n}x{size >> n}"
        yield from block(f"{at}_down", f"down.{n}.resample")
        yield f"{at}_aux_skip", f"down.{n}.merge"
        yield f"{at}_aux_residual", f"down.{n}.merge.conv"
        for i in range(blocks):
            yield from stage(f"{at}_block{i}", f"down.{n}.stages.{i}")
    for n in range(levels):
        at = f"dec.{size >> (levels - 1 - n)}x{size >> (levels - 1 - n)}"
        for i in range(2):
            yield from stage(f"{at}_in{i}", f"middle.{i}")
        yield from block(f"{at}_up", f"up.{n}.resample")
        for i in range(blocks + 1):
            yield from stage(f"{at}_block{i}", f"up.{n}.stages.{i}")
        yield f"{at}_aux_norm", f"up.{n}.readout.0"
        yield f"{at}_aux_conv", f"up.{n}.readout.2"
    yield "out_norm", f"up.{levels - 1}.readout.0"
    yield "out_conv", f"up.{levels - 1}.readout.2"


_MAGNITUDE = {"conv_res0": "conv1", "emb_linear": "modulate", "conv_res1": "conv2", "conv_skip": "skip"}
_MAGNITUDE |= {"attn_qkv": "qkv", "attn_proj": "project"}


def _names_of_edm2(levels: int, size: int, blocks: int) -> Iterator[tuple[str, str]]:
    """The same for EDM2's."""
    yield from (("", ""), ("emb_fourier", "features"), ("emb_noise", "noise"), ("emb_label", "classes"))
    yield from ((f"enc.{size}x{size}_conv", "inward"), ("out_conv", "outward"))

    def block(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
        yield theirs, ours
        yield from ((f"{theirs}.{a}", f"{ours}.{b}") for a, b in _MAGNITUDE.items())

    for n in range(levels):
        down, up = size >> n, size >> (levels - 1 - n)
        yield from block(f"enc.{down}x{down}_down", f"shrink.{n - 1}")
        yield from block(f"dec.{up}x{up}_up", f"grow.{n - 1}")
        for i in range(blocks):
            yield from block(f"enc.{down}x{down}_block{i}", f"down.{n * blocks + i}")
        for i in range(blocks + 1):
            yield from block(f"dec.{up}x{up}_block{i}", f"up.{n * (blocks + 1) + i}")
        for i in range(2):
            yield from block(f"dec.{up}x{up}_in{i}", f"middle.{i}")


_LEAVES = {"emb_gain": "gain", "out_gain": "gain", "freqs": "frequencies"}


def _renamed(
    net: SongUNet | MagnitudeUNet,
    tensors: Mapping[str, Tensor],
    network: str,
    options: Mapping[str, Any],
    negate: bool,
) -> dict[str, Tensor]:
    """Their tensors by our names. Their q, k and v alternate, channel by channel of each head; EDM's frequencies are in
    cycles, EDM2's in radians; their filters are known. With `negate` the network's output changes sign.
    """
    sizes = len(options["channel_mult"]), options["img_resolution"], options["num_blocks"]
    names = dict((_names_of_edm2 if network == "UNet" else _names)(*sizes))
    found = {name: buffer for name, buffer in net.named_buffers() if name.endswith("kernel")}
    for key, tensor in tensors.items():
        layer, _, leaf = key.rpartition(".")
        name = f"{names.get(layer, layer)}.{_LEAVES.get(leaf, leaf)}".removeprefix(".")
        if leaf == "resample_filter":
            continue
        if leaf == "freqs" and network != "UNet":
            tensor = 2 * math.pi * tensor
        elif layer.endswith(".qkv"):
            heads = 1 if network == "SongUNet" else len(tensor) // (3 * 64)
            tensor = tensor.reshape(heads, -1, 3, *tensor.shape[1:]).movedim(2, 0).reshape(tensor.shape)
        elif negate and ".readout.2." in name:
            tensor = -tensor
        found[name] = tensor.float()
    return found


# ---- denoisers ----

Made = tuple[Denoiser, Callable[[int], Grid]]


def _karras(sde: SDE, low: float, high: float) -> Callable[[int], Grid]:
    """Their sampler's grid, between its own ends and the network's."""
    start, last = (float(sde.time_at(-math.log(sigma))) for sigma in (min(80.0, high), max(0.002, low)))
    return lambda steps: Grid.karras(sde, steps, rho=7.0, start=min(start, sde.t_max), last=max(last, sde.t_min))


def _edm(net: nn.Module, state: Mapping[str, Any]) -> Made:
    low, high = state.get("sigma_min", 0.0), state.get("sigma_max", math.inf)
    sde = EDMSDE(max(0.002, low), min(80.0, high))
    return EDMDenoiser(net, sde, sigma_data=state["sigma_data"]), _karras(sde, low, high)


def _vp(net: nn.Module, state: Mapping[str, Any]) -> Made:
    beta, last = state["beta_min"], state["M"] - 1
    sde = VPSDE(beta, beta + state["beta_d"], t_min=state["epsilon_t"])
    return EpsDenoiser(net, sde, time=lambda t: last * t), _karras(sde, state["sigma_min"], state["sigma_max"])


def _ve(net: nn.Module, state: Mapping[str, Any]) -> Made:
    sde = VESDE(state["sigma_min"], state["sigma_max"])
    denoiser = EpsDenoiser(net, sde, time=lambda t: (sde.sigma(t) / 2).log())
    return denoiser, _karras(sde, state["sigma_min"], state["sigma_max"])


def _iddpm(net: nn.Module, state: Mapping[str, Any]) -> Made:
    levels = state["_buffers"]["u"].double().flip(0)  # sigma / alpha at nodes 0 to M
    product = 1 / (1 + levels**2)
    chain = DDPMChain(1 - product[1:] / product[:-1])
    denoiser = LearnedRangeDenoiser(EpsDenoiser(SplitOutput(net), chain, time=chain.label))
    karras = _karras(chain.unrounded, float(levels[1]), float(levels[-1]))

    def grid(steps: int) -> Grid:
        sigmas = (-chain.half_log_snr(karras(steps).times[:-1])).exp()
        nodes = (sigmas[:, None] - levels).abs().argmin(1).unique_consecutive().double()
        return Grid(chain, torch.cat([nodes, nodes.new_zeros(1)]))

    return denoiser, grid


_DENOISERS: dict[str, Callable[[nn.Module, Mapping[str, Any]], Made]] = {
    "EDMPrecond": _edm,
    "Precond": _edm,
    "VPPrecond": _vp,
    "VEPrecond": _ve,
    "iDDPMPrecond": _iddpm,
}
