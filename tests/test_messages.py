"""What the command line says of wrong calls: one sentence, in the words of its flags, before any work is lost."""

from __future__ import annotations

from dataclasses import fields

import pytest

from scoresde import checks, cli
from scoresde.checks import ArgumentError
from scoresde.cli.config import SECTIONS


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("n=0: expected a whole number >= 1", "--number 0: expected a whole number >= 1"),
        ("give size= and mode=, not n=3", "give --size and --mode, not --number 3"),
        ("mode='X': expected 'L' or 'RGB' (mode= says which)", "--mode 'X': expected 'L' or 'RGB' (--mode says which)"),
        ("n=[1, 2]: expected in (0, 1], or no n=", "--number [1, 2]: expected in (0, 1], or no --number"),
        ("solver DDIM(n=(1, 2), size=3) has no n=", "solver DDIM(n=(1, 2), size=3) has no --number"),
        ("an_n=3, a.n=3, other=4 and nn=5 stay", "an_n=3, a.n=3, other=4 and nn=5 stay"),
    ],
)
def test_an_argument_is_told_by_its_flag(message, told):
    flags = {"n": "--number", "size": "--size", "mode": "--mode"}
    assert ArgumentError(message).by(flags) == told
    assert ArgumentError(message).by({}) == str(ArgumentError(message)) == message


@pytest.mark.parametrize(
    ("check", "value"),
    [
        (checks.check_count, 0), (checks.check_whole, -1), (checks.check_nonnegative, -1.0), (checks.check_positive, 0),
        (checks.check_tolerances, 0), (checks.check_ordered, -1), (lambda **x: checks.check_order(3, **x), 4),
        (lambda **x: checks.check_option(("a", "b"), **x), "c"),
    ],
)  # fmt: skip
def test_every_check_names_its_argument(check, value):
    with pytest.raises(ArgumentError) as found:
        check(size=value)
    assert str(found.value).startswith(f"size={value!r}: expected ")
    assert found.value.by({"size": "--size"}).startswith(f"--size {value!r}: expected ")


def parsers():
    (commands,) = (action for action in cli.parser()._actions if action.dest == "command")
    return commands.choices


def set_keys():
    return {f"{name}.{entry.name}" for name, kind in SECTIONS.items() for entry in fields(kind)}


@pytest.mark.parametrize(("module", "options"), cli.COMMANDS)
def test_the_flags_of_a_command_are_those_that_it_parses(module, options):
    """Every one has a name that Python's messages can have for it, and no other is named."""
    parsed = parsers()[module.__name__.rpartition(".")[2]]._option_string_actions
    names = {name for name in options.flags().values() if name.startswith("-")}
    entries = {name for name in names if name.startswith("--set ")}  # of the configuration of a run
    assert all(name.removeprefix("--set ").removesuffix("=") in set_keys() for name in entries)
    flags = names - entries
    assert flags <= set(parsed)
    assert {parsed[flag].dest for flag in flags} == {action.dest for action in parsed.values()} - {"help"}
