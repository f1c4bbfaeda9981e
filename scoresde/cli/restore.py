"""`scoresde restore`: images from measurements of them, y = A(x) + noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scoresde.checks import check_count
from scoresde.cli.common import SessionOptions
from scoresde.cli.drawing import (
    CLASS_HELP,
    NFE_HELP,
    SOLVER_HELP,
    DrawOptions,
    Recipe,
    StepOptions,
    draw,
    recipe,
    share,
)
from scoresde.cli.inputs import InputOptions
from scoresde.cli.models import Model, ModelOptions
from scoresde.cli.options import Options, option, part
from scoresde.cli.writing import OutOptions, Writer
from scoresde.denoiser import Denoiser
from scoresde.guidance.operators import LinearOperator, Operator
from scoresde.guidance.operators.words import operator_of
from scoresde.guidance.posterior_sampling import DPS, MomentMatching, PiGDM
from scoresde.guidance.projections import DDNM
from scoresde.guidance.replacement import RePaint, Replacement
from scoresde.levels import rounding_std, to_levels
from scoresde.metrics.errors import psnr, rms
from scoresde.solvers import SingleStep
from scoresde.solvers.catalogue import solver_of
from scoresde.wrappers import Clip

TEXT = """restore images from what is known of them: parts, a grey, small or blurred version, some frequencies

The network is one that was trained on whole images; of y = A(x) + noise it is told nothing, and what is not known is
drawn from p(x | y), or near it: --n of each. By default INPUT are whole images that are measured here, so that results
are compared with the truth (PSNR, of images in [-1, 1]). With --measured they are the measurements y: images with holes
(what is there is not looked at), small ones, ...

--operator A
  mask:FILE.png                 known where the image is white; mask:FOLDER has one for each input, by their names
  box:TOP,LEFT,HEIGHT,WIDTH     a hole, in pixels
  random:SHARE                  a share of the pixels is known
  grey                          0.299 R + 0.587 G + 0.114 B
  blur:STD                      Gaussian, in pixels; the image goes on periodically
  down:FACTOR  down:FACTOR:bicubic    smaller, by the mean of FACTOR x FACTOR pixels or bicubic
  fourier:SHARE                 a share of the columns of its Fourier transform: the lowest third, others at random
  quantise:QUALITY              JPEG's rounding, QUALITY from 1 to 100

--method                        evaluations of the network; what each costs beside
  pigdm         50   x given x_t is taken to be N(D, r^2): a backward pass
  mmps          50   its covariance is the network's Jacobian, which fits y more closely: 3 backward passes
  dps          100   steps down |y - A D(x_t)|, for any A; biased, wants many evaluations: a backward pass
  ddnm          20   what y knows replaces that part of D; linear A: nothing
  replacement  100   the known part of each state is overwritten; linear A, what is drawn fits it loosely: nothing
  repaint      250   the same, and each 5 steps are made 5 times, which fits better: nothing

A picture has a row for each image: truth, measurement, samples. A file .npz has `images` (or `x`), those of the first
image first, `truth` and `measurement`; a folder has the samples alone."""

EXAMPLES = """
scoresde restore runs/fm --input fashion-mnist-test --limit 8 --operator box:8,8,12,12 --out holes.png
scoresde restore runs/fm --input photo.png --measured --operator mask:known.png --n 8 --out restored.png
scoresde restore runs/fm --input small/ --measured --operator down:4 --noise-std 0.05 --out large/ --n 1
scoresde restore runs/fm --input folder/ --operator blur:1.5 --noise-std 0.02 --method ddnm --nfe 50 --out sharp.npz
scoresde restore runs/fm --input folder/ --operator random:0.3 --method repaint --nfe 1000 --out repainted.png
"""


class Method(NamedTuple):
    """How measurements are taken account of.

    Attributes:
        solver, nfe: the defaults.
        around: what draws samples without measurements, A, y of each sample, the standard deviation of its noise and
            the scale of the gradient, to what draws with.
    """

    solver: str
    nfe: int
    around: Callable[[Recipe, Any, Tensor, float, float], Recipe]


def _guided(made: Recipe, guidance: Callable[[Denoiser], Denoiser]) -> Recipe:
    """Around the model. Of pictures the guided means are clipped: at high noise a network's Jacobian can lead them far
    out of the data. A clip inside would take the symmetry of dD/dx.
    """
    clip, denoiser = made.model.about.pictures, made.denoiser
    if isinstance(denoiser, Clip):
        clip, denoiser = True, denoiser.denoiser
    denoiser = guidance(denoiser)
    return replace(made, denoiser=Clip(denoiser) if clip else denoiser)


def _mmps(made: Recipe, A: Operator, y: Tensor, noise_std: float, scale: float) -> Recipe:
    return _guided(made, lambda model: MomentMatching(model, A, y, noise_std, scale=scale))


def _pigdm(made: Recipe, A: Operator, y: Tensor, noise_std: float, scale: float) -> Recipe:
    return _guided(made, lambda model: PiGDM(model, A, y, noise_std, scale=scale))


def _dps(made: Recipe, A: Operator, y: Tensor, noise_std: float, scale: float) -> Recipe:
    return _guided(made, lambda model: DPS(model, A, y, scale, steps=_steps(made)))


def _ddnm(made: Recipe, A: LinearOperator, y: Tensor, noise_std: float, scale: float) -> Recipe:
    return replace(made, denoiser=DDNM(made.denoiser, A, y, noise_std))


def _replacement(made: Recipe, A: LinearOperator, y: Tensor, noise_std: float, scale: float) -> Recipe:
    return replace(made, solver=Replacement(made.solver, A, y, noise_std))


def _repaint(made: Recipe, A: LinearOperator, y: Tensor, noise_std: float, scale: float) -> Recipe:
    if not isinstance(made.solver, SingleStep):
        raise ValueError(f"--method repaint repeats single steps, ddpm or ddim say, not those of {made.solver!r}")
    return replace(made, solver=RePaint(A, y, noise_std, made.solver, jump=5, resamplings=5))


METHODS = {
    "pigdm": Method("ddpm", 50, _pigdm),
    "mmps": Method("ddpm", 50, _mmps),
    "dps": Method("ddpm", 100, _dps),
    "ddnm": Method("unipc3", 20, _ddnm),
    "replacement": Method("ddpm", 100, _replacement),
    "repaint": Method("ddpm", 250, _repaint),
}
SCALED = ("pigdm", "mmps", "dps")


def _steps(made: Recipe) -> int:
    """How many steps are made, as far as it is known."""
    if "grid" in made.options:
        return int(made.options["grid"].steps)
    if made.solver.adaptive:
        return 100
    return int(made.options.get("steps") or made.solver.steps_within(made.denoiser.sde, made.options["nfe"]))


@dataclass(frozen=True, kw_only=True)
class RestoreOptions(Options):
    """The arguments of `restore`."""

    model: ModelOptions = part("the model")
    inputs: InputOptions = part("the measurements")
    operator: str = option("how they are measured: see above", metavar="A", group="the measurements", required=True)
    known: bool = option(
        "INPUT are the measurements, not whole images", flags=("--measured",), group="the measurements"
    )
    noise_std: float = option(
        "of the measurement's noise, in units of the data (images are in [-1, 1]): added here, or with --measured the "
        "noise that it has (0; pigdm and mmps take that of rounding, 0.0023, where INPUT are whole grey levels)",
        0.0, "STD", group="the measurements")  # fmt: skip
    method: str = option("see above (pigdm)", "pigdm", group="the samples", choices=METHODS)
    scale: float | None = option(f"of the gradient of {', '.join(SCALED)} (1)", metavar="W", group="the samples")
    n: int = option("of each image (4)", 4, "K", flags=("--n", "--number"), group="the samples")
    steps: StepOptions = part(
        "the samples",
        solver={"help": f"{SOLVER_HELP} (ddpm; unipc3 for ddnm)", "default": ""},
        nfe={"help": NFE_HELP.format("see above")},
    )
    draw: DrawOptions = part(
        "the samples",
        label={"help": f"{CLASS_HELP} (none, where trained with --drop)"},
        condition_from=False,
        measured=False,
    )
    out: OutOptions = part(columns=False, enlarge={"flags": ("--enlarge",)})
    session: SessionOptions


def run(options: RestoreOptions) -> None:
    """Run the command.

    Raises:
        TypeError, ValueError, ImportError, OSError, CheckpointError: if an argument or a file is wrong, before the
            first evaluation.
        ArithmeticError: if samples are not finite, or a budget ran out.
    """
    method, out, session = options.method, options.out, options.session
    check_count(**options.given("n", "limit", "levels"))
    if options.scale is not None and method not in SCALED:
        raise ValueError(f"--scale is of {', '.join(SCALED)}: {method} follows no gradient")
    if options.draw.variance is not None and method != "replacement":
        raise ValueError(f"--variance goes with --method replacement: under {method} the variance is another")
    if not 0 <= options.noise_std < math.inf:
        raise ValueError(f"--noise-std {options.noise_std:g}: expected a number >= 0")
    with session.start() as device:
        job = _job(options, options.model.open(session, device))
        writer = Writer(replace(out, columns=job.each + 1 + (job.truth is not None)), job.made.model.about)
        parts = draw(job, share(job.samples), options.draw.batch_size, session.progress)
        whole = writer.collect(parts, lambda x: _write(writer, job, x), job.samples, session)
        if whole is not None:
            print(f"{out.out}: {len(whole)} samples for {len(job.y)} images, {job.operator!r}, noise "
                  f"{job.noise_std:g}, {method} with {job.made.solver!r}, seed {job.made.seed}")  # fmt: skip
            print(job.scores(whole))


@dataclass(frozen=True)
class _Job:
    """Measurements, and how images are drawn for them.

    Attributes:
        method: how measurements are taken account of.
        made: what draws without them.
        operator: A.
        y: of N images, shape (N, *measurement), on the denoiser's device.
        noise_std: of y.
        scale: of the method's gradient.
        truth: the images, shape (N, *event), on the CPU; None if they are not known.
        each: K, how many samples of each; sample i is of image i // K.
    """

    method: Method
    made: Recipe
    operator: Operator
    y: Tensor
    noise_std: float
    scale: float
    truth: Tensor | None
    each: int

    @property
    def samples(self) -> int:
        return len(self.y) * self.each

    def around(self, which: Tensor) -> Recipe:
        """What draws a sample for each of these images."""
        y = self.y[which.to(self.y.device)]
        return self.method.around(self.made, self.operator.of(which), y, self.noise_std, self.scale)

    def images(self, items: range) -> Tensor:
        """Of which image each of these samples is."""
        return torch.arange(items.start, items.stop, device="cpu") // self.each

    def __call__(self, items: range) -> Tensor:
        """The samples of these numbers.

        Raises:
            NonFiniteError, ArithmeticError: as `Recipe`.
        """
        return self.around(self.images(items))(items)

    def shown(self) -> Tensor:
        """The measurements as items, on the CPU: with holes, enlarged, or A^T y."""
        return self.operator.shown(self.y.cpu(), self.made.model.about.shape)

    def rows(self, x: Tensor) -> Tensor:
        """Truth, measurement and samples of each image, one after the other; those of the last may be fewer."""
        beside = [self.shown()] if self.truth is None else [self.truth, self.shown()]
        groups = enumerate(x.split(self.each))
        return torch.cat([torch.cat([*(part[i : i + 1] for part in beside), own]) for i, own in groups])

    def scores(self, x: Tensor) -> str:
        """How far all samples are from what is known, in words."""
        which, pictures = self.images(range(len(x))), self.made.model.about.pictures
        residual = self.operator.of(which).residual(x, self.y.cpu()[which]).mean()
        text = f"residual of the measurement {float(residual):.3g} rms"
        if self.truth is None:
            return text
        named = [(x, self.truth[which], "")]
        if self.each > 1:
            means = torch.stack([own.mean(0) for own in x.split(self.each)])
            named.append((means, self.truth, f" of the mean of {self.each}"))
        if pictures:
            named.append((self.shown(), self.truth, " of the measurement"))
        own = ", ".join(f"{_error(one, truth, pictures)}{name}" for one, truth, name in named)
        return f"{'PSNR' if pictures else 'rms error'} {own}; {text}"


def _error(x: Tensor, truth: Tensor, pictures: bool) -> str:
    return f"{float(psnr(x, truth).mean()):.2f} dB" if pictures else f"{float(rms(x - truth).mean()):.4g}"


def _write(writer: Writer, job: _Job, x: Tensor) -> None:
    """All samples, and what they are beside."""
    more = {"measurement": job.y.cpu()}
    if job.truth is not None:
        more["truth"] = to_levels(job.truth) if job.made.model.about.pictures else job.truth
    writer.finish(job.rows(x) if writer.picture else x, job.made.labels(range(len(x))), more)


def _check_number(options: RestoreOptions, A: Operator, n: int) -> None:
    if A.samples not in (None, n):
        raise ValueError(f"--operator {options.operator} has {A.samples} masks for {n} inputs: expected one for each")


def _job(options: RestoreOptions, model: Model) -> _Job:
    """What the arguments want; all of them are checked."""
    if model.denoiser.codec is not None:
        raise ValueError(
            "the model diffuses latents, and what is measured are data, of which a decoder makes something that is not "
            "linear: of these methods DPS takes that, in Python: model = scoresde.training.load_latent(run), "
            "DPS(model, lambda z: A(model.codec.decode(z)), y, steps=...)"
        )
    method, shape, steps = METHODS[options.method], model.about.shape, options.steps
    steps = replace(steps, solver=steps.solver or method.solver)
    if not steps.given("nfe", "steps") and not solver_of(steps.solver or method.solver).adaptive:
        steps = replace(steps, nfe=method.nfe)
    made = recipe(options.draw, steps, model, tuned=False)
    if made.told is not None:
        raise ValueError(
            f"the model is told {', '.join(model.about.conditions)}: `scoresde sample --condition-from "
            f"{options.inputs.input} --measured` restores with it, and `scoresde restore` with one that was trained "
            "without --condition"
        )
    if made.label is None and made.model.about.num_classes is not None:
        if not model.blind:
            raise ValueError("the model has classes: say which, --class K (a run with --drop needs none)")
        made = replace(made, label=made.model.about.num_classes)  # the null class
    A, noise_std = operator_of(options.operator, shape), options.noise_std
    if options.known:
        with torch.no_grad():
            empty = A(torch.zeros(1, *shape))
        about = replace(model.about, shape=tuple(empty.shape[1:]))
        x, y = None, options.inputs.read(about, background=model.background)[0]
        _check_number(options, A, len(y))
        if model.about.pictures and options.method in ("pigdm", "mmps"):  # whose inverses would make noise of it
            noise_std = max(noise_std, rounding_std(y, options.inputs.levels or 256))
    else:
        x = options.inputs.read(model.about, background=model.background)[0]
        _check_number(options, A, len(x))
        y = A.measure(x, noise_std)
    y, scale = A.observed(y).to(model.denoiser.device), 1.0 if options.scale is None else options.scale
    job = _Job(method, made, A, y, noise_std, scale, x, options.n)
    solver = job.around(torch.zeros(1, dtype=torch.long)).solver
    return replace(job, made=replace(made, options=steps.counts(solver, made.denoiser)))
