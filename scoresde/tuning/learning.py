"""Learning a table's numbers: Gauss and Newton's method, damped (Levenberg, 1944; Marquardt, 1963), on their effect.

The state x_R that a table ends with depends on a few dozen numbers v. Of its residuals r = x_R - x*, over all samples
and entries, with J = dr / dv and H = J J^T, a step is the solution of

    (H + mu diag(H)) dv = -J r

taken if it lowers |r|^2, mu being raised until it does and lowered after. It is the same in whatever units v has. A
sample with a mean square s counts as s / (1 + s / cap) (`capped`): one that ends in another mode of the data than the
fine solution is beyond any derivative. The cap is some medians of s, and so falls as the rest comes nearer. After a
good step J is not taken again, but brought up to date by what the step did to r (Broyden, 1965), and of many entries of
r it is kept as `SKETCH` random sums of a sample's. v is

    w_k  of each step of the grid: with s = softmax(log h + w), h the start's steps, the times are
         t_n = t_N + (t_0 - t_N) (s_{n+1} + ... + s_N), which decrease whatever w is, from t_0 to t_N exactly; the table
         is the solver's own at these times, so that it keeps its theory
    l_i  of each row: its evaluation is told the time t'_i = t_i e^{l_i}, while the state stands where it stood
    a'_i, b'_{i,k}    added to the table, over the whole history (`Corrections`)

J is taken by differences of runs, each from the row that changed: no gradient passes through the network, which may be
behind any wrapper, and what is kept in memory is a few states a row, and J of a part of the samples at a time, but for
the sums.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scoresde.denoiser import Denoiser
from scoresde.entries import entries_of
from scoresde.grid import Grid
from scoresde.solvers.base import Solver
from scoresde.tableau import Tableau
from scoresde.tensors import told
from scoresde.tuning.chosen import common_cap, ratio
from scoresde.tuning.corrections import Corrections, wide

__all__ = ["Clock", "Columns", "Numbers", "Pairs", "learn"]

MOST = 2**24
"""Numbers of J at a time."""

SKETCH = 64
"""Sums that are kept of a sample's residuals."""

AGAIN = 0.5
"""J is taken anew after a step that leaves more than this of the mean square."""


class Clock:
    """What is left of a number of minutes."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    @property
    def left(self) -> float:
        """Minutes."""
        return (self.end - time.monotonic()) / 60

    def check(self) -> None:
        """Raises TimeoutError when it has run out."""
        if self.left <= 0:
            raise TimeoutError


class Columns(NamedTuple):
    """The numbers of a table of R rows without noise, float64: t, p, q, a of shape (R,), b of shape (R, R)."""

    t: Tensor
    p: Tensor
    q: Tensor
    a: Tensor
    b: Tensor

    @classmethod
    def of(cls, table: Tableau) -> Columns:
        return cls(table.t, table.p, table.q, table.a, wide(table.b))


@dataclass(frozen=True)
class Numbers:
    """A table as a function of v.

    Attributes:
        solver, grid: the start.
        w, l, a, b: as in the module's docstring, float64, of shape (N,), (R,), (R,) and (R, R).
        moves: whether times and labels do: not where the denoiser knows whole steps alone.
    """

    solver: Solver
    grid: Grid
    w: Tensor
    l: Tensor  # noqa: E741
    a: Tensor
    b: Tensor
    moves: bool = True

    __repr__ = told

    @classmethod
    def of(cls, solver: Solver, grid: Grid, corrections: Corrections | None = None, moves: bool = True) -> Numbers:
        """The start itself, with corrections if it has some."""
        table = solver.tableau(grid)
        R = len(table)
        w, l, a, b = (torch.zeros(n, dtype=torch.float64, device="cpu") for n in ((grid.steps,), (R,), (R,), (R, R)))  # noqa: E741
        if corrections is not None:
            t, a, b = (torch.tensor(column, dtype=torch.float64, device="cpu") for column in corrections)
            l = (t / table.t).log()  # noqa: E741
        return cls(solver, grid, w, l, a, b, moves)

    @property
    def untouched(self) -> bool:
        """Whether there are no corrections."""
        return not any(bool(v.any()) for v in (self.l, self.a, self.b))

    @property
    def times(self) -> Tensor:
        """t_0 .. t_N."""
        t = self.grid.times
        if not bool(self.w.any()):
            return t
        s = torch.softmax((-t.diff()).log() + self.w, 0)
        inner = t[-1] + (t[0] - t[-1]) * s[1:].flip(0).cumsum(0).flip(0)
        return torch.cat([t[:1], inner, t[-1:]])

    def table(self, times: Tensor | None = None) -> Tableau:
        """The solver's own at these times, or at other ones."""
        return self.solver.tableau(Grid(self.grid.sde, self.times if times is None else times))

    def columns(self, times: Tensor | None = None) -> Columns:
        """The table with corrections."""
        base = Columns.of(table := self.table(times))
        t = base.t
        if bool(self.l.any()):
            t = torch.where(table.evaluates, (base.t * self.l.exp()).clamp(max=self.grid.sde.t_limit), base.t)
        return base._replace(t=t, a=base.a + self.a, b=base.b + self.b)

    def corrections(self) -> Corrections | None:
        """What a `TunedSolver` keeps beside the times."""
        if self.untouched:
            return None
        t, a, b = (column.tolist() for column in (self.columns().t, self.a, self.b))
        return Corrections(tuple(t), tuple(a), tuple(map(tuple, b))).checked()

    def moved(self, dv: Tensor) -> Numbers:
        """The same at v + dv, dv in the order of `Pairs.jacobian`."""
        reads = _reads(self.table())
        R, N = len(self.l), self.grid.steps
        b, rest = torch.zeros_like(self.b), dv
        w = l = torch.zeros(())  # noqa: E741
        if self.moves:
            w, l, rest = rest[:N], rest[N : N + R], rest[N + R :]  # noqa: E741
        b[reads] = rest[R:]
        return replace(self, w=self.w + w, l=self.l + l, a=self.a + rest[:R], b=self.b + b)


def _reads(table: Tableau) -> Tensor:
    """Which b'_{i,k} there are, (R, R): of evaluations that are made, up to a row's own."""
    lag, row = torch.arange(len(table), device="cpu"), torch.arange(len(table), device="cpu")[:, None]
    reads: Tensor = (lag <= row) & table.evaluates[(row - lag).clamp(min=0)]
    return reads


class Run(NamedTuple):
    """The states x_0 .. x_R of a run, and the F of the rows that evaluate."""

    x: list[Tensor]
    F: dict[int, Tensor]


@dataclass(frozen=True)
class Pairs:
    """A model, noises, and where its fine solution leads from them.

    Attributes:
        denoiser: the model.
        x: x_T, (B, ...).
        truth: features of the fine solution, (B, F).
        features: of the end state, (B, F).
        cond: conditions.
        batch: samples that the model takes at once.
        clock: stops all of it, by TimeoutError.
    """

    denoiser: Denoiser
    x: Tensor
    truth: Tensor
    features: Callable[[Tensor], Tensor]
    cond: Mapping[str, Any]
    batch: int
    clock: Clock

    __repr__ = told

    def part(self, part: slice) -> Pairs:
        return replace(self, x=self.x[part], truth=self.truth[part], cond=entries_of(self.cond, part, len(self.x)))

    def parts(self, most: int) -> list[Pairs]:
        n = len(self.x)
        return [self.part(slice(i, i + most)) for i in range(0, n, most)] if most < n else [self]

    def _F(self, c: Columns, i: int, x: Tensor, copies: int = 1, t: float | None = None) -> Tensor:
        """F_i of copies of the batch, one after another."""
        self.clock.check()
        t = float(c.t[i]) if t is None else t
        cond = self.cond
        if copies > 1 and cond:
            cond = entries_of(cond, torch.arange(len(self.x)).repeat(copies), len(self.x))
        u, w = (float(v) for v in self.denoiser.view_of_output(c.p[i], c.q[i], torch.tensor(t, dtype=torch.float64)))
        N = self.denoiser.output(x, torch.tensor([t], dtype=torch.float64), **cond)
        return u * x + w * N

    def run(self, c: Columns, on: list[bool]) -> Run:
        """All of it, on the whole batch."""
        return self._on(c, on, 0, Run([self.x], {}))

    def _on(self, c: Columns, on: list[bool], i: int, run: Run, copies: int = 1) -> Run:
        """From row i, of which x_i is the last state."""
        x, F = list(run.x), dict(run.F)
        for j in range(i, len(on)):
            if on[j] and j not in F:
                F[j] = self._F(c, j, x[-1], copies)
            x.append(self._row(c, j, x[-1], F))
        return Run(x, F)

    @staticmethod
    def _row(c: Columns, j: int, x: Tensor, F: Mapping[int, Tensor]) -> Tensor:
        out = float(c.a[j]) * x
        for k, value in F.items():
            if k <= j and (b := float(c.b[j, j - k])) != 0:
                out = out.add_(value, alpha=b)
        return out

    def ends(self, numbers: Numbers) -> tuple[Tensor, Tensor]:
        """Of each sample the squared distance, (B,), and the sums of its residuals, (B, S)."""
        c, on = numbers.columns(), numbers.table().evaluates.tolist()
        found = [part.residuals(part.run(c, on).x[-1]) for part in self.parts(self.batch)]
        return torch.cat([r.square().mean(1) for r in found]), torch.cat([_sums(r) for r in found])

    def squares(self, numbers: Numbers) -> Tensor:
        """The squared distance of each sample, (B,)."""
        return self.ends(numbers)[0]

    def residuals(self, x: Tensor) -> Tensor:
        """Of copies of the batch, one after another: (copies B, F), float64."""
        found = self.features(x).flatten(1).double().cpu()
        return found - self.truth.repeat(len(found) // len(self.truth), 1)

    def slopes(self, numbers: Numbers) -> Tensor:
        """J of the sums, (P, B, S), of the whole batch, part by part."""
        P = sum(v.numel() for v in (numbers.w, numbers.l, numbers.a, numbers.b))
        parts = self.parts(max(1, min(self.batch, MOST // (P * self.truth[0].numel()))))
        return torch.cat([_sums(part.jacobian(numbers)[0]) for part in parts], 1)

    def jacobian(self, numbers: Numbers) -> tuple[Tensor, Tensor]:
        """J = dr / dv, shape (P, B, F), and r, shape (B, F); v is w, l, where they move, a' and the rows of b'."""
        table, c = numbers.table(), numbers.columns()
        on, reads, R = table.evaluates.tolist(), _reads(table), len(table)
        h = float(torch.finfo(self.x.dtype).eps) ** 0.4
        base = self.run(c, on)
        r = self.residuals(base.x[-1])
        by_a: list[Tensor] = []
        by_b: list[Tensor] = []
        for i in range(R):  # a'_i moves x_{i+1} by x_i, b'_{i,k} by F_{i-k}
            ways = [base.x[i], *(base.F[i - k] for k in range(i + 1) if reads[i, k])]
            size = _rms(base.x[i + 1])
            scales = [h * size / max(_rms(way), 1e-12) for way in ways]
            J = self._after(c, on, i, base, [way * s for way, s in zip(ways, scales, strict=True)], r)
            J /= torch.tensor(scales, dtype=torch.float64)[:, None, None]
            by_a.append(J[:1])
            by_b.append(J[1:])
        found = [*by_a, *by_b]
        if numbers.moves:
            labels = [self._by_label(c, on, i, base, r, h) if on[i] else torch.zeros_like(r) for i in range(R)]
            found = [self._by_times(numbers, on, base, r, h), torch.stack(labels), *found]
        return torch.cat(found), r

    def _after(self, c: Columns, on: list[bool], i: int, base: Run, moves: list[Tensor], r: Tensor) -> Tensor:
        """Changes of r where x_{i+1} is moved, (K, B, F)."""
        group = max(1, self.batch // len(self.x))
        found = []
        for at in range(0, len(moves), group):
            some = moves[at : at + group]
            K = len(some)
            x = (base.x[i + 1] + torch.stack(some)).flatten(0, 1)
            F = {j: value.repeat(K, *[1] * (value.ndim - 1)) for j, value in base.F.items() if j <= i}
            end = self._on(c, on, i + 1, Run([x], F), K).x[-1]
            found.append(self.residuals(end).reshape(K, *r.shape) - r)
        return torch.cat(found)

    def _by_label(self, c: Columns, on: list[bool], i: int, base: Run, r: Tensor, h: float) -> Tensor:
        """By l_i, (B, F): downwards, for the first may stand at the last time there is."""
        F = {j: value for j, value in base.F.items() if j < i}
        F[i] = self._F(c, i, base.x[i], t=float(c.t[i]) * math.exp(-h))
        end = self._on(c, on, i, Run([base.x[i]], F)).x[-1]
        return (self.residuals(end) - r) / -h

    def _by_times(self, numbers: Numbers, on: list[bool], base: Run, r: Tensor, h: float) -> Tensor:
        """By w, (N, B, F): by each inner time, and its derivative by w."""
        t, c = numbers.times, numbers.columns()
        s = -t.diff() / (t[0] - t[-1])
        N = len(s)
        J = torch.zeros(N, *r.shape, dtype=torch.float64)
        for n in range(1, N):
            moved = t.clone()
            moved[n] += h * float(torch.minimum(t[n - 1] - t[n], t[n] - t[n + 1]))
            now = numbers.columns(moved)
            end = self._on(now, on, *self._until(c, now, base)).x[-1]
            by_t = (self.residuals(end) - r) / (moved[n] - t[n])
            later = (torch.arange(N) >= n).double()
            J += ((t[0] - t[-1]) * s * (later - s[n:].sum()))[:, None, None] * by_t
        return J

    @staticmethod
    def _until(c: Columns, now: Columns, base: Run) -> tuple[int, Run]:
        """The first row that differs, and the run up to it, its evaluation included where that is the same."""
        rows = torch.stack([(mine != other).reshape(len(c.t), -1).any(1) for mine, other in zip(c, now, strict=True)])
        i = int(rows.any(0).int().argmax())
        looks = i if bool(rows[:3, i].any()) else i + 1
        return i, Run(base.x[: i + 1], {j: value for j, value in base.F.items() if j < looks})


def _sums(r: Tensor) -> Tensor:
    """Random sums of the last axis of (..., F), (..., S): signs from a fixed seed, every S-th entry in one sum. Their
    squares sum to those of r in the mean over signs, exactly where F <= S.
    """
    F = r.shape[-1]
    if F <= SKETCH:
        return r
    signs = torch.randint(0, 2, (F,), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    padded = torch.nn.functional.pad(r * signs, (0, -F % SKETCH))
    return padded.unflatten(-1, (-1, SKETCH)).sum(-2)


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def learn(
    numbers: Numbers, train: Pairs, held: Pairs, rounds: int, said: Callable[[Tensor], Any]
) -> tuple[Numbers, Tensor | None]:
    """The method of the module's docstring; what was best of the samples that do not train is kept, be it the start.

    Args:
        numbers: the start.
        train: samples that train; its clock stops it.
        held: samples that choose among the steps.
        rounds: times at most that derivatives are taken: fewer where they gain nothing more.
        said: called with the best's squared distances after each step.

    Returns:
        the numbers, and the squared distances of `held`; None where there was no time to look.
    """
    best, kept = numbers, None
    try:
        with torch.no_grad():
            kept = held.squares(numbers)
            state, idle = Descent(train, numbers), 0
            while state.taken < rounds and idle < 4 and state.step():
                now = held.squares(state.numbers)
                if (gain := ratio(now, kept)) < 1:
                    best, kept = state.numbers, now
                idle = 0 if gain < 0.998 else idle + 1
                said(kept)
    except TimeoutError:
        pass
    return best, kept


class Descent:
    """Where it stands: numbers, their squares and sums, J or None, and mu; `taken` counts the times that J was."""

    def __init__(self, train: Pairs, numbers: Numbers) -> None:
        self.train, self.numbers, self.mu, self.taken = train, numbers, 1e-2, 0
        self.squares, self.sums = train.ends(numbers)
        self.J: Tensor | None = None

    def step(self) -> bool:
        """To the next numbers; False where none is nearer by 0.1 %."""
        if fresh := self.J is None:
            self.J, self.taken = self.train.slopes(self.numbers), self.taken + 1
        assert self.J is not None
        weight = 1 / (1 + self.squares / common_cap(self.squares))[:, None]
        J = (self.J * weight).flatten(1)
        H, g = J @ J.T, J @ (self.sums * weight).flatten()
        D = H.diagonal()
        D = D + 1e-9 * D.max()
        for _ in range(8 if fresh else 2):
            try:
                dv = torch.from_numpy(-np.linalg.solve((H + self.mu * torch.diag(D)).numpy(), g.numpy()))
                moved = self.numbers.moved(dv)
                squares, sums = self.train.ends(moved)
                left = ratio(squares, self.squares)
            except (ValueError, ArithmeticError):  # numpy's, of a singular H, too; no such times, or no such numbers
                left = math.inf
            if left < 0.999:
                break
            self.mu *= 4
        else:
            self.J = None
            return not fresh and self.step()
        unit = D * dv / (dv @ (D * dv))
        self.J = self.J + unit[:, None, None] * (sums - self.sums - torch.tensordot(dv, self.J, 1))
        if left > AGAIN:
            self.J = None
        self.numbers, self.squares, self.sums, self.mu = moved, squares, sums, max(self.mu / 3, 1e-6)
        return True
