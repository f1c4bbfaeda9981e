"""A residual MLP for vectors and other small events."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from scoresde.checks import check_count
from scoresde.nn.embedding import TimeEmbedding

__all__ = ["MLP"]


class MLP(nn.Module):
    """net(x, time, label=None, vector=None) for an event of any shape, flattened.

    Each of `depth` residual blocks adds Linear(SiLU(Linear(norm(h)) + time)) to h. The last layer starts at zero.
    With an event of 2 numbers, width 128 and depth 3 it has 0.2 million parameters.

    Args:
        event_shape: shape of one sample, an int or a tuple.
        width: hidden features, even.
        depth: number of residual blocks.
        num_classes: number of classes, or None.
        vector: length of the vector that it is conditional on, or None.
        fourier: scale of Gaussian time frequencies, or None for sinusoidal features; see `TimeEmbedding`.

    Raises:
        ValueError: unless width is even and positive, and the other numbers are >= 1.
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        width: int = 128,
        depth: int = 3,
        num_classes: int | None = None,
        *,
        vector: int | None = None,
        fourier: float | None = None,
    ) -> None:
        super().__init__()
        check_count(depth=depth)
        self.event_shape = (event_shape,) if isinstance(event_shape, int) else tuple(event_shape)
        size = math.prod(self.event_shape)
        self.time = TimeEmbedding(width, num_classes=num_classes, vector=vector, fourier=fourier)
        self.inward, self.outward = nn.Linear(size, width), nn.Linear(width, size)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(width),
                    "first": nn.Linear(width, width),
                    "time": nn.Linear(width, width),
                    "second": nn.Linear(width, width),
                }
            )
            for _ in range(depth)
        )
        nn.init.zeros_(self.outward.weight)
        nn.init.zeros_(self.outward.bias)

    @property
    def condition_sizes(self) -> dict[str, int]:
        """What it can be told: the name of each condition, with the number of classes or of entries."""
        return self.time.condition_sizes

    def forward(
        self, x: Tensor, time: Tensor, label: Tensor | int | None = None, vector: Tensor | None = None
    ) -> Tensor:
        """x (B, *event_shape), time (B,), label (B,) and vector (B, length) to the shape of x."""
        embedding = self.time(time, label, vector)
        h = self.inward(x.reshape(x.shape[0], -1))
        for block in self.blocks:
            assert isinstance(block, nn.ModuleDict)
            inner = block["first"](block["norm"](h)) + block["time"](embedding)
            h = h + block["second"](nn.functional.silu(inner))
        return self.outward(h).reshape(x.shape)
