"""The tableau: its invariants, its agreement with the textbook, its measured orders, and what it refuses."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from common import (
    SDES,
    SOLVERS,
    Nonlinear,
    end_of,
    generator,
    network_for,
    normal,
    solve,
    start_of,
)
from test_single_step import output_law

from scoresde import (
    EDMSDE,
    VPSDE,
    DDPMChain,
    EpsDenoiser,
    FlowSDE,
    Grid,
    ScoreDenoiser,
    SubVPSDE,
    Tableau,
    VDenoiser,
    VelocityDenoiser,
    X0Denoiser,
    sample,
)
from scoresde.exact import Gaussian, GaussianMixture
from scoresde.solvers import DDIM, DDPM, Euler, Heun, UniPC
from scoresde.textbook.first_order import ddpm_chain

# Methods that are consistent with the linear part of the SDE only to their order, because they discretise it in t.
NOT_EXACT_ON_LINEAR_PART = {"euler-maruyama", "euler t", "heun t"}


def grids(sde):
    for steps in (1, 2, 3, 7, 20):
        yield Grid.uniform(sde, steps, start=start_of(sde))
        yield Grid.uniform(sde, steps, start=start_of(sde), end=end_of(sde))
    yield Grid.log_snr(sde, 9, start=start_of(sde))


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
@pytest.mark.parametrize("name", [s for s in SOLVERS if s not in NOT_EXACT_ON_LINEAR_PART])
def test_i1_data_passes_unchanged(name, sde):
    """(I1): if D is x_0 whatever x, noiseless data alpha_t x_0 is carried to alpha_s x_0."""
    for grid in grids(sde):
        table = SOLVERS[name].tableau(grid)
        alpha = sde.alpha(torch.cat([table.t, grid.times[-1:]]))
        F = table.p * alpha[:-1] + table.q
        b_F = sum(table.b[:, k] * torch.cat([F.new_zeros(k), F[: len(F) - k]]) for k in range(table.b.shape[1]))
        torch.testing.assert_close(table.a * alpha[:-1] + b_F, alpha[1:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
@pytest.mark.parametrize("name", ["ddpm", "ddim", "ddim 0.5", "ddim 1", "euler sigma"])
def test_i2_noise_keeps_its_variance(name, sde):
    """(I2): a^2 sigma_t^2 + c^2 = sigma_s^2, a being the factor of x_t with D held fixed.

    Not for DDPM's larger variance, which is right for data of unit variance instead of a point, nor for Euler-Maruyama.
    """
    for grid in grids(sde):
        table = SOLVERS[name].tableau(grid)
        _, sigma_t, _, sigma_s = grid.pairs()
        a = table.a + table.b[:, 0] * table.p
        torch.testing.assert_close((a * sigma_t) ** 2 + table.c**2, sigma_s**2, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("name", sorted(NOT_EXACT_ON_LINEAR_PART))
def test_inexact_methods_meet_i1_to_first_order(name):
    """What fails (I1) on purpose fails it by O(h^2) a step, so not at all in the limit."""
    sde, error = VPSDE(), []
    for steps in (100, 200):
        grid = Grid.uniform(sde, steps, end=0.2)
        x0 = torch.full((1, 1), 2.0, dtype=torch.float64)
        table = SOLVERS[name].tableau(grid)
        constant = X0Denoiser(lambda x, t, x0=x0: x0, sde)
        *_, last = table.iterate(constant, sde.alpha(1.0) * x0, noise=lambda row, x: torch.zeros_like(x))
        error.append(float((last.x - sde.alpha(0.2) * x0).abs()))
    assert 1.7 < error[0] / error[1] < 4.6


@pytest.mark.parametrize("chain", [DDPMChain(), DDPMChain.cosine(), DDPMChain([0.3, 0.01, 0.5, 0.2])], ids=str)
@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_ddpm_on_the_whole_chain_is_algorithm_2(chain, variance):
    def eps(x, n):
        return torch.sin(x + n / chain.steps)

    denoiser = EpsDenoiser(lambda x, n: eps(x, n[:, None]), chain)
    grid = Grid.strided(chain, chain.steps)
    x, z = normal(2, 3), [normal(2, 3, seed=1 + i) for i in range(chain.steps)]
    expected = ddpm_chain(chain, lambda x, n: eps(x, torch.tensor(n)), x, z, variance)
    # This eps belongs to no data, so dividing by alpha_n at every step makes x large, and its rounding with it.
    tolerance = 1e-8 * float(expected.abs().max())
    torch.testing.assert_close(solve(denoiser, x, DDPM(variance), grid, z), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
def test_limits(sde):
    """DDIM with eta = 1 is DDPM, with eta = 0 Euler in sigma; on the same noise the samples are the same."""
    grid = Grid.uniform(sde, 8, start=start_of(sde))
    denoiser, x = Nonlinear(sde), normal(2, 3)
    z = [normal(2, 3, seed=1 + i) for i in range(8)]
    torch.testing.assert_close(
        solve(denoiser, x, DDIM(eta=1.0), grid, z), solve(denoiser, x, DDPM(), grid, z), rtol=1e-10, atol=1e-10
    )
    torch.testing.assert_close(
        solve(denoiser, x, DDIM(), grid), solve(denoiser, x, Euler(), grid), rtol=1e-9, atol=1e-9
    )


# Orders, and exact laws on Gaussian data.


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
@pytest.mark.parametrize(
    ("solver", "order"),
    [(DDIM(), 1), (Euler("t"), 1), (Heun(), 2), (Heun("t"), 2)],
    ids=["ddim", "euler t", "heun", "heun t"],
)
def test_order_on_the_exact_flow(solver, order, sde):
    """The error at the end against the closed-form flow of an anisotropic Gaussian falls as N^-order."""
    if isinstance(sde, DDPMChain) and solver == Heun("t"):
        pytest.skip("between a chain's nodes beta(t) jumps, so a method in t has no second order; one in sigma has")
    target = Gaussian(mean=[1.0, -2.0, 0.5], std=[0.3, 1.0, 2.0])
    denoiser = target.denoiser(sde)
    x = normal(4, 3) * 2
    errors = []
    for steps in (80, 160, 320):
        grid = Grid.log_snr(sde, steps, start=float(sde.time_at(-1.5)), end=float(sde.time_at(1.5)))
        exact = target.flow(x, sde, grid.times[0], grid.times[-1])
        errors.append(float((solve(denoiser, x, solver, grid) - exact).square().mean().sqrt()))
    measured = [math.log2(a / b) for a, b in pairwise(errors)]
    assert measured == pytest.approx([order] * 2, abs=0.1), errors


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_converges_to_the_marginal(name, sde):
    """Reverse SDE and ODE have the same marginals: the output's exact width tends to sqrt(alpha^2 std^2 + sigma^2)."""
    std, end = 0.7, end_of(sde)
    truth = math.sqrt(float(sde.alpha(end) ** 2 * std**2 + sde.sigma(end) ** 2))
    errors = []
    for steps in (100, 400):
        grid = Grid.log_snr(sde, steps, start=start_of(sde), end=end)
        errors.append(abs(output_law(SOLVERS[name], grid, std) / truth - 1))
    assert errors[1] < 0.05
    # First order gives 0.25, second 0.06. Heun in t of a chain, whose beta(t) jumps, is accurate but uneven.
    assert errors[1] < max(0.3 * errors[0], 1e-4)


def test_ddpm_variances_are_right_for_the_data_they_are_made_for():
    """Ho et al., section 3.2: beta is optimal for x_0 ~ N(0, I), beta tilde for a point, at any number of steps."""
    sde = VPSDE()
    for steps in (1, 2, 5, 20):
        grid = Grid.uniform(sde, steps, end=0.3)
        alpha, sigma = sde.alpha(0.3), sde.sigma(0.3)
        assert output_law(DDPM("beta"), grid, 1.0) == pytest.approx(1.0, rel=1e-12)
        assert output_law(DDPM(), grid, 0.0) == pytest.approx(float(sigma), rel=1e-12)
        assert output_law(DDIM(), grid, 0.0) == pytest.approx(float(sigma), rel=1e-12)
        assert float(alpha**2 + sigma**2) == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["ddpm", "euler-maruyama", "ddim"])
def test_mixture_weights_and_modes(name):
    """Samples of a lop-sided mixture fall into its modes with its weights: 4,000 draws, z-scores below 5."""
    target = GaussianMixture(means=[[-2.0, 0.0], [2.0, 1.0], [0.0, -2.0]], weights=[0.2, 0.5, 0.3], std=0.15)
    n = 4000
    grid = Grid.quadratic(VPSDE(), 150)
    x = sample(target.denoiser(VPSDE()), (n, 2), SOLVERS[name], grid=grid, generator=generator(3)).x
    nearest = torch.cdist(x.double(), torch.tensor([[-2.0, 0.0], [2.0, 1.0], [0.0, -2.0]]).double()).argmin(1)
    for k, weight in enumerate([0.2, 0.5, 0.3]):
        share = float((nearest == k).double().mean())
        # Five standard errors, and 0.02 for a discretisation of 150 steps and alpha(1) = 0.0066.
        assert abs(share - weight) < 5 * math.sqrt(weight * (1 - weight) / n) + 0.02


@pytest.mark.parametrize("view", ["x0", "eps", "score", "v", "velocity"])
def test_the_view_of_a_table_does_not_matter(view):
    """Euler written in any view, around a network that predicts any view, is the same sampler."""
    sde = VPSDE()
    grid = Grid.uniform(sde, 6, end=0.1)
    reference = Nonlinear(sde)
    x = normal(2, 3)
    expected = solve(reference, x, DDIM(), grid)
    table = DDIM().tableau(grid)
    probe = Tableau(grid, a=1.0, b=0.0, view=view)  # for its p and q: D = (F - p x) / q
    rewritten = Tableau(grid, a=table.a - table.b[:, 0] * probe.p / probe.q, b=table.b[:, 0] / probe.q, view=view)
    for predicted in ("x0", "eps", "score", "v", "velocity"):
        adapter = {"x0": X0Denoiser, "eps": EpsDenoiser, "score": ScoreDenoiser, "v": VDenoiser}.get(
            predicted, VelocityDenoiser
        )
        *_, last = rewritten.iterate(adapter(network_for(reference, predicted), sde), x)
        torch.testing.assert_close(last.x, expected, rtol=1e-9, atol=1e-9)


def test_a_row_on_the_data_is_the_denoiser_exactly():
    for sde in SDES.values():
        for solver in SOLVERS.values():
            grid = Grid.uniform(sde, 3, start=start_of(sde))
            table = solver.tableau(grid)
            denoiser = Nonlinear(sde)
            states = list(table.iterate(denoiser, normal(2, 3), lambda row, x: torch.zeros_like(x)))
            torch.testing.assert_close(
                states[-1].x, denoiser(states[-2].x, states[-1].t).mean, rtol=0, atol=0, msg=f"{sde} {solver}"
            )


def test_no_noise_is_drawn_where_c_is_zero():
    drawn = []
    table = DDPM().tableau(Grid.uniform(VPSDE(), 5))
    list(table.iterate(Nonlinear(VPSDE()), normal(2, 3), lambda row, x: drawn.append(row) or torch.zeros_like(x)))
    assert drawn == [0, 1, 2, 3]


def test_the_loop_is_a_generator():
    """A caller may stop, look and go on: states are not overwritten later."""
    table = Heun().tableau(Grid.karras(EDMSDE(), 4))
    states, copies = [], []
    for state in table.iterate(Nonlinear(EDMSDE()), normal(2, 3)):
        states.append(state)
        copies.append(state.x.clone())
    assert [s.step for s in states] == [0, 0, 1, 1, 2, 2, 3]
    assert [s.done for s in states] == [False, True] * 3 + [True]
    assert all(torch.equal(s.x, c) for s, c in zip(states, copies, strict=True))


def test_x_is_not_changed():
    x = normal(2, 3)
    before = x.clone()
    list(DDPM().tableau(Grid.uniform(VPSDE(), 3)).iterate(Nonlinear(VPSDE()), x, lambda row, x: torch.ones_like(x)))
    assert torch.equal(x, before)


def test_flow_from_alpha_zero():
    """At t = 1 of the flow alpha is zero: every solver starts there, on an x0 or velocity model."""
    target = Gaussian(mean=[3.0, -1.0], std=[0.5, 0.2])
    for name, solver in SOLVERS.items():
        x = sample(target.denoiser(FlowSDE()), (4000, 2), solver, steps=60, generator=generator(1)).x
        error = (x.mean(0) - torch.tensor([3.0, -1.0])).abs() / torch.tensor([0.5, 0.2])
        assert float(error.max()) < 5 / math.sqrt(4000) + 0.05, name  # five standard errors, and the discretisation


# What it refuses.


def test_repr_is_a_table():
    text = repr(Heun().tableau(Grid.karras(EDMSDE(), 3)))
    lines = text.splitlines()
    assert lines[1].split() == ["row", "step", "t", "p", "q", "a", "b0", "b1", "c"]
    assert [line.split()[0] for line in lines[2:]] == ["0", "1", "2", "3", "4"]
    assert float(lines[2].split()[2]) == 80.0
    long = repr(DDPM().tableau(Grid.uniform(VPSDE(), 1000)))
    assert len(long.splitlines()) < 30
    assert " 999" in long


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.ones(3)}, "a has shape"),
        ({"b": torch.ones(3)}, "b has shape"),
        ({"a": math.nan}, "coefficient a of row 0"),
        ({"b": torch.tensor([1.0, math.inf])}, "coefficient b of row 1"),
        ({"c": -1.0}, "standard deviation"),
        ({"b": torch.ones(2, 2)}, "before the first row"),
        ({"b": 1.0, "t": torch.tensor([1.0, 0.0])}, "expected times in"),
        ({"b": 1.0, "t": torch.tensor([1.5, 0.5])}, "expected times in"),
        ({"view": "noise"}, "expected one of"),
        ({"step": torch.tensor([0, 0])}, "in order"),
        ({"step": torch.tensor([1, 0])}, "in order"),
        ({"step": torch.tensor([0, 2])}, "in order"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_tables_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Tableau(Grid.uniform(VPSDE(), 2), **{"a": 1.0, "b": 0.0, **change})


def test_a_solver_undefined_at_the_start_says_where():
    with pytest.raises(ValueError, match=r"row 0 .*t = 1"):
        Tableau(Grid.uniform(FlowSDE(), 2), a=torch.tensor([math.inf, 1.0]), b=0.0)


def test_iterate_refuses_before_any_evaluation():
    table, calls = DDPM().tableau(Grid.uniform(VPSDE(), 2)), []
    net = EpsDenoiser(lambda x, t: calls.append(t), VPSDE(beta_max=10.0))
    with pytest.raises(ValueError, match="the grid was made for"):
        table.iterate(net, normal(2, 3), lambda row, x: x)
    with pytest.raises(ValueError, match="draws noise"):
        table.iterate(EpsDenoiser(lambda x, t: calls.append(t), VPSDE()), normal(2, 3))
    eps_at_alpha_zero = EpsDenoiser(lambda x, t: calls.append(t), FlowSDE())
    with pytest.raises(ValueError, match="says nothing of x0 at t = 1"):
        next(DDIM().tableau(Grid.uniform(FlowSDE(), 2)).iterate(eps_at_alpha_zero, normal(2, 3)))
    assert not calls


@pytest.mark.parametrize(
    "make",
    [
        lambda: DDIM(eta=-0.1),
        lambda: DDIM(eta=math.nan),
        lambda: DDPM(variance="large"),
        lambda: Heun(variable="lambda"),
        lambda: DDIM(eta=5.0).tableau(Grid.uniform(VPSDE(), 3)),
    ],
)
def test_bad_options_are_refused(make):
    with pytest.raises(ValueError, match=r"eta|variance|variable"):
        make()


def test_solvers_are_values():
    assert DDIM(eta=0.5) == DDIM(eta=0.5) != DDIM()
    assert repr(DDIM(eta=0.5)) == "DDIM(eta=0.5)"


@pytest.mark.parametrize(
    "sde", [VPSDE(beta_max=b) for b in (100, 400, 2000, 5000)] + [SubVPSDE(beta_max=400)], ids=repr
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", [DDIM(), DDPM(), UniPC(3)], ids=repr)
def test_a_start_that_is_all_noise_gives_the_data_or_one_sentence(sde, dtype, solver):
    """At alpha = 1e-11 and below 1 / alpha has no digit left, or overflows: never a result without a right digit."""
    exact = Gaussian(mean=torch.full((2,), 0.5, dtype=torch.float64), std=0.7).denoiser(sde)
    for kind in (EpsDenoiser, X0Denoiser):
        model = kind(lambda x, t, kind=kind: exact.view(kind.predicts, x.double(), t).to(x), sde)
        try:
            x = sample(model, normal(2000, 2, dtype=dtype), solver, steps=20, seed=0).x
        except ValueError as error:
            assert "no digit of its result is left" in str(error) or "says nothing of x0" in str(error)  # noqa: PT017
            continue
        assert abs(float(x.mean()) - 0.5) < 0.1  # of 4,000 numbers: six standard errors
        assert 0.5 < float(x.std()) < 0.8
