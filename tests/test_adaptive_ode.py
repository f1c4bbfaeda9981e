"""The probability-flow ODE by torchdiffeq and scipy: tolerance, budget, ends, both directions, failures."""

from __future__ import annotations

import itertools

import pytest
import torch
from common import SDES, Counting, Nonlinear, normal, start_of

from scoresde import VESDE, VPSDE, EpsDenoiser, FlowSDE, Grid, NonFiniteError, Posterior, VelocityDenoiser, sample
from scoresde.editing import encode
from scoresde.exact import Gaussian, GaussianMixture
from scoresde.solvers.adaptive_ode import AdaptiveODE
from scoresde.solvers.motion import legs

TORCHDIFFEQ = ("dopri5", "dopri8", "bosh3", "adaptive_heun")
SCIPY = ("RK45", "RK23", "DOP853", "Radau", "BDF", "LSODA")
METHODS = TORCHDIFFEQ + SCIPY
TARGET = Gaussian(mean=[1.0, -1.0, 0.5], std=[1.0, 0.3, 0.05])
MODES = GaussianMixture(means=[[2.0, 0.0], [-2.0, 0.0]], std=0.1)


def whole(sde):
    return Grid(sde, [sde.t_max, sde.t_min])


@pytest.mark.parametrize(
    ("method", "sde"),
    [("dopri5", sde) for sde in SDES.values()] + [(m, SDES[n]) for m in METHODS[1:] for n in ("flow",)],
    ids=[f"dopri5 {n}" for n in SDES] + [f"{m} {n}" for m in METHODS[1:] for n in ("flow",)],
)
def test_exact_to_the_tolerance(method, sde):
    """Against the exact flow, over the whole range or from alpha = 0; every evaluation counted and inside the range.

    The tolerance is local: the sum over a run is allowed 3 times it for Runge-Kutta methods, 20 for multistep ones,
    whose local errors have one sign, and the denoiser's sensitivity at the narrow width 0.05 about 1 / 0.3.
    """
    counting, x = Counting(TARGET.denoiser(sde)), normal(4, 3) * sde.prior_std
    solution = sample(counting, x, AdaptiveODE(method, rtol=1e-5, atol=1e-5), grid=whole(sde))
    error = (solution.x - TARGET.flow(x, sde, sde.t_max, sde.t_min)).abs().max()
    assert float(error) < 1e-5 * (60 if method in ("BDF", "LSODA") else 10)
    assert solution.nfe == len(counting.times)
    assert solution.status == "complete"
    assert solution.t == sde.t_min
    assert sde.t_min <= min(counting.times)
    assert max(counting.times) <= sde.t_max


@pytest.mark.parametrize("method", ["dopri5", "DOP853"])
def test_the_error_falls_with_the_tolerance(method):
    sde, x = VPSDE(), normal(4, 3)
    exact = TARGET.flow(x, sde, 1.0, sde.t_min)
    for tolerance in (1e-3, 1e-5, 1e-7, 1e-9):
        solver = AdaptiveODE(method, rtol=tolerance, atol=tolerance)
        assert float((sample(TARGET.denoiser(sde), x, solver, grid=whole(sde)).x - exact).abs().max()) < 10 * tolerance


@pytest.mark.parametrize("method", ["dopri5", "RK45"])
def test_no_sample_is_diluted_by_its_neighbours(method):
    """A hard sample, between two modes, among 64 easy ones. (With torchdiffeq's own norm its error is 2.7e-4.)"""
    sde = VPSDE()
    easy, hard = normal(64, 2) * 0.3 + torch.tensor([2.0, 0.0]), torch.tensor([[0.02, 0.5]], dtype=torch.float64)
    batch, denoiser = torch.cat([hard, easy]), MODES.denoiser(sde)
    reference = sample(denoiser, batch, AdaptiveODE("dopri8", rtol=1e-11, atol=1e-11), grid=whole(sde)).x
    alone = sample(denoiser, hard, AdaptiveODE(method), grid=whole(sde))
    together = sample(denoiser, batch, AdaptiveODE(method), grid=whole(sde))
    error = (together.x - reference).abs().amax(1)
    assert together.nfe >= alone.nfe
    assert float(error[0]) < 3e-5
    assert float(error[1:].max()) < 3e-5


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "RK45", "LSODA"])
def test_a_sample_is_itself_in_any_batch_to_the_tolerance(method):
    sde, x = VESDE(), normal(5, 3) * VESDE().sigma_max
    denoiser, solver = Nonlinear(sde), AdaptiveODE(method)
    together = sample(denoiser, x, solver, grid=whole(sde)).x
    alone = sample(denoiser, x[:1], solver, grid=whole(sde)).x
    torch.testing.assert_close(alone[0], together[0], rtol=0, atol=2e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [1, 40])
def test_a_budget_ends_with_the_last_accepted_state_and_its_time(method, budget):
    sde, x, counting = VPSDE(), normal(2, 3), Counting(TARGET.denoiser(VPSDE()))
    solution = sample(counting, x, AdaptiveODE(method), nfe=budget)
    assert solution.nfe == len(counting.times) == budget
    assert solution.status == "max_nfe"
    assert sde.t_min <= solution.t <= 1.0
    assert budget < 40 or solution.t < 1.0
    torch.testing.assert_close(solution.x, TARGET.flow(x, sde, 1.0, solution.t), rtol=0, atol=1e-3)


@pytest.mark.parametrize("method", ["dopri5", "RK45"])
def test_a_budget_that_lacks_only_the_last_evaluation(method):
    sde, x = VPSDE(), normal(2, 3)
    last = sample(TARGET.denoiser(sde), x, AdaptiveODE(method)).nfe - 1  # all but D at t_min
    short = sample(TARGET.denoiser(sde), x, AdaptiveODE(method, max_nfe=last))
    assert short.status == "max_nfe"
    assert short.t == sde.t_min
    torch.testing.assert_close(short.x, TARGET.flow(x, sde, 1.0, sde.t_min), rtol=0, atol=1e-3)


@pytest.mark.parametrize("sde", [VPSDE(), FlowSDE(), SDES["chain"]], ids=["vp", "flow", "chain"])
@pytest.mark.parametrize("method", ["dopri5", "RK45"])
def test_the_grid_says_what_is_reported(method, sde):
    """States at the grid's times, from alpha = 0 and down to the data, where x_0 is D at t_min."""
    x, counting = normal(3, 3), Counting(TARGET.denoiser(sde))
    grid = Grid.uniform(sde, 4)
    solution = sample(counting, x, AdaptiveODE(method), grid=grid, trajectory=True)
    for t, state in zip(grid.times[1:-1], solution.trajectory[1:-1], strict=True):
        torch.testing.assert_close(state, TARGET.flow(x, sde, sde.t_max, t), rtol=0, atol=2e-4)
    assert counting.times[-1] == sde.t_min
    at_t_min = sample(
        TARGET.denoiser(sde), x, AdaptiveODE(method), grid=Grid(sde, [*grid.times[:-1].tolist(), sde.t_min])
    )
    torch.testing.assert_close(solution.x, TARGET.denoiser(sde)(at_t_min.x, sde.t_min).mean, rtol=0, atol=1e-12)
    assert solution.nfe == at_t_min.nfe + 1


def test_legs():
    flow, vp = FlowSDE(), VPSDE()
    nearly = float(flow.time_at(-9.0))
    found = [(p.t, p.s, p.jump, p.step, p.done) for p in legs(Grid(flow, [1.0, 0.5, 0.0]), free=True)]
    assert found == [
        (1.0, nearly, True, 0, False),
        (nearly, 0.5, False, 0, True),
        (0.5, 1e-5, False, 1, False),
        (1e-5, 0.0, True, 1, True),
    ]
    assert [p[:3] for p in legs(Grid(flow, [1.0, 0.5, 0.0]), free=False)] == [(1.0, 0.5, True), (0.5, 0.0, True)]
    assert [p[:3] for p in legs(Grid(vp, [1.0, 1e-6, 0.0]), free=True)] == [(1.0, 1e-6, False), (1e-6, 0.0, True)]
    assert [p[:3] for p in legs(Grid(flow, [1.0, 0.99999, 0.5]), free=True)] == [
        (1.0, 0.99999, True),
        (0.99999, 0.5, False),
    ]


def encoded(denoiser, x, solver, grid):
    """The latent at the grid's start, x standing at its end, t_min where that is 0."""
    start, end = grid.times[[0, -1]].tolist()
    return sample(denoiser, x, solver, grid=Grid(grid.sde, [start, max(end, grid.sde.t_min)]).reversed())


@pytest.mark.parametrize("sde", [SDES[n] for n in ("edm", "flow", "chain")], ids=["edm", "flow", "chain"])
def test_encode_and_decode(sde):
    """encode is the exact flow upwards, and decoding returns the data; in both directions to the tolerance."""
    denoiser, x = MODES.denoiser(sde), MODES.sample(4, torch.Generator().manual_seed(0), dtype=torch.float64)
    grid, solver = whole(sde), AdaptiveODE(rtol=1e-8, atol=1e-8)
    counting = Counting(denoiser)
    latent = encoded(counting, x, solver, grid)
    assert latent.nfe == len(counting.times)
    assert latent.status == "complete"
    assert latent.t == sde.t_max
    assert sde.t_min <= min(counting.times)
    assert max(counting.times) <= sde.t_max
    torch.testing.assert_close(sample(denoiser, latent.x, solver, grid=grid).x, x, rtol=0, atol=2e-5)
    data = TARGET.sample(4, torch.Generator().manual_seed(0), dtype=torch.float64)
    up = encoded(TARGET.denoiser(sde), data, solver, grid).x
    torch.testing.assert_close(up, TARGET.flow(data, sde, sde.t_min, sde.t_max), rtol=1e-5, atol=1e-5)


def test_encode_by_scipy_in_float32_and_to_a_budget():
    sde, x = VPSDE(), TARGET.sample(3, torch.Generator().manual_seed(0), dtype=torch.float64)
    code = encode(TARGET.denoiser(sde), x.float(), AdaptiveODE("RK45"))
    assert code.latent.dtype == torch.float32
    assert code.grid == Grid(sde, [1.0, sde.t_min])
    torch.testing.assert_close(code.latent.double(), TARGET.flow(x, sde, sde.t_min, 1.0), rtol=0, atol=2e-3)
    short = encoded(TARGET.denoiser(sde), x, AdaptiveODE(max_nfe=40), whole(sde))
    assert short.nfe == 40
    assert short.status == "max_nfe"
    assert sde.t_min < short.t < 1.0
    torch.testing.assert_close(short.x, TARGET.flow(x, sde, sde.t_min, short.t), rtol=0, atol=1e-3)


class Broken(Counting):
    """NaN for sample 2 below t = 0.3."""

    def posterior(self, x, t, **cond):
        mean = super().posterior(x, t, **cond).mean.clone()
        if float(t) < 0.3:
            mean[2] = torch.nan
        return Posterior(mean)


@pytest.mark.parametrize("method", METHODS)
def test_a_nan_ends_the_run_and_is_located(method):
    broken = Broken(TARGET.denoiser(VPSDE()))
    with pytest.raises(NonFiniteError, match=r"sample 2 became non-finite in step 1") as error:
        sample(broken, normal(4, 3), AdaptiveODE(method), grid=Grid(VPSDE(), [1.0, 0.4, 0.0]))
    assert error.value.samples == [2]
    assert error.value.time < 0.3
    assert error.value.time == broken.times[-1]
    with pytest.raises(NonFiniteError, match="non-finite") as error:
        encode(broken, normal(4, 3), AdaptiveODE(method))
    assert error.value.samples == [2]
    assert error.value.time == VPSDE().t_min
    with pytest.raises(ValueError, match="not finite in samples 0: no evaluation is made"):
        sample(TARGET.denoiser(VPSDE()), torch.full((1, 3), torch.nan), AdaptiveODE(method))


class Restless(Counting):
    """Another answer every time."""

    def posterior(self, x, t, **cond):
        mean = super().posterior(x, t, **cond).mean
        return Posterior(mean + (len(self.times) % 7) * torch.ones_like(mean))


@pytest.mark.parametrize("method", ["dopri5", "adaptive_heun", "RK45", "BDF"])
def test_a_denoiser_without_an_answer_ends_in_an_error_or_at_the_budget(method):
    restless, solver = Restless(TARGET.denoiser(VPSDE())), AdaptiveODE(method, rtol=1e-10, atol=1e-10, max_nfe=300)
    try:
        status = sample(restless, normal(2, 3), solver).status
    except ArithmeticError as error:
        status = str(error)
    assert status == "max_nfe" or "The tolerances ask for more" in status
    assert len(restless.times) <= 300


@pytest.mark.parametrize("method", TORCHDIFFEQ)
def test_gradients_are_those_of_the_flow(method):
    """On a Gaussian dx_s/dx_t is diagonal: the ratio of the marginal widths."""
    sde, x = VPSDE(), normal(2, 3).requires_grad_()
    sample(TARGET.denoiser(sde), x, AdaptiveODE(method), grid=whole(sde), differentiable=True).x.sum().backward()
    std = torch.tensor([1.0, 0.3, 0.05], dtype=torch.float64)
    width = [torch.hypot(sde.alpha(t) * std, sde.sigma(t)) for t in (1.0, sde.t_min)]
    torch.testing.assert_close(x.grad, (width[1] / width[0]).expand(2, 3), rtol=0, atol=1e-4)


def test_scipy_says_that_it_has_no_gradients():
    sde, net = VPSDE(), torch.nn.Linear(3, 3)
    x = normal(2, 3).requires_grad_()
    with pytest.raises(ValueError, match="no gradients"):
        sample(TARGET.denoiser(sde), x, AdaptiveODE("RK45"), differentiable=True)
    denoiser = EpsDenoiser(lambda x, t: net(x), sde)
    with pytest.raises(ValueError, match="no gradients"):
        sample(denoiser, (2, 3), AdaptiveODE("RK45"), seed=0, differentiable=True, device="cpu")
    assert bool(sample(denoiser, (2, 3), AdaptiveODE("RK45"), seed=0, device="cpu").x.isfinite().all())


def test_float32_is_what_the_network_sees():
    seen = set()

    def net(x, t):
        seen.add(x.dtype)
        return torch.tanh(x)

    for method in ("dopri5", "RK45"):
        assert sample(EpsDenoiser(net, VPSDE()), (2, 3, 4), AdaptiveODE(method), seed=0).x.dtype == torch.float32
    assert seen == {torch.float32}


def test_refusals():
    for options in ({"method": "rk4"}, {"rtol": 0.0}, {"atol": -1.0}, {"max_nfe": 0}, {"first_step": float("inf")}):
        with pytest.raises(ValueError, match=next(iter(options))):
            AdaptiveODE(**options)
    with pytest.raises(ValueError, match="digits"):
        sample(TARGET.denoiser(VPSDE()), (100, 3), AdaptiveODE("RK45", rtol=5e-13), seed=0)
    for method in METHODS:
        with pytest.raises(ValueError, match="digits"):
            sample(TARGET.denoiser(VPSDE()), (1, 3), AdaptiveODE(method, rtol=5e-14), seed=0)
    evaluated = []
    with pytest.raises(ValueError, match="alpha is"):
        sample(EpsDenoiser(lambda x, t: evaluated.append(t) or x, FlowSDE()), (2, 3), AdaptiveODE(), seed=0)
    assert not evaluated
    with pytest.raises(TypeError, match="no table"):
        AdaptiveODE().tableau(Grid.uniform(VPSDE(), 3))
    velocity = VelocityDenoiser(lambda x, t: -x, FlowSDE())
    assert bool(sample(velocity, (2, 3), AdaptiveODE(), seed=0).x.isfinite().all())


def test_encode_refuses_what_sample_does():
    denoiser, x, solver = TARGET.denoiser(VPSDE()), normal(2, 3), AdaptiveODE()
    with pytest.raises(TypeError, match="expected a Denoiser"):
        encode(torch.tanh, x, solver)
    with pytest.raises(TypeError, match="grid is list: expected a Grid"):
        encode(denoiser, x, solver, grid=[1, 0])
    with pytest.raises(ValueError, match=r"cond\['label'\] has 3 entries for 2"):
        encode(denoiser, x, solver, cond={"label": torch.arange(3)})
    with pytest.raises(ValueError, match="floating-point"):
        encode(denoiser, torch.zeros(2, 3, dtype=torch.uint8), solver)
    with pytest.raises(ValueError, match="the grid was made for"):
        encode(denoiser, x, solver, grid=Grid(VESDE(), [1.0, 0.1]))
    net = torch.nn.Dropout(0.1)
    with pytest.warns(UserWarning, match="training mode"):
        encode(EpsDenoiser(lambda x, t: net(x), VPSDE()).with_net(Net(net)), x, AdaptiveODE(max_nfe=20))


class Net(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, t):
        return self.inner(x)


def test_the_same_samples_however_the_denoiser_is_written():
    sde, x = VPSDE(), normal(3, 3)
    exact = Nonlinear(sde)
    as_eps = EpsDenoiser(lambda x, t: exact.eps(x, t), sde)
    for method, start in itertools.product(("dopri5", "RK45"), (1.0, start_of(sde))):
        a, b = (sample(d, x, AdaptiveODE(method), grid=Grid(sde, [start, 0.0])) for d in (exact, as_eps))
        torch.testing.assert_close(a.x, b.x, rtol=0, atol=1e-8)


@pytest.mark.parametrize("tol", [1e-3, 1e-5])
def test_a_sample_depends_on_its_batch_within_the_tolerance_only(tol):
    """As the README says; in units of w, whose local errors of some tens of steps add up, on data of narrow modes."""
    denoiser = GaussianMixture(means=[[-1.0, 0.5], [1.0, -0.5]], std=0.3).denoiser(VPSDE())
    x_T, solver = normal(8, 2), AdaptiveODE(rtol=tol, atol=tol)
    together = sample(denoiser, x_T, solver).x
    alone = torch.cat([sample(denoiser, x[None], solver).x for x in x_T])
    difference = float((together - alone).abs().max())
    assert 1e-12 < difference < 30 * tol
