"""`scoresde evaluate`: how far samples are from real data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from scoresde.checks import check_count
from scoresde.cli.common import SessionOptions, check_file, record
from scoresde.cli.config import DataConfig
from scoresde.cli.drawing import SamplesOptions, draw_all, recipe
from scoresde.cli.measuring import MeasureOptions, check_measurable, measures, reference_of
from scoresde.cli.models import ModelOptions, is_run
from scoresde.cli.options import Options, option, part
from scoresde.data import BUILT_IN
from scoresde.interop.source import source_of
from scoresde.levels import rounded
from scoresde.metrics import evaluate
from scoresde.report import write_json
from scoresde.training import parallel

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


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(Options):
    """The arguments of `evaluate`."""

    model: ModelOptions = part("the model", run={"help": "samples (.npz, .npy, images), a run, or FORMAT:PATH"})
    measure: MeasureOptions = measures("frechet", "kid", "precision_recall")
    out: Path | None = option("result, with how it came about", metavar="FILE.json")
    samples: SamplesOptions = part("the samples", n={"default": 1000, "help": "how many (1000)"})
    session: SessionOptions


def run(options: EvaluateOptions) -> None:
    """Run the command.

    Raises:
        TypeError, ValueError, ImportError, OSError, CheckpointError: if an argument or a file is wrong, before the
            first evaluation.
        ArithmeticError: if samples are not finite, or a budget ran out.
    """
    check_count(**options.given("n", "limit"))
    if options.out is not None:
        check_file(options.out)
    source, metrics, session = options.model.run, options.measure.metrics, options.session
    n, steps, how = options.samples.n, options.samples.steps, options.samples.draw
    from_file = source is not None and options.model.denoiser is None and not (is_run(source) or source_of(source))
    with session.start() as device:
        model = None if from_file else options.model.open(session, device)
        measure = options.measure.open(model, session, device)
        if model is None:
            assert source is not None
            x = samples_of(source, measure.data, options.measure.skip)
            about: dict[str, Any] = {"samples from": str(source)}
        else:
            check_measurable(metrics, samples=n, data=len(measure.reference))
            made = recipe(how, steps, model, progress=session.progress)
            about = {"samples from": made.describe()}
            found = draw_all(made, n, how.batch_size, session.progress)
            if found is None:  # the first process does the rest
                return
            x = rounded(found) if model.about.pictures else found
        if parallel.rank():
            return
        result = evaluate(x, measure.reference, metrics, measure.features, seed=how.seed, floor=measure.floor)
        if options.out is not None:
            content = {**about, "data": measure.data.source, **result.as_dict(), **record(options, device)}
            write_json(options.out, content)
        print(result)
        if options.out is not None:
            session.say(f"wrote {options.out}")


def samples_of(source: Path, like: DataConfig, skip: bool = False) -> Tensor:
    """The samples of a file, a folder or a data set by name.

    Raises:
        ValueError, FileNotFoundError: if there are none.
    """
    if str(source).partition(":")[0] not in BUILT_IN and not source.exists():
        raise FileNotFoundError(f"{source}: there is no such file, run folder or data set")
    return reference_of(DataConfig(str(source), skip=skip and source.is_dir(), **like.beside(str(source)).alike))
