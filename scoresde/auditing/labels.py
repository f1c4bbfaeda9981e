"""The times at which a sampler asks its model: rounded, of another evaluation, in another order."""

from __future__ import annotations

import torch
from torch import Tensor

from scoresde.auditing.nearest import Nearest, differ
from scoresde.auditing.rates import Signature

__all__ = ["of_times", "quantised"]


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


def of_times(near: Nearest) -> Signature:
    """Where it asks its model, beside where the nearest solver does."""
    own, right = near.found.t, near.answers.t
    effect = float(((own - right).abs() / right).max())
    if (unit := quantised(own, near.table.grid.sde.t_max)) and not quantised(right, near.table.grid.sde.t_max):
        return Signature("rounded labels", f"its times are those of {near.name}, rounded to {unit}", effect)
    off = differ(own, right, right, 1e-5)
    for by, word in ((1, "next"), (-1, "previous")):
        if int(off.sum()) > 2 and torch.allclose(own[1:-1], right.roll(-by)[1:-1], rtol=1e-6):
            return Signature(
                "an index", f"it asks its model at the time of the {word} evaluation of {near.name}", effect
            )
    step = near.table.step[near.table.evaluates]
    if all(
        torch.allclose(own[step == i].sort().values, right[step == i].sort().values, rtol=1e-6) for i in step.tolist()
    ):
        return Signature("swapped rows", f"stages of {near.name} are in each other's place", effect)
    if share := _share(near, own, right):
        return Signature("a factor", share, effect)
    text = f"{int(off.sum())} of its {len(own)} times are not those of {near.name}, by up to {effect:.2g} of them"
    return Signature("other times", text, effect)


def _share(near: Nearest, own: Tensor, right: Tensor) -> str:
    """One stage of every step at another share of it, in some variable."""
    sde, (t, s) = near.found.sde, near.ends
    off = (own / right - 1).abs() > 1e-5
    stages = near.stage[off].unique()
    if len(stages) != 1:
        return ""
    rows = off & (near.stage == stages[0])
    for name, chi in (
        ("lambda", sde.half_log_snr),
        ("sigma / alpha", lambda t: sde.sigma(t) / sde.alpha(t)),
        ("t", lambda t: t),
    ):
        first, last = chi(t)[rows], chi(s)[rows]
        mine, theirs = ((chi(at)[rows] - first) / (last - first) for at in (own, right))
        if bool(torch.allclose(mine, mine[:1], rtol=1e-6)) and bool(torch.allclose(theirs, theirs[:1], rtol=1e-6)):
            return (
                f"stage {int(stages[0]) + 1} of {near.name} is asked {float(mine[0]):.3g} of the step on in {name}, "
                f"for {float(theirs[0]):.3g}"
            )
    return ""
