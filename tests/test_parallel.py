"""Parallel in time: the loop's samples, in few rounds, whatever the table, the window and the batch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from common import SDES, Nonlinear, end_of, normal, start_of
from torch import Tensor

from scoresde import (
    VPSDE,
    Clip,
    DDPMChain,
    Denoiser,
    EpsDenoiser,
    Grid,
    Latent,
    NonFiniteError,
    Posterior,
    VDenoiser,
    sample,
)
from scoresde.codecs import Standardise
from scoresde.exact import Gaussian, GaussianMixture
from scoresde.guidance import ClassifierFree, Replacement
from scoresde.noise import CounterNoise
from scoresde.solvers import (
    DDIM,
    DDPM,
    AdaptiveODE,
    AnnealedLangevin,
    Captured,
    DPMSolverPP,
    EDMStochastic,
    Heun,
    Parallel,
    PredictorCorrector,
    TimeTravel,
    UniPC,
    available,
)
from scoresde.tensors import as_time, expand_like

VP = VPSDE()
TABLES = {entry.name: entry.solver for entry in available() if entry.solver.has_table and not entry.adaptive}
MIXTURE = GaussianMixture(means=torch.tensor([[-1.0, 0.5], [1.0, 0.0], [0.0, -1.0]], dtype=torch.float64), std=0.2)


class Counting(Denoiser):
    """A denoiser that counts calls and entries."""

    def __init__(self, inner: Denoiser) -> None:
        self.inner, self.sde = inner, inner.sde
        self.calls, self.entries, self.most = 0, 0, 0

    def posterior(self, x: Tensor, t: Any, /, **cond: Any) -> Posterior:
        self.calls, self.entries, self.most = self.calls + 1, self.entries + len(x), max(self.most, len(x))
        return self.inner.posterior(x, t, **cond)


def both(denoiser: Denoiser, shape: Any, parallel: Parallel, **options: Any) -> tuple[Any, Any]:
    return sample(denoiser, shape, parallel.solver, **options), sample(denoiser, shape, parallel, **options)


def difference(a: Tensor, b: Tensor) -> float:
    """Of the worst sample, root mean square, in units of the samples' own."""
    return float((a - b).flatten(1).square().mean(1).max().sqrt() / a.square().mean().sqrt())


@pytest.mark.parametrize("name", TABLES)
def test_every_table_in_few_rounds(name):
    solver = TABLES[name]
    steps = solver.steps_within(VP, 16)
    denoiser = MIXTURE.denoiser(VP)
    loop, few = both(denoiser, (2, 2), Parallel(solver, window=8), steps=steps, seed=3)
    # Measured, not proven: the largest over the catalogue is 1.0e-3 here.
    assert difference(loop.x, few.x) < 3e-3
    assert few.rounds <= 0.75 * loop.nfe
    assert few.nfe <= 10 * loop.nfe


@pytest.mark.parametrize("window", [1, 3, None])
@pytest.mark.parametrize(
    "solver",
    [DDIM(), UniPC(3), Heun(), DDPM(), EDMStochastic(), TimeTravel(jump=2, repeats=2), DPMSolverPP(3, stochastic=True)],
    ids=repr,
)
def test_without_a_tolerance_it_is_the_loop(solver, window):
    denoiser = Nonlinear(VP)
    x = normal(3, 2, 2)
    loop, whole = both(denoiser, x, Parallel(solver, window, tol=0.0), steps=6, seed=1)
    torch.testing.assert_close(whole.x, loop.x, rtol=1e-11, atol=1e-11)
    assert whole.rounds <= loop.nfe
    if window == 1:
        assert (whole.rounds, whole.nfe) == (loop.nfe, loop.nfe)


@pytest.mark.parametrize("name", SDES)
def test_every_process(name):
    sde = SDES[name]
    grid = Grid.log_snr(sde, 8, start=start_of(sde), end=end_of(sde))
    if sde.nodes is not None:
        grid = Grid.customary(sde, 8)
    for solver in (UniPC(2), DDPM()):
        loop, whole = both(Nonlinear(sde), sde.prior_std * normal(2, 3), Parallel(solver, 5, 0.0), grid=grid, seed=0)
        torch.testing.assert_close(whole.x, loop.x, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("solver", [UniPC(3), AnnealedLangevin(), PredictorCorrector(corrector="ald")], ids=repr)
def test_smaller_tolerance_smaller_difference(solver):
    denoiser = MIXTURE.denoiser(VP)
    x = normal(4, 2)
    errors = []
    for tol in (1e-1, 1e-3, 1e-6):
        loop, few = both(denoiser, x, Parallel(solver, tol=tol), nfe=20, seed=0)
        errors.append(difference(loop.x, few.x))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-5


def test_gaussian_data_of_the_scale_of_the_process_take_three_rounds():
    denoiser = Gaussian(mean=torch.zeros(3, dtype=torch.float64), std=1.0).denoiser(VP)
    loop, few = both(denoiser, normal(5, 3), Parallel(DDIM(), window=100), steps=100)  # kappa is the Jacobian
    assert few.rounds <= 3
    assert difference(loop.x, few.x) < 1e-12


def test_evaluations_are_counted_and_the_window_bounds_a_call():
    counting = Counting(MIXTURE.denoiser(VP))
    few = sample(counting, (3, 2), Parallel(DDPM(), window=8), steps=30, seed=0)
    assert (counting.calls, counting.entries) == (few.rounds, 3 * few.nfe)
    assert counting.most <= 8 * 3
    assert sample(counting, (3, 2), DDPM(), steps=3, seed=0).rounds is None


@pytest.mark.parametrize("solver", [DDIM(), DDPM()], ids=repr)
def test_a_sample_is_the_same_in_any_batch(solver):
    denoiser = MIXTURE.denoiser(VP)
    seeds = [5, 9, 2, 7]
    parallel = Parallel(solver, window=6, tol=1e-2)  # a crude one: to the tolerance would be seen
    together = sample(denoiser, (4, 2), parallel, steps=24, seed=seeds)
    for i, seed in enumerate(seeds):
        alone = sample(denoiser, (1, 2), parallel, steps=24, seed=[seed])
        torch.testing.assert_close(together.x[i : i + 1], alone.x, rtol=1e-4, atol=1e-5)


def test_noise_of_every_source_is_the_loops():
    denoiser = MIXTURE.denoiser(VP)
    parallel = Parallel(DDPM(), window=4, tol=0.0)
    x = normal(2, 2)
    draws = normal(8, 2, 2, seed=4)
    for options in (
        {"generator": None},
        {"noise": lambda row, _: draws[row]},
        {"noise": CounterNoise([3, 4])},
        {"seed": 3, "path": True},
    ):
        runs = []
        for solver in (parallel.solver, parallel):
            if "generator" in options:
                options = {"generator": torch.Generator().manual_seed(0)}
            runs.append(sample(denoiser, x, solver, steps=8, **options).x)
        torch.testing.assert_close(*runs, rtol=1e-11, atol=1e-11)


class Told(torch.nn.Module):
    """A network that is told a label and texts, and looks at each."""

    def forward(self, x: Tensor, t: Tensor, label: Tensor, text: Any = None, scale: float = 1.0) -> Tensor:
        assert len(t) == len(x) == len(label)
        n = torch.tensor([len(s) for s in text], dtype=x.dtype) if text else 0 * label
        return torch.tanh(x * scale + expand_like(label.to(x) + n, x)) * expand_like(as_time(t).to(x), x).cos()


@pytest.mark.parametrize("kind", [EpsDenoiser, VDenoiser])
def test_conditions_go_with_their_samples(kind):
    denoiser = kind(Told(), VP)
    cond = {"label": torch.tensor([0.0, 1.0, 2.0]), "text": ["a", "bb", ""], "scale": 0.5}
    grid = Grid.log_snr(VP, 9, start=0.9, end=1e-3)
    loop, whole = both(denoiser, normal(3, 4), Parallel(DDPM(), 4, 0.0), grid=grid, seed=0, cond=cond)
    torch.testing.assert_close(whole.x, loop.x, rtol=1e-5, atol=1e-6)  # labels are float32
    for guided in (  # rows of one call in the interval and out of it
        ClassifierFree(Clip(denoiser, -1, 1), 2.0, null={"label": -1.0}),
        ClassifierFree(denoiser, lambda t: 1 + t, null={"label": -1.0}, interval=(0.05, 1.0)),
    ):
        loop, whole = both(guided, normal(3, 4), Parallel(UniPC(2), 4, 0.0), grid=grid, cond=cond)
        torch.testing.assert_close(whole.x, loop.x, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_repeated_is_said_before_any_evaluation():
    counting = Counting(MIXTURE.denoiser(VP))
    with pytest.raises(ValueError, match="cannot be taken apart"):
        sample(counting, (3, 2), Parallel(DDIM()), steps=5, cond={"label": [1.0, 2.0, 3.0]})
    assert counting.calls == 0


def test_a_scale_for_each_sample_is_refused_with_a_reason():
    denoiser = ClassifierFree(EpsDenoiser(Told(), VP), torch.tensor([1.0, 2.0]), null={"label": -1.0})
    one = Parallel(DDIM(), window=1)  # no entry is repeated
    assert sample(denoiser, (2, 4), one, steps=2, cond={"label": torch.ones(2)}, seed=0).nfe == 2
    with pytest.raises(ValueError, match="2 entries") as raised:
        sample(denoiser, (2, 4), Parallel(DDIM()), steps=9, cond={"label": torch.ones(2)}, seed=0)
    assert "each sample as a condition" in raised.value.__notes__[0]


def test_trajectory_codec_dtype_and_progress(capsys):
    denoiser = Latent(MIXTURE.denoiser(VP), Standardise(mean=0.5, std=2.0))
    options = {"steps": 9, "seed": 0, "trajectory": True}
    loop, whole = both(denoiser, (3, 2), Parallel(DDPM(), 4, 0.0), progress=True, **options)
    torch.testing.assert_close(whole.trajectory, loop.trajectory, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole.x, loop.x, rtol=1e-4, atol=1e-5)
    assert whole.latent is not None
    assert "Parallel" in capsys.readouterr().err
    half = sample(MIXTURE.denoiser(VP), normal(3, 2).half(), Parallel(DDIM()), steps=9)
    assert half.x.dtype == torch.float16


def test_a_chain_and_an_increasing_grid():
    chain = DDPMChain.linear(20)
    net = EpsDenoiser(lambda x, t: torch.sin(x + t[:, None]), chain, time=chain.label)
    loop, whole = both(net, normal(2, 3), Parallel(DDPM(), 6, 0.0), steps=10, seed=0)
    torch.testing.assert_close(whole.x, loop.x, rtol=1e-6, atol=1e-6)  # labels are float32
    up = Grid.log_snr(VP, 8, start=0.9, end=1e-3).reversed()
    loop, whole = both(Nonlinear(VP), normal(2, 3), Parallel(UniPC(2), 3, 0.0), grid=up)
    torch.testing.assert_close(whole.x, loop.x, rtol=1e-11, atol=1e-11)


def test_gradients_and_densities_are_the_loops():
    denoiser = MIXTURE.denoiser(VP)
    gradients = []
    for solver in (UniPC(2), Parallel(UniPC(2))):
        x = normal(2, 2).requires_grad_()
        solution = sample(denoiser, x, solver, steps=5, differentiable=True)
        gradients.append(torch.autograd.grad(solution.x.sum(), x)[0])
    assert solution.rounds == solution.nfe == 5
    assert torch.equal(*gradients)
    loop, few = both(denoiser, (2, 2), Parallel(DDIM()), steps=5, seed=0, log_prob="exact")
    assert torch.equal(loop.log_prob, few.log_prob)


def test_the_budget_is_the_solvers_own():
    assert Parallel(Heun()).within(VP, 9)[1] == Heun().within(VP, 9)[1]
    assert sample(MIXTURE.denoiser(VP), (2, 2), Parallel(Heun()), nfe=9, seed=0).grid.steps == 5
    for entry in available():  # a chain's nodes, or times between them
        if entry.name in TABLES:
            assert Parallel(entry.solver).between == entry.solver.between


@dataclass
class Breaking(Denoiser):
    """NaN of the samples below a time, where their first entry is positive; or, far from the solution, of all."""

    inner: Denoiser
    below: float = 0.0
    far: float = float("inf")

    @property
    def sde(self) -> Any:  # type: ignore[override]
        return self.inner.sde

    def posterior(self, x: Tensor, t: Any, /, **cond: Any) -> Posterior:
        mean = self.inner.posterior(x, t).mean
        t = as_time(t).expand(len(x)).to(x)
        bad = ((t < self.below) & (x[:, 0] > 0)) | (x.abs().amax(1) > self.far)
        return Posterior(torch.where(bad[:, None], torch.nan, mean))


def test_non_finite_values_are_located_as_in_the_loop():
    broken = Breaking(MIXTURE.denoiser(VP), below=0.3)
    found = []
    for solver in (DDPM(), Parallel(DDPM(), window=7)):
        with pytest.raises(NonFiniteError) as raised:
            sample(broken, (4, 2), solver, steps=20, seed=1)
        found.append((raised.value.step, raised.value.time, raised.value.samples))
    assert found[0] == found[1]


def test_guesses_that_break_the_network_do_no_harm():
    x = normal(3, 2)
    loop = sample(MIXTURE.denoiser(VP), x, DDPM(), steps=16, seed=2, trajectory=True)
    far = 1.0001 * float(loop.trajectory.abs().max())  # just beyond what the samples reach
    few = sample(Breaking(MIXTURE.denoiser(VP), far=far), x, Parallel(DDPM(), tol=1e-9), steps=16, seed=2)
    assert difference(loop.x, few.x) < 1e-7
    wild = EpsDenoiser(lambda x, t: (9 * x).sin() * 5, VP)  # no contraction anywhere
    loop, few = both(wild, x, Parallel(DDIM(), tol=0.0), grid=Grid.log_snr(VP, 12, start=0.9, end=1e-2))
    torch.testing.assert_close(few.x, loop.x, rtol=1e-3, atol=1e-3)  # chaos multiplies rounding
    assert few.rounds <= 12


def test_what_it_is_not_for():
    for solver in (AdaptiveODE(), PredictorCorrector(), Parallel(DDIM()), DDIM):
        with pytest.raises(ValueError, match="coefficients are known beforehand"):
            Parallel(solver)
    with pytest.raises(ValueError, match="window=0"):
        Parallel(DDIM(), window=0)
    with pytest.raises(ValueError, match="tol"):
        Parallel(DDIM(), tol=-1.0)
    with pytest.raises(ValueError, match="stops by the states that it meets"):
        Captured(Parallel(DDIM()))
    with pytest.raises(ValueError, match="overwrites the states"):
        Replacement(Parallel(DDPM()), torch.tensor([True, False]), y=torch.zeros(1, 2))


def test_the_committed_results_are_what_the_pages_say():
    found = json.loads((Path(__file__).parent.parent / "benchmarks/results/parallel/results.json").read_text())
    cells = [c for c in found["cells"] if c["solver"] in TABLES]
    assert {c["solver"] for c in cells if c["model"] == "ring"} == set(TABLES)
    assert max(c["difference"] for c in cells) < 2e-3
    for deterministic, goal in ((True, 0.15), (False, 0.25)):
        for model in found["models"]:
            of = [c for c in cells if c["model"] == model and c["deterministic"] == deterministic]
            assert median(c["rounds"] / c["N"] for c in of) <= goal
            assert median(c["evaluations"] / c["N"] for c in of) <= 10
