"""DALL-E 2 in small: a text to a CLIP embedding, the embedding to a small image, the small image to a large one.

    python examples/prior_and_decoder.py          some ten minutes on two quiet cores, most of it training; --help

Ramesh et al. (2022, "Hierarchical text-conditional image generation with CLIP latents") draw an image x of a text y by

    p(x | y) = integral p(x | s) p(s | z) p(z | y)

z is the CLIP embedding of the image (section 2). Each factor is a diffusion, and together they are one `Cascade`:

    prior        z of y: a causal transformer over the text's tokens, its CLIP embedding, the time, z_t, and a query,
                 whose output is the prediction of z: the loss is |f(z_t, t, y) - z|^2 (section 2.2)
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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import text_to_image as t2i
import torch
from guidance import tile
from palette import mean_and_error, spent
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde import VPSDE, Cascade, Stage, VDenoiser, X0Denoiser
from scoresde.data import (
    AugmentedSuperResolution,
    Captions,
    Condition,
    Given,
    Raw,
    SuperResolution,
    TrainingData,
    training_data,
)
from scoresde.denoiser import NetworkDenoiser
from scoresde.editing import interpolate
from scoresde.guidance import ClassifierFree
from scoresde.info import environment
from scoresde.metrics import RandomFeatures, evaluate
from scoresde.nn import Encoding, TextEncoder, TimeEmbedding, UNet
from scoresde.nn.dit import Layer, norm
from scoresde.report import table, write_json
from scoresde.solvers import DPMSolverPP
from scoresde.training import uniform_in

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Z, WIDTH, TOKENS = 64, 96, 4
NOISY, PLAIN = AugmentedSuperResolution(2, noise=(0.0, 0.5)), SuperResolution(2)
STRENGTHS, SOLVER, SHOWN = (0.0, 0.1, 0.2, 0.4), DPMSolverPP(order=2), 6
SDE = VPSDE()


def main(argv: list[str] | None = None) -> None:
    parser = t2i.arguments(__doc__, "runs/prior_and_decoder")
    parser.add_argument("--prior-steps", type=int, default=3000, help="of the prior, 64 scenes a step (3000)")
    parser.add_argument("--train-steps", type=int, default=1500, help="of each network of images, of 64 (1500)")
    parser.add_argument("--guidance", type=float, default=1.5, help="weight of the decoder's guidance (1.5)")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.data is not None:
        own_images(args)
        return
    own, others = t2i.halves()
    x, facts = t2i.scenes(*own, args.scenes, args.seed, held_out=False)
    said = [t2i.sentences(row) for row in facts.tolist()]
    clip = t2i.learned_clip(TrainingData(x, conditions=(Captions(said, length=t2i.LENGTH),), seed=args.seed), args).net
    texts = [both[i % 2] for i, both in enumerate(said)]
    networks = learned(x, texts, embedded(clip, x), told(clip, texts), args)
    reader = t2i.learned_reader(others, args).net

    start = time.perf_counter()
    rows, pictures = measured(networks, clip, reader, own, args)
    results = {
        "environment": environment(),
        "seconds": {name: spent(args.models / name) for name in ("clip", "reader", *networks)}
        | {"measure": time.perf_counter() - start},
        "parameters": {name: t2i.size(net) for name, net in networks.items()},
        **{name: value for name, value in vars(args).items() if isinstance(value, int | float)},
        "solver": repr(SOLVER),
        "rows": rows,
    }
    write_json(args.out / "results.json", results)
    (args.out / "README.md").write_text(report(results))
    draw(pictures, args.out / "prior_and_decoder.png")
    print("\n" + report(results) + f"\nwrote {args.out}/prior_and_decoder.png, results.json and README.md")


# --- the networks ----------------------------------------------------------------------------------------------------


class Prior(nn.Module):
    """net(z_t, time, vector, context, context_mask): the last output of a causal transformer over the text's tokens,
    the text's CLIP embedding, the time, z_t, and a query.
    """

    def __init__(self, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.time, self.z, self.y = TimeEmbedding(WIDTH), nn.Linear(Z, WIDTH), nn.Linear(Z, WIDTH)
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
    net = UNet(channels, channels=32, multipliers=(1, 2), blocks=1, patch=patch, vector=Z, context=Z)
    return Encoding(net, {"z": Projected()})


def upsampler(condition: Condition, shape: tuple[int, ...]) -> nn.Module:
    """A U-Net that is told a small image, as this condition says."""
    told = TrainingData(torch.zeros(1, *shape), conditions=(condition,)).network_options
    return UNet(shape[0], channels=32, multipliers=(1, 2), blocks=1, patch=2, **told)


def embedded(clip: t2i.CLIP, x: Tensor) -> Tensor:
    """z of images: of unit variance in each entry, or near it."""
    with torch.no_grad():
        found = torch.cat([clip(part, torch.full((len(part),), 999 * SDE.t_min)) for part in x.split(500)])
    return Z**0.5 * F.normalize(found, dim=1)


def told(clip: t2i.CLIP, texts: list[str]) -> Tensor:
    """The CLIP embeddings of texts."""
    with torch.no_grad():
        return Z**0.5 * torch.cat([clip.told(texts[k : k + 500]) for k in range(0, len(texts), 500)])


def learned(
    x: Tensor, texts: list[str], z: Tensor, y: Tensor, args: argparse.Namespace, length: int = t2i.LENGTH
) -> dict[str, NetworkDenoiser]:  # fmt: skip
    """The five networks, trained or continued."""

    def prior() -> nn.Module:
        return Encoding(Prior(), {"text": Words(WIDTH, 2, length=length)})

    C, *_ = shape = tuple(x.shape[1:])
    of_text, of_z = (Captions(texts, length=length), Given(y)), (Raw("z", z),)
    made = {
        "prior": (prior, TrainingData(z, conditions=of_text)),
        "decoder": (lambda: decoder(C, 1), TrainingData(PLAIN.small(x), conditions=of_z, drop=0.1, seed=args.seed)),
        "direct": (lambda: decoder(C, 2), TrainingData(x, conditions=of_z, drop=0.1, seed=args.seed)),
        "upsampler": (lambda: upsampler(NOISY, shape), TrainingData(x, conditions=(NOISY,), seed=args.seed)),
        "plain upsampler": (lambda: upsampler(PLAIN, shape), TrainingData(x, conditions=(PLAIN,), seed=args.seed)),
    }
    found = {}
    for name, (make, data) in made.items():
        net, label = t2i.seeded(make, args.seed), lambda t: 999 * t
        if name == "prior":
            how: dict[str, Any] = {"steps": args.prior_steps, "lr": 1e-3, "weighting": uniform_in("x0")}
            denoiser: NetworkDenoiser = X0Denoiser(net, SDE, time=label)
        else:
            how = {"steps": args.train_steps, "lr": 2e-3, "weighting": uniform_in("v")}
            denoiser = VDenoiser(net, SDE, time=label)
        found[name] = t2i.trained(denoiser, data, args.models / name, batch_size=64, **how)
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


def measured(
    networks: Mapping[str, NetworkDenoiser], clip: t2i.CLIP, reader: t2i.Reader, own: tuple[Tensor, Tensor],
    args: argparse.Namespace,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:  # fmt: skip
    """The rows of the table, and what the picture shows."""
    features, reference = RandomFeatures(t2i.SHAPE), t2i.scenes(*own, 4000, args.seed + 2)[0]
    sets = {name: t2i.scenes(*own, args.images, args.seed + 3 + held, bool(held)) for held, name in enumerate(t2i.SETS)}
    facts = torch.cat([found for _, found in sets.values()])
    real = torch.cat([x for x, _ in sets.values()])
    texts = [t2i.sentences(row)[i % 2] for i, row in enumerate(facts.tolist())]
    cond = {"text": texts, "vector": told(clip, texts)}
    rows, made = [], {}

    def row(what: str, x: Tensor) -> None:
        right = (reader.facts(x) == facts).all(1)
        score = {name: mean_and_error(part) for name, part in zip(sets, right.chunk(2), strict=True)}
        distance = evaluate(x, reference, ["frechet"], features, floor=real, floors=20)["frechet"]
        rows.append({"what": what, **score, "frechet": [distance.value, distance.stderr]})
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)

    row("real scenes", real)
    for how in ("direct", "plain", *STRENGTHS):
        # z of the text, by the prior; and below of the scene itself.
        made[how] = cascade(networks, args, how, t2i.SHAPE).sample(len(texts), seed=args.seed, cond=cond)
        name = {"direct": "x of z at once", "plain": "no noise, ever"}.get(str(how), f"s = {how}")
        row(name, made[how].x.clamp(-1, 1))
    best = STRENGTHS[1]
    z = embedded(clip, real)
    whole = cascade(networks, args, best, t2i.SHAPE)
    row("z of the scene", whole.sample(len(z), seed=args.seed + 1, given=[z]).x.clamp(-1, 1))
    some = [0, args.images]
    varied = [whole.sample(SHOWN, seed=args.seed + 2, given=[z[i].expand(SHOWN, -1)]).x for i in some]
    w = torch.linspace(0, 1, SHOWN + 1)
    a, b = (z[i].expand(len(w), -1) for i in (1, 2))
    between = whole.sample(len(w), seed=[args.seed] * len(w), given=[interpolate(a, b, w)]).x
    return rows, {
        "texts": [texts[i] for i in (*range(SHOWN // 2), *range(args.images, args.images + SHOWN // 2))],
        "samples": {how: torch.cat([m[:SHOWN // 2], m[args.images : args.images + SHOWN // 2]])
                    for how, m in {"small": PLAIN.taken(made[best].made[1], t2i.SHAPE), "x": made[best].x,
                                   "direct": made["direct"].x}.items()},
        "varied": torch.cat([torch.cat([real[i : i + 1], x]) for i, x in zip(some, varied, strict=True)]),
        "between": torch.cat([real[1:2], between, real[2:3]]),
    }  # fmt: skip


def own_images(args: argparse.Namespace) -> None:
    """The same on a folder of images with captions: samples alone, for there is no reader of them."""
    if any(n % 2 for n in args.size):
        raise SystemExit(f"--size {args.size}: expected even numbers, half of which the decoder draws")
    data = training_data(args.data, captions=args.data, size=tuple(args.size), seed=args.seed, lazy=False)
    said, x = data.conditions[0], data.batch(torch.arange(len(data))).x
    clip = t2i.learned_clip(data, args).net
    texts = [own[0] for own in said.texts]
    networks = learned(x, texts, embedded(clip, x), told(clip, texts), args, said.length)
    texts = args.text or texts[:SHOWN]
    cond = {"text": texts, "vector": told(clip, texts)}
    found = cascade(networks, args, STRENGTHS[1], data.shape).sample(len(texts), seed=args.seed, cond=cond)
    direct = cascade(networks, args, "direct", data.shape).sample(len(texts), seed=args.seed, cond=cond)
    lines = torch.stack([PLAIN.taken(found.made[1], data.shape), found.x, direct.x], 1)
    t2i.draw_captioned(lines, texts, "decoder, upsampled, at once", args.out / "prior_and_decoder.png")


# --- what is written -------------------------------------------------------------------------------------------------


def report(results: Mapping[str, Any]) -> str:
    """The page."""
    about, seconds, sizes = results["environment"], results["seconds"], results["parameters"]
    rows = [
        [row["what"], *(f"{100 * row[name][0]:.1f} ({100 * row[name][1]:.1f})" for name in t2i.SETS),
         f"{row['frechet'][0]:.3f} ({row['frechet'][1]:.3f})"]
        for row in results["rows"]
    ]  # fmt: skip
    took = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items() if name != "measure")
    held = ", ".join(f"{name} {n:,}" for name, n in sizes.items())
    return f"""# Prior, decoder, upsampler

`{about["command"]}`: {about["device"]}, {about["threads"]} thread(s), float32; torch {about["torch"]};
scoresde {about["scoresde"]}, commit {about["commit"]}. Training, by its logs, {took}
of the wall clock; samples and scores {seconds["measure"]:.0f} s.

DALL-E 2 in small (`examples/prior_and_decoder.py`): of a text the CLIP embedding of an image of it, of that an image of
6 x 10 pixels, and of that one of 12 x 20. Parameters: {held};
{results["scenes"]} scenes, {results["prior_steps"]} steps of 64 for the prior and {results["train_steps"]} for each
other. A row is of {2 * results["images"]} captions, a sample each, {results["nfe"]} evaluations of
`{results["solver"]}` in each stage; the decoder's guidance has weight {results["guidance"]:g}.

{chr(10).join(table(["upsampler told", "seen, %", "held out, %", "Frechet distance"], rows))}

- Seen, held out: how often both digits and both shades are what the caption says, as in [text to
  image](../text_to_image/README.md); in brackets the standard error over captions.
- Frechet distance: in 64 random features, to 4000 real scenes; in brackets its standard error.
- x of z at once: a decoder of 12 x 20 pixels, without an upsampler. No noise, ever: an upsampler that was trained on
  small images as they are. s: the share of noise in the small image that the other one is told.
- z of the scene: the scene's own embedding in place of the prior's, s = {STRENGTHS[1]:g}; its row is of the scene's own
  caption.

![Samples of captions, variations of an image, and images between two](prior_and_decoder.png)
"""


def draw(pictures: Mapping[str, Any], path: Path) -> None:
    """Samples by text, variations, and images between two."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 4.4), width_ratios=[1, 1.6], layout="constrained")
    ways, texts = list(pictures["samples"]), pictures["texts"]
    axes[0].imshow(tile(torch.stack([pictures["samples"][way] for way in ways], 1).flatten(0, 1), len(ways)))
    high, wide = axes[0].get_ylim()[0] / len(texts), axes[0].get_xlim()[1] / len(ways)
    axes[0].set_yticks([high * (i + 0.5) for i in range(len(texts))], [t.replace(" of ", " of\n") for t in texts])
    axes[0].set_xticks([wide * (i + 0.5) for i in range(len(ways))], ["decoder", "upsampled", "x at once"])
    axes[0].set_title("samples of captions")
    wide_rows = SHOWN + 3
    blank = torch.full((1, *t2i.SHAPE), 1.0)
    varied = pictures["varied"].split(SHOWN + 1)
    rows = [torch.cat([row, *[blank] * (wide_rows - len(row))]) for row in varied] + [pictures["between"]]
    axes[1].imshow(tile(torch.cat(rows), wide_rows))
    high = axes[1].get_ylim()[0] / len(rows)
    axes[1].set_yticks(
        [high * (i + 0.5) for i in range(len(rows))], ["a scene and\nvariations"] * 2 + ["between the\nfirst and last"]
    )
    axes[1].set_xticks([])
    axes[1].set_title("of the embedding of a real scene (left; between: both ends)")
    for axis in axes:
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
