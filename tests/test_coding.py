"""Encoding through the ODE: tables on increasing grids, the way there and back, and what is done with latents."""

from __future__ import annotations

import math

import pytest
import torch
from common import SDES, Counting, Nonlinear, end_of, generator, network_for, normal, start_of

from scoresde import (
    EDMSDE,
    VPSDE,
    CosineVPSDE,
    DDPMChain,
    EpsDenoiser,
    FlowSDE,
    Grid,
    NonFiniteError,
    Posterior,
    ScoreDenoiser,
    SubVPSDE,
    VDenoiser,
    VelocityDenoiser,
    X0Denoiser,
    sample,
)
from scoresde.editing.latents import decode, encode, interpolate, rescale
from scoresde.exact import Gaussian, GaussianMixture
from scoresde.solvers import (
    DDIM,
    ERSDE,
    AdaptiveODE,
    DPMSolver,
    DPMSolverPP,
    EDMStochastic,
    ExponentialAB,
    ExponentialSDE,
    Heun,
    PredictorCorrector,
    RungeKutta,
    SASolver,
    UniPC,
    available,
)

ENTRIES = {entry.name: entry for entry in available()}
CODERS = {name: e for name, e in ENTRIES.items() if e.deterministic and e.solver.has_table}
LOOPS = {name for name, e in ENTRIES.items() if not e.solver.has_table}
TARGET = Gaussian(mean=[0.5, -0.3, 1.0], std=[0.3, 1.0, 0.6])
MIXTURE = GaussianMixture(
    means=[[-1.0, 0.5, 0.2], [1.5, -0.3, -0.4]], weights=[0.4, 0.6], std=[[0.5, 0.6, 0.4], [0.7, 0.4, 0.8]]
)
ROUND_TRIPS = {name: SDES[name] for name in ("vp", "edm", "flow")}
TO_ALPHA_ZERO = {"flow": FlowSDE(), "cosine-1": CosineVPSDE(t_max=1.0)}


def relative(x, expected):
    return float((x - expected).norm() / expected.norm())


def data(target, sde, grid, n=4):
    """The state at the grid's end that n draws have without noise."""
    return target.sample(n, generator=generator(1), dtype=torch.float64) * sde.alpha(grid.times[-1])


def evenly(sde, steps):
    """Even in half log-SNR, from 3 to -5.5 (EDM: -4.4)."""
    return Grid.log_snr(sde, steps, start=start_of(sde), end=end_of(sde))


def round_trip(denoiser, x, solver, grid):
    return sample(denoiser, sample(denoiser, x, solver, grid=grid.reversed()).x, solver, grid=grid).x


# Tables on increasing grids.


@pytest.mark.parametrize("name", CODERS)
def test_there_and_back_returns_x_at_the_order_of_the_solver(name):
    """On a denoiser that is not linear, between half log-SNR 3 and -5.5 (EDM: -4.4). The error of a first-order first
    step, of order 2 or with a corrector 3, is not small at the data, where encoding starts: multistep methods keep no
    more of their order. (Single steps of even order gain one: their error there and back cancels.)
    """
    entry = CODERS[name]
    order = entry.order
    if entry.family == "multistep":
        order = min(order, 3 if getattr(entry.solver, "corrector", False) else 2)
    for sde in ROUND_TRIPS.values():
        errors = []
        for steps in (20, 80):
            grid = evenly(sde, steps)
            x = normal(3, 2, 2) * sde.alpha(grid.times[-1])
            errors.append(relative(round_trip(Nonlinear(sde), x, entry.solver, grid), x))
        assert math.log2(errors[0] / errors[1]) / 2 > order - 0.4
        if name != "reverse-diffusion-ode":  # unstable upwards at few steps: a factor 1 - 1 / A far below zero
            assert errors[1] < {1: 0.3, 2: 0.02}.get(order, 2e-3)


def mapped(sde, steps):
    """The same half log-SNR on every SDE, from 4.5 up to -5: those of a power grid, fine near the data."""
    vp = VPSDE()
    grid = Grid.power(vp, steps, start=float(vp.time_at(-5.0)), end=float(vp.time_at(4.5)))
    return Grid(sde, sde.time_at(vp.half_log_snr(grid.times)))


@pytest.mark.parametrize(
    ("solver", "order"),
    [
        (DDIM(), 1),
        (DPMSolverPP(2), 2),
        (UniPC(3), 4),
        (ExponentialAB(4, "v"), 4),
        (RungeKutta("rk4"), 4),
        (Heun(), 2),
        (DPMSolver(3), 3),
    ],
    ids=["ddim", "dpm++2m", "unipc3", "eab4-v", "rk4", "heun", "dpm-solver3"],
)
@pytest.mark.parametrize("name", ["vp", "flow", "chain"])
def test_codes_tend_to_the_exact_flow(name, solver, order):
    sde, errors = SDES[name], []
    for steps in (40, 80):
        grid = evenly(sde, steps) if isinstance(solver, DPMSolver) else mapped(sde, steps)
        x = data(TARGET, sde, grid)
        exact = TARGET.flow(x, sde, float(grid.times[-1]), float(grid.times[0]))
        errors.append(relative(encode(TARGET.denoiser(sde), x, solver, grid=grid).latent, exact))
    assert math.log2(errors[0] / errors[1]) > order - 0.4
    assert errors[1] < {1: 0.1, 2: 5e-3}.get(order, 1e-3)


@pytest.mark.parametrize("name", CODERS)
@pytest.mark.parametrize("sde", TO_ALPHA_ZERO.values(), ids=TO_ALPHA_ZERO)
def test_up_to_alpha_zero(name, sde):
    """On the solver's own grid the last step reaches pure noise. Finite at any number of steps, near the exact flow and
    back at 40, or of a first-order method at 160, with a quarter of its error at 40.
    """
    entry, denoiser = CODERS[name], MIXTURE.denoiser(sde)
    for steps in (1, 2, 3, 5):
        x = data(MIXTURE, sde, entry.solver.grid(sde, steps, end=sde.t_min))
        code = encode(denoiser, x, entry.solver, steps=steps)
        assert code.grid.times[[0, -1]].tolist() == [sde.t_max, sde.t_min]
        assert bool(code.latent.isfinite().all())
    latent, back = [], []  # errors of
    for steps in (40, 160) if entry.order == 1 else (40,):
        grid = entry.solver.grid(sde, steps, end=sde.t_min)
        x = data(TARGET, sde, grid)
        code = encode(TARGET.denoiser(sde), x, entry.solver, grid=grid, check=True)
        assert code.nfe == entry.solver.evaluations(grid) == entry.solver.evaluations(grid.reversed())
        latent.append(relative(code.latent, TARGET.flow(x, sde, sde.t_min, sde.t_max)))
        back.append(float(code.error.max()))
    if name == "reverse-diffusion-ode":  # does not converge there: its error is 1.6 of it at 40 steps, 1.2 at 320
        return
    assert latent[-1] < 0.03
    assert back[-1] < 0.05
    if entry.order == 1:
        assert latent[-1] < 0.3 * latent[0]
        assert back[-1] < 0.3 * back[0]


def test_views_along_a_curve_reach_alpha_zero_at_full_order():
    sde = FlowSDE()
    for solver, order in ((RungeKutta("rk4", "angle"), 4), (ExponentialAB(4, "flow"), 4), (Heun("t"), 2)):
        errors = []
        for steps in (20, 40):
            x = data(TARGET, sde, solver.grid(sde, steps, end=sde.t_min))
            latent = encode(TARGET.denoiser(sde), x, solver, steps=steps).latent
            errors.append(relative(latent, TARGET.flow(x, sde, sde.t_min, 1.0)))
        assert math.log2(errors[0] / errors[1]) > order - 0.4


@pytest.mark.parametrize("sde", [VPSDE(), EDMSDE(), FlowSDE(), DDPMChain(), SubVPSDE()], ids=repr)
def test_ddim_inversion_is_its_formula(sde):
    """x_s = alpha_s D(x_t, t) + sigma_s eps(x_t, t), network evaluated where the state stands; other names for it."""
    grid, denoiser = DDIM().grid(sde, 7, end=sde.t_min), Nonlinear(sde)
    x = start = normal(2, 3) * 0.5
    for t, s in zip(grid.times.flip(0)[:-1].tolist(), grid.times.flip(0)[1:].tolist(), strict=True):
        D = denoiser(x, t).mean
        eps = (x - sde.alpha(t) * D) / sde.sigma(t)
        x = sde.alpha(s) * D + sde.sigma(s) * eps
    same = [DDIM(), ExponentialSDE(tau=0.0), DPMSolver(1), DPMSolverPP(1), ERSDE(1, noise_scale="ode")]
    same += [SASolver(1, 0, tau=0.0)]
    for solver in (*same, ExponentialAB(1, "eps"), UniPC(1, corrector=False), RungeKutta("euler")):
        torch.testing.assert_close(encode(denoiser, start, solver, grid=grid).latent, x, rtol=1e-9, atol=1e-9)


def test_no_noise_in_other_ways_to_say_it():
    """tau = 0, phi = u and a noise level that is a function equal to zero are deterministic, so they encode."""
    sde, denoiser = VPSDE(), MIXTURE.denoiser(VPSDE())
    grid = Grid.power(sde, 12, end=sde.t_min)
    x = data(MIXTURE, sde, grid)
    expected = encode(denoiser, x, UniPC(3, rule="exact", corrector=False), grid=grid).latent
    for solver in (SASolver(3, 0, tau=0.0), SASolver(3, 0, tau=torch.zeros_like), ExponentialAB(3)):
        torch.testing.assert_close(encode(denoiser, x, solver, grid=grid).latent, expected, rtol=1e-8, atol=1e-8)
    er = encode(denoiser, x, ERSDE(3, noise_scale="ode"), grid=grid).latent
    ab = encode(denoiser, x, ExponentialAB(3, variable="sigma"), grid=grid).latent
    torch.testing.assert_close(er, ab, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("sde", [VPSDE(), EDMSDE(), FlowSDE()], ids=repr)
@pytest.mark.parametrize("name", [n for n in ENTRIES if not ENTRIES[n].deterministic or n.startswith("dpm-solver12")])
def test_solvers_that_draw_noise_refuse(name, sde):
    solver, denoiser = ENTRIES[name].solver, MIXTURE.denoiser(sde)
    grid = Grid.uniform(sde, 5, end=sde.t_min)
    if name not in LOOPS:
        with pytest.raises(ValueError, match=r"an increasing grid.*is for deterministic solvers"):
            solver.tableau(grid.reversed())
    counting = Counting(denoiser)
    with pytest.raises(ValueError, match=r"an increasing grid.*is for deterministic solvers"):
        sample(counting, normal(2, 3), solver, grid=grid.reversed(), seed=0)
    for function in (encode, decode):
        with pytest.raises((ValueError, TypeError), match=r"deterministic solver|no table"):
            function(counting, normal(2, 3), solver, grid=grid)
    assert not counting.times


def test_more_that_draw_noise_refuse():
    grid = Grid.power(VPSDE(), 6, end=1e-5).reversed()
    noisy = [
        DDIM(1.0),
        ExponentialSDE(0.3),
        ExponentialAB(2, "eps", tau=0.5),
        ExponentialAB(2, "flow", tau=1.0),
        SASolver(tau=lambda t: (t > 0.5).double()),
        ERSDE(2, noise_scale="sde"),
        EDMStochastic(S_churn=0.0),  # whose way up is the forward process
        PredictorCorrector(DDIM(), corrector="ald"),
    ]
    for solver in noisy:
        with pytest.raises(ValueError, match="an increasing grid"):
            solver.tableau(grid)


def test_a_shape_has_nothing_to_encode():
    with pytest.raises(ValueError, match="an increasing grid encodes data: give x, not a shape"):
        sample(TARGET.denoiser(VPSDE()), (2, 3), DDIM(), grid=Grid.uniform(VPSDE(), 3, end=1e-5).reversed(), seed=0)


def test_a_trajectory_upwards():
    """The states on the way are those at the grid's times, by tables and by the adaptive solver."""
    sde = FlowSDE()
    up = Grid(sde, [1.0, 0.8, 0.3, 1e-3]).reversed()
    x = normal(3, 3)
    for solver, tolerance in ((AdaptiveODE(rtol=1e-8, atol=1e-8), 1e-4), (RungeKutta("rk4", "flow"), 0.1)):
        solution = sample(TARGET.denoiser(sde), x, solver, grid=up, trajectory=True)
        assert solution.grid == up
        assert solution.t == 1.0
        assert len(solution.trajectory) == 4
        for t, state in zip(up.times.tolist(), solution.trajectory, strict=True):
            assert relative(state, TARGET.flow(x, sde, 1e-3, t)) < tolerance


# Codes are the model's, not the network's.


@pytest.mark.parametrize("solver", [DDIM(), UniPC(3), RungeKutta("rk4", "angle"), AdaptiveODE()], ids=repr)
def test_every_parameterisation_gives_the_same_code(solver):
    sde, exact = VPSDE(), MIXTURE.denoiser(VPSDE())
    steps = {} if solver.adaptive else {"steps": 10}
    x = MIXTURE.sample(4, generator=generator(), dtype=torch.float64)
    expected = encode(exact, x, solver, **steps)
    kinds = [(X0Denoiser, "x0"), (EpsDenoiser, "eps"), (ScoreDenoiser, "score")]
    kinds += [(VDenoiser, "v"), (VelocityDenoiser, "velocity")]
    for kind, view in kinds:
        code = encode(kind(network_for(exact, view), sde), x, solver, **steps)
        torch.testing.assert_close(code.latent, expected.latent, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["ddim", "dpm++2m", "unipc3", "eab4-v", "dpm-solver3", "rk4", "deis3-rho"])
def test_the_same_path_gives_the_same_code_up_to_scale(name):
    """VP and EDM at the same sigma / alpha see the same x / alpha: solvers that know of time only through half log-SNR
    agree to rounding, v too, since its angle is one.
    """
    vp, edm, solver = VPSDE(), EDMSDE(t_min=1e-3, t_max=200.0).for_data(1.0), ENTRIES[name].solver
    grid = Grid.power(vp, 12, end=1e-5)
    u = (-vp.half_log_snr(grid.times)).exp()
    x = MIXTURE.sample(4, generator=generator(), dtype=torch.float64)
    on_vp = encode(MIXTURE.denoiser(vp), x * vp.alpha(1e-5), solver, grid=grid).latent / vp.alpha(1.0)
    on_edm = encode(MIXTURE.denoiser(edm), x, solver, grid=Grid(edm, u)).latent
    torch.testing.assert_close(on_vp, on_edm, rtol=1e-9, atol=1e-9 * float(on_edm.abs().max()))


# encode and decode.


@pytest.mark.parametrize("sde", [VPSDE(), FlowSDE(), DDPMChain(), EDMSDE()], ids=repr)
def test_the_adaptive_code_is_exact_and_decodes_to_x(sde):
    x = TARGET.sample(4, generator=generator(), dtype=torch.float64)
    solver = AdaptiveODE(rtol=1e-7, atol=1e-7)
    code = encode(TARGET.denoiser(sde), x, solver, check=True)
    assert relative(code.latent, TARGET.flow(x, sde, sde.t_min, sde.t_max)) < 1e-4
    assert code.grid == Grid(sde, [sde.t_max, sde.t_min])
    back = decode(TARGET.denoiser(sde), code.latent, solver)
    assert back.t == sde.t_min
    torch.testing.assert_close((back.x - x).norm(dim=1) / x.norm(dim=1), code.error)
    assert float(code.error.max()) < 1e-3
    assert encode(TARGET.denoiser(sde), x).status == "complete"


def test_a_budget_that_runs_out_is_told():
    x = TARGET.sample(3, generator=generator(), dtype=torch.float64)
    code = encode(TARGET.denoiser(VPSDE()), x, nfe=20, check=True)
    assert code.status == "max_nfe"
    assert code.nfe <= 20
    assert code.error.tolist() == [math.inf] * 3


@pytest.mark.parametrize("nfe", [4, 11, 25])
@pytest.mark.parametrize("solver", [DDIM(), Heun(), DPMSolver(3, fast=True), RungeKutta("rk4")], ids=repr)
@pytest.mark.parametrize("sde", [VPSDE(), DDPMChain.linear(8, 1e-3, 0.5)], ids=["vp", "eight nodes"])
def test_a_budget_of_evaluations_is_filled(sde, solver, nfe):
    x = TARGET.sample(2, generator=generator())
    counting = Counting(TARGET.denoiser(sde))
    code = encode(counting, x, solver, nfe=nfe)
    assert code.nfe == len(counting.times) <= nfe
    assert float(code.grid.times[-1]) == sde.t_min
    if code.grid.steps < 7:  # all steps that eight nodes have
        assert solver.evaluations(solver.grid(sde, code.grid.steps + 1, end=sde.t_min)) > nfe


def test_the_grid_of_steps_ends_at_t_min_on_the_spacing_of_the_solver():
    x = TARGET.sample(1, generator=generator())
    for sde in (VPSDE(), EDMSDE(), DDPMChain()):
        denoiser = TARGET.denoiser(sde)
        assert encode(denoiser, x, UniPC(), steps=9).grid == Grid.sampling(sde.unrounded, 9, power=4.0, end=sde.t_min)
        assert encode(denoiser, x, Heun(), steps=9).grid == Grid.customary(sde, 9, end=sde.t_min)
    assert encode(TARGET.denoiser(DDPMChain()), x, UniPC(), steps=999).grid.times.tolist() == list(range(1000, 0, -1))


def test_decode_stops_where_encode_began():
    """At t_min, not at D: sample with steps= would go on."""
    sde, solver = VPSDE(), DPMSolver(3)
    x = MIXTURE.sample(4, generator=generator(), dtype=torch.float64)
    code = encode(MIXTURE.denoiser(sde), x, solver, steps=30, check=True)
    for choice in ({"grid": code.grid}, {"steps": 30}, {"nfe": code.nfe}):
        back = decode(MIXTURE.denoiser(sde), code.latent, solver, **choice)
        assert back.t == sde.t_min
        torch.testing.assert_close((back.x - x).norm(dim=1) / x.norm(dim=1), code.error)
    assert float(code.error.max()) < 1e-3


def test_ranks_dtypes_conditions_and_the_callers_tensor():
    sde, seen = VPSDE(), set()

    def net(x, t, *, label):
        seen.add((x.dtype, x.ndim, int(label)))
        return 0.9 * x

    denoiser = EpsDenoiser(net, sde)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = normal(2, 3, 4, 4).to(dtype)
        before = x.clone()
        code = encode(denoiser, x, UniPC(), steps=5, cond={"label": 7}, check=True)
        assert torch.equal(x, before)
        assert code.latent.dtype == dtype
        assert code.error.shape == (2,)
    assert seen == {(torch.float32, 4, 7), (torch.float64, 4, 7)}
    batch = encode(Nonlinear(sde), normal(4, 2, 3), UniPC(), steps=6).latent
    assert torch.equal(encode(Nonlinear(sde), normal(4, 2, 3)[1:2], UniPC(), steps=6).latent, batch[1:2])


def test_gradients_of_the_code():
    """Those of the exact flow, an affine map with one factor per element."""
    sde = VPSDE()
    x = TARGET.sample(3, generator=generator(), dtype=torch.float64).requires_grad_()
    code = encode(TARGET.denoiser(sde), x, RungeKutta("rk4", "angle"), steps=40, differentiable=True, check=True)
    (gradient,) = torch.autograd.grad(code.latent.sum(), x)
    variances = torch.tensor([0.3, 1.0, 0.6], dtype=torch.float64) ** 2
    S = [sde.alpha(t) ** 2 * variances + sde.sigma(t) ** 2 for t in (sde.t_min, 1.0)]
    torch.testing.assert_close(gradient, (S[1] / S[0]).sqrt().expand(3, 3), rtol=1e-5, atol=0)
    assert not code.error.requires_grad
    assert not encode(TARGET.denoiser(sde), x, DDIM(), steps=3).latent.requires_grad


def test_an_error_of_zero_and_of_nothing():
    """A sample that is zero has no relative error but zero, if it comes back exactly, or infinity."""

    class Zero(Nonlinear):
        def posterior(self, x, t, **cond):
            return Posterior(torch.zeros_like(x))

    x = torch.stack([torch.zeros(3), torch.ones(3)]).double()
    code = encode(Zero(VPSDE()), x, DDIM(), steps=5, check=True)
    assert code.error[0] == 0
    assert float(code.error[1]) < 1e-12
    code = encode(MIXTURE.denoiser(VPSDE()), x, DDIM(), steps=5, check=True)
    assert code.error[0] == math.inf


def test_a_nan_is_located_on_the_way_up():
    sde = VPSDE()

    class Bad(Nonlinear):
        def posterior(self, x, t, **cond):
            mean = super().posterior(x, t, **cond).mean.clone()
            if float(t) > 0.4:
                mean[1] = math.nan
            return Posterior(mean)

    for solver, steps in ((UniPC(), {"steps": 10}), (AdaptiveODE(), {})):
        with pytest.raises(NonFiniteError) as error:
            encode(Bad(sde), 0.1 * normal(3, 3), solver, **steps)
        assert error.value.samples == [1]
        assert error.value.time > 0.4


X = normal(2, 3)
DENOISER = TARGET.denoiser(VPSDE())


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: encode(torch.tanh, X), TypeError, "expected a Denoiser"),
        (lambda: encode(DENOISER, X, DDIM, steps=3), TypeError, "instance of a solver"),
        (lambda: encode(DENOISER, X, DDIM(), grid=[1, 0.5]), TypeError, "grid is list"),
        (lambda: encode(DENOISER, X.long(), DDIM(), steps=3), ValueError, "floating-point"),
        (lambda: encode(DENOISER, X, DDIM()), ValueError, "exactly one of steps=, nfe= and grid=; got none"),
        (lambda: encode(DENOISER, X, DDIM(), steps=3, nfe=3), ValueError, "got steps and nfe"),
        (lambda: encode(DENOISER, X, steps=3), ValueError, "AdaptiveODE chooses its own steps"),
        (lambda: encode(DENOISER, X, DDIM(), steps=0), ValueError, "whole number"),
        (lambda: encode(DENOISER, X, RungeKutta("rk4"), nfe=3), ValueError, "needs more than nfe=3"),
        (lambda: encode(DENOISER, X, DDIM(), grid=Grid.uniform(VPSDE(), 3)), ValueError, "end=sde.t_min"),
        (lambda: decode(DENOISER, X, DDIM(), grid=Grid.uniform(VPSDE(), 3)), ValueError, "end=sde.t_min"),
        (lambda: encode(DENOISER, X, grid=Grid.uniform(VPSDE(), 3)), ValueError, "end=sde.t_min"),
        (
            lambda: encode(DENOISER, X, DDIM(), grid=Grid.uniform(VPSDE(), 3, end=0.1).reversed()),
            ValueError,
            "decreasing grid",
        ),
        (lambda: encode(DENOISER, X, DDIM(), grid=Grid.uniform(EDMSDE(), 3, end=0.1)), ValueError, "was made for"),
        (
            lambda: encode(EpsDenoiser(lambda x, t: x, FlowSDE()), X, Heun("angle"), steps=3),
            ValueError,
            "says nothing of x0 at t = 1.0",
        ),
    ],
)
def test_bad_arguments_are_refused(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


# Latents.


def angle(x, y):
    return torch.nn.functional.cosine_similarity(x.flatten(1), y.flatten(1)).acos()


def test_interpolation_is_at_even_speed_on_the_great_circle():
    a, b = normal(1, 3, 8, 8, seed=1), 1.5 * normal(1, 3, 8, 8, seed=2)
    w = torch.linspace(0, 1, 7, dtype=torch.float64)
    path = interpolate(a, b, w)
    assert path.shape == (7, 3, 8, 8)
    torch.testing.assert_close(path[[0, -1]], torch.cat([a, b]), rtol=1e-12, atol=1e-12)
    theta = angle(a, b)
    torch.testing.assert_close(angle(path[1:], a.expand(6, 3, 8, 8)), w[1:] * theta, rtol=1e-7, atol=0)
    torch.testing.assert_close(angle(path[:-1], b.expand(6, 3, 8, 8)), (1 - w[:-1]) * theta, rtol=1e-7, atol=0)
    norms = (1 - w) * a.norm() + w * b.norm()
    torch.testing.assert_close(path.flatten(1).norm(dim=1), norms, rtol=1e-12, atol=0)
    torch.testing.assert_close(interpolate(b, a, 1 - w), path, rtol=1e-12, atol=1e-12)


def test_interpolation_broadcasts_along_the_batch():
    a, b, w = normal(4, 2, 3, seed=1), normal(4, 2, 3, seed=2), [0.0, 0.3, 0.5, 1.0]
    rows = interpolate(a, b, w)
    for i, weight in enumerate(w):
        torch.testing.assert_close(rows[i : i + 1], interpolate(a[i : i + 1], b[i : i + 1], weight))
    assert torch.equal(interpolate(a, b, 0.5), interpolate(a, b, [0.5] * 4))
    assert interpolate(a[:1], b, 0.2).shape == (4, 2, 3)
    assert interpolate(a.float(), b.float(), w).dtype == torch.float32
    torch.testing.assert_close(interpolate(a.float(), b.float(), w), rows.float(), rtol=1e-5, atol=1e-6)


def test_interpolation_between_latents_that_are_alike():
    a = normal(1, 5)
    for other in (a, a * (1 + 1e-15), a + 1e-9 * normal(1, 5, seed=1)):
        torch.testing.assert_close(interpolate(a, other, [0.0, 0.4, 1.0]), a.expand(3, 5), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(interpolate(a, 3 * a, 0.5), 2 * a)
    torch.testing.assert_close(interpolate(0 * a, a, 0.25), 0.25 * a)
    assert torch.equal(interpolate(0 * a, 0 * a, 0.25), 0 * a)


def test_interpolation_between_opposite_latents_is_refused():
    a = normal(3, 4)
    with pytest.raises(ValueError, match=r"opposite in rows \[1\]"):
        interpolate(a, torch.stack([a[0] + 1, -2 * a[1], a[2]]), 0.5)
    nearly = interpolate(a[:1], -a[:1] + 1e-4 * normal(1, 4, seed=1), 0.5)
    torch.testing.assert_close(angle(nearly, a[:1]), torch.tensor([math.pi / 2]).double(), rtol=1e-3, atol=0)


def test_the_middle_of_two_codes_is_a_draw_of_the_prior():
    """Two draws of N(0, I) in d dimensions are orthogonal, to 1 / sqrt(d), and the middle has variance one again; on
    the straight line it has half. 5 sigma of the mean square over n d normals: 5 sqrt(2 / (n d)), n = 200, d = 1000.
    """
    a, b = normal(200, 1000, seed=3), normal(200, 1000, seed=4)
    middle = interpolate(a, b, 0.5)
    assert float(middle.square().mean()) == pytest.approx(1, abs=5 * math.sqrt(2 / 200_000) + 0.01)
    assert float(((a + b) / 2).square().mean()) == pytest.approx(0.5, abs=0.02)


def test_temperature_scales_the_variance_of_gaussian_data():
    """On Gaussian data and alpha_T = 0 the decoded sample's distance from the mean grows by sqrt(tau), exactly."""
    sde, tau = FlowSDE(), torch.tensor([0.0, 0.25, 1.0, 4.0])
    latent = normal(4, 3)
    solver = RungeKutta("rk4", "flow")
    plain, hot = (decode(TARGET.denoiser(sde), z, solver, steps=40).x for z in (latent, rescale(latent, tau)))
    mean = torch.tensor([0.5, -0.3, 1.0], dtype=torch.float64) * sde.alpha(sde.t_min)
    torch.testing.assert_close(hot - mean, tau.sqrt().double()[:, None] * (plain - mean), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rescale(latent, 4.0), 2 * latent)
    torch.testing.assert_close(rescale(rescale(latent, 0.3), 1 / 0.3), latent)
    assert rescale(latent.bfloat16(), 2.0).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: interpolate(X[0], X[1], 0.5), "expected batches"),
        (lambda: interpolate(X, X[:, :2], 0.5), "expected batches"),
        (lambda: interpolate(X, X, [0.1, 0.2, 0.3]), "2 and 2 latents with 3 weights"),
        (lambda: interpolate(X, X, 1.5), r"in \[0, 1\]"),
        (lambda: interpolate(X, X, math.nan), r"in \[0, 1\]"),
        (lambda: interpolate(X, X, torch.zeros(2, 2)), r"weights of shape \(2, 2\)"),
        (lambda: interpolate(X.long(), X, 0.5), "floating-point"),
        (lambda: rescale(X, -1.0), "temperature=-1.0"),
        (lambda: rescale(X, math.inf), "temperature=inf"),
        (lambda: rescale(X, torch.ones(3)), "one per sample"),
    ],
)
def test_bad_latents_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
