"""One column of a sampler's rows beside the right one: which slip of the pen makes it so."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from scoresde.auditing.nearest import Nearest, differ
from scoresde.auditing.rates import Signature
from scoresde.solvers.rows import forgotten

__all__ = ["close", "column"]


def close(a: Tensor, b: Tensor) -> bool:
    return bool(((a - b).abs() <= 1e-4 * torch.maximum(a.abs(), b.abs()).amax()).all()) if a.numel() else False


class _Where(NamedTuple):
    rows: list[int]
    text: str


def column(
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
    if noise and many and (root := _of_square(near, ratio)):
        return said("a missing square", root)
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
    if many and (decay := _decay(near, mine, theirs, wrong)):
        return said(*decay)
    if many and bool((ratio > 0).all()) and (letter := _letter(near, ratio.log(), wrong)):
        if noise and letter.startswith("sigma_t for sigma_s"):
            return said("variance beta for beta-tilde", "has sigma_t for sigma_s: the variance beta, not beta-tilde")
        return said("an index" if " for " in letter else "a factor", f"has {letter}")
    if what.startswith("the value itself") and (letter := _ends(near, own, wrong)):
        return said("an index", letter)
    if shift := _of_neighbour(own, right, where.rows):
        return said("an index", f"is that of the {shift} row")
    if not many:
        return said("a row", f"is {float(ratio[0]):.4g} times what it should be")
    return said("another formula", f"is {float(ratio.min()):.3g} to {float(ratio.max()):.3g} times what it should be")


def _decay(near: Nearest, mine: Tensor, theirs: Tensor, wrong: Tensor) -> tuple[str, str] | None:
    """A known factor of levels times another power of the same exponential."""
    sde, (t, s) = near.found.sde, (ends[wrong] for ends in near.ends)
    for base in (sde.sigma(s) / sde.sigma(t), sde.alpha(s) / sde.alpha(t)):
        log = (theirs / base).abs().log()
        if float(log.abs().max()) < 1e-6 or not bool(log.isfinite().all()):
            continue
        for power, name, how in (
            (-1.0, "a sign", "has the other sign in its exponential"),
            (2.0, "a factor", "has twice the exponent in its exponential"),
            (0.5, "a factor", "has half the exponent in its exponential"),
        ):
            if bool(torch.allclose(mine, base * (power * log).exp(), rtol=1e-5)):
                return name, how
    return None


def _power(near: Nearest, mine: Tensor, theirs: Tensor, wrong: Tensor) -> tuple[str, str] | None:
    """The noise as the square or the root of the right one, or with the variance beta."""
    for value, name, how in (
        (mine / theirs**2, "a missing square root", "is its square"),
        (mine / theirs.sqrt(), "a missing square", "is its root"),
    ):
        if float(value.std(correction=0)) <= 1e-3 * float(value.mean()):
            return name, how
    sde, (t, s) = near.found.sde, (ends[wrong] for ends in near.ends)
    level = sde.sigma(s)
    kept = (1 - (theirs / level) ** 2).clamp(min=0).sqrt()
    if bool(torch.allclose(mine, level * (1 - kept).sqrt(), rtol=1e-4)):
        return "a missing square", "has the variance sigma_s^2 (1 - q) for sigma_s^2 (1 - q^2)"
    asked = torch.cat([near.found.t, near.table.grid.times[-1:]])[1:][
        wrong
    ]  # where a churn ends, that another evaluation follows
    left = sde.sigma(asked) - (sde.sigma(asked) ** 2 - theirs**2).clamp(min=0).sqrt()
    if bool(torch.allclose(mine, left, rtol=1e-4, atol=1e-9)):
        return "a missing square", "is a difference of levels, not the root of that of their squares"
    if bool(torch.allclose(mine, sde.sigma(t) * forgotten(sde, t, s).sqrt(), rtol=1e-4)):
        return "variance beta for beta-tilde", "has the variance beta, not beta-tilde"
    return None


def _letter(near: Nearest, log_ratio: Tensor, wrong: Tensor) -> str:
    """The ratio as a power of sigma, alpha, u = sigma / alpha, m = alpha + sigma or r at t over that at s, of the last
    step over this, or one of them left out or once too much.
    """
    sde, (first, last) = near.found.sde, near.ends
    h = sde.half_log_snr(last) - sde.half_log_snr(first)
    bases = {
        "sigma": (sde.sigma(first) / sde.sigma(last)).log(),
        "alpha": (sde.alpha(first) / sde.alpha(last)).log(),
        "u": h,
        "m": ((sde.alpha(first) + sde.sigma(first)) / (sde.alpha(last) + sde.sigma(last))).log(),
        "r": (sde.alpha(first).hypot(sde.sigma(first)) / sde.alpha(last).hypot(sde.sigma(last))).log(),
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
    for name, base in (("alpha_t", sde.alpha(first)), ("alpha_s", sde.alpha(last)), ("sigma_t", sde.sigma(first)),
                       ("sigma_s", sde.sigma(last))):  # fmt: skip
        for n, how in ((1, "once too much"), (-1, "left out")):
            log = n * base.log()[wrong]
            if float(log.abs().max()) > 1e-3 and bool(torch.allclose(log_ratio, log, rtol=1e-4, atol=1e-6)):
                return f"{name} {how}"
    return ""


def _ends(near: Nearest, own: Tensor, wrong: Tensor) -> str:
    """b = alpha_s - a alpha_t with the alpha of another end."""
    on = near.table.evaluates
    if bool((near.table.p[on] != 0).any()) or bool((near.table.q[on] != 1).any()) or int(near.stage.max()):
        return ""
    sde, times = near.found.sde, near.table.grid.times
    alpha = {"t": sde.alpha(times[:-1]), "s": sde.alpha(times[1:])}
    for one, two in itertools.product("ts", repeat=2):
        if (one, two) != ("s", "t") and close(own[wrong], (alpha[one] - near.own.a * alpha[two])[wrong]):
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


def _of_square(near: Nearest, ratio: Tensor) -> str:
    """The noise of a solver with the level eta or tau, with its square root in its place."""
    for name in ("eta", "tau"):
        level = getattr(near.solver, name, None)
        if (
            isinstance(level, float)
            and 0 < level != 1
            and bool(torch.allclose(ratio * level**0.5, ratio.new_ones(()), rtol=1e-3))
        ):
            return f"has {name} for {name}^2"
    return ""
