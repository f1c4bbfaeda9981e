"""Two networks on Fashion-MNIST, good enough that samplers and likelihoods can be measured on them.

    python benchmarks/networks.py train VP              in runs/networks/VP; the same command goes on after a kill
    python benchmarks/networks.py train EDM
    python benchmarks/networks.py choose                the lengths of their averages, by Frechet distance; writes --out

    VP     eps on `VPSDE`, the label 999 t; uniform times, simple weighting
    EDM    Karras' preconditioning on `EDMSDE`, its weighting and its log-normal sigmas

Both are U-Nets that see squares of 2 x 2 pixels as one position, with attention at 7 x 7, trained on the 60,000 images
as they are: mirrored shoes are not among the held-out images that samples are judged by. Precision is float32: these
networks are slower under bfloat16 on a CPU without matrix units. While a network trains, two power averages are kept
with snapshots; `choose` makes those of other lengths, draws from each (DPM-Solver++(2M), 40 evaluations, clipped means,
one seed) and takes the best. It is written by `scoresde export`'s function in float16, which moves no sample by more
than the page says, and `scoresde sample benchmarks/results/networks/VP` draws from it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from scoresde.cli.models import About
from scoresde.data import fashion_mnist_levels, scaled
from scoresde.training import ModelConfig, TrainConfig, Trainer
from scoresde.training.weights import LogNormalTimes, TimeSampler, Weighting, edm, simple

UNET = {"image_channels": 1, "multipliers": [1, 2], "blocks": 1, "patch": 2}
TRAIN = TrainConfig(
    steps=8000,
    batch_size=64,
    lr=2e-3,
    warmup=200,
    ema_decay=0.999,
    power=(0.05, 0.10),
    snapshot_every=250,
    checkpoint_every=250,
    log_every=50,
    keep=2,
    compile=True,
    threads=1,
)


@dataclass(frozen=True)
class Network:
    """What is trained, and how."""

    model: ModelConfig
    train: TrainConfig = TRAIN
    weighting: Weighting = simple
    times: TimeSampler | None = None


NETWORKS = {
    "VP": Network(ModelConfig(sde="vp", options={**UNET, "channels": 64}, predicts="eps", time_scale=999.0)),
    "EDM": Network(
        ModelConfig(sde="edm", options={**UNET, "channels": 48}, predicts="edm", sigma_data=0.7),
        weighting=edm(0.7),
        times=LogNormalTimes(mean=-0.8, std=1.4),
    ),
}


def train(name: str, folder: Path, images: Tensor, steps: int | None = None) -> Trainer:
    """Train a network, or go on with it: to `steps` steps, if that is given."""
    network = NETWORKS[name]
    denoiser = network.model.build(seed=0)
    assert isinstance(denoiser.net, nn.Module)
    denoiser.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    config = network.train if steps is None else replace(network.train, steps=steps)
    About(tuple(images.shape[1:]), levels=256).write(folder / name)
    trainer = Trainer(
        denoiser,
        images,
        config,
        weighting=network.weighting,
        times=network.times,
        folder=folder / name,
        model=network.model,
    )
    return trainer.fit()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "choose"))
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help="VP, EDM (both)")
    parser.add_argument("--runs", type=Path, default=Path("runs/networks"), help="folder of the runs (runs/networks)")
    parser.add_argument("--steps", type=int, help=f"of training ({TRAIN.steps}); a run that has begun may take others")
    args = parser.parse_args(argv)
    for name in args.networks or NETWORKS:
        if args.what == "train":
            train(name, args.runs, scaled(fashion_mnist_levels(split="train")[0]), args.steps)


if __name__ == "__main__":
    main()
