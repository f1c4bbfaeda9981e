"""The examples of conditional models run and go on, and the laws of their data and scores hold."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")
pytest.importorskip("PIL")

from scoresde.data import Colourisation, Shown, scaled


@pytest.fixture(autouse=True)
def _examples(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")


@pytest.fixture
def garments(tmp_path):
    """A file of squares of a garment's size, of all classes, and one with the same in another order."""
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(60, 1, 28, 28, dtype=torch.uint8)
    images[:, :, 6:22, 8:20] = torch.randint(100, 256, (60, 1, 16, 12), generator=generator).to(torch.uint8)
    for name, order in (("one", 1), ("other", -1)):
        labels = np.arange(60)[::order] % 10
        np.savez(tmp_path / f"{name}.npz", images=images.numpy()[::order].copy(), labels=labels)
    return [str(tmp_path / "one.npz"), str(tmp_path / "other.npz")]


def test_a_grey_garment_says_nothing_of_its_colour(garments):
    """The luma is that of g alone; and the colours are the law's, by the very scores of the table."""
    import palette

    levels, g, kind = palette.coloured(garments[0], seed=0)
    other = palette.coloured(garments[0], seed=1)[0]
    lumas = [Colourisation()(scaled(x), Shown(torch.arange(60), 60)) for x in (levels, other)]
    assert not torch.equal(levels, other)
    for luma in lumas:  # each channel is rounded to 1 / 255 of the range 2
        torch.testing.assert_close((luma + 1) / 2, 0.1 + 0.5 * g, rtol=0, atol=0.5 / 255 + 1e-6)
    law, points = palette.colours({"truth": scaled(levels)[:, None]}, g, kind)
    assert law["truth"]["right"] == law["truth"]["opposite"] == [1, 0]
    torch.testing.assert_close(points["truth"].abs(), torch.ones(60), rtol=0.02, atol=0)
    turned = points["truth"] * torch.exp(-1j * math.pi / 3 * kind)
    torch.testing.assert_close(turned.real.abs(), torch.ones(60), rtol=0.02, atol=0)


def test_draws_of_the_posterior_are_as_far_from_each_other_as_from_the_truth():
    import palette

    generator = torch.Generator().manual_seed(0)
    mean, std = torch.randn(500, 1, 6, generator=generator), torch.rand(500, 1, 1, generator=generator)
    x = mean + std * torch.randn(500, 5, 6, generator=generator)
    truth, draws = x[:, :1], x[:, 1:]
    apart, to_truth = 2 * draws.var(1).mean(1), (draws - truth).square().flatten(1).mean(1)
    ratio, error = palette.ratio_of(apart, to_truth)
    assert error < 0.05
    assert abs(ratio - 1) < 5 * error  # five standard errors: 6e-7
    assert palette.ratio_of(to_truth, to_truth) == [1, 0]


def test_five_tasks_are_trained_once_and_shown(garments, tmp_path, capsys, monkeypatch):
    import palette

    for name in ("DIFFUSION", "REGRESSION"):
        monkeypatch.setattr(palette, name, replace(getattr(palette, name), options=palette.NETWORK | {"channels": 8}))
    arguments = ["--data", *garments, "--out", str(tmp_path / "out"), "--models", str(tmp_path / "models")]
    quick = ["--train-steps", "1", "--images", "16", "--several", "4", "--draws", "2", "--nfe", "1"]
    palette.main([*arguments, *quick])
    assert capsys.readouterr().out.count("training on 60 items") == 2
    results = json.loads((tmp_path / "out/results.json").read_text())
    ways = ["SDE", "ODE", "regression", "condition"]
    assert [(row["task"], row["way"]) for row in results["rows"]] == [(t, w) for t in palette.TASKS for w in ways]
    assert (tmp_path / "out/palette.png").read_bytes()[:4] == b"\x89PNG"
    value, error = results["rows"][0]["psnr"]
    assert f"| {value:.2f} ({error:.2f}) |" in (tmp_path / "out/README.md").read_text()
    palette.trained(palette.REGRESSION, palette_data(palette, garments), tmp_path / "models/regression", 1, 0,
                    loss=palette.squared_error, batch_size=128)  # fmt: skip
    assert capsys.readouterr().out == ""


def palette_data(palette, garments):
    conditions = (palette.OneOf(tuple(palette.TASKS.values())),)
    return palette.TrainingData(palette.coloured(garments[0], 0)[0], levels=256, conditions=conditions)


def test_scenes_are_digits_on_textures():
    """A mask is where there is ink; and the contrast is what it is made of."""
    import segmentation

    digits = torch.full((3, 1, 8, 8), -1.0)
    digits[:, :, 2:6, 3] = 1.0  # one bar of four pixels
    _, mask, contrast = segmentation.scenes(200, digits, seed=0)
    inside = (mask > 0).flatten(1).sum(1)
    assert (inside.min(), inside.max()) == (4, 12)  # of one to three digits, which may overlap
    assert torch.equal(contrast[:4], torch.tensor(segmentation.CONTRASTS))
    corner = torch.tensor([[0, 0], [12, 5]])
    found = segmentation.placed((digits[:2] + 1) / 2, corner)
    assert found.sum() == found[0, 0, 2:6, 3].sum() + found[1, 0, 14:18, 8].sum() == 8
    texture = segmentation.textures(50, torch.Generator().manual_seed(0))
    torch.testing.assert_close(texture.flatten(1).std(1), torch.ones(50))


def test_the_intersection_over_union():
    import segmentation

    a = torch.tensor([1.0, 1.0, -1.0, -1.0]).reshape(1, 1, 1, 4)
    for b, expected in ((a, 1), (-a, 0), (torch.ones_like(a), 0.5), (-torch.ones_like(a), 0)):
        assert segmentation.iou(a, b) == expected
    assert segmentation.iou(torch.full_like(a, -1), torch.full_like(a, -1)) == 1


def test_masks_are_drawn(tmp_path, monkeypatch):
    import segmentation

    small = {name: replace(m, options=m.options | {"channels": 8}) for name, m in segmentation.MODELS.items()}
    monkeypatch.setattr(segmentation, "MODELS", small)
    quick = ["--train-steps", "1", "--scenes", "64", "--held-out", "8", "--draws", "2", "--nfe", "1"]
    segmentation.main(["--out", str(tmp_path), "--models", str(tmp_path), *quick])
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["contrast"] for row in results["rows"]] == [*segmentation.CONTRASTS, None]
    assert (tmp_path / "segmentation.png").read_bytes()[:4] == b"\x89PNG"
    assert "| all |" in (tmp_path / "README.md").read_text()
