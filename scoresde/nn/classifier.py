"""A classifier of noisy images: the way down of a U-Net, its means over the pixels, and a linear layer, as the one that
guides in Dhariwal and Nichol (2021, "Diffusion models beat GANs on image synthesis", section 4), which pools by
attention.
"""

from __future__ import annotations

import itertools
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

    Raises:
        ValueError: if an option is not one of those, or there is no level.
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
        widths = [channels, *(channels * m for m in multipliers for _ in range(blocks))]
        self.blocks = blocks
        self.time = TimeEmbedding(channels, fourier=fourier)
        self.inward = conv(dims, image_channels, channels, 3)
        self.down = nn.ModuleList(
            ResidualBlock(a, b, channels, dropout, dims=dims) for a, b in itertools.pairwise(widths)
        )
        self.halve = Halve(dims)
        self.norm, self.outward = group_norm(widths[-1]), nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x (B, image_channels, H, W) and time (B,) to logits (B, classes)."""
        embedding, h = self.time(time), self.inward(x)
        for i, block in enumerate(self.down):
            h = block(self.halve(h) if i and i % self.blocks == 0 else h, embedding)
        return self.outward(F.silu(self.norm(h)).flatten(2).mean(2))
