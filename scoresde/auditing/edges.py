"""What a sampler does at the edges: sigma = 0, alpha = 0, one step, as many as a chain has, bfloat16; the same model in
other words; and the grid that it makes itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from scoresde.analysis import w2
from scoresde.auditing.bench import END, EVENT, NEAR, Bench, law_of_samples, rms
from scoresde.auditing.conduct import ByName
from scoresde.auditing.figure import NOT_DECIDED, RIGHT, WRONG, Figure, line, number
from scoresde.auditing.model import Model
from scoresde.chain import DDPMChain
from scoresde.grid import Grid
from scoresde.schedules import CosineVPSDE, FlowSDE

__all__ = ["figures"]

Check = Callable[[Tensor], str | None]


def figures(bench: Bench) -> Iterator[Figure]:
    """All figures of the edges."""
    bench.tick("edges")
    to_zero = {n: bench.grid(n, start=NEAR, to_zero=True) for n in (1, 40)}
    one, half = bench.grid(1, start=NEAR, end=END), bench.grid(20, start=NEAR)
    yield _attempt("sigma = 0", lambda: _run(bench, to_zero[40]), _near_data(bench, 0.5))
    yield _one_to_zero(bench, to_zero[1])
    yield _attempt("one step", lambda: _run(bench, one), lambda x: None)
    yield _attempt("steps = N of a chain", lambda: _run(bench, _chain(bench)), _near_data(bench, 0.25))
    yield _no_signal(bench)
    yield _attempt("bfloat16", lambda: _run(bench, half, torch.bfloat16), lambda x: None, hard=False)
    yield _predictions(bench)
    if bench.form.as_used is not None:
        bench.tick("as it is used")
        for steps in (1, 10, 50, 1000):
            yield _as_used(bench, steps)


def _run(bench: Bench, grid: Grid, dtype: torch.dtype = torch.float64) -> Tensor:
    x_T = bench.start(grid, 64, dtype)
    return bench.run(bench.target.denoiser(grid.sde), x_T, grid.times.to(dtype))[0]


def _near_data(bench: Bench, most: float) -> Check:
    """Whether mean and deviation are the data's to this part of its size, beside the noise of 64 samples."""

    def check(x: Tensor) -> str | None:
        share = w2(law_of_samples(x), bench.data) / bench.size
        return None if share < most else f"its samples are {number(share)} of the size of the data off"

    return check


def _one_to_zero(bench: Bench, grid: Grid) -> Figure:
    """One step to sigma = 0 is the model's mean given x_T, which is noise: next to the mean of all data. (What takes
    steps of its own gets to the data themselves.)
    """
    denoiser, asked = bench.target.denoiser(grid.sde), []
    near_data = _near_data(bench, 0.5)

    def run() -> Tensor:
        x, model, _ = bench.run(denoiser, bench.start(grid, 64), grid.times)
        asked.append(model.nfe)
        return x

    def check(x: Tensor) -> str | None:
        if asked[0] > 4:
            return near_data(x)
        off = float((x.double() - bench.data.mean.reshape(EVENT)).abs().max()) / bench.size
        return None if off < 0.3 else f"one step from noise to 0 is {number(off)} of the data off the model's mean"

    return _attempt("one step to sigma = 0", run, check)


def _attempt(name: str, run: Callable[[], Tensor], check: Check, hard: bool = True) -> Figure:
    """It runs and is right, or says in an error why it does not."""
    bad = WRONG if hard else NOT_DECIDED
    try:
        x = run()
    except (ValueError, TypeError, NotImplementedError) as error:
        return Figure("edges", name, NOT_DECIDED, f"it refuses: {line(error)}")
    except Exception as error:  # whatever it is
        return Figure("edges", name, bad, f"it fails: {line(error)}")
    if not bool(x.double().isfinite().all()):
        return Figure("edges", name, bad, "it is not finite")
    wrong = check(x)
    return Figure("edges", name, WRONG if wrong else RIGHT, wrong or "finite, and right")


def _chain(bench: Bench) -> Grid:
    """As many steps as a DDPM chain has nodes, 1000, at their noise levels."""
    sde, nodes = bench.sde(), torch.arange(1000, 0, -1, dtype=torch.float64, device="cpu")
    times = sde.time_at(DDPMChain.linear(1000).half_log_snr(nodes)).clamp(max=sde.t_max)
    return Grid(sde, torch.cat([times, times.new_zeros(1)]))


def _no_signal(bench: Bench) -> Figure:
    """From alpha = 0, where x_T is noise alone."""
    name = "alpha = 0"
    if bench.form.takes == "sigmas":
        return Figure("edges", name, NOT_DECIDED, "samplers in sigmas do not meet it: sigma / alpha is infinite")
    for sde in (FlowSDE(), CosineVPSDE(t_max=1.0)):
        grid = Grid.uniform(sde, 40)
        z = torch.randn(64, *EVENT, generator=torch.Generator("cpu").manual_seed(4), dtype=torch.float64, device="cpu")

        def run(grid: Grid = grid, z: Tensor = z) -> Tensor:
            return bench.run(bench.target.denoiser(grid.sde), grid.sde.prior_std * z, grid.times)[0]

        figure = _attempt(name, run, _near_data(bench, 0.6))
        if figure.verdict != RIGHT:
            break
    return figure


def _predictions(bench: Bench) -> Figure:
    """The same model as eps, x0, v and score."""
    group, name, kinds = "parameterisations", "eps, x0, v and score", bench.form.predicts
    if len(kinds) < 2:
        return Figure(group, name, NOT_DECIDED, f"it takes a model that predicts {kinds[0]} only")
    grid = bench.grid(12, start=NEAR)
    denoiser = bench.target.denoiser(grid.sde)
    first, *others = (
        bench.run(denoiser, bench.start(grid), grid.times, predicts=kind, draws=ByName([0, 1, 2, 3]))[0].double()
        for kind in kinds
    )
    off = [rms(other - first) / rms(first) for other in others]
    told = ", ".join(f"{kind} is {number(value)} from {kinds[0]}" for kind, value in zip(kinds[1:], off, strict=True))
    verdict = RIGHT if max(off) < 1e-5 else WRONG if max(off) > 1e-3 else NOT_DECIDED
    return Figure(group, name, verdict, told, max(off))


def _as_used(bench: Bench, steps: int) -> Figure:
    """With the grid that it makes itself: the labels that the network is told, and the levels that it steps with."""
    assert bench.form.as_used is not None
    group, name = "as it is used", f"its own grid, {steps} step{'s' * (steps > 1)}"
    z = torch.randn(64, *EVENT, generator=torch.Generator("cpu").manual_seed(9), device="cpu")
    model = Model(bench.target.denoiser(bench.sde()), bench.form.predicts[0])
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            x, labels, meant, stepped = bench.form.as_used(model, z, steps)
    except Exception as error:  # whatever it is
        return Figure(group, name, WRONG, f"it fails: {line(error)}")
    labels = [float(label) for label in labels]
    told = f"labels {_some(labels)}"
    if not bool(x.isfinite().all()):
        return Figure(group, name, WRONG, f"it is not finite; {told}")
    stages = len(labels) / max(1, len(set(labels)))
    repeats = [b for a, b in pairwise(labels) if a == b]
    off = _mismatch(meant, stepped)
    if len(repeats) > 1 and (off > 1e-3 or stages < 1.4):
        told = (
            f"{len(repeats)} labels are that of the step before, {number(repeats[0])} the first: rounded, they collide"
        )
        return Figure(group, name, WRONG, told, off, signature="rounded labels")
    if off > 1e-3:
        told += f"; the level that a label stands for is up to {off:.1%} from that of its step"
        return Figure(group, name, WRONG, told, off, signature="rounded labels")
    return Figure(group, name, RIGHT, told, off)


def _mismatch(meant: Sequence[float] | Tensor, stepped: Sequence[float] | Tensor | None) -> float:
    """How far the levels of the labels are from those of the steps, relative."""
    if stepped is None:
        return 0.0
    pairs = zip(map(float, meant), map(float, stepped), strict=False)
    return max((abs(a / b - 1) for a, b in pairs if a > 0 and b > 0), default=0.0)


def _some(labels: list[float]) -> str:
    shown = [f"{label:.5g}" for label in labels]
    return ", ".join(shown if len(shown) < 7 else [*shown[:3], "...", *shown[-3:]])
