"""Tables in few rounds: how many calls of the network `Parallel` makes of N, and how far it ends from the loop.

    python benchmarks/parallel.py              seven minutes on one core

Every solver with a table, as many steps as fit N = 100 evaluations, on the four exact problems of
benchmarks/problems.py and, for six solvers, on the committed Fashion-MNIST network (benchmarks/results/networks/VP).
Each cell compares `Parallel(solver)` at its defaults with the solver itself from the same x_T and the same noise:

    rounds / N          calls of the network, one after the other, in units of the loop's
    evaluations / N     all of them, each on the whole batch
    difference          root mean square over a sample's entries, of the worst sample, in units of all samples' own

Two more tables say what the Jacobian's parts, the window and the tolerance are worth, and what a network in half
precision makes of it. Rounds are those of the slowest
sample of the batch. No time is measured: on a CPU a batch of 50 rows takes 50 times as long as one, and all evaluations
are work; fewer rounds are less time where a large batch takes hardly longer than a small one.
Written into --out: README.md, results.json, rounds.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import matplotlib
import torch
from problems import EXACT
from torch import Tensor
from tqdm import tqdm

from scoresde import Denoiser, EpsDenoiser, sample
from scoresde.info import environment
from scoresde.report import table, write_json
from scoresde.solvers import Entry, Parallel, available
from scoresde.solvers import parallel as module
from scoresde.training import load

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NETWORK = Path(__file__).parent / "results/networks/VP"
ON_NETWORK = ("ddim", "unipc3", "heun", "ddpm", "dpm++2m-sde", "edm-stochastic")
SPREAD = ("ddim", "unipc3", "rk4", "ddpm", "dpm++2m-sde", "edm-stochastic", "pc-ald")
SAMPLES = {"images": 2, "network": 2}
TARGETS = {True: 0.15, False: 0.25}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # options, and constants of the module
    "as it is": ({}, {}),
    "no updates": ({}, {"UPDATES": 0}),
    "1 update": ({}, {"UPDATES": 1}),
    "4 updates": ({}, {"UPDATES": 4}),
    "Picard: no updates, no slope": ({}, {"UPDATES": 0, "SLOPE": 0.0}),
    "updates, no slope": ({}, {"SLOPE": 0.0}),
    "window=25": ({"window": 25}, {}),
    "window=100": ({"window": 100}, {}),
    "tol=1e-2": ({"tol": 1e-2}, {}),
    "tol=1e-4": ({"tol": 1e-4}, {}),
    "tol=0": ({"tol": 0.0}, {}),
}


@dataclass(frozen=True)
class Model:
    """A denoiser and where its samples start."""

    name: str
    title: str
    denoiser: Denoiser
    x: Tensor


def models(only: Sequence[str]) -> Iterator[Model]:
    for name in only:
        n = SAMPLES.get(name, 8)
        if name == "network":
            denoiser = load(NETWORK)
            x = denoiser.sde.prior((n, 1, 28, 28), torch.Generator().manual_seed(0), torch.float32)
            yield Model(name, "network: U-Net on Fashion-MNIST, float32", denoiser, x)
        else:
            problem = EXACT[name]()
            yield Model(name, f"{name}: {problem.title}", problem.denoiser, problem.x[:n])


def cell(model: Model, entry: Entry, N: int, **options: Any) -> dict[str, Any]:
    """One comparison."""
    steps = entry.solver.steps_within(model.denoiser.sde, N)
    solvers = entry.solver, Parallel(entry.solver, **options)
    loop, few = (sample(model.denoiser, model.x, solver, steps=steps, seed=1) for solver in solvers)
    off = (few.x - loop.x).flatten(1).double().square().mean(1).max().sqrt() / loop.x.double().square().mean().sqrt()
    assert few.rounds is not None
    return {
        "model": model.name,
        "solver": entry.name,
        "deterministic": entry.deterministic,
        "N": loop.nfe,
        "rounds": few.rounds,
        "evaluations": few.nfe,
        "difference": float(f"{off:.3g}"),
    }


def entries(names: Sequence[str] | None = None) -> list[Entry]:
    """The solvers with a table, all or those of these names."""
    every = [entry for entry in available() if entry.solver.has_table and not entry.adaptive]
    return [entry for entry in every if names is None or entry.name in names]


def variants(model: Model, N: int) -> list[dict[str, Any]]:
    cells = []
    for variant, (options, constants) in tqdm(VARIANTS.items(), desc="variants", leave=False):
        with mock.patch.multiple(module, **{"UPDATES": module.UPDATES, **constants}):
            cells += [{"variant": variant, **cell(model, entry, N, **options)} for entry in entries(SPREAD)]
    return cells


def precisions(model: Model, N: int) -> list[dict[str, Any]]:
    """The same denoiser as an eps network that sees and answers numbers of fewer digits."""
    cells = []
    for dtype, tol in tqdm([*product((torch.float32, torch.float16, torch.bfloat16), (1e-3, 4e-3))], leave=False):
        net = partial(_rounded, model.denoiser, dtype)
        rounded = replace(model, denoiser=EpsDenoiser(net, model.denoiser.sde), x=model.x.float())
        variant = f"{str(dtype).removeprefix('torch.')}, tol={tol:g}"
        cells += [{"variant": variant, **cell(rounded, entry, N, tol=tol)} for entry in entries(SPREAD)]
    return cells


def _rounded(denoiser: Denoiser, dtype: torch.dtype, x: Tensor, t: Tensor) -> Tensor:
    return denoiser.eps(x.to(dtype).to(x.dtype), t).to(dtype).to(x.dtype)


def summary(cells: Sequence[dict[str, Any]]) -> list[str]:
    """Of some cells: rounds / N, evaluations / N and differences, medians and the largest."""
    columns = ([c["rounds"] / c["N"] for c in cells], [c["evaluations"] / c["N"] for c in cells])
    numbers = [f"{of(column):.3g}" for column in columns for of in (statistics.median, max)]
    off = [c["difference"] for c in cells]
    return [*numbers, f"{statistics.median(off):.1e}", f"{max(off):.1e}"]


HEAD = ("rounds / N", "largest", "evaluations / N", "largest", "difference", "largest")


def page(found: dict[str, Any]) -> list[str]:
    lines = [
        "# In few rounds",
        "",
        f"`python {found['command']}`: {found['seconds']:.0f} seconds; N = {found['N']}, `Parallel(solver)` at its "
        f"defaults (a window of {module.WINDOW} rows, tol = 1e-3) against the solver itself.",
        f"torch {found['environment']['torch']}, {found['environment']['device']}; commit "
        f"{found['environment']['commit']}.",
        "",
        "Rounds are calls of the network, one after the other; N is the evaluations of the loop, which makes one call "
        "for each. All evaluations are counted. The difference is between the two results, root mean square over a "
        "sample, of the worst sample, in units of the samples' own. No time is measured, and none is claimed.",
        "",
        "## Summary: medians, and the largest, over the solvers",
        "",
    ]
    rows = []
    for name, title in found["models"].items():
        for deterministic, kind in ((True, "deterministic"), (False, "stochastic")):
            of = [c for c in found["cells"] if c["model"] == name and c["deterministic"] == deterministic]
            if of:
                rows.append([title, f"{len(of)} {kind}", TARGETS[deterministic], *summary(of)])
    lines += table(("problem", "solvers", "goal", *HEAD), rows)
    lines += ["", "![rounds by solver](rounds.png)", ""]
    if found["variants"]:
        lines += [
            "## What its parts are worth",
            "",
            f"On the ring, over {', '.join(SPREAD)}. The slope is that of Gaussian data of the SDE's scale, updates "
            "are Broyden's.",
            "",
        ]
        rows = [[name, *summary([c for c in found["variants"] if c["variant"] == name])] for name in VARIANTS]
        lines += [*table(("variant", *HEAD), rows), ""]
    if found["precisions"]:
        lines += [
            "## Networks of fewer digits",
            "",
            "On the Gaussian, over the same solvers, with a network that sees and answers rounded numbers: a tolerance "
            "below its rounding costs rounds.",
            "",
        ]
        names = dict.fromkeys(c["variant"] for c in found["precisions"])
        rows = [[name, *summary([c for c in found["precisions"] if c["variant"] == name])] for name in names]
        lines += [*table(("network", *HEAD), rows), ""]
    lines += ["## Every solver", "", "Rounds / N, and the difference.", ""]
    rows = []
    for entry in entries():
        own = {c["model"]: c for c in found["cells"] if c["solver"] == entry.name}
        of = [own.get(name) for name in found["models"]]
        said = [f"{c['rounds']} / {c['N']}, {c['difference']:.0e}" if c else "" for c in of]
        if any(said):
            rows.append([entry.name, *said])
    return [*lines, *table(("solver", *found["models"]), rows), ""]


def picture(found: dict[str, Any], path: Path) -> None:
    """Rounds / N by solver."""
    shown = [entry for entry in entries() if any(c["solver"] == entry.name for c in found["cells"])]
    shown.sort(key=lambda entry: not entry.deterministic)
    place = {entry.name: i for i, entry in enumerate(shown)}
    figure, axes = plt.subplots(figsize=(7.5, 0.6 + 0.17 * len(shown)), layout="constrained")
    for name, marker in zip(found["models"], "osD^*", strict=False):
        of = [c for c in found["cells"] if c["model"] == name]
        x, y = [c["rounds"] / c["N"] for c in of], [place[c["solver"]] for c in of]
        axes.plot(x, y, marker, label=name, markersize=8 if marker == "*" else 4.5, alpha=0.8)
    split = sum(entry.deterministic for entry in shown)
    for deterministic, low, high in ((True, -0.5, split - 0.5), (False, split - 0.5, len(shown) - 0.5)):
        axes.plot([TARGETS[deterministic]] * 2, [low, high], "k:", linewidth=1)
    axes.axhline(split - 0.5, color="grey", linewidth=0.6)
    axes.set_yticks(range(len(shown)), list(place), fontsize=7)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("rounds / N (dotted: the goals for the medians; below the line, solvers that draw noise)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def measured(names: Sequence[str], solvers: Sequence[str] | None, N: int) -> dict[str, Any]:
    """All of results.json, on these models and of these solvers."""
    start = time.perf_counter()
    found: dict[str, Any] = {"N": N, "models": {}, "cells": [], "variants": [], "precisions": []}
    for model in models(names):
        found["models"][model.name] = model.title
        few = ON_NETWORK if model.name == "network" else None
        for entry in tqdm(entries(few), desc=model.name):
            if solvers is None or entry.name in solvers:
                found["cells"].append(cell(model, entry, N))
        if model.name == "ring":
            found["variants"] = variants(model, N)
        if model.name == "gaussian":
            found["precisions"] = precisions(model, N)
    seconds = round(time.perf_counter() - start, 1)
    return {**found, "seconds": seconds, "command": "benchmarks/parallel.py", "environment": environment()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=100, help="evaluations of the loop, at most")
    parser.add_argument("--models", nargs="+", default=[*EXACT, "network"], choices=[*EXACT, "network"])
    parser.add_argument("--solvers", nargs="+", help="names; all by default")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/parallel", help="folder")
    parser.add_argument("--digits", action="store_true", help="measure networks of fewer digits alone, beside the rest")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    kept = options.out / "results.json"
    if options.digits:
        found = json.loads(kept.read_text())
        found["precisions"] = precisions(next(models(["gaussian"])), found["N"])
    else:
        found = measured(options.models, options.solvers, options.n)
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(kept, found)
    picture(found, options.out / "rounds.png")
    (options.out / "README.md").write_text("\n".join(page(found)))


if __name__ == "__main__":
    main()
