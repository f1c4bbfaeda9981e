"""Score networks on Fashion-MNIST: what the literature's step-count tables look like on a model trained in minutes.

    python benchmarks/fashion_mnist.py --out benchmarks/results/fashion_mnist

Three networks of one architecture, trained alike but for the SDE (VP, sub-VP, VE), and

    (a) DDIM's table 1      eta = 0, 0.2, 0.5, 1 and the larger variance sigma-hat at S = 10, 20, 50, 100, 1000
    (b) the race            the library's solvers at 5, 8, 10, 15, 20, 50 evaluations of the VP network, and two of them
                            by the spacing of their steps
    (c) Score-SDE's table   VP, sub-VP and VE: the reverse-diffusion predictor with and without the Langevin corrector
                            at equal numbers of evaluations
    (d) code length         bits/dim of held-out images through the probability-flow ODE

Samples are judged by their Frechet distance to the 10,000 held-out images, in the features of the classifier that comes
with the library, in sets of 200: mean and standard error over the sets. It is biased by the number of samples, so that
only numbers from sets of one size compare; what sets of real images score stands beside them.

Written into --out: README.md, results.json, race.png, grids of samples, and runs/ with the networks and every finished
number: a run that is killed goes on where it stopped. `scoresde sample OUT/runs/VP` draws from them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from kept import Clock, Numbers, Score, Scores, floor, made_on, published_table, score_table
from torch import Tensor, nn
from tqdm import tqdm

from scoresde import Denoiser, Grid, bits_per_dim, sample
from scoresde.cli.models import About
from scoresde.data import fashion_mnist_levels, scaled
from scoresde.info import environment
from scoresde.levels import to_levels
from scoresde.likelihood import outer_edges
from scoresde.metrics import classifier_features, frechet_distance
from scoresde.noise import derive_seed
from scoresde.pictures import grid as side_by_side
from scoresde.pictures import write_png
from scoresde.report import log_ticks, table, write_json
from scoresde.sde import SDE
from scoresde.solvers import DDIM, DDPM, DEIS, DPMSolverPP, Heun, PredictorCorrector, Solver, UniPC
from scoresde.training import ModelConfig, TrainConfig, Trainer
from scoresde.training.weights import edm, simple
from scoresde.wrappers import Clip

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NETWORK = {"image_channels": 1, "channels": 32, "multipliers": [1, 2], "blocks": 1, "patch": 2}
MODELS = {
    "VP": ModelConfig(sde="vp", options=NETWORK, predicts="eps", time_scale=999.0),
    "sub-VP": ModelConfig(sde="subvp", options=NETWORK, predicts="eps", time_scale=999.0),
    "VE": ModelConfig(sde="ve", options=NETWORK, predicts="edm", sigma_data=0.7),
}

ETAS: dict[str, Solver] = {
    "eta = 0 (DDIM)": DDIM(),
    "eta = 0.2": DDIM(eta=0.2),
    "eta = 0.5": DDIM(eta=0.5),
    "eta = 1 (DDPM)": DDIM(eta=1.0),
    "sigma-hat": DDPM("beta"),
}
# FID on CIFAR-10 of Song, Meng and Ermon (2021), DDIM, table 1.
PUBLISHED_ETAS = {
    "eta = 0 (DDIM)": (13.36, 6.84, 4.67, 4.16, 4.04),
    "eta = 0.2": (14.04, 7.11, 4.77, 4.25, 4.09),
    "eta = 0.5": (16.66, 8.35, 5.25, 4.46, 4.29),
    "eta = 1 (DDPM)": (41.07, 18.36, 8.01, 5.78, 4.73),
    "sigma-hat": (367.43, 133.37, 32.72, 9.99, 3.17),
}
S = (10, 20, 50, 100, 1000)

SOLVERS: dict[str, Solver] = {
    "DDPM": DDPM(),
    "DDIM": DDIM(),
    "Heun": Heun(),
    "DEIS-3": DEIS(),
    "DPM-Solver++(2M)": DPMSolverPP(),
    "DPM-Solver++(2M) SDE": DPMSolverPP(stochastic=True),
    "UniPC-3": UniPC(),
}
NFE = (5, 8, 10, 15, 20, 50)

SPACED = ("DPM-Solver++(2M)", "DPM-Solver++(2M) SDE")
SPACINGS: dict[str, Callable[[SDE, int], Grid]] = {
    "power 4": Grid.power,
    "log-SNR": Grid.log_snr,
    "Karras 7": Grid.karras,
    "uniform": Grid.uniform,
}
SPACED_NFE = (5, 10, 20)

RATIOS = (0.01, 0.05, 0.1, 0.16)  # of signal to noise in the corrector, of which the best is taken
PC_NFE = (20, 50, 100, 200)
# FID on CIFAR-10 of Song et al. (2021), table 1: reverse diffusion, 1000 and 2000 predictor steps and 1000 with both.
PUBLISHED_PC = {"VE": (4.79, 4.74, 3.60), "VP": (3.21, 3.19, 3.18)}
# NLL in bits/dim on CIFAR-10 through the ODE, DDPM++ continuous (table 2).
PUBLISHED_BITS = {"VP": 3.16, "sub-VP": 3.02}


@dataclass(frozen=True)
class Size:
    """How much is trained and measured.

    Attributes:
        train: of every network.
        set_size: samples in a set.
        sets: for a number of evaluations below 1000; one set above.
        pc_sets: of the predictors and correctors.
        images: held-out images of the code length.
        bits_steps: of its ODE's table.
        grid: samples of the pictures.
    """

    train: TrainConfig = TrainConfig(steps=3000, batch_size=64, lr=4e-3, ema_decay=0.998)  # noqa: RUF009 (frozen)
    set_size: int = 200
    sets: int = 3
    pc_sets: int = 2
    images: int = 200
    bits_steps: int = 60
    grid: int = 64


class Data(NamedTuple):
    training: Tensor
    held_out: Tensor
    levels: Tensor


def fashion_mnist() -> Data:
    """In [-1, 1], and the held-out images' levels."""
    training, held_out = (fashion_mnist_levels(split=split)[0] for split in ("train", "test"))
    return Data(scaled(training), scaled(held_out), held_out)


class Experiment:
    """The networks, each trained when it is first asked for, and their measures, each kept once it is taken."""

    def __init__(self, size: Size, folder: Path, device: str) -> None:
        self.size, self.folder, self.device = size, folder, device
        folder.mkdir(parents=True, exist_ok=True)
        self.clock = Clock(folder / "seconds.json")
        self.data = fashion_mnist()
        self.features = classifier_features("fashion-mnist")
        self.cells = Numbers(folder / "cells.jsonl", f"{size} {MODELS}", "fashion-mnist")
        self._trained: dict[str, Denoiser] = {}

    @cached_property
    def reference(self) -> Tensor:
        return self.features(self.data.held_out)

    def model(self, name: str) -> Denoiser:
        """The denoiser with averaged weights."""
        if name not in self._trained:
            words = MODELS[name]
            denoiser = words.build(seed=0)
            assert isinstance(denoiser.net, nn.Module)
            denoiser.net.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
            weighting = simple if words.sigma_data is None else edm(words.sigma_data)
            with self.clock(f"training of {name}"):
                trainer = Trainer(
                    denoiser,
                    self.data.training,
                    self.size.train,
                    weighting=weighting,
                    folder=self.folder / name,
                    model=words,
                ).fit()
            About(tuple(self.data.training.shape[1:]), levels=256).write(self.folder / name)
            self._trained[name] = trainer.ema
        return self._trained[name]

    def draw(self, name: str, solver: Solver, nfe: int, number: int, n: int, grid: Grid | None = None) -> Tensor:
        """One set of samples in the data's range, with clipped means; the same x_T and noise for every solver."""
        made = Clip(self.model(name))
        how = {"nfe": nfe} if grid is None else {"grid": grid}
        shape, seed = (n, *self.data.training.shape[1:]), derive_seed(number, n)
        return sample(made, shape, solver, **how, seed=seed).x.cpu().clamp(-1, 1)

    def frechet(
        self, kind: str, row: str, nfe: int, name: str, solver: Solver, sets: int, grid: Grid | None = None
    ) -> Score:
        """The distances of some sets of samples."""
        found = self.cells.get(kind, row, nfe)
        if found is None:
            with self.clock(kind):
                x = [self.draw(name, solver, nfe, s, self.size.set_size, grid) for s in range(sets)]
            found = [frechet_distance(self.features(part), self.reference) for part in x]
            self.cells.put(kind, row, nfe, found)
        return Score.of(found)

    # ---- the four parts ----

    def etas(self) -> Scores:
        todo = [(row, steps) for steps in S for row in ETAS]
        sde = self.model("VP").sde
        return {
            (row, steps): self.frechet(
                "a", row, steps, "VP", ETAS[row], self.size.sets if steps < 1000 else 1, ddim_grid(sde, steps)
            )
            for row, steps in tqdm(todo, desc="(a) eta", unit="cell")
        }

    def race(self) -> Scores:
        todo = [(row, nfe) for nfe in NFE for row in SOLVERS]
        return {
            (row, nfe): self.frechet("b", row, nfe, "VP", SOLVERS[row], self.size.sets)
            for row, nfe in tqdm(todo, desc="(b) race", unit="cell")
        }

    def spacings(self) -> Scores:
        """Of solvers of one evaluation a step; their own grid as in `race`."""
        sde, found = self.model("VP").sde, {}
        todo = [(row, spacing, nfe) for row in SPACED for spacing in ("own", *SPACINGS) for nfe in SPACED_NFE]
        for row, spacing, nfe in tqdm(todo, desc="(b) spacings", unit="cell"):
            name = f"{row}, {spacing}"
            if spacing == "own":
                found[name, nfe] = self.frechet("b", row, nfe, "VP", SOLVERS[row], self.size.sets)
            else:
                grid = SPACINGS[spacing](sde, nfe)
                found[name, nfe] = self.frechet("b", name, nfe, "VP", SOLVERS[row], self.size.sets, grid)
        return found

    def correctors(self) -> tuple[Scores, dict[str, float]]:
        """Scores, and the corrector's ratio that was best with another seed for each SDE."""
        scores, ratios = {}, {}
        for name in MODELS:
            sweep = {r: self._swept(name, r) for r in tqdm(RATIOS, desc=f"(c) ratio for {name}", unit="cell")}
            ratios[name] = min(sweep, key=sweep.__getitem__)
            kinds = {"predictor": None, "predictor, corrector": "langevin"}
            for label, corrector in kinds.items():
                solver = PredictorCorrector(corrector=corrector, snr=ratios[name])  # type: ignore[arg-type]
                for nfe in tqdm(PC_NFE, desc=f"(c) {name}, {label}", unit="cell"):
                    row = f"{name}, {label}"
                    scores[row, nfe] = self.frechet("c", row, nfe, name, solver, self.size.pc_sets)
        return scores, ratios

    def _swept(self, name: str, ratio: float) -> float:
        """The distance at 50 evaluations, of a set of samples that is not used again."""
        row, solver = f"{name}, r = {ratio}", PredictorCorrector(snr=ratio)
        found = self.cells.get("c sweep", row, 50)
        if found is None:
            with self.clock("c"):
                x = self.draw(name, solver, 50, 100, self.size.set_size)
            found = [frechet_distance(self.features(x), self.reference)]
            self.cells.put("c sweep", row, 50, found)
        return found[0]

    def bits(self) -> dict[tuple[str, str], tuple[Score, float]]:
        """(SDE, dequantisation) to bits/dim with the mean number of network calls for a batch."""
        found = {}
        for name in tqdm(MODELS, desc="(d) bits/dim", unit="SDE"):
            for kind in ("uniform", "truncated-normal"):
                values = self.cells.get("bits", f"{name}, {kind}", self.size.images)
                if values is None:
                    with self.clock("d"):
                        values = self._bits(name, kind)
                    self.cells.put("bits", f"{name}, {kind}", self.size.images, values)
                found[name, kind] = Score.of(values[:-1]), values[-1]
        return found

    def _bits(self, name: str, kind: str) -> list[float]:
        """Of each image, and the number of network calls."""
        images = self.data.levels[: self.size.images].to(self.device)
        options = {"steps": self.size.bits_steps, "data_range": outer_edges(-1.0, 1.0, 256), "batch_size": len(images)}
        found = bits_per_dim(self.model(name), images, dequantize=kind, seed=0, **options)  # type: ignore[arg-type]
        return [*found.per_image.tolist(), float(found.nfe)]


def ddim_grid(sde: SDE, steps: int) -> Grid:
    """The sub-sequence of DDIM's CIFAR-10 rows, quadratic; all of S = 1000 are evenly spaced."""
    return Grid.quadratic(sde, steps) if steps < 1000 else Grid.uniform(sde, steps)


# --- the page --------------------------------------------------------------------------------------------------------


def draw_race(
    etas: Scores,
    race: Scores,
    correctors: Scores,
    real: float,
    path: Path,
) -> None:
    """The three tables of distances, against the number of evaluations."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    titles = ("(a) noise, VP", "(b) solvers, VP", "(c) SDEs, with and without corrector")
    for axis, scores, title in zip(axes, (etas, race, correctors), titles, strict=True):
        rows, columns = (list(dict.fromkeys(key[i] for key in scores)) for i in (0, 1))
        for row in rows:
            mean, error = ([getattr(scores[row, c], key) for c in columns] for key in ("mean", "stderr"))  # type: ignore[index]
            style = "--" if row.endswith(", predictor") else "-"  # type: ignore[union-attr]
            colour = None
            if axis is axes[2]:
                colour = {"VP": "tab:blue", "sub-VP": "tab:green", "VE": "tab:red"}[row.split(",")[0]]  # type: ignore[union-attr]
            error = [0.0 if value != value else value for value in error]
            look = {"marker": "o", "markersize": 4, "markerfacecolor": "white" if style == "--" else None}
            axis.errorbar(columns, mean, error, label=row, linestyle=style, color=colour, **look)
        axis.axhline(real, color="black", linewidth=0.8, linestyle="-.", label="real images")
        axis.set(xscale="log", yscale="log", xlabel="evaluations of the network", title=title)
        axis.set_xticks(columns, [str(c) for c in columns])
        axis.minorticks_off()
        heights = log_ticks(*axis.get_ylim())
        axis.set_yticks(heights, [f"{tick:.3g}" for tick in heights])
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, handlelength=4)  # long enough to show the dashes
    axes[0].set_ylabel("Frechet distance to held-out images")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def pictures(experiment: Experiment, ratios: Mapping[str, float]) -> dict[str, Callable[[], Tensor]]:
    """File names of the grids of samples, and how they are drawn."""
    n = experiment.size.grid

    def drawn(name: str, solver: Solver, nfe: int) -> Callable[[], Tensor]:
        return lambda: experiment.draw(name, solver, nfe, 0, n)

    found = {f"{row}-{nfe}": drawn("VP", SOLVERS[row], nfe) for row in ("DDIM", "UniPC-3") for nfe in (10, 50)}
    for name in MODELS:
        found[f"{name}-pc-100"] = drawn(name, PredictorCorrector(snr=ratios[name]), 100)
    found["real"] = lambda: experiment.data.held_out[:n]
    return found


def report(experiment: Experiment, out: Path) -> str:
    """Do what is not done yet, and write everything."""
    etas, race, spacings = experiment.etas(), experiment.race(), experiment.spacings()
    correctors, ratios = experiment.correctors()
    bits = experiment.bits()
    size, about = experiment.size, environment(experiment.device)
    real, real_std = floor(experiment.data.training, experiment.reference, experiment.features, size.set_size)
    with experiment.clock("pictures"):
        for name, picture in pictures(experiment, ratios).items():
            write_png(out / f"samples-{name}.png", side_by_side(to_levels(picture())))
    train, words = size.train, MODELS["VP"].to_dict()
    page = [
        "# Score networks on Fashion-MNIST",
        "",
        f"{made_on(about)} {experiment.clock}",
        "",
        f"Networks: U-Net, {words['options']}; {train.steps} steps of {train.batch_size} images, AdamW at {train.lr:g}"
        f", average of decay {train.ema_decays[0]}, seed {train.seed}. VP and sub-VP predict eps, VE is preconditioned "
        "as EDM is. Means are clipped to [-1, 1].",
        "",
        f"Frechet distance to the 10,000 held-out images in the features of the library's classifier, in sets of "
        f"{size.set_size} samples: mean and, in brackets, standard error over the sets ({size.sets} in (a) and (b), "
        f"{size.pc_sets} in (c), one at 1000 evaluations). Seeds are the same for all entries. Sets of {size.set_size} "
        f"real training images score {real:.2f} (standard deviation {real_std:.2g}).",
        "",
        "![Frechet distance against evaluations](race.png)",
        "",
        "## (a) The noise of the reverse process, by number of steps S",
        "",
        *score_table(etas, "S"),
        "",
        "FID on CIFAR-10, published (DDIM, table 1):",
        "",
        *published_table(PUBLISHED_ETAS, "S", S),
        "",
        "Sub-sequences are quadratic in t, as the paper's for CIFAR-10; all 1000 steps are evenly spaced.",
        "",
        "## (b) Solvers at few evaluations",
        "",
        *score_table(race, "evaluations"),
        "",
        "Each on its own default grid, with as many steps as fit.",
        "",
        *score_table(spacings, "evaluations"),
        "",
        "Their own grid, `Grid.sampling`, is quadratic in t up to 10 steps and goes closer to the data with more.",
        "",
        "## (c) VP, sub-VP and VE, with predictor and corrector",
        "",
        *score_table(correctors, "evaluations"),
        "",
        "Reverse-diffusion predictor, Langevin corrector of one step, so with half as many predictor steps; ratio of "
        "signal to noise "
        + ", ".join(f"{r:g} for {name}" for name, r in ratios.items())
        + f", the best of {', '.join(f'{r:g}' for r in RATIOS)} at 50 evaluations with another seed. FID on CIFAR-10, "
        "published (Song et al., 2021, table 1, reverse diffusion):",
        "",
        *published_table(PUBLISHED_PC, "", ("1000 predictor steps", "2000", "1000 with corrector")),
        "",
        "## (d) Code length of held-out images",
        "",
        *bits_table(bits),
        "",
        f"Bits/dim through the probability-flow ODE of {size.images} held-out images (mean and standard error over "
        f"images), {size.bits_steps} steps of UniPC of order 4, one Hutchinson probe; network calls on a batch. "
        "Published for CIFAR-10 (Song et al., 2021, table 2, DDPM++, uniform): "
        + ", ".join(f"{name} {value:.2f}" for name, value in PUBLISHED_BITS.items())
        + ". The variational bound of the discrete chain: [analytic_variance](../analytic_variance/fashion-mnist).",
        "",
        "## Samples",
        "",
        *[f"![{name}](samples-{name}.png) {name}\n" for name in pictures(experiment, ratios)],
    ]
    write_json(
        out / "results.json",
        {
            "environment": about,
            "seconds": experiment.clock.seconds,
            "size": repr(size),
            "models": {name: words.to_dict() for name, words in MODELS.items()},
            "real": {"mean": real, "std": real_std},
            "a": _listed(etas),
            "b": _listed(race),
            "spacings": _listed(spacings),
            "c": _listed(correctors),
            "ratios": ratios,
            "bits": [[*key, score.mean, score.stderr, nfe] for key, (score, nfe) in bits.items()],
        },
    )
    text = "\n".join(page).rstrip() + "\n"
    (out / "README.md").write_text(text)
    draw_race(etas, race, correctors, real, out / "race.png")
    return text


def bits_table(bits: Mapping[tuple[str, str], tuple[Score, float]]) -> list[str]:
    return table(
        ["SDE", "dequantisation", "bits/dim", "network calls"],
        ([*of, f"{score.mean:.3f} ({score.stderr:.1g})", f"{nfe:.0f}"] for of, (score, nfe) in bits.items()),
    )


def _listed(scores: Scores) -> list[list[object]]:
    """[row, evaluations, mean, standard error]."""
    return [[*key, score.mean, score.stderr] for key, score in scores.items()]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/fashion_mnist"), help="folder of results")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, help="training steps (3000)")
    parser.add_argument("--set-size", type=int, help="samples in a set (200)")
    parser.add_argument("--images", type=int, help="held-out images of the code length (200)")
    args = parser.parse_args(argv)
    size = Size()
    if args.steps:
        size = replace(size, train=replace(size.train, steps=args.steps))
    chosen = {key: value for key in ("set_size", "images") if (value := getattr(args, key)) is not None}
    experiment = Experiment(replace(size, **chosen), args.out / "runs", args.device)
    print(report(experiment, args.out))
    print(f"written into {args.out}: README.md, results.json, race.png, samples-*.png")


if __name__ == "__main__":
    main()
