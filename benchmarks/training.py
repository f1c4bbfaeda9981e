"""What the trainer costs beside a bare loop, and what a second process changes.

    python benchmarks/training.py

Throughput: the `Trainer` (data fetched, times and noise drawn, loss weighted, gradient clipped, weights averaged,
losses read at intervals) beside a loop of the same network that does forward, backward and AdamW's step on one batch
made beforehand, and nothing else. The two take turns, a few steps each; the ratio of their times is taken within each
turn, and shown with its median and quartiles, by the wall clock and by the processor's time (on a machine that is
shared, the latter tells more).

Processes: one process with the whole batch, and two on gloo with half of it each, are trained from the same seed; the
largest difference of their losses is shown, in float64 and in float32.
Written into --out: README.md, results.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from kept import synchronise
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.multiprocessing.spawn import start_processes
from tqdm import tqdm

from scoresde import VPSDE, NetworkDenoiser, VDenoiser
from scoresde.cli.models import parameters
from scoresde.info import environment
from scoresde.nn import UNet
from scoresde.report import table, write_json
from scoresde.training import TrainConfig, Trainer, start


@dataclass(frozen=True)
class Problem:
    """A network and the size of its images and batches."""

    name: str
    size: int
    batch: int
    options: dict[str, Any]

    def denoiser(self, device: torch.device | str = "cpu") -> NetworkDenoiser:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = UNet(image_channels=1, **self.options)
        net.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return VDenoiser(net, VPSDE(), time=lambda t: 999 * t)

    def data(self, items: int) -> Tensor:
        return torch.rand(items, 1, self.size, self.size, generator=torch.Generator().manual_seed(0)) * 2 - 1


PROBLEMS = [
    Problem("U-Net at 8 x 8", 8, 64, {"channels": 32, "multipliers": (1, 2), "blocks": 1}),
    Problem("U-Net at 32 x 32", 32, 8, {"channels": 32, "multipliers": (1, 2, 2), "blocks": 1}),
]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/training"), help="folder of results")
    parser.add_argument("--turns", type=int, default=12, help="turns of each (12)")
    parser.add_argument("--steps", type=int, default=10, help="steps a turn (10)")
    parser.add_argument("--batch", type=int, nargs="+", help="batch size of each network (64 8)")
    parser.add_argument("--process-steps", type=int, default=20, help="steps with one and two processes (20); 0: skip")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="of both loops")
    parser.add_argument("--compile", action="store_true", help="the network, in both loops")
    args = parser.parse_args(argv)
    batches = args.batch or [problem.batch for problem in PROBLEMS]
    if args.turns < 2:
        parser.error("--turns: expected at least 2, for their spread")
    if len(batches) != len(PROBLEMS):
        parser.error(f"--batch: expected {len(PROBLEMS)} numbers, one for each network")

    results: dict[str, Any] = {"environment": environment(args.device), "precision": args.precision}
    results |= {"compiled": args.compile, "turns": args.turns, "steps_a_turn": args.steps}
    problems = [replace(problem, batch=batch) for problem, batch in zip(PROBLEMS, batches, strict=True)]
    results["throughput"] = [throughput(problem, args) for problem in problems]
    if args.process_steps:
        results["processes"] = processes(problems[0], args.process_steps)
    write_json(args.out / "results.json", results)
    page = report(results)
    (args.out / "README.md").write_text(page)
    print(page)


# --- throughput ------------------------------------------------------------------------------------------------------


def bare_loop(problem: Problem, args: argparse.Namespace) -> Callable[[int], None]:
    """Forward, backward, AdamW (fused, as the trainer's, and several times as fast as torch's default on a CPU)."""
    net = problem.denoiser(args.device).net
    assert isinstance(net, torch.nn.Module)
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)
    run = torch.compile(net) if args.compile else net
    x = problem.data(problem.batch).to(args.device)
    time, target = torch.rand(problem.batch, device=args.device) * 999, torch.randn_like(x)
    device, half = torch.device(args.device).type, args.precision == "bfloat16"
    net.train()

    def loop(steps: int) -> None:
        for _ in range(steps):
            with torch.autocast(device, torch.bfloat16, enabled=half):
                out = run(x, time)
            optimiser.zero_grad(set_to_none=True)
            (out.float() - target).square().mean().backward()
            optimiser.step()

    return loop


def trainer_loop(problem: Problem, args: argparse.Namespace) -> Callable[[int], None]:
    """The same steps by the trainer."""
    config = TrainConfig(
        steps=1, batch_size=problem.batch, schedule="constant", precision=args.precision, compile=args.compile
    )
    trainer = Trainer(problem.denoiser(args.device), problem.data(20 * problem.batch), config)

    def loop(steps: int) -> None:
        trainer.config = replace(config, steps=trainer.step + steps)
        trainer.fit(progress=False)

    return loop


def throughput(problem: Problem, args: argparse.Namespace) -> dict[str, Any]:
    """Turns of the two loops, and the ratio of their times."""
    loops = {"bare": bare_loop(problem, args), "trainer": trainer_loop(problem, args)}
    wall: dict[str, list[float]] = {name: [] for name in loops}
    processor: dict[str, list[float]] = {name: [] for name in loops}
    for loop in loops.values():
        loop(3)  # warm up
    for turn in tqdm(range(args.turns), desc=problem.name):
        for name in sorted(loops, reverse=bool(turn % 2)):
            synchronise(args.device)
            begin, used = time.perf_counter(), time.process_time()
            loops[name](args.steps)
            synchronise(args.device)
            wall[name].append(time.perf_counter() - begin)
            processor[name].append(time.process_time() - used)
    found: dict[str, Any] = {
        "network": problem.name,
        "batch": problem.batch,
        "parameters": parameters(problem.denoiser()),
    }
    for clock, times in (("wall", wall), ("processor", processor)):
        ratios = [bare / ours for bare, ours in zip(times["bare"], times["trainer"], strict=True)]
        found[clock] = {
            "bare_items_per_second": round(problem.batch * args.steps / statistics.median(times["bare"]), 1),
            "trainer_items_per_second": round(problem.batch * args.steps / statistics.median(times["trainer"]), 1),
            "ratio": [round(q, 3) for q in statistics.quantiles(ratios, n=4)],
        }
    return found


# --- processes -------------------------------------------------------------------------------------------------------


def train_part(rank: int, world: int, port: int, problem: Problem, dtype: torch.dtype, steps: int, out: str) -> None:
    """One process of `world`, one thread each; rank 0 writes losses and seconds."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    with start("cpu"):
        denoiser = problem.denoiser()
        denoiser.net.to(dtype)  # type: ignore[attr-defined]
        config = TrainConfig(steps=steps, batch_size=2 * problem.batch, log_every=1, warmup=5, schedule="constant")
        trainer = Trainer(denoiser, problem.data(20 * problem.batch).to(dtype), config)
        begin = time.perf_counter()
        trainer.fit(progress=False)
        if rank == 0:
            losses = [loss for _, loss in trainer.losses]
            Path(out).write_text(json.dumps({"losses": losses, "seconds": time.perf_counter() - begin}))


def processes(problem: Problem, steps: int) -> dict[str, Any]:
    """The doubled batch in one process and in two."""
    found: dict[str, Any] = {"network": problem.name, "batch": 2 * problem.batch, "steps": steps}
    for dtype in (torch.float64, torch.float32):
        runs = {}
        for world in (1, 2):
            # As torchrun does, the parent holds the store at which they meet.
            store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            with tempfile.TemporaryDirectory() as folder:
                out = f"{folder}/run.json"
                words = (world, store.port, problem, dtype, steps, out)
                start_processes(train_part, words, nprocs=world, start_method="spawn")
                runs[world] = json.loads(Path(out).read_text())
        pairs = zip(runs[1]["losses"], runs[2]["losses"], strict=True)
        found[str(dtype).removeprefix("torch.")] = {
            "largest_loss_difference": float(f"{max(abs(a - b) for a, b in pairs):.2g}"),
            "last_loss": round(runs[1]["losses"][-1], 6),
            "seconds": {f"{world} of one thread": round(run["seconds"], 2) for world, run in runs.items()},
        }
    return found


# --- the page --------------------------------------------------------------------------------------------------------


def report(results: dict[str, Any]) -> str:
    where, rows = results["environment"], []
    head = ["network", "batch", "parameters", "bare, items/s", "trainer, items/s"]
    for row in results["throughput"]:
        wall, processor = row["wall"], row["processor"]
        speeds = [wall["bare_items_per_second"], wall["trainer_items_per_second"]]
        rows.append([row["network"], row["batch"], f"{row['parameters']:,}", *speeds, _ratio(wall), _ratio(processor)])
    lines = [
        "# The trainer beside a bare loop",
        "",
        f"`{where['command']}`, {where['device']}, {where['threads']} threads, torch {where['torch']}, "
        f"{results['precision']}{', compiled' if results['compiled'] else ''}, commit {where['commit']}. A bare loop "
        "does forward, backward and AdamW's step on one batch. Ratio: its time over the trainer's in the same turn, "
        f"median (quartiles) of {results['turns']} turns of {results['steps_a_turn']} steps.",
        "",
        *table([*head, "ratio, wall clock", "ratio, processor"], rows),
    ]
    if found := results.get("processes"):
        head = ["dtype", "largest difference of the losses", "last loss", "seconds, one", "seconds, two"]
        runs = [(dtype, found[dtype]) for dtype in ("float64", "float32")]
        rows = [[dtype, r["largest_loss_difference"], r["last_loss"], *r["seconds"].values()] for dtype, r in runs]
        lines += [
            "",
            f"One process and two (gloo, one thread each) with the same batch of {found['batch']}, {found['network']}, "
            f"{found['steps']} steps:",
            "",
            *table(head, rows),
        ]
    return "\n".join(lines) + "\n"


def _ratio(row: dict[str, Any]) -> str:
    low, middle, high = row["ratio"]
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


if __name__ == "__main__":
    main()
