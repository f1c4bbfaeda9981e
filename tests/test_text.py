"""The laws of texts: what is no token changes no bit, the empty text is the dropped one and the null condition, a run
encodes once and finds what encoding by hand does, and captions go with their images.
"""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from common import normal
from torch import Tensor

from scoresde import VPSDE, EpsDenoiser, load, sample
from scoresde.cli import main
from scoresde.data import Captions, Shown, TrainingData, dropped, nothing, read_captions, training_data
from scoresde.guidance import ClassifierFree, Energy
from scoresde.nn import ByteTokens, DiT, Encoding, PretrainedText, TextEncoder, UNet, WordTokens, tokenizer_of
from scoresde.solvers import DDIM
from scoresde.training import ModelConfig, TrainConfig, Trainer

TEXTS = ["a three", "", "seven, dark", "é"]
X, TIME = normal(4, 1, 8, 8, dtype=torch.float32), torch.linspace(5, 900, 4)
NETS: dict[str, Any] = {
    "unet": lambda **options: UNet(channels=8, multipliers=(1, 2), blocks=1, heads=2, **options),
    "dit": lambda **options: DiT(width=8, depth=1, heads=2, **options),
}


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    """Initial weights come from the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def reading(net: str = "dit", **options: Any) -> Encoding:
    """A network that reads, away from its start, where last layers are zero."""
    encoder = TextEncoder(**{"width": 8, "depth": 2, "heads": 2, "length": 16, **options})
    made = Encoding(NETS[net](**encoder.sizes), {"text": encoder})
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.2 * torch.randn(p.shape))
    return made.eval().requires_grad_(False)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# What is no token, and no text


@pytest.mark.parametrize("name", NETS)
def test_padding_changes_no_bit(name: str) -> None:
    """Of the encoder and of a network that it tells, whatever the batch was filled up to."""
    net = reading(name)
    encoder, ids = net.encoders["text"], ByteTokens()(TEXTS)
    expected = encoder(TEXTS)
    for length in (11, 13, 16):
        longer = ByteTokens()(TEXTS, length)
        assert same(encoder(longer), expected)
        assert torch.equal(net(X, TIME, text=longer), net(X, TIME, text=TEXTS))
    assert ids.shape == (4, 11)
    other = torch.where(expected["context_mask"][..., None], expected["context"], torch.nan)  # what is masked away
    told = {**expected, "context": other}
    assert torch.equal(net.net(X, TIME, **told), net.net(X, TIME, **expected))


@pytest.mark.parametrize("name", NETS)
def test_the_empty_text_is_the_dropped_one_and_nothing(name: str) -> None:
    """Bit for bit: an empty string, ids of zeros, what dropping makes, and a network that is told nothing."""
    net, cond = reading(name), {"text": ByteTokens()(TEXTS, 16)}
    drop = dropped(cond, torch.tensor([True] * 4))
    plain = net.encode(text=TEXTS)
    expected = net.net(X, TIME, vector=torch.zeros(4, 8))
    for told in ({"text": [""] * 4}, {"text": ""}, drop, nothing(cond), nothing({"text": TEXTS}), nothing(plain)):
        assert torch.equal(net(X, TIME, **told), expected)
    empty = net.encode(text=[""] * 4)
    assert not empty["context_mask"].any()
    assert not empty["vector"].any()
    told = net(X, TIME, text=TEXTS)
    assert [torch.equal(a, b) for a, b in zip(told, expected, strict=True)] == [False, True, False, False]


def test_the_order_of_tokens_says_something_and_the_last_one_sees_all() -> None:
    encoder = reading().encoders["text"]
    a, b = (encoder([text])["vector"] for text in ("ab", "ba"))
    assert not torch.allclose(a, b, atol=1e-3)
    x = encoder(["abc", "abd"])
    assert not torch.allclose(x["vector"][0], x["vector"][1], atol=1e-3)
    assert x["context_mask"].sum(1).tolist() == [4, 4]
    assert torch.equal(x["context"][:, -1], x["vector"])


# Guidance in one call


def test_a_run_encodes_once_and_finds_what_encoding_by_hand_does() -> None:
    net = reading()
    encoder, calls = net.encoders["text"], []
    encoder.register_forward_hook(lambda *_: calls.append(1))
    denoiser, bare = EpsDenoiser(net, VPSDE()), EpsDenoiser(net.net, VPSDE())
    how: dict[str, Any] = {"steps": 3, "seed": 0}
    shape, by_hand = (4, 1, 8, 8), encoder(TEXTS)
    told = sample(bare, shape, DDIM(), cond=by_hand, **how).x
    guided = sample(ClassifierFree(bare, 3.0), shape, DDIM(), cond=by_hand, **how).x
    away = ClassifierFree(bare, 3.0, null=encoder(["dark"] * 4))
    negative = sample(away, shape, DDIM(), cond=by_hand, **how).x
    calls.clear()
    for text in (TEXTS, ByteTokens()(TEXTS)):
        assert torch.equal(sample(denoiser, shape, DDIM(), cond={"text": text}, **how).x, told)
        assert torch.equal(sample(ClassifierFree(denoiser, 3.0), shape, DDIM(), cond={"text": text}, **how).x, guided)
    assert len(calls) == 4
    calls.clear()
    for given in (["dark"] * 4, "dark"):
        guide = ClassifierFree(denoiser, 3.0, null={"text": given})
        assert torch.equal(sample(guide, shape, DDIM(), cond={"text": TEXTS}, **how).x, negative)
        t = torch.tensor(0.5)
        at = guide(X, t, text=TEXTS).mean  # outside of a run it is encoded at each evaluation
        assert torch.equal(at, away(X, t, **by_hand).mean)
    assert len(calls) == 2 * 2 + 2
    calls.clear()
    energy = Energy(ClassifierFree(denoiser, 3.0), lambda x, t: x.flatten(1).square().sum(1), 0.0)
    assert torch.equal(sample(energy, shape, DDIM(), cond={"text": TEXTS}, **how).x, guided)
    assert len(calls) == 1
    one = sample(ClassifierFree(denoiser, 1.0, null={"text": "dark"}), shape, DDIM(), cond={"text": TEXTS}, **how).x
    assert torch.equal(one, told)


def test_the_empty_texts_branch_is_the_unconditional_model() -> None:
    denoiser = EpsDenoiser(reading(), VPSDE())
    cond, nothing_told = {"text": TEXTS}, {"vector": torch.zeros(4, 8)}
    bare = EpsDenoiser(denoiser.net.net, VPSDE())
    how: dict[str, Any] = {"steps": 2, "seed": 0}
    free = sample(bare, (4, 1, 8, 8), DDIM(), cond=nothing_told, **how).x
    assert torch.equal(sample(ClassifierFree(denoiser, 0.0), (4, 1, 8, 8), DDIM(), cond=cond, **how).x, free)
    for weight in (0.0, 2.0):
        guide = ClassifierFree(denoiser, weight, null={"text": ""})
        expected = sample(ClassifierFree(denoiser, weight), (4, 1, 8, 8), DDIM(), cond=cond, **how).x
        assert torch.equal(sample(guide, (4, 1, 8, 8), DDIM(), cond=cond, **how).x, expected)


# Tokens


def test_bytes_are_their_own_vocabulary() -> None:
    ids = ByteTokens()(["é", "\0"])
    assert ids.tolist() == [[1 + 0xC3, 1 + 0xA9], [1, 0]]
    assert tokenizer_of(ByteTokens().words)(["é", "\0"]).equal(ids)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["a" * 17], "'aaaaaaaaaaaaaaaaa' has 17 tokens, and the longest may have 16"),
        (torch.ones(1, 17, dtype=torch.int64), r"expected texts, or whole numbers \(B, N\), N <= 16"),
        (torch.tensor([[257]]), "tokens from 257 to 257: expected 1 to 256"),
        (torch.ones(1, 2), "text is torch.float32"),
    ],
)
def test_what_cannot_be_read_is_said(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reading().encoders["text"](given)
    with pytest.raises(TypeError, match="expected a list of strings"):
        ByteTokens()("one text")
    with pytest.raises(ValueError, match="width=6, heads=4"):
        TextEncoder(width=6)


def test_words_are_kept_and_unknown_ones_are_said(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="words need the library tokenizers")
    words = WordTokens.trained(["a three left of a dark seven", "a light seven"])
    ids = words(["A dark seven", ""])
    assert ids.shape == (2, 3)
    assert ids[0].min() >= 1
    assert not ids[1].any()
    assert words(["a dark"])[0].equal(ids[0, :2])
    words.save(tmp_path / "tokens.json")
    for again in (WordTokens.load(tmp_path / "tokens.json"), tokenizer_of(words.words), copy.deepcopy(words)):
        assert again(["a dark seven"]).equal(ids[:1])
        assert again.vocabulary == words.vocabulary == 8  # and among them [UNK]
    with pytest.raises(ValueError, match="the word 'darke' of 'a darke seven' is not among the 7 known; 'dark' is"):
        words(["a darke seven"])
    with pytest.raises(ValueError, match="no tokenizer"):
        tokenizer_of("{}")


def _models() -> dict[str, Any]:
    """Of each kind of the library one, that knows a, b and c, and how it says that it does not know the others."""
    models = pytest.importorskip("tokenizers", reason="words need the library tokenizers").models
    letters = {"a": 0, "b": 1, "c": 2}
    none, some = "does not know the characters 'ö'", "is not among the 3 known"
    suffixed = {f"{letter}{end}": 3 * i + n for n, letter in enumerate("abc") for i, end in enumerate(("", "</w>"))}
    return {
        "bpe": (models.BPE(letters, []), none),
        "bpe with an unknown": (models.BPE({**letters, "?": 3}, [], unk_token="?"), some),
        "bpe with a token that it lacks": (models.BPE(letters, [], unk_token="?"), none),
        "bpe of bytes, not all": (models.BPE({**letters, "<0xC3>": 3}, [], byte_fallback=True), none),
        "bpe with ends of words": (models.BPE(suffixed, [], end_of_word_suffix="</w>"), none),
        "unigram": (models.Unigram([(letter, -1.0) for letter in "abc"], None, False), none),
        "unigram with an unknown": (models.Unigram([("?", 0.0), *((k, -1.0) for k in "abc")], 0, False), some),
        "words": (models.WordLevel(letters, "?"), none),
        "parts of words": (models.WordPiece({**letters, "##b": 3, "##c": 4}, unk_token="?"), none),
    }


def test_no_character_is_left_out_unseen() -> None:
    """Whatever the model of a tokenizer does with what it does not know, that is an error which names the text and the
    characters; what it knows is as before, and so is the tokenizer in words."""
    library = pytest.importorskip("tokenizers", reason="words need the library tokenizers")
    for name, (model, message) in _models().items():
        given = library.Tokenizer(model)
        given.pre_tokenizer = library.pre_tokenizers.Whitespace()
        words, text = WordTokens(given), "a b c" if name == "words" else "abc a"
        assert words.words == given.to_str()
        assert words([text]).tolist() == [[1 + number for number in given.encode(text).ids]]
        for copied in (words, tokenizer_of(words.words), copy.deepcopy(words)):
            for wrong in ("ö", "a ö", "böc a"):
                if name == "words" and wrong == "böc a":
                    continue  # of a word no letter is known
                with pytest.raises(ValueError, match=f"{wrong!r}.*{message}"):
                    copied([wrong])
            assert not copied([""]).numel()
    spaced = library.Tokenizer(library.models.BPE({"a": 0}, []))
    spaced.normalizer = library.normalizers.Replace("ö", "a")
    assert WordTokens(spaced)(["aö"]).tolist() == [[1, 1]]  # a mapping that is said


@pytest.mark.filterwarnings("ignore")
def test_an_encoder_of_hugging_face_stays_as_it_is(tmp_path: Path) -> None:
    """A T5 of random weights, from a folder: its own last_hidden_state, frozen, whatever the padding."""
    transformers = pytest.importorskip("transformers", reason="encoders of Hugging Face need transformers")
    tokenizers = pytest.importorskip("tokenizers")
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "</s>": 1, "a": 2, "b": 3}, "<pad>"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=library, pad_token="<pad>", eos_token="</s>")
    config = transformers.T5Config(vocab_size=4, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    model = transformers.T5EncoderModel(config).eval()
    model.save_pretrained(tmp_path)
    fast.save_pretrained(tmp_path)
    texts = ["a b", "", "b a a"]
    encoder = PretrainedText(str(tmp_path), length=6)
    found = encoder(texts)
    given = fast(texts[::2], padding="max_length", max_length=6, return_tensors="pt")
    with torch.no_grad():
        hidden = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).last_hidden_state
    mask = given["attention_mask"].bool()
    assert torch.equal(found["context_mask"][::2], mask)
    assert torch.allclose(found["context"][::2][mask], hidden[mask], atol=1e-6)
    assert not found["context_mask"][1].any()
    assert same(encoder(encoder.tokenizer(texts)), found)
    words = {"network": "pretrained-text", "options": {"name": str(tmp_path), "length": 6}}  # frozen, as it says
    options = {"width": 8, "depth": 1, "heads": 2, **encoder.sizes}
    config = ModelConfig(network="dit", options=options, encoders={"text": words})
    denoiser = config.build(0)
    cond = {"text": encoder.tokenizer(texts)}
    trainer = Trainer(
        denoiser, X[:3], TrainConfig(steps=1, batch_size=3), cond=cond, folder=tmp_path / "run", model=config
    )
    trainer.fit()
    again = load(tmp_path / "run")
    assert not any("encoders" in name for name in again.net.state_dict())
    assert same(again.net.encode(text=texts), found)
    with pytest.raises(ValueError, match="transformers finds no"):
        PretrainedText(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(("network", "frozen"), [("text", False), ("pretrained-text", True)])
def test_an_encoder_that_brings_its_weights_is_frozen_unless_it_is_said(network: str, frozen: bool) -> None:
    words = {"network": network, "options": {"length": 4}}
    assert ModelConfig(encoders={"text": words}).encoders["text"]["frozen"] is frozen
    assert ModelConfig(encoders={"text": {**words, "frozen": False}}).encoders["text"]["frozen"] is False


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for library, make in {
        "tokenizers": lambda: WordTokens.trained(["a"]),
        "transformers": lambda: PretrainedText("t5"),
    }.items():
        monkeypatch.setitem(__import__("sys").modules, library, None)
        with pytest.raises(ImportError, match=rf"{library}: pip install scoresde\[text\]"):
            make()


# Captions


def test_captions_are_shown_one_an_epoch() -> None:
    captions = Captions(["a", ["b", "cc"], ""])
    x = torch.zeros(3, 1)
    seen = [captions(x, Shown(torch.arange(3), 3, epoch, seed=1)) for epoch in range(8)]
    assert all(ids[0].tolist() == [98, 0] and not ids[2].any() for ids in seen)
    assert {tuple(ids[1].tolist()) for ids in seen} == {(99, 0), (100, 100)}
    for epoch, ids in enumerate(seen):  # a function of the seed, the epoch and the item alone
        assert captions(x[:1], Shown(torch.tensor([1]), 3, epoch, seed=1)).equal(ids[1:2])
    assert captions.fingerprint != Captions(["a", ["b", "cd"], ""]).fingerprint
    some = captions.first(1)
    assert (len(some), some.length, some(x[:1], Shown(torch.tensor([0]), 1)).shape) == (1, 2, (1, 2))


def test_dropping_a_caption_is_the_empty_text() -> None:
    images = torch.zeros(64, 1, 4, 4)
    data = TrainingData(images, conditions=(Captions(["a three"] * 64),), drop=0.5, seed=3)
    ids = data.batch(torch.arange(64)).cond["text"]
    assert set(ids.any(1).tolist()) == {True, False}
    assert torch.equal(ids[~ids.any(1)][0], ByteTokens()([""], 7)[0])


@pytest.mark.parametrize("sides", ["a three Left of a seven", "RIGHT: a three"])
def test_a_mirrored_image_is_not_what_its_caption_says(sides: str) -> None:
    images = torch.zeros(2, 1, 4, 4)
    with pytest.raises(ValueError, match=f"flip=True: of a mirrored image {sides!r} is not true"):
        TrainingData(images, flip=True, conditions=(Captions(["a three", sides]),))
    TrainingData(images, flip=True, conditions=(Captions(["a three", "brightly"]),))


FILES = {
    "captions.txt": "b/2.png\tto\na.png\tone\nb/2.png\ttwo\n",
    "captions.csv": 'file_name,text\nb/2.png,to\na.png,one\nb/2.png,"two"\n',
    "captions.jsonl": '{"file_name": "b/2.png", "text": ["to", "two"]}\n{"file_name": "a.png", "text": "one"}\n',
    "metadata.csv": "image,caption\nb/2.png,to\na.png,one\nb/2.png,two\n",
}


@pytest.mark.parametrize("name", FILES)
def test_captions_are_found_by_the_names_of_files(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(FILES[name])
    names = ["a.png", "b/2.png"]
    assert read_captions(tmp_path, names) == [("one",), ("to", "two")]
    with pytest.raises(ValueError, match=r"has no caption of c.png"):
        read_captions(tmp_path / name, [*names, "c.png"])
    with pytest.raises(ValueError, match=r"has captions of b/2.png.*: there is no such file"):
        read_captions(tmp_path / name, names[:1])


def test_captions_without_names_are_in_order(tmp_path: Path) -> None:
    (tmp_path / "captions.txt").write_text("one\n\nthree\n")
    for names in (None, ["a", "b", "c"]):
        assert read_captions(tmp_path, names) == [("one",), ("",), ("three",)]
    with pytest.raises(ValueError, match="3 captions without names for 2 files"):
        read_captions(tmp_path, ["a", "b"])
    with pytest.raises(FileNotFoundError, match=r"expected a file captions.jsonl"):
        read_captions(tmp_path.parent)
    with pytest.raises(ValueError, match="give one for each"):
        training_data("two-moons:2", captions=["a"])
    (tmp_path / "captions.csv").write_text("file_name,what\na,b\n")
    with pytest.raises(ValueError, match=r"captions.csv: row 1 has no column text or caption"):
        read_captions(tmp_path / "captions.csv")


# All of it: a folder, a run, words


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from scoresde.pictures import write_png

    path = tmp_path_factory.mktemp("images")
    images = torch.randint(256, (4, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for i, image in enumerate(images):
        write_png(path / f"{i}.png", image)
    lines = [json.dumps({"file_name": f"{i}.png", "text": text}) for i, text in enumerate(["one", "two", "", "three"])]
    (path / "captions.jsonl").write_text("\n".join(lines))
    return path


def test_what_is_left_out_leaves_its_caption_out(folder: Path) -> None:
    data = training_data(folder, captions=folder, skip=["1.png"])
    assert data.conditions[0].texts == [("one",), ("",), ("three",)]
    assert data.batch(torch.arange(3)).cond["text"].shape == (3, 5)


def test_a_run_reads_and_is_guided_by_a_text(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """`scoresde train --captions`, `load`, and `scoresde sample --text`."""
    run, small = tmp_path / "run", ["preset=8", "options.channels=8", "options.multipliers=[1, 1]", "options.blocks=1"]
    own = "encoders.text={options={width=8, depth=1, heads=2, length=12}}"
    settings = [word for text in [*small, own] for word in ("--set", f"model.{text}")]
    command = ["train", "--data", folder, "--captions", folder, "--drop", "0.5", "--steps", "1", "--out", run]
    options = [*settings, "--batch-size", "4", "--set", "evaluate.grid=0", "--quiet"]
    assert main([*map(str, command), *options]) == 0, capsys.readouterr().err
    net = load(run).net
    assert isinstance(net.encoders["text"], TextEncoder)
    assert net.encoders["text"].length == 12
    out = tmp_path / "samples.npz"
    words = ["sample", str(run), "--text", "one", "--text", "twelve", "--guidance", "2", "--n", "2", "--nfe", "2"]
    for negative in ([], ["--negative", "two"]):
        assert main([*words, *negative, "--solver", "ddim", "--out", str(out), "--quiet"]) == 0, capsys.readouterr().err
        out.unlink()
    for more, said in (
        (["--text", "thirteen letters"], "longest may have 12"),
        (["--text", "one", "--negative", "two"], "--negative is for --guidance"),
    ):
        assert main(["sample", str(run), *more, "--n", "1", "--nfe", "1", "--out", str(out), "--quiet"]) == 2
        assert said in capsys.readouterr().err
    assert main(["sample", str(run), "--n", "2", "--nfe", "1", "--out", str(out), "--quiet"]) == 0
