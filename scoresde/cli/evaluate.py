"""`scoresde evaluate`: how far samples are from real data."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import Tensor

from scoresde.checks import check_count
from scoresde.cli.common import add_quiet, check_file, command_parser, record, say, session, write_json
from scoresde.cli.config import DataConfig
from scoresde.cli.drawing import add_solver_arguments, draw_all, recipe, rounded
from scoresde.cli.measuring import (
    add_data_arguments,
    add_measure_arguments,
    check_measurable,
    data_config,
    features_of,
    reference_of,
)
from scoresde.cli.models import add_model_arguments, is_run, open_model
from scoresde.data import BUILT_IN
from scoresde.metrics import evaluate
from scoresde.training import parallel

__all__ = ["add_parser", "run"]

TEXT = """distances between samples and real data, with standard errors and what real data score

The samples: a file .npz or .npy, a folder of images, a data set by name; or drawn here from a run folder, or from
--denoiser. Images are compared in [-1, 1], of 256 levels. No number means anything without its feature space and sizes:
all is in --out."""

EXAMPLES = """
scoresde evaluate samples.npz --data fashion-mnist-test --features fashion-mnist --out scores.json
scoresde evaluate samples.npz --data fashion-mnist-test --metrics frechet kid precision_recall --floor fashion-mnist
scoresde evaluate runs/fm --n 1000 --solver ddim --nfe 50 --data fashion-mnist-test --out scores.json
scoresde evaluate runs/mine --n 1000 --data held_out_folder --features inception
scoresde evaluate --denoiser my_model:load --shape 3 32 32 --n 1000 --data cifar10-test:/data/cifar
"""


def add_parser(commands: Any) -> None:
    """The arguments of `evaluate`."""
    parser = command_parser(commands, "evaluate", TEXT, EXAMPLES)
    add_model_arguments(parser, "samples (.npz, .npy, a folder of images), or a run folder")
    add_data_arguments(parser, "real data, best such as were not trained on (what the run was trained on)")
    add_measure_arguments(parser, ["frechet", "kid", "precision_recall"])
    parser.add_argument("--limit", type=int, metavar="N", help="the first N of the real data (all)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="result, with how it came about")
    add_solver_arguments(parser, n=1000)
    add_quiet(parser)
    parser.set_defaults(action=run)


def run(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        TypeError, ValueError, ImportError, OSError, CheckpointError: if an argument or a file is wrong, before the
            first evaluation.
        ArithmeticError: if samples are not finite, or a budget ran out.
    """
    check_count(n=args.n, **({} if args.limit is None else {"limit": args.limit}))
    if args.out is not None:
        check_file(args.out)
    from_file = args.run is not None and args.denoiser is None and not is_run(args.run)
    with session(args.device) as device:
        model = None if from_file else open_model(args, device)
        own = None if model is None else model.data()
        chosen = data_config(args, own)
        if own is not None and args.data is None:
            say(args, f"measuring against {chosen.source}, which the network was trained on: --data names other data")
        reference = reference_of(chosen, args.limit)
        floor = None if args.floor is None else reference_of(data_config(args, own, args.floor))
        features = features_of(args.features, chosen.source, reference, device)
        if model is None:
            x = samples_of(args, chosen)
            about: dict[str, Any] = {"samples from": str(args.run)}
        else:
            if model.about.shape != tuple(reference.shape[1:]):
                raise ValueError(
                    f"{chosen.source} has items {tuple(reference.shape[1:])}, the model's are {model.about.shape}"
                )
            check_measurable(args.metrics, samples=args.n, data=len(reference))
            made = recipe(args, model)
            about = {"samples from": made.describe()}
            found = draw_all(made, args.n, args.batch_size, not args.quiet)
            if found is None:  # the first process does the rest
                return
            x = rounded(found) if model.about.pictures else found
        if parallel.rank():
            return
        result = evaluate(x, reference, args.metrics, features, seed=args.seed, floor=floor)
        if args.out is not None:
            write_json(args.out, {**about, "data": chosen.source, **result.as_dict(), **record(args, device)})
        print(result)
        if args.out is not None:
            say(args, f"wrote {args.out}")


def samples_of(args: argparse.Namespace, like: DataConfig) -> Tensor:
    """The samples of a file, a folder or a data set by name.

    Raises:
        ValueError, FileNotFoundError: if there are none.
    """
    if str(args.run).partition(":")[0] not in BUILT_IN and not args.run.exists():
        raise FileNotFoundError(f"{args.run}: there is no such file, run folder or data set")
    made_alike = args.run.is_dir()
    size, mode = (like.size, like.mode) if made_alike else (None, None)
    return reference_of(DataConfig(str(args.run), size=size, mode=mode))
