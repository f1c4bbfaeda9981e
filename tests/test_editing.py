"""Editing: laws of SDEdit in closed form, round trips and bridges through latents, seeds, masks, errors."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from common import EVERY_SDE, SDES, Counting, Nonlinear, normal

from scoresde import (
    EDMSDE,
    VESDE,
    VPSDE,
    DDPMChain,
    EpsDenoiser,
    FlowSDE,
    Grid,
    Posterior,
    VelocityDenoiser,
    sample,
    sample_seeds,
)
from scoresde.analysis import gaussian_law
from scoresde.editing import (
    decode,
    edit,
    encode,
    interpolate,
    interpolation,
    interpolation_grid,
    sdedit,
    strength_time,
    variations,
)
from scoresde.exact import Gaussian, GaussianMixture
from scoresde.guidance.replacement import RePaint, Replacement
from scoresde.solvers import DDIM, DDPM, AdaptiveODE, DPMSolverPP, Heun, ReverseSDE, RungeKutta, TimeTravel, UniPC
from scoresde.wrappers import Wrapper

MEAN, STD = torch.tensor([0.5, -0.3, 1.0]).double(), torch.tensor([0.3, 1.0, 0.6]).double()
TARGET = Gaussian(MEAN, std=STD)
OTHER = Gaussian(torch.tensor([-1.0, 0.4, 0.0]).double(), std=torch.tensor([0.8, 0.2, 0.6]).double())
MIXTURE = GaussianMixture(means=[[-2.0, 0.0], [2.0, 1.0]], weights=[0.3, 0.7], std=0.3)
FINE = RungeKutta("rk4", "angle")


def closeto(found, expected, tolerance):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


class Classes(Wrapper):
    """Two models in one, by `label` per sample: what a class-conditional network is."""

    def __init__(self, *targets, sde):
        super().__init__(targets[0].denoiser(sde))
        self.models = [target.denoiser(sde) for target in targets]

    def posterior(self, x, t, /, *, label):
        means = [model.posterior(x, t).mean for model in self.models]
        return Posterior(torch.where(label.reshape(-1, *[1] * (x.ndim - 1)) == 0, *means))


# --- strength --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY_SDE)
def test_strength_is_a_time_from_the_data_to_t_max(name):
    sde = EVERY_SDE[name]
    times = [strength_time(sde, s) for s in (1e-9, 0.1, 0.3, 0.5, 0.9, 1.0)]
    assert times[-1] == sde.t_max
    assert times == sorted(times)
    if isinstance(sde, DDPMChain):
        assert times[0] == 1
        assert all(t == int(t) for t in times)
    else:
        assert 0 < times[0] < 1e-6 * sde.t_max
    if sde.customary_grid == "uniform":
        assert times == pytest.approx([s * sde.t_max for s in (1e-9, 0.1, 0.3, 0.5, 0.9, 1.0)], rel=1e-6)
    if not isinstance(sde, DDPMChain):  # a fraction of the customary spacing, however many steps it has
        assert strength_time(sde, 0.3) == pytest.approx(float(Grid.customary(sde, 100).times[70]), rel=0.1)


@pytest.mark.parametrize("solver", [DDPM(), DDIM(), UniPC(), Heun(), DDPM(variance="beta")], ids=repr)
@pytest.mark.parametrize("name", SDES)
def test_the_way_is_the_part_of_the_solvers_grid_below_t(name, solver):
    sde = SDES[name]
    counting = Counting(TARGET.denoiser(sde))
    found = sdedit(counting, normal(2, 3), solver, strength=0.4, steps=10, seed=0, trajectory=True)
    whole, t = solver.grid(sde, 10).times, strength_time(sde, 0.4)
    assert float(found.grid.times[0]) == t == counting.times[0]
    assert found.grid.times[1:].tolist() == whole[-found.grid.steps :].tolist()
    assert float(whole[-found.grid.steps - 1]) >= t * (1 - 1e-9)
    assert found.nfe == len(counting.times) == solver.evaluations(found.grid)
    assert len(found.trajectory) == found.grid.steps + 1
    assert torch.equal(found.trajectory[-1], found.x)


def test_the_same_strength_by_steps_time_budget_and_grid():
    denoiser, x = MIXTURE.denoiser(VPSDE()), normal(3, 2)
    by_steps = sdedit(denoiser, x, UniPC(), strength=0.3, steps=20, seed=1)
    own = UniPC().grid(VPSDE(), 20)
    for choice in ({"t": 0.3, "steps": 20}, {"strength": 0.3, "grid": own}, {"strength": 0.3, "nfe": 20}):
        assert torch.equal(sdedit(denoiser, x, UniPC(), seed=1, **choice).x, by_steps.x)
    assert by_steps.nfe <= 20
    # Of a uniform grid, that fraction of the steps; a node of the grid is met though 0.3 is none in binary.
    assert sdedit(denoiser, x, Heun("t"), strength=0.3, grid=Grid.uniform(VPSDE(), 10), seed=1).grid.steps == 3
    assert sdedit(denoiser, x, DDIM(), strength=0.31, grid=Grid.uniform(VPSDE(), 10), seed=1).grid.steps == 4


def test_adaptive_solvers_start_there_too():
    denoiser, x = MIXTURE.denoiser(VPSDE()), normal(4, 2)
    found = sdedit(denoiser, x, AdaptiveODE(rtol=1e-6, atol=1e-6), strength=0.4, seed=3)
    fine = sdedit(denoiser, x, FINE, strength=0.4, steps=60, seed=3)
    closeto(found.x, fine.x, 1e-4)
    assert found.grid.times.tolist() == [0.4, 0.0]
    short = sdedit(denoiser, x, AdaptiveODE(), strength=0.4, nfe=15, seed=3)
    assert short.status == "max_nfe"
    assert short.nfe <= 15


# --- laws of SDEdit --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("solver", [DDPM(), UniPC(), ReverseSDE()], ids=repr)
def test_little_strength_leaves_the_reference(name, solver):
    """The distance falls with the noise level: at most 5 sigma / alpha of it, and what D moves, (x - m) sigma^2 / v."""
    sde, x = SDES[name], normal(3, 3)
    for t in (10 * sde.t_min, sde.t_min) if not isinstance(sde, DDPMChain) else (1.0,):
        level = float(sde.sigma(t) / sde.alpha(t))
        found = sdedit(TARGET.denoiser(sde), x, solver, t=t, steps=10, seed=0)
        assert float((found.x - x).abs().max()) < 6 * level + 40 * level**2
    if sde.nodes is None and float(sde.sigma(1e-12)) < 1e-5:  # sigma goes to zero with t
        found = sdedit(TARGET.denoiser(sde), x, solver, strength=1e-12, steps=10, seed=0)
        closeto(found.x, x, 1e-4)


@pytest.mark.parametrize("solver", [DDPM(), DDIM(), DPMSolverPP(), TimeTravel(DDPM(), 2, 2)], ids=repr)
def test_full_strength_is_sampling(solver):
    """Where alpha is zero at t_max nothing of the reference is left: bit for bit what `sample` draws."""
    denoiser = MIXTURE.denoiser(FlowSDE())
    edited = sdedit(denoiser, 7 * normal(5, 2).float(), solver, strength=1.0, steps=8, seed=4)
    assert torch.equal(edited.x, sample(denoiser, (5, 2), solver, steps=8, seed=4).x)
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    edited = sdedit(denoiser, 7 * normal(5, 2).float(), solver, strength=1.0, steps=8, generator=generators[0])
    assert torch.equal(edited.x, sample(denoiser, (5, 2), solver, steps=8, generator=generators[1]).x)


@pytest.mark.parametrize("sde", [VPSDE(), EDMSDE()], ids=repr)
def test_full_strength_has_the_law_of_the_data(sde):
    """Weights, means and widths of a mixture's modes, to five standard errors of 4000 samples and 2 % of bias."""
    n = 4000
    x = sdedit(MIXTURE.denoiser(sde), normal(1, 2).expand(n, 2), DDPM(), strength=1.0, steps=60,
               generator=torch.Generator().manual_seed(0)).x  # fmt: skip
    right = x[:, 0] > 0
    assert float(right.double().mean()) == pytest.approx(0.7, abs=5 * math.sqrt(0.21 / n) + 0.02)
    for mode, mean in ((x[right], [2.0, 1.0]), (x[~right], [-2.0, 0.0])):
        closeto(mode.mean(0), torch.tensor(mean).double(), 5 * 0.3 / math.sqrt(len(mode)) + 0.02)
        closeto(mode.std(0), torch.full((2,), 0.3).double(), 5 * 0.3 / math.sqrt(2 * len(mode)) + 0.02)


def law(sde, t, reference, deterministic):
    """Mean and variance of SDEdit's output on TARGET, each (3,), as the module's docstring says."""
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    S = alpha**2 * STD**2 + sigma**2
    K = alpha**2 * STD**2 / S
    if deterministic:
        return MEAN + K.sqrt() * (reference - MEAN), sigma**2 * STD**2 / S
    return MEAN + K * (reference - MEAN), (1 + K) * sigma**2 * STD**2 / S


def law_of_table(solver, grid, reference):
    """The same of the solver's table, exact to rounding: the response to x_t and the noise, from two known laws."""
    sde, t = grid.sde, float(grid.times[0])
    table = solver.tableau(grid)
    exact, prior = (gaussian_law(table, TARGET, x_T=start) for start in ("exact", "prior"))
    response = (exact.mean - prior.mean) / (float(sde.alpha(t)) * MEAN)
    noise = prior.variances - response**2 * sde.prior_std_at(t) ** 2
    return prior.mean + response * float(sde.alpha(t)) * reference, response**2 * float(sde.sigma(t)) ** 2 + noise


@pytest.mark.parametrize("strength", [0.15, 0.6])
@pytest.mark.parametrize("sde", [VPSDE(), VESDE(), FlowSDE(), DDPMChain()], ids=repr)
@pytest.mark.parametrize("solver", [DDPM(), DDIM(), UniPC()], ids=repr)
def test_the_law_at_intermediate_strength_is_the_closed_form(sde, solver, strength):
    """In the limit of many steps, in float64 without sampling: the table on the very grid that the run made."""
    reference = torch.tensor([2.0, -1.0, 0.0]).double()
    steps = 400 if not isinstance(sde, DDPMChain) else 1000
    grid = sdedit(TARGET.denoiser(sde), reference[None], solver, strength=strength, steps=steps, seed=0).grid
    tolerance = 0.015 if isinstance(solver, DDPM | DDIM) else 1e-3
    expected = law(sde, strength_time(sde, strength), reference, not isinstance(solver, DDPM))
    for found, wanted in zip(law_of_table(solver, grid, reference), expected, strict=True):
        closeto(found, wanted, tolerance)


@pytest.mark.parametrize("solver", [DDPM(), DDIM()], ids=repr)
def test_samples_have_that_law(solver):
    """Of a table of 20 steps: mean to 5 s / sqrt(n), variance to 5 v sqrt(2 / n), correlations to 5 / sqrt(n)."""
    n, sde, reference = 20_000, VPSDE(), torch.tensor([2.0, -1.0, 0.0]).double()
    found = sdedit(TARGET.denoiser(sde), reference.expand(n, 3), solver, strength=0.4, steps=20,
                   generator=torch.Generator().manual_seed(1))  # fmt: skip
    mean, variance = law_of_table(solver, found.grid, reference)
    assert bool(((found.x.mean(0) - mean).abs() < 5 * (variance / n).sqrt()).all())
    assert bool(((found.x.var(0) / variance - 1).abs() < 5 * math.sqrt(2 / n)).all())
    assert float((found.x.T.corrcoef() - torch.eye(3).double()).abs().max()) < 5 / math.sqrt(n)


def test_the_run_starts_from_the_perturbed_reference():
    """x_t - alpha x is sigma times standard normals, those of x_T of the same seed; the ODE then is the exact flow."""
    sde, x = VPSDE(), 5 + normal(300, 3)
    found = sdedit(TARGET.denoiser(sde), x, FINE, strength=0.3, steps=100, seed=9, trajectory=True)
    eps = (found.trajectory[0] - sde.alpha(0.3) * x) / sde.sigma(0.3)
    seeds = sample_seeds(9, 300)
    x_T = torch.cat([sde.prior((1, 3), generator_of(s), torch.float64) for s in seeds])
    closeto(eps, x_T, 1e-10)
    closeto(found.x, TARGET.flow(found.trajectory[0], sde, 0.3, 0.0), 1e-4)


def generator_of(seed):
    from scoresde.noise import derive_seed

    return torch.Generator().manual_seed(derive_seed(seed, 0))


@pytest.mark.parametrize("solver", [DDPM(), DDIM(), Heun(), TimeTravel(), ReverseSDE()], ids=repr)
def test_sample_i_is_the_same_in_any_batch(solver):
    denoiser, x = Nonlinear(VPSDE()), normal(4, 2, 3)
    options = {"strength": 0.6, "steps": 12}
    whole = sdedit(denoiser, x, solver, seed=7, **options).x
    seeds = sample_seeds(7, 4)
    closeto(sdedit(denoiser, x[1:3], solver, seed=seeds[1:3], **options).x, whole[1:3], 1e-12)
    assert torch.equal(sdedit(denoiser, x, solver, seed=7, **options).x, whole)
    assert not torch.equal(sdedit(denoiser, x, solver, seed=8, **options).x, whole)


@pytest.mark.parametrize("shape", [(2,), (2, 5), (2, 3, 4, 4), (2, 1, 2, 3, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_any_rank_and_dtype(shape, dtype):
    x = normal(*shape).to(dtype)
    before = x.clone()
    denoiser = EpsDenoiser(lambda x, t, **cond: 0.9 * x, VPSDE())
    assert sdedit(denoiser, x, DDPM(), strength=0.5, steps=4, seed=0).x.dtype == dtype
    assert edit(denoiser, x, DDIM(), steps=4).x.dtype == dtype
    found = variations(denoiser, x, 3, DDIM(), steps=4, seed=0, by="encoding", trajectory=True)
    assert (found.x.shape, found.latent.dtype) == ((3, *shape), dtype)
    assert found.trajectory.shape == (5, 3, *shape)
    if len(shape) > 1:
        assert interpolation(denoiser, x, x.flip(1), DDIM(), weights=4, steps=4).x.shape == (4, *shape)
        corners = torch.cat([x, 2 * x + 1])
        assert interpolation_grid(denoiser, corners, DDIM(), rows=2, columns=3, steps=4).x.shape == (2, 3, *shape[1:])
    assert torch.equal(x, before)


def test_gradients_reach_the_reference():
    x = normal(2, 3).requires_grad_()
    found = sdedit(TARGET.denoiser(VPSDE()), x, DDIM(), strength=0.3, steps=5, seed=0, differentiable=True)
    (gradient,) = torch.autograd.grad(found.x.sum(), x)
    assert float(gradient.min()) > 0
    assert not sdedit(TARGET.denoiser(VPSDE()), x, DDIM(), strength=0.3, steps=5, seed=0).x.requires_grad


# --- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [DDPM(), DDIM(), Heun(), UniPC(), ReverseSDE(), AdaptiveODE()], ids=repr)
@pytest.mark.parametrize("name", ["vp", "edm", "flow", "chain"])
def test_masked_elements_are_the_reference(name, solver):
    """Bit for bit at the end; the way there is alpha reference + sigma eps, by a deterministic solver with the first
    eps.
    """
    sde, x = SDES[name], normal(3, 3)
    mask = torch.tensor([True, False, True])
    options = {} if solver.adaptive else {"steps": 8}
    found = sdedit(TARGET.denoiser(sde), x, solver, strength=0.7, seed=0, mask=mask, trajectory=True, **options)
    if solver.adaptive:
        closeto(found.x[:, mask], x[:, mask], 1e-3)
        return
    assert torch.equal(found.x[:, mask], x[:, mask])
    assert not torch.equal(found.x[:, ~mask], x[:, ~mask])
    if isinstance(solver, DDIM):
        noisy = zip(found.grid.times[:-1], found.trajectory[:-1], strict=True)
        eps = [(state - sde.alpha(t) * x) / sde.sigma(t) for t, state in noisy]
        for later in eps[1:]:
            closeto(later[:, mask], eps[0][:, mask], 1e-6)


def test_the_others_see_what_is_kept():
    """With strong correlation the free element follows the known one, as far as a noisy look at it tells: nearer to
    its conditional mean than without the mask.
    """
    target = Gaussian([0.0, 0.0], cov=[[1.0, 0.95], [0.95, 1.0]])
    x = torch.tensor([[1.5, -1.5]]).double().expand(500, 2)
    options = {"strength": 1.0, "steps": 50, "seed": 0}
    kept = sdedit(target.denoiser(VPSDE()), x, DDPM(), mask=torch.tensor([1, 0]), **options).x
    free = sdedit(target.denoiser(VPSDE()), x, DDPM(), **options).x
    assert float(kept[:, 1].mean()) > 0.8
    assert abs(float(free[:, 1].mean())) < 5 / math.sqrt(500)


@pytest.mark.parametrize("solver", [DDPM(), Heun()], ids=repr)
def test_solvers_that_keep_what_is_known_go_with_it(solver):
    x, mask = normal(3, 3), torch.tensor([True, False, True])
    for keeping in (Replacement(solver, mask, x), RePaint(mask, x, solver=solver, jump=2, resamplings=2)):
        found = sdedit(TARGET.denoiser(VPSDE()), x, keeping, strength=0.6, steps=8, seed=0).x
        assert torch.equal(found[:, mask], x[:, mask])
        assert float((found[:, ~mask] - x[:, ~mask]).abs().min()) > 1e-3


# --- encode, edit, decode --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SDES)
def test_under_one_condition_it_is_the_identity(name):
    sde = SDES[name]
    x = TARGET.sample(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = edit(TARGET.denoiser(sde), x, AdaptiveODE(rtol=1e-7, atol=1e-7))
    closeto(found.x, x, 1e-3)
    closeto(found.latent, TARGET.flow(x, sde, sde.t_min, sde.t_max), 1e-3 * sde.prior_std)
    code = encode(TARGET.denoiser(sde), x, UniPC(3), steps=8)
    same = edit(TARGET.denoiser(sde), x, UniPC(3), steps=8)
    assert torch.equal(same.latent, code.latent)
    assert torch.equal(same.x, decode(TARGET.denoiser(sde), code.latent, UniPC(3), grid=code.grid).x)
    assert same.nfe == 2 * code.nfe


@pytest.mark.parametrize(
    ("solver", "order"), [(DDIM(), 1), (RungeKutta("midpoint", "angle"), 2), (FINE, 4)], ids=["ddim", "midpoint", "rk4"]
)
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_the_identity_holds_to_the_order_of_the_solver(solver, order, strength):
    x = MIXTURE.sample(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sde = VPSDE()

    def error(steps):
        grid = Grid.log_snr(sde, steps, start=1.0, last=None, end=0.01)
        return float((edit(MIXTURE.denoiser(sde), x, solver, grid=grid, strength=strength).x - x).abs().mean())

    coarse, fine = (20, 80)
    assert math.log(error(coarse) / error(fine)) / math.log(4) > order - 0.3


def test_partial_encoding_stops_at_its_strength():
    sde = VPSDE()
    x = TARGET.sample(4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = edit(TARGET.denoiser(sde), x, FINE, to=OTHER.denoiser(sde), strength=0.3, steps=60, trajectory=True)
    closeto(found.latent, TARGET.flow(x, sde, sde.t_min, 0.3), 1e-5)
    closeto(found.x, OTHER.flow(found.latent, sde, 0.3, sde.t_min), 1e-4)
    assert (float(found.grid.times[0]), float(found.grid.times[-1])) == (0.3, sde.t_min)
    assert torch.equal(found.trajectory[0], found.latent)
    assert torch.equal(found.trajectory[-1], found.x)
    adaptive = edit(TARGET.denoiser(sde), x, to=OTHER.denoiser(sde), t=0.3)
    closeto(adaptive.x, found.x, 1e-3)
    far = edit(TARGET.denoiser(sde), x, FINE, to=OTHER.denoiser(sde), strength=1.0, steps=60)
    assert float((found.x - x).norm()) < float((far.x - x).norm())


@pytest.mark.parametrize(("first", "second"), [(FlowSDE(), FlowSDE()), (VPSDE(), VPSDE()), (EDMSDE(), FlowSDE()),
                                               (VESDE(), VPSDE())], ids=repr)  # fmt: skip
def test_the_bridge_of_two_gaussians_is_the_map_of_optimal_transport(first, second):
    """m' + sqrt(C' / C) (x - m); what the prior remembers of the data, alpha_T / prior_std, is its error, as is t_min.
    Back again it is undone.
    """
    x = TARGET.sample(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b = TARGET.denoiser(first), OTHER.denoiser(second)
    solver = AdaptiveODE(rtol=1e-6, atol=1e-6)
    found = edit(a, x, solver, to=b)
    mean, std = OTHER._means[0], OTHER._variances[0].sqrt()
    remembered = max(float(s.alpha(s.t_max)) / s.prior_std for s in (first, second))
    width = max(float(s.sigma(s.t_min)) for s in (first, second))
    closeto(found.x, mean + std / STD * (x - MEAN), 1e-3 + 8 * remembered + 3 * width**2)
    closeto(edit(b, found.x, solver, to=a).x, x, 1e-3)
    # Of that, what the two flows say exactly.
    latent = TARGET.flow(x, first, first.t_min, first.t_max) * second.prior_std / first.prior_std
    closeto(found.x, OTHER.flow(latent, second, second.t_max, second.t_min), 1e-3)


def test_a_full_covariance_is_carried_by_its_own_root():
    """Not only along the axes: C^(1/2)-maps of commuting covariances."""
    angle = torch.tensor(0.7).double()
    R = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    one, two = (R @ torch.diag(torch.tensor(v).double()) @ R.T for v in ([0.25, 1.0], [1.0, 0.04]))
    transport = R @ torch.diag(torch.tensor([2.0, 0.2]).double()) @ R.T
    a, b = Gaussian([1.0, 2.0], cov=one), Gaussian([-1.0, 0.0], cov=two)
    x = a.sample(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = edit(a.denoiser(FlowSDE()), x, AdaptiveODE(rtol=1e-6, atol=1e-6), to=b.denoiser(FlowSDE())).x
    closeto(found, torch.tensor([-1.0, 0.0]) + (x - torch.tensor([1.0, 2.0])) @ transport.T, 1e-3)


def test_classes_by_condition_are_two_denoisers():
    sde = VPSDE()
    both = Classes(TARGET, OTHER, sde=sde)
    x = TARGET.sample(4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    label = {k: {"label": torch.full((4,), k)} for k in (0, 1)}
    found = edit(both, x, UniPC(3), cond_from=label[0], cond_to=label[1], steps=12)
    expected = edit(TARGET.denoiser(sde), x, UniPC(3), to=OTHER.denoiser(sde), steps=12)
    closeto(found.x, expected.x, 1e-10)
    mixed = torch.tensor([0, 1, 0, 1])
    some = edit(both, x, UniPC(3), cond_from=label[0], cond_to={"label": mixed}, steps=12).x
    same = edit(both, x, UniPC(3), cond_from=label[0], cond_to=label[0], steps=12).x
    assert torch.equal(some, torch.where(mixed[:, None] == 1, found.x, same))
    assert torch.equal(edit(both, x[2:3], UniPC(3), cond_from={"label": torch.tensor([0])},
                            cond_to={"label": torch.tensor([1])}, steps=12).x, found.x[2:3])  # fmt: skip


def test_a_budget_that_runs_out_is_an_error():
    x = normal(2, 2)
    for call in (
        lambda: edit(MIXTURE.denoiser(VPSDE()), x, nfe=20),
        lambda: interpolation(MIXTURE.denoiser(VPSDE()), x, x + 1, nfe=20),
        lambda: variations(MIXTURE.denoiser(VPSDE()), x, 2, AdaptiveODE(), nfe=10, seed=0),
    ):
        with pytest.raises(ArithmeticError, match="evaluations ran out at t ="):
            call()


# --- interpolation ---------------------------------------------------------------------------------------------------


def test_the_ends_of_an_interpolation_are_its_inputs():
    sde, solver = VPSDE(), AdaptiveODE(rtol=1e-6, atol=1e-6)
    a, b = MIXTURE.sample(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).chunk(2)
    found = interpolation(MIXTURE.denoiser(sde), a, b, solver, weights=5)
    closeto(found.x[0], a, 1e-3)
    closeto(found.x[-1], b, 1e-3)
    assert (found.x.shape, found.latent.shape) == ((5, 3, 2), (5, 3, 2))
    # Between: the latents on the great circle, decoded.
    z = encode(MIXTURE.denoiser(sde), torch.cat([a, b]), UniPC(3), steps=15).latent
    table = interpolation(MIXTURE.denoiser(sde), a, b, UniPC(3), weights=[0.25, 0.6], steps=15)
    for i, w in enumerate((0.25, 0.6)):
        expected = decode(MIXTURE.denoiser(sde), interpolate(z[:3], z[3:], w), UniPC(3), steps=15)
        closeto(table.x[i], expected.x, 1e-6)
    alone = interpolation(MIXTURE.denoiser(sde), a[1:2], b[1:2], UniPC(3), weights=[0.6], steps=15)
    closeto(alone.x[0, 0], table.x[1, 1], 1e-12)


def test_the_middle_of_gaussian_data_is_gaussian_data():
    """Interpolated latents of draws are nearly draws of the prior (of 400 dimensions), so data between data has their
    mean and width, which the middle of the data itself has not.
    """
    target = Gaussian(torch.full((400,), 2.0), std=0.5)
    a, b = target.sample(60, generator=torch.Generator().manual_seed(0), dtype=torch.float64).chunk(2)
    x = interpolation(target.denoiser(FlowSDE()), a, b, RungeKutta("rk4", "flow"), weights=[0.5], steps=20).x[0]
    n = x.numel()
    assert float(x.mean()) == pytest.approx(2.0, abs=5 * 0.5 / math.sqrt(n) + 1e-3)
    assert float(x.std()) == pytest.approx(0.5, rel=5 / math.sqrt(2 * n) + 0.02)
    assert float(((a + b) / 2).std()) == pytest.approx(0.5 / math.sqrt(2), rel=0.02)


def test_a_sheet_has_its_corners_and_its_sides():
    sde, solver = VPSDE(), AdaptiveODE(rtol=1e-6, atol=1e-6)
    corners = TARGET.sample(4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    denoiser = TARGET.denoiser(sde)
    x = interpolation_grid(denoiser, corners, solver, rows=3, columns=4).x
    assert x.shape == (3, 4, 3)
    closeto(torch.stack([x[0, 0], x[0, -1], x[-1, 0], x[-1, -1]]), corners, 1e-3)
    down = interpolation(denoiser, corners[:1], corners[2:3], solver, weights=3).x[:, 0]
    across = interpolation(denoiser, corners[:1], corners[1:2], solver, weights=4).x[:, 0]
    closeto(x[:, 0], down, 1e-3)
    closeto(x[0], across, 1e-3)
    table = interpolation_grid(denoiser, corners, UniPC(3), rows=[0.5], columns=[0.2], steps=8)
    assert table.x.shape == (1, 1, 3)


def test_conditions_of_pairs_are_repeated_along_their_paths():
    both = Classes(TARGET, OTHER, sde=VPSDE())
    a, b = normal(2, 3, seed=1), normal(2, 3, seed=2)
    label = torch.tensor([0, 1])
    found = interpolation(both, a, b, UniPC(3), weights=3, cond={"label": label}, steps=8).x
    for i, target in enumerate((TARGET, OTHER)):
        alone = interpolation(target.denoiser(VPSDE()), a[i : i + 1], b[i : i + 1], UniPC(3), weights=3, steps=8).x
        closeto(found[:, i], alone[:, 0], 1e-10)
    shared = interpolation(both, a, b, UniPC(3), weights=3, cond={"label": torch.tensor([1])}, steps=8).x
    closeto(shared[:, 1], found[:, 1], 1e-12)
    for by in ("perturbation", "encoding"):
        found = variations(both, a, 2, DDIM(), by=by, cond={"label": label}, steps=5, seed=[3, 4]).x
        alone = variations(OTHER.denoiser(VPSDE()), a[1:], 2, DDIM(), by=by, steps=5, seed=[4]).x
        closeto(found[:, 1:], alone, 1e-10)


# --- variations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["perturbation", "encoding"])
def test_variation_j_of_sample_i_depends_on_no_other(by):
    denoiser, x = Nonlinear(VPSDE()), normal(3, 2, 2)
    solver = DDPM() if by == "perturbation" else DDIM()
    options = {"by": by, "strength": 0.4, "steps": 6}
    whole = variations(denoiser, x, 4, solver, seed=5, **options)
    assert whole.x.shape == whole.latent.shape == (4, 3, 2, 2)
    some = variations(denoiser, x[1:2], 2, solver, seed=[sample_seeds(5, 3)[1]], **options)
    closeto(some.x[:, 0], whole.x[:2, 1], 1e-12)
    assert torch.equal(variations(denoiser, x, 4, solver, seed=5, **options).x, whole.x)
    pairs = whole.latent.reshape(12, -1)
    assert float(torch.pdist(pairs).min()) > 1e-3  # all of them others


def test_variations_are_sdedit_of_each():
    denoiser, x = MIXTURE.denoiser(VPSDE()), normal(2, 2)
    found = variations(denoiser, x, 3, DDPM(), strength=0.4, steps=10, seed=5)
    from scoresde.noise import derive_seed

    seeds = [derive_seed(s, 4, 2) for s in sample_seeds(5, 2)]
    closeto(found.x[2], sdedit(denoiser, x, DDPM(), strength=0.4, steps=10, seed=seeds).x, 1e-12)


def test_variations_in_the_latent_have_their_law():
    """On Gaussian data and alpha_T = 0, decoding is affine: N(m + sqrt(1 - s^2) (x - m), s^2 C); and variations of
    draws are draws. To five standard errors, 2e-3 for t_min and the solver.
    """
    n, s = 5000, 0.6
    x = torch.tensor([[2.0, -1.0, 0.0]]).double()
    solver = RungeKutta("rk4", "flow")
    found = variations(TARGET.denoiser(FlowSDE()), x, n, solver, by="encoding", strength=s, steps=40, seed=3).x[:, 0]
    mean = MEAN + math.sqrt(1 - s**2) * (x[0] - MEAN)
    assert bool(((found.mean(0) - mean).abs() < 5 * s * STD / math.sqrt(n) + 2e-3).all())
    assert bool(((found.std(0) / (s * STD) - 1).abs() < 5 / math.sqrt(2 * n) + 2e-3).all())
    close = variations(TARGET.denoiser(FlowSDE()), x, 3, solver, by="encoding", strength=1e-6, steps=40, seed=3).x
    closeto(close[:, 0], x.expand(3, 3), 1e-4)


def test_without_a_seed_the_system_draws():
    denoiser, x = MIXTURE.denoiser(VPSDE()), normal(2, 2)
    state = torch.random.get_rng_state()
    for call in (
        lambda: variations(denoiser, x, 2, DDPM(), steps=3).x,
        lambda: sdedit(denoiser, x, DDPM(), strength=0.5, steps=3).x,
    ):
        assert not torch.equal(call(), call())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_example_draws_its_picture(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    import editing as example

    monkeypatch.setattr(example, "STRENGTHS", (0.1, 1.0))
    monkeypatch.setattr(example, "SHOWN", 1)
    example.main(["--out", str(tmp_path), "--steps", "3", "--draws", "1", "--points", "20"])
    results = json.loads((tmp_path / "editing.json").read_text())
    assert results["sdedit"]["to_stroke"][0] < results["sdedit"]["to_stroke"][-1]
    assert (tmp_path / "editing.png").read_bytes()[:4] == b"\x89PNG"


# --- errors ----------------------------------------------------------------------------------------------------------


class Silent(Nonlinear):
    def posterior(self, x, t, **cond):
        raise AssertionError("a network call before the check")


DENOISER, X, UP = Silent(VPSDE()), normal(2, 3), {"steps": 3}


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: sdedit(torch.tanh, X, DDIM(), strength=0.5, **UP), TypeError, "expected a Denoiser"),
        (lambda: sdedit(DENOISER, X, DDIM, strength=0.5, **UP), TypeError, "instance of a solver"),
        (lambda: sdedit(DENOISER, X.long(), DDIM(), strength=0.5, **UP), ValueError, "floating-point"),
        (lambda: sdedit(DENOISER, X, DDIM(), **UP), ValueError, "exactly one of strength= and t=; got neither"),
        (lambda: sdedit(DENOISER, X, DDIM(), strength=0.5, t=0.5, **UP), ValueError, "got both"),
        (lambda: sdedit(DENOISER, X, DDIM(), strength=0.0, **UP), ValueError, "strength=0.0: expected a number in"),
        (lambda: sdedit(DENOISER, X, DDIM(), strength=1.5, **UP), ValueError, "strength=1.5"),
        (lambda: sdedit(DENOISER, X, DDIM(), strength=math.nan, **UP), ValueError, "strength=nan"),
        (lambda: sdedit(DENOISER, X, DDIM(), t=1.5, **UP), ValueError, r"t=1.5: expected a time in \(0, 1.0\]"),
        (lambda: sdedit(DENOISER, X, DDIM(), strength=0.5), ValueError, "got none"),
        (lambda: sdedit(DENOISER, X, DDIM(), strength=0.5, steps=3, nfe=3), ValueError, "got steps and nfe"),
        (lambda: sdedit(DENOISER, X, DDIM(), strength=0.5, grid=[1, 0]), TypeError, "grid is list"),
        (
            lambda: sdedit(DENOISER, X, DDIM(), strength=0.5, grid=Grid.uniform(EDMSDE(), 3)),
            ValueError,
            "was made for",
        ),
        (
            lambda: sdedit(DENOISER, X, DDIM(), strength=0.5, grid=Grid.uniform(VPSDE(), 3, start=0.4)),
            ValueError,
            "an edit from t = 0.5",
        ),
        (
            lambda: sdedit(DENOISER, X, DDIM(), strength=0.5, grid=Grid.uniform(VPSDE(), 3, end=0.6)),
            ValueError,
            "above its end",
        ),
        (lambda: sdedit(DENOISER, X, DDIM(), strength=0.5, seed=[1, 2, 3], **UP), ValueError, "3 seeds for 2 samples"),
        (
            lambda: sdedit(DENOISER, X, DDIM(), strength=0.5, cond={"label": torch.zeros(3)}, **UP),
            ValueError,
            "3 entries for 2 samples",
        ),
        (lambda: sdedit(DENOISER, X, DDIM(), strength=0.5, mask=[1], **UP), ValueError, "mask is list"),
        (lambda: sdedit(DENOISER, X, DDIM(), strength=0.5, mask=torch.full((3,), 0.5), **UP), ValueError, "true or 1"),
        (
            lambda: sdedit(DENOISER, X, DDIM(), strength=0.5, mask=torch.ones(4), **UP),
            ValueError,
            r"mask of shape \(4,\) does not broadcast",
        ),
        (lambda: edit(DENOISER, X, DDPM(), **UP), ValueError, "draws noise"),
        (lambda: edit(DENOISER, X, ReverseSDE(), **UP), ValueError, "has no way up"),
        (lambda: edit(DENOISER, X, steps=3), ValueError, "AdaptiveODE chooses its own steps"),
        (lambda: edit(DENOISER, X, DDIM(), strength=0.5, t=0.2, **UP), ValueError, "got both"),
        (lambda: edit(DENOISER, X, DDIM(), to=torch.tanh, **UP), TypeError, "expected a Denoiser"),
        (
            lambda: edit(DENOISER, X, DDIM(), to=Silent(EDMSDE()), strength=0.5, **UP),
            ValueError,
            "the two have others",
        ),
        (
            lambda: edit(DENOISER, X, DDIM(), to=Silent(EDMSDE()), grid=Grid.uniform(VPSDE(), 3, end=0.1)),
            ValueError,
            "the two have others",
        ),
        (lambda: edit(DENOISER, X, DDIM(), grid=Grid.uniform(EDMSDE(), 3, end=0.1)), ValueError, "was made for"),
        (
            lambda: edit(DENOISER, X, DDIM(), cond_to={"label": torch.zeros(5)}, **UP),
            ValueError,
            "5 entries for 2 samples",
        ),
        (
            lambda: edit(
                VelocityDenoiser(lambda x, t: 1 / 0, FlowSDE()),
                X,
                Heun("angle"),
                to=EpsDenoiser(lambda x, t: x, FlowSDE()),
                **UP,
            ),
            ValueError,
            "says nothing of x0 at t = 1.0",
        ),
        (lambda: interpolation(DENOISER, X, X[:1], DDIM(), **UP), ValueError, "expected the same"),
        (lambda: interpolation(DENOISER, X, X, DDIM(), weights=1, **UP), ValueError, "weights=1"),
        (lambda: interpolation(DENOISER, X, X, DDIM(), weights=[0.5, 1.2], **UP), ValueError, r"in \[0, 1\]"),
        (lambda: interpolation_grid(DENOISER, X, DDIM(), **UP), ValueError, r"expected \(4, \*event\)"),
        (
            lambda: interpolation_grid(DENOISER, normal(4, 2), DDIM(), cond={"label": torch.zeros(4)}, **UP),
            ValueError,
            "4 entries for 1 samples",
        ),
        (lambda: interpolation_grid(DENOISER, normal(4, 2), DDIM(), rows=[], **UP), ValueError, "rows of shape"),
        (lambda: variations(DENOISER, X, 0, DDIM(), **UP), ValueError, "k=0"),
        (lambda: variations(DENOISER, X, 2, DDIM(), strength=0, **UP), ValueError, "strength=0"),
        (lambda: variations(DENOISER, X, 2, DDIM(), by="magic", **UP), ValueError, "by='magic'"),
        (lambda: variations(DENOISER, X, 2, DDPM(), by="encoding", seed=0, **UP), ValueError, "draws noise"),
        (lambda: variations(DENOISER, X, 2, DDIM(), seed=[1], **UP), ValueError, "1 seeds for 2 samples"),
    ],
)
def test_bad_arguments_are_refused_before_any_evaluation(call, kind, words):
    with pytest.raises(kind, match=words):
        call()
