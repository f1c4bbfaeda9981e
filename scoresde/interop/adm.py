"""The U-Net of improved-diffusion, guided-diffusion and consistency models (ADM), from its flags and a state dict.

The published files are state dicts without metadata. Their shapes tell the channels; the flags of the command line tell
the rest, and what a flag says against the file is refused. Of the names,

    time_embed.0, .2                    time.inward, .outward           label_emb            time.classes
    input_blocks.0.0                    inward                          out.0, .2            norm, outward
    input_blocks.i.0, .1                down: block, attention          input_blocks.i.0     shrink (.op: a convolution)
    middle_block.0, .1, .2              middle: block, attention, block
    output_blocks.i.0, .1               up: block, attention            output_blocks.i.1|2  grow (.conv: a convolution)

q, k and v of H heads are rows of one matrix in two orders: (3, H, d) here and under use_new_attention_order, else
(H, 3, d), whose rows are rearranged when they are read.

Sources: Nichol and Dhariwal (2021), "Improved Denoising Diffusion Probabilistic Models"; Dhariwal and Nichol (2021),
"Diffusion Models Beat GANs on Image Synthesis".
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scoresde.checks import check_count
from scoresde.errors import CheckpointError, some
from scoresde.interop.reading import fill
from scoresde.nn.blocks import Attention, ResidualBlock
from scoresde.nn.unet import UNet

__all__ = ["MODELS", "Flags", "architecture", "names", "network", "of_file"]

MULTIPLIERS: dict[int, tuple[float, ...]] = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
}
"""channel_mult by image_size, where the flag says nothing."""

IGNORED = [
    "dropout",
    "use_checkpoint",
    "use_fp16",
    "use_kl",
    "rescale_learned_sigmas",
    "sigma_small",
    "small_size",
    "weight_schedule",
]
"""Flags of training and of the samplers, which change nothing of what is read."""

YES, NO = ["true", "yes", "t", "y", "1"], ["false", "no", "f", "n", "0"]


@dataclass(frozen=True)
class Flags:
    """The flags of a network and of its chain, under their names and with their defaults.

    Attributes:
        image_size, num_channels, num_res_blocks, num_heads, num_heads_upsample, num_head_channels,
            attention_resolutions, channel_mult, class_cond, use_scale_shift_norm, resblock_updown,
            use_new_attention_order, learn_sigma, large_size: of the network; large_size is image_size of an upsampler.
        diffusion_steps, noise_schedule, predict_xstart, rescale_timesteps, timestep_respacing: of the chain;
            training_mode of consistency models.
            rescale_timesteps is True by default in improved-diffusion and False in guided-diffusion, so here it has
            none: it must be said, unless there are 1000 steps, where it changes nothing.
        given: the flags that were given; the others have the defaults.
    """

    image_size: int = 64
    num_channels: int = 128
    num_res_blocks: int = 2
    num_heads: int = 4
    num_heads_upsample: int = -1
    num_head_channels: int = -1
    attention_resolutions: str = "16,8"
    channel_mult: str = ""
    class_cond: bool = False
    use_scale_shift_norm: bool = True
    resblock_updown: bool = False
    use_new_attention_order: bool = False
    learn_sigma: bool = False
    diffusion_steps: int = 1000
    noise_schedule: str = "linear"
    predict_xstart: bool = False
    rescale_timesteps: bool | None = None
    timestep_respacing: str = ""
    large_size: int = 0
    training_mode: str = "edm"
    given: tuple[str, ...] = ()

    @classmethod
    def of(cls, flags: Mapping[str, Any] | str) -> Flags:
        """The flags of a dict, of a command line that begins with "--", or of a published model's name.

        Raises:
            ValueError: if the name is none of `MODELS`, a flag is none of theirs, or its value is of another kind.
        """
        if isinstance(flags, str):
            if not flags.startswith("-"):
                if flags not in MODELS:
                    raise ValueError(f"{flags!r} is no published model: expected its flags, or one of {list(MODELS)}")
                flags = MODELS[flags]
            try:
                words = shlex.split(flags.replace("=", " "))
            except ValueError as error:
                raise ValueError(f"flags {flags!r}: {error}") from error
            if len(words) % 2 or any(not name.startswith("--") for name in words[::2]):
                raise ValueError(f"flags {flags!r}: expected pairs, as '--image_size 64 --class_cond True'")
            flags = {name[2:]: value for name, value in zip(words[::2], words[1::2], strict=True)}
        if not isinstance(flags, Mapping):
            raise TypeError(f"flags is {type(flags).__name__}: expected a dict, a command line or a published name")
        known = {f.name: str(f.type).split(" ")[0] for f in fields(cls) if f.name != "given"}
        if unknown := [name for name in flags if name not in known and name not in IGNORED]:
            raise ValueError(f"no flag of the network or its chain: {some(unknown)}; there are {', '.join(known)}")
        found = {name: _value(name, value, known[name]) for name, value in flags.items() if name in known}
        if "large_size" in found:
            found["image_size"] = found["large_size"]
        for name in ("image_size", "num_channels", "diffusion_steps"):
            if name in found:
                check_count(**{name: found[name]})
        return cls(**found, given=tuple(found))

    @property
    def levels(self) -> list[int]:
        """The levels with attention: those where the image is a whole factor 2^level of its size smaller."""
        rates = {int(self.image_size // n) for n in _numbers(attention_resolutions=self.attention_resolutions)}
        return [level for level in range(len(self.multipliers)) if 2**level in rates]

    @property
    def multipliers(self) -> tuple[float, ...]:
        """Features of each level, as multiples of num_channels.

        Raises:
            ValueError: if neither channel_mult nor the size of the image tells them.
        """
        if self.channel_mult:
            return _numbers(channel_mult=self.channel_mult)
        if self.image_size not in MULTIPLIERS:
            raise ValueError(f"image_size={self.image_size} has no customary channel_mult: give it, '1,2,2' say")
        return MULTIPLIERS[256 if self.large_size == 512 else self.image_size]


def _numbers(**flag: str) -> tuple[float, ...]:
    """Numbers with commas between them."""
    ((name, text),) = flag.items()
    try:
        found = tuple(float(n) for n in text.split(",") if n or name == "channel_mult")
    except ValueError:
        found = (0.0,)
    if not all(0 < n < math.inf for n in found):
        raise ValueError(f"{name}={text!r}: expected numbers above 0 with commas between them, as '1,2,2'")
    return found


def _value(name: str, value: Any, kind: str) -> Any:
    """A flag's value as a command line or a dict has it."""
    if kind == "bool":
        word = str(value).lower()
        if word not in YES + NO:
            raise ValueError(f"{name}={value!r}: expected True or False")
        return word in YES
    if kind == "int":
        if isinstance(value, bool) or not str(value).lstrip("-").isdigit():
            raise ValueError(f"{name}={value!r}: expected a whole number")
        return int(value)
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def architecture(flags: Flags, channels: int = 3, given: int = 0, classes: int | None = None) -> UNet:
    """The network of the flags, on the meta device, where it has shapes and no numbers.

    Args:
        flags: of the network.
        channels, given: of its image, and of one that it is conditional on.
        classes: how many.

    Raises:
        ValueError: if the flags describe no network, or one with two numbers of heads.
    """
    width = flags.num_channels
    widths = [int(m * width) for m in flags.multipliers]
    by_number = flags.num_head_channels == -1
    if by_number and flags.num_heads_upsample not in (-1, flags.num_heads):
        raise ValueError(
            f"num_heads_upsample={flags.num_heads_upsample} with num_heads={flags.num_heads}: networks with another "
            "number of heads on the way up are not read"
        )
    if wrong := [w for w in widths if w % widths[0]]:
        raise ValueError(f"channel_mult={flags.channel_mult!r}: {wrong[0]} features are no multiple of {widths[0]}")
    with torch.device("meta"):
        net = UNet(
            image_channels=channels,
            channels=widths[0],
            multipliers=[w // widths[0] for w in widths],
            blocks=flags.num_res_blocks,
            attention=flags.levels,
            heads=flags.num_heads,
            head_channels=None if by_number else flags.num_head_channels,
            null_class=False,
            resample="block" if flags.resblock_updown else "conv",
            additive=not flags.use_scale_shift_norm,
            groups=32,
            time_features=width,
            embedding=4 * width,
            image_condition=given,
            out_channels=2 * channels if flags.learn_sigma else channels,
        )
        if classes is not None:  # one that draws its weights on this device takes a second, to load torch's compiler
            net.time.classes = nn.Embedding(classes, 4 * width, _weight=torch.empty(classes, 4 * width))
    return net


def network(tensors: Mapping[str, Tensor], flags: Flags, path: Path | str, *, new_order: bool) -> tuple[UNet, int]:
    """The network with these weights, without a copy but of q, k and v, and the channels of its image.

    Args:
        tensors: theirs, by their names.
        flags: of the network.
        path: for messages.
        new_order: whether q, k and v have the order (3, H, d).

    Raises:
        ValueError: as `architecture`.
        CheckpointError: if the file is of another network than the flags say.
    """
    _check_told(tensors, flags, path)
    out = len(tensors["out.2.weight"])
    channels = out // 2 if flags.learn_sigma else out
    given = tensors["input_blocks.0.0.weight"].shape[1] - channels
    net = architecture(flags, channels, given, len(tensors["label_emb.weight"]) if flags.class_cond else None)
    if other := [f"{name} of {t.dtype}" for name, t in tensors.items() if not t.is_floating_point()]:
        raise CheckpointError(f"{path} holds {some(other)}: expected numbers in floating point")
    kinds = {t.dtype for t in tensors.values()}
    dtype = torch.float32 if len(kinds) > 1 else next(iter(kinds))  # a file in half precision has norms in float32
    ours = dict(names(net))
    found = {}
    for name, tensor in tensors.items():
        module, _, parameter = name.rpartition(".")
        if module.endswith((".qkv", ".proj_out")):
            tensor = tensor.reshape(*tensor.shape[:2], 1, 1) if parameter == "weight" else tensor
            if module.endswith(".qkv") and not new_order:
                by_number = flags.num_head_channels == -1
                heads = flags.num_heads if by_number else len(tensor) // (3 * flags.num_head_channels)
                rows = tensor.reshape(heads, 3, -1, *tensor.shape[1:])
                tensor = rows.transpose(0, 1).reshape(tensor.shape)
        found[f"{ours[module]}.{parameter}" if module in ours else name] = tensor.to(dtype)
    try:
        fill(net, found, path)
    except CheckpointError as error:
        shown = ["image_size", "num_res_blocks", "channel_mult", "attention_resolutions", "num_head_channels"]
        said = ", ".join(f"{name}={getattr(flags, name)!r}" for name in shown)
        raise CheckpointError(f"{error}; or of other flags than {said}") from None
    return net, channels


def names(net: UNet) -> Iterator[tuple[str, str]]:
    """(theirs, ours): the modules' names of a network in their files."""
    yield from {
        "time_embed.0": "time.inward",
        "time_embed.2": "time.outward",
        "label_emb": "time.classes",
        "input_blocks.0.0": "inward",
        "out.0": "norm",
        "out.2": "outward",
    }.items()
    yield from _residual("middle_block.0", "middle.0.block")
    yield from _attention("middle_block.1", "middle.0.attention")
    yield from _residual("middle_block.2", "middle.1.block")
    number = 0
    for i, stage in enumerate(net.down):
        number += 1
        yield from _residual(f"input_blocks.{number}.0", f"down.{i}.block")
        if isinstance(stage.attention, Attention):
            yield from _attention(f"input_blocks.{number}.1", f"down.{i}.attention")
        level, left = divmod(i + 1, net.blocks)
        if not left and level <= len(net.shrink):
            number += 1
            yield from _between(net.shrink[level - 1], f"input_blocks.{number}.0", "op", f"shrink.{level - 1}")
    for i, stage in enumerate(net.up):
        yield from _residual(f"output_blocks.{i}.0", f"up.{i}.block")
        attends = isinstance(stage.attention, Attention)
        if attends:
            yield from _attention(f"output_blocks.{i}.1", f"up.{i}.attention")
        level, left = divmod(i + 1, net.blocks + 1)
        if not left and level <= len(net.grow):
            yield from _between(net.grow[level - 1], f"output_blocks.{i}.{1 + attends}", "conv", f"grow.{level - 1}")


def _residual(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
    parts = {
        "in_layers.0": "norm1",
        "in_layers.2": "conv1",
        "emb_layers.1": "modulate",
        "out_layers.0": "norm2",
        "out_layers.3": "conv2",
        "skip_connection": "skip",
    }
    return ((f"{theirs}.{a}", f"{ours}.{b}") for a, b in parts.items())


def _attention(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
    parts = {"norm": "norm", "qkv": "qkv", "proj_out": "project"}
    return ((f"{theirs}.{a}", f"{ours}.{b}") for a, b in parts.items())


def _between(layer: nn.Module, theirs: str, convolution: str, ours: str) -> Iterator[tuple[str, str]]:
    """What halves or doubles: a residual block, or a convolution of that name."""
    if isinstance(layer, ResidualBlock):
        yield from _residual(theirs, ours)
    else:
        yield f"{theirs}.{convolution}", ours


_BLOCK = "input_blocks.1.0.emb_layers.1", "input_blocks.1.0.out_layers.0"


def _check_told(tensors: Mapping[str, Tensor], flags: Flags, path: Path | str) -> None:
    """Raises CheckpointError where a flag is not what the shapes tell, naming it."""
    needed = ["time_embed.0.weight", "input_blocks.0.0.weight", *(f"{block}.weight" for block in _BLOCK)]
    if lacking := [name for name in [*needed, "out.2.weight"] if name not in tensors]:
        raise CheckpointError(f"{path} has no {some(lacking)}: it is no state dict of an ADM network")
    features, inward, scales, norm = (tensors[name].shape for name in needed)
    told = {
        "num_channels": features[1],
        "class_cond": "label_emb.weight" in tensors,
        "learn_sigma": len(tensors["out.2.weight"]) == (1 if flags.large_size else 2) * inward[1],
        "use_scale_shift_norm": scales[0] == 2 * norm[0],
    }
    if len(flags.multipliers) > 1:
        told["resblock_updown"] = not any(name.endswith(".0.op.weight") for name in tensors)
    if wrong := {name: value for name, value in told.items() if getattr(flags, name) != value}:
        said = ", ".join(f"{name}={getattr(flags, name)}" for name in wrong)
        true = ", ".join(f"{name}={value}" for name, value in wrong.items())
        raise CheckpointError(f"{path} is of a network with {true}, and the flags say {said}")


_ADM = "--attention_resolutions 32,16,8 --learn_sigma True --resblock_updown True"
_LSUN = f"{_ADM} --image_size 256 --num_channels 256 --num_head_channels 64"
_EDM = "--attention_resolutions 32,16,8 --resblock_updown True --num_head_channels 64"
_IMPROVED = "--learn_sigma True --noise_schedule cosine --diffusion_steps 4000 --num_res_blocks 3"
_BEDROOM = "--image_size 256 --num_heads 1 --learn_sigma True --use_scale_shift_norm False --attention_resolutions 16"
_SMALL_64, _SMALL_32 = (f"{_IMPROVED} --image_size {size} --rescale_timesteps True" for size in (64, 32))

MODELS: dict[str, str] = {
    "64x64_diffusion": f"{_ADM} --class_cond True --num_channels 192 --num_head_channels 64 --num_res_blocks 3 "
    "--noise_schedule cosine --use_new_attention_order True",
    "128x128_diffusion": f"{_ADM} --class_cond True --image_size 128 --num_channels 256 --num_heads 4",
    "256x256_diffusion": f"{_LSUN} --class_cond True",
    "256x256_diffusion_uncond": _LSUN,
    "512x512_diffusion": f"{_ADM} --class_cond True --image_size 512 --num_channels 256 --num_head_channels 64",
    "64_256_upsampler": f"{_ADM} --class_cond True --large_size 256 --num_channels 192 --num_heads 4",
    "128_512_upsampler": "--attention_resolutions 32,16 --learn_sigma True --resblock_updown True --class_cond True "
    "--large_size 512 --num_channels 192 --num_head_channels 64",
    **dict.fromkeys(("lsun_bedroom", "lsun_cat", "lsun_horse", "lsun_horse_nodropout"), _LSUN),
    **dict.fromkeys(("imagenet64_uncond_100M_1500K", "imagenet64_uncond_vlb_100M_1500K"), _SMALL_64),
    **dict.fromkeys(("cifar10_uncond_50M_500K", "cifar10_uncond_vlb_50M_500K"), _SMALL_32),
    "imagenet64_cond_270M_250K": f"{_IMPROVED} --num_channels 192 --class_cond True --rescale_timesteps False",
    "upsample_cond_500K": "--large_size 256 --num_channels 192 --learn_sigma True --class_cond True "
    "--diffusion_steps 4000 --rescale_timesteps False",
    **dict.fromkeys(("lsun_uncond_100M_1200K_bs128", "lsun_uncond_100M_2400K_bs64"), _BEDROOM),
    "edm_imagenet64_ema": f"{_EDM} --class_cond True --num_channels 192 --num_res_blocks 3",
    **dict.fromkeys(
        ("edm_bedroom256_ema", "edm_cat256_ema"),
        f"{_EDM} --image_size 256 --num_channels 256 --use_scale_shift_norm False",
    ),
}
"""The flags of the published models, by their files' names: guided-diffusion's, improved-diffusion's, and the EDM files
of consistency models.
"""


def of_file(path: Path, flags: Mapping[str, Any] | str | None) -> tuple[Flags, str | None]:
    """The flags, by the file's name where none are given, and the published model's name.

    Raises:
        ValueError: as `Flags.of`; if none are given and the file has no published name.
    """
    if flags is None:
        if path.stem not in MODELS:
            raise ValueError(
                f"{path.name} holds no flags and has no published model's name: give its flags, the command line's "
                f"'--image_size 64 ...' or a dict, or one of {list(MODELS)}"
            )
        flags = path.stem
    return Flags.of(flags), flags if isinstance(flags, str) and flags in MODELS else None
