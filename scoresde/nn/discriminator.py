"""A discriminator of patches (Isola et al., 2017, "Image-to-image translation with conditional adversarial networks",
section 3.2 and appendix 6.1.2): convolutions of kernel 4 that halve, with leaky ReLUs, to one logit for each place,
whose convolutions see a patch of the image. With three layers that halve a patch has 70 pixels an axis, with two 34.

The norms are of groups, over all places of an item, not of the batch: the logits of an item are the same alone and in
any batch.
"""

from __future__ import annotations

from torch import Tensor, nn

from scoresde.checks import ArgumentError, check_count, check_option
from scoresde.nn.blocks import group_norm

__all__ = ["PatchDiscriminator"]


class PatchDiscriminator(nn.Module):
    """Data (B, C, n_1, ...) to logits (B, 1, m_1, ...), high where it is taken for real.

    Args:
        image_channels: C.
        channels: features of the first layer, doubled by each of the next ones up to eight times.
        layers: that halve.
        dims: axes of the data, 1, 2 or 3.

    Raises:
        ValueError: if a number is out of its range; by the call, on data of less than 3 * 2^layers an axis, of which no
            logit is left.
    """

    def __init__(self, image_channels: int = 3, channels: int = 64, layers: int = 3, *, dims: int = 2) -> None:
        super().__init__()
        check_count(image_channels=image_channels, channels=channels, layers=layers)
        check_option((1, 2, 3), dims=dims)
        self.smallest = 3 * 2**layers
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        widths = [image_channels, *(channels * min(2**i, 8) for i in range(layers + 1))]
        body: list[nn.Module] = []
        for i in range(layers + 1):
            body.append(kind(widths[i], widths[i + 1], 4, stride=2 if i < layers else 1, padding=1, bias=i == 0))
            body += [nn.LeakyReLU(0.2)] if i == 0 else [group_norm(widths[i + 1]), nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*body, kind(widths[-1], 1, 4, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        if min(x.shape[2:]) < self.smallest:
            raise ArgumentError(
                f"data {tuple(x.shape[1:])}: a discriminator takes 3 * 2^layers = {self.smallest} an axis at least; "
                "give it fewer layers"
            )
        logits: Tensor = self.body(x)
        return logits
