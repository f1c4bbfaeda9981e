"""`scoresde edit`, in small: its results are the library's, in any batch, of files and folders; what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import scoresde
from scoresde.cli import main
from scoresde.data import digit_levels, scaled
from scoresde.editing import edit, interpolation, interpolation_grid, sdedit, variations
from scoresde.guidance.classifier_free import ClassifierFree
from scoresde.levels import to_levels
from scoresde.noise import derive_seed
from scoresde.solvers import DDIM, DDPM, Adams

Image = pytest.importorskip("PIL.Image")


def run(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """The run folder of a small network on digits, conditional on their classes."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    small = ["channels=8", "multipliers=[1]", "blocks=1", "attention=[]"]
    words = [
        "train", "--data", "digits", "--classes", "--batch-size", "8", "--device", "cpu", "--quiet", "--steps", "2",
        *(word for option in small for word in ("--set", f"model.options.{option}")),
        "--set", "data.limit=64", "--set", "data.drop=0.1", "--set", "train.checkpoint_every=2",
    ]  # fmt: skip
    assert run(*words, "--out", out) == 0
    return out


@pytest.fixture(scope="module")
def moons_run(tmp_path_factory):
    """Of a small network in the plane, without classes."""
    out = tmp_path_factory.mktemp("runs") / "moons"
    words = ["train", "--data", "two-moons:100", "--batch-size", "8", "--device", "cpu", "--quiet", "--steps", "2",
             "--set", "model.options={width = 16, depth = 1}"]  # fmt: skip
    assert run(*words, "--out", out) == 0
    return out


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def inputs(here):
    """Six digits as an array, a folder, and the first as a file of other size and mode; float, (6, 1, 8, 8)."""
    levels = (digit_levels()[0][:6].int() * 255 // 16).to(torch.uint8)
    np.savez("six.npz", images=levels.numpy(), labels=digit_levels()[1][:6].numpy())
    for i, image in enumerate(levels):
        Path("six").mkdir(exist_ok=True)
        Image.fromarray(image[0].numpy()).save(f"six/{i}.png")
    wide = Image.new("RGB", (12, 8), "red")  # of which the middle is taken
    wide.paste(Image.fromarray(levels[0, 0].numpy()), (2, 0))
    wide.save("one.png")
    return scaled(levels)


def cond(k, n):
    return {"label": torch.full((n,), k)}


def seeds(seed, n):
    return [derive_seed(seed, i) for i in range(n)]


def found(path):
    return torch.from_numpy(np.load(path)["x"])


CPU = ("--device", "cpu", "--quiet", "--float")


def test_sdedit_is_the_librarys_in_any_batch(digits_run, inputs, capsys):
    denoiser = scoresde.load(digits_run)
    expected = sdedit(denoiser, inputs, DDPM(), strength=0.4, steps=6, seed=seeds(5, 6), cond=cond(3, 6)).x
    options = ["--strength", 0.4, "--solver", "ddpm", "--steps", 6, "--seed", 5, "--to-class", 3, *CPU]
    for i, (source, batch) in enumerate([("six.npz", 64), ("six", 4), ("six.npz", 1)]):
        assert run("edit", digits_run, "--input", source, "--batch-size", batch, "--out", f"{i}.npz", *options) == 0
        torch.testing.assert_close(found(f"{i}.npz"), expected, rtol=1e-5, atol=1e-5)
    assert "6 images, strength 0.4 by noise, DDPM" in capsys.readouterr().out
    with np.load("0.npz") as arrays:
        assert arrays["labels"].tolist() == [3] * 6
        assert np.array_equal(arrays["images"], to_levels(found("0.npz")).numpy())
    assert run("edit", digits_run, "--input", "six.npz", "--limit", 2, "--out", "two.npz", *options) == 0
    torch.testing.assert_close(found("two.npz"), expected[:2], rtol=1e-5, atol=1e-5)


def test_files_in_and_out(digits_run, inputs, here):
    options = ["--strength", 1e-6, "--nfe", 3, "--class", 1, "--device", "cpu", "--quiet"]  # hardly an edit
    assert run("edit", digits_run, "--input", "one.png", "--out", "a.npz", *options) == 0
    assert np.abs(np.load("a.npz")["images"][0].astype(int) - to_levels(inputs[0]).numpy().astype(int)).max() <= 6
    assert run("edit", digits_run, "--input", "six", "--out", "b", *options) == 0
    assert [path.name for path in sorted((here / "b").iterdir())] == [f"{i:06d}.png" for i in range(6)]
    with Image.open("b/000003.png") as picture:
        assert np.abs(np.array(picture).astype(int) - to_levels(inputs[3, 0]).numpy().astype(int)).max() <= 6
    assert run("edit", digits_run, "--input", "six", "--out", "c.png", "--beside", *options) == 0
    with Image.open("c.png") as picture:
        assert picture.size == (4 * 34 + 2, 3 * 34 + 2)  # two pairs in each of three rows
    assert run("edit", digits_run, "--input", "digits", "--limit", 3, "--out", "d.npz", *options) == 0
    expected = to_levels(scaled(digit_levels()[0][:3], 17)).numpy().astype(int)
    assert np.abs(np.load("d.npz")["images"].astype(int) - expected).max() <= 6


def test_white_pixels_are_kept(digits_run, inputs):
    mask = torch.zeros(8, 8, dtype=torch.uint8)
    mask[:4] = 255
    Image.fromarray(mask.numpy()).save("mask.png")
    options = ["--strength", 0.9, "--nfe", 4, "--class", 1, *CPU]
    assert run("edit", digits_run, "--input", "six.npz", "--keep", "mask.png", "--out", "a.npz", *options) == 0
    x = found("a.npz")
    assert torch.equal(x[:, :, :4], inputs[:, :, :4])
    assert not torch.equal(x[:, :, 4:], inputs[:, :, 4:])


def test_a_folder_has_a_mask_for_each_input(digits_run, inputs, capsys):
    known = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    Path("masks").mkdir()
    for i, white in enumerate(known):
        Image.fromarray((255 * white[0].to(torch.uint8)).numpy()).save(f"masks/{i}.png")
    options = ["--keep", "masks", "--strength", 0.9, "--nfe", 4, "--class", 1, "--batch-size", 4, *CPU]
    assert run("edit", digits_run, "--input", "six.npz", "--out", "a.npz", *options) == 0
    x = found("a.npz")
    assert torch.equal(x[known], inputs[known])
    assert not torch.equal(x, inputs)
    assert run("edit", digits_run, "--input", "six.npz", "--limit", 2, "--out", "b.npz", *options) == 2
    assert "--keep masks has 6 images for 2 inputs" in capsys.readouterr().err


def test_encoding_goes_from_class_to_class(digits_run, inputs):
    denoiser = scoresde.load(digits_run)
    options = ["--encode", "--solver", "ddim", "--steps", 4, *CPU]
    assert run("edit", digits_run, "--input", "six.npz", "--from-class", 3, "--to-class", 8, "--out", "a.npz", *options,
               "--batch-size", 4) == 0  # fmt: skip
    expected = edit(denoiser, inputs, DDIM(), cond_from=cond(3, 6), cond_to=cond(8, 6), steps=4).x
    torch.testing.assert_close(found("a.npz"), expected, rtol=1e-4, atol=1e-4)
    # Without --from-class, by the labels that the data have.
    own = {"label": digit_levels()[1][:6]}
    expected = edit(denoiser, inputs, DDIM(), cond_from=own, cond_to=cond(8, 6), strength=0.5, steps=4).x
    assert run("edit", digits_run, "--input", "six.npz", "--to-class", 8, "--strength", 0.5, "--out", "b.npz",
               *options) == 0  # fmt: skip
    torch.testing.assert_close(found("b.npz"), expected, rtol=1e-4, atol=1e-4)
    # Without --to-class back to where it came from.
    assert run("edit", digits_run, "--input", "six.npz", "--from-class", 3, "--out", "c.npz", *options) == 0
    expected = edit(denoiser, inputs, DDIM(), cond_from=cond(3, 6), cond_to=cond(3, 6), steps=4).x
    torch.testing.assert_close(found("c.npz"), expected, rtol=1e-4, atol=1e-4)


def test_guidance_is_on_the_way_back(digits_run, inputs):
    denoiser = scoresde.load(digits_run)
    guided = ClassifierFree(denoiser, 2.0, null={"label": 10})
    options = ["--solver", "ddim", "--steps", 4, "--class", 8, "--guidance", 2, *CPU]
    assert run("edit", digits_run, "--input", "six.npz", "--strength", 0.5, "--out", "a.npz", *options) == 0
    expected = sdedit(guided, inputs, DDIM(), strength=0.5, steps=4, seed=seeds(0, 6), cond=cond(8, 6)).x
    torch.testing.assert_close(found("a.npz"), expected, rtol=1e-4, atol=1e-4)
    assert run("edit", digits_run, "--input", "six.npz", "--encode", "--from-class", 3, "--out", "b.npz", *options) == 0
    expected = edit(denoiser, inputs, DDIM(), cond_from=cond(3, 6), to=guided, cond_to=cond(8, 6), steps=4).x
    torch.testing.assert_close(found("b.npz"), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("encode", [False, True])
def test_variations_of_each_input_in_turn(digits_run, inputs, encode):
    options = ["--encode", "--from-class", 2] if encode else []
    options += ["--variations", 3, "--strength", 0.4, "--solver", "ddim", "--steps", 4, "--class", 2, *CPU]
    expected = variations(
        scoresde.load(digits_run), inputs, 3, DDIM(), strength=0.4, by="encoding" if encode else "perturbation",
        steps=4, seed=seeds(0, 6), cond=cond(2, 6),
    ).x  # fmt: skip
    for batch in (64, 5):
        assert run("edit", digits_run, "--input", "six.npz", "--batch-size", batch, "--out", "a.npz", *options) == 0
        torch.testing.assert_close(found("a.npz"), expected.transpose(0, 1).flatten(0, 1), rtol=1e-4, atol=1e-4)
    assert run("edit", digits_run, "--input", "six.npz", "--out", "a.png", "--beside", *options[:-1]) == 0
    with Image.open("a.png") as picture:
        assert picture.size == (4 * 34 + 2, 6 * 34 + 2)  # a row for each input


def test_paths_and_sheets(digits_run, moons_run, inputs):
    denoiser = scoresde.load(digits_run)
    options = ["--input", "six.npz", "--nfe", 6, "--class", 2]
    assert run("edit", digits_run, *options, "--interpolate", 4, "--out", "a.npz", *CPU) == 0
    expected = interpolation(denoiser, inputs[::2], inputs[1::2], Adams(), weights=4, nfe=6, cond=cond(2, 3)).x
    torch.testing.assert_close(found("a.npz"), expected.transpose(0, 1).flatten(0, 1), rtol=1e-4, atol=1e-4)
    assert run("edit", digits_run, *options, "--interpolate", 4, "--out", "a.png", "--beside", *CPU[:-1]) == 0
    with Image.open("a.png") as picture:
        assert picture.size == (6 * 34 + 2, 3 * 34 + 2)
    assert run("edit", digits_run, *options, "--limit", 4, "--interpolate", 2, 3, "--out", "b.npz", *CPU) == 0
    expected = interpolation_grid(denoiser, inputs[:4], Adams(), rows=2, columns=3, nfe=6, cond=cond(2, 1)).x
    torch.testing.assert_close(found("b.npz"), expected.flatten(0, 1), rtol=1e-4, atol=1e-4)
    # Points in the plane, which are no pictures.
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    np.save("points.npy", x.numpy())
    assert run("edit", moons_run, "--input", "points.npy", "--interpolate", 3, "--nfe", 8, "--out", "c.npz", *CPU) == 0
    expected = interpolation(scoresde.load(moons_run), x[::2], x[1::2], Adams(), weights=3, nfe=8).x
    torch.testing.assert_close(found("c.npz"), expected.transpose(0, 1).flatten(0, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--strength", "0"], "--strength 0.0"),
        (["--strength", "1.5"], "--strength 1.5"),
        (["--input", "none.png"], "none.png: there is no such file"),
        (["--input", "none"], "none: no such file or folder"),
        (["--input", "broken.png"], "broken.png cannot be read as an image"),
        (["--input", "points.npy"], "points.npy has items (2,), the model (1, 8, 8)"),
        (["--levels", "16"], "--levels says how many levels"),
        (["--to-class", "12"], "--class 12: there are 10, 0 to 9"),
        (["--from-class", "3"], "--from-class 3 is for --encode"),
        (["--encode", "--solver", "ddpm"], "draws noise"),
        (["--encode", "--keep", "one.png"], "--keep is for edits by noise"),
        (["--encode", "--grid", "uniform"], "--grid is for edits by noise"),
        (["--encode", "--input", "six"], "--input six no labels: say --from-class K"),
        (["--encode", "--variations", "2", "--from-class", "2"], "--variations keep the class"),
        (["--variations", "0"], "--variations 0"),
        (["--variations", "2", "--keep", "one.png"], "--keep does not go with --variations"),
        (["--interpolate", "3", "--guidance", "2"], "--guidance is for edits by noise"),
        (["--interpolate", "1"], "--interpolate 1: expected N"),
        (["--interpolate", "3", "3", "3"], "expected N, or R C"),
        (["--interpolate", "3", "--limit", "3"], "3 inputs, expected a multiple of 2"),
        (["--interpolate", "3", "3"], "6 inputs, expected a multiple of 4"),
        (["--interpolate", "3", "--strength", "0.5"], "--strength does not go with --interpolate"),
        (["--limit", "0"], "--limit 0"),
        (["--beside"], "--beside is for a picture"),
        (["--beside", "--out", "a.png", "--interpolate", "3", "3", "--limit", "4"], "--beside is for paths"),
        (["--out", "a.jpg"], "expected a file .png or .npz"),
        (["--nfe", "0"], "--nfe 0"),
    ],
)
def test_wrong_arguments_are_status_2(arguments, words, digits_run, inputs, here, capsys, monkeypatch):
    Path("broken.png").write_bytes(b"\x89PNG\r\n\x1a\n no more")
    np.save("points.npy", np.zeros((3, 2), np.float32))
    before = set(here.iterdir())
    defaults = {"--input": "six.npz", "--nfe": "3", "--to-class": "1", "--out": "a.npz"}
    options = [word for name, value in defaults.items() if name not in arguments for word in (name, value)]
    assert run("edit", digits_run, *options, "--device", "cpu", *arguments) == 2
    out, err = capsys.readouterr()
    assert (out, words in err, "Traceback" in err) == ("", True, False), err
    assert set(here.iterdir()) == before


def test_a_model_with_classes_wants_one(digits_run, moons_run, inputs, capsys):
    assert run("edit", digits_run, "--input", "six.npz", "--nfe", 3, "--out", "a.npz") == 2
    assert "say which, --to-class K" in capsys.readouterr().err
    np.save("points.npy", np.zeros((3, 2), np.float32))
    assert run("edit", moons_run, "--input", "points.npy", "--class", 1, "--nfe", 3, "--out", "a.npz") == 2
    assert "the model has no classes" in capsys.readouterr().err
    assert run("edit", moons_run, "--input", "one.png", "--nfe", 3, "--out", "a.npz") == 2
    assert "is an image, and the model's items (2,) are none" in capsys.readouterr().err


def test_results_that_are_not_finite_are_status_1(here, capsys):
    Path("bad.py").write_text(
        "import torch\nfrom scoresde import VPSDE, EpsDenoiser\n"
        "denoiser = EpsDenoiser(lambda x, t: torch.where(x > 4, float('nan'), x), VPSDE())\n"
    )
    np.save("points.npy", np.array([[0.0], [0.1], [50.0], [0.2]], np.float32))
    options = ["--denoiser", "bad:denoiser", "--shape", 1, "--input", "points.npy", "--out", "a.npz", "--quiet"]
    assert run("edit", *options, "--strength", 0.3, "--batch-size", 2) == 1
    assert "the edits of inputs 2 became non-finite" in capsys.readouterr().err
    assert np.load("a.npz")["x"].shape == (2, 1)  # what was finished
    assert run("edit", *options, "--solver", "ode-dopri5", "--nfe", 4, "--limit", 2) == 1
    assert "ran out at t =" in capsys.readouterr().err
