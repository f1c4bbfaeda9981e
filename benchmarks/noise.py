"""What noise costs: one generator for the batch, one for each sample, and counting, for whole batches of own streams.

    python benchmarks/noise.py

All take turns; medians, on a CPU thread of the time that it was at work. "A draw" is one z of the shape (streams
of events below 512 numbers draw several at a time, so that most of theirs are at hand); "a run" is
sample() with DDPM and 25 steps on a network that costs nothing, x_T and the seeds' derivation included. Written into
--out: README.md, results.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kept import synchronise
from overhead import SDE, Constant, timed

from scoresde import EpsDenoiser, sample
from scoresde.info import environment
from scoresde.noise import CounterNoise, GeneratorNoise, NoiseSource, SeededNoise, sample_seeds
from scoresde.report import table, write_json
from scoresde.solvers import DDPM

SHAPES = [(1, 3, 8, 8), (64, 3, 32, 32), (256, 1, 28, 28), (16, 3, 64, 64), (4, 3, 256, 256), (1000, 64), (10000, 2)]
KINDS = ("generator", "streams", "counting")


def sources(batch: int, device: torch.device) -> dict[str, NoiseSource]:
    seeds = sample_seeds(0, batch)
    generator = torch.Generator(device).manual_seed(0)
    return dict(
        zip(KINDS, (GeneratorNoise(generator), SeededNoise(seeds, device), CounterNoise(seeds, device)), strict=True)
    )


def runs(shape: tuple[int, ...], device: torch.device) -> dict[str, Callable[[], Any]]:
    denoiser = EpsDenoiser(Constant().eval(), SDE)
    how: dict[str, Callable[[], dict[str, Any]]] = {
        "generator": lambda: {"generator": torch.Generator(device).manual_seed(0)},
        "streams": lambda: {"seed": 0},
        "counting": lambda: {"noise": CounterNoise(sample_seeds(0, shape[0]))},
    }

    def run(kind: str) -> Callable[[], Any]:
        return lambda: sample(denoiser, shape, DDPM(), steps=25, device=device, **how[kind]())

    return {kind: run(kind) for kind in KINDS}


def measure(actions: dict[str, Callable[[], Any]], device: torch.device, turns: int) -> dict[str, list[float]]:
    """Milliseconds of each in every turn, after one that does not count."""
    clock = time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(turns + 1):
        for name, action in actions.items():
            taken = timed(action, device, clock) * 1e3
            if turn:
                times[name].append(taken)
    synchronise(device)
    return times


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=21)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shapes", nargs="+", help="64,3,32,32 say, in place of a list of common ones")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/noise"), help="folder of results")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    env = environment(args.device, torch.float32)
    shapes = [tuple(map(int, shape.split(","))) for shape in args.shapes] if args.shapes else SHAPES
    rows: dict[str, list[list[str]]] = {"A draw": [], "A run of 25 steps": []}
    record: dict[str, Any] = {"environment": env, "milliseconds": {title: {} for title in rows}}
    for shape in shapes:
        x = torch.empty(shape, device=device)
        draws = {kind: partial(source, 0, x) for kind, source in sources(len(x), device).items()}
        for title, actions in zip(rows, (draws, runs(shape, device)), strict=True):
            times = measure(actions, device, args.turns)
            middle = {name: statistics.median(taken) for name, taken in times.items()}
            record["milliseconds"][title][str(shape)] = {name: round(ms, 4) for name, ms in middle.items()}
            ratios = [
                statistics.median(a / b for a, b in zip(times["counting"], times[other], strict=True))
                for other in ("streams", "generator")
            ]
            rows[title].append(
                [str(shape), *(f"{middle[kind]:.3f}" for kind in KINDS), *(f"{ratio:.2f}" for ratio in ratios)]
            )
    lines = [
        "# What noise costs",
        "",
        f"`python {env['command']}`: {env['device']}, {env['threads']} thread(s), float32,",
    ]
    lines += [f"medians of {args.turns} turns, in milliseconds. torch {env['torch']}; commit {env['commit']}."]
    head = [
        "shape",
        "one generator",
        "a stream for each sample",
        "counting",
        "counting / streams",
        "counting / generator",
    ]
    for title, body in rows.items():
        lines += ["", f"## {title}", "", *table(head, body)]
    args.out.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines) + "\n"
    (args.out / "README.md").write_text(text)
    write_json(args.out / "results.json", record)
    print(text)


if __name__ == "__main__":
    main()
