"""Uniquely identifiable encoding: the probability-flow ODE is a bijection between data and latents (Song et al., 2021,
section 4.3),

    latent = x_T = Phi_{t_min -> T}(x),    x = Phi_{T -> t_min}(x_T)

whose latent depends on the model's density alone, not on the network that represents it: other parameterisations of the
same D, or networks trained apart that have learnt it, give the same code, where that of a VAE would differ.

Each deterministic solver with a table is a discretisation of Phi in both directions: `encode` runs it on
`grid.reversed()`, `decode` on the grid. DDIM's step upwards,

    x_s = alpha_s D(x_t, t) + sigma_s eps(x_t, t),    s > t

is DDIM inversion (Song, Meng and Ermon, 2021, section 4.3). It is not the inverse of the step downwards, which
evaluates at the other end: encode and decode return x up to the discretisation error of both, whose order is the
solver's. `Inversion.error` says what it is. Multistep methods begin at the data with a step of first order, whose
error, of order 2 or with a corrector 3, is small only where the grid begins finely, as their own does. Up to alpha = 0
(`FlowSDE`) the views x0 and eps end with one, too: those along a curve, v and flow, keep their order there.

A latent can be worked on. `interpolate` moves along the great circle between two, on which the norm stays one that the
prior has seen; `rescale` multiplies by the square root of a temperature.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from scoresde.checks import ArgumentError
from scoresde.denoiser import Denoiser, check_denoiser
from scoresde.grid import Grid
from scoresde.masks import Own
from scoresde.run import Solution, check_solver, choose, process
from scoresde.sampling import sample
from scoresde.solvers import AdaptiveODE, Solver
from scoresde.tensors import check_batch, expand_like, precise, told, widen

__all__ = ["Inversion", "decode", "encode", "interpolate", "rescale"]

_OPPOSITE = 1e-6  # |a / |a| + b / |b|| below which the plane of two latents is but rounding


@dataclass(frozen=True)
class Inversion:
    """What `encode` returns.

    Attributes:
        latent: x_T, shape (B, ...), at grid.times[0], in the dtype of x; of z where the denoiser has a codec.
        nfe: evaluations of the denoiser that the encoding made; those of the check are not among them.
        grid: the decreasing grid on which `decode` goes back, by the same solver.
        error: where asked for, |decode(latent) - x| / |x| of each sample, Euclidean norms, shape (B,): infinite where
            the solver ran out of evaluations on the way. None otherwise. What a codec loses of x is part of it.
        status: "complete", or "max_nfe" where an adaptive solver's evaluations ran out: the latent then stands at an
            earlier time, and is none.
    """

    latent: Tensor
    nfe: int
    grid: Grid
    error: Tensor | None = None
    status: Literal["complete", "max_nfe"] = "complete"

    __repr__ = told


def encode(
    denoiser: Denoiser,
    x: Tensor,
    solver: Solver | None = None,
    *,
    steps: int | None = None,
    nfe: int | None = None,
    grid: Grid | None = None,
    cond: Mapping[str, Any] | None = None,
    check: bool = False,
    differentiable: bool = False,
) -> Inversion:
    """The latent x_T of x, by the probability-flow ODE from data to noise.

    Args:
        denoiser: the model.
        x: data, shape (B, ...), taken as it is, or as a codec encodes it, for the state at the grid's end: x_{t_min} by
            default.
        solver: `AdaptiveODE(jumps="table")` by default, or any deterministic solver with a table.
        steps: number of steps on the solver's own grid from t_max to t_min (on a `DDPMChain` node 1).
        nfe: instead of steps, a budget of evaluations; for `AdaptiveODE` it is optional, and its max_nfe.
        grid: instead, the decreasing grid itself, which ends at t > 0; of `AdaptiveODE`'s only the ends matter.
        cond: as for `sample`.
        check: decode as well, at the same cost again, and report the relative error.
        differentiable: record the gradients of the latent, not of the error.

    Raises:
        TypeError: if the denoiser, the solver or the grid is none.
        ValueError: before any evaluation: if the solver draws noise, the grid ends at sigma = 0 or increases, arguments
            contradict each other, or as `sample` does.
        NonFiniteError: as for `sample`.

    >>> from scoresde import VPSDE
    >>> from scoresde.exact import Gaussian
    >>> from scoresde.solvers import UniPC
    >>> denoiser, x = Gaussian(mean=[3.0, -1.0], std=0.5).denoiser(VPSDE()), torch.tensor([[3.5, -1.0]])
    >>> code = encode(denoiser, x, UniPC(3), steps=20, check=True)
    >>> code.nfe, code.error.item() < 1e-3
    (20, True)
    >>> back = decode(denoiser, code.latent, UniPC(3), grid=code.grid).x
    >>> torch.allclose(back, x, rtol=1e-3)
    True
    """
    check_batch(x, "x")
    solver, grid = plan(denoiser, solver, steps, nfe, grid)
    code = sample(denoiser, x, solver, grid=grid.reversed(), cond=cond, differentiable=differentiable)
    error = None
    if check and code.status == "complete":
        error = _round_trip_error(sample(denoiser, code.x.detach(), solver, grid=grid, cond=cond), x.detach())
    elif check:
        error = torch.full((len(x),), math.inf, dtype=widen(x).dtype, device=x.device)
    return Inversion(code.x, code.nfe, grid, error, code.status)


def decode(
    denoiser: Denoiser,
    latent: Tensor,
    solver: Solver | None = None,
    *,
    steps: int | None = None,
    nfe: int | None = None,
    grid: Grid | None = None,
    cond: Mapping[str, Any] | None = None,
    differentiable: bool = False,
) -> Solution:
    """The way back: from x_T to the state at the grid's end, x_{t_min} by default, which is what `encode` took x for.

    (`sample` would go on to t = 0 and return D(x_{t_min}), which is not x.) Take the solver and the grid of the
    encoding, `decode(denoiser, code.latent, solver, grid=code.grid)`, or the same `steps`.

    Args:
        latent: x_T, shape (B, ...): from `encode`, or changed by `interpolate` or `rescale`.
        denoiser, solver, steps, nfe, grid, cond, differentiable: as for `encode`.

    Returns:
        the `Solution`, whose x is the data.

    Raises:
        TypeError, ValueError, NonFiniteError: as for `encode`.
    """
    check_batch(latent, "latent")
    solver, grid = plan(denoiser, solver, steps, nfe, grid)
    return sample(denoiser, latent, solver, grid=grid, cond=cond, differentiable=differentiable)


def interpolate(a: Tensor, b: Tensor, weights: Tensor | Sequence[float] | float) -> Tensor:
    """Latents between a (weight 0) and b (weight 1), along the great circle through their directions (Song, Meng and
    Ermon, 2021, section 5.3):

        (1 - w) |a| + w |b|  times  sin((1 - w) theta) / sin(theta) a / |a| + sin(w theta) / sin(theta) b / |b|

    with theta the angle between them and norms over all of an event's elements. A straight line would pass through
    norms that the prior never has in many dimensions: 0.71 of it, half way between two draws.

    The three arguments broadcast along the batch: row i of the result belongs to a_i, b_i and w_i, and the result is a
    batch to decode. A path of nine between the first two of a batch, and the middle of each of B pairs, are

        interpolate(latent[:1], latent[1:2], torch.linspace(0, 1, 9))                            (9, ...)
        interpolate(a, b, 0.5)                                                                   (B, ...)

    Args:
        a, b: latents, shape (B, ...) or (1, ...): with a batch dimension, always.
        weights: w in [0, 1], a number or shape (B,) or (1,).

    Returns:
        shape (B, ...), in the common dtype of a and b. Where a and b have the same direction, or one is zero, the path
        is a straight line; rows of weight 0 and 1 are a and b to rounding.

    Raises:
        ValueError: if shapes do not fit, weights leave [0, 1], or a and b are opposite: no great circle is the shortest
            then, and in one dimension there is none.
    """
    check_batch(a, "a")
    check_batch(b, "b")
    if a.ndim < 2 or a.shape[1:] != b.shape[1:]:
        raise ValueError(
            f"a has shape {tuple(a.shape)} and b {tuple(b.shape)}: expected batches of the same event, latent[:1] and "
            "latent[1:2] say"
        )
    dtype = torch.promote_types(a.dtype, b.dtype)
    w = precise(torch.as_tensor(weights, device=a.device)).detach()
    if w.ndim > 1 or not bool(((w >= 0) & (w <= 1)).all()):
        raise ValueError(f"weights of shape {tuple(w.shape)}: expected numbers in [0, 1], a number or shape (B,)")
    sizes = {len(a), len(b), *w.shape} - {1}
    if len(sizes) > 1:
        raise ValueError(
            f"{len(a)} and {len(b)} latents with {w.numel()} weights: expected the same number of each, or one"
        )
    wide = [precise(v).reshape(len(v), -1) for v in (a, b)]
    norm_a, norm_b = (v.norm(dim=1, keepdim=True) for v in wide)
    along_a, along_b = (v / torch.where(n == 0, 1, n) for v, n in zip(wide, (norm_a, norm_b), strict=True))
    # A latent of norm zero has no direction of its own: that of the other.
    along_a, along_b = torch.where(norm_a == 0, along_b, along_a), torch.where(norm_b == 0, along_a, along_b)
    sum_, difference = ((along_a + s * along_b).norm(dim=1, keepdim=True) for s in (1, -1))
    opposite = (sum_ < _OPPOSITE) & (difference > 1)  # not where both are zero
    if bool(opposite.any()):
        where = opposite.flatten().nonzero().flatten().tolist()
        raise ValueError(f"a and b are opposite in rows {where[:8]}: the path between them is not unique")
    theta = 2 * torch.atan2(difference, sum_)  # no cancellation, as acos of the inner product would have
    w = w.reshape(-1, 1)
    path = _share(1 - w, theta) * along_a + _share(w, theta) * along_b
    path = torch.lerp(norm_a, norm_b, w) * path
    return path.reshape(-1, *a.shape[1:]).to(dtype)


def rescale(latent: Tensor, temperature: float | Tensor) -> Tensor:
    """Latents at another temperature tau: sqrt(tau) latent.

    The prior at temperature tau, p^(1 / tau) normalised, is N(0, tau prior_std^2 I), of which sqrt(tau) x_T is a draw
    if x_T is one of the prior: the norm of the code is rescaled (Song et al., 2021, on latent representations). Below 1
    decoded samples are more typical and less diverse, at 0 there is one, that of x_T = 0. It is not the data's own
    density at that temperature: the flow changes volumes. (`scoresde.Tempered`, the prior of a model, counts the other
    way, as speech synthesis does: its temperature is 1 / tau.)

    Args:
        latent: shape (B, ...).
        temperature: tau >= 0, a number or shape (B,).

    Raises:
        ValueError: if a temperature is negative or not finite, or its shape does not fit.
    """
    check_batch(latent, "latent")
    tau = torch.as_tensor(temperature, dtype=widen(latent).dtype)
    if not bool(((tau >= 0) & tau.isfinite()).all()):
        raise ValueError(f"temperature={temperature}: expected finite numbers >= 0")
    return (expand_like(tau.sqrt(), widen(latent)) * widen(latent)).to(latent.dtype)


def check_pair(denoiser: Denoiser, solver: Solver) -> None:
    """Raises TypeError unless they are a denoiser and an instance of a solver."""
    check_denoiser(denoiser)
    check_solver(solver)


def plan(
    denoiser: Denoiser, solver: Solver | None, steps: int | None, nfe: int | None, grid: Grid | None
) -> tuple[Solver, Grid]:
    """The solver, and the decreasing grid to noise that it runs on in both directions; errors as of `encode`."""
    solver = AdaptiveODE(jumps="table") if solver is None else solver
    check_pair(denoiser, solver)
    if isinstance(grid, Grid) and grid.increasing:
        raise ValueError("grid= is the decreasing grid on which decode goes, and encode back: give its reversed()")
    if isinstance(solver, AdaptiveODE):
        if steps is not None:
            raise ArgumentError("AdaptiveODE chooses its own steps: set its rtol and atol, or give a budget, nfe=")
    elif not solver.has_table:
        raise ValueError(f"{solver!r} has no way up: take AdaptiveODE(), or a deterministic solver with a table")
    sde = process(denoiser, solver, steps or nfe)
    solver, grid = choose(sde, solver, steps, nfe, grid, end=sde.t_min)
    up = grid.reversed()  # raises where there is no way back
    if solver.has_table:
        solver.tableau(up)  # raises if it draws noise, for decode as well
    return solver, grid


def _round_trip_error(back: Solution, x: Tensor) -> Tensor:
    if back.status != "complete":
        return torch.full((len(x),), math.inf, dtype=widen(x).dtype, device=x.device)
    own = Own(x.shape, back.mask)
    distance, size = (own.norm(widen(v)) for v in (back.x - x, x))
    return torch.where(distance == 0, distance, distance / size)  # exact, for x = 0 too


def _share(w: Tensor, theta: Tensor) -> Tensor:
    """sin(w theta) / sin(theta), which is w where theta is zero."""
    return torch.where(theta == 0, w, torch.sin(w * theta) / torch.where(theta == 0, 1, theta.sin()))
