"""Learned variances: what each loss is minimised by, what each denoiser makes of its head, and one call for both."""

from __future__ import annotations

import math

import pytest
import torch
from common import FINITE, Counting, Nonlinear, generator, normal
from torch.distributions import Normal, kl_divergence

from scoresde import VPSDE, Clip, DDPMChain, EpsDenoiser, FlowSDE, Grid, VDenoiser, X0Denoiser, sample
from scoresde.data import digits
from scoresde.exact import Gaussian, GaussianMixture
from scoresde.guidance import Autoguidance, ClassifierFree, Conditioned, Mask, MomentMatching, Rule
from scoresde.likelihood import elbo
from scoresde.nn import MLP, UNet
from scoresde.solvers import DDPM
from scoresde.solvers.rows import forgotten
from scoresde.tensors import expand_like, precise
from scoresde.training import CheckpointError, Part, TrainConfig, Trainer, UniformTimes, dsm_loss, load_ema
from scoresde.variance import (
    LearnedRangeDenoiser,
    NPRDenoiser,
    OCMDenoiser,
    SNDenoiser,
    SplitOutput,
    TrunkWithHead,
    hybrid_loss,
    npr_loss,
    ocm_loss,
    sn_loss,
    training_loss,
)
from scoresde.variance.solver import OptimalVariance

COV = [[[0.3, 0.1], [0.1, 0.2]], [[0.05, -0.02], [-0.02, 0.4]]]
MIXTURE = GaussianMixture(means=[[-1.0, 0.0], [1.0, 1.0]], weights=[0.4, 0.6], cov=COV)
SHORT = DDPMChain.linear(24, 1e-3, 0.4)
TO_NOISE = DDPMChain([*SHORT.betas[:-1].tolist(), 1.0])


def noise_variance(exact, x, t):
    """Var[eps | x_t] = (alpha / sigma)^2 Var[x_0 | x_t]."""
    return expand_like((2 * exact.sde.half_log_snr(precise(t))).exp(), x) * exact(x, t).var


def exact_heads(exact):
    """Closed forms of the three heads; the third by differentiation, not from the variance."""

    def sn(x, t):
        return noise_variance(exact, x, t) + exact.eps(x, t) ** 2

    def npr(x, t):
        return noise_variance(exact, x, t)

    def ocm(x, t):
        def row(y, time, i):
            return exact.eps(y, time)[:, i].sum()

        with torch.enable_grad():
            y = x.detach().requires_grad_()
            rows = [torch.autograd.grad(row(y, t, i), y)[0][:, i] for i in range(x.shape[1])]
        return expand_like(-exact.sde.sigma(t), x) * torch.stack(rows, dim=1)

    return {"sn": sn, "npr": npr, "ocm": ocm}


DENOISERS = {"sn": SNDenoiser, "npr": NPRDenoiser, "ocm": OCMDenoiser}
LOSSES = {"sn": sn_loss, "npr": npr_loss, "ocm": ocm_loss}


# ---- the denoisers ----


@pytest.mark.parametrize("kind", DENOISERS)
@pytest.mark.parametrize("sde", FINITE.values(), ids=FINITE)
def test_exact_heads_give_the_exact_variance(sde, kind):
    """SN = NPR = OCM = the mixture's elementwise posterior variance, which goes beyond (sigma / alpha)^2 at times."""
    exact = MIXTURE.denoiser(sde)
    model = DENOISERS[kind](exact, exact_heads(exact)[kind])
    t = sde.time_at(torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0]).double()).repeat_interleave(8)
    x = sde.perturb(MIXTURE.sample(40, generator(0), dtype=torch.float64), t, normal(40, 2, seed=1))
    mean, var = model(x, t)
    torch.testing.assert_close(mean, exact(x, t).mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(var, exact(x, t).var, rtol=1e-7, atol=1e-10)
    assert bool((var > expand_like((-2 * sde.half_log_snr(t)).exp(), x)).any())


@pytest.mark.parametrize("kind", DENOISERS)
def test_the_bounds_of_the_variance(kind):
    """0 and ((hi - lo) / 2)^2, elementwise, or of the mean over each sample's elements."""
    exact = MIXTURE.denoiser(VPSDE())
    x, t = normal(6, 2), 0.7
    shift = {"sn": 0.5, "npr": 0.5, "ocm": 0.5}[kind]

    def head(y, time):
        return exact_heads(exact)[kind](y, time) - shift

    factor = float((-2 * exact.sde.half_log_snr(t)).exp())
    raw = exact(x, t).var - shift * factor
    assert bool((raw < 0).any())
    torch.testing.assert_close(DENOISERS[kind](exact, head)(x, t).var, raw.clamp(min=0))
    bounded = DENOISERS[kind](exact, exact_heads(exact)[kind], data_range=(0.0, 1.0))(x, t).var
    torch.testing.assert_close(bounded, exact(x, t).var.clamp(max=0.25))
    one = DENOISERS[kind](exact, head, average=True)(x, t).var
    assert one.shape == (6, 1)
    torch.testing.assert_close(one[:, 0], raw.mean(1).clamp(min=0))


@pytest.mark.parametrize("kind", DENOISERS)
def test_at_the_data_the_variance_is_zero_and_without_signal_there_is_none(kind):
    exact = MIXTURE.denoiser(FlowSDE())
    model = DENOISERS[kind](exact, lambda x, t: exact_heads(exact)[kind](x, t.clamp(min=0.01)))
    x = normal(3, 2)
    for t in (0.0, torch.tensor([0.0, 0.5, 0.0])):
        mean, var = model(x, t)
        torch.testing.assert_close(mean, exact(x, t).mean)
        torch.testing.assert_close(var, exact(x, t).var, rtol=1e-6, atol=1e-9)
    with pytest.raises(ValueError, match="alpha is 0 at t = "):
        model(x, 1.0)


def test_a_head_sees_what_the_network_sees():
    """The same label, in the same dtype, in whatever the wrapper's wrapper is."""
    seen = []

    class Net(torch.nn.Linear):
        def forward(self, x, time, shift):
            seen.append((x.dtype, time, shift))
            return super().forward(x)

    net, head = Net(2, 2), Net(2, 2)
    model = Clip(NPRDenoiser(Clip(VDenoiser(net, VPSDE(), time=lambda t: 999 * t), -9, 9), head))
    assert model(normal(3, 2), 0.5, shift=1.0).var.dtype == torch.float64
    assert [(a, b.tolist(), c) for a, b, c in seen] == [(torch.float32, [499.5] * 3, 1.0)] * 2


# ---- the losses ----


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("sde", FINITE.values(), ids=FINITE)
def test_the_exact_head_minimises_its_loss(sde, kind):
    """For any other head h + delta the loss is larger by exactly E delta^2, as the cross term has mean zero. 20,000
    draws, z-score below 6."""
    n = 20_000
    exact = MIXTURE.denoiser(sde)
    head = exact_heads(exact)[kind]
    t = sde.time_at(torch.linspace(-2, 2, n).double())
    x0, noise = MIXTURE.sample(n, generator(0), dtype=torch.float64), normal(n, 2, seed=1)

    def delta(x, t):
        return 0.5 * torch.sin(2 * x) + 0.3

    probe = {"probe": normal(n, 2, seed=2).sign()} if kind == "ocm" else {}
    losses = [
        LOSSES[kind](exact, h, x0, t=t, noise=noise, reduction="none", **probe)
        for h in (lambda x, t: head(x, t) + delta(x, t), head)
    ]
    excess = delta(sde.perturb(x0, t, noise), t).square().mean(1)
    cross = losses[0] - losses[1] - excess
    assert abs(float(cross.mean())) < 6 * float(cross.std()) / math.sqrt(n)
    assert float(excess.mean()) > 10 * float(cross.std()) / math.sqrt(n)  # so the test can tell


def test_npr_learns_the_error_of_a_wrong_mean_too():
    """h = Var[eps | x] + (eps_hat - E[eps | x])^2: the same law, for a denoiser that is off by 0.3 sigma / alpha."""
    n, sde = 20_000, VPSDE()
    exact = MIXTURE.denoiser(sde)
    wrong = EpsDenoiser(lambda x, t: exact.eps(x, t) + 0.3, sde)
    t = sde.time_at(torch.linspace(-2, 2, n).double())
    x0, noise = MIXTURE.sample(n, generator(0), dtype=torch.float64), normal(n, 2, seed=1)

    def right(x, t):
        return noise_variance(exact, x, t) + 0.09

    losses = [
        npr_loss(wrong, h, x0, t=t, noise=noise, reduction="none")
        for h in (lambda x, t: right(x, t) + 0.2, right, lambda x, t: right(x, t) - 0.09)
    ]
    assert abs(float((losses[0] - losses[1]).mean()) - 0.04) < 6 * float((losses[0] - losses[1]).std()) / math.sqrt(n)
    assert float(losses[2].mean()) > float(losses[1].mean())


@pytest.mark.parametrize("kind", LOSSES)
def test_the_loss_is_its_formula_in_every_parameterisation(kind):
    sde, x0, noise, r = VPSDE(), normal(5, 2, 3), normal(5, 2, 3, seed=1), normal(5, 2, 3, seed=2).sign()
    t = torch.tensor([0.01, 0.2, 0.5, 0.8, 1.0]).double()
    reference = Nonlinear(sde)
    x_t = sde.perturb(x0, t, noise)

    def head(x, time):
        return torch.cos(x) + expand_like(time, x)

    eps_hat = reference.eps(x_t, t)
    if kind == "ocm":
        (pulled,) = torch.autograd.functional.vjp(lambda x: reference.eps(x, t), x_t, r)[1:]
        target = -expand_like(sde.sigma(t), x_t) * r * pulled
    else:
        target = noise**2 if kind == "sn" else (noise - eps_hat) ** 2
    expected = (head(x_t, t) - target).square().mean((1, 2))
    options = {"t": t, "noise": noise, "reduction": "none"} | ({"probe": r} if kind == "ocm" else {})
    for view, adapter in {"x0": X0Denoiser, "eps": EpsDenoiser, "v": VDenoiser}.items():
        model = adapter(lambda x, t, view=view: reference.view(view, x, t), sde)
        torch.testing.assert_close(LOSSES[kind](model, head, x0, **options), expected, rtol=1e-6, atol=1e-9)


def test_the_regression_on_a_gaussian_is_the_theory():
    """At one time, the best constant is the mean of the target: alpha^2 c / (alpha^2 c + sigma^2) = Var[eps | x]. By
    the gradient of the loss at that constant, which is zero: 100,000 draws of chi^2, 5 standard errors."""
    sde, std, n = VPSDE(), torch.tensor([0.3, 2.0]).double(), 100_000
    target = Gaussian(mean=[0.5, -1.0], std=std)
    t = sde.time_at(torch.tensor(0.3).double())
    alpha2c = (sde.alpha(t) * std) ** 2
    theory = alpha2c / (alpha2c + sde.sigma(t) ** 2)
    x0 = target.sample(n, generator(0), dtype=torch.float64)
    for kind, at in (("npr", theory), ("ocm", theory - 1)):
        h = at.clone().requires_grad_()
        LOSSES[kind](target.denoiser(sde), lambda x, t, h=h: h.expand_as(x), x0, t=t, generator=generator(1)).backward()
        # d loss / d h = (h - mean of the target) * 2 / 2
        assert bool((h.grad.abs() < 5 * math.sqrt(2 / n) * theory + 1e-12).all())


def test_draws_come_from_the_generator_and_bad_calls_are_refused():
    model, x0 = Nonlinear(VPSDE()), normal(4, 2)
    for loss in (sn_loss, npr_loss, ocm_loss):
        torch.manual_seed(0)
        before = torch.get_rng_state()
        values = [float(loss(model, lambda x, t: x, x0, generator=generator(s))) for s in (3, 3, 4)]
        assert values[0] == values[1] != values[2]
        assert torch.equal(torch.get_rng_state(), before)
        with pytest.raises(ValueError, match="t= or times="):
            loss(model, lambda x, t: x, x0, t=0.5, times=UniformTimes())
        with pytest.raises(ValueError, match="t = 0"):
            loss(model, lambda x, t: x, x0, t=0.0)
        with pytest.raises(ValueError, match="reduction='sum'"):
            loss(model, lambda x, t: x, x0, reduction="sum")
        with pytest.raises(TypeError, match="no head given"):
            loss(model, None, x0)
        with pytest.raises(ValueError, match="the network returned"):
            loss(model, lambda x, t: x[:, :1], x0)
    with pytest.raises(TypeError, match="no head given"):
        NPRDenoiser(EpsDenoiser(torch.nn.Linear(2, 2), VPSDE()))
    with pytest.raises(TypeError, match="head is Nonlinear: expected a network"):
        NPRDenoiser(model, model)
    with pytest.raises(ValueError, match="the head was made for"):
        NPRDenoiser(model, EpsDenoiser(lambda x, t: x, SHORT))
    with pytest.raises(TypeError, match="head is int"):
        NPRDenoiser(model, 3)
    with pytest.raises(ValueError, match="data_range"):
        SNDenoiser(model, lambda x, t: x, data_range=(1.0, -1.0))


# ---- a head on the trunk ----


class CountedUNet(UNet):
    calls = 0

    def features(self, x, time, label=None):
        CountedUNet.calls += 1
        return super().features(x, time, label)


def unet(seed=0, **options):
    """A U-Net as training leaves it: nothing in it is zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = CountedUNet(channels=8, multipliers=(1, 2), blocks=1, **options)
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.1)
    return net.eval()


def trunk_model(seed=0, dropout=0.0, patch=1, **options):
    net = TrunkWithHead(unet(seed, num_classes=10, dropout=dropout, patch=patch), **options)
    return EpsDenoiser(net, VPSDE(), time=lambda t: 999 * t)


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("block", [False, True])
def test_one_call_gives_both_and_the_prediction_is_the_networks_own(block, patch):
    model = trunk_model(block=block, patch=patch)
    torch.nn.init.normal_(model.net.outward.weight, std=0.1)
    plain = EpsDenoiser(model.net.net, VPSDE(), time=lambda t: 999 * t)
    x, label = normal(3, 1, 8, 8, dtype=torch.float32), torch.tensor([1, 2, 3])
    expected = plain(x, 0.4, label=label).mean
    for wrapper in (SNDenoiser, NPRDenoiser, OCMDenoiser):
        wrapped = wrapper(model)
        CountedUNet.calls = 0
        mean, var = wrapped(x, 0.4, label=label)
        assert CountedUNet.calls == 1
        assert torch.equal(mean, expected)
        assert var.shape == x.shape
        assert float(var.detach().max()) > 0
        assert torch.equal(wrapped.eps(x, 0.4, label=label), plain.eps(x, 0.4, label=label))
        times = torch.tensor([0.4]).double()
        assert torch.equal(wrapped.outputs(times)(0, x, {"label": label}), plain.output(x, 0.4, label=label))
    assert model.net.outward.in_channels == model.net.net.outward.in_channels


@pytest.mark.parametrize("block", [False, True])
def test_a_head_learns_on_a_frozen_trunk_in_channels_last(block):
    """torch 2.13 crashes in GroupNorm's backward there, unless its input is contiguous."""
    model, x0 = trunk_model(block=block), normal(4, 1, 8, 8, dtype=torch.float32)
    torch.nn.init.normal_(model.net.outward.weight, std=0.1)
    label, gradients = torch.tensor([1, 2, 3, 4]), []
    for layout in (torch.contiguous_format, torch.channels_last):
        model.net.to(memory_format=layout).zero_grad()
        npr_loss(model, None, x0, t=torch.tensor(0.5), noise=torch.ones_like(x0), cond={"label": label}).backward()
        gradients.append(model.net.norm.weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_a_zero_head_is_a_point_and_the_prior():
    """It starts at zero: NPR's variance is 0, OCM's (sigma / alpha)^2."""
    model, x = trunk_model(), normal(2, 1, 8, 8, dtype=torch.float32)
    label = torch.tensor([0, 1])
    assert float(NPRDenoiser(model)(x, 0.4, label=label).var.detach().abs().max()) == 0
    expected = torch.full_like(x, float((-2 * VPSDE().half_log_snr(0.4)).exp()))
    torch.testing.assert_close(OCMDenoiser(model)(x, 0.4, label=label).var.detach(), expected)


def test_a_network_in_half_precision_keeps_its_dtype():
    model = EpsDenoiser(TrunkWithHead(unet().to(torch.bfloat16)), VPSDE())
    assert next(model.net.norm.parameters()).dtype == torch.bfloat16
    mean, var = NPRDenoiser(model)(normal(2, 1, 8, 8), 0.4)
    assert mean.dtype == var.dtype == torch.float64


def test_a_network_with_twice_the_channels():
    class Double(torch.nn.Conv2d):
        def forward(self, x, time):
            return super().forward(x)

    net = Double(1, 2, 3, padding=1)
    model = EpsDenoiser(SplitOutput(net), VPSDE())
    x = normal(2, 1, 5, 5, dtype=torch.float32)
    mean, var = NPRDenoiser(model)(x, 0.4)
    assert torch.equal(mean, EpsDenoiser(lambda x, t: net(x, t)[:, :1], VPSDE())(x, 0.4).mean)
    factor = float((-2 * VPSDE().half_log_snr(0.4)).exp())
    torch.testing.assert_close(var, (factor * net(x, 0.4)[:, 1:]).clamp(min=0))
    with pytest.raises(ValueError, match="twice the channels"):
        NPRDenoiser(EpsDenoiser(SplitOutput(Double(1, 3, 3, padding=1)), VPSDE()))(x, 0.4)
    with pytest.raises(TypeError, match="MLP has no features, readout"):
        TrunkWithHead(MLP(2))


# ---- training ----


CONFIG = {"batch_size": 32, "warmup": 2, "checkpoint_every": 5, "log_every": 5, "lr": 1e-2}


def head_trainer(steps, folder=None, seed=0, loss=npr_loss, **options):
    images, labels = digits()
    model = trunk_model(seed, dropout=0.2, **options)
    torch.nn.init.constant_(model.net.outward.bias, 0.5)  # far from what each of the losses wants
    return Trainer(
        model,
        images[:200],
        TrainConfig(steps=steps, **CONFIG),
        cond={"label": labels[:200]},
        loss=training_loss(loss),
        folder=folder,
    )


@pytest.mark.parametrize("loss", [sn_loss, npr_loss, ocm_loss])
def test_the_trainer_trains_the_head_and_nothing_else(loss):
    """The frozen weights and the prediction stay the same to the last bit, averaged copy and all; dropout is off."""

    def loss_of(denoiser):
        images, labels = digits()
        options = {"generator": generator(5), "cond": {"label": labels[:200]}}
        return float(loss(denoiser, None, images[:200], **options))

    trainer = head_trainer(15, loss=loss, block=True)
    before = {k: v.clone() for k, v in trainer.net.state_dict().items()}
    x, label = normal(2, 1, 8, 8, dtype=torch.float32), torch.tensor([0, 1])
    expected, start = trainer.denoiser(x, 0.4, label=label).mean, loss_of(trainer.ema)
    trainer.fit(progress=False)
    after = trainer.net.state_dict()
    assert {k.split(".")[0] for k in after if not torch.equal(after[k], before[k])} == {"norm", "outward", "block"}
    assert not trainer.net.net.training
    assert torch.equal(trainer.ema(x, 0.4, label=label).mean, expected)
    assert loss_of(trainer.ema) < 0.95 * start


def test_a_head_resumes_with_the_same_bits_and_not_under_another_loss(tmp_path):
    whole = head_trainer(10).fit(progress=False)
    broken = head_trainer(10, tmp_path)
    original = broken._train_step

    def interrupt(*args):
        if broken.step == 7:
            raise KeyboardInterrupt
        return original(*args)

    broken._train_step = interrupt
    with pytest.raises(KeyboardInterrupt):
        broken.fit(progress=False)
    resumed = head_trainer(10, tmp_path, seed=3)
    assert resumed.step == 5
    resumed.fit(progress=False)
    left, right = (trainer.averages[0].module.state_dict() for trainer in (resumed, whole))
    assert [k for k in left if not torch.equal(left[k], right[k])] == []
    with pytest.raises(CheckpointError, match="loss: npr_loss in the file, sn_loss here"):
        head_trainer(10, tmp_path, loss=sn_loss)
    loaded = NPRDenoiser(load_ema(tmp_path, trunk_model(4, dropout=0.2)))
    x, label = normal(2, 1, 8, 8, dtype=torch.float32), torch.tensor([0, 1])
    assert torch.equal(loaded(x, 0.4, label=label).var, NPRDenoiser(whole.ema)(x, 0.4, label=label).var)


@pytest.mark.parametrize("loss", [sn_loss, npr_loss, ocm_loss])
def test_a_head_trains_on_parts_of_a_batch(loss):
    """The draws are those of the whole batch, OCM's signs too: the first 5 of 12 samples have their own losses."""
    images, labels = digits()
    model = trunk_model(0).with_net(trunk_model(0).net.double())
    x0, labels = images[:12].double(), labels[:12]
    whole = loss(model, None, x0, generator=generator(3), cond={"label": labels}, reduction="none")
    first = loss(model, None, x0[:5], generator=Part(generator(3), 0, 12), cond={"label": labels[:5]}, reduction="none")
    torch.testing.assert_close(first, whole[:5], rtol=1e-10, atol=1e-12)


def test_a_loss_brings_its_own_weighting():
    with pytest.raises(ValueError, match="weighting= and times= are dsm_loss's"):
        Trainer(trunk_model(), digits()[0], TrainConfig(1), loss=training_loss(npr_loss), times=UniformTimes(False))


def test_a_head_of_its_own_learns_a_gaussians_variance():
    """Beside the exact denoiser: Var[eps | x_t], 0.002 to 0.97, in two dimensions of unequal width, to 0.15 after 300
    steps; the adapter's own time label is the head's."""
    sde, std = VPSDE(), torch.tensor([0.3, 2.0]).double()
    target = Gaussian(mean=[0.5, -1.0], std=std)
    exact = target.denoiser(sde)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = MLP(2, width=32, depth=1)
    config = TrainConfig(steps=300, batch_size=256, lr=1e-2, warmup=10, ema_decay=0.98)
    start = EpsDenoiser(head, sde, time=lambda t: 5 * t)
    data = target.sample(4000, generator(0))
    trainer = Trainer(start, data, config, loss=training_loss(npr_loss, exact)).fit(progress=False)
    for t in (0.1, 0.3, 0.6):
        x = sde.perturb(data[:500], t, normal(500, 2, seed=1, dtype=torch.float32))
        found = NPRDenoiser(exact, trainer.ema)(x, t).var.mean(0)
        factor = (sde.sigma(t) / sde.alpha(t)) ** 2
        theory = factor * std**2 / (std**2 + factor)
        assert float(((found - theory) / factor).abs().max()) < 0.15


# ---- the bound ----


def test_the_exact_head_gives_the_best_bound():
    """Read by elbo: better than both of DDPM's variances, and the same as with the mixture's own variance."""
    exact = MIXTURE.denoiser(SHORT)
    x0 = MIXTURE.sample(400, generator(0), dtype=torch.float64)
    grid = Grid(SHORT, [24.0, 18.0, 12.0, 8.0, 5.0, 3.0, 2.0, 1.0, 0.0])
    options = {"draws": 4, "seed": 0}
    model = NPRDenoiser(exact, exact_heads(exact)["npr"])
    found = elbo(model, x0, DDPM(), grid, variance="posterior", **options).value
    torch.testing.assert_close(found, elbo(exact, x0, DDPM(), grid, variance="posterior", **options).value)
    for variance in ("posterior", "beta"):
        other = elbo(model, x0, DDPM(variance=variance), grid, **options).value
        gain = found - other
        assert float(gain.mean()) > 5 * float(gain.std()) / math.sqrt(400)


@pytest.mark.parametrize("kind", DENOISERS)
def test_sampling_with_an_exact_head_has_the_variance_of_the_data(kind):
    """Unequal widths, 3 steps and the last to the data's mean: elementwise the chain is exact, which DDPM's is not.
    20,000 samples; the standard error of a variance is sqrt(2 / n) of it, and 5 of them are allowed. One call a step.
    """
    sde, n, std = VPSDE(), 20_000, torch.tensor([0.3, 2.0]).double()
    target = Gaussian(mean=[0.5, -1.0], std=std)
    exact = Counting(target.denoiser(sde))
    head = exact_heads(target.denoiser(sde))[kind]
    grid = Grid(sde, [1.0, 0.6, 0.3, 0.1])
    x_T = sde.perturb(target.sample(n, generator(0), dtype=torch.float64), 1.0, normal(n, 2, seed=1))
    x = sample(DENOISERS[kind](exact, head), x_T, OptimalVariance(DDPM()), grid=grid, seed=2).x
    marginal = (sde.alpha(0.1) * std) ** 2 + sde.sigma(0.1) ** 2
    assert bool(((x.var(0) / marginal - 1).abs() < 5 * math.sqrt(2 / n)).all())
    assert exact.times == [1.0, 0.6, 0.3]
    plain = sample(target.denoiser(sde), x_T, DDPM(), grid=grid, seed=2).x
    assert bool(((plain.var(0) / marginal - 1).abs() > 20 * math.sqrt(2 / n)).any())  # so the test can tell


# ---- improved DDPM ----


@pytest.mark.parametrize("respaced", [False, True])
def test_v_runs_from_ddpms_smaller_variance_to_its_larger(respaced):
    """v = 0 and v = 1 are the bounds of DDPM("posterior") and DDPM("beta"), on the chain's own steps or on fewer."""
    grid = Grid(SHORT, [24.0, 17.0, 9.0, 4.0, 1.0, 0.0]) if respaced else None
    whole = grid or Grid(SHORT, torch.arange(24, -1, -1))
    x0 = normal(5, 3)
    for v, variance in ((0.0, "posterior"), (1.0, "beta")):
        model = LearnedRangeDenoiser(Nonlinear(SHORT), lambda x, t, v=v: torch.full_like(x, 2 * v - 1), grid=grid)
        options = {"draws": 1, "seed": 0}
        found = elbo(model, x0, DDPM(), whole, variance="posterior", **options)
        expected = elbo(model, x0, DDPM(variance=variance), whole, **options)
        torch.testing.assert_close(found.denoising, expected.denoising, rtol=1e-8, atol=1e-8)
    half = LearnedRangeDenoiser(Nonlinear(SHORT), lambda x, t: torch.zeros_like(x), grid=grid)
    t, s = (17.0, 9.0) if respaced else (17.0, 16.0)
    share = float(forgotten(SHORT, torch.tensor([t]).double(), torch.tensor([s]).double()))
    step = SHORT.sigma(s) ** 2 * share + (SHORT.alpha(s) * share) ** 2 * half(x0, t).var[0, 0]
    assert float(step) == pytest.approx(float(SHORT.sigma(t) * SHORT.sigma(s)) * share, rel=1e-9)
    # A time of the grid is itself also in float32.
    torch.testing.assert_close(half(x0, torch.tensor(17.0)).var, half(x0, 17.0).var)


def textbook_hybrid(model, head, x0, times, t, noise, weight, levels=None):
    """Per sample, by torch.distributions, in the discrete betas of the (re-spaced) chain."""
    sde, losses = model.sde, []
    steps = list(zip([*times], [*times[1:], 0.0], strict=True))
    for i in range(len(x0)):
        n = [float(a) for a, _ in steps].index(float(t[i]))
        above, below = steps[n]
        abar_t, abar_s = float(sde.alpha(above)) ** 2, float(sde.alpha(below)) ** 2
        beta = 1 - abar_t / abar_s
        tilde = beta * (1 - abar_s) / (1 - abar_t)
        x_t = sde.perturb(x0[i : i + 1], above, noise[i : i + 1])
        eps_hat, v = model.eps(x_t, above), (head(x_t, torch.tensor([above]).double()) + 1) / 2
        D = (x_t - math.sqrt(1 - abar_t) * eps_hat) / math.sqrt(abar_t) if abar_t else model(x_t, above).mean

        def mean(y, a=abar_t, b=abar_s, beta=beta, x_t=x_t):
            return (math.sqrt(b) * beta * y + math.sqrt(a / b) * (1 - b) * x_t) / (1 - a)

        if below == 0:
            one, two = steps[n][0], steps[n - 1][0]
            a, b = float(sde.alpha(two)) ** 2, float(sde.alpha(one)) ** 2
            tilde = (1 - a / b) * (1 - b) / (1 - a)
        var = torch.exp(v * math.log(beta) + (1 - v) * math.log(tilde))
        p = Normal(mean(D), var.sqrt())
        if below > 0:
            term = kl_divergence(Normal(mean(x0[i : i + 1]), math.sqrt(tilde)), p).mean()
        elif levels is None:
            term = -p.log_prob(x0[i : i + 1]).mean()
        else:
            term = -(p.cdf(x0[i : i + 1] + 1 / levels) - p.cdf(x0[i : i + 1] - 1 / levels)).log().mean()
        losses.append(float((eps_hat - noise[i : i + 1]).square().mean() + weight * len(steps) * term))
    return torch.tensor(losses).double()


@pytest.mark.parametrize(("chain", "adapter"), [(SHORT, EpsDenoiser), (TO_NOISE, X0Denoiser), (TO_NOISE, VDenoiser)])
@pytest.mark.parametrize("levels", [None, 8])
@pytest.mark.parametrize("times", [list(range(24, 0, -1)), [24, 17, 9, 4, 1]], ids=["all", "some"])
def test_the_hybrid_loss_is_its_formula(times, levels, chain, adapter):
    grid = Grid(chain, [*map(float, times), 0.0])
    n = len(times)
    x0 = ((normal(n, 2, 3).clamp(-0.7, 0.7) * 4).floor() + 0.5) / 4 if levels else normal(n, 2, 3)
    noise, t = normal(n, 2, 3, seed=1), torch.tensor(times).double()
    reference = MIXTURE_3.denoiser(chain) if levels else Nonlinear(chain)

    def head(x, time):
        return torch.cos(x) * expand_like(time, x) / 24

    model = adapter(lambda x, t: reference.view(adapter.predicts, x, t), chain)
    found = hybrid_loss(model, head, x0, grid=grid, t=t, noise=noise, weight=0.3, levels=levels, reduction="none")
    expected = textbook_hybrid(model, head, x0, [*map(float, times)], t, noise, 0.3, levels)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


MIXTURE_3 = GaussianMixture(means=torch.stack([torch.full((2, 3), -0.4), torch.full((2, 3), 0.5)]), std=0.3)


def test_the_bound_of_the_hybrid_loss_trains_the_head_alone():
    """Its weight leaves the gradient of the shared trunk's prediction path as it is in L_simple: in a network of two
    separate halves nothing of L_vlb reaches the first. All gradients are finite, with outer bins too."""

    class Halves(torch.nn.Module):
        def __init__(self):
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.eps, self.v = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, x, time):
            return self.both(x, time)[0]

        def both(self, x, time):
            return self.eps(x), self.v(x)

    net = Halves()
    model = EpsDenoiser(net, SHORT)
    x0 = torch.tensor([-1.0, 1.0, 0.125, -0.375]).expand(48, 4)
    t = torch.arange(1, 25).double().repeat(2)
    options = {"t": t, "noise": normal(48, 4, dtype=torch.float32), "levels": 16}
    hybrid_loss(model, None, x0, weight=10.0, **options).backward()
    gradients = [p.grad.clone() for p in net.parameters()]
    assert all(bool(g.isfinite().all()) for g in gradients)
    assert float(net.v.weight.grad.abs().max()) > 0
    net.zero_grad()
    del options["levels"]
    dsm_loss(model, x0, **options).backward()
    torch.testing.assert_close([net.eps.weight.grad, net.eps.bias.grad], gradients[:2], rtol=1e-5, atol=1e-7)


def test_the_hybrid_loss_trains_a_trunk_and_its_head():
    images, labels = digits()
    net = TrunkWithHead(unet(num_classes=10), freeze=False)
    model = EpsDenoiser(net, SHORT)

    def loss_of(denoiser):
        cond = {"label": labels[:300]}
        return float(hybrid_loss(denoiser, None, images[:300], generator=generator(5), cond=cond, weight=0.01))

    config = TrainConfig(steps=30, **CONFIG)
    loss = training_loss(hybrid_loss, weight=0.01)
    trainer = Trainer(model, images[:200], config, cond={"label": labels[:200]}, loss=loss)
    start, trunk = loss_of(trainer.ema), net.net.inward.weight.clone()
    trainer.fit(progress=False)
    assert loss_of(trainer.ema) < 0.9 * start
    assert not torch.equal(trunk, net.net.inward.weight)
    var = LearnedRangeDenoiser(trainer.ema)(images[:4], 12.0, label=labels[:4]).var
    assert bool((var >= 0).all())


def test_a_learned_range_needs_the_steps_that_it_is_of():
    def head(x, t):
        return x

    with pytest.raises(ValueError, match="is no DDPMChain"):
        LearnedRangeDenoiser(Nonlinear(VPSDE()), head)
    with pytest.raises(ValueError, match="the grid was made for"):
        LearnedRangeDenoiser(Nonlinear(VPSDE()), head, grid=Grid(SHORT, [2.0, 1.0, 0.0]))
    with pytest.raises(ValueError, match="at least two steps"):
        hybrid_loss(Nonlinear(SHORT), head, normal(2, 2), grid=Grid(SHORT, [2.0, 0.0]))
    with pytest.raises(ValueError, match="weight=-1"):
        hybrid_loss(Nonlinear(SHORT), head, normal(2, 2), weight=-1)
    assert (
        LearnedRangeDenoiser(Nonlinear(VPSDE()), head, grid=Grid.uniform(VPSDE(), 4))(normal(2, 2), 0.5).var is not None
    )


# --- with guidance ---------------------------------------------------------------------------------------------------


class Told(torch.nn.Module):
    """eps and v of a class, 10 being none, in twice the channels: made of everything, so that no mistake is hidden."""

    def forward(self, x, time, label):
        shift = (0.3 * time.to(x) + 0.7 * label.to(x))[:, None, None, None]
        mean, v = torch.sin(x + 0.2 * x.roll(1, 1) + shift), torch.tanh(x.roll(1, -1) - shift)
        return torch.cat([mean, v], dim=1)


def improved_ddpm_guided(net, chain, steps, x, label, w, z, guided):
    """The sampler of guided diffusion and DiT, with the steps 1 <= n of a chain that are kept: eps guided in its first
    channels, the rest and the variance those of the conditional half.
    """
    alpha_bar = (chain.alpha(chain.nodes) ** 2)[torch.tensor(steps) - 1]
    before = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    beta = 1 - alpha_bar / before
    posterior = beta * (1 - before) / (1 - alpha_bar)
    for i in reversed(range(len(steps))):
        time = torch.full((2 * len(x),), steps[i] - 1)
        out = net(torch.cat([x, x]), time, torch.cat([label, torch.full_like(label, 10)]))
        eps, v = out[:, :3], out[: len(x), 3:]
        conditional, unconditional = eps.chunk(2)
        eps = unconditional + w * (conditional - unconditional)
        eps = torch.cat([eps[:, :guided], conditional[:, guided:]], dim=1)
        low, share = (posterior[i] if i else posterior[1]).log(), (v + 1) / 2
        log_variance = share * beta[i].log() + (1 - share) * low
        x0 = (x - (1 - alpha_bar[i]).sqrt() * eps) / alpha_bar[i].sqrt()
        mean = before[i].sqrt() * beta[i] / (1 - alpha_bar[i]) * x0
        mean = mean + (1 - beta[i]).sqrt() * (1 - before[i]) / (1 - alpha_bar[i]) * x
        x = mean + (0 if i == 0 else 1) * (log_variance / 2).exp() * z[len(steps) - 1 - i]
    return x


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(("steps", "guided"), [(tuple(range(1, 25)), 3), ((1, 5, 9, 16, 24), 3), ((2, 11, 24), 1)])
def test_the_conditional_variance_is_guided_diffusions_sampler(steps, guided, batched):
    """Of all steps and of some; of DiT's rule, which guides the first channels alone, too."""
    x, label, net = normal(2, 3, 4, 4), torch.tensor([3, 7]), Told()
    z = [normal(2, 3, 4, 4, seed=10 + i) for i in range(len(steps))]
    grid = Grid(SHORT, [*map(float, reversed(steps)), 0.0])
    eps = EpsDenoiser(SplitOutput(net), SHORT, time=lambda t: t.round().long() - 1)
    first = torch.tensor([channel < guided for channel in range(3)])[:, None, None]
    rule = Rule(lambda F_1, F_0, w: torch.where(first, F_0 + w * (F_1 - F_0), F_1))
    free = ClassifierFree(LearnedRangeDenoiser(eps, grid=grid), 2.5, null={"label": 10}, rule=rule, batched=batched,
                          variance="conditional")  # fmt: skip
    found = sample(free, x, OptimalVariance(DDPM()), grid=grid, noise=lambda row, _: z[row], cond={"label": label}).x
    expected = improved_ddpm_guided(net, SHORT, steps, x, label, 2.5, z, guided)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("w", [0.0, 1.0, 3.0, torch.tensor([1.0, 0.0]), lambda t: 1 + t])
def test_the_conditional_variance_is_that_at_every_weight(w):
    """Beside the mean that is guided as without it."""
    x, label = normal(2, 3, 4, 4), torch.tensor([3, 7])
    inner = NPRDenoiser(EpsDenoiser(SplitOutput(Told()), VPSDE()), data_range=(-1, 1))
    options = {"null": {"label": 10}, "interval": (0.1, 50.0)}
    plain = ClassifierFree(inner, w, **options)
    borrowed = ClassifierFree(inner, w, variance="conditional", **options)
    for t in (0.02, 0.5, torch.tensor([0.2, 0.7])):  # the first is outside of the interval
        mean, var = borrowed(x, t, label=label)
        torch.testing.assert_close(mean, plain(x, t, label=label).mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(var, inner(x, t, label=label).var)


def test_a_conditional_variance_is_for_samples_and_no_bound():
    x, label = normal(2, 3, 4, 4), torch.tensor([3, 7])
    calls = []

    class Counted(Told):
        def forward(self, x, time, label):
            calls.append(len(x))
            return super().forward(x, time, label)

    inner = NPRDenoiser(EpsDenoiser(SplitOutput(Counted()), VPSDE()))
    free = ClassifierFree(inner, 2.0, null={"label": 10}, variance="conditional")
    mixed = [Clip(free), Conditioned(free, label=3), Autoguidance(inner, free), free]
    for denoiser in mixed:
        with pytest.raises(ValueError, match="is another law's than its mean's"):
            elbo(denoiser, x, DDPM(), Grid.uniform(VPSDE(), 3), variance="posterior", cond={"label": label})
        with pytest.raises(ValueError, match="is another law's than its mean's"):
            MomentMatching(denoiser, Mask(torch.ones(4, 4)), x, 0.1, covariance="variance")
    assert not calls
    assert bool(elbo(free, x, DDPM(), Grid.uniform(VPSDE(), 3), draws=2, cond={"label": label}).value.isfinite().all())
    assert set(calls) == {4}
    with pytest.raises(ValueError, match="knows none: wrap it in a LearnedRangeDenoiser"):
        ClassifierFree(inner.denoiser, 2.0, null={"label": 10}, variance="conditional")
    with pytest.raises(ValueError, match="variance='both': expected one of None, 'conditional'"):
        ClassifierFree(inner, 2.0, null={"label": 10}, variance="both")
    assert "variance='conditional'" in repr(free)
