"""diagnose() passes what is wired rightly and flags every wiring that makes dim or noisy samples elsewhere."""

from __future__ import annotations

import pytest
import torch
from common import SDES, generator, network_for

from scoresde import VESDE, VPSDE, EpsDenoiser, ScoreDenoiser, VDenoiser, X0Denoiser, diagnose
from scoresde.exact import GaussianMixture

TARGET = GaussianMixture(means=[[-1.0, 0.5], [1.0, -0.5]], std=0.3)
DATA = TARGET.sample(2000, generator(0))


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
