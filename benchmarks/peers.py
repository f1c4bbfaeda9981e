"""The samplers of diffusers, k-diffusion and azula, each driven as well as it can be driven.

All of them work on variance-preserving or variance-exploding scales, so every SDE is offered to them in the coordinates

    y = x / alpha,   u = sigma / alpha          and, for those that want VP,   x_vp = y / sqrt(1 + u^2)

with the exact times of our own grids: the noise levels u of a grid are written over the ones that a scheduler made, in
float64 on the host, so that nothing is lost to integer timesteps, to a table of 1000 betas or to a forced last step at
sigma = 0. What a peer then does in float32 (diffusers' DPM-Solver multistep, Euler and Euler ancestral cast the state)
is its own. Packages are imported when they are asked for; `peers()` leaves out what is not installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import math
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from problems import Draws
from torch import Tensor

from scoresde import Denoiser, Grid

PACKAGES = ("diffusers", "k-diffusion", "azula")

NOT_DRIVEN = {
    "diffusers PNDM (Runge-Kutta start)": "12 evaluations before its first multistep",
    "diffusers EDM-Euler, EDM- and Cosine-DPM-Solver": "Euler and DPM-Solver++ with other scalings",
    "diffusers DPMSolverSDE": "a copy of k-diffusion's dpmpp_sde with its Brownian tree",
    "diffusers LCM, TCD, SCM, consistency": "need a distilled network",
    "k-diffusion dpm_adaptive": "chooses its own evaluations: no budget can be given",
}
"""Samplers of the peers that are not in the race, and why."""


class Model:
    """A denoiser in the peers' coordinates, which counts its evaluations."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser, self.sde, self.nfe = denoiser, denoiser.sde, 0

    def x0(self, y: Tensor, u: Tensor | float) -> Tensor:
        """D at x = alpha y."""
        self.nfe += 1
        t = self.sde.time_at(-torch.as_tensor(u, dtype=torch.float64, device="cpu").log()).clamp(max=self.sde.t_max)
        return self.denoiser(y * float(self.sde.alpha(t)), t).mean

    def eps(self, y: Tensor, u: Tensor | float) -> Tensor:
        """E[eps | x], from y and D before either is rounded further."""
        return (y - self.x0(y, u)) / float(u)


Solve = Callable[[Model, Tensor, Tensor, Draws], Tensor]
"""(model, y_T, u of the grid's times, draws) to y at the grid's end."""


@dataclass(frozen=True)
class Peer:
    """A sampler of a peer.

    Attributes:
        package, method: where it is from and what it is called there, with its options.
        solve: runs it.
        deterministic: whether it draws no noise.
        stages: evaluations a step.
        first_order_end: whether a step to sigma = 0 takes one evaluation whatever `stages` is.
        spacing: the customary grid in its package.
        grids: names of the only grids that it can step on, or None for any.
        extra: evaluations beside those of the steps.
        steps: None, the budget settles it.
    """

    package: str
    method: str
    solve: Solve
    deterministic: bool = True
    stages: int = 1
    first_order_end: bool = True
    spacing: str = "uniform"
    grids: tuple[str, ...] | None = None
    extra: int = 0
    steps: None = None

    @property
    def name(self) -> str:
        return f"{self.package} {self.method}"

    def evaluations(self, grid: Grid) -> int:
        shortened = self.stages - 1 if self.first_order_end and float(grid.times[-1]) == 0 else 0
        return self.stages * grid.steps - shortened + self.extra

    def run(self, denoiser: Denoiser, x: Tensor, grid: Grid, draws: Draws) -> tuple[Tensor, int]:
        """The state at the grid's end and the evaluations that it took."""
        sde, times = denoiser.sde, grid.times
        alpha, model = sde.alpha(times), Model(denoiser)
        u = sde.sigma(times) / alpha
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            y = self.solve(model, x / float(alpha[0]), u, draws)
        return (y * float(alpha[-1])).to(x.dtype), model.nfe


@cache
def peers() -> tuple[Peer, ...]:
    """Every driven sampler of the packages that are installed."""
    found: list[Peer] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for package, make in (("diffusers", _diffusers), ("k-diffusion", _k_diffusion), ("azula", _azula)):
            if installed(package):
                found += make()
    return tuple(found)


def installed(package: str) -> str | None:
    """Its version, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _finished(solve: Solve) -> Solve:
    """For samplers without a step to sigma = 0: the denoiser's mean at the last noisy time is that step."""

    def to_zero(model: Model, y: Tensor, u: Tensor, draws: Draws) -> Tensor:
        if u[-1] > 0:
            return solve(model, y, u, draws)
        noisy = solve(model, y, u[:-1], draws) if len(u) > 2 else y
        return model.x0(noisy, u[-2])

    return to_zero


# --- diffusers: schedulers, one object a run, whose tables are overwritten with the grid ------------------------------


def _vp(u: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) on VP scales, at noise level u."""
    return 1 / torch.hypot(u, torch.ones_like(u)), u / torch.hypot(u, torch.ones_like(u))


@contextmanager
def _drawing(scheduler: Any, draws: Draws) -> Iterator[None]:
    """The scheduler's noise comes from draws."""
    module = sys.modules[type(scheduler).__module__]

    def randn_tensor(shape: Any, *, dtype: torch.dtype, device: Any = None, **_: Any) -> Tensor:
        return draws(0, torch.empty(tuple(shape), dtype=torch.float64, device=device)).to(dtype)

    if not hasattr(module, "randn_tensor"):
        yield
        return
    with mock.patch.object(module, "randn_tensor", randn_tensor):
        yield


def _by_sigmas(make: Callable[[], Any], reaches_zero: bool = False) -> Solve:
    """Schedulers on VP scales that read `sigmas` (DPM-Solver, UniPC, DEIS, SA-Solver)."""

    def solve(model: Model, y: Tensor, u: Tensor, draws: Draws) -> Tensor:
        N, scheduler = len(u) - 1, make()
        scheduler.set_timesteps(N)
        scheduler.sigmas, scheduler.timesteps = u.clone(), torch.arange(N, 0, -1)
        scheduler.num_inference_steps = N
        scheduler.set_begin_index(0)
        alpha, _ = _vp(u)
        x = y * float(alpha[0])
        with _drawing(scheduler, draws):
            for i, t in enumerate(scheduler.timesteps):
                x = scheduler.step(model.eps(x / float(alpha[i]), u[i]), t, x).prev_sample
        return x / float(alpha[-1])

    return solve if reaches_zero else _finished(solve)


def _by_ve_sigmas(make: Callable[[], Any], kind: str = "euler", **step: Any) -> Solve:
    """Schedulers on VE scales: Euler, LMS and ancestral with a sigma a step, Heun and KDPM2 with two."""

    def solve(model: Model, y: Tensor, u: Tensor, draws: Draws) -> Tensor:
        N, scheduler = len(u) - 1, make()
        scheduler.set_timesteps(N)
        seen = u[:-1]
        if kind == "euler":
            scheduler.sigmas = u.clone()
        else:
            scheduler.sigmas = torch.cat([u[:1], u[1:].repeat_interleave(2)])
            seen = scheduler.sigmas[:-1].clone()
            seen[1::2] = u[1:]
            if kind == "midpoint":
                middle = (u[:-1] * u[1:]).sqrt()
                seen[1::2] = middle
                scheduler.sigmas_interpol = torch.cat([middle[:1], middle.repeat_interleave(2), middle[-1:]])
            seen = torch.stack([u[:-1], seen[1::2]], 1).reshape(-1)
        scheduler.timesteps = torch.arange(len(seen), 0, -1).float()
        scheduler.num_inference_steps = N
        scheduler.set_begin_index(0)
        scheduler.is_scale_input_called = True
        with _drawing(scheduler, draws):
            for i, t in enumerate(scheduler.timesteps):
                if seen[i] == 0:  # the second stage of a step to zero
                    break
                y = scheduler.step(model.eps(y, seen[i]), t, y, **step).prev_sample
        return y

    return solve


def _by_chain(make: Callable[[int], Any], **step: Any) -> Solve:
    """Schedulers that read `alphas_cumprod` at integer times: a chain with a node a step is made for them."""

    def solve(model: Model, y: Tensor, u: Tensor, draws: Draws) -> Tensor:
        N = len(u) - 1
        scheduler, (alpha, _) = make(N), _vp(u)
        scheduler.alphas_cumprod = (alpha[:-1] ** 2).flip(0)
        scheduler.final_alpha_cumprod = scheduler.one = alpha[-1] ** 2
        scheduler.set_timesteps(N)
        x = y * float(alpha[0])
        with _drawing(scheduler, draws):
            for t in scheduler.timesteps.tolist():
                at = N - 1 - t
                x = scheduler.step(model.eps(x / float(alpha[at]), u[at]), t, x, **step).prev_sample
        return x / float(alpha[-1])

    return solve


def _ipndm(make: Callable[[], Any]) -> Solve:
    """IPNDM reads `betas` and `alphas` as sigma and alpha, and wants v = alpha eps - sigma x_0."""

    def solve(model: Model, y: Tensor, u: Tensor, draws: Draws) -> Tensor:
        N, scheduler = len(u) - 1, make()
        scheduler.set_timesteps(N)
        alpha, sigma = _vp(u)
        scheduler.alphas, scheduler.betas, scheduler.timesteps = alpha, sigma, torch.arange(N, 0, -1)
        scheduler.set_begin_index(0)
        x = y * float(alpha[0])
        for i, t in enumerate(scheduler.timesteps):
            D = model.x0(x / float(alpha[i]), u[i])
            eps = (x - alpha[i] * D) / sigma[i]
            x = scheduler.step(alpha[i] * eps - sigma[i] * D, t, x).prev_sample
        return x / float(alpha[-1])

    return solve


def _diffusers() -> list[Peer]:
    import diffusers as d

    d.utils.logging.set_verbosity_error()
    noisy = {"deterministic": False}
    found: list[Peer] = []

    def add(method: str, solve: Solve, **options: Any) -> None:
        found.append(Peer("diffusers", method, solve, **options))

    def chain(cls: Any, **options: Any) -> Callable[[int], Any]:
        return lambda N: cls(num_train_timesteps=N, **options)

    ddim = chain(d.DDIMScheduler, clip_sample=False)
    add("DDIM", _by_chain(ddim))
    add("PNDM (PLMS)", _by_chain(chain(d.PNDMScheduler, skip_prk_steps=True)), extra=1)
    add("IPNDM", _ipndm(d.IPNDMScheduler))
    add("Euler", _by_ve_sigmas(d.EulerDiscreteScheduler))
    add("Heun", _by_ve_sigmas(d.HeunDiscreteScheduler, "heun"), stages=2)
    add("KDPM2", _by_ve_sigmas(d.KDPM2DiscreteScheduler, "midpoint"), stages=2)
    for k in (2, 3, 4):
        add(f"LMS-{k}", _by_ve_sigmas(d.LMSDiscreteScheduler, order=k))

    # A lower order at the end is meant for a last step to sigma = 0: without it no solver is held back here.
    to_noise = {"final_sigmas_type": "sigma_min"}
    for lower, tail in ((False, ""), (True, ", lower order final")):
        final = {"lower_order_final": lower}
        for algorithm in ("dpmsolver++", "dpmsolver"):
            multistep = partial(d.DPMSolverMultistepScheduler, algorithm_type=algorithm, **to_noise, **final)
            for kind in ("midpoint", "heun"):
                add(f"{algorithm}-2M {kind}{tail}", _by_sigmas(partial(multistep, solver_order=2, solver_type=kind)))
            add(f"{algorithm}-3M{tail}", _by_sigmas(partial(multistep, solver_order=3)))
        for k in (2, 3):
            add(f"DEIS-{k}{tail}", _by_sigmas(partial(d.DEISMultistepScheduler, solver_order=k, **final)))
        for k, kind, predict_x0 in itertools.product((2, 3, 4), ("bh1", "bh2"), (True, False)):
            unipc = partial(d.UniPCMultistepScheduler, solver_order=k, solver_type=kind, **to_noise, **final)
            name = f"UniPC-{k} {kind}{'' if predict_x0 else ' eps'}{tail}"
            add(name, _by_sigmas(partial(unipc, predict_x0=predict_x0)))
            if not lower and kind == "bh2" and predict_x0:
                add(f"UniP-{k} bh2", _by_sigmas(partial(unipc, disable_corrector=list(range(1000)))))
        for (k, corrector), tau in itertools.product(((2, 2), (3, 3), (3, 4)), (0.0, 1.0)):
            orders = {"predictor_order": k, "corrector_order": corrector}
            make = partial(d.SASolverScheduler, tau_func=partial(_constant, tau), **orders, **final)
            add(f"SA-Solver {k}/{corrector} tau={tau:g}{tail}", _by_sigmas(make), deterministic=tau == 0)
    for algorithm, k in itertools.product(("dpmsolver++", "dpmsolver"), (2, 3)):
        make = partial(d.DPMSolverSinglestepScheduler, solver_order=k, algorithm_type=algorithm, **to_noise)
        add(f"{algorithm}-{k}S", _by_sigmas(make))

    add("DDIM eta=1", _by_chain(ddim, eta=1.0), **noisy)
    for kind in ("small", "large"):
        add(
            f"DDPM {kind}", _by_chain(chain(d.DDPMScheduler, clip_sample=False, variance_type=f"fixed_{kind}")), **noisy
        )
    add("Euler ancestral", _by_ve_sigmas(d.EulerAncestralDiscreteScheduler), **noisy)
    sde = d.DPMSolverMultistepScheduler
    for k in (1, 2, 3):
        make = partial(sde, algorithm_type="sde-dpmsolver++", solver_order=k, final_sigmas_type="zero")
        add(f"sde-dpmsolver++-{k}M", _by_sigmas(make, reaches_zero=True), **noisy)
    make = partial(sde, algorithm_type="sde-dpmsolver", solver_order=2, **to_noise)
    add("sde-dpmsolver-2M", _by_sigmas(make), **noisy)
    return found


def _constant(tau: float, t: Any) -> Tensor:
    return torch.tensor(tau, dtype=torch.float64)


# --- k-diffusion: functions of (model, x, sigmas) on VE scales -------------------------------------------------------


def k_diffusion_sampling() -> types.ModuleType:
    """`k_diffusion.sampling`. Where the package as a whole does not import (it wants a torchvision that fits torch),
    the file is loaded alone, with the one helper that it uses.
    """
    try:
        return importlib.import_module("k_diffusion.sampling")
    except Exception:
        for name in [name for name in sys.modules if name.split(".")[0] in ("k_diffusion", "torchvision")]:
            del sys.modules[name]
    spec = importlib.util.find_spec("k_diffusion")
    assert spec is not None
    assert spec.submodule_search_locations
    package, utils = types.ModuleType("k_diffusion"), types.ModuleType("k_diffusion.utils")
    package.__path__ = [str(Path(spec.submodule_search_locations[0]))]
    utils.append_dims = lambda x, ndim: x.reshape(*x.shape, *[1] * (ndim - x.ndim))  # type: ignore[attr-defined]
    package.utils = utils  # type: ignore[attr-defined]
    sys.modules |= {"k_diffusion": package, "k_diffusion.utils": utils}
    return importlib.import_module("k_diffusion.sampling")


class _Path:
    """Noise of a Brownian path, as k-diffusion asks for it: normalised increments from sigma to sigma_next. A second
    request from the same sigma, farther on, shares the first one's increment.
    """

    def __init__(self, draws: Draws, like: Tensor) -> None:
        self._draws, self._like = draws, like
        self._start = self._end = math.nan
        self._z = like

    def __call__(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        start, end = float(sigma), float(sigma_next)
        z = self._draws(0, self._like)
        if math.isclose(start, self._start, rel_tol=1e-9):
            share = (start - self._end) / (start - end)
            z = math.sqrt(share) * self._z + math.sqrt(1 - share) * z
        self._start, self._end, self._z = start, end, z
        return z


def _k_diffusion() -> list[Peer]:
    k = k_diffusion_sampling()

    def solve_with(name: str, noisy: bool, **options: Any) -> Solve:
        def solve(model: Model, y: Tensor, u: Tensor, draws: Draws) -> Tensor:
            def x0(y: Tensor, sigma: Tensor) -> Tensor:
                return model.x0(y, sigma[0])

            more = {"noise_sampler": _Path(draws, y)} if noisy else {}
            sampler: Callable[..., Tensor] = getattr(k, f"sample_{name}")
            if name == "dpm_fast":
                return sampler(x0, y, u[-1], u[0], len(u) - 1, disable=True, **more, **options)
            return sampler(x0, y, u, disable=True, **more, **options)

        return solve

    def peer(name: str, noisy: bool = False, label: str = "", stages: int = 1, **options: Any) -> Peer:
        run = solve_with(name, noisy, **options)
        return Peer(
            "k-diffusion",
            f"{name} {label}".strip(),
            _finished(run) if name == "dpm_fast" else run,
            deterministic=not noisy or options.get("eta") == 0.0,
            stages=stages,
            spacing="Karras 7",
            grids=("log-SNR",) if name == "dpm_fast" else None,
        )

    return [
        peer("euler"),
        peer("heun", stages=2),
        peer("dpm_2", stages=2),
        *(peer("lms", label=f"order {order}", order=order) for order in (2, 3, 4)),
        peer("dpm_fast"),
        peer("dpmpp_2m"),
        peer("dpmpp_2s_ancestral", True, "eta=0", stages=2, eta=0.0),
        peer("dpmpp_sde", True, "eta=0", stages=2, eta=0.0),
        peer("dpmpp_2m_sde", True, "midpoint eta=0", eta=0.0),
        peer("dpmpp_2m_sde", True, "heun eta=0", eta=0.0, solver_type="heun"),
        peer("dpmpp_3m_sde", True, "eta=0", eta=0.0),
        peer("euler_ancestral", True),
        peer("dpm_2_ancestral", True, stages=2),
        peer("dpmpp_2s_ancestral", True, stages=2),
        peer("dpmpp_sde", True, stages=2),
        peer("dpmpp_2m_sde", True, "midpoint"),
        peer("dpmpp_2m_sde", True, "heun", solver_type="heun"),
        peer("dpmpp_3m_sde", True),
    ]


# --- azula: samplers that hold a denoiser with a schedule ------------------------------------------------------------


def _azula() -> list[Peer]:
    import azula.denoise
    import azula.noise
    import azula.sample

    class Schedule(azula.noise.Schedule):
        """The grid's own (alpha, sigma), by index: t = i is the i-th time of the grid."""

        def __init__(self, u: Tensor) -> None:
            self.alpha, self.sigma = _vp(u)

        def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
            i = t.round().long().cpu()
            return self.alpha[i], self.sigma[i]

    class Exact(azula.denoise.Denoiser):
        def __init__(self, model: Model, u: Tensor) -> None:
            super().__init__()
            self.model, self.u, self.schedule = model, u, Schedule(u)

        def forward(self, x: Tensor, t: Tensor, **_: Any) -> Any:
            i = round(float(t))
            return azula.denoise.DiracPosterior(self.model.x0(x / self.schedule.alpha[i], self.u[i]))

    def solve_with(cls: Any, **options: Any) -> Solve:
        def solve(model: Model, y: Tensor, u: Tensor, draws: Draws) -> Tensor:
            steps = len(u) - 1
            # The start is index 0 and the stop index N: azula's own linspace then runs through the grid.
            span = {"start": 0.0, "stop": float(steps), "steps": steps, "dtype": torch.float64}
            sampler = cls(Exact(model, u), silent=True, **span, **options)
            alpha, _ = _vp(u)
            with mock.patch.object(torch, "randn_like", lambda x: draws(0, x)):
                return sampler(y * float(alpha[0])) / float(alpha[-1])

        return solve

    def peer(name: str, label: str = "", deterministic: bool = True, stages: int = 1, **options: Any) -> Peer:
        run, singular = solve_with(getattr(azula.sample, f"{name}Sampler"), **options), "EAB" in name or name == "Heun"
        return Peer(
            "azula",
            f"{name}{label}",
            _finished(run) if singular else run,
            deterministic=deterministic,
            stages=stages,
            first_order_end=singular,
        )

    return [
        peer("DDIM", eta=0.0),
        peer("Euler"),
        peer("Heun", stages=2),
        *(
            peer(f"{kind}AB", f"{order}", order=order)
            for kind in ("z", "v", "zE", "xE", "RE")
            for order in (1, 2, 3, 4)
        ),
        peer("DDPM", deterministic=False),
        peer("Ito", deterministic=False),
        peer("PC", deterministic=False, stages=2),
    ]
