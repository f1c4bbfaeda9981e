"""Optimal trajectories: the path is the cheapest, its cost is the bound's, and more steps never cost more."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from common import SDES, Counting, Nonlinear, generator, normal

from scoresde import VESDE, VPSDE, DDPMChain, Denoiser, EpsDenoiser, FlowSDE, Grid, Posterior, sample
from scoresde.errors import NonFiniteError
from scoresde.exact import Gaussian, GaussianMixture
from scoresde.likelihood import elbo
from scoresde.solvers import DDPM
from scoresde.solvers.rows import forgotten
from scoresde.variance.costs import Costs, analytic_costs, kl_costs, least_cost_path, measure_errors
from scoresde.variance.table import VarianceTable
from scoresde.variance.trajectory import optimal_grid

STDS = torch.tensor([0.1, 0.5, 2.0]).double()
GAUSSIAN = Gaussian(mean=[1.0, -2.0, 0.3], std=STDS)
SHORT = DDPMChain.linear(24, 1e-3, 0.4)


class ExactTable:
    """What `estimate` tends to on a Gaussian: C_t is the mean over the dimensions of c sigma^2 / (alpha^2 c + sigma^2).

    `lift` is added to E|eps_hat|^2 / d above `above`, as networks do that err at large t.
    """

    def __init__(self, sde, stds=STDS, above=math.inf, lift=0.0):
        self.sde, self.c, self.above, self.lift = sde, stds**2, above, lift

    def at(self, t):
        alpha, sigma = self.sde.alpha(t)[..., None], self.sde.sigma(t)[..., None]
        return (sigma**2 / (alpha**2 * self.c + sigma**2)).mean(-1) + self.lift * (t > self.above)

    def covariance(self, t, data_range=None):
        C = (-2 * self.sde.half_log_snr(t)).exp() * (1 - self.at(t)).clamp(min=0)
        return C if data_range is None else C.clamp(max=((data_range[1] - data_range[0]) / 2) ** 2)


def table_of(sde, times, stds=STDS):
    """The same as a `VarianceTable`, which is exact at its own times."""
    exact = ExactTable(sde, stds).at(times)
    return VarianceTable(sde, times, exact, torch.zeros_like(exact), samples=1)


class WithVariance(Denoiser):
    """A denoiser with C_t for its variance, as AnalyticDenoiser's."""

    def __init__(self, inner, table):
        self.inner, self.sde, self.table = inner, inner.sde, table

    def posterior(self, x, t, **cond):
        return Posterior(self.inner.posterior(x, t).mean, self.table.covariance(torch.as_tensor(t).double()).to(x))


def by_hand(cost, path):
    return sum(float(cost[s, t]) for s, t in itertools.pairwise(path))


def brute_force(cost, steps):
    N = len(cost) - 1
    paths = ([0, *middle, N] for middle in itertools.combinations(range(1, N), steps - 1))
    return min(by_hand(cost, path) for path in paths)


# ---- the path ----


@pytest.mark.parametrize("N", [1, 2, 5, 9])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_path_costs_what_the_best_of_all_paths_costs(N, seed):
    """Also negative costs, which change nothing."""
    cost = normal(N + 1, N + 1, seed=seed)
    for steps in range(1, N + 1):
        path = least_cost_path(cost, steps).tolist()
        assert len(path) == steps + 1
        assert path[0] == 0
        assert path[-1] == N
        assert path == sorted(set(path))
        assert by_hand(cost, path) == pytest.approx(brute_force(cost, steps), abs=1e-12)


def test_as_many_steps_as_nodes_is_the_whole_chain():
    assert least_cost_path(normal(31, 31), 30).tolist() == list(range(31))
    assert optimal_grid(ExactTable(SHORT), 24).times.tolist() == list(range(24, -1, -1))


def test_what_is_not_above_the_diagonal_is_not_read_and_infinity_is_no_edge():
    cost = normal(6, 6).abs()
    spoiled = torch.where(torch.ones(6, 6).triu(1) > 0, cost, torch.full_like(cost, math.nan))
    assert least_cost_path(spoiled, 3).tolist() == least_cost_path(cost, 3).tolist()
    cost[0, 1:] = math.inf
    cost[0, 4] = 1.0
    assert least_cost_path(cost, 2).tolist() == [0, 4, 5]
    with pytest.raises(ValueError, match="no path with 3 edges from node 0 to node 5"):
        least_cost_path(cost, 3)


def test_a_part_of_a_cheapest_path_is_a_cheapest_path():
    cost = normal(15, 15, seed=3).abs()
    path = least_cost_path(cost, 7).tolist()
    for k in range(1, 7):
        end = path[k]
        part = least_cost_path(cost[: end + 1, : end + 1], k).tolist()
        assert by_hand(cost, part) == pytest.approx(by_hand(cost, path[: k + 1]), abs=1e-12)


def test_bad_paths_are_refused():
    with pytest.raises(ValueError, match="expected \\(N \\+ 1, N \\+ 1\\)"):
        least_cost_path(torch.ones(3, 4), 2)
    with pytest.raises(ValueError, match="only 2 nodes"):
        least_cost_path(torch.ones(3, 3), 3)
    with pytest.raises(ValueError, match="steps=0"):
        least_cost_path(torch.ones(3, 3), 0)
    cost = torch.ones(4, 4)
    cost[1, 3] = math.nan
    with pytest.raises(ValueError, match=r"cost\[1, 3\] is NaN"):
        least_cost_path(cost, 2)


# ---- the analytic costs ----


def test_the_cost_is_that_of_analytic_dpm():
    """log(1 - beta_{t|s} Gamma_t) / 2, plus what telescopes; and log(sigma*^2 / lambda^2) / 2, the paper's KL term."""
    table, t = ExactTable(SHORT), torch.arange(1, 25).double()
    costs = analytic_costs(table)
    alpha, sigma, lam = SHORT.alpha(t), SHORT.sigma(t), SHORT.half_log_snr(t)
    gamma = table.at(t) / sigma**2
    for s, u in itertools.combinations(range(24), 2):
        beta = 1 - (alpha[u] / alpha[s]) ** 2
        J = float(torch.log(1 - beta * gamma[u]) / 2 + lam[s] - lam[u])
        assert float(costs.matrix[s + 1, u + 1]) == pytest.approx(J, rel=1e-9)
        tilde = beta * (sigma[s] / sigma[u]) ** 2
        optimal = beta / (alpha[u] / alpha[s]) ** 2 * (1 - beta * gamma[u])
        assert float(costs.matrix[s + 1, u + 1]) == pytest.approx(float(torch.log(optimal / tilde) / 2), rel=1e-9)
    assert costs.matrix[0, 1] == 0
    assert bool(costs.matrix[0, 2:].isinf().all())


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
def test_the_sum_of_the_costs_is_the_bound_of_the_chain(sde):
    """elbo with the optimal variance, over data: 4,000 samples, 2 draws; 5 standard errors, of 0.002 to 0.008 a dim."""
    n = 4000
    x0 = GAUSSIAN.sample(n, generator(0), dtype=torch.float64)
    whole = Grid.power(sde, 12, last=None if isinstance(sde, DDPMChain) else float(sde.time_at(2.5)))
    grid = Grid(sde, whole.times[int(sde.alpha(whole.times[0]) == 0) :])
    table = ExactTable(sde)
    bound = elbo(WithVariance(GAUSSIAN.denoiser(sde), table), x0, DDPM(), grid, variance="posterior", draws=2, seed=0)
    costs = analytic_costs(table, grid)
    found = -bound.denoising / 3
    assert abs(float(found.mean()) - costs.total(grid)) < 5 * float(found.std()) / math.sqrt(n)


@pytest.mark.parametrize("sde", [SHORT, VPSDE(), VESDE()], ids=["chain", "vp", "ve"])
def test_the_optimal_trajectory_is_never_worse_than_another_and_more_steps_never_cost_more(sde):
    """Above all than even steps, on a Gaussian with several widths."""
    table = ExactTable(sde)
    times = torch.arange(1, 25).double() if sde is SHORT else Grid.power(sde, 24).times[:-1].flip(0)
    costs = analytic_costs(table, times)
    totals = []
    for K in range(2, 25):
        grid = optimal_grid(table, K, times=times)
        assert grid.steps == K
        assert (grid.times[0], grid.times[-2], grid.times[-1]) == (times[-1], times[0], 0)
        even = (torch.arange(K) * (23 / (K - 1))).round().long()
        even_grid = Grid(sde, torch.cat([times[even].flip(0), torch.zeros(1)]))
        totals.append(costs.total(grid))
        assert totals[-1] <= costs.total(even_grid) + 1e-12
        if 4 <= K <= 12:
            assert totals[-1] < costs.total(even_grid) - 1e-3  # by much, with few steps
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(totals))


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
def test_a_table_gives_the_grid(sde):
    """Through `VarianceTable`, whose bounds reach to where alpha = 0."""
    whole = Grid.power(sde, 20).times[:-1].flip(0)
    noisy = whole[: 20 - int(sde.alpha(whole[-1]) == 0)]
    table = table_of(sde, noisy)
    ours, theirs = analytic_costs(table, noisy).matrix, analytic_costs(ExactTable(sde), noisy).matrix
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    grid = optimal_grid(table, 7, times=whole)
    assert grid.steps == 7
    assert (grid.times[0], grid.times[-2]) == (whole[-1], whole[0])


def test_every_trajectory_of_an_isotropic_gaussian_costs_the_same():
    """There the optimal variance makes the chain exact, whatever its steps."""
    costs = analytic_costs(ExactTable(SHORT, torch.tensor([0.7]).double()))
    whole = costs.total(costs.grid(24))
    for grid in (costs.grid(2), costs.grid(9), Grid(SHORT, [24.0, 20.0, 3.0, 1.0, 0.0])):
        assert costs.total(grid) == pytest.approx(whole, rel=1e-12)


def test_the_costs_of_some_of_the_times_are_part_of_the_costs_of_all():
    """A chain within the chain: its own grid is the best on its own times."""
    table = ExactTable(SHORT)
    all_of_them, best = analytic_costs(table), optimal_grid(table, 8)
    some = analytic_costs(table, best)
    i = best.times.flip(0).long()
    torch.testing.assert_close(some.matrix[1:, 1:], all_of_them.matrix[i[1:]][:, i[1:]], rtol=1e-12, atol=0)
    assert some.grid(8) == best
    assert some.total(best) == pytest.approx(all_of_them.total(best))


def test_a_bound_on_the_data_lowers_the_costs():
    """C_t <= ((hi - lo) / 2)^2."""
    table = ExactTable(SHORT)
    free, bounded = analytic_costs(table).matrix, analytic_costs(table, data_range=(-0.1, 0.1)).matrix
    assert bool((bounded[1:, 1:] <= free[1:, 1:]).all())
    t = torch.tensor(24.0).double()
    expected = torch.log1p(((2 * SHORT.half_log_snr(t - 1)).exp() - (2 * SHORT.half_log_snr(t)).exp()) * 0.1**2) / 2
    assert float(bounded[23, 24]) == pytest.approx(float(expected))


def test_any_solver_takes_the_grid():
    grid = optimal_grid(ExactTable(VPSDE()), 6)
    x = sample(GAUSSIAN.denoiser(VPSDE()), (4, 3), DDPM(), grid=grid, seed=0)
    assert x.grid == grid
    assert x.nfe == 6
    assert optimal_grid(ExactTable(VPSDE()), 1).times.tolist() == [1.0, 0.0]
    flow = FlowSDE(t_max=0.99)
    assert optimal_grid(ExactTable(flow), 5).times[0] == 0.99


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
def test_a_true_table_is_consistent_and_one_that_errs_is_made_so(sde):
    """1 / C_t - SNR_t does not increase with t."""
    whole = Grid.power(sde, 20).times[:-1].flip(0)
    t = whole[: 20 - int(sde.alpha(whole[-1]) == 0)]
    true = analytic_costs(ExactTable(sde), t, consistent=False).matrix
    torch.testing.assert_close(analytic_costs(ExactTable(sde), t).matrix, true, rtol=1e-6, atol=1e-9)
    errs = ExactTable(sde, above=float(t[12]), lift=1.0)  # C_t = 0 beyond: steps from there seem to cost nothing
    inner = torch.ones(len(t), len(t)).triu(1) > 0
    raw, raised = (analytic_costs(errs, t, consistent=c).matrix[1:, 1:] for c in (False, True))
    assert bool((raw[:, 13:][inner[:, 13:]] == 0).all())
    assert bool((raised[:, 13:][inner[:, 13:]] > 0).all())
    torch.testing.assert_close(raised[:, :13], raw[:, :13], rtol=1e-6, atol=1e-9)
    assert bool((raised <= true[1:, 1:] * (1 + 1e-6) + 1e-9).all())  # what is implied is no more than what is true


def test_an_unsound_tail_gets_even_steps():
    """methods.md A.6 by hand: N = 24, n* = 21, so num_bad = 8, N1 = 16 and K1 = ceil((1 - 0.8 * 8 / 24) 10) = 8."""
    table = ExactTable(SHORT, above=20.5, lift=1.0)
    grid = optimal_grid(table, 10, even_tail=True)
    assert grid.steps == 10
    assert grid.times[:3].tolist() == [24.0, 20.0, 16.0]
    sound = Costs(SHORT, torch.arange(17).double(), analytic_costs(table).matrix[:17, :17])
    assert grid.times[2:].tolist() == sound.grid(8).times.tolist()
    for K in range(2, 25):
        grid = optimal_grid(table, K, even_tail=True)
        assert grid.steps == K
        assert grid.times[[0, -2, -1]].tolist() == [24.0, 1.0, 0.0]
    assert optimal_grid(ExactTable(SHORT), 10, even_tail=True) == optimal_grid(ExactTable(SHORT), 10)
    with pytest.raises(ValueError, match="exceeds 1 from time 11 of 24 on"):
        optimal_grid(ExactTable(SHORT, above=10.5, lift=1.0), 10, even_tail=True)


def test_bad_times_are_refused():
    table = ExactTable(SHORT)
    with pytest.raises(ValueError, match="only 24 times"):
        optimal_grid(table, 25)
    with pytest.raises(ValueError, match="strictly increasing"):
        analytic_costs(table, torch.tensor([2.0, 1.0]))
    with pytest.raises(ValueError, match=r"run from 0\.0"):
        analytic_costs(table, torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match="the grid was made for"):
        analytic_costs(table, Grid.uniform(VPSDE(), 4))
    with pytest.raises(ValueError, match="no finite C_t at t = 1 "):
        analytic_costs(ExactTable(FlowSDE()), torch.tensor([0.5, 1.0]))
    with pytest.raises(ValueError, match="not made of these costs' times"):
        analytic_costs(table, torch.tensor([1.0, 5.0, 24.0])).total(Grid(SHORT, [24.0, 6.0, 1.0, 0.0]))


# ---- the measured costs ----


@pytest.mark.parametrize("variance", ["posterior", "beta"])
@pytest.mark.parametrize("sde", [SHORT, VPSDE(), VESDE()], ids=["chain", "vp", "ve"])
def test_the_measured_costs_are_the_terms_of_the_bound(sde, variance):
    """Of a network that errs: each F(s, t) against the divergence of the two Gaussians of the step, written out for the
    same draws of x_0 and noise."""
    model, data = Nonlinear(sde), normal(40, 3)
    times = Grid.power(sde, 5).times[:-1].flip(0)
    errors = measure_errors(model, data, times, samples=40, batch_size=7, seed=3)
    costs, some_variance = errors.costs(variance), errors.costs(torch.full((5,), 0.07))
    draws = draws_of(model, data, times, samples=40, seed=3)
    for j, t in enumerate(times):
        x0, x_t = draws[j]
        D = model(x_t, t).mean
        for i, s in enumerate(times[:j]):
            share = forgotten(sde, t[None], s[None])[0]
            a = sde.alpha(s) / sde.alpha(t) * (1 - share)
            b = sde.alpha(s) * share
            q = torch.distributions.Normal(a * x_t + b * x0, sde.sigma(s) * share.sqrt())
            v = sde.sigma(t if variance == "beta" else s) ** 2 * share
            p = torch.distributions.Normal(a * x_t + b * D, v.sqrt())
            expected = float(torch.distributions.kl_divergence(q, p).mean())
            assert float(costs.matrix[i + 1, j + 1]) == pytest.approx(expected, rel=1e-5)
            p = torch.distributions.Normal(p.mean, (q.variance + 0.07 * b**2).sqrt())
            expected = float(torch.distributions.kl_divergence(q, p).mean())
            assert float(some_variance.matrix[i + 1, j + 1]) == pytest.approx(expected, rel=1e-5)
        std = float(costs_decoder(sde, t))
        expected = -float(torch.distributions.Normal(D, std).log_prob(x0).mean())
        assert float(costs.matrix[0, j + 1]) == pytest.approx(expected, rel=1e-5)
    for other in (costs, some_variance):
        assert bool((errors.costs("optimal").matrix <= other.matrix + 1e-9).all())


def costs_decoder(sde, t):
    if sde is SHORT and t == 1:  # the posterior standard deviation of 2 -> 1
        return (
            sde.sigma(1.0) * (1 - (sde.alpha(2.0) * sde.sigma(1.0) / sde.sigma(2.0)) ** 2 / sde.alpha(1.0) ** 2).sqrt()
        )
    return sde.sigma(t) / sde.alpha(t)


def draws_of(model, data, times, samples, seed):
    """(x_0, x_t) that `measure_errors` shows the network at each time, in its order: the identity of x_0 is read from
    what a second model, whose posterior mean is x_t itself, is shown."""

    class Spy(Denoiser):
        def __init__(self):
            self.sde, self.seen = model.sde, []

        def posterior(self, x, t, **cond):
            self.seen.append(x.clone())
            return Posterior(x)

    spy = Spy()
    measure_errors(spy, data, times, samples=samples, batch_size=samples, seed=seed)
    alpha, sigma = model.sde.alpha(times), model.sde.sigma(times)
    # Two times give two equations for x_0 and eps.
    (a, b), (c, d) = (alpha[0], sigma[0]), (alpha[-1], sigma[-1])
    x0 = (d * spy.seen[0] - b * spy.seen[-1]) / (a * d - b * c)
    return [(x0, x_t) for x_t in spy.seen]


def test_the_measured_total_is_the_elbo():
    """All but the prior's part, over 3,000 samples, 5 standard errors; with the bins of 17 levels, too."""
    n, sde = 3000, SHORT
    data = (GAUSSIAN.sample(n, generator(0), dtype=torch.float64) * 0.3).clamp(-1, 1)
    data = ((data + 1) * 8).round() / 8 - 1
    model = GAUSSIAN.denoiser(sde)
    bins = {"levels": 17, "data_range": (-1.0625, 1.0625)}
    for variance, options in (("posterior", {}), ("beta", bins)):
        costs = kl_costs(model, data, variance=variance, samples=n, **options)
        for grid in (costs.grid(5), Grid(sde, [24.0, 11.0, 1.0, 0.0])):
            bound = elbo(model, data, DDPM(variance=variance), grid, draws=1, seed=1, **options)
            found = -(bound.denoising + bound.reconstruction) / 3
            assert abs(float(found.mean()) - costs.total(grid)) < 5 * math.sqrt(2) * float(found.std()) / math.sqrt(n)


def test_errors_of_the_exact_denoiser_are_the_tables():
    """C_t to its Monte-Carlo error: a chi^2 of 6,000 samples in each of 3 dimensions of unequal width, so 5 sqrt(2/n)
    at most, relative."""
    times, data = Grid.power(VPSDE(), 20), GAUSSIAN.sample(6000, generator(1))
    errors = measure_errors(GAUSSIAN.denoiser(VPSDE()), data, times, samples=6000)
    expected = ExactTable(VPSDE()).covariance(errors.times)
    assert len(errors.times) == 20
    assert float((errors.mse / expected - 1).abs().max()) < 5 * math.sqrt(2 / 6000)


def test_watsons_trajectory_beats_even_steps_and_moves_its_decoder():
    target = GaussianMixture(means=[[-0.5, 0.2], [0.6, -0.4]], std=0.1)
    costs = kl_costs(target.denoiser(SHORT), target.sample(500, generator(0)), variance="beta", samples=500)
    totals = []
    for K in range(1, 25):
        grid = costs.grid(K)
        assert grid.steps == K
        totals.append(costs.total(grid))
        even = Grid.strided(SHORT, K, "linspace") if K > 1 else Grid(SHORT, [24.0, 0.0])
        assert totals[-1] <= costs.total(even) + 1e-9
    assert totals[4] < costs.total(Grid.strided(SHORT, 5, "linspace")) - 0.02


def test_one_evaluation_a_time_and_batch_and_the_draws_do_not_depend_on_the_batch():
    times = torch.tensor([1.0, 5.0, 24.0])
    model = Counting(Nonlinear(SHORT))
    data = normal(10, 2, 2, dtype=torch.float32)
    small = measure_errors(model, data, times, samples=25, batch_size=10, seed=4)
    assert model.times == [1.0, 5.0, 24.0] * 3
    large = measure_errors(model, data, times, samples=25, batch_size=100, seed=4)
    torch.testing.assert_close(small.mse, large.mse, rtol=1e-5, atol=1e-9)
    other = measure_errors(model, data, times, samples=25, batch_size=100, seed=5)
    assert not torch.equal(large.mse, other.mse)


def test_conditions_go_with_the_data():
    data, shift = normal(30, 2, dtype=torch.float32), normal(30, dtype=torch.float32, seed=1)

    def net(x, time, shift, scale):
        return shift[:, None] * scale * torch.ones_like(x)

    model = EpsDenoiser(net, SHORT)
    errors = measure_errors(model, data, torch.tensor([3.0]), samples=30, cond={"shift": shift, "scale": 2.0})
    t = torch.tensor(3.0)
    mean = float((2 * shift).square().mean()) + 1  # E |eps - c|^2 / d, up to the sample's fluctuation
    assert float(errors.mse[0] * (2 * SHORT.half_log_snr(t)).exp()) == pytest.approx(mean, rel=0.5)
    exact = EpsDenoiser(lambda x, time, x0: (x - SHORT.alpha(t) * x0) / SHORT.sigma(t), SHORT)
    assert float(measure_errors(exact, data, torch.tensor([3.0]), samples=60, cond={"x0": data}).mse[0]) < 1e-12


def test_bad_data_and_networks_are_refused():
    data = normal(8, 2, dtype=torch.float32)
    model = Nonlinear(SHORT)
    with pytest.raises(ValueError, match="variance='learned'"):
        kl_costs(model, data, variance="learned")
    with pytest.raises(ValueError, match=r"variance has shape \(3,\): expected 24 finite"):
        kl_costs(model, data, samples=8, variance=torch.zeros(3))
    with pytest.raises(ValueError, match="samples=0"):
        measure_errors(model, data, samples=0)
    spoiled = data.clone()
    spoiled[3] = math.nan
    with pytest.raises(ValueError, match="not finite in samples 3"):
        measure_errors(model, spoiled, samples=8)

    def net(x, time):
        return torch.where((time == 7)[:, None], math.nan, x)

    with pytest.raises(NonFiniteError, match="at t = 7 ") as error:
        measure_errors(EpsDenoiser(net, SHORT), data, samples=8)
    assert error.value.time == 7.0
    assert sorted(error.value.samples) == list(range(8))
