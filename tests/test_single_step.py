"""Runge-Kutta and exponential single steps, churn, Restart, time travel and annealed Langevin dynamics."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from common import SDES, Nonlinear, end_of, normal, start_of
from scipy import stats

from scoresde import (
    EDMSDE,
    SDE,
    VESDE,
    VPSDE,
    CosineVPSDE,
    DDPMChain,
    Denoiser,
    FlowSDE,
    Grid,
    Posterior,
    X0Denoiser,
    sample,
)
from scoresde.exact import Gaussian, GaussianMixture
from scoresde.solvers import DDIM, DDPM, Euler, EulerMaruyama, ExponentialSDE, Heun, RungeKutta
from scoresde.solvers.annealed import AnnealedLangevin, langevin_rows, levels_for, step_for
from scoresde.solvers.composite import EDMStochastic, Restart, TimeTravel
from scoresde.solvers.runge_kutta import METHODS, VARIABLES
from scoresde.solvers.single_step import DPMSolver, ExponentialHeun
from scoresde.textbook import textbook_of
from scoresde.textbook.first_order import heun_edm
from scoresde.textbook.stages import annealed_langevin, dpm_solver, dpm_solver_pp_single, repaint, restart

INTERVALS = [(3, 2, 0.06, 0.30), (2, 3, 1.0, 4.0)]
SINGLE = {
    **{f"{m} {v}": RungeKutta(m, v) for m in METHODS if m != "euler" for v in VARIABLES},
    **{f"dpm {p} {view}": DPMSolver(p, view) for p in (1, 2, 3) for view in ("eps", "x0")},
    **{f"exponential heun {view}": ExponentialHeun(view) for view in ("x0", "eps")},
}
COMPOSITE = {
    "euler-maruyama sigma": EulerMaruyama("sigma"),
    "churn": EDMStochastic(S_churn=3.0, S_min=0.05, S_max=50.0, S_noise=1.003),
    "restart": Restart(INTERVALS),
    "restart dpm": Restart(INTERVALS, DPMSolver(2)),
    "time travel": TimeTravel(jump=2, repeats=3),
    "time travel 1": TimeTravel(jump=1, repeats=2),
    "annealed": AnnealedLangevin(steps_per_level=3, step=0.2),
}
EVERY = SINGLE | COMPOSITE
ORDERS = {
    **{f"{m} {v}": {"kutta3": 3, "rk4": 4}.get(m, 2) for m in METHODS if m != "euler" for v in VARIABLES},
    **{f"dpm {p} {view}": p for p in (1, 2, 3) for view in ("eps", "x0")},
    **{f"exponential heun {view}": 2 for view in ("x0", "eps")},
}


class Draws:
    """The same sequence of noise for the textbook and, as noise(row, x), for a table."""

    def __init__(self, *shape: int) -> None:
        self.shape, self.count = shape, 0

    def __call__(self, *_: object) -> torch.Tensor:
        self.count += 1
        return normal(*self.shape, seed=self.count)


def run(denoiser, x, solver, grid):
    return sample(denoiser, x, solver, grid=grid, noise=Draws(*x.shape)).x


def textbook(name, denoiser, x, times):
    draw = Draws(*x.shape)
    first, _, rest = name.partition(" ")
    if first == "restart":
        inner = heun_edm if rest == "" else partial(dpm_solver, order=2)
        return restart(denoiser, x, times, draw, inner, INTERVALS)
    if first == "time":
        jump, repeats = (2, 3) if rest == "travel" else (1, 2)
        return repaint(denoiser, x, times, draw, jump, repeats)
    denoise = bool(times[-1] == 0)
    levels = times[:-1] if denoise else times
    u_L = float((denoiser.sde.sigma(levels) / denoiser.sde.alpha(levels)).min())
    return annealed_langevin(denoiser, x, levels, draw, 3, 4 * 0.2**2 * u_L**2, 1, denoise)


def grid_for(name, sde, end):
    if name.startswith("restart"):  # nearest times that both understand: every interval has one below it
        last = None if end == 0 else end
        return Grid.log_snr(sde, 7, start=start_of(sde), end=end, last=last if end == 0 else None)
    return Grid.uniform(sde, 6, start=start_of(sde), end=end)


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
@pytest.mark.parametrize("name", [name for name in COMPOSITE if textbook_of(COMPOSITE[name]) is None])
def test_tableau_equals_textbook(name, sde):
    """Those with options that the textbook takes otherwise; the others are in test_textbook."""
    denoiser = Nonlinear(sde)
    for end, shape in ((0.0, (3, 5)), (end_of(sde), (2, 3, 4, 4))):
        grid = grid_for(name, sde, end)
        x = normal(*shape) * float(sde.sigma(grid.times[0]))
        expected = textbook(name, denoiser, x, grid.times)
        scale = max(1.0, float(expected.abs().max()))
        # Large uniform steps of RK in u amplify by 1 / alpha before they contract: rounding is relative to that.
        torch.testing.assert_close(run(denoiser, x, EVERY[name], grid), expected, rtol=1e-9, atol=1e-9 * scale)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("end", [0.0, 0.1])
def test_annealed_langevin_by_the_papers_rules(version, end):
    """eps as published, on VE levels in geometric sequence."""
    sde = VESDE(sigma_max=1.0)
    grid = Grid.uniform(sde, 9, end=end)
    levels = grid.times[:-1] if end == 0 else grid.times
    eps = {1: 2e-5, 2: 6.2e-6}[version]
    x, denoiser = normal(2, 3), Nonlinear(sde)
    expected = annealed_langevin(denoiser, x, levels, Draws(2, 3), 4, eps, version, end == 0)
    solver = AnnealedLangevin(4, eps, "ncsn" if version == 1 else "ncsnv2")
    torch.testing.assert_close(run(denoiser, x, solver, grid), expected, rtol=1e-10, atol=1e-10)


def test_step_rules_agree():
    """methods: alpha = 2 tau = 4 r^2 sigma^2; NCSNv2's CIFAR-10 setting is r = 0.176."""
    grid = Grid.log_snr(VESDE(), 8)
    level = float(VESDE().sigma(grid.times[-2]))
    tables = [
        AnnealedLangevin(2, 0.176).tableau(grid),
        AnnealedLangevin(2, 4 * (0.176 * level) ** 2, "ncsn").tableau(grid),
        AnnealedLangevin(2, 2 * (0.176 * level) ** 2, "ncsnv2").tableau(grid),
    ]
    for table in tables[1:]:
        torch.testing.assert_close(table.b, tables[0].b)
        torch.testing.assert_close(table.c, tables[0].c)
    assert pytest.approx(6.2e-6, rel=0.01) == 2 * (0.176 * 0.01) ** 2


# Invariants and counts.


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
@pytest.mark.parametrize("name", [name for name in EVERY if not name.endswith((" t", " angle"))])
def test_i1_data_passes_unchanged(name, sde):
    """(I1): if D is x_0 whatever x, noiseless data alpha_t x_0 is carried to alpha_s x_0, row by row.

    Not in t, where the linear part is discretised, nor in the angle, where x turns: alpha = r cos(angle).
    """
    start = start_of(sde)
    for end in (0.0, end_of(sde)):
        for grid in (Grid.uniform(sde, 5, start=start, end=end), Grid.log_snr(sde, 8, start=start, end=end)):
            table = EVERY[name].tableau(grid)
            constant = X0Denoiser(lambda x, t: torch.full_like(x, 2.0), sde)
            x = torch.full((1, 1), 2.0, dtype=torch.float64) * sde.alpha(grid.times[0])
            states = list(table.iterate(constant, x, noise=lambda row, x: torch.zeros_like(x)))
            after = sde.alpha(torch.cat([table.t[1:], grid.times[-1:]]))
            torch.testing.assert_close(torch.stack([s.x for s in states]).flatten(), 2.0 * after, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
def test_evaluations(sde):
    for N in (2, 5, 18):
        to_data, to_noise = (
            Grid.log_snr(sde, N, start=start_of(sde)),
            Grid.log_snr(sde, N, start=start_of(sde), end=0.01),
        )
        for order in (1, 2, 3):
            for view in ("eps", "x0"):
                assert DPMSolver(order, view).evaluations(to_data) == order * (N - 1) + 1
                assert DPMSolver(order, view).evaluations(to_noise) == order * N
        assert ExponentialHeun().evaluations(to_data) == 2 * N - 1
        for method, S in {"heun": 2, "midpoint": 2, "ralston": 2, "kutta3": 3, "rk4": 4}.items():
            for variable in VARIABLES:
                assert RungeKutta(method, variable).evaluations(to_data) == S * (N - 1) + 1
        assert EDMStochastic().evaluations(to_data) == 2 * N - 1
        assert AnnealedLangevin(7).evaluations(to_data) == 7 * N + 1
        assert AnnealedLangevin(7).evaluations(to_noise) == 7 * (N + 1)
    assert TimeTravel(jump=4, repeats=3).evaluations(Grid.uniform(sde, 10)) == 3 * 8 + 2
    assert TimeTravel(jump=5, repeats=3).evaluations(Grid.uniform(sde, 10)) == 3 * 5 + 5


def test_restart_makes_the_papers_evaluations():
    """Xu et al.: 18 steps with {[3, 2, 0.06, 0.30]} are 43; n counts points, so an interval costs 2 K (n - 1)."""
    grid = Grid.karras(EDMSDE(), 18)
    assert Restart([(3, 2, 0.06, 0.30)]).evaluations(grid) == 43
    assert Restart([(3, 2, 0.06, 0.30), (4, 5, 1.0, 5.0)]).evaluations(grid) == 43 + 2 * 5 * 3
    assert Restart([(3, 2, 0.06, 0.30)], DDIM()).evaluations(grid) == 18 + 2 * 2
    assert Restart([(3, 1, 10.0, 80.0)]).evaluations(grid) == 35 + 4  # up to t_max itself
    table = Restart([(3, 2, 0.06, 0.30)]).tableau(grid)
    up = (~table.evaluates).nonzero().flatten()
    assert len(up) == 2
    near = float(table.t[up[0]])
    assert near == min(grid.times[:-1].tolist(), key=lambda t: abs(t - 0.06))
    torch.testing.assert_close(table.t[up + 1], torch.full((2,), 0.30, dtype=torch.float64))
    torch.testing.assert_close(table.c[up], torch.full((2,), math.sqrt(0.3**2 - near**2), dtype=torch.float64))


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_fast_fills_every_budget(order, sde):
    for nfe in range(1, 24):
        solver, grid = DPMSolver(order, fast=True).within(sde, nfe)
        assert solver.evaluations(grid) == nfe
        assert len(solver.orders) == grid.steps


def test_fast_mixes_orders_as_published():
    class ToNoise(DPMSolver):
        def grid(self, sde: SDE, steps: int) -> Grid:
            return Grid.log_snr(sde, steps, end=1e-3)

    def orders(nfe):
        solver, grid = ToNoise(fast=True).within(VPSDE(), nfe)
        assert solver.evaluations(grid) == nfe
        return solver.orders

    assert [orders(n) for n in range(1, 8)] == [(1,), (2,), (2, 1), (3, 1), (3, 2), (3, 2, 1), (3, 3, 1)]
    assert DPMSolver(fast=True).within(VPSDE(), 10)[0].orders == (3, 3, 2, 1, 1)
    chain = DDPMChain([0.1, 0.5, 0.02, 0.9])  # four nodes hold no more than ten evaluations
    solver, grid = DPMSolver(fast=True).within(chain, 99)
    assert solver.evaluations(grid) == 10


def test_mixed_orders_are_the_steps_one_after_the_other():
    sde = VPSDE()
    grid, denoiser, x = Grid.uniform(sde, 4, end=0.1), Nonlinear(sde), normal(2, 3)
    for view, algorithm in (("eps", dpm_solver), ("x0", dpm_solver_pp_single)):
        expected = x
        for i, order in enumerate((3, 1, 2, 3)):
            step = dpm_solver if order == 1 else algorithm
            expected = step(denoiser, expected, grid.times[i : i + 2], order)
        ours = run(denoiser, x, DPMSolver(view=view, orders=(3, 1, 2, 3)), grid)
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_limits():
    for sde in SDES.values():
        grid, denoiser, x = Grid.log_snr(sde, 8, start=start_of(sde)), Nonlinear(sde), normal(2, 3)
        heun = run(denoiser, x, Heun(), grid)
        assert torch.equal(run(denoiser, x, EDMStochastic(S_churn=0.0), grid), heun)
        assert torch.equal(run(denoiser, x, EDMStochastic(S_min=1e9), grid), heun)
        assert torch.equal(run(denoiser, x, Restart([]), grid), heun)
        assert torch.equal(run(denoiser, x, TimeTravel(Heun(), jump=3, repeats=1), grid), heun)
        for view in ("eps", "x0"):
            torch.testing.assert_close(run(denoiser, x, DPMSolver(1, view), grid), run(denoiser, x, DDIM(), grid))
        torch.testing.assert_close(
            run(denoiser, x, EDMStochastic(S_churn=3.0, solver=Euler()), grid),
            run(denoiser, x, EDMStochastic(S_churn=3.0, solver=DDIM()), grid),
        )


def test_restart_runs_every_interval_or_refuses():
    """A grid that no interval meets has a table, for the search of a budget, and no samples."""
    sde, solver = VPSDE(), Restart([(3, 2, 0.06, 0.30)])
    denoiser, x = Linear(sde, torch.ones(1, dtype=torch.float64)), normal(2, 1)
    coarse = Grid.uniform(sde, 3)
    assert solver.evaluations(coarse) == Heun().evaluations(coarse)
    with pytest.raises(ValueError, match=r"no noisy time below u_max=0\.3 .* take more steps"):
        solver.iterate(denoiser, x, coarse)
    assert sample(denoiser, x, solver, grid=Grid.power(sde, 6), seed=0).nfe == 11 + 8
    for steps in range(2, 12):  # its own grid is one that does
        assert solver.evaluations(solver.grid(sde, steps)) == 2 * steps - 1 + 8


def test_default_grids():
    for sde in SDES.values():
        for steps in (4, 9, 10, 30):
            paper = steps < 10 or isinstance(sde, EDMSDE)
            expected = Grid.customary(sde, steps) if paper else Grid.power(sde, steps, power=2.0)
            assert Heun().grid(sde, steps) == expected
            assert RungeKutta("heun", "flow").grid(sde, steps) == Grid.power(sde, steps, power=4.0)
    assert AnnealedLangevin().grid(VPSDE(), 8) == Grid.log_snr(VPSDE(), 8)
    assert AnnealedLangevin().grid(FlowSDE(), 8) == Grid.uniform(FlowSDE(), 8)  # alpha = 0 at its start


def test_euler_maruyama_in_sigma():
    """On EDM, where u = t and alpha = 1, the two variables are the same table; a start at alpha = 0 is exact."""
    grid = Grid.karras(EDMSDE(), 9)
    in_t, in_sigma = EulerMaruyama().tableau(grid), EulerMaruyama("sigma").tableau(grid)
    for column in "abc":
        torch.testing.assert_close(getattr(in_sigma, column), getattr(in_t, column), rtol=1e-12, atol=1e-12)
    first = EulerMaruyama("sigma").tableau(Grid.uniform(FlowSDE(), 4))
    assert (float(first.a[0]), float(first.b[0, 0]), float(first.c[0])) == (0.0, 0.25, 0.75)


def test_flow_needs_no_special_start():
    """Flow coordinates are finite at alpha = 0, so that all S stages are there; on `FlowSDE` they are those of t."""
    grid, denoiser, x = Grid.uniform(FlowSDE(), 5), Nonlinear(FlowSDE()), normal(2, 3)
    assert RungeKutta("rk4", "flow").evaluations(grid) == 4 * 4 + 1
    for method in METHODS:
        torch.testing.assert_close(
            run(denoiser, x, RungeKutta(method, "flow"), grid), run(denoiser, x, RungeKutta(method, "t"), grid)
        )


@pytest.mark.parametrize("sde", [CosineVPSDE(t_max=1.0), FlowSDE()], ids=["cosine-1", "flow"])
def test_ddim_goes_up_to_alpha_zero(sde):
    """A deterministic move up ends in noise alone: x_1 = sigma_1 eps."""
    t, s = torch.tensor([0.5], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)
    assert float(sde.alpha(s)) == 0
    for solver in (DDIM(), ExponentialSDE(0.0)):
        rows = solver.rows(sde, t, s)
        torch.testing.assert_close(rows.a, sde.sigma(s) / sde.sigma(t))
        torch.testing.assert_close(rows.b[:, 0], -sde.alpha(t) / sde.sigma(t) * sde.sigma(s))
        assert float(rows.c) == 0


def test_churn_stops_at_the_largest_time():
    """gamma is at most sqrt(2) - 1, and VP has no level above t_max, EDM has."""
    grid = Grid.uniform(VPSDE(), 5)
    table = EDMStochastic(S_churn=1e3).tableau(grid)
    assert float(table.t.max()) == 1.0
    assert bool(table.evaluates[0])
    assert [int((table.step == i).sum()) for i in range(5)] == [2, 3, 3, 3, 2]
    table = EDMStochastic(S_churn=1e3).tableau(Grid.karras(EDMSDE(), 5))
    assert float(table.t[1]) == pytest.approx(80 * math.sqrt(2))


@pytest.mark.parametrize("name", COMPOSITE)
def test_state_done_leaves_x_at_the_grid_times(name):
    """The last row of step i ends at grid.times[i + 1]: with D = x_0 exactly, x is alpha x_0 there."""
    sde = VPSDE()
    grid = Grid.log_snr(sde, 9)
    constant = X0Denoiser(lambda x, t: torch.full_like(x, 2.0), sde)
    x = torch.full((1, 1), 2.0, dtype=torch.float64) * sde.alpha(1.0)
    states = COMPOSITE[name].tableau(grid).iterate(constant, x, lambda row, x: torch.zeros_like(x))
    done = torch.stack([s.x for s in states if s.done]).flatten()
    torch.testing.assert_close(done, 2.0 * sde.alpha(grid.times[1:]), rtol=1e-9, atol=1e-9)


# Measured orders.


class Linear(Denoiser):
    """The exact denoiser of N(0, diag(std^2)), like Gaussian's, but quick."""

    def __init__(self, sde: SDE, std: torch.Tensor) -> None:
        self.sde, self.std = sde, std

    def posterior(self, x, t, **cond):
        alpha, var = float(self.sde.alpha(t)), self.std**2
        return Posterior(alpha * var / (alpha**2 * var + float(self.sde.sigma(t)) ** 2) * x)


@pytest.mark.parametrize("sde", ["vp", "edm", "flow", "cosine chain"])  # in half log-SNR they are all the same
@pytest.mark.parametrize("name", ORDERS)
def test_order_on_the_exact_flow(name, sde):
    """The error at the end against the closed-form flow of an anisotropic Gaussian falls as N^-order."""
    if sde.endswith("chain") and name.endswith(" t"):
        pytest.skip("between a chain's nodes beta(t) jumps, so a method in t has no order there")
    sde, std, x = SDES[sde], torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64), normal(4, 3)
    errors = []
    for steps in (32, 64):
        grid = Grid.log_snr(sde, steps, start=float(sde.time_at(-1.0)), end=float(sde.time_at(2.0)))
        exact = Gaussian(mean=[0.0] * 3, std=std).flow(x, sde, grid.times[0], grid.times[-1])
        errors.append(float((run(Linear(sde, std), x, EVERY[name], grid) - exact).square().mean().sqrt()))
    order = ORDERS[name]
    if name in ("midpoint sigma", "midpoint flow") or (name == "midpoint t" and isinstance(sde, EDMSDE | FlowSDE)):
        # y = sqrt(std^2 + u^2) makes a''/24 + a a'/4 + a^3/6, the midpoint rule's h^3 error on y' = a y, vanish; so it
        # does in t where x is linear in alpha and sigma, and these in t.
        order = 3
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.3), errors


def test_order_on_a_mixture():
    """A flow that is not linear in x, against RK4 in half log-SNR with 200 steps."""
    sde = VPSDE()
    denoiser = GaussianMixture(means=[[-1.0, 0.5], [1.0, 0.0]], weights=[0.3, 0.7], std=0.4).denoiser(sde)
    x = normal(8, 2)

    def end_at(solver, steps):
        grid = Grid.log_snr(sde, steps, start=float(sde.time_at(-1.0)), end=float(sde.time_at(1.5)))
        return run(denoiser, x, solver, grid)

    reference = end_at(RungeKutta("rk4", "half_log_snr"), 200)
    for name, order in ORDERS.items():
        errors = [float((end_at(EVERY[name], n) - reference).square().mean().sqrt()) for n in (16, 32)]
        assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.5), (name, errors)


# Exact laws on Gaussian data.


def output_law(solver, grid, std):
    """Standard deviation of the output for N(0, std^2) data and x_T ~ N(0, alpha^2 std^2 + sigma^2), with no sampling:
    the output is a sum of independent responses to x_T and to the noise of each row, run as one batch.
    """
    sde, table = grid.sde, solver.tableau(grid)
    impulses = torch.eye(1 + len(table), dtype=torch.float64)
    denoiser = Linear(sde, torch.tensor([std], dtype=torch.float64))
    *_, last = table.iterate(denoiser, impulses[:, :1].clone(), lambda row, x: impulses[:, row + 1 : row + 2])
    response = last.x[:, 0]
    start = sde.alpha(grid.times[0]) ** 2 * std**2 + sde.sigma(grid.times[0]) ** 2
    return math.sqrt(float(response[0] ** 2 * start + (response[1:] ** 2).sum()))


CONVERGENT = {
    "euler-maruyama sigma": (EulerMaruyama("sigma"), 1),
    "churn": (EDMStochastic(S_churn=20.0), 2),
    "churn euler": (EDMStochastic(S_churn=20.0, solver=Euler()), 1),
    "restart": (Restart(INTERVALS), 2),
    "time travel": (TimeTravel(jump=5, repeats=3), 1),
    "time travel heun": (TimeTravel(Heun(), jump=5, repeats=3), 2),
}


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
@pytest.mark.parametrize("name", CONVERGENT)
def test_marginals_are_exact_in_the_limit(name, sde):
    """The output's width tends to sqrt(alpha^2 std^2 + sigma^2) as the steps do, the restarts' own with them."""
    (solver, order), std, end = CONVERGENT[name], 0.7, end_of(sde)
    truth = math.sqrt(float(sde.alpha(end) ** 2 * std**2 + sde.sigma(end) ** 2))
    errors = []
    for steps in (50, 200):
        if name == "restart":
            solver = Restart([(steps, K, low, high) for _, K, low, high in INTERVALS])
        grid = Grid.log_snr(sde, steps, start=start_of(sde), end=end)
        errors.append(abs(output_law(solver, grid, std) / truth - 1))
    assert errors[1] < {1: 0.05, 2: 3e-3}[order]
    assert errors[1] < max({1: 0.35, 2: 0.12}[order] * errors[0], 1e-5)


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
def test_annealed_langevin_converges_to_the_last_marginal(sde):
    """On a Gaussian each Langevin step is linear, its fixed point v / (1 - r^2 sigma^2 / v) instead of the marginal's
    variance v: many steps reach it, and small ones come as near to v as one likes.
    """
    std, end = 0.05, end_of(sde)
    grid = Grid.log_snr(sde, 12, start=float(sde.time_at(-2.0)), end=end)
    alpha, sigma = float(sde.alpha(end)), float(sde.sigma(end))
    v = (alpha * std) ** 2 + sigma**2
    for r, steps in ((0.3, 200), (0.03, 20000)):
        table = AnnealedLangevin(steps, r).tableau(grid)
        alphas, sigmas = sde.alpha(table.t), sde.sigma(table.t)
        gain = table.p + table.q * alphas * std**2 / ((alphas * std) ** 2 + sigmas**2)
        variance = 25.0  # from no law in particular
        for factor, c in zip((table.a + table.b[:, 0] * gain).tolist(), table.c.tolist(), strict=True):
            variance = factor**2 * variance + c**2
        assert variance == pytest.approx(v / (1 - r**2 * sigma**2 / v), rel=1e-6)


@pytest.mark.parametrize(
    ("published", "ratio", "L", "T"), [(6.2, 5e3, 232, 5), (3.3, 9e3, 500, 5), (1.8, 19e3, 1086, 3)]
)
def test_steps_are_those_of_ncsnv2(published, ratio, L, T):
    """Of CIFAR-10, CelebA and LSUN (Song and Ermon, 2020, table 2), in units of 1e-6 sigma_L^2 / 0.01^2; and they leave
    the noise of one level nearest to that of the next: on a single point as data each step is linear.
    """
    gamma, sde = ratio ** (1 / (L - 1)), VESDE()
    r = step_for(gamma, T)
    assert 2 * r**2 * 100 == pytest.approx(published, abs=0.06)

    def left(r):
        grid = Grid(sde, [0.5, sde.time_at(sde.half_log_snr(0.5) + math.log(gamma))])
        table = AnnealedLangevin(T, r).tableau(grid)
        variance = float(sde.sigma(0.5)) ** 2
        for i in range(T, 2 * T):  # eps = x / sigma
            gain = table.p[i] + table.q[i] * 0
            variance = float((table.a[i] + table.b[i, 0] * gain) ** 2 * variance + table.c[i] ** 2)
        return abs(variance / float(sde.sigma(grid.times[1])) ** 2 - 1)

    assert left(r) < min(left(0.97 * r), left(1.03 * r))


@pytest.mark.parametrize("dimensions", [50, 3072])
def test_half_of_a_levels_noise_is_as_long_as_that_of_the_level_before(dimensions):
    """By the distribution of lengths itself, chi's, whose normal limit the rule takes."""
    L = levels_for(1000.0, dimensions)
    for levels, above in ((L, True), (L - 1, False)):
        gamma = 1000.0 ** (1 / (levels - 1))
        reach = gamma * (dimensions**0.5 + torch.tensor([-3.0, 3.0]).double() / 2**0.5)
        low, high = stats.chi(dimensions).cdf(reach.numpy())
        assert (high - low > 0.5 - 0.04) if above else (high - low < 0.5 + 0.04)
    assert levels_for(5000, 3072) == pytest.approx(232, rel=0.07)
    assert levels_for(1000.0, 2) == 2


def test_langevin_rows_make_songs_step_with_the_expected_norms():
    """tau = 2 (r |z| / |score|)^2 where |score| = |z| / sigma: 2 (r sigma)^2, one step at the time given."""
    sde, t = VPSDE(), torch.tensor([0.1, 0.4, 0.9], dtype=torch.float64)
    grid, denoiser, z = Grid(sde, [0.9, 0.1]), Nonlinear(sde), normal(2, 3, seed=1)
    for i, time in enumerate(t.tolist()):
        table = langevin_rows(sde, t, 0.16).take(torch.tensor([i])).numbered(torch.zeros(3).long()).tableau(grid)
        x = normal(2, 3)
        tau = 2 * (0.16 * sde.sigma(time)) ** 2
        *_, last = table.iterate(denoiser, x, lambda row, x: z)
        torch.testing.assert_close(last.x, x + tau * denoiser.score(x, time) + (2 * tau).sqrt() * z)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPMSolver(4), "order=4"),
        (lambda: levels_for(1.0, 64), "ratio=1.0"),
        (lambda: step_for(0.9, 5), "gamma=0.9"),
        (lambda: DPMSolver(view="v"), "view='v'"),
        (lambda: DPMSolver(orders=(3, 0)), "order=0"),
        (lambda: DPMSolver(2.0), "order=2.0"),
        (lambda: DPMSolver(True), "order=True"),
        (lambda: DPMSolver(orders=()), "orders=.*: expected the order of each step"),
        (lambda: DPMSolver(orders=(3, 1), fast=True), "give one of them"),
        (lambda: DPMSolver(orders=(3, 1)).within(VPSDE(), 4), "give steps= or grid=, not nfe="),
        (lambda: DPMSolver(orders=(3, 1)).tableau(Grid.uniform(VPSDE(), 3)), "grid of 3 steps"),
        (lambda: DPMSolver(fast=True).within(VPSDE(), 0), "nfe=0"),
        (lambda: ExponentialHeun("score"), "view='score'"),
        (lambda: EDMStochastic(S_churn=-1.0), "S_churn=-1"),
        (lambda: EDMStochastic(S_min=2.0, S_max=1.0), "S_min <= S_max"),
        (lambda: EDMStochastic(S_noise=math.nan), "S_noise=nan"),
        (lambda: EDMStochastic(S_noise="1"), "S_noise='1'"),
        (lambda: DDIM("0"), "eta='0'"),
        (lambda: ExponentialSDE(-1.0), "tau=-1.0"),
        (lambda: DDPM("gamma"), "variance='gamma': expected one of 'posterior', 'beta'"),
        (lambda: EulerMaruyama("u"), "variable='u'"),
        (lambda: RungeKutta("rk5"), "method='rk5'"),
        (lambda: RungeKutta("rk4", "u"), "variable='u'"),
        (lambda: EDMStochastic(solver="heun"), "solver='heun'"),
        (lambda: Restart([(3, 2, 0.06)]), "expected .n, K, u_min, u_max"),
        (lambda: Restart((3, 2, 0.06, 0.3)), "expected a list of .n, K, u_min, u_max"),
        (lambda: Restart([(1, 2, 0.06, 0.3)]), "n >= 2"),
        (lambda: Restart([(3, 0, 0.06, 0.3)]), "K=0"),
        (lambda: Restart([(3, 2, 0.3, 0.06)]), "u_min < u_max"),
        (lambda: Restart([], rho=0.0), "rho=0"),
        (lambda: Restart([(3, 2, 1.0, 1e3)]).tableau(Grid.uniform(VPSDE(), 3)), "at its t_max"),
        (lambda: TimeTravel(jump=0), "jump=0"),
        (lambda: TimeTravel(repeats=0.5), "repeats=0.5"),
        (lambda: AnnealedLangevin(0), "steps_per_level=0"),
        (lambda: AnnealedLangevin(5, -0.1), "step=-0.1"),
        (lambda: AnnealedLangevin(5, 0.1, "song"), "step_rule='song'"),
        (lambda: AnnealedLangevin(5, 1.5).tableau(Grid.uniform(VPSDE(), 3)), "expected r < 1"),
    ],
    ids=[str(i) for i in range(37)],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
