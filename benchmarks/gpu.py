"""What sampling and training cost on a GPU beside the bare network: one command of at most eight minutes.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --device cpu --small       # a trial of the program itself, in seconds; no result
    python benchmarks/gpu.py --breaks                   # instead: every table compiled whole, on a CPU, in minutes

Sampling: the seconds of a run by DPM-Solver++ (2M), over those of as many calls of the bare network, in the same mode.
Eager is one call after the other; captured is one CUDA graph, `Captured` beside a graph of the bare calls; compiled is
torch.compile of the network, in both, at one batch each. Networks of 1, 56 and 675 million parameters, random weights
in bfloat16, the state in float32, at batches of 1, 64 and 512. Both take turns; the ratio is the median of the turns'.
diffusers' loop of the same solver, where it is installed, drives the same network, eager.

Syncs: the loop and the graph's launch run under `torch.cuda.set_sync_debug_mode("error")`, which refuses whatever would
wait for the device.

Training: the `Trainer` beside a bare loop (benchmarks/training.py), the U-Net of the 32-pixel preset, bfloat16 and
compiled, as a share of the bare loop's items per second; floating-point operations as torch counts them.

What there was no time, memory, package or device for is said in place of its number. Written into --out: README.md,
results.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import training
from kept import synchronise
from peers import installed
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from scoresde import VPSDE, Grid, NetworkDenoiser, VDenoiser
from scoresde.compiled import SamplerModule
from scoresde.info import environment
from scoresde.nn import DiT, SongUNet, UNet
from scoresde.report import table, write_json
from scoresde.solvers import Captured, DPMSolverPP, Solver, available
from scoresde.solvers.captured import recorded

SDE, SOLVER = VPSDE(), DPMSolverPP()
Run = Callable[[], Any]


@dataclass(frozen=True)
class Network:
    """A network of random weights, made by `make`, and the shape of what it is given."""

    name: str
    event: tuple[int, ...]
    make: Callable[[], nn.Module]
    compiled_at: int

    def on(self, device: str, dtype: torch.dtype) -> nn.Module:
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(0)
            net = self.make()
            for parameter in net.parameters():  # last layers start at zero: their products would be faster than others
                parameter.data.normal_(std=0.02)
        return net.to(dtype).eval().requires_grad_(False)


NETWORKS = [
    Network("UNet", (1, 32, 32), UNet, 64),
    Network("SongUNet", (3, 32, 32), lambda: SongUNet(channels=128, multipliers=(2, 2, 2)), 64),
    Network("DiT-XL/2", (4, 32, 32), lambda: DiT(image_channels=4, patch=2, width=1152, depth=28, heads=16), 64),
]
SMALL = [
    Network("UNet", (1, 8, 8), lambda: UNet(channels=8, multipliers=(1,), blocks=1), 2),
    Network("DiT", (1, 8, 8), lambda: DiT(patch=4, width=16, depth=1, heads=2), 2),
]


class Budget:
    """Seconds that are left."""

    def __init__(self, seconds: float) -> None:
        self.end = time.perf_counter() + seconds

    @property
    def left(self) -> float:
        return self.end - time.perf_counter()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu"), help="folder of results")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny networks and batches: does the program run?")
    parser.add_argument("--breaks", action="store_true", help="compile every table whole instead")
    parser.add_argument("--steps", type=int, default=10, help="evaluations of a run (10)")
    parser.add_argument("--turns", type=int, default=7, help="turns of each, at most (7)")
    parser.add_argument("--minutes", type=float, default=7.5, help="after which no part is begun (7.5)")
    parser.add_argument("--no-compile", action="store_true", help="no torch.compile")
    args = parser.parse_args(argv)
    if args.breaks:
        print(breaks())
        return
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; --device cpu --small tries the program, and measures nothing of a GPU")
    if args.small:
        args.steps, args.turns, args.no_compile = 2, 2, True
    budget = Budget(60 * args.minutes)
    results: dict[str, Any] = {"environment": environment(args.device, torch.bfloat16), "steps": args.steps}
    results["small"] = args.small
    # Training last but with its time kept free: sampling takes what there is.
    kept_free = 0.0 if args.small else 100.0
    results["sampling"] = [
        row
        for network in (SMALL if args.small else NETWORKS)
        for row in sampling(network, (1, 2) if args.small else (1, 64, 512), args, budget, kept_free)
    ]
    results["training"] = trained(args, budget)
    write_json(args.out / "results.json", results)
    page = report(results)
    (args.out / "README.md").write_text(page)
    print(page)


# --- sampling --------------------------------------------------------------------------------------------------------


def sampling(
    network: Network, batches: tuple[int, ...], args: argparse.Namespace, budget: Budget, kept_free: float
) -> list[dict[str, Any]]:
    """A row for each batch and mode."""
    net = network.on(args.device, torch.bfloat16)
    modes: list[tuple[str, int]] = [(mode, batch) for batch in batches for mode in ("eager", "captured")]
    if not args.no_compile:
        modes += [("compiled", network.compiled_at)]
    rows = []
    for mode, batch in modes:
        row: dict[str, Any] = {"network": network.name, "parameters": sum(p.numel() for p in net.parameters())}
        row |= {"batch": batch, "mode": mode}
        if mode == "captured" and torch.device(args.device).type != "cuda":
            row["lacks"] = "no CUDA graphs on this device"
        elif budget.left < kept_free + 5:
            row["lacks"] = "no time left"
        else:
            try:
                row |= cell(net, (batch, *network.event), mode, args, min(25.0, budget.left - kept_free))
            except torch.cuda.OutOfMemoryError:
                row["lacks"] = "not enough memory"
        rows.append(row)
        if torch.device(args.device).type == "cuda":
            torch.cuda.empty_cache()
    return rows


def cell(net: nn.Module, shape: tuple[int, ...], mode: str, args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Ours, the bare network and the peer in turns."""
    called = torch.compile(net) if mode == "compiled" else net
    denoiser = VDenoiser(Held(called, net), SDE, time=lambda t: 999 * t)
    grid = SOLVER.grid(SDE, args.steps)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(args.device)
    runs: dict[str, Run] = {"bare": bare(called, x, grid), "ours": ours(denoiser, x, grid, SOLVER)}
    if mode == "captured":
        launch = recorded(runs["bare"], x.device)
        runs = {"bare": lambda: launch(lambda: None), "ours": ours(denoiser, x, grid, Captured(SOLVER))}
    lacks: dict[str, str] = {}
    if mode == "eager" and installed("diffusers"):
        runs["diffusers"] = by_diffusers(net, x, args.steps)
    elif mode == "eager":
        lacks["diffusers"] = "not installed"
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.no_grad():
        for run in runs.values():
            run()
            run()
        begin = time.perf_counter()
        for turn in range(args.turns):
            if turn >= 2 and (time.perf_counter() - begin) * (turn + 1) / turn > seconds:
                break
            for name in sorted(runs, reverse=bool(turn % 2)):
                times[name].append(timed(runs[name], args.device))
        waits = syncs(runs["ours"], args.device)
    evaluations = SOLVER.evaluations(grid) or args.steps
    found: dict[str, Any] = {"turns": len(times["ours"]), "syncs": waits, **({"missing": lacks} if lacks else {})}
    found["milliseconds_an_evaluation"] = {
        name: float(f"{1e3 * statistics.median(own) / evaluations:.4g}") for name, own in times.items()
    }
    for name in times.keys() - {"bare"}:
        ratios = [own / bare for own, bare in zip(times[name], times["bare"], strict=True)]
        found[f"ratio_{name}"] = [round(q, 4) for q in statistics.quantiles(ratios, n=4, method="inclusive")]
    return found


class Held(nn.Module):
    """A compiled network, with the parameters and dtype of the network that it was made of."""

    def __init__(self, called: Any, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self._called = [called]  # not a module of its own: the parameters are those of net

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self._called[0](x, t)
        return out


def timed(run: Run, device: str) -> float:
    synchronise(device)
    begin = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - begin


def ours(denoiser: NetworkDenoiser, x: Tensor, grid: Grid, solver: Solver) -> Run:
    def run() -> Tensor:
        *_, end = solver.iterate(denoiser, x, grid)
        return end.x

    return run


def bare(net: Callable[..., Tensor], x: Tensor, grid: Grid) -> Run:
    """As many calls of the network, on its own input and with its labels made beforehand."""
    seen, labels = x.bfloat16(), [torch.full((len(x),), 999 * t, device=x.device) for t in grid.times[:-1].tolist()]

    def run() -> Tensor:
        for label in labels:
            out = net(seen, label)
        return out

    return run


def by_diffusers(net: nn.Module, x: Tensor, steps: int) -> Run:
    """The documented loop around DPMSolverMultistepScheduler, of the same order."""
    import diffusers

    scheduler = diffusers.DPMSolverMultistepScheduler(prediction_type="v_prediction")

    def run() -> Tensor:
        scheduler.set_timesteps(steps, device=x.device)
        y = x
        for t in scheduler.timesteps:
            y = scheduler.step(net(y.bfloat16(), t.float().expand(len(x))).float(), t, y).prev_sample
        return y

    return run


def syncs(run: Run, device: str) -> str:
    """What waits for the device in a run, by CUDA's own debug mode."""
    if torch.device(device).type != "cuda":
        return "no CUDA"
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "0"


# --- training --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preset(training.Problem):
    """The preset of that size."""

    def denoiser(self, device: torch.device | str = "cpu") -> NetworkDenoiser:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = UNet.preset(self.size, **self.options)
        net.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return VDenoiser(net, SDE, time=lambda t: 999 * t)

    def data(self, items: int) -> Tensor:
        channels = 3 if self.size >= 32 else 1
        return torch.rand(items, channels, self.size, self.size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def trained(args: argparse.Namespace, budget: Budget) -> dict[str, Any]:
    """The trainer beside the bare loop."""
    if budget.left < 5:
        return {"lacks": "no time left"}
    problem = Preset("U-Net 8", 8, 4, {}) if args.small else Preset("U-Net 32", 32, 128, {})
    steps = 2 if args.small else 10
    how = argparse.Namespace(
        device=args.device, precision="bfloat16", compile=not args.no_compile, turns=3, steps=steps
    )
    try:
        found = training.throughput(problem, how)
    except torch.cuda.OutOfMemoryError:
        return {"lacks": "not enough memory"}
    flops = operations(problem)
    speeds = {name: found["wall"][f"{name}_items_per_second"] for name in ("bare", "trainer")}
    tera = {name: float(f"{flops * speed / 1e12:.4g}") for name, speed in speeds.items()}
    return {**found, "compiled": how.compile, "gflop_an_item": float(f"{flops / 1e9:.4g}"), "tflop_per_second": tera}


def operations(problem: training.Problem) -> int:
    """Floating-point operations of forward and backward on one item, a product and a sum being two."""
    net = problem.denoiser("meta").net
    assert isinstance(net, nn.Module)
    with FlopCounterMode(display=False) as counter:
        net(problem.data(1).to("meta"), torch.empty(1, device="meta")).sum().backward()
    return int(counter.get_total_flops())


# --- graph breaks ----------------------------------------------------------------------------------------------------


def breaks() -> str:
    """Every table compiled with fullgraph=True, which refuses a graph break, and its difference from the same module as
    it is.
    """
    layer = nn.Linear(4, 4).requires_grad_(False)
    denoiser = VDenoiser(Net(layer), SDE, time=lambda t: 999 * t)
    whole, broken, largest = 0, [], 0.0
    for entry in available():
        if not entry.solver.has_table:
            continue
        module = SamplerModule(denoiser, entry.solver, (3, 4), steps=4)
        seeds = (torch.arange(3),) if module.rows else (torch.ones(3, 4),)
        torch._dynamo.reset()
        try:
            made = torch.compile(module, fullgraph=True, backend="eager", dynamic=False)(*seeds)
            whole, largest = whole + 1, max(largest, float((made - module(*seeds)).abs().max()))
        except Exception as error:  # whatever a compiler may raise
            broken.append(f"{entry.name}: {str(error).partition(chr(10))[0]}")
    return "\n".join([f"{whole} tables compile whole; largest difference {largest}", *broken])


class Net(nn.Module):
    """A network that is told the time."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(self.layer(x) + t[:, None].cos())


# --- the page --------------------------------------------------------------------------------------------------------


def report(results: dict[str, Any]) -> str:
    where, rows = results["environment"], []
    for row in results["sampling"]:
        head = [row["network"], f"{row['parameters'] / 1e6:.3g}", row["batch"], row["mode"]]
        if "lacks" in row:
            rows.append([*head, row["lacks"], "", "", "", ""])
            continue
        peer = (
            _ratio(row["ratio_diffusers"]) if "ratio_diffusers" in row else row.get("missing", {}).get("diffusers", "")
        )
        bare = row["milliseconds_an_evaluation"]["bare"]
        rows.append([*head, bare, _ratio(row["ratio_ours"]), peer, row["syncs"], row["turns"]])
    titles = ["network", "million parameters", "batch", "mode", "bare, ms", "ours / bare", "diffusers / bare", "syncs"]
    lines = [
        "# Sampling and training on a GPU",
        "",
        *(["**A trial of the program with tiny networks: no result.**", ""] if results["small"] else []),
        f"`{where['command']}`, {where['device']}, torch {where['torch']}, commit {where['commit']}. DPM-Solver++ "
        f"(2M), {results['steps']} evaluations, networks in bfloat16; seconds of a run over those of as many calls of "
        "the network in the same mode, median (quartiles) of turns.",
        "",
        *table([*titles, "turns"], rows),
        "",
    ]
    found = results["training"]
    if "lacks" in found:
        return "\n".join([*lines, f"Training: {found['lacks']}.", ""])
    wall, tera = found["wall"], found["tflop_per_second"]
    return "\n".join(
        [
            *lines,
            f"Training of {found['network']} ({found['parameters'] / 1e6:.3g} million parameters), batch "
            f"{found['batch']}, bfloat16{', compiled' if found['compiled'] else ''}: the trainer makes "
            f"{_ratio(wall['ratio'])} of the bare loop's items per second, {wall['trainer_items_per_second']} and "
            f"{wall['bare_items_per_second']}; {tera['trainer']} and {tera['bare']} TFLOP/s at "
            f"{found['gflop_an_item']} GFLOP an item.",
            "",
        ]
    )


def _ratio(quartiles: list[float]) -> str:
    low, middle, high = quartiles
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


if __name__ == "__main__":
    main()
