"""`scoresde info`, `scoresde solvers` and `scoresde tableau`: what there is, and the coefficients of a solver."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scoresde.cli.common import command_parser
from scoresde.cli.drawing import GRIDS
from scoresde.cli.models import NAME_HELP, RUN_HELP, open_run, parameters
from scoresde.cli.options import Options, option
from scoresde.denoiser import Denoiser
from scoresde.diagnose import left_of_data
from scoresde.grid import SPACINGS
from scoresde.info import environment
from scoresde.interop.source import from_source, source_of
from scoresde.processes import SDES, sde_of
from scoresde.solvers import available
from scoresde.solvers.catalogue import HEADER, SOLVERS, markdown, solver_of

__all__ = ["add_parsers"]


@dataclass(frozen=True, kw_only=True)
class InfoOptions(Options):
    """The arguments of `info`."""

    folder: Path | None = option(RUN_HELP, metavar="run", flags=("folder",), nargs="?")
    name: str | None = option(NAME_HELP)


@dataclass(frozen=True, kw_only=True)
class SolversOptions(Options):
    """The arguments of `solvers`."""

    markdown: bool = option("as docs/solvers.md has it")


@dataclass(frozen=True, kw_only=True)
class TableauOptions(Options):
    """The arguments of `tableau`."""

    solver: str = option(
        "a name from `scoresde solvers`, or a call, 'DDIM(eta=0.2)'", metavar="solver", flags=("solver",)
    )
    sde: str = option(f"with its default parameters: {', '.join(SDES)} (vp)", "vp", "SDE")
    steps: int = option("(10)", 10)
    grid: str = option("spacing (the solver's own)", "default", choices=GRIDS)


def add_parsers(commands: Any) -> None:
    """The arguments of the three."""
    command_parser(
        commands, "info", "versions, devices, and what there is; or what is in a run folder",
        "scoresde info\nscoresde info runs/fm\nscoresde info edm:edm-cifar10-32x32-cond-vp.pkl", info, InfoOptions,
    )  # fmt: skip
    command_parser(
        commands, "solvers", "every solver: order, evaluations, whether it draws noise, its paper",
        "scoresde solvers\nscoresde solvers --markdown", solvers, SolversOptions,
    )  # fmt: skip
    command_parser(
        commands, "tableau", "print the coefficients of a solver on a grid",
        "scoresde tableau heun --sde edm --steps 5\nscoresde tableau ddim --sde chain --steps 10 --grid strided",
        tableau, TableauOptions,
    )  # fmt: skip


def info(options: InfoOptions) -> None:
    """Print versions, devices, SDEs and solvers; or what a run folder holds."""
    if options.folder is not None and source_of(options.folder):
        about = from_source(options.folder, options.name).about
        print(_lines({name: str(value) for name, value in about.items() if value is not None}))
        return
    if options.name is not None:
        raise ValueError(f"--name {options.name} is for FORMAT:PATH, a network of elsewhere")
    if options.folder is not None:
        print(described(options.folder))
        return
    facts = environment()
    del facts["dtype"], facts["command"]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts |= {"gpus": ", ".join(gpus) or "none", "sdes": ", ".join(SDES), "solvers": ", ".join(SOLVERS)}
    print(_lines(facts))


def described(folder: Path) -> str:
    """A run folder in words."""
    model = open_run(folder, states=True)
    found = model.checkpoint
    assert found is not None
    progress, about = found.manifest["progress"], model.about
    numbers = isinstance(model.denoiser, Denoiser)
    data, left = model.data(), left_of_data(model.denoiser.sde, 1.0) if numbers else None
    facts = {
        "model": f"{model.denoiser}, {parameters(model.denoiser) / 1e6:.3g} million parameters",
        "data": f"{'' if data is None else data.source + ': '}items {about.shape}",
        "classes": "none" if about.num_classes is None else ", ".join(about.classes or [str(about.num_classes)]),
        "step": f"{found.manifest['step']} of {found.manifest['config']['steps']}, {found.path}",
        "seconds": f"{progress['seconds']:.0f}",
    }
    if left is not None:
        facts["remark"] = left
    if progress["losses"]:
        facts["loss"] = f"{progress['losses'][-1][1]:.5g}"
    if progress["evaluations"]:
        step, values = progress["evaluations"][-1]
        facts |= {name: f"{value:.5g} at step {step}" for name, value in values.items()}
    return _lines(facts)


def _lines(facts: dict[str, str]) -> str:
    return "\n".join(f"{name:{max(9, *map(len, facts))}s} {value}" for name, value in facts.items())


def solvers(options: SolversOptions) -> None:
    """Print the solvers."""
    print(markdown(available()) if options.markdown else listed())


def tableau(options: TableauOptions) -> None:
    """Print the table of a solver on a grid."""
    solver = solver_of(options.solver)
    spacing = solver.grid if options.grid == "default" else SPACINGS[options.grid]
    print(solver.tableau(spacing(sde_of(options.sde), options.steps)))


def listed() -> str:
    """The solvers as a table for a terminal."""
    rows = [HEADER, *(entry.line() for entry in available())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
