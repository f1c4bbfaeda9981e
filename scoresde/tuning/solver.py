"""A solver with the steps, and perhaps coefficients, that were found best for a model and a budget, and its file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from scoresde.checks import ArgumentError
from scoresde.denoiser import Denoiser
from scoresde.errors import CheckpointError
from scoresde.files import sealed, unsealed, write_whole
from scoresde.grid import Grid
from scoresde.processes import sde_from
from scoresde.sde import SDE
from scoresde.solvers.base import Around, Solver
from scoresde.solvers.catalogue import call_of, solver_of
from scoresde.tableau import Tableau
from scoresde.tuning.corrections import Corrections
from scoresde.variance.table import fingerprint

__all__ = ["TunedSolver"]

FORMAT = "scoresde tuned solver 1"
CORRECTED = "scoresde tuned solver 2"
"""With corrections, which a reader of the first would not see."""

_ERRORS = ("error", "default", "stderr")


@dataclass(frozen=True)
class TunedSolver(Around):
    """A solver that takes its own steps, and no others: what `choose` and `tune` make. Its table is that of a solver on
    these steps, and what `tune` has learned to add. It has no way back, from data to noise; it steps like any other
    with guidance, and where it ends with noise left `sample(log_prob=)` gives the density of its samples. A method that
    takes each step for one of DDIM's (`RawEps`, optimal variances, the likelihood of a chain) refuses a corrected table
    by name.

    Attributes:
        solver: what it is but for its steps and corrections.
        times: its steps, decreasing, the last where it ends.
        sde: whose times they are.
        nfe: evaluations that it makes.
        error: distance of its samples from the model's fine solution, rms per dimension, on samples that chose nothing.
        default: that of the solver that `choose` compares with, or of `tune`'s start, on the same.
        stderr: the standard error of log(error / default) over these samples, NaN where it is not known.
        model: `scoresde.variance.fingerprint` of the denoiser that it was chosen for; "" where nothing is compared.
        corrections: to the solver's table; None where there are none.
    """

    solver: Solver
    times: tuple[float, ...]
    sde: SDE
    nfe: int
    error: float = math.nan
    default: float = math.nan
    stderr: float = math.nan
    model: str = ""
    corrections: Corrections | None = None

    def grid(self, sde: SDE, steps: int, *, end: float = 0.0) -> Grid:
        own = self._own(sde)
        if steps != own.steps or end != self.times[-1]:
            asked = f"steps={steps}" + (f" to t = {end:.4g}" if end else "")
            raise ArgumentError(f"{asked}: {self!r} has {own.steps} steps of its own, to t = {self.times[-1]:.4g}")
        return own

    def within(self, sde: SDE, nfe: int) -> tuple[Solver, Grid]:
        if nfe != self.nfe:
            raise ArgumentError(f"nfe={nfe}: {self!r} was made for {self.nfe}; make another for another budget")
        return self, self._own(sde)

    def tableau(self, grid: Grid) -> Tableau:
        if grid != self._own(grid.sde):
            raise ValueError(f"{grid!r}: {self!r} takes the steps that it was made for, and no others: give none")
        table = self.solver.tableau(grid)
        return table if self.corrections is None else self.corrections.onto(table)

    def _own(self, sde: SDE) -> Grid:
        if sde != self.sde:
            raise ValueError(f"{self!r} was made for {self.sde!r}, not for {sde!r}")
        return Grid(sde, self.times)

    def check_model(self, denoiser: Denoiser) -> None:
        """Raises ValueError if it was made for another model, by its `fingerprint`."""
        if self.model and (found := fingerprint(denoiser)) != self.model:
            raise ValueError(f"{self!r} was made for the model {self.model}, not for {found}: make one for this")

    @property
    def story(self) -> str:
        """What it is and how good, in a sentence."""
        steps = f"{call_of(self.solver)} on {len(self.times) - 1} steps of its own"
        if math.isnan(self.error):
            return steps
        if self.corrections is not None:
            steps += ", corrected"
        if self.error == self.default:
            return f"{steps}, {self.error:.3g} from the model's fine solution: nothing better was found"
        return f"{steps}, {self.error:.3g} from the model's fine solution ({self.default:.3g} before)"

    def save(self, path: str | Path) -> None:
        """Write it to a file of JSON, whole or not at all."""
        arrays = {name: value.tolist() for name, value in self.sde.arrays().items()}
        errors = {name: None if math.isnan(value := getattr(self, name)) else value for name in _ERRORS}
        numbers = {"nfe": self.nfe, **errors, "model": self.model}
        form = FORMAT if self.corrections is None else CORRECTED
        more = {} if self.corrections is None else {"corrections": self.corrections._asdict()}
        content = {"format": form, "solver": call_of(self.solver), "times": list(self.times), "sde": repr(self.sde)}
        text = sealed({**content, **({"arrays": arrays} if arrays else {}), **numbers, **more}, indent=1)
        write_whole(Path(path), lambda out: out.write(f"{text}\n".encode()))

    @classmethod
    def load(cls, path: str | Path, sde: SDE | None = None) -> TunedSolver:
        """Read what `save` wrote; nothing in the file is executed.

        Args:
            path: the file.
            sde: that it must have been made for; it may be left out for those of this package.

        Raises:
            FileNotFoundError: if there is none.
            scoresde.training.CheckpointError: if the file is damaged or no such file, was made for another SDE, or for
                one that is not known here and not given.
        """
        path = Path(path)
        try:
            found, whole = unsealed(path.read_text())
            if not whole or found.get("format") not in (FORMAT, CORRECTED):
                raise ValueError(f"no file of a {cls.__name__}")
            arrays = {name: torch.tensor(v, dtype=torch.float64) for name, v in found.get("arrays", {}).items()}
            known = sde if sde is not None and repr(sde) == found["sde"] else sde_from(found["sde"], arrays)
            errors = {name: math.nan if found[name] is None else float(found[name]) for name in _ERRORS}
            solver, times = solver_of(found["solver"]), tuple(map(float, found["times"]))
            more = Corrections(**found["corrections"]).checked() if found["format"] == CORRECTED else None
            nfe, model, made_for = int(found["nfe"]), str(found["model"]), str(found["sde"])
        except (UnicodeDecodeError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error
        if known is None:
            raise CheckpointError(f"{path} was made for {made_for}, which is not known here: give it, load(path, sde=)")
        if sde is not None and sde != known:
            raise CheckpointError(f"{path} was made for {made_for}, not for {sde!r}")
        return cls(solver, times, known, nfe, model=model, corrections=more, **errors)

    def __repr__(self) -> str:
        more = "" if self.corrections is None else ", corrected"
        return f"TunedSolver({call_of(self.solver)}, {len(self.times) - 1} steps, nfe={self.nfe}{more})"
