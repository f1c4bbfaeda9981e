"""A small classifier whose last hidden layer is a feature space: what Inception's is to photographs of 299 pixels, for
images of 8 or 28.

    x -> (3x3 convolution, batch norm, relu) per entry of channels -> linear, batch norm, relu -> features -> linear

The first convolution keeps the size, the others halve it. examples/train_classifier.py trains one; those for the digits
and Fashion-MNIST are in the package, with the accuracy that they reach on images they were not trained on.
"""

from __future__ import annotations

import io
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scoresde.checks import check_count, check_option
from scoresde.files import write_whole
from scoresde.metrics.features import NetworkFeatures

__all__ = ["WEIGHTS", "Classifier", "classifier_features", "load_classifier"]

FORMAT = "scoresde-classifier-1"

WEIGHTS = {name: Path(__file__).parent / "weights" / f"{name}.npz" for name in ("digits", "fashion-mnist")}
"""The classifiers that come with the package, by the data they were trained on."""


class Classifier(nn.Module):
    """Convolutions, one hidden layer and a linear map to the logits.

    Args:
        event_shape: (C, H, W) of an image.
        classes: how many.
        channels: of the convolutions.
        features: units of the hidden layer, the dimension d of the feature space.
    """

    def __init__(
        self,
        event_shape: Sequence[int] = (1, 28, 28),
        classes: int = 10,
        channels: Sequence[int] = (24, 48, 64, 64),
        features: int = 64,
    ) -> None:
        super().__init__()
        if len(event_shape) != 3 or len(channels) == 0:
            raise ValueError(
                f"event_shape={event_shape!r}, channels={channels!r}: expected (C, H, W), and one at least"
            )
        check_count(classes=classes, features=features)
        self.event_shape = tuple(event_shape)
        self.options = {
            "event_shape": [int(n) for n in event_shape],
            "classes": int(classes),
            "channels": [int(n) for n in channels],
            "features": int(features),
        }
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(itertools.pairwise([event_shape[0], *channels])):
            layers += [nn.Conv2d(a, b, 3, stride=2 if i else 1, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        size = [math.ceil(n / 2 ** (len(channels) - 1)) for n in event_shape[1:]]
        inputs = channels[-1] * math.prod(size)
        self.convolutions = nn.Sequential(*layers, nn.Flatten())
        self.hidden = nn.Sequential(nn.Linear(inputs, features, bias=False), nn.BatchNorm1d(features), nn.ReLU())
        self.head = nn.Linear(features, classes)

    def embed(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to features (B, d), none below 0."""
        features: Tensor = self.hidden(self.convolutions(x))
        return features

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, classes)."""
        logits: Tensor = self.head(self.embed(x))
        return logits

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Share of the images that it classifies right, in evaluation mode."""
        training = self.training
        self.eval()
        right = [(self(x).argmax(1) == y).sum() for x, y in zip(images.split(500), labels.split(500), strict=True)]
        self.train(training)
        return int(torch.stack(right).sum()) / len(images)

    def save(self, path: str | Path, about: dict[str, Any]) -> None:
        """Write the weights to a .npz file, whole or not at all: matrices and kernels in float16, the rest as it is.

        Args:
            path: where to.
            about: what it was trained on and how well it does, as JSON can say it.
        """
        arrays = {
            f"weights/{name}": value.detach()
            .cpu()
            .numpy()
            .astype(np.float16 if value.ndim > 1 else value.numpy().dtype)
            for name, value in self.state_dict().items()
        }
        arrays |= {"format": np.array(FORMAT), "about": np.array(json.dumps({"options": self.options, **about}))}
        file = io.BytesIO()
        np.savez_compressed(file, **arrays)
        write_whole(Path(path), lambda out: out.write(file.getvalue()))


def load_classifier(path: str | Path) -> tuple[Classifier, dict[str, Any]]:
    """A classifier that `Classifier.save` wrote, in evaluation mode, and what was said about it. Nothing in the file is
    executed.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or something else; the message names it.
    """
    path = Path(path)
    content = path.read_bytes()
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
        if str(found.pop("format", "")) != FORMAT:
            raise ValueError(f"it is not of the format {FORMAT}")
        about = json.loads(str(found.pop("about")))
        with torch.device("meta"):  # draws no weights
            net = Classifier(**about.pop("options"))
        weights = {name.removeprefix("weights/"): _widened(torch.from_numpy(value)) for name, value in found.items()}
        if not all(bool(value.isfinite().all()) for value in weights.values()):
            raise ValueError("a weight is not finite")
        net.load_state_dict(weights, assign=True)
    except Exception as error:  # zip, zlib, header, JSON and pickle errors, missing and misshapen weights
        raise ValueError(f"{path} cannot be read as a classifier: {' '.join(str(error).split())}") from error
    return net.eval(), about


def _widened(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def classifier_features(
    source: str | Path, *, batch_size: int = 256, device: torch.device | str = "cpu"
) -> NetworkFeatures:
    """The feature space of a trained `Classifier`: its hidden layer; `spatial` the last convolution, whose features are
    each at a place of the image, and `logits` its classes.

    Args:
        source: "digits" or "fashion-mnist", for those of this package (images as `scoresde.data.digits` and
            `scoresde.data.fashion_mnist` scale them, in [-1, 1]); or a file that `Classifier.save` wrote.
        batch_size, device: as in `NetworkFeatures`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if there is no such name, or the file is damaged, or something else.
    """
    if source not in WEIGHTS and not str(source).endswith(".npz"):
        check_option([*WEIGHTS, "a .npz file"], source=source)
    net, about = load_classifier(WEIGHTS.get(str(source), Path(source)))
    net.to(device)
    name = str(about.get("data", source))

    def space(layer: Callable[[Tensor], Tensor], what: str = "", **beside: Any) -> NetworkFeatures:
        own: dict[str, Any] = {"event_shape": net.event_shape, "batch_size": batch_size, "device": device}
        return NetworkFeatures(layer, name + what, **own, **beside)

    return space(net.embed, spatial=space(net.convolutions, ", spatial"), logits=space(net, ", logits"))
