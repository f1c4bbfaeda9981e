"""The laws of conditions that a network computes: encoding beforehand changes no bit, nothing is nothing whatever the
encoder makes of it, an encoder that is trained along is trained, averaged, saved and resumed as the rest, and a frozen
one stays as it is.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import pytest
import torch
from common import normal
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scoresde import VPSDE, Clip, EpsDenoiser, Latent, elbo, load, log_prob, sample
from scoresde.codecs import Shift
from scoresde.data import Given, Itself, Raw, TrainingData, condition_of
from scoresde.guidance import ClassifierFree
from scoresde.guidance.branches import Conditioned
from scoresde.networks import Encodes
from scoresde.nn import MLP, DiT, Encoding, ImageEncoder
from scoresde.solvers import DDIM, DDPM
from scoresde.solvers.langevin import langevin
from scoresde.training import CheckpointError, ModelConfig, TrainConfig, Trainer, dsm_loss, load_ema
from scoresde.training.export import export
from scoresde.training.loss import two_term_loss
from scoresde.variance import SplitOutput

X, TIME = normal(6, 3, dtype=torch.float32), torch.linspace(0.1, 0.9, 6)
IDS = torch.tensor([[1, 2, 0], [3, 0, 0], [0, 0, 0], [2, 2, 2], [1, 0, 0], [0, 0, 0]])  # two items have no text
TOLD = IDS.any(1)


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    """Initial weights come from the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


class Text(nn.Module):
    """Tokens with a mask, and dropout; what it makes of no text is not zero. It counts its calls."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.rows, self.dropout, self.calls = nn.Embedding(4, width), nn.Dropout(0.5), 0

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        return {"context": self.dropout(self.rows(ids)), "context_mask": (ids >= 0) & (ids.any(1, keepdim=True) | True)}


def randomised(net: nn.Module) -> nn.Module:
    """Away from its start, where last layers are zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return net


def with_text(**options: Any) -> tuple[Encoding, Text]:
    text = Text()
    net = Encoding(DiT(1, 1, 8, 1, 2, dims=1, context=4), {"tokens": text}, **options)
    return randomised(net).eval(), text  # type: ignore[return-value]


def with_source(encoder: nn.Module | None = None, **options: Any) -> Encoding:
    net = Encoding(MLP(3, 8, 1, vector=2), {"source": encoder or nn.Linear(3, 2)}, **options)
    return randomised(net)  # type: ignore[return-value]


# ---- the network ----


def test_encoding_beforehand_or_by_hand_changes_no_bit():
    net, text = with_text()
    by_hand = text(IDS)
    by_hand = {
        "context": torch.where(TOLD[:, None, None], by_hand["context"], 0),
        "context_mask": by_hand["context_mask"] & TOLD[:, None],
    }
    x = X[:, None]
    expected = net.net(x, TIME, **by_hand)
    assert torch.equal(net(x, TIME, tokens=IDS), expected)
    encoded = net.encode(tokens=IDS)
    assert encoded.keys() == {"context", "context_mask"}
    assert torch.equal(net(x, TIME, **encoded), expected)
    again = net.encode(**encoded)
    assert all(again[key] is value for key, value in encoded.items())


def test_nothing_is_nothing_bit_for_bit():
    """Zeros are told nothing, whatever the encoder makes of them: a context that is masked away is none."""
    net, _ = with_text()
    assert torch.equal(net(X[:, None], TIME, tokens=IDS)[~TOLD], net.net(X[:, None], TIME)[~TOLD])
    assert not torch.equal(net(X[:, None], TIME, tokens=IDS)[TOLD], net.net(X[:, None], TIME)[TOLD])
    assert torch.equal(net(X[:, None], TIME), net.net(X[:, None], TIME))
    source = with_source()
    vector = source.encode(source=X * TOLD[:, None])["vector"]
    assert torch.equal(vector == 0, ~TOLD[:, None].expand(6, 2))

    class Length(nn.Linear):
        def forward(self, text: str | list[str]) -> Tensor:
            return super().forward(
                torch.tensor([[len(one)] for one in ([text] if isinstance(text, str) else text)]) + 1.0
            )

    net = Encoding(MLP(3, 8, 1, vector=2), {"text": Length(1, 2)})
    assert [bool(net.encode(text=text)["vector"].any()) for text in ("", [""], "a")] == [False, False, True]

    class Words(nn.Module):
        def forward(self, texts: Any) -> Mapping[str, Tensor]:
            return {"label": torch.tensor([len(text) for text in texts["words"]])}

    net = Encoding(MLP(3, 8, 1, num_classes=5), {"text": Words()})
    found = net.encode(text={"words": ["", "ab"], "mask": torch.zeros(2, 1, dtype=torch.bool)})
    assert found["label"].tolist() == [5, 2]


def test_what_contradicts_itself_is_refused():
    net = with_source()
    with pytest.raises(ValueError, match="source= makes vector, given as well"):
        net(X, TIME, source=X, vector=X[:, :2])
    with pytest.raises(ValueError, match="Encoding without encoders"):
        Encoding(nn.Identity(), {})
    with pytest.raises(ValueError, match=r"frozen has no 'sourc'.*nearest: 'source'"):
        with_source(frozen="sourc")
    with pytest.raises(ValueError, match="keys has no 'text'"):
        with_source(keys={"text": "vector"})
    with pytest.raises(ValueError, match="an encoder of vector that makes vector"):
        Encoding(nn.Identity(), {"vector": nn.Linear(3, 2)})
    with pytest.raises(ValueError, match="an encoder of a that makes b"):
        Encoding(nn.Identity(), {"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)}, keys={"a": "b"})
    with pytest.raises(ValueError, match="an encoder of context that makes context"):
        Encoding(nn.Identity(), {"context": Text()}).encode(context=IDS)


class Twice(nn.Module):
    """A prediction, and a second output for a head."""

    def forward(self, x: Tensor, time: Tensor, vector: Tensor) -> Tensor:
        return torch.cat([x + vector, x * vector], dim=1)


def test_a_network_with_a_head_keeps_both_outputs():
    net = Encoding(SplitOutput(Twice()), {"source": nn.Linear(3, 3)})
    both, vector = net.both(X, TIME, source=X), net.encode(source=X)["vector"]
    assert torch.equal(torch.cat(both), torch.cat([X + vector, X * vector]))
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.encoders["source"].bias += 1
    torch.testing.assert_close(twin.both(X, TIME, source=X)[0], X + vector + 1)


def test_an_encoder_takes_its_condition_in_its_own_dtype():
    net = with_source().double()
    assert torch.equal(net.encode(source=X)["vector"], net.encode(source=X.double())["vector"])


def test_the_image_encoder_sees_every_pixel_or_none_of_their_places():
    image = normal(2, 1, 7, 7, dtype=torch.float32)
    by_place, by_mean = (ImageEncoder(4, channels=4, multipliers=(1, 1), size=size) for size in (7, None))
    whole = image.requires_grad_()
    (gradient,) = torch.autograd.grad(by_place(whole)[:, 0].sum(), whole)
    assert bool((gradient != 0).all())
    assert by_mean(image[:, :, :5]).shape == by_place(image).shape == (2, 4)
    with pytest.raises(ValueError, match=r"this encoder is for size=\(7, 7\)"):
        by_place(image[:, :, :5])
    with pytest.raises(ValueError, match="expected a level, and 2 axes"):
        ImageEncoder(4, size=(7,))


# ---- runs ----


class Unknown(nn.Module):
    """A network of which nobody knows that it encodes."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, time: Tensor, **cond: Any) -> Tensor:
        return self.net(x, time, **cond)


RUNS = {
    "sample": lambda d, **cond: sample(d, X[:, None], DDPM(), steps=4, seed=0, cond=cond).x,
    "clipped": lambda d, **cond: sample(Clip(d), X[:, None], DDIM(), steps=4, seed=0, cond=cond).x,
    "guided": lambda d, **cond: sample(ClassifierFree(d, 2.0), X[:, None], DDIM(), steps=4, seed=0, cond=cond).x,
    "log_prob": lambda d, **cond: log_prob(d, X[:, None], steps=4, seed=0, cond=cond).value,
    "sample with log_prob": lambda d, **cond: (
        sample(d, X[:, None], DDIM(), steps=4, seed=0, cond=cond, log_prob="exact").log_prob
    ),
    "elbo": lambda d, **cond: elbo(d, X[:, None], draws=2, seed=0, cond=cond).value,
    "latent": lambda d, **cond: (
        sample(Latent(d, Shift(torch.ones(()))), X[:, None], DDIM(), steps=4, seed=0, cond=cond).x
    ),
    "langevin": lambda d, **cond: langevin(d, X[:, None], 0.5, step_size=0.01, steps=3, seed=0, cond=cond),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_encodes_once_with_the_bits_of_every_time(name):
    net, text = with_text()
    denoiser = EpsDenoiser(net, VPSDE())
    expected = RUNS[name](denoiser, **net.encode(tokens=IDS))
    before = text.calls
    assert torch.equal(RUNS[name](EpsDenoiser(Unknown(net).eval(), VPSDE()), tokens=IDS), expected)
    assert text.calls > before + 1
    before = text.calls
    assert torch.equal(RUNS[name](denoiser, tokens=IDS), expected)
    assert text.calls == before + 1


def test_guidance_with_words_of_its_own_encodes_both():
    """A null under the raw name is encoded with the rest, once, and so are conditions of one's own."""
    net, _ = with_text()
    denoiser, other = EpsDenoiser(net, VPSDE()), IDS.flip(0)
    a, b = net.encode(tokens=IDS), net.encode(tokens=other)
    run: dict[str, Any] = {"steps": 3, "seed": 0}
    guided = ClassifierFree(denoiser, 2.0, null={"tokens": other})
    expected = ClassifierFree(denoiser, 2.0, null=b)
    assert "tokens" not in guided.prepared({"tokens": IDS})
    found = sample(guided, X[:, None], DDIM(), cond={"tokens": IDS}, **run).x
    assert torch.equal(found, sample(expected, X[:, None], DDIM(), cond=a, **run).x)
    fixed = Conditioned(denoiser, tokens=other)
    found = sample(fixed, X[:, None], DDIM(), cond={"tokens": IDS}, **run).x
    assert torch.equal(found, sample(denoiser, X[:, None], DDIM(), cond=b, **run).x)


class Hidden(nn.Module):
    """A network with a condition of a name that it does not list among those that it can be told."""

    condition_sizes: ClassVar[dict[str, int]] = {"label": 5}

    def forward(self, x: Tensor, time: Tensor, hidden: Tensor | None = None, label: Tensor | None = None) -> Tensor:
        return x / 2 + (0 if hidden is None else hidden) + (0 if label is None else label[:, None] % 5)


def test_guidance_leaves_out_what_was_made_of_a_condition_by_whatever_name():
    net = Encoding(Hidden(), {"source": nn.Linear(3, 3)}, keys={"source": "hidden"})
    once, each = EpsDenoiser(net, VPSDE()), EpsDenoiser(Unknown(net), VPSDE())
    run: dict[str, Any] = {"steps": 2, "seed": 0}
    for cond in ({"source": X}, {"source": X, "label": torch.arange(6) % 5}):
        found = sample(ClassifierFree(once, 3.0), X, DDIM(), cond=cond, **run).x
        null = {name: {"label": 5}.get(name, 0) for name in cond}
        expected = sample(ClassifierFree(each, 3.0, null=null), X, DDIM(), cond=cond, **run).x
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_gradients_reach_the_raw_condition_and_the_encoder_through_a_run():
    net = with_source(frozen=())
    source = X.clone().requires_grad_()
    x = sample(EpsDenoiser(net, VPSDE()), X, DDIM(), steps=3, cond={"source": source}, differentiable=True).x
    found = torch.autograd.grad(x.sum(), [source, net.encoders["source"].weight])
    assert all(bool((g != 0).any()) for g in found)


# ---- training ----


def trainer(net: nn.Module, folder: Any = None, steps: int = 6, **options: Any) -> Trainer:
    data = TrainingData(normal(20, 3, dtype=torch.float32), conditions=(Itself(),), drop=0.3)
    settings: dict[str, Any] = {"batch_size": 5, "checkpoint_every": 2, "threads": 1, "schedule": "constant", **options}
    config = TrainConfig(steps=steps, ema_decay=(0.5, 0.9), **settings)
    return Trainer(EpsDenoiser(net, VPSDE()), data, config, folder=folder)


def state(run: Trainer) -> dict[str, Tensor]:
    found = dict(run.net.state_dict())
    for i, average in enumerate(run.averages):
        found |= {f"{i}.{key}": value for key, value in average.module.state_dict().items()}
    return found


def encoder_with_dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_encoder_is_trained_averaged_saved_and_resumed_as_the_rest(tmp_path, precision):
    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return with_source(encoder_with_dropout())

    whole = trainer(fresh(), precision=precision)
    start = {key: value.clone() for key, value in whole.net.state_dict().items()}
    mine = [x.clone() for x in whole.net.encoders.parameters()]
    whole.fit(progress=False)
    moved = [key for key, value in whole.net.state_dict().items() if not torch.equal(value, start[key])]
    assert {"encoders.source.0.weight", "encoders.source.2.bias"} <= set(moved)
    trainer(fresh(), tmp_path, steps=4, precision=precision).fit(progress=False)
    resumed = trainer(fresh(), tmp_path, precision=precision)
    assert resumed.step == 4
    resumed.fit(progress=False)
    assert [key for key, value in state(whole).items() if not torch.equal(state(resumed)[key], value)] == []
    average = load_file(resumed.path / "average.safetensors")
    assert torch.equal(average["encoders.source.0.weight"], whole.averages[0].module.encoders.source[0].weight)
    assert not torch.equal(average["encoders.source.0.weight"], mine[0])
    loaded = load_ema(tmp_path, EpsDenoiser(fresh(), VPSDE()))
    a, b = (sample(d, X, DDIM(), steps=3, cond={"source": X}).x for d in (loaded, whole.ema))
    assert torch.equal(a, b)


def test_an_encoder_that_brings_its_weights_is_frozen_by_default():
    encoder = torch.nn.Linear(5, 3)
    encoder.pretrained = True
    assert Encoding(MLP(2, width=8, vector=3), {"source": encoder}).frozen["source"] is encoder
    assert not Encoding(MLP(2, width=8, vector=3), {"source": torch.nn.Linear(5, 3)}).frozen


def test_a_frozen_encoder_stays_as_it_is_and_is_kept_once(tmp_path):
    encoder = encoder_with_dropout()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    run = trainer(with_source(encoder, frozen=["source"]), tmp_path, weight_decay=0.5)
    run.fit(progress=False)
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    run.net.train()
    assert not encoder.training
    assert torch.equal(run.net.encode(source=X)["vector"], encoder(X))
    for net in (run.net, *(average.module for average in run.averages), run.ema.net):
        assert net.frozen["source"] is encoder
        assert not any("source" in name for name, _ in net.named_parameters())
    assert not any("source" in key for key in load_file(run.path / "network.safetensors"))
    again = trainer(with_source(encoder, frozen="source"), tmp_path, weight_decay=0.5)
    assert again.step == 6
    with torch.no_grad():
        encoder[0].bias[0] += 1e-3
    with pytest.raises(CheckpointError, match="frozen source: sha256"):
        trainer(with_source(encoder, frozen=["source"]), tmp_path, weight_decay=0.5)
    with pytest.raises(CheckpointError, match="frozen source: sha256"):
        load_ema(tmp_path, EpsDenoiser(with_source(encoder, frozen=["source"]), VPSDE()))


def test_a_copy_that_is_converted_leaves_the_shared_encoder_alone():
    encoder = encoder_with_dropout()
    run = trainer(with_source(encoder, frozen=["source"]))
    other = run.ema.net.double()
    assert other.frozen["source"][0].weight.dtype == torch.float64
    assert run.net.frozen["source"] is encoder
    assert encoder[0].weight.dtype == torch.float32
    assert other(X.double(), TIME.double(), source=X).dtype == torch.float64
    meta = run.ema.net.to("meta").frozen["source"]
    assert meta[0].weight.is_meta
    with torch.no_grad():
        run.ema.net.to("cpu").frozen["source"][0].weight.zero_()  # a move to where it is already makes no second one
    assert not bool(encoder[0].weight.any())


def test_dropping_is_a_function_of_the_item_and_both_terms_agree_with_it():
    net = with_source()
    denoiser = EpsDenoiser(net, VPSDE())
    data = TrainingData(X, conditions=(Itself(), Raw("tokens", IDS)), drop=0.5, seed=1)
    batch = data.batch(torch.arange(6), 0)
    gone = ~batch.cond["source"].any(1)
    assert 0 < int(gone.sum()) < 6
    assert torch.equal(batch.cond["tokens"][gone], torch.zeros_like(IDS[gone]))
    assert torch.equal(batch.cond["source"][~gone], X[~gone])
    assert torch.equal(batch.cond["tokens"][~gone], IDS[~gone])
    assert data.network_options == {}
    loss = two_term_loss(denoiser, X, {"source": X}, unconditional=1.0, generator=torch.Generator().manual_seed(0))
    terms = [
        dsm_loss(denoiser, X, cond={"vector": vector}, generator=torch.Generator().manual_seed(0))
        for vector in (net.encode(source=X)["vector"], torch.zeros(6, 2))
    ]
    assert torch.equal(loss, terms[0] + terms[1])


def test_raw_conditions_are_of_their_items():
    assert condition_of("itself") == Itself()
    flipped = TrainingData(normal(4, 1, 3, 3, dtype=torch.float32), flip=True, conditions=(Itself("other"),))
    batch = flipped.batch(torch.arange(4), 3)
    assert torch.equal(batch.cond["other"], batch.x)
    raw = Raw("tokens", IDS)
    assert raw.fingerprint != Raw("tokens", IDS + 1).fingerprint
    assert len(raw.first(2)) == 2
    with pytest.raises(ValueError, match="has 6 entries for 5 items"):
        TrainingData(X[:5], conditions=(raw,))
    with pytest.raises(ValueError, match="tokens of items 0 is not finite"):
        Raw("tokens", torch.full((1, 2), torch.nan))
    with pytest.raises(ValueError, match=r"expected \(N, \.\.\.\)"):
        Raw("tokens", torch.ones(3))
    both = TrainingData(X, conditions=(Given(X[:, :2]), raw))
    assert both.network_options == {"vector": 2}


# ---- in words ----

IMAGES = normal(8, 1, 4, 4, dtype=torch.float32)
WORDS: dict[str, Any] = {
    "network": "mlp",
    "options": {"event_shape": [1, 4, 4], "width": 8, "depth": 1, "vector": 2},
    "encoders": {"source": {"options": {"vector": 2, "channels": 4, "multipliers": [1]}}},
}


def test_a_run_folder_is_loaded_with_its_encoder_and_exported(tmp_path):
    model = ModelConfig.of(WORDS)
    assert ModelConfig.of(model.to_dict()) == model
    assert "encoders" not in ModelConfig().to_dict()
    denoiser = model.build(seed=0)
    plain = ModelConfig.of({key: value for key, value in WORDS.items() if key != "encoders"}).build(seed=0)
    assert torch.equal(denoiser.net.net.inward.weight, plain.net.inward.weight)
    assert isinstance(denoiser.net, Encodes)
    config = TrainConfig(steps=2, batch_size=4, threads=1)
    data = TrainingData(IMAGES, conditions=(Itself(),))
    run = Trainer(denoiser, data, config, folder=tmp_path / "run", model=model).fit(progress=False)
    expected = sample(run.ema, (8, 1, 4, 4), DDIM(), steps=2, seed=0, cond={"source": IMAGES}).x
    export(tmp_path / "run", tmp_path / "given")
    for folder in ("run", "given"):
        found = sample(load(tmp_path / folder), (8, 1, 4, 4), DDIM(), steps=2, seed=0, cond={"source": IMAGES}).x
        assert torch.equal(found, expected)


def test_a_frozen_encoder_in_words_is_read_from_its_file(tmp_path):
    path = tmp_path / "encoder.safetensors"
    encoder = ImageEncoder(2, channels=4, multipliers=(1,))
    save_file(encoder.state_dict(), path)
    model = ModelConfig.of({**WORDS, "encoders": {"source": {**WORDS["encoders"]["source"], "frozen": str(path)}}})
    denoiser = model.build(seed=0)
    assert torch.equal(denoiser.net.encode(source=IMAGES)["vector"], encoder(IMAGES))
    data = TrainingData(IMAGES, conditions=(Itself(),))
    config = TrainConfig(steps=1, batch_size=4, threads=1)
    Trainer(denoiser, data, config, folder=tmp_path / "run", model=model).fit(progress=False)
    assert torch.equal(load(tmp_path / "run").net.encode(source=IMAGES)["vector"], encoder(IMAGES))
    encoder.outward.bias.data += 1
    save_file(encoder.state_dict(), path)
    with pytest.raises(CheckpointError, match="frozen source: sha256"):
        load(tmp_path / "run")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"encoder\.safetensors, of the frozen encoder 'source', is not there"):
        load(tmp_path / "run")


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ({"netwrk": "image"}, "encoder 'source' has no 'netwrk'"),
        ({"network": "texts"}, "network='texts'"),
        ({"options": {"vectors": 2}}, "encoder 'image' has no 'vectors'"),
        ({"options": {"vector": 2}, "frozen": True}, "ImageEncoder brings no weights"),
    ],
)
def test_an_encoder_in_words_that_is_wrong_is_named(encoder, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.of({**WORDS, "encoders": {"source": encoder}})
