"""`scoresde audit`: anyone's sampler against the truth."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scoresde.auditing import audit, load
from scoresde.auditing.picture import draw
from scoresde.checks import check_count
from scoresde.cli.common import SessionOptions, check_file
from scoresde.cli.options import Options, option
from scoresde.files import write_whole
from scoresde.info import environment
from scoresde.processes import SDES, sde_of
from scoresde.report import write_json

TEXT = """find the faults of a sampler: order, limit, law, evaluations, times, rounding, edges

The sampler is a function (denoise, x_T, sigmas, nfe) of yours, or one of this library (a name from `scoresde solvers`),
a scheduler of diffusers, a function of k-diffusion, a sampler of azula. OUT.md has every figure with its verdict,
right, wrong or not decided, and the name of the defect where it is a known one; beside it are OUT.json and, where
matplotlib is installed, OUT.png."""

EXAMPLES = """
scoresde audit my_sampler:heun --takes sigmas --order 2 --out page.md
scoresde audit unipc3 --quick
scoresde audit 'DPMSolverPP(order=3, as_published=True)' --order 3 --out 3m.md
scoresde audit diffusers:DPMSolverMultistepScheduler --set solver_order=3 --out diffusers-3m.md
scoresde audit k_diffusion.sampling:sample_dpmpp_3m_sde --set eta=0 --out k-diffusion-3m.md
scoresde audit azula.sample:REABSampler --set order=3 --out reab.md
"""


@dataclass(frozen=True, kw_only=True)
class AuditOptions(Options):
    """The arguments of `audit`."""

    sampler: str = option(
        "MODULE:NAME, or a solver of this library by name or call", metavar="sampler", flags=("sampler",)
    )
    takes: str | None = option("what it steps in (as its form says; needed for a function)",
                               choices=("sigmas", "times"))  # fmt: skip
    order: int | None = option("order of convergence that it claims (as its name and options say)", metavar="P")
    set: list[str] = option("its own options, solver_order=3 say", [], "NAME=VALUE", nargs="+")
    sde: str | None = option(f"of samplers in times: {', '.join(SDES)} (vp)", metavar="SDE")
    quick: bool = option("some ten seconds instead of a minute")
    out: Path | None = option("the page", metavar="PAGE.md")
    session: SessionOptions


def run(options: AuditOptions) -> None:
    """Run the command.

    Raises:
        TypeError, ValueError, ImportError, OSError: if an argument is wrong, before the first evaluation.
    """
    if options.order is not None:
        check_count(order=options.order)
    if options.out is not None:
        check_file(options.out, ".md")
    sde = None if options.sde is None else sde_of(options.sde)
    session = options.session
    found = audit(
        load(options.sampler), options.takes, order=options.order, options=_given(options.set), sde=sde,
        quick=options.quick, progress=session.progress,
    )  # fmt: skip
    if options.out is None:
        print(found)
        return
    picture = options.out.with_suffix(".png")
    drawn = draw(found, picture)
    facts = environment(dtype=torch.float64)
    where = (
        ", ".join(facts[name] for name in ("device", "dtype"))
        + ", "
        + ", ".join(f"{name} {facts[name]}" for name in ("torch", "python", "scoresde", "commit"))
    )
    page = f"{found.page(picture.name if drawn else None)}\n{found.seconds:.0f} s; {where}; `{facts['command']}`\n"
    write_whole(options.out, lambda file: file.write(page.encode()))
    write_json(options.out.with_suffix(".json"), {**found.json(), "environment": facts})
    print(found.summary())
    session.say(f"wrote {options.out}" + (f" and {picture.name}" if drawn else "") + f", in {found.seconds:.0f} s")


def _given(words: list[str]) -> dict[str, Any]:
    """NAME=VALUE of each: a Python value, or a text.

    Raises:
        ValueError: if a word has no name.
    """
    found: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--set {word}: expected NAME=VALUE, solver_order=3 say")
        try:
            found[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            found[name] = text
    return found
