"""Tuned solvers on trained networks: are samples of 5 tuned evaluations as good as those of 10 untuned?

    python benchmarks/tuned_network.py --out benchmarks/results/tuned_network

The networks are those of benchmarks/networks.py, VP (predicts eps) and EDM, with means clipped to the data's range. At
5, 8 and 10 evaluations these solvers are compared:

    default     Adams on its own grid
    choose      the best solver, grid and landing that `scoresde.tuning.choose` finds, nothing learned
    tuned       what `scoresde.tuning.tune` learns, from that and a few others, by the distance of pixels
    features    what it learns from `choose`'s by the distance of the classifier's features (at 5 evaluations)

and beside them the model's fine solution, which both learn from. Samples are judged as in benchmarks/fashion_mnist.py,
by their Frechet distance to the 10,000 held-out images in the features of the library's classifier, in sets of 200, of
noise that no solver has seen. All solvers start from the same noise, so that differences are taken set by set.

Written into --out: README.md, results.json, pictures, the tuned solvers, which `scoresde sample NETWORK --clip
--solver` takes, and runs/ with every finished number: a run that is killed goes on where it stopped. --only VP does
what that network needs and writes no page; --kept writes the page of what is finished.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import matplotlib
import torch
from fashion_mnist import NETWORKS, SOLVERS, Experiment, Size
from kept import Score, Scores, made_on, number, score_table, verdict
from torch import Tensor
from tqdm import tqdm

from scoresde import Denoiser
from scoresde.info import environment
from scoresde.levels import to_levels
from scoresde.likelihood.interval import student
from scoresde.metrics.errors import rms
from scoresde.pictures import grid as side_by_side
from scoresde.report import table, write_json
from scoresde.solvers import Adams, Solver, UniPC
from scoresde.solvers.catalogue import call_of
from scoresde.tuning import TunedSolver, tune

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).parent / "results" / "networks"
DEFAULT: Solver = SOLVERS["Adams"]
STARTS: tuple[Solver, ...] = (Adams(), UniPC(3), UniPC(2))  # beside what `choose` finds
TUNED_SEED = 10**6 + 1  # of the noise that is tuned on: none of the sets'
PICTURE = 10**5  # number of the set that the pictures show


@dataclass(frozen=True)
class Amount:
    """How much is tuned and drawn.

    Attributes:
        nfe: budgets of evaluations; the first of the tuned is compared with the last of the others.
        features: those that are tuned in features too.
        noises: of the tuning for the first budget, twice as many in features: half trains, a quarter chooses, a quarter
            reports. For another fewer, by the square of the budgets' ratio, for what a step costs grows with its cube.
        work: steps of the training times evaluations, at most: a step's cost is about their cube.
        minutes: of the clock on the wall, of each tuning, at most: many, for the machine may be shared.
        teacher: evaluations of the fine solution that is learned from.
        fine: of the one that is judged and shown.
        shown: samples of a picture's row, and of the distances to the fine solution.
    """

    nfe: tuple[int, ...] = (5, 8, 10)
    features: tuple[int, ...] = (5, 8, 10)
    noises: int = 128
    work: int = 60
    minutes: float = 40.0
    teacher: int = 36
    fine: int = 40
    shown: int = 16

    def noises_for(self, nfe: int) -> int:
        """Of the tuning for that budget."""
        return max(16, round(self.noises * (self.nfe[0] / nfe) ** 2))


@dataclass(frozen=True)
class Bench:
    """The solvers of one network, judged.

    Attributes:
        experiment: the networks and their measures.
        name: of the network.
        out: where the tuned solvers are kept.
        amount: how much.
        kept: only what is finished: nothing is learned, and no more sets are drawn.
    """

    experiment: Experiment
    name: str
    out: Path
    amount: Amount
    kept: bool = False

    def untuned(self, nfe: int) -> dict[str, Solver]:
        """Row to solver."""
        return {"default": DEFAULT, "choose": self.experiment.chosen(self.name, nfe, True)}

    def tuned(self, nfe: int) -> dict[str, TunedSolver]:
        """Row to solver, each kept in --out."""
        if self.kept and not self._path(nfe, "").exists():
            return {}
        chosen = self.experiment.chosen(self.name, nfe, True)
        found = {"tuned": self._tune(nfe, "", [chosen, *STARTS])}
        if nfe in self.amount.features and not (self.kept and not self._path(nfe, "-features").exists()):
            found["features"] = self._tune(
                nfe, "-features", [chosen], lambda x: self.experiment.features(x.clamp(-1, 1))
            )
        return found

    def _tune(
        self, nfe: int, kind: str, starts: Sequence[Solver], features: Callable[[Tensor], Tensor] | None = None
    ) -> TunedSolver:
        amount = self.amount

        def make(model: Denoiser) -> TunedSolver:
            return tune(
                model,
                starts,
                self.experiment.shape(amount.noises_for(nfe) * (1 if features is None else 2)),
                nfe=nfe,
                seed=TUNED_SEED,
                features=features,
                starts=1,
                rounds=max(amount.work // nfe, 1),
                minutes=amount.minutes,
                reference_nfe=amount.teacher,
                batch_size=128,
            )

        return self.experiment.solver(self.name, self._path(nfe, kind), True, f"tuning, {nfe}{kind}", make)

    def _path(self, nfe: int, kind: str) -> Path:
        return self.out / f"{self.name}-{nfe}{kind}.json"

    def frechet(self, row: str, nfe: int, solver: Solver) -> Score | None:
        """Of a solver, known by what it is where it was made for the network; None where that is not finished and not
        to be done.
        """
        if isinstance(solver, TunedSolver):
            more = 0.0 if solver.corrections is None else sum(solver.corrections.a)
            row = f"{row}, {call_of(solver.solver)} at {solver.times[1]:.9g}, ..., {more:.9g}"
        of = self.experiment.numbers("tuned", self.name)
        if self.kept and len(of.get("tuned", f"{row}, clipped", nfe) or []) < self.experiment.size.sets:
            return None
        return self.experiment.frechet("tuned", self.name, row, nfe, solver, nfe)

    def measured(self) -> tuple[Scores, Score | None]:
        """(row, evaluations) to scores, and that of the fine solution; the untuned first."""
        todo = [(of, nfe) for of in (self.untuned, self.tuned) for nfe in self.amount.nfe]
        scores = {
            (row, nfe): score
            for of, nfe in tqdm(todo, desc=f"tuned, {self.name}", unit="budget")
            for row, solver in of(nfe).items()
            if (score := self.frechet(row, nfe, solver)) is not None
        }
        return scores, self.frechet("fine", self.amount.fine, DEFAULT)

    def drawn(self) -> dict[str, Tensor]:
        """Line of the picture to samples, of the same noise."""
        solvers = {
            (nfe, row): one for nfe in self.amount.nfe for row, one in (self.untuned(nfe) | self.tuned(nfe)).items()
        }
        solvers[self.amount.fine, "fine"] = DEFAULT
        return {
            f"{nfe}, {row}": self.experiment.draw(self.name, solver, nfe, True, PICTURE, self.amount.shown)
            for (nfe, row), solver in solvers.items()
        }


def picture(lines: Mapping[str, Tensor], path: Path) -> None:
    """The samples, a line under another, with their names."""
    figure, axes = plt.subplots(len(lines), 1, figsize=(12, 0.78 * len(lines)), layout="constrained")
    for axis, (line, x) in zip(axes, lines.items(), strict=True):
        axis.imshow(side_by_side(to_levels(x), columns=len(x))[0].numpy(), cmap="gray", vmin=0, vmax=255)
        axis.set_ylabel(line, rotation=0, ha="right", va="center")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    figure.savefig(path, dpi=100, bbox_inches="tight")
    plt.close(figure)


# --- the page --------------------------------------------------------------------------------------------------------


def differences(scores: Scores, amount: Amount) -> list[tuple[object, ...]]:
    """The first budget tuned beside the last untuned, and beside itself: rows of a table."""
    few, many = amount.nfe[0], amount.nfe[-1]
    return [
        (f"{few}, {first}", f"{n}, {row}", *_difference(scores[first, few], scores[row, n]))
        for first in ("tuned", "features")
        for n in dict.fromkeys((many, few))
        for row in ("default", "choose")
        if {(first, few), (row, n)} <= set(scores)
    ]


def _difference(first: Score, second: Score) -> tuple[str, str, str]:
    """Mean, 95 % interval over the paired sets, and what it says."""
    found = Score.of((first.values - second.values).tolist())
    wide = float(student(torch.tensor(len(found.values) - 1.0))) * found.stderr
    said = {"yes": "better", "no": "worse", "tie": "not told apart"}[verdict(first, second)]
    return f"{found.mean:+.2f}", f"{found.mean - wide:+.2f} to {found.mean + wide:+.2f}", said


def chapter(bench: Bench, cells: Scores, fine: Score | None) -> list[str]:
    """What the page says of a network; draws its picture."""
    amount, name, lines = bench.amount, bench.name, bench.drawn()
    spent = bench.experiment.clock(name).seconds
    kinds = {"tuned": "", "features": "-features"}
    learned = [
        (nfe, row, f"`{call_of(one.solver)}`", f"{one.error:.3g}", f"{one.default:.3g}",
         f"{one.error / one.default:.2f}", *(f"{s:.0f}" for s in spent.get(f"tuning, {nfe}{kinds[row]}", ())))
        for nfe in amount.nfe for row, one in bench.tuned(nfe).items()
    ]  # fmt: skip
    picture(lines, bench.out / f"{name}.png")
    last = lines[f"{amount.fine}, fine"]
    far = [(line, f"{float(rms(x - last).mean()):.3f}") for line, x in lines.items() if x is not last]
    return [
        f"## {name}",
        "",
        *score_table(cells, "evaluations"),
        "",
        *([f"fine, {amount.fine} evaluations: {number(fine.mean)} ({fine.stderr:.1g}).", ""] if fine else []),
        f"{amount.nfe[0]} tuned evaluations beside untuned ones, of the same noise, set by set:",
        "",
        *table(["tuned", "beside", "difference", "95 % interval", "it is"], differences(cells, amount)),
        "",
        "What was learned; distances are from the fine solution, in pixels or in features, on noise that neither "
        "trained nor chose; seconds are of the clock, on a machine that others used too, and of one core:",
        "",
        *table(["evaluations", "", "from", "distance", "before", "ratio", "seconds", "of a core"], learned),
        "",
        "The same noise in each column:",
        "",
        f"![{name}: samples of 5, 8 and 10 evaluations, untuned and tuned, and of the fine solution]({name}.png)",
        "",
        "Root mean square of the pixels from the last line, a mean of the samples shown:",
        "",
        *table(["", *(line for line, _ in far)], [["distance", *(value for _, value in far)]]),
        "",
    ]


def report(experiment: Experiment, names: Sequence[str], out: Path, amount: Amount, kept: bool = False) -> str:
    """Do what is not done yet, unless only what is kept is asked for, and write everything."""
    benches = {name: Bench(experiment, name, out, amount, kept) for name in names}
    scores = {name: bench.measured() for name, bench in benches.items()}
    size, about, (real, real_std) = experiment.size, environment(experiment.device), experiment.real()
    chapters = [line for name, bench in benches.items() for line in chapter(bench, *scores[name])]
    spent = {name: experiment.clock(name).seconds for name in names}
    minutes = sum(part[1] for seconds in spent.values() for part in seconds.values()) / 60
    page = [
        "# Tuned solvers on trained networks",
        "",
        f"{made_on(about)} {minutes:.0f} minutes of processor time. Finished numbers are kept: these were measured at "
        f"{' and '.join(experiment.commits())}.",
        "",
        "The networks are those of [networks](../networks), with means clipped to the data's range. `default` is "
        f"`{call_of(DEFAULT)}` on its own grid, `choose` the best solver, grid and landing that `choose` finds for the "
        f"network, `tuned` what `tune` learns on {' or '.join(str(amount.noises_for(n)) for n in amount.nfe)} noises "
        f"(for {' or '.join(map(str, amount.nfe))} evaluations), `features` what it learns from `choose`'s on twice as "
        f"many by the distance in the features of the library's classifier, `fine` the network's own "
        "fine solution, which they learn from. Frechet distance to the 10,000 held-out images in those features: "
        f"{size.sets} sets of {size.set_size} samples from noise that no solver has seen, the same for all; mean and, "
        f"in brackets, standard error over the sets. Sets of {size.set_size} real training images score {real:.2f} "
        f"(standard deviation {real_std:.2g}).",
        *["", "What is empty or missing below has not been measured yet: the command without --kept goes on."] * kept,
        "",
        *chapters,
    ]
    cells = {
        name: {f"{nfe}, {row}": score.values.tolist() for (row, nfe), score in found.items()}
        | ({f"{amount.fine}, fine": fine.values.tolist()} if fine else {})
        for name, (found, fine) in scores.items()
    }
    content = {"environment": about, "size": repr(size), "amount": repr(amount), "real": [real, real_std]}
    write_json(out / "results.json", {**content, "seconds": spent, "networks": cells})
    text = "\n".join(page).rstrip() + "\n"
    (out / "README.md").write_text(text)
    return text


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tuned_network"), help="folder of results")
    parser.add_argument("--networks", type=Path, default=FOLDER, help="folder")
    parser.add_argument("--only", choices=NETWORKS, help="what this network needs, and no page")
    parser.add_argument("--kept", action="store_true", help="write the page of what is finished, and do no more")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--nfe", type=int, nargs="+", help="budgets of evaluations (5 8 10)")
    parser.add_argument("--features", type=int, nargs="*", help="those that are tuned in features too (5 8 10)")
    for name, kind, what in (
        ("noises", int, "of the tuning for the first budget (128)"),
        ("work", int, "steps of the training times evaluations (60)"),
        ("minutes", float, "of the clock, of each tuning, at most (40)"),
        ("teacher", int, "evaluations of the fine solution that is learned from (36)"),
        ("fine", int, "evaluations of the one that is judged (40)"),
        ("shown", int, "samples of a picture's row (16)"),
        ("set-size", int, "samples in a set (200)"),
        ("sets", int, "sets (5)"),
    ):
        parser.add_argument(f"--{name}", type=kind, help=what)
    args = parser.parse_args(argv)
    args.sets = args.sets or 5
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(args).items() if v is not None}
    amount, size = (of(**{f.name: given[f.name] for f in fields(of) if f.name in given}) for of in (Amount, Size))
    experiment = Experiment(size, args.networks, args.out / "runs", args.device)
    if args.only:
        Bench(experiment, args.only, args.out, amount).measured()
        return
    print(report(experiment, NETWORKS, args.out, amount, args.kept))


if __name__ == "__main__":
    main()
