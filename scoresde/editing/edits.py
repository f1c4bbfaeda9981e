"""Editing: a given x goes part of the way to noise, or all of it, and comes back as the model's.

It gets to noise in one of two ways,

    by perturbation    x_t = alpha_t x + sigma_t eps,  eps ~ N(0, I)                     `sdedit`, `variations`
    by encoding        x_t = Phi_{t_min -> t}(x), the probability-flow ODE               `edit`, `interpolation`, ...

and back by any solver, or the same ODE, perhaps under another condition or with another denoiser.

The first is SDEdit (`scoresde.editing.sdedit`). The second is DDIM inversion (Song, Meng and Ermon, 2021), between two
denoisers the dual diffusion implicit bridge (Su et al., 2023), x -> Phi'_{T -> t_min}(Phi_{t_min -> T}(x)). On
Gaussians whose C and C' commute it is the map of optimal transport, m' + sqrt(C' / C) (x - m), as far as the prior has
forgotten the data. It keeps what the two have in common, and can be undone. Strong guidance makes the ODE stiff and the
codes unlike the prior: encode without it.

Where the denoiser has a codec (`scoresde.Latent`), x and the results are data, and all this is done to z = encode(x).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from scoresde.checks import ArgumentError, check_count, check_option
from scoresde.denoiser import Denoiser, check_call
from scoresde.editing.latents import check_pair, interpolate, plan
from scoresde.editing.sdedit import choose_down, cut, normal, perturbed, start_time, strength_time
from scoresde.entries import repeated
from scoresde.errors import narrowed
from scoresde.grid import Grid
from scoresde.noise import SeededNoise, derive_seed, seeds_of
from scoresde.run import Solution, encoded
from scoresde.sampling import sample
from scoresde.sde import SDE
from scoresde.solvers import Solver
from scoresde.tensors import check_batch, told, widen

__all__ = ["Edit", "edit", "interpolation", "interpolation_grid", "variations"]

_VARIATION = 4  # the stream of seeds of variations: 0 to 3 are those of `SeededNoise`


@dataclass(frozen=True)
class Edit:
    """What editing through latents returns.

    Attributes:
        x: the results, of the shape that the function names, in the dtype of the x given.
        latent: the states at grid.times[0] that they were solved from, shape of x; of z where there is a codec.
        nfe: evaluations of the denoisers, both ways, each on the whole batch of its way.
        grid: of the way back.
        trajectory: if asked for, the states on the way back, shape (N + 1, *latent.shape).
    """

    x: Tensor
    latent: Tensor
    nfe: int
    grid: Grid
    trajectory: Tensor | None = None

    __repr__ = told


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
        solver: `AdaptiveODE(jumps="table")` by default, or any deterministic solver with a table.
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
    check_call(denoiser, x, cond_from)
    check_call(to, x, cond_to)
    one_sde = denoiser.sde == to.sde
    if not one_sde and not (strength is None and t is None and grid is None):
        raise ArgumentError(
            f"from {denoiser.sde!r} to {to.sde!r}: strength=, t= and grid= name a time, and the two have others; leave "
            "them out, and both go from t_max on the solver's own grids"
        )
    up, there = plan(denoiser, solver, steps, nfe, grid)
    down, back = (up, there) if to is denoiser else plan(to, solver, steps, nfe, grid)
    if one_sde:
        there = back = _part(there, denoiser.sde, strength, t)
    for model, way, on in ((denoiser, up, there.reversed()), (to, down, back)):
        on.check_sde(model.sde)
        if not way.adaptive:
            table = way.tableau(on)
            model.check_times(table.t[table.evaluates])
    options: dict[str, Any] = {"progress": progress, "differentiable": differentiable}
    code = _complete(sample(denoiser, widen(x), up, grid=there.reversed(), cond=cond_from, **options))
    latent = code.x if one_sde else code.x * (to.sde.prior_std / denoiser.sde.prior_std)
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
        z_a, z_b = (z.repeat(W, *[1] * (z.ndim - 1)) for z in (latent[:B], latent[B:]))
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
    start, B = strength_time(denoiser.sde, strength), len(x)
    seeds = seeds_of(seed, B)
    source = SeededNoise([derive_seed(s, _VARIATION, j) for j in range(k) for s in seeds], x.device)
    options: dict[str, Any] = {"trajectory": trajectory, "progress": progress, "differentiable": differentiable}
    if by == "perturbation":
        solver, whole = choose_down(denoiser.sde, solver, steps, nfe, grid)
        part = cut(whole, start)
        with torch.set_grad_enabled(differentiable):
            z = encoded(denoiser, x, cond)
        x_t = perturbed(denoiser.sde, z.repeat(k, *[1] * (z.ndim - 1)), start, source)
        found = sample(denoiser, x_t, solver, grid=part, noise=source, cond=repeated(cond, k, B), **options)
        return _made(_complete(found), x_t, 0, (k, B), x.dtype)

    def around(latent: Tensor) -> Tensor:
        z = widen(latent).repeat(k, *[1] * (latent.ndim - 1))
        return ((1 - strength**2) ** 0.5 * z + strength * normal(denoiser.sde, z, source)).to(latent.dtype)

    return _through_latents(denoiser, x, solver, (steps, nfe, grid), around, (k, B), cond, B, **options)


# --- the way to noise ------------------------------------------------------------------------------------------------


def _part(grid: Grid, sde: SDE, strength: float | None, t: float | None) -> Grid:
    """The part of the grid below the time that is named, if one is."""
    return grid if strength is None and t is None else cut(grid, start_time(sde, strength, t))


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
    trajectory: bool,
    **options: Any,
) -> Edit:
    """Encode x, change the latents into a batch of shape[0] shape[1], decode that. cond has one entry, or `batch`."""
    solver, grid = plan(denoiser, solver, *how)
    up = repeated(cond, len(x) // batch, batch)
    code = _complete(sample(denoiser, widen(x), solver, grid=grid.reversed(), cond=up, **options))
    latent = change(code.x)
    down = repeated(cond, len(latent) // batch, batch)
    found = sample(denoiser, latent, solver, grid=grid, cond=down, trajectory=trajectory, **options)
    return _made(_complete(found), latent, code.nfe, shape, x.dtype)


def _made(found: Solution, latent: Tensor, nfe: int, shape: tuple[int, ...], dtype: torch.dtype) -> Edit:
    """The Edit of a solution, its batch of that shape."""
    path = found.trajectory
    return Edit(
        narrowed(found.x, dtype, "the result").unflatten(0, shape),
        narrowed(latent, dtype, "the latent").unflatten(0, shape),
        nfe + found.nfe,
        found.grid,
        None if path is None else narrowed(path, dtype, "the trajectory", batch=1).unflatten(1, shape),
    )


def _complete(found: Solution) -> Solution:
    if found.status != "complete":
        raise ArithmeticError(
            f"the budget of {found.nfe} evaluations ran out at t = {found.t:.6g}, on a way that ends at t = "
            f"{float(found.grid.times[-1]):.6g}: give more, or looser tolerances"
        )
    return found


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
