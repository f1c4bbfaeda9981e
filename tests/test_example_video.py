"""The example of video: its clips obey their law of motion, and it takes clips of one's own."""

from __future__ import annotations

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


def test_a_clip_moves_as_it_says_and_its_centre_tells():
    """Interpolation keeps a digit's mass and moves its centre by exactly as much as its place."""
    import video as example

    images, labels = example.halves()[0]
    x, place, _ = example.bouncing(images, labels, 20, 0)
    mass = (x[:, 0].double() + 1) / 2
    torch.testing.assert_close(mass.sum((2, 3)), mass.sum((2, 3))[:, :1].expand(-1, 16), rtol=1e-5, atol=0)
    i = torch.arange(16).double()
    centre = torch.stack([mass.sum(3) @ i, mass.sum(2) @ i], 2) / mass.sum((2, 3))[..., None]
    torch.testing.assert_close(centre.diff(dim=1), place.diff(dim=1).double(), rtol=0, atol=1e-4)
    assert place.min() >= 0
    assert place.max() <= 8
    assert torch.equal(x, example.bouncing(images, labels, 20, 0)[0])


def test_it_takes_clips_of_ones_own(tmp_path):
    import video as example

    np.savez(tmp_path / "clips.npz", np.random.default_rng(0).integers(0, 256, (1, 60, 20, 20), dtype=np.uint8))
    where = ["--out", str(tmp_path / "out"), "--models", str(tmp_path / "models")]
    example.main(["--data", str(tmp_path), "--size", "8", "--train-steps", "1", "--steps", "1", *where])
    assert (tmp_path / "out" / "video.png").stat().st_size > 5_000
    assert (tmp_path / "out" / "video.gif").stat().st_size > 5_000
