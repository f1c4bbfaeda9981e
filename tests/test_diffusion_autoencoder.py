"""examples/diffusion_autoencoder.py runs and goes on, and its laws hold: what is encoded comes back, an edit
by one takes a class's mean to another's, and principal components are a projection.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from common import normal

pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")

from scoresde.metrics import PCA


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


def test_what_is_encoded_comes_back():
    """The error of there and back falls with the evaluations, whatever the network and its encoder are."""
    from diffusion_autoencoder import AUTOENCODER, relative

    denoiser = AUTOENCODER.build(seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in denoiser.net.parameters():
            p.add_(0.03 * torch.randn(p.shape, generator=generator))
    denoiser.net.double().eval()
    x = normal(2, 1, 8, 8)
    coarse, fine = (relative(denoiser, x, nfe)[0] for nfe in (10, 40))
    assert fine < min(1e-3, coarse / 4)


def test_an_edit_by_one_takes_the_mean_of_a_class_to_that_of_another():
    from diffusion_autoencoder import Linear, moved

    labels = torch.arange(200) % 3
    features = normal(200, 4) + labels[:, None]
    assert float((Linear(features, labels).logits(features).argmax(1) == labels).double().mean()) > 1 / 2
    there = moved(features, labels, (labels + 1) % 3, 1.0, features, labels)
    for k in range(3):
        wanted = features[labels == (k + 1) % 3].mean(0)
        torch.testing.assert_close(there[labels == k].mean(0), wanted, rtol=0, atol=1e-5)
    assert torch.equal(moved(features, labels, (labels + 1) % 3, 0.0, features, labels), features)


def test_principal_components_are_a_projection():
    from diffusion_autoencoder import from_components

    x = 0.1 * normal(20, 1, 4, 4)
    pca = PCA(x, 3)
    once = from_components(pca, pca(x), (1, 4, 4))
    torch.testing.assert_close(from_components(pca, pca(once), (1, 4, 4)), once, rtol=0, atol=1e-6)


def test_it_is_trained_once_and_shown(garments, tmp_path, capsys):
    import diffusion_autoencoder

    arguments = ["--data", *garments, "--out", str(tmp_path / "out"), "--models", str(tmp_path / "models")]
    quick = ["--train-steps", "1", "--latent-steps", "1", "--images", "8", "--samples", "16", "--nfe", "2"]
    diffusion_autoencoder.main([*arguments, *quick])
    first = json.loads((tmp_path / "out/results.json").read_text())
    assert capsys.readouterr().out.count("training on 60 items") == 2
    assert set(first["probe"]) == {"z", "PCA", "lead"}
    moves = (None, 0.5, 1.0, 1.5)
    assert [(row["of"], row["by"]) for row in first["edits"]] == [(of, by) for of in ("z", "PCA") for by in moves]
    assert {"README.md", "diffusion_autoencoder.png"} < {path.name for path in (tmp_path / "out").iterdir()}
    diffusion_autoencoder.main([*arguments, *quick])
    assert "training on" not in capsys.readouterr().out
    again = json.loads((tmp_path / "out/results.json").read_text())
    assert all(again[key] == first[key] for key in ("probe", "reconstruction", "round_trip", "edits", "frechet"))
