"""Segmentation from twenty labelled images, by the features of a diffusion model that never saw a label.

    python examples/segmentation_features.py       some ten minutes on one core, most of it training; --help

Baranchuk et al. (2022, "Label-efficient semantic segmentation with diffusion models"): train a diffusion model on
images without labels; noise a labelled image to a few times t, take what blocks of the network's decoder return, resize
and concatenate, f(x) = [h_l(x_t, t) for every t and l]; train small classifiers of a pixel's f on the labelled pixels,
and let an ensemble of them segment. An image of 20 pixels bears less noise than one of 256, so f is taken for four
draws of the noise: all are trained on, and probabilities are averaged. Beside it, on the same labelled images, the same

    one noise      of one draw of the noise
    untrained      of the network before training
    patches        but of the 7 x 7 grey values around a pixel
    pixels         but of its grey value alone

and, supervised, the same U-Net, trained on the labelled images by cross-entropy.

**Scenes** are those of examples/segmentation.py at contrasts of 0.4 and 0.8, times 2: one to three real digits, darker
or lighter than a random texture. A pixel is digit or ground. What is held out are scenes of digits that are in no
other; mIoU is the mean over classes of |said and true| / |said or true|, each over all pixels.

`--data FILE.npz` has your own: "unlabelled" (N, C, H, W), floating point about [-1, 1], and "images" (M, C, H, W) with
"masks" (M, H, W), whole numbers from 0; of the M images those that no draw of labels takes are held out.

Writes segmentation_features.png, results.json and README.md into --out. A run that is killed goes on from its last
checkpoint, and finished parts stay.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from guidance import split
from segmentation import scenes
from shared import arguments, cell, grid, mean_and_error, picture, place, publish, size, spent, trained
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde.activations import features
from scoresde.data import TrainingData
from scoresde.denoiser import NetworkDenoiser
from scoresde.noise import derive_seed
from scoresde.report import Cells, table
from scoresde.training import ModelConfig

BLOCKS, TIMES, NOISES = "up.*", (0.05, 0.15, 0.25), 4  # the decoder; 50, 150 and 250 steps of 1000; draws of the noise
SHOWN, CLUSTERED = ("up.1", "up.3", "up.5"), (0.01, 0.05, 0.15, 0.25)  # in the k-means picture: the last of each level
CHOSEN = (1, 3)  # the held-out images in it
NETWORK = {"channels": 24, "multipliers": (1, 2, 2), "blocks": 1}
SCORES = {
    "diffusion": "features of the diffusion model",
    "one noise": "the same, of one draw of the noise",
    "untrained": "features of the network before training",
    "patches": "7 x 7 grey values around the pixel",
    "pixels": "grey value of the pixel",
    "supervised": "the U-Net, supervised",
}


def main(argv: list[str] | None = None) -> None:
    parser = arguments(
        __doc__,
        "segmentation_features",
        model=(Path("runs/segmentation_features/model"), "folder of the run"),
        data=(Path, "your own images and masks, .npz; see above"),
        train_steps=(1200, "of the diffusion model, 64 images each"),
        scenes=(20000, "without labels"),
        held_out=(100, "scenes to measure on"),
        labelled=(20, "images with labels"),
        draws=(5, "of these, each others"),
        classifier_steps=(200, "of the pixel classifiers"),
        supervised_steps=(200, "of the supervised U-Net"),
    )
    args = parser.parse_args(argv)
    unlabelled, *pairs = data(args)
    model = ModelConfig(options=NETWORK | {"image_channels": unlabelled.shape[1]}, predicts="v", time_scale=999)
    denoiser = trained(model, TrainingData(unlabelled), args.model, args.train_steps, args.seed, flag="--model")
    rows, said = measured(model, denoiser, *pairs, args)
    results = {
        "seconds": {"train": spent(args.model)},
        "parameters": size(denoiser),
        "model": model.to_dict(),
        "times": TIMES,
        "layers": BLOCKS,
        "noises": NOISES,
        "classes": int(max(pairs[1].max(), pairs[3].max())) + 1,
        "held_out": len(pairs[2]),
        "rows": rows,
    }
    publish(args, "segmentation_features", results, report, lambda path: draw(said, denoiser, *pairs[2:], path))


def data(args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Images without labels; images and masks to draw labelled ones of, draw after draw; and those held out."""
    drawn = args.draws * args.labelled
    if args.data is not None:
        with np.load(args.data) as file:
            unlabelled, images, masks = (torch.as_tensor(file[name]) for name in ("unlabelled", "images", "masks"))
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))
        images, masks = images[order].float(), masks[order].long()
        return unlabelled.float(), images[:drawn], masks[:drawn], images[drawn:], masks[drawn:]
    sets = []
    for i, n in enumerate((args.scenes, drawn, args.held_out)):
        image, mask, _ = scenes(n, split()[i == 2][0], args.seed + 10 * i, contrasts=(0.4, 0.8))
        sets.append((2 * image, (mask[:, 0] > 0).long()))
    return sets[0][0], *sets[1], *sets[2]


# --- what is compared ------------------------------------------------------------------------------------------------


def classifier(
    f: Tensor, y: Tensor, classes: int, steps: int, seed: int, members: int = 5
) -> Callable[[Tensor], Tensor]:
    """An ensemble of pixel MLPs, f (n, F) to their mean probabilities (n, classes), trained on labels y (n,)."""
    generator, (std, mean) = torch.Generator().manual_seed(seed), torch.std_mean(f, 0)
    parameters = [
        (torch.randn(members, a, b, generator=generator).mul(math.sqrt(2 / a)).requires_grad_(),
         torch.zeros(members, 1, b, requires_grad=True))
        for a, b in itertools.pairwise((f.shape[1], 64, 32, classes))
    ]  # fmt: skip
    optimizer = torch.optim.AdamW(itertools.chain(*parameters), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def logits(f: Tensor) -> Tensor:
        h = ((f - mean) / (std + 1e-6)).expand(members, *f.shape)
        for k, (weight, bias) in enumerate(parameters):
            h = torch.baddbmm(bias, h.relu() if k else h, weight)
        return h

    def loss(k: Tensor) -> Tensor:
        return F.cross_entropy(logits(f[k]).flatten(0, 1), y[k].repeat(members))

    descend(loss, optimizer, schedule, torch.randint(len(f), (steps, 512), generator=generator))
    return lambda f: logits(f).softmax(2).mean(0)


def supervised(model: ModelConfig, x: Tensor, y: Tensor, seed: int, classes: int, steps: int) -> nn.Module:
    """The U-Net of the model with an output for each class, trained on x (n, C, H, W) and y (n, H, W)."""
    net = ModelConfig(options=model.options | {"out_channels": classes}).build(seed).net
    assert isinstance(net, nn.Module)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    items = torch.randint(len(x), (steps, 8), generator=torch.Generator().manual_seed(seed))
    descend(lambda k: F.cross_entropy(net(x[k], torch.zeros(len(k))), y[k]), optimizer, schedule, items)
    return net.eval()


def descend(loss: Callable[[Tensor], Tensor], optimizer: Any, schedule: Any, items: Tensor) -> None:
    """A step down the loss of each row of items."""
    for k in items:
        optimizer.zero_grad()
        loss(k).backward()
        optimizer.step()
        schedule.step()


def iou(said: Tensor, true: Tensor, classes: int) -> Tensor:
    """|said and true| / |said or true| of each class that is in either, over all pixels."""
    table = torch.bincount(classes * true.flatten() + said.flatten(), minlength=classes**2).reshape(classes, classes)
    both, either = table.diag(), table.sum(0) + table.sum(1) - table.diag()
    return both[either > 0] / either[either > 0]


def spaces(model: ModelConfig, denoiser: NetworkDenoiser, seed: int) -> dict[str, Callable[[Tensor, int], Tensor]]:
    """What each pixel classifier is given, of images (n, C, H, W) and a seed: (draws of the noise, n, F, H, W)."""

    def activations(of: NetworkDenoiser, noises: int) -> Callable[[Tensor, int], Tensor]:
        return lambda x, seed: torch.stack(
            [features(of, x, TIMES, BLOCKS, seed=derive_seed(seed, k), batch_size=100) for k in range(noises)]
        )

    def patches(x: Tensor, seed: int) -> Tensor:
        return F.unfold(F.pad(x, (3, 3, 3, 3), mode="reflect"), 7).unflatten(2, x.shape[2:])[None]

    return {
        "diffusion": activations(denoiser, NOISES),
        "one noise": activations(denoiser, 1),
        "untrained": activations(model.build(seed), NOISES),
        "patches": patches,
        "pixels": lambda x, seed: x[None],
    }


def measured(
    model: ModelConfig, denoiser: NetworkDenoiser, x: Tensor, y: Tensor, held: Tensor, truth: Tensor,
    args: argparse.Namespace,
) -> tuple[list[dict], dict[str, Tensor]]:  # fmt: skip
    """A row for each method, and what the first draw's says of the held-out images."""
    classes, n = int(max(y.max(), truth.max())) + 1, args.labelled
    made_for = {name: str(value) for name, value in vars(args).items() if name not in ("out", "model")}
    made_for["features"] = str((BLOCKS, TIMES, NOISES))
    program, path = "segmentation_features.py", args.model / "said.jsonl"
    parts = Cells(path, program, "segmentations", made_for, lambda part: (part["method"], part["draw"]))
    given = spaces(model, denoiser, args.seed)
    for name in SCORES:
        todo = [d for d in range(args.draws) if (name, d) not in parts.done]
        g = given[name](held, args.seed).movedim(2, -1) if todo and name in given else held
        for d in todo:
            x_d, y_d, seed = x[d * n : (d + 1) * n], y[d * n : (d + 1) * n], args.seed + 1 + d
            if name in given:
                f = given[name](x_d, seed).movedim(2, -1)
                labels = y_d.expand(len(f), *y_d.shape).flatten()
                says = classifier(f.flatten(0, -2), labels, classes, args.classifier_steps, seed)
                with torch.no_grad():  # an image at a time, its draws of the noise averaged
                    found = [says(one.flatten(0, -2)).view(len(one), -1, classes).mean(0) for one in g.unbind(1)]
            else:
                net = supervised(model, x_d, y_d, seed, classes, args.supervised_steps)
                with torch.no_grad():
                    found = [net(one, torch.zeros(1)).movedim(1, -1).view(-1, classes) for one in g.split(1)]
            said = torch.stack(found).argmax(-1)
            parts.write({"method": name, "draw": d, "said": said.flatten().tolist()})
            print(f"{name}, draw {d + 1}: mIoU {float(iou(said, truth, classes).mean()):.3f}", flush=True)
    said = {
        name: [torch.tensor(parts.done[name, d]["said"]).view(truth.shape) for d in range(args.draws)]
        for name in SCORES
    }
    scores = {name: torch.stack([iou(s, truth, classes).mean() for s in found]) for name, found in said.items()}
    rows = []
    for name, score in scores.items():
        digits = torch.stack([iou(s.clamp(max=1), truth.clamp(max=1), 2)[1] for s in said[name]])
        row = {"method": name, "each": [round(float(s), 4) for s in score], "miou": mean_and_error(score)}
        rows.append(row | {"lead": mean_and_error(scores["diffusion"] - score), "objects": mean_and_error(digits)})
    return rows, {name: found[0] for name, found in said.items()}


# --- what is written -------------------------------------------------------------------------------------------------


def report(results: dict) -> str:
    """The table, as Markdown."""
    times = ", ".join(map(str, results["times"]))
    rows = [
        [SCORES[row["method"]], cell(row["miou"], 3), cell(row["objects"], 3),
         "" if row["method"] == "diffusion" else f"{row['lead'][0]:+.3f} ({row['lead'][1]:.3f})"]
        for row in results["rows"]
    ]  # fmt: skip
    titles = ["segmented by", "mIoU", "IoU of what is not ground", "the first one's lead in mIoU"]
    return f"""# Segmentation from {results["labelled"]} labelled images, by features

{place(results)}

A diffusion model of {results["parameters"]:,} parameters was trained for {results["train_steps"]} steps of 64 images
without labels (`examples/segmentation_features.py`, seed {results["seed"]}). Features are what the blocks of its
decoder, `{results["layers"]}`, return at t = {times} of 1 (steps 50, 150 and 250 of 1000), for
{results["noises"]} draws of the noise, over which probabilities are averaged. {results["draws"]} draws of
{results["labelled"]} labelled images, and {results["held_out"]} held-out ones; in brackets the standard error over the
draws, which are the same for all methods. All pixel classifiers are ensembles of five MLPs, trained alike for
{results["classifier_steps"]} steps; the supervised U-Net has {results["supervised_steps"]} steps of 8 images.

{chr(10).join(table(titles, rows))}

Left, held-out images with what each says after the first draw. Right, five clusters of pixels by k-means of what one
block returns at one time, the mean of {results["noises"]} draws of the noise, without any label; the second image and
the fourth, a block a row, a time a column. Clusters are shaded in the order of their mean grey value.

![What each method says; and k-means of features at several blocks and times](segmentation_features.png)
"""


def draw(said: dict[str, Tensor], denoiser: NetworkDenoiser, x: Tensor, truth: Tensor, path: Path) -> None:
    """Held-out images with what each method says, and clusters of their pixels."""
    grey, most = x.mean(1), int(truth.max())
    columns = {"image": grey, **{name: 2 * y / most - 1 for name, y in {"truth": truth, **said}.items()}}
    found = {}
    for block, t in itertools.product(SHOWN, CLUSTERED):
        f = sum(features(denoiser, x[:40], t, block, seed=seed) for seed in range(NOISES))
        found[block, t] = clusters(f, x[:40]) / 2 - 1  # of five, from -1 to 1
    rows = [(i, block) for i in CHOSEN for block in SHOWN]
    with picture(path, 1.05 * (len(columns) + len(CLUSTERED) + 2), 1.05 * len(rows) + 0.5, dpi=110) as figure:
        left, right = figure.subplots(1, 2, width_ratios=[len(columns), len(CLUSTERED) + 1])
        grid(left, torch.stack([y[: len(rows), None] for y in columns.values()], 1), heads=list(columns))
        lines = [torch.stack([grey[i], *(found[block, t][i] for t in CLUSTERED)])[:, None] for i, block in rows]
        heads = ["image", *(f"t = {t:g}" for t in CLUSTERED)]
        grid(right, lines, [block for _, block in rows], heads)


def clusters(f: Tensor, x: Tensor, count: int = 5) -> Tensor:
    """The cluster of each pixel, numbered by their mean grey value: f (n, F, H, W) and x (n, C, H, W) to (n, H, W)."""
    found = KMeans(count, n_init=2, random_state=0).fit_predict(f.movedim(1, -1).flatten(0, -2).numpy())
    which, grey = torch.as_tensor(found).long(), x.mean(1).flatten()
    means = torch.stack([grey[which == c].mean() for c in range(count)])
    return means.argsort().argsort()[which].view(len(x), *x.shape[2:])


if __name__ == "__main__":
    main()
