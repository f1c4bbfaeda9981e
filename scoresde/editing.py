"""Editing: a given x goes part of the way to noise, or all of it, and comes back as the model's.

It gets to noise in one of two ways,

    by perturbation    x_t = alpha_t x + sigma_t eps,  eps ~ N(0, I)                     `sdedit`, `variations`
    by encoding        x_t = Phi_{t_min -> t}(x), the probability-flow ODE               `edit`, `interpolation`, ...

and back by any solver, or the same ODE, perhaps under another condition or with another denoiser.

The first is SDEdit (Meng et al., 2022): what lies below the noise at t is forgotten and drawn anew, what lies above is
kept. On data N(m, C), with S = alpha^2 C + sigma^2 and K = alpha^2 C / S, it gives, in C's eigenbasis,

    by the reverse SDE    N(m + K (x - m),        (1 + K) sigma^2 C / S)       p(x_0 | x_t), averaged over eps
    by the ODE            N(m + sqrt(K) (x - m),          sigma^2 C / S)

The second is DDIM inversion (Song, Meng and Ermon, 2021), between two denoisers the dual diffusion implicit bridge (Su
et al., 2023), x -> Phi'_{T -> t_min}(Phi_{t_min -> T}(x)). On Gaussians whose C and C' commute it is the map of optimal
transport, m' + sqrt(C' / C) (x - m), as far as the prior has forgotten the data. It keeps what the two have in common,
and can be undone. Strong guidance makes the ODE stiff and the codes unlike the prior: encode without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from scoresde.chain import DDPMChain
from scoresde.checks import check_count, check_option
from scoresde.denoiser import Denoiser, check_call
from scoresde.grid import Grid
from scoresde.guidance.operators import Mask
from scoresde.guidance.projections import DDNM
from scoresde.likelihood.coding import check_pair, interpolate, plan
from scoresde.noise import GeneratorNoise, NoiseSource, SeededNoise, derive_seed, noise_source
from scoresde.sampling import Solution, sample
from scoresde.sde import SDE
from scoresde.solvers import Solver
from scoresde.tensors import check_batch, widen

__all__ = ["Edit", "edit", "interpolation", "interpolation_grid", "sdedit", "strength_time", "variations"]

_FINE = 1000  # steps of the spacing that strengths are read from
_VARIATION = 4  # the stream of seeds of variations: 0 to 3 are those of `SeededNoise`
_SAME = 1e-9  # times that differ by less, relatively, are one


@dataclass(frozen=True)
class Edit:
    """What editing through latents returns.

    Attributes:
        x: the results, of the shape that the function names, in the dtype of the x given.
        latent: the states at grid.times[0] that they were solved from, shape of x.
        nfe: evaluations of the denoisers, both ways, each on the whole batch of its way.
        grid: of the way back.
        trajectory: if asked for, the states on the way back, shape (N + 1, *x.shape).
    """

    x: Tensor
    latent: Tensor
    nfe: int
    grid: Grid
    trajectory: Tensor | None = None


def strength_time(sde: SDE, strength: float) -> float:
    """The time that a strength in (0, 1] means: that fraction, from the data, of the spacing customary for the SDE
    (`Grid.customary`). On VP, sub-VP, cosine, VE and flow it is strength t_max, as t_0 of Meng et al. (2022); on EDM it
    is uniform in sigma^(1/7), on a `DDPMChain` the nearest node. It depends on no solver, so that another one, or more
    steps, solve the same problem.

    Raises:
        ValueError: unless 0 < strength <= 1.

    >>> from scoresde import EDMSDE, VPSDE
    >>> print(f"{strength_time(VPSDE(), 0.5):.3f} {strength_time(EDMSDE(), 0.5):.3f} {strength_time(EDMSDE(), 1.0)}")
    0.500 2.504 80.0
    """
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 < strength <= 1:
        raise ValueError(f"strength={strength!r}: expected a number in (0, 1]; nothing is edited at 0, all is new at 1")
    if isinstance(sde, DDPMChain):
        return float(max(1, round(strength * sde.steps)))
    if sde.customary_grid == "uniform":
        return float(strength * sde.t_max)
    times = Grid.customary(sde, _FINE).times
    position = (1 - strength) * _FINE
    i = min(int(position), _FINE - 1)
    return float(torch.lerp(times[i], times[i + 1], position - i))


def sdedit(
    denoiser: Denoiser,
    reference: Tensor,
    solver: Solver,
    *,
    strength: float | None = None,
    t: float | None = None,
    steps: int | None = None,
    nfe: int | None = None,
    grid: Grid | None = None,
    seed: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    cond: Mapping[str, Any] | None = None,
    mask: Tensor | None = None,
    trajectory: bool = False,
    progress: bool = False,
    differentiable: bool = False,
) -> Solution:
    """Samples that look like the reference: solved from x_t = alpha_t reference + sigma_t eps (SDEdit; Meng et al.,
    2022, algorithms 1 to 4).

    Args:
        denoiser: the model.
        reference: strokes, a collage, another picture, shape (B, ...), in the units of the data; not changed.
        solver: any, `DDPM()` or `ReverseSDE()` say for the SDE of the paper, a deterministic one for its ODE.
        strength: in (0, 1], which says where to start: see `strength_time`. More is more of the model and less of the
            reference.
        t: instead, that time itself.
        steps, nfe, grid: as for `sample`, of the whole way from t_max. Its part from t on is made, the first step
            shortened to begin there: about a fraction `strength` of the evaluations on a grid uniform in t.
        seed, generator: as for `sample`: sample i, its eps too, is the same in any batch.
        cond: as for `sample`.
        mask: true, or 1, where the reference is kept as it is, of a shape that broadcasts to the event: there D is the
            reference (`DDNM`), so that the state goes as alpha reference + sigma eps does, and the rest sees it at its
            own noise level. For other ways, wrap the solver, `Replacement(DDPM(), mask, reference)` or `RePaint`, or
            the denoiser, and leave mask out.
        trajectory, progress, differentiable: as for `sample`; the trajectory begins with x_t.

    Returns:
        the `Solution`, in the dtype of the reference.

    Raises:
        TypeError, ValueError: before any evaluation, unless exactly one of strength and t is given and in its range, or
            if the grid begins below t, the mask does not fit, or as `sample` does.
        NonFiniteError: as for `sample`.

    >>> from scoresde import VPSDE
    >>> from scoresde.exact import Gaussian
    >>> from scoresde.solvers import DDPM
    >>> denoiser, guide = Gaussian(mean=[3.0, -1.0], std=0.5).denoiser(VPSDE()), torch.tensor([[3.0, 4.0]])
    >>> for strength in (0.01, 0.3, 1.0):
    ...     solution = sdedit(denoiser, guide, DDPM(), strength=strength, steps=50, seed=0)
    ...     print([round(v, 1) for v in solution.x[0].tolist()])
    [2.9, 3.9]
    [2.2, -0.4]
    [3.0, -0.6]
    """
    check_batch(reference, "reference")
    check_pair(denoiser, solver)
    start = _start(denoiser.sde, strength, t)
    solver, whole = _whole(denoiser.sde, solver, steps, nfe, grid)
    grid = _cut(whole, start)
    source = noise_source(reference.device, reference, seed, generator, None)
    if mask is not None:
        known = Mask(mask)
        known(reference)  # checks the shapes
        denoiser = DDNM(denoiser, known, widen(reference))
    check_call(denoiser, reference, cond)
    x_t = _perturbed(denoiser.sde, widen(reference), start, source)
    found = sample(
        denoiser,
        x_t,
        solver,
        grid=grid,
        noise=source,
        cond=cond,
        trajectory=trajectory,
        progress=progress,
        differentiable=differentiable,
    )
    kept = None if found.trajectory is None else found.trajectory.to(reference.dtype)
    return replace(found, x=found.x.to(reference.dtype), trajectory=kept)


def edit(
    denoiser: Denoiser,
    x: Tensor,
    solver: Solver | None = None,
    *,
    cond_from: Mapping[str, Any] | None = None,
    cond_to: Mapping[str, Any] | None = None,
    to: Denoiser | None = None,
    strength: float | None = None,
    t: float | None = None,
    steps: int | None = None,
    nfe: int | None = None,
    grid: Grid | None = None,
    trajectory: bool = False,
    progress: bool = False,
    differentiable: bool = False,
) -> Edit:
    """Encode, edit, decode: x to noise by the ODE of one model, and back by that of another.

    The models are one network under two conditions, {"label": threes} and {"label": eights} say, or two denoisers, of
    two data sets. Nothing is drawn: under the same model it is x again, to the error of the solver (which
    `encode(check=True)` tells), and editing back undoes an edit.

    Args:
        denoiser: the model that x is of.
        x: data, shape (B, ...).
        solver: `AdaptiveODE()` by default, or any deterministic solver with a table.
        cond_from, cond_to: conditions on the way to noise and on the way back, as `cond` of `sample`.
        to: the model of the way back, if it is another. If it has another SDE, the latent is scaled by the ratio of
            the priors' standard deviations, and each has a grid of its own, from its t_max.
        strength, t: how far to noise, as for `sdedit`; all the way by default. Less keeps more of x.
        steps, nfe, grid: each way, as for `encode`, of the whole way from t_max; the part below t is made.
        trajectory: keep the states of the way back.
        progress, differentiable: as for `sample`.

    Returns:
        the `Edit`, whose x has shape (B, ...).

    Raises:
        TypeError, ValueError: before any evaluation, as `encode` does, or if strength=, t= or grid= is given where the
            SDEs differ.
        ArithmeticError: if an adaptive solver's evaluations ran out.
        NonFiniteError: as for `sample`.
    """
    check_batch(x, "x")
    to = denoiser if to is None else to
    up, there = plan(denoiser, solver, steps, nfe, grid)
    down, back = (up, there) if to is denoiser else plan(to, solver, steps, nfe, grid)
    if denoiser.sde == to.sde:
        there = back = _part(there, denoiser.sde, strength, t)
    elif strength is not None or t is not None or grid is not None:
        raise ValueError(
            f"from {denoiser.sde!r} to {to.sde!r}: strength=, t= and grid= name a time, and the two have others; leave "
            "them out, and both go from t_max on the solver's own grids"
        )
    for model, cond, way, on in ((denoiser, cond_from, up, there.reversed()), (to, cond_to, down, back)):
        check_call(model, x, cond)
        on.check_sde(model.sde)
        if not way.adaptive:
            table = way.tableau(on)
            model.check_times(table.t[table.evaluates])
    options: dict[str, Any] = {"progress": progress, "differentiable": differentiable}
    code = _complete(sample(denoiser, widen(x), up, grid=there.reversed(), cond=cond_from, **options))
    latent = code.x if denoiser.sde == to.sde else code.x * (to.sde.prior_std / denoiser.sde.prior_std)
    found = _complete(sample(to, latent, down, grid=back, cond=cond_to, trajectory=trajectory, **options))
    return _made(found, latent, code.nfe, (len(x),), x.dtype)


def interpolation(
    denoiser: Denoiser,
    a: Tensor,
    b: Tensor,
    solver: Solver | None = None,
    *,
    weights: int | Sequence[float] | Tensor = 9,
    cond: Mapping[str, Any] | None = None,
    steps: int | None = None,
    nfe: int | None = None,
    grid: Grid | None = None,
    trajectory: bool = False,
    progress: bool = False,
    differentiable: bool = False,
) -> Edit:
    """Paths of data between a_i and b_i: along the great circle between their latents (`interpolate`), decoded.

    Args:
        denoiser: the model.
        a, b: data, both of shape (B, ...).
        solver, steps, nfe, grid: as for `encode`.
        weights: of b, shape (W,) within [0, 1]; or how many, W >= 2, evenly from 0 to 1.
        cond: of all, or one entry for each of the B pairs.
        trajectory, progress, differentiable: as for `edit`.

    Returns:
        the `Edit`, whose x has shape (W, B, ...): rows of weight 0 and 1 are a and b, to the solver's error.

    Raises:
        TypeError, ValueError: before any evaluation, as `encode` does, or if shapes or weights do not fit; before the
            way back, as `interpolate`, if two latents are opposite.
        ArithmeticError, NonFiniteError: as for `edit`.
    """
    check_batch(a, "a")
    check_batch(b, "b")
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(
            f"a is {a.dtype} of shape {tuple(a.shape)}, b {b.dtype} of shape {tuple(b.shape)}: expected the same"
        )
    w = _weights(weights, "weights")
    W, B = len(w), len(a)
    check_call(denoiser, a, cond)

    def between(latent: Tensor) -> Tensor:
        z_a, z_b = (z.repeat(W, *[1] * (a.ndim - 1)) for z in (latent[:B], latent[B:]))
        return interpolate(z_a, z_b, w.repeat_interleave(B))

    return _through_latents(
        denoiser, torch.cat([a, b]), solver, (steps, nfe, grid), between, (W, B), cond, B,
        trajectory=trajectory, progress=progress, differentiable=differentiable,
    )  # fmt: skip


def interpolation_grid(
    denoiser: Denoiser,
    corners: Tensor,
    solver: Solver | None = None,
    *,
    rows: int | Sequence[float] | Tensor = 5,
    columns: int | Sequence[float] | Tensor = 5,
    cond: Mapping[str, Any] | None = None,
    steps: int | None = None,
    nfe: int | None = None,
    grid: Grid | None = None,
    trajectory: bool = False,
    progress: bool = False,
    differentiable: bool = False,
) -> Edit:
    """A sheet of data between four: latents on great circles down the left and the right side, then across.

    Args:
        denoiser: the model.
        corners: top left, top right, bottom left, bottom right: shape (4, *event).
        solver, steps, nfe, grid: as for `encode`.
        rows, columns: weights from top to bottom and from left to right, or how many, as for `interpolation`.
        cond: of all: entries that are no tensors, or tensors with one entry.
        trajectory, progress, differentiable: as for `edit`.

    Returns:
        the `Edit`, whose x has shape (R, C, *event).

    Raises:
        TypeError, ValueError, ArithmeticError, NonFiniteError: as for `interpolation`.
    """
    check_batch(corners, "corners")
    if len(corners) != 4:
        raise ValueError(
            f"corners has shape {tuple(corners.shape)}: expected (4, *event), top left and right, bottom left and right"
        )
    u, v = _weights(rows, "rows"), _weights(columns, "columns")
    R, C = len(u), len(v)
    check_call(denoiser, corners[:1], cond)

    def between(latent: Tensor) -> Tensor:
        left, right = (interpolate(latent[i : i + 1], latent[i + 2 : i + 3], u) for i in (0, 1))
        return interpolate(left.repeat_interleave(C, 0), right.repeat_interleave(C, 0), v.repeat(R))

    return _through_latents(
        denoiser, corners, solver, (steps, nfe, grid), between, (R, C), cond, 1,
        trajectory=trajectory, progress=progress, differentiable=differentiable,
    )  # fmt: skip


def variations(
    denoiser: Denoiser,
    x: Tensor,
    k: int,
    solver: Solver,
    *,
    strength: float = 0.5,
    by: Literal["perturbation", "encoding"] = "perturbation",
    steps: int | None = None,
    nfe: int | None = None,
    grid: Grid | None = None,
    seed: int | Sequence[int] | None = None,
    cond: Mapping[str, Any] | None = None,
    trajectory: bool = False,
    progress: bool = False,
    differentiable: bool = False,
) -> Edit:
    """k variations of each x.

    Args:
        denoiser: the model.
        x: data, shape (B, ...).
        k: how many of each.
        solver: any; for the encoding a deterministic one with a table, or `AdaptiveODE`.
        strength: s in (0, 1]; at 1 nothing of x is left.
        by: "perturbation": `sdedit` with k draws of eps (and of the solver's noise). "encoding": x is encoded once, and
            decoded from k latents around its own,

                sqrt(1 - s^2) x_T + s prior_std eps

            which are draws of the prior if x_T is one: variations of data are data, at any strength.
        steps, nfe, grid: as for `sdedit`, or for `encode`.
        seed: one integer, or one for each of the B samples: variation j of sample i depends on no other, nor on k.
        cond: of all, or one entry for each of the B samples.
        trajectory, progress, differentiable: as for `edit`.

    Returns:
        the `Edit`, whose x has shape (k, B, ...).

    Raises:
        TypeError, ValueError, ArithmeticError, NonFiniteError: as for `sdedit` and `edit`.
    """
    check_batch(x, "x")
    check_count(k=k)
    check_option(("perturbation", "encoding"), by=by)
    check_pair(denoiser, solver)
    check_call(denoiser, x, cond)
    start, B, repeats = strength_time(denoiser.sde, strength), len(x), [k, *[1] * (x.ndim - 1)]
    source = noise_source(x.device, x, seed, None, None)
    if isinstance(source, SeededNoise):
        seeds = [derive_seed(s, _VARIATION, j) for j in range(k) for s in source.seeds]
        source = SeededNoise(seeds, x.device)
    options: dict[str, Any] = {"trajectory": trajectory, "progress": progress, "differentiable": differentiable}
    if by == "perturbation":
        solver, whole = _whole(denoiser.sde, solver, steps, nfe, grid)
        part = _cut(whole, start)
        x_t = _perturbed(denoiser.sde, widen(x).repeat(repeats), start, source)
        found = sample(denoiser, x_t, solver, grid=part, noise=source, cond=_repeated(cond, k, B), **options)
        return _made(_complete(found), x_t, 0, (k, B), x.dtype)

    def around(latent: Tensor) -> Tensor:
        z = widen(latent).repeat(repeats)
        return ((1 - strength**2) ** 0.5 * z + strength * _normal(denoiser.sde, z, source)).to(latent.dtype)

    return _through_latents(denoiser, x, solver, (steps, nfe, grid), around, (k, B), cond, B, **options)


# --- the way to noise ------------------------------------------------------------------------------------------------


def _start(sde: SDE, strength: float | None, t: float | None) -> float:
    """The time that one of the two names."""
    if (strength is None) == (t is None):
        raise ValueError(f"give exactly one of strength= and t=; got {'neither' if t is None else 'both'}")
    if strength is not None:
        return strength_time(sde, strength)
    if isinstance(t, bool) or not isinstance(t, int | float) or not 0 < t <= sde.t_max:
        raise ValueError(f"t={t!r}: expected a time in (0, {sde.t_max}] of {sde!r}")
    return float(t)


def _whole(sde: SDE, solver: Solver, steps: int | None, nfe: int | None, grid: Grid | None) -> tuple[Solver, Grid]:
    """The solver and the grid that `sample` would take for the whole way from t_max."""
    given = [name for name, value in (("steps", steps), ("nfe", nfe), ("grid", grid)) if value is not None]
    if solver.adaptive and nfe is not None:  # a budget; the others say when to report
        solver, given = solver.within(sde, nfe)[0], [name for name in given if name != "nfe"]
    if len(given) > 1 or not (given or solver.adaptive):
        raise ValueError(f"give exactly one of steps=, nfe= and grid=; got {' and '.join(given) or 'none'}")
    if grid is not None:
        if not isinstance(grid, Grid):
            raise TypeError(
                f"grid is {type(grid).__name__}: expected a Grid, Grid(denoiser.sde, times) for your own times"
            )
        grid.check_sde(sde)
        if grid.increasing:
            raise ValueError("grid= is the decreasing grid, from noise to data: give its reversed()")
        return solver, grid
    if steps is None and nfe is not None and not solver.adaptive:
        return solver.within(sde, nfe)
    return solver, solver.grid(sde, 1 if steps is None else steps)


def _cut(grid: Grid, t: float) -> Grid:
    """The grid's times below t, after t itself."""
    times = grid.times
    if float(times[0]) < t * (1 - _SAME) or not float(times[-1]) < t * (1 - _SAME):
        raise ValueError(f"an edit from t = {t:.6g} on {grid!r}: expected a time of its range, above its end")
    return Grid(grid.sde, torch.cat([times.new_tensor([t]), times[times < t * (1 - _SAME)]]))


def _part(grid: Grid, sde: SDE, strength: float | None, t: float | None) -> Grid:
    """The part of the grid below the time that is named, if one is."""
    return grid if strength is None and t is None else _cut(grid, _start(sde, strength, t))


def _normal(sde: SDE, x: Tensor, source: NoiseSource) -> Tensor:
    """prior_std eps, of the shape of x: from the stream of x_T, which no solver reads."""
    assert isinstance(source, GeneratorNoise | SeededNoise)
    return source.prior(sde, x.shape, x.dtype, sde.t_max)


def _perturbed(sde: SDE, x: Tensor, t: float, source: NoiseSource) -> Tensor:
    return sde.perturb(x, t, _normal(sde, x, source) / sde.prior_std)


# --- through latents -------------------------------------------------------------------------------------------------


def _through_latents(
    denoiser: Denoiser,
    x: Tensor,
    solver: Solver | None,
    how: tuple[int | None, int | None, Grid | None],
    change: Callable[[Tensor], Tensor],
    shape: tuple[int, int],
    cond: Mapping[str, Any] | None,
    batch: int,
    *,
    trajectory: bool,
    progress: bool,
    differentiable: bool,
) -> Edit:
    """Encode x, change the latents into a batch of shape[0] shape[1], decode that. cond has one entry, or `batch`."""
    solver, grid = plan(denoiser, solver, *how)
    options: dict[str, Any] = {"progress": progress, "differentiable": differentiable}
    up = _repeated(cond, len(x) // batch, batch)
    code = _complete(sample(denoiser, widen(x), solver, grid=grid.reversed(), cond=up, **options))
    latent = change(code.x)
    down = _repeated(cond, len(latent) // batch, batch)
    found = sample(denoiser, latent, solver, grid=grid, cond=down, trajectory=trajectory, **options)
    return _made(_complete(found), latent, code.nfe, shape, x.dtype)


def _made(found: Solution, latent: Tensor, nfe: int, shape: tuple[int, ...], dtype: torch.dtype) -> Edit:
    """The Edit of a solution, its batch of that shape."""
    path = found.trajectory
    return Edit(
        found.x.unflatten(0, shape).to(dtype),
        latent.unflatten(0, shape).to(dtype),
        nfe + found.nfe,
        found.grid,
        None if path is None else path.unflatten(1, shape).to(dtype),
    )


def _complete(found: Solution) -> Solution:
    if found.status != "complete":
        raise ArithmeticError(
            f"the budget of {found.nfe} evaluations ran out at t = {found.t:.6g}, on a way that ends at t = "
            f"{float(found.grid.times[-1]):.6g}: give more, or looser tolerances"
        )
    return found


def _repeated(cond: Mapping[str, Any] | None, k: int, batch: int) -> dict[str, Any] | None:
    """The condition of k batches one after the other, from that of one."""
    return (
        None
        if cond is None
        else {
            name: value.repeat(k, *[1] * (value.ndim - 1))
            if isinstance(value, Tensor) and value.ndim and len(value) == batch > 1
            else value
            for name, value in cond.items()
        }
    )


def _weights(weights: int | Sequence[float] | Tensor, name: str) -> Tensor:
    """Weights in [0, 1], float64, shape (W,)."""
    if isinstance(weights, int) and not isinstance(weights, bool):
        if weights < 2:
            raise ValueError(f"{name}={weights}: expected a whole number >= 2, both ends among them, or the weights")
        return torch.linspace(0, 1, weights, dtype=torch.float64, device="cpu")
    w = torch.as_tensor(weights, dtype=torch.float64, device="cpu")
    if w.ndim != 1 or len(w) == 0 or not bool(((w >= 0) & (w <= 1)).all()):
        raise ValueError(f"{name} of shape {tuple(w.shape)}: expected numbers in [0, 1], shape (W,), or how many")
    return w
