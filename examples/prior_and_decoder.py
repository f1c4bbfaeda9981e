"""DALL-E 2 in small: a text to a CLIP embedding, the embedding to a small image, the small image to a large one.

    python examples/prior_and_decoder.py          some ten minutes on two quiet cores, most of it training; --help

Ramesh et al. (2022, "Hierarchical text-conditional image generation with CLIP latents") draw an image x of a text y by

    p(x | y) = integral p(x | s) p(s | z) p(z | y)

z is the CLIP embedding of the image (section 2), in its first 32 principal components, each of unit variance. Each
factor is a diffusion, and together they are one `Cascade`:

    prior        z of y: a causal transformer over the text's tokens, its CLIP embedding, the time, z_t, and a query,
                 whose output is the prediction (section 2.2; theirs of z, and here of v, which need not copy z_t)
    decoder      s of z, 6 x 10 pixels: z is projected into the time's embedding and into four tokens (section 2.1)
    upsampler    x of s, 12 x 20 pixels: told s enlarged, which noise has been added to on purpose, and how much of it

The scenes, their captions, CLIP and the reader are those of `examples/text_to_image.py`; runs of it in --models are
used. Beside the cascade stand a decoder that draws x of z at once, and an upsampler that never saw noise in s.
Measured: how often a sample's digits and shades are what the text says, and the Frechet distance to real scenes. Drawn:
samples, variations of one image (its z, other noise) and images between two (z along a great circle).

With --data a folder of images with captions (captions.jsonl, captions.csv or captions.txt) is learned instead, and
drawn for --text. Writes prior_and_decoder.png, results.json and README.md into --out; a run that is killed goes on.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from captioned_scenes import HEADS, LEGEND, SHAPE, Exam, captioned, cells, options
from shared import grid, picture, place, publish, ran, seeded, trained
from text_to_image import CLIP, draw_captioned, learned_clip
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde import VPSDE, Cascade, Stage, VDenoiser
from scoresde.data import (
    AugmentedSuperResolution,
    Captions,
    Condition,
    Given,
    Raw,
    SuperResolution,
    TrainingData,
)
from scoresde.denoiser import NetworkDenoiser
from scoresde.editing import interpolate
from scoresde.guidance import ClassifierFree
from scoresde.metrics import PCA
from scoresde.nn import Encoding, TextEncoder, TimeEmbedding, UNet
from scoresde.nn.dit import Layer, norm
from scoresde.report import table
from scoresde.solvers import DPMSolverPP
from scoresde.training import uniform_in

FEATURES, Z, WIDTH, TOKENS = 64, 32, 96, 4
NOISY, PLAIN = AugmentedSuperResolution(2, noise=(0.0, 0.3)), SuperResolution(2)
NETWORK = {"channels": 32, "multipliers": (1, 2), "blocks": 1}
STRENGTHS, SOLVER, SHOWN = (0.0, 0.05, 0.1, 0.2), DPMSolverPP(order=2), 6
COLUMNS = ("decoder", "upsampled", "x at once")
SDE = VPSDE()


def main(argv: list[str] | None = None) -> None:
    parser = options(
        __doc__,
        "prior_and_decoder",
        prior_steps=(4000, "of the prior, 64 scenes a step"),
        train_steps=(2000, "of each network of images, of 64"),
        guidance=(1.5, "weight of the decoder's guidance"),
    )
    args = parser.parse_args(argv)
    if args.data is not None and any(n % 2 for n in args.size):
        raise SystemExit(f"--size {args.size}: expected even numbers, half of which the decoder draws")
    data = captioned(args)
    clip, said = learned_clip(data, args), data.conditions[0]
    texts = [own[i % len(own)] for i, own in enumerate(said.texts)]
    x = data.batch(torch.arange(len(data))).x
    embedding = principal(clip.net, x)
    networks = learned(x, embedding(x), told(clip.net, texts), texts, said, args)
    if args.data is not None:  # images of one's own, of which there is no reader
        texts = args.text or texts[:SHOWN]
        cond = {"text": texts, "vector": told(clip.net, texts)}
        made = {how: cascade(networks, args, how, data.shape).sample(len(texts), seed=args.seed, cond=cond)
                for how in ("direct", STRENGTHS[1])}  # fmt: skip
        draw_captioned(columns(made, data.shape), texts, COLUMNS, args.out / "prior_and_decoder.png")
        return
    exam = Exam(args)
    start = time.perf_counter()
    shown = measured(networks, told(clip.net, exam.texts), embedding(exam.real), exam, args)
    nets = {"clip": clip, "reader": exam.reader, **networks}
    results = ran(args.models, nets, start) | {"solver": repr(SOLVER), "rows": exam.rows}
    publish(args, "prior_and_decoder", results, report, lambda path: draw(shown, path))


# --- the networks ----------------------------------------------------------------------------------------------------


class Prior(nn.Module):
    """net(z_t, time, vector, context, context_mask): the last output of a causal transformer over the text's tokens,
    the text's CLIP embedding, the time, z_t, and a query.
    """

    def __init__(self, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.time, self.z, self.y = TimeEmbedding(WIDTH), nn.Linear(Z, WIDTH), nn.Linear(FEATURES, WIDTH)
        self.query, self.outward = nn.Parameter(0.02 * torch.randn(WIDTH)), nn.Linear(WIDTH, Z)
        self.layers = nn.ModuleList(Layer(WIDTH, heads, 4 * WIDTH) for _ in range(depth))

    def forward(
        self, z: Tensor, time: Tensor, vector: Tensor, context: Tensor, context_mask: Tensor
    ) -> Tensor:  # fmt: skip
        last = [self.y(vector), self.time(time), self.z(z), self.query.expand(len(z), -1)]
        h = torch.cat([context, torch.stack(last, 1)], 1)
        counts = F.pad(context_mask, (0, len(last)), value=True)[:, None, None]
        sees = counts & torch.ones(h.shape[1], h.shape[1], dtype=torch.bool, device=h.device).tril()
        sees = sees | torch.eye(h.shape[1], dtype=torch.bool, device=h.device)  # one that does not count sees itself
        for layer in self.layers:
            h = h + layer.attention(norm(h), sees)
            h = h + layer.mlp(norm(h))
        return self.outward(norm(h[:, -1]))


class Words(TextEncoder):
    """The tokens of a text alone."""

    def forward(self, text: Any) -> dict[str, Tensor]:
        return {name: value for name, value in super().forward(text).items() if name != "vector"}


class Projected(nn.Module):
    """z as a vector, and as tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Linear(Z, TOKENS * Z)

    def forward(self, z: Tensor) -> dict[str, Tensor]:
        mask = torch.ones(len(z), TOKENS, dtype=torch.bool, device=z.device)
        return {"vector": z, "context": self.tokens(z).unflatten(1, (TOKENS, Z)), "context_mask": mask}


def decoder(channels: int, patch: int) -> nn.Module:
    """A U-Net that is told z."""
    return Encoding(UNet(channels, patch=patch, vector=Z, context=Z, **NETWORK), {"z": Projected()})


def upsampler(condition: Condition, shape: tuple[int, ...]) -> nn.Module:
    """A U-Net that is told a small image, as this condition says."""
    told = TrainingData(torch.zeros(1, *shape), conditions=(condition,)).network_options
    return UNet(shape[0], patch=2, **NETWORK, **told)


def embedded(clip: CLIP, x: Tensor) -> Tensor:
    """The CLIP embeddings of images, of length 1."""
    with torch.no_grad():
        found = [clip(part, torch.full((len(part),), 999 * SDE.t_min)) for part in x.split(500)]
    return F.normalize(torch.cat(found), dim=1)


def principal(clip: CLIP, x: Tensor) -> Callable[[Tensor], Tensor]:
    """What makes z of images, by the principal axes of the embeddings of x. Nearly all of their variance is what texts
    say; of what they do not, where a digit is and how it is written, it is small, and a diffusion of the embedding as
    it is would lose that.
    """
    axes = PCA(embedded(clip, x), Z, whiten=True)
    return lambda images: axes(embedded(clip, images)).float()


def told(clip: CLIP, texts: list[str]) -> Tensor:
    """The CLIP embeddings of texts, of unit variance in each entry, or near it."""
    with torch.no_grad():
        return FEATURES**0.5 * torch.cat([clip.told(texts[k : k + 500]) for k in range(0, len(texts), 500)])


def learned(
    x: Tensor, z: Tensor, y: Tensor, texts: list[str], said: Captions, args: argparse.Namespace
) -> dict[str, NetworkDenoiser]:
    """The five networks, trained or continued: z of texts, s of z, x of z, and x of s with noise and without."""
    C, *_ = shape = tuple(x.shape[1:])
    of_text = (Captions(texts, said.tokenizer, said.length), Given(y))
    of_z: dict[str, Any] = {"conditions": (Raw("z", z),), "drop": 0.1}
    words = lambda: Words(WIDTH, 1, length=said.length, tokens=said.tokenizer)  # noqa: E731
    made = {
        "prior": (lambda: Encoding(Prior(), {"text": words()}), z, {"conditions": of_text}),
        "decoder": (lambda: decoder(C, 1), PLAIN.small(x), of_z),
        "direct": (lambda: decoder(C, 2), x, of_z),
        "upsampler": (lambda: upsampler(NOISY, shape), x, {"conditions": (NOISY,)}),
        "plain upsampler": (lambda: upsampler(PLAIN, shape), x, {"conditions": (PLAIN,)}),
    }
    found = {}
    for name, (make, images, how) in made.items():
        net, label = seeded(make, args.seed), lambda t: 999 * t
        data = TrainingData(images, seed=args.seed, **how)
        steps, lr = (args.prior_steps, 1e-3) if name == "prior" else (args.train_steps, 2e-3)
        found[name] = trained(VDenoiser(net, SDE, time=label), data, args.models / name, steps, args.seed, lr=lr,
                              weighting=uniform_in("v"), checkpoint_every=200)  # fmt: skip
    return found


# --- the cascade, and what is measured -------------------------------------------------------------------------------


def cascade(
    networks: Mapping[str, NetworkDenoiser], args: argparse.Namespace, how: float | str, shape: tuple[int, ...]
) -> Cascade:  # fmt: skip
    """The three stages with that much noise in the small image, or "plain" without; or, "direct", prior and decoder."""
    (C, H, W), rest = shape, {"solver": SOLVER, "nfe": args.nfe}
    prior = Stage(networks["prior"], (Z,), takes=("text", "vector"), **rest)
    name, size = ("direct", shape) if how == "direct" else ("decoder", (C, H // 2, W // 2))
    drawn = Stage(ClassifierFree(networks[name], args.guidance), size, lambda z, noise: {"z": z}, takes=(), **rest)
    if how == "direct":
        return Cascade(prior, drawn)
    if how == "plain":
        larger = lambda s, noise: {"image": PLAIN.taken(s.clamp(-1, 1), shape)}  # noqa: E731
        return Cascade(prior, drawn, Stage(networks["plain upsampler"], shape, larger, takes=(), **rest))
    spoiled = NOISY.at(noise=float(how))
    larger = lambda s, noise: spoiled.enlarged(s.clamp(-1, 1), noise)  # noqa: E731
    return Cascade(prior, drawn, Stage(networks["upsampler"], shape, larger, takes=(), **rest))


def columns(made: Mapping[Any, Any], shape: tuple[int, ...]) -> list[Tensor]:
    """What of cascades' samples is shown side by side: s enlarged, x, and x of z at once."""
    best = made[STRENGTHS[1]]
    return [PLAIN.taken(best.made[1], shape), best.x, made["direct"].x]


def measured(
    networks: Mapping[str, NetworkDenoiser], y: Tensor, z: Tensor, exam: Exam, args: argparse.Namespace
) -> dict[str, Any]:
    """The rows of the table, in the exam, of whose texts and scenes y and z are; and what the picture shows."""
    cond, made = {"text": exam.texts, "vector": y}, {}
    exam.measure(exam.real, what="real scenes")
    for how in ("direct", "plain", *STRENGTHS):  # z of the text, by the prior; and below of the scene itself
        made[how] = cascade(networks, args, how, SHAPE).sample(len(exam.texts), seed=args.seed, cond=cond)
        name = {"direct": "x of z at once", "plain": "no noise, ever"}.get(str(how), f"s = {how}")
        exam.measure(made[how].x.clamp(-1, 1), what=name)
    whole = cascade(networks, args, STRENGTHS[1], SHAPE)
    exam.measure(whole.sample(len(z), seed=args.seed + 1, given=[z]).x.clamp(-1, 1), what="z of the scene")

    def variations(i: int) -> Tensor:
        return whole.sample(SHOWN, seed=args.seed + 2, given=[z[i].expand(SHOWN, -1)]).x

    some, w = exam.some(SHOWN // 2), torch.linspace(0, 1, SHOWN + 1)
    a, b = (z[i].expand(len(w), -1) for i in (1, 2))
    between = whole.sample(len(w), seed=[args.seed] * len(w), given=[interpolate(a, b, w)]).x  # of one noise
    return {
        "texts": [exam.texts[i] for i in some],
        "samples": torch.stack([x[some] for x in columns(made, SHAPE)], 1),
        "varied": [torch.cat([exam.real[i, None], variations(i)]) for i in exam.some(1)],
        "between": torch.cat([exam.real[1:2], between, exam.real[2:3]]),
    }


# --- what is written -------------------------------------------------------------------------------------------------


def report(results: Mapping[str, Any]) -> str:
    """The page."""
    sizes = ", ".join(f"{name} {n:,}" for name, n in results["parameters"].items())
    rows = [[row["what"], *found] for row, found in zip(results["rows"], cells(results["rows"]), strict=True)]
    return f"""# Prior, decoder, upsampler

{place(results)}

DALL-E 2 in small (`examples/prior_and_decoder.py`): of a text the CLIP embedding of an image of it, of that an image of
6 x 10 pixels, and of that one of 12 x 20. Parameters: {sizes};
{results["scenes"]} scenes, {results["prior_steps"]} steps of 64 for the prior and {results["train_steps"]} for each
other. A row is of {2 * results["images"]} captions, a sample each, {results["nfe"]} evaluations of
`{results["solver"]}` in each stage; the decoder's guidance has weight {results["guidance"]:g}.

{chr(10).join(table(["upsampler told", *HEADS], rows))}

{LEGEND}
- x of z at once: a decoder of 12 x 20 pixels, without an upsampler. No noise, ever: an upsampler that was trained on
  small images as they are. s: the share of noise in the small image that the other one is told.
- z of the scene: the scene's own embedding in place of the prior's, s = {STRENGTHS[1]:g}; its row is of the scene's own
  caption.

![Samples of captions, variations of an image, and images between two](prior_and_decoder.png)
"""


def draw(shown: Mapping[str, Any], path: Path) -> None:
    """Samples by text, variations, and images between two."""
    texts, names = [text.replace(" of ", " of\n") for text in shown["texts"]], ["a scene and\nvariations"] * 2
    with picture(path, 13, 4.4) as figure:
        left, right = figure.subplots(1, 2, width_ratios=[1, 1.6])
        grid(left, shown["samples"], texts, COLUMNS, "samples of captions")
        title = "of the embedding of a real scene (left; between: both ends)"
        grid(right, [*shown["varied"], shown["between"]], [*names, "between the\nfirst and last"], title=title)


if __name__ == "__main__":
    main()
