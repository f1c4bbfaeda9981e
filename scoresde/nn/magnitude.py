"""EDM2's network, whose layers preserve magnitudes (Karras et al., 2024, "Analyzing and improving the training dynamics
of diffusion models", appendix B and figure 21): of entries of size one each makes entries of size one.

    normalised(a)   = a / (1e-4 + |a|),  |a| the root of the mean square, over all axes of an output's weights
    layer(x; g)     = (g normalised(w) / sqrt(fan-in)) x                   eqs. 47 and 66, without bias
    silu(x)         = x sigmoid(x) / 0.596                                 eq. 81
    sum(a, b; t)    = ((1 - t) a + t b) / sqrt((1 - t)^2 + t^2)            eq. 88
    cat(a, b)       = sqrt((Na + Nb) / 2) [a / sqrt(Na), b / sqrt(Nb)]     eq. 103, t = 1/2
    features(c)_k   = sqrt(2) cos(w_k c + phi_k)                           eq. 75

The weights are normalised wherever they are used. In training EDM2 does so to the parameters themselves, too, after
each step (eq. 66, forced weight normalisation), which keeps the step size in proportion: this class leaves it to the
loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde.checks import check_count, check_option
from scoresde.nn.blocks import attend
from scoresde.nn.embedding import check_label, onehot
from scoresde.nn.sizes import Double, Halve
from scoresde.tensors import placed

__all__ = ["MagnitudeUNet"]


def _normalised(x: Tensor, axes: Sequence[int]) -> Tensor:
    """x over its root mean square along axes, computed in float32 or better."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return x / (1e-4 + wide.square().mean(tuple(axes), keepdim=True).sqrt()).to(x.dtype)


def _silu(x: Tensor) -> Tensor:
    return F.silu(x) / 0.596


def _sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    return a.lerp(b, t) / math.hypot(1 - t, t)


def _cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    Na, Nb = a.shape[1], b.shape[1]
    C = math.sqrt((Na + Nb) / ((1 - t) ** 2 + t**2))
    return torch.cat([C * (1 - t) / math.sqrt(Na) * a, C * t / math.sqrt(Nb) * b], dim=1)


class _Layer(nn.Module):
    """A convolution of `kernel` taps an axis, or a dense layer for dims = 0; without bias."""

    def __init__(self, inputs: int, outputs: int, dims: int, kernel: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, *dims * (kernel,)))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        w = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        w = (_normalised(w, range(1, w.dim())) * (gain / math.sqrt(w[0].numel()))).to(x.dtype)
        if w.dim() == 2:
            return F.linear(x, w)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[w.dim() - 3]
        return convolve(x, w, padding=w.shape[-1] // 2)


class _Features(nn.Module):
    """`features`; w and phi are buffers, drawn from seed 0, and stay in float32."""

    frequencies: Tensor
    phases: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        options: dict[str, Any] = {"generator": generator, "device": "cpu", "dtype": torch.float32}
        self.register_buffer("frequencies", placed(2 * math.pi * torch.randn(features, **options)))
        self.register_buffer("phases", placed(2 * math.pi * torch.rand(features, **options)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Features:
        kept = {name: buffer for name, buffer in self.named_buffers() if not buffer.is_meta}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self

    def forward(self, c: Tensor) -> Tensor:
        c = c.to(torch.promote_types(c.dtype, torch.float32))
        return (c[:, None] * self.frequencies + self.phases).cos() * math.sqrt(2)


class _Block(nn.Module):
    """Figure 21: on the way down ("enc") x is normalised, at each pixel, before the branch leaves it."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        embedding: int,
        way: Literal["enc", "dec"],
        heads: int,
        *,
        dims: int,
        resample: Literal["down", "up"] | None = None,
        fir: Sequence[float] | None,
        dropout: float,
        balance: tuple[float, float],
        clip: float | None,
    ) -> None:
        super().__init__()
        self.way, self.heads, self.balance, self.clip = way, heads, balance, clip
        self.resample = None if resample is None else {"down": Halve, "up": Double}[resample](dims, fir, "zero")
        self.gain = nn.Parameter(torch.zeros([]))
        self.conv1 = _Layer(outputs if way == "enc" else inputs, outputs, dims)
        self.modulate = _Layer(embedding, outputs, 0)
        self.conv2, self.dropout = _Layer(outputs, outputs, dims), nn.Dropout(dropout)
        self.skip = None if inputs == outputs else _Layer(inputs, outputs, dims, 1)
        self.qkv = _Layer(outputs, 3 * outputs, dims, 1) if heads else None
        self.project = _Layer(outputs, outputs, dims, 1) if heads else None

    def forward(self, x: Tensor, embedding: Tensor, size: Sequence[int] | None = None) -> Tensor:
        if self.resample is not None:
            x = self.resample(x, size)
        if self.way == "enc":
            x = _normalised(x if self.skip is None else self.skip(x), [1])
        scale = 1 + self.modulate(embedding, self.gain)
        h = self.conv1(_silu(x)) * scale.reshape(*scale.shape, *(x.dim() - 2) * (1,))
        h = self.conv2(self.dropout(_silu(h)))
        if self.way == "dec" and self.skip is not None:
            x = self.skip(x)
        x = _sum(x, h, self.balance[0])
        if self.qkv is not None and self.project is not None:
            B, C, *pixels = x.shape
            parts = self.qkv(x).reshape(B, self.heads, C // self.heads, 3, math.prod(pixels))
            q, k, v = _normalised(parts, [2]).transpose(2, 4).unbind(3)
            x = _sum(x, self.project(attend(q, k, v).transpose(-1, -2).reshape(x.shape)), self.balance[1])
        return x if self.clip is None else x.clamp(-self.clip, self.clip)


class MagnitudeUNet(nn.Module):
    """net(x, time, label=None) for data (B, image_channels, H, W), or of one or three axes, time being ln(sigma) / 4.
    Its output starts at zero.

    >>> net = MagnitudeUNet(3, 16, (1, 2), blocks=1, attention=(1,), num_classes=10)
    >>> net(torch.zeros(2, 3, 8, 8), torch.tensor([-1.0, 1.0]), torch.tensor([3, 10])).shape  # 10: no class
    torch.Size([2, 3, 8, 8])

    Args:
        image_channels: of x and of the result.
        channels, multipliers: features of the finest level, and what they are times at each.
        blocks: a level on the way down; one more on the way up.
        attention: the levels with attention, 0 being the finest; in the middle there always is. Each head has
            `head_channels` features.
        dropout: probability in each block.
        num_classes: K, or None. Label K, or none, is the null class: its onehot is zero.
        dims: axes of the data.
        features, embedding: widths of the features of c, and of what the blocks are told; those of the first and of
            the widest level by default.
        fir: the filter that halves and doubles, or None: means, and nearest neighbours.
        balance: t of the sums of a block: of its branch, and of its attention.
        label_balance, concat_balance: t of the class's embedding, and of what comes across.
        clip: the largest entry that leaves a block, or None.

    Raises:
        ValueError: if an argument leaves its range.
    """

    def __init__(
        self,
        image_channels: int = 3,
        channels: int = 192,
        multipliers: Sequence[int] = (1, 2, 3, 4),
        blocks: int = 3,
        attention: Sequence[int] = (2, 3),
        dropout: float = 0.0,
        num_classes: int | None = None,
        *,
        dims: int = 2,
        head_channels: int = 64,
        features: int | None = None,
        embedding: int | None = None,
        fir: Sequence[float] | None = None,
        balance: tuple[float, float] = (0.3, 0.3),
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        clip: float | None = 256.0,
    ) -> None:
        super().__init__()
        check_count(image_channels=image_channels, channels=channels, blocks=blocks, head_channels=head_channels)
        check_option((1, 2, 3), dims=dims)
        widths = [channels * m for m in multipliers]
        if not widths or any(level not in range(len(widths)) for level in attention):
            raise ValueError(
                f"attention at levels {tuple(attention)} of a U-Net with {len(widths)} levels: expected one level or "
                "more, of which 0 is the finest"
            )
        features, embedding = features or widths[0], embedding or max(widths)
        self.dims, self.label_balance, self.concat_balance = dims, label_balance, concat_balance
        self.features, self.noise = _Features(features), _Layer(features, embedding, 0)
        self.classes = None if num_classes is None else _Layer(num_classes, embedding, 0)
        self.inward = _Layer(image_channels + 1, widths[0], dims)
        common: dict[str, Any] = {"dims": dims, "fir": fir, "dropout": dropout, "balance": balance, "clip": clip}

        def block(inputs: int, outputs: int, way: Literal["enc", "dec"], attend: bool = False, **own: Any) -> _Block:
            heads = max(1, outputs // head_channels) if attend else 0
            return _Block(inputs, outputs, embedding, way, heads, **common, **own)

        self.shrink, self.down, self.grow, self.up = (nn.ModuleList() for _ in range(4))
        skips, width = [widths[0]], widths[0]
        for n, w in enumerate(widths):
            if n:
                self.shrink.append(block(width, width, "enc", resample="down"))
                skips.append(width)
            for _ in range(blocks):
                self.down.append(block(width, w, "enc", n in attention))
                width = w
                skips.append(width)
        self.middle = nn.ModuleList([block(width, width, "dec", True), block(width, width, "dec")])
        for n, w in reversed(list(enumerate(widths))):
            if n < len(widths) - 1:
                self.grow.append(block(width, width, "dec", resample="up"))
            for _ in range(blocks + 1):
                self.up.append(block(width + skips.pop(), w, "dec", n in attention))
                width = w
        self.blocks = blocks
        self.outward, self.gain = _Layer(width, image_channels, dims), nn.Parameter(torch.zeros([]))

    @property
    def condition_sizes(self) -> dict[str, int]:
        """What it can be told: the name of each condition, with the number of classes."""
        return {} if self.classes is None else {"label": self.classes.weight.shape[1]}

    def forward(self, x: Tensor, time: Tensor, label: Tensor | int | None = None) -> Tensor:
        """x (B, image_channels, H, W), time (B,) and label (B,) to the shape of x.

        Raises:
            ValueError: if x has not `dims` axes, or label is unexpected, or of another shape.
        """
        if x.dim() != self.dims + 2:
            raise ValueError(f"x of shape {tuple(x.shape)}: expected (B, C) and {self.dims} axes more")
        check_label(label, time, self.classes is not None)
        embedding = self.noise(self.features(time).to(x.dtype))
        if self.classes is not None:
            K = self.classes.weight.shape[1]
            row = onehot(label, time, K, x.dtype)
            embedding = _sum(embedding, self.classes(row * math.sqrt(K)), self.label_balance)
        embedding = _silu(embedding)
        h = self.inward(torch.cat([x, torch.ones_like(x[:, :1])], dim=1))
        skips = [h]
        for i, block in enumerate(self.down):
            if i and i % self.blocks == 0:
                h = self.shrink[i // self.blocks - 1](h, embedding)
                skips.append(h)
            h = block(h, embedding)
            skips.append(h)
        for block in self.middle:
            h = block(h, embedding)
        for i, block in enumerate(self.up):
            if i and i % (self.blocks + 1) == 0:
                h = self.grow[i // (self.blocks + 1) - 1](h, embedding, skips[-1].shape[2:])
            h = block(_cat(h, skips.pop(), self.concat_balance), embedding)
        out: Tensor = self.outward(h, self.gain)
        return out
