"""Letters from masks: a masked diffusion of text (Austin et al., 2021; Sahoo et al., 2024) beside n-grams.

    python examples/masked_text.py            --help

A letter is masked, once and for good, by time t with probability t. A network of convolutions says what each mask may
hide, given the letters that are seen, and the bound is its cross-entropy, over t. Two texts: English, here the pages of
reference of Python itself, in 26 letters and the blank; and letters drawn from the trigram of that text, whose
log-probability is known. Windows of L letters begin anywhere, without what was before them, for the n-grams too that
stand beside.

Writes masked_text.png, results.json and README.md into --out, and the networks, from which a killed run goes on.
"""

from __future__ import annotations

import argparse
import math
import re
import time
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from scoresde import elbo, sample
from scoresde.categorical import Ancestral, CategoricalDenoiser
from scoresde.info import environment
from scoresde.report import table, write_json
from scoresde.training import CategoricalConfig, TrainConfig, Trainer

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LETTERS = " abcdefghijklmnopqrstuvwxyz"
K = len(LETTERS)
NET = {"image_channels": K + 1, "dims": 1, "channels": 64, "multipliers": [1, 1], "blocks": 1, "attention": []}
MODEL = CategoricalConfig("absorbing", {"states": K}, "unet", None, NET, time_scale=999.0)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/masked_text"), help="of results (runs/masked_text)")
    parser.add_argument("--data", type=Path, help="a text file (Python's reference pages)")
    parser.add_argument("--length", type=int, default=32, help="letters of a window (32)")
    parser.add_argument("--train-steps", type=int, default=2500, help="training steps of each network (2500)")
    parser.add_argument("--windows", type=int, default=200, help="held-out windows that are measured (200)")
    parser.add_argument("--grams", type=int, default=5, help="n-grams to compare with, up to n (5)")
    parser.add_argument("--texts", type=int, default=20_000, help="windows that the trigram draws to learn (20000)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    text = letters(args.data)
    cut = len(text) * 9 // 10
    known, held = text[:cut], windows(text[cut:], args.length)[: args.windows]
    trigram = Ngram(known, 3)
    drawn = trigram.draw(args.texts + args.windows, args.length, torch.Generator().manual_seed(args.seed))
    english = trained(windows(known, args.length), args.out / "english", args)
    source = trained(drawn[args.windows :], args.out / "trigram", args)
    exact = trigram.log_prob(drawn[: args.windows])
    bits = {
        "english": {"masked model": bound(english, held, args)}
        | {f"{n}-gram": mean_and_error(Ngram(known, n).log_prob(held), args.length) for n in range(1, args.grams + 1)},
        "trigram": {
            "masked model": bound(source, drawn[: args.windows], args),
            "exact": mean_and_error(exact, args.length),
        },
    }
    steps = [args.length // 8, args.length // 2, 4 * args.length]
    shown = {str(n): words(sample(english, (4, args.length), Ancestral(), steps=n, seed=args.seed).x) for n in steps}
    results = {
        "environment": environment(),
        "seconds": round(time.perf_counter() - start, 1),
        **{name: getattr(args, name) for name in ("length", "train_steps", "windows", "texts", "seed")},
        "bits": bits,
        "samples": shown,
    }
    write_json(args.out / "results.json", results)
    (args.out / "README.md").write_text(report(results))
    draw(results, args.out / "masked_text.png")
    print(report(results))


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
    config = TrainConfig(steps=args.train_steps, batch_size=64, lr=2e-3, seed=args.seed, threads=1, ema_decay=0.998)
    return Trainer(MODEL.build(args.seed), data, config, folder=folder, model=MODEL).fit().ema


def bound(denoiser: CategoricalDenoiser, x: Tensor, args: argparse.Namespace) -> list[float]:
    """Of the model, by `mean_and_error`: an upper bound on the bits."""
    return mean_and_error(elbo(denoiser, x, draws=32, seed=args.seed).value, x.shape[1])


def mean_and_error(log_prob: Tensor, length: int) -> list[float]:
    """Bits a letter, and their standard error over the windows."""
    bits = -log_prob / (length * math.log(2))
    return [float(bits.mean()), float(bits.std() / len(bits) ** 0.5)]


def report(results: dict) -> str:
    """The numbers, as Markdown."""
    about, bits = results["environment"], results["bits"]
    rows = [[text, name, "{:.3f} ({:.3f})".format(*found)] for text, of in bits.items() for name, found in of.items()]
    drawn = [f"{steps:>4} steps  {line}" for steps, lines in results["samples"].items() for line in lines]
    return f"""# Letters from masks

`{about["command"]}`: {about["device"]}, {about["threads"]} thread(s), {about["dtype"]};
torch {about["torch"]}, scoresde {about["scoresde"]}, commit {about["commit"]}; {results["seconds"]:.0f} s (less where
networks were trained before).

Bits a letter of {results["windows"]} held-out windows of {results["length"]} letters, and the standard error over them:
of networks trained for {results["train_steps"]} steps an upper bound, of n-grams of the same text and of the trigram
that drew the second text exact.

{chr(10).join(table(["text", "", "bits a letter"], rows))}

What the network of English draws, in {", ".join(results["samples"])} steps:

```text
{chr(10).join(drawn)}
```

![Bits a letter of the model and of n-grams](masked_text.png)
"""


def draw(results: dict, path: Path) -> None:
    """Bits a letter of n-grams by n, with the model's as a line, for both texts."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    english, source = results["bits"]["english"], results["bits"]["trigram"]
    grams = [name for name in english if name.endswith("gram")]
    axis.plot([int(name[0]) for name in grams], [english[name][0] for name in grams], "o-", label="English: n-grams")
    axis.axhline(english["masked model"][0], color="C0", ls="--", label="English: masked model, a bound")
    axis.axhline(source["exact"][0], color="C1", label="letters of a trigram: exact")
    axis.axhline(source["masked model"][0], color="C1", ls="--", label="letters of a trigram: masked model, a bound")
    axis.set(xlabel="n", ylabel="bits a letter")
    axis.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
