"""What the examples of series share: a CSV file, a model over time, and means with their errors."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoresde import VPSDE, VDenoiser
from scoresde.denoiser import NetworkDenoiser
from scoresde.networks import seeded_global_generators
from scoresde.nn import MLP, Recurrent, Stepwise
from scoresde.solvers import UniPC
from scoresde.training import TrainConfig, Trainer, step_loss
from scoresde.training.weights import uniform_in

SOLVER = UniPC(3, view="v", variable="half_log_snr")


def label(t: Tensor) -> Tensor:
    return 999 * t


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


def trained(
    windows: Tensor, covariates: Tensor | None, folder: Path, *, context: int, steps: int, scaled: bool = True,
    width: int = 32, lr: float = 2e-3, symmetric: bool = False, seed: int = 0,
) -> NetworkDenoiser:  # fmt: skip
    """p(x_k | h_{k-1}), a diffusion of v told the state of gated recurrent units, trained on windows (N, L, d). A run
    that was killed goes on from its folder. Of what is symmetric, -x is as likely as x."""
    d, more = windows.shape[2], 0 if covariates is None else covariates.shape[2]
    with seeded_global_generators(seed):
        net = Stepwise(MLP(d, width=2 * width, depth=2, vector=width), Recurrent(d + more, width), scaled=scaled)
    cond: dict[str, Any] = {} if covariates is None else {"covariates": covariates.float()}
    config = TrainConfig(steps=steps, batch_size=32, lr=lr, warmup=min(100, steps // 4), ema_decay=0.995, threads=1,
                         weight_decay=0.05, checkpoint_every=1000, seed=seed)  # fmt: skip
    loss = step_loss(context, weighting=uniform_in("v"))
    denoiser = VDenoiser(net, VPSDE(), time=label)
    return Trainer(denoiser, windows.float(), config, cond=cond, loss=loss, folder=folder,
                   augment=either_sign if symmetric else None).fit().ema  # fmt: skip


def either_sign(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Windows of either sign, at random."""
    sign = torch.randint(0, 2, (len(batch), 1, 1), generator=generator, device=generator.device) * 2 - 1
    return batch * sign.to(batch)


def spent(folder: Path) -> float:
    """Seconds of a run, by its log."""
    with (folder / "log.csv").open(newline="") as file:
        return round(float(list(csv.DictReader(file))[-1]["seconds"]), 1)


def mean_and_error(x: Tensor) -> list[float]:
    """Of numbers that are independent, (n,): their mean and its standard error."""
    return [float(x.mean()), float(x.std() / math.sqrt(len(x)))]


def cell(found: list[float], digits: int = 3) -> str:
    return f"{found[0]:.{digits}f} ({found[1]:.{digits}f})"


def kept(path: Path, results: dict[str, Any]) -> None:
    path.write_text(json.dumps(results, indent=1) + "\n")
