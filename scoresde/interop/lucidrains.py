"""Files of denoising-diffusion-pytorch's Trainer, around a network that its library built.

Its Unet (linear attention, RMS norms, memory tokens) has no counterpart here, so it is handed in; from the file come
the weights, the schedule and what the network predicts.

    theirs                                          ours
    timestep i = 0 .. T - 1, the label              node t = i + 1 of a `DDPMChain`, label t - 1
    the buffer betas, float32                       DDPMChain(betas)
    objective pred_noise, pred_x0, pred_v           EpsDenoiser, X0Denoiser, VDenoiser
    sampling_timesteps S: int(linspace(-1, T-1))    .grid(S)
    auto_normalize                                  images are in [-1, 1] here

The objective is in no buffer, but the weight of each timestep's loss is, and with snr = alpha^2 / sigma^2 it is

    pred_noise  min(snr, g) / snr,    pred_x0  min(snr, g),    pred_v  min(snr, g) / (snr + 1),

g infinite or, as min_snr_gamma, above 1: where snr <= 1 the three are 1, snr and snr / (snr + 1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scoresde.chain import DDPMChain
from scoresde.checks import check_option
from scoresde.denoiser import EpsDenoiser, NetworkDenoiser, VDenoiser, X0Denoiser
from scoresde.errors import CheckpointError
from scoresde.grid import Grid
from scoresde.interop.formats import refuse
from scoresde.interop.model import Published, published
from scoresde.interop.reading import check_device, fill, hashed, read_torch, state_of

__all__ = ["from_lucidrains"]

ADAPTERS: dict[str, type[NetworkDenoiser]] = {
    "pred_noise": EpsDenoiser,
    "pred_x0": X0Denoiser,
    "pred_v": VDenoiser,
}


def from_lucidrains(
    path: str | Path,
    net: nn.Module,
    *,
    shape: Sequence[int] | None = None,
    objective: str | None = None,
    weights: Literal["ema", "model"] = "ema",
    data: Tensor | None = None,
    cond: Mapping[str, Any] | None = None,
    sha256: str | None = None,
    device: torch.device | str | None = None,
) -> Published:
    """A network of denoising-diffusion-pytorch.

    >>> net = denoising_diffusion_pytorch.Unet(dim=64, dim_mults=(1, 2, 4, 8))                 # doctest: +SKIP
    >>> model = from_lucidrains("results/model-10.pt", net, shape=(3, 128, 128))              # doctest: +SKIP

    What no error elsewhere tells of: the network's average is what their Trainer samples from, so it is what is taken;
    the state is in [-1, 1] (their samples are mapped to [0, 1] at the end, unless auto_normalize is False); a network
    with self_condition is called without an earlier estimate, as on the first of their steps.

    Args:
        path: of a model-N.pt.
        net: the Unet, of the options that it was trained with. It is changed: it gets the file's weights.
        shape: (C, H, W) of the images.
        objective: "pred_noise", "pred_x0" or "pred_v"; by default what the weights of the loss in the file tell.
        weights: the average's, "ema", or the network's as it was trained, "model".
        data: images in [-1, 1], on which the wiring is checked (`diagnose`).
        cond, sha256, device: as for `from_guided_diffusion`.

    Raises:
        FileNotFoundError, CheckpointError: if there is no such file, it is another, holds anything but tensors, is no
            Trainer's, or of another network; if the file does not tell the objective, or tells another.
        ValueError: if objective or weights is none of those.
    """
    check_device(device)
    path = Path(path)
    check_option(("ema", "model"), weights=weights)
    check_option((*ADAPTERS, None), objective=objective)
    refuse(path, "lucidrains")
    digest = hashed(path, sha256)
    file = read_torch(path)
    prefix = "ema_model." if weights == "ema" else ""
    found = file.get(weights) if isinstance(file, dict) else None
    if not isinstance(found, dict) or f"{prefix}betas" not in found:
        raise CheckpointError(f"{path} has no {weights!r} with betas, as their Trainer writes it")
    own = {name: tensor for name, tensor in found.items() if str(name).startswith(prefix)}
    state = {name.removeprefix(prefix): tensor for name, tensor in state_of(own, path, repr(weights)).items()}
    chain = DDPMChain(state["betas"])
    told = _objective(chain, state.get("loss_weight"))
    if (objective or told) is None:
        raise CheckpointError(f"{path} does not tell what its network predicts: give objective=, {list(ADAPTERS)}")
    if objective is not None and told not in (None, objective):
        raise CheckpointError(f"{path} was trained with the loss of {told}, not of {objective}")
    predicts = objective or str(told)
    fill(net, {name.removeprefix("model."): t for name, t in state.items() if name.startswith("model.")}, path)
    about = {
        "format": "denoising-diffusion-pytorch",
        "files": {path.name: digest},
        "weights": weights,
        "step": file.get("step"),
        "version": str(file.get("version")),
        "parameters": sum(p.numel() for p in net.parameters()),
        "predicts": predicts,
        "sde": repr(chain),
        "label": "t - 1",
        "assumed": [*(["objective"] if told is None else []), "images in [-1, 1]"],
    }
    if getattr(net, "self_condition", False):
        about["assumed"] += ["no self-conditioning"]
    denoiser = ADAPTERS[predicts](net.to(device), chain, time=chain.label)
    return published(denoiser, shape, about, lambda steps: _grid(chain, int(steps)), data=data, cond=cond)


def _objective(chain: DDPMChain, weight: Tensor | None) -> str | None:
    """What the weights of the loss tell, (T,), or None."""
    if weight is None:
        return None
    snr = (2 * chain.half_log_snr(torch.arange(1, chain.steps + 1, dtype=torch.float64))).exp()
    noisy = snr <= 1
    weight, snr = weight.double()[noisy], snr[noisy]
    expected = {"pred_noise": torch.ones_like(snr), "pred_x0": snr, "pred_v": snr / (snr + 1)}
    fits = [name for name, w in expected.items() if len(w) and torch.allclose(weight, w, rtol=1e-3, atol=1e-4)]
    return fits[0] if len(fits) == 1 else None


def _grid(chain: DDPMChain, steps: int) -> Grid:
    """Their DDIM's times: int(linspace(-1, T - 1)), in float32 and cut, of nodes counted from 0."""
    times = torch.linspace(-1, chain.steps - 1, steps + 1).int().flip(0)
    return Grid(chain, times.double() + 1)
