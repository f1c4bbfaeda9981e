"""What would go wrong in silence is said or right by itself, and what needs to be computed once is computed once:
masks in training, conditions that are given, encoders inside of guidance, digests of data.
"""

from __future__ import annotations

import torch
from common import normal

from scoresde.codecs import Standardise
from scoresde.data import Given, TrainingData
from scoresde.training import LatentData

IMAGES = normal(6, 1, 4, 4, dtype=torch.float32)


def test_latents_digest_their_data_once(tmp_path, monkeypatch):
    """The words are what they were: those of the data, conditions and dropping among them."""
    from scoresde.data import training

    calls, digest = [], training.digest
    data = TrainingData(IMAGES, conditions=(Given(IMAGES[:, 0, 0]),), flip=True, drop=0.2, seed=3)
    expected = data.fingerprint
    monkeypatch.setattr(training, "digest", lambda x: (calls.append(x.shape), digest(x))[1])
    found = LatentData.of(data, Standardise(0.0, 2.0), tmp_path)
    assert calls == [IMAGES.shape]
    assert f"latents, of {expected}, by Standardise" in found.fingerprint
    assert data.items_fingerprint == TrainingData(IMAGES, flip=True, seed=3).fingerprint
