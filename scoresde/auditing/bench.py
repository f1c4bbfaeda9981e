"""The problems that a sampler is audited on, and what was found of it so far.

All in one coordinate system each: samplers in sigmas meet an `EDMSDE` (alpha = 1, t = sigma), samplers in times the
SDE that is given. Times run uniformly in the half log-SNR from noise of 3000 times the data, where the lower order of a
multistep method's first steps costs nothing, to 0.22 of it, so that neither end of the process is seen in the order.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from scoresde.analysis import Law, marginal, w2
from scoresde.auditing.model import Draws, Form, Model, run_form
from scoresde.auditing.table import Responses, own_error, probe
from scoresde.denoiser import Denoiser
from scoresde.exact import Gaussian, GaussianMixture
from scoresde.grid import Grid
from scoresde.schedules import EDMSDE, VPSDE
from scoresde.sde import SDE
from scoresde.solvers.runge_kutta import RungeKutta

__all__ = ["Bench", "images", "law_of_samples", "marginal_of_mixture", "mixture", "rms", "smooth_images", "spectrum"]

FAR, NEAR, END, LAST = -8.0, -5.0, 1.5, math.log(1 / 0.002)
"""Half log-SNR: where runs start, for the order and as in use; where they stop with noise left; the last before 0."""

_MEAN = torch.tensor([1.0, -2.0, 0.5, 0.0, -1.0, 3.0], dtype=torch.float64)
_STD = torch.tensor([0.1, 0.3, 0.5, 1.0, 1.5, 2.0], dtype=torch.float64)
EVENT = (1, 2, 3)


def spectrum(unit: float = 1.0) -> Law:
    """The Gaussian: six directions of std 0.1 to 2 units."""
    return Law(_MEAN * unit, (_STD * unit) ** 2)


def smooth_images(n: int, seed: int, power: float) -> Tensor:
    """White noise with amplitudes ~ 1 / frequency^power, scaled to pixel std 0.5, shape (n, 3, 32, 32)."""
    generator = torch.Generator("cpu").manual_seed(seed)
    noise = torch.randn(n, 3, 32, 32, generator=generator, dtype=torch.float64, device="cpu")
    f = torch.hypot(torch.fft.fftfreq(32, 1 / 32)[:, None], torch.fft.rfftfreq(32, 1 / 32)[None, :]).clamp(min=1)
    smooth = torch.fft.irfft2(torch.fft.rfft2(noise) / f.double() ** power, s=(32, 32))
    return 0.5 * smooth / smooth.std(dim=(1, 2, 3), keepdim=True)


@cache
def images() -> tuple[Tensor, Tensor]:
    """Eight smooth images, (8, 3, 32, 32), and the width of the mode about each, (8,)."""
    return smooth_images(8, seed=1, power=1.5), torch.linspace(0.2, 0.4, 8, dtype=torch.float64)


@cache
def mixture(dimensions: int) -> GaussianMixture:
    """Five modes in the plane, or `images`, 3072 numbers each."""
    if dimensions == 3072:
        means, std = images()
        return GaussianMixture(means, std=std)
    angle = torch.tensor([0.1, 1.2, 2.7, 3.6, 5.1], dtype=torch.float64)
    radius = torch.tensor([1.0, 1.4, 1.1, 0.8, 1.3], dtype=torch.float64)
    means = (radius * torch.stack([angle.cos(), angle.sin()])).T.reshape(5, 2, 1, 1)
    return GaussianMixture(means, weights=[1.0, 2.0, 1.0, 1.0, 3.0], std=[0.3, 0.4, 0.35, 0.3, 0.45])


def marginal_of_mixture(dimensions: int, sde: SDE, t: float, samples: int, seed: int) -> Tensor:
    """Samples of a mixture's exact marginal at t, float64."""
    generator = torch.Generator("cpu").manual_seed(seed)
    x_0 = mixture(dimensions).sample(samples, generator, torch.float64)
    return sde.perturb(x_0, t, torch.randn(x_0.shape, generator=generator, dtype=torch.float64, device="cpu"))


@cache
def _flow(sde: SDE, dimensions: int, start: float, end: float, samples: int) -> tuple[Tensor, Tensor]:
    """x_T of the exact marginal, and where the probability flow takes it: Runge-Kutta of order 4, float64."""
    x, steps = marginal_of_mixture(dimensions, sde, start, samples, seed=2), 1024 if dimensions == 2 else 320
    solver = RungeKutta("rk4", "half_log_snr")
    with torch.no_grad():
        *_, last = solver.tableau(Grid.log_snr(sde, steps, start=start, end=end)).iterate(
            mixture(dimensions).denoiser(sde), x
        )
    return x, last.x


def _now() -> tuple[float, float]:
    """Of the wall and of the processor."""
    return time.monotonic(), time.process_time()


def _since(began: tuple[float, float]) -> float:
    """Seconds that the machine has given since then: where others use it too, those of the processor, down to a quarter
    of what has passed.
    """
    wall, processor = (now - then for now, then in zip(_now(), began, strict=True))
    return max(min(wall, processor), wall / 4)


class Bench:
    """A sampler and its problems.

    Args:
        form: the sampler.
        sde: for samplers in times; by default a VP SDE.
        quick: fewer problems and smaller ones.
        tick: called with what is being done.

    Attributes:
        data, target: the Gaussian, as a law and as a target, of events (1, 2, 3).
        size: root mean square of the data.
        first: samples of the sampler's first call, to see whether later ones are others.
        known: whether its table is that of a solver of this library.
    """

    data = spectrum()
    size = float((data.mean**2 + data.variances).mean().sqrt())
    target = Gaussian(data.mean.reshape(EVENT), std=data.variances.sqrt().reshape(EVENT))

    def __init__(
        self, form: Form, sde: SDE | None = None, quick: bool = False, tick: Callable[[str], None] = lambda _: None
    ) -> None:
        self.form, self.given, self.quick, self.tick = form, sde, quick, tick
        self.limit, self._began = 15.0 if quick else 120.0, _now()
        self.first: Tensor | None = None
        self.known = False
        self._tables: dict[Any, Responses | str] = {}

    @property
    def late(self) -> bool:
        """Whether the time is over."""
        return _since(self._began) > self.limit

    def sde(self, unit: float = 1.0) -> SDE:
        """The process for data of that unit: the same signal-to-noise ratios of them."""
        if self.form.takes == "sigmas":
            return EDMSDE(t_min=0.002 * unit, t_max=math.exp(-FAR) * unit * (1 + 1e-12))
        if self.given is not None:
            return self.given if unit == 1 else self.given.for_data(unit)
        sde = VPSDE(beta_max=32.0 + 4 * math.log(unit))
        return sde if unit == 1 else sde.for_data(unit)

    def grid(
        self, steps: int, *, unit: float = 1.0, start: float = FAR, end: float = END, to_zero: bool = False
    ) -> Grid:
        """Uniform in the half log-SNR of x_0 / unit, between these two; or to sigma = 0 from `LAST` on."""
        sde, shift = self.sde(unit), math.log(unit)
        high = min(float(sde.time_at(start - shift)), sde.t_max)
        if to_zero:
            return Grid.log_snr(sde, steps, start=high, last=max(float(sde.time_at(LAST - shift)), sde.t_min))
        return Grid.log_snr(sde, steps, start=high, end=float(sde.time_at(end - shift)))

    def uneven(self, steps: int) -> Grid:
        """The same ends, with steps of h and 2 h by turns."""
        even = self.grid(3 * (steps // 2))
        return Grid(even.sde, even.times[[i for i in range(len(even)) if i % 3 != 2]])

    def table(self, grid: Grid) -> Responses | str:
        """Its table on a grid, or why it has none."""
        key = grid.sde, tuple(grid.times.tolist())
        if key not in self._tables:
            self._tables[key] = probe(self.form, grid.sde, grid.times)
        return self._tables[key]

    @cached_property
    def why_no_table(self) -> str | None:
        """Why the sampler has no table, in words; None where it has one."""
        found = self.table(self.grid(12))
        return found if isinstance(found, str) else None

    @cached_property
    def noisy(self) -> bool:
        """Whether it draws noise that its samples have."""
        found = self.table(self.grid(12))
        if isinstance(found, Responses):
            return found.noisy
        grid = self.grid(12)
        first, second = (self.gaussian(grid, seed=seed)[0] for seed in (1, 2))
        return not torch.equal(first, second)

    def ladder(self, least: int = 10) -> list[int]:
        """Numbers of steps, doubled as long as tables stay small; fewer where there is none."""
        found = self.table(self.grid(12))
        if not isinstance(found, Responses):
            return [n for n in (10, 20, 40, 80, 160, 320) if least <= n <= (160 if self.quick or self.noisy else 320)]
        evaluations = max(1.0, len(found.t) / 12)
        most = 1300 if self.quick else 2600
        return [n for n in (10, 20, 40, 80, 160, 320, 640) if least <= n and n * evaluations <= most]

    def within(self, steps: Sequence[int], measure: Callable[[int], float | None]) -> tuple[list[int], list[float]]:
        """The numbers of steps, and what was measured at each, until None; five, and more while there is time."""
        kept: list[int] = []
        values: list[float] = []
        spent, budget = 0.0, 2.0 if self.quick else 12.0
        for n in steps:
            began = _now()
            value = measure(n)
            took = _since(began)
            if value is None:
                break
            kept.append(n)
            values.append(value)
            spent += took
            if len(kept) > 4 and spent + 2.2 * took > budget:
                break
        return kept, values

    def errors(self, steps: Sequence[int], unit: float = 1.0, **where: Any) -> tuple[list[int], list[float]]:
        """The numbers of steps, and its own error on the Gaussian at each: of its table, if it has one at all."""

        def measure(n: int) -> float | None:
            grid = self.grid(n, unit=unit, **where)
            gone = self.why_no_table is None and isinstance(self.table(grid), str)  # too many draws to keep, say
            return None if gone else self.error(grid, unit=unit)

        return self.within(steps, measure)

    def start(
        self, grid: Grid, samples: int = 4, dtype: torch.dtype = torch.float64, unit: float = 1.0, seed: int = 3
    ) -> Tensor:
        """x_T of the Gaussian's exact marginal."""
        law = marginal(spectrum(unit), grid.sde, grid.times[0])
        generator = torch.Generator("cpu").manual_seed(seed)
        z = torch.randn(samples, *EVENT, generator=generator, dtype=torch.float64, device="cpu")
        return (law.mean.reshape(EVENT) + law.variances.sqrt().reshape(EVENT) * z).to(dtype)

    def run(
        self,
        denoiser: Denoiser,
        x_T: Tensor,
        times: Tensor,
        *,
        seed: int | None = 0,
        predicts: str | None = None,
        draws: Draws | None = None,
        most: int = 10**5,
    ) -> tuple[Tensor, Model, int | None]:
        """One run on times of the dtype of x_T: the samples, the model as it was asked, the evaluations claimed."""
        model = Model(denoiser, predicts or self.form.predicts[0], most=most)
        times = times.to(x_T.dtype)
        with draws or nullcontext():
            x, claimed = run_form(self.form, model, x_T, times, seed)
        return x, model, claimed

    def gaussian(
        self, grid: Grid, samples: int = 16, *, unit: float = 1.0, dtype: torch.dtype = torch.float64, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Samples of the Gaussian from x_T of the exact marginal, and where the probability flow takes that x_T."""
        data = spectrum(unit)
        target = Gaussian(data.mean.reshape(EVENT), std=data.variances.sqrt().reshape(EVENT))
        x_T = self.start(grid, samples, unit=unit)
        x, *_ = self.run(target.denoiser(grid.sde), x_T.to(dtype), grid.times, **options)
        return x, target.flow(x_T, grid.sde, grid.times[0], grid.times[-1])

    def error(self, grid: Grid, unit: float = 1.0) -> float:
        """Its own error of x / alpha on the Gaussian, in units of the data: without sampling where it has a table."""
        size = unit * float(grid.sde.alpha(grid.times[-1]))
        found = self.table(grid)
        if isinstance(found, Responses):
            return own_error(found, spectrum(unit), float(grid.times[0]), float(grid.times[-1])) / size
        if not self.noisy:
            x, truth = self.gaussian(grid, unit=unit)
            return rms(x - truth) / size
        n = 4000
        x, _ = self.gaussian(grid, n, unit=unit)
        law = marginal(spectrum(unit), grid.sde, grid.times[-1])
        return w2(law_of_samples(x), law) / size

    def mixed(self, dimensions: int, steps: int, samples: int) -> float:
        """The rms distance of its samples of the mixture, x / alpha, from where the probability flow takes x_T."""
        grid = self.grid(steps)
        t_0, t_N = float(grid.times[0]), float(grid.times[-1])
        x_T, truth = _flow(grid.sde, dimensions, t_0, t_N, samples)
        x, *_ = self.run(mixture(dimensions).denoiser(grid.sde), x_T.clone(), grid.times)
        return rms(x - truth) / float(grid.sde.alpha(t_N))


def law_of_samples(x: Tensor) -> Law:
    """Mean and variances of each number of a batch."""
    flat = x.double().reshape(len(x), -1)
    return Law(flat.mean(0), flat.var(0))


def rms(difference: Tensor) -> float:
    """Root mean square; infinite where it is not finite."""
    value = float(difference.double().square().mean().sqrt())
    return value if math.isfinite(value) else math.inf
