"""`--guidance` and `scoresde restore`, in small: they are the library's, in any batch; what they refuse."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import scoresde
from scoresde.cli import main
from scoresde.cli.drawing import Recipe
from scoresde.cli.restore import METHODS
from scoresde.data import digit_levels, digits
from scoresde.guidance.classifier import Classifier
from scoresde.guidance.classifier_free import ClassifierFree
from scoresde.guidance.operators import Blur, Downsample, FourierSampling, LinearOperator, Mask
from scoresde.guidance.operators.words import OPERATORS, operator_of
from scoresde.guidance.posterior_sampling import PiGDM
from scoresde.guidance.trained import TrainedClassifier
from scoresde.levels import to_levels
from scoresde.nn import NoisyClassifier
from scoresde.noise import derive_seed, seeds_of
from scoresde.sampling import sample
from scoresde.solvers import DDPM, Adams
from scoresde.variance import VarianceTable, estimate
from scoresde.wrappers import Clip

Image = pytest.importorskip("PIL.Image")

CPU = ("--device", "cpu", "--quiet")


def run(*arguments):
    return main([str(argument) for argument in arguments])


def trained(out, *arguments):
    words = ["train", "--data", "digits", "--batch-size", "8", "--steps", "2", "--set", "data.limit=64",
             "--set", "model.options.channels=16", "--set", "model.options.attention=[]",
             "--set", "train.checkpoint_every=2", "--set", "evaluate.grid=0"]  # fmt: skip
    assert run(*words, *arguments, *CPU, "--out", out) == 0
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def guided_run(runs):
    """Conditional on the classes, and trained without them too."""
    return trained(runs / "guided", "--classes", "--drop", 0.2)


@pytest.fixture(scope="module")
def classes_run(runs):
    """Conditional on the classes always."""
    return trained(runs / "classes", "--classes")


@pytest.fixture(scope="module")
def plain_run(runs):
    """Told nothing."""
    return trained(runs / "plain")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def found(path, name="x"):
    return torch.from_numpy(np.load(path)[name])


def seeds(n, seed=0):
    return [derive_seed(seed, i) for i in range(n)]


# --- guidance --------------------------------------------------------------------------------------------------------


def test_help_names_every_method_and_operator(capsys):
    with pytest.raises(SystemExit):
        main(["restore", "--help"])
    text = capsys.readouterr().out
    for name in (*METHODS, *OPERATORS):
        assert re.search(rf"^  {name}\b", text, re.MULTILINE)


def test_guidance_is_the_librarys(guided_run, here):
    options = ["sample", guided_run, "--n", 5, "--nfe", 3, "--class", 3, "--float", *CPU]
    assert run(*options, "--out", "none.npz") == 0
    assert run(*options, "--guidance", 1, "--out", "one.npz") == 0
    assert torch.equal(found("none.npz"), found("one.npz"))
    assert run(*options, "--guidance", 3, "--out", "three.npz") == 0
    assert run(*options, "--guidance", 3, "--batch-size", 2, "--out", "again.npz") == 0
    torch.testing.assert_close(found("three.npz"), found("again.npz"), rtol=1e-5, atol=1e-5)
    denoiser, cond = scoresde.load(guided_run), {"label": torch.full((5,), 3)}

    def drawn(model, cond=cond):
        return sample(model, (5, 1, 8, 8), Adams(), nfe=3, seed=seeds(5), cond=cond).x

    torch.testing.assert_close(found("three.npz"), drawn(ClassifierFree(denoiser, 3.0)), rtol=1e-5, atol=1e-5)
    assert run(*options, "--guidance", 3, "--guidance-rule", "cfg-zero", "--out", "zero-star.npz") == 0
    by_rule = ClassifierFree(denoiser, 3.0, rule="cfg-zero")
    torch.testing.assert_close(found("zero-star.npz"), drawn(by_rule), rtol=1e-5, atol=1e-5)
    # At 0 it is the model that is told the null class.
    assert run(*options, "--guidance", 0, "--out", "zero.npz") == 0
    torch.testing.assert_close(found("zero.npz"), drawn(denoiser, {"label": torch.full((5,), 10)}))
    # Outside of the interval the conditional model runs by itself.
    assert run(*options, "--guidance", 3, "--guidance-interval", 1e3, 2e3, "--out", "out.npz") == 0
    assert torch.equal(found("none.npz"), found("out.npz"))
    assert run(*options, "--guidance", 3, "--guidance-interval", 0, 1, "--clip", "--out", "in.npz") == 0
    expected = drawn(scoresde.Clip(ClassifierFree(denoiser, 3.0, interval=(0.0, 1.0))))
    torch.testing.assert_close(found("in.npz"), expected, rtol=1e-5, atol=1e-5)


def test_a_run_of_two_terms_is_guided(runs, here, capsys):
    """Told and not told in every batch, by the bound of a chain; it goes on, and with another weight it is refused."""
    words = ["--classes", "--sde", "ddpm", "--set", "loss.weighting=bound", "--set", "loss.unconditional=0.25"]
    path = trained(runs / "two", *words)
    assert run("sample", path, "--n", 2, "--nfe", 2, "--class", 3, "--guidance", 2, *CPU, "--out", "x.png") == 0
    assert run("train", "--out", path, "--steps", 4, "--set", "loss.unconditional=0.5") != 0
    assert "loss.unconditional" in capsys.readouterr().err
    for wrong in (["--classes", "--drop", 0.1], []):
        assert run("train", "--data", "digits", *wrong, "--set", "loss.unconditional=0.1", "--out", here / "no") != 0
        assert "loss.unconditional=0.1" in capsys.readouterr().err


def test_conditions_are_dropped_with_the_class(runs, here):
    path = trained(runs / "sr", "--classes", "--drop", 0.2, "--condition", "super-resolution:2")
    assert run("sample", path, "--n", 4, "--nfe", 3, "--guidance", 2, "--float", "--out", "a.npz", *CPU) == 0
    denoiser, (x, labels) = scoresde.load(path), (part[:4] for part in digits())
    image = scoresde.data.SuperResolution(2)(x, scoresde.data.Shown(torch.arange(4), 4))
    guided = ClassifierFree(denoiser, 2.0, null={"label": 10, "image": 0.0})
    expected = sample(guided, x.shape, Adams(), nfe=3, seed=seeds(4), cond={"label": labels, "image": image}).x
    torch.testing.assert_close(found("a.npz"), expected, rtol=1e-4, atol=1e-4)
    assert run("restore", path, "--input", "digits", "--operator", "down:2", "--out", "b.npz", *CPU) == 2


def test_what_a_network_is_told_of_an_item_is_told_to_its_likelihood_and_variance(runs, here):
    path = trained(runs / "told", "--classes", "--condition", "super-resolution:2", "--set", "data.limit=20",
                   "--set", "train.warmup=0", "--set", "train.lr=0.02")  # so that the condition matters  # fmt: skip
    denoiser, (levels, labels), (x, _) = scoresde.load(path), digit_levels(), digits()
    image = scoresde.data.SuperResolution(2)(x, scoresde.data.Shown(torch.arange(len(x)), len(x)))
    cond = {"label": labels, "image": image}
    options = ["--data", "digits", "--limit", 5, "--out"]
    assert run("likelihood", path, "--steps", 4, "--batch", 3, "--bound", "--draws", 16, *options, "a.json", *CPU) == 0
    result = json.loads(Path("a.json").read_text())
    edges = scoresde.likelihood.outer_edges(-1.0, 1.0, 17)
    first = {name: value[:5] for name, value in cond.items()}
    expected = scoresde.bits_per_dim(
        denoiser, levels[:5], 17, steps=4, seed=seeds_of(0, 5), data_range=edges, cond=first
    )
    torch.testing.assert_close(torch.tensor(result["each"]), expected.per_image.float(), rtol=1e-4, atol=1e-4)
    shuffled = {"label": labels[:5], "image": image[:5].flip(0)}
    other = scoresde.bits_per_dim(
        denoiser, levels[:5], 17, steps=4, seed=seeds_of(0, 5), data_range=edges, cond=shuffled
    )
    assert (expected.per_image - other.per_image).abs().max() > 2e-3
    assert run("variance", path, "--samples", 8, "--times", 4, "--data", "digits", "--out", "t.npz", *CPU) == 0
    table = VarianceTable.load("t.npz")
    again = estimate(denoiser, x, table.t, samples=8, seed=0, cond=cond)
    torch.testing.assert_close(table.eps_square, again.eps_square, rtol=1e-4, atol=1e-6)
    # Without --data: the 20 items of the run, as it was told of them.
    assert run("likelihood", path, "--steps", 4, "--batch", 20, "--out", "own.json", *CPU) == 0
    own = json.loads(Path("own.json").read_text())["each"]
    assert len(own) == 20
    torch.testing.assert_close(torch.tensor(own[:5]), expected.per_image.float(), rtol=1e-4, atol=1e-4)


def test_conditions_that_were_given_are_known_of_their_own_items_alone(runs, here, capsys):
    np.save("told.npy", torch.randn(1797, 3, generator=torch.Generator().manual_seed(0)).numpy())
    path = trained(runs / "given", "--condition", f"given:{here / 'told.npy'}")
    assert run("likelihood", path, "--steps", 4, "--limit", 5, "--out", "a.json", *CPU) == 0
    np.save("other.npy", torch.zeros(9, 1, 8, 8, dtype=torch.uint8).numpy())
    for command, out in (("likelihood", "b.json"), ("variance", "b.npz")):
        assert run(command, path, "--data", "other.npy", "--out", out, *CPU) == 2
        assert "known of digits alone" in capsys.readouterr().err


def test_a_race_knows_its_guidance(guided_run, here, capsys):
    options = ["compare", guided_run, "--solvers", "ddim", "--nfe", 2, "--n", 12, "--limit", 20, "--out", "race", *CPU]
    assert run(*options, "--guidance", 2) == 0
    assert run(*options, "--guidance", 3) == 2
    assert run(*options, "--guidance", 2, "--guidance-rule", "cfg-zero") == 2
    assert "holds cells of another run: guidance:" in capsys.readouterr().err
    assert run("evaluate", guided_run, "--guidance", 2, "--n", 12, "--nfe", 2, "--limit", 20, "--out", "a.json",
               "--metrics", "frechet", *CPU) == 0  # fmt: skip
    assert "ClassifierFree(" in Path("a.json").read_text()


def test_guidance_that_cannot_be_is_status_2(guided_run, classes_run, plain_run, here, capsys):
    for path, arguments, words in (
        (classes_run, ["--guidance", 2], "`scoresde train --drop 0.1`"),
        (plain_run, ["--guidance", 2], "no classes and no condition"),
        (guided_run, ["--guidance", "nan"], "--guidance nan: expected a finite number"),
        (guided_run, ["--guidance", 2, "--class", 10], "there are 10, 0 to 9"),
        (guided_run, ["--guidance-interval", 0, 1], "give that, too"),
        (guided_run, ["--guidance-rule", "cfg-zero"], "give that, too"),
        (guided_run, ["--guidance", 2, "--guidance-interval", 1, 0], "--guidance-interval (1.0, 0.0)"),
        (guided_run, ["--guidance", 2, "--variance", __file__], "without --guidance"),
    ):
        assert run("sample", path, *arguments, "--nfe", 2, "--out", "a.npz", *CPU) == 2
        out, err = capsys.readouterr()
        assert (out, words in err, "Traceback" in err) == ("", True, False), err
    assert list(here.iterdir()) == []


@pytest.fixture(scope="module")
def guide(runs):
    """A classifier of noisy digits, hardly trained, and its file."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = NoisyClassifier(10, channels=8)
    path = runs / "guide.safetensors"
    TrainedClassifier.of(net, scoresde.VPSDE(), (1, 8, 8), time_scale=999.0).save(path)
    return path


@pytest.mark.parametrize("kind", ["plain", "guided"])
def test_guidance_by_a_classifier_is_the_librarys(kind, request, guide, here):
    """A model without classes has the classifier's; one with classes is told them; --guidance is inside."""
    path, classes = request.getfixturevalue(f"{kind}_run"), kind == "guided"
    options = ["sample", path, "--n", 5, "--nfe", 3, "--class", 3, "--float", "--classifier", guide, *CPU]
    assert run(*options, "--classifier-scale", 4, "--out", "a.npz") == 0
    net, model = TrainedClassifier.load(guide), scoresde.load(path)
    cond = {"label": torch.full((5,), 3)}

    def drawn(denoiser, scale, around=lambda guided: guided):
        guided = Classifier(denoiser, net.net, scale, time=lambda t: 999.0 * t, conditional=classes)
        return sample(around(guided), (5, 1, 8, 8), Adams(), nfe=3, seed=seeds(5), cond=cond).x

    torch.testing.assert_close(found("a.npz"), drawn(model, 4.0), rtol=1e-5, atol=1e-5)
    assert found("a.npz", "labels").tolist() == [3] * 5
    assert (drawn(model, 4.0) - drawn(model, 0.0)).abs().max() > 1e-3
    if classes:
        assert run(*options, "--guidance", 2, "--clip", "--out", "b.npz") == 0
        expected = drawn(ClassifierFree(model, 2.0), 1.0, scoresde.Clip)
        torch.testing.assert_close(found("b.npz"), expected, rtol=1e-5, atol=1e-5)
    else:
        own = ["--input", "digits", "--limit", 1, "--nfe", 2, "--class", 3, "--classifier", guide, *CPU, "--out"]
        assert run("restore", path, "--operator", "down:2", "--method", "ddnm", "--n", 2, *own, "c.npz") == 0
        assert run("edit", path, *own, "d.npz") == 0
        assert run("edit", path, "--encode", "--to-class", 3, *own, "e.npz") == 2
        assert found("c.npz", "labels").tolist() == [3, 3]


def test_a_race_knows_its_classifier(plain_run, guide, here, capsys):
    options = ["compare", plain_run, "--solvers", "ddim", "--nfe", 2, "--n", 12, "--limit", 20, "--out", "race", *CPU,
               "--classifier", guide, "--metrics", "spatial_frechet", "entropy_score"]  # fmt: skip
    assert run(*options) == 0
    assert run(*options, "--classifier-scale", 3) == 2
    assert "holds cells of another run: scale of the classifier:" in capsys.readouterr().err
    assert run("evaluate", plain_run, "--n", 12, "--nfe", 2, "--limit", 20, "--out", "a.json", "--class", 3,
               "--classifier", guide, "--metrics", "entropy_score", *CPU) == 0  # fmt: skip
    about = json.loads(Path("a.json").read_text())
    assert 1 <= about["scores"]["entropy_score"]["value"] <= 10
    assert about["samples from"]["classifier"] == TrainedClassifier.load(guide).digest
    assert run("evaluate", plain_run, "--metrics", "entropy_score", "--features", "random", *CPU) == 2
    assert "entropy_score needs features with `logits`" in capsys.readouterr().err


def test_a_classifier_that_cannot_guide_is_status_2(plain_run, classes_run, guide, here, capsys):
    net = TrainedClassifier.load(guide).net
    few = NoisyClassifier(3, channels=8)
    for name, made in {
        "sde": TrainedClassifier.of(net, scoresde.VPSDE(beta_max=10.0), (1, 8, 8)),
        "shape": TrainedClassifier.of(net, scoresde.VPSDE(), (1, 28, 28)),
        "few": TrainedClassifier.of(few, scoresde.VPSDE(), (1, 8, 8)),
    }.items():
        made.save(f"{name}.safetensors")
    content = guide.read_bytes()
    Path("cut.safetensors").write_bytes(content[: len(content) // 2])
    Path("changed.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    np.savez("other.npz", x=np.zeros(3))
    before = set(here.iterdir())
    for path, arguments, words in (
        (plain_run, ["--classifier", "sde.safetensors"], "made for another SDE: VPSDE, alpha"),
        (
            plain_run,
            ["--classifier", "shape.safetensors"],
            "another item: (1, 28, 28), and the denoiser's is (1, 8, 8)",
        ),
        (classes_run, ["--classifier", "few.safetensors"], "another number of classes: 3, and the denoiser's is 10"),
        (plain_run, ["--classifier", "few.safetensors", "--class", 3], "there are 3, 0 to 2"),
        (plain_run, ["--classifier", "cut.safetensors"], "cut.safetensors cannot be read as a classifier"),
        (plain_run, ["--classifier", "changed.safetensors"], "its weights are not those that were saved"),
        (plain_run, ["--classifier", "other.npz"], "other.npz cannot be read as a classifier of noisy data"),
        (plain_run, ["--classifier", "none.safetensors"], "there is no such file"),
        (plain_run, ["--classifier-scale", 2], "--classifier-scale is the scale of --classifier FILE"),
        (plain_run, ["--classifier", guide, "--classifier-scale", "nan"], "scale=nan"),
        (plain_run, ["--classifier", guide, "--variance", __file__], "without --classifier"),
        (plain_run, ["--classifier", guide, "--guidance", 2], "no classes and no condition"),
    ):
        assert run("sample", path, *arguments, "--nfe", 2, "--out", "a.npz", *CPU) == 2
        out, err = capsys.readouterr()
        assert (out, words in err, "Traceback" in err) == ("", True, False), err
    assert set(here.iterdir()) == before


# --- restoring -------------------------------------------------------------------------------------------------------

WORDS = {
    "mask": "mask:mask.png",
    "box": "box:2,3,4,2",
    "random": "random:0.3",
    "blur": "blur:0.7",
    "down": "down:2",
    "fourier": "fourier:0.5",
    "quantise": "quantise:10",
}


@pytest.fixture
def mask(here):
    known = torch.zeros(8, 8, dtype=torch.uint8)
    known[:4] = 255
    Image.fromarray(known.numpy()).save("mask.png")
    return known > 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", WORDS)
def test_every_operator_with_every_method(name, method, plain_run, mask, capsys):
    A = operator_of(WORDS[name], (1, 8, 8))
    how = ["--nfe", 4, "--limit", 2, "--n", 2, "--input", "digits", "--operator", WORDS[name], "--method", method]
    if not isinstance(A, LinearOperator) and method in ("ddnm", "replacement", "repaint"):
        assert run("restore", plain_run, *how, "--out", "a.npz", *CPU) == 2
        assert "needs a LinearOperator" in capsys.readouterr().err
        return
    assert run("restore", plain_run, *how, "--out", "a.npz", "--float", *CPU) == 0
    x, truth = found("a.npz"), digits()[0][:2]
    assert x.shape == (4, 1, 8, 8)
    assert torch.equal(found("a.npz", "images"), to_levels(x))
    assert torch.equal(found("a.npz", "truth"), to_levels(truth))
    y = found("a.npz", "measurement")
    torch.testing.assert_close(y, A(truth))
    out = capsys.readouterr().out
    residual = float(re.search(r"residual of the measurement (\S+) rms", out)[1])
    if isinstance(A, Mask):
        apart = (x - truth.repeat_interleave(2, 0))[A.mask.expand(4, 1, 8, 8)]
        assert residual == pytest.approx(float(apart.square().reshape(4, -1).mean(1).sqrt().mean()), rel=1e-2, abs=1e-6)
        if method in ("ddnm", "replacement", "repaint"):
            assert not apart.any()  # known pixels are kept
        assert not torch.equal(x[0], x[1])
    psnr = float(re.search(r"PSNR (\S+) dB", out)[1])
    mse = (x.clamp(-1, 1) - truth.repeat_interleave(2, 0)).square().reshape(4, -1).mean(1)
    assert psnr == pytest.approx(float((10 * (4 / mse).log10()).mean()), abs=0.01)


def test_pigdm_by_default_is_the_librarys_in_any_batch(plain_run, here):
    options = ["restore", plain_run, "--input", "digits", "--limit", 3, "--operator", "down:2", "--noise-std", 0.1,
               "--nfe", 4, "--n", 2, "--seed", 5, "--scale", 0.5, "--float", *CPU]  # fmt: skip
    assert run(*options, "--out", "a.npz") == 0
    y = found("a.npz", "measurement")
    noise = (y - Downsample(2)(digits()[0][:3])) / 0.1
    assert 0.6 < float(noise.square().mean()) < 1.5  # 48 numbers: within 5 sigma of one
    guided = Clip(PiGDM(scoresde.load(plain_run), Downsample(2), y.repeat_interleave(2, 0), 0.1, scale=0.5))
    expected = sample(guided, (6, 1, 8, 8), DDPM(), nfe=4, seed=seeds(6, 5)).x
    torch.testing.assert_close(found("a.npz"), expected, rtol=1e-4, atol=1e-4)
    assert run(*options, "--batch-size", 1, "--out", "b.npz") == 0
    torch.testing.assert_close(found("b.npz"), expected, rtol=1e-4, atol=1e-4)
    assert run(*options, "--seed", 6, "--out", "c.npz") == 0  # other samples of the same measurement
    assert torch.equal(found("c.npz", "measurement"), y)
    assert not torch.equal(found("c.npz"), found("a.npz"))


def test_what_is_measured_already(plain_run, mask):
    levels = to_levels(digits()[0][:2])
    holes = torch.where(mask, levels, torch.tensor(200, dtype=torch.uint8))  # what is there is not looked at
    np.savez("holes.npz", images=holes.numpy())
    small = to_levels(Downsample(2)(digits()[0][:2]))
    Path("small").mkdir()
    for i, image in enumerate(small):
        Image.fromarray(image[0].numpy()).save(f"small/{i}.png")
    common = ["restore", plain_run, "--measured", "--nfe", 3, *CPU]
    assert run(*common, "--input", "holes.npz", "--operator", "mask:mask.png", "--method", "ddnm", "--n", 3, "--out",
               "a.npz") == 0  # fmt: skip
    with np.load("a.npz") as arrays:
        assert set(arrays) == {"images", "measurement"}
        images = torch.from_numpy(arrays["images"])
        assert torch.equal(images[:, 0, :4], levels.repeat_interleave(3, 0)[:, 0, :4])
        assert not arrays["measurement"][:, :, 4:].any()
    assert run(*common, "--input", "small", "--operator", "down:2", "--n", 3, "--out", "b.png") == 0
    with Image.open("b.png") as picture:
        assert picture.size == (4 * 34 + 2, 2 * 34 + 2)  # measurement and samples of each
        page = torch.from_numpy(np.array(picture))
    assert torch.equal(page[2:34, 2:34], small[0, 0].repeat_interleave(8, 0).repeat_interleave(8, 1))
    assert run(*common, "--input", "small", "--operator", "down:2", "--n", 1, "--out", "c") == 0
    assert [path.name for path in sorted(Path("c").iterdir())] == ["000000.png", "000001.png"]
    assert run(*common, "--input", "small", "--operator", "blur:1", "--out", "d") == 0  # made to fit
    np.save("floats.npy", np.zeros((2, 1, 3, 3), np.float32))
    assert run(*common, "--input", "floats.npy", "--operator", "down:2", "--out", "e.npz") == 2


def test_a_folder_has_a_mask_for_each(plain_run, here, capsys):
    """Each image is known where its own mask is white, whatever batch it falls in; as many masks as images."""
    truth = to_levels(digits()[0][:3])
    known = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(1)) < 0.5
    Path("masks").mkdir()
    for i, white in enumerate(known):
        Image.fromarray((255 * white.to(torch.uint8)).numpy()).save(f"masks/{i}.png")
    how = ["restore", plain_run, "--input", "digits", "--operator", "mask:masks", "--nfe", 3, "--n", 2]
    how += ["--batch-size", 4, *CPU]
    for method in ("ddnm", "replacement"):
        assert run(*how, "--limit", 3, "--method", method, "--out", "a.npz") == 0
        images = found("a.npz", "images").unflatten(0, (3, 2))
        where = known[:, None, None].expand(3, 2, 1, 8, 8)
        assert torch.equal(images[where], truth[:, None].expand(3, 2, 1, 8, 8)[where])
    assert run(*how, "--limit", 2, "--out", "b.npz") == 2
    assert "--operator mask:masks has 3 masks for 2 inputs" in capsys.readouterr().err


def test_rounding_is_noise(plain_run, here, capsys):
    """Of whole levels pigdm and mmps do not take less noise than rounding made; of other numbers what they are told."""
    blurred = Blur(0.7)(digits()[0][:2])
    np.savez("levels.npz", images=to_levels(blurred).numpy())
    np.savez("floats.npz", x=blurred.numpy())
    own = 2 / 255 / 12**0.5
    for name, method, told, std in (
        ("levels", "pigdm", 0, own),
        ("levels", "mmps", 0.001, own),
        ("levels", "pigdm", 0.1, 0.1),
        ("levels", "ddnm", 0, 0),
        ("floats", "pigdm", 0, 0),
    ):
        options = ["--measured", "--input", f"{name}.npz", "--operator", "blur:0.7", "--method", method]
        assert run("restore", plain_run, *options, "--noise-std", told, "--nfe", 2, "--n", 1, "--float", "--out",
                   "a.npz", *CPU) == 0  # fmt: skip
        assert f"noise {std:g}, {method}" in capsys.readouterr().out
    y = found("a.npz", "measurement")
    guided = Clip(PiGDM(scoresde.load(plain_run), Blur(0.7), y, 0.0))
    expected = sample(guided, (2, 1, 8, 8), DDPM(), nfe=2, seed=seeds(2)).x
    torch.testing.assert_close(found("a.npz"), expected, rtol=1e-4, atol=1e-4)


def test_noise_where_a_transform_tells_nothing_is_left_out(plain_run, here, capsys):
    """Neither is it in the measurement, nor counted in its residual."""
    A = operator_of("fourier:0.5", (1, 8, 8))
    assert run("restore", plain_run, "--input", "digits", "--limit", 2, "--n", 1, "--operator", "fourier:0.5",
               "--noise-std", 0.5, "--nfe", 2, "--float", "--out", "a.npz", *CPU) == 0  # fmt: skip
    x, y = found("a.npz"), found("a.npz", "measurement")
    read = A.matrix((1, 8, 8)).abs().amax(1).reshape(1, 8, 8, 2) > 1e-12
    assert bool((y[:, read] != 0).all())
    assert not bool(y[:, ~read].any())
    apart = (A(x) - y)[:, read].square().mean(1).sqrt().mean()
    residual = float(re.search(r"residual of the measurement (\S+) rms", capsys.readouterr().out)[1])
    assert residual == pytest.approx(float(apart), rel=1e-2)


def test_a_picture_has_truth_measurement_and_samples(plain_run, here):
    options = ["restore", plain_run, "--input", "digits", "--limit", 3, "--operator", "box:2,2,4,4", "--nfe", 3, *CPU]
    assert run(*options, "--out", "a.png") == 0
    with Image.open("a.png") as picture:
        assert picture.size == (6 * 34 + 2, 3 * 34 + 2)
        page = torch.from_numpy(np.array(picture))
    cells = [page[2 + 34 : 34 + 34, 2 + 34 * k : 34 + 34 * k][::4, ::4] for k in range(2)]
    truth = to_levels(digits()[0][1, 0])
    assert torch.equal(cells[0], truth)
    assert torch.equal(cells[1][:2], truth[:2])
    assert bool((cells[1][2:6, 2:6] == 128).all())


def test_colours_from_grey(here):
    Path("colours.py").write_text(
        "import torch\nfrom scoresde import VPSDE\nfrom scoresde.exact import Gaussian\n"
        "denoiser = Gaussian(mean=torch.zeros(3, 4, 4), std=0.5).denoiser(VPSDE())\n"
    )
    x = torch.linspace(-0.5, 0.5, 96).reshape(2, 3, 4, 4)
    np.save("x.npy", x.numpy())
    options = ["restore", "--denoiser", "colours:denoiser", "--shape", 3, 4, 4, "--input", "x.npy",
               "--operator", "grey", "--method", "ddnm", "--n", 2, "--nfe", 4, "--quiet"]  # fmt: skip
    assert run(*options, "--out", "a.npz", "--float") == 0
    y = torch.einsum("c,bchw->bhw", torch.tensor([0.299, 0.587, 0.114]), x)[:, None]
    torch.testing.assert_close(found("a.npz", "measurement"), y)
    grey = torch.einsum("c,bchw->bhw", torch.tensor([0.299, 0.587, 0.114]), found("a.npz"))[:, None]
    torch.testing.assert_close(grey, y.repeat_interleave(2, 0))
    assert run(*options, "--out", "a.png") == 0
    with Image.open("a.png") as picture:
        page = torch.from_numpy(np.array(picture)).movedim(-1, 0)
    assert torch.equal(page[:, 2:34, 36:68][:, ::8, ::8], to_levels(y[0].expand(3, 4, 4)))


def test_classes(guided_run, classes_run, here, capsys):
    options = ["--input", "digits", "--limit", 2, "--n", 1, "--operator", "down:2", "--nfe", 2, "--float", *CPU]
    assert run("restore", guided_run, *options, "--out", "a.npz") == 0
    with np.load("a.npz") as arrays:
        assert "labels" not in arrays
        y = torch.from_numpy(arrays["measurement"])
        null = {"label": torch.full((2,), 10)}
        guided = Clip(PiGDM(scoresde.load(guided_run), Downsample(2), y, 0.0))
        expected = sample(guided, (2, 1, 8, 8), DDPM(), nfe=2, seed=seeds(2), cond=null).x
        torch.testing.assert_close(torch.from_numpy(arrays["x"]), expected, rtol=1e-4, atol=1e-4)
    assert run("restore", classes_run, *options, "--out", "b.npz") == 2
    assert "say which, --class K" in capsys.readouterr().err
    assert run("restore", classes_run, *options, "--class", 3, "--out", "c.npz") == 0
    assert found("c.npz", "labels").tolist() == [3, 3]
    assert run("restore", guided_run, *options, "--class", 3, "--guidance", 2, "--out", "d.npz") == 0


def test_any_denoiser_and_the_exact_posterior(here, capsys):
    """On Gaussian data PiGDM is exact: numbers are independent, and half of them measured with noise of their size."""
    Path("a_gaussian.py").write_text(
        "from scoresde import VPSDE\nfrom scoresde.exact import Gaussian\n"
        "denoiser = Gaussian(mean=[0.0] * 4, std=1.0).denoiser(VPSDE())\n"
    )
    np.save("truth.npy", np.array([[1.0, -2.0, 0.5, 0.0]], np.float32))
    n = 2000
    assert run("restore", "--denoiser", "a_gaussian:denoiser", "--shape", 4, "--input", "truth.npy", "--operator",
               "random:0.5", "--noise-std", 1, "--solver", "ddpm", "--nfe", 100, "--n", n, "--batch-size", n, "--out",
               "a.npz", "--quiet") == 0  # fmt: skip
    A = operator_of("random:0.5", (4,))
    x, y = found("a.npz"), found("a.npz", "measurement")
    var = torch.where(A.mask, 0.5, 1.0)
    assert ((x.mean(0) - y[0] / 2).abs() < 5 * (var / n).sqrt() + 0.01).all()
    assert ((x.var(0) / var - 1).abs() < 5 * (2 / n) ** 0.5 + 0.02).all()
    assert "rms error" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--operator", "blurr"],
            "--operator 'blurr': expected blur:1.5, or one of mask:FILE.png or mask:FOLDER, box:TOP",
        ),
        (["--operator", "blur"], "--operator 'blur': could not convert string to float: '' (as in blur:1.5)"),
        (["--operator", "blur:-1"], "(as in blur:1.5)"),
        (["--operator", "mask:none.png"], "none.png: there is no such file"),
        (["--operator", "mask:broken.png"], "broken.png cannot be read as an image"),
        (["--operator", "box:1,2,3"], "3 numbers for items (1, 8, 8)"),
        (["--operator", "box:6,6,4,4"], "expected 0 <= low < high <= (8, 8)"),
        (["--operator", "random:1.5"], "expected a share in (0, 1]"),
        (["--operator", "grey"], "expected (B, 3, ...)"),
        (["--operator", "grey:1"], "it takes no argument"),
        (["--operator", "down:3"], "--operator 'down:3': "),
        (["--operator", "down:2:nearest"], "expected area or bicubic, not nearest"),
        (["--operator", "fourier:0"], "expected a share in (0, 1]"),
        (["--operator", "quantise:0"], "expected a quality from 1 to 100"),
        (["--noise-std", "-1"], "--noise-std -1: expected a number >= 0"),
        (["--n", "0"], "--n 0"),
        (["--limit", "0"], "--limit 0"),
        (["--input", "none"], "none: no such file or folder"),
        (["--scale", "2", "--method", "ddnm"], "--scale is of pigdm, mmps, dps"),
        (["--variance", __file__], "--variance goes with --method replacement"),
        (["--class", "3"], "the model has no classes"),
        (["--method", "replacement", "--noise-std", "0.1", "--operator", "blur:1"], "one singular value"),
        (["--method", "replacement", "--solver", "ode-dopri5"], "has no table"),
        (["--method", "repaint", "--solver", "unipc3"], "repeats single steps, ddpm or ddim say"),
        (["--out", "a.jpg"], "expected a file .png or .npz"),
        (["--nfe", "3", "--steps", "3"], "give one of --nfe and --steps"),
    ],
)
def test_wrong_arguments_are_status_2(arguments, words, plain_run, here, capsys):
    Path("broken.png").write_bytes(b"\x89PNG\r\n\x1a\n no more")
    before = set(here.iterdir())
    defaults = {"--input": "digits", "--operator": "down:2", "--nfe": "3", "--out": "a.npz", "--limit": "2"}
    options = [word for name, value in defaults.items() if name not in arguments for word in (name, value)]
    assert run("restore", plain_run, *options, *arguments, "--device", "cpu") == 2
    out, err = capsys.readouterr()
    assert (out, words in err, "Traceback" in err) == ("", True, False), err
    assert set(here.iterdir()) == before


def test_grids_count_what_repaint_evaluates(plain_run, here, capsys):
    options = ["--input", "digits", "--limit", 1, "--n", 1, "--operator", "down:2", "--method", "repaint", *CPU]
    calls, made = [], Recipe.__call__

    def noted(recipe, items):
        calls.append(recipe.solver.evaluations(recipe.options["grid"]))
        return made(recipe, items)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recipe, "__call__", noted)
        assert run("restore", plain_run, *options, "--nfe", 33, "--grid", "uniform", "--out", "a.npz") == 0
    assert calls == [30]  # 10 steps, the first 5 of them made 5 times


def test_columns_of_a_transform():
    A = operator_of("fourier:0.5", (3, 6, 8))
    assert isinstance(A, FourierSampling)
    assert A.mask.shape == (6, 8)
    assert A.mask[0].equal(A.mask[-1])
    assert int(A.mask[0].sum()) == 4
    assert bool(A.mask[0, 0])
    assert int(operator_of("fourier:0.01", (8,)).mask.sum()) == 1
    assert operator_of("grey", (3, 4, 4))(torch.ones(1, 3, 4, 4)).flatten().tolist() == pytest.approx([1.0] * 16)


def test_what_was_finished_is_kept(plain_run, here, capsys, monkeypatch):
    made = Recipe.__call__

    def interrupted(recipe, items):
        if items.start == 4:
            os.kill(os.getpid(), numbers.pop())
        return made(recipe, items)

    options = ["restore", plain_run, "--input", "digits", "--limit", 3, "--n", 3, "--batch-size", 2, "--nfe", 2,
               "--operator", "down:2", "--device", "cpu", "--out"]  # fmt: skip
    assert run(*options, "whole.npz") == 0
    monkeypatch.setattr(Recipe, "__call__", interrupted)
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGINT]
    for status, name in ((130, "a.npz"), (130, "a.png"), (143, "b.npz")):
        assert run(*options, name) == status
        assert f"4 of 9 samples are in {name}" in capsys.readouterr().err
    assert torch.equal(found("a.npz", "images"), found("whole.npz", "images")[:4])
    with Image.open("a.png") as picture:
        assert picture.size == (5 * 34 + 2, 2 * 34 + 2)


def test_samples_that_are_not_finite_are_status_1(here, capsys):
    Path("bad_model.py").write_text(
        "import torch\nfrom scoresde import VPSDE, EpsDenoiser\n"
        "denoiser = EpsDenoiser(lambda x, t: torch.where(x > 2.0, float('nan'), x), VPSDE())\n"
    )
    np.save("x.npy", np.zeros((2, 50), np.float32))
    assert run("restore", "--denoiser", "bad_model:denoiser", "--shape", 50, "--input", "x.npy", "--operator",
               "random:0.5", "--nfe", 3, "--out", "a.npz", "--quiet") == 1  # fmt: skip
    assert "became non-finite" in capsys.readouterr().err
