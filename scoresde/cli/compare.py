"""`scoresde compare`: the race of the solvers at few evaluations, on one's own network."""

from __future__ import annotations

import argparse
import math
import re
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from scoresde.checks import check_count
from scoresde.cli.cells import Cells
from scoresde.cli.common import (
    add_quiet,
    command_parser,
    going_on,
    record,
    say,
    session,
    without_nan,
    write_json,
)
from scoresde.cli.drawing import GRIDS, Recipe, add_draw_arguments, draw_all, recipe, rounded, solver_of
from scoresde.cli.measuring import (
    add_data_arguments,
    add_measure_arguments,
    check_measurable,
    data_config,
    features_of,
    reference_of,
)
from scoresde.cli.models import Model, add_model_arguments, digest, open_model, sha
from scoresde.files import write_whole
from scoresde.metrics import METRICS, evaluate
from scoresde.training import parallel

__all__ = ["add_parser", "run"]

TEXT = """race solvers on a network: the distance of their samples from real data at each number of evaluations

Every finished cell (solver, grid, evaluations) is kept in OUT/cells.jsonl: the same command goes on where it was
killed, and one with more solvers or budgets adds to it. OUT gets README.md (the tables), results.json (all numbers, and
how they came about) and, where matplotlib is installed, a plot."""

EXAMPLES = """
scoresde compare runs/fm --solvers ddim unipc3 dpm++2m heun --nfe 5 10 20 --data fashion-mnist-test --out runs/compare
scoresde compare runs/fm --solvers 'DDIM(0.2)' ddpm --nfe 10 20 50 --n 5000 --grids default quadratic --out runs/noisy
scoresde compare runs/fm --solvers ddpm ddim --variance table.npz --nfe 10 20 --out runs/analytic
scoresde compare --denoiser my_model:load --shape 3 32 32 --data images.npy --solvers ddim unipc3 --out runs/mine
torchrun --nproc-per-node=4 -m scoresde compare runs/fm --solvers ddim unipc3 --number 50000 --out runs/compare
"""


def add_parser(commands: Any) -> None:
    """The arguments of `compare`."""
    parser = command_parser(commands, "compare", TEXT, EXAMPLES)
    add_model_arguments(parser)
    add = parser.add_argument
    add("--solvers", nargs="+", default=["ddim", "dpm++2m", "unipc3", "heun"], metavar="NAME",
        help="names from `scoresde solvers`, or calls, 'DDIM(eta=0.2)' (ddim dpm++2m unipc3 heun)")  # fmt: skip
    add("--nfe", nargs="+", type=int, default=[5, 10, 20], metavar="N", help="budgets of evaluations (5 10 20)")
    add("--grids", nargs="+", default=["default"], choices=GRIDS, metavar="GRID",
        help=f"spacings, {', '.join(GRIDS)} (default: each solver's own)")  # fmt: skip
    add("--n", "--number", type=int, default=500, metavar="N", help="samples of each cell (500)")
    add("--out", type=Path, required=True, metavar="FOLDER", help="of results")
    add("--fresh", action="store_true", help="forget the cells of an earlier run")
    add_data_arguments(parser, "real data, best such as were not trained on (what the run was trained on)")
    add_measure_arguments(parser, ["frechet"])
    add("--limit", type=int, metavar="N", help="the first N of the real data (all)")
    add_draw_arguments(parser.add_argument_group("the samples"))
    add_quiet(parser)
    parser.set_defaults(action=run)


Cell = tuple[str, str, int]
"""(solver as it was named, grid, evaluations allowed)."""

FLOOR: Cell = ("real data", "", 0)


def run(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        TypeError, ValueError, ImportError, OSError, CheckpointError: if an argument or a file is wrong, before the
            first evaluation.
    """
    check_count(n=args.n, **{f"nfe {n}": n for n in args.nfe})
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file: give a folder")
    for name in args.solvers:
        solver_of(name)
    args.nfe = sorted(set(args.nfe))
    with session(args.device) as device:
        model = open_model(args, device)
        own = model.data()
        chosen = data_config(args, own)
        if args.data is None:
            say(args, f"measuring against {chosen.source}, which the network was trained on: --data names other data")
        reference = reference_of(chosen, args.limit)
        if model.about.shape != tuple(reference.shape[1:]):
            raise ValueError(
                f"{chosen.source} has items {tuple(reference.shape[1:])}, the model's are {model.about.shape}"
            )
        features = features_of(args.features, chosen.source, reference, device)
        floor = None if args.floor is None else reference_of(data_config(args, own, args.floor))
        race = Race(args, model, features, reference, floor)
        made_for = race.made_for(chosen.source)
        path = args.out / "cells.jsonl"
        kept = parallel.by_first(lambda: Cells(path, "compare", "cells", made_for, _cell, args.fresh))
        with going_on("finished cells are kept, and the same command goes on"):
            race.run(kept)
        if parallel.rank() == 0:
            print(race.write(kept, device))
            say(args, f"wrote {args.out}/README.md, results.json")


def _cell(found: dict[str, Any]) -> Cell:
    dict(found["scores"])
    return str(found["solver"]), str(found["grid"]), int(found["nfe"])


class Race:
    """What is run, and what is made of it."""

    def __init__(
        self, args: argparse.Namespace, model: Model, features: Any, reference: Tensor, floor: Tensor | None
    ) -> None:
        self.args, self.model, self.features = args, model, features
        self.reference, self.floor = reference, floor
        self.names = list(dict.fromkeys(args.metrics))
        self.cells: list[Cell] = [
            (solver, grid, nfe)
            for solver in dict.fromkeys(args.solvers)
            for grid in dict.fromkeys(args.grids)
            for nfe in args.nfe
        ]
        check_measurable(self.names, samples=args.n, data=len(reference))
        # The rest of the arguments.
        self.told = recipe(args, model, solver="ddim", nfe=1000, steps=None, grid=None).told
        self._real: Tensor | None = None

    def made_for(self, source: str) -> dict[str, Any]:
        """What the cells depend on."""
        args = self.args
        return {
            **self.model.made_for,
            "data": f"{source}, {digest(self.reference)}",
            "floor": "half of the data" if self.floor is None else digest(self.floor),
            "features": _title(self.features),
            "metrics": ", ".join(self.names),
            "samples": f"{args.n} from seed {args.seed}, class {'in turn' if args.label is None else args.label}",
            **({} if self.told is None else {"conditions of": self.told.fingerprint}),
            **_guidance(args),
            "clip": args.clip,
            "variance": "none" if args.variance is None else sha(args.variance.read_bytes()),
            "device": self.model.denoiser.device.type,
            "versions": f"scoresde {version('scoresde')}, torch {torch.__version__}",
        }

    def run(self, kept: Cells) -> None:
        """Do what is not done yet."""
        lead = parallel.rank() == 0
        todo = [cell for cell in self.cells if cell not in kept.done]
        with tqdm(
            desc="compare", total=len(self.cells), initial=len(self.cells) - len(todo), unit="cell",
            disable=self.args.quiet or not lead,
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
        head = {"solver": solver, "grid": grid, "nfe": nfe}
        start = time.perf_counter()
        try:
            made = recipe(self.args, self.model, solver=solver, grid=grid, nfe=nfe, steps=None)
            x = draw_all(made, self.args.n, self.args.batch_size, progress=False)
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
        if self._real is None:
            self._real = self.embedded(self.reference)
        floor = self.embedded(self.floor) if floors and self.floor is not None else None
        return evaluate(self.embedded(x), self._real, self.names, floor=floor, floors=floors)

    def embedded(self, x: Tensor) -> Tensor:
        """Their features, float64, (N, d)."""
        return torch.cat([self.features(part).double().cpu() for part in x.split(512)])

    # ---- what is written ----

    def write(self, kept: Cells, device: torch.device) -> str:
        """README.md, results.json and the plot; returns the tables."""
        args, out = self.args, self.args.out
        rows = [kept.done[cell] for cell in self.cells]
        scored = {name for row in rows for name in row["scores"]}
        metrics = [name for name in METRICS if name in scored]
        real = kept.done.get(FLOOR, {"scores": {}})
        notes = [f"- {r['solver']} on {r['grid']} at {r['nfe']}: {r['note']}" for r in rows if "note" in r]
        page = [f"{self.model.denoiser!r}, {args.n} samples from seed {args.seed}, {self.made_for('')['features']}"]
        for name in metrics:
            page += ["", f"## {name}", "", *self.table(name, rows, real["scores"].get(name))]
        if notes:
            page += ["", "Not run, or not finite:", "", *notes]
        result = {"cells": rows, "real data": real, "made for": kept.made_for, **record(args, device)}
        write_json(out / "results.json", without_nan(result))
        pictures = [f"![{name}]({name}.png)" for name in metrics if self.plot(name, rows, real["scores"].get(name))]
        head = ["# Solvers at few evaluations", "", f"`{result['environment']['command']}`", ""]
        text = "\n".join([*head, *page, "", *pictures]) + "\n"
        write_whole(out / "README.md", lambda file: file.write(text.encode()))
        return "\n".join(page)

    def table(self, name: str, rows: list[dict[str, Any]], real: dict[str, Any] | None) -> list[str]:
        """A line a solver and grid, a column a budget."""
        budgets, many = self.args.nfe, len(set(self.args.grids)) > 1
        lines = ["| solver | " + " | ".join(f"NFE {nfe}" for nfe in budgets) + " |", "|---" * (len(budgets) + 1) + "|"]
        by_cell = {(row["solver"], row["grid"], row["nfe"]): row["scores"].get(name) for row in rows}
        for solver, grid in dict.fromkeys((row["solver"], row["grid"]) for row in rows):
            cells = [_shown(by_cell.get((solver, grid, nfe))) for nfe in budgets]
            lines.append(f"| {solver}{f', {grid}' if many else ''} | " + " | ".join(cells) + " |")
        if real:
            lines.append(f"| real data | {_shown(real)}" + " | " * len(budgets))
        return [line.rstrip() for line in lines]

    def plot(self, name: str, rows: list[dict[str, Any]], real: dict[str, Any] | None) -> bool:
        """The metric against evaluations; False where there is no matplotlib."""
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError:
            return False
        figure = Figure(figsize=(6.4, 4.4))
        FigureCanvasAgg(figure)
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
        axis.set_xticks(self.args.nfe, [str(nfe) for nfe in self.args.nfe])
        axis.minorticks_off()
        axis.grid(color="0.92", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
        figure.tight_layout()
        write_whole(self.args.out / f"{name}.png", lambda file: figure.savefig(file, format="png", dpi=120))
        return True


def _guidance(args: argparse.Namespace) -> dict[str, str]:
    if args.guidance is None:
        return {}
    low, high = args.guidance_interval or (0, math.inf)
    return {"guidance": f"{args.guidance:g} at levels {low:g} to {high:g}"}


def _shown(score: dict[str, Any] | None) -> str:
    if not score or score["value"] is None:
        return "-"
    stderr = score["stderr"]
    return f"{score['value']:.4g}" + (f" +- {stderr:.2g}" if stderr is not None and math.isfinite(stderr) else "")


def _title(features: Any) -> str:
    """What a feature space is called, without an address."""
    return str(getattr(features, "__name__", None) or re.sub(r" at 0x[0-9a-f]+", "", repr(features)))
