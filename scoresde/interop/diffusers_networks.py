"""diffusers' networks by their common call, net(x, timestep=, ...).sample, and its autoencoders.

theirs                                    ours
UNet1DModel, UNet2DModel                  net(x, time)
UNet2DConditionModel                      cond: encoder_hidden_states, added_cond_kwargs (nested), ...
DiTTransformer2DModel                     cond: class_labels, or label; the class after the last is none
PixArt, SD3                               cond: encoder_hidden_states, encoder_attention_mask, pooled_projections, ...
Flux                                      its label is t itself; x is packed here, 2 x 2 of C channels to 4 C
AutoencoderKL                             z = scaling_factor (m - shift_factor), or standardised by latents_mean, _std
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from scoresde.checks import ArgumentError, one_of
from scoresde.errors import some

__all__ = [
    "NETWORKS",
    "Called",
    "CalledPair",
    "check_kind",
    "check_whole_network",
    "event_shape",
    "latent_scales",
    "pack",
    "unpack",
]

NETWORKS = (
    "UNet1DModel",
    "UNet2DModel",
    "UNet2DConditionModel",
    "DiTTransformer2DModel",
    "PixArtTransformer2DModel",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
)
"""Classes whose call and time label are known here."""


class Called(nn.Module):
    """A network as `scoresde` calls it: net(x, time, **cond), a tensor of the shape of x.

    Args:
        net: a module of diffusers, called with timestep= and whose output object has `.sample`; or any other callable,
            called with (x, time) by position.
        sign: of its output.
        config: of the module, a mapping; empty for others.

    Attributes:
        condition_sizes: {"label": K} of a network that has a class for none, which `ClassifierFree` then takes.
    """

    def __init__(self, net: Callable[..., Any], sign: int = 1, config: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.net, self.sign, self.config = net, sign, dict(config or {})
        self.kind = self.config.get("_class_name", "")
        self.wide = False
        null = self.config.get("num_embeds_ada_norm") if self.kind == "DiTTransformer2DModel" else None
        self.condition_sizes: dict[str, int] = {} if null is None else {"label": int(null)}

    def forward(self, x: Tensor, time: Tensor, **cond: Any) -> Tensor:
        found = self.whole(x, time, cond)
        if found.ndim == x.ndim > 1 and found.shape[1] == 2 * x.shape[1]:
            found = found[:, : x.shape[1]]
        return found if self.sign == 1 else -found

    def whole(self, x: Tensor, time: Tensor, cond: dict[str, Any]) -> Tensor:
        """What the network returns, with all its channels."""
        if self.kind == "FluxTransformer2DModel":
            return self._flux(x, time, cond)
        if self.kind not in NETWORKS:
            return _tensor(self.net(x, time, **cond))
        named = {"class_labels" if name == "label" else name: value for name, value in cond.items()}
        return _tensor(self.net(x, timestep=time, **named))

    def _flux(self, x: Tensor, time: Tensor, cond: dict[str, Any]) -> Tensor:
        """Flux takes packed latents, places of image and text, and 1000 t as t."""
        if self.config.get("guidance_embeds") and "guidance" not in cond:
            raise ArgumentError(
                "this Flux was distilled with guidance as an input: give cond={'guidance': ...}, 3.5 say"
            )
        height, width = x.shape[2] // 2, x.shape[3] // 2
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        places = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).to(x)
        words = cond["encoder_hidden_states"].shape[1] if "encoder_hidden_states" in cond else 0
        cond = {"img_ids": places, "txt_ids": places.new_zeros(words, 3), **cond}
        if not isinstance(guidance := cond.get("guidance"), Tensor | None):
            cond["guidance"] = torch.full((len(x),), float(guidance), device=x.device)
        return unpack(_tensor(self.net(pack(x), timestep=time / 1000, **cond)), height, width)


class CalledPair(Called):
    """A network whose output has a learned variance beside the prediction, (B, 2 C, ...)."""

    def both(self, x: Tensor, time: Tensor, **cond: Any) -> tuple[Tensor, Tensor]:
        """The two, for `LearnedRangeDenoiser`.

        Raises:
            ValueError: if the network's output has not twice the channels of x.
        """
        found = self.whole(x, time, cond)
        if found.ndim != x.ndim or found.shape[1] != 2 * x.shape[1]:
            raise ValueError(
                f"the scheduler's variance_type is learned_range, and the network returned {tuple(found.shape)} for x "
                f"of shape {tuple(x.shape)}: expected twice the channels"
            )
        prediction, h = found.chunk(2, dim=1)
        return self.sign * prediction, h


def _tensor(found: Any) -> Tensor:
    """The tensor in an output object or a tuple."""
    out: Tensor = found.sample if hasattr(found, "sample") else found[0] if isinstance(found, tuple) else found
    return out


def pack(x: Tensor) -> Tensor:
    """(B, C, H, W) as tokens (B, H/2 W/2, 4 C), in a token C before the 2 x 2 places."""
    if x.ndim != 4 or x.shape[2] % 2 or x.shape[3] % 2:
        raise ArgumentError(f"x has shape {tuple(x.shape)}: Flux packs 2 x 2, of (B, C, H, W) with even H and W")
    B, C, H, W = x.shape
    return x.reshape(B, C, H // 2, 2, W // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(B, -1, 4 * C)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`, of height x width tokens."""
    B, _, C = tokens.shape
    x = tokens.reshape(B, height, width, C // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(B, C // 4, 2 * height, 2 * width)


def check_kind(kind: object) -> None:
    """Raises ArgumentError unless it is one of `NETWORKS`."""
    if kind not in NETWORKS:
        raise ArgumentError(
            f"the network is {kind}: {one_of(kind, NETWORKS)}; for another give the pair (net, scheduler), net(x, "
            "time, **cond) being any callable that returns the prediction"
        )


def check_whole_network(net: nn.Module, kind: str, config: Mapping[str, Any]) -> None:
    """Raises ArgumentError unless it is a network that is known here, without adapters, of x and its conditions."""
    check_kind(kind)
    adapters = [name for name, _ in net.named_parameters() if "lora_" in name.lower()]
    if adapters or getattr(net, "peft_config", None):
        raise ArgumentError(f"LoRA is not supported, and the network has {some(adapters) or 'adapters'}: fuse it first")
    channels, out = config["in_channels"], config.get("out_channels")
    if kind != "FluxTransformer2DModel" and out not in (None, channels, 2 * channels):
        raise ArgumentError(
            f"the network takes {channels} channels and returns {out}: it is told more than x, a mask or image say. "
            "Give (net, scheduler), with a net that joins its conditions"
        )
    if config.get("class_embed_type") == "timestep" or config.get("timestep_post_act"):
        raise ArgumentError(f"{kind} has class_embed_type='timestep' or timestep_post_act: no network of x and t alone")


def event_shape(kind: str, config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """C, H, W of an item of x, where the configuration says it."""
    size, channels = config.get("sample_size"), config["in_channels"]
    if size is None or kind == "FluxTransformer2DModel":
        return None
    sizes = [size] if isinstance(size, int) else size if isinstance(size, list | tuple) else []
    if len(sizes) not in (1, 2) or not all(isinstance(n, int) and n > 0 for n in sizes):
        raise ArgumentError(
            f"sample_size={size!r} in the configuration of {kind}: expected a size, or height and width"
        )
    if isinstance(size, int):
        return (channels, size) if kind == "UNet1DModel" else (channels, size, size)
    return (channels, *size)


def latent_scales(config: Mapping[str, Any]) -> tuple[Tensor | float, Tensor | float]:
    """(scale, shift) of z = scale (m - shift), of an AutoencoderKL's configuration.

    >>> latent_scales({"scaling_factor": 1.5, "shift_factor": 0.0609})
    (1.5, 0.0609)
    """
    scale, shift = config.get("scaling_factor"), config.get("shift_factor") or 0.0
    if scale is None:
        raise ArgumentError("the autoencoder's configuration has no scaling_factor: its latents' unit is not known")
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if (mean is None) != (std is None):
        raise ArgumentError("the autoencoder has one of latents_mean and latents_std: expected both, or none")
    if mean is None or std is None:
        return float(scale), float(shift)
    if shift:
        raise ArgumentError(f"the autoencoder has shift_factor={shift} and latents_mean: expected one of them")
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (mean, std))
    return float(scale) / std, mean
