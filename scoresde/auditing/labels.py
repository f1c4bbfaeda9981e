"""The times at which a sampler asks its model: rounded, of another evaluation, in another order, or not those of the
noise that it added.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scoresde.auditing.nearest import Nearest, differ
from scoresde.auditing.rates import Signature
from scoresde.auditing.table import Responses
from scoresde.grid import Grid

__all__ = ["of_times", "quantised", "way_up"]


def quantised(t: Tensor, t_max: float) -> str:
    """What all of the times are whole multiples of, or the format that they are numbers of; "" if of nothing coarse.

    >>> quantised(torch.tensor([0.25, 0.5], dtype=torch.float64), 1.0)
    '0.01'
    >>> quantised(torch.tensor([1 / 3, 0.5], dtype=torch.float64).bfloat16().double(), 1.0)
    'bfloat16'
    """
    for scale in (1.0, 1.0 / t_max):
        for digits in range(5):
            x = t * scale * 10.0**digits
            if bool(torch.isclose(x, x.round(), rtol=3e-7, atol=1e-9).all()):
                return f"{10.0**-digits / scale:g}"
    for kind, name in ((torch.bfloat16, "bfloat16"), (torch.float16, "float16")):
        if torch.equal(t.to(kind).double(), t):
            return name
    return ""


def of_times(near: Nearest) -> list[Signature]:
    """Where it asks its model, beside where the nearest solver does; two readings where there are two."""
    own, right = near.found.t, near.answers.t
    effect = float(((own - right).abs() / right).max())
    if (unit := quantised(own, near.table.grid.sde.t_max)) and not quantised(right, near.table.grid.sde.t_max):
        return [Signature("rounded labels", f"its times are those of {near.name}, rounded to {unit}", effect)]
    off = differ(own, right, right, 1e-5)
    for by, word in ((1, "next"), (-1, "previous")):
        if int(off.sum()) > 2 and torch.allclose(own[1:-1], right.roll(-by)[1:-1], rtol=1e-6):
            text = f"it asks its model at the time of the {word} evaluation of {near.name}"
            return [Signature("an index", text, effect)]
    step = near.table.step[near.table.evaluates]
    if all(
        torch.allclose(own[step == i].sort().values, right[step == i].sort().values, rtol=1e-6) for i in step.tolist()
    ):
        return [Signature("swapped rows", f"stages of {near.name} are in each other's place", effect)]
    if share := _share(near, own, right):
        kinds, text = share
        return [Signature(kind, text, effect) for kind in kinds]
    text = f"{int(off.sum())} of its {len(own)} times are not those of {near.name}, by up to {effect:.2g} of them"
    return [Signature("other times", text, effect)]


def _share(near: Nearest, own: Tensor, right: Tensor) -> tuple[list[str], str] | None:
    """One stage of every step at another share of it, in some variable: a factor, and perhaps another stage's place."""
    sde, (t, s) = near.found.sde, near.ends
    off = (own / right - 1).abs() > 1e-5
    stages = near.stage[off].unique()
    if len(stages) != 1:
        return None
    rows = off & (near.stage == stages[0])
    for name, chi in (
        ("lambda", sde.half_log_snr),
        ("sigma / alpha", lambda t: sde.sigma(t) / sde.alpha(t)),
        ("t", lambda t: t),
    ):
        first, last = chi(t)[rows], chi(s)[rows]
        mine, theirs = ((chi(at)[rows] - first) / (last - first) for at in (own, right))
        if bool(torch.allclose(mine, mine[:1], rtol=1e-6)) and bool(torch.allclose(theirs, theirs[:1], rtol=1e-6)):
            step = near.table.step[near.table.evaluates]
            others = right[(step == step[rows][0]) & ~rows]
            taken = bool(torch.isclose(others, own[rows][0], rtol=1e-6).any())
            return ["an index", "a factor"] if taken else ["a factor"], (
                f"stage {int(stages[0]) + 1} of {near.name} is asked {float(mine[0]):.3g} of the step on in {name}, "
                f"for {float(theirs[0]):.3g}"
            )
    return None


def way_up(found: Responses, grid: Grid) -> Signature | None:
    """What is wrong with the noise by which a sampler goes back up (churn, Restart, time travel), if it does: from s
    to t it is c^2 = sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2 for an s of the grid.
    """
    sde, nodes = grid.sde, grid.times[1:]
    rows = [j for j in range(1, len(found.t)) if float(found.t[j]) > float(found.t[j - 1]) * (1 + 1e-9)]
    new = [(found.C[:j] == 0).all(0) & (found.C[j] != 0) for j in rows]
    if not rows or not all(bool(columns.any()) for columns in new):
        return None
    # Beside it there may be that of the step before.
    most = max(int(columns.sum()) for columns in new)
    drawn = [found.C[j, columns].abs() for j, columns in zip(rows, new, strict=True)]
    c = torch.stack([torch.nn.functional.pad(own, (0, most - len(own)), value=torch.nan) for own in drawn])
    t = found.t[torch.tensor(rows)]

    def needed(t: Tensor) -> Tensor:
        """Of each way up, from each node below: shape (ways, nodes)."""
        ratio = sde.alpha(t)[:, None] / sde.alpha(nodes)
        left = sde.sigma(t)[:, None] ** 2 - (ratio * sde.sigma(nodes)) ** 2
        return torch.where(nodes < t[:, None], left.clamp(min=0).sqrt(), torch.inf)

    def fits(noise: Tensor, right: Tensor) -> bool:
        return bool(torch.isclose(noise[:, :, None], right[:, None], rtol=1e-5).flatten(1).any(1).all())

    right, alpha = needed(t), sde.alpha(t)[:, None]
    if fits(c, right):
        return None
    if fits(c, right**2) or fits(c, right**2 / alpha):
        return Signature("a missing square root", "the noise of its way up is the square of what it should be", 1.0)
    for factor in (0.5, 2.0, 2.0**0.5, 0.5**0.5):
        if fits(c / factor, right):
            return Signature("a factor", f"the noise of its way up is {factor:.3g} times what it should be", factor)
    for by, word in ((1, "later"), (-1, "earlier")):
        at = torch.searchsorted(grid.times.flip(0), t)
        other = grid.times.flip(0)[(at - by).clamp(0, grid.steps)]
        if fits(c, needed(other)):
            text = f"the noise of its way up is that of a node {word} than the one at which it asks its model"
            return Signature("an index", text, 1.0)
    return None
