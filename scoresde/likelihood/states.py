"""The bound of whole states, or of products with them: the terms of a chain's steps, or of continuous time.

    log p(x_0) >= -KL(q(x_T | x_0) | p(x_T)) - sum_{t -> s} E KL(q(x_s | x_t, x_0) | p(x_s | x_t)) + E log p(x_0 | x_1)

of which each term is a sum over entries. In continuous time the sum becomes an integral (`scoresde.categorical`), down
to t = 0 for whole states alone, which have no reconstruction then; a product stops at t_min, as its numbers do.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scoresde.categorical import Ancestral, StateDenoiser
from scoresde.categorical.denoiser import wide
from scoresde.checks import ArgumentError
from scoresde.grid import Grid
from scoresde.likelihood.continuous import variance_of_strata
from scoresde.likelihood.decoder import Draws, Terms, Tick, check_finite
from scoresde.tensors import shown

__all__ = ["StateBound"]


@shown
class StateBound(NamedTuple):
    """The bound of whole states.

    Attributes:
        times: of each evaluation, float64, (R, B).
        nexts: where its step goes, (R,); None in continuous time.
        strata: how many of the R are of the integral, or of a chain's steps but the last.
        draws: of each term of a chain; of the reconstruction in continuous time.
        draw: where the noise comes from.
    """

    times: Tensor
    nexts: Tensor | None
    strata: int
    draws: int
    draw: Draws

    @classmethod
    def of(
        cls, denoiser: StateDenoiser[Any], solver: object, grid: Grid | None, draws: int | None, draw: Draws
    ) -> StateBound:
        """Of a grid, of a chain's own steps, or of continuous time.

        Raises:
            ValueError: if the grid is another process's, or does not go from t_max to 0; if the solver is not
                Ancestral(), whose steps alone have probabilities.
        """
        process, B = denoiser.process, len(draw.seeds)
        if solver is not None and not isinstance(solver, Ancestral):
            raise ArgumentError(f"{solver!r}: the bound of whole states is that of Ancestral()")
        if grid is None and process.nodes is not None:
            grid = Ancestral().grid(process, len(process.nodes))
        if grid is not None:
            grid.check_sde(process)
            if float(grid.times[0]) != process.t_max or float(grid.times[-1]) != 0:
                raise ArgumentError(f"the bound needs a grid from t_max = {process.t_max:g} to 0, not {grid!r}")
            draws = max(2, math.ceil(200 / grid.steps)) if draws is None else draws
            times = grid.times[:-1].repeat_interleave(draws)[:, None].expand(-1, B)
            return cls(times, grid.times[1:].repeat_interleave(draws), (grid.steps - 1) * draws, draws, draw)
        K = draws or 64
        u = (torch.arange(K, dtype=torch.float64, device="cpu")[:, None] + draw.uniform(K)) / K
        last = denoiser.ends[1]
        draws = max(2, K // 16) if last > 0 else 0
        ends = torch.full((draws, B), last, dtype=torch.float64, device="cpu")
        return cls(torch.cat([denoiser.times(u), ends]), None, K, draws, draw)

    @property
    def nfe(self) -> int:
        return len(self.times)

    def terms(self, denoiser: StateDenoiser[Any], x0: Tensor, cond: dict[str, Any], tick: Tick) -> Terms:
        like, rows = wide(torch.zeros_like(x0, dtype=torch.float32)), []
        for i, t in enumerate(self.times):
            x = denoiser.perturb(x0, t.to(x0.device), self.draw.noise(i, like))
            found = _wide(denoiser.predicted(x, t.to(x0.device), **cond))
            if i >= self.strata:
                rows.append(denoiser.last_term(x0, x, found, t.to(x0.device)))
            elif self.nexts is None:
                rows.append(denoiser.rate_term(x0, x, found, t.to(x0.device)))
            else:
                rows.append(denoiser.step_term(x0, x, found, t.to(x0.device), float(self.nexts[i])))
            tick()
        terms = torch.stack(rows).to(like.dtype)
        check_finite(terms, self.times)
        zero = torch.zeros_like(terms[0])
        if self.nexts is None:
            K, last = self.strata, terms[self.strata :]
            variance, doubt = variance_of_strata(terms[:K] / K)
            of_last = last.var(0) / len(last) if len(last) > 1 else zero
            doubt = doubt + 2 * of_last**2 / max(len(last) - 1, 1)
            return Terms(terms[:K].mean(0), last.mean(0) if len(last) else zero, variance, of_last, doubt)
        n = self.draws
        each = terms.reshape(-1, n, len(x0))
        mean = each.mean(1)
        of = each.var(1) / n if n > 1 else torch.full_like(mean, math.nan)
        doubt = 2 * (of**2).sum(0) / max(n - 1, 1)
        return Terms(mean[:-1].sum(0), mean[-1], of[:-1].sum(0), of[-1], doubt)


def _wide(found: Any) -> Any:
    return wide(found) if isinstance(found, Tensor) else type(found)(*map(wide, found))
