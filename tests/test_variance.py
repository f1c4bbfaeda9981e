"""Analytic-DPM: exact on Gaussians, the paper's formulas, estimates without bias, and tables that are not mixed up."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from common import SDES, Counting, Nonlinear, generator, network_for, normal
from torch import nn

from scoresde import (
    SDE,
    VESDE,
    VPSDE,
    DDPMChain,
    EpsDenoiser,
    FlowSDE,
    Grid,
    Posterior,
    X0Denoiser,
    sample,
)
from scoresde.analysis import gaussian_law, marginal
from scoresde.errors import CheckpointError, NonFiniteError
from scoresde.exact import Gaussian, GaussianMixture
from scoresde.likelihood.bound import elbo
from scoresde.noise import sample_seeds
from scoresde.solvers import (
    DDIM,
    DDPM,
    AdaptiveODE,
    Ancestral,
    AnnealedLangevin,
    DPMSolverPP,
    ExponentialSDE,
    Heun,
    Solver,
)
from scoresde.tensors import as_time
from scoresde.variance.denoiser import AnalyticDenoiser
from scoresde.variance.estimate import estimate
from scoresde.variance.solver import OptimalVariance, optimal_tableau
from scoresde.variance.table import VarianceTable, fingerprint
from scoresde.wrappers import Clip, Wrapper

MEAN = torch.tensor([0.5, -0.3, 1.0]).double()
COV = torch.tensor([[0.5, 0.3, 0.0], [0.3, 0.4, -0.1], [0.0, -0.1, 0.2]]).double()
CORRELATED = Gaussian(MEAN, cov=COV)
MIXTURE = GaussianMixture(means=[[1.0], [-1.0]], weights=[0.3, 0.7], std=0.3)
ESTIMATED = {name: SDES[name] for name in ("vp", "subvp", "ve", "edm", "flow")} | {
    "chain": DDPMChain.linear(40, 2e-3, 0.3)
}
MARGINAL_PRESERVING = {
    "ddim": DDIM(),
    "ddim 0.5": DDIM(0.5),
    "ddim 1": DDIM(1.0),
    "ddpm": DDPM(),
    "tau": ExponentialSDE(0.7),
}


def table_of(sde: SDE, times, eps_square, **options) -> VarianceTable:
    times = torch.as_tensor(times, dtype=torch.float64)
    eps_square = torch.as_tensor(eps_square, dtype=torch.float64).expand(times.shape)
    return VarianceTable(sde, times, eps_square, torch.zeros_like(times), samples=1, **options)


def exact_table(sde: SDE, times, variances) -> VarianceTable:
    """E |eps_hat|^2 / d = mean of sigma^2 / S for Gaussian data."""
    times = torch.as_tensor(times, dtype=torch.float64).sort().values
    alpha, sigma = sde.alpha(times)[:, None], sde.sigma(times)[:, None]
    S = alpha**2 * torch.as_tensor(variances, dtype=torch.float64) + sigma**2
    return table_of(sde, times, (sigma**2 / S).mean(1))


def grid_of(sde: SDE, K: int) -> Grid:
    """K steps from where x_t is nearly noise to where there is still some."""
    if isinstance(sde, DDPMChain):
        return Grid.customary(sde, K, end=1.0)
    return Grid.power(sde, K, power=3.0, start=min(sde.t_max, float(sde.time_at(-5.0))), end=sde.t_min)


class KnowsVariance(Wrapper):
    """A denoiser with an elementwise variance: function(x, t)."""

    def __init__(self, denoiser, function):
        super().__init__(denoiser)
        self.function = function

    def posterior(self, x, t, /, **cond):
        return Posterior(self.denoiser.posterior(x, t, **cond).mean, self.function(x, t))


class Fixed(Solver):
    """A solver of one table."""

    def __init__(self, table):
        self.table = table

    def tableau(self, grid):
        return self.table


# The law of the output


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
@pytest.mark.parametrize("solver", MARGINAL_PRESERVING.values(), ids=MARGINAL_PRESERVING)
def test_an_isotropic_gaussian_is_exact_at_any_number_of_steps(sde, solver):
    for K in (1, 2, 3, 10):
        for v in (0.04, 1.0, 9.0):
            grid = grid_of(sde, K)
            table = optimal_tableau(solver, grid, exact_table(sde, grid.times, [v]))
            found, truth = gaussian_law(table, (2.0, v), x_T="exact"), marginal((2.0, v), sde, grid.times[-1])
            # C = (sigma^2 / alpha^2) (1 - eps_square) has the digits that 1 - eps_square leaves it.
            rtol = 1e-13 + 1e-15 / float(sde.alpha(grid.times[0]) / sde.sigma(grid.times[0])) ** 2 / min(v, 1)
            torch.testing.assert_close(found.variances, truth.variances, rtol=rtol, atol=0)
            torch.testing.assert_close(found.mean, truth.mean, rtol=1e-12, atol=0)


def test_a_flow_is_exact_from_pure_noise():
    """At alpha = 0 itself, beyond the table's times, where C is held."""
    sde, v = FlowSDE(), 0.3
    grid = Grid.uniform(sde, 4, end=1e-3)
    for solver in (DDPM(), DDIM()):
        table = optimal_tableau(solver, grid, exact_table(sde, [*grid.times[1:].tolist(), 0.9999], [v]))
        found, truth = gaussian_law(table, (2.0, v)), marginal((2.0, v), sde, grid.times[-1])
        torch.testing.assert_close(found.variances, truth.variances, rtol=1e-6, atol=0)
        torch.testing.assert_close(found.mean, truth.mean)


def test_on_other_gaussians_the_mean_variance_is_nearer_than_any_other():
    """Of each step from the exact marginal: the output's total variance is exact, whatever the directions are."""
    v = torch.tensor([0.05, 0.5, 2.0]).double()
    for sde in (VPSDE(), VESDE(), DDPMChain()):
        grid = grid_of(sde, 7)
        for t, s in pairwise(grid.times.tolist()):
            step = Grid(sde, [t, s])
            for solver in MARGINAL_PRESERVING.values():
                table = optimal_tableau(solver, step, exact_table(sde, [t], v))
                found = gaussian_law(table, (0.0, v), x_T="exact")
                # a' x + b' D + noise against a' x + b' x_0 + c z: the same total, by the law of total variance.
                torch.testing.assert_close(
                    found.variances.sum(), marginal((0.0, v), sde, s).variances.sum(), rtol=1e-9, atol=0
                )


def test_the_markov_step_is_the_papers_formula():
    """sigma*^2 = (beta / alpha) (1 - beta Gamma) of Bao et al. (2022), in their alpha, beta: squares, of the step."""
    for chain in (DDPMChain(), DDPMChain.cosine(100)):
        eps_square = torch.rand(chain.steps, generator=generator(1), dtype=torch.float64)
        table = table_of(chain, range(1, chain.steps + 1), eps_square)
        for K in (chain.steps, 10, 3):
            grid = Grid.strided(chain, K, "linspace")
            nodes = grid.times.long()
            abar = torch.cat([torch.ones(1).double(), (1 - chain.betas).cumprod(0)])
            alpha = abar[nodes[:-1]] / abar[nodes[1:]]
            beta, Gamma = 1 - alpha, eps_square[nodes[:-1] - 1] / (1 - abar[nodes[:-1]])
            c = optimal_tableau(DDPM(), grid, table).c
            torch.testing.assert_close((c**2)[:-1], (beta / alpha * (1 - beta * Gamma))[:-1], rtol=1e-9, atol=0)
            assert c[-1] == 0  # to sigma = 0


def test_the_general_step_is_the_papers_formula():
    """lambda^2 + (sqrt(bbar_t / alpha) - sqrt(bbar_s - lambda^2))^2 (1 - bbar_t Gamma), lambda^2 = eta^2 beta tilde."""
    chain = DDPMChain.cosine(100)
    eps_square = torch.rand(100, generator=generator(2), dtype=torch.float64)
    abar = torch.cat([torch.ones(1).double(), (1 - chain.betas).cumprod(0)])
    grid = Grid.strided(chain, 10)
    n, m = grid.times[:-2].long(), grid.times[1:-1].long()
    alpha = abar[n] / abar[m]
    for eta in (0.0, 0.3, 1.0):
        lambda2 = eta**2 * (1 - abar[m]) / (1 - abar[n]) * (1 - alpha)
        kappa = ((1 - abar[n]) / alpha).sqrt() - (1 - abar[m] - lambda2).sqrt()
        expected = lambda2 + kappa**2 * (1 - eps_square[n - 1])
        found = optimal_tableau(DDIM(eta), grid, table_of(chain, range(1, 101), eps_square)).c[:-1]
        torch.testing.assert_close(found**2, expected, rtol=1e-9, atol=1e-15)


def test_the_mean_and_the_view_are_the_solvers_own():
    sde, grid = VPSDE(), Grid.uniform(VPSDE(), 5)
    plain, optimal = DDIM(0.5).tableau(grid), optimal_tableau(DDIM(0.5), grid, table_of(sde, [0.5], [0.5]))
    for name in ("a", "b", "p", "q", "t", "step"):
        assert torch.equal(getattr(plain, name), getattr(optimal, name))
    assert bool((optimal.c[:-1] > plain.c[:-1]).all())
    assert optimal.c[-1] == plain.c[-1] == 0


# Bounds


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
def test_the_bounds_hold_for_any_table(sde):
    lam = torch.linspace(-4.5, 2.5, 30).double()
    nodes = sde.time_at(lam.flip(0)) if not isinstance(sde, DDPMChain) else torch.arange(20, 900, 30).double()
    noisy = table_of(sde, nodes, 2 * torch.rand(len(nodes), generator=generator(3), dtype=torch.float64) - 0.4)
    t = torch.linspace(0, 1, 1001).double() * sde.t_max
    u2 = (-2 * sde.half_log_snr(t)).exp()
    C = noisy.covariance(t)
    assert bool(((C >= 0) & (u2 >= C)).all())
    bounded = noisy.covariance(t, (-0.25, 0.75))
    torch.testing.assert_close(bounded, C.clamp(max=0.25), rtol=0, atol=0)
    assert bool((C > 0.25).any())  # else nothing was cut
    for solver in MARGINAL_PRESERVING.values():
        grid = grid_of(sde, 6)
        base, c = solver.tableau(grid), optimal_tableau(solver, grid, noisy, (-0.25, 0.75)).c
        b2 = (base.b[:, 0] * base.q) ** 2
        upper = torch.minimum((-2 * sde.half_log_snr(base.t)).exp(), torch.tensor(0.25).double())
        assert bool((c**2 >= base.c**2 * (1 - 1e-12)).all())
        assert bool((c**2 <= (base.c**2 + b2 * upper) * (1 + 1e-12)).all())


def test_the_bound_without_data_range_is_beta_over_alpha():
    """eps_square = 0 is upper bound 1 of the paper: DDPM's beta_{t|s} / alpha_{t|s}; 1 is the lower, beta tilde."""
    chain, grid = DDPMChain(), Grid.strided(DDPMChain(), 20)
    abar = chain.alpha(grid.times) ** 2
    alpha = (abar[:-1] / abar[1:])[:-1]
    zero, one = (optimal_tableau(DDPM(), grid, table_of(chain, [1.0, 1000.0], e)).c[:-1] for e in (0.0, 1.0))
    torch.testing.assert_close(zero**2, (1 - alpha) / alpha, rtol=1e-9, atol=0)
    torch.testing.assert_close(one, DDPM().tableau(grid).c[:-1])


def test_the_table_is_exact_at_its_times_and_well_behaved_between_and_beyond():
    for name, sde in SDES.items():
        v = [0.3]
        t = torch.linspace(0.02, 0.98, 40).double() * sde.t_max
        table = exact_table(sde, t, v)
        torch.testing.assert_close(table.at(t), table.eps_square, rtol=1e-12, atol=0)
        between = (t[1:] + t[:-1]) / 2
        truth = exact_table(sde, between, v).covariance(between)
        assert (table.covariance(between) / truth - 1).abs().max() < (0.25 if name == "edm" else 0.06), name
        beyond = torch.tensor([0.0, 1.0]).double() * sde.t_max
        C = table.covariance(beyond)
        assert C[0] == 0
        assert C[1].isfinite()
        assert float(table.covariance(sde.t_max)) == float(C[1])
        # data of unit variance in units of alpha: G is 1 at all times, so the table may be as coarse as can be
    sde, t = VPSDE(), torch.linspace(1e-4, 1, 99).double()
    coarse = exact_table(sde, [0.3, 0.6], [1.0])
    torch.testing.assert_close(coarse.covariance(t), sde.sigma(t) ** 2, rtol=1e-12, atol=0)
    assert coarse.covariance(torch.full((3, 2), 0.5)).shape == (3, 2)


# Never worse in the path-wise KL


def step_costs(solver: Solver, grid: Grid, v: torch.Tensor, variances: torch.Tensor) -> torch.Tensor:
    """E KL(q(x_s | x_t, x_0) | N(a' x + b' D, variance)) of each step in nats, on N(0, diag v) data: in closed form,
    for q of l^2 = sigma_s^2 - a'^2 sigma_t^2 and means that differ by b' (x_0 - D).
    """
    sde, table = grid.sde, solver.tableau(grid)
    a, b = table.a + table.b[:, 0] * table.p, table.b[:, 0] * table.q
    alpha_t, sigma_t, _, sigma_s = grid.pairs()
    l2 = sigma_s**2 - (a * sigma_t) ** 2
    C = sde.sigma(table.t)[:, None] ** 2 * v / (alpha_t[:, None] ** 2 * v + sigma_t[:, None] ** 2)
    r = (l2 / variances)[:, None]
    return ((r - 1 - r.log() + (b**2 / variances)[:, None] * C) / 2).sum(1)


@pytest.mark.parametrize("name", ["vp", "subvp", "ve", "edm", "chain"])
def test_on_anisotropic_gaussians_no_variance_costs_less(name):
    sde = SDES[name]
    for seed in range(5):
        v = normal(6, seed=seed).exp()
        for K in (2, 5, 20):
            grid = grid_of(sde, K)
            share = -torch.expm1(2 * (sde.half_log_snr(grid.times[:-1]) - sde.half_log_snr(grid.times[1:])))
            _, sigma_t, _, sigma_s = grid.pairs()
            best = optimal_tableau(DDPM(), grid, exact_table(sde, grid.times[:-1], v)).c ** 2
            cost = step_costs(DDPM(), grid, v, best)
            others = [sigma_t**2 * share, sigma_s**2 * share, 0.97 * best, 1.03 * best]  # beta, beta tilde, near
            for other in others:
                assert bool((cost <= step_costs(DDPM(), grid, v, other) + 1e-9).all())


@pytest.mark.parametrize("sde", [VPSDE(), DDPMChain.linear(40, 2e-3, 0.3)], ids=["vp", "chain"])
def test_on_a_mixture_the_bound_is_never_worse(sde):
    target = GaussianMixture(means=normal(5, 4, seed=1), std=0.2)
    data = target.sample(2000, generator(2), torch.float64)
    model = target.denoiser(sde)
    grid = Grid.customary(sde, 8)
    analytic = AnalyticDenoiser(model, estimate(model, data, grid, samples=200))
    run = {"draws": 4, "seed": 3, "decoder": 0.3}
    best = elbo(analytic, data[:400], DDPM(), grid, variance="posterior", **run).value
    for variance in ("posterior", "beta"):
        gain = best - elbo(model, data[:400], DDPM(variance), grid, **run).value
        assert gain.mean() > 5 * gain.std() / 20


@pytest.mark.parametrize("solver", [DDPM(), DDIM(1.0), DDIM(0.5), DDIM()], ids=["ddpm", "ddim 1", "ddim 0.5", "ddim"])
def test_the_bounds_variance_is_the_tables(solver):
    """elbo(variance="posterior") of the analytic denoiser is elbo of the table that `optimal_tableau` makes."""
    sde, grid = VPSDE(), Grid.power(VPSDE(), 9, power=3.0)
    x = normal(5, 3, seed=1)
    analytic = AnalyticDenoiser(Nonlinear(sde), table_of(sde, [0.01, 0.5, 1.0], [0.1, 0.7, 0.99999]), (-1.0, 1.0))
    found = elbo(analytic, x, solver, grid, variance="posterior", seed=0, draws=3)
    same = Fixed(optimal_tableau(solver, grid, analytic.table, (-1.0, 1.0)))
    expected = elbo(analytic, x, same, grid, variance="solver", seed=0, draws=3)
    torch.testing.assert_close(found.reconstruction, expected.reconstruction, rtol=1e-9, atol=1e-9)
    # DDIM(0.5) has two inference processes to choose from, by another rule where the variance is not known beforehand
    if solver in (DDPM(), DDIM(1.0)):
        torch.testing.assert_close(found.value, expected.value, rtol=1e-9, atol=1e-9)


# Estimates


def truth_on(target, sde, data, times):
    """E |eps_hat|^2 / d with x_0 drawn from this very data set."""
    found = []
    for t in times.tolist():
        alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
        if isinstance(target, Gaussian):
            y = data - MEAN
            S = torch.linalg.inv(alpha**2 * COV + sigma**2 * torch.eye(3).double())
            second = alpha**2 * (y.T @ y) / len(y) + sigma**2 * torch.eye(3).double()
            found.append(sigma**2 * (S @ second @ S).trace() / 3)
        else:
            z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
            density = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
            x = (alpha * data + sigma * z).reshape(-1, 1)
            eps = target.denoiser(sde).eps(x, t).reshape(len(data), -1)
            found.append((eps**2 @ density).mean())
    return torch.stack(found)


@pytest.mark.parametrize("target", [CORRELATED, MIXTURE], ids=["gaussian", "mixture"])
@pytest.mark.parametrize("sde", ESTIMATED.values(), ids=ESTIMATED)
def test_estimates_have_no_bias(target, sde):
    data = target.sample(12, generator(4), torch.float64)  # fewer than the samples
    lam = torch.linspace(-4.5, 2.0, 14).double()
    times = torch.arange(1, 41, 3).double() if isinstance(sde, DDPMChain) else sde.time_at(lam)
    truth = truth_on(target, sde, data, times.sort().values)
    for control in (True, False):
        table = estimate(target.denoiser(sde), data, times, samples=400, seed=1, control=control)
        assert bool(((table.eps_square - truth).abs() <= 5 * table.stderr + 1e-9).all())
        assert table.samples == 400
    assert table.sde == sde


def test_the_control_keeps_the_error_of_the_covariance_bounded():
    sde, data = VPSDE(), CORRELATED.sample(1000, generator(5), torch.float64)
    t = torch.tensor([0.3, 0.6, 0.8, 1.0]).double()
    magnified = (sde.sigma(t) / sde.alpha(t)) ** 2
    plain, controlled = (
        estimate(CORRELATED.denoiser(sde), data, t, control=control).stderr * magnified for control in (False, True)
    )
    assert bool((controlled < plain).all())
    assert controlled[-1] < plain[-1] / 1000
    assert controlled.max() < 0.1
    # nothing is left to estimate where the data's directions are independent, and the network is exact
    diagonal = Gaussian([1.0, 2.0], std=[0.5, 3.0])
    data = torch.cat([diagonal.sample(50, generator(6), torch.float64)] * 2)
    data = (data - data.mean(0)) / data.std(0, unbiased=False) * torch.tensor([0.5, 3.0]) + torch.tensor([1.0, 2.0])
    table = estimate(diagonal.denoiser(sde), data, t, samples=5)
    torch.testing.assert_close(table.eps_square, exact_table(sde, t, [0.25, 9.0]).eps_square, rtol=1e-12, atol=0)


def test_the_monte_carlo_error_falls_as_the_root_of_the_samples():
    sde, data = VPSDE(), MIXTURE.sample(12, generator(4), torch.float64)
    times = torch.linspace(0.02, 0.7, 60).double()
    truth = truth_on(MIXTURE, sde, data, times)
    tables = [estimate(MIXTURE.denoiser(sde), data, times, samples=M, seed=2) for M in (64, 4096)]
    assert float((tables[0].stderr / tables[1].stderr).log().mean().exp()) == pytest.approx(8, rel=0.1)
    for table in tables:  # and it is what the table says: a root mean square of 60 standard normals, to 5 sigma
        z = (table.eps_square - truth) / table.stderr
        assert float(z.square().mean().sqrt()) == pytest.approx(1, abs=5 / math.sqrt(120))


def test_an_estimate_is_the_same_in_any_batch_and_on_any_number_of_processes(tmp_path):
    sde, data = VPSDE(), CORRELATED.sample(30, generator(7), torch.float64)
    model, times = CORRELATED.denoiser(sde), [0.1, 0.4, 0.9]
    state = torch.random.get_rng_state()
    whole = estimate(model, data, times, samples=41, seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    for batch_size in (1, 7, 41):
        found = estimate(model, data, times, samples=41, seed=5, batch_size=batch_size)
        torch.testing.assert_close(found.eps_square, whole.eps_square, rtol=1e-12, atol=0)
        torch.testing.assert_close(found.stderr, whole.stderr, rtol=1e-9, atol=0)
    for world in (2, 3, 41):
        shards = [estimate(model, data, times, samples=41, seed=5, shard=(rank, world)) for rank in range(world)]
        merged = VarianceTable.merge(shards)
        assert merged.samples == 41
        torch.testing.assert_close(merged.eps_square, whole.eps_square, rtol=1e-12, atol=0)
        torch.testing.assert_close(merged.stderr, whole.stderr, rtol=1e-9, atol=0)
    with pytest.raises(ValueError, match="same samples"):
        VarianceTable.merge([shards[0], shards[1], shards[0]])
    for other in (
        estimate(model, data, [0.1, 0.4], samples=2),
        estimate(CORRELATED.denoiser(VESDE()), data, times, samples=2),
        estimate(Clip(model), data, times, samples=2),
    ):
        with pytest.raises(ValueError, match="differ in"):
            VarianceTable.merge([whole, other])
    with pytest.raises(ValueError, match="no tables"):
        VarianceTable.merge([])
    assert not torch.equal(estimate(model, data, times, samples=41, seed=6).eps_square, whole.eps_square)
    assert math.isnan(float(estimate(model, data, times, samples=1).stderr[0]))


def test_the_default_times():
    assert torch.equal(
        estimate(MIXTURE.denoiser(DDPMChain()), torch.ones(1, 1), samples=1).t, torch.arange(1, 1001).double()
    )
    for sde in SDES.values():
        if not isinstance(sde, DDPMChain):
            t = estimate(MIXTURE.denoiser(sde), torch.ones(1, 1), samples=1).t
            lam = sde.half_log_snr(t)
            assert len(t) == 100
            assert float(t[0]) == sde.t_min
            assert float(t[-1]) == (pytest.approx(float(sde.time_at(-9.0))) if sde.alpha(sde.t_max) == 0 else sde.t_max)
            torch.testing.assert_close(lam.diff(), lam.diff().mean().expand(99), rtol=1e-6, atol=1e-9)


def test_a_condition_belongs_to_the_data():
    """A network that is told where its x_0 is: eps_hat = eps, on a data set that is not one batch."""
    sde, data = VPSDE(), normal(10, 2)
    model = X0Denoiser(lambda x, t, where, scale: where * scale, sde)
    table = estimate(
        model, data, [0.2, 0.9], samples=50, control=False, batch_size=8, cond={"where": data, "scale": 1.0}
    )
    chi2 = 5 * math.sqrt(2 / 100)
    assert bool(((table.eps_square - 1).abs() < chi2).all())
    shuffled = estimate(model, data, [0.2, 0.9], samples=50, control=False, cond={"where": data.flip(0), "scale": 1.0})
    assert float(shuffled.eps_square[0]) > 2


def test_float32_data_keep_the_digits_of_the_covariance():
    sde = VPSDE()
    double = CORRELATED.sample(200, generator(8), torch.float64)
    single, half = (
        estimate(EpsDenoiser(network_for(CORRELATED.denoiser(sde), "eps"), sde), double.to(dtype), [0.5, 1.0])
        for dtype in (torch.float32, torch.bfloat16)
    )
    truth = exact_table(sde, [0.5, 1.0], COV.trace().expand(1) / 3).covariance(single.t)
    assert bool(((single.covariance(single.t) / truth - 1).abs() < 0.2).all())
    assert half.eps_square.isfinite().all()


def test_a_nan_names_its_time_and_its_samples():
    sde = VPSDE()

    def net(x, t):
        return torch.where((t[:, None] > 0.5) & (x > 4.5), math.nan, 0.0 * x)

    data = torch.zeros(64, 1)
    data[17] = 30.0
    with pytest.raises(NonFiniteError, match=r"t = 0\.6,") as error:
        estimate(EpsDenoiser(net, sde), data, [0.4, 0.6], samples=300, batch_size=50)
    assert error.value.time == 0.6
    assert error.value.samples


BAD = {
    "class": ({"denoiser": Nonlinear}, TypeError, "expected a Denoiser"),
    "integers": ({"data": torch.zeros(3, 2, dtype=torch.uint8)}, ValueError, "floating-point"),
    "no data": ({"data": torch.zeros(0, 2)}, ValueError, "empty"),
    "samples": ({"samples": 0}, ValueError, "samples=0"),
    "batch size": ({"batch_size": 0}, ValueError, "batch_size=0"),
    "seed": ({"seed": -1}, ValueError, "seed=-1"),
    "rank": ({"shard": (2, 2)}, ValueError, "rank < world"),
    "empty shard": ({"shard": (5, 9), "samples": 5}, ValueError, "rank < world"),
    "time 0": ({"times": [0.0, 0.5]}, ValueError, "strictly increasing times in"),
    "twice": ({"times": [0.5, 0.5]}, ValueError, "strictly increasing times in"),
    "beyond": ({"times": [0.5, 1.5]}, ValueError, "strictly increasing times in"),
    "no times": ({"times": []}, ValueError, "at least one"),
    "alpha 0": ({"denoiser": Nonlinear(FlowSDE()), "times": [0.5, 1.0]}, ValueError, "half log-SNR is infinite"),
    "grid": ({"times": Grid.uniform(VESDE(), 3)}, ValueError, "the grid was made for"),
    "cond": ({"cond": {"label": torch.zeros(3)}}, ValueError, "3 entries"),
}


@pytest.mark.parametrize(("options", "kind", "match"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_before_any_evaluation(options, kind, match):
    counting = Counting(Nonlinear(VPSDE()))
    with pytest.raises(kind, match=match):
        estimate(**({"denoiser": counting, "data": normal(5, 2)} | options))
    assert counting.times == []


# Tables that are not mixed up


def networks():
    """Two networks of one kind."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval(), nn.Sequential(
        nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
    ).eval()


class Net(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x, time):
        return self.body(x)


def test_a_table_is_refused_on_another_schedule_and_for_another_model():
    with torch.random.fork_rng():
        one, two = (Net(body) for body in networks())
    sde, data = VPSDE(), normal(10, 2, dtype=torch.float32)
    table = estimate(EpsDenoiser(one, sde), data, [0.5, 1.0], samples=3)
    AnalyticDenoiser(EpsDenoiser(one, sde), table)
    for other in (VPSDE(beta_max=19.0), VESDE(), DDPMChain()):
        with pytest.raises(ValueError, match="the table was made for VPSDE"):
            AnalyticDenoiser(EpsDenoiser(one, other), table)
        with pytest.raises(ValueError, match="the grid was made for"):
            optimal_tableau(DDPM(), Grid.customary(other, 3), table)
    for model in (EpsDenoiser(two, sde), X0Denoiser(one, sde), Clip(EpsDenoiser(one, sde))):
        with pytest.raises(ValueError, match="any_model=True"):
            AnalyticDenoiser(model, table)
        assert AnalyticDenoiser(model, table, any_model=True).table is table
    assert fingerprint(Clip(Nonlinear(sde), -1, 1)) != fingerprint(Clip(Nonlinear(sde), -2, 2))
    assert fingerprint(Clip(EpsDenoiser(one, sde))) == fingerprint(Clip(EpsDenoiser(one, sde)))
    assert fingerprint(EpsDenoiser(nn.DataParallel(one), sde)) == table.model
    one.body[1].running_mean += 1
    assert fingerprint(EpsDenoiser(one, sde)) != table.model


def test_a_wrong_table_is_refused():
    with pytest.raises(TypeError, match="expected a VarianceTable"):
        AnalyticDenoiser(Nonlinear(VPSDE()), [0.5])
    good = table_of(VPSDE(), [0.1, 0.5], [0.1, 0.5])
    for data_range in ((1.0, -1.0), (0.0, math.inf), 1.0):
        with pytest.raises(ValueError, match="data_range"):
            AnalyticDenoiser(Nonlinear(VPSDE()), good, data_range)
    for change, match in (
        ({"t": [0.5, 0.1]}, "strictly increasing"),
        ({"eps_square": torch.tensor([0.1])}, r"eps_square has shape \(1,\)"),
        ({"eps_square": torch.tensor([0.1, math.nan])}, "not finite at t = 0.5"),
        ({"samples": 0}, "samples=0"),
    ):
        with pytest.raises(ValueError, match=match):
            dataclasses.replace(good, **change)
    with pytest.raises(TypeError, match="expected the SDE"):
        dataclasses.replace(good, sde="vp")


STORED = SDES | {"vp 2": VPSDE(beta_max=12.5)}


@pytest.mark.parametrize("sde", STORED.values(), ids=STORED)
def test_a_table_survives_a_file(sde, tmp_path):
    path = tmp_path / "tables" / "gamma.npz"
    t = torch.tensor([0.2, 0.7]).double() * sde.t_max
    table = VarianceTable(sde, t, t / 2000 + 0.1, torch.tensor([math.nan, 0.1]).double(), 7, "abc")
    table.save(path)
    assert [file.name for file in path.parent.iterdir()] == ["gamma.npz"]
    for given in (None, sde):
        found = VarianceTable.load(path, sde=given)
        assert found.sde == sde
        assert (found.samples, found.model) == (7, "abc")
        for name in ("t", "eps_square", "stderr"):
            torch.testing.assert_close(getattr(found, name), getattr(table, name), rtol=0, atol=0, equal_nan=True)
    for other in (VPSDE(beta_max=7.0), DDPMChain.linear(7)):
        with pytest.raises(CheckpointError) as error:
            VarianceTable.load(path, sde=other)
        assert all(text in str(error.value) for text in (str(path), repr(sde), repr(other)))


def test_an_sde_of_ones_own_is_given(tmp_path):
    class Mine(SDE):
        t_min, t_max = 1e-3, 0.9

        def alpha(self, t):
            return torch.cos(as_time(t))

        def sigma(self, t):
            return torch.sin(as_time(t))

    path = tmp_path / "mine.npz"
    table_of(Mine(), [0.3], [0.5]).save(path)
    assert VarianceTable.load(path, sde=Mine()).sde == Mine()
    with pytest.raises(CheckpointError, match=r"mine.npz was made for Mine.*give it"):
        VarianceTable.load(path)


def test_of_a_table_no_bit_may_change_unseen(tmp_path):
    """Whichever it is: the file is refused, or the same table is read."""
    path = tmp_path / "gamma.npz"
    table = table_of(VPSDE(), [0.1, 0.5, 1.0], 0.5)
    table.save(path)
    content = path.read_bytes()
    for k in range(0, len(content) * 8, 41):
        path.write_bytes(content[: k // 8] + bytes([content[k // 8] ^ 1 << k % 8]) + content[k // 8 + 1 :])
        try:
            found = VarianceTable.load(path)
        except CheckpointError:
            continue
        assert (found.sde, found.samples, found.model) == (table.sde, table.samples, table.model)
        for name in ("t", "eps_square", "stderr"):
            torch.testing.assert_close(getattr(found, name), getattr(table, name), rtol=0, atol=0, equal_nan=True)


def test_damaged_and_foreign_files_are_named(tmp_path):
    path = tmp_path / "gamma.npz"
    table_of(VPSDE(), np.linspace(0.1, 1, 500), 0.5).save(path)
    content = path.read_bytes()
    for length in (0, 1, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"gamma\.npz cannot be read"):
            VarianceTable.load(path)
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :])
    with pytest.raises(CheckpointError, match=r"gamma.npz"):
        VarianceTable.load(path)
    np.savez(path, a=np.zeros(3))
    with pytest.raises(CheckpointError, match=r"gamma.npz is not a variance table"):
        VarianceTable.load(path)
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(CheckpointError, match=r"gamma.npz cannot be read"):
        VarianceTable.load(path)
    np.savez(path, format=np.array([{}], dtype=object))
    with pytest.raises(CheckpointError, match=r"gamma.npz cannot be read"):
        VarianceTable.load(path)
    path.write_bytes(content)
    parts = dict(np.load(path))
    for change in ({"t": None}, {"more": np.zeros(1)}, {"t": parts["t"][::-1]}, {"samples": np.int64(0)}):
        np.savez(path, **{k: v for k, v in (parts | change).items() if v is not None})
        with pytest.raises(CheckpointError, match=r"gamma.npz (lacks|is damaged)"):
            VarianceTable.load(path)
    with pytest.raises(FileNotFoundError):
        VarianceTable.load(tmp_path / "nothing.npz")


# Sampling


@pytest.mark.parametrize("sde", [VPSDE(), FlowSDE(), DDPMChain()], ids=["vp", "flow", "chain"])
@pytest.mark.parametrize("solver", MARGINAL_PRESERVING.values(), ids=MARGINAL_PRESERVING)
def test_a_constant_variance_of_every_element_is_the_table(sde, solver):
    grid, x = Grid.customary(sde, 6), normal(3, 2, 4)
    nodes = [max(sde.t_min, 0.01 * sde.t_max), 0.5 * sde.t_max, 0.99 * sde.t_max]
    analytic = AnalyticDenoiser(Nonlinear(sde), table_of(sde, nodes, [0.2, 0.6, 0.99]), (-2.0, 2.0))
    every = KnowsVariance(Nonlinear(sde), lambda x, t: torch.full_like(x, float(analytic.covariance(t))))
    for last in (None, 0.01, 0.0):
        run = {"grid": grid, "seed": 4, "trajectory": True}
        by_table, by_loop = (sample(d, x, OptimalVariance(solver, last=last), **run) for d in (analytic, every))
        torch.testing.assert_close(by_loop.trajectory, by_table.trajectory, rtol=1e-9, atol=1e-9)
        assert by_loop.nfe == by_table.nfe == 6


def test_every_element_has_its_own_variance():
    """One step from one point: mean and spread of 10,000 draws, by the rule."""
    sde, grid = VPSDE(), Grid(VPSDE(), [0.8, 0.4])
    var = torch.tensor([[0.01, 0.3], [0.0, 2.0]]).double()
    denoiser = KnowsVariance(Nonlinear(sde), lambda x, t: var)
    x = normal(1, 2, 2).expand(10_000, 2, 2)
    plain = DDIM(0.5).tableau(grid)
    b, c = float(plain.b[0, 0] * plain.q[0]), float(plain.c[0])
    for last in (None, 0.5):
        found = sample(denoiser, x, OptimalVariance(DDIM(0.5), last=last), grid=grid, seed=0).x
        std = (c**2 + b**2 * var).sqrt()
        if last is not None:
            std = std.clamp(max=last * math.sqrt(math.pi / 2))
            assert 1 <= int((std == std.max()).sum()) <= 3
            assert (found - found.mean(0)).abs().mean(0).max() < last * (1 + 5 / math.sqrt(10_000))
        mean = float(plain.a[0]) * x[:1] + b * Nonlinear(sde)(x[:1], 0.8).mean
        assert bool(((found.mean(0) - mean[0]).abs() <= 5 * std / 100).all())
        torch.testing.assert_close(found.std(0), std, rtol=5 / math.sqrt(20_000), atol=0)


def test_the_last_noisy_step_is_cut_and_no_other():
    sde = DDPMChain()
    table = table_of(sde, [1.0, 1000.0], 0.0)
    for grid, row in ((Grid.strided(sde, 5), 3), (Grid.customary(sde, 5, end=1.0), 4)):
        free, cut = (optimal_tableau(DDPM(), grid, table, (-1.0, 1.0), last) for last in (None, 2 * 2 / 255))
        assert torch.equal((free.c != cut.c).nonzero().flatten(), torch.tensor([row]))
        # 3.87e-4 for y = 2 on data in [-1, 1] (Bao et al., 2022)
        assert float(cut.c[row] ** 2) == pytest.approx(3.87e-4, rel=2e-3)
        assert torch.equal(optimal_tableau(DDPM(), grid, table, (-1.0, 1.0), 1e9).c, free.c)


def test_the_reference_clamps_x0_and_keeps_the_raw_eps():
    """The textbook loops, with a denoiser that leaves [-0.4, 0.4]."""
    sde, grid, x = VPSDE(), Grid.uniform(VPSDE(), 6), normal(4, 3)
    z = normal(6, 4, 3, seed=5)
    denoiser = KnowsVariance(Nonlinear(sde), lambda x, t: 0.3 + 0.1 * x.cos())
    alpha, sigma = sde.alpha(grid.times).tolist(), sde.sigma(grid.times).tolist()
    for solver in (DDIM(), DDIM(0.7), DDIM(1.0), DDPM()):
        expected, cs = x, solver.tableau(grid).c.tolist()
        for i, t in enumerate(grid.times[:-1].tolist()):
            D, var = denoiser(expected, t)
            x0, eps = D.clamp(-0.4, 0.4), (expected - alpha[i] * D) / sigma[i]
            kappa = alpha[i + 1] - math.sqrt(sigma[i + 1] ** 2 - cs[i] ** 2) / sigma[i] * alpha[i]
            if isinstance(solver, DDIM):
                mean = alpha[i + 1] * x0 + math.sqrt(sigma[i + 1] ** 2 - cs[i] ** 2) * eps
            else:  # DDPM's posterior mean of x_t and the clamped x_0
                ratio = (alpha[i] / alpha[i + 1]) ** 2
                share = 1 - ratio * sigma[i + 1] ** 2 / sigma[i] ** 2
                mean = (
                    alpha[i] / alpha[i + 1] * sigma[i + 1] ** 2 / sigma[i] ** 2 * expected + alpha[i + 1] * share * x0
                )
            expected = mean + (cs[i] ** 2 + kappa**2 * var).sqrt() * z[i] * (i < 5)
        clamped = OptimalVariance(solver, clamp=(-0.4, 0.4))
        found = sample(denoiser, x, clamped, grid=grid, noise=lambda row, _: z[row]).x
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        assert found.abs().max() <= 0.4
        wide = sample(denoiser, x, OptimalVariance(solver, clamp=(-9.0, 9.0)), grid=grid, seed=0).x
        torch.testing.assert_close(wide, sample(denoiser, x, OptimalVariance(solver), grid=grid, seed=0).x)


def test_a_clamped_run_takes_the_analytic_variance_too():
    sde, x = VPSDE(), normal(3, 2)
    analytic = AnalyticDenoiser(Nonlinear(sde), table_of(sde, [0.01, 1.0], [0.2, 0.999]))
    wide, none = (
        sample(analytic, x, OptimalVariance(DDIM(0.5), clamp=c), steps=5, seed=0).x for c in ((-99.0, 99.0), None)
    )
    torch.testing.assert_close(wide, none)


@pytest.mark.parametrize("every", [False, True], ids=["table", "elements"])
def test_it_is_a_solver_like_any_other(every):
    sde = VPSDE()
    analytic = AnalyticDenoiser(Nonlinear(sde), table_of(sde, [0.01, 1.0], [0.2, 0.999]))
    denoiser = KnowsVariance(Nonlinear(sde), lambda x, t: 0.1 * x**2) if every else analytic
    solver = OptimalVariance(DDIM(0.5))
    whole = sample(denoiser, (4, 3), solver, steps=7, seed=9, trajectory=True)
    assert whole.nfe == 7
    assert whole.grid == DDIM(0.5).grid(sde, 7)
    assert whole.trajectory.shape == (8, 4, 3)
    assert whole.x.dtype == torch.float32
    assert sample(denoiser, (4, 3), solver, nfe=7, seed=9).x.equal(whole.x)
    alone = sample(denoiser, (1, 3), solver, steps=7, seed=[sample_seeds(9, 4)[2]]).x
    torch.testing.assert_close(alone, whole.x[2:3])
    half = sample(denoiser, normal(2, 3).bfloat16(), solver, steps=3, seed=0)
    assert half.x.dtype == torch.bfloat16
    x = normal(2, 3).requires_grad_()
    sample(denoiser, x, solver, steps=3, seed=0, differentiable=True).x.sum().backward()
    assert bool((x.grad != 0).all())
    assert sample(Clip(analytic, -0.1, 0.1), (4, 3), solver, steps=7, seed=9).x.abs().max() <= 0.1


@pytest.mark.parametrize("every", [False, True], ids=["table", "elements"])
def test_a_nan_in_a_run_is_found(every):
    sde = VPSDE()

    def net(x, t):
        return torch.where((t[:, None] < 0.6) & (torch.arange(len(x))[:, None] == 1), math.nan, 0.1 * x)

    analytic = AnalyticDenoiser(X0Denoiser(net, sde), table_of(sde, [0.01, 1.0], [0.2, 0.999]))
    denoiser = KnowsVariance(X0Denoiser(net, sde), lambda x, t: 0.1 + 0 * x) if every else analytic
    with pytest.raises(NonFiniteError) as error:
        sample(denoiser, (3, 2), OptimalVariance(DDPM()), grid=Grid.uniform(sde, 4), seed=0)
    assert (error.value.step, error.value.time, error.value.samples) == (2, 0.5, [1])


def test_a_negative_variance_is_no_variance():
    sde = VPSDE()
    denoiser = KnowsVariance(Nonlinear(sde), lambda x, t: -torch.ones_like(x))
    with pytest.raises(NonFiniteError, match="step 0"):
        sample(denoiser, (3, 2), OptimalVariance(DDIM()), steps=4, seed=0)


REFUSED = {
    "multistep": (DPMSolverPP(2), "read those before them"),
    "two stages": (Heun(), "several evaluations"),
    "langevin": (AnnealedLangevin(), "several evaluations"),
    "beta": (DDPM("beta"), "count twice"),
    "ancestral": (Ancestral(), "count twice"),
}


@pytest.mark.parametrize(("solver", "match"), REFUSED.values(), ids=REFUSED)
def test_solvers_of_other_kinds_are_refused(solver, match):
    sde = VPSDE()
    counting = Counting(Nonlinear(sde))
    table = table_of(sde, [0.5], [0.5])
    for denoiser in (AnalyticDenoiser(counting, table), KnowsVariance(counting, lambda x, t: x**2)):
        with pytest.raises(ValueError, match=match):
            sample(denoiser, normal(2, 3), OptimalVariance(solver), grid=Grid.uniform(sde, 6), seed=0)
    with pytest.raises(ValueError, match=match):
        optimal_tableau(solver, Grid.uniform(sde, 6), table)
    assert counting.times == []


def test_bad_options_and_denoisers_without_a_variance_are_refused():
    sde, x = VPSDE(), normal(2, 3)
    with pytest.raises(ValueError, match="has no table"):
        OptimalVariance(AdaptiveODE())
    with pytest.raises(ValueError, match="has no table"):
        OptimalVariance(OptimalVariance(DDPM()))
    with pytest.raises(TypeError, match="wraps a solver"):
        OptimalVariance(DDPM)
    for options in (
        {"last": -1.0},
        {"last": math.nan},
        {"clamp": (1.0, -1.0)},
        {"clamp": (0.0, math.nan)},
        {"clamp": 1.0},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            OptimalVariance(DDPM(), **options)
    with pytest.raises(ValueError, match="last"):
        optimal_tableau(DDPM(), Grid.uniform(sde, 2), table_of(sde, [0.5], [0.5]), last=-1.0)
    with pytest.raises(TypeError, match="optimal_tableau"):
        OptimalVariance(DDPM()).tableau(Grid.uniform(sde, 2))
    calls = []
    bare = EpsDenoiser(lambda x, t: calls.append(t), sde)
    with pytest.raises(ValueError, match="knows no Var"):
        sample(bare, x, OptimalVariance(DDPM()), steps=3, seed=0)
    assert calls == []
    with pytest.raises(ValueError, match="knows no Var"):
        sample(Nonlinear(sde), x, OptimalVariance(DDPM()), steps=3, seed=0)
    up = Grid.uniform(sde, 3, end=0.1).reversed()
    for denoiser in (MIXTURE.denoiser(sde), AnalyticDenoiser(Nonlinear(sde), table_of(sde, [0.5], [0.5]))):
        with pytest.raises(ValueError, match="increasing grid"):
            sample(denoiser, x[:, :1], OptimalVariance(DDIM()), grid=up, seed=0)
        with pytest.raises(ValueError, match="pass noise"):
            OptimalVariance(DDPM()).iterate(denoiser, x, Grid.uniform(sde, 3))
        with pytest.raises(ValueError, match="the grid was made for"):
            OptimalVariance(DDPM()).iterate(denoiser, x, Grid.uniform(VESDE(), 3))
    with pytest.raises(ValueError, match="variance='posterior'"):
        elbo(MIXTURE.denoiser(sde), x[:, :1], OptimalVariance(DDPM()), Grid.uniform(sde, 3))


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
def test_the_analytic_denoiser_leaves_all_else_to_the_model(sde):
    model = EpsDenoiser(lambda x, t: torch.tanh(x), sde)
    t_0, t_1 = (float(sde.time_at(lam)) for lam in (2.0, -3.5))
    analytic = AnalyticDenoiser(model, table_of(sde, [t_0, t_1], [0.3, 0.9]), any_model=True)
    x = normal(3, 2, 2, dtype=torch.float32)
    for t in (t_0, torch.tensor([t_0, t_1, t_1]).double()):
        assert torch.equal(analytic(x, t).mean, model(x, t).mean)
        C = analytic(x, t).var
        assert C.dtype == x.dtype
        torch.testing.assert_close(C.flatten().double(), analytic.covariance(t).reshape(-1), rtol=1e-6, atol=0)
        assert C.expand_as(x).shape == x.shape
        for view in ("eps", "score", "v", "velocity"):
            assert torch.equal(analytic.view(view, x, t), model.view(view, x, t))
    assert float(analytic(x, 0.0).var.max()) == 0
    grid = Grid.log_snr(sde, 5, start=min(t_1, sde.t_max))
    for solver in (DDIM(), Heun()):
        assert torch.equal(*(sample(d, x, solver, grid=grid, seed=0).x for d in (model, analytic)))
    with pytest.raises(ValueError, match="alpha is zero"):
        AnalyticDenoiser(EpsDenoiser(lambda x, t: x, FlowSDE()), table_of(FlowSDE(), [0.5], [0.5])).check_times(
            torch.tensor([1.0])
        )
