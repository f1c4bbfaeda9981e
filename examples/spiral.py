"""A roll dissolved into noise and made again out of it: figure 1 of Sohl-Dickstein et al. (2015).

    python examples/spiral.py            a minute on one core; --help

Forward, the chain q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I) takes points of a roll in the plane to noise
in 40 steps. A network of 0.2 million parameters learns the noise in x_t, which is all that the way back needs: each of
its steps has the mean mu(x_t, t), and mu(x_t, t) - x_t is a drift that can be drawn. Forward and back the points have
the same law at every time, if the network is right; the energy distance says how nearly.

Writes spiral.png, results.json and README.md into --out; the network into --model, which a killed run goes on from.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from scoresde import DDPMChain, Denoiser, Grid, sample
from scoresde.data.toys import TOYS
from scoresde.info import environment
from scoresde.metrics import energy_distance
from scoresde.noise import derive_seed
from scoresde.report import table, write_json
from scoresde.solvers import DDPM
from scoresde.training import ModelConfig, TrainConfig, Trainer

matplotlib.use("Agg")
import matplotlib.pyplot as plt

T = 40
MODEL = ModelConfig(
    sde="cosine-chain",
    sde_options={"steps": T},
    network="mlp",
    options={"event_shape": 2},
    predicts="eps",
    time_scale=999 / T,
)
SHOWN = (0, T // 2, T)
HALF = 2.6  # of the square that is drawn


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/spiral"), help="folder of results (runs/spiral)")
    parser.add_argument("--model", type=Path, default=Path("runs/spiral/model"), help="run folder of the network")
    parser.add_argument("--data", choices=sorted(TOYS), default="swiss-roll", help="points in the plane (swiss-roll)")
    parser.add_argument("--train-steps", type=int, default=2500, help="training steps (2500)")
    parser.add_argument("--points", type=int, default=2000, help="in each set (2000)")
    parser.add_argument("--sets", type=int, default=10, help="of points, for the errors (10)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, training and points (0)")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)

    start = time.perf_counter()
    denoiser = trained(args)
    ready = time.perf_counter()
    forth, back = zip(*(both_ways(denoiser, k, args) for k in range(args.sets)), strict=True)
    results = {
        "environment": environment(),
        "seconds": {"train": round(ready - start, 1), "measure": round(time.perf_counter() - ready, 1)},
        **{name: getattr(args, name) for name in ("data", "train_steps", "points", "sets", "seed")},
        "model": MODEL.to_dict(),
        "energy_distance": {str(t): distances(forth, back, t) for t in SHOWN},
    }
    write_json(args.out / "results.json", results)
    (args.out / "README.md").write_text(report(results))
    draw(denoiser, forth[0], back[0], args.out / "spiral.png")
    print(report(results) + f"\nwrote {args.out}/spiral.png, results.json and README.md")


def trained(args: argparse.Namespace) -> Denoiser:
    """The denoiser, trained or continued in its folder, with averaged weights."""
    data = TOYS[args.data](50_000, derive_seed(args.seed, 0))[0]
    config = TrainConfig(steps=args.train_steps, batch_size=256, lr=2e-3, seed=args.seed, threads=1)
    return Trainer(MODEL.build(args.seed), data, config, folder=args.model, model=MODEL).fit().ema


def both_ways(denoiser: Denoiser, k: int, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """The k-th set of points on their way to noise, and another on the way back, both (T + 1, points, 2) by t."""
    chain = denoiser.sde
    assert isinstance(chain, DDPMChain)
    generator = torch.Generator().manual_seed(derive_seed(args.seed, 1, k))
    x, forth = TOYS[args.data](args.points, generator)[0], []
    for beta in [None, *chain.betas.tolist()]:
        if beta is not None:
            x = math.sqrt(1 - beta) * x + math.sqrt(beta) * torch.randn(x.shape, generator=generator)
        forth.append(x)
    grid, seed = Grid.strided(chain, T), derive_seed(args.seed, 2, k)
    back = sample(denoiser, (args.points, 2), DDPM(), grid=grid, seed=seed, trajectory=True).trajectory
    assert back is not None
    return torch.stack(forth), back.flip(0)


def distances(forth: tuple[Tensor, ...], back: tuple[Tensor, ...], t: int) -> dict[str, list[float]]:
    """Mean and standard error over the sets: of points on the way back to points on the way forth at that time, and of
    the sets on the way forth, in pairs.
    """

    def over_sets(pairs: list[tuple[Tensor, Tensor]]) -> list[float]:
        found = torch.tensor([energy_distance(x[t], y[t]) for x, y in pairs], dtype=torch.float64)
        return [float(f"{float(v):.3g}") for v in (found.mean(), found.std() / len(found) ** 0.5)]

    n = len(forth)
    return {
        "back": over_sets([(back[k], forth[k]) for k in range(n)]),
        "forth": over_sets([(forth[k], forth[k + 1]) for k in range(0, n - 1, 2)]),
    }


def drift(denoiser: Denoiser, x: Tensor, t: int) -> Tensor:
    """mu(x, t) - x: what the step from t to t - 1 does without its noise."""
    step = Grid(denoiser.sde, [t, t - 1])
    return sample(denoiser, x, DDPM(), grid=step, noise=lambda row, x: torch.zeros_like(x)).x - x


def report(results: dict) -> str:
    """The numbers, as Markdown."""
    about, found = results["environment"], results["energy_distance"]
    rows = [
        [f"t = {t}", *("{:.2g} ({:.1g})".format(*found[t][which]) for which in ("back", "forth"))]
        for t in reversed(found)
    ]
    apart = [
        f"t = {t}"
        for t, of in found.items()
        if of["back"][0] - of["forth"][0] > 2 * math.hypot(of["back"][1], of["forth"][1])
    ]
    return f"""# A roll, into noise and back

`{about["command"]}`: {about["device"]}, {about["threads"]} thread(s), {about["dtype"]};
torch {about["torch"]}, scoresde {about["scoresde"]}, commit {about["commit"]};
{results["seconds"]["train"]:.0f} s of training (nothing where it was done before), {results["seconds"]["measure"]:.0f}
s of the rest.

{results["points"]} points of {results["data"]}, {T} steps of a chain to noise and {T} back, by a network trained for
{results["train_steps"]} steps. Energy distance of the points on the way back to those on the way forth at the same
time, and of two independent sets of the latter: means over {results["sets"]} sets, and {results["sets"] // 2} pairs,
in brackets the standard error.

{chr(10).join(table(["", "back, to forth", "forth, to forth"], rows))}

By more than two standard errors of the difference the way back is further off at: {", ".join(apart) or "none"}.

![The points forth and back, and the drift of the steps back](spiral.png)
"""


def draw(denoiser: Denoiser, forth: Tensor, back: Tensor, path: Path) -> None:
    """Three times: the points forth, back, and the drift of the step back. A point has the colour of its direction at
    t = 0, where it comes from or where it ends.
    """
    figure, axes = plt.subplots(3, 3, figsize=(10.5, 10.8), layout="constrained", sharex=True, sharey=True)
    line = torch.linspace(-HALF + 0.2, HALF - 0.2, 17)
    at = torch.cartesian_prod(line, line)
    for column, t in enumerate(SHOWN):
        for axis, path_of in zip(axes[:2, column], (forth, back), strict=True):
            x0 = path_of[0]
            axis.scatter(*path_of[t].T, s=5, c=torch.atan2(*x0.flip(1).T), cmap="twilight_shifted", linewidths=0)
        step = max(t, 1)
        arrows = drift(denoiser, at, step)
        axis = axes[2, column]
        axis.scatter(*forth[step].T, s=3, color="0.8", linewidths=0)
        axis.quiver(*at.T, *arrows.T, arrows.norm(dim=1), cmap="plasma", angles="xy", width=0.006)
        longest = float(arrows.norm(dim=1).max())
        axis.set_title(f"step {step} to {step - 1}, longest arrow {longest:.2f}", fontsize=10)
        axes[0, column].set_title(f"t = {t}" + {0: ": data", T: ": noise"}.get(t, ""), fontsize=12)
    for axis, name in zip(axes[:, 0], ("forth: q", "back: p", "drift mu(x, t) - x"), strict=True):
        axis.set_ylabel(name, fontsize=12)
    for axis in axes.flat:
        axis.set(xlim=(-HALF, HALF), ylim=(-HALF, HALF), aspect="equal", xticks=[-2, 0, 2], yticks=[-2, 0, 2])
    figure.suptitle("colour: the direction in which a point lies at t = 0", fontsize=11)
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
