"""Networks of floating-point data as networks of whole states: states enter as channels, one each, and the network's
output is their logits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde.checks import ArgumentError, check_count
from scoresde.networks import first_parameter

__all__ = ["Columns", "OneHot"]


class OneHot(nn.Module):
    """net(x, time, **cond) of whole states x (B, ...), to logits (B, ..., K), around a network for (B, C, ...).

    Without channels, a sequence (B, L) becomes (B, K, L); with them, an image (B, C, H, W) becomes (B, C K, H, W).
    Each state is 1 in its channel, and -1 in others where K is 2, else 0, times sqrt(K - 1): mean square 1 or so.

    Args:
        net: the network: `MLP((K, L))`, `DiT(image_channels=K, dims=1)`, `UNet(image_channels=C * K)`, ...
        states: K, with the mask if there is one (`CategoricalProcess.size`).
        channels: whether x has an axis of channels.

    >>> from scoresde.nn import MLP
    >>> OneHot(MLP((3, 5), width=8), 3)(torch.zeros(2, 5, dtype=torch.long), torch.ones(2)).shape
    torch.Size([2, 5, 3])
    """

    def __init__(self, net: nn.Module, states: int, *, channels: bool = False) -> None:
        super().__init__()
        check_count(states=states)
        self.net, self.states, self.channels = net, states, channels

    @property
    def condition_sizes(self) -> dict[str, int]:
        """What the network can be told."""
        return dict(getattr(self.net, "condition_sizes", {}))

    def forward(self, x: Tensor, time: Tensor, **cond: Any) -> Tensor:
        """x (B, ...) and time (B,) to logits (B, ..., K)."""
        dtype = getattr(first_parameter(self.net), "dtype", torch.float32)
        hot = F.one_hot(x, self.states).to(dtype).movedim(-1, 1)
        seen = 2 * hot - 1 if self.states == 2 else hot * math.sqrt(self.states - 1)
        out: Tensor = self.net(seen.transpose(1, 2).flatten(1, 2) if self.channels else seen, time, **cond)
        out = out.unflatten(1, (x.shape[1], self.states)).transpose(1, 2) if self.channels else out
        return out.movedim(1, -1)


class Columns(nn.Module):
    """net(x, states, time, **cond) of vectors with columns of both kinds, for a `ProductDenoiser`, around a network for
    vectors: `MLP(Columns.size(n, m, K))`.

    Args:
        net: of vectors of n + m K numbers.
        categorical: m, columns of whole states.
        states: K, of each, with the mask if there is one.

    >>> from scoresde.nn import MLP
    >>> net = Columns(MLP(2 + 3 * 4, width=8), categorical=3, states=4)
    >>> y, logits = net(torch.zeros(5, 2), torch.zeros(5, 3, dtype=torch.long), torch.ones(5))
    >>> y.shape, logits.shape
    (torch.Size([5, 2]), torch.Size([5, 3, 4]))
    """

    def __init__(self, net: nn.Module, *, categorical: int, states: int) -> None:
        super().__init__()
        check_count(categorical=categorical, states=states)
        self.net, self.categorical, self.states = net, categorical, states

    @property
    def condition_sizes(self) -> dict[str, int]:
        """What the network can be told."""
        return dict(getattr(self.net, "condition_sizes", {}))

    def forward(self, x: Tensor, states: Tensor, time: Tensor, **cond: Any) -> tuple[Tensor, Tensor]:
        """x (B, n), states (B, m) and time (B,) to (B, n) and logits (B, m, K)."""
        if x.ndim != 2 or states.shape[1:] != (self.categorical,):
            raise ArgumentError(f"x {tuple(x.shape)} and states {tuple(states.shape)}: expected (B, n) and (B, "
                                f"{self.categorical})")  # fmt: skip
        hot = F.one_hot(states, self.states).to(x) * math.sqrt(self.states - 1)
        out = self.net(torch.cat([x, hot.flatten(1)], 1), time, **cond)
        return out[:, : x.shape[1]], out[:, x.shape[1] :].unflatten(1, (self.categorical, self.states))
