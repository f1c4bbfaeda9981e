"""A set as a feature space sees it: the features, and what some metrics look at beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde.errors import not_finite, some
from scoresde.metrics.features import Features

__all__ = ["NEEDS", "Embedded", "check_space", "embedded", "title"]

NEEDS = {"spatial_frechet": "spatial", "entropy_score": "logits"}
"""What a metric needs of a feature space beside its features: the attribute of that name, another feature space."""


@dataclass(frozen=True)
class Embedded:
    """What `evaluate` takes in a set's place, where the set is compared more than once.

    Attributes:
        parts: "features", (N, d), and those of "spatial" and "logits" that were asked for, all float64.
        space: what the feature space is called.
    """

    parts: Mapping[str, Tensor]
    space: str

    @property
    def features(self) -> Tensor:
        return self.parts["features"]

    def __len__(self) -> int:
        return len(self.features)

    def take(self, items: Tensor) -> Embedded:
        """Those of these numbers."""
        return Embedded({name: part[items.to(part.device)] for name, part in self.parts.items()}, self.space)

    def check(self, metrics: Sequence[str], features: Features, name: str) -> None:
        """Raises ValueError if it is of another feature space, or lacks what the metrics look at."""
        lacking = [NEEDS[metric] for metric in metrics if NEEDS.get(metric, "features") not in self.parts]
        if self.space != title(features) or lacking:
            raise ValueError(
                f"{name} is {', '.join(self.parts)} of {self.space}: expected {', '.join(['features', *lacking])} of "
                f"{title(features)}, as embedded(x, features, metrics) gives them"
            )


def check_space(metrics: Sequence[str], features: Features) -> None:
    """Raises ValueError if one of the metrics needs what the feature space has not."""
    for metric in metrics:
        if metric in NEEDS and getattr(features, NEEDS[metric], None) is None:
            raise ValueError(
                f"{metric} needs features with `{NEEDS[metric]}`, as those of a classifier have them "
                f"(`classifier_features`, --features digits, fashion-mnist or FILE.npz), not {title(features)}"
            )


def embedded(
    x: Tensor, features: Features, metrics: Sequence[str] = (), *, batch_size: int = 512, name: str = "samples"
) -> Embedded:
    """What a feature space makes of a set, as far as the metrics look at it.

    Args:
        x: the set, (N, *event).
        features: the space.
        metrics: names out of `METRICS`.
        batch_size: how many the feature function gets at a time.
        name: of the set, for messages.

    Raises:
        ValueError: if the features are no tensor (N, d) or not finite; as `check_space`.
    """
    check_space(metrics, features)
    wanted = dict.fromkeys(NEEDS[metric] for metric in metrics if metric in NEEDS)
    spaces = {"features": features, **{part: getattr(features, part) for part in wanted}}
    parts = {part: _embed(space, x, batch_size, f"the {part} of", name) for part, space in spaces.items()}
    return Embedded(parts, title(features))


def title(features: Features) -> str:
    """What a feature space is called: its repr, or its name where that has an address in it."""
    text = repr(features)
    return getattr(features, "__qualname__", type(features).__name__) if " at 0x" in text else text


def _embed(features: Features, x: Tensor, batch_size: int, what: str, name: str) -> Tensor:
    parts = []
    for given in x.detach().split(batch_size):
        part = features(given)
        if not isinstance(part, Tensor) or part.ndim != 2 or len(part) != len(given):
            found = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
            raise ValueError(f"{what} {len(given)} {name} are {found}: expected a tensor (B, d)")
        parts.append(part.to(torch.float64, copy=True))  # a network may reuse the memory of its output
    whole = torch.cat(parts)
    if bad := not_finite(whole):
        raise ValueError(f"{what} {name} {some(bad)} are not finite")
    return whole
