"""One network for five tasks: colour, holes, edges, JPEG's blocks and few pixels, and what drawing samples is for.

    python examples/palette.py             some ten minutes on one core, nearly all of it training; --help

Palette (Saharia et al., 2022) trains one conditional diffusion model on colourisation, inpainting, uncropping and JPEG
restoration, and SR3 (Saharia et al., 2022) one on super-resolution; here one network does all five, and is not told
which it is: `OneOf` gives it what a task has left of the image x, and a channel m, 1 where nothing is masked,
concatenated to x_t. Beside it stands a **regression**: the same network with x_t = 0 and the loss |N(y) - x|^2, as many
steps on the same images. It finds E[x | y], the best guess; the diffusion model draws from p(x | y).

**The images** are Fashion-MNIST, halved to 16 x 16 and coloured by a law that is known. A garment's grey level g in
[0, 1] mixes a ground and a cloth, x = (1 - g) b + g c, of luma 0.1 and 0.6; their hues in the plane of Cb and Cr are
opposite, and the cloth's is one of two, theta and theta + 180 degrees, with probability 1/2 each, theta = 0 for tops
and dresses, 60 for trousers and bags, 120 for shoes. So the luma says nothing of the colour but by the shape of the
garment: given it, one of the two colours is as likely as the other, their mean is grey, and so is the best guess.

Measured on held-out images: PSNR, Frechet distance, and the diversity of samples beside the distance to the truth. Of
draws from p(x | y) two are as far from each other as each is from the truth, which is one more draw: E|x' - x''|^2 =
E|x' - x|^2, their ratio is 1.

Writes palette.png, results.json and README.md into --out. A run that is killed goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from shared import arguments, cell, drawn, grid, mean_and_error, picture, place, publish, size, spent, trained
from torch import Tensor
from torch.nn import functional as F

from scoresde import Denoiser
from scoresde.data import (
    Colourisation,
    Condition,
    Inpainting,
    JPEGRestoration,
    OneOf,
    SuperResolution,
    TrainingData,
    Uncropping,
    read_data,
)
from scoresde.denoiser import NetworkDenoiser
from scoresde.metrics import Evaluation, RandomFeatures, evaluate
from scoresde.metrics.errors import psnr
from scoresde.report import table
from scoresde.solvers import Adams, DPMSolverPP, Solver
from scoresde.training import ModelConfig

SIZE, KINDS = 16, ("tops and dresses", "trousers and bags", "shoes")
KIND = torch.tensor([0, 1, 0, 0, 0, 2, 0, 2, 1, 2])  # of each class of Fashion-MNIST
CLOTH, GROUND = (0.6, 0.22), (0.1, 0.055)  # luma and chroma, of colours in [0, 1]
TASKS: dict[str, Condition] = {
    "colourisation": Colourisation(),
    "inpainting": Inpainting(),
    "uncropping": Uncropping(),
    "JPEG restoration": JPEGRestoration(5, 30),
    "super-resolution": SuperResolution(4),
}
NETWORK = {"image_channels": 3, "channels": 32, "multipliers": (1, 2), "blocks": 1, "patch": 2, "image_condition": 4}
DIFFUSION = ModelConfig(options=NETWORK, predicts="v", time_scale=999)
REGRESSION = ModelConfig(options=NETWORK, predicts="x0", time_scale=999)
SOLVERS: dict[str, Solver] = {"SDE": DPMSolverPP(order=2, stochastic=True), "ODE": Adams()}


def main(argv: list[str] | None = None) -> None:
    parser = arguments(
        __doc__,
        "palette",
        models=(Path("runs/palette"), "folder of the two runs"),
        data=(("fashion-mnist", "fashion-mnist-test"), "Fashion-MNIST to train on, and held out, by name or path"),
        train_steps=(2000, "of each network, 128 images a step"),
        images=(1000, "held-out images for each task"),
        several=(100, "of these, images of which several are drawn"),
        draws=(8, "how many"),
        nfe=(20, "evaluations of a sample"),
    )
    args = parser.parse_args(argv)
    training = TrainingData(coloured(args.data[0], args.seed)[0], levels=256, seed=args.seed,
                            conditions=(OneOf(tuple(TASKS.values())),))  # fmt: skip
    nets = {
        name: trained(model, training, args.models / name, args.train_steps, args.seed, loss=loss, batch_size=128)
        for name, model, loss in (("diffusion", DIFFUSION, None), ("regression", REGRESSION, squared_error))
    }
    start = time.perf_counter()
    rows, law, shown, reference = measured(nets, args)
    results = {
        "seconds": {name: spent(args.models / name) for name in nets} | {"measure": time.perf_counter() - start},
        "parameters": size(nets["diffusion"]),
        "model": DIFFUSION.to_dict(),
        "solvers": {name: repr(solver) for name, solver in SOLVERS.items()},
        "tasks": {name: repr(task) for name, task in TASKS.items()},
        "reference": reference,
        "rows": rows,
        "law": law,
    }
    publish(args, "palette", results, report, lambda path: draw(shown, path))


# --- the images ------------------------------------------------------------------------------------------------------


def coloured(source: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images, uint8, (N, 3, 16, 16), coloured by the law; g of each pixel, (N, 1, 16, 16); and each item's kind."""
    found = read_data(source, labels=True)
    assert found.labels is not None
    g = F.avg_pool2d(F.pad(found.x.float() / 255, (2, 2, 2, 2)), 2)
    kind = KIND[found.labels]
    end = torch.randint(2, (len(g),), generator=torch.Generator().manual_seed(seed))
    hue = (math.pi / 3 * kind + math.pi * end).reshape(-1, 1, 1, 1)
    x = (1 - g) * color(*GROUND, hue + math.pi) + g * color(*CLOTH, hue)
    return x.mul(255).round().to(torch.uint8), g, kind


def color(luma: float, chroma: float, hue: Tensor) -> Tensor:
    """RGB in [0, 1] of luma, and of Cb + i Cr = chroma exp(i hue) (ITU-R BT.601, as JPEG's): hue (B, 1, 1, 1)."""
    Cb, Cr = chroma * hue.cos(), chroma * hue.sin()
    return luma + torch.cat([1.402 * Cr, -0.344136 * Cb - 0.714136 * Cr, 1.772 * Cb], dim=1)


def chroma_of(x: Tensor, weight: Tensor) -> Tensor:
    """Mean of Cb + i Cr of images in [-1, 1], where weight (B, 1, H, W) is: complex, (B,)."""
    red, green, blue = (x / 2).split(1, dim=1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    chroma = torch.complex((blue - luma) / 1.772, (red - luma) / 1.402)
    return (chroma * weight).flatten(1).sum(1) / weight.flatten(1).sum(1)


# --- the networks ----------------------------------------------------------------------------------------------------


def squared_error(denoiser: NetworkDenoiser, x0: Tensor, draws: object, cond: Mapping[str, Any]) -> Tensor:
    """|N(y) - x_0|^2 of the network as a regression; a `Loss`."""
    return (guess(denoiser, cond, x0.shape) - x0).square().mean()


def guess(denoiser: NetworkDenoiser, cond: Mapping[str, Any], shape: tuple[int, ...]) -> Tensor:
    """N(y), the network being told nothing else: x_t = 0, and a time that is always the same."""
    image = cond["image"]
    out: Tensor = denoiser.net(image.new_zeros(shape), image.new_zeros(shape[0]), image=image)
    return out


# --- what is measured ------------------------------------------------------------------------------------------------


def drawn_of(
    denoiser: Denoiser, image: Tensor, draws: int, event: tuple[int, ...], nfe: int, seed: int, solver: Solver
) -> Tensor:
    """Samples given each image, in [-1, 1]: (B, draws, *event)."""
    given = {"image": image.repeat_interleave(draws, 0)}
    return drawn(denoiser, event, solver, nfe=nfe, seed=seed, cond=given, batch=500).unflatten(0, (-1, draws))


def ratio_of(a: Tensor, b: Tensor) -> list[float]:
    """mean a / mean b of two numbers for each image, with its standard error to first order."""
    ratio = float(a.double().mean() / b.double().mean())
    return [ratio, mean_and_error(a - ratio * b)[1] / float(b.mean())]


def scores(images: Tensor, truth: Tensor, score: Callable[[Tensor], Evaluation]) -> dict[str, list[float]]:
    """PSNR and Frechet distance, each with its standard error; and what real images have, with a standard deviation."""
    found = score(images)["frechet"]
    psnrs = mean_and_error(psnr(images, truth))
    return {"psnr": psnrs, "frechet": [found.value, found.stderr], "floor": [found.floor, found.floor_std]}


def measured(nets: dict[str, NetworkDenoiser], args: argparse.Namespace) -> tuple[list[dict], dict, dict, int]:
    """The rows of the table, the colours of colourisation, the images of the picture, and how many images the Frechet
    distances are to.
    """
    levels, g, kind = coloured(args.data[1], args.seed + 1)
    order = torch.randperm(len(levels), generator=torch.Generator().manual_seed(args.seed))
    chosen, others = order[: args.images], order[args.images :]
    event = tuple(levels.shape[1:])
    every = TrainingData(levels, levels=256).batch(others).x
    reference, real = every[: len(every) // 2], every[len(every) // 2 :]
    features = RandomFeatures(event)
    score = partial(evaluate, reference=reference, metrics=["frechet"], features=features, floor=real, floors=20)
    rows, law, pictures = [], {}, {}
    for name, task in TASKS.items():
        data = TrainingData(levels, levels=256, seed=args.seed, conditions=(OneOf((task,)),))
        x, cond = data.batch(chosen)
        y = cond["image"]
        with torch.no_grad():
            best = torch.cat([guess(nets["regression"], {"image": p}, (len(p), *event)) for p in y.split(500)])
        best, some = best.clamp(-1, 1), x[: args.several]
        guessed, several = psnr(best[: args.several], some), {}
        for way, solver in SOLVERS.items():
            how = (event, args.nfe, args.seed, solver)
            one = drawn_of(nets["diffusion"], y, 1, *how)[:, 0]
            several[way] = z = drawn_of(nets["diffusion"], y[: args.several], args.draws, *how)
            to_truth = (z - some[:, None]).square().flatten(1).mean(1)  # E|x' - x|^2 of each image
            apart, mean = 2 * z.var(1).flatten(1).mean(1), psnr(z.mean(1), some)  # E|x' - x''|^2
            row = {"task": name, "way": way, **scores(one, x, score), "psnr_of_mean": mean_and_error(mean)}
            row |= {"lead": mean_and_error(mean - guessed), "apart": mean_and_error(apart.sqrt())}
            rows.append(row | {"ratio": ratio_of(apart, to_truth)})
        guesses = {"psnr_of_mean": mean_and_error(guessed)}
        rows.append({"task": name, "way": "regression", **scores(best, x, score), **guesses})
        rows.append({"task": name, "way": "condition", **scores(y[:, :3], x, score)})
        for row in rows[-4:]:
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        if name == "colourisation":
            those = chosen[: args.several]
            images = {"truth": some[:, None], **several, "regression": best[: args.several, None]}
            law, points = colours(images, g[those], kind[those])
        masked = y[:, 3:] == 0
        pictures[name] = (torch.where(masked, math.nan, y[:, :3]), several["SDE"], best, x)
    return rows, law, {"images": pictures, "colours": points}, len(reference)


def colours(images: dict[str, Tensor], g: Tensor, kind: Tensor) -> tuple[dict, dict]:
    """Of images (B, draws, 3, H, W) of garments, those that are not too dark: how vivid the cloth is, whether it has
    one of its two colours (within 30 degrees), how often the first, and whether the ground has the opposite one; and
    the cloths' Cb + i Cr, as shares of the law's chroma.
    """
    bright = (g - 0.5).clamp(min=0).flatten(1).sum(1) >= 1  # at g = 0.2 the two colours make grey
    g, kind, images = g[bright], kind[bright], {name: x[bright] for name, x in images.items()}
    found: dict[str, Any] = {"garments": len(g)}
    points = {}
    inside, outside = (g - 0.5).clamp(min=0), (0.05 - g).clamp(min=0)
    share = (inside * g).flatten(1).sum(1) / inside.flatten(1).sum(1)
    # Of a pixel: g times the cloth's less (1 - g) times the ground's, which is opposite.
    unit = (share * CLOTH[1] - (1 - share) * GROUND[1])[:, None]
    theta = torch.exp(1j * math.pi / 3 * kind)[:, None]
    for name, x in images.items():
        n = x.shape[1]
        cloth = chroma_of(x.flatten(0, 1), inside.repeat_interleave(n, 0)).unflatten(0, (-1, n)) / unit
        ground = chroma_of(x.flatten(0, 1), outside.repeat_interleave(n, 0)).unflatten(0, (-1, n))
        along, facing = cloth * theta.conj(), -ground * cloth.conj()
        near = math.cos(math.pi / 6)
        right = (along.real.abs() > along.abs() * near).double()
        opposite = (facing.real > facing.abs() * near).double()
        first = (along.real > 0).double()
        found[name] = {
            key: mean_and_error(value.mean(1))
            for key, value in {"vivid": cloth.abs(), "right": right, "first": first, "opposite": opposite}.items()
        }
        if n > 1:  # of draws of one image: the variance of their number, beside the coin's
            found[name]["coin"] = mean_and_error(first.var(1) / 0.25)
        points[name] = cloth.flatten()
    return found, points


# --- what is written -------------------------------------------------------------------------------------------------


def short(solver: str) -> str:
    """Its repr with its first options alone."""
    return solver.partition(", rule=")[0].rstrip(")") + ")"


def report(results: dict) -> str:
    """The tables, as Markdown."""
    law = results["law"]
    head = ["task", "", "PSNR", "PSNR of the mean", "its lead", "Frechet distance", "apart", "ratio"]
    titles = {"SDE": "a sample, SDE", "ODE": "a sample, ODE"} | {w: w for w in ("regression", "condition")}
    lines, task = [], ""
    for row in results["rows"]:
        first, task = row["task"] if row["task"] != task else "", row["task"]
        lines.append([first, titles[row["way"]], cell(row["psnr"]), cell(row.get("psnr_of_mean")),
                      cell(row.get("lead"), sign="+"), cell(row["frechet"], 3), cell(row.get("apart"), 3),
                      cell(row.get("ratio"))])  # fmt: skip
    floor = results["rows"][0]["floor"]
    solvers = " and ".join(f"`{short(solver)}` ({name})" for name, solver in results["solvers"].items())
    keys = {"vivid": "chroma", "right": "one of the two colours", "first": "the first of them", "opposite": "ground"}
    names = {"truth": "truth", "SDE": "samples, SDE", "ODE": "samples, ODE", "regression": "regression"}
    colour = [[title, *(cell(law[name][key], 3) for key in keys)] for name, title in names.items()]
    return f"""# One network, five tasks

{place(results)}

Fashion-MNIST at 16 x 16, in the two colours of a known law (`examples/palette.py`); one U-Net of
{results["parameters"]:,} parameters for all tasks, which is told what a task has left of the image and what is masked,
and not which task it is; the regression is the same network, told the same, with a squared loss. Both were trained for
{results["train_steps"]} steps of 128 images. {results["images"]} held-out images for each task; samples by
{results["nfe"]} evaluations of {solvers}.

- PSNR in dB, of the whole image: its mean over the {results["images"]} images.
- PSNR of the mean: of the mean of {results["draws"]} samples, for {results["several"]} of the images; of the regression
  for the same images. Its lead: over the regression, image by image. That of exact draws would be about
  {-10 * math.log10(1 + 1 / results["draws"]):.2f}: the mean of {results["draws"]} of them has 1/{results["draws"]} more
  of the variance in its error than E[x | y], which the regression stands for.
- Frechet distance: in 64 random features of colour images, to {results["reference"]:,} other held-out images; as many
  real ones, of none of these, have {floor[0]:.3f} (standard deviation {floor[1]:.3f} over choices of them).
- Apart: root mean square distance of two samples for one condition, in [-1, 1]. Ratio: mean square distance of two
  samples over that of a sample from the truth: 1 where samples are as uncertain as they should be.

In brackets the standard error over images, of Frechet distances over random halves; each network was trained once.
The colours of the test images are tossed by another seed than those of the training images.

{chr(10).join(table(head, lines))}

![Condition, samples, regression and truth of each task](palette.png)

## Colours

By the law a grey garment is one of two opposite colours with probability 1/2 each. Chroma: of the cloth, 1 where it is
as vivid as the law's. One of the two colours: share within 30 degrees of either; by chance it would be 1/3. The first
of them: share of those on that side. Ground: share whose ground has the opposite hue, within 30 degrees.
Of the {law["garments"]} of the {results["several"]} garments that are bright enough to have a colour.

{chr(10).join(table(["", *keys.values()], colour))}

Among the {results["draws"]} samples of one garment the choice of the colour has the variance of a coin's toss times
{cell(law["SDE"]["coin"])} (SDE) and {cell(law["ODE"]["coin"])} (ODE): 1 where it is tossed for each sample anew.

Tasks: {", ".join(f"`{task}`" for task in results["tasks"].values())}.
"""


def draw(shown: dict, path: Path, images: int = 4, samples: int = 3) -> None:
    """A panel a task: a row for each of some images, with the condition, samples, the regression's guess, the truth;
    and the colours of the cloths.
    """
    with picture(path, 14, 1.5 * images + 1.4) as figure:
        axes = list(figure.subplots(2, 3).flat)
        for axis, (name, (given, several, best, truth)) in zip(axes, shown["images"].items(), strict=False):
            rows = [torch.stack([given[i], *several[i, :samples], best[i], truth[i]]) for i in range(images)]
            heads = ["given", *["sample"] * (len(rows[0]) - 3), "regression", "truth"]
            grid(axis, rows, heads=heads, title=name)
        axis, law = axes[-1], torch.exp(1j * math.pi / 3 * torch.arange(6))
        six = color(*CLOTH, law.angle().reshape(-1, 1, 1, 1)).flatten(1).clamp(0, 1)
        axis.scatter(law.real, law.imag, s=340, c=six.numpy(), edgecolors="none", label="the law's six", zorder=1)
        styles = {"SDE": ("samples", "0.1", "o", 5), "regression": ("regression", "#D55E00", "x", 26)}
        for name, (label, edge, marker, size) in styles.items():
            z = shown["colours"][name]
            axis.scatter(z.real, z.imag, s=size, c=edge, marker=marker, linewidths=1, label=label, zorder=2)
        axis.set(xlim=(-1.7, 1.7), ylim=(-1.4, 1.4), aspect="equal", xlabel="Cb", ylabel="Cr", xticks=[0], yticks=[0])
        axis.grid(color="0.9")
        axis.set_axisbelow(True)
        axis.spines[:].set_visible(False)
        axis.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(0.92, 1.0))
        axis.set_title("colours of the cloths, colourised", fontsize=11)


if __name__ == "__main__":
    main()
