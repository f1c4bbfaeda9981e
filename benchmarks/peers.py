"""The samplers of diffusers, k-diffusion and azula, each driven as well as it can be (`scoresde.auditing.forms`).

All of them work on variance-preserving or variance-exploding scales, so every SDE is offered to them in the coordinates

    y = x / alpha,   u = sigma / alpha

with the exact times of our own grids, in float64 on the host, so that nothing is lost to integer timesteps, to a table
of 1000 betas or to a forced last step at sigma = 0. What a peer then does in float32 (diffusers' DPM-Solver multistep,
Euler and Euler ancestral cast the state) is its own. Packages are imported when they are asked for; `peers()` leaves
out what is not installed.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial, wraps
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from problems import Draws
from torch import Tensor

from scoresde import EDMSDE, SDE, Denoiser, Grid, Posterior
from scoresde.auditing.forms import claimed_order, form_of, k_diffusion_sampling
from scoresde.auditing.model import Draws as Drawn
from scoresde.auditing.model import Form, Model
from scoresde.auditing.schedulers import scheduler_form
from scoresde.tensors import Time, as_time

PACKAGES = ("diffusers", "k-diffusion", "azula")

NOT_DRIVEN = {
    "diffusers PNDM (Runge-Kutta start)": "12 evaluations before its first multistep",
    "diffusers EDM-Euler, EDM- and Cosine-DPM-Solver": "Euler and DPM-Solver++ with other scalings",
    "diffusers DPMSolverSDE": "a copy of k-diffusion's dpmpp_sde with its Brownian tree",
    "diffusers LCM, TCD, SCM, consistency": "need a distilled network",
    "k-diffusion dpm_adaptive": "chooses its own evaluations: no budget can be given",
}
"""Samplers of the peers that are not in the race, and why."""


USUAL = [
    ("diffusers DDIM", "leading"),
    ("diffusers DDIM", "trailing"),
    ("diffusers Euler", "linspace"),
    ("diffusers Heun", "linspace"),
    ("diffusers dpmsolver++-2M as made", "linspace"),
    ("diffusers dpmsolver++-2M as made", "Karras 7"),
    ("diffusers UniPC-2 as made", "linspace"),
    ("diffusers UniPC-2 as made", "Karras 7"),
    ("diffusers DEIS-3, lower order final", "linspace"),
    ("diffusers DEIS-3, lower order final", "Karras 7"),
    ("k-diffusion dpmpp_2m", "Karras 7"),
    ("k-diffusion heun", "Karras 7"),
    ("k-diffusion lms order 4", "Karras 7"),
    ("azula Euler", "uniform"),
    ("azula Heun", "uniform"),
    ("azula zEAB3", "uniform"),
    ("azula xEAB2", "uniform"),
    ("azula vAB2", "uniform"),
    ("diffusers DDIM eta=1", "leading"),
    ("diffusers Euler ancestral", "linspace"),
    ("diffusers sde-dpmsolver++-2M", "linspace"),
    ("diffusers sde-dpmsolver++-2M", "Karras 7"),
    ("k-diffusion dpmpp_2m_sde midpoint", "Karras 7"),
    ("k-diffusion dpmpp_3m_sde", "Karras 7"),
    ("azula DDPM", "uniform"),
]
"""What the peers' users get: samplers by name, with the spacings that their packages give them."""


def usual_grid(spacing: str, sde: SDE, steps: int, end: float, first: float) -> Grid:
    """A peer's spacing from t_max to `end`, 0 or `first`, the first noisy time: its time at index 0. "leading",
    "trailing" and "linspace" are diffusers' strides over 1000 indices from there, rounded where they are.
    """
    if spacing == "uniform":  # azula's
        return Grid.uniform(sde, steps, end=end)
    if spacing == "Karras 7":
        return Grid.karras(sde, steps, **({"last": first} if end == 0 else {"end": end}))
    if spacing == "linspace":
        at = np.linspace(0, 999, steps + 1).round()[::-1]
        at = at[:-1] if end == 0 else at
    elif spacing == "trailing":
        at = np.round(np.arange(1000, 0, -1000 / steps))[:steps] - 1
    else:
        at = np.arange(steps)[::-1] * (1000 // steps)
    times = first + at / 999 * (sde.t_max - first)
    if end == 0:
        times = np.append(times, 0.0)
    elif times[-1] > first:
        times = np.append(times, first)
    return Grid(sde, times)


class InSigmas(Denoiser):
    """A denoiser in the peers' coordinates, one u for the batch."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser, self.sde = denoiser, EDMSDE()

    def posterior(self, y: Tensor, u: Time, /, **cond: Any) -> Posterior:
        sde = self.denoiser.sde
        t = sde.time_at(-as_time(u).to("cpu", torch.float64).reshape(-1)[0].log()).clamp(max=sde.t_max)
        return self.denoiser(y * float(sde.alpha(t)), t)


@dataclass(frozen=True)
class Peer:
    """A sampler of a peer.

    Attributes:
        package, method: where it is from and what it is called there, with its options.
        form: runs it.
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
    form: Form
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
        alpha = denoiser.sde.alpha(grid.times)
        u = denoiser.sde.sigma(grid.times) / alpha
        model = Model(InSigmas(denoiser), "eps" if "eps" in self.form.predicts else self.form.predicts[0])
        noise = nullcontext() if self.deterministic else Drawn(lambda k, z: draws(0, z.double()))
        with torch.no_grad(), warnings.catch_warnings(), noise:
            warnings.simplefilter("ignore")
            y = self.form.run(model, x / float(alpha[0]), u, grid.steps)
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


# --- diffusers --------------------------------------------------------------------------------------------------------


def _diffusers() -> list[Peer]:
    import diffusers as d

    d.utils.logging.set_verbosity_error()
    noisy = {"deterministic": False}
    found: list[Peer] = []

    def add(method: str, cls: Any, options: dict[str, Any] | None = None, **about: Any) -> None:
        found.append(Peer("diffusers", method, scheduler_form(cls, options or {}, claimed_order, afresh=True), **about))

    add("DDIM", d.DDIMScheduler)
    add("PNDM (PLMS)", d.PNDMScheduler, {"skip_prk_steps": True}, extra=1)
    add("IPNDM", d.IPNDMScheduler)
    add("Euler", d.EulerDiscreteScheduler)
    add("Heun", d.HeunDiscreteScheduler, stages=2)
    add("KDPM2", d.KDPM2DiscreteScheduler, stages=2)
    for k in (2, 3, 4):
        add(f"LMS-{k}", d.LMSDiscreteScheduler, {"order": k})

    # A lower order at the end is meant for a last step to sigma = 0: without it no solver is held back here.
    to_noise = {"final_sigmas_type": "sigma_min"}
    multistep, unipc = d.DPMSolverMultistepScheduler, d.UniPCMultistepScheduler
    for lower, tail in ((False, ""), (True, ", lower order final")):
        final = {"lower_order_final": lower}
        for algorithm in ("dpmsolver++", "dpmsolver"):
            options = {"algorithm_type": algorithm, **to_noise, **final}
            for kind in ("midpoint", "heun"):
                add(f"{algorithm}-2M {kind}{tail}", multistep, options | {"solver_order": 2, "solver_type": kind})
            add(f"{algorithm}-3M{tail}", multistep, options | {"solver_order": 3})
        for k in (2, 3):
            add(f"DEIS-{k}{tail}", d.DEISMultistepScheduler, {"solver_order": k, **final})
        for k, kind, predict_x0 in itertools.product((2, 3, 4), ("bh1", "bh2"), (True, False)):
            options = {"solver_order": k, "solver_type": kind, "predict_x0": predict_x0, **to_noise, **final}
            add(f"UniPC-{k} {kind}{'' if predict_x0 else ' eps'}{tail}", unipc, options)
            if not lower and kind == "bh2" and predict_x0:
                add(f"UniP-{k} bh2", unipc, options | {"disable_corrector": list(range(1000))})
        for (k, corrector), tau in itertools.product(((2, 2), (3, 3), (3, 4)), (0.0, 1.0)):
            options = {"predictor_order": k, "corrector_order": corrector, "tau_func": partial(_constant, tau), **final}
            add(f"SA-Solver {k}/{corrector} tau={tau:g}{tail}", d.SASolverScheduler, options, deterministic=tau == 0)
    # As their constructors have them: lower orders at the end of few steps, and a last step to sigma = 0.
    add("dpmsolver++-2M as made", multistep, {"solver_order": 2})
    add("UniPC-2 as made", unipc, {"solver_order": 2})
    for algorithm, k in itertools.product(("dpmsolver++", "dpmsolver"), (2, 3)):
        options = {"solver_order": k, "algorithm_type": algorithm, **to_noise}
        add(f"{algorithm}-{k}S", d.DPMSolverSinglestepScheduler, options)

    add("DDIM eta=1", d.DDIMScheduler, {"eta": 1.0}, **noisy)
    for kind in ("small", "large"):
        add(f"DDPM {kind}", d.DDPMScheduler, {"variance_type": f"fixed_{kind}"}, **noisy)
    add("Euler ancestral", d.EulerAncestralDiscreteScheduler, **noisy)
    for k in (1, 2, 3):
        add(f"sde-dpmsolver++-{k}M", multistep, {"algorithm_type": "sde-dpmsolver++", "solver_order": k}, **noisy)
    add("sde-dpmsolver-2M", multistep, {"algorithm_type": "sde-dpmsolver", "solver_order": 2, **to_noise}, **noisy)
    return found


def _constant(tau: float, t: Any) -> Tensor:
    return torch.tensor(tau, dtype=torch.float64)


# --- k-diffusion ------------------------------------------------------------------------------------------------------


class _Path:
    """Noise of a Brownian path, as k-diffusion asks for it: normalised increments from sigma to sigma_next. A second
    request from the same sigma, farther on, shares the first one's increment.
    """

    def __init__(self, like: Tensor) -> None:
        self._start = self._end = math.nan
        self._z = like

    def __call__(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        start, end = float(sigma), float(sigma_next)
        z = torch.randn_like(self._z)
        if math.isclose(start, self._start, rel_tol=1e-9):
            share = (start - self._end) / (start - end)
            z = math.sqrt(share) * self._z + math.sqrt(1 - share) * z
        self._start, self._end, self._z = start, end, z
        return z


def _on_path(sampler: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(sampler)
    def on_path(model: Any, x: Tensor, *args: Any, **options: Any) -> Tensor:
        return sampler(model, x, *args, noise_sampler=_Path(x), **options)

    return on_path


def _k_diffusion() -> list[Peer]:
    k = k_diffusion_sampling()

    def peer(name: str, noisy: bool = False, label: str = "", stages: int = 1, **options: Any) -> Peer:
        sampler = getattr(k, f"sample_{name}")
        return Peer(
            "k-diffusion",
            f"{name} {label}".strip(),
            form_of(_on_path(sampler) if noisy else sampler, options=options),
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


# --- azula ------------------------------------------------------------------------------------------------------------


def _azula() -> list[Peer]:
    import azula.sample

    def peer(name: str, label: str = "", deterministic: bool = True, stages: int = 1, **options: Any) -> Peer:
        return Peer(
            "azula",
            f"{name}{label}",
            form_of(getattr(azula.sample, f"{name}Sampler"), options=options),
            deterministic=deterministic,
            stages=stages,
            first_order_end="EAB" in name or name == "Heun",
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
