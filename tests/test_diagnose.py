"""diagnose() passes what is wired rightly and flags every wiring that makes dim or noisy samples elsewhere."""

from __future__ import annotations

import pytest
import torch
from common import SDES, generator, network_for

from scoresde import (
    EDMSDE,
    VESDE,
    VPSDE,
    CosineVPSDE,
    DDPMChain,
    EpsDenoiser,
    FlowSDE,
    ScoreDenoiser,
    SubVPSDE,
    VDenoiser,
    X0Denoiser,
    diagnose,
)
from scoresde import SDES as MAKERS
from scoresde.diagnose import left_of_data
from scoresde.exact import Gaussian, GaussianMixture

TARGET = GaussianMixture(means=[[-1.0, 0.5], [1.0, -0.5]], std=0.3)
DATA = TARGET.sample(2000, generator(0))
SDES_OF = {name: make() for name, make in MAKERS.items()}


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
def test_the_exact_denoiser_is_plausible(sde):
    """It is the best of all guesses, so also of the linear ones; 1.1 is many standard errors of 4,000 numbers."""
    found = diagnose(TARGET.denoiser(sde), DATA)
    assert not found.suspicious
    assert float(found.ratio.max()) < 1.1
    assert "plausible" in repr(found)


def test_the_linear_bound_is_reached_by_the_linear_guess():
    """Against itself the best linear guess scores 1, within six standard errors of 4,000 squared numbers."""
    mean, variance = DATA.mean(0), float((DATA - DATA.mean(0)).square().mean())

    def wiener(x, t):
        s2 = (-2 * VPSDE().half_log_snr(t))[:, None].exp()
        return (mean + variance / (variance + s2) * (x / VPSDE().alpha(t)[:, None] - mean)).float()

    found = diagnose(X0Denoiser(wiener, VPSDE()), DATA)
    assert float((found.ratio - 1).abs().max()) < 6 * (2 / 4000) ** 0.5


MISTAKES = {
    "sign": lambda exact: EpsDenoiser(lambda x, t: -exact.eps(x, t), VPSDE()),
    "eps taken for x0": lambda exact: X0Denoiser(network_for(exact, "eps"), VPSDE()),
    "x0 taken for eps": lambda exact: EpsDenoiser(network_for(exact, "x0"), VPSDE()),
    "eps taken for v": lambda exact: VDenoiser(network_for(exact, "eps"), VPSDE()),
    "eps taken for the score": lambda exact: ScoreDenoiser(network_for(exact, "eps"), VPSDE()),
    "label not scaled": lambda exact: EpsDenoiser(lambda x, n: exact.eps(x, n / 999), VPSDE()),
    "label scaled twice": lambda exact: EpsDenoiser(
        lambda x, n: exact.eps(x, n.clamp(max=1)), VPSDE(), time=lambda t: 999 * t
    ),
    "another SDE": lambda exact: EpsDenoiser(lambda x, t: exact.eps(x, t), VESDE()),
    "NaN": lambda exact: EpsDenoiser(lambda x, t: x * float("nan"), VPSDE()),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_suspicious(mistake):
    found = diagnose(MISTAKES[mistake](TARGET.denoiser(VPSDE())), DATA)
    assert found.suspicious
    assert "worse than linear" in repr(found)


WIRED = {
    "chain": ("cosine-chain", lambda t: t - 1, lambda n: n + 1),
    "cosine-chain": ("chain", lambda t: t.round().long() - 1, lambda n: n + 1),
    "vp": ("cosine", lambda t: 999 * t, lambda n: n / 999),
    "cosine": ("vp", None, lambda n: n),
    "flow": ("vp", None, lambda n: n),
    "subvp": ("vp", None, lambda n: n),
}


@pytest.mark.parametrize("name", WIRED)
def test_a_schedule_of_another_name_is_told_its_own(name):
    """An exact network of one schedule, wired with another: its own is named; and wired rightly nothing is."""
    true, label, time = WIRED[name]
    exact = TARGET.denoiser(SDES_OF[true])
    net = lambda x, n: exact.eps(x, time(n.double()).clamp(exact.sde.t_min, exact.sde.t_max))  # noqa: E731
    found = diagnose(EpsDenoiser(net, SDES_OF[name], time=label), DATA)
    assert found.better.startswith(f"better with the SDE {true!r}")
    assert found.suspicious
    assert found.better in repr(found)
    assert diagnose(EpsDenoiser(net, SDES_OF[true], time=label), DATA).better == ""


@pytest.mark.parametrize("integer", [False, True])
@pytest.mark.parametrize("off", [-1, 0, 1])
def test_a_label_off_by_one_is_told(off, integer):
    """1500 items of 256 numbers, of which the formula expects more than eight standard errors; where the label is right
    none of 4 draws of the noise says otherwise, which is five standard errors the other way.
    """
    target, chain = Gaussian(torch.zeros(256), std=torch.logspace(-1, 0, 256)), DDPMChain()
    exact, data = target.denoiser(chain), target.sample(1500, generator(1))

    def net(x, n):
        return exact.eps(x, (n.double() + 1 + off).clamp(1, 1000))

    denoiser = EpsDenoiser(net, chain, time=(lambda t: t.round().long() - 1) if integer else chain.label)
    if off:
        word = "larger" if off < 0 else "smaller"
        assert diagnose(denoiser, data).better.startswith(f"better with time labels {word} by 1")
    else:
        assert [diagnose(denoiser, data[:300], seed=seed).better for seed in range(4)] == [""] * 4


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
def test_a_network_that_is_wired_rightly_is_told_nothing(sde):
    exact = TARGET.denoiser(sde)
    for denoiser in (
        X0Denoiser(network_for(exact, "x0"), sde),
        X0Denoiser(lambda x, lam: exact(x, sde.time_at(lam.double())).mean, sde, time=sde.half_log_snr),
        X0Denoiser(lambda x, t: x / 2, sde, time=torch.zeros_like),
        X0Denoiser(lambda x, t: x / 2, sde, time=lambda t: torch.stack([t, t], -1)),
    ):
        assert diagnose(denoiser, DATA).better == ""


def test_data_in_another_range_is_suspicious():
    assert diagnose(TARGET.denoiser(VPSDE()), (DATA + 1) / 2 * 255).suspicious


def test_it_leaves_the_global_generator_and_reproduces():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a, b = (diagnose(TARGET.denoiser(VPSDE()), DATA) for _ in range(2))
    assert torch.equal(a.error, b.error)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("data", [DATA.to(torch.uint8), DATA[:1], DATA * float("nan")])
def test_bad_data_is_refused(data):
    with pytest.raises(ValueError, match="x0"):
        diagnose(TARGET.denoiser(VPSDE()), data)


def test_a_schedule_that_never_reaches_noise_is_told():
    """Of whatever kind, by alpha / sigma in the units of the data; building one is silent."""
    short = {
        "chain": DDPMChain.linear(10),
        "vp": VPSDE(beta_max=1.0),
        "subvp": SubVPSDE(beta_max=1.0),
        "cosine": CosineVPSDE(t_max=0.5),
        "flow": FlowSDE(t_max=0.5),
        "ve": VESDE(sigma_max=2.0),
        "edm": EDMSDE(t_max=2.0),
    }
    for name, sde in short.items():
        found = diagnose(TARGET.denoiser(sde), DATA, levels=2)
        assert "sampling begins with noise alone" in repr(found), name
        assert not found.suspicious, name
    for sde in SDES.values():
        assert left_of_data(sde, 1.0) is None
    assert left_of_data(EDMSDE(), 128.0) is not None
