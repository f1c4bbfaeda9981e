"""The examples of whole states run and go on, and their numbers mean what their pages say."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def _examples(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")


def at(folder):
    return ["--out", str(folder), "--models", str(folder)]


def test_bits(tmp_path, monkeypatch):
    import binomial

    monkeypatch.setattr(binomial, "regressions", lambda known, held: -50.0 * torch.ones(len(held)))
    small = ["--beat-steps", "2", "--train-steps", "2", "--samples", "20", "--steps", "3", "--draws", "2"]
    binomial.main([*at(tmp_path), *small])
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["coin"]["exact"] == pytest.approx([0.9, 0.86, 0.7, 0.54, 0.508, 0.5])
    for way in ("forth", "back"):  # 4.5 standard errors of 10,000 coins
        assert found["coin"][way] == pytest.approx(found["coin"]["exact"], abs=4.5 * 0.5 / 100)
    assert found["heartbeat"]["bound"][0] < -math.log2(5)  # far: it is of two steps
    assert (tmp_path / "binomial.png").exists()


def test_letters(tmp_path):
    import masked_text as example

    law = example.Ngram(torch.randint(0, 27, (5000,), generator=torch.Generator().manual_seed(0)), 3)
    assert torch.allclose(law.p[2].sum(1), torch.ones(27**2, dtype=torch.float64))
    two = torch.cartesian_prod(torch.arange(27), torch.arange(27))
    assert float(law.log_prob(two).exp().sum()) == pytest.approx(1)
    (tmp_path / "a.txt").write_text("The cat sat on the mat, and the dog sat on the log. " * 60)
    small = [
        "--data",
        str(tmp_path / "a.txt"),
        "--length",
        "8",
        "--train-steps",
        "2",
        "--windows",
        "4",
        "--texts",
        "40",
    ]
    example.main([*at(tmp_path), *small, "--texts", "40", "--grams", "3"])
    bits = json.loads((tmp_path / "results.json").read_text())["bits"]
    assert bits["trigram"]["exact"][0] < bits["trigram"]["masked model, a bound"][0]
    assert bits["English"]["3-gram"][0] < bits["English"]["1-gram"][0]


def test_rows(tmp_path):
    import mixed_table as example

    law = torch.distributions.Normal(0, 1)
    lines = [f"{law.sample():.3f},{law.sample():.3f},{'ab'[i % 2]},{'xyz'[i % 3]}" for i in range(40)]
    (tmp_path / "rows.csv").write_text("\n".join(["height,width,kind,colour", *lines]))
    names, numbers, states = example.rows(tmp_path / "rows.csv")
    assert names == ["height", "width", "kind", "colour"]
    assert numbers.shape == (40, 2)
    assert int(states.max()) == 2
    small = ["--data", str(tmp_path / "rows.csv"), "--train-steps", "2", "--samples", "20", "--draws", "4"]
    for _ in range(2):
        example.main([*at(tmp_path), *small, "--steps", "3"])
    found = json.loads((tmp_path / "results.json").read_text())
    assert sum(found["terms"].values()) == pytest.approx(found["nats"]["product diffusion, a bound"][0], rel=1e-4)
