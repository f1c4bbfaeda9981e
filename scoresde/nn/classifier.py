"""A classifier of noisy images: the way down of a U-Net, its means over the pixels, and a linear layer, as the one that
guides in Dhariwal and Nichol (2021, "Diffusion models beat GANs on image synthesis", section 4), which pools by
attention.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from scoresde.checks import check_count, check_option
from scoresde.nn.blocks import Halve, ResidualBlock, conv, group_norm
from scoresde.nn.embedding import TimeEmbedding

__all__ = ["NoisyClassifier"]


class NoisyClassifier(nn.Module):
    """net(x, time) to logits (B, classes): what `classifier_loss` trains and `Classifier` is guided by.

    With the defaults and 10 classes it has 0.1 million parameters.

    Args:
        classes: how many.
        image_channels: channels of x.
        channels: features at the finest level, even.
        multipliers: features of each level as multiples of `channels`; each level is half as fine as the one before.
        blocks: residual blocks per level.
        dropout: probability in each residual block.
        dims: axes of the data, 1, 2 or 3.
        fourier: scale of Gaussian time frequencies, or None for sinusoidal features; see `TimeEmbedding`.
        size: of the data, for one that is to know where things are: the features of all positions of the last level
            go into the logits. By default those of their mean do, for data of any size.

    Raises:
        ValueError: if an option is not one of those, or there is no level; by the call, if x is of another size.
    """

    def __init__(
        self,
        classes: int,
        image_channels: int = 1,
        channels: int = 32,
        multipliers: Sequence[int] = (1, 2),
        blocks: int = 1,
        dropout: float = 0.0,
        *,
        dims: int = 2,
        fourier: float | None = None,
        size: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check_count(classes=classes, image_channels=image_channels, channels=channels, blocks=blocks)
        check_option((1, 2, 3), dims=dims)
        if not 0 <= dropout < 1 or not multipliers:
            raise ValueError(f"dropout={dropout}, multipliers={multipliers!r}: expected a probability below 1, a level")
        self.options = {
            "classes": classes,
            "image_channels": image_channels,
            "channels": channels,
            "multipliers": list(multipliers),
            "blocks": blocks,
            "dropout": dropout,
            "dims": dims,
            "fourier": fourier,
        }
        self.size = (size,) * dims if isinstance(size, int) else None if size is None else tuple(size)
        if self.size is not None:  # classifiers of before are without
            self.options["size"] = list(self.size)
        widths = [channels, *(channels * m for m in multipliers for _ in range(blocks))]
        self.blocks = blocks
        self.time = TimeEmbedding(channels, fourier=fourier)
        self.inward = conv(dims, image_channels, channels, 3)
        self.down = nn.ModuleList(
            ResidualBlock(a, b, channels, dropout, dims=dims) for a, b in itertools.pairwise(widths)
        )
        self.halve = Halve(dims)
        positions = 1
        if self.size is not None:
            if len(self.size) != dims:
                raise ValueError(f"size={size!r}: expected {dims} axes")
            positions = math.prod(-(-side // 2 ** (len(multipliers) - 1)) for side in self.size)
        self.norm, self.outward = group_norm(widths[-1]), nn.Linear(positions * widths[-1], classes)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x (B, image_channels, H, W) and time (B,) to logits (B, classes)."""
        if self.size is not None and tuple(x.shape[2:]) != self.size:
            raise ValueError(f"x of shape {tuple(x.shape)}: this classifier is for size={self.size}")
        embedding, h = self.time(time), self.inward(x)
        for i, block in enumerate(self.down):
            h = block(self.halve(h) if i and i % self.blocks == 0 else h, embedding)
        h = F.silu(self.norm(h)).flatten(2)
        return self.outward(h.mean(2) if self.size is None else h.flatten(1))
