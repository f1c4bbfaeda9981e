"""What the networks are built of, for data of one, two or three axes, (B, C, n_1, ..., n_dims).

    residual     s (x + conv(SiLU(norm(conv(SiLU(norm(x)))) (1 + scale) + shift))),    (scale, shift) from the embedding
    instance     z_k = gamma_k (x_k - mu_k) / s_k + beta_k + alpha_k (mu_k - m) / v,    gamma, beta, alpha likewise
    attention    s (x + project(softmax(q k^T / sqrt(d)) v))

s is the skip scale; how a block halves and doubles is in `scoresde.nn.sizes`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from scoresde.checks import ArgumentError, check_option
from scoresde.nn.sizes import Double, Edge, Halve, filter_taps

__all__ = [
    "Attention",
    "Double",
    "Encoder",
    "GroupNorm",
    "Halve",
    "InstanceNorm",
    "ResidualBlock",
    "attend",
    "concatenate",
    "conv",
    "filter_taps",
    "group_norm",
    "image_of",
    "shuffle",
    "unshuffle",
    "zero",
]

M = TypeVar("M", bound=nn.Module)


def conv(
    dims: int, inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1
) -> nn.Conv1d | nn.Conv2d | nn.Conv3d:
    """A convolution over `dims` axes, of an odd kernel, that keeps the size or halves it, rounding up. Its taps are
    `dilation` pixels apart: with stride 1 it treats every dilation-th pixel as an image of its own.
    """
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    return kind(inputs, outputs, kernel, stride=stride, padding=dilation * (kernel // 2), dilation=dilation)


def zero(module: M) -> M:
    """The module itself, its parameters set to zero."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


class GroupNorm(nn.GroupNorm):
    """torch's, but for one input: torch 2.13 on the CPU crashes in the backward of a channels-last one that takes no
    gradient itself (a frozen layer's output). That one is made contiguous.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not x.requires_grad and x.device.type == "cpu":
            x = x.contiguous()
        return super().forward(x)


def group_norm(channels: int, groups: int | None = None, eps: float = 1e-5) -> GroupNorm:
    """So many groups; by default at most 32, of at least four channels where the number allows."""
    return GroupNorm(groups or math.gcd(channels, max(1, min(32, channels // 4))), channels, eps=eps)


class InstanceNorm(nn.Module):
    """Conditional instance normalisation++ (Song and Ermon, 2019, appendix A.1):

        z_k = gamma_k (x_k - mu_k) / s_k + beta_k + alpha_k (mu_k - m) / v

    mu_k and s_k are mean and standard deviation of channel k over the pixels, m and v those of the mu_k over the
    channels: without the last term the means of the channels would be lost. gamma = 1 + ..., beta and alpha = 1 + ...
    are affine in the embedding of what the network is told: there a table with a row for each noise level.

    Args:
        channels: of x.
        embedding: width of the embedding.
        eps: added to the variances.
    """

    def __init__(self, channels: int, embedding: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.modulate, self.eps = nn.Linear(embedding, 3 * channels), eps

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x (B, channels, ...) and embedding (B, embedding) to the shape of x."""
        gamma, beta, alpha = _modulation(self.modulate, x, embedding).chunk(3, dim=1)
        mu, pixels = _standardised(x, range(2, x.dim()), self.eps)
        return (1 + gamma) * pixels + beta + (1 + alpha) * _standardised(mu, (1,), self.eps)[1]


def _standardised(x: Tensor, axes: Sequence[int], eps: float) -> tuple[Tensor, Tensor]:
    """The mean over axes, which stay, and x less it over the standard deviation."""
    mean = x.mean(tuple(axes), keepdim=True)
    centred = x - mean
    return mean, centred * (centred.square().mean(tuple(axes), keepdim=True) + eps).rsqrt()


def _modulation(layer: nn.Linear, x: Tensor, embedding: Tensor) -> Tensor:
    """What the layer makes of the embedding, for every pixel of x."""
    found: Tensor = layer(F.silu(embedding))
    return found.reshape(*found.shape, *(x.dim() - 2) * (1,))


# Patches: squares of pixels as channels.


def unshuffle(x: Tensor, patch: int) -> Tensor:
    """(B, C, n_1, ...) to (B, C patch^dims, n_1 / patch, ...): `pixel_unshuffle` for any number of axes.

    Raises:
        ValueError: if patch does not divide the size.
    """
    if patch == 1:
        return x
    size, dims = x.shape[2:], x.dim() - 2
    if any(n % patch for n in size):
        raise ValueError(f"x of size {tuple(size)}: expected multiples of patch={patch}")
    x = x.reshape(*x.shape[:2], *(k for n in size for k in (n // patch, patch)))
    grid, inner = range(2, 2 + 2 * dims, 2), range(3, 3 + 2 * dims, 2)
    return x.permute(0, 1, *inner, *grid).flatten(1, 1 + dims)


def shuffle(x: Tensor, patch: int) -> Tensor:
    """The inverse of `unshuffle`."""
    if patch == 1:
        return x
    size, dims = x.shape[2:], x.dim() - 2
    x = x.reshape(x.shape[0], x.shape[1] // patch**dims, *dims * (patch,), *size)
    x = x.permute(0, 1, *(axis for d in range(dims) for axis in (2 + dims + d, 2 + d)))
    return x.reshape(*x.shape[:2], *(n * patch for n in size))


# Conditioning on an image.


def image_of(x: Tensor, image: Tensor | None, dims: int, channels: int) -> Tensor | None:
    """The image that a network is conditional on, in the dtype of x; None where it takes none.

    Raises:
        ValueError: if x has not `dims` axes, or image is missing, unexpected or of another shape.
    """
    if x.dim() != dims + 2:
        raise ValueError(f"x of shape {tuple(x.shape)}: expected (B, C) and {dims} axes more, as dims={dims}")
    if not channels:
        if image is not None:
            raise ValueError("this network takes no image: build it with image_condition= channels to pass one")
        return None
    expected = (x.shape[0], channels, *x.shape[2:])
    if image is None or image.shape != expected:
        found = "none" if image is None else f"shape {tuple(image.shape)}"
        raise ValueError(f"this network is conditional on an image: pass image= of shape {expected}, not {found}")
    return image.to(x.dtype)


def concatenate(x: Tensor, image: Tensor | None, dims: int, channels: int) -> Tensor:
    """x with the `channels` of image after its own. Errors: `image_of`."""
    image = image_of(x, image, dims, channels)
    return x if image is None else torch.cat([x, image], dim=1)


class Encoder(nn.Module):
    """An image as features: h = conv(image), then residual blocks h + conv(SiLU(norm(conv(SiLU(norm(h)))))), the last
    convolution of each starting at zero.

    Args:
        inputs, outputs: channels of the image and of the features.
        blocks: how many; with none it is one convolution.
        dims: axes of the data.
    """

    def __init__(self, inputs: int, outputs: int, blocks: int, *, dims: int = 2) -> None:
        super().__init__()
        self.inward = conv(dims, inputs, outputs, 3)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                group_norm(outputs),
                nn.SiLU(),
                conv(dims, outputs, outputs, 3),
                group_norm(outputs),
                nn.SiLU(),
                zero(conv(dims, outputs, outputs, 3)),
            )
            for _ in range(blocks)
        )

    def forward(self, image: Tensor) -> Tensor:
        """image (B, inputs, ...) to (B, outputs, ...)."""
        h: Tensor = self.inward(image)
        for block in self.blocks:
            h = h + block(h)
        return h


# Attention


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, q of shape (B, heads, M, d), k and v (B, heads, N, d); over those of the N where
    `mask`, bool, to be broadcast to (B, heads, M, N), is True, one at least.

    By torch's fused kernels, which have no forward-mode derivative: under one it is written out. Nor have they a second
    derivative; where one is wanted, call the network in `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`.
    """
    if forward_ad._current_level < 0:  # no forward-mode derivative is being taken
        return F.scaled_dot_product_attention(q, k, v, mask)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(dim=-1) @ v


class Attention(nn.Module):
    """Self-attention over the pixels, added to x; its last layer starts at zero. eps is that of its group norm."""

    def __init__(
        self,
        channels: int,
        heads: int,
        *,
        dims: int = 2,
        skip_scale: float = 1.0,
        groups: int | None = None,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.heads, self.skip_scale = heads, skip_scale
        self.norm, self.qkv = group_norm(channels, groups, eps), conv(dims, channels, 3 * channels, 1)
        self.project = zero(conv(dims, channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        B, C, *size = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, 3, self.heads, C // self.heads, math.prod(size)).transpose(-1, -2)
        h = attend(*qkv.unbind(1))
        return _scaled(x + self.project(h.transpose(-1, -2).reshape(B, C, *size)), self.skip_scale)


def _scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else factor * x


class ResidualBlock(nn.Module):
    """s (x + conv(SiLU(norm(conv(SiLU(norm(x)))) (1 + scale) + shift))), the last convolution starting at zero.

    Args:
        inputs, outputs: channels of x and of the result.
        embedding: width of the embedding that scale and shift come from; None for a block that is told nothing.
        dropout: probability, before the last convolution.
        dims: axes of the data.
        resample: "down" halves x and the branch before its first convolution, "up" doubles them (BigGAN's blocks).
        fir: the filter for that, or None.
        skip_scale: s.
        norm: "group", or "instance": both norms are `InstanceNorm`, scale and shift their own.
        dilation: of both convolutions.
        additive: the embedding is added before the second norm, conv(SiLU(norm(conv(SiLU(norm(x))) + shift))), as in
            DDPM, DDPM++ and NCSN++, in place of scale and shift after it.
        groups: of both group norms; None for `group_norm`'s own choice.
        project: x passes a convolution of one tap wherever its channels or size change; else where its channels do.
        edge: what the filter meets beyond the edges.
        eps: of the group norms.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        embedding: int | None,
        dropout: float,
        *,
        dims: int = 2,
        resample: Literal["down", "up"] | None = None,
        fir: Sequence[float] | None = None,
        skip_scale: float = 1.0,
        norm: Literal["group", "instance"] = "group",
        dilation: int = 1,
        additive: bool = False,
        groups: int | None = None,
        project: bool = False,
        edge: Edge = "replicate",
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        check_option(("down", "up", None), resample=resample)
        check_option(("group", "instance"), norm=norm)
        self.skip_scale, self.additive = skip_scale, additive
        grouped, width = norm == "group", embedding or 0
        if not grouped and not width:
            raise ArgumentError("norm='instance' is affine in an embedding: give embedding=, its width")
        self.norm1 = group_norm(inputs, groups, eps) if grouped else InstanceNorm(inputs, width)
        self.conv1 = conv(dims, inputs, outputs, 3, dilation=dilation)
        self.modulate = nn.Linear(width, (1 if additive else 2) * outputs) if grouped and width else None
        self.norm2 = group_norm(outputs, groups, eps) if grouped else InstanceNorm(outputs, width)
        self.conv2 = zero(conv(dims, outputs, outputs, 3, dilation=dilation))
        self.dropout = nn.Dropout(dropout)
        kept = inputs == outputs and not (project and resample)
        self.skip = nn.Identity() if kept else conv(dims, inputs, outputs, 1)
        self.resample = None if resample is None else {"down": Halve, "up": Double}[resample](dims, fir, edge)

    def forward(self, x: Tensor, embedding: Tensor | None = None, size: Sequence[int] | None = None) -> Tensor:
        """x (B, inputs, ...) and embedding (B, embedding) to (B, outputs, ...); of that size where it doubles."""
        h = F.silu(_normed(self.norm1, x, embedding))
        if self.resample is not None:
            h, x = self.resample(h, size), self.resample(x, size)
        h = self.conv1(h)
        if self.modulate is None or embedding is None:
            h = _normed(self.norm2, h, embedding)
        elif self.additive:
            h = self.norm2(h + _modulation(self.modulate, x, embedding))
        else:
            scale, shift = _modulation(self.modulate, x, embedding).chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        h = self.conv2(self.dropout(F.silu(h)))
        return _scaled(self.skip(x) + h, self.skip_scale)


def _normed(norm: nn.Module, x: Tensor, embedding: Tensor | None) -> Tensor:
    found: Tensor = norm(x, embedding) if isinstance(norm, InstanceNorm) else norm(x)
    return found
