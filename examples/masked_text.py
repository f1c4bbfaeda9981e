"""Letters from masks: a masked diffusion of text (Austin et al., 2021; Sahoo et al., 2024) beside n-grams.

    python examples/masked_text.py            --help

A letter is masked, once and for good, by time t with probability t. A network of convolutions says what each mask may
hide, given the letters that are seen, and the bound is its cross-entropy, over t. Two texts: English, here the pages of
reference of Python itself, in 26 letters and the blank; and letters drawn from the trigram of that text, whose
log-probability is known. Windows of L letters begin anywhere, without what was before them, for the n-grams too that
stand beside.

Writes masked_text.png, results.json and README.md into --out; the networks into --models, from which a killed run goes
on.
"""

from __future__ import annotations

import argparse
import math
import re
import time
from pathlib import Path

import torch
from shared import BLUE, ORANGE, arguments, cell, fitted, mean_and_error, picture, place, publish, ran
from torch import Tensor

from scoresde import elbo, sample
from scoresde.categorical import Ancestral, CategoricalDenoiser
from scoresde.report import table
from scoresde.training import CategoricalConfig, TrainConfig, Trainer

LETTERS = " abcdefghijklmnopqrstuvwxyz"
K = len(LETTERS)
NET = {"image_channels": K + 1, "dims": 1, "channels": 64, "multipliers": [1, 1], "blocks": 1, "attention": []}
MODEL = CategoricalConfig("absorbing", {"states": K}, "unet", None, NET, time_scale=999.0)


def main(argv: list[str] | None = None) -> None:
    parser = arguments(
        __doc__,
        "masked_text",
        models=(Path("runs/masked_text"), "folder of the networks"),
        data=(Path, "a text file, in place of Python's pages"),
        length=(32, "letters of a window"),
        train_steps=(2500, "training steps of each network"),
        windows=(200, "held-out windows that are measured"),
        grams=(5, "n-grams to compare with, up to this n"),
        texts=(20_000, "windows that the trigram draws to learn from"),
    )
    args, start = parser.parse_args(argv), time.perf_counter()
    text, L = letters(args.data), args.length
    cut = len(text) * 9 // 10
    known, held = text[:cut], windows(text[cut:], L)[: args.windows]
    trigram = Ngram(known, 3)
    drawn = trigram.draw(args.texts + args.windows, L, torch.Generator().manual_seed(args.seed))
    english = trained(windows(known, L), args.models / "english", args)
    source = trained(drawn[args.windows :], args.models / "trigram", args)
    grams = {f"{n}-gram": bits(Ngram(known, n).log_prob(held), L) for n in range(1, args.grams + 1)}
    found = {
        "English": {"masked model, a bound": bound(english, held, args)} | grams,
        "trigram": {
            "masked model, a bound": bound(source, drawn[: args.windows], args),
            "exact": bits(trigram.log_prob(drawn[: args.windows]), L),
        },
    }
    shown = {
        str(n): words(sample(english, (4, L), Ancestral(), steps=n, seed=args.seed).x) for n in (L // 8, L // 2, 4 * L)
    }
    results = {"bits": found, "drawn": shown, **ran(args.models, {"english": english, "trigram": source}, start)}
    publish(args, "masked_text", results, report, lambda path: draw(found, path))


def letters(path: Path | None) -> Tensor:
    """The text as states: in small letters, all else a blank, and one where there are several."""
    if path is None:
        from pydoc_data.topics import topics

        text = " ".join(topics[name] for name in sorted(topics))
    else:
        text = path.read_text()
    plain = re.sub(r"[^a-z]+", " ", text.lower())
    return torch.tensor([LETTERS.index(letter) for letter in plain])


def windows(text: Tensor, length: int) -> Tensor:
    """One after the other, (N, length)."""
    return text[: len(text) // length * length].reshape(-1, length)


def words(x: Tensor) -> list[str]:
    """Windows as text."""
    return ["".join(LETTERS[i] for i in row) for row in x.tolist()]


class Ngram:
    """Counts of a text, interpolated down to one letter by Witten and Bell (1991): p_n = (c + d p_{n-1}) / (N + d) with
    d different letters after a context, N in all; a window's first letters have the contexts that there are.
    """

    def __init__(self, text: Tensor, n: int) -> None:
        self.n, p = n, torch.full((K,), 1 / K, dtype=torch.float64)
        self.p = []
        for k in range(1, n + 1):
            code = sum(text[i : len(text) - k + 1 + i] * K ** (k - 1 - i) for i in range(k))
            assert isinstance(code, Tensor)
            counts = torch.bincount(code, minlength=K**k).reshape(-1, K).double()
            kinds = (counts > 0).sum(1, keepdim=True)
            lower = p.expand(len(counts), K) if k == 1 else p.repeat(len(counts) // len(p), 1)
            total = counts.sum(1, keepdim=True) + kinds
            p = torch.where(total > 0, (counts + kinds * lower) / total.clamp(min=1), lower)
            self.p.append(p)

    def after(self, x: Tensor, i: int) -> Tensor:
        """The law of letter i of windows, (B, K)."""
        k = min(i, self.n - 1)
        context = sum((x[:, i - k + j] * K ** (k - 1 - j) for j in range(k)), torch.zeros(len(x), dtype=torch.long))
        return self.p[k][context]

    def log_prob(self, x: Tensor) -> Tensor:
        """log p of windows, (B,)."""
        each = [self.after(x, i).gather(1, x[:, i : i + 1]) for i in range(x.shape[1])]
        return torch.cat(each, 1).log().sum(1)

    def draw(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        """Windows of that law."""
        x = torch.zeros(count, length, dtype=torch.long)
        for i in range(length):
            x[:, i] = torch.multinomial(self.after(x, i), 1, generator=generator)[:, 0]
        return x


def trained(data: Tensor, folder: Path, args: argparse.Namespace) -> CategoricalDenoiser:
    """The denoiser, trained or continued in its folder, with averaged weights."""
    config = TrainConfig(args.train_steps, 64, 3e-3, ema_decay=0.99, seed=args.seed, threads=1)
    found: CategoricalDenoiser = fitted(Trainer, MODEL.build(args.seed), data, config, folder, model=MODEL).ema
    return found


def bound(denoiser: CategoricalDenoiser, x: Tensor, args: argparse.Namespace) -> list[float]:
    """Of the model, an upper bound on the bits."""
    return bits(elbo(denoiser, x, draws=32, seed=args.seed).value, x.shape[1])


def bits(log_prob: Tensor, length: int) -> list[float]:
    """Bits a letter, and their standard error over the windows."""
    return mean_and_error(-log_prob / (length * math.log(2)))


def report(results: dict) -> str:
    """The numbers, as Markdown."""
    rows = [[text, name, cell(value, 3)] for text, of in results["bits"].items() for name, value in of.items()]
    lines = [f"{steps:>4} steps  {line}" for steps, lines in results["drawn"].items() for line in lines]
    return f"""# Letters from masks

{place(results)}

Bits a letter of {results["windows"]} held-out windows of {results["length"]} letters, and the standard error over them:
of networks trained for {results["train_steps"]} steps an upper bound, of n-grams of the same text and of the trigram
that drew the second text exact.

{chr(10).join(table(["text", "", "bits a letter"], rows))}

What the network of English draws:

```text
{chr(10).join(lines)}
```

![Bits a letter of the models and of n-grams](masked_text.png)
"""


def draw(found: dict, path: Path) -> None:
    """Bits a letter of n-grams by n, with the models' as lines."""
    english, source = found["English"], found["trigram"]
    grams = [name for name in english if name.endswith("gram")]
    with picture(path, 7, 4) as figure:
        axis = figure.subplots()
        axis.plot([int(name[0]) for name in grams], [english[name][0] for name in grams], "o-", c=BLUE, label="n-grams")
        axis.axhline(english["masked model, a bound"][0], c=BLUE, ls="--", label="masked model, a bound")
        axis.axhline(source["exact"][0], c=ORANGE, label="letters of a trigram: exact")
        axis.axhline(source["masked model, a bound"][0], c=ORANGE, ls="--", label="masked model of these, a bound")
        axis.set(xlabel="n", ylabel="bits a letter", xticks=[int(name[0]) for name in grams])
        axis.legend()


if __name__ == "__main__":
    main()
