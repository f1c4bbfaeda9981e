"""What is unlikely, given what came before: the log-likelihood of each step, with its error bar, as an anomaly score.

    python examples/anomalies.py        some minutes on one quiet core; --help. Needs `pip install scoresde[series]`

A diffusion of each step, told the state of a recurrent network (as examples/forecasting.py), is trained on a stretch in
which all is well. Score of a step: -log p(x_k | x_{k-C}, ..., x_{k-1}), by the probability-flow ODE. Beside it, from
the same data:

    residual    |x_k - E[x_k | ...]| of the same model, its forecast being what it makes of pure noise in one evaluation
    PCA         squared distance of a window of steps from the principal components that hold 95 % of the variance

Every score is averaged over the --smooth steps around it, and windows of PCA have that length: all see the same.

    bleeding    a pulse wave in which a few steps were spoiled, of the archive of Wu and Keogh (KDD-TSAD 135, in aeon):
                is the highest score inside the labelled window?
    walking     nine accelerometers of a patient who walks (Daphnet S06R02E0, in aeon). The file that aeon has labels no
                step, so that there is no AUC of it as it is: here some stretches of the part that is not trained on are
                spoiled, and known. The three numbers of one sensor stand still ("stuck"), or lag behind by half a
                second ("late"), in which each number by itself looks well.

Writes anomalies.png, results.json and README.md into --out. A run that is killed goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from series import model, of_aeon, read_csv, spoiled, trained
from shared import BLUE, ORANGE, arguments, cell, mean_and_error, picture, place, publish, spent
from sklearn.metrics import roc_auc_score
from torch import Tensor

from scoresde.data import windows
from scoresde.denoiser import NetworkDenoiser
from scoresde.forecasting import step_log_prob
from scoresde.metrics import PCA
from scoresde.noise import derive_seed
from scoresde.report import table

SCORES = ("-log p", "residual", "PCA")


# --- scores ----------------------------------------------------------------------------------------------------------


def smoothed(x: Tensor, width: int) -> Tensor:
    """The mean of the steps around each, (K,)."""
    at = torch.arange(len(x))
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), x.double().cumsum(0)])
    low, high = (at - width // 2).clamp(min=0), (at + (width + 1) // 2).clamp(max=len(x))
    return (sums[high] - sums[low]) / (high - low)


def scores(denoiser: NetworkDenoiser, pca: PCA, y: Tensor, *, w: int, args: Any, seed: int) -> dict[str, Tensor]:
    """Of the steps after the first --context of y, (L, d): each score, averaged over w, and the error of -log p."""
    C = args.context
    parts = windows(y, C + 1).float().split(1000)
    how = {"steps": args.nfe, "probes": args.probes}
    found = [step_log_prob(denoiser, part, C, seed=derive_seed(seed, k), **how) for k, part in enumerate(parts)]
    value, stderr = (torch.cat([getattr(part, name)[:, 0] for part in found]) for name in ("value", "stderr"))
    forecast = torch.cat([expected(denoiser, part[:, :-1]) for part in parts])
    residual = (y[C:] - forecast).norm(dim=1)
    around = (torch.arange(len(y) - C) - w // 2).clamp(0, len(y) - C - w)
    flat = windows(y[C:], w).flatten(1)[around]
    distance = (flat - pca.mean - pca(flat) @ pca.axes.T).square().sum(1)
    return {
        "-log p": smoothed(-value, w),
        "residual": smoothed(residual, w),
        "PCA": distance,
        "stderr": smoothed(stderr.double().square(), w).mul(1 / w).sqrt(),
    }


def expected(denoiser: NetworkDenoiser, past: Tensor) -> Tensor:
    """E[x_k | past]: what the denoiser makes of pure noise, where x_t says nothing."""
    with torch.no_grad():
        return denoiser(torch.zeros_like(past[:, 0]), denoiser.sde.t_max, past=past).mean.double()


def components(y: Tensor, width: int) -> PCA:
    """The principal components of windows that hold 95 % of their variance."""
    flat = windows(y, width).flatten(1)
    share = torch.linalg.svdvals(flat - flat.mean(0)).square().cumsum(0)
    return PCA(flat, int((share < 0.95 * share[-1]).sum()) + 1)


# --- what is measured ------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    parser = arguments(
        __doc__, "anomalies", data=(Path, "a CSV file instead: numbers, and labels in a column is_anomaly"),
        train=(1200, "of --data, its first steps, in which all is well"), context=(64, "steps that are seen"),
        smooth=((16, 64), "steps that a score is averaged over: of a pulse; where stretches are spoiled, of a stride"),
        nfe=(20, "evaluations of a log-likelihood"), probes=(2, "of its trace, where a step has several numbers"),
        draws=(10, "of stretches to spoil"), train_steps=(3000, "of 32 windows"),
    )  # fmt: skip
    args = parser.parse_args(argv)
    if args.data:
        x, label = read_csv(args.data)
        sources = {args.data.stem: (x, label, args.train)}
    else:
        pulse, label = of_aeon("KDD-TSAD_135/135_UCR_Anomaly_InternalBleeding16_TEST.csv")
        walk, _ = of_aeon("Daphnet_S06R02E0/S06R02E0.csv")
        sources = {"bleeding": (pulse[1:] - pulse[:-1], label[1:], 1199),  # changes from step to step
                   "walking": (walk[1500:6900], torch.zeros(5400, dtype=torch.bool), 3000)}  # fmt: skip
    start = time.perf_counter()
    found = {name: measured(name, *source, args) for name, source in sources.items()}
    seconds = {name: spent(args.out / "models" / name) for name in sources}
    seconds["measure"] = time.perf_counter() - start - sum(seconds.values())
    results = {
        "seconds": seconds,
        "smooth": list(args.smooth),
        "series": {name: row for name, (row, _) in found.items()},
    }
    publish(args, "anomalies", results, report, partial(draw, {name: shown for name, (_, shown) in found.items()}))


def measured(name: str, x: Tensor, label: Tensor, train: int, args: argparse.Namespace) -> tuple[dict, dict]:
    """Of a series whose first `train` steps are well: how its labels are found, or, without labels, what is spoiled."""
    y = (x - x[:train].mean(0)) / x[:train].std(0)
    denoiser = trained(
        model(y.shape[1], y.shape[1], 32, False, args.seed), windows(y[:train], args.context + 32),
        args.out / "models" / name, context=args.context, steps=args.train_steps, seed=args.seed,
    )  # fmt: skip
    w = args.smooth[0 if label.any() else 1]
    of = partial(scores, denoiser, components(y[:train], w), w=w, args=args)
    first = train + args.context
    rows: dict[str, Any] = {}
    if label.any():
        found, known = of(y[train:], seed=args.seed), label[first:]
        near = smoothed(known.double(), 2 * w) > 0  # a score of so many steps is of one of these
        for key in SCORES:
            at, best = int(found[key].argmax()), found[key][near].max()
            rows[key] = {"peak": at + first, "inside": bool(known[at]), "near": bool(near[at]),
                         "ratio": float(best / found[key][~near].max()), "auc": auc(known, found[key])}  # fmt: skip
        again = of(y[train:], seed=args.seed + 1)
        about = {"window": [int(label.nonzero()[0]), int(label.nonzero()[-1])],
                 "auc_again": auc(known, again["-log p"])}  # fmt: skip
        shown = {"y": y[first:], "label": known, **found}
    else:
        about = {}
        for kind in ("stuck", "late"):
            drawn: dict[str, list[float]] = {key: [] for key in SCORES}
            for seed in (derive_seed(args.seed, k) for k in range(args.draws)):
                bad, known = spoiled(y[train:], kind, seed, args.context)
                found, known = of(bad, seed=seed), known[args.context :]
                for key in SCORES:
                    drawn[key].append(auc(known, found[key]))
                shown = {"y": bad[args.context :], "label": known, **found}
            values = {key: torch.tensor(value) for key, value in drawn.items()}
            rows[kind] = {key: mean_and_error(value) for key, value in values.items()}
            rows[kind]["less PCA"] = mean_and_error(values["-log p"] - values["PCA"])
    return about | {"rows": rows, "steps": len(y) - first, "stderr": float(shown["stderr"].median())}, shown


def auc(label: Tensor, score: Tensor) -> float:
    return float(roc_auc_score(label.numpy(), score.numpy()))


# --- the page --------------------------------------------------------------------------------------------------------


def draw(shown: dict[str, dict[str, Tensor]], path: Path) -> None:
    """Of each series its first number, and each score, with what is labelled."""
    with picture(path, 6 * len(shown), 7, dpi=90) as figure:
        for column, (name, found) in zip(figure.subplots(4, len(shown), squeeze=False).T, shown.items(), strict=True):
            first = max(0, int(found["label"].nonzero()[0]) - 800)
            part = slice(first, first + 1600)
            for axis, key in zip(column, ("y", *SCORES), strict=True):
                values = found[key][part]
                at = np.arange(len(values)) + first
                axis.plot(at, values[:, 0] if key == "y" else values, color=BLUE, lw=0.7)
                axis.set_title(f"{name}: {'first number' if key == 'y' else key}", fontsize=9)
                if key == "-log p":
                    error = 2 * found["stderr"][part]
                    axis.fill_between(at, values - error, values + error, color="k", alpha=0.3, lw=0)
                whole, label = axis.get_xaxis_transform(), found["label"][part]
                axis.fill_between(at, 0, 1, where=label, transform=whole, color=ORANGE, alpha=0.3, lw=0)


def report(results: dict[str, Any]) -> str:
    lines = []
    for name, found in results["series"].items():
        error = f"{found['stderr']:.3f}"
        lines += [f"## {name}", "", f"{found['steps']} steps are scored. The error bar of -log p, the median step's, is"
                  f" {error} nats.", ""]  # fmt: skip
        if "window" in found:
            low, high = found["window"]
            lines += [f"Labelled are the steps {low} to {high}. With other probes the AUC of -log p is "
                      f"{found['auc_again']:.4f}.", ""]  # fmt: skip
            head = ["score", "highest at", "inside", "as near as it is averaged", "times the highest elsewhere", "AUC"]
            rows = [[key, row["peak"], *("yes" if row[k] else "no" for k in ("inside", "near")), f"{row['ratio']:.2f}",
                     f"{row['auc']:.4f}"] for key, row in found["rows"].items()]  # fmt: skip
        else:
            lines += ["The file labels no step: stretches of what was not trained on are spoiled here, and known.", ""]
            head = ["spoiled", *(f"AUC, {key}" for key in SCORES), "-log p less PCA"]
            rows = [[kind, *(cell(value, 3) for value in row.values())] for kind, row in found["rows"].items()]
        lines += [*table(head, rows), ""]
    return f"""# Anomalies by likelihood

{place(results)}

The score of a step is -log p given the {results["context"]} before it, averaged over {results["smooth"][0]} steps
(where stretches are spoiled over {results["smooth"][1]}), after {results["train_steps"]} steps of training on a stretch
in which all is well: `examples/anomalies.py` says what the series and the other scores are. The error bar is of
{results["probes"]} probe(s), and 0 where a step has one number, whose trace is exact. In brackets the standard error
over {results["draws"]} draws of the stretches.

![The series and the scores, what is labelled in orange](anomalies.png)

{chr(10).join(lines)}"""


if __name__ == "__main__":
    main()
