"""A model to give away is the run's: its weights, in every dtype that it may be written in, and for every command."""

from __future__ import annotations

import re
import shlex
import shutil

import numpy as np
import pytest
import torch
from common import read_manifest, write_manifest

import scoresde
from scoresde.cli import main, parser
from scoresde.training import CheckpointError
from scoresde.training.export import DTYPES, export
from scoresde.training.model import opened


def run(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def moons_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "moons"
    words = ["train", "--data", "two-moons:100", "--batch-size", "8", "--device", "cpu", "--quiet", "--steps", "30",
             "--set", "model.options={width = 16, depth = 1}", "--set", "train.ema_decay=[0.5, 0.9]"]  # fmt: skip
    assert run(*words, "--out", out) == 0
    return out


def weights(path, average=0):
    return scoresde.load(path, average).net.state_dict()


def test_the_weights_are_the_runs(moons_run, tmp_path):
    for average in (0, 1):
        out = export(moons_run, tmp_path / str(average), average=average)
        assert sorted(path.name for path in out.iterdir()) == ["average.safetensors", "manifest.json"]
        expected = weights(moons_run, average)
        assert all(torch.equal(value, expected[name]) for name, value in weights(out).items())
    assert any(not torch.equal(value, expected[name]) for name, value in weights(moons_run).items())
    # Of a checkpoint likewise, and again of what was exported.
    (checkpoint,) = (moons_run / "checkpoints").iterdir()
    for i, source in enumerate((checkpoint, tmp_path / "0")):
        again = weights(export(source, tmp_path / f"again{i}"))
        assert all(torch.equal(value, again[name]) for name, value in weights(moons_run).items())


@pytest.mark.parametrize("command", [False, True])
def test_a_run_that_comes_further_meanwhile(command, moons_run, tmp_path, monkeypatch):
    """Weights and manifest are of one checkpoint, though a newer one is written while it is exported."""
    here, out = shutil.copytree(moons_run, tmp_path / "run"), tmp_path / "out"
    expected = weights(here)

    def overtaken(*arguments):
        found = opened(*arguments)
        newer = here / "checkpoints" / "99999999"
        if not newer.exists():
            shutil.copytree(found.path, newer)
            shutil.copy(newer / "average-1.safetensors", newer / "average.safetensors")
            manifest = read_manifest(newer)
            manifest["files"]["average.safetensors"] = manifest["files"]["average-1.safetensors"]
            write_manifest(newer, {**manifest, "step": 99999999})
        return found

    monkeypatch.setattr(f"scoresde.{'cli' if command else 'training'}.export.opened", overtaken)
    if command:
        assert run("export", here, "--out", out) == 0
    else:
        export(here, out)
    assert opened(out).manifest["step"] == 30
    assert opened(here).manifest["step"] == 99999999
    assert all(torch.equal(value, expected[name]) for name, value in weights(out).items())


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_round_and_load_as_float32(dtype, moons_run, tmp_path):
    found, expected = weights(export(moons_run, tmp_path / "out", dtype=dtype)), weights(moons_run)
    for name, value in found.items():
        assert value.dtype == expected[name].dtype
        if value.is_floating_point():
            assert torch.equal(value, expected[name].to(DTYPES[dtype]).to(value))


def test_what_float16_cannot_hold(moons_run, tmp_path, monkeypatch):
    denoiser = scoresde.load(moons_run)
    first = next(iter(denoiser.net.parameters()))
    first.fill_(1e6)
    monkeypatch.setattr("scoresde.training.export.built", lambda run, average: denoiser)
    with pytest.raises(CheckpointError, match="float16 cannot hold the weights of"):
        export(moons_run, tmp_path / "out", dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_commands_take_what_was_exported(moons_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("export", moons_run, "--out", "moons") == 0
    assert re.match(r"moons: 0\.0 MB, float32", capsys.readouterr().out)
    how = ["--n", 5, "--nfe", 3, "--device", "cpu", "--quiet"]
    assert run("sample", moons_run, *how, "--out", "run.npz") == 0
    assert run("sample", "moons", *how, "--out", "moons.npz") == 0
    expected = np.load("run.npz")["x"]
    assert np.array_equal(np.load("moons.npz")["x"], expected)
    assert run("info", "moons") == 0
    assert "two-moons" in capsys.readouterr().out
    assert run("likelihood", "moons", "--data", "two-moons:3", "--steps", 2, "--out", "b.json", "--quiet") == 0
    # Without what it was trained on, the shape must be said.
    export(moons_run, "bare")
    assert run("sample", "bare", *how, "--out", "c.npz") == 2
    assert "give --shape" in capsys.readouterr().err
    assert run("sample", "bare", "--shape", 2, *how, "--out", "c.npz") == 0
    assert np.array_equal(np.load("c.npz")["x"], expected)


def test_what_cannot_be_exported_is_status_2(moons_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    for arguments, words in (
        ([moons_run, "--out", "there"], "there exists"),
        ([moons_run, "--out", "a", "--average", 2], "average-2"),
        (["nothing", "--out", "a"], "nothing: there is no such run folder"),
        (["there", "--out", "a"], "there is no checkpoint in there"),
    ):
        assert run("export", *arguments) == 2
        out, err = capsys.readouterr()
        assert (out, words in err, "Traceback" in err) == ("", True, False), err
    with pytest.raises(ValueError, match="float8"):
        export(moons_run, "a", dtype="float8")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    # A weight that has changed on the way is noticed.
    export(moons_run, "given")
    file = tmp_path / "given" / "average.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        scoresde.load("given")
    manifest = read_manifest(tmp_path / "given")
    assert list(manifest["files"]) == ["average.safetensors"]


def test_help_ends_in_examples_that_parse(capsys):
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    lines = capsys.readouterr().out.partition("examples:\n")[2].splitlines()
    assert lines
    for line in lines:
        words = shlex.split(re.split(r" {3,}", line.strip())[0])
        assert parser().parse_args(words[1:]).command == "export"
