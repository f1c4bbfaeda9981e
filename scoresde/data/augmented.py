"""Super-resolution told a small image that is spoiled on purpose, and how much: conditioning augmentation (Ho et al.,
2022, "Cascaded diffusion models for high fidelity image generation", section 4). In training the small image is a real
one, in a cascade a sample, with faults that no real one has; blur and noise hide them.

    y = sqrt(1 - s^2) G_b down(x) + s z,   z ~ N(0, I)

G_b is a Gaussian blur of standard deviation b (small pixels; Ramesh et al., 2022, section 2.1), s the share of noise
(Saharia et al., 2022, "Photorealistic text-to-image diffusion models", section 2.3). The network is told up(y) and the
numbers s and b, each uniform in a range, for every item and epoch anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scoresde.checks import ArgumentError
from scoresde.data.conditions import Condition, Given, same_number
from scoresde.data.shown import Shown
from scoresde.data.tasks import SuperResolution, resized

__all__ = ["AugmentedSuperResolution"]


@dataclass(frozen=True)
class AugmentedSuperResolution(Condition):
    """`SuperResolution` of a blurred and noisy small image, whose strengths are a `vector` of the network: s and b, of
    those that are not None, in this order.

    In training they are uniform in these ranges; a cascade (`scoresde.Cascade`) chooses them, `at(noise=0.1)`. With
    both at 0 the image is `SuperResolution`'s to the bit.

    Args:
        factor: >= 2.
        noise: range of s, in [0, 1]; 1 leaves nothing of the image. None where there never is any.
        blur: range of b, in small pixels; None where there never is any.

    Raises:
        ValueError: unless 0 <= low <= high, s <= 1, and one of them is given.

    >>> up = AugmentedSuperResolution(2, noise=(0.0, 0.5))
    >>> up.options((1, 8, 8)), up.at(noise=0.1)
    ({'image_condition': 1, 'vector': 1}, AugmentedSuperResolution(factor=2, noise=(0.1, 0.1), blur=None))
    """

    factor: int = 2
    noise: tuple[float, float] | None = (0.0, 0.5)
    blur: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        _ = self._plain  # raises
        for name, most in (("noise", 1.0), ("blur", float("inf"))):
            if (found := getattr(self, name)) is None:
                continue
            found = tuple(float(v) for v in found) if isinstance(found, list | tuple) else (found,)
            if len(found) != 2 or not 0 <= found[0] <= found[1] <= most or found[1] == float("inf"):
                raise ArgumentError(f"{name}={found}: expected (low, high), 0 <= low <= high{' <= 1' * (most == 1)}")
            object.__setattr__(self, name, found)
        if self.noise is None and self.blur is None:
            raise ArgumentError("noise=None, blur=None: without either it is SuperResolution")

    @property
    def _plain(self) -> SuperResolution:
        return SuperResolution(self.factor)

    @property
    def _ranges(self) -> list[tuple[float, float]]:
        return [found for found in (self.noise, self.blur) if found is not None]

    def at(self, *, noise: float | None = None, blur: float | None = None) -> AugmentedSuperResolution:
        """The same with strengths that are chosen, 0 where they are not: what `enlarged` is to tell a network.

        Raises:
            ValueError: if one is given that this has not, or one, 0 too, is out of its range, as the network has not
                seen it.
        """
        found: dict[str, tuple[float, float] | None] = {}
        for name, value in (("noise", noise), ("blur", blur)):
            trained = getattr(self, name)
            if trained is None and value is not None:
                raise ArgumentError(f"{name}={value}: {self!r} has none")
            chosen = 0.0 if value is None else float(value)
            if trained is not None and not trained[0] <= chosen <= trained[1]:
                raise ArgumentError(f"{name}={chosen:g}: the network is trained on {trained[0]} to {trained[1]}")
            found[name] = None if trained is None else (chosen, chosen)
        return replace(self, **found)  # type: ignore[arg-type]

    def channels(self, shape: Sequence[int]) -> int:
        return self._plain.channels(shape)

    def options(self, shape: Sequence[int]) -> dict[str, int]:
        return {"image_condition": self.channels(shape), "vector": len(self._ranges)}

    def __call__(self, x: Tensor, shown: Shown) -> Tensor:
        return self.told(x, shown)["image"]

    def told(self, x: Tensor, shown: Shown) -> dict[str, Tensor]:
        same_number(x, shown)
        u = shown.uniform(len(self._ranges))
        strengths = torch.stack([low + (high - low) * u[:, i] for i, (low, high) in enumerate(self._ranges)], 1)
        small = self._plain.small(x)
        return self._of(small, strengths.to(x), lambda like: shown.normal(like.shape[1:]).to(like), x.shape[2:])

    def measured(self, y: Tensor, shape: Sequence[int]) -> tuple[Condition, ...]:
        self.at()  # raises where the network has not seen a strength of 0
        y = self._plain.taken(y, shape)
        return Given(y), Given(y.new_zeros(len(y), len(self._ranges)))

    def enlarged(self, small: Tensor, noise: Callable[[int, Tensor], Tensor]) -> dict[str, Tensor]:
        """What a network is told of small images, at strengths that are chosen (`at`): a stage of a `Cascade`.

        Args:
            small: (B, C, h, w); the images are (B, C, factor h, factor w).
            noise: noise(0, small) is standard normal, of its shape.

        Returns:
            image and vector.

        Raises:
            ValueError: if a strength is a range.
        """
        if any(low != high for low, high in self._ranges):
            raise ValueError(f"{self!r}: choose the strengths, .at(noise=0.1) say, from the ranges that were trained")
        strengths = small.new_tensor([low for low, _ in self._ranges]).expand(len(small), -1)
        size = [self.factor * n for n in small.shape[2:]]
        return self._of(small, strengths, lambda like: noise(0, like), size)

    def _of(
        self, small: Tensor, strengths: Tensor, normal: Callable[[Tensor], Tensor], size: Sequence[int]
    ) -> dict[str, Tensor]:
        y = small
        if self.blur is not None and self.blur[1] > 0:
            y = blurred(y, strengths[:, -1])
        if self.noise is not None and self.noise[1] > 0:
            s = strengths[:, 0, None, None, None]
            y = (1 - s**2).sqrt() * y + s * normal(y)
        return {"image": resized(y, size), "vector": strengths}


def blurred(x: Tensor, std: Tensor) -> Tensor:
    """Images (B, C, H, W) under a Gaussian of that standard deviation, in pixels, (B,); at the edges it has what is
    within, with weights that add up to 1. Where std = 0, x.
    """
    for axis in (2, 3):
        i = torch.arange(x.shape[axis], device=x.device, dtype=x.dtype)
        d2 = (i[:, None] - i) ** 2 / (2 * std.to(x).clamp(min=1e-4) ** 2)[:, None, None]
        weights = torch.softmax(-d2, dim=2)
        x = torch.einsum("bij,bcjw->bciw" if axis == 2 else "bij,bchj->bchi", weights, x)
    return x
