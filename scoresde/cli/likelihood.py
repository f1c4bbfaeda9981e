"""The command `scoresde likelihood`: bits/dim of images, or log-densities of other data, from a model and a file.

Finished batches are kept beside --out, FILE.batches.jsonl for FILE.json: a line that says what they are good for, then
a line a batch. A run that was killed goes on from them; one with another model, other data or other arguments refuses
them. Image i is measured with its own seed, so that where the run was killed changes nothing. A network that is told a
class or a condition is told those of each item: the density is that of the item given them.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from scoresde.categorical import CategoricalDenoiser
from scoresde.checks import check_count
from scoresde.cli.common import DATA_HELP, SessionOptions, check_file, going_on, record
from scoresde.cli.config import DataConfig
from scoresde.cli.densities import LevelOptions, OdeOptions
from scoresde.cli.measuring import DataOptions
from scoresde.cli.models import (
    NAME_HELP,
    RUN_HELP,
    About,
    DenoiserOptions,
    Model,
    check_takes,
    digest,
    is_run,
    open_published,
    open_run,
)
from scoresde.cli.options import Options, option, part
from scoresde.data import Data, TrainingData, read_data, states_of
from scoresde.errors import NonFiniteError
from scoresde.interop.source import source_of
from scoresde.levels import outer_edges
from scoresde.likelihood.bits import bits_per_dim, dequantized, log_density, mean_and_stderr
from scoresde.likelihood.bound import elbo
from scoresde.noise import seeds_of
from scoresde.report import Cells, write_json
from scoresde.training import parallel

TERMS = ("decoding", "prior", "denoising", "reconstruction", "entropy")

TEXT = """bits/dim of images, or log p of other data, from a run folder or your own model; goes on where it was killed

The likelihood is that of the probability-flow ODE. Finished batches are kept beside --out; the same command goes on
from them. Image i is measured with its own seed, whatever the batch. A model of an autoencoder's latents, or of whole
states, has no likelihood of data but a bound, --bound. A network that was trained with --classes or --condition is told
those of each item, and the density is the conditional one."""

EXAMPLES = """
scoresde likelihood runs/fm --data fashion-mnist-test --limit 1000 --out bits.json
scoresde likelihood runs/fm --data cifar10-test:/data/cifar --download --steps 40 --bound --out bits.json
scoresde likelihood digits --denoiser my_model:denoiser --steps 40 --bound --out bits.json
scoresde likelihood runs/latent --data fashion-mnist-test --limit 256 --bound --out bound.json     in its terms
scoresde likelihood images.npy --denoiser my_model:load --checkpoint model.pt --out bits.json
torchrun --nproc-per-node=4 -m scoresde likelihood runs/fm --data fashion-mnist-test --out bits.json
"""


@dataclass(frozen=True, kw_only=True)
class LikelihoodOptions(Options):
    """The arguments of `likelihood`."""

    source: str | None = option(f"{RUN_HELP}; with --denoiser, the data", metavar="RUN", flags=("source",), nargs="?")
    out: Path = option("result; finished batches are kept beside it", metavar="FILE.json", required=True)
    data: DataOptions = part(
        data={"help": f"what is measured (what the run was trained on): {DATA_HELP}"}, levels=False
    )
    own: DenoiserOptions
    name: str | None = option(NAME_HELP)
    average: int = option("which averaged weights of a run (0)", 0, "I")
    fresh: bool = option("forget the finished batches of an earlier run")
    limit: int | None = option("the first N items (all)", metavar="N")
    batch: int = option("items that the network takes at once (64)", 64, "N", flags=("--batch", "--batch-size"))
    seed: int = option("of the probes and of the noise in the bins (0)", 0)
    session: SessionOptions
    ode: OdeOptions = part("the ODE")
    levels: LevelOptions = part("data of whole levels")
    bound: bool = option("in continuous time, beside the likelihood", group="the variational bound")
    draws: int | None = option("of lambda, per item (64)", metavar="N", group="the variational bound")


def run(options: LikelihoodOptions) -> None:
    """Run the command: measure, write --out, print a summary.

    Raises:
        TypeError, ValueError, ImportError, OSError, CheckpointError: if an argument or a file is wrong, before any
            network call.
        NonFiniteError: naming the item whose density is not finite.
        ArithmeticError: if the evaluations ran out before an ODE's end.
    """
    out, batch, session = options.out, options.batch, options.session
    check_count(**options.given("batch", "limit", "draws"))
    check_file(out)
    with session.start() as device:
        job = _job(options, device)
        made_for = job.model.made_for | {
            **job.settings(),
            "seed": options.seed,
            "device": job.denoiser.device.type,
            "versions": f"scoresde {version('scoresde')}, torch {torch.__version__}",
        }
        path = out.with_suffix(".batches.jsonl")
        kept = parallel.by_first(lambda: Batches(path, made_for, options.fresh))
        with (
            going_on("finished batches are kept, and the same command goes on"),
            tqdm(desc="likelihood", total=len(job.x), unit="item", disable=not session.progress or None) as bar,
        ):
            batches = [range(len(job.x))[first : first + batch] for first in range(0, len(job.x), batch)]
            bar.update(sum(len(which) for which in batches if which.start in kept.done))
            todo = [which for which in batches if which.start not in kept.done]
            for i in range(0, len(todo), parallel.world()):
                mine = todo[i + parallel.rank() : i + parallel.rank() + 1]
                for record in itertools.chain(*parallel.to_first([job.timed(which) for which in mine]) or []):
                    kept.write(record)
                    bar.update(len(record["each"]))
        if parallel.rank() == 0:
            result = _result(job, kept)
            write_json(out, result)
            print(f"{_summary(result)}\nwrote {out}")


def _job(options: LikelihoodOptions, device: torch.device) -> _Job:
    """What is measured: the model and the data of a run folder and --data, or of --denoiser and the data in their
    place; and, where the network is told more than a class, the data with that."""
    which = options.data
    if options.own.denoiser is not None:
        source = options.source if which.data is None else which.data
        if source is None:
            raise ValueError("--denoiser needs data: scoresde likelihood DATA --denoiser MODULE:NAME")
        denoiser, made_for = options.own.load(None if options.session.device is None else device)
        data = _read(which.config(None, source))
        check_takes(options.own.denoiser, denoiser, tuple(data.x.shape[1:]))
        model = Model(denoiser, About(tuple(data.x.shape[1:])), made_for)
        return _Job(replace(options, data=replace(which, data=source)), model, data, None)
    if options.source is None:
        raise ValueError("name a run folder, or data and --denoiser MODULE:NAME")
    if source_of(options.source):
        model = open_published(options.source, options.name, device)
    elif is_run(Path(options.source)):
        model = open_run(Path(options.source), options.average, device, states=True)
    else:
        raise ValueError(f"{options.source} is no run folder: name one, or the data and --denoiser MODULE:NAME")
    about, chosen = model.about, which.config(model.data())
    data = _read(replace(chosen, classes=about.num_classes is not None))
    if tuple(data.x.shape[1:]) != about.shape:
        raise ValueError(f"{chosen.source} has items {tuple(data.x.shape[1:])}, the run {options.source} {about.shape}")
    if about.num_classes is None:
        data = data._replace(labels=None)
    if chosen.limit is not None:  # the run's own data
        data = data._replace(x=data.x[: chosen.limit])
    if not data.x.is_floating_point() and data.data_range is None:  # as training scales them
        levels = options.levels.levels or chosen.levels or about.levels or 256
        data = data._replace(levels=levels, data_range=outer_edges(-1.0, 1.0, levels))
    told = replace(model.told_of(chosen), classes=False, levels=data.levels).open() if about.conditions else None
    return _Job(replace(options, data=replace(which, data=chosen.source)), model, data, told)


def _read(data: DataConfig) -> Data:
    """The items, in memory."""
    return read_data(data.source, labels=data.classes, skip=data.skip, download=data.download, **data.alike)


# --- what is measured ------------------------------------------------------------------------------------------------


class _Job:
    """What is measured of each item: bits/dim of levels, log p of floating-point data, and the bound of either."""

    def __init__(self, options: LikelihoodOptions, model: Model, data: Data, told: TrainingData | None) -> None:
        self.options, self.model, self.told, limit, source = options, model, told, options.limit, options.data.data
        self.denoiser, self.x = model.denoiser, data.x[:limit]
        self.labels = None if model.about.num_classes is None or data.labels is None else data.labels[:limit]
        if model.about.num_classes is not None and self.labels is None:
            raise ValueError("the model has classes, and the data no labels: expected those of each item")
        self.names = None if data.names is None else data.names[: len(self.x)]
        self.seeds = seeds_of(options.seed, len(self.x))
        self.ode = options.ode.given()
        if options.ode.steps is not None:
            _refuse(options.given("rtol", "atol"), "is for adaptive steps, and --steps are fixed")
        self.images: dict[str, Any] | None = None
        self.terms: tuple[str, ...] = TERMS
        if isinstance(self.denoiser, CategoricalDenoiser):
            self._of_states(data)
            return
        if self.x.is_floating_point():
            _refuse(options.levels.given(), f"is for data of whole levels, but {source} is {self.x.dtype}")
        else:
            self.images = options.levels.of_data(source, data)
            dequantized(self.x, self.images["levels"], data_range=self.images["data_range"], seed=0)  # checks them all
        if not options.bound:
            _refuse(options.given("draws"), "is for --bound")
        codec = self.denoiser.codec
        self.bound_alone = codec is not None and codec.log_volume(self._real(self.x[:1])) is None
        if self.bound_alone:
            if not options.bound:
                raise ValueError("the model diffuses an autoencoder's latents: of data it has a bound alone, --bound")
            _refuse([*self.ode, *options.levels.noise.given()], "is of a likelihood, and a latent model has none")

    def _of_states(self, data: Data) -> None:
        """Items as whole states, of which a bound is to be had, and nothing else."""
        options, denoiser = self.options, self.denoiser
        assert isinstance(denoiser, CategoricalDenoiser)
        if not options.bound:
            raise ValueError("the model is of whole states: of these it has a bound alone, --bound")
        _refuse([*self.ode, *options.levels.noise.given()], "is of a likelihood, and whole states have none")
        if data.levels is None or self.x.is_floating_point():
            raise ValueError(f"whole states are made of whole levels, but {options.data.data} is {self.x.dtype}")
        self.x = states_of(self.x, data.levels, denoiser.process.states)
        self.bound_alone, self.terms = True, ("prior", "denoising", "reconstruction")

    @property
    def unit(self) -> str:
        return "nats" if self.images is None else "bits/dim"

    def settings(self) -> dict[str, Any]:
        """What the numbers depend on."""
        made_for = {"data": f"{tuple(self.x.shape)} {self.x.dtype}, {digest(self.x)}", "batch": self.options.batch}
        labels = {} if self.labels is None else {"labels": digest(self.labels)}
        told = {} if self.told is None else {"conditions of": self.told.fingerprint}
        bound = {"bound": self.options.bound, "draws": self.options.draws}
        return made_for | labels | told | self.ode | (self.images or {}) | bound

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
            bound = self._bound(x, seeds, cond) if self.options.bound else {}
            if self.bound_alone:
                return bound
            record = self._density(x, seeds, cond) if self.images is None else self._bits_per_dim(x, seeds, cond)
            return record | bound
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
        options = self.images | self.ode | cond
        found = bits_per_dim(self.denoiser, x, seed=seeds, batch_size=self.options.batch, **options)
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
        found = log_density(self.denoiser, x, range(len(x)), seed=seeds, **self.ode, **cond)
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
            of_levels = self.images["levels"], self.images["data_range"]
            x = dequantized(x, of_levels[0], data_range=of_levels[1], seed=seeds)
        elif self.bound_alone and not isinstance(self.denoiser, CategoricalDenoiser):
            x = x.float()
        found = elbo(self.denoiser, x.to(self.denoiser.device), draws=self.options.draws, seed=seeds, **cond)
        value, stderr = (found.value, found.stderr) if self.images is None else found.of_levels(*of_levels)
        record = {"bound": value.tolist(), "bound_stderr": stderr.tolist(), "bound_nfe": found.nfe}
        if not self.bound_alone:
            return record
        terms = {name: getattr(found, name).tolist() for name in self.terms}
        return {"each": record["bound"], "each_stderr": record["bound_stderr"], **record, **terms}

    def _real(self, x: Tensor) -> Tensor:
        """Items of any kind as numbers that a codec takes."""
        return x.float().to(self.denoiser.device)


def _refuse(given: Iterable[str], why: str) -> None:
    """Raises ValueError if an argument is given."""
    for name in given:
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


def _result(job: _Job, kept: Batches) -> dict[str, Any]:
    if job.bound_alone:
        return _bound_alone(job, kept)
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
    if job.options.bound:
        bound, bound_stderr = kept.items("bound"), kept.items("bound_stderr")
        mean, error = mean_and_stderr(bound, bound_stderr)
        result["bound"] = {"value": mean, "stderr": error, "nfe": sum(kept.column("bound_nfe"))}
        result["bound"] |= {"each": bound.tolist(), "each_stderr": bound_stderr.tolist()}
    result["seconds"] = round(sum(kept.column("seconds")), 3)
    for key in ("each", "each_stderr", "probe_stderr"):
        result[key] = kept.items(key).tolist()
    if job.names is not None:
        result["names"] = job.names
    return result | record(job.options, job.denoiser.device)


def _bound_alone(job: _Job, kept: Batches) -> dict[str, Any]:
    """Of a latent model, or of whole states: the bound, and its terms in nats an item."""
    bound, stderr = kept.items("bound"), kept.items("bound_stderr")
    mean, error = mean_and_stderr(bound, stderr)
    terms = {}
    for name in job.terms:
        value, of_value = mean_and_stderr(each := kept.items(name), torch.zeros_like(each))
        terms[name] = {"value": value, "stderr": of_value}
    result: dict[str, Any] = {
        "unit": job.unit,
        "bound": {"value": mean, "stderr": error, "terms": terms, "nfe": sum(kept.column("bound_nfe"))},
        "items": len(bound),
        "batches": len(kept.column("bound_nfe")),
        "seconds": round(sum(kept.column("seconds")), 3),
        "each": bound.tolist(),
        "each_stderr": stderr.tolist(),
    }
    return result | ({} if job.names is None else {"names": job.names}) | record(job.options, job.denoiser.device)


def _summary(result: dict[str, Any]) -> str:
    def shown(value: float, stderr: float) -> str:
        return f"{value:.4f}" + ("" if math.isnan(stderr) else f" +- {stderr:.2g}")

    if "value" not in result:
        bound = result["bound"]
        text = (
            f"variational bound {shown(bound['value'], bound['stderr'])} {result['unit']} over {result['items']} items"
        )
        terms = (f"{name} {shown(term['value'], term['stderr'])}" for name, term in bound["terms"].items())
        return f"{text}; in nats an item: {', '.join(terms)}"
    calls = result["nfe"] / result["batches"]
    text = f"{shown(result['value'], result['stderr'])} {result['unit']} over {result['items']} items"
    text += f", {calls:.0f} network calls a batch"
    if math.isfinite(error := result["discretisation_error"]):  # so few steps offer no estimate
        text += f"; discretisation error about {error:.2g}"
    else:
        text += "; no estimate of the discretisation error from so few steps: more --steps give one"
    if "bound" in result:
        text += f"\nvariational bound {shown(result['bound']['value'], result['bound']['stderr'])} {result['unit']}"
    return text
