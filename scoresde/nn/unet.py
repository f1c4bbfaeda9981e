"""One U-Net for data of one, two or three axes (Ronneberger et al., 2015): of the class of DDPM (Ho et al., 2020),
DDPM++ and NCSN++ (Song et al., 2021) and ADM (Dhariwal and Nichol, 2021), which differ in its options.

Each level has residual blocks with adaptive group norm (scale and shift from the embedding of time, class and vector);
skips run from every block on the way down to one on the way up. Any number of levels and any size, odd ones too: the
way up resizes to the skip it meets.

    DDPM      attention=(1,)
    DDPM++    resample="block", skip_scale=0.5**0.5
    NCSN++    the same, with fir=(1, 3, 3, 1) and fourier=16 on the label log sigma
    ADM       resample="block", attention at 32, 16 and 8 pixels, head_channels=64

An image c that it is conditional on meets x at the entrance, in one of two ways:

    h = conv([x, c])        Palette, SR3 (Saharia et al., 2022): concatenated
    h = F(x) + G(c)         SegDiff (Amit et al., 2021): two encodings, added; F is a convolution, G has residual blocks

Both are the same where G is a convolution, too.

A context, tokens of any number, meets x by cross-attention after every self-attention, as in latent diffusion (Rombach
et al., 2022), and its mean is part of the embedding (`scoresde.nn.context`).

Clips (B, C, F, H, W) may be taken as volumes, or with time apart from space, as video diffusion does (Ho et al., 2022;
`scoresde.nn.frames`): frames are images, and only attention over time, at the levels of `time_attention`, sees several.

What NCSN's network (Song and Ermon, 2019) is told and how it sees far are options too: norm="instance", conditional
instance norm, and resample="dilate", dilated convolutions (patch=2 for the one time that it halves).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde.checks import check_count, check_option
from scoresde.nn.blocks import (
    Attention,
    Double,
    Encoder,
    GroupNorm,
    Halve,
    ResidualBlock,
    concatenate,
    conv,
    filter_taps,
    group_norm,
    image_of,
    shuffle,
    unshuffle,
    zero,
)
from scoresde.nn.context import CrossAttention, Tokens
from scoresde.nn.embedding import TimeEmbedding
from scoresde.nn.frames import TimeAttention, apart, together

__all__ = ["UNet"]

PRESETS: dict[int, dict[str, Any]] = {
    8: {"channels": 32, "multipliers": (1, 2), "blocks": 1, "attention": (1,)},
    28: {"channels": 48, "multipliers": (1, 2, 2), "blocks": 2, "attention": (1,), "resample": "block"},
    32: {
        "image_channels": 3,
        "channels": 128,
        "multipliers": (1, 2, 2, 2),
        "blocks": 4,
        "attention": (1,),
        "dropout": 0.1,
        "resample": "block",
        "skip_scale": 0.5**0.5,
    },
    64: {
        "image_channels": 3,
        "channels": 128,
        "multipliers": (1, 2, 3, 4),
        "blocks": 2,
        "attention": (2, 3),
        "heads": 8,
        "dropout": 0.1,
        "resample": "block",
    },
}


class _Stage(nn.Module):
    """A residual block, then attention where there is one, where there is a context attention to that, and attention
    over time."""

    def __init__(
        self,
        block: ResidualBlock,
        attention: Attention | None,
        cross: CrossAttention | None,
        norm: GroupNorm | None,
        time: TimeAttention | None,
    ) -> None:
        super().__init__()
        self.block = block
        self.attention: nn.Module = nn.Identity() if attention is None else attention
        self.norm, self.cross, self.time = norm, cross, time

    def forward(self, x: Tensor, embedding: Tensor, tokens: Tokens | None, clips: int) -> Tensor:
        h: Tensor = self.attention(self.block(x, embedding))
        if self.norm is not None and self.cross is not None and tokens is not None:
            found = self.cross(self.norm(h).flatten(2).transpose(1, 2), tokens)
            h = h + found.transpose(1, 2).reshape(h.shape)
        return h if self.time is None else self.time(h, clips)


class UNet(nn.Module):
    """net(x, time, label=None, vector=None, image=None, context=None, context_mask=None) for data (B, image_channels,
    H, W), or (B, image_channels, L), or (B, image_channels, D, H, W). Its output starts at zero.

    With the defaults and grey images it has 1.0 million parameters; `UNet.preset(size)` has

        size 8     0.77 million, grey
        size 28    4.3 million, grey
        size 32    68 million, colour: DDPM++
        size 64    101 million, colour: a small ADM

    >>> net = UNet.preset(8, num_classes=10)
    >>> x, time, label = torch.zeros(2, 1, 8, 8), torch.tensor([1.0, 500.0]), torch.tensor([3, 10])  # 10: no class
    >>> net(x, time, label).shape
    torch.Size([2, 1, 8, 8])
    >>> cond = {"context": torch.ones(2, 7, 5), "context_mask": torch.arange(7) < torch.tensor([[7], [2]])}
    >>> UNet.preset(8, context=5)(x, time, **cond).shape  # seven tokens, and two: `padded` makes these of a list
    torch.Size([2, 1, 8, 8])

    Args:
        image_channels: channels of x and, unless `out_channels` says otherwise, of the result.
        channels: features at the finest level.
        multipliers: features of each level as multiples of `channels`; their number is the number of levels, each half
            as fine as the one before. For 8 pixels take two, for 28 or 32 three or four.
        blocks: residual blocks per level on the way down (one more on the way up).
        attention: levels (0 the finest) with self-attention; it is always there at the bottom.
        heads: attention heads.
        dropout: probability in each residual block.
        num_classes: number of classes, or None. The label num_classes, or no label, is the null class.
        patch: side of the squares of pixels that the finest level takes as one position (pixel_unshuffle): a quarter
            of the work with 2. H and W are multiples of it.
        dims: axes of the data, 1, 2 or 3.
        resample: "conv": between levels a strided convolution, and nearest neighbours with a convolution; "block":
            inside a residual block, as BigGAN does (Brock et al., 2019); "dilate": every level has the size of the
            first, and level l convolves with taps 2^l pixels apart, so that it sees as far.
        fir: the filter with which sizes are halved and doubled, as (1, 3, 3, 1) (Karras et al., 2020), or None.
        skip_scale: factor of every residual sum; 1/sqrt(2) = 0.5**0.5 keeps the variance.
        vector: length of a vector that the network is conditional on, or None.
        image_condition: channels of an image, of the size of x, that it is conditional on: by concatenation, or
        image_blocks: by adding G(image) to the encoding of x, G with so many residual blocks (`Encoder`); 0 is a
            convolution alone, and None concatenates.
        context: width of the tokens of a context that it is conditional on, or None: cross-attention wherever there is
            self-attention, and their mean in the embedding (`scoresde.nn.context`). Both start at zero: with the
            weights of a network without, it is that network until it is trained. No context is the null one.
        fourier: scale of Gaussian time frequencies, or None for sinusoidal features; see `TimeEmbedding`.
        out_channels: channels of the result; twice those of x for improved DDPM's learned variances.
        norm: of the residual blocks: "group", or "instance", conditional instance norm (`InstanceNorm` of
            `scoresde.nn.blocks`).
        head_channels: features of each attention head, in place of their number.
        additive: the embedding is added in a residual block, as in DDPM, in place of scale and shift.
        groups: of every group norm; by default at most 32, of at least four channels.
        time_features: number of the sinusoidal or Fourier features of the label, by default `embedding`.
        embedding: width of the embedding of time, class and vector, by default 4 channels.
        null_class: False for a network that was trained with a class always: a call without one is an error.
        time_attention: None, or the first axis of the data is time, apart from the others: levels with attention over
            time, () for none, and then the frames are images that know nothing of each other. `patch` is of space
            alone, and a clip of one frame is an image (`scoresde.training.joint_loss` trains on both).

    Raises:
        ValueError: if an option is not one of those, there is no level, an attention level does not exist, or heads do
            not divide the features; by the call, if x or a condition is missing, unexpected or does not fit.
    """

    def __init__(
        self,
        image_channels: int = 1,
        channels: int = 32,
        multipliers: Sequence[int] = (1, 2),
        blocks: int = 2,
        attention: Sequence[int] = (),
        heads: int = 4,
        dropout: float = 0.0,
        num_classes: int | None = None,
        patch: int = 1,
        *,
        dims: int = 2,
        resample: Literal["conv", "block", "dilate"] = "conv",
        fir: Sequence[float] | None = None,
        skip_scale: float = 1.0,
        vector: int | None = None,
        image_condition: int = 0,
        image_blocks: int | None = None,
        context: int | None = None,
        fourier: float | None = None,
        out_channels: int | None = None,
        norm: Literal["group", "instance"] = "group",
        head_channels: int | None = None,
        additive: bool = False,
        groups: int | None = None,
        time_features: int | None = None,
        embedding: int | None = None,
        null_class: bool = True,
        time_attention: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        outputs = image_channels if out_channels is None else out_channels
        check_count(image_channels=image_channels, channels=channels, blocks=blocks, heads=heads, patch=patch)
        sizes = {"head_channels": head_channels, "groups": groups, "embedding": embedding}
        check_count(out_channels=outputs, **{name: n for name, n in sizes.items() if n is not None})
        check_option((1, 2, 3), dims=dims)
        check_option(("conv", "block", "dilate"), resample=resample)
        if fir is not None:
            filter_taps(fir)
            if resample == "dilate":
                raise ValueError(f"fir={tuple(fir)} with resample='dilate': nothing is halved that it could filter")
        if image_condition < 0 or not 0 <= dropout < 1 or not 0 < skip_scale < math.inf:
            raise ValueError(
                f"image_condition={image_condition}, dropout={dropout}, skip_scale={skip_scale}: expected channels "
                ">= 0, a probability below 1 and a positive factor"
            )
        if image_blocks is not None and (image_blocks < 0 or not image_condition):
            raise ValueError(
                f"image_blocks={image_blocks}, image_condition={image_condition}: expected blocks >= 0 of an encoder, "
                "and channels of the image that it encodes"
            )
        widths, over_time = [channels * m for m in multipliers], () if time_attention is None else time_attention
        if not widths or any(level not in range(len(widths)) for level in (*attention, *over_time)):
            raise ValueError(
                f"attention at levels {(*attention, *over_time)} of a U-Net with {len(widths)} levels: expected one "
                "level or more, of which 0 is the finest"
            )
        if time_attention is not None and dims < 2:
            raise ValueError(f"time_attention={tuple(over_time)} with dims={dims}: expected time and an axis of space")
        divisor, told = (heads, "heads") if head_channels is None else (head_channels, "head_channels")
        seeing = {*attention, *over_time}
        if wrong := [w for level, w in enumerate(widths) if w % divisor and (level in seeing or w == widths[-1])]:
            raise ValueError(f"{told}={divisor} does not divide the {wrong[0]} features of a level with attention")
        if groups is not None and (wrong := [w for w in (channels, *widths) if w % groups]):
            raise ValueError(f"groups={groups} does not divide the {wrong[0]} features of a level")
        embedding = 4 * channels if embedding is None else embedding
        self.time = TimeEmbedding(
            embedding,
            num_classes=num_classes,
            vector=vector,
            context=context,
            fourier=fourier,
            time_features=time_features,
            null_class=null_class,
        )
        self.dims, self.image_condition, self.patch, self.blocks = dims, image_condition, patch, blocks
        self.frames_apart = time_attention is not None
        dims -= self.frames_apart  # of what the layers see
        self.encoder: Encoder | None = None
        if image_blocks is not None:
            self.encoder = Encoder(image_condition * patch**dims, channels, image_blocks, dims=dims)
        concatenated = image_channels + (image_condition if image_blocks is None else 0)
        self.inward = conv(dims, concatenated * patch**dims, channels, 3)

        options: dict[str, Any] = {"dims": dims, "skip_scale": skip_scale, "groups": groups}
        residual: dict[str, Any] = {**options, "norm": norm, "additive": additive}

        def spacing(level: int) -> int:
            return 2**level if resample == "dilate" else 1

        def stage(inputs: int, outputs: int, level: int, attend: bool, timed: bool) -> _Stage:
            number = heads if head_channels is None else outputs // head_channels
            block = ResidualBlock(inputs, outputs, embedding, dropout, **residual, dilation=spacing(level))
            own = Attention(outputs, number, **options) if attend else None
            told = None if own is None or context is None else CrossAttention(outputs, context, number)
            norm = None if told is None else group_norm(outputs, groups)
            return _Stage(block, own, told, norm, TimeAttention(outputs, number, **options) if timed else None)

        def between(width: int, level: int, way: Literal["down", "up"]) -> nn.Module:
            if resample == "dilate":
                return conv(dims, width, width, 3, dilation=spacing(level))
            if resample == "block":
                return ResidualBlock(width, width, embedding, dropout, **residual, resample=way, fir=fir)
            if way == "up":
                return conv(dims, width, width, 3)
            if fir is None:
                return conv(dims, width, width, 3, stride=2)
            return nn.Sequential(Halve(dims, fir), conv(dims, width, width, 3))

        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        self.shrink, self.grow = nn.ModuleList(), nn.ModuleList()
        skips, width = [channels], channels
        for level, w in enumerate(widths):
            for _ in range(blocks):
                self.down.append(stage(width, w, level, level in attention, level in over_time))
                width = w
                skips.append(width)
            if level < len(widths) - 1:
                self.shrink.append(between(width, level, "down"))
                skips.append(width)
        bottom = len(widths) - 1
        first, last = stage(width, width, bottom, True, bottom in over_time), stage(width, width, bottom, False, False)
        self.middle = nn.ModuleList([first, last])
        for level, w in reversed(list(enumerate(widths))):
            for _ in range(blocks + 1):
                self.up.append(stage(width + skips.pop(), w, level, level in attention, level in over_time))
                width = w
            if level > 0:
                self.grow.append(between(width, level - 1, "up"))
        self.enlarge = Double(dims, fir if resample == "conv" else None)
        self.norm, self.outward = group_norm(width, groups), zero(conv(dims, width, outputs * patch**dims, 3))

    @property
    def condition_sizes(self) -> dict[str, int]:
        """What it can be told: the name of each condition, with the number of classes, entries or channels."""
        image = {"image": self.image_condition} if self.image_condition else {}
        return {**self.time.condition_sizes, **image}

    @classmethod
    def preset(cls, size: int, **overrides: Any) -> UNet:
        """The network for images of 8, 28, 32 or 64 pixels (and for others of about that size), with other options
        where they are given.

        Raises:
            ValueError: if there is no preset of that size.
        """
        check_option(PRESETS, preset=size)
        return cls(**{**PRESETS[size], **overrides})

    def forward(self, x: Tensor, time: Tensor, label: Tensor | int | None = None, **cond: Tensor | None) -> Tensor:
        """x (B, image_channels, H, W), time (B,), label (B,), and by keyword vector (B, length), image (B,
        image_condition, H, W), context (B, N, width) and context_mask (B, N), to the shape of x.
        """
        return self.readout(self.features(x, time, label, **cond))

    def readout(self, h: Tensor) -> Tensor:
        """The last feature map, `features`, to the shape of x."""
        clips = len(h)
        found = shuffle(self.outward(F.silu(self.norm(apart(h) if self.frames_apart else h))), self.patch)
        return together(found, clips) if self.frames_apart else found

    def features(
        self,
        x: Tensor,
        time: Tensor,
        label: Tensor | int | None = None,
        *,
        vector: Tensor | None = None,
        image: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """The last feature map, (B, outward.in_channels, H / patch, W / patch): what a further head can read. Of clips
        (B, outward.in_channels, F, ...).
        """
        clips = len(x)
        if self.encoder is None:
            h = self.inward(self._patches(concatenate(x, image, self.dims, self.image_condition)))
        else:
            image = image_of(x, image, self.dims, self.image_condition)
            assert image is not None
            h = self.inward(self._patches(x)) + self.encoder(self._patches(image))
        tokens = self.time.tokens(time, context, context_mask)
        embedding = self.time(time, label, vector, tokens)
        if self.frames_apart:
            embedding = embedding.repeat_interleave(x.shape[2], 0)
            tokens = None if tokens is None else Tokens(*(part.repeat_interleave(x.shape[2], 0) for part in tokens))
        skips = [h]
        for i, stage in enumerate(self.down):
            h = stage(h, embedding, tokens, clips)
            skips.append(h)
            if (i + 1) % self.blocks == 0 and (i + 1) // self.blocks <= len(self.shrink):
                shrink = self.shrink[i // self.blocks]
                h = shrink(h, embedding) if isinstance(shrink, ResidualBlock) else shrink(h)
                skips.append(h)
        for stage in self.middle:
            h = stage(h, embedding, tokens, clips)
        for i, stage in enumerate(self.up):
            h = stage(torch.cat([h, skips.pop()], dim=1), embedding, tokens, clips)
            if (i + 1) % (self.blocks + 1) == 0 and skips:
                grow, size = self.grow[i // (self.blocks + 1)], skips[-1].shape[2:]
                h = grow(h, embedding, size) if isinstance(grow, ResidualBlock) else grow(self.enlarge(h, size))
        return together(h, clips) if self.frames_apart else h

    def _patches(self, x: Tensor) -> Tensor:
        """What the layers see of x: its frames one by one, where they are apart, patches as channels."""
        return unshuffle(apart(x) if self.frames_apart else x, self.patch)
