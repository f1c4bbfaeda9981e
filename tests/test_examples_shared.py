"""What the examples share: arguments as they are said, numbers with their errors, and grids that lose no image."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")

from scoresde import VPSDE, X0Denoiser, sample
from scoresde.noise import derive_seed
from scoresde.solvers import DDIM


@pytest.fixture(autouse=True)
def _examples(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")


def test_an_argument_is_of_the_type_of_its_default():
    from shared import arguments

    parser = arguments("what it does", "name", data=((1, 2), "two"), w=([0.5], "some"), text=([str], "any"),
                       file=(Path, "one"), some_steps=(3, "steps"), models=(Path("runs/other"), "runs"))  # fmt: skip
    bare = parser.parse_args([])
    assert vars(bare) == {"out": Path("runs/name"), "seed": 0, "data": (1, 2), "w": [0.5], "text": None, "file": None,
                          "some_steps": 3, "models": Path("runs/other")}  # fmt: skip
    words = ["--data", "3", "4", "--w", "1", "2", "3", "--text", "a", "b", "--file", "x", "--some-steps", "5"]
    given = parser.parse_args([*words, "--out", "o", "--seed", "1"])
    assert (given.data, given.w, given.text, given.file) == ([3, 4], [1.0, 2.0, 3.0], ["a", "b"], Path("x"))
    assert (given.some_steps, given.out, given.seed) == (5, Path("o"), 1)
    assert "two (1 2)" in " ".join(parser.format_help().split())
    for wrong in (["--data", "1"], ["--some-steps", "1.5"]):
        with pytest.raises(SystemExit):
            parser.parse_args(wrong)


def test_a_sample_for_each_entry_in_whatever_batches():
    """Each is of its own condition, a prediction here; the first batch is the run of its seed, and no noise recurs."""
    from shared import drawn

    y = torch.linspace(-0.5, 0.5, 5)
    told = X0Denoiser(lambda x, t, y, text: 1e-3 * x + y[:, None], VPSDE())
    cond = {"y": y, "text": list("abcde")}
    x = drawn(told, (3,), DDIM(), nfe=4, seed=0, cond=cond, batch=2)
    torch.testing.assert_close(x, y[:, None].expand(5, 3), rtol=0, atol=0.01)
    assert len({round(value, 6) for value in (x - y[:, None]).flatten().tolist()}) == 15
    first = {"y": y[:2], "text": ["a", "b"]}
    assert torch.equal(x[:2], sample(told, (2, 3), DDIM(), nfe=4, seed=derive_seed(0, 0), cond=first).x)
    assert drawn(told, (3,), DDIM(), nfe=4, seed=0, cond={"y": 5 + y, "text": cond["text"]}).max() == 1  # cut


def test_a_grid_has_a_name_for_a_row_and_a_head_for_a_column(tmp_path):
    from shared import grid, picture, tile

    rows = [torch.full((3, 1, 4, 4), -1.0), torch.full((1, 1, 4, 4), 0.0)]
    with picture(tmp_path / "new" / "a.png", 2, 2) as figure:
        axis = figure.subplots()
        grid(axis, rows, ["a", "b"], range(3), "title")
        shown = axis.images[0].get_array()
        assert shown.shape == (2 * 68, 3 * 68, 3)
        assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b"]
        assert [label.get_text() for label in axis.get_xticklabels()] == ["0", "1", "2"]
        assert all((shown[10:60, 68 * i + 10 : 68 * i + 60] == 0).all() for i in range(3))
        assert (shown[78:128, 10:60] == 0.5).all()
        assert (shown[78:128, 78:] == 1).all()  # a shorter row ends in white
    assert (tmp_path / "new" / "a.png").read_bytes()[:4] == b"\x89PNG"
    blue = tile(torch.full((1, 1, 64, 64), torch.nan), 1)
    assert blue[30, 30].tolist() == pytest.approx([0.36, 0.55, 0.72])


def test_numbers_and_the_page(tmp_path, capsys):
    from shared import cell, mean_and_error, place, publish, seeded, size

    mean, error = mean_and_error(torch.tensor([True, False, True, True]))
    assert (mean, error) == (0.75, 0.25)  # a standard deviation of 1/2, of four
    assert cell([0.75, 0.25], 1, factor=100) == "75.0 (25.0)"
    assert cell([0.75, 0.25], sign="+") == "+0.75 (0.25)"
    assert cell(None) == ""
    one, two = (seeded(lambda: nn.Linear(3, 2), 5) for _ in range(2))
    assert torch.equal(one.weight, two.weight)
    assert size(one) == 8
    args = argparse.Namespace(out=tmp_path / "o", steps=3, models=Path("m"), text=None)
    draw = lambda path: path.write_bytes(b"drawn")  # noqa: E731
    results = {"seconds": {"a": 1.2, "b": 60, "measure": 3.0}, "rows": [1]}
    publish(args, "name", results, lambda found: f"# Page\n\n{place(found)}\nof {found['steps']}", draw)
    page = (tmp_path / "o/README.md").read_text()
    assert "1 s (a), 60 s (b) of the wall clock; samples and scores 3 s." in page
    assert page.endswith("of 3")
    found = json.loads((tmp_path / "o/results.json").read_text())
    assert found.keys() == {"environment", "steps", "seconds", "rows"}
    assert (tmp_path / "o/name.png").read_bytes() == b"drawn"
    assert page in capsys.readouterr().out
