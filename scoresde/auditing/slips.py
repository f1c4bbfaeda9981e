"""Which slip of the pen makes a known solver the sampler that is audited.

A wrong letter leaves most of a table as it was. Beside the nearest solver, stage by stage, a column of the sampler's
rows is a factor times the right one, its square, its root, that of another row, or the right one with sigma_t for
sigma_s. The weights b_k are looked at as they are, for two in each other's place or at another value, and by their
moments about the newest,

    mu_j = sum_k b_ik (chi_{i-k} - chi_i)^j

which are what a step makes of the j-th difference of F in the variable chi: lambda, sigma / alpha, t or the angle.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from scoresde.auditing.columns import close, column
from scoresde.auditing.labels import of_times, way_up
from scoresde.auditing.nearest import Nearest, by_lag, candidates, differ, in_view, known_on, rows_of
from scoresde.auditing.rates import Signature
from scoresde.auditing.table import Responses, responses_of
from scoresde.grid import Grid

__all__ = ["UNNAMED", "is_plain", "named", "nearest_first"]

_COST = {"another formula": 6.0, "a term too much": 4.0, "a row": 3.0, "a missing term": 1.5, "another start": 2.0,
         "other times": 3.0, "a factor": 1.2}  # fmt: skip
UNNAMED = ("another formula", "a row", "a term too much", "another start", "other times")
"""What a slip is called that no slip of the pen explains."""

_DIFFERENCES = ("the value itself", "the first difference", "the second difference", "the third difference")


def named(found: Responses, grid: Grid, order: int | None = None) -> tuple[Nearest | None, list[Signature]]:
    """The known solver from which the fewest slips, and such as have a name, lead to a sampler, and the slips; none if
    it is that solver. Solvers of another order than the sampler claims count as farther.
    """
    if special := _special(found, grid):
        return None, [special]
    near = candidates(found, grid)
    if (not near or not near[0].same_times) and (fewer := _fewer(found, grid)):
        return None, [fewer]
    if not near:
        return None, []
    if near[0].equal:
        return near[0], []
    return nearest_first(near, order)[0]


def nearest_first(near: list[Nearest], order: int | None) -> list[tuple[Nearest, list[Signature]]]:
    """Known solvers with the slips that lead from each to the sampler, those with the plainest first."""

    def plain(pair: tuple[Nearest, list[Signature]]) -> float:
        it, found_slips = pair
        other = order is not None and it.order is not None and it.order != order
        return _cost(found_slips) + 0.7 * other + 0.02 * it.score[0]

    return sorted(((it, slips(it)) for it in near), key=plain)


def is_plain(found: list[Signature]) -> bool:
    """Whether one slip, with a name, explains all (or one that has two readings, of one text)."""
    return _cost(list({slip.text: slip for slip in found}.values())) <= max(_COST["a factor"], _COST["a missing term"])


def _cost(found: list[Signature]) -> float:
    """How little they explain."""
    return sum(_COST.get(slip.name, 1.0) for slip in found) if found else 9.0


def _special(found: Responses, grid: Grid) -> Signature | None:
    """A last step that is not taken, or a way up whose noise is not that of its times."""
    noisy = float(grid.sde.sigma(grid.times[-1])) > 0
    last = found.B[-1]
    if noisy and abs(float(found.A[-1])) < 1e-12 and int((last.abs() > 1e-9).sum()) == 1 and abs(last[-1] - 1) < 1e-9:
        return Signature(
            "the last step skipped", "its last step returns the model's mean, whatever noise there is to be", 1.0
        )
    if grid.steps > 2:
        shorter = Grid(grid.sde, grid.times[:-1])
        if any(near.equal for near in candidates(found, shorter, 1)):
            return Signature("the last step skipped", "it stops one step before the end of the grid", 1.0)
    return way_up(found, grid)


def _fewer(found: Responses, grid: Grid) -> Signature | None:
    """The evaluations of a known solver, but for one stage."""
    for name, _, _, answers, base in known_on(grid):
        t, stage = answers.t, torch.arange(len(base)) - base
        for k in range(int(stage.max()) + 1) if int(stage.max()) else ():
            left = t[stage != k]
            if len(left) == len(found.t) and torch.allclose(left, found.t, rtol=1e-6):
                text = f"the evaluation of stage {k + 1} of {name} is never made: another is read in its place"
                return Signature("an index", text, 1.0)
    return None


def slips(near: Nearest) -> list[Signature]:
    """What differs from a known solver, by name where it has one."""
    if not near.same_times:
        return of_times(near)
    if swapped := _swapped_rows(near):
        return [swapped]
    out: list[Signature] = []
    for stage in near.stage.unique().tolist():
        mask = near.stage == stage
        where = "" if int(near.stage.max()) == 0 else f" in stage {stage + 1}"
        for what, own, right in (("the factor of the state", near.own.a, near.right.a),
                                 ("the noise", near.own.c, near.right.c)):  # fmt: skip
            size = torch.maximum(own.abs(), right.abs())
            if what == "the noise":  # nothing is what rounding leaves of the level
                size = torch.maximum(size, 1e-8 * near.found.sde.sigma(near.found.t))
            out += column(near, f"{what}{where}", own, right, mask, size)
        out += _weights(near, near.own.b, near.right.b, mask, where)
    if getattr(near.solver, "corrector", 0) and close(near.own.c, near.right.c):
        out = min([out, *(found for found in _corrected(near) if found)], key=_cost)
    return out


def _corrected(near: Nearest) -> Iterator[list[Signature]]:
    """Of a predictor with a corrector: what differs if the one of them is right, or the other."""
    alone = replace(cast(Any, near.solver), corrector=0).tableau(near.table.grid)
    R, on = len(near.found.t), near.table.evaluates
    base, p, q = torch.arange(R), near.table.p[on], near.table.q[on]
    predictor = rows_of(in_view(responses_of(alone), p, q), base).b
    own, right = (in_view(it, p, q) for it in (near.found, near.answers))
    # The corrected states do not know the predictor but by what the model was asked: what the states differ by is its.
    off = by_lag(own[1:, 1 : R + 1] - right[1:, 1 : R + 1])
    every = torch.ones(R, dtype=torch.bool)
    yield _weights(near, predictor + off, predictor, every, " in the predictor")
    yield _weights(near, near.own.b - predictor, near.right.b - predictor, every, " in the corrector")
    before = torch.zeros_like(predictor)
    before[1:, 1:] = predictor[:-1, :-1]
    mine, theirs = (
        (rows.b - predictor) / rows.a[:, None].clamp(min=1e-300) + before for rows in (near.own, near.right)
    )
    yield _weights(near, mine, theirs, every, " in the corrector")
    if torch.allclose(near.own.b, predictor, rtol=1e-6, atol=1e-12):
        yield [
            Signature("an index", f"it goes on from the prediction: the corrector of {near.name} is never read", 1.0)
        ]


# --- weights ---------------------------------------------------------------------------------------------------------


def _variables(near: Nearest) -> dict[str, Tensor]:
    """The nodes of the evaluations, with that of the grid's end, in each variable."""
    t = torch.cat([near.found.t, near.table.grid.times[-1:]])
    lam = near.found.sde.half_log_snr(t)
    u = (-lam).exp()
    return {"lambda": lam, "sigma / alpha": u, "t": t, "the angle": u.atan()}


def _weights(near: Nearest, own: Tensor, right: Tensor, mask: Tensor, where: str) -> list[Signature]:
    """What differs in the weights of these rows, in the fewest words."""
    size = torch.maximum(torch.maximum(own.abs(), right.abs()).amax(1), 0.1 * near.right.b.abs().amax(1))
    wrong = mask & differ(own, right, size[:, None], 10 * near.found.tol).any(1)
    if not bool(wrong.any()):
        return []
    if early := _early(near, own, right, mask, wrong, where):
        return [early]
    used = int((torch.maximum(own.abs(), right.abs())[mask] > 1e-7 * size[mask, None]).any(0).nonzero().max()) + 1
    own, right = own[:, :used], right[:, :used]
    stage = int(near.stage[mask].max())
    if stage < int(near.stage.max()) and bool((own[wrong].abs() <= 1e-9 * size[wrong, None]).all()):
        return [Signature("an index", f"stage {stage + 2} of {near.name} is asked at the state before the step", 1.0)]
    if late := _of_other_step(near, own, right, wrong, where):
        return [late]
    found = _moved(near, own, right, wrong, where) or _exchanged(near, own, right, wrong, where)
    choices: list[list[Signature]] = [[found]] if found else []
    raw: list[Signature] = []
    for k in range(used):
        raw += column(near, f"b_{k}{where}", own[:, k], right[:, k], mask, size)
    choices.append(raw)
    for name, chi in _variables(near).items():
        if not bool(chi[:-1].isfinite().all()):
            continue
        if shifted := _shifted_nodes(near, own, right, wrong, chi, name, where):
            choices.append([shifted])
        if used > 5:
            continue
        past = _past(chi[:-1], used, near.stage)
        moments: list[Signature] = []
        for j in range(min(used, 4)):
            what = _DIFFERENCES[j] + ("" if j == 0 or name == "lambda" else f" by {name}") + where
            mine, theirs = ((b * past**j).sum(1) for b in (own, right))
            unit = (torch.maximum(own.abs(), right.abs()) * past.abs() ** j).sum(1)
            moments += column(near, what, mine, theirs, mask, unit)
        choices.append(moments)
        if name == "lambda" and used == 3 and (found := _two_parts(near, own, right, wrong, past, where)):
            choices.append([found])
    return min([choice for choice in choices if choice] or [[]], key=_cost)


def _past(chi: Tensor, used: int, stage: Tensor) -> Tensor:
    """chi_{i-k} - chi_i, zero where there is none, shape (R, used); in a step of several stages, from its start."""
    R = len(chi)
    row = torch.arange(R)
    at = row[:, None] - torch.arange(used)
    start = chi[row - stage] if int(stage.max()) else chi
    return torch.where(at >= 0, chi[at.clamp(min=0)] - start[:, None], 0.0)


def _two_parts(near: Nearest, own: Tensor, right: Tensor, wrong: Tensor, past: Tensor, where: str) -> Signature | None:
    """Of three values the second difference enters twice: by itself, and in the slope at the newest value, which is the
    first difference and h_before / (h + h_before) of the second's. One of the two may be a factor times what it is.
    """
    rows = wrong & (past[:, 2] != 0)
    if int(rows.sum()) < 6:
        return None
    first, second = ((right * past**j).sum(1)[rows] for j in (1, 2))
    off = ((own - right) * past**2).sum(1)[rows]
    lower = ((own - right).sum(1).abs() + ((own - right) * past).sum(1).abs())[rows]
    parts = torch.stack([second, -past[rows, 1] * first], 1)
    fit = torch.linalg.lstsq(parts, off[:, None]).solution[:, 0]
    if float(lower.max()) > 1e-6 or float((parts @ fit - off).abs().max()) > 1e-4 * float(off.abs().max()):
        return None
    for share, what in zip(
        (fit + 1).tolist(), ("the second difference", "the second difference in the slope"), strict=True
    ):
        if abs(share + 1) < 1e-3:
            return Signature("a sign", f"{what}{where} of {near.name} has the other sign", 2.0)
        if abs(share - 1) > 1e-3:
            name = "second difference halved" if abs(share - 0.5) < 1e-3 else "a factor"
            return Signature(
                name, f"{what}{where} of {near.name} is {share:.4g} times what it should be", abs(share - 1)
            )
    return None


def _early(near: Nearest, own: Tensor, right: Tensor, mask: Tensor, wrong: Tensor, where: str) -> Signature | None:
    """Only the first rows differ."""
    rows = wrong.nonzero().flatten().tolist()
    if int(mask.sum()) < 6 or rows != list(range(len(rows))) or len(rows) > 3:
        return None
    off = ((own - right).sum(1) / right.sum(1))[wrong]
    if float(off.abs().max()) > 1e-3:
        first = "row" if len(rows) == 1 else f"{len(rows)} rows"
        text = f"the weights of {near.name} in the first {first}{where} do not add up: they read values from before it"
        return Signature("an index", text, float(off.abs().max()))
    return Signature("another start", f"only the start{where} is not that of {near.name}", 0.0)


def _of_other_step(near: Nearest, own: Tensor, right: Tensor, wrong: Tensor, where: str) -> Signature | None:
    """The shares of the values are those of the step before, or after."""
    if own.shape[1] < 2 or int(near.stage.max()):
        return None
    mine, theirs = (b / b.sum(1, keepdim=True) for b in (own, right))
    for by, word in ((-1, "before"), (1, "after")):
        rows = wrong.nonzero().flatten()
        rows = rows[(rows + by >= own.shape[1]) & (rows + by < len(own)) & (rows >= own.shape[1])]
        if len(rows) > 2 and bool(torch.allclose(mine[rows], theirs[rows + by], rtol=1e-5, atol=1e-9)):
            return Signature("an index", f"the weights{where} of {near.name} are those of the step {word}", 1.0)
    return None


def _exchanged(near: Nearest, own: Tensor, right: Tensor, wrong: Tensor, where: str) -> Signature | None:
    """Two weights in each other's place, or all in the other order."""
    used = own.shape[1]
    for order in itertools.permutations(range(used)) if used <= 5 else ():
        if list(order) == sorted(order) or any(order[order[k]] != k for k in range(used)):  # exchanges, no rotations
            continue
        full = wrong & (right.abs() > 1e-12).all(1) if used > 2 else wrong
        full = full if bool(full.any()) else wrong
        if close(own[full], right[full][:, list(order)]):
            moved = [k for k in range(used) if order[k] != k]
            names = " and ".join(f"b_{k}" for k in moved) if len(moved) < 4 else "the weights"
            return Signature("swapped weights", f"{names}{where} of {near.name} are in each other's place", 1.0)
    return None


def _moved(near: Nearest, own: Tensor, right: Tensor, wrong: Tensor, where: str) -> Signature | None:
    """A weight that is right, or a factor times the right one, and of another value."""
    off = [k for k in range(own.shape[1]) if not close(own[wrong][:, k], right[wrong][:, k])]
    for j, k in itertools.permutations(off, 2):
        gone = float(own[wrong][:, k].abs().max()) < 1e-9
        if gone and close(own[wrong][:, j], (right[:, j] + right[:, k])[wrong]):
            return Signature("an index", f"it reads F_{{i-{j}}} once more for F_{{i-{k}}} of {near.name}{where}", 1.0)
        zero = gone and float(right[wrong][:, j].abs().max()) < 1e-9
        others = all(close(own[wrong][:, i], right[wrong][:, i]) for i in off if i not in (j, k, 0))
        ratio = own[wrong][:, j] / right[wrong][:, k]
        if zero and others and float(ratio.std(correction=0)) < 0.05 * float(ratio.abs().mean()):
            return Signature("an index", f"it reads F_{{i-{j}}} where {near.name} reads F_{{i-{k}}}{where}", 1.0)
    return None


def _shifted_nodes(
    near: Nearest, own: Tensor, right: Tensor, wrong: Tensor, chi: Tensor, name: str, where: str
) -> Signature | None:
    """Right weights of a polynomial whose nodes are those of the values after, or before."""
    used, R = own.shape[1], len(own)
    if used < 2 or where or int(near.stage.max()) > 0 or not bool(chi[-1].isfinite()):
        return None
    rows = torch.arange(used, R)
    lag = torch.arange(used)
    base = chi[rows][:, None]
    for by, word in ((1, "after"), (-1, "before")):
        here, there = chi[rows[:, None] - lag] - base, chi[(rows[:, None] - lag + by).clamp(min=0)] - base
        same = True
        for j in range(used):
            mine, theirs = (own[rows] * there**j).sum(1), (right[rows] * here**j).sum(1)
            unit = (right[rows] * here**j).abs().sum(1) + (own[rows] * there**j).abs().sum(1)
            same &= bool(((mine - theirs).abs() <= 1e-5 * unit.clamp(min=1e-300)).all())
        if same:
            text = f"its values count as those of the node {word}: the polynomial in {name} of {near.name}, a step off"
            return Signature("an index", text, 1.0)
    return None


# --- rows -----------------------------------------------------------------------------------------------------------


def _swapped_rows(near: Nearest) -> Signature | None:
    own, right = (torch.cat([r.a[:, None], r.b, r.c[:, None]], 1) for r in (near.own, near.right))
    for i, j in itertools.combinations(near.wrong.nonzero().flatten().tolist()[:12], 2):
        if close(own[i], right[j]) and close(own[j], right[i]):
            return Signature("swapped rows", f"rows {i} and {j} of {near.name} are in each other's place", 1.0)
    return None
