"""What a user gets: one solver for each number of evaluations, on its default grid, beside what the peers' users get.

    python benchmarks/users_view.py --out benchmarks/results/users_view

Nothing is chosen after the race: `solver_at` says which solver is taken at which number of evaluations, on the grid of
`sample(nfe=)`, and `peers.USUAL` lists the peers' samplers with the spacings that their packages give them. All start
from the same noise, on a VP SDE and on a chain, and the error is rms |x - x*| / sqrt(d) to the exact flow: at t = 0,
and at the first noisy time (t = 1e-3 of VP, the chain's first node). A cell is our error over that of the best of the
peers; where both are within three times the reference's own error, it is a tie. Beside the default stands what
`scoresde.tuning.choose` finds for the problem and the budget, on other noise than that of the race. Solvers that draw
noise have no endpoint: their laws at t = 0 are compared, as in the race (step_counts.py).

Written into --out: README.md, results.json, and runs/ with every finished cell. A cell is computed anew where the code
or a package behind it has changed.
"""

from __future__ import annotations

import argparse
import math
import statistics
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from kept import small as number
from peers import PACKAGES, USUAL, Peer, installed, peers, usual_grid
from problems import EXACT, Draws, Normals, Problem
from step_counts import HERE, Cell, Ours, Score, Store, best, fingerprints
from torch import Tensor
from tqdm import tqdm

from scoresde import SDE, VPSDE, DDPMChain, Grid
from scoresde.info import environment
from scoresde.report import table, write_json
from scoresde.run import choose, process
from scoresde.solvers import ERSDE, Adams, DPMSolverPP, Solver, UniPC
from scoresde.tuning import choose as tuned

NFE = [5, 8, 10, 15, 20, 25, 50, 100]
FIXED = [8, 10, 15, 20, 25, 50]
FIRST = {"VP": 1e-3, "chain": 1.0}
TIES = 3.0
FAILS = 1.3
DEFAULT = "default"


def solver_at(nfe: int) -> Solver:
    """The solver of the ODE that is recommended at that number of evaluations."""
    return Adams()


def noisy_at(nfe: int) -> Solver:
    """The solver with noise that is recommended at that number of evaluations."""
    return ERSDE()


CHOSEN = "chosen"
SAMPLES, SEED = 64, 101  # of the choice


def noise_of_choice(problem: Problem) -> Tensor:
    """x_T of the choice: other noise than that of the race."""
    like = problem.x[:1].expand(SAMPLES, *problem.x.shape[1:])
    return problem.sde.prior_std_at(problem.sde.t_max) * Normals(SEED)(0, like)


BESIDE: list[Solver] = [DPMSolverPP(2), UniPC(3), UniPC(4, "v")]
"""What was recommended before, on the same grids."""


@cache
def problem_at(name: str, sde: str, end: float) -> Problem:
    """One of `EXACT` on that process, with its reference at `end`."""
    made: SDE = VPSDE() if sde == "VP" else DDPMChain()
    return EXACT[name](sde=made, end=end)


def places() -> list[tuple[str, float]]:
    """(process, end) of the tables."""
    return [(sde, end) for sde, first in FIRST.items() for end in (0.0, first)]


def title(sde: str, end: float) -> str:
    return f"{sde} to {'t = 0' if end == 0 else 'its first node' if sde == 'chain' else f't = {end:g}'}"


def usual(peer: Peer, spacing: str, problem: Problem, first: float, nfe: int) -> Grid:
    """The grid of as many steps as the budget buys."""

    def grid(steps: int) -> Grid:
        return usual_grid(spacing, problem.sde, steps, problem.end, first)

    return grid(max(bisect_right(range(1, nfe + 1), nfe, key=lambda n: peer.evaluations(grid(n))), 1))


def measured(run: Callable[[Tensor, Draws], tuple[Tensor, int]], problem: Problem, law: bool, nfe: int) -> Score:
    """The error or distance of a run, infinite where it broke or took too much."""
    used = 0

    def ends(x: Tensor, draws: Draws) -> Tensor:
        nonlocal used
        end, used = run(x, draws)
        return end

    try:
        value = problem.law_distance(ends, nfe) if law else problem.error(ends)
    except (ValueError, ArithmeticError, TypeError, RuntimeError, IndexError) as error:
        return Score(math.inf, used, 0.0, f"{type(error).__name__}: {error}"[:200])
    return Score(value if used <= nfe else math.inf, used)


def race(store: Store, names: Iterable[str], budgets: Sequence[int]) -> dict[Cell, Score]:
    """Every cell; those in the store are not measured again."""
    done, found = store.read(), dict[Cell, Score]()
    theirs = {peer.name: peer for peer in peers()}
    for name, (sde, end), nfe in tqdm(
        [(name, place, nfe) for name in names for place in places() for nfe in budgets], unit="cell"
    ):
        where = f"{name}, {title(sde, end)}"

        def kept(
            law: bool, package: str, solver: str, grid: str, make: Callable[[Problem], Any], where: str = where
        ) -> None:
            cell = Cell(where, "law" if law else "endpoint", package, solver, grid, nfe)  # noqa: B023
            if cell not in done:
                problem = problem_at(name, sde, end)  # noqa: B023
                with torch.no_grad():
                    done[cell] = measured(make(problem), problem, law, nfe)  # noqa: B023
                store.write(cell, done[cell])
            found[cell] = done[cell]

        def ours(solver: Solver, nfe: int = nfe) -> Callable[[Problem], Any]:
            def make(problem: Problem) -> Any:
                made, grid = choose(process(problem.denoiser, solver, nfe), solver, nfe=nfe, end=problem.end)
                return lambda x, draws: Ours(made, True).run(problem.denoiser, x, grid, draws)

            return make

        def chosen(problem: Problem, nfe: int = nfe) -> Any:
            found = tuned(problem.denoiser, noise_of_choice(problem), nfe=nfe, end=problem.end)
            made, grid = Ours(found.solver, True), Grid(problem.sde, found.times)
            return lambda x, draws: made.run(problem.denoiser, x, grid, draws)

        kept(False, HERE, CHOSEN, "its own", chosen)
        for solver in [solver_at(nfe), *BESIDE]:
            kept(False, HERE, "" if solver == solver_at(nfe) else Ours(solver, True).name, DEFAULT, ours(solver))
        noisy = end == 0 and sde == "VP"
        if noisy:
            kept(True, HERE, "", DEFAULT, ours(noisy_at(nfe)))
            kept(True, HERE, "DPMSolverPP(stochastic=True)", DEFAULT, ours(DPMSolverPP(2, stochastic=True)))
        for peer_name, spacing in USUAL:
            if peer_name not in theirs or not (noisy or theirs[peer_name].deterministic):
                continue
            peer = theirs[peer_name]

            def make(problem: Problem, peer: Peer = peer, spacing: str = spacing) -> Any:
                grid = usual(peer, spacing, problem, FIRST[sde], nfe)  # noqa: B023
                return lambda x, draws: peer.run(problem.denoiser, x, grid, draws)

            kept(not peer.deterministic, peer.package, peer_name, spacing, make)
    return found


# --- the tables -------------------------------------------------------------------------------------------------------


class Cells:
    """The finished cells, asked for by where they are."""

    def __init__(self, scores: dict[Cell, Score]) -> None:
        self.scores = scores

    def ours(self, where: str, race: str, nfe: int, solver: str = "") -> float:
        return next(s.value for c, s in self.scores.items() if c[:4] == (where, race, HERE, solver) and c.nfe == nfe)

    def peers(self, where: str, race: str, nfe: int) -> tuple[float, str]:
        """The best of the peers and its name."""
        here = {c: s for c, s in self.scores.items() if c[:2] == (where, race)}
        found = best(here, nfe, False)
        return (found[1].value, f"{found[0].solver}, {found[0].grid}") if found else (math.nan, "")

    def ratio(self, where: str, race: str, nfe: int, floor: float, solver: str = "") -> float:
        """Ours over the best of the peers; one where both are what the reference cannot tell from exact."""
        ours, theirs = self.ours(where, race, nfe, solver), self.peers(where, race, nfe)[0]
        return 1.0 if max(ours, theirs) <= TIES * floor else ours / theirs


def mean(values: Sequence[float]) -> float:
    """Geometric."""
    return math.exp(statistics.fmean(math.log(value) for value in values))


def ratios(
    cells: Cells, names: Sequence[str], budgets: Sequence[int], solver: str = ""
) -> dict[tuple[str, int], float]:
    return {
        (f"{name}, {title(*place)}", nfe): cells.ratio(
            f"{name}, {title(*place)}", "endpoint", nfe, problem_at(name, *place).endpoint()[1], solver
        )
        for place in places()
        for name in names
        for nfe in budgets
    }


def fixed(cells: Cells, names: Sequence[str], nfe: int, solver: str = "") -> tuple[float, str]:
    """One solver for all problems and ends: the geometric mean of its errors over that of the best fixed peer."""
    wheres = [f"{name}, {title(*place)}" for place in places() for name in names]
    ours = mean([cells.ours(where, "endpoint", nfe, solver) for where in wheres])
    means = {}
    for peer, spacing in USUAL:
        values = [s.value for c, s in cells.scores.items() if c[3:] == (peer, spacing, nfe) and c.race == "endpoint"]
        if len(values) == len(wheres) and all(map(math.isfinite, values)):
            means[f"{peer}, {spacing}"] = mean(values)
    name = min(means, key=lambda name: means[name])
    return ours / means[name], name


def report(scores: dict[Cell, Score], names: Sequence[str], budgets: Sequence[int], out: Path) -> str:
    """Write the page and the numbers; return the page."""
    cells, env = Cells(scores), environment("cpu", torch.float64)
    versions = {name: installed(name) for name in PACKAGES if installed(name)}
    found, chosen = ratios(cells, names, budgets), ratios(cells, names, budgets, CHOSEN)
    page = ["# The user's view", "", f"`python {env['command']}`", ""]
    many = len({c[2:5] for c in scores if c.race == "endpoint" and c.package != HERE})
    page += [
        f"Errors of `{Ours(solver_at(budgets[0]), True).name}` on its default grid over those of the best of {many} "
        f"defaults of the peers ({', '.join(f'{k} {v}' for k, v in versions.items())}), each on its package's grid, "
        "from the same noise to the same exact flow. Below one ours is nearer. The best of the peers is chosen in each "
        f"cell anew, ours never. Chosen: `scoresde.tuning.choose` on {SAMPLES} samples of other noise.",
    ]
    for place in places():
        page += ["", f"## {title(*place)}", ""]
        rows = []
        for name in names:
            where = f"{name}, {title(*place)}"
            rows.append([name, *(f"{found[where, nfe]:.2f}" for nfe in budgets)])
            rows.append([f"{name}, chosen", *(f"{chosen[where, nfe]:.2f}" for nfe in budgets)])
            rows.append(["ours", *(number(cells.ours(where, "endpoint", nfe)) for nfe in budgets)])
            rows.append(["best peer", *(number(cells.peers(where, "endpoint", nfe)[0]) for nfe in budgets)])
        page += table(["evaluations", *budgets], rows)
    page += ["", "## Geometric means and worst cells, over problems, processes and ends", ""]
    rows = []
    for solver in ["", CHOSEN, *(Ours(solver, True).name for solver in BESIDE)]:
        own = found if not solver else ratios(cells, names, budgets, solver)
        at = {nfe: [value for (_, n), value in own.items() if n == nfe] for nfe in budgets}
        label = solver or Ours(solver_at(budgets[0]), True).name
        rows.append([label, *(f"{mean(at[nfe]):.2f} ({max(at[nfe]):.1f})" for nfe in budgets)])
    page += table(["mean (worst)", *budgets], rows)
    over = {key: value for key, value in found.items() if value > FAILS}
    page += ["", f"Cells over {FAILS}, with the peer that is ahead, and that peer's error with more evaluations:", ""]
    for (where, nfe), value in over.items():
        theirs, name = cells.peers(where, "endpoint", nfe)
        later = [
            f"{number(s.value)} at {c.nfe}"
            for c, s in scores.items()
            if c.problem == where and f"{c.solver}, {c.grid}" == name and c.nfe > nfe
        ][:2]
        page.append(f"- {where}, {nfe}: {value:.1f} ({name}: {number(theirs)}, and {', '.join(later)})")
    behind = {key: value for key, value in chosen.items() if value > 1}
    page += ["", f"The chosen one is behind the best of the peers in {len(behind)} of {len(chosen)} cells:", ""]
    page += [f"- {where}, {nfe}: {value:.2f} ({cells.peers(where, 'endpoint', nfe)[1]})"
             for (where, nfe), value in behind.items()]  # fmt: skip
    page += ["", "## One fixed solver", ""]
    page += [
        "The geometric mean of its errors over all problems, processes and ends, over that of the peer that is best "
        "so, sampler and grid fixed for all:",
        "",
    ]
    lines = [(nfe, *fixed(cells, names, nfe)) for nfe in budgets if nfe in FIXED]
    page += table(["evaluations", "ours / best fixed peer", "which"], [(n, f"{r:.2f}", w) for n, r, w in lines])
    page += ["", "## With noise", ""]
    page += [
        f"Distance of the law to the data's at t = 0, VP, over the best of the peers': "
        f"`{Ours(noisy_at(budgets[0]), False).name}` and, after the stroke, `DPMSolverPP(stochastic=True)`. What is "
        "measured is said in [the race](../step_counts/README.md); mixtures have the noise of their samples in it.",
        "",
    ]
    rows = []
    for name in names:
        where = f"{name}, {title('VP', 0.0)}"
        both = [
            [cells.ratio(where, "law", nfe, 0.0, solver) for nfe in budgets]
            for solver in ("", "DPMSolverPP(stochastic=True)")
        ]
        rows.append([name, *(f"{a:.2f} / {b:.2f}" for a, b in zip(*both, strict=True))])
    page += table(["evaluations", *budgets], rows)
    record = {
        "environment": env,
        "peers": versions,
        "evaluations": list(budgets),
        "ratios": {
            where: " ".join(f"{found[where, nfe]:.3g}" for nfe in budgets)
            for where in dict.fromkeys(w for w, _ in found)
        },
        "chosen": {
            where: " ".join(f"{chosen[where, nfe]:.3g}" for nfe in budgets)
            for where in dict.fromkeys(w for w, _ in chosen)
        },
        "cells": _nested(scores),
    }
    write_json(out / "results.json", record)
    text = "\n".join(page) + "\n"
    (out / "README.md").write_text(text)
    return text


def _nested(scores: dict[Cell, Score]) -> dict[str, dict[str, str]]:
    """where and race -> solver on grid -> its values at the budgets."""
    tree: dict[str, dict[str, str]] = {}
    for (where, kind, package, solver, grid, _), score in scores.items():
        row = tree.setdefault(f"{where}, {kind}", {})
        name = f"{solver or 'recommended'}, {grid}" if package == HERE else f"{solver}, {grid}"
        row[name] = f"{row.get(name, '')} {score.value:.4g}".strip()
    return tree


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", nargs="+", choices=[*EXACT], default=[*EXACT], help="exact problems (all)")
    parser.add_argument("--nfe", type=int, nargs="+", default=NFE, help="budgets of evaluations")
    parser.add_argument("--out", type=Path, default=Path("runs/users_view"), help="folder of results")
    parser.add_argument("--fresh", action="store_true", help="forget the cells of earlier runs in --out")
    args = parser.parse_args(argv)
    if not peers():
        parser.error(f"none of {', '.join(PACKAGES)} is installed: there is nobody to be compared with")
    torch.set_num_threads(1)
    (args.out / "runs").mkdir(parents=True, exist_ok=True)
    made = fingerprints(
        argparse.Namespace(**dict.fromkeys(["denoiser", "shape", "data", "features", "samples", "batch", "end"]))
    )
    store = Store(args.out / "runs" / "cells.jsonl", made, args.fresh)
    print(report(race(store, args.problem, args.nfe), args.problem, args.nfe, args.out))


if __name__ == "__main__":
    main()
