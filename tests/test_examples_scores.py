"""The examples of Langevin dynamics, of NCSN and of the roll run, and their numbers mean what their pages say."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")

from scoresde import VESDE
from scoresde.exact import Gaussian


@pytest.fixture(autouse=True)
def _examples(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")


def test_langevin_with_noise_spreads_and_without_it_does_not(tmp_path, monkeypatch):
    import langevin

    monkeypatch.setattr(langevin, "draw", lambda *_: None)
    langevin.main(["--out", str(tmp_path), "--train-steps", "2", "--steps", "100", "--chains", "300"])
    page, found = (tmp_path / "README.md").read_text(), json.loads((tmp_path / "langevin.json").read_text())
    spread, n = found["variance_within_a_mode"], 600
    # Each step multiplies the distance to a mode by 1 - 0.05 / 1.09; with noise the variance is a chi-square's.
    assert spread["Langevin, noise left out"] < 400 * (1 - 0.05 / 1.09) ** 200
    assert abs(spread["Langevin"] / 1.09 / (1 + langevin.BIAS) - 1) < 6 * math.sqrt(2 / n)
    assert f"| Langevin | {found['share_of_the_smaller_mode']['Langevin']:.3g} (" in page
    assert found["share_of_the_smaller_mode"]["annealed Langevin"] < 0.4  # 0.2, 8 standard errors of 0.023 below


def test_a_network_of_levels_is_measured_once(tmp_path, monkeypatch):
    import ncsn

    monkeypatch.setattr(ncsn, "NET", {**ncsn.NET, "channels": 8})
    paper = ncsn.Paper(3.0, 3, False, 5, 1e-4, "ncsnv2", denoise=True)
    monkeypatch.setattr(ncsn, "papers", lambda training: {"NCSNv2": paper})
    monkeypatch.setattr(ncsn, "draw", lambda *_: None)
    arguments = ["--out", str(tmp_path), "--model", str(tmp_path / "m"), "--train-steps", "1", "--samples", "8"]
    ncsn.main([*arguments, "--nfe", "5"])
    page, found = (tmp_path / "README.md").read_text(), json.loads((tmp_path / "results.json").read_text())
    calls = {row["sampler"]: row["nfe"] for row in found["rows"]}
    assert list(calls.values()) == [16, 16, 4, 3, 5, 3, 5, 1]
    assert all(f"| {row['sampler']} | {row['nfe']} | {row['frechet']:.2f} (" in page for row in found["rows"])
    monkeypatch.setattr(ncsn, "score", lambda *_: pytest.fail("it is measured again"))
    ncsn.main([*arguments, "--nfe", "5"])
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == found["rows"]


def test_the_terms_of_ncsns_loss_by_lambda():
    """Of the exact denoiser of N(0, I): E |sigma s + z|^2 / 2 = d / (2 (1 + sigma^2)), and lambda = 1 divides it by
    sigma^2; within 6 standard errors of 500 chi-squares."""
    import ncsn

    x = torch.randn(500, 16, generator=torch.Generator().manual_seed(1))
    terms = ncsn.terms(Gaussian(mean=torch.zeros(16), std=1.0).denoiser(VESDE(0.1, 3.0)), x, 4)
    for sigma, term, bare in zip(*terms.values(), strict=True):
        assert term == pytest.approx(8 / (1 + sigma**2), rel=6 * math.sqrt(2 / (500 * 16)))
        assert bare == pytest.approx(term / sigma**2, rel=1e-2)
    assert (terms["sigma"][0], terms["sigma"][-1]) == pytest.approx((3.0, 0.1), rel=1e-3)


def test_the_second_paper_settles_its_levels_by_its_techniques():
    import ncsn

    x = torch.randn(50, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    paper = ncsn.papers(x)["NCSNv2"]
    assert paper.largest == pytest.approx(float(torch.pdist(x.flatten(1)).max()), abs=0.1)
    assert 1.3 < (paper.largest / 0.02) ** (1 / (paper.levels - 1)) < 1.4  # of D = 64


def test_the_roll_goes_into_noise_and_back(tmp_path):
    import spiral

    arguments = ["--train-steps", "2", "--points", "200", "--sets", "4"]
    spiral.main(["--out", str(tmp_path), "--model", str(tmp_path / "model"), *arguments])
    page, found = (tmp_path / "README.md").read_text(), json.loads((tmp_path / "results.json").read_text())
    assert (tmp_path / "spiral.png").read_bytes()[:4] == b"\x89PNG"
    distances = found["energy_distance"]
    assert list(distances) == ["0", "20", "40"]
    # A network that has learned nothing does not come back, but begins in the noise that the chain ends in.
    assert distances["0"]["back"][0] > 1.5 * distances["40"]["back"][0]
    assert f"| t = 20 | {distances['20']['back'][0]:.2g} (" in page
