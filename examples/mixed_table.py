"""Rows of numbers and categories under one model: a diffusion of a product of a continuous and a categorical part.

    python examples/mixed_table.py            --help

The numbers of a row go to Gaussian noise and its categories to masks, in one time; a network that sees both says what
is known of either, and every term of the bound on log p(row) is the sum of the parts'. Rows are those of scikit-learn's
measurements of tumours, ten numbers and a diagnosis, or of a CSV file of your own: a column with a word in it is one of
categories. Beside the bound on held-out rows stand columns by themselves, and a Gaussian for each value of the first
categories: what a model must know of how numbers and categories go together.

Writes mixed_table.png, results.json and README.md into --out; the network into --models, from which a killed run goes
on.
"""

from __future__ import annotations

import csv
import time
from pathlib import Path

import torch
from shared import arguments, cell, fitted, mean_and_error, picture, place, publish, ran, seeded
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

from scoresde import VPSDE, elbo, sample
from scoresde.categorical import Ancestral, CategoricalProcess, ProductDenoiser, ProductProcess
from scoresde.nn import MLP, Columns
from scoresde.report import table
from scoresde.training import TrainConfig, Trainer


def main(argv: list[str] | None = None) -> None:
    parser = arguments(
        __doc__,
        "mixed_table",
        models=(Path("runs/mixed_table"), "folder of the network"),
        data=(Path, "a CSV file with a line of names, in place of scikit-learn's tumours"),
        train_steps=(3000, "training steps"),
        samples=(1000, "rows that are drawn"),
        steps=(200, "of drawing them"),
        draws=(512, "of the bound, for each row"),
    )
    args, start = parser.parse_args(argv), time.perf_counter()
    names, numbers, states = rows(args.data)
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(0))
    cut, n, m, K = len(numbers) * 4 // 5, numbers.shape[1], states.shape[1], int(states.max()) + 1
    mean, std = numbers[order[:cut]].mean(0), numbers[order[:cut]].std(0)
    whole = torch.cat([(numbers - mean) / std, states.double()], 1)[order].float()
    known, held = whole[:cut], whole[cut:]

    process = ProductProcess(VPSDE(), CategoricalProcess.absorbing(K), continuous=n)
    net = seeded(lambda: Columns(MLP(n + m * (K + 1), depth=2), categorical=m, states=K + 1), args.seed)
    config = TrainConfig(args.train_steps, 128, 1e-3, weight_decay=0.1, ema_decay=0.998, seed=args.seed, threads=1)
    denoiser = ProductDenoiser(net, process, time=scaled)
    denoiser = fitted(Trainer, denoiser, known, config, args.models / "network").ema
    bound = elbo(denoiser, held, draws=args.draws, seed=args.seed)
    drawn = sample(denoiser, (args.samples, n + m), Ancestral(), steps=args.steps, seed=args.seed).x
    nats = {
        "product diffusion, a bound": bound.value,
        "a Gaussian for each category": by_category(known, held, n, K),
        "columns by themselves": alone(known, held, n, K),
    }
    results = {
        "rows": [len(known), len(held), n, m],
        "nats": {name: mean_and_error(value) for name, value in nats.items()},
        "terms": {name: float(getattr(bound, name).mean()) for name in ("prior", "denoising", "reconstruction")},
        "correlations": [gap(x, known, n) for x in (drawn, held)],
        "agreement": [agreement(known, x, n) for x in (held, drawn)],
        **ran(args.models, {"network": denoiser}, start),
    }
    publish(args, "mixed_table", results, report, lambda path: draw(names, held, drawn, n, path))


def scaled(t: Tensor) -> Tensor:
    """The network's label of t."""
    return 999 * t


def rows(path: Path | None) -> tuple[list[str], Tensor, Tensor]:
    """Names, numbers first, then categories; the numbers, float64 (N, n); the categories as states, (N, m)."""
    if path is None:
        from sklearn.datasets import load_breast_cancer

        found = load_breast_cancer()
        columns = dict(zip(found.feature_names[:10].tolist(), found.data.T[:10].astype(str).tolist(), strict=True))
        columns["diagnosis"] = found.target_names[found.target].tolist()
    else:
        with path.open(newline="") as file:
            lines = list(csv.DictReader(file))
        columns = {name: [line[name] for line in lines] for name in lines[0]}
    numbers, states = {}, {}
    for name, values in columns.items():
        try:
            numbers[name] = [float(value) for value in values]
        except ValueError:
            kinds = sorted(set(values))
            states[name] = [kinds.index(value) for value in values]
    if not numbers or not states:
        raise SystemExit("the table needs columns of numbers and of words")
    stacked = [torch.tensor(list(of.values())).T for of in (numbers, states)]
    return [*numbers, *states], stacked[0].double(), stacked[1].long()


def alone(known: Tensor, held: Tensor, n: int, K: int) -> Tensor:
    """log p of rows, each column by itself: Gaussian, or the shares of its categories."""
    law = Normal(known[:, :n].mean(0), known[:, :n].std(0))
    value = law.log_prob(held[:, :n]).sum(1)
    for j in range(n, known.shape[1]):
        value = value + shares(known[:, j], K).log()[held[:, j].long()]
    return value


def by_category(known: Tensor, held: Tensor, n: int, K: int) -> Tensor:
    """log p of rows: a Gaussian of the numbers for each of the first categories, the others by themselves."""
    value = alone(known, held, n, K) - Normal(known[:, :n].mean(0), known[:, :n].std(0)).log_prob(held[:, :n]).sum(1)
    for k in known[:, n].unique():
        of = known[known[:, n] == k, :n].double()
        covariance = of.T.cov() + 1e-3 * torch.eye(n, dtype=torch.float64)
        which = held[:, n] == k
        value[which] += MultivariateNormal(of.mean(0), covariance).log_prob(held[which, :n].double()).float()
    return value


def shares(column: Tensor, K: int) -> Tensor:
    """Of the categories, none zero."""
    return (torch.bincount(column.long(), minlength=K) + 0.5) / (len(column) + 0.5 * K)


def gap(x: Tensor, known: Tensor, n: int) -> float:
    """The mean absolute difference of the correlations of all columns, categories by their numbers."""
    return float((x.T.corrcoef() - known.T.corrcoef()).abs().mean())


def agreement(known: Tensor, x: Tensor, n: int) -> float:
    """The share of rows whose first category is what a logistic regression of real rows says of their numbers."""
    from sklearn.linear_model import LogisticRegression

    judge = LogisticRegression(max_iter=2000).fit(known[:, :n].numpy(), known[:, n].numpy())
    return float(judge.score(x[:, :n].numpy(), x[:, n].numpy()))


def report(results: dict) -> str:
    """The numbers, as Markdown."""
    known, held, n, m = results["rows"]
    lines = [[name, cell(found)] for name, found in results["nats"].items()]
    terms = ", ".join(f"{name} {value:.2f}" for name, value in results["terms"].items())
    (ours, theirs), (real, drawn) = results["correlations"], results["agreement"]
    return f"""# Rows of numbers and categories

{place(results)}

Columns: {n} of numbers, {m} of categories; {known} rows to learn from, {held} held out. log p of a held-out row in
nats, numbers in units of their standard deviations; in brackets the standard error over the rows.

{chr(10).join(table(["", "nats a row"], lines))}

The bound's terms: {terms}. Of {results["samples"]} rows that were drawn in {results["steps"]} steps, the correlations
of columns differ from those of the known rows by {ours:.3f} in the mean, those of the held-out rows by {theirs:.3f}. A
logistic regression of known rows finds the category of {100 * real:.1f} % of held-out rows from their numbers, of
{100 * drawn:.1f} % of drawn ones.

![Two columns of numbers by category, held-out rows and drawn ones](mixed_table.png)
"""


def draw(names: list[str], held: Tensor, drawn: Tensor, n: int, path: Path) -> None:
    """The first two numbers by the first category."""
    with picture(path, 9, 4.2) as figure:
        axes = figure.subplots(1, 2, sharex=True, sharey=True)
        for axis, x, title in zip(axes, (held, drawn[: 3 * len(held)]), ("held-out rows", "drawn rows"), strict=True):
            axis.scatter(x[:, 0], x[:, 1], c=x[:, n], s=9, cmap="coolwarm")
            axis.set(title=f"{title}, by {names[n]}", xlabel=names[0], ylabel=names[1])


if __name__ == "__main__":
    main()
