"""A codec maps data x to the space of the diffusion and back, z = encode(x), x = decode(z). A density of data needs one
of two things more.

Where the map is one to one, its volume: with p_z the density of the diffusion,

    log p(x) = log p_z(encode(x)) + log |det dz/dx|

Where it is not, an encoder q(z | x) with noise and a decoder's likelihood p(x | z), which give a bound (Kingma and
Welling, 2014, "Auto-encoding variational Bayes", eq. 2; Vahdat et al., 2021, "Score-based generative modeling in latent
space", eq. 5), H the entropy:

    log p(x) >= E_q[log p(x | z) + log p_z(z)] + H[q(z | x)]
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from torch import Tensor

from scoresde.networks import Holder
from scoresde.tensors import precise, shown

__all__ = ["Chained", "Codec", "Encoded"]


@shown
class Encoded(NamedTuple):
    """What an encoder with noise makes of data, q(z | x) = N(mean, std^2), independent in each entry.

    Attributes:
        mean: shape (B, ...) of z.
        std: > 0, broadcasts to it.
    """

    mean: Tensor
    std: Tensor

    def entropy(self) -> Tensor:
        """H[q(z | x)] in nats, sum log(std sqrt(2 pi e)), float64 of shape (B,)."""
        log_std = precise(self.std).log().expand(self.mean.shape).reshape(len(self.mean), -1)
        return log_std.sum(1) + log_std.shape[1] * math.log(2 * math.pi * math.e) / 2

    def draw(self, noise: Tensor) -> Tensor:
        """mean + std noise, for noise ~ N(0, I) of the shape of z."""
        return self.mean + self.std * noise


class Codec(Holder, ABC):
    """A map between data x (B, ...) and states z (B, ...) of a diffusion, whose shapes may differ.

    Subclasses write `encode` and `decode`, and of the rest what they have. Every method takes the condition of the call
    too, as the network does (`sample(..., cond=)`), and uses what it knows of it. What it computes with has its own
    dtype and device; results have those of what was given.
    """

    @abstractmethod
    def encode(self, x: Tensor, /, **cond: Any) -> Tensor:
        """z of data x; of an encoder with noise its mean."""

    @abstractmethod
    def decode(self, z: Tensor, /, **cond: Any) -> Tensor:
        """Data of z."""

    def log_volume(self, x: Tensor, /, **cond: Any) -> Tensor | None:
        """log |det dz/dx| at data x, float64 of shape (B,); None where x and z are not one to one."""
        return None

    def encoding(self, x: Tensor, /, **cond: Any) -> Encoded | None:
        """q(z | x), whose mean `encode` returns; None where the encoder has no noise."""
        return None

    def log_likelihood(self, x: Tensor, z: Tensor, /, **cond: Any) -> Tensor | None:
        """The decoder's log p(x | z), float64 of shape (B,); None where the decoder is no distribution."""
        return None


class Chained(Codec):
    """Two codecs, x -> outer -> y -> inner -> z. It has a volume where both have one, and a bound where the outer one
    has a volume and the inner one a bound.

    Args:
        outer: next to the data.
        inner: next to the diffusion.
    """

    def __init__(self, outer: Codec, inner: Codec) -> None:
        self.outer, self.inner = outer, inner

    def encode(self, x: Tensor, /, **cond: Any) -> Tensor:
        return self.inner.encode(self.outer.encode(x, **cond), **cond)

    def decode(self, z: Tensor, /, **cond: Any) -> Tensor:
        return self.outer.decode(self.inner.decode(z, **cond), **cond)

    def log_volume(self, x: Tensor, /, **cond: Any) -> Tensor | None:
        return _sum(self.outer.log_volume(x, **cond), self.inner.log_volume(self.outer.encode(x, **cond), **cond))

    def encoding(self, x: Tensor, /, **cond: Any) -> Encoded | None:
        return self.inner.encoding(self.outer.encode(x, **cond), **cond)

    def log_likelihood(self, x: Tensor, z: Tensor, /, **cond: Any) -> Tensor | None:
        y = self.outer.encode(x, **cond)
        return _sum(self.outer.log_volume(x, **cond), self.inner.log_likelihood(y, z, **cond))

    def __repr__(self) -> str:
        return f"Chained({self.outer!r}, {self.inner!r})"


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else a + b
