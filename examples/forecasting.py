"""Forecasts as sample paths: a diffusion of each step, told the state of a recurrent network (TimeGrad).

    python examples/forecasting.py        some four minutes on one quiet core; --help. pip install scoresde[series]

Rasul et al. (2021, "Autoregressive denoising diffusion models for multivariate probabilistic time series forecasting"):

    h_k = RNN(x_{k-1} / s, c_k, h_{k-1}),    x_k / s ~ a diffusion that is told h_k,    s = mean |x| over the context

trained on the denoising loss of every step (algorithm 1), rolled out path by path (algorithm 2). Measured by the
continuous ranked probability score (CRPS) of forecasts from many origins in the last part of each series, which was not
trained on:

    var            x_k = A x_{k-1} + noise, whose forecasts are known exactly, and their CRPS with them
    exchange       five exchange rates by the day, 1980 to 1987 (Ecdat's Garch)
    stocks         four indices of shares by the day, 1991 to 1998 (EuStockMarkets)
    electricity    demand of Victoria by the hour in 2014, told the temperature of hours past and the calendar (fpp2)

beside a vector autoregression (statsmodels; its order by Akaike's criterion) and the season before: what came a season
earlier plus stretches of past changes, drawn at random. All of them see changes: of the logarithm from day to day, and
from the same hour of the week before. Forecasts are of the series themselves, the changes added up.

Writes forecasting.png, results.json and README.md into --out. A run that is killed goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from series import SOLVER, Series, built_in, either_sign, exact_crps, fitted_var, model, read_csv, season_paths

from series import trained, var_paths  # isort: skip
from shared import BLUE, ORANGE, arguments, cell, mean_and_error, picture, place, publish, spent
from torch import Tensor

from scoresde.data import windows
from scoresde.forecasting import rollout
from scoresde.metrics import coverage, crps, crps_sum, energy_score
from scoresde.report import table


def main(argv: list[str] | None = None) -> None:
    parser = arguments(
        __doc__, "forecasting", series=(["var", "exchange", "stocks", "electricity"], "which of them"),
        data=(Path, "a CSV file instead, a step in each row; its columns of numbers"),
        lag=(1, "of --data: changes are taken over so many steps; 0 for none"),
        horizon=(10, "of --data, steps to forecast"), context=(40, "of --data, steps that are seen"),
        share=(0.7, "of a series, its beginning, to train on"), origins=(150, "of forecasts, at most"),
        paths=(100, "of each"), nfe=(10, "evaluations of a step"), lags=(26, "highest order of the VAR"),
        train_steps=(int, "of 32 windows; by default each series has its own"),
    )  # fmt: skip
    args = parser.parse_args(argv)
    if args.data:
        x, _ = read_csv(args.data)
        chosen = {args.data.stem: Series(x, args.lag, args.horizon, args.context, x.shape[1])}
    else:
        chosen = {name: built_in(name, args.seed) for name in args.series}
    start = time.perf_counter()
    found = {name: forecast(name, series, args) for name, series in chosen.items()}
    seconds = {name: spent(args.out / "models" / name) for name in chosen}
    seconds["measure"] = time.perf_counter() - start - sum(seconds.values())
    results = {"seconds": seconds, "series": {name: row for name, (row, _) in found.items()}}
    publish(args, "forecasting", results, report, partial(draw, {name: fan for name, (_, fan) in found.items()}))


def forecast(name: str, series: Series, args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Scores of each kind of forecast, and the paths from one origin."""
    y, c, H, C = series.changes, series.calendar, series.horizon, series.context
    split, steps = int(len(y) * args.share), args.train_steps or series.steps
    drift = y[:split].mean(0) * series.drift
    learned, known = windows(y[:split] - drift, C + H), None if c is None else windows(c[:split], C + H)
    seen = y.shape[1] + (0 if c is None else c.shape[1])
    denoiser = trained(
        model(seen, y.shape[1], series.width, series.scaled, args.seed), learned, args.out / "models" / name, context=C,
        steps=steps, seed=args.seed, lr=series.lr, covariates=known, augment=either_sign if series.symmetric else None,
    )  # fmt: skip

    origins = list(range(split, len(y) - H + 1, H))[: args.origins]
    past = torch.stack([y[k - C : k] - drift for k in origins]).float()
    about = None if c is None else torch.stack([c[k - C : k + H] for k in origins]).float()
    drawn = rollout(denoiser, past, H, SOLVER, nfe=args.nfe, paths=args.paths, seed=args.seed, covariates=about).x
    fit = fitted_var(y[:split], None if c is None else c[:split], min(args.lags, C))
    changes = {
        "diffusion": drawn.double() + drift,
        "VAR": var_paths(fit, y, c, origins, H, args.paths, args.seed),
        "season before": season_paths(y[:split], len(origins), H, args.paths, args.seed),
    }
    truth = torch.stack([series.x[k + series.lag : k + series.lag + H, : series.scored] for k in origins])
    paths = {key: series.added_up(value, origins)[..., : series.scored] for key, value in changes.items()}
    scores = {key: crps(value, truth).mean((1, 2)) for key, value in paths.items()}
    rows = {key: scored(value, truth, scores["VAR"]) for key, value in paths.items()}
    found = {"rows": rows, "origins": len(origins), "horizon": H, "numbers": series.scored, "unit": series.unit,
             "order": fit.k_ar, "windows": len(learned), "steps": steps}  # fmt: skip
    if name == "var":
        exact = exact_crps(y[[k - 1 for k in origins]], truth).mean((1, 2))
        found["exact"] = mean_and_error(exact)
        found["gap"] = [value / found["exact"][0] for value in mean_and_error(scores["diffusion"] - exact)]
    shown = min(3, len(origins) - 1)
    first = origins[shown] + series.lag
    before = {"past": series.x[max(0, first - 2 * H) : first, 0], "truth": truth[shown, :, 0]}
    return found, before | {key: value[shown, :, :, 0] for key, value in paths.items()}


def scored(paths: Tensor, truth: Tensor, of_var: Tensor) -> dict[str, list[float]]:
    """The scores of paths (B, M, H, d), with their standard errors over the B origins."""
    score = crps(paths, truth).mean((1, 2))
    found = {
        "CRPS": score,
        "less than VAR": of_var - score,
        "CRPS of the sum": crps_sum(paths, truth).mean(1),
        "energy score": energy_score(paths, truth),
        **{f"in {level:.0%}": coverage(paths, truth, level).double().mean((1, 2)) for level in (0.5, 0.9)},
    }
    return {key: mean_and_error(value) for key, value in found.items()}


# --- the page --------------------------------------------------------------------------------------------------------


def draw(fans: dict[str, dict[str, Tensor]], path: Path) -> None:
    """Of each series the bands of 50 and 90 % of two forecasts."""
    with picture(path, 3.6 * len(fans), 5.2, dpi=110) as figure:
        axes = figure.subplots(2, len(fans), squeeze=False, sharex="col", sharey="col")
        for column, (name, fan) in zip(axes.T, fans.items(), strict=True):
            ahead, before = np.arange(len(fan["truth"])) + 1, np.arange(len(fan["past"])) - len(fan["past"]) + 1
            for axis, key, colour in zip(column, ("diffusion", "VAR"), (BLUE, ORANGE), strict=True):
                for level in (0.9, 0.5):
                    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
                    axis.fill_between(ahead, *fan[key].quantile(ends, dim=0), color=colour, alpha=0.3, lw=0)
                axis.plot(before, fan["past"], "k", lw=0.8)
                axis.plot(ahead, fan["truth"], "k.", ms=3)
                axis.set_title(f"{name}, {key}", fontsize=9)


def report(results: dict[str, Any]) -> str:
    lines = []
    for name, found in results["series"].items():
        unit = f", in {found['unit']}" if found["unit"] else ""
        lines += [f"## {name}", "", f"{found['origins']} origins, {found['horizon']} steps each, {found['numbers']} "
                  f"number(s) of a step{unit}; VAR({found['order']}). Trained for {found['steps']} steps on "
                  f"{found['windows']} windows.", ""]  # fmt: skip
        if "exact" in found:
            lines += [f"The exact forecast has a CRPS of {cell(found['exact'], 3)}: the diffusion's is above it by "
                      f"{cell(found['gap'], 2, factor=100)} %.", ""]  # fmt: skip
        rows = [[key, *(cell(value, 3) for value in row.values())] for key, row in found["rows"].items()]
        lines += [*table(["forecast", *found["rows"]["VAR"]], rows), ""]
    return f"""# Forecasts as sample paths

{place(results)}

A diffusion of each step, told the state of a recurrent network, rolled out in {results["paths"]} paths from each origin
with {results["nfe"]} evaluations a step: `examples/forecasting.py` says what the series are and how they are taken. In
brackets the standard error over origins, whose forecasts do not overlap; CRPS is the fair one, the mean over steps and
numbers, the lower the better, and "less than VAR" the difference origin by origin. Shares of 0.5 and 0.9 of what came
are to be in the intervals.

![Fans: what came (dots), and the bands of 50 and 90 % of the diffusion and of the VAR](forecasting.png)

{chr(10).join(lines)}"""


if __name__ == "__main__":
    main()
