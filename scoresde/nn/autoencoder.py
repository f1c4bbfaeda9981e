"""Convolutional autoencoders of two kinds, for data of one, two or three axes: between x (B, C, n_1, ...) and a latent
m (B, c, n_1 / f, ...), f a power of two.

`KLAutoencoder` (Kingma and Welling, 2014, "Auto-encoding variational Bayes"; Rombach et al., 2022, "High-resolution
image synthesis with latent diffusion models", section 3.1): the encoder gives a Gaussian, and training holds it near
the standard one,

    q(m | x) = N(mean(x), std(x)^2),    KL(q | N(0, I)) = sum (mean^2 + std^2 - 1) / 2 - log std

`VQAutoencoder` (van den Oord et al., 2017, "Neural discrete representation learning"; Esser et al., 2021, "Taming
transformers for high-resolution image synthesis"): each place of the latent, a vector of c numbers, is replaced by the
nearest e of a codebook of K. The gradient passes that as if it were not there (straight through), and the codebook
learns by the first term of

    |sg[m] - e|^2 + commitment |m - sg[e]|^2,    sg stopping the gradient, the mean over the latent's entries

The replacement is the decoder's first layer, as in the VQ models of latent diffusion: a diffusion is of m, continuous,
and what it draws is replaced on the way to data.

Between them stand residual blocks without time (`scoresde.nn.blocks`), which halve or double on the way, with attention
at the coarsest level.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde.checks import ArgumentError, check_count, check_nonnegative
from scoresde.codecs import Encoded
from scoresde.nn.blocks import Attention, ResidualBlock, conv, group_norm, shuffle, unshuffle
from scoresde.tensors import shown

__all__ = ["Autoencoder", "Codebook", "KLAutoencoder", "Reconstruction", "VQAutoencoder"]


@shown
class Reconstruction(NamedTuple):
    """What training sees of a batch.

    Attributes:
        x: decode(m), m drawn from q(m | x) where the encoder has noise.
        cost: of the latent, a scalar: the KL divergence of q from N(0, I) in nats for each dimension of the data, or
            the codebook's two terms.
        told: what is to be told of the latent, (K,), by the names of `Autoencoder.tells`.
    """

    x: Tensor
    cost: Tensor
    told: Tensor


class Autoencoder(nn.Module, ABC):
    """An encoder and a decoder, `AutoencoderCodec(net.encoder, net.decoder)`.

    Args:
        image_channels: channels C of the data.
        latent_channels: channels c of the latent.
        channels: features at the finest level.
        multipliers: features of each level as multiples of `channels`. Each level is half as fine as the one before.
        blocks: residual blocks per level, in the decoder one more, as in Rombach et al.
        heads: of the attention; 0 for none.
        dropout: probability in each residual block.
        dims: axes of the data, 1, 2 or 3.
        patch: the finest level sees patches of so many pixels an axis as channels, which costs less.

    Attributes:
        factor: f = patch 2^(levels - 1).
        tells: names of what `Reconstruction.told` has.

    Raises:
        ValueError: if an option is out of its range; by a call, if f does not divide the size.
    """

    tells: tuple[str, ...] = ()
    noisy: bool = False

    def __init__(
        self,
        image_channels: int = 3,
        latent_channels: int = 4,
        channels: int = 64,
        multipliers: Sequence[int] = (1, 2, 4),
        blocks: int = 1,
        *,
        heads: int = 1,
        dropout: float = 0.0,
        dims: int = 2,
        patch: int = 1,
    ) -> None:
        super().__init__()
        check_count(image_channels=image_channels, latent_channels=latent_channels, channels=channels, blocks=blocks)
        if dims not in (1, 2, 3):
            raise ArgumentError(f"dims={dims}: expected 1, 2 or 3 axes")
        if not multipliers or patch < 1 or heads < 0:
            raise ArgumentError(
                f"multipliers={tuple(multipliers)}, patch={patch}, heads={heads}: expected one level at least, "
                "patch >= 1 and heads >= 0"
            )
        self.image_channels, self.latent_channels, self.dims = image_channels, latent_channels, dims
        self.factor = patch * 2 ** (len(multipliers) - 1)
        widths = [channels * m for m in multipliers]
        how = {"blocks": blocks, "heads": heads, "dropout": dropout, "dims": dims, "patch": patch}
        self.encoder = _Encoder(image_channels, latent_channels, widths, self.noisy, **how)  # type: ignore[arg-type]
        self.decoder = _Decoder(image_channels, latent_channels, widths, **how)  # type: ignore[arg-type]

    def latent_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Of an item of the latent, of data items of that shape.

        Raises:
            ValueError: if these are not items of this network.
        """
        if len(shape) != self.dims + 1 or shape[0] != self.image_channels or any(n % self.factor for n in shape[1:]):
            raise ArgumentError(
                f"items of shape {tuple(shape)}: the autoencoder takes {self.image_channels} channels and {self.dims} "
                f"axes whose sizes are multiples of f = {self.factor}"
            )
        return (self.latent_channels, *(n // self.factor for n in shape[1:]))

    def encode(self, x: Tensor) -> Tensor | Encoded:
        """m of x, before a codebook; where the encoder has noise q(m | x)."""
        found: Tensor | Encoded = self.encoder(x)
        return found

    def decode(self, m: Tensor) -> Tensor:
        """x of m, by way of the codebook where there is one."""
        found: Tensor = self.decoder(m)
        return found

    @property
    def last_layer(self) -> nn.Parameter:
        """The weights that x comes from."""
        weight = self.decoder.outward.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @abstractmethod
    def forward(self, x: Tensor, noise: Tensor) -> Reconstruction:
        """x (B, C, ...) as it is encoded and decoded; noise ~ N(0, I) of the latent's shape."""


class KLAutoencoder(Autoencoder):
    """An autoencoder whose latent is drawn from a Gaussian q(m | x); options as `Autoencoder`. Its standard deviation
    starts at e^-2: at 1 the decoder would see little but noise at first.

    It tells `kl`, the divergence of q(m | x) from N(0, I) in nats an item.

    >>> net = KLAutoencoder(image_channels=1, latent_channels=2, channels=8, multipliers=(1, 2, 2))
    >>> law = net.encode(torch.zeros(5, 1, 28, 28))
    >>> law.mean.shape, net.decode(law.mean).shape
    (torch.Size([5, 2, 7, 7]), torch.Size([5, 1, 28, 28]))
    """

    tells = ("kl",)
    noisy = True

    def forward(self, x: Tensor, noise: Tensor) -> Reconstruction:
        law = self.encoder(x)
        mean, std = law.mean.float(), law.std.float()
        kl = ((mean**2 + std**2 - 1) / 2 - std.log()).flatten(1).sum(1).mean()
        return Reconstruction(self.decoder(law.draw(noise)), kl / x[0].numel(), kl.detach()[None])


class VQAutoencoder(Autoencoder):
    """An autoencoder with a codebook.

    It tells `perplexity`, exp of the entropy of how often each vector is the nearest one in the batch: K if all are
    used alike, 1 if all is one; and `used`, the share of the K that occur.

    Args:
        codes: K, vectors in the codebook.
        commitment: weight of the encoder's term.
        image_channels, latent_channels, channels, multipliers, blocks, heads, dropout, dims, patch: of `Autoencoder`.
    """

    tells = ("perplexity", "used")

    def __init__(
        self,
        image_channels: int = 3,
        latent_channels: int = 4,
        channels: int = 64,
        multipliers: Sequence[int] = (1, 2, 4),
        blocks: int = 1,
        *,
        codes: int = 512,
        commitment: float = 0.25,
        heads: int = 1,
        dropout: float = 0.0,
        dims: int = 2,
        patch: int = 1,
    ) -> None:
        super().__init__(
            image_channels, latent_channels, channels, multipliers, blocks,
            heads=heads, dropout=dropout, dims=dims, patch=patch,
        )  # fmt: skip
        check_nonnegative(commitment=commitment)
        self.commitment = commitment
        self.decoder.codebook = Codebook(codes, latent_channels)

    @property
    def codebook(self) -> Codebook:
        """The decoder's first layer."""
        assert self.decoder.codebook is not None
        return self.decoder.codebook

    def forward(self, x: Tensor, noise: Tensor) -> Reconstruction:
        m = self.encoder(x)
        index = self.codebook.nearest(m)
        e = self.codebook.vectors(index).to(m.dtype)
        cost = F.mse_loss(e.float(), m.detach().float()) + self.commitment * F.mse_loss(m.float(), e.detach().float())
        return Reconstruction(self.decoder.of(m + (e - m).detach()), cost, self.codebook.usage(index))


class Codebook(nn.Module):
    """K vectors of c numbers, to the nearest of which a latent goes; the gradient passes straight through.

    Args:
        codes: K.
        channels: c.
    """

    def __init__(self, codes: int, channels: int) -> None:
        super().__init__()
        check_count(codes=codes)
        self.weight = nn.Parameter(torch.empty(codes, channels).uniform_(-1, 1))

    def nearest(self, m: Tensor) -> Tensor:
        """The numbers of the vectors nearest to m (B, c, n_1, ...): int64, (B, n_1, ...)."""
        flat, e = m.detach().movedim(1, -1).float(), self.weight.detach().float()
        with torch.autocast(m.device.type, enabled=False):  # of three digits many would be equally near
            return (e.square().sum(1) - 2 * flat @ e.T).argmin(-1)  # |m - e|^2 less |m|^2

    def vectors(self, index: Tensor) -> Tensor:
        """The vectors of these numbers, (B, c, n_1, ...)."""
        return self.weight[index].movedim(-1, 1)

    def usage(self, index: Tensor) -> Tensor:
        """Perplexity, and the share of the vectors that occur: (2,)."""
        count = torch.bincount(index.flatten(), minlength=len(self.weight)).to(self.weight)
        p = count / count.sum()
        return torch.stack([(-torch.special.xlogy(p, p).sum()).exp(), (count > 0).float().mean()])

    def forward(self, m: Tensor) -> Tensor:
        """m, each place replaced."""
        return m + (self.vectors(self.nearest(m)).to(m.dtype) - m).detach()


class _Encoder(nn.Module):
    """x to m, or to q(m | x)."""

    def __init__(
        self,
        image_channels: int,
        latent_channels: int,
        widths: Sequence[int],
        noisy: bool,
        *,
        blocks: int,
        heads: int,
        dropout: float,
        dims: int,
        patch: int,
    ) -> None:
        super().__init__()
        self.patch, self.noisy, end = patch, noisy, widths[-1]
        self.inward = conv(dims, image_channels * patch**dims, widths[0], 3)
        layers: list[nn.Module] = []
        for level, (a, b) in enumerate(itertools.pairwise([widths[0], *widths])):
            for i in range(blocks):
                layers.append(ResidualBlock(a if i == 0 else b, b, None, dropout, dims=dims))
            if level < len(widths) - 1:
                layers.append(ResidualBlock(b, b, None, dropout, dims=dims, resample="down"))
        self.levels = nn.ModuleList([*layers, *_middle(end, heads, dropout, dims)])
        outputs = (2 if noisy else 1) * latent_channels
        last = conv(dims, end, outputs, 3)
        if noisy:
            assert last.bias is not None
            nn.init.constant_(last.bias[latent_channels:], -4.0)
        self.outward = nn.Sequential(group_norm(end), nn.SiLU(), last)

    def forward(self, x: Tensor) -> Tensor | Encoded:
        h = self.inward(unshuffle(x, self.patch))
        for layer in self.levels:
            h = layer(h)
        h = self.outward(h)
        if not self.noisy:
            return h
        mean, log_variance = h.chunk(2, dim=1)
        return Encoded(mean, (log_variance / 2).exp())


class _Decoder(nn.Module):
    """m to x, by way of the codebook where there is one."""

    codebook: Codebook | None

    def __init__(
        self,
        image_channels: int,
        latent_channels: int,
        widths: Sequence[int],
        *,
        blocks: int,
        heads: int,
        dropout: float,
        dims: int,
        patch: int,
    ) -> None:
        super().__init__()
        self.patch, self.codebook, start = patch, None, widths[-1]
        self.inward = conv(dims, latent_channels, start, 3)
        layers = _middle(start, heads, dropout, dims)
        for level, (a, b) in enumerate(itertools.pairwise([start, *reversed(widths)])):
            if level:
                layers.append(ResidualBlock(a, a, None, dropout, dims=dims, resample="up"))
            for i in range(blocks + 1):
                layers.append(ResidualBlock(a if i == 0 else b, b, None, dropout, dims=dims))
        self.levels = nn.ModuleList(layers)
        self.normed = nn.Sequential(group_norm(widths[0]), nn.SiLU())
        self.outward = conv(dims, widths[0], image_channels * patch**dims, 3)

    def forward(self, m: Tensor) -> Tensor:
        return self.of(m if self.codebook is None else self.codebook(m))

    def of(self, m: Tensor) -> Tensor:
        """x of what the codebook has replaced already."""
        h = self.inward(m)
        for layer in self.levels:
            up = getattr(layer, "resample", None) is not None
            h = layer(h, size=[2 * n for n in h.shape[2:]]) if up else layer(h)
        return shuffle(self.outward(self.normed(h)), self.patch)


def _middle(channels: int, heads: int, dropout: float, dims: int) -> list[nn.Module]:
    """What stands at the coarsest level."""
    first, last = (ResidualBlock(channels, channels, None, dropout, dims=dims) for _ in range(2))
    return [first, *([Attention(channels, heads, dims=dims)] if heads else []), last]
