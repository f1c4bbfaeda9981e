"""What the command line says of wrong calls: one sentence, in the words of its flags, before any work is lost."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
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
        (checks.check_ordered, -1), (lambda **x: checks.check_order(3, **x), 4),
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
    parsed = parsers()[module.__name__.rpartition(".")[2].replace("_", "-")]._option_string_actions
    names = {name for name in options.flags().values() if name.startswith("-")}
    entries = {name for name in names if name.startswith("--set ")}  # of the configuration of a run
    assert all(name.removeprefix("--set ").removesuffix("=") in set_keys() for name in entries)
    flags = names - entries
    assert flags <= set(parsed)
    assert {parsed[flag].dest for flag in flags} == {action.dest for action in parsed.values()} - {"help"}


# --- bad calls -------------------------------------------------------------------------------------------------------

MODEL = Path(__file__).parents[1] / "examples" / "models" / "fashion-mnist"

CALLS = """
sample nothing --out a.png
sample file --out a.png
sample damaged-1 --out a.png
sample damaged-2 --out a.png
sample damaged-3 --out a.png
info damaged-1
info damaged-3
sample M --out file/a.png
sample M --out /proc/a.png
sample M --out ''
sample M --out a.jpg
sample M --out a.npz --scale 2
sample M --out a.png --scale 0
sample M --out a.png --n 0
sample M --out a.png --n 99999999999999999999
sample M --out a.png --nfe 0
sample M --out a.png --average -1
sample M --out a.png --seed -1
sample M --out a.png --variance none.npz
sample M --out a.png --variance folder
sample M --out a.png --variance two.npz
sample M --out a.png --device meta
sample M --out a.png --device cuda:77
sample M --out a.png --device toaster
sample M --out a.png --solver unipc9
sample M --out a.png --solver 'AdaptiveODE(rtol="x")'
sample M --out a.png --solver 'Restart(3)'
sample M --out a.png --grid karas
sample M --out a.png --gird karras
sample --denoiser syntax:x --shape 2 --out a.npz
sample --denoiser raises:x --shape 2 --out a.npz
sample --denoiser own:load --shape 2 --out a.npz
sample --denoiser own:leaves --shape 2 --out a.npz
sample --denoiser own:load --checkpoint none.pt --shape 2 --out a.npz
sample --denoiser own:loda --shape 2 --out a.npz
sample --denoiser own:net --shape 3 8 8 --out a.npz
sample --denoiser own:net --shape 0 --out a.npz
likelihood points.npy --denoiser own:net --out b.json
train --data digitss --out run
train --data numbers.npy --out run
train --data images.npy --size 8 --out run
train --data digits --out file/run
train --data digits --out run --lr nan
train --data digits --out run --condition blur
train --data digits --out run --sde vpp
train --data digits --out run --preset 9
train --data digits --out run --set model.options=DEEP
train --config none.toml --out run
train --config folder --out run
train --config deep.toml --out run
train --config bytes.toml --out run
edit M --input images.npy --strength 2 --out a.png
edit M --input images.npy --keep none.png --out a.png
edit M --input none.png --out a.png
restore M --input images.npy --operator blurr:2 --out a.png
restore M --input images.npy --operator mask:folder --out a.png
restore M --input images.npy --operator down:2 --scale nan --out a.png
restore M --input images.npy --operator down:2 --enlarge 0 --out a.png
evaluate images.npy --data images.npy --metrics fid
evaluate images.npy --data images.npy --features own:load
evaluate images.npy --data images.npy --seed -1
likelihood M --data images.npy --rtol nan --out b.json
likelihood M --data images.npy --divergence hutch++ --probes 2 --steps 2 --limit 1 --out b.json
variance M --data images.npy --samples 0 --out t.npz
compare M --data images.npy --solvers unipc9 --out race
compare M --data images.npy --nfe 0 --out race
export M --out file
export M --out copy --dtype float8
tableau ddim --sde vpp
tableau 'DDIM(etaa=1)'
tabelau ddim
""".strip().splitlines()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what bad calls meet."""
    here = tmp_path_factory.mktemp("bad")
    (here / "folder").mkdir()
    (here / "file").write_text("x")
    for i, (name, text) in enumerate([("data.json", "[]"), ("manifest.json", "[" * 99999), ("data.json", "[" * 99999)]):
        shutil.copytree(MODEL, here / f"damaged-{i + 1}")
        (here / f"damaged-{i + 1}" / name).write_text(text)
    (here / "deep.toml").write_text("a = " + "[" * 9999 + "]" * 9999)
    (here / "bytes.toml").write_bytes(b'[data]\nsource = "\xe9"\n')
    (here / "syntax.py").write_text("def x(:\n")
    (here / "raises.py").write_text("1 / 0\n")
    (here / "own.py").write_text(
        "import torch\nfrom scoresde import EpsDenoiser, VPSDE\n"
        "def load(path=None):\n    raise KeyError('weights')\n"
        "def leaves():\n    raise SystemExit(3)\n"
        "conv = torch.nn.Conv2d(1, 1, 3, padding=1)\n"
        "net = EpsDenoiser(lambda x, t: conv(x.squeeze(-1)), VPSDE())\n"
    )
    np.save(here / "images.npy", np.zeros((12, 1, 28, 28), np.uint8))
    np.save(here / "points.npy", np.zeros((9, 2), np.float32))
    np.save(here / "numbers.npy", np.zeros(9, np.float32))
    np.savez(here / "two.npz", a=np.zeros(2), b=np.zeros(3))
    return here


@pytest.mark.parametrize("call", CALLS)
def test_a_bad_call_is_told_in_a_line_in_the_words_of_the_command(call, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = sorted(place.rglob("*"))
    arguments = shlex.split(call.replace("DEEP", "[" * 3000))
    arguments = [str(MODEL) if word == "M" else word for word in arguments]
    if arguments[0] in ("sample", "edit", "restore", "evaluate", "likelihood", "variance", "compare"):
        arguments += ["--quiet"] if "--device" in arguments else ["--quiet", "--device", "cpu"]
    try:
        status = cli.main(arguments)
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    *usage, line = err.splitlines()
    assert line.startswith("scoresde")
    assert not usage or usage[0].startswith("usage: scoresde")
    assert not re.search(r"Errno|Traceback|__init__| object ", line), line
    assert [path for path in sorted(place.rglob("*")) if path not in before and "__pycache__" not in path.parts] == []
    if (command := arguments[0]) in (commands := parsers()):
        told = re.sub(r"`[^`]*`|argument --\\S+", "", line)  # another command's
        flags = commands[command]._option_string_actions
        assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", told)) - {*arguments} <= set(flags), line
        names = {action.dest.rpartition(".")[2] for action in flags.values()}
        outside = re.sub(r"\w\([^()]*\)|'[^']*'", "", line).partition("solver")[0]
        assert not set(re.findall(r"(?<![\w.])([a-z_]+)=", outside)) & names, line


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("sample M --out a.png --solver unipc9", "--solver 'unipc9': expected 'unipc"),
        ("sample M --out a.png --gird karras", "unrecognized argument --gird: --grid is the nearest"),
        ("sample M --out a.png --grid karas", "'karas': expected 'karras', or one of 'default', 'uniform'"),
        ("tabelau ddim", "'tabelau': expected 'tableau', or one of 'train'"),
        ("train --data fashion-mnsit --out run", "(fashion-mnist, say; these are"),
        ("sample --denoiser own:loda --shape 2 --out a.npz", "own has no 'loda': 'load' say"),
        ("sample --denoiser syntax:x --shape 2 --out a.npz", "SyntaxError: invalid syntax (syntax.py, line 1)"),
        ("sample --denoiser own:load --shape 2 --out a.npz", "own.py, line 4: KeyError: 'weights'"),
        ("sample --denoiser own:net --shape 3 8 8 --out a.npz", "given an item of shape (3, 8, 8): own.py, line "),
        ("restore M --input images.npy --operator blurr:2 --out a.png", "expected blur:1.5, or one of mask:FILE.png"),
        ("train --config none.toml --out run", "--config none.toml: there is no such file"),
        ("train --config deep.toml --out run", "deep.toml is no TOML: it is nested too deeply"),
    ],
)
def test_the_line_says_what_is_near(call, words, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with contextlib.suppress(SystemExit):
        assert cli.main([str(MODEL) if word == "M" else word for word in shlex.split(call)]) == 2
    err = capsys.readouterr().err
    assert words in err
    if err.startswith("usage") and "tabelau" not in call:
        assert err.startswith(f"usage: scoresde {call.split()[0]} ")


def test_a_reader_that_has_read_enough_is_no_error(monkeypatch, capsys):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert cli.main(["solvers"]) == 128 + signal.SIGPIPE
    assert capsys.readouterr().err == ""
