"""A trained classifier of noisy data as a file: safetensors, whose header says in JSON what the classifier is and what
it was made for. Nothing in the file is executed, and a denoiser of another SDE or other data is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scoresde.data.arrays import digest
from scoresde.denoiser import Denoiser
from scoresde.errors import CheckpointError
from scoresde.files import sealed, unsealed, write_whole
from scoresde.guidance.base import Scale
from scoresde.guidance.classifier import Classifier
from scoresde.nn import NoisyClassifier
from scoresde.sde import SDE
from scoresde.training.identity import sde_in_words
from scoresde.training.whole_files import check_safetensors

__all__ = ["TrainedClassifier"]

FORMAT = "scoresde-noisy-classifier-1"


@dataclass(frozen=True)
class TrainedClassifier:
    """A classifier of noisy data with what it was made for.

    Attributes:
        net: it.
        sde: of its training, in words: `TrainedClassifier.of` writes them.
        shape: of an item, (C, H, W) of images.
        time_scale: the net is told time_scale * t.
        about: what it was trained on and how well it does, as JSON can say it.

    >>> from scoresde import VPSDE
    >>> from scoresde.exact import Gaussian
    >>> trained = TrainedClassifier.of(NoisyClassifier(classes=2, channels=4), VPSDE(), (1, 8, 8), time_scale=999)
    >>> exact = Gaussian(torch.zeros(1, 8, 8), std=0.5).denoiser(VPSDE())
    >>> trained.guide(exact, scale=2.0)(torch.zeros(3, 1, 8, 8), 0.5, label=torch.tensor([0, 1, 1])).mean.shape
    torch.Size([3, 1, 8, 8])
    """

    net: NoisyClassifier
    sde: str
    shape: tuple[int, ...]
    time_scale: float = 1.0
    about: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        net: NoisyClassifier,
        sde: SDE,
        shape: Sequence[int],
        time_scale: float = 1.0,
        about: Mapping[str, Any] | None = None,
    ) -> TrainedClassifier:
        """Of a classifier that was trained on that SDE."""
        return cls(net, sde_in_words(sde), tuple(shape), time_scale, about or {})

    @property
    def classes(self) -> int:
        """How many."""
        return self.net.outward.out_features

    @property
    def digest(self) -> str:
        """A hash of its weights."""
        return _digest(self.net.state_dict())

    def time(self, t: Tensor) -> Tensor:
        """What the net is told of t, shape (B,): give `classifier_loss` and `Classifier` this."""
        return self.time_scale * t

    def guide(
        self,
        denoiser: Denoiser,
        scale: Scale = 1.0,
        *,
        shape: Sequence[int] | None = None,
        classes: int | None = None,
        conditional: bool = False,
    ) -> Classifier:
        """The denoiser guided by it; the class is the condition "label".

        Args:
            denoiser: the denoiser to wrap.
            scale: w, as for `Classifier`.
            shape: of the denoiser's items, where it is known.
            classes: that the denoiser is told, where it is told some.
            conditional: as for `Classifier`.

        Raises:
            TypeError: if denoiser is none.
            ValueError: if it is of another SDE, or other items or classes; on another scale.
        """
        guided = Classifier(denoiser, self.net, scale, time=self.time, conditional=conditional)
        for what, mine, theirs in (
            ("SDE", self.sde, sde_in_words(denoiser.sde)),
            ("item", self.shape, self.shape if shape is None else tuple(shape)),
            ("number of classes", self.classes, self.classes if classes is None else classes),
        ):
            if mine != theirs:
                raise ValueError(f"the classifier was made for another {what}: {mine}, and the denoiser's is {theirs}")
        return guided

    def save(self, path: str | Path) -> None:
        """Write it to a .safetensors file, whole or not at all.

        Raises:
            ImportError: if safetensors is not installed.
            ValueError: if a weight is not finite.
        """
        check_safetensors()
        from safetensors.torch import save

        weights = {name: value.detach().cpu().contiguous().clone() for name, value in self.net.state_dict().items()}
        if bad := [name for name, value in weights.items() if not bool(value.isfinite().all())]:
            raise ValueError(f"the weights {', '.join(bad)} are not finite")
        said = {
            "format": FORMAT,
            "options": self.net.options,
            "sde": self.sde,
            "shape": list(self.shape),
            "time_scale": self.time_scale,
            "about": dict(self.about),
            "weights": self.digest,
        }
        content = save(weights, {"classifier": sealed(said)})
        write_whole(Path(path), lambda file: file.write(content))

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> TrainedClassifier:
        """What `save` wrote, in evaluation mode.

        Raises:
            FileNotFoundError: if there is no such file.
            ImportError: if safetensors is not installed.
            CheckpointError: if it is damaged, or something else; the message names it.
        """
        check_safetensors()
        from safetensors.torch import load

        content = Path(path).read_bytes()
        try:
            weights = load(content)
            head = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            said, whole = unsealed(head["__metadata__"]["classifier"])
            if said["format"] != FORMAT:
                raise ValueError(f"it is not of the format {FORMAT}")
            if not whole or said["weights"] != _digest(weights):
                raise ValueError("its weights are not those that were saved")
            with torch.device("meta"):  # draws no weights
                net = NoisyClassifier(**said["options"])
            net.load_state_dict(weights, assign=True)
            shape, scale = tuple(int(n) for n in said["shape"]), float(said["time_scale"])
            found = cls(net.to(device).eval().requires_grad_(False), str(said["sde"]), shape, scale, said["about"])
        except Exception as error:  # of the header, of JSON, missing and misshapen weights
            raise CheckpointError(
                f"{path} cannot be read as a classifier of noisy data ({FORMAT}): {' '.join(str(error).split())}"
            ) from error
        return found


def _digest(weights: Mapping[str, Tensor]) -> str:
    text = "\n".join(f"{name} {tuple(value.shape)} {digest(value)}" for name, value in sorted(weights.items()))
    return f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]}"
