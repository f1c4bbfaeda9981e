"""Noise-conditional score networks from end to end (Song and Ermon, 2019, and their second paper, 2020): levels of
noise, one loss for all, and annealed Langevin dynamics beside what came after it, on the same networks.

    python examples/ncsn.py            ten minutes on one core, four of them training; --help

Two networks s(x, sigma) learn 1,297 real digits at L levels in geometric sequence (`LevelTimes`) by the loss

    (1 / 2L) sum_i lambda(sigma_i) E |s(x + sigma_i z, sigma_i) + z / sigma_i|^2,    lambda(sigma) = sigma^2: `simple`

Both are U-Nets with conditional instance norm and dilated convolutions, and give -sigma s.

    NCSN      is told the level; 10 levels from 1 to 0.01 in units of a grey scale [0, 1], so from 2 on one of [-1, 1]
    NCSNv2    is not: it divides by sigma (technique 3); from the largest distance between two digits (technique 1),
              with as many levels as technique 2 says (`levels_for`); averaged weights, as here both have (technique 5)

From each, digits are drawn by `AnnealedLangevin`, as its paper does and by the other's step rule, by the reverse SDE
and by the probability-flow ODE: Frechet distance to 500 held-out digits, in the features of the library's classifier.

Writes ncsn.png, results.json and README.md into --out, networks and finished numbers into --model. A run
that is killed goes on: with the training from its last checkpoint, with the samplers after the last that was measured.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from guidance import split
from torch import Tensor

from scoresde import Denoiser, Grid, sample
from scoresde.info import environment
from scoresde.levels import to_levels
from scoresde.metrics import classifier_features, evaluate
from scoresde.noise import derive_seed
from scoresde.pictures import grid as tiled
from scoresde.report import Cells, table, write_json
from scoresde.solvers import DDIM, DDPM, Adams, AnnealedLangevin, Solver
from scoresde.solvers.annealed import Rule, levels_for, step_for
from scoresde.training import LevelTimes, ModelConfig, TrainConfig, Trainer, dsm_loss, simple, uniform_in

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NET = {"channels": 32, "multipliers": [1, 2], "blocks": 1, "norm": "instance", "resample": "dilate", "patch": 2}
SMALLEST = 0.02  # sigma_L
COLORS = {"NCSN": "#D55E00", "NCSNv2": "#0072B2"}  # Okabe and Ito's, for any eyes


@dataclass(frozen=True)
class Paper:
    """What a paper takes: the largest level, L, whether the network is told it, and how it samples.

    Attributes:
        eps: of the step rule, at sigma_L = 0.02.
        denoise: end with the denoiser's mean.
    """

    largest: float
    levels: int
    told: bool
    steps_per_level: int
    eps: float
    rule: Rule
    denoise: bool

    @property
    def model(self) -> ModelConfig:
        sde = {"sigma_min": SMALLEST, "sigma_max": self.largest}
        # The label is 0 to 999, evenly over the levels; the network that is not told has 0 always.
        return ModelConfig(
            sde="ve", sde_options=sde, options=NET, predicts="eps", time_scale=999.0 if self.told else 0.0
        )

    def samplers(self, denoiser: Denoiser, nfe: int) -> dict[str, tuple[Solver, Grid]]:
        """By name, each with its grid; those of no paper with nfe evaluations, and a fifth of them."""
        sde, L, T = denoiser.sde, self.levels, self.steps_per_level
        levels = Grid.log_snr(sde, L)
        own = levels if self.denoise else Grid.log_snr(sde, L - 1, end=sde.t_min)
        other: Rule = "ncsnv2" if self.rule == "ncsn" else "ncsn"
        gamma = (self.largest / SMALLEST) ** (1 / (L - 1))
        found: dict[str, tuple[Solver, Grid]] = {
            f"annealed Langevin, its own: {self.rule}, T = {T}": (AnnealedLangevin(T, self.eps, self.rule), own),
            f"annealed Langevin, {other}, T = {T}": (AnnealedLangevin(T, self.eps, other), own),
            "annealed Langevin, technique 4, T = 5": (AnnealedLangevin(5, step_for(gamma, 5)), levels),
            "annealed Langevin, technique 4, T = 1": (AnnealedLangevin(1, step_for(gamma, 1)), levels),
            "reverse SDE, DDPM's step, at the levels": (DDPM(), levels),
            "reverse SDE, DDPM's step": (DDPM(), Grid.log_snr(sde, nfe)),
            "ODE, DDIM, at the levels": (DDIM(), levels),
            "ODE, DDIM": (DDIM(), Grid.log_snr(sde, nfe)),
            "ODE, Adams": (Adams(), Grid.log_snr(sde, max(1, nfe // 5))),
        }
        if self.denoise and T == 5:  # technique 4 is its own
            del found["annealed Langevin, technique 4, T = 5"]
        return found


def papers(training: Tensor) -> dict[str, Paper]:
    """By name: the first with its settings, the second with its techniques, for these data."""
    x = training.flatten(1)
    largest = math.ceil(10 * float(torch.pdist(x).max())) / 10
    L = levels_for(largest / SMALLEST, x.shape[1])
    r = step_for((largest / SMALLEST) ** (1 / (L - 1)), 5)
    return {
        "NCSN": Paper(2.0, 10, True, 100, 2e-5 * (SMALLEST / 0.01) ** 2, "ncsn", denoise=False),
        "NCSNv2": Paper(largest, L, False, 5, float(f"{2 * (r * SMALLEST) ** 2:.2g}"), "ncsnv2", denoise=True),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ncsn"), help="folder of results (runs/ncsn)")
    parser.add_argument("--model", type=Path, default=Path("runs/ncsn/models"), help="run folder of the networks")
    parser.add_argument("--train-steps", type=int, default=1500, help="training steps of each (1500)")
    parser.add_argument("--samples", type=int, default=500, help="by each sampler (500)")
    parser.add_argument("--nfe", type=int, default=100, help="evaluations of the SDE and the ODE (100)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, training and sampling (0)")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)

    (training, _), (held_out, _) = split()
    made_for = {name: getattr(args, name) for name in ("train_steps", "samples", "nfe", "seed")}
    cells = Cells(args.model / "cells.jsonl", "ncsn", "samples", made_for, lambda row: (row["network"], row["sampler"]))
    losses, paths = {}, {}
    for name, paper in papers(training).items():
        denoiser = trained(paper, training, args.model / name, args.train_steps, args.seed)
        losses[name] = terms(denoiser, held_out, paper.levels)
        solver, grid = next(iter(paper.samplers(denoiser, args.nfe).values()))
        paths[name] = path(denoiser, solver, grid, args.seed)
        for sampler, (solver, grid) in paper.samplers(denoiser, args.nfe).items():
            if (name, sampler) not in cells.done:
                cells.write({"network": name, "sampler": sampler, **score(denoiser, solver, grid, held_out, args)})
            row = cells.done[name, sampler]
            print(f"{name:7s} {sampler:50s} {row['nfe']:5d} {row['frechet']:6.2f} ({row['stderr']:.2g})", flush=True)
    floor = evaluate(training[: args.samples], held_out, ["frechet"], classifier_features("digits"), floor=training)
    results = {
        "environment": environment(),
        **made_for,
        "networks": {name: vars(paper) for name, paper in papers(training).items()},
        "net": NET,
        "losses": losses,
        "rms": round(float(training.square().mean().sqrt()), 3),
        "real": {"frechet": round(floor["frechet"].floor, 3), "std": round(floor["frechet"].floor_std, 3)},
        "rows": [{key: value for key, value in row.items() if key != "shown"} for row in cells.done.values()],
    }
    write_json(args.out / "results.json", results)
    (args.out / "README.md").write_text(report(results))
    draw(list(cells.done.values()), paths, results, args.out / "ncsn.png")
    print(report(results) + f"\nwrote {args.out}/ncsn.png, results.json and README.md")


def trained(paper: Paper, training: Tensor, folder: Path, steps: int, seed: int) -> Denoiser:
    """The network, trained or continued in its folder, with averaged weights."""
    denoiser = paper.model.build(seed)
    denoiser.net.to(memory_format=torch.channels_last)
    config = TrainConfig(steps=steps, batch_size=64, lr=2e-3, ema_decay=0.995, seed=seed, threads=1)
    times = LevelTimes(paper.levels)
    trainer = Trainer(denoiser, training, config, weighting=simple, times=times, folder=folder, model=paper.model)
    return trainer.fit().ema


@torch.no_grad()
def terms(denoiser: Denoiser, x: Tensor, levels: int) -> dict[str, list[float]]:
    """The terms of the loss on held-out digits, from the largest level to the smallest, by lambda."""
    found: dict[str, list[float]] = {"sigma": [], "sigma^2": [], "1": []}
    for t in Grid.log_snr(denoiser.sde, levels).times[:-1]:
        found["sigma"].append(float(f"{float(denoiser.sde.sigma(t)):.4g}"))
        for name, weighting in (("sigma^2", simple), ("1", uniform_in("score"))):
            generator = torch.Generator().manual_seed(0)
            loss = dsm_loss(denoiser, x, t=t, weighting=weighting, generator=generator)
            found[name].append(float(f"{float(loss) * x[0].numel() / 2:.4g}"))
    return found


def path(denoiser: Denoiser, solver: Solver, grid: Grid, seed: int) -> Tensor:
    """States of ten chains along the levels, (10, 10, 1, 8, 8)."""
    states = sample(denoiser, noise(denoiser, 10, seed), solver, grid=grid, seed=seed, trajectory=True).trajectory
    assert states is not None
    return states[torch.linspace(0, len(states) - 1, 10).round().long()]


def noise(denoiser: Denoiser, n: int, seed: int) -> Tensor:
    """x_T: the largest level's noise, though after it there is still something to be seen of the data at NCSN's."""
    return denoiser.sde.prior((n, 1, 8, 8), torch.Generator().manual_seed(derive_seed(seed, 1)))


def score(denoiser: Denoiser, solver: Solver, grid: Grid, held_out: Tensor, args: argparse.Namespace) -> dict:
    """Frechet distance of samples with its standard error, evaluations, and the first digits as levels."""
    found = sample(denoiser, noise(denoiser, args.samples, args.seed), solver, grid=grid, seed=args.seed)
    x = found.x.clamp(-1, 1)
    frechet = evaluate(x, held_out, ["frechet"], classifier_features("digits"), floors=0)["frechet"]
    numbers = {"frechet": round(frechet.value, 4), "stderr": round(frechet.stderr, 4)}
    return {"nfe": found.nfe, **numbers, "shown": to_levels(x[:24]).flatten().tolist()}


def report(results: dict) -> str:
    """The tables, as Markdown."""
    about, real, n = results["environment"], results["real"], results["samples"]
    own = {row["network"]: row for row in results["rows"] if "its own" in row["sampler"]}
    order = ""
    if len(own) == 2:
        first, second = own["NCSN"], own["NCSNv2"]
        apart = (first["frechet"] - second["frechet"]) / math.hypot(first["stderr"], second["stderr"])
        found = "a tie" if abs(apart) < 2 else "the same order" if apart > 0 else "the opposite order"
        order = f"""
Here, each by its own sampler, {found}: {first["frechet"]:.2f} ({first["stderr"]:.2f}) and {second["frechet"]:.2f}
({second["stderr"]:.2f}). Levels, what the network is told, and evaluations differ at once, so that the table does not
say which of them is the cause, nor what longer training would change.
"""
    return f"""# Noise-conditional score networks on the digits

`{about["command"]}`: {about["device"]}, {about["threads"]} thread(s), {about["dtype"]};
torch {about["torch"]}, scoresde {about["scoresde"]}, commit {about["commit"]}.

Two networks of one architecture, conditional instance norm and dilated convolutions, {results["train_steps"]} steps
each; what sets them apart is in the program's first lines. {n} digits by each sampler against 500 held-out ones, in the
features of the library's classifier; in brackets the standard error over both sets, by random halves. {n} digits of the
training set have {real["frechet"]:.2f} (standard deviation {real["std"]:.2f} over choices of them). All begin with
noise of the largest level alone; digits, whose root mean square is {results["rms"]:.2f}, would still be seen in NCSN's.
Published, on CIFAR-10 in Inception's features, another scale: NCSN 25.3, NCSNv2 10.9 (Song and Ermon, 2019 and 2020).
{order}
{chr(10).join(section(name, results) for name in results["networks"])}
![Annealing, samples and scores](ncsn.png)
"""


def section(name: str, results: dict) -> str:
    """What is to be said of a network."""
    paper, losses = results["networks"][name], results["losses"][name]
    rows = [row for row in results["rows"] if row["network"] == name]
    best = min(rows, key=lambda row: row["frechet"])
    ties = [
        row["sampler"]
        for row in rows
        if row is not best and row["frechet"] - best["frechet"] < 2 * math.hypot(row["stderr"], best["stderr"])
    ]
    first, last = (f"{losses[key][0]:.3g} to {losses[key][-1]:.3g}" for key in ("sigma^2", "1"))
    cells = ([row["sampler"], row["nfe"], f"{row['frechet']:.2f} ({row['stderr']:.2f})"] for row in rows)
    return f"""## {name}

{paper["levels"]} levels from {paper["largest"]:g} to {SMALLEST}; T = {paper["steps_per_level"]} and eps =
{paper["eps"]:.2g} are its own. The terms of its loss on held-out digits, from the largest level to the smallest:
{first} with lambda = sigma^2, {last} with lambda = 1.

{chr(10).join(table(["sampler", "evaluations", "Frechet distance"], cells))}

The smallest: {best["sampler"]}.
Ties with it, within two standard errors of the difference of independent samples:
{"; ".join(ties) or "none"}.
"""


def draw(rows: list[dict], paths: dict[str, Tensor], results: dict, file: Path) -> None:
    """Chains along the levels, digits of each sampler, the terms of the loss, and scores by evaluations."""
    figure = plt.figure(figsize=(16, 10), layout="constrained")
    left, middle, right = figure.subfigures(1, 3, width_ratios=[1.0, 1.5, 1.0])

    def show(axis: plt.Axes, images: Tensor, columns: int, title: str) -> None:
        axis.imshow(tiled(images, columns)[0].numpy(), cmap="gray", vmin=0, vmax=255)
        axis.set_title(title, fontsize=9, loc="left")
        axis.axis("off")

    for axis, (name, states) in zip(left.subplots(2, 1), paths.items(), strict=True):
        paper = results["networks"][name]
        title = f"{name}: ten chains, from sigma = {paper['largest']:g} to {SMALLEST} in {paper['levels']} levels"
        show(axis, to_levels(states).transpose(0, 1).flatten(0, 1), len(states), title)
    for axis, row in zip(middle.subplots(len(rows), 1), rows, strict=True):
        shown = torch.tensor(row["shown"], dtype=torch.uint8).reshape(-1, 1, 8, 8)
        show(
            axis,
            shown,
            len(shown),
            f"{row['network']}, {row['sampler']}: {row['nfe']} evaluations, {row['frechet']:.2f}",
        )
    above, below = right.subplots(2, 1)
    for name, losses in results["losses"].items():
        for weight, style in (("sigma^2", "-"), ("1", ":")):
            label = rf"{name}, $\lambda = {weight.replace('sigma', chr(92) + 'sigma')}$"
            above.loglog(losses["sigma"], losses[weight], style, color=COLORS[name], marker=".", label=label)
    above.set(xlabel="level sigma", title="terms of the loss, held-out digits")
    above.legend(frameon=False, fontsize=8)
    markers: dict[str, Callable] = {"annealed": "o", "reverse": "s", "ODE": "^"}
    for name, color in COLORS.items():
        for kind, marker in markers.items():
            points = [r for r in rows if r["network"] == name and r["sampler"].startswith(kind)]
            x, y, e = ([r[key] for r in points] for key in ("nfe", "frechet", "stderr"))
            label = f"{name}, { {'annealed': 'annealed Langevin', 'reverse': 'reverse SDE'}.get(kind, kind) }"
            below.errorbar(
                x, y, e, fmt=marker, color=color, capsize=2, label=label, mfc="none" if kind == "ODE" else None
            )
    below.axhline(results["real"]["frechet"], color="0.4", linestyle=":", label="training digits")
    below.set(xscale="log", yscale="log", xlabel="evaluations", title="Frechet distance, with standard errors")
    below.set_ylim(bottom=0.12 * results["real"]["frechet"])
    below.legend(frameon=False, fontsize=8, loc="lower left")
    figure.savefig(file, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
