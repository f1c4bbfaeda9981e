"""The limit of a sampler of many steps, and what is wrong with it.

In y = x / alpha, u = sigma / alpha and lambda = -log u every right sampler tends to one of

    dy = kappa (D - y) dlambda + u sqrt(nu) dw,    kappa = 1 + nu / 2

nu = 0 the probability flow, nu = 2 the reverse SDE. Over a window of its steps its table says which kappa the state
has, which the answers of its model, and how much noise there is. A forward drift m f x in the place of f x changes the
first alone, by (1 - m) (d log alpha / dlambda).
"""

from __future__ import annotations

import math
from typing import NamedTuple

from scoresde.auditing.table import Responses

__all__ = ["Rates", "Signature", "factor", "rates"]

_TOL = 0.03


class Signature(NamedTuple):
    """A known way of being wrong.

    Attributes:
        name: of its kind, "a sign" say.
        text: what is so, in a sentence.
        effect: its size, relative to what is right.
    """

    name: str
    text: str
    effect: float


def factor(what: str, ratio: float) -> str:
    """The name of a factor.

    >>> factor("drift", 0.501), factor("drift", -0.999), factor("noise", 1.3)
    ('half drift', 'a sign in the drift', 'a factor 1.3 in the noise')
    """
    for value, word in ((0.5, "half"), (2.0, "double"), (0.0, "no")):
        if abs(ratio - value) < _TOL:
            return f"{word} {what}"
    if ratio < 0:
        return f"a sign in the {what}"
    return f"a factor {ratio:.3g} in the {what}"


def _simple(ratio: float) -> bool:
    return any(abs(ratio / known - 1) < _TOL for known in (-1.0, 0.25, 0.5, math.sqrt(0.5), math.sqrt(2), 2.0, 4.0))


class Rates(NamedTuple):
    """kappa of the state and of the model's answers, nu, and d log alpha / dlambda."""

    state: float
    answers: float
    nu: float
    growth: float

    def signature(self) -> Signature | None:
        """What is wrong in the limit, or None."""
        state, answers, nu, growth = self
        if not all(map(math.isfinite, self)):
            return None
        needed = 1 + nu / 2

        def is_(value: float, other: float) -> bool:
            return abs(value - other) < _TOL * max(abs(other), 0.5)

        if is_(state, needed) and is_(answers, needed):
            return None
        if is_(state, answers):
            return self._together(needed)
        if is_(answers, needed) and growth > 0.05:
            m = 1 - (state - answers) / growth
            name = "a sign in the drift" if abs(m + 1) < 0.1 else factor("forward drift", m)
            return Signature(name, f"the forward drift f x enters {m:.2g} times", abs(m - 1))
        if nu > 0.02 and is_(state, needed) and is_(2 - answers, needed):
            text = f"the model's answers enter with 1 - tau^2, tau = {math.sqrt(nu / 2):.2g}, for 1 + tau^2"
            return Signature("a sign in the drift", text, abs(answers / needed - 1))
        if nu > 0.02 and is_(state, needed) and is_((answers - 1) ** 2, needed - 1):
            return Signature(
                "a missing square",
                f"the model's answers enter with 1 + tau, tau = {math.sqrt(nu / 2):.2g}, for 1 + tau^2",
                abs(answers / needed - 1),
            )
        r = answers / (needed if is_(state, needed) or not is_(state, 0.0) else state)
        return Signature(factor("drift", r), f"the model's answers enter with {r:.3g} of their weight", abs(r - 1))

    def _together(self, needed: float) -> Signature:
        """State and answers agree, and the noise does not."""
        off, kappa = self.state / needed, self.state
        if self.nu > 0.02 and abs(kappa - 1) > _TOL:
            share = self.nu / (2 * (kappa - 1))
            if share > 0 and _simple(share) and not _simple(off):
                return Signature(
                    "noise once too much" if abs(share - 2) < 2 * _TOL else factor("noise", math.sqrt(share)),
                    f"the variance of its noise is {share:.3g} times that which its drift needs"
                    + (", as if it were drawn twice" if abs(share - 2) < 2 * _TOL else ""),
                    abs(share - 1),
                )
        return Signature(factor("drift", off), f"its drift is {off:.3g} times that which its noise needs", abs(off - 1))


def rates(found: Responses, window: float = 0.3) -> Rates:
    """The limit of a sampler, over a window of the half log-SNR in the middle of its table of many steps."""
    alpha, lam = found.sde.alpha(found.t), found.sde.half_log_snr(found.t)
    middle = (lam[0] + lam[-1]) / 2
    i, j = sorted(int((lam - at).abs().argmin()) for at in (middle, middle + window))
    h = float(lam[j] - lam[i])
    nothing = Rates(math.nan, math.nan, math.nan, math.nan)
    if i == j or not h > 0 or float(found.A[i]) == 0:
        return nothing
    A, B, C = found.A[:-1] / alpha, found.B[:-1] / alpha[:, None], found.C[:-1] / alpha[:, None]
    a = float(A[j] / A[i])
    if not a > 0 or a == 1:
        return nothing
    state = -math.log(a) / h
    answers = state * float((B[j] - a * B[i]).sum()) / (1 - a)
    # nu int_i^j e^{-2 kappa (lambda_j - lambda)} u^2 dlambda, of nu = 1
    k = 2 * state - 2
    unit = math.exp(-2 * float(lam[j])) * (h if abs(k) < 1e-9 else -math.expm1(-k * h) / k)
    nu = float((C[j] - a * C[i]).square().sum()) / unit
    return Rates(state, answers, nu, float((alpha[j] / alpha[i]).log()) / h)
