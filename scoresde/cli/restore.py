"""`scoresde restore`: images from measurements of them, y = A(x) + noise."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scoresde.checks import check_count
from scoresde.cli.common import add_quiet, command_parser, say, session
from scoresde.cli.drawing import Recipe, add_draw_arguments, add_step_arguments, draw, gathered, on_grid, recipe, share
from scoresde.cli.inputs import add_input_arguments, read_inputs
from scoresde.cli.models import Model, add_model_arguments, open_model
from scoresde.cli.sample import Writer, add_out_arguments
from scoresde.denoiser import Denoiser
from scoresde.guidance.operators import Downsample, Grey, LinearOperator, Operator
from scoresde.guidance.operators.words import operator_of
from scoresde.guidance.posterior_sampling import DPS, MomentMatching, PiGDM
from scoresde.guidance.projections import DDNM
from scoresde.guidance.replacement import RePaint, Replacement
from scoresde.levels import to_levels
from scoresde.noise import derive_seed
from scoresde.solvers import SingleStep
from scoresde.solvers.catalogue import solver_of
from scoresde.training import parallel
from scoresde.wrappers import Clip

__all__ = ["add_parser", "run"]

TEXT = """restore images from what is known of them: parts, a grey, small or blurred version, some frequencies

The network is one that was trained on whole images; of y = A(x) + noise it is told nothing, and what is not known is
drawn from p(x | y), or near it: --n of each. By default INPUT are whole images that are measured here, so that results
are compared with the truth (PSNR, of images in [-1, 1]). With --measured they are the measurements y: images with holes
(what is there is not looked at), small ones, ...

--operator A
  mask:FILE.png                 known where the image is white
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
        around: what draws samples without measurements, A, y of each sample, and the arguments, to what draws with.
    """

    solver: str
    nfe: int
    around: Callable[[Recipe, Any, Tensor, argparse.Namespace], Recipe]


def _guided(made: Recipe, guidance: Callable[[Denoiser], Denoiser]) -> Recipe:
    """Around the model. Of pictures the guided means are clipped: at high noise a network's Jacobian can lead them far
    out of the data. A clip inside would take the symmetry of dD/dx.
    """
    clip, denoiser = made.model.about.pictures, made.denoiser
    if isinstance(denoiser, Clip):
        clip, denoiser = True, denoiser.denoiser
    denoiser = guidance(denoiser)
    return replace(made, denoiser=Clip(denoiser) if clip else denoiser)


def _mmps(made: Recipe, A: Operator, y: Tensor, args: argparse.Namespace) -> Recipe:
    return _guided(made, lambda model: MomentMatching(model, A, y, args.noise_std, scale=args.scale))


def _pigdm(made: Recipe, A: Operator, y: Tensor, args: argparse.Namespace) -> Recipe:
    return _guided(made, lambda model: PiGDM(model, A, y, args.noise_std, scale=args.scale))


def _dps(made: Recipe, A: Operator, y: Tensor, args: argparse.Namespace) -> Recipe:
    return _guided(made, lambda model: DPS(model, A, y, args.scale, steps=_steps(made)))


def _ddnm(made: Recipe, A: LinearOperator, y: Tensor, args: argparse.Namespace) -> Recipe:
    return replace(made, denoiser=DDNM(made.denoiser, A, y, args.noise_std))


def _replacement(made: Recipe, A: LinearOperator, y: Tensor, args: argparse.Namespace) -> Recipe:
    return replace(made, solver=Replacement(made.solver, A, y, args.noise_std))


def _repaint(made: Recipe, A: LinearOperator, y: Tensor, args: argparse.Namespace) -> Recipe:
    if not isinstance(made.solver, SingleStep):
        raise ValueError(f"--method repaint repeats single steps, ddpm or ddim say, not those of {made.solver!r}")
    return replace(made, solver=RePaint(A, y, args.noise_std, made.solver, jump=5, resamplings=5))


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


def add_parser(commands: Any) -> None:
    """The arguments of `restore`."""
    parser = command_parser(commands, "restore", TEXT, EXAMPLES)
    add_model_arguments(parser)
    group = parser.add_argument_group("the measurements")
    add_input_arguments(group)
    add = group.add_argument
    add("--operator", required=True, metavar="A", help="how they are measured: see above")
    add("--measured", dest="given", action="store_true", help="INPUT are the measurements, not whole images")
    add("--noise-std", type=float, default=0.0, metavar="STD", help="of the measurement's noise, in units of the data "
        "(images are in [-1, 1]): added here, or with --measured the noise that it has (0; pigdm and mmps take that of "
        "rounding, 0.0023, where INPUT are whole grey levels)")  # fmt: skip
    group = parser.add_argument_group("the samples")
    add = group.add_argument
    add("--method", choices=METHODS, default="pigdm", help="see above (pigdm)")
    add("--scale", type=float, metavar="W", help=f"of the gradient of {', '.join(SCALED)} (1)")
    add("--n", "--number", type=int, default=4, metavar="K", help="of each image (4)")
    add_step_arguments(group, None, ("ddpm; unipc3 for ddnm", "see above"))
    add_draw_arguments(group, conditions=False)
    add_out_arguments(parser, None)
    add_quiet(parser)
    parser.set_defaults(action=run)


def run(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        TypeError, ValueError, ImportError, OSError, CheckpointError: if an argument or a file is wrong, before the
            first evaluation.
        ArithmeticError: if samples are not finite, or a budget ran out.
    """
    check_count(n=args.n, **{k: getattr(args, k) for k in ("limit", "levels") if getattr(args, k) is not None})
    if args.scale is not None and args.method not in SCALED:
        raise ValueError(f"--scale is of {', '.join(SCALED)}: {args.method} follows no gradient")
    if args.variance is not None and args.method != "replacement":
        raise ValueError(f"--variance goes with --method replacement: under {args.method} the variance is another")
    if not 0 <= args.noise_std < math.inf:
        raise ValueError(f"--noise-std {args.noise_std:g}: expected a number >= 0")
    args.scale = 1.0 if args.scale is None else args.scale
    with session(args.device) as device:
        model = open_model(args, device)
        job = _job(args, model)
        writer = Writer(args, model)
        kept: list[Tensor] = []
        try:
            for which, x in draw(job, share(job.samples), args.batch_size, not args.quiet and parallel.rank() == 0):
                writer.add(which, x)
                kept.append(x)
        except (KeyboardInterrupt, SystemExit, ArithmeticError):
            if kept and parallel.world() == 1:
                done = torch.cat(kept)
                _write(writer, job, done)
                say(args, f"\n{len(done)} of {job.samples} samples are in {args.out}")
            raise
        whole = gathered(torch.cat(kept) if kept else torch.empty(0, *model.about.shape))
        if whole is not None:
            _write(writer, job, whole)
            print(f"{args.out}: {len(whole)} samples for {len(job.y)} images, {job.operator!r}, noise "
                  f"{args.noise_std:g}, {args.method} with {job.made.solver!r}, seed {args.seed}")  # fmt: skip
            print(job.scores(whole))


@dataclass(frozen=True)
class _Job:
    """Measurements, and how images are drawn for them.

    Attributes:
        args: the arguments.
        made: what draws without measurements.
        operator: A.
        y: of N images, shape (N, *measurement), on the denoiser's device.
        truth: the images, shape (N, *event), on the CPU; None if they are not known.
        each: K, how many samples of each; sample i is of image i // K.
    """

    args: argparse.Namespace
    made: Recipe
    operator: Operator
    y: Tensor
    truth: Tensor | None
    each: int

    @property
    def samples(self) -> int:
        return len(self.y) * self.each

    def around(self, which: Tensor) -> Recipe:
        """What draws a sample for each of these images."""
        return METHODS[self.args.method].around(self.made, self.operator, self.y[which.to(self.y.device)], self.args)

    def images(self, items: range) -> Tensor:
        """Of which image each of these samples is."""
        return torch.arange(items.start, items.stop, device="cpu") // self.each

    def __call__(self, items: range) -> Tensor:
        """The samples of these numbers.

        Raises:
            NonFiniteError, ArithmeticError: as `Recipe`.
        """
        return self.around(self.images(items))(items)

    def drawn(self) -> Tensor:
        """The measurements as items, on the CPU: with holes, enlarged, or A^T y."""
        A, y, shape = self.operator, self.y.cpu(), self.made.model.about.shape
        if tuple(y.shape[1:]) == shape:
            return y
        if isinstance(A, Grey):
            return y.expand(-1, *shape)
        if isinstance(A, Downsample):
            for dim in range(-A.dims, 0):
                y = y.repeat_interleave(A.factor, dim)
            return y
        assert isinstance(A, LinearOperator)
        return A.adjoint(y)

    def rows(self, x: Tensor) -> Tensor:
        """Truth, measurement and samples of each image, one after the other; those of the last may be fewer."""
        beside = [self.drawn()] if self.truth is None else [self.truth, self.drawn()]
        groups = enumerate(x.split(self.each))
        return torch.cat([torch.cat([*(part[i : i + 1] for part in beside), own]) for i, own in groups])

    def scores(self, x: Tensor) -> str:
        """How far all samples are from what is known, in words."""
        which = self.images(range(len(x)))
        apart = _rms(self.operator(x) - self.y.cpu()[which])
        apart = apart * math.sqrt(self.y[0].numel() / self.operator.informative(self.y))
        texts = [f"residual of the measurement {float(apart.mean()):.3g} rms"]
        if self.truth is not None:
            pictures = self.made.model.about.pictures
            means = torch.stack([own.mean(0) for own in x.split(self.each)])
            named = [("", x, self.truth[which]), (f" of the mean of {self.each}", means, self.truth)]
            if pictures:
                named.append((" of the measurement", self.drawn(), self.truth))
            own = [f"{_error(one, truth, pictures)}{name}" for name, one, truth in named if name != " of the mean of 1"]
            texts.insert(0, f"{'PSNR' if pictures else 'rms error'} {', '.join(own)}")
        return "; ".join(texts)


def _rms(x: Tensor) -> Tensor:
    """Of each entry of the batch, shape (B,)."""
    return x.reshape(len(x), -1).square().mean(1).sqrt()


def _error(x: Tensor, truth: Tensor, pictures: bool) -> str:
    if not pictures:
        return f"{float(_rms(x - truth).mean()):.4g}"
    return f"{float((20 * (2 / _rms(x.clamp(-1, 1) - truth)).log10()).mean()):.2f} dB"


def _write(writer: Writer, job: _Job, x: Tensor) -> None:
    """All samples, and what they are beside."""
    if writer.out.suffix == ".png" and not writer.folder:
        writer.columns = job.each + 1 + (job.truth is not None)
        writer.finish(job.rows(x), job.made)
        return
    more = {"measurement": job.y.cpu()}
    if job.truth is not None:
        more["truth"] = to_levels(job.truth) if job.made.model.about.pictures else job.truth
    writer.finish(x, job.made, more)


def _job(args: argparse.Namespace, model: Model) -> _Job:
    """What the arguments want; all of them are checked."""
    method, shape = METHODS[args.method], model.about.shape
    solver, nfe = args.solver or method.solver, args.nfe
    if nfe is None and args.steps is None and not solver_of(solver).adaptive:
        nfe = method.nfe
    made = recipe(args, model, solver=solver, nfe=nfe)
    if made.told is not None:
        raise ValueError(
            f"the model is told {', '.join(model.about.conditions)}: `scoresde sample --condition-from {args.input} "
            "--measured` restores with it, and `scoresde restore` with one that was trained without --condition"
        )
    if made.label is None and model.about.num_classes is not None:
        own = model.data()
        if own is None or own.drop == 0:
            raise ValueError("the model has classes: say which, --class K (a run with --drop needs none)")
        made = replace(made, label=model.about.num_classes)  # the null class
    A, device = operator_of(args.operator, shape), model.denoiser.device
    with torch.no_grad():
        empty = A(torch.zeros(1, *shape))
    if args.given:
        measured = replace(model, about=replace(model.about, shape=tuple(empty.shape[1:])))
        x, y = None, read_inputs(args, measured, False)[0]
        if model.about.pictures and args.method in ("pigdm", "mmps"):  # whose inverses would make noise of the rounding
            args.noise_std = max(args.noise_std, _rounding(y, args.levels or 256))
    else:
        x = read_inputs(args, model, False)[0]
        y = A(x)
        if args.noise_std:
            y = y + args.noise_std * torch.stack([_noise(i, y.shape[1:]) for i in range(len(y))])
    job = _Job(args, made, A, A.observed(y).to(device), x, args.n)
    counts = {name: n for name, n in (("nfe", nfe), ("steps", args.steps)) if n is not None}
    options = on_grid(job.around(torch.zeros(1, dtype=torch.long)).solver, made.denoiser, counts, args.grid)
    return replace(job, made=replace(made, options=options))


def _noise(i: int, shape: Sequence[int]) -> Tensor:
    """Of the i-th measurement: the same whatever the samples' seed."""
    return torch.randn(tuple(shape), generator=torch.Generator("cpu").manual_seed(derive_seed(0, i, 1)), device="cpu")


def _rounding(y: Tensor, levels: int) -> float:
    """Standard deviation of what rounding to levels of [-1, 1] took from y, a uniform number; 0 if y is not rounded."""
    step = 2 / max(levels - 1, 1)
    k = (y.double() + 1) / step
    return step / math.sqrt(12) if bool(((k - k.round()).abs() < 1e-3).all()) else 0.0


# --- operators in words ----------------------------------------------------------------------------------------------
