"""What a long benchmark keeps: finished numbers and their times, so that a killed run goes on where it stopped."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scoresde.files import write_whole
from scoresde.metrics import frechet_distance
from scoresde.noise import derive_seed


def write_json(path: Path, content: Any) -> None:
    write_whole(path, lambda file: file.write((json.dumps(content, indent=1) + "\n").encode()))


class Clock:
    """Seconds spent on each part, of the wall clock and of all cores together, added up over interrupted runs. What a
    part within another takes is counted once, as its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, list[float]] = json.loads(path.read_text()) if path.exists() else {}
        self._within = (0.0, 0.0)  # parts that have ended within the one that runs

    @property
    def minutes(self) -> tuple[float, float]:
        """Of the wall clock, and of all cores together."""
        wall, cores = (sum(part[i] for part in self.seconds.values()) / 60 for i in range(2))
        return wall, cores

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start, before = (time.perf_counter(), time.process_time()), self._within
        self._within = (0.0, 0.0)
        try:
            yield
        finally:
            whole = time.perf_counter() - start[0], time.process_time() - start[1]
            known = self.seconds.get(name, [0.0, 0.0])
            self.seconds[name] = [round(a + b - c, 1) for a, b, c in zip(known, whole, self._within, strict=True)]
            self._within = (before[0] + whole[0], before[1] + whole[1])
            write_json(self.path, self.seconds)


@dataclass
class Cells:
    """The finished numbers: kind|method|K to a list, of sets of samples or of images; kind is "bits" or "frechet".

    Attributes:
        path: the file.
        model: and how much of it is measured: numbers of another are not taken.
        features: of the Frechet distances.
    """

    path: Path
    model: str
    features: str
    found: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path, model: str, features: str) -> Cells:
        """Those of an earlier run, if they are of the same model and the same measurement."""
        kept = json.loads(path.read_text()) if path.exists() else {}
        return cls(path, model, features, kept["found"] if kept.get("model") == model else {})

    def get(self, kind: str, name: str, K: int) -> list[float] | None:
        return self.found.get(self._key(kind, name, K))

    def put(self, kind: str, name: str, K: int, values: Sequence[float]) -> None:
        self.found[self._key(kind, name, K)] = [float(f"{value:.7g}") for value in values]
        write_json(self.path, {"model": self.model, "found": self.found})

    def scores(self, kind: str, steps: Sequence[int]) -> dict[tuple[str, int], Score]:
        """(method, K) to its score, for those K."""
        names = dict.fromkeys(key.split("|")[1] for key in self.found)
        found = {(name, K): self.get(kind, name, K) for name in names for K in steps}
        return {at: Score.of(values) for at, values in found.items() if values is not None}

    def _key(self, kind: str, name: str, K: int) -> str:
        return f"{kind if kind == 'bits' else f'{kind} in {self.features}'}|{name}|{K}"


class Score(NamedTuple):
    """A mean and its standard error; `values` are paired between methods."""

    mean: float
    stderr: float
    values: Tensor

    @classmethod
    def of(cls, values: Sequence[float]) -> Score:
        x = torch.tensor(values, dtype=torch.float64)
        return cls(float(x.mean()), float(x.std() / len(x) ** 0.5) if len(x) > 1 else float("nan"), x)


def number(value: float) -> str:
    """With as many digits as mean something."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def floor(
    data: Tensor, reference: Tensor, features: Callable[[Tensor], Tensor], n: int, sets: int = 20
) -> tuple[float, float]:
    """The Frechet distance of real data: mean and standard deviation over random sets of n data from the reference's
    features."""
    scores = []
    for k in range(sets):
        chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(derive_seed(0, k)))[:n]
        scores.append(frechet_distance(features(data[chosen]), reference))
    return statistics.mean(scores), statistics.stdev(scores)
