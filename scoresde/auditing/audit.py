"""`audit`: anyone's sampler against the truth."""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

from tqdm.auto import tqdm

from scoresde.auditing import conduct, convergence, edges, laws
from scoresde.auditing.bench import END, LAST, NEAR, Bench
from scoresde.auditing.edits import edits_to
from scoresde.auditing.figure import NOT_DECIDED, RIGHT, WRONG, Audit, Figure, line, number
from scoresde.auditing.forms import form_of
from scoresde.auditing.model import Form, run_form
from scoresde.auditing.nearest import Nearest, candidates
from scoresde.auditing.rates import Signature, rates
from scoresde.auditing.slips import UNNAMED, is_plain, named, nearest_first
from scoresde.auditing.table import Responses, responses_of
from scoresde.grid import Grid
from scoresde.sde import SDE

__all__ = ["audit", "audited"]


def audited(form: Form, sde: SDE | None, quick: bool, tick: Callable[[str], None]) -> Audit:
    """The audit of a form."""
    began = time.monotonic()
    bench = Bench(form, sde, quick, tick)
    figures: list[Figure] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bench.first = conduct.first_sample(bench)
        tick("its table")
        figures += _table(bench)
        rooms = (convergence, conduct, laws, edges)
        for figure in chain.from_iterable(_guarded(room.figures(bench)) for room in rooms):
            figures.append(figure)
            if bench.late:
                text = f"no time was left for more: {bench.limit:.0f} s are for all of it"
                figures.append(Figure("left out", "time", NOT_DECIDED, text))
                break
        tick("names")
        figures += _named(bench, figures)
    takes = f"takes {form.takes} of {bench.sde()!r}"
    claims = "claims no order" if form.order is None else f"claims order {form.order}"
    about = ", ".join(filter(None, [form.about, takes, claims, f"its model predicts {form.predicts[0]}"]))
    return Audit(form.name, about, tuple(figures), time.monotonic() - began)


def _guarded(figures: Iterator[Figure]) -> Iterator[Figure]:
    """The figures, and one of an error that the sampler raised, with which they end."""
    try:
        yield from figures
    except Exception as error:
        if all(frame.name != run_form.__name__ for frame in traceback.extract_tb(error.__traceback__)):
            raise
        yield Figure("left out", "an error", WRONG, f"it fails: {line(error)}")


def _small(bench: Bench, to_zero: bool = False, steps: int = 16) -> Grid:
    """A short, uneven grid, on which tables are compared."""
    sde = bench.sde()
    ends = {"last": float(sde.time_at(LAST - 2))} if to_zero else {"end": float(sde.time_at(END))}
    return Grid.karras(sde, steps, rho=5.0, start=float(sde.time_at(NEAR + 1)), **ends)


def _table(bench: Bench) -> Iterator[Figure]:
    """Whether it has a table, and whose it is."""
    group, name = "its table", "coefficients"
    if why := bench.why_no_table:
        yield Figure(group, name, NOT_DECIDED, f"it has none: {why}; what follows is from samples alone")
        return
    grid = _small(bench)
    found = bench.table(grid)
    if isinstance(found, str):
        yield Figure(group, name, NOT_DECIDED, found)
        return
    near, slipped = named(found, grid, bench.form.order)
    bench.known = near is not None and near.equal
    text = "affine in x_T, in the model's answers and in its noise"
    if slipped and slipped[0].name == "the last step skipped":
        yield Figure(group, name, WRONG, f"{text}; {slipped[0].text}", signature=slipped[0].name)
    elif near is not None and near.equal:
        yield Figure(group, name, RIGHT, f"{text}; it is {near.name}")
    elif near is not None:
        rows = f"{int(near.wrong.sum())} of {len(near.wrong)}"
        yield Figure(group, name, RIGHT, f"{text}; nearest to {near.name}, from which {rows} rows differ")
    else:
        yield Figure(group, name, RIGHT, text)


def _named(bench: Bench, figures: list[Figure]) -> Iterator[Figure]:
    """Where a figure is wrong, what the sampler is known by."""
    wrong = [f for f in figures if f.verdict == WRONG and f.group in ("limit", "order of convergence", "law",
                                                                        "where it stops", "edges")]  # fmt: skip
    if not wrong or bench.why_no_table:
        return
    found: list[Signature] = []
    limit = any(f.group in ("limit", "law") for f in wrong)
    table = bench.table(bench.grid(320))
    if limit and isinstance(table, Responses) and (signature := rates(table).signature()):
        found.append(signature)
    seen: list[tuple[Nearest | None, list[Signature]]] = []
    for grid in (_small(bench), _small(bench, to_zero=True)):
        small = bench.table(grid)
        if not isinstance(small, str):
            seen.append(named(small, grid, bench.form.order))
    found += _slipped(bench, seen)
    for signature in found:
        yield Figure(
            "what it is known by", signature.name, NOT_DECIDED, signature.text, signature.effect,
            signature=signature.name,
        )  # fmt: skip


def _slipped(bench: Bench, seen: list[tuple[Nearest | None, list[Signature]]]) -> list[Signature]:
    """The plainest slip on one of the grids; else an edit of a formula; else what little explains it."""
    if any(near is not None and near.equal for near, _ in seen[:1]):
        near = seen[0][0]
        return [] if near is None or (other := _otherwise(bench, near)) is None else [other]
    told = [[slip for slip in slips if slip.name not in UNNAMED][:3] for _, slips in seen]
    for (_, slips), known in zip(seen, told, strict=True):
        if known and is_plain(slips):
            return known
    return _mistyped(bench) or next(filter(None, told), [])


def _mistyped(bench: Bench, most: int = 4) -> list[Signature]:
    """What is wrong in the formula of one of the nearest solvers, on as few steps as tell them apart."""
    grid = _small(bench, steps=5)
    found = bench.table(grid)
    if isinstance(found, str):
        return []
    near = [it for it, _ in nearest_first(candidates(found, grid), bench.form.order)]
    near.sort(key=lambda it: (it.answers.noisy != found.noisy, -it.columns_alike))
    end = time.process_time() + (10.0 if bench.quick else 60.0)  # the same edits on a busy machine
    for it in near[:most]:
        if typed := edits_to(found, it.solver, it.name, grid, lambda: time.process_time() > end):
            return typed[:3]
    return []


def _otherwise(bench: Bench, near: Nearest) -> Signature | None:
    """What is known of a sampler that on few steps is a known solver."""
    claimed = bench.form.order
    if claimed is not None and near.order is not None and near.order < claimed:
        return Signature("another method", f"it is {near.name}, of order {near.order}", 1.0)
    for steps in (40, 160):
        grid = bench.grid(steps)
        found = bench.table(grid)
        if isinstance(found, str):
            return None
        right = responses_of(near.solver.tableau(grid)).B[-1]
        off = float((found.B[-1] - right).abs().max() / right.abs().max())
        if 1e-7 < off < 1e-3:
            text = f"at {steps} steps its coefficients are off by {number(off)} from those of {near.name}"
            return Signature("float32 coefficients", text, off)
    return None


def audit(
    sampler: Any,
    takes: str | None = None,
    *,
    order: int | None = None,
    options: Mapping[str, Any] | None = None,
    name: str | None = None,
    sde: SDE | None = None,
    quick: bool = False,
    progress: bool = False,
) -> Audit:
    """Run a sampler on problems whose truth is known, and say what is right, wrong and not decided.

    A sampler is seen from the outside. The problems are a Gaussian of six widths, mixtures in 2 and in 3072 dimensions,
    the Gaussian in another unit, in float64 and in float32. If it is affine in what it is given, as all samplers with
    fixed coefficients are, its table is found and its law on the Gaussian computed from it: what then is called exact
    has no noise of sampling. See `docs/auditing.md`.

    Args:
        sampler: a function (denoise, x_T, times, nfe) that returns x, or (x, evaluations that it claims to have made);
            denoise(x, t) is the mean of x_0, of the shape of x, the times decrease, x_T stands at the first and x is to
            stand at the last, and nfe is their number less one. Or a solver of this library, or its name; a scheduler
            of diffusers, a function of k-diffusion's form (model, x, sigmas, ...), a sampler class of azula, a
            torch.nn.Module (`scoresde.auditing.form_of` says how each is driven).
        takes: "sigmas", x = x_0 + sigma eps, or "times" of an SDE, which denoise.sde is. By default what its form says;
            a plain function must be told.
        order: the order of convergence that it claims; by default what its name and options say.
        options: arguments that it is given beside.
        name: what the page calls it.
        sde: for samplers in times; by default a VP SDE.
        quick: fewer numbers of steps and samples: some ten seconds instead of a minute.
        progress: show what is being done.

    Returns:
        The figures; print it, or write its `page()`. `audit(...).verdict` is "wrong" if any figure is.

    Raises:
        ValueError, TypeError: if the sampler is none, or its form cannot take that. What a sampler raises while it is
            audited is a figure, but for its first run.

    >>> audit(lambda denoise, x_T, t, nfe: x_T, order=1)
    Traceback (most recent call last):
    ...
    scoresde.checks.ArgumentError: give takes='sigmas' or takes='times': ...
    """
    form = form_of(sampler, takes, options, order, name)
    with tqdm(desc=form.name, bar_format="{desc}: {postfix} [{elapsed}]", disable=not progress, leave=False) as bar:
        return audited(form, sde, quick, lambda what: bar.set_postfix_str(what))
