"""A transformer on patches (Peebles and Xie, 2023, DiT), for data of one, two or three axes.

    h = inward(patches of x) + position
    h = h + gate_1 project(attention((1 + scale_1) norm(h) + shift_1))
    h = h + cross-attention(norm(h)), where there is a context (PixArt-alpha, Chen et al., 2024; `scoresde.nn.context`)
    h = h + gate_2 MLP((1 + scale_2) norm(h) + shift_2)                       depth times
    out = outward((1 + scale) norm(h) + shift)

Gates, scales and shifts are linear in SiLU of the embedding of time, class, vector and the context's mean, and start at
zero, as the last layer of cross-attention does: every block is the identity (adaLN-Zero).

Without patches and positions it is a network of sets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde.checks import check_count, check_option
from scoresde.nn.blocks import attend, concatenate, conv, shuffle, unshuffle, zero
from scoresde.nn.context import CrossAttention, Tokens
from scoresde.nn.embedding import TimeEmbedding

__all__ = ["DiT", "Layer", "SetTransformer", "norm", "positions"]

PRESETS: dict[int | str, dict[str, Any]] = {
    8: {"patch": 2, "width": 96, "depth": 4, "heads": 4},
    28: {"patch": 2, "width": 192, "depth": 8, "heads": 4},
    32: {"image_channels": 3, "patch": 2, "width": 384, "depth": 12, "heads": 6},
    64: {"image_channels": 3, "patch": 4, "width": 384, "depth": 12, "heads": 6},
    "S/2": {"image_channels": 3, "patch": 2, "width": 384, "depth": 12, "heads": 6},
    "B/2": {"image_channels": 3, "patch": 2, "width": 768, "depth": 12, "heads": 12},
}


def positions(size: Sequence[int], width: int, device: torch.device | None = None) -> Tensor:
    """Sines and cosines of each position on a grid, (n_1 n_2 ..., width), float32.

    Each axis has width / dims features, of frequencies from 1 down to about 1/10000. What is left over is zero. The
    inner product of two positions depends on their difference alone.
    """
    count = width // (2 * len(size))
    frequencies = (-math.log(10_000.0) / count * torch.arange(count, dtype=torch.float32, device=device)).exp()
    axes = [torch.arange(n, dtype=torch.float32, device=device) for n in size]
    angles = [grid.flatten()[:, None] * frequencies for grid in torch.meshgrid(*axes, indexing="ij")]
    features = torch.cat([f for a in angles for f in (a.sin(), a.cos())], dim=1)
    return F.pad(features, (0, width - features.shape[1]))


def _modulate(h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """(1 + scale) norm(h) + shift."""
    return (1 + scale) * norm(h) + shift


def norm(h: Tensor) -> Tensor:
    """Layer norm without parameters of its own."""
    return F.layer_norm(h, h.shape[-1:], eps=1e-6)


class Layer(nn.Module):
    """A layer of a transformer (Vaswani et al., 2017), norms first:

    h = h + project(attention(norm h)),    h = h + outward(GELU(inward(norm h)))

    Args:
        width: features of each place.
        heads: of attention, which divide the width.
        mlp: hidden features of the MLP.
        dropout: probability, on what is added.
    """

    def __init__(self, width: int, heads: int, mlp: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.inward, self.outward = nn.Linear(width, mlp), nn.Linear(mlp, width)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.qkv, self.project, self.inward, self.outward):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, h: Tensor, mask: Tensor | None = None) -> Tensor:
        """h (B, N, width), and which of the N places are looked at, bool (B, N), by default all; to the same shape."""
        h = h + self.dropout(self.attention(norm(h), None if mask is None else mask[:, None, None]))
        return h + self.dropout(self.mlp(norm(h)))

    def attention(self, h: Tensor, mask: Tensor | None = None) -> Tensor:
        B, N, width = h.shape
        q, k, v = self.qkv(h).reshape(B, N, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        out: Tensor = self.project(attend(q, k, v, mask).transpose(1, 2).reshape(B, N, width))
        return out

    def mlp(self, h: Tensor) -> Tensor:
        out: Tensor = self.outward(F.gelu(self.inward(h), approximate="tanh"))
        return out


class _Block(Layer):
    """A layer, modulated and gated, with attention to a context of that width in its midst."""

    def __init__(self, width: int, heads: int, mlp: int, dropout: float, context: int | None) -> None:
        super().__init__(width, heads, mlp, dropout)
        self.modulate = zero(nn.Linear(width, 6 * width))
        self.cross = None if context is None else CrossAttention(width, context, heads)

    def forward(  # type: ignore[override]
        self, h: Tensor, embedding: Tensor, tokens: Tokens | None, keys: Tensor | None = None
    ) -> Tensor:
        scale1, shift1, gate1, scale2, shift2, gate2 = self.modulate(F.silu(embedding))[:, None].chunk(6, dim=-1)
        h = h + gate1 * self.dropout(self.attention(_modulate(h, scale1, shift1), keys))
        if self.cross is not None and tokens is not None:
            h = h + self.dropout(self.cross(norm(h), tokens))
        return h + gate2 * self.dropout(self.mlp(_modulate(h, scale2, shift2)))


class DiT(nn.Module):
    """net(x, time, label=None, vector=None, image=None, context=None, context_mask=None) for data (B, image_channels,
    H, W), or (B, image_channels, L), or (B, image_channels, D, H, W), of any size that `patch` divides. Its output
    starts at zero.

    With the defaults and grey images it has 2.8 million parameters; `DiT.preset(name)` has

        8          0.71 million, grey, patches of 2
        28          5.5 million, grey, patches of 2
        32, "S/2"    33 million, colour, patches of 2
        64           33 million, colour, patches of 4
        "B/2"       130 million, colour, patches of 2

    >>> net = DiT(width=32, depth=2, dims=1, vector=3)
    >>> net(torch.zeros(2, 1, 10), torch.tensor([1.0, 500.0]), vector=torch.zeros(2, 3)).shape
    torch.Size([2, 1, 10])

    Args:
        image_channels: channels of x and, unless `out_channels` says otherwise, of the result.
        patch: side of the patches.
        width: features of each patch, even.
        depth: number of blocks.
        heads: attention heads.
        mlp_ratio: hidden features of the MLPs as a multiple of width.
        dropout: probability, on what each block adds.
        num_classes, dims, vector, image_condition, context, fourier, out_channels: as for `UNet`.

    Raises:
        ValueError: if an option is not one of those, heads do not divide the width, or it has less than two features
            for an axis; by the call, if x or a condition is missing, unexpected or does not fit.
    """

    def __init__(
        self,
        image_channels: int = 1,
        patch: int = 2,
        width: int = 192,
        depth: int = 4,
        heads: int = 4,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        num_classes: int | None = None,
        *,
        dims: int = 2,
        vector: int | None = None,
        image_condition: int = 0,
        context: int | None = None,
        fourier: float | None = None,
        out_channels: int | None = None,
    ) -> None:
        super().__init__()
        outputs = image_channels if out_channels is None else out_channels
        check_count(image_channels=image_channels, patch=patch, width=width, depth=depth, heads=heads)
        check_count(out_channels=outputs)
        check_option((1, 2, 3), dims=dims)
        if width % heads or width % 2 or width < 2 * dims:
            raise ValueError(f"width={width}: expected an even multiple of heads={heads}, at least {2 * dims}")
        if image_condition < 0 or not 0 <= dropout < 1 or not mlp_ratio * width >= 1:
            raise ValueError(
                f"image_condition={image_condition}, dropout={dropout}, mlp_ratio={mlp_ratio}: expected channels >= 0, "
                "a probability below 1 and a positive ratio"
            )
        self.dims, self.image_condition, self.patch = dims, image_condition, patch
        self.time = TimeEmbedding(width, num_classes=num_classes, vector=vector, context=context, fourier=fourier)
        self.inward = conv(dims, (image_channels + image_condition) * patch**dims, width, 1)
        mlp = int(mlp_ratio * width)
        self.blocks = nn.ModuleList(_Block(width, heads, mlp, dropout, context) for _ in range(depth))
        self.modulate = zero(nn.Linear(width, 2 * width))
        self.outward = zero(conv(dims, width, outputs * patch**dims, 1))

    @property
    def condition_sizes(self) -> dict[str, int]:
        """What it can be told: the name of each condition, with the number of classes, entries or channels."""
        image = {"image": self.image_condition} if self.image_condition else {}
        return {**self.time.condition_sizes, **image}

    @classmethod
    def preset(cls, name: int | str, **overrides: Any) -> DiT:
        """The network for images of 8, 28, 32 or 64 pixels, or "S/2" or "B/2" of the paper, with other options where
        they are given.

        Raises:
            ValueError: if there is no preset of that name.
        """
        check_option(PRESETS, name=name)
        return cls(**{**PRESETS[name], **overrides})

    def forward(self, x: Tensor, time: Tensor, label: Tensor | int | None = None, **cond: Tensor | None) -> Tensor:
        """x (B, image_channels, H, W), time (B,), label (B,), and by keyword vector (B, length), image (B,
        image_condition, H, W), context (B, N, width) and context_mask (B, N), to the shape of x.
        """
        return self.readout(self.features(x, time, label, **cond))

    def readout(self, h: Tensor) -> Tensor:
        """The last feature map, `features`, to the shape of x."""
        return shuffle(self.outward(h), self.patch)

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
        """The last feature map, (B, width, H / patch, W / patch): what a further head can read."""
        x = unshuffle(concatenate(x, image, self.dims, self.image_condition), self.patch)
        tokens = self.time.tokens(time, context, context_mask)
        embedding = self.time(time, label, vector, tokens)
        h = self.inward(x)
        size = h.shape[2:]
        h = h.flatten(2).transpose(1, 2)
        h = h + positions(size, h.shape[-1], h.device).to(h.dtype)
        for block in self.blocks:
            h = block(h, embedding, tokens)
        h = _modulate(h, *self.modulate(F.silu(embedding))[:, None].chunk(2, dim=-1))
        return h.transpose(1, 2).unflatten(2, size)


class SetTransformer(nn.Module):
    """net(x, time, label=None, mask=None, vector=None, context=None, context_mask=None) for sets of points (B, N, d) of
    any N: the blocks of `DiT` on points in place of patches, without positions, so that the result is permuted as the
    points are. With a mask, (B, N, 1), True where a point exists, the others are attended to with a weight that is
    exactly zero, and of them nothing is to be taken (`scoresde.Masked`). The last layer starts at zero.

    What a filled up batch changes is the order in which torch adds up over points: the last bits of the result.

    >>> net, x = SetTransformer(3, width=32, depth=2), torch.zeros(2, 5, 3)
    >>> net(x, torch.tensor([1.0, 500.0]), mask=torch.tensor([[[True]] * 5, [[True]] * 2 + [[False]] * 3])).shape
    torch.Size([2, 5, 3])

    Args:
        channels: d, numbers of a point.
        width: features of each point, even.
        depth, heads, mlp_ratio, dropout, num_classes, vector, context, fourier, out_channels: as for `DiT`.

    Raises:
        ValueError: if an option is out of range, or heads do not divide the width; by the call, if x has other
            dimensions, the mask is not bool, (B, N, 1), or a condition is missing, unexpected or does not fit.
    """

    def __init__(
        self,
        channels: int,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        num_classes: int | None = None,
        *,
        vector: int | None = None,
        context: int | None = None,
        fourier: float | None = None,
        out_channels: int | None = None,
    ) -> None:
        super().__init__()
        outputs = channels if out_channels is None else out_channels
        check_count(channels=channels, width=width, depth=depth, heads=heads, out_channels=outputs)
        if width % heads or width % 2:
            raise ValueError(f"width={width}: expected an even multiple of heads={heads}")
        if not 0 <= dropout < 1 or not mlp_ratio * width >= 1:
            raise ValueError(
                f"dropout={dropout}, mlp_ratio={mlp_ratio}: expected a probability below 1 and a positive ratio"
            )
        self.channels = channels
        self.time = TimeEmbedding(width, num_classes=num_classes, vector=vector, context=context, fourier=fourier)
        self.inward, self.outward = nn.Linear(channels, width), zero(nn.Linear(width, outputs))
        mlp = int(mlp_ratio * width)
        self.blocks = nn.ModuleList(_Block(width, heads, mlp, dropout, context) for _ in range(depth))
        self.modulate = zero(nn.Linear(width, 2 * width))

    @property
    def condition_sizes(self) -> dict[str, int]:
        """What it can be told: the name of each condition, with the number of classes or entries."""
        return self.time.condition_sizes

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        label: Tensor | int | None = None,
        mask: Tensor | None = None,
        *,
        vector: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """x (B, N, channels), time (B,), label (B,), mask (B, N, 1), and by keyword vector (B, length), context
        (B, M, width) and context_mask (B, M), to (B, N, out_channels).
        """
        if x.ndim != 3 or x.shape[2] != self.channels:
            raise ValueError(f"x has shape {tuple(x.shape)}: expected sets of points (B, N, {self.channels})")
        if mask is not None and (
            mask.dtype != torch.bool or mask.shape[1:] != (x.shape[1], 1) or mask.shape[0] not in (1, x.shape[0])
        ):
            raise ValueError(
                f"the mask is {mask.dtype} of shape {tuple(mask.shape)}: expected bool {(*x.shape[:2], 1)}, True where "
                "a point exists"
            )
        keys = None if mask is None else mask[:, None, None, :, 0]
        tokens = self.time.tokens(time, context, context_mask)
        embedding = self.time(time, label, vector, tokens)
        h = self.inward(x)
        for block in self.blocks:
            h = block(h, embedding, tokens, keys)
        out: Tensor = self.outward(_modulate(h, *self.modulate(F.silu(embedding))[:, None].chunk(2, dim=-1)))
        return out
