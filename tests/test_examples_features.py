"""Segmentation by features runs, goes on and takes one's own data, and the laws of its parts hold."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")
pytest.importorskip("PIL")


@pytest.fixture(autouse=True)
def _examples(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")


def test_the_intersection_over_union_of_classes():
    import segmentation_features as example

    true = torch.tensor([[0, 0, 0, 1], [1, 1, 2, 2]])
    assert torch.equal(example.iou(true, true, 4), torch.ones(3))  # nothing is of the fourth
    said = torch.tensor([[0, 0, 1, 1], [1, 1, 2, 0]])
    torch.testing.assert_close(example.iou(said, true, 3), torch.tensor([2 / 4, 3 / 4, 1 / 2]))


def test_an_ensemble_learns_what_features_say():
    """Two classes on a line, a unit apart, the second feature being of no use: a threshold tells them."""
    import segmentation_features as example

    f = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0)) * 100 + 7
    y = (f[:, 0] > 7).long()
    ensemble = example.classifier(f[:1000], y[:1000], 2, steps=100, seed=0)
    with torch.no_grad():
        p = ensemble(f[1000:])
    torch.testing.assert_close(p.sum(1), torch.ones(1000))
    clear = (f[1000:, 0] - 7).abs() > 10
    assert (p.argmax(1) == y[1000:])[clear].double().mean() > 0.98


def test_clusters_are_numbered_by_their_grey_value():
    import segmentation_features as example

    levels = torch.tensor([0.3, -0.8, 0.9, -0.2, 0.0])
    x = levels[torch.arange(50) % 5].view(2, 1, 5, 5)
    found = example.clusters(torch.cat([5 - x, x**3], 1), x)
    assert torch.equal(found, levels.argsort().argsort()[torch.arange(50) % 5].view(2, 5, 5))


QUICK = ["--train-steps", "1", "--held-out", "8", "--labelled", "2", "--draws", "2"]
QUICK += ["--classifier-steps", "2", "--supervised-steps", "2"]


def run(example, monkeypatch, tmp_path, *more):
    monkeypatch.setattr(example, "NETWORK", example.NETWORK | {"channels": 4})
    monkeypatch.setattr(example, "CLUSTERED", (0.1,))
    example.main(["--out", str(tmp_path), "--model", str(tmp_path / "model"), *QUICK, *more])
    return json.loads((tmp_path / "results.json").read_text())


def test_scenes_are_segmented_and_a_run_goes_on(tmp_path, capsys, monkeypatch):
    import segmentation_features as example

    results = run(example, monkeypatch, tmp_path, "--scenes", "64")
    assert [row["method"] for row in results["rows"]] == list(example.SCORES)
    assert "training on 64 items" in capsys.readouterr().out
    assert (tmp_path / "segmentation_features.png").read_bytes()[:4] == b"\x89PNG"
    mean, error = results["rows"][0]["miou"]
    assert f"| {mean:.3f} ({error:.3f}) |" in (tmp_path / "README.md").read_text()
    again = run(example, monkeypatch, tmp_path, "--scenes", "64")
    assert again["rows"] == results["rows"]
    assert "training" not in capsys.readouterr().out.partition("#")[0]


def test_ones_own_images_and_masks(tmp_path, monkeypatch):
    """In colour, of three classes: those of the draws are not those held out."""
    import segmentation_features as example

    generator = np.random.default_rng(0)
    masks = generator.integers(0, 3, (10, 8, 8))
    images = generator.normal(size=(10, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "own.npz", unlabelled=np.repeat(images, 7, 0), images=images, masks=masks)
    results = run(example, monkeypatch, tmp_path, "--data", str(tmp_path / "own.npz"))
    assert results["classes"] == 3
    assert results["held_out"] == 6
