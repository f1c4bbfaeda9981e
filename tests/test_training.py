"""Denoising score matching: its minimiser, its weights, its distributions of time."""

from __future__ import annotations

import math

import pytest
import torch
from common import FINITE, Nonlinear, every_pair, generator, network_for, normal
from scipy import stats

from scoresde import (
    EDMSDE,
    VESDE,
    VPSDE,
    CosineVPSDE,
    DDPMChain,
    EDMDenoiser,
    EpsDenoiser,
    FlowSDE,
    Grid,
    ScoreDenoiser,
    VDenoiser,
    VelocityDenoiser,
    X0Denoiser,
)
from scoresde.exact import Gaussian, GaussianMixture
from scoresde.solvers import DDPM, AnnealedLangevin
from scoresde.training import (
    ImportanceTimes,
    LevelTimes,
    LogNormalTimes,
    OnX0,
    Part,
    UniformTimes,
    discrete_bound,
    dsm_loss,
    edm,
    likelihood,
    min_snr,
    simple,
    two_term_loss,
    uniform_in,
)


@pytest.mark.parametrize("sde", FINITE.values(), ids=FINITE)
@pytest.mark.parametrize(
    "weighting", [simple, likelihood, edm(0.5), min_snr(5.0)], ids=["simple", "likelihood", "edm", "min-snr"]
)
def test_the_loss_is_its_formula_in_every_parameterisation(weighting, sde):
    """w |eps_hat - eps|^2 / d per sample, whatever the network predicts."""
    reference = Nonlinear(sde)
    x0, noise = normal(4, 2, 3), normal(4, 2, 3, seed=1)
    t = torch.tensor([0.01, 0.3, 0.7, 0.95]).double() * sde.t_max
    x_t = sde.perturb(x0, t, noise)
    expected = weighting(sde, t) * (reference.eps(x_t, t) - noise).square().mean((1, 2))
    adapters = {
        "x0": X0Denoiser,
        "eps": EpsDenoiser,
        "score": ScoreDenoiser,
        "v": VDenoiser,
        "velocity": VelocityDenoiser,
    }
    models = [adapter(network_for(reference, view), sde) for view, adapter in adapters.items()]
    for model in [reference, *models]:
        loss = dsm_loss(model, x0, t=t, noise=noise, weighting=weighting, reduction="none")
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-12)
        mean = dsm_loss(model, x0, t=t, noise=noise, weighting=weighting)
        torch.testing.assert_close(mean, expected.mean(), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("view", ["x0", "eps", "v", "velocity", "score"])
@pytest.mark.parametrize("sde", FINITE.values(), ids=FINITE)
def test_uniform_in_a_view_is_the_squared_error_of_that_view(view, sde):
    """Flow matching's loss among them: on `FlowSDE` the velocity's target is eps - x_0."""
    model = Nonlinear(sde)
    x0, noise = normal(4, 3), normal(4, 3, seed=1)
    t = torch.tensor([0.01, 0.3, 0.7, 0.95]).double() * sde.t_max
    x_t = sde.perturb(x0, t, noise)
    truth = X0Denoiser(lambda x, _: x0, sde)
    expected = (model.view(view, x_t, t) - truth.view(view, x_t, t)).square().mean(1)
    loss = dsm_loss(model, x0, t=t, noise=noise, weighting=uniform_in(view), reduction="none")
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-12)
    if view == "velocity" and isinstance(sde, FlowSDE):
        torch.testing.assert_close(truth.view(view, x_t, t), noise - x0, rtol=1e-9, atol=1e-9)


TO_NOISE = {"flow": FlowSDE(), "cosine": CosineVPSDE(t_max=1.0), "chain": DDPMChain.cosine(50, max_beta=1.0)}
ADAPTERS = {
    "x0": X0Denoiser,
    "v": VDenoiser,
    "velocity": VelocityDenoiser,
    "edm": lambda net, sde: EDMDenoiser(net, sde, time=lambda t: t),  # whose own label is infinite there
}
WEIGHTINGS = {
    "simple": simple,
    "likelihood": likelihood,
    "edm": edm(0.5),
    "min-snr": min_snr(5.0),
    **{view: uniform_in(view) for view in ("eps", "x0", "v", "velocity", "score")},
    "own": lambda sde, t: 1 + sde.sigma(t),
    "own on x0": OnX0(lambda sde, t: 1 + sde.sigma(t)),
}


@every_pair(sde=TO_NOISE, adapter=ADAPTERS, weighting=WEIGHTINGS)
def test_loss_and_gradient_at_alpha_zero_are_their_limits(sde, adapter, weighting):
    """Of first order in t_max - t, so what is found at h and 2 h is extrapolated to an error of h^2."""
    net = torch.nn.Linear(3, 3, dtype=torch.float64)
    torch.nn.init.normal_(net.weight, generator=generator(2))
    model = adapter(lambda x, t: net(x) + t[:, None] / sde.t_max, sde)
    x0, noise = normal(4, 3), normal(4, 3, seed=1)

    def found(h):
        loss = dsm_loss(model, x0, t=sde.t_max * (1 - h), noise=noise, weighting=weighting)
        return torch.cat([loss[None].detach(), *(g.flatten() for g in torch.autograd.grad(loss, [*net.parameters()]))])

    h = 3e-7
    torch.testing.assert_close(found(0.0), 2 * found(h) - found(2 * h), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("sde", TO_NOISE.values(), ids=TO_NOISE)
def test_where_there_is_no_limit_the_loss_says_so(sde):
    x0, end = normal(4, 3), sde.t_max
    for kind, message in ((EpsDenoiser, "predicts eps says nothing"), (EDMDenoiser, "time label is not finite")):
        with pytest.raises(ValueError, match=message):
            dsm_loss(kind(lambda x, t: x, sde), x0, t=end)
    with pytest.raises(ValueError, match="OnX0"):
        dsm_loss(X0Denoiser(lambda x, t: x, sde), x0, t=end, weighting=lambda sde, t: sde.alpha(t) ** -2)


def test_one_time_for_the_batch_and_scalar_events():
    x0, noise = normal(6), normal(6, seed=1)
    one = dsm_loss(Nonlinear(VPSDE()), x0, t=0.3, noise=noise)
    many = dsm_loss(Nonlinear(VPSDE()), x0, t=torch.full((6,), 0.3).double(), noise=noise)
    torch.testing.assert_close(one, many)


def test_edm_loss_is_table_1():
    """Karras et al., eq. 8: lambda(sigma) c_out^2 = 1, so the network's own error has weight one."""
    sde, sd = EDMSDE(), 0.5
    net = torch.nn.Linear(3, 3).double()
    denoiser = EDMDenoiser(lambda x, t: net(x), sde, sigma_data=sd)
    x0, noise = normal(5, 3), normal(5, 3, seed=1)
    t = torch.tensor([0.002, 0.1, 1.0, 10.0, 80.0]).double()
    s = t[:, None]
    y = x0 + s * noise
    target = (x0 - sd**2 / (s**2 + sd**2) * y) * (s**2 + sd**2).sqrt() / (s * sd)
    expected = (net(y / (s**2 + sd**2).sqrt()) - target).square().mean(1)
    loss = dsm_loss(denoiser, x0, t=t, noise=noise, weighting=edm(sd), reduction="none")
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("t", [1e-5, 1e-3, 0.5, 1.0])
def test_the_target_of_an_eps_network_is_the_noise_to_the_last_digit(t):
    """In float32, too: no x_0 is rebuilt and taken apart again."""
    x0, noise = normal(4, 3, dtype=torch.float32), normal(4, 3, seed=1, dtype=torch.float32)
    oracle = EpsDenoiser(lambda x, _: noise, VPSDE())
    loss = dsm_loss(oracle, x0, t=torch.full((4,), t), noise=noise)
    assert float(loss) < 1e-12


@pytest.mark.parametrize("sde", FINITE.values(), ids=FINITE)
def test_tweedie_the_exact_denoiser_minimises_the_loss(sde):
    """For any other denoiser D + delta the loss is larger by exactly w |delta alpha / sigma|^2, in expectation: the
    cross term has mean zero. 40,000 draws, z-score below 6 (probability 2e-9 for any seed).
    """
    n = 40_000
    target = GaussianMixture(means=[[-1.0, 0.0], [1.0, 1.0]], weights=[0.4, 0.6], std=0.4)
    exact = target.denoiser(sde)
    t = sde.time_at(torch.linspace(-2, 2, n).double())
    x0 = target.sample(n, generator(0), dtype=torch.float64)
    noise = normal(n, 2, seed=1)

    def delta(x, t):
        return 0.3 * torch.sin(2 * x) + 0.1

    other = X0Denoiser(lambda x, t: exact(x, t).mean + delta(x, t), sde)
    pair = [dsm_loss(d, x0, t=t, noise=noise, reduction="none") for d in (other, exact)]
    x_t = sde.perturb(x0, t, noise)
    excess = (sde.alpha(t) / sde.sigma(t)) ** 2 * delta(x_t, t).square().mean(1)
    cross = pair[0] - pair[1] - excess
    assert abs(float(cross.mean())) < 6 * float(cross.std()) / math.sqrt(n)
    assert float(excess.mean()) > 20 * float(cross.std()) / math.sqrt(n)  # so the test can tell


@pytest.mark.parametrize("adapter", [EpsDenoiser, X0Denoiser, VDenoiser, ScoreDenoiser])
@pytest.mark.parametrize("half_log_snr", [-1.5, 0.0, 2.0])
def test_a_linear_model_trained_on_a_gaussian_is_the_true_score(adapter, half_log_snr):
    """The loss is a quadratic of a linear network's weights: LBFGS finds its minimum, which must be the true score up
    to the error of 40,000 draws. The weights of least squares have standard error sqrt(residual / (n var)) < 0.02 here.
    """
    n, sde = 40_000, VPSDE()
    cov = torch.tensor([[1.0, 0.6], [0.6, 0.5]]).double()
    target = Gaussian(mean=[0.5, -1.0], cov=cov)
    t = torch.full((n,), float(sde.time_at(half_log_snr)), dtype=torch.float64)
    x0, noise = target.sample(n, generator(1), dtype=torch.float64), normal(n, 2, seed=2)
    net = torch.nn.Linear(2, 2).double()
    denoiser = adapter(lambda x, _: net(x), sde)
    optimiser = torch.optim.LBFGS(net.parameters(), max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        loss = dsm_loss(denoiser, x0, t=t, noise=noise)
        loss.backward()
        return loss.detach()

    optimiser.step(closure)
    alpha, sigma = sde.alpha(t[0]), sde.sigma(t[0])
    S = alpha**2 * cov + sigma**2 * torch.eye(2)
    x = target.sample(200, generator(3), dtype=torch.float64)
    true = -torch.linalg.solve(S, (x - alpha * torch.tensor([0.5, -1.0])).T).T
    error = (sigma * (denoiser.score(x, t[0]).detach() - true)).square().mean().sqrt()
    assert error.item() < 6 * 0.02


# Two terms: told, and not told.


def conditional(classes, sde):
    """A network that shifts by its class, and for nothing, the class after the last, by a number of its own."""
    table = torch.nn.Embedding(classes + 1, 1).double()
    return table, EpsDenoiser(lambda x, t, *, label: x * 0.3 + table(label), sde)


def test_two_terms_are_the_mean_of_dropping():
    """L(told) + u L(not told), of the same times and noise: (1 + u) times what dropping with probability u / (1 + u)
    has in the mean, its gradient too.
    """
    torch.manual_seed(0)
    table, denoiser = conditional(3, VPSDE())
    x0, cond, u = normal(8, 1), {"label": torch.arange(8) % 3}, 0.25
    options = {"weighting": min_snr(), "times": LogNormalTimes()}
    both = two_term_loss(denoiser, x0, cond, unconditional=u, num_classes=3, generator=generator(5), **options)
    (grad,) = torch.autograd.grad(both, table.weight)
    told, blind = (
        dsm_loss(denoiser, x0, cond=c, generator=generator(5), **options)
        for c in (cond, {"label": torch.full((8,), 3)})
    )
    (expected,) = torch.autograd.grad((1 + u) * (told + u * blind) / (1 + u), table.weight)
    torch.testing.assert_close(both, told + u * blind, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-15)
    assert grad[3].abs() > 0


def test_two_terms_of_a_part_are_those_of_the_batch():
    _, denoiser = conditional(3, DDPMChain())
    x0, label = normal(6, 1), torch.arange(6) % 3
    run = {"unconditional": 0.5, "num_classes": 3, "reduction": "none"}
    whole = two_term_loss(denoiser, x0, {"label": label}, generator=generator(1), **run)
    parts = [
        two_term_loss(denoiser, x0[i : i + 3], {"label": label[i : i + 3]}, generator=Part(generator(1), i, 6), **run)
        for i in (0, 3)
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"unconditional": -1.0}, "unconditional"), ({"cond": {}}, "no condition"), ({"num_classes": None}, "null class")],
)
def test_two_terms_that_are_none(wrong, says):
    run = {"cond": {"label": torch.zeros(2, dtype=torch.long)}, "unconditional": 0.1, "num_classes": 3, **wrong}
    with pytest.raises(ValueError, match=says):
        two_term_loss(conditional(3, VPSDE())[1], normal(2, 1), run.pop("cond"), **run)


# Weights and times.


@pytest.mark.parametrize("sde", FINITE.values(), ids=FINITE)
def test_weightings_are_their_definitions(sde):
    t = sde.time_at(torch.linspace(-3, 3, 7).double())
    snr = (sde.alpha(t) / sde.sigma(t)) ** 2
    s = sde.sigma(t) / sde.alpha(t)
    h = 1e-6 * sde.t_max
    slope = (sde.half_log_snr(t + h) - sde.half_log_snr(t - h)) / (2 * h)
    torch.testing.assert_close(simple(sde, t), torch.ones_like(t))
    torch.testing.assert_close(likelihood(sde, t), -2 * slope, rtol=1e-4, atol=1e-12)
    torch.testing.assert_close(edm(0.7)(sde, t), (s**2 + 0.7**2) / (s * 0.7) ** 2 * s**2)
    torch.testing.assert_close(min_snr(2.0)(sde, t), snr.clamp(max=2.0) / snr)


@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_the_bound_of_a_chain_is_that_of_its_steps(variance):
    """KL(q(x_{n-1} | x_n, x_0) | p(x_{n-1} | x_n)) of two Gaussians of one variance is the squared distance of their
    means, read from DDPM's table, over 2 c^2; and the first node's decoder has variance beta_1 = sigma_1^2.
    """
    sde = DDPMChain()
    table = DDPM(variance).tableau(Grid(sde, torch.arange(1000.0, -1, -1, dtype=torch.float64)))
    assert torch.equal(table.p, torch.zeros(1000).double())  # rows in D itself
    t, b, c2 = table.t, table.b[:, 0], table.c**2
    c2[-1] = sde.sigma(torch.ones(()).double()) ** 2
    of_x0 = discrete_bound(variance)(sde, t) * (sde.alpha(t) / sde.sigma(t)) ** 2
    torch.testing.assert_close(of_x0, b**2 / (2 * c2), rtol=1e-9, atol=0)
    limit = likelihood(VPSDE(), t[:900] / 1000) / 2
    torch.testing.assert_close(discrete_bound(variance)(sde, t)[:900] * 1000, limit, rtol=0.03, atol=0)


def test_the_bound_of_a_chain_is_refused_elsewhere():
    with pytest.raises(ValueError, match="discrete_bound is of a chain"):
        dsm_loss(X0Denoiser(lambda x, t: x, VPSDE()), normal(2, 3), weighting=discrete_bound())
    with pytest.raises(ValueError, match="variance"):
        discrete_bound("both")


KS_99_9999 = 2.6  # sqrt(n) times the Kolmogorov-Smirnov distance exceeds this with probability 2.7e-6


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("sde", FINITE.values(), ids=FINITE)
def test_times_have_their_distribution(sde, stratified):
    n = 20_000
    bound = KS_99_9999 / math.sqrt(n)
    low, high = sde.half_log_snr(torch.tensor([sde.t_max, sde.t_min]).double()).tolist()
    t = ImportanceTimes(stratified=stratified).draw(sde, n, generator(0))
    lam = sde.half_log_snr(t).numpy()
    assert stats.kstest(lam, "uniform", (low, high - low)).statistic < bound
    t = LogNormalTimes(-0.5, 0.8, stratified=stratified).draw(sde, n, generator(1))
    log_s = -sde.half_log_snr(t).numpy()
    cut = stats.truncnorm((-high + 0.5) / 0.8, (-low + 0.5) / 0.8, loc=-0.5, scale=0.8)
    assert stats.kstest(log_s, cut.cdf).statistic < bound
    t = UniformTimes(stratified=stratified).draw(sde, n, generator(2))
    if isinstance(sde, DDPMChain):
        assert torch.equal(t, t.round())
        counts = torch.bincount(t.long(), minlength=sde.steps + 1)[1:]
        assert len(counts) == sde.steps
        # Poisson with mean 20: 60 is beyond nine standard deviations.
        assert int(counts.max()) < 60
    else:
        assert stats.kstest(t.numpy(), "uniform", (sde.t_min, sde.t_max - sde.t_min)).statistic < bound
    for sampler in (UniformTimes(), ImportanceTimes(), LogNormalTimes()):
        t = sampler.draw(sde, 1000, generator(3))
        assert sde.t_min <= float(t.min())
        assert float(t.max()) <= sde.t_max


def test_stratified_times_take_one_from_each_stratum():
    t = UniformTimes().draw(VPSDE(), 1000, generator())
    u = (t - 1e-5) / (1 - 1e-5)
    assert torch.equal((u * 1000).floor().sort().values, torch.arange(1000).double())


@pytest.mark.parametrize("sde", [v for k, v in FINITE.items() if "chain" not in k], ids=lambda s: type(s).__name__)
def test_importance_sampling_changes_the_variance_not_the_mean(sde):
    """Likelihood-weighted loss under importance times, against the integral over uniform times by quadrature."""
    exact = Gaussian(mean=[0.0], std=0.5)
    n = 100_000
    # For N(0, v) data the exact model's noise error at t is alpha^2 v / (alpha^2 v + sigma^2).
    lam = torch.linspace(*sde.half_log_snr(torch.tensor([sde.t_max, sde.t_min]).double()).tolist(), 200_001).double()
    t = sde.time_at(lam)
    error = sde.alpha(t) ** 2 * 0.25 / (sde.alpha(t) ** 2 * 0.25 + sde.sigma(t) ** 2)
    truth = float(torch.trapezoid(2 * error, lam)) / (sde.t_max - sde.t_min)  # w dt = 2 dlambda
    losses = dsm_loss(
        exact.denoiser(sde),
        exact.sample(n, generator(0), dtype=torch.float64),
        weighting=likelihood,
        times=ImportanceTimes(stratified=False),
        generator=generator(1),
        reduction="none",
    )
    assert abs(float(losses.mean()) - truth) < 6 * float(losses.std()) / math.sqrt(n)
    # Weight times ratio is one constant: that is what removes the variance.
    t = UniformTimes().draw(sde, 100, generator(2))
    product = likelihood(sde, t) * ImportanceTimes().ratio(sde, t)
    torch.testing.assert_close(product, product[:1].expand(100))


def test_known_normaliser():
    """Z = -2 (lambda(1) - lambda(1e-5)): 23.86 for VP and 37.68 for sub-VP (Song et al., 2021, in their code)."""
    from scoresde import SubVPSDE

    for sde, Z in ((VPSDE(), 23.86), (SubVPSDE(), 37.68)):
        t = torch.tensor([0.3]).double()
        product = likelihood(sde, t) * ImportanceTimes().ratio(sde, t) * (sde.t_max - sde.t_min)
        assert float(product) == pytest.approx(Z, abs=0.01)


def test_a_chain_is_trained_on_its_nodes():
    labels = []
    denoiser = EpsDenoiser(
        lambda x, n: labels.append(n) or x, DDPMChain.linear(10, 0.01, 0.3), time=lambda t: t.long() - 1
    )
    dsm_loss(denoiser, torch.zeros(2000, 1), generator=generator())
    assert torch.equal(labels[0].unique(), torch.arange(10))


@pytest.mark.parametrize("sde", FINITE.values(), ids=FINITE)
def test_levels_are_those_that_annealed_langevin_steps_at(sde):
    """A geometric sequence of sigma / alpha, ends included, each as often as the others, none else."""
    n, L = 7, 12
    t = LevelTimes(L).draw(sde, n * L, generator(0))
    levels, counts = t.unique(return_counts=True)
    solver = AnnealedLangevin(2)
    table = solver.tableau(solver.grid(sde, L))
    assert torch.equal(table.t.unique(), levels)
    assert torch.equal(counts, torch.full((L,), n))
    assert (float(levels[0]), float(levels[-1])) == (sde.t_min, sde.t_max)
    steps = sde.half_log_snr(levels).diff()
    torch.testing.assert_close(steps, steps.mean().expand(L - 1), rtol=1e-6, atol=1e-9)
    # Without strata a level's count is binomial: beyond 6 standard deviations with probability 2e-9.
    drawn = LevelTimes(4, stratified=False).draw(sde, 4000, generator(1)).unique(return_counts=True)[1]
    assert len(drawn) == 4
    assert float((drawn - 1000).abs().max()) < 6 * (4000 * 3 / 16) ** 0.5
    assert float(LevelTimes(1).draw(sde, 3, generator(2)).min()) == sde.t_max


@pytest.mark.parametrize("power", [0, 1, 2, 3])
def test_the_loss_of_ncsn(power):
    """(1 / 2L) sum_i lambda(sigma_i) E |s(x~, sigma_i) + (x~ - x) / sigma_i^2|^2 (Song and Ermon, 2019, eqs. 5 and 6);
    lambda = sigma^2, which they take, is `simple`, lambda = 1 is `uniform_in("score")`, and any other a function too.
    """
    sde, L = VESDE(0.1, 5.0), 6
    model = Nonlinear(sde)
    x0, noise = normal(4 * L, 2, 3, seed=1), normal(4 * L, 2, 3, seed=2)
    t = LevelTimes(L).draw(sde, 4 * L, generator(0))
    sigma = torch.logspace(math.log10(5.0), -1, L, base=10, dtype=torch.float64).flip(0).repeat_interleave(4)
    noisy = x0 + sigma[:, None, None] * noise
    target = (noisy - x0) / sigma[:, None, None] ** 2
    squared = (model.score(noisy, t) + target).square().flatten(1).sum(1)
    papers = (sigma**power * squared).mean() / 2
    weighting = {2: simple, 0: uniform_in("score")}.get(power, lambda sde, t: sde.sigma(t) ** (power - 2))
    ours = dsm_loss(model, x0, t=t, noise=noise, weighting=weighting)
    torch.testing.assert_close(6 / 2 * ours, papers, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "times", [UniformTimes(), ImportanceTimes(), LogNormalTimes(stratified=False), LevelTimes(stratified=False)]
)
def test_the_parts_of_a_batch_draw_what_the_whole_batch_does(times):
    model, x0 = Nonlinear(VPSDE()), normal(10, 2, 3)
    options = {"times": times, "reduction": "none"}
    whole = dsm_loss(model, x0, generator=generator(3), **options)
    parts = [dsm_loss(model, x0[i:j], generator=Part(generator(3), i, 10), **options) for i, j in ((0, 4), (4, 10))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="4 items from 7 on do not lie in a batch of 10"):
        dsm_loss(model, x0[:4], generator=Part(generator(), 7, 10))


def test_dsm_loss_leaves_the_global_generator_and_reproduces():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    x0 = normal(4, 3)
    a, b = (dsm_loss(Nonlinear(VPSDE()), x0, generator=generator(3)) for _ in range(2))
    dsm_loss(Nonlinear(VPSDE()), x0)
    assert a == b
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d, x: dsm_loss(d, x.to(torch.uint8)), "uint8"),
        (lambda d, x: dsm_loss(d, x, t=torch.zeros(4).double() + 0.5, times=UniformTimes()), "not both"),
        (lambda d, x: dsm_loss(d, x, noise=torch.zeros(4, 2)), "noise has shape"),
        (lambda d, x: dsm_loss(d, x, t=torch.tensor([0.1, 0.2])), "t has shape"),
        (lambda d, x: dsm_loss(d, x, t=torch.tensor(5.0)), "leaves"),
        (lambda d, x: dsm_loss(d, x, t=0.0), "t = 0"),
        (lambda d, x: dsm_loss(d, x, reduction="sum"), "reduction='sum'"),
        (lambda d, x: uniform_in("noise"), "expected one of"),
        (lambda d, x: dsm_loss(Nonlinear(FlowSDE()), x, times=ImportanceTimes()), "half_log_snr is -inf"),
        (lambda d, x: LogNormalTimes(std=0.0), "std=0"),
        (lambda d, x: LevelTimes(0), "levels=0: expected a whole number >= 1"),
        (lambda d, x: dsm_loss(Nonlinear(FlowSDE()), x, times=LevelTimes()), "half_log_snr is infinite"),
        (lambda d, x: edm(0.0), "sigma_data"),
        (lambda d, x: min_snr(-1.0), "gamma"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(Nonlinear(VESDE()), normal(4, 3))
