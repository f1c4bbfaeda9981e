"""How the default solver and its grid were chosen: `Adams` and rivals on the grids t = u^p of `Grid.power`, over many
exact problems and a trained network.

    python benchmarks/default_grid.py --out benchmarks/results/default_grid

Every solver here sees levels sigma / alpha only, so one SDE stands for all; what differs are the data: Gaussians of
several spectra and units, modes in the plane, modes in 3072 dimensions, which are decided while x is noise, and images
of which a small network was trained. Each candidate, a solver with a power p and one of two last noisy times, is run to
t = 0 and to t = 1e-3, and its error rms |x - x*| / sqrt(d) is divided by that of DPM-Solver++ 2M on its default grid. A
row is the geometric mean over problems, and the worst.

Modes about means in few directions are run in these and one more: what is orthogonal to them is one Gaussian, and a
solver multiplies all of it by one number.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch
from kept import small as number
from problems import IsotropicMixture, fine_flow, rms
from torch import Tensor
from tqdm import tqdm

from scoresde import VPSDE, Denoiser, Grid
from scoresde.auditing.bench import smooth_images
from scoresde.exact import Gaussian
from scoresde.info import environment
from scoresde.report import table, write_json
from scoresde.solvers import Adams, DPMSolverPP, Solver, UniPC
from scoresde.tableau import Tableau
from scoresde.training import load

NFE = [5, 8, 10, 15, 25, 50]
POWERS = [1.0, 1.5, 2.0, 2.5, 3.0, 4.0]
SDE = VPSDE()
NEAR = 1e-3


def _softplus(order: int, view: str) -> UniPC:
    return UniPC(order, view, "exact", variable="softplus", landing="polynomial")  # type: ignore[arg-type]


SOLVERS: dict[str, Solver] = {
    "2M": DPMSolverPP(2),
    "UniPC-3": UniPC(3),
    "UniPC-4 v": UniPC(4, "v"),
    "UniPC-3 flow": UniPC(3, "flow", landing="polynomial"),
    **{f"softplus {view} {order}": _softplus(order, view) for view in ("x0", "flow") for order in (2, 3, 4)},
}


@dataclass
class Case:
    """A denoiser, where the solvers start, and where they should end; the error is divided by sqrt(d)."""

    denoiser: Denoiser
    x: Tensor
    d: int
    exact: Callable[[float], Tensor]

    def error(self, made: Tableau) -> float:
        with torch.no_grad():
            *_, last = made.iterate(self.denoiser, self.x)
        value = rms(last.x - self.exact(float(made.grid.times[-1]))) * math.sqrt(last.x[0].numel() / self.d)
        return min(value, 1e6)


def gaussian(variances: Tensor, unit: float = 1.0) -> Case:
    target = Gaussian(torch.zeros(len(variances)), std=variances.sqrt() * unit)
    x = SDE.prior((64, len(variances)), torch.Generator().manual_seed(0), torch.float64)
    return Case(target.denoiser(SDE), x, len(variances), lambda end: target.flow(x, SDE, SDE.t_max, end))


def modes(name: str, means: Tensor, std: float, samples: int) -> Case:
    means = means.double().reshape(len(means), -1)
    (K, d), generator = means.shape, torch.Generator().manual_seed(0)
    x = SDE.prior((samples, min(K, d)), generator, torch.float64)
    if d > K + 1:
        basis = torch.linalg.qr(means.T).Q
        means = torch.cat([means @ basis, torch.zeros(K, 1, dtype=torch.float64)], 1)
        x = torch.cat([x, torch.full((samples, 1), math.sqrt(d - K), dtype=torch.float64)], 1)
    denoiser = IsotropicMixture(means, std, SDE)
    return Case(denoiser, x, d, cache(lambda end: fine_flow(denoiser, x, SDE.t_max, end, rtol=1e-11, cache=name)[0]))


def circle(count: int) -> Tensor:
    angle = torch.arange(count, dtype=torch.float64) * (2 * math.pi / count)
    return torch.stack([angle.cos(), angle.sin()], 1)


def cases() -> dict[str, Case]:
    axis = torch.linspace(-1, 1, 5, dtype=torch.float64)
    turn = torch.linspace(0.5, 3 * math.pi, 100, dtype=torch.float64)
    f = torch.hypot(torch.fft.fftfreq(32, 1 / 32)[:, None], torch.fft.fftfreq(32, 1 / 32)).clamp(min=1).double()
    wide = torch.logspace(-3, 0, 64, dtype=torch.float64)
    return {
        "Gaussian, 1e-3 to 1": gaussian(wide),
        "the same, 5 times as wide": gaussian(wide, 5.0),
        "the same, a tenth as wide": gaussian(wide, 0.1),
        "Gaussian, 1e-6 to 1": gaussian(torch.logspace(-6, 0, 64, dtype=torch.float64)),
        "Gaussian, the spectrum of photographs": gaussian((0.25 * f**-2 / (f**-2).mean()).flatten()),
        "ring of 8, std 0.1": modes("ring", circle(8), 0.1, 256),
        "ring of 8, std 0.02": modes("fine ring", circle(8), 0.02, 256),
        "grid of 25, std 0.05": modes("grid", torch.cartesian_prod(axis, axis), 0.05, 256),
        "spiral of 100, std 0.03": modes(
            "spiral", torch.stack([turn.cos(), turn.sin()], 1) * (turn / (3 * math.pi))[:, None], 0.03, 128
        ),
        "64 images, std 0.1": modes("images", smooth_images(64, 0, 1.0), 0.1, 32),
        "64 images, std 0.03": modes("finer images", smooth_images(64, 1, 1.0), 0.03, 32),
        "8 smoother images, std 0.3": modes("smoother images", smooth_images(8, 2, 1.5), 0.3, 64),
    }


class Network:
    """A trained network, and its own fine solution."""

    def __init__(self, path: Path, samples: int) -> None:
        self.denoiser = load(path)
        self.sde = self.denoiser.sde
        self.x = self.sde.prior((samples, 1, 28, 28), torch.Generator().manual_seed(0))

    def run(self, solver: Solver, grid: Grid) -> Tensor:
        with torch.no_grad():
            *_, last = solver.iterate(self.denoiser, self.x, grid)
        return last.x

    @cached_property
    def exact(self) -> Tensor:
        return self.run(_softplus(3, "flow"), Grid.power(self.sde, 160, power=2.5, last=0.003))

    def error(self, solver: Solver, grid: Grid) -> float:
        return rms(self.run(solver, grid) - self.exact)


def grids(n: int, end: float) -> dict[str, Grid]:
    """By name: to t = 0 with the last noisy time of the power itself, or near the data."""
    if end:
        return {f"power {p:g}": Grid.power(SDE, n, power=p, end=end) for p in POWERS}
    found = {}
    for p in POWERS:
        for name, tau in (("own", n**-p), ("near", 0.01 / n)):
            found[f"power {p:g}, {name}"] = Grid.power(SDE, n, power=p, last=min(max(tau, 1e-5), 0.9))
    return found


def mean_and_worst(values: Sequence[float]) -> str:
    return f"{math.exp(statistics.fmean(map(math.log, values))):.2f} ({max(values):.1f})"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nfe", type=int, nargs="+", default=NFE, help="budgets of evaluations")
    parser.add_argument("--network", type=Path, default=Path("examples/models/fashion-mnist"), help="of 28 x 28 pixels")
    parser.add_argument("--samples", type=int, default=16, help="of the network, 0 to leave it out")
    parser.add_argument("--out", type=Path, default=Path("runs/default_grid"), help="folder of results")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    env, exact = environment("cpu", torch.float64), cases()
    page = ["# The default solver and its grid", "", f"`python {env['command']}`", ""]
    page += [" ".join((__doc__ or "").split("\n\n")[2].split())]
    record: dict[str, object] = {"environment": env}
    for end in (0.0, NEAR):
        rows: dict[str, list[str]] = {}
        for n in tqdm(args.nfe, desc=f"to t = {end:g}"):
            errors: dict[str, list[float]] = {}
            for name, solver in {"Adams()": Adams(), **SOLVERS}.items():
                made = solver.tableau(solver.grid(SDE, n, end=end))
                errors[f"{name}, default"] = [case.error(made) for case in exact.values()]
            for grid_name, grid in grids(n, end).items():
                for name, solver in SOLVERS.items():
                    made = solver.tableau(grid)
                    errors[f"{name}, {grid_name}"] = [case.error(made) for case in exact.values()]
            usual = errors["2M, default"]
            relative = {k: [e / u for e, u in zip(v, usual, strict=True)] for k, v in errors.items()}
            record[f"to {end:g}, {n}"] = {k: " ".join(f"{e:.3g}" for e in v) for k, v in errors.items()}
            for name in relative:
                rows.setdefault(name, []).append(mean_and_worst(relative[name]))
        shown = {k: v for k, v in rows.items() if not k.endswith("near")}
        page += ["", f"## To t = {end:g}: mean (worst) of {len(exact)} problems", ""]
        page += table(["", *args.nfe], ([k, *v] for k, v in shown.items()))
    if args.samples:
        network = Network(args.network, args.samples)
        names = ["2M", "UniPC-3", "UniPC-4 v", "softplus x0 2", "softplus flow 2", "softplus flow 3", "softplus flow 4"]
        budgets = [n for n in args.nfe if n <= 25]
        rows = {"Adams(), default": []}
        for n in tqdm(budgets, desc="network"):
            rows["Adams(), default"].append(number(network.error(Adams(), Adams().grid(network.sde, n))))
            for name in names:
                for p in POWERS[:4]:
                    grid = Grid.power(network.sde, n, power=p, last=min(max(n**-p, 0.01 / n if n > 10 else 0.0), 0.9))
                    rows.setdefault(f"{name}, power {p:g}", []).append(number(network.error(SOLVERS[name], grid)))
        page += ["", f"## {args.network}: distance to its own fine solution, per pixel, {args.samples} samples", ""]
        page += table(["", *budgets], ([k, *v] for k, v in rows.items()))
        record["network"] = rows
    write_json(args.out / "results.json", record)
    text = "\n".join(page) + "\n"
    (args.out / "README.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
