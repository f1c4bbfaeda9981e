"""Anyone's sampler in the one form that is audited. It is known by what it can do, and no peer is imported for it.

    ours             a `Solver`, its name or its call: runs by `sample`, on times or on sigmas, with noise of the global
                     generator; it may be told x0, eps, score or v
    schedulers       with set_timesteps and step, as diffusers' are: `scoresde.auditing.schedulers`
    k-diffusion      functions (model, x, sigmas, ...), or (model, x, sigma_min, sigma_max, ...), with options behind
    azula            classes of azula.sample, on the schedule alpha = 1 / sqrt(1 + u^2), sigma = u alpha of levels u
    modules          a class of torch.nn.Module, or a function, of (network, times): what it makes is called with x_T
    functions        of (denoise, x_T, times or sigmas, nfe), instances of modules among them

Samplers that divide by sigma = 0 (azula's Heun and exponential multistep ones, k-diffusion's dpm_fast and dpm_adaptive,
whose grids are their own) are led to the last sigma above it; the mean there is the last step.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from scoresde.auditing.model import PREDICTIONS, Form, Model
from scoresde.auditing.schedulers import called, finished, is_scheduler, scheduler_form, vp
from scoresde.checks import ArgumentError, check_keys, check_option, made_of
from scoresde.denoiser import EpsDenoiser, NetworkDenoiser, ScoreDenoiser, VDenoiser, X0Denoiser
from scoresde.grid import Grid
from scoresde.report import attribute
from scoresde.sampling import sample
from scoresde.solvers.base import Solver
from scoresde.solvers.catalogue import available, solver_of

__all__ = ["claimed_order", "form_of", "k_diffusion_sampling", "load"]


def form_of(
    sampler: Any,
    takes: str | None = None,
    options: Mapping[str, Any] | None = None,
    order: int | None = None,
    name: str | None = None,
) -> Form:
    """The sampler as a `Form`.

    Args:
        sampler: one of those above, or a `Form`.
        takes: "sigmas" or "times", for those that could take either: of a function, what its third parameter is called
            says it too.
        options: of its constructor, or of the function; of a scheduler those of its step besides.
        order: the order that it claims, where its name does not say.
        name: what the page is to call it.

    Raises:
        ArgumentError: if it is none of these, has not the options, or cannot take these times.

    >>> form_of("heun").order, form_of("DDIM(eta=0.5)").order, form_of("dpm++3m-published").name
    (2, None, 'DPMSolverPP(order=3, as_published=True)')
    """
    options = dict(options or {})
    if takes is not None:
        check_option(("sigmas", "times"), takes=takes)
    form = sampler if isinstance(sampler, Form) else _form(sampler, takes, options)
    if takes not in (None, form.takes):
        raise ArgumentError(f"takes={takes!r}: {form.name} takes {form.takes}")
    found = form if order is None else replace(form, order=order)
    return found if name is None else replace(found, name=name)


def _form(sampler: Any, takes: str | None, options: dict[str, Any]) -> Form:
    """By the first kind that it is of."""
    if isinstance(sampler, str):
        sampler = solver_of(sampler)
    made = inspect.isclass(sampler)
    if isinstance(sampler, Solver) or (made and issubclass(sampler, Solver)):
        form = _ours(sampler, takes or "times", options)
    elif is_scheduler(sampler):
        form = scheduler_form(sampler, options, claimed_order)
    elif made and _azula_names(sampler):
        form = _azula(sampler, options)
    elif made and issubclass(sampler, torch.nn.Module):
        form = _made(sampler, takes, options)
    elif callable(sampler) and not made:
        form = _function(sampler, takes, options)
    else:
        given = sampler.__name__ if made else type(sampler).__name__
        raise ArgumentError(
            f"sampler={given}: expected a solver of scoresde, a scheduler with set_timesteps and step, a class of "
            "azula.sample, a torch.nn.Module, or a function (denoise, x_T, times or sigmas, nfe)"
        )
    return replace(form, about=_about(sampler))


def _about(sampler: Any) -> str:
    """Package and version of what it was written in, if it is an installed one."""
    while isinstance(sampler, partial):
        sampler = sampler.func
    module = getattr(sampler, "__module__", None) or type(sampler).__module__
    package = module.split(".")[0]
    try:
        return f"{package} {version(package)}"
    except (PackageNotFoundError, ValueError):
        return ""


def _checked(name: str, make: Callable[[], Any]) -> Any:
    """What it makes; an ArgumentError says what is wrong with its options."""
    try:
        return make()
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"{name}: ", str(error)) from error


# --- ours -------------------------------------------------------------------------------------------------------------

_NETWORKS: dict[str, type[NetworkDenoiser]] = {
    network.predicts: network for network in (X0Denoiser, EpsDenoiser, ScoreDenoiser, VDenoiser)
}


def _ours(sampler: Solver | type[Solver], takes: str, options: dict[str, Any]) -> Form:
    if isinstance(sampler, type):
        solver: Solver = _checked(sampler.__name__, partial(made_of, sampler.__name__, sampler, options))
    elif options:
        known: Any = sampler  # a dataclass, as all solvers are
        solver = _checked(repr(sampler), partial(replace, known, **options))
    else:
        solver = sampler

    def run(model: Model, x_T: Tensor, times: Tensor, nfe: int) -> tuple[Tensor, int]:
        sde = model.sde
        # Times in float32 may have been rounded out of the SDE.
        grid = Grid(sde, times.to("cpu", torch.float64).clamp(0.0, sde.t_max))
        # The global generator, seen as a source: a Brownian path asks it for seeds.
        generator = torch.cuda.default_generators[x_T.device.index or 0] if x_T.is_cuda else torch.default_generator
        solution = sample(_NETWORKS[model.predicts](model, sde), x_T, solver, grid=grid, generator=generator)
        return solution.x, solution.nfe

    entry = next((entry for entry in available() if entry.solver == solver), None)
    order = entry.order if entry is not None and entry.deterministic else None
    return Form(repr(solver) if entry is None else entry.call, run, takes, order, PREDICTIONS)


# --- functions, k-diffusion's among them ------------------------------------------------------------------------------


def _function(sampler: Callable[..., Any], takes: str | None, options: dict[str, Any]) -> Form:
    inner = sampler
    bound: dict[str, Any] = {}
    while isinstance(inner, partial):
        bound = {**inner.keywords, **bound}
        inner = inner.func
    name = getattr(inner, "__name__", type(inner).__name__)
    name = name if name.isidentifier() else type(inner).__name__
    shown = called(name, {**bound, **options})
    known = _parameters(sampler)
    if known is None:  # a built-in: taken at its word
        return Form(shown, partial(sampler, **options), takes or _unsaid(shown))
    if not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        _checked("options", partial(check_keys, name, options, known))
    places = [p for p in known.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names, needed = [p.name for p in places], sum(p.default is p.empty and p.name not in options for p in places)
    options = options | ({"disable": True} if "disable" in known and "disable" not in bound | options else {})
    defaults = {p.name: p.default for p in known.values() if p.default is not p.empty}
    order = claimed_order(name, {**defaults, **bound, **options})

    if names[2:4] == ["sigma_min", "sigma_max"]:
        given = 5 if len(names) > 4 and places[4].default is inspect.Parameter.empty else 4

        def to_end(model: Model, x_T: Tensor, sigmas: Tensor, nfe: int) -> Any:
            return sampler(*(model, x_T, sigmas[-1], sigmas[0], nfe)[:given], **options)

        return Form(shown, finished(to_end), "sigmas", order)
    if names[2:3] == ["sigmas"] and needed <= 3 and names[3:4] != ["nfe"]:

        def on_sigmas(model: Model, x_T: Tensor, sigmas: Tensor, nfe: int) -> Any:
            return sampler(model, x_T, sigmas, **options)

        return Form(shown, on_sigmas, "sigmas", order)
    several = any(p.kind is p.VAR_POSITIONAL for p in known.values())
    if needed == len(places) == 2 and not several:
        return _made(sampler, takes, options)
    if not several and not needed <= 4 <= len(places):
        raise ArgumentError(
            f"sampler={shown}: expected a function (denoise, x_T, times or sigmas, nfe), (model, x, sigmas, ...) or "
            f"(network, times), this one is ({', '.join(names)})"
        )
    said = next((word for word in ("sigmas", "times") if names[2:3] and word[:-1] in names[2]), None)
    return Form(shown, partial(sampler, **options), takes or said or _unsaid(shown))


def _parameters(sampler: Callable[..., Any]) -> Mapping[str, inspect.Parameter] | None:
    """Of a call; None where Python cannot tell."""
    try:
        return inspect.signature(sampler.forward if isinstance(sampler, torch.nn.Module) else sampler).parameters
    except (TypeError, ValueError):
        return None


def _unsaid(name: str) -> str:
    raise ArgumentError(f"give takes='sigmas' or takes='times': {name} does not say what its third argument is")


def claimed_order(name: str, options: Mapping[str, Any]) -> int | None:
    """The order of convergence that a function's name and options claim; None where it draws noise, steps on a grid of
    its own, or says nothing.

    >>> claimed_order("sample_dpmpp_3m_sde", {"eta": 0.0}), claimed_order("sample_lms", {"order": 4})
    (3, 4)
    >>> claimed_order("sample_dpmpp_3m_sde", {"eta": 1.0}), claimed_order("sample_heun", {"s_churn": 0.0})
    (None, 2)
    """
    noisy = any(options.get(key) for key in ("eta", "s_churn", "tau"))
    if noisy or "adaptive" in name or (any(word in name for word in ("sde", "ancestral")) and options.get("eta") != 0):
        return None
    if isinstance(order := options.get("order"), int):
        return order
    if digit := re.search(r"(?<!bh)[1-9]", name):
        return int(digit[0])
    return next((n for word, n in (("heun", 2), ("midpoint", 2), ("euler", 1), ("ddim", 1)) if word in name), None)


def load(text: str, option: str = "sampler") -> Any:
    """What MODULE:NAME is, k_diffusion.sampling:sample_heun say (`scoresde.report.attribute`); the name of a solver of
    this library as it is.

    Raises:
        ImportError, ValueError: as `attribute` does.
    """
    if ":" not in text:
        return text
    try:
        return attribute(option, text)[0]
    except (ImportError, ValueError):
        if text.partition(":")[0] != "k_diffusion.sampling" or importlib.util.find_spec("k_diffusion") is None:
            raise
    k_diffusion_sampling()
    return attribute(option, text)[0]


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
    package, utils = types.ModuleType("k_diffusion"), types.ModuleType("k_diffusion.utils")
    package.__path__, package.__spec__ = list(spec.submodule_search_locations or []), spec
    utils.append_dims = lambda x, ndim: x.reshape(*x.shape, *[1] * (ndim - x.ndim))  # type: ignore[attr-defined]
    package.utils = utils  # type: ignore[attr-defined]
    sys.modules |= {"k_diffusion": package, "k_diffusion.utils": utils}
    return importlib.import_module("k_diffusion.sampling")


# --- modules ----------------------------------------------------------------------------------------------------------


class _Network(torch.nn.Module):
    """The model as a network."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Any, **cond: Any) -> Tensor:
        return self.model(x, t, **cond)


def _made(make: Callable[..., Any], takes: str | None, options: dict[str, Any]) -> Form:
    """What is made of (network, times), for each run anew."""
    name, known = getattr(make, "__name__", type(make).__name__), _parameters(make) or {}
    if not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        _checked("options", partial(check_keys, name, options, known))
    said = next((word for word in ("sigmas", "times") if word in known), None)

    def run(model: Model, x_T: Tensor, times: Tensor, nfe: int) -> Any:
        return make(_Network(model), times, **options)(x_T)

    return Form(called(name, options), run, takes or said or _unsaid(name))


# --- azula ------------------------------------------------------------------------------------------------------------


def _azula_names(sampler: type) -> list[str]:
    """Names of the classes of azula.sample that it is or descends from."""
    return [c.__name__ for c in sampler.__mro__ if c.__module__.startswith("azula.sample") and c.__name__ != "Sampler"]


class _Indexed:
    """A denoiser as azula's samplers call it; its time is the index into the grid."""

    def __init__(self, model: Model, sigmas: Tensor) -> None:
        self.model, self.sigmas = model, sigmas
        self.alpha, self.sigma = vp(sigmas)

    def schedule(self, t: Tensor) -> tuple[Tensor, Tensor]:
        i = t.round().long().to(self.alpha.device)
        return self.alpha[i], self.sigma[i]

    def __call__(self, x: Tensor, t: Tensor, **ignored: Any) -> Any:
        i = round(float(t))
        return SimpleNamespace(mean=self.model(x / self.alpha[i], self.sigmas[i]))


def _azula(sampler: type, options: dict[str, Any]) -> Form:
    names = " ".join(_azula_names(sampler))
    name = called(sampler.__name__, options)
    made: Callable[..., Any] = partial(sampler, silent=True, start=0.0, dtype=torch.float64, **options)
    known = _checked(name, partial(made, None))  # a denoiser is looked at when it is asked

    def run(model: Model, x_T: Tensor, sigmas: Tensor, nfe: int) -> Tensor:
        # From 0 to N in N steps: azula's own linspace then runs through the grid.
        indexed = _Indexed(model, sigmas)
        x: Tensor = made(indexed, stop=float(nfe), steps=nfe)(x_T * indexed.alpha[0])
        return x / indexed.alpha[-1]

    order = getattr(known, "order", None)
    if order is None and not getattr(known, "eta", 0.0):
        order = next((n for word, n in (("DDIM", 1), ("Euler", 1), ("Heun", 2)) if word in names), None)
    return Form(name, finished(run) if "EAB" in names or "Heun" in names else run, "sigmas", order)
