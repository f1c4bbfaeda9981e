"""The examples of series run and go on, on a file of one's own, and their other forecasts have their laws."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="the examples draw")
pytest.importorskip("sklearn", reason="the AUC is scikit-learn's")
pytest.importorskip("safetensors", reason="runs are kept")


@pytest.fixture(autouse=True)
def _examples(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")


@pytest.fixture
def table(tmp_path):
    """A CSV file: a time, two numbers, a label."""
    x = torch.randn(400, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).cumsum(0) * 0.1
    x[330:340, 1] += 5
    lines = [f"day {k},{a:.6f},{b:.6f},{int(330 <= k < 340)}" for k, (a, b) in enumerate(x.tolist())]
    path = tmp_path / "mine.csv"
    path.write_text("\n".join(["timestamp,a,b,is_anomaly", *lines]) + "\n")
    return path


def test_anomalies_of_ones_own_file(table, tmp_path):
    import anomalies

    quick = ["--train-steps", "4", "--nfe", "4", "--draws", "2", "--context", "8", "--train", "250"]
    quick += ["--smooth", "4", "4"]
    for out in ("one", "two"):
        anomalies.main(["--data", str(table), "--out", str(tmp_path / out), *quick])
    found, again = (json.loads((tmp_path / out / "results.json").read_text()) for out in ("one", "two"))
    assert found["series"]["mine"]["rows"] == again["series"]["mine"]["rows"]
    assert found["series"]["mine"]["window"] == [330, 339]
    assert found["series"]["mine"]["rows"]["PCA"]["near"]
    assert (tmp_path / "one" / "anomalies.png").exists()
    anomalies.main(["--data", str(table), "--out", str(tmp_path / "one"), *quick])  # goes on from its end
    assert json.loads((tmp_path / "one" / "results.json").read_text())["series"]["mine"]["rows"] == again["series"][
        "mine"]["rows"]  # fmt: skip


def test_forecasts_of_ones_own_file(table, tmp_path):
    pytest.importorskip("scoringrules", reason="scores are those of scoringrules")
    pytest.importorskip("statsmodels", reason="the VAR is that of statsmodels")
    import forecasting

    quick = ["--train-steps", "4", "--nfe", "2", "--paths", "19", "--origins", "3", "--lags", "2"]
    forecasting.main(["--data", str(table), "--out", str(tmp_path / "out"), "--horizon", "4", "--context", "8", *quick])
    found = json.loads((tmp_path / "out" / "results.json").read_text())["series"]["mine"]
    assert list(found["rows"]) == ["diffusion", "VAR", "season before"]
    assert found["origins"] == 3


def test_changes_add_up_to_the_series():
    from series import Series

    x = torch.randn(60, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for lag in (0, 1, 5):
        series = Series(x, lag, 8, 10, 2)
        y = series.changes
        paths = torch.stack([y[k : k + 8] for k in (12, 30)])[:, None]
        truth = torch.stack([x[k + lag : k + lag + 8] for k in (12, 30)])
        torch.testing.assert_close(series.added_up(paths, [12, 30])[:, 0], truth)


def test_the_exact_score_is_that_of_exact_paths():
    """4 standard errors of 400 origins."""
    pytest.importorskip("scoringrules", reason="scores are those of scoringrules")
    from series import A, Q, exact_crps

    from scoresde.metrics import crps

    n, H = 400, 3
    e = torch.randn(n, 21, H, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    e = e @ torch.linalg.cholesky(Q).T
    start = torch.randn(n, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x, paths = start[:, None].expand(-1, 21, -1), []
    for h in range(H):
        x = x @ A.T + e[:, :, h]
        paths.append(x)
    paths = torch.stack(paths, 2)
    gap = (crps(paths[:, 1:], paths[:, 0]) - exact_crps(start, paths[:, 0])).mean((1, 2))
    assert abs(gap.mean()) < 4 * gap.std() / math.sqrt(n)


def test_what_is_spoiled_is_labelled():
    import anomalies

    y = torch.randn(2000, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for kind in ("stuck", "late"):
        bad, label = anomalies.spoiled(y, kind, seed=3, least=100)
        assert torch.equal((bad != y).any(1) | label, label)
        assert label[:100].sum() == 0
        assert 0.1 < label.double().mean() < 0.3
