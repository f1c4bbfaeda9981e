"""Editing with an exact denoiser: SDEdit from strokes, one digit into another, paths, variations, a bridge in 2-D.

    python examples/editing.py             three quarters of a minute on one core; --help

No network and no training: the model is a kernel density estimate, 1,297 of scikit-learn's digits each with a little
Gaussian noise, whose denoiser is known in closed form. It memorises: whatever it draws is one of these digits and the
noise, at every strength. What is edited are drawn strokes and held-out digits, which it has not seen. With a trained
network instead, the same calls give digits that nobody has written.

1. SDEdit (Meng et al., 2022): strokes, perturbed to some strength and sampled back. With more strength they are more
   like digits and less like the strokes; the curves say how far from either.
2. Encode, edit, decode: a held-out digit to noise by the ODE of its own class, and back by that of another. Back as its
   own class it is what it was, to the solver's error (the ODE of a model that memorises is stiff). What two digits from
   one latent share is the hand: a 3 with much ink becomes an 8 with much ink, a correlation of 0.7.
3. In 2-D: the same bridge between two toy distributions, every point in the colour that it began with.
4. A sheet between four held-out digits, through their latents, and variations of one.

Writes editing.png and editing.json into --out.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from scoresde import VPSDE, Denoiser
from scoresde.data import digits
from scoresde.data.toys import TOYS
from scoresde.editing import edit, interpolation_grid, sdedit, variations
from scoresde.exact import GaussianMixture
from scoresde.info import environment
from scoresde.report import write_json
from scoresde.solvers import DDPM, DPMSolverPP

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import SubFigure

SDE = VPSDE()
STRENGTHS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
SHOWN = 9  # digits in a row
BLUE, ORANGE = "#0072B2", "#D55E00"  # Okabe and Ito's, for any eyes

# Strokes of a few straight lines, (x, y) in pixels of the 8 x 8 image, y down.
STROKES = {
    "7": [(1.5, 0.7), (5.8, 0.7), (3.0, 7.0)],
    "0": [(3.5, 0.5), (1.8, 2.5), (1.8, 5.0), (3.5, 7.0), (5.5, 5.0), (5.5, 2.5), (3.5, 0.5)],
    "4": [(4.5, 0.5), (1.0, 4.2), (6.5, 4.2), (4.5, 4.2), (4.2, 7.0)],
    "2": [(1.5, 1.5), (3.8, 0.5), (5.2, 2.0), (1.8, 6.5), (5.8, 6.5)],
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/editing"), help="folder of results (runs/editing)")
    parser.add_argument("--width", type=float, default=0.2, help="of the noise on each digit (0.2)")
    parser.add_argument("--steps", type=int, default=100, help="of the whole way from t_max (100)")
    parser.add_argument("--draws", type=int, default=8, help="for each stroke and strength, in the curves (8)")
    parser.add_argument("--points", type=int, default=1200, help="of the bridge in 2-D (1200)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)

    start = time.perf_counter()
    images, labels = digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))
    training, held_out = order[500:], order[:500]
    known = images[training]
    model = GaussianMixture(known, std=args.width).denoiser(SDE)
    by_class = [GaussianMixture(known[labels[training] == k], std=args.width).denoiser(SDE) for k in range(10)]
    unseen = {k: images[held_out][labels[held_out] == k] for k in range(10)}

    strokes = torch.stack([drawn(points) for points in STROKES.values()])[:, None]
    from_strokes = sdedits(model, strokes, known, args)
    translated = translations(by_class, unseen[3], args)
    bridge = bridged(args)
    between = sheet_and_variations(model, torch.stack([unseen[k][1] for k in (0, 2, 6, 9)]), args)
    results = {
        "environment": environment(),
        "seconds": round(time.perf_counter() - start, 1),
        "model": f"{len(known)} digits, each with Gaussian noise of {args.width}",
        "steps": args.steps,
        "sdedit": {"strengths": STRENGTHS, **from_strokes["distances"]},
        "translation": translated["measured"],
        "bridge": bridge["errors"],
    }
    write_json(args.out / "editing.json", results)
    draw(strokes, from_strokes, translated, bridge, between, args.out / "editing.png")
    print(json.dumps({key: results[key] for key in ("seconds", "sdedit", "translation", "bridge")}, indent=1))
    print(f"wrote {args.out}/editing.json and editing.png")


def drawn(points: list[tuple[float, float]]) -> Tensor:
    """Straight lines from point to point, as a brush of one pixel leaves them: (8, 8), in [-1, 1]."""
    at = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0)).flip(1)  # (64, 2), x and y
    ends = torch.tensor(points)
    a, along = ends[:-1], ends.diff(dim=0)
    share = ((at[:, None] - a) * along).sum(-1) / (along**2).sum(-1)
    distance = (at[:, None] - a - share.clamp(0, 1)[..., None] * along).norm(dim=-1).amin(1)
    return (1.4 - distance).clamp(0, 1).mul(2).sub(1).reshape(8, 8)


def rms(a: Tensor, b: Tensor) -> Tensor:
    """Root mean square difference over the last three axes."""
    return (a - b).square().mean((-3, -2, -1)).sqrt()


def sdedits(model: Denoiser, strokes: Tensor, known: Tensor, args: argparse.Namespace) -> dict:
    """Results of each strength, (strengths, strokes, 1, 8, 8), and how far they are from strokes and from digits."""
    repeated, shown, far = strokes.repeat(args.draws, 1, 1, 1), [], {"to_stroke": [], "to_nearest_digit": []}
    for strength in STRENGTHS:
        x = sdedit(model, repeated, DDPM(), strength=strength, steps=args.steps, seed=args.seed).x
        shown.append(x[: len(strokes)])
        nearest = torch.cdist(x.flatten(1), known.flatten(1)).amin(1) / 8
        for name, distance in (("to_stroke", rms(x, repeated)), ("to_nearest_digit", nearest)):
            far[name].append(round(float(distance.mean()), 3))
    return {"x": torch.stack(shown), "distances": far}


def translations(models: list[Denoiser], threes: Tensor, args: argparse.Namespace) -> dict:
    """Threes, again as threes, and as other digits, each (N, 1, 8, 8); how far they come back; and whether a 3 with
    much ink becomes another digit with much ink: the correlation, over the held-out threes.
    """
    rows, found = {"held out": threes}, {}
    for k in (3, 8, 5, 9):
        x = edit(models[3], threes, DPMSolverPP(2), to=models[k], steps=args.steps).x
        rows[f"3 to {k}"] = x
        if k == 3:
            found["3_to_3_rms"] = rms(x, threes)
        else:
            back = edit(models[k], x, DPMSolverPP(2), to=models[3], steps=args.steps).x
            found[f"3_to_{k}_to_3_rms"] = rms(back, threes)
            ink = torch.stack([threes.mean((1, 2, 3)), x.mean((1, 2, 3))]).corrcoef()[0, 1]
            found[f"3_to_{k}_correlation_of_ink"] = ink
    return {"rows": rows, "measured": {name: round(float(value.mean()), 3) for name, value in found.items()}}


def bridged(args: argparse.Namespace) -> dict:
    """Points of one toy, their latents, and the points of another that these decode to."""
    first, second = (GaussianMixture(TOYS[name](600)[0], std=0.06).denoiser(SDE) for name in ("two-moons", "spiral"))
    x = first.target.sample(args.points, generator=torch.Generator().manual_seed(args.seed), dtype=torch.float64)
    there = edit(first, x, DPMSolverPP(2), to=second, steps=2 * args.steps)
    back = edit(second, there.x, DPMSolverPP(2), to=first, steps=2 * args.steps).x
    truth = second.target.sample(args.points, generator=torch.Generator().manual_seed(args.seed + 1))
    errors = {
        "there_and_back_rms": round(float((back - x).square().mean().sqrt()), 4),
        "latent_std": round(float(there.latent.std()), 3),
        "log_density_of_results": round(float(second.target.log_prob(there.x).mean()), 3),
        "log_density_of_data": round(float(second.target.log_prob(truth).mean()), 3),
    }
    return {"x": x, "latent": there.latent, "to": there.x, "errors": errors}


def sheet_and_variations(model: Denoiser, corners: Tensor, args: argparse.Namespace) -> dict:
    """Between four digits, (5, 5, 1, 8, 8), and variations of the first at three strengths, each (5, 1, 8, 8)."""
    sheet = interpolation_grid(model, corners, DPMSolverPP(2), rows=5, columns=5, steps=args.steps).x
    rows = [
        variations(model, corners[3:], 5, DDPM(), strength=strength, steps=args.steps, seed=args.seed).x[:, 0]
        for strength in (0.2, 0.4)
    ]
    rows += [
        variations(
            model, corners[3:], 5, DPMSolverPP(2), strength=strength, by="encoding", steps=args.steps, seed=args.seed
        ).x[:, 0]
        for strength in (0.3, 0.6)
    ]
    return {"sheet": sheet, "of": corners[3:], "variations": rows}


# --- the picture -----------------------------------------------------------------------------------------------------


def pictures(part: SubFigure, rows: list[Tensor], names: list[str], heads: list[str] | None = None) -> None:
    """Rows of digits, each (n, 1, 8, 8), with names at the left and heads above the columns."""
    axes = part.subplots(len(rows), max(map(len, rows)), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for line, row, name in zip(axes, rows, names, strict=True):
        for axis, image in zip(line, row, strict=False):
            axis.imshow(image[0].numpy(), cmap="gray", vmin=-1, vmax=1)
        line[0].text(-0.15, 0.5, name, transform=line[0].transAxes, ha="right", va="center", fontsize=9)
    for axis, head in zip(axes[0], heads or [], strict=False):
        axis.set_title(head, fontsize=9)


def draw(strokes: Tensor, from_strokes: dict, translated: dict, bridge: dict, between: dict, path: Path) -> None:
    figure = plt.figure(figsize=(15.5, 9.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1.1, 1])
    strokes_part, classes_part = left.subfigures(2, 1, height_ratios=[4, 4.9])
    curve_part, bridge_part, last = right.subfigures(3, 1, height_ratios=[2.7, 3, 3.5])
    sheet_part, variations_part = last.subfigures(1, 2, width_ratios=[1, 1.3])

    strokes_part.suptitle("1. SDEdit from strokes, by strength", fontsize=11)
    rows = torch.cat([strokes[None], from_strokes["x"]]).transpose(0, 1)
    pictures(strokes_part, list(rows), [""] * len(rows), ["stroke", *(f"{s:g}" for s in STRENGTHS)])

    classes_part.suptitle("2. Encoded as a 3, decoded as another digit", fontsize=11)
    pictures(classes_part, [row[:SHOWN] for row in translated["rows"].values()], list(translated["rows"]))

    axis = curve_part.subplots()
    far = from_strokes["distances"]
    for name, color in (("to_stroke", ORANGE), ("to_nearest_digit", BLUE)):
        axis.plot(STRENGTHS, far[name], color=color, marker="o", linewidth=1.8, label=name.replace("_", " "))
    axis.set(xlabel="strength", ylabel="rms distance per pixel", xlim=(0, None), ylim=(0, None))
    axis.legend(frameon=False, loc="center right")
    axis.set_title("1. How far the results are from the strokes and from the model's digits", fontsize=11)

    bridge_part.suptitle("3. The bridge between two distributions, by way of noise", fontsize=11)
    hue = torch.atan2(bridge["latent"][:, 1], bridge["latent"][:, 0]).numpy()
    panels = (("data of one", "x"), ("their latents", "latent"), ("decoded by the other", "to"))
    for axis, (name, key) in zip(bridge_part.subplots(1, 3), panels, strict=True):
        axis.scatter(*bridge[key].T.numpy(), c=hue, cmap="hsv", s=4, linewidths=0)
        axis.set_title(name, fontsize=9)
        axis.set(aspect="equal", xticks=[], yticks=[])

    sheet_part.suptitle("4. Between four held-out digits", fontsize=11)
    pictures(sheet_part, list(between["sheet"]), [""] * 5)
    variations_part.suptitle("4. Variations of a held-out digit (first)", fontsize=11)
    names = ["noise 0.2", "noise 0.4", "latent 0.3", "latent 0.6"]
    pictures(variations_part, [torch.cat([between["of"], row]) for row in between["variations"]], names)
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
