"""Energy guidance: any differentiable function E steers the samples,

    score'(x_t) = score(x_t) - w(t) grad_x E,    E = E(x_t, t), or E(D(x_t, t)) through the denoiser

For data tilted by an energy, p'(x_0) ~ p(x_0) e^{-E(x_0)}, the energy that is exact at every t is

    E_t(x_t) = -log E[ e^{-E(x_0)} | x_t ]

and E(D), the usual stand-in, differs from it by what the posterior's width makes of E. An example that shows by how
much: data of isotropic posterior variance v_t (a Gaussian's) and E(x_0) = a |x_0 - c|^2 / 2 give

    E_t(x_t) = (a / (1 + a v_t)) |D - c|^2 / 2 + const

so E(D) with the scale w(t) = 1 / (1 + a v_t) is exact, and with w = 1 too strong wherever the noise is not small.

Ready energies: `similarity` of two encoders (the CLIP form; Nichol et al., 2022, GLIDE), `distance` to a point, of an
encoder's features too. A negative scale leads away from it, from a class's mean say, to where data is rare; `contrast`
does so relative to the means of other classes (in the manner of Sehwag et al., 2022, "Generating high fidelity data
from low-density regions using diffusion models").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from scoresde.denoiser import Denoiser
from scoresde.entries import check_entries
from scoresde.guidance.base import Guidance, Scale
from scoresde.guidance.gradients import guided_by, usable
from scoresde.tensors import Time, precise

__all__ = ["Energy", "class_means", "contrast", "distance", "similarity"]


class Energy(Guidance):
    """A denoiser guided down an energy.

    Args:
        denoiser: the denoiser to wrap.
        energy: E(x, t), or E(x_0) if clean: differentiable, shape (B,), each sample's by itself; t is float64 of shape
            () or (B,).
        scale: w: a number, one per sample (B,), or a function of t. 0 is the wrapped denoiser, bit for bit; negative,
            it leads up the energy.
        clean: whether the energy is one of clean data, read at D. (The network then is differentiated too.)

    Raises:
        TypeError: if denoiser is none, or the energy cannot be called.
        ValueError: on another scale; by the call, if it has neither one entry nor one per sample, or the energy
            returns anything but one value per sample.

    >>> from scoresde import VPSDE
    >>> from scoresde.exact import Gaussian
    >>> target = Gaussian(mean=[0.0], std=1.0)
    >>> v = lambda t: VPSDE().sigma(t) ** 2  # posterior variance of N(0, 1) data on a VP SDE
    >>> tilted = Energy(target.denoiser(VPSDE()), distance(torch.ones(1)), lambda t: 1 / (1 + v(t)), clean=True)
    >>> expected = Gaussian(mean=[0.5], std=0.5**0.5).denoiser(VPSDE())  # N(0, 1) e^{-(x - 1)^2 / 2}
    >>> x = torch.linspace(-3, 3, 5)[:, None]
    >>> bool((tilted(x, 0.3).mean - expected(x, 0.3).mean).abs().max() < 1e-6)
    True
    """

    masks = True

    def __init__(
        self, denoiser: Denoiser, energy: Callable[..., Tensor], scale: Scale = 1.0, *, clean: bool = False
    ) -> None:
        super().__init__(denoiser, scale)
        if not callable(energy):
            raise TypeError(f"energy is {type(energy).__name__}: expected a function of (x, t), or of x_0 if clean")
        self.energy, self.clean = energy, clean

    def prepared(self, cond: Mapping[str, Any] | None) -> dict[str, Any]:
        return self.denoiser.prepared(cond)

    def guided(self, x: Tensor, t: Time, cond: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        t = usable(t)

        def log_density(x: Tensor) -> Tensor:
            E: Any = self.energy(x) if self.clean else self.energy(x, precise(t))
            return -E if isinstance(E, Tensor) else E

        return guided_by(self.denoiser, log_density, x, t, cond, self.clean)

    def __repr__(self) -> str:
        name = getattr(self.energy, "__qualname__", type(self.energy).__name__)
        return f"Energy({self.denoiser!r}, {name}, scale={self.scale!r}, clean={self.clean})"


def similarity(encoder: Callable[..., Tensor], target: Tensor, *, normalised: bool = True) -> Callable[..., Tensor]:
    """The energy -cos(f(x), y), or -f(x) . y: f an encoder of the data, y the other encoder's output, of a text say.

    Args:
        encoder: f(x) to features (B, ...); f(x, t) where the energy is called with t, as one of noisy data is.
        target: y, shape (1, ...) for all samples or (B, ...).
        normalised: the cosine, of features of any length; if not, the inner product, which long features make larger.

    Returns:
        The energy, a function of x, or of x and t, to shape (B,); a cosine is in [-1, 1].

    Raises:
        ValueError: by the call, if the features' shapes do not fit.
    """

    def energy(x: Tensor, *t: Time) -> Tensor:
        f, y = _pair(encoder(x, *t), target, "target")
        return -F.cosine_similarity(f, y, dim=1) if normalised else -(f * y).sum(1)

    return energy


def distance(
    point: Tensor, encoder: Callable[..., Tensor] | None = None, std: float | Tensor = 1.0
) -> Callable[..., Tensor]:
    """The energy |f(x) - m|^2 / (2 std^2): with positive scale towards m, with negative away from it.

    Args:
        point: m, shape of one sample or of its features, or one per sample (B, ...).
        encoder: f; x itself if not given. Called as the energy is, f(x) or f(x, t).
        std: a number, or a tensor that broadcasts to the features' shape; like the point, of any device and dtype.

    Returns:
        The energy, a function of x, or of x and t, to shape (B,).

    Raises:
        ValueError: by the call, if the features' shapes do not fit.
    """

    def energy(x: Tensor, *t: Time) -> Tensor:
        f = x if encoder is None else encoder(x, *t)
        flat, m = _pair(f, point if point.ndim == f.ndim else point[None], "point")
        width = usable(std).to(f) if isinstance(std, Tensor) else std
        return (((flat - m).reshape(f.shape) / width) ** 2).reshape(len(f), -1).sum(1) / 2

    return energy


def contrast(
    points: Tensor, label: int | Tensor, encoder: Callable[..., Tensor] | None = None, std: float | Tensor = 1.0
) -> Callable[..., Tensor]:
    """The energy log sum_k e^{d_k - d_y}, d_k = |f(x) - m_k|^2 / (2 std^2): away from the point m_y of the own class,
    relative to the points m_k of the others.

    It is the cross-entropy of y under softmax(d), p_k say, and its gradient in the features is

        sum_k p_k (m_y - m_k) / std^2

    whose length is bounded, where that of `distance` grows with the distance. A positive scale leads away from m_y, to
    the side of those points that are farthest.

    Args:
        points: m, one for each class, shape (K, ...) of samples or of their features: `class_means`.
        label: y, a class or one per sample (B,).
        encoder, std: as for `distance`.

    Returns:
        The energy, a function of x, or of x and t, to shape (B,), >= 0.

    Raises:
        ValueError: by the call, if the features' shapes or the labels do not fit.

    >>> points = torch.tensor([[0.0], [2.0]])
    >>> contrast(points, 0)(torch.tensor([[1.0], [-3.0]]))  # as far from both; 4 further from the other one
    tensor([0.6931, 8.0003])
    """

    def energy(x: Tensor, *t: Time) -> Tensor:
        f = x if encoder is None else encoder(x, *t)
        classes = torch.as_tensor(label, device=f.device)
        check_entries("label", classes, len(f))
        d = torch.stack([distance(m[None], std=std)(f) for m in points], 1)
        return F.cross_entropy(d, classes.expand(len(f)), reduction="none")

    return energy


def class_means(features: Tensor, labels: Tensor) -> Tensor:
    """The mean of each class, shape (classes, ...), of features (N, ...) with labels (N,): points for `distance`.

    They are summed in float64, and are of the features' dtype; in float64 where those are whole numbers.

    Raises:
        ValueError: if there is not a label for each, or a class up to the largest has none.

    >>> class_means(torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([0, 0, 1])).tolist()
    [[2.0], [5.0]]
    """
    if labels.shape != features.shape[:1]:
        raise ValueError(f"labels has shape {tuple(labels.shape)}: expected ({len(features)},)")
    counts = torch.bincount(labels)
    if bool((counts == 0).any()):
        raise ValueError(f"classes with {counts.tolist()} items: expected one or more of each")
    wide = torch.float32 if features.device.type == "mps" else torch.float64
    flat = features.reshape(len(features), -1).to(torch.promote_types(features.dtype, wide))
    sums = flat.new_zeros(len(counts), flat.shape[1]).index_add_(0, labels, flat)
    means = (sums / counts[:, None]).reshape(-1, *features.shape[1:])
    return means.to(features.dtype) if features.is_floating_point() or features.is_complex() else means


def _pair(f: Tensor, target: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Features and what they are compared to, flattened, on the same device and in the same dtype."""
    if target.shape[1:] != f.shape[1:] or target.ndim != f.ndim:
        raise ValueError(f"{name} has shape {tuple(target.shape)} for features {tuple(f.shape)}: expected the same")
    check_entries(name, target, len(f))
    target = usable(target).to(f)
    return f.reshape(len(f), -1), target.reshape(len(target), -1)
