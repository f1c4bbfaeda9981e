"""The laws of the forward SDEs, against the papers' formulas in 50 digits (the references share no code with scoresde).

Float32 is compared with the reference at the float32-rounded time, so that only the code's own error is seen.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from inspect import isabstract

import mpmath as mp
import numpy as np
import pytest
import torch
from common import EVERY_SDE, descendants, every_pair
from torch import Tensor

import scoresde
from scoresde import EDMSDE, SDE, VESDE, VPSDE, CosineVPSDE, DDPMChain, FlowSDE, Grid, SubVPSDE, processes
from scoresde.tensors import expand_like

mp.mp.dps = 50

SDES: dict[str, SDE] = EVERY_SDE | {
    "vp-other": VPSDE(beta_min=0.3, beta_max=7.0),
    "vp-constant": VPSDE(beta_min=2.0, beta_max=2.0),
    "ve-other": VESDE(sigma_min=0.002, sigma_max=1300.0),
}
CHAINS = [name for name, sde in SDES.items() if isinstance(sde, DDPMChain)]
CONTINUOUS = list(dict.fromkeys(type(sde) for sde in SDES.values() if sde.nodes is None))
DTYPES = [torch.float64, torch.float32]
# Relative error that a handful of operations, on exponents of size 10, may leave.
RTOL = {torch.float64: 1e-12, torch.float32: 2e-6}
# Derivatives: some twenty operations.
RTOL_RATES = {torch.float64: 5e-12, torch.float32: 5e-6}

REACHES_NOISE = [name for name, sde in SDES.items() if float(sde.alpha(sde.t_max)) == 0]
EXPLODES = [name for name, sde in SDES.items() if float(sde.alpha(sde.t_max)) == 1]

all_sdes = pytest.mark.parametrize("name", SDES)
both_dtypes = pytest.mark.parametrize("dtype", DTYPES)


@cache
def node_log_alphas(name: str) -> tuple[mp.mpf, ...]:
    """log alpha at the nodes 0..N of a chain, sum_i log(1 - beta_i) / 2."""
    sums = [mp.mpf(0)]
    for beta in SDES[name].betas.tolist():  # type: ignore[attr-defined]
        sums.append(sums[-1] + mp.log1p(-mp.mpf(beta)) / 2 if beta < 1 else -mp.inf)
    return tuple(sums)


def true_alpha(name: str, t: mp.mpf) -> mp.mpf:
    sde = SDES[name]
    match sde:
        case VPSDE() | SubVPSDE():  # Song et al. (2021), eq. 33
            low, high = mp.mpf(sde.beta_min), mp.mpf(sde.beta_max)
            return mp.exp(-(t**2) * (high - low) / 4 - t * low / 2)
        case CosineVPSDE():
            s = mp.mpf(sde.s)
            cos = mp.cos(mp.pi / 2 * (t + s) / (1 + s)) if t != 1 else mp.mpf(0)
            return cos / mp.cos(mp.pi / 2 * s / (1 + s))
        case FlowSDE():
            return 1 - t
        case DDPMChain():
            nodes, n = node_log_alphas(name), max(1, int(mp.ceil(t)))
            if nodes[n] == -mp.inf:
                return mp.exp(nodes[n - 1]) * (n - t)
            return mp.exp(nodes[n - 1] + (t - n + 1) * (nodes[n] - nodes[n - 1]))
        case VESDE() | EDMSDE():
            return mp.mpf(1)
    raise NotImplementedError(f"write down alpha of {sde!r} here")


def true_sigma(name: str, t: mp.mpf) -> mp.mpf:
    sde = SDES[name]
    match sde:
        case SubVPSDE():
            return 1 - true_alpha(name, t) ** 2
        case VESDE():
            return mp.mpf(sde.sigma_min) * (mp.mpf(sde.sigma_max) / mp.mpf(sde.sigma_min)) ** t
        case EDMSDE() | FlowSDE():
            return t
    return mp.sqrt(1 - true_alpha(name, t) ** 2)


def true_log_ratio(name: str, t: mp.mpf) -> mp.mpf:
    alpha, sigma = true_alpha(name, t), true_sigma(name, t)
    return mp.log(alpha / sigma) if alpha else -mp.inf


def times(name: str, dtype: torch.dtype, inner: bool = False) -> Tensor:
    """From 1e-5 to t_max, over all scales; `inner` leaves out the points where a derivative does not exist."""
    t_max = SDES[name].t_max
    t = np.concatenate([np.geomspace(1e-5, t_max, 19), np.linspace(0.03, 0.97, 9) * t_max])
    if name in CHAINS and inner:
        t = np.concatenate([np.geomspace(1e-5, 0.9, 8), np.floor(np.linspace(0, 0.999, 15) * t_max) + 0.4])
    elif name in CHAINS:
        t = np.concatenate([t, np.arange(1, 5), [t_max - 1, t_max - 0.5]])
    elif inner:
        t = t[t < t_max]
    return torch.tensor(np.sort(t), dtype=dtype).clamp(max=t_max)


def reference(function: Callable[[str, mp.mpf], mp.mpf], name: str, t: Tensor) -> np.ndarray:
    return np.array([float(function(name, mp.mpf(u))) for u in t.double().tolist()])


def assert_near(actual: Tensor, expected: np.ndarray, rtol: float, atol: float = 0.0) -> None:
    np.testing.assert_allclose(actual.double().numpy(), expected, rtol=rtol, atol=atol)


# The registry


def test_every_sde_is_in_the_registry_and_public() -> None:
    """One that is in no list would be tested by nobody."""
    registered = {type(make()) for make in processes.SDES.values()}
    written = {kind for kind in descendants(SDE) if kind.__module__.startswith("scoresde.") and not isabstract(kind)}
    assert {kind for kind in written if not kind.__name__.startswith("_")} == registered
    assert {kind.__name__ for kind in registered} <= set(scoresde.__all__)


# Scales


@all_sdes
@both_dtypes
def test_alpha_and_sigma_are_the_published_formulas(name: str, dtype: torch.dtype) -> None:
    sde, t = SDES[name], times(name, dtype)
    assert_near(sde.alpha(t), reference(true_alpha, name, t), RTOL[dtype])
    assert_near(sde.sigma(t), reference(true_sigma, name, t), RTOL[dtype])


@all_sdes
@both_dtypes
def test_half_log_snr_is_log_alpha_over_sigma(name: str, dtype: torch.dtype) -> None:
    sde, t = SDES[name], times(name, dtype)
    assert_near(sde.half_log_snr(t), reference(true_log_ratio, name, t), RTOL[dtype], atol=RTOL[dtype])


@all_sdes
@both_dtypes
def test_half_log_snr_strictly_decreases(name: str, dtype: torch.dtype) -> None:
    sde = SDES[name]
    t = torch.linspace(sde.t_min, sde.t_max, 200, dtype=dtype)
    assert bool((sde.half_log_snr(t).diff() < 0).all())


@all_sdes
@both_dtypes
def test_time_at_inverts_half_log_snr(name: str, dtype: torch.dtype) -> None:
    """To the conditioning: lambda carries a rounding error of eps max(1, |lambda|), which is worth that / |lambda'|."""
    sde, t = SDES[name], times(name, dtype)
    lam, eps = sde.half_log_snr(t), torch.finfo(dtype).eps
    precise = t.double()
    slope = sde.diffusion(precise) ** 2 / (2 * sde.sigma(precise) ** 2)  # |lambda'|
    allowed = 4 * eps * (t + lam.abs().clamp(min=1) / slope)
    finite = lam.isfinite()
    assert bool(((sde.time_at(lam) - t).abs() <= allowed)[finite].all())
    torch.testing.assert_close(sde.time_at(lam)[~finite], t[~finite], rtol=2 * eps, atol=0)  # alpha = 0
    assert bool(slope[finite].isfinite().all())


@all_sdes
@both_dtypes
def test_data_is_at_zero_exactly(name: str, dtype: torch.dtype) -> None:
    sde, zero = SDES[name], torch.zeros((), dtype=dtype)
    assert sde.alpha(zero) == 1
    assert sde.sigma(zero) == 0
    assert sde.half_log_snr(zero) == math.inf
    assert sde.time_at(torch.full((), math.inf, dtype=dtype)) == 0


@pytest.mark.parametrize("name", REACHES_NOISE)
def test_noise_is_at_one_exactly_where_alpha_vanishes(name: str) -> None:
    sde = SDES[name]
    assert sde.alpha(sde.t_max) == 0
    assert float(sde.sigma(sde.t_max)) == pytest.approx(1, rel=3e-16)
    assert sde.half_log_snr(sde.t_max) == -math.inf
    assert float(sde.time_at(-math.inf)) == pytest.approx(sde.t_max, rel=3e-16)


# Rates


@all_sdes
@both_dtypes
def test_drift_and_diffusion_follow_from_the_scales(name: str, dtype: torch.dtype) -> None:
    """f = (log alpha)' and g^2 = -2 sigma^2 lambda', derivatives of the 50-digit references."""
    sde, t = SDES[name], times(name, dtype, inner=True)

    def true_f(name: str, t: mp.mpf) -> mp.mpf:
        return mp.diff(lambda u: mp.log(true_alpha(name, u)), t)

    def true_g(name: str, t: mp.mpf) -> mp.mpf:
        return mp.sqrt(-2 * true_sigma(name, t) ** 2 * mp.diff(lambda u: true_log_ratio(name, u), t))

    assert_near(sde.drift(t), reference(true_f, name, t), RTOL_RATES[dtype])
    assert_near(sde.diffusion(t), reference(true_g, name, t), RTOL_RATES[dtype])


@all_sdes
def test_the_two_forms_of_g_squared_agree_by_autograd(name: str) -> None:
    """(sigma^2)' - 2 f sigma^2 = -2 sigma^2 lambda' = g^2: what makes (alpha, sigma) a linear SDE."""
    sde, t = SDES[name], times(name, torch.float64, inner=True).requires_grad_()
    (variance_dot,) = torch.autograd.grad((sde.sigma(t) ** 2).sum(), t)
    (lam_dot,) = torch.autograd.grad(sde.half_log_snr(t).sum(), t)
    t = t.detach()
    g2, f, sigma2 = sde.diffusion(t) ** 2, sde.drift(t), sde.sigma(t) ** 2
    torch.testing.assert_close(-2 * sigma2 * lam_dot, g2, rtol=1e-9, atol=0)
    torch.testing.assert_close(variance_dot - 2 * f * sigma2, g2, rtol=1e-9, atol=0)


@all_sdes
@both_dtypes
def test_rates_are_the_derivatives_of_the_scales(name: str, dtype: torch.dtype) -> None:
    sde, t = SDES[name], times(name, dtype, inner=True)
    alpha_dot, sigma_dot = sde.rates(t)
    assert_near(alpha_dot, reference(lambda n, u: mp.diff(lambda w: true_alpha(n, w), u), name, t), RTOL_RATES[dtype])
    assert_near(sigma_dot, reference(lambda n, u: mp.diff(lambda w: true_sigma(n, w), u), name, t), RTOL_RATES[dtype])


@pytest.mark.parametrize("name", REACHES_NOISE)
@both_dtypes
def test_rates_are_finite_where_alpha_is_zero(name: str, dtype: torch.dtype) -> None:
    sde, end = SDES[name], SDES[name].t_max
    alpha_dot, sigma_dot = (float(rate) for rate in sde.rates(torch.tensor(end, dtype=dtype)))
    slopes = [float(mp.diff(lambda u, f=f: f(name, u), end, direction=-1)) for f in (true_alpha, true_sigma)]
    assert alpha_dot == pytest.approx(slopes[0], rel=RTOL_RATES[dtype])
    assert sigma_dot == pytest.approx(slopes[1], abs=1e-12)


def test_rates_of_the_sub_vp_are_finite_at_the_data() -> None:
    """sigma = 1 - e^{-B} has the slope beta_min at 0, unlike that of VP, which is infinite there."""
    sde = SubVPSDE(beta_min=0.3)
    alpha_dot, sigma_dot = sde.rates(0.0)
    assert float(alpha_dot) == pytest.approx(-0.15, rel=1e-12)
    assert float(sigma_dot) == pytest.approx(0.3, rel=1e-12)


# Shapes, dtypes, values


METHODS = ["alpha", "sigma", "half_log_snr", "drift", "diffusion", "time_at"]


@all_sdes
@pytest.mark.parametrize("method", METHODS)
def test_a_time_of_any_shape_is_mapped_elementwise(name: str, method: str) -> None:
    sde, function = SDES[name], getattr(SDES[name], method)
    for shape in ((), (1,), (6,), (2, 3), (3, 1, 2), (0,)):
        t = torch.linspace(0.2, 0.8, math.prod(shape), dtype=torch.float64).reshape(shape) * sde.t_max
        t = sde.half_log_snr(t) if method == "time_at" else t
        result = function(t)
        assert result.shape == shape
        assert result.flatten().tolist() == pytest.approx([float(function(u)) for u in t.flatten().tolist()], rel=1e-13)


@all_sdes
@pytest.mark.parametrize("method", METHODS)
def test_a_time_that_is_not_contiguous_is_as_good(name: str, method: str) -> None:
    sde = SDES[name]
    t = torch.linspace(0.2, 0.8, 6, dtype=torch.float64).reshape(2, 3).mT * sde.t_max
    t = sde.half_log_snr(t).contiguous().mT.contiguous().mT if method == "time_at" else t
    torch.testing.assert_close(getattr(sde, method)(t), getattr(sde, method)(t.contiguous()), rtol=1e-14, atol=0)


@all_sdes
@pytest.mark.parametrize("method", METHODS)
def test_the_dtype_of_the_time_is_kept_and_never_below_float32(name: str, method: str) -> None:
    function = getattr(SDES[name], method)
    expected = {
        torch.float64: torch.float64,
        torch.float32: torch.float32,
        torch.bfloat16: torch.float32,
        torch.float16: torch.float32,
        torch.int64: torch.float64,
    }
    for given, result in expected.items():
        assert function(torch.ones((2,), dtype=given)).dtype == result
    assert function(0.5).dtype == torch.float64
    assert function(1).dtype == torch.float64


@all_sdes
def test_a_half_precision_time_is_computed_as_float32(name: str) -> None:
    sde, t = SDES[name], torch.tensor([0.25, 0.75], dtype=torch.bfloat16)
    assert torch.equal(sde.sigma(t), sde.sigma(t.float()))


@all_sdes
@pytest.mark.parametrize("method", ["alpha", "sigma"])
def test_the_callers_time_is_not_an_alias_of_the_result(name: str, method: str) -> None:
    """sigma = t on EDM: were it t itself, an in-place operation on sigma would move the clock."""
    t = torch.tensor([0.25, 0.5])
    getattr(SDES[name], method)(t).mul_(2)
    assert t.tolist() == [0.25, 0.5]


@pytest.mark.parametrize("name", sorted(set(SDES) - {"vp-other", "vp-constant", "chain-short"}))
def test_prior_is_the_law_of_the_end_for_data_at_the_origin(name: str) -> None:
    """N(0, sigma_T^2); the exceptions stop before their data has become noise."""
    sde = SDES[name]
    assert sde.prior_std == pytest.approx(float(sde.sigma(sde.t_max)), rel=1e-4)


# The discrete chain


def test_default_chain_is_ddpm_linear_schedule() -> None:
    assert DDPMChain().betas.tolist() == pytest.approx(np.linspace(1e-4, 0.02, 1000), rel=1e-14)
    assert DDPMChain() == DDPMChain.linear(1000, 1e-4, 0.02)


@pytest.mark.parametrize("name", CHAINS)
def test_chain_at_its_nodes_is_the_cumulative_product(name: str) -> None:
    sde = SDES[name]
    assert isinstance(sde, DDPMChain)
    nodes = torch.arange(1, sde.steps + 1)
    torch.testing.assert_close(sde.alpha(nodes) ** 2, (1 - sde.betas).cumprod(0), rtol=1e-11, atol=0)


@pytest.mark.parametrize("name", CHAINS)
@both_dtypes
def test_chain_is_continuous_across_its_nodes(name: str, dtype: torch.dtype) -> None:
    """A step of one rounding of t, to the left and to the right, moves lambda by no more than its slope says."""
    sde = SDES[name]
    n = torch.arange(1, int(sde.t_max), dtype=dtype)
    below, above = (torch.nextafter(n, torch.full_like(n, end)) for end in (-math.inf, math.inf))
    eps = torch.finfo(dtype).eps
    lam = sde.half_log_snr(n)
    steepest = torch.stack([sde.diffusion(u) ** 2 / (2 * sde.sigma(u) ** 2) for u in (below, n, above)]).amax(0)
    allowed = eps * (8 * lam.abs().clamp(min=1) + 2 * n * steepest)
    for near in (below, above):
        assert bool(((sde.half_log_snr(near) - lam).abs() <= allowed).all())


@pytest.mark.parametrize("name", CHAINS)
def test_chain_between_nodes_has_the_transition_of_the_chain(name: str) -> None:
    """alpha_n / alpha_{n-1} = sqrt(1 - beta_n) with half of it, in log, at the middle."""
    sde = SDES[name]
    assert isinstance(sde, DDPMChain)
    n = torch.arange(1, sde.steps + 1).double()
    torch.testing.assert_close(sde.alpha(n) / sde.alpha(n - 1), (1 - sde.betas).sqrt(), rtol=1e-12, atol=0)
    n = n[sde.alpha(n) > 0]
    torch.testing.assert_close(sde.alpha(n - 0.5) ** 2, sde.alpha(n) * sde.alpha(n - 1), rtol=1e-12, atol=0)


def test_cosine_chain_is_the_cosine_sde_at_its_nodes() -> None:
    """Until the first beta is clipped at 0.999, which is the last one only."""
    chain, sde = DDPMChain.cosine(1000), CosineVPSDE(t_max=1.0)
    n = torch.arange(1, 1000).double()
    # 1 - abar_n / abar_{n-1}, as published, loses the digits of 1 / beta_1 = 2e4.
    torch.testing.assert_close(chain.alpha(n), sde.alpha(n / 1000), rtol=1e-10, atol=0)
    torch.testing.assert_close(chain.sigma(n), sde.sigma(n / 1000), rtol=1e-10, atol=0)
    assert float(chain.betas[-1]) == 0.999


def test_linear_chain_tends_to_the_vp_sde_at_first_order() -> None:
    """score_sde's discretisation, beta_i from 0.1/N to 20/N: the error of log alpha halves as N doubles."""
    sde = VPSDE()

    def error(N: int) -> float:
        n = torch.arange(1, N + 1)
        chain = DDPMChain.linear(N, 0.1 / N, 20 / N)
        return float((chain.alpha(n).log() - sde.alpha(n.double() / N).log()).abs().max())

    assert error(1000) < 0.2  # of log alpha = -5: beta^2 summed is 0.13 / 2, and half a step of beta another 0.01
    for N in (500, 1000, 2000):
        assert error(N) / error(2 * N) == pytest.approx(2, abs=0.1)


def test_chain_keeps_its_own_betas() -> None:
    betas = torch.full((4,), 0.1, dtype=torch.float64)
    chain = DDPMChain(betas)
    before = chain.alpha(4.0)
    betas.fill_(0.9)
    assert chain.alpha(4.0) == before


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor])
def test_betas_of_any_kind(make: Callable[..., object]) -> None:
    assert DDPMChain(make([0.25, 0.5])).betas.tolist() == [0.25, 0.5]  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [list, tuple, np.array])
def test_betas_are_not_rounded_to_float32(make: Callable[..., object]) -> None:
    """0.1 has no exact float32; a tensor of that dtype is another matter."""
    assert DDPMChain(make([0.1, 0.3])).betas.tolist() == [0.1, 0.3]  # type: ignore[arg-type]


# perturb


@every_pair(name=list(SDES), event=[(), (3,), (2, 4), (1, 2, 2)], per_sample=[False, True])
def test_perturb_is_alpha_x0_plus_sigma_noise(name: str, event: tuple[int, ...], per_sample: bool) -> None:
    """Its moments over noise of mean 0 and variance 1 are alpha x0 and sigma, sample by sample."""
    sde = SDES[name]
    x0 = torch.randn(3, *event, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64) * sde.t_max if per_sample else 0.5 * sde.t_max
    up, down = (sde.perturb(x0, t, sign * torch.ones_like(x0)) for sign in (1, -1))
    for i in range(3):
        t_i = t[i] if isinstance(t, Tensor) else t
        torch.testing.assert_close(((up + down) / 2)[i], sde.alpha(t_i) * x0[i], rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(((up - down) / 2)[i], sde.sigma(t_i).expand(event), rtol=1e-12, atol=1e-13)


@all_sdes
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_perturb_keeps_the_dtype_of_the_data_whatever_that_of_the_time(name: str, dtype: torch.dtype) -> None:
    x0 = torch.ones(2, 3, dtype=dtype)
    for t in (0.5, 1, torch.tensor(0.5), torch.tensor([0.5, 1.0], dtype=torch.float64)):
        assert SDES[name].perturb(x0, t, x0).dtype == dtype


@pytest.mark.parametrize(
    ("x0", "t", "noise", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.uint8), 0.5, torch.zeros(2, 3), "floating-point"),
        (torch.zeros(2, 3, dtype=torch.int64), 0.5, torch.zeros(2, 3), "floating-point"),
        (torch.zeros(2, 3), 0.5, torch.zeros(3), "equal"),
        (torch.zeros(2, 3), 0.5, torch.zeros(2, 1), "equal"),
        (torch.zeros(2, 3), torch.full((3,), 0.5), torch.zeros(2, 3), "one per sample"),
        (torch.zeros(2, 3), torch.full((2, 1), 0.5), torch.zeros(2, 3), "one per sample"),
        (torch.zeros(()), torch.full((1,), 0.5), torch.zeros(()), "floating-point"),
    ],
)
def test_perturb_refuses(x0: Tensor, t: float | Tensor, noise: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VPSDE().perturb(x0, t, noise)


@pytest.mark.parametrize("shape", [(4,), (4, 2), (4, 1, 3, 2)])
def test_expand_like_scales_sample_by_sample(shape: tuple[int, ...]) -> None:
    x, c = torch.ones(shape), torch.arange(4, dtype=torch.float64)
    scaled = expand_like(c, x) * x
    assert scaled.dtype == x.dtype
    assert all(bool((scaled[i] == i).all()) for i in range(4))


# Prior


@all_sdes
def test_prior_has_the_stated_width(name: str) -> None:
    """n = 40,000: |mean| < 5.5 std / sqrt(n) and |var / std^2 - 1| < 5.5 sqrt(2 / n), each missed with p < 4e-8."""
    sde, n = SDES[name], 40_000
    x = sde.prior((n // 4, 2, 2), torch.Generator().manual_seed(1), dtype=torch.float64) / sde.prior_std
    assert abs(float(x.mean())) < 5.5 / math.sqrt(n)
    assert abs(float(x.square().mean()) - 1) < 5.5 * math.sqrt(2 / n)


@pytest.mark.parametrize("name", EXPLODES)
def test_width_of_the_prior_follows_the_start_where_noise_explodes(name: str) -> None:
    sde, t = SDES[name], 0.3 * SDES[name].t_max
    at_t, at_end = (
        sde.prior((5, 2), torch.Generator().manual_seed(3), dtype=torch.float64, t=u) for u in (t, sde.t_max)
    )
    torch.testing.assert_close(at_t / sde.sigma(t), at_end / sde.sigma(sde.t_max), rtol=1e-13, atol=0)
    assert torch.equal(at_end, sde.prior((5, 2), torch.Generator().manual_seed(3), dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_prior_is_its_generators_and_nothing_elses(dtype: torch.dtype) -> None:
    first, again = (VESDE().prior((3, 2), torch.Generator().manual_seed(7), dtype=dtype) for _ in range(2))
    assert torch.equal(first, again)
    assert first.dtype == dtype


def test_prior_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    first, second = VPSDE().prior((8,)), VPSDE().prior((8,))
    VPSDE().prior((8,), torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first, second)  # freshly seeded each time


@all_sdes
@pytest.mark.parametrize("event", [(), (5,), (1, 2, 3)])
def test_prior_log_prob_is_that_of_torch(name: str, event: tuple[int, ...]) -> None:
    sde = SDES[name]
    x = sde.prior((4, *event), torch.Generator().manual_seed(0), dtype=torch.float64)
    normal = torch.distributions.Normal(0.0, torch.tensor(sde.prior_std, dtype=torch.float64))
    expected = normal.log_prob(x).reshape(4, -1).sum(1)
    torch.testing.assert_close(sde.prior_log_prob(x), expected, rtol=1e-13, atol=0)


# Identity and errors


def test_sdes_are_equal_by_value() -> None:
    distinct = [*SDES.values(), DDPMChain.linear(100), DDPMChain([0.1, 0.2]), DDPMChain([0.2, 0.1])]
    for sde in (kind() for kind in CONTINUOUS):
        distinct += [replace(sde, **{field.name: 0.9 * getattr(sde, field.name)}) for field in fields(sde)]
    for i, a in enumerate(distinct):
        for j, b in enumerate(distinct):
            assert (a == b) == (i == j)
    assert len(set(distinct)) == len(distinct)
    assert VPSDE() == VPSDE()
    assert hash(VPSDE()) == hash(VPSDE())
    assert hash(DDPMChain([0.1, 0.2])) == hash(DDPMChain([0.1, 0.2]))
    assert len({repr(sde) for sde in distinct}) == len(distinct)  # the repr tells them apart too


SCHEDULES = (DDPMChain.linear, DDPMChain.cosine)
OF_ALPHAS = (lambda a: a, lambda a: a.cumprod(0), lambda a: a.cumprod(0).sqrt())  # what else the field keeps in arrays

INVALID: list[tuple[Callable[[], SDE], str]] = [
    *((lambda c=c: c(beta_min=0.0), "beta_min") for c in (VPSDE, SubVPSDE)),
    *((lambda c=c: c(beta_min=-1.0), "beta_min") for c in (VPSDE, SubVPSDE)),
    *((lambda c=c: c(beta_min=3.0, beta_max=2.0), "beta_max") for c in (VPSDE, SubVPSDE)),
    *((lambda c=c: c(t_min=0.0), "t_min") for c in CONTINUOUS),
    *((lambda c=c: c(t_min=-1e-3), "t_min") for c in CONTINUOUS),
    *((lambda c=c: c(t_min=0.5, t_max=0.5), "t_min < t_max") for c in CONTINUOUS),
    *(
        (lambda c=c, name=field.name, value=value: c(**{name: value}), field.name)
        for c in CONTINUOUS
        for field in fields(c)
        for value in (math.inf, math.nan)
    ),
    *((lambda c=c: c(t_max=1.01), "t_max <= 1") for c in (CosineVPSDE, FlowSDE)),
    (lambda: CosineVPSDE(s=0.0), "s=0.0"),
    (lambda: CosineVPSDE(s=-0.1), "s=-0.1"),
    (lambda: VESDE(sigma_min=0.0), "sigma_min"),
    (lambda: VESDE(sigma_min=2.0, sigma_max=1.0), "sigma_min < sigma_max"),
    (lambda: VESDE(sigma_min=1.0, sigma_max=1.0), "sigma_min < sigma_max"),
    (lambda: DDPMChain([]), "one dimension"),
    (lambda: DDPMChain(torch.tensor(0.1)), "one dimension"),
    (lambda: DDPMChain(torch.full((2, 2), 0.1)), "one dimension"),
    (lambda: DDPMChain([0.1, 0.0]), "beta_2 = 0.0"),
    (lambda: DDPMChain([0.1, 1.0, 0.2]), "beta_2 = 1.0"),
    (lambda: DDPMChain([0.1, 0.2, 1.1]), "beta_3 = 1.1"),
    *(
        (lambda c=c, f=f: DDPMChain(f(1 - c().betas)), "betas fall from 0.99.*: give 1 - alphas")
        for c in SCHEDULES
        for f in OF_ALPHAS
    ),
    *((lambda c=c: DDPMChain(1 - (1 - c().betas).cumprod(0)), "as 1 minus the products") for c in SCHEDULES),
    (lambda: DDPMChain([-0.1]), "beta_1 = -0.1"),
    (lambda: DDPMChain([0.1, math.nan]), "beta_2 = nan"),
    (lambda: DDPMChain.linear(0), "steps"),
    (lambda: DDPMChain.linear(10, beta_min=0.0), "beta_min"),
    (lambda: DDPMChain.linear(4, beta_max=1.2), "beta_4"),
    (lambda: DDPMChain.cosine(0), "steps"),
    (lambda: DDPMChain.cosine(10, s=0.0), "s=0.0"),
]


@pytest.mark.parametrize(("make", "message"), INVALID, ids=[str(i) for i in range(len(INVALID))])
def test_constructors_refuse_and_name_the_argument(make: Callable[[], SDE], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("kind", CONTINUOUS)
@pytest.mark.parametrize("t_max", [1.0, 1.01, 3.0])
def test_a_t_max_is_refused_or_reached(kind: type[SDE], t_max: float) -> None:
    """Up to t_max the scales are what they say: lambda falls, alpha is positive before it, its rates are finite."""
    try:
        sde = kind(t_max=t_max)  # type: ignore[call-arg]
    except ValueError as error:
        assert "t_max" in str(error)  # noqa: PT017
        return
    t = torch.linspace(sde.t_min, t_max, 200, dtype=torch.float64)
    assert bool((sde.half_log_snr(t).diff() < 0).all())
    assert bool((sde.alpha(t)[:-1] > 0).all())
    assert all(bool(rate.isfinite().all()) for rate in sde.rates(t))


def test_sdes_are_immutable() -> None:
    """A grid, a table or a checkpoint carries its SDE, which therefore must not change under it."""
    for name, sde in SDES.items():
        if name not in CHAINS:
            with pytest.raises(AttributeError):
                sde.t_max = 0.5


class Own(SDE):
    """VP's scales and nothing else: what a user writes."""

    def __init__(self, t_min: float = 1e-5, t_max: float = 1.0) -> None:
        self.t_min, self.t_max = t_min, t_max

    def alpha(self, t):
        return VPSDE().alpha(t)

    def sigma(self, t):
        return VPSDE().sigma(t)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_an_sde_is_its_pair_of_scales(shape) -> None:
    """alpha and sigma alone give everything else, equal to the closed forms."""
    own, vp = Own(), VPSDE()
    t = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.98 + 0.01
    for name in ("half_log_snr", "drift", "diffusion", "rates"):
        torch.testing.assert_close(getattr(own, name)(t), getattr(vp, name)(t), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(own.time_at(vp.half_log_snr(t)), t, rtol=1e-9, atol=1e-12)
    assert float(own.time_at(float("inf"))) == 0


def test_own_sdes_compare_by_their_parameters() -> None:
    assert Own() == Own() != Own(t_max=0.9)
    assert hash(Own()) == hash(Own())
    assert repr(Own()) == "Own(t_min=1e-05, t_max=1.0)"
    assert Own() != VPSDE()


class Tabulated(Own):
    """With what cannot be compared by one ==: tensors, arrays and lists of them."""

    def __init__(self, last: float = 2.0) -> None:
        super().__init__()
        self.table, self.array = torch.tensor([1.0, last]), np.array([[1.0, last]])
        self.parts = {"a": [torch.tensor([1.0, last])], "b": (1, "x")}


@dataclass(frozen=True)
class Declared(Own):
    table: Tensor
    t_min: float = 1e-5
    t_max: float = 1.0


def test_sdes_with_tensors_compare_by_their_numbers() -> None:
    """Of whatever length; a grid of one compares it at every run."""
    tables = [torch.tensor(values) for values in ([1.0, 2.0], [1.0, 3.0], [1.0], [1, 2])]
    distinct = [Tabulated(), Tabulated(3.0), *(Declared(table) for table in tables)]
    for i, a in enumerate(distinct):
        for j, b in enumerate(distinct):
            b = copy.deepcopy(b)
            assert (a == b) == (i == j)
            assert i != j or hash(a) == hash(b)
    Grid.uniform(Tabulated(), 3).check_sde(Tabulated())
    with pytest.raises(ValueError, match="was made for"):
        Grid.uniform(Declared(tables[0]), 3).check_sde(Declared(tables[1]))


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_a_chain_says_how_many_steps_it_has(end) -> None:
    chain = DDPMChain.linear(10, 0.01, 0.3)
    most = 10 if end == 0 else 9
    assert Grid.power(chain, most, end=end).steps == most
    with pytest.raises(ValueError, match="the chain has 10 nodes, not 11: at most 10 steps to t = 0, 9 to a noisy end"):
        Grid.power(chain, most + 1, end=end)
