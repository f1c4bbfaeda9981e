"""The command `scoresde`, also `python -m scoresde`: a module for each of its commands.

train.py  train_autoencoder.py  train_categorical.py  sample.py  edit.py  restore.py  evaluate.py  variance.py  tune.py
likelihood.py  compare.py  export.py  audit.py  info.py
config.py      a training run in words: dataclasses, TOML, --set
defaults.py    what these leave open, chosen for the data
kept.py        the configuration that a run folder keeps
latents.py     the codec and the latents of a run
about.py       what a run folder says of its data
models.py      run folders and other models
states.py      runs of whole states, where they differ
drawing.py     samples by number, in any batch and on any number of processes
inputs.py      given images as items of a model
measuring.py   real data and feature spaces by name
writing.py     where samples go, and what is finished when a command is stopped
common.py      how commands begin and stop, what they say
options.py     what a command was given: a frozen dataclass that declares its arguments, parsed once and handed on
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch

from scoresde.checks import ArgumentError
from scoresde.cli import (
    audit,
    compare,
    edit,
    evaluate,
    export,
    info,
    likelihood,
    restore,
    sample,
    train,
    train_autoencoder,
    train_categorical,
    tune,
    variance,
)
from scoresde.cli.common import command_parser, sigterm
from scoresde.cli.drawing import GRIDS
from scoresde.cli.options import Options, Parser
from scoresde.errors import CheckpointError
from scoresde.processes import SDES
from scoresde.solvers.catalogue import SOLVERS

__all__ = ["GRIDS", "SDES", "SOLVERS", "main"]

EXAMPLES = """examples:
  scoresde train --data my_folder --size 32 --out runs/mine
  scoresde train-autoencoder --data my_folder --size 64 --out runs/codec
  scoresde train-categorical --data digits --states 2 --out runs/bits
  scoresde sample runs/mine --n 64 --solver adams --nfe 20 --out samples.png
  scoresde edit runs/mine --input strokes.png --strength 0.5 --out edited.png
  scoresde restore runs/mine --input photo.png --operator box:8,8,12,12 --out restored.png
  scoresde evaluate runs/mine --n 1000 --data held_out_folder --out scores.json
  scoresde likelihood runs/mine --data held_out_folder --out bits.json
  scoresde variance runs/mine --out table.npz
  scoresde tune runs/mine --nfe 5 --out five.json
  scoresde compare runs/mine --solvers adams ddim --nfe 5 10 20 --out runs/compare
  scoresde export runs/mine --out mine --dtype float16
  scoresde audit my_sampler:heun --takes sigmas --out page.md
  scoresde COMMAND --help          all of a command's options, and more examples

exit status: 0; 1 where numbers are not finite or a budget ran out; 2 where an argument or a file is wrong; 130 after
Ctrl-C and 143 after SIGTERM, what is finished being kept."""


COMMANDS: list[tuple[Any, type[Options]]] = [
    (train, train.TrainOptions),
    (train_autoencoder, train_autoencoder.TrainAutoencoderOptions),
    (train_categorical, train_categorical.TrainCategoricalOptions),
    (sample, sample.SampleOptions),
    (edit, edit.EditOptions),
    (restore, restore.RestoreOptions),
    (evaluate, evaluate.EvaluateOptions),
    (likelihood, likelihood.LikelihoodOptions),
    (variance, variance.VarianceOptions),
    (tune, tune.TuneOptions),
    (compare, compare.CompareOptions),
    (export, export.ExportOptions),
    (audit, audit.AuditOptions),
]
"""Modules, each with TEXT, EXAMPLES and run(options), and their options."""


def parser() -> argparse.ArgumentParser:
    """The arguments of all commands."""
    found = Parser(
        prog="scoresde",
        description="Score-based generative models: SDEs, denoisers and solvers.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--version", action="version", version=f"scoresde {version('scoresde')}")
    commands = found.add_subparsers(dest="command", required=True, metavar="command")
    for module, options in COMMANDS:
        name = module.__name__.rpartition(".")[2].replace("_", "-")
        command_parser(commands, name, module.TEXT, module.EXAMPLES, module.run, options)
    info.add_parsers(commands)
    return found


def said(error: BaseException) -> str:
    """An error as a line, and what an argument brought about as it is, which may be a list of files; the system's own
    with the file first, and without its number."""
    if isinstance(error, ArgumentError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        where = "" if error.filename is None else f"{error.filename}: "
        return where + error.strerror[0].lower() + error.strerror[1:]
    text = " ".join(str(error).split()) or type(error).__name__
    return "; ".join([text, *getattr(error, "__notes__", ())])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 2 where an argument or a file is wrong, 1 where numbers are not
    finite or a budget ran out, 130 after Ctrl-C, 143 after SIGTERM.
    """
    args = parser().parse_args(argv)
    before, warnings.formatwarning = warnings.formatwarning, _told
    try:
        with sigterm():
            args.action(args)
            sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (TypeError, ValueError, ImportError, OSError, CheckpointError, ArithmeticError) as error:
        print(f"scoresde: {said(error)}", file=sys.stderr)
        return 1 if isinstance(error, ArithmeticError) else 2
    except (MemoryError, RuntimeError) as error:
        if str(error).startswith("rank 0 failed"):  # which then says why itself
            return 2
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        print(f"scoresde: out of memory, a smaller --batch-size needs less: {said(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:
        if not isinstance(stop.code, int):
            raise
        return stop.code
    finally:
        warnings.formatwarning = before
    return 0


def _told(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
    """A warning as the command line says it."""
    return f"scoresde: {message}\n"
