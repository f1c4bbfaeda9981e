"""Tuned solvers beside the best untuned ones of the race, on the exact problems, few evaluations.

    python benchmarks/tuned.py --out benchmarks/results/tuned
    python benchmarks/tuned.py --seeds 20 --problem ring images --nfe 5 --out benchmarks/results/tuned

In each cell, a problem and a number of evaluations, `scoresde.tuning.tune` starts from the 20 solvers and grids here
that the race (step_counts.py) found nearest, and from what `choose` finds, on noise of its own: half of it trains, a
quarter chooses, a quarter reports. The error of the result is then measured on the noise of the race, rms |x - x*| /
sqrt(d) at t = 1e-3 against the exact flow. Beside it stands the least error of the whole race on that same noise, every
solver on every grid, the peers' included, as benchmarks/results/step_counts has it. Where the race has not been run at
that number of evaluations, it is the least of those here that are among the 40 best at the numbers next to it; of the
images, where other solvers are best at each number, of all solvers here on all grids of the race.

With --seeds, a cell is tuned as many times from one start, the best of ours in the race, each time on other noise; then
start and result are compared on fresh noise, the same for all seeds.

Tuning ends by its rounds, so that a busy machine does not change what is found. Written into --out: README.md,
results.json, a picture, and runs/ with every finished cell, so that a killed run goes on where it stopped; the page has
all that are there.
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
from scoresde.tuning.chosen import CAP, SOLVERS, excess, ratio

NFE = [4, 5, 6, 8, 10, 15, 20]
RACE = Path(__file__).parent / "results" / "step_counts" / "results.json"
STARTS, NEAR = 20, 40
SEED = 7


FRESH = {"images": 1024}
"""Samples that the results of seeds are compared on; 8192 elsewhere."""


def effort(problem: str, nfe: int) -> dict[str, int]:
    """Samples of the tuning, starts and rounds: enough samples that the corrections of many evaluations are told by
    them, and about a minute of one core.
    """
    if problem == "images":
        few = nfe <= 6
        rounds = 12 if few else 10 if nfe <= 10 else 100 // nfe
        return {
            "samples": 512 if few else 256,
            "starts": 3 if few else 2 if nfe <= 10 else 1,
            "rounds": rounds,
            "batch_size": 64,
        }
    n = 512 if problem == "gaussian" else 4096
    return {"samples": n, "starts": 9 if nfe <= 10 else 3, "rounds": 60 if nfe <= 10 else 30, "batch_size": 4096}


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


def untuned(race: Race, problem: Problem, name: str, nfe: int) -> tuple[float, str, list[TunedSolver]]:
    """The least error of the race, whose, and the starts."""
    field = {one.name: one for one in ours() if one.deterministic}
    raced = nfe in race.budgets and (name != "images" or "images endpoint" in race.record)  # from independent noise
    near = [nfe] if raced else [n for n in race.budgets if n > nfe][:1] + [n for n in race.budgets if n < nfe][-1:]
    named = dict.fromkeys(pair for n in near for pair in race.here(name, n, STARTS if raced else NEAR))
    if name == "images" and not raced:
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


def noise(problem: Problem, samples: int, seed: int) -> Tensor:
    return problem.sde.prior((samples, *problem.x.shape[1:]), torch.Generator().manual_seed(seed), torch.float64)


def cell(race: Race, problem: Problem, name: str, nfe: int, minutes: float) -> dict[str, Any]:
    """One cell, measured."""
    best, whose, starts = untuned(race, problem, name, nfe)
    options = effort(name, nfe)
    x_T = noise(problem, n := options.pop("samples"), SEED)
    began = time.process_time()
    found = tune(
        problem.denoiser, [*starts, *SOLVERS], x_T, nfe=nfe, end=problem.end, minutes=minutes, **cast(Any, options)
    )
    seconds = time.process_time() - began
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
        "seconds": round(seconds, 1),
    }


class Seeds:
    """A cell from one start, again and again, on fresh noise."""

    def __init__(self, race: Race, problem: Problem, name: str, nfe: int) -> None:
        self.problem, self.name, self.nfe = problem, name, nfe
        self.start = untuned(race, problem, name, nfe)[2][0]
        self.x = noise(problem, FRESH.get(name, 8192), SEED - 1)
        self.batch = 64 if name == "images" else 2048
        self.truth = torch.cat([table_flow(problem.denoiser, x, problem.end, 200)[0] for x in self.x.split(self.batch)])
        self.theirs = self._squares(self.start)

    def _squares(self, solver: TunedSolver) -> Tensor:
        x = torch.cat(
            [sample(self.problem.denoiser, x, solver, nfe=self.nfe, seed=0).x for x in self.x.split(self.batch)]
        )
        return (x - self.truth).square().flatten(1).mean(1)

    def __call__(self, seed: int, minutes: float) -> dict[str, Any]:
        """Of one seed: by how many standard errors the result is worse, and the ratios of rms and of capped rms."""
        options = effort(self.name, self.nfe) | {"starts": 1}
        x_T = noise(self.problem, options.pop("samples"), SEED + 1 + seed)
        found = tune(
            self.problem.denoiser,
            self.start,
            x_T,
            nfe=self.nfe,
            end=self.problem.end,
            minutes=minutes,
            **cast(Any, options),
        )
        mine = self._squares(found)
        return {
            "problem": self.name,
            "nfe": self.nfe,
            "seed": seed,
            "given back": found.error == found.default,
            "worse by": excess(mine, self.theirs),
            "rms": float((mine.mean() / self.theirs.mean()).sqrt()),
            "capped": math.sqrt(ratio(mine, self.theirs)),
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


def report(cells: Sequence[dict[str, Any]], seeds: Sequence[dict[str, Any]], out: Path) -> str:
    """Write the page, the numbers and the picture; return the page."""
    env = environment("cpu", torch.float64)
    names = [name for name in EXACT if any(found["problem"] == name for found in cells)]
    budgets = sorted({found["nfe"] for found in cells})
    by = {(found["problem"], found["nfe"]): found for found in cells}
    ratios = [found["tuned"] / found["untuned"] for found in cells]
    page = ["# Tuned solvers", "", f"`python {env['command']}`, commit {env['commit']}.", ""]
    page += [
        "Errors of what `scoresde.tuning.tune` makes over the least of the whole race, peers included, every solver on "
        "every grid, at as many evaluations: rms |x - x*| / sqrt(d) at t = 1e-3 against the exact flow, on the noise "
        "of the race, of which tuning has seen nothing. The least of the race is chosen on that noise itself. What the "
        "race has not run (4 and 6 evaluations) is compared with the best here of those near the top next to it, of "
        "the images with the best of all solvers here on all grids.",
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
    page += [
        "",
        f"{sum(v <= 0.5 for v in ratios)} of {len(ratios)} cells are at 0.5 or below; the median is "
        f"{statistics.median(ratios):.2g}, the worst {max(ratios):.2g}. Seconds are processor time of one core.",
        "",
        "![error against evaluations](tuned.png)",
        "",
    ]
    rows = [
        [
            f"{found['problem']}, {found['nfe']}",
            found["whose"],
            f"`{found['start']}`",
            f"{found['report']:.2g}, log +- {found['stderr']:.2g}",
            found["samples"],
        ]
        for found in cells
    ]
    page += table(["cell", "best of the race", "tuned from", "its third set: rms over its start's", "samples"], rows)
    page += [
        "",
        "The third set counts samples that end in another mode of the data than the exact flow's as they are. Where "
        "there are a few such, of the start and of the result alike, its rms is theirs and says little of the others. "
        "A cell of the race has few samples (64 images), and its best is one in which none of them is lost: whether "
        "the tuned one loses one of them, which is then its whole error, is partly luck.",
        "",
    ]
    if seeds:
        page += [*of_seeds(seeds), ""]
    plot(out / "tuned.png", cells, names)
    write_json(out / "results.json", {"environment": env, "cells": list(cells), "seeds": list(seeds)})
    text = "\n".join(page)
    (out / "README.md").write_text(text)
    return text


def of_seeds(seeds: Sequence[dict[str, Any]]) -> list[str]:
    """Their part of the page."""
    rows = []
    for name, nfe in dict.fromkeys((one["problem"], one["nfe"]) for one in seeds):
        here = [one for one in seeds if (one["problem"], one["nfe"]) == (name, nfe)]
        spread = []
        for key in ("rms", "capped"):
            values = sorted(one[key] for one in here)
            spread.append(f"{values[0]:.2g}, {statistics.median(values):.2g}, {values[-1]:.2g}")
        worse, better = (sum(sign * one["worse by"] > 2 for one in here) for sign in (1, -1))
        back = sum(one["given back"] for one in here)
        rows.append([f"{name}, {nfe}", f"{worse} of {len(here)}", better, back, *spread, FRESH.get(name, 8192)])
    head = ["cell", "worse by over 2 s.e.", "better by as much", "given back", "rms", "capped rms", "fresh samples"]
    return [
        "## Other seeds",
        "",
        "The same cell tuned again and again, each time on other noise, from one start, the best of the solvers here "
        "in the race; both then on fresh noise, the same for all seeds. Worse: the mean square is larger than that of "
        "the start by more than two standard errors of the paired difference. Ratios to the start's: least, median, "
        f"largest; capped: a sample's square s counts as s / (1 + s / cap), the cap being {CAP:.0f} times the lesser "
        "of both medians.",
        "",
        *table(head, rows),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", nargs="+", choices=[*EXACT], default=[*EXACT], help="exact problems (all)")
    parser.add_argument("--nfe", type=int, nargs="+", default=NFE, help="budgets of evaluations (4 5 6 8 10 15 20)")
    parser.add_argument("--seeds", type=int, default=0, help="tune each cell so many times instead (0)")
    parser.add_argument("--minutes", type=float, default=30.0, help="after which a tuning stops with what it has (30)")
    parser.add_argument("--within", type=float, default=math.inf, help="minutes: no cell is begun after (no end)")
    parser.add_argument("--out", type=Path, default=Path("runs/tuned"), help="folder of results")
    parser.add_argument("--fresh", action="store_true", help="forget what earlier runs left in --out")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    (args.out / "runs").mkdir(parents=True, exist_ok=True)
    cells, seeds = (
        Cells(
            args.out / "runs" / f"{name}.jsonl",
            "benchmarks/tuned.py",
            name,
            {},
            lambda found: (found["problem"], found["nfe"], found.get("seed")),
            fresh=args.fresh,
        )
        for name in ("cells", "seeds")
    )
    race, end = Race(), time.monotonic() + 60 * args.within
    for nfe in args.nfe:
        for name in args.problem:
            left = [seed for seed in range(args.seeds) if (name, nfe, seed) not in seeds.done]
            if left and time.monotonic() < end:
                again = Seeds(race, EXACT[name](), name, nfe)
                for seed in left:
                    if time.monotonic() < end:
                        seeds.write(found := again(seed, args.minutes))
                        print(
                            f"{name}, {nfe}, seed {seed}: {found['capped']:.3f} capped, {found['rms']:.3f}", flush=True
                        )
            if not args.seeds and (name, nfe, None) not in cells.done and time.monotonic() < end:
                cells.write(found := cell(race, EXACT[name](), name, nfe, args.minutes))
                print(f"{name}, {nfe}: {found['tuned'] / found['untuned']:.3f}, {found['seconds']:.0f} s", flush=True)
    order = [*EXACT]
    done = sorted(cells.done.values(), key=lambda found: (order.index(found["problem"]), found["nfe"]))
    if done:
        print(report(done, sorted(seeds.done.values(), key=lambda found: found["seed"]), args.out))


if __name__ == "__main__":
    main()
