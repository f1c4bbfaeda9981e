"""The networks of score_sde and EDM, which published weights map onto by renaming: DDPM++ and NCSN++ (Song et al.,
2021, appendix H), as table 7 of Karras et al. (2022, appendix F) has them, and ADM (Dhariwal and Nichol, 2021) in the
form of the same table.

    e   = W_2 SiLU(W_1 (f(c) + sqrt(K) A onehot(label) + B augment))          c is the label of the noise
    f_k = sin, cos of c 10000^(-k / (n - 1)), k < n, or of 2 pi c w_k, w_k ~ N(0, 16^2)

            f           resampling       entrance     exit
    DDPM++  sinusoidal  pairs of pixels  standard     standard
    NCSN++  Fourier     (1, 3, 3, 1)     "residual"   standard     CIFAR-10
    NCSN++  Fourier     (1, 3, 3, 1)     "skip"       "skip"       256 and 1024 pixels

It differs from `UNet` in what no option of that says: the embedding is added, before the second norm; attention is
after the last block of a level alone on the way up; filters meet zeros beyond the edges; x itself, made smaller, enters
each level of the way down, and each level of the way up gives an image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde.checks import check_count, check_option
from scoresde.nn.blocks import Attention, Double, Halve, ResidualBlock, conv, filter_taps, group_norm, zero
from scoresde.nn.embedding import check_label, onehot
from scoresde.nn.sizes import HalvingConv
from scoresde.tensors import placed

__all__ = ["NoiseEmbedding", "SongUNet"]


class NoiseEmbedding(nn.Module):
    """What `SongUNet` is told: the label c of the noise, a class, and how the image was augmented. The angles are
    computed in float32 or better, as in training, whatever the network's dtype.

    Args:
        features: width of f(c), even.
        outputs: width of the result.
        fourier: the standard deviation of Gaussian frequencies, drawn from seed 0 and held as a buffer, in radians; or
            None for sinusoidal features.
        num_classes: K, or None. Label K, or none, is the null class: its onehot is zero.
        augment: how many numbers tell of the augmentation (Karras et al., 2020), or None. Zero, or none, is no
            augmentation.
        adm: cosines first, k / n in the exponent, and A onehot(label) added to e.
    """

    frequencies: Tensor | None

    def __init__(
        self,
        features: int,
        outputs: int,
        *,
        fourier: float | None = None,
        num_classes: int | None = None,
        augment: int | None = None,
        adm: bool = False,
    ) -> None:
        super().__init__()
        if features < 4 or features % 2:
            raise ValueError(f"features={features}: expected an even number >= 4")
        check_count(**{k: n for k, n in {"num_classes": num_classes, "augment": augment}.items() if n is not None})
        if fourier is not None and not 0 < fourier < math.inf:
            raise ValueError(f"fourier={fourier}: expected a positive scale of the frequencies, or None")
        self.adm, self.pairs = adm, features // 2
        self.inward, self.outward = nn.Linear(features, outputs), nn.Linear(outputs, outputs)
        self.classes = None if num_classes is None else nn.Linear(num_classes, outputs if adm else features, not adm)
        self.augment = None if augment is None else nn.Linear(augment, features, bias=False)
        frequencies = None
        if fourier is not None:
            generator = torch.Generator().manual_seed(0)
            frequencies = torch.randn(self.pairs, generator=generator, device="cpu", dtype=torch.float32)
            frequencies = placed(2 * math.pi * fourier * frequencies)
        self.register_buffer("frequencies", frequencies)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NoiseEmbedding:
        """Moves the frequencies with the network, and keeps them in float32 where its weights are rounded."""
        kept = self.frequencies
        super()._apply(fn, recurse)
        if kept is not None and self.frequencies is not None and not kept.is_meta:
            self.frequencies = kept.to(self.frequencies.device)
        return self

    def features(self, time: Tensor) -> Tensor:
        """f(c) of time (B,), (B, features)."""
        time = time.to(torch.promote_types(time.dtype, torch.float32))
        frequencies = self.frequencies
        if frequencies is None:
            k = torch.arange(self.pairs, dtype=torch.float32, device=time.device)
            frequencies = 1e-4 ** (k / (self.pairs if self.adm else self.pairs - 1))
        angles = time[:, None] * frequencies.to(time.dtype)
        both = (angles.cos(), angles.sin()) if self.adm else (angles.sin(), angles.cos())
        return torch.cat(both, dim=1)

    def forward(self, time: Tensor, label: Tensor | int | None = None, augment: Tensor | None = None) -> Tensor:
        """time (B,), label, an integer or integers (B,), and augment (B, n) to (B, outputs)."""
        dtype = self.inward.weight.dtype
        check_label(label, time, self.classes is not None)
        f, told = self.features(time).to(dtype), None
        if self.classes is not None:
            K = self.classes.in_features
            row = onehot(label, time, K, dtype)
            told = self.classes(row if self.adm else row * math.sqrt(K))
            if not self.adm:
                f, told = f + told, None
        if augment is not None:
            n = 0 if self.augment is None else self.augment.in_features
            if self.augment is None or augment.shape not in ((n,), (1, n), (time.shape[0], n)):
                raise ValueError(
                    f"augment has shape {tuple(augment.shape)}: this network takes "
                    + (f"{(time.shape[0], n)}" if n else "none: build it with augment= its length")
                )
            f = f + self.augment(augment.to(dtype))
        e: Tensor = self.outward(F.silu(self.inward(f)))
        return e if told is None else e + told


class _Shrink(nn.Module):
    """DDPM's: zeros after the last entry of each axis, then a convolution of stride 2."""

    def __init__(self, channels: int, dims: int) -> None:
        super().__init__()
        self.dims, self.conv = dims, (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](channels, channels, 3, stride=2)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h: Tensor = self.conv(F.pad(x, [p for n in reversed(x.shape[2:]) for p in (0, 1 + n % 2)]))
        return h


class _Grow(nn.Module):
    """DDPM's: nearest neighbours, then a convolution."""

    def __init__(self, channels: int, dims: int) -> None:
        super().__init__()
        self.enlarge, self.conv = Double(dims), conv(dims, channels, channels, 3)

    def forward(self, x: Tensor, embedding: Tensor, size: Sequence[int]) -> Tensor:
        h: Tensor = self.conv(self.enlarge(x, size))
        return h


class _Level(nn.Module):
    """One level on its way down or up.

    Attributes:
        resample: to its size, from the level before; None for the first.
        merge: on the way down, of x as it enters here; None where it does not.
        stages: its residual blocks, each with the attention after it.
        readout: on the way up, of an image; None where there is none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.resample: nn.Module | None = None
        self.merge: nn.Module | None = None
        self.stages = nn.ModuleList()
        self.readout: nn.Module | None = None


def _through(stage: nn.Module, h: Tensor, embedding: Tensor) -> Tensor:
    """A block, then attention where there is any."""
    assert isinstance(stage, nn.ModuleList)
    block, *attention = stage
    h = block(h, embedding)
    for layer in attention:
        h = layer(h)
    return h


class SongUNet(nn.Module):
    """net(x, time, label=None, augment=None) for data (B, image_channels, H, W), or (B, image_channels, L), or (B,
    image_channels, D, H, W), time being the label c of the noise. Its output starts at zero.

    >>> net = SongUNet(3, channels=16, multipliers=(1, 2), blocks=1, fourier=16.0, entrance="residual")
    >>> net(torch.zeros(2, 3, 8, 8), torch.tensor([-1.0, 1.0])).shape
    torch.Size([2, 3, 8, 8])

    Args:
        image_channels, out_channels: of x, and of the result, the same by default.
        channels, multipliers: features of the finest level, and what they are times at each.
        blocks: residual blocks a level on the way down; one more on the way up.
        attention: the levels with attention, 0 being the finest; in the middle there always is.
        dropout: probability in each block.
        num_classes, augment: as for `NoiseEmbedding`.
        dims: axes of the data.
        fourier: scale of Fourier features, twice as wide as the sinusoidal ones, or None for these.
        features: width of f(c), where it is another.
        fir: the filter that halves and doubles, or None: means, and nearest neighbours.
        entrance: how x enters the levels below the first. "standard": not at all. "skip": halved again and again,
            through a convolution of one tap, added. "residual": what entered the level above (x itself, at first)
            through a filtered convolution that halves, added and divided by sqrt(2); it is what goes on.
        exit: "standard", one image; "skip", the sum of an image of every level, doubled on its way.
        skip_scale: factor of each sum of a block and what passes it.
        resample: "block", in a residual block; "conv", by a convolution as in DDPM.
        kind: "song", or "adm": scale and shift from the embedding, attention in every block of its levels, heads of 64
            features, no skip scale, and `NoiseEmbedding`'s adm.

    Raises:
        ValueError: if an argument is not one of these, or leaves its range.
    """

    def __init__(
        self,
        image_channels: int = 3,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 2, 2, 2),
        blocks: int = 4,
        attention: Sequence[int] = (1,),
        dropout: float = 0.1,
        num_classes: int | None = None,
        *,
        augment: int | None = None,
        dims: int = 2,
        fourier: float | None = None,
        features: int | None = None,
        fir: Sequence[float] | None = None,
        entrance: Literal["standard", "skip", "residual"] = "standard",
        exit: Literal["standard", "skip"] = "standard",
        skip_scale: float = math.sqrt(0.5),
        resample: Literal["block", "conv"] = "block",
        kind: Literal["song", "adm"] = "song",
        out_channels: int | None = None,
    ) -> None:
        super().__init__()
        outputs = image_channels if out_channels is None else out_channels
        check_count(image_channels=image_channels, channels=channels, blocks=blocks, out_channels=outputs)
        check_option((1, 2, 3), dims=dims)
        check_option(("standard", "skip", "residual"), entrance=entrance)
        check_option(("standard", "skip"), exit=exit)
        check_option(("block", "conv"), resample=resample)
        check_option(("song", "adm"), kind=kind)
        if fir is not None:
            filter_taps(fir)
        if not 0 <= dropout < 1 or not 0 < skip_scale < math.inf:
            raise ValueError(
                f"dropout={dropout}, skip_scale={skip_scale}: expected a probability below 1 and a positive factor"
            )
        widths = [channels * m for m in multipliers]
        if not widths or any(level not in range(len(widths)) for level in attention):
            raise ValueError(
                f"attention at levels {tuple(attention)} of a U-Net with {len(widths)} levels: expected one level or "
                "more, of which 0 is the finest"
            )
        adm, embedding = kind == "adm", 4 * channels
        self.dims, self.entrance, self.exit = dims, entrance, exit
        self.embedding = NoiseEmbedding(
            features or channels * (1 if fourier is None else 2),
            embedding,
            fourier=fourier,
            num_classes=num_classes,
            augment=augment,
            adm=adm,
        )
        eps, scale = (1e-5, 1.0) if adm else (1e-6, skip_scale)
        common: dict[str, Any] = {"dims": dims, "skip_scale": scale, "eps": eps}

        def block(inputs: int, outputs: int, way: Literal["down", "up"] | None = None) -> ResidualBlock:
            own: dict[str, Any] = {"additive": not adm, "project": not adm, "resample": way, "fir": fir, "edge": "zero"}
            return ResidualBlock(inputs, outputs, embedding, dropout, **common, **own)

        def stage(inputs: int, outputs: int, attend: bool) -> nn.ModuleList:
            heads = max(1, outputs // 64) if adm else 1
            return nn.ModuleList([block(inputs, outputs), *attend * [Attention(outputs, heads, **common)]])

        def read(width: int) -> nn.Module:
            return nn.Sequential(group_norm(width, eps=eps), nn.SiLU(), zero(conv(dims, width, outputs, 3)))

        width = widths[0] if adm else channels
        self.inward = conv(dims, image_channels, width, 3)
        self.shrink, self.enlarge = Halve(dims, fir, "zero"), Double(dims, fir, "zero")
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips, entered = [width], image_channels
        for n, w in enumerate(widths):
            level = _Level()
            if n:
                level.resample = block(width, width, "down") if resample == "block" else _Shrink(width, dims)
                if entrance == "skip":
                    level.merge = conv(dims, image_channels, width, 1)
                elif entrance == "residual":
                    level.merge, entered = HalvingConv(entered, width, dims, fir, "zero"), width
                skips.append(width)
            for _ in range(blocks):
                level.stages.append(stage(width, w, n in attention))
                width = w
                skips.append(width)
            self.down.append(level)
        self.middle = nn.ModuleList([stage(width, width, True), stage(width, width, False)])
        for n, w in reversed(list(enumerate(widths))):
            level = _Level()
            if n < len(widths) - 1:
                level.resample = block(width, width, "up") if resample == "block" else _Grow(width, dims)
            for i in range(blocks + 1):
                level.stages.append(stage(width + skips.pop(), w, n in attention and (adm or i == blocks)))
                width = w
            if exit == "skip" or n == 0:
                level.readout = read(width)
            self.up.append(level)

    @property
    def condition_sizes(self) -> dict[str, int]:
        """What it can be told: the name of each condition, with the number of classes. (Of an augmentation it is told
        in training alone.)
        """
        return {} if self.embedding.classes is None else {"label": self.embedding.classes.in_features}

    def forward(
        self, x: Tensor, time: Tensor, label: Tensor | int | None = None, augment: Tensor | None = None
    ) -> Tensor:
        """x (B, image_channels, H, W), time (B,), label (B,), augment (B, n), to (B, out_channels, H, W).

        Raises:
            ValueError: if x has not `dims` axes, or label or augment is unexpected, or of another shape.
        """
        if x.dim() != self.dims + 2:
            raise ValueError(f"x of shape {tuple(x.shape)}: expected (B, C) and {self.dims} axes more")
        embedding = self.embedding(time, label, augment)
        h = self.inward(x)
        skips, entering = [h], x
        for level in self.down:
            assert isinstance(level, _Level)
            if level.resample is not None:
                h = level.resample(h, embedding)
                if level.merge is not None and self.entrance == "skip":
                    entering = self.shrink(entering)
                    h = h + level.merge(entering)
                elif level.merge is not None:
                    h = entering = (h + level.merge(entering)) * math.sqrt(0.5)
                skips.append(h)
            for stage in level.stages:
                h = _through(stage, h, embedding)
                skips.append(h)
        for stage in self.middle:
            h = _through(stage, h, embedding)
        image: Tensor | None = None
        for level in self.up:
            assert isinstance(level, _Level)
            if level.resample is not None:
                h = level.resample(h, embedding, skips[-1].shape[2:])
            for stage in level.stages:
                h = _through(stage, torch.cat([h, skips.pop()], dim=1), embedding)
            if level.readout is not None:
                here = level.readout(h)
                image = here if image is None else here + self.enlarge(image, here.shape[2:])
        assert image is not None
        return image
