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
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from scoresde.auditing.labels import of_times
from scoresde.auditing.nearest import Nearest, by_lag, candidates, differ, in_view, known_on, rows_of
from scoresde.auditing.rates import Signature
from scoresde.auditing.table import Responses, responses_of
from scoresde.grid import Grid
from scoresde.solvers.exponential import UniPC

__all__ = ["UNNAMED", "named"]

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
    explained = [(it, slips(it)) for it in near]

    def plain(pair: tuple[Nearest, list[Signature]]) -> float:
        it, found_slips = pair
        other = order is not None and it.order is not None and it.order != order
        return _cost(found_slips) + 0.7 * other + 0.02 * it.score[0]

    return min(explained, key=plain)


def _cost(found: list[Signature]) -> float:
    """How little they explain."""
    return sum(_COST.get(slip.name, 1.0) for slip in found) if found else 9.0


def _special(found: Responses, grid: Grid) -> Signature | None:
    """A last step that is not taken."""
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
    return None


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
        return [of_times(near)]
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
            out += _column(near, f"{what}{where}", own, right, mask, size)
        out += _weights(near, near.own.b, near.right.b, mask, where)
    if isinstance(near.solver, UniPC) and near.solver.corrector and _close(near.own.c, near.right.c):
        out = min([out, *(found for found in _corrected(near) if found)], key=_cost)
    return out


def _corrected(near: Nearest) -> Iterator[list[Signature]]:
    """Of a predictor with a corrector: what differs if the one of them is right, or the other."""
    assert isinstance(near.solver, UniPC)
    alone = replace(near.solver, corrector=False).tableau(near.table.grid)
    R, on = len(near.found.t), near.table.evaluates
    base, p, q = torch.arange(R), near.table.p[on], near.table.q[on]
    predictor = rows_of(in_view(responses_of(alone), p, q), base).b
    own, right = (in_view(it, p, q) for it in (near.found, responses_of(near.table)))
    # The corrected states do not know the predictor but by what the model was asked: what the states differ by is its.
    off = by_lag(own[1:, 1 : R + 1] - right[1:, 1 : R + 1])
    every = torch.ones(R, dtype=torch.bool)
    yield _weights(near, predictor + off, predictor, every, " in the predictor")
    yield _weights(near, near.own.b - predictor, near.right.b - predictor, every, " in the corrector")
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
    found = _moved(near, own, right, wrong, where) or _exchanged(near, own, right, wrong, where)
    choices: list[list[Signature]] = [[found]] if found else []
    raw: list[Signature] = []
    for k in range(used):
        raw += _column(near, f"b_{k}{where}", own[:, k], right[:, k], mask, size)
    choices.append(raw)
    for name, chi in _variables(near).items():
        if not bool(chi[:-1].isfinite().all()):
            continue
        if shifted := _shifted_nodes(near, own, right, wrong, chi, name, where):
            choices.append([shifted])
        if used > 5:
            continue
        past = _past(chi[:-1], used)
        moments: list[Signature] = []
        for j in range(min(used, 4)):
            what = _DIFFERENCES[j] + ("" if j == 0 or name == "lambda" else f" by {name}") + where
            mine, theirs = ((b * past**j).sum(1) for b in (own, right))
            unit = (torch.maximum(own.abs(), right.abs()) * past.abs() ** j).sum(1)
            moments += _column(near, what, mine, theirs, mask, unit)
        choices.append(moments)
    return min([choice for choice in choices if choice] or [[]], key=_cost)


def _past(chi: Tensor, used: int) -> Tensor:
    """chi_{i-k} - chi_i, zero where there is none, shape (R, used)."""
    R = len(chi)
    at = torch.arange(R)[:, None] - torch.arange(used)
    return torch.where(at >= 0, chi[at.clamp(min=0)] - chi[:, None], 0.0)


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


def _exchanged(near: Nearest, own: Tensor, right: Tensor, wrong: Tensor, where: str) -> Signature | None:
    """Two weights in each other's place, or all in the other order."""
    used = own.shape[1]
    for order in itertools.islice(itertools.permutations(range(used)), 130):
        if used > 5 or list(order) == sorted(order):
            continue
        full = wrong & (right.abs() > 1e-12).all(1) if used > 2 else wrong
        full = full if bool(full.any()) else wrong
        if _close(own[full], right[full][:, list(order)]):
            moved = [k for k in range(used) if order[k] != k]
            names = " and ".join(f"b_{k}" for k in moved) if len(moved) < 4 else "the weights"
            return Signature("swapped weights", f"{names}{where} of {near.name} are in each other's place", 1.0)
    return None


def _close(a: Tensor, b: Tensor) -> bool:
    return bool(((a - b).abs() <= 1e-4 * torch.maximum(a.abs(), b.abs()).amax()).all()) if a.numel() else False


def _moved(near: Nearest, own: Tensor, right: Tensor, wrong: Tensor, where: str) -> Signature | None:
    """A weight that is right, or a factor times the right one, and of another value."""
    off = [k for k in range(own.shape[1]) if not _close(own[wrong][:, k], right[wrong][:, k])]
    for j, k in itertools.permutations(off, 2):
        zero = float(right[wrong][:, j].abs().max()) < 1e-9 and float(own[wrong][:, k].abs().max()) < 1e-9
        others = all(_close(own[wrong][:, i], right[wrong][:, i]) for i in off if i not in (j, k, 0))
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


# --- a column --------------------------------------------------------------------------------------------------------


class _Where(NamedTuple):
    rows: list[int]
    text: str


def _column(
    near: Nearest, what: str, own: Tensor, right: Tensor, mask: Tensor, size: Tensor | None = None
) -> list[Signature]:
    """The slip that makes a column of the right rows the sampler's; none if it is right."""
    size = torch.maximum(right.abs(), own.abs()) if size is None else size
    wrong = mask & differ(own, right, size.clamp(min=1e-12), 10 * near.found.tol)
    if not bool(wrong.any()):
        return []
    rows = wrong.nonzero().flatten().tolist()
    some = len(rows) > 0.6 * int(mask.sum())
    text = "every row" if some else f"row{'s' * (len(rows) > 1)} {', '.join(map(str, rows[:6]))}"
    return [_slip(near, what, own, right, wrong, _Where(rows, text))]


def _slip(near: Nearest, what: str, own: Tensor, right: Tensor, wrong: Tensor, where: _Where) -> Signature:
    mine, theirs = own[wrong], right[wrong]
    noise = what.startswith("the noise")
    effect = float(((mine - theirs).abs() / theirs.abs().clamp(min=1e-300)).median().clamp(max=1e6))

    def said(name: str, how: str) -> Signature:
        return Signature(name, f"{what} of {near.name} {how} ({where.text})", effect)

    if bool((theirs.abs() < 1e-12).all()):
        if noise:
            return said("noise once too much", f"is {float(mine.abs().max()):.3g} where there is none")
        return said("a term too much", "is there where none belongs")
    ratio = mine / theirs
    small = float((ratio - 1).abs().max())
    if small < 1e-3:
        return said("float32 coefficients", f"is off by up to {small:.1e}")
    if bool((mine.abs() < 1e-9 * theirs.abs()).all()):
        return said("a missing term", "is left out")
    many = len(where.rows) > 1
    if bool(ratio.isfinite().all()) and float(ratio.std(correction=0)) <= 1e-3 * float(ratio.abs().mean()):
        r = float(ratio.mean())
        if abs(r + 1) < 1e-3:
            return said("a sign", "has the other sign")
        if abs(r - 0.5) < 1e-3 and "difference" in what and many:
            return said(f"{' '.join(what.split()[1:3])} halved", "is halved")
        if noise and abs(r / math.sqrt(2) - 1) < 1e-3:
            return said("noise once too much", "is sqrt(2) times what it should be, as if drawn twice")
        if many:
            return said("a factor", f"is {r:.4g} times what it should be")
    if many and noise and (name := _power(near, mine, theirs, wrong)):
        return said(*name)
    if many and bool((ratio > 0).all()) and (letter := _letter(near, ratio.log(), wrong)):
        if noise and letter.startswith("sigma_t for sigma_s"):
            return said("variance beta for beta-tilde", "has sigma_t for sigma_s: the variance beta, not beta-tilde")
        return said("an index", f"has {letter}")
    if what.startswith("the value itself") and (letter := _ends(near, own, wrong)):
        return said("an index", letter)
    if shift := _of_neighbour(own, right, where.rows):
        return said("an index", f"is that of the {shift} row")
    if not many:
        return said("a row", f"is {float(ratio[0]):.4g} times what it should be")
    return said("another formula", f"is {float(ratio.min()):.3g} to {float(ratio.max()):.3g} times what it should be")


def _power(near: Nearest, mine: Tensor, theirs: Tensor, wrong: Tensor) -> tuple[str, str] | None:
    """The noise as the square or the root of the right one, or with the variance beta."""
    for value, name, how in (
        (mine / theirs**2, "a missing square root", "is its square"),
        (mine / theirs.sqrt(), "a missing square", "is its root"),
    ):
        if float(value.std(correction=0)) <= 1e-3 * float(value.mean()):
            return name, how
    sde, times = near.found.sde, near.table.grid.times
    asked = torch.cat([near.found.t, times[-1:]])[1:][wrong]  # where a churn ends, that another evaluation follows
    left = sde.sigma(asked) - (sde.sigma(asked) ** 2 - theirs**2).clamp(min=0).sqrt()
    if bool(torch.allclose(mine, left, rtol=1e-4, atol=1e-9)):
        return "a missing square", "is a difference of levels, not the root of that of their squares"
    step = near.table.step[near.table.evaluates][wrong]
    t, s = times[step], times[step + 1]
    beta = (sde.sigma(t) ** 2 - (sde.alpha(t) / sde.alpha(s)) ** 2 * sde.sigma(s) ** 2).clamp(min=0).sqrt()
    if bool(torch.allclose(mine, beta, rtol=1e-4)):
        return "variance beta for beta-tilde", "has the variance beta, not beta-tilde"
    return None


def _letter(near: Nearest, log_ratio: Tensor, wrong: Tensor) -> str:
    """The ratio as a power of sigma, alpha or u = sigma / alpha at t over that at s, or of the last step over this."""
    sde, times = near.found.sde, near.table.grid.times
    step = near.table.step[near.table.evaluates]
    first, last = times[step], times[step + 1]
    h = sde.half_log_snr(last) - sde.half_log_snr(first)
    bases = {
        "sigma": (sde.sigma(first) / sde.sigma(last)).log(),
        "alpha": (sde.alpha(first) / sde.alpha(last)).log(),
        "u": h,
        "h": (torch.cat([h[:1], h[:-1]]) / h).log(),
    }
    for name, base in bases.items():
        base = base[wrong]
        if not bool(base.isfinite().all()) or float(base.abs().median()) < 1e-9:
            continue
        n = float((log_ratio * base).sum() / base.square().sum())
        if not 0.4 < abs(n) < 4.1 or abs(n * 2 - round(n * 2)) > 5e-3:
            continue
        if float((log_ratio - n * base).abs().max()) <= 2e-3 * float(log_ratio.abs().max()):
            power = "" if abs(abs(n) - 1) < 0.01 else f", to the power {abs(n):.2g}"
            if name == "h":
                return f"the step before for the step{power}" if n > 0 else f"the step for the step before{power}"
            return f"{name}_t for {name}_s{power}" if n > 0 else f"{name}_s for {name}_t{power}"
    return ""


def _ends(near: Nearest, own: Tensor, wrong: Tensor) -> str:
    """b = alpha_s - a alpha_t with the alpha of another end."""
    on = near.table.evaluates
    if bool((near.table.p[on] != 0).any()) or bool((near.table.q[on] != 1).any()) or int(near.stage.max()):
        return ""
    sde, times = near.found.sde, near.table.grid.times
    alpha = {"t": sde.alpha(times[:-1]), "s": sde.alpha(times[1:])}
    for one, two in itertools.product("ts", repeat=2):
        if (one, two) != ("s", "t") and _close(own[wrong], (alpha[one] - near.own.a * alpha[two])[wrong]):
            return f"is alpha_{one} - a alpha_{two}, for alpha_s - a alpha_t"
    return ""


def _of_neighbour(own: Tensor, right: Tensor, rows: list[int]) -> str:
    """Whether the wrong rows have the numbers of their neighbours."""
    at = torch.tensor(rows)
    for by, word in ((1, "next"), (-1, "previous")):
        there = at + by
        inside = (there >= 0) & (there < len(own))
        if int(inside.sum()) >= 2 and torch.allclose(own[at[inside]], right[there[inside]], rtol=1e-4):
            return word
    return ""


# --- rows -----------------------------------------------------------------------------------------------------------


def _swapped_rows(near: Nearest) -> Signature | None:
    own, right = (torch.cat([r.a[:, None], r.b, r.c[:, None]], 1) for r in (near.own, near.right))
    for i, j in itertools.combinations(near.wrong.nonzero().flatten().tolist()[:12], 2):
        if _close(own[i], right[j]) and _close(own[j], right[i]):
            return Signature("swapped rows", f"rows {i} and {j} of {near.name} are in each other's place", 1.0)
    return None
