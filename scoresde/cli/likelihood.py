"""The command `scoresde likelihood`: bits/dim of images, or log-densities of other data, from a model and a file.

Finished batches are kept beside --out, FILE.batches.jsonl for FILE.json: a line that says what they are good for, then
a line a batch. A run that was killed goes on from them; one with another model, other data or other arguments refuses
them. Image i is measured with its own seed, so that where the run was killed changes nothing. A network that is told a
class or a condition is told those of each item: the density is that of the item given them.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm.auto import tqdm

from scoresde.checks import check_count
from scoresde.cli.common import add_quiet, check_file, command_parser, going_on, record, session
from scoresde.cli.measuring import add_data_arguments, data_config
from scoresde.cli.models import About, Model, add_denoiser, digest, is_run, load_denoiser, open_run, placed
from scoresde.data import Data, TrainingData, read_data
from scoresde.errors import NonFiniteError, not_finite
from scoresde.levels import outer_edges
from scoresde.likelihood.bits import Dequantize, bits_per_dim, dequantized, log_density, mean_and_stderr
from scoresde.likelihood.bound import elbo
from scoresde.noise import seeds_of
from scoresde.report import Cells, write_json
from scoresde.training import parallel

__all__ = ["add_parser", "run"]

_NOISE = ("dequantize", "repeats", "importance", "t")
_FOR_LEVELS = ("levels", "range", "levels_at_ends", *_NOISE)
_FOR_ODE = ("divergence", "probes", "steps", "rtol", "atol")


TEXT = """bits/dim of images, or log p of other data, from a run folder or your own model; goes on where it was killed

The likelihood is that of the probability-flow ODE. Finished batches are kept beside --out; the same command goes on
from them. Image i is measured with its own seed, whatever the batch. A network that was trained with --classes or
--condition is told those of each item, and the density is the conditional one."""

EXAMPLES = """
scoresde likelihood runs/fm --data fashion-mnist-test --limit 1000 --out bits.json
scoresde likelihood runs/fm --data cifar10-test:/data/cifar --download --steps 40 --bound --out bits.json
scoresde likelihood digits --denoiser my_model:denoiser --steps 40 --bound --out bits.json
scoresde likelihood images.npy --denoiser my_model:load --checkpoint model.pt --out bits.json
torchrun --nproc-per-node=4 -m scoresde likelihood runs/fm --data fashion-mnist-test --out bits.json
"""


def add_parser(commands: Any) -> None:
    """The arguments of `likelihood`."""
    parser = command_parser(commands, "likelihood", TEXT, EXAMPLES)
    parser.set_defaults(action=run)
    add = parser.add_argument
    add("source", nargs="?", metavar="RUN", help="a run folder of `scoresde train`; with --denoiser, the data")
    add("--out", type=Path, required=True, metavar="FILE.json", help="result; finished batches are kept beside it")
    add_data_arguments(parser, "what is measured (what the run was trained on)")
    add_denoiser(parser)
    add("--average", type=int, default=0, metavar="I", help="which averaged weights of a run (0)")
    add("--fresh", action="store_true", help="forget the finished batches of an earlier run")
    add("--limit", type=int, metavar="N", help="the first N items (all)")
    add("--batch", "--batch-size", type=int, default=64, metavar="N", help="items that the network takes at once (64)")
    add("--seed", type=int, default=0, help="of the probes and of the noise in the bins (0)")
    add_quiet(parser)
    ode = parser.add_argument_group("the ODE")
    ode.add_argument("--divergence", choices=("hutchinson", "exact", "hutch++"), help="(hutchinson)")
    ode.add_argument("--probes", type=int, metavar="N", help="of the divergence")
    ode.add_argument("--steps", type=int, metavar="N", help="fixed ones, instead of adaptive steps")
    ode.add_argument("--rtol", type=float, help="of adaptive steps")
    ode.add_argument("--atol", type=float, help="of adaptive steps")
    levels = parser.add_argument_group("data of whole levels")
    levels.add_argument("--levels", type=int, metavar="L", help="how many (256)")
    levels.add_argument("--range", type=float, nargs=2, metavar=("LO", "HI"),
                        help="what the bins of the levels fill, in the model's units (-1 1)")  # fmt: skip
    levels.add_argument("--levels-at-ends", action="store_true",
                        help="level 0 is at LO itself and the last at HI, as after torchvision's ToTensor")  # fmt: skip
    levels.add_argument("--dequantize", choices=get_args(Dequantize), help="noise in the bins (uniform)")
    levels.add_argument("--repeats", type=int, metavar="R", help="independent estimates per image (1)")
    levels.add_argument("--importance", type=int, metavar="K", help="draws of the importance-weighted bound (1)")
    levels.add_argument("--t", type=float, help="where the ODE starts")
    bound = parser.add_argument_group("the variational bound")
    bound.add_argument("--bound", action="store_true", help="in continuous time, beside the likelihood")
    bound.add_argument("--draws", type=int, metavar="N", help="of lambda, per item (64)")


def run(args: argparse.Namespace) -> None:
    """Run the command: measure, write args.out, print a summary.

    Raises:
        TypeError, ValueError, ImportError, OSError, CheckpointError: if an argument or a file is wrong, before any
            network call.
        NonFiniteError: naming the item whose density is not finite.
        ArithmeticError: if the evaluations ran out before an ODE's end.
    """
    check_count(**{name: value for name in ("batch", "limit", "draws") if (value := getattr(args, name)) is not None})
    check_file(args.out)
    with session(args.device) as device:
        job = _Job(args, *_opened(args, device))
        model = job.model
        made_for = model.made_for | {
            **job.settings(),
            "seed": args.seed,
            "device": job.denoiser.device.type,
            "versions": f"scoresde {version('scoresde')}, torch {torch.__version__}",
        }
        path = args.out.with_suffix(".batches.jsonl")
        kept = parallel.by_first(lambda: Batches(path, made_for, args.fresh))
        lead = parallel.rank() == 0
        with (
            going_on("finished batches are kept, and the same command goes on"),
            tqdm(desc="likelihood", total=len(job.x), unit="item", disable=args.quiet or not lead or None) as bar,
        ):
            batches = [range(len(job.x))[first : first + args.batch] for first in range(0, len(job.x), args.batch)]
            bar.update(sum(len(which) for which in batches if which.start in kept.done))
            todo = [which for which in batches if which.start not in kept.done]
            for i in range(0, len(todo), parallel.world()):
                for record in _gathered([job.timed(todo[k]) for k in [i + parallel.rank()] if k < len(todo)]):
                    kept.write(record)
                    bar.update(len(record["each"]))
        if lead:
            result = _result(args, job, kept)
            write_json(args.out, result)
            print(f"{_summary(result)}\nwrote {args.out}")


def _opened(args: argparse.Namespace, device: torch.device) -> tuple[Model, Data, TrainingData | None]:
    """The model and the data, of a run folder and --data, or of --denoiser and the data in their place; and, where the
    network is told more than a class, the data with that."""
    if args.denoiser is not None:
        source = args.data or args.source
        if source is None:
            raise ValueError("--denoiser needs data: scoresde likelihood DATA --denoiser MODULE:NAME")
        denoiser, made_for = load_denoiser(args.denoiser, args.checkpoint)
        denoiser = placed(denoiser, None if args.device is None else str(device))
        data = read_data(source, size=args.size, mode=args.mode, download=args.download)
        args.data = source
        return Model(denoiser, About(tuple(data.x.shape[1:])), made_for), data, None
    if args.source is None:
        raise ValueError("name a run folder, or data and --denoiser MODULE:NAME")
    if not is_run(Path(args.source)):
        raise ValueError(f"{args.source} is no run folder: name one, or the data and --denoiser MODULE:NAME")
    model = open_run(Path(args.source), args.average, device)
    about, chosen = model.about, data_config(args, model.data())
    args.data = chosen.source
    data = read_data(
        chosen.source,
        labels=about.num_classes is not None,
        size=chosen.size,
        mode=chosen.mode,
        download=chosen.download,
    )
    if tuple(data.x.shape[1:]) != about.shape:
        raise ValueError(f"{chosen.source} has items {tuple(data.x.shape[1:])}, the run {args.source} {about.shape}")
    if about.num_classes is None:
        data = data._replace(labels=None)
    if chosen.limit is not None:  # the run's own data
        data = data._replace(x=data.x[: chosen.limit])
    if not data.x.is_floating_point() and data.data_range is None:  # as training scales them
        levels = args.levels or chosen.levels or about.levels or 256
        data = data._replace(levels=levels, data_range=outer_edges(-1.0, 1.0, levels))
    told = replace(model.told_of(chosen), classes=False, levels=data.levels).open() if about.conditions else None
    return model, data, told


def _gathered(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of all processes, in the first; none in the others."""
    if parallel.world() == 1:
        return records
    parts: list[Any] | None = [None] * parallel.world() if parallel.rank() == 0 else None
    dist.gather_object(records, parts)
    return [] if parts is None else [record for part in parts for record in part]


# --- what is measured ------------------------------------------------------------------------------------------------


class _Job:
    """What is measured of each item: bits/dim of levels, log p of floating-point data, and the bound of either."""

    def __init__(self, args: argparse.Namespace, model: Model, data: Data, told: TrainingData | None) -> None:
        self.model, self.told = model, told
        self.denoiser, self.x = model.denoiser, data.x[: args.limit]
        self.labels = None if model.about.num_classes is None or data.labels is None else data.labels[: args.limit]
        if model.about.num_classes is not None and self.labels is None:
            raise ValueError("the model has classes, and the data no labels: expected those of each item")
        self.names = None if data.names is None else data.names[: len(self.x)]
        self.seeds = seeds_of(args.seed, len(self.x))
        self.options = {name: value for name in _FOR_ODE if (value := getattr(args, name)) is not None}
        if "steps" in self.options:
            _refuse(args, ("rtol", "atol"), "is for adaptive steps, and --steps are fixed")
        self.batch, self.bound, self.draws = args.batch, args.bound, args.draws
        self.images: dict[str, Any] | None = None
        if self.x.is_floating_point():
            _refuse(args, _FOR_LEVELS, f"is for data of whole levels, but {args.data} is {self.x.dtype}")
            if bad := not_finite(self.x):
                raise ValueError(f"{args.data} is not finite in items {bad[:8]}{' and more' * (len(bad) > 8)}")
        else:
            self.images = _levels_of(args, data)
            dequantized(self.x, self.images["levels"], data_range=self.images["data_range"], seed=0)  # checks them all
        if not args.bound:
            _refuse(args, ("draws",), "is for --bound")

    @property
    def unit(self) -> str:
        return "nats" if self.images is None else "bits/dim"

    def settings(self) -> dict[str, Any]:
        """What the numbers depend on."""
        made_for = {"data": f"{tuple(self.x.shape)} {self.x.dtype}, {digest(self.x)}", "batch": self.batch}
        labels = {} if self.labels is None else {"labels": digest(self.labels)}
        told = {} if self.told is None else {"conditions of": self.told.fingerprint}
        return (
            made_for | labels | told | self.options | (self.images or {}) | {"bound": self.bound, "draws": self.draws}
        )

    def timed(self, which: range) -> dict[str, Any]:
        """The record of these items, and the seconds that it took."""
        start = time.perf_counter()
        record = self.measure(which)
        return {"first": which.start, **record, "seconds": time.perf_counter() - start}

    def measure(self, which: range) -> dict[str, Any]:
        """The record of these items."""
        x, seeds = self.x[which.start : which.stop], self.seeds[which.start : which.stop]
        cond = {"cond": self._cond(which)}
        try:
            record = self._density(x, seeds, cond) if self.images is None else self._bits_per_dim(x, seeds, cond)
            return record | (self._bound(x, seeds, cond) if self.bound else {})
        except NonFiniteError as stop:
            first = which.start + stop.samples[0]
            name = "" if self.names is None else f" ({self.names[first]})"
            at = "" if stop.time is None else f" at t = {stop.time:.6g}"
            samples = [which.start + j for j in stop.samples]
            raise NonFiniteError(
                f"the density of item {first}{name} is not finite{at}: {len(samples)} such in its batch",
                stop.step, stop.time, samples,
            ) from stop  # fmt: skip

    def _cond(self, which: range) -> dict[str, Tensor] | None:
        """What the network is told of these items; None of a denoiser that takes nothing."""
        cond = {} if self.labels is None else {"label": self.labels[which.start : which.stop]}
        if self.told is not None:
            cond |= self.told.batch(torch.arange(which.start, which.stop, device="cpu")).cond
        return {name: value.to(self.denoiser.device) for name, value in cond.items()} or None

    def _bits_per_dim(self, x: Tensor, seeds: list[int], cond: dict[str, Any]) -> dict[str, Any]:
        assert self.images is not None
        options = self.images | self.options | cond
        found = bits_per_dim(self.denoiser, x, seed=seeds, batch_size=self.batch, **options)
        return {
            "each": found.per_image.tolist(),
            "each_stderr": found.per_image_stderr.tolist(),
            "probe_stderr": found.probe_stderr.tolist(),
            "error": found.error,
            "nfe": found.nfe,
            "t": found.t,
            "offset": found.offset,
        }

    def _density(self, x: Tensor, seeds: list[int], cond: dict[str, Any]) -> dict[str, Any]:
        found = log_density(self.denoiser, x, range(len(x)), seed=seeds, **self.options, **cond)
        return {
            "each": found.value.tolist(),
            "each_stderr": found.stderr.tolist(),
            "probe_stderr": found.stderr.tolist(),
            "error": float(found.error.abs().mean()),
            "nfe": found.nfe,
        }

    def _bound(self, x: Tensor, seeds: list[int], cond: dict[str, Any]) -> dict[str, Any]:
        """Of log p; of bits/dim with uniform noise in the bins, whatever noise the likelihood has."""
        if self.images is not None:
            (lo, hi), levels = self.images["data_range"], self.images["levels"]
            x = dequantized(x, levels, data_range=(lo, hi), seed=seeds)
        found = elbo(self.denoiser, x.to(self.denoiser.device), draws=self.draws, seed=seeds, **cond)
        value, stderr = found.value.double(), found.stderr.double()
        if self.images is not None:
            value, stderr = (
                found.bits_per_dim.double() + math.log2(levels / (hi - lo)),
                stderr / (found.dim * math.log(2)),
            )
        return {"bound": value.tolist(), "bound_stderr": stderr.tolist(), "bound_nfe": found.nfe}


def _levels_of(args: argparse.Namespace, data: Data) -> dict[str, Any]:
    """The arguments of `bits_per_dim` that say what the levels are and how they are dequantised.

    Raises:
        ValueError: if they contradict what is known of the data.
    """
    if args.levels is not None and data.levels not in (None, args.levels):
        raise ValueError(f"--levels {args.levels}: {args.data} has {data.levels}")
    levels = args.levels or data.levels or 256
    data_range = tuple(args.range) if args.range else data.data_range
    if args.levels_at_ends:
        lo, hi = args.range or (-1.0, 1.0)
        data_range = outer_edges(lo, hi, levels)
    chosen: dict[str, Any] = {"levels": levels, "data_range": data_range or (-1.0, 1.0)}
    chosen |= {name: value for name in _NOISE if (value := getattr(args, name)) is not None}
    return chosen


def _refuse(args: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """
    Raises:
        ValueError: if one of them is given.
    """
    for name in names:
        if getattr(args, name) not in (None, False):
            raise ValueError(f"--{name.replace('_', '-')} {why}: leave it out")


# --- what is kept ----------------------------------------------------------------------------------------------------


class Batches(Cells):
    """Finished batches, by their first items."""

    def __init__(self, path: Path, made_for: dict[str, Any], fresh: bool = False) -> None:
        super().__init__(path, "scoresde likelihood", "batches", made_for, _first, fresh)

    def column(self, key: str) -> list[Any]:
        """An entry of every batch, in the order of the items; None is NaN."""
        values = (self.done[first].get(key) for first in sorted(self.done, key=int))  # type: ignore[arg-type]
        return [math.nan if value is None else value for value in values]

    def items(self, key: str) -> Tensor:
        """An entry of every item, float64, shape (N,)."""
        numbers = [math.nan if value is None else value for part in self.column(key) for value in part]
        return torch.tensor(numbers, dtype=torch.float64, device="cpu")


def _first(record: dict[str, Any]) -> int:
    if not isinstance(record["first"], int) or not len(record["each"]) == len(record["each_stderr"]) > 0:
        raise ValueError("no batch")
    return record["first"]


def _result(args: argparse.Namespace, job: _Job, kept: Batches) -> dict[str, Any]:
    each, each_stderr = kept.items("each"), kept.items("each_stderr")
    value, stderr = mean_and_stderr(each, each_stderr)
    sizes = [len(part) for part in kept.column("each")]
    weighted = zip(sizes, kept.column("error"), strict=True)
    result: dict[str, Any] = {
        "unit": job.unit,
        "value": value,
        "stderr": stderr,
        "nfe": sum(kept.column("nfe")),
        "items": len(each),
        "batches": len(sizes),
        "discretisation_error": sum(n * error for n, error in weighted) / len(each),
    }
    if job.images is not None:
        result |= {"offset": kept.column("offset")[0], "t": kept.column("t")[0]}
    if job.bound:
        bound, bound_stderr = kept.items("bound"), kept.items("bound_stderr")
        mean, error = mean_and_stderr(bound, bound_stderr)
        result["bound"] = {"value": mean, "stderr": error, "nfe": sum(kept.column("bound_nfe"))}
        result["bound"] |= {"each": bound.tolist(), "each_stderr": bound_stderr.tolist()}
    result["seconds"] = round(sum(kept.column("seconds")), 3)
    for key in ("each", "each_stderr", "probe_stderr"):
        result[key] = kept.items(key).tolist()
    if job.names is not None:
        result["names"] = job.names
    return result | record(args, job.denoiser.device)


def _summary(result: dict[str, Any]) -> str:
    def shown(value: float, stderr: float) -> str:
        return f"{value:.4f}" + ("" if math.isnan(stderr) else f" +- {stderr:.2g}")

    calls = result["nfe"] / result["batches"]
    text = f"{shown(result['value'], result['stderr'])} {result['unit']} over {result['items']} items"
    text += f", {calls:.0f} network calls a batch; discretisation error about {result['discretisation_error']:.2g}"
    if "bound" in result:
        text += f"\nvariational bound {shown(result['bound']['value'], result['bound']['stderr'])} {result['unit']}"
    return text
