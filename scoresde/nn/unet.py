"""A compact U-Net for images (Ronneberger et al., 2015; Ho et al., 2020; Song et al., 2021, DDPM++).

Each level has residual blocks with adaptive group norm (scale and shift from the time embedding; Dhariwal and Nichol,
2021); skips run from every block on the way down to one on the way up. Any number of levels and any image size, odd
ones too: the way up resizes to the skip it meets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde.nn.embedding import TimeEmbedding

__all__ = ["UNet"]


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(channels, max(1, min(32, channels // 4))), channels)


def _zero(module: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(module.weight)
    assert module.bias is not None
    nn.init.zeros_(module.bias)
    return module


class _ResidualBlock(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm(x)))) (1 + scale) + shift)), the last convolution starting at zero."""

    def __init__(self, inputs: int, outputs: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.conv1 = _group_norm(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.modulate = nn.Linear(embedding, 2 * outputs)
        self.norm2, self.conv2 = _group_norm(outputs), _zero(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.modulate(F.silu(embedding))[:, :, None, None].chunk(2, dim=1)
        h = self.conv2(self.dropout(F.silu(self.norm2(h) * (1 + scale) + shift)))
        return self.skip(x) + h


class _Attention(nn.Module):
    """Self-attention over the pixels, added to x; its last layer starts at zero."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv = _group_norm(channels), nn.Conv2d(channels, 3 * channels, 1)
        self.project = _zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, 3, self.heads, C // self.heads, H * W).transpose(-1, -2)
        h = F.scaled_dot_product_attention(*qkv.unbind(1))
        return x + self.project(h.transpose(-1, -2).reshape(B, C, H, W))


class _Stage(nn.Module):
    """A residual block, then attention where `heads` is given."""

    def __init__(self, inputs: int, outputs: int, embedding: int, dropout: float, heads: int | None) -> None:
        super().__init__()
        self.block = _ResidualBlock(inputs, outputs, embedding, dropout)
        self.attention = nn.Identity() if heads is None else _Attention(outputs, heads)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.attention(self.block(x, embedding))


class UNet(nn.Module):
    """net(x, time, label=None) for images (B, image_channels, H, W).

    With the defaults and grey images it has 1.0 million parameters.

    Args:
        image_channels: channels of x and of the result.
        channels: features at the finest level, even.
        multipliers: features of each level as multiples of `channels`; their number is the number of levels, each half
            as fine as the one before. For 8 pixels take two, for 28 or 32 three or four.
        blocks: residual blocks per level on the way down (one more on the way up).
        attention: levels (0 the finest) with self-attention; it is always there at the bottom.
        heads: attention heads.
        dropout: probability in each residual block.
        num_classes: number of classes, or None.
        patch: side of the squares of pixels that the finest level takes as one position (pixel_unshuffle): a quarter
            of the work with 2. H and W are multiples of it.

    Raises:
        ValueError: if there is no level, an attention level does not exist, or heads do not divide the features.
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
    ) -> None:
        super().__init__()
        widths = [channels * m for m in multipliers]
        if not widths or any(level not in range(len(widths)) for level in attention):
            raise ValueError(f"attention at levels {tuple(attention)} of a U-Net with {len(widths)} levels")
        if wrong := [w for level, w in enumerate(widths) if w % heads and (level in attention or w == widths[-1])]:
            raise ValueError(f"heads={heads} does not divide the {wrong[0]} features of a level with attention")
        embedding = 4 * channels
        self.time = TimeEmbedding(embedding, num_classes=num_classes)
        self.patch, colours = patch, image_channels * patch**2
        self.inward = nn.Conv2d(colours, channels, 3, padding=1)

        def stage(inputs: int, outputs: int, attend: bool) -> _Stage:
            return _Stage(inputs, outputs, embedding, dropout, heads if attend else None)

        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        self.shrink, self.grow = nn.ModuleList(), nn.ModuleList()
        skips, width = [channels], channels
        for level, w in enumerate(widths):
            for _ in range(blocks):
                self.down.append(stage(width, w, level in attention))
                width = w
                skips.append(width)
            if level < len(widths) - 1:
                self.shrink.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                skips.append(width)
        self.middle = nn.ModuleList([stage(width, width, True), stage(width, width, False)])
        for level, w in reversed(list(enumerate(widths))):
            for _ in range(blocks + 1):
                self.up.append(stage(width + skips.pop(), w, level in attention))
                width = w
            if level > 0:
                self.grow.append(nn.Conv2d(width, width, 3, padding=1))
        self.norm, self.outward = _group_norm(width), _zero(nn.Conv2d(width, colours, 3, padding=1))
        self.blocks = blocks

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        """x (B, image_channels, H, W), time (B,) and label (B,) to the shape of x."""
        return self.readout(self.features(x, time, label))

    def readout(self, h: Tensor) -> Tensor:
        """The last feature map, `features`, to the shape of x."""
        return F.pixel_shuffle(self.outward(F.silu(self.norm(h))), self.patch)

    def features(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        """The last feature map, (B, outward.in_channels, H / patch, W / patch): what a further head can read."""
        embedding = self.time(time, label)
        h = self.inward(F.pixel_unshuffle(x, self.patch))
        skips = [h]
        for i, stage in enumerate(self.down):
            h = stage(h, embedding)
            skips.append(h)
            if (i + 1) % self.blocks == 0 and (i + 1) // self.blocks <= len(self.shrink):
                h = self.shrink[i // self.blocks](h)
                skips.append(h)
        for stage in self.middle:
            h = stage(h, embedding)
        for i, stage in enumerate(self.up):
            h = stage(torch.cat([h, skips.pop()], dim=1), embedding)
            if (i + 1) % (self.blocks + 1) == 0 and skips:
                h = F.interpolate(h, size=skips[-1].shape[-2:], mode="nearest")
                h = self.grow[i // (self.blocks + 1)](h)
        return h
