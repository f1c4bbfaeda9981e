"""A table in few rounds: all rows of a window are evaluated as one batch, again and again, until they agree.

A table (`scoresde.tableau`) is a strictly lower-triangular system in the network's outputs N_i: rolled from x_0 with
all N_i given, it has every x_i. A round evaluates the rows of a window at the states that the last round left, in one
batch, and rolls the table anew, linear part and noise exact, with each output continued to where its state moves,

    N_i(x_i + d) ~ N_i(x_i) + J_i d,      J_i = kappa_i I + sum_k u_k v_k^T,      v = d / |d|^2,  u = N_new - N_expected

Newton's iteration with an approximate Jacobian: kappa_i is that of Gaussian data of the SDE's scale, and the sum has
Broyden's (1965) updates from the last moves of the row. J_i = 0 would be Picard's iteration (ParaDiGMS, Shih et al.,
2023). The first row of a window starts from its final state, where d = 0 and J_i has no say: each round makes one more
row final at least, and in as many rounds as there are evaluations the result is that of the loop, whatever J_i is.
A row whose state moves by less than a tolerance is not evaluated again: it stands, and the window goes on.

Rows that come into the window begin as a roll with the last row's x_0 leaves them. Every sample has a window of its
own, so that it is the same in any batch; one that is far ahead of the slowest waits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from scoresde.checks import ArgumentError, check_count, check_nonnegative
from scoresde.denoiser import Denoiser
from scoresde.entries import repeated
from scoresde.grid import Grid
from scoresde.noise import NoiseSource
from scoresde.solvers.base import SameTable, Solver
from scoresde.solvers.kept import ready
from scoresde.tableau import Ready, State

__all__ = ["Parallel"]

WINDOW = 50
"""Rows of a window where none is given (benchmarks/results/parallel)."""
SLOPE = 1.0
"""Of kappa: 0 holds the network's output (what both are worth is measured there too)."""
UPDATES = 2
"""Updates of a row's Jacobian that are kept."""
SHARE = 0.25
"""Of the tolerance, that a row may move and stand: what the rows add up to is then about the tolerance."""
SMALL = 0.1
"""Of the width of the SDE's marginal: the least scale that a move is compared with. A state may be near 0."""


@dataclass(frozen=True)
class Parallel(SameTable):
    """Another solver's table in few rounds, each one call of the network on many rows, for where a large batch takes
    hardly longer than a small one: the loop's samples to a tolerance, in more evaluations and fewer calls.

    `Solution.rounds` tells the calls, `Solution.nfe` all evaluations, each on the whole batch: a round of k rows calls
    the network on k B entries, the batch k times over, with times of shape (k B,) and the conditions repeated. The
    noise is the loop's own, draw by draw, so that a seed names the same sample. Where it does not converge it is slower
    than the loop, never wrong: a round makes one more evaluation final at least.

    How far the result is from the loop's is measured, not proven (benchmarks/results/parallel): at tol = 1e-3 and 100
    rows below 2e-3 of the state's scale. With tol = 0 it is the loop's to rounding. Below the rounding of the network's
    own numbers rows do not settle but by being first: one in bfloat16 wants tol = 4e-3 or more.

    `sample(nfe=...)` takes as many steps as the solver itself would: the evaluations made are not known beforehand.
    Where gradients are recorded (`sample(differentiable=True)`) and for `log_prob=` the table runs in order, and rounds
    are the evaluations, or None. What a denoiser holds for each sample, a guidance scale of shape (B,) or a measurement
    y, cannot be told to k B entries and raises an error: give it as a condition, or one for all. A function noise(row,
    x) is called in the loop's order, but ahead of the rows, with x_T for x: its shape is all that it may read.

    Args:
        solver: whose table it is, any that has one.
        window: rows evaluated in a round at most, 50 or the whole table by default; it bounds the memory, to some
            2.25 * (7 + 1 with noise) times the window, in states. 1 is the loop.
        tol: about how far the result may be from the loop's: rows stand that move by less than a quarter of it, root
            mean square over a sample's entries, relative to that of its state (a tenth of the SDE's marginal width at
            least, `sde.radius`).

    Raises:
        ValueError: if the solver has no table, the window is no whole number >= 1, or tol < 0; on a run, before any
            evaluation, if a condition cannot be repeated.

    >>> from scoresde import VPSDE, sample
    >>> from scoresde.exact import GaussianMixture
    >>> from scoresde.solvers import DDPM
    >>> denoiser = GaussianMixture(means=[[-1.0], [1.0]], std=0.1).denoiser(VPSDE())
    >>> loop, few = (sample(denoiser, (4, 1), s, steps=100, seed=0) for s in (DDPM(), Parallel(DDPM())))
    >>> loop.nfe, few.rounds < 20, bool((loop.x - few.x).abs().max() < 2e-3)
    (100, True, True)
    """

    solver: Solver
    window: int | None = None
    tol: float = 1e-3

    masks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.solver, Solver) or isinstance(self.solver, Parallel) or not self.solver.has_table:
            raise ArgumentError(
                f"solver={self.solver!r}: expected one whose coefficients are known beforehand, UniPC() or DDPM() say"
            )
        if self.window is not None:
            check_count(window=self.window)
        check_nonnegative(tol=self.tol)

    def evaluations(self, grid: Grid) -> None:
        return None

    def steps_within(self, *args: Any, **kwargs: Any) -> int:
        return self.solver.steps_within(*args, **kwargs)

    def loop(
        self, denoiser: Denoiser, x: Tensor, grid: Grid, noise: NoiseSource | None, cond: dict[str, Any]
    ) -> Iterator[State]:
        table = ready(self.solver, self.solver.tableau, grid, denoiser, x.dtype)
        in_order = table.run(denoiser, x, noise, cond)  # after its checks
        repeated(cond, 2, len(x))  # raises
        if torch.is_grad_enabled():
            return (state._replace(rounds=state.nfe) for state in in_order)
        return _Run(table, denoiser, x, noise, cond, self.window or WINDOW, self.tol).states()


class _Columns(NamedTuple):
    """What the rows are made of (`Ready.rows`), as columns of the dtype and on the device of the state. After the last
    row come others, that leave the state as it is.
    """

    x: Tensor
    n: Tensor
    c: Tensor
    keep_x: Tensor
    keep_n: Tensor
    kappa: Tensor
    r: Tensor  # D = r x + s N
    s: Tensor
    least: Tensor
    past: Tensor  # (rows, K): the factors of what the rows before have kept
    on: Tensor  # whether a row evaluates

    @staticmethod
    def of(table: Ready, denoiser: Denoiser, like: Tensor, more: int) -> _Columns:
        on = torch.tensor([row.n is not None for row in table.rows], device="cpu")
        reads = [[*row.past, *([] if row.onto is None else [(row.onto, 1.0)])] for row in table.rows]
        K = max((i - j for i, read in enumerate(reads) for j, _ in read), default=0)
        past = torch.zeros(len(table), K, dtype=torch.float64, device="cpu")
        for i, read in enumerate(reads):
            for j, b in read:
                past[i, i - j - 1] = b
        numbers = [(row.x, row.n or 0.0, row.c, *(row.keep or (0.0, 0.0))) for row in table.rows]
        own = torch.tensor(numbers, dtype=torch.float64, device="cpu").T
        r, kappa = torch.zeros_like(own[:2])
        s = torch.ones_like(r)
        if on.any():
            sde, t = denoiser.sde, table.t[on]
            r[on], s[on] = denoiser.affine(t)
            # dD/dx of N(0, c^2) is c^2 alpha / radius^2, read for N.
            kappa[on] = SLOPE * (sde.data_scale * sde.scales(t)[0] / sde.radius(t) ** 2 - r[on]) / s[on]
        columns = torch.stack([*own, kappa, r, s, SMALL * denoiser.sde.radius(table.t)], 1)
        columns = torch.cat([columns, columns.new_tensor([[1.0, 0, 0, 0, 0, 0, 0, 1, 0]]).expand(more, -1)])
        past, on = pad(past, (0, 0, 0, more)).to(like), pad(on, (0, more)).to(like.device)
        return _Columns._make([*columns[:, :, None].to(like).unbind(1), past, on])


class _Run:
    """A run's rows, each in a ring of memory at its number modulo the ring's length, samples flattened.

    Attributes:
        X: states that rows begin with, (L, B, n): of rows that have been evaluated, where.
        N: outputs there; once the states have moved, what is expected of them.
        F: what rows keep for later ones.
        Z: noise.
        U, V: the updates of the Jacobians, (UPDATES, L, B, n).
        front: first row of each sample whose state is final and its output is not, (B,), on the host.
        turn: rounds that each sample has taken part in, (B,), on the host.
    """

    def __init__(
        self,
        table: Ready,
        denoiser: Denoiser,
        x: Tensor,
        noise: NoiseSource | None,
        cond: dict[str, Any],
        window: int,
        tol: float,
    ) -> None:
        self.table, self.denoiser, self.noise, self.cond, self.tol = table, denoiser, noise, cond, tol
        self.like, self.R, B = x, len(table), len(x)
        self.W = min(window, self.R)
        self.wait = -(-self.W // 4)
        self.of = _Columns.of(table, denoiser, x, 3 * self.W)
        self.on = self.of.on.cpu()
        self.times = pad(table.t, (0, 3 * self.W))
        self.L = 2 * self.W + self.wait + self.of.past.shape[1] + 2
        self.X, self.N, self.F = x.new_zeros(3, self.L, B, x[0].numel())
        self.own = denoiser.own(x.shape, cond)
        self.U, self.V = x.new_zeros(2, UPDATES, *self.X.shape)
        self.Z = torch.zeros_like(self.X) if any(row.c for row in table.rows) else None
        self.X[0] = x.reshape(B, -1)
        self.front, self.turn = torch.zeros(2, B, dtype=torch.int64, device="cpu")
        self.nfe, self.rounds, self.drawn = 0, 0, 0

    def states(self) -> Iterator[State]:
        """The states in their order, each as soon as it is final for all samples."""
        # The first round looks at one evaluation: the others begin where it says that x_0 is.
        last = int(self.on.nonzero()[0]) + 1 if self.on.any() else self.R
        steps, done = self.table.steps, 0
        while done < self.R:
            which = (self.front < min(self.R, int(self.front.min()) + self.wait + 1)).nonzero().flatten()
            width = min(last, self.W)
            self._evaluate(which, width)
            self._draw(int(self.front[which].max()) + 2 * self.W)
            self._roll(which, width)
            last = self.W
            for i in range(done, min(self.R, int(self.front.min()))):
                x = self.X[(i + 1) % self.L].reshape(self.like.shape).clone()
                yield State(
                    i, self.nfe, steps[i], steps[i] != steps[i + 1], self.table.rows[i].t, x, rounds=self.rounds
                )
            done = int(self.front.min())

    def _evaluate(self, which: Tensor, width: int) -> None:
        """The rows of the windows of these samples, as k batches one after the other, so that an entry's place in the
        batch is its sample's. Samples with fewer rows, or none, fill up.
        """
        B = len(self.front)
        rows = [of[self.on[of]] for of in self.front[which, None] + torch.arange(width, device="cpu")]
        k = max(map(len, rows))
        if k == 0:
            return
        every = torch.empty(k, B, dtype=torch.int64, device="cpu").fill_(next(int(of[0]) for of in rows if len(of)))
        for b, of in zip(which.tolist(), rows, strict=True):
            if len(of):
                every[: len(of), b], every[len(of) :, b] = of, of[-1]
        at = (every % self.L).to(self.like.device)
        x = self.X.gather(0, at[..., None].expand(-1, -1, self.X.shape[-1])).reshape(k * B, *self.like.shape[1:])
        try:
            out = self.denoiser.output(x, self.times[every].flatten(), **repeated(self.cond, k, B))
        except Exception as error:
            error.add_note(
                f"Parallel evaluated {k} rows of {B} samples at once, {k * B} entries: give what the denoiser holds "
                "for each sample as a condition, or as one for all, or take the solver itself"
            )
            raise
        self.nfe, self.rounds = self.nfe + k, self.rounds + 1
        slot, b = (column.to(at.device) for column in (self._slot(which), which))
        self.turn[which] += 1
        at, out = at[:, b], out.reshape(k, B, -1)[:, b]
        if len(self.U):
            # V is 0 where nothing was expected. An update that is not finite is none: d = 0 must take what was found.
            self.U[slot, at, b] = (out - self.N[at, b]).nan_to_num(0.0, 0.0, 0.0)
        self.N[at, b] = out

    def _slot(self, which: Tensor) -> Tensor:
        """Where the next update of these samples' Jacobians goes."""
        return self.turn[which] % max(1, len(self.U))

    def _draw(self, end: int) -> None:
        """The noise of rows before the end, in the loop's order."""
        for i in range(self.drawn, min(end, self.R)):
            if self.table.rows[i].c != 0.0:
                assert self.Z is not None
                assert self.noise is not None
                self.Z[i % self.L] = self.noise(i, self.like).reshape(self.X.shape[1:])
            self.drawn = i + 1

    def _roll(self, which: Tensor, width: int) -> None:
        """All states of the windows of these samples anew, as far as the next round evaluates; their fronts."""
        of, W, device = self.of, self.W, self.like.device
        b, front, slot = (column.to(device) for column in (which, self.front[which], self._slot(which)))
        x = begin = self.X[front % self.L, b]
        own = self.own.take(b)
        D = torch.zeros_like(x)
        stands = torch.ones(len(b), dtype=torch.bool, device=device)
        lost = ~x.isfinite().all(1)  # whatever follows is as well
        stood = torch.zeros_like(front)
        j, end = 0, W
        while j < end:
            row = front + j
            at, on = row % self.L, of.on[row]
            if j < width:
                d = x - self.X[at, b]
                size, scale = (own.mean(y.square()).sqrt() for y in (d, x))
                stands &= ~on | lost | (size <= SHARE * self.tol * torch.maximum(scale, of.least[row, 0]))
                stood += stands
                N = self.N[at, b] + of.kappa[row] * d
                for u, v in zip(self.U, self.V, strict=True):
                    N = N + u[at, b] * own.sum(v[at, b] * d)[:, None]
                if len(self.V):
                    self.V[slot, at, b] = (d / own.sum(d.square())[:, None]).nan_to_num(0.0, 0.0, 0.0)
            else:
                stands = torch.zeros_like(stands)
                N = (D - of.r[row] * x) / of.s[row]
                self.V[:, at, b] = 0.0
            N = torch.where(on[:, None], N, 0.0)
            self.X[at, b], self.N[at, b] = x, N
            D = torch.where(on[:, None], of.r[row] * x + of.s[row] * N, D)
            new = of.x[row] * x + of.n[row] * N
            for k in range(of.past.shape[1]):
                new = new + of.past[row, k, None] * self.F[(row - k - 1) % self.L, b]
            self.F[at, b] = of.keep_x[row] * x + of.keep_n[row] * N
            if self.Z is not None:
                new = new + of.c[row] * self.Z[at, b]
            # A guess that is not finite is none. What stands is passed on as it is: a NaN must reach the end.
            x = torch.where(new.isfinite() | stands[:, None], new, begin)
            j += 1
            if j == W:
                end = W + int(stood.max())
        self.X[(front + end) % self.L, b] = x
        self.front[which] += stood.to("cpu")
