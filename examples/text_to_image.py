"""Text to image: scenes of real digits from what is said of them, "a three left of a dark seven".

    python examples/text_to_image.py             some ten minutes on two quiet cores, most of it training; --help

GLIDE (Nichol et al., 2021) in small. A transformer reads the caption's bytes (`TextEncoder`); its last token's output
modulates the U-Net's norms, all tokens' outputs are its context, and a tenth of the captions is dropped to the empty
text. Its two guidances are compared, at several strengths:

    by weight    D(x_t, "") + w (D(x_t, c) - D(x_t, ""))                    (Ho and Salimans, 2022; `ClassifierFree`)
    by CLIP      mu + s Sigma grad_x f(x_t, t) . g(c)                       (`Energy` of `similarity`)

with f and g of a CLIP (Radford et al., 2021) that is trained here, on scenes with noise, as GLIDE's "noise-aware" one.
Guiding D by s (sigma^2 / alpha) grad is that shift of a DDPM step's mean, to first order in the step
(`scoresde.guidance.classifier`).

**The scenes** are two of scikit-learn's digits on a ground of 12 x 20 pixels, each somewhere on its side, light or
dark. Of the 100 pairs (left digit, right digit) 20 are held out of training; in them each digit is twice on either
side. A **reader** that was trained on scenes of other digits' images says which digits a scene has, and of what shade.
Measured: how often all four agree with the caption, for pairs that were seen and held out, beside what the reader finds
in real scenes (the ceiling) and chance, 1 in 400; and the Frechet distance to real scenes.

With --data a folder of images with captions (captions.jsonl, captions.csv or captions.txt) is learned instead, and
drawn for --text. Writes text_to_image.png, results.json and README.md into --out; a run that is killed goes on.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
from guidance import tile
from palette import mean_and_error, spent
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde import VPSDE, Denoiser, X0Denoiser, sample
from scoresde.data import Captions, Given, TrainingData, digits, training_data
from scoresde.denoiser import NetworkDenoiser
from scoresde.guidance import ClassifierFree, Energy, similarity
from scoresde.info import environment
from scoresde.metrics import RandomFeatures, evaluate
from scoresde.networks import seeded_global_generators
from scoresde.nn import NoisyClassifier, TextEncoder
from scoresde.nn.blocks import unshuffle
from scoresde.noise import derive_seed
from scoresde.report import table, write_json
from scoresde.solvers import DPMSolverPP
from scoresde.training import CheckpointError, ModelConfig, TrainConfig, Trainer
from scoresde.training.loss import noisy_batch
from scoresde.training.weights import uniform_in

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HELD_OUT = {(a, (3 * a + k) % 10) for a in range(10) for k in (1, 4)}
SHAPE, SIDE, DARK, LENGTH = (1, 12, 20), 10, 0.45, 40
READER_DIGITS = 700  # of 1797
SOLVER, SETS, SHOWN = DPMSolverPP(order=2), ("seen", "held out"), 6
WEIGHTS, STRENGTHS = (1.0, 1.5, 2.0, 3.0, 5.0), (0.5, 1.0, 2.0, 4.0)


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__, "runs/text_to_image")
    parser.add_argument("--train-steps", type=int, default=2400, help="of the denoiser, 64 scenes a step (2400)")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.data is not None:
        own_images(args)
        return
    own, others = halves()
    x, facts = scenes(*own, args.scenes, args.seed, held_out=False)
    said = Captions([sentences(row) for row in facts.tolist()], length=LENGTH)
    denoiser, clip = learned(TrainingData(x, conditions=(said,), drop=0.1, seed=args.seed), args)
    reader = learned_reader(others, args)
    start = time.perf_counter()
    rows, pictures = measured(denoiser, clip.net, reader.net, own, args)
    names = ("diffusion", "clip", "reader")
    results = {
        "environment": environment(),
        "seconds": {name: spent(args.models / name) for name in names} | {"measure": time.perf_counter() - start},
        "parameters": {name: size(net) for name, net in zip(names, (denoiser, clip, reader), strict=True)},
        **{name: value for name, value in vars(args).items() if isinstance(value, int)},
        "solver": repr(SOLVER),
        "laws": laws(denoiser, clip.net),
        "rows": rows,
    }
    write_json(args.out / "results.json", results)
    (args.out / "README.md").write_text(report(results))
    draw(rows, pictures, args.out / "text_to_image.png")
    print("\n" + report(results) + f"\nwrote {args.out}/text_to_image.png, results.json and README.md")


def arguments(about: str | None, out: str) -> argparse.ArgumentParser:
    """Those of a program on captioned scenes, or captioned images of one's own."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(out), help=f"results ({out})")
    parser.add_argument("--models", type=Path, default=Path("runs/text_to_image"), help="folder of the runs")
    parser.add_argument("--data", type=Path, help="a folder of images with captions, instead of scenes of digits")
    parser.add_argument("--size", type=int, nargs=2, default=[32, 32], help="to make of these images (32 32)")
    parser.add_argument("--text", nargs="+", help="texts that are drawn then (the first captions)")
    parser.add_argument("--scenes", type=int, default=12_000, help="to train on (12000)")
    parser.add_argument("--clip-steps", type=int, default=600, help="of CLIP (600)")
    parser.add_argument("--reader-steps", type=int, default=2400, help="of the reader, 64 scenes a step (2400)")
    parser.add_argument("--images", type=int, default=400, help="for each row, of seen and held-out pairs (400)")
    parser.add_argument("--nfe", type=int, default=20, help="evaluations of a sample of a model (20)")
    parser.add_argument("--seed", type=int, default=0, help="of scenes, weights, training and samples (0)")
    return parser


# --- the scenes ------------------------------------------------------------------------------------------------------


def scenes(images: Tensor, labels: Tensor, n: int, seed: int, held_out: bool | None = None) -> tuple[Tensor, Tensor]:
    """n scenes in [-1, 1], and what is in them, whole numbers (n, 4): the left digit and whether it is dark, and of the
    right one; of the pairs that are held out, of the others, or of all.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs = [(a, b) for a in range(10) for b in range(10) if held_out is None or ((a, b) in HELD_OUT) == held_out]
    chosen = torch.tensor(pairs)[torch.randint(len(pairs), (n,), generator=generator)]
    dark = torch.randint(2, (n, 2), generator=generator)
    canvas, rows = torch.zeros(n, *SHAPE[1:]), torch.arange(n)[:, None, None]
    for side in (0, 1):
        own = (labels == chosen[:, side, None]).float()
        digit = images[torch.multinomial(own, 1, generator=generator)[:, 0], 0]
        digit = digit * torch.where(dark[:, side] > 0, DARK, 1.0)[:, None, None]
        top, left = torch.randint(5, (n,), generator=generator), torch.randint(3, (n,), generator=generator)
        place = torch.arange(8)
        canvas[rows, (top[:, None] + place)[:, :, None], (SIDE * side + left[:, None] + place)[:, None]] = digit
    return canvas[:, None] * 2 - 1, torch.stack([chosen[:, 0], dark[:, 0], chosen[:, 1], dark[:, 1]], 1)


def sentences(facts: Sequence[int]) -> tuple[str, str]:
    """The two captions of a scene."""
    left, right = (f"a {'dark ' if dark else ''}{NUMBERS[digit]}" for digit, dark in (facts[:2], facts[2:]))
    return f"{left} left of {right}", f"{right} right of {left}"


def halves() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images of digits in [0, 1] and their labels: those that scenes are learned of, and the reader's."""
    images, labels = digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    own, reader = order[READER_DIGITS:], order[:READER_DIGITS]
    return ((images[own] + 1) / 2, labels[own]), ((images[reader] + 1) / 2, labels[reader])


# --- the networks ----------------------------------------------------------------------------------------------------


def trained(
    denoiser: NetworkDenoiser, data: TrainingData, folder: Path, steps: int, lr: float, batch_size: int, **how: Any
) -> NetworkDenoiser:
    """The network with averaged weights, trained or continued in a run folder."""
    denoiser.net.to(memory_format=torch.channels_last)
    config = TrainConfig(steps=steps, batch_size=batch_size, lr=lr, ema_decay=0.998, checkpoint_every=200, workers=0)
    try:
        trainer = Trainer(denoiser, data, config, folder=folder, **how)
    except CheckpointError as error:
        raise SystemExit(f"{error}\n(--models names another folder)") from error
    if trainer.step < steps:
        print(f"training on {len(data)} images, step {trainer.step} to {steps}, into {folder}", flush=True)
    return trainer.fit().ema


class CLIP(nn.Module):
    """f(x, t) and g(c), of length 1 but for a learned factor of f: f . g is log p(c | x_t) - log p(c), were it exact.

    A further channel says how far to the right a pixel is, for f takes means over the pixels.
    """

    def __init__(self, channels: int, length: int, features: int = 64) -> None:
        super().__init__()
        self.image = NoisyClassifier(features, image_channels=4 * (channels + 1), channels=32)
        self.text, self.outward = TextEncoder(64, 2, length=length), nn.Linear(64, features)
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        right = torch.linspace(-1, 1, x.shape[-1], device=x.device).expand_as(x[:, :1])
        found = self.image(unshuffle(torch.cat([x, right], 1), 2), time)
        return self.log_scale.exp() * F.normalize(found, dim=1)

    def told(self, text: Any) -> Tensor:
        return F.normalize(self.outward(self.text(text)["vector"]), dim=1)


def contrastive(denoiser: NetworkDenoiser, x0: Tensor, draws: Any, cond: Mapping[str, Any]) -> Tensor:
    """CLIP's loss at noisy scenes: which caption is whose, and which scene; a `Loss`."""
    batch, clip = noisy_batch(denoiser.sde, x0, None, None, None, draws), denoiser.net
    logits = clip(batch.x_t, denoiser.label(batch.t).float()) @ clip.told(cond["text"]).T
    own = torch.arange(len(x0), device=x0.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


class Reader(nn.Module):
    """Of each half of a scene, the logits of a digit and of dark: (B, 2, 12)."""

    def __init__(self) -> None:
        super().__init__()
        sizes, layers = (1, 32, 64, 64), []
        for i in range(3):
            layers += [nn.Conv2d(sizes[i], sizes[i + 1], 3, stride=1 + (i > 0), padding=1), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 3 * 3, 12))

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        return torch.stack([self.layers(half) for half in x.split(SIDE, -1)], 1)

    def facts(self, x: Tensor) -> Tensor:
        """What it finds in scenes, (B, 4)."""
        with torch.no_grad():
            logits = torch.cat([self(part) for part in x.split(500)])
        return torch.stack([logits[..., :10].argmax(-1), logits[..., 10:].argmax(-1)], -1).flatten(1)


def reading(denoiser: NetworkDenoiser, x0: Tensor, draws: Any, cond: Mapping[str, Any]) -> Tensor:
    """Cross-entropy of the four facts; a `Loss`."""
    logits, facts = denoiser.net(x0), cond["vector"].long().unflatten(1, (2, 2))
    digit = F.cross_entropy(logits[..., :10].flatten(0, 1), facts[..., 0].flatten())
    return digit + F.cross_entropy(logits[..., 10:].flatten(0, 1), facts[..., 1].flatten())


def learned(data: TrainingData, args: argparse.Namespace) -> tuple[NetworkDenoiser, NetworkDenoiser]:
    """The text-conditional denoiser and CLIP, trained or continued on the same captioned images."""
    length = next(said.length for said in data.conditions if isinstance(said, Captions))
    encoder = {"network": "text", "options": {"width": 64, "depth": 2, "heads": 4, "length": length}}
    options = {"image_channels": data.shape[0], "channels": 32, "multipliers": (1, 2), "blocks": 1, "patch": 2}
    text = ModelConfig(options={**options, "vector": 64, "context": 64}, predicts="v", time_scale=999,
                       encoders={"text": encoder})  # fmt: skip
    diffusion = trained(text.build(args.seed), data, args.models / "diffusion", args.train_steps, 2e-3, 64, model=text,
                        weighting=uniform_in("v"))  # fmt: skip
    return diffusion, learned_clip(replace(data, drop=0.0), args)


def learned_clip(data: TrainingData, args: argparse.Namespace) -> NetworkDenoiser:
    """CLIP, trained or continued, as what a `Trainer` takes."""
    length = next(said.length for said in data.conditions if isinstance(said, Captions))
    clip = X0Denoiser(seeded(lambda: CLIP(data.shape[0], length), args.seed), VPSDE(), time=lambda t: 999 * t)
    return trained(clip, data, args.models / "clip", args.clip_steps, 1e-3, 128, loss=contrastive)


def learned_reader(others: tuple[Tensor, Tensor], args: argparse.Namespace) -> NetworkDenoiser:
    """The reader, trained or continued on scenes of these digits."""
    x, facts = scenes(*others, args.scenes, args.seed + 1)
    data = TrainingData(x, conditions=(Given(facts.float()),), seed=args.seed)
    reader = X0Denoiser(seeded(Reader, args.seed), VPSDE())
    return trained(reader, data, args.models / "reader", args.reader_steps, 2e-3, 64, loss=reading)


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A network whose initial weights are of that seed."""
    with seeded_global_generators(seed):
        return make()


def size(denoiser: NetworkDenoiser) -> int:
    """How many numbers a network has."""
    return sum(p.numel() for p in denoiser.net.parameters())


# --- samples, and what is measured -----------------------------------------------------------------------------------


def guided(denoiser: Denoiser, clip: CLIP, way: str, strength: float, texts: list[str]) -> Denoiser:
    """The denoiser of these texts' samples, guided one way or the other."""
    if way == "weight":
        return ClassifierFree(denoiser, strength)
    with torch.no_grad():
        told = clip.told(texts)
    image = lambda x, t: clip(x, (999 * t).float().expand(len(x)))  # noqa: E731
    return Energy(denoiser, similarity(image, told, normalised=False), scale=strength)


def drawn(
    denoiser: Denoiser, clip: CLIP, way: str, strength: float, texts: list[str], shape: tuple[int, ...],
    args: argparse.Namespace,
) -> Tensor:  # fmt: skip
    """A sample for each text, of the same noise whatever the guidance."""
    parts = []
    for k in range(0, len(texts), 250):
        some = texts[k : k + 250]
        model = guided(denoiser, clip, way, strength, some)
        how: dict[str, Any] = {"nfe": args.nfe, "seed": derive_seed(args.seed, k)}
        parts.append(sample(model, (len(some), *shape), SOLVER, cond={"text": some}, **how).x.clamp(-1, 1))
    return torch.cat(parts)


def measured(
    denoiser: Denoiser, clip: CLIP, reader: Reader, own: tuple[Tensor, Tensor], args: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """The rows of the table, and the images of the picture."""
    features, reference = RandomFeatures(SHAPE), scenes(*own, 4000, args.seed + 2)[0]
    sets = {name: scenes(*own, args.images, args.seed + 3 + held, bool(held)) for held, name in enumerate(SETS)}
    real, rows, pictures = torch.cat([x for x, _ in sets.values()]), [], {}

    def row(way: str, strength: float | None, found: Mapping[str, Tensor]) -> None:
        x, score = torch.cat(list(found.values())), {}
        for name, (_, facts) in sets.items():
            right = reader.facts(found[name]) == facts
            score[name] = mean_and_error(right.all(1))
            score[f"{name}, a digit"] = mean_and_error(right[:, ::2].double().mean(1))
        distance = evaluate(x, reference, ["frechet"], features, floor=real, floors=20)["frechet"]
        rows.append({"way": way, "strength": strength, **score, "frechet": [distance.value, distance.stderr]})
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)

    row("real", None, {name: x for name, (x, _) in sets.items()})
    for way, strengths in (("weight", WEIGHTS), ("CLIP", STRENGTHS)):
        for strength in strengths:
            found = {}
            for name, (_, facts) in sets.items():
                texts = [sentences(f)[i % 2] for i, f in enumerate(facts.tolist())]
                found[name] = drawn(denoiser, clip, way, strength, texts, SHAPE, args)
                pictures[f"{way} {strength:g}, {name}"] = found[name][:SHOWN]
                pictures[f"real, {name}"] = sets[name][0][:SHOWN]
            row(way, strength, found)
    return rows, pictures | {f"{name}, facts": facts[:SHOWN] for name, (_, facts) in sets.items()}


def laws(denoiser: NetworkDenoiser, clip: CLIP) -> dict[str, bool]:
    """What holds bit for bit: the empty text is nothing told; a run's texts are those encoded by hand; guidance of no
    strength, either way, is the model itself.
    """
    texts, shape = ["a three left of a dark seven", "a one right of a two"], (2, *SHAPE)
    bare, by_hand = denoiser.with_net(denoiser.net.net), denoiser.net.encode(text=texts)

    def x(model: Denoiser, **cond: Any) -> Tensor:
        return sample(model, shape, SOLVER, nfe=4, seed=0, cond=cond).x

    with torch.no_grad():
        nothing = {"vector": torch.zeros_like(by_hand["vector"])}
        told, free = x(denoiser, text=texts), x(bare, **nothing)
        return {
            "the empty text is nothing told": torch.equal(x(denoiser, text=["", ""]), free),
            "w = 0 is the model of no text": torch.equal(x(ClassifierFree(denoiser, 0.0), text=texts), free),
            "w = 1 is the model of the text": torch.equal(x(ClassifierFree(denoiser, 1.0), text=texts), told),
            "s = 0 is the model of the text": torch.equal(
                x(guided(denoiser, clip, "CLIP", 0.0, texts), text=texts), told
            ),
            "texts are encoded as by hand": torch.equal(x(bare, **by_hand), told),
        }


# --- what is written -------------------------------------------------------------------------------------------------


def report(results: Mapping[str, Any]) -> str:
    """The page."""
    rows, seconds = results["rows"], results["seconds"]
    ceiling = max(rows[0]["seen"][0], 1e-9)
    names = {"real": "real scenes", "weight": "by weight, w =", "CLIP": "by CLIP, s ="}

    def cells(row: Mapping[str, Any]) -> list[str]:
        of_ceiling = [f"{100 * row[name][0]:.1f} ({100 * row[name][1]:.1f})" for name in SETS]
        share = f"{100 * row['seen'][0] / ceiling:.0f} %"
        digit = f"{100 * row['seen, a digit'][0]:.1f}, {100 * row['held out, a digit'][0]:.1f}"
        name = names[row["way"]] + ("" if row["strength"] is None else f" {row['strength']:g}")
        return [name, *of_ceiling, share, digit, f"{row['frechet'][0]:.3f} ({row['frechet'][1]:.3f})"]

    head = ["guidance", "seen, %", "held out, %", "seen, of real scenes'", "one digit, %", "Frechet distance"]
    held = "\n".join(f"- {law}: {'holds' if found else 'DOES NOT HOLD'}" for law, found in results["laws"].items())
    lines = "\n".join(table(head, [cells(row) for row in rows]))
    found = results["environment"]
    place = f"{found['device']}, {found['threads']} thread(s), float32; torch {found['torch']}"
    made = f"scoresde {found['scoresde']}, commit {found['commit']}"
    took = f"{seconds['diffusion']:.0f} s (denoiser and text encoder), {seconds['clip']:.0f} s (CLIP)"
    sizes = f"{results['parameters']['diffusion']:,} parameters, {results['train_steps']} steps of 64"
    return f"""# Text to image

`text_to_image.py --out benchmarks/results/text_to_image`: {place};
{made}. Training, by its logs, {took} and
{seconds["reader"]:.0f} s (the reader) of the wall clock; samples and scores {seconds["measure"]:.0f} s.

Scenes of two real digits, 12 x 20 (`examples/text_to_image.py`), {results["scenes"]} to train on, of 80 of the 100
pairs of digits; a U-Net and a transformer over the caption's bytes, {sizes};
CLIP {results["parameters"]["clip"]:,} parameters, {results["clip_steps"]} steps. Each row: {results["images"]} captions
of seen pairs and as many of held-out ones, a sample each, by {results["nfe"]} evaluations of
`{results["solver"]}`, from the same noise in each row.

- Seen, held out: how often both digits and both shades are what the caption says, as read by a classifier that was
  trained on scenes of other digits' images. In brackets the standard error over captions. Chance is 0.25 %, the
  ceiling what the reader finds in real scenes, which it never saw.
- One digit: how often a digit is the caption's, by its side, of seen and of held-out pairs.
- Frechet distance: in 64 random features, of all {2 * results["images"]} samples to 4000 real scenes; in brackets its
  standard error.

{lines}

![Captions, samples and real scenes; match and Frechet distance by strength](text_to_image.png)

Guidance by CLIP is around the model that is told the text (w = 1). Bit for bit:

{held}
"""


def draw(rows: Sequence[Mapping[str, Any]], pictures: Mapping[str, Tensor], path: Path) -> None:
    """Samples under their captions, and the trade-off of both guidances."""
    shown = [f"weight {WEIGHTS[0]:g}", "weight 3", f"CLIP {STRENGTHS[1]:g}", "real"]
    figure, axes = plt.subplots(1, 3, figsize=(15, 6.5), width_ratios=[1, 1, 1.1], layout="constrained")
    for axis, name in zip(axes, SETS, strict=False):
        images = torch.stack([pictures[f"{way}, {name}"] for way in shown], 1).flatten(0, 1)
        axis.imshow(tile(images, len(shown)), aspect="equal")
        said = [sentences(facts)[i % 2] for i, facts in enumerate(pictures[f"{name}, facts"].tolist())]
        high = axis.get_ylim()[0] / len(said)
        axis.set_yticks([high * (i + 0.5) for i in range(len(said))], [text.replace(" of ", " of\n") for text in said])
        wide = axis.get_xlim()[1] / len(shown)
        axis.set_xticks(
            [wide * (i + 0.5) for i in range(len(shown))], ["w = 1", "w = 3", f"CLIP, s = {STRENGTHS[1]:g}", "real"]
        )
        axis.set_title(f"pairs of digits: {name}")
        axis.tick_params(length=0)
    for way, color in (("weight", "C0"), ("CLIP", "C1")):
        own = [row for row in rows if row["way"] == way]
        for name, style in zip(SETS, ("-o", "--s"), strict=True):
            x, y = [row["frechet"][0] for row in own], [100 * row[name][0] for row in own]
            axes[2].plot(x, y, style, color=color, label=f"by {way}, {name}")
        for row in own:
            axes[2].annotate(
                f"{row['strength']:g}", (row["frechet"][0], 100 * row["seen"][0]), (4, 4), textcoords="offset points"
            )
    axes[2].axhline(100 * rows[0]["seen"][0], color="grey", label="real scenes, as read")
    axes[2].set(
        xlabel="Frechet distance to real scenes",
        ylabel="all four facts are the caption's, %",
        title="strength of guidance",
    )
    axes[2].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def own_images(args: argparse.Namespace) -> None:
    """The same on a folder of images with captions: samples of both guidances, without a reader."""
    data = training_data(args.data, captions=args.data, size=tuple(args.size), drop=0.1, seed=args.seed)
    denoiser, clip = learned(data, args)
    texts = args.text or [texts[0] for texts in data.conditions[0].texts[:SHOWN]]
    ways = [("weight", 1.0), ("weight", 3.0), ("CLIP", STRENGTHS[1])]
    images = torch.stack([drawn(denoiser, clip.net, *way, texts, data.shape, args) for way in ways], 1)
    title = ", ".join(f"{way} {strength:g}" for way, strength in ways)
    draw_captioned(images, texts, title, args.out / "text_to_image.png")


def draw_captioned(images: Tensor, texts: Sequence[str], title: str, path: Path) -> None:
    """Images (n, columns, C, H, W), a text for each row."""
    figure, axis = plt.subplots(figsize=(8, 1 + 1.5 * len(texts)), layout="constrained")
    axis.imshow(tile(images.flatten(0, 1), images.shape[1]))
    axis.set(title=title, xticks=[])
    high = axis.get_ylim()[0] / len(texts)
    axis.set_yticks([high * (i + 0.5) for i in range(len(texts))], texts)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
