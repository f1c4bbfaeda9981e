"""`scoresde edit`: given images, changed by a trained network."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from scoresde.checks import check_count
from scoresde.cli.common import SessionOptions
from scoresde.cli.drawing import NFE_HELP, DrawOptions, Recipe, StepOptions, draw, recipe, share
from scoresde.cli.inputs import InputOptions
from scoresde.cli.models import Model, ModelOptions
from scoresde.cli.options import Options, option, part
from scoresde.cli.writing import OutOptions, Writer
from scoresde.denoiser import Denoiser
from scoresde.editing import edit, interpolation, interpolation_grid, sdedit, strength_time, variations
from scoresde.errors import NonFiniteError
from scoresde.guidance.operators.words import read_masks

TEXT = """edit images with a trained network: strokes into pictures, one class into another, variations, paths between

Each input goes part of the way to noise, --strength of it, and comes back as the model's (scoresde.editing):

  by default    by adding noise (SDEdit): what is finer than the noise is drawn anew. From 0.3 to 0.7 turns strokes into
                pictures, 1 forgets the input
  --encode      by the probability-flow ODE, which draws nothing: all the way, unless --strength; from --from-class, and
                back as --to-class (with --guidance, on the way back alone)
  --variations  K of each input, either way
  --interpolate N between inputs 1 and 2, 3 and 4, ...; R C: a sheet between four. Always encodes

Image files are cropped around the centre and resized to the model's size and mode. Files out are as those of `scoresde
sample`. Input i is edited the same in any batch and on any number of processes."""

EXAMPLES = """
scoresde edit runs/fm --input strokes.png --strength 0.5 --out edited.png
scoresde edit runs/fm --input folder/ --strength 0.6 --to-class 3 --out folder_of_threes/
scoresde edit runs/fm --input photo.png --keep mask.png --strength 0.8 --out edited.png      white is kept
scoresde edit runs/fm --input threes.npz --encode --from-class 3 --to-class 8 --beside --out eights.png
scoresde edit runs/fm --input threes.npz --encode --from-class 3 --to-class 8 --guidance 2 --out eights.npz
scoresde edit runs/fm --input photo.png --variations 8 --strength 0.4 --solver ddpm --out variations.png
scoresde edit runs/fm --input folder/ --interpolate 9 --nfe 50 --out paths.png
"""
NFE = "20 on the whole way from t_max, of which the part below --strength is made, with --encode each way"


@dataclass(frozen=True, kw_only=True)
class EditOptions(Options):
    """The arguments of `edit`."""

    model: ModelOptions = part("the model")
    inputs: InputOptions = part("the inputs")
    strength: float | None = option("in (0, 1]: how far to noise (0.5; 1 with --encode)", metavar="S", group="the edit")
    encode: bool = option("by the ODE, instead of by noise", group="the edit")
    from_class: str | None = option(
        "of the inputs, with --encode (their labels, where they have any)", metavar="K", group="the edit"
    )
    to_class: str | None = option("of the results: the same as --class", metavar="K", group="the edit", dest="label")
    keep: Path | None = option(
        "an image whose white pixels stay as they are in the inputs, or a folder with one for each by their names",
        metavar="MASK",
        group="the edit",
        reads="folder",
    )
    variations: int | None = option("how many of each input", metavar="K", group="the edit")
    interpolate: list[int] | None = option(
        "how many on a path, or rows and columns of a sheet", metavar="N", group="the edit", nargs="+"
    )
    steps: StepOptions = part("the solver", nfe={"help": NFE_HELP.format(NFE)})
    draw: DrawOptions = part("the solver")
    out: OutOptions = part(columns={"help": "of the grid (a row for each input, or a square)"})
    beside: bool = option("the inputs too, each before its results")
    session: SessionOptions


def run(options: EditOptions) -> None:
    """Run the command.

    Raises:
        TypeError, ValueError, ImportError, OSError, CheckpointError: if an argument or a file is wrong, before the
            first evaluation.
        ArithmeticError: if results are not finite, or a budget ran out.
    """
    _check(options)
    out, session = options.out, options.session
    with session.start() as device:
        model = options.model.open(session, device)
        job = _job(options, model)
        writer = Writer(replace(out, columns=out.columns or job.columns), model.about)
        own = replace(job.made, told=None)  # results are not its items
        parts = (
            (range(which.start * job.results, which.stop * job.results), x)
            for which, x in draw(job, share(job.groups), job.batch, session.progress, "edit")
        )
        total = job.groups * job.results
        whole = writer.collect(parts, lambda x: writer.finish(x, own.labels(range(len(x)))), total, session, "images")
        if whole is not None:
            print(f"{out.out}: {len(whole)} images, {job.text}, {own.solver!r}, seed {own.seed}")


def _check(options: EditOptions) -> None:
    """Raises ValueError if arguments do not go together."""
    check_count(**options.given("columns", "limit", "variations", "levels"))
    if options.interpolate is not None:
        if not 1 <= len(options.interpolate) <= 2 or min(options.interpolate) < 2:
            raise ValueError(f"--interpolate {' '.join(map(str, options.interpolate))}: expected N, or R C, 2 or more")
        for name in options.given("strength", "keep", "variations"):
            raise ValueError(f"--{name} does not go with --interpolate")
    encodes, guided = options.encode or options.interpolate is not None, options.draw.guidance is not None
    if options.from_class is not None and not options.encode:
        raise ValueError(f"--from-class {options.from_class} is for --encode: noise tells nothing of the input's class")
    if encodes and (options.keep is not None or options.steps.grid != "default"):
        raise ValueError(f"--{'grid' if options.keep is None else 'keep'} is for edits by noise, without --encode")
    if options.beside and options.out.out.suffix != ".png":
        raise ValueError(f"--beside is for a picture, FILE.png, not --out {options.out.out}")
    if guided and (options.interpolate is not None or (options.encode and options.variations is not None)):
        raise ValueError("--guidance is for edits by noise, and for --encode --to-class K, which encodes without it")
    if encodes and options.draw.classifier is not None:
        raise ValueError("--classifier is for edits by noise: without --encode and --interpolate")
    if options.keep is not None and options.variations is not None:
        raise ValueError("--keep does not go with --variations: repeat the input, with other seeds")


@dataclass(frozen=True)
class _Job:
    """What is done to which inputs.

    Attributes:
        apply: some groups, by their numbers, to their results, shape (groups, results, *event).
        groups: how many: inputs, or pairs or fours of them.
        results: of each group, the inputs beside them among them.
        batch: groups at once.
        columns: of a picture, or None.
        made: how.
        text: in words.
    """

    apply: Callable[[range], Tensor]
    groups: int
    results: int
    batch: int
    columns: int | None
    made: Recipe
    text: str

    def __call__(self, which: range) -> Tensor:
        """The results of these groups, one after the other.

        Raises:
            NonFiniteError: naming the inputs (or pairs, or fours).
            ArithmeticError: if a budget ran out.
        """
        try:
            return self.apply(which).flatten(0, 1)
        except NonFiniteError as stop:
            raise stop.of("the edits of inputs", sorted({which[i % len(which)] for i in stop.samples})) from stop


def _job(options: EditOptions, model: Model) -> _Job:
    """The edit that the arguments want; all of them are checked."""
    made = recipe(options.draw, options.steps, model, tuned=False)
    up, model = made, made.model
    if options.encode:
        up = recipe(replace(options.draw, guidance=None), options.steps, model, tuned=False)
    source, classes = model.class_of(options.from_class, "--from-class"), model.about.num_classes is not None
    if made.label is None:
        made = replace(made, label=source)
    if classes and made.label is None:
        raise ValueError("the model has classes: say which, --to-class K")
    if options.strength is not None:
        strength_time(model.denoiser.sde, options.strength)  # checks it
    x, labels = options.inputs.read(model.about, classes and options.encode and source is None, model.background)
    x = x.to(model.denoiser.device)
    if options.interpolate is not None:
        return _interpolating(options, made, x, options.interpolate)
    if options.variations is not None:
        if options.encode and made.label != source:
            raise ValueError("--variations keep the class: --from-class is not another than --to-class")
        return _varying(options, made, x, options.variations)
    if not options.encode:
        return _perturbing(options, made, x, None if options.keep is None else _mask(options.keep, model, len(x)))

    def cond_from(which: range) -> dict[str, Tensor]:
        own = replace(made, label=made.label if source is None else source)
        given = {} if labels is None else {"label": labels[which.start : which.stop].to(x.device)}
        return own.cond(which) | given

    return _encoding(options, made, up.denoiser, x, cond_from)


def _perturbing(options: EditOptions, made: Recipe, x: Tensor, mask: Tensor | None) -> _Job:
    """SDEdit."""
    strength = options.strength or 0.5

    def apply(which: range) -> Tensor:
        own = x[which.start : which.stop]
        kept = mask[which.start : which.stop] if mask is not None and mask.ndim == x.ndim else mask
        found = sdedit(made.denoiser, own, made.solver, strength=strength, seed=made.seeds(which),
                       cond=made.cond(which), mask=kept, **made.options)  # fmt: skip
        if found.status != "complete":
            raise ArithmeticError(f"the budget of {found.nfe} evaluations ran out at t = {found.t:.4g}: raise --nfe")
        return _beside(options, own[:, None], found.x[:, None])

    return _of_each(options, made, apply, len(x), f"strength {strength:g} by noise")


def _encoding(
    options: EditOptions, made: Recipe, up: Denoiser, x: Tensor, cond_from: Callable[[range], dict[str, Tensor]]
) -> _Job:
    """There by the ODE of `up`, the denoiser without guidance, and back."""
    strength = options.strength or 1.0

    def apply(which: range) -> Tensor:
        own = x[which.start : which.stop]
        found = edit(up, own, made.solver, cond_from=cond_from(which), cond_to=made.cond(which), to=made.denoiser,
                     strength=strength, **made.options)  # fmt: skip
        return _beside(options, own[:, None], found.x[:, None])

    return _of_each(options, made, apply, len(x), f"strength {strength:g} by the ODE")


def _of_each(options: EditOptions, made: Recipe, apply: Callable[[range], Tensor], n: int, text: str) -> _Job:
    columns = 2 * max(1, round((n / 2) ** 0.5)) if options.beside else None
    return _Job(apply, n, 1 + options.beside, options.draw.batch_size, columns, made, text)


def _varying(options: EditOptions, made: Recipe, x: Tensor, k: int) -> _Job:
    """k variations, a row for each input."""
    strength = options.strength or (1.0 if options.encode else 0.5)

    def apply(which: range) -> Tensor:
        own = x[which.start : which.stop]
        found = variations(made.denoiser, own, k, made.solver, strength=strength, seed=made.seeds(which),
                           by="encoding" if options.encode else "perturbation",
                           cond=made.cond(which), **made.options)  # fmt: skip
        return _beside(options, own[:, None], found.x.transpose(0, 1))

    text = f"strength {strength:g} by {'the ODE' if options.encode else 'noise'}"
    return _Job(apply, len(x), k + options.beside, max(1, options.draw.batch_size // k), k + options.beside, made, text)


def _interpolating(options: EditOptions, made: Recipe, x: Tensor, shape: list[int]) -> _Job:
    """Paths between pairs, a row for each, or sheets between fours."""
    ends = 2 * len(shape)
    if len(x) % ends:
        raise ValueError(f"--interpolate: {len(x)} inputs, expected a multiple of {ends}: --limit says how many")
    groups, results = x.unflatten(0, (-1, ends)), math.prod(shape)

    def paths(which: range) -> Tensor:
        own = groups[which.start : which.stop]
        found = interpolation(made.denoiser, own[:, 0], own[:, 1], made.solver, weights=shape[0],
                              cond=made.cond(which), **made.options)  # fmt: skip
        return _beside(options, own, found.x.transpose(0, 1))

    def sheet(which: range) -> Tensor:
        own = groups[which.start : which.stop]
        found = interpolation_grid(made.denoiser, own[0], made.solver, rows=shape[0], columns=shape[1],
                                   cond=made.cond(which), **made.options)  # fmt: skip
        return found.x.flatten(0, 1)[None]

    if ends == 2:
        columns = shape[0] + 2 * options.beside
        return _Job(
            paths, len(groups), columns, max(1, options.draw.batch_size // results), columns, made, "between two"
        )
    if options.beside:
        raise ValueError("--beside is for paths between two: the corners of a sheet are its inputs")
    return _Job(sheet, len(groups), results, 1, shape[1], made, "between four")


def _beside(options: EditOptions, own: Tensor, found: Tensor) -> Tensor:
    """The results of some groups, after their inputs where these are wanted."""
    return torch.cat([own, found], 1) if options.beside else found


# --- files in --------------------------------------------------------------------------------------------------------


def _mask(path: Path, model: Model, n: int) -> Tensor:
    """Which pixels are kept: white, shape (1, H, W), or (N, 1, H, W) for N inputs."""
    if not model.about.pictures:
        raise ValueError(f"--keep {path}: the model's items {model.about.shape} are no pictures")
    white = read_masks(path, model.about.shape)
    if white.ndim == 4 and len(white) != n:
        raise ValueError(f"--keep {path} has {len(white)} images for {n} inputs: expected one for each")
    return white
