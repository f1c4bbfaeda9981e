"""What a long benchmark keeps, finished numbers and their times, so that a killed run goes on where it stopped; and how
its page says them.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from scoresde.info import environment
from scoresde.likelihood.interval import student
from scoresde.metrics import frechet_distance
from scoresde.noise import derive_seed
from scoresde.report import Cells, table, write_json


class Clock:
    """Seconds spent on each part, of the wall clock and of all cores together, added up over interrupted runs. What a
    part within another takes is counted once, as its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, list[float]] = json.loads(path.read_text()) if path.exists() else {}
        self._within = (0.0, 0.0)  # parts that have ended within the one that runs

    def __str__(self) -> str:
        wall, cores = (sum(part[i] for part in self.seconds.values()) / 60 for i in range(2))
        return f"{wall:.0f} minutes in all, {cores:.0f} of processor time (the machine may have been shared)."

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


def synchronise(device: torch.device | str) -> None:
    """Wait for a GPU, before a time is taken."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


class Numbers:
    """The finished numbers: kind, method and K to a list, of sets of samples or of images; kind is "bits" or "frechet".

    Args:
        path: the file.
        model: and how much of it is measured: numbers of another are not taken.
        features: of the Frechet distances.
    """

    def __init__(self, path: Path, model: str, features: str) -> None:
        self.model, self.features = model, features
        self.commit = environment()["commit"]
        self.cells = Cells(path, "benchmarks/kept.py", "numbers", {}, lambda found: (found["model"], *found["of"]))

    def get(self, kind: str, name: str, K: int) -> list[float] | None:
        found = self.cells.done.get((self.model, self._kind(kind), name, K))
        return found and [math.inf if value is None else value for value in found["values"]]

    def put(self, kind: str, name: str, K: int, values: Sequence[float]) -> None:
        rounded = [float(f"{value:.7g}") for value in values]
        found = {"model": self.model, "of": [self._kind(kind), name, K], "values": rounded, "commit": self.commit}
        self.cells.write(found)

    def commits(self) -> set[str]:
        """That the numbers were measured at; "earlier commits" of those that do not say so."""
        return {found.get("commit", "earlier commits") for found in self.cells.done.values()}

    def scores(self, kind: str, steps: Sequence[int]) -> Scores:
        """Those of a kind, for those K."""
        names = dict.fromkeys(name for _, _, name, _ in self.cells.done)
        found = {(name, K): self.get(kind, name, K) for name in names for K in steps}
        return {at: Score.of(values) for at, values in found.items() if values is not None}

    def _kind(self, kind: str) -> str:
        return kind if kind == "bits" else f"{kind} in {self.features}"


class Score(NamedTuple):
    """A mean and its standard error; `values` are paired between methods."""

    mean: float
    stderr: float
    values: Tensor

    @classmethod
    def of(cls, values: Sequence[float]) -> Score:
        x = torch.tensor(values, dtype=torch.float64)
        return cls(float(x.mean()), float(x.std() / len(x) ** 0.5) if len(x) > 1 else float("nan"), x)


Scores = dict[tuple[str, int], Score]
"""(method, K) to its score."""


def verdict(first: Score, second: Score) -> str:
    """Whether the first is lower: "yes", "no", or "tie" where the 95 % interval of the paired differences holds 0."""
    difference = Score.of((first.values - second.values).tolist())
    wide = float(student(torch.tensor(len(difference.values) - 1.0))) * difference.stderr
    if not abs(difference.mean) > wide:
        return "tie"
    return "yes" if difference.mean < 0 else "no"


def number(value: float) -> str:
    """With as many digits as mean something."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def small(value: float, decimals: int = 2, plain: tuple[float, float] = (1, 1)) -> str:
    """With a short exponent, outside of a range where it needs none: 1.20e-3."""
    if not math.isfinite(value):
        return "-"
    if value == 0 or plain[0] <= value < plain[1]:
        return f"{value:.3g}"
    return f"{value:.{decimals}e}".replace("e-0", "e-").replace("e+00", "").replace("e+0", "e")


def made_on(about: Mapping[str, str]) -> str:
    """The environment in words."""
    return (
        f"`{about['command']}`, {about['device']}, {about['threads']} threads, {about['dtype']}, torch "
        f"{about['torch']}, scoresde {about['scoresde']} at {about['commit']}."
    )


def score_table(scores: Scores, head: str, apart: tuple[str, ...] = ()) -> list[str]:
    """Means with standard errors, a row a method, the best of each column in bold: of methods whose names do not start
    with what sets them apart. What was not measured is left empty.
    """
    rows, columns = (list(dict.fromkeys(key[i] for key in scores)) for i in (0, 1))
    raced = [(column, score.mean) for (row, column), score in scores.items() if not row.startswith(apart)]
    best = {c: min(mean for column, mean in raced if column == c) for c in columns}

    def cell(row: str, column: int) -> str:
        if (row, column) not in scores:
            return ""
        score = scores[row, column]
        bold = score.mean == best[column] and not row.startswith(apart)
        text = f"**{number(score.mean)}**" if bold else number(score.mean)
        return text if math.isnan(score.stderr) else f"{text} ({score.stderr:.1g})"

    return table([head, *columns], ([row, *(cell(row, c) for c in columns)] for row in rows))


def published_table(rows: Mapping[str, Sequence[float]], head: str, columns: Sequence[object]) -> list[str]:
    """Numbers of a paper; "-" where its table ends before."""
    return table(
        [head, *columns],
        ([row, *map(number, values), *["-"] * (len(columns) - len(values))] for row, values in rows.items()),
    )


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
