"""The command line of whole states: train, sample, likelihood, export; the others refuse by name."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from scoresde.cli import main
from scoresde.data import StateData, TrainingData, digit_levels, pictured, states_of
from scoresde.training import load_categorical

Image = pytest.importorskip("PIL.Image")


def run(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def bits(tmp_path_factory):
    """A small run on digits of two levels, conditional on their classes."""
    out = tmp_path_factory.mktemp("runs") / "bits"
    small = [
        "--set",
        "train.schedule=constant",
        "--set",
        "model.options.channels=8",
        "--set",
        "model.options.attention=[]",
        "--set",
        "data.limit=64",
    ]
    train = ["train-categorical", "--data", "digits", "--classes", "--drop", "0.1", "--batch-size", "8", "--quiet"]
    assert run(*train, *small, "--steps", 2, "--out", out) == 0
    assert run("train-categorical", "--out", out, "--steps", 3, "--quiet") == 0  # goes on
    return out


def test_what_is_trained_is_drawn_bounded_and_given_away(bits, tmp_path, capsys):
    assert load_categorical(bits).process.mask == 2
    assert run("sample", bits, "--n", 4, "--steps", 3, "--class", 3, "--guidance", 2, "--out", tmp_path / "a.npz") == 0
    images = np.load(tmp_path / "a.npz")
    assert images["images"].shape == (4, 1, 8, 8)
    assert set(np.unique(images["images"])) <= {0, 255}
    assert set(images["labels"]) == {3}
    assert run("sample", bits, "--n", 2, "--solver", "tau-leaping", "--nfe", 3, "--out", tmp_path / "a.png") == 0
    bound = ["likelihood", bits, "--limit", 3, "--bound", "--draws", 4, "--out", tmp_path / "b.json"]
    assert run(*bound) == 0
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["unit"] == "nats"
    assert set(found["bound"]["terms"]) == {"prior", "denoising", "reconstruction"}
    assert found["bound"]["value"] < 0
    assert run("export", bits, "--out", tmp_path / "given") == 0
    assert run("info", tmp_path / "given") == 0
    assert "CategoricalProcess.absorbing(states=2" in capsys.readouterr().out
    assert run("sample", tmp_path / "given", "--n", 1, "--steps", 2, "--out", tmp_path / "c.png") == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["edit", "RUN", "--input", "a.png", "--out", "b.png"], "kind 'categorical'"),
        (["variance", "RUN", "--out", "t.npz"], "kind 'categorical'"),
        (["tune", "RUN", "--nfe", "5", "--out", "t.json"], "kind 'categorical'"),
        (["evaluate", "RUN", "--data", "digits", "--out", "s.json"], "kind 'categorical'"),
        (["sample", "RUN", "--clip", "--out", "b.png"], "--clip is for models of numbers"),
        (["sample", "RUN", "--solver", "ddim", "--out", "b.png"], "ancestral"),
        (["likelihood", "RUN", "--out", "b.json"], "a bound alone, --bound"),
    ],
)
def test_what_does_not_apply_is_refused_by_name(bits, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    Image.new("L", (8, 8)).save("a.png")
    assert run(*(bits if word == "RUN" else word for word in arguments)) == 2
    assert words in capsys.readouterr().err


def test_levels_are_states():
    levels = digit_levels()[0][:5]
    source = StateData(TrainingData(levels, levels=17), 3)
    assert torch.equal(source.batch(torch.arange(5)).x, states_of(levels, 17, 3))
    assert pictured(torch.tensor([0, 1, 2]), 3).tolist() == [-1, 0, 1]
    with pytest.raises(ValueError, match="whole levels"):
        StateData(TrainingData(torch.zeros(3, 2)), 2)
