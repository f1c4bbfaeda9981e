"""What is easily got wrong is answered by one clear sentence: a bare network, a forgotten batch, labels, generators."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from common import normal

import scoresde
from scoresde import (
    VPSDE,
    Clip,
    DDPMChain,
    DynamicThreshold,
    EpsDenoiser,
    Grid,
    Latent,
    Masked,
    Tempered,
    X0Denoiser,
    bits_per_dim,
    compiled,
    decode,
    diagnose,
    editing,
    elbo,
    encode,
    forecasting,
    guidance,
    log_prob,
    sample,
    solvers,
    training,
    tuning,
    variance,
)
from scoresde.exact import Gaussian
from scoresde.solvers import DDIM, AdaptiveODE
from scoresde.training import TrainConfig, Trainer, dsm_loss
from scoresde.variance import losses

NET, X, SDE = torch.nn.Linear(2, 2), normal(4, 2, dtype=torch.float32), VPSDE()
GRID = Grid.uniform(SDE, 3)
EXACT = Gaussian(mean=[0.0, 0.0], std=0.5).denoiser(SDE)

BARE = {
    "AnalyticDenoiser": lambda: variance.AnalyticDenoiser(NET, None),
    "Autoguidance": lambda: guidance.Autoguidance(EXACT, NET),
    "Classifier": lambda: guidance.Classifier(NET, torch.sin),
    "ClassifierFree": lambda: guidance.ClassifierFree(NET),
    "Clip": lambda: Clip(NET),
    "DDNM": lambda: guidance.DDNM(NET, None, X),
    "DPS": lambda: guidance.DPS(NET, torch.sin, X),
    "DynamicThreshold": lambda: DynamicThreshold(NET),
    "Energy": lambda: guidance.Energy(NET, torch.sin),
    "Masked": lambda: Masked(NET),
    "MomentMatching": lambda: guidance.MomentMatching(NET, torch.sin, X, 0.1),
    "Mixture": lambda: guidance.Mixture([EXACT, NET]),
    "NPRDenoiser": lambda: variance.NPRDenoiser(NET),
    "OCMDenoiser": lambda: variance.OCMDenoiser(NET),
    "LearnedRangeDenoiser": lambda: variance.LearnedRangeDenoiser(NET),
    "PiGDM": lambda: guidance.PiGDM(NET, torch.sin, X, 0.1),
    "ReconstructionGuidance": lambda: guidance.ReconstructionGuidance(NET, torch.sin, X),
    "Latent": lambda: Latent(NET, None),
    "Tempered": lambda: Tempered(NET, 1.5),
    "Product": lambda: guidance.Product([NET]),
    "SNDenoiser": lambda: variance.SNDenoiser(NET),
    "SamplerModule": lambda: compiled.SamplerModule(NET, DDIM(), (4, 2), steps=2),
    "Trainer": lambda: Trainer(NET, X, TrainConfig(steps=1)),
    "averaged": lambda: training.averaged("nowhere", 0.1, NET),
    "bits_per_dim": lambda: bits_per_dim(NET, X.long().abs()),
    "choose": lambda: tuning.choose(NET, (8, 2), nfe=5),
    "tune": lambda: tuning.tune(NET, None, (16, 2), nfe=5),
    "decode": lambda: decode(NET, X),
    "diagnose": lambda: diagnose(NET, X),
    "dsm_loss": lambda: dsm_loss(NET, X),
    "edit": lambda: editing.edit(NET, X),
    "elbo": lambda: elbo(NET, X),
    "encode": lambda: encode(NET, X),
    "estimate": lambda: variance.estimate(NET, X),
    "extend": lambda: editing.extend(NET, X[:, None], 3, lambda *a: a, window=2, overlap=1),
    "hybrid_loss": lambda: losses.hybrid_loss(NET, None, X),
    "interpolation": lambda: editing.interpolation(NET, X, X),
    "interpolation_grid": lambda: editing.interpolation_grid(NET, X),
    "kl_costs": lambda: variance.kl_costs(NET, X),
    "langevin": lambda: solvers.langevin(NET, X, 0.5, step_size=0.1, steps=2),
    "load_ema": lambda: training.load_ema("nowhere", NET),
    "log_prob": lambda: log_prob(NET, X),
    "measure_errors": lambda: variance.measure_errors(NET, X),
    "npr_loss": lambda: losses.npr_loss(NET, None, X),
    "Stage": lambda: scoresde.Stage(NET, (2,)),
    "ocm_loss": lambda: losses.ocm_loss(NET, None, X),
    "rollout": lambda: forecasting.rollout(NET, X[None], 2, DDIM(), steps=2),
    "step_log_prob": lambda: forecasting.step_log_prob(NET, X[None], 2),
    "sample": lambda: sample(NET, (4, 2), DDIM(), steps=2),
    "save_sampler": lambda: compiled.save_sampler(NET, DDIM(), "a.pt2", shape=(4, 2), steps=2),
    "sdedit": lambda: editing.sdedit(NET, X, DDIM(), strength=0.5, steps=3),
    "sn_loss": lambda: losses.sn_loss(NET, None, X),
    "training_loss": lambda: losses.training_loss(losses.sn_loss, NET),
    "two_term_loss": lambda: training.two_term_loss(NET, X, {"label": X}, unconditional=1.0),
    "variations": lambda: editing.variations(NET, X, 2, DDIM(), steps=3),
}
METHODS = {
    "a solver": lambda: DDIM().iterate(NET, X, GRID),
    "a loop": lambda: AdaptiveODE().iterate(NET, X, GRID),
    "a table": lambda: DDIM().tableau(GRID).iterate(NET, X),
}
OTHERS = {"Branching", "Conditioned", "Guidance", "Twisted", "Potential", "twisted_smc", "Wrapper", "bound_loss"}


def test_every_public_function_of_a_denoiser_is_tried():
    rooms = [scoresde, compiled, editing, forecasting, guidance, solvers, training, tuning, variance]
    public = {name: getattr(room, name) for room in rooms for name in room.__all__}
    takes = {
        name
        for name, found in public.items()
        if (inspect.isfunction(found) or (inspect.isclass(found) and not inspect.isabstract(found)))
        and not (inspect.isclass(found) and issubclass(found, Exception))
        and {"denoiser", "denoisers"} & set(inspect.signature(found).parameters)
    }
    assert takes - OTHERS <= set(BARE), takes - OTHERS - set(BARE)


@pytest.mark.parametrize("what", [*BARE, *METHODS])
def test_a_bare_network_is_told_how_to_be_wrapped(what):
    with pytest.raises(TypeError, match=r"expected a Denoiser, not Linear: wrap the network, EpsDenoiser\(net, sde"):
        (BARE | METHODS)[what]()


class Embeds(torch.nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.rows, self.mix = torch.nn.Embedding(rows, 2), torch.nn.Linear(2, 2)

    def forward(self, x, n):
        return self.mix(x) + self.rows(n)


def test_an_error_of_the_network_says_what_it_was_given():
    chain = DDPMChain.linear(100, 1e-3, 0.2)
    off_by_one = EpsDenoiser(Embeds(100), chain, time=lambda t: t.round().long())
    for run in (
        lambda: sample(off_by_one, (3, 2), DDIM(), steps=4, seed=0),
        lambda: off_by_one(X[:3], 100.0),
    ):
        with pytest.raises(IndexError) as caught:
            run()
        (note,) = caught.value.__notes__
        assert "(3, 2), 3 items of shape (2,), torch.float32, time labels (3,) torch.int64 from 100 to 100" in note
        assert "torch.nn.Embedding of 100 rows" in note
    floats = EpsDenoiser(Embeds(100), chain, time=chain.label)
    with pytest.raises(RuntimeError) as caught:
        sample(floats, (3, 2), DDIM(), steps=4, seed=0)
    assert "time labels (3,) torch.float32 from 99 to 99" in caught.value.__notes__[0]
    assert "100 rows, which take whole numbers" in caught.value.__notes__[0]

    def picky(x, t, **cond):
        raise KeyError("label")

    with pytest.raises(KeyError) as caught:
        EpsDenoiser(picky, SDE)(X, 0.5, label=torch.arange(4), words=["a"])
    assert caught.value.__notes__[0].endswith("from 0.5 to 0.5, label (4,) torch.int64, words list")


def test_a_forgotten_batch_dimension_is_named():
    conv = torch.nn.Conv2d(3, 3, 3, padding=1)
    images = X0Denoiser(lambda x, t: conv(x) + t[:, None, None, None], SDE)
    with pytest.raises(ValueError, match=r"\(3, 8, 8\), 3 items of shape \(8, 8\).*a batch of one, x\[None\]"):
        diagnose(images, normal(3, 8, 8, dtype=torch.float32))
    with pytest.raises(RuntimeError) as caught:
        diagnose(X0Denoiser(lambda x, t: NET(x), SDE), normal(3, dtype=torch.float32))
    assert "x of shape (3,), 3 items of shape ()" in caught.value.__notes__[0]


def test_no_batch_at_all_is_refused():
    for run in (
        lambda x: sample(EXACT, x, DDIM(), steps=2, seed=0),
        lambda x: sample(EXACT, x, DDIM(), steps=2),
        lambda x: log_prob(EXACT, x),
        lambda x: encode(EXACT, x),
    ):
        with pytest.raises(ValueError, match=r"is torch.float32 of shape \(\): expected a floating-point tensor \(B"):
            run(torch.tensor(1.0))


def test_a_generator_of_numpy_is_refused():
    other = np.random.default_rng(0)
    for run in (
        lambda: sample(EXACT, (4, 2), DDIM(), steps=2, generator=other),
        lambda: log_prob(EXACT, X, steps=5, generator=other),
        lambda: SDE.prior((4, 2), other),
        lambda: Gaussian(mean=[0.0], std=1.0).sample(3, other),
        lambda: dsm_loss(EXACT, X, generator=other),
        lambda: training.UniformTimes().draw(SDE, 3, other),
    ):
        with pytest.raises(TypeError, match=r"generator is numpy.random.*Generator: expected a torch.Generator"):
            run()
    for seed in (other, 1.5):
        with pytest.raises(ValueError, match=r"seed=.*expected whole numbers"):
            sample(EXACT, (4, 2), DDIM(), steps=2, seed=seed)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_named():
    for run in (
        lambda: sample(EXACT, (4, 2), DDIM(), steps=2, seed=0, device="cuda"),
        lambda: sample(EXACT, (4, 2), DDIM(), steps=2, device="cuda"),
        lambda: SDE.prior((4, 2), device="cuda"),
    ):
        with pytest.raises(ValueError, match="device='cuda' is not to be had here, torch"):
            run()
