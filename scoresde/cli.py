"""The command `scoresde`, also `python -m scoresde`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import torch

from scoresde import __version__, sde, solvers
from scoresde.chain import DDPMChain
from scoresde.grid import Grid
from scoresde.info import environment

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
SOLVERS: dict[str, Callable[[], solvers.Solver]] = {
    "ddpm": solvers.DDPM,
    "ddim": solvers.DDIM,
    "euler-maruyama": solvers.EulerMaruyama,
    "euler": solvers.Euler,
    "heun": solvers.Heun,
}
GRIDS = ("customary", "uniform", "quadratic", "log_snr", "karras", "strided")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, or 2 where the arguments ask for something that does not exist."""
    parser = argparse.ArgumentParser(
        prog="scoresde",
        description="Score-based generative models: SDEs, denoisers and solvers.",
        epilog="examples:\n  scoresde info\n  scoresde tableau heun --sde edm --steps 5\n"
        "  scoresde tableau ddim --sde ddpm --steps 10 --grid strided",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"scoresde {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser("info", help="versions, devices, and what there is")
    show = commands.add_parser("tableau", help="print the coefficients of a solver on a grid")
    show.add_argument("solver", choices=SOLVERS)
    show.add_argument("--sde", choices=SDES, default="vp", help="with its default parameters (vp)")
    show.add_argument("--steps", type=int, default=10, help="(10)")
    show.add_argument("--grid", choices=GRIDS, default="customary", help="spacing (the SDE's customary one)")
    args = parser.parse_args(argv)
    try:
        if args.command == "info":
            info()
        else:
            tableau(args)
    except ValueError as error:
        print(f"scoresde: {error}", file=sys.stderr)
        return 2
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
    print(SOLVERS[args.solver]().tableau(getattr(Grid, args.grid)(process, args.steps)))
