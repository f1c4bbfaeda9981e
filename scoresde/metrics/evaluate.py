"""Samples against real data, in one call: every distance with its standard error, and beside it the floor, what real
data scores against real data.

A standard error is the spread of the distance over random halves of both sets. Of a mean of n numbers the half's
variance given the whole is (1 / (n/2) - 1 / n) sigma^2 = sigma^2 / n, the variance of the whole: and so for whatever
behaves like a mean (the delete-half jackknife; Shao and Wu, 1989, "A general theory for jackknife variance
estimation"). No sample comes twice in a half, as it would in a bootstrap, which nearest neighbours would take for a
law with atoms. KID brings its own, from its subsets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scoresde.checks import check_count, check_option, check_whole
from scoresde.errors import not_finite, some
from scoresde.metrics.entropy import entropy_score
from scoresde.metrics.features import Features, Pixels
from scoresde.metrics.frechet import frechet_distance
from scoresde.metrics.kernel import GaussianKernel, kid, median_distance, mmd
from scoresde.metrics.neighbours import precision_recall
from scoresde.metrics.spaces import Embedded, check_space, embedded, title
from scoresde.metrics.transport import energy_distance, sliced_wasserstein
from scoresde.noise import derive_seed
from scoresde.tensors import check_batch

__all__ = ["METRICS", "Evaluation", "Score", "evaluate", "least_size"]

_NEIGHBOURS = ("precision", "recall", "density", "coverage")

METRICS = ("frechet", "spatial_frechet", "kid", "mmd", *_NEIGHBOURS, "sliced_wasserstein", "energy", "entropy_score")
"""The names that `evaluate` knows; "precision_recall" stands for the four of nearest neighbours. "spatial_frechet" and
"entropy_score" are of a classifier's features before pooling, and of its logits: `classifier_features` has both."""


class Score(NamedTuple):
    """A distance.

    Attributes:
        value: samples against the reference.
        stderr: its standard error: both sets are a draw of many.
        floor: mean of the same for real data instead of the samples; NaN where it was not taken.
        floor_std: standard deviation of one such number, over random choices of the data, the reference being one; NaN
            where there is no choice.
    """

    value: float
    stderr: float
    floor: float
    floor_std: float


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` returns: `evaluation["frechet"].value`; printed, a table.

    Attributes:
        scores: a `Score` by the metric's name.
        samples, reference: how many there were of each.
        floor_sizes: of the real data in the place of the samples, and of the reference it was compared with; None where
            there was no floor.
        features: repr of the feature space.
        dimension: d of the space.
        seed: of all random choices.
        k: of the nearest neighbours.
        kid_subset: size of KID's subsets, or None.
    """

    scores: dict[str, Score]
    samples: int
    reference: int
    floor_sizes: tuple[int, int] | None
    features: str
    dimension: int
    seed: int
    k: int
    kid_subset: int | None

    def __getitem__(self, metric: str) -> Score:
        return self.scores[metric]

    def as_dict(self) -> dict[str, Any]:
        """All of it, as JSON can say it: a number that was not taken is None."""
        scores = {
            name: {key: value if math.isfinite(value) else None for key, value in score._asdict().items()}
            for name, score in self.scores.items()
        }
        return {**vars(self), "scores": scores, "floor_sizes": list(self.floor_sizes) if self.floor_sizes else None}

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("", "value", "stderr", "real data", "std")]
        rows += [
            (name, *(f"{number:.4g}" if math.isfinite(number) else "-" for number in s))
            for name, s in self.scores.items()
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [
            "  ".join(
                cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        sizes = f"{self.samples} samples against {self.reference}"
        if self.floor_sizes and self.floor_sizes != (self.samples, self.reference):
            sizes += f" (real data: {self.floor_sizes[0]} against {self.floor_sizes[1]})"
        options = [f"k={self.k}"] if set(self.scores) & set(_NEIGHBOURS) else []
        options += [f"KID's subsets of {self.kid_subset}"] if self.kid_subset else []
        return "\n".join(
            [*lines, ", ".join([sizes, *options, f"seed={self.seed}"]), f"{self.features}, d = {self.dimension}"]
        )


def evaluate(
    samples: Tensor | Embedded,
    reference: Tensor | Embedded,
    metrics: Sequence[str] = ("frechet", "kid", "precision_recall"),
    features: Features | None = None,
    *,
    seed: int = 0,
    floor: Tensor | Embedded | None = None,
    halves: int = 20,
    floors: int = 5,
    k: int = 5,
    projections: int = 256,
    kid_subsets: int = 100,
    kid_subset_size: int = 1000,
    batch_size: int = 512,
) -> Evaluation:
    """Distances of samples from real data, with standard errors and the floor.

    Args:
        samples: (N, *event), floating point, N >= 8 (with neighbours 2 k + 2, too). Of each set what `embedded` makes
            of it will do, in the same feature space.
        reference: real data of the same event shape, M >= 8 of them, best such as no model was trained on.
        metrics: names out of `METRICS`. "entropy_score" is of the samples alone, and larger is better.
        features: a function of a batch (B, *event) to (B, d): `RandomFeatures`, `PCA`, `classifier_features(...)`,
            `inception()`, or your own; by default the flattened events.
        seed: of all random choices; the same gives the same numbers.
        floor: further real data, disjoint from the reference. Of them as many as there are samples (or all) stand in
            the samples' place. Without, the reference is split in two, so that the sizes are smaller, and most floors
            therefore higher than at the sizes of the evaluation; the table says which sizes they are of.
        halves: random halves that standard errors are of, at least 2; 0 takes none (NaN).
        floors: random choices of the floor's data; 0 takes none (NaN).
        k: of the nearest neighbours.
        projections: of the sliced Wasserstein distance.
        kid_subsets, kid_subset_size: of `kid`; with fewer than twice as many samples the subsets are half of them.
        batch_size: how many samples the feature function gets at a time.

    Raises:
        ValueError: if samples, reference or floor are no such tensors, are too few, or not finite (it names the set
            and the samples), or on another metric, or one that needs what the feature space has not; if an
            `Embedded` set is of another space.

    >>> x, y = (torch.randn(500, 2, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    >>> evaluation = evaluate(x + 1, y, ["frechet", "energy"])
    >>> 1.5 < evaluation["frechet"].value < 2.5 and evaluation["frechet"].floor < 0.1  # the shift's square is 2
    True
    """
    check_count(k=k, projections=projections, batch_size=batch_size)
    check_whole(seed=seed)
    if halves == 1 or halves < 0 or floors < 0:
        raise ValueError(f"halves={halves}, floors={floors}: expected no halves or two at least, and floors >= 0")
    names = _names(metrics)
    sets = {"samples": samples, "reference": reference} | ({} if floor is None else {"floor": floor})
    features = Pixels() if features is None else features
    check_space(names, features)
    for name, z in sets.items():
        _check_set(name, z, reference, least=least_size(names, k))
    found = {}
    for name, z in sets.items():
        found[name] = z if isinstance(z, Embedded) else embedded(z, features, names, batch_size=batch_size, name=name)
        found[name].check(names, features, name)
    x, y = found["samples"], found["reference"]

    # One for all sets that y is compared with.
    kernel = GaussianKernel(median_distance(y.features)) if "mmd" in names else None
    measure = _Measure(names, k, projections, kid_subsets, kid_subset_size, kernel, seed)
    values = measure(x, y)
    stderr = _stderr(replace(measure, names=[name for name in names if name != "kid"]), x, y, halves, seed)
    if "kid" in names:
        stderr["kid"] = values["kid stderr"]
    floors_of, sizes = _floors(measure, x, y, found.get("floor"), floors, seed)
    scores = {
        name: Score(values[name], stderr.get(name, math.nan), *_mean_std([found[name] for found in floors_of]))
        for name in names
    }
    subset = measure.subset_size(x, y) if "kid" in names else None
    return Evaluation(scores, len(x), len(y), sizes, title(features), x.features.shape[1], seed, k, subset)


def least_size(metrics: Sequence[str], k: int = 5) -> int:
    """How many samples, and real data, these metrics need.

    Raises:
        ValueError: on another metric.
    """
    return max(8, 2 * (k + 1)) if set(_names(metrics)) & set(_NEIGHBOURS) else 8


@dataclass(frozen=True)
class _Measure:
    """The distances of two sets, with their options."""

    names: list[str]
    k: int
    projections: int
    kid_subsets: int
    kid_subset_size: int
    kernel: GaussianKernel | None
    seed: int

    def __call__(self, of_x: Embedded, of_y: Embedded) -> dict[str, float]:
        found: dict[str, float] = {}
        x, y = of_x.features, of_y.features
        if set(self.names) & set(_NEIGHBOURS):
            found |= precision_recall(x, y, self.k)._asdict()
        if "kid" in self.names:
            found["kid"], found["kid stderr"], _ = kid(x, y, self.kid_subsets, self.subset_size(of_x, of_y), self.seed)
        by_name: dict[str, Callable[[], float]] = {
            "frechet": lambda: frechet_distance(x, y),
            "spatial_frechet": lambda: frechet_distance(of_x.parts["spatial"], of_y.parts["spatial"]),
            "entropy_score": lambda: entropy_score(of_x.parts["logits"]),
            "mmd": lambda: mmd(x, y, self.kernel),
            "sliced_wasserstein": lambda: sliced_wasserstein(x, y, self.projections, seed=self.seed),
            "energy": lambda: energy_distance(x, y),
        }
        found |= {name: by_name[name]() for name in self.names if name in by_name}
        return found

    def subset_size(self, x: Embedded, y: Embedded) -> int:
        return min(self.kid_subset_size, len(x) // 2, len(y) // 2)


def _stderr(measure: _Measure, x: Embedded, y: Embedded, halves: int, seed: int) -> dict[str, float]:
    """By the spread over random halves of both sets."""
    if halves == 0 or not measure.names:
        return {}
    found = []
    for i in range(halves):
        a, b = (_order(len(z), seed, i, side)[: len(z) // 2] for side, z in enumerate((x, y)))
        found.append(measure(x.take(a), y.take(b)))
    return {name: _mean_std([values[name] for values in found])[1] for name in measure.names}


def _floors(
    measure: _Measure, x: Embedded, y: Embedded, real: Embedded | None, floors: int, seed: int
) -> tuple[list[dict[str, float]], tuple[int, int] | None]:
    """The distances of real data from the reference, over random choices, and how many each were."""
    if floors == 0:
        return [], None
    if real is None:
        n = min(len(x), len(y) // 2)
        orders = [_order(len(y), seed, i, 2) for i in range(floors)]
        return [measure(y.take(order[:n]), y.take(order[n:])) for order in orders], (n, len(y) - n)
    n = min(len(x), len(real))
    choices = floors if n < len(real) else 1
    orders = [_order(len(real), seed, i, 2) for i in range(choices)]
    return [measure(real.take(order[:n]), y) for order in orders], (n, len(y))


def _mean_std(numbers: list[float]) -> tuple[float, float]:
    """NaN where there are too few for one."""
    values = torch.tensor(numbers, dtype=torch.float64)
    return (float(values.mean()) if numbers else math.nan), (float(values.std()) if len(numbers) > 1 else math.nan)


def _order(n: int, seed: int, *key: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(derive_seed(seed, *key)))


def _names(metrics: Sequence[str]) -> list[str]:
    """Their names, "precision_recall" as the four that it is."""
    if isinstance(metrics, str) or not metrics:
        raise ValueError(f"metrics={metrics!r}: expected a sequence of names out of {', '.join(METRICS)}")
    names: list[str] = []
    for name in metrics:
        check_option(("precision_recall", *METRICS), metric=name)
        names += _NEIGHBOURS if name == "precision_recall" else (name,)
    return list(dict.fromkeys(names))


def _check_set(name: str, x: Tensor | Embedded, reference: Tensor | Embedded, least: int) -> None:
    if isinstance(x, Embedded):
        if len(x) < least:
            raise ValueError(f"{name} has {len(x)} items: expected {least} at least")
        return
    check_batch(x, name)
    if len(x) < least:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: expected {least} at least")
    if isinstance(reference, Tensor) and x.shape[1:] != reference.shape[1:]:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, the reference {tuple(reference.shape)}: of other events")
    if bad := not_finite(x):
        raise ValueError(f"{name} {some(bad)} not finite: the run that they are from has failed there")
