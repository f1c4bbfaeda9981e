"""Digits that a classifier leads to their class: the table of Dhariwal and Nichol (2021), conditional or not, guided or
not, by scale, in both forms of the step.

    python examples/classifier_guidance.py            ten minutes on one core, half of them training; --help

The network is that of examples/guidance.py, which is told the class nine times in ten: with the class it is the
conditional model, with the null class the unconditional one. Beside it a classifier of noisy digits learns p(y | x_t)
with `classifier_loss`, and

    Classifier(denoiser, net, scale=w)        score' = score + w grad_x log p(y | x_t)

guides either model. Their algorithm 1, a stochastic step whose mean is moved, is `DDPM` on that denoiser (up to the
factor that scoresde/guidance/classifier.py works out); their algorithm 2, a DDIM step with another eps, is `DDIM`.
Scores are against 500 held-out digits in the features of the package's own classifier of clean digits, which guides
nothing.

Writes classifier_guidance.png, results.json and README.md into --out, the networks into --model and --guide, and
--guide/classifier.safetensors, which `scoresde sample RUN --classifier` takes. A run that is killed goes on from where
it was.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from guidance import draw_grid, split, trained
from shared import BLUE, ORANGE, arguments, fitted, picture, place, publish, seeded, spent
from torch import Tensor

from scoresde import SDE, Denoiser, EpsDenoiser, sample
from scoresde.data import TrainingData
from scoresde.denoiser import NetworkDenoiser
from scoresde.guidance import Conditioned, TrainedClassifier, classifier_loss
from scoresde.levels import scaled, to_levels
from scoresde.metrics import classifier_features, entropy_score, evaluate, load_classifier
from scoresde.metrics.classifier import WEIGHTS
from scoresde.nn import NoisyClassifier
from scoresde.report import Cells, table
from scoresde.solvers import DDIM, DDPM
from scoresde.training import TrainConfig, Trainer

FORMS = {"mean shift (DDPM)": DDPM(), "eps (DDIM)": DDIM()}
SCORES = {
    "frechet": "Frechet distance",
    "spatial_frechet": "spatial Frechet distance",
    "entropy_score": "entropy score",
    "precision": "precision",
    "recall": "recall",
    "accuracy": "accuracy",
}
TIME_SCALE = 999
LEVELS = (0.1, 0.3, 1.0, 3.0)

# [recalled], and read again in three transcriptions of the paper: Dhariwal and Nichol (2021), table 4, ImageNet at 256
# pixels: conditional, scale; FID, sFID, IS, precision, recall.
PUBLISHED = [
    ("no", "0", 26.21, 6.35, 39.70, 0.61, 0.63),
    ("no", "1", 33.03, 6.99, 32.92, 0.56, 0.65),
    ("no", "10", 12.00, 10.40, 95.41, 0.76, 0.44),
    ("yes", "0", 10.94, 6.02, 100.98, 0.69, 0.63),
    ("yes", "1", 4.59, 5.25, 186.70, 0.82, 0.52),
    ("yes", "10", 9.11, 10.93, 283.92, 0.88, 0.32),
]


def main(argv: list[str] | None = None) -> None:
    parser = arguments(
        __doc__,
        "classifier_guidance",
        model=(Path("runs/guidance/model"), "run folder of the network"),
        guide=(Path("runs/guidance/classifier"), "that of the classifier"),
        train_steps=(2500, "training steps of the network"),
        guide_steps=(1500, "training steps of the classifier"),
        scales=([0.0, 1.0, 2.0, 5.0, 10.0], "w"),
        samples=(500, "for each row"),
        steps=(50, "of either solver"),
        halves=(20, "of the data, that standard errors are of"),
    )
    args = parser.parse_args(argv)
    denoiser = trained(args.model, args.train_steps, args.seed)
    guide = classifier(args.guide, denoiser.sde, args.guide_steps, args.seed)
    start = time.perf_counter()
    rows = sweep(denoiser, guide, args)
    seconds = {"model": spent(args.model), "classifier": spent(args.guide)}
    results = {
        "seconds": seconds | {"measure": time.perf_counter() - start},
        "classifier": guide.net.options,
        "guide": guide.about,
        "real": real(args.halves),
        "rows": [{name: value for name, value in row.items() if name != "digits"} for row in rows],
    }
    publish(args, "classifier_guidance", results, report, lambda path: draw(rows, results, path))


def classifier(folder: Path, sde: SDE, steps: int, seed: int) -> TrainedClassifier:
    """The classifier of noisy digits, trained or continued in a run folder, with averaged weights, and saved there."""
    (images, labels), (held_out, classes) = split()

    def loss(denoiser: NetworkDenoiser, x0: Tensor, draws: Any, cond: Mapping[str, Any]) -> Tensor:
        return classifier_loss(denoiser.net, denoiser.sde, x0, cond["label"], time=denoiser.label, generator=draws)

    net = seeded(lambda: NoisyClassifier(10, channels=32, multipliers=(1, 2), dropout=0.2), seed)
    # A trainer knows a network by the denoiser around it: the SDE and the label of the time are what the loss takes.
    around = EpsDenoiser(net, sde, time=lambda t: TIME_SCALE * t)
    data = TrainingData(images, labels, num_classes=10, seed=seed)
    config = TrainConfig(steps=steps, batch_size=64, lr=2e-3, weight_decay=0.05, ema_decay=0.995, seed=seed)
    trainer = fitted(Trainer, around, data, config, folder, "--guide", loss=loss)
    if (path := folder / "classifier.safetensors").exists() and TrainedClassifier.load(path).about["steps"] >= steps:
        return TrainedClassifier.load(path)
    net = trainer.ema.net.eval().requires_grad_(False)
    accuracy = {}
    for level in LEVELS:  # sigma / alpha, each held-out digit with four draws of noise
        t = sde.time_at(torch.tensor(-math.log(level), dtype=torch.float64))
        x0, y = held_out.repeat(4, 1, 1, 1), classes.repeat(4)
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed))
        found = net(sde.perturb(x0, t, noise), torch.full((len(x0),), TIME_SCALE * float(t)))
        accuracy[f"{level:g}"] = float((found.argmax(1) == y).double().mean())
    about = {"data": "digits", "steps": steps, "accuracy": accuracy}
    guide = TrainedClassifier.of(net, sde, (1, 8, 8), TIME_SCALE, about)
    guide.save(path)
    return TrainedClassifier.load(path)


def sweep(denoiser: Denoiser, guide: TrainedClassifier, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Scores of each row, and its first digits, kept in --out/rows.jsonl as they are found."""
    held_out = split()[1][0]
    clean, features = load_classifier(WEIGHTS["digits"])[0], classifier_features("digits")
    label = torch.arange(args.samples) % 10
    made_for = {
        name: getattr(args, name) for name in ("samples", "steps", "seed", "train_steps", "guide_steps", "halves")
    }
    key = lambda row: (row["conditional"], row["form"], row["scale"])  # noqa: E731
    kept = Cells(args.out / "rows.jsonl", "examples/classifier_guidance.py", "rows", made_for, key)
    for conditional, model in ((False, Conditioned(denoiser, label=10)), (True, denoiser)):
        for form, solver in FORMS.items():
            for scale in args.scales:
                if (conditional, form, scale) in kept.done:
                    continue
                guided = guide.guide(model, scale, conditional=conditional)
                shape, cond = (args.samples, *held_out.shape[1:]), {"label": label}
                x = sample(guided, shape, solver, steps=args.steps, seed=args.seed, cond=cond).x.clamp(-1, 1)
                found = evaluate(x, held_out, list(SCORES)[:-1], features, k=3, halves=args.halves, floors=0)
                p = clean.accuracy(x, label)
                scores = {name: [round(score.value, 4), round(score.stderr, 4)] for name, score in found.scores.items()}
                scores["accuracy"] = [p, round(math.sqrt(p * (1 - p) / args.samples), 4)]
                shown = to_levels(x[:10]).flatten().tolist()
                kept.write({"conditional": conditional, "form": form, "scale": scale, **scores, "digits": shown})
                print(conditional, form, scale, scores, flush=True)
    return [kept.done[conditional, form, s] for conditional in (False, True) for form in FORMS for s in args.scales]


def real(floors: int) -> dict[str, list[float]]:
    """The scores of 500 training digits against those held out; entropy score and accuracy of these themselves."""
    training, (held_out, classes) = split()[0][0], split()[1]
    clean, features = load_classifier(WEIGHTS["digits"])[0], classifier_features("digits")
    found = evaluate(held_out, held_out, list(SCORES)[:-1], features, floor=training, k=3, floors=floors, halves=0)
    scores = {name: [round(score.floor, 4), round(score.floor_std, 4)] for name, score in found.scores.items()}
    assert features.logits is not None
    scores["entropy_score"] = [round(entropy_score(features.logits(held_out)), 4), math.nan]
    return {**scores, "accuracy": [clean.accuracy(held_out, classes), math.nan]}


def report(results: dict[str, Any]) -> str:
    """The tables, as Markdown."""
    guide = results["guide"]

    def cell(name: str, value: float, error: float) -> str:
        digits = 3 if name in ("precision", "recall", "accuracy") else 2
        return f"{value:.{digits}f}" + ("" if math.isnan(error) else f" +- {error:.{digits}f}")

    rows = [
        ["yes" if row["conditional"] else "no", row["form"], f"{row['scale']:g}", *(cell(n, *row[n]) for n in SCORES)]
        for row in results["rows"]
    ]
    rows.append(["real digits", "", "", *(cell(name, *results["real"][name]) for name in SCORES)])
    head = ["conditional", "form", "scale", *SCORES.values()]
    published = table(
        ["conditional", "scale", "FID", "sFID", "Inception score", "precision", "recall"],
        [[*row[:2], *(f"{x:.2f}" for x in row[2:])] for row in PUBLISHED],
    )
    levels = ", ".join(f"{p:.1%} at {level}" for level, p in guide["accuracy"].items())
    return f"""# Classifier guidance on the digits

{place(results)}

A classifier of noisy digits, trained for {guide["steps"]} steps on 1,297 of them, finds the class of the 500 held-out
ones in {levels} (noise level sigma / alpha). It guides the model of
[classifier-free guidance](../guidance/README.md), which is told the class ("conditional": yes) or nothing (no).
{results["samples"]} digits for each row, {results["steps"]} steps, from the same x_T, against 500 held-out digits in
the features of the package's classifier of clean digits, which has no part in the guidance; d = 64, spatial features
(its last convolution, before they are brought together) d = 256; nearest neighbours with k = 3. The entropy score is
the Inception score's formula with that classifier, at most 10, and accuracy is how often it finds the class asked for.
Standard errors are of one row by itself: rows share x_T and the held-out digits, so that they differ from each
other by less chance than that. Real digits: 500 of the training set (with the standard deviation over choices of them),
which the classifier knows by heart, so that their distances are no floor; entropy score and accuracy are those of the
held-out digits.

{chr(10).join(table(head, rows))}

![Digits of each scale and class, and the scores](classifier_guidance.png)

## What was published

Dhariwal and Nichol (2021, table 4): ImageNet at 256 pixels, in Inception's features. Other data, another network and
other features: the directions may be compared, not the numbers.

{chr(10).join(published)}

{conclusions(results)}"""


def conclusions(results: dict[str, Any]) -> str:
    """What of the published directions is found here: a difference within two of its standard errors is a tie."""
    rows = {(row["conditional"], row["form"], row["scale"]): row for row in results["rows"]}
    low, high = min(row["scale"] for row in results["rows"]), max(row["scale"] for row in results["rows"])
    published = {(row[0] == "yes", float(row[1])): dict(zip(SCORES, row[2:], strict=False)) for row in PUBLISHED}
    lines = []
    for conditional in (False, True):
        for a, b in ((low, 1.0), (low, high)):
            if (conditional, a) not in published or (conditional, b) not in published or a == b:
                continue
            cells = [f"{'conditional' if conditional else 'unconditional'}, {a:g} to {b:g}"]
            for name in list(SCORES)[:-1]:
                theirs = published[conditional, b][name] - published[conditional, a][name]
                found = []
                for form in FORMS:
                    if (conditional, form, b) not in rows:
                        continue
                    (x, dx), (y, dy) = rows[conditional, form, a][name], rows[conditional, form, b][name]
                    tie = abs(y - x) <= 2 * math.hypot(dx, dy)
                    found.append("tie" if tie else "same" if (y - x > 0) == (theirs > 0) else "opposite")
                cells.append(f"{'up' if theirs > 0 else 'down'}: {', '.join(found)}")
            lines.append(cells)
    if not lines:
        return ""
    head = ["from which scale to which", *list(SCORES.values())[:-1]]
    return f"""Whether a score moves the way that the published one does, for {" and ".join(FORMS)}; a difference within
two standard errors of a difference of independent rows is a tie:

{chr(10).join(table(head, lines))}
"""


def draw(rows: list[dict[str, Any]], results: dict[str, Any], path: Path) -> None:
    scales = sorted({row["scale"] for row in rows})
    form = next(iter(FORMS))
    shown = [row for row in rows if row["form"] == form]
    digits = torch.cat(
        [scaled(torch.tensor(row["digits"], dtype=torch.uint8).reshape(-1, 1, 8, 8), 256) for row in shown]
    )
    names = {False: "unconditional", True: "conditional"}
    with picture(path, 15, 0.6 * len(shown) + 1.2) as figure:
        left, right = figure.subfigures(1, 2, width_ratios=[1, 1.5])
        axis = left.subplots()
        draw_grid(axis, digits, [f"{names[row['conditional']]}, {row['scale']:g}" for row in shown])
        axis.set_title(f"digits 0 to 9 asked for, {form}, the same noise in a column", fontsize=10)

        for axis, (name, title) in zip(right.subplots(2, 3, sharex=True).flat, SCORES.items(), strict=True):
            for conditional, color in ((False, ORANGE), (True, BLUE)):
                for other, line in zip(FORMS, ("-", "--"), strict=False):
                    own = [row[name] for row in rows if row["conditional"] == conditional and row["form"] == other]
                    style = {"color": color, "linestyle": line, "marker": "o", "markersize": 4, "linewidth": 1.5}
                    values, errors = zip(*own, strict=True)
                    axis.errorbar(range(len(scales)), values, errors, label=f"{names[conditional]}, {other}", **style)
            axis.axhline(results["real"][name][0], color="0.4", linestyle=":", label="real digits")
            axis.set_xticks(range(len(scales)), labels=[f"{scale:g}" for scale in scales])
            axis.set_title(title, fontsize=10)
            axis.spines[["top", "right"]].set_visible(False)
            if name in ("precision", "recall", "accuracy"):
                axis.set_ylim(top=1.03)
                axis.set_xlabel("scale of the classifier's gradient")
            elif name != "entropy_score":
                axis.set_ylim(bottom=0)
        handles, labels = axis.get_legend_handles_labels()
        right.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)


if __name__ == "__main__":
    main()
