"""Predictor-corrector, the adaptive loops, plain Langevin dynamics: textbook, batch, marginals and ends."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from common import SDES, Nonlinear, end_of, every_pair, generator, normal, start_of
from textbook_loops import corrector_predictor, dpm_solver_adaptive, gotta_go_fast, predictor_corrector

from scoresde import (
    VESDE,
    VPSDE,
    CosineVPSDE,
    Denoiser,
    EpsDenoiser,
    FlowSDE,
    Grid,
    Posterior,
    ScoreDenoiser,
    SubVPSDE,
    X0Denoiser,
    sample,
)
from scoresde.exact import Gaussian, GaussianMixture
from scoresde.noise import sample_seeds
from scoresde.sampling import NonFiniteError
from scoresde.solvers import DDIM, Ancestral, EulerMaruyama, Heun, ReverseDiffusion
from scoresde.solvers.adaptive_ode import AdaptiveODE
from scoresde.solvers.adaptive_sde import AdaptiveSDE, DPMSolverAdaptive
from scoresde.solvers.langevin import langevin
from scoresde.solvers.predictor_corrector import PredictorCorrector
from scoresde.solvers.reverse_sde import ReverseSDE

PREDICTORS = {"reverse diffusion": ReverseDiffusion(), "ancestral": Ancestral(), "euler-maruyama": EulerMaruyama()}
RULES = ["langevin", "langevin batch", "ald"]
ADAPTIVE = {
    "sde": AdaptiveSDE(rtol=0.1, atol=0.05),
    "dpm-12": DPMSolverAdaptive(order=2),
    "dpm-23": DPMSolverAdaptive(order=3),
}


class Watched(Denoiser):
    """Another denoiser that counts its evaluations, each with a time per sample or one for all."""

    def __init__(self, inner):
        self.inner, self.sde, self.calls = inner, inner.sde, 0

    def posterior(self, x, t, /, **cond):
        self.calls += 1
        return self.inner.posterior(x, t, **cond)


def draws(*shape, n=200):
    return [normal(*shape, seed=1 + i) for i in range(n)]


# Predictor-corrector.


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 4, 4)], ids=["rank 1", "images"])
@pytest.mark.parametrize("name", ["vp", "subvp", "ve", "flow"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("predictor", PREDICTORS)
def test_pc_equals_textbook(predictor, rule, name, shape):
    sde, z = SDES[name], draws(*shape, n=20)
    denoiser = Nonlinear(sde)
    x = normal(*shape) * float(sde.sigma(start_of(sde)))
    for order, textbook in (("predictor", predictor_corrector), ("corrector", corrector_predictor)):
        for end, M in ((0.0, 1), (end_of(sde), 2)):
            grid = Grid.uniform(sde, 4, start=start_of(sde), end=end)
            solver = PredictorCorrector(PREDICTORS[predictor], rule, snr=0.2, corrector_steps=M, order=order)
            ours = sample(denoiser, x, solver, grid=grid, noise=lambda row, x: z[row]).x
            expected = textbook(denoiser, x, grid.times, iter(z), predictor=predictor, rule=rule, snr=0.2, M=M)
            torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@every_pair(sde=SDES, rule=[*RULES, None], order=["predictor", "corrector"])
def test_pc_is_finite_and_counts(sde, rule, order):
    """At any number of steps, ending at t_min and on the data, from alpha = 0 too: the NFE that the network saw."""
    for predictor in (DDIM(), Heun()):
        for steps, end, M in ((1, 0.0, 1), (2, 0.0, 2), (7, 0.0, 1), (3, sde.t_min, 2)):
            solver = PredictorCorrector(predictor, rule, corrector_steps=M, order=order)
            grid = Grid.uniform(sde, steps, end=end)
            denoiser = Watched(Nonlinear(sde))
            states = list(solver.iterate(denoiser, normal(2, 3), grid, lambda row, x: normal(2, 3, seed=row)))
            assert bool(states[-1].x.isfinite().all())
            assert states[-1].nfe == denoiser.calls == solver.evaluations(grid)
            assert [s.row for s in states] == list(range(len(states)))
            assert [s.step for s in states if s.done] == list(range(steps))
            saved = (end == 0 and order == "predictor") + (float(sde.alpha(sde.t_max)) == 0)
            levels = 0 if rule is None else max(0, steps - saved)
            assert denoiser.calls - predictor.tableau(grid).nfe == M * levels


def test_pc_budget_and_formula():
    """N (M + 1) evaluations, less M for order "predictor" on a grid to t = 0; nfe= is a budget."""
    for order, steps_28 in (("predictor", 28), ("corrector", 30)):
        solver, denoiser = PredictorCorrector(corrector_steps=2, order=order), Nonlinear(VPSDE())
        assert sample(denoiser, (2, 3), solver, steps=10, seed=0).nfe == steps_28
        assert sample(denoiser, (2, 3), solver, nfe=steps_28 - 1, seed=0).nfe == steps_28 - 3


def test_pc_per_sample_and_batch_rules():
    """The per-sample rule does not see the batch; the legacy rule does, which is why it is not the default."""
    denoiser = Nonlinear(VPSDE())
    for rule, same in (("langevin", True), ("ald", True), ("langevin batch", False)):
        solver, grid = PredictorCorrector(corrector=rule), Grid.uniform(VPSDE(), 6)
        together = sample(denoiser, (5, 7), solver, grid=grid, seed=3).x
        alone = sample(denoiser, (1, 7), solver, grid=grid, seed=[sample_seeds(3, 5)[4]]).x
        assert torch.allclose(together[4:], alone, rtol=1e-5, atol=1e-6) == same


def test_pc_does_not_look_at_the_device():
    """Tensors on the meta device have no values: looking at one raises."""
    denoiser = X0Denoiser(lambda x, t: torch.tanh(x), VPSDE())
    x = torch.empty(4, 3, 8, 8, device="meta")
    for rule in RULES:
        solver = PredictorCorrector(corrector=rule)
        *_, last = solver.iterate(denoiser, x, Grid.uniform(VPSDE(), 5), lambda row, x: torch.empty_like(x))
        assert last.nfe == 9


def test_pc_where_the_score_is_zero():
    """At the mode itself the rule divides by zero; the norm expected at that noise level takes its place."""
    denoiser = Gaussian(mean=torch.zeros(6), std=1.0).denoiser(VPSDE())
    for rule in ("langevin", "langevin batch"):
        x = sample(
            denoiser, torch.zeros(3, 6), PredictorCorrector(corrector=rule, order="corrector"), steps=5, seed=0
        ).x
        assert float(x.abs().max()) < 10
    zero = ScoreDenoiser(lambda x, t: torch.zeros_like(x), VPSDE())
    z = normal(2, 6)
    step = PredictorCorrector(DDIM(), "langevin", snr=0.1, order="corrector")
    first = next(step.iterate(zero, normal(2, 6, seed=5), Grid(VPSDE(), [0.5, 0.3]), lambda row, x: z))
    a, sigma = (VPSDE().alpha(0.5) / VPSDE().alpha(0.3)) ** 2, VPSDE().sigma(0.5)
    expected = normal(2, 6, seed=5) + (4 * a).sqrt() * 0.1 * sigma * z.norm(dim=1, keepdim=True) / math.sqrt(6) * z
    torch.testing.assert_close(first.x, expected, rtol=1e-6, atol=1e-6)


def ald_law(sde, solver, grid, std):
    """Exact width of the output on N(0, std^2), from its responses to x_T and to the noise of each row."""
    table = solver.tableau(grid)
    impulses = torch.eye(1 + len(table), dtype=torch.float64)
    denoiser = Gaussian(mean=[0.0], std=std).denoiser(sde)
    *_, last = table.iterate(denoiser, impulses[:, :1].clone(), lambda row, x: impulses[:, row + 1 : row + 2])
    start = sde.alpha(grid.times[0]) ** 2 * std**2 + sde.sigma(grid.times[0]) ** 2
    return math.sqrt(float(last.x[0, 0] ** 2 * start + last.x[1:, 0].square().sum()))


@pytest.mark.parametrize("order", ["predictor", "corrector"])
@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
def test_pc_marginal_exactly(sde, order):
    """The table of "ald" has an exact law on Gaussian data, and it tends to p_t: by the predictor's error, and by the
    corrector's own, a share of at most 2 r^2 / (2 - 2 r^2) of the variance, which no number of steps removes.
    """
    std, end, r = 0.7, end_of(sde), 0.1
    truth = math.sqrt(float(sde.alpha(end) ** 2 * std**2 + sde.sigma(end) ** 2))
    solver = PredictorCorrector(corrector="ald", snr=r, order=order)
    widths = [
        ald_law(sde, solver, Grid.log_snr(sde, steps, start=start_of(sde), end=end), std) / truth for steps in (40, 160)
    ]
    assert abs(widths[1] - 1) < 0.02 + r**2 / (1 - r**2)
    assert abs(widths[1] - 1) < max(0.5 * abs(widths[0] - 1), r**2 / (1 - r**2))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sde", [SubVPSDE(), VESDE()], ids=["subvp", "ve"])
def test_pc_marginal_by_sampling(sde, rule):
    """128 samples of 96 components of unit variance: mean and width within 5 standard errors, and 0.03 for a
    discretisation of 120 steps at r = 0.05.
    """
    d, n = 96, 128
    target = Gaussian(mean=torch.full((d,), 0.5), std=1.0)
    grid = Grid.log_snr(sde, 120)
    x = sample(target.denoiser(sde), (n, d), PredictorCorrector(corrector=rule, snr=0.05), grid=grid, seed=1).x
    assert abs(float(x.mean()) - 0.5) < 5 / math.sqrt(n * d) + 0.03
    assert abs(float(x.std()) - 1) < 5 / math.sqrt(2 * n * d) + 0.03


def test_the_corrector_mends_a_coarse_predictor():
    """What it is for: on 30 steps Euler-Maruyama's law is wrong, and correctors bring it towards the truth."""
    sde, grid = VPSDE(), Grid.uniform(VPSDE(), 30, end=0.05)
    truth = math.sqrt(float(sde.alpha(0.05) ** 2 * 0.01 + sde.sigma(0.05) ** 2))
    solvers = [PredictorCorrector(EulerMaruyama(), "ald", corrector_steps=M) for M in (1, 4, 16, 64)]
    widths = [ald_law(sde, s, grid, 0.1) / truth for s in (PredictorCorrector(EulerMaruyama(), None), *solvers)]
    assert all(abs(more - 1) < abs(fewer - 1) for fewer, more in pairwise(widths))
    assert abs(widths[-1] - 1) < 0.02 < 0.3 < abs(widths[0] - 1)


def test_pc_tables():
    for rule in ("langevin", "langevin batch"):
        with pytest.raises(TypeError, match="corrector='ald' has one"):
            PredictorCorrector(corrector=rule).tableau(Grid.uniform(VPSDE(), 3))
    grid = Grid.uniform(VPSDE(), 3)
    table = PredictorCorrector(Heun(), "ald", corrector_steps=2).tableau(grid)
    assert table.step.tolist() == [0] * 4 + [1] * 4 + [2]
    assert table.nfe == 9
    alone = PredictorCorrector(Ancestral(), None).tableau(grid)
    assert torch.equal(alone.b, Ancestral().tableau(grid).b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"predictor": DDIM}, "single-step"),
        ({"corrector": "mala"}, "corrector="),
        ({"snr": 0.0}, "snr="),
        ({"snr": math.nan}, "snr="),
        ({"corrector_steps": 0}, "corrector_steps="),
        ({"order": "both"}, "order="),
    ],
    ids=["predictor", "corrector", "snr", "snr nan", "steps", "order"],
)
def test_pc_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        PredictorCorrector(**options)


def test_pc_refuses_before_any_evaluation():
    denoiser, x = Watched(Nonlinear(VPSDE())), normal(2, 3)
    with pytest.raises(ValueError, match="draws noise"):
        PredictorCorrector().iterate(denoiser, x, Grid.uniform(VPSDE(), 3))
    with pytest.raises(ValueError, match="the grid was made for"):
        PredictorCorrector().iterate(denoiser, x, Grid.uniform(VESDE(), 3), lambda row, x: x)
    eps = EpsDenoiser(lambda x, t: x, FlowSDE())
    with pytest.raises(ValueError, match="says nothing of x0"):
        PredictorCorrector(DDIM()).iterate(eps, x, Grid.uniform(FlowSDE(), 3), lambda row, x: x)
    assert denoiser.calls == 0


# The adaptive loops.


@pytest.mark.parametrize("shape", [(1, 5), (1, 3, 4, 4)], ids=["rank 1", "image"])
@pytest.mark.parametrize("memory", [False, True], ids=["as published", "memory"])
@pytest.mark.parametrize("name", ["vp", "subvp", "ve", "flow", "chain"])
def test_adaptive_sde_equals_textbook(name, memory, shape):
    sde, z = SDES[name], draws(*shape, n=3000)
    denoiser, start, end = Nonlinear(sde), start_of(sde), end_of(sde)
    x = normal(*shape) * float(sde.sigma(start))
    limits = {"growth": 4.0} if memory else {"growth": math.inf}
    solver = AdaptiveSDE(rtol=0.1, atol=0.05, h_init=0.02, safety=0.8, exponent=0.7, memory=memory, **limits)
    ours = sample(denoiser, x, solver, grid=Grid(sde, [start, end]), noise=lambda row, x: z[row])
    path = {"path": {start: torch.zeros(shape, dtype=torch.float64)}} if memory else {}
    options = {"h": 0.02 * sde.t_max, "atol": 0.05, "rtol": 0.1, "theta": 0.8, "r": 0.7, **limits, **path}
    expected, attempts = gotta_go_fast(denoiser, x, start, end, iter(z), **options)
    assert ours.status == "complete"
    assert ours.nfe == 2 * attempts
    assert attempts > 10
    torch.testing.assert_close(ours.x, expected, rtol=1e-6, atol=1e-6)  # steps carry the rounding of x_high - x_low


@pytest.mark.parametrize("shape", [(1, 5), (1, 3, 4, 4)], ids=["rank 1", "image"])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("name", ["vp", "cosine", "chain"])
def test_dpm_solver_adaptive_equals_textbook(name, order, shape):
    sde = SDES[name]
    denoiser, start, end, x = Nonlinear(sde), start_of(sde), end_of(sde), normal(*shape)
    solver = DPMSolverAdaptive(order=order, rtol=0.02, atol=0.003, h_init=0.1, safety=0.8, growth=math.inf)
    ours = sample(denoiser, x, solver, grid=Grid(sde, [start, end]))
    expected, attempts = dpm_solver_adaptive(
        denoiser, x, start, end, order=order, h=0.1, atol=0.003, rtol=0.02, theta=0.8
    )
    assert ours.nfe == order * attempts
    assert attempts > 10
    torch.testing.assert_close(ours.x, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("solver", ADAPTIVE.values(), ids=ADAPTIVE)
def test_adaptive_samples_do_not_see_the_batch(solver):
    """Also with times to report at, which the samples of a batch pass at different attempts."""
    denoiser = GaussianMixture(means=[[-2.0, 0.0], [2.0, 1.0]], std=[0.1, 0.5]).denoiser(VPSDE())
    for grid in (Grid(VPSDE(), [1.0, 0.0]), Grid.uniform(VPSDE(), 5, end=0.01)):
        x_T, seeds = normal(4, 2, seed=9), sample_seeds(5, 4)
        together = sample(denoiser, x_T, solver, grid=grid, seed=seeds, trajectory=True)
        counts = []
        for i in range(4):
            alone = sample(denoiser, x_T[i : i + 1], solver, grid=grid, seed=[seeds[i]], trajectory=True)
            torch.testing.assert_close(together.trajectory[:, i], alone.trajectory[:, 0], rtol=1e-9, atol=1e-9)
            counts.append(alone.nfe)
        assert together.nfe == max(counts)
        assert len(set(counts)) > 1  # they do go their own ways
        assert together.trajectory.shape == (grid.steps + 1, 4, 2)


@pytest.mark.parametrize("solver", ADAPTIVE.values(), ids=ADAPTIVE)
@pytest.mark.parametrize(
    "sde",
    [*(SDES[n] for n in ("subvp", "ve", "flow", "chain")), CosineVPSDE(t_max=1.0)],
    ids=["subvp", "ve", "flow", "chain", "cosine-1"],
)
def test_adaptive_ends(sde, solver):
    """Finite at t_min, on the data and on any grid, from alpha = 0 too, with the NFE that the network saw."""
    for times in (
        [sde.t_max, 0.0],
        [sde.t_max, sde.t_max * 0.99, sde.t_max / 3, sde.t_min, 0.0],
        [sde.t_min * 2, sde.t_min / 2, 0.0],
    ):
        denoiser = Watched(Nonlinear(sde))
        x = normal(2, 3) * sde.prior_std_at(times[0])
        result = sample(denoiser, x, solver, grid=Grid(sde, times), seed=0, trajectory=True)
        assert result.status == "complete"
        assert result.t == times[-1]
        assert result.nfe == denoiser.calls > 0
        assert result.trajectory.shape == (len(times), 2, 3)
        assert torch.equal(result.trajectory[-1], result.x)
        if times[-1] == 0:  # x_0 is a posterior mean, so within its bounds
            assert float(result.x.abs().max()) <= 1.1


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("sde", [SDES[n] for n in ("vp", "ve", "flow", "chain")], ids=["vp", "ve", "flow", "chain"])
def test_dpm_solver_adaptive_keeps_its_tolerance(sde, order):
    """Against the exact flow: the error falls with the tolerance, on every SDE alike, at each time of the grid."""
    target = Gaussian(mean=torch.full((16,), 0.5), std=torch.linspace(0.1, 1.0, 16))
    start, end = start_of(sde), end_of(sde)
    grid = Grid(sde, [start, float(sde.time_at(0.0)), end])
    x = normal(4, 16) * float(sde.sigma(start))
    for rtol in (5e-2, 5e-4):
        solver = DPMSolverAdaptive(order=order, rtol=rtol, atol=rtol / 5)
        path = sample(target.denoiser(sde), x, solver, grid=grid, trajectory=True).trajectory
        exact = [target.flow(x, sde, start, s) for s in grid.times[1:]]
        error = max(float((a - b).square().mean().sqrt()) for a, b in zip(path[1:], exact, strict=True))
        assert error < 2 * rtol


@pytest.mark.parametrize("name", ["ve", "flow"])
def test_adaptive_sde_marginals(name):
    """1000 draws of a Gaussian and of a lop-sided mixture: 5 standard errors, and 0.03 for rtol = 0.03."""
    sde, n = SDES[name], 1000
    target = Gaussian(mean=[1.0, -0.5], std=[0.3, 1.0])
    result = sample(target.denoiser(sde), (n, 2), AdaptiveSDE(rtol=0.03, atol=0.02), generator=generator(1))
    assert result.status == "complete"
    z = (result.x.double() - torch.tensor([1.0, -0.5])) / torch.tensor([0.3, 1.0])
    assert float(z.mean(0).abs().max()) < 5 / math.sqrt(n) + 0.03
    assert float((z.std(0) - 1).abs().max()) < 5 / math.sqrt(2 * n) + 0.03
    mixture = GaussianMixture(means=[[-1.0, 0.0], [1.0, 0.5]], weights=[0.2, 0.8], std=0.1)
    x = sample(mixture.denoiser(sde), (n, 2), AdaptiveSDE(rtol=0.05, atol=0.02), generator=generator(2)).x
    left = x[:, 0] < 0
    assert abs(float(left.double().mean()) - 0.2) < 5 * math.sqrt(0.16 / n) + 0.01
    assert abs(float(x[~left].std(0).mean()) / 0.1 - 1) < 5 / math.sqrt(2 * n) + 0.05


def test_a_rejected_attempt_keeps_its_noise():
    """Drawn afresh, as published, large increments are rejected more often, and in two dimensions the law is wrong."""
    sde, n = VESDE(), 500
    denoiser, widths = Gaussian(mean=[0.0, 0.0], std=0.5).denoiser(sde), {}
    for memory in (True, False):
        x = sample(denoiser, (n, 2), AdaptiveSDE(memory=memory, rtol=0.05), generator=generator(3)).x
        widths[memory] = float(x.std()) / 0.5
    assert abs(widths[True] - 1) < 5 / math.sqrt(4 * n) + 0.03
    assert widths[False] > 1.2


@pytest.mark.parametrize(
    "solver",
    [ADAPTIVE["sde"], AdaptiveSDE(rtol=0.1, atol=0.05, memory=False), ADAPTIVE["dpm-12"], ADAPTIVE["dpm-23"]],
    ids=["sde", "sde as published", "dpm-12", "dpm-23"],
)
def test_gradients_are_those_of_the_sample_alone(solver):
    """Samples wait for the slowest, and the choice of steps is no part of the gradient."""
    denoiser = GaussianMixture(means=[[-2.0, 0.0], [2.0, 1.0]], std=[0.1, 0.5]).denoiser(VPSDE())
    x_T, seeds = normal(3, 2, seed=9), sample_seeds(5, 3)

    def gradient(x, seeds, grid):
        x = x.clone().requires_grad_()
        solution = sample(denoiser, x, solver, grid=grid, seed=seeds, differentiable=True, trajectory=True)
        return torch.autograd.grad(solution.trajectory[1:].sum(), x)[0], solution.nfe

    grid = Grid(VPSDE(), [1.0, 0.5, 0.0])
    together, _ = gradient(x_T, seeds, grid)
    alone = [gradient(x_T[i : i + 1], seeds[i : i + 1], grid) for i in range(3)]
    assert bool(together.isfinite().all())
    assert float(together.abs().amax(1).min()) > 1e-8
    torch.testing.assert_close(together, torch.cat([g for g, _ in alone]), rtol=1e-7, atol=1e-9)
    assert len({nfe for _, nfe in alone}) > 1


@pytest.mark.parametrize("solver", [AdaptiveSDE(), DPMSolverAdaptive(2), DPMSolverAdaptive(3)], ids=repr)
def test_from_almost_no_signal(solver):
    """With alpha tiny but not zero at the start, too, one step of DDIM goes to where there is something to resolve: as
    many evaluations as from alpha = 0, to 5%, and the ODE's error within half the tolerance.
    """
    target, x, counts = Gaussian(mean=torch.full((16,), 0.5), std=torch.linspace(0.1, 1.0, 16)), normal(8, 16), []
    for t_max in (0.9999, 1 - 1e-12, 1.0):
        sde = FlowSDE(t_max=t_max)
        denoiser = Watched(target.denoiser(sde))
        result = sample(denoiser, x, solver, grid=Grid(sde, [t_max, sde.t_min]), seed=0)
        assert result.nfe == denoiser.calls
        counts.append(result.nfe)
        if not solver.draws and t_max < 1:
            error = result.x - target.flow(x, sde, t_max, sde.t_min)
            assert float(error.square().mean().sqrt()) < solver.rtol / 2
    assert max(counts) < 1.05 * min(counts)


def test_times_to_report_at_hold_up_no_step():
    """A step that a time of the grid cuts short is taken up again: each such time costs two attempts at most, the short
    one and one more that fails.
    """
    denoiser, x = GaussianMixture(means=[[-2.0, 0.0], [2.0, 1.0]], std=[0.1, 0.5]).denoiser(VPSDE()), normal(1, 2)
    for solver in (DPMSolverAdaptive(order=2, growth=1.5), DPMSolverAdaptive(order=3, growth=1.5)):
        few, many = (sample(denoiser, x, solver, grid=Grid.uniform(VPSDE(), N)).nfe for N in (1, 9))
        assert few <= many <= few + 8 * 2 * solver.order


def test_states_are_held_from_the_slowest_sample_to_the_furthest_only():
    """On a grid of 120 times the loop never holds a batch for each."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    grid = Grid.log_snr(VPSDE(), 120)
    with Watch():
        *_, last = DPMSolverAdaptive(order=2).iterate(Nonlinear(VPSDE()), normal(3, 500), grid)
    assert last.step == 119
    assert largest <= 20 * 3 * 500


@pytest.mark.parametrize(
    ("solver", "steps"),
    [(ReverseSDE("srk"), 40), (PredictorCorrector(corrector="ald"), 100), (AdaptiveODE(), None)],
    ids=["reverse sde", "predictor-corrector", "ode"],
)
def test_mode_weights_of_a_mixture(solver, steps):
    """0.2 and 0.8 of 600 draws, and the second's width: 5 standard errors, and 0.02 and 0.05 for the discretisation.

    (The rule "langevin" is for many components: in two, its steps follow the sample, and the law is wrong.)
    """
    sde, n = VESDE(), 600
    mixture = GaussianMixture(means=[[-1.0, 0.0], [1.0, 0.5]], weights=[0.2, 0.8], std=0.1)
    grid = Grid.log_snr(sde, steps or 1)
    x = sample(mixture.denoiser(sde), (n, 2), solver, grid=grid, generator=generator(2)).x
    left = x[:, 0] < 0
    assert abs(float(left.double().mean()) - 0.2) < 5 * math.sqrt(0.16 / n) + 0.02
    assert abs(float(x[~left].std(0).mean()) / 0.1 - 1) < 5 / math.sqrt(2 * n) + 0.05


@pytest.mark.parametrize(
    "solver",
    [
        *ADAPTIVE.values(),
        AdaptiveODE(),
        *(AdaptiveODE(m) for m in ("RK45", "BDF", "LSODA")),
        ReverseSDE("srk", adaptive_steps=True, rtol=0.3, atol=0.3),
        *(PredictorCorrector(corrector=rule) for rule in RULES),
    ],
    ids=repr,
)
def test_the_default_device_is_left_alone(solver):
    """x says where to compute. A tensor made on the default device, here meta, would have no values."""
    sde, x = FlowSDE(), normal(2, 3)
    grid = Grid.uniform(sde, 4)
    expected = sample(Nonlinear(sde), x, solver, grid=grid, seed=0).x
    with torch.device("meta"):
        found = sample(Nonlinear(sde), x, solver, grid=grid, seed=0).x
    assert torch.equal(found, expected)


@pytest.mark.parametrize("solver", ADAPTIVE.values(), ids=ADAPTIVE)
def test_max_nfe(solver):
    """A budget that runs out leaves the state where it is, at the time of the least advanced sample."""
    denoiser = Watched(Nonlinear(VPSDE()))
    result = sample(denoiser, normal(3, 4), solver, nfe=20, seed=0)
    assert result.status == "max_nfe"
    assert result.nfe == denoiser.calls <= 20
    assert 0 < result.t < 1
    assert bool(result.x.isfinite().all())
    grid = Grid.uniform(VPSDE(), 40)
    partial = sample(denoiser, normal(3, 4), solver, nfe=20, seed=0, grid=grid, trajectory=True)
    assert partial.status == "max_nfe"
    assert 1 < len(partial.trajectory) < 41
    nothing = sample(denoiser, normal(3, 4), solver, nfe=1, seed=0)
    assert (nothing.status, nothing.nfe, nothing.t) == ("max_nfe", 0, 1.0)
    assert sample(denoiser, normal(3, 4), solver, nfe=5000, seed=0).status == "complete"


class Breaks(Denoiser):
    """Sample 1 becomes NaN, or infinite, below t = 0.5."""

    def __init__(self, value):
        self.sde, self.value, self.after = VPSDE(), value, 0

    def posterior(self, x, t, /, **cond):
        mean, t = torch.tanh(x), torch.as_tensor(t).expand(len(x))
        if len(x) > 1 and t[1] < 0.5:
            mean[1, 0] = self.value
            self.after += 1
        return Posterior(mean)


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("solver", ADAPTIVE.values(), ids=ADAPTIVE)
def test_a_nan_ends_the_run_at_once(solver, value):
    denoiser = Breaks(value)
    *_, last = solver.iterate(denoiser, normal(3, 4), Grid(VPSDE(), [1.0, 0.0]), lambda row, x: normal(3, 4, seed=row))
    assert denoiser.after <= 3  # within the attempt
    assert not last.done
    assert not bool(last.x[1].isfinite().all())
    assert bool(last.x[[0, 2]].isfinite().all())
    with pytest.raises(NonFiniteError) as error:
        sample(denoiser, normal(3, 4), solver, seed=0)
    assert error.value.samples == [1]


def test_adaptive_refuses():
    denoiser, x = Watched(Nonlinear(VPSDE())), normal(2, 3)
    for make in (AdaptiveSDE, DPMSolverAdaptive):
        for options in (
            {"rtol": 0.0},
            {"atol": math.nan},
            {"h_init": -1.0},
            {"safety": 1.5},
            {"growth": 1.0},
            {"max_nfe": 0},
        ):
            with pytest.raises(ValueError, match=next(iter(options))):
                make(**options)
        with pytest.raises(ValueError, match="the grid was made for"):
            make().iterate(denoiser, x, Grid.uniform(VESDE(), 3), lambda row, x: x)
        eps = EpsDenoiser(lambda x, t: x, FlowSDE())
        with pytest.raises(ValueError, match="says nothing of x0"):
            make().iterate(eps, x, Grid.uniform(FlowSDE(), 3), lambda row, x: x)
        with pytest.raises(TypeError, match="has no table"):
            make().tableau(Grid.uniform(VPSDE(), 3))
    with pytest.raises(ValueError, match="order=4"):
        DPMSolverAdaptive(order=4)
    with pytest.raises(ValueError, match="exponent="):
        AdaptiveSDE(exponent=0.0)
    with pytest.raises(ValueError, match="draws noise"):
        AdaptiveSDE().iterate(denoiser, x, Grid.uniform(VPSDE(), 3))
    assert denoiser.calls == 0


# Plain Langevin dynamics.


def test_langevin_is_its_formula():
    sde, x, z = VESDE(), normal(3, 4), draws(3, 4, n=5)
    denoiser = Nonlinear(sde)
    path = langevin(denoiser, x, 0.3, step_size=0.02, steps=5, noise=lambda row, x: z[row], trajectory=True)
    expected = x
    for k in range(5):
        assert torch.equal(path[k], expected)
        expected = expected + 0.01 * denoiser.score(expected, 0.3) + math.sqrt(0.02) * z[k]
    torch.testing.assert_close(path[5], expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(path[5], langevin(denoiser, x, 0.3, step_size=0.02, steps=5, noise=lambda row, x: z[row]))


def test_langevin_has_the_marginal():
    """On N(m, S) at a noise level its stationary variance is S / (1 - step / (4 S)) exactly: 5 standard errors."""
    sde, n, step = VPSDE(), 4000, 0.3
    t, target = float(sde.time_at(0.5)), Gaussian(mean=[2.0, 0.0], std=[0.5, 1.0])
    S = sde.alpha(t) ** 2 * torch.tensor([0.25, 1.0]) + sde.sigma(t) ** 2
    x = langevin(target.denoiser(sde), torch.zeros(n, 2), t, step_size=step, steps=150, seed=4)
    variance = S / (1 - step / (4 * S))
    assert float(((x.mean(0) - sde.alpha(t) * torch.tensor([2.0, 0.0])).abs() / variance.sqrt()).max()) < 5 / math.sqrt(
        n
    )
    assert float((x.var(0) / variance - 1).abs().max()) < 5 * math.sqrt(2 / n)


def test_langevin_seeds_and_dtypes():
    denoiser = Nonlinear(VESDE())
    together = langevin(denoiser, torch.zeros(4, 3), 0.2, step_size=0.01, steps=7, seed=1)
    alone = langevin(denoiser, torch.zeros(1, 3), 0.2, step_size=0.01, steps=7, seed=[sample_seeds(1, 4)[2]])
    torch.testing.assert_close(together[2:3], alone)
    half = langevin(denoiser, torch.zeros(4, 3, dtype=torch.bfloat16), 0.2, step_size=0.01, steps=7, seed=1)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), together, atol=1e-2, rtol=1e-2)


def test_langevin_refuses():
    denoiser, x = Watched(Nonlinear(VESDE())), normal(2, 3)
    for options, message in (
        ({"step_size": 0.0}, "step_size="),
        ({"steps": 0}, "steps="),
        ({"seed": 1, "generator": generator()}, "at most one"),
    ):
        with pytest.raises(ValueError, match=message):
            langevin(denoiser, x, 0.3, **{"step_size": 0.1, "steps": 3, **options})
    with pytest.raises(ValueError, match="expected a time in"):
        langevin(denoiser, x, 0.0, step_size=0.1, steps=3)
    with pytest.raises(ValueError, match="one time for all chains"):
        langevin(denoiser, x, torch.tensor([0.3, 0.4]), step_size=0.1, steps=3)
    with pytest.raises(ValueError, match=r"cond\['label'\] has 3 entries for 2"):
        langevin(denoiser, x, 0.3, step_size=0.1, steps=3, cond={"label": torch.arange(3)})
    with pytest.raises(TypeError, match="expected a Denoiser"):
        langevin(torch.tanh, x, 0.3, step_size=0.1, steps=3)
    assert denoiser.calls == 0
    with pytest.raises(NonFiniteError, match="too large"):
        langevin(Gaussian(mean=[0.0], std=0.1).denoiser(VESDE()), normal(2, 1), 0.1, step_size=10.0, steps=200)
