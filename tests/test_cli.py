"""The command line and the programs that ship: they run, say what is wrong, and go on where they stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from common import every_pair

import scoresde
from scoresde.cli import GRIDS, SDES, SOLVERS, main
from scoresde.training import Trainer

ROOT = Path(__file__).parents[1]


def test_info_names_what_there_is(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for word in (scoresde.__version__, torch.__version__, *SDES, *SOLVERS):
        assert word in out


def test_solvers_lists_them_all(capsys):
    for arguments in ([], ["--markdown"]):
        assert main(["solvers", *arguments]) == 0
        out = capsys.readouterr().out
        assert all(entry.name in out and entry.call in out and entry.source in out for entry in SOLVERS.values())


def test_only_options_see_what_was_parsed():
    """A command is handed a frozen object, never argparse's namespace, which later code could write into."""
    files = (ROOT / "scoresde" / "cli").glob("*.py")
    assert [path.name for path in files if "Namespace" in path.read_text()] == ["options.py"]


@pytest.mark.parametrize("solver", SOLVERS)
def test_tableau_knows_every_solver(solver, capsys):
    status = main(["tableau", solver, "--steps", "2"])
    out, err = capsys.readouterr()
    if SOLVERS[solver].solver.has_table:
        assert status == 0
        assert out.startswith("Tableau of ")
    else:
        assert status == 2
        assert "has no table" in err


@every_pair(solver=["ddpm", "heun", "unipc3", "eab3-v"], sde=list(SDES), grid=GRIDS)
def test_tableau_prints_or_says_why_not(solver, sde, grid, capsys):
    status, made = main(["tableau", solver, "--sde", sde, "--grid", grid, "--steps", "4"]), SDES[sde]()
    out, err = capsys.readouterr()
    if status == 0:
        assert out.startswith("Tableau of ")
        assert not err
    else:
        # A stride of something that is no chain, log-SNR where it is infinite.
        assert status == 2
        assert err.startswith("scoresde: ")
        assert grid == "strided" or (grid in ("log_snr", "karras") and made.alpha(made.t_max) == 0)


def test_python_m_and_the_console_script_are_the_same():
    (script,) = entry_points(group="console_scripts", name="scoresde")
    assert script.load() is main
    run = subprocess.run([sys.executable, "-m", "scoresde", "--version"], capture_output=True, text=True, check=True)
    assert run.stdout == f"scoresde {scoresde.__version__}\n"
    wrong = subprocess.run([sys.executable, "-m", "scoresde", "tableau", "nothing"], capture_output=True, text=True)
    assert wrong.returncode == 2


def test_importing_touches_nothing():
    """No GPU is initialised, nothing is compiled, and no optional package is needed."""
    code = (
        "import sys; "
        "missing = ['sklearn', 'matplotlib', 'diffusers', 'PIL', 'safetensors', 'tensorboard', 'msgspec', 'tomli_w']; "
        "sys.modules.update(dict.fromkeys(missing)); "
        "import torch, scoresde.cli, scoresde.training, scoresde.nn, scoresde.exact, scoresde.metrics, scoresde.data; "
        "assert scoresde.cli.main(['info']) == 0; "
        "assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_demo_runs_and_goes_on(tmp_path, capsys, monkeypatch):
    """The main job in small: its table has every cell, its pictures exist, and a second run does not train again;
    stopped by SIGTERM it says how to go on."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    import digits

    arguments = [
        "--out",
        str(tmp_path),
        "--steps",
        "2",
        "--samples",
        "8",
        "--nfe",
        "1",
        "3",
        "--long",
        "4",
        "--images",
        "8",
        "--device",
        "cpu",
    ]
    step, net = Trainer._train_step, digits.UNet
    monkeypatch.setattr(digits, "UNet", lambda **options: net(**options | {"channels": 8}))

    def stopped(trainer, *batch):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", stopped)
        with pytest.raises(SystemExit) as stop:
            digits.main(arguments)
    assert stop.value.code == 143
    told = capsys.readouterr().err
    assert "stopped; step 1 is kept, and the same program goes on" in told
    assert f"the same command goes on from the last checkpoint in {tmp_path}" in told
    digits.main(arguments)
    assert "going on from step 1 of 2" in capsys.readouterr().out
    first = json.loads((tmp_path / "results.json").read_text())
    for name in ("samples", "process"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        monkeypatch.setattr(digits, f"draw_{name}", lambda *_: None)
    digits.main(arguments)
    assert "going on from step 2 of 2" in capsys.readouterr().out
    again = json.loads((tmp_path / "results.json").read_text())
    cells = {(row["solver"], row["budget"]): row["nfe"] for row in first["rows"]}
    names = tuple(digits.RACE)
    assert cells == {(name, nfe): nfe for name in names for nfe in (1, 3)} | {("DDPM", 4): 4}
    assert again["rows"] == first["rows"]
    assert {"device", "dtype", "torch", "commit", "command"} <= set(first["environment"])
    with pytest.raises(SystemExit, match="--fresh forgets that run"):
        digits.main([*arguments, "--seed", "3"])


def test_likelihood_explains_itself(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["likelihood", "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for word in ("digits", "--denoiser MODULE:NAME", "--checkpoint", "--dequantize", "--bound", "--fresh", "--probes"):
        assert word in out
    assert main(["likelihood", "digits", "--out", "a.json"]) == 2
    assert "digits is no run folder: name one, or the data and --denoiser" in capsys.readouterr().err


@pytest.mark.parametrize("sde", [scoresde.VPSDE(), scoresde.EDMSDE()])
def test_the_forward_row_of_the_demo_is_a_path_of_the_sde(sde, monkeypatch):
    """Cov(x_s, x_t) = alpha_t / alpha_s sigma_s^2 for s < t, which one noise for all t has not."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    from digits import forward_path

    n, times = 40_000, sde.t_max * torch.tensor([0.0, 0.2, 0.3, 0.5, 1.0], dtype=torch.float64)
    x0 = torch.full((n,), 0.5, dtype=torch.float64)
    found = forward_path(sde, x0, times, torch.Generator().manual_seed(0))
    alpha, sigma = sde.alpha(times), sde.sigma(times)
    assert torch.equal(found[0], x0)
    noise = found - alpha[:, None] * x0
    first = torch.arange(5)[:, None].minimum(torch.arange(5))
    last = torch.arange(5)[:, None].maximum(torch.arange(5))
    expected = alpha[last] / alpha[first] * sigma[first] ** 2
    scale = sigma[:, None] * sigma
    assert ((noise @ noise.T / n - expected).abs() <= 5 * 1.5 * scale / n**0.5).all()
