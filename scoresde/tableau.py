"""The tableau: a Butcher tableau for diffusion models, and the one loop that runs it.

A sampler whose coefficients are known beforehand is a table, with a row for each evaluation of the denoiser D:

    F_i     = p_i x_i + q_i D(x_i, t_i)                        the view: x0, eps, score, v or velocity
    x_{i+1} = a_i x_i + sum_k b_{i,k} F_{i-k} + c_i z_i        z_i ~ N(0, I)

Rows index evaluations, not steps, so a two-stage step of Heun is two rows. A row whose F no row reads makes no
evaluation: it moves the state alone, back to a higher noise level say (EDM's churn, Restart, RePaint). Coefficients
are float64 on the host; the loop reads them as Python numbers, branches on no device value and draws nothing where
c_i = 0. A step that lands on sigma = 0 is x_0 exactly, D itself. Nothing is checked on the device: a NaN propagates to
the end, whatever follows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scoresde.denoiser import Denoiser, check_denoiser
from scoresde.grid import Grid
from scoresde.masked import begun
from scoresde.pictures import html_table
from scoresde.tensors import shown
from scoresde.views import view_of_mean

if TYPE_CHECKING:
    from scoresde.noise import Noise

__all__ = ["Output", "Ready", "State", "Tableau", "responses"]

Column = Tensor | float
Output = Callable[[int, Tensor, Mapping[str, Any]], Tensor]
"""output(i, x, cond): what the denoiser's network predicts of the state x of row i."""


@shown
class State(NamedTuple):
    """Where the loop stands after a row.

    Attributes:
        row: index of the row, from 0.
        nfe: evaluations of the denoiser so far.
        step: index of the grid step that the row belongs to.
        done: whether the row ends its step, so that x stands at grid.times[step + 1].
        t: time of the evaluation; in a loop that stops short of the grid's end, the time that x has reached.
        x: the state after the row, shape (B, ...): the loop's own tensor, which its driver may change in place.
        rounds: of `scoresde.solvers.Parallel`: batches of evaluations so far, and x is a copy; None of the others.
    """

    row: int
    nfe: int
    step: int
    done: bool
    t: float
    x: Tensor
    rounds: int | None = None


class _Row(NamedTuple):
    """A row in terms of the denoiser's own output N (D = r x + s N), as Python numbers."""

    t: float
    x: float  # x_{i+1} = x * x_i + n * N_i + sum past * F_{i-k} + c z
    n: float | None  # None where nothing is evaluated
    onto: int | None  # row of an earlier F, read for the last time, that becomes the new state: its coefficient is one
    past: tuple[tuple[int, float], ...]  # (row, coefficient) of the other earlier F
    c: float
    keep: tuple[float, float] | None  # keep[0] x_i + keep[1] N_i, a multiple of F_i, if a later row reads it
    drop: tuple[int, ...]  # rows whose F no later row reads


class Tableau:
    """The coefficients of a sampler on a grid.

    Args:
        grid: the grid that it steps on.
        a, c: factors of the state and of fresh noise, a number or shape (R,).
        b: factors of F_i, F_{i-1}, ..., shape (R,) or (R, K).
        view: what F is: "x0", "eps", "score", "v", "velocity", or (p, q), each a number or shape (R,).
        t: time of each row, at which x_i stands and D is evaluated, shape (R,); by default the starts of the steps.
        step: the grid step that each row belongs to, integers, shape (R,); by default a row a step.

    Attributes:
        grid, t, a, b, c, p, q, step: as above, float64 (step: int64) on the CPU, b of shape (R, K).
        evaluates: whether a row evaluates the denoiser, bool, shape (R,).

    Raises:
        ValueError: if shapes do not fit, a coefficient is not finite, a row reads an F from before the first, an
            evaluation lies outside (0, sde.t_limit], c is negative, the rows do not pass through the grid's steps in
            order, or there is noise on an increasing grid.

    >>> from scoresde import VPSDE
    >>> from scoresde.solvers import DDIM
    >>> DDIM().tableau(Grid.uniform(VPSDE(), 2))
    Tableau of 2 rows on Grid(VPSDE(beta_min=0.1, beta_max=20.0, t_min=1e-05, t_max=1.0), 2 steps: 1, 0.5, 0)
     row  step         t          p          q          a          b          c
       0     0         1          0          1   0.959675   0.274876          0
       1     1       0.5          0          1          0          1          0
    """

    def __init__(
        self,
        grid: Grid,
        *,
        a: Column,
        b: Column,
        c: Column = 0.0,
        view: str | tuple[Column, Column] = "x0",
        t: Tensor | None = None,
        step: Tensor | None = None,
    ) -> None:
        self.grid = grid
        self.t = grid.times[:-1].clone() if t is None else _column(t, "t", None)
        R = len(self.t)
        b = torch.as_tensor(b, dtype=torch.float64, device="cpu")
        self.a, self.c = _column(a, "a", R), _column(c, "c", R)
        self.b = b.clone() if b.ndim == 2 else _column(b, "b", R)[:, None]
        self.step = (
            torch.arange(R, device="cpu") if step is None else torch.as_tensor(step, dtype=torch.int64, device="cpu")
        )
        if self.t.ndim != 1 or self.b.shape[0] != R or self.step.shape != (R,):
            raise ValueError(
                f"{R} rows by t, but b has shape {tuple(self.b.shape)} and step {tuple(self.step.shape)}: "
                "expected (R, K) and (R,)"
            )
        # The checks are numpy's: for as few numbers torch takes several times as long.
        times, reads = _array(self.t), _array(self.b) != 0
        row, lag = np.arange(R)[:, None], np.arange(self.b.shape[1])
        if (reads & (lag > row)).any():
            raise ValueError("b reads evaluations from before the first row: start with a lower order")
        evaluates = np.zeros(R, dtype=bool)
        evaluates[(row - lag)[reads]] = True
        self.evaluates = torch.from_numpy(evaluates)
        outside = evaluates & ~((times > 0) & (times <= grid.sde.t_limit))
        if outside.any():
            raise ValueError(f"evaluations at t = {times[outside].tolist()}: expected times in (0, {grid.sde.t_limit}]")
        p, q = view_of_mean(view, grid.sde, self.t) if isinstance(view, str) else view
        self.p, self.q = _column(p, "p", R), _column(q, "q", R)
        noise = _array(self.c)
        if grid.increasing and not (noise == 0).all():  # no number, even: the reverse SDE has no way up
            raise ValueError(
                "an increasing grid, from data to noise, is for deterministic solvers, and this one draws noise: take "
                "another, DDIM() or UniPC() say, or the grid's reversed()"
            )
        for name in ("a", "b", "c", "p", "q"):
            finite = np.isfinite(_array(getattr(self, name))).reshape(R, -1).all(1)
            if not finite.all():
                i = int(finite.argmin())
                raise ValueError(
                    f"coefficient {name} of row {i} (t = {float(self.t[i]):.6g} of {grid.sde!r}) is not finite: the "
                    "method is undefined there; start the grid where alpha > 0, or use another solver"
                )
        if (noise < 0).any():
            raise ValueError(f"c = {noise.tolist()}: noise has a standard deviation >= 0")
        steps = _array(self.step)
        hops = np.diff(steps)
        if (hops < 0).any() or (hops > 1).any() or steps[0] != 0 or steps[-1] != grid.steps - 1:
            raise ValueError(
                f"step = {self.step.tolist()}: the rows must go through steps 0..{grid.steps - 1} in order"
            )

    @property
    def nfe(self) -> int:
        """Number of evaluations of the denoiser."""
        return int(self.evaluates.sum())

    @property
    def one_step(self) -> bool:
        """Whether each row is a step of the grid by its own F: x_s = a' x + b' D + c z, as `in_x0` has it."""
        whole = len(self) == self.grid.steps and torch.equal(self.t, self.grid.times[:-1])
        return whole and bool(self.evaluates.all()) and not bool((self.b[:, 1:] != 0).any())

    def in_x0(self) -> tuple[Tensor, Tensor]:
        """(a', b') of such rows: F = p x + q D put in, a' = a + b p and b' = b q, each of shape (R,)."""
        return self.a + self.b[:, 0] * self.p, self.b[:, 0] * self.q

    def __len__(self) -> int:
        return len(self.t)

    def iterate(
        self, denoiser: Denoiser, x: Tensor, noise: Noise | None = None, cond: Mapping[str, Any] | None = None
    ) -> Iterator[State]:
        """Run the table from x, yielding the `State` after each row.

        Gradients follow the caller's grad mode; nothing is checked on the device.

        Args:
            denoiser: evaluated once a row, on the grid's SDE.
            x: x_T, shape (B, ...), in the dtype that the state is to have.
            noise: called as noise(row, x) where c > 0.
            cond: keyword arguments for the denoiser.

        Raises:
            TypeError: if the denoiser is none.
            ValueError: if the denoiser has another SDE than the grid, a stochastic table is given no noise, the
                denoiser cannot be evaluated at the table's times (an eps network at alpha = 0), or a step leaves no
                digit in the dtype of x. All before any evaluation.
        """
        check_denoiser(denoiser)
        self.grid.check_sde(denoiser.sde)
        denoiser, x, noise = begun(denoiser, x, noise, cond)
        return self.ready(denoiser, x.dtype).run(denoiser, x, noise, dict(cond or {}))

    def ready(self, denoiser: Denoiser, dtype: torch.dtype) -> Ready:
        """What a run of that denoiser from a state of that dtype needs before its first evaluation.

        Raises:
            ValueError: if the denoiser cannot be evaluated at the table's times, or a step leaves no digit.
        """
        rows = self._rows(denoiser)
        self._check_digits(rows, dtype)
        return Ready(self.t, rows, (*self.step.tolist(), -1))

    def _check_digits(self, rows: list[_Row], dtype: torch.dtype) -> None:
        """Raises ValueError where the state is multiplied by more than its dtype has digits, and none is left."""
        info = torch.finfo(dtype)
        for row in rows:
            most = max(map(abs, (row.x, row.n or 0.0, row.c, *(row.keep or ()), *(b for _, b in row.past))))
            if abs(row.x) * info.eps >= 1 or most > info.max:
                raise ValueError(
                    f"the step from t = {row.t:.6g} of {self.grid.sde!r} has a factor of {most:.3g}: in {dtype} no "
                    "digit of its result is left. Start the grid where alpha is larger, end the SDE there (t_max=, "
                    "beta_max=), or take another solver or network"
                )

    def _rows(self, denoiser: Denoiser) -> list[_Row]:
        on = self.evaluates
        u, w = torch.zeros_like(self.p), torch.zeros_like(self.q)
        if self.nfe:
            denoiser.check_times(self.t[on])
            u[on], w[on] = denoiser.view_of_output(self.p[on], self.q[on], self.t[on])  # F = u x + w N
        x, n = self.a + self.b[:, 0] * u, self.b[:, 0] * w
        past: list[tuple[tuple[int, float], ...]] = [
            tuple((i - k, b) for k, b in enumerate(line) if k and b != 0) for i, line in enumerate(self.b.tolist())
        ]
        readers: dict[int, list[tuple[int, float]]] = {}  # of each F, the rows that read it and their coefficients
        for i, reads in enumerate(past):
            for j, weight in reads:
                readers.setdefault(j, []).append((i, weight))
        onto: dict[int, int] = {}
        scale = dict.fromkeys(readers, 1.0)
        for j, by in readers.items():
            last, weight = by[-1]
            if last not in onto and all(abs(other) <= 1e3 * abs(weight) for _, other in by):
                onto[last], scale[j] = j, weight
        columns = zip(*(column.tolist() for column in (self.t, x, n, self.c, u, w, on)), strict=True)
        return [
            _Row(
                t,
                x_i,
                n_i if on_i else None,
                onto.get(i),
                tuple((j, weight / scale[j]) for j, weight in past[i] if onto.get(i) != j),
                c,
                (u_i * scale[i], w_i * scale[i]) if i in readers else None,
                tuple(j for j, _ in past[i] if readers[j][-1][0] == i and onto.get(i) != j),
            )
            for i, (t, x_i, n_i, c, u_i, w_i, on_i) in enumerate(columns)
        ]

    def _columns(self) -> dict[str, Tensor]:
        names = ["b"] if self.b.shape[1] == 1 else [f"b{k}" for k in range(self.b.shape[1])]
        return {
            "t": self.t,
            "p": self.p,
            "q": self.q,
            "a": self.a,
            **dict(zip(names, self.b.T, strict=True)),
            "c": self.c,
        }

    def _repr_html_(self) -> str:
        numbers = zip(self.step.tolist(), *(column.tolist() for column in self._columns().values()), strict=True)
        rows = [[i, step, *(f"{number:.6g}" for number in own)] for i, (step, *own) in enumerate(numbers)]
        return html_table(f"Tableau of {len(self)} rows on {self.grid!r}", ["row", "step", *self._columns()], rows)

    def __repr__(self) -> str:
        names, columns = self._columns().keys(), self._columns().values()
        lines = [f"Tableau of {len(self)} rows on {self.grid!r}"]
        lines.append(" row  step" + "".join(f"{name:>10} " for name in names).rstrip())
        for i in range(len(self)):
            if len(self) > 24 and 10 <= i < len(self) - 10:
                if i == 10:
                    lines.append(" ...")
                continue
            lines.append(f"{i:4d}{int(self.step[i]):6d}" + " ".join(f"{float(c[i]):10.6g}" for c in columns))
        return "\n".join(lines)


class Ready:
    """A table as the loop runs it, for one denoiser: all on the host and made beforehand.

    Attributes:
        t: times of the evaluations, shape (R,).
        rows: in terms of the denoiser's own output.
        steps: the grid step of each, and -1.
    """

    def __init__(self, t: Tensor, rows: list[_Row], steps: tuple[int, ...]) -> None:
        self.t, self.rows, self.steps = t, rows, steps

    def __len__(self) -> int:
        return len(self.rows)

    def run(self, denoiser: Denoiser, x: Tensor, noise: Noise | None, cond: dict[str, Any]) -> Iterator[State]:
        """As `Tableau.iterate`.

        Raises:
            ValueError: if noise is drawn and there is none.
        """
        if noise is None and any(row.c > 0 for row in self.rows):
            raise ValueError(
                "this tableau draws noise (c > 0): pass noise=, a function (row, x) such as scoresde.noise.SeededNoise"
            )
        return self.loop(self.output(denoiser), x, noise, cond)

    @property
    def draws(self) -> list[int]:
        """The rows that draw noise, in order."""
        return [i for i, row in enumerate(self.rows) if row.c != 0.0]

    def output(self, denoiser: Denoiser) -> Output:
        """The denoiser at the times of the rows, with all that depends on the times alone done."""
        return denoiser.outputs(self.t.clone())  # for a time= that writes to it

    def loop(self, output: Output, x: Tensor, noise: Noise | None, cond: Mapping[str, Any]) -> Iterator[State]:
        """The loop alone, straight tensor code: nothing is checked, read from the host's tensors or copied between
        devices, so that it can be traced and captured as a whole.

        Args:
            output: of `Ready.output`.
            x, noise, cond: as for `Tableau.iterate`.
        """
        steps, nfe = self.steps, 0
        kept: dict[int, Tensor] = {}
        for i, row in enumerate(self.rows):
            before = x
            if row.n is not None:
                n, nfe = output(i, x, cond), nfe + 1
            # The multiples of x and n also where they are 0: a NaN must reach the end.
            x = before * row.x if row.onto is None else kept.pop(row.onto).add_(before, alpha=row.x)
            if row.n is not None:
                x = x.add_(n, alpha=row.n)
            if row.keep is not None:
                u, w = row.keep
                # n * w even where w is 1: the network may reuse the memory of its output.
                kept[i] = n * w if u == 0.0 else (before * u).add_(n, alpha=w)
            for j, b in row.past:
                x = x.add_(kept[j], alpha=b)
            if row.c != 0.0:
                x = x.add_(noise(i, x), alpha=row.c)  # type: ignore[misc]
            for j in row.drop:
                del kept[j]
            yield State(i, nfe, steps[i], steps[i] != steps[i + 1], row.t, x)


def _array(column: Tensor) -> np.ndarray:
    array: np.ndarray = column.detach().numpy()
    return array


def _column(value: Column, name: str, rows: int | None) -> Tensor:
    column = torch.as_tensor(value, dtype=torch.float64, device="cpu").clone()
    if column.ndim == 0 and rows is not None:
        return column.repeat(rows)
    if column.ndim != 1 or (rows is not None and len(column) != rows):
        raise ValueError(f"{name} has shape {tuple(column.shape)}: expected a number or {(rows or 'R',)}")
    return column


def responses(table: Tableau, f: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives of the output by the state that enters each row, xi (R + 1, D), and by each F, phi (R, D), where f,
    shape (R, D), is the derivative of F by its own x. With f = 0 they are the weights of x_T and of every F held fixed.
    """
    R, K = table.b.shape
    row, lag = torch.arange(R, device="cpu")[:, None], torch.arange(K, device="cpu")
    readers = torch.nn.functional.pad(table.b, (0, 0, 0, K))[row + lag, lag]  # b_{i+k,k}, zero beyond the last row
    xi, phi = f.new_zeros(R + K, f.shape[1]), f.new_zeros(R, f.shape[1])
    xi[R] = 1.0
    for i in reversed(range(R)):
        phi[i] = readers[i] @ xi[i + 1 : i + 1 + K]
        xi[i] = table.a[i] * xi[i + 1] + f[i] * phi[i]
    return xi[: R + 1], phi
