"""Particles against the posterior of the chain that they run, which is exact on Gaussian data (`gaussian_law`)."""

from __future__ import annotations

import math

import pytest
import torch
from common import Counting, Nonlinear, generator, normal

from scoresde import VPSDE, FlowSDE, Grid, NonFiniteError, sample
from scoresde.analysis import gaussian_law
from scoresde.exact import Gaussian, GaussianMixture
from scoresde.guidance.classifier import Classifier
from scoresde.guidance.operators import FourierSampling, Matrix
from scoresde.guidance.particles import Potential, TwistedSMC, systematic, twisted_smc
from scoresde.guidance.posterior_sampling import DPS, MomentMatching, PiGDM
from scoresde.noise import sample_seeds
from scoresde.solvers import DDIM, DDPM, Heun, UniPC

VP = VPSDE()
TARGET = Gaussian(mean=[0.6, -0.4], std=[0.8, 0.5])
A = Matrix(torch.tensor([[1.0, 1.0]]))
Y, NOISE = torch.tensor([[1.5]]), 0.5
TWISTS = {
    "dps": lambda denoiser, y=Y: DPS(denoiser, A, y, noise_std=NOISE, scale=0.5),
    "pigdm": lambda denoiser, y=Y: PiGDM(denoiser, A, y, NOISE),
    "jacobian": lambda denoiser, y=Y: MomentMatching(denoiser, A, y, NOISE),
    "none": lambda denoiser, y=Y: Potential(
        denoiser,
        lambda x, t: 0.0 * x.sum(1),
        lambda x: torch.distributions.Normal(y[:, 0], NOISE).log_prob(A(x)[:, 0]),
    ),
}


def chain(steps: int, solver=DDPM(), sde=VP, target=TARGET) -> Gaussian:  # noqa: B008 (frozen)
    """The law of the unguided solver's samples."""
    law = gaussian_law(solver.tableau(solver.grid(sde, steps)), target)
    shape = target.event_shape
    return Gaussian(law.mean.reshape(shape), std=law.variances.sqrt().expand(law.mean.shape).reshape(shape))


# --- resampling ------------------------------------------------------------------------------------------------------


def test_systematic_resampling_is_unbiased():
    """The counts, averaged over all u, are P w; for each u they are P w rounded up or down."""
    P, n = 7, 4096
    w = torch.softmax(2 * normal(3, P), dim=1)
    u = (torch.arange(n) + 0.5) / n
    for group in w:
        chosen = systematic(group.expand(n, P), u)
        counts = torch.nn.functional.one_hot(chosen, P).sum(1).double()
        assert bool(((counts - P * group).abs() < 1).all())
        torch.testing.assert_close(counts.mean(0), P * group, rtol=0, atol=2 / n)


def test_systematic_resampling_at_its_ends():
    w = torch.tensor([[0.0, 1.0, 0.0], [1 / 3, 1 / 3, 1 / 3], [0.0, 0.0, 1.0]], dtype=torch.float64)
    for u in (0.0, 0.5, 1 - 1e-15):
        chosen = systematic(w, torch.full((3,), u, dtype=torch.float64))
        assert chosen[0].tolist() == [1, 1, 1]
        assert chosen[2].tolist() == [2, 2, 2]
    assert systematic(w, torch.full((3,), 0.5))[1].tolist() == [0, 1, 2]


# --- exact as particles grow -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TWISTS)
def test_the_evidence_is_unbiased_and_the_mean_right(name):
    """Few steps: what is exact is the chain's posterior, not the data's, from which it is far."""
    G, P, steps = 300, 32, 6
    exact, guided = chain(steps), TWISTS[name](TARGET.denoiser(VP))
    found = twisted_smc(guided, (G * P, 2), TwistedSMC(particles=P), steps=steps, generator=generator(1))
    torch.testing.assert_close(found.log_weights.exp().sum(1), torch.ones(G, dtype=torch.float64))
    assert bool(((found.ess >= 1 - 1e-9) & (found.ess <= P + 1e-9)).all())
    Z = float(exact.measured(A, NOISE).log_prob(Y.double()).exp())
    z = found.log_evidence.exp()
    assert float((z.mean() - Z).abs()) < 5 * float(z.std()) / G**0.5
    # Weighted by the evidence, the sum over groups is one estimate: its bias is of order 1 / (G P).
    share = z / z.sum()
    mean, spread = share @ found.mean(), (share[:, None] * (found.mean() - share @ found.mean())).square().sum(0).sqrt()
    posterior = exact.given(A, Y[0], NOISE)
    assert bool(((mean - posterior.moments()[0]).abs() < 5 * spread).all())
    assert bool(((mean - TARGET.given(A, Y[0], NOISE).moments()[0]).abs() > 5 * spread).any()) or name == "none"


def test_a_perfect_twist_keeps_all_weights_nearly_equal():
    """Moment matching is exact on Gaussians: what is left of the weights' spread falls with the step."""
    guided = MomentMatching(TARGET.denoiser(VP), A, Y, NOISE)
    ess = [
        float(twisted_smc(guided, (512, 2), TwistedSMC(particles=512, ess=0.0), steps=n, seed=0).ess[-1]) / 512
        for n in (10, 40, 160)
    ]
    assert ess[0] < ess[1] < ess[2]
    assert ess[2] > 0.97


def test_the_error_falls_as_one_over_the_root_of_the_particles():
    steps, numbers, repeats = 8, (16, 64, 256), 128
    guided = PiGDM(TARGET.denoiser(VP), A, Y, NOISE)
    truth = chain(steps).given(A, Y[0], NOISE).moments()[0]
    evidence = float(chain(steps).measured(A, NOISE).log_prob(Y.double()))
    errors, gaps = [], []
    for P in numbers:
        solver = TwistedSMC(particles=P)
        found = twisted_smc(guided, (repeats * P, 2), solver, steps=steps, generator=generator(P))
        errors.append(float((found.mean() - truth).square().mean().sqrt()))
        gaps.append(float((found.log_evidence - evidence).square().mean().sqrt()))
    for rms in (errors, gaps):  # each rms over 128 runs or more is known to 6 % or so, their ratio to 9 %
        slope = math.log(rms[2] / rms[0]) / math.log(numbers[2] / numbers[0])
        assert slope == pytest.approx(-0.5, abs=0.1)


def test_mode_weights_of_a_mixture():
    """Where guidance alone is biased: an equal-width mixture whose posterior weights are known."""
    target = GaussianMixture([[-1.0, 0.0], [1.0, 0.0], [0.0, 2.0]], weights=[0.5, 0.2, 0.3], std=0.25)
    y, std, P = torch.tensor([[0.3]]), 0.6, 4096
    operator = Matrix(torch.tensor([[0.6, 0.5]]))
    posterior = target.given(operator, y[0], std)
    found = twisted_smc(
        DPS(target.denoiser(VP), operator, y, noise_std=std), (P, 2), TwistedSMC(particles=P), steps=60, seed=1
    )
    means = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    weights = found.mean(lambda x: torch.nn.functional.one_hot(torch.cdist(x, means).argmin(1), 3).double())[0]
    expected = posterior._log_weights.exp()
    assert bool(((weights - expected).abs() < 5 * (0.25 / (P / 8)) ** 0.5).all())  # resampling keeps an eighth or more


def test_a_classifier_as_the_twist():
    target = GaussianMixture([[-1.0], [1.0]], std=0.5)

    def logits(x, t):
        alpha, sigma = VP.alpha(t)[:, None].to(x), VP.sigma(t)[:, None].to(x)
        return torch.cat([0 * x, 2 * alpha * x / (0.25 * alpha**2 + sigma**2)], dim=1)

    classifier = Classifier(target.denoiser(VP), logits, label=1)
    label = torch.tensor(1)
    twisted = Potential(target.denoiser(VP), lambda x, t: classifier.log_prob(x, t, label))
    torch.testing.assert_close(twisted(normal(3, 1), 0.3).mean, classifier(normal(3, 1), 0.3).mean)
    found = twisted_smc(twisted, (4096, 1), TwistedSMC(particles=4096), steps=60, seed=0)
    assert float(found.log_evidence) == pytest.approx(math.log(0.5), abs=0.05)
    mean, std = float(found.mean()), float(found.mean(lambda x: (x - 1) ** 2)) ** 0.5
    assert mean == pytest.approx(1.0, abs=0.06)
    assert std == pytest.approx(0.5, abs=0.06)


def test_the_evidence_is_of_what_is_observed():
    """y = A(x) + noise, the noise also where a transform of real x tells nothing: against the dense matrix's rows."""
    operator, target, std = FourierSampling(torch.tensor([1, 1, 0, 0])), Gaussian(torch.zeros(4), std=0.7), 0.8
    y = operator(normal(1, 4)) + std * normal(1, 4, 2, seed=1)
    rows = operator.matrix((4,)).abs().amax(1) > 1e-12
    assert rows.tolist() == [True, False, True, True, False, False, False, False]
    dense = Matrix(operator.matrix((4,))[rows])
    found = twisted_smc(PiGDM(target.denoiser(VP), operator, y, std, data_std=0.7), (4096, 4),
                        TwistedSMC(particles=4096), steps=40, seed=0)  # fmt: skip
    expected = chain(40, target=target).measured(dense, std).log_prob(y.flatten(1)[:, rows])
    assert float(found.log_evidence) == pytest.approx(float(expected), abs=0.05)


# --- as a solver -----------------------------------------------------------------------------------------------------


def test_samples_are_the_weighted_particles_drawn():
    guided, P = PiGDM(TARGET.denoiser(VP), A, Y, NOISE), 16
    options = {"steps": 12, "seed": 3}
    solution = sample(guided, (3 * P, 2), TwistedSMC(particles=P), trajectory=True, **options)
    found = twisted_smc(guided, (3 * P, 2), TwistedSMC(particles=P), **options)
    assert solution.nfe == found.nfe == 12
    for i, group in enumerate(solution.x.unflatten(0, (3, P))):
        copies = (group[:, None] == found.x[i]).all(-1).double().sum(0)
        assert float(copies.sum()) == P
        assert bool(((copies - P * found.log_weights[i].exp()).abs() < 1).all())
    assert solution.trajectory.shape == (13, 3 * P, 2)


def test_a_group_depends_on_its_own_seeds_only():
    P, seeds = 8, sample_seeds(5, 24)
    y = torch.tensor([[1.0], [1.5], [2.0]])
    solver, options = TwistedSMC(DDIM(eta=1.0), particles=P, ess=0.9), {"steps": 10}
    guided = DPS(TARGET.denoiser(VP), A, y.repeat_interleave(P, dim=0), noise_std=NOISE)
    whole = sample(guided, (24, 2), solver, seed=seeds, **options).x
    alone = DPS(TARGET.denoiser(VP), A, y[1:2], noise_std=NOISE)
    one = sample(alone, (P, 2), solver, seed=seeds[P : 2 * P], **options).x
    torch.testing.assert_close(whole[P : 2 * P], one)


@pytest.mark.parametrize("end", [0.0, 0.1])
def test_evaluations_are_those_that_the_network_gets(end):
    counting = Counting(TARGET.denoiser(VP))
    grid, solver = Grid.uniform(VP, 5, end=end), TwistedSMC(particles=4)
    solution = sample(PiGDM(counting, A, Y, NOISE), (8, 2), solver, grid=grid, seed=0)
    assert solution.nfe == len(counting.times) == solver.evaluations(grid) == (6 if end else 5)
    assert sample(PiGDM(counting, A, Y, NOISE), (8, 2), solver, nfe=7, seed=0).nfe == 7


@pytest.mark.parametrize("sde", [FlowSDE(), VPSDE()], ids=repr)
@pytest.mark.parametrize("solver", [DDIM(), DDIM(eta=0.5), DDPM(variance="beta")], ids=repr)
def test_any_chain_any_rank(sde, solver):
    """A chain that draws nothing is weighted only: its evidence is right as well."""
    shape = (2, 3, 1)
    target = Gaussian(torch.zeros(shape), std=0.7)
    guided = MomentMatching(target.denoiser(sde), lambda x: x.flatten(1).sum(1), torch.tensor([1.0]), 1.0)
    found = twisted_smc(guided, (2048, *shape), TwistedSMC(solver, particles=2048), steps=20, seed=0)
    assert found.x.shape == (1, 2048, *shape)
    assert found.x.dtype == torch.float32
    evidence = chain(20, solver, sde, target).measured(lambda x: x.flatten(1).sum(1), 1.0)
    assert float(found.log_evidence) == pytest.approx(float(evidence.log_prob(torch.tensor([1.0]).double())), abs=0.15)


# --- errors ----------------------------------------------------------------------------------------------------------


def test_bad_options_are_refused():
    for options, message in (
        ({"particles": 0}, "particles"),
        ({"ess": 1.5}, "ess"),
        ({"solver": UniPC()}, "single steps"),
    ):
        with pytest.raises(ValueError, match=message):
            TwistedSMC(**options)
    with pytest.raises(TypeError, match="log_twist"):
        Potential(TARGET.denoiser(VP), 1.0)


class Silent(Nonlinear):
    def posterior(self, x, t, **cond):
        raise AssertionError("the network was called")


def test_bad_calls_are_refused_before_the_network_is_called():
    silent = Silent(VP)
    guided, solver = DPS(silent, A, Y, noise_std=NOISE), TwistedSMC(particles=4)
    cases = [
        (guided, (6, 2), solver, ValueError, "6 samples for particles=4"),
        (silent, (8, 2), solver, TypeError, r"knows log p\(y \| x_t\)"),
        (DPS(silent, A, Y), (8, 2), solver, ValueError, "noise_std"),
        (PiGDM(silent, A, Y, 0.0), (8, 2), solver, ValueError, "noise_std is 0"),
        (PiGDM(silent, A, normal(8, 1), 1.0), (8, 2), solver, ValueError, "y differs within a group"),
        (PiGDM(silent, A, Y, torch.rand(8)), (8, 2), solver, ValueError, "noise_std differs within a group"),
        (PiGDM(silent, A, normal(3, 1), 1.0), (8, 2), solver, ValueError, "3 entries for 8 samples"),
        (guided, (8, 2), TwistedSMC(Heun(), particles=4), ValueError, "more than once a step"),
    ]
    for denoiser, shape, method, error, message in cases:
        with pytest.raises(error, match=message):
            sample(denoiser, shape, method, steps=3, seed=0)
        with pytest.raises(error, match=message):
            twisted_smc(denoiser, shape, method, steps=3, seed=0)
    with pytest.raises(ValueError, match="exactly one of steps=, nfe= and grid=; got none"):
        twisted_smc(guided, (8, 2), solver)
    with pytest.raises(TypeError, match="TwistedSMC"):
        twisted_smc(guided, (8, 2), DDPM(), steps=3)


def test_an_impossible_measurement_stops_the_run():
    lost = Potential(TARGET.denoiser(VP), lambda x, t: 0 * x.sum(1), lambda x: torch.full((len(x),), -math.inf))
    with pytest.raises(NonFiniteError, match="weights are all zero"):
        twisted_smc(lost, (8, 2), TwistedSMC(particles=4), steps=3, seed=0)
    with pytest.raises(NonFiniteError) as caught:
        sample(lost, (8, 2), TwistedSMC(particles=4), steps=3, seed=0)
    assert caught.value.step == 2
