"""`scoresde sample`: samples of a trained network, as a picture, an array or files."""

from __future__ import annotations

from dataclasses import dataclass

from scoresde.categorical import StateDenoiser
from scoresde.checks import check_count
from scoresde.cli.common import SessionOptions
from scoresde.cli.drawing import Recipe, SamplesOptions, draw, recipe, share
from scoresde.cli.models import ModelOptions
from scoresde.cli.options import Options, part
from scoresde.cli.states import as_items, state_recipe
from scoresde.cli.writing import OutOptions, Writer
from scoresde.tuning import TunedSolver

TEXT = """draw samples from a trained network: a PNG grid, a .npz file, or a folder of PNG files

Sample i depends on the seed and i alone: it is the same in any number of samples, batch size (up to rounding; with
adaptive solvers, their tolerance) and number of processes. A .npz file holds `images`, 8-bit, (N, C, H, W), where the
data were images, else `x`, float32; and `labels`, where the network has classes. After Ctrl-C or SIGTERM the file holds
what was finished.

A network that was trained with --condition (super-resolution, inpainting, ...) is told that of --condition-from: these
are whole images, of which the condition is made as in training; or with --measured, and where training was told
given:PATH, the conditions themselves. Sample i is for item i; with another --seed it is another one for the same.

A run of `scoresde train-categorical` has the solvers ancestral (100 steps) and tau-leaping."""

EXAMPLES = """
scoresde sample runs/fm --out samples.png                          64 of them, Adams, 20 evaluations
scoresde sample runs/fm --n 5000 --solver ddim --nfe 50 --out samples.npz
scoresde sample runs/fm --class 3 --solver 'DDIM(eta=0.2)' --steps 100 --clip --out threes.png
scoresde sample runs/fm --class 3 --guidance 2 --out typical_threes.png       of a run of `scoresde train --drop 0.1`
scoresde sample runs/text --text "a three left of a seven" --guidance 3 --out seven.png      --negative TEXT: and not
scoresde sample runs/fm --class 3 --classifier c.safetensors --classifier-scale 5 --out guided.png    by a classifier
scoresde sample runs/fm --solver ddpm --nfe 50 --variance table.npz --out analytic.png
scoresde sample runs/fm --solver chosen --nfe 5 --out few.png      the best solver and grid for it, from now on
scoresde sample runs/fm --n 1000 --out folder/                     a PNG file each
scoresde sample runs/sr --condition-from test_folder --out again.png          from large images, made small
scoresde sample runs/sr --condition-from small_folder --measured --out large.png
scoresde sample edm:edm-cifar10-32x32-cond-vp.pkl --class 3 --out cats.png         a network of another toolkit
scoresde sample score_sde:checkpoint_24.pth --name ve/cifar10_ncsnpp_continuous --out samples.png
scoresde sample --denoiser my_model:load --checkpoint model.pt --shape 3 32 32 --out samples.png
torchrun --nproc-per-node=4 -m scoresde sample runs/fm --number 50000 --batch-size 256 --out samples.npz
"""


@dataclass(frozen=True, kw_only=True)
class SampleOptions(Options):
    """The arguments of `sample`."""

    model: ModelOptions = part("the model")
    samples: SamplesOptions = part("the samples")
    out: OutOptions
    session: SessionOptions


def run(options: SampleOptions) -> None:
    """Run the command.

    Raises:
        TypeError, ValueError, ImportError, OSError, CheckpointError: if an argument or a file is wrong, before the
            first evaluation.
        ArithmeticError: if samples are not finite, or a budget ran out.
    """
    session, how, n = options.session, options.samples.draw, options.samples.n
    check_count(**options.given("n", "columns"))
    with session.start() as device:
        model, steps = options.model.open(session, device, states=True), options.samples.steps
        states = isinstance(model.denoiser, StateDenoiser)
        made = state_recipe(how, steps, model) if states else recipe(how, steps, model, progress=session.progress)
        if made.told is not None and how.condition_from is None:
            session.say("conditions are those of what the network was trained on: --condition-from names other items")
        if isinstance(made.solver, TunedSolver):
            session.say(f"chosen for this network: {made.solver.story}")
        writer = Writer(options.out, model.about)
        drawn = (lambda items: as_items(made, made(items))) if states else made
        parts = draw(drawn, share(n), how.batch_size, session.progress)
        whole = writer.collect(parts, lambda x: writer.finish(x, made.labels(range(len(x)))), n, session)
        if whole is not None:
            print(f"{writer.out}: {len(whole)} samples of {made.solver!r}, {_count(made)}, seed {made.seed}")


def _count(made: Recipe) -> str:
    if "grid" in made.options:
        return f"{made.options['grid'].steps} steps"
    return ", ".join(f"{name}={value}" for name, value in made.options.items()) or "adaptive"
