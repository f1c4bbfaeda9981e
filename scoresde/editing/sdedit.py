"""SDEdit (Meng et al., 2022): to a noise level by perturbation, x_t = alpha_t x + sigma_t eps, and back by any solver.

What lies below the noise at t is forgotten and drawn anew, what lies above is kept. On data N(m, C), with
S = alpha^2 C + sigma^2 and K = alpha^2 C / S, it gives, in C's eigenbasis,

    by the reverse SDE    N(m + K (x - m),        (1 + K) sigma^2 C / S)       p(x_0 | x_t), averaged over eps
    by the ODE            N(m + sqrt(K) (x - m),          sigma^2 C / S)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from scoresde.checks import ArgumentError
from scoresde.denoiser import Denoiser, check_call
from scoresde.editing.latents import check_pair
from scoresde.errors import narrowed
from scoresde.grid import Grid
from scoresde.guidance.operators import Mask
from scoresde.guidance.projections import DDNM
from scoresde.noise import NoiseSource, noise_source
from scoresde.run import Solution, choose, encoded
from scoresde.sampling import sample
from scoresde.sde import SDE
from scoresde.solvers import Solver
from scoresde.tensors import check_batch

__all__ = ["sdedit", "strength_time"]

_FINE = 1000  # steps of the spacing that strengths are read from
_SAME = 1e-9  # times that differ by less, relatively, are one


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
        raise ArgumentError(
            f"strength={strength!r}: expected a number in (0, 1]; nothing is edited at 0, all is new at 1"
        )
    if sde.customary_grid in ("uniform", "strided"):
        return float(sde.snapped(torch.tensor([strength * sde.t_max], dtype=torch.float64, device="cpu")))
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
    mask: Tensor | Mask | None = None,
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
        mask: true, or 1, where the reference is kept as it is, of a shape that broadcasts to the event, or one per
            sample, to the reference; or a `Mask`. There D is the reference (`DDNM`), so that the state goes as alpha
            reference + sigma eps does, and the rest sees it at its own noise level. With a codec it is a mask of z: of
            the shape of z, and what is kept is the encoded reference. For other ways, wrap the solver,
            `Replacement(DDPM(), mask, reference)` or `RePaint`, or the denoiser, and leave mask out.
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
    start = start_time(denoiser.sde, strength, t)
    solver, whole = choose_down(denoiser.sde, solver, steps, nfe, grid)
    grid = cut(whole, start)
    source = noise_source(reference.device, reference, seed, generator, None)
    check_call(denoiser, reference, cond)
    with torch.set_grad_enabled(differentiable):
        z = encoded(denoiser, reference, cond)
    if mask is not None:
        known = mask if isinstance(mask, Mask) else Mask.of_batch(mask, z)
        known(z)  # checks the shapes
        denoiser = DDNM(denoiser, known, z)
    x_t = perturbed(denoiser.sde, z, start, source)
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
    path, dtype = found.trajectory, reference.dtype
    kept = None if path is None else narrowed(path, dtype, "the trajectory", batch=1)
    latent = None if found.latent is None else narrowed(found.latent, dtype, "the latent")
    return replace(found, x=narrowed(found.x, dtype, "the result"), trajectory=kept, latent=latent)


def start_time(sde: SDE, strength: float | None, t: float | None) -> float:
    """The time that one of the two names."""
    if (strength is None) == (t is None):
        raise ArgumentError(f"give exactly one of strength= and t=; got {'neither' if t is None else 'both'}")
    if strength is not None:
        return strength_time(sde, strength)
    if isinstance(t, bool) or not isinstance(t, int | float) or not 0 < t <= sde.t_max:
        raise ArgumentError(f"t={t!r}: expected a time in (0, {sde.t_max}] of {sde!r}")
    return float(t)


def choose_down(sde: SDE, solver: Solver, steps: int | None, nfe: int | None, grid: Grid | None) -> tuple[Solver, Grid]:
    """As `choose`, for the whole way from t_max down."""
    solver, grid = choose(sde, solver, steps, nfe, grid)
    if grid.increasing:
        raise ValueError("grid= is the decreasing grid, from noise to data: give its reversed()")
    return solver, grid


def cut(grid: Grid, t: float) -> Grid:
    """The grid's times below t, after t itself."""
    times = grid.times
    if float(times[0]) < t * (1 - _SAME) or not float(times[-1]) < t * (1 - _SAME):
        raise ValueError(f"an edit from t = {t:.6g} on {grid!r}: expected a time of its range, above its end")
    return Grid(grid.sde, torch.cat([times.new_tensor([t]), times[times < t * (1 - _SAME)]]))


def normal(sde: SDE, x: Tensor, source: NoiseSource) -> Tensor:
    """prior_std eps, of the shape of x: from the stream of x_T, which no solver reads."""
    return source.prior(sde, x.shape, x.dtype, sde.t_max)


def perturbed(sde: SDE, x: Tensor, t: float, source: NoiseSource) -> Tensor:
    return sde.perturb(x, t, normal(sde, x, source) / sde.prior_std)
