"""Segmentation as generation: masks drawn given an image, where it is clear and where it is not.

    python examples/segmentation.py        some eight minutes on one core, nearly all of it training; --help

SegDiff (Amit et al., 2021) learns p(mask | image) by diffusion: x is the mask, in {-1, 1}, and the image c meets x_t at
the entrance of the U-Net as the sum of two encodings, `UNet(image_condition=1, image_blocks=2)`. Raced here at equal
training steps on the same scenes:

    F(x) + G(c)    that network
    [x, c]         the image concatenated to x_t, `UNet(image_condition=1)`
    supervised     the first one with x_t = 0, trained by logistic loss on each pixel: one answer, P(mask | image)

**Scenes** of 20 x 20 pixels are made with a stated seed: one to three real digits (scikit-learn's, those of the test
scenes held out) at random places, darker or lighter by a contrast of 0.1, 0.2, 0.4 or 0.8 than a random texture of
standard deviation 0.15, of its own grain and direction. The mask is where a digit's ink is above one half. At the
lowest contrast the digits are hidden in the texture.

The intersection over union (IoU) of one sample says how good a guess a draw is. The mean of several, thresholded, is
closer to what a supervised network answers. How far samples are from each other says where the image is ambiguous, and
whether they say it truly is measured: E|x' - x''|^2 / E|x' - x|^2 is 1 for draws from p(x | c).

Writes segmentation.png, results.json and README.md into --out. A run that is killed goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from guidance import split
from palette import SOLVERS, drawn_of, guess, ratio_of, short
from shared import arguments, cell, grid, mean_and_error, picture, place, publish, ran, size, trained
from torch import Tensor
from torch.nn import functional as F

from scoresde.data import Given, TrainingData
from scoresde.denoiser import NetworkDenoiser
from scoresde.report import table
from scoresde.training import ModelConfig

SIZE, CONTRASTS, TEXTURE = 20, (0.1, 0.2, 0.4, 0.8), 0.15
NETWORK = {"channels": 24, "multipliers": (1, 2), "blocks": 1, "patch": 2, "image_condition": 1}
ADDED = {**NETWORK, "image_blocks": 2}
MODELS = {
    "F(x) + G(c)": ModelConfig(options=ADDED, predicts="v", time_scale=999),
    "[x, c]": ModelConfig(options=NETWORK, predicts="v", time_scale=999),
    "supervised": ModelConfig(options=ADDED, predicts="x0", time_scale=999),
}
FOLDERS = {"F(x) + G(c)": "added", "[x, c]": "concatenated", "supervised": "supervised"}
SOLVER = SOLVERS["SDE"]
DRAWN = ("F(x) + G(c)", "[x, c]")


def main(argv: list[str] | None = None) -> None:
    parser = arguments(
        __doc__,
        "segmentation",
        models=(Path("runs/segmentation"), "folder of the three runs"),
        train_steps=(1200, "of each network, 64 scenes a step"),
        scenes=(20000, "to train on"),
        held_out=(400, "scenes measured, a multiple of four"),
        draws=(8, "samples for each"),
        nfe=(20, "evaluations of a sample"),
    )
    args = parser.parse_args(argv)
    (digits, _), (others, _) = split()
    image, mask, _ = scenes(args.scenes, digits, args.seed)
    training = TrainingData(mask, seed=args.seed, conditions=(Given(image),))
    nets = {}
    for name, model in MODELS.items():
        loss = logistic if name == "supervised" else None
        nets[name] = trained(model, training, args.models / FOLDERS[name], args.train_steps, args.seed, loss=loss)
    start, held_out = time.perf_counter(), scenes(args.held_out, others, args.seed + 1)
    found, drawn = measured(nets, held_out, args)
    results = {
        **ran(args.models, {FOLDERS[name]: net for name, net in nets.items()}, start),
        "parameters": {name: size(net) for name, net in nets.items()},
        "models": {name: model.to_dict() for name, model in MODELS.items()},
        "solver": repr(SOLVER),
        "rows": found,
    }
    publish(args, "segmentation", results, report, lambda path: draw(drawn, held_out, path))


# --- the scenes ------------------------------------------------------------------------------------------------------


def scenes(n: int, digits: Tensor, seed: int, contrasts: Sequence[float] = CONTRASTS) -> tuple[Tensor, Tensor, Tensor]:
    """n scenes: images (n, 1, 20, 20) in [-1, 1], masks in {-1, 1}, and contrasts (n,), which take turns."""
    generator = torch.Generator().manual_seed(seed)
    ink = torch.zeros(n, 1, SIZE, SIZE)
    how_many = torch.randint(1, 4, (n,), generator=generator)
    for k in range(3):
        which = torch.randint(len(digits), (n,), generator=generator)
        corner = torch.randint(SIZE - digits.shape[-1] + 1, (n, 2), generator=generator)
        with_it = ink.maximum(placed((digits[which] + 1) / 2, corner))
        ink = torch.where((k < how_many).reshape(-1, 1, 1, 1), with_it, ink)
    contrast = torch.tensor(contrasts).repeat(-(-n // len(contrasts)))[:n]
    sign = 2.0 * torch.randint(2, (n,), generator=generator) - 1
    image = TEXTURE * textures(n, generator) + (sign * contrast).reshape(-1, 1, 1, 1) * ink
    return image.clamp(-1, 1), (ink > 0.5).float() * 2 - 1, contrast


def placed(digits: Tensor, corner: Tensor) -> Tensor:
    """Each digit (n, 1, 8, 8) with its upper left corner there, on a ground of zeros, (n, 1, 20, 20)."""
    side = torch.arange(digits.shape[-1])
    out = torch.zeros(len(digits), 1, SIZE, SIZE)
    rows, columns = corner[:, :1] + side, corner[:, 1:] + side
    out[torch.arange(len(digits))[:, None, None], 0, rows[:, :, None], columns[:, None, :]] = digits[:, 0]
    return out


def textures(n: int, generator: torch.Generator) -> Tensor:
    """White noise, smoothed by a Gaussian of two widths and a direction that are each texture's own, and a little white
    noise, (n, 1, 20, 20), each of variance 1."""
    widths = 0.4 + 2.6 * torch.rand(n, 2, 1, 1, generator=generator)
    angle = math.pi * torch.rand(n, 1, 1, generator=generator)
    k = 2 * math.pi * torch.fft.fftfreq(SIZE)
    u = k[:, None] * angle.cos() + k[None, :] * angle.sin()
    v = k[None, :] * angle.cos() - k[:, None] * angle.sin()
    smooth = torch.exp(-((widths[:, 0] * u) ** 2 + (widths[:, 1] * v) ** 2) / 2)
    white = torch.randn(n, SIZE, SIZE, generator=generator)
    x = torch.fft.ifft2(torch.fft.fft2(white) * smooth).real
    x = x / x.flatten(1).std(1).reshape(-1, 1, 1) + 0.3 * torch.randn(n, SIZE, SIZE, generator=generator)
    return (x / x.flatten(1).std(1).reshape(-1, 1, 1))[:, None]


# --- what is measured ------------------------------------------------------------------------------------------------


def logistic(denoiser: NetworkDenoiser, x0: Tensor, draws: object, cond: Mapping[str, Any]) -> Tensor:
    """- log P(mask | image) of each pixel, the network's output being the logit; a `Loss`."""
    return F.binary_cross_entropy_with_logits(guess(denoiser, cond, tuple(x0.shape)), (x0 > 0).to(x0))


def iou(a: Tensor, b: Tensor) -> Tensor:
    """|a and b| / |a or b| of masks that are positive inside, over the last three axes; 1 where both are empty."""
    a, b = a > 0, b > 0
    both, either = ((m.flatten(-3).sum(-1)) for m in (a & b, a | b))
    return torch.where(either == 0, 1.0, both / either.clamp(min=1))


def measured(
    nets: dict[str, NetworkDenoiser], held_out: tuple[Tensor, Tensor, Tensor], args: argparse.Namespace
) -> tuple[list[dict], dict[str, Tensor]]:
    """A row for each contrast, and for all; the samples and the supervised network's logits."""
    image, mask, contrast = held_out
    drawn = {
        name: drawn_of(nets[name], image, args.draws, mask.shape[1:], args.nfe, args.seed, SOLVER) for name in DRAWN
    }
    with torch.no_grad():
        drawn["supervised"] = torch.cat(
            [guess(nets["supervised"], {"image": c}, (len(c), *mask.shape[1:])) for c in image.split(500)]
        )
    scores = {"supervised": iou(drawn["supervised"], mask)}
    apart, squares = {}, {}
    for name in DRAWN:
        x = drawn[name]
        scores[f"{name}, one sample"] = iou(x, mask[:, None]).mean(1)
        scores[f"{name}, mean"] = iou(x.mean(1), mask)
        i, j = torch.triu_indices(args.draws, args.draws, 1)
        apart[name] = 1 - iou(x[:, i], x[:, j]).mean(1)
        squares[name] = (2 * x.var(1).flatten(1).mean(1), (x - mask[:, None]).square().flatten(1).mean(1))
    scores["best constant"] = iou(torch.ones_like(mask), mask)
    rows = []
    for value in (*CONTRASTS, None):
        here = torch.ones(len(mask), dtype=torch.bool) if value is None else (contrast - (value or 0)).abs() < 1e-6
        row = {"contrast": value, "scenes": int(here.sum())}
        row["iou"] = {name: mean_and_error(score[here]) for name, score in scores.items()}
        row["apart"] = {name: mean_and_error(found[here]) for name, found in apart.items()}
        row["ratio"] = {name: ratio_of(a[here], b[here]) for name, (a, b) in squares.items()}
        added, other = (scores[f"{name}, mean"][here] for name in DRAWN)
        row["added - supervised"] = mean_and_error(added - scores["supervised"][here])
        row["added - concatenated"] = mean_and_error(added - other)
        row["mean - one sample"] = mean_and_error(added - scores[f"{DRAWN[0]}, one sample"][here])
        rows.append(row)
        print(row, flush=True)
    return rows, drawn


# --- what is written -------------------------------------------------------------------------------------------------


def verdict(difference: list[float]) -> str:
    """A difference with its standard error, in words: a tie within two of them."""
    mean, error = difference
    return f"{mean:+.3f} ({error:.3f}), " + ("a tie" if abs(mean) <= 2 * error else "ahead" if mean > 0 else "behind")


def report(results: dict) -> str:
    """The tables, as Markdown."""
    rows = results["rows"]
    names = list(rows[0]["iou"])
    order = [n for n in names if n.startswith(DRAWN)] + ["supervised", "best constant"]
    titles = {"best constant": "everything inside"}
    where = ["all" if row["contrast"] is None else f"{row['contrast']:g}" for row in rows]
    scores = table(
        ["contrast", *(titles.get(n, n) for n in order)],
        ([at, *(cell(row["iou"][n], 3) for n in order)] for at, row in zip(where, rows, strict=True)),
    )
    leads = table(
        ["contrast", "mean of F(x) + G(c) less supervised", "less mean of [x, c]", "less one sample of its own"],
        (
            [at, *(verdict(row[key]) for key in ("added - supervised", "added - concatenated", "mean - one sample"))]
            for at, row in zip(where, rows, strict=True)
        ),
    )
    spread = table(
        ["contrast", *(f"{name}, {what}" for what in ("apart", "ratio") for name in DRAWN)],
        (
            [at, *(cell(row[what][name], 3) for what in ("apart", "ratio") for name in DRAWN)]
            for at, row in zip(where, rows, strict=True)
        ),
    )
    sizes = ", ".join(f"{name} {n:,}" for name, n in results["parameters"].items())
    return f"""# Segmentation as generation

{place(results)}

Scenes of real digits on random textures of standard deviation {TEXTURE} (`examples/segmentation.py`, seed
{results["seed"]}): {results["scenes"]:,} to train on, {results["held_out"]} held out, of digits that are in no
training scene. Three U-Nets, each trained for {results["train_steps"]} steps of 64 scenes; parameters: {sizes}.
{results["draws"]} samples for each scene, {results["nfe"]} evaluations of `{short(results["solver"])}`.

## Intersection over union

Of one sample (the mean over {results["draws"]} samples of each scene), of the mean of {results["draws"]} samples, cut
at 0, and of the supervised network, cut at probability 1/2. In brackets the standard error over scenes; each network
was trained once, for some minutes; longer training was not tried.

{chr(10).join(scores)}

Scene by scene, with the standard error of the difference; within two of them it is called a tie:

{chr(10).join(leads)}

![Image, mask, samples, their mean, and the supervised network's probability](segmentation.png)

## What samples say of the image

Apart: 1 - IoU of two samples for one image. Ratio: mean square distance of two samples over that of a sample from the
truth, 1 where samples are as uncertain as they should be.

{chr(10).join(spread)}
"""


def draw(drawn: dict[str, Tensor], held_out: tuple[Tensor, Tensor, Tensor], path: Path, each: int = 2) -> None:
    """Two scenes of each contrast, a row each: image, mask, three samples, their mean, the supervised probability."""
    image, mask, contrast = held_out
    chosen = [int(i) for c in CONTRASTS for i in ((contrast - c).abs() < 1e-6).nonzero()[:each, 0]]
    x, p = drawn[DRAWN[0]], drawn["supervised"].sigmoid() * 2 - 1
    titles = ["image", "mask", *["sample"] * min(3, x.shape[1]), f"mean of {x.shape[1]}", "supervised"]
    lines = [torch.stack([image[i], mask[i], *x[i, :3], x[i].mean(0), p[i]]) for i in chosen]
    names = [f"contrast\n{float(contrast[i]):g}" for i in chosen]
    with picture(path, 7.2, 0.98 * len(chosen) + 0.4, dpi=110) as figure:
        axis = figure.subplots()
        grid(axis, lines, names, titles)
        axis.xaxis.tick_top()


if __name__ == "__main__":
    main()
