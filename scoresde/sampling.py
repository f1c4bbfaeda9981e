"""sample(): a denoiser, a shape and a solver give a `Solution`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from scoresde.brownian import BrownianNoise
from scoresde.categorical import ProductDenoiser, StateDenoiser, StateSolver
from scoresde.categorical.denoiser import wide
from scoresde.checks import ArgumentError
from scoresde.denoiser import Denoiser, check_call, check_denoiser
from scoresde.entries import check_cond
from scoresde.errors import NonFiniteError, all_finite, narrowed, not_finite
from scoresde.grid import Grid
from scoresde.likelihood.divergence import Divergence
from scoresde.likelihood.flow import density_run
from scoresde.masked import masked_noise, own_of
from scoresde.networks import warn_of_training_mode
from scoresde.noise import Noise, NoiseSource, noise_source
from scoresde.run import Solution, check_solver, choose, encoded, initial, locate, process, results
from scoresde.schedules import VPSDE
from scoresde.solvers.base import Solver
from scoresde.tableau import State
from scoresde.tensors import widen

__all__ = ["NonFiniteError", "sample"]


def sample(
    denoiser: Denoiser | StateDenoiser[Any],
    shape_or_x: Sequence[int] | Tensor,
    solver: Solver | StateSolver,
    *,
    steps: int | None = None,
    nfe: int | None = None,
    grid: Grid | None = None,
    seed: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    noise: Noise | None = None,
    cond: Mapping[str, Any] | None = None,
    trajectory: bool = False,
    progress: bool = False,
    differentiable: bool = False,
    device: torch.device | str | None = None,
    path: bool = False,
    log_prob: bool | str | Divergence = False,
) -> Solution:
    """Solve from t_max (or the grid's start) to the grid's end: up from data to noise on a `Grid.reversed`.

    Where the denoiser has a codec (`scoresde.Latent`) the run is of its states z: what stands at the end of the grid
    with less noise is data, decoded or, on an increasing grid, encoded; shapes, x_T and the trajectory are of z.

    Args:
        denoiser: the model; one of whole states (`scoresde.categorical`) with a solver of theirs.
        shape_or_x: (B, ...), to draw x_T from the SDE's prior, in float32 on the denoiser's device; or x_T itself,
            whose dtype the samples have (the state of a half-precision x_T is float32).
        solver: an instance, `DDIM(eta=0.5)` say.
        steps: number of steps on the solver's own grid. An adaptive solver needs none of steps, nfe and grid; its grid
            holds the times to report at, and nfe may be given beside it.
        nfe: instead of steps, a budget of evaluations; as many steps as fit are taken.
        grid: instead of steps, the grid itself. An increasing one encodes x, by a deterministic solver (see
            `scoresde.editing.latents`).
        seed: one integer, or one for each sample. Sample i then is the same in any batch, to rounding; where the batch
            has one adaptive step (`AdaptiveODE`, adaptive `ReverseSDE`), to the tolerance. Without seed, generator and
            noise, the run is seeded by the operating system.
        generator: instead of a seed, one generator that draws for the whole batch.
        noise: instead of a seed, a function noise(row, x) that returns z of the shape of x; x_T must then be given.
        cond: keyword arguments for the network: tensors and lists of strings with an entry per sample, or one for all;
            dicts, lists and tuples of them, nested as you like; and anything else, for all samples. Of a
            `scoresde.Masked` denoiser, for samples of various sizes, the mask is among them.
        trajectory: keep the state at every time of the grid.
        progress: show a progress bar.
        device: where x_T is drawn; by default where the network's parameters are (give it for a network without).
        differentiable: record gradients, with respect to x_T, cond and the network's parameters.
        path: the noise of every step is an increment of one Brownian path per sample (`BrownianNoise`), so that another
            number of steps sees the same path, and a sample keeps its look. For tables with a row a step; `ReverseSDE`
            does so by itself.
        log_prob: of the samples too, in the same pass: True or "hutchinson", with one probe an evaluation, "exact", or
            a `scoresde.likelihood.Divergence`. For deterministic solvers, tables and `AdaptiveODE`; the run ends at
            t_min (or the end of your grid, which must have noise), where the density is that of the solution's x; with
            a codec that has no volume, of its latent (`Solution.log_prob_of`). Take
            a solver in a view along the curve, UniPC(3, view="v", variable="half_log_snr") say, `log_prob`'s own: their
            volumes are the most exact.

    Raises:
        ValueError: before any evaluation, if arguments contradict each other, the denoiser's SDE is not the grid's, or
            a tensor or list of strings in a condition has neither one entry nor one per sample.
        NonFiniteError: if the samples are not finite. The run is replayed with the same noise to name the step, the
            time and the samples; until then nothing is checked on the device.

    >>> from scoresde import VPSDE
    >>> from scoresde.exact import Gaussian
    >>> from scoresde.solvers import DDIM
    >>> denoiser = Gaussian(mean=[3.0, -1.0], std=0.5).denoiser(VPSDE())
    >>> solution = sample(denoiser, (1000, 2), DDIM(), steps=20, seed=0)
    >>> solution.x.shape, solution.nfe
    (torch.Size([1000, 2]), 20)
    """
    if isinstance(denoiser, StateDenoiser):
        asked = {"path": path, "log_prob": log_prob, "differentiable": differentiable}
        if given := [name for name, value in asked.items() if value]:
            raise ArgumentError(f"{' and '.join(given)}: whole states have no density of an ODE, no path, no gradient")
        choice = steps, nfe, grid
        numbers = torch.zeros_like(shape_or_x, dtype=torch.float32) if isinstance(shape_or_x, Tensor) else shape_or_x
        source = noise_source(torch.device(device or denoiser.device), numbers, seed, generator, noise)
        return _of_states(denoiser, shape_or_x, solver, choice, source, cond, trajectory, progress)
    check_denoiser(denoiser)
    check_solver(solver)
    assert isinstance(solver, Solver)
    sde = process(denoiser, solver, steps or nfe)
    solver, grid = choose(sde, solver, steps, nfe, grid, end=sde.t_min if log_prob else 0.0)
    source = noise_source(torch.device(device or denoiser.device), shape_or_x, seed, generator, noise)
    denoiser, own = own_of(denoiser, shape_or_x.shape if isinstance(shape_or_x, Tensor) else shape_or_x, cond)
    source = masked_noise(source, own)
    if grid.increasing and not isinstance(shape_or_x, Tensor):
        raise ValueError("an increasing grid encodes data: give x, not a shape")
    x_T, out_dtype = initial(denoiser, shape_or_x, grid, source)
    x_T = own.only(x_T)
    check_call(denoiser, x_T, cond, masks=True)
    if trajectory:
        solver = solver.by_rows
    if grid.increasing:
        with torch.set_grad_enabled(differentiable):
            x_T = encoded(denoiser, x_T, cond)
    with torch.set_grad_enabled(differentiable):
        told = denoiser.prepared(cond)
    if log_prob:
        if trajectory or path or noise is not None:
            raise ValueError("log_prob= does not go with trajectory=, path= or noise=: give seed= or generator=")
        kind: Any = "hutchinson" if log_prob is True else log_prob
        return _with_density(
            denoiser, x_T, out_dtype, solver, grid, kind, source, (cond, told), differentiable, progress
        )

    draw: Noise = source
    if path:
        if not solver.has_table:
            raise ValueError(f"path=True is for solvers with a table, not {solver!r}; ReverseSDE has a path of its own")
        draw = BrownianNoise(solver.tableau(grid), source.entropies(len(x_T)), own)

    def run(solver: Solver = solver) -> Iterator[State]:
        return solver.iterate(denoiser, x_T, grid, draw, told)

    last, states = None, [x_T] if trajectory else []
    with torch.set_grad_enabled(differentiable):
        for last in _shown(run(), solver, grid) if progress else run():
            if trajectory and last.done:
                states.append(last.x)
    assert last is not None
    x, complete = last.x, last.done and last.step == grid.steps - 1
    if not all_finite(x):
        raise locate(lambda: run(solver.by_rows), source, x)
    kept = narrowed(torch.stack(states), out_dtype, "the trajectory", batch=1) if trajectory else None
    with torch.set_grad_enabled(differentiable):
        x, latent = results(denoiser, x, out_dtype, grid, cond)
    return Solution(
        x,
        last.nfe,
        grid,
        kept,
        status="complete" if complete else "max_nfe",
        t=float(grid.times[-1]) if complete else last.t,
        latent=latent,
        rounds=last.rounds,
        mask=own.mask,
    )


def _of_states(
    denoiser: StateDenoiser[Any],
    shape_or_x: Sequence[int] | Tensor,
    solver: object,
    choice: tuple[int | None, int | None, Grid | None],
    source: NoiseSource,
    cond: Mapping[str, Any] | None,
    trajectory: bool,
    progress: bool,
) -> Solution:
    """`sample` of whole states, an evaluation a step; the choice is among steps, nfe and grid."""
    if not isinstance(solver, StateSolver):
        raise TypeError(f"{solver!r} steps in numbers: whole states take Ancestral() or TauLeaping() of "
                        "scoresde.categorical")  # fmt: skip
    steps, nfe, grid = choice
    if sum(one is not None for one in choice) != 1:
        raise ArgumentError("give exactly one of steps=, nfe= and grid=")
    if grid is None:
        count = nfe if steps is None else steps
        assert count is not None
        grid = solver.grid(denoiser.process, count if nfe is None else int(min(count, denoiser.process.most_steps)))
    if isinstance(shape_or_x, Tensor):
        denoiser.check(shape_or_x, noisy=True, name="x_T")
        x_T = shape_or_x if shape_or_x.is_floating_point() else shape_or_x.long()
    else:
        start = float(grid.times[0])
        x_T = denoiser.prior_of(wide(source.prior(_STANDARD, shape_or_x, torch.float32, 1.0)), start)
        if isinstance(denoiser, ProductDenoiser):
            x_T = x_T.float()
        if start < denoiser.process.t_max:
            warnings.warn(
                f"x_T is a guess: the run starts at t = {start:.4g} of {denoiser.process!r}, where states are not all "
                "drawn anew. Start at t_max, or give x_T",
                stacklevel=3,
            )
    check_cond(cond, len(x_T))
    warn_of_training_mode(denoiser, stacklevel=3)
    states = [x_T] if trajectory else []
    bar = tqdm(desc=type(solver).__name__, total=grid.steps, unit="nfe", disable=not progress, leave=False)
    with torch.no_grad(), bar:
        for last in solver.iterate(denoiser, x_T, grid, source, denoiser.prepared(cond)):
            states += [last.x] * trajectory
            bar.update()
    return Solution(last.x, last.nfe, grid, torch.stack(states) if trajectory else None, t=float(grid.times[-1]))


_STANDARD = VPSDE()  # whose prior is N(0, 1)


def _shown(states: Iterator[State], solver: Solver, grid: Grid) -> Iterator[State]:
    """The states, with a progress bar: of evaluations, or of steps where a table's are not known beforehand."""
    total, done = solver.evaluations(grid), 0
    by_step = total is None and solver.has_table
    total, unit = (grid.steps, "step") if by_step else (total, "nfe")
    with tqdm(desc=type(solver).__name__, total=total, unit=unit, leave=False) as bar:
        for state in states:
            now = state.step + state.done if by_step else state.nfe
            bar.update(now - done)
            done = now
            yield state


def _with_density(
    denoiser: Denoiser,
    x_T: Tensor,
    out_dtype: torch.dtype,
    solver: Solver,
    grid: Grid,
    kind: Any,
    source: NoiseSource,
    conds: tuple[Mapping[str, Any] | None, Mapping[str, Any]],
    differentiable: bool,
    progress: bool,
) -> Solution:
    """The solution with its log-density, log p(x_T) - log |det dx / dx_T|; conds as given, and as prepared."""
    cond, told = conds
    own = denoiser.own(x_T.shape, cond or {})
    trace = kind if isinstance(kind, Divergence) else Divergence(kind)
    volume = density_run(denoiser, x_T, solver, grid, trace, source.probes(), told, differentiable)
    with torch.set_grad_enabled(differentiable):
        with tqdm(desc=type(solver).__name__, disable=not progress, leave=False) as bar:
            x, log_det = volume.solve(x_T, bar.update)
        value = denoiser.sde.prior_log_prob(x_T.double(), own) - log_det
    if bad := not_finite(value + x.reshape(len(x), -1).sum(1)):
        raise volume.locate(x_T, bad)
    stderr = volume.variance.clamp(min=0).sqrt()
    if volume.status != "complete":
        value, stderr = torch.full_like(value, math.nan), torch.full_like(stderr, math.nan)
    wide = x_T.dtype
    with torch.set_grad_enabled(differentiable):
        x, latent = results(denoiser, x, out_dtype, grid, cond)
    of: Literal["x", "z"] = "x"
    if denoiser.codec is not None:
        with torch.set_grad_enabled(differentiable):
            log_volume = denoiser.codec.log_volume(widen(x), **dict(cond or {}))
        value, of = (value, "z") if log_volume is None else (value + log_volume, "x")
    return Solution(
        x,
        volume.nfe,
        grid,
        status=volume.status,
        t=volume.t,
        log_prob=value.to(wide),
        log_prob_stderr=stderr.to(wide),
        log_prob_of=of,
        latent=latent,
        mask=own.mask,
    )
