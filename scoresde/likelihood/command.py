"""The command `scoresde likelihood`: bits/dim of images, or log-densities of other data, from a model and a file.

Finished batches are kept beside --out, FILE.batches.jsonl for FILE.json: a line that says what they are good for, then
a line a batch. A run that was killed goes on from them; one with another model, other data or other arguments refuses
them. Image i is measured with its own seed, so that where the run was killed changes nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import inspect
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import torch
from torch import Tensor
from tqdm.auto import tqdm

from scoresde.data import BUILT_IN, Data, read_data
from scoresde.denoiser import Denoiser, networks
from scoresde.errors import NonFiniteError, not_finite
from scoresde.files import write_whole
from scoresde.info import environment
from scoresde.likelihood.bound import elbo
from scoresde.likelihood.discrete import (
    Dequantize,
    bits_per_dim,
    dequantized,
    image_seeds,
    log_density,
    mean_and_stderr,
    outer_edges,
)
from scoresde.solvers.base import check_count

__all__ = ["add_arguments", "likelihood"]

FORMAT = "scoresde-likelihood-1"

_NOISE = ("dequantize", "repeats", "importance", "t")
_FOR_LEVELS = ("levels", "range", "levels_at_ends", *_NOISE)
_FOR_ODE = ("divergence", "probes", "steps", "rtol", "atol")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `likelihood`."""
    add = parser.add_argument
    add("data", help=f"{', '.join(BUILT_IN)}; a .npy or .npz array of whole levels (N, C, H, W) or of floating-point "
        "data; or a folder of PNG and JPEG images")  # fmt: skip
    add("--denoiser", required=True, metavar="MODULE:NAME", help="a Denoiser, or a function that returns one")
    add("--checkpoint", type=Path, metavar="FILE", help="given to that function, as its only argument")
    add("--out", type=Path, required=True, metavar="FILE.json", help="result; finished batches are kept beside it")
    add("--fresh", action="store_true", help="forget the finished batches of an earlier run")
    add("--limit", type=int, metavar="N", help="the first N items (all)")
    add("--batch", type=int, default=64, metavar="N", help="items that the network takes at once (64)")
    add("--seed", type=int, default=0, help="of the probes and of the noise in the bins (0)")
    add("--device", help="moves the network there (where it is)")
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


def likelihood(args: argparse.Namespace) -> None:
    """Run the command: measure, write args.out, print a summary.

    Raises:
        TypeError, ValueError, ImportError, OSError, CheckpointError: if an argument or a file is wrong, before any
            network call.
        NonFiniteError: naming the item whose density is not finite.
        ArithmeticError: if the evaluations ran out before an ODE's end.
    """
    check_count(**{name: value for name in ("batch", "limit", "draws") if (value := getattr(args, name)) is not None})
    if args.out.is_dir():
        raise ValueError(f"--out {args.out} is a folder: give a file")
    denoiser, made_for = load_denoiser(args.denoiser, args.checkpoint)
    job = _Job(args, placed(denoiser, args.device), read_data(args.data))
    made_for |= {
        **job.settings(),
        "seed": args.seed,
        "device": denoiser.device.type,
        "versions": f"scoresde {version('scoresde')}, torch {torch.__version__}",
    }
    kept = Batches(args.out.with_suffix(".batches.jsonl"), made_for, args.fresh)
    with tqdm(desc="likelihood", total=len(job.x), unit="item", disable=None, leave=False) as bar:
        for first in range(0, len(job.x), args.batch):
            which = range(len(job.x))[first : first + args.batch]
            if first not in kept.done:
                start = time.perf_counter()
                record = job.measure(which)
                kept.write({"first": first, **record, "seconds": time.perf_counter() - start})
            bar.update(len(which))
    result = _result(args, job, kept)
    _write_json(args.out, result)
    print(f"{_summary(result)}\nwrote {args.out}")


# --- the model -------------------------------------------------------------------------------------------------------


def load_denoiser(text: str, checkpoint: Path | None = None) -> tuple[Denoiser, dict[str, str]]:
    """The denoiser that module:name is or makes, and what tells it from others: hashes of the module, the checkpoint
    and the weights.

    Raises:
        ImportError: if the module cannot be imported.
        ValueError: if it has no such name, or that is no Denoiser and makes none.
        FileNotFoundError: if there is no such checkpoint.
    """
    module_name, _, name = text.partition(":")
    if not module_name or not name:
        raise ValueError(f"--denoiser {text!r}: expected MODULE:NAME, my_model:denoiser say")
    if checkpoint is not None and not checkpoint.is_file():
        raise FileNotFoundError(f"--checkpoint {checkpoint}: there is no such file")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # a console script's path does not have it
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ImportError(f"--denoiser {text}: {error}") from error
    if not hasattr(module, name):
        raise ValueError(f"--denoiser {text}: {module.__name__} has no {name!r}")
    found = getattr(module, name)
    if isinstance(found, Denoiser) and checkpoint is not None:
        raise ValueError(f"--denoiser {text} is a Denoiser already: with --checkpoint, name a function of its path")
    if not isinstance(found, Denoiser) and callable(found):
        found = found() if checkpoint is None else found(checkpoint)
    if not isinstance(found, Denoiser):
        raise ValueError(f"--denoiser {text} gives {type(found).__name__}: expected a scoresde Denoiser")
    return found, {
        "denoiser": f"{text}, {_source_digest(module)}",
        "checkpoint": "none" if checkpoint is None else _sha(checkpoint.read_bytes()),
        "weights": _weights_digest(found),
    }


def placed(denoiser: Denoiser, device: str | None) -> Denoiser:
    """The denoiser with its network on that device, in eval mode.

    Raises:
        ValueError: if it cannot be moved there.
    """
    try:
        for net in networks(denoiser):
            net.eval()
            if device is not None:
                net.to(device)
        device = None if device is None else torch.device(device).type
    except (RuntimeError, AssertionError) as error:  # no such device, or not in this build
        raise ValueError(f"--device {device}: {error}") from error
    if device is not None and denoiser.device.type != device:
        raise ValueError(f"--device {device}: {denoiser!r} is on {denoiser.device} and has no network to move")
    return denoiser


# --- what is measured ------------------------------------------------------------------------------------------------


class _Job:
    """What is measured of each item: bits/dim of levels, log p of floating-point data, and the bound of either."""

    def __init__(self, args: argparse.Namespace, denoiser: Denoiser, data: Data) -> None:
        self.denoiser, self.x = denoiser, data.x[: args.limit]
        self.names = None if data.names is None else data.names[: len(self.x)]
        self.seeds = image_seeds(args.seed, len(self.x))
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
        made_for = {"data": f"{tuple(self.x.shape)} {self.x.dtype}, {_digest(self.x)}", "batch": self.batch}
        return made_for | self.options | (self.images or {}) | {"bound": self.bound, "draws": self.draws}

    def measure(self, which: range) -> dict[str, Any]:
        """The record of these items."""
        x, seeds = self.x[which.start : which.stop], self.seeds[which.start : which.stop]
        try:
            record = self._density(x, seeds) if self.images is None else self._bits_per_dim(x, seeds)
            return record | (self._bound(x, seeds) if self.bound else {})
        except NonFiniteError as stop:
            first = which.start + stop.samples[0]
            name = "" if self.names is None else f" ({self.names[first]})"
            at = "" if stop.time is None else f" at t = {stop.time:.6g}"
            samples = [which.start + j for j in stop.samples]
            raise NonFiniteError(
                f"the density of item {first}{name} is not finite{at}: {len(samples)} such in its batch",
                stop.step, stop.time, samples,
            ) from stop  # fmt: skip

    def _bits_per_dim(self, x: Tensor, seeds: list[int]) -> dict[str, Any]:
        assert self.images is not None
        found = bits_per_dim(self.denoiser, x, seed=seeds, batch_size=self.batch, **self.images, **self.options)
        return {
            "each": found.per_image.tolist(),
            "each_stderr": found.per_image_stderr.tolist(),
            "probe_stderr": found.probe_stderr.tolist(),
            "error": found.error,
            "nfe": found.nfe,
            "t": found.t,
            "offset": found.offset,
        }

    def _density(self, x: Tensor, seeds: list[int]) -> dict[str, Any]:
        found = log_density(self.denoiser, x, range(len(x)), seed=seeds, **self.options)
        return {
            "each": found.value.tolist(),
            "each_stderr": found.stderr.tolist(),
            "probe_stderr": found.stderr.tolist(),
            "error": float(found.error.abs().mean()),
            "nfe": found.nfe,
        }

    def _bound(self, x: Tensor, seeds: list[int]) -> dict[str, Any]:
        """Of log p; of bits/dim with uniform noise in the bins, whatever noise the likelihood has."""
        if self.images is not None:
            (lo, hi), levels = self.images["data_range"], self.images["levels"]
            x = dequantized(x, levels, data_range=(lo, hi), seed=seeds)
        found = elbo(self.denoiser, x.to(self.denoiser.device), draws=self.draws, seed=seeds)
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


class Batches:
    """Finished batches in a file of JSON lines, the first of which says what they are good for.

    A line that was being written when the run was killed is dropped: it has no end.

    Raises:
        ValueError: if the file is damaged, is another file, or was made for something else; the message names it, and
            each difference.
    """

    def __init__(self, path: Path, made_for: dict[str, Any], fresh: bool = False) -> None:
        self.path, self.made_for = path, json.loads(json.dumps(made_for))
        self.done: dict[int, dict[str, Any]] = {}
        if fresh:
            path.unlink(missing_ok=True)
        if not path.exists():
            return
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        head, *lines = whole.decode(errors="replace").splitlines() or [""]
        if head or not content.startswith(b'{"format"'[: len(content)]):
            self._check(head)
        for number, line in enumerate(lines, 2):
            record = self._parse(number, line)
            self.done[record["first"]] = record
        os.truncate(path, len(whole))

    def write(self, record: dict[str, Any]) -> None:
        """Keep a batch, from its first item on."""
        record = json.loads(json.dumps(_without_nan(record)))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            head = "" if file.tell() else json.dumps({"format": FORMAT, "made_for": self.made_for}) + "\n"
            file.write(head + json.dumps(record) + "\n")
        self.done[record["first"]] = record

    def _check(self, line: str) -> None:
        made_for = self.made_for
        try:
            head = json.loads(line)
            known, theirs = head["format"] == FORMAT, dict(head["made_for"])
        except (ValueError, TypeError, KeyError):
            known, theirs = False, {}
        if not known:
            raise ValueError(f"{self.path} is not a file of `scoresde likelihood`: give another --out, or remove it")
        different = [
            f"{key}: {theirs.get(key, 'nothing')} in the file, {made_for.get(key, 'nothing')} now"
            for key in sorted({*theirs, *made_for})
            if theirs.get(key) != made_for.get(key)
        ]
        if different:
            raise ValueError(
                f"{self.path} holds batches of another run: {'; '.join(different)}. --fresh forgets them, another "
                "--out keeps them"
            )

    def _parse(self, number: int, line: str) -> dict[str, Any]:
        try:
            record = json.loads(line)
            if isinstance(record["first"], int) and len(record["each"]) == len(record["each_stderr"]) > 0:
                return dict(record)
        except (ValueError, TypeError, KeyError):
            pass
        raise ValueError(f"{self.path}: line {number} is damaged; --fresh forgets the file, or remove that line")

    def column(self, key: str) -> list[Any]:
        """An entry of every batch, in the order of the items; None is NaN."""
        values = (self.done[first].get(key) for first in sorted(self.done))
        return [math.nan if value is None else value for value in values]

    def items(self, key: str) -> Tensor:
        """An entry of every item, float64, shape (N,)."""
        numbers = [math.nan if value is None else value for part in self.column(key) for value in part]
        return torch.tensor(numbers, dtype=torch.float64, device="cpu")


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
    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    result |= {"arguments": arguments, "environment": environment(job.denoiser.device)}
    return result


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(_without_nan(content), indent=1, allow_nan=False) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))


def _without_nan(content: Any) -> Any:
    """NaN, which JSON has not, as null."""
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _summary(result: dict[str, Any]) -> str:
    def shown(value: float, stderr: float) -> str:
        return f"{value:.4f}" + ("" if math.isnan(stderr) else f" +- {stderr:.2g}")

    calls = result["nfe"] / result["batches"]
    text = f"{shown(result['value'], result['stderr'])} {result['unit']} over {result['items']} items"
    text += f", {calls:.0f} network calls a batch; discretisation error about {result['discretisation_error']:.2g}"
    if "bound" in result:
        text += f"\nvariational bound {shown(result['bound']['value'], result['bound']['stderr'])} {result['unit']}"
    return text


def _source_digest(module: ModuleType) -> str:
    source = inspect.getsourcefile(module)
    return "no source" if source is None else _sha(Path(source).read_bytes())


def _weights_digest(denoiser: Denoiser) -> str:
    nets, total = list(networks(denoiser)), hashlib.sha256()
    for net in nets:
        for name, value in net.state_dict().items():
            if isinstance(value, Tensor):
                total.update(f"{name} {_digest(value)}".encode())
    return f"sha256 {total.hexdigest()[:12]}" if nets else "none"


def _digest(x: Tensor) -> str:
    content: Any = x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return _sha(content)


def _sha(content: Any) -> str:
    return f"sha256 {hashlib.sha256(content).hexdigest()[:12]}"
