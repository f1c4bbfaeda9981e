"""The examples of guidance run, and their numbers mean what their tables say."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")

from scoresde import VPSDE
from scoresde.exact import Gaussian
from scoresde.guidance import TrainedClassifier
from scoresde.training import ModelConfig, TrainConfig, Trainer, load

QUICK = ["--train-steps", "2", "--weights", "0", "1", "3", "--samples", "16", "--nfe", "2"]


@pytest.fixture(autouse=True)
def _examples(monkeypatch):
    """The examples, with a smaller network."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    import guidance

    small = {**guidance.MODEL.options, "channels": 8}
    monkeypatch.setattr(guidance, "MODEL", replace(guidance.MODEL, options=small))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("guidance")


def test_the_sweep_is_written_and_a_second_run_trains_nothing(folder, capsys):
    import guidance

    arguments, state = ["--out", str(folder), "--model", str(folder / "model"), *QUICK], torch.get_rng_state()
    guidance.main(arguments)
    assert "training on 1297 items, step 0 to 2" in capsys.readouterr().out
    results = json.loads((folder / "results.json").read_text())
    assert [(row["weight"], row["interval"]) for row in results["rows"]] == [
        (0.0, None),
        (1.0, None),
        (3.0, None),
        (3.0, [0.3, 2.0]),
    ]
    report = (folder / "README.md").read_text()
    assert f"| {results['rows'][2]['frechet']:.2f} +- {results['rows'][2]['frechet_stderr']:.2f} |" in report
    assert (folder / "guidance.png").read_bytes()[:4] == b"\x89PNG"
    again = guidance.trained(folder / "model", steps=2)
    assert capsys.readouterr().out == ""
    for p, q in zip(again.net.parameters(), load(folder / "model").net.parameters(), strict=True):
        assert torch.equal(p, q)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(SystemExit, match="--model names another folder"):
        guidance.trained(folder / "model", steps=2, seed=7)


def test_a_classifier_guides_both_models(folder, capsys, monkeypatch):
    import classifier_guidance
    import guidance

    monkeypatch.setattr(classifier_guidance, "FORMS", {"eps (DDIM)": classifier_guidance.FORMS["eps (DDIM)"]})
    guidance.trained(folder / "model", steps=2)
    out = folder / "by_classifier"
    arguments = ["--out", str(out), "--model", str(folder / "model"), "--guide", str(out / "guide"), "--steps", "2"]
    quick = ["--train-steps", "2", "--guide-steps", "2", "--samples", "16", "--scales", "0", "10", "--halves", "2"]
    classifier_guidance.main([*arguments, *quick])
    results = json.loads((out / "results.json").read_text())
    rows = [(row["conditional"], row["form"], row["scale"]) for row in results["rows"]]
    assert rows == [(conditional, "eps (DDIM)", scale) for conditional in (False, True) for scale in (0, 10)]
    report = (out / "README.md").read_text()
    assert "{:.2f} +- {:.2f}".format(*results["rows"][3]["entropy_score"]) in report
    assert "| unconditional, 0 to 10 | down: " in report
    assert (out / "classifier_guidance.png").read_bytes()[:4] == b"\x89PNG"
    guide = TrainedClassifier.load(out / "guide" / "classifier.safetensors")
    assert guide.guide(load(folder / "model"), shape=(1, 8, 8), classes=10).scale == 1
    # A run that was killed has the rows that it had.
    lines = (out / "rows.jsonl").read_text().splitlines(keepends=True)
    (out / "rows.jsonl").write_text("".join(lines[:-1]))
    capsys.readouterr()
    monkeypatch.setattr(classifier_guidance, "draw", lambda *_: None)
    classifier_guidance.main([*arguments, *quick])
    assert capsys.readouterr().out.count("'frechet': [") == 1
    assert json.loads((out / "results.json").read_text())["rows"] == results["rows"]


def test_rare_digits_are_measured_in_units_of_those_held_out(folder):
    import guidance
    import low_density

    guidance.trained(folder / "model", steps=2)
    out = folder / "low_density"
    arguments = ["--out", str(out), "--model", str(folder / "model"), "--guide", str(out / "guide.npz"), "--steps", "2"]
    quick = ["--train-steps", "2", "--epochs", "1", "--samples", "16", "--distance", "1", "--contrast", "2"]
    low_density.main([*arguments, *quick])
    results = json.loads((out / "results.json").read_text())
    rows = [("none, w = 1", 2), ("none, w = 3", 2), ("distance", 2), ("distance", 4), ("contrast", 2), ("contrast", 4)]
    assert [(row["energy"], row["steps"]) for row in results["rows"]] == rows
    assert (out / "low_density.png").read_bytes()[:4] == b"\x89PNG"
    (_, _), (x, _) = guidance.split()
    training = guidance.split()[0][0]
    nearest = torch.cdist(x.flatten(1), training.flatten(1)).amin(1)
    assert results["held_out"]["nearest_in_pixels"][0] == pytest.approx(float(nearest.mean()), abs=1e-4)
    kept = {name: [1.1, 0.04] for name in low_density.RARITY} | {"accuracy": [0.95, 0.01]}
    assert low_density.rare(kept, errors=2)
    assert not low_density.rare(kept | {"accuracy": [0.94, 0.01]})
    near = kept | {"nearest_in_pixels": [1.1, 0.06]}
    assert low_density.rare(near)
    assert not low_density.rare(near, errors=2)


def test_every_problem_is_restored(folder):
    import guidance
    import restoration

    guidance.trained(folder / "model", steps=2)
    out = folder / "restoration"
    quick = ["--images", "2", "--draws", "2", "--steps", "3", "--device", "cpu"]
    restoration.main(["--out", str(out), "--model", str(folder / "model"), *quick])
    results = json.loads((out / "results.json").read_text())
    methods = {problem: [] for problem in restoration.PROBLEMS}
    for row in results["rows"]:
        methods[row["problem"]].append(row["method"])
    every = ["no model", "replacement", "RePaint", "DDNM", "DPS", "PiGDM", "moment matching"]
    without = [name for name in every if name not in ("replacement", "RePaint")]
    assert methods == {problem: without if problem == "blur" else every for problem in methods}
    assert (out / "restoration.png").read_bytes()[:4] == b"\x89PNG"


def test_another_run_and_colours(tmp_path):
    import numpy as np
    import restoration

    images = torch.randint(0, 256, (6, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    np.save(tmp_path / "images.npy", images.numpy())
    model = ModelConfig(options={"image_channels": 3, "channels": 8, "multipliers": [1], "blocks": 1})
    data = images.float() / 127.5 - 1
    Trainer(model.build(0), data, TrainConfig(steps=1, batch_size=2), folder=tmp_path / "run", model=model).fit()
    arguments = ["--out", str(tmp_path), "--model", str(tmp_path / "run"), "--data", str(tmp_path / "images.npy")]
    quick = ["--images", "2", "--draws", "2", "--steps", "2", "--device", "cpu", "--problems", "hole"]
    restoration.main([*arguments, *quick])
    assert (tmp_path / "restoration.png").read_bytes()[:4] == b"\x89PNG"


def test_scores_of_restoration_on_gaussian_data():
    """Moment matching is exact there (all of it well inside [-1, 1]), and for white data PiGDM too: draws as far from
    their mean as the truth, which explain y and no more."""
    import restoration

    target, generator = Gaussian(torch.zeros(1, 4, 4), std=0.15), torch.Generator().manual_seed(0)
    truth = target.sample(60, generator)
    args = argparse.Namespace(draws=4, steps=60, zeta=0.5, seed=1, device="cpu")
    A = restoration.hole((1, 4, 4))
    y = A(truth) + 0.03 * torch.randn(truth.shape, generator=generator)
    problem = restoration.Problem(A, y, 0.03, 0.15)
    found = restoration.restored(target.denoiser(VPSDE()), problem, truth, args)
    rows = {row["method"]: row for row in found["rows"]}
    for name in ("moment matching", "PiGDM"):
        # 60 x 4 squares of the hole and their like for the truth: a relative standard deviation of 0.11.
        spread, stderr = rows[name]["spread"]
        assert abs(spread - 1) < 0.5
        assert 0.04 < stderr < 0.25  # over images, to first order
        # 60 x 12 known pixels; of E |y - A x|^2 = n (1 + ...) the posterior's share is small.
        assert abs(rows[name]["residual"] - 1) < 0.15


def test_psnr_and_what_is_shown():
    import restoration

    truth = torch.zeros(2, 1, 4, 4)
    assert restoration.psnr(truth + 0.2, truth) == pytest.approx((20.0, 0.0), abs=1e-4)
    off = torch.linspace(0.15, 0.25, 1000).reshape(-1, 1, 1, 1)
    value, stderr = restoration.psnr(off.expand(1000, 1, 4, 4), torch.zeros(1000, 1, 4, 4))
    square = off.double().square()
    assert value == pytest.approx(10 * math.log10(4 / float(square.mean())), abs=1e-5)
    assert stderr == pytest.approx(10 / math.log(10) * float(square.std() / square.mean()) / 1000**0.5, rel=1e-4)
    A = restoration.hole((1, 4, 4))
    picture = restoration.shown(A, A(truth))
    assert picture.isnan().sum() == 2 * 4
    assert (picture[~picture.isnan()] == 0).all()
