"""`Published`: a network of elsewhere as a denoiser, with what its files say of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from scoresde.checks import ArgumentError
from scoresde.denoiser import Denoiser
from scoresde.diagnose import diagnose
from scoresde.grid import Grid
from scoresde.sde import SDE
from scoresde.wrappers import SameMean, Wrapper

__all__ = ["Published", "published", "uniform_to_data"]


class Published(SameMean):
    """What the functions of `scoresde.interop` return: a denoiser like any other, so that every solver, likelihood,
    wrapper and guidance takes it.

    >>> model = from_diffusers("path/to/a/pipeline")                                        # doctest: +SKIP
    >>> images = sample(model, (16, *model.shape), UniPC(), nfe=20).x                       # doctest: +SKIP

    Attributes:
        denoiser: the network's, without what only its files say.
        shape: of an item of the diffusion, C H W of an image or latent; `sample` takes (B, *shape). None where neither
            file nor caller said it.
        about: where it comes from and what was read: "format", "files" (their sha256 by name), "parameters",
            "predicts", "sde", what the configuration said and, where data was given, "diagnosis". JSON can hold it.
        embed: texts to the condition of them, by the text encoder that came with the network; None without one.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        shape: Sequence[int] | None,
        about: Mapping[str, Any],
        grid: Callable[[Any], Grid] | None = None,
    ) -> None:
        super().__init__(denoiser)
        self.shape = None if shape is None else tuple(int(n) for n in shape)
        self.about = dict(about)
        self.embed: Callable[[Sequence[str]], dict[str, Tensor]] | None = None
        self._grid = grid

    @cached_property
    def data_shape(self) -> tuple[int, ...] | None:
        """Of an item of data: that of the state, or what one decodes to."""
        if self.shape is None or self.codec is None:
            return self.shape
        with torch.no_grad():
            return tuple(self.decode(torch.zeros(1, *self.shape, device=self.device)).shape[1:])

    def grid(self, steps: Any) -> Grid:
        """The times on which its own toolkit steps, for `sample(model, shape, solver, grid=model.grid(50))`; without
        it a solver takes the grid of its own. steps: their number, or what its toolkit calls them, "ddim50" say.
        """
        return Grid.customary(self.sde, steps) if self._grid is None else self._grid(steps)

    def encode(self, x: Tensor, **cond: Any) -> Tensor:
        """Data x (B, ...) as states of the diffusion: the latent, or x itself where it diffuses data. An encoder with
        noise gives its mean. The condition is that of the call, for a codec that knows it.
        """
        return x if self.codec is None else self.codec.encode(x, **cond)

    def decode(self, z: Tensor, **cond: Any) -> Tensor:
        """The way back: data of the state."""
        return z if self.codec is None else self.codec.decode(z, **cond)

    def __repr__(self) -> str:
        return f"Published({self.about.get('format')}, {self.denoiser!r}, shape={self.shape})"


def published(
    denoiser: Denoiser,
    shape: Sequence[int] | None,
    about: Mapping[str, Any],
    grid: Callable[[Any], Grid] | None = None,
    *,
    data: Tensor | None = None,
    cond: Mapping[str, Any] | None = None,
) -> Published:
    """The model, its wiring checked on items of data, in the range that it was trained on, where there are any; warns
    where the check is not passed. What is checked is the network's own mean, before it is clipped.
    """
    model = Published(denoiser, shape, about, grid)
    if data is not None:
        network: Denoiser = model
        while isinstance(network, Wrapper):
            network = network.denoiser
        items = None if model.codec is not None else model.shape
        if (
            items is not None
            and isinstance(data, Tensor)
            and (*data.shape[1:2], data.ndim) != (items[0], 1 + len(items))
        ):
            raise ArgumentError(f"data has shape {tuple(data.shape)}: expected (B, ...), items like {items}")
        with torch.no_grad():
            z = model.encode(data, **dict(cond or {}))
        verdict = diagnose(network, z, cond=cond, seed=0)
        model.about["diagnosis"] = str(verdict)
        if verdict.suspicious:
            warnings.warn(f"the network does not fit its data: {verdict}", stacklevel=3)
    return model


def uniform_to_data(sde: SDE, steps: int, last: float) -> Grid:
    """Uniform in t from t_max to the last noisy time, then 0, as samplers of score_sde step to a denoised state."""
    times = torch.linspace(sde.t_max, last, steps, dtype=torch.float64, device="cpu")
    return Grid(sde, torch.cat([times, times.new_zeros(1)]))
