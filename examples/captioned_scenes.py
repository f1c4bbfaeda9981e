"""Scenes of two real digits with captions, and an exam of what is drawn of these: what text_to_image.py and
prior_and_decoder.py have in common beside their networks.

A scene is two of scikit-learn's digits on a ground of 12 x 20 pixels, each somewhere on its side, light or dark: "a
three left of a dark seven", or "a dark seven right of a three". Of the 100 pairs (left digit, right digit) 20 are held
out of training; in them each digit is twice on either side. A reader that was trained on scenes of other digits' images
says which digits a scene has, and of what shade.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from shared import arguments, cell, frechet, mean_and_error, seeded, trained
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde import VPSDE, X0Denoiser
from scoresde.data import Captions, Given, TrainingData, digits, training_data
from scoresde.denoiser import NetworkDenoiser
from scoresde.metrics import RandomFeatures
from scoresde.nn import ByteTokens, WordTokens

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HELD_OUT = {(a, (3 * a + k) % 10) for a in range(10) for k in (1, 4)}
SHAPE, SIDE, DARK = (1, 12, 20), 10, 0.45
READER_DIGITS = 700  # of 1797
SETS = ("seen", "held out")
HEADS = ("seen, %", "held out, %", "seen, of real scenes'", "one digit, %", "Frechet distance")
LEGEND = """
- Seen, held out: how often both digits and both shades are what the caption says, as read by a classifier that was
  trained on scenes of other digits' images. In brackets the standard error over captions. Chance is 0.25 %, the
  ceiling what the reader finds in real scenes, which it never saw.
- One digit: how often a digit is the caption's, by its side, of seen and of held-out pairs.
- Frechet distance: in 64 random features, to 4000 real scenes; in brackets its standard error.""".strip()


def options(about: str | None, name: str, **own: tuple[Any, str]) -> argparse.ArgumentParser:
    """The arguments of a program on captioned scenes, or captioned images of one's own, and its own."""
    return arguments(
        about,
        name,
        models=(Path("runs/text_to_image"), "folder of the runs"),
        data=(Path, "a folder of images with captions, instead of scenes of digits"),
        size=((32, 32), "to make of these images"),
        text=([str], "texts that are drawn then, the first captions if there are none"),
        scenes=(12_000, "to train on"),
        tokens=("words", "of captions: words, which need scoresde[text], or bytes, which take longer to learn"),
        clip_steps=(3000, "of CLIP, 128 scenes a step"),
        reader_steps=(2400, "of the reader, 64 scenes a step"),
        images=(400, "for each row, of seen and of held-out pairs"),
        nfe=(20, "evaluations of a sample of a model"),
        **own,
    )


def captioned(args: argparse.Namespace, drop: float = 0.0) -> TrainingData:
    """What is learned: scenes of seen pairs with their two captions; or a folder of images with captions, --data."""
    if args.data is not None:
        how = {"size": tuple(args.size), "drop": drop, "seed": args.seed}
        return training_data(args.data, captions=args.data, tokenizer=args.tokens, **how)
    x, facts = scenes(*halves()[0], args.scenes, args.seed, held_out=False)
    texts = [sentences(row) for row in facts.tolist()]
    tokenizer = (
        WordTokens.trained([text for both in texts for text in both]) if args.tokens == "words" else ByteTokens()
    )
    return TrainingData(x, conditions=(Captions(texts, tokenizer),), drop=drop, seed=args.seed)


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


# --- the exam --------------------------------------------------------------------------------------------------------


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


def learned_reader(others: tuple[Tensor, Tensor], args: argparse.Namespace) -> NetworkDenoiser:
    """The reader, trained or continued on scenes of these digits, as what a `Trainer` takes."""
    x, facts = scenes(*others, args.scenes, args.seed + 1)
    data = TrainingData(x, conditions=(Given(facts.float()),), seed=args.seed)
    reader = X0Denoiser(seeded(Reader, args.seed), VPSDE())
    how: dict[str, Any] = {"loss": reading, "checkpoint_every": 200}
    return trained(reader, data, args.models / "reader", args.reader_steps, args.seed, **how)


class Exam:
    """Captions of seen pairs of digits and as many of held-out ones, --images each, and what a sample of each is worth.

    Attributes:
        texts: the captions, those of seen pairs first.
        real, facts: real scenes of which these could be, and what is in them.
        reader: trained or continued.
        rows: of the table: what was measured so far.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        own, others = halves()
        sets = [scenes(*own, args.images, args.seed + 3 + held, bool(held)) for held in (0, 1)]
        self.real, self.facts = (torch.cat(part) for part in zip(*sets, strict=True))
        self.texts = [sentences(row)[i % 2] for i, row in enumerate(self.facts.tolist())]
        self.n, self.reader, self.features = args.images, learned_reader(others, args), RandomFeatures(SHAPE)
        self.reference = scenes(*own, 4000, args.seed + 2)[0]
        self.rows: list[dict[str, Any]] = []

    def some(self, k: int) -> list[int]:
        """The places of the first k captions of seen pairs, and of the first k of held-out ones."""
        return [i for first in (0, self.n) for i in range(first, first + min(k, self.n))]

    def measure(self, x: Tensor, **what: Any) -> None:
        """A row of `what` and means with standard errors: of each half, how often all four facts are the caption's, and
        how often a digit; and the Frechet distance of all to real scenes.
        """
        found = {}
        for name, right in zip(SETS, (self.reader.net.facts(x) == self.facts).chunk(2), strict=True):
            found[name] = mean_and_error(right.all(1))
            found[f"{name}, a digit"] = mean_and_error(right[:, ::2].double().mean(1))
        distance = frechet({"x": x}, self.reference, self.real, self.features)["x"]
        self.rows.append({**what, **found, "frechet": distance})
        print("  ".join(f"{key} {value}" for key, value in self.rows[-1].items()), flush=True)


def cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Those of each row under HEADS; the first is of real scenes."""
    ceiling = max(rows[0]["seen"][0], 1e-9)
    return [
        [*(cell(row[name], 1, factor=100) for name in SETS), f"{100 * row['seen'][0] / ceiling:.0f} %",
         ", ".join(f"{100 * row[f'{name}, a digit'][0]:.1f}" for name in SETS), cell(row["frechet"], 3)]
        for row in rows
    ]  # fmt: skip
