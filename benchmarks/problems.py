"""The problems of the race: a denoiser, where the solvers start, and how far from the truth they end.

Endpoint race. Every solver starts from the same x_T at t_max and stops at t = `end`, where noise is left, so that no
final jump to sigma = 0 hides its error. The truth is the probability-flow map: closed for a Gaussian, else by a
Runge-Kutta method of order 8 on z = x / sqrt(alpha^2 + sigma^2), which obeys

    dz / dlambda = a D(x, t) - a^2 z,     a = alpha / sqrt(alpha^2 + sigma^2),  lambda = log(alpha / sigma)

The error is rms |x - x*| / sqrt(d). Law race. Solvers that draw noise have no endpoint to miss: they run to t = 0 and
the law of their samples is compared with the data's. For Gaussian data D is affine in x, hence so is every sampler in
(x_T, z_1, z_2, ...), and its law follows exactly from its responses to unit impulses in each of them.

A denoiser that is in steps (integer time labels) has no such map but in the limit of its chain: its truth is UniPC of
order 4 on all nodes of a chain, or on 1000 steps.
"""

from __future__ import annotations

import hashlib
import math
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.integrate import DOP853
from torch import Tensor
from tqdm import tqdm

from scoresde import SDE, VPSDE, Denoiser, Grid, Posterior, sample
from scoresde.auditing.bench import smooth_images
from scoresde.continuity import in_steps
from scoresde.data.arrays import ARRAYS, read_arrays
from scoresde.exact import Gaussian, GaussianMixture
from scoresde.metrics import frechet_distance
from scoresde.report import attribute
from scoresde.solvers import UniPC
from scoresde.tensors import as_time

Draws = Callable[[int, Tensor], Tensor]
"""Where a solver's noise comes from, called as draws(row, x): standard normal of the shape of x."""

Run = Callable[[Tensor, Draws], Tensor]
"""A solver on a grid: (x_T, draws) to the state at the grid's end."""

GRIDS: dict[str, Callable[..., Grid]] = {
    "uniform": Grid.uniform,
    "quadratic": Grid.quadratic,
    "log-SNR": Grid.log_snr,
    "Karras 7": Grid.karras,
    "power 4": Grid.power,
    "power 5": partial(Grid.power, power=5.0),
    # Solvers' own, and not raced by default:
    "power 1.5": partial(Grid.power, power=1.5),
    "power 2": partial(Grid.power, power=2.0),
    "power 2.5": partial(Grid.power, power=2.5),
    "power 3": partial(Grid.power, power=3.0),
    "Karras 3": partial(Grid.karras, rho=3.0),
}


def make_grid(name: str, sde: SDE, steps: int, end: float, last: float) -> Grid:
    """The grid of that name from t_max to `end`; where end = 0, spacings that cannot reach it have their last noisy
    time at `last`.
    """
    options = {"last": last} if end == 0 and name not in ("uniform", "quadratic") else {}
    return GRIDS[name](sde, steps, end=end, **options)


def spacing_of(grid: Grid) -> str | None:
    """The name of the spacing whose grid to t = 0 this is: how a solver's own choice carries over to another end."""
    for name in GRIDS:
        for make in (GRIDS[name], lambda sde, steps, name=name: make_grid(name, sde, steps, 0.0, sde.t_min)):
            try:
                same = make(grid.sde, grid.steps)
            except ValueError:
                continue
            if torch.allclose(same.times, grid.times, rtol=1e-9, atol=0):
                return name
    return None


class Normals:
    """Seeded normal draws for the whole batch."""

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, row: int, x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=self.generator, dtype=x.dtype, device=x.device)


class Impulses:
    """Draw j is one in sample 3 + j and zero elsewhere: with `start` as x_T, sample 0 answers to nothing, sample 1 to a
    unit x_T, sample 2 to a double one, sample 3 + j to a unit z_j.
    """

    def __init__(self) -> None:
        self.count = 0

    def start(self, shape: tuple[int, ...], draws: int, std: float) -> Tensor:
        x = torch.zeros(3 + draws, *shape, dtype=torch.float64)
        x[1], x[2] = std, 2 * std
        return x

    def __call__(self, row: int, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        if 3 + self.count >= len(x):
            raise ValueError(f"{self.count + 1} draws, but the batch has room for {len(x) - 3}")
        z[3 + self.count] = 1.0
        self.count += 1
        return z

    @staticmethod
    def law(answers: Tensor) -> tuple[Tensor, Tensor] | None:
        """Mean and standard deviation of the output; None where it is not affine in x_T."""
        mean, response = answers[0], answers[1:] - answers[0]
        if not torch.allclose(response[1], 2 * response[0], rtol=1e-6, atol=1e-6):
            return None
        return mean, torch.cat([response[:1], response[2:]]).square().sum(0).sqrt()


class Problem(ABC):
    """A denoiser with a truth.

    Attributes:
        name, title: what a person types, and what the table says.
        sde, denoiser: the model; its samples have shape `shape`.
        x: x_T of the endpoint race, shape (B, *shape).
        end: t at which the endpoint race stops.
        last: last noisy time of grids that jump to t = 0 from there.
        law: what the law race measures, in words; None if there is none.
        repeats: how many further draws the winners of the law race are measured on again; 0 where it has no chance in
            it, or takes the user's time.
    """

    name: str
    title: str
    law: str | None = None
    repeats: int = 0
    end: float = 1e-3
    last: float = 1e-3
    sde: SDE
    denoiser: Denoiser
    x: Tensor

    @abstractmethod
    def endpoint(self) -> tuple[Tensor, float]:
        """The exact flow of x to `end`, and an estimate of its own error, rms per sqrt(d)."""

    @abstractmethod
    def law_distance(self, run: Run, nfe: int, seed: int = 2) -> float:
        """The distance between the law of a solver's samples at t = 0 and the data's."""

    @abstractmethod
    def law_floor(self) -> float:
        """What `law_distance` would give the data itself."""

    def error(self, run: Run) -> float:
        """rms |x - x*| / sqrt(d) of a solver's end state; infinite where it is not finite."""
        return rms(run(self.x, Normals(1, self.x.device)) - self.endpoint()[0])


def rms(difference: Tensor) -> float:
    value = float(difference.double().square().mean().sqrt())
    return value if math.isfinite(value) else math.inf


class GaussianProblem(Problem):
    """N(0, C), d = 64, the eigenvalues of C spaced evenly in their logarithm from 1e-3 to 1."""

    name = "gaussian"
    title = "Gaussian, d = 64, eigenvalues 1e-3 to 1"
    law = "W2 / sqrt(d), exact where the solver is affine in its noise"
    draws = 4096  # samples for a solver that is not

    def __init__(self, samples: int = 256, sde: SDE | None = None, end: float = 1e-3) -> None:
        self.sde, self.end = sde or VPSDE(), end
        self.std = torch.logspace(-3, 0, 64, dtype=torch.float64).sqrt()
        self.target = Gaussian(torch.zeros(64), std=self.std)
        self.denoiser = self.target.denoiser(self.sde)
        self.x = self.sde.prior((samples, 64), torch.Generator().manual_seed(0), torch.float64)

    def endpoint(self) -> tuple[Tensor, float]:
        return self.target.flow(self.x, self.sde, self.sde.t_max, self.end), 0.0

    def law_distance(self, run: Run, nfe: int, seed: int = 2) -> float:
        impulses = Impulses()
        try:
            law = impulses.law(run(impulses.start((64,), 4 * nfe + 4, self.sde.prior_std), impulses))
        except (ArithmeticError, ValueError):  # a norm of zero, or as many draws as it likes
            law = None
        if law is None:
            generator = torch.Generator().manual_seed(seed)
            x = run(self.sde.prior((self.draws, 64), generator, torch.float64), Normals(seed + 1))
            law = x.mean(0), x.std(0)
        return rms(torch.cat([law[0], law[1] - self.std])) * math.sqrt(2)

    def law_floor(self) -> float:
        return 0.0


class MixtureProblem(Problem):
    """A mixture of isotropic Gaussians.

    Args:
        means: (K, *event).
        std: of every component.
        samples: of the endpoint race.
        draws: samples of the law race.
        turns: in the plane, the mixture is the same after a turn by 2 pi / turns, and in a mirror.
        seed: of x_T; another than that of the means, if they are random, or x_T is the noise that they were made of.
    """

    def __init__(
        self,
        name: str,
        title: str,
        means: Tensor,
        std: float,
        samples: int,
        draws: int,
        turns: int = 1,
        seed: int = 0,
        sde: SDE | None = None,
        end: float = 1e-3,
    ) -> None:
        self.name, self.title, self.turns = name, title, turns
        self.sde, self.end = sde or VPSDE(), end
        self.target = GaussianMixture(means, std=std)
        self.denoiser = IsotropicMixture(means, std, self.sde)
        self.shape, self.draws = tuple(means.shape[1:]), draws
        self.means, self.std = means.reshape(len(means), -1), std
        self.x = self.sde.prior((samples, *self.shape), torch.Generator().manual_seed(seed), torch.float64)
        if self.shape == (2,):
            self.law, self.repeats = f"sliced W2, {draws} samples", 16
        else:
            self.repeats = 4
            self.law = f"root Frechet distance / sqrt(d) within components, {draws} samples"

    @cached_property
    def _truth(self) -> tuple[Tensor, float]:
        return fine_flow(self.denoiser, self.x, self.sde.t_max, self.end, cache=self.name)

    def endpoint(self) -> tuple[Tensor, float]:
        return self._truth

    def _exact(self, seed: int, n: int) -> Tensor:
        return self.target.sample(n, torch.Generator().manual_seed(seed), torch.float64)

    @cached_property
    def _to_truth(self) -> Callable[[Tensor], float]:
        """The distance of a batch to exact samples."""
        if self.shape == (2,):
            exact = sorted_projections(self._exact(4, 16 * self.draws), self.turns)
            quantiles = exact.reshape(-1, 16, exact.shape[1]).mean(1)
            return lambda x: rms(sorted_projections(x, self.turns) - quantiles)

        def within_components(x: Tensor) -> float:
            # About the nearest mean: N(0, s^2 I), for which the distance is |s' - s|. The shares of the components are
            # not looked at: those of a few hundred samples are noise. One number can be right by luck: s' crosses s.
            flat, means = x.reshape(len(x), -1), self.means
            nearest = (flat @ means.T - means.square().sum(1) / 2).argmax(1)
            return abs(rms(flat - means[nearest]) - self.std)

        return within_components

    def law_distance(self, run: Run, nfe: int, seed: int = 2) -> float:
        generator = torch.Generator().manual_seed(seed)
        x = run(self.sde.prior((self.draws, *self.shape), generator, torch.float64), Normals(seed + 1))
        return self._to_truth(x) if bool(x.isfinite().all()) else math.inf

    def law_floor(self) -> float:
        return float(np.mean([self._to_truth(self._exact(10 + i, self.draws)) for i in range(8)]))


class IsotropicMixture(Denoiser):
    """The denoiser of an equal-weight mixture with covariances s^2 I by inner products alone: `GaussianMixture` without
    the (B, K, d) differences. With S = alpha^2 s^2 + sigma^2, means m_k and x taken from their centre,

        r_k ~ exp((alpha x.m_k - alpha^2 |m_k|^2 / 2) / S),   D = (sigma^2 / S) sum_k r_k m_k + (alpha s^2 / S) x
    """

    def __init__(self, means: Tensor, std: float, sde: SDE) -> None:
        self.sde, self.std = sde, std
        flat = means.double().reshape(len(means), -1)
        self.centre = flat.mean(0)
        self.means = flat - self.centre
        self.squares = self.means.square().sum(1)

    def posterior(self, x: Tensor, t: Any, /, **cond: Any) -> Posterior:
        return Posterior(self._parts(x, t)[0])

    def mean_and_trace(self, x: Tensor, t: Any) -> tuple[Tensor, Tensor]:
        """D, and tr dD/dx = alpha s^2 n / S + alpha (sigma / S)^2 (sum_k r_k |m_k|^2 - |sum_k r_k m_k|^2), (B,)."""
        mean, r, centre = self._parts(x, t)
        t = as_time(t).double().reshape(-1)
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        S = (alpha * self.std) ** 2 + sigma**2
        spread = r @ self.squares - centre.square().sum(1)
        return mean, alpha * self.std**2 / S * x[0].numel() + alpha * (sigma / S) ** 2 * spread

    def _parts(self, x: Tensor, t: Any) -> tuple[Tensor, Tensor, Tensor]:
        """D, r (B, K) and sum_k r_k m_k (B, n)."""
        t = as_time(t).double().reshape(-1, 1)
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        S = (alpha * self.std) ** 2 + sigma**2
        y = x.double().reshape(len(x), -1) - alpha * self.centre
        r = torch.softmax((alpha * (y @ self.means.T) - alpha**2 * self.squares / 2) / S, dim=1)
        of_means = r @ self.means
        mean = self.centre + (sigma**2 / S) * of_means + (alpha * self.std**2 / S) * y
        return mean.reshape(x.shape).to(x.dtype), r, of_means


class Counted(Denoiser):
    """Another denoiser, with a count of its calls and of backward passes through it."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser, self.sde, self.calls, self.backward = denoiser, denoiser.sde, 0, 0

    def posterior(self, x: Tensor, t: Any, /, **cond: Any) -> Posterior:
        self.calls += 1
        mean, var = self.denoiser.posterior(x, t, **cond)
        if mean.requires_grad:
            mean.register_hook(self._count)
        return Posterior(mean, var)

    def _count(self, gradient: Tensor) -> None:
        self.backward += 1


class UserProblem(Problem):
    """Somebody's own denoiser.

    Args:
        denoiser: a scoresde `Denoiser`.
        shape: of one sample.
        data: samples of the truth, (N, *shape), or None: then there is only the endpoint race.
        features: a function of a batch to (B, F), in which the Frechet distance is taken.
        samples, batch: number of samples, and how many the network takes at a time.
        end: t at which the endpoint race stops, and last noisy time of the law race's grids; by default, or None, where
            the half log-SNR is that of the standard VP SDE at 1e-3.
        rtol: of the fine reference; the state is float32, as in use.
        budget: evaluations that the reference may make.
    """

    name = "user"

    def __init__(
        self,
        denoiser: Denoiser,
        shape: tuple[int, ...],
        data: Tensor | None,
        features: Callable[[Tensor], Tensor],
        *,
        samples: int,
        batch: int,
        end: float | None = None,
        device: str = "cpu",
        rtol: float = 1e-6,
        budget: int = 5000,
    ) -> None:
        self.title = f"{denoiser!r}, samples of shape {tuple(shape)}"
        self.sde, self.denoiser, self.features, self.device = denoiser.sde, denoiser, features, device
        self.shape, self.data, self.samples, self.batch, self.rtol = tuple(shape), data, samples, batch, rtol
        self.end = self.last = end_of(self.sde) if end is None else end
        self.budget = budget
        self.x = self.sde.prior((batch, *shape), torch.Generator().manual_seed(11)).to(device)  # data often have seed 0
        if data is not None:
            self.law = f"Frechet distance, {samples} samples against {len(data)}"

    @cached_property
    def _truth(self) -> tuple[Tensor, float]:
        times = [self.sde.t_max, self.end]
        found, _ = in_steps(self.denoiser, self.x, self.sde.t_max, times, None, self.budget)
        if found:
            print(f"{found}: the reference is UniPC(4, view='v') on all nodes, or 1000 steps", file=sys.stderr)
            return table_flow(self.denoiser, self.x, self.end)
        return fine_flow(self.denoiser, self.x, *times, rtol=self.rtol, budget=self.budget)

    def endpoint(self) -> tuple[Tensor, float]:
        return self._truth

    def _features(self, x: Tensor) -> Tensor:
        return torch.cat([self.features(part).detach().cpu() for part in x.split(self.batch)])

    @cached_property
    def _data_features(self) -> Tensor:
        assert self.data is not None
        return self._features(self.data)

    def law_distance(self, run: Run, nfe: int, seed: int = 2) -> float:
        x_T = self.sde.prior((self.samples, *self.shape), torch.Generator().manual_seed(seed))
        draws = Normals(seed + 1, self.device)
        found = torch.cat([self._features(run(part.to(self.device), draws)) for part in x_T.split(self.batch)])
        return frechet_distance(found, self._data_features) if bool(found.isfinite().all()) else math.inf

    def law_floor(self) -> float:
        """Data against data: `samples` of them (half, if there are too few) against the rest."""
        order = torch.randperm(len(self._data_features), generator=torch.Generator().manual_seed(0))
        n = min(self.samples, len(order) // 2)
        return frechet_distance(self._data_features[order[:n]], self._data_features[order[n:]])


def end_of(sde: SDE) -> float:
    """The time, a node of a chain, at which the half log-SNR is that of the standard VP SDE at 1e-3."""
    t = max(sde.t_min, float(sde.time_at(VPSDE().half_log_snr(1e-3))))
    return float(sde.snapped(torch.tensor([t], dtype=torch.float64)))


def table_flow(denoiser: Denoiser, x: Tensor, s: float, steps: int = 1000) -> tuple[Tensor, float]:
    """The map of x from t_max to s of a denoiser that is in steps, by a table on as many steps or all nodes of a chain,
    and the rms difference from the same on half of them.
    """
    sde, solver = denoiser.sde, UniPC(4, view="v")
    most = int(min(steps, sde.most_steps - math.ceil(s)))
    fine, coarse = (
        sample(denoiser, x, solver, grid=Grid.power(sde, n, end=s), progress=True).x for n in (most, max(1, most // 2))
    )
    return fine, rms(fine - coarse)


def fine_flow(
    denoiser: Denoiser,
    x: Tensor,
    t: float,
    s: float,
    *,
    rtol: float = 1e-12,
    cache: str | None = None,
    budget: float = math.inf,
) -> tuple[Tensor, float]:
    """The probability-flow map of x from t to s by DOP853 in lambda (the module's docstring), and its own error: the
    rms difference from the same at 100 times the tolerance. To s = 0 it is D at sigma / alpha = 1e-7, whose error is of
    the order of that square over the variance of the data's finest detail.

    Args:
        rtol: relative and absolute tolerance.
        cache: a name; with it, the result is kept in the temporary directory.
        budget: evaluations at most, those of both.

    Raises:
        ArithmeticError: if it ran out.
    """
    sde, store = denoiser.sde, None
    if cache is not None:
        key = hashlib.sha256(x.cpu().numpy().tobytes() + repr((sde, t, s, rtol, torch.__version__)).encode())
        store = Path(tempfile.gettempdir()) / f"scoresde-{cache}-{key.hexdigest()[:16]}.pt"
        if store.exists():
            found: tuple[Tensor, float] = torch.load(store)
            return found

    def radius(time: Tensor) -> Tensor:
        return torch.hypot(sde.alpha(time), sde.sigma(time))

    def derivative(lam: float, z: np.ndarray) -> np.ndarray:
        time = sde.time_at(torch.tensor(lam, dtype=torch.float64)).clamp(max=sde.t_max)
        if bar.n >= budget:
            raise ArithmeticError(
                f"the reference took {bar.n} evaluations and has come to t = {float(time):.4g} on its way from {t:g} "
                f"to {s:g}: is the denoiser continuous in time, and precise enough for the tolerance {rtol:g}?"
            )
        bar.update()
        r = radius(time)
        a = float(sde.alpha(time) / r)
        at = (torch.from_numpy(z).reshape(x.shape) * r).to(x.device, x.dtype)
        D = denoiser(at, time).mean.double().cpu().reshape(-1).numpy()
        return a * D - a**2 * z

    def solve(tolerance: float) -> Tensor:
        low = sde.time_at(torch.tensor(-math.log(1e-7), dtype=torch.float64)) if s == 0 else s
        ends = torch.tensor([t, float(low)], dtype=torch.float64)
        lam, r = sde.half_log_snr(ends).tolist(), radius(ends)
        z = (x.double().cpu() / r[0]).reshape(-1).numpy()
        method = DOP853(derivative, lam[0], z, lam[1], rtol=tolerance, atol=tolerance)
        while method.status == "running":
            if message := method.step():
                raise ArithmeticError(f"the fine reference failed at lambda = {method.t}: {message}")
        near = torch.from_numpy(method.y).reshape(x.shape) * r[1]
        return denoiser(near.to(x.device, x.dtype), low).mean.double().cpu() if s == 0 else near

    with torch.no_grad(), tqdm(desc="reference", unit="nfe", leave=False) as bar:
        coarse, fine = solve(100 * rtol), solve(rtol)
    result = fine.to(x.device, x.dtype), rms(fine - coarse)
    if store is not None:
        torch.save(result, store)
    return result


def sorted_projections(x: Tensor, turns: int) -> Tensor:
    """The samples (n, 2) and their images under turns by 2 pi / turns and the mirror y -> -y, projected on directions
    of the plane, sorted: (2 turns n, 32 / turns). The rms difference of two such is the sliced W2.

    A solver without a preferred direction has the symmetry of its model and its prior: the images are samples of the
    same law. They take away what would be most of the noise, the random shares of the modes. For the same reason the
    directions need to cover one sector only.
    """
    directions = 32 // turns
    x = torch.cat([x.double(), x.double() * torch.tensor([1.0, -1.0])])
    angle = (torch.arange(directions, dtype=torch.float64) + 0.5) * (math.pi / turns / directions)
    step = 2 * math.pi / turns * torch.arange(turns, dtype=torch.float64)
    along = angle[:, None] - step  # x turned by step on angle is x on angle - step
    projected = x @ torch.stack([along.cos(), along.sin()]).flatten(1)
    turned = projected.reshape(len(x), directions, turns).transpose(1, 2)
    return turned.reshape(-1, directions).sort(0).values


def ring(**where: Any) -> Problem:
    angle = torch.arange(8, dtype=torch.float64) * (2 * math.pi / 8)
    means = torch.stack([angle.cos(), angle.sin()], 1)
    return MixtureProblem(
        "ring", "ring of 8 Gaussians in 2-D, radius 1, std 0.1", means, 0.1, 512, 4096, turns=8, **where
    )


def grid(**where: Any) -> Problem:
    axis = torch.linspace(-1, 1, 5, dtype=torch.float64)
    means = torch.cartesian_prod(axis, axis)
    return MixtureProblem(
        "grid", "grid of 5 x 5 Gaussians in 2-D, spacing 0.5, std 0.05", means, 0.05, 512, 4096, turns=4, **where
    )


def images(**where: Any) -> Problem:
    """64 components of std 0.1 around smooth images: white noise with the spectrum of photographs, amplitude
    ~ 1 / frequency, scaled to pixel std 0.5.
    """
    means = smooth_images(64, seed=0, power=1.0)
    title = "64 Gaussians around smooth images, d = 3072, std 0.1"
    return MixtureProblem("images", title, means, 0.1, 64, 64, seed=11, **where)


EXACT: dict[str, Callable[..., Problem]] = {"gaussian": GaussianProblem, "ring": ring, "grid": grid, "images": images}


# --- what a user names -----------------------------------------------------------------------------------------------


def user_data(text: str) -> Tensor:
    """The array of a file, or that module:attribute is, or makes; float32."""
    if text.endswith(ARRAYS):
        return read_arrays(Path(text))[0].float()
    array = attribute("--data", text)[0]
    return torch.as_tensor(array() if callable(array) and not isinstance(array, Tensor | np.ndarray) else array).float()
