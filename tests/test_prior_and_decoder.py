"""The example of a prior, a decoder and an upsampler runs and goes on, and its prior is causal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")


@pytest.fixture(autouse=True)
def _examples(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")


def test_it_runs_and_goes_on(tmp_path, monkeypatch, capsys):
    import prior_and_decoder as example

    monkeypatch.setattr(example, "STRENGTHS", (0.0, 0.1))
    monkeypatch.setattr(example, "SHOWN", 2)
    few = [
        "--tokens",
        "bytes",
        "--scenes",
        "128",
        "--prior-steps",
        "1",
        "--clip-steps",
        "1",
        "--reader-steps",
        "1",
        "--images",
        "8",
    ]
    where = ["--out", str(tmp_path), "--models", str(tmp_path / "models"), "--nfe", "1"]
    example.main([*few, *where, "--train-steps", "1"])
    first = capsys.readouterr()
    assert first.out.count("training on 128 items") == 7
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["what"] for row in results["rows"]][1:3] == ["x of z at once", "no noise, ever"]
    assert (tmp_path / "prior_and_decoder.png").stat().st_size > 10_000
    assert "| s = 0.1 |" in (tmp_path / "README.md").read_text()
    monkeypatch.setattr(example, "measured", lambda *_: ([], {}))
    monkeypatch.setattr(example, "publish", lambda *_: None)
    example.main([*few, *where, "--train-steps", "1"])
    assert "training on" not in capsys.readouterr().out


def test_the_prior_is_causal_and_a_masked_token_is_none():
    """Its prediction depends on all tokens that count, and on no others, bit for bit."""
    import prior_and_decoder as example

    torch.manual_seed(0)
    prior = example.Prior(depth=2)
    z, y, time = torch.randn(2, example.Z), torch.randn(2, 64), torch.tensor([10.0, 500.0])
    context, mask = torch.randn(2, 5, example.WIDTH), torch.tensor([[True] * 5, [True, True, True, False, False]])
    found = prior(z, time, y, context, mask)
    other = context.clone()
    other[1, 3:] = 7.0
    assert torch.equal(prior(z, time, y, other, mask), found)
    other[1, 1] = 7.0
    assert not torch.equal(prior(z, time, y, other, mask)[1], found[1])
