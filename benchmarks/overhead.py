"""What a solver's own loop costs: microseconds for each evaluation, with a network that costs nothing.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --starts      # what one call of sample() costs, in a minute

The network returns a tensor that it made beforehand, so all that is timed is the solver: the loop of a compiled
`Tableau`, beside a bare loop of the same method written by hand, with the same buffers and its coefficients in lists of
Python numbers, and beside the same method in diffusers, k-diffusion and azula, where they are installed. Peers are
driven as their documentation does; their tables (`set_timesteps`) are made outside the clock, as ours are. All take
turns in one run; medians are shown, of times, and of ratios within a turn.

Syncs are counted by running each loop on the meta device, where a tensor has no values: every value that the loop asks
for (`_local_scalar_dense`: float(), item(), a branch) would stall a GPU, and so would every copy from the host.
Written into --out: README.md, results.json; with --starts starts.md, starts.json: a call of sample(steps=25), the first
with its solver and grid and one after it, beside `iterate` of the table made beforehand, the loop alone with its rows
made beforehand too, and peers with their tables made beforehand. Each is timed right after the same call, untimed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from kept import synchronise
from peers import PACKAGES, installed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from scoresde import VPSDE, EpsDenoiser, Grid, NetworkDenoiser, Tableau, X0Denoiser, sample
from scoresde.auditing.forms import k_diffusion_sampling
from scoresde.info import environment
from scoresde.noise import GeneratorNoise, as_source
from scoresde.report import table, write_json
from scoresde.run import Solution
from scoresde.solvers import DDIM, DDPM, DPMSolverPP, ExponentialAB, Heun, Solver, UniPC, available
from scoresde.solvers.kept import KEPT

SDE = VPSDE()
aten = torch.ops.aten


class Constant(torch.nn.Module):
    """A network that returns one tensor, made for the first x that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.out: Tensor | None = None

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.out is None:
            self.out = torch.empty_like(x) if x.is_meta else 0.1 * x
        return self.out


Loop = Callable[[], Any]
"""One whole run of a solver."""


class Runner(NamedTuple):
    """A solver ready to run: `make` prepares a run outside the clock, x_T in hand."""

    make: Callable[[Tensor], Loop]
    evaluations: int


@dataclass
class Method:
    """A method in several hands: name -> runner. The first is ours, the second the bare loop."""

    name: str
    solver: Solver
    runners: dict[str, Runner] = field(default_factory=dict)


def spaced(steps: int) -> Grid:
    return Grid.log_snr(SDE, steps, last=1e-3)


# --- ours ------------------------------------------------------------------------------------------------------------


def compiled(solver: Solver, steps: int, kind: type[NetworkDenoiser] = EpsDenoiser) -> tuple[Tableau, Runner]:
    """The loop of the table alone, on a network that predicts eps or D."""
    table = solver.tableau(spaced(steps))

    def make(x: Tensor) -> Loop:
        denoiser, noise = kind(Constant().eval(), SDE), draws(x)

        def loop() -> Tensor:
            with torch.no_grad():
                for state in table.iterate(denoiser, x, noise):  # noqa: B007
                    pass
            return state.x

        return loop

    return table, Runner(make, table.nfe)


def draws(x: Tensor) -> Callable[[int, Tensor], Tensor]:
    """Noise from one generator; on the meta device there is none."""
    if x.is_meta:
        return lambda row, x: torch.empty_like(x)
    return GeneratorNoise(torch.Generator(x.device).manual_seed(0))


# --- bare loops: what somebody writes who needs one method only ------------------------------------------------------


def labels(t: Tensor, x: Tensor) -> Tensor:
    """The network's time labels, (N, B), made once."""
    return t.to(x.dtype)[:, None].expand(-1, len(x)).to(x.device)


def bare_one_step(table: Tableau, x: Tensor, kind: type[NetworkDenoiser] = EpsDenoiser) -> Loop:
    """DDIM and DDPM: x <- a x + b eps + c z."""
    net, times, noise = Constant(), labels(table.t, x), draws(x)
    rows = table._rows(kind(net, SDE))
    a, b, c = [row.x for row in rows], [row.n for row in rows], [row.c for row in rows]

    def loop() -> Tensor:
        with torch.no_grad():
            y = x
            for i in range(len(a)):
                y = (y * a[i]).add_(net(y, times[i]), alpha=b[i])
                if c[i] != 0:
                    y.add_(noise(i, y), alpha=c[i])
        return y

    return loop


def earlier(row: Any) -> tuple[tuple[int, float], ...]:
    """(row, coefficient) of all the earlier F that a row of the loop reads."""
    return row.past if row.onto is None else ((row.onto, 1.0), *row.past)


def bare_2m(table: Tableau, x: Tensor) -> Loop:
    """DPM-Solver++ 2M with an eps network: x <- a x + b eps + d D', D = u x + w eps, D' that of the step before."""
    net, times = Constant(), labels(table.t, x)
    rows = table._rows(EpsDenoiser(net, SDE))
    a, b = [row.x for row in rows], [row.n for row in rows]
    d = [sum(weight for _, weight in earlier(row)) for row in rows]
    u, w = zip(*(row.keep or (0.0, 0.0) for row in rows), strict=True)

    def loop() -> Tensor:
        with torch.no_grad():
            y, before = x, None
            for i in range(len(a)):
                eps = net(y, times[i])
                D = (y * u[i]).add_(eps, alpha=w[i])
                y = (y * a[i]).add_(eps, alpha=b[i])
                if before is not None:
                    y.add_(before, alpha=d[i])
                before = D
        return y

    return loop


def bare_window(table: Tableau, x: Tensor, kind: type[NetworkDenoiser] = EpsDenoiser) -> Loop:
    """Any table: x <- a x + b eps + sum_k b_k F_k + c z, with the F that later rows need in a list."""
    net, times, noise = Constant(), labels(table.t, x), draws(x)
    made = table._rows(kind(net, SDE))
    rows = [(i, row.x, row.n, earlier(row), row.c, row.keep) for i, row in enumerate(made)]

    def loop() -> Tensor:
        with torch.no_grad():
            y: Tensor = x
            F: list[Tensor | None] = [None] * len(rows)
            for i, a, b, past, c, keep in rows:
                if b is None:
                    y = y * a
                else:
                    eps = net(y, times[i])
                    if keep is not None:
                        F[i] = (y * keep[0]).add_(eps, alpha=keep[1]) if keep[0] else eps * keep[1]
                    y = (y * a).add_(eps, alpha=b)
                for j, weight in past:
                    y.add_(F[j], alpha=weight)  # type: ignore[arg-type]
                if c != 0:
                    y.add_(noise(i, y), alpha=c)
        return y

    return loop


# --- peers -----------------------------------------------------------------------------------------------------------


def diffusers_loop(name: str, steps: int, **options: Any) -> Callable[[Tensor], Loop]:
    import diffusers

    diffusers.utils.logging.set_verbosity_error()

    def make(x: Tensor) -> Loop:
        scheduler, net = getattr(diffusers, name)(**options), Constant()
        scheduler.set_timesteps(steps, device=None if x.is_meta else x.device)
        timesteps = scheduler.timesteps if x.is_meta else scheduler.timesteps.to(x.device)
        scheduler.set_begin_index(0) if hasattr(scheduler, "set_begin_index") else None
        sampled = sys.modules[type(scheduler).__module__]
        unseen = None
        if x.is_meta and hasattr(sampled, "randn_tensor"):
            unseen = mock.patch.object(sampled, "randn_tensor", lambda shape, **_: torch.empty(shape, device="meta"))

        def loop() -> Tensor:
            with torch.no_grad(), unseen or nullcontext():
                y = x
                for t in timesteps:
                    eps = net(scheduler.scale_model_input(y, t), t)
                    y = scheduler.step(eps, t, y).prev_sample
            return y

        return loop

    return make


def k_diffusion_loop(name: str, steps: int, **options: Any) -> Callable[[Tensor], Loop]:
    sampler = getattr(k_diffusion_sampling(), f"sample_{name}")

    def make(x: Tensor) -> Loop:
        grid, net = spaced(steps), Constant()
        sigmas = (SDE.sigma(grid.times) / SDE.alpha(grid.times)).to(x.device, torch.float32)
        drawn = {"noise_sampler": lambda *_: torch.randn_like(x)} if name.endswith("_sde") else {}
        return lambda: sampler(net, x, sigmas, disable=True, **drawn, **options)

    return make


def azula_loop(name: str, steps: int, **options: Any) -> Callable[[Tensor], Loop]:
    import azula.denoise
    import azula.noise
    import azula.sample

    class Net(azula.denoise.Denoiser):
        def __init__(self) -> None:
            super().__init__()
            self.schedule, self.net = azula.noise.VPSchedule(), Constant()

        def forward(self, x: Tensor, t: Tensor, **_: Any) -> Any:
            return azula.denoise.DiracPosterior(self.net(x, t))

    def make(x: Tensor) -> Loop:
        sampler = getattr(azula.sample, f"{name}Sampler")(Net(), steps=steps, silent=True, **options)
        return lambda: sampler(x)

    return make


def methods(steps: int, with_peers: bool) -> list[Method]:
    """The methods that have a bare loop of their own and peers, and then every table of `available()`."""
    heun = (steps + 1) // 2
    named: list[tuple[str, Solver, int, Callable[[Tableau, Tensor], Loop], dict[str, tuple[Any, ...]]]] = [
        (
            "DDIM",
            DDIM(),
            steps,
            bare_one_step,
            {
                "diffusers DDIM": (diffusers_loop, "DDIMScheduler", {"clip_sample": False}),
                "diffusers Euler": (diffusers_loop, "EulerDiscreteScheduler", {}),
                "k-diffusion euler": (k_diffusion_loop, "euler", {}),
                "azula Euler": (azula_loop, "Euler", {}),
            },
        ),
        (
            "DDPM",
            DDPM(),
            steps,
            bare_one_step,
            {
                "diffusers DDPM": (diffusers_loop, "DDPMScheduler", {"clip_sample": False}),
                "k-diffusion euler_ancestral": (k_diffusion_loop, "euler_ancestral", {}),
                "azula DDPM": (azula_loop, "DDPM", {}),
            },
        ),
        (
            "Heun",
            Heun(),
            heun,
            bare_window,
            {
                "diffusers Heun": (diffusers_loop, "HeunDiscreteScheduler", {}),
                "k-diffusion heun": (k_diffusion_loop, "heun", {}),
                "azula Heun": (azula_loop, "Heun", {}),
            },
        ),
        (
            "DPM-Solver++ 2M",
            DPMSolverPP(2),
            steps,
            bare_2m,
            {
                "diffusers DPM++2M": (diffusers_loop, "DPMSolverMultistepScheduler", {}),
                "k-diffusion dpmpp_2m": (k_diffusion_loop, "dpmpp_2m", {}),
                "azula xEAB2": (azula_loop, "xEAB", {"order": 2}),
            },
        ),
        (
            "DEIS-3 (log rho)",
            ExponentialAB(3, "eps"),
            steps,
            bare_window,
            {
                "diffusers DEIS3": (diffusers_loop, "DEISMultistepScheduler", {"solver_order": 3}),
                "azula zEAB3": (azula_loop, "zEAB", {"order": 3}),
            },
        ),
        (
            "UniPC-3",
            UniPC(3),
            steps,
            bare_window,
            {"diffusers UniPC3": (diffusers_loop, "UniPCMultistepScheduler", {"solver_order": 3})},
        ),
    ]
    found = []
    # diffusers is fed eps, k-diffusion and azula D: each beside ours on the same.
    for name, solver, n, bare, peers in named:
        for fed, kind, packages in (("eps", EpsDenoiser, ("diffusers",)), ("D", X0Denoiser, ("k-diffusion", "azula"))):
            rivals = {label: how for label, how in peers.items() if label.split()[0] in packages}
            if not rivals:
                continue
            table, runner = compiled(solver, n, kind)
            by_hand = partial(bare, table) if fed == "eps" else partial(_fed_D(bare), table, kind=kind)
            method = Method(f"{name}, fed {fed}", solver, {"here": runner, "bare": Runner(by_hand, table.nfe)})
            for label, (make, cls, options) in rivals.items():
                if with_peers and installed(label.split()[0]):
                    nfe = 2 * n - (0 if "azula" in label else 1) if name == "Heun" else n
                    method.runners[label] = Runner(make(cls, n, **options), nfe)
            found.append(method)
    for entry in available():
        try:
            table, runner = compiled(entry.solver, steps)
        except TypeError:  # a loop without a table
            continue
        method = Method(entry.name, entry.solver, {"here": runner})
        method.runners["bare"] = Runner(partial(bare_window, table), table.nfe)
        found.append(method)
    return found


def _fed_D(bare: Callable[..., Loop]) -> Callable[..., Loop]:
    """The bare loop of a method that is given D: DPM-Solver++ 2M then needs no conversion, the general loop does."""
    return bare_window if bare is bare_2m else bare


# --- measuring -------------------------------------------------------------------------------------------------------


class Syncs(TorchDispatchMode):
    """Counts what would stall a device: values read from it, and copies between it and the host."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = self.copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            self.reads += 1
            return 0.5
        if func is aten._to_copy.default and "device" in kwargs:
            self.copies += torch.device(kwargs["device"]).type != args[0].device.type
        if func is aten.copy_.default:
            self.copies += args[0].device.type != args[1].device.type
        return func(*args, **kwargs)


def syncs(runner: Runner, shape: Sequence[int]) -> tuple[float, float] | None:
    """(values read, copies) of the device for each evaluation; None where the loop does not run without values."""
    x = torch.empty(*shape, device="meta")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loop = runner.make(x)
            with Syncs() as counted:
                loop()
    except Exception:
        return None
    return counted.reads / runner.evaluations, counted.copies / runner.evaluations


def timed(loop: Loop, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    synchronise(device)
    start = clock()
    loop()
    synchronise(device)
    return clock() - start


def measure(found: Sequence[Method], x: Tensor, seconds: float) -> dict[str, dict[str, list[float]]]:
    """Microseconds for each evaluation, in turns: method -> runner -> times, until the seconds are over, five turns at
    least.
    """
    times: dict[str, dict[str, list[float]]] = {m.name: {name: [] for name in m.runners} for m in found}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start, turn = time.perf_counter(), 0
        bar = tqdm(total=seconds, unit="s", bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} s")
        while turn < 6 or time.perf_counter() - start < seconds:
            for method in found:
                for name, runner in method.runners.items():
                    loop = runner.make(x)
                    if turn == 0:  # to warm up
                        loop()
                        continue
                    times[method.name][name].append(timed(loop, x.device) / runner.evaluations * 1e6)
            turn += 1
            bar.n = min(seconds, time.perf_counter() - start)
            bar.refresh()
        bar.close()
    return times


def once(action: Callable[[], Any], repeats: int = 2000) -> float:
    """Median microseconds of an action."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        found.append(time.perf_counter() - start)
    return statistics.median(found) * 1e6


# --- what a call costs -----------------------------------------------------------------------------------------------


def started(solver: Solver, steps: int) -> dict[str, Callable[[Tensor], Loop]]:
    """A call of sample(), on an eps network: again, the first; its table alone, made beforehand; and with its rows made
    beforehand too.
    """

    def again(x: Tensor, first: bool = False) -> Loop:
        denoiser, generator = EpsDenoiser(Constant().eval(), SDE), torch.Generator(x.device).manual_seed(0)

        def call() -> Solution:
            if first:
                KEPT.clear()
            return sample(denoiser, x, solver, steps=steps, generator=generator)

        return call

    def prepared(x: Tensor, rows: bool = False) -> Loop:
        denoiser, noise = EpsDenoiser(Constant().eval(), SDE), as_source(draws(x))
        made = solver.tableau(solver.grid(SDE, steps))
        ready = made.ready(denoiser, x.dtype)

        def loop() -> None:
            with torch.no_grad():
                for _ in ready.run(denoiser, x, noise, {}) if rows else made.iterate(denoiser, x, noise):
                    pass

        return loop

    return {
        "again": again,
        "first": partial(again, first=True),
        "table": prepared,
        "rows": partial(prepared, rows=True),
    }


def starting(steps: int, with_peers: bool) -> dict[str, dict[str, Callable[[Tensor], Loop]]]:
    """Solver -> runner -> what prepares it."""
    k, a, d = k_diffusion_loop, azula_loop, diffusers_loop
    multistep = "DPMSolverMultistepScheduler"
    cases: dict[str, tuple[Solver, dict[str, Callable[[], Callable[[Tensor], Loop]]]]] = {
        "DDIM": (
            DDIM(),
            {
                "k-diffusion euler": partial(k, "euler", steps),
                "azula Euler": partial(a, "Euler", steps),
                "diffusers DDIM": partial(d, "DDIMScheduler", steps, clip_sample=False),
                "diffusers Euler": partial(d, "EulerDiscreteScheduler", steps),
            },
        ),
        "DPM-Solver++ 2M": (
            DPMSolverPP(2),
            {
                "k-diffusion dpmpp_2m": partial(k, "dpmpp_2m", steps),
                "azula xEAB2": partial(a, "xEAB", steps, order=2),
                "diffusers DPM++2M": partial(d, multistep, steps),
            },
        ),
        "Heun": (
            Heun(),
            {
                "k-diffusion heun": partial(k, "heun", steps),
                "azula Heun": partial(a, "Heun", steps),
                "diffusers Heun": partial(d, "HeunDiscreteScheduler", steps),
            },
        ),
        "UniPC-3": (UniPC(3), {"diffusers UniPC3": partial(d, "UniPCMultistepScheduler", steps, solver_order=3)}),
        "DPM-Solver++ 2M SDE": (
            DPMSolverPP(2, stochastic=True),
            {
                "k-diffusion dpmpp_2m_sde": partial(k, "dpmpp_2m_sde", steps),
                "diffusers SDE-DPM++2M": partial(d, multistep, steps, algorithm_type="sde-dpmsolver++"),
            },
        ),
    }
    return {
        name: started(solver, steps)
        | {label: peer() for label, peer in peers.items() if with_peers and installed(label.split()[0])}
        for name, (solver, peers) in cases.items()
    }


def measure_starts(cases: Any, x: Tensor, seconds: float) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of each, in turns, each right after the same call: solver -> runner -> times. On a CPU those that
    its thread was at work, so that what else the machine does is left out.
    """
    clock = time.thread_time if x.device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, dict[str, list[float]]] = {name: {label: [] for label in row} for name, row in cases.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = time.perf_counter()
        while len(times["DDIM"]["again"]) < 5 or time.perf_counter() - start < seconds:
            for name, row in cases.items():
                for label, make in row.items():
                    for loop in (make(x), make(x)):  # some schedulers are good for one run
                        taken = timed(loop, x.device, clock) * 1e3
                    times[name][label].append(taken)
    return times


def starts_report(cases: Any, shapes: Sequence[Sequence[int]], steps: int, args: argparse.Namespace) -> str:
    env = environment(args.device, torch.float32)
    versions = {name: installed(name) for name in PACKAGES if installed(name)}
    lines = ["# What a call costs", "", f"`python {env['command']}`: {env['device']}, {env['threads']} thread(s),"]
    lines[-1] += f" float32, sample(steps={steps}) with a network that costs nothing, x_T given; medians, of times"
    lines += [
        "(on one CPU thread those that it was at work) and of ratios within a turn. torch "
        + env["torch"]
        + "".join(f", {k} {v}" for k, v in versions.items())
    ]
    lines[-1] += f"; commit {env['commit']}."
    record: dict[str, Any] = {"environment": env, "peers": versions, "milliseconds": {}}
    for shape in shapes:
        x = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(args.device)
        times = measure_starts(cases, x, args.seconds / len(shapes))
        turns = len(times["DDIM"]["again"])
        lines += ["", f"## Milliseconds at {tuple(shape)}, {turns} turns", ""]
        rows = []
        for name, row in times.items():
            middle = {label: statistics.median(t) for label, t in row.items()}
            record["milliseconds"].setdefault(str(tuple(shape)), {})[name] = {k: round(v, 4) for k, v in middle.items()}

            def ratio(label: str, other: str, row: dict[str, list[float]] = row) -> str:
                return f"{statistics.median(a / b for a, b in zip(row[label], row[other], strict=True)):.2f}"

            others = {
                label: value for label, value in middle.items() if label not in ("again", "first", "table", "rows")
            }
            cells = [name, f"**{middle['again']:.2f}**", f"{middle['first']:.2f}"]
            for label in ("table", "rows"):
                cells += [f"{middle[label]:.2f}", ratio("again", label)]
            if others:
                leanest = min(others, key=lambda label: others[label])
                cells += [f"{leanest} {others[leanest]:.2f}", ratio("again", leanest), ratio("first", leanest)]
                cells.append(", ".join(f"{label} {value:.2f}" for label, value in others.items()))
            rows.append([*cells, *[""] * (11 - len(cells))])
        head = ["solver", "again", "first", "table made before", "again / it", "its rows too", "again / it"]
        lines += table([*head, "leanest peer", "again / peer", "first / peer", "all peers"], rows)
    args.out.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines) + "\n"
    (args.out / "starts.md").write_text(text)
    write_json(args.out / "starts.json", record)
    return text


# --- the page --------------------------------------------------------------------------------------------------------


def report(found: Sequence[Method], times: Any, shape: Sequence[int], args: argparse.Namespace) -> str:
    middle = {m: {name: statistics.median(t) for name, t in row.items()} for m, row in times.items()}
    env = environment(args.device, torch.float32)
    versions = {name: installed(name) for name in PACKAGES if installed(name)}
    net, x, y = Constant(), torch.randn(*shape, device=args.device), torch.randn(*shape, device=args.device)
    costs = {
        "network": once(lambda: net(x, x)),
        "x * a": once(lambda: x * 0.5),
        "x.add_(y, alpha=b)": once(lambda: y.add_(x, alpha=0.5)),
        "normal draw": once(lambda: x.clone().normal_(), 50),
    }
    peered = [m for m in found if len(m.runners) > 2]

    def ratio(method: str, other: str) -> float:
        """Here to the other: the median over turns, in each of which both ran."""
        row = times[method]
        return statistics.median(a / b for a, b in zip(row["here"], row[other], strict=True))

    turns = len(next(iter(times[found[0].name].values())))
    lines = ["# Overhead of the loop", "", f"`python {env['command']}`: {env['device']}, {env['threads']} thread(s),"]
    lines[-1] += f" float32, x of shape {tuple(shape)}, {args.steps} evaluations a run, medians of {turns} turns."
    lines += [
        "torch " + env["torch"] + "".join(f", {k} {v}" for k, v in versions.items()) + f"; commit {env['commit']}."
    ]
    lines += ["For scale, in microseconds: " + ", ".join(f"{k} {v:.1f}" for k, v in costs.items()) + "."]
    lines += ["", "## Microseconds for each evaluation, the network's included", ""]
    grid, drawn, bare_draw, rows = spaced(args.steps), [], 0.0, []
    for method in peered:
        row = dict(middle[method.name])
        here, bare = row.pop("here"), row.pop("bare")
        leanest = min(row, key=lambda name: row[name])
        to_bare, to_peer = (f"{ratio(method.name, other):.2f}" for other in ("bare", leanest))
        shown = ", ".join(f"{name} {value:.0f}" for name, value in row.items())
        rows.append(
            [method.name, f"**{here:.0f}**", f"{bare:.0f}", to_bare, f"{leanest} {row[leanest]:.0f}", to_peer, shown]
        )
        quiet = method.name.replace("DDPM", "DDIM")
        if quiet != method.name and quiet in middle:  # the same loop but for its noise
            bare_draw = bare - middle[quiet]["bare"]
            drawn.append(f"{method.name} {(here - bare_draw) / (row[leanest] - bare_draw):.2f}")
    lines += table(["method", "here", "bare loop", "here / bare", "leanest peer", "here / peer", "all peers"], rows)
    if drawn:
        lines += [
            "",
            f"Torch's normal draw, the same call for all, is {bare_draw:.0f} us of DDPM's (its bare loop less",
        ]
        lines[-1] += f" DDIM's). Without it, here / peer: {', '.join(drawn)}."
    lines += ["", "## Every table, beside a bare loop with as many buffers, and what it costs to make", ""]
    rows = []
    for method in found:
        row = middle[method.name]
        made = once(partial(method.solver.tableau, grid), 10) / args.steps
        share = f"{ratio(method.name, 'bare'):.2f}"
        rows.append([method.name, f"{row['here']:.0f}", f"{row['bare']:.0f}", share, f"{made:.0f}"])
    lines += table(["solver", "here", "bare loop", "here / bare", "making the table"], rows)
    lines += ["", "## Stalls of the device for each evaluation: values read, copies from or to the host", ""]
    counted = {
        f"here, {method.name}" if name == "here" else name: syncs(runner, shape)
        for method in found
        for name, runner in method.runners.items()
        if name != "bare"
    }
    ours = {k: v for k, v in counted.items() if k.startswith("here")}
    total = [sum(v[i] for v in ours.values() if v) for i in (0, 1)]
    rows = [[f"here, all {len(ours)} tables", *(f"{n:g}" for n in total)]]
    rows += [
        [label, *(["not run without values", ""] if value is None else (f"{n:.1f}" for n in value))]
        for label, value in counted.items()
        if label not in ours
    ]
    lines += table(["loop", "values read", "copies"], rows)
    args.out.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines) + "\n"
    (args.out / "README.md").write_text(text)
    record = {
        "environment": env,
        "peers": versions,
        "shape": list(shape),
        "microseconds": {m: {k: round(v, 2) for k, v in row.items()} for m, row in middle.items()},
        "costs": {k: round(v, 2) for k, v in costs.items()},
        "stalls": {k: None if v is None else {"reads": v[0], "copies": v[1]} for k, v in counted.items()},
    }
    write_json(args.out / "results.json", record)
    return text


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs="+", default=[64, 3, 32, 32], help="of x (64 3 32 32)")
    parser.add_argument("--steps", type=int, default=50, help="evaluations of a run (50)")
    parser.add_argument("--seconds", type=float, default=100.0, help="for the timing (100)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-peers", action="store_true", help="ours and the bare loops alone")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/overhead"), help="folder of results")
    parser.add_argument("--starts", action="store_true", help="what a call of sample() costs instead, at 1 3 8 8 too")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.starts:
        print(starts_report(starting(25, not args.no_peers), [(1, 3, 8, 8), args.shape], 25, args))
        return
    found = methods(args.steps, not args.no_peers)
    x = torch.randn(*args.shape, generator=torch.Generator().manual_seed(0)).to(args.device)
    print(report(found, measure(found, x, args.seconds), args.shape, args))


if __name__ == "__main__":
    main()
