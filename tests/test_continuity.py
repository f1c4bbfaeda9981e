"""A network whose time label is in steps is noticed before the first step of an adaptive solve, and a table taken."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from common import SDES, generator, normal
from torch import Tensor

from scoresde import (
    EDMSDE,
    VPSDE,
    Clip,
    DDPMChain,
    EDMDenoiser,
    EpsDenoiser,
    Grid,
    X0Denoiser,
    bits_per_dim,
    decode,
    encode,
    log_prob,
    sample,
)
from scoresde.continuity import in_steps
from scoresde.exact import GaussianMixture
from scoresde.guidance import ClassifierFree
from scoresde.solvers import AdaptiveODE, UniPC

CHAIN = DDPMChain()
TARGET = GaussianMixture(means=[[-1.0, 0.5], [1.0, -0.5]], std=0.3)
EXACT = TARGET.denoiser(CHAIN)
X = TARGET.sample(4, generator(0), torch.float64)


class Net:
    """The exact noise of a chain for labels from 0, and a count of its calls."""

    def __init__(self, rounds: bool = False, reuses: bool = False) -> None:
        self.rounds, self.reuses, self.calls, self.memory = rounds, reuses, 0, torch.empty(0)

    def __call__(self, x: Tensor, label: Tensor, **cond: Tensor) -> Tensor:
        self.calls += 1
        out = EXACT.eps(x, ((label.round() if self.rounds else label) + 1).double())
        if self.reuses and self.memory.shape == out.shape:
            return self.memory.copy_(out)
        self.memory = out
        return out


def whole(t: Tensor) -> Tensor:
    return t.round().long() - 1


def found_in(denoiser, x=X, budget=math.inf):
    sde = denoiser.sde
    return in_steps(denoiser, x, sde.t_max, [sde.t_max, sde.t_min], None, budget)


def refuse(x, label, **cond):
    raise AssertionError("the network is not asked")


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
def test_labels_in_steps_are_found_without_a_call(sde):
    """Rounded in any way, wrapped in anything; those that are continuous, saturated or constant are not."""
    for label in (
        lambda t: (999 * t / sde.t_max).round().long(),
        lambda t: (t / sde.t_max * 250).floor(),
        lambda t: (t / sde.t_max).half(),
        lambda t: torch.stack([t, (300 * t / sde.t_max).ceil() * sde.t_max], -1).round(),
    ):
        denoiser = X0Denoiser(refuse, sde, time=label)
        for wrapped in (denoiser, Clip(denoiser), ClassifierFree(Clip(denoiser), 2.0)):
            found = found_in(wrapped)
            assert "label" in found.found
            assert found.calls == 0
    for label in (
        None,
        lambda t: 999 * t,
        lambda t: (t / sde.t_max).float() * 999,
        lambda t: t - 1,
        lambda t: sde.sigma(t).log() / 4,
        lambda t: sde.half_log_snr(t).clamp(-3, 3),
        lambda t: t.clamp(max=sde.t_max / 2),
        torch.zeros_like,
        lambda t: torch.zeros(1),
        lambda t: torch.stack([t, t**2], -1),
    ):
        assert not found_in(X0Denoiser(lambda x, n: x + n.reshape(len(n), -1)[:, :1], sde, time=label)).found
    assert not found_in(EDMDenoiser(lambda x, n: x + n[:, None], sde)).found


def test_what_rounds_inside_is_found_in_its_output():
    for reuses in (False, True):
        for rounds in (False, True):
            net = Net(rounds, reuses)
            found = found_in(EpsDenoiser(net, CHAIN, time=CHAIN.label))
            assert bool(found.found) == rounds
            assert found.calls == net.calls == 2 + 2 * rounds
    assert found_in(X0Denoiser(lambda x, n: x / 2, VPSDE())).found == ""  # it takes no time at all
    assert found_in(EpsDenoiser(Net(rounds=True), CHAIN, time=CHAIN.label), budget=10) == ("", 0)


def test_looking_leaves_no_trace():
    """Random networks give other bits each time: nothing is claimed of them, and the global generator stays."""
    torch.manual_seed(0)
    before, x = torch.get_rng_state(), X.clone().requires_grad_()
    seen = []

    def net(x, n):
        seen.append(torch.is_grad_enabled() or x.requires_grad)
        return torch.nn.functional.dropout(x + n.round()[:, None], 0.5, training=True)

    assert found_in(X0Denoiser(net, CHAIN), x).found == ""
    assert torch.equal(torch.get_rng_state(), before)
    assert len(seen) == 2
    assert not any(seen)


def test_the_label_of_a_chain_is_the_row_at_its_nodes():
    for sde in SDES.values():
        if isinstance(sde, DDPMChain):
            assert torch.equal(sde.label(sde.nodes), whole(sde.nodes).double())


@pytest.mark.parametrize("kind", ["label", "output"])
def test_log_prob_takes_the_table(kind):
    """With a warning, and what it costs is what the network saw; asked for tolerances it goes on, with a warning."""
    net = Net(rounds=kind == "output")
    denoiser = EpsDenoiser(net, CHAIN, time=whole if kind == "label" else CHAIN.label)
    with pytest.warns(UserWarning, match=f"{kind} of EpsDenoiser.*in steps.*100 steps of UniPC.*DDPMChain.label"):
        found = log_prob(denoiser, X, divergence="exact")
    assert found.nfe == net.calls == 100 + 4 * (kind == "output")
    table = log_prob(denoiser, X, divergence="exact", steps=100)
    assert torch.equal(found.value, table.value)
    net.calls = 0
    with pytest.warns(UserWarning, match="in steps.*give steps="):
        found = log_prob(denoiser, X, divergence="exact", rtol=0.01, atol=0.01)
    assert found.nfe == net.calls
    with pytest.warns(UserWarning, match="in steps.*give steps="):
        log_prob(denoiser, X, t=250.5, rtol=0.01, atol=0.01, divergence="exact")


def test_a_float_label_stays_adaptive_and_agrees():
    """The label t - 1 has the integer label's values at the nodes, where the table evaluates: the same numbers; and the
    adaptive solve, which counts what it looked at, agrees to the two errors.
    """
    net = Net()
    denoiser = EpsDenoiser(net, CHAIN, time=CHAIN.label)
    found = log_prob(denoiser, X, divergence="exact")
    assert found.nfe == net.calls != 100
    table = log_prob(denoiser, X, divergence="exact", steps=100)
    assert torch.equal(
        table.value, log_prob(EpsDenoiser(net, CHAIN, time=whole), X, divergence="exact", steps=100).value
    )
    assert float((found.value - table.value).abs().max()) < 1e-3


def test_bits_per_dim_takes_the_table():
    images = torch.tensor([[3, 200], [250, 7]], dtype=torch.uint8)
    denoiser = EpsDenoiser(Net(), CHAIN, time=whole)
    for noise in ("uniform", "truncated-normal"):
        with pytest.warns(UserWarning, match="steps of UniPC"):
            found = bits_per_dim(denoiser, images, divergence="exact", dequantize=noise, seed=0)
        assert found.nfe == 100


@pytest.mark.parametrize("sde", [CHAIN, DDPMChain.linear(30, 0.003, 0.3), VPSDE(), EDMSDE()], ids=repr)
def test_encoding_takes_the_table(sde):
    """Of as many steps as a chain has; the latent is that of the table of `log_prob` on its own grid, and goes back."""
    exact, calls = TARGET.denoiser(sde), []

    def label(t):
        return t.round().long() if sde.nodes is not None else (t / sde.t_max * 5000).round()

    def net(x, n):
        calls.append(1)
        return exact(x, n.double().clamp(min=1e-3) * (1 if sde.nodes is not None else sde.t_max / 5000)).mean

    denoiser = X0Denoiser(net, sde, time=label)
    with pytest.warns(UserWarning, match="label.*in steps.*steps of UniPC"):
        code = encode(denoiser, X)
    assert code.nfe == len(calls) == min(100, sde.most_steps - 1)
    assert torch.equal(
        code.latent, encode(denoiser, X, UniPC(3, view="v", variable="half_log_snr"), steps=code.nfe).latent
    )
    with pytest.warns(UserWarning, match="in steps"):
        back = decode(denoiser, code.latent, grid=code.grid)
    assert float((back.x - X).abs().max()) < 0.2
    with pytest.warns(UserWarning, match="in steps"):
        assert encode(denoiser, X, nfe=12).nfe == 11


def test_the_table_reports_at_the_times_of_the_grid():
    denoiser, x_T = EpsDenoiser(Net(), CHAIN, time=whole), normal(4, 2)
    grid = Grid(CHAIN, [1000, 700, 250, 0])
    with pytest.warns(UserWarning, match="in steps"):
        solution = sample(denoiser, x_T, AdaptiveODE(jumps="table"), grid=grid, trajectory=True)
    assert solution.status == "complete"
    assert len(solution.trajectory) == 4
    for x, t in zip(solution.trajectory[1:3], (700.0, 250.0), strict=True):
        assert float((x - flow(x_T, t)).abs().max()) < 1e-3
    with pytest.warns(UserWarning, match="jumps='table'"):
        adaptive = sample(denoiser, x_T, AdaptiveODE(rtol=1e-3, atol=1e-3), grid=grid)
    assert adaptive.nfe != solution.nfe
    assert float((adaptive.x - solution.x).abs().max()) < 0.05


def flow(x_T, t):
    return sample(EXACT, x_T, AdaptiveODE(rtol=1e-7, atol=1e-7), grid=Grid(CHAIN, [1000, t])).x


def test_no_look_where_no_adaptive_solve_is_asked_for():
    net = Net(rounds=True)
    denoiser = EpsDenoiser(net, CHAIN, time=CHAIN.label)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(denoiser, (2, 2), UniPC(3), steps=5, seed=0)
        log_prob(denoiser, X, steps=10, seed=0)
    assert net.calls == 15


def test_samples_with_their_density_warn_too():
    denoiser = EpsDenoiser(Net(rounds=True), CHAIN, time=CHAIN.label)
    with pytest.warns(UserWarning, match="in steps"):
        found = sample(denoiser, X, AdaptiveODE(rtol=1e-2, atol=1e-2), log_prob="exact")
    assert found.nfe == denoiser.net.calls
