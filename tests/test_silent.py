"""What would go wrong in silence is said or right by itself, and what needs to be computed once is computed once:
masks in training, conditions that are given, encoders inside of guidance, digests of data.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from common import normal

from scoresde import VPSDE, EpsDenoiser, Masked, batch_of, load, sample
from scoresde.cli.defaults import completed
from scoresde.codecs import Standardise
from scoresde.data import Given, Raw, TrainingData, dropped, nothing
from scoresde.nn import SetTransformer
from scoresde.solvers import DDPM
from scoresde.training import LatentData, ModelConfig, TrainConfig, Trainer, masked_loss

IMAGES = normal(6, 1, 4, 4, dtype=torch.float32)
SETS, MASK = batch_of([normal(n, 2, dtype=torch.float32) for n in (3, 1, 2, 3)])
CONFIG = TrainConfig(steps=2, batch_size=4, threads=1, schedule="constant")


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


# ---- masks in training ----


def model() -> EpsDenoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return EpsDenoiser(SetTransformer(2, width=8, depth=1, heads=1), VPSDE())


def test_a_mask_without_the_masked_loss_is_refused_before_the_network_is_called() -> None:
    calls: list[Any] = []
    denoiser = model()
    denoiser.net.register_forward_hook(lambda *_: calls.append(0))
    with pytest.raises(ValueError, match=r"a mask among the conditions, 'mask', without loss=masked_loss\(\)"):
        Trainer(denoiser, SETS, CONFIG, cond={"mask": MASK})
    told = TrainingData(SETS, conditions=(Raw("mask", MASK),))
    with pytest.raises(ValueError, match=r"without loss=masked_loss\(\)"):
        Trainer(denoiser, told, CONFIG).fit(progress=False)
    assert not calls
    trainers = [
        Trainer(model(), *given, CONFIG, loss=masked_loss(), **more).fit(progress=False)
        for given, more in (((SETS,), {"cond": {"mask": MASK}}), ((told,), {}))
    ]
    weights = [list(trainer.net.parameters()) for trainer in trainers]
    assert all(map(torch.equal, *weights))
    Trainer(EpsDenoiser(Told(), VPSDE()), SETS, CONFIG, cond={"mask": MASK.float()}).fit(progress=False)  # a condition


class Told(torch.nn.Linear):
    """A network with a condition called mask, which is none."""

    def __init__(self) -> None:
        super().__init__(3, 2)

    def forward(self, x: torch.Tensor, time: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(torch.cat([x, mask], -1))


def test_a_mask_is_never_dropped() -> None:
    source = 1 + normal(4, 3, dtype=torch.float32).square()
    data = TrainingData(SETS, conditions=(Raw("mask", MASK), Raw("source", source)), drop=1.0)
    found = data.batch(torch.arange(4)).cond
    assert torch.equal(found["mask"], MASK)
    assert not found["source"].any()
    cond = {"mask": MASK, "source": source}
    assert torch.equal(nothing(cond)["mask"], MASK)
    assert torch.equal(dropped(cond, torch.tensor([True, False, True, True]))["mask"], MASK)
    assert not nothing({"mask": MASK.float()})["mask"].any()  # a condition like others
    with pytest.raises(ValueError, match=r"drop=0.1: there are no labels and no conditions to drop"):
        TrainingData(SETS, conditions=(Raw("mask", MASK),), drop=0.1)


def test_a_run_on_sets_is_saved_resumed_and_loaded_by_its_name(tmp_path) -> None:
    """With masks, and a condition: samples, and weights of a run that was resumed, are the same to the last bit."""
    words = ModelConfig(network="set", options={"channels": 2, "width": 8, "depth": 1, "heads": 1, "num_classes": 3})
    assert ModelConfig.of(words.to_dict()) == words
    label = torch.tensor([0, 1, 2, 1])

    def run(folder: str, steps: int) -> Trainer:
        config, cond = replace(CONFIG, steps=steps), {"mask": MASK, "label": label}
        settings: dict[str, Any] = {"folder": tmp_path / folder, "model": words, "loss": masked_loss()}
        return Trainer(words.build(0), SETS, config, cond=cond, **settings).fit(progress=False)

    whole = run("whole", 4)
    run("parts", 2)
    assert all(map(torch.equal, whole.net.parameters(), run("parts", 4).net.parameters()))
    cond = {"mask": MASK, "label": label}
    mine, loaded = (
        sample(Masked(d), (4, 3, 2), DDPM(), steps=3, seed=1, cond=cond) for d in (whole.ema, load(tmp_path / "whole"))
    )
    assert torch.equal(mine.x, loaded.x)
    assert not loaded.x[~MASK.expand(4, 3, 2)].any()
    assert loaded.x[MASK.expand(4, 3, 2)].all()


def test_sets_of_points_get_their_network_by_name() -> None:
    found = completed({"data": {"source": "sets.npy"}, "model": {"network": "set"}}, TrainingData(SETS), cpu=True).model
    assert (found.network, found.options, found.preset) == ("set", {"channels": 2}, None)
    with pytest.raises(ValueError, match=r"'set' is for sets of points \(N, d\): an item has the shape \(1, 4, 4\)"):
        completed({"data": {"source": "sets.npy"}, "model": {"network": "set"}}, TrainingData(IMAGES), cpu=True)


# ---- conditions that are mirrored ----


def test_a_raw_image_is_mirrored_with_its_item_or_said_not_to_be(tmp_path) -> None:
    """Of latents too, whose mirrored view is another latent."""
    images, items = IMAGES.clone(), torch.arange(6)
    with pytest.raises(ValueError, match=r"Raw\(source \(1, 4, 4\): 6\) may be images.*flips=True.*flips=False"):
        TrainingData(IMAGES, flip=True, conditions=(Raw("source", images),))
    pair = (Raw("source", images, flips=True), Raw("other", images, flips=False), Raw("ids", torch.ones(6, 2)))
    data = TrainingData(IMAGES, flip=True, conditions=pair)
    latents = LatentData.of(data, Standardise(0.0, 2.0), tmp_path)
    for epoch in range(3):
        for batch, scale in ((data.batch(items, epoch), 1), (latents.batch(items, epoch), 2)):
            assert torch.equal(batch.cond["source"], batch.x * scale)
            assert not torch.equal(batch.x * scale, IMAGES)
            assert torch.equal(batch.cond["other"], IMAGES)
    assert Raw("a", images).fingerprint == Raw("a", images, flips=False).fingerprint
    assert Raw("a", images).fingerprint != Raw("a", images, flips=True).fingerprint
    assert Raw("a", images, flips=True).first(2).flips
    with pytest.raises(ValueError, match=r"flips=True: a has the shape \(6, 2\), and is no image"):
        Raw("a", torch.ones(6, 2), flips=True)
