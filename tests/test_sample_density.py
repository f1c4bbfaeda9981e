"""sample(..., log_prob=): the density of the samples, in the pass that makes them."""

from __future__ import annotations

import math

import pytest
import torch
from common import Counting, every_pair, normal

from scoresde import EDMSDE, VPSDE, DDPMChain, EpsDenoiser, FlowSDE, Grid, NonFiniteError, log_prob, sample
from scoresde.exact import Gaussian, GaussianMixture
from scoresde.likelihood import Divergence
from scoresde.solvers import DDIM, DDPM, AdaptiveODE, DPMSolverPP, Heun, ReverseSDE, RungeKutta, UniPC

MIXTURE = GaussianMixture([[1.0, 0.0], [-1.0, 0.5], [0.2, -1.0]], weights=[1, 2, 3], std=0.4)
IMAGES = GaussianMixture(normal(3, 2, 3, 2, seed=7), std=0.6)
SDES = {type(sde).__name__: sde for sde in (VPSDE(), EDMSDE(), FlowSDE(), DDPMChain())}
RUNS = {
    "unipc4-v": (UniPC(4, "v"), {"steps": 80}, 1e-3),
    "rk4-angle": (RungeKutta("rk4", "angle"), {"steps": 25}, 1e-3),
    "adaptive": (AdaptiveODE(), {}, 1e-3),
    "dpm++2m": (DPMSolverPP(2), {"nfe": 160}, 0.05),
    "ddim": (DDIM(), {"steps": 200}, 0.3),
}


@every_pair(name=list(RUNS), sde=SDES, target={"plane": MIXTURE, "images": IMAGES})
def test_it_is_the_density_of_the_samples(name, sde, target):
    """The same as log_prob, to tight tolerances, where the solution stands: both are of the model, prior and all."""
    (solver, given, tolerance), denoiser = RUNS[name], target.denoiser(sde)
    x_T = sde.prior_std * normal(5, *target.event_shape)
    solution = sample(denoiser, x_T, solver, log_prob="exact", **given)
    found = log_prob(denoiser, solution.x, divergence="exact", t=solution.t, rtol=1e-7, atol=1e-7)
    assert solution.t == sde.t_min == float(solution.grid.times[-1])
    assert solution.log_prob.shape == (5,)
    torch.testing.assert_close(solution.log_prob, found.value, rtol=0, atol=tolerance)
    assert not solution.log_prob_stderr.any()


@pytest.mark.parametrize("solver", [UniPC(3), DDIM(), Heun("angle")], ids=["unipc3", "ddim", "heun"])
def test_the_samples_and_their_calls_are_those_without(solver):
    sde, x_T = VPSDE(), normal(4, 2)
    grid = Grid.power(sde, 12, end=1e-4)
    counting = Counting(MIXTURE.denoiser(sde))
    with_density = sample(counting, x_T, solver, grid=grid, log_prob=True, seed=0)
    assert len(counting.times) == with_density.nfe
    plain = sample(MIXTURE.denoiser(sde), x_T, solver, grid=grid)
    torch.testing.assert_close(with_density.x, plain.x, rtol=0, atol=1e-12)
    assert with_density.nfe == plain.nfe
    assert plain.log_prob is None


def test_probes_are_unbiased_and_their_error_is_stated():
    """Over 400 samples in a rotated basis: coverage of 1.96 stderr within 5 binomial sigma (0.055) of 0.95 or above."""
    Q, _ = torch.linalg.qr(normal(12, 12, seed=1))
    target = Gaussian(torch.zeros(12), cov=Q @ torch.diag(torch.linspace(0.3, 2.0, 12).double()) @ Q.T)
    sde, x_T = VPSDE(), normal(400, 12, seed=2)
    denoiser = target.denoiser(sde)
    exact = sample(denoiser, x_T, UniPC(4, "v"), steps=25, log_prob="exact").log_prob
    found = sample(denoiser, x_T, UniPC(4, "v"), steps=25, log_prob=Divergence(probes=2), seed=3)
    z = (found.log_prob - exact) / found.log_prob_stderr
    assert abs(float(z.mean())) < 5 / math.sqrt(400) + 0.05
    assert 0.895 <= float((z.abs() < 1.96).double().mean()) <= 0.999


def test_a_sample_is_the_same_alone_and_from_a_shape():
    denoiser = MIXTURE.denoiser(VPSDE())
    together = sample(denoiser, (3, 2), UniPC(4, "v"), nfe=20, seed=[4, 5, 6], log_prob=True)
    alone = sample(denoiser, (1, 2), UniPC(4, "v"), nfe=20, seed=[5], log_prob=True)
    assert together.x.dtype == together.log_prob.dtype == torch.float32
    torch.testing.assert_close(alone.log_prob[0], together.log_prob[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(alone.log_prob_stderr[0], together.log_prob_stderr[1], rtol=1e-4, atol=1e-5)


def test_gradients_of_the_density():
    """With respect to x_T, against central differences."""
    denoiser, x_T, d = MIXTURE.denoiser(VPSDE()), normal(3, 2), normal(3, 2, seed=9)

    def value(x):
        return sample(denoiser, x, UniPC(4, "v"), steps=15, log_prob="exact", differentiable=True).log_prob.sum()

    x = x_T.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(x), x)
    step = 1e-5
    difference = (value(x_T + step * d) - value(x_T - step * d)) / (2 * step)
    assert float((gradient * d).sum()) == pytest.approx(float(difference.detach()), rel=1e-5)


def test_a_budget_that_runs_out_has_no_density():
    solution = sample(MIXTURE.denoiser(VPSDE()), normal(3, 2), AdaptiveODE(), nfe=15, log_prob="exact")
    assert solution.status == "max_nfe"
    assert solution.t > VPSDE().t_min
    assert bool(solution.log_prob.isnan().all())


@pytest.mark.parametrize("solver", [UniPC(4, "v"), AdaptiveODE()], ids=["table", "adaptive"])
def test_a_nan_is_named(solver):
    def net(x, t):
        return torch.where((t < 0.5)[:, None] & (torch.arange(len(x)) == 1)[:, None], math.nan, 0.1 * x.sin())

    steps = {} if isinstance(solver, AdaptiveODE) else {"steps": 10}
    with pytest.raises(NonFiniteError, match="1 became non-finite") as error:
        sample(EpsDenoiser(net, VPSDE()), normal(3, 2), solver, log_prob=True, seed=0, **steps)
    assert error.value.samples == [1]
    assert 0 < error.value.time < 0.5


@pytest.mark.parametrize(
    ("solver", "given", "match"),
    [
        (DDPM(), {"steps": 5}, "draws noise"),
        (ReverseSDE(), {"steps": 5}, "deterministic"),
        (DDIM(), {"grid": Grid.uniform(VPSDE(), 5)}, "noisy time"),
        (DDIM(), {"grid": Grid.uniform(VPSDE(), 5, start=0.5, end=0.1)}, "t_max"),
        (DDIM(), {"steps": 5, "trajectory": True}, "trajectory"),
        (DDIM(), {"steps": 5, "path": True, "seed": 0}, "path"),
        (DDIM(), {"steps": 5, "log_prob": "guess"}, "exact"),
        (AdaptiveODE("RK45"), {}, "dopri5"),
    ],
    ids=[str(i) for i in range(8)],
)
def test_what_has_no_density_is_refused_before_any_call(solver, given, match):
    counting = Counting(MIXTURE.denoiser(VPSDE()))
    with pytest.raises(ValueError, match=match):
        sample(counting, normal(3, 2), solver, **{"log_prob": True, **given})
    assert not counting.times
