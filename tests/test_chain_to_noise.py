"""Chains whose last node is pure noise (beta_N = 1), under x0, v and velocity networks: training, sampling, likelihood,
against Gaussian data, whose answers are known.
"""

from __future__ import annotations

import math

import pytest
import torch
from common import generator, network_for, normal

from scoresde import DDPMChain, EpsDenoiser, Grid, VDenoiser, VelocityDenoiser, X0Denoiser, elbo, log_prob, sample
from scoresde.analysis import gaussian_law, marginal, w2
from scoresde.exact import Gaussian
from scoresde.nn import MLP
from scoresde.solvers import DDIM, DDPM
from scoresde.training import ImportanceTimes, LogNormalTimes, TrainConfig, Trainer, likelihood, min_snr, uniform_in

CHAIN = DDPMChain.cosine(40, max_beta=1.0)
MEAN, STD = 0.3, 0.7
TARGET = Gaussian(mean=torch.full((2,), MEAN, dtype=torch.float64), std=STD)
NETWORKS = {"x0": X0Denoiser, "v": VDenoiser, "velocity": VelocityDenoiser}

networks = pytest.mark.parametrize("view", NETWORKS)


def model(view):
    return NETWORKS[view](network_for(TARGET.denoiser(CHAIN), view), CHAIN)


def textbook_law(betas, eta):
    """Mean and variance of DDIM's output (Song, Meng and Ermon, 2021, eq. 12 and 16), eta = 1 being DDPM's."""
    abar = [1.0, *(1 - betas).cumprod(0).tolist()]
    m, v = 0.0, 1.0
    for n in range(len(betas), 0, -1):
        a, b = abar[n], abar[n - 1]
        c2 = eta**2 * (1 - b) / (1 - a) * (1 - a / b)
        direction, gain = math.sqrt((1 - b - c2) / (1 - a)), math.sqrt(a) * STD**2 / (a * STD**2 + 1 - a)
        D = MEAN + gain * (m - math.sqrt(a) * MEAN)
        m = math.sqrt(b) * D + direction * (m - math.sqrt(a) * D)
        v = (math.sqrt(b) * gain + direction * (1 - math.sqrt(a) * gain)) ** 2 * v + c2
    return m, v


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ancestral_sampling_has_the_law_of_the_paper(eta):
    for chain in (CHAIN, DDPMChain([0.1, 0.3, 1.0]), DDPMChain([1.0])):
        for solver in (DDIM(eta), *([DDPM()] if eta == 1 else [])):
            law, (m, v) = (
                gaussian_law(solver.tableau(Grid.strided(chain, chain.steps)), TARGET),
                textbook_law(chain.betas, eta),
            )
            torch.testing.assert_close(law.mean, torch.full_like(law.mean, m), rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(law.variances, torch.full_like(law.mean, v), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("solver", [DDIM(), DDPM(), DDPM("beta")], ids=["ddim", "ddpm", "beta"])
def test_the_samples_tend_to_the_data_from_pure_noise(solver):
    """To no distance at all, at first order: x_T holds nothing of the data, so no error is left at that end."""

    def distance(N):
        chain = DDPMChain.cosine(N, max_beta=1.0)
        table = solver.tableau(Grid.strided(chain, N))
        return w2(gaussian_law(table, TARGET), marginal(TARGET, chain, 0.0))

    assert distance(2000) < 0.6 * distance(1000) < 2e-3


@networks
def test_networks_sample_that_law(view):
    """The standard error of the mean of 20,000 is STD / 141, that of the standard deviation STD / 200: five of them."""
    m, v = textbook_law(CHAIN.betas, 1.0)
    x = sample(model(view), (10_000, 2), DDPM(), steps=40, generator=generator(0)).x.double().flatten()
    assert abs(float(x.mean()) - m) < 5 * math.sqrt(v / 20_000)
    assert abs(float(x.std()) - math.sqrt(v)) < 5 * math.sqrt(v / 40_000)


@networks
def test_the_likelihood_is_exact(view):
    """By the ODE, at the first node; by the chain's bound with the variance that makes it exact, but for its decoder's
    at that node; and in continuous time."""
    x = TARGET.sample(100, generator(1), torch.float64)
    found = log_prob(model(view), x[:8], divergence="exact", t=1.0)
    torch.testing.assert_close(found.value, TARGET.log_prob(x[:8], sde=CHAIN, t=1.0), rtol=0, atol=1e-4)
    alpha, sigma = float(CHAIN.alpha(1)), float(CHAIN.sigma(1))
    decoder = STD * sigma / math.hypot(alpha * STD, sigma)
    exact = TARGET.denoiser(CHAIN)
    bounds = {
        "chain": elbo(exact, x, DDPM(), Grid.strided(CHAIN, 40), variance="posterior", decoder=decoder, seed=0),
        "continuous": elbo(model(view), x, decoder=decoder, draws=64, seed=0),
    }
    for bound in bounds.values():
        gap = (TARGET.log_prob(x) - bound.value).mean()
        assert abs(float(gap)) <= 5 * float(bound.stderr.norm()) / 100 + 1e-3
    plain = [elbo(d, x, DDPM(), Grid.strided(CHAIN, 40), seed=0).value for d in (exact, model(view))]
    torch.testing.assert_close(plain[1], plain[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("view", "weighting"), [("x0", uniform_in("x0")), ("v", min_snr(5.0)), ("velocity", likelihood)]
)
def test_networks_are_trained_to_the_last_node(view, weighting):
    x0 = TARGET.sample(64, generator(2), torch.float32)
    denoiser = NETWORKS[view](MLP((2,), width=16, depth=1), CHAIN)
    config = TrainConfig(steps=20, batch_size=80, log_every=1)
    trainer = Trainer(denoiser, x0, config, weighting=weighting).fit(progress=False)
    assert all(math.isfinite(loss) for _, loss in trainer.losses)
    assert bool(sample(trainer.ema, (4, 2), DDPM(), steps=40, seed=0).x.isfinite().all())
    t = LogNormalTimes().draw(CHAIN, 100, generator(3))
    assert float(t.max()) <= CHAIN.t_max
    with pytest.raises(ValueError, match="half_log_snr is -inf"):
        ImportanceTimes().draw(CHAIN, 4, generator())


def test_eps_networks_are_refused():
    denoiser, x, grid = EpsDenoiser(MLP((2,), width=16, depth=1), CHAIN), normal(4, 2), Grid.strided(CHAIN, 40)
    for call in (
        lambda: Trainer(denoiser, x.float(), TrainConfig(steps=1)),
        lambda: sample(denoiser, (4, 2), DDPM(), steps=40),
        lambda: elbo(denoiser, x, DDPM(), grid),
    ):
        with pytest.raises(ValueError, match=r"predicts eps says nothing of x0 at t = 40\.0"):
            call()
