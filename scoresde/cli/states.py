"""Runs of whole states: how they are drawn from, where that differs from numbers."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torch import Tensor

from scoresde.categorical import STATE_SOLVERS, Ancestral, CategoricalDenoiser, StateSolver
from scoresde.checks import check_count, check_option, check_whole
from scoresde.cli.drawing import DrawOptions, Recipe, StepOptions
from scoresde.cli.models import Model
from scoresde.cli.texts import null_of_run
from scoresde.data import pictured
from scoresde.guidance import ClassifierFree

__all__ = ["as_items", "state_recipe"]

_TAKEN = ("seed", "label", "guidance", "batch_size")  # of the arguments that say how samples are drawn


def state_recipe(options: DrawOptions, steps: StepOptions, model: Model) -> Recipe:
    """How the arguments want samples of whole states drawn.

    Raises:
        ValueError: if they do not go together, or are of numbers alone.
    """
    for f in fields(options):
        if f.name not in _TAKEN and getattr(options, f.name) not in (None, False):
            raise ValueError(f"--{f.name.replace('_', '-')} is for models of numbers, and the run is of whole states")
    if steps.grid != "default":
        raise ValueError(f"--grid {steps.grid} is for models of numbers: steps of whole states are uniform in time")
    counts = steps.given("nfe", "steps") or {"steps": 100}
    check_count(batch_size=options.batch_size, **counts)
    check_whole(seed=options.seed)
    if len(counts) == 2:
        raise ValueError("give one of --nfe and --steps")
    check_option(STATE_SOLVERS, solver=steps.solver or "ancestral")
    solver: StateSolver = STATE_SOLVERS[steps.solver]() if steps.solver else Ancestral()
    made: Any = Recipe(model, model.denoiser, solver, counts, options.seed, model.class_of(options.label))  # type: ignore[arg-type]
    denoiser: Any = model.denoiser
    if (guidance := options.guidance) is not None:
        if not (cond := made.cond(range(1))) or model.blind is False:
            raise ValueError(f"--guidance {guidance.weight:g}: the network was never trained with a class and without")
        if guidance.interval is not None or guidance.rule is not None:
            raise ValueError("--guidance-interval and --guidance-rule are for models of numbers")
        null = null_of_run(cond, model.about.num_classes, None)
        denoiser = ClassifierFree(denoiser, guidance.weight, null=null)
    solver.grid(denoiser.process, counts.get("steps", 1))  # says if a chain has fewer
    return Recipe(model, denoiser, solver, counts, options.seed, made.label)  # type: ignore[arg-type]


def as_items(made: Recipe, x: Tensor) -> Tensor:
    """States as samples are written: of pictures in [-1, 1], else as they are."""
    denoiser: Any = made.model.denoiser
    assert isinstance(denoiser, CategoricalDenoiser)
    return pictured(x, denoiser.process.states) if made.model.about.pictures else x
