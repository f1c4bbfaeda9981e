"""`scoresde edit`: given images, changed by a trained network."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from scoresde.checks import check_count
from scoresde.cli.common import add_quiet, command_parser, say, session
from scoresde.cli.drawing import Recipe, add_draw_arguments, add_step_arguments, gathered, recipe, share
from scoresde.cli.inputs import add_input_arguments, read_image, read_inputs
from scoresde.cli.models import Model, add_model_arguments, open_model
from scoresde.cli.sample import Writer, add_out_arguments
from scoresde.denoiser import Denoiser
from scoresde.editing import edit, interpolation, interpolation_grid, sdedit, strength_time, variations
from scoresde.errors import NonFiniteError, some
from scoresde.noise import derive_seed
from scoresde.training import parallel

__all__ = ["add_parser", "run"]

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
UNGUIDED = {"guidance": None, "guidance_interval": None}


def add_parser(commands: Any) -> None:
    """The arguments of `edit`."""
    parser = command_parser(commands, "edit", TEXT, EXAMPLES)
    add_model_arguments(parser)
    add_input_arguments(parser.add_argument_group("the inputs"))
    add = parser.add_argument_group("the edit").add_argument
    add("--strength", type=float, metavar="S", help="in (0, 1]: how far to noise (0.5; 1 with --encode)")
    add("--encode", action="store_true", help="by the ODE, instead of by noise")
    add("--from-class", metavar="K", help="of the inputs, with --encode (their labels, where they have any)")
    add("--to-class", dest="label", metavar="K", help="of the results: the same as --class")
    add("--keep", type=Path, metavar="MASK", help="an image whose white pixels stay as they are in the inputs")
    add("--variations", type=int, metavar="K", help="how many of each input")
    add("--interpolate", type=int, nargs="+", metavar="N", help="how many on a path, or rows and columns of a sheet")
    group = parser.add_argument_group("the solver")
    nfe = "20 on the whole way from t_max, of which the part below --strength is made, with --encode each way"
    add_step_arguments(group, defaults=("unipc3", nfe))
    add_draw_arguments(group)
    add_out_arguments(parser, "a row for each input, or a square")
    parser.add_argument("--beside", action="store_true", help="the inputs too, each before its results")
    add_quiet(parser)
    parser.set_defaults(action=run)


def run(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        TypeError, ValueError, ImportError, OSError, CheckpointError: if an argument or a file is wrong, before the
            first evaluation.
        ArithmeticError: if results are not finite, or a budget ran out.
    """
    _check(args)
    with session(args.device) as device:
        model = open_model(args, device)
        job = _job(args, model)
        args.columns, written = args.columns or job.columns, replace(job.made, told=None)  # results are not its items
        writer = Writer(args, model)
        kept: list[Tensor] = []
        mine, lead = share(job.groups), parallel.rank() == 0
        try:
            with tqdm(desc="edit", total=len(mine), disable=args.quiet or not lead, leave=False) as bar:
                for first in range(0, len(mine), job.batch):
                    which = mine[first : first + job.batch]
                    done = job(which).flatten(0, 1).cpu()
                    writer.add(range(which.start * job.results, which.stop * job.results), done)
                    kept.append(done)
                    bar.update(len(which))
        except (KeyboardInterrupt, SystemExit, ArithmeticError):
            if kept and parallel.world() == 1:
                finished = torch.cat(kept)
                writer.finish(finished, written)
                say(args, f"\n{len(finished)} of {job.groups * job.results} images are in {args.out}")
            raise
        whole = gathered(torch.cat(kept) if kept else torch.empty(0, *model.about.shape))
        if whole is not None:
            writer.finish(whole, written)
            print(f"{args.out}: {len(whole)} images, {job.text}, {job.made.solver!r}, seed {args.seed}")


def _check(args: argparse.Namespace) -> None:
    """Raises ValueError if arguments do not go together."""
    counts = {name: getattr(args, name) for name in ("columns", "limit", "variations", "levels")}
    check_count(**{name: value for name, value in counts.items() if value is not None})
    if args.interpolate is not None:
        if not 1 <= len(args.interpolate) <= 2 or min(args.interpolate) < 2:
            raise ValueError(f"--interpolate {' '.join(map(str, args.interpolate))}: expected N, or R C, 2 or more")
        for name in ("strength", "keep", "variations"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name} does not go with --interpolate")
    encodes = args.encode or args.interpolate is not None
    if args.from_class is not None and not args.encode:
        raise ValueError(f"--from-class {args.from_class} is for --encode: noise tells nothing of the input's class")
    if encodes and (args.keep is not None or args.grid != "default"):
        raise ValueError(f"--{'grid' if args.keep is None else 'keep'} is for edits by noise, without --encode")
    if args.beside and args.out.suffix != ".png":
        raise ValueError(f"--beside is for a picture, FILE.png, not --out {args.out}")
    if args.guidance is not None and (args.interpolate is not None or (args.encode and args.variations is not None)):
        raise ValueError("--guidance is for edits by noise, and for --encode --to-class K, which encodes without it")
    if args.keep is not None and args.variations is not None:
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
        """Raises NonFiniteError naming the inputs (or pairs, or fours), ArithmeticError if a budget ran out."""
        try:
            return self.apply(which)
        except NonFiniteError as stop:
            bad = sorted({which[i % len(which)] for i in stop.samples})
            where = "" if stop.step is None else f" in step {stop.step}, at t = {stop.time:.6g}"
            raise NonFiniteError(
                f"the edits of inputs {some(bad)} became non-finite{where}", stop.step, stop.time, bad
            ) from stop


def _job(args: argparse.Namespace, model: Model) -> _Job:
    """The edit that the arguments want; all of them are checked."""
    made, up = (recipe(given, model) for given in (args, argparse.Namespace(**vars(args) | UNGUIDED)))
    source, classes = model.class_of(args.from_class), model.about.num_classes is not None
    if made.label is None:
        made = replace(made, label=source)
    if classes and made.label is None:
        raise ValueError("the model has classes: say which, --to-class K")
    if args.strength is not None:
        strength_time(model.denoiser.sde, args.strength)  # checks it
    x, labels = read_inputs(args, model, classes and args.encode and source is None)
    x = x.to(model.denoiser.device)
    if args.interpolate is not None:
        return _interpolating(args, made, x)
    if args.variations is not None:
        if args.encode and made.label != source:
            raise ValueError("--variations keep the class: --from-class is not another than --to-class")
        return _varying(args, made, x)
    if not args.encode:
        return _perturbing(args, made, x, None if args.keep is None else _mask(args.keep, model))

    def cond_from(which: range) -> dict[str, Tensor]:
        own = replace(made, label=made.label if source is None else source)
        given = {} if labels is None else {"label": labels[which.start : which.stop].to(x.device)}
        return own.cond(which) | given

    return _encoding(args, made, up.denoiser, x, cond_from)


def _perturbing(args: argparse.Namespace, made: Recipe, x: Tensor, mask: Tensor | None) -> _Job:
    """SDEdit."""
    strength = args.strength or 0.5

    def apply(which: range) -> Tensor:
        own = x[which.start : which.stop]
        found = sdedit(made.denoiser, own, made.solver, strength=strength, seed=_seeds(args, which),
                       cond=made.cond(which), mask=mask, **made.options)  # fmt: skip
        if found.status != "complete":
            raise ArithmeticError(f"the budget of {found.nfe} evaluations ran out at t = {found.t:.4g}: raise --nfe")
        return _beside(args, own[:, None], found.x[:, None])

    return _of_each(args, made, apply, len(x), f"strength {strength:g} by noise")


def _encoding(
    args: argparse.Namespace, made: Recipe, up: Denoiser, x: Tensor, cond_from: Callable[[range], dict[str, Tensor]]
) -> _Job:
    """There by the ODE of `up`, the denoiser without guidance, and back."""
    strength = args.strength or 1.0

    def apply(which: range) -> Tensor:
        own = x[which.start : which.stop]
        found = edit(up, own, made.solver, cond_from=cond_from(which), cond_to=made.cond(which), to=made.denoiser,
                     strength=strength, **made.options)  # fmt: skip
        return _beside(args, own[:, None], found.x[:, None])

    return _of_each(args, made, apply, len(x), f"strength {strength:g} by the ODE")


def _of_each(args: argparse.Namespace, made: Recipe, apply: Callable[[range], Tensor], n: int, text: str) -> _Job:
    columns = 2 * max(1, round((n / 2) ** 0.5)) if args.beside else None
    return _Job(apply, n, 1 + args.beside, args.batch_size, columns, made, text)


def _varying(args: argparse.Namespace, made: Recipe, x: Tensor) -> _Job:
    """Variations, a row for each input."""
    k, strength = args.variations, args.strength or (1.0 if args.encode else 0.5)

    def apply(which: range) -> Tensor:
        own = x[which.start : which.stop]
        found = variations(made.denoiser, own, k, made.solver, strength=strength, seed=_seeds(args, which),
                           by="encoding" if args.encode else "perturbation",
                           cond=made.cond(which), **made.options)  # fmt: skip
        return _beside(args, own[:, None], found.x.transpose(0, 1))

    text = f"strength {strength:g} by {'the ODE' if args.encode else 'noise'}"
    return _Job(apply, len(x), k + args.beside, max(1, args.batch_size // k), k + args.beside, made, text)


def _interpolating(args: argparse.Namespace, made: Recipe, x: Tensor) -> _Job:
    """Paths between pairs, a row for each, or sheets between fours."""
    shape, ends = args.interpolate, 2 * len(args.interpolate)
    if len(x) % ends:
        raise ValueError(f"--interpolate: {len(x)} inputs, expected a multiple of {ends}: --limit says how many")
    groups, results = x.unflatten(0, (-1, ends)), math.prod(shape)

    def paths(which: range) -> Tensor:
        own = groups[which.start : which.stop]
        found = interpolation(made.denoiser, own[:, 0], own[:, 1], made.solver, weights=shape[0],
                              cond=made.cond(which), **made.options)  # fmt: skip
        return _beside(args, own, found.x.transpose(0, 1))

    def sheet(which: range) -> Tensor:
        own = groups[which.start : which.stop]
        found = interpolation_grid(made.denoiser, own[0], made.solver, rows=shape[0], columns=shape[1],
                                   cond=made.cond(which), **made.options)  # fmt: skip
        return found.x.flatten(0, 1)[None]

    if ends == 2:
        columns = shape[0] + 2 * args.beside
        return _Job(paths, len(groups), columns, max(1, args.batch_size // results), columns, made, "between two")
    if args.beside:
        raise ValueError("--beside is for paths between two: the corners of a sheet are its inputs")
    return _Job(sheet, len(groups), results, 1, shape[1], made, "between four")


def _seeds(args: argparse.Namespace, which: range) -> list[int]:
    return [derive_seed(args.seed, i) for i in which]


def _beside(args: argparse.Namespace, own: Tensor, found: Tensor) -> Tensor:
    """The results of some groups, after their inputs where these are wanted."""
    return torch.cat([own, found], 1) if args.beside else found


# --- files in --------------------------------------------------------------------------------------------------------


def _mask(path: Path, model: Model) -> Tensor:
    """Which pixels are kept: white, shape (1, H, W)."""
    if not model.about.pictures:
        raise ValueError(f"--keep {path}: the model's items {model.about.shape} are no pictures")
    return read_image(path, (1, *model.about.shape[1:])) > 127
