"""`scoresde compare`: the race of the solvers at few evaluations, on one's own network."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from scoresde.checks import check_count
from scoresde.cli.chosen import CHOSEN, read
from scoresde.cli.common import SessionOptions, check_folder, going_on, record
from scoresde.cli.drawing import GRIDS, DrawOptions, Recipe, StepOptions, draw_all, recipe
from scoresde.cli.measuring import Measure, MeasureOptions, check_measurable, measures
from scoresde.cli.models import Model, ModelOptions, digest, sha
from scoresde.cli.options import Options, option, part
from scoresde.files import write_whole
from scoresde.levels import rounded
from scoresde.metrics import METRICS, Embedded, embedded, evaluate
from scoresde.metrics.spaces import title
from scoresde.report import Cells, log_ticks, table, write_json
from scoresde.solvers.catalogue import solver_of
from scoresde.training import parallel

TEXT = """race solvers on a network: the distance of their samples from real data at each number of evaluations

Every finished cell (solver, grid, evaluations) is kept in OUT/cells.jsonl: the same command goes on where it was
killed, and one with more solvers or budgets adds to it. OUT gets README.md (the tables), results.json (all numbers, and
how they came about) and, where matplotlib is installed, a plot."""

EXAMPLES = """
scoresde compare runs/fm --solvers adams ddim dpm++2m heun --nfe 5 10 20 --data fashion-mnist-test --out runs/compare
scoresde compare runs/fm --solvers 'DDIM(0.2)' ddpm --nfe 10 20 50 --n 5000 --grids default quadratic --out runs/noisy
scoresde compare runs/fm --solvers ddpm ddim --variance table.npz --nfe 10 20 --out runs/analytic
scoresde compare --denoiser my_model:load --shape 3 32 32 --data images.npy --solvers adams ddim --out runs/mine
torchrun --nproc-per-node=4 -m scoresde compare runs/fm --solvers adams ddim --number 50000 --out runs/compare
"""


@dataclass(frozen=True, kw_only=True)
class CompareOptions(Options):
    """The arguments of `compare`."""

    model: ModelOptions = part("the model")
    solvers: list[str] = option(
        "names from `scoresde solvers`, calls, 'DDIM(eta=0.2)', files of `scoresde tune`, or 'chosen', the best for "
        "each budget, which is looked for on the way and kept in RUN/tuned (adams dpm++2m ddim heun er-sde3)",
        ["adams", "dpm++2m", "ddim", "heun", "er-sde3"], "NAME", nargs="+")  # fmt: skip
    nfe: list[int] = option("budgets of evaluations (5 10 20)", [5, 10, 20], "N", nargs="+")
    grids: list[str] = option(
        f"spacings, {', '.join(GRIDS)} (default: each solver's own)", ["default"], "GRID", nargs="+", choices=GRIDS
    )
    n: int = option("samples of each cell (500)", 500, "N", flags=("--n", "--number"))
    out: Path = option("of results", metavar="FOLDER", required=True)
    fresh: bool = option("forget the cells of an earlier run")
    measure: MeasureOptions = measures("frechet")
    draw: DrawOptions = part("the samples")
    session: SessionOptions


Cell = tuple[str, str, int]
"""(solver as it was named, grid, evaluations allowed)."""

FLOOR: Cell = ("real data", "", 0)


def run(options: CompareOptions) -> None:
    """Run the command.

    Raises:
        TypeError, ValueError, ImportError, OSError, CheckpointError: if an argument or a file is wrong, before the
            first evaluation.
    """
    out, session = options.out, options.session
    for nfe in options.nfe:
        check_count(n=options.n, nfe=nfe)
    check_folder(out)
    for name in options.solvers:
        if name != CHOSEN and not name.endswith(".json"):
            solver_of(name)
    with session.start() as device:
        model = options.model.open(session, device)
        race = Race(options, model, options.measure.open(model, session, device))
        path, made_for = out / "cells.jsonl", race.made_for()
        kept = parallel.by_first(lambda: Cells(path, "scoresde compare", "cells", made_for, _cell, options.fresh))
        with going_on("finished cells are kept, and the same command goes on"):
            race.run(kept)
        if parallel.rank() == 0:
            tables, pictures = race.write(kept, device)
            print(tables)
            session.say(f"wrote {', '.join([f'{out}/README.md', 'results.json', *pictures])}")
            if not drawing():
                session.say("there is no plot, as matplotlib is not installed: pip install scoresde[plots], and again")


def _cell(found: dict[str, Any]) -> Cell:
    dict(found["scores"])
    return str(found["solver"]), str(found["grid"]), int(found["nfe"])


class Race:
    """What is run, and what is made of it."""

    def __init__(self, options: CompareOptions, model: Model, by: Measure) -> None:
        self.options, self.model, self.by = options, model, by
        self.names, self.budgets = list(dict.fromkeys(options.measure.metrics)), sorted(set(options.nfe))
        self.cells: list[Cell] = [
            (solver, grid, nfe)
            for solver in dict.fromkeys(options.solvers)
            for grid in dict.fromkeys(options.grids)
            for nfe in self.budgets
        ]
        check_measurable(self.names, samples=options.n, data=len(by.reference))
        # Which checks the rest of the options.
        made = recipe(options.draw, StepOptions(solver="ddim", nfe=1000, steps=None, grid="default"), model)
        self.told, self._model_made_for = made.told, made.model.made_for
        files = [name for name in options.solvers if name.endswith(".json")]
        self.files = {name: sha(Path(name).read_bytes()) for name in files if read(Path(name), made.denoiser)}
        self._real: Embedded | None = None

    def made_for(self) -> dict[str, Any]:
        """What the cells depend on."""
        how, by = self.options.draw, self.by
        label = "in turn" if how.label is None else how.label
        return {
            **self._model_made_for,
            "data": f"{by.data.source}, {digest(by.reference)}",
            "floor": "half of the data" if by.floor is None else digest(by.floor),
            "features": title(by.features),
            "metrics": ", ".join(self.names),
            "samples": f"{self.options.n} from seed {how.seed}, class {label}",
            **({} if self.told is None else {"conditions of": self.told.fingerprint}),
            **({} if how.guidance is None else {"guidance": repr(how.guidance)}),
            **({} if how.classifier is None else {"scale of the classifier": how.classifier.gradient_scale}),
            "clip": how.clip,
            "variance": "none" if how.variance is None else sha(how.variance.read_bytes()),
            "device": self.model.denoiser.device.type,
            "versions": f"scoresde {version('scoresde')}, torch {torch.__version__}",
        }

    def run(self, kept: Cells) -> None:
        """Do what is not done yet."""
        lead = parallel.rank() == 0
        todo = [
            cell for cell in self.cells if kept.done.get(cell, {"file": ...}).get("file") != self.files.get(cell[0])
        ]
        with tqdm(
            desc="compare", total=len(self.cells), initial=len(self.cells) - len(todo), unit="cell",
            disable=not self.options.session.progress,
        ) as bar:  # fmt: skip
            for cell in todo:
                bar.set_postfix_str(f"{cell[0]} at {cell[2]}")
                found = self.measure(cell, FLOOR not in kept.done)
                for one in found if lead else []:
                    kept.write(one)
                bar.update()

    def measure(self, cell: Cell, floor: bool) -> list[dict[str, Any]]:
        """The record of a cell, on request after that of real data; none in other processes than the first."""
        solver, grid, nfe = cell
        head: dict[str, Any] = {"solver": solver, "grid": grid, "nfe": nfe}
        if solver in self.files:
            head["file"] = self.files[solver]
        start = time.perf_counter()
        try:
            made = recipe(self.options.draw, StepOptions(solver=solver, nfe=nfe, steps=None, grid=grid), self.model)
            x = draw_all(made, self.options.n, self.options.draw.batch_size, progress=False)
        except (ValueError, TypeError, ArithmeticError) as error:
            if parallel.world() > 1 and isinstance(error, ArithmeticError):
                raise  # the others may not have met it
            return [{**head, "scores": {}, "note": str(error)[:300]}]
        if x is None:
            return []
        seconds = time.perf_counter() - start
        found = self.scores(rounded(x) if self.model.about.pictures else x, floors=5 if floor else 0)
        scores = {name: {"value": score.value, "stderr": score.stderr} for name, score in found.scores.items()}
        records: list[dict[str, Any]] = []
        if floor:
            real = {name: {"value": score.floor, "stderr": score.floor_std} for name, score in found.scores.items()}
            where = {"solver": FLOOR[0], "grid": FLOOR[1], "nfe": FLOOR[2]}
            records.append({**where, "scores": real, "sizes": found.floor_sizes})
        return [*records, {**head, "used": self.used(made), "scores": scores, "seconds": round(seconds, 3)}]

    def used(self, made: Recipe) -> int | None:
        """Evaluations that were made, where they are known beforehand."""
        if "grid" in made.options:
            return made.solver.evaluations(made.options["grid"])
        solver, grid = made.solver.within(made.denoiser.sde, made.options["nfe"])
        return solver.evaluations(grid)

    def scores(self, x: Tensor, floors: int) -> Any:
        """The metrics in the feature space; the real data are embedded once."""
        features, names = self.by.features, self.names
        if self._real is None:
            self._real = embedded(self.by.reference, features, names, name="reference")
        return evaluate(x, self._real, names, features, floor=self.by.floor if floors else None, floors=floors)

    # ---- what is written ----

    def write(self, kept: Cells, device: torch.device) -> tuple[str, list[str]]:
        """README.md, results.json and the plots; returns the tables, and the names of the plots."""
        options, out = self.options, self.options.out
        rows = [kept.done[cell] for cell in self.cells]
        scored = {name for row in rows for name in row["scores"]}
        metrics = [name for name in METRICS if name in scored]
        real = kept.done.get(FLOOR, {"scores": {}})
        notes = [f"- {r['solver']} on {r['grid']} at {r['nfe']}: {r['note']}" for r in rows if "note" in r]
        seed, features = options.draw.seed, title(self.by.features)
        page = [f"{self.model.denoiser!r}, {options.n} samples from seed {seed}, {features}"]
        for name in metrics:
            page += ["", f"## {name}", "", *self.table(name, rows, real["scores"].get(name))]
        if notes:
            page += ["", "Not run, or not finite:", "", *notes]
        result = {"cells": rows, "real data": real, "made for": kept.made_for, **record(options, device)}
        write_json(out / "results.json", result)
        pictures = [f"{name}.png" for name in metrics if self.plot(name, rows, real["scores"].get(name))]
        head = ["# Solvers at few evaluations", "", f"`{result['environment']['command']}`", ""]
        text = "\n".join([*head, *page, "", *(f"![{name[:-4]}]({name})" for name in pictures)]) + "\n"
        write_whole(out / "README.md", lambda file: file.write(text.encode()))
        return "\n".join(page), pictures

    def table(self, name: str, rows: list[dict[str, Any]], real: dict[str, Any] | None) -> list[str]:
        """A line a solver and grid, a column a budget."""
        budgets, many = self.budgets, len(set(self.options.grids)) > 1
        by_cell = {(row["solver"], row["grid"], row["nfe"]): row["scores"].get(name) for row in rows}
        lines = [
            [f"{solver}, {grid}" if many else solver, *(_shown(by_cell.get((solver, grid, nfe))) for nfe in budgets)]
            for solver, grid in dict.fromkeys((row["solver"], row["grid"]) for row in rows)
        ]
        lines += [["real data", _shown(real), *[""] * (len(budgets) - 1)]] if real else []
        return table(["solver", *(f"NFE {nfe}" for nfe in budgets)], lines)

    def plot(self, name: str, rows: list[dict[str, Any]], real: dict[str, Any] | None) -> bool:
        """The metric against evaluations; False where there is no matplotlib, or nothing to draw."""
        if not drawing():
            return False
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 4.4))
        axis = figure.add_subplot()
        for solver, grid in dict.fromkeys((row["solver"], row["grid"]) for row in rows):
            mine = [r for r in rows if (r["solver"], r["grid"]) == (solver, grid) and r["scores"].get(name)]
            points = [(r["nfe"], s["value"], s["stderr"] or 0.0) for r in mine if (s := r["scores"][name])["value"]]
            if points:
                x, y, e = zip(*points, strict=True)
                label = solver if grid == "default" else f"{solver}, {grid}"
                axis.errorbar(x, y, yerr=e, marker="o", capsize=2, linewidth=1.4, label=label)
        if real and real["value"]:
            axis.axhline(real["value"], color="0.4", linestyle=":", linewidth=1.2, label="real data")
        if not axis.get_legend_handles_labels()[0]:
            return False
        positive = all(line > 0 for r in rows if (s := r["scores"].get(name)) for line in [s["value"] or 1.0])
        axis.set(xscale="log", yscale="log" if positive else "linear", xlabel="evaluations of the network", ylabel=name)
        axis.set_xticks(self.budgets, [str(nfe) for nfe in self.budgets])
        axis.minorticks_off()
        if positive:
            ticks = log_ticks(*axis.get_ylim())
            axis.set_yticks(ticks, [f"{tick:.3g}" for tick in ticks])
        axis.grid(color="0.92", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
        figure.tight_layout()
        write_whole(self.options.out / f"{name}.png", lambda file: figure.savefig(file, format="png", dpi=120))
        return True


def drawing() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def _shown(score: dict[str, Any] | None) -> str:
    if not score or score["value"] is None:
        return "-"
    stderr = score["stderr"]
    return f"{score['value']:.4g}" + (f" +- {stderr:.2g}" if stderr is not None and math.isfinite(stderr) else "")
