"""Exact analysis of tables: the law of a sampler's output on Gaussian data, its errors, order and stability.

On data N(m, C) the exact denoiser is affine, and in the eigenbasis of C each direction is on its own. With v an
eigenvalue, m the mean along its direction and S_t = alpha^2 v + sigma^2 the variance of x_t,

    D = m + k (x - alpha m),    k = alpha v / S_t,    F = p x + q D = f x + e m,    f = p + q k,    e = q sigma^2 / S_t

so the output of a `Tableau` is affine in x_T and in its noise, and one pass from its last row to its first gives all of
it: with xi_i the derivative of the output by the state that enters row i and phi_i that by F_i, xi_R = 1 and

    phi_i = sum_k b_{i+k,k} xi_{i+k+1}
    xi_i  = a_i xi_{i+1} + f_i phi_i
    x_R   = xi_0 x_T + m sum_i e_i phi_i + sum_i c_i xi_{i+1} z_i

Nothing is sampled: errors have no statistical noise, and a table of 1000 rows takes less than 0.1 s for 300 distinct
eigenvalues. All in float64 on the CPU. A target is an `exact.Gaussian`, or a pair (mean, variances) in its eigenbasis,
each a number or of one shape: a vector, an image, any event. Distances are per dimension (per sqrt(D), D the number of
dimensions), so that they compare across sizes of data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scoresde.checks import check_count
from scoresde.exact import Gaussian, GaussianMixture
from scoresde.grid import Grid
from scoresde.sde import SDE
from scoresde.solvers.base import Solver
from scoresde.solvers.runge_kutta import RungeKutta
from scoresde.tableau import Tableau, responses
from scoresde.tensors import Time, as_time, shown

__all__ = [
    "Law",
    "MeasuredOrder",
    "amplification",
    "flow_error",
    "gaussian_law",
    "kl",
    "marginal",
    "order",
    "stable_from",
    "w2",
]


@shown
class Law(NamedTuple):
    """A Gaussian with independent directions: those of the target's eigenbasis.

    Attributes:
        mean, variances: of each direction, float64, shape (D,) where they were computed here.
    """

    mean: Tensor
    variances: Tensor


Numbers = Tensor | Sequence[float] | float
Target = Gaussian | tuple[Numbers, Numbers]
Start = Literal["prior", "exact"]

_ANISOTROPIC = Law(
    torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, device="cpu"),
    torch.tensor([0.09, 1.0, 4.0], dtype=torch.float64, device="cpu"),
)


def marginal(target: Target, sde: SDE, t: Time) -> Law:
    """The exact law of x_t, N(alpha m, alpha^2 v + sigma^2); the data itself at t = 0.

    Args:
        target: the data, an `exact.Gaussian` or (mean, variances).
        sde, t: the SDE and one time.

    Raises:
        TypeError, ValueError: if the target is no Gaussian, or its numbers do not fit each other.

    >>> from scoresde import EDMSDE
    >>> marginal((1.0, [4.0, 0.0]), EDMSDE(), 3.0).variances
    tensor([13.,  9.], dtype=torch.float64)
    """
    m, v = _spectrum(target)
    t = as_time(t).detach().to("cpu", torch.float64)
    return Law(sde.alpha(t) * m, sde.alpha(t) ** 2 * v + sde.sigma(t) ** 2)


def gaussian_law(table: Tableau, target: Target, *, x_T: Start = "prior") -> Law:
    """The law of a table's output on Gaussian data with the exact denoiser: no sampling, exact to rounding.

    Args:
        table: of any sampler, deterministic or not.
        target: the data, an `exact.Gaussian` or (mean, variances).
        x_T: what the run starts from at grid.times[0]: "prior", N(0, prior_std^2) as `sample` draws it, or "exact",
            the marginal there, which leaves the error of the solver alone.

    Returns:
        Mean and variance in each direction: of the event's own entries, in their order, if the covariance is diagonal,
        else of its eigenvectors in ascending order (torch.linalg.eigh).

    Raises:
        TypeError, ValueError: if the target is no Gaussian, its numbers do not fit each other, or x_T is another word.

    >>> from scoresde import VPSDE, Grid
    >>> from scoresde.solvers import DDPM
    >>> grid = Grid.uniform(VPSDE(), 50)
    >>> law = gaussian_law(DDPM().tableau(grid), (3.0, [0.01, 1.0]))
    >>> law.variances.sqrt()
    tensor([0.0681, 0.9260], dtype=torch.float64)
    >>> round(w2(law, marginal((3.0, [0.01, 1.0]), VPSDE(), 0.0)), 3)
    0.057
    """
    m, v = _spectrum(target)
    of_x_T, of_m, noise = _affine(table, v)
    start = _start(table, Law(m, v), x_T)
    return Law(of_x_T * start.mean + of_m * m, of_x_T**2 * start.variances + noise)


def w2(law: Law, other: Law) -> float:
    """2-Wasserstein distance of two laws on the same directions, per sqrt(D), in units of the data. The Frechet
    distance of Heusel et al. (2017) is D times its square.

        W2^2 = sum (mean - mean')^2 + (std - std')^2

    >>> w2(Law(torch.tensor([3.0]), torch.tensor([4.0])), Law(torch.tensor([0.0]), torch.tensor([36.0])))
    5.0
    """
    spread = law.variances.sqrt() - other.variances.sqrt()
    return float(((law.mean - other.mean) ** 2 + spread**2).mean().sqrt())


def kl(law: Law, other: Law) -> float:
    """KL(law || other) in nats per dimension, for two laws on the same directions. Infinite where one of them, and only
    one, has a direction of zero width, or both have one but other means there.

        KL = (1/2) sum v / v' - 1 - log(v / v') + (mean - mean')^2 / v'

    >>> kl(Law(torch.tensor([1.0]), torch.tensor([2.0])), Law(torch.tensor([0.0]), torch.tensor([2.0])))
    0.25
    """
    shift = (law.mean - other.mean) ** 2
    r = law.variances / other.variances - 1
    nats = (r - r.log1p() + shift / other.variances) / 2
    narrow = (law.variances == 0) | (other.variances == 0)
    same = (law.variances == other.variances) & (shift == 0)
    return float(torch.where(narrow, torch.where(same, 0.0, math.inf), nats).mean())


def flow_error(table: Tableau, target: Target, *, x_T: Start = "prior") -> float:
    """Root mean square over x_T of |x_end - flow(x_T)| / sqrt(D): a deterministic table's error against the exact
    probability flow from the same x_T, in units of the data.

    Args:
        table: of a deterministic sampler, c = 0 throughout.
        target: the data, an `exact.Gaussian` or (mean, variances).
        x_T: the law of x_T, "prior" or "exact", as for `gaussian_law`.

    Raises:
        ValueError: if the table draws noise; compare its `gaussian_law` with the `marginal` by `w2`.
        TypeError, ValueError: as for `gaussian_law`.

    >>> from scoresde import VPSDE, Grid
    >>> from scoresde.solvers import DDIM
    >>> [round(flow_error(DDIM().tableau(Grid.uniform(VPSDE(), n)), (0.0, [0.01, 1.0])), 4) for n in (10, 20, 40)]
    [0.131, 0.0727, 0.039]
    """
    if bool((table.c > 0).any()):
        raise ValueError(
            "flow_error is of deterministic tables, and this one draws noise (c > 0): compare laws, "
            "w2(gaussian_law(table, target), marginal(target, sde, t))"
        )
    m, v = _spectrum(target)
    of_x_T, of_m, _ = _affine(table, v)
    (t_0, t_N), sde = table.grid.times[[0, -1]], table.grid.sde
    start, end = marginal((m, v), sde, t_0), marginal((m, v), sde, t_N)
    # The flow keeps (x - alpha m) / sqrt(S).
    ratio = (end.variances / start.variances).sqrt()
    factor, shift = of_x_T - ratio, of_m * m - (end.mean - ratio * start.mean)
    drawn = _start(table, Law(m, v), x_T)
    return float((factor**2 * drawn.variances + (factor * drawn.mean + shift) ** 2).mean().sqrt())


def amplification(table: Tableau, target: Target) -> float:
    """How much a perturbation of the state can grow: the largest factor over all rows and directions,

        max_i |xi_i| sqrt(S_{t_i}) / sqrt(S_end)

    from a perturbation of the state that enters row i to the output, each in units of the marginal's standard deviation
    at its time. The exact probability flow has 1 everywhere and the reverse SDE less; what a table has above 1 is how
    far it magnifies a network's error, or rounding. A row's own F sees the perturbation, earlier ones do not.

    Args:
        table: of any sampler.
        target: the data, an `exact.Gaussian` or (mean, variances).

    Returns:
        The factor; directions that end with zero width, as the data has, do not count.

    Raises:
        TypeError, ValueError: if the target is no Gaussian, or its numbers do not fit each other.

    >>> from scoresde import VPSDE, Grid
    >>> from scoresde.solvers import DDIM, Heun
    >>> [round(amplification(solver.tableau(Grid.uniform(VPSDE(), 5)), (0.0, 1.0)), 2) for solver in (DDIM(), Heun())]
    [0.81, 1.47]
    """
    v = _spectrum(target).variances.unique()
    xi = _responses(table, v)[0][: len(table)]
    alpha, sigma = (scale(table.t)[:, None] for scale in (table.grid.sde.alpha, table.grid.sde.sigma))
    std, end = (
        (alpha**2 * v + sigma**2).sqrt(),
        marginal((0.0, v), table.grid.sde, table.grid.times[-1]).variances.sqrt(),
    )
    return float(torch.where(xi == 0, 0.0, xi.abs() * std / end).max())


class MeasuredOrder(NamedTuple):
    """What `order` returns.

    Attributes:
        order: minus the slope of log error against log steps, by least squares.
        slopes: the same between neighbouring numbers of steps: they should agree, or tend to a limit.
        steps: the numbers of steps.
        errors: `flow_error` if deterministic, else `w2`.
    """

    order: float
    slopes: tuple[float, ...]
    steps: tuple[int, ...]
    errors: tuple[float, ...]


def order(
    solver: Solver,
    sde: SDE,
    *,
    target: Target | GaussianMixture = _ANISOTROPIC,
    steps: Sequence[int] = (80, 160, 320, 640),
    start: float = -5.0,
    end: float = 1.5,
    spacing: Callable[..., Grid] = Grid.log_snr,
) -> MeasuredOrder:
    """Measured order of convergence on a Gaussian: the error falls as steps^-order.

    For a deterministic solver the error is `flow_error`, for a stochastic one the W2 distance of the output to the
    marginal at the end (a weak order), both from x_T of the exact marginal at the start. The end of the SDE, where no
    method has its order, is left out by `end`. At `start` the default is pure noise, as in use: there the first-order
    step by which a multistep method begins costs almost nothing, and its order shows; with start=-1.5 that step decides
    and every such method measures 2 (with a corrector, 3), as it also does with enough steps.

    A Gaussian's denoiser is linear, and can flatter: the explicit midpoint rule in sigma measures 3 on every Gaussian,
    where its leading error vanishes, and 2 on other data. So the target may be a `GaussianMixture`, for deterministic
    solvers: the error then is the rms distance per sqrt(D) of 64 fixed samples to those of `RungeKutta("rk4")` at four
    times as many steps as the most asked for, which takes a few seconds.

    Args:
        solver: one that has a table.
        sde: the SDE.
        target: the data, an `exact.Gaussian`, (mean, variances) or a `GaussianMixture`; by default
            N((1, -2, 0.5), diag(0.3, 1, 2)^2).
        steps: at least two increasing numbers. Take them large: DPM-Solver++ 3M as published needs 320 to show 2.
        start, end: half log-SNR at the grids' two ends; the start is at most the SDE's t_max.
        spacing: called as spacing(sde, n, start=t, end=t) with the times of start and end: a constructor of `Grid`.

    Raises:
        ValueError: if the steps are fewer than two or do not increase, or fewer than two errors stand above rounding
            (1e-13 of the output's root mean square). Errors that do not are left out.
        TypeError: if the solver has no table, or is stochastic and the target a mixture.

    >>> from scoresde import VPSDE
    >>> from scoresde.solvers import DDPM, Heun
    >>> [round(order(solver, VPSDE()).order, 1) for solver in (DDPM(), Heun())]
    [1.0, 2.0]
    """
    check_count(**{f"steps[{i}]": n for i, n in enumerate(steps)})
    if len(steps) < 2 or any(n >= following for n, following in pairwise(steps)):
        raise ValueError(f"steps={tuple(steps)}: expected at least two increasing numbers")
    t_0, t_N = min(float(sde.time_at(start)), sde.t_max), float(sde.time_at(end))
    tables = [solver.tableau(spacing(sde, int(n), start=t_0, end=t_N)) for n in steps]
    if isinstance(target, GaussianMixture) and not isinstance(target, Gaussian):
        reference = RungeKutta("rk4").tableau(spacing(sde, 4 * int(steps[-1]), start=t_0, end=t_N))
        *errors, size = _endpoint_errors(tables, reference, target)
    else:
        truth = marginal(target, sde, t_N)
        size = float((truth.mean**2 + truth.variances).mean().sqrt())
        errors = [
            w2(gaussian_law(table, target, x_T="exact"), truth)
            if bool((table.c > 0).any())
            else flow_error(table, target, x_T="exact")
            for table in tables
        ]
    kept = [(int(n), error) for n, error in zip(steps, errors, strict=True) if not error <= 1e-13 * size]
    if len(kept) < 2:
        raise ValueError(f"{solver!r} is exact to rounding at steps={tuple(steps)}: take fewer steps")
    log_n, log_error = np.log(np.array(kept, dtype=np.float64)).T
    slopes = -np.diff(log_error) / np.diff(log_n)
    fitted = -np.polyfit(log_n, log_error, 1)[0]
    return MeasuredOrder(float(fitted), tuple(slopes.tolist()), *zip(*kept, strict=True))


def stable_from(
    solver: Solver,
    sde: SDE,
    target: Target = (0.0, [1e-2, 1.0]),
    *,
    factor: float = 2.0,
    most: int = 100,
    grid: Callable[[int], Grid] | None = None,
) -> int | None:
    """The least number of steps from which on the output has the right size: in every direction its root mean square
    distance from the true mean stays within `factor` of the true standard deviation, above and below, at that number
    of steps and at each larger one up to `most`.

    Args:
        solver: one that has a table.
        sde: the SDE.
        target: the data, an `exact.Gaussian` or (mean, variances); by default directions of std 0.1 and 1.
        factor: above 1.
        most: the largest number of steps tried (on a chain, at most its length).
        grid: the grid of n steps; by default the solver's own, from the prior to the data.

    Returns:
        The number, or None if even `most` steps are not enough.

    Raises:
        ValueError: unless factor > 1 and most is a whole number >= 1.
        TypeError: if the solver has no table.

    >>> from scoresde import VPSDE, Grid
    >>> from scoresde.solvers import DDIM, DDPM, EulerMaruyama
    >>> sde = VPSDE()
    >>> [stable_from(s, sde, grid=lambda n: Grid.uniform(sde, n)) for s in (DDIM(), DDPM(), EulerMaruyama())]
    [22, 23, 10]
    """
    if not factor > 1:
        raise ValueError(f"factor={factor}: expected a number > 1")
    check_count(most=most)
    make = grid or (lambda n: solver.grid(sde, n))
    least = None
    for n in range(int(min(most, sde.most_steps)), 0, -1):
        table = solver.tableau(make(n))
        law, truth = gaussian_law(table, target), marginal(target, sde, table.grid.times[-1])
        second = law.variances + (law.mean - truth.mean) ** 2
        # So written, zero width is met by zero width only, and a NaN by nothing.
        fits = (second <= factor**2 * truth.variances) & (second * factor**2 >= truth.variances)
        if not bool(fits.all()):
            break
        least = n
    return least


def _endpoint_errors(tables: Sequence[Tableau], reference: Tableau, target: GaussianMixture) -> list[float]:
    """The rms distance of each table's samples to the reference's from the same x_T, then the rms of those."""
    if any(bool((table.c > 0).any()) for table in tables):
        raise TypeError("the order of a stochastic solver is measured on a Gaussian, not on a mixture")
    sde, generator = reference.grid.sde, torch.Generator("cpu").manual_seed(0)
    x_0 = target.to("cpu").sample(64, generator, torch.float64)
    noise = torch.randn(x_0.shape, generator=generator, dtype=torch.float64, device="cpu")
    x_T, denoiser = sde.perturb(x_0, reference.grid.times[0], noise), target.to("cpu").denoiser(sde)
    with torch.no_grad():
        *samples, exact = (list(table.iterate(denoiser, x_T))[-1].x for table in [*tables, reference])
    return [float((x - exact).square().mean().sqrt()) for x in samples] + [float(exact.square().mean().sqrt())]


def _responses(table: Tableau, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """xi (R + 1, D), phi (R, D) and e (R, D) of the module's docstring, v of shape (D,)."""
    alpha, sigma = table.grid.sde.alpha(table.t)[:, None], table.grid.sde.sigma(table.t)[:, None]
    S, on = alpha**2 * v + sigma**2, table.evaluates[:, None]
    p, q = table.p[:, None], table.q[:, None]
    f = torch.where(on, p + q * (alpha * v / S), 0.0)  # S may be zero where nothing is evaluated
    e = torch.where(on, q * (sigma**2 / S), 0.0)
    return *responses(table, f), e


def _affine(table: Tableau, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Factors of x_T and of m in the output, and its variance from the noise, each (D,)."""
    distinct, direction = v.unique(return_inverse=True)  # of an image's spectrum a few hundred
    xi, phi, e = _responses(table, distinct)
    factors = xi[0], (e * phi).sum(0), ((table.c[:, None] * xi[1:]) ** 2).sum(0)
    return factors[0][direction], factors[1][direction], factors[2][direction]


def _start(table: Tableau, data: Law, x_T: Start) -> Law:
    """The law of x_T."""
    t, sde = table.grid.times[0], table.grid.sde
    if x_T == "exact":
        return marginal(data, sde, t)
    if x_T == "prior":
        return Law(torch.zeros_like(data.mean), torch.full_like(data.variances, sde.prior_std_at(float(t)) ** 2))
    raise ValueError(f"x_T={x_T!r}: expected 'prior' or 'exact'")


def _spectrum(target: Target) -> Law:
    """Mean and variances (D,) in the eigenbasis, float64 on the CPU."""
    if isinstance(target, Gaussian):
        m, C = (moment.cpu() for moment in target.moments())
        v = C.diagonal()
        if not torch.equal(C, v.diag()):
            v, basis = torch.linalg.eigh(C)
            m, v = basis.T @ m, v.clamp(min=0)  # rounding can leave a zero eigenvalue at -1e-17
        return Law(m, v)
    if not isinstance(target, tuple | list) or len(target) != 2:
        raise TypeError(f"the target is {type(target).__name__}: expected an exact.Gaussian or (mean, variances)")
    m, v = (torch.as_tensor(x, dtype=torch.float64, device="cpu").detach() for x in target)
    if m.ndim and v.ndim and m.shape != v.shape:
        raise ValueError(f"mean of shape {tuple(m.shape)}, variances of {tuple(v.shape)}: expected one shape")
    if not m.numel() or not v.numel() or not bool(m.isfinite().all() & (v >= 0).all() & v.isfinite().all()):
        raise ValueError("mean and variances must be finite and not empty, and variances >= 0")
    m, v = torch.broadcast_tensors(m, v)
    return Law(m.flatten(), v.flatten())
