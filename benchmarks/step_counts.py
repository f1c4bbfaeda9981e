"""The race: every solver on every grid at 5 to 50 evaluations, on exact problems or on your own denoiser, beside the
samplers of diffusers, k-diffusion and azula where they are installed.

    python benchmarks/step_counts.py --problem all --peers
    python benchmarks/step_counts.py --denoiser my_module:denoiser --shape 3 32 32 --data images.npy

Deterministic solvers race to an endpoint: from one x_T to t = 1e-3 (of another SDE, the time with the half log-SNR that
VP has there), error rms |x - x*| / sqrt(d) against the exact flow. Solvers that draw noise race in law: to t = 0,
distance between their samples and the data (problems.py says which). With --data, all of them race in law. A budget of
n evaluations buys as many steps as fit. Written into --out:

    README.md       the tables: the best at each budget, every solver, and which solver here agrees with which peer's
    results.json    all numbers, with what they were measured on
    *.png           error against evaluations
    runs/           every finished cell, so that a run that is killed goes on where it stopped; a cell is computed anew
                    where the code or a package behind it has changed

--denoiser names an object or a function that makes it, in an importable module: a scoresde `Denoiser`. --data is an
array of samples (.npy, .npz, or module:attribute), --features any function of a batch to (B, F) (module:attribute).
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import math
import os
import signal
import statistics
import sys
import textwrap
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from kept import small as number
from peers import NOT_DRIVEN, PACKAGES, Peer, installed, peers
from problems import (
    EXACT,
    GRIDS,
    Draws,
    Impulses,
    Normals,
    Problem,
    UserProblem,
    make_grid,
    spacing_of,
    user_data,
)
from torch import Tensor
from tqdm import tqdm

import scoresde
from scoresde import Denoiser, Grid, NonFiniteError, sample
from scoresde.cli.models import load_denoiser
from scoresde.info import environment
from scoresde.metrics import RandomFeatures
from scoresde.report import Cells, attribute, table, write_json
from scoresde.solvers import (
    DEIS,
    IPNDM,
    DPMSolverPP,
    EulerMaruyama,
    ExponentialAB,
    RungeKutta,
    SASolver,
    Solver,
    UniPC,
    available,
)

NFE = [5, 8, 10, 15, 20, 50]
RACED = ["uniform", "quadratic", "power 4", "power 5", "log-SNR", "Karras 7"]
HERE = "scoresde"
Race = Literal["endpoint", "law"]

PEER_REMARKS = {
    "azula REAB*": "A bug: sigma_t where its formula has sigma_s, in its last line: first order at any order asked for",
    "diffusers sde-dpmsolver++-3M*": "A bug: the term of the second difference has -1/2 for +1/2",
    "diffusers PNDM*": "Repeats its second evaluation (an averaged first step); no counterpart here",
    "k-diffusion dpmpp_3m_sde*": "Its second step takes the exact weight, where diffusers takes the midpoint's",
    "diffusers SA-Solver*": "Adds a term of its own at order 2, in the start of the others too; no counterpart here",
    "diffusers dpmsolver*S": "Its stages are the grid's times: the same where the grid is even in lambda",
    "k-diffusion dpm_fast": "On its own grid, even in lambda",
    "azula Ito": "DPMSolverPP(order=1, stochastic=True, view=eps), but for noise on the step to t = 0 too",
    "diffusers sde-dpmsolver-2M": "DPMSolverPP(stochastic=True, view=eps, lower_final=True) to 2e-7 where the grid "
    "ends at noise, as measured apart; it takes another last step to t = 0",
    "k-diffusion dpm_2_ancestral": "Takes ancestral steps between its stages; no counterpart here",
    "k-diffusion dpmpp_2s_ancestral": "Takes ancestral steps between its stages; no counterpart here",
    "k-diffusion dpmpp_sde": "Takes ancestral steps between its stages; no counterpart here",
    "azula PC": "Its corrector shortens x_t - alpha D before it adds noise; no counterpart here",
}
"""What is known of a peer's sampler: printed beside it where it agrees with none here."""


# --- contestants -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ours:
    """A solver of scoresde, with the face of a `Peer`."""

    solver: Solver
    deterministic: bool
    package: str = HERE
    grids: tuple[str, ...] | None = None
    steps: int | None = None  # where the budget has settled it

    @property
    def name(self) -> str:
        """The class and the options that are not its defaults: UniPC(order=2)."""
        options: Sequence[Any] = dataclasses.fields(self.solver) if dataclasses.is_dataclass(self.solver) else ()
        given = {option.name: getattr(self.solver, option.name) for option in options}
        shown = [f"{o.name}={_plain(given[o.name])}" for o in options if given[o.name] != o.default]
        return f"{type(self.solver).__name__}({', '.join(shown)})"

    @property
    def spacing(self) -> str | None:
        return spacing_of(self.solver.grid(scoresde.VPSDE(), 8))

    def within(self, sde: scoresde.SDE, nfe: int) -> Ours:
        """The same with a budget, if its options depend on it."""
        if type(self.solver).within is Solver.within:
            return self
        solver, grid = self.solver.within(sde, nfe)
        return self if solver == self.solver else dataclasses.replace(self, solver=solver, steps=grid.steps)

    def evaluations(self, grid: Grid) -> int | None:
        return self.solver.evaluations(grid)

    def run(self, denoiser: Denoiser, x: Tensor, grid: Grid, draws: Draws) -> tuple[Tensor, int]:
        if self.solver.adaptive:
            grid = Grid(grid.sde, [float(grid.times[0]), float(grid.times[-1])])
        # Brownian paths come from a generator; impulses can only be given as noise.
        source: dict[str, Any] = {"generator": draws.generator} if isinstance(draws, Normals) else {"noise": draws}
        solution = sample(denoiser, x, self.solver, grid=grid, **source)
        if solution.status != "complete":
            raise ArithmeticError(f"the budget ran out at t = {solution.t:.3g}")
        return solution.x, solution.nfe


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else getattr(value, "__name__", None) or repr(value)


Contestant = Ours | Peer


_VIEWS: tuple[Any, ...] = ("x0", "eps")
_CURVED: tuple[Any, ...] = ("v", "flow")


@cache
def ours() -> tuple[Ours, ...]:
    """All of `available()`, and the options of the families that a budget may call for."""
    # ReverseSDE on fixed steps is Euler-Maruyama in law, on a Brownian path for each sample: gigabytes for thousands.
    listed = [Ours(e.solver, e.deterministic) for e in available() if type(e.solver).__name__ != "ReverseSDE"]
    views: list[tuple[Any, Any]] = [(view, chi) for view in _VIEWS for chi in ("half_log_snr", "sigma", "t")]
    views += [("v", chi) for chi in ("angle", "half_log_snr", "t")]
    views += [("flow", chi) for chi in ("flow", "half_log_snr", "t")]
    more: list[Solver] = [ExponentialAB(k, view, chi) for k in (2, 3, 4) for view, chi in views]
    final = {"lower_final": True}
    more += [ExponentialAB(k, view, **final) for k in (2, 3, 4) for view in ("eps", "v", "flow")]
    more += [UniPC(k, view, rule, **final) for k in (2, 3, 4) for view in _VIEWS for rule in ("B1", "B2")]
    more += [DPMSolverPP(k, view=view, **final) for k in (2, 3) for view in _VIEWS]
    more += [DPMSolverPP(3, view=view, as_published=True, **final) for view in _VIEWS]
    more += [DPMSolverPP(2, rule="exact", **final)]
    more += [DPMSolverPP(2, view="eps"), DPMSolverPP(3, view="eps", as_published=True)]
    for k, view in itertools.product((1, 2, 3, 4), _VIEWS):
        more += [UniPC(k, view, rule) for rule in ("B1", "B2", "exact")]
    more += [UniPC(k, view, corrector=False) for k in (2, 3, 4) for view in _VIEWS]
    more += [UniPC(k, view, lower_final=last) for k in (2, 3, 4) for view in _CURVED for last in (False, True)]
    more += [DEIS(k, chi) for k in (2, 3, 4) for chi in ("t", "sigma")]
    more += [
        SASolver(p, c, tau=0.0, lower_final=last) for p, c in ((2, 2), (3, 3), (3, 4), (4, 5)) for last in (False, True)
    ]
    more += [IPNDM(k) for k in (2, 3, 4)] + [DPMSolverPP(2, rule="exact")]
    more += [
        RungeKutta(method, variable)
        for method in ("heun", "midpoint", "kutta3", "rk4")
        for variable in ("sigma", "half_log_snr", "t", "angle", "flow")
    ]
    if make := getattr(scoresde.solvers, "DPMSolver", None):
        more += [make(k, view) for k in (2, 3) for view in _VIEWS]
    listed += [Ours(solver, True) for solver in more]
    noisy: list[Solver] = [ExponentialAB(k, view, tau=1.0) for k in (2, 3) for view in _VIEWS]
    noisy += [ExponentialAB(k, tau=tau) for k in (2, 3) for tau in (0.2, 0.4)]
    curved = [(view, chi) for view, chi in views if view in _CURVED]
    noisy += [ExponentialAB(k, view, chi, tau) for k in (2, 3) for view, chi in curved for tau in (0.2, 0.4, 1.0)]
    noisy += [SASolver(p, c, tau=tau) for p, c in ((2, 2), (2, 3), (3, 3), (3, 4)) for tau in (0.2, 0.4, 1.0)]
    noisy += [DPMSolverPP(2, stochastic=True, rule="exact"), DPMSolverPP(3, stochastic=True, as_published=True)]
    noisy += [DPMSolverPP(k, stochastic=True, view="eps") for k in (1, 2)] + [EulerMaruyama("sigma")]
    noisy += [DPMSolverPP(k, stochastic=True, lower_final=True) for k in (2, 3)]
    listed += [Ours(solver, False) for solver in noisy]
    return tuple({contestant.name: contestant for contestant in reversed(listed)}.values())[::-1]


def entered(patterns: Sequence[str], with_peers: bool) -> list[Contestant]:
    """The contestants whose name matches a pattern; a peer's begins with its package.

    Raises:
        ValueError: if a pattern matches none.
    """
    field: list[Contestant] = [*ours(), *(peers() if with_peers else ())]
    chosen = [c for c in field if any(fnmatch(c.name, pattern) for pattern in patterns)]
    if not chosen:
        raise ValueError(f"--solvers {' '.join(patterns)} matches none of {', '.join(c.name for c in field)}")
    return chosen


# --- one cell --------------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """A solver on a grid with a budget, on a problem."""

    problem: str
    race: Race
    package: str
    solver: str
    grid: str
    nfe: int


class Score(NamedTuple):
    """What came of a cell: the error or distance (infinite if not finite), the evaluations that were made, seconds, and
    a note where it could not be run.
    """

    value: float
    used: int = 0
    seconds: float = 0.0
    note: str = ""


def fitted(contestant: Contestant, problem: Problem, cell: Cell) -> tuple[Contestant, Grid]:
    """The contestant and the grid of as many steps as the budget buys.

    Raises:
        ValueError: if not one step fits, or the SDE does not go with the grid.
    """
    end = problem.end if cell.race == "endpoint" else 0.0
    if isinstance(contestant, Ours):
        contestant = contestant.within(problem.sde, cell.nfe)

    def grid(steps: int) -> Grid:
        return make_grid(cell.grid, problem.sde, steps, end, problem.last)

    if isinstance(contestant, Ours) and contestant.solver.adaptive:
        return contestant, grid(1)

    def cost(steps: int) -> int:
        try:
            return contestant.evaluations(grid(steps)) or 0
        except ValueError:  # too few steps for the method: that will be the cell's note
            return 0

    steps = contestant.steps or bisect_right(range(1, cell.nfe + 1), cell.nfe, key=cost)
    if steps == 0:
        raise ValueError(f"needs more than {cell.nfe} evaluations for a single step")
    return contestant, grid(steps)


def measure(contestant: Contestant, problem: Problem, cell: Cell, seed: int = 2) -> Score:
    """Run a cell."""
    start, used = time.perf_counter(), 0
    try:
        contestant, grid = fitted(contestant, problem, cell)

        def run(x: Tensor, draws: Draws) -> Tensor:
            nonlocal used
            end, used = contestant.run(problem.denoiser, x, grid, draws)
            return end

        value = problem.error(run) if cell.race == "endpoint" else problem.law_distance(run, cell.nfe, seed)
    except NonFiniteError:
        return Score(math.inf, used, time.perf_counter() - start, "not finite")
    except (ValueError, ArithmeticError, TypeError, RuntimeError, IndexError) as error:
        return Score(math.inf, used, time.perf_counter() - start, f"{type(error).__name__}: {error}"[:200])
    note = "not finite" if math.isinf(value) else f"used {used} evaluations" if used > cell.nfe else ""
    return Score(math.inf if used > cell.nfe else value, used, time.perf_counter() - start, note)


class Work(NamedTuple):
    """What a process needs to make its problems and contestants itself."""

    args: argparse.Namespace

    def problem(self, name: str) -> Problem:
        """Made once in a process: yours has a reference that takes its time."""
        if name not in _made:
            _made[name] = EXACT[name]() if name in EXACT else user_problem(self.args)
        return _made[name]


_made: dict[str, Problem] = {}
_work: Work
_problem: Callable[[str], Problem]
_field: dict[tuple[str, str], Contestant]


def _prepare(work: Work) -> None:
    global _work, _problem, _field
    torch.set_num_threads(1)
    _work, _problem = work, work.problem
    _field = {(c.package, c.name): c for c in entered(work.args.solvers, work.args.peers)}


def _measure(cell: Cell) -> tuple[Cell, Score]:
    return cell, measure(_field[cell.package, cell.solver], _problem(cell.problem), cell)


# --- the race --------------------------------------------------------------------------------------------------------


def cells(names: Iterable[str], work: Work, field: Sequence[Contestant]) -> list[Cell]:
    """All cells of the race."""
    found = []
    for name in names:
        problem = work.problem(name)
        user = name not in EXACT
        for contestant in field:
            races: list[Race] = ["law"] if user and problem.law else ["endpoint" if contestant.deterministic else "law"]
            own = [contestant.spacing] if contestant.spacing and contestant.spacing not in work.args.grids else []
            for race, grid, nfe in itertools.product(races, [*work.args.grids, *own], work.args.nfe):
                held = race in work.args.race and (race == "endpoint" or problem.law)
                if held and grid in (contestant.grids or [*work.args.grids, *own]):
                    found.append(Cell(name, race, contestant.package, contestant.name, grid, nfe))
    return found


def _key(record: dict[str, Any]) -> tuple[str, Cell]:
    return record["made_by"], Cell(*record["cell"])


class Store:
    """Finished cells, with a fingerprint of the code that made them."""

    def __init__(self, path: Path, fingerprints: dict[str, str], fresh: bool = False) -> None:
        self.fingerprints = fingerprints
        self.kept = Cells(path, "benchmarks/step_counts.py", "cells", {}, _key, fresh)

    def read(self) -> dict[Cell, Score]:
        done = {}
        for (made_by, cell), record in self.kept.done.items():
            if made_by == self.fingerprints.get(cell.package):
                value, *rest = record["score"]
                done[cell] = Score(math.inf if value is None else value, *rest)
        return done

    def write(self, cell: Cell, score: Score) -> None:
        self.kept.write({"made_by": self.fingerprints[cell.package], "cell": cell, "score": score})


def fingerprints(args: argparse.Namespace) -> dict[str, str]:
    """For each package, a hash of everything that its numbers depend on."""

    def sha(*parts: str) -> str:
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    here = Path(__file__).parent
    package = Path(scoresde.__file__).parent
    sources = [*package.glob("*.py"), *package.glob("solvers/*.py")]
    problem = (here / "problems.py").read_text() + repr(
        [torch.__version__, args.denoiser, args.shape, args.data, args.features, args.samples, args.batch, args.end]
    )
    forms = [package / "auditing" / f"{name}.py" for name in ("forms", "schedulers", "model")]
    driver = "".join(path.read_text() for path in (here / "peers.py", *forms))
    return {name: sha(problem, driver, installed(name) or "") for name in PACKAGES} | {
        HERE: sha(problem, *(path.read_text() for path in sorted(sources)))
    }


def race(work: Work, names: Sequence[str], store: Store) -> dict[Cell, Score]:
    """Measure every cell that is not in the store; in `--jobs` processes."""
    every = cells(names, work, entered(work.args.solvers, work.args.peers))
    done = store.read()
    todo = [cell for cell in every if cell not in done]
    # Long cells first, so that no process is left with one at the end.
    todo.sort(key=lambda cell: (-cell.nfe, cell.problem))
    bar = tqdm(total=len(every), initial=len(every) - len(todo), unit="cell", smoothing=0.05)
    for cell, score in _results(work, todo):
        store.write(cell, score)
        done[cell] = score
        bar.set_postfix_str(f"{cell.problem} {cell.solver[:24]}", refresh=False)
        bar.update()
    bar.close()
    return {cell: done[cell] for cell in every}


def _results(work: Work, todo: list[Cell]) -> Iterator[tuple[Cell, Score]]:
    if work.args.jobs == 1:
        _prepare(work)
        yield from map(_measure, todo)
        return
    with ProcessPoolExecutor(work.args.jobs, get_context("spawn"), _prepare, (work,)) as pool:
        futures = [pool.submit(_measure, cell) for cell in todo]
        try:
            yield from (future.result() for future in as_completed(futures))
        finally:
            pool.shutdown(cancel_futures=True)


# --- agreement with the peers ----------------------------------------------------------------------------------------


class Agreement(NamedTuple):
    """The solver here whose end states are nearest to a peer's, over the grids of the comparison."""

    peer: str
    solver: str
    difference: float


def agreements(field: Sequence[Contestant], nfe: int = 10) -> list[Agreement]:
    """For every peer the nearest solver here: largest difference of the end states on the ring, over grids, for the
    deterministic; of the exact law on the Gaussian, its mean and standard deviation, for the others. Relative to the
    largest entry where that is above 1.
    """
    ring, gaussian = EXACT["ring"](), EXACT["gaussian"]()

    def states(contestant: Contestant) -> list[Tensor] | None:
        found = []
        for grid in ("log-SNR", "uniform"):
            if grid not in (contestant.grids or RACED):
                continue
            race: Race = "endpoint" if contestant.deterministic else "law"
            problem = ring if contestant.deterministic else gaussian
            try:
                runner, made = fitted(contestant, problem, Cell("", race, "", "", grid, nfe))
                if contestant.deterministic:
                    x = runner.run(problem.denoiser, problem.x[:64], made, _no_draws)[0]
                else:
                    impulses = Impulses()
                    x = runner.run(problem.denoiser, impulses.start((64,), 4 * nfe, 1.0), made, impulses)[0]
                    if (law := impulses.law(x)) is None:
                        return None
                    x = torch.stack(law)
            except (ValueError, ArithmeticError, TypeError, RuntimeError, IndexError):
                return None
            found.append(x)
        return found

    def distance(a: list[Tensor], b: list[Tensor]) -> float:
        if len(a) < len(b):
            b = b[: len(a)]
        return max(float((x - y).abs().max() / x.abs().max().clamp(min=1)) for x, y in zip(a, b, strict=True))

    here = [(c, s) for c in field if c.package == HERE and (s := states(c))]
    found = []
    for peer in (c for c in field if c.package != HERE):
        if (theirs := states(peer)) and all(bool(x.isfinite().all()) for x in theirs):
            rivals = [(distance(theirs, s), c.name) for c, s in here if c.deterministic == peer.deterministic]
            difference, solver = min(rivals, default=(math.inf, ""))
            found.append(Agreement(f"{peer.name}", solver, difference))
        else:
            found.append(Agreement(f"{peer.name}", "", math.nan))
    return found


def _no_draws(row: int, x: Tensor) -> Tensor:
    """For samplers that draw what they do not use."""
    return torch.zeros_like(x)


# --- tables and plots ------------------------------------------------------------------------------------------------

Scores = dict[Cell, Score]


def best(scores: Scores, nfe: int, here: bool) -> tuple[Cell, Score] | None:
    """The best cell with that budget, of scoresde or of the peers."""
    rivals = [
        (c, s) for c, s in scores.items() if c.nfe == nfe and (c.package == HERE) == here and math.isfinite(s.value)
    ]
    return min(rivals, key=lambda pair: pair[1].value, default=None)


def again(problem: Problem, cell: Cell, contestant: Contestant) -> str:
    """A winner of the law race on draws that did not choose it: mean and standard error."""
    values = [measure(contestant, problem, cell, 100 + 2 * i).value for i in range(problem.repeats)]
    return f"{number(statistics.mean(values))} +- {number(statistics.stdev(values) / math.sqrt(len(values)))}"


def table_of_bests(
    scores: Scores, budgets: Sequence[int], with_peers: bool, again: Callable[[Cell], str] | None = None
) -> list[str]:
    """The best here and of the peers at every budget; `again` says what a winner makes of fresh draws."""
    head = ["NFE", "best here", "", "on grid"]
    head += ["best of the peers", "", "on grid", "peers / here"] if with_peers else []
    head += ["again, here", *(["again, peers"] if with_peers else [])] if again else []
    rows = []
    for nfe in budgets:
        row, pair = [str(nfe)], [best(scores, nfe, here) for here in ((True, False) if with_peers else (True,))]
        for found in pair:
            if found is None:
                row += ["-", "", ""]
            else:
                cell, score = found
                row += [f"**{number(score.value)}**", cell.solver, cell.grid]
        if with_peers:
            row.append(f"{pair[1][1].value / pair[0][1].value:.2f}" if pair[0] and pair[1] else "-")
        row += [again(found[0]) if found else "-" for found in pair] if again else []
        rows.append(row)
    return table(head, rows)


def table_of_all(scores: Scores, budgets: Sequence[int], spacings: dict[tuple[str, str], str | None]) -> list[str]:
    """Each solver's best grid by name, and after the stroke what its customary grid gives."""
    by_solver: dict[tuple[str, str], dict[int, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for cell, score in scores.items():
        by_solver[cell.package, cell.solver][cell.nfe][cell.grid] = score.value

    def shown(key: tuple[str, str], values: dict[str, float]) -> str:
        grid, value = min(values.items(), key=lambda pair: pair[1])
        usual = values.get(spacings.get(key) or "", math.inf)
        return f"{number(value)} {grid} / {number(usual)}" if math.isfinite(value) else "-"

    rows = ([key[1], *(shown(key, found[nfe]) for nfe in budgets)] for key, found in by_solver.items())
    return table(["solver", *(f"NFE {nfe}" for nfe in budgets)], rows)


def failures(scores: Scores) -> list[str]:
    """Solvers with cells that could not be run or were not finite, with the first reason."""
    notes: dict[str, list[str]] = defaultdict(list)
    for cell, score in scores.items():
        if not math.isfinite(score.value):
            notes[cell.solver].append(score.note or "not finite")
    return [f"- {solver}: {len(found)} cells, the first: {found[0]}" for solver, found in notes.items()]


def table_of_agreements(found: Sequence[Agreement]) -> list[str]:
    rows = []
    for peer, solver, difference in found:
        remark = next((text for pattern, text in PEER_REMARKS.items() if fnmatch(peer, pattern)), "")
        verdict = "agrees" if difference < 1e-9 else "agrees in float32" if difference < 2e-6 else f"differs. {remark}"
        if math.isnan(difference):
            verdict = f"not finite. {remark}"
        rows.append([peer, solver, number(difference), verdict])
    return table(["peer", "nearest here", "largest difference", ""], rows)


INK = {"here": "#0072B2", "peers": "#D55E00"}  # Okabe and Ito: apart for every kind of colour vision


def plot(path: Path, title: str, label: str, scores: Scores, budgets: Sequence[int], floor: float) -> bool:
    """Error against evaluations: every solver's best grid thin, the best of each side thick. False where there is no
    matplotlib.
    """
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.2, 5.0))
    lines: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for cell, score in scores.items():
        line = lines[cell.package, cell.solver]
        line[cell.nfe] = min(line.get(cell.nfe, math.inf), score.value)
    for (package, _), line in lines.items():
        values = [line.get(nfe, math.inf) for nfe in budgets]
        shown = [v if math.isfinite(v) else math.nan for v in values]
        axis.plot(budgets, shown, color=INK["here" if package == HERE else "peers"], linewidth=0.6, alpha=0.25)
    for side, name, style, marker in (("peers", "best of the peers", "--", "s"), ("here", "best here", "-", "o")):
        found = [(nfe, pair[1].value) for nfe in budgets if (pair := best(scores, nfe, side == "here"))]
        if found:
            axis.plot(*zip(*found, strict=True), style, marker=marker, color=INK[side], linewidth=2.2, label=name)
    if floor > 0:
        axis.axhline(floor, color="0.4", linestyle=":", linewidth=1.2, label="noise floor")
    tops = [v for line in lines.values() for v in line.values() if math.isfinite(v)]
    lows = [
        v for nfe in budgets for here in (True, False) if (pair := best(scores, nfe, here)) for v in [pair[1].value]
    ]
    if tops and lows:
        axis.set_ylim(max(min([*lows, floor or math.inf]), 1e-16) / 2, min(max(tops), 300 * max(lows)) * 1.5)
    axis.set(xscale="log", yscale="log", xlabel="evaluations of the denoiser (NFE)", ylabel=textwrap.fill(label, 48))
    axis.set_xticks(budgets, [str(nfe) for nfe in budgets])
    axis.minorticks_off()
    axis.set_title(title, fontsize=10, loc="left")
    axis.grid(color="0.92", linewidth=0.8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def report(work: Work, names: Sequence[str], scores: Scores, found: Sequence[Agreement]) -> str:
    """Write the tables, the plots and the JSON; return the page."""
    args, out = work.args, work.args.out
    field = entered(args.solvers, args.peers)
    runners = {(c.package, c.name): c for c in field}
    spacings = {key: c.spacing for key, c in runners.items()}
    env = environment(args.device, torch.float64 if names[0] in EXACT else torch.float32)
    versions = {name: installed(name) for name in PACKAGES if args.peers and installed(name)}
    page = ["# Error against evaluations", "", f"`python {env['command']}`", ""]
    page += ["Numbers are for the best of the grids " + ", ".join(args.grids) + ", named beside them."]
    page += [f"{sum(c.package == HERE for c in field)} solvers here, {sum(c.package != HERE for c in field)} of peers"]
    page[-1] += f" ({', '.join(f'{k} {v}' for k, v in versions.items())})." if versions else "."
    record: dict[str, Any] = {"environment": env, "peers": versions, "nfe": args.nfe, "problems": {}}
    details: list[str] = []
    for name in names:
        problem = work.problem(name)
        page += ["", f"## {problem.title}"]
        for kind in ("endpoint", "law"):
            part = {cell: score for cell, score in scores.items() if cell[:2] == (name, kind)}
            if not part:
                continue
            if kind == "endpoint":
                floor = problem.endpoint()[1]
                label = f"rms |x - x*| / sqrt(d) at t = {problem.end:g}"
                text = f"Deterministic solvers, {label}, one x_T for all. The reference's own error is {number(floor)}."
            else:
                floor, label = problem.law_floor(), str(problem.law)
                kinds = "All solvers" if name not in EXACT else "Solvers that draw noise"
                text = f"{kinds}, to t = 0: {label}. Exact samples score {number(floor)}."
            repeat = None
            if kind == "law" and problem.repeats:
                text += f" Again: the two winners on {problem.repeats} other draws, mean and its standard error."

                def repeat(cell: Cell, problem: Problem = problem) -> str:
                    return again(problem, cell, runners[cell.package, cell.solver])

            page += ["", text, ""]
            page += table_of_bests(part, args.nfe, bool(versions), repeat)
            picture = f"{name}-{kind}.png"
            if plot(out / picture, problem.title, label, part, args.nfe, floor):
                page += ["", f"![{name} {kind}]({picture})"]
            details += ["", f"### {problem.title}: {label}", "", *table_of_all(part, args.nfe, spacings)]
            if bad := failures(part):
                details += ["", "Not run, or not finite:", "", *bad]
            record["problems"].setdefault(name, {"title": problem.title})[kind] = {
                "measure": label,
                "floor": floor,
                "scores": _nested(part),
            }
    if found:
        page += [
            "",
            "## Agreement",
            "",
            "End states after 10 evaluations on the log-SNR and uniform grids: on the ring, or",
        ]
        page[-1] += " for solvers that draw noise, their exact law on the Gaussian."
        page += ["", *table_of_agreements(found)]
        record["agreement"] = [a._asdict() for a in found]
        page += ["", "Not in the race: " + "; ".join(f"{k} ({v})" for k, v in NOT_DRIVEN.items()) + "."]
    page += ["", "## Every solver", "", "Best grid, and after the stroke the error on the solver's own grid."]
    text = "\n".join([*page, *details]) + "\n"
    (out / "README.md").write_text(text)
    write_json(out / "results.json", record)
    return "\n".join(page)


def _nested(scores: Scores) -> dict[str, Any]:
    """package -> solver -> grid -> the value at each budget, null where there is none."""
    tree: dict[str, Any] = {}
    for cell, score in scores.items():
        row = tree.setdefault(cell.package, {}).setdefault(cell.solver, {}).setdefault(cell.grid, [])
        row.append(float(f"{score.value:.4g}"))
    return tree


# --- the command -----------------------------------------------------------------------------------------------------


def user_problem(args: argparse.Namespace) -> Problem:
    """The problem that --denoiser, --data and --features make."""
    denoiser, data = load_denoiser(args.denoiser)[0], None
    if args.data is not None:
        data = user_data(args.data)
        if tuple(data.shape[1:]) != tuple(args.shape):
            raise SystemExit(f"--data has samples of shape {tuple(data.shape[1:])}, but --shape is {tuple(args.shape)}")
    features = attribute("--features", args.features)[0] if args.features else RandomFeatures(args.shape)
    return UserProblem(
        denoiser,
        tuple(args.shape),
        data,
        features,
        samples=args.samples,
        batch=args.batch,
        end=args.end,
        device=args.device,
        budget=args.reference_nfe,
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", nargs="+", choices=[*EXACT, "all"], default=["all"], help="exact problems (all)")
    parser.add_argument("--race", nargs="+", choices=["endpoint", "law"], default=["endpoint", "law"], help="(both)")
    parser.add_argument("--peers", action="store_true", help="race the peers that are installed too")
    parser.add_argument("--solvers", nargs="+", default=["*"], help="patterns of names, 'UniPC*' 'azula *' say (all)")
    parser.add_argument("--nfe", type=int, nargs="+", default=NFE, help="budgets of evaluations (5 8 10 15 20 50)")
    parser.add_argument("--grids", nargs="+", choices=[*GRIDS], default=RACED, help=f"spacings ({', '.join(RACED)})")
    parser.add_argument("--denoiser", help="your own instead of --problem: module:attribute")
    parser.add_argument("--shape", type=int, nargs="+", help="of one sample, with --denoiser")
    parser.add_argument("--data", help="samples of the truth: a .npy or .npz file, or module:attribute")
    parser.add_argument("--features", help="features of a batch: module:attribute (two fixed random layers)")
    parser.add_argument("--samples", type=int, default=512, help="samples to compare with --data (512)")
    parser.add_argument("--batch", type=int, default=64, help="samples that the network takes at once (64)")
    parser.add_argument(
        "--end", type=float, help="t of your SDE at which your endpoint race stops (the half log-SNR of VP's 1e-3)"
    )
    parser.add_argument(
        "--reference-nfe", type=int, default=5000, help="evaluations that the exact flow of yours may take (5000)"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=None, help="processes (one a core on the CPU, else 1)")
    parser.add_argument("--out", type=Path, default=Path("runs/step_counts"), help="folder of results")
    parser.add_argument("--fresh", action="store_true", help="forget the cells of earlier runs in --out")
    args = parser.parse_args(argv)
    if args.denoiser and not args.shape:
        parser.error("--denoiser needs --shape, the shape of one sample: --shape 3 32 32")
    if (args.data or args.features) and not args.denoiser:
        parser.error("--data and --features go with --denoiser")
    if args.jobs is None:
        args.jobs = len(os.sched_getaffinity(0)) if args.device == "cpu" and not args.denoiser else 1
    args.nfe = sorted(set(args.nfe))
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "runs" / "cells.jsonl"
    names = ["user"] if args.denoiser else [*EXACT] if "all" in args.problem else list(dict.fromkeys(args.problem))
    work = Work(args)
    _made.clear()
    torch.set_num_threads(1)
    for name in names:
        if name in EXACT or args.data is None:  # with data of yours all race in law
            try:
                work.problem(name).endpoint()  # before the processes start, which find it on disk
            except ArithmeticError as error:
                raise SystemExit(f"{error} If it is, give it more: --reference-nfe") from None
    scores = race(work, names, Store(path, fingerprints(args), args.fresh))
    found = agreements([*ours(), *peers()]) if args.peers and not args.denoiser else []
    print(report(work, names, scores, found))
    print(f"\nwritten into {args.out}: README.md, results.json")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes end too
    main()
