"""What would go wrong in silence is said or right by itself, and what needs to be computed once is computed once:
masks in training, conditions that are given, encoders inside of guidance, digests of data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from common import normal

from scoresde import VPSDE, EpsDenoiser, Masked, batch_of, load, sample
from scoresde.cli.defaults import completed
from scoresde.codecs import Standardise
from scoresde.data import Given, Raw, TrainingData, dropped, nothing
from scoresde.denoiser import Denoiser
from scoresde.guidance import Autoguidance, Classifier, ClassifierFree, Energy, Mixture, Product
from scoresde.guidance.branches import Conditioned
from scoresde.nn import Encoding, SetTransformer
from scoresde.solvers import DDPM
from scoresde.training import LatentData, ModelConfig, TrainConfig, Trainer, dsm_loss, masked_loss, two_term_loss
from scoresde.wrappers import Clip, SameMean

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
    with pytest.raises(ValueError, match=r"a mask among the conditions, 'mask'.* loss=masked_loss\(\)"):
        Trainer(denoiser, SETS, CONFIG, cond={"mask": MASK})
    told = TrainingData(SETS, conditions=(Raw("mask", MASK),))
    with pytest.raises(ValueError, match=r"give loss=masked_loss\(\)"):
        Trainer(denoiser, told, CONFIG).fit(progress=False)
    for loss in (dsm_loss, partial(two_term_loss, unconditional=1.0, num_classes=3)):
        with pytest.raises(ValueError, match=r"elsewhere Masked\(denoiser\)"):
            loss(denoiser, SETS, cond={"mask": MASK, "label": LABEL})
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


# ---- encoders inside of guidance ----


class Words(torch.nn.Module):
    """Tokens as a vector, each row by itself, so that the size of a batch changes no bit. It counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.calls = torch.nn.Embedding(5, 3), 0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.rows(ids).sum(1)


class Reader(torch.nn.Module):
    """A network of entries by themselves, that is told a vector and a label."""

    def __init__(self, bias: float = 0.0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.3 + bias))
        self.condition_sizes = {"vector": 3, "label": 4}

    def forward(
        self, x: torch.Tensor, time: torch.Tensor, vector: Any = None, label: Any = None, mask: Any = None
    ) -> torch.Tensor:
        told = x if vector is None else x + vector
        label = torch.zeros(1) if label is None else torch.as_tensor(label)
        return torch.tanh(self.weight * told + 0.1 * label.reshape(-1, 1).to(x) + 0.2 * time[:, None].to(x))


class Unprepared(SameMean):
    """What a run was before conditions were encoded beforehand."""

    masks = True

    def prepared(self, cond: Any) -> dict[str, Any]:
        return dict(cond or {})


X, LABEL = normal(4, 3, dtype=torch.float32), torch.tensor([0, 1, 2, 1])
IDS, OTHERS = torch.tensor([[1, 2], [3, 0], [0, 0], [4, 4]]), torch.tensor([[2, 2], [1, 0], [3, 3], [0, 4]])
TEXT = {"tokens": IDS}


def logits(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, x.sum(1, keepdim=True)], 1)


def energy(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return x.square().sum(1)


def told(denoiser: Denoiser, ids: torch.Tensor = OTHERS) -> Conditioned:
    return Conditioned(denoiser, tokens=ids)


# Of denoisers a and b, which have each an encoder: the guided one, its conditions, and how often a run encodes.
GUIDED: dict[str, tuple[Callable[[Denoiser, Denoiser], Denoiser], dict[str, Any], int]] = {
    "autoguidance": (lambda a, b: Autoguidance(a, b, 1.5), TEXT, 2),
    "autoguidance of one": (lambda a, b: Autoguidance(a, Conditioned(a, drop=["tokens"])), TEXT, 1),
    "product": (lambda a, b: Product([a, b], [0.7, 0.6]), TEXT, 2),
    "product of texts": (lambda a, b: Product([told(a), told(a, IDS.flip(0))], base=a), {}, 2),
    "product, labels": (lambda a, b: Product([Conditioned(a, label=1), Conditioned(a, label=3)], base=a), TEXT, 3),
    "product in product": (lambda a, b: Product([Autoguidance(a, b), told(a)], base=b), TEXT, 4),
    "mixture": (lambda a, b: Mixture([a, told(b)], log_densities=lambda x, t: x[:, :2]), TEXT, 2),
    "conditioned": (lambda a, b: told(a), TEXT, 1),
    "conditioned twice": (lambda a, b: Conditioned(told(a), label=2), TEXT, 1),
    "free": (lambda a, b: ClassifierFree(a, null={"tokens": OTHERS}), TEXT, 2),
    "free, a label of one's own": (lambda a, b: ClassifierFree(told(a), null={"label": 4}), {"label": LABEL}, 2),
    "free of a product": (lambda a, b: ClassifierFree(Product([a, b]), null={"tokens": OTHERS}), TEXT, 4),
    "products of free": (lambda a, b: Product([ClassifierFree(a, null={"tokens": OTHERS}), b]), TEXT, 3),
    "classifier": (lambda a, b: Classifier(Product([a, b]), logits), TEXT | {"label": LABEL}, 2),
    "classifier, told": (lambda a, b: Classifier(told(a), logits, conditional=True), TEXT | {"label": LABEL}, 1),
    "classifier of free": (
        lambda a, b: Classifier(ClassifierFree(a, null={"tokens": OTHERS}), logits),
        TEXT | {"label": LABEL},
        2,
    ),
    "energy of free": (lambda a, b: Energy(ClassifierFree(a, null={"tokens": OTHERS}), energy, 0.1), TEXT, 2),
    "clipped": (lambda a, b: Clip(Autoguidance(a, b)), TEXT, 2),
}


@pytest.mark.parametrize("name", GUIDED)
def test_guidance_encodes_once_a_run_with_the_bits_of_every_evaluation(name: str) -> None:
    guide, cond, expected = GUIDED[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        words = Words()
        nets = [Encoding(Reader(bias), {"tokens": words}).eval().requires_grad_(False) for bias in (0.0, 0.2)]
    denoiser = guide(*(EpsDenoiser(net, VPSDE()) for net in nets))
    found = []
    for steps in (2, 4):
        words.calls = 0
        found.append(sample(denoiser, X, DDPM(), steps=steps, seed=0, cond=cond).x)
        assert words.calls == expected
    words.calls = 0
    assert torch.equal(sample(Unprepared(denoiser), X, DDPM(), steps=4, seed=0, cond=cond).x, found[1])
    assert words.calls >= 4


def test_what_no_one_encodes_stays_as_it_is() -> None:
    plain = EpsDenoiser(Reader(), VPSDE())
    cond = {"label": LABEL, "vector": X}
    for denoiser in (Product([plain, plain]), Conditioned(plain, label=1), Autoguidance(plain, plain)):
        found = denoiser.prepared(cond)
        assert found.keys() == cond.keys()
        assert all(found[name] is value for name, value in cond.items())
