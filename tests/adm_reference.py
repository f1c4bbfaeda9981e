"""ADM's U-Net as its papers describe it, with the names that its published files have: what writes files for the tests.

Written for the tests from Nichol and Dhariwal (2021) and Dhariwal and Nichol (2021), and as small as it can be: every
layer is a function of the state dict, which is made of the shapes that these functions ask for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def doubled(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


class Adm:
    """net(x, time, y) of flags, in float64, with random weights in `state`, all of them away from zero."""

    def __init__(
        self,
        channels: int = 32,
        mult: Sequence[float] = (1, 2),
        blocks: int = 1,
        attend: Sequence[int] = (1,),
        *,
        image: int = 3,
        given: int = 0,
        outputs: int = 6,
        heads: int = 2,
        head_channels: int | None = None,
        classes: int | None = None,
        scale_shift: bool = True,
        updown: bool = False,
        new_order: bool = False,
        conv2d_attention: bool = False,
        seed: int = 0,
    ) -> None:
        self.channels, self.mult, self.blocks, self.attend = channels, mult, blocks, attend
        self.heads, self.head_channels, self.classes, self.outputs = heads, head_channels, classes, outputs
        self.scale_shift, self.updown, self.new_order, self.kernel = scale_shift, updown, new_order, conv2d_attention
        self.state: dict[str, Tensor] = {}
        self.generator = torch.Generator().manual_seed(seed)
        size = 2 ** len(mult)
        label = None if classes is None else torch.zeros(1, dtype=torch.long)
        self(torch.zeros(1, image + given, size, size, dtype=torch.float64), torch.zeros(1), label)

    def weight(self, name: str, *shape: int) -> Tensor:
        if name not in self.state:
            fan = math.prod(shape[1:]) or 1
            drawn = torch.randn(*shape, generator=self.generator, dtype=torch.float64)
            self.state[name] = 1 + 0.2 * drawn if "norm" in name or len(shape) == 1 else drawn / math.sqrt(fan)
        return self.state[name]

    def linear(self, name: str, x: Tensor, out: int) -> Tensor:
        return F.linear(x, self.weight(f"{name}.weight", out, x.shape[1]), self.weight(f"{name}.bias", out))

    def conv(self, name: str, x: Tensor, out: int, kernel: int = 3, stride: int = 1) -> Tensor:
        weight = self.weight(f"{name}.weight", out, x.shape[1], kernel, kernel)
        return F.conv2d(x, weight, self.weight(f"{name}.bias", out), stride, kernel // 2)

    def norm(self, name: str, x: Tensor) -> Tensor:
        C = x.shape[1]
        return F.group_norm(x, 32, self.weight(f"{name}.weight", C), self.weight(f"{name}.bias", C))

    def residual(self, name: str, x: Tensor, emb: Tensor, out: int, way: str = "") -> Tensor:
        h = F.silu(self.norm(f"{name}.in_layers.0", x))
        if way:
            x, h = (F.avg_pool2d(a, 2) if way == "down" else doubled(a) for a in (x, h))
        h = self.conv(f"{name}.in_layers.2", h, out)
        told = self.linear(f"{name}.emb_layers.1", F.silu(emb), (1 + self.scale_shift) * out)[:, :, None, None]
        if self.scale_shift:
            h = self.norm(f"{name}.out_layers.0", h) * (1 + told[:, :out]) + told[:, out:]
        else:
            h = self.norm(f"{name}.out_layers.0", h + told)
        h = self.conv(f"{name}.out_layers.3", F.silu(h), out)
        return h + (x if x.shape[1] == out else self.conv(f"{name}.skip_connection", x, out, 1))

    def attention(self, name: str, x: Tensor) -> Tensor:
        B, C, *size = x.shape
        H = self.heads if self.head_channels is None else C // self.head_channels
        kernel = (1, 1) if self.kernel else (1,)
        h = self.norm(f"{name}.norm", x).flatten(2)
        rows = self.weight(f"{name}.qkv.weight", 3 * C, C, *kernel).flatten(1) @ h
        rows = rows + self.weight(f"{name}.qkv.bias", 3 * C)[:, None]
        d = C // H
        out = []
        for n in range(H):  # the rows of head n, one head after the other
            q, k, v = (rows[:, (j * H + n if self.new_order else 3 * n + j) * d :][:, :d] for j in range(3))
            out.append(v @ (q.transpose(1, 2) @ k / math.sqrt(d)).softmax(-1).transpose(1, 2))
        h = self.weight(f"{name}.proj_out.weight", C, C, *kernel).flatten(1) @ torch.cat(out, 1)
        return x + (h + self.weight(f"{name}.proj_out.bias", C)[:, None]).reshape(B, C, *size)

    def __call__(self, x: Tensor, time: Tensor, y: Tensor | None = None) -> Tensor:
        base, half = self.channels, self.channels // 2
        angles = time.double()[:, None] * 10_000 ** (-torch.arange(half, dtype=torch.float64) / half)
        emb = self.linear("time_embed.0", torch.cat([angles.cos(), angles.sin()], 1), 4 * base)
        emb = self.linear("time_embed.2", F.silu(emb), 4 * base)
        if self.classes is not None:
            emb = emb + self.weight("label_emb.weight", self.classes, 4 * base)[y]
        widths = [int(m * base) for m in self.mult]
        h = self.conv("input_blocks.0.0", x, widths[0])
        skips, n = [h], 1
        for level, w in enumerate(widths):
            for _ in range(self.blocks):
                h = self.residual(f"input_blocks.{n}.0", h, emb, w)
                h = self.attention(f"input_blocks.{n}.1", h) if level in self.attend else h
                skips.append(h)
                n += 1
            if level < len(widths) - 1:
                name = f"input_blocks.{n}.0"
                h = self.residual(name, h, emb, w, "down") if self.updown else self.conv(f"{name}.op", h, w, stride=2)
                skips.append(h)
                n += 1
        h = self.residual("middle_block.0", h, emb, w)
        h = self.residual("middle_block.2", self.attention("middle_block.1", h), emb, w)
        n = 0
        for level, w in reversed(list(enumerate(widths))):
            for i in range(self.blocks + 1):
                h = self.residual(f"output_blocks.{n}.0", torch.cat([h, skips.pop()], 1), emb, w)
                h = self.attention(f"output_blocks.{n}.1", h) if level in self.attend else h
                if level and i == self.blocks:
                    name = f"output_blocks.{n}.{1 + (level in self.attend)}"
                    if self.updown:
                        h = self.residual(name, h, emb, w, "up")
                    else:
                        h = self.conv(f"{name}.conv", doubled(h), w)
                n += 1
        return self.conv("out.2", F.silu(self.norm("out.0", h)), self.outputs)
