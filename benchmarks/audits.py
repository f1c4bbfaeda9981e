"""Samplers of others and our own before the auditor: what it finds in them, where it finds nothing, and which mutants
of our solvers it finds and names.

    python benchmarks/audits.py

DEFECTS: samplers of diffusers, k-diffusion and azula in which something is known to be wrong; the auditor is told
nothing of it but the sampler's own name and options. RIGHT: samplers, theirs and ours, in which nothing is. SETS:
wrong versions of our solvers (mutants*.py), each with the kind of its slip; one is named if a signature of its quick
audit, or where that has none, of its whole one, is of that kind.

Finished audits are kept in OUT/audits.jsonl, so the same command goes on where it was killed. Written into --out:
README.md (the tables), results.json, and of each defect a page and its picture.
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from mutants import MUTANTS, Mutant
from mutants_fifth import FIFTH
from mutants_fourth import FOURTH
from mutants_second import SECOND
from mutants_third import THIRD
from peers import PACKAGES, installed
from tqdm import tqdm

from scoresde.auditing import Audit, audit, load
from scoresde.auditing.picture import draw
from scoresde.files import write_whole
from scoresde.info import environment
from scoresde.report import Cells, table, write_json


class Case(NamedTuple):
    """A sampler by its name, its options, and what is known of it."""

    sampler: str
    options: Mapping[str, Any] = MappingProxyType({})
    known: str = ""

    @property
    def name(self) -> str:
        options = ", ".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.sampler}({options})" if options else self.sampler

    @property
    def installed(self) -> bool:
        package = self.sampler.partition(":")[0].partition(".")[0].replace("k_diffusion", "k-diffusion")
        return ":" not in self.sampler or package not in PACKAGES or installed(package) is not None


K, A, D = "k_diffusion.sampling:sample_", "azula.sample:", "diffusers:"
MULTISTEP = D + "DPMSolverMultistepScheduler"

DEFECTS = [
    Case(MULTISTEP, {"solver_order": 3}, "3M takes half of the second difference: second order"),
    Case(MULTISTEP, {"solver_order": 3, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, "so in eps"),
    Case(K + "dpmpp_3m_sde", {"eta": 0}, "3M takes half of the second difference: second order"),
    Case(A + "REABSampler", {"order": 2}, "sigma_t for sigma_s in its last line: first order"),
    Case(A + "REABSampler", {"order": 3}, "the same"),
    Case(D + "DEISMultistepScheduler", {"solver_order": 3}, "coefficients lose their digits in float32"),
    Case(D + "SASolverScheduler", {"predictor_order": 3, "corrector_order": 4}, "the same"),
    Case(MULTISTEP, {"use_karras_sigmas": True}, "labels are rounded: they collide, and are not those of the levels"),
    Case(D + "UniPCMultistepScheduler", {"use_karras_sigmas": True}, "the same"),
    Case(D + "DPMSolverSinglestepScheduler", {"solver_order": 3}, "set_timesteps changes its configuration for good"),
    Case(A + "ItoSampler", {}, "noise is added on the step to sigma = 0 too"),
    Case(D + "PNDMScheduler", {"skip_prk_steps": True}, "v of different times are mixed before they are converted"),
]  # fmt: skip

RIGHT = [
    *map(Case, (
        "ddim", "ddpm", "ddpm-beta", "euler", "euler-maruyama", "exponential-sde", "dpm++2m", "dpm++3m", "dpm++2m-sde",
        "deis3", "unipc3", "unipc4-v", "eab3-flow", "sa-solver", "er-sde3", "heun", "rk4-angle", "dpm-solver3",
        "dpm++2s", "edm-stochastic", "ode-dopri5",
    )),
    *(Case(K + name) for name in ("euler", "heun", "dpm_2", "lms", "dpmpp_2m")),
    *(Case(K + name) for name in ("euler_ancestral", "dpmpp_2s_ancestral")),
    Case(A + "DDIMSampler"), Case(A + "DDPMSampler"), Case(A + "EulerSampler"), Case(A + "HeunSampler"),
    Case(A + "zABSampler", {"order": 2}),
    Case(D + "DDIMScheduler"), Case(D + "DDPMScheduler"), Case(D + "HeunDiscreteScheduler"),
    Case(D + "EulerAncestralDiscreteScheduler"), Case(D + "LMSDiscreteScheduler"),
]  # fmt: skip

SETS: dict[str, tuple[list[Mutant], str]] = {
    "mutants": (MUTANTS, "Mutants of our own solvers"),
    "second mutants": (SECOND, "A second set"),
    "third mutants": (THIRD, "A third set"),
    "fourth mutants": (FOURTH, "A fourth set"),
    "fifth mutants": (FIFTH, "A fifth set, on which nothing was tuned"),
}

NAMES: dict[str, str] = {
    "sign": "a sign",
    "factor": "a factor|half |double |.*halved",
    "index": "an index|off by one",
    "square": "a missing square",
    "swapped": "swapped",
    "drift": ".*drift",
    "extra noise": "noise once too much",
    "beta for beta-tilde": "variance beta for beta-tilde",
    "last step skipped": "the last step skipped",
    "second difference halved": "second difference halved",
    "float32 coefficients": "float32 coefficients",
    "rounded times": "rounded labels",
}
"""The names of signatures that name a kind of slip: what they begin with."""


def is_named(kind: str, signatures: Sequence[str]) -> bool:
    """Whether a signature is of that kind."""
    return any(re.match(NAMES[kind], name) for name in signatures)


class Task(NamedTuple):
    """An audit to be made: its list and name, and how."""

    list: str
    name: str
    make: Callable[[], Audit]


def tasks(args: argparse.Namespace) -> Iterator[Task]:
    """All that are asked for."""
    for name, cases, quick in (("defects", DEFECTS, args.quick), ("right", RIGHT, True)):
        for case in cases:
            if case.installed:
                make = partial(audit_of, case, quick)
                yield Task(name, case.name, make)
    for name, (mutants, _) in SETS.items():
        for mutant in mutants:
            yield Task(name, mutant.name, partial(audit_of_mutant, mutant))


def audit_of(case: Case, quick: bool) -> Audit:
    return audit(load(case.sampler), options=case.options or None, quick=quick)


def audit_of_mutant(mutant: Mutant) -> Audit:
    found = audit(mutant.solver, "times", order=mutant.order, name=mutant.name, quick=True)
    if found.signatures:
        return found
    return audit(mutant.solver, "times", order=mutant.order, name=mutant.name)


def run(args: argparse.Namespace) -> dict[tuple[str, str], dict[str, Any]]:
    """The finished audits, by list and name."""
    versions = {package: installed(package) or "-" for package in PACKAGES}
    made_for = {"torch": torch.__version__, **versions, "quick": args.quick}
    kept = Cells(args.out / "audits.jsonl", "benchmarks/audits.py", "audits", made_for,
                 lambda row: (row["list"], row["name"]), args.fresh)  # fmt: skip
    todo = [task for task in tasks(args) if task.list in args.lists and (not args.only or args.only in task.name)]
    with tqdm(todo, disable=None) as bar:
        for task in bar:
            bar.set_postfix_str(task.name)
            if (task.list, task.name) in kept.done:
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = task.make()
            row = {"list": task.list, "name": task.name, "seconds": round(found.seconds, 1), **found.json(),
                   "signatures": list(found.signatures)}  # fmt: skip
            if task.list == "defects":
                stem = re.sub(r"[^a-z0-9]+", "-", task.name.lower()).strip("-")
                drawn = draw(found, args.out / f"{stem}.png")
                page = found.page(f"{stem}.png" if drawn else None)
                write_whole(args.out / f"{stem}.md", partial(_write, page))
                row["page"] = f"{stem}.md"
            kept.write(row)
    return {key: row for key, row in kept.done.items() if isinstance(key, tuple)}


def _write(page: str, file: Any) -> None:
    file.write(page.encode())


def report(done: dict[tuple[str, str], dict[str, Any]], args: argparse.Namespace) -> str:
    """The page of all, also written, with the numbers."""
    facts = environment(dtype=torch.float64)
    peers = ", ".join(f"{package} {installed(package)}" for package in PACKAGES if installed(package))
    where = f"{facts['device']}, {facts['threads']} thread(s), float64 and float32, torch {facts['torch']}"
    lines = ["# Samplers before the auditor", ""]
    lines += [f"`python benchmarks/audits.py`; {where}, commit {facts['commit']}, {peers or 'no peer installed'}.", ""]
    known = {case.name: case.known for case in DEFECTS}
    lines += ["## Defects that are known", ""]
    lines += ["The auditor knows the sampler's name and options alone; the page has all figures. One line repeats it:"]
    lines += ["`scoresde audit SAMPLER --set OPTION=VALUE --out page.md`.", ""]
    rows = [row for (name, _), row in done.items() if name == "defects"]
    lines += table(
        ["sampler", "what is known", "verdict", "what was found wrong", "names", "s"],
        [[f"[{row['name']}]({row['page']})", known.get(row["name"], ""), row["verdict"], _wrong(row),
          ", ".join(row["signatures"]), f"{row['seconds']:.0f}"] for row in rows],
    )  # fmt: skip
    rows = [row for (name, _), row in done.items() if name == "right"]
    alarms = [row for row in rows if row["verdict"] == "wrong"]
    lines += ["", "## Samplers in which nothing is known to be wrong", "",
              f"{len(rows)} samplers, {len(alarms)} alarm(s). Quick audits.", ""]  # fmt: skip
    lines += table(
        ["sampler", "verdict", "order on the Gaussian", "figures right", "not decided", "wrong", "s"],
        [[row["name"], row["verdict"], _order(row), _count(row, "right"), _count(row, "not decided"), _wrong(row),
          f"{row['seconds']:.0f}"] for row in rows],
    )  # fmt: skip
    for name, (mutants, title) in SETS.items():
        rows = [done[name, m.name] for m in mutants if (name, m.name) in done]
        kinds = {m.name: m for m in mutants}
        found = sum(row["verdict"] == "wrong" for row in rows)
        named = [row for row in rows if is_named(kinds[row["name"]].kind, row["signatures"])]
        both = sum(row["verdict"] == "wrong" for row in named)
        lines += ["", f"## {title}", "", f"{len(rows)} mutants: {found} found, {both} found and named.", ""]
        lines += table(
            ["mutant", "kind", "what is wrong", "verdict", "names", "named"],
            [[row["name"], kinds[row["name"]].kind, kinds[row["name"]].fault.replace("|", "\\|"), row["verdict"],
              ", ".join(row["signatures"]), "yes" if row in named else "no"] for row in rows],
        )  # fmt: skip
    text = "\n".join([*lines, ""])
    write_whole(args.out / "README.md", partial(_write, text))
    write_json(args.out / "results.json", {"environment": facts, "peers": peers, "audits": list(done.values())})
    return text


def _wrong(row: dict[str, Any]) -> str:
    names = [figure["name"] for figure in row["figures"] if figure["verdict"] == "wrong"]
    return "; ".join(names).replace("|", "\\|")


def _order(row: dict[str, Any]) -> str:
    for figure in row["figures"]:
        if figure["name"] == "order on the Gaussian" and figure["value"] is not None:
            return f"{figure['value']:.2f}"
    return ""


def _count(row: dict[str, Any], verdict: str) -> int:
    return sum(figure["verdict"] == verdict for figure in row["figures"])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    lists = ["defects", "right", *SETS]
    parser.add_argument("--lists", nargs="+", choices=lists, default=lists)
    parser.add_argument("--only", default="", help="part of a name")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/audits"), help="folder of results")
    parser.add_argument("--quick", action="store_true", help="quick audits of the defects too")
    parser.add_argument("--fresh", action="store_true", help="forget the finished audits")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    print(report(run(args), args))


if __name__ == "__main__":
    main()
