"""The bound of a solver's own chain. A row of a one-step table, read with F = p x + q D, is

    p(x_s | x_t)      = N(a' x_t + b' D, v),    a' = a + b p,  b' = b q,  v = c^2, or c^2 + b'^2 Var[x_0 | x_t]
    q(x_s | x_t, x_0) = N(A x_t + (alpha_s - A alpha_t) x_0, l^2),    l^2 = sigma_s^2 - A^2 sigma_t^2 > 0

and with r = l^2 / v each dimension of a term is (r - 1 - log r) / 2 + (mean of p - mean of q)^2 / (2 v). Any A keeps
the marginals, so each row takes the tighter of two, as if D were x_0: the solver's own, A = a' (DDIM's family: l^2 =
c^2 where the row keeps the marginals), or the forward process's posterior, A = (sigma_s / sigma_t) e^{-h}, which is
DDPM's. Where Var[x_0 | x_t] is one number C a time (`Denoiser.covariance`), and v has it, the tightest of all is known,
as data in which C is the mean of |x_0 - D|^2 / dim has it: A v = m l^2 with m = a' + b' alpha_t C / sigma_t^2.

Sources: Song, Meng and Ermon (2021), appendix B, for A; Bao et al. (2022), Analytic-DPM, for v.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scoresde.denoiser import Denoiser
from scoresde.grid import Grid
from scoresde.likelihood.decoder import (
    Data,
    Decoder,
    Draws,
    Terms,
    Tick,
    check_finite,
    decoder_std,
    float64,
    gaussian_kl,
    square_norm,
    total,
)
from scoresde.run import check_solver
from scoresde.solvers.base import Solver
from scoresde.solvers.rows import forgotten
from scoresde.tableau import Tableau
from scoresde.tensors import shown

__all__ = ["Chain"]


@shown
class Chain(NamedTuple):
    """The bound of a one-step table.

    Attributes:
        table: of R rows, the last of which is the decoder.
        a, b: a' and b' of the module's docstring, float64, shape (R,).
        A, l2: of the inference process, float64, shape (R,); 0 in the last row.
        draws, draw: of each term; where they come from.
        variance: as in `elbo`.
    """

    table: Tableau
    a: Tensor
    b: Tensor
    A: Tensor
    l2: Tensor
    draws: int
    draw: Draws
    variance: str

    @classmethod
    def of(
        cls,
        denoiser: Denoiser,
        solver: Solver,
        grid: Grid,
        draws: int | None,
        draw: Draws,
        variance: str,
    ) -> Chain:
        table = _one_step_table(denoiser, solver, grid, variance)
        a, b = table.in_x0()
        C = denoiser.covariance(table.t) if variance == "posterior" else None
        A, l2 = _inference(grid, a, b, table.c, C)
        draws = max(2, math.ceil(200 / len(table))) if draws is None else draws
        return cls(table, a, b, A, l2, draws, draw, variance)

    @property
    def start(self) -> float:
        return float(self.table.t[0])

    @property
    def nfe(self) -> int:
        return len(self.table) * self.draws

    @property
    def decoder(self) -> float:
        """The conventional standard deviation of the decoder."""
        return decoder_std(self.table.grid.sde, float(self.table.t[-1]))

    @property
    def decodings(self) -> int:
        """How many draws the last term is the mean of."""
        return self.draws

    def terms(self, denoiser: Denoiser, data: Data, decode: Decoder, cond: dict[str, Any], tick: Tick) -> Terms:
        alpha_t, sigma_t, alpha_s, _ = self.table.grid.pairs()
        u, w = self.a, self.b
        if self.variance == "solver":
            u, w = denoiser.view_of_output(u, w, self.table.t)
        # mean of p - mean of q = u x_t + w N - A x_t - (alpha_s - A alpha_t) x_0, in x_0, eps and N
        k, m = u * alpha_t - alpha_s, (u - self.A) * sigma_t
        output, times, own = denoiser.outputs(self.table.t), self.table.t.tolist(), denoiser.own(data().shape, cond)
        c2, b2, l2 = (self.table.c**2).tolist(), (self.b**2).tolist(), self.l2.tolist()
        rows = []
        for i in range(len(self.table)):
            for _ in range(self.draws):
                x0 = data()
                eps = self.draw.noise(i, x0)
                x_t, var = float(alpha_t[i]) * x0 + float(sigma_t[i]) * eps, None
                if self.variance == "posterior":
                    N, var = denoiser(x_t, times[i], **cond)
                    if var is None:
                        raise ValueError(f"variance='posterior', but {denoiser!r} knows no Var[x_0 | x_t]")
                else:
                    N = output(i, x_t, cond)
                error = float(k[i]) * x0 + float(m[i]) * eps + float(w[i]) * N
                if i == len(self.table) - 1:
                    rows.append(decode(error))
                elif var is None:
                    rows.append(-gaussian_kl(own.dims, l2[i] / c2[i], square_norm(error, own) / c2[i]))
                else:
                    v = (c2[i] + b2[i] * float64(var)).expand_as(error)
                    rows.append(-total(gaussian_kl(1, l2[i] / v, float64(error) ** 2 / v), own))
                tick()
        terms = torch.stack(rows).reshape(len(self.table), self.draws, -1)
        check_finite(terms.sum(1), self.table.t[:, None].expand(-1, terms.shape[2]))
        mean = terms.mean(1)
        each = terms.var(1) / self.draws if self.draws > 1 else torch.full_like(mean, math.nan)
        doubt = 2 * (each**2).sum(0) / max(self.draws - 1, 1)
        return Terms(mean[:-1].sum(0), mean[-1], each[:-1].sum(0), each[-1], doubt)


def _one_step_table(denoiser: Denoiser, solver: Solver, grid: Grid, variance: str) -> Tableau:
    """The solver's table, if the bound of its chain can be computed and is finite."""
    hint = "take DDPM(), DDIM(eta=1) or ExponentialSDE(), or leave solver and grid out for continuous time"
    check_solver(solver)
    if not isinstance(grid, Grid):
        raise TypeError(f"grid is {type(grid).__name__}: expected a Grid")
    grid.check_sde(denoiser.sde)
    if not solver.has_table:
        try:
            solver.tableau(grid)  # says why it has none
        except TypeError as error:
            raise ValueError(f"{error}. Without one its steps have no Gaussian density: {hint}") from error
    if float(grid.sde.sigma(grid.times[-1])) != 0:
        raise ValueError(
            f"the grid ends at t = {float(grid.times[-1]):.6g}, where there still is noise: the bound is of the data, "
            "so the grid must end at t = 0"
        )
    table = solver.tableau(grid)
    if not table.one_step:
        raise ValueError(
            f"{solver!r} has steps of several evaluations or of none, or steps that read those before them: its "
            f"p(x_s | x_t) is no Gaussian of known mean; {hint}"
        )
    still = table.c[:-1] == 0
    if variance == "solver" and bool(still.any()):
        t = float(table.t[:-1][still][0])
        raise ValueError(
            f"{solver!r} adds no noise in the step from t = {t:.6g}: p(x_s | x_t) is a point and the bound minus "
            f"infinity; {hint}, or variance='posterior' with a denoiser that knows its variance"
        )
    denoiser.check_times(table.t)
    return table


def _inference(grid: Grid, a: Tensor, b: Tensor, c: Tensor, C: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(A, l^2) of each row: the solver's own where it has noise and costs no more than the forward posterior, as if D
    were x_0; with C = Var[x_0 | x_t], which v then has in it, the tightest.
    """
    alpha_t, sigma_t, alpha_s, sigma_s = grid.pairs()
    lands = sigma_s == 0
    if C is not None:
        # The means are (a - A) sigma_t eps + b (D - x_0) apart; E (D - x_0)^2 = C and, since D - x_0 has no correlation
        # with x_t, E eps (D - x_0) = alpha_t C / sigma_t. The divergence is least where A v = m l^2.
        v, m = c**2 + b**2 * C, a + b * alpha_t * C / sigma_t**2
        half = 2 * sigma_s**2 / (v + torch.hypot(v, 2 * m * sigma_t * sigma_s))
        return torch.where(lands, 0.0, half * m), torch.where(lands, 0.0, half * v)
    share = forgotten(grid.sde, grid.times[:-1], grid.times[1:])
    # (sigma_s / sigma_t) e^{-h} = (alpha_t / alpha_s) (sigma_s / sigma_t)^2
    markov, markov_l2 = alpha_t / alpha_s * (sigma_s / sigma_t) ** 2, sigma_s**2 * share
    own_l2 = sigma_s**2 - (a * sigma_t) ** 2

    def cost(A: Tensor, l2: Tensor) -> Tensor:
        """Twice the divergence of a dimension with D = x_0, v = c^2, but for what does not depend on A."""
        return gaussian_kl(1, l2 / c**2, ((A - a) * sigma_t / c) ** 2)

    # Where c = 0 (variance="posterior") or l^2 <= 0, the comparison is with NaN or infinity, and false.
    own = (own_l2 > 0) & (cost(a, own_l2) <= cost(markov, markov_l2) + 1e-12)
    A, l2 = torch.where(own, a, markov), torch.where(own, own_l2, markov_l2)
    return torch.where(lands, 0.0, A), torch.where(lands, 0.0, l2)
