"""The main job: learn 1,297 real digits by denoising score matching, then race the solvers on step counts.

    make demo            or            python examples/digits.py --help

Trains a small U-Net on the VP SDE (a minute and a half on two CPU cores), draws 512 images with each solver at 5, 10,
20 and 50 network evaluations (DDPM at 1000 too), takes the likelihood of the held-out digits, and writes, into --out:

    samples.png     the digits of every solver at every step count, beside real ones, and quality against evaluations
    process.png     the forward process, and the way back by the reverse SDE and by the probability-flow ODE
    results.json    the table and the likelihood, with what they were measured on

Quality is the Frechet distance to 500 held-out digits in a fixed feature space that no data was used to make. A run
that is killed goes on from its last checkpoint. On a CPU one thread and all of them are timed first, and the faster
number is kept (TrainConfig.threads).
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from scoresde import SDE, VPSDE, Denoiser, Grid, VDenoiser, bits_per_dim, diagnose, elbo, sample
from scoresde.cli.common import going_on, sigterm
from scoresde.data import digit_levels, digits
from scoresde.info import environment
from scoresde.likelihood import dequantized, outer_edges
from scoresde.metrics import RandomFeatures, frechet_distance
from scoresde.nn import UNet
from scoresde.noise import derive_seed
from scoresde.report import table as markdown
from scoresde.report import write_json
from scoresde.solvers import DDIM, DDPM, DPMSolverPP, EulerMaruyama, Heun, Solver, UniPC
from scoresde.tensors import expand_like
from scoresde.training import CheckpointError, TrainConfig, Trainer, min_snr

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RACE: dict[str, Solver] = {
    "DDPM": DDPM(),
    "Euler-Maruyama": EulerMaruyama(),
    "DDIM": DDIM(),
    "Heun": Heun(variable="t"),
    "DPM-Solver++ 2M": DPMSolverPP(order=2),
    "UniPC-3": UniPC(order=3),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/digits"), help="folder of results (runs/digits)")
    parser.add_argument("--steps", type=int, default=1000, help="training steps (1000)")
    parser.add_argument("--samples", type=int, default=512, help="images per solver and step count, at least 4 (512)")
    parser.add_argument("--nfe", type=int, nargs="+", default=[5, 10, 20, 50], help="evaluations (5 10 20 50)")
    parser.add_argument("--long", type=int, default=1000, help="evaluations of DDPM's long run (1000)")
    parser.add_argument("--images", type=int, default=500, help="held-out images of the likelihood (500)")
    parser.add_argument("--seed", type=int, default=0, help="of split, weights, training and sampling (0)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--fresh", action="store_true", help="forget an earlier run in --out")
    args = parser.parse_args(argv)
    with sigterm(), going_on(f"the same command goes on from the last checkpoint in {args.out}"):
        demonstrate(args)


def demonstrate(args: argparse.Namespace) -> None:
    """Train, race, measure, draw."""
    if args.fresh:
        shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True, exist_ok=True)

    images, _ = digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))
    training, held_out = images[order[500:]], images[order[:500]]

    start = time.perf_counter()
    denoiser = train(training, args)
    trained = time.perf_counter()
    found = diagnose(denoiser, held_out[:100].to(args.device))
    print(f"\nheld-out digits, denoised, beside the best linear guess:\n{found}")
    print(f"\nsampling {args.samples} images with each solver")
    results, drawn = race(denoiser, training, held_out, args)
    sampled = time.perf_counter()
    results["likelihood"] = likelihood(denoiser, order[:500][: args.images], args)
    now = time.perf_counter()
    seconds = {"train": trained - start, "sample": sampled - trained, "likelihood": now - sampled}
    seconds = {name: round(value, 1) for name, value in seconds.items()}
    results = {"environment": environment(args.device), "seconds": seconds, **results}
    write_json(args.out / "results.json", results)
    print("\n" + table(results) + "\n\n" + likelihood_line(results))
    draw_samples(drawn, held_out, results, args.out / "samples.png")
    draw_process(denoiser, held_out[0], args.out / "process.png", args.seed)
    print(f"\nwrote {args.out}/results.json, samples.png and process.png")


def train(training: Tensor, args: argparse.Namespace) -> Denoiser:
    """The denoiser, trained or continued from the checkpoint in --out, with averaged weights."""
    with torch.random.fork_rng():
        torch.manual_seed(args.seed)
        net = UNet(image_channels=1, channels=32, multipliers=(1, 2), blocks=1)
    net.to(device=args.device, memory_format=torch.channels_last)  # a tenth faster on a CPU
    denoiser = VDenoiser(net, VPSDE(), time=lambda t: 999 * t)
    config = TrainConfig(steps=args.steps, batch_size=128, lr=2e-3, ema_decay=0.995, seed=args.seed)
    try:
        trainer = Trainer(denoiser, training, config, weighting=min_snr(5.0), folder=args.out)
    except CheckpointError as error:
        raise SystemExit(f"{error}\n(--fresh forgets that run, --out names another folder)") from error
    if trainer.step:
        print(f"going on from step {trainer.step} of {config.steps}, {trainer.path} (--fresh starts anew)")
    parameters = sum(p.numel() for p in net.parameters())
    print(f"training a U-Net of {parameters:,} parameters on {len(training)} digits, {config.steps} steps")
    trained = trainer.fit().ema
    if trainer.threads is not None:  # what was faster in training is so in sampling
        torch.set_num_threads(trainer.threads)
    return trained


def race(denoiser: Denoiser, training: Tensor, held_out: Tensor, args: argparse.Namespace) -> tuple[dict, dict]:
    """Frechet distance of each solver within each budget of evaluations, and the samples themselves."""
    features = RandomFeatures(held_out.shape[1:])
    reference = features(held_out)
    rows: list[dict] = []
    drawn: dict[tuple[str, int], Tensor] = {}
    for name, budget in [(name, nfe) for name in RACE for nfe in args.nfe] + [("DDPM", args.long)]:
        shape = (args.samples, *held_out.shape[1:])
        solution = sample(denoiser, shape, RACE[name], nfe=budget, seed=args.seed, progress=True)
        drawn[name, budget] = solution.x.cpu().clamp(-1, 1)
        distance, std = bootstrap(features(drawn[name, budget]), reference, args.seed)
        row = {"solver": name, "budget": budget, "nfe": solution.nfe, "frechet_distance": distance, "std": std}
        rows.append(row)
        print(f"  {name:16s}{solution.nfe:5d} evaluations   Frechet distance {distance:.3f} (std {std:.3f})")
    return {
        "metric": "Frechet distance to 500 held-out digits, 64 random ReLU features (scoresde.metrics.RandomFeatures)",
        "samples": args.samples,
        "seed": args.seed,
        "training": {"images": len(training), "steps": args.steps, "batch_size": 128},
        "denoiser": repr(denoiser),
        "solvers": {name: repr(solver) for name, solver in RACE.items()},
        "floor": floor(features, training, reference, args.samples, args.seed),
        "rows": rows,
    }, drawn


def likelihood(denoiser: Denoiser, held_out: Tensor, args: argparse.Namespace) -> dict:
    """Bits per dimension of the held-out digits, by number: by the ODE, with one probe an evaluation, and the bound."""
    levels = digit_levels()[0][held_out].to(args.device)
    how = {"levels": 17, "data_range": outer_edges(-1.0, 1.0, 17), "seed": args.seed}
    found = bits_per_dim(denoiser, levels, **how, steps=40, batch_size=125, progress=True)
    x = dequantized(levels, **how).to(args.device)
    bits = found.offset + torch.cat([elbo(denoiser, part, seed=args.seed).bits_per_dim for part in x.split(125)])
    return {
        "images": len(levels),
        "bits_per_dim": round(found.value, 3),
        "stderr": round(found.stderr, 3),
        "nfe": found.nfe,
        "discretisation_error": round(found.error, 4),
        "bound": round(float(bits.mean()), 3),
        "bound_stderr": round(float(bits.std()) / len(bits) ** 0.5, 3),
    }


def likelihood_line(results: dict) -> str:
    """The likelihood in words."""
    found = results["likelihood"]
    return (
        f"{found['images']} held-out digits, 17 grey levels, uniform dequantisation: {found['bits_per_dim']:.3f} +- "
        f"{found['stderr']:.3f} bits/dim by the ODE (40 evaluations, one probe each), {found['bound']:.3f} +- "
        f"{found['bound_stderr']:.3f} by the variational bound."
    )


def bootstrap(x: Tensor, reference: Tensor, seed: int) -> tuple[float, float]:
    """Frechet distance of features x, and its standard deviation over 50 resamplings of x."""
    generator = torch.Generator().manual_seed(seed)
    draws = [x[torch.randint(len(x), (len(x),), generator=generator)] for _ in range(50)]
    std = torch.tensor([frechet_distance(draw, reference) for draw in draws]).std()
    return round(frechet_distance(x, reference), 3), round(float(std), 3)


def floor(features: RandomFeatures, training: Tensor, reference: Tensor, n: int, seed: int) -> dict[str, float]:
    """What real digits score: n training digits against the held-out ones, over 20 random choices of the n."""
    scores = []
    for k in range(20):
        generator = torch.Generator().manual_seed(derive_seed(seed, k))
        chosen = training[torch.randperm(len(training), generator=generator)[:n]]
        scores.append(frechet_distance(features(chosen), reference))
    values = torch.tensor(scores)
    return {"mean": round(float(values.mean()), 3), "std": round(float(values.std()), 3)}


def table(results: dict) -> str:
    """The results as Markdown: Frechet distance by solver and budget of evaluations."""
    columns = sorted({row["budget"] for row in results["rows"]})
    found = {(row["solver"], row["budget"]): f"{row['frechet_distance']:.2f}" for row in results["rows"]}
    lines = markdown(
        ["evaluations, at most", *columns], ([name, *(found.get((name, n), "") for n in columns)] for name in RACE)
    )
    real, noise = results["floor"], max(row["std"] for row in results["rows"] if row["budget"] == columns[-1])
    return "\n".join(lines) + (
        f"\n\nReal digits against real digits: {real['mean']:.2f} (std {real['std']:.2f}). The smallest entries have a "
        f"standard deviation of about {noise:.2f} (bootstrap over the {results['samples']} samples)."
    )


def tile(images: Tensor, columns: int) -> Tensor:
    """Images (n, 1, 8, 8) as one picture with lines between them, n a multiple of columns."""
    padded = torch.nn.functional.pad(images, (0, 1, 0, 1), value=-0.4)
    rows = padded[:, 0].reshape(-1, columns, *padded.shape[-2:])
    return rows.permute(0, 2, 1, 3).reshape(rows.shape[0] * rows.shape[2], -1)[:-1, :-1]


def show(axis: plt.Axes, picture: Tensor, title: str = "") -> None:
    axis.imshow(picture.numpy(), cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest")
    axis.set_title(title, fontsize=9)
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)


def draw_samples(drawn: dict[tuple[str, int], Tensor], held_out: Tensor, results: dict, path: Path) -> None:
    """A row a solver, a column a number of evaluations, and at the right DDPM's long run, real digits and the race."""
    counts = sorted({nfe for _, nfe in drawn})
    short, long = counts[:-1], counts[-1]
    side = min(6, int(len(drawn["DDPM", long]) ** 0.5 / 2))
    figure = plt.figure(figsize=(2.3 * (len(short) + 2), 2.45 * len(RACE)), layout="constrained")
    axes = figure.add_gridspec(len(RACE), len(short) + 2)
    rows = {(row["solver"], row["budget"]): row for row in results["rows"]}

    def title(name: str, budget: int) -> str:
        row = rows[name, budget]
        return f"{row['nfe']} evaluations: {row['frechet_distance']:.2f}"

    for i, name in enumerate(RACE):
        for j, nfe in enumerate(short):
            axis = figure.add_subplot(axes[i, j])
            show(axis, tile(drawn[name, nfe][: side**2], side), title(name, nfe))
            if j == 0:
                axis.set_ylabel(name, fontsize=11)
    real = results["floor"]["mean"]
    picture = tile(drawn["DDPM", long][: (2 * side) ** 2], 2 * side)
    show(figure.add_subplot(axes[:2, -2:]), picture, "DDPM, " + title("DDPM", long))
    real_digits = tile(held_out[: (2 * side) ** 2], 2 * side)
    show(figure.add_subplot(axes[2:4, -2:]), real_digits, f"real digits, held out: {real:.2f}")
    axis = figure.add_subplot(axes[4:, -2:])
    for name in RACE:
        points = [(row["nfe"], row["frechet_distance"]) for row in results["rows"] if row["solver"] == name]
        axis.loglog(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1.2, label=name)
    axis.axhline(real, color="gray", linestyle=":", linewidth=1.2, label="real digits")
    axis.set_xlabel("network evaluations", fontsize=8)
    axis.set_title("Frechet distance", fontsize=9)
    axis.tick_params(labelsize=7)
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def forward_path(sde: SDE, x0: Tensor, times: Tensor, generator: torch.Generator) -> Tensor:
    """A path of the forward SDE from x_0 at increasing times, shape (len(times), *x_0.shape).

    x_t / alpha = x_0 + B(tau), B a Brownian motion and tau = (sigma / alpha)^2 its clock: d(x / alpha) = g / alpha dw,
    and tau' = (g / alpha)^2.
    """
    alpha, tau = sde.alpha(times), (sde.sigma(times) / sde.alpha(times)) ** 2
    std = tau.diff(prepend=torch.zeros(1, dtype=tau.dtype)).sqrt()
    z = torch.randn(len(times), *x0.shape, generator=generator, dtype=tau.dtype)
    return (expand_like(alpha, z) * (x0 + (expand_like(std, z) * z).cumsum(0))).to(x0.dtype)


def draw_process(denoiser: Denoiser, digit: Tensor, path: Path, seed: int) -> None:
    """A digit turned to noise, and noise turned to digits, stochastically and deterministically, from the same x_T."""
    sde, steps, columns = denoiser.sde, 100, 11
    grid = Grid.uniform(sde, steps)
    shown = torch.linspace(0, steps, columns).round().long()
    times = grid.times[shown]
    forward = forward_path(sde, digit, times.flip(0), torch.Generator().manual_seed(seed))
    rows = [("forward SDE\nx_t", forward, times.flip(0))]
    x_T = sde.prior((1, *digit.shape), torch.Generator().manual_seed(seed), device=denoiser.device)
    for name, solver in (("reverse SDE\n(DDPM)", DDPM()), ("ODE\n(DDIM)", DDIM())):
        states = sample(denoiser, x_T, solver, grid=grid, seed=seed, trajectory=True).trajectory
        assert states is not None
        with torch.no_grad():
            means = [denoiser(states[i], float(t)).mean for i, t in zip(shown, times, strict=True)]
        rows += [(f"{name} x_t", states[shown, 0].cpu(), times), ("E[x_0 | x_t]", torch.cat(means).cpu(), times)]
    figure, axes = plt.subplots(len(rows), columns, figsize=(columns, 1.12 * len(rows)), layout="constrained")
    for i, (name, states, at) in enumerate(rows):
        for j in range(columns):
            show(axes[i, j], states[j, 0], f"t = {float(at[j]):.1f}" if i < 2 else "")
        axes[i, 0].set_ylabel(name, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
