"""Noise sources: where x_T and the z_i of a solver come from. The global generator is never touched.

With seeds, each sample has its own stream, so sample i is the same alone, in any batch and on any number of processes.
With a generator the whole batch is drawn at once, which is faster where the network is small and the batch large.
"""

from __future__ import annotations

import math
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from scoresde.checks import ArgumentError
from scoresde.counter import derived, normal, words
from scoresde.sde import SDE
from scoresde.tensors import check_batch, check_device, drawn_from

__all__ = [
    "CounterNoise",
    "FunctionNoise",
    "GeneratorNoise",
    "Noise",
    "NoiseSource",
    "SeededNoise",
    "as_source",
    "noise_source",
    "sample_seeds",
    "seeds_of",
    "stream_seeds",
]

Noise = Callable[[int, Tensor], Tensor]
"""noise(row, x): standard normal of the shape, dtype and device of x for that row of the tableau."""

_FEW = 16  # seeds below which numpy's own hash of one is the faster
_BLOCK = 2**9  # numbers that a sample's stream draws at a time: one call for many rows of a small event


def sample_seeds(seed: int, n: int) -> list[int]:
    """The seeds of samples 0..n-1 under one integer seed: `sample(..., seed=7)[i]` is `seed=[sample_seeds(7, n)[i]]`.

    >>> sample_seeds(7, 3)[:2] == sample_seeds(7, 2)
    True
    """
    if n < _FEW or seed >= 2**64:
        return [derive_seed(seed, i) for i in range(n)]
    seeds: list[int] = (derived(np.array([seed], np.uint64), np.arange(n, dtype=np.uint32)) >> np.uint64(1)).tolist()
    return seeds


def derive_seed(seed: int, *key: int) -> int:
    """A seed for the stream named by key under `seed`: a hash, so that nearby seeds and keys give unrelated streams."""
    return int(np.random.SeedSequence(entropy=seed, spawn_key=key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def stream_seeds(seeds: Sequence[int], stream: int) -> list[int]:
    """derive_seed(seed, stream) of each."""
    if len(seeds) < _FEW or max(seeds) >= 2**64:
        return [derive_seed(seed, stream) for seed in seeds]
    found: list[int] = (derived(np.array(seeds, np.uint64), np.array([stream], np.uint32)) >> np.uint64(1)).tolist()
    return found


class NoiseSource(ABC):
    """Where a run's numbers come from.

    Attributes:
        seeds: one per sample, where each has streams of its own; else None.
    """

    seeds: list[int] | None = None

    @abstractmethod
    def __call__(self, row: int, x: Tensor) -> Tensor:
        """z of that row, standard normal, of the shape, dtype and device of x."""

    @abstractmethod
    def prior(self, sde: SDE, shape: Sequence[int], dtype: torch.dtype, t: float) -> Tensor:
        """A draw from the prior of a run that starts at t, shape (B, ...)."""

    @abstractmethod
    def signs(self, row: int, count: int, x: Tensor) -> Tensor:
        """+1 and -1 with equal probability, for that row, shape (count, *x.shape)."""

    @abstractmethod
    def entropies(self, batch: int) -> list[int]:
        """A number per sample, in [0, 2^63), to seed its Brownian path; call it before the first z_i."""

    @abstractmethod
    def rewind(self) -> None:
        """Back to before the first z_i, to replay a run."""

    def probes(self) -> NoiseSource:
        """The source of a likelihood's probes: with seeds, streams apart from those of the z_i."""
        return self


class FunctionNoise(NoiseSource):
    """A function noise(row, x) of the caller's. It has no prior and no seeds: what needs them says so."""

    def __init__(self, function: Noise) -> None:
        self.function = function

    def __call__(self, row: int, x: Tensor) -> Tensor:
        return self.function(row, x)

    def prior(self, sde: SDE, shape: Sequence[int], dtype: torch.dtype, t: float) -> Tensor:
        raise ValueError("with noise= give x_T itself, not a shape: a function (row, x) has no prior")

    def signs(self, row: int, count: int, x: Tensor) -> Tensor:
        return torch.stack([torch.where(self.function(row, x) < 0, -1.0, 1.0).to(x) for _ in range(count)])

    def entropies(self, batch: int) -> list[int]:
        raise ValueError("a Brownian path needs a seed for each sample: give seed= or generator=, not noise=")

    def rewind(self) -> None:
        pass


def as_source(noise: Noise) -> NoiseSource:
    """The source itself, or a function (row, x) as one."""
    return noise if isinstance(noise, NoiseSource) else FunctionNoise(noise)


class GeneratorNoise(NoiseSource):
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

    def signs(self, row: int, count: int, x: Tensor) -> Tensor:
        bits = torch.empty(count, *x.shape, dtype=x.dtype, device=x.device).random_(0, 2, generator=self._generator)
        return bits.mul_(2).sub_(1)

    def entropies(self, batch: int) -> list[int]:
        drawn = torch.randint(2**62, (batch,), generator=self._generator, device=self._generator.device)
        numbers: list[int] = drawn.tolist()
        return numbers

    def rewind(self) -> None:
        self._generator.set_state(self._start)


class SeededNoise(NoiseSource):
    """Streams for each sample: one for its x_T, another for its z_i (so that a user who passes x_T drawn from the same
    seed does not see it again as noise), a third for its Brownian path.

    Args:
        seeds: one per sample, each >= 0.
        device: where to draw; CPU and GPU streams of the same seed differ.
        stream: of the z_i: 1 for a solver's, 3 for the probes of a likelihood.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device, stream: int = 1) -> None:
        self.seeds: list[int] = list(seeds)
        self.device, self.stream = device, stream
        self.rewind()

    def rewind(self) -> None:
        self._generators: list[torch.Generator] = []
        self._block: Tensor | None = None
        self._used = 0

    def prior(self, sde: SDE, shape: Sequence[int], dtype: torch.dtype, t: float) -> Tensor:
        return torch.cat([sde.prior((1, *shape[1:]), g, dtype, t=t) for g in self._streams(0)])

    def __call__(self, row: int, x: Tensor) -> Tensor:
        if not self._generators:
            self._generators = self._streams(self.stream)
        # The block's length depends on the event alone: a stream must not depend on the batch or the number of rows.
        if self._block is None or self._used == self._block.shape[1]:
            length = max(1, _BLOCK // max(1, x[0].numel()))
            self._block, self._used = x.new_empty(len(x), length, *x.shape[1:]), 0
            for block, generator in zip(self._block, self._generators, strict=True):
                block.normal_(generator=generator)
        self._used += 1
        return self._block[:, self._used - 1]

    def signs(self, row: int, count: int, x: Tensor) -> Tensor:
        if not self._generators:
            self._generators = self._streams(self.stream)
        bits = x.new_empty(len(x), count, *x.shape[1:])
        for sample, generator in zip(bits, self._generators, strict=True):
            sample.random_(0, 2, generator=generator)
        return bits.mul_(2).sub_(1).movedim(1, 0)

    def entropies(self, batch: int) -> list[int]:
        """As `NoiseSource`; nothing is drawn.

        Raises:
            ValueError: if there is not one seed per sample.
        """
        if len(self.seeds) != batch:
            raise ValueError(f"{len(self.seeds)} seeds for {batch} samples: give one per sample")
        return stream_seeds(self.seeds, 2)

    def probes(self) -> SeededNoise:
        return SeededNoise(self.seeds, self.device, stream=3)

    def _streams(self, stream: int) -> list[torch.Generator]:
        return [torch.Generator(self.device).manual_seed(seed) for seed in stream_seeds(self.seeds, stream)]


class CounterNoise(NoiseSource):
    """Streams for each sample, as `SeededNoise` has them, by counting (`scoresde.counter`): whole batches at once, the
    same numbers on every device, and the first of a sample's are the same however many it has. It reads nothing from
    the device, so a captured loop can take it. On a CPU it is the slower one but for thousands of small samples: a draw
    of images takes four to eight times that of `SeededNoise` (benchmarks/results/noise).

    `sample(..., noise=CounterNoise(sample_seeds(7, 64)))` draws x_T too, and the same in every run.

    Args:
        seeds: one per sample, each in [0, 2^63).
        device: where to draw a prior; by default the host.
        stream: of the z_i: 1 for a solver's, 3 for the probes of a likelihood.

    Attributes:
        drawn: how many draws have been made.

    >>> import scoresde
    >>> from scoresde.exact import Gaussian
    >>> denoiser = Gaussian(mean=[3.0, -1.0], std=0.5).denoiser(scoresde.VPSDE())
    >>> def drawn(*seeds):
    ...     noise = CounterNoise(seeds)
    ...     return scoresde.sample(denoiser, (len(seeds), 2), scoresde.solvers.DDPM(), steps=5, noise=noise).x
    >>> torch.equal(drawn(5, 6, 7)[1:], drawn(6, 7))
    True
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu", stream: int = 1) -> None:
        self.seeds = [int(seed) for seed in seeds]
        if any(not 0 <= seed < 2**63 for seed in self.seeds):
            raise ArgumentError(f"seeds={list(seeds)!r}: expected whole numbers in [0, 2^63)")
        self.stream = stream
        self._key = torch.tensor(self.seeds, dtype=torch.int64, device=device)
        self.rewind()

    @classmethod
    def keyed(cls, key: Tensor, stream: int = 1, drawn: int = 0) -> CounterNoise:
        """The source whose seeds are on the device already, int64 in [0, 2^63), shape (B,), and of which as many draws
        have been made: seeds are not looked at, so that what draws from it can be traced and captured. It has no
        `seeds` on the host.
        """
        source = cls.__new__(cls)
        source.seeds, source.stream, source._key, source.drawn = None, stream, key, drawn
        return source

    def ahead(self, x: Tensor, draws: int) -> Tensor:
        """The keys, where x is; as many draws count as made, which another source makes, `keyed` by them."""
        self._check(x.shape[0])
        self.drawn += draws
        self._key = self._key.to(x.device)
        return self._key

    def rewind(self) -> None:
        self.drawn = 0

    def anew(self, device: torch.device) -> CounterNoise:
        """The same source before its first draw, on that device."""
        return self._again(self._key.to(device), self.stream)

    def prior(self, sde: SDE, shape: Sequence[int], dtype: torch.dtype, t: float) -> Tensor:
        return sde.prior_std_at(t) * self.standard(shape, dtype)

    def standard(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Of the prior's stream, standard normal: the draw from a prior, divided by its standard deviation."""
        self._check(shape[0])
        return normal(self._key, 0, 0, math.prod(shape[1:]), dtype).reshape(tuple(shape))

    def __call__(self, row: int, x: Tensor) -> Tensor:
        return normal(self._next(x), self.stream, self.drawn, x[0].numel(), x.dtype).reshape(x.shape)

    def signs(self, row: int, count: int, x: Tensor) -> Tensor:
        n = x[0].numel()
        bits = [words(self._next(x), self.stream, self.drawn, n).mT.flatten(1)[:, :n] & 1 for _ in range(count)]
        return torch.stack(bits).mul_(2).sub_(1).to(x.dtype).reshape(count, *x.shape)

    def entropies(self, batch: int) -> list[int]:
        self._check(batch)
        low, high = words(self._key, 2, 0, 2)[:, :2, 0].T
        numbers: list[int] = (low | (high >> 1) << 32).tolist()
        return numbers

    def probes(self) -> CounterNoise:
        return self._again(self._key, 3)

    def _again(self, key: Tensor, stream: int) -> CounterNoise:
        again = CounterNoise.keyed(key, stream)
        again.seeds = self.seeds
        return again

    def _next(self, x: Tensor) -> Tensor:
        """The keys, where x is; one more draw is made."""
        return self.ahead(x, 1)

    def _check(self, batch: int) -> None:
        if self._key.shape[0] != batch:  # not len(): that would fix the batch of what is traced
            raise ValueError(f"{len(self._key)} seeds for {batch} samples: give one per sample")


def noise_source(
    device: torch.device,
    shape_or_x: Sequence[int] | Tensor,
    seed: int | Sequence[int] | None,
    generator: torch.Generator | None,
    noise: Noise | None,
) -> NoiseSource:
    """The source that these arguments of `sample` name; seeded by the operating system where none is given.

    Raises:
        TypeError, ValueError: if they contradict each other, or do not fit the shape.
    """
    given = [k for k, v in (("seed", seed), ("generator", generator), ("noise", noise)) if v is not None]
    if len(given) > 1:
        raise ValueError(f"give at most one of seed=, generator= and noise=; got {' and '.join(given)}")
    is_tensor = isinstance(shape_or_x, Tensor)
    if not is_tensor and not isinstance(shape_or_x, Sequence):
        raise TypeError(f"shape_or_x is {shape_or_x!r}: expected a shape (B, ...), or x_T itself")
    if not is_tensor and (
        len(shape_or_x) == 0 or not all(isinstance(n, int | np.integer) and n > 0 for n in shape_or_x)
    ):
        raise ValueError(f"shape {tuple(shape_or_x)}: expected whole numbers > 0, (B, ...)")
    if isinstance(shape_or_x, Tensor):
        check_batch(shape_or_x, "x_T")
    else:
        check_device(device)
    batch = shape_or_x.shape[0] if isinstance(shape_or_x, Tensor) else shape_or_x[0]
    device = shape_or_x.device if isinstance(shape_or_x, Tensor) else device
    if isinstance(noise, CounterNoise):
        return noise.anew(device)
    if noise is not None:
        if not is_tensor:
            raise ValueError("with noise= give x_T itself, not a shape")
        return as_source(noise)
    if generator is not None:
        if drawn_from(generator, device).device.type != device.type:
            raise ValueError(f"the generator is on {generator.device}, the samples on {device}: make it there")
        return GeneratorNoise(generator)
    return GeneratorNoise.fresh(device) if seed is None else SeededNoise(seeds_of(seed, int(batch)), device)


def seeds_of(seed: int | Sequence[int] | None, n: int) -> list[int]:
    """The seeds of n samples: derived from one integer, those given, or from the operating system.

    Raises:
        ValueError: unless they are whole numbers >= 0, one, or one per sample.
    """
    if seed is None:
        seed = secrets.randbits(63)
    listed = seed.tolist() if isinstance(seed, Tensor | np.ndarray | np.generic) else seed
    seeds = [listed] if isinstance(listed, int) else list(listed) if isinstance(listed, Iterable) else [listed]
    if any(not isinstance(n, int | np.integer) or n < 0 for n in seeds):
        raise ArgumentError(f"seed={seed!r}: expected whole numbers >= 0")
    if isinstance(listed, int):
        return sample_seeds(listed, n)
    if len(seeds) != n:
        raise ValueError(f"{len(seeds)} seeds for {n} samples: give one integer, or one per sample")
    return seeds
