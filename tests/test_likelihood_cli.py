"""`scoresde likelihood`: what it computes, that it goes on where it was killed, and what it refuses."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from scoresde import VPSDE
from scoresde.cli import likelihood as command
from scoresde.cli import main
from scoresde.data import digit_levels, read_data
from scoresde.errors import CheckpointError
from scoresde.exact import Gaussian
from scoresde.levels import outer_edges
from scoresde.likelihood.bits import bits_per_dim, dequantized
from scoresde.likelihood.bound import elbo
from scoresde.likelihood.flow import log_prob

MODULE = "a_model_of_these_tests"
SOURCE = """
import torch
from scoresde import VPSDE, EpsDenoiser
from scoresde.exact import Gaussian
from scoresde.training import CheckpointError

gaussian = Gaussian(torch.zeros(1, 2, 2), std=0.4).denoiser(VPSDE())
digits = Gaussian(torch.zeros(1, 8, 8), std=0.8).denoiser(VPSDE())
number = 3

def make():
    return gaussian

class Scaled(torch.nn.Module):
    # The eps of a Gaussian whose std is a weight.
    def __init__(self, std):
        super().__init__()
        self.std = torch.nn.Parameter(torch.tensor(std))
        self.dropout = torch.nn.Dropout()

    def forward(self, x, t):
        B = 0.1 * t + 19.9 * t**2 / 2
        alpha, sigma = torch.exp(-B / 2), torch.sqrt(-torch.expm1(-B))
        gain = sigma / (alpha**2 * self.std**2 + sigma**2)
        return self.dropout(gain.reshape(-1, 1, 1, 1) * x)

def load(path):
    try:
        std = torch.load(path, weights_only=True)["std"]
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error
    return EpsDenoiser(Scaled(std), VPSDE())

def broken():
    return EpsDenoiser(lambda x, t: torch.where(x > 0.95, torch.nan, x), VPSDE())
"""
IMAGES = torch.randint(0, 256, (7, 1, 2, 2), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with a model and data in it."""
    (tmp_path / f"{MODULE}.py").write_text(SOURCE)
    np.save(tmp_path / "images.npy", IMAGES.numpy())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    yield tmp_path
    sys.modules.pop(MODULE, None)


def run(capsys, *arguments, data="images.npy", name="gaussian", out="out.json"):
    """(status, content of --out or None, what was printed) of a run."""
    status = main(["likelihood", str(data), "--denoiser", f"{MODULE}:{name}", "--out", str(out), *map(str, arguments)])
    written = json.loads(Path(out).read_text()) if Path(out).exists() else None
    text = capsys.readouterr()
    return status, written, text.out + text.err


FAST = ("--steps", "8", "--batch", "3")


def test_images_are_measured_as_bits_per_dim_does(here, capsys):
    status, found, printed = run(capsys, *FAST, "--probes", "2", "--repeats", "2", "--seed", "4")
    assert status == 0
    denoiser = Gaussian(torch.zeros(1, 2, 2), std=0.4).denoiser(VPSDE())
    expected = bits_per_dim(denoiser, IMAGES, steps=8, probes=2, repeats=2, seed=4)
    assert found["each"] == pytest.approx(expected.per_image.tolist(), rel=1e-5)
    assert found["each_stderr"] == pytest.approx(expected.per_image_stderr.tolist(), rel=1e-3)
    assert (found["value"], found["stderr"]) == (
        pytest.approx(expected.value, rel=1e-5),
        pytest.approx(expected.stderr, rel=1e-4),
    )
    assert (found["unit"], found["items"], found["batches"], found["offset"]) == ("bits/dim", 7, 3, 7)
    assert found["nfe"] == 8 * (2 + 2 + 1)  # batches of 3, each with 6 rows in batches of 3, and the last of 1 with 2
    assert found["discretisation_error"] == pytest.approx(expected.error, rel=1e-3)
    assert found["arguments"]["steps"] == 8
    assert {"device", "dtype", "torch", "commit", "command"} <= set(found["environment"])
    assert f"{found['value']:.4f} +- " in printed


def test_so_few_steps_that_nothing_is_known_of_their_error(here, capsys):
    status, found, printed = run(capsys, "--steps", "2")
    assert (status, found["discretisation_error"]) == (0, None)
    assert "no estimate of the discretisation error from so few steps: more --steps give one" in printed
    assert "nan" not in printed
    assert "; discretisation error about" in run(capsys, "--steps", "8", "--fresh")[2]


def test_a_killed_run_goes_on_and_ends_the_same(here, capsys, monkeypatch):
    _, whole, _ = run(capsys, *FAST, out="whole.json")
    lines = (here / "whole.batches.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 4
    calls = []
    measure = command._Job.measure
    monkeypatch.setattr(command._Job, "measure", lambda job, which: calls.append(which) or measure(job, which))
    for kept, todo in ((b"", 3), (lines[0][:5], 3), (lines[0], 3), (b"".join(lines[:2]) + lines[2][:40], 2),
                       (b"".join(lines)[:-1], 1), (b"".join(lines), 0)):  # fmt: skip
        (here / "again.batches.jsonl").write_bytes(kept)
        calls.clear()
        status, again, _ = run(capsys, *FAST, out="again.json")
        assert (status, len(calls)) == (0, todo)
        same = ("value", "stderr", "nfe", "each", "probe_stderr")
        assert [again[key] for key in same] == [whole[key] for key in same]
        assert len((here / "again.batches.jsonl").read_bytes().splitlines()) == 4
    calls.clear()
    assert run(capsys, *FAST, "--fresh", out="again.json")[0] == 0
    assert len(calls) == 3


def test_a_run_that_dies_keeps_its_batches(here, capsys, monkeypatch):
    measure = command._Job.measure

    def dies(job, which):
        if which.start == 6:
            raise KeyboardInterrupt
        return measure(job, which)

    monkeypatch.setattr(command._Job, "measure", dies)
    status, _, printed = run(capsys, *FAST)
    assert (status, "the same command goes on" in printed) == (130, True)
    assert not (here / "out.json").exists()
    assert len((here / "out.batches.jsonl").read_bytes().splitlines()) == 3
    monkeypatch.setattr(command._Job, "measure", lambda job, which: measure(job, which))
    assert run(capsys, *FAST)[1]["items"] == 7


def test_batches_of_another_run_are_refused(here, capsys):
    assert run(capsys, *FAST)[0] == 0
    before = (here / "out.json").read_bytes(), (here / "out.batches.jsonl").read_bytes()
    for arguments, words in (
        (("--steps", "9", "--batch", "3"), ["steps: 8 in the file, 9 now", "--fresh"]),
        ((*FAST, "--seed", "1"), ["seed: 0 in the file, 1 now"]),
        ((*FAST, "--dequantize", "none"), ["dequantize: nothing in the file, none now"]),
        ((*FAST, "--range", "0", "1"), ["data_range"]),
        ((*FAST, "--limit", "5"), ["data: (7, 1, 2, 2)", "(5, 1, 2, 2)"]),
        ((*FAST, "--bound"), ["bound: False in the file, True now"]),
    ):
        status, _, printed = run(capsys, *arguments)
        assert status == 2
        assert all(word in printed for word in ["out.batches.jsonl holds batches of another run", *words])
    np.save("images.npy", 255 - IMAGES.numpy())
    assert "data: (7, 1, 2, 2) torch.uint8, sha256" in run(capsys, *FAST)[2]
    np.save("images.npy", IMAGES.numpy())
    assert "denoiser" in run(capsys, *FAST, name="make")[2]
    (here / f"{MODULE}.py").write_text(SOURCE + "\n# another version\n")
    del sys.modules[MODULE]
    assert run(capsys, *FAST)[0] == 2
    assert before == ((here / "out.json").read_bytes(), (here / "out.batches.jsonl").read_bytes())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"not what it was\n", "is not a file of `scoresde likelihood`"),
        (b"not what it was", "is not a file of `scoresde likelihood`"),
        (b"\xff\xfe\x00\n{}\n", "is not a file of `scoresde likelihood`"),
        (b'{"format": "another", "made_for": {}}\n', "is not a file of `scoresde likelihood`"),
        (None, "line 3 is damaged"),
    ],
)
def test_a_damaged_file_is_named(content, words, here, capsys):
    run(capsys, *FAST)
    path = here / "out.batches.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], lines[2][:50] + b"\n", lines[3]]) if content is None else content)
    kept = path.read_bytes()
    status, _, printed = run(capsys, *FAST)
    assert status == 2
    assert f"out.batches.jsonl{':' if content is None else ''} {words}" in printed
    assert path.read_bytes() == kept


def test_a_mistake_in_an_option_is_no_other_run(here, capsys):
    """Nothing is kept before a batch is finished, so the corrected command is not refused."""
    assert run(capsys, "--steps", "8", "--probes", "0")[0] == 2
    assert run(capsys, "--steps", "8", "--probes", "1")[0] == 0


def test_a_checkpoint_is_given_to_the_function_and_told_apart(here, capsys):
    """The network is taken in eval mode: it has dropout."""
    torch.save({"std": 0.4}, "model.pt")
    status, found, _ = run(
        capsys, *FAST, "--divergence", "exact", "--checkpoint", "model.pt", "--device", "cpu", name="load"
    )
    assert status == 0
    exact = run(capsys, *FAST, "--divergence", "exact", out="exact.json")[1]
    assert found["each"] == pytest.approx(exact["each"], abs=2e-3)  # a float32 eps, a table of 8
    torch.save({"std": 0.5}, "model.pt")
    status, _, printed = run(capsys, *FAST, "--divergence", "exact", "--checkpoint", "model.pt", name="load")
    assert status == 2
    assert "checkpoint: sha256" in printed
    assert "weights: sha256" in printed
    Path("model.pt").write_bytes(b"PK" + bytes(100))
    status, _, printed = run(capsys, *FAST, "--checkpoint", "model.pt", name="load", out="other.json")
    assert (status, "model.pt cannot be read" in printed) == (2, True)
    assert issubclass(CheckpointError, RuntimeError)


def test_floating_point_data_have_a_log_density(here, capsys):
    x = Gaussian(torch.zeros(1, 2, 2), std=0.4).sample(5, torch.Generator().manual_seed(1), torch.float64)
    np.savez("points.npz", x.numpy())
    status, found, printed = run(capsys, "--steps", 30, "--batch", 2, "--bound", "--draws", 32, data="points.npz")
    assert (status, found["unit"], "nats over 5 items" in printed) == (0, "nats", True)
    denoiser = Gaussian(torch.zeros(1, 2, 2), std=0.4).denoiser(VPSDE())
    expected = log_prob(denoiser, x, steps=30, seed=0)
    assert found["each"] == pytest.approx(expected.value.tolist(), rel=1e-6)
    assert found["each_stderr"] == pytest.approx(expected.stderr.tolist(), rel=1e-4)
    assert found["bound"]["each"] == pytest.approx(elbo(denoiser, x, draws=32, seed=0).value.tolist(), rel=1e-6)
    assert "offset" not in found
    status, _, printed = run(capsys, "--levels", "32", data="points.npz")
    assert (status, "--levels is for data of whole levels" in printed) == (2, True)
    x[3, 0, 0, 1] = math.nan
    np.savez("points.npz", x.numpy())
    status, _, printed = run(capsys, "--fresh", data="points.npz")
    assert (status, "points.npz cannot be read as an array of numbers: it is not finite in items 3" in printed) == (
        2,
        True,
    )


def test_the_digits_have_their_levels_and_range(here, capsys):
    status, found, printed = run(capsys, "--steps", 20, "--limit", 6, "--bound", data="digits", name="digits")
    assert (status, found["offset"], "variational bound" in printed) == (0, 3, True)
    denoiser, levels = Gaussian(torch.zeros(1, 8, 8), std=0.8).denoiser(VPSDE()), digit_levels()[0][:6]
    data_range = outer_edges(-1.0, 1.0, 17)
    expected = bits_per_dim(denoiser, levels, 17, data_range=data_range, steps=20, seed=0)
    assert found["each"] == pytest.approx(expected.per_image.tolist(), rel=1e-5)
    x = dequantized(levels, 17, data_range=data_range, seed=0)
    bits = elbo(denoiser, x, seed=0).bits_per_dim + 3
    assert found["bound"]["each"] == pytest.approx(bits.tolist(), rel=1e-5)
    assert found["bound"]["value"] > found["value"] - 5 * max(found["bound"]["each_stderr"])
    status, _, printed = run(capsys, "--levels", "16", data="digits", name="digits", out="b.json")
    assert (status, "digits has 17" in printed) == (2, True)


def test_five_bits_and_levels_at_the_ends(here, capsys):
    np.save("five.npy", IMAGES.numpy() // 8)
    _, found, _ = run(capsys, *FAST, "--levels", 32, "--range", 0, 1, data="five.npy")
    assert found["offset"] == 5
    _, found, _ = run(capsys, *FAST, "--levels-at-ends", out="ends.json")
    assert found["offset"] == pytest.approx(math.log2(255 / 2))


@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
def test_a_folder_of_images(mode, tmp_path):
    Image = pytest.importorskip("PIL.Image")
    (tmp_path / "b").mkdir()
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, (4, 3) if mode == "L" else (4, 3, 3), dtype=np.uint8) for _ in range(3)]
    names = ["a.png", "b/2.png", "c.PNG"]
    for name, array in zip(names, arrays, strict=True):
        image = Image.fromarray(array)
        (image.quantize(16) if mode == "P" else image).save(tmp_path / name, format="png")
    found = read_data(tmp_path)
    assert found.names == names
    assert (found.x.dtype, found.levels) == (torch.uint8, None)
    assert tuple(found.x.shape) == (3, 1 if mode == "L" else 3, 4, 3)
    if mode != "P":
        assert np.array_equal(found.x[1].numpy(), arrays[1][None] if mode == "L" else arrays[1].transpose(2, 0, 1))
    Image.fromarray(arrays[0][:2]).save(tmp_path / "d.jpg")
    with pytest.raises(ValueError, match=r"d\.jpg is \(., 2, 3\).*images of one size"):
        read_data(tmp_path)
    (tmp_path / "d.jpg").write_bytes((tmp_path / "a.png").read_bytes()[:30])
    with pytest.raises(ValueError, match=r"d\.jpg cannot be read as an image"):
        read_data(tmp_path)
    (tmp_path / "d.jpg").unlink()
    opaque = Image.fromarray(arrays[0]).convert("LA" if mode == "L" else "RGBA")
    opaque.putalpha(255)
    opaque.save(tmp_path / "d.png")
    assert torch.equal(
        read_data(tmp_path).x[3], found.x[0] if mode != "P" else torch.from_numpy(arrays[0]).movedim(2, 0)
    )


def test_without_pillow_a_folder_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match="pip install pillow"):
        read_data(tmp_path)


def test_data_that_cannot_be_read_are_named(tmp_path):
    def broken(name, match, error=ValueError):
        with pytest.raises(error, match=match):
            read_data(tmp_path / name)

    broken("nothing.npy", "no such file or folder, nor a built-in data set", FileNotFoundError)
    broken("", "holds no image")
    (tmp_path / "table.csv").write_text("1,2\n")
    broken("table.csv", r"table\.csv: expected a \.npy or \.npz file")
    np.save(tmp_path / "a.npy", np.arange(100))
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:300])
    broken("a.npy", r"a\.npy cannot be read")
    (tmp_path / "b.npz").write_bytes(b"PK\x03\x04" + bytes(50))
    broken("b.npz", r"b\.npz cannot be read")
    np.savez(tmp_path / "c.npz", one=np.zeros(2), two=np.zeros(2))
    broken("c.npz", r"c\.npz.*'one', 'two'.*'images'")
    np.save(tmp_path / "d.npy", np.array(["x"]))
    broken("d.npy", r"d\.npy.*expected integers or floating-point")
    np.save(tmp_path / "e.npy", np.array([{}], dtype=object))
    broken("e.npy", r"e\.npy cannot be read")
    np.save(tmp_path / "f.npy", np.zeros((0, 3)))
    broken("f.npy", r"its shape is \(0, 3\)")
    (tmp_path / "g.npy").touch()
    broken("g.npy", r"g\.npy cannot be read")
    np.savez(tmp_path / "h.npz", images=np.zeros((2, 3), dtype=">i2"), labels=np.zeros(2))
    assert read_data(tmp_path / "h.npz").x.dtype == torch.int16


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--batch", "0"), "--batch 0"),
        (("--limit", "-1"), "--limit -1"),
        (("--levels", "32"), "levels from"),
        (("--range", "1", "0"), "lo < hi"),
        (("--importance", "3"), "needs --divergence 'exact'"),
        (("--draws", "3"), "--draws is for --bound"),
        (("--steps", "3", "--rtol", "1e-3"), "--rtol is for adaptive steps"),
        (("--t", "7"), "--t 7.0"),
        (("--seed", "-1"), "--seed -1"),
        (("--device", "toaster"), "--device toaster"),
        (("--checkpoint", "none.pt"), "none.pt: there is no such file"),
        (("--checkpoint", "images.npy"), "is a Denoiser already"),
        (("--denoiser", "gaussian"), "expected MODULE:NAME"),
        (("--denoiser", "no_such_module:x"), "no_such_module"),
        (("--denoiser", f"{MODULE}:x"), "has no 'x'"),
        (("--denoiser", f"{MODULE}:number"), "gives int"),
        (("--out", "."), "is a folder"),
    ],
)
def test_a_wrong_argument_is_status_2(arguments, words, here, capsys):
    status, written, printed = run(capsys, *arguments)
    assert (status, written) == (2, None)
    assert words in printed
    assert printed.startswith("scoresde: ")
    assert not (here / "out.batches.jsonl").exists()


def test_a_density_that_is_not_finite_names_its_item(here, capsys):
    images = IMAGES.clone() // 4
    images[4] = 255
    np.save("images.npy", images.numpy())
    status, written, printed = run(capsys, *FAST, name="broken")
    assert (status, written) == (1, None)
    assert "item 4 is not finite" in printed
    assert len((here / "out.batches.jsonl").read_bytes().splitlines()) == 2
