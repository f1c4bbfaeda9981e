"""A denoiser of items of various sizes (`scoresde.masks`), and their noise: what an item does not have is exactly zero,
in x_T, in every state, in the noise and in D; and an item's own numbers are those that it has alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from scoresde.checks import ArgumentError
from scoresde.denoiser import Denoiser, Posterior, check_denoiser
from scoresde.entries import check_cond
from scoresde.masks import Own, mask_name, masks_of
from scoresde.networks import contents
from scoresde.noise import CounterNoise, GeneratorNoise, Noise, NoiseSource, SeededNoise, as_source
from scoresde.sde import SDE
from scoresde.tensors import Time
from scoresde.views import Affine
from scoresde.wrappers import Wrapper

__all__ = ["Masked", "MaskedNoise", "begun", "masked_noise", "own_of", "sealed"]


class Masked(Wrapper):
    """A denoiser of items of various sizes, which has a mask among its conditions: `sample(Masked(denoiser), shape,
    solver, cond={"mask": mask})`, and so for `log_prob`, `elbo`, `dsm_loss` and all that takes one.

    The mask (`scoresde.masks`) is bool, with as many dimensions as x: (B, N, 1) for sets (B, N, d). The network gets x
    with zeros where an entry is not own, and the mask as a keyword argument of that name; of its result what is not own
    is set to zero. So what stands there, before or after, NaN included, changes no bit of anything. How a network sees
    that its zeros are no entries is its own affair: `scoresde.nn.SetTransformer` does.

    Norms, means and densities are those of an item's own entries, and noise is drawn for them alone, in their order: a
    sample with its seed is the same in a batch that is filled up to any size.

    Args:
        denoiser: the model, of a network that takes the mask; guidance and clipping go around this wrapper.
        name: of the condition.

    Raises:
        TypeError: if denoiser is none.
        ValueError: if what it wraps is no part of this, `Wrapper.masks`; by the call, if there is no mask, or one that
            does not fit x.

    >>> import scoresde
    >>> from scoresde.solvers import DDPM
    >>> model = scoresde.EpsDenoiser(lambda x, t, mask: 0.9 * x, scoresde.VPSDE())  # each entry by itself
    >>> mask = torch.tensor([[[True], [True], [True]], [[True], [False], [False]]])  # three points, and one
    >>> both = scoresde.sample(Masked(model), (2, 3, 2), DDPM(), steps=5, seed=[3, 8], cond={"mask": mask})
    >>> one = scoresde.sample(Masked(model), (1, 1, 2), DDPM(), steps=5, seed=[8], cond={"mask": mask[1:, :1]})
    >>> torch.equal(both.x[1, :1], one.x[0]), both.x[1, 1:].abs().max()
    (True, tensor(0.))
    """

    masks = True

    def __init__(self, denoiser: Denoiser, name: str = "mask") -> None:
        super().__init__(denoiser)
        self.mask_name = name
        check_masked(self)

    def own(self, shape: Sequence[int], cond: Mapping[str, Any]) -> Own:
        return Own(shape, masks_of(cond, str(self.mask_name)))

    def prepared(self, cond: Mapping[str, Any] | None) -> dict[str, Any]:
        name = str(self.mask_name)
        return {**self.denoiser.prepared(cond), name: masks_of(cond or {}, name)}

    def __call__(self, x: Tensor, t: Time, **cond: Any) -> Posterior:
        return super().__call__(self._own(x, t, cond).only(x), t, **cond)

    def posterior(self, x: Tensor, t: Time, /, **cond: Any) -> Posterior:
        own = self.own(x.shape, cond)
        mean, var = self.denoiser.posterior(own.only(x), t, **cond)
        return Posterior(own.only(mean), None if var is None else own.only(var))

    def covariance(self, t: Time) -> Tensor | None:
        return self.denoiser.covariance(t)

    def view(self, name: str, x: Tensor, t: Time, /, **cond: Any) -> Tensor:
        return super().view(name, self._own(x, t, cond).only(x), t, **cond)

    def output(self, x: Tensor, t: Time, /, **cond: Any) -> Tensor:
        own = self.own(x.shape, cond)
        return own.only(self.denoiser.output(own.only(x), t, **cond))

    def outputs(self, times: Tensor) -> Callable[[int, Tensor, Mapping[str, Any]], Tensor]:
        output = self.denoiser.outputs(times)

        def at(i: int, x: Tensor, cond: Mapping[str, Any]) -> Tensor:
            own = self.own(x.shape, cond)
            return own.only(output(i, own.only(x), cond))

        return at

    def affine(self, t: Time) -> Affine:
        return self.denoiser.affine(t)

    def check_times(self, t: Tensor) -> None:
        self.denoiser.check_times(t)

    def _own(self, x: Tensor, t: Time, cond: Mapping[str, Any]) -> Own:
        self._check(x, t)
        return self.own(x.shape, cond)

    def __repr__(self) -> str:
        return f"Masked({self.denoiser!r}{'' if self.mask_name == 'mask' else f', {self.mask_name!r}'})"


def check_masked(denoiser: Denoiser) -> None:
    """Raises ValueError if something in a masked denoiser does not know of masks, or there is a codec."""
    for part in (denoiser, *contents(denoiser)):
        if isinstance(part, Wrapper) and not part.masks:
            raise ArgumentError(
                f"{type(part).__name__} with masks: it is not known to leave alone, and out of its means, what an item "
                "does not have. Give items of one size at a time, without Masked (a wrapper of your own that does say "
                "so: masks = True)"
            )
    if denoiser.codec is not None:
        raise ArgumentError(f"{denoiser.codec!r} with masks: a mask is of the states, and nothing is known of the data")


def sealed(denoiser: Denoiser) -> Denoiser:
    """The denoiser as a run takes it: where there is a `Masked` in it, with one outermost, so that what guidance adds
    to it does not reach what an item does not have.

    Raises:
        ValueError: as `Masked`.
    """
    name = mask_name(denoiser)
    if name is None or isinstance(denoiser, Masked):
        return denoiser
    return Masked(denoiser, name)


def own_of(denoiser: Denoiser, shape: Sequence[int], cond: Mapping[str, Any] | None) -> tuple[Denoiser, Own]:
    """The denoiser `sealed`, and which entries of a batch of that shape are own, checked.

    Raises:
        TypeError: if the denoiser is none.
        ValueError: as `Masked`; if an item has no entry.
    """
    check_denoiser(denoiser)
    denoiser = sealed(denoiser)
    if mask_name(denoiser) is not None:
        check_cond(cond, shape[0])
    own = denoiser.own(shape, {} if cond is None else cond)
    own.check()
    return denoiser, own


def begun(
    denoiser: Denoiser, x: Tensor, noise: Noise | None, cond: Mapping[str, Any] | None
) -> tuple[Denoiser, Tensor, Noise | None]:
    """What a run begins with: where the denoiser is masked, `sealed`, and x and noise of own entries alone."""
    if mask_name(denoiser) is None:
        return denoiser, x, noise
    denoiser = sealed(denoiser)
    own = denoiser.own(x.shape, cond or {})
    return denoiser, own.only(x), None if noise is None else masked_noise(noise, own)


def masked_noise(noise: Noise, own: Own) -> NoiseSource:
    """A source, or a function (row, x), of noise for the own entries alone; itself where there is no mask."""
    source = as_source(noise)
    return source if own.mask is None or isinstance(source, MaskedNoise) else MaskedNoise(source, own)


class MaskedNoise(NoiseSource):
    """Another source's numbers for the own entries of each item, in their order, and zeros elsewhere: with seeds those
    that the item has alone; with one generator for the batch those of its own entries one item after the other. A
    function's own are as it makes them. With seeds it draws item by item, which is slow for many small ones:
    `CounterNoise` and a generator draw for the batch.

    Args:
        source: the other.
        own: of the batch, with a mask.
    """

    def __init__(self, source: NoiseSource, own: Own) -> None:
        self.source, self.own, self.seeds = source, own, source.seeds
        self._counts: list[int] = own.dims.long().tolist()
        self._each: list[SeededNoise] = []
        if isinstance(source, SeededNoise):
            self._each = [SeededNoise([seed], source.device, source.stream) for seed in source.seeds]
            if len(self._each) != own.shape[0]:
                raise ValueError(f"{len(self._each)} seeds for {own.shape[0]} samples: give one per sample")

    def __call__(self, row: int, x: Tensor) -> Tensor:
        return self._drawn(x.shape, lambda source, shape: source(row, x.new_empty(shape)))

    def signs(self, row: int, count: int, x: Tensor) -> Tensor:
        return self._drawn(x.shape, lambda source, shape: source.signs(row, count, x.new_empty(shape)))

    def prior(self, sde: SDE, shape: Sequence[int], dtype: torch.dtype, t: float) -> Tensor:
        return self._drawn(shape, lambda source, shape: source.prior(sde, shape, dtype, t))

    def entropies(self, batch: int) -> list[int]:
        return self.source.entropies(batch)

    def rewind(self) -> None:
        self.source.rewind()
        for each in self._each:
            each.rewind()

    def probes(self) -> MaskedNoise:
        return MaskedNoise(self.source.probes(), self.own)

    def _drawn(self, shape: Sequence[int], draw: Callable[[NoiseSource, Sequence[int]], Tensor]) -> Tensor:
        """What draw(source, shape) makes of a shape (B, n), or (n,) for all, placed."""
        own, counts = self.own, self._counts
        if tuple(shape) != own.shape:
            raise ValueError(f"noise of shape {tuple(shape)} by a mask of shape {own.shape}: expected the same")
        if self._each:
            parts = [draw(one, (1, n)) for one, n in zip(self._each, counts, strict=True)]
            return own.placed(torch.cat([F.pad(part, (0, max(counts) - part.shape[-1])) for part in parts], -2))
        if isinstance(self.source, CounterNoise):
            return own.placed(draw(self.source, (len(counts), max(counts))))
        if isinstance(self.source, GeneratorNoise):
            parts = draw(self.source, (sum(counts),)).split(counts, -1)
            return own.placed(torch.stack([F.pad(part, (0, max(counts) - part.shape[-1])) for part in parts], -2))
        return own.only(draw(self.source, own.shape))
