"""The closed-form targets, against references that share no formula with them: Bayes on a grid, conditioning of joint
Gaussians by `torch.linalg.solve`, `torch.distributions`, autograd.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mpmath as mp
import pytest
import torch
from common import SDES
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from scoresde import EDMSDE, SDE, VPSDE, CosineVPSDE, DDPMChain, FlowSDE
from scoresde.exact import Empirical, Gaussian, GaussianMixture

# Half log-SNRs from nearly clean to mostly noise, reached by each SDE within its range.
LAMBDAS = [2.5, 0.7, -1.5]


@dataclass
class Case:
    """A target with the parameters of the mixture it is, dense: weights (K,), means (K, D), covariances (K, D, D)."""

    target: GaussianMixture
    weights: Tensor
    means: Tensor
    covs: Tensor

    def x(self, sde: SDE, t: float | Tensor, n: int = 4) -> Tensor:
        """n points that the marginal at t may well produce."""
        generator = torch.Generator().manual_seed(5)
        x0 = self.target.sample(n, generator, dtype=torch.float64)
        noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
        return sde.perturb(x0, t, 1.5 * noise)

    def marginal(self, sde: SDE, t: float) -> MixtureSameFamily:
        """p_t by torch.distributions."""
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        S = alpha**2 * self.covs + sigma**2 * eye(self.means.shape[1])
        return MixtureSameFamily(Categorical(self.weights), MultivariateNormal(alpha * self.means, S))


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def eye(D: int) -> Tensor:
    return torch.eye(D, dtype=torch.float64)


def random_cov(*shape: int) -> Tensor:
    A = random(*shape)
    return A @ A.mT / shape[-1] + 0.05 * eye(shape[-1])


def diagonal(std: Tensor) -> Tensor:
    return torch.diag_embed(std.double().square())


one = torch.ones(1).double()
W3 = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
M = random(3, 2)
S2 = torch.tensor([0.3, 1.2], dtype=torch.float64)
S3 = torch.tensor([0.1, 0.4, 0.9], dtype=torch.float64)
C2, C32, C12 = random_cov(2, 2), random_cov(3, 2, 2), random_cov(12, 12)
IMAGE = random(2, 2, 3)
IMAGE_STD = random(2, 2, 3).abs() + 0.1
IMAGES = random(3, 1, 2, 2)
IMAGES_STD = random(3, 1, 2, 2).abs() + 0.1
POINTS = random(5, 2)

CASES: dict[str, Case] = {
    "gaussian scalar": Case(Gaussian(0.3, std=0.7), one, one[None] * 0.3, one.reshape(1, 1, 1) * 0.49),
    "gaussian isotropic": Case(Gaussian(M[0], std=0.5), one, M[:1], 0.25 * eye(2)[None]),
    "gaussian diagonal": Case(Gaussian(M[0], std=S2), one, M[:1], diagonal(S2)[None]),
    "gaussian full": Case(Gaussian(M[0], cov=C2), one, M[:1], C2[None]),
    "gaussian image diagonal": Case(
        Gaussian(IMAGE, std=IMAGE_STD), one, IMAGE.reshape(1, 12), diagonal(IMAGE_STD.flatten())[None]
    ),
    "gaussian image full": Case(Gaussian(IMAGE, cov=C12), one, IMAGE.reshape(1, 12), C12[None]),
    "mixture scalar": Case(
        GaussianMixture(M[:, 0], 2 * W3, std=S3), W3, M[:, :1], S3.square().reshape(3, 1, 1)
    ),  # weights are normalised
    "mixture one width": Case(GaussianMixture(M, W3, std=0.4), W3, M, (0.16 * eye(2)).expand(3, 2, 2)),
    "mixture width per component": Case(GaussianMixture(M, W3, std=S3), W3, M, S3.square()[:, None, None] * eye(2)),
    "mixture shared diagonal": Case(GaussianMixture(M, W3, std=S2), W3, M, diagonal(S2).expand(3, 2, 2)),
    "mixture images diagonal": Case(
        GaussianMixture(IMAGES, W3, std=IMAGES_STD), W3, IMAGES.reshape(3, 4), diagonal(IMAGES_STD.reshape(3, 4))
    ),
    "mixture shared full": Case(GaussianMixture(M, W3, cov=C2), W3, M, C2.expand(3, 2, 2)),
    "mixture full": Case(GaussianMixture(M, W3, cov=C32), W3, M, C32),
    "mixture equal weights": Case(GaussianMixture(M, cov=C32), torch.ones(3).double() / 3, M, C32),
    "empirical": Case(Empirical(POINTS), torch.ones(5).double() / 5, POINTS, torch.zeros(5, 2, 2).double()),
    "empirical images": Case(
        Empirical(IMAGES), torch.ones(3).double() / 3, IMAGES.reshape(3, 4), torch.zeros(3, 4, 4).double()
    ),
}
WITH_DENSITY = [name for name in CASES if "empirical" not in name]
GAUSSIANS = [name for name in CASES if name.startswith("gaussian")]

all_cases = pytest.mark.parametrize("case", CASES)
all_sdes = pytest.mark.parametrize("sde", SDES.values(), ids=SDES)


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-9, atol: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=rtol, atol=atol)


def reference_posterior(case: Case, x: Tensor, sde: SDE, t: float) -> tuple[Tensor, Tensor]:
    """Moments of x_0 given x_t: condition each joint Gaussian, weigh by evidence, then total variance."""
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    D = case.means.shape[1]
    flat = x.reshape(len(x), D)
    S = alpha**2 * case.covs + sigma**2 * eye(D)
    evidence = MultivariateNormal(alpha * case.means, S).log_prob(flat[:, None])
    r = torch.softmax(case.weights.log() + evidence, dim=1)
    residual = (flat[:, None] - alpha * case.means)[..., None]
    mu = case.means + (alpha * case.covs @ torch.linalg.solve(S, residual))[..., 0]
    cov = case.covs - alpha**2 * case.covs @ torch.linalg.solve(S, case.covs)
    mean = torch.einsum("bk,bkd->bd", r, mu)
    within = torch.einsum("bk,kd->bd", r, cov.diagonal(dim1=-2, dim2=-1))
    between = torch.einsum("bk,bkd->bd", r, (mu - mean[:, None]) ** 2)
    return mean.reshape(x.shape), (within + between).reshape(x.shape)


# Posterior


@all_cases
@all_sdes
def test_posterior_is_that_of_the_joint_gaussians(case: str, sde: SDE) -> None:
    c = CASES[case]
    for lam in LAMBDAS:
        t = float(sde.time_at(lam))
        x = c.x(sde, t)
        mean, var = c.target.denoiser(sde)(x, t)
        expected_mean, expected_var = reference_posterior(c, x, sde, t)
        assert var is not None
        close(mean, expected_mean)
        close(var, expected_var)


@pytest.mark.parametrize("case", ["gaussian scalar", "mixture scalar"])
@all_sdes
def test_posterior_in_one_dimension_is_bayes_by_brute_force(case: str, sde: SDE) -> None:
    """The trapezoidal rule is exact to rounding on a smooth density that vanishes at both ends."""
    target, c = CASES[case].target, CASES[case]
    x0 = torch.linspace(-12, 12, 24_001, dtype=torch.float64)[:, None]
    widths = c.covs.flatten().sqrt()
    prior = (c.weights * torch.exp(-(((x0 - c.means[:, 0]) / widths) ** 2) / 2) / widths).sum(1, keepdim=True)
    for lam in LAMBDAS:
        t = float(sde.time_at(lam))
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        x = torch.linspace(-2, 2, 5, dtype=torch.float64) * torch.hypot(alpha, sigma)
        posterior = prior * torch.exp(-(((x - alpha * x0) / sigma) ** 2) / 2)
        posterior = posterior / posterior.sum(0)
        mean = (posterior * x0).sum(0)
        result = target.denoiser(sde)(x, t)
        close(result.mean, mean)
        assert result.var is not None
        close(result.var, (posterior * (x0 - mean) ** 2).sum(0))


@all_cases
@all_sdes
def test_tweedie_second_order(case: str, sde: SDE) -> None:
    """Cov[x_0 | x_t] = sigma^2 / alpha dD/dx, so Var is the diagonal of the Jacobian of the mean."""
    denoiser = CASES[case].target.denoiser(sde)
    t = float(sde.time_at(0.7))
    x = CASES[case].x(sde, t, n=2)
    for i in range(2):
        jacobian = torch.autograd.functional.jacobian(lambda y: denoiser(y, t).mean, x[i : i + 1])
        D = x[i].numel()
        expected = (sde.sigma(t) ** 2 / sde.alpha(t) * jacobian.reshape(D, D).diagonal()).reshape(x[i].shape)
        var = denoiser(x[i : i + 1], t).var
        assert var is not None
        close(var[0], expected)


@all_cases
@all_sdes
def test_variance_is_the_error_of_the_mean(case: str, sde: SDE) -> None:
    """E[D - x_0] = 0 and E[(D - x_0)^2] = E[var]: the stated variance is the error that D makes on samples.

    n = 4000: each average lies within 6 of its standard errors of 0 (p < 2e-9 each).
    """
    c = CASES[case]
    t, generator = float(sde.time_at(0.7)), torch.Generator().manual_seed(0)
    x0 = c.target.sample(4000, generator, dtype=torch.float64)
    noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    mean, var = c.target.denoiser(sde)(sde.perturb(x0, t, noise), t)
    assert var is not None
    for zero in (mean - x0, (mean - x0) ** 2 - var):
        z = zero.mean(0) / (zero.std(0) / math.sqrt(len(zero)))
        assert float(z.abs().max()) < 6


@all_cases
@all_sdes
def test_at_the_data_itself_the_posterior_is_the_point(case: str, sde: SDE) -> None:
    """At t = 0, x_t is x_0: D(x) = x with no variance, for components of zero width too."""
    x = CASES[case].target.sample(3, torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, var = CASES[case].target.denoiser(sde)(x, 0.0)
    assert var is not None
    close(mean, x, atol=1e-14)
    close(var, torch.zeros_like(x), atol=1e-14)


@all_cases
@pytest.mark.parametrize("sde", [FlowSDE(), CosineVPSDE(t_max=1.0)], ids=["flow", "cosine-1"])
def test_where_alpha_is_zero_the_posterior_is_the_prior(case: str, sde: SDE) -> None:
    target = CASES[case].target
    x = random(3, *target.event_shape)
    mean, var = target.denoiser(sde)(x, 1.0)
    data_mean, data_cov = target.moments()
    assert var is not None
    close(mean, data_mean.reshape(target.event_shape).expand(x.shape))
    close(var, data_cov.diagonal().reshape(target.event_shape).expand(x.shape))
    normal = torch.distributions.Normal(0.0, one[0])
    close(target.log_prob(x, sde=sde, t=1.0), normal.log_prob(x).reshape(3, -1).sum(1))


@pytest.mark.parametrize("case", [name for name in GAUSSIANS if "full" not in name])
@all_sdes
def test_a_standard_deviation_is_a_diagonal_covariance(case: str, sde: SDE) -> None:
    c = CASES[case]
    D = math.prod(c.target.event_shape)
    other = Gaussian(c.means[0].reshape(c.target.event_shape), cov=c.covs[0].reshape(D, D))
    t = float(sde.time_at(0.7))
    x = c.x(sde, t)
    close(other.denoiser(sde)(x, t).mean, c.target.denoiser(sde)(x, t).mean)
    close(other.denoiser(sde)(x, t).var, c.target.denoiser(sde)(x, t).var)
    close(other.log_prob(x, sde=sde, t=t), c.target.log_prob(x, sde=sde, t=t))


# Density and score


@pytest.mark.parametrize("case", WITH_DENSITY)
def test_log_prob_of_the_data(case: str) -> None:
    c = CASES[case]
    x = c.target.sample(5, torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = MixtureSameFamily(Categorical(c.weights), MultivariateNormal(c.means, c.covs)).log_prob(x.reshape(5, -1))
    close(c.target.log_prob(x), expected)
    for sde in SDES.values():
        close(c.target.log_prob(x, sde=sde, t=0.0), expected)


@all_cases
@all_sdes
def test_log_prob_of_the_marginals(case: str, sde: SDE) -> None:
    c = CASES[case]
    for lam in LAMBDAS:
        t = float(sde.time_at(lam))
        x = c.x(sde, t)
        close(c.target.log_prob(x, sde=sde, t=t), c.marginal(sde, t).log_prob(x.reshape(len(x), -1)))


@all_cases
@all_sdes
def test_score_is_the_gradient_of_the_log_density(case: str, sde: SDE) -> None:
    target = CASES[case].target
    for lam in LAMBDAS:
        t = float(sde.time_at(lam))
        x = CASES[case].x(sde, t).requires_grad_()
        (gradient,) = torch.autograd.grad(target.log_prob(x, sde=sde, t=t).sum(), x)
        score = target.denoiser(sde).score(x.detach(), t)
        close(score, gradient, rtol=1e-8, atol=1e-9 * float(gradient.abs().max()))


@all_cases
def test_the_score_has_the_hessian_of_the_log_density_as_its_jacobian(case: str) -> None:
    """Second derivatives are what a differentiable divergence needs."""
    target, sde = CASES[case].target, VPSDE()
    t = float(sde.time_at(0.7))
    x = CASES[case].x(sde, t, n=1)
    D = x.numel()
    hessian = torch.autograd.functional.hessian(lambda y: target.log_prob(y, sde=sde, t=t).sum(), x).reshape(D, D)
    jacobian = torch.autograd.functional.jacobian(lambda y: target.denoiser(sde).score(y, t), x).reshape(D, D)
    close(jacobian, hessian)


@all_cases
@all_sdes
def test_a_time_per_sample_is_each_samples_own_time(case: str, sde: SDE) -> None:
    target, denoiser = CASES[case].target, CASES[case].target.denoiser(sde)
    t = sde.time_at(torch.tensor([2.5, 0.7, -1.5], dtype=torch.float64))
    x = CASES[case].x(sde, t, n=3)
    together = (*denoiser(x, t), denoiser.score(x, t), target.log_prob(x, sde=sde, t=t))
    for i in range(3):
        x_i, t_i = x[i : i + 1], float(t[i])
        alone = (*denoiser(x_i, t_i), denoiser.score(x_i, t_i), target.log_prob(x_i, sde=sde, t=t_i))
        for a, b in zip(together, alone, strict=True):
            close(a[i : i + 1], b, rtol=1e-11, atol=1e-12)


def mp_mixture(x: float, t: float, sde: SDE) -> tuple[mp.mpf, mp.mpf, mp.mpf]:
    """(mean, score, log density) in 50 digits of 0.3 N(-1, 0.01^2) + 0.7 N(1, 0.01^2)."""
    with mp.workdps(50):
        alpha, sigma, x = mp.mpf(float(sde.alpha(t))), mp.mpf(float(sde.sigma(t))), mp.mpf(x)
        C = mp.mpf(0.01) ** 2
        S = alpha**2 * C + sigma**2
        joint = [mp.mpf(w) * mp.exp(-((x - alpha * m) ** 2) / (2 * S)) for w, m in ((0.3, -1), (0.7, 1))]
        r = [j / sum(joint) for j in joint]
        mean = sum(p * (m + alpha * C / S * (x - alpha * m)) for p, m in zip(r, (-1, 1), strict=True))
        score = sum(p * (alpha * m - x) / S for p, m in zip(r, (-1, 1), strict=True))
        return mean, score, mp.log(sum(joint)) - mp.log(2 * mp.pi * S) / 2


@all_sdes
@pytest.mark.parametrize("t", [1e-5, 1e-3, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_narrow_mixture_near_the_data_is_no_special_case(sde: SDE, t: float, dtype: torch.dtype) -> None:
    """Float32 in, float32 out, float64 between. At sigma = 1e-6 (sub-VP) the score, from D rounded to 1e-16 in 1e-12,
    keeps six digits.
    """
    target = GaussianMixture([-1.0, 1.0], [0.3, 0.7], std=0.01)
    x = torch.tensor([-1.02, -0.99, 1.005, 1.03, 0.2], dtype=dtype)
    denoiser = target.denoiser(sde)
    result = torch.stack([denoiser(x, t).mean, denoiser.score(x, t), target.log_prob(x, sde=sde, t=t)])
    assert result.dtype == dtype
    expected = [[float(v) for v in mp_mixture(u, t, sde)] for u in x.double().tolist()]
    rtol = 3e-7 if dtype == torch.float32 else 1e-11
    tiny = 5e-16 / float(sde.sigma(t)) ** 2  # the rounding of D in the score
    for row, column, atol in zip(result, zip(*expected, strict=True), (1e-15, tiny, 1e-11), strict=True):
        close(row, torch.tensor(column, dtype=torch.float64), rtol=rtol, atol=atol)


def test_widths_and_weights_are_not_rounded_to_float32() -> None:
    """0.1 has no exact float32: a width that passes through one is off by 1e-8."""
    target = GaussianMixture([[-0.3, 0.7], [0.1, 0.2]], [0.1, 0.3], std=0.1)
    mean, cov = target.moments()
    assert mean.tolist() == pytest.approx([0.0, 0.325], abs=1e-15)
    expected = [0.01 + 0.25 * 0.75 * 0.4**2, 0.01 + 0.25 * 0.75 * 0.5**2]
    assert cov.diagonal().tolist() == pytest.approx(expected, rel=1e-14)


# Empirical


@all_sdes
def test_empirical_near_the_data_returns_the_nearest_point(sde: SDE) -> None:
    data = random(50, 2, 3)
    t = float(sde.time_at(4.5))  # sigma / alpha = 0.011
    x = sde.perturb(data[:20], t, random(20, 2, 3))
    mean, var = Empirical(data).denoiser(sde)(x, t)
    nearest = torch.cdist(x.flatten(1) / sde.alpha(t), data.flatten(1)).argmin(1)
    assert torch.equal(nearest, torch.arange(20))
    close(mean, data[nearest])
    assert var is not None
    close(var, torch.zeros_like(var))


def test_empirical_far_from_the_data_returns_its_mean() -> None:
    """At sigma = 1e6 the weights are equal to |x0| |x| / sigma^2 = 1e-5."""
    sde, data = EDMSDE(t_max=1e6), random(50, 3)
    mean, var = Empirical(data).denoiser(sde)(1e6 * random(4, 3), 1e6)
    close(mean, data.mean(0).expand(4, 3), rtol=0, atol=1e-4)
    assert var is not None
    close(var, data.var(0, correction=0).expand(4, 3), rtol=0, atol=1e-4)


def test_empirical_is_the_limit_of_a_mixture_of_vanishing_width() -> None:
    sde, x = VPSDE(), random(4, 2)
    narrow, points = GaussianMixture(POINTS, std=1e-7), Empirical(POINTS)
    for t in (0.1, 0.5, 1.0):
        close(points.denoiser(sde)(x, t).mean, narrow.denoiser(sde)(x, t).mean)
        close(points.log_prob(x, sde=sde, t=t), narrow.log_prob(x, sde=sde, t=t))


# Samples


@all_cases
def test_samples_have_the_stated_moments(case: str) -> None:
    """n = 20,000: every mean and product moment lies within 6 of its standard errors (p < 2e-9 each, 200 in all)."""
    target, c = CASES[case].target, CASES[case]
    mean, cov = target.moments()
    close(mean, c.weights @ c.means)
    raw = torch.einsum("k,kij->ij", c.weights, c.covs + c.means[:, :, None] * c.means[:, None])
    close(cov, raw - torch.outer(mean, mean))
    n = 20_000
    x = target.sample(n, torch.Generator().manual_seed(0), dtype=torch.float64).reshape(n, -1) - mean
    products = (x[:, :, None] * x[:, None]).reshape(n, -1)
    for values, expected in ((x, torch.zeros_like(mean)), (products, cov.flatten())):
        z = (values.mean(0) - expected) / (values.std(0) / math.sqrt(n))
        assert float(z.abs().max()) < 6


@all_cases
def test_samples_have_the_stated_density(case: str) -> None:
    """E_p[q / p] = 1 for any other density q, here that of a little less noise.

    n = 4000, 6 standard errors (p < 2e-9).
    """
    target, sde = CASES[case].target, EDMSDE()
    generator = torch.Generator().manual_seed(1)
    x0 = target.sample(4000, generator, dtype=torch.float64)
    x = sde.perturb(x0, 1.0, torch.randn(x0.shape, generator=generator, dtype=torch.float64))
    ratio = (target.log_prob(x, sde=sde, t=0.9) - target.log_prob(x, sde=sde, t=1.0)).exp()
    assert abs(float(ratio.mean()) - 1) < 6 * float(ratio.std()) / math.sqrt(len(ratio))


@all_cases
def test_samples_are_their_generators_alone(case: str) -> None:
    target = CASES[case].target
    before = torch.get_rng_state()
    first, again = (target.sample(6, torch.Generator().manual_seed(3)) for _ in range(2))
    fresh = target.sample(64), target.sample(64)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert first.shape == (6, *target.event_shape)
    assert not torch.equal(*fresh)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes_follow_the_argument(dtype: torch.dtype) -> None:
    target, sde = CASES["mixture full"].target, VPSDE()
    x = target.sample(3, torch.Generator().manual_seed(0), dtype=dtype)
    denoiser = target.denoiser(sde)
    assert x.dtype == denoiser(x, 0.5).mean.dtype == denoiser.score(x, 0.5).dtype == target.log_prob(x).dtype == dtype


# The flow of a Gaussian


gaussians = pytest.mark.parametrize("case", GAUSSIANS)


def gaussian(case: str) -> Gaussian:
    target = CASES[case].target
    assert isinstance(target, Gaussian)
    return target


@gaussians
@all_sdes
def test_flow_is_a_group(case: str, sde: SDE) -> None:
    target = gaussian(case)
    t, r, s = (float(sde.time_at(lam)) for lam in (-1.5, 0.7, 2.5))
    x = CASES[case].x(sde, t)
    close(target.flow(x, sde, t, t), x, rtol=1e-13, atol=1e-13)
    close(target.flow(target.flow(x, sde, t, r), sde, r, s), target.flow(x, sde, t, s), rtol=1e-12, atol=1e-12)
    close(target.flow(target.flow(x, sde, t, 0.0), sde, 0.0, t), x, rtol=1e-11, atol=1e-11)


@gaussians
@all_sdes
def test_flow_is_a_solution_of_the_probability_flow(case: str, sde: SDE) -> None:
    """dx/dt is the denoiser's velocity: a central difference over h, with an error of h^2."""
    target = gaussian(case)
    for lam in LAMBDAS:
        t = float(sde.time_at(lam))
        t = math.floor(t) + 0.5 if isinstance(sde, DDPMChain) else t  # a chain's velocity jumps at its nodes
        h = 1e-4 * t
        x = CASES[case].x(sde, t)
        slope = (target.flow(x, sde, t, t + h) - target.flow(x, sde, t, t - h)) / (2 * h)
        velocity = target.denoiser(sde).velocity(x, t)
        close(slope, velocity, rtol=1e-6, atol=1e-6 * float(velocity.abs().max()))


@gaussians
@all_sdes
def test_flow_pushes_each_marginal_to_the_next(case: str, sde: SDE) -> None:
    """Change of variables: log p_t(x) = log p_s(flow(x)) + log |det dflow/dx|, at every x."""
    target = gaussian(case)
    t, s = float(sde.time_at(-1.5)), float(sde.time_at(2.5))
    x = CASES[case].x(sde, t, n=2)
    for i in range(2):
        x_i, D = x[i : i + 1], x[i].numel()
        jacobian = torch.autograd.functional.jacobian(lambda y: target.flow(y, sde, t, s), x_i).reshape(D, D)
        pushed = target.log_prob(target.flow(x_i, sde, t, s), sde=sde, t=s) + torch.linalg.slogdet(jacobian)[1]
        close(target.log_prob(x_i, sde=sde, t=t), pushed)


@gaussians
def test_flow_starts_where_alpha_is_zero(case: str) -> None:
    """At t = 1 on the straight path the marginal is N(0, I), which the flow carries onto the data."""
    target, sde = gaussian(case), FlowSDE()
    x = random(3, *target.event_shape)
    back = target.flow(target.flow(x, sde, 1.0, 0.0), sde, 0.0, 1.0)
    close(back, x)


# What is refused


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GaussianMixture(1.0, std=1.0), "one number"),
        (lambda: GaussianMixture([[0.0, math.nan]], std=1.0), "means is not finite"),
        (lambda: Gaussian([math.inf], std=1.0), "mean is not finite"),
        (lambda: GaussianMixture(M), "exactly one"),
        (lambda: GaussianMixture(M, std=1.0, cov=C2), "exactly one"),
        (lambda: Gaussian(M[0]), "exactly one"),
        (lambda: Gaussian(M[0], std=1.0, cov=C2), "exactly one"),
        (lambda: GaussianMixture(M, [0.5, 0.5], std=1.0), "3 positive"),
        (lambda: GaussianMixture(M, [0.5, -0.5, 1.0], std=1.0), "3 positive"),
        (lambda: GaussianMixture(M, [0.5, 0.0, 0.5], std=1.0), "3 positive"),
        (lambda: GaussianMixture(M, [0.5, math.nan, 0.5], std=1.0), "weights is not finite"),
        (lambda: GaussianMixture(M, std=-1.0), "negative"),
        (lambda: GaussianMixture(M, std=[0.1, -0.1, 0.1]), "negative"),
        (lambda: GaussianMixture(M, std=math.nan), "std is not finite"),
        (lambda: GaussianMixture(M, std=torch.ones(4)), "std has shape"),
        (lambda: GaussianMixture(M, std=torch.ones(2, 3)), "std has shape"),
        (lambda: Gaussian(M[0], std=torch.ones(3)), "std has shape"),
        (lambda: GaussianMixture(M, cov=torch.eye(3)), "cov has shape"),
        (lambda: GaussianMixture(M, cov=torch.eye(2).expand(2, 2, 2)), "cov has shape"),
        (lambda: GaussianMixture(M, cov=0.5), "cov has shape"),
        (lambda: Gaussian(M[0], cov=[[1.0, 0.5], [0.4, 1.0]]), "not symmetric"),
        (lambda: Gaussian(M[0], cov=[[1.0, 2.0], [2.0, 1.0]]), "positive semi-definite"),
        (lambda: Empirical(1.0), "one number"),
        (lambda: Empirical(torch.zeros(0, 2)), "means"),
    ],
)
def test_constructors_refuse(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("shape", [(), (4,), (4, 3), (4, 1, 2), (2,)])
def test_an_x_of_another_event_is_refused(shape: tuple[int, ...]) -> None:
    target = CASES["mixture full"].target
    x = torch.zeros(shape)
    for call in (target.log_prob, lambda x: target.denoiser(VPSDE())(x, 0.5)):
        with pytest.raises(ValueError, match="x "):
            call(x)


def test_half_a_marginal_is_refused() -> None:
    target, x = CASES["mixture full"].target, torch.zeros(1, 2)
    with pytest.raises(ValueError, match="both or none"):
        target.log_prob(x, sde=VPSDE())
    with pytest.raises(ValueError, match="both or none"):
        target.log_prob(x, t=0.5)


@pytest.mark.parametrize(
    "target", [Empirical(POINTS), Gaussian(M[0], std=0.0), Gaussian(M[0], cov=torch.diag(S2 - 0.3))]
)
def test_no_density_where_a_width_is_zero(target: GaussianMixture) -> None:
    x = torch.zeros(1, 2)
    for t in (None, 0.0):
        with pytest.raises(ValueError, match="no density"):
            target.log_prob(x, sde=None if t is None else VPSDE(), t=t)


@pytest.mark.parametrize("t", [-0.1, 1.1, math.nan])
def test_a_time_outside_the_sde_is_refused(t: float) -> None:
    target, x = gaussian("gaussian full"), torch.zeros(1, 2)
    calls: list[Callable[[], Any]] = [
        lambda: target.denoiser(VPSDE())(x, t),
        lambda: target.log_prob(x, sde=VPSDE(), t=t),
        lambda: target.flow(x, VPSDE(), t, 0.5),
        lambda: target.flow(x, VPSDE(), 0.5, t),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"t = |t="):
            call()


def test_times_that_do_not_fit_the_batch_are_refused() -> None:
    target, x, t = gaussian("gaussian full"), torch.zeros(4, 2), torch.tensor([0.1, 0.2, 0.3])
    calls: list[Callable[[], Any]] = [
        lambda: target.denoiser(VPSDE())(x, t),
        lambda: target.log_prob(x, sde=VPSDE(), t=t),
        lambda: target.flow(x, VPSDE(), t, 0.0),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="shape"):
            call()


@pytest.mark.parametrize("call", ["__call__", "score", "eps", "v", "velocity"])
def test_integers_are_refused_not_rounded_to(call: str) -> None:
    """The result has the dtype of x: a score in integers would be wrong and silent."""
    denoiser = CASES["mixture full"].target.denoiser(VPSDE())
    with pytest.raises(ValueError, match="floating"):
        getattr(denoiser, call)(torch.ones(2, 2, dtype=torch.int64), 0.5)


def test_conditions_are_refused() -> None:
    with pytest.raises(ValueError, match="label"):
        CASES["mixture full"].target.denoiser(VPSDE())(torch.zeros(1, 2), 0.5, label=torch.zeros(1))
