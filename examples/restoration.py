"""Inverse problems with a model that knows none of them: holes, few pixels, blur and noise, by six methods.

    python examples/restoration.py                          two minutes on one core, after guidance.py's training
    python examples/restoration.py --model RUN --data fashion-mnist-test        a run of `scoresde train`; --help

What is measured of an image x is y = A(x) + noise. A denoiser that was trained on images alone, the unconditional half
of examples/guidance.py's network or any other, becomes a sampler of x given y in one line:

    Replacement(DDPM(), A, y, noise_std)                a solver: after each step, what y knows is put in place
    RePaint(A, y, noise_std, jump=5, resamplings=5)     the same with time travel, so that the rest finds to it
    DDNM(denoiser, A, y, noise_std)                     a denoiser: the mean is projected on what y knows
    DPS(denoiser, A, y, scale, steps=N)                 a gradient through the network, normalised as published
    PiGDM(denoiser, A, y, noise_std, data_std=s)        the same, with the width of x_0 given x_t in the weight
    MomentMatching(denoiser, A, y, noise_std)           with its covariance, from the network's Jacobian

All make the same number of steps of DDPM, with means clipped to the images' range outside of all else: where there is
much noise the Jacobian of a network is no covariance, and without it a draw in thirty or so runs away.
There is more than one answer to such a question, so each draws several for each image. A good set of draws is as far
from its mean as the truth is. So beside the PSNR, of single draws and of their mean, which is the best guess but no
likely image, the table has

    spread     variance among the draws / squared error of their mean, corrected for their number: 1 where the draws
               are as uncertain as they should be, less where they are too sure
    residual   rms of y - A(x) / noise_std: about 1 for draws that explain y and no more

Writes restoration.png, results.json and README.md into --out.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from guidance import split, trained
from shared import tile
from torch import Tensor

from scoresde import Denoiser, Solution, sample
from scoresde.data import training_data
from scoresde.guidance import Conditioned
from scoresde.guidance.operators import Blur, Downsample, LinearOperator, Mask, box_mask, random_mask
from scoresde.guidance.posterior_sampling import DPS, MomentMatching, PiGDM
from scoresde.guidance.projections import DDNM
from scoresde.guidance.replacement import RePaint, Replacement
from scoresde.info import environment
from scoresde.report import table, write_json
from scoresde.solvers import DDPM
from scoresde.training import load
from scoresde.wrappers import Clip

matplotlib.use("Agg")
import matplotlib.pyplot as plt


class Problem(NamedTuple):
    """A measurement of images x, each of them repeated for its draws."""

    A: LinearOperator
    y: Tensor
    noise_std: float
    data_std: float


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/restoration"), help="results (runs/restoration)")
    parser.add_argument("--model", type=Path, help="a run folder; by default runs/guidance/model, trained if need be")
    parser.add_argument("--data", default="digits", help="images by name or path; of the digits, held-out ones")
    parser.add_argument("--images", type=int, default=24, help="images restored, at least 2 (24)")
    parser.add_argument("--draws", type=int, default=6, help="for each image and method, at least 2 (6)")
    parser.add_argument("--steps", type=int, default=100, help="of DDPM (100)")
    parser.add_argument("--noise", type=float, default=0.05, help="its standard deviation, of data in [-1, 1] (0.05)")
    parser.add_argument("--zeta", type=float, default=0.5, help="step size of DPS (0.5)")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)

    truth, data_std = images(args)
    if args.model is None:
        args.model = Path("runs/guidance/model")
        trained(args.model)
    denoiser = Conditioned(load(args.model, device=args.device), drop=("label",))  # no label: the unconditional model
    start = time.perf_counter()
    rows, drawn = [], {}
    for name in args.problems:
        A = PROBLEMS[name](truth.shape[1:])
        noise = torch.randn(A(truth).shape, generator=torch.Generator().manual_seed(args.seed))
        y = A(truth) + args.noise * noise
        found = restored(denoiser, Problem(A, y, args.noise, data_std), truth, args)
        rows += [{"problem": name, **row} for row in found["rows"]]
        drawn[name] = (shown(A, y), found["x"])
    results = {
        "environment": environment(args.device),
        "seconds": round(time.perf_counter() - start, 1),
        "model": repr(denoiser),
        **{key: getattr(args, key) for key in ("data", "images", "draws", "steps", "noise", "zeta", "seed")},
        "data_std": round(data_std, 3),
        "problems": {name: repr(PROBLEMS[name](truth.shape[1:])) for name in args.problems},
        "rows": rows,
    }
    write_json(args.out / "results.json", results)
    (args.out / "README.md").write_text(report(results))
    draw(truth, drawn, results, args.out / "restoration.png")
    print("\n" + report(results) + f"\nwrote {args.out}/restoration.png, results.json and README.md")


def images(args: argparse.Namespace) -> tuple[Tensor, float]:
    """Images to restore, in [-1, 1], and the standard deviation of a pixel of such images."""
    if args.data == "digits":
        x = split()[1][0]
    else:
        data = training_data(args.data, lazy=False)
        x = data.batch(torch.arange(len(data))).x
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(args.seed))[: args.images]
    return x[chosen], float(x[:1000].var(0).mean().sqrt())


def hole(shape: tuple[int, ...]) -> Mask:
    """All but the middle half, in height and width."""
    H, W = shape[-2:]
    return box_mask((H, W), (H // 4, W // 4), (H - H // 4, W - W // 4))


PROBLEMS: dict[str, Callable[[tuple[int, ...]], LinearOperator]] = {
    "hole": hole,
    "a quarter of the pixels": lambda shape: random_mask(shape[-2:], keep=0.25, seed=0),
    "half the resolution": lambda shape: Downsample(2),
    "blur": lambda shape: Blur(shape[-1] / 8),
}


def methods(denoiser: Denoiser, problem: Problem, args: argparse.Namespace) -> dict[str, Callable[[], Solution]]:
    """The ways to a sample of x given y. A solver may be wrapped, or a denoiser."""
    A, y, noise_std, data_std = problem
    shape = (len(y), *A.pseudo_inverse(y[:1]).shape[1:])

    def run(denoiser: Denoiser, solver: DDPM | Replacement | RePaint = DDPM()) -> Solution:  # noqa: B008 (frozen)
        x_T = denoiser.sde.prior(shape, torch.Generator().manual_seed(args.seed)).to(denoiser.device)
        return sample(Clip(denoiser), x_T, solver, steps=args.steps, seed=args.seed)

    ways = {
        "replacement": lambda: run(denoiser, Replacement(DDPM(), A, y, noise_std)),
        "RePaint": lambda: run(denoiser, RePaint(A, y, noise_std, jump=5, resamplings=5)),
        "DDNM": lambda: run(DDNM(denoiser, A, y, noise_std, data_std=data_std)),
        "DPS": lambda: run(DPS(denoiser, A, y, args.zeta, steps=args.steps)),
        "PiGDM": lambda: run(PiGDM(denoiser, A, y, noise_std, data_std=data_std)),
        "moment matching": lambda: run(MomentMatching(denoiser, A, y, noise_std)),
    }
    if A.singular_value is None and noise_std > 0:  # what y knows of a blurred x it knows to different degrees
        del ways["replacement"], ways["RePaint"]
    return ways


def restored(denoiser: Denoiser, problem: Problem, truth: Tensor, args: argparse.Namespace) -> dict:
    """Draws of each method, (images, draws, *event), and their scores."""
    A, y, noise_std, _ = problem
    repeated = problem._replace(y=y.repeat_interleave(args.draws, dim=0).to(args.device))
    alone = A.ridge(y, (noise_std / problem.data_std) ** 2)  # without a model: the best linear guess for white images
    rows, drawn = [{"method": "no model", "psnr_of_mean": psnr(alone, truth)}], {}
    for name, way in methods(denoiser, repeated, args).items():
        start = time.perf_counter()
        solution = way()
        seconds = time.perf_counter() - start
        residual = (repeated.y - A(solution.x)).cpu()
        known = A(torch.ones_like(truth)).ne(0).double().mean() if isinstance(A, Mask) else torch.ones(())
        x = solution.x.cpu().unflatten(0, (len(truth), args.draws))
        mean, M = x.mean(1), args.draws
        error = (mean - truth).square() / (1 + 1 / M)  # the truth being one more draw, of its expectation
        row = {
            "method": name,
            "psnr": psnr(x, truth[:, None]),
            "psnr_of_mean": psnr(mean, truth),
            "spread": ratio(x.var(1), error),
            "residual": round(float((residual.square().mean() / known).sqrt() / max(noise_std, 1e-9)), 2),
            "nfe": solution.nfe,
            "seconds": round(seconds, 1),
        }
        rows.append(row)
        drawn[name] = x
        print(f"{A!r}: " + "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return {"rows": rows, "x": drawn}


def ratio(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Of the means over images, and its standard error over them, to first order."""
    a, b = (each.flatten(1).double().mean(1) for each in (a, b))
    value = float(a.mean() / b.mean())
    return value, value * float((a / a.mean() - b / b.mean()).std()) / math.sqrt(len(a))


def psnr(x: Tensor, truth: Tensor) -> tuple[float, float]:
    """10 log10 of the range squared over the mean squared error of all images, in decibels; and its standard error."""
    value, stderr = ratio((x.clamp(-1, 1) - truth).square(), torch.full_like(truth, 4))
    return -10 * math.log10(value), 10 / math.log(10) * stderr / value


def shown(A: LinearOperator, y: Tensor) -> Tensor:
    """The measurement as a picture: NaN where nothing is known."""
    return torch.where(A(torch.ones_like(y)) > 0, y, math.nan) if isinstance(A, Mask) else y


def report(results: dict) -> str:
    """The table, as Markdown."""
    about = results["environment"]
    head = ["", "method", "PSNR of a draw", "of their mean", "spread", "residual", "evaluations", "seconds"]

    def cell(value: object) -> str:
        return "{:.2f} ({:.1g})".format(*value) if isinstance(value, tuple) else str(value)

    keys = ("psnr", "psnr_of_mean", "spread", "residual", "nfe", "seconds")
    rows = ([row["problem"], row["method"], *(cell(row.get(key, "")) for key in keys)] for row in results["rows"])
    operators = "\n".join(f"- {name}: `{operator}`" for name, operator in results["problems"].items())
    return f"""# Restoration with an unconditional model

`{about["command"]}`: {about["device"]}, {about["threads"]} thread(s), {about["dtype"]}; torch {about["torch"]};
scoresde {about["scoresde"]}, commit {about["commit"]}; {results["seconds"]:.0f} s.

{results["images"]} images of {results["data"]}, {results["draws"]} draws for each, {results["steps"]} steps of DDPM,
noise {results["noise"]:g} in y, images being in [-1, 1] with a standard deviation of {results["data_std"]} per pixel.
PSNR in decibels, over all images at once; in brackets standard errors over the images. Methods share images and noise.
Spread: 1 where the draws are as far from each other as from the truth, less
where they are too sure; residual: 1 where they explain y and no more. DPS is not told the noise: its step size is
{results["zeta"]:g}. Replacement and RePaint take a noisy y only where A has one singular value, so not under blur. No
model: A^T (A A^T + rho)^-1 y with rho = (noise / standard deviation)^2.

{chr(10).join(table(head, rows))}

{operators}

![Truth, measurement, and draws of each method](restoration.png)
"""


# --- the picture -----------------------------------------------------------------------------------------------------


def draw(truth: Tensor, drawn: dict, results: dict, path: Path, most: int = 3) -> None:
    """For each problem a row of panels, with a row for each image: truth, measurement, two draws of each method."""
    n, names = min(most, len(truth)), list(max((x for _, x in drawn.values()), key=len))
    figure, axes = plt.subplots(
        len(drawn),
        2 + len(names),
        figsize=(1.8 * len(names) + 1.9, (0.83 * n + 0.32) * len(drawn)),
        width_ratios=[1, 1, *[2] * len(names)],
        layout="constrained",
        squeeze=False,
    )
    for line, (problem, (y, x)) in zip(axes, drawn.items(), strict=True):
        scores = {row["method"]: row for row in results["rows"] if row["problem"] == problem}
        panels = {"truth": tile(truth[:n], 1), "measured": tile(y[:n], 1)}
        panels |= {f"{name}, {scores[name]['psnr'][0]:.1f} dB": tile(x[name][:n, :2].flatten(0, 1), 2) for name in x}
        for axis in line:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        left_out = len(names) - len(x)  # the first of them
        for axis, (title, picture) in zip([*line[:2], *line[2 + left_out :]], panels.items(), strict=True):
            axis.imshow(picture)
            axis.set_title(title, fontsize=9)
        line[0].set_ylabel(problem, fontsize=12)
        for axis, name in zip(line[2:], names[:left_out], strict=False):
            why = f"{name}:\nonly where A has\none singular value"
            axis.text(0.5, 0.5, why, ha="center", va="center", fontsize=9, transform=axis.transAxes)
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
