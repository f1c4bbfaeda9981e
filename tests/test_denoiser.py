"""Denoisers: one model in every parameterisation, time labels, precision, wrappers, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from common import SDES, Nonlinear, network_for, normal, start_of

from scoresde import (
    EDMSDE,
    VESDE,
    VPSDE,
    Clip,
    CosineVPSDE,
    DDPMChain,
    DynamicThreshold,
    EDMDenoiser,
    EpsDenoiser,
    FlowSDE,
    Posterior,
    ScoreDenoiser,
    VDenoiser,
    VelocityDenoiser,
    X0Denoiser,
)
from scoresde.exact import GaussianMixture

ADAPTERS = {
    "x0": X0Denoiser,
    "eps": EpsDenoiser,
    "score": ScoreDenoiser,
    "v": VDenoiser,
    "velocity": VelocityDenoiser,
}


def edm_network(denoiser, sigma_data):
    """F of EDM's table 1 for a given D, transcribed: F = (D - c_skip y) / c_out, from c_in y and log(s) / 4."""
    sde = denoiser.sde

    def net(scaled, label):
        s = (4 * label).exp()[:, None]
        y = scaled * (s**2 + sigma_data**2).sqrt()
        t = sde.time_at(-s[:, 0].log())
        alpha = sde.alpha(t)[:, None]
        c_skip = sigma_data**2 / (s**2 + sigma_data**2)
        c_out = s * sigma_data / (s**2 + sigma_data**2).sqrt()
        return (denoiser(alpha * y, t).mean - c_skip * y) / c_out

    return net


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
@pytest.mark.parametrize("predicted", ADAPTERS)
def test_adapters_invert_views(predicted, sde):
    """A network that predicts a view of D is D again, and has the same views, at any t of shape () or (B,)."""
    reference, x = Nonlinear(sde), normal(3, 2, 2)
    adapted = ADAPTERS[predicted](network_for(reference, predicted), sde)
    for t in (torch.tensor([0.01, 0.5, 0.9]) * start_of(sde), 0.3 * start_of(sde)):
        torch.testing.assert_close(adapted(x, t).mean, reference(x, t).mean, rtol=1e-7, atol=1e-7)
        for view in ADAPTERS:
            torch.testing.assert_close(adapted.view(view, x, t), reference.view(view, x, t), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("sde", [VPSDE(), EDMSDE(), FlowSDE(t_max=0.99)], ids=repr)
def test_edm_preconditioning_is_table_1(sde):
    reference, x = Nonlinear(sde), normal(3, 4)
    adapted = EDMDenoiser(edm_network(reference, 0.7), sde, sigma_data=0.7)
    for u in (0.01, 0.4, 0.95):
        t = torch.full((3,), u * sde.t_max, dtype=torch.float64)
        torch.testing.assert_close(adapted(x, t).mean, reference(x, t).mean, rtol=1e-8, atol=1e-8)


def test_edm_preconditioning_gives_the_network_unit_variance():
    """Karras et al., appendix B.6: input and target of F have unit variance at every noise level (20,000 draws)."""
    sde, n = EDMSDE(), 20_000
    seen = []
    denoiser = EDMDenoiser(lambda x, _: seen.append(x) or x, sde, sigma_data=0.5)
    x0, eps = 0.5 * normal(n, 1), normal(n, 1, seed=1)
    for t in (0.002, 0.3, 5.0, 80.0):
        denoiser(sde.perturb(x0, t, eps), t)
        r, s = denoiser.affine(t)
        target = (x0 - r * sde.perturb(x0, t, eps)) / s
        # The variance of n normal numbers has standard error sqrt(2 / n) = 0.01.
        assert float(seen[-1].var()) == pytest.approx(1, abs=6 * math.sqrt(2 / n))
        assert float(target.var()) == pytest.approx(1, abs=6 * math.sqrt(2 / n))


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
def test_views_are_what_they_are_called(sde):
    """eps and x_0 add up to x; score = -eps / sigma; velocity = f x - g^2 score / 2; v = alpha eps - sigma x_0."""
    denoiser, x = Nonlinear(sde), normal(2, 3)
    for u in (0.001, 0.4, 0.97):
        t = torch.tensor(u * start_of(sde), dtype=torch.float64)
        alpha, sigma, D = sde.alpha(t), sde.sigma(t), denoiser(x, t).mean
        eps, score = denoiser.eps(x, t), denoiser.score(x, t)
        torch.testing.assert_close(alpha * D + sigma * eps, x)
        torch.testing.assert_close(score, -eps / sigma)
        torch.testing.assert_close(denoiser.v(x, t), alpha * eps - sigma * D)
        flow = sde.drift(t) * x - 0.5 * sde.diffusion(t) ** 2 * score
        torch.testing.assert_close(denoiser.velocity(x, t), flow, rtol=1e-6, atol=1e-6)


def test_an_eps_view_of_an_eps_network_is_the_network():
    """No digit is lost on the way to x_0 and back, in float32 at t = 1e-5."""
    net = torch.sin
    denoiser = EpsDenoiser(lambda x, t: net(x), VPSDE())
    x = normal(4, 3, dtype=torch.float32)
    torch.testing.assert_close(denoiser.eps(x, 1e-5), net(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("view", ["velocity", "x0", "v"])
def test_alpha_zero_is_no_obstacle_where_the_model_is_defined(view):
    target = GaussianMixture(means=[[1.0], [3.0]], std=0.1)
    for sde in (FlowSDE(), CosineVPSDE(t_max=1.0)):
        exact = target.denoiser(sde)
        adapted = ADAPTERS[view](network_for(exact, view), sde)
        torch.testing.assert_close(adapted(normal(4, 1), 1.0).mean, torch.full((4, 1), 2.0).double())


# Labels and precision.


def test_time_labels():
    """The network is told exactly time(t), one label per sample, whatever the form of t."""
    seen = []

    def net(x, time):
        seen.append(time)
        return x

    x = normal(3, 2, dtype=torch.float32)
    sde = DDPMChain()
    EpsDenoiser(net, sde)(x, 7.0)
    EpsDenoiser(net, sde, time=lambda t: t.long() - 1)(x, 7.0)
    EpsDenoiser(net, sde, time=sde.half_log_snr)(x, torch.tensor([1.0, 500.0, 1000.0]))
    EpsDenoiser(net, sde, time=lambda t: torch.stack([t, 2 * t], 1))(x, 3.0)
    EDMDenoiser(net, EDMSDE())(x, 2.0)
    assert torch.equal(seen[0], torch.full((3,), 7.0))
    assert torch.equal(seen[1], torch.full((3,), 6))
    torch.testing.assert_close(seen[2], sde.half_log_snr(torch.tensor([1.0, 500.0, 1000.0])))
    assert torch.equal(seen[3], torch.tensor([[3.0, 6.0]] * 3))
    torch.testing.assert_close(seen[4], torch.full((3,), math.log(2.0) / 4))


class Typed(torch.nn.Module):
    """A network of one parameter that records what it is called with."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, time):
        assert x.dtype == self.scale.dtype, "the network runs in its own dtype"
        self.time = time
        return self.scale * x


@pytest.mark.parametrize("net_dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_network_runs_in_its_own_dtype_and_time_is_not_rounded(net_dtype, x_dtype):
    net = Typed()
    denoiser = EpsDenoiser(net, VPSDE(), time=lambda t: 999 * t)
    net.to(net_dtype)  # after the adapter was made
    x = normal(2, 3).to(x_dtype)
    out = denoiser(x, 0.123456789)
    assert out.mean.dtype == x_dtype
    assert net.time.dtype == (torch.float64 if net_dtype == torch.float64 else torch.float32)
    assert float(net.time[0]) == pytest.approx(999 * 0.123456789, rel=1e-7)
    eps = x.to(net_dtype).double()
    exact = (x.double() - VPSDE().sigma(0.123456789) * eps) / VPSDE().alpha(0.123456789)
    rounding = {torch.bfloat16: 8e-3, torch.float32: 1e-6, torch.float64: 1e-12}[x_dtype]
    torch.testing.assert_close(out.mean.double(), exact, rtol=rounding, atol=rounding)


def test_conditions_reach_the_network():
    denoiser = EpsDenoiser(lambda x, t, label, scale=1: x * 0 + label[:, None] * scale, VPSDE())
    label = torch.tensor([1.0, 2.0])
    torch.testing.assert_close(denoiser.eps(torch.zeros(2, 3), 0.5, label=label, scale=3)[:, 0], 3 * label)


def test_with_net_keeps_the_rest():
    first = EDMDenoiser(lambda x, t: x, VESDE(), sigma_data=0.7, time=lambda t: 2 * t)
    second = first.with_net(lambda x, t: x)
    x = normal(2, 3)
    torch.testing.assert_close(first(x, 0.3).mean, second(x, 0.3).mean)
    assert second.sigma_data == 0.7
    assert second.time is first.time


# Wrappers.


def test_clip():
    x = 5 * normal(4, 3)
    inner = X0Denoiser(lambda x, t: x, VPSDE())
    clipped = Clip(inner, -1.0, 0.5)
    torch.testing.assert_close(clipped(x, 0.5).mean, x.clamp(-1, 0.5))
    # The noise that goes with the clipped mean, not the network's own.
    sde = VPSDE()
    torch.testing.assert_close(clipped.eps(x, 0.5), (x - sde.alpha(0.5) * x.clamp(-1, 0.5)) / sde.sigma(0.5))
    wide = Clip(inner, -100, 100)
    assert torch.equal(wide(x, 0.5).mean, inner(x, 0.5).mean)


def test_dynamic_threshold_is_per_sample():
    x = torch.stack([torch.linspace(-0.9, 0.9, 101), torch.linspace(-4, 4, 101)]).double()
    threshold = DynamicThreshold(X0Denoiser(lambda x, t: x, VPSDE()), quantile=0.9)
    mean = threshold(x, 0.5).mean
    assert torch.equal(mean[0], x[0])  # within bounds: left alone
    s = x[1].abs().sort().values[round(0.9 * 101) - 1]
    torch.testing.assert_close(mean[1], x[1].clamp(-s, s) / s)
    assert float(mean.abs().max()) <= 1
    alone = threshold(x[1:], 0.5).mean
    assert torch.equal(alone[0], mean[1])


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101, 192])
@pytest.mark.parametrize("quantile", [0.01, 0.5, 0.9, 0.995, 1.0])
def test_the_interpolated_quantile_is_that_of_torch(count, quantile):
    """As diffusers has it: torch.quantile of |D|, clamped to [1, cap]."""
    x = 3 * normal(5, count, 1)
    s = torch.quantile(x.abs().flatten(1), quantile, dim=1)
    for cap in (math.inf, 1.5, 1.0):
        threshold = DynamicThreshold(X0Denoiser(lambda x, t: x, VPSDE()), quantile, cap=cap, interpolate=True)
        bound = s.clamp(1, cap)[:, None, None]
        torch.testing.assert_close(threshold(x, 0.5).mean, x.clamp(-bound, bound) / bound, rtol=1e-14, atol=1e-14)


def test_a_cap_at_the_bound_is_a_clip():
    """The default of diffusers, sample_max_value=1: a threshold that never moves."""
    inner, x = X0Denoiser(lambda x, t: x, VPSDE()), 5 * normal(4, 30)
    assert torch.equal(DynamicThreshold(inner, cap=1.0)(x, 0.5).mean, Clip(inner)(x, 0.5).mean)
    loose = DynamicThreshold(inner, 0.9, cap=2.0)(x, 0.5).mean
    s = x.abs().sort(1).values[:, 26].clamp(1, 2)
    torch.testing.assert_close(loose, x.clamp(-s[:, None], s[:, None]) / s[:, None])
    assert torch.equal(DynamicThreshold(inner, 0.9, cap=99.0)(x, 0.5).mean, DynamicThreshold(inner, 0.9)(x, 0.5).mean)


def test_wrappers_keep_the_variance_and_nest():
    exact = GaussianMixture(means=[[1.0], [3.0]], std=0.1).denoiser(VPSDE())
    x = normal(4, 1)
    nested = DynamicThreshold(Clip(exact, 0, 2), quantile=1.0, bound=2.0)
    posterior = nested(x, 0.7)
    assert isinstance(posterior, Posterior)
    assert torch.equal(posterior.var, exact(x, 0.7).var)
    torch.testing.assert_close(posterior.mean, exact(x, 0.7).mean.clamp(0, 2))


# What they refuse.


@pytest.mark.parametrize("view", ["eps", "score", "v", "velocity"])
def test_no_view_but_x0_at_sigma_zero(view):
    with pytest.raises(ValueError, match=f"{view} at t = 0"):
        Nonlinear(VPSDE()).view(view, normal(2, 3), 0.0)


@pytest.mark.parametrize("adapter", [EpsDenoiser, ScoreDenoiser])
@pytest.mark.parametrize("sde", [FlowSDE(), CosineVPSDE(t_max=1.0)], ids=repr)
def test_no_eps_network_at_alpha_zero(adapter, sde):
    calls = []
    denoiser = adapter(lambda x, t: calls.append(x) or x, sde)
    with pytest.raises(ValueError, match="says nothing of x0 at t = 1"):
        denoiser(normal(2, 3), torch.tensor([0.5, 1.0]))
    assert not [x for x in calls if x is None]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: d(torch.zeros(2, 3, dtype=torch.uint8), 0.5), "uint8"),
        (lambda d: d(0.5, torch.zeros(2, 3)), "x is float"),
        (lambda d: d(torch.zeros(()), 0.5), "expected a floating-point tensor"),
        (lambda d: d(torch.zeros(2, 3), torch.tensor([0.1, 0.2, 0.3])), "t has shape"),
        (lambda d: d(torch.zeros(2, 3), torch.zeros(2, 1)), "t has shape"),
        (lambda d: d(torch.zeros(2, 3), 1.5), "leaves"),
        (lambda d: d(torch.zeros(2, 3), -0.1), "leaves"),
        (lambda d: d(torch.zeros(2, 3), math.nan), "leaves"),
        (lambda d: d.view("noise", torch.zeros(2, 3), 0.5), "expected one of 'x0'"),
    ],
)
def test_bad_calls_are_refused_before_the_network(call, message):
    calls = []
    with pytest.raises(ValueError, match=message):
        call(EpsDenoiser(lambda x, t: calls.append(x) or x, VPSDE()))
    assert not calls


@pytest.mark.parametrize("out", [torch.zeros(2, 6), torch.zeros(2), {"sample": torch.zeros(2, 3)}], ids=str)
def test_a_network_of_another_shape_is_named(out):
    with pytest.raises(ValueError, match="the network returned"):
        EpsDenoiser(lambda x, t: out, VPSDE())(torch.zeros(2, 3), 0.5)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: EpsDenoiser(VPSDE(), lambda x, t: x), TypeError),
        (lambda: EpsDenoiser(3, VPSDE()), TypeError),
        (lambda: EDMDenoiser(torch.sin, VPSDE(), sigma_data=0.0), ValueError),
        (lambda: Clip(torch.sin), TypeError),
        (lambda: Clip(Nonlinear(VPSDE()), 1, -1), ValueError),
        (lambda: DynamicThreshold(Nonlinear(VPSDE()), quantile=1.5), ValueError),
        (lambda: DynamicThreshold(Nonlinear(VPSDE()), bound=0.0), ValueError),
        (lambda: DynamicThreshold(Nonlinear(VPSDE()), bound=2.0, cap=1.0), ValueError),
        (lambda: DynamicThreshold(Nonlinear(VPSDE()), cap=float("nan")), ValueError),
    ],
)
def test_bad_construction_is_refused(make, error):
    with pytest.raises(error):
        make()


def test_at_the_data_the_mean_is_x():
    """At t = 0 x_0 is x, whatever a network makes of sigma = 0 (EDM's label is log 0 there)."""
    x = normal(3, 2)
    mixture = GaussianMixture(means=[[1.0, 0.0], [3.0, 1.0]], std=0.1)
    for sde in SDES.values():
        for denoiser in (
            EDMDenoiser(lambda x, t: x + t[:, None], sde),
            VelocityDenoiser(lambda x, t: x, sde),
            mixture.denoiser(sde),
        ):
            assert torch.equal(denoiser(x, 0.0).mean, x)
            some = denoiser(x, torch.tensor([0.0, 0.5, 0.0]) * start_of(sde)).mean
            assert torch.equal(some[::2], x[::2])
    assert float(mixture.denoiser(VPSDE())(x, 0.0).var.abs().max()) == 0


def test_a_network_that_changes_its_input_is_named():
    """It would change the solver's state, and the caller's x_T."""
    with pytest.raises(ValueError, match="changed its input in place"):
        X0Denoiser(lambda x, t: x.mul_(0.5), VPSDE())(normal(2, 3), 0.5)


def test_derivatives_in_x_and_t():
    """Forward and reverse mode, and vmap, go through adapters, exact models and time labels, for one t and for many."""
    net = torch.nn.Linear(3, 3).double().requires_grad_(False)
    sde = VPSDE()
    models = [
        EpsDenoiser(lambda x, time: net(x) * (time / 999)[:, None].sin(), sde, time=lambda t: 999 * t),
        GaussianMixture(means=[[1.0, 0.0, 2.0], [3.0, 1.0, 0.0]], std=0.3).denoiser(sde),
    ]
    x, t, h = normal(2, 3), torch.tensor(0.4).double(), 1e-6
    for model in models:
        slope = (model.velocity(x, t + h) - model.velocity(x, t - h)) / (2 * h)
        for at, direction in ((t, torch.ones(()).double()), (t.repeat(2), torch.ones(2).double())):
            tangent = torch.func.jvp(lambda at, model=model: model.velocity(x, at), (at,), (direction,))[1]
            torch.testing.assert_close(tangent, slope, rtol=1e-5, atol=1e-6)
        many = torch.func.vmap(lambda at, model=model: model.velocity(x, at))(torch.stack([t, t / 2]))
        torch.testing.assert_close(many[1], model.velocity(x, t / 2))
        reverse = torch.func.vmap(torch.func.jacrev(lambda y, model=model: model.velocity(y[None], t)[0]))(x)
        forward = torch.func.vmap(torch.func.jacfwd(lambda y, model=model: model.velocity(y[None], t)[0]))(x)
        torch.testing.assert_close(forward, reverse)
        column = (model.velocity(x + h * torch.eye(3)[0], t) - model.velocity(x - h * torch.eye(3)[0], t)) / (2 * h)
        torch.testing.assert_close(reverse[..., 0], column, rtol=1e-5, atol=1e-6)


def test_conditions_may_have_any_name():
    """Only x and t are the denoiser's own."""
    seen = {}
    denoiser = EpsDenoiser(lambda x, time, **cond: seen.update(cond) or x, VPSDE())
    denoiser.score(normal(2, 3), 0.5, name=1, p=2, denoiser=3)
    assert seen == {"name": 1, "p": 2, "denoiser": 3}


def test_scalar_events():
    """Event shape (): a batch of numbers."""
    x = normal(5)
    threshold = DynamicThreshold(X0Denoiser(lambda x, t: 2 * x, VPSDE()), quantile=1.0)
    torch.testing.assert_close(threshold(x, 0.5).mean, (2 * x).clamp(-1, 1))
    assert Nonlinear(VPSDE())(x, torch.full((5,), 0.5)).mean.shape == (5,)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64])
def test_a_network_that_returns_no_floating_point_is_refused(dtype):
    model = X0Denoiser(lambda x, t: x.to(dtype), VPSDE())
    for call in (lambda: model(normal(2, 3), 0.5), lambda: model.eps(normal(2, 3), torch.tensor([0.5, 0.6]))):
        with pytest.raises(ValueError, match=f"the network returned {dtype}"):
            call()
