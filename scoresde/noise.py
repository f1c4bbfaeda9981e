"""Noise sources: where x_T and the z_i of a solver come from. The global generator is never touched.

With seeds, each sample has its own stream, so sample i is the same alone, in any batch and on any number of processes.
With a generator the whole batch is drawn at once, which is faster where the network is small and the batch large.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from scoresde.sde import SDE

__all__ = ["GeneratorNoise", "NoiseSource", "SeededNoise", "sample_seeds"]

NoiseSource = Callable[[int, Tensor], Tensor]
"""noise(row, x): standard normal of the shape, dtype and device of x for that row of the tableau."""

_BLOCK = 2**9  # numbers that a sample's stream draws at a time: one call for many rows of a small event


def sample_seeds(seed: int, n: int) -> list[int]:
    """The seeds of samples 0..n-1 under one integer seed: `sample(..., seed=7)[i]` is `seed=[sample_seeds(7, n)[i]]`.

    >>> sample_seeds(7, 3)[:2] == sample_seeds(7, 2)
    True
    """
    return [derive_seed(seed, i) for i in range(n)]


def derive_seed(seed: int, *key: int) -> int:
    """A seed for the stream named by key under `seed`: a hash, so that nearby seeds and keys give unrelated streams."""
    return int(np.random.SeedSequence(entropy=seed, spawn_key=key).generate_state(1, np.uint64)[0] >> np.uint64(1))


class GeneratorNoise:
    """Noise for the whole batch from one generator, on the generator's device."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._start = generator.get_state()

    @classmethod
    def fresh(cls, device: torch.device) -> GeneratorNoise:
        """From a generator seeded by the operating system."""
        return cls(torch.Generator(device).manual_seed(secrets.randbits(63)))

    def prior(self, sde: SDE, shape: Sequence[int], dtype: torch.dtype, t: float) -> Tensor:
        x_T = sde.prior(shape, self._generator, dtype, t=t)
        self._start = self._generator.get_state()
        return x_T

    def __call__(self, row: int, x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=self._generator, dtype=x.dtype, device=x.device)

    def rewind(self) -> None:
        """Back to before the first z_i, to replay a run."""
        self._generator.set_state(self._start)


class SeededNoise:
    """A stream for each sample: one for its x_T, another for its z_i (so that a user who passes x_T drawn from the same
    seed does not see it again as noise).

    Args:
        seeds: one per sample, each >= 0.
        device: where to draw; CPU and GPU streams of the same seed differ.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.seeds, self.device = list(seeds), device
        self.rewind()

    def rewind(self) -> None:
        """Back to the first draw, to replay a run."""
        self._generators: list[torch.Generator] = []
        self._block: Tensor | None = None
        self._used = 0

    def prior(self, sde: SDE, shape: Sequence[int], dtype: torch.dtype, t: float) -> Tensor:
        return torch.cat([sde.prior((1, *shape[1:]), g, dtype, t=t) for g in self._streams(0)])

    def __call__(self, row: int, x: Tensor) -> Tensor:
        if not self._generators:
            self._generators = self._streams(1)
        # The block's length depends on the event alone: a stream must not depend on the batch or the number of rows.
        if self._block is None or self._used == self._block.shape[1]:
            length = max(1, _BLOCK // max(1, x[0].numel()))
            self._block, self._used = x.new_empty(len(x), length, *x.shape[1:]), 0
            for block, generator in zip(self._block, self._generators, strict=True):
                block.normal_(generator=generator)
        self._used += 1
        return self._block[:, self._used - 1]

    def _streams(self, stream: int) -> list[torch.Generator]:
        return [torch.Generator(self.device).manual_seed(derive_seed(s, stream)) for s in self.seeds]
