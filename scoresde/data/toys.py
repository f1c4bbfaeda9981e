"""Laws in the plane to try things on. Each has mean 0 and E |x|^2 = 2 exactly, standard deviation 1 along an axis on
average, its noise included:

    x = sqrt(2 / (V + 2 s^2)) (p - E p + s z),   V = E |p - E p|^2,   z ~ N(0, I)

with p a point of the figure and s the noise, both in the figure's own units.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from scoresde.checks import check_count, check_nonnegative

__all__ = ["TOYS", "checkerboard", "eight_gaussians", "rings", "spiral", "swiss_roll", "two_moons"]

Seed = int | torch.Generator
"""A generator on the CPU, or the seed of one."""


def eight_gaussians(n: int, seed: Seed = 0, noise: float = 0.1) -> tuple[Tensor, Tensor]:
    """Eight Gaussians around a circle of radius 1.

    Args:
        n: points.
        seed: an integer, or a generator on the CPU. The global generator is not touched.
        noise: s, standard deviation.

    Returns:
        x: float32, shape (n, 2).
        labels: int64, shape (n,): which Gaussian, 0 to 7.

    Raises:
        ValueError: unless n >= 1 and noise >= 0.
    """
    u, generator = _begin(n, seed, noise)
    labels = (8 * u[:, 0]).long()
    return _finish(_polar(torch.ones(n, device="cpu"), labels * (math.pi / 4)), (0, 0), 1, noise, generator), labels


def two_moons(n: int, seed: Seed = 0, noise: float = 0.1) -> tuple[Tensor, Tensor]:
    """Two half circles of radius 1 that reach into each other; labels 0 (the upper) and 1. All as in
    `eight_gaussians`."""
    u, generator = _begin(n, seed, noise)
    labels = (u[:, 0] >= 0.5).long()
    upper = _polar(torch.ones(n, device="cpu"), math.pi * u[:, 1])
    lower = torch.tensor([1.0, 0.5], device="cpu") - upper
    V = 21 / 16 - 1 / math.pi
    return _finish(torch.where(labels[:, None] == 0, upper, lower), (0.5, 0.25), V, noise, generator), labels


def rings(n: int, seed: Seed = 0, noise: float = 0.05) -> tuple[Tensor, Tensor]:
    """Two circles of radius 1/2 and 1, as many points on each; labels 0 (the inner) and 1. All as in
    `eight_gaussians`."""
    u, generator = _begin(n, seed, noise)
    labels = (u[:, 0] >= 0.5).long()
    return _finish(_polar((1 + labels) / 2, 2 * math.pi * u[:, 1]), (0, 0), 5 / 8, noise, generator), labels


def spiral(n: int, seed: Seed = 0, noise: float = 0.25) -> tuple[Tensor, Tensor]:
    """Two arms r = theta, theta = 3 pi sqrt(u) with u uniform: one and a half turns; labels 0 and 1 are the arms. All
    as in `eight_gaussians`."""
    u, generator = _begin(n, seed, noise)
    labels, theta = (u[:, 0] >= 0.5).long(), 3 * math.pi * u[:, 1].sqrt()
    return _finish(_polar(theta * (1 - 2 * labels), theta), (0, 0), 4.5 * math.pi**2, noise, generator), labels


def swiss_roll(n: int, seed: Seed = 0, noise: float = 0.5) -> tuple[Tensor, Tensor]:
    """A roll r = theta, theta uniform from 3 pi / 2 to 9 pi / 2; labels 0 for its inner half of theta and 1. All as in
    `eight_gaussians`."""
    u, generator = _begin(n, seed, noise)
    theta, mean = 1.5 * math.pi * (1 + 2 * u[:, 1]), (2.0, 2 / (3 * math.pi))
    V = 9.75 * math.pi**2 - mean[0] ** 2 - mean[1] ** 2
    return _finish(_polar(theta, theta), mean, V, noise, generator), (u[:, 1] >= 0.5).long()


def checkerboard(n: int, seed: Seed = 0, noise: float = 0.0) -> tuple[Tensor, Tensor]:
    """Uniform on the eight dark squares of a board of four by four, of side 1; labels 0 to 7, column by column from the
    left. All as in `eight_gaussians`."""
    u, generator = _begin(n, seed, noise)
    labels = (8 * torch.rand(n, generator=generator, device="cpu", dtype=torch.float64)).long()
    column = labels // 2
    corner = torch.stack([column, 2 * (labels % 2) + column % 2], 1)
    return _finish(corner + u, (2, 2), 8 / 3, noise, generator), labels


def _begin(n: int, seed: Seed, noise: float) -> tuple[Tensor, torch.Generator]:
    """Uniform numbers in [0, 1), float64, shape (n, 2), and the generator that they are from."""
    check_count(n=n)
    check_nonnegative(noise=noise)
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator("cpu").manual_seed(seed)
    return torch.rand(n, 2, generator=generator, dtype=torch.float64, device="cpu"), generator


def _polar(r: Tensor, theta: Tensor) -> Tensor:
    return torch.stack([r * theta.cos(), r * theta.sin()], 1)


def _finish(p: Tensor, mean: tuple[float, float], V: float, noise: float, generator: torch.Generator) -> Tensor:
    """x of the figure's points; mean and V as in the module's equation."""
    z = torch.randn(p.shape, generator=generator, dtype=torch.float64, device="cpu")
    centred = p.double() - torch.tensor(mean, dtype=torch.float64, device="cpu")
    return ((centred + noise * z) * math.sqrt(2 / (V + 2 * noise**2))).float()


TOYS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "eight-gaussians": eight_gaussians,
    "two-moons": two_moons,
    "rings": rings,
    "spiral": spiral,
    "swiss-roll": swiss_roll,
    "checkerboard": checkerboard,
}
"""By name."""
