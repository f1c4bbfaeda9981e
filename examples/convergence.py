"""Error against network evaluations for every solver that has a table, with no sampling, in seconds.

    python examples/convergence.py            or            python examples/convergence.py --help

The data is a Gaussian with the spectrum of natural images: 32 x 32 x 3 numbers, power falling as 1 / f^2 of the spatial
frequency f, most of it in luminance. On it the exact denoiser is affine, so `scoresde.analysis` knows the law of every
solver's output: the curves have no noise. All solvers step on the same grid (`Grid.power`), so that what is
compared is the solver (--spacing own gives each its own default). Writes, into --out:

    convergence.png     left the ODE solvers, their error against the exact probability flow from the same x_T;
                        right the SDE solvers, the Wasserstein-2 distance of their law to the exact one
    convergence.json    the numbers, with what they were made on
"""

from __future__ import annotations

import argparse
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor

from scoresde import VPSDE, Grid
from scoresde.analysis import flow_error, gaussian_law, marginal, w2
from scoresde.info import environment
from scoresde.report import write_json
from scoresde.solvers import Entry, Solver, available

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Lines = dict[str, tuple[list[int], list[float]]]
"""Name -> numbers of evaluations, errors."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")  # Okabe and Ito, less yellow
MARKERS = "os^DvPX*<>"
DASHES = ("-", "--", "-.", ":")


def image_spectrum(side: int = 32, std: float = 0.5) -> Tensor:
    """Variances of a side x side x 3 image in the Fourier basis, (3 side^2,): 1 / f^2, f in cycles per image (the mean
    counted as f = 1), luminance and two opponent colours in the proportions 1, 1/16, 1/64 (round numbers), normalised
    to the mean std^2 that images in [-1, 1] have about.
    """
    f = torch.fft.fftfreq(side, d=1 / side, dtype=torch.float64)
    power = 1 / (f[:, None] ** 2 + f**2).clamp(min=1).flatten()
    power = torch.cat([power, power / 16, power / 64])
    return power * (std**2 / power.mean())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path("benchmarks/results/convergence")
    parser.add_argument("--out", type=Path, default=default, help=f"folder of results ({default})")
    budgets = [4, 5, 6, 8, 10, 15, 20, 30, 50, 75, 100, 200, 500, 1000]
    parser.add_argument("--nfe", type=int, nargs="+", default=budgets, help="budgets of evaluations")
    spacings = ["power", "log_snr", "karras", "uniform", "quadratic", "own"]
    parser.add_argument("--spacing", default="power", choices=spacings, help="of the grids; own: as sample(steps=)")
    parser.add_argument("--end", type=float, default=1e-3, help="time of the grids' end (1e-3), for all but own")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)

    sde, variances, start = VPSDE(), image_spectrum(), time.perf_counter()

    def grid(solver: Solver, steps: int) -> Grid:
        if args.spacing == "own":
            return solver.grid(sde, steps)
        made: Grid = getattr(Grid, args.spacing)(sde, steps, end=args.end)
        return made

    rows, left_out = measure(available(), variances, grid, sorted(args.nfe))
    seconds = round(time.perf_counter() - start, 1)
    spacing = "each solver's own" if args.spacing == "own" else f"{args.spacing} from {sde.t_max:g} to {args.end:g}"
    results = {
        "environment": environment(dtype=torch.float64),
        "seconds": seconds,
        "data": "Gaussian of mean 0, 32 x 32 x 3, variances 1 / f^2, luminance and colours 1 : 1/16 : 1/64",
        "variances": {"mean": float(variances.mean()), "min": float(variances.min()), "max": float(variances.max())},
        "sde": repr(sde),
        "grid": spacing,
        "x_T": "the exact marginal at the grid's start",
        "flow_error": "rms over x_T of |x_end - exact flow(x_T)| / sqrt(D)",
        "w2": "Wasserstein-2 distance of the output's law to the exact marginal at the grid's end / sqrt(D)",
        "left_out": left_out,
        "rows": rows,
    }
    write_json(args.out / "convergence.json", results)
    draw(rows, spacing, args.out / "convergence.png")
    print(table(rows))
    print(f"\n{len(rows)} solvers in {seconds} s" + (f"; left out: {', '.join(left_out)}" if left_out else ""))
    print(f"wrote {args.out}/convergence.json and convergence.png")


def measure(
    solvers: Sequence[Entry], variances: Tensor, grid: Callable[[Solver, int], Grid], budgets: Sequence[int]
) -> tuple[list[dict], list[str]]:
    """A row a solver, {"name", ..., "nfe", "error"}, and the names of those that have no table to analyse."""
    rows, left_out, target = [], [], (0.0, variances)
    for entry in solvers:
        solver, points = entry.solver, {}
        try:
            if entry.adaptive:
                raise TypeError
            for budget in budgets:
                steps = bisect_right(
                    range(1, budget + 1), budget, key=lambda n, solver=solver: solver.tableau(grid(solver, n)).nfe
                )
                if steps == 0:
                    continue
                run = solver.tableau(grid(solver, steps))
                if entry.deterministic:
                    points[run.nfe] = flow_error(run, target, x_T="exact")
                else:
                    truth = marginal(target, run.grid.sde, run.grid.times[-1])
                    points[run.nfe] = w2(gaussian_law(run, target, x_T="exact"), truth)
        except TypeError:  # coefficients that depend on the states it meets
            left_out.append(entry.name)
            continue
        if not points:  # too few evaluations for a single step
            left_out.append(entry.name)
            continue
        rows.append(
            {
                "name": entry.name,
                "family": entry.family,
                "order": entry.order,
                "deterministic": entry.deterministic,
                "solver": repr(solver),
                "metric": "flow_error" if entry.deterministic else "w2",
                "nfe": list(points),
                "error": [float(f"{error:.6g}") for error in points.values()],
            }
        )
    return rows, left_out


def table(rows: Sequence[Mapping], budgets: Sequence[int] = (5, 10, 20, 50, 100, 1000)) -> str:
    """The errors as text: within each budget, the one at the largest number of evaluations."""
    lines = [f"{'evaluations, at most':28s}" + "".join(f"{n:>10d}" for n in budgets)]
    for row in rows:
        errors = [[e for n, e in zip(row["nfe"], row["error"], strict=True) if n <= budget] for budget in budgets]
        lines.append(f"{row['name'][:27]:28s}" + "".join(f"{e[-1]:10.1e}" if e else f"{'':10s}" for e in errors))
    return "\n".join(lines)


def draw(rows: Sequence[Mapping], grid: str, path: Path) -> None:
    """The picture: ODE solvers on the left, SDE solvers on the right."""
    panels = [
        (True, "ODE solvers: distance to the exact flow, per $\\sqrt{d}$"),
        (False, "SDE solvers: Wasserstein-2 distance to the exact law, per $\\sqrt{d}$"),
    ]
    families = dict.fromkeys(row["family"] for row in rows)
    colours = dict(zip(families, COLOURS * len(families), strict=False))
    most = max(sum(row["deterministic"] is ode for row in rows) for ode, _ in panels)
    figure, axes = plt.subplots(1, 2, figsize=(14, max(5.6, 0.24 * most)), gridspec_kw={"wspace": 0.4})
    for axis, (ode, title) in zip(axes, panels, strict=True):
        shown = [row for row in rows if row["deterministic"] is ode]
        lines = {row["name"]: (row["nfe"], row["error"]) for row in shown}
        plot_lines(axis, lines, {row["name"]: row["family"] for row in shown}, colours, top=2.0)
        axis.set_title(title, fontsize=11, loc="left", pad=12)
    note = (
        f"Gaussian data with the spectrum of 32 x 32 x 3 natural images (1 / $f^2$, std 0.5), exact denoiser, "
        f"VP SDE, grid: {grid}. Computed from the tables: nothing is sampled."
    )
    axes[0].annotate(note, (0, 0), (0, -42), "axes fraction", "offset points", fontsize=8.5, color="0.35")
    figure.savefig(path, dpi=130, bbox_inches="tight", pad_inches=0.15)
    plt.close(figure)


def plot_lines(
    axis: plt.Axes,
    lines: Lines,
    groups: Mapping[str, str] | None = None,
    colours: Mapping[str, str] | None = None,
    top: float | None = None,
) -> None:
    """Errors against evaluations, log-log, each line labelled at its end in its own colour.

    Args:
        lines: name -> (evaluations, errors); points that are not finite and positive are left out.
        groups: name -> group, by which lines are coloured, with a key; without, each line is its own group.
        colours: group -> colour, to agree between pictures; else as they come.
        top: the largest error shown.
    """
    palette: dict[str, str] = {}
    members: Counter[str] = Counter()
    ends: list[tuple[float, float, str, str]] = []
    for name, (nfe, error) in lines.items():
        points = [(n, e) for n, e in zip(nfe, error, strict=True) if np.isfinite(e) and e > 0]
        if not points:
            continue
        group = groups[name] if groups else name
        colour = palette.setdefault(group, (colours or {}).get(group, COLOURS[len(palette) % len(COLOURS)]))
        k, members[group] = members[group], members[group] + 1
        style = {"marker": MARKERS[k % len(MARKERS)], "linestyle": DASHES[k % len(DASHES)]}
        axis.plot(*zip(*points, strict=True), color=colour, markersize=3.5, linewidth=1.2, alpha=0.9, **style)
        ends.append((*points[-1], name, colour))
    axis.set_xscale("log")
    axis.set_yscale("log")
    if top is not None:
        axis.set_ylim(top=top)
    axis.set_xlabel("network evaluations", fontsize=9)
    ticks = [n for n in (5, 10, 20, 50, 100, 200, 500, 1000) if n <= axis.get_xlim()[1]]
    axis.set_xticks(ticks, [f"{n:,}" for n in ticks])
    axis.minorticks_off()
    axis.tick_params(labelsize=8, length=2.5)
    axis.grid(color="0.92", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    _label(axis, ends)
    for i, (group, colour) in enumerate(reversed(palette.items()) if groups else ()):
        style = {"fontsize": 9, "color": colour, "weight": "bold"}
        axis.annotate(group, (0, 0), (10, 10 + 14 * i), "axes fraction", "offset points", **style)


def _label(axis: plt.Axes, ends: Sequence[tuple[float, float, str, str]], size: float = 8.5) -> None:
    """Names in a column to the right of the axes, in the order of the lines' ends and apart by a line of text."""
    ends = sorted(ends, key=lambda end: end[1])
    figure = axis.figure
    height = axis.get_position().height * figure.get_size_inches()[1] * 72
    gap = min(1.3 * size / height, 1 / max(1, len(ends)))
    low, high = np.log10(axis.get_ylim())
    wanted = [float(np.clip((np.log10(end[1]) - low) / (high - low), 0, 1)) for end in ends]
    for (x, y, name, colour), at in zip(ends, _apart(wanted, gap), strict=True):
        leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 3}
        axis.annotate(
            name,
            (x, y),
            (1.06, at),
            "data",
            "axes fraction",
            fontsize=size,
            color=colour,
            verticalalignment="center",
            annotation_clip=False,
            arrowprops=leader,
        )


def _apart(wanted: Sequence[float], gap: float) -> list[float]:
    """Positions in [0, 1] nearest to the wanted ones, which increase, at least `gap` from one to the next."""
    clusters: list[list[float]] = []  # those that touch share the mean of what each wants for the first
    for i, w in enumerate(wanted):
        clusters.append([w - i * gap])
        while len(clusters) > 1 and np.mean(clusters[-2]) >= np.mean(clusters[-1]):
            clusters[-2:] = [clusters[-2] + clusters[-1]]
    most = 1 - (len(wanted) - 1) * gap
    firsts = [float(np.clip(np.mean(cluster), 0, most)) for cluster in clusters for _ in cluster]
    return [first + i * gap for i, first in enumerate(firsts)]


if __name__ == "__main__":
    main()
