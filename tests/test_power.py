"""Power averages: any length afterwards is what direct averaging at that length gives, whatever happened to the run."""

from __future__ import annotations

import math
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import scoresde
from scoresde.cli import main
from scoresde.training import CheckpointError, ModelConfig, TrainConfig, Trainer
from scoresde.training.average import Average
from scoresde.training.export import export
from scoresde.training.folder import checkpoints
from scoresde.training.power import LONGEST, Profile, combination, exponent, inner, kept, length_of
from scoresde.training.snapshots import averaged

MODEL = ModelConfig(network="mlp", options={"event_shape": 2, "width": 16}, predicts="v", time_scale=999)
DATA = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
LENGTHS = (0.03, 0.05, 0.07, 0.1, 0.15, 0.2)
CONFIG = TrainConfig(steps=400, batch_size=16, lr=1e-2, power=(0.05, 0.1), snapshot_every=20, threads=1, log_every=400)


def trainer(folder=None, steps=400, data=DATA, **changes):
    return Trainer(MODEL.build(0), data, replace(CONFIG, steps=steps, **changes), folder=folder, model=MODEL)


def vector(net):
    return torch.cat([value.double().flatten() for value in net.state_dict().values()])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("power") / "run"
    trainer(folder).fit(progress=False)
    return folder


# --- the profiles ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1e-3, 0.01, 0.05, 0.1, 0.2, LONGEST])
def test_length_and_exponent(length):
    gamma = exponent(length)
    assert gamma >= 0
    assert math.isclose(length_of(gamma), length, rel_tol=1e-12)
    # It is the standard deviation of tau / t under the profile, by quadrature.
    nodes, weights = np.polynomial.legendre.leggauss(600)
    u = (nodes + 1) / 2
    p = weights / 2 * (gamma + 1) * u**gamma
    mean = (p * u).sum()
    assert math.isclose(((p * (u - mean) ** 2).sum()) ** 0.5, length, rel_tol=1e-6)


@pytest.mark.parametrize("length", [0.0, -0.1, 0.2887, math.nan, math.inf])
def test_other_lengths_are_refused(length):
    with pytest.raises(ValueError, match="expected a number in"):
        exponent(length)
    with pytest.raises(ValueError, match="power average"):
        TrainConfig(steps=1, power=(0.05, length))


def test_inner_products():
    """Against quadrature, up to the shorter of the two."""
    nodes, weights = np.polynomial.legendre.leggauss(400)
    profiles = [Profile(gamma, t) for gamma in (0.0, 1.8, 6.94, 16.97) for t in (30.0, 100.0)]
    for a in profiles:
        for b in profiles:
            t = min(a.t, b.t)
            tau = (nodes + 1) / 2 * t
            pa, pb = ((p.gamma + 1) * tau**p.gamma / p.t ** (p.gamma + 1) for p in (a, b))
            assert math.isclose(inner(a, b), (weights / 2 * t * pa * pb).sum(), rel_tol=1e-6)


@pytest.mark.parametrize("length", [0.02, 0.1, LONGEST])
def test_each_step_has_the_share_that_the_profile_gives_it(length):
    """After t updates step i has its integral over (i - 1, i]: beta's recursion is the formula, exactly."""
    net, gamma, T = nn.Linear(1, 50, bias=False).double(), exponent(length), 50
    average = Average(nn.Linear(1, T, bias=False).double(), lambda n: kept(gamma, n))
    for n in range(T):
        with torch.no_grad():
            net.weight.zero_()[n] = 1.0  # the unit vector of step n + 1
        average.update(net, n)
    edges = (torch.arange(T + 1, dtype=torch.float64) / T) ** (gamma + 1)
    assert torch.allclose(average.module.weight[:, 0], edges.diff(), rtol=1e-10, atol=1e-15)


def test_combinations():
    """A profile that is there is taken alone; of others, the miss is that of the profile and falls with the number of
    snapshots as its square; the shares sum to one."""
    T = 4000
    for length in (0.03, 0.07, 0.15, 0.2):
        wanted, before = Profile(exponent(length), T), math.inf
        for K in (8, 16, 32, 64):
            there = [Profile(exponent(s), T * (k + 1) / K) for k in range(K) for s in (0.05, 0.1)]
            x, missed = combination(there, wanted)
            assert abs(float(x.sum()) - 1) < 1e-12
            tau = (torch.arange(19_200, dtype=torch.float64) + 0.5) * T / 19_200
            made = sum(
                share * (p.gamma + 1) / p.t * (tau / p.t) ** p.gamma * (tau < p.t)
                for share, p in zip(x.tolist(), there, strict=True)
            )
            p = (wanted.gamma + 1) / T * (tau / T) ** wanted.gamma
            assert math.isclose(float((made - p).norm() / p.norm()), missed, rel_tol=2e-2)
            assert missed < before / 1.9
            before = missed
            x, missed = combination(there, there[5])
            assert missed == 0.0
            assert x.tolist() == [float(i == 5) for i in range(2 * K)]


# --- a run -----------------------------------------------------------------------------------------------------------


def test_any_length_is_that_of_direct_averaging(run, tmp_path):
    """Those that were kept to the last bit. Others within 6e-2, and with four times as many snapshots 2e-3, of how far
    the kept averages are apart: the miss of the profiles falls with the square of the spacing, and that of the weights,
    which move smoothly but for their noise, faster."""
    direct = trainer(power=LENGTHS, ema_decay=0.9).fit(progress=False)
    trainer(dense := tmp_path / "dense", snapshot_every=5).fit(progress=False)
    assert [p.name for p in checkpoints(run / "snapshots")] == [f"{n:08d}" for n in range(400, 0, -20)]
    for folder, share in ((run, 6e-2), (dense, 2e-3)):
        found = {s: vector(averaged(folder, s).net) for s in LENGTHS}
        moved = (found[0.05] - found[0.1]).norm()
        for average, length in zip(direct.averages[1:], LENGTHS, strict=True):
            apart = (vector(average.module) - found[length]).norm()
            assert apart == 0 if length in CONFIG.power else apart < share * moved
        # What was kept is what `load` reads.
        for i, length in enumerate(CONFIG.power, 1):
            assert torch.equal(vector(scoresde.load(folder, i).net), found[length])


def test_weights_do_not_depend_on_it(run):
    plain = trainer(power=()).fit(progress=False)
    assert torch.equal(vector(scoresde.load(run, None).net), vector(plain.net))
    assert torch.equal(vector(scoresde.load(run).net), vector(plain.averages[0].module))


def test_a_run_that_was_killed_has_the_same(run, tmp_path):
    """Killed between a snapshot and its checkpoint, with one that is half written, and gone on with."""
    here = tmp_path / "run"
    trainer(here, steps=150, checkpoint_every=30, schedule="constant").fit(progress=False)
    whole = tmp_path / "whole"
    trainer(whole, steps=200, schedule="constant").fit(progress=False)
    for path in checkpoints(here)[:1]:
        shutil.rmtree(path)  # at 150; the run is at 120, and has snapshots at 140 and 150
    (here / "snapshots/checkpoints/00000140/average-1.safetensors").write_bytes(b"half")
    (here / "snapshots/checkpoints/.00000160.1.partial").mkdir()
    trainer(here, steps=200, schedule="constant").fit(progress=False)
    assert [p.name for p in checkpoints(here / "snapshots")] == sorted(
        [*(f"{n:08d}" for n in range(20, 201, 20)), "00000150"], reverse=True
    )
    shutil.rmtree(here / "snapshots/checkpoints/00000150")  # which the whole run has not
    assert not list((here / "snapshots/checkpoints").glob(".*"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for length in LENGTHS:
            assert torch.equal(vector(averaged(here, length).net), vector(averaged(whole, length).net))


def test_an_earlier_checkpoint_has_its_own(run, tmp_path):
    """Up to its step, whatever came later."""
    here = shutil.copytree(run, tmp_path / "run")
    trainer(tmp_path / "short", steps=100, schedule="constant").fit(progress=False)
    trainer(tmp_path / "long", steps=200, schedule="constant", checkpoint_every=100).fit(progress=False)
    early = tmp_path / "long" / "checkpoints" / "00000100"
    assert torch.equal(vector(averaged(early, 0.15).net), vector(averaged(tmp_path / "short", 0.15).net))
    assert not torch.equal(vector(averaged(here, 0.15).net), vector(averaged(early, 0.15).net))


def test_what_is_damaged_or_of_another_run_is_passed_over(run, tmp_path):
    here = shutil.copytree(run, tmp_path / "run")
    trainer(other := tmp_path / "other", steps=40, data=DATA + 1).fit(progress=False)
    place = here / "snapshots/checkpoints"
    (place / "00000200/average-1.safetensors").write_bytes(b"no")
    shutil.rmtree(place / "00000040")
    shutil.copytree(other / "snapshots/checkpoints/00000040", place / "00000040")
    with pytest.warns(UserWarning, match="passed over") as caught:
        found = averaged(here, 0.15)
    assert [str(w.message).partition(" ")[0].split("/")[-1] for w in caught] == ["00000040", "average-1.safetensors"]
    expected = vector(averaged(run, 0.15).net)
    assert (vector(found.net) - expected).norm() < 1e-2 * (expected - vector(averaged(run, 0.05).net)).norm()


def test_too_few_snapshots_are_told(run, tmp_path):
    here = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(here / "snapshots")
    with pytest.warns(UserWarning, match="of its profile"):
        averaged(here, 0.25)
    with pytest.warns(UserWarning, match="of its profile"):
        averaged(here, 0.01)


def test_a_run_without_them_says_so(tmp_path):
    trainer(tmp_path, steps=2, power=()).fit(progress=False)
    assert not (tmp_path / "snapshots").exists()
    with pytest.raises(CheckpointError, match=r"TrainConfig\(power="):
        averaged(tmp_path, 0.1)


def test_a_denoiser_that_the_checkpoint_does_not_describe(run, tmp_path):
    given = Trainer(MODEL.build(0), DATA, CONFIG, folder=tmp_path).fit(progress=False).denoiser
    before = vector(given.net)
    found = averaged(tmp_path, 0.07, given)
    assert torch.equal(vector(found.net), vector(averaged(run, 0.07).net))
    assert torch.equal(vector(given.net), before)


class Counting(nn.Module):
    """With a buffer of whole numbers, and one that never changes."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("fixed", torch.tensor([1e3, 0.1]))

    def forward(self, x, time):
        self.count += 1
        return self.layer(x)


def test_buffers(tmp_path):
    denoiser = scoresde.EpsDenoiser(Counting(), scoresde.VPSDE())
    Trainer(denoiser, DATA, replace(CONFIG, steps=100), folder=tmp_path).fit(progress=False)
    net = averaged(tmp_path, 0.07, denoiser).net
    assert int(net.count) == int(denoiser.net.count)
    assert torch.allclose(net.fixed, denoiser.net.fixed, rtol=1e-6, atol=0)


def test_export(run, tmp_path):
    assert main(["export", str(run), "--out", str(tmp_path / "a"), "--length", "0.15"]) == 0
    out = export(run, tmp_path / "b", length=0.15)
    expected = vector(averaged(run, 0.15).net)
    for folder in (tmp_path / "a", out):
        assert torch.equal(vector(scoresde.load(folder).net), expected)
    assert main(["export", str(run), "--out", str(tmp_path / "c"), "--length", "0.5"]) == 2
