"""Video diffusion in small: real digits that bounce in a box, and clips of 8 frames extended to 16.

    python examples/video.py                     some ten minutes on two quiet cores, most of it training; --help

Ho et al. (2022, "Video diffusion models"). The network is a U-Net with time apart from space: frames are convolved and
attended to one by one, and at each level attention over time follows (`UNet(dims=3, time_attention=(0, 1))`). It is
trained on clips and on single frames jointly, these as clips of length 1 (`joint_loss`). A clip is extended by windows
of 8 frames of which the first 4, x_a, are known (`extend`), each window drawn by DDPM in one of three ways:

    replacement       the known part of x_t is alpha x_a + sigma eps at every step
    reconstruction    that, and D' = D - (w alpha / 2) grad |x_a - D_a|^2: the paper's
    PiGDM             D' = D - (sigma^2 / (2 alpha r^2)) grad |x_a - D_a|^2, r the width of x_0 given x_t

The digits are scikit-learn's, 8 x 8 in 16 x 16; one moves by a constant velocity and is reflected at the walls, so what
comes after eight frames is known. Measured, beside real clips and beside the last frame held still: the velocity's
error, by the centre of mass of the frames; how much the speed changes in a clip; how often a frame is read as the digit
of the first ones; and the Frechet distance to real clips.

With --data your own clips are learned, grey and --size pixels wide: a GIF, an .npz of an array (N, F, H, W), a folder
of these, or ale:pong, a game played at random (pip install ale-py). Writes video.png, video.gif, results.json and
README.md into --out; a run that is killed goes on.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from captioned_scenes import halves
from PIL import Image, ImageSequence
from shared import arguments, cell, frechet, grid, mean_and_error, picture, place, publish, ran, seeded, tile, trained
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde import VPSDE, Clip, X0Denoiser, sample
from scoresde.data import TrainingData
from scoresde.denoiser import NetworkDenoiser
from scoresde.editing import extend
from scoresde.guidance import PiGDM, ReconstructionGuidance, Replacement
from scoresde.metrics import RandomFeatures
from scoresde.report import table
from scoresde.solvers import DDPM
from scoresde.training import ModelConfig, joint_loss, min_snr

WINDOW, LENGTH, OVERLAP, SIDE, DIGIT, SHOWN = 8, 16, 4, 16, 8, 3
NETWORK = {"channels": 32, "multipliers": (1, 2), "blocks": 1, "patch": 2, "dims": 3, "time_attention": (0, 1)}
MODEL = ModelConfig(options=NETWORK, predicts="v", time_scale=999)


def main(argv: list[str] | None = None) -> None:
    parser = arguments(
        __doc__,
        "video",
        train_steps=(1600, "of the denoiser, 16 clips a step"),
        reader_steps=(400, "of the classifier of frames"),
        clips=(4000, "to train on"),
        samples=(64, "clips that are drawn, and extended in each way"),
        steps=(40, "of DDPM"),
        w=(2.0, "weight of reconstruction guidance"),
        models=(Path("runs/video"), "folder of the runs"),
        data=(str, "your own clips: a GIF, an .npz, a folder of these, or ale:GAME"),
        size=(SIDE, "pixels of a side of them, a multiple of 4"),
    )
    args = parser.parse_args(argv)
    own = None if args.data is None else windows(args.data, args.size)
    x = bouncing(*halves()[0], args.clips, args.seed)[0] if own is None else own[: -SHOWN - LENGTH // 4 + 1]
    denoiser = learned(x[:, :, :WINDOW], args.models / ("digits" if own is None else "own"), args)
    start = time.perf_counter()
    real, truth, _ = bouncing(*halves()[1], args.samples, args.seed + 1) if own is None else (own[-SHOWN:], None, None)
    ways = {
        "replacement": lambda D, mask, y: (Clip(D), Replacement(DDPM(), mask, y)),
        "reconstruction": lambda D, mask, y: (
            Clip(ReconstructionGuidance(D, mask, y, args.w)), Replacement(DDPM(), mask, y)
        ),
        "PiGDM": lambda D, mask, y: (Clip(PiGDM(D, mask, y, 0.0, data_std=float(x.std()))), DDPM()),
    }  # fmt: skip
    how = {"window": WINDOW, "overlap": OVERLAP, "steps": args.steps, "seed": args.seed + 2}
    clips = {"real": real}
    for name, way in ways.items():
        clips[name] = extend(denoiser, real[:, :, :WINDOW], LENGTH, way, **how)
        print(f"{name}: extended {len(real)} clips", flush=True)
    if truth is None:  # clips of one's own, of which no law of motion is known
        draw(clips, args.out / "video.png")
        return
    drawn = sample(
        Clip(denoiser), (args.samples, *real[:, :, :WINDOW].shape[1:]), DDPM(), steps=args.steps, seed=args.seed
    ).x
    reader = learned_reader(args)
    results = {"rows": measured(drawn, clips, truth, reader.net, args)}
    results = ran(args.models, {"digits": denoiser, "reader": reader}, start) | results
    publish(args, "video", results, report, lambda path: draw(clips, path))


# --- clips -----------------------------------------------------------------------------------------------------------


def bouncing(images: Tensor, labels: Tensor, n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """n clips (n, 1, 16, 16, 16) in [-1, 1] of digits in [0, 1], the corner's places (n, 16, 2), and the labels.

    A place goes by a velocity of 0.5 to 2 pixels a frame along each axis and is reflected at 0 and 8; between pixels
    the image is interpolated linearly, which keeps its mass and moves its centre by as much.
    """
    generator, room = torch.Generator().manual_seed(seed), SIDE - DIGIT
    chosen = torch.randint(len(images), (n,), generator=generator)
    speed = 0.5 + 1.5 * torch.rand(n, 1, 2, generator=generator)
    v = speed * (2 * torch.randint(2, (n, 1, 2), generator=generator) - 1)
    free = room * torch.rand(n, 1, 2, generator=generator) + v * torch.arange(LENGTH)[:, None]
    place = room - (free % (2 * room) - room).abs()
    apart = torch.arange(SIDE)[:, None] - place[..., None, None] - torch.arange(DIGIT)
    rows, columns = (1 - apart.abs()).clamp(min=0).unbind(2)  # (n, 16, 16, 8) each
    return 2 * (rows @ images[chosen] @ columns.mT)[:, None] - 1, place, labels[chosen]


def windows(source: str, size: int) -> Tensor:
    """Clips of one's own, (n, 1, 16, size, size) in [-1, 1]: of each film every 16 frames, 4 apart."""
    found = []
    for film in films(source):
        small = F.interpolate(torch.from_numpy(film)[:, None].float(), (size, size), mode="area")
        found += (
            list((small[:, 0] / 127.5 - 1).unfold(0, LENGTH, 4).movedim(-1, 1)[:, None]) if len(film) >= LENGTH else []
        )
    if len(found) < SHOWN + LENGTH // 4:
        raise SystemExit(f"{source} has {len(found)} clips of {LENGTH} frames: too few to learn and to extend")
    return torch.stack(found)


def films(source: str) -> Iterator[np.ndarray]:
    """Grey films (F, H, W), 0 to 255."""
    if source.startswith("ale:"):
        from ale_py import ALEInterface, LoggerMode, roms

        ALEInterface.setLoggerMode(LoggerMode.Error)
        game, frames, random = ALEInterface(), [], np.random.default_rng(0)
        game.setInt("frame_skip", 4)
        game.loadROM(roms.get_rom_path(source.removeprefix("ale:")))
        actions = game.getMinimalActionSet()
        for i in range(4000):
            if i % 4 == 0:
                action = random.choice(actions)
            game.act(action)
            frames.append(game.getScreenGrayscale())
            if game.game_over():
                game.reset_game()
        yield np.stack(frames)
        return
    path = Path(source)
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.suffix == ".gif":
            with Image.open(file) as image:
                yield np.stack([np.asarray(frame.convert("L")) for frame in ImageSequence.Iterator(image)])
        elif file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as found:
                yield from found[found.files[0]]


# --- networks --------------------------------------------------------------------------------------------------------


def learned(x: Tensor, folder: Path, args: argparse.Namespace) -> NetworkDenoiser:
    """The denoiser, trained or continued on clips x, each with a frame of another one appended."""
    frame = torch.randint(WINDOW, (len(x),), generator=torch.Generator().manual_seed(args.seed))
    data = torch.cat([x, x.roll(1, 0)[torch.arange(len(x)), :, frame].unsqueeze(2)], 2)
    how = {"batch_size": 16, "loss": joint_loss(WINDOW, weighting=min_snr(5.0)), "checkpoint_every": 100}
    return trained(MODEL, data, folder, args.train_steps, args.seed, **how)


class Reader(nn.Sequential):
    """The digit of frames (B, 1, 16, 16): logits (B, 10)."""

    def __init__(self) -> None:
        sizes, layers = (1, 32, 64, 64), []
        for i in range(3):
            layers += [nn.Conv2d(sizes[i], sizes[i + 1], 3, stride=2 if i else 1, padding=1), nn.ReLU()]
        super().__init__(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 16, 10))

    def read(self, x: Tensor) -> Tensor:
        """The digits of the frames of clips (n, 1, F, 16, 16): (n, F)."""
        with torch.no_grad():
            return torch.stack([self(frame).argmax(1) for frame in x.unbind(2)], 1)


def learned_reader(args: argparse.Namespace) -> NetworkDenoiser:
    """The reader, trained or continued on clips of the digits that the denoiser never saw."""
    x, _, labels = bouncing(*halves()[1], 500, args.seed + 3)
    data = TrainingData(x.transpose(1, 2).flatten(0, 1), labels=labels.repeat_interleave(LENGTH), seed=args.seed)

    def reading(denoiser: NetworkDenoiser, x0: Tensor, draws: Any, cond: Mapping[str, Any]) -> Tensor:
        return F.cross_entropy(denoiser.net(x0), cond["label"])

    reader = X0Denoiser(seeded(Reader, args.seed), VPSDE())
    return trained(reader, data, args.models / "reader", args.reader_steps, args.seed, loss=reading)


# --- what is measured ------------------------------------------------------------------------------------------------


def centres(x: Tensor) -> Tensor:
    """The centre of mass of the frames of clips (n, 1, F, 16, 16), in pixels: (n, F, 2)."""
    mass, i = ((x[:, 0] + 1) / 2 - 0.1).clamp(min=1e-6), torch.arange(SIDE)
    return torch.stack([mass.sum(3) @ i.float(), mass.sum(2) @ i.float()], 2) / mass.sum((2, 3))[..., None]


def measured(
    drawn: Tensor, clips: Mapping[str, Tensor], truth: Tensor, reader: Any, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row of means with standard errors for each: real clips, samples of 8 frames, and frames 9 to 16 of each way."""
    still = torch.cat(
        [clips["real"][:, :, :WINDOW], clips["real"][:, :, WINDOW - 1 : WINDOW].expand(-1, -1, WINDOW, -1, -1)], 2
    )
    reference = bouncing(*halves()[0], 2000, args.seed + 4)[0][:, :, :WINDOW]
    others, features = (
        bouncing(*halves()[1], 1000, args.seed + 5)[0][:, :, :WINDOW],
        RandomFeatures((1, WINDOW, SIDE, SIDE), features=32),
    )
    rows, new = [], slice(WINDOW, LENGTH)
    for name, x in {"real": clips["real"], "samples": drawn, "held still": still, **clips}.items():
        after = x[:, :, new] if x.shape[2] == LENGTH else x
        moved, digits = centres(x).diff(dim=1)[:, 1 - LENGTH // 2 - 1 :], reader.read(x)
        first = digits[:, :WINDOW].mode(1).values
        change = (moved.abs() - moved.abs().median(1, keepdim=True).values).abs().mean((1, 2))
        wrong = None if name == "samples" else (moved - truth.diff(dim=1)[:, WINDOW - 1 :]).norm(dim=2).mean(1)
        distance = frechet({name: after}, reference, others, features)
        rows.append({
            "name": name,
            "velocity": None if wrong is None else mean_and_error(wrong),
            "change": mean_and_error(change),
            "kept": mean_and_error((digits[:, -WINDOW:] == first[:, None]).double().mean(1)),
            "frechet": distance[name],
            "floor": distance["real images"],
        })  # fmt: skip
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    return rows


# --- what is written -------------------------------------------------------------------------------------------------


def report(results: Mapping[str, Any]) -> str:
    """The page."""
    names = {"real": "real clips, frames 9 to 16", "samples": "samples of 8 frames", "held still": "frame 8 held still",
             "reconstruction": f"8 to 16: reconstruction guidance, w = {results['w']:g}"}  # fmt: skip
    lines = [
        [names.get(row["name"], f"8 to 16: {row['name']}"), cell(row["velocity"]), cell(row["change"]),
         cell(row["kept"], 1, factor=100), cell(row["frechet"])]
        for row in results["rows"]
    ]  # fmt: skip
    heads = ["clips", "velocity error, pixels a frame", "change of speed", "digit kept, %", "Frechet distance"]
    sizes = results["parameters"]
    return f"""# Video

{place(results)}

A digit in 16 x 16 pixels moves by a constant velocity, 0.5 to 2 pixels a frame along each axis, and is reflected at the
walls (`examples/video.py`, seed {results["seed"]}). A U-Net with time apart from space, {sizes["digits"]:,} parameters,
{results["train_steps"]} steps of 16 clips of 8 frames, each with a single frame of another clip; {results["steps"]}
steps of DDPM. Each row: {results["samples"]} clips, of digits that the network never saw where the first 8 frames are
given. Windows of 8 frames, 4 of them known. A classifier of frames ({sizes["reader"]:,} parameters) reads the digits.

{chr(10).join(table(heads, lines))}

Standard errors in brackets. The velocity's error is of frames 9 to 16, by the centre of mass, against the law of
motion; of real clips it is what that measurement itself is wrong by. The change of speed is the mean distance of |v|
from its median in the clip, walls among it. A digit is kept where a frame is read as most of the first 8 are. As many
other real clips have a Frechet distance of {cell(results["rows"][0]["floor"])}, in brackets the deviation over choices
of them.

![Frames 1 to 16 of {SHOWN} clips: real, and as extended](video.png)

![The same clips, moving](video.gif)

In the moving picture a column is a clip: real, by replacement, by reconstruction guidance, by PiGDM; frames 1 to 8 are
the same.
"""


def draw(clips: Mapping[str, Tensor], path: Path) -> None:
    """The first clips frame by frame, and moving."""
    heads = [str(i + 1) for i in range(LENGTH)]
    with picture(path, 12.6, 0.6 + 2.3 * SHOWN) as figure:
        for k, axis in enumerate(figure.subplots(SHOWN, 1)):
            grid(axis, [x[k].transpose(0, 1) for x in clips.values()], list(clips), [] if k else heads)
    first = torch.stack([x[: 2 * SHOWN] for x in clips.values()])  # (ways, clips, 1, frames, H, W)
    frames = [tile(x.flatten(0, 1), first.shape[1]) for x in first.unbind(3)]
    images = [Image.fromarray((255 * frame).round().astype(np.uint8)) for frame in frames]
    images[0].save(path.with_suffix(".gif"), save_all=True, append_images=images[1:], duration=150, loop=0)
    print(f"wrote {path.with_suffix('.gif')}", flush=True)


if __name__ == "__main__":
    main()
