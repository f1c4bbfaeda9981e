"""Schedulers as diffusers has them, objects with set_timesteps and step, driven on any sigmas.

They stand on VP scales, x = alpha (x_0 + u eps), alpha = 1 / sqrt(1 + u^2), or on VE scales, x = x_0 + u eps; u is what
they call sigma. After set_timesteps the noise levels asked for are written over theirs, in the dtype of the state, so
that they compute in it as they do in use, and nothing is lost to integer timesteps or a table of 1000 betas. An object
serves all runs of a form, one for each kind of prediction.

The step to u = 0 is the scheduler's own, but where it has none: those that read `sigmas` on VP scales without
final_sigmas_type="zero" are led to the last level above it, and the mean there is the last step.

Clipping and thresholding, which are of the data and not of the sampler, are off unless the options ask for them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from scoresde.auditing.model import Form, Model, Run, generators
from scoresde.checks import ArgumentError, check_keys
from scoresde.exact import Gaussian
from scoresde.schedules import EDMSDE

__all__ = ["called", "finished", "is_scheduler", "scheduler_form", "vp"]

_TYPES = {"x0": "sample", "eps": "epsilon", "v": "v_prediction"}
_CLIPS = {"clip_sample": False, "thresholding": False}

Told = Callable[[Tensor, Tensor], Tensor]
"""(y, u) to what the scheduler wants to know at y = x_0 + u eps."""

Drive = Callable[[Any, Told, Tensor, Tensor, Mapping[str, Any]], Tensor]
"""(scheduler, told, y, u, options of its step) to y at the last u."""


def vp(u: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) on VP scales at noise levels u."""
    root = torch.hypot(u, torch.ones_like(u))
    return 1 / root, u / root


def called(name: str, options: Mapping[str, Any]) -> str:
    """A name with its options, as a call; functions among them by their names."""
    told = (f"{k}={getattr(v, '__name__', type(v).__name__) if callable(v) else repr(v)}" for k, v in options.items())
    return f"{name}({', '.join(told)})" if options else name


def finished(run: Run) -> Run:
    """For samplers without a step to sigma = 0: the mean at the last sigma above it is that step."""

    def to_zero(model: Model, x_T: Tensor, sigmas: Tensor, nfe: int) -> Any:
        if sigmas[-1] > 0:
            return run(model, x_T, sigmas, nfe)
        x = run(model, x_T, sigmas[:-1], nfe - 1) if nfe > 1 else x_T
        return model.view("x0", x, sigmas[-2])

    return to_zero


def is_scheduler(sampler: Any) -> bool:
    """Whether it has set_timesteps and step: a class or an object."""
    return callable(getattr(sampler, "set_timesteps", None)) and callable(getattr(sampler, "step", None))


def scheduler_form(
    sampler: Any,
    options: Mapping[str, Any],
    claims: Callable[[str, Mapping[str, Any]], Any],
    afresh: bool = False,
) -> Form:
    """A scheduler's form, on sigmas.

    Args:
        sampler: the class, or an object.
        options: of its constructor (config), and of its step: eta of DDIM, order of LMS.
        claims: the order that a name claims with options.
        afresh: a new object for each run, so that none can leave anything to the next.

    Raises:
        ArgumentError: if it cannot be driven, or has no such options.
    """
    cls: Any = sampler if inspect.isclass(sampler) else type(sampler)
    if not callable(getattr(cls, "from_config", None)):
        raise ArgumentError(
            f"sampler={cls.__name__}: expected a scheduler with config and from_config, as diffusers' have"
        )
    constructor, stepped = inspect.signature(cls).parameters, inspect.signature(cls.step).parameters
    try:
        check_keys(cls.__name__, options, [*constructor, *stepped])
        own = {k: v for k, v in options.items() if k in constructor}
        unclipped = {k: v for k, v in _CLIPS.items() if k in constructor}
        given = cls.from_config({} if cls is sampler else sampler.config, **unclipped | own)
        config = given.config  # before set_timesteps, by which one changes it
        drive, to_zero = _driven(given)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ArgumentError(f"{cls.__name__}: ", str(error)) from error
    step = {k: v for k, v in options.items() if k not in constructor}

    def objects() -> Callable[[str], Any]:
        """The object for a kind of prediction, made once."""
        made: dict[str, Any] = {}

        def of(kind: str) -> Any:
            if afresh or kind not in made:
                made[kind] = cls.from_config(config, **{"prediction_type": _TYPES[kind]} if kind in kinds else {})
            return made[kind]

        return of

    def run_of(of: Callable[[str], Any], kind: str | None = None) -> Run:
        def run(model: Model, x_T: Tensor, sigmas: Tensor, nfe: int) -> Tensor:
            view = kind or (model.predicts if model.predicts in predicts else predicts[0])
            scheduler = of(view)
            return drive(scheduler, partial(_told, model, view, scheduler), x_T, sigmas, step)

        return run if to_zero else finished(run)

    kinds = _kinds(constructor)
    predicts, deterministic = _tried(lambda kind: run_of(objects(), kind), kinds or ["v"], cls.__name__)
    trained = kind if (kind := _kind_of(config)) in predicts else predicts[0]
    order = None
    if deterministic:
        order = claims(cls.__name__.lower(), {"order": _order(config, stepped), "eta": 0.0, **step})
    return Form(
        called(cls.__name__, options),
        run_of(objects()),
        "sigmas",
        order,
        predicts,
        partial(_as_used, objects()(trained), trained, step) if hasattr(given, "alphas_cumprod") else None,
        leaves=_left(cls.from_config(config)),
    )


def _left(scheduler: Any) -> str:
    """What set_timesteps changes in the configuration of an object that was never used."""
    before = dict(scheduler.config)
    scheduler.set_timesteps(10)
    after = dict(scheduler.config)
    changed = sorted(key for key in {*before, *after} if repr(before.get(key)) != repr(after.get(key)))
    return ", ".join(f"{key} from {before.get(key)} to {after.get(key)}" for key in changed)


def _kind_of(config: Mapping[str, Any]) -> str | None:
    """The view that a config's prediction_type is."""
    return next((kind for kind, name in _TYPES.items() if name == config.get("prediction_type")), None)


def _kinds(constructor: Mapping[str, inspect.Parameter]) -> list[str]:
    """Views that a constructor may be told to be given; all, unless it lists them."""
    if "prediction_type" not in constructor:
        return []
    listed = get_args(constructor["prediction_type"].annotation)
    return [kind for kind, name in _TYPES.items() if not listed or name in listed]


def _order(config: Mapping[str, Any], stepped: Mapping[str, inspect.Parameter]) -> Any:
    """What it says of its order: in its config, or as an option of its step."""
    said = config.get("solver_order", config.get("predictor_order"))
    return stepped["order"].default if said is None and "order" in stepped else said


def _tried(run_of: Callable[[str], Run], kinds: list[str], name: str) -> tuple[tuple[str, ...], bool]:
    """The views with which a run of three steps does not refuse, and whether another seed leaves it as it is."""
    model = Model(Gaussian(torch.zeros(1), std=1.0).denoiser(EDMSDE()))
    sigmas = torch.tensor([4.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    found: list[str] = []
    ends: list[Tensor] = []
    with generators(), torch.no_grad():
        for kind in kinds:
            try:
                for seed in (0, 1) if not found else (0,):
                    torch.manual_seed(seed)
                    ends.append(run_of(kind)(model, sigmas[:1, None], sigmas, 3))
            except (NotImplementedError, TypeError, ValueError) as error:
                refusal = error
            else:
                found.append(kind)
    if not found:
        raise ArgumentError(f"{name} cannot be driven: ", str(refusal)) from refusal
    return tuple(found), torch.equal(*ends[:2])


def _told(model: Model, kind: str, scheduler: Any, y: Tensor, u: Tensor) -> Tensor:
    """The view as the scheduler wants it. eps and x_0 are the same on all scales; v on VP scales is alpha eps - sigma
    x_0 = alpha (eps - u x_0), alpha times that on VE scales. The networks of EDM are told of by their preconditioning.
    """
    if hasattr(scheduler, "precondition_outputs"):
        zero = torch.zeros_like(y)
        skipped = scheduler.precondition_outputs(y, zero, u)
        return (model.view("x0", y, u) - skipped) / scheduler.precondition_outputs(zero, torch.ones_like(y), u)
    said = model.view(kind, y, u)
    return said * vp(u)[0] if kind == "v" else said


# --- the families -----------------------------------------------------------------------------------------------------


def _driven(scheduler: Any) -> tuple[Drive, bool]:
    """How it is driven, by what it has, and whether it can step to u = 0 itself.

    Raises:
        ValueError: if it is of none of the kinds that are known here.
    """
    config = scheduler.config
    if config.get("use_flow_sigmas"):
        raise ValueError("use_flow_sigmas puts it on the scales of flows, which are not driven here")
    if "original_inference_steps" in inspect.signature(scheduler.set_timesteps).parameters:
        raise ValueError("it is for distilled networks, and no exact denoiser is one")
    scheduler.set_timesteps(4)
    if scheduler.timesteps[0] < scheduler.timesteps[-1]:
        raise ValueError("it goes from data to noise, and a sampler goes from noise to data")
    if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
        return _by_sigmas, config.get("final_sigmas_type") == "zero"
    if hasattr(scheduler, "sigmas") and (
        hasattr(scheduler, "alphas_cumprod") or hasattr(scheduler, "precondition_outputs")
    ):
        return _by_ve_sigmas, True
    if hasattr(scheduler, "alphas_cumprod"):
        if not config.get("skip_prk_steps", True):
            raise ValueError("its Runge-Kutta start steps between the levels: give skip_prk_steps=True")
        return _by_chain, True
    if hasattr(scheduler, "ets"):
        return _by_betas, True
    raise ValueError("expected one that reads sigmas, alphas_cumprod or betas")


def _by_sigmas(scheduler: Any, told: Told, y: Tensor, u: Tensor, step: Mapping[str, Any]) -> Tensor:
    """DPM-Solver, UniPC, DEIS, SA-Solver: VP scales (EDM's: VE), read from `sigmas`."""
    alpha = torch.ones_like(u) if hasattr(scheduler, "precondition_outputs") else vp(u)[0]
    scheduler.set_timesteps(len(u) - 1)
    scheduler.sigmas, scheduler.timesteps = u.clone(), _labels(scheduler, u[:-1])
    scheduler.num_inference_steps = len(u) - 1
    scheduler.set_begin_index(0)
    x = y * alpha[0]
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(told(x / alpha[i], u[i]), t, x, **step).prev_sample
    return x / alpha[-1]


def _by_ve_sigmas(scheduler: Any, told: Told, y: Tensor, u: Tensor, step: Mapping[str, Any]) -> Tensor:
    """Euler, LMS and Euler ancestral on VE scales, with a sigma a step; Heun, KDPM2 and DPM-Solver SDE with two."""
    scheduler.set_timesteps(len(u) - 1)
    seen = u[:-1]
    if hasattr(scheduler, "state_in_first_order"):
        low = u[1:]
        if hasattr(scheduler, "sigmas_up"):
            up = (u[1:] ** 2 * (u[:-1] ** 2 - u[1:] ** 2) / u[:-1] ** 2).sqrt()
            low = (u[1:] ** 2 - up**2).sqrt()
            scheduler.sigmas_up, scheduler.sigmas_down = _twice(up), _twice(low)
        middle = (u[:-1] * low).sqrt()
        if hasattr(scheduler, "sigmas_up"):
            scheduler.sigmas_interpol = _twice(middle)
        elif hasattr(scheduler, "sigmas_interpol"):
            scheduler.sigmas_interpol = torch.cat([middle[:1], _twice(middle)[:1], _twice(middle)])
        scheduler.sigmas = _twice(u)
        second = middle if hasattr(scheduler, "sigmas_interpol") or hasattr(scheduler, "noise_sampler_seed") else low
        seen = torch.stack([seen, second], 1).reshape(-1)
    else:
        scheduler.sigmas = u.clone()
    scheduler.timesteps = torch.arange(len(seen), 0, -1).float()
    scheduler.num_inference_steps = len(u) - 1
    scheduler.set_begin_index(0)
    scheduler.is_scale_input_called = True
    for at, t in zip(seen, scheduler.timesteps, strict=True):
        if at == 0:  # the second stage of a step to zero
            break
        y = scheduler.step(told(y, at), t, y, **step).prev_sample
    return y


def _twice(values: Tensor) -> Tensor:
    """The values of steps of two stages, by index of the stage: the first once, the others twice, the last again."""
    return torch.cat([values[:1], values[1:].repeat_interleave(2), values[-1:]])


def _by_chain(scheduler: Any, told: Told, y: Tensor, u: Tensor, step: Mapping[str, Any]) -> Tensor:
    """DDIM, DDPM, PNDM: VP scales, read from `alphas_cumprod` at integer times. They get a chain with a node a step."""
    N, (alpha, _) = len(u) - 1, vp(u)
    nodes = {"num_train_timesteps": N, "timestep_spacing": "leading", "steps_offset": 0}
    scheduler.register_to_config(**{key: value for key, value in nodes.items() if key in scheduler.config})
    scheduler.alphas_cumprod = (alpha[:-1] ** 2).flip(0)
    scheduler.final_alpha_cumprod = scheduler.one = alpha[-1] ** 2
    scheduler.alphas = (alpha[:-1] / alpha[1:]).square().flip(0)
    scheduler.betas = 1 - scheduler.alphas
    scheduler.set_timesteps(N)
    x = y * alpha[0]
    for t in scheduler.timesteps.tolist():
        at = N - 1 - t
        x = scheduler.step(told(x / alpha[at], u[at]), t, x, **step).prev_sample
    return x / alpha[-1]


def _by_betas(scheduler: Any, told: Told, y: Tensor, u: Tensor, step: Mapping[str, Any]) -> Tensor:
    """IPNDM: VP scales, reads `betas` and `alphas` as sigma and alpha, and wants v."""
    alpha, sigma = vp(u)
    scheduler.set_timesteps(len(u) - 1)
    scheduler.alphas, scheduler.betas, scheduler.timesteps = alpha, sigma, torch.arange(len(u) - 1, 0, -1)
    scheduler.set_begin_index(0)
    x = y * alpha[0]
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(told(x / alpha[i], u[i]), t, x, **step).prev_sample
    return x / alpha[-1]


# --- as a user has it -------------------------------------------------------------------------------------------------


def _table(scheduler: Any) -> tuple[Tensor, Tensor]:
    """Labels 0, 1, ... of its training and log u of each, float64."""
    trained = scheduler.alphas_cumprod.double()
    return torch.arange(len(trained), dtype=torch.float64), ((1 - trained) / trained).log() / 2


def _labels(scheduler: Any, u: Tensor) -> Tensor:
    """The labels of noise levels, between and within those of its training, which some look at; else a countdown."""
    if not hasattr(scheduler, "alphas_cumprod"):
        return torch.arange(len(u), 0, -1).float()
    labels, levels = _table(scheduler)
    return _interpolated(u.double().log(), levels, labels)


def _interpolated(x: Tensor, points: Tensor, values: Tensor) -> Tensor:
    """Linear between increasing points, constant beyond them."""
    x = x.clamp(points[0], points[-1])
    i = torch.searchsorted(points, x).clamp(1, len(points) - 1)
    share = (x - points[i - 1]) / (points[i] - points[i - 1])
    return values[i - 1] + share * (values[i] - values[i - 1])


def _stands(scheduler: Any, i: int) -> float | None:
    """The sigma for which it takes the answer at evaluation i; None if it has no sigmas."""
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None:
        return None
    if getattr(scheduler, "state_in_first_order", True):
        return float(sigmas[i])
    if hasattr(scheduler, "sigmas_interpol"):
        return float(scheduler.sigmas_interpol[i - hasattr(scheduler, "sigmas_up")])
    between = hasattr(scheduler, "noise_sampler_seed") and sigmas[i] > 0
    return float((sigmas[i - 1] * sigmas[i]).sqrt() if between else sigmas[i])


def _as_used(
    scheduler: Any, kind: str, step: Mapping[str, Any], model: Model, noise: Tensor, steps: int
) -> tuple[Tensor, list[float], list[float], list[float] | None]:
    """The scheduler on its own timesteps, around a network that was trained on its table: it believes the label, and
    takes its input to stand, on VP scales, at the level that the label has there.

    Returns:
        x at the end; the labels; the u of each; the u that the scheduler steps from, or None where it has none.
    """
    table = _table(scheduler)
    scheduler.set_timesteps(steps)
    x = noise * scheduler.init_noise_sigma
    labels: list[float] = []
    levels: list[float] = []
    stood: list[float | None] = []
    for i, t in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(x, t)
        stood.append(_stands(scheduler, i))
        u = _interpolated(t.double(), *table).exp()
        labels.append(float(t))
        levels.append(float(u))
        x = scheduler.step(_told(model, kind, scheduler, seen / vp(u)[0], u), t, x, **step).prev_sample
    known = [at for at in stood if at is not None]
    return x, labels, levels, known if len(known) == len(stood) else None
