"""Predictors and correctors, the part of fashion_mnist.py in the layout of Song et al. (2021), table 1.

    P     predictor alone, N steps                     N evaluations
    P2    predictor alone, 2 N steps                   2 N
    C     corrector alone, N levels of two steps       2 N + 1
    PC    both in turn, N steps                        2 N - 1

Predictors and correctors are the paper's: ancestral sampling, reverse diffusion, the discretised probability flow, and
Langevin dynamics, whose step in PC follows from the norms of the score and in C, where they have been measured to be
what they are, from sigma. The corrector's signal-to-noise ratio r is chosen by the distance, as the paper's was: here
of one set of samples of other noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from kept import Score, Scores, number, verdict
from tqdm import tqdm

from scoresde import Grid
from scoresde.likelihood.interval import student
from scoresde.metrics import frechet_distance
from scoresde.report import table
from scoresde.solvers import Ancestral, AnnealedLangevin, PredictorCorrector, ReverseDiffusion, Solver
from scoresde.solvers.base import SingleStep

if TYPE_CHECKING:
    from fashion_mnist import Experiment

N = 16
SETS = 4
OTHER_SET, CHOSEN_ON = 1000, 100  # number and size of the set that r is chosen on
PREDICTORS: dict[str, SingleStep] = {
    "ancestral": Ancestral(),
    "reverse diffusion": ReverseDiffusion(),
    "probability flow": ReverseDiffusion(probability_flow=True),
}
ALONE = "corrector alone"
RATIOS = {"PC": (0.05, 0.15, 0.3), "C": (0.3, 0.4, 0.5)}

# FID on CIFAR-10 of Song et al. (2021), table 1, N = 1000: mean and standard deviation of five runs.
RUNS = 5
COLUMNS = ("P", "P2", "C", "PC")
Published = dict[tuple[str, str], tuple[float, float]]
PUBLISHED: dict[str, Published] = {
    "VP": {
        ("ancestral", "P"): (3.24, 0.02),
        ("ancestral", "P2"): (3.24, 0.02),
        ("ancestral", "PC"): (3.21, 0.02),
        ("reverse diffusion", "P"): (3.21, 0.02),
        ("reverse diffusion", "P2"): (3.19, 0.02),
        ("reverse diffusion", "PC"): (3.18, 0.01),
        ("probability flow", "P"): (3.59, 0.04),
        ("probability flow", "P2"): (3.23, 0.03),
        ("probability flow", "PC"): (3.06, 0.03),
        (ALONE, "C"): (19.06, 0.06),
    },
    "EDM": {
        ("ancestral", "P"): (4.98, 0.06),
        ("ancestral", "P2"): (4.88, 0.06),
        ("ancestral", "PC"): (3.62, 0.03),
        ("reverse diffusion", "P"): (4.79, 0.07),
        ("reverse diffusion", "P2"): (4.74, 0.08),
        ("reverse diffusion", "PC"): (3.60, 0.02),
        ("probability flow", "P"): (15.41, 0.15),
        ("probability flow", "P2"): (10.54, 0.08),
        ("probability flow", "PC"): (3.51, 0.04),
        (ALONE, "C"): (20.43, 0.07),
    },
}
Cell = tuple[str, str]


class Ordering(NamedTuple):
    """Whether the first cell is ahead of the second: "yes", "no" or "tie", in the paper and here."""

    first: Cell
    second: Cell
    published: str
    here: str
    difference: Score


def compared() -> list[tuple[Cell, Cell]]:
    """The paper's comparisons: a corrector beside none and beside twice the steps, more steps beside fewer, twice the
    steps beside the corrector alone; and each predictor beside the one above it."""
    names = list(PREDICTORS)
    pairs: list[tuple[Cell, Cell]] = []
    for name in names:
        pairs += [((name, "PC"), (name, "P")), ((name, "PC"), (name, "P2")), ((name, "P2"), (name, "P"))]
        pairs += [((name, "P2"), (ALONE, "C"))]
    return pairs + [
        ((second, column), (first, column)) for first, second in pairwise(names) for column in ("P", "P2", "PC")
    ]


def published_verdict(first: tuple[float, float], second: tuple[float, float]) -> str:
    """As `kept.verdict`, of two means of independent runs: a tie where the 95 % interval of the difference holds 0."""
    difference = first[0] - second[0]
    wide = float(student(torch.tensor(2.0 * (RUNS - 1)))) * math.hypot(first[1], second[1]) / math.sqrt(RUNS)
    return "tie" if abs(difference) <= wide else "yes" if difference < 0 else "no"


def orderings(scores: Scores, published: Published) -> list[Ordering]:
    return [
        Ordering(
            first,
            second,
            published_verdict(published[first], published[second]),
            verdict(scores[key_of(first)], scores[key_of(second)]),
            Score.of((scores[key_of(first)].values - scores[key_of(second)].values).tolist()),
        )
        for first, second in compared()
    ]


def correctors(experiment: Experiment, names: Sequence[str]) -> dict[str, tuple[Scores, dict[str, float]]]:
    """For each network the distances, and r of PC and C."""
    found = {}
    for name in names:
        sde = experiment.model(name).sde
        grids = {column: Grid.customary(sde, 2 * N if column == "P2" else N) for column in ("P", "P2", "PC")}
        grids["C"] = AnnealedLangevin(2).grid(sde, N)
        ratios, scores = chosen_ratios(experiment, name, grids), {}
        for cell in tqdm(PUBLISHED[name], desc=f"correctors, {name}", unit="cell"):
            row, column = cell
            solver, nfe = solver_of(cell, ratios.get(column, math.nan)), key_of(cell)[1]
            label = f"{row}, r = {ratios[column]}" if column in ratios else row
            scores[key_of(cell)] = experiment.frechet("correctors", name, label, nfe, solver, grids[column], sets=SETS)
        found[name] = scores, ratios
    return found


def key_of(cell: Cell) -> tuple[str, int]:
    """Row and evaluations."""
    return cell[0], {"P": N, "P2": 2 * N, "C": 2 * N + 1, "PC": 2 * N - 1}[cell[1]]


def solver_of(cell: Cell, r: float) -> Solver:
    row, column = cell
    if column == "C":
        return AnnealedLangevin(2, r)
    return PredictorCorrector(PREDICTORS[row], "langevin", r) if column == "PC" else PREDICTORS[row]


def chosen_ratios(experiment: Experiment, name: str, grids: Mapping[str, Grid]) -> dict[str, float]:
    """r of PC, with the predictor of reverse diffusion, and of C: those with the smallest distance of one set."""
    numbers, found = experiment.numbers("correctors", name), {}
    for cell in (("reverse diffusion", "PC"), (ALONE, "C")):
        distances = {}
        for r in RATIOS[cell[1]]:
            solver, row, nfe = solver_of(cell, r), f"{cell[0]}, r = {r}, {CHOSEN_ON} samples", key_of(cell)[1]
            if (kept := numbers.get("choice", row, nfe)) is None:
                with experiment.clock(name)("correctors"):
                    x = experiment.draw(name, solver, grids[cell[1]], True, OTHER_SET, CHOSEN_ON)
                    kept = [frechet_distance(experiment.features(x), experiment.reference)]
                numbers.put("choice", row, nfe, kept)
            distances[r] = kept[0]
        found[cell[1]] = min(distances, key=distances.__getitem__)
    return found


# --- the page --------------------------------------------------------------------------------------------------------


def lines(found: Mapping[str, tuple[Scores, Mapping[str, float]]]) -> list[str]:
    """The section of the page."""
    text = [
        "## Predictors and correctors",
        "",
        f"The layout is that of Song et al. (2021), table 1, with N = {N} where the paper has 1000: predictor alone, N "
        f"steps (P) and 2 N (P2), corrector alone on N levels of two steps (C), and both (PC, {2 * N - 1} evaluations, "
        f"as many as P2 but one). Clipped means, the SDE's customary grid, for C geometric levels; {SETS} sets. EDM's "
        "SDE is variance exploding, and stands beside the paper's VE. r, the corrector's signal-to-noise ratio, was "
        f"chosen on {CHOSEN_ON} samples of other noise, among {_words(RATIOS['PC'])} for PC (with reverse diffusion) "
        f"and {_words(RATIOS['C'])} for C.",
    ]
    for name, (scores, ratios) in found.items():
        published = {cell: f"{number(mean)} ({std:.1g})" for cell, (mean, std) in PUBLISHED[name].items()}
        here = {
            cell: f"{number(score.mean)} ({score.stderr:.1g})"
            for cell in PUBLISHED[name]
            for score in [scores[key_of(cell)]]
        }
        rows = [
            [row, *(values.get((row, c), "") for values in (here, published) for c in COLUMNS)]
            for row in (*PREDICTORS, ALONE)
        ]
        compared = orderings(scores, PUBLISHED[name])
        text += [
            "",
            f"{name}, r = {ratios['PC']} in PC and {ratios['C']} in C{_edge(ratios)}; on the right CIFAR-10 FID, "
            f"published, with the standard deviation of {RUNS} runs:",
            "",
            *table([name, *COLUMNS, *(f"published: {COLUMNS[0]}", *COLUMNS[1:])], rows),
            "",
            summary(name, compared),
            "",
            *table(
                ["ahead", "of", "published", "here", "difference here"],
                (
                    [", ".join(o.first), ", ".join(o.second), o.published, o.here, signed(o.difference)]
                    for o in compared
                ),
            ),
        ]
    return [
        *text,
        "",
        "Yes: the first is ahead, no: behind, where the 95 % interval of the difference (Student; here of the paired "
        "sets, published of the runs) does not hold 0, else a tie. In brackets standard errors.",
    ]


def signed(difference: Score) -> str:
    return f"{difference.mean:+.2f} ({difference.stderr:.1g})"


def summary(name: str, found: Sequence[Ordering]) -> str:
    """How many comparisons are as published."""
    decided = [o for o in found if o.published != "tie"]
    same, ties = (sum(o.here == want(o) for o in decided) for want in (lambda o: o.published, lambda o: "tie"))
    return (
        f"{name}: of {len(decided)} comparisons that the paper's table decides, {same} are as published here, {ties} "
        f"ties and {len(decided) - same - ties} reversed; of the {len(found) - len(decided)} that are ties in it, "
        f"{sum(o.here == 'tie' for o in found if o.published == 'tie')} are ties."
    )


def listed(found: Mapping[str, tuple[Scores, Mapping[str, float]]]) -> list[list[object]]:
    """Of the file of numbers: network, row, column, mean, standard error and, where there is a corrector, r."""
    return [
        [name, *cell, scores[key_of(cell)].mean, scores[key_of(cell)].stderr, ratios.get(cell[1])]
        for name, (scores, ratios) in found.items()
        for cell in PUBLISHED[name]
    ]


def _edge(ratios: Mapping[str, float]) -> str:
    at = [column for column, r in ratios.items() if r == max(RATIOS[column])]
    return f" ({' and '.join(at)}: the largest that was tried)" if at else ""


def _words(values: Sequence[float]) -> str:
    return ", ".join(map(str, values[:-1])) + f" and {values[-1]}"
