"""The variational bound: its terms in closed form, below the likelihood, tight where it must be."""

from __future__ import annotations

import math
from itertools import pairwise

import mpmath
import pytest
import torch
from common import SDES, Counting, Nonlinear, every_pair, generator, network_for, normal
from torch.distributions import Normal, kl_divergence

from scoresde import (
    EDMSDE,
    VPSDE,
    DDPMChain,
    EpsDenoiser,
    FlowSDE,
    Grid,
    ScoreDenoiser,
    VDenoiser,
    VelocityDenoiser,
    X0Denoiser,
    sample,
)
from scoresde.errors import NonFiniteError
from scoresde.exact import Gaussian, GaussianMixture
from scoresde.likelihood import chain
from scoresde.likelihood.bound import elbo
from scoresde.solvers import (
    DDIM,
    DDPM,
    AdaptiveODE,
    Ancestral,
    AnnealedLangevin,
    DPMSolverPP,
    EulerMaruyama,
    ExponentialSDE,
    Heun,
    ReverseDiffusion,
)
from scoresde.variance import AnalyticDenoiser, estimate
from scoresde.wrappers import Clip

MEAN, STD = torch.tensor([0.5, -0.3, 0.0]).double(), torch.tensor([0.5, 1.0, 0.2]).double()
GAUSSIAN = Gaussian(MEAN, std=STD)
MIXTURE = GaussianMixture(means=[[1.0, 0.0], [-1.0, 0.5]], std=0.3)
IMAGE = Gaussian(normal(1, 2, 2, seed=3) / 2, std=normal(1, 2, 2, seed=4).abs() + 0.2)
TARGETS = {"gaussian": GAUSSIAN, "mixture": MIXTURE, "image": IMAGE}

KEEPS_MARGINALS = {
    "ddpm": DDPM(),
    "ddpm beta": DDPM("beta"),
    "ddim 1": DDIM(eta=1.0),
    "ddim 0.5": DDIM(eta=0.5),
    "exponential": ExponentialSDE(0.7),
    "churned": ExponentialSDE(1.5),
}
NOISY = KEEPS_MARGINALS | {
    "euler-maruyama": EulerMaruyama(),
    "euler-maruyama sigma": EulerMaruyama("sigma"),
    "reverse diffusion": ReverseDiffusion(),
    "ancestral": Ancestral(),
}


def grid_of(sde, steps):
    return Grid.power(sde, steps, power=3.0)


def copies(x, n):
    """One sample, n times: each gets a seed of its own, so that the mean over them has a small error."""
    return x.expand(n, *x.shape[1:]).clone()


def hermite(n=24):
    """Nodes and weights of E f(eps), eps ~ N(0, 1): exact for polynomials up to degree 2 n - 1."""
    import numpy as np

    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    return torch.as_tensor(nodes), torch.as_tensor(weights / weights.sum())


def expected_terms(x, solver, grid, decoder, own=True):
    """Prior, denoising by row, and reconstruction for GAUSSIAN data x (3,), by quadrature over the noise."""
    table, sde = solver.tableau(grid), grid.sde
    a, b = table.a + table.b[:, 0] * table.p, table.b[:, 0] * table.q
    nodes, weights = hermite()
    alpha, sigma = sde.alpha(grid.times), sde.sigma(grid.times)
    prior = -kl_divergence(Normal(alpha[0] * x, sigma[0]), Normal(0.0, sde.prior_std_at(float(grid.times[0])))).sum()
    denoising = []
    for i in range(grid.steps):
        x_t = alpha[i] * x + sigma[i] * nodes[:, None]
        D = MEAN + alpha[i] * STD**2 / (alpha[i] ** 2 * STD**2 + sigma[i] ** 2) * (x_t - alpha[i] * MEAN)
        mean = a[i] * x_t + b[i] * D
        if i == grid.steps - 1:
            return prior, torch.stack(denoising), (weights @ Normal(mean, decoder).log_prob(x)).sum()
        A = a[i] if own else alpha[i] / alpha[i + 1] * (sigma[i + 1] / sigma[i]) ** 2
        l2 = sigma[i + 1] ** 2 - (A * sigma[i]) ** 2
        if l2 <= 0:
            denoising.append(torch.tensor(-math.inf).double())
            continue
        q = Normal(A * x_t + (alpha[i + 1] - A * alpha[i]) * x, l2.sqrt())
        denoising.append(-(weights @ kl_divergence(q, Normal(mean, table.c[i]))).sum())


def assert_near(estimates, expected, sigmas=5.0):
    error = estimates.std() / math.sqrt(len(estimates))
    assert (estimates.mean() - expected).abs() <= sigmas * error + 1e-9 * expected.abs()


@pytest.mark.parametrize("solver", KEEPS_MARGINALS.values(), ids=KEEPS_MARGINALS)
@pytest.mark.parametrize("name", ["vp", "subvp", "ve", "flow", "chain"])
def test_each_term_is_its_expectation(name, solver):
    sde = SDES[name]
    x, grid = GAUSSIAN.sample(1, generator(1), torch.float64), grid_of(sde, 7)
    found = elbo(GAUSSIAN.denoiser(sde), copies(x, 400), solver, grid, draws=3, decoder=0.1, seed=0)
    prior, denoising, reconstruction = expected_terms(x[0], solver, grid, 0.1)
    torch.testing.assert_close(found.prior, prior.expand(400))
    assert_near(found.denoising, denoising.sum())
    assert_near(found.reconstruction, reconstruction)
    torch.testing.assert_close(found.value, found.prior + found.denoising + found.reconstruction)


@pytest.mark.parametrize("variable", ["t", "sigma"])
def test_steps_that_change_the_marginals_take_the_tighter_inference(variable):
    """Judged with D = x_0, so each row's expectation is one of the two, and the sum is near the best choice."""
    sde = VPSDE()
    x, grid, solver = GAUSSIAN.sample(1, generator(1), torch.float64), grid_of(sde, 12), EulerMaruyama(variable)
    found = elbo(GAUSSIAN.denoiser(sde), copies(x, 400), solver, grid, draws=2, decoder=0.1, seed=0).denoising
    rows = torch.stack([expected_terms(x[0], solver, grid, 0.1, own)[1] for own in (True, False)])
    error = 5 * found.std() / 20
    assert rows.amin(0).sum() - error <= found.mean() <= rows.amax(0).sum() + error
    assert found.mean() >= rows.sum(1).amax() - error  # no worse than one choice for all rows


@pytest.mark.parametrize("variance", ["posterior", "beta"])
@pytest.mark.parametrize("steps", [10, 40])
def test_of_a_ddpm_chain_it_is_the_bound_of_the_paper(variance, steps):
    """Ho et al. (2020), section 3, in betas: discretised decoder, whose variance is that of the chain's step 2 -> 1."""
    chain = DDPMChain.linear(40, 1e-3, 0.3)
    grid = Grid.strided(chain, steps, "linspace")
    levels, x = 16, torch.tensor([-0.9375, 0.3125, 0.9375]).double()
    abar = torch.cat([torch.ones(1).double(), (1 - chain.betas).cumprod(0)])
    nodes, weights = hermite(64)
    denoising = torch.zeros(()).double()
    for t, s in zip(*(times.long().tolist() for times in (grid.times[:-2], grid.times[1:-1])), strict=True):
        alpha_ts, bbar_t, bbar_s = abar[t] / abar[s], 1 - abar[t], 1 - abar[s]
        btilde = bbar_s / bbar_t * (1 - alpha_ts)
        x_t = abar[t].sqrt() * x + bbar_t.sqrt() * nodes[:, None]
        D = MEAN + abar[t].sqrt() * STD**2 / (abar[t] * STD**2 + bbar_t) * (x_t - abar[t].sqrt() * MEAN)
        mean = [
            (1 - alpha_ts) * abar[s].sqrt() / bbar_t * x_0 + alpha_ts.sqrt() * bbar_s / bbar_t * x_t for x_0 in (x, D)
        ]
        v = btilde if variance == "posterior" else 1 - alpha_ts
        denoising -= (weights @ kl_divergence(Normal(mean[0], btilde.sqrt()), Normal(mean[1], v.sqrt()))).sum()
    s = ((1 - abar[1]) / (1 - abar[2]) * chain.betas[1]).sqrt()
    x_1 = abar[1].sqrt() * x + (1 - abar[1]).sqrt() * nodes[:, None]
    D = MEAN + abar[1].sqrt() * STD**2 / (abar[1] * STD**2 + 1 - abar[1]) * (x_1 - abar[1].sqrt() * MEAN)
    low = torch.where(x < -0.9, -math.inf, x - 1 / levels)
    high = torch.where(x > 0.9, math.inf, x + 1 / levels)
    p = torch.special.ndtr((high - D) / s) - torch.special.ndtr((low - D) / s)
    found = elbo(GAUSSIAN.denoiser(chain), copies(x[None], 400), DDPM(variance), grid, draws=4, levels=levels, seed=0)
    assert_near(found.denoising, denoising)
    assert_near(found.reconstruction, (weights @ p.log()).sum())
    torch.testing.assert_close(found.bits_per_dim, -found.value / (3 * math.log(2)))


@every_pair(solver=NOISY, sde=SDES, target=TARGETS)
def test_a_chain_is_below_the_likelihood(solver, sde, target):
    x = target.sample(16, generator(2), torch.float64)
    found = elbo(target.denoiser(sde), x, solver, grid_of(sde, 12), seed=0)
    gap = target.log_prob(x) - found.value
    assert (gap >= -5 * found.stderr).all()
    assert gap.sum() >= -3 * found.stderr.norm()


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_in_continuous_time_the_exact_denoiser_makes_it_tight(target, sde):
    """For every x, but for the prior's distance from p_T and the decoder's from the posterior at t_min."""
    x = target.sample(300, generator(3), torch.float64)
    found = elbo(target.denoiser(sde), x, draws=24, seed=0)
    gap = target.log_prob(x) - found.value
    # what p_T's distance from the prior costs is below 5e-3 on every SDE
    assert gap.mean().abs() <= 5 * found.stderr.norm() / 300 + 5e-3
    assert (gap.abs() <= 6 * found.stderr).double().mean() > 0.95


def test_the_integral_is_that_of_the_noise_error_over_lambda():
    sde = VPSDE()
    x = GAUSSIAN.sample(1, generator(1), torch.float64)
    ends = sde.half_log_snr(torch.tensor([sde.t_max, sde.t_min]).double())
    h = (ends[1] - ends[0]) / 4000
    t = sde.time_at(ends[0] + h * (torch.arange(4000) + 0.5))[:, None]
    nodes, weights = hermite()
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
    integral = torch.zeros(()).double()
    for z, w in zip(nodes, weights, strict=True):
        D = MEAN + gain * (alpha * (x - MEAN) + sigma * z)
        integral += h * w * ((alpha / sigma * (x - D)) ** 2).sum()
    found = elbo(GAUSSIAN.denoiser(sde), copies(x, 400), draws=32, seed=0)
    assert_near(found.denoising, -integral)


def test_steps_tighten_it():
    sde, x = VPSDE(), GAUSSIAN.sample(500, generator(4), torch.float64)
    gaps, errors = [], []
    for steps in (4, 16, 64, 256):
        found = elbo(GAUSSIAN.denoiser(sde), x, DDPM(), Grid.log_snr(sde, steps), seed=0)
        gaps.append(float((GAUSSIAN.log_prob(x) - found.value).mean()))
        errors.append(float(found.stderr.norm()) / 500)
    assert all(fine < coarse / 2 for coarse, fine in pairwise(gaps))
    assert -5 * errors[-1] < gaps[-1] < 1.0 + 5 * errors[-1]


@pytest.mark.parametrize("steps", [2, 3, 10])
@pytest.mark.parametrize("name", ["vp", "subvp", "cosine", "flow", "edm"])
def test_the_posterior_variance_makes_a_chain_exact_on_a_gaussian(name, steps):
    """p(x_s | x_t) is then the true one whatever the step (Analytic-DPM), so only the two ends are left."""
    sde, std = SDES[name], 0.7
    target = Gaussian(torch.tensor([0.3, -0.2]), std=std)
    grid = grid_of(sde, steps)
    alpha, sigma = float(sde.alpha(grid.times[-2])), float(sde.sigma(grid.times[-2]))
    decoder = std * sigma / math.hypot(alpha * std, sigma)
    x = target.sample(200, generator(5), torch.float64)
    found = elbo(target.denoiser(sde), x, DDPM(), grid, variance="posterior", decoder=decoder, draws=8, seed=0)
    gap = target.log_prob(x) - found.value
    assert gap.mean().abs() <= 5 * found.stderr.norm() / 200 + 1e-3
    plain = elbo(target.denoiser(sde), x, DDPM(), grid, decoder=decoder, draws=8, seed=0)
    assert plain.value.mean() < found.value.mean()


def test_the_posterior_variance_bounds_a_solver_without_noise():
    """DDIM with v = b^2 Var: Analytic-DDIM's variance, finite with the forward posterior as inference."""
    sde, x = VPSDE(), MIXTURE.sample(50, generator(5), torch.float64)
    found = elbo(MIXTURE.denoiser(sde), x, DDIM(), grid_of(sde, 20), variance="posterior", seed=0)
    gap = MIXTURE.log_prob(x) - found.value
    assert gap.sum() >= -5 * found.stderr.norm()
    with pytest.raises(ValueError, match="knows no Var"):
        elbo(Nonlinear(sde), x, DDPM(), grid_of(sde, 5), variance="posterior")


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    "solver", [DDIM(), DDIM(eta=0.5), DDIM(eta=0.9), DDPM(), DDPM("beta"), EulerMaruyama()], ids=str
)
def test_with_a_variance_known_beforehand_no_process_alone_is_tighter(solver, wrapped, monkeypatch):
    """On average over the data, row by row: so also in the sum."""
    sde, grid, x = VPSDE(), grid_of(VPSDE(), 12), MIXTURE.sample(1000, generator(5), torch.float64)
    plain = MIXTURE.denoiser(sde)
    analytic = AnalyticDenoiser(
        plain, estimate(plain, MIXTURE.sample(4000, generator(6), torch.float64), grid.times[:-1])
    )
    denoiser = Clip(analytic, -100.0, 100.0) if wrapped else analytic
    run = {"variance": "posterior", "decoder": 0.1, "draws": 2, "seed": 0}
    chosen = elbo(denoiser, x, solver, grid, **run)
    table = solver.tableau(grid)
    a = table.a + table.b[:, 0] * table.p
    alpha_t, sigma_t, alpha_s, sigma_s = grid.pairs()
    for A in (a, alpha_t / alpha_s * (sigma_s / sigma_t) ** 2):
        l2 = torch.where(sigma_s == 0, 0.0, sigma_s**2 - (A * sigma_t) ** 2)
        if bool((l2[:-1] <= 1e-12).any()):
            continue  # the solver's own of DDIM(0), a point: minus infinity
        alone = (torch.where(sigma_s == 0, 0.0, A), l2)
        monkeypatch.setattr(chain, "_inference", lambda *_, alone=alone: alone)
        gain = chosen.value - elbo(denoiser, x, solver, grid, **run).value
        assert gain.mean() >= -5 * gain.std() / math.sqrt(1000) - 1e-9
        monkeypatch.undo()
    if solver == DDPM():  # whose own is that of the data, and the tightest
        known = denoiser.covariance(table.t)
        A, _ = chain._inference(grid, a, table.b[:, 0] * table.q, table.c, known)
        torch.testing.assert_close(A, a, rtol=1e-9, atol=1e-12)
    if solver == DDIM(eta=0.5):  # without that knowledge it was the solver's own in every row
        own = chain._inference(grid, a, table.b[:, 0] * table.q, table.c)
        monkeypatch.setattr(chain, "_inference", lambda *_: own)
        gain = chosen.value - elbo(denoiser, x, solver, grid, **run).value
        assert gain.mean() > 5 * gain.std() / math.sqrt(1000)


def constant(value, sde):
    """A denoiser that says the same of every x: the reconstruction is then no random number."""
    return X0Denoiser(lambda x, t: torch.full_like(x, value), sde)


def test_the_decoder_is_the_normal_distribution_of_a_bin_in_both_tails():
    mpmath.mp.dps = 60
    levels, lo, hi = 8, -1.0, 3.0
    width = (hi - lo) / levels
    x = lo + (torch.arange(levels).double()[:, None] + 0.5) * width
    grid = Grid(VPSDE(), [1.0, 0.1, 0.0])
    for mean, s in [(0.3, 0.5), (0.3, 0.01), (40.0, 0.3), (-500.0, 0.02), (1.0, 300.0), (2.9, 1e-3)]:
        found = elbo(
            constant(mean, VPSDE()), x, DDPM(), grid, decoder=s, levels=levels, data_range=(lo, hi), seed=0
        ).reconstruction
        for k in range(levels):
            low = -mpmath.inf if k == 0 else (mpmath.mpf(lo + k * width) - mean) / s
            high = mpmath.inf if k == levels - 1 else (mpmath.mpf(lo + (k + 1) * width) - mean) / s
            # by complementary error functions of the side that the bin is on
            if low > 0:
                low, high = -high, -low
            with mpmath.workdps(60):
                p = (mpmath.erfc(-high / mpmath.sqrt(2)) - mpmath.erfc(-low / mpmath.sqrt(2))) / 2
                expected = float(mpmath.log(p)) if p > 0 else None
            if expected is not None and abs(expected) > 1e-30:
                assert float(found[k]) == pytest.approx(expected, rel=1e-10, abs=1e-300)
            assert math.isfinite(float(found[k]))
        assert found.exp().sum() == pytest.approx(1.0, abs=1e-12)


def test_any_point_of_a_bin_has_the_bins_probability():
    grid, denoiser = Grid(VPSDE(), [1.0, 0.1, 0.0]), constant(0.2, VPSDE())
    centres = -1 + (torch.arange(256)[:, None] + 0.5) / 128
    ends = torch.arange(256)[:, None] / 127.5 - 1  # levels at -1 and 1: in their bins too
    found = [elbo(denoiser, x, DDPM(), grid, decoder=0.1, levels=256, seed=0).reconstruction for x in (centres, ends)]
    torch.testing.assert_close(found[0], found[1], rtol=2e-5, atol=0)


@pytest.mark.parametrize("chain", [True, False], ids=["chain", "continuous"])
@pytest.mark.parametrize("levels", [None, 32], ids=["density", "levels"])
def test_scaled_data_shift_a_density_by_the_log_determinant_and_no_probability(chain, levels):
    scale = 3.0
    x = -1 + (torch.randint(32, (5, 2), generator=generator(6)).double() + 0.5) / 16
    found = []
    for c in (1.0, scale):
        sde = EDMSDE(0.002 * c, 80.0 * c)
        target = GaussianMixture(means=c * torch.tensor([[0.5, 0.0], [-0.5, 0.5]]), std=0.3 * c)
        solver, grid = (DDPM(), Grid.karras(sde, 8)) if chain else (None, None)
        found.append(elbo(target.denoiser(sde), c * x, solver, grid, levels=levels, data_range=(-c, c), seed=0))
    shift = 0.0 if levels else 2 * math.log(scale)
    torch.testing.assert_close(found[0].value - shift, found[1].value)
    torch.testing.assert_close(found[0].stderr, found[1].stderr)


@pytest.mark.parametrize("levels", [32, 256])
def test_bits_of_data_on_0_1_are_those_on_minus_1_1(levels):
    """The prior alone, whose mean is zero, sees where the data lie."""
    y = torch.randint(levels, (6, 3), generator=generator(7)).double()
    bits = []
    for lo, hi in ((-1.0, 1.0), (0.0, 1.0)):
        c, centre = (hi - lo) / 2, (hi + lo) / 2
        sde = EDMSDE(0.002 * c, 1e4 * c)
        target = Gaussian(centre + c * MEAN, std=c * STD)
        x = lo + (y + 0.5) * (hi - lo) / levels
        bits.append(
            elbo(target.denoiser(sde), x, DDPM(), Grid.karras(sde, 20), levels=levels, data_range=(lo, hi), seed=0)
        )
    torch.testing.assert_close(bits[0].bits_per_dim, bits[1].bits_per_dim, rtol=0, atol=1e-7)


def coverage(found, truth):
    low, high = found.interval()
    return float(((low <= truth) & (truth <= high)).double().mean())


@pytest.mark.parametrize("dims", [1, 16, 200])
def test_the_standard_error_covers_the_noise_of_the_bound(dims):
    """200 repetitions; the stated error is also the spread over them, or a little more where the control variate's own
    uncertainty counts (few dimensions).
    """
    sde, target = VPSDE(), Gaussian(torch.zeros(dims), std=0.5)
    x, grid = target.sample(1, generator(8), torch.float64), grid_of(sde, 20)
    for run, most in (({"solver": DDPM(), "grid": grid, "draws": 8}, 1.15), ({"draws": 64}, 1.3)):
        truth = elbo(target.denoiser(sde), copies(x, 500), seed=99, **run).value
        found = elbo(target.denoiser(sde), copies(x, 200), seed=1, **run)
        # 0.95 - 5 sqrt(0.95 * 0.05 / 200) = 0.873; and one dimension's squares are skew
        assert 0.87 <= coverage(found, truth.mean()) <= 1.0
        assert 0.88 < found.stderr.square().mean().sqrt() / truth.std() < most


@pytest.mark.parametrize("run", [{"draws": 2}, {"draws": 16}], ids=["chain", "continuous"])
def test_intervals_from_few_draws_cover_where_196_standard_errors_do_not(run):
    """A chain of 20 steps and 2 draws, and 16 strata, 1200 repetitions."""
    sde, target = VPSDE(), Gaussian(torch.zeros(2), std=0.5)
    run = run if run["draws"] > 2 else run | {"solver": DDPM(), "grid": grid_of(sde, 20)}
    x = target.sample(1, generator(8), torch.float64)
    truth = elbo(target.denoiser(sde), copies(x, 2000), seed=99, **run).value.mean()
    found = elbo(target.denoiser(sde), copies(x, 1200), seed=1, **run)
    plain = float(((found.value - truth).abs() <= 1.96 * found.stderr).double().mean())
    # of 1200: +- 0.03 at 5 sigma
    assert plain < 0.95 - 0.03
    assert 0.95 - 0.03 < coverage(found, truth) < 0.95 + 0.035
    assert (found.dof >= 1).all()


def test_many_draws_make_it_the_normal_distribution_s():
    sde, x = VPSDE(), MIXTURE.sample(3, generator(9), torch.float64)
    found = elbo(MIXTURE.denoiser(sde), x, DDPM(), grid_of(sde, 4), draws=300, seed=0)
    low, high = found.interval()
    torch.testing.assert_close((high - low) / 2, 1.96 * found.stderr, rtol=0.01, atol=0)
    inner = found.interval(0.5)
    assert ((low < inner[0]) & (inner[1] < high)).all()
    for level in (0.0, 1.0, 95, math.nan):
        with pytest.raises(ValueError, match="level="):
            found.interval(level)


def test_the_control_variate_saves_draws_and_adds_no_bias():
    """Against the bound of a chain of the same evaluations, which has none; its mean is held by the tests above."""
    sde, target = VPSDE(), Gaussian(torch.zeros(200), std=0.5)
    x = target.sample(20, generator(8), torch.float64)
    chain = elbo(target.denoiser(sde), x, DDPM(), Grid.log_snr(sde, 256), seed=0, draws=2)
    continuous = elbo(target.denoiser(sde), x, draws=512, seed=0)
    assert continuous.stderr.mean() < chain.stderr.mean() / 3


def test_more_draws_are_worth_their_root():
    sde, x = VPSDE(), MIXTURE.sample(50, generator(9), torch.float64)
    few, many = (elbo(MIXTURE.denoiser(sde), x, draws=n, seed=0).stderr.square().mean().sqrt() for n in (32, 512))
    assert 0.12 < many / few < 0.3


def test_one_draw_has_a_bound_and_no_standard_error():
    sde, x = VPSDE(), MIXTURE.sample(3, generator(9))
    chain = elbo(MIXTURE.denoiser(sde), x, DDPM(), grid_of(sde, 4), draws=1)
    continuous = elbo(MIXTURE.denoiser(sde), x, draws=1)
    for found in (chain, continuous):
        assert found.value.isfinite().all()
        assert found.stderr.isnan().all()
        assert found.dof.isnan().all()
        assert torch.stack(found.interval()).isnan().all()


RUNS = {
    "chain": {"solver": DDPM(), "grid": Grid.uniform(VPSDE(), 5)},
    "continuous": {"draws": 7},
    "posterior": {"solver": DDIM(), "grid": Grid.uniform(VPSDE(), 5), "variance": "posterior"},
    "levels": {"solver": DDPM("beta"), "grid": Grid.uniform(VPSDE(), 5), "levels": 8, "data_range": (-9, 9)},
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_a_sample_is_the_same_alone_and_nothing_else_is_touched(run):
    denoiser = IMAGE.denoiser(VPSDE())
    x = IMAGE.sample(5, generator(10), torch.float64)
    kept, state = x.clone(), torch.random.get_rng_state()
    seeds = [3, 14, 15, 92, 65]
    batch = elbo(denoiser, x, seed=seeds, **run)
    one = elbo(denoiser, x[2:3], seed=[15], **run)
    turned = elbo(denoiser, x.flip(0), seed=seeds[::-1], **run)
    for name in ("value", "stderr", "dof", "prior", "denoising", "reconstruction"):
        torch.testing.assert_close(getattr(batch, name)[2:3], getattr(one, name))
        torch.testing.assert_close(getattr(batch, name), getattr(turned, name).flip(0))
    assert torch.equal(x, kept)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(elbo(denoiser, x, seed=1, **run).value, batch.value)


def test_the_noise_is_not_that_of_sampling_under_the_same_seed():
    """Else x, drawn with the seed, would know its own noise."""
    sde, target = VPSDE(), Gaussian(torch.zeros(400), std=1.0)
    denoiser = target.denoiser(sde)
    x = sample(denoiser, torch.zeros(20, 400, dtype=torch.float64), DDPM("beta"), steps=1, seed=5).x
    x = x + normal(20, 400)
    seen = []

    def net(x_t, t):
        seen.append(x_t)
        return torch.zeros_like(x_t)

    grid = Grid(sde, [1.0, 0.5, 0.0])
    noise = torch.zeros(20, 400).double()
    sample(X0Denoiser(net, sde), noise, EulerMaruyama(), grid=grid, seed=5)
    elbo(X0Denoiser(net, sde), noise, DDPM(), grid, seed=5)
    sampled, bound = seen[1].flatten(), seen[2].flatten()
    assert torch.corrcoef(torch.stack([sampled, bound]))[0, 1].abs() < 5 / math.sqrt(8000)


@pytest.mark.parametrize("run", [RUNS["chain"], RUNS["continuous"]], ids=["chain", "continuous"])
def test_every_parameterisation_has_the_same_bound_and_counts_its_calls(run):
    sde, reference = VPSDE(), Nonlinear(VPSDE())
    x = normal(4, 2, 3)
    expected = elbo(reference, x, seed=0, **run)
    adapters = {
        "x0": X0Denoiser,
        "eps": EpsDenoiser,
        "score": ScoreDenoiser,
        "v": VDenoiser,
        "velocity": VelocityDenoiser,
    }
    for view, adapter in adapters.items():
        found = elbo(adapter(network_for(reference, view), sde), x, seed=0, **run)
        torch.testing.assert_close(found.value, expected.value, rtol=1e-8, atol=1e-8)
    calls = []

    def net(x_t, t, label):
        calls.append(label)
        return torch.zeros_like(x_t)

    found = elbo(X0Denoiser(net, sde), x, cond={"label": 7}, progress=False, seed=0, **run)
    assert calls == [7] * found.nfe
    assert found.nfe == (200 if "solver" in run else 9)


def test_small_times_lose_nothing():
    """The error is taken in what the network predicts: through D it would be that of x_0 times alpha / sigma."""
    sde, net = VPSDE(), torch.nn.Tanh()
    x = 300 + normal(4, 6, dtype=torch.float32)
    for run in ({"solver": DDPM(), "grid": Grid.log_snr(sde, 20)}, {"draws": 64}):
        double = elbo(EpsDenoiser(lambda x, t: net(x), sde), x, seed=0, **run)
        single = elbo(EpsDenoiser(lambda x, t: net(x.float()).to(x), sde), x, seed=0, **run)  # of 24 bits only
        torch.testing.assert_close(single.value, double.value, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("run", ["chain", "posterior", "continuous", "levels"])
@pytest.mark.parametrize("name", ["vp", "edm", "ve", "flow", "chain"])
@pytest.mark.parametrize("mean", [0.0, 1e5])
def test_the_bound_of_float32_data_is_that_of_float64(name, run, mean):
    """Large means too: (a x_0 + b eps + w N)^2 / v in float32 was off by nats on 1e5 +- 500, as was the sum itself."""
    sde, std = SDES[name], 500.0 if mean else 0.5
    target = Gaussian(mean=torch.full((3,), mean, dtype=torch.float64), std=std)
    x = target.sample(4, generator(3), torch.float32)
    options = {"seed": 0, "draws": 4}
    if run != "continuous":
        options |= {"solver": DDPM(), "grid": grid_of(sde, 8)}
    if run == "posterior":
        options |= {"variance": "posterior"}
    if run == "levels":
        options |= {"levels": 256, "data_range": (mean - 8 * std, mean + 8 * std)}
    single, double = (elbo(target.denoiser(sde), y, **options).value for y in (x, x.double()))
    torch.testing.assert_close(single, double, rtol=0, atol=1e-3, check_dtype=False)


def test_half_precision_data_are_widened():
    found = elbo(MIXTURE.denoiser(VPSDE()), MIXTURE.sample(3, generator()).bfloat16(), DDPM(), grid_of(VPSDE(), 4))
    assert found.value.dtype == torch.float64


def test_a_wrapped_denoiser_has_its_own_bound():
    sde, inner = VPSDE(), MIXTURE.denoiser(VPSDE())
    x = MIXTURE.sample(200, generator(11), torch.float64)
    run = {"solver": DDPM(), "grid": grid_of(sde, 20), "seed": 0, "draws": 4}
    wide, tight = (elbo(Clip(inner, -c, c), x, **run) for c in (50.0, 0.2))
    torch.testing.assert_close(wide.value, elbo(inner, x, **run).value)
    assert tight.value.mean() < wide.value.mean() - 1


def test_a_flow_starts_where_lambda_is_finite():
    sde = FlowSDE()
    counting = Counting(Nonlinear(sde))
    elbo(X0Denoiser(lambda x, t: torch.zeros_like(x), sde), normal(3, 2), draws=8, seed=0)
    elbo(Counting(Nonlinear(sde)), normal(1, 2), DDPM(), Grid.uniform(sde, 4), seed=0)  # from alpha = 0 itself
    found = elbo(counting, normal(1, 2), draws=8, seed=0)
    assert found.nfe == len(counting.times) == 10
    assert max(counting.times) <= float(sde.time_at(-9.0))
    assert found.prior.abs().max() < 1e-6


REFUSED = {
    "deterministic": (DDIM(), "adds no noise"),
    "multistep": (DPMSolverPP(order=2, stochastic=True), "read those before"),
    "two stages": (Heun(), "several evaluations"),
    "loop": (AdaptiveODE(), "has no table"),
    "langevin": (AnnealedLangevin(), "several evaluations"),
}


@pytest.mark.parametrize(("solver", "match"), REFUSED.values(), ids=REFUSED)
def test_a_solver_without_a_finite_bound_is_refused(solver, match):
    counting = Counting(Nonlinear(VPSDE()))
    with pytest.raises(ValueError, match=match) as error:
        elbo(counting, normal(2, 3), solver, Grid.uniform(VPSDE(), 6))
    assert "DDPM()" in str(error.value)
    assert counting.times == []


BAD = {
    "grid alone": ({"grid": Grid.uniform(VPSDE(), 4)}, ValueError, "solver and grid"),
    "solver alone": ({"solver": DDPM()}, ValueError, "solver and grid"),
    "not to 0": ({"solver": DDPM(), "grid": Grid.uniform(VPSDE(), 4, end=0.1)}, ValueError, "end at t = 0"),
    "another SDE": ({"solver": DDPM(), "grid": Grid.uniform(FlowSDE(), 4)}, ValueError, "the grid was made for"),
    "a class": ({"solver": DDPM, "grid": Grid.uniform(VPSDE(), 4)}, TypeError, "instance of a solver"),
    "a list": ({"solver": DDPM(), "grid": [1.0, 0.0]}, TypeError, "expected a Grid"),
    "draws": ({"draws": 0}, ValueError, "draws=0"),
    "decoder": ({"decoder": 0.0}, ValueError, "decoder=0.0"),
    "levels": ({"levels": 0}, ValueError, "levels=0"),
    "range": ({"levels": 4, "data_range": (1.0, -1.0)}, ValueError, "data_range"),
    "outside": ({"levels": 4, "data_range": (-0.01, 0.01)}, ValueError, "outside data_range"),
    "variance": ({"variance": "beta"}, ValueError, "variance='beta'"),
    "continuous variance": ({"variance": "posterior"}, ValueError, "option of chains"),
    "seeds": ({"seed": [1, 2, 3]}, ValueError, "3 seeds for 2 samples"),
    "integers": ({"x": torch.zeros(2, 3, dtype=torch.uint8)}, ValueError, "floating-point"),
    "not finite": ({"x": torch.full((2, 3), math.nan)}, ValueError, "not finite"),
}


@pytest.mark.parametrize(("options", "kind", "match"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_before_any_evaluation(options, kind, match):
    counting = Counting(Nonlinear(VPSDE()))
    with pytest.raises(kind, match=match):
        elbo(counting, **({"x": normal(2, 3)} | options))
    assert counting.times == []


def test_a_nan_names_its_time_and_its_samples():
    sde, grid = VPSDE(), Grid.uniform(VPSDE(), 4)

    def net(x, t):
        out = torch.zeros_like(x)
        out[1][(t[1] < 0.6).expand(x[1].shape)] = math.nan
        return out

    with pytest.raises(NonFiniteError, match=r"t = 0\.5.*sample 1") as error:
        elbo(X0Denoiser(net, sde), normal(3, 2), DDPM(), grid, seed=0)
    assert (error.value.step, error.value.time, error.value.samples) == (2, 0.5, [1])
    with pytest.raises(NonFiniteError, match="sample 1") as error:
        elbo(X0Denoiser(net, sde), normal(3, 2), seed=0)
    assert error.value.samples == [1]
    assert 0 < error.value.time < 0.6
