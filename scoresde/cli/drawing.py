"""Samples from a model, in batches: sample i is a function of the seed and i alone, whatever the batch size, and on any
number of processes."""

from __future__ import annotations

import argparse
import ast
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm.auto import tqdm

from scoresde import solvers
from scoresde.checks import check_count, check_option
from scoresde.cli.models import Model
from scoresde.data import TrainingData, nothing, scaled
from scoresde.denoiser import Denoiser
from scoresde.errors import NonFiniteError, some
from scoresde.grid import Grid
from scoresde.guidance.classifier_free import ClassifierFree
from scoresde.levels import to_levels
from scoresde.noise import derive_seed
from scoresde.sampling import sample
from scoresde.solvers import OptimalVariance, Solver, available
from scoresde.training import parallel
from scoresde.variance import AnalyticDenoiser, VarianceTable
from scoresde.wrappers import Clip

__all__ = [
    "GRIDS",
    "SOLVERS",
    "Recipe",
    "add_draw_arguments",
    "add_solver_arguments",
    "add_step_arguments",
    "draw",
    "draw_all",
    "gathered",
    "on_grid",
    "recipe",
    "rounded",
    "share",
    "solver_of",
]

SOLVERS = {entry.name: entry for entry in available()}
ALIASES = {"unipc": "unipc3", "dpm++": "dpm++2m", "deis": "deis3", "ipndm": "ipndm4"}
GRIDS = ("default", "uniform", "quadratic", "log_snr", "karras", "power", "strided")


def solver_of(text: str) -> Solver:
    """The solver of a name that `scoresde solvers` lists, or of a call: unipc3, ddim, 'DDIM(eta=0.2)'.

    Raises:
        ValueError: if there is none.

    >>> solver_of("DDIM(0.2)"), solver_of("heun")
    (DDIM(eta=0.2), Heun(variable='sigma'))
    """
    if (name := ALIASES.get(text, text)) in SOLVERS:
        return SOLVERS[name].solver
    with suppress(SyntaxError, ValueError, AttributeError):
        call = ast.parse(text.strip(), mode="eval").body
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in solvers.__all__:
            args = [ast.literal_eval(arg) for arg in call.args]
            options = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
            try:
                made = getattr(solvers, call.func.id)(*args, **options)
            except (TypeError, ValueError) as error:
                raise ValueError(f"--solver {text}: {error}") from error
            if isinstance(made, Solver):
                return made
    raise ValueError(f"--solver {text}: expected a call, 'DDIM(eta=0.2)' say, or one of {', '.join(SOLVERS)}")


@dataclass(frozen=True)
class Recipe:
    """How samples are drawn.

    Attributes:
        model: from which.
        denoiser: the model's, perhaps wrapped.
        solver: with what.
        options: of `sample`: steps, nfe or a grid.
        seed: of all samples.
        label: the class of all (K, of K classes: none), or None: the classes in turn.
        told: items with their conditions, where the network is told some: sample i has those of item i, and where
            there are too few they begin again; its class, too, unless there is a label.
    """

    model: Model
    denoiser: Denoiser
    solver: Solver
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    label: int | None = None
    told: TrainingData | None = None

    def cond(self, items: range) -> dict[str, Tensor]:
        """What the network is told for the samples of these numbers."""
        cond = self.model.labels(self.label, items)
        if self.told is not None:
            which = torch.tensor([i % len(self.told) for i in items], dtype=torch.long, device="cpu")
            own = {key: value.to(self.denoiser.device) for key, value in self.told.batch(which).cond.items()}
            cond = {**cond, **own} if self.label is None else {**own, **cond}
        return cond

    def labels(self, items: range) -> Tensor | None:
        """The classes of the samples of these numbers, or None."""
        if self.label is not None and self.label == self.model.about.num_classes:
            return None
        if self.told is None or self.told.labels is None or self.label is not None:
            return self.model.labels(self.label, items).get("label")
        which = torch.tensor([i % len(self.told) for i in items], dtype=torch.long, device="cpu")
        return self.told.labels[which]

    def __call__(self, items: range) -> Tensor:
        """The samples of these numbers, on the denoiser's device.

        Raises:
            NonFiniteError: naming them, if some are not finite.
            ArithmeticError: if an adaptive solver's budget ran out.
        """
        cond = self.cond(items)
        seeds = [derive_seed(self.seed, i) for i in items]
        shape = (len(items), *self.model.about.shape)
        try:
            found = sample(self.denoiser, shape, self.solver, seed=seeds, cond=cond, **self.options)
        except NonFiniteError as stop:
            samples = [items[i] for i in stop.samples]
            where = "" if stop.step is None else f" in step {stop.step}, at t = {stop.time:.6g}"
            text = f"samples {some(samples)} became non-finite{where}"
            raise NonFiniteError(text, stop.step, stop.time, samples) from stop
        if found.status != "complete":
            raise ArithmeticError(f"the budget of {found.nfe} evaluations ran out at t = {found.t:.4g}: raise --nfe")
        return found.x

    def describe(self) -> dict[str, str]:
        """What tells it from others."""
        options = {name: str(value) for name, value in self.options.items()}
        return {
            **self.model.made_for,
            "sampled from": repr(self.denoiser),
            "solver": repr(self.solver),
            **options,
            "seed": str(self.seed),
            "class": "in turn" if self.label is None else str(self.label),
            **({} if self.told is None else {"conditions of": self.told.fingerprint}),
        }


def add_solver_arguments(parser: argparse.ArgumentParser, n: int = 64) -> None:
    """How many samples, and how they are drawn."""
    group = parser.add_argument_group("the samples")
    group.add_argument("--n", "--number", type=int, default=n, metavar="N", help=f"how many ({n})")
    add_step_arguments(group)
    add_draw_arguments(group)


def add_step_arguments(group: Any, solver: str | None = "unipc3", defaults: tuple[str, str] = ("unipc3", "20")) -> None:
    """The solver and its steps.

    Args:
        group: of arguments.
        solver: the default.
        defaults: in words, of the solver and of --nfe.
    """
    add, (its, nfe) = group.add_argument, defaults
    add("--solver", default=solver, help=f"a name from `scoresde solvers`, or a call, 'DDIM(eta=0.2)' ({its})")
    add("--nfe", type=int, help=f"evaluations of the network ({nfe}, unless --steps; a budget for adaptive solvers)")
    add("--steps", type=int, help="steps, instead of --nfe")
    add("--grid", choices=GRIDS, default="default", help="spacing of the steps (the solver's own)")


def add_draw_arguments(group: Any, conditions: bool = True) -> None:
    """What does not depend on the solver; with --condition-from and --measured, if conditions."""
    add, otherwise = group.add_argument, "each class in turn" if conditions else "none, where trained with --drop"
    add("--seed", type=int, default=0, help="of the samples (0)")
    add("--class", dest="label", metavar="K", help=f"of all samples: 0, 1, ..., or its name ({otherwise})")
    add("--guidance", type=float, metavar="W", help="classifier-free guidance, of a network trained with --drop, at "
        "twice the work: D_0 + W (D_1 - D_0), D_1 being told class and conditions and D_0 nothing. 1 is D_1 alone, as "
        "without it, 0 is D_0 alone; 2, say, is more typical of the class and less various")  # fmt: skip
    add("--guidance-interval", type=float, nargs=2, metavar=("LO", "HI"), help="noise levels sigma / alpha that are "
        "guided, LO < level <= HI; D_1 alone runs at others (all)")  # fmt: skip
    if conditions:
        add("--condition-from", metavar="DATA", help="items whose conditions the network is told, sample i that of "
            "item i: of a run of `scoresde train --condition` (what it was trained on)")  # fmt: skip
        add("--measured", action="store_true", help="--condition-from has not the items but what is known of them: "
            "small ones, grey ones, JPEG files; with holes, and a last channel white where it is known")  # fmt: skip
    else:
        group.set_defaults(condition_from=None, measured=False)
    add("--clip", action="store_true", help="clip the posterior mean to [-1, 1] at each evaluation")
    add("--variance", type=Path, metavar="TABLE.npz", help="from `scoresde variance`: the optimal variance (Analytic-"
        "DPM), for one-step solvers (ddpm, ddim, ...)")  # fmt: skip
    add("--batch-size", type=int, default=64, metavar="N", help="samples that the network takes at once (64)")


def recipe(args: argparse.Namespace, model: Model, **changes: Any) -> Recipe:
    """How the arguments want samples drawn; all of them are checked.

    Args:
        args: of `add_solver_arguments`.
        model: from which.
        **changes: other values than the arguments', of solver, nfe, steps and grid.

    Raises:
        ValueError: if they do not go together, or with the model.
        FileNotFoundError, CheckpointError: if the table of --variance cannot be read.
    """
    given: dict[str, Any] = {
        name: changes.get(name, getattr(args, name, None)) for name in ("solver", "nfe", "steps", "grid")
    }
    counts = {name: given[name] for name in ("nfe", "steps") if given[name] is not None}
    check_count(batch_size=args.batch_size, **counts)
    if args.seed < 0:
        raise ValueError(f"seed={args.seed}: expected a whole number >= 0")
    label, solver = model.class_of(args.label), solver_of(given["solver"])
    made = Recipe(model, model.denoiser, solver, {}, args.seed, label, _told(args, model, label is None))
    denoiser = _guided(args, made)
    if args.variance is not None:
        table = VarianceTable.load(args.variance, denoiser.sde)
        denoiser = AnalyticDenoiser(denoiser, table, (-1.0, 1.0) if model.about.levels is not None else None)
        solver = OptimalVariance(solver)
    if args.clip:
        denoiser = Clip(denoiser)
    if len(counts) == 2:
        raise ValueError("give one of --nfe and --steps")
    return replace(made, denoiser=denoiser, solver=solver, options=on_grid(solver, denoiser, counts, given["grid"]))


def _told(args: argparse.Namespace, model: Model, classes: bool) -> TrainingData | None:
    """The items of --condition-from, as `Model.told`, which must be such as the model's."""
    told = model.told(args.condition_from, args.measured, classes=classes)
    K = model.about.num_classes
    if told is not None and told.num_classes is not None and K is not None and told.num_classes > K:
        raise ValueError(f"--condition-from {args.condition_from} has {told.num_classes} classes, the model {K}")
    if told is not None and told.shape != model.about.shape:
        raise ValueError(f"--condition-from {args.condition_from}: items {told.shape}, not {model.about.shape}")
    return told


def _guided(args: argparse.Namespace, made: Recipe) -> Denoiser:
    """The denoiser under --guidance.

    Raises:
        ValueError: if the network is told nothing, or was never trained with that.
    """
    weight, interval, denoiser = args.guidance, args.guidance_interval, made.denoiser
    if weight is None:
        if interval is not None:
            raise ValueError("--guidance-interval says where --guidance W is: give that, too")
        return denoiser
    cond, own = made.cond(range(1)), made.model.data()
    if not cond:
        raise ValueError(
            f"--guidance {weight:g}: the model has no classes and no condition (`scoresde train --classes --drop 0.1` "
            "makes one to be guided)"
        )
    if own is not None and own.drop == 0:
        raise ValueError(
            f"--guidance {weight:g}: the network was never trained without its condition; `scoresde train --drop 0.1` "
            "does so in a tenth of all cases"
        )
    if args.variance is not None:
        raise ValueError("--variance was estimated without --guidance, and is not right with it")
    # Each is one number throughout.
    null = {key: value.flatten()[0].item() for key, value in nothing(cond, made.model.about.num_classes).items()}
    return ClassifierFree(denoiser, weight, null=null, interval=interval and (interval[0], interval[1]))


def on_grid(solver: Solver, denoiser: Denoiser, counts: dict[str, int], name: str | None) -> dict[str, Any]:
    """The arguments of `sample` that say how many steps there are, and where."""
    if name not in (None, "default"):
        check_option(GRIDS, grid=name)
        if solver.adaptive:
            raise ValueError(f"--grid {name}: {solver!r} chooses its own times")
        make, sde = getattr(Grid, str(name)), denoiser.sde
        steps = counts.get("steps")
        if steps is None:
            nfe = counts.get("nfe", 20)
            steps = bisect_right(range(1, nfe + 1), nfe, key=lambda n: solver.evaluations(make(sde, n)) or 0)
            if steps == 0:
                raise ValueError(f"{solver!r} needs more than --nfe {nfe} evaluations for a single step")
        return {"grid": make(sde, steps)}
    if not counts and not solver.adaptive:
        counts = {"nfe": 20}
    if "nfe" in counts:
        solver.within(denoiser.sde, counts["nfe"])  # raises if not one step fits
    return counts


def share(n: int) -> range:
    """The samples of this process."""
    rank, world = parallel.rank(), parallel.world()
    return range(n * rank // world, n * (rank + 1) // world)


def draw(
    made: Callable[[range], Tensor], items: range, batch_size: int, progress: bool
) -> Iterator[tuple[range, Tensor]]:
    """These samples, batch by batch, on the CPU."""
    with tqdm(desc="sample", total=len(items), unit="sample", disable=not progress, leave=False) as bar:
        for first in range(0, len(items), batch_size):
            which = items[first : first + batch_size]
            yield which, made(which).cpu()
            bar.update(len(which))


def draw_all(made: Recipe, n: int, batch_size: int, progress: bool) -> Tensor | None:
    """n samples, on the CPU, drawn by all processes together; None in others than the first."""
    parts = [x for _, x in draw(made, share(n), batch_size, progress and parallel.rank() == 0)]
    return gathered(torch.cat(parts) if parts else torch.empty(0, *made.model.about.shape))


def gathered(x: Tensor) -> Tensor | None:
    """The processes' parts, one after the other, in the first; None in the others."""
    if parallel.world() == 1:
        return x
    parts: list[Any] | None = [None] * parallel.world() if parallel.rank() == 0 else None
    dist.gather_object(x, parts)
    return None if parts is None else torch.cat(parts)


def rounded(x: Tensor) -> Tensor:
    """Images as they are once they have been files: of 256 levels, in [-1, 1]."""
    return scaled(to_levels(x), 256)
