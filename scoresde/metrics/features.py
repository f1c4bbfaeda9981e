"""Feature spaces: what a distance looks at. Each is a function of a batch x (B, *event) to float64 features (B, d), on
the CPU by default, and each says in its repr what it is.

    Pixels            the flattened event as it is
    PCA               its principal components, fitted on data
    RandomFeatures    two random layers, never trained: favour neither data nor model
    SetFeatures       of sets of points of various sizes, with their mask: random layers of a mean over points
    NetworkFeatures   what a network makes of it: `classifier_features`, `inception`, or your own
"""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scoresde.checks import check_count
from scoresde.masks import Own
from scoresde.metrics.frechet import Statistics
from scoresde.tensors import check_batch

__all__ = ["PCA", "NetworkFeatures", "Pixels", "RandomFeatures", "SetFeatures", "inception"]

Features = Callable[[Tensor], Tensor]
"""A function of a batch (B, *event) to features (B, d)."""


class Pixels:
    """The event itself, flattened: d is its size."""

    def __call__(self, x: Tensor) -> Tensor:
        """x (B, *event) to float64 features (B, d), on the CPU."""
        return x.detach().reshape(len(x), -1).to("cpu", torch.float64)

    def __repr__(self) -> str:
        return "Pixels()"


class RandomFeatures:
    """A fixed, never trained feature space: relu(relu(x W_1) W_2) of the flattened event, the weights N(0, 2 / inputs)
    from a seed.

    A Frechet distance of raw pixels sees their mean and covariance only, so a Gaussian fitted to the data would score
    as well as the data. The two layers bend the space, so that moments of every order count; and since nothing is
    learned, the features favour neither the training set nor any model. They do not know what a digit is: compare
    numbers within one such space only.

    Args:
        event_shape: shape of one sample.
        width: units of the first layer.
        features: units of the second, the dimension d of the space.
        seed: of the weights.
    """

    def __init__(self, event_shape: Sequence[int], width: int = 256, features: int = 64, seed: int = 0) -> None:
        sizes = [math.prod(event_shape), width, features]
        generator = torch.Generator().manual_seed(seed)
        self.event_shape, self.seed = tuple(event_shape), seed
        self.weights = [
            torch.randn(a, b, generator=generator, dtype=torch.float64) * math.sqrt(2 / a)
            for a, b in itertools.pairwise(sizes)
        ]

    def __call__(self, x: Tensor) -> Tensor:
        """x (B, *event_shape) to float64 features (B, d), on the CPU.

        Raises:
            ValueError: if x has another event shape.
        """
        h = _flat(x, self.event_shape)
        for weight in self.weights:
            h = (h @ weight).relu()
        return h

    def __repr__(self) -> str:
        width, features = (weight.shape[1] for weight in self.weights)
        return f"RandomFeatures({self.event_shape}, width={width}, features={features}, seed={self.seed})"


class SetFeatures:
    """A fixed, never trained feature space of sets of points, of any number each: with n the number of a set's points,

        relu([m, log n, 1] W_2),    m = mean over the set's points of relu([x_j, 1] W_1)

    the weights N(0, 2 / inputs) from a seed. The points that fill up a batch are left out of the mean; the order of the
    others says nothing. For the distances of this package: `energy_distance(f(x, mask), f(y, other_mask))`.

    Args:
        channels: numbers of a point.
        width: units of the first layer.
        features: units of the second, the dimension d of the space.
        seed: of the weights.

    >>> x = torch.tensor([[[1.0], [2.0], [9.0]], [[2.0], [1.0], [0.0]]])
    >>> a, b = SetFeatures(1)(x, torch.tensor([True, True, False])[None, :, None])
    >>> torch.allclose(a, b)
    True
    """

    def __init__(self, channels: int, width: int = 256, features: int = 64, seed: int = 0) -> None:
        check_count(channels=channels, width=width, features=features)
        generator = torch.Generator().manual_seed(seed)
        self.channels, self.seed = channels, seed
        self.weights = [
            torch.randn(a, b, generator=generator, dtype=torch.float64) * math.sqrt(2 / a)
            for a, b in ((channels + 1, width), (width + 2, features))
        ]

    def __call__(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, N, channels) and mask, bool, (B, N, 1) or that of one for all, to float64 features (B, d), on the CPU.

        Raises:
            ValueError: if either has another shape, or a set has no point.
        """
        check_batch(x, "x")
        if x.ndim != 3 or x.shape[2] != self.channels:
            raise ValueError(f"x has shape {tuple(x.shape)}: expected sets of points (B, N, {self.channels})")
        mask = torch.ones(1, x.shape[1], 1, dtype=torch.bool) if mask is None else mask.cpu()
        own = Own((*x.shape[:2], 1), mask)
        own.check()
        points = own.only(x.detach().to("cpu", torch.float64))
        one = torch.ones_like(points[..., :1])
        h = (torch.cat([points, one], 2) @ self.weights[0]).relu()
        mean = own.total(own.rows(h.movedim(2, 0)[..., None])).T / own.dims[:, None]
        return (torch.cat([mean, own.dims.log()[:, None], one[:, 0]], 1) @ self.weights[1]).relu()

    def __repr__(self) -> str:
        width, features = (weight.shape[1] for weight in self.weights)
        return f"SetFeatures({self.channels}, width={width}, features={features}, seed={self.seed})"


class PCA:
    """The first principal components of data, centred: z = (x - mean) V, V (D, d) orthonormal, in the order of their
    variances, each signed so that its largest entry is positive.

    Args:
        data: what it is fitted on, (N, *event), floating point, N >= 2.
        components: d, at most min(N - 1, D), D the size of an event.
        whiten: divide each component by its standard deviation in the data.

    Attributes:
        mean, axes: shape (D,), and V.
        std: of each component in the data, shape (d,).
        explained: share of the data's variance that the components keep.

    Raises:
        ValueError: if the data are not as said, or vary in fewer directions than components.
    """

    def __init__(self, data: Tensor, components: int = 64, *, whiten: bool = False) -> None:
        check_batch(data, "data")
        check_count(components=components)
        statistics = Statistics()
        for part in data.split(4096):
            statistics.update(Pixels()(part))
        _, S, V = torch.linalg.svd(statistics.root, full_matrices=False)
        std = S / math.sqrt(max(1, len(data) - 1))
        rank = int((S[:1] * 1e-12 < S).sum())
        if len(data) < 2 or components > rank:
            raise ValueError(
                f"components={components} of {len(data)} data that vary in {rank} directions: ask for fewer"
            )
        axes = V[:components].T
        axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
        self.event_shape, self.whiten = tuple(data.shape[1:]), whiten
        self.mean, self.axes, self.std = statistics.mean, axes.contiguous(), std[:components]
        self.explained = float(self.std.square().sum() / std.square().sum())

    def __call__(self, x: Tensor) -> Tensor:
        """x (B, *event) to float64 features (B, d), on the CPU.

        Raises:
            ValueError: if x has another event shape than the data.
        """
        z = (_flat(x, self.event_shape) - self.mean) @ self.axes
        return z / self.std if self.whiten else z

    def __repr__(self) -> str:
        options = f"components={len(self.std)}{', whiten=True' if self.whiten else ''}"
        return f"PCA(data {self.event_shape}, {options}: {self.explained:.1%} of the variance)"


class NetworkFeatures:
    """What a network makes of a sample, in evaluation mode, a batch at a time, without gradients.

    Args:
        net: a function of a batch (B, *event), in the dtype and on the device given here, to (B, ...), which is
            flattened. Modules are moved to that device and dtype, and are in evaluation mode from then on.
        name: for reports and statistics files; by default that of the network's type.
        event_shape: shape of one sample, checked where it is given.
        batch_size: how many samples the network takes at a time.
        device, dtype: what it computes on and in.
        spatial, logits: spaces of their own, of the same samples: the features before pooling, each at its place, and
            what classes they are taken for. Some metrics need them (`scoresde.metrics.spaces`).
    """

    def __init__(
        self,
        net: Callable[[Tensor], Tensor],
        name: str | None = None,
        *,
        event_shape: Sequence[int] | None = None,
        batch_size: int = 256,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        spatial: Features | None = None,
        logits: Features | None = None,
    ) -> None:
        check_count(batch_size=batch_size)
        self.spatial, self.logits = spatial, logits
        self.net: Callable[[Tensor], Tensor] = net.to(device, dtype).eval() if isinstance(net, nn.Module) else net
        self.name = type(net).__name__ if name is None else name
        self.event_shape = None if event_shape is None else tuple(event_shape)
        self.batch_size, self.device, self.dtype = batch_size, torch.device(device), dtype

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """x (B, *event) to float64 features (B, d), on the CPU.

        Raises:
            ValueError: if x has another event shape.
        """
        if self.event_shape is not None:
            _check_event(x, self.event_shape)
        if isinstance(self.net, nn.Module):
            self.net.eval()
        # A copy of each part, since a network may reuse the memory of its output.
        found = (self.net(part.to(self.device, self.dtype)) for part in x.detach().split(self.batch_size))
        return torch.cat([part.reshape(len(part), -1).to("cpu", torch.float64, copy=True) for part in found])

    def __repr__(self) -> str:
        return f"NetworkFeatures({self.name})"


def inception(
    weights: str | None = None,
    *,
    layer: str = "2048",
    data_range: tuple[float, float] = (-1.0, 1.0),
    batch_size: int = 64,
    device: torch.device | str = "cpu",
) -> NetworkFeatures:
    """The Inception network of published FIDs (Heusel et al., 2017), as torch-fidelity ports it: d = 2048.

    Images are rounded to 256 levels first, as images on a disk are, and resized within the network; grey ones are
    repeated to three channels. Published numbers are of 50,000 samples against the statistics of the training set.

    Args:
        weights: file of the network's weights; by default torch-fidelity downloads them once.
        layer: which features, "2048" or an earlier layer, "64", "192" or "768".
        data_range: (lo, hi), the values of level 0 and level 255 in the images.
        batch_size, device: as in `NetworkFeatures`.

    Raises:
        ImportError: if torch-fidelity is not installed.
        ValueError: unless lo < hi.
    """
    try:
        module: Any = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    except ImportError as error:
        raise ImportError("inception() takes the network from torch-fidelity: pip install scoresde[fid]") from error
    lo, hi = data_range
    if not lo < hi:
        raise ValueError(f"data_range={data_range!r}: expected (lo, hi), lo < hi")
    net = module.FeatureExtractorInceptionV3("inception-v3-compat", [layer], feature_extractor_weights_path=weights)
    net = net.to(device).eval()

    def features(x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise ValueError(f"x has shape {tuple(x.shape)}: expected images (B, 3, H, W) or (B, 1, H, W)")
        levels = ((x - lo) * (255 / (hi - lo))).round().clamp(0, 255).to(torch.uint8)
        found: Tensor = net(levels.expand(-1, 3, -1, -1))[0]
        return found

    name = "inception" if layer == "2048" else f"inception, layer {layer}"
    return NetworkFeatures(features, name, batch_size=batch_size, device=device)


def _check_event(x: Tensor, event_shape: tuple[int, ...]) -> None:
    if tuple(x.shape[1:]) != event_shape:
        raise ValueError(f"x has shape {tuple(x.shape)}: expected (B, {', '.join(map(str, event_shape))})")


def _flat(x: Tensor, event_shape: tuple[int, ...]) -> Tensor:
    _check_event(x, event_shape)
    return Pixels()(x)
