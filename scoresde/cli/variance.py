"""`scoresde variance`: the optimal reverse variance of a network (Analytic-DPM), once for all solvers and steps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from scoresde.checks import check_count
from scoresde.cli.common import DATA_HELP, SessionOptions, check_file
from scoresde.cli.measuring import DataOptions, items_of
from scoresde.cli.models import ModelOptions
from scoresde.cli.options import Options, option, part
from scoresde.codecs import Codec
from scoresde.data import Shown
from scoresde.training import parallel
from scoresde.variance import VarianceTable, estimate
from scoresde.variance.estimate import table_times

TEXT = """estimate a network's table of posterior variances (Analytic-DPM) from the data that it was trained on

A network that was trained with --classes or --condition is told those of each item. Of a run on latents, --codec, the
variance is that of latents, which the data are encoded to. The table is good for any one-step
solver and number of steps: `scoresde sample --variance TABLE.npz`, and in Python
AnalyticDenoiser(denoiser, VarianceTable.load("TABLE.npz"))."""

EXAMPLES = """
scoresde variance runs/fm --samples 100 --out table.npz            on what the run was trained on
scoresde variance runs/fm --data fashion-mnist --samples 1000 --batch-size 256 --out table.npz
scoresde variance --denoiser my_model:load --shape 3 32 32 --data images.npy --out table.npz
scoresde sample runs/fm --solver ddpm --nfe 20 --variance table.npz --out samples.png
torchrun --nproc-per-node=4 -m scoresde variance runs/fm --samples 1000 --out table.npz
"""


@dataclass(frozen=True, kw_only=True)
class VarianceOptions(Options):
    """The arguments of `variance`."""

    model: ModelOptions = part("the model")
    data: DataOptions = part(data={"help": f"what x_0 is drawn from (what the run was trained on): {DATA_HELP}"})
    samples: int = option("draws at each time (100)", 100, "M")
    times: int | None = option("how many, uniform in half log-SNR (100; all nodes of a chain)", metavar="R")
    limit: int | None = option("the first N of the data (all)", metavar="N")
    seed: int = option("of the draws (0)", 0)
    batch_size: int = option("samples that the network takes at once (256)", 256, "N")
    out: Path = option("the table", metavar="TABLE.npz", required=True)
    session: SessionOptions


def run(options: VarianceOptions) -> None:
    """Run the command.

    Raises:
        TypeError, ValueError, ImportError, OSError, CheckpointError: if an argument or a file is wrong, before the
            first evaluation.
        NonFiniteError: if the network's output is not finite.
    """
    check_count(**options.given("limit", "times"))
    if options.times == 1:
        raise ValueError("--times 1: expected 2 at least")
    check_file(options.out, ".npz")
    session = options.session
    with session.start() as device:
        model = options.model.open(session, device)
        chosen = options.data.config(model.data())
        x, told = items_of(model.told_of(chosen), options.limit)
        if tuple(x.shape[1:]) != model.about.shape:
            raise ValueError(f"{chosen.source} has items {tuple(x.shape[1:])}, the model's are {model.about.shape}")
        cond = {name: value.to(model.denoiser.device) for name, value in told.items()}
        what = "items"
        if (codec := model.denoiser.codec) is not None:
            x, what = latents_of(codec, x, options.seed, options.batch_size, device), "latents"
        session.say(f"{options.samples} draws at each time, from {len(x)} {what} of {chosen.source}")
        parts = parallel.to_first(
            estimate(
                model.denoiser,
                x,
                table_times(model.denoiser.sde, options.times),
                samples=options.samples,
                seed=options.seed,
                batch_size=options.batch_size,
                cond=cond,
                progress=session.progress,
                shard=(parallel.rank(), parallel.world()),
            )
        )
        if parts is None:
            return
        table = VarianceTable.merge(parts) if len(parts) > 1 else parts[0]
        table.save(options.out)
        print(summary(table))
        session.say(f"wrote {options.out}")


@torch.no_grad()
def latents_of(codec: Codec, x: Tensor, seed: int, batch_size: int, device: torch.device) -> Tensor:
    """The latents that a run on them is trained on, of each item one, on the CPU: drawn from q(z | x) where the encoder
    has noise, with the numbers of `LatentData` in its first epoch."""
    found = []
    for items in torch.arange(len(x), device="cpu").split(batch_size):
        part = x[items].to(device)
        law = codec.encoding(part)
        if law is None:
            found.append(codec.encode(part).cpu())
        else:
            noise = Shown(items, len(x), seed=seed).normal(law.mean.shape[1:])
            found.append(law.draw(noise.to(law.mean)).cpu())
    return torch.cat(found)


def summary(table: VarianceTable) -> str:
    """A few rows of it."""
    rows = [("t", "E|eps|^2 / d", "stderr", "E Var[x_0 | x_t]")]
    chosen = torch.linspace(0, len(table.t) - 1, min(7, len(table.t))).round().long().unique()
    for i in chosen.tolist():
        t = table.t[i]
        numbers = (t, table.eps_square[i], table.stderr[i], table.covariance(t))
        rows.append(tuple(f"{float(number):.4g}" for number in numbers))  # type: ignore[arg-type]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*lines, f"{len(table.t)} times, {table.samples} draws at each"])
