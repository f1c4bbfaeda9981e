"""Samplers on trained networks: what the literature's step-count tables look like on Fashion-MNIST.

    python benchmarks/fashion_mnist.py --out benchmarks/results/fashion_mnist

The networks are those of benchmarks/networks.py, VP (predicts eps) and EDM.

    etas     DDIM's table 1: eta = 0, 0.2, 0.5, 1 and the larger variance sigma-hat at S = 10, 20, 50, 100 (and 1000,
             with --long), VP
    race     solvers at 5, 8, 10, 20 and 50 evaluations on their default grids, of both networks, with means clipped to
             the data's range and without
    grids    Adams, DPM-Solver++(2M) and UniPC-3 on their default grid, on that of version 0.1 and on evenly spaced
             times, and what `scoresde.tuning.choose` finds for 5, 8 and 10 evaluations on samples of other noise
    correctors   predictor alone at N and 2 N steps, corrector alone, both: benchmarks/correctors.py
    bits     bits/dim of held-out images through the probability-flow ODE

Samples are judged by their Frechet distance to the 10,000 held-out images, in the features of the classifier that comes
with the library, in sets of 200: mean and standard error over the sets. It is biased by the number of samples, so that
only numbers from sets of one size compare; what sets of real images score stands beside them. Where means are not
clipped, samples are not either.

Written into --out: README.md, results.json, race.png, grids of samples, and runs/ with every finished number: a run
that is killed goes on where it stopped, and more --sets go on from fewer. --only VP takes what that network needs and
writes no page, so that the networks can share the processors.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import correctors
import matplotlib
import torch
from kept import Clock, Numbers, Score, Scores, floor, made_on, published_table, score_table
from torch import Tensor, nn
from tqdm import tqdm

from scoresde import VPSDE, Denoiser, Grid, NetworkDenoiser, bits_per_dim, sample
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
from scoresde.solvers import DDIM, DDPM, ERSDE, Adams, DPMSolverPP, Solver, UniPC
from scoresde.solvers.catalogue import call_of
from scoresde.training import load
from scoresde.training.model import opened
from scoresde.tuning import TunedSolver, choose
from scoresde.variance.table import fingerprint
from scoresde.wrappers import Clip

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NETWORKS = ("VP", "EDM")

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
    "DDIM": DDIM(),
    "Adams": Adams(),
    "DPM-Solver++(2M)": DPMSolverPP(),
    "UniPC-3": UniPC(),
    "DPM-Solver++(2M) SDE": DPMSolverPP(stochastic=True),
    "ER-SDE-3": ERSDE(),
}
NFE = (5, 8, 10, 20, 50)
GRIDDED = ("Adams", "DPM-Solver++(2M)", "UniPC-3")  # of one evaluation a step
CHOSEN_AT = (5, 8, 10)
SAMPLES, SEED = 64, 10**6  # of the choice
CLIPS = {"means as they are": False, "clipped means": True}

# NLL in bits/dim on CIFAR-10 through the ODE, DDPM++ continuous (Song et al., 2021, table 2).
PUBLISHED_BITS = 3.16


def ddim_grid(sde: SDE, steps: int) -> Grid:
    """The sub-sequence of DDIM's CIFAR-10 rows, quadratic; all of S = 1000 are evenly spaced."""
    return Grid.quadratic(sde, steps) if steps < 1000 else Grid.uniform(sde, steps)


def before(sde: SDE, steps: int, solver: Solver) -> Grid:
    """The default grid of version 0.1: tau^(1 / p) uniform up to `last`, tau being VP's time of the same noise level; p
    from 2 with 10 steps or fewer to the solver's own with 50, as `last` from steps^-2 to 0.01 / steps.
    """
    share = min(max(math.log(steps / 10) / math.log(5), 0.0), 1.0)
    tau = VPSDE().half_log_snr(steps ** (-2 * (1 - share)) * (0.01 / steps) ** share)
    last = max(sde.t_min, float(sde.time_at(tau - math.log(sde.data_scale))))
    return Grid.power(sde, steps, power=2 ** (1 - share) * getattr(solver, "power", 4.0) ** share, last=last)


GRIDS: dict[str, Callable[[SDE, int, Solver], Grid]] = {
    "default": lambda sde, steps, solver: solver.grid(sde, steps),
    "default of 0.1": before,
    "uniform": lambda sde, steps, solver: Grid.uniform(sde, steps),
}


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        set_size: samples in a set.
        sets: for a number of evaluations below 1000; one set above.
        images: held-out images of the code length.
        bits_steps: of its ODE's table.
        grid: samples of the pictures.
        long: S = 1000 too.
    """

    set_size: int = 200
    sets: int = 3
    images: int = 200
    bits_steps: int = 60
    grid: int = 64
    long: bool = False


class Experiment:
    """The networks and their measures, each kept once it is taken.

    Args:
        size: how much.
        networks: folder of the networks.
        folder: of the finished numbers, a file for each part.
        device: of the networks.
    """

    def __init__(self, size: Size, networks: Path, folder: Path, device: str) -> None:
        self.size, self.networks, self.folder, self.device = size, networks, folder, device
        folder.mkdir(parents=True, exist_ok=True)
        self.features = classifier_features("fashion-mnist")
        self.held_out = fashion_mnist_levels(split="test")[0]
        self._loaded: dict[str, NetworkDenoiser] = {}
        self._numbers: dict[tuple[str, str], Numbers] = {}
        self.clocks: dict[str, Clock] = {}

    @cached_property
    def reference(self) -> Tensor:
        return self.features(scaled(self.held_out))

    def real(self) -> tuple[float, float]:
        """Of sets of real training images: mean and standard deviation."""
        return floor(scaled(fashion_mnist_levels(split="train")[0]), self.reference, self.features, self.size.set_size)

    def model(self, name: str) -> NetworkDenoiser:
        if name not in self._loaded:
            denoiser = load(self.networks / name, device=self.device)
            assert isinstance(denoiser.net, nn.Module)
            denoiser.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self._loaded[name] = denoiser
        return self._loaded[name]

    def numbers(self, part: str, name: str) -> Numbers:
        """Finished ones of these very weights, and of sets of this size."""
        if (part, name) not in self._numbers:
            weights = opened(self.networks / name).manifest["files"]["average.safetensors"][:16]
            about = f"{name} {weights}, sets of {self.size.set_size}"
            self._numbers[part, name] = Numbers(self.folder / f"{part}-{name}.jsonl", about, "fashion-mnist")
        return self._numbers[part, name]

    def commits(self) -> list[str]:
        """That the numbers were measured at."""
        return sorted(set().union(*(numbers.commits() for numbers in self._numbers.values())), key=len)

    def clock(self, name: str) -> Clock:
        return self.clocks.setdefault(name, Clock(self.folder / f"seconds-{name}.json"))

    def clipped(self, name: str, clip: bool) -> Denoiser:
        return Clip(self.model(name)) if clip else self.model(name)

    def solver(
        self, name: str, path: Path, clip: bool, what: str, make: Callable[[Denoiser], TunedSolver]
    ) -> TunedSolver:
        """What was made for a network, kept in a file; made anew where it is of other weights."""
        model = self.clipped(name, clip)
        if path.exists() and (found := TunedSolver.load(path, model.sde)).model == fingerprint(model):
            return found
        with self.clock(name)(what):
            found = make(model)
        found.save(path)
        return found

    def chosen(self, name: str, nfe: int, clip: bool) -> TunedSolver:
        """The solver and grid that are chosen for a network."""
        path = self.folder / f"{name}-{nfe}{'-clipped' * clip}.json"
        return self.solver(
            name, path, clip, "choosing", lambda model: choose(model, self.shape(SAMPLES), nfe=nfe, seed=SEED)
        )

    def shape(self, n: int) -> tuple[int, ...]:
        """Of n samples."""
        return (n, *self.held_out.shape[1:])

    def draw(self, name: str, solver: Solver, grid: Grid | int, clip: bool, number: int, n: int) -> Tensor:
        """One set of samples, clipped or as they come; the same x_T and noise for every solver."""
        made = self.clipped(name, clip)
        how = {"nfe": grid} if isinstance(grid, int) else {"grid": grid}
        x = sample(made, self.shape(n), solver, **how, seed=derive_seed(number, n)).x.cpu()
        return x.clamp(-1, 1) if clip else x

    def frechet(
        self,
        part: str,
        name: str,
        row: str,
        nfe: int,
        solver: Solver,
        grid: Grid | int,
        clip: bool = True,
        sets: int | None = None,
    ) -> Score:
        """The distances of some sets of samples; sets that are kept are not drawn again."""
        numbers, key = self.numbers(part, name), f"{row}, {'clipped' if clip else 'as it is'}"
        found = list(numbers.get(part, key, nfe) or [])
        sets = sets or (self.size.sets if nfe < 1000 else 1)
        for number in range(len(found), sets):
            with self.clock(name)(part):
                x = self.draw(name, solver, grid, clip, number, self.size.set_size)
                found.append(frechet_distance(self.features(x), self.reference))
            numbers.put(part, key, nfe, found)
        return Score.of(found[:sets])

    # ---- the parts ----

    def etas(self) -> Scores:
        sde = self.model("VP").sde
        todo = [(row, steps) for steps in S if steps < 1000 or self.size.long for row in ETAS]
        return {
            (row, steps): self.frechet("etas", "VP", row, steps, ETAS[row], ddim_grid(sde, steps))
            for row, steps in tqdm(todo, desc="etas", unit="cell")
        }

    def race(self, names: Sequence[str] = NETWORKS) -> dict[tuple[str, str], Scores]:
        """(network, clipping) to scores."""
        todo = [(row, nfe) for nfe in NFE for row in SOLVERS]
        return {
            (name, how): {
                (row, nfe): self.frechet("race", name, row, nfe, SOLVERS[row], nfe, clip)
                for row, nfe in tqdm(todo, desc=f"race, {name}, {how}", unit="cell")
            }
            for name in names
            for how, clip in CLIPS.items()
        }

    def grids(self, names: Sequence[str] = NETWORKS) -> dict[tuple[str, str], Scores]:
        """As `race`; a grid that is the default one has its numbers."""
        found: dict[tuple[str, str], Scores] = {}
        for name in names:
            for how, clip in CLIPS.items():
                scores: Scores = {}
                for nfe in tqdm(NFE, desc=f"grids, {name}, {how}", unit="column"):
                    for row in GRIDDED:
                        for spacing in GRIDS:
                            scores[f"{row}, {spacing}", nfe] = self._gridded(name, row, spacing, nfe, clip)
                    if nfe in CHOSEN_AT:
                        best = self.chosen(name, nfe, clip)
                        grid = Grid(best.sde, best.times)
                        row = f"{call_of(best.solver)} at {best.times[1]:.6g}, ..."
                        scores["chosen", nfe] = self.frechet("grids", name, row, nfe, best, grid, clip)
                found[name, how] = scores
        return found

    def _gridded(self, name: str, row: str, spacing: str, nfe: int, clip: bool) -> Score:
        sde, solver = self.model(name).sde, SOLVERS[row]
        grid, default = (GRIDS[key](sde, nfe, solver).times for key in (spacing, "default"))
        if torch.allclose(grid, default, rtol=1e-6, atol=0):
            return self.frechet("race", name, row, nfe, solver, nfe, clip)
        return self.frechet("grids", name, f"{row}, {spacing}", nfe, solver, GRIDS[spacing](sde, nfe, solver), clip)

    def bits(self, names: Sequence[str] = NETWORKS) -> dict[str, tuple[Score, float]]:
        """For each network bits/dim, and the number of network calls for a batch."""
        images = self.held_out[: self.size.images].to(self.device)
        options = {"steps": self.size.bits_steps, "data_range": outer_edges(-1.0, 1.0, 256), "batch_size": 100}
        result = {}
        for name in tqdm(names, desc="bits/dim", unit="network"):
            key = f"uniform, {self.size.bits_steps} steps"
            values = self.numbers("bits", name).get("bits", key, len(images))
            if values is None:
                with self.clock(name)("bits"):
                    found = bits_per_dim(self.model(name), images, seed=0, **options)  # type: ignore[arg-type]
                values = [*found.per_image.tolist(), found.nfe / math.ceil(len(images) / 100)]
                self.numbers("bits", name).put("bits", key, len(images), values)
            result[name] = Score.of(values[:-1]), values[-1]
        return result


# --- the page --------------------------------------------------------------------------------------------------------


def draw_race(etas: Scores, race: Mapping[tuple[str, str], Scores], real: float, path: Path) -> None:
    """Distances against the number of evaluations."""
    titles = {"noise, VP": etas, **{f"{name}, {how}": scores for (name, how), scores in race.items()}}
    figure, axes = plt.subplots(1, len(titles), figsize=(4.2 * len(titles), 4.4), layout="constrained")
    for axis, (title, scores) in zip(axes, titles.items(), strict=True):
        rows, columns = (list(dict.fromkeys(key[i] for key in scores)) for i in (0, 1))
        for row in rows:
            mean, error = ([getattr(scores[row, c], key) for c in columns] for key in ("mean", "stderr"))  # type: ignore[index]
            error = [0.0 if value != value else value for value in error]
            axis.errorbar(columns, mean, error, label=row, marker="o", markersize=4)
        axis.axhline(real, color="black", linewidth=0.8, linestyle="-.", label="real images")
        axis.set(xscale="log", yscale="log", xlabel="evaluations of the network", title=title)
        axis.set_xticks(columns, [str(c) for c in columns])
        axis.minorticks_off()
        heights = log_ticks(*axis.get_ylim())
        axis.set_yticks(heights, [f"{tick:.3g}" for tick in heights])
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    axes[0].set_ylabel("Frechet distance to held-out images")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def pictures(experiment: Experiment) -> dict[str, Callable[[], Tensor]]:
    """File names of the grids of samples, and how they are drawn."""
    n = experiment.size.grid

    def drawn(name: str, nfe: int) -> Callable[[], Tensor]:
        return lambda: experiment.draw(name, SOLVERS["UniPC-3"], nfe, True, 0, n)

    found = {f"{name}-{nfe}": drawn(name, nfe) for name in NETWORKS for nfe in (10, 50)}
    return found | {"real": lambda: scaled(experiment.held_out[:n])}


def report(experiment: Experiment, out: Path) -> str:
    """Do what is not done yet, and write everything."""
    etas, race, grids, bits = experiment.etas(), experiment.race(), experiment.grids(), experiment.bits()
    corrected = correctors.correctors(experiment, NETWORKS)
    size, about, (real, real_std) = experiment.size, environment(experiment.device), experiment.real()
    for name, picture in pictures(experiment).items():
        write_png(out / f"samples-{name}.png", side_by_side(to_levels(picture())))
    minutes = sum(spent for name in NETWORKS for _, spent in experiment.clock(name).seconds.values()) / 60
    page = [
        "# Samplers on two networks trained on Fashion-MNIST",
        "",
        f"{made_on(about)} {minutes:.0f} minutes of processor time. Finished numbers are kept: these were measured at "
        f"{' and '.join(experiment.commits())}.",
        "",
        "The networks, VP and EDM, are those of [networks](../networks). Frechet distance to the 10,000 held-out "
        f"images in the features of the library's classifier, in sets of {size.set_size} samples: mean and, in "
        f"brackets, standard error over the sets ({size.sets}; one at 1000 evaluations). Seeds are the same for all "
        f"entries. Sets of {size.set_size} real training images score {real:.2f} (standard deviation {real_std:.2g}).",
        "",
        "![Frechet distance against evaluations](race.png)",
        "",
        "## The noise of the reverse process, by number of steps S",
        "",
        *score_table(etas, "S"),
        "",
        "FID on CIFAR-10, published (DDIM, table 1):",
        "",
        *published_table(PUBLISHED_ETAS, "S", S),
        "",
        "VP, clipped means. Sub-sequences are quadratic in t, as the paper's for CIFAR-10; all 1000 steps are evenly "
        "spaced.",
        "",
        *correctors.lines(corrected),
        "",
        "## Solvers at few evaluations",
        "",
        "Each on its default grid, with as many steps as fit.",
        *[
            line
            for key, scores in race.items()
            for line in ("", f"{', '.join(key)}:", "", *score_table(scores, "evaluations"))
        ],
        "",
        "## Grids",
        "",
        "The default one, that of version 0.1 (quadratic in t up to 10 steps, closer to the data with more), and times "
        f"evenly spaced in t. Chosen: what `scoresde.tuning.choose` finds on {SAMPLES} samples of other noise, by the "
        "distance from the model's own fine solution:",
        "",
        *[
            f"- {name}, {how}, {nfe}: {best.story}"
            for name in NETWORKS
            for how, clip in CLIPS.items()
            for nfe in CHOSEN_AT
            for best in [experiment.chosen(name, nfe, clip)]
        ],
        *[
            line
            for key, scores in grids.items()
            for line in ("", f"{', '.join(key)}:", "", *score_table(scores, "evaluations"))
        ],
        "",
        "## Code length of held-out images",
        "",
        *table(
            ["network", "bits/dim", "network calls"],
            ([name, f"{score.mean:.3f} ({score.stderr:.1g})", f"{nfe:.0f}"] for name, (score, nfe) in bits.items()),
        ),
        "",
        f"Through the probability-flow ODE, of {size.images} held-out images, dequantised uniformly (mean and standard "
        f"error over images): {size.bits_steps} steps, one Hutchinson probe; network calls on a batch. Published for "
        f"CIFAR-10 (Song et al., 2021, table 2, DDPM++, VP): {PUBLISHED_BITS}.",
        "",
        "## Samples",
        "",
        *[f"![{name}](samples-{name}.png) {name}\n" for name in pictures(experiment)],
    ]
    write_json(
        out / "results.json",
        {
            "environment": about,
            "minutes": round(minutes, 1),
            "size": repr(size),
            "real": {"mean": real, "std": real_std},
            "etas": _listed(etas),
            "correctors": correctors.listed(corrected),
            "race": [[*key, _listed(scores)] for key, scores in race.items()],
            "grids": [[*key, _listed(scores)] for key, scores in grids.items()],
            "bits": [[name, score.mean, score.stderr, nfe] for name, (score, nfe) in bits.items()],
        },
    )
    text = "\n".join(page).rstrip() + "\n"
    (out / "README.md").write_text(text)
    draw_race(etas, race, real, out / "race.png")
    return text


def _listed(scores: Scores) -> list[list[object]]:
    """[row, evaluations, mean, standard error]."""
    return [[*key, score.mean, score.stderr] for key, score in scores.items()]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/fashion_mnist"), help="folder of results")
    parser.add_argument("--networks", type=Path, default=Path(__file__).parent / "results/networks", help="folder")
    parser.add_argument("--only", choices=NETWORKS, help="what this network needs, and no page")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--set-size", type=int, help="samples in a set (200)")
    parser.add_argument("--sets", type=int, help="sets (3)")
    parser.add_argument("--images", type=int, help="held-out images of the code length (200)")
    parser.add_argument("--long", action="store_true", default=None, help="S = 1000 too: 15 minutes")
    args = parser.parse_args(argv)
    size = Size(**{f.name: value for f in fields(Size) if (value := getattr(args, f.name, None)) is not None})
    experiment = Experiment(size, args.networks, args.out / "runs", args.device)
    if args.only:
        for part in (experiment.race, experiment.grids, experiment.bits):
            part([args.only])
        correctors.correctors(experiment, [args.only])
        if args.only == "VP":
            experiment.etas()
        return
    print(report(experiment, args.out))
    print(f"written into {args.out}: README.md, results.json, race.png, samples-*.png")


if __name__ == "__main__":
    main()
