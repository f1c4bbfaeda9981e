"""Digits of their class that are rare: led away from the mean of the class, by two energies (Sehwag et al., 2022).

    python examples/low_density.py            eight minutes on one core, where examples/guidance.py has trained; --help

The model is that of examples/guidance.py with its guidance at w = 3, which keeps the class, and by itself leads towards
its mean. `Energy(denoiser, energy, scale, clean=True)` leads it down an energy of f(D), f being a classifier's features
and m_k the mean of class k in them:

    distance    E = -d_y,  d_k = |f - m_k|^2 / (2 s^2)    away from the mean of the own class
    contrast    E = log sum_k e^{d_k - d_y}               the same, relative to the means of the other classes

The sampler is DDPM; rows with twice the steps say what its steps cost. Rare is what is further than held-out digits
from the mean of its class and from the nearest training digit. That is measured in pixels and in the features of the
package's classifier, which guides nothing: the one that does is trained here, from another seed, and the accuracy is
the package's too.

Writes low_density.png, results.json and README.md into --out, the classifier to --guide. A run that is killed goes on
from the rows that it has.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import train_classifier
from guidance import draw_grid, split, trained
from shared import BLUE, ORANGE, arguments, picture, place, publish, spent
from torch import Tensor

from scoresde import Denoiser, sample
from scoresde.guidance import ClassifierFree, Energy, class_means, contrast, distance
from scoresde.levels import scaled, to_levels
from scoresde.metrics import Classifier, classifier_features, evaluate, load_classifier
from scoresde.metrics.classifier import WEIGHTS
from scoresde.report import Cells, table
from scoresde.solvers import DDPM

SOLVER = DDPM()
RARITY = {
    "mean_in_features": "to the mean of the class, in features",
    "mean_in_pixels": "in pixels",
    "nearest_in_features": "to the nearest training digit, in features",
    "nearest_in_pixels": "in pixels",
}
KEPT = 0.95  # of the class
NONE = "none, w = {:g}"


def main(argv: list[str] | None = None) -> None:
    parser = arguments(
        __doc__,
        "low_density",
        model=(Path("runs/guidance/model"), "run folder of the network"),
        guide=(Path("runs/guidance/guide.npz"), "file of the classifier"),
        train_steps=(2500, "training steps of the network"),
        epochs=(int, "of the classifier's training (60)"),
        weight=(3.0, "w, of classifier-free guidance"),
        distance=([0.75, 1.25, 1.5, 1.75, 2.5], "scales"),
        contrast=([1.0, 1.5, 2.0, 2.5, 3.0], "scales"),
        samples=(300, "for each row"),
        steps=(40, "of the sampler, and twice as many in a row"),
    )
    args = parser.parse_args(argv)
    denoiser = trained(args.model, args.train_steps, args.seed)
    guide = classifier(args.guide, args.epochs, args.seed + 1)
    start = time.perf_counter()
    rows, unit = sweep(denoiser, guide, args)
    results = {
        "seconds": {"train": spent(args.model), "measure": time.perf_counter() - start},
        "solver": repr(SOLVER),
        "steps": args.steps,
        "guide_accuracy": guide.accuracy(*split()[1]),
        "held_out": unit,
        "rows": [{name: value for name, value in row.items() if name != "digits"} for row in rows],
    }
    publish(args, "low_density", results, report, lambda path: draw(rows, results, path))


def classifier(path: Path, epochs: int | None, seed: int) -> Classifier:
    """The classifier whose features guide, trained as the package's was from another seed, or read from its file."""
    if not path.exists():
        config = argparse.Namespace(data="digits", epochs=epochs, seed=seed, device="cpu", lr=4e-3)
        train_classifier.train(*split()[0], config).save(path, {"data": "digits", "seed": seed})
    return load_classifier(path)[0].requires_grad_(False)


def sweep(denoiser: Denoiser, guide: Classifier, args: argparse.Namespace) -> tuple[list[dict], dict]:
    """A row for each model, energy and scale, and its first digits, kept in --out/rows.jsonl as they are found; and
    the distances of held-out digits, in whose units those of the rows are.
    """
    (training, of), (held_out, classes) = split()
    judge, features = load_classifier(WEIGHTS["digits"])[0].requires_grad_(False), classifier_features("digits")
    spaces: dict[str, Callable[[Tensor], Tensor]] = {"features": judge.embed, "pixels": lambda x: x.flatten(1)}
    means = {name: class_means(f(training), of) for name, f in spaces.items()}

    def distances(x: Tensor, label: Tensor) -> dict[str, list[float]]:
        """Means with standard errors, by the names of RARITY."""
        found = {}
        for name, f in spaces.items():
            found[f"mean_in_{name}"] = (f(x) - means[name][label]).norm(dim=1)
            found[f"nearest_in_{name}"] = torch.cdist(f(x), f(training)).amin(1)
        return {name: [float(d.mean()), float(d.std() / math.sqrt(len(d)))] for name, d in found.items()}

    unit = distances(held_out, classes)
    label = torch.arange(args.samples) % 10
    centres = class_means(guide.embed(training), of)
    s = float((guide.embed(held_out) - centres[classes]).norm(dim=1).mean())
    guided = ClassifierFree(denoiser, weight=args.weight)

    def led(name: str, scale: float) -> Denoiser:
        if name == "distance":
            return Energy(guided, distance(centres[label], guide.embed, std=s), -scale, clean=True)
        if name == "contrast":
            return Energy(guided, contrast(centres, label, guide.embed, std=s), scale, clean=True)
        return denoiser if name == NONE.format(1) else guided

    todo = [(NONE.format(1), 0.0, args.steps), (NONE.format(args.weight), 0.0, args.steps)]
    for name in ("distance", "contrast"):
        scales = getattr(args, name)
        todo += [(name, scale, args.steps) for scale in scales]
        todo.append((name, scales[len(scales) // 2], 2 * args.steps))
    made_for = {name: getattr(args, name) for name in ("weight", "samples", "steps", "seed", "train_steps", "epochs")}
    key = lambda row: (row["energy"], row["scale"], row["steps"])  # noqa: E731
    kept = Cells(args.out / "rows.jsonl", "examples/low_density.py", "rows", made_for, key)
    for name, scale, steps in todo:
        if (name, scale, steps) in kept.done:
            continue
        shape, cond = (args.samples, *held_out.shape[1:]), {"label": label}
        x = sample(led(name, scale), shape, SOLVER, steps=steps, seed=args.seed, cond=cond).x.clamp(-1, 1)
        row: dict[str, Any] = {"energy": name, "scale": scale, "steps": steps}
        for key, (value, error) in distances(x, label).items():
            mean, own = unit[key]
            ratio = value / mean
            row[key] = [round(ratio, 4), round(ratio * math.hypot(error / value, own / mean), 4)]
        p = judge.accuracy(x, label)
        row["accuracy"] = [p, round(math.sqrt(p * (1 - p) / args.samples), 4)]
        found = evaluate(x, held_out, ["precision"], features, k=3, floors=0)["precision"]
        row["precision"] = [round(found.value, 4), round(found.stderr, 4)]
        kept.write({**row, "digits": to_levels(x[:20]).flatten().tolist()})
        print(row, flush=True)
    real = {name: [round(value, 4), round(error, 4)] for name, (value, error) in unit.items()}
    return [kept.done[at] for at in todo], real


def rare(row: dict[str, Any], errors: float = 0) -> bool:
    """Whether every distance is above that of held-out digits, by so many standard errors, the class being kept."""
    return row["accuracy"][0] >= KEPT and all(row[name][0] - errors * row[name][1] > 1 for name in RARITY)


def report(results: dict[str, Any]) -> str:
    """The table, as Markdown."""
    head = ["energy", "scale", "steps", *RARITY.values(), "accuracy", "precision"]
    names = (*RARITY, "accuracy", "precision")
    rows = [
        [row["energy"], f"{row['scale']:g}", row["steps"], *("{:.3f} +- {:.3f}".format(*row[name]) for name in names)]
        for row in results["rows"]
    ]
    listed = []
    for errors in (0, 2):
        found = [row for row in results["rows"] if rare(row, errors)]
        own = [f"{row['energy']} at {row['scale']:g} with {row['steps']} steps" for row in found]
        listed.append(", ".join(own) or "none")
    text = f"""Rows with an accuracy of {KEPT:.0%} or more, looked for afterwards, whose four distances are all above
those of held-out digits: {listed[0]}. By two standard errors each: {listed[1]}."""
    return f"""# Where data is rare

{place(results)}

{results["samples"]} digits for each row, by DDPM from the same x_T, with classifier-free guidance
w = {results["weight"]:g} under the energy; "none" is without one. Two energies of the features f of a classifier
({results["guide_accuracy"]:.1%} of held-out digits right), d_k = |f - m_k|^2 / (2 s^2), m_k
being the means of the classes there and s the mean distance of held-out digits to the mean of theirs: "distance" leads
down -d_y, "contrast" down log sum_k exp(d_k - d_y). Distances are means in units of what the 500 held-out digits have,
with standard errors that count those of the held-out digits too, in pixels and in the features of the package's
classifier, which guides nothing; the accuracy, and the precision against the held-out digits (nearest neighbours with
k = 3), are that classifier's as well.

{chr(10).join(table(head, rows))}

{text}

![Digits led away from the mean of their class, and what rarity costs in accuracy](low_density.png)
"""


def draw(rows: list[dict[str, Any]], results: dict[str, Any], path: Path) -> None:
    rows = [row for row in rows if row["steps"] == results["steps"]]
    digits = scaled(torch.tensor([row["digits"] for row in rows]).reshape(-1, 1, 8, 8))
    names = [f"{row['energy']} {row['scale']:g}" if row["scale"] else row["energy"] for row in rows]
    labels = [f"{name}, {row['accuracy'][0]:.1%}" for name, row in zip(names, rows, strict=True)]
    with picture(path, 15, 0.5 * len(rows) + 1) as figure:
        left, right = figure.subfigures(1, 2, width_ratios=[1.35, 1])
        axis = left.subplots()
        draw_grid(axis, digits, labels)
        axis.set_title("the same noise in a column; energy, scale and how many are of their class", fontsize=10)

        for axis, name in zip(right.subplots(2, 2, sharey=True).flat, RARITY, strict=True):
            for energy, color, marker in (("distance", ORANGE, "s"), ("contrast", BLUE, "o")):
                own = [row for row in rows if row["energy"] in (energy, rows[1]["energy"])]
                (x, dx), (y, dy) = (zip(*(row[of] for row in own), strict=True) for of in (name, "accuracy"))
                axis.errorbar(x, y, dy, dx, color=color, marker=marker, markersize=5, linewidth=1.5, label=energy)
            (x, dx), (y, dy) = rows[0][name], rows[0]["accuracy"]
            axis.errorbar(x, y, dy, dx, color="0.3", marker="D", label="w = 1, no energy")
            axis.axvline(1, color="0.4", linestyle=":", label="held-out digits")
            axis.axhline(KEPT, color="0.7", linestyle="--", linewidth=1, label=f"{KEPT:.0%} kept")
            of, _, space = name.partition("_in_")
            axis.set_xlabel(f"to the {'mean' if of == 'mean' else 'nearest training digit'}, in {space}", fontsize=9)
            axis.spines[["top", "right"]].set_visible(False)
            if space == "features":
                axis.set_ylabel("accuracy", fontsize=9)
        right.suptitle("distances, those of held-out digits being 1", fontsize=10)
        axis.legend(frameon=False, fontsize=8, loc="lower left")


if __name__ == "__main__":
    main()
