"""Bits dissolved into noise and made again out of it: binomial diffusion (Sohl-Dickstein et al., 2015).

    python examples/binomial.py            --help

    q(x_t | x_{t-1}) = B((1 - beta_t) x_{t-1} + beta_t / 2),  beta_t = 1 / (T - t + 1)
    E x_t = 1/2 + (E x_0 - 1/2) (T - t) / T

A network says how likely each bit of x_0 is to be one; the way back draws x_s of q(x_s | x_t, x_0), summed over that.
Three data: a coin of 0.9, whose posterior is known, in T = 100 steps; the heartbeat, 20 bits of which every fifth is a
pulse, so that log2 p = -log2 5; and handwritten digits of two levels. Their bounds are those of continuous time.

Writes binomial.png, results.json and README.md into --out, and the networks, from which a killed run goes on.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor

from scoresde import elbo, sample
from scoresde.categorical import Ancestral, CategoricalDenoiser, CategoricalProcess, Table
from scoresde.data import digit_levels
from scoresde.info import environment
from scoresde.report import table, write_json
from scoresde.training import CategoricalConfig, TrainConfig, Trainer

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SHOWN = (0, 10, 50, 90, 98, 100)
COIN = Table(torch.tensor([[0], [1]]), weights=[0.1, 0.9])
HEARTBEAT = torch.stack([(torch.arange(20) % 5 == k).long() for k in range(5)])
BEAT = CategoricalConfig("uniform", {"states": 2}, options={"event_shape": [2, 20], "width": 128}, time_scale=999.0)
DIGITS = CategoricalConfig(
    "uniform", {"states": 2}, "unet", 8, {"image_channels": 2, "channels": 16}, time_scale=999.0, channels=True
)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/binomial"), help="folder of results (runs/binomial)")
    parser.add_argument("--data", type=Path, help="images of two levels, 0 and 1, an array (N, 1, H, W) in a .npy file")
    parser.add_argument("--beat-steps", type=int, default=10_000, help="training steps of the heartbeat (10000)")
    parser.add_argument("--train-steps", type=int, default=2000, help="of the digits (2000)")
    parser.add_argument("--samples", type=int, default=10_000, help="heartbeats that are drawn (10000)")
    parser.add_argument("--steps", type=int, default=400, help="of sampling (400)")
    parser.add_argument("--draws", type=int, default=64, help="of the bound, for each item (64)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    coin, beat, digits = of_the_coin(args), of_the_heartbeat(args), of_the_digits(args)
    pictures = [found.pop("picture") for found in (coin, beat, digits)]
    results = {
        "environment": environment(),
        "seconds": round(time.perf_counter() - start, 1),
        **{name: getattr(args, name) for name in ("beat_steps", "train_steps", "samples", "steps", "draws", "seed")},
        "coin": coin,
        "heartbeat": beat,
        "digits": digits,
    }
    write_json(args.out / "results.json", results)
    (args.out / "README.md").write_text(report(results))
    draw(pictures, args.out / "binomial.png")
    print(report(results))


def trained(
    model: CategoricalConfig, data: Tensor, steps: int, batch: int, folder: Path, seed: int
) -> CategoricalDenoiser:
    """The denoiser, trained or continued in its folder, with averaged weights."""
    config = TrainConfig(steps=steps, batch_size=batch, lr=2e-3, seed=seed, threads=1, ema_decay=0.999)
    return Trainer(model.build(seed), data, config, folder=folder, model=model).fit().ema


def of_the_coin(args: argparse.Namespace) -> dict:
    """Both ways of 10,000 coins with the exact posterior: means at the times shown."""
    process, n = CategoricalProcess.uniform(states=2, schedule="binomial", steps=100), 10_000
    generator = torch.Generator().manual_seed(args.seed)
    x0 = COIN.sample(n, generator)
    forth = [process.perturb(x0, t, torch.randn(x0.shape, generator=generator)) for t in SHOWN]
    back = sample(
        COIN.denoiser(process), (n, 1), Ancestral(), steps=100, generator=generator, trajectory=True
    ).trajectory
    assert back is not None
    told = {
        "exact": [float((COIN.weights @ process.matrix(0, t))[1]) for t in SHOWN],
        "forth": [float(x.double().mean()) for x in forth],
        "back": [float(back[100 - t].double().mean()) for t in SHOWN],
    }
    return {**told, "picture": back[:, :40, 0].T}


def of_the_heartbeat(args: argparse.Namespace) -> dict:
    """The share of samples that are heartbeats, and the bound in bits of a sequence."""
    denoiser = trained(BEAT, HEARTBEAT, args.beat_steps, 500, args.out / "heartbeat", args.seed)
    x = sample(denoiser, (args.samples, 20), Ancestral(), steps=args.steps, seed=args.seed).x
    same = (x[:, None] == HEARTBEAT).all(2)
    counts = same.sum(0).tolist()
    law, many = Table(HEARTBEAT), HEARTBEAT.repeat(max(1, args.samples // 10), 1)
    ours, exact = (
        elbo(model, many, draws=args.draws, seed=args.seed).value
        for model in (denoiser, law.denoiser(denoiser.process))
    )
    gap = (exact - ours) / math.log(2)  # of the same noise: the exact posterior's bound is log p in the mean
    return {
        "valid": sum(counts) / args.samples,
        "counts": counts,
        "bound": -math.log2(5) - float(gap.mean()),
        "stderr": float(gap.std() / len(gap) ** 0.5),
        "picture": x[:40],
    }


def of_the_digits(args: argparse.Namespace) -> dict:
    """The bound in nats of held-out digits, beside logistic regressions of each bit on those before, and bits alone."""
    x = (digit_levels()[0] > 7).long() if args.data is None else torch.from_numpy(np.load(args.data)).long()
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    known, held = x[: len(x) * 5 // 6], x[len(x) * 5 // 6 :]
    denoiser = trained(DIGITS, known, args.train_steps, 32, args.out / "digits", args.seed)
    bound = elbo(denoiser, held, draws=args.draws, seed=args.seed).value
    p = (known.double().sum(0) + 0.5) / (len(known) + 1)
    alone = torch.where(held == 1, p, 1 - p).log().flatten(1).sum(1)
    each = regressions(known.flatten(1).numpy(), held.flatten(1).numpy())
    told = {"bound": bound, "independent": alone, "regressions": torch.from_numpy(each)}
    numbers = {name: [float(v.mean()), float(v.std() / len(v) ** 0.5)] for name, v in told.items()}
    shape = (20, *held.shape[1:])
    return {**numbers, "picture": sample(denoiser, shape, Ancestral(), steps=args.steps, seed=args.seed).x[:, 0]}


def regressions(known: np.ndarray, held: np.ndarray) -> np.ndarray:
    """log p of each held-out item: bit by bit, by a logistic regression on the bits before."""
    from sklearn.linear_model import LogisticRegression

    total = np.zeros(len(held))
    for i in range(known.shape[1]):
        p = np.full(len(held), (known[:, i].sum() + 0.5) / (len(known) + 1))
        if i and 0 < known[:, i].sum() < len(known):
            p = LogisticRegression(C=0.1, max_iter=500).fit(known[:, :i], known[:, i]).predict_proba(held[:, :i])[:, 1]
        total += np.log(np.where(held[:, i] == 1, p, 1 - p))
    return total


def report(results: dict) -> str:
    """The numbers, as Markdown."""
    about, coin, beat, digits = (results[name] for name in ("environment", "coin", "heartbeat", "digits"))
    rows = [[name, *(f"{value:.3f}" for value in coin[name])] for name in ("exact", "forth", "back")]
    nats = [[name, "{:.2f} ({:.2f})".format(*digits[name])] for name in ("bound", "regressions", "independent")]
    return f"""# Bits, into noise and back

`{about["command"]}`: {about["device"]}, {about["threads"]} thread(s), {about["dtype"]};
torch {about["torch"]}, scoresde {about["scoresde"]}, commit {about["commit"]}; {results["seconds"]:.0f} s (less where
networks were trained before).

A coin of 0.9 in 100 steps, its mean at t: the law's, of 10,000 coins on the way to noise, and of 10,000 on the way back
by the exact posterior. A standard error is 0.003 to 0.005.

{chr(10).join(table(["t", *SHOWN], rows))}

The heartbeat, {results["beat_steps"]} training steps: {100 * beat["valid"]:.2f} % of {results["samples"]} samples of
{results["steps"]} steps are one of the five sequences ({", ".join(map(str, beat["counts"]))} of each). The bound is
{beat["bound"]:.4f} ({beat["stderr"]:.4f}) bits a sequence, measured by its distance to that of the exact posterior
under the same noise; the truth is {-math.log2(5):.4f}, and Sohl-Dickstein et al. have -2.414.

Digits of two levels, {results["train_steps"]} training steps: log p of held-out ones in nats, the mean and its standard
error over them. Of the model it is a bound; beside it, a logistic regression of each bit on those before it, and bits
by themselves.

{chr(10).join(table(["", "nats"], nats))}

![Coins and heartbeats on the way back, heartbeats and digits that were drawn](binomial.png)
"""


def draw(pictures: list[Tensor], path: Path) -> None:
    """Coins on the way back, heartbeats and digits."""
    coins, beats, digits = pictures
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.4), layout="constrained", width_ratios=(2.2, 1.1, 1.4))
    axes[0].imshow(coins.numpy(), cmap="gray_r", aspect="auto", interpolation="nearest", extent=(100.5, -0.5, 40, 0))
    axes[0].set(title="40 coins of 0.9 on the way back", xlabel="t", yticks=[])
    axes[1].imshow(beats.numpy(), cmap="gray_r", aspect="auto", interpolation="nearest")
    axes[1].set(title="heartbeats, drawn", xlabel="bit", yticks=[], xticks=[0, 5, 10, 15])
    rows = digits.reshape(4, 5, *digits.shape[1:]).float()
    framed = torch.nn.functional.pad(rows, (1, 1, 1, 1), value=0.3)
    axes[2].imshow(framed.permute(0, 2, 1, 3).flatten(0, 1).flatten(1).numpy(), cmap="gray_r", interpolation="nearest")
    axes[2].set(title="digits, drawn", xticks=[], yticks=[])
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
