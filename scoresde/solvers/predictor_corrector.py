"""Predictor-corrector sampling (Song et al., 2021, section 4.2 and appendix G). A predictor moves x from t to s, and M
steps of Langevin dynamics at one noise level, with z ~ N(0, I), correct its law there:

    x <- x + step score(x, t) + sqrt(2 step) z,    a = (alpha_t / alpha_s)^2,  which is 1 - beta_i on VP and 1 on VE

    "langevin"         step = 2 a (r |z| / |score|)^2,  |.| the Euclidean norm of each sample (algorithms 4 and 5)
    "langevin batch"   the same with both norms averaged over the batch, as the authors' code has it
    "ald"              step = 2 a (r sigma_t)^2, the rule of annealed Langevin dynamics (Song and Ermon, 2019)

For x ~ p_t in d dimensions |z| / |score| tends to sigma_t as d grows, so "ald" is also the analytic form of "langevin":
a step known beforehand, for which the sampler is a table. In few dimensions the three differ: |score| is then often
near zero, and the first rule's steps have no bound and follow the sample, so that its law is wrong however many the
steps: on a 2-D mixture the modes came out 2.4 to 3.4 times too wide, by "ald" 1.08 to 1.01. Take "ald" there.

The paper's algorithm 1 corrects at s, after the predictor; the authors' code corrects at t, before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from scoresde.checks import check_count
from scoresde.denoiser import Denoiser
from scoresde.grid import Grid
from scoresde.noise import NoiseSource
from scoresde.sde import SDE
from scoresde.solvers.annealed import langevin_rows
from scoresde.solvers.base import SingleStep, Solver
from scoresde.solvers.first_order import ReverseDiffusion
from scoresde.solvers.rows import Rows
from scoresde.tableau import State, Tableau
from scoresde.tensors import expand_like

__all__ = ["PredictorCorrector"]


@dataclass(frozen=True)
class PredictorCorrector(Solver):
    """A predictor and a Langevin corrector, turn by turn.

    Nothing is corrected at t = 0, where the last predictor step returns the denoiser's mean, nor where the step is zero
    (a = 0: the step from alpha_t = 0). A grid of N steps that meets neither costs the predictor's evaluations and N M
    more, N (M + 1) for a predictor of one evaluation; if it ends at t = 0, order "predictor" saves M of them and order
    "corrector" none; one that starts at alpha_t = 0 saves M in either order.

    Args:
        predictor: any single-step solver.
        corrector: the rule of the module's docstring, or None for the predictor alone. "langevin batch" couples the
            samples of a batch. Where the score of a whole sample (or batch) is exactly zero, which leaves "langevin"
            undefined, its norm is taken to be sqrt(d) / sigma_t.
        snr: r, the signal-to-noise ratio of a step; 0.16 is the authors' for CIFAR-10, 0.01 to 0.17 in
            their table 5 with a predictor.
        corrector_steps: M.
        order: which comes first in a step from t to s: "predictor" corrects at s, "corrector" at t.

    Raises:
        ValueError: on another predictor, corrector or order, unless r > 0 is finite and M >= 1; by `iterate`, before
            any evaluation, if the SDEs differ or there is no noise.

    >>> from scoresde import VPSDE, sample
    >>> from scoresde.exact import Gaussian
    >>> denoiser = Gaussian(mean=torch.zeros(3, 8, 8), std=0.5).denoiser(VPSDE())
    >>> sample(denoiser, (4, 3, 8, 8), PredictorCorrector(), steps=10, seed=0).nfe
    19
    """

    masks: ClassVar[bool] = True

    predictor: SingleStep = ReverseDiffusion()  # noqa: RUF009 (frozen)
    corrector: Literal["langevin", "langevin batch", "ald"] | None = "langevin"
    snr: float = 0.16
    corrector_steps: int = 1
    order: Literal["predictor", "corrector"] = "predictor"

    def __post_init__(self) -> None:
        if not isinstance(self.predictor, SingleStep):
            raise ValueError(f"predictor={self.predictor!r}: expected a single-step solver, ReverseDiffusion() say")
        if self.corrector not in ("langevin", "langevin batch", "ald", None):
            raise ValueError(f"corrector={self.corrector!r}: expected 'langevin', 'langevin batch', 'ald' or None")
        if not 0 < self.snr < math.inf:
            raise ValueError(f"snr={self.snr}: expected a finite number > 0")
        check_count(corrector_steps=self.corrector_steps)
        if self.order not in ("predictor", "corrector"):
            raise ValueError(
                f"order={self.order!r}: expected 'predictor' (the paper) or 'corrector' (the authors' code)"
            )

    def grid(self, sde: SDE, steps: int, *, end: float = 0.0) -> Grid:
        return self.predictor.grid(sde, steps, end=end)

    def evaluations(self, grid: Grid) -> int:
        return self.predictor.evaluations(grid) + self.corrector_steps * int(self._corrects(grid)[2].sum())

    @property
    def has_table(self) -> bool:
        return self.corrector in ("ald", None)

    def tableau(self, grid: Grid) -> Tableau:
        """The table on that grid, for corrector "ald" or None.

        Raises:
            TypeError: for the other correctors, whose steps depend on the states they meet.
        """
        if self.corrector is None:
            return self.predictor.tableau(grid)
        if self.corrector != "ald":
            raise TypeError(f"{self!r} has no table: its steps depend on norms of the score; corrector='ald' has one")
        at, a, corrected = self._corrects(grid)
        where = corrected.nonzero().flatten()
        once = langevin_rows(grid.sde, at[where], self.snr * a[where].sqrt()).numbered(where)
        correct = once.take(torch.arange(len(where), device="cpu").repeat_interleave(self.corrector_steps))
        predict = self.predictor.rows(grid.sde, grid.times[:-1], grid.times[1:])
        rows = [predict, correct] if self.order == "predictor" else [correct, predict]
        return Rows.merge(rows).tableau(grid)

    def loop(
        self, denoiser: Denoiser, x: Tensor, grid: Grid, noise: NoiseSource | None, cond: dict[str, Any]
    ) -> Iterator[State]:
        if self.has_table:
            return super().loop(denoiser, x, grid, noise, cond)
        assert noise is not None
        at, _, corrected = self._corrects(grid)
        rows = self.predictor.rows(grid.sde, grid.times[:-1], grid.times[1:])
        zero = torch.zeros(grid.steps, dtype=torch.int64, device="cpu")
        predict = [  # a table for each step
            rows.take(rows.move == i).tableau(Grid(grid.sde, pair), step=zero)
            for i, pair in enumerate(grid.times.unfold(0, 2, 1))
        ]
        denoiser.check_times(torch.cat([at[corrected], *(table.t[table.evaluates] for table in predict)]))
        return self._loop(denoiser, x, grid, predict, noise, cond)

    def _loop(
        self,
        denoiser: Denoiser,
        x: Tensor,
        grid: Grid,
        predict: list[Tableau],
        noise: NoiseSource,
        cond: dict[str, Any],
    ) -> Iterator[State]:
        row, nfe = 0, 0
        at, a, corrected = (column.tolist() for column in self._corrects(grid))
        for i, table in enumerate(predict):
            turns = [table, *[None] * (self.corrector_steps if corrected[i] else 0)]
            if self.order == "corrector":
                turns.reverse()
            for turn, prediction in enumerate(turns, start=1):
                last = turn == len(turns)
                if prediction is None:
                    x, nfe = self._correct(denoiser, x, at[i], a[i], noise(row, x), cond), nfe + 1
                    yield State(row, nfe, i, last, at[i], x)
                    row += 1
                else:
                    for state in prediction.iterate(denoiser, x, partial(_shifted, noise, row), cond):
                        x = state.x
                        yield State(row + state.row, nfe + state.nfe, i, last and state.done, state.t, x)
                    row, nfe = row + len(prediction), nfe + prediction.nfe

    def _correct(self, denoiser: Denoiser, x: Tensor, t: float, a: float, z: Tensor, cond: dict[str, Any]) -> Tensor:
        score = denoiser.score(x, t, **cond)
        own = denoiser.own(x.shape, cond)
        z_norm, score_norm = own.norm(z), own.norm(score)
        if self.corrector == "langevin batch":
            z_norm, score_norm = z_norm.mean(0), score_norm.mean(0)
        typical = own.root / float(denoiser.sde.sigma(t))
        score_norm = torch.where(score_norm == 0, typical, score_norm)
        step = expand_like(2 * a * (self.snr * z_norm / score_norm) ** 2, x)
        return x + step * score + (2 * step).sqrt() * z

    def _corrects(self, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        """For each step: the time it corrects at, a, and whether it does, each of shape (N,)."""
        alpha_t, _, alpha_s, _ = grid.pairs()
        at = grid.times[1:] if self.order == "predictor" else grid.times[:-1]
        a = (alpha_t / alpha_s) ** 2
        return at, a, (at > 0) & (a > 0) & (self.corrector is not None)


def _shifted(noise: NoiseSource, first: int, row: int, x: Tensor) -> Tensor:
    return noise(first + row, x)
