"""Averaged weights, from those after the first step on: after n more steps

average <- d_n average + (1 - d_n) weights,    d_n = min(decay, (1 + n) / (10 + n)),    or as `power` has it
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from scoresde.networks import in_eval_mode
from scoresde.training.parallel import local

__all__ = ["Average", "exponential", "in_place_of", "local_tensors", "tensors"]


class Average:
    """A network with averaged weights and buffers. Sharded ones are averaged shard by shard.

    torch's `AveragedModel` holds n in a tensor and reads it each step, which would make the host wait for a GPU: here
    n is given.

    Args:
        module: a copy of the network, for the averages.
        kept: the share of the average that stays, d_n, by n, the number of updates before.

    Attributes:
        module: the averaged network.
    """

    def __init__(self, module: nn.Module, kept: Callable[[int], float]) -> None:
        self.module, self.kept = module, kept

    @torch.no_grad()
    def update(self, net: nn.Module, n: int) -> None:
        """Take the weights in, n updates having been made before."""
        floats: tuple[list[Tensor], list[Tensor]] = ([], [])
        for mine, theirs in zip(local_tensors(self.module), local_tensors(net), strict=True):
            if n > 0 and mine.is_floating_point():
                floats[0].append(mine)
                floats[1].append(theirs)
            else:
                mine.copy_(theirs)
        if floats[0]:
            torch._foreach_lerp_(*floats, 1 - self.kept(n))


def exponential(decay: float, n: int) -> float:
    """min(decay, (1 + n) / (10 + n))."""
    return min(decay, (1 + n) / (10 + n))


@contextmanager
def in_place_of(net: nn.Module, other: nn.Module) -> Iterator[None]:
    """Give a network the other's weights and eval mode, and at the end its own back, to the last bit, whatever happens
    inside."""
    kept = [x.detach().clone() for x in local_tensors(net)]
    with in_eval_mode(net):
        try:
            _copy(net, local_tensors(other))
            yield
        finally:
            _copy(net, iter(kept))


def tensors(net: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, each once."""
    return itertools.chain(net.parameters(), net.buffers())


def local_tensors(net: nn.Module) -> Iterator[Tensor]:
    """Those, as this process holds them."""
    return map(local, tensors(net))


@torch.no_grad()
def _copy(net: nn.Module, values: Iterator[Tensor]) -> None:
    for mine, value in zip(local_tensors(net), values, strict=True):
        mine.detach().copy_(value)
