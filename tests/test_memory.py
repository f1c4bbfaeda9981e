"""A network may reuse the memory of its output, as a replayed CUDA graph and an engine's buffer do: whatever calls one
gives, to the last bit, what it gives with a network that does not."""

import pytest
import torch
from common import every_pair, normal

from scoresde import VPSDE, EpsDenoiser, Grid, VelocityDenoiser, X0Denoiser, sample
from scoresde.diagnose import diagnose
from scoresde.editing import edit, encode, interpolation, sdedit, variations
from scoresde.guidance import (
    DDNM,
    DPS,
    Autoguidance,
    Classifier,
    ClassifierFree,
    Conditioned,
    Energy,
    Mixture,
    MomentMatching,
    PiGDM,
    Potential,
    Product,
    Replacement,
    TwistedSMC,
    twisted_smc,
)
from scoresde.guidance.operators import Mask
from scoresde.likelihood import bits_per_dim, elbo, log_prob
from scoresde.metrics import NetworkFeatures, evaluate
from scoresde.solvers import DDIM, DDPM, UniPC, langevin
from scoresde.solvers.catalogue import available
from scoresde.training import dsm_loss
from scoresde.variance import (
    LearnedRangeDenoiser,
    NPRDenoiser,
    OptimalVariance,
    SNDenoiser,
    SplitOutput,
    estimate,
    measure_errors,
    npr_loss,
    ocm_loss,
)
from scoresde.wrappers import Clip

SDE, X, DATA = VPSDE(), normal(4, 3), normal(6, 3, seed=1)


def plain(x, time, label=None):
    shift = 0.0 if label is None else torch.as_tensor(label).to(x).reshape(-1, 1)
    return torch.sin(x.roll(1, 1) + time.to(x).reshape(-1, *[1] * (x.ndim - 1)) + shift) + 0.4 * x


def two(x, time):
    return torch.cat([plain(x, time), torch.cos(x)], 1)


class Reusing(torch.nn.Module):
    """A function whose output is always in the same memory, where nothing of the last is left once it is called."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function, self.buffers = function, {}

    def forward(self, *args, **cond):
        for buffer in self.buffers.values():
            buffer.fill_(torch.nan)
        out = self.function(*args, **cond)
        with torch.inference_mode(False), torch.no_grad():
            buffer = self.buffers.setdefault((out.shape, out.dtype), torch.empty(out.shape, dtype=out.dtype))
            buffer.copy_(out)

        class Static(torch.autograd.Function):
            """As `torch.cuda.make_graphed_callables` has it: differentiable, in memory that is not its own."""

            @staticmethod
            def forward(ctx, out):
                return buffer.detach()

            @staticmethod
            def backward(ctx, gradient):
                return gradient

        return Static.apply(out) if out.requires_grad else buffer


class Plain(torch.nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args, **cond):
        return self.function(*args, **cond)


ADAPTERS = {"eps": EpsDenoiser, "x0": X0Denoiser, "velocity": VelocityDenoiser}
MASK, LABEL = Mask(torch.tensor([True, False, True])), torch.tensor([0.5, 1.0, -1.0, 2.0], dtype=torch.float64)


def by_network(net, scale=1.0):
    """A log-density that calls the very network that is guided."""
    return lambda x, t=0.5: -scale * net(x, torch.as_tensor(t).to(x).expand(len(x))).square().sum(1)


DENOISERS = {
    "bare": lambda denoiser, net: denoiser,
    "clipped": lambda denoiser, net: Clip(denoiser),
    "guided in one call": lambda denoiser, net: ClassifierFree(denoiser, 2.0, null={"label": 0}),
    "guided in two": lambda denoiser, net: ClassifierFree(denoiser, 2.0, null={"label": 0}, batched=False),
    "projected": lambda denoiser, net: ClassifierFree(denoiser, 2.0, null=("label",), rule="apg"),
    "zero": lambda denoiser, net: ClassifierFree(denoiser, 2.0, null=("label",), rule="cfg-zero"),
    "by itself": lambda denoiser, net: Autoguidance(denoiser, Conditioned(denoiser, drop="label"), 1.5),
    "product": lambda denoiser, net: Product(
        [denoiser, Conditioned(denoiser, label=0.5), Conditioned(denoiser, drop="label")], [0.5, 0.25, 0.25]
    ),
    "product with a base": lambda denoiser, net: Product(
        [denoiser, Conditioned(denoiser, label=0.5)], base=Conditioned(denoiser, drop="label"), batched=False
    ),
    "mixture": lambda denoiser, net: Mixture(
        [denoiser, Conditioned(denoiser, drop="label")],
        # A sum, of which autograd keeps nothing: what a function of yours keeps is for you to copy.
        log_densities=lambda x, t: net(x, t.to(x).expand(len(x))).sum(1)[:, None] * torch.tensor([1.0, 0.5]),
    ),
    "energy": lambda denoiser, net: Energy(denoiser, by_network(net), 0.1),
    "energy of D": lambda denoiser, net: Energy(denoiser, by_network(net), 0.1, clean=True),
    "classifier": lambda denoiser, net: Classifier(denoiser, net, 0.1, label=1),
    "twist": lambda denoiser, net: Potential(denoiser, by_network(net), scale=0.1),
    "dps": lambda denoiser, net: DPS(denoiser, lambda x: net(x, x.new_full((len(x),), 0.5))[:, :1], X[:1, :1], 0.1),
    "pigdm": lambda denoiser, net: PiGDM(denoiser, MASK, X[:1], 0.5),
    "mmps": lambda denoiser, net: MomentMatching(denoiser, MASK, X[:1], 0.5),
    "row sum": lambda denoiser, net: MomentMatching(denoiser, MASK, X[:1], 0.5, covariance="row sum"),
    "ddnm": lambda denoiser, net: DDNM(denoiser, MASK, X[:1], 0.5),
}  # fmt: skip

ACTS = {
    entry.name: lambda denoiser, cond, entry=entry: (
        sample(
            denoiser,
            X,
            entry.solver,
            seed=0,
            cond=cond,
            trajectory=True,
            **({"nfe": 60} if entry.adaptive else {"steps": 4}),
        ).trajectory
    )
    for entry in available()
}
ACTS |= {
    "replacement": lambda denoiser, cond: sample(
        denoiser, X, Replacement(UniPC(3), MASK, X), steps=4, seed=0, cond=cond
    ).x,
    "langevin": lambda denoiser, cond: langevin(denoiser, X, 0.5, step_size=0.01, steps=3, seed=0, cond=cond),
    "differentiable": lambda denoiser, cond: gradient_of_samples(denoiser, cond),
    "log_prob": lambda denoiser, cond: log_prob(denoiser, X, steps=4, seed=0, correct=True, cond=cond).value,
    "hutch++": lambda denoiser, cond: log_prob(
        denoiser, X, steps=4, seed=0, divergence="hutch++", probes=3, cond=cond
    ).value,
    "adaptive log_prob": lambda denoiser, cond: log_prob(
        denoiser, X, divergence="exact", rtol=1e-2, atol=1e-2, cond=cond
    ).value,
    "bits": lambda denoiser, cond: bits_per_dim(
        denoiser, (40 * X.abs()).to(torch.uint8), divergence="exact", steps=3, seed=0, cond=cond, dtype=torch.float64
    ).per_image,
    "bound": lambda denoiser, cond: elbo(denoiser, X, draws=3, seed=0, cond=cond).value,
    "chain": lambda denoiser, cond: elbo(denoiser, X, DDPM(), Grid.uniform(SDE, 3), draws=2, seed=0, cond=cond).value,
    "estimate": lambda denoiser, cond: estimate(denoiser, X, [0.2, 0.8], samples=5, batch_size=4, cond=cond).eps_square,
    "errors": lambda denoiser, cond: measure_errors(denoiser, X, [0.2, 0.8], samples=4, cond=cond).mse,
    "diagnosis": lambda denoiser, cond: diagnose(denoiser, X, levels=3, cond=cond).error,
    "edit": lambda denoiser, cond: edit(denoiser, X, UniPC(), steps=4, cond_from=cond, cond_to=cond).x,
    "encode": lambda denoiser, cond: encode(denoiser, X, UniPC(), steps=4, check=True, cond=cond).error,
    "sdedit": lambda denoiser, cond: sdedit(denoiser, X, DDPM(), strength=0.6, steps=4, seed=0, cond=cond).x,
    "interpolation": lambda denoiser, cond: interpolation(
        denoiser, X, -X + 0.1, DDIM(), weights=[0.5], steps=3, cond=cond
    ).x,
    "variations": lambda denoiser, cond: variations(denoiser, X, 1, DDPM(), steps=4, seed=0, cond=cond).x,
    "loss": lambda denoiser, cond: dsm_loss(denoiser, X, t=torch.tensor(0.5), noise=X, cond=cond),
}  # fmt: skip


def gradient_of_samples(denoiser, cond):
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(
        sample(denoiser, x, DDPM(), steps=3, seed=0, cond=cond, differentiable=True).x.sum(), x
    )
    return gradient


def made(kind, adapter, guidance):
    net = kind(plain)
    return DENOISERS[guidance](ADAPTERS[adapter](net, SDE), net)


def check(act, guidance, adapter):
    cond = {"label": LABEL}
    expected = ACTS[act](made(Plain, adapter, guidance), cond)
    found = ACTS[act](made(Reusing, adapter, guidance), cond)
    assert torch.equal(found, expected)
    assert bool(found.isfinite().all())


@every_pair(act=list(ACTS), guidance=["bare", "guided in two"], adapter=["eps", "x0"])
def test_every_caller_allows_for_an_output_that_is_overwritten(act, guidance, adapter):
    check(act, guidance, adapter)


@every_pair(guidance=list(DENOISERS), act=["heun", "log_prob"], adapter=["eps", "velocity"])
def test_every_guidance_allows_for_an_output_that_is_overwritten(guidance, act, adapter):
    if guidance in ("energy", "energy of D", "classifier", "twist", "dps", "pigdm", "mmps", "row sum"):
        act = "heun"  # they have a derivative of their own
    check(act, guidance, adapter)


@every_pair(guidance=["twist", "pigdm", "mmps"], adapter=list(ADAPTERS))
def test_particles(guidance, adapter):
    expected, found = (
        twisted_smc(made(kind, adapter, guidance), X, TwistedSMC(particles=2), steps=4, seed=0)
        for kind in (Plain, Reusing)
    )
    assert torch.equal(found.x, expected.x)
    assert torch.equal(found.log_weights, expected.log_weights)


@pytest.mark.parametrize("kind", [SNDenoiser, NPRDenoiser, LearnedRangeDenoiser])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_heads(kind, adapter):
    def run(network):
        model = ADAPTERS[adapter](SplitOutput(network(two)), SDE)
        options = {"grid": Grid.uniform(SDE, 4)} if kind is LearnedRangeDenoiser else {}
        head = kind(model, data_range=(-1, 1), **options)
        x = sample(head, X, OptimalVariance(DDPM()), steps=4, seed=0).x
        t = torch.full((4,), 0.5, dtype=torch.float64)
        losses = [
            loss(model, None, X, t=t, noise=X, generator=torch.Generator().manual_seed(0))
            for loss in (npr_loss, ocm_loss)
        ]
        bound = elbo(head, X, DDPM(), Grid.uniform(SDE, 4), variance="posterior", draws=2, seed=0).value
        return torch.cat([x.flatten(), torch.stack(losses), bound])

    assert torch.equal(run(Reusing), run(Plain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features(dtype):
    """Of a feature network, in many batches."""
    found = NetworkFeatures(Reusing(torch.sin), batch_size=2, dtype=dtype)(DATA)
    assert torch.equal(found, NetworkFeatures(torch.sin, batch_size=2, dtype=dtype)(DATA))
    sets = normal(8, 2, seed=3), normal(8, 2, seed=4)
    options = {"metrics": ["frechet"], "halves": 0, "floors": 0, "batch_size": 2}
    results = [
        evaluate(*sets, features=features, **options)["frechet"].value for features in (Reusing(torch.sin), torch.sin)
    ]
    assert results[0] == results[1]


def test_a_network_without_a_derivative_is_found_out():
    """It is called at two points, to see whether its output changes."""
    frozen = Reusing(torch.no_grad()(plain))
    denoiser = EpsDenoiser(frozen, SDE)
    with pytest.raises(ValueError, match="no derivative by x"):
        log_prob(denoiser, X, steps=3)
    with pytest.raises(ValueError, match="no derivative by x"):
        PiGDM(denoiser, MASK, X[:1], 0.5)(X, 0.5)
    constant = EpsDenoiser(Reusing(torch.no_grad()(lambda x, t: torch.ones_like(x))), SDE)
    assert bool(log_prob(constant, X, steps=3).value.isfinite().all())
