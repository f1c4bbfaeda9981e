"""Every step of every scheduler that both diffusers and this library have, on the same noise and a small network.

    python benchmarks/interop_agreement.py

Theirs is run as its pipelines run it; ours is `sample(model, ..., grid=model.grid(steps))` with model =
from_diffusers((network, scheduler)) and the solver that is the same method. What is printed is the largest difference
of any state after any step, relative to the largest entry of all states,

    float32     as both are used
    float64     the network and the state in float64, their tables as they make them, which is in float32
    exact       their tables (abar, sigmas, timesteps) replaced by ours, in float64, before the first step

so that what is left in the last column is of the methods, and what it is more in the others of the tables. Some of
theirs cast the state to float32 in each step.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from scoresde import EDMSDE, FlowSDE, sample
from scoresde.interop import from_diffusers
from scoresde.interop.diffusers import library
from scoresde.solvers import DDIM, DDPM, DEIS, DPMSolver, DPMSolverPP, Euler, ExponentialAB, Heun, RawEps, UniPC
from scoresde.solvers.base import Solver
from scoresde.solvers.catalogue import call_of
from scoresde.wrappers import Wrapper

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
RAW = {"clip_sample": False}


@dataclass(frozen=True)
class Case:
    """A scheduler of theirs, and the solver that is its method.

    Attributes:
        name: of the class, without "Scheduler".
        options: of its constructor.
        solver: ours.
        step: options of its step.
        noisy: whether it draws noise.
        evaluations: of the network in a step.
        steps: below 15 theirs lowers the order of the last ones.
    """

    name: str
    solver: Solver
    options: Mapping[str, Any] = field(default_factory=dict)
    step: Mapping[str, Any] = field(default_factory=dict)
    noisy: bool = False
    evaluations: int = 1
    steps: int = 20

    def __str__(self) -> str:
        told = ", ".join(f"{k}={v!r}" for k, v in {**self.options, **self.step}.items() if k not in SD)
        return f"{self.name}({told})" + (f", {self.steps} steps" if self.steps != 20 else "")


CASES = [
    Case("DDPM", DDPM(), RAW, noisy=True),
    Case("DDPM", DDPM("beta"), {**RAW, "variance_type": "fixed_large"}, noisy=True),
    Case("DDPM", DDPM(), {**RAW, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}, noisy=True),
    Case("DDPM", DDPM(), noisy=True),
    Case("DDPM", DDPM(), {"thresholding": True, "sample_max_value": 2.0, "dynamic_thresholding_ratio": 0.9},
         noisy=True),
    Case("DDIM", DDIM(), RAW),
    Case("DDIM", RawEps(DDIM())),
    Case("DDIM", DDIM(), step={"use_clipped_model_output": True}),
    Case("DDIM", DDIM(), {**RAW, **SD, "steps_offset": 1, "set_alpha_to_one": False}),
    Case("DDIM", DDIM(0.5), {**RAW, "timestep_spacing": "trailing"}, {"eta": 0.5}, noisy=True),
    Case("DPMSolverMultistep", DPMSolverPP(2), SD),
    Case("DPMSolverMultistep", DPMSolverPP(2, rule="exact"), {**SD, "solver_type": "heun"}),
    Case("DPMSolverMultistep", DPMSolverPP(3, as_published=True), {**SD, "solver_order": 3}),
    Case("DPMSolverMultistep", DPMSolverPP(2), {**SD, "use_karras_sigmas": True}),
    Case("DPMSolverMultistep", DPMSolverPP(2, view="eps"),
         {**SD, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    Case("DPMSolverMultistep", DPMSolverPP(2, stochastic=True), {**SD, "algorithm_type": "sde-dpmsolver++"},
         noisy=True),
    Case("DPMSolverMultistep", DPMSolverPP(3, as_published=True, lower_final=True), {**SD, "solver_order": 3},
         steps=10),
    Case("UniPCMultistep", UniPC(2, lower_final=True), SD),
    Case("UniPCMultistep", UniPC(3, lower_final=True), {**SD, "solver_order": 3}),
    Case("UniPCMultistep", UniPC(2, view="eps", lower_final=True),
         {**SD, "predict_x0": False, "final_sigmas_type": "sigma_min"}),
    Case("UniPCMultistep", UniPC(2, lower_final=True),
         {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}),
    Case("DEISMultistep", DEIS(2, "half_log_snr"), SD),
    Case("DEISMultistep", DEIS(3, "half_log_snr"), {**SD, "solver_order": 3}),
    Case("DEISMultistep", DEIS(3, "half_log_snr", lower_final=True), {**SD, "solver_order": 3}, steps=10),
    Case("EulerDiscrete", DDIM(), {**SD, "timestep_spacing": "leading", "steps_offset": 1}),
    Case("EulerDiscrete", DDIM(), SD),
    Case("EulerDiscrete", DDIM(), {**SD, "use_karras_sigmas": True}),
    Case("EulerAncestralDiscrete", DDPM(), {**SD, "timestep_spacing": "trailing"}, noisy=True),
    Case("HeunDiscrete", Heun(), {**SD, "timestep_spacing": "trailing"}, evaluations=2),
    Case("LMSDiscrete", ExponentialAB(4, "eps", "sigma", landing="polynomial"), {**SD, "timestep_spacing": "trailing"}),
    Case("KDPM2Discrete", DPMSolver(2), {**SD, "timestep_spacing": "trailing"}, evaluations=2),
    Case("EDMEuler", DDIM()),
    Case("EDMEuler", DDIM(), {"prediction_type": "v_prediction"}),
    Case("EDMDPMSolverMultistep", DPMSolverPP(2)),
    Case("FlowMatchEulerDiscrete", Euler("t"), {"shift": 3.0}),
    Case("FlowMatchHeunDiscrete", Heun("t"), {"shift": 3.0}, evaluations=2),
]  # fmt: skip


def network(dtype: torch.dtype) -> torch.nn.Module:
    """A small U-Net of theirs, of random weights."""
    torch.manual_seed(0)
    net = library().UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(16, 16), layers_per_block=1,
        norm_num_groups=4, attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return net.to(dtype).eval().requires_grad_(False)


def disagreement(case: Case, dtype: torch.dtype, exact: bool = False) -> float:
    """The largest difference of a state after any step, relative to the largest entry of all states."""
    net, scheduler = network(dtype), getattr(library(), f"{case.name}Scheduler")(**case.options)
    model, steps = from_diffusers((net, scheduler)), case.steps
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        grid = model.grid(steps)
        scheduler.set_timesteps(steps)
    if exact:
        _exactly(scheduler, model, grid.times)
    z = torch.randn((steps + 2, 2, 3, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    x_T = z[-1] * getattr(scheduler, "init_noise_sigma", 1.0)
    scaled = _on_ve_scale(scheduler)
    theirs = _their_states(case, scheduler, net, x_T.to(dtype), z)
    ours = sample(
        model,
        x_T * float(model.sde.alpha(grid.times[0])) if scaled else x_T,
        case.solver,
        grid=grid,
        noise=(lambda row, x: z[row]) if case.noisy else None,
        trajectory=True,
    ).trajectory
    assert ours is not None
    if scaled:
        alpha = model.sde.alpha(grid.times)
        ours = ours / alpha.reshape(-1, 1, 1, 1, 1)
    count = min(len(ours), len(theirs) + 1)
    found = torch.stack(theirs[: count - 1])
    return float((found.double() - ours[1:count].double()).abs().max() / ours.double().abs().max())


def _adapter(model: Any) -> Any:
    """The network's denoiser, below what clips it."""
    while isinstance(model, Wrapper):
        model = model.denoiser
    return model


def _on_ve_scale(scheduler: Any) -> bool:
    """Whether its state is x_0 + sigma eps of a chain, as Euler's, Heun's, LMS' and KDPM2's is."""
    sigmas, predicts = hasattr(scheduler, "sigmas"), hasattr(scheduler, "alphas_cumprod")
    return sigmas and predicts and not hasattr(scheduler, "_sigma_to_alpha_sigma_t")


def _exactly(scheduler: Any, model: Any, times: Tensor) -> None:
    """Their tables in float64, on our times."""
    if hasattr(scheduler, "alphas_cumprod"):
        abar = model.sde.alpha(torch.arange(1.0, model.sde.steps + 1, dtype=torch.float64)) ** 2 \
            if hasattr(model.sde, "steps") else scheduler.alphas_cumprod.double()  # fmt: skip
        scheduler.alphas_cumprod = abar
        scheduler.one = torch.tensor(1.0, dtype=torch.float64)
        if hasattr(scheduler, "final_alpha_cumprod"):
            whole = float(scheduler.final_alpha_cumprod) == 1
            scheduler.final_alpha_cumprod = scheduler.one if whole else abar[0]
    if not hasattr(scheduler, "sigmas"):
        return
    u = times if isinstance(model.sde, FlowSDE | EDMSDE) else (-model.sde.half_log_snr(times)).exp()
    twice = len(scheduler.sigmas) > len(u) + 2
    if twice:
        u = torch.cat([u[:1], u[1:-1].repeat_interleave(2), u[-1:]])
    if hasattr(scheduler, "sigmas_interpol"):
        levels = (-model.sde.half_log_snr(times)).exp()
        half = (levels[:-1] * levels[1:]).sqrt()
        scheduler.sigmas_interpol = torch.cat([half[:1], half[:1], half[1:].repeat_interleave(2), half[-1:]])
    told = _adapter(model).label(times[:-1]).double()
    old = scheduler.sigmas
    if len(u) < len(old):  # a last step that goes nowhere
        u = torch.cat([u, u[-1:]])
        told = _adapter(model).label(times).double()
    scheduler.sigmas = u
    if not twice:
        scheduler.timesteps = told[: len(scheduler.timesteps)]
    elif not hasattr(scheduler, "sigmas_interpol"):
        scheduler.timesteps = torch.cat([told[:1], told[1:].repeat_interleave(2)])[: len(scheduler.timesteps)]


def _their_states(case: Case, scheduler: Any, net: torch.nn.Module, x: Tensor, z: Tensor) -> list[Tensor]:
    """The state after each step, as their pipelines drive it."""
    module = importlib.import_module(type(scheduler).__module__)
    drawn = iter(z)
    original: Callable[..., Tensor] | None = getattr(module, "randn_tensor", None)
    states: list[Tensor] = []
    if case.noisy:
        module.randn_tensor = lambda shape, **_: next(drawn)
    accepts = inspect.signature(scheduler.step).parameters
    options = {key: value for key, value in case.step.items() if key in accepts}
    try:
        for i, t in enumerate(scheduler.timesteps):
            seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            out = net(seen.to(x.dtype), t.reshape(1).expand(len(x))).sample
            x = scheduler.step(out, t, x, **options).prev_sample
            last = i == len(scheduler.timesteps) - 1
            if case.evaluations == 1 or i % 2 == 1 or last:
                states.append(x)
    finally:
        if original is not None:
            module.randn_tensor = original
    return states


def agreement() -> Iterator[tuple[str, str, float, float, float]]:
    """A row per case: theirs, ours, and the largest differences in float32, in float64, and with exact tables."""
    runs = ((torch.float32, False), (torch.float64, False), (torch.float64, True))
    for case in CASES:
        yield str(case), call_of(case.solver), *(disagreement(case, *run) for run in runs)  # type: ignore[misc]


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    diffusers = library()
    diffusers.logging.set_verbosity_error()
    print(f"diffusers {diffusers.__version__}, torch {torch.__version__}, 20 steps, UNet2DModel of random weights\n")
    print("| theirs | ours | float32 | float64 | exact tables |\n|---|---|---|---|---|")
    for theirs, ours, *found in agreement():
        print(f"| `{theirs}` | `{ours}` | " + " | ".join(f"{x:.1e}" for x in found) + " |", flush=True)


if __name__ == "__main__":
    main()
