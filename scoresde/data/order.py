"""Which items a step shows: an endless sequence of shuffled epochs, cut into batches.

    position p of step s:  p = s B, ..., (s + 1) B - 1;   epoch e = p // N;   item pi_e(p mod N)

with pi_e a permutation drawn from the seed and e alone. So a run goes on in the middle of an epoch without being told
where it stood, and W processes show together what one shows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from scoresde.checks import ArgumentError, check_count, check_whole
from scoresde.noise import derive_seed

__all__ = ["Order"]


@dataclass(frozen=True)
class Order:
    """The items of every step.

    Args:
        n: N, items in all.
        batch_size: B, items a step, on all processes together. Data fewer than that are repeated.
        seed: of the permutations.
        part: (rank, world): of each batch the consecutive share that this process sees, from floor(rank B / world) up
            to floor((rank + 1) B / world).

    Raises:
        ValueError: if a number is out of its range, or there are more processes than items a step.

    >>> one, two = Order(10, 4), [Order(10, 4, part=(rank, 2)) for rank in range(2)]
    >>> one.items(7).tolist() == two[0].items(7).tolist() + two[1].items(7).tolist()
    True
    """

    n: int
    batch_size: int
    seed: int = 0
    part: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        rank, world = self.part
        check_count(n=self.n, batch_size=self.batch_size, world=world)
        check_whole(rank=rank, seed=self.seed)
        if rank >= world:
            raise ArgumentError(f"part={self.part}: expected (rank, world), rank < world")
        if self.batch_size < world:
            raise ArgumentError(
                f"batch_size={self.batch_size} on {world} processes: one of them would have nothing to do"
            )

    def share(self, rank: int, world: int) -> Order:
        """The same order, for one of several processes."""
        return replace(self, part=(rank, world))

    def positions(self, step: int) -> range:
        """Of the step's items in the endless sequence: consecutive numbers, the same on any number of processes.

        Raises:
            ValueError: if step < 0.
        """
        check_whole(step=step)
        (rank, world), first = self.part, step * self.batch_size
        return range(first + rank * self.batch_size // world, first + (rank + 1) * self.batch_size // world)

    def items(self, step: int) -> Tensor:
        """Which items the step shows: int64, one entry a position. An epoch's permutation is drawn once and kept."""
        where = self.positions(step)
        runs = []
        for epoch in range(where.start // self.n, (where.stop - 1) // self.n + 1):
            first = epoch * self.n
            permutation = _permutation(self.n, self.seed, epoch)
            runs.append(permutation[max(where.start - first, 0) : where.stop - first])
        return torch.cat(runs)

    def epochs(self, step: int) -> Tensor:
        """In which epoch each of them is shown: int64, one entry a position."""
        where = self.positions(step)
        return torch.arange(where.start, where.stop, device="cpu") // self.n


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(derive_seed(seed, 0, epoch))
    return torch.randperm(n, generator=generator, device="cpu")
