"""x = (2 k - (L - 1)) / (L - 1): level k of L, the lowest at -1 and the highest at 1."""

from __future__ import annotations

from torch import Tensor

__all__ = ["scaled"]


def scaled(k: Tensor, levels: int = 256) -> Tensor:
    """The levels in float32, in [-1, 1], both ends exactly; it rounds but once. Their bins fill
    `outer_edges(-1, 1, levels)` (`scoresde.likelihood.discrete`).

    Args:
        k: integers, 0 to levels - 1, of any shape; not changed.
        levels: L, how many there are, at least 2.

    Raises:
        ValueError: if there are fewer.

    >>> import torch
    >>> scaled(torch.tensor([0, 8, 16]), levels=17)
    tensor([-1.,  0.,  1.])
    """
    if levels < 2:
        raise ValueError(f"levels={levels}: expected a whole number >= 2")
    return k.float().mul_(2).sub_(levels - 1).div_(levels - 1)
