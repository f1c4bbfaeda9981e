"""Files of guided-diffusion, improved-diffusion and, preconditioned as EDM, of consistency models.

    theirs                                         ours
    timestep i = 0 .. T - 1                        node t = i + 1 of a `DDPMChain`; t = 0 is the data
    label i, or 1000 i / T (rescale_timesteps)     time=, of t - 1
    linear: betas of DDPM times 1000 / T           DDPMChain.linear(T, 0.1 / T, 20 / T)
    cosine, betas up to 0.999                      DDPMChain.cosine(T)
    2 C outputs: eps and v in [-1, 1]              eps, and Var[x_0 | x_t] by `LearnedRangeDenoiser`
    y                                              cond={"label": ...}
    low_res, resized inside                        cond={"image": ...}, resized before: bilinear, align_corners False
    timestep_respacing "250", "10,15", "ddim50"    .grid(250), .grid("10,15"), .grid("ddim50")
    clip_denoised, True by default                 Clip(model)

    EDM: net(c_in x, 250 ln sigma), in float32     EDMDenoiser on EDMSDE(0.002, 80), sigma_data 0.5; t = sigma

Images are in [-1, 1] in all of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scoresde.chain import DDPMChain
from scoresde.denoiser import Denoiser, EDMDenoiser, EpsDenoiser, X0Denoiser
from scoresde.errors import CheckpointError
from scoresde.grid import Grid
from scoresde.interop.adm import Flags, network, of_file
from scoresde.interop.formats import refuse
from scoresde.interop.model import Published, published
from scoresde.interop.reading import check_device, hashed, read_torch, state_of
from scoresde.schedules import EDMSDE
from scoresde.variance.learned_range import LearnedRangeDenoiser
from scoresde.variance.trunk import SplitOutput

__all__ = ["from_consistency_edm", "from_guided_diffusion", "respaced"]


def from_guided_diffusion(
    path: str | Path,
    flags: Mapping[str, Any] | str | None = None,
    *,
    respacing: int | str | None = None,
    data: Tensor | None = None,
    cond: Mapping[str, Any] | None = None,
    sha256: str | None = None,
    device: torch.device | str | None = None,
) -> Published:
    """A network of guided-diffusion or improved-diffusion, with its learned variance where it has one.

    >>> model = from_guided_diffusion("64x64_diffusion.pt")                                   # doctest: +SKIP
    >>> model = from_guided_diffusion("ema_0.9999_500000.pt", "--image_size 64 --num_channels 128 ...")
    ...                                                                                       # doctest: +SKIP
    >>> grid, cond = model.grid(250), {"label": torch.tensor([7, 7])}                         # doctest: +SKIP
    >>> sample(Clip(model), (2, *model.shape), DDPM(), grid=grid, cond=cond).x                # doctest: +SKIP

    What no error elsewhere tells of:

    - The defaults of the two toolkits differ in rescale_timesteps, so with other than 1000 steps it must be said.
    - A class-conditional network was never trained without a class, so every call needs its label.
    - Heads, their order and the schedule are in no file. Those that the flags do not say have the command line's
      defaults, and are listed in `about["assumed"]`; `data` puts them to a test.
    - The learned variance is that of a step, and of the chain's own steps or those of `respacing`. The mean and all
      that is made of it are the same on any grid; to sample with the variance as theirs does (`OptimalVariance`), or
      to bound the likelihood by it, use the grid that it is of.
    - Without learn_sigma the variance is a choice of the sampler's: DDPM(variance="beta") is theirs by default.

    Args:
        path: of the .pt file.
        flags: of the command line: as it was written there, or as a dict, or the name of a published model, a key of
            `scoresde.interop.adm.MODELS`. By default the file's own name is one.
        respacing: of the steps whose variance was learned, as for `respaced`; by default timestep_respacing of the
            flags, and all steps.
        data: images in [-1, 1], (B, C, H, W), on which the wiring is checked (`diagnose`).
        cond: of these, {"label": ...} for a class-conditional network.
        sha256: of the file, or its first 8 digits or more.
        device: where the network is to be.

    Raises:
        FileNotFoundError, CheckpointError: if there is no such file, it is another, holds anything but tensors, or is
            of another format or network than the flags say.
        ValueError: if the flags are not given, not theirs, or do not say what must be said.
    """
    check_device(device)
    told, tensors, about = _read(Path(path), flags, sha256, "guided-diffusion")
    T = told.diffusion_steps
    if T != 1000 and told.rescale_timesteps is None:
        raise ValueError(
            f"diffusion_steps={T} without rescale_timesteps, which tells the label t from 1000 t / {T}: the file does "
            "not say it. improved-diffusion's default is True, guided-diffusion's False"
        )
    if told.noise_schedule not in ("linear", "cosine"):
        raise ValueError(f"noise_schedule={told.noise_schedule!r}: expected 'linear' or 'cosine'")
    chain = DDPMChain.cosine(T) if told.noise_schedule == "cosine" else DDPMChain.linear(T, 0.1 / T, 20 / T)
    if any(name.endswith("qkv.weight") and tensor.ndim == 4 for name, tensor in tensors.items()):
        raise CheckpointError(
            f"{path} has attention as consistency models have it, with EDM's preconditioning: read it by "
            "from_consistency_edm"
        )
    net, channels = network(tensors, told, path, new_order=told.use_new_attention_order)
    net.to(device)
    adapter = X0Denoiser if told.predict_xstart else EpsDenoiser
    denoiser: Denoiser = adapter(
        SplitOutput(net) if told.learn_sigma else net,
        chain,
        time=Label(-1.0, 1000 / T) if told.rescale_timesteps else chain.label,
    )
    steps = told.timestep_respacing if respacing is None else respacing
    if told.learn_sigma:
        denoiser = LearnedRangeDenoiser(denoiser, grid=respaced(chain, steps) if steps else None)
    unseen = ["use_new_attention_order", "noise_schedule", "diffusion_steps", "predict_xstart"]
    about["assumed"] += [n for n in unseen if n not in told.given]
    about |= {
        "predicts": "x0" if told.predict_xstart else "eps",
        "sde": repr(chain),
        "variance": f"learned, of {steps or 'all'} steps" if told.learn_sigma else "the sampler's choice",
        "label": f"(t - 1) * {1000 / T:g}" if told.rescale_timesteps else "t - 1",
    }
    about["classes"] = net.condition_sizes.get("label")
    shape = (channels, told.image_size, told.image_size)
    return published(denoiser, shape, about, lambda n: respaced(chain, n), data=data, cond=cond)


def from_consistency_edm(
    path: str | Path,
    flags: Mapping[str, Any] | str | None = None,
    *,
    data: Tensor | None = None,
    cond: Mapping[str, Any] | None = None,
    sha256: str | None = None,
    device: torch.device | str | None = None,
) -> Published:
    """An EDM network of consistency models (edm_imagenet64_ema.pt, edm_bedroom256_ema.pt, edm_cat256_ema.pt).

    Their distilled and consistency-trained files (cd_*.pt, ct_*.pt) hold the same tensors and are no denoisers: they
    map x_t to the end of its path, not to the mean E[x_0 | x_t], and have another preconditioning. Nothing inside the
    file tells; those whose names say so are refused, and `data` shows the others.

    Their attention has the order (3, H, d) whatever use_new_attention_order says.

    Arguments and errors: as for `from_guided_diffusion`. attention_resolutions has 32,16,8 as its default there, and
    needs to be said here. `.grid(steps)` is theirs, `Grid.karras`, and their sampler clips D: Clip(model).
    """
    check_device(device)
    path = Path(path)
    if path.stem.startswith(("cd_", "ct_")) or (isinstance(flags, str) and flags.startswith(("cd_", "ct_"))):
        raise _no_denoiser(path, "its name")
    told, tensors, about = _read(path, flags, sha256, "consistency models' EDM")
    if told.training_mode.startswith("consistency"):
        raise _no_denoiser(path, f"training_mode={told.training_mode}")
    if any(name.endswith("qkv.weight") and tensor.ndim == 3 for name, tensor in tensors.items()):
        raise CheckpointError(
            f"{path} has attention as guided-diffusion has it, which predicts eps on a chain: read it by "
            "from_guided_diffusion"
        )
    net, channels = network(tensors, told, path, new_order=True)
    sde = EDMSDE(0.002, 80.0)
    denoiser = EDMDenoiser(net.to(device), sde, sigma_data=0.5, time=LogSigma(250.0))
    about |= {"predicts": "F", "sde": repr(sde), "label": "250 ln(sigma)", "sigma_data": 0.5}
    about["classes"] = net.condition_sizes.get("label")
    shape = (channels, told.image_size, told.image_size)
    return published(denoiser, shape, about, lambda n: Grid.karras(sde, int(n)), data=data, cond=cond)


def _no_denoiser(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is a consistency model by {why}: it maps x_t to the end of its path. It is no denoiser, whose mean "
        "E[x_0 | x_t] solvers, scores and likelihoods are made of, and is not supported"
    )


@dataclass(frozen=True)
class Label:
    """scale (t + shift)."""

    shift: float
    scale: float

    def __call__(self, t: Tensor) -> Tensor:
        return (t + self.shift) * self.scale


@dataclass(frozen=True)
class LogSigma:
    """scale ln(sigma), where t is sigma."""

    scale: float

    def __call__(self, t: Tensor) -> Tensor:
        return self.scale * t.log()


def respaced(chain: DDPMChain, steps: int | str) -> Grid:
    """The nodes that guided-diffusion keeps of a chain, then t = 0.

    Args:
        chain: of T steps.
        steps: K: "K" too. "K_1,K_2,..." gives each of equal parts of the chain, from the data on, so many, the first
            and the last of a part among them, the others rounded. "ddimK" has every i-th node from the first, for the
            smallest i that gives K of them, and does not start at T.

    Raises:
        ValueError: if there are not so many nodes; if "ddimK" has no whole stride that gives K; if a single step is
            wanted, for which theirs keeps node 1, where the data has no noise to speak of.
    """
    T, text = chain.steps, str(steps)
    if not re.fullmatch(r"(ddim)?\d+|\d+(,\d+)*", text):
        raise ValueError(f"steps={text!r}: expected their number, as 250, numbers of equal parts, '10,15', or 'ddim50'")
    if text.startswith("ddim"):
        K = int(text.removeprefix("ddim"))
        stride = next((i for i in range(1, T) if len(range(0, T, i)) == K), None)
        if stride is None:
            raise ValueError(f"{text}: no whole stride takes exactly {K} of {T} nodes; take {K} without ddim")
        kept = list(range(0, T, stride))
    else:
        parts, start, kept = [int(n) for n in text.split(",")], 0, []
        if parts == [1]:
            raise ValueError(
                "a single step would be that from node 1, where there is no noise: take Grid.strided(chain, 1)"
            )
        for i, K in enumerate(parts):
            size = T // len(parts) + (i < T % len(parts))
            if not 1 <= K <= size:
                raise ValueError(f"{text}: {K} steps of a part of {size} nodes")
            # They add the stride up and round the sum to even: in these very numbers.
            at, step = 0.0, (size - 1) / (K - 1) if K > 1 else 1.0
            for _ in range(K):
                kept.append(start + round(at))
                at += step
            start += size
    return Grid(chain, [float(n + 1) for n in sorted(set(kept), reverse=True)] + [0.0])


def _read(
    path: Path, flags: Mapping[str, Any] | str | None, sha256: str | None, kind: str
) -> tuple[Flags, dict[str, Tensor], dict[str, Any]]:
    """The flags, the tensors, and what is told of them."""
    refuse(path, "guided_diffusion")
    digest = hashed(path, sha256)
    told, name = of_file(path, flags)
    tensors = state_of(read_torch(path), path)
    about = {
        "format": kind,
        "files": {path.name: digest},
        "model": name,
        "flags": {n: value for n, value in asdict(told).items() if n != "given"},
        "assumed": [] if {"num_heads", "num_head_channels"} & {*told.given} else ["num_heads"],
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
    }
    return told, tensors, about
