"""`choose`: named solvers on named grids, tried on a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor
from tqdm.auto import tqdm

from scoresde.checks import ArgumentError, check_count, check_whole
from scoresde.denoiser import Denoiser, check_denoiser
from scoresde.entries import entries_of
from scoresde.grid import Grid, standard_time
from scoresde.masks import refuse_masks
from scoresde.noise import derive_seed, noise_source
from scoresde.run import check_solver, initial, process
from scoresde.run import choose as steps_of
from scoresde.sampling import sample
from scoresde.sde import SDE
from scoresde.solvers.base import Solver
from scoresde.solvers.exponential import DEIS, IPNDM, Adams, DPMSolverPP, ExponentialAB, UniPC
from scoresde.solvers.first_order import DDIM
from scoresde.solvers.runge_kutta import Heun
from scoresde.tuning.corrections import Corrections
from scoresde.tuning.solver import TunedSolver
from scoresde.variance.table import fingerprint
from scoresde.wrappers import without_codec

__all__ = [
    "SOLVERS",
    "SPACINGS",
    "Spacing",
    "Trial",
    "Try",
    "apart",
    "capped",
    "choose",
    "common_cap",
    "excess",
    "finalists",
]

CAP = 1000.0
"""Of a sample's squared distance, in medians."""

SOLVERS: tuple[Solver, ...] = (
    Adams(), DPMSolverPP(2), UniPC(2), UniPC(3), UniPC(3, "eps"), UniPC(2, "v"), UniPC(3, "v"),
    UniPC(2, "flow", variable="softplus"), UniPC(3, "flow", variable="softplus"), DPMSolverPP(3), DEIS(2), DEIS(3),
    IPNDM(3), ExponentialAB(2, "v"), ExponentialAB(3, "v"), DDIM(), Heun(),
)  # fmt: skip
"""Solvers that are tried by default; the first two find the grids."""

Spacing = Callable[..., Grid]
"""A grid of (sde, steps), and of (sde, steps, end=t) where it is to end with noise left."""


def _power(power: float, reach: float, sde: SDE, steps: int, *, end: float = 0.0) -> Grid:
    """`Grid.power` whose last step, to t = 0, is `reach` times as long as the others in tau^(1 / power); where noise is
    left there is no such step.
    """
    if end:
        return Grid.power(sde, steps, power=power, end=end)
    last = standard_time(sde, (reach / steps) ** power, 0.9 * sde.t_max)
    return Grid.power(sde, steps, power=power, last=last)


def _karras(sde: SDE, steps: int, *, end: float = 0.0) -> Grid:
    """`Grid.karras` whose last noisy time has sigma / alpha = 0.01 data scales, as the standard VP at tau = 1e-3."""
    return Grid.karras(sde, steps, **({"end": end} if end else {"last": standard_time(sde, 1e-3, 0.9 * sde.t_max)}))


SPACINGS: dict[str, Spacing] = {
    "customary": Grid.customary,
    "uniform": Grid.uniform,
    "power 4": Grid.power,
    "karras": _karras,
    **{
        f"power {power:g}, reach {reach:g}": partial(_power, power, reach)
        for power in (1.0, 1.5, 2.0, 3.0)
        for reach in (1.0, 0.5, 0.1)
    },
}
"""Grids that are tried by default, beside each solver's own."""

COMMON = ("karras",)
"""Those that all solvers are tried on."""


def choose(
    denoiser: Denoiser,
    shape_or_x: Sequence[int] | Tensor,
    *,
    nfe: int,
    end: float = 0.0,
    seed: int = 0,
    cond: Mapping[str, Any] | None = None,
    default: Solver | None = None,
    solvers: Sequence[Solver] = SOLVERS,
    spacings: Mapping[str, Spacing] = SPACINGS,
    reference_nfe: int | None = None,
    progress: bool = False,
) -> TunedSolver:
    """The best of named solvers, grids and landings for this model and a budget, by the distance of their samples from
    the model's own fine solution from the same noise: rms per dimension, of z where the denoiser has a codec.

    Half of the samples chooses: first a grid, for two solvers and on a quarter of them, then a solver, for the best
    grids and Karras', then a landing. The other half says how good it is, beside the default; where the choice is not
    better on it, the default is returned. Only deterministic solvers can be told from a fine solution this way.

    Args:
        denoiser: the model, wrapped as it will be used: guidance, clipping.
        shape_or_x: (B, ...), B some dozens, to draw x_T from the prior; or x_T itself.
        nfe: the budget.
        end: where the steps end, with noise left if > 0.
        seed: of x_T.
        cond: conditions, as for `sample`.
        default: what is to be beaten; by default the first of `solvers`, on its own grid.
        solvers: that are tried: deterministic, not adaptive; the first two find the grids.
        spacings: grids that are tried, by name, beside each solver's own.
        reference_nfe: evaluations of the fine solution; by default 12 times as many, at least 120.
        progress: show what is being done.

    Returns:
        a solver with its steps, which `sample(denoiser, shape, chosen, nfe=nfe)` takes; its `error` and the default's
        are of samples that chose nothing.

    Raises:
        ValueError: if there are fewer than 8 samples; if `end` is not within the SDE's times; if a solver draws noise
            or chooses its own times; if none can be run within the budget.

    >>> import torch
    >>> from scoresde import VPSDE, sample
    >>> from scoresde.exact import Gaussian
    >>> denoiser = Gaussian(torch.zeros(3), std=torch.tensor([0.05, 0.3, 1.0])).denoiser(VPSDE())
    >>> best = choose(denoiser, (16, 3), nfe=6)
    >>> best.error < 0.5 * best.default, sample(denoiser, (2, 3), best, nfe=6, seed=0).nfe
    (True, 6)
    """
    check_denoiser(denoiser)
    refuse_masks(denoiser, "tuning")
    check_count(nfe=nfe)
    check_whole(seed=seed)
    if not 0 <= end < denoiser.sde.t_max:
        raise ArgumentError(f"end={end}: expected 0 <= end < {denoiser.sde.t_max} of {denoiser.sde!r}")
    solvers = tuple(solvers)
    default = solvers[0] if default is None else default
    for solver in (*solvers, default):
        check_solver(solver)
        if solver.adaptive or not solver.has_table:
            raise ArgumentError(f"{solver!r} has no table of steps: only such solvers can be tried")
    with Trial(denoiser, shape_or_x, nfe, end, seed, cond, reference_nfe, progress) as trial:
        usual = trial.of([default], {})
        best = trial.ranked([*finalists(trial, solvers, spacings)[:4], *usual], trial.half)
        if not best or not usual:
            raise ArgumentError(f"nfe={nfe}: none of the solvers can be run within it")
        return trial.told(best[0], usual[0])


def finalists(trial: Trial, solvers: Sequence[Solver], spacings: Mapping[str, Spacing]) -> list[Try]:
    """The nearest of the solvers on these grids and their own, nearest first, by the half of the samples that chooses:
    the way of `choose`.
    """
    first = trial.ranked(trial.of(solvers[:2], spacings), trial.few)
    grids = [*list(dict.fromkeys(found.spacing for found in first))[:3], *COMMON]
    more = trial.of(solvers[2:], {name: spacings[name] for name in grids if name in spacings})
    second = trial.ranked([*first[:4], *more], trial.few)
    landed = [] if trial.end else [other for found in second[:6] if (other := found.landing_otherwise) is not None]
    return trial.ranked([*second[:6], *landed], trial.half)


class Try(NamedTuple):
    """A solver on a grid, by its name; "" is its own."""

    solver: Solver
    spacing: str
    grid: Grid

    @property
    def landing_otherwise(self) -> Try | None:
        """With the other last step, if it has a choice."""
        solver: Any = self.solver
        if (landing := getattr(solver, "landing", None)) is None:
            return None
        return self._replace(solver=replace(solver, landing="denoise" if landing == "polynomial" else "polynomial"))


class Trial:
    """The samples, and what was found on them."""

    def __init__(
        self,
        denoiser: Denoiser,
        shape_or_x: Sequence[int] | Tensor,
        nfe: int,
        end: float,
        seed: int,
        cond: Mapping[str, Any] | None,
        reference_nfe: int | None,
        progress: bool,
        features: Callable[[Tensor], Tensor] | None = None,
        robust: bool = False,
    ) -> None:
        check_denoiser(denoiser)
        self.denoiser, self.nfe, self.end, self.cond = without_codec(denoiser), nfe, end, cond
        reference_nfe = reference_nfe or max(12 * nfe, 120)
        fine, grid = self._own(Adams(), reference_nfe)
        n = len(shape_or_x) if isinstance(shape_or_x, Tensor) else int(shape_or_x[0])
        if n < 8:
            raise ArgumentError(f"shape_or_x has {n} samples: expected 8 or more, half of them to choose by")
        source = noise_source(denoiser.device, shape_or_x, [derive_seed(seed, i) for i in range(n)], None, None)
        self.x_T, _ = initial(denoiser, shape_or_x, grid, source)
        self.n, self.few, self.half = n, slice(0, max(n // 8, 4)), slice(0, n // 2)
        self.robust = robust
        self.features: Callable[[Tensor], Tensor] = features or (lambda x: x)
        self.bar = tqdm(desc=f"choosing for nfe={nfe}", unit="nfe", disable=not progress, leave=False)
        self.truth = self._run(fine, grid, slice(0, n))
        self.found: dict[tuple[Solver, str, int, int], Tensor] = {}

    def __enter__(self) -> Trial:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def _run(self, solver: Solver, grid: Grid, part: slice) -> Tensor:
        cond = None if self.cond is None else entries_of(self.cond, part, self.n)
        found = sample(self.denoiser, self.x_T[part], solver, grid=grid, cond=cond, seed=0)
        self.bar.update(found.nfe)
        return self.features(found.x)

    def _own(self, solver: Solver, nfe: int) -> tuple[Solver, Grid]:
        """With the steps that it takes by itself within a budget."""
        return steps_of(process(self.denoiser, solver, nfe), solver, nfe=nfe, end=self.end)

    def of(self, solvers: Iterable[Solver], spacings: Mapping[str, Spacing]) -> list[Try]:
        """The solvers on their own grids and on these, as many steps as fit the budget; without what cannot be."""
        found: list[Try] = []
        for solver in solvers:
            sde, made = process(self.denoiser, solver, self.nfe), set()
            for name, spacing in {"": None, **spacings}.items():
                try:
                    if spacing is None:
                        used, grid = self._own(solver, self.nfe)
                    else:
                        spaced = partial(spacing, end=self.end) if self.end else spacing
                        used, grid = solver, spaced(sde, solver.steps_within(sde, self.nfe, spacing=spaced))
                    noisy = bool((used.tableau(grid).c > 0).any())
                except ValueError:  # too few evaluations, or too few nodes
                    continue
                if noisy:
                    raise ArgumentError(f"{solver!r} draws noise: its samples cannot be told from a fine solution")
                if (key := (used, tuple(grid.times.tolist()))) not in made:  # spacings of other names may be the same
                    made.add(key)
                    found.append(Try(used, name, grid))
        return found

    def squares(self, one: Try, part: slice) -> Tensor:
        """The mean squared distance of each of these samples from the fine solution, (n,)."""
        key = (one.solver, one.spacing, part.start, part.stop)
        if key not in self.found:
            off = (self._run(one.solver, one.grid, part) - self.truth[part]).double()
            self.found[key] = off.square().flatten(1).mean(1).cpu()
        return self.found[key]

    def ranked(self, tries: Iterable[Try], part: slice) -> list[Try]:
        """Nearest first; where `robust`, by squares that are capped by those of the one with the least median."""
        found = []
        for one in tries:
            try:
                found.append((self.squares(one, part), one))
            except ArithmeticError:  # not finite
                continue
        cap = self.cap_of(*(squares for squares, _ in found))
        return [one for _, one in sorted(found, key=lambda pair: float(capped(pair[0], cap).mean()))]

    def cap_of(self, *squares: Tensor) -> float:
        """`common_cap` of them, where `robust`; else there is none."""
        return common_cap(*squares) if self.robust else math.inf

    def told(self, best: Try, usual: Try) -> TunedSolver:
        """The best, or the default if that is no worse, by the other half of the samples."""
        return self.reported(best, usual, slice(self.n // 2, self.n))

    def reported(self, best: Try, usual: Try, rest: slice, allowed: float = 0.0) -> TunedSolver:
        """The better of the two by those samples, with what they say of it; the second where they are as good, or where
        the first's plain mean square is larger by more than so many standard errors of the paired difference.
        """
        mine, theirs = (self.squares(one, rest) for one in (best, usual))
        cap = self.cap_of(mine, theirs)
        nearer = float(capped(mine, cap).mean()) < float(capped(theirs, cap).mean())
        if not nearer or excess(mine, theirs) > allowed:
            best, mine = usual, theirs
        solver, corrections = apart(best.solver)
        return TunedSolver(
            solver,
            tuple(best.grid.times.tolist()),
            self.denoiser.sde,
            self.nfe,
            corrections=corrections,
            error=float(mine.mean().sqrt()),
            default=float(theirs.mean().sqrt()),
            stderr=_stderr(mine, theirs),
            model=fingerprint(self.denoiser),
        )


def apart(solver: Solver) -> tuple[Solver, Corrections | None]:
    """What a solver is but for steps of its own, and its corrections."""
    return (solver.solver, solver.corrections) if isinstance(solver, TunedSolver) else (solver, None)


def _stderr(mine: Tensor, theirs: Tensor) -> float:
    """Of log(root mean square of mine / that of theirs), the two being paired."""
    relative = mine / mine.mean() - theirs / theirs.mean()
    return float(relative.std() / 2 / math.sqrt(len(mine)))


def excess(mine: Tensor, theirs: Tensor) -> float:
    """By how many of its standard errors the mean of mine exceeds that of theirs, the two being paired. Of k samples
    in the wrong mode in mine alone it is about sqrt(k), whatever they do to a ratio of means: one or two prove nothing.
    """
    more = mine - theirs
    return float(more.mean() / (more.std() / math.sqrt(len(more))).clamp(min=1e-300))


def common_cap(*squares: Tensor) -> float:
    """The cap that several solvers' squared distances are compared with: `CAP` times the least of their medians. It
    falls with the best of them; of a cap of the start, samples in the wrong mode would hide all that is gained after.
    """
    return CAP * max(min((float(one.median()) for one in squares), default=math.inf), 1e-300)


def ratio(mine: Tensor, theirs: Tensor) -> float:
    """Of their means, capped in common; infinity where some of mine are not finite."""
    if not bool(mine.isfinite().all()):
        return math.inf
    cap = common_cap(mine, theirs)
    return float(capped(mine, cap).mean() / capped(theirs, cap).mean().clamp(min=1e-300))


def capped(squares: Tensor, cap: float) -> Tensor:
    """s / (1 + s / cap): as they are where they are small, and never more than the cap, which infinity counts as."""
    return 1 / (1 / squares + 1 / cap)
