"""Why noise is annealed: two failures of Langevin dynamics at one noise level (Song and Ermon, 2019, section 3.2); and
why there is noise in its steps.

    python examples/langevin.py            twenty seconds on one core; --help

The data is a mixture of two far Gaussians with weights 0.2 and 0.8, in two dimensions, where everything is known.

1. Poor scores at low density. A network that learns the score at a small noise level sees points only where data is:
   there its score is right, and between and beyond the modes, where a chain has to start, it is not.
2. Wrong weights. The score of a mixture hardly depends on the weights where the modes do not overlap. With the exact
   score, chains that start anywhere stay with the nearest mode and find the two about equally likely. From level to
   level, from much noise to little, they share themselves out rightly, at the same number of evaluations: the solver
   `AnnealedLangevin`, by the step rule of their algorithm 1.
3. The noise left out. Without it a step is one of gradient ascent, and the chains end on the modes, all in one point,
   where with it they spread as the data does.

Writes langevin.png, langevin.json and README.md into --out.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn

from scoresde import VESDE, Denoiser, Grid, ScoreDenoiser, sample
from scoresde.exact import GaussianMixture
from scoresde.info import environment
from scoresde.noise import derive_seed
from scoresde.report import table, write_json
from scoresde.solvers import AnnealedLangevin
from scoresde.solvers.langevin import langevin
from scoresde.training import dsm_loss

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SDE = VESDE(sigma_min=0.01, sigma_max=20.0)
DATA = GaussianMixture(means=[[-5.0, -5.0], [5.0, 5.0]], weights=[0.2, 0.8], std=1.0)
SMALL, LARGE, LEVELS = 0.3, 10.0, 10  # noise levels
VARIANCE = 1 + SMALL**2  # of a mode, at the small level
STEP = 0.1  # of Langevin dynamics there
BIAS = 1 / (1 - STEP / (4 * VARIANCE)) - 1  # of the variance that such steps leave, on a Gaussian
HALF = 8.0  # the square [-8, 8]^2
PLACES = ("over_data", "over_square")
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"  # Okabe and Ito's, for any eyes


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/langevin"), help="folder of results (runs/langevin)")
    parser.add_argument("--train-steps", type=int, default=3000, help="training steps of the score (3000)")
    parser.add_argument("--steps", type=int, default=1000, help="evaluations of each chain (1000)")
    parser.add_argument("--chains", type=int, default=2000, help="chains (2000)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)

    start = time.perf_counter()
    exact = DATA.denoiser(SDE)
    learned = train(args.train_steps, args.seed)
    errors = score_errors(learned, exact, args.seed)
    chains = run_chains(exact, args)
    names = ("Langevin", "Langevin, noise left out")
    results = {
        "environment": environment(),
        "seconds": round(time.perf_counter() - start, 1),
        "data": "0.2 N((-5, -5), I) + 0.8 N((5, 5), I)",
        "noise_level": SMALL,
        "score": {"train_steps": args.train_steps, **errors},
        "share_of_the_smaller_mode": {
            "truth": 0.2,
            **{name: share(path[-1]) for name, path in chains.items() if name != names[1]},
        },
        "variance_within_a_mode": {"truth": VARIANCE, **{name: variance(chains[name][-1]) for name in names}},
        "chains": args.chains,
        "evaluations": args.steps,
        "standard_error_of_a_share": round(math.sqrt(0.16 / args.chains), 4),
        "standard_error_of_a_variance": round(VARIANCE / math.sqrt(args.chains), 4),
    }
    write_json(args.out / "langevin.json", results)
    (args.out / "README.md").write_text(report(results))
    draw(learned, exact, chains, results, args.out / "langevin.png", args.seed)
    print(report(results) + f"\nwrote {args.out}/langevin.json, langevin.png and README.md")


def time_of(sigma: float) -> float:
    return float(SDE.time_at(-math.log(sigma)))


def train(steps: int, seed: int) -> Denoiser:
    """A score network at the small noise level, by denoising score matching."""
    generator = torch.Generator().manual_seed(derive_seed(seed, 0))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = nn.Sequential(nn.Linear(2, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 2))
    denoiser = ScoreDenoiser(lambda x, t: layers(x), SDE)
    optimizer = torch.optim.Adam(layers.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    t = torch.tensor(time_of(SMALL), dtype=torch.float64)
    for _ in range(steps):
        loss = dsm_loss(denoiser, DATA.sample(512, generator), t=t, generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return denoiser


@torch.no_grad()
def score_errors(learned: Denoiser, exact: Denoiser, seed: int) -> dict[str, float]:
    """Root mean square of |learned score - exact score|, over the data and over the square that chains start from, and
    standard errors over the points."""
    generator = torch.Generator().manual_seed(derive_seed(seed, 1))
    t = time_of(SMALL)
    x_t = SDE.perturb(DATA.sample(20_000, generator), t, torch.randn(20_000, 2, generator=generator))
    everywhere = HALF * (2 * torch.rand(20_000, 2, generator=generator) - 1)
    found = {}
    for where, x in zip(PLACES, (x_t, everywhere), strict=True):
        score = exact.score(x, t)
        for what, y in (("error", learned.score(x, t) - score), ("score", score)):
            squares = y.square().sum(1).double()
            rms = float(squares.mean().sqrt())
            found[f"rms_{what}_{where}"] = round(rms, 3)
            found[f"stderr_{what}_{where}"] = float(f"{float(squares.std()) / (2 * rms * len(x) ** 0.5):.1g}")
    return found


def run_chains(denoiser: Denoiser, args: argparse.Namespace) -> dict[str, Tensor]:
    """The states from the same uniform start: all (steps + 1, chains, 2) at one level, with noise and without;
    annealed, (levels, chains, 2), the start and those after the second level and each that follows.
    """
    generator = torch.Generator().manual_seed(derive_seed(args.seed, 2))
    start = HALF * (2 * torch.rand(args.chains, 2, generator=generator) - 1)

    # A step in proportion to the variance, as in their algorithm 1: the same share of each level's width.
    levels = torch.logspace(math.log10(LARGE), math.log10(SMALL), LEVELS)
    annealing = AnnealedLangevin(args.steps // LEVELS, 0.2 * SMALL**2, "ncsn")
    grid = Grid(SDE, [time_of(sigma) for sigma in levels.tolist()])
    seed = derive_seed(args.seed, 4)
    annealed = sample(denoiser, start, annealing, grid=grid, seed=seed, trajectory=True).trajectory
    assert annealed is not None
    plain = {"step_size": STEP, "steps": args.steps, "trajectory": True}
    return {
        "Langevin": langevin(denoiser, start, time_of(SMALL), generator=generator, **plain),
        "annealed Langevin": annealed,
        "Langevin, noise left out": langevin(
            denoiser, start, time_of(SMALL), noise=lambda k, x: torch.zeros_like(x), **plain
        ),
    }


def share(x: Tensor) -> float:
    """Of the samples, those of the smaller mode, below the line between the two."""
    return round(float((x.sum(-1) < 0).double().mean()), 4)


def variance(x: Tensor) -> float:
    """Mean square of a coordinate of x (..., 2) less that of the mode on its side of the line."""
    mode = 5.0 * x.sum(-1, keepdim=True).sign()
    return float(f"{float((x - mode).double().square().mean()):.3g}")


def report(results: dict) -> str:
    """The numbers, as Markdown."""
    about, rms, n = results["environment"], results["score"], results["chains"]
    shares, spread = results["share_of_the_smaller_mode"], results["variance_within_a_mode"]
    scores = table(
        ["", "over the data", "over the square [-8, 8]^2"],
        [
            [f"rms of the {name}", *(f"{rms[f'rms_{what}_{at}']} ({rms[f'stderr_{what}_{at}']:.1g})" for at in PLACES)]
            for what, name in (("error", "learned score's error"), ("score", "score itself"))
        ],
    )

    def cell(name: str, found: dict, error: float) -> str:
        if name not in found:
            return ""
        return f"{found[name]:.3g} ({error:.1g})" if found[name] > error else f"{found[name]:.1e}"

    errors = results["standard_error_of_a_share"], results["standard_error_of_a_variance"]
    chains = table(
        ["", "share of the smaller mode", "variance within a mode"],
        [
            ["truth", f"{shares['truth']:.3g}", f"{spread['truth']:.3g}"],
            *(
                [name, cell(name, shares, errors[0]), cell(name, spread, errors[1])]
                for name in dict.fromkeys([*shares, *spread])
                if name != "truth"
            ),
        ],
    )
    return f"""# Langevin dynamics, and why it is annealed

`{about["command"]}`: {about["device"]}, {about["threads"]} thread(s), {about["dtype"]}; torch {about["torch"]};
scoresde {about["scoresde"]}, commit {about["commit"]}; {results["seconds"]:.0f} s.

The data are {results["data"]}, seen at the noise level {SMALL}. A network learns the score there, in
{rms["train_steps"]} steps: it is right where data are, and not elsewhere. Root mean squares, in brackets the standard
error over the points at which one network was looked at:

{chr(10).join(scores)}

{n} chains of {results["evaluations"]} evaluations of the exact score, from a uniform start in the square; annealed, by
`AnnealedLangevin` over {LEVELS} levels from {LARGE:g} on. In brackets the standard error that so many independent
points of the truth would have. Steps of {STEP} at the one level raise the variance by {BIAS:.1%}; without their noise
rounding is all that is left of it.

{chr(10).join(chains)}

![Scores, chains, and chains without noise](langevin.png)
"""


@torch.no_grad()
def draw(learned: Denoiser, exact: Denoiser, chains: dict[str, Tensor], results: dict, path: Path, seed: int) -> None:
    t, shares, rms = time_of(SMALL), results["share_of_the_smaller_mode"], results["score"]
    figure, axes = plt.subplots(3, 4, figsize=(15.5, 12), layout="constrained")
    line = torch.linspace(-HALF, HALF, 161)
    points = torch.cartesian_prod(line, line)
    grid = {"extent": (-HALF, HALF, -HALF, HALF), "origin": "lower"}
    log_density = DATA.log_prob(points, sde=SDE, t=t).reshape(161, 161).T
    generator = torch.Generator().manual_seed(derive_seed(seed, 3))

    def title(axis: plt.Axes, name: str, remark: str) -> None:
        axis.set_title(f"{name}\n{remark}", fontsize=10)

    def contours(axis: plt.Axes, color: str) -> None:
        """Circles that hold 50, 90 and 99 % of each mode."""
        angle = torch.linspace(0, 2 * math.pi, 100)
        for centre in (-5.0, 5.0):
            for inside in (0.5, 0.9, 0.99):
                r = math.sqrt(-2 * math.log(1 - inside) * (1 + SMALL**2))
                axis.plot(centre + r * angle.cos(), centre + r * angle.sin(), color=color, linewidth=0.8)

    log10 = log_density / math.log(10)
    axes[0, 0].imshow(log10.clamp(min=-22).numpy(), cmap="cividis", **grid)
    lines = axes[0, 0].contour(line, line, log10, levels=[-20, -15, -10, -5], colors="white", linewidths=0.7)
    axes[0, 0].clabel(lines, fmt=lambda level: f"$10^{{{level:.0f}}}$", fontsize=9)
    axes[0, 0].scatter(*DATA.sample(500, generator).T, s=3, color="black", linewidths=0)
    title(axes[0, 0], f"data, and density at noise level {SMALL}", "weights 0.2 (lower left) and 0.8 (upper right)")

    coarse = torch.linspace(-HALF + 0.5, HALF - 0.5, 16)
    at = torch.cartesian_prod(coarse, coarse)
    for axis, denoiser, name in ((axes[0, 1], exact, "exact score"), (axes[0, 2], learned, "learned score")):
        score = denoiser.score(at, t)
        size = score.norm(dim=1, keepdim=True)
        arrows = score / size * size.clamp(max=8).sqrt()  # shortened, so that both ends of the range are seen
        contours(axis, "0.7")
        axis.quiver(*at.T, *arrows.T, color=BLUE if denoiser is exact else ORANGE, angles="xy", scale=45, width=0.005)
        title(axis, name, "length of an arrow: root of |score|, up to 8")
    error = (learned.score(points, t) - exact.score(points, t)).norm(dim=1).reshape(161, 161).T
    image = axes[0, 3].imshow(error.clamp(0.05, 10).log10().numpy(), cmap="viridis", vmin=-1.3, vmax=1, **grid)
    bar = figure.colorbar(image, ax=axes[0, 3], label="|learned score - exact score|", shrink=0.75)
    bar.set_ticks([-1, 0, 1], labels=["0.1", "1", "10"])
    contours(axes[0, 3], "white")
    over_data, over_square = rms["rms_error_over_data"], rms["rms_error_over_square"]
    title(
        axes[0, 3],
        "1. error of the learned score",
        f"rms {over_data:.2f} over the data, {over_square:.1f} over the square",
    )

    n, error_of_share = results["chains"], results["standard_error_of_a_share"]
    truth = SDE.perturb(DATA.sample(n, generator), t, torch.randn(n, 2, generator=generator))
    panels = [
        (
            "exact samples",
            f"{n} draws, standard error of a share {error_of_share:.1%}",
            truth,
            "0.35",
        ),
        ("2. Langevin dynamics", "right modes, wrong weights", chains["Langevin"][-1], ORANGE),
        ("annealed Langevin dynamics", "right modes, right weights", chains["annealed Langevin"][-1], GREEN),
    ]
    for axis, (name, remark, x, color) in zip(axes[1], panels, strict=False):
        axis.scatter(*x.T, s=3, color=color, alpha=0.5, linewidths=0)
        for y, part in ((-1.2, share(x)), (1.2, 1 - share(x))):
            axis.text(math.copysign(5, y), y, f"{part:.1%}", ha="center", va="center", fontsize=13, weight="bold")
        title(axis, name, remark)
    axis = axes[1, 3]
    for name, color in (("Langevin", ORANGE), ("annealed Langevin", GREEN)):
        path_of = chains[name]
        below = (path_of.sum(-1) < 0).double().mean(1)
        calls = range(len(path_of))
        if name != "Langevin":
            calls = [results["evaluations"] // LEVELS * i for i in (0, *range(2, LEVELS + 1))]
        marker = None if name == "Langevin" else "o"
        axis.plot(calls, below, color=color, linewidth=1.8, marker=marker, label=f"{name}: {shares[name]:.3f}")
    axis.axhline(0.2, color="0.35", linestyle=":", label="truth: 0.200")
    axis.set(xlabel="score evaluations", ylabel="share of samples in the small mode", ylim=(0, 0.6))
    axis.legend(loc="lower left", frameon=False)
    levels = f"noise {LARGE:.0f} to {SMALL} in {LEVELS} levels, or {SMALL} alone"
    title(axis, "2. with the exact score, from a uniform start", levels)

    spread = results["variance_within_a_mode"]
    both = (("Langevin", "with noise", ORANGE), ("Langevin, noise left out", "noise left out", BLUE))
    for axis, (name, remark, color) in zip(axes[2], both, strict=False):
        for chain in range(12):
            axis.plot(*chains[name][: 1 + results["evaluations"] // 5, chain].T, color=color, linewidth=0.7, alpha=0.8)
        axis.scatter(*chains[name][0, :12].T, s=14, color="black", zorder=3)
        contours(axis, "0.7")
        title(
            axis, f"3. paths of 12 chains, {remark}", f"their first {results['evaluations'] // 5} steps from the dots"
        )
    axis = axes[2, 2]
    contours(axis, "0.7")
    axis.scatter(*chains[both[1][0]][-1].T, s=14, color=BLUE, linewidths=0)
    title(axis, f"{n} chains, noise left out", f"variance within a mode {spread[both[1][0]]:.1g}, truth {VARIANCE:.2f}")
    for axis in (*axes[0], *axes[1, :3], *axes[2, :3]):
        axis.set(xlim=(-HALF, HALF), ylim=(-HALF, HALF), aspect="equal", xticks=[-5, 0, 5], yticks=[-5, 0, 5])
    axis = axes[2, 3]
    for name, remark, color in both:
        mode = 5.0 * chains[name].sum(-1, keepdim=True).sign()
        within = (chains[name] - mode).square().mean((1, 2))
        axis.semilogy(within, color=color, linewidth=1.8, label=f"{remark}: {spread[name]:.2g}")
    axis.axhline(VARIANCE, color="0.35", linestyle=":", label=f"truth: {VARIANCE:.2f}")
    axis.set(xlabel="score evaluations", ylabel="variance within a mode", ylim=(1e-6, 100), xlim=(0, 400))
    axis.legend(loc="center right", frameon=False)
    title(axis, "3. without noise the steps climb to the mode", "mean square of a coordinate's distance to its mode")
    figure.suptitle(
        "Two failures of Langevin dynamics at one small noise level, what annealing mends, and what its noise is for",
        fontsize=14,
    )
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
