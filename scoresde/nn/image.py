"""An encoder of images: residual blocks level by level, and a linear layer, as the semantic encoder of a diffusion
autoencoder (Preechakul et al., 2022, section 3.1), which is the way down of its U-Net.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from scoresde.checks import check_count, check_option
from scoresde.nn.blocks import Encoder, Halve, group_norm

__all__ = ["ImageEncoder"]


class ImageEncoder(nn.Module):
    """encoder(image) to a vector (B, vector), for `Encoding` say.

    Args:
        vector: its length.
        image_channels: channels of the image.
        channels: features at the finest level.
        multipliers: features of each level as multiples of `channels`; each level is half as fine as the one before.
        blocks: residual blocks per level.
        size: of the images, for one that is to know where things are: the features of all positions of the last level
            go into the vector. By default it is of their mean, for images of any size.
        dims: axes of the data, 1, 2 or 3.

    Raises:
        ValueError: if a number is below 1, there is no level, or a size that is not of the images; by the call, too.
    """

    def __init__(
        self,
        vector: int,
        image_channels: int = 1,
        channels: int = 32,
        multipliers: Sequence[int] = (1, 2, 2),
        blocks: int = 1,
        *,
        size: int | Sequence[int] | None = None,
        dims: int = 2,
    ) -> None:
        super().__init__()
        check_count(vector=vector, image_channels=image_channels, channels=channels, blocks=blocks)
        check_option((1, 2, 3), dims=dims)
        self.size = (size,) * dims if isinstance(size, int) else None if size is None else tuple(size)
        if not multipliers or (self.size is not None and len(self.size) != dims):
            raise ValueError(f"multipliers={multipliers!r}, size={size!r}: expected a level, and {dims} axes")
        widths = [image_channels, *(channels * m for m in multipliers)]
        self.levels = nn.ModuleList(Encoder(a, b, blocks, dims=dims) for a, b in itertools.pairwise(widths))
        self.halve, self.norm = Halve(dims), group_norm(widths[-1])
        n = 1 if self.size is None else math.prod(-(-side // 2 ** (len(multipliers) - 1)) for side in self.size)
        self.outward = nn.Linear(n * widths[-1], vector)

    def forward(self, image: Tensor) -> Tensor:
        """image (B, image_channels, n_1, ...) to (B, vector)."""
        if self.size is not None and tuple(image.shape[2:]) != self.size:
            raise ValueError(f"image of shape {tuple(image.shape)}: this encoder is for size={self.size}")
        h = image
        for i, level in enumerate(self.levels):
            h = level(self.halve(h) if i else h)
        h = F.silu(self.norm(h)).flatten(2)
        found: Tensor = self.outward(h.mean(2) if self.size is None else h.flatten(1))
        return found
