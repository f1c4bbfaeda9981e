"""The example of latent diffusion runs, goes on, and compares what it says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")


def test_latents_beside_pixels(tmp_path, monkeypatch, capsys):
    """Of squares of a garment's size, with networks of a few channels."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    import latent_diffusion as example

    generator = torch.Generator().manual_seed(0)
    for name in ("one", "other"):
        images = torch.zeros(60, 1, 28, 28, dtype=torch.uint8)
        images[:, :, 6:22, 8:20] = torch.randint(100, 256, (60, 1, 16, 12), generator=generator).to(torch.uint8)
        np.savez(tmp_path / f"{name}.npz", images=images.numpy())
    monkeypatch.setattr(example, "AUTOENCODER", example.AUTOENCODER | {"channels": 4})
    words = example.words
    counts = [example.size(words(channels, patch).net()) for channels, patch in ((1, 2), (4, 1))]
    assert max(counts) <= 1.2 * min(counts)
    small = lambda channels, patch: words(channels, patch, features=8)  # noqa: E731
    monkeypatch.setattr(example, "words", small)
    data = [str(tmp_path / "one.npz"), str(tmp_path / "other.npz")]
    steps = [word for name in ("autoencoder", "pixel", "latent") for word in (f"--{name}-steps", "1")]
    more = ["--images", "24", "--bounds", "2", "--nfe", "2"]
    example.main(["--quick", "--data", *data, "--out", str(tmp_path / "out"), *steps, *more])
    assert capsys.readouterr().out.count("step 0 to 1") == 3
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["shapes"] == {"pixel": [1, 28, 28], "latent": [4, 7, 7]}
    assert results["frechet"].keys() == {"pixel", "latent", "reconstructions"}
    assert (tmp_path / "out/latent_diffusion.png").read_bytes()[:4] == b"\x89PNG"
    seconds = results["seconds_an_image"]
    assert f"**{seconds['latent'] / seconds['pixel']:.3f}**" in (tmp_path / "out/README.md").read_text()
    words = example.AutoencoderConfig("kl", example.AUTOENCODER | {"image_channels": 1})
    example.train_autoencoder(words, example.training_data(data[0], lazy=False), tmp_path / "out/autoencoder", 1, 0)
    assert "step 0" not in capsys.readouterr().out
