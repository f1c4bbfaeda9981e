"""What the examples share, so that each of them is its data, its networks, its algorithm and what is measured:
arguments, training that goes on where it was, numbers with standard errors, grids of images, and the page of results.

This is no example, and no part of the library: what a program of one's own needs of it, it may copy.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor, nn

from scoresde import Denoiser, sample
from scoresde.denoiser import NetworkDenoiser
from scoresde.info import environment
from scoresde.metrics import Features, evaluate
from scoresde.networks import seeded_global_generators
from scoresde.noise import derive_seed
from scoresde.report import write_json
from scoresde.solvers import Solver
from scoresde.training import CheckpointError, ModelConfig, TrainConfig, Trainer, Weighting, min_snr

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

BLUE, ORANGE = "#0072B2", "#D55E00"  # Okabe and Ito's, for any eyes


def arguments(about: str | None, name: str, /, **options: tuple[Any, str]) -> argparse.ArgumentParser:
    """The parser of an example: --out, runs/NAME by default, --seed, and options of its own.

    Args:
        about: the program's docstring.
        name: the program's.
        options: the default of each, and what it is. A tuple takes as many values, a list at least one, and a type in
            place of a default is that of a value that need not be given.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    ends = {"out": (Path("runs", name), "folder of results"), "seed": (0, "of whatever is random")}
    for option, (default, meaning) in (ends | options).items():
        several = (
            {"nargs": "+" if isinstance(default, list) else len(default)} if isinstance(default, list | tuple) else {}
        )
        one = default[0] if several else default
        flag = "--" + option.replace("_", "-")
        if isinstance(one, type):
            parser.add_argument(flag, type=one, help=meaning, **several)
        else:
            shown = " ".join(map(str, default)) if several else one
            parser.add_argument(flag, type=type(one), default=default, help=f"{meaning} ({shown})", **several)
    return parser


# --- networks and their training -------------------------------------------------------------------------------------


def trained(
    model: ModelConfig | NetworkDenoiser,
    data: Any,
    folder: Path,
    steps: int,
    seed: int = 0,
    *,
    loss: Callable[..., Tensor] | None = None,
    weighting: Weighting | None = None,
    flag: str = "--models",
    **config: Any,
) -> NetworkDenoiser:
    """The denoiser with averaged weights, trained or continued in a run folder.

    Args:
        model: in words, built with the seed; or itself.
        data: a tensor or data source, as a `Trainer` takes it.
        loss: of its own; without, the denoising loss by `weighting`, min-SNR-5 by default.
        flag: the option that names another folder.
        config: of `TrainConfig`, over 64 items a step at a learning rate of 2e-3 and an average of 0.998.
    """
    words = model if isinstance(model, ModelConfig) else None
    denoiser = model.build(seed) if isinstance(model, ModelConfig) else model
    denoiser.net.to(memory_format=torch.channels_last)
    settings = TrainConfig(
        **{"batch_size": 64, "lr": 2e-3, "ema_decay": 0.998, "workers": 0} | config, steps=steps, seed=seed
    )
    how: dict[str, Any] = {"weighting": weighting or min_snr(5.0)} if loss is None else {"loss": loss}
    found: NetworkDenoiser = fitted(Trainer, denoiser, data, settings, folder, flag, model=words, **how).ema
    return found


def fitted(
    trainer: Callable[..., Any],
    net: Any,
    data: Any,
    config: TrainConfig,
    folder: Path,
    flag: str = "--models",
    **how: Any,
) -> Any:
    """A `Trainer`, or one of autoencoders, that has taken its steps: those that a run in the folder has not, with a
    line that says so. A folder of another run ends the program.
    """
    with folders_by(flag):
        made = trainer(net, data, config, folder=folder, **how)
    if made.step < config.steps:
        print(f"training on {len(data)} items, step {made.step} to {config.steps}, into {folder}", flush=True)
    made.fit()
    return made


@contextmanager
def folders_by(flag: str) -> Iterator[None]:
    """What a folder holds of another run ends the program; it says which option names another folder."""
    try:
        yield
    except CheckpointError as error:
        raise SystemExit(f"{error}\n({flag} names another folder)") from error


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A network whose initial weights are of that seed."""
    with seeded_global_generators(seed):
        return make()


def size(net: Any) -> int:
    """How many parameters a network has, or a denoiser's."""
    module = net if isinstance(net, nn.Module) else net.net
    return sum(p.numel() for p in module.parameters())


def spent(folder: Path) -> float:
    """Seconds of the wall clock that a network's training took, whenever it was: the last column of its log."""
    with (folder / "log.csv").open(newline="") as file:
        return float(list(csv.DictReader(file))[-1]["seconds"])


def ran(folder: Path, nets: Mapping[str, Any], start: float) -> dict[str, Any]:
    """How large each network is, how many seconds its run in the folder took, and those since `start`, of the clock
    `time.perf_counter`: what a page has of runs.
    """
    seconds = {name: spent(folder / name) for name in nets} | {"measure": time.perf_counter() - start}
    return {"seconds": seconds, "parameters": {name: size(net) for name, net in nets.items()}}


# --- samples, and numbers of them ------------------------------------------------------------------------------------


def drawn(
    denoiser: Denoiser, event: Sequence[int], solver: Solver, *, nfe: int, seed: int, cond: Mapping[str, Any],
    batch: int = 250,
) -> Tensor:  # fmt: skip
    """A sample in [-1, 1] for each entry of the conditions (lists and tensors), (B, *event), a batch at a time."""
    parts, n = [], len(next(iter(cond.values())))
    for k, first in enumerate(range(0, n, batch)):
        some = {name: value[first : first + batch] for name, value in cond.items()}
        shape = (min(batch, n - first), *event)
        parts.append(sample(denoiser, shape, solver, nfe=nfe, seed=derive_seed(seed, k), cond=some).x.clamp(-1, 1))
    return torch.cat(parts)


def mean_and_error(values: Tensor) -> list[float]:
    """The mean of one number for each item, and its standard error."""
    values = values.double()
    return [float(values.mean()), float(values.std() / len(values) ** 0.5)]


def frechet(
    samples: Mapping[str, Tensor], reference: Tensor, real: Tensor, features: Features
) -> dict[str, list[float]]:
    """The Frechet distance of each to the reference, with its standard error; and of as many "real images" as the first
    has, of other ones, with the standard deviation over choices of them.
    """
    found = {name: evaluate(x, reference, ["frechet"], features, floor=real)["frechet"] for name, x in samples.items()}
    first = next(iter(found.values()))
    return {name: [own.value, own.stderr] for name, own in found.items()} | {
        "real images": [first.floor, first.floor_std]
    }


def cell(value: Sequence[float] | None, digits: int = 2, sign: str = "", factor: float = 1) -> str:
    """A number with its standard error in brackets, in units of 1 / factor; nothing of none."""
    return "" if value is None else f"{factor * value[0]:{sign}.{digits}f} ({factor * value[1]:.{digits}f})"


# --- pictures --------------------------------------------------------------------------------------------------------


@contextmanager
def picture(path: Path, width: float, height: float, dpi: int = 100) -> Iterator[Figure]:
    """A figure of so many inches, which is saved at the end, its folder being made."""
    figure = plt.figure(figsize=(width, height), layout="constrained")
    yield figure
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
    plt.close(figure)


def tile(images: Tensor, columns: int) -> Any:
    """Images (n, C, H, W) in [-1, 1], C = 1 or 3, as one with lines between them, n a multiple of columns; blue where
    they are NaN. An array (height, width, 3) for imshow, in which an image is 64 pixels wide or, if larger, as it is.
    """
    zoom = max(1, 64 // images.shape[-1])
    x = (images.clamp(-1, 1) + 1).div(2).expand(-1, 3, -1, -1)
    x = torch.where(x.isnan(), torch.tensor([0.36, 0.55, 0.72])[:, None, None], x)
    x = x.repeat_interleave(zoom, -1).repeat_interleave(zoom, -2)
    padded = nn.functional.pad(x, (2, 2, 2, 2), value=1.0).unflatten(0, (-1, columns))
    return padded.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).numpy()


def grid(
    axis: plt.Axes, rows: Sequence[Tensor] | Tensor, names: Sequence[object] = (), heads: Sequence[object] = (),
    title: str = "",
) -> None:  # fmt: skip
    """Rows of images (n, C, H, W), a name beside each and a head below each column; a shorter row ends in white."""
    columns = max(map(len, rows))
    filled = [torch.cat([row, row.new_ones(columns - len(row), *row.shape[1:])]) for row in rows]
    shown = tile(torch.cat(filled), columns)
    axis.imshow(shown)
    high, wide = shown.shape[0] / len(filled), shown.shape[1] / columns
    axis.set_yticks([high * (i + 0.5) for i in range(len(names))], names)
    axis.set_xticks([wide * (i + 0.5) for i in range(len(heads))], heads)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_title(title, fontsize=11)


# --- the page --------------------------------------------------------------------------------------------------------


def place(results: Mapping[str, Any]) -> str:
    """The first sentences of a page: what was run, where, and how long it took. The seconds are those of each run,
    "train" where there is one, and of the "measure" that followed.
    """
    about, seconds = results["environment"], dict(results["seconds"])
    rest = seconds.pop("measure", None)
    spent = ", ".join(f"{value:.0f} s" + ("" if name == "train" else f" ({name})") for name, value in seconds.items())
    then = "" if rest is None else f"; samples and scores {rest:.0f} s"
    return f"""`{about["command"]}`: {about["device"]}, {about["threads"]} thread(s), {about["dtype"]};
torch {about["torch"]}; scoresde {about["scoresde"]}, commit {about["commit"]}. Training, by its logs,
{spent} of the wall clock{then}."""


def publish(
    args: argparse.Namespace, name: str, results: Mapping[str, Any], report: Callable[[Any], str],
    draw: Callable[[Path], None],
) -> None:  # fmt: skip
    """Write NAME.png, results.json and README.md into --out, and print the page. To the results are added the machine
    and the versions, and the numbers among the arguments; `report` makes the page of them, `draw` the picture.
    """
    numbers = {key: value for key, value in vars(args).items() if isinstance(value, int | float)}
    found = {"environment": environment(), **numbers, **results}
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "results.json", found)
    page = report(found)
    (args.out / "README.md").write_text(page)
    draw(args.out / f"{name}.png")
    print(f"\n{page}\nwrote {args.out}/{name}.png, results.json and README.md")
