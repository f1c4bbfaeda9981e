"""Text to image: scenes of real digits from what is said of them, "a three left of a dark seven".

    python examples/text_to_image.py             some ten minutes on two quiet cores, most of it training; --help

GLIDE (Nichol et al., 2021) in small. A transformer reads the caption's words (`TextEncoder`); its last token's output
modulates the U-Net's norms, all tokens' outputs are its context, and a tenth of the captions is dropped to the empty
text. Its two guidances are compared, at several strengths:

    by weight    D(x_t, "") + w (D(x_t, c) - D(x_t, ""))                    (Ho and Salimans, 2022; `ClassifierFree`)
    by CLIP      mu + s Sigma grad_x f(x_t, t) . g(c)                       (`Energy` of `similarity`)

with f and g of a CLIP (Radford et al., 2021) that is trained here, on scenes with noise, as GLIDE's "noise-aware" one.
Guiding D by s (sigma^2 / alpha) grad is that shift of a DDPM step's mean, to first order in the step
(`scoresde.guidance.classifier`).

Scenes, captions and the reader of scenes are those of examples/captioned_scenes.py, with a fifth of the pairs of digits
held out. Measured: how often both digits and both shades are the caption's, as read, for pairs that were seen and held
out, beside what is read in real scenes (the ceiling) and chance, 1 in 400; and the Frechet distance to real scenes.

With --data a folder of images with captions (captions.jsonl, captions.csv or captions.txt) is learned instead, and
drawn for --text. Writes text_to_image.png, results.json and README.md into --out; a run that is killed goes on.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from captioned_scenes import HEADS, LEGEND, SETS, SHAPE, Exam, captioned, cells, options
from shared import grid, picture, place, publish, ran, seeded, trained
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde import VPSDE, Denoiser, X0Denoiser, sample
from scoresde.data import Captions, TrainingData
from scoresde.denoiser import NetworkDenoiser
from scoresde.guidance import ClassifierFree, Energy, similarity
from scoresde.nn import NoisyClassifier, TextEncoder
from scoresde.nn.blocks import unshuffle
from scoresde.report import table
from scoresde.solvers import DPMSolverPP
from scoresde.training import ModelConfig
from scoresde.training.loss import noisy_batch
from scoresde.training.weights import uniform_in

NETWORK = {"channels": 32, "multipliers": (1, 2), "blocks": 1, "patch": 2, "vector": 64, "context": 64}
ENCODER = {"width": 64, "depth": 1, "heads": 4}
SOLVER, SHOWN = DPMSolverPP(order=2), 6
WEIGHTS, STRENGTHS = (1.0, 1.5, 2.0, 3.0, 5.0), (0.5, 1.0, 2.0, 4.0)


def main(argv: list[str] | None = None) -> None:
    args = options(__doc__, "text_to_image", train_steps=(5000, "of the denoiser, 64 scenes a step")).parse_args(argv)
    data = captioned(args, drop=0.1)
    denoiser, clip = learned(data, args)
    if args.data is not None:  # images of one's own, of which there is no reader
        texts = args.text or [own[0] for own in data.conditions[0].texts[:SHOWN]]
        ways = [("weight", 1.0), ("weight", 3.0), ("CLIP", STRENGTHS[1])]
        images = [drawn(denoiser, clip.net, *way, texts, data.shape, args) for way in ways]
        draw_captioned(images, texts, [f"{way} {strength:g}" for way, strength in ways], args.out / "text_to_image.png")
        return
    exam = Exam(args)
    start = time.perf_counter()
    shown = measured(denoiser, clip.net, exam, args)
    nets = {"diffusion": denoiser, "clip": clip, "reader": exam.reader}
    found = {"solver": repr(SOLVER), "laws": laws(denoiser, clip.net), "rows": exam.rows}
    results = ran(args.models, nets, start) | found
    publish(args, "text_to_image", results, report, lambda path: draw(exam.rows, shown, path))


# --- the networks ----------------------------------------------------------------------------------------------------


def learned(data: TrainingData, args: argparse.Namespace) -> tuple[NetworkDenoiser, NetworkDenoiser]:
    """The text-conditional denoiser and CLIP, trained or continued on the same captioned images."""
    said = data.conditions[0]
    reads = {"length": said.length, "tokens": said.tokenizer.words}
    encoder = {"network": "text", "options": ENCODER | reads}
    options = NETWORK | {"image_channels": data.shape[0]}
    model = ModelConfig(options=options, predicts="v", time_scale=999, encoders={"text": encoder})
    how: dict[str, Any] = {"weighting": uniform_in("v"), "lr": 1e-3, "checkpoint_every": 200}
    diffusion = trained(model, data, args.models / "diffusion", args.train_steps, args.seed, **how)
    return diffusion, learned_clip(replace(data, drop=0.0), args)


class CLIP(nn.Module):
    """f(x, t) and g(c), of length 1 but for a factor of f: f . g is log p(c | x_t) - log p(c), were it exact."""

    def __init__(self, shape: Sequence[int], said: Captions, features: int = 64) -> None:
        super().__init__()
        channels, *size = shape
        patches = {"image_channels": 4 * channels, "size": [n // 2 for n in size]}
        self.image = NoisyClassifier(features, **patches)  # type: ignore[arg-type]
        self.text = TextEncoder(**ENCODER, length=said.length, tokens=said.tokenizer)  # type: ignore[arg-type]
        self.outward = nn.Linear(self.text.width, features)
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.log_scale.exp() * F.normalize(self.image(unshuffle(x, 2), time), dim=1)

    def told(self, text: Any) -> Tensor:
        return F.normalize(self.outward(self.text(text)["vector"]), dim=1)


def contrastive(denoiser: NetworkDenoiser, x0: Tensor, draws: Any, cond: Mapping[str, Any]) -> Tensor:
    """CLIP's loss at noisy scenes: which caption is whose, and which scene; a `Loss`."""
    batch, clip = noisy_batch(denoiser.sde, x0, None, None, None, draws), denoiser.net
    logits = clip(batch.x_t, denoiser.label(batch.t).float()) @ clip.told(cond["text"]).T
    own = torch.arange(len(x0), device=x0.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def learned_clip(data: TrainingData, args: argparse.Namespace) -> NetworkDenoiser:
    """CLIP, trained or continued, as what a `Trainer` takes."""
    net = seeded(lambda: CLIP(data.shape, data.conditions[0]), args.seed)
    clip = X0Denoiser(net, VPSDE(), time=lambda t: 999 * t)
    how: dict[str, Any] = {"loss": contrastive, "batch_size": 128, "checkpoint_every": 200}
    return trained(clip, data, args.models / "clip", args.clip_steps, args.seed, **how)


# --- guidance, and what is measured ----------------------------------------------------------------------------------


def guided(denoiser: Denoiser, clip: CLIP, way: str, strength: float, texts: Sequence[str]) -> Denoiser:
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
    model, start = guided(denoiser, clip, way, strength, texts), (len(texts), *shape)
    return sample(model, start, SOLVER, nfe=args.nfe, seed=args.seed, cond={"text": texts}).x.clamp(-1, 1)


def measured(denoiser: Denoiser, clip: CLIP, exam: Exam, args: argparse.Namespace) -> dict[Any, Any]:
    """The rows of the table, in the exam; and what is shown: some captions of either set, and images of each."""
    some = exam.some(SHOWN)
    exam.measure(exam.real, way="real", strength=None)
    shown: dict[Any, Any] = {"texts": [exam.texts[i] for i in some], "real": exam.real[some]}
    for way, strength in [("weight", w) for w in WEIGHTS] + [("CLIP", s) for s in STRENGTHS]:
        x = drawn(denoiser, clip, way, strength, exam.texts, SHAPE, args)
        exam.measure(x, way=way, strength=strength)
        shown[way, strength] = x[some]
    return shown


def laws(denoiser: NetworkDenoiser, clip: CLIP) -> dict[str, bool]:
    """What holds bit for bit: the empty text is nothing told; a run's texts are those encoded by hand; guidance of no
    strength, either way, is the model itself.
    """
    texts, shape = ["a three left of a dark seven", "a one right of a two"], (2, *SHAPE)
    bare, by_hand = denoiser.with_net(denoiser.net.net), denoiser.net.encode(text=texts)

    def x(model: Denoiser, **cond: Any) -> Tensor:
        return sample(model, shape, SOLVER, nfe=4, seed=0, cond=cond).x

    with torch.no_grad():
        told, free = x(denoiser, text=texts), x(bare, vector=torch.zeros_like(by_hand["vector"]))
        pairs = {
            "the empty text is nothing told": (x(denoiser, text=["", ""]), free),
            "w = 0 is the model of no text": (x(ClassifierFree(denoiser, 0.0), text=texts), free),
            "w = 1 is the model of the text": (x(ClassifierFree(denoiser, 1.0), text=texts), told),
            "s = 0 is the model of the text": (x(guided(denoiser, clip, "CLIP", 0.0, texts), text=texts), told),
            "texts are encoded as by hand": (x(bare, **by_hand), told),
        }
    return {law: torch.equal(*pair) for law, pair in pairs.items()}


# --- what is written -------------------------------------------------------------------------------------------------


def report(results: Mapping[str, Any]) -> str:
    """The page."""
    sizes, names = results["parameters"], {"real": "real scenes", "weight": "by weight, w =", "CLIP": "by CLIP, s ="}
    strengths = ["" if row["strength"] is None else f" {row['strength']:g}" for row in results["rows"]]
    found = zip(results["rows"], strengths, cells(results["rows"]), strict=True)
    lines = [[names[row["way"]] + strength, *own] for row, strength, own in found]
    held = "\n".join(f"- {law}: {'holds' if found else 'DOES NOT HOLD'}" for law, found in results["laws"].items())
    return f"""# Text to image

{place(results)}

Scenes of two real digits, 12 x 20 (`examples/captioned_scenes.py`), {results["scenes"]} to train on, of 80 of the 100
pairs of digits; a U-Net and a transformer over the caption's tokens, {sizes["diffusion"]:,} parameters,
{results["train_steps"]} steps of 64; CLIP {sizes["clip"]:,} parameters, {results["clip_steps"]} steps. Each row:
{results["images"]} captions of seen pairs and as many of held-out ones, a sample each, by {results["nfe"]} evaluations
of `{results["solver"]}`, from the same noise in each row.

{LEGEND}

{chr(10).join(table(["guidance", *HEADS], lines))}

![Captions, samples and real scenes; match and Frechet distance by strength](text_to_image.png)

Guidance by CLIP is around the model that is told the text (w = 1). Bit for bit:

{held}
"""


def draw(rows: Sequence[Mapping[str, Any]], shown: Mapping[Any, Any], path: Path) -> None:
    """Samples under their captions, and the trade-off of both guidances."""
    ways = {"w = 1": ("weight", 1.0), "w = 3": ("weight", 3.0), f"CLIP, s = {STRENGTHS[1]:g}": ("CLIP", STRENGTHS[1])}
    images = torch.stack([shown[way] for way in [*ways.values(), "real"]], 1)
    texts, half = [text.replace(" of ", " of\n") for text in shown["texts"]], len(images) // 2
    with picture(path, 15, 4.4) as figure:
        seen, held_out, axis = figure.subplots(1, 3, width_ratios=[1, 1, 1.1])
        grid(seen, images[:half], texts[:half], [*ways, "real"], "pairs of digits: seen")
        grid(held_out, images[half:], texts[half:], [*ways, "real"], "pairs of digits: held out")
        for way, color in (("weight", "C0"), ("CLIP", "C1")):
            own = [row for row in rows if row["way"] == way]
            x = [row["frechet"][0] for row in own]
            for name, style in zip(SETS, ("-o", "--s"), strict=True):
                axis.plot(x, [100 * row[name][0] for row in own], style, color=color, label=f"by {way}, {name}")
            for row in own:
                at = (row["frechet"][0], 100 * row["seen"][0])
                axis.annotate(f"{row['strength']:g}", at, (4, 4), textcoords="offset points")
        axis.axhline(100 * rows[0]["seen"][0], color="grey", label="real scenes, as read")
        axis.set(xlabel="Frechet distance to real scenes", ylabel="all four facts are the caption's, %")
        axis.set_title("strength of guidance", fontsize=11)
        axis.legend()


def draw_captioned(columns: Sequence[Tensor], texts: Sequence[str], heads: Sequence[str], path: Path) -> None:
    """Columns of images (n, C, H, W), a text for each row."""
    with picture(path, 8, 1 + 1.5 * len(texts)) as figure:
        grid(figure.subplots(), torch.stack(list(columns), 1), texts, heads)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
