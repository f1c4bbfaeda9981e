"""A run: what `sample` returns, the one choice among steps, nfe and grid, and where a run became non-finite."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from scoresde.checks import ArgumentError
from scoresde.continuity import label_in_steps
from scoresde.denoiser import Denoiser
from scoresde.errors import NonFiniteError, all_finite, narrowed, not_finite, some
from scoresde.grid import Grid
from scoresde.noise import NoiseSource
from scoresde.pictures import html_of
from scoresde.sde import NOT_NOISE, SDE
from scoresde.solvers.base import Solver
from scoresde.solvers.kept import grid_of
from scoresde.tableau import State
from scoresde.tensors import check_batch, told, widen

__all__ = ["Solution", "check_solver", "choose", "encoded", "initial", "locate", "process", "results"]


@dataclass(frozen=True)
class Solution:
    """What `sample` returns.

    Attributes:
        x: the samples, shape (B, ...), at grid.times[-1]; decoded where the denoiser has a codec (`scoresde.Latent`)
            and the grid decreases: data, of the shape of data.
        latent: the states that x is decoded of, z at grid.times[-1]: what another run goes on from. None without codec.
        nfe: evaluations of the denoiser that were made, each on the whole batch.
        grid: the grid that was stepped on.
        trajectory: if asked for, the states at all grid.times, shape (N + 1, B, ...); fewer if not complete. With a
            codec they are z.
        status: "complete", or "max_nfe" where an adaptive solver's budget ran out before the grid's end.
        t: the time that x stands at: grid.times[-1] if complete; else, where samples have steps of their own, that of
            the least advanced.
        log_prob: if asked for, log p_t(x) in nats, shape (B,), NaN if not complete.
        log_prob_stderr: its standard error from the probes, shape (B,).
        rounds: of `scoresde.solvers.Parallel`: batches that the evaluations were made in, one after the other.
        mask: of a `scoresde.Masked` denoiser, bool, shape of x: which entries there are; the others of x are 0.
        log_prob_of: what it is the density of: "x", or, with a codec that has no volume, "z", the latent.
    """

    x: Tensor
    nfe: int
    grid: Grid
    trajectory: Tensor | None = None
    status: Literal["complete", "max_nfe"] = "complete"
    t: float = 0.0
    log_prob: Tensor | None = None
    log_prob_stderr: Tensor | None = None
    log_prob_of: Literal["x", "z"] | None = None
    latent: Tensor | None = None
    rounds: int | None = None
    mask: Tensor | None = None

    __repr__ = told

    def _repr_html_(self) -> str:
        return html_of(repr(self), self.x)


def check_solver(solver: object) -> None:
    """Raises TypeError unless it is an instance of a solver."""
    if not isinstance(solver, Solver):
        hint = f"{solver.__name__}()" if isinstance(solver, type) else "DDIM() say"
        raise TypeError(f"solver must be an instance of a solver ({hint}), not {solver!r}")


def process(denoiser: Denoiser, solver: Solver, steps: int | None) -> SDE:
    """The denoiser's SDE, on which a grid of the solver's own is to be made: of a chain without its nodes, where solver
    and time label know times between them, and `steps` (or evaluations) are fewer than the nodes.
    """
    sde = denoiser.sde
    if sde.nodes is None or not solver.between or steps is None or steps + 1 >= len(sde.nodes):
        return sde
    in_steps = label_in_steps(denoiser, sde.t_min, sde.t_max) is not None
    return sde if in_steps else sde.unrounded


def choose(
    sde: SDE,
    solver: Solver,
    steps: int | None = None,
    nfe: int | None = None,
    grid: Grid | None = None,
    *,
    end: float = 0.0,
) -> tuple[Solver, Grid]:
    """The solver and the grid of a run, by one of three: a number of steps, a budget of evaluations, or the grid.

    An adaptive solver needs none of them, its grid holds the times to report at; nfe= may be given beside it.

    Args:
        sde: of the denoiser, as `process` gives it.
        solver: whose grid is taken where none is given.
        steps, nfe, grid: as for `sample`.
        end: of the solver's own grid; with noise left if > 0.

    Returns:
        the solver, perhaps with a budget or orders set, and the grid.

    Raises:
        TypeError: if the grid is none.
        ValueError: unless exactly one is given, if not even one step fits nfe, or if the grid has another SDE.
    """
    given = [name for name, value in (("steps", steps), ("nfe", nfe), ("grid", grid)) if value is not None]
    if solver.adaptive:
        if steps is not None and grid is not None:
            raise ArgumentError("give at most one of steps= and grid=; an adaptive solver takes nfe= beside either")
        if nfe is not None:
            solver = solver.within(sde, nfe)[0]
        steps = 1 if steps is None else steps
    elif len(given) != 1:
        raise ArgumentError(f"give exactly one of steps=, nfe= and grid=; got {' and '.join(given) or 'none'}")
    if grid is not None:
        if not isinstance(grid, Grid):
            raise TypeError(
                f"grid is {type(grid).__name__}: expected a Grid, Grid(denoiser.sde, times) for your own times"
            )
        grid.check_sde(sde)
        return solver, grid

    def own() -> tuple[Solver, Grid]:
        N = steps
        if N is None:
            assert nfe is not None
            if not end:
                return solver.within(sde, nfe)
            N = solver.steps_within(sde, nfe, end=end)
        return solver, solver.grid(sde, N, end=end) if end else solver.grid(sde, N)

    return grid_of(solver, sde, (steps, nfe, end), own)


def initial(
    denoiser: Denoiser, shape_or_x: Sequence[int] | Tensor, grid: Grid, source: NoiseSource
) -> tuple[Tensor, torch.dtype]:
    """x_T as the state that a run begins with, float32 or wider: drawn for the grid's start, or given. And the dtype
    that its results are to have. A draw that is but a guess of x_T is told of.
    """
    if isinstance(shape_or_x, Tensor):
        check_batch(shape_or_x, "x_T")
        return widen(shape_or_x), shape_or_x.dtype
    sde, t = denoiser.sde, float(grid.times[0])
    if (signal := sde.signal_at(t)) > NOT_NOISE:
        warnings.warn(
            f"x_T is a guess: where the run starts, at t = {t:.4g} of {sde!r}, data of scale {sde.data_scale:.4g} are "
            f"{signal:.2g} of the noise, and their mean and shape are missing from N(0, {sde.prior_std_at(t):.4g}^2). "
            "Start where there is more noise, or give x_T; sde.for_data(std) tells the scale",
            stacklevel=3,  # the caller of `sample`
        )
    return source.prior(sde, shape_or_x, torch.float32, t), torch.float32


def encoded(denoiser: Denoiser, x: Tensor, cond: Mapping[str, Any] | None) -> Tensor:
    """Data as the states of the denoiser's diffusion, in float32 or wider: z where it has a codec, else x itself.

    Raises:
        NonFiniteError: if z is not finite where x is.
    """
    return widen(x) if denoiser.codec is None else _mapped("encode", denoiser.codec.encode, widen(x), cond)


def results(
    denoiser: Denoiser, z: Tensor, dtype: torch.dtype, grid: Grid, cond: Mapping[str, Any] | None
) -> tuple[Tensor, Tensor | None]:
    """What `Solution` has of a run's end: its x, decoded on the way down where there is a codec, and then the latent.

    Raises:
        NonFiniteError: if x is not finite where z is, or overflows in that dtype.
    """
    if denoiser.codec is None:
        return narrowed(z, dtype, "the result"), None
    x = z if grid.increasing else _mapped("decode", denoiser.codec.decode, z, cond)
    return narrowed(x, dtype, "the result"), narrowed(z, dtype, "the latent")


def _mapped(name: str, function: Callable[..., Tensor], x: Tensor, cond: Mapping[str, Any] | None) -> Tensor:
    y = function(x, **dict(cond or {}))
    if y.dtype != x.dtype or len(y) != len(x):
        raise ValueError(
            f"the codec's {name} made {y.dtype} of shape {tuple(y.shape)} of {x.dtype} of shape {tuple(x.shape)}: "
            "expected as many items, in the dtype of what is given"
        )
    if not all_finite(y):
        bad = not_finite(y)
        raise NonFiniteError(f"the codec's {name} made samples {some(bad)} non-finite", None, None, bad)
    return y


def locate(run: Callable[[], Iterator[State]], source: NoiseSource, end: Tensor) -> NonFiniteError:
    """Replay a run that ended non-finite, with checks, to say where it went wrong."""
    source.rewind()
    with torch.no_grad():
        for state in run():
            if samples := not_finite(state.x):
                message = (
                    f"sample{'s' * (len(samples) > 1)} {some(samples)} became non-finite in step {state.step}, at the "
                    f"evaluation at t = {state.t:.6g} (row {state.row})"
                )
                return NonFiniteError(message, state.step, state.t, samples)
    samples = not_finite(end)
    message = f"samples {some(samples)} are not finite, but a replay with the same noise was: the network is random"
    return NonFiniteError(message, None, None, samples)
