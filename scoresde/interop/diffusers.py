"""Networks of diffusers, the Hugging Face library: a pipeline's folder, a pipeline, or a network with its scheduler.

What the scheduler's configuration says is read by `scoresde.interop.diffusers_schedulers`, which has the dictionary of
conventions and the traps; how its networks are called stands in `scoresde.interop.diffusers_networks`. diffusers itself
is needed to make the network of a folder, and for nothing else.

Files are read by diffusers' own loader, of safetensors, sharded and in half precision too, or of a .bin that holds
tensors alone (weights_only); no code of a folder is run.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scoresde.checks import ArgumentError
from scoresde.codecs import AutoencoderCodec
from scoresde.denoiser import Denoiser
from scoresde.errors import CheckpointError, some
from scoresde.interop.diffusers_files import json_object, names_of, weights_of
from scoresde.interop.diffusers_kinds import completed
from scoresde.interop.diffusers_networks import (
    Called,
    CalledPair,
    check_kind,
    check_whole_network,
    event_shape,
    latent_scales,
)
from scoresde.interop.diffusers_schedulers import Schedule, schedule_of
from scoresde.interop.formats import refuse
from scoresde.interop.model import Published, published
from scoresde.interop.reading import check_device, check_digest, hashed
from scoresde.variance import LearnedRangeDenoiser
from scoresde.wrappers import Latent

__all__ = ["from_diffusers", "library"]

_MORE = ("vqvae", "movq", "vqgan", "prior", "decoder", "controlnet", "motion_adapter", "adapter", "low_res_scheduler")
_PARTS = {"network": ("unet", "transformer"), "autoencoder": ("vae",)}


def library() -> Any:
    """diffusers, imported; where torchvision is broken, as if there were none, for its models do not import then.

    Raises:
        ImportError: if it is not installed, saying what to do.
    """
    broken = False
    if "torchvision" not in sys.modules and importlib.util.find_spec("torchvision"):
        try:
            importlib.import_module("torchvision")
        except Exception:  # an operator that its torch does not have, say
            broken = True
            sys.modules["torchvision"] = None  # type: ignore[assignment]
    try:
        diffusers = importlib.import_module("diffusers")
        if broken:  # it may have been imported before, and has looked then
            flags: Any = importlib.import_module("diffusers.utils.import_utils")
            flags._torchvision_available = False
        diffusers.UNet2DModel  # noqa: B018 - its models are imported when one is first asked for
    except ModuleNotFoundError as error:
        if error.name != "diffusers":
            raise
        raise ImportError("this needs diffusers, which is not installed: pip install 'scoresde[interop]'") from error
    finally:
        if broken:
            del sys.modules["torchvision"]
    return diffusers


def from_diffusers(
    source: Any,
    *,
    data: Tensor | None = None,
    cond: Mapping[str, Any] | None = None,
    sha256: str | Mapping[str, str] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    shape: Sequence[int] | None = None,
    clip: bool = True,
    mu: float | None = None,
    variant: str | None = None,
) -> Published:
    """A network of diffusers as a denoiser, with everything that its files say.

    Args:
        source: a pipeline's folder, with model_index.json or with the folders unet or transformer, scheduler and vae;
            a pipeline; or a pair (network, scheduler), the network a folder, a module of theirs or any callable
            net(x, time, **cond), the scheduler an object, a folder, a file or its configuration as a dict.
        data: items as the network was trained on, (B, ...): images in [-1, 1] mostly. `diagnose` is run on them.
        cond: conditions for that.
        sha256: of the weights: of the one file, or by the names that `about["files"]` has.
        device, dtype: of the networks; as they are stored by default.
        shape: of an item of the diffusion, where the configuration has no sample_size, or another size is wanted.
        clip: whether the mean is clipped or thresholded where the scheduler's configuration says so; their DDIM is then
            `RawEps(DDIM())`. With False, for likelihoods say, it is the network's own. Guidance goes inside of it:
            clip=False, and Clip(ClassifierFree(model, 3.0)), as their pipelines have it.
        mu: of a flow's dynamic shift (`use_dynamic_shifting`), which depends on the size; by default that of `shape`.
        variant: of the files' names: "fp16" for diffusion_pytorch_model.fp16.safetensors. By default the plain file,
            or, where there is none, the only other one.

    A network of 2 C channels has the learned variance of improved DDPM, as Var[x_0 | x_t], where the configuration says
    variance_type="learned_range" (`LearnedRangeDenoiser`); else its prediction's channels are taken.

    The result's `grid(steps)` has their times, `about` what was read. With an autoencoder it is `Latent`: samples are
    images. A pipeline with one tokenizer and text encoder has `embed(texts)`, the condition of texts:

    >>> model = from_diffusers("stable-diffusion-2-1-base")                                     # doctest: +SKIP
    >>> guided = ClassifierFree(model, 7.5, null=model.embed([""]))                             # doctest: +SKIP
    >>> x = sample(guided, (1, *model.shape), UniPC(), nfe=20, cond=model.embed(["a cat"])).x   # doctest: +SKIP

    Raises:
        ImportError: if a network is to be made of a folder, and there is no diffusers.
        FileNotFoundError: if there is no such folder or file.
        CheckpointError: if a file is not the one that sha256 names, is damaged, holds more than tensors or is LoRA's.
        ArgumentError: on a class, key or value that is not known here: nothing is guessed.
    """
    check_device(device)
    parts = _parts_of(source)
    files: dict[str, str] = {}
    scheduler, pipeline = _configuration(parts["scheduler"]), parts.get("pipeline")
    completed(scheduler)  # what it does not know is said before the network is read
    net, config = _network(parts["network"], device, dtype, variant, files)
    size = event_shape(config.get("_class_name", ""), config) if config and shape is None else shape
    if mu is None and scheduler.get("use_dynamic_shifting") and size is not None:
        mu = _mu(scheduler, size, config)
    schedule = schedule_of(scheduler, mu=mu, own_sigmas=(pipeline or "").startswith("Flux"))
    learned = schedule.config.get("variance_type") == "learned_range"
    denoiser: Denoiser = schedule.adapter((CalledPair if learned else Called)(net, schedule.sign, config))
    if learned:
        denoiser = LearnedRangeDenoiser(denoiser)
    denoiser = schedule.clipped(denoiser) if clip else denoiser
    about = _about(schedule, clip, pipeline, config, net)
    about["variance"] = _variance(schedule, config)
    if (autoencoder := parts.get("autoencoder")) is not None:
        vae, vae_config = _network(autoencoder, device, dtype, variant, files, "autoencoder")
        if vae_config.get("force_upcast") and next(vae.parameters()).dtype == torch.float16:
            vae = vae.float()  # its activations overflow in half precision, as its configuration says
        denoiser = Latent(denoiser, _codec(vae, vae_config))
        about["autoencoder"] = {key: vae_config.get(key) for key in ("_class_name", "scaling_factor", "shift_factor")}
    _check_files(files, sha256)
    model = published(denoiser, size, about | {"files": files}, schedule.grid, data=data, cond=cond)
    if (text := parts.get("text")) is not None:
        model.embed = _embedding(*text)
    return model


def _about(schedule: Schedule, clip: bool, pipeline: str | None, config: Mapping[str, Any], net: Any) -> dict[str, Any]:
    written = {
        k: v for k, v in schedule.config.items() if v is not None and k not in ("trained_betas", *schedule.implied)
    }
    about: dict[str, Any] = {
        "format": "diffusers",
        "pipeline": pipeline,
        "network": config.get("_class_name", type(net).__name__),
        "predicts": schedule.predicts if schedule.sign == 1 else f"-{schedule.predicts}",
        "sde": repr(schedule.sde),
        "scheduler": {k: v for k, v in written.items() if not isinstance(v, float) or math.isfinite(v)},
        "ignored": {key: repr(value) for key, value in schedule.ignored.items()},
        "clipped": schedule.clips and clip,
    }
    if (classes := config.get("num_embeds_ada_norm") or config.get("num_class_embeds")) is not None:
        about["classes"] = classes
    if isinstance(net, nn.Module):
        about["parameters"] = sum(p.numel() for p in net.parameters())
    return about


def _variance(schedule: Schedule, config: Mapping[str, Any]) -> str:
    """What is done of the channels of a learned variance."""
    said = schedule.config.get("variance_type")
    if said == "learned_range":
        return "learned, of all steps of the chain"
    if said == "learned" or config.get("out_channels") == 2 * config.get("in_channels", 0) > 0:
        return f"further channels are left out: variance_type is {said!r}, and only 'learned_range' tells what they are"
    return "the sampler's choice"


# ---- what a source is made of ----


def _parts_of(source: Any) -> dict[str, Any]:
    """Network, scheduler, and where there are any autoencoder, pipeline's name and (tokenizer, text encoder)."""
    if isinstance(source, tuple | list):
        if len(source) != 2:
            raise ArgumentError(f"source has {len(source)} parts: ", "expected (network, scheduler)")
        return {"network": source[0], "scheduler": source[1]}
    if isinstance(source, str | Path):
        return _folder(Path(source))
    if not hasattr(source, "components"):
        raise TypeError(
            f"source is {type(source).__name__}: expected a folder, a pipeline, or the pair (network, scheduler)"
        )
    parts = dict(source.components)
    found: dict[str, Any] = {"pipeline": type(source).__name__, "scheduler": parts.get("scheduler")}
    for part, names in _PARTS.items():
        found[part] = next((parts[name] for name in names if parts.get(name) is not None), None)
    _check_parts(found, {name: type(part).__name__ for name, part in parts.items() if part is not None})
    encoders = [name for name in parts if name.startswith("text_encoder") and parts[name] is not None]
    if encoders == ["text_encoder"] and parts.get("tokenizer") is not None:
        found["text"] = (parts["tokenizer"], parts["text_encoder"])
    return found


def _folder(folder: Path) -> dict[str, Any]:
    if folder.exists():
        refuse(folder, "diffusers")
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: there is no such folder (nothing is downloaded here: `huggingface-cli download NAME`)"
        )
    index = json_object(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    pipeline = index.get("_class_name")
    entries = {name: entry for name, entry in index.items() if isinstance(entry, list) and name[:1] != "_"}
    classes = {name: entry[-1] for name, entry in entries.items() if entry and entry[-1] is not None}
    for name in ("scheduler", *(name for names in _PARTS.values() for name in names)):
        if name in classes and entries[name][0] != "diffusers":
            raise ArgumentError(
                f"{folder}: ", f"{name} is of {entries[name][0]}, code of its own, which is not run here"
            )
    if not isinstance(pipeline, str | None) or index.get("trust_remote_code"):
        raise ArgumentError(f"{folder}: ", f"a custom pipeline, {pipeline}: its code is not run here")
    if lora := sorted(path.name for path in folder.glob("*lora*.safetensors")):
        raise CheckpointError(f"{folder} has LoRA weights, {some(lora)}, which are not supported: fuse them first")
    found: dict[str, Any] = {"pipeline": pipeline}
    for part, names in _PARTS.items():
        found[part] = next((folder / name for name in names if (folder / name).is_dir()), None)
    if found["network"] is None and (folder / "config.json").is_file():
        found["network"] = folder
    found["scheduler"] = folder / "scheduler" if (folder / "scheduler").is_dir() else None
    _check_parts(found, classes)
    return found


def _check_parts(found: Mapping[str, Any], classes: Mapping[str, str]) -> None:
    """Raises ArgumentError if a part is missing, or one that is not known would stand between x and the data."""
    for part in ("network", "scheduler"):
        if found.get(part) is None:
            names = _PARTS.get(part, (part,))
            raise ArgumentError(
                f"there is no {part}: ", f"expected {' or '.join(names)}; {some(sorted(classes))} found"
            )
    for name, kind in classes.items():
        if name in _MORE or name.startswith(("unet_", "transformer_")):
            raise ArgumentError(
                f"the pipeline has {name}, {kind}: ",
                "more than a network and an AutoencoderKL. Give the pair (network, scheduler)",
            )


def _configuration(scheduler: Any) -> Mapping[str, Any]:
    """A scheduler's configuration."""
    if isinstance(scheduler, str | Path):
        path = Path(scheduler)
        return json_object(path / "scheduler_config.json" if path.is_dir() else path)
    if isinstance(scheduler, Mapping):
        return scheduler
    config = getattr(scheduler, "config", None)
    if not isinstance(config, Mapping):
        raise TypeError(f"scheduler is {type(scheduler).__name__}: expected one of diffusers, a file, or a dict")
    return {**config, "_class_name": type(scheduler).__name__}


def _mu(config: Mapping[str, Any], shape: Sequence[int], network: Mapping[str, Any]) -> float:
    """mu of an image's tokens: linear between base_shift at base_image_seq_len and max_shift at max_image_seq_len."""
    patch = 2 if network.get("_class_name") == "FluxTransformer2DModel" else network.get("patch_size", 2)
    tokens = math.prod(int(n) // patch for n in shape[1:])
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    least, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return float(least + (most - least) * (tokens - low) / (high - low))


# ---- networks ----


def _network(
    source: Any,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    variant: str | None,
    files: dict[str, str],
    part: str = "network",
) -> tuple[Any, dict[str, Any]]:
    """The module or callable, and its configuration if it is of diffusers; one that was given stays as it is."""
    if isinstance(source, str | Path):
        source = _loaded(Path(source), dtype, variant, files, part)
    config = {}
    if isinstance(source, nn.Module) and type(source).__module__.split(".")[0] == "diffusers":
        config = {**dict(source.config), "_class_name": type(source).__name__}  # type: ignore[arg-type]
    if part == "autoencoder":
        _check_autoencoder(config.get("_class_name") or type(source).__name__)
    if part == "network" and config:
        check_whole_network(source, config["_class_name"], config)
    if not callable(source):
        raise TypeError(f"network is {type(source).__name__}: expected a folder, a module or a callable")
    if isinstance(source, nn.Module):
        moved: dict[str, Any] = {"device": device, "dtype": dtype}
        source = source.to(**{name: value for name, value in moved.items() if value is not None})
    return source, config


def _check_autoencoder(kind: object) -> None:
    if kind != "AutoencoderKL":
        raise ArgumentError(
            f"the autoencoder is {kind}: ",
            "AutoencoderKL is read. Give the pair (network, scheduler), which is of latents",
        )


def _loaded(
    folder: Path, dtype: torch.dtype | None, variant: str | None, files: dict[str, str], part: str
) -> nn.Module:
    """The network of a folder with config.json, by diffusers' loader, whose class is known before it is made."""
    config = json_object(folder / "config.json") if (folder / "config.json").is_file() else {}
    if (kind := config.get("_class_name")) is None:
        raise FileNotFoundError(f"{folder}: there is no config.json with a _class_name in it")
    (_check_autoencoder if part == "autoencoder" else check_kind)(kind)
    if config.get("quantization_config"):
        raise CheckpointError(f"{folder} is quantized, as quantization_config says: save it as it was before")
    diffusers = library()
    variant, paths = weights_of(folder, variant)
    for path in paths:
        files[str(Path(folder.name) / path.name)] = hashed(path)
    cls, safe = getattr(diffusers, kind), paths[0].suffix == ".safetensors"
    if other := [key for key in config if key[:1] != "_" and key not in signature(cls.__init__).parameters]:
        warnings.warn(f"{folder} has {some(other)} in its config.json, which {kind} does not know", stacklevel=4)
    names, stored = names_of(paths)
    if deep := [f"{key}={n}" for key, n in config.items() if "layers" in key and isinstance(n, int) and n > len(names)]:
        raise CheckpointError(f"{folder} says {some(deep)} in its config.json, and has {len(names)} tensors")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            net, told = cls.from_pretrained(
                folder,
                torch_dtype=dtype or stored,
                variant=variant,
                use_safetensors=safe,
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as error:  # whatever its loader does on a configuration or file that is none
        raise CheckpointError(
            f"{folder}: diffusers {diffusers.__version__} makes no {kind} of it: {type(error).__name__}: {error}"
        ) from error
    wrong = [
        f"{what[:-5]} {some(sorted(told[what]))}" for what in ("missing_keys", "unexpected_keys") if told.get(what)
    ]
    if wrong or told.get("mismatched_keys"):  # theirs draws what is missing at random
        wrong += [f"{name} of another shape" for name, *_ in told.get("mismatched_keys") or ()]
        raise CheckpointError(f"{folder} holds another network than its config.json says: {', '.join(wrong)}")
    made: nn.Module = net.requires_grad_(False)
    return made


def _check_files(files: Mapping[str, str], sha256: str | Mapping[str, str] | None) -> None:
    """Raises CheckpointError unless the files are those that sha256 names."""
    if sha256 is None:
        return
    given = dict.fromkeys(files, sha256) if isinstance(sha256, str) else dict(sha256)
    if isinstance(sha256, str) and len(files) != 1:
        raise ArgumentError(
            f"sha256 is one, and there are {len(files)} files, {some(list(files))}: give a dict by name"
        )
    for name, digest in given.items():
        if name not in files:
            raise ArgumentError(f"sha256 names {name}, ", f"which was not read: {some(list(files))} were")
        check_digest(name, files[name], digest)


# ---- autoencoder and text ----


class _Encoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae: Any = vae

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = self.vae.encode(x).latent_dist
        return found.mean, found.std


class _Decoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae: Any = vae

    def forward(self, m: Tensor) -> Tensor:
        out: Tensor = self.vae.decode(m).sample
        return out


def _codec(vae: nn.Module, config: Mapping[str, Any]) -> AutoencoderCodec:
    scale, shift = latent_scales(config)
    return AutoencoderCodec(_Encoder(vae), _Decoder(vae), scale=scale, shift=shift)


def _embedding(tokenizer: Any, encoder: nn.Module) -> Callable[[Sequence[str]], dict[str, Tensor]]:
    """Texts to the condition of a network that was trained on one encoder's last states, padded to its length."""

    @torch.no_grad()
    def embed(texts: Sequence[str]) -> dict[str, Tensor]:
        length = tokenizer.model_max_length
        tokens = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        device = next(encoder.parameters()).device
        return {"encoder_hidden_states": encoder(tokens.input_ids.to(device))[0]}

    return embed
