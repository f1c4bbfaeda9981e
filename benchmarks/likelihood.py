"""Log-densities by the ODE against exact ones: error, network calls and wall time, beside the classical procedure.

    python benchmarks/likelihood.py
    python benchmarks/likelihood.py --problems ring --fast --out runs/likelihood

The data are known, and with them everything that the ODE meets. With alpha, sigma at the time where it starts, t_min,

    truth            log p_t(alpha x) + dim log alpha, p_t the exact marginal
    tr dD/dx         (alpha / sigma^2) sum Var[x_0 | x_t], the variance elementwise
    fine run         the ODE and the integral of that trace by DOP853 in lambda: neither probes nor steps

from which the error of a result has three parts:

    gap              fine run - truth: the prior is not the marginal at t_max. The same for all methods
    discretisation   the same method, given the exact trace, - fine run
    probes           result - the same method, given the exact trace

To give a method the exact trace, its denoiser is replaced by one of the same values whose derivative is (tr dD/dx / n)
times the identity: one Rademacher probe then is exact (`ExactTrace`).

The classical procedure, from the description in Song et al. (2021): the state of the whole batch and its log-densities
as one vector on the host, scipy's RK45 in t from t_min to t_max, rtol = atol = 1e-5, a call of the network for the
drift and another for its divergence, by one probe that is kept all along. "torchdiffeq" is its dopri5 in t on the same
vector, with the exact trace. All in float64, the network too.

Written into --out: README.md, results.json, error.png.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torchdiffeq
from kept import small
from problems import EXACT, IsotropicMixture, MixtureProblem
from scipy.integrate import DOP853, solve_ivp
from scipy.stats import binomtest
from torch import Tensor
from tqdm import tqdm

from scoresde import VPSDE, Denoiser, Posterior
from scoresde.exact import Gaussian, GaussianMixture
from scoresde.info import environment
from scoresde.likelihood import Divergence, log_prob
from scoresde.nn import UNet
from scoresde.noise import SeededNoise
from scoresde.report import table, write_json
from scoresde.solvers import Solver, UniPC
from scoresde.solvers.runge_kutta import RungeKutta
from scoresde.tensors import as_time, expand_like

STEPS = [20, 32, 40, 60, 68, 100]
PROBES = [1, 4, 16]
COVERED: list[tuple[str, dict[str, Any]]] = [
    ("40 steps", {"steps": 40}),
    ("100 steps", {"steps": 100}),
    ("adaptive, 0.001", {"rtol": 1e-3, "atol": 1e-3}),
]
CANDIDATES: dict[str, Solver] = {
    'UniPC(3, view="v", variable="half_log_snr")': UniPC(3, view="v", variable="half_log_snr"),
    'UniPC(4, view="v", variable="half_log_snr")': UniPC(4, view="v", variable="half_log_snr"),
    'UniPC(2, view="v", variable="half_log_snr")': UniPC(2, view="v", variable="half_log_snr"),
    'UniPC(4, view="v")': UniPC(4, view="v"),
    'UniPC(3, view="v")': UniPC(3, view="v"),
    'UniPC(3, view="flow")': UniPC(3, view="flow"),
    "UniPC(3)": UniPC(3),
    "UniPC(4)": UniPC(4),
    'RungeKutta("rk4", "angle")': RungeKutta("rk4", "angle"),
}
LOW = 64  # dimensions up to which the exact divergence is taken too


# --- problems --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A model whose density is known, and data.

    Attributes:
        name, title: what a person types, and what the page says.
        target: the data's law.
        denoiser: what is timed; the target's, fast.
        x: data, shape (B, *event).
        rtol: of the fine run.
    """

    name: str
    title: str
    target: GaussianMixture
    denoiser: Denoiser
    x: Tensor
    rtol: float

    @property
    def dim(self) -> int:
        return self.x[0].numel()

    @cached_property
    def noise_free(self) -> ExactTrace:
        return ExactTrace(self.target, self.denoiser)

    @cached_property
    def truth(self) -> Tensor:
        """The density of the data in the noise of t_min, in nats, (B,)."""
        x, residual, t = start_of(self.denoiser, self.x)
        return self.target.log_prob(x, sde=self.denoiser.sde, t=t) + residual

    @cached_property
    def fine(self) -> tuple[Tensor, float]:
        """The ODE's density, (B,), and its largest difference from the same at 100 times the tolerance."""
        fine, coarse = (fine_log_prob(self.noise_free, self.x, rtol) for rtol in (self.rtol, 100 * self.rtol))
        return fine, float((fine - coarse).abs().max())


def start_of(denoiser: Denoiser, x: Tensor) -> tuple[Tensor, float, float]:
    """Data as the state at t_min, the dim log alpha that this adds to the density, and t_min."""
    t = denoiser.sde.t_min
    alpha = float(denoiser.sde.alpha(torch.tensor(t, dtype=torch.float64)))
    return alpha * x, x[0].numel() * math.log(alpha), t


def case(name: str, samples: int) -> Case:
    """The problem of that name with so many draws of its data. The Gaussian's covariance is turned: along its own axes
    the derivative of D is diagonal, for which Rademacher probes are exact.
    """
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    data = torch.Generator().manual_seed(1)
    if name == "gaussian":
        basis, sde = torch.linalg.qr(draw(64, 64))[0], VPSDE()
        target = Gaussian(torch.zeros(64), cov=basis * torch.logspace(-3, 0, 64, dtype=torch.float64) @ basis.T)
        title = "Gaussian, d = 64, eigenvalues 1e-3 to 1 in a random basis"
        return Case(name, title, target, target.denoiser(sde), target.sample(samples, data, torch.float64), 1e-11)
    problem = EXACT[name]()
    assert isinstance(problem, MixtureProblem)
    x = problem.target.sample(samples, data, torch.float64)
    return Case(name, problem.title, problem.target, problem.denoiser, x, 1e-11 if x[0].numel() <= LOW else 1e-9)


class ExactTrace(Denoiser):
    """D as it is, its derivative replaced by (tr dD/dx / n) times the identity: probes v_i = +-1 find the
    exact trace.
    """

    def __init__(self, target: GaussianMixture, denoiser: Denoiser) -> None:
        self.exact, self.fast, self.sde = target.denoiser(denoiser.sde), denoiser, denoiser.sde

    def mean_and_trace(self, x: Tensor, t: Any) -> tuple[Tensor, Tensor]:
        """D and tr dD/dx, (B, ...) and (B,)."""
        if isinstance(self.fast, IsotropicMixture):
            return self.fast.mean_and_trace(x, t)
        mean, var = self.exact.posterior(x, t)
        assert var is not None
        t = as_time(t).double().reshape(-1)
        return mean, self.sde.alpha(t) / self.sde.sigma(t) ** 2 * var.flatten(1).sum(1)

    def posterior(self, x: Tensor, t: Any, /, **cond: Any) -> Posterior:
        mean, trace = self.mean_and_trace(x.detach(), t)
        return Posterior(mean + expand_like(trace / x[0].numel(), x) * (x - x.detach()))


class Priced(Denoiser):
    """Another denoiser's values and derivatives, at the price of a U-Net of 32 channels (float32) besides."""

    def __init__(self, denoiser: Denoiser, channels: int) -> None:
        self.denoiser, self.sde = denoiser, denoiser.sde
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = UNet(channels, 32).eval().requires_grad_(False)

    def posterior(self, x: Tensor, t: Any, /, **cond: Any) -> Posterior:
        time = as_time(t).float().reshape(-1).expand(len(x))
        return Posterior(self.denoiser.posterior(x, t).mean + 0.0 * self.net(x.float(), time).to(x.dtype))


def fine_log_prob(denoiser: ExactTrace, x: Tensor, rtol: float) -> Tensor:
    """log p(x), (B,), by DOP853 in lambda for the state z = x / r, r^2 = alpha^2 + sigma^2, a = alpha / r:

    dz = a (D - a z) dlambda,    log |det dz_T / dz| = int (a r tr dD/dx - a^2 dim) dlambda
    """
    sde, (B, dim) = denoiser.sde, x.flatten(1).shape
    x, residual, t_min = start_of(denoiser, x)

    def radius(t: Tensor) -> Tensor:
        return torch.hypot(sde.alpha(t), sde.sigma(t))

    def rate(lam: float, y: np.ndarray) -> np.ndarray:
        t = sde.time_at(torch.tensor(lam, dtype=torch.float64)).clamp(max=sde.t_max)
        r = radius(t)
        a, z = sde.alpha(t) / r, torch.from_numpy(y[: B * dim]).reshape(B, dim)
        D, trace = denoiser.mean_and_trace((z * r).reshape(x.shape), t)
        return torch.cat([(a * (D.reshape(B, dim) - a * z)).flatten(), a * r * trace - a**2 * dim]).numpy()

    ends = torch.tensor([t_min, sde.t_max], dtype=torch.float64)
    lam, r = sde.half_log_snr(ends).tolist(), radius(ends)
    start = torch.cat([x.flatten() / r[0], x.new_zeros(B)]).numpy()
    solution = solve_ivp(rate, lam, start, DOP853, rtol=rtol, atol=rtol, t_eval=lam[1:])
    if not solution.success:
        raise ArithmeticError(f"the fine run failed: {solution.message}")
    y = torch.from_numpy(solution.y[:, -1])
    x_T = (y[: B * dim] * r[1]).reshape(x.shape)
    return sde.prior_log_prob(x_T) + y[B * dim :] + dim * float((r[1] / r[0]).log()) + residual


# --- methods ---------------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """What a run gives: log-densities (B,), network calls, the stated errors if any, and the stated 95 % interval."""

    value: Tensor
    nfe: int
    stderr: Tensor | None = None
    error: Tensor | None = None
    interval: tuple[Tensor, Tensor] | None = None


def classical(denoiser: Denoiser, x: Tensor, seed: int, rtol: float = 1e-5) -> Found:
    """The classical procedure, see the module. Its start alone is ours, alpha x: the truth then is the same."""
    sde, shape, size = denoiser.sde, x.shape, x.numel()
    x, residual, t_min = start_of(denoiser, x)
    probe = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).to(x.dtype) * 2 - 1

    def drift(x: Tensor, t: Tensor) -> Tensor:
        f, g = expand_like(sde.drift(t), x), expand_like(sde.diffusion(t), x)
        return f * x - g**2 / 2 * denoiser.score(x, t)

    def rate(t: float, y: np.ndarray) -> np.ndarray:
        state = torch.from_numpy(y[:size].reshape(shape).copy())
        times = torch.full((len(state),), t, dtype=torch.float64)
        with torch.no_grad():
            dx = drift(state, times)
        with torch.enable_grad():
            state.requires_grad_()
            (gradient,) = torch.autograd.grad((drift(state, times) * probe).sum(), state)
        return torch.cat([dx.flatten(), (gradient * probe).flatten(1).sum(1)]).numpy()

    start = torch.cat([x.flatten(), x.new_zeros(len(x))]).numpy()
    solution = solve_ivp(rate, (t_min, sde.t_max), start, method="RK45", rtol=rtol, atol=rtol)
    if not solution.success:
        raise ArithmeticError(f"the classical procedure failed: {solution.message}")
    y = torch.from_numpy(solution.y[:, -1])
    return Found(sde.prior_log_prob(y[:size].reshape(shape)) + y[size:] + residual, 2 * solution.nfev)


def plain(denoiser: Denoiser, x: Tensor, seed: int, rtol: float) -> Found:
    """torchdiffeq's dopri5 in t, its own norm and first step, with the exact trace."""
    sde, shape = denoiser.sde, x.shape
    x, residual, t_min = start_of(denoiser, x)
    trace, calls = Divergence("exact"), 0

    def rate(t: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        t = t.clamp(max=sde.t_max)  # it steps over the end
        f, half = sde.drift(t), sde.diffusion(t) ** 2 / 2
        state = y[:, :-1].reshape(shape)
        if isinstance(denoiser, ExactTrace):
            D, tr = denoiser.mean_and_trace(state, t)
        else:
            found = trace(lambda z: denoiser(z, t).mean, state, state.new_empty(0, *shape))
            D, tr = found.N, found.trace
        alpha, sigma2, dim = sde.alpha(t), sde.sigma(t) ** 2, state[0].numel()
        dx = f * state - half * (alpha * D - state) / sigma2
        return torch.cat([dx.flatten(1), (f * dim - half * (alpha * tr - dim) / sigma2)[:, None]], 1)

    start = torch.cat([x.flatten(1), x.new_zeros(len(x), 1)], 1)
    ends = torch.tensor([t_min, sde.t_max], dtype=torch.float64)
    y = torchdiffeq.odeint(rate, start, ends, rtol=rtol, atol=rtol, method="dopri5")[-1]
    return Found(sde.prior_log_prob(y[:, :-1].reshape(shape)) + y[:, -1] + residual, calls)


def ours(denoiser: Denoiser, x: Tensor, seed: int | Sequence[int], **options: Any) -> Found:
    found = log_prob(denoiser, x, seed=seed, **options)
    assert found.status == "complete"
    return Found(found.value, found.nfe, found.stderr, found.error, found.interval())


@dataclass(frozen=True)
class Method:
    """A way to a log-density.

    Attributes:
        name, probes: as the page says it; probes 0 for the exact divergence.
        run: (denoiser, x, seed) to what is found.
        options: of `log_prob`, or of `classical`.
    """

    name: str
    probes: int
    run: Callable[..., Found]
    options: dict[str, Any] = field(default_factory=dict)
    divergence: str = "hutchinson"

    def __call__(self, denoiser: Denoiser, x: Tensor, seed: Any) -> Found:
        trace: dict[str, Any] = {}
        if self.run is ours:
            trace = {"divergence": self.divergence, "probes": self.probes} if self.probes else {"divergence": "exact"}
        return self.run(denoiser, x, seed, **trace, **self.options)

    def noise_free(self, case: Case) -> Found:
        """The same with the exact trace."""
        return self.run(case.noise_free, case.x, 0, **self.options)


CLASSICAL = Method("classical", 1, classical)
COARSE = 1e-3


def methods(dim: int, steps: Sequence[int], probes: Sequence[int]) -> list[Method]:
    found = [CLASSICAL, Method(f"classical, {COARSE:g}", 1, classical, {"rtol": COARSE})]
    kinds = [*probes, 0] if dim <= LOW else [*probes]
    found += [Method(f"{n} steps", k, ours, {"steps": n}) for n in steps for k in kinds]
    few = [k for k in kinds if k in (0, 1, 4)]
    found += [Method("adaptive", k, ours) for k in few]
    found += [Method(f"adaptive, {COARSE:g}", k, ours, {"rtol": COARSE, "atol": COARSE}) for k in few]
    if dim <= LOW:
        found += [Method(f"torchdiffeq, {rtol:g}", 0, plain, {"rtol": rtol}) for rtol in (COARSE, 1e-5)]
    return found


# --- measuring -------------------------------------------------------------------------------------------------------


class Quantiles(NamedTuple):
    """Of |error|, in nats."""

    median: float
    q95: float
    max: float

    @classmethod
    def of(cls, error: Tensor) -> Quantiles:
        error = error.abs().double().flatten()
        return cls(float(error.median()), float(error.quantile(0.95)), float(error.max()))


@dataclass(frozen=True)
class Row:
    """A method on a case.

    Attributes:
        calls: of the network, median over turns.
        total, discretisation, probe: parts of the error, see the module.
        stderr, error: medians of what the method itself says of its probes and of its discretisation; NaN if nothing.
        seconds, ratio: wall time, and that over the classical procedure's, medians over turns.
    """

    method: str
    probes: int
    calls: int
    total: Quantiles
    discretisation: Quantiles
    probe: Quantiles
    stderr: float
    error: float
    seconds: float
    ratio: float


def timed(method: Method, denoiser: Denoiser, x: Tensor, seed: int) -> tuple[Found, float]:
    start = time.perf_counter()
    found = method(denoiser, x, seed)
    return found, time.perf_counter() - start


def measure(case: Case, raced: Sequence[Method], turns: int, tick: Callable[[str], Any]) -> list[Row]:
    """All methods in every turn, each turn with probes of its own; warmed up before."""
    for method in (raced[0], raced[-1], raced[2]):
        method(case.denoiser, case.x[:2], 0)
    runs: list[list[tuple[Found, float]]] = [[] for _ in raced]
    for turn in range(turns):
        for method, done in zip(raced, runs, strict=True):
            tick(f"{case.name} {method.name}")
            done.append(timed(method, case.denoiser, case.x, 1000 * turn))
    fine, noise_free, rows = case.fine[0], dict[str, Tensor](), []
    for method, done in zip(raced, runs, strict=True):
        if method.name not in noise_free:
            noise_free[method.name] = method.noise_free(case).value
        value = torch.stack([found.value for found, _ in done])
        free = noise_free[method.name] if method.probes else value
        seconds = [s for _, s in done]
        rows.append(
            Row(
                method.name,
                method.probes,
                round(statistics.median(found.nfe for found, _ in done)),
                Quantiles.of(value - case.truth),
                Quantiles.of(free - fine),
                Quantiles.of(value - free),
                _median([found.stderr for found, _ in done]),
                _median([found.error for found, _ in done]),
                statistics.median(seconds),
                statistics.median(s / c for s, (_, c) in zip(seconds, runs[0], strict=True)),
            )
        )
    return rows


def _median(said: Sequence[Tensor | None]) -> float:
    """NaN where nothing was said."""
    known = [value for value in said if value is not None]
    return float(torch.stack(known).median()) if known else math.nan


@dataclass(frozen=True)
class Coverage:
    """How often the stated 95 % interval covers the same method's noise-free value, the fine run's, and the truth.

    Attributes:
        samples, repetitions: each repetition has seeds of its own.
        own, fine, truth: shares; `low` and `high` are the ends of the 99.9 % interval of `own` (Clopper and Pearson).
        plain: of value +- 1.96 stderr, which takes the stated standard error to be certain, as `own`.
        ratio: rms error from probes over the rms standard error that was stated.
        width: median of the interval's half over 1.96 times the rms error from probes.
        half: mean of that half, in nats.
    """

    method: str
    dim: int
    probes: int
    samples: int
    repetitions: int
    own: float
    fine: float
    truth: float
    low: float
    high: float
    plain: float
    ratio: float
    width: float
    half: float

    @property
    def excepted(self) -> bool:
        """One probe in two dimensions, of which there are two in all."""
        return self.dim == 2 and self.probes == 1

    @property
    def holds(self) -> bool:
        return self.low <= 0.97 and self.high >= 0.93


def coverage(case: Case, method: Method, samples: int, repetitions: int) -> Coverage:
    """Over repetitions with seeds of their own, in batches."""
    part = Case(case.name, case.title, case.target, case.denoiser, case.x[:samples], case.rtol)
    own, found = method.noise_free(part).value, []
    at_once = max(1, 2**21 // (samples * case.dim * max(1, method.probes)))
    for first in range(0, repetitions, at_once):
        count = min(at_once, repetitions - first)
        seeds = range(10**6 + first * samples, 10**6 + (first + count) * samples)
        got = method(part.denoiser, part.x.repeat(count, *[1] * (part.x.ndim - 1)), list(seeds))
        assert got.stderr is not None
        assert got.interval is not None
        found.append(torch.stack([got.value, got.stderr, *got.interval]).reshape(4, count, samples))
    value, stderr, low, high = torch.cat(found, 1)

    def covered(target: Tensor) -> Tensor:
        return ((low <= target) & (target <= high)).double().mean(0)

    of_probes = float((value - own).square().mean().sqrt())
    fine, truth = case.fine[0][:samples], case.truth[:samples]
    hits, runs = round(float(covered(own).sum()) * repetitions), samples * repetitions
    ends = binomtest(hits, runs).proportion_ci(0.999)
    return Coverage(
        method.name,
        case.dim,
        method.probes,
        samples,
        repetitions,
        own=hits / runs,
        fine=float(covered(fine).mean()),
        truth=float(covered(truth).mean()),
        low=float(ends.low),
        high=float(ends.high),
        plain=float(((value - own).abs() <= 1.96 * stderr).double().mean()),
        ratio=of_probes / float(stderr.square().mean().sqrt()),
        width=float((high - low).median()) / 2 / (1.96 * of_probes),
        half=float((high - low).mean()) / 2,
    )


@dataclass(frozen=True)
class Coupling:
    """What a sample added to the batch does to 16 others: largest change in nats, calls without and with it."""

    added: str
    method: str
    change: float
    alone: int
    together: int


def couplings(case: Case, steps: int) -> list[Coupling]:
    """Added to 16 samples of the ring: one near its centre, where the flow turns fast, or one far away."""
    x, found = case.x[:16], []
    for added, point in (("near the centre", [0.01, 0.003]), ("at distance 50", [50.0, 0.0])):
        more = torch.cat([x, torch.tensor([point], dtype=x.dtype)])
        for method in (CLASSICAL, Method("adaptive", 1, ours), Method(f"{steps} steps", 1, ours, {"steps": steps})):
            # The classical probes have one seed: the first of a larger draw are those of the smaller one.
            seeds: list[Any] = [0, 0] if method.run is classical else [list(range(n)) for n in (len(x), len(more))]
            alone, together = method(case.denoiser, x, seeds[0]), method(case.denoiser, more, seeds[1])
            change = float((alone.value - together.value[: len(x)]).abs().max())
            found.append(Coupling(added, method.name, change, alone.nfe, together.nfe))
    return found


class Tight(NamedTuple):
    """The exact divergence to the last digits: the largest difference from the fine run, and the calls."""

    problem: str
    method: str
    error: float
    calls: int


def tight(case: Case) -> list[Tight]:
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("dopri5, rtol = atol = 1e-9", {"rtol": 1e-9, "atol": 1e-9}),
        ("dopri8, rtol = atol = 1e-9", {"rtol": 1e-9, "atol": 1e-9, "method": "dopri8"}),
        ("1000 steps", {"steps": 1000}),
    ]
    found = []
    for name, options in kinds:
        got = ours(case.denoiser, case.x, 0, divergence="exact", **options)
        found.append(Tight(case.name, name, float((got.value - case.fine[0]).abs().max()), got.nfe))
    return found


class Choice(NamedTuple):
    """A solver on a case: the quantiles of its discretisation error, with its own grid."""

    solver: str
    problem: str
    calls: int
    error: Quantiles


def choices(case: Case, counts: Sequence[int]) -> list[Choice]:
    """All `CANDIDATES` at each number of calls, of which those with stages take as many steps as fit."""
    found = []
    for name, solver in CANDIDATES.items():
        for calls in counts:
            steps = calls // 4 if isinstance(solver, RungeKutta) else calls
            value = ours(case.noise_free, case.x, 0, solver=solver, steps=steps).value
            found.append(Choice(name, case.name, calls, Quantiles.of(value - case.fine[0])))
    return found


class Sketched(NamedTuple):
    """Hutch++ beside Hutchinson with as many products: the rms error from probes, and the ratio of times."""

    problem: str
    probes: int
    hutchinson: float
    sketched: float
    time: float


def sketches(case: Case, samples: int, turns: int) -> list[Sketched]:
    """On images, and on derivatives that are given: 512 dimensions, eigenvalues i^-a."""
    found, draw = [], torch.Generator().manual_seed(0)
    part = replace(case, x=case.x[:samples])
    own = Method("", 1, ours, {"steps": 48}).noise_free(part).value
    for probes in (3, 6, 12, 24):
        errors, seconds = [], []
        for kind in ("hutchinson", "hutch++"):
            method = Method("", probes, ours, {"steps": 48}, kind)
            runs = [timed(method, part.denoiser, part.x, turn) for turn in range(turns)]
            errors.append(float(torch.stack([run.value - own for run, _ in runs]).square().mean().sqrt()))
            seconds.append(statistics.median(s for _, s in runs))
        found.append(Sketched("images, 48 steps", probes, *errors, seconds[1] / seconds[0]))
    i = torch.arange(1, 513, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(512, 512, generator=draw, dtype=torch.float64))[0]
    for power in (0.5, 1, 2, 4):
        J, x = (basis * i**-power) @ basis.T, torch.zeros(400, 512, dtype=torch.float64)
        for probes in (6, 24):
            errors, seconds = [], []
            for kind in ("hutchinson", "hutch++"):
                trace, noise = Divergence(kind, probes), SeededNoise(list(range(len(x))), torch.device("cpu"))
                v, start = trace.draw(x, noise), time.perf_counter()
                off = trace(lambda y, J=J: y @ J, x, v).trace - J.trace()
                seconds.append(time.perf_counter() - start)
                errors.append(float(off.square().mean().sqrt()))
            found.append(Sketched(f"eigenvalues i^-{power:g}", probes, *errors, seconds[1] / seconds[0]))
    return found


def priced(case: Case, raced: Sequence[Method], samples: int, turns: int) -> list[dict[str, Any]]:
    """Wall time over the first method's where each call costs a U-Net's besides, medians over turns."""
    denoiser, x = Priced(case.denoiser, case.x.shape[1]), case.x[:samples]
    ours(denoiser, x, 0, steps=4, probes=2)
    runs = [[timed(method, denoiser, x, turn) for method in raced] for turn in range(turns)]
    rows = []
    for i, method in enumerate(raced):
        calls = round(statistics.median(run[i][0].nfe for run in runs))
        ratio = statistics.median(run[i][1] / run[0][1] for run in runs)
        rows.append({"method": method.name, "probes": method.probes, "calls": calls, "ratio": ratio})
    return rows


# --- targets ---------------------------------------------------------------------------------------------------------


@dataclass
class Results:
    """Everything that was measured, by problem."""

    cases: dict[str, Case] = field(default_factory=dict)
    rows: dict[str, list[Row]] = field(default_factory=dict)
    coverage: dict[str, list[Coverage]] = field(default_factory=dict)
    coupling: list[Coupling] = field(default_factory=list)
    tight: list[Tight] = field(default_factory=list)
    choice: list[Choice] = field(default_factory=list)
    sketched: list[Sketched] = field(default_factory=list)
    priced: list[dict[str, Any]] = field(default_factory=list)


class Target(NamedTuple):
    text: str
    measured: str
    met: bool


def targets(results: Results) -> Iterator[Target]:
    """The targets that the problems that were run can decide."""
    if rows := results.rows.get("images"):
        yield from _of_images(rows, results.priced)
    for name in ("ring", "grid"):
        if rows := results.rows.get(name):
            tables = [r for r in rows if r.probes == 0 and r.calls <= 68 and r.method.endswith("steps")]
            for what in ("median", "q95", "max"):
                best = min(tables, key=lambda r, what=what: getattr(r.discretisation, what))  # type: ignore[misc]
                value = getattr(best.discretisation, what)
                label = {"median": "median", "q95": "95 % quantile", "max": "maximum"}[what]
                text = f"{name}: discretisation error <= 1e-3 nats with at most 68 calls, {label}"
                yield Target(text, f"{number(value)} at {best.calls} calls", value <= 1e-3)
    for name in ("ring", "grid"):
        if found := [t for t in results.tight if t.problem == name]:
            text = f"{name}: exact divergence to 1e-6 in float64, maximum over samples"
            best_tight = min(found, key=lambda t: t.error)
            measured = "; ".join(f"{t.method}: {number(t.error)}" for t in found)
            yield Target(text, measured, best_tight.error <= 1e-6)
    for name, covered in results.coverage.items():
        for c in covered:
            text = f"{name}: the stated 95 % interval covers 93 to 97 %, or some of this is in the 99.9 % interval of "
            text += f"the share, {c.method}, {probed(c.probes)}" + ", excepted" * c.excepted
            measured = f"{100 * c.own:.1f} % ({100 * c.low:.1f} to {100 * c.high:.1f}) of {c.samples * c.repetitions}"
            yield Target(text, measured, c.holds)
    for name in ("ring", "grid"):
        if rows := results.rows.get(name):
            mine = next(r for r in rows if r.method == f"adaptive, {COARSE:g}" and r.probes == 0)
            peer = next(r for r in rows if r.method == "torchdiffeq, 1e-05")
            other = next(r for r in rows if r.method == f"torchdiffeq, {COARSE:g}")
            text = (
                f"{name}: adaptive with the exact trace to {COARSE:g}, 95 % of the errors at most those of torchdiffeq "
            )
            text += "(dopri5 in t) to the same, with at most 1.5 times its calls"
            measured = f"{number(mine.discretisation.q95)} at {mine.calls}, {number(other.discretisation.q95)} at "
            measured += f"{other.calls} ({number(peer.discretisation.q95)} at {peer.calls} to 1e-5)"
            good = mine.discretisation.q95 <= other.discretisation.q95 and mine.calls <= 1.5 * other.calls
            yield Target(text, measured, good)


def _of_images(rows: Sequence[Row], priced: Sequence[dict[str, Any]]) -> Iterator[Target]:
    base = rows[0].total.median
    tables = [r for r in rows if r.method.endswith("steps")]
    within = [r for r in tables if r.calls <= 60]
    single = min((r for r in within if r.probes == 1), key=lambda r: r.total.median)
    text = f"images: the classical median error, {number(base)} at {rows[0].calls} calls, with at most 60"
    measured = f"{number(single.total.median)} at {single.calls} calls, one probe"
    if good := [r for r in within if r.total.median <= base]:
        least = min(good, key=lambda r: (r.calls, r.probes))
        measured += f"; fewest calls {least.calls}, {probed(least.probes)}: {number(least.total.median)}"
    yield Target(text, measured, bool(good))
    half = min((r for r in tables if r.total.median <= base / 2), key=lambda r: r.ratio, default=None)
    text = "images: half that error in less wall time, the network itself costing next to nothing"
    if half is None:
        lowest = min(tables, key=lambda r: r.total.median)
        yield Target(text, f"no table has it: lowest {number(lowest.total.median)} at {lowest.calls} calls", False)
        return
    measured = f"{number(half.total.median)}, {half.method}, {probed(half.probes)}: {half.ratio:.2f} of its time"
    yield Target(text, measured, half.ratio < 1)
    medians = {(r.method, r.probes): r.total.median for r in rows}
    with_net = [p for p in priced[1:] if medians[p["method"], p["probes"]] <= base / 2]
    if with_net:
        p = min(with_net, key=lambda p: p["ratio"])
        text = "images: half that error in less wall time, the network costing a U-Net's call"
        median = number(medians[p["method"], p["probes"]])
        yield Target(
            text, f"{median}, {p['method']}, {probed(p['probes'])}: {p['ratio']:.2f} of its time", p["ratio"] < 1
        )


# --- the page --------------------------------------------------------------------------------------------------------


number = partial(small, decimals=1, plain=(1e-2, 1e3))


def probed(probes: int) -> str:
    return "exact" if probes == 0 else f"{probes} probe{'s' if probes > 1 else ''}"


def of_case(case: Case, rows: Sequence[Row]) -> list[str]:
    fine, own = case.fine
    gap = Quantiles.of(fine - case.truth)
    head = ["method", "trace", "calls", "total: median", "95 %", "max", "discretisation: median", "95 %", "max"]
    head += ["probes: median", "95 %", "stated stderr", "stated error", "seconds", "time / classical"]
    lines = [f"## {case.title}", ""]
    lines += [f"{len(case.x)} samples. Gap of the prior: median {number(gap.median)}, maximum {number(gap.max)} nats."]
    lines[-1] += f" The fine run's own error is {number(own)}."
    cells = []
    for r in rows:
        parts = (*r.total, *r.discretisation, *r.probe[:2], r.stderr, r.error, r.seconds)
        shown = [number(v) for v in parts]
        cells.append([r.method, probed(r.probes), r.calls, *shown, f"{r.ratio:.2f}"])
    return [*lines, "", *table(head, cells), ""]


def of_targets(results: Results) -> list[str]:
    rows = [[t.text, t.measured, "met" if t.met else "**not met**"] for t in targets(results)]
    return ["## Targets", "", *table(["target", "measured", ""], rows), ""]


def of_coverage(results: Results) -> list[str]:
    head = ["problem", "method", "trace", "samples x repetitions", "covers its own noise-free value", "99.9 % interval"]
    head += ["the fine run", "the truth", "its own, +- 1.96 stderr", "rms error / rms stderr", "half width"]
    head += ["mean half, nats"]
    rows = []
    for name, found in results.coverage.items():
        for c in found:
            shares = [f"{100 * share:.1f} %" for share in (c.own, c.fine, c.truth, c.plain)]
            shares.insert(1, f"{100 * c.low:.1f} to {100 * c.high:.1f} %")
            numbers = [f"{c.ratio:.2f}", f"{c.width:.2f}", number(c.half)]
            rows.append([name, c.method, probed(c.probes), f"{c.samples} x {c.repetitions}", *shares, *numbers])
    text = "`LogProb.interval()`, value -+ t(dof) stderr with Student's t, is to cover 95 %. stderr and dof are of the"
    text += " probes alone: where the discretisation or the prior's gap is not small beside them, fewer intervals reach"
    text += " the fine run and the truth. Half width: the median interval's, in 1.96 times the rms error from probes."
    return ["## What the standard error covers", "", text, "", *table(head, rows), ""]


def of_choice(found: Sequence[Choice]) -> list[str]:
    counts = sorted({c.calls for c in found})
    problems = list(dict.fromkeys(c.problem for c in found))
    errors = {(c.solver, c.problem, c.calls): c.error for c in found}
    lines = ["## The default solver of a table", ""]
    text = "Discretisation errors on each solver's own grid, over the least of all here, on the worst of the problems"
    text += f" ({', '.join(problems)}), by the number of calls. Mean: geometric, over the numbers of calls."
    lines += [text, ""]
    for what, label in (("median", "median"), ("q95", "95 % quantile"), ("max", "maximum")):
        rows = []
        for solver in CANDIDATES:
            worst = [
                max(
                    getattr(errors[solver, p, n], what) / min(getattr(errors[s, p, n], what) for s in CANDIDATES)
                    for p in problems
                )
                for n in counts
            ]
            mean = math.exp(statistics.fmean(math.log(w) for w in worst))
            rows.append([f"`{solver}`", *(f"{w:.1f}" for w in worst), f"{mean:.1f}"])
        lines += [f"{label}:", "", *table(["solver", *map(str, counts), "mean"], rows), ""]
    return lines


def of_sketches(found: Sequence[Sketched]) -> list[str]:
    rows = []
    for s in found:
        ratios = f"{s.sketched / s.hutchinson:.2f}", f"{s.time:.2f}"
        rows.append([s.problem, s.probes, number(s.hutchinson), number(s.sketched), *ratios])
    text = "The rms error from probes, with as many products: Hutch++ is the better one where the derivative, less a"
    text += " multiple of the identity, has few large directions, as that of images between modes has."
    head = ["derivative", "probes", "Hutchinson", "Hutch++", "ratio", "time, ratio"]
    return ["## Where Hutch++ is the better", "", text, "", *table(head, rows), ""]


def of_coupling(found: Sequence[Coupling]) -> list[str]:
    rows = [[c.added, c.method, number(c.change), c.alone, c.together] for c in found]
    text = "16 samples of the ring, and the same 16 with a seventeenth, one probe each."
    head = ["the seventeenth", "method", "largest change of the 16, nats", "calls, 16", "calls, 17"]
    return ["## What one stiff sample does to the others", "", text, "", *table(head, rows), ""]


def of_priced(found: Sequence[dict[str, Any]], samples: int) -> list[str]:
    rows = [[p["method"], probed(p["probes"]), p["calls"], f"{p['ratio']:.2f}"] for p in found]
    text = (
        f"d = 3072, {samples} sample(s), medians of turns: the same values, but every call runs a U-Net of 32 channels"
    )
    text += " too, and its derivative where one is taken."
    return [
        "## Wall time with a network that costs",
        "",
        text,
        "",
        *table(["method", "trace", "calls", "time / classical"], rows),
        "",
    ]


INK = {1: "#0072B2", 2: "#56B4E9", 4: "#009E73", 16: "#CC79A7"}  # Okabe and Ito
CLASSICAL_INK = "#D55E00"


def plot(path: Path, results: Results) -> bool:
    """Error against calls, a panel a problem. False where there is no matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(2, len(results.rows))
    lines = -(-len(results.rows) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5.4 * columns, 4.1 * lines), squeeze=False)
    for axis in axes.flat[len(results.rows) :]:
        axis.set_visible(False)
    for axis, (name, rows) in zip(axes.flat, results.rows.items(), strict=False):
        case = results.cases[name]
        tables = [r for r in rows if r.method.endswith("steps")]
        first = min(r.probes or 10**9 for r in tables)
        curve = [r for r in tables if r.probes == first]
        floor = 1e-9
        axis.plot(
            [r.calls for r in curve],
            [max(floor, r.discretisation.median) for r in curve],
            "k--",
            label="table, discretisation alone",
        )
        for probes in sorted({r.probes for r in tables if r.probes}):
            found = [r for r in tables if r.probes == probes]
            label = f"table, {probed(probes)}"
            axis.plot(
                [r.calls for r in found], [r.total.median for r in found], "o-", ms=4, color=INK[probes], label=label
            )
            if found := [r for r in rows if r.method == "adaptive" and r.probes == probes]:
                label, ink = f"adaptive, {probed(probes)}", INK[probes]
                axis.plot([r.calls for r in found], [r.total.median for r in found], "^", ms=7, color=ink, label=label)
        old = [r for r in rows if r.method.startswith("classical")]
        label = "classical, tolerance 1e-5 and 1e-3"
        axis.plot([r.calls for r in old], [r.total.median for r in old], "s", ms=8, color=CLASSICAL_INK, label=label)
        gap = Quantiles.of(case.fine[0] - case.truth).median
        axis.axhline(gap, color="0.5", linestyle=":", linewidth=1.2, label="gap of the prior")
        axis.set(xscale="log", yscale="log")
        ticks = [16, 32, 64, 128, 256]
        axis.set_xticks(ticks, [str(n) for n in ticks])
        axis.minorticks_off()
        axis.set_title(case.title, fontsize=9, loc="left")
        axis.grid(color="0.92", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("network calls")
    for axis in axes[:, 0]:
        axis.set_ylabel("median |error| of log p, nats")
    handles = {label: h for axis in axes.flat for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    below = 0.27 * -(-len(handles) // 3) / figure.get_figheight()  # inches a line of the legend
    figure.tight_layout(rect=(0, below, 1, 1))
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def report(results: Results, args: argparse.Namespace) -> str:
    env = environment("cpu", torch.float64)
    page = [
        "# Log-densities against exact ones",
        "",
        f"`python {env['command']}`: {env['device']}, {env['threads']} thread(s),",
    ]
    page[-1] += f" float64, medians of {args.turns} turns with probes of their own; torch {env['torch']}; commit"
    page[-1] += f" {env['commit']}."
    page += ["", INTRODUCTION, "", *of_targets(results), "## What the numbers show", ""]
    page += [line for said in reading(results) for line in (said, "")]
    if plot(args.out / "error.png", results):
        page += ["![error against network calls](error.png)", ""]
    for name, rows in results.rows.items():
        page += of_case(results.cases[name], rows)
    page += of_priced(results.priced, args.priced_samples) if results.priced else []
    page += of_coverage(results) if results.coverage else []
    page += of_choice(results.choice) if results.choice else []
    page += of_sketches(results.sketched) if results.sketched else []
    page += of_coupling(results.coupling) if results.coupling else []
    text = "\n".join(page)
    (args.out / "README.md").write_text(text)
    record = {
        "environment": env,
        "targets": [t._asdict() for t in targets(results)],
        "problems": {name: [_plain(row) for row in rows] for name, rows in results.rows.items()},
        "coverage": {name: [asdict(c) for c in found] for name, found in results.coverage.items()},
        "coupling": [asdict(c) for c in results.coupling],
        "tight": [t._asdict() for t in results.tight],
        "choice": [{**c._asdict(), "error": c.error._asdict()} for c in results.choice],
        "sketched": [s._asdict() for s in results.sketched],
        "priced": results.priced,
    }
    write_json(args.out / "results.json", _rounded(record))
    return text


INTRODUCTION = """\
Errors in nats. Their parts: the gap of the prior, the same for all methods; the discretisation, that is, the method's
own steps with the exact trace; the probes. Total is all three, against the exact density. A call that also gives its
derivatives along the probes counts once; the classical procedure makes two calls for each evaluation of its ODE, one
with derivative. "classical" is its published tolerance 1e-5, and "classical, 0.001" a looser one; "steps" are
tables, "adaptive" has rtol = atol = 1e-5 or 1e-3. The denoisers are closed formulas that cost next to nothing: seconds
are what the procedures themselves take, the drawing of probes above all, and with a U-Net they are another matter."""


def reading(results: Results) -> list[str]:
    """What the numbers show, in words."""
    said = []
    for name in ("images", "gaussian"):
        if rows := results.rows.get(name):
            old = rows[0]
            single = min((r for r in rows if r.probes == 1 and r.calls <= 60), key=lambda r: r.total.median)
            said.append(
                f"d = {results.cases[name].dim}: the classical error is its one probe's ({number(old.probe.median)} of "
                f"{number(old.total.median)} nats in the median; {number(old.discretisation.median)} are its steps'). "
                "The probe being kept all along, its error never averages out. A table draws new ones at every "
                f"evaluation: with one probe and {single.calls} calls for {old.calls}, {number(single.total.median)}. "
                "More probes divide their part by the square root of their number, at no call more; below about 48 "
                "steps it is the discretisation that is left."
            )
    for name in ("ring", "grid"):
        if rows := results.rows.get(name):
            finest = max((r for r in rows if r.method.endswith("steps") and r.probes == 0), key=lambda r: r.calls)
            part = finest.discretisation
            said.append(
                f"{name}: {finest.calls} steps with the exact trace, which costs two products here, are off by "
                f"{number(part.median)} in the median, {number(part.q95)} at the 95 % quantile and {number(part.max)} "
                "at most. The maximum is of samples between components, where the flow turns late and fast: no fixed "
                f"grid knows of them, an adaptive run does. {classical_steps(rows)}"
                + (" (Along these axes the derivative is diagonal: all probes are exact.)" if name == "grid" else "")
            )
    if any(not c.excepted for each in results.coverage.values() for c in each):
        found = [c for each in results.coverage.values() for c in each]
        spans = [c.own for c in found if not c.excepted]
        plain = [c.plain for c in found if not c.excepted]
        said.append(
            f"The stated 95 % intervals cover {100 * min(spans):.1f} to {100 * max(spans):.1f} %, one probe in two "
            f"dimensions excepted. value +- 1.96 stderr covers {100 * min(plain):.1f} to {100 * max(plain):.1f} %: the "
            "standard error is an estimate itself, from the same probes, and uncertain where few evaluations carry "
            "most of the variance. How uncertain the products tell too, as degrees of freedom, and Student's t makes "
            "the interval wider for it. In two dimensions there are two different Rademacher probes in all, and one "
            "states "
            f"{', '.join(f'{100 * c.own:.1f} %' for c in found if c.excepted)}: from two on the trace is exact there."
        )
    if missed := [t for t in targets(results) if not t.met]:
        said.append("Falls short: " + "; ".join(f"{t.text} ({t.measured})" for t in missed) + ".")
    return said


def classical_steps(rows: Sequence[Row]) -> str:
    """What the classical procedure's own steps are off by, with the exact trace."""
    parts = [(r.discretisation, r.calls) for r in rows if r.method.startswith("classical")]
    said = [f"{number(q.median)} in the median and {number(q.max)} at most with {calls} calls" for q, calls in parts]
    return f"The classical procedure's own steps are off by {', or '.join(said)}."


def _plain(row: Row) -> dict[str, Any]:
    parts = {name: getattr(row, name)._asdict() for name in ("total", "discretisation", "probe")}
    return {**vars(row), **parts}


def _rounded(thing: Any) -> Any:
    """Numbers to four digits."""
    if isinstance(thing, dict):
        return {key: _rounded(value) for key, value in thing.items()}
    if isinstance(thing, list):
        return [_rounded(value) for value in thing]
    return float(f"{thing:.4g}") if isinstance(thing, float) else thing


# --- the command -----------------------------------------------------------------------------------------------------

NAMES = ["ring", "grid", "gaussian", "images"]


def run(args: argparse.Namespace) -> Results:
    results = Results()
    samples = {"ring": 256, "grid": 256, "gaussian": 64, "images": 16}
    for name in args.problems:
        results.cases[name] = case(name, 8 if args.fast else samples[name])
    raced = {name: methods(c.dim, args.steps, PROBES[:2] if args.fast else PROBES) for name, c in results.cases.items()}
    with tqdm(total=sum(map(len, raced.values())) * args.turns, unit="run", smoothing=0.05) as bar:

        def tick(text: str) -> None:
            bar.set_postfix_str(text[:32])
            bar.update()

        for name, found in results.cases.items():
            results.rows[name] = measure(found, raced[name], args.turns, tick)
        for name in ("ring", "gaussian", "images"):
            if name in results.cases:
                bar.set_postfix_str(f"coverage, {name}")
                many, few = case(name, args.covered), name == "ring"
                results.coverage[name] = [
                    coverage(many, Method(label, k, ours, options), args.covered, args.repetitions)
                    for label, options in COVERED
                    for k in ((1,) if few or (name == "images" and not options.get("steps")) else (1, 2, 4))
                ]
        for name in ("ring", "grid"):
            if name in results.cases:
                results.tight += tight(results.cases[name])
        for name, found in results.cases.items():
            bar.set_postfix_str(f"choice, {name}")
            results.choice += choices(found, args.steps)
        if "images" in results.cases:
            results.sketched = sketches(results.cases["images"], 4 if args.fast else 16, 1 if args.fast else 6)
        if "ring" in results.cases:
            results.coupling = couplings(results.cases["ring"], 48)
        if "images" in results.cases:
            bar.set_postfix_str("with a U-Net")
            choice = [m for m in raced["images"] if m.name == "40 steps" and m.probes <= 4]
            entered = [CLASSICAL, *choice[: 1 if args.fast else None]]
            results.priced = priced(results.cases["images"], entered, args.priced_samples, 1 if args.fast else 3)
    return results


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", choices=NAMES, default=NAMES, help=f"({' '.join(NAMES)})")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/likelihood"), help="folder of results")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=None, help="of timing, each with probes of its own (2)")
    parser.add_argument("--fast", action="store_true", help="few samples, steps, turns and repetitions: a look")
    args = parser.parse_args(argv)
    args.problems = [name for name in NAMES if name in args.problems]
    args.turns = args.turns or (1 if args.fast else 2)
    args.steps = STEPS[2:4] if args.fast else STEPS
    args.covered, args.repetitions = (8, 2) if args.fast else (100, 10)
    args.priced_samples = 1
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    print(report(run(args), args))


if __name__ == "__main__":
    main()
