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
import importlib.util
import time
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from series import cell, kept, mean_and_error, read_csv, spent, trained
from sklearn.metrics import roc_auc_score
from torch import Tensor

from scoresde.data import windows
from scoresde.denoiser import NetworkDenoiser
from scoresde.forecasting import step_log_prob
from scoresde.info import environment
from scoresde.metrics import PCA
from scoresde.noise import derive_seed
from scoresde.report import table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LATE = 32  # steps, at 64 a second
STRETCH = 96
SCORES = ("-log p", "residual", "PCA")


def of_aeon(name: str) -> tuple[Tensor, Tensor]:
    """Values (L, d) and labels (L,) of a file in the package, which need not be imported for it."""
    found = importlib.util.find_spec("aeon")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("the data are in the package aeon: pip install scoresde[series], or give --data")
    return read_csv(Path(found.submodule_search_locations[0]) / "datasets" / "data" / name)


# --- scores ----------------------------------------------------------------------------------------------------------


def smoothed(x: Tensor, width: int) -> Tensor:
    """The mean of the steps around each, (K,)."""
    at = torch.arange(len(x))
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), x.double().cumsum(0)])
    low, high = (at - width // 2).clamp(min=0), (at + (width + 1) // 2).clamp(max=len(x))
    return (sums[high] - sums[low]) / (high - low)


def scores(
    model: NetworkDenoiser, pca: PCA, y: Tensor, w: int, args: argparse.Namespace, seed: int
) -> dict[str, Tensor]:
    """Of the steps after the first --context of y, (L, d): each score, averaged over w, and the error of -log p."""
    C = args.context
    parts = windows(y, C + 1).float().split(1000)
    found = [step_log_prob(model, part, C, steps=args.nfe, probes=args.probes,
                           seed=derive_seed(seed, k)) for k, part in enumerate(parts)]  # fmt: skip
    value, stderr = (torch.cat([getattr(part, name)[:, 0] for part in found]) for name in ("value", "stderr"))
    forecast = torch.cat([expected(model, part[:, :-1]) for part in parts])
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


def expected(model: NetworkDenoiser, past: Tensor) -> Tensor:
    """E[x_k | past]: what the denoiser makes of pure noise, where x_t says nothing."""
    with torch.no_grad():
        return model(torch.zeros_like(past[:, 0]), model.sde.t_max, past=past).mean.double()


def components(y: Tensor, width: int) -> PCA:
    """The principal components of windows that hold 95 % of their variance."""
    flat = windows(y, width).flatten(1)
    share = torch.linalg.svdvals(flat - flat.mean(0)).square().cumsum(0)
    return PCA(flat, int((share < 0.95 * share[-1]).sum()) + 1)


def spoiled(y: Tensor, kind: str, seed: int, least: int) -> tuple[Tensor, Tensor]:
    """Stretches of one sensor's three numbers stuck or late, with their labels; none before `least`."""
    generator = torch.Generator().manual_seed(seed)
    y, label = y.clone(), torch.zeros(len(y), dtype=torch.bool)
    sensor = torch.arange(min(3, y.shape[1])) + 3 * int(torch.randint(max(1, y.shape[1] // 3), (), generator=generator))
    for start in range(least + STRETCH, len(y) - STRETCH, 5 * STRETCH):
        k = start + int(torch.randint(STRETCH, (), generator=generator))
        stretch = torch.arange(k, min(k + STRETCH, len(y)))
        y[stretch[:, None], sensor] = y[k, sensor] if kind == "stuck" else y[stretch[:, None] - LATE, sensor].clone()
        label[stretch] = True
    return y, label


# --- what is measured ------------------------------------------------------------------------------------------------


def one_window(name: str, y: Tensor, label: Tensor, train: int, args: argparse.Namespace) -> tuple[dict, dict]:
    """A series with labels: whether each score is highest inside them, and its AUC step by step."""
    start = time.perf_counter()
    model, pca, w = fitted(name, y[:train], args.smooth[0], args)
    known = label[train + args.context :]
    found = scores(model, pca, y[train:], w, args, args.seed)
    again = scores(model, pca, y[train:], w, args, args.seed + 1)
    near = smoothed(known.double(), 2 * w) > 0  # a score of so many steps is of one of these
    rows = {
        key: {"inside": bool(known[found[key].argmax()]), "near": bool(near[found[key].argmax()]),
              "peak": int(found[key].argmax()) + train + args.context,
              "above": float(found[key][near].max() / found[key][~near].max()), "auc": auc(known, found[key])}
        for key in SCORES
    }  # fmt: skip
    at = int(found["-log p"].argmax())
    about = {
        "rows": rows,
        "window": [int(label.nonzero()[0]), int(label.nonzero()[-1])],
        "steps": len(known),
        "peak": [float(found["-log p"][at]), float(found["stderr"][at])],
        "next": float(found["-log p"][~near].max()),
        "median_stderr": float(found["stderr"].median()),
        "auc_again": auc(known, again["-log p"]),
        "seconds": {"train": spent(args.out / "models" / name), "all": round(time.perf_counter() - start, 1)},
    }
    return about, {"y": y[train + args.context :], "label": known, **found}


def many_stretches(name: str, y: Tensor, train: int, args: argparse.Namespace) -> tuple[dict, dict]:
    """A series with stretches that are spoiled: AUC step by step, over draws of them."""
    start = time.perf_counter()
    model, pca, w = fitted(name, y[:train], args.smooth[1], args)
    rows: dict[str, Any] = {}
    shown: dict[str, Tensor] = {}
    for kind in ("stuck", "late"):
        drawn: dict[str, list[float]] = {key: [] for key in SCORES}
        for k in range(args.draws):
            bad, label = spoiled(y[train:], kind, derive_seed(args.seed, k), args.context)
            found = scores(model, pca, bad, w, args, derive_seed(args.seed, k))
            for key in SCORES:
                drawn[key].append(auc(label[args.context :], found[key]))
            shown = {"y": bad[args.context :], "label": label[args.context :], **found}
        values = {key: torch.tensor(value).double() for key, value in drawn.items()}
        rows[kind] = {key: mean_and_error(value) for key, value in values.items()}
        rows[kind]["lead"] = mean_and_error(values["-log p"] - values["PCA"])
    seconds = {"train": spent(args.out / "models" / name), "all": round(time.perf_counter() - start, 1)}
    about = {"rows": rows, "components": pca.axes.shape[1], "median_stderr": float(shown["stderr"].median())}
    return about | {"steps": len(y) - train - args.context, "seconds": seconds}, shown


def fitted(name: str, y: Tensor, w: int, args: argparse.Namespace) -> tuple[NetworkDenoiser, PCA, int]:
    model = trained(windows(y, args.context + 32), None, args.out / "models" / name, context=args.context,
                    steps=args.train_steps, scaled=False, seed=args.seed)  # fmt: skip
    return model, components(y, w), w


def auc(label: Tensor, score: Tensor) -> float:
    return float(roc_auc_score(label.numpy(), score.numpy()))


def standardised(x: Tensor, train: int) -> Tensor:
    return (x - x[:train].mean(0)) / x[:train].std(0)


def draw(shown: dict[str, dict[str, Tensor]], path: Path) -> None:
    """Of each series its first number, and each score, with what is labelled in red."""
    figure, axes = plt.subplots(4, len(shown), figsize=(6 * len(shown), 7), squeeze=False, layout="constrained")
    for column, (name, found) in enumerate(shown.items()):
        label = found["label"]
        middle = int(label.nonzero()[0]) if int(label.sum()) < 100 else 1000
        part = slice(max(0, middle - 800), middle + 800)
        for row, key in enumerate(("y", *SCORES)):
            axis, values = axes[row, column], found[key][part]
            at = np.arange(len(values))
            axis.plot(at, values[:, 0] if key == "y" else values, lw=0.7)
            axis.set_title(f"{name}: {'first number' if key == 'y' else key}", fontsize=9)
            if key == "-log p":
                error = 2 * found["stderr"][part]
                axis.fill_between(at, values - error, values + error, color="k", alpha=0.3, lw=0)
            whole = axis.get_xaxis_transform()
            axis.fill_between(at, 0, 1, where=label[part], transform=whole, color="r", alpha=0.25, lw=0)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def report(results: dict[str, Any]) -> str:
    about, lines = results["environment"], []
    for name, found in results["series"].items():
        seconds, error = found["seconds"], f"{found['median_stderr']:.3f}"
        lines += [f"## {name}", "", f"{found['steps']} steps are scored; {seconds['train']} s of training, "
                  f"{seconds['all']} s in all. The error bar of -log p, the median step's, is {error} nats, of "
                  f"{results['probes']} probe(s).", ""]  # fmt: skip
        if "window" in found:
            low, high = found["window"]
            lines += [f"Labelled are the steps {low} to {high}. The highest score is {cell(found['peak'])} nats, "
                      f"elsewhere it is {found['next']:.3f}; with other probes the AUC of -log p is "
                      f"{found['auc_again']:.4f}.", ""]  # fmt: skip
            head = ["score", "highest at", "inside", "within a smoothing", "times the next", "AUC"]
            rows = [[key, row["peak"], *("yes" if row[k] else "no" for k in ("inside", "near")), f"{row['above']:.2f}",
                     f"{row['auc']:.4f}"] for key, row in found["rows"].items()]  # fmt: skip
        else:
            head = ["spoiled", *(f"AUC, {key}" for key in SCORES), "-log p less PCA"]
            rows = [[kind, *(cell(value) for value in row.values())] for kind, row in found["rows"].items()]
        lines += [*table(head, rows), ""]
    return f"""# Anomalies by likelihood

`{about["command"]}`: {about["device"]}, {about["threads"]} thread(s), {about["dtype"]}; torch {about["torch"]},
scoresde {about["scoresde"]}, commit {about["commit"]}.

The score of a step is -log p given the {results["context"]} before it, averaged over {results["smooth"][0]} steps
(where stretches are spoiled over {results["smooth"][1]}), after {results["train_steps"]} steps of training on a stretch
in which all is well: `examples/anomalies.py` says what the series and the other scores are. In brackets the standard
error: of the probes, or over {results["draws"]} draws of the stretches.

![The series and the scores, what is labelled in red](anomalies.png)

{chr(10).join(lines)}"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/anomalies"), help="results, and the runs")
    parser.add_argument("--data", type=Path, help="a CSV file instead: numbers, and labels in a column is_anomaly")
    parser.add_argument(
        "--train", type=int, default=1200, help="of --data, its first steps, in which all is well (1200)"
    )
    parser.add_argument("--context", type=int, default=64, help="steps that are seen (64)")
    parser.add_argument("--smooth", type=int, nargs=2, default=[16, 64], metavar="W",
                        help="steps a score is averaged over: a pulse; of stretches, a stride (16 64)")  # fmt: skip
    parser.add_argument("--nfe", type=int, default=20, help="evaluations of a log-likelihood (20)")
    parser.add_argument(
        "--probes", type=int, default=2, help="of its trace, where there are more numbers in a step (2)"
    )
    parser.add_argument("--draws", type=int, default=5, help="of stretches to spoil (5)")
    parser.add_argument("--train-steps", type=int, default=3000, help="of 64 windows (3000)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, training, stretches and probes (0)")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    found = {}
    if args.data:
        x, label = read_csv(args.data)
        y = standardised(x, args.train)
        found[args.data.stem] = (one_window(args.data.stem, y, label, args.train, args) if label.any() else
                                 many_stretches(args.data.stem, y, args.train, args))  # fmt: skip
    else:
        x, label = of_aeon("KDD-TSAD_135/135_UCR_Anomaly_InternalBleeding16_TEST.csv")
        found["bleeding"] = one_window("bleeding", standardised(x[1:] - x[:-1], 1199), label[1:], 1199, args)
        x, _ = of_aeon("Daphnet_S06R02E0/S06R02E0.csv")
        found["walking"] = many_stretches("walking", standardised(x[1500:6900], 3000), 3000, args)
    results = {"environment": environment(), "series": {name: row for name, (row, _) in found.items()},
               **{key: getattr(args, key) for key in ("context", "smooth", "nfe", "probes", "draws")},
               "train_steps": args.train_steps, "seed": args.seed}  # fmt: skip
    kept(args.out / "results.json", results)
    (args.out / "README.md").write_text(report(results))
    draw({name: picture for name, (_, picture) in found.items()}, args.out / "anomalies.png")
    print("\n" + report(results))


if __name__ == "__main__":
    main()
