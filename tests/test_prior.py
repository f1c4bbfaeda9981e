"""A prior with a mean and a temperature, x_T ~ N(mu(c), I / temperature): `Tempered` and the codec `Shift`."""

import math

import pytest
import torch
from torch.distributions import Normal

from scoresde import (
    EDMSDE,
    SDE,
    VESDE,
    VPSDE,
    DDPMChain,
    FlowSDE,
    Grid,
    Latent,
    Masked,
    SubVPSDE,
    Tempered,
    X0Denoiser,
    elbo,
    log_prob,
    sample,
    sample_seeds,
)
from scoresde.analysis import gaussian_law
from scoresde.codecs import Shift
from scoresde.compiled import SamplerModule
from scoresde.editing import rescale
from scoresde.exact import Gaussian
from scoresde.guidance import Conditioned
from scoresde.solvers import DDIM, DEIS, AdaptiveODE, DPMSolverPP, Heun, UniPC

VP = VPSDE()
MU = torch.tensor([[40.0, -7.0], [0.5, 3.0], [-100.0, 0.0], [1.0, 1.0]])
SHIFT = Shift(lambda mu: mu)
M, S = torch.tensor([0.5, -1.0], dtype=torch.float64), 0.6  # the law of z = x - mu


def flow(sde, x_T, end=None):
    """Where the exact ODE of N(M, S^2) takes x_T, at t = 0 or at the end."""
    alpha, radius = (
        (lambda t: float(sde.alpha(t))),
        (lambda t: math.hypot(S * float(sde.alpha(t)), float(sde.sigma(t)))),
    )
    end = 0.0 if end is None else end
    return alpha(end) * M + (x_T.double() - alpha(sde.t_max) * M) * radius(end) / radius(sde.t_max)


def shifted(shift=SHIFT):
    return Latent(Conditioned(Gaussian(M, std=S).denoiser(VP), drop="mu"), shift)


def model(temperature=1.0):
    return Tempered(shifted(), temperature)


SOLVERS = [(DDIM(), 400, 2e-2), (DPMSolverPP(2), 80, 2e-3), (UniPC(3), 60, 2e-3), (DEIS(3), 60, 2e-3),
           (Heun(), 80, 2e-3), (AdaptiveODE(rtol=1e-6, atol=1e-6), None, 1e-4)]  # fmt: skip


@pytest.mark.parametrize(("solver", "steps", "tol"), SOLVERS, ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_samples_of_a_gaussian_are_its_flow_of_the_shifted_tempered_prior(solver, steps, tol, temperature):
    end = {"steps": steps} if steps else {}
    found = sample(model(temperature), (4, 2), solver, seed=3, cond={"mu": MU}, **end)
    z_T = sample(Gaussian(M, std=S).denoiser(VP), (4, 2), DDIM(), steps=1, seed=3, trajectory=True).trajectory[0]
    expected = flow(VP, z_T / math.sqrt(temperature))
    assert (found.latent - expected).abs().max() < tol
    assert (found.x - (MU + found.latent)).abs().max() < 1e-5  # the mean of each item is its own


@pytest.mark.parametrize(
    "sde", [VP, SubVPSDE(), VESDE(), EDMSDE(), FlowSDE(), DDPMChain()], ids=lambda s: type(s).__name__
)
@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_the_law_of_the_output_has_the_width_of_the_closed_form(sde, temperature):
    """The flow of N(M, S^2) multiplies distances by S / r_T: the width is that factor times the prior's."""
    tempered, target = sde.tempered(temperature), Gaussian(M, std=S)
    assert tempered.prior_std == pytest.approx(sde.prior_std / math.sqrt(temperature), rel=1e-15)
    plain, other = (gaussian_law(UniPC(3).tableau(Grid.power(s, 60)), target, x_T="prior") for s in (sde, tempered))
    factor = (other.variances / plain.variances).sqrt()
    assert torch.allclose(factor, torch.full_like(factor, temperature**-0.5), rtol=1e-9)
    assert torch.allclose(other.mean, plain.mean, rtol=1e-9)
    radius = math.hypot(S * float(sde.alpha(sde.t_max)), float(sde.sigma(sde.t_max)))
    width = S * tempered.prior_std / radius
    assert torch.allclose(other.variances.sqrt(), torch.full_like(factor, width), rtol=5e-3)


def test_samples_have_that_law():
    n, temperature = 4000, 2.25
    x = sample(model(temperature), (n, 2), DPMSolverPP(), steps=40, seed=0, cond={"mu": MU[:1]}).x.double()
    width = S * VP.prior_std / math.hypot(S * float(VP.alpha(1.0)), float(VP.sigma(1.0))) / 1.5
    mean = MU[0] + flow(VP, torch.zeros(1, 2))[0]
    assert ((x.mean(0) - mean).abs() < 5 * width / n**0.5).all()
    assert ((x.std(0) / width - 1).abs() < 5 / (2 * n) ** 0.5).all()  # five standard errors


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_densities_are_those_of_the_prior(temperature):
    """log p(x) = log N(x_T; 0, 1 / temperature) + log |dx_T / dx|, of z = x - mu(c), in closed form for a Gaussian."""
    x = MU.double() + torch.tensor([[0.0, 0.0], [1.0, -2.0], [0.3, 0.4], [-1.0, 1.0]], dtype=torch.float64)
    exact = model(temperature)
    found = log_prob(exact, x, divergence="exact", rtol=1e-7, atol=1e-7, cond={"mu": MU.double()})
    # x_t = alpha x at t_min
    a, end = float(VP.alpha(VP.t_min)), VP.t_min
    slope = math.hypot(S * float(VP.alpha(1.0)), float(VP.sigma(1.0))) / math.hypot(S * a, float(VP.sigma(end)))
    x_T = float(VP.alpha(1.0)) * M + (a * (x - MU) - a * M) * slope
    expected = Normal(0.0, VP.prior_std / math.sqrt(temperature)).log_prob(x_T).sum(1) + 2 * math.log(a * slope)
    assert torch.allclose(found.value, expected, atol=2e-4)
    assert found.of == "x"
    own = sample(
        exact, (4, 2), UniPC(3, view="v", variable="half_log_snr"), steps=80, seed=1, cond={"mu": MU}, log_prob="exact"
    )
    again = log_prob(exact, own.x.double(), divergence="exact", rtol=1e-7, atol=1e-7, cond={"mu": MU.double()})
    assert torch.allclose(own.log_prob.double(), again.value, atol=2e-2)


def test_the_bound_differs_in_the_prior_alone():
    x, temperature = MU.double() + 0.3, 1.8
    one, other = (elbo(model(tau), x, seed=0, cond={"mu": MU.double()}) for tau in (1.0, temperature))
    assert torch.equal(one.denoising, other.denoising)
    assert torch.equal(one.reconstruction, other.reconstruction)
    law = Normal(float(VP.alpha(1.0)) * (x - MU), float(VP.sigma(1.0)))
    kl = torch.distributions.kl_divergence(law, Normal(torch.zeros(()).double(), VP.prior_std / temperature**0.5))
    assert torch.allclose(other.prior, -kl.sum(1), rtol=1e-10)


def test_sample_i_does_not_depend_on_the_batch():
    exact, seeds = model(1.5), sample_seeds(7, 4)
    whole = sample(exact, (4, 2), UniPC(3), steps=8, seed=seeds, cond={"mu": MU}).x
    for i in range(4):
        alone = sample(exact, (1, 2), UniPC(3), steps=8, seed=[seeds[i]], cond={"mu": MU[i : i + 1]}).x
        assert torch.allclose(alone[0], whole[i], rtol=1e-6, atol=1e-6)


def test_what_a_temperature_is():
    plain = Gaussian(M, std=S).denoiser(VP)
    x_T = VP.prior((4, 2), torch.Generator().manual_seed(0))
    draw = {"steps": 5, "generator": torch.Generator().manual_seed(0)}
    found = sample(Tempered(plain, 1.5), (4, 2), DDIM(), **draw).x
    # rescale counts it the other way
    assert torch.allclose(found, sample(plain, rescale(x_T, 1 / 1.5), DDIM(), steps=5).x, atol=1e-6)
    assert torch.equal(sample(Tempered(plain, 1.5), x_T, DDIM(), steps=5).x, sample(plain, x_T, DDIM(), steps=5).x)
    twice = Tempered(Tempered(plain, 2.0), 3.0)
    assert twice.sde.prior_std == pytest.approx(VP.prior_std / math.sqrt(6))
    assert repr(Tempered(plain, 2.0)) == f"Tempered({plain!r}, temperature=2.0)"
    # in either order; the process, its grids and its hash are the same
    blind = Conditioned(plain, drop="mu")
    orders = [Latent(Tempered(blind, 2.0), SHIFT), Tempered(Latent(blind, SHIFT), 2.0)]
    a, b = (sample(m, (4, 2), DDIM(), grid=Grid.power(VP, 5), seed=0, cond={"mu": MU}).x for m in orders)
    assert torch.equal(a, b)
    assert VP.tempered(2.0) == VP
    assert hash(VP.tempered(2.0)) == hash(VP)
    assert repr(VP.tempered(2.0)) == repr(VP)
    chain = DDPMChain.linear(10)
    assert chain.tempered(4.0).prior_std == chain.prior_std / 2
    assert chain.tempered(4.0) == chain
    assert VP.for_data(2.0).tempered(4.0).prior_std == VP.for_data(2.0).prior_std / 2


def test_compiled_and_masked_samples_have_it():
    tempered = Tempered(Gaussian(M, std=S).denoiser(VP), 4.0)
    seeds = torch.tensor([3, 4])
    compiled = SamplerModule(tempered, DDIM(), (1, 2), steps=1)
    plain = SamplerModule(tempered.denoiser, DDIM(), (1, 2), steps=1)
    zero = plain(torch.zeros(2, 2))
    assert torch.allclose(compiled(seeds) - zero, (plain(seeds) - zero) / 2, atol=1e-6)
    mask = torch.tensor([[True, False], [True, True]])
    net = X0Denoiser(lambda x, t, mask: x / 2, VP)
    orders = [Masked(Tempered(net, 4.0)), Tempered(Masked(net), 4.0)]
    a, b = (sample(m, (2, 2), DDIM(), steps=3, seed=[1, 2], cond={"mask": mask}, log_prob="exact") for m in orders)
    assert torch.equal(a.x, b.x)
    assert torch.equal(a.log_prob, b.log_prob)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_nonsense_is_refused_by_name(temperature):
    with pytest.raises(ValueError, match="temperature"):
        Tempered(Gaussian(M, std=S).denoiser(VP), temperature)


def test_a_width_of_ones_own_is_not_passed_over():
    class Own(SDE):
        t_min, t_max = 1e-3, 0.99

        def alpha(self, t):
            return torch.cos(torch.pi / 2 * t)

        def sigma(self, t):
            return torch.sin(torch.pi / 2 * t)

    class Wide(Own):
        def prior_std_at(self, t):
            return 3.0

    assert Own().tempered(4.0).prior_std == pytest.approx(0.5)
    assert Wide().prior_std == 3.0
    with pytest.raises(ValueError, match=r"Wide overrides prior_std_at.*width_at"):
        Wide().tempered(2.0)


def test_a_mean_of_fewer_axes_is_refused():
    """(B,) of x (B, D) would be read as (D,) where B = D, and the other way round."""
    shift = shifted(Shift(lambda mu: mu[:, 0]))
    with pytest.raises(ValueError, match=r"the mean that Shift's function returns has shape \(2,\), x \(2, 2\)"):
        sample(shift, (2, 2), DDIM(), steps=2, cond={"mu": MU[:2]})
