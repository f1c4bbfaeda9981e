"""Samples from a model, in batches: sample i is a function of the seed and i alone, whatever the batch size, and on any
number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from scoresde.checks import check_count, check_whole
from scoresde.cli.chosen import CHOSEN, fitting, read, taken
from scoresde.cli.models import Model
from scoresde.cli.options import Options, option
from scoresde.cli.texts import Texts, null_of_run
from scoresde.data import TrainingData
from scoresde.denoiser import Denoiser
from scoresde.errors import NonFiniteError
from scoresde.grid import SPACINGS
from scoresde.guidance.classifier_free import ClassifierFree
from scoresde.guidance.rules import RULES
from scoresde.guidance.trained import TrainedClassifier
from scoresde.noise import derive_seed
from scoresde.sampling import sample
from scoresde.solvers import Solver
from scoresde.solvers.catalogue import solver_of
from scoresde.training import parallel
from scoresde.tuning import TunedSolver
from scoresde.variance import AnalyticDenoiser, OptimalVariance, VarianceTable
from scoresde.wrappers import Clip, below_limit

__all__ = [
    "CLASS_HELP",
    "GRIDS",
    "NFE_HELP",
    "SOLVER_HELP",
    "DrawOptions",
    "Guidance",
    "Recipe",
    "SamplesOptions",
    "StepOptions",
    "draw",
    "draw_all",
    "gathered",
    "recipe",
    "share",
]

GRIDS = ("default", *SPACINGS)
SOLVER_HELP = (
    "a name from `scoresde solvers`; a call, 'DDIM(eta=0.2)'; 'chosen', the best for the network and --nfe, which is "
    "looked for once and kept in RUN/tuned; or a file of one"
)
DEFAULT_SOLVER = "adams"
CHOOSING = 32  # samples, half of which choose
NFE_HELP = "evaluations of the network ({}, unless --steps; a budget for adaptive solvers)"
CLASS_HELP = "of all samples: 0, 1, ..., or its name"


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
        texts: what they are to show, in words, or None.
    """

    model: Model
    denoiser: Denoiser
    solver: Solver
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    label: int | None = None
    told: TrainingData | None = None
    texts: Texts | None = None

    def cond(self, items: range) -> dict[str, Any]:
        """What the network is told for the samples of these numbers."""
        cond = self.model.labels(self.label, items)
        if self.told is not None:
            told = self.told.batch(_in_turn(items, len(self.told))).cond
            own = {key: value.to(self.denoiser.device) for key, value in told.items()}
            cond = {**cond, **own} if self.label is None else {**own, **cond}
        return cond if self.texts is None else {**cond, **self.texts.cond(items)}

    def labels(self, items: range) -> Tensor | None:
        """The classes of the samples of these numbers, or None."""
        if self.label is not None and self.label == self.model.about.num_classes:
            return None
        if self.told is None or self.told.labels is None or self.label is not None:
            return self.model.labels(self.label, items).get("label")
        return self.told.labels[_in_turn(items, len(self.told))]

    def seeds(self, items: range) -> list[int]:
        """Of the samples of these numbers."""
        return [derive_seed(self.seed, i) for i in items]

    def __call__(self, items: range) -> Tensor:
        """The samples of these numbers, on the denoiser's device.

        Raises:
            NonFiniteError: naming them, if some are not finite.
            ArithmeticError: if an adaptive solver's budget ran out.
        """
        cond, shape = self.cond(items), (len(items), *self.model.shape)
        try:
            found = sample(self.denoiser, shape, self.solver, seed=self.seeds(items), cond=cond, **self.options)
        except NonFiniteError as stop:
            raise stop.of("samples", [items[i] for i in stop.samples]) from stop
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
            **({} if self.texts is None else {"text": repr(self.texts.texts), "negative": repr(self.texts.negative)}),
        }


def _in_turn(items: range, n: int) -> Tensor:
    """Which of n items these samples have, which begin again where there are too few."""
    return torch.tensor([i % n for i in items], dtype=torch.long, device="cpu")


@dataclass(frozen=True, kw_only=True)
class Guidance(Options):
    """Classifier-free guidance, as `ClassifierFree` takes it.

    Raises:
        ValueError: if there is an interval, and no weight.
    """

    weight: float = option(
        "classifier-free guidance, of a network trained with --drop, at twice the work: D_0 + W (D_1 - D_0), D_1 being "
        "told class and conditions and D_0 nothing. 1 is D_1 alone, as without it, 0 is D_0 alone; 2, say, is more "
        "typical of the class and less various", metavar="W", flags=("--guidance",), dest="guidance")  # fmt: skip
    interval: list[float] | None = option(
        "noise levels sigma / alpha that are guided, LO < level <= HI; D_1 alone runs at others (all)",
        metavar=("LO", "HI"), flags=("--guidance-interval",), dest="guidance_interval", nargs=2)  # fmt: skip
    rule: str | None = option("what is made of D_1 and D_0 (cfg, the formula above)", choices=RULES,
        flags=("--guidance-rule",), dest="guidance_rule")  # fmt: skip

    def __post_init__(self) -> None:
        if self.weight is None and (self.interval or self.rule):
            raise ValueError(
                "--guidance-interval and --guidance-rule say where and how --guidance W is: give that, too"
            )


@dataclass(frozen=True, kw_only=True)
class ByClassifier(Options):
    """Guidance by a classifier of noisy data, as `TrainedClassifier.guide` takes it.

    Raises:
        ValueError: if there is a scale, and no file.
    """

    file: Path = option(
        "a classifier of noisy data that guides, written by `scoresde.guidance.TrainedClassifier.save`: the model "
        "needs no classes then; around --guidance, where both are given", metavar="FILE.safetensors",
        flags=("--classifier",), dest="classifier", reads=True)  # fmt: skip
    gradient_scale: float | None = option("of its gradient (1, which is Bayes' rule; above, more typical of the class)",
        metavar="W", flags=("--classifier-scale",), dest="classifier_scale")  # fmt: skip

    def __post_init__(self) -> None:
        if self.file is None and self.gradient_scale is not None:
            raise ValueError("--classifier-scale is the scale of --classifier FILE: give that, too")

    def open(self, model: Model) -> tuple[Model, TrainedClassifier]:
        """The classifier, and the model with its classes.

        Raises:
            CheckpointError: if the file cannot be read.
        """
        found = TrainedClassifier.load(self.file, model.denoiser.device)
        about = model.about
        if about.num_classes is None:
            about = replace(about, num_classes=found.classes)
        return replace(model, about=about, made_for={**model.made_for, "classifier": found.digest}), found

    def around(self, guide: TrainedClassifier, denoiser: Denoiser, model: Model) -> Denoiser:
        """The model's denoiser, perhaps wrapped, guided.

        Raises:
            ValueError: if the classifier was made for another SDE, other items or classes.
        """
        try:
            return below_limit(
                denoiser,
                lambda inner: guide.guide(
                    inner,
                    1.0 if self.gradient_scale is None else self.gradient_scale,
                    shape=model.about.shape,
                    classes=model.about.num_classes,
                    conditional=model.about.num_classes is not None,
                ),
            )
        except ValueError as error:
            raise ValueError(f"--classifier {self.file}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class StepOptions(Options):
    """The solver and its steps."""

    solver: str | None = option(f"{SOLVER_HELP} (that of RUN/tuned, if one is there, or {DEFAULT_SOLVER})")
    nfe: int | None = option(NFE_HELP.format("20"))
    steps: int | None = option("steps, instead of --nfe")
    grid: str = option("spacing of the steps (the solver's own)", "default", choices=GRIDS)

    def counts(self, solver: Solver, denoiser: Denoiser) -> dict[str, Any]:
        """The arguments of `sample` that say how many steps there are, and where."""
        sde, counts = denoiser.sde, self.given("nfe", "steps")
        if self.grid != "default":
            if solver.adaptive:
                raise ValueError(f"--grid {self.grid}: {solver!r} chooses its own times")
            spacing = SPACINGS[self.grid]
            steps = self.steps or solver.steps_within(sde, counts.get("nfe", 20), spacing=spacing)
            return {"grid": spacing(sde, steps)}
        if not counts and not solver.adaptive:
            counts = {"nfe": 20}
        if "nfe" in counts:
            solver.within(sde, counts["nfe"])  # raises if not one step fits
        return counts


@dataclass(frozen=True, kw_only=True)
class DrawOptions(Options):
    """What does not depend on the solver."""

    seed: int = option("of the samples (0)", 0)
    label: str | None = option(f"{CLASS_HELP} (each class in turn)", metavar="K", flags=("--class",))
    text: Texts | None
    guidance: Guidance | None
    classifier: ByClassifier | None
    condition_from: str | None = option(
        "items whose conditions the network is told, sample i that of item i: of a run of `scoresde train --condition` "
        "(what it was trained on)", metavar="DATA")  # fmt: skip
    measured: bool = option(
        "--condition-from has not the items but what is known of them: small ones, grey ones, JPEG files; with holes, "
        "and a last channel white where it is known")  # fmt: skip
    clip: bool = option("clip the posterior mean to [-1, 1] at each evaluation")
    variance: Path | None = option(
        "from `scoresde variance`: the optimal variance (Analytic-DPM), for one-step solvers (ddpm, ddim, ...)",
        metavar="TABLE.npz", reads=True)  # fmt: skip
    batch_size: int = option("samples that the network takes at once (64)", 64, "N")


@dataclass(frozen=True, kw_only=True)
class SamplesOptions(Options):
    """How many samples, and how they are drawn."""

    n: int = option("how many (64)", 64, "N", flags=("--n", "--number"))
    steps: StepOptions
    draw: DrawOptions


def recipe(
    options: DrawOptions, steps: StepOptions, model: Model, tuned: bool = True, progress: bool = False
) -> Recipe:
    """How the arguments want samples drawn; all of them are checked.

    Args:
        options: what does not depend on the solver.
        steps: what does.
        model: from which.
        tuned: whether a solver with steps of its own will do.
        progress: show what is being done, if one is chosen.

    Raises:
        ValueError: if they do not go together, or with the model.
        FileNotFoundError, CheckpointError: if the table of --variance, or the file of --classifier, cannot be read.
    """
    counts = steps.given("nfe", "steps")
    check_count(batch_size=options.batch_size, **counts)
    check_whole(seed=options.seed)
    told, guide = (model, None) if options.classifier is None else options.classifier.open(model)
    label, named = told.class_of(options.label), steps.solver or DEFAULT_SOLVER
    own_steps = named == CHOSEN or named.endswith(".json")
    if own_steps and not tuned:
        raise ValueError(f"--solver {named} has steps of its own, and other ones are needed here: name a solver")
    solver = solver_of(DEFAULT_SOLVER if own_steps else named)
    if options.text is not None:
        options.text.check(model.denoiser, options.guidance is not None)
    items = _told(options, model, label is None)
    made = Recipe(model, model.denoiser, solver, {}, options.seed, label, items, options.text)
    denoiser = model.denoiser if options.guidance is None else _guided(options.guidance, made)
    if options.classifier is not None and guide is not None:
        denoiser = options.classifier.around(guide, denoiser, model)
    if options.variance is not None:
        for flag, given in (("--guidance", options.guidance), ("--classifier", options.classifier)):
            if given is not None:
                raise ValueError(f"--variance was estimated without {flag}, and is not right with it")
        if own_steps:
            raise ValueError(f"--variance is for solvers that draw noise, and --solver {named} draws none")
        table = VarianceTable.load(options.variance, denoiser.sde)
        images = model.about.levels is not None and denoiser.codec is None  # whose levels bound the variance
        denoiser = AnalyticDenoiser(denoiser, table, (-1.0, 1.0) if images else None)
        solver = OptimalVariance(solver)
    if options.clip:
        if denoiser.codec is not None:
            raise ValueError("--clip is for images in [-1, 1], and the model diffuses latents")
        denoiser = Clip(denoiser)
    if len(counts) == 2:
        raise ValueError("give one of --nfe and --steps")
    made = replace(made, model=told, denoiser=denoiser)
    if tuned and (own := _tuned(made, steps, options.variance is None, progress)):
        return replace(made, solver=own, options={"nfe": own.nfe})
    return replace(made, solver=solver, options=steps.counts(solver, denoiser))


def _tuned(made: Recipe, steps: StepOptions, deterministic: bool, progress: bool) -> TunedSolver | None:
    """The solver with steps of its own that is asked for, or that the run has."""
    named, model, denoiser = steps.solver, made.model, made.denoiser
    if named is not None and named.endswith(".json"):
        found = read(Path(named), denoiser)
        if steps.steps is not None or steps.grid != "default" or steps.nfe not in (None, found.nfe):
            raise ValueError(
                f"--solver {named} has steps of its own, nfe={found.nfe}: leave out --nfe, --steps and --grid"
            )
        return found
    if steps.steps is not None or steps.grid != "default":
        if named == CHOSEN:
            raise ValueError("--solver chosen has steps of its own: give --nfe, not --steps or --grid")
        return None
    nfe = steps.nfe or 20
    if named == CHOSEN:
        return taken(model, denoiser, nfe, made.cond(range(CHOOSING)), CHOOSING, made.seed, progress)
    return fitting(model, denoiser, nfe) if named is None and deterministic else None


def _told(options: DrawOptions, model: Model, classes: bool) -> TrainingData | None:
    """The items of --condition-from, as `Model.told`, which must be such as the model's."""
    source, K = options.condition_from, model.about.num_classes
    told = model.told(source, options.measured, classes=classes, captions=options.text is None)
    if told is not None and told.num_classes is not None and K is not None and told.num_classes > K:
        raise ValueError(f"--condition-from {source} has {told.num_classes} classes, the model {K}")
    if told is not None and told.shape != model.about.shape:
        raise ValueError(f"--condition-from {source}: items {told.shape}, not {model.about.shape}")
    return told


def _guided(guidance: Guidance, made: Recipe) -> Denoiser:
    """The denoiser under --guidance.

    Raises:
        ValueError: if the network is told nothing, or was never trained with that.
    """
    cond = made.cond(range(1))
    if not cond:
        raise ValueError(
            f"--guidance {guidance.weight:g}: the model has no classes and no condition (`scoresde train --classes "
            "--drop 0.1` makes one to be guided)"
        )
    if made.model.blind is False:
        raise ValueError(
            f"--guidance {guidance.weight:g}: the network was never trained without its condition; `scoresde train "
            "--drop 0.1` does so in a tenth of all cases"
        )
    null = null_of_run(cond, made.model.about.num_classes, made.texts)
    interval = None if guidance.interval is None else (guidance.interval[0], guidance.interval[1])
    rule = guidance.rule or "cfg"
    return below_limit(
        made.denoiser, lambda inner: ClassifierFree(inner, guidance.weight, null=null, interval=interval, rule=rule)
    )


def share(n: int) -> range:
    """The samples of this process."""
    rank, world = parallel.rank(), parallel.world()
    return range(n * rank // world, n * (rank + 1) // world)


def draw(
    made: Callable[[range], Tensor], items: range, batch_size: int, progress: bool, what: str = "sample"
) -> Iterator[tuple[range, Tensor]]:
    """These samples, batch by batch, on the CPU."""
    with tqdm(desc=what, total=len(items), unit=what, disable=not progress, leave=False) as bar:
        for first in range(0, len(items), batch_size):
            which = items[first : first + batch_size]
            yield which, made(which).cpu()
            bar.update(len(which))


def draw_all(made: Recipe, n: int, batch_size: int, progress: bool) -> Tensor | None:
    """n samples, on the CPU, drawn by all processes together; None in others than the first."""
    return gathered([x for _, x in draw(made, share(n), batch_size, progress)], made.model.about.shape)


def gathered(parts: list[Tensor], shape: tuple[int, ...]) -> Tensor | None:
    """The processes' parts, items of that shape, one after the other, in the first; None in the others."""
    whole = parallel.to_first(torch.cat(parts) if parts else torch.empty(0, *shape))
    if whole is None:
        return None
    return torch.cat(whole) if len(whole) > 1 else whole[0]
