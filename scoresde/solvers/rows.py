"""The rows of many moves at once, from which the tables of single-step solvers are put together.

A move goes from a time t to another, s: down by a step of a solver, or up by the forward process. Its rows follow each
other and read no F of another move, so moves can be put in any order: a step of EDM with churn is a move up and a step
of Heun, Restart repeats moves over an interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from scoresde.grid import Grid
from scoresde.sde import SDE
from scoresde.tableau import Tableau
from scoresde.tensors import shown

__all__ = ["Rows", "forgotten", "forward_rows", "one_evaluation", "stage_rows"]


@shown
class Rows(NamedTuple):
    """Columns of a `Tableau`, with the number of the move that each row belongs to.

    Attributes:
        move: int64, shape (R,).
        t, p, q, a, c: float64, shape (R,), as in `Tableau`.
        b: float64, shape (R, K).
    """

    move: Tensor
    t: Tensor
    p: Tensor
    q: Tensor
    a: Tensor
    b: Tensor
    c: Tensor

    def take(self, chosen: Tensor) -> Rows:
        """The rows of an index or a mask over rows."""
        return Rows(*(column[chosen] for column in self))

    def numbered(self, move: Tensor) -> Rows:
        """With move m renamed move[m]."""
        return self._replace(move=move[self.move])

    @staticmethod
    def merge(parts: Sequence[Rows]) -> Rows:
        """All rows in the order of their moves; rows of the same move in the order of the parts."""
        K = max(part.b.shape[1] for part in parts)
        wide = [part._replace(b=torch.nn.functional.pad(part.b, (0, K - part.b.shape[1]))) for part in parts]
        rows = Rows(*(torch.cat(columns) for columns in zip(*wide, strict=True)))
        return rows.take(rows.move.argsort(stable=True))

    def tableau(self, grid: Grid, step: Tensor | None = None) -> Tableau:
        """The table of these rows on the grid, move m belonging to the grid's step m, or step[m]."""
        return Tableau(
            grid,
            a=self.a,
            b=self.b,
            c=self.c,
            view=(self.p, self.q),
            t=self.t,
            step=self.move if step is None else step[self.move],
        )


def forgotten(sde: SDE, t: Tensor, s: Tensor, tau: Tensor | float = 1.0) -> Tensor:
    """1 - e^{-2 tau^2 h}, h = lambda_s - lambda_t: the share of x_t's noise that x_s does not keep in the forward
    process (tau = 1), or in the reverse SDE of noise level tau.
    """
    tau = torch.as_tensor(tau, dtype=torch.float64, device="cpu")
    h = sde.half_log_snr(s) - sde.half_log_snr(t)
    return torch.where(tau == 0, 0.0, -torch.expm1(-2 * tau**2 * h))  # not 0 times an infinite h


def one_evaluation(sde: SDE, t: Tensor, s: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Rows:
    """The moves x_s = a x_t + b D + c z, with their two ends made exact.

    On a move to sigma_s = 0, x_s is D. On one from alpha_t = 0, x_t is pure noise that says nothing of x_0, and the
    move is a draw from N(alpha_s D, sigma_s^2) where the coefficients have no limit.
    """
    alpha_t, alpha_s, sigma_s = sde.alpha(t), sde.alpha(s), sde.sigma(s)
    forgets = (alpha_t == 0) & ~(a.isfinite() & b.isfinite() & c.isfinite())
    lands = sigma_s == 0
    zero = torch.zeros_like(a)
    return Rows(
        move=torch.arange(len(t), device="cpu"),
        t=t,
        p=zero,
        q=torch.ones_like(a),
        a=torch.where(forgets | lands, zero, a),
        b=torch.where(forgets | lands, alpha_s, b)[:, None],
        c=torch.where(lands, zero, torch.where(forgets, sigma_s, c)),
    )


def forward_rows(sde: SDE, t: Tensor, s: Tensor, scale: float = 1.0) -> Rows:
    """The moves up, t -> s with s >= t, by the forward process: x_s = (alpha_s / alpha_t) x_t + c z, which evaluates
    nothing. `scale` multiplies c (EDM's S_noise).
    """
    ratio = sde.alpha(s) / sde.alpha(t)
    # sigma_s^2 - ratio^2 sigma_t^2, without the difference of near numbers
    c = scale * sde.sigma(s) * forgotten(sde, s, t).clamp(min=0).sqrt()
    zero = torch.zeros_like(c)
    return Rows(torch.arange(len(t), device="cpu"), t, zero, zero, ratio, zero[:, None], c)


def stage_rows(t: Tensor, m: Tensor, p: Tensor, q: Tensor, W: Tensor) -> Rows:
    """The moves of a method of S stages on y = x / m, which the flow moves by an integral of F alone:

        y_j = y_0 + sum_{l < j} W_{j,l} F_l,    F_l = p_l x_l + q_l D(x_l, t_l),    j = 1..S

    where y_S is the result. Rows carry the state from stage to stage: x_{j+1} / m_{j+1} - x_j / m_j is the difference
    of two lines of W.

    Args:
        t, p, q: of the evaluations, shape (M, S).
        m: at the stages and at the end, shape (M, S + 1).
        W: shape (M, S, S), W[:, j - 1, l] as above.
    """
    M, S = t.shape
    lines = torch.diff(W, dim=1, prepend=W.new_zeros(M, 1, S)) * m[:, 1:, None]
    # Row j reads F_j, F_{j-1}, ..., F_0.
    lag = torch.arange(S, device="cpu")[:, None] - torch.arange(S, device="cpu")
    b = torch.where(lag >= 0, lines.gather(2, lag.clamp(min=0).expand(M, S, S)), 0.0)
    move = torch.arange(M, device="cpu").repeat_interleave(S)
    t, p, q, a = (column.flatten() for column in (t, p, q, m[:, 1:] / m[:, :-1]))
    return Rows(move, t, p, q, a, b.reshape(M * S, S), torch.zeros_like(a))
