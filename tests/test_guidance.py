"""Guidance against exact conditionals: on a labelled mixture p(x | y), p(y | x_t) and all made of them are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from inspect import isfunction, signature
from pathlib import Path
from typing import Any

import pytest
import torch
from common import SDES, end_of, generator, network_for, normal, start_of
from torch import Tensor

from scoresde import (
    SDE,
    VESDE,
    VPSDE,
    Clip,
    CosineVPSDE,
    DDPMChain,
    Denoiser,
    EpsDenoiser,
    FlowSDE,
    Grid,
    ScoreDenoiser,
    VDenoiser,
    VelocityDenoiser,
    X0Denoiser,
    log_prob,
    sample,
)
from scoresde.data import nothing
from scoresde.exact import Gaussian, GaussianMixture
from scoresde.guidance import rules
from scoresde.guidance.base import shifted
from scoresde.guidance.branches import Conditioned
from scoresde.guidance.classifier import Classifier, classifier_loss
from scoresde.guidance.classifier_free import Autoguidance, ClassifierFree
from scoresde.guidance.composition import Mixture, Product
from scoresde.guidance.energy import Energy, class_means, contrast, distance, similarity
from scoresde.guidance.gradients import gradient
from scoresde.guidance.rules import RULES, Rule
from scoresde.guidance.trained import TrainedClassifier
from scoresde.nn import MLP, DiT, NoisyClassifier, UNet
from scoresde.solvers import (
    DDIM,
    DDPM,
    DPMSolverPP,
    EDMStochastic,
    Entry,
    ExponentialSDE,
    Heun,
    PredictorCorrector,
    Solver,
    UniPC,
    available,
)
from scoresde.solvers.langevin import langevin
from scoresde.tensors import Time, as_time
from scoresde.training import ImportanceTimes, LogNormalTimes, Part

# The chain's nodes for every grid; its times are whole numbers.
SOLVERS: dict[str, Solver] = {
    "ddim": DDIM(),
    "ddpm": DDPM(),
    "heun": Heun(),
    "unipc": UniPC(3),
    "sde-dpm++": DPMSolverPP(2, stochastic=True),
    "churn": EDMStochastic(),
    "pc": PredictorCorrector(corrector="ald", snr=0.1),
}


NULL = {"label": 3}


class Labelled:
    """Three classes of two components each: data, exact classifier, exact conditional denoisers."""

    classes = 3

    def __init__(self, sde: SDE, event: tuple[int, ...] = (2,)) -> None:
        self.sde = sde
        means = 1.5 * normal(3, 2, *event, seed=4)
        self.parts = [GaussianMixture(m, [0.3, 0.7], std=torch.tensor([0.3, 0.5])) for m in means]
        self.prior = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
        weights = (self.prior[:, None] * torch.tensor([0.3, 0.7], dtype=torch.float64)).flatten()
        self.whole = GaussianMixture(means.flatten(0, 1), weights, std=torch.tensor([0.3, 0.5] * 3))
        self.calls: list[int] = []

    def logits(self, x: Tensor, t: Time) -> Tensor:
        """log p(y) p_t(x | y): log p(y | x_t) up to a constant."""
        t = as_time(t).double()
        density = torch.stack([part.log_prob(x, sde=self.sde, t=t) for part in self.parts], dim=1)
        return self.prior.log() + density

    def of(self, label: int) -> Denoiser:
        return self.parts[label].denoiser(self.sde)

    def net(self, view: str) -> Callable[..., Tensor]:
        """net(x, t, label) that predicts the view; label 3 is none."""
        models = [*(self.of(k) for k in range(3)), self.whole.denoiser(self.sde)]

        def call(x: Tensor, t: Tensor, label: Any = 3) -> Tensor:
            self.calls.append(len(x))
            label = torch.as_tensor(label).expand(len(x))
            outputs = torch.stack([model.view(view, x, t) for model in models])
            return outputs[label, torch.arange(len(x))]

        return call


def middle(sde: SDE, half_log_snr: float = 0.0) -> float:
    t = float(sde.time_at(half_log_snr))
    return float(round(t)) if isinstance(sde, DDPMChain) else t


def grid_of(sde: SDE, steps: int = 6) -> Grid:
    if isinstance(sde, DDPMChain):
        return Grid.strided(sde, steps)
    return Grid.log_snr(sde, steps, start=start_of(sde), end=end_of(sde))


# ---------------------------------------------------------------------------------------------------------- gradients


def quartic(x: Tensor) -> Tensor:
    return -(x**4).flatten(1).sum(1) / 4


def test_gradient_in_every_mode() -> None:
    x = normal(3, 2, 2)
    values, g = gradient(quartic, x)
    assert torch.equal(values, quartic(x))
    assert torch.allclose(g, -(x**3))
    assert not x.requires_grad
    with torch.no_grad():
        values, g = gradient(quartic, x)
        assert not values.requires_grad
        assert not g.requires_grad
        assert torch.allclose(g, -(x**3))
    with torch.inference_mode():
        assert torch.allclose(gradient(quartic, x * 1)[1], -(x**3))
    leaf = x.clone().requires_grad_()
    (second,) = torch.autograd.grad(gradient(quartic, leaf)[1].sum(), leaf)
    assert torch.allclose(second, -3 * x**2)
    with torch.no_grad():
        _, forward = torch.func.jvp(lambda x: gradient(quartic, x)[1], (x,), (x,))
        assert torch.allclose(forward, -3 * x**3)
        directions = torch.stack([x, torch.ones_like(x)])
        batch = torch.func.vmap(lambda w: torch.func.jvp(lambda x: gradient(quartic, x)[1], (x,), (w,))[1])(directions)
        assert torch.allclose(batch, -3 * x**2 * directions)


def test_gradient_leaves_parameters_alone_and_can_reach_them() -> None:
    layer = torch.nn.Linear(2, 1).double()
    x = normal(4, 2)
    with torch.no_grad():
        gradient(lambda x: layer(x).tanh()[:, 0], x)
    assert layer.weight.grad is None
    gradient(lambda x: layer(x).tanh()[:, 0], x)[1].square().sum().backward()
    assert layer.weight.grad is not None
    assert bool((layer.weight.grad != 0).any())


def test_gradient_of_a_constant_and_of_what_has_none() -> None:
    x = normal(3, 2)
    assert torch.equal(gradient(lambda x: torch.ones(len(x)), x)[1], torch.zeros(3, 2))
    assert torch.equal(torch.func.vmap(lambda x: gradient(lambda x: torch.ones(len(x)), x)[1])(x[None]), 0 * x[None])
    with pytest.raises(ValueError, match="no derivative by x"):
        gradient(lambda x: x.detach().sum(1), x)
    with pytest.raises(ValueError, match="no derivative by x"):
        torch.func.jvp(lambda x: gradient(lambda x: x.detach().sum(1), x)[1], (x,), (x,))
    with pytest.raises(ValueError, match=r"returned \(3, 2\): expected a value per sample"):
        gradient(lambda x: x, x)
    with pytest.raises(ValueError, match="returned NoneType"):
        gradient(lambda x: None, x)


def test_shifted_is_tweedie_and_finite_where_alpha_is_zero() -> None:
    sde, x, g = VPSDE(), normal(3, 2), normal(3, 2, seed=1)
    model = Gaussian([1.0, 0.0], std=0.5).denoiser(sde)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    D = shifted(model(x, t).mean, g, sde, t)
    alpha, sigma = sde.alpha(t)[:, None], sde.sigma(t)[:, None]
    assert torch.allclose((alpha * D - x) / sigma**2, model.score(x, t) + g, rtol=1e-12)
    assert torch.equal(shifted(x, g, CosineVPSDE(t_max=1.0), 1.0), x)
    assert torch.equal(shifted(x, g, sde, 0.0), x)


# ---------------------------------------------------------------------------------------------------------- classifier


@pytest.mark.parametrize("event", [(), (2,), (1, 2, 2)], ids=str)
@pytest.mark.parametrize("name", SDES)
def test_exact_classifier_at_scale_one_is_the_conditional(name: str, event: tuple[int, ...]) -> None:
    sde = SDES[name]
    data, label = Labelled(sde, event), torch.tensor([0, 1, 2, 1])
    nets = [EpsDenoiser(data.net("eps"), sde), VDenoiser(data.net("v"), sde), data.whole.denoiser(sde)]
    for level in (-3.0, 0.0, 3.0):
        t = middle(sde, level)
        x = sde.perturb(data.whole.sample(4, generator(1), torch.float64), t, normal(4, *event))
        expected = torch.stack([data.of(int(k))(x, t).mean[i] for i, k in enumerate(label)])
        score = torch.stack([data.of(int(k)).score(x, t)[i] for i, k in enumerate(label)])
        for denoiser in nets:
            guided = Classifier(denoiser, data.logits, label=label)
            found = guided(x, torch.full((4,), t, dtype=torch.float64)).mean
            assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)
            assert torch.allclose(guided.score(x, t), score, rtol=1e-9, atol=1e-9 / float(sde.sigma(t)) ** 2)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ["vp", "subvp", "ve", "chain"])
def test_exact_classifier_samples_the_conditional_under_every_solver(name: str, solver: str) -> None:
    sde = SDES[name]
    data, grid = Labelled(sde), grid_of(sde)
    x_T = sde.prior((3, 2), generator(2), torch.float64)
    guided = Classifier(EpsDenoiser(data.net("eps"), sde), data.logits)
    found = sample(guided, x_T, SOLVERS[solver], grid=grid, seed=0, cond={"label": torch.tensor([2])})
    expected = sample(data.of(2), x_T, SOLVERS[solver], grid=grid, seed=0)
    assert torch.allclose(found.x, expected.x, rtol=1e-7, atol=1e-7)
    assert found.nfe == expected.nfe
    assert data.calls == [3] * found.nfe


@pytest.mark.parametrize("entry", available(), ids=lambda entry: entry.name)
def test_every_solver_of_the_catalogue_samples_the_conditional(entry: Entry) -> None:
    """By exact classifier guidance at scale 1, and by classifier-free guidance at the weight that is the same."""
    data, x_T = Labelled(VPSDE()), normal(2, 2)
    net = EpsDenoiser(data.net("eps"), VPSDE())
    options: dict[str, Any] = {"seed": 0, "nfe": 60} if entry.adaptive else {"seed": 0, "steps": 5}
    expected = sample(data.of(1), x_T, entry.solver, **options)
    by_classifier = sample(Classifier(net, data.logits, label=1), x_T, entry.solver, **options)
    free = ClassifierFree(net, torch.ones(2), null=NULL, interval=(0.0, 1.0))
    for found in (by_classifier, sample(free, x_T, entry.solver, cond={"label": 1}, **options)):
        assert torch.allclose(found.x, expected.x, rtol=1e-6, atol=1e-6)
        assert found.nfe == expected.nfe


def test_inference_mode() -> None:
    data = Labelled(VPSDE())
    with torch.inference_mode():
        x_T, label = normal(2, 2), torch.tensor([0, 0])
        for guided in (
            Classifier(EpsDenoiser(data.net("eps"), VPSDE()), data.logits),
            ClassifierFree(EpsDenoiser(data.net("eps"), VPSDE()), 1.0, null=NULL),
        ):
            found = sample(guided, x_T, DDIM(), steps=4, cond={"label": label}).x
            assert torch.allclose(found, sample(data.of(0), x_T, DDIM(), steps=4).x, atol=1e-9)
        clean = Energy(EpsDenoiser(data.net("eps"), VPSDE()), lambda x0: -x0.sum(1), clean=True)
        inside = sample(clean, x_T, DDIM(), steps=4, cond={"label": label}).x
    outside = sample(clean, normal(2, 2), DDIM(), steps=4, cond={"label": torch.tensor([0, 0])}).x
    assert torch.equal(inside, outside)


def test_samples_are_of_the_class() -> None:
    """5,000 samples by the guided reverse SDE: mean and covariance of p(x | y), at 5 standard errors."""
    data = Labelled(VPSDE())
    guided = Classifier(data.whole.denoiser(VPSDE()), data.logits, label=1)
    x = sample(guided, (5000, 2), DPMSolverPP(2, stochastic=True), steps=40, generator=generator(1)).x.double()
    mean, cov = data.parts[1].moments()
    assert bool(((x.mean(0) - mean).abs() < 5 * (cov.diag() / 5000).sqrt() + 0.01).all())
    assert torch.allclose(x.T.cov(), cov, atol=0.12)


def test_scale_multiplies_the_gradient() -> None:
    sde = VESDE()
    data, x, t = Labelled(sde), 2 * normal(3, 2), middle(sde)
    plain = data.whole.denoiser(sde)
    g = Classifier(plain, data.logits, label=1).score(x, t) - plain.score(x, t)
    for scale, expected in (
        (2.5, 2.5 * g),
        (torch.tensor([0.0, 1.0, -2.0]), torch.tensor([[0.0], [1.0], [-2.0]]) * g),
        (lambda t: sde.sigma(t), sde.sigma(t) * g),
    ):
        guided = Classifier(plain, data.logits, scale, label=1)
        assert torch.allclose(guided.score(x, t) - plain.score(x, t), expected, rtol=1e-9)
        assert torch.allclose(guided.eps(x, t), plain.eps(x, t) - sde.sigma(t) * expected, rtol=1e-9)


def test_conditions_go_where_they_should() -> None:
    """The label to the classifier alone, or to both; anything else to the network."""
    data, x, labels = Labelled(VPSDE()), normal(3, 2), torch.tensor([0, 1, 2])
    seen: list[dict[str, Any]] = []

    def net(x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        seen.append(cond)
        return data.net("eps")(x, t)

    denoiser = EpsDenoiser(net, VPSDE())
    by_call = Classifier(denoiser, data.logits)(x, 0.3, label=labels, other=1).mean
    Classifier(denoiser, data.logits, conditional=True)(x, 0.3, label=labels)
    renamed = Classifier(denoiser, data.logits, label="of")(x, 0.3, of=labels, label=1).mean
    fixed = Classifier(denoiser, data.logits, label=labels)(x, 0.3).mean
    assert [list(cond) for cond in seen] == [["other"], ["label"], ["label"], []]
    assert torch.equal(by_call, fixed)
    assert torch.equal(by_call, renamed)


def test_log_probabilities_and_logits_are_the_same() -> None:
    data, x = Labelled(VPSDE()), normal(3, 2)
    normalised = Classifier(data.whole.denoiser(VPSDE()), lambda x, t: data.logits(x, t).log_softmax(1), label=0)
    shift = Classifier(data.whole.denoiser(VPSDE()), lambda x, t: data.logits(x, t) + 7.0, label=0)
    assert torch.allclose(normalised(x, 0.4).mean, shift(x, 0.4).mean, rtol=1e-12)


def test_clean_classifier_is_the_gradient_through_the_network() -> None:
    """Against central finite differences of log p(y | D(x)), with a network that mixes the elements."""
    sde, x, t, h = VPSDE(), normal(3, 1, 4), 0.4, 1e-5
    torch.manual_seed(0)
    net = MLP((1, 4), width=16, depth=1).double()
    torch.nn.init.normal_(net.outward.weight, generator=generator(3))
    head = torch.nn.Linear(4, 3).double()
    classifier, label = torch.nn.Sequential(torch.nn.Flatten(), head, torch.nn.Tanh()), torch.tensor([0, 2, 1])
    denoiser = EpsDenoiser(net, sde)
    guided = Classifier(denoiser, classifier, 1.7, label=label, clean=True)

    def density(x: Tensor) -> Tensor:
        return guided.log_prob(denoiser(x, t).mean, t, label)

    with torch.no_grad():
        g = torch.zeros_like(x)
        for i in range(4):
            step = h * torch.eye(4, dtype=torch.float64)[i]
            g[:, 0, i] = (density(x + step) - density(x - step)) / (2 * h)
        assert torch.allclose(guided.score(x, t), denoiser.score(x, t) + 1.7 * g, rtol=1e-6, atol=1e-8)
    assert all(p.grad is None for p in [*net.parameters(), *classifier.parameters()])


def test_samples_are_differentiable_through_guidance() -> None:
    """By x_T and by what the classifier is made of, against central finite differences."""
    data, h = Labelled(VPSDE()), 1e-6
    net = EpsDenoiser(data.net("eps"), VPSDE())

    def end(x_T: Tensor, a: Tensor, clean: bool) -> Tensor:
        guided = Classifier(
            net, lambda x, *t: a * torch.stack([x.sum(1), x.prod(1)], dim=1).tanh(), label=1, clean=clean
        )
        return sample(guided, x_T, DDIM(), steps=3, differentiable=True).x.square().sum()

    for clean in (False, True):
        x_T, a = normal(2, 2).requires_grad_(), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        found = torch.autograd.grad(end(x_T, a, clean), (x_T, a))
        with torch.no_grad():
            step = h * normal(2, 2, seed=1)
            by_x = float(end(x_T + step, a, clean) - end(x_T - step, a, clean)) / 2
            by_a = float(end(x_T, a + h, clean) - end(x_T, a - h, clean)) / 2 / h
        assert math.isclose(float((found[0] * step).sum()), by_x, rel_tol=1e-5)
        assert math.isclose(float(found[1]), by_a, rel_tol=1e-5)


def test_clean_guidance_calls_the_network_once_an_evaluation() -> None:
    data, x_T = Labelled(VPSDE()), normal(3, 2)
    net = EpsDenoiser(data.net("eps"), VPSDE())
    for guided in (Classifier(net, lambda x: x, label=1, clean=True), Energy(net, distance(torch.ones(2)), clean=True)):
        data.calls.clear()
        assert sample(guided, x_T, UniPC(2), steps=5).nfe == 5
        assert data.calls == [3] * 5


def test_ddim_form_of_dhariwal_and_nichol() -> None:
    """Their algorithm 2, literally: eps_hat = eps - sqrt(1 - abar) w g, and a DDIM step with it."""
    sde = DDPMChain()
    data, w, x = Labelled(sde), 3.0, normal(4, 2)
    eps = EpsDenoiser(data.net("eps"), sde)
    guided = Classifier(eps, data.logits, w, label=2)
    found = sample(guided, x, DDIM(), grid=Grid(sde, [700.0, 400.0, 0.0])).x
    for t, s in ((700.0, 400.0), (400.0, 0.0)):
        abar_t, abar_s = float(sde.alpha(t)) ** 2, float(sde.alpha(s)) ** 2
        _, g = gradient(lambda x, t=t: data.logits(x, t).log_softmax(1)[:, 2], x)
        eps_hat = eps.eps(x, t) - math.sqrt(1 - abar_t) * w * g
        x0 = (x - math.sqrt(1 - abar_t) * eps_hat) / math.sqrt(abar_t)
        x = math.sqrt(abar_s) * x0 + math.sqrt(1 - abar_s) * eps_hat
    assert torch.allclose(found, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variance", ["beta", "posterior"])
def test_mean_shift_of_dhariwal_and_nichol(variance: Any) -> None:
    """Their algorithm 1 moves the mean by w Sigma g; DDPM on the guided denoiser by that times a ratio that tends to 1.

    From t to s it is alpha_s / alpha_t for Sigma = beta, and (alpha_s / alpha_t) (sigma_t / sigma_s)^2 for the other.
    """
    sde, w = VPSDE(), 3.0
    data, x = Labelled(sde), normal(4, 2)
    plain = data.whole.denoiser(sde)
    guided, ratios = Classifier(plain, data.logits, w, label=2), []
    for h in (0.1, 0.01, 0.001):
        table = DDPM(variance).tableau(Grid(sde, [0.5, 0.5 - h, 0.0]))
        sigma = float(table.c[0])
        _, g = gradient(lambda x: data.logits(x, 0.5).log_softmax(1)[:, 2], x)
        moved = float(table.b[0, 0]) * (guided(x, 0.5).mean - plain(x, 0.5).mean)
        alpha_t, alpha_s, sigma_t, sigma_s = (
            float(scale(t)) for scale in (sde.alpha, sde.sigma) for t in (0.5, 0.5 - h)
        )
        ratio = alpha_s / alpha_t * (1.0 if variance == "beta" else (sigma_t / sigma_s) ** 2)
        assert torch.allclose(moved, ratio * w * sigma**2 * g, rtol=1e-9, atol=1e-12)
        ratios.append(ratio - 1)
    assert 0 < ratios[2] < 0.11 * ratios[1] < 0.02 * ratios[0]


def test_ddpm_mean_of_the_guided_denoiser_is_the_conditional_mean() -> None:
    """E[x_s | x_t, y], which the mean shift expands to first order, by 200,000 draws of x_0, x_s given x_t and y."""
    sde, t, s = VPSDE(), 0.5, 0.3
    target = Gaussian([1.0], std=0.5)
    x = torch.tensor([[0.4]], dtype=torch.float64)
    energy = distance(torch.tensor([2.0]), std=0.5)  # y = 2 = x_0 + noise of std 0.5
    v = 1 / (1 / 0.25 + float(sde.alpha(t) / sde.sigma(t)) ** 2)
    guided = Energy(target.denoiser(sde), energy, 1 / (1 + v / 0.25), clean=True)
    tilted_v = 1 / (1 / v + 1 / 0.25)
    table = DDPM().tableau(Grid(sde, [t, s, 0.0]))
    a, b, c = float(table.a[0]), float(table.b[0, 0]), float(table.c[0])
    D = guided(x, t).mean.detach()
    x0 = D + math.sqrt(tilted_v) * normal(200_000, 1)
    draws = a * x + b * x0 + c * normal(200_000, 1, seed=1)  # p(x_s | x_t, x_0), p(x_0 | x_t, y)
    assert abs(float(draws.mean() - (a * x + b * D))) < 5 * float(draws.std()) / math.sqrt(200_000)


# --------------------------------------------------------------------------------------------- training a classifier


def test_classifier_loss_is_least_at_the_exact_classifier() -> None:
    """d/da E[loss] of logits a l(x) is zero at a = 1 for exact l, within 5 standard errors; without logits log K."""
    data = Labelled(VPSDE())
    labels = torch.multinomial(data.prior, 4000, replacement=True, generator=generator(0))
    x0 = torch.stack([data.parts[k].sample(1, generator(i), torch.float64)[0] for i, k in enumerate(labels.tolist())])
    a = torch.ones(4000, 1, dtype=torch.float64, requires_grad=True)
    loss = classifier_loss(
        lambda x, t: a * data.logits(x, t), VPSDE(), x0, labels, generator=generator(1), reduction="none"
    )
    (slope,) = torch.autograd.grad(loss.sum(), a)
    assert abs(float(slope.mean())) < 5 * float(slope.std()) / math.sqrt(4000)
    even = classifier_loss(lambda x, t: torch.zeros(len(x), 3), VPSDE(), x0, labels)
    assert math.isclose(float(even), math.log(3), rel_tol=1e-6)


def test_classifier_loss_of_parts_and_of_other_times() -> None:
    data, labels = Labelled(VESDE()), torch.tensor([0, 1, 2, 0])
    x0 = data.whole.sample(4, generator(0), torch.float64)
    options: dict[str, Any] = {"times": LogNormalTimes(), "reduction": "none"}
    whole = classifier_loss(data.logits, VESDE(), x0, labels, generator=generator(1), **options)
    halves = [
        classifier_loss(
            data.logits, VESDE(), x0[i : i + 2], labels[i : i + 2], generator=Part(generator(1), i, 4), **options
        )
        for i in (0, 2)
    ]
    assert torch.allclose(whole, torch.cat(halves), rtol=1e-12)
    told: list[Tensor] = []

    def even(x: Tensor, time: Tensor) -> Tensor:
        told.append(time)
        return torch.zeros(len(x), 3, dtype=x.dtype)

    rare = ImportanceTimes()  # log 3, times what these draws weigh
    weighed = classifier_loss(even, VESDE(), x0, labels, times=rare, generator=generator(1), reduction="none")
    assert torch.allclose(weighed, rare.ratio(VESDE(), told.pop()) * math.log(3), rtol=1e-9)

    def classifier(x: Tensor, time: Tensor) -> Tensor:
        told.append(time)
        return data.logits(x, time)

    classifier_loss(classifier, VESDE(), x0, labels, t=torch.tensor(0.5), time=lambda t: 10 * t)
    Classifier(data.whole.denoiser(VESDE()), classifier, label=0, time=lambda t: 10 * t)(x0, 0.5)
    assert [t.tolist() for t in told] == [[5.0] * 4] * 2


# ------------------------------------------------------------------------------------------------------ classifier-free


NETWORKS = {"eps": EpsDenoiser, "x0": X0Denoiser, "v": VDenoiser, "score": ScoreDenoiser}


@pytest.mark.parametrize("event", [(), (2,), (1, 2, 2)], ids=str)
@pytest.mark.parametrize("name", ["vp", "ve", "flow", "chain"])
def test_weights_of_both_conventions(name: str, event: tuple[int, ...]) -> None:
    """D_u + w (D_c - D_u) in every network's own output, in one call of 2 B; equal to the classifier's at scale w."""
    sde = SDES[name]
    data, label = Labelled(sde, event), torch.tensor([0, 1, 2, 1])
    t = middle(sde)
    x = sde.perturb(data.whole.sample(4, generator(1), torch.float64), t, normal(4, *event))
    D_u = data.whole.denoiser(sde)(x, t).mean
    D_c = torch.stack([data.of(int(k))(x, t).mean[i] for i, k in enumerate(label)])
    for view, kind in NETWORKS.items():
        denoiser = kind(data.net(view), sde)
        for w in (-1.0, 0.5, 3.0):
            data.calls.clear()
            scale = ClassifierFree(denoiser, w, null=NULL)(x, t, label=label).mean
            assert data.calls == [8]
            strength = ClassifierFree(denoiser, w - 1, null=NULL, convention="strength")(x, t, label=label).mean
            assert torch.allclose(scale, D_u + w * (D_c - D_u), rtol=1e-9, atol=1e-9)
            assert torch.allclose(strength, w * D_c - (w - 1) * D_u, rtol=1e-9, atol=1e-9)
            by_classifier = Classifier(denoiser, data.logits, w)(x, t, label=label).mean
            assert torch.allclose(scale, by_classifier, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("solver", SOLVERS)
def test_conditional_only_and_unconditional_only(solver: str) -> None:
    """Bit for bit, in float32, from one call of B an evaluation, under every solver."""
    sde = VPSDE()
    data, x_T, labels = Labelled(sde), normal(3, 2, dtype=torch.float32), torch.tensor([0, 1, 2])
    denoiser = EpsDenoiser(data.net("eps"), sde)
    options: dict[str, Any] = {"grid": grid_of(sde), "seed": 0}
    conditional = sample(denoiser, x_T, SOLVERS[solver], cond={"label": labels}, **options)
    unconditional = sample(denoiser, x_T, SOLVERS[solver], **options)
    data.calls.clear()
    for w, convention, expected in (
        (1, "scale", conditional),
        (0, "scale", unconditional),
        (0, "strength", conditional),
    ):
        guided = ClassifierFree(denoiser, w, null=NULL, convention=convention)
        found = sample(guided, x_T, SOLVERS[solver], cond={"label": labels}, **options)
        assert torch.equal(found.x, expected.x)
        assert found.nfe == expected.nfe
    assert set(data.calls) == {3}
    assert not torch.equal(conditional.x, unconditional.x)


def test_guidance_on_a_subset_of_channels() -> None:
    """The published sampler of DiT, eps[:, :3] of a latent's four: the others are the conditional model's, whatever the
    network predicts.
    """
    data, label, sde = Labelled(VPSDE(), (4, 2)), torch.tensor([0, 1, 2]), VPSDE()
    x, t = normal(3, 4, 2), 0.4
    told_nothing = Conditioned(data.whole.denoiser(sde), drop=("label",))
    for view in ("eps", "v"):
        denoiser = NETWORKS[view](data.net(view), sde)
        conditional, unconditional = denoiser(x, t, label=label).mean, data.whole.denoiser(sde)(x, t).mean
        for w in (0.0, 4.0, torch.tensor([0.0, 1.0, 3.0])):
            each = torch.as_tensor(w, dtype=torch.float64).reshape(-1, 1, 1)
            expected = unconditional + each * (conditional - unconditional)
            guided = ClassifierFree(denoiser, w, null=NULL, channels=range(3))
            found = guided(x, t, label=label).mean
            torch.testing.assert_close(found[:, :3], expected[:, :3])
            torch.testing.assert_close(found[:, 3:], conditional[:, 3:])
            torch.testing.assert_close(
                ClassifierFree(denoiser, w, null=NULL, channels=[2, 0, 1, 3])(x, t, label=label).mean, expected
            )
            weak = Autoguidance(denoiser, told_nothing, w, channels=(3,))(x, t, label=label).mean
            torch.testing.assert_close(weak[:, 3:], expected[:, 3:])
            torch.testing.assert_close(weak[:, :3], conditional[:, :3])
    run = {"steps": 4, "seed": 0, "cond": {"label": label}}
    for w, same in ((1.0, True), (4.0, False)):
        found = sample(ClassifierFree(denoiser, w, null=NULL, channels=[1]), x, DDIM(), **run).x
        assert torch.equal(found, sample(denoiser, x, DDIM(), **run).x) == same
    assert "channels=(0, 2)" in repr(ClassifierFree(denoiser, channels=(0, 2)))


def test_a_rule_sees_the_channels_that_are_guided_alone() -> None:
    data, label, x = Labelled(VPSDE(), (4, 2)), torch.tensor([0, 1, 2]), normal(3, 4, 2)
    denoiser, seen = X0Denoiser(data.net("x0"), VPSDE()), []

    def rule(D_1: Tensor, D_0: Tensor, w: Tensor) -> Tensor:
        seen.append((D_1, D_0))
        return torch.zeros_like(D_1)

    found = ClassifierFree(denoiser, 2.0, null=NULL, rule=Rule(rule, "x0"), channels=[3, 1])(x, 0.5, label=label).mean
    conditional = denoiser(x, 0.5, label=label).mean
    assert torch.allclose(seen[0][0], conditional[:, [3, 1]])
    assert seen[0][1].shape == (3, 2, 2)
    assert not found[:, [1, 3]].any()
    assert torch.allclose(found[:, [0, 2]], conditional[:, [0, 2]])


@pytest.mark.parametrize("channels", [[], [1, 1], [-1], [0.5], [4]])
def test_channels_that_are_none(channels: Any) -> None:
    denoiser = EpsDenoiser(Labelled(VPSDE(), (4, 2)).net("eps"), VPSDE())
    with pytest.raises(ValueError, match="channels"):
        ClassifierFree(denoiser, null=NULL, channels=channels)(normal(2, 4, 2), 0.5, label=torch.tensor([0, 1]))


def test_per_sample_weights_and_functions_of_t() -> None:
    data, x, label = Labelled(VPSDE()), normal(3, 2), torch.tensor([2, 0, 1])
    denoiser = EpsDenoiser(data.net("eps"), VPSDE())
    w = torch.tensor([0.0, 1.0, 4.0])
    together = ClassifierFree(denoiser, w, null=NULL).eps(x, 0.3, label=label)
    for i in range(3):
        alone = ClassifierFree(denoiser, float(w[i]), null=NULL).eps(x[i : i + 1], 0.3, label=label[i : i + 1])
        assert torch.allclose(together[i], alone[0], rtol=1e-12)
    times = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    rising = ClassifierFree(denoiser, lambda t: 1 + 2 * t, null=NULL).eps(x, times, label=label)
    for i, t in enumerate(times.tolist()):
        alone = ClassifierFree(denoiser, 1 + 2 * t, null=NULL).eps(x[i : i + 1], t, label=label[i : i + 1])
        assert torch.allclose(rising[i], alone[0], rtol=1e-12)


@pytest.mark.parametrize(
    "null", [{"label": 3}, {"label": torch.tensor(3)}, {"label": torch.tensor([3])}, ("label",), None]
)
def test_null_is_a_value_or_a_name_or_left_out(null: Any) -> None:
    data, x = Labelled(VPSDE()), normal(3, 2)
    denoiser = EpsDenoiser(data.net("eps"), VPSDE())
    by_value = isinstance(null, dict)
    for label in (2, torch.tensor(2), torch.tensor([2]), torch.tensor([2, 2, 2])):
        expected = 3 * data.of(2).eps(x, 0.3) - 2 * data.whole.denoiser(VPSDE()).eps(x, 0.3)
        for batched in (True, False):
            data.calls.clear()
            guided = ClassifierFree(denoiser, 3.0, null=null, batched=batched)
            assert torch.allclose(guided.eps(x, 0.3, label=label), expected, rtol=1e-9, atol=1e-12)
            assert data.calls == ([6] if by_value and batched else [3, 3])


def test_null_class_of_our_networks_is_found() -> None:
    for net, event in (
        (MLP(2, width=16, depth=1, num_classes=4), (2,)),
        (UNet(1, 8, (1, 2), 1, num_classes=4), (1, 8, 8)),
    ):
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.1, generator=generator(0))
        denoiser = EpsDenoiser(net.double().eval(), VPSDE())
        x, label = normal(3, *event), torch.tensor([0, 3, 4])
        guided = ClassifierFree(denoiser, 2.0)
        expected = 2 * denoiser.eps(x, 0.5, label=label) - denoiser.eps(x, 0.5, label=torch.tensor(4))
        assert guided.null == {"label": 4}
        assert torch.allclose(guided.eps(x, 0.5, label=label), expected, rtol=1e-9, atol=1e-12)
        with pytest.raises(ValueError, match=r"label .* is outside the 4 classes of the network: expected 0 to 3"):
            guided.eps(x, 0.5, label=5)


def test_by_default_our_networks_are_told_nothing_of_any_condition() -> None:
    """As `TrainingData(drop=)` trains them: all that is given is dropped at once, and what is not given stays so."""
    unet: dict[str, Any] = {"image_channels": 1, "channels": 8, "multipliers": (1, 2), "blocks": 1}
    x, label = normal(3, 1, 8, 8), torch.tensor([0, 3, 4])
    vector, image = normal(3, 3, seed=1), normal(3, 2, 8, 8, seed=2)
    for net, cond in (
        (UNet(**unet, num_classes=4, vector=3, image_condition=2), {"label": label, "vector": vector, "image": image}),
        (UNet(**unet, num_classes=4, image_condition=2), {"image": image}),
        (UNet(**unet, vector=3), {"vector": vector}),
        (UNet(**unet, vector=3), {"vector": vector[:1]}),
        (UNet(**unet, image_condition=2), {"image": image}),
        (DiT(1, 4, 8, 1, 2, num_classes=4, image_condition=2), {"label": label, "image": image}),
        (MLP((1, 8, 8), width=16, depth=1, num_classes=4, vector=3), {"label": label, "vector": vector}),
    ):
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.1, generator=generator(0))
        denoiser = EpsDenoiser(net.double().eval().requires_grad_(False), VPSDE())
        D_c, D_u = denoiser.eps(x, 0.5, **cond), denoiser.eps(x, 0.5, **nothing(cond, 4))
        assert float((D_c - D_u).abs().max()) > 1e-3
        for batched in (True, False):
            found = ClassifierFree(denoiser, 3.0, batched=batched).eps(x, 0.5, **cond)
            assert torch.allclose(found, 3 * D_c - 2 * D_u, rtol=1e-9, atol=1e-12)
        with pytest.raises(ValueError, match="classifier-free guidance without a condition"):
            ClassifierFree(denoiser)(x, 0.5)
    # Of a network of one's own as well, if it says what it can be told.
    own = torch.nn.Identity()
    own.condition_sizes = {"label": 4, "text": 7}
    assert ClassifierFree(EpsDenoiser(own, VPSDE())).null == {"label": 4, "text": 0}
    # Of a network that was never without its image, the label alone is null.
    net = UNet(**unet, num_classes=4, image_condition=2)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1, generator=generator(0))
    denoiser = EpsDenoiser(net.double().eval(), VPSDE())
    expected = 3 * denoiser.eps(x, 0.5, label=label, image=image) - 2 * denoiser.eps(x, 0.5, image=image)
    found = ClassifierFree(denoiser, 3.0, null={"label": 4}).eps(x, 0.5, label=label, image=image)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(), (5,), (1, 2, 2)], ids=str)
def test_any_condition_shape(shape: tuple[int, ...]) -> None:
    """Of a number, a vector and an image a sample, together with a condition that both branches keep."""
    x, y, kept = normal(3, 2), normal(3, *shape, seed=1), normal(3, 4, seed=2)
    calls: list[tuple[int, ...]] = []

    def net(x: Tensor, t: Tensor, y: Tensor, kept: Tensor, name: str) -> Tensor:
        calls.append((len(x), len(y), len(kept)))
        return x * y.reshape(len(y), -1).sum(1, keepdim=True).sin() + kept.sum(1, keepdim=True)

    denoiser = EpsDenoiser(net, VPSDE())
    cond = {"y": y, "kept": kept, "name": "a string"}
    expected = 3 * net(x, x, **cond) - 2 * net(x, x, torch.ones_like(y), kept, "")
    calls.clear()
    for null in (torch.ones(shape).double(), torch.ones(1, *shape), torch.ones(3, *shape)):
        found = ClassifierFree(denoiser, 3.0, null={"y": null}).eps(x, 0.3, **cond)
        assert torch.allclose(found, expected, rtol=1e-12)
    assert calls == [(6, 6, 6)] * 3


def test_interval_of_noise_levels() -> None:
    """Guided for 0.3 < sigma / alpha <= 2; the conditional model elsewhere, by calls of B."""
    sde = VESDE()
    data, label = Labelled(sde), torch.tensor([0, 1, 2])
    denoiser = EpsDenoiser(data.net("eps"), sde)
    guided, full = (ClassifierFree(denoiser, 3.0, null=NULL, interval=i) for i in ((0.3, 2.0), None))
    levels = torch.tensor([0.1, 0.3, 0.31, 2.0, 2.1], dtype=torch.float64)
    for sigma, inside in zip(levels, (False, False, True, True, False), strict=True):
        t: Any = float(sde.time_at(-sigma.log())) * (1 + 1e-12 * (1 if sigma == 0.3 else -1) * (1 if inside else -1))
        x = sde.perturb(data.whole.sample(3, generator(0), torch.float64), t, normal(3, 2))
        data.calls.clear()
        found = guided.eps(x, t, label=label)
        assert data.calls == [6 if inside else 3]
        assert torch.equal(found, (full if inside else denoiser).eps(x, t, label=label))
    level = float((-sde.half_log_snr(0.4)).exp())  # an end itself: the upper one belongs to the interval
    for interval, model in (((0.0, level), full), ((level, math.inf), denoiser)):
        found = ClassifierFree(denoiser, 3.0, null=NULL, interval=interval).eps(normal(3, 2), 0.4, label=label)
        assert torch.equal(found, model.eps(normal(3, 2), 0.4, label=label))
    t = sde.time_at(-torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64).log())
    x = normal(3, 2)
    expected = torch.stack([m.eps(x, t, label=label)[i] for i, m in enumerate((denoiser, full, denoiser))])
    assert torch.allclose(guided.eps(x, t, label=label), expected, rtol=1e-9)
    data.calls.clear()
    grid = Grid.log_snr(sde, 12, end=0.01)
    sample(guided, (3, 2), DDIM(), grid=grid, seed=0, cond={"label": label})
    on = ((sde.sigma(grid.times[:-1]) > 0.3) & (sde.sigma(grid.times[:-1]) <= 2.0)).tolist()
    assert data.calls == [6 if guides else 3 for guides in on]
    assert any(on)


def test_rescaling_gives_back_the_conditional_spread() -> None:
    """std(D') is phi std(D_c) + (1 - phi) std(D), per sample, whatever the network predicts."""
    data, x, label = Labelled(VPSDE(), (1, 2, 2)), normal(3, 1, 2, 2), torch.tensor([0, 1, 2])
    results = []
    for view, kind in NETWORKS.items():
        denoiser = kind(data.net(view), VPSDE())
        D_c = denoiser(x, 0.3, label=label).mean
        D = ClassifierFree(denoiser, 6.0, null=NULL)(x, 0.3, label=label).mean
        for phi in (0.7, 1.0):
            found = ClassifierFree(denoiser, 6.0, null=NULL, rescale=phi)(x, 0.3, label=label).mean
            std, std_c, std_w = (y.flatten(1).std(1) for y in (found, D_c, D))
            assert torch.allclose(std, phi * std_c + (1 - phi) * std_w, rtol=1e-9)
            assert torch.allclose(found / D, (found / D)[:, :, :1, :1].expand_as(D), rtol=1e-9)
        results.append(found)
        same = sample(ClassifierFree(denoiser, 1.0, null=NULL, rescale=0.7), x, DDIM(), steps=3, cond={"label": label})
        assert torch.allclose(same.x, sample(denoiser, x, DDIM(), steps=3, cond={"label": label}).x, atol=1e-9)
    for other in results[1:]:
        assert torch.allclose(other, results[0], rtol=1e-9, atol=1e-9)


def test_projection_takes_away_what_is_parallel() -> None:
    data, x, label = Labelled(VPSDE(), (1, 2, 2)), normal(3, 1, 2, 2), torch.tensor([0, 1, 2])
    denoiser = VDenoiser(data.net("v"), VPSDE())
    cond = {"label": label}
    D_c, D_u = denoiser(x, 0.3, **cond).mean.flatten(1), denoiser(x, 0.3).mean.flatten(1)
    delta = D_c - D_u
    found = ClassifierFree(denoiser, 4.0, null=NULL, parallel=0.0)(x, 0.3, **cond).mean.flatten(1)
    orthogonal = delta - (delta * D_c).sum(1, keepdim=True) / D_c.square().sum(1, keepdim=True) * D_c
    assert torch.allclose(found - D_c, 3 * orthogonal, rtol=1e-9, atol=1e-12)
    assert float(((found - D_c) * D_c).sum(1).abs().max()) < 1e-12
    r = float(delta.norm(dim=1).median())
    cut = ClassifierFree(denoiser, 4.0, null=NULL, max_norm=r)(x, 0.3, **cond).mean.flatten(1)
    assert torch.allclose((cut - D_c).norm(dim=1), 3 * delta.norm(dim=1).clamp(max=r), rtol=1e-9)
    # A norm that none reaches cuts nothing: beyond float32's largest number too, and where both branches are one.
    uncut = 4 * D_c - 3 * D_u
    for most in (math.inf, 1e300):
        free = ClassifierFree(denoiser, 4.0, null=NULL, max_norm=most)
        assert torch.allclose(free(x, 0.3, **cond).mean.flatten(1), uncut, rtol=1e-9, atol=1e-12)
        found = free(x.float(), 0.3, **cond).mean.flatten(1)
        assert torch.allclose(found, uncut.float(), rtol=1e-4, atol=1e-4)
        same = free(x, 0.3, label=torch.tensor(3)).mean.flatten(1)
        assert torch.allclose(same, D_u, rtol=1e-9, atol=1e-12)


def test_every_rule_is_listed() -> None:
    """A function of (F_1, F_0, w) that is in no list would be tested by nobody."""
    written = {f for f in vars(rules).values() if isfunction(f) and list(signature(f).parameters)[2:3] == ["w"]}
    assert written == {rule.function for rule in RULES.values()}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", SDES)
def test_rules(name: str, rule: str) -> None:
    """F' is the function of both predictions in the rule's view, whatever the network predicts, from one call of 2 B;
    of each sample by itself; at w = 1 it is F_1, bit for bit, from one of B. The same of two models."""
    sde, view = SDES[name], RULES[rule].view or "v"
    data, label, t = Labelled(sde, (1, 2, 2)), torch.tensor([0, 1, 2]), middle(sde)
    x = sde.perturb(data.whole.sample(3, generator(1), torch.float64), t, normal(3, 1, 2, 2))
    w = torch.tensor([-1.0, 0.0, 3.0]).double()
    F_1 = torch.stack([data.of(k).view(view, x, t)[k] for k in range(3)])
    expected = RULES[rule](F_1, data.whole.denoiser(sde).view(view, x, t), w)
    assert torch.allclose(RULES[rule](F_1, expected, torch.ones(())), F_1, rtol=1e-12)
    for network, kind in NETWORKS.items():
        denoiser = kind(data.net(network), sde)
        free = ClassifierFree(denoiser, w, null=NULL, rule=rule)
        data.calls.clear()
        assert torch.allclose(free.view(view, x, t, label=label), expected, rtol=1e-8, atol=1e-8)
        assert data.calls == [6]
        weak = Autoguidance(denoiser, Conditioned(X0Denoiser(data.net("x0"), sde), drop="label"), w, rule=RULES[rule])
        assert torch.allclose(weak.view(view, x, t, label=label), expected, rtol=1e-8, atol=1e-8)
        for i in range(3):
            alone = ClassifierFree(denoiser, float(w[i]), null=NULL, rule=rule)
            found = alone.view(view, x[i : i + 1], t, label=label[i : i + 1])
            assert torch.allclose(found, expected[i : i + 1], rtol=1e-8, atol=1e-8)
        for off in ({"weight": 1}, {"weight": 3.0, "interval": (1e8, 1e9)}):
            data.calls.clear()
            found = ClassifierFree(denoiser, null=NULL, rule=rule, **off)(x, t, label=label).mean
            assert data.calls == [3]
            assert torch.equal(found, denoiser(x, t, label=label).mean)


@pytest.mark.parametrize("name", SDES)
def test_cfg_zero_is_the_published_formula(name: str) -> None:
    """In the velocity; what is added to v_c is orthogonal to v_u."""
    sde = SDES[name]
    data, t, x = Labelled(sde, (1, 2, 2)), middle(sde), normal(3, 1, 2, 2)
    v_u, v_c = (d.velocity(x, t).flatten(1) for d in (data.whole.denoiser(sde), data.of(1)))
    s = (v_c * v_u).sum(1, keepdim=True) / (v_u * v_u).sum(1, keepdim=True)
    guided = ClassifierFree(EpsDenoiser(data.net("eps"), sde), 3.0, null=NULL, rule="cfg-zero")
    found = guided.velocity(x, t, label=1).flatten(1)
    assert torch.allclose(found, (1 - 3.0) * s * v_u + 3.0 * v_c, rtol=1e-8, atol=1e-8)
    assert torch.allclose(((found - v_c) * v_u).sum(1), torch.zeros(3).double(), atol=1e-7)


def test_a_rule_of_ones_own_and_how_it_is_shown() -> None:
    data, x = Labelled(VPSDE()), normal(3, 2)
    net, plain = EpsDenoiser(data.net("eps"), VPSDE()), data.whole.denoiser(VPSDE())

    def signs(F_1: Tensor, F_0: Tensor, w: Tensor, *, power: float) -> Tensor:
        return F_1 + (w - 1) * (F_1 - F_0).sign() * (F_1 - F_0).abs() ** power

    mine = ClassifierFree(net, 3.0, null=NULL, rule=Rule(signs, "score", {"power": 0.5}))
    delta = data.of(1).score(x, 0.3) - plain.score(x, 0.3)
    expected = data.of(1).score(x, 0.3) + 2 * delta.sign() * delta.abs().sqrt()
    assert torch.allclose(mine.score(x, 0.3, label=1), expected, rtol=1e-8)
    for guided, shown in (
        (mine, "weight=3.0, null={'label': 3}, rule=Rule(signs, 'score', power=0.5))"),
        (ClassifierFree(net, rule="cfg-zero"), "weight=2.0, null=None, rule='cfg-zero')"),
        (ClassifierFree(net, rule="cfg", interval=(0.1, 1.0)), "weight=2.0, null=None, interval=(0.1, 1.0))"),
        (ClassifierFree(net, rescale=0.7), "rule=Rule(projected, 'x0', rescale=0.7, parallel=1.0, max_norm=None))"),
        (Autoguidance(net, plain, rule="apg"), f"Autoguidance({net!r}, {plain!r}, weight=2.0, rule='apg')"),
        (Conditioned(net, label=3, y=x), f"Conditioned({net!r}, drop=(), label=3, y=tensor of (3, 2))"),
    ):
        assert repr(guided).endswith(shown)
    for rule, options in (("apg", {"parallel": 0.0}), ("rescale", {"rescale": 0.7})):
        named, given = (
            ClassifierFree(net, 3.0, null=NULL, **o)(x, 0.3, label=1).mean for o in ({"rule": rule}, options)
        )
        assert torch.equal(named, given)


@pytest.mark.parametrize("weak_view", NETWORKS)
def test_autoguidance_of_models_that_predict_other_things(weak_view: str) -> None:
    sde, x = VPSDE(), normal(3, 2)
    good, poor = Gaussian([1.0, 0.0], std=0.5).denoiser(sde), Gaussian([0.5, 0.5], std=0.8).denoiser(sde)
    weak = NETWORKS[weak_view](network_for(poor, weak_view), sde)
    for view, kind in NETWORKS.items():
        model = kind(network_for(good, view), sde)
        for t in (0.05, torch.tensor([0.1, 0.5, 0.9]).double()):
            found = Autoguidance(model, weak, 2.5)(x, t).mean
            assert torch.allclose(found, 2.5 * good(x, t).mean - 1.5 * poor(x, t).mean, rtol=1e-8, atol=1e-9)
            alone = Autoguidance(model, weak, 0.0).eps(x, t)
            assert torch.allclose(alone, poor.eps(x, t), rtol=1e-8, atol=1e-9)
        assert torch.equal(Autoguidance(model, weak, 1.0)(x, 0.5).mean, model(x, 0.5).mean)
    wide = Autoguidance(good, weak, 2.0, convention="strength")(x, 0.5).mean
    assert torch.allclose(wide, 3 * good(x, 0.5).mean - 2 * poor(x, 0.5).mean, rtol=1e-8)


def test_classifier_free_is_autoguidance_by_the_unconditional_model() -> None:
    data, x_T, cond = Labelled(VPSDE()), normal(3, 2), {"label": torch.tensor([0, 1, 2])}
    denoiser = EpsDenoiser(data.net("eps"), VPSDE())
    free = sample(ClassifierFree(denoiser, 2.0, null=NULL), x_T, UniPC(2), steps=5, cond=cond).x
    weak = Autoguidance(denoiser, Conditioned(denoiser, drop="label"), 2.0)
    assert torch.allclose(free, sample(weak, x_T, UniPC(2), steps=5, cond=cond).x, rtol=1e-9)


# --------------------------------------------------------------------------------------------------------------- energy


def test_a_network_without_a_derivative_is_named() -> None:
    """D = r x + s N has one, which would be wrong in silence."""
    detached = EpsDenoiser(lambda x, t: x.detach(), VPSDE())
    guided = Energy(detached, lambda D: D.square().sum(1), clean=True)
    with pytest.raises(ValueError, match="no derivative by x"):
        guided(torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), 0.5)


@pytest.mark.parametrize("name", SDES)
def test_quadratic_energy_gives_the_tilted_gaussian(name: str) -> None:
    """N(m, s^2) e^{-a |x - c|^2 / 2} is a Gaussian. Exact by E(D) with scale 1 / (1 + a v_t), v_t = Var[x_0 | x_t], and
    by the energy -log E[e^{-E(x_0)} | x_t] of x_t itself; under several solvers.
    """
    sde, s, a = SDES[name], 0.8, 2.0
    m, c = torch.tensor([[1.0, -0.5], [0.0, 2.0]]).double(), torch.tensor([[-1.0, 0.5], [1.0, 1.0]]).double()
    plain = Gaussian(m, std=s).denoiser(sde)
    tilted = Gaussian((m / s**2 + a * c) / (1 / s**2 + a), std=(1 / s**2 + a) ** -0.5).denoiser(sde)

    def factor(t: Tensor) -> Tensor:
        total = sde.alpha(t) ** 2 * s**2 + sde.sigma(t) ** 2
        return 1 / (1 + a * s**2 * sde.sigma(t) ** 2 / total)

    def of_noise(x: Tensor, t: Time) -> Tensor:
        return factor(as_time(t)) * quadratic(plain(x, t).mean)

    quadratic = distance(c, std=a**-0.5)
    clean, noisy = Energy(plain, quadratic, factor, clean=True), Energy(plain, of_noise)
    for level in (-3.0, 0.0, 3.0):
        t, x = middle(sde, level), float(sde.sigma(middle(sde, level))) * normal(3, 2, 2)
        assert torch.allclose(clean(x, t).mean, tilted(x, t).mean, rtol=1e-9, atol=1e-9)
        assert torch.allclose(noisy(x, t).mean, tilted(x, t).mean, rtol=1e-9, atol=1e-9)
    x_T = sde.prior((2, 2, 2), generator(0), torch.float64)
    for solver in (DDIM(), ExponentialSDE(), UniPC(3)):
        found, expected = (sample(d, x_T, solver, grid=grid_of(sde), seed=3).x for d in (clean, tilted))
        assert torch.allclose(found, expected, rtol=1e-7, atol=1e-7)


def test_energy_of_the_mean_without_the_scale_is_too_strong() -> None:
    """What the module's docstring says of w = 1: stronger by 1 + a v_t, 2.3 times at large t here."""
    sde, x = VPSDE(), normal(3, 2)
    plain, a, s = Gaussian([0.0, 0.0], std=0.8).denoiser(sde), 2.0, 0.8
    naive = Energy(plain, distance(torch.ones(2), std=a**-0.5), clean=True)
    tilted = Gaussian([a / (1 / s**2 + a)] * 2, std=(1 / s**2 + a) ** -0.5).denoiser(sde)
    for t in (0.01, 0.5, 1.0):
        v = float(plain(x, t).var[0, 0])
        excess = (naive.score(x, t) - plain.score(x, t)) / (tilted.score(x, t) - plain.score(x, t))
        assert torch.allclose(excess, torch.full_like(excess, 1 + a * v), rtol=1e-6)
    assert 1 + a * v > 2.27


def test_linear_energy_through_the_denoiser_is_exact_at_scale_one() -> None:
    """e^{b x_0} tilts N(m, C) to N(m + C b, C), and E[e^{b x_0} | x_t] = e^{b D} times what does not depend on x_t."""
    C = torch.tensor([[1.0, 0.3], [0.3, 0.5]]).double()
    m, b = torch.tensor([1.0, -1.0]).double(), torch.tensor([0.5, -2.0]).double()
    x = normal(4, 2)
    for sde in (VPSDE(), VESDE(), FlowSDE()):
        guided = Energy(Gaussian(m, cov=C).denoiser(sde), lambda x0: -(x0 @ b), clean=True)
        expected = Gaussian(m + C @ b, cov=C).denoiser(sde)
        assert torch.allclose(guided(x, 0.4).mean, expected(x, 0.4).mean, rtol=1e-9, atol=1e-9)
        away = Energy(Gaussian(m, cov=C).denoiser(sde), lambda x0: -(x0 @ b), -1.0, clean=True)
        assert torch.allclose(away(x, 0.4).mean, Gaussian(m - C @ b, cov=C).denoiser(sde)(x, 0.4).mean, atol=1e-9)


def test_ready_energies() -> None:
    x, y = normal(4, 1, 3), normal(4, 1, 3, seed=1)
    cosine = -(x * y).flatten(1).sum(1) / (x.flatten(1).norm(dim=1) * y.flatten(1).norm(dim=1))
    assert torch.allclose(similarity(lambda x: x, y)(x), cosine, rtol=1e-12)
    assert torch.allclose(similarity(lambda x, t: t * x, y[:1])(x, 2.0)[0], cosine[0], rtol=1e-12)
    inner = similarity(lambda x: x, y, normalised=False)
    assert torch.allclose(inner(x), cosine * x.flatten(1).norm(dim=1) * y.flatten(1).norm(dim=1), rtol=1e-12)
    assert torch.allclose(similarity(lambda x: 5 * x, 3 * y)(x), cosine, rtol=1e-12)  # lengths do not matter to it,
    assert torch.allclose(inner(5 * x), 5 * inner(x), rtol=1e-12)  # and do to the inner product
    assert torch.allclose(distance(y)(x), (x - y).flatten(1).square().sum(1) / 2, rtol=1e-12)
    std = torch.tensor([1.0, 2.0, 4.0]).double()
    scaled = distance(y[0], lambda x, t: t * x, std)(x, 3.0)
    assert torch.allclose(scaled, ((3 * x - y[0]) / std).flatten(1).square().sum(1) / 2, rtol=1e-12)
    features, labels = normal(6, 1, 3), torch.tensor([0, 2, 1, 1, 0, 2])
    expected = torch.stack([features[labels == k].mean(0) for k in range(3)])
    assert torch.allclose(class_means(features, labels), expected, rtol=1e-12)
    # What the features are of is not what the std must be of.
    assert distance(y[0].float(), std=std)(x.float()).dtype == torch.float32
    assert distance(y[0], std=std)(x.to("meta")).device.type == "meta"
    with pytest.raises(ValueError, match=r"target has shape \(2, 1, 3\)|target has 2 entries for 4 samples"):
        similarity(lambda x: x, y[:2])(x)
    with pytest.raises(ValueError, match=r"point has shape \(1, 2\) for features \(4, 1, 3\)"):
        distance(torch.zeros(2))(x)
    with pytest.raises(ValueError, match=r"classes with \[1, 0, 1\] items"):
        class_means(features[:2], torch.tensor([0, 2]))


def test_an_inner_product_tilts_a_gaussian_exactly() -> None:
    """Of linear features f = A x, at scale 1 through the denoiser: N(m, C) e^{y . A x} is N(m + C A^T y, C)."""
    m, A, y = normal(3), normal(4, 3, seed=1), normal(1, 4, seed=2)
    C = torch.tensor([[1.0, 0.3, 0.0], [0.3, 0.5, 0.1], [0.0, 0.1, 0.8]]).double()
    energy = similarity(lambda x: x @ A.T, y, normalised=False)
    guided = Energy(Gaussian(m, cov=C).denoiser(VPSDE()), energy, clean=True)
    expected, x = Gaussian(m + C @ A.T @ y[0], cov=C).denoiser(VPSDE()), normal(5, 3, seed=3)
    assert torch.allclose(guided(x, 0.4).mean, expected(x, 0.4).mean, rtol=1e-9, atol=1e-9)


def test_contrast_is_the_cross_entropy_of_distances_with_a_bounded_gradient() -> None:
    x, m, y = 3 * normal(6, 2, 2), normal(4, 2, 2, seed=1), torch.tensor([0, 3, 1, 1, 2, 0])
    x.requires_grad_()
    d = torch.stack([distance(m[k : k + 1], std=0.7)(x) for k in range(4)], 1)
    energy = contrast(m, y, std=0.7)(x)
    assert torch.allclose(energy, (d.exp().sum(1) / d.gather(1, y[:, None]).exp()[:, 0]).log(), rtol=1e-9)
    (g,) = torch.autograd.grad(energy.sum(), x)
    assert torch.allclose(g, torch.einsum("bk,kij->bij", d.softmax(1), -m) / 0.49 + m[y] / 0.49, rtol=1e-9)
    shift = normal(1, 2, 2, seed=2)
    assert torch.allclose(contrast(m + shift, y, std=0.7)(x + shift), energy, rtol=1e-9)
    assert torch.allclose(contrast(m[:1].expand(4, 2, 2), 2)(x), torch.full((6,), math.log(4)).double())
    order = torch.tensor([2, 0, 3, 1])
    assert torch.allclose(contrast(m[order], order.argsort()[y], lambda x, t: t * x, 1.4)(x, 2.0),
                          contrast(m / 2, y, std=0.7)(x), rtol=1e-9)  # fmt: skip
    with pytest.raises(ValueError, match="label has 2 entries for 6 samples"):
        contrast(m, y[:2])(x)
    with pytest.raises(ValueError, match="point has shape"):
        contrast(m[:, 0], y)(x)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_class_means_of_many_do_not_overflow(dtype: torch.dtype) -> None:
    features = torch.tensor([[200, 100]]).expand(1000, 2).clone()
    features[::4, 0] = 240
    means = class_means(features.to(dtype), torch.zeros(1000, dtype=torch.long))
    assert means.dtype == (dtype if dtype.is_floating_point else torch.float64)
    assert means.double().tolist() == [[210.0, 100.0]]


def test_a_trained_classifier_comes_back_from_its_file_and_knows_what_it_is_for(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = NoisyClassifier(3, channels=8).eval()
    made = TrainedClassifier.of(net, VPSDE(), (1, 4, 4), 999.0, {"data": "mine"})
    made.save(tmp_path / "a.safetensors")
    found = TrainedClassifier.load(tmp_path / "a.safetensors")
    assert (found.sde, found.shape, found.time_scale, found.about) == (made.sde, (1, 4, 4), 999.0, {"data": "mine"})
    assert (found.classes, found.digest) == (3, made.digest)
    x, label = normal(2, 1, 4, 4, dtype=torch.float32), torch.tensor([2, 0])
    assert torch.equal(found.net(x, torch.tensor([3.0, 900.0])), net(x, torch.tensor([3.0, 900.0])))
    exact = Gaussian(torch.zeros(1, 4, 4), std=0.5).denoiser(VPSDE())
    guided = Classifier(exact, net, 3.0, time=lambda t: 999.0 * t)
    assert torch.equal(found.guide(exact, 3.0)(x, 0.4, label=label).mean, guided(x, 0.4, label=label).mean)
    found.save(tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()
    for other in (VESDE(), VPSDE(beta_max=19.0)):
        with pytest.raises(ValueError, match="made for another SDE"):
            found.guide(Gaussian(torch.zeros(1, 4, 4), std=0.5).denoiser(other))
    with pytest.raises(TypeError, match="expected a Denoiser"):
        found.guide(torch.nn.Linear(2, 2))
    with torch.no_grad():
        net.outward.bias[0] = math.nan
    with pytest.raises(ValueError, match=r"outward\.bias are not finite"):
        made.save(tmp_path / "c.safetensors")


# ------------------------------------------------------------------------------------------------- off, and likelihoods


@pytest.mark.parametrize("solver", SOLVERS)
def test_scale_zero_is_the_unguided_sampler_bit_for_bit(solver: str) -> None:
    data, x_T = Labelled(VPSDE()), normal(3, 2, dtype=torch.float32)
    denoiser = EpsDenoiser(data.net("eps"), VPSDE())

    def never(*_: Any) -> Tensor:
        raise AssertionError("what has no effect must not be evaluated")

    expected = sample(denoiser, x_T, SOLVERS[solver], steps=5, seed=0)
    for guided in (
        Classifier(denoiser, never, 0.0),
        Classifier(denoiser, never, 0.0, clean=True, label=1),
        Energy(denoiser, never, lambda t: 0.0),
        Energy(denoiser, never, torch.zeros(3), clean=True),
        Product([Conditioned(denoiser, label=1)], [0.0], base=denoiser),
    ):
        assert torch.equal(sample(guided, x_T, SOLVERS[solver], steps=5, seed=0).x, expected.x)
        assert torch.equal(guided(x_T, 0.5).mean, denoiser(x_T, 0.5).mean)
        assert torch.equal(guided.score(x_T, 0.5), denoiser.score(x_T, 0.5))


def test_variance_is_passed_on_where_it_is_right() -> None:
    data, x = Labelled(VPSDE()), normal(3, 2)
    plain = data.whole.denoiser(VPSDE())
    assert torch.equal(Classifier(plain, data.logits, 0.0)(x, 0.5).var, plain(x, 0.5).var)
    assert Classifier(plain, data.logits, label=0)(x, 0.5).var is None
    assert Product([data.of(0)], base=plain)(x, 0.5).var is not None
    assert Product([data.of(0), data.of(1)], base=plain)(x, 0.5).var is None


@pytest.mark.parametrize("name", ["vp", "ve"])
def test_log_prob_through_guidance_is_the_conditional_density(name: str) -> None:
    """Exact classifier guidance of a Gaussian pair is a Gaussian, and its log_prob the closed form."""
    sde = SDES[name]
    parts = [Gaussian([-1.0, 0.5], std=0.6), Gaussian([1.0, 0.0], std=0.6)]
    whole = GaussianMixture([[-1.0, 0.5], [1.0, 0.0]], std=0.6).denoiser(sde)

    def logits(x: Tensor, t: Tensor) -> Tensor:
        return torch.stack([part.log_prob(x, sde=sde, t=t.double()) for part in parts], dim=1)

    x = parts[1].sample(3, generator(0), torch.float64)
    guided, t = Classifier(whole, logits, label=1), middle(sde, 4.0)
    result = log_prob(guided, x, divergence="exact", steps=24, t=t)
    exact = result.value
    unguided = log_prob(parts[1].denoiser(sde), x, divergence="exact", steps=24, t=t).value
    assert torch.allclose(exact, unguided, atol=1e-7)
    mismatch = result.prior - parts[1].log_prob(result.latent, sde=sde, t=sde.t_max)  # of N(0, I) and p_T
    assert torch.allclose(exact - mismatch, parts[1].log_prob(x, sde=sde, t=t), atol=2e-4)
    forward = log_prob(guided, x, divergence="exact", steps=24, t=t, mode="jvp").value
    assert torch.allclose(forward, exact, atol=1e-9)
    probed = log_prob(guided, x, probes=2, steps=8, t=t, seed=0)
    same = log_prob(parts[1].denoiser(sde), x, probes=2, steps=8, t=t, seed=0)
    assert torch.allclose(probed.value, same.value, atol=1e-7)
    assert probed.nfe == same.nfe
    scores = []
    for denoiser in (guided, parts[1].denoiser(sde)):
        leaf = x.clone().requires_grad_()
        value = log_prob(denoiser, leaf, divergence="exact", steps=8, t=t, differentiable=True).value
        scores += torch.autograd.grad(value.sum(), leaf)
    assert torch.allclose(scores[0], scores[1], rtol=1e-6, atol=1e-6)


def test_log_prob_through_the_other_wrappers() -> None:
    """In reverse and in forward mode, and of samples; each against the exact denoiser that it equals."""
    sde = VPSDE()
    data, x = Labelled(sde), normal(3, 2)
    net = EpsDenoiser(data.net("eps"), sde)
    for guided, cond in (
        *(
            (ClassifierFree(net, torch.ones(1), null=NULL, interval=(0.1, 10.0), rule=rule), {"label": 1})
            for rule in RULES
        ),
        (Product([Conditioned(net, label=1)], [lambda t: 1.0], base=Conditioned(net, label=3)), {}),
        (Energy(data.of(1), lambda x0: 0 * x0.sum(1), clean=True), {}),
        (Energy(data.of(1), lambda x, t: 0 * x.sum(1)), {}),
        (Autoguidance(data.of(1), data.of(1), 3.0), {}),
        (Mixture([data.of(1), data.of(1)]), {}),
    ):
        for mode in ("vjp", "jvp"):
            options: dict[str, Any] = {"divergence": "exact", "steps": 4, "mode": mode}
            found = log_prob(guided, x, cond=cond, **options).value
            assert torch.allclose(found, log_prob(data.of(1), x, **options).value, rtol=1e-8)
        drawn = sample(guided, (3, 2), UniPC(2), steps=4, seed=0, log_prob="exact", cond=cond)
        expected = sample(data.of(1), (3, 2), UniPC(2), steps=4, seed=0, log_prob="exact")
        assert torch.allclose(drawn.x, expected.x, atol=1e-4)
        assert drawn.log_prob is not None
        assert expected.log_prob is not None
        assert torch.allclose(drawn.log_prob, expected.log_prob, atol=1e-3)


def test_no_digits_are_lost_in_float32() -> None:
    """At sigma = 1e-3 the path from an eps network to D and back would cost three of float32's seven digits."""
    sde = VPSDE()
    data, label = Labelled(sde), torch.tensor([0, 1, 2])
    t = float(sde.time_at(math.log(1e3)))
    x = sde.perturb(data.whole.sample(3, generator(0), torch.float64), t, normal(3, 2)).float()
    net = EpsDenoiser(lambda x, t, **cond: data.net("eps")(x.double(), t, **cond).to(x.dtype), sde)
    for guided, cond in (
        *(  # in D it is for a rule to lose them
            (ClassifierFree(net, 3.0, null=NULL, rule=rule), {"label": label})
            for rule in RULES.values()
            if rule.view != "x0"
        ),
        (Classifier(net, data.logits, 3.0), {"label": label}),
        (Energy(net, lambda x, t: x.sum(1), 2.0), {}),
        (Product([Conditioned(net, label=label)], [3.0], base=Conditioned(net, label=3)), {}),
        (Autoguidance(net, Conditioned(net, drop="label"), 3.0), {"label": label}),
    ):
        found, exact = guided.eps(x, t, **cond), guided.eps(x.double(), t, **cond)
        assert torch.allclose(found.double(), exact, rtol=3e-6, atol=3e-6)


def test_starts_where_alpha_is_zero() -> None:
    """Velocity networks of a flow start at t = 1, where x_T holds nothing of the data. Both branches still know their
    means, E[x_0 | y] and E[x_0]; a gradient knows nothing, and is left out of that one evaluation.
    """
    sde, x = FlowSDE(), normal(3, 2)
    data = Labelled(sde)
    net = VelocityDenoiser(data.net("velocity"), sde)
    free = ClassifierFree(net, 2.0, null=NULL)
    mean_c, mean_u = (target.moments()[0] for target in (data.parts[1], data.whole))
    assert torch.allclose(free(x, 1.0, label=1).mean, (2 * mean_c - mean_u).expand(3, 2), rtol=1e-9)
    for rule in RULES:
        free = ClassifierFree(net, 2.0, null=NULL, rule=rule)
        assert bool(sample(free, x, UniPC(2), steps=5, cond={"label": 1}).x.isfinite().all())
    # And they end where sigma is, at x / alpha whatever a network says.
    anything = EpsDenoiser(lambda x, t, label: x.sin() * label[:, None], sde)
    for rule in RULES:
        free = ClassifierFree(anything, 2.0, null={"label": 0}, rule=rule)
        assert torch.allclose(free(x, 0.0, label=torch.ones(3)).mean, x, rtol=1e-9)
    for guided in (
        Classifier(net, data.logits, label=1),
        Classifier(net, lambda x: x @ normal(2, 3), label=1, clean=True),
        Energy(net, distance(mean_c), clean=True),
    ):
        assert torch.allclose(guided(x, 1.0).mean, mean_u.expand(3, 2), rtol=1e-9)
        assert bool(sample(guided, x, UniPC(2), steps=5).x.isfinite().all())


# ---------------------------------------------------------------------------------------------------------- composition


def product_of(gaussians: list[tuple[float, float]], weights: list[float]) -> Gaussian:
    """prod N(m, s^2)^w in one dimension."""
    precision = sum(w / s**2 for (_, s), w in zip(gaussians, weights, strict=True))
    mean = sum(w * m / s**2 for (m, s), w in zip(gaussians, weights, strict=True)) / precision
    return Gaussian([mean], std=precision**-0.5)


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.25, 0.75], [2.0, -0.5]], ids=str)
@pytest.mark.parametrize("base", [None, (0.5, 1.5)], ids=str)
def test_product_of_gaussians_as_t_goes_to_zero(weights: list[float], base: tuple[float, float] | None) -> None:
    """Its score tends to that of the product, with an error that falls as sigma^2; by any network."""
    sde, pair = VPSDE(), [(-1.0, 0.8), (1.5, 0.6)]
    models = [Gaussian([m], std=s).denoiser(sde) for m, s in pair]
    expected = product_of(pair, weights) if base is None else product_of([*pair, base], [*weights, 1 - sum(weights)])
    start = None if base is None else Gaussian([base[0]], std=base[1]).denoiser(sde)
    x, errors = normal(5, 1), []
    for level in (4.0, 5.0, 6.0):
        t = middle(sde, level)
        wanted = expected.denoiser(sde).score(x, t)
        for kind, view in ((None, ""), (EpsDenoiser, "eps"), (X0Denoiser, "x0")):
            nets = models if kind is None else [kind(network_for(m, view), sde) for m in models]
            found = Product(nets, weights, base=start).score(x, t)
        errors.append(float((found - wanted).abs().max()))
    assert errors[2] < 1e-3
    assert abs(errors[1] / errors[0] * math.e**2 - 1) < 0.1


def test_product_where_the_noise_or_the_data_is_gone() -> None:
    """Where sigma = 0 its mean is x / alpha, of any network; where alpha = 0 it has none without a base, and says so
    before a network is called."""
    exact, x = Gaussian([0.5], std=0.7), normal(3, 1)
    calls: list[int] = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        calls.append(len(x))
        return 0.3 * x

    for sde in (VPSDE(), FlowSDE()):
        g = exact.denoiser(sde)
        times = torch.tensor([0.0, 0.2, 0.6], dtype=torch.float64)
        for models in ([g, g], [X0Denoiser(network_for(g, "x0"), sde), g]):
            product = Product(models, [1.0, 0.5])
            assert torch.allclose(product(x, 0.0).mean, x, rtol=1e-12)
            together = product(x, times).mean
            assert torch.allclose(together[:1], x[:1], rtol=1e-12)
            for i in (1, 2):
                assert torch.allclose(together[i], product(x, float(times[i])).mean[i], rtol=1e-9)
    sde = FlowSDE()
    product = Product([VelocityDenoiser(net, sde)] * 2)
    message = r"a product without a base is undefined at t = 1.0 of FlowSDE.*: give base=, .*start the grid"
    for t in (1.0, torch.tensor([0.3, 1.0, 0.5])):
        with pytest.raises(ValueError, match=message):
            product(x, t)
    with pytest.raises(ValueError, match=message):
        product.check_times(torch.tensor([1.0, 0.5]).double())
    with pytest.raises(ValueError, match=message):
        sample(product, x, DDIM(), steps=3)
    assert calls == []
    Product([g, g], [0.4, 0.6]).check_times(torch.tensor([1.0, 0.0]).double())
    assert torch.allclose(Product([g, g], base=g)(x, 1.0).mean, torch.tensor([0.5]).double().expand(3, 1), rtol=1e-9)


def test_what_the_product_does_and_does_not_sample() -> None:
    """The module's example: N(-1, 1) N(1, 1) is N(0, 1/2), but the reverse SDE samples N(0, 1/3), the ODE a point, and
    Langevin steps at small t N(0, 1/2); with the base N(0, 1) all is exact.
    """
    sde = VPSDE()
    pair = [Gaussian([m], std=1.0).denoiser(sde) for m in (-1.0, 1.0)]
    bare = Product(pair)
    by_sde = sample(bare, (4000, 1), ExponentialSDE(), grid=Grid.log_snr(sde, 200, end=1e-4), generator=generator()).x
    assert abs(float(by_sde.var()) - 1 / 3) < 5 * (1 / 3) * math.sqrt(2 / 4000) + 0.01
    by_ode = sample(bare, (100, 1), UniPC(3), grid=Grid.log_snr(sde, 40, end=1e-4), seed=0).x
    assert float(by_ode.std()) < 0.02
    chains = langevin(bare, by_sde, 1e-4, step_size=0.1, steps=60, generator=generator(1))
    assert abs(float(chains.var()) - 0.5) < 5 * 0.5 * math.sqrt(2 / 4000) + 0.03
    based = Product(pair, base=Gaussian([0.0], std=1.0).denoiser(sde))
    x = normal(4, 1)
    assert torch.allclose(based(x, 0.4).mean, Gaussian([0.0], std=1.0).denoiser(sde)(x, 0.4).mean, atol=1e-12)


def test_product_of_one_network_is_one_call() -> None:
    """Conjunction and negation of classes: score_u + sum w (score_y - score_u), in a call of 3 B."""
    data, x = Labelled(VPSDE()), normal(4, 2)
    net = VDenoiser(data.net("v"), VPSDE())
    plain = data.whole.denoiser(VPSDE())
    both = Product([Conditioned(net, label=0), Conditioned(net, label=2)], [1.5, -0.5], base=Conditioned(net, label=3))
    expected = plain.score(x, 0.3)
    expected = expected + 1.5 * (data.of(0).score(x, 0.3) - plain.score(x, 0.3))
    expected = expected - 0.5 * (data.of(2).score(x, 0.3) - plain.score(x, 0.3))
    assert torch.allclose(both.score(x, 0.3), expected, rtol=1e-8)
    assert data.calls == [12]
    data.calls.clear()
    assert sample(both, (4, 2), UniPC(2), steps=5, seed=0).nfe == 5
    assert data.calls == [12] * 5
    data.calls.clear()
    t = torch.tensor([0.1, 0.2, 0.3, 0.4]).double()
    separate = Product(both.factors, both.weights, base=both.base, batched=False)
    assert torch.allclose(separate.score(x, t), both.score(x, t), rtol=1e-9)
    assert data.calls == [4, 4, 4, 12]


@pytest.mark.parametrize("name", ["vp", "ve", "flow"])
def test_mixture_of_exact_denoisers_is_exact(name: str) -> None:
    sde = SDES[name]
    data = Labelled(sde, (1, 2))
    plain = data.whole.denoiser(sde)
    mixture = Mixture([data.of(k) for k in range(3)], data.prior)
    for level in (-3.0, 0.0, 3.0):
        t = middle(sde, level)
        x = sde.perturb(data.whole.sample(4, generator(1), torch.float64), t, normal(4, 1, 2))
        found, expected = mixture(x, t), plain(x, t)
        assert torch.allclose(found.mean, expected.mean, rtol=1e-9, atol=1e-9)
        assert torch.allclose(found.var, expected.var, rtol=1e-7, atol=1e-9)
        assert torch.allclose(mixture.responsibilities(x, t), data.logits(x, t).softmax(1), rtol=1e-9)


def test_mixture_of_networks_by_a_classifier() -> None:
    """One network under three labels, told apart by log p(y | x_t), is the unconditional model: one call of 3 B."""
    data, x_T = Labelled(VPSDE()), normal(3, 2)
    net = EpsDenoiser(data.net("eps"), VPSDE())
    mixture = Mixture([Conditioned(net, label=k) for k in range(3)], log_densities=data.logits)
    found = sample(mixture, x_T, DDIM(), steps=5).x
    assert data.calls == [9] * 5
    assert torch.allclose(found, sample(data.whole.denoiser(VPSDE()), x_T, DDIM(), steps=5).x, rtol=1e-7)
    assert mixture(x_T, 0.5).var is None


def test_wrappers_nest() -> None:
    data, x, cond = Labelled(VPSDE()), normal(3, 2), {"label": torch.tensor([0, 1, 2])}
    net = EpsDenoiser(data.net("eps"), VPSDE())
    free = ClassifierFree(net, 2.0, null=NULL)
    further = Classifier(free, data.logits, conditional=True)
    g = Classifier(net, data.logits).score(x, 0.3, **cond) - net.score(x, 0.3)
    assert torch.allclose(further.score(x, 0.3, **cond), free.score(x, 0.3, **cond) + g, rtol=1e-8)
    clipped = Clip(further, -0.5, 0.5)
    assert torch.equal(clipped(x, 0.3, **cond).mean, further(x, 0.3, **cond).mean.clamp(-0.5, 0.5))
    outside = Energy(Clip(free, -0.5, 0.5), distance(torch.ones(2)), clean=True)
    assert bool(sample(outside, x, DDIM(), steps=3, cond=cond).x.isfinite().all())


# --------------------------------------------------------------------------------------------------------------- errors


def test_errors_at_construction() -> None:
    sde = VPSDE()
    plain = Gaussian([0.0], std=1.0).denoiser(sde)
    other = Gaussian([0.0], std=1.0).denoiser(VESDE())

    def f(x: Tensor, t: Tensor) -> Tensor:
        return x

    for make, kind, message in (
        (lambda: Classifier(f, f), TypeError, "Classifier: expected a Denoiser, not function"),
        (lambda: Classifier(plain, 3), TypeError, "expected a callable classifier"),
        (lambda: Classifier(plain, f, math.nan), ValueError, "scale=nan: expected a finite number"),
        (lambda: Classifier(plain, f, True), ValueError, "scale=True"),
        (lambda: Classifier(plain, f, torch.ones(2, 2)), ValueError, r"scale is torch.float32 of shape \(2, 2\)"),
        (lambda: Classifier(plain, f, label=1.5), ValueError, "label is torch.float32 .*: expected integers"),
        (lambda: Classifier(plain, f, label=-1), ValueError, "a class is a whole number >= 0"),
        (lambda: Classifier(plain, f, clean=True, time=lambda t: t), ValueError, "time= is for a classifier of noisy"),
        (lambda: Energy(plain, 1.0), TypeError, "energy is float"),
        (
            lambda: ClassifierFree(plain, convention="imagen"),
            ValueError,
            "convention='imagen': expected one of 'scale'",
        ),
        (lambda: ClassifierFree(plain, interval=(2.0, 1.0)), ValueError, "interval=.*: expected noise levels"),
        (lambda: ClassifierFree(plain, rescale=1.5), ValueError, "rescale=1.5"),
        (lambda: ClassifierFree(plain, max_norm=0.0), ValueError, "max_norm=0.0"),
        (lambda: ClassifierFree(plain, rule="zero"), ValueError, "rule='zero': expected 'cfg-zero', or one of 'cfg'"),
        (lambda: Autoguidance(plain, plain, rule="apg", rescale=0.7), ValueError, "leave rule='apg' away"),
        (lambda: Rule(3.0), TypeError, "a rule's function is float"),
        (lambda: Rule(f, "noise"), ValueError, "view='noise': expected one of None, 'x0'"),
        (lambda: ClassifierFree(plain, null={}), ValueError, "null names no condition"),
        (lambda: Autoguidance(plain, f), TypeError, "Autoguidance: expected a Denoiser, not function"),
        (lambda: Autoguidance(plain, other), ValueError, "must have one SDE"),
        (lambda: Product([]), ValueError, "Product was given no denoiser"),
        (lambda: Product([plain], [1.0, 2.0]), ValueError, "2 weights for 1 denoisers"),
        (lambda: Mixture([plain], [-1.0]), ValueError, "expected 1 positive numbers"),
        (lambda: Mixture([EpsDenoiser(f, sde)]), ValueError, "which networks do not know"),
        (lambda: Conditioned(plain, drop="a", a=1), ValueError, "both given and dropped"),
    ):
        with pytest.raises(kind, match=message):
            make()


def test_errors_of_calls_come_before_the_network() -> None:
    sde = VPSDE()
    data, x, two = Labelled(sde), normal(3, 2), torch.tensor([1, 2])
    net = EpsDenoiser(data.net("eps"), sde)
    for guided, cond, message in (
        (Classifier(net, data.logits), {}, "no condition 'label' .but none.: pass cond="),
        (Classifier(net, data.logits), {"label": two}, r"cond\['label'\] has 2 entries for 3 samples"),
        (Classifier(net, data.logits, label=two), {}, "label has 2 entries for 3 samples"),
        (Classifier(net, data.logits, torch.ones(2), label=0), {}, "scale has 2 entries for 3 samples"),
        (Classifier(net, data.logits), {"label": -two[:1]}, "a class is a whole number >= 0"),
        (Energy(net, data.logits, lambda t: "one"), {}, "scale.t.='one': expected a finite number"),
        (ClassifierFree(net, null=NULL), {}, r"without a condition \(label\)"),
        (ClassifierFree(net), {}, r"without a condition \(any\)"),
        (ClassifierFree(net, torch.ones(2), null=NULL), {"label": 1}, "weight has 2 entries for 3 samples"),
        (
            ClassifierFree(net, null={"label": two}),
            {"label": torch.ones(3).long()},
            r"label of shape \(2,\) cannot stand",
        ),
        (Product([net], [torch.ones(2)], base=net), {}, r"weights\[0\] has 2 entries for 3 samples"),
        (Product([Conditioned(net, label=two)]), {}, "label'\\] has 2 entries for 3 samples"),
    ):
        with pytest.raises(ValueError, match=message):
            guided(x, 0.5, **cond)
    assert data.calls == []
    with pytest.raises(ValueError, match="label 3 is outside the 3 classes of the classifier: expected 0 to 2"):
        Classifier(net, data.logits, label=3)(x, 0.5)
    with pytest.raises(ValueError, match=r"the classifier returned \(3,\) for 3 samples: expected logits"):
        Classifier(net, lambda x, t: x.sum(1), label=0)(x, 0.5)
    with pytest.raises(ValueError, match=r"returned \(3, 2\): expected a value per sample"):
        Energy(net, lambda x, t: x)(x, 0.5)
    with pytest.raises(ValueError, match=r"log_densities returned \(3, 3\): expected \(3, 2\)"):
        Mixture([net, net], log_densities=data.logits)(x, 0.5)
    for labels, message in (
        (two, r"labels has shape \(2,\) for 3 samples"),
        (torch.tensor([0, 1, 3]), "outside the 3"),
    ):
        with pytest.raises(ValueError, match=message):
            classifier_loss(data.logits, sde, x, labels)
