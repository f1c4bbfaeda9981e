"""The table of a sampler, found from the outside.

Where a sampler is affine in what it is given, in x_T, in the answers D_j of its model and in its noise z_k, one run
on unit vectors gives all of its coefficients: with x_T = e_0, D_j = e_{1+j} and z_k = e_{1+R+k} the states at which it
asks its model, and the one that it returns, are

    x_i = A_i x_T + sum_{j<i} B_ij D_j + sum_k C_ik z_k,    i = 0 .. R, x_R the output

and a second run, on random numbers, says whether it is. From these numbers follow, as from a `Tableau`, the law of the
output on Gaussian data, without sampling: with D_j = k_j x_j + e_j m, k = alpha v / S and e = sigma^2 / S,

    D = W (k A x_T + k C z + e m),   W = (I - diag(k) B)^-1,    x_R = A_R x_T + B_R D + C_R z
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scoresde.analysis import Law, marginal, w2
from scoresde.auditing.model import Draws, Form, Given, Model, TooMany, run_form
from scoresde.denoiser import Denoiser, Posterior
from scoresde.grid import Grid
from scoresde.sde import SDE
from scoresde.tableau import Tableau
from scoresde.tensors import Time, shown
from scoresde.textbook import Textbook

__all__ = ["Responses", "law_of", "output_law", "own_error", "probe", "responses_of", "responses_of_textbook"]

MOST = 3000  # evaluations whose table is looked for: its square is kept


@shown
class Responses(NamedTuple):
    """How a sampler answers to x_T, to its model and to its noise: A (R + 1,), B (R + 1, R), C (R + 1, K), float64, at
    the times t (R,) at which it asked its model, on the SDE; and by how much of its size a run was off what they say.
    """

    t: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    sde: SDE
    off: float = 0.0

    @property
    def tol(self) -> float:
        """What counts as equal to its numbers, relative."""
        return max(1e-6, 30 * self.off)

    @property
    def noisy(self) -> bool:
        """Whether the output has noise of the sampler's own."""
        return bool((self.C != 0).any())


def probe(form: Form, sde: SDE, times: Tensor) -> Responses | str:
    """The coefficients of a sampler on these times, in float64; or, in words, why it has none."""
    most, generator = min(MOST, 60 * len(times) + 600), torch.Generator("cpu").manual_seed(0)
    x_T, *answers = torch.randn(2 + most, 1, 1, 2, 4, generator=generator, dtype=torch.float64, device="cpu")
    x_T = x_T * float(sde.sigma(times[0]))
    model = Model(Given(sde, lambda j, _: answers[j]), most=most)
    try:
        with Draws() as draws:
            x, _ = run_form(form, model, x_T, times)
    except TooMany:
        return f"it makes more than {model.most} evaluations"
    R, K = model.nfe, len(draws.shapes)
    if R == 0:
        return "it never asks its model"
    if any(shape != tuple(x_T.shape) for shape in draws.shapes):
        return f"it draws noise of the shape {next(s for s in draws.shapes if s != tuple(x_T.shape))}"
    if any(math.isnan(t) for t in model.asked):
        return "it asks at several times at once"

    d = 1 + R + K
    if d > 2 * MOST:
        return f"it makes {R} evaluations and {K} draws"

    def unit(k: int) -> Tensor:
        e = torch.zeros(1, 1, 1, d, dtype=torch.float64, device="cpu")
        if k < d:
            e[..., k] = 1
        return e

    again = Model(Given(sde, lambda j, _: unit(1 + j)), most=R, keep=True)
    try:
        with Draws(lambda k, _: unit(1 + R + k)):
            output, _ = run_form(form, again, unit(0), times)
    except TooMany:
        return "its evaluations depend on the values that it meets"
    if again.asked != model.asked:
        return "its times depend on the values that it meets"
    full = torch.cat([*again.states, output]).reshape(R + 1, d).double()
    found = Responses(
        torch.tensor(model.asked, dtype=torch.float64), full[:, 0], full[:, 1 : R + 1], full[:, R + 1 :], sde
    )
    terms = [
        found.A[-1] * x_T.double(),
        *(b * D.double() for b, D in zip(found.B[-1], answers, strict=False)),
        *(c * z.double() for c, z in zip(found.C[-1], draws.drawn, strict=True)),
    ]
    size = float(torch.stack([term.abs().amax() for term in terms]).sum())
    off = float((sum(terms[1:], terms[0]) - x.double()).abs().amax())
    # Those that round their state to float32 in a float64 run have a table too, of float32's digits.
    if not off <= 3e-6 * size:
        others = f", and it draws by {', '.join(sorted(draws.other))}" if draws.other else ""
        return f"it is not linear in what it meets: off by {off / size:.1e}{others}"
    return found._replace(off=off / size)


def responses_of(table: Tableau) -> Responses:
    """The same of a table that is known."""
    R, rows = table.nfe, len(table)
    x, on = torch.zeros(1 + R + rows, dtype=torch.float64), table.evaluates.tolist()
    states: list[Tensor] = []
    F: list[Tensor] = []
    t: list[float] = []
    x[0] = 1.0
    for i in range(rows):
        f = table.p[i] * x
        if on[i]:
            states.append(x)
            f[1 + len(t)] += table.q[i]
            t.append(float(table.t[i]))
        F.append(f)
        x = table.a[i] * x
        for k, b in enumerate(table.b[i].tolist()):
            if b != 0:
                x = x + b * F[i - k]
        if table.c[i] > 0:
            x = x.clone()
            x[1 + R + i] += table.c[i]
    full = torch.stack([*states, x])
    C = full[:, 1 + R :]
    return Responses(
        torch.tensor(t, dtype=torch.float64), full[:, 0], full[:, 1 : R + 1], C[:, C.abs().sum(0) > 0], table.grid.sde
    )


class _Units(Denoiser):
    """Answers the j-th question with the (1 + j)-th unit vector; the same question as before, with the same."""

    def __init__(self, sde: SDE, d: int) -> None:
        self.sde, self.d = sde, d
        self.states: list[Tensor] = []
        self.asked: list[float] = []

    def unit(self, k: int) -> Tensor:
        return torch.zeros(1, self.d, dtype=torch.float64).index_fill_(1, torch.tensor(k), 1.0)

    def posterior(self, x: Tensor, t: Time, /, **cond: Any) -> Posterior:
        if not (self.asked and float(t) == self.asked[-1] and torch.equal(x, self.states[-1])):
            self.states.append(x)
            self.asked.append(float(t))
        return Posterior(self.unit(len(self.asked)))


def responses_of_textbook(book: Textbook, grid: Grid, nfe: int) -> Responses:
    """The same of a transcription of a paper's algorithm, which makes that many evaluations."""
    most = 3 * (nfe + grid.steps)  # of its draws
    given = _Units(grid.sde, 1 + nfe + most)
    x = book(given, given.unit(0), grid.times, lambda k: given.unit(1 + nfe + k))
    full = torch.cat([*given.states, x])
    t = torch.tensor(given.asked, dtype=torch.float64)
    return Responses(t, full[:, 0], full[:, 1 : nfe + 1], full[:, nfe + 1 :], grid.sde)


def law_of(found: Responses, data: Law) -> tuple[Tensor, Tensor, Tensor]:
    """Factors of x_T and of m in the output on Gaussian data, and its variance from the noise, each (D,)."""
    alpha, sigma, R = found.sde.alpha(found.t), found.sde.sigma(found.t), len(found.t)
    out = []
    for v in data.variances.tolist():
        S = alpha**2 * v + sigma**2
        k, e = (torch.where(S > 0, scale / S.clamp(min=1e-300), other)
                for scale, other in ((alpha * v, alpha), (sigma**2, 0.0 * sigma)))  # fmt: skip
        system = torch.eye(R, dtype=torch.float64) - k[:, None] * found.B[:R]
        w = torch.linalg.solve_triangular(system.mT, found.B[R][:, None], upper=True)[:, 0]
        noise = found.C[R] + (w * k) @ found.C[:R]
        out.append((found.A[R] + w @ (k * found.A[:R]), w @ e, noise.square().sum()))
    of_x_T, of_m, variance = (torch.stack(column) for column in zip(*out, strict=True))
    return of_x_T, of_m, variance


def output_law(found: Responses, data: Law, start: float) -> Law:
    """The law of the output, from x_T of the exact marginal at the start."""
    of_x_T, of_m, noise = law_of(found, data)
    first = marginal(data, found.sde, start)
    return Law(of_x_T * first.mean + of_m * data.mean, of_x_T**2 * first.variances + noise)


def own_error(found: Responses, data: Law, start: float, end: float) -> float:
    """The error of the solver alone, from x_T of the exact marginal: of its samples against the probability flow where
    it draws no noise, else the W2 distance of its law, rms per dimension.
    """
    first, last = marginal(data, found.sde, start), marginal(data, found.sde, end)
    if found.noisy:
        return w2(output_law(found, data, start), last)
    of_x_T, of_m, _ = law_of(found, data)
    mean = of_x_T * first.mean + of_m * data.mean
    ratio = (last.variances / first.variances).sqrt()
    return float(((of_x_T - ratio) ** 2 * first.variances + (mean - last.mean) ** 2).mean().sqrt())
