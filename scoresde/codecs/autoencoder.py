"""A network's encoder and decoder as a codec (Rombach et al., 2022, "High-resolution image synthesis with latent
diffusion models"): z = scale (m - shift) with m = encoder(x), and x = decoder(z / scale + shift).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from scoresde.checks import ArgumentError, check_count
from scoresde.codecs.base import Codec, Encoded
from scoresde.networks import first_parameter
from scoresde.tensors import precise

__all__ = ["AutoencoderCodec"]


class AutoencoderCodec(Codec):
    """An autoencoder's latent, scaled and shifted as the diffusion was trained on it. It has no volume: a density is
    that of z, and `elbo` has a bound on that of data where the encoder has noise and the decoder a likelihood.

    Args:
        encoder: m of x; or of an encoder with noise (m, std), the mean and standard deviation of q(m | x).
        decoder: x of m.
        scale, shift: of the latent, numbers or tensors that broadcast to an item of it: (C, 1, 1) of its channels. The
            `scaling_factor` and `shift_factor` of published autoencoders; a latent's std and mean are 1 / scale and
            shift.
        std: of the decoder p(x | z) = N(decode(z), std^2), a number or a tensor that broadcasts to an item of x; None
            where it is not to be taken for a distribution.
        batch: items that go through the networks at a time; all by default.

    A module is called in its own dtype and on its own device, those of its first parameter; another callable with what
    was given. Neither is told the condition: a codec that is to know it is a subclass of `Codec`.

    Raises:
        TypeError: if encoder or decoder is no callable.
        ValueError: if scale or std is not finite and > 0, shift is not finite, or batch is no number of items.
    """

    def __init__(
        self,
        encoder: Callable[[Tensor], Tensor | tuple[Tensor, Tensor]],
        decoder: Callable[[Tensor], Tensor],
        *,
        scale: Tensor | float = 1.0,
        shift: Tensor | float = 0.0,
        std: Tensor | float | None = None,
        batch: int | None = None,
    ) -> None:
        for name, one in (("encoder", encoder), ("decoder", decoder)):
            if not callable(one):
                raise TypeError(f"{name} is {type(one).__name__}: expected a callable")
        if batch is not None:
            check_count(batch=batch)
        self.encoder, self.decoder, self.batch = encoder, decoder, batch
        self.scale, self.shift = _number("scale", scale, positive=True), _number("shift", shift)
        self.std = None if std is None else _number("std", std, positive=True)

    def encode(self, x: Tensor, /, **cond: Any) -> Tensor:
        return self._encoded(x)[0]

    def decode(self, z: Tensor, /, **cond: Any) -> Tensor:
        m = z / _on(self.scale, z) + _on(self.shift, z)
        return torch.cat([_called(self.decoder, part) for part in self._parts(m)]).to(z)

    def encoding(self, x: Tensor, /, **cond: Any) -> Encoded | None:
        z, std = self._encoded(x)
        return None if std is None else Encoded(z, std)

    def log_likelihood(self, x: Tensor, z: Tensor, /, **cond: Any) -> Tensor | None:
        if self.std is None:
            return None
        std = precise(_on(self.std, x))
        r = (precise(x) - precise(self.decode(z))) / std
        each = -(r**2) / 2 - (std * math.sqrt(2 * math.pi)).log()
        return each.reshape(len(x), -1).sum(1)

    def _encoded(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The mean of z, and its standard deviation where the encoder has noise."""
        found = [_called(self.encoder, part) for part in self._parts(x)]
        means, stds = zip(*(one if isinstance(one, tuple) else (one, None) for one in found), strict=True)
        m = torch.cat(means).to(x)
        scale = _on(self.scale, m)
        z = (scale * (m - _on(self.shift, m))).to(x)
        return z, None if stds[0] is None else (scale * torch.cat(stds).to(x)).to(x)

    def _parts(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.split(self.batch or max(1, len(x)))

    def __repr__(self) -> str:
        return f"AutoencoderCodec({type(self.encoder).__name__}, {type(self.decoder).__name__})"


def _number(name: str, value: Tensor | float, positive: bool = False) -> Tensor:
    y = value if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64, device="cpu")
    if not bool(y.isfinite().all()) or (positive and not bool((y > 0).all())):
        raise ArgumentError(f"{name}={value!r}: expected finite numbers{' > 0' * positive}")
    return y


def _on(y: Tensor, x: Tensor) -> Tensor:
    """y where x is; a number stays on the host, where it stalls no device."""
    return y if y.ndim == 0 else y.to(x.device)


def _called(net: Callable[[Tensor], Any], x: Tensor) -> Any:
    parameter = first_parameter(net)
    return net(x if parameter is None else x.to(parameter))
