"""Posterior sampling against exact posteriors: `target.given`, itself checked against Bayes' rule."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from common import SDES, Nonlinear, end_of, generator, normal, start_of
from scipy.special import dawsn

from scoresde import VPSDE, EpsDenoiser, Grid, NonFiniteError, Posterior, X0Denoiser, sample
from scoresde.exact import Gaussian, GaussianMixture
from scoresde.guidance.operators import Blur, Downsample, FourierSampling, Grey, LinearOperator, Mask, Matrix
from scoresde.guidance.posterior_sampling import DPS, MomentMatching, PiGDM, ReconstructionGuidance
from scoresde.guidance.projections import DDNM
from scoresde.likelihood import log_prob
from scoresde.solvers import DDIM, DDPM, Heun, UniPC
from scoresde.tensors import expand_like
from scoresde.wrappers import Wrapper

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import posterior

VP = VPSDE()


def correlated(d: int, seed: int = 0) -> torch.Tensor:
    """A covariance, its eigenvalues between 0.2 and 2."""
    Q, _ = torch.linalg.qr(normal(d, d, seed=seed))
    return Q * torch.linspace(0.2, 2.0, d, dtype=torch.float64) @ Q.T


class Smooth(Wrapper):
    """A denoiser without a Posterior.var."""

    def posterior(self, x, t, /, **cond):
        return Posterior(self.denoiser.posterior(x, t, **cond).mean)


# --- the exact posterior ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["isotropic", "axes", "full"])
def test_given_is_bayes_rule(kind):
    widths = {
        "isotropic": {"std": torch.tensor([0.3, 0.5, 0.9])},
        "axes": {"std": 0.2 + normal(3, 4, seed=1).abs()},
        "full": {"cov": torch.stack([correlated(4, k) for k in range(3)])},
    }[kind]
    target = GaussianMixture(normal(3, 4), weights=[1.0, 2.0, 3.0], **widths)
    A, y = Matrix(normal(2, 4, seed=2)), normal(2, seed=3)
    posterior, evidence = target.given(A, y, 0.4), target.measured(A, 0.4).log_prob(y[None])
    x = normal(7, 4, seed=4)
    likelihood = torch.distributions.Normal(A(x), 0.4).log_prob(y).sum(1)
    torch.testing.assert_close(posterior.log_prob(x), target.log_prob(x) + likelihood - evidence)


def test_given_noise_free_knows_what_was_measured_and_keeps_the_event_shape():
    target = GaussianMixture(normal(2, 2, 3), std=0.5)
    posterior = target.given(lambda x: x[:, 0], normal(3, seed=1), 0.0)
    drawn = posterior.sample(5, generator(), torch.float64)
    assert drawn.shape == (5, 2, 3)
    torch.testing.assert_close(drawn[:, 0], normal(3, seed=1).expand(5, 3), rtol=0, atol=1e-7)
    with pytest.raises(ValueError, match="singular"):
        target.given(lambda x: torch.stack([x[:, 0], x[:, 0]]).movedim(1, 0), normal(2, 3), 0.0)
    with pytest.raises(ValueError, match=r"expected one measurement, \(3,\)"):
        target.given(lambda x: x[:, 0], normal(2), 0.1)


# --- what is exact ---------------------------------------------------------------------------------------------------


def exact_means(target, A, y, noise_std, sde, x, t):
    return target.given(A, y, noise_std).denoiser(sde)(x, t).mean


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("noise_std", [0.0, 0.3])
def test_moment_matching_is_exact_on_gaussians(name, noise_std):
    sde, target = SDES[name], Gaussian(normal(6), cov=correlated(6))
    A, y = Matrix(normal(3, 6, seed=2)), normal(3, seed=3)
    guided = MomentMatching(target.denoiser(sde), A, y[None], noise_std, iterations=3)
    x = 3 * normal(4, 6, seed=4)
    for t in (start_of(sde), float(sde.time_at(0.0)), end_of(sde)):
        exact = exact_means(target, A, y, noise_std, sde, x, t)
        torch.testing.assert_close(guided(x, t).mean, exact, rtol=1e-6, atol=1e-6 if noise_std else 1e-5)


def test_moment_matching_by_variance_and_row_sums_is_exact_where_the_axes_are_independent():
    target = Gaussian(normal(6), std=0.2 + normal(6, seed=1).abs())
    A, y, x = Matrix(normal(3, 6, seed=2)), normal(3, seed=3), normal(4, 6, seed=4)
    for covariance in ("jacobian", "variance", "row sum"):
        guided = MomentMatching(target.denoiser(VP), A, y[None], 0.1, covariance=covariance, iterations=5)
        torch.testing.assert_close(guided(x, 0.4).mean, exact_means(target, A, y, 0.1, VP, x, 0.4))


@pytest.mark.parametrize("name", SDES)
def test_pigdm_is_exact_on_isotropic_gaussians(name):
    sde, target = SDES[name], Gaussian(normal(2, 3), std=0.7)
    A, y = Mask(torch.tensor([[True, False, True], [False, False, True]])), normal(2, 3, seed=3)
    x = 2 * normal(4, 2, 3, seed=4)
    known = (lambda x: x[:, A.mask], y[A.mask])
    for noise_std in (0.0, 0.2):
        guided = PiGDM(target.denoiser(sde), A, y[None], noise_std, data_std=0.7)
        for t in (start_of(sde), end_of(sde)):
            exact = exact_means(target, *known, noise_std, sde, x, t)
            torch.testing.assert_close(guided(x, t).mean, exact, rtol=1e-6, atol=1e-6)
    by_hand = PiGDM(target.denoiser(sde), A, y[None], 0.2, r2=guided.r2)
    torch.testing.assert_close(by_hand(x, t).mean, guided(x, t).mean)


def test_the_ode_of_an_exact_guidance_ends_in_the_posterior():
    """From x_T the flow of the posterior's own denoiser, by the same solver, for two measurements at once."""
    target, A = Gaussian(normal(4), cov=correlated(4)), Matrix(normal(2, 4, seed=2))
    y, x_T = normal(2, 2, seed=3), normal(2, 4, seed=4)
    std = torch.tensor([0.1, 0.5], dtype=torch.float64)
    guided = MomentMatching(target.denoiser(VP), A, y, std)
    for solver in (Heun(), UniPC(order=3), DDPM()):
        x = sample(guided, x_T, solver, steps=12, seed=[1, 2]).x
        for i in range(2):
            own = target.given(A, y[i], float(std[i])).denoiser(VP)
            torch.testing.assert_close(x[i : i + 1], sample(own, x_T[i : i + 1], solver, steps=12, seed=[i + 1]).x)


def test_log_prob_is_that_of_the_posterior():
    target, A, y = Gaussian(normal(3), cov=correlated(3)), Matrix(normal(1, 3, seed=2)), normal(1, seed=3)
    guided = MomentMatching(target.denoiser(VP), A, y[None], 0.5)
    x = normal(2, 3, seed=4)
    own = target.given(A, y, 0.5).denoiser(VP)
    options = {"divergence": "exact", "rtol": 1e-8, "atol": 1e-8}
    found, exact = log_prob(guided, x, **options), log_prob(own, x, **options)
    torch.testing.assert_close(found.value, exact.value, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.latent, exact.latent, rtol=0, atol=1e-6)


# --- derivatives -----------------------------------------------------------------------------------------------------

METHODS = {
    "dps": lambda denoiser, A, y: DPS(denoiser, A, y),
    "dps gaussian": lambda denoiser, A, y: DPS(denoiser, A, y, noise_std=0.5),
    "reconstruction": lambda denoiser, A, y: ReconstructionGuidance(denoiser, A, y, noise_std=0.5),
    "pigdm": lambda denoiser, A, y: PiGDM(denoiser, A, y, 0.5),
    "jacobian": lambda denoiser, A, y: MomentMatching(denoiser, A, y, 0.5),
    "row sum": lambda denoiser, A, y: MomentMatching(denoiser, A, y, 0.5, covariance="row sum"),
    "variance": lambda denoiser, A, y: MomentMatching(denoiser, A, y, 0.5, covariance="variance"),
}


def mixture(*shape: int) -> GaussianMixture:
    return GaussianMixture(normal(3, *shape), std=0.4)


@pytest.mark.parametrize("name", METHODS)
def test_gradients_agree_with_finite_differences(name):
    """g = J^T w with the w of each method; J by differences of the denoiser, along fixed directions."""
    denoiser, A, y = mixture(4).denoiser(VP), Matrix(normal(2, 4, seed=2)), normal(1, 2, seed=3)
    guided = METHODS[name](denoiser, A, y)
    x, t, h = normal(3, 4, seed=4), 0.3, 1e-5
    found = guided.twist(x, t, {})
    I = torch.eye(4, dtype=torch.float64)  # noqa: E741
    J = torch.stack([(denoiser(x + h * e, t).mean - denoiser(x - h * e, t).mean) / (2 * h) for e in I], dim=2)
    D, var = denoiser(x, t)
    torch.testing.assert_close(found.mean, D)
    e, n = y - A(D), 0.25 * torch.eye(2, dtype=torch.float64)
    ratio = float(VP.sigma(t) ** 2 / VP.alpha(t))
    V = {
        "dps": None,
        "dps gaussian": torch.zeros(3, 4, 4, dtype=torch.float64),
        "reconstruction": None,
        "pigdm": float(VP.sigma(t) ** 2) * I.expand(3, 4, 4),  # of alpha^2 + sigma^2 = 1
        "jacobian": ratio * J,
        "row sum": torch.diag_embed(ratio * J.sum(1).clamp(min=0)),
        "variance": torch.diag_embed(var),
    }[name]
    if name == "reconstruction":
        w = e / (0.25 + float((VP.sigma(t) / VP.alpha(t)) ** 2))
    elif V is None:
        w = 2 * guided.steps / float(VP.beta(t)) * e / e.norm(dim=1, keepdim=True)
    else:
        w = torch.linalg.solve(n + A.A @ V @ A.A.T, e)
        torch.testing.assert_close(found.log_prob, -(e * w).sum(1) / 2)
    torch.testing.assert_close(found.gradient, torch.einsum("bij,bi->bj", J, w @ A.A), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", METHODS)
def test_derivatives_of_the_guided_mean(name):
    """Reverse and forward mode agree with finite differences, and nothing is recorded without being asked for."""
    guided = METHODS[name](mixture(4).denoiser(VP), Matrix(normal(2, 4, seed=2)), normal(1, 2, seed=3))
    x, v, h = normal(2, 4, seed=4), normal(2, 4, seed=5), 1e-5
    with torch.no_grad():
        assert not guided(x, 0.3).mean.requires_grad
        differences = (guided(x + h * v, 0.3).mean - guided(x - h * v, 0.3).mean) / (2 * h)
    with torch.inference_mode():
        inferred = guided(x.clone(), 0.3).mean
    y = x.clone().requires_grad_()
    mean = guided(y, 0.3).mean
    torch.testing.assert_close(mean.detach(), inferred.clone())
    (reverse,) = torch.autograd.grad(mean, y, v)
    forward = torch.func.jvp(lambda x: guided(x, 0.3).mean, (x,), (v,))[1]
    torch.testing.assert_close(forward, differences, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close((reverse * v).sum(), (forward * v).sum())


@pytest.mark.parametrize("name", METHODS)
def test_every_log_prob_runs(name):
    guided = METHODS[name](mixture(4).denoiser(VP), Matrix(normal(2, 4, seed=2)), normal(1, 2, seed=3))
    x = normal(2, 4, seed=4)
    exact = log_prob(guided, x, divergence="exact", steps=8).value
    assert bool(exact.isfinite().all())
    probed = log_prob(guided, x, divergence="hutchinson", probes=4, steps=8, seed=0)
    assert bool(((probed.value - exact).abs() < 6 * probed.stderr + 1e-9).all())


def test_parameters_get_no_gradients_unless_asked():
    net = torch.nn.Linear(4, 4)
    denoiser = EpsDenoiser(lambda x, t: net(x), VP)
    guided = MomentMatching(denoiser, Matrix(normal(2, 4, seed=2)), torch.zeros(1, 2), 0.5)
    x = sample(guided, (2, 4), DDIM(), steps=3, seed=0).x
    assert not x.requires_grad
    assert net.weight.grad is None
    sample(guided, (2, 4), DDIM(), steps=3, seed=0, differentiable=True).x.sum().backward()
    assert bool(net.weight.grad.abs().sum() > 0)


@pytest.mark.parametrize("name", ["dps", "pigdm", "jacobian"])
def test_a_network_without_a_derivative_is_named(name):
    guided = METHODS[name](X0Denoiser(lambda x, t: x.detach(), VP), lambda x: x, torch.zeros(1, 2))
    with pytest.raises(ValueError, match="no derivative by x"):
        guided(torch.ones(1, 2), 0.5)
    constant = METHODS[name](X0Denoiser(lambda x, t: torch.ones_like(x), VP), lambda x: x, torch.zeros(1, 2))
    torch.testing.assert_close(constant(torch.ones(1, 2), 0.5).mean, torch.ones(1, 2))


# --- the bias of DPS -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0])
def test_the_bias_of_dps_is_the_stated_one(ratio):
    """N(m, v), y = x_0 + noise of variance n = v / ratio: the end of the ODE by an accurate solver. It is affine in
    x_T, so two starts tell mean and standard deviation."""
    m, v, y = 0.5, 0.49, 1.3
    n, k = v / ratio, ratio / 2
    sde = SDES["edm"]
    target = Gaussian([m], std=math.sqrt(v))
    guided = DPS(target.denoiser(sde), lambda x: x, torch.tensor([[y]]), noise_std=math.sqrt(n))
    x_T = torch.tensor([[0.0], [sde.prior_std]], dtype=torch.float64)
    low, high = sample(guided, x_T, Heun(), grid=Grid.log_snr(sde, 200, last=1e-3)).x.flatten().tolist()
    mean = m + (y - m) * 2 * math.sqrt(k) * float(dawsn(math.sqrt(k)))
    assert low == pytest.approx(mean, abs=2e-2)  # x_T = 0 is the prior's mean but for 0.5 / 80
    assert high - low == pytest.approx(math.sqrt(v) * math.exp(-k), rel=1e-2)
    exact = target.given(lambda x: x, [y], math.sqrt(n)).moments()
    assert abs(low - float(exact[0])) > 0.05
    assert high - low < 0.96 * float(exact[1].sqrt())


def test_dps_without_noise_is_the_published_step():
    """One DDPM step of N = 1000 on VP moves x by zeta grad |e|^2 / |e|."""
    N, zeta = 1000, 0.7
    denoiser, y = mixture(3).denoiser(VP), normal(1, 3, seed=3)
    guided = DPS(denoiser, torch.tanh, y, scale=zeta, steps=N)
    grid = Grid.uniform(VP, N)
    x = normal(4, 3, seed=4)
    for i in (100, 600, 990):
        t, s = grid.times[i : i + 2]
        rows = DDPM().rows(VP, t[None], s[None])
        moved = rows.b[0, 0] * (guided(x, t).mean - denoiser(x, t).mean)
        at = x.clone().requires_grad_()
        squares = (y - torch.tanh(denoiser(at, t).mean)).square().sum(1)
        (gradient,) = torch.autograd.grad(squares.sum(), at)
        published = -zeta * gradient / squares.detach().sqrt()[:, None]
        torch.testing.assert_close(moved, published, rtol=5e-2, atol=0)
    nothing = DPS(denoiser, lambda x: 0 * x, torch.zeros(1, 3), steps=N)
    torch.testing.assert_close(nothing(x, 0.5).mean, denoiser(x, 0.5).mean)


def test_dps_means_the_same_on_every_sde():
    """x / alpha at the same half log-SNR is the same state: so is the guided mean."""
    x, level = normal(2, 3, seed=4), 0.4
    found = []
    for sde in (VP, SDES["edm"], SDES["flow"]):
        t = sde.time_at(level)
        guided = DPS(mixture(3).denoiser(sde), lambda x: x, normal(1, 3, seed=3))
        found.append(guided(expand_like(sde.alpha(t), x) * x, t).mean)
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


# --- operators, shapes, scale ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_linear_operators_and_functions_agree_at_any_rank(name):
    for shape in ((4,), (3, 2, 2), (2, 2, 2, 2)):
        target = mixture(*shape)
        x, y = normal(2, *shape, seed=4), normal(2, 2, seed=3)
        A = Matrix(normal(2, math.prod(shape), seed=2), shape)
        linear = METHODS[name](target.denoiser(VP), A, y)
        linearised = METHODS[name](target.denoiser(VP), lambda x, A=A: A(x), y)
        torch.testing.assert_close(linearised(x, 0.3).mean, linear(x, 0.3).mean)
        for i in range(2):  # each sample by itself
            alone = METHODS[name](target.denoiser(VP), A, y[i : i + 1])
            torch.testing.assert_close(alone(x[i : i + 1], 0.3).mean, linear(x, 0.3).mean[i : i + 1])
            times = torch.tensor([0.3, 0.6])
            both = linear(x, times).mean[i : i + 1]
            torch.testing.assert_close(alone(x[i : i + 1], times[i]).mean, both, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_non_linear_operators_and_float32(name):
    guided = METHODS[name](mixture(3).denoiser(VP), lambda x: x.square().sum(1, keepdim=True), torch.tensor([[2.0]]))
    x = sample(guided, (8, 3), DDPM(), steps=20, seed=0).x
    assert x.dtype == torch.float32
    unguided = sample(guided.denoiser, (8, 3), DDPM(), steps=20, seed=0).x
    if name != "dps":  # which has no noise_std, and jumps about the solution
        gap, before = ((z.square().sum(1) - 2).abs().mean() for z in (x, unguided))
        assert gap < 0.8 * before


@pytest.mark.parametrize("name", METHODS)
def test_scale_zero_is_the_unguided_sampler_bit_for_bit(name):
    denoiser = mixture(3).denoiser(VP)
    guided = METHODS[name](denoiser, lambda x: x, torch.zeros(1, 3))
    off = type(guided)(denoiser, lambda x: x, torch.zeros(1, 3), noise_std=1.0, scale=0.0)
    for solver in (DDIM(), DDPM(), UniPC(order=2)):
        plain = sample(denoiser, (4, 3), solver, steps=5, seed=0).x
        assert torch.equal(sample(off, (4, 3), solver, steps=5, seed=0).x, plain)
        assert not torch.equal(sample(guided, (4, 3), solver, steps=5, seed=0).x, plain)


def test_at_alpha_zero_nothing_is_added():
    sde = SDES["flow"]
    assert float(sde.alpha(sde.t_max)) == 0
    for name, method in METHODS.items():
        guided = method(mixture(3).denoiser(sde), lambda x: x, torch.zeros(1, 3))
        x = normal(2, 3)
        torch.testing.assert_close(guided(x, sde.t_max).mean, guided.denoiser(x, sde.t_max).mean, msg=name)
        assert bool(sample(guided, (4, 3), DDIM(), steps=5, seed=0).x.isfinite().all())


def test_a_mask_reads_only_what_it_knows():
    A = Mask(torch.tensor([True, True, False]))
    x, y = normal(2, 3, seed=4), normal(1, 3, seed=3)
    other = torch.where(A.mask, y, 1e6)
    for name, method in METHODS.items():
        found, same = (method(mixture(3).denoiser(VP), A, z) for z in (y, other))
        torch.testing.assert_close(found(x, 0.3).mean, same(x, 0.3).mean, msg=name)
        if name != "dps":
            expected = torch.distributions.Normal(x[:, :2], 0.5).log_prob(y[:, :2]).sum(1)
            torch.testing.assert_close(same.log_likelihood(x), expected)


UNREAD = {
    "fourier": FourierSampling(torch.tensor([[1, 0, 1, 1], [1, 1, 0, 0], [0, 1, 0, 0], [1, 1, 0, 1]])),
    "mask of a blur": Mask(torch.eye(4)) @ Blur(0.7),
    "mask of a grey": Mask(torch.eye(4)) @ Grey((0.5, 0.5)),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("operator", list(UNREAD))
def test_what_says_nothing_is_not_read(name, operator):
    A, x = UNREAD[operator], normal(2, 2, 4, 4, seed=4)
    y = A(normal(1, 2, 4, 4, seed=3))
    read = A.observed(torch.ones_like(y)) == 1
    denoiser = Gaussian(torch.zeros(2, 4, 4), std=0.6).denoiser(VP)
    found = METHODS[name](denoiser, A, y)
    for filled in (5.0, math.nan):
        same = METHODS[name](denoiser, A, torch.where(read, y, filled))
        assert torch.equal(found(x, 0.3).mean, same(x, 0.3).mean)
        if name != "dps":
            expected = torch.distributions.Normal(A(x), 0.5).log_prob(y)[:, read[0]].sum(1)
            torch.testing.assert_close(same.log_likelihood(x), expected)


@pytest.mark.parametrize("noise_std", [0.0, 0.1])
@pytest.mark.parametrize("operator", [Blur(1.5), Downsample(2, "bicubic"), Mask(torch.eye(8))], ids=repr)
def test_pigdm_loses_what_the_pseudo_inverse_does(operator, noise_std):
    """On N(m, s^2 I) it is DDNM with the noise, which is exact; at noise_std = 0 rounding to 8 bits is not blown up."""
    denoiser = Gaussian(0.1 * normal(1, 8, 8), std=0.5).denoiser(VP)
    y = ((operator(0.5 * normal(2, 1, 8, 8, seed=1)) * 127.5).round() / 127.5).float()
    x = normal(2, 1, 8, 8, seed=2, dtype=torch.float32)
    guided, exact = (
        PiGDM(denoiser, operator, y, noise_std, data_std=0.5),
        DDNM(denoiser, operator, y, noise_std, data_std=0.5),
    )
    for t in (0.01, 0.3, 0.9):
        expected = exact(x, t).mean
        scale = float(expected.abs().max())
        torch.testing.assert_close(guided(x, t).mean, expected, rtol=0, atol=2e-3 * scale)
    times = torch.tensor([0.3, 0.9])
    both = guided(x, times).mean
    for i in range(2):
        torch.testing.assert_close(both[i], guided(x, float(times[i])).mean[i], rtol=1e-4, atol=1e-4 * scale)


def test_pigdm_in_closed_form_is_that_by_conjugate_gradients():
    """Also its log-density, with the part of y that A cannot make."""
    denoiser, x = mixture(3, 6).denoiser(VP), normal(4, 3, 6, seed=4)
    for A in (Matrix(normal(20, 18, seed=5), (3, 6)), Downsample(3, dims=1), Blur(0.4, dims=1)):
        y = normal(*A(x).shape, seed=6)
        for noise_std in (0.5, torch.tensor([0.2, 0.5, 1.0, 2.0])):
            closed, general = PiGDM(denoiser, A, y, noise_std), PiGDM(denoiser, lambda x, A=A: A(x), y, noise_std)
            for t in (0.3, torch.tensor([0.1, 0.3, 0.6, 0.9])):
                found, expected = closed.twist(x, t, {}), general.twist(x, t, {})
                torch.testing.assert_close(found.gradient, expected.gradient)
                torch.testing.assert_close(found.log_prob, expected.log_prob)
    at_zero = PiGDM(denoiser, A, y, 0.5)(x, 0.0).mean
    torch.testing.assert_close(at_zero, x)


def test_ddnm_at_time_zero_is_x():
    """The sample has no noise left: a noisy y tells nothing more, whether the inverse is in closed form or not."""
    x = normal(2, 1, 8, 8)
    for boundary in ("zero", "circular"):
        guided = DDNM(Gaussian(torch.zeros(1, 8, 8), std=1.0).denoiser(VP), Blur(1.0, boundary=boundary), 0 * x, 0.1)
        torch.testing.assert_close(guided(x, 0.0).mean, x)
        each = guided(x, torch.tensor([0.0, 0.5])).mean
        torch.testing.assert_close(each[0], x[0])
        torch.testing.assert_close(each[1], guided(x, 0.5).mean[1])


@pytest.mark.parametrize("name", METHODS)
def test_inference_mode(name):
    """With a time that was made there; and what operators keep from it can be differentiated through afterwards."""
    for A in (lambda: Blur(1.0), lambda: Downsample(2, "bicubic") @ Blur(0.5)):
        denoiser, y = Gaussian(torch.zeros(1, 8, 8), std=1.0).denoiser(SDES["flow"]), A()(torch.zeros(1, 1, 8, 8))
        guided, other = METHODS[name](denoiser, A(), y), METHODS[name](denoiser, A(), y)
        x = normal(2, 1, 8, 8)
        with torch.inference_mode():
            inferred = sample(guided, (2, 1, 8, 8), DDIM(), steps=3, seed=0).x
            t = torch.tensor([0.3, 0.6], dtype=torch.float64)
            found = guided(x, t).mean
        assert torch.equal(inferred.clone(), sample(other, (2, 1, 8, 8), DDIM(), steps=3, seed=0).x)
        assert torch.equal(found.clone(), other(x, t.clone()).mean)
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(guided(leaf, 0.3).mean.sum(), leaf)
        assert bool(g.isfinite().all())


@pytest.mark.parametrize("name", METHODS)
def test_a_time_made_in_inference_mode(name):
    """Of x's dtype, so that it reaches a network as it is, which saves it for its derivative."""

    class Exact(EpsDenoiser):
        def posterior(self, x, t, /, **cond):
            return Posterior(super().posterior(x, t, **cond).mean, torch.ones_like(x))

    guided = METHODS[name](Exact(lambda x, t: x * t[:, None], VP), lambda x: x, torch.ones(1, 3))
    x = normal(2, 3)
    with torch.inference_mode():
        t = torch.tensor([0.3, 0.6], dtype=torch.float64)
        found = guided(x, t).mean
    torch.testing.assert_close(found.clone(), guided(x, t.clone()).mean)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_measurement_that_is_not_finite_is_refused(name, bad):
    for A in (Mask(torch.tensor([True, False])), lambda x: x, Matrix(torch.eye(2))):
        guided = METHODS[name](Silent(VP), A, torch.tensor([[bad, 0.0], [0.0, 0.0], [1.0, bad]]))
        entries = "0" if isinstance(A, Mask) else "0, 2"
        with pytest.raises(ValueError, match=f"y is not finite where the operator looks, in entries {entries}$"):
            guided(normal(3, 2), 0.5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_covariance_that_is_not_finite_is_not_taken_for_no_guidance(bad):
    class Spoilt(Wrapper):
        def posterior(self, x, t, /, **cond):
            D, var = self.denoiser.posterior(x, t, **cond)
            return Posterior(D, torch.cat([bad * var[:1], var[1:]]))

    guided = MomentMatching(Spoilt(mixture(2).denoiser(VP)), lambda x: x, torch.ones(1, 2), 0.5, covariance="variance")
    assert guided(normal(3, 2), 0.5).mean.isfinite().all(1).tolist() == [False, True, True]
    with pytest.raises(NonFiniteError):
        sample(guided, (3, 2), DDIM(), steps=3, seed=0)


class Wrong(LinearOperator):
    def __call__(self, x):
        return 2 * x

    def adjoint(self, y):
        return y


class Silent(Nonlinear):
    def posterior(self, x, t, **cond):
        raise AssertionError("the network was called")


BAD = [
    (lambda x: x[:, :1], torch.zeros(1, 2), {}, r"gives \(B, 1\)"),
    (lambda x: x, torch.zeros(3), {}, "give y with a batch dimension"),
    (lambda x: x, torch.zeros(2, 3), {}, "y has 2 entries for 4 samples"),
    (lambda x: x, torch.zeros(1, 3), {"noise_std": torch.ones(2)}, "noise_std has 2 entries for 4 samples"),
    (lambda x: x, torch.zeros(1, 3), {"scale": torch.ones(5)}, "scale has 5 entries for 4 samples"),
    (Wrong(), torch.zeros(1, 3), {}, "dot-product test"),
    (Grey(), torch.zeros(1, 3), {}, "Grey|channel|shape"),
]


@pytest.mark.parametrize("method", [DPS, ReconstructionGuidance, PiGDM, MomentMatching])
@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_calls_are_refused_before_the_network_is_called(method, case):
    operator, y, options, message = BAD[case]
    guided = method(Silent(VP), operator, y, **({"noise_std": 0.5} | options))
    with pytest.raises(ValueError, match=message):
        guided(torch.zeros(4, 3), 0.5)


@pytest.mark.parametrize("method", [DPS, ReconstructionGuidance, PiGDM, MomentMatching])
def test_bad_options_are_refused(method):
    denoiser, y = Silent(VP), torch.zeros(1, 3)
    for std in (-1.0, math.nan, torch.tensor([0.1, -0.1]), torch.ones(2, 2)):
        with pytest.raises(ValueError, match="noise_std"):
            method(denoiser, lambda x: x, y, noise_std=std)
    with pytest.raises(TypeError, match="expected a Denoiser"):
        method(lambda x, t: x, lambda x: x, y, noise_std=1.0)
    with pytest.raises(TypeError, match="operator"):
        method(denoiser, torch.eye(3), y, noise_std=1.0)
    with pytest.raises(ValueError, match="scale"):
        method(denoiser, lambda x: x, y, noise_std=1.0, scale=math.inf)


def test_bad_options_of_each_are_refused():
    denoiser, y = Silent(VP), torch.zeros(1, 3)
    with pytest.raises(ValueError, match="noise_std=0"):
        DPS(denoiser, lambda x: x, y, noise_std=0.0)
    with pytest.raises(ValueError, match="steps"):
        DPS(denoiser, lambda x: x, y, steps=0)
    with pytest.raises(ValueError, match="data_std"):
        PiGDM(denoiser, lambda x: x, y, 1.0, data_std=0.0)
    with pytest.raises(TypeError, match="r2"):
        PiGDM(denoiser, lambda x: x, y, 1.0, r2=0.5)
    with pytest.raises(ValueError, match="iterations"):
        MomentMatching(denoiser, lambda x: x, y, 1.0, iterations=0)
    with pytest.raises(ValueError, match="'jacobian'"):
        MomentMatching(denoiser, lambda x: x, y, 1.0, covariance="var")
    with pytest.raises(ValueError, match=r"Posterior\.var"):
        MomentMatching(Smooth(mixture(3).denoiser(VP)), lambda x: x, y, 1.0, covariance="variance")(normal(2, 3), 0.5)


# --- reconstruction guidance -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SDES)
def test_reconstruction_guidance_of_a_mask_is_pigdm_of_data_without_bound(name):
    """And, weighed for data of width s, PiGDM of that width: exact for data N(m, s^2 I)."""
    sde, s, mask, y = SDES[name], 0.7, torch.tensor([1, 1, 0, 0]), normal(1, 4, seed=3)
    denoiser, t = mixture(4).denoiser(sde), float(sde.time_at(-0.5))
    x = sde.perturb(normal(3, 4, seed=4), torch.tensor(t), normal(3, 4, seed=5))
    plain = ReconstructionGuidance(denoiser, Mask(mask), y)
    wide = PiGDM(denoiser, Mask(mask), y, 0.0, r2=lambda t: (sde.sigma(t) / sde.alpha(t)) ** 2)
    torch.testing.assert_close(plain(x, t).mean, wide(x, t).mean)

    def weight(t):
        return 1 + (sde.sigma(t) / (sde.alpha(t) * s)) ** 2

    weighed = ReconstructionGuidance(denoiser, Mask(mask), y, weight)
    torch.testing.assert_close(weighed(x, t).mean, PiGDM(denoiser, Mask(mask), y, 0.0, data_std=s)(x, t).mean)
    D = denoiser(x.requires_grad_(), t).mean  # the published formula as it stands
    (g,) = torch.autograd.grad((mask * (y - D)).square().sum(), x)
    published = D - 3.0 * float(sde.alpha(t)) / 2 * g
    torch.testing.assert_close(ReconstructionGuidance(denoiser, Mask(mask), y, 3.0)(x, t).mean, published)


# --- the benchmark ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(posterior.PROBLEMS))
def test_the_benchmark_s_denoiser_is_the_exact_one(name):
    problem = posterior.PROBLEMS[name]()
    x = normal(5, problem.means.shape[1])
    for t in (1e-3, 0.1, 1.0):
        found, exact = problem.denoiser(x, t), problem.target.denoiser(VP)(x, t)
        torch.testing.assert_close(found.mean, exact.mean, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(found.var, exact.var, rtol=1e-6, atol=1e-7)
    A = problem.operator
    assert A.singular_value is not None
    torch.testing.assert_close(A(A.adjoint(A(x))), A.singular_value**2 * A(x))


def test_the_benchmark_s_errors_of_exact_samples_are_those_of_sampling():
    problem = posterior.PROBLEMS["ring"]()
    law, n = problem.posterior(problem.measurements(1, 0.2), 0.2), 4000
    x, reference = law.sample(n, generator(1), torch.float64), law.sample(n, generator(2), torch.float64)
    _, mean, covariance, modes = posterior.errors(problem, x, law, reference)
    assert mean < 5 / n**0.5
    assert covariance < 0.1
    assert modes < 5 * len(problem.means) ** 0.5 / n**0.5
    shifted = posterior.errors(problem, x + 1.0, law, reference)
    assert shifted[0] == pytest.approx(1.0, abs=0.1)  # |s| / sqrt(2) for s = (1, 1)
    assert shifted[3] > 0.5


def test_the_benchmark_s_page(tmp_path, monkeypatch):
    monkeypatch.setattr(posterior, "METHODS", {k: posterior.METHODS[k] for k in ("unguided", "PiGDM", "SMC")})
    options = ["--problems", "ring", "--noise", "0.2", "0.5", "--quick", "--out", str(tmp_path)]
    posterior.main(options)
    record = json.loads((tmp_path / "results.json").read_text())
    rows = {row["method"]: row for row in record["problems"]["ring"] if row["noise"] == 0.2}
    assert list(rows) == ["floor", "exact guidance", "unguided", "PiGDM", "SMC"]
    assert (rows["PiGDM"]["calls"], rows["PiGDM"]["backward"], rows["unguided"]["backward"]) == (20, 20, 0)
    assert rows["unguided"]["ratio"] == 1
    assert rows["PiGDM"]["sliced_w2"] < rows["unguided"]["sliced_w2"]
    assert set(record["environment"]) >= {"device", "torch", "commit", "command"}
    assert "| SMC |" in (tmp_path / "README.md").read_text()
    for name in ("posterior.png", "samples.png"):
        assert (tmp_path / name).stat().st_size > 10_000
