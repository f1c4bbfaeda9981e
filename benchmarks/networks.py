"""Two networks on Fashion-MNIST, good enough that samplers and likelihoods can be measured on them.

    python benchmarks/networks.py train VP              in runs/networks/VP; the same command goes on after a kill
    python benchmarks/networks.py train EDM
    python benchmarks/networks.py choose                the lengths of their averages, by Frechet distance; writes --out

    VP     eps on `VPSDE`, the label 999 t; uniform times, simple weighting
    EDM    Karras' preconditioning on `EDMSDE`, its weighting and its log-normal sigmas

Both are U-Nets that see squares of 2 x 2 pixels as one position, with attention at 7 x 7, trained on the 60,000 images
as they are: mirrored shoes are not among the held-out images that samples are judged by. Precision is float32: these
networks are slower under bfloat16 on a CPU without matrix units. While a network trains, two power averages are kept
with snapshots; `choose` makes those of other lengths, draws from each (DPM-Solver++(2M), clipped means, the same
seeds) and takes the best. It is written by `scoresde export`'s function in float16, which moves no sample by more
than the page says, and `scoresde sample benchmarks/results/networks/VP` draws from it.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from kept import Numbers, floor, made_on, number
from torch import Tensor, nn
from tqdm import tqdm

from scoresde import NetworkDenoiser, sample
from scoresde.cli.models import ABOUT, About
from scoresde.data import fashion_mnist_levels, scaled
from scoresde.info import environment
from scoresde.metrics import classifier_features, frechet_distance
from scoresde.metrics.errors import rms
from scoresde.noise import derive_seed
from scoresde.report import table, write_json
from scoresde.solvers import DPMSolverPP
from scoresde.training import ModelConfig, TrainConfig, Trainer, load
from scoresde.training.export import export
from scoresde.training.model import opened
from scoresde.training.snapshots import averaged
from scoresde.training.weights import LogNormalTimes, TimeSampler, Weighting, edm, simple
from scoresde.wrappers import Clip

BEFORE = Path(__file__).parent.parent / "examples/models/fashion-mnist"
SOLVER = DPMSolverPP()
UNET = {"image_channels": 1, "multipliers": [1, 2], "blocks": 1, "patch": 2}
TRAIN = TrainConfig(
    steps=8000,
    batch_size=64,
    lr=2e-3,
    warmup=200,
    ema_decay=0.999,
    power=(0.05, 0.10),
    snapshot_every=100,
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


@dataclass(frozen=True)
class Size:
    """How much is drawn.

    Attributes:
        lengths: that are tried.
        few: samples of each.
        many: of what is chosen.
        nfe: evaluations of the network.
    """

    lengths: tuple[float, ...] = (0.03, 0.05, 0.075, 0.1, 0.15, 0.2)
    few: int = 1000
    many: int = 2000
    nfe: int = 30


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


# --- the length of the average ---------------------------------------------------------------------------------------


class Judge:
    """Frechet distances to the 10,000 held-out images, in the features of the library's classifier; each is kept once
    it is taken.

    Args:
        size: how much is drawn.
        cells: file of the finished numbers.
    """

    def __init__(self, size: Size, cells: Path) -> None:
        self.size, self.features = size, classifier_features("fashion-mnist")
        self.cells = Numbers(cells, f"{size.nfe} evaluations", "fashion-mnist")

    @cached_property
    def reference(self) -> Tensor:
        return self.features(scaled(fashion_mnist_levels(split="test")[0]))

    def real(self, n: int) -> float:
        """Of n real training images, a mean over draws."""
        if (found := self.cells.get("frechet", "real images", n)) is None:
            training = scaled(fashion_mnist_levels(split="train")[0])
            found = [floor(training, self.reference, self.features, n, sets=5)[0]]
            self.cells.put("frechet", "real images", n, found)
        return found[0]

    def draw(self, denoiser: NetworkDenoiser, n: int) -> Tensor:
        """Sample i is the same whatever n is."""
        assert isinstance(denoiser.net, nn.Module)
        denoiser.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        parts = range(0, n, 250)
        seeds = [[derive_seed(1, i) for i in range(k, min(k + 250, n))] for k in parts]
        made = [sample(Clip(denoiser), (len(s), 1, 28, 28), SOLVER, nfe=self.size.nfe, seed=s).x for s in seeds]
        return torch.cat(made).clamp(-1, 1)

    def score(self, name: str, make: Callable[[], NetworkDenoiser], n: int) -> float:
        """Of n samples."""
        if (found := self.cells.get("frechet", name, n)) is None:
            found = [frechet_distance(self.features(self.draw(make(), n)), self.reference)]
            self.cells.put("frechet", name, n, found)
        return found[0]


def choose(names: Sequence[str], runs: Path, out: Path, size: Size) -> str:
    """Take the best length of each run, write its model into out/NAME, and the page.

    Returns:
        the page.
    """
    out.mkdir(parents=True, exist_ok=True)
    judge, rows, best = Judge(size, runs / "choose.jsonl"), [], []
    real = [judge.real(n) for n in (size.few, size.many)]
    found: dict[str, Any] = {"environment": environment("cpu"), "size": repr(size), "real": real, "networks": {}}
    today = judge.score("before", lambda: load(BEFORE), size.many)
    for name in names:
        at = opened(runs / name)
        step, seconds = at.manifest["step"], at.manifest["progress"]["seconds"]
        scores = {
            s: judge.score(f"{name} at {step}, {s}", partial(averaged, at, s), size.few)
            for s in tqdm(size.lengths, desc=name, unit="length")
        }
        length = min(scores, key=scores.__getitem__)
        rows.append([name, *map(number, scores.values())])
        if (out / name).exists():
            shutil.rmtree(out / name)
        folder = export(at, out / name, length=length, dtype="float16")
        shutil.copy(runs / name / ABOUT, folder / ABOUT)
        n = min(64, size.few)
        moved = float(rms(judge.draw(load(folder), n) - judge.draw(averaged(at, length), n)).max())
        score = judge.score(f"{name} at {step}, exported {length}", partial(load, folder), size.many)
        megabytes = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
        made = f"{step} steps of {at.manifest['config']['batch_size']}, {seconds / 60:.0f} minutes"
        best.append([name, made, length, number(score), f"{megabytes:.1f} MB", f"{moved:.1e}"])
        found["networks"][name] = {
            "step": step,
            "seconds": seconds,
            "config": at.manifest["config"],
            "by length": [[s, value] for s, value in scores.items()],
            "length": length,
            "score": score,
            "moved by float16": moved,
        }
    write_json(out / "results.json", {**found, "before": today})
    page = [
        "# Two networks on Fashion-MNIST",
        "",
        f"{made_on(found['environment'])} The networks and their training: `benchmarks/networks.py`.",
        "",
        "Frechet distance to the 10,000 held-out images in the features of the library's classifier, of samples by "
        f"DPM-Solver++(2M) with {size.nfe} evaluations and clipped means, the same seeds for all. Each number is of "
        "one set of samples and has no error of its own: lengths next to each other are not told apart.",
        "",
        f"The average's length was chosen with {size.few:,} samples (as many real training images: {number(real[0])}):",
        "",
        *table(["length", *size.lengths], rows),
        "",
        f"With {size.many:,} samples, real images have {number(real[1])} and the network of `examples/models` (3000 "
        f"steps of a third of the cost) {number(today)}. Minutes are of training, on two cores that others used too, "
        "one thread each; float16: by how much it moves a sample, the largest root mean square of 64.",
        "",
        *table(["", "trained", "length", "distance", "size", "float16"], best),
    ]
    text = "\n".join(page) + "\n"
    (out / "README.md").write_text(text)
    return text


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "choose"))
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help="VP, EDM (both)")
    parser.add_argument("--runs", type=Path, default=Path("runs/networks"), help="folder of the runs (runs/networks)")
    parser.add_argument("--steps", type=int, help=f"of training ({TRAIN.steps}); a run that has begun may take others")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/networks"), help="of `choose`")
    parser.add_argument("--lengths", type=float, nargs="+", default=Size.lengths, help="that are tried")
    parser.add_argument("--few", type=int, default=Size.few, help="samples of each length (1000)")
    parser.add_argument("--many", type=int, default=Size.many, help="samples of the chosen one (2000)")
    parser.add_argument("--nfe", type=int, default=Size.nfe, help="evaluations (30)")
    args = parser.parse_args(argv)
    if unknown := set(args.networks) - set(NETWORKS):
        parser.error(f"{', '.join(sorted(unknown))}: expected {' or '.join(NETWORKS)}")
    names = args.networks or list(NETWORKS)
    if args.what == "choose":
        size = Size(tuple(args.lengths), args.few, args.many, args.nfe)
        print(choose(names, args.runs, args.out, size))
        return
    for name in names:
        train(name, args.runs, scaled(fashion_mnist_levels(split="train")[0]), args.steps)


if __name__ == "__main__":
    main()
