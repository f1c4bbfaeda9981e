"""The reverse SDE by torchsde, and the Brownian paths: one path at any step count, strong orders, laws, failures."""

from __future__ import annotations

import functools
import itertools
import math
import warnings

import pytest
import torch
from common import SDES, Counting, end_of, normal, start_of

from scoresde import VESDE, VPSDE, FlowSDE, Grid, NonFiniteError, Posterior, Tableau, sample
from scoresde.brownian import _LEVELS, BrownianNoise, BrownianPath, snr
from scoresde.exact import Gaussian, GaussianMixture
from scoresde.noise import GeneratorNoise, SeededNoise
from scoresde.solvers import DDPM, EulerMaruyama, Heun
from scoresde.solvers.reverse_sde import ReverseSDE

METHODS = ("euler", "milstein", "srk")
TARGET = Gaussian(mean=[1.0, -1.0, 0.5], std=[0.3, 0.6, 1.0])
MIXTURE = GaussianMixture(means=[[1.0, -1.0, 0.5], [0.0, 0.0, 1.0]], std=0.7)


def noisy_grid(sde, steps):
    return Grid.log_snr(sde, steps, start=start_of(sde), end=end_of(sde))


def orders(errors):
    return [math.log2(a / b) for a, b in itertools.pairwise(errors)]


def distance(a, b):
    return float((a - b).pow(2).mean().sqrt())


# The paths.


@pytest.mark.parametrize("clock", [float, snr], ids=["half log-SNR", "snr"])
@pytest.mark.parametrize("area", [False, True])
def test_increments_have_the_law_of_brownian_motion(clock, area):
    """Variances h and, of the areas, h / 12; no correlation: each from 12,000 numbers, to 5 sigma."""
    n, times = 12_000, [-4.0, -3.7, -3.0, -0.9, 0.31, 2.0, 4.123]
    path = BrownianPath(range(600), (4, 5), clock, area)
    points = [path.at(t) for t in times]
    found = []
    for i in range(len(times) - 1):
        (W, A), (V, B) = points[i : i + 2]
        h = clock(times[i + 1]) - clock(times[i])
        found.append((V - W).flatten() / math.sqrt(h))
        if area:
            found.append(((B - A) / h - (V + W) / 2).flatten() * math.sqrt(12 / h))
    found = torch.stack(found)
    product = found @ found.T / n
    tolerance = 5 * (1 + torch.eye(len(found))).sqrt() / math.sqrt(n)
    assert bool(((product - torch.eye(len(found))).abs() < tolerance).all())
    assert float(found.mean(1).abs().max()) < 5 / math.sqrt(n)


def test_increments_add_up_whatever_was_asked_before():
    """W over two intervals is the sum, U that of both and of the first W over the second. Alone, a sample is it too."""
    path = BrownianPath([3, 2**100, 7], (4,), area=True)
    W, U = path.between(-1.0, 2.0)
    parts = [path.between(*ends) for ends in ((0.3, 2.0), (-1.0, 0.3))]
    torch.testing.assert_close(parts[0][0] + parts[1][0], W, rtol=0, atol=1e-12)
    torch.testing.assert_close(parts[0][1] + parts[1][1] + parts[1][0] * 1.7, U, rtol=0, atol=1e-12)
    alone = BrownianPath([2**100], (4,), area=True).between(-1.0, 2.0)
    assert torch.equal(alone[0][0], W[1])
    assert torch.equal(alone[1][0], U[1])


@pytest.mark.parametrize("area", [False, True])
def test_a_path_is_one_whatever_is_asked_of_it_and_with_whom(area):
    together = BrownianPath([3, 2**100, 7], (4,), snr, area)
    expected = together.at(0.3)[0]
    for t in (2.0, -3.0, -math.inf, 0.2999, 0.3001):
        together.at(t)
    assert torch.equal(together.at(0.3)[0], expected)
    assert torch.equal(BrownianPath([2**100], (4,), snr, area).at(0.3)[0][0], expected[1])
    assert torch.equal(together.at(-math.inf)[0], torch.zeros(3, 4).double())
    with pytest.raises(ValueError, match="ends at"):
        together.at(65.0)


def test_a_path_holds_one_question_s_intervals():
    """Two halves on each level and the whole, however much was asked before: the rest is made again."""
    path = BrownianPath([1], (2,), area=True)
    times = torch.empty(300, dtype=torch.float64).uniform_(-60, 60, generator=torch.Generator().manual_seed(0))
    for t in [*times.tolist(), *times.sort().values.tolist()]:
        path.at(t)
    alive, unseen = 0, [path._stack[0]]
    while unseen:
        unseen += unseen.pop().halves or ()
        alive += 1
    assert alive <= 2 * _LEVELS + 1


def test_entropies_are_a_stream_of_their_own():
    x = torch.zeros(3, 4)
    seeded = SeededNoise([5, 6, 7], torch.device("cpu"))
    z = seeded(0, x).clone()
    again = SeededNoise([5, 6, 7], torch.device("cpu"))
    entropies = again.entropies(3)
    assert torch.equal(again(0, x), z)
    assert entropies == again.entropies(3) == [SeededNoise([s], torch.device("cpu")).entropies(1)[0] for s in (5, 6, 7)]
    assert len({*entropies, 5, 6, 7}) == 6
    with pytest.raises(ValueError, match="3 seeds for 2"):
        again.entropies(2)
    drawn = GeneratorNoise(torch.Generator().manual_seed(1))
    entropies, z = drawn.entropies(3), drawn(0, x)
    drawn.rewind()
    assert entropies == drawn.entropies(3)
    assert torch.equal(drawn(0, x), z)


# Tables on a path.


def on_a_path(solver, grid, x, target=MIXTURE):
    noise = BrownianNoise(solver.tableau(grid), SeededNoise(range(len(x)), torch.device("cpu")).entropies(len(x)))
    return sample(target.denoiser(grid.sde), x, solver, grid=grid, noise=noise).x


@functools.cache
def limit_on_a_path(sde):
    return on_a_path(DDPM(), noisy_grid(sde, 512), normal(8, 3) * sde.sigma(start_of(sde)))


@pytest.mark.parametrize("solver", [DDPM(), DDPM(variance="beta"), EulerMaruyama()], ids=repr)
@pytest.mark.parametrize("sde", [VPSDE(), FlowSDE()], ids=["vp", "flow"])
def test_tables_converge_strongly_on_a_path(solver, sde):
    """Sample by sample, at order 1, to DDPM's limit: error falls 8 times in 3 halvings, to a factor 2 for the spread
    over 8 samples.
    """
    x = normal(8, 3) * sde.sigma(start_of(sde))
    limit = limit_on_a_path(sde)
    errors = [distance(on_a_path(solver, noisy_grid(sde, N), x), limit) for N in (16, 32, 64, 128)]
    assert 4 < errors[0] / errors[-1] < 16
    assert errors[-1] < 0.1


def test_where_the_mean_is_constant_ddpm_on_a_path_is_exact():
    """Data at a point: any grid gives the same sample, to rounding."""
    sde, point = VPSDE(), Gaussian(mean=[1.0, -2.0], std=0.0)
    x = normal(5, 2)
    coarse, fine = (on_a_path(DDPM(), noisy_grid(sde, N), x, point) for N in (3, 50))
    torch.testing.assert_close(coarse, fine, rtol=0, atol=1e-12)
    start = Grid(FlowSDE(), [1.0, 0.5])
    two = Grid(FlowSDE(), [1.0, 0.8, 0.5])
    torch.testing.assert_close(on_a_path(DDPM(), start, x, point), on_a_path(DDPM(), two, x, point), rtol=0, atol=1e-12)


def test_brownian_noise_refuses_rows_that_are_no_steps():
    grid = Grid(VPSDE(), [1.0, 0.5, 0.25])
    c, t, step = torch.tensor([0.1, 0.1, 0.0]), torch.tensor([1.0, 0.7, 0.5]), torch.tensor([0, 0, 1])
    halves = Tableau(grid, a=1.0, b=0.0, c=c, t=t, step=step)
    with pytest.raises(ValueError, match="row 0 draws noise but is not a whole step"):
        BrownianNoise(halves, [1])
    with pytest.raises(ValueError, match="not a whole step"):
        BrownianNoise(Tableau(Grid(VPSDE(), [1.0, 0.0]), a=1.0, b=0.0, c=0.1), [1])
    BrownianNoise(Heun().tableau(grid), [1])
    with pytest.raises(ValueError, match="1 entropies for 2 samples"):
        BrownianNoise(DDPM().tableau(grid), [1])(0, torch.zeros(2, 3))


# The SDE.


@pytest.mark.parametrize("sde", [SDES[n] for n in ("edm", "flow", "chain")], ids=["edm", "flow", "chain"])
@pytest.mark.parametrize("method", METHODS)
def test_finite_and_counted(method, sde):
    solver = ReverseSDE(method)
    grids = [Grid.uniform(sde, 1), Grid.uniform(sde, 7, end=sde.t_min), Grid.log_snr(sde, 20, start=start_of(sde))]
    for grid in grids:
        counting = Counting(TARGET.denoiser(sde))
        solution = sample(counting, (2, 3), solver, grid=grid, seed=0)
        assert solution.nfe == len(counting.times) == solver.evaluations(grid)
        assert bool(solution.x.isfinite().all())
        assert grid.times[-1] <= min(counting.times)
        assert max(counting.times) <= grid.times[0]
    counting = Counting(TARGET.denoiser(sde))
    assert sample(counting, (2, 3), solver, nfe=17, seed=0).nfe == len(counting.times) <= 17


@pytest.mark.parametrize("method", ["euler", "srk"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_the_same_seed_gives_the_same_sample_in_any_batch(method, adaptive):
    sde, solver = VPSDE(), ReverseSDE(method, adaptive_steps=adaptive, rtol=0.1, atol=0.1)
    grid = Grid.log_snr(sde, 1 if adaptive else 20, start=0.8, end=0.05)
    seeds = [11, 12, 13]
    together = sample(MIXTURE.denoiser(sde), (3, 3), solver, grid=grid, seed=seeds).x
    again = sample(MIXTURE.denoiser(sde), (3, 3), solver, grid=grid, seed=seeds).x
    alone = sample(MIXTURE.denoiser(sde), (1, 3), solver, grid=grid, seed=[13]).x
    assert torch.equal(together, again)
    tolerance = 0.3 if adaptive else 1e-5  # with its own steps a sample depends on the others, within the tolerance
    torch.testing.assert_close(alone[0], together[2], rtol=0, atol=tolerance)
    x, draws = normal(2, 3, seed=3), []
    for _ in range(2):
        draws.append(sample(MIXTURE.denoiser(sde), x, solver, grid=grid, generator=torch.Generator().manual_seed(4)).x)
    assert torch.equal(*draws)


def test_strong_orders():
    """On one path, to the limit of srk: order 1 of Euler, and srk 1.5 at least (its drift error has order 2)."""
    sde = VPSDE()
    x = normal(4, 3) * sde.sigma(start_of(sde))

    def run(method, N):
        return sample(MIXTURE.denoiser(sde), x, ReverseSDE(method), grid=noisy_grid(sde, N), seed=3).x

    limit = run("srk", 160)
    errors = {m: [distance(run(m, N), limit) for N in (20, 40, 80)] for m in METHODS if m != "milstein"}
    assert torch.equal(run("milstein", 20), run("euler", 20))
    for method, order in (("euler", 1.0), ("srk", 2.0)):
        measured = math.log2(errors[method][0] / errors[method][-1]) / 2
        assert measured > order - 0.4, (method, errors[method])
    assert errors["srk"][-1] < errors["euler"][-1] < 0.1


@pytest.mark.parametrize("sde", [VESDE(), FlowSDE(t_max=0.999)], ids=["ve", "flow"])
def test_the_marginal_law_on_gaussian_data(sde):
    """Mean and variance of 20,000 numbers to 5 sigma, and 0.005 for the method's own error at 30 steps."""
    n, mean, std = 20_000, 0.7, 0.5
    target = Gaussian(mean=[mean] * 400, std=std)
    grid = noisy_grid(sde, 30)
    t, s = grid.times[0], grid.times[-1]
    x = sde.alpha(t) * mean + torch.hypot(sde.alpha(t) * std, sde.sigma(t)) * normal(50, 400)
    x = sample(target.denoiser(sde), x, ReverseSDE("srk"), grid=grid, seed=0).x
    width = float(torch.hypot(sde.alpha(s) * std, sde.sigma(s)))
    assert abs(float(x.mean() - sde.alpha(s) * mean)) < 5 * width / math.sqrt(n) + 0.005
    assert abs(float(x.var()) / width**2 - 1) < 5 * math.sqrt(2 / n) + 0.005


@pytest.mark.parametrize("method", ["euler", "srk"])
def test_adaptive_steps_converge_to_the_same_samples(method):
    sde, x = VPSDE(), normal(2, 3)
    limit = sample(MIXTURE.denoiser(sde), x, ReverseSDE("srk"), grid=Grid.log_snr(sde, 120), seed=3).x
    errors, counts = [], []
    for tolerance in (0.3, 0.03):
        counting = Counting(MIXTURE.denoiser(sde))
        solution = sample(counting, x, ReverseSDE(method, adaptive_steps=True, rtol=tolerance, atol=tolerance), seed=3)
        assert solution.nfe == len(counting.times)
        assert solution.status == "complete"
        assert min(counting.times) == sde.t_min
        errors.append(distance(solution.x, limit))
        counts.append(solution.nfe)
    assert errors[1] < 0.05
    assert counts[1] > counts[0]


@pytest.mark.parametrize("method", ["euler", "milstein"])
def test_the_shortest_step_is_told_of_once(method):
    """In our words; torchsde says so at every step, and how it is met is ours."""
    denoiser, x, grid = MIXTURE.denoiser(VPSDE()), normal(1, 3), Grid(VPSDE(), [0.5, 0.495, 0.49])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sample(denoiser, x, ReverseSDE(method, adaptive_steps=True, rtol=1e-9, atol=1e-9), grid=grid, seed=0)
    assert [w.category for w in caught] == [UserWarning]
    assert "raise rtol" in str(caught[0].message)
    assert caught[0].filename == __file__
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sample(denoiser, x, ReverseSDE(method, adaptive_steps=True, rtol=0.1, atol=0.1), grid=grid, seed=0)
    assert not caught


def test_an_adaptive_budget_ends_with_a_state_on_the_way():
    sde, counting = VPSDE(), Counting(MIXTURE.denoiser(VPSDE()))
    solver = ReverseSDE("srk", adaptive_steps=True, rtol=0.1, atol=0.1)
    whole = sample(MIXTURE.denoiser(sde), (3, 3), solver, seed=1).nfe
    times = []
    for budget in (1, whole // 2, whole - 1):
        counting.times.clear()
        solution = sample(counting, (3, 3), solver, nfe=budget, seed=1)
        assert solution.nfe == len(counting.times) == budget
        assert solution.status == "max_nfe"
        assert bool(solution.x.isfinite().all())
        times.append(solution.t)
    assert times[0] == 1.0
    assert 1.0 > times[1] > times[2] == sde.t_min


class Broken(Counting):
    """NaN for sample 2 below t = 0.3."""

    def posterior(self, x, t, **cond):
        mean = super().posterior(x, t, **cond).mean.clone()
        if float(t) < 0.3:
            mean[2] = torch.nan
        return Posterior(mean)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("adaptive", [False, True])
def test_a_nan_ends_the_run_and_is_located(method, adaptive):
    broken = Broken(TARGET.denoiser(VPSDE()))
    solver = ReverseSDE(method, adaptive_steps=adaptive, rtol=0.1, atol=0.1)
    with pytest.raises(NonFiniteError, match=r"sample 2 became non-finite in step [12]") as error:
        sample(broken, (4, 3), solver, grid=Grid(VPSDE(), [1.0, 0.31, 0.2, 0.1]), seed=0)
    assert error.value.samples == [2]
    assert error.value.time == broken.times[-1] < 0.3


def test_gradients():
    """By differences along one path."""
    sde, x = VPSDE(), normal(1, 3)

    def end(x):
        return sample(
            MIXTURE.denoiser(sde), x, ReverseSDE("srk"), grid=noisy_grid(sde, 10), seed=0, differentiable=True
        ).x

    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(end(leaf).sum(), leaf)
    e = torch.tensor([[1e-5, 0.0, 0.0]], dtype=torch.float64)
    difference = (end(x + e) - end(x - e)).sum() / 2e-5
    torch.testing.assert_close(gradient[0, 0], difference, rtol=1e-5, atol=1e-8)


def test_refusals():
    for options in ({"method": "heun"}, {"rtol": 0.0}, {"atol": -1.0}, {"max_nfe": 0}, {"first_step": 0.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            ReverseSDE(**options)
    denoiser, x = TARGET.denoiser(VPSDE()), normal(2, 3)
    with pytest.raises(ValueError, match="give seed= or generator="):
        sample(denoiser, x, ReverseSDE(), steps=3, noise=lambda row, x: torch.randn_like(x))
    with pytest.raises(ValueError, match="the grid was made for"):
        ReverseSDE().iterate(denoiser, x, Grid.uniform(VESDE(), 3), SeededNoise([1, 2], x.device))
    with pytest.raises(ValueError, match="exactly one of steps"):
        sample(denoiser, x, ReverseSDE(), seed=0)
