"""log p(x) by the probability-flow ODE (Chen et al., 2018; Song et al., 2021, section 4.3 and appendix D.2).

With x_T where the ODE takes x, and the volume along the way of `scoresde.likelihood.volume`,

    log p_t(x_t) = log p_T(x_T) + log |det dx_T / dx_t|

Data x_0 is taken as x_t = alpha_t x_0 at t = t_min, which adds dim log alpha_t, the residual. That is the density of
x_t / alpha_t, the data in noise of variance s^2 = sigma_t^2 / alpha_t^2. Where the density is smooth at the scale s
the heat equation gives what is missing to second order,

    log p_0 = log p_t - (s^2 / 2) (tr grad^2 log p_t + |grad log p_t|^2)
            = log p_t - (|eps|^2 - dim + alpha tr dD/dx) / 2

A denoiser of states z with a codec (`scoresde.Latent`) has all this of z = encode(x). Where the codec has a volume,
log p(x) = log p_z(z) + log |det dz/dx| is the density of data; where it has none, there is that of z, and `elbo` has a
bound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from scoresde.checks import ArgumentError, check_count, check_option, check_positive
from scoresde.continuity import in_steps
from scoresde.denoiser import Denoiser, check_call
from scoresde.errors import narrowed, not_finite
from scoresde.grid import Grid
from scoresde.likelihood.adaptive import AdaptiveVolume
from scoresde.likelihood.divergence import Divergence
from scoresde.likelihood.interval import degrees_of_freedom, student_interval
from scoresde.likelihood.volume import TableVolume, Volume, every_other
from scoresde.masked import masked_noise, own_of
from scoresde.noise import NoiseSource, noise_source
from scoresde.run import choose, encoded
from scoresde.sde import SDE
from scoresde.solvers.adaptive_ode import (
    TABLE,
    TABLE_CALL,
    TABLE_STEPS,
    TORCHDIFFEQ,
    AdaptiveODE,
    table_grid,
    warn_of_steps,
)
from scoresde.solvers.base import Solver
from scoresde.solvers.motion import legs
from scoresde.tensors import check_batch, told, widen

__all__ = ["LogProb", "log_prob"]


@dataclass(frozen=True)
class LogProb:
    """What `log_prob` returns. Numbers in nats, shape (B,), in the dtype of x.

    Attributes:
        value: log p(x) = prior + log_det + residual, and log_volume with a codec.
        stderr: standard error of `value` from the probes; 0 where the trace is exact.
        dof: its degrees of freedom, at least 1, infinity where it is 0: what few probes, or few evaluations that make
            most of the error, leave unknown of it. See `interval`.
        nfe: calls of the network on the batch; one that also gives its derivatives along the probes counts once.
        latent: x_T, shape (B, ...): where the ODE takes x; of the codec's z where there is one.
        prior: log p_T(x_T).
        log_det: log |det dx_T / dx_t|.
        residual: from the data to where the ODE starts, dim log alpha(t_min), and the correction if asked for; 0 if x
            stands at a time t.
        error: estimate of the discretisation error of `value`, apart from the probes': of tables as `TableVolume` says,
            NaN where they offer none (several evaluations a step), else as `AdaptiveVolume` says.
        status: "complete", or "max_nfe" where the budget of an adaptive solve ran out: `value` and its terms then are
            NaN, and latent is the state at t.
        t: the time that latent stands at.
        log_volume: log |det dz/dx| of the codec; None without codec, or where it has no volume.
        of: what value is the density of: "x", the data given; or "z", where a codec has no volume and value says
            nothing of the density of data, or where a state at a time t was given.
        dims: of a `scoresde.Masked` denoiser the number of entries of each item, int64, shape (B,): what bits per
            dimension are divided by. None where all have those of x.
    """

    value: Tensor
    stderr: Tensor
    dof: Tensor
    nfe: int
    latent: Tensor
    prior: Tensor
    log_det: Tensor
    residual: Tensor
    error: Tensor
    status: Literal["complete", "max_nfe"]
    t: float
    log_volume: Tensor | None = None
    of: Literal["x", "z"] = "x"
    dims: Tensor | None = None

    __repr__ = told

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """The ends of value -+ t_{(1 + level) / 2}(dof) stderr, t(dof) the quantiles of Student's t.

        It covers what exact traces would have given, in so many of the runs with other probes: `error` is apart from
        it, and so is what is wrong with the model. Measured for 95 %: benchmarks/results/likelihood. One probe in two
        dimensions is apart, of which there are two in all: an upper bound. Take two, and the trace is exact.

        Args:
            level: in (0, 1).

        Raises:
            ValueError: on another level.
        """
        return student_interval(self.value, self.stderr, self.dof, level)


def log_prob(
    denoiser: Denoiser,
    x: Tensor,
    *,
    divergence: Literal["hutchinson", "exact", "hutch++"] = "hutchinson",
    probes: int = 1,
    rtol: float | None = None,
    atol: float | None = None,
    steps: int | None = None,
    seed: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    solver: Solver | None = None,
    grid: Grid | None = None,
    method: str | None = None,
    max_nfe: int | None = None,
    first_step: float | None = None,
    t: float | None = None,
    correct: bool = False,
    distribution: Literal["rademacher", "gaussian"] = "rademacher",
    mode: Literal["vjp", "jvp"] = "vjp",
    chunk: int | None = None,
    cond: Mapping[str, Any] | None = None,
    differentiable: bool | Literal["adjoint"] = False,
    progress: bool = False,
) -> LogProb:
    """The log-density of the model at x, in nats, with its standard error.

    Adaptive by default: torchdiffeq's steps, each sample held to its own tolerance, with probes that are drawn anew
    every now and then. With `steps` (or `grid`) a table, whose calls are known beforehand, in which no sample depends
    on its neighbours, and whose probes are new at every evaluation: in many dimensions the better choice, with less
    than half the standard error at a quarter of the calls where it was measured.

    Adaptive steps take the network to be continuous in time. One whose time label is rounded, or looked up in a table,
    is not (`scoresde.continuity`): where nothing of an adaptive solve is asked for, 100 steps of the table are taken
    then, with a warning.

    Args:
        denoiser: the model.
        x: data, shape (B, ...), any rank, in the scale that the model was trained on; not changed. Where the denoiser
            has a codec it encodes them, unless they stand at a time t.
        divergence, probes, distribution, mode, chunk: how the trace is taken: `Divergence`. "exact" costs as many
            products as x has elements; "hutchinson" with as many probes, or more, is taken exactly. "hutch++" has less
            error with 6 probes or more where the derivative has few large directions, as on images.
        rtol, atol: adaptive: tolerance of the local error of w, RMS over a sample's elements, atol + rtol |w|, and of
            the log-density, atol sqrt(dim) + rtol |log_det|. 1e-5 by default.
        steps: of a table instead: N calls with the default solver.
        seed: one integer, or one for each sample, for the probes; sample i then is the same in any batch, to rounding
            or, with adaptive steps, which the batch has in common, the tolerance.
        generator: instead of a seed.
        solver: of steps= and grid=: any deterministic solver with a table, by default
            UniPC(3, view="v", variable="half_log_snr").
        grid: of a table, from t_max down to the time at which the ODE starts; by default steps of `Grid.power`.
        method, max_nfe, first_step: adaptive: torchdiffeq's "dopri5" (the default), "dopri8", "bosh3" or
            "adaptive_heun", the calls at most (10,000), and the first step in the
            angle atan(sigma / (alpha c)), c the SDE's `data_scale`, which goes to pi / 2 (0.02).
        t: the time at which x stands, for the density p_t(x), of a state z where there is a codec; by default x is
            data, see the module.
        correct: add the second-order correction from t_min to 0 to `residual`: for densities that are smooth at that
            scale and models that are accurate there, not for images. Its own noise of the probes is not in stderr.
        cond: keyword arguments for the network, as for `sample`.
        differentiable: record gradients of value, its terms and the latent, with respect to x, cond and the network's
            parameters; "adjoint" solves an ODE for them (torchdiffeq's odeint_adjoint), adaptive only: less memory,
            less exact, and of parameters only those of an nn.Module that the denoiser holds.
        progress: show a progress bar.

    Raises:
        TypeError, ValueError: before any evaluation, if arguments are of another kind or contradict each other, or the
            solver draws noise.
        NonFiniteError: if a state or trace is not finite, with time and samples.

    >>> from scoresde import VPSDE
    >>> from scoresde.exact import Gaussian
    >>> target = Gaussian(mean=[0.0, 0.0], std=0.5)
    >>> x = torch.tensor([[0.0, 0.0], [1.0, -0.5]], dtype=torch.float64)
    >>> found = log_prob(target.denoiser(VPSDE()), x, divergence="exact", steps=60)
    >>> bool((found.value - target.log_prob(x)).abs().max() < 1e-3)
    True
    """
    check_batch(x, "x")
    denoiser, own = own_of(denoiser, x.shape, cond)
    x = own.only(x)
    check_call(denoiser, x, cond, masks=True)
    check_option((False, True, "adjoint"), differentiable=differentiable)
    sde, start = denoiser.sde, denoiser.sde.t_min if t is None else _time(denoiser.sde, t)
    with torch.set_grad_enabled(bool(differentiable)):
        z, log_volume, of = state_of(denoiser, x, cond, data=t is None)
        cond = denoiser.prepared(cond)
    trace = Divergence(divergence, probes, distribution, mode, chunk)
    run = (
        denoiser,
        trace.within(z[0].numel()) if own.mask is None else trace,  # an item is what it is in any batch
        masked_noise(noise_source(x.device, x, seed, generator, None), own).probes(),
        cond,
        bool(differentiable),
    )
    volume: Volume
    adaptive = {"rtol": rtol, "atol": atol, "method": method, "max_nfe": max_nfe, "first_step": first_step}
    given = {name: value for name, value in adaptive.items() if value is not None}
    options: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5, "method": "dopri5", "max_nfe": 10_000, "first_step": 0.02}
    options, looked = options | given, 0
    if correct and (t is not None or differentiable == "adjoint"):
        raise ArgumentError(
            "correct=True leads from t_min to 0: not with t=, and not with the adjoint, which has no part in it"
        )
    if steps is not None or grid is not None:
        if given:
            raise ValueError(f"{' and '.join(given)} are of an adaptive solve, steps and grid of a table: give either")
        if differentiable == "adjoint":
            raise ArgumentError(
                'differentiable="adjoint" is for an adaptive solve: drop steps= and grid=, or give True'
            )
    else:
        check_option(TORCHDIFFEQ, method=options["method"])
        check_positive(**{name: options[name] for name in ("rtol", "atol", "first_step")})
        check_count(max_nfe=options["max_nfe"])
        if solver is not None:
            raise ValueError("solver= is for a table: give steps= or grid= too; an adaptive solve takes method=")
        found, looked = in_steps(denoiser, z, start, [start, sde.t_max], cond, options["max_nfe"])
        if found and not given and differentiable != "adjoint" and (sde.nodes is None or start in sde.nodes):
            grid = table_grid(Grid(sde, [sde.t_max, start]), TABLE_STEPS)
        if found:
            instead = "give steps=" if grid is None else f"log_prob takes {grid.steps} steps of {TABLE_CALL}"
            warn_of_steps(found, instead, 2)
    if steps is not None or grid is not None:
        solver = TABLE if solver is None else solver
        up = _table_grid(sde, solver, steps, grid, start, t).reversed()
        start = float(up.times[0])
        volume = TableVolume(*run, table=solver.tableau(up), coarse=every_other(solver, up))
    else:
        volume = AdaptiveVolume(
            *run,
            parts=legs(Grid(sde, [sde.t_max, start]).reversed(), free=True),
            adjoint=differentiable == "adjoint",
            budget=options.pop("max_nfe"),
            **options,
        )
    volume.looked = looked
    log_alpha = math.log(float(sde.alpha(start))) if t is None else 0.0
    with torch.set_grad_enabled(bool(differentiable)):
        x_t = z * math.exp(log_alpha)
        with tqdm(desc="log_prob", total=volume.calls, disable=not progress, leave=False) as bar:
            x_T, log_det = volume.solve(x_t, bar.update)
        prior = sde.prior_log_prob(x_T.double(), denoiser.own(x_T.shape, cond or {}))
        residual = torch.zeros_like(log_det) + denoiser.own(z.shape, cond or {}).dims * log_alpha
        if correct:
            residual = residual - volume.smoothing / 2
        value = prior + log_det + residual + (0.0 if log_volume is None else log_volume)
    if volume.status != "complete":
        value, prior, log_det = (torch.full_like(number, math.nan) for number in (value, prior, log_det))
    elif bad := not_finite(value):
        raise volume.locate(x_t, bad)
    variance = volume.variance.clamp(min=0)
    dof = degrees_of_freedom(variance, volume.doubt)
    numbers = (value, variance.sqrt(), dof, prior, log_det, residual, volume.error)
    value, stderr, dof, prior, log_det, residual, error = (number.to(x_t.dtype) for number in numbers)
    latent = narrowed(x_T, x.dtype, "the latent")
    return LogProb(
        value,
        stderr,
        dof,
        volume.nfe,
        latent,
        prior,
        log_det,
        residual,
        error,
        volume.status,
        volume.t,
        None if log_volume is None else log_volume.to(x_t.dtype),
        of,
        None if own.mask is None else own.dims.long(),
    )


def state_of(
    denoiser: Denoiser, x: Tensor, cond: Mapping[str, Any] | None, data: bool = True
) -> tuple[Tensor, Tensor | None, Literal["x", "z"]]:
    """What is given, data or not, as a state in float32 or wider, with the volume of the codec; and what a density of
    the state, with the volume if there is one, is a density of.
    """
    if denoiser.codec is None or not data:
        return widen(x), None, "x" if denoiser.codec is None else "z"
    log_volume = denoiser.codec.log_volume(widen(x), **dict(cond or {}))
    return encoded(denoiser, x, cond), log_volume, "z" if log_volume is None else "x"


def density_run(
    denoiser: Denoiser,
    x_T: Tensor,
    solver: Solver,
    grid: Grid,
    trace: Divergence,
    noise: NoiseSource,
    cond: Mapping[str, Any] | None,
    differentiable: bool,
) -> Volume:
    """The run of a deterministic solver down a grid, with its volume.

    Raises:
        ValueError: if the solver draws noise or is no table of torchdiffeq's, or the grid does not lead from the prior
            to a time with noise.
    """
    sde, first = denoiser.sde, float(grid.times[0])
    if first != sde.t_max or float(sde.sigma(grid.times[-1])) == 0:
        raise ValueError(
            f"log_prob= wants a grid from t_max = {sde.t_max}, where the prior's density is known, to a noisy time, "
            f"not from {first} to {float(grid.times[-1])}: end it at t_min = {sde.t_min}"
        )
    run = (denoiser, trace, noise, cond, differentiable)
    if not isinstance(solver, AdaptiveODE):
        if not solver.has_table:
            raise ValueError(f"log_prob= is for deterministic solvers, tables and AdaptiveODE, not for {solver!r}")
        return TableVolume(*run, table=solver.tableau(grid))
    check_option(TORCHDIFFEQ, method=solver.method)
    found, looked = in_steps(denoiser, x_T, first, grid.times.tolist(), cond, solver.max_nfe)
    if found:
        warn_of_steps(found, f"take a table, {TABLE_CALL} say", 4)
    volume = AdaptiveVolume(
        *run,
        parts=legs(grid, free=True),
        adjoint=False,
        budget=solver.max_nfe,
        rtol=solver.rtol,
        atol=solver.atol,
        method=solver.method,
        first_step=_angle(sde, first, solver.first_step),
    )
    volume.looked = looked
    return volume


def _angle(sde: SDE, t: float, step: float) -> float:
    """A step of half log-SNR from t as one of the angle, 0.001 at least: where alpha is nearly 0 it would be none."""
    signal, sigma = (float(scale) for scale in sde.scales(torch.tensor(t, dtype=torch.float64, device="cpu")))
    return max(1e-3, step * signal * sigma / (signal**2 + sigma**2))


def _time(sde: SDE, t: float) -> float:
    if isinstance(t, bool) or not isinstance(t, Real) or not 0 < t < sde.t_max:
        raise ArgumentError(f"t={t}: expected a time in (0, {sde.t_max}) of {sde!r}")
    return float(t)


def _table_grid(sde: SDE, solver: Solver, steps: int | None, grid: Grid | None, start: float, t: float | None) -> Grid:
    """The decreasing grid of a table: from t_max to where x stands."""
    if steps is not None and grid is not None:
        raise ArgumentError("give at most one of steps= and grid=")
    if not isinstance(solver, Solver) or not solver.has_table:
        raise ValueError(f"solver={solver!r}: expected a solver with a table, {TABLE_CALL} say")
    own = grid is None
    _, grid = choose(sde, solver, steps, None, grid, end=start)
    first, last = float(grid.times[0]), float(grid.times[-1])
    if own and last != start:
        raise ArgumentError(f"t={t}: a grid of {sde!r} ends at a node, {last}: give that, or no steps=")
    if first != sde.t_max:
        raise ValueError(f"the grid starts at {first}: a density needs the prior, at {sde.t_max}")
    if t is not None and last != t:
        raise ArgumentError(f"the grid ends at {last}, but x stands at t={t}: end it there")
    return grid
