"""What a sampler asks and claims, and what its samples depend on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde.auditing.bench import NEAR, Bench, rms
from scoresde.auditing.figure import NOT_DECIDED, RIGHT, WRONG, Figure, line, number
from scoresde.auditing.labels import quantised
from scoresde.auditing.model import Draws, Model, generators, run_form
from scoresde.grid import Grid

__all__ = ["ByName", "figures", "first_sample"]

_ASKS, _DEPENDS = "evaluations and times", "what a sample depends on"


def figures(bench: Bench) -> Iterator[Figure]:
    """All figures of conduct."""
    bench.tick("evaluations and times")
    yield _evaluations(bench)
    grid = bench.grid(10, start=NEAR)
    yield _times(grid, bench.run(bench.target.denoiser(grid.sde), bench.start(grid), grid.times)[1])
    bench.tick("what a sample depends on")
    yield from _dependence(bench)


def _evaluations(bench: Bench) -> Figure:
    """Evaluations counted against claimed."""
    told, claims, wrong = [], 0, False
    for n in (1, 2, 5, 10, 20):
        grid = bench.grid(n, start=NEAR)
        try:
            _, model, claimed = bench.run(bench.target.denoiser(grid.sde), bench.start(grid), grid.times)
        except Exception as error:  # of one step: the edges look at that
            told.append(f"{type(error).__name__} in {n}")
            continue
        told.append(f"{model.nfe} in {n}")
        if claimed is not None:
            claims, wrong = claims + 1, wrong or claimed != model.nfe
            told[-1] += f" (claimed {claimed})" if claimed != model.nfe else ""
    text = f"evaluations counted: {', '.join(told)} steps" + (", as claimed" if claims and not wrong else "")
    return Figure(_ASKS, "evaluations", WRONG if wrong else RIGHT if claims else NOT_DECIDED,
                  text if claims else f"{text}; it claims no number")  # fmt: skip


def _times(grid: Grid, model: Model) -> Figure:
    """The times that a sampler asked for, beside those that it was given."""
    name, given, asked = "times", grid.times, torch.tensor(model.asked, dtype=torch.float64)
    if bool(asked.isnan().any()):
        return Figure(_ASKS, name, NOT_DECIDED, "its samples ask at times of their own")
    inside = asked.clamp(min=1e-9 * float(given[0]), max=grid.sde.t_max)
    lam = grid.sde.half_log_snr(given)
    step = float(lam.diff().min())
    near, at = (grid.sde.half_log_snr(inside)[:, None] - lam[None]).abs().min(1)
    exact, off = near < 1e-6 * step, float(near.max())
    missed = sorted(set(range(len(given) - 1)) - set(at[exact].tolist()))
    tol = 1e-6 * float(given[0])
    outside = asked[(asked > given[0] + tol) | (asked < given[-1] - tol)]
    text = f"{len(asked)} evaluations, {int(exact.sum())} of them at the times given"
    if unit := "" if bool(exact.all()) else quantised(asked, grid.sde.t_max):
        text = f"its times are multiples of {unit}: " if unit[0].isdigit() else f"its times are numbers of {unit}: "
        text += f"off by up to {number(off)} in half log-SNR, a step being {number(step)}"
        return Figure(_ASKS, name, WRONG, text, off, signature="rounded labels")
    if not missed and len(outside):
        text += f", and outside of them at {', '.join(f'{t:.4g}' for t in outside.tolist()[:4])}"
        return Figure(_ASKS, name, NOT_DECIDED, text, off)
    if not missed:
        between = len(asked) - int(exact.sum())
        return Figure(_ASKS, name, RIGHT, text + (f", {between} between them" if between else ""), off)
    if missed == [0] and bool(exact.all()):
        return Figure(_ASKS, name, WRONG, f"{text}: off by one, the first is never asked for", off,
                      signature="off by one")  # fmt: skip
    if bool((near < 0.02 * step).all()):
        verdict = WRONG if off > 1e-4 else NOT_DECIDED
        return Figure(_ASKS, name, verdict, f"its times are off by up to {number(off / step)} of a step", off)
    again = len(asked) - len(asked.unique())
    text += f"; of the {len(given) - 1} given {len(missed)} are never asked for, and {again} are asked for again"
    return Figure(_ASKS, name, NOT_DECIDED, text, off)


class ByName(Draws):
    """Noise that a sample has by its name: the same alone and in a batch."""

    def __init__(self, names: list[int]) -> None:
        super().__init__(self._numbers)
        self.names = names

    def _numbers(self, k: int, z: Tensor) -> Tensor:
        if z.ndim == 0 or len(z) != len(self.names):
            return z
        generator = torch.Generator("cpu").manual_seed(1000 + k)
        every = torch.randn(16, *z.shape[1:], generator=generator, dtype=torch.float64, device="cpu")
        return every[self.names].to(z.dtype)


@dataclass(frozen=True)
class _Same:
    """What makes no difference, and what it is called if it does."""

    name: str
    right: str
    wrong: str

    def figure(self, off: float, tol: float) -> Figure:
        same = off < tol
        text = self.right if same else f"{self.wrong}: by {number(off)} of its size"
        return Figure(_DEPENDS, self.name, RIGHT if same else WRONG, text, off)


def first_sample(bench: Bench) -> Tensor:
    """The samples that `_dependence` looks at, from the first call of all."""
    grid = bench.grid(12, start=NEAR)
    draws = ByName([0, 1, 2, 3])
    return bench.run(bench.target.denoiser(grid.sde), bench.start(grid), grid.times, draws=draws)[0].double()


def _dependence(bench: Bench) -> Iterator[Figure]:
    grid = bench.grid(12, start=NEAR)
    denoiser, x = bench.target.denoiser(grid.sde), bench.start(grid)

    def run(x_T: Tensor, *names: int) -> Tensor:
        return bench.run(denoiser, x_T.clone(), grid.times, draws=ByName(list(names)))[0].double()

    whole = run(x, 0, 1, 2, 3)
    size = rms(whole)
    other = torch.cat([x[:1], 3 * x[1:].flip(0)])
    # In float64 neighbours may change the last digits, as the order of a sum does; and float32's of what rounds to it.
    tol = 1e-5 if torch.equal(run(x * (1 + 1e-10), 0, 1, 2, 3), whole) else 1e-9
    yield _Same("neighbours", "a sample is the same beside other samples", "a sample is another beside others").figure(
        rms(run(other, 0, 5, 6, 7)[:1] - whole[:1]) / size, tol
    )
    yield _Same(
        "batch size", "a sample is the same alone and in a batch of 4", "a sample alone is not that in a batch of 4"
    ).figure(rms(run(x[:1], 0) - whole[:1]) / size, tol)
    between = bench.grid(7, start=NEAR)  # of another number of steps, and a batch of two
    bench.run(bench.target.denoiser(between.sde), bench.start(between, 2), between.times)
    again, first = run(x, 0, 1, 2, 3), whole if bench.first is None else bench.first
    yield _Same(
        "the call before", "the same call gives the same", "after other calls the same call gives something else"
    ).figure(max(rms(again - whole), rms(again - first)) / size, 1e-12)
    yield _generators(bench, grid, x)
    yield _default_dtype(bench, grid, x)
    given, times = x.clone(), grid.times.clone()
    run_form(bench.form, Model(denoiser, bench.form.predicts[0]), given, times)
    changed = [name for name, a, b in (("x_T", given, x), ("the times", times, grid.times)) if not torch.equal(a, b)]
    text = f"it changes {' and '.join(changed)} in place" if changed else "x_T and the times are left as they were"
    yield Figure(_DEPENDS, "inputs in place", WRONG if changed else RIGHT, text)
    if bench.form.leaves:
        yield Figure(_DEPENDS, "its own options", WRONG, f"its use changes them for good: {bench.form.leaves}")


def _generators(bench: Bench, grid: Grid, x: Tensor) -> Figure:
    name, denoiser = "global generators", bench.target.denoiser(grid.sde)
    with generators() as changed:
        run_form(bench.form, Model(denoiser, bench.form.predicts[0]), x.clone(), grid.times, None)
        moved = " and ".join(changed())
    with generators():
        first, second = (bench.run(denoiser, x.clone(), grid.times, seed=seed)[0] for seed in (1, 2))
    if torch.equal(first, second):
        if not moved:
            return Figure(_DEPENDS, name, RIGHT, "the global generators are left as they were")
        text = f"it draws from {moved} global generator what its samples do not have"
        return Figure(_DEPENDS, name, NOT_DECIDED, text)
    if not bench.noisy:
        return Figure(_DEPENDS, name, WRONG, "its samples change with the global seed, though it has no noise")
    return Figure(_DEPENDS, name, NOT_DECIDED, f"its noise is {moved or 'a'} global generator's: seed that")


def _default_dtype(bench: Bench, grid: Grid, x: Tensor) -> Figure:
    name, before, found = "default dtype", torch.get_default_dtype(), []
    try:
        for kind in (torch.float32, torch.float64):
            torch.set_default_dtype(kind)
            draws = ByName([0, 1, 2, 3])
            found.append(bench.run(bench.target.denoiser(grid.sde), x.clone(), grid.times, draws=draws)[0].double())
    except Exception as error:  # whatever it is
        return Figure(_DEPENDS, name, WRONG, f"under another default dtype it fails: {line(error)}")
    finally:
        torch.set_default_dtype(before)
    off = rms(found[0] - found[1]) / rms(found[1])
    if off < 1e-12:
        return Figure(_DEPENDS, name, RIGHT, "float64 samples are the same under either default dtype", off)
    text = f"under another default dtype float64 samples change by {number(off)} of their size"
    return Figure(_DEPENDS, name, WRONG if off > 1e-5 else NOT_DECIDED, text, off)
