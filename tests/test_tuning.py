"""A solver that is chosen for a model: never worse than the default, with steps of its own, in a file that names the
model."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from common import normal

from scoresde import EDMSDE, VPSDE, DDPMChain, EpsDenoiser, FlowSDE, Grid, sample
from scoresde.analysis import Law, flow_error
from scoresde.cli import main
from scoresde.errors import CheckpointError
from scoresde.exact import Gaussian, GaussianMixture
from scoresde.solvers import DDIM, DDPM, AdaptiveODE, DPMSolverPP, UniPC
from scoresde.training import load
from scoresde.tuning import TunedSolver, choose
from scoresde.wrappers import Clip

FEW = {"solvers": (UniPC(3), DPMSolverPP(2), DDIM()), "spacings": {"uniform": Grid.uniform, "power 4": Grid.power}}
STD = torch.tensor([0.05, 0.2, 0.5, 1.0], dtype=torch.float64)
PROCESSES = {
    "vp": VPSDE(),
    "edm": EDMSDE(),
    "flow": FlowSDE(),
    "chain": DDPMChain(),
    "unit": EDMSDE(t_min=0.04, t_max=1600.0),
}


def gaussian(sde, unit=1.0):
    return Gaussian(torch.zeros(4, dtype=torch.float64), std=STD * unit).denoiser(sde)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_choice_is_no_worse_than_the_default_on_what_did_not_choose(name):
    sde = PROCESSES[name]
    denoiser = gaussian(sde, unit=20.0 if name == "unit" else 1.0)
    best = choose(denoiser, (16, 4), nfe=6, seed=1, **FEW)
    assert 0 < best.error <= best.default
    solution = sample(denoiser, (3, 4), best, nfe=6, seed=0)
    assert solution.nfe == best.nfe == 6
    assert solution.grid.times.tolist() == list(best.times)


def test_errors_are_what_the_table_says():
    """On Gaussian data the error is known in closed form. The root of the mean of 512 squares has a relative standard
    error of 3 % at most (where one direction has all of it), and 25 % is eight of them. The fine solution is nearer.
    """
    sde = VPSDE()
    best = choose(gaussian(sde), (1024, 4), nfe=8, **FEW)
    law = Law(torch.zeros(4, dtype=torch.float64), STD**2)
    expected = flow_error(best.solver.tableau(Grid(sde, best.times)), law)
    assert best.error == pytest.approx(expected, rel=0.25)


@pytest.mark.parametrize(("sde", "end"), [(VPSDE(), 1e-3), (DDPMChain(), 1.0)])
def test_it_ends_where_it_is_told_to(sde, end):
    """With noise left, nearest to the exact flow to there."""
    denoiser = gaussian(sde)
    best = choose(denoiser, (1024, 4), nfe=6, end=end, seed=1, **FEW)
    assert best.times[-1] == end
    assert 0 < best.error <= best.default
    law = Law(torch.zeros(4, dtype=torch.float64), STD**2)
    expected = flow_error(best.solver.tableau(Grid(best.sde, best.times)), law)
    assert best.error == pytest.approx(expected, rel=0.25)  # as above
    assert sample(denoiser, (2, 4), best, nfe=6, seed=2).t == end


def test_the_same_seed_chooses_the_same():
    denoiser = GaussianMixture(normal(3, 4), std=0.2).denoiser(VPSDE())
    assert choose(denoiser, (8, 4), nfe=5, **FEW) == choose(denoiser, (8, 4), nfe=5, **FEW)


def test_where_the_default_is_best_it_is_kept():
    best = choose(gaussian(VPSDE()), (8, 4), nfe=5, solvers=[UniPC(3)], spacings={})
    assert best.solver == UniPC(3)
    assert best.error == best.default
    assert best.stderr == 0


def test_conditions_go_with_their_samples():
    """D is the condition, so that any step to 0 is exact, unless a sample has another's."""
    seen = []

    def net(x, t, *, shift):
        seen.append(len(x))
        assert shift.shape == x.shape
        return (x - shift) * 0 + 1

    best = choose(EpsDenoiser(net, VPSDE()), (8, 2), nfe=5, cond={"shift": normal(8, 2, dtype=torch.float32)}, **FEW)
    assert set(seen) == {8, 4}
    assert math.isfinite(best.error)


def test_it_takes_its_own_steps_and_no_others():
    denoiser = gaussian(VPSDE())
    best = choose(denoiser, (8, 4), nfe=5, **FEW)
    for wrong in ({"nfe": 6}, {"steps": 7}, {"grid": Grid.uniform(VPSDE(), 5)}):
        with pytest.raises(ValueError, match="TunedSolver"):
            sample(denoiser, (2, 4), best, seed=0, **wrong)
    with pytest.raises(ValueError, match="was made for VPSDE"):
        sample(gaussian(EDMSDE()), (2, 4), best, nfe=5, seed=0)
    assert sample(denoiser, (2, 4), best, steps=5, seed=0).nfe == 5
    assert sample(denoiser, (2, 4), best, grid=Grid(VPSDE(), best.times), seed=0).nfe == 5


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"solvers": (DDPM(), UniPC(3))}, "draws noise"),
        ({"solvers": (AdaptiveODE(), UniPC(3))}, "no table"),
        ({"shape_or_x": (7, 4)}, "8 or more"),
        ({"nfe": 0}, "nfe"),
        ({"end": 2.0}, "expected 0 <= end < 1.0"),
        ({"end": math.nan}, "expected 0 <= end"),
        ({"default": "unipc3"}, "solver must be"),
    ],
)
def test_what_cannot_be_tried_is_refused(wrong, says):
    with pytest.raises((ValueError, TypeError), match=says):
        choose(gaussian(VPSDE()), **{"shape_or_x": (8, 4), "nfe": 5, **FEW, **wrong})


@pytest.mark.parametrize("name", PROCESSES)
def test_a_file_holds_it(name, tmp_path):
    sde, path = PROCESSES[name], tmp_path / "five.json"
    best = choose(gaussian(sde), (8, 4), nfe=5, **FEW)
    best.save(path)
    assert TunedSolver.load(path) == TunedSolver.load(path, sde) == best
    with pytest.raises(CheckpointError, match="was made for"):
        TunedSolver.load(path, VPSDE(beta_max=19.0))
    text = path.read_text()
    for damaged in (text[:-40], text.replace('"nfe": 5', '"nfe": 6'), "{}", ""):
        path.write_text(damaged)
        with pytest.raises(CheckpointError, match="damaged"):
            TunedSolver.load(path)


def test_it_names_its_model():
    denoiser = gaussian(VPSDE())
    best = choose(denoiser, (8, 4), nfe=5, **FEW)
    best.check_model(denoiser)
    with pytest.raises(ValueError, match="was made for the model"):
        best.check_model(Clip(denoiser))


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def moons(tmp_path_factory):
    """The run of a small network in the plane."""
    out = tmp_path_factory.mktemp("runs") / "moons"
    made = ["--data", "two-moons:200", "--batch-size", "8", "--device", "cpu", "--quiet", "--steps", "3"]
    assert main(["train", *made, "--set", "model.options={width = 16, depth = 1}", "--out", str(out)]) == 0
    return out


def test_sample_takes_what_was_chosen_for_the_run(moons, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw = ["sample", str(moons), "--n", "4", "--nfe", "3", "--out", "s.npz", "--device", "cpu"]

    def used(*more):
        assert main([*draw, *more]) == 0
        return capsys.readouterr()

    assert "Adams(" in used().out
    first = used("--solver", "chosen")
    assert "TunedSolver(" in first.out
    assert "from the model's fine solution" in first.err
    file = moons / "tuned" / "nfe-3.json"
    assert TunedSolver.load(file).nfe == 3
    monkeypatch.setattr("scoresde.cli.chosen.choose", lambda *_, **__: pytest.fail("chosen again"))
    assert "TunedSolver(" in used("--solver", "chosen").out
    assert "TunedSolver(" in used().out
    assert "UniPC(" in used("--solver", "unipc3").out
    assert "TunedSolver(" not in used("--grid", "uniform").out
    assert main(["sample", str(moons), "--n", "4", "--solver", str(file), "--out", "s.npz", "--device", "cpu"]) == 0
    capsys.readouterr()
    for wrong, says in (
        (["--solver", "chosen", "--grid", "uniform"], "steps of its own"),
        (["--solver", str(file), "--nfe", "4"], "steps of its own"),
        (["--solver", "none.json"], "none.json"),
    ):
        assert main([*(word for word in draw if word not in ("--nfe", "3") or wrong[-2] != "--nfe"), *wrong]) != 0
        assert says in capsys.readouterr().err


def test_compare_chooses_on_the_way(moons, tmp_path, capsys):
    out = tmp_path / "race"
    race = [
        "compare",
        str(moons),
        "--solvers",
        "ddim",
        "chosen",
        "--nfe",
        "4",
        "--n",
        "20",
        "--device",
        "cpu",
        "--quiet",
    ]
    assert main([*race, "--data", "two-moons:100", "--features", "pixels", "--out", str(out)]) == 0
    assert "chosen" in (out / "README.md").read_text()
    assert (moons / "tuned" / "nfe-4.json").exists()


def test_compare_takes_a_solvers_file(moons, tmp_path, capsys):
    """At its own budget; made anew, its cell is too; a file of another model is refused before anything is run."""
    five, out = tmp_path / "five.json", tmp_path / "race"
    best = choose(load(moons), (16, 2), nfe=5, reference_nfe=40, **FEW)
    best.save(five)
    race = [
        "compare",
        str(moons),
        "--solvers",
        str(five),
        "ddim",
        "--nfe",
        "5",
        "--n",
        "20",
        "--device",
        "cpu",
        "--quiet",
    ]
    race += ["--data", "two-moons:100", "--features", "pixels", "--out", str(out)]

    def cell():
        assert main(race) == 0
        capsys.readouterr()
        found = [json.loads(line) for line in (out / "cells.jsonl").read_text().splitlines()]
        return [one["scores"] for one in found if one.get("solver") == str(five)]

    assert len(cell()) == len(cell()) == 1
    replace(best, solver=DDIM()).save(five)
    assert len(set(map(str, cell()))) == 2
    replace(best, model="another").save(five)
    assert main(race) != 0
    assert "another" in capsys.readouterr().err
