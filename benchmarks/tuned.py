"""Tuned solvers beside the best untuned ones of the race, on the exact problems, few evaluations.

    python benchmarks/tuned.py --out benchmarks/results/tuned

In each cell, a problem and a number of evaluations, `scoresde.tuning.tune` starts from the 20 solvers and grids here
that the race (step_counts.py) found nearest, and from what `choose` finds, on noise of its own: half of it trains, a
quarter chooses, a quarter reports. The error of the result is then measured on the noise of the race, rms |x - x*| /
sqrt(d) at t = 1e-3 against the exact flow. Beside it stands the least error of the whole race on that same noise, every
solver on every grid, the peers' included, as benchmarks/results/step_counts has it. Where the race has not been run at
that number of evaluations, it is the least of those here that are among the 40 best at the numbers next to it. The
noise of `images` is another than the race's (`problem_of` says why), and it has a race of its own, of the solvers here.

Written into --out: README.md, results.json, a picture, and runs/ with every finished cell, so that a killed run goes on
where it stopped. A cell ends with its minutes; those in the tables may be less than what training could reach.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from kept import small as number
from problems import EXACT, Draws, Problem, table_flow
from step_counts import RACED, Cell, Ours, fitted, ours
from torch import Tensor

from scoresde import Grid, sample
from scoresde.info import environment
from scoresde.report import Cells, table, write_json
from scoresde.solvers import Solver
from scoresde.tuning import TunedSolver, tune
from scoresde.tuning.chosen import SOLVERS

NFE = [4, 5, 6, 8, 10, 15, 20]
RACE = Path(__file__).parent / "results" / "step_counts" / "results.json"
STARTS, NEAR = 20, 40
SEED = 7


def samples(problem: str, nfe: int) -> int:
    """Of the tuning: enough that the corrections of many evaluations are told by them."""
    if problem == "images":
        return 256
    return 512 if problem == "gaussian" else 1024 if nfe <= 6 else 2048


class Race:
    """What the race found: (error, package, solver, grid) in the order of their errors."""

    def __init__(self) -> None:
        self.record: dict[str, Any] = json.loads(RACE.read_text())
        self.budgets: list[int] = self.record["nfe"]

    def ranked(self, problem: str, nfe: int) -> list[tuple[float, str, str, str]]:
        at = self.budgets.index(nfe)
        scores = self.record["problems"][problem]["endpoint"]["scores"]
        return sorted(
            (values[at], package, solver, grid)
            for package, solvers in scores.items()
            for solver, grids in solvers.items()
            for grid, values in grids.items()
            if values[at] is not None and math.isfinite(values[at])
        )

    def here(self, problem: str, nfe: int, most: int) -> list[tuple[str, str]]:
        """The best of ours: (solver, grid)."""
        return [(solver, grid) for _, package, solver, grid in self.ranked(problem, nfe) if package == "scoresde"][
            :most
        ]


def ends(problem: Problem, solver: Solver, grid: Grid) -> float:
    def run(x: Tensor, draws: Draws) -> Tensor:
        return sample(problem.denoiser, x, solver, grid=grid, seed=0).x

    return problem.error(run)


def problem_of(name: str) -> Problem:
    """With noise of its own where that of the race is not independent of the data: x_T of `images` is the noise that
    its images were made of, so that no sample of the race changes its mode on the way.
    """
    problem = EXACT[name]()
    if name == "images":
        shape = (64, *problem.x.shape[1:])
        problem.x = problem.sde.prior(shape, torch.Generator().manual_seed(11), torch.float64)
        vars(problem)["_truth"] = table_flow(problem.denoiser, problem.x, problem.end, 400)
    return problem


def untuned(race: Race, problem: Problem, name: str, nfe: int) -> tuple[float, str, list[TunedSolver]]:
    """The least error of the race, whose, and the starts."""
    field = {one.name: one for one in ours() if one.deterministic}
    raced = nfe in race.budgets and name != "images"
    near = [nfe] if raced else [n for n in race.budgets if n > nfe][:1] + [n for n in race.budgets if n < nfe][-1:]
    named = dict.fromkeys(pair for n in near for pair in race.here(name, n, STARTS if raced else NEAR))
    if name == "images":
        named = dict.fromkeys((solver, spacing) for solver in field for spacing in RACED)
    found: list[tuple[float, str, TunedSolver]] = []
    for solver, spacing in named:
        if solver not in field or field[solver].solver.adaptive or not field[solver].solver.has_table:
            continue
        try:
            made, grid = fitted(field[solver], problem, Cell(name, "endpoint", "scoresde", solver, spacing, nfe))
            one = cast(Ours, made).solver
            error = ends(problem, one, grid)
        except (ValueError, ArithmeticError):
            continue
        found.append((error, f"{solver}, {spacing}", TunedSolver(one, tuple(grid.times.tolist()), grid.sde, nfe)))
    found.sort(key=lambda entry: entry[0])
    if raced:
        best, _, solver, spacing = race.ranked(name, nfe)[0]
        return best, f"{solver}, {spacing}", [start for *_, start in found]
    return found[0][0], found[0][1], [start for *_, start in found[:STARTS]]


def cell(race: Race, problem: Problem, name: str, nfe: int, minutes: float) -> dict[str, Any]:
    """One cell, measured."""
    best, whose, starts = untuned(race, problem, name, nfe)
    n = samples(name, nfe)
    shape = (n, *problem.x.shape[1:])
    x_T = problem.sde.prior(shape, torch.Generator().manual_seed(SEED), torch.float64)
    began = time.perf_counter()
    found = tune(
        problem.denoiser,
        [*starts, *SOLVERS],
        x_T,
        nfe=nfe,
        end=problem.end,
        minutes=minutes,
        rounds=60,
        batch_size=4096,
    )
    return {
        "problem": name,
        "nfe": nfe,
        "untuned": best,
        "whose": whose,
        "tuned": ends(problem, found, Grid(problem.sde, found.times)),
        "start": repr(found.solver),
        "report": found.error / found.default,
        "stderr": found.stderr,
        "samples": n,
        "seconds": round(time.perf_counter() - began, 1),
    }


def plot(path: Path, cells: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(1, len(names), squeeze=False, figsize=(3.4 * len(names), 3.4))
    axes = grid[0]
    for axis, name in zip(axes, names, strict=True):
        here = sorted((found for found in cells if found["problem"] == name), key=lambda found: found["nfe"])
        budgets = [found["nfe"] for found in here]
        for key, label, style in (("untuned", "best of the race", "s--"), ("tuned", "tuned", "o-")):
            axis.plot(budgets, [found[key] for found in here], style, label=label, linewidth=1.8)
        axis.set(yscale="log", xscale="log", xlabel="evaluations", title=name)
        axis.set_xticks(budgets, [str(n) for n in budgets])
        axis.minorticks_off()
        axis.grid(color="0.92")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("rms |x - x*| / sqrt(d)")
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report(cells: Sequence[dict[str, Any]], names: Sequence[str], budgets: Sequence[int], out: Path) -> str:
    """Write the page, the numbers and the picture; return the page."""
    env = environment("cpu", torch.float64)
    by = {(found["problem"], found["nfe"]): found for found in cells}
    ratios = {key: found["tuned"] / found["untuned"] for key, found in by.items()}
    page = ["# Tuned solvers", "", f"`python {env['command']}`", ""]
    page += [
        "Errors of what `scoresde.tuning.tune` makes over the least of the whole race, peers included, every solver on "
        "every grid, at as many evaluations: rms |x - x*| / sqrt(d) at t = 1e-3 against the exact flow, on the noise "
        "of the race, of which tuning has seen nothing. The least of the race is chosen on that noise itself. What the "
        "race has not run (4 and 6 evaluations) is compared with the best here of those near the top next to it. The "
        "images have other noise than in the race, where it is not independent of them (their x_T is the noise that "
        "they were made of), and are compared with the best of all solvers here on all grids of the race.",
        "",
    ]
    rows = []
    for name in names:
        here = [by.get((name, nfe)) for nfe in budgets]
        rows.append([name, *(f"{found['tuned'] / found['untuned']:.2g}" if found else "" for found in here)])
        rows.append(["tuned", *(number(found["tuned"]) if found else "" for found in here)])
        rows.append(["best of the race", *(number(found["untuned"]) if found else "" for found in here)])
        rows.append(["seconds", *(f"{found['seconds']:.0f}" if found else "" for found in here)])
    page += table(["evaluations", *budgets], rows)
    values = list(ratios.values())
    page += [
        "",
        f"{sum(v <= 0.5 for v in values)} of {len(values)} cells are at 0.5 or below; the median is "
        f"{statistics.median(values):.2g}, the worst {max(values):.2g}. Seconds are of one core, with others on it.",
        "",
        "![error against evaluations](tuned.png)",
        "",
        "| cell | best of the race | tuned from | on its own third set | samples |",
        "|---|---|---|---|---|",
    ]
    page += [
        f"| {found['problem']}, {found['nfe']} | {found['whose']} | `{found['start']}` | {found['report']:.2g} of its "
        f"start | {found['samples']} |"
        for found in cells
    ]
    plot(out / "tuned.png", cells, names)
    write_json(out / "results.json", {"environment": env, "cells": list(cells)})
    text = "\n".join(page) + "\n"
    (out / "README.md").write_text(text)
    return text


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", nargs="+", choices=[*EXACT], default=[*EXACT], help="exact problems (all)")
    parser.add_argument("--nfe", type=int, nargs="+", default=NFE, help="budgets of evaluations (4 5 6 8 10 15 20)")
    parser.add_argument("--minutes", type=float, default=1.0, help="for each cell (1)")
    parser.add_argument("--within", type=float, default=math.inf, help="minutes: no cell is begun after (no end)")
    parser.add_argument("--out", type=Path, default=Path("runs/tuned"), help="folder of results")
    parser.add_argument("--fresh", action="store_true", help="forget the cells of earlier runs in --out")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    (args.out / "runs").mkdir(parents=True, exist_ok=True)
    path = args.out / "runs" / "cells.jsonl"
    if args.fresh:
        path.unlink(missing_ok=True)
    store = Cells(path, "benchmarks/tuned.py", "cells", {}, lambda found: (found["problem"], found["nfe"]))
    race, began = Race(), time.monotonic()
    for nfe in args.nfe:
        for name in args.problem:
            if (name, nfe) not in store.done and time.monotonic() < began + 60 * args.within:
                store.write(found := cell(race, problem_of(name), name, nfe, args.minutes))
                print(f"{name}, {nfe}: {found['tuned'] / found['untuned']:.3f}, {found['seconds']:.0f} s", flush=True)
    done = [store.done[name, nfe] for name in args.problem for nfe in sorted(args.nfe) if (name, nfe) in store.done]
    print(report(done, args.problem, sorted(args.nfe), args.out))


if __name__ == "__main__":
    main()
