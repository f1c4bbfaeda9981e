"""Digits of a class that was asked for: what the weight of classifier-free guidance buys, and what it costs.

    python examples/guidance.py            ten minutes on one core, eight of them training; --help

A small U-Net learns 1,297 real digits with their classes, and one time in ten is not told the class, so that the one
network is the conditional model D_c and the unconditional D_u. `ClassifierFree(denoiser, weight=w)` samples

    D' = D_u + w (D_c - D_u)        w = 0: unconditional, w = 1: the conditional model, w > 1: guided

A sweep of w: is the class the one that was asked for (accuracy of a classifier), are the digits like real ones
(precision), are real ones like them (recall), and the Frechet distance, all in the features of that classifier, against
500 held-out digits. Once with w at all noise levels, once in an interval of them (Kynkaanniemi et al., 2024).
examples/classifier_guidance.py guides the same model by a classifier, examples/low_density.py leads it where data is
rare.

The solver is DPM-Solver++ of order 2. Guidance makes the ODE stiffer: from w = 2 to w = 8 the errors of solvers grow
three to ten times. At w = 8 and 10 evaluations this one's was the smallest of those tried, 0.11 per pixel (UniPC-3:
0.15, DDIM: 0.20), and at 20, as here, 0.03. It is measured for each row, against 8 times as many steps.

Writes guidance.png, results.json and README.md into --out, the network into --model. A run that is
killed goes on from its last checkpoint, and one that has a network trains none.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from shared import BLUE, ORANGE, arguments, grid, picture, place, publish, spent
from shared import trained as trained_by
from torch import Tensor

from scoresde import Denoiser, sample
from scoresde.data import TrainingData, digits
from scoresde.guidance import ClassifierFree
from scoresde.metrics import classifier_features, evaluate, load_classifier
from scoresde.metrics.classifier import WEIGHTS
from scoresde.report import table
from scoresde.solvers import DPMSolverPP
from scoresde.training import ModelConfig

MODEL = ModelConfig(preset=8, options={"channels": 24, "num_classes": 10}, predicts="v", time_scale=999)
SOLVER = DPMSolverPP(order=2)
SCORES = ("accuracy", "precision", "recall", "frechet")


def main(argv: list[str] | None = None) -> None:
    parser = arguments(
        __doc__,
        "guidance",
        model=(Path("runs/guidance/model"), "run folder of the network"),
        train_steps=(2500, "training steps"),
        weights=([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0], "w"),
        interval=((0.3, 2.0), "noise levels"),
        samples=(500, "for each weight"),
        nfe=(20, "evaluations of the guided denoiser"),
    )
    args = parser.parse_args(argv)
    denoiser = trained(args.model, args.train_steps, args.seed)
    start = time.perf_counter()
    swept, drawn = sweep(denoiser, args)
    results = {
        "seconds": {"train": spent(args.model), "measure": time.perf_counter() - start},
        "model": MODEL.to_dict(),
        "training": {"images": 1297, "steps": args.train_steps, "batch_size": 64, "drop": 0.1},
        "solver": repr(SOLVER),
        **swept,
    }
    publish(args, "guidance", results, report, lambda path: draw_sweep(drawn, results, path))


def split() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """1,297 digits with labels to train on, and the 500 that the classifier too has not seen."""
    images, labels = digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return (images[order[500:]], labels[order[500:]]), (images[order[:500]], labels[order[:500]])


def trained(folder: Path, steps: int = 2500, seed: int = 0) -> Denoiser:
    """The class-conditional denoiser, trained or continued in a run folder, with averaged weights."""
    images, labels = split()[0]
    data = TrainingData(images, labels, num_classes=10, drop=0.1, seed=seed)  # drop: the null class, one time in ten
    return trained_by(MODEL, data, folder, steps, seed, flag="--model", ema_decay=0.995)


def sweep(denoiser: Denoiser, args: argparse.Namespace) -> tuple[dict, dict]:
    """Scores of each weight, at all noise levels and in the interval, and the digits, from the same x_T."""
    (training, _), (held_out, classes) = split()
    classifier, features = load_classifier(WEIGHTS["digits"])[0], classifier_features("digits")
    label = torch.arange(args.samples) % 10
    shape = (args.samples, *held_out.shape[1:])
    curves = [(None, w) for w in args.weights] + [(tuple(args.interval), w) for w in args.weights if w > 1]
    rows, drawn = [], {}
    for interval, w in curves:
        guided = ClassifierFree(denoiser, weight=w, interval=interval)
        solution = sample(guided, shape, SOLVER, nfe=args.nfe, seed=args.seed, cond={"label": label})
        first = {"seed": args.seed, "cond": {"label": label[:20]}}  # the same x_T as in the whole batch
        fine = sample(guided, (len(label[:20]), *shape[1:]), SOLVER, nfe=8 * args.nfe, **first)
        x = solution.x.clamp(-1, 1)
        found = evaluate(x, held_out, ["frechet", "precision", "recall"], features, floor=training, k=3, floors=20)
        p = classifier.accuracy(x, label)
        row = {"weight": w, "interval": interval and list(interval), "accuracy": p}
        row |= {name: round(found[name].value, 4) for name in SCORES[1:]}
        row |= {"accuracy_stderr": round(math.sqrt(p * (1 - p) / args.samples), 4)}
        row |= {f"{name}_stderr": round(found[name].stderr, 4) for name in SCORES[1:]}
        row |= {"solver_error": round(float((solution.x[:20] - fine.x).square().mean().sqrt()), 4)}
        rows.append(row)
        drawn[interval, w] = x[:10]
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    real = {name: {"mean": round(found[name].floor, 4), "std": round(found[name].floor_std, 4)} for name in SCORES[1:]}
    real["accuracy"] = {"mean": classifier.accuracy(held_out, classes)}
    about = {"samples": args.samples, "features": found.features, "interval": args.interval}
    return {**about, "rows": rows, "real": real}, drawn


def report(results: dict) -> str:
    """The tables, as Markdown."""
    real = results["real"]
    head = ["w", "noise levels", "accuracy", "precision", "recall", "Frechet distance", "error of the solver"]
    rows = []
    for row in results["rows"]:
        where = "all" if row["interval"] is None else "{:g} to {:g}".format(*row["interval"])
        cells = [f"{row['weight']:g}", where, *(f"{row[n]:.3f} +- {row[f'{n}_stderr']:.3f}" for n in SCORES[:3])]
        cells += [f"{row['frechet']:.2f} +- {row['frechet_stderr']:.2f}", f"{row['solver_error']:.3f}"]
        rows.append(cells)
    cells = [f"{real[name]['mean']:.3f} (std {real[name]['std']:.3f})" for name in SCORES[1:3]]
    cells = ["real digits", "", f"{real['accuracy']['mean']:.3f}", *cells]
    rows.append([*cells, f"{real['frechet']['mean']:.2f} (std {real['frechet']['std']:.2f})", ""])
    sweep = "\n".join(table(head, rows))
    return f"""# Classifier-free guidance on the digits

{place(results)}

{results["samples"]} digits for each weight, {results["nfe"]} evaluations of DPM-Solver++ of order 2, from the same x_T,
against 500 held-out digits in {results["features"]}, d = 64; nearest neighbours with k = 3. Accuracy: how often that
classifier finds the class that was asked for. Standard errors are of one row by itself: rows share x_T and the held-out
digits, so that they differ from each other by less chance than that. Real digits: {results["samples"]} of the training
set, which the classifier knows by heart, so that their Frechet distance is no floor; the accuracy is that on the
held-out ones. Error of the solver: root mean square of the difference to 8 times as many steps, per pixel in [-1, 1].

{sweep}

![Digits of each weight and class, and the scores](guidance.png)
"""


# --- the pictures ----------------------------------------------------------------------------------------------------


def draw_grid(axis: Any, images: Tensor, labels: list[str]) -> None:
    """A row of digits for each label, of the classes 0 to 9, 0 to 9, ..."""
    columns = len(images) // len(labels)
    grid(axis, images.split(columns), labels, [k % 10 for k in range(columns)])


def draw_sweep(drawn: dict, results: dict, path: Path) -> None:
    weights = [row["weight"] for row in results["rows"] if row["interval"] is None]
    with picture(path, 14, 0.62 * len(weights) + 1.6) as figure:
        left, right = figure.subfigures(1, 2, width_ratios=[1, 1.25])
        axis = left.subplots()
        draw_grid(axis, torch.cat([drawn[None, w] for w in weights]), [f"w = {w:g}" for w in weights])
        axis.set_title("the digits 0 to 9 asked for, from the same noise in a column", fontsize=11)

        names = {"accuracy": "accuracy", "precision": "precision", "recall": "recall", "frechet": "Frechet distance"}
        low, high = results["interval"]
        curves = {"all noise levels": (None, BLUE, "o"), f"{low:g} < level <= {high:g}": ([low, high], ORANGE, "s")}
        for axis, (name, title) in zip(right.subplots(2, 2, sharex=True).flat, names.items(), strict=True):
            for label, (interval, color, marker) in curves.items():
                rows = [r for r in results["rows"] if r["interval"] == interval or (interval and r["weight"] == 1)]
                x, y = [r["weight"] for r in rows], [r[name] for r in rows]
                yerr = [r[f"{name}_stderr"] for r in rows]
                axis.errorbar(x, y, yerr, color=color, marker=marker, markersize=4, linewidth=1.6, label=label)
            axis.axhline(results["real"][name]["mean"], color="0.4", linestyle=":", label="real digits")
            axis.set_title(title, fontsize=11)
            axis.spines[["top", "right"]].set_visible(False)
            if name == "frechet":
                axis.set_ylim(bottom=0)
            else:
                axis.set_ylim(top=1.02)
            if name == "accuracy":
                axis.legend(frameon=False, loc="center right")
            if name in ("recall", "frechet"):
                axis.set_xlabel("weight w (0: unconditional, 1: conditional)")


if __name__ == "__main__":
    main()
