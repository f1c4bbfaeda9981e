"""Bits dissolved into noise and made again out of it: binomial diffusion (Sohl-Dickstein et al., 2015).

    python examples/binomial.py            --help

    q(x_t | x_{t-1}) = B((1 - beta_t) x_{t-1} + beta_t / 2),  beta_t = 1 / (T - t + 1)
    E x_t = 1/2 + (E x_0 - 1/2) (T - t) / T

A network says how likely each bit of x_0 is to be one; the way back draws x_s of q(x_s | x_t, x_0), summed over that.
Three data: a coin of 0.9, whose posterior is known, in T = 100 steps; the heartbeat, 20 bits of which every fifth is a
pulse, so that log2 p = -log2 5; and handwritten digits of two levels. Their bounds are those of continuous time.

Writes binomial.png, results.json and README.md into --out; the networks into --models, from which a killed run goes on.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from shared import arguments, cell, fitted, grid, mean_and_error, picture, place, publish, ran
from torch import Tensor

from scoresde import elbo, sample
from scoresde.categorical import Ancestral, CategoricalDenoiser, CategoricalProcess, Table
from scoresde.data import digit_levels, pictured
from scoresde.report import table
from scoresde.training import CategoricalConfig, TrainConfig, Trainer

SHOWN = (0, 10, 50, 90, 98, 100)
COIN = Table(torch.tensor([[0], [1]]), weights=[0.1, 0.9])
HEARTBEAT = torch.stack([(torch.arange(20) % 5 == k).long() for k in range(5)])
BEAT = CategoricalConfig("uniform", {"states": 2}, options={"event_shape": [2, 20]}, time_scale=999.0)
DIGITS = CategoricalConfig(
    "uniform", {"states": 2}, "unet", 8, {"image_channels": 2, "channels": 16}, time_scale=999.0, channels=True
)


def main(argv: list[str] | None = None) -> None:
    parser = arguments(
        __doc__,
        "binomial",
        models=(Path("runs/binomial"), "folder of the networks"),
        data=(Path, "images of two levels, 0 and 1, an array (N, 1, H, W) in a .npy file, in place of digits"),
        beat_steps=(10_000, "training steps of the heartbeat"),
        train_steps=(2000, "of the digits"),
        samples=(10_000, "heartbeats that are drawn"),
        steps=(400, "of sampling"),
        draws=(64, "of the bound, for each item"),
    )
    args, start = parser.parse_args(argv), time.perf_counter()
    coin, coins = of_the_coin(args.seed)
    beat = trained(BEAT, HEARTBEAT, args.beat_steps, 500, args.models / "heartbeat", args.seed)
    known, held = two_levels(args.data)
    digits = trained(DIGITS, known, args.train_steps, 32, args.models / "digits", args.seed)
    beats = sample(beat, (args.samples, 20), Ancestral(), steps=args.steps, seed=args.seed).x
    shown = sample(digits, (20, *held.shape[1:]), Ancestral(), steps=args.steps, seed=args.seed).x
    results = {
        "coin": coin,
        "heartbeat": of_the_heartbeat(beat, beats, args),
        "digits": of_the_digits(digits, known, held, args),
    }
    results |= ran(args.models, {"heartbeat": beat, "digits": digits}, start)
    publish(args, "binomial", results, report, lambda path: draw(coins, beats, shown, path))


def trained(
    model: CategoricalConfig, data: Tensor, steps: int, batch: int, folder: Path, seed: int
) -> CategoricalDenoiser:
    """The denoiser, trained or continued in its folder, with averaged weights."""
    config = TrainConfig(steps, batch, 2e-3, seed=seed, threads=1)
    found: CategoricalDenoiser = fitted(Trainer, model.build(seed), data, config, folder, model=model).ema
    return found


def of_the_coin(seed: int) -> tuple[dict, Tensor]:
    """Both ways of 10,000 coins with the exact posterior: means at the times shown; and some on the way back."""
    process, n = CategoricalProcess.uniform(states=2, schedule="binomial", steps=100), 10_000
    generator = torch.Generator().manual_seed(seed)
    x0 = COIN.sample(n, generator)
    forth = [process.perturb(x0, t, torch.randn(x0.shape, generator=generator)) for t in SHOWN]
    run = sample(COIN.denoiser(process), (n, 1), Ancestral(), steps=100, generator=generator, trajectory=True)
    back = run.trajectory
    assert back is not None
    told = {
        "exact": [float((COIN.weights @ process.matrix(0, t))[1]) for t in SHOWN],
        "forth": [float(x.double().mean()) for x in forth],
        "back": [float(back[100 - t].double().mean()) for t in SHOWN],
    }
    return told, back[:, :40, 0].T


def of_the_heartbeat(denoiser: CategoricalDenoiser, x: Tensor, args: argparse.Namespace) -> dict:
    """How many samples are heartbeats, and the bound in bits of a sequence: log2 p, less how far the network's is from
    the exact posterior's under the same noise, whose mean is log p.
    """
    law, many = Table(HEARTBEAT), HEARTBEAT.repeat(max(1, args.samples // 10), 1)
    models = denoiser, law.denoiser(denoiser.process)
    ours, exact = (elbo(model, many, draws=args.draws, seed=args.seed).value for model in models)
    mean, error = mean_and_error((ours - exact) / math.log(2))
    return {"counts": (x[:, None] == HEARTBEAT).all(2).sum(0).tolist(), "bound": [mean - math.log2(5), error]}


def two_levels(path: Path | None) -> tuple[Tensor, Tensor]:
    """Images to learn from, five of six, and held-out ones."""
    x = (digit_levels()[0] > 7).long() if path is None else torch.from_numpy(np.load(path)).long()
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    return x[: len(x) * 5 // 6], x[len(x) * 5 // 6 :]


def of_the_digits(denoiser: CategoricalDenoiser, known: Tensor, held: Tensor, args: argparse.Namespace) -> dict:
    """Nats of held-out digits: the bound, logistic regressions of each bit on those before, and bits by themselves."""
    p = (known.double().sum(0) + 0.5) / (len(known) + 1)
    nats = {
        "binomial diffusion, a bound": elbo(denoiser, held, draws=args.draws, seed=args.seed).value,
        "logistic regressions": regressions(known.flatten(1).numpy(), held.flatten(1).numpy()),
        "bits by themselves": torch.where(held == 1, p, 1 - p).log().flatten(1).sum(1),
    }
    return {name: mean_and_error(value) for name, value in nats.items()}


def regressions(known: np.ndarray, held: np.ndarray) -> Tensor:
    """log p of each held-out item: bit by bit, by a logistic regression on the bits before."""
    from sklearn.linear_model import LogisticRegression

    total = np.zeros(len(held))
    for i in range(known.shape[1]):
        p = np.full(len(held), (known[:, i].sum() + 0.5) / (len(known) + 1))
        if i and 0 < known[:, i].sum() < len(known):
            p = LogisticRegression(C=0.1, max_iter=500).fit(known[:, :i], known[:, i]).predict_proba(held[:, :i])[:, 1]
        total += np.log(np.where(held[:, i] == 1, p, 1 - p))
    return torch.from_numpy(total)


def report(results: dict) -> str:
    """The numbers, as Markdown."""
    beat, n = results["heartbeat"], results["samples"]
    rows = [[name, *(f"{value:.3f}" for value in results["coin"][name])] for name in ("exact", "forth", "back")]
    nats = [[name, cell(found)] for name, found in results["digits"].items()]
    return f"""# Bits, into noise and back

{place(results)}

A coin of 0.9 in 100 steps, its mean at t: the law's, of 10,000 coins on the way to noise, and of 10,000 on the way back
by the exact posterior. A standard error is 0.003 to 0.005.

{chr(10).join(table(["t", *SHOWN], rows))}

The heartbeat: {100 * sum(beat["counts"]) / n:.2f} % of {n} samples, of {results["steps"]} steps, are one of the five
sequences ({", ".join(map(str, beat["counts"]))} of each). The bound is {cell(beat["bound"], 4)} bits a sequence,
measured by its distance to that of the exact posterior under the same noise; the truth is {-math.log2(5):.4f}, and
Sohl-Dickstein et al. have -2.414.

Digits of two levels: log p of held-out ones in nats, the mean and its standard error over them, beside a logistic
regression of each bit on those before it, and bits by themselves.

{chr(10).join(table(["", "nats"], nats))}

![Coins and heartbeats on the way back, heartbeats and digits that were drawn](binomial.png)
"""


def draw(coins: Tensor, beats: Tensor, digits: Tensor, path: Path) -> None:
    """Coins on the way back, heartbeats and digits."""
    with picture(path, 13, 4.4) as figure:
        axes = figure.subplots(1, 3, width_ratios=(2.2, 1.1, 1.4))
        how = {"cmap": "gray_r", "aspect": "auto", "interpolation": "nearest"}
        axes[0].imshow(coins.numpy(), extent=(100.5, -0.5, 40, 0), **how)
        axes[0].set(title="40 coins of 0.9 on the way back", xlabel="t", yticks=[])
        axes[1].imshow(beats[:40].numpy(), **how)
        axes[1].set(title="heartbeats, drawn", xlabel="bit", yticks=[], xticks=[0, 5, 10, 15])
        grid(axes[2], pictured(1 - digits, 2).unflatten(0, (4, 5)), title="digits, drawn")


if __name__ == "__main__":
    main()
