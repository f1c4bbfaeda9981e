"""`scoresde tune`: the best table for a network and a number of evaluations, in a file that `--solver` takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from scoresde.checks import check_count, check_positive
from scoresde.cli.chosen import read
from scoresde.cli.common import SessionOptions, check_file
from scoresde.cli.drawing import DrawOptions, StepOptions, recipe
from scoresde.cli.models import ModelOptions
from scoresde.cli.options import Options, option, part
from scoresde.noise import derive_seed
from scoresde.solvers import Solver
from scoresde.solvers.catalogue import solver_of
from scoresde.training import parallel
from scoresde.tuning import tune

TEXT = """learn the best times and coefficients of a solver for a network and a number of evaluations

The teacher is the network's own fine solution from the same noise; no data are needed. Half of the noises train, a
quarter chooses, and a quarter says what was gained: where nothing was, the best untuned solver and grid are written,
and it says so. The file holds numbers, and names the network with its guidance and clipping: `--solver FILE.json` of
`scoresde sample` and `compare` takes it for that and no other. Training stops after --minutes with what it has."""

EXAMPLES = """
scoresde tune runs/fm --nfe 5 --out five.json
scoresde sample runs/fm --solver five.json --out few.png
scoresde tune runs/fm --nfe 8 --solver unipc3 dpm++2m --minutes 30 --n 256 --out eight.json
scoresde tune runs/fm --nfe 5 --class 3 --guidance 2 --out threes.json
scoresde compare runs/fm --solvers five.json adams --nfe 5 --data held_out --out runs/compare
"""


@dataclass(frozen=True, kw_only=True)
class TuneOptions(Options):
    """The arguments of `tune`."""

    model: ModelOptions = part("the model")
    nfe: int = option("evaluations of the network", metavar="N", required=True)
    solver: list[str] | None = option(
        "where it starts: names from `scoresde solvers`, calls, or files of tuned ones (what `--solver chosen` tries)",
        metavar="S", nargs="+")  # fmt: skip
    n: int = option("noises (128)", 128, "N", flags=("--n", "--number"))
    minutes: float = option("after which training stops (10)", 10.0, "M")
    draw: DrawOptions = part("how samples will be drawn")
    out: Path = option("the solver", metavar="FILE.json", required=True)
    session: SessionOptions


def run(options: TuneOptions) -> None:
    """Run the command.

    Raises:
        TypeError, ValueError, ImportError, OSError, CheckpointError: if an argument or a file is wrong, before the
            first evaluation.
        NonFiniteError: if the network's output is not finite.
    """
    check_count(nfe=options.nfe, n=options.n)
    check_positive(minutes=options.minutes)
    check_file(options.out, ".json")
    if options.draw.variance is not None:
        raise ValueError("--variance is for solvers that draw noise, and tuned ones draw none")
    session = options.session
    with session.start() as device:
        model = options.model.open(session, device)
        steps = StepOptions(solver=None, nfe=options.nfe, steps=None, grid="default")
        made = recipe(options.draw, steps, model, tuned=False)

        def named(text: str) -> Solver:
            return read(Path(text), made.denoiser) if text.endswith(".json") else solver_of(text)

        solvers = None if options.solver is None else [named(text) for text in options.solver]
        if parallel.rank() != 0:
            return
        found = tune(
            made.denoiser,
            solvers,
            (options.n, *made.model.shape),
            nfe=options.nfe,
            seed=derive_seed(made.seed, 10**9 + 1),
            cond=made.cond(range(options.n)),
            minutes=options.minutes,
            batch_size=options.draw.batch_size,
            progress=session.progress,
        )
        found.save(options.out)
        print(f"{options.out}: {found.story}")
