"""Trained denoisers, built anew from what their checkpoints say of them."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import torch
from torch import nn

from scoresde.categorical import CategoricalDenoiser
from scoresde.denoiser import NetworkDenoiser, check_denoiser
from scoresde.errors import CheckpointError
from scoresde.training.folder import Checkpoint, newest
from scoresde.training.identity import identity
from scoresde.training.in_words import CategoricalConfig, ModelConfig, sizes_of
from scoresde.training.step import Trainable
from scoresde.training.whole_files import weights_file

__all__ = [
    "CategoricalConfig",
    "ModelConfig",
    "check_model",
    "load",
    "load_categorical",
    "load_ema",
    "loaded",
    "opened",
]
__all__ += ["sizes_of"]


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
    denoiser = built(found, average, device)
    if not isinstance(denoiser, NetworkDenoiser):
        raise CheckpointError(
            f"{found.path} is of kind 'categorical', {denoiser!r}: scoresde.training.load_categorical reads it"
        )
    return denoiser


def built(
    found: Checkpoint, average: int | None, device: torch.device | str = "cpu"
) -> NetworkDenoiser | CategoricalDenoiser:
    """A checkpoint's denoiser, of the kind that its words are of."""
    name = weights_file(average)
    if found.manifest["model"] is None:
        raise CheckpointError(
            f"{found.path} does not say what the model is, the Trainer having been given no model=ModelConfig(...): "
            "build the denoiser as for training, and call scoresde.training.load_ema(path, denoiser)"
        )
    try:
        words = found.manifest["model"]
        kind = CategoricalConfig if "process" in words else ModelConfig
        denoiser: NetworkDenoiser | CategoricalDenoiser = kind.of(words).build()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{found.path} describes a model that this version cannot build: {error}") from error
    assert isinstance(denoiser.net, nn.Module)
    found.check(identity(denoiser), whole=False)
    found.weights(name, denoiser.net)
    denoiser.net.to(device).eval().requires_grad_(False)
    return denoiser


def load_categorical(
    path: str | Path | Checkpoint, average: int | None = 0, device: torch.device | str = "cpu"
) -> CategoricalDenoiser:
    """A trained denoiser of whole states, as `load`: of a run whose `model` was a `CategoricalConfig`.

    Raises:
        FileNotFoundError, CheckpointError: as `load`; if the run is of another kind, which its manifest names.
    """
    denoiser = built(opened(path, weights_file(average)), average, device)
    if not isinstance(denoiser, CategoricalDenoiser):
        raise CheckpointError(f"{path} is the run of {denoiser!r}: scoresde.training.load reads it")
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


def check_model(model: ModelConfig | CategoricalConfig, denoiser: Trainable) -> None:
    """Raises ValueError if the words are of another denoiser."""
    with torch.device("meta"):
        net = model.net()
    assert isinstance(denoiser.net, nn.Module)
    theirs, ours = identity(model.around(net)), identity(denoiser)
    if different := [
        f"{key}: {value} in words, {ours.get(key)} given" for key, value in theirs.items() if value != ours.get(key)
    ]:
        raise ValueError("model= describes another denoiser (model.build() makes its own). " + "; ".join(different))
