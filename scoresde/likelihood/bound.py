"""The variational bound on log p(x_0), of a discrete chain and in continuous time.

For any process q that has the SDE's marginals q(x_t | x_0) = N(alpha_t x_0, sigma_t^2), by Jensen's inequality,

    log p(x_0) >= - KL(q(x_T | x_0) | N(0, prior_std^2))                               prior
                  - sum_{t -> s} E KL(q(x_s | x_t, x_0) | p(x_s | x_t))                denoising
                  + E log p(x_0 | x_{t_1})                                             reconstruction

The model is the solver's own chain. A row of a one-step table, read with F = p x + q D, is

    p(x_s | x_t)      = N(a' x_t + b' D, v),    a' = a + b p,  b' = b q,  v = c^2, or c^2 + b'^2 Var[x_0 | x_t]
    q(x_s | x_t, x_0) = N(A x_t + (alpha_s - A alpha_t) x_0, l^2),    l^2 = sigma_s^2 - A^2 sigma_t^2 > 0

and with r = l^2 / v each dimension of a term is (r - 1 - log r) / 2 + (mean of p - mean of q)^2 / (2 v). Any A keeps
the marginals, so each row takes the tighter of two, as if D were x_0: the solver's own, A = a' (DDIM's family: l^2 =
c^2 where the row keeps the marginals), or the forward process's posterior, A = (sigma_s / sigma_t) e^{-h}, which is
DDPM's. Where Var[x_0 | x_t] is one number C a time (`AnalyticDenoiser`), and v has it, the tightest of all is known, as
data in which C is the mean of |x_0 - D|^2 / dim has it: A v = m l^2 with m = a' + b' alpha_t C / sigma_t^2. With ever
more steps the denoising terms become, with SNR = e^{2 lambda},

    sum  ->  int E |x_0 - D|^2 dSNR / 2  =  int_{lambda_T}^{lambda_min} E |eps - eps_hat|^2 dlambda

since |x_0 - D|^2 = e^{-2 lambda} |eps - eps_hat|^2: the likelihood-weighted score matching loss with t drawn uniformly
in lambda, here stratified, and with |eps|^2, whose mean is known, as a control variate. The exact denoiser makes this
bound tight for every x_0, up to the two ends; with a finite chain the Gaussian p(x_s | x_t) leaves a gap that closes as
steps are added.

Errors of the mean are taken in what the network itself predicts, as in `scoresde.training.loss`: no digit is lost at
small t.

Sources: Sohl-Dickstein et al. (2015); Ho et al. (2020), section 3; Song, Meng and Ermon (2021), appendix B, for A;
Bao et al. (2022), Analytic-DPM, for v; Kingma et al. (2021), Variational diffusion models, and Song, Durkan, Murray and
Ermon (2021), Maximum likelihood training of score-based diffusion models, for continuous time.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from scoresde.chain import DDPMChain
from scoresde.checks import check_count, check_option
from scoresde.denoiser import Denoiser, check_call
from scoresde.errors import NonFiniteError
from scoresde.grid import Grid
from scoresde.likelihood.interval import degrees_of_freedom, student_interval
from scoresde.noise import SeededNoise, derive_seed, noise_source
from scoresde.sde import SDE
from scoresde.solvers.base import Solver
from scoresde.solvers.motion import legs
from scoresde.solvers.rows import forgotten
from scoresde.tableau import Tableau
from scoresde.tensors import check_batch, expand_like, widen
from scoresde.variance.denoiser import AnalyticDenoiser
from scoresde.wrappers import Wrapper

__all__ = ["Elbo", "elbo"]

Tick = Callable[[], object]

_NOISE, _TIMES = 3, 4  # streams of a seed; `sample` has 0 to 2, and x may have been drawn with the same seed


@dataclass(frozen=True)
class Elbo:
    """A lower bound on log p(x) in nats, estimated without bias: value = prior + denoising + reconstruction.

    Attributes:
        value: the bound, shape (B,).
        stderr: its standard error, shape (B,). It covers the draws of the noise, and of lambda in continuous time, for
            this very x: neither the distance to log p(x), nor the spread over the data. Its square is unbiased, or a
            little large, but uncertain where the terms are few: `interval`. NaN with draws=1.
        dof: its degrees of freedom, at least 1, shape (B,). NaN with draws=1.
        prior: minus the divergence of q(x_T | x_0) from the prior, exact, shape (B,).
        denoising: minus the sum of the steps' divergences, or the integral over lambda, shape (B,).
        reconstruction: E log p(x_0 | x_{t_1}), shape (B,); a log probability if levels were given, else a log density.
        nfe: evaluations of the denoiser that were made, each on the whole batch.
        dim: number of dimensions of a sample.
    """

    value: Tensor
    stderr: Tensor
    dof: Tensor
    prior: Tensor
    denoising: Tensor
    reconstruction: Tensor
    nfe: int
    dim: int

    @property
    def bits_per_dim(self) -> Tensor:
        """-value / (dim ln 2), shape (B,): an upper bound on the code length if levels were given. Without, that of a
        density in the units of x, which no offset has made a code length yet.
        """
        return -self.value / (self.dim * math.log(2))

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """The ends of value -+ t_{(1 + level) / 2}(dof) stderr, t(dof) the quantiles of Student's t: what covers the
        bound's mean over the draws.

        Measured for 95 %, beside value -+ 1.96 stderr, in 1 to 200 dimensions: 91 to 97 % of runs of 20 steps and 2
        draws (82 to 89 %), 92 to 96 % of 20 steps and 8 draws (91 to 95 %), 94 to 97 % of 100 steps and 2 draws (90 to
        93 %), 96 to 98 % of 64 strata (92 to 97 %). With 8 strata or fewer, or 5 steps and 2 draws, down to 80 %.

        Args:
            level: in (0, 1).

        Raises:
            ValueError: on another level.
        """
        return student_interval(self.value, self.stderr, self.dof, level)


def elbo(
    denoiser: Denoiser,
    x: Tensor,
    solver: Solver | None = None,
    grid: Grid | None = None,
    *,
    draws: int | None = None,
    seed: int | Sequence[int] | None = None,
    variance: Literal["solver", "posterior"] = "solver",
    decoder: float | None = None,
    levels: int | None = None,
    data_range: tuple[float, float] = (-1.0, 1.0),
    cond: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Elbo:
    """A lower bound on log p(x): of the chain that a solver makes on a grid, or in continuous time without both.

    Args:
        denoiser: the model.
        x: data x_0, shape (B, ...), floating point. Where the network has dropout, call net.eval() first.
        solver: one evaluation and fresh noise a step: DDPM(), DDIM(eta=1), ExponentialSDE(), EulerMaruyama(), ...
        grid: from x_T to t = 0, given with the solver. Its last step is the decoder.
        draws: of x_t for each term of a chain, by default as many as make 200 evaluations, but 2 at least. In
            continuous time, the number of strata of lambda, 64 by default, with one draw each; the reconstruction then
            takes draws / 16, at least 2.
        seed: one integer, or one for each sample; sample i is the same alone or in any batch. By default from the
            operating system.
        variance: v of a step, "solver" for c^2, or "posterior" for c^2 + b'^2 Var[x_0 | x_t] elementwise, the optimum,
            which needs a denoiser that knows its variance (Analytic-DPM). Of chains only.
        decoder: standard deviation of the decoder. By default sigma / alpha at the last noisy time, right for data that
            is smooth on that scale; but on a `DDPMChain` whose last noisy node is 1, as in DDPM's code, the square
            root of the posterior variance sigma_s^2 (1 - e^{-2h}) of its nodes 2 -> 1, whatever the grid. (On another
            grid that variance would vanish with its last step, and the bound fall without end as steps are added.)
        levels: for data of so many grey levels, the decoder's Gaussian is integrated over the bin of x: level k fills
            [lo + k Delta, lo + (k + 1) Delta], Delta = (hi - lo) / levels, and the first and last bin go on to
            infinity. x stands anywhere in its bin, best in the middle. Without levels it is a density.
        data_range: (lo, hi), what the bins fill (`scoresde.levels.outer_edges` makes it from the lowest
            and the highest level).
        cond: keyword arguments for the network.
        progress: show a progress bar.

    Returns:
        The bound and its parts, in the dtype of x (float32 where that is half precision), shape (B,).

    Raises:
        TypeError: if denoiser or solver is none.
        ValueError: before any evaluation, if the bound is minus infinity (a step without noise, of DDIM(eta=0) say),
            the table has steps of several evaluations or with memory, the grid does not end at t = 0 or has another
            SDE, x is not finite or outside the data range, or arguments contradict each other. After the first, if
            variance="posterior" and the denoiser gives none.
        NonFiniteError: if a term is not finite, with the step, the time and the samples.

    >>> from scoresde import VPSDE
    >>> from scoresde.exact import Gaussian
    >>> from scoresde.solvers import DDPM
    >>> target = Gaussian(mean=[3.0, -1.0], std=0.5)
    >>> x, sde = target.sample(4, torch.Generator().manual_seed(0)), VPSDE()
    >>> bound = elbo(target.denoiser(sde), x, DDPM(), Grid.power(sde, 50), seed=0)
    >>> bound.nfe, bool((bound.value < target.log_prob(x)).all())
    (200, True)
    """
    check_batch(x, "x")
    check_call(denoiser, x, cond)
    check_option(("solver", "posterior"), variance=variance)
    if not bool(x.isfinite().all()):
        raise ValueError("x is not finite: expected data")
    if (solver is None) != (grid is None):
        raise ValueError("give solver and grid, for the bound of a chain, or neither, for that of continuous time")
    if draws is not None:
        check_count(draws=draws)
    draw = _Draws.of(x, seed)
    x0, dtype = widen(x), widen(x).dtype
    if solver is None or grid is None:
        if variance != "solver":
            raise ValueError(f"variance={variance!r} is an option of chains: in continuous time it makes no difference")
        run: _Chain | _Continuous = _Continuous.of(denoiser.sde, draws or 64, draw)
    else:
        run = _Chain.of(denoiser, solver, grid, draws, draw, variance)
    decode = _Decoder.of(x0, run.decoder if decoder is None else decoder, levels, data_range)
    with torch.no_grad(), tqdm(desc="elbo", total=run.nfe, unit="nfe", disable=not progress, leave=False) as bar:
        terms = run.terms(denoiser, x0, decode, dict(cond or {}), bar.update)
        alpha, sigma = float(denoiser.sde.alpha(run.start)), float(denoiser.sde.sigma(run.start))
        std = denoiser.sde.prior_std_at(run.start)
        dim = x0[0].numel()
        prior = -_kl(dim, (sigma / std) ** 2, _square(x0) * (alpha / std) ** 2)
        value = prior + terms.denoising + terms.reconstruction
    return Elbo(
        value.to(dtype),
        terms.variance.sqrt().to(dtype),
        degrees_of_freedom(terms.variance, terms.doubt).to(dtype),
        prior.to(dtype),
        terms.denoising.to(dtype),
        terms.reconstruction.to(dtype),
        run.nfe,
        dim,
    )


class _Terms(NamedTuple):
    """The two random parts, the variance of their sum, and the variance of that, float64, each of shape (B,)."""

    denoising: Tensor
    reconstruction: Tensor
    variance: Tensor
    doubt: Tensor


@dataclass(frozen=True)
class _Draws:
    """The random numbers of each sample, from its seed alone."""

    noise: SeededNoise
    seeds: list[int]

    @classmethod
    def of(cls, x: Tensor, seed: int | Sequence[int] | None) -> _Draws:
        source = noise_source(x.device, x, secrets.randbits(62) if seed is None else seed, None, None)
        assert isinstance(source, SeededNoise)
        return cls(SeededNoise([derive_seed(s, _NOISE) for s in source.seeds], x.device), source.seeds)

    def uniform(self, n: int) -> Tensor:
        """Numbers in [0, 1), float64 on the host, shape (n, B)."""
        streams = [torch.Generator("cpu").manual_seed(derive_seed(s, _TIMES)) for s in self.seeds]
        return torch.stack([torch.rand(n, generator=g, dtype=torch.float64, device="cpu") for g in streams], dim=1)


@dataclass(frozen=True)
class _Decoder:
    """log p(x_0 | x_t) of N(mean, std^2), as a density or as the probability of the bin of x_0.

    Attributes:
        std: of the decoder.
        below, above: edges of the bin, less x_0, shape (B, ...); None for the density.
    """

    std: float
    below: Tensor | None = None
    above: Tensor | None = None

    @classmethod
    def of(cls, x0: Tensor, std: float, levels: int | None, data_range: tuple[float, float]) -> _Decoder:
        if isinstance(std, bool) or not isinstance(std, int | float) or not 0 < std < math.inf:
            raise ValueError(f"decoder={std!r}: expected its standard deviation, a finite number > 0")
        if levels is None:
            return cls(std)
        check_count(levels=levels)
        lo, hi = data_range
        if not (math.isfinite(lo) and math.isfinite(hi) and lo < hi):
            raise ValueError(f"data_range={data_range!r}: expected (lo, hi), two finite numbers, lo < hi")
        x, width = _float64(x0), (hi - lo) / levels
        if bool(((x - lo < -1e-6 * (hi - lo)) | (x - hi > 1e-6 * (hi - lo))).any()):
            raise ValueError(
                f"x runs from {float(x.min()):.6g} to {float(x.max()):.6g}, outside data_range={data_range!r}: give "
                "the range that the levels' bins fill"
            )
        level = ((x - lo) / width).floor().clamp(0, levels - 1)
        below = torch.where(level == 0, -math.inf, lo + level * width - x)
        above = torch.where(level == levels - 1, math.inf, lo + (level + 1) * width - x)
        return cls(std, below, above)

    def of_noise(self, relative_noise: float) -> float:
        """Minus the factor of |eps - eps_hat|^2 in the log density; 0 for the probability of a bin."""
        return 0.0 if self.below is not None else (relative_noise / self.std) ** 2 / 2

    def __call__(self, error: Tensor) -> Tensor:
        """Shape (B,), float64, for error = mean - x_0, shape (B, ...)."""
        if self.below is None or self.above is None:
            return -_square(error) / (2 * self.std**2) - error[0].numel() * math.log(self.std * math.sqrt(2 * math.pi))
        error = _float64(error)
        return _sum(_log_probability((self.below - error) / self.std, (self.above - error) / self.std))


def _log_probability(low: Tensor, high: Tensor) -> Tensor:
    """log(Phi(high) - Phi(low)), low < high, exact in both tails: the interval is turned to lie left of zero, where
    log Phi keeps its digits, and the difference is taken of the logarithms.
    """
    right = low + high > 0
    low, high = torch.where(right, -high, low), torch.where(right, -low, high)
    log_low, log_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    return log_high + torch.log(-torch.expm1(log_low - log_high))


class _Chain(NamedTuple):
    """The bound of a one-step table.

    Attributes:
        table: of R rows, the last of which is the decoder.
        a, b: a' and b' of the module's docstring, float64, shape (R,).
        A, l2: of the inference process, float64, shape (R,); 0 in the last row.
        draws, draw: of each term; where they come from.
        variance: as in `elbo`.
    """

    table: Tableau
    a: Tensor
    b: Tensor
    A: Tensor
    l2: Tensor
    draws: int
    draw: _Draws
    variance: str

    @classmethod
    def of(
        cls,
        denoiser: Denoiser,
        solver: Solver,
        grid: Grid,
        draws: int | None,
        draw: _Draws,
        variance: str,
    ) -> _Chain:
        table = _one_step_table(denoiser, solver, grid, variance)
        a, b = table.a + table.b[:, 0] * table.p, table.b[:, 0] * table.q
        C = _known_variance(denoiser, table.t) if variance == "posterior" else None
        A, l2 = _inference(grid, a, b, table.c, C)
        draws = max(2, math.ceil(200 / len(table))) if draws is None else draws
        return cls(table, a, b, A, l2, draws, draw, variance)

    @property
    def start(self) -> float:
        return float(self.table.t[0])

    @property
    def nfe(self) -> int:
        return len(self.table) * self.draws

    @property
    def decoder(self) -> float:
        """The conventional standard deviation of the decoder."""
        return decoder_std(self.table.grid.sde, float(self.table.t[-1]))

    def terms(self, denoiser: Denoiser, x0: Tensor, decode: _Decoder, cond: dict[str, Any], tick: Tick) -> _Terms:
        alpha_t, sigma_t, alpha_s, _ = self.table.grid.pairs()
        u, w = self.a, self.b
        if self.variance == "solver":
            u, w = denoiser.view_of_output(u, w, self.table.t)
        # mean of p - mean of q = u x_t + w N - A x_t - (alpha_s - A alpha_t) x_0, in x_0, eps and N
        k, m = u * alpha_t - alpha_s, (u - self.A) * sigma_t
        output, times, dim = denoiser.outputs(self.table.t), self.table.t.tolist(), x0[0].numel()
        c2, b2, l2 = (self.table.c**2).tolist(), (self.b**2).tolist(), self.l2.tolist()
        rows = []
        for i in range(len(self.table)):
            for _ in range(self.draws):
                eps = self.draw.noise(i, x0)
                x_t, var = float(alpha_t[i]) * x0 + float(sigma_t[i]) * eps, None
                if self.variance == "posterior":
                    N, var = denoiser(x_t, times[i], **cond)
                    if var is None:
                        raise ValueError(f"variance='posterior', but {denoiser!r} knows no Var[x_0 | x_t]")
                else:
                    N = output(i, x_t, cond)
                error = float(k[i]) * x0 + float(m[i]) * eps + float(w[i]) * N
                if i == len(self.table) - 1:
                    rows.append(decode(error))
                elif var is None:
                    rows.append(-_kl(dim, l2[i] / c2[i], _square(error) / c2[i]))
                else:
                    v = (c2[i] + b2[i] * _float64(var)).expand_as(error)
                    rows.append(-_sum(_kl(1, l2[i] / v, _float64(error) ** 2 / v)))
                tick()
        terms = torch.stack(rows).reshape(len(self.table), self.draws, -1)
        _check_finite(terms.sum(1), self.table.t[:, None].expand(-1, len(x0)))
        mean = terms.mean(1)
        variance = doubt = torch.full_like(mean[0], math.nan)
        if self.draws > 1:
            each = terms.var(1) / self.draws
            variance, doubt = each.sum(0), 2 * (each**2).sum(0) / (self.draws - 1)
        return _Terms(mean[:-1].sum(0), mean[-1], variance, doubt)


def _one_step_table(denoiser: Denoiser, solver: Solver, grid: Grid, variance: str) -> Tableau:
    """The solver's table, if the bound of its chain can be computed and is finite."""
    hint = "take DDPM(), DDIM(eta=1) or ExponentialSDE(), or leave solver and grid out for continuous time"
    if not isinstance(solver, Solver):
        raise TypeError(f"solver must be an instance of a solver (DDPM() say), not {solver!r}")
    if not isinstance(grid, Grid):
        raise TypeError(f"grid is {type(grid).__name__}: expected a Grid")
    grid.check_sde(denoiser.sde)
    if type(solver).tableau is Solver.tableau:
        raise ValueError(f"{solver!r} has no table, so its steps have no Gaussian density: {hint}")
    if float(grid.sde.sigma(grid.times[-1])) != 0:
        raise ValueError(
            f"the grid ends at t = {float(grid.times[-1]):.6g}, where there still is noise: the bound is of the data, "
            "so the grid must end at t = 0"
        )
    table = solver.tableau(grid)
    if len(table) != grid.steps or not torch.equal(table.t, grid.times[:-1]) or bool((table.b[:, 1:] != 0).any()):
        raise ValueError(
            f"{solver!r} has steps of several evaluations, or steps that read those before them: its p(x_s | x_t) is "
            f"no Gaussian of known mean; {hint}"
        )
    if not bool(table.evaluates.all()):
        raise ValueError(f"{solver!r} has steps that do not evaluate the denoiser: {hint}")
    still = table.c[:-1] == 0
    if variance == "solver" and bool(still.any()):
        t = float(table.t[:-1][still][0])
        raise ValueError(
            f"{solver!r} adds no noise in the step from t = {t:.6g}: p(x_s | x_t) is a point and the bound minus "
            f"infinity; {hint}, or variance='posterior' with a denoiser that knows its variance"
        )
    denoiser.check_times(table.t)
    return table


def _known_variance(denoiser: Denoiser, t: Tensor) -> Tensor | None:
    """Var[x_0 | x_t] where it is one number for every x_t, of the shape of t."""
    while isinstance(denoiser, Wrapper) and not isinstance(denoiser, AnalyticDenoiser):
        denoiser = denoiser.denoiser
    return denoiser.covariance(t) if isinstance(denoiser, AnalyticDenoiser) else None


def _inference(grid: Grid, a: Tensor, b: Tensor, c: Tensor, C: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(A, l^2) of each row: the solver's own where it has noise and costs no more than the forward posterior, as if D
    were x_0; with C = Var[x_0 | x_t], which v then has in it, the tightest.
    """
    alpha_t, sigma_t, alpha_s, sigma_s = grid.pairs()
    lands = sigma_s == 0
    if C is not None:
        # The means are (a - A) sigma_t eps + b (D - x_0) apart; E (D - x_0)^2 = C and, since D - x_0 has no correlation
        # with x_t, E eps (D - x_0) = alpha_t C / sigma_t. The divergence is least where A v = m l^2.
        v, m = c**2 + b**2 * C, a + b * alpha_t * C / sigma_t**2
        half = 2 * sigma_s**2 / (v + torch.hypot(v, 2 * m * sigma_t * sigma_s))
        return torch.where(lands, 0.0, half * m), torch.where(lands, 0.0, half * v)
    share = forgotten(grid.sde, grid.times[:-1], grid.times[1:])
    # (sigma_s / sigma_t) e^{-h} = (alpha_t / alpha_s) (sigma_s / sigma_t)^2
    markov, markov_l2 = alpha_t / alpha_s * (sigma_s / sigma_t) ** 2, sigma_s**2 * share
    own_l2 = sigma_s**2 - (a * sigma_t) ** 2

    def cost(A: Tensor, l2: Tensor) -> Tensor:
        """Twice the divergence of a dimension with D = x_0, v = c^2, but for what does not depend on A."""
        return _kl(1, l2 / c**2, ((A - a) * sigma_t / c) ** 2)

    # Where c = 0 (variance="posterior") or l^2 <= 0, the comparison is with NaN or infinity, and false.
    own = (own_l2 > 0) & (cost(a, own_l2) <= cost(markov, markov_l2) + 1e-12)
    A, l2 = torch.where(own, a, markov), torch.where(own, own_l2, markov_l2)
    return torch.where(lands, 0.0, A), torch.where(lands, 0.0, l2)


class _Continuous(NamedTuple):
    """The bound in continuous time.

    Attributes:
        sde: the SDE.
        start: where the integral begins: t_max, or, where alpha is zero there and lambda minus infinity (`FlowSDE`),
            the time with lambda = -9, as for solvers in lambda. What x_T still knows of x_0 there, |x_0|^2 times 1e-8
            nats, the prior counts: it is the exact bound of the model that starts there.
        times: one of each stratum, float64, shape (K, B).
        width: of the integral, lambda(t_min) - lambda(start).
        draw: where the noise comes from.
        decodings: draws of the reconstruction.
    """

    sde: SDE
    start: float
    times: Tensor
    width: float
    draw: _Draws
    decodings: int

    @classmethod
    def of(cls, sde: SDE, strata: int, draw: _Draws) -> _Continuous:
        start = legs(Grid(sde, [sde.t_max, sde.t_min]), free=True)[-1].t
        low, high = sde.half_log_snr(torch.tensor([start, sde.t_min], dtype=torch.float64, device="cpu")).tolist()
        share = (torch.arange(strata, dtype=torch.float64, device="cpu")[:, None] + draw.uniform(strata)) / strata
        times = sde.time_at(low + (high - low) * share).clamp(sde.t_min, start)
        return cls(sde, start, times, high - low, draw, max(2, strata // 16))

    @property
    def nfe(self) -> int:
        return len(self.times) + self.decodings

    @property
    def decoder(self) -> float:
        return _relative_noise(self.sde, self.sde.t_min)

    def terms(self, denoiser: Denoiser, x0: Tensor, decode: _Decoder, cond: dict[str, Any], tick: Tick) -> _Terms:
        last = torch.full((self.decodings, len(x0)), self.sde.t_min, dtype=torch.float64, device="cpu")
        times = torch.cat([self.times, last])
        denoiser.check_times(times.flatten())
        r, s = denoiser.affine(times)
        alpha, sigma = self.sde.alpha(times), self.sde.sigma(times)
        k, m, K = r * alpha - 1, r * sigma, len(self.times)  # D - x_0 = k x_0 + m eps + s N
        rows, excess = [], []
        for i, t in enumerate(times):
            eps = self.draw.noise(i, x0)
            N = denoiser.output(self.sde.perturb(x0, t, eps), t.to(x0.device), **cond)
            scale = (alpha[i] / sigma[i]) if i < K else torch.ones_like(t)  # to |eps - eps_hat|
            error = sum(expand_like(scale * f[i], x0) * y for f, y in ((k, x0), (m, eps), (s, N)))
            assert isinstance(error, Tensor)
            rows.append(_square(error) if i < K else decode(error))
            excess.append(_square(eps) - eps[0].numel())
            tick()
        terms, c = torch.stack(rows), torch.stack(excess)
        _check_finite(terms, times)
        strata, variance, doubt = _sum_of_strata(terms[:K], c[:K], x0[0].numel())
        beta = _share(terms[K - min(K, 4) : K].mean(0), x0[0].numel())
        decoded = terms[K:] + decode.of_noise(self.decoder) * beta * c[K:]
        step, of_decoded = self.width / K, decoded.var(0) / len(decoded)
        doubt = step**4 * doubt + 2 * of_decoded**2 / (len(decoded) - 1)
        return _Terms(-step * strata, decoded.mean(0), step**2 * variance + of_decoded, doubt)


def _share(y: Tensor, dim: int) -> Tensor:
    """The control variate's coefficient, from |eps - eps_hat|^2 of other draws: the square of the share of the noise
    that the network cannot tell, which is the best one where that is the same in every direction.
    """
    return (y / dim).clamp(0, 1) ** 2


def _sum_of_strata(y: Tensor, c: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of y = |eps - eps_hat|^2, shape (K, B), over neighbouring strata with one draw each, its variance, and
    the variance of that.

    Most of the noise of y is that of |eps|^2, where the network cannot tell it, so beta c is taken off, with c =
    |eps|^2 - dim, of mean zero, and beta from up to 8 strata at odd distances: not from its own, so no bias comes in.
    """
    K = len(y)
    lag = (torch.arange(K, device=y.device)[:, None] - torch.arange(K, device=y.device)).abs()
    near = ((lag % 2 == 1) & (lag < 8)).to(y)
    n = near.sum(1, keepdim=True).clamp(min=1)
    beta = _share(near @ y / n, dim)
    # beta_j reads y_k and beta_k reads y_j, so the terms are correlated, by 16 beta^2 / n in all at most: n partners,
    # and for each (dbeta/dy Cov(c, y))^2 = (2 sqrt(beta) / (n dim) * 2 dim sqrt(beta))^2; none where beta is cut at 1.
    shared = torch.where(beta < 1, 16 * beta**2 / n, 0.0).sum(0)
    variance, doubt = _variance_of_strata(y - beta * c)
    return (y - beta * c).sum(0), variance + shared, doubt


def _variance_of_strata(y: Tensor) -> tuple[Tensor, Tensor]:
    """Variance of the sum of y, shape (K, B), one draw in each of K neighbouring strata, from second differences: a
    slope of the mean from stratum to stratum cancels in them, a bend makes the result too large, not too small. And the
    variance of that, each difference counting as one normal number.
    """
    K = len(y)
    if K == 1:
        return torch.full_like(y[0], math.nan), torch.full_like(y[0], math.nan)
    if K == 2:
        variance = y.diff(dim=0)[0] ** 2
        return variance, 2 * variance**2
    each = y.diff(n=2, dim=0) ** 2 * K / (6 * (K - 2))
    # Differences one and two apart have correlations of -2/3 and 1/6, their squares of 4/9 and 1/36.
    together = 1 + 2 * (4 / 9 * (K - 3) + 1 / 36 * max(0, K - 4)) / (K - 2)
    return each.sum(0), 2 * together * (each**2).sum(0)


def _check_finite(terms: Tensor, times: Tensor) -> None:
    """Raises NonFiniteError for terms that are not finite, with their times on the host, both of shape (R, B)."""
    if bool(terms.isfinite().all()):
        return
    bad = ~terms.isfinite().cpu()
    row = int(bad.any(1).nonzero()[0])
    samples: list[int] = bad[row].nonzero().flatten().tolist()
    time = float(times[row, samples[0]])
    shown = ", ".join(map(str, samples[:8])) + (f", ... ({len(samples)} in all)" if len(samples) > 8 else "")
    raise NonFiniteError(
        f"the bound's term {row}, at t = {time:.6g}, is not finite for sample{'s' * (len(samples) > 1)} {shown}",
        row,
        time,
        samples,
    )


def _kl(dim: int, ratio: Any, square: Tensor) -> Tensor:
    """KL(q | p) of Gaussians: ratio = var_q / var_p in each dimension, square = |mean_p - mean_q|^2 / var_p."""
    excess = ratio - 1
    log = torch.log1p(excess) if isinstance(excess, Tensor) else math.log1p(excess)
    return (dim * (excess - log) + square) / 2


def decoder_std(sde: SDE, t: float) -> float:
    """The decoder's standard deviation, by the rule of `elbo`, of a chain whose last noisy time is t."""
    if isinstance(sde, DDPMChain) and sde.steps > 1 and t == 1:
        one = torch.ones(1, dtype=torch.float64, device="cpu")
        return float(sde.sigma(one) * forgotten(sde, 2 * one, one).sqrt())
    return _relative_noise(sde, t)


def _relative_noise(sde: SDE, t: float) -> float:
    """sigma / alpha, the standard deviation of x_0 given x_t alone."""
    return float((-sde.half_log_snr(t)).exp())


def _float64(x: Tensor) -> Tensor:
    """x in float64, in float32 on a device that has none."""
    return x if x.device.type == "mps" else x.double()


def _sum(x: Tensor) -> Tensor:
    """Over each sample, shape (B,), in float64."""
    return _float64(x.reshape(len(x), -1)).sum(1)


def _square(x: Tensor) -> Tensor:
    return _sum(_float64(x) ** 2)
