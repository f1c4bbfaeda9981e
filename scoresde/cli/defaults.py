"""What a configuration leaves open, chosen for its data and the device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from scoresde.cli.config import SECTIONS, RunConfig, check_sections, section
from scoresde.data import Captions, TrainingData
from scoresde.processes import sde_of
from scoresde.training.latents import LatentData
from scoresde.training.model import ModelConfig, sizes_of
from scoresde.training.weights import LogNormalTimes

__all__ = ["CHOSEN", "chosen", "completed"]

_WEIGHTING = {"eps": "simple", "score": "simple", "velocity": "velocity", "edm": "edm"}
CHOSEN = {
    "model.network",
    "model.predicts",
    "loss.weighting",
    "loss.times",
    "train.steps",
    "train.batch_size",
    "train.lr",
}
"""Entries that `completed` chooses, whatever the dataclass's own default."""

_COST = ("model.network", "model.preset", "model.options.patch", "train.steps", "train.batch_size", "train.lr")

_LR = {8: 1e-3, 28: 5e-4, 32: 2e-4, 64: 1e-4}


def completed(
    settings: Mapping[str, Mapping[str, Any]], data: TrainingData | LatentData, cpu: bool = False
) -> RunConfig:
    """A configuration with what it leaves open chosen for the data and the device:

    - the network: a U-Net of the preset nearest in size to images, an MLP for vectors, with the data's channels, axes,
      classes and conditions; on a CPU a small preset, in patches that leave 16 positions an axis or few more;
    - what it predicts: what is usual for the SDE (`SDE.customary_prediction`); the time label, and sigma_data from the
      data;
    - the loss that goes with it: min-SNR for v and x0, EDM's with its log-normal times, in the unit of the levels, or
      the plain one;
    - steps of 64 items (128 for the preset of 32 pixels) that show each item 1000 times, 2000 to 20,000 of them; for
      images on a CPU 200 times, 1000 to 5000; the learning rate by the network's size.

    Args:
        settings: by section; see `RunConfig`.
        data: what `settings["data"]` says, or their latents.
        cpu: whether it is to be trained on a CPU.

    Raises:
        ValueError: as `RunConfig.of`; if the network's options contradict the data.
    """
    check_sections(settings)
    found = {name: dict(settings.get(name, {})) for name in SECTIONS}
    model, train, loss = found["model"], found["train"], found["loss"]
    shape = data.shape
    if not shape:
        raise ValueError(f"the data are {len(data)} numbers: expected items of one axis or more, of shape (N, 1) say")
    network = model.setdefault("network", "mlp" if len(shape) == 1 else "unet")
    section(ModelConfig, "model", model)  # each value of its kind, before it is looked at
    gridded = network not in ("mlp", "set")
    small, options = cpu and gridded, dict(model.get("options", {}))
    if gridded:
        if small and "preset" not in model and (patch := _patch(shape[1:])) > 1:
            options.setdefault("patch", patch)
        model.setdefault("preset", _preset(max(shape[1:], default=0), small))
    _read(found, data.told if isinstance(data, LatentData) else data, small)
    for key, value in {**_about(network, shape, data), **_sizes(model)}.items():
        if options.setdefault(key, value) != value:
            raise ValueError(f"model.options.{key} = {options[key]!r}, but the data's is {value!r}: leave it out")
    model["options"] = options
    sde = sde_of(model.setdefault("sde", "vp"), model.get("sde_options"))
    predicts = model.setdefault("predicts", sde.customary_prediction)
    if predicts == "edm":
        model.setdefault("sigma_data", float(f"{data.std():.3g}"))
    elif sde.t_max <= 1:
        model.setdefault("time_scale", 999.0)
    loss.setdefault("weighting", _WEIGHTING.get(predicts, "min-snr"))
    loss.setdefault("times", "log-normal" if loss["weighting"] == "edm" else "uniform")
    if loss["times"] == "log-normal":
        loss.setdefault("mean", LogNormalTimes.mean + math.log(sde.data_scale))
    preset = model.get("preset", 8)
    train.setdefault("batch_size", 128 if preset == 32 else 64)
    if "steps" not in train:
        times, fewest, most = (200, 1000, 5000) if small else (1000, 2000, 20_000)
        batches = len(data) / train["batch_size"] if isinstance(train["batch_size"], int) else 1
        train["steps"] = 100 * round(min(max(times * batches, fewest), most) / 100)
    train.setdefault("lr", _LR.get(preset, 2e-4))
    train.setdefault("evaluate_every", 1000)
    return RunConfig.of(found)


def chosen(settings: Mapping[str, Mapping[str, Any]], config: RunConfig) -> list[str]:
    """What was left open of that which decides how long a run takes, as --set would say it."""
    found: Any = config.to_dict()
    said = []
    for name in _COST:
        value, given = found, settings
        for key in name.split("."):
            value, given = value.get(key, {}), given.get(key, {}) if isinstance(given, Mapping) else {}
        if value != {} and given == {}:
            said.append(f"{name}={value}")
    return said


def _patch(axes: tuple[int, ...]) -> int:
    """The patch that divides every axis, and of these the nearest to what the size wants."""
    size = max(axes, default=0)
    wanted = 1 if size <= 16 else 2 if size <= 48 else 4
    dividing = [patch for patch in range(1, 2 * wanted) if not any(n % patch for n in axes)]
    return min(dividing, key=lambda patch: abs(math.log(patch / wanted)))


def _preset(size: int, small: bool) -> int:
    if small:
        return 8 if size <= 48 else 28
    return 8 if size <= 12 else 28 if size <= 28 else 32 if size <= 48 else 64


def _read(found: dict[str, dict[str, Any]], data: TrainingData, small: bool) -> None:
    """Where there are captions, what reads them: their tokenizer is kept, and an encoder made for it.

    Raises:
        ValueError: if the network takes none.
    """
    captions = next((condition for condition in data.conditions if isinstance(condition, Captions)), None)
    if captions is None:
        return
    model, words = found["model"], captions.tokenizer.words
    if model["network"] == "mlp":
        raise ValueError("captions are read by the attention of a U-Net or a DiT: the items are vectors")
    found["data"]["tokens"] = words
    encoders = dict(model.get("encoders", {}))
    encoder: dict[str, Any]
    if words.startswith("hf:"):
        encoder = {"network": "pretrained-text", "options": {"name": words.removeprefix("hf:")}, "frozen": True}
    else:
        encoder = {"network": "text", "options": {"width": 64 if small else 256, "depth": 2 if small else 4}}
    given = dict(encoders.get("text", {}))
    own = {"length": captions.length, **({} if words.startswith("hf:") else {"tokens": words})}
    encoders["text"] = {**encoder, **given, "options": {**encoder["options"], **own, **given.get("options", {})}}
    model["encoders"] = encoders


def _sizes(model: Mapping[str, Any]) -> dict[str, int]:
    """The options of a network that what reads texts settles."""
    text = model.get("encoders", {}).get("text")
    return {} if text is None else sizes_of(text)


def _about(network: str, shape: tuple[int, ...], data: TrainingData | LatentData) -> dict[str, Any]:
    """The options of a network that the data settle."""
    if network == "set" and len(shape) != 2:
        raise ValueError(f"model.network = 'set' is for sets of points (N, d): an item has the shape {tuple(shape)}")
    if network == "set":
        return {"channels": shape[1], **data.network_options}
    found: dict[str, Any] = {"event_shape": list(shape)} if network == "mlp" else {"image_channels": shape[0]}
    if network != "mlp" and len(shape) != 3:
        found["dims"] = len(shape) - 1
    return found | data.network_options
