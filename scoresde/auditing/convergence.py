"""Order of convergence, the limit, where convergence stops and by what."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from scoresde.analysis import marginal
from scoresde.auditing.bench import LAST, NEAR, Bench, rms
from scoresde.auditing.figure import NOT_DECIDED, RIGHT, WRONG, Figure, line, number
from scoresde.auditing.model import Draws
from scoresde.grid import Grid

__all__ = ["Curve", "curve_of", "figures"]

_LIMIT, _ORDER, _STOPS = "limit", "order of convergence", "where it stops"


class Curve(NamedTuple):
    """Errors at several numbers of steps.

    Attributes:
        steps, errors: of each.
        order: the slope of log error against log steps between the last two errors above the floor; NaN if fewer than
            three are.
        interval: the least and the most that it may be: the last two slopes, and where they tend to.
    """

    steps: tuple[int, ...]
    errors: tuple[float, ...]
    order: float
    interval: tuple[float, float]

    @property
    def last(self) -> float:
        """The error of the most steps."""
        return self.errors[-1]

    @property
    def told(self) -> str:
        """The errors, in words."""
        return ", ".join(f"{number(e)} at {n}" for n, e in zip(self.steps, self.errors, strict=True)) + " steps"

    @property
    def data(self) -> dict[str, list[float]]:
        return {"steps": list(self.steps), "errors": list(self.errors)}


def curve_of(steps: Sequence[int], errors: Sequence[float], floor: float) -> Curve:
    """The slope at the end of a curve, above its floor.

    >>> curve_of((10, 20, 40, 80), (1e-2, 2.5e-3, 6.25e-4, 1e-16), 1e-12).order
    2.0
    """
    kept = [(n, e) for n, e in zip(steps, errors, strict=True) if floor < e < math.inf]
    slopes = [math.log(e / f) / math.log(m / n) for (n, e), (m, f) in pairwise(kept)]
    order, interval = math.nan, (math.nan, math.nan)
    if len(slopes) > 1:
        before, order = slopes[-2:]
        ends = (before, order, 2 * order - before)
        interval = min(ends) - 0.05, max(ends) + 0.05
    return Curve(tuple(steps), tuple(errors), order, interval)


def figures(bench: Bench) -> Iterator[Figure]:
    """All figures of convergence."""
    sampled = bench.why_no_table is not None and bench.noisy
    bench.tick("order on the Gaussian")
    curve = curve_of(*bench.errors(bench.ladder()), 3e-12 * bench.size)
    if sampled:
        yield _limit_of_samples(bench, curve)
    else:
        yield _limit(bench, curve, "Gaussian")
        yield _order(bench, curve, "Gaussian")
        yield from _uneven(bench, curve)
    if not bench.noisy:
        yield from _on_mixtures(bench)
    yield _other_unit(bench, curve, sampled)
    if not sampled:
        yield _to_zero(bench)
        bench.tick("rounding")
        yield _rounding(bench, curve)
        yield _digits(bench, curve)


def _limit_of_samples(bench: Bench, curve: Curve) -> Figure:
    """Without a table, from some thousand samples, whose own error is some percent."""
    share = curve.last / bench.size
    stuck = share > 0.05 and curve.last > 0.7 * curve.errors[-2]
    verdict = RIGHT if share < 0.03 else WRONG if stuck else NOT_DECIDED
    text = f"W2 of 4000 samples: {curve.told}"
    return Figure(_LIMIT, "limit on the Gaussian", verdict, text, curve.last, data=curve.data)


def _limit(bench: Bench, curve: Curve, problem: str) -> Figure:
    """Whether what it tends to is the truth."""
    what, share = "W2" if bench.noisy else "rms error", curve.last / bench.size
    falls = share < 1e-6 or curve.order > 0.6
    stuck = not math.isfinite(curve.last) or (not falls and not curve.order > 0.3 and share > 1e-4)
    verdict = WRONG if stuck else RIGHT if falls else NOT_DECIDED
    text = f"it does not tend to the truth: {what} {curve.told}" if stuck else f"{what}: {curve.told}"
    return Figure(_LIMIT, f"limit on the {problem}", verdict, text, curve.last, data=curve.data)


def _order(bench: Bench, curve: Curve, problem: str) -> Figure:
    """Whether the order is what it claims."""
    name, claimed = f"order on the {problem}", bench.form.order
    if math.isnan(curve.order):
        small = curve.last < 1e-6 * bench.size
        text = "exact to rounding" if small else "fewer than three errors stand above rounding"
        return Figure(_ORDER, name, RIGHT if small else NOT_DECIDED, text)
    low, high = curve.interval
    verdict = NOT_DECIDED
    if claimed is not None:
        verdict = WRONG if high < claimed - 0.3 else RIGHT if low > claimed - 0.5 else NOT_DECIDED
    claims = "no order is claimed" if claimed is None else f"order {claimed} is claimed"
    text = f"{'W2' if bench.noisy else 'the rms error'} falls as steps^-{curve.order:.2f}; {claims}"
    return Figure(_ORDER, name, verdict, text, curve.order, curve.interval, data=curve.data)


def _uneven(bench: Bench, curve: Curve) -> Iterator[Figure]:
    """Whether the order holds where a step is twice or half as long as the one before, or weights take even steps for
    granted: steps of one length hide what is wrong in their ratios. Not asked of what is known, or draws noise.
    """
    if bench.why_no_table is not None or bench.known or bench.noisy or not curve.order > 1.3:
        return
    bench.tick("order on uneven steps")
    found = curve_of(*bench.within(bench.ladder(20), lambda n: bench.error(bench.uneven(n))), 3e-12 * bench.size)
    lost = curve.interval[0] - found.interval[1]
    verdict = NOT_DECIDED if math.isnan(lost) else WRONG if lost > 0.2 else RIGHT
    text = (
        f"the error falls as steps^-{found.order:.2f} where steps are h and 2 h by turns, -{curve.order:.2f} where even"
    )
    yield Figure(_ORDER, "order on uneven steps", verdict, text, found.order, found.interval, data=found.data)


def _on_mixtures(bench: Bench) -> Iterator[Figure]:
    """Of deterministic samplers: a Gaussian's model is linear, and can flatter."""
    bench.tick("order on the mixture in 2 dimensions")
    problem = "mixture in 2 dimensions"
    curve = curve_of(*bench.within(bench.ladder(40), lambda n: bench.mixed(2, n, 16)), 1e-9)
    yield _limit(bench, curve, problem)
    yield _order(bench, curve, problem)
    bench.tick("limit on the mixture in 3072 dimensions")
    steps = [40, 80] if bench.quick else [20, 40, 80]
    curve = curve_of(*bench.within(steps, lambda n: bench.mixed(3072, n, 2)), 1e-7)
    falls = curve.last < 0.9 * curve.errors[0] or curve.last < 1e-4
    yield Figure(
        _LIMIT, "limit on the mixture in 3072 dimensions", RIGHT if falls else WRONG, f"rms error: {curve.told}",
        curve.last, data=curve.data,
    )  # fmt: skip


def _other_unit(bench: Bench, curve: Curve, sampled: bool) -> Figure:
    """Data twenty times as large, with levels twenty times as large: the same error, in units of the data, or at least
    one that falls.
    """
    bench.tick("another unit of data")
    name, steps = "data in another unit", [n for n in curve.steps if 40 <= n <= (80 if sampled else 320)]
    try:
        steps, errors = bench.errors(steps, unit=20.0)
    except (ValueError, RuntimeError, TypeError, ArithmeticError) as error:
        return Figure(_LIMIT, name, NOT_DECIDED, f"it does not run: {line(error)}")
    ours = [curve.errors[curve.steps.index(n)] for n in steps]
    near = all(a <= 4 * b + 1e-9 + 0.03 * sampled for a, b in zip(errors, ours, strict=True))
    falls = not sampled and (errors[-1] < 0.7 * errors[0] or errors[-1] < 1e-6)
    text = f"data of 20 times the size: error {number(errors[-1])} of it at {steps[-1]} steps, for {number(ours[-1])}"
    verdict = RIGHT if near or falls else WRONG if errors[-1] > 0.1 else NOT_DECIDED
    return Figure(_LIMIT, name, verdict, text, errors[-1])


def _to_zero(bench: Bench) -> Figure:
    """On a grid as in use, from the prior to sigma = 0: where the error stops falling, and by what."""
    bench.tick("where convergence stops")
    name = "on a grid to sigma = 0"
    try:
        steps, errors = bench.errors(bench.ladder(20), start=NEAR, to_zero=True)
    except Exception as error:  # whatever it is
        return Figure(_STOPS, name, NOT_DECIDED, f"it does not run: {line(error)}")
    curve, (cap, skipped) = curve_of(steps, errors, 0.0), _last_step(bench)
    last, data = curve.last, {**curve.data, "last_step": cap}
    stops = next(n for n, e in zip(steps, errors, strict=True) if not e >= 1.3 * last)
    verdict, signature = RIGHT, ""
    if not math.isfinite(last):
        verdict, text = WRONG, "it is not finite"
    elif last <= 1.5 * cap:
        text = f"the error stops at {stops} steps, at {number(last)}, by the last step: from sigma = 0.002 to 0 by the "
        text += f"model's mean costs {number(cap)}"
    elif abs(last / skipped - 1) < 0.2:
        verdict, signature = WRONG, "the last step skipped"
        text = f"the grid's end is not reached: at the last noisy level, sigma = 0.002, the error is {number(skipped)}"
    elif curve.order > 0.5:
        text = (
            f"the error still falls at {steps[-1]} steps, {number(last)}; the last step will stop it at {number(cap)}"
        )
    elif curve.order < 0.3 and last > 3 * cap and last > 1e-3:
        verdict = WRONG
        text = f"the error stops at {number(last)}, {last / cap:.2g} times what the last step alone costs"
    else:
        verdict = NOT_DECIDED
        text = f"the error is {number(last)} at {steps[-1]} steps, where the last step alone costs {number(cap)}"
    return Figure(_STOPS, name, verdict, text, last, signature=signature, data=data)


def _last_step(bench: Bench) -> tuple[float, float]:
    """The error of the exact mean as the last step, from sigma = 0.002 to 0, and that of no step."""
    sde, data = bench.sde(), bench.data
    t = max(float(sde.time_at(LAST)), sde.t_min)
    law = marginal(data, sde, t)
    std, kept = law.variances.sqrt(), float(sde.alpha(t)) * data.variances / law.variances  # D = m + k (x - alpha m)
    none = torch.stack([std - data.variances.sqrt(), law.mean - data.mean]).norm(dim=0)
    return rms(kept * std - data.variances.sqrt()), rms(none)


class _Shared(Draws):
    """The same noise in float32 and in float64."""

    def __init__(self) -> None:
        super().__init__(self._numbers)

    @staticmethod
    def _numbers(k: int, z: Tensor) -> Tensor:
        generator = torch.Generator("cpu").manual_seed(100 + k)
        return torch.randn(z.shape, generator=generator, dtype=torch.float64, device="cpu").to(z.dtype)


def _rounding(bench: Bench, curve: Curve) -> Figure:
    """What float32 costs at each number of steps, on times that are numbers of both."""
    name = "rounding of float32"

    def measure(n: int) -> float:
        grid = bench.grid(n, start=NEAR)
        grid = Grid(grid.sde, grid.times.float().double().clamp(max=grid.sde.t_max))
        wide, narrow = (
            bench.gaussian(grid, dtype=kind, draws=_Shared())[0].double() for kind in (torch.float64, torch.float32)
        )
        return rms(wide - narrow) / bench.size

    try:
        steps, off = bench.within(curve.steps, measure)
    except (ValueError, RuntimeError, TypeError) as error:
        return Figure(_STOPS, name, NOT_DECIDED, f"it takes no float32: {line(error)}")
    rounding, worst = curve_of(steps, off, 0.0), max(off)
    slope = math.log(off[-1] / off[0]) / math.log(steps[-1] / steps[0]) if min(off) > 0 else 0.0
    at = next((n for n, e, r in zip(steps, curve.errors, off, strict=False) if e / bench.size < r), None)
    where = f"; from {at} steps on it is more than the error of the method" if at else ""
    verdict, signature = RIGHT if worst < 3e-5 else NOT_DECIDED, ""
    text = f"float32 is {rounding.told} of the size of the data from float64{where}"
    if not math.isfinite(worst):
        verdict, text = WRONG, f"not finite in float32: {rounding.told}"
    elif worst > 1e-4 and slope > 0.5:
        verdict, signature = WRONG, "float32 coefficients"
        text = f"in float32 more steps make it worse, as steps^{slope:.1f}: {rounding.told}, of the size of the data"
    return Figure(_STOPS, name, verdict, text, worst, signature=signature, data=rounding.data)


def _digits(bench: Bench, curve: Curve) -> Figure:
    """Whether a float64 run has float64's digits: it must see a change in the tenth of x_T and of its times."""
    name, grid = "digits of float64", bench.grid(20, start=NEAR)
    x_T, denoiser = bench.start(grid), bench.target.denoiser(grid.sde)
    kept, moved, later = (
        bench.run(denoiser, x, times)[0]
        for x, times in ((x_T, grid.times), (x_T * (1 + 1e-10), grid.times), (x_T, grid.times * (1 - 1e-10)))
    )
    lost = [] if kept.dtype == torch.float64 else [f"returns {kept.dtype}".replace("torch.", "")]
    lost += ["rounds its state to float32"] if torch.equal(kept, moved) else []
    lost += ["rounds its times to float32"] if torch.equal(kept, later) else []
    if (noise := _coefficient_noise(bench, curve)) > 3e-7:
        text = f"its coefficients change by {number(noise)} where the times change by 1e-9: they are of float32"
        return Figure(_STOPS, name, WRONG, text, noise, signature="float32 coefficients")
    if lost:
        text = f"a float64 run {', and '.join(lost)}: a cost of some 1e-7 of the data"
        return Figure(_STOPS, name, NOT_DECIDED, text, 1e-7, signature="float32 in float64")
    return Figure(_STOPS, name, RIGHT, "a float64 run sees the tenth digit of x_T and of its times")


def _coefficient_noise(bench: Bench, curve: Curve) -> float:
    """How much the output's coefficients change with the tenth digit of the times, at the most steps that were looked
    at, beside the largest. What rounds its state to float32 changes them by 1e-7, and what takes differences of numbers
    of float32 by more.
    """
    grid = bench.grid(curve.steps[-1])
    moved = Grid(grid.sde, grid.times * (1 - 1e-9))
    here, there = bench.table(grid), bench.table(moved)
    if isinstance(here, str) or isinstance(there, str) or here.B.shape != there.B.shape:
        return 0.0
    return float((here.B[-1] - there.B[-1]).abs().max() / here.B[-1].abs().max())
