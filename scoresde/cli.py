"""The command `scoresde`, also `python -m scoresde`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import torch

from scoresde import __version__, sde
from scoresde.chain import DDPMChain
from scoresde.grid import Grid
from scoresde.info import environment
from scoresde.likelihood import command
from scoresde.solvers import available
from scoresde.solvers.catalogue import HEADER, markdown
from scoresde.training.checkpoint import CheckpointError

__all__ = ["main"]

SDES: dict[str, Callable[[], sde.SDE]] = {
    "vp": sde.VPSDE,
    "subvp": sde.SubVPSDE,
    "cosine": sde.CosineVPSDE,
    "ve": sde.VESDE,
    "edm": sde.EDMSDE,
    "flow": sde.FlowSDE,
    "ddpm": DDPMChain.linear,
    "ddpm-cosine": DDPMChain.cosine,
}
SOLVERS = {entry.name: entry for entry in available()}
GRIDS = ("default", "uniform", "quadratic", "log_snr", "karras", "power", "strided")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 2 where an argument or a file is wrong, or 1 where numbers are not
    finite or a budget ran out.
    """
    parser = argparse.ArgumentParser(
        prog="scoresde",
        description="Score-based generative models: SDEs, denoisers and solvers.",
        epilog="examples:\n  scoresde info\n  scoresde tableau heun --sde edm --steps 5\n"
        "  scoresde tableau ddim --sde ddpm --steps 10 --grid strided\n"
        "  scoresde likelihood images.npy --denoiser my_model:load --checkpoint model.pt --out bits.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"scoresde {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser("info", help="versions, devices, and what there is")
    listing = commands.add_parser("solvers", help="every solver: order, evaluations, whether it draws noise, its paper")
    listing.add_argument("--markdown", action="store_true", help="as the README has it")
    show = commands.add_parser("tableau", help="print the coefficients of a solver on a grid")
    show.add_argument("solver", choices=SOLVERS, metavar="solver", help="a name from `scoresde solvers`")
    show.add_argument("--sde", choices=SDES, default="vp", help="with its default parameters (vp)")
    show.add_argument("--steps", type=int, default=10, help="(10)")
    show.add_argument("--grid", choices=GRIDS, default="default", help="spacing (the solver's own)")
    density = "bits/dim of images, or log p of other data, from a model and a file; goes on where it was killed"
    command.add_arguments(commands.add_parser("likelihood", help=density, description=density))
    args = parser.parse_args(argv)
    try:
        if args.command == "info":
            info()
        elif args.command == "solvers":
            print(markdown(available()) if args.markdown else listed())
        elif args.command == "likelihood":
            command.likelihood(args)
        else:
            tableau(args)
    except (TypeError, ValueError, ImportError, OSError, CheckpointError, ArithmeticError) as error:
        print(f"scoresde: {error}", file=sys.stderr)
        return 1 if isinstance(error, ArithmeticError) else 2
    return 0


def info() -> None:
    """Print versions, devices, SDEs and solvers."""
    facts = environment()
    del facts["dtype"], facts["command"]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts |= {"gpus": ", ".join(gpus) or "none", "sdes": ", ".join(SDES), "solvers": ", ".join(SOLVERS)}
    for name, value in facts.items():
        print(f"{name:9s} {value}")


def tableau(args: argparse.Namespace) -> None:
    """Print the table of args.solver on args.grid."""
    process = SDES[args.sde]()
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
