"""What a network is told beside x: the time label, and optionally a class."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["TimeEmbedding"]


class TimeEmbedding(nn.Module):
    """Sinusoidal features of the time label (Vaswani et al., 2017; Ho et al., 2020) and an optional class, through an
    MLP of two layers.

    The angles are computed in float32 or better whatever the network's dtype: rounded to bfloat16, 999 and 1000 are
    one number.

    Args:
        features: width of the result.
        max_period: the longest period; labels up to about a tenth of it are told apart. With labels in [0, 1000], as
            999 t, the default is DDPM's.
        num_classes: number of classes, or None for an unconditional network.

    Raises:
        ValueError: unless features is even and positive; by the call, if a label is missing, unexpected, or not one
            integer per sample.
    """

    def __init__(self, features: int, max_period: float = 10_000.0, num_classes: int | None = None) -> None:
        super().__init__()
        if features < 2 or features % 2:
            raise ValueError(f"features={features}: expected an even number >= 2")
        self.log_step = -math.log(max_period) / (features // 2)
        self.inward, self.outward = nn.Linear(features, features), nn.Linear(features, features)
        self.classes = None if num_classes is None else nn.Embedding(num_classes, features)

    def angles(self, time: Tensor) -> Tensor:
        """time (B,) times the frequencies max_period^(-2 k / features), (B, features / 2)."""
        time = time.to(torch.promote_types(time.dtype, torch.float32))
        k = torch.arange(self.inward.in_features // 2, dtype=time.dtype, device=time.device)
        return time[:, None] * (self.log_step * k).exp()

    def forward(self, time: Tensor, label: Tensor | int | None = None) -> Tensor:
        """time (B,) and label, an integer or integers (B,), to (B, features)."""
        if (label is None) != (self.classes is None):
            raise ValueError(
                "this network is conditional on a class: pass label=, shape (B,)"
                if label is None
                else "this network has no classes: build it with num_classes= to pass a label"
            )
        angles = self.angles(time)
        features = torch.cat([angles.cos(), angles.sin()], dim=1)
        features = self.outward(nn.functional.silu(self.inward(features.to(self.inward.weight.dtype))))
        if label is None or self.classes is None:
            return features
        label = torch.as_tensor(label, device=time.device)
        if label.shape not in ((), (1,), time.shape) or label.is_floating_point():
            found = f"{label.dtype} of shape {tuple(label.shape)}"
            raise ValueError(f"label is {found}: expected integers {tuple(time.shape)}, or one for all")
        label = label.expand(time.shape)
        return features + self.classes(label)
