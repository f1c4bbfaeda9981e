"""First-order solvers: one evaluation a step, x_s = a x_t + b D(x_t, t) + c z.

DDPM, DDIM and the exponential SDE step share the marginal-preserving step: any c^2 in [0, sigma_s^2] with

    a = sqrt(sigma_s^2 - c^2) / sigma_t,    b = alpha_s - a alpha_t

maps alpha_t x_0 + sigma_t eps to the law of alpha_s x_0 + sigma_s eps. With h = lambda_s - lambda_t, the posterior
variance of the forward process is sigma_s^2 (1 - e^{-2h}) ("beta tilde"), and its one-step variance from s to t is
sigma_t^2 (1 - e^{-2h}) ("beta").
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from scoresde.checks import check_nonnegative, check_option
from scoresde.denoiser import Denoiser
from scoresde.grid import Grid
from scoresde.noise import NoiseSource
from scoresde.sde import SDE
from scoresde.solvers.base import Around, SingleStep, Solver
from scoresde.solvers.rows import Rows, forgotten, one_evaluation
from scoresde.tableau import State, Tableau
from scoresde.wrappers import parted

__all__ = ["DDIM", "DDPM", "Ancestral", "EulerMaruyama", "ExponentialSDE", "RawEps", "ReverseDiffusion"]


class FirstOrder(SingleStep, ABC):
    """A solver of one evaluation a step."""

    def stages(self, sde: SDE, t: Tensor, s: Tensor) -> Tensor:
        return torch.ones(len(t), dtype=torch.int64, device="cpu")


def marginal_preserving(sde: SDE, t: Tensor, s: Tensor, c2: Tensor) -> Rows:
    """The step of the module's docstring with noise of variance c2."""
    a = (sde.sigma(s) ** 2 - c2).sqrt() / sde.sigma(t)
    return one_evaluation(sde, t, s, a, sde.alpha(s) - a * sde.alpha(t), c2.sqrt())


@dataclass(frozen=True)
class DDIM(FirstOrder):
    """Denoising diffusion implicit model (Song, Meng and Ermon, 2021, eq. 12 and 16), on any SDE and any sub-sequence.

    x_s = alpha_s D + sqrt(sigma_s^2 - c^2) eps + c z,    c^2 = eta^2 sigma_s^2 (1 - e^{-2h})

    Args:
        eta: 0 is deterministic (and is DPM-Solver-1), 1 is DDPM with the posterior variance.

    Raises:
        ValueError: unless eta >= 0 is finite; by `tableau`, where eta > 1 would ask for more noise than sigma_s.
    """

    power: ClassVar[float | None] = 3.0

    eta: float = 0.0

    def __post_init__(self) -> None:
        check_nonnegative(eta=self.eta)

    def rows(self, sde: SDE, t: Tensor, s: Tensor) -> Rows:
        # eta = 0 also moves up, to alpha = 0 even, where the share is infinite.
        c2 = (self.eta * sde.sigma(s)) ** 2 * forgotten(sde, t, s, tau=float(self.eta > 0))
        if bool((c2 > sde.sigma(s) ** 2).any()):
            raise ValueError(f"eta={self.eta} asks for more noise than sigma_s on a step of {sde!r}: take eta <= 1")
        return marginal_preserving(sde, t, s, c2)


@dataclass(frozen=True)
class DDPM(FirstOrder):
    """Ancestral sampling of DDPM (Ho et al., 2020, algorithm 2), on any SDE and any sub-sequence.

    x_s = (alpha_s / alpha_t) e^{-2h} x_t + alpha_s (1 - e^{-2h}) D + c z,  e^{-h} = alpha_t sigma_s / (alpha_s sigma_t)

    Args:
        variance: "posterior" is c^2 = sigma_s^2 (1 - e^{-2h}), beta tilde of the paper, right for data that is a point;
            "beta" is c^2 = sigma_t^2 (1 - e^{-2h}), right for data that is N(0, I) on a VP SDE, and the sigma hat of
            table 1 of DDIM (Song, Meng and Ermon, 2021). No noise is added on the last step, to sigma_s = 0.

    Raises:
        ValueError: on another variance.
    """

    variance: Literal["posterior", "beta"] = "posterior"

    def __post_init__(self) -> None:
        check_option(("posterior", "beta"), variance=self.variance)

    def grid(self, sde: SDE, steps: int, *, end: float = 0.0) -> Grid:
        if self.variance == "beta":
            return Grid.customary(sde, steps, end=end)
        return Grid.sampling(sde, steps, power=3.0, end=end)

    def rows(self, sde: SDE, t: Tensor, s: Tensor) -> Rows:
        share = forgotten(sde, t, s)
        rows = marginal_preserving(sde, t, s, sde.sigma(s) ** 2 * share)
        if self.variance == "posterior":
            return rows
        return rows._replace(c=torch.where(sde.sigma(s) == 0, 0.0, sde.sigma(t) * share.sqrt()))


@dataclass(frozen=True)
class Ancestral(FirstOrder):
    """Ancestral sampling as Song et al. (2021, appendix F) and their code have it: DDPM's mean, with variance "beta"
    where alpha falls (VP, sub-VP) and the posterior variance where it does not (VE, EDM: their eq. 47).
    """

    def rows(self, sde: SDE, t: Tensor, s: Tensor) -> Rows:
        shrinks = bool((sde.alpha(t) < sde.alpha(s)).any())
        return DDPM("beta" if shrinks else "posterior").rows(sde, t, s)


@dataclass(frozen=True)
class ExponentialSDE(FirstOrder):
    """The reverse SDE of noise level tau with D held fixed over the step, solved exactly: the first order of
    SDE-DPM-Solver++ (Lu et al., 2022b) and of SA-Solver (Xue et al., 2023).

    x_s = (sigma_s / sigma_t) e^{-tau^2 h} x_t + alpha_s (1 - e^{-(1 + tau^2) h}) D + sigma_s sqrt(1 - e^{-2 tau^2 h}) z

    Args:
        tau: 0 is the probability-flow ODE (DDIM), 1 the reverse SDE (DDPM with the posterior variance).

    Raises:
        ValueError: unless tau >= 0 is finite.
    """

    power: ClassVar[float | None] = 3.0

    tau: float = 1.0

    def __post_init__(self) -> None:
        check_nonnegative(tau=self.tau)

    def rows(self, sde: SDE, t: Tensor, s: Tensor) -> Rows:
        return marginal_preserving(sde, t, s, sde.sigma(s) ** 2 * forgotten(sde, t, s, self.tau))


@dataclass(frozen=True)
class EulerMaruyama(FirstOrder):
    """Euler-Maruyama on the reverse SDE (Song et al., 2021, eq. 6), with coefficients at t:

    variable
    t         x_s = x_t - h (f x_t - g^2 score) + g sqrt(h) z,              h = t - s
    sigma     y_s = y_t - 2 (u_t - u_s) eps + sqrt(2 u_t (u_t - u_s)) z,    y = x / alpha,  u = sigma / alpha

    "sigma" is on every SDE what "t" is on `EDMSDE`, where u = t. The last step, to sigma = 0, is the denoiser's mean:
    the SDE's own drift is infinite there. Likewise the first from alpha = 0 (`FlowSDE`), where f, g and u are infinite,
    is the exact draw N(alpha_s D, sigma_s^2). The method is first order in the step of its variable, so it wants many
    steps, in sigma more than any other solver.

    Args:
        variable: "t" or "sigma".

    Raises:
        ValueError: on another variable.
    """

    variable: Literal["t", "sigma"] = "t"

    def __post_init__(self) -> None:
        check_option(("t", "sigma"), variable=self.variable)

    def rows(self, sde: SDE, t: Tensor, s: Tensor) -> Rows:
        if self.variable == "sigma":
            ratio = sde.alpha(s) / sde.alpha(t)
            pull = -2 * torch.expm1(sde.half_log_snr(t) - sde.half_log_snr(s))  # 2 (1 - u_s / u_t)
            return one_evaluation(
                sde, t, s, ratio * (1 - pull), sde.alpha(s) * pull, ratio * sde.sigma(t) * pull.sqrt()
            )
        h, f, g = t - s, sde.drift(t), sde.diffusion(t)
        pull = h * (g / sde.sigma(t)) ** 2  # h g^2 score = pull (alpha D - x)
        return one_evaluation(sde, t, s, 1 - h * f - pull, pull * sde.alpha(t), g * h.sqrt())


@dataclass(frozen=True)
class ReverseDiffusion(FirstOrder):
    """Reverse diffusion (Song et al., 2021, eq. 46 and appendix E): the forward process's own discretisation
    x_t = A x_s + G z, exact here with A = alpha_t / alpha_s and G^2 = sigma_t^2 - A^2 sigma_s^2, turned round:

    x_s = (2 - A) x_t + G^2 score + G z        (VP: A = sqrt(1 - beta), G^2 = beta;  VE: A = 1)

    The last step, to sigma = 0, is D; the authors' code has (2 - A) x_t + G^2 score there.

    Args:
        probability_flow: half the score term and no noise, their discretised probability-flow ODE.
    """

    probability_flow: bool = False

    def rows(self, sde: SDE, t: Tensor, s: Tensor) -> Rows:
        alpha_t, share = sde.alpha(t), forgotten(sde, t, s)  # G^2 = sigma_t^2 share
        pull = share / 2 if self.probability_flow else share
        c = torch.zeros_like(pull) if self.probability_flow else sde.sigma(t) * share.sqrt()
        a, b = 2 - alpha_t / sde.alpha(s) - pull, pull * alpha_t
        # From alpha = 0, A is 0 and tells nothing of how to go back, and up to it infinite: the exact step instead.
        exact = DDIM(0.0 if self.probability_flow else 1.0).rows(sde, t, s)
        lost = (alpha_t == 0) | (sde.alpha(s) == 0)
        return one_evaluation(
            sde, t, s, torch.where(lost, exact.a, a), torch.where(lost, exact.b[:, 0], b), torch.where(lost, exact.c, c)
        )


@dataclass(frozen=True)
class RawEps(Around):
    """A step with two predictions of one evaluation: the mean as `Clip` or `DynamicThreshold` limits it, D^, and the
    eps that belongs to the mean before that, D. A row x_s = a x_t + b D + c z, in which x_t is alpha_t D + sigma_t eps,
    becomes

        x_s = (a alpha_t + b) D^ + a (x_t - alpha_t D) + c z        (DDIM: alpha_s D^ + sqrt(sigma_s^2 - c^2) eps + c z)

    So DDIM runs in diffusers (DDIMScheduler with clip_sample or thresholding, unless use_clipped_model_output=True),
    and in the code of Analytic-DDIM (`OptimalVariance(clamp=)`). With `DDIM()` alone eps follows the clipped mean, as
    in guided diffusion, and so it does in DDPM's own sampler: where means leave the range, as with much noise or
    guidance, the two end in different images, and nothing tells of it.

    Where no mean is limited it is the solver itself, bit for bit. It has no table: a row is not affine in one mean.

    Args:
        solver: of one evaluation a step that reads no earlier ones: DDIM(eta), ExponentialSDE(tau), ...

    Raises:
        TypeError: if solver is none; on a run, if it has no table.
        ValueError: on a run, before any evaluation, if the solver has steps of several evaluations or memory of earlier
            ones, or guidance, or anything else that changes the mean, is around the limit.

    >>> from scoresde import VPSDE, Clip, Grid, sample
    >>> from scoresde.exact import Gaussian
    >>> denoiser = Clip(Gaussian(mean=[0.0], std=3.0).denoiser(VPSDE()), -1, 1)  # clips most of it
    >>> for solver in (DDIM(), RawEps(DDIM())):  # to a little noise
    ...     x = sample(denoiser, (1000, 1), solver, grid=Grid.uniform(VPSDE(), 20, end=0.1), seed=0).x
    ...     print(f"std {x.std():.2f}")
    std 1.10
    std 0.87
    """

    solver: Solver = DDIM()
    draws: ClassVar[bool] = False  # or the table says so
    goes_up: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.solver, Solver):
            raise TypeError(f"RawEps wraps a solver, DDIM() say, not {self.solver!r}")

    def loop(
        self, denoiser: Denoiser, x: Tensor, grid: Grid, noise: NoiseSource | None, cond: dict[str, Any]
    ) -> Iterator[State]:
        table = self.solver.tableau(grid)
        if not table.one_step:
            raise ValueError(
                f"{self.solver!r} has steps of several evaluations, or steps that read those before them: take one of "
                "one evaluation a step, DDIM() or ExponentialSDE(tau)"
            )
        if (parts := parted(denoiser)) is None:
            return self.solver.loop(denoiser, x, grid, noise, cond)
        if noise is None and bool((table.c > 0).any()):
            raise ValueError(f"{self.solver!r} draws noise: pass noise=, a function (row, x)")
        parts[0].check_times(table.t)
        return _with_both(table, *parts, x, noise, cond)


def _with_both(
    table: Tableau,
    raw: Denoiser,
    limit: Callable[[Tensor], Tensor],
    x: Tensor,
    noise: NoiseSource | None,
    cond: dict[str, Any],
) -> Iterator[State]:
    """The loop of `RawEps`."""
    a, b = table.in_x0()
    signal = a * table.grid.sde.alpha(table.t)
    columns = (table.t, a, signal + b, signal, table.c)
    for i, (t, a_i, limited, unlimited, c) in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
        D = raw(x, t, **cond).mean
        # The multiples of x and D also where they are 0: a NaN must reach the end.
        x = x * a_i + limit(D) * limited - D * unlimited
        if c != 0:
            assert noise is not None
            x = x + c * noise(i, x)
        yield State(i, i + 1, i, True, t, x)
