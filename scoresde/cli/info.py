"""`scoresde info`, `scoresde solvers` and `scoresde tableau`: what there is, and the coefficients of a solver."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from scoresde.cli.common import command_parser
from scoresde.cli.drawing import GRIDS
from scoresde.cli.models import open_run, parameters
from scoresde.grid import Grid
from scoresde.info import environment
from scoresde.schedules import SDES, sde_of
from scoresde.solvers import available
from scoresde.solvers.catalogue import HEADER, SOLVERS, markdown

__all__ = ["add_parsers"]


def add_parsers(commands: Any) -> None:
    """The arguments of the three."""
    about = command_parser(
        commands, "info", "versions, devices, and what there is; or what is in a run folder",
        "scoresde info\nscoresde info runs/fm",
    )  # fmt: skip
    about.add_argument("folder", nargs="?", type=Path, metavar="run", help="a run folder")
    about.set_defaults(action=info)
    listing = command_parser(
        commands, "solvers", "every solver: order, evaluations, whether it draws noise, its paper",
        "scoresde solvers\nscoresde solvers --markdown",
    )  # fmt: skip
    listing.add_argument("--markdown", action="store_true", help="as docs/solvers.md has it")
    listing.set_defaults(action=lambda args: print(markdown(available()) if args.markdown else listed()))
    show = command_parser(
        commands, "tableau", "print the coefficients of a solver on a grid",
        "scoresde tableau heun --sde edm --steps 5\nscoresde tableau ddim --sde chain --steps 10 --grid strided",
    )  # fmt: skip
    show.add_argument("solver", choices=SOLVERS, metavar="solver", help="a name from `scoresde solvers`")
    show.add_argument("--sde", default="vp", metavar="SDE", help=f"with its default parameters: {', '.join(SDES)} (vp)")
    show.add_argument("--steps", type=int, default=10, help="(10)")
    show.add_argument("--grid", choices=GRIDS, default="default", help="spacing (the solver's own)")
    show.set_defaults(action=tableau)


def info(args: argparse.Namespace) -> None:
    """Print versions, devices, SDEs and solvers; or what a run folder holds."""
    if args.folder is not None:
        print(described(args.folder))
        return
    facts = environment()
    del facts["dtype"], facts["command"]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts |= {"gpus": ", ".join(gpus) or "none", "sdes": ", ".join(SDES), "solvers": ", ".join(SOLVERS)}
    print(_lines(facts))


def described(folder: Path) -> str:
    """A run folder in words."""
    model = open_run(folder)
    found = model.checkpoint
    assert found is not None
    progress, about = found.manifest["progress"], model.about
    data = model.data()
    facts = {
        "model": f"{model.denoiser}, {parameters(model.denoiser) / 1e6:.3g} million parameters",
        "data": f"{'' if data is None else data.source + ': '}items {about.shape}",
        "classes": "none" if about.num_classes is None else ", ".join(about.classes or [str(about.num_classes)]),
        "step": f"{found.manifest['step']} of {found.manifest['config']['steps']}, {found.path}",
        "seconds": f"{progress['seconds']:.0f}",
    }
    if progress["losses"]:
        facts["loss"] = f"{progress['losses'][-1][1]:.5g}"
    if progress["evaluations"]:
        step, values = progress["evaluations"][-1]
        facts |= {name: f"{value:.5g} at step {step}" for name, value in values.items()}
    return _lines(facts)


def _lines(facts: dict[str, str]) -> str:
    return "\n".join(f"{name:9s} {value}" for name, value in facts.items())


def tableau(args: argparse.Namespace) -> None:
    """Print the table of args.solver on args.grid."""
    process = sde_of(args.sde)
    solver = SOLVERS[args.solver].solver
    grid = solver.grid if args.grid == "default" else getattr(Grid, args.grid)
    print(solver.tableau(grid(process, args.steps)))


def listed() -> str:
    """The solvers as a table for a terminal."""
    rows = [HEADER, *(entry.line() for entry in available())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
