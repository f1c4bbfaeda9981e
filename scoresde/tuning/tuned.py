"""`tune`: the times and coefficients of a solver's table, learned for a model and a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from scoresde.checks import ArgumentError, check_count, check_positive, check_whole
from scoresde.continuity import label_in_steps
from scoresde.denoiser import Denoiser, check_denoiser
from scoresde.grid import Grid
from scoresde.masks import refuse_masks
from scoresde.run import check_solver
from scoresde.solvers.base import Solver
from scoresde.tuning.chosen import SOLVERS, SPACINGS, Trial, Try, apart, capped, common_cap, finalists, ratio
from scoresde.tuning.learning import Clock, Numbers, Pairs, learn
from scoresde.tuning.solver import TunedSolver

__all__ = ["tune"]

FIRST = 6
"""Rounds of each start before the best go on."""


def tune(
    denoiser: Denoiser,
    solver: Solver | Sequence[Solver] | None,
    shape_or_x: Sequence[int] | Tensor,
    *,
    nfe: int,
    end: float = 0.0,
    seed: int = 0,
    cond: Mapping[str, Any] | None = None,
    features: Callable[[Tensor], Tensor] | None = None,
    starts: int = 3,
    rounds: int = 40,
    minutes: float = 10.0,
    batch_size: int = 1024,
    reference_nfe: int | None = None,
    progress: bool = False,
) -> TunedSolver:
    """A solver's table, learned for this model and a budget: its times, then corrections to its coefficients over the
    whole history and to the times that the network is told (`scoresde.tuning.learning` has the method). The teacher is
    the model's own fine solution from the same noise.

    The first half of the samples trains, with the `starts` best of the solvers and their grids untuned; the third
    quarter chooses among the untuned, the starts' results and every step of each; the last reports how good it is,
    beside the best untuned.

    In few evaluations a few samples in a hundred end in another mode of the data than the fine solution does, of the
    best untuned solver too. Their distance has nothing to do with that of the others, and of a plain mean they are
    nearly all. So in what trains and chooses a sample counts as s / (1 + s / cap), s its mean square, with a cap of
    1000 times the median s of the better of those compared: as it is up to some 10 typical distances, and never more
    than some 30. `error` and `default` are plain.

    **The promise.** On the last quarter, which neither trained nor chose, what was learned is nearer in this sense, and
    its plain mean square is not larger than that of the best untuned by more than two standard errors of the paired
    difference; or the best untuned is returned, its `error` being `default` then and `story` saying so: from bad
    training comes no bad solver. The second test finds a loss of k samples to another mode from about k = 4 on: one or
    two prove nothing. More samples make both sharper.

    Args:
        denoiser: the model, wrapped as it will be used: guidance, clipping.
        solver: where it starts: a solver that draws no noise and has a table, on its own grid and on `choose`'s, or
            several; a `TunedSolver`, from its steps and corrections; None for the solvers of `choose`.
        shape_or_x: (B, ...) to draw x_T from the prior; or x_T itself. B of a hundred or some: with few samples and
            many evaluations there is more to learn than they tell.
        nfe: the budget.
        end: where the steps end, with noise left if > 0.
        seed: of x_T.
        cond: conditions, as for `sample`.
        features: the distance is that of features(x), (B, ...), of what a run ends with: of z where the denoiser has a
            codec. By default of x itself.
        starts: how many are trained, for a few rounds; the best third goes on for three times as many, and so on.
        rounds: times that derivatives are taken in the training of the best, at most; each gives one step or several.
        minutes: after which it stops, with what it has; the fine solution and the choice of the starts, which are not
            interrupted, count.
        batch_size: samples that the model takes at once while training.
        reference_nfe: evaluations of the fine solution; by default 12 times as many, at least 120.
        progress: show what is being done: the error that is reached over that of the best start, and the minutes left.

    Returns:
        a solver with its steps and corrections, which `sample(denoiser, shape, tuned, nfe=nfe)` takes.

    Raises:
        ValueError: if there are fewer than 16 samples; if `end` is not within the SDE's times; if a solver draws noise
            or chooses its own times; if none can be run within the budget; if a tuned one is of another budget or end.

    >>> import torch
    >>> from scoresde import VPSDE, sample
    >>> from scoresde.exact import Gaussian
    >>> from scoresde.solvers import DDIM
    >>> denoiser = Gaussian(torch.zeros(3), std=torch.tensor([0.05, 0.3, 1.0])).denoiser(VPSDE())
    >>> tuned = tune(denoiser, DDIM(), (32, 3), nfe=4, starts=1, rounds=8)
    >>> tuned.error < 0.1 * tuned.default, sample(denoiser, (2, 3), tuned, nfe=4, seed=0).nfe
    (True, 4)
    """
    check_denoiser(denoiser)
    refuse_masks(denoiser, "tuning")
    check_count(nfe=nfe, starts=starts, rounds=rounds, batch_size=batch_size)
    check_whole(seed=seed)
    check_positive(minutes=minutes)
    clock = Clock(minutes)
    if not 0 <= end < denoiser.sde.t_max:
        raise ArgumentError(f"end={end}: expected 0 <= end < {denoiser.sde.t_max} of {denoiser.sde!r}")
    solvers = SOLVERS if solver is None else (solver,) if isinstance(solver, Solver) else tuple(solver)
    for one in solvers:
        check_solver(one)
        if one.adaptive or not one.has_table:
            raise ArgumentError(f"{one!r} has no table of steps: only such solvers can be tuned")
    n = len(shape_or_x) if isinstance(shape_or_x, Tensor) else int(shape_or_x[0])
    if n < 16:
        raise ArgumentError(f"shape_or_x has {n} samples: expected 16 or more, half of which train")
    with Trial(denoiser, shape_or_x, nfe, end, seed, cond, reference_nfe, progress, features, True) as trial:
        tried = [*_given(trial, solvers), *_named(trial, [one for one in solvers if not isinstance(one, TunedSolver)])]
        train, chooses, reports = (slice(n * i // 4, n * j // 4) for i, j in ((0, 2), (2, 3), (3, 4)))
        if not (ranked := trial.ranked(tried, train)):
            raise ArgumentError(f"nfe={nfe}: none of the solvers can be run within it")
        ranked = _apart(trial, ranked, train)[:starts]
        untuned = trial.ranked(ranked, chooses)[0]
        best = _trained(trial, ranked, untuned, train, chooses, rounds, batch_size, clock)
        return trial.reported(best, untuned, reports, allowed=2.0)


def _named(trial: Trial, solvers: Sequence[Solver]) -> list[Try]:
    """Of solvers without steps of their own: as `choose` finds them, or of one, all of its grids."""
    if len(solvers) < 2:
        return trial.of(solvers, SPACINGS)
    return finalists(trial, solvers, SPACINGS)


def _given(trial: Trial, solvers: Sequence[Solver]) -> list[Try]:
    """Of those that have them, as they are.

    Raises:
        ValueError: if one is of another budget, end or SDE.
    """
    found = []
    for one in solvers:
        if isinstance(one, TunedSolver):
            grid = one.within(trial.denoiser.sde, trial.nfe)[1]
            if float(grid.times[-1]) != trial.end:
                raise ArgumentError(f"end={trial.end:.4g}: {one!r} has steps of its own, to t = {one.times[-1]:.4g}")
            if bool((one.tableau(grid).c > 0).any()):
                raise ArgumentError(f"{one!r} draws noise: its samples cannot be told from a fine solution")
            found.append(Try(one, "its own", grid))
    return found


def _trained(
    trial: Trial,
    ranked: Sequence[Try],
    untuned: Try,
    train: slice,
    chooses: slice,
    rounds: int,
    batch_size: int,
    clock: Clock,
) -> Try:
    """The best that training finds, by the samples that choose; that may be the untuned one."""
    cond = dict(trial.cond or {})
    truth = trial.truth.flatten(1).double().cpu()
    whole = Pairs(trial.denoiser, trial.x_T, truth, trial.features, cond, batch_size, clock)
    goal = trial.squares(untuned, chooses)

    def told(squares: Tensor) -> None:
        done, left = ratio(squares, goal) ** 0.5, max(clock.left, 0.0)
        trial.bar.set_description(f"tuning for nfe={trial.nfe}: {done:.3f} of the best untuned, {left:.1f} min left")

    def further(start: Numbers, rounds: int, minutes: float) -> tuple[Numbers, Tensor | None]:
        part = replace(whole, clock=Clock(minutes))
        return learn(start, part.part(train), part.part(chooses), rounds, told)

    moves = label_in_steps(trial.denoiser, trial.denoiser.sde.t_min, trial.denoiser.sde.t_max) is None
    parts = ((apart(one.solver), one.grid) for one in ranked)
    going = [Numbers.of(own, grid, more, moves) for (own, more), grid in parts]
    best, squares, now, left = going[0], None, min(FIRST, rounds), rounds
    while left and clock.left > 0:
        share = clock.left / (1 if len(going) == 1 else 2 * len(going))
        tried = [further(one, now, share) for one in going if clock.left > 0]
        found = [(numbers, value) for numbers, value in tried if value is not None]
        if not found:
            break
        cap = common_cap(*(value for _, value in found))
        found.sort(key=lambda one: float(capped(one[1], cap).mean()))
        (best, squares), going = found[0], [one for one, _ in found[: math.ceil(len(going) / 3)]]
        left -= now
        now = left if len(going) == 1 else min(3 * now, left)
    return untuned if squares is None or not ratio(squares, goal) < 1 else _tried(trial, best)


def _apart(trial: Trial, ranked: Sequence[Try], part: slice) -> list[Try]:
    """Without those whose samples are as far off as another's, to a hundredth: what has two names, or nearly."""
    kept: list[Try] = []
    for one in ranked:
        mine = trial.squares(one, part)
        if not any(torch.allclose(mine, trial.squares(other, part), rtol=0.01, atol=0) for other in kept):
            kept.append(one)
    return kept


def _tried(trial: Trial, numbers: Numbers) -> Try:
    grid = Grid(trial.denoiser.sde, numbers.times)
    tuned = TunedSolver(
        numbers.solver, tuple(grid.times.tolist()), grid.sde, trial.nfe, corrections=numbers.corrections()
    )
    return Try(tuned, "tuned", grid)
