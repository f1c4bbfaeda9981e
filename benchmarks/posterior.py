"""Inverse-problem methods against the exact posterior, on data whose posterior is known: a Gaussian and two mixtures,
measured linearly with Gaussian noise (`GaussianMixture.given`).

    python benchmarks/posterior.py
    python benchmarks/posterior.py --problems ring --quick --out runs/posterior

Every method is given the exact denoiser, the same solver and number of steps, and the same few measurements, drawn from
the data and the noise. So what is seen is the method's own error: "exact guidance", the denoiser of the posterior
itself, shows what the solver leaves, and the floor what as many draws of the posterior have against others.

    sliced W2     sliced Wasserstein distance to draws of the posterior, in units of the data
    mean          |mean - exact| / sqrt(tr C), C the posterior's covariance
    covariance    |covariance - exact| / |C|, Frobenius norms
    modes         total variation between the shares of samples and of the posterior's draws that belong to each
                  component of the mixture: 0 to 1
    calls         of the network, and backward passes through it, each for the whole batch
    time          of the processor, over that of the unguided sampler on the same batch; the denoiser here costs next
                  to nothing, so this is mostly the method's own work

Each is a mean over the measurements, errors with their standard error over them. Written into --out: README.md,
results.json, posterior.png, samples.png.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from kept import Score, made_on
from problems import Counted
from torch import Tensor
from tqdm import tqdm

from scoresde import VPSDE, Denoiser, Posterior, sample
from scoresde.exact import GaussianMixture
from scoresde.guidance.operators import LinearOperator, Mask, Matrix
from scoresde.guidance.particles import TwistedSMC
from scoresde.guidance.posterior_sampling import DPS, MomentMatching, PiGDM
from scoresde.guidance.projections import DDNM
from scoresde.guidance.replacement import RePaint, Replacement
from scoresde.info import environment
from scoresde.metrics import sliced_wasserstein
from scoresde.report import table, write_json
from scoresde.solvers import DDPM, Solver
from scoresde.tensors import as_time

NOISE = (0.05, 0.2, 0.5)
STEPS = 100
SDE = VPSDE()
Guided = tuple[Denoiser, Solver]


# --- problems --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """Data and how they are measured.

    Attributes:
        name, title: what a person types, and what the page says.
        means, weights, covariance: of the components, (K, d), (K,), and (d, d), the same for all.
        operator: A, linear, all its singular values the same: what replacement can do too.
    """

    name: str
    title: str
    means: Tensor
    weights: Tensor
    covariance: Tensor
    operator: LinearOperator

    @cached_property
    def target(self) -> GaussianMixture:
        return GaussianMixture(self.means, self.weights, cov=self.covariance)

    @property
    def denoiser(self) -> Denoiser:
        return Shared(self)

    @property
    def data_std(self) -> float:
        """Root mean square standard deviation of the data's coordinates."""
        return float(self.target.moments()[1].diagonal().mean().sqrt())

    def known(self, x: Tensor) -> Tensor:
        """What of a measurement says something: a mask's y is zero elsewhere."""
        y = self.operator(x)
        return y[:, self.operator.mask] if isinstance(self.operator, Mask) else y

    def measurements(self, count: int, noise: float) -> Tensor:
        draws = torch.Generator().manual_seed(0)
        x = self.target.sample(count, draws, torch.float64)
        y = self.operator(x)
        return y + noise * torch.randn(y.shape, generator=draws, dtype=y.dtype)

    def posterior(self, y: Tensor, noise: float) -> GaussianMixture:
        """Given one measurement, shape (1, *measurement)."""
        y = y[:, self.operator.mask] if isinstance(self.operator, Mask) else y
        return self.target.given(self.known, y[0], noise)

    def shares(self, x: Tensor) -> Tensor:
        """The share of x that belongs to each component, (K,)."""
        joint = x @ torch.linalg.solve(self.covariance, self.means.T) + self.offsets
        return torch.bincount(joint.argmax(1), minlength=len(self.means)) / len(x)

    @property
    def offsets(self) -> Tensor:
        """log w_k - m_k^T C^-1 m_k / 2, (K,)."""
        solved = torch.linalg.solve(self.covariance, self.means.T)
        return self.weights.log() - (self.means.T * solved).sum(0) / 2


class Shared(Denoiser):
    """The exact denoiser of components that share their covariance C, by products of matrices: much faster than the
    general one. With S = alpha^2 C + sigma^2 I and G = alpha C S^-1,

        r_k ~ w_k exp(alpha m_k^T S^-1 (x - alpha m_k / 2)),    mu_k = G x + (I - alpha G) m_k
    """

    def __init__(self, problem: Problem) -> None:
        self.means, self.log_weights, self.sde = problem.means, problem.weights.log(), SDE
        self.values, self.basis = torch.linalg.eigh(problem.covariance)

    def posterior(self, x: Tensor, t: Any, /, **cond: Any) -> Posterior:
        t = as_time(t).double()
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        S = alpha**2 * self.values + sigma**2
        G = self.basis * (alpha * self.values / S) @ self.basis.T
        weighed = alpha * (self.basis / S) @ self.basis.T @ self.means.T  # (d, K)
        offsets = self.log_weights - alpha / 2 * (self.means.T * weighed).sum(0)
        r = torch.softmax(x @ weighed + offsets, dim=1)
        own = self.means - alpha * self.means @ G
        shift, mean = x @ G, r @ own
        within = (self.basis**2 * (sigma**2 * self.values / S)).sum(1)
        return Posterior(shift + mean, within + (r @ own**2 - mean**2).clamp(min=0))


def smooth(d: int, length: float, std: float) -> Tensor:
    """Covariance of smooth random curves, (d, d)."""
    t = torch.arange(d, dtype=torch.float64)
    return std**2 * torch.exp(-(((t[:, None] - t) / length) ** 2) / 2) + 1e-4 * torch.eye(d, dtype=torch.float64)


def ring() -> Problem:
    angle = 2 * math.pi * torch.arange(8, dtype=torch.float64) / 8 + 0.2
    means = torch.stack([angle.cos(), angle.sin()], dim=1)
    narrow = 0.12**2 * torch.eye(2, dtype=torch.float64)
    title = "eight modes on a ring, d = 2, unequal weights; the first coordinate is measured"
    weights = torch.tensor([3, 1, 2, 1, 1, 3, 1, 2], dtype=torch.float64) / 14
    return Problem("ring", title, means, weights, narrow, Mask(torch.tensor([True, False])))


def curves() -> Problem:
    known = torch.zeros(16, dtype=torch.bool)
    known[[1, 2, 5, 10, 13]] = True
    title = "Gaussian curves, d = 16; 5 of the 16 points are measured"
    zero, one = torch.zeros(1, 16, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    return Problem("curves", title, zero, one, smooth(16, 2.0, 1.0), Mask(known))


def shapes() -> Problem:
    t = torch.linspace(0, 1, 16, dtype=torch.float64)
    means = [torch.sin(2 * math.pi * t), -torch.sin(2 * math.pi * t), torch.cos(4 * math.pi * t), 0 * t]
    blocks = torch.kron(torch.eye(4, dtype=torch.float64), torch.full((1, 4), 0.25, dtype=torch.float64))
    title = "mixture of four kinds of curves, d = 16; means of 4 neighbours are measured"
    weights = torch.tensor([1, 2, 3, 2], dtype=torch.float64) / 8
    return Problem("shapes", title, torch.stack(means), weights, smooth(16, 1.5, 0.35), Matrix(blocks))


PROBLEMS = {"curves": curves, "ring": ring, "shapes": shapes}


# --- methods ---------------------------------------------------------------------------------------------------------


def moments(p: Problem, D: Denoiser, y: Tensor, noise_std: float, covariance: Any) -> Denoiser:
    return MomentMatching(D, p.operator, y, noise_std, covariance=covariance, iterations=5)


METHODS: dict[str, Callable[[Problem, Denoiser, Tensor, float, argparse.Namespace], Guided]] = {
    "unguided": lambda p, D, y, n, a: (D, DDPM()),
    "replacement": lambda p, D, y, n, a: (D, Replacement(DDPM(), p.operator, y, n)),
    "RePaint": lambda p, D, y, n, a: (D, RePaint(p.operator, y, n, jump=10, resamplings=5)),
    "DDNM": lambda p, D, y, n, a: (DDNM(D, p.operator, y, n, data_std=p.data_std), DDPM()),
    "DPS, published": lambda p, D, y, n, a: (DPS(D, p.operator, y, steps=a.steps), DDPM()),
    "DPS, Gaussian": lambda p, D, y, n, a: (DPS(D, p.operator, y, noise_std=n), DDPM()),
    "PiGDM": lambda p, D, y, n, a: (PiGDM(D, p.operator, y, n, data_std=p.data_std), DDPM()),
    "moments, variance": lambda p, D, y, n, a: (
        MomentMatching(D, p.operator, y, n, covariance="variance", iterations=5),
        DDPM(),
    ),
    "moments, row sum": lambda p, D, y, n, a: (
        MomentMatching(D, p.operator, y, n, covariance="row sum", iterations=5),
        DDPM(),
    ),
    "moments, jacobian": lambda p, D, y, n, a: (MomentMatching(D, p.operator, y, n, iterations=5), DDPM()),
    "SMC": lambda p, D, y, n, a: (
        PiGDM(D, p.operator, y, n, data_std=p.data_std),
        TwistedSMC(particles=a.samples),
    ),
}
"""Method -> function (problem, denoiser, y of each sample, noise_std, the program's arguments)."""

EXACT, FLOOR = "exact guidance", "floor"


# --- measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A method on a problem at one level of noise; see the module. `modes` is None for one component; `stderr` has the
    standard errors of the four."""

    method: str
    noise: float
    sliced_w2: float
    mean: float
    covariance: float
    modes: float | None
    stderr: list[float]
    calls: int
    backward: int
    seconds: float
    ratio: float


def errors(problem: Problem, x: Tensor, posterior: GaussianMixture, reference: Tensor) -> tuple[float, ...]:
    """Sliced W2, mean, covariance and modes of samples of one measurement."""
    mean, C = posterior.moments()
    offset = x.mean(0) - mean
    shares = problem.shares(x) - problem.shares(reference)
    return (
        sliced_wasserstein(x, reference, 64),
        float(offset.norm() / C.trace().sqrt()),
        float((x.T.cov().reshape(C.shape) - C).norm() / C.norm()),
        float(shares.abs().sum() / 2),
    )


def run(
    problem: Problem, noise: float, args: argparse.Namespace, bar: tqdm[Any]
) -> tuple[list[Row], dict[str, Tensor]]:
    """All methods at one level of noise, and the samples of each, (measurements, samples, d)."""
    y = problem.measurements(args.measurements, noise)
    posteriors = [problem.posterior(y[i : i + 1], noise) for i in range(len(y))]
    draws = torch.Generator().manual_seed(1)
    references = [p.sample(8 * args.samples, draws, torch.float64) for p in posteriors]
    found = {FLOOR: (torch.stack([p.sample(args.samples, draws, torch.float64) for p in posteriors]), 0, 0, 0.0)}
    each = y.repeat_interleave(args.samples, dim=0)
    x_T = SDE.prior((len(each), problem.means.shape[1]), torch.Generator().manual_seed(2), torch.float64)

    def solved(denoiser: Denoiser, solver: Solver, x_T: Tensor = x_T) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        return sample(denoiser, x_T, solver, steps=args.steps, generator=generator).x

    start = time.process_time()
    exact = [solved(p.denoiser(SDE), DDPM(), part) for p, part in zip(posteriors, x_T.chunk(len(y)), strict=True)]
    found[EXACT] = (torch.stack(exact), args.steps, 0, time.process_time() - start)
    bar.update()
    for name, method in METHODS.items():
        counted = Counted(problem.denoiser)
        denoiser, solver = method(problem, counted, each, noise, args)
        start = time.process_time()
        x = solved(denoiser, solver)
        seconds = time.process_time() - start
        found[name] = (x.unflatten(0, (len(y), -1)), counted.calls, counted.backward, seconds)
        bar.update()
    rows, unit = [], found["unguided"][3]
    for name, (x, calls, backward, seconds) in found.items():
        each_error = [errors(problem, *of) for of in zip(x, posteriors, references, strict=True)]
        scores = [Score.of(column) for column in zip(*each_error, strict=True)]
        sw, mean, cov, modes = (score.mean for score in scores)
        share, stderr = modes if len(problem.means) > 1 else None, [score.stderr for score in scores]
        rows.append(Row(name, noise, sw, mean, cov, share, stderr, calls, backward, seconds, seconds / unit))
    return rows, {name: x for name, (x, *_) in found.items()}


# --- the page and the pictures ---------------------------------------------------------------------------------------


def figures(value: float | None, stderr: float = math.nan) -> str:
    if value is None:
        return ""
    text = f"{value:.3f}" if value < 9.995 else f"{value:.3g}"
    return text if math.isnan(stderr) else f"{text} ({stderr:.1g})"


HEAD = ["method", "sliced W2", "mean", "covariance", "modes", "calls", "backward", "time"]


def errors_table(rows: Sequence[Row]) -> str:
    shown = []
    for row in rows:
        cost = [row.calls, row.backward, f"{row.ratio:.1f}"] if row.calls else ["", "", ""]
        errors = map(figures, (row.sliced_w2, row.mean, row.covariance, row.modes), row.stderr)
        shown.append([row.method, *errors, *cost])
    head, _, *lines = table(HEAD, shown)
    return "\n".join([head, "|---|" + "---:|" * (len(HEAD) - 1), *lines])


def diverged(results: dict[str, list[Row]]) -> str:
    """Which methods are further from the posterior than samples that know nothing of the measurement."""
    found = []
    for name, rows in results.items():
        unguided = {row.noise: row.sliced_w2 for row in rows if row.method == "unguided"}
        found += [
            f"{row.method} on {name} at noise {row.noise:g} ({figures(row.sliced_w2)} beside "
            f"{figures(unguided[row.noise])}" + (", it diverges)" if row.sliced_w2 > 100 * unguided[row.noise] else ")")
            for row in rows
            if not row.sliced_w2 <= unguided[row.noise]
        ]
    return f"Further from the posterior than unguided samples, by sliced W2: {'; '.join(found) or 'none'}."


def report(results: dict[str, list[Row]], args: argparse.Namespace, about: dict[str, str]) -> str:
    assert __doc__ is not None
    meanings = __doc__.split("\n\n    sliced W2")[1].split("\n\nEach is")[0]
    lines = [
        "# Inverse problems: samples against the exact posterior",
        made_on(about),
        f"Exact denoisers on the VP SDE, DDPM with {args.steps} steps (RePaint: blocks of 10, made five times where "
        f"it replaces anything), {args.measurements} measurements and {args.samples} samples of each; SMC: groups of "
        f"{args.samples} particles, PiGDM the twist; PiGDM and DDNM are told the data's standard deviation. Exact "
        "guidance is the posterior's own denoiser under the same solver, the floor as many exact draws: what is below "
        "either is not told apart from the posterior by this test.",
        "![errors](posterior.png)",
        "![samples](samples.png)",
        diverged(results),
        "What the columns are, each a mean over the measurements, errors with their standard error over them:",
        "    sliced W2" + meanings,
    ]
    for name, rows in results.items():
        lines.append(f"## {name}: {PROBLEMS[name]().title}")
        for noise in args.noise:
            lines += [f"Noise {noise:g}:", errors_table([row for row in rows if row.noise == noise])]
    return "\n\n".join(lines) + "\n"


def styles() -> dict[str, dict[str, Any]]:
    """Colour, marker and line of each method: families share a colour."""
    colours = {
        "unguided": ("0.45", "x", ":"),
        "replacement": ("tab:brown", "s", "--"),
        "RePaint": ("tab:brown", "o", "-"),
        "DDNM": ("tab:olive", "D", "-"),
        "DPS, published": ("tab:red", "s", "--"),
        "DPS, Gaussian": ("tab:red", "o", "-"),
        "PiGDM": ("tab:purple", "o", "-"),
        "moments, variance": ("tab:blue", "s", "--"),
        "moments, row sum": ("tab:blue", "^", ":"),
        "moments, jacobian": ("tab:blue", "o", "-"),
        "SMC": ("tab:green", "o", "-"),
        EXACT: ("black", "+", "-"),
    }
    return {name: dict(zip(("color", "marker", "linestyle"), look, strict=True)) for name, look in colours.items()}


def draw_errors(results: dict[str, list[Row]], args: argparse.Namespace, path: Path) -> None:
    import matplotlib.pyplot as plt

    style, n = styles(), len(results)
    figure, axes = plt.subplots(2, n, figsize=(1.8 + 3.9 * n, 7), squeeze=False, layout="constrained")
    middle = args.noise[len(args.noise) // 2]
    for (name, rows), above, below in zip(results.items(), *axes, strict=True):
        floor = {row.noise: row.sliced_w2 for row in rows if row.method == FLOOR}
        for method, look in style.items():
            line = [(row.noise, row.sliced_w2) for row in rows if row.method == method]
            if not line:
                continue
            above.plot(*zip(*line, strict=True), label=method, markersize=5, linewidth=1.4, **look)
            row = next(row for row in rows if row.method == method and row.noise == middle)
            point = {"color": look["color"], "marker": look["marker"], "linestyle": "none", "markersize": 8}
            below.plot(row.calls + row.backward, row.sliced_w2, **point)
        above.fill_between(list(floor), list(floor.values()), 1e-9, color="0.9", label="below the floor")
        below.axhspan(1e-9, floor[middle], color="0.9")
        values = [row.sliced_w2 for row in rows]
        unguided = max(row.sliced_w2 for row in rows if row.method == "unguided")
        for axis in (above, below):
            axis.set(xscale="log", yscale="log", ylim=(0.7 * min(values), 2.5 * unguided))
            axis.grid(alpha=0.3, which="both", linewidth=0.5)
        above.set_title(name)
        above.set_xlabel("noise of the measurement")
        above.set_xticks(args.noise, [f"{noise:g}" for noise in args.noise], minor=False)
        above.set_xticks([], minor=True)
        below.set_xlabel(f"network calls + backward passes (noise {middle:g})")
        costs = sorted({row.calls + row.backward for row in rows if row.calls})
        ticks = [c for i, c in enumerate(costs) if i == 0 or c > 1.2 * costs[i - 1]]
        below.set_xlim(0.8 * costs[0], 1.25 * costs[-1])
        below.set_xticks(ticks, [str(tick) for tick in ticks])
        below.set_xticks([], minor=True)
    for axis in axes[:, 0]:
        axis.set_ylabel("sliced W2 to the posterior")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_samples(
    problem: Problem, rows: Sequence[Row], samples: dict[str, Tensor], noise: float, y: Tensor, path: Path
) -> None:
    """Each method's samples of one measurement beside those of the posterior, on the ring."""
    import matplotlib.pyplot as plt

    names = [FLOOR, EXACT, *METHODS]
    columns = 5
    lines = -(-len(names) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(2.5 * columns, 2.75 * lines), layout="constrained")
    prior = problem.target.sample(2000, torch.Generator().manual_seed(4))
    for axis, name in zip(axes.flat, names, strict=False):
        axis.axvspan(float(y) - 2 * noise, float(y) + 2 * noise, color="tab:orange", alpha=0.15, linewidth=0)
        axis.axvline(float(y), color="tab:orange", linewidth=0.8)
        axis.scatter(*prior.T, s=2, color="0.85", linewidth=0)
        colour = "black" if name in (FLOOR, EXACT) else styles()[name]["color"]
        axis.scatter(*samples[name].T, s=6, color=colour, alpha=0.6, linewidth=0)
        row = next(row for row in rows if row.method == name and row.noise == noise)
        title = "posterior" if name == FLOOR else name
        axis.set_title(f"{title}\nsliced W2 {row.sliced_w2:.3f}, modes {row.modes:.2f}", fontsize=9)
        axis.set(xlim=(-1.6, 1.6), ylim=(-1.6, 1.6), aspect="equal", xticks=[], yticks=[])
    for axis in list(axes.flat)[len(names) :]:
        axis.axis("off")
    figure.suptitle(
        f"Samples given the first coordinate (orange, two standard deviations, noise {noise:g}); grey: data"
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/posterior"), help="folder of results")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS), help="(all)")
    parser.add_argument("--noise", type=float, nargs="+", default=list(NOISE), help="levels, in units of the data")
    parser.add_argument("--measurements", type=int, default=8, help="measurements of each problem (8)")
    parser.add_argument("--samples", type=int, default=500, help="samples of each measurement (500)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"steps of DDPM ({STEPS})")
    parser.add_argument("--quick", action="store_true", help="2 measurements, 100 samples, 20 steps, to try it out")
    args = parser.parse_args(argv)
    if args.quick:
        args.measurements, args.samples, args.steps = 2, 100, 20
    if any(not 0 < noise < math.inf for noise in args.noise):
        parser.error("--noise: expected numbers > 0")
    if min(args.measurements, args.samples - 1, args.steps) < 1:
        parser.error("--measurements, --samples, --steps: expected at least 1, 2 and 1")

    results: dict[str, list[Row]] = {}
    kept: dict[float, dict[str, Tensor]] = {}
    with tqdm(total=len(args.problems) * len(args.noise) * (len(METHODS) + 1), unit="run") as bar:
        for name in args.problems:
            bar.set_description(name)
            results[name] = []
            for noise in args.noise:
                rows, samples = run(PROBLEMS[name](), noise, args, bar)
                results[name] += rows
                if name == "ring":
                    kept[noise] = {method: x[0] for method, x in samples.items()}
    info = environment("cpu")
    record = {"environment": info, "steps": args.steps, "measurements": args.measurements, "samples": args.samples}
    rows_of = {name: [asdict(row) for row in rows] for name, rows in results.items()}
    write_json(args.out / "results.json", record | {"problems": rows_of})
    page = report(results, args, info)
    (args.out / "README.md").write_text(page)
    draw_errors(results, args, args.out / "posterior.png")
    if kept:
        noise = args.noise[len(args.noise) // 2]
        problem = PROBLEMS["ring"]()
        y = problem.measurements(args.measurements, noise)[0, 0]
        draw_samples(problem, results["ring"], kept[noise], noise, y, args.out / "samples.png")
    print(page)


if __name__ == "__main__":
    main()
