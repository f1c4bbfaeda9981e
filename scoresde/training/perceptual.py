"""The perceptual distance of two images (Zhang et al., 2018, "The unreasonable effectiveness of deep features as a
perceptual metric", eq. 1): what a network makes of both, layer by layer, each place's features scaled to length 1,

    d(x, y) = sum_l mean_places sum_c w_{l,c} (f_{l,c}(x) / |f_l(x)| - f_{l,c}(y) / |f_l(y)|)^2

`classifier_distance` takes the convolutions of a classifier of this package, or one that `Classifier.save` wrote, with
w = 1 / (number of layers). `lpips` takes the published weights, VGG's features and the w that were fitted to people's
judgements, from files that you have: none is downloaded.

A distance that a model is trained with is no judge of it: measure with features of another network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from scoresde.checks import ArgumentError, check_option
from scoresde.metrics.classifier import WEIGHTS, load_classifier

__all__ = ["PerceptualDistance", "classifier_distance", "lpips", "perceptual_distance"]


class PerceptualDistance(nn.Module):
    """distance(x, y) of images (B, C, H, W), shape (B,), with gradients for both. Its weights take none.

    Args:
        layers: the network in pieces, each of which takes what the one before it gave; features are what they give.
        weights: w_l, (C_l,), for each piece.
        channels: that the network takes; grey images are repeated.
        scale: what becomes of images in [-1, 1] before.
        name: for reports.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        weights: Sequence[Tensor],
        channels: int,
        scale: Callable[[Tensor], Tensor] | None = None,
        name: str = "features",
    ) -> None:
        super().__init__()
        self.layers, self.channels, self.scale, self.name = nn.ModuleList(layers), channels, scale, name
        self.weights = nn.ParameterList(weights)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """
        Raises:
            ValueError: if the images have other channels than the network takes.
        """
        if x.shape[1] != self.channels and not (x.shape[1] == 1 and self.channels == 3):
            raise ValueError(
                f"images of {x.shape[1]} channels: the features {self.name} are of {self.channels}; take others"
            )
        found = torch.zeros(len(x), device=x.device)
        a, b = self._prepared(x), self._prepared(y)
        for layer, weight in zip(self.layers, self.weights, strict=True):
            a, b = layer(a), layer(b)
            square = (_directions(a) - _directions(b)).square().flatten(2).mean(2)
            found = found + square @ weight
        return found

    def _prepared(self, x: Tensor) -> Tensor:
        x = x.expand(-1, self.channels, -1, -1)
        return x if self.scale is None else self.scale(x)

    def __repr__(self) -> str:
        return f"PerceptualDistance({self.name})"


def _directions(f: Tensor) -> Tensor:
    f = f.float()
    return f / (torch.linalg.vector_norm(f, dim=1, keepdim=True) + 1e-10)  # its gradient at 0 is 0


def perceptual_distance(source: str | Path) -> PerceptualDistance:
    """By name: "digits" or "fashion-mnist", a file of `Classifier.save`, or "lpips:VGG16.pth,HEADS.pth", `lpips`'s two
    files.

    Raises:
        FileNotFoundError, ValueError: as `classifier_distance` and `lpips`.
    """
    kind, _, files = str(source).partition(":")
    if kind != "lpips":
        return classifier_distance(source)
    backbone, comma, heads = files.partition(",")
    if not comma:
        raise ArgumentError(f"features={str(source)!r}: expected lpips:VGG16.pth,HEADS.pth, two files")
    return lpips(backbone, heads)


def classifier_distance(source: str | Path = "digits") -> PerceptualDistance:
    """By the convolutions of a trained `Classifier`, of images of any size.

    Args:
        source: "digits" or "fashion-mnist", of this package; or a file that `Classifier.save` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if there is no such name, or the file is damaged, or something else.
    """
    if source not in WEIGHTS and not str(source).endswith(".npz"):
        check_option([*WEIGHTS, "a .npz file", "lpips:VGG16.pth,HEADS.pth"], features=str(source))
    net, about = load_classifier(WEIGHTS.get(str(source), Path(source)))
    pieces: list[list[nn.Module]] = [[]]
    for layer in net.convolutions:
        pieces[-1].append(layer)
        if isinstance(layer, nn.ReLU):
            pieces.append([])
    layers = [nn.Sequential(*piece) for piece in pieces[:-1]]
    widths = [int(piece[0].out_channels) for piece in layers]  # type: ignore[arg-type]
    weights = [torch.full((width,), 1 / len(layers)) for width in widths]
    return PerceptualDistance(layers, weights, net.event_shape[0], name=f"classifier of {about.get('data', source)}")


# VGG16's convolutions, by their numbers among its layers, in the pieces after which LPIPS looks, a pool between two.
_VGG = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
_MEAN, _STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of images in [-1, 1], as LPIPS has them


def lpips(backbone: str | Path, heads: str | Path) -> PerceptualDistance:
    """LPIPS with VGG16, of published weights, of images of 16 pixels an axis at least.

    Args:
        backbone: torchvision's file of VGG16 (vgg16-397923af.pth), whose classifier is not read.
        heads: LPIPS's file vgg.pth (version 0.1), w of each piece.

    Raises:
        FileNotFoundError: if a file is not there; none is downloaded.
        ValueError: if it is damaged, or something else. Files are read as tensors: what else is in them is refused.
    """
    features, w = _tensors(backbone, "torchvision's VGG16"), _tensors(heads, "LPIPS's vgg.pth")
    layers, weights = [], []
    for i, numbers in enumerate(_VGG):
        piece: list[nn.Module] = [nn.MaxPool2d(2)] if i else []
        for n in numbers:
            kernel, bias = (_entry(features, f"features.{n}.{what}", backbone) for what in ("weight", "bias"))
            convolution = nn.Conv2d(kernel.shape[1], kernel.shape[0], 3, padding=1)
            _fill(convolution, {"weight": kernel, "bias": bias}, backbone)
            piece += [convolution, nn.ReLU()]
        layers.append(nn.Sequential(*piece))
        head = _entry(w, f"lin{i}.model.1.weight", heads).flatten()
        if len(head) != len(kernel):
            raise ValueError(f"{heads} has {len(head)} weights for the {len(kernel)} features of piece {i}")
        weights.append(head)

    def scale(x: Tensor) -> Tensor:
        mean, std = (x.new_tensor(values).reshape(1, 3, 1, 1) for values in (_MEAN, _STD))
        return (x - mean) / std

    return PerceptualDistance(layers, weights, 3, scale, "LPIPS, VGG16")


def _tensors(path: str | Path, what: str) -> Mapping[str, Tensor]:
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{path} is not there: LPIPS needs {what}, a file that you have (nothing is downloaded). Without it take "
            "the features of a classifier, 'digits' or your own"
        )
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a file of tensors: {' '.join(str(error).split())}") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} holds {type(found).__name__}: expected {what}")
    return found


def _entry(found: Mapping[str, Tensor], name: str, path: str | Path) -> Tensor:
    value = found.get(name)
    if not isinstance(value, Tensor) or not bool(value.isfinite().all()):
        raise ValueError(f"{path} has no finite tensor {name!r}: it is another file than was expected")
    return value.detach().float()


def _fill(layer: nn.Module, values: Mapping[str, Tensor], path: str | Path) -> None:
    try:
        layer.load_state_dict(dict(values))
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit: {' '.join(str(error).split())}") from error
