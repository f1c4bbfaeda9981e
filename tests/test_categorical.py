"""Whole states: processes against products of matrices, samples and bounds against known laws."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import chi2

import scoresde
from scoresde import VPSDE, EpsDenoiser, Grid, elbo, sample
from scoresde.categorical import (
    Ancestral,
    CategoricalDenoiser,
    CategoricalProcess,
    ProductDenoiser,
    ProductProcess,
    Table,
    TauLeaping,
)
from scoresde.exact import Gaussian
from scoresde.guidance import ClassifierFree
from scoresde.nn import MLP, Columns, OneHot
from scoresde.noise import CounterNoise, sample_seeds
from scoresde.solvers import DDIM, DDPM
from scoresde.training import CategoricalConfig, TrainConfig, Trainer, bound_loss, load, load_categorical

K = 3
UNIFORM, MASKED = CategoricalProcess.uniform(K, "cosine"), CategoricalProcess.absorbing(K)
STEPS = CategoricalProcess.uniform(K, steps=10)
RANDOM = torch.rand(6, K, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
CHAIN = CategoricalProcess.chain(RANDOM / RANDOM.sum(2, keepdim=True))
PROCESSES = [UNIFORM, MASKED, STEPS, CategoricalProcess.absorbing(K, "sine", steps=10), CHAIN]
WEIGHTS = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
ONE = Table(torch.arange(K)[:, None], WEIGHTS)
TWO = Table(torch.cartesian_prod(torch.arange(K), torch.arange(K)), [0.3, 0.05, 0.05, 0.05, 0.2, 0.05, 0.05, 0.05, 0.2])


def times(process):
    """s < t, inside; nodes of a chain."""
    s, t = 0.3 * process.t_max, 0.7 * process.t_max
    return (round(s), round(t)) if process.steps else (s, t)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_marginals_and_posteriors_are_products_of_matrices(process):
    s, t = times(process)
    to_s, from_s, to_t = process.matrix(0, s), process.matrix(s, t), process.matrix(0, t)
    assert torch.allclose(to_s @ from_s, to_t, rtol=1e-12)
    x0 = torch.arange(K)[:, None]
    assert torch.allclose(process.marginal(x0, t)[:, 0], to_t[:K], rtol=1e-12)
    x = torch.arange(process.size)[:, None]
    possible = process.likelihood(x, t)
    assert torch.allclose(possible[:, 0], to_t[:K].T, rtol=1e-12)
    p = torch.where(possible > 0, torch.rand(possible.shape, generator=generator(), dtype=torch.float64), 0)
    p = p / p.sum(-1, keepdim=True)
    found = process.reverse(x, p, t, s)[:, 0]
    for i in range(process.size):
        each = (to_s[k] * from_s[:, i] / to_t[k, i] * p[i, 0, k] for k in range(K) if p[i, 0, k] > 0)
        assert torch.allclose(found[i], sum(each), rtol=1e-10, atol=1e-14)
    by_item = process.reverse(x, p, *(torch.full((len(x),), float(time), dtype=torch.float64) for time in (t, s)))
    assert torch.allclose(by_item[:, 0], found, rtol=1e-12)


def test_a_chain_of_the_closed_form_s_matrices_is_the_closed_form():
    chain = CategoricalProcess.chain(torch.stack([STEPS.matrix(n, n + 1) for n in range(10)]))
    x = torch.arange(K)[:, None]
    p = ONE.denoiser(STEPS)(x, 7).probs
    assert torch.allclose(p, ONE.denoiser(chain)(x, 7).probs, rtol=1e-10)
    assert torch.allclose(chain.reverse(x, p, 7, 3), STEPS.reverse(x, p, 7, 3), rtol=1e-10)
    assert torch.allclose(STEPS.matrix(9, 10), torch.full((K, K), 1 / K, dtype=torch.float64))


def test_the_binomial_process_of_the_lecture():
    """beta_t = 1 / (T - t + 1): E x_t = 1/2 + (E x_0 - 1/2) (T - t) / T."""
    process = CategoricalProcess.uniform(states=2, schedule="binomial", steps=100)
    law = torch.tensor([0.1, 0.9], dtype=torch.float64)
    means = [float((law @ process.matrix(0, t))[1]) for t in (0, 10, 50, 90, 98, 100)]
    assert means == pytest.approx([0.9, 0.86, 0.7, 0.54, 0.508, 0.5], abs=1e-12)
    for t in (1, 40, 100):
        beta = 1 / (100 - t + 1)
        assert process.matrix(t - 1, t)[1].tolist() == pytest.approx([beta / 2, 1 - beta / 2])


@pytest.mark.parametrize("process", [UNIFORM, MASKED], ids=repr)
def test_rates_are_the_limit_of_steps(process):
    t, h = 0.6, 1e-6
    x = torch.arange(process.size)[:, None]
    p = ONE.denoiser(process)(x, t).probs
    s = float(process.time_at(1 - process.kept(t) - h))
    moved = (process.reverse(x, p, t, s) / h)[~torch.eye(process.size, dtype=torch.bool)[:, None]]
    rates = process.rates(x, p, t)[~torch.eye(process.size, dtype=torch.bool)[:, None]]
    assert torch.allclose(moved, rates, atol=1e-4)
    x0 = torch.arange(K)[:, None].expand(-1, 1)
    x = x0 if process.mask is None else torch.full_like(x0, process.mask)
    p = ONE.denoiser(process)(x, t).probs
    found, limit = process.rate_divergence(x0, x, p, t), process.divergence(x0, x, p, t, s) / h
    assert torch.allclose(found, limit, rtol=1e-3)


def refuted(x, law, level=1e-4):
    """Whether counts of x, (n, D) of K states each, are not of that law, by Pearson's chi-square at that level."""
    codes = (x * K ** torch.arange(x.shape[1])).sum(1)
    table = (law.data * K ** torch.arange(x.shape[1])).sum(1)
    counts = torch.stack([(codes == code).sum() for code in table]).double()
    assert counts.sum() == len(x)
    statistic = ((counts - len(x) * law.weights) ** 2 / (len(x) * law.weights)).sum()
    return float(statistic) > chi2.ppf(1 - level, len(table) - 1)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_with_the_exact_posterior_samples_of_one_entry_have_its_law_in_any_steps(process):
    """A chain of matrices up to what its prior still knows of x_0."""
    for steps in (1, 4):
        x = sample(ONE.denoiser(process), (4000, 1), Ancestral(), steps=steps, generator=generator(1)).x
        assert x.dtype == torch.int64
        assert not refuted(x, ONE)


@pytest.mark.parametrize("process", [UNIFORM, MASKED], ids=repr)
@pytest.mark.parametrize("solver", [Ancestral(), TauLeaping()], ids=repr)
def test_of_two_entries_as_steps_are_added(process, solver):
    few, many = (sample(TWO.denoiser(process), (1500, 2), solver, steps=n, generator=generator(2)).x for n in (1, 40))
    assert refuted(few, TWO)
    assert not refuted(many, TWO)


@pytest.mark.parametrize("process", [UNIFORM, MASKED], ids=repr)
def test_with_the_exact_posterior_the_bound_of_continuous_time_is_the_log_probability(process):
    x = TWO.data
    found = elbo(TWO.denoiser(process), x.repeat(40, 1), draws=64, seed=0)
    value = found.value.reshape(40, 9)
    error = (value.mean(0) - TWO.log_prob(x)).abs() / (value.std(0) / math.sqrt(40))
    assert float(error.max()) < 4.5  # 9 normal numbers
    told = found.stderr.square().mean() / value.var(0).mean()
    assert 0.6 < float(told) < 1.6  # 40 runs, of 9 items each
    linear = elbo(TWO.denoiser(CategoricalProcess.absorbing(K, "sine")), x, seed=0)
    if process is MASKED:  # the schedule changes times, and nothing else
        assert torch.allclose(linear.value, elbo(TWO.denoiser(MASKED), x, seed=0).value, rtol=1e-9)


@pytest.mark.parametrize("process", [STEPS, CategoricalProcess.absorbing(K, steps=10)], ids=repr)
def test_the_bound_of_a_chain_against_all_of_its_paths(process):
    """Its exact value by brute force, over every x_t, and its limit: one entry's is the log-probability itself."""
    denoiser, x = ONE.denoiser(process), ONE.data
    grid = Grid(process, [10.0, 6.0, 2.0, 0.0])
    exact = -process.prior_divergence(x)[:, 0]
    for t, s in ((10, 6), (6, 2), (2, 0)):
        for state in range(process.size):
            x_t = torch.full_like(x, state)
            q = process.marginal(x, t)[:, 0, state]
            step = -process.divergence(x, x_t, denoiser(x_t, t).probs, t, s)[:, 0]
            exact = exact + torch.where(q > 0, q * step, 0)
    found = elbo(denoiser, x, Ancestral(), grid, draws=60, seed=1)
    assert bool(((found.value - exact).abs() < 4.5 * found.stderr + 1e-12).all())
    assert bool((exact <= ONE.log_prob(x) + 1e-12).all())
    assert (ONE.weights * (ONE.log_prob(x) - exact)).sum() == pytest.approx(0, abs=1e-9)  # with the exact posterior
    assert found.nfe == 180
    assert torch.equal(found.value, found.prior + found.denoising + found.reconstruction)


def net(size, length, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = OneHot(MLP((size, length), width=16, depth=1, **options), size)
        torch.nn.init.normal_(found.net.outward.weight, std=0.3)
    return found.eval()


@pytest.mark.parametrize("process", [UNIFORM, MASKED, STEPS], ids=repr)
@pytest.mark.parametrize("seeds", [lambda s: {"seed": s}, lambda s: {"noise": CounterNoise(s)}], ids=["seed", "noise"])
def test_sample_i_does_not_depend_on_the_batch(process, seeds):
    denoiser = CategoricalDenoiser(net(process.size, 5), process)
    all_of = sample_seeds(3, 4)

    def draw(which):
        return sample(denoiser, (len(which), 5), Ancestral(), steps=7, **seeds(which)).x

    assert torch.equal(draw(all_of)[2:3], draw(all_of[2:3]))


def test_a_bound_does_not_depend_on_the_batch():
    denoiser = CategoricalDenoiser(net(4, 5), MASKED)
    x, seeds = torch.randint(0, K, (3, 5), generator=generator()), sample_seeds(0, 3)
    whole, one = elbo(denoiser, x, draws=4, seed=seeds), elbo(denoiser, x[1:2], draws=4, seed=seeds[1:2])
    assert torch.allclose(whole.value[1:2], one.value, rtol=1e-6)  # the network's own rounding
    assert whole.prior.abs().max() == 0  # all are masked at t_max
    assert torch.equal(whole.value, whole.prior + whole.denoising + whole.reconstruction)


def test_a_network_of_zeros_has_the_posterior_of_uniform_data():
    x = torch.arange(K)[:, None]
    flat = Table(x)
    denoiser = CategoricalDenoiser(lambda x, time: torch.zeros(*x.shape, K), UNIFORM)
    assert torch.allclose(denoiser(x, 0.4).probs.double(), flat.denoiser(UNIFORM)(x, 0.4).probs, atol=1e-6)


def test_the_loss_is_the_bound_of_an_entry():
    for process in (UNIFORM, MASKED, STEPS):
        x = TWO.sample(4000, generator(4))
        loss = bound_loss(TWO.denoiser(process), x, generator=generator(5), reduction="none")
        prior = process.prior_divergence(x).mean()
        want = -(TWO.weights * TWO.log_prob(TWO.data)).sum() / 2
        error = (loss.mean() + prior - want) / (loss.std() / math.sqrt(4000))
        if process is STEPS:  # a chain of few steps is a worse model
            assert float(error) > -4
        else:
            assert abs(float(error)) < 4


def product(n=2):
    return ProductProcess(VPSDE(), MASKED, continuous=n)


class Exact(torch.nn.Module):
    """The exact network of independent parts: numbers N(0, 0.5^2), states of `WEIGHTS`; eps and logits."""

    def forward(self, x, states, time):
        alpha, sigma = (f(time.double())[:, None] for f in (VPSDE().alpha, VPSDE().sigma))
        eps = sigma * x / (alpha**2 * 0.25 + sigma**2)
        return eps.to(x), WEIGHTS.log().to(x).expand(*states.shape, K)


def test_the_bound_of_a_product_is_the_sum_of_its_parts():
    process, target = product(), Gaussian(mean=[0.0, 0.0], std=0.5)
    denoiser = ProductDenoiser(Exact(), process)
    y, c = target.sample(6, generator()).double(), ONE.sample(6, generator(1))
    x = torch.cat([y, c.double()], 1)
    grid = Grid.power(VPSDE(), 6)
    both = elbo(denoiser, x, Ancestral(), Grid(process, grid.times), draws=20, seed=0)
    numbers = elbo(target.denoiser(VPSDE()), y, DDPM(), grid, draws=20, seed=1)
    states = elbo(ONE.denoiser(MASKED), c, Ancestral(), Grid(MASKED, grid.times), draws=20, seed=2)
    for name in ("prior", "denoising", "reconstruction", "value"):
        found, parts = getattr(both, name), getattr(numbers, name) + getattr(states, name)
        error = (both.stderr**2 + numbers.stderr**2 + states.stderr**2).sqrt()
        assert bool(((found - parts).abs() < 6 * error + 1e-6).all()), name
    limit = elbo(denoiser, x, draws=96, seed=0)
    exact = target.log_prob(y) + ONE.log_prob(c)
    assert bool(((limit.value - exact).abs() < 5 * limit.stderr + 2e-3).all())


def test_samples_of_a_product_have_both_laws():
    found = sample(ProductDenoiser(Exact(), product()), (3000, 3), Ancestral(), steps=12, generator=generator(7))
    assert found.x.dtype == torch.float32
    assert not refuted(found.x[:, 2:].long(), ONE)
    seeds = sample_seeds(1, 3)
    one, all_of = (sample(ProductDenoiser(Exact(), product()), (n, 3), Ancestral(), steps=5, seed=s).x
                   for n, s in ((1, seeds[1:2]), (3, seeds)))  # fmt: skip
    assert torch.equal(one, all_of[1:2])


def test_the_numbers_of_a_product_step_as_ddpm_does():
    z, x_T = torch.randn(12, 4, 3, generator=generator()), torch.randn(4, 3, generator=generator(1))
    x_T[:, 2] = K
    denoiser = ProductDenoiser(Exact(), product())
    both = sample(denoiser, x_T, Ancestral(), steps=12, noise=lambda row, x: z[row].to(x))
    target = Gaussian(mean=[0.0, 0.0], std=0.5).denoiser(VPSDE())
    grid = Grid(VPSDE(), both.grid.times)
    alone = sample(target, x_T[:, :2], DDPM(), grid=grid, noise=lambda row, x: z[row][:, :2].to(x))
    assert torch.allclose(both.x[:, :2], alone.x, atol=1e-5)


def trainer(folder, steps, data, **options):
    config = TrainConfig(
        steps=steps,
        batch_size=8,
        checkpoint_every=3,
        threads=1,
        lr=1e-2,
        ema_decay=0.5,
        schedule="constant",
        log_every=3,
    )
    words = CategoricalConfig("absorbing", {"states": 2}, options={"event_shape": (3, 4), "width": 8, "depth": 1})
    return Trainer(words.build(seed=0), data, config, folder=folder, model=words, **options)


def test_a_killed_training_resumes_bit_for_bit_and_its_checkpoint_names_its_kind(tmp_path):
    data = torch.randint(0, 2, (32, 4), generator=generator())
    whole = trainer(tmp_path / "whole", 6, data).fit(progress=False)
    trainer(tmp_path / "cut", 3, data).fit(progress=False)
    again = trainer(tmp_path / "cut", 6, data)
    assert again.step == 3
    again.fit(progress=False)
    for a, b in zip(whole.denoiser.net.parameters(), again.denoiser.net.parameters(), strict=True):
        assert torch.equal(a, b)
    denoiser = load_categorical(tmp_path / "cut")
    assert denoiser.process == CategoricalProcess.absorbing(states=2)
    x = torch.tensor([[2, 2, 0, 1]])
    assert torch.equal(denoiser(x, 0.5).log_probs, again.ema(x, 0.5).log_probs)
    with pytest.raises(scoresde.training.CheckpointError, match=r"kind 'categorical'.*load_categorical"):
        load(tmp_path / "cut")
    found = sample(denoiser, (3, 4), Ancestral(), steps=4, seed=0, trajectory=True)
    assert found.x.max() < 2
    assert "Solution(x=int64 (3, 4)" in repr(found)
    assert found._repr_html_()
    assert found.trajectory.shape == (5, 3, 4)
    assert found.nfe == 4


def test_training_learns_a_pair():
    data = torch.tensor([[0, 0], [1, 1]]).repeat(16, 1)
    words = CategoricalConfig("uniform", {"states": 2}, options={"event_shape": (2, 2), "width": 16, "depth": 1})
    run = Trainer(words.build(seed=0), data, TrainConfig(steps=60, batch_size=32, lr=2e-2, threads=1)).fit(
        progress=False
    )
    x = sample(run.ema, (200, 2), Ancestral(), steps=20, seed=0).x
    assert float((x[:, 0] == x[:, 1]).double().mean()) > 0.85


def test_guidance_mixes_log_probabilities():
    def conditional(x, time, label):
        return torch.stack([torch.zeros(x.shape), label[:, None].float().expand(x.shape)], -1)

    process = CategoricalProcess.uniform(2)
    denoiser = CategoricalDenoiser(conditional, process)
    x, label = torch.tensor([[0], [1]]), torch.tensor([1, 2])
    guided = ClassifierFree(denoiser, weight=3.0, null={"label": 0})
    poor, good = denoiser(x, 0.5, label=0 * label).log_probs, denoiser(x, 0.5, label=label).log_probs
    want = (poor + 3 * (good - poor)).softmax(-1)
    assert torch.allclose(guided(x, 0.5, label=label).probs, want, atol=1e-6)
    assert torch.equal(ClassifierFree(denoiser, 1.0, null={"label": 0})(x, 0.5, label=label).log_probs, good)
    assert sample(guided, (2, 1), Ancestral(), steps=3, seed=0, cond={"label": label}).x.shape == (2, 1)
    with pytest.raises(ValueError, match="rescale"):
        ClassifierFree(denoiser, 3.0, rescale=0.7)
    with pytest.raises(ValueError, match="without a condition"):
        guided(x, 0.5)


def test_what_does_not_apply_says_so():
    denoiser, numbers = ONE.denoiser(MASKED), Gaussian(mean=[0.0], std=1.0).denoiser(VPSDE())
    for wrong in (lambda: scoresde.Clip(denoiser), lambda: scoresde.log_prob(denoiser, torch.zeros(1, 1))):
        with pytest.raises(TypeError, match="whole states"):
            wrong()
    with pytest.raises(TypeError, match="steps in numbers"):
        sample(denoiser, (2, 1), DDIM(), steps=2)
    with pytest.raises(TypeError, match="solver must be"):
        sample(numbers, (2, 1), Ancestral(), steps=2)
    with pytest.raises(ValueError, match="log_prob"):
        sample(denoiser, (2, 1), Ancestral(), steps=2, log_prob=True)
    with pytest.raises(ValueError, match="whole states, an integer tensor"):
        denoiser(torch.zeros(2, 1), 0.5)
    with pytest.raises(ValueError, match="states 0 to 2"):
        elbo(denoiser, torch.tensor([[3]]))
    with pytest.raises(ValueError, match="10 nodes"):
        sample(ONE.denoiser(STEPS), (2, 1), Ancestral(), steps=11)
    with pytest.raises(ValueError, match="matrices of 3 states"):
        sample(ONE.denoiser(CHAIN), (2, 1), TauLeaping(), steps=2)
    with pytest.raises(ValueError, match="expected logits"):
        CategoricalDenoiser(lambda x, time: x, MASKED)(torch.tensor([[1]]), 0.5)
    with pytest.raises(ValueError, match="floating-point"):
        Trainer(EpsDenoiser(MLP(1, width=8), VPSDE()), torch.tensor([[1]]), TrainConfig(steps=1))
    with pytest.raises(ValueError, match="whole states"):
        Trainer(CategoricalDenoiser(net(4, 1), MASKED), torch.zeros(4, 1), TrainConfig(steps=1))
    with pytest.raises(ValueError, match="each row must be a distribution"):
        CategoricalProcess.chain(torch.tensor([[[0.5, 0.25], [0.5, 0.75]]]))


def test_probabilities_that_are_no_numbers_are_named():
    """Integers cannot carry a NaN: without a look it would be state 0."""

    def broken(x, time):
        return torch.where((time < 0.5)[:, None, None], torch.nan, torch.zeros(*x.shape, K))

    with pytest.raises(scoresde.NonFiniteError, match=r"step 3, at the evaluation at t = 0\.25"):
        sample(CategoricalDenoiser(broken, UNIFORM), (2, 3), Ancestral(), steps=4, seed=0)


def test_columns_train_together(tmp_path):
    data = torch.cat(
        [torch.randn(64, 1, generator=generator()), torch.randint(0, K, (64, 2), generator=generator())], 1
    )
    process = product(1)
    denoiser = ProductDenoiser(Columns(MLP(1 + 2 * 4, width=8, depth=1), categorical=2, states=4), process)
    config = TrainConfig(steps=3, batch_size=16, threads=1, precision="bfloat16")
    run = Trainer(denoiser, data, config, folder=tmp_path).fit(progress=False)
    assert run.losses[-1][1] > 0
    assert math.isfinite(float(elbo(run.ema, data[:2], draws=8, seed=0).value.sum()))
