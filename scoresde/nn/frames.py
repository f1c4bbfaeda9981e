"""Time apart from space (Ho et al., 2022, "Video diffusion models", section 3): of data (B, C, F, ...) with F frames,

    space    every frame by itself: convolutions of 1 x 3 x 3, norms and attention over the pixels of one frame, which
             are those of images with (B F) for a batch; sizes are halved in space alone
    time     every position by itself: attention over its F features,
             h + project(softmax((R_i q_i)^T (R_j k_j) / sqrt(d)) v_j),    i, j = 0, ..., F - 1

R_i turns the k-th pair of the d features by i 100^(-2 k / d) (rotary positions; Su et al., 2021), so that frames know
how far they are apart, R_i^T R_j = R_{j - i}, and none where a clip begins: a network takes clips of any length, and is
most itself at those that it was trained on. With one frame the weights are 1, so that it is an image.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from scoresde.nn.blocks import attend, conv, group_norm, zero

__all__ = ["TimeAttention", "apart", "together", "turned"]

_BASE = 100.0
"""The slowest pair of features turns once in about 2 pi times as many frames."""


def apart(x: Tensor) -> Tensor:
    """Clips (B, C, F, ...) as images (B F, C, ...)."""
    return x.transpose(1, 2).flatten(0, 1)


def together(h: Tensor, clips: int) -> Tensor:
    """The inverse: (B F, C, ...) as `clips` = B clips (B, C, F, ...)."""
    return h.unflatten(0, (clips, -1)).transpose(1, 2)


def turned(q: Tensor) -> Tensor:
    """R_i q_i for q (..., F, d), d even: features k and k + d / 2 are the k-th pair. The angles are computed in float32
    or better."""
    F, d = q.shape[-2:]
    kind = torch.promote_types(q.dtype, torch.float32)
    k, i = (torch.arange(n, dtype=kind, device=q.device) for n in (d // 2, F))
    angles = i[:, None] * (-2 * math.log(_BASE) / d * k).exp()
    cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)
    a, b = q.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class TimeAttention(nn.Module):
    """Attention over the frames, position by position, added to h; its last layer starts at zero.

    Args:
        channels, heads: of h; features of a head are even in number.
        dims: axes of a frame.
        skip_scale: the sum's factor.
        groups: of the group norm, which is over one frame.

    Raises:
        ValueError: if a head has an odd number of features, or heads do not divide them.
    """

    def __init__(
        self, channels: int, heads: int, *, dims: int = 2, skip_scale: float = 1.0, groups: int | None = None
    ) -> None:
        super().__init__()
        if channels % (2 * heads):
            raise ValueError(
                f"{channels} features in {heads} heads over time: expected an even number in each, for positions turn "
                "pairs of them"
            )
        self.heads, self.skip_scale = heads, skip_scale
        self.norm, self.qkv = group_norm(channels, groups), conv(dims, channels, 3 * channels, 1)
        self.project = zero(conv(dims, channels, channels, 1))

    def forward(self, h: Tensor, clips: int) -> Tensor:
        """h (B F, C, ...) of `clips` = B clips to the same shape."""
        BF, C, *size = h.shape
        B, F = clips, BF // clips
        qkv = self.qkv(self.norm(h)).reshape(B, F, 3, self.heads, C // self.heads, math.prod(size))
        q, k, v = qkv.permute(2, 0, 5, 3, 1, 4).flatten(1, 2).unbind(0)  # (B pixels, heads, F, d)
        found = attend(turned(q), turned(k), v).reshape(B, -1, self.heads, F, C // self.heads)
        found = self.project(found.permute(0, 3, 2, 4, 1).reshape(BF, C, *size))
        return h + found if self.skip_scale == 1 else self.skip_scale * (h + found)
