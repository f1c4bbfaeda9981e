"""The last step, onto sigma = 0, taken by the polynomial; and default grids between a chain's nodes."""

import math
from dataclasses import replace

import pytest
import torch
from common import normal

from scoresde import EDMSDE, VESDE, VPSDE, DDPMChain, Denoiser, EpsDenoiser, FlowSDE, Grid, Posterior, SubVPSDE, sample
from scoresde.exact import Gaussian, GaussianMixture
from scoresde.solvers import DDIM, DEIS, ERSDE, Adams, DPMSolverPP, ExponentialAB, Heun, UniPC

SDES = {"vp": VPSDE(), "subvp": SubVPSDE(), "ve": VESDE(), "edm": EDMSDE(), "flow": FlowSDE(), "chain": DDPMChain()}
SPECTRUM = Gaussian(torch.zeros(32), std=torch.logspace(-1.5, 0, 32, dtype=torch.float64))


class Known(Denoiser):
    """A denoiser whose view is a given function of sigma / alpha, whatever x is."""

    def __init__(self, sde, view, function):
        self.sde, self.view, self.function = sde, view, function

    def posterior(self, x, t, **cond):
        alpha, sigma = float(self.sde.alpha(t)), float(self.sde.sigma(t))
        F = self.function(sigma / alpha)
        if self.view == "x0":
            return Posterior(torch.full_like(x, F))
        if self.view == "eps":
            return Posterior((x - sigma * F) / alpha)
        # D alpha + sigma eps = x and eps - D = F
        return Posterior((x - sigma * F) / (alpha + sigma))


EXACT = [
    ("x0", "sigma", lambda u: 2 - u + 3 * u**2, lambda u: 2.0),
    ("eps", "sigma", lambda u: 1 + 2 * u - 3 * u**2, lambda u: -(u + u**2 - u**3)),
    ("flow", "flow", lambda u: 1 + 4 * (u / (1 + u)) - 3 * (u / (1 + u)) ** 2, None),
]


@pytest.mark.parametrize("sde", ["vp", "subvp", "ve", "edm", "chain"])
@pytest.mark.parametrize(
    ("view", "variable", "function", "change"), EXACT, ids=lambda part: part if isinstance(part, str) else ""
)
def test_the_landing_is_exact_on_polynomials(view, variable, function, change, sde):
    """Three values hold a parabola: the last step is its integral, or its end, to rounding; D itself is not."""
    sde = SDES[sde]
    times = sde.time_at(-torch.tensor([0.9, 0.5, 0.3, 0.2], dtype=torch.float64).log())
    grid = Grid(sde, [*times.tolist(), 0.0])
    denoiser, x = Known(sde, view, function), normal(2, 3).double()
    solver = ExponentialAB(3, view, variable, landing="polynomial")
    near = sample(denoiser, x, solver, grid=grid, trajectory=True).trajectory[-2:]
    alpha = float(sde.alpha(times[-1]))
    u = float(sde.sigma(times[-1])) / alpha
    if view == "x0":
        expected = torch.full_like(x, change(u))
    elif view == "eps":
        expected = near[0] / alpha + change(u)
    else:  # y = x / (alpha + sigma), dy = F d psi
        psi = u / (1 + u)
        expected = near[0] / (alpha * (1 + u)) - (psi + 2 * psi**2 - psi**3)
    torch.testing.assert_close(near[1], expected, rtol=0, atol=1e-10)
    plain = sample(denoiser, x, replace(solver, landing="denoise"), grid=grid).x
    assert float((plain - expected).abs().max()) > 1e-3


LANDINGS = {
    "adams": Adams(4),
    "unipc-3 flow": UniPC(3, "flow", variable="softplus"),
    "unipc-4 v": UniPC(4, "v"),
    "unipc-3 eps": UniPC(3, "eps"),
    "unipc-3": UniPC(3),
    "ab-3 eps sigma": ExponentialAB(3, "eps", "sigma"),
}


def gaussian_error(solver, sde, n, end=0.0):
    x = sde.prior((16, 32), torch.Generator().manual_seed(0), torch.float64)
    run = {"steps": n} if end == 0 else {"grid": solver.grid(sde.unrounded, n, end=end)}
    found = sample(SPECTRUM.denoiser(sde), x, solver, **run).x
    return float((found - SPECTRUM.flow(x, sde, sde.t_max, end)).square().mean().sqrt())


@pytest.mark.parametrize("name", LANDINGS)
def test_order_with_the_landing(name):
    """On grids whose last noisy time comes nearer as they refine, u ~ N^-2, D itself leaves an error ~ u^2 / std where
    the polynomial leaves that of its order: from 40 steps to 80 D gains less than 2^4.3, the polynomial as much as
    before the landing, 2^2 at least, and is the better by 2 at 80 steps at least (measured: 2.4 in x0 to 600).
    """
    sde, solver = VPSDE(), LANDINGS[name]
    grids = [Grid.power(sde, n, power=2.0, last=10 / n**2) for n in (40, 80)]
    x = sde.prior((16, 32), torch.Generator().manual_seed(0), torch.float64)
    exact = SPECTRUM.flow(x, sde, sde.t_max, 0.0)

    def errors(landing):
        runs = (sample(SPECTRUM.denoiser(sde), x, replace(solver, landing=landing), grid=grid).x for grid in grids)
        return [float((run - exact).square().mean().sqrt()) for run in runs]

    plain, landed = errors("denoise"), errors("polynomial")
    assert math.log2(landed[0] / landed[1]) > 2
    assert landed[1] < plain[1] / 2


@pytest.mark.parametrize("sde", SDES)
def test_a_landing_leaves_other_steps_as_they_are(sde):
    for solver in LANDINGS.values():
        tables = [replace(solver, landing=way).tableau(solver.grid(SDES[sde], 7)) for way in ("denoise", "polynomial")]
        for column in ("a", "b", "c"):
            ours, theirs = (getattr(table, column)[:-1] for table in tables)
            K = min(ours.shape[-1], theirs.shape[-1])
            torch.testing.assert_close(ours[..., :K], theirs[..., :K], rtol=0, atol=0)


def test_with_noise_only_x0_lands_by_the_polynomial():
    grid = Grid.sampling(VPSDE(), 6)
    for view in ("eps", "v", "flow"):
        solver = ExponentialAB(3, view, tau=0.3)
        assert repr(replace(solver, landing="polynomial").tableau(grid)) == repr(solver.tableau(grid))
    row = DPMSolverPP(2, stochastic=True, landing="polynomial").tableau(grid).b[-1]
    assert float(row.sum()) == pytest.approx(1)
    assert int((row != 0).sum()) == 2


def test_detail_below_the_last_level_is_lost_by_both():
    """std 0.003 where the last sigma / alpha is 0.1: neither landing has it, and their errors are its size."""
    sde, target = VPSDE(), Gaussian(torch.zeros(4), std=0.003)
    times = [1.0, 0.8, 0.6, 0.4, 0.2, 0.1, float(sde.time_at(math.log(10)))]
    x = sde.prior((64, 4), torch.Generator().manual_seed(0), torch.float64)
    exact = target.flow(x, sde, 1.0, 0.0)
    for landing in ("denoise", "polynomial"):
        found = sample(target.denoiser(sde), x, Adams(landing=landing), grid=Grid(sde, [*times, 0.0])).x
        assert 0.3 < float((found - exact).square().mean().sqrt()) / 0.003 < 3


# Adams


def test_adams_is_stable_on_few_steps_in_many_dimensions():
    """Modes far apart in 500 dimensions are decided while x is noise: orders 3 and 4 in the line's own variable or the
    angle overshoot there, by 2 to 100 times the error of 2M; in softplus they do not.
    """
    generator = torch.Generator().manual_seed(3)
    means = 0.5 * torch.randn(16, 500, generator=generator, dtype=torch.float64)
    sde, target = VPSDE(), GaussianMixture(means, std=0.1)
    denoiser, x = target.denoiser(sde), sde.prior((8, 500), torch.Generator().manual_seed(0), torch.float64)
    exact = sample(denoiser, x, DPMSolverPP(3), grid=Grid.log_snr(sde, 600)).x

    def error(solver, n):
        return float((sample(denoiser, x, solver, steps=n).x - exact).square().mean().sqrt())

    for n in (5, 8, 10, 15, 20, 25):
        assert error(Adams(), n) < 1.2 * error(DPMSolverPP(2), n), n
    assert error(UniPC(4, "v"), 10) > 3 * error(Adams(4), 10)


@pytest.mark.parametrize(("steps", "order", "view"), [(5, 2, "x0"), (9, 2, "flow"), (12, 3, "flow"), (30, 4, "flow")])
def test_adams_is_unipc_of_a_rising_order(steps, order, view):
    grid = Adams().grid(VPSDE(), steps)
    theirs = UniPC(order, view, "exact", variable="softplus", landing="polynomial").tableau(grid)
    assert repr(Adams().tableau(grid)) == repr(theirs)


# Chains


@pytest.mark.parametrize("solver", [Adams(), UniPC(3), UniPC(4, "v"), DEIS(3), DPMSolverPP(2)], ids=repr)
def test_default_grids_converge_on_chains(solver):
    """To the first node the error falls from 50 steps to 200 at least half as far (in its logarithm) as on the VP SDE;
    rounded to nodes it stalled: UniPC(3) at 3.6e-5.
    """
    gains = []
    for sde, end in ((DDPMChain(), 1.0), (VPSDE(), 1e-3)):
        coarse, fine = (gaussian_error(solver, sde, n, end) for n in (50, 200))
        gains.append(math.log(coarse / fine))
    assert gains[0] > 0.5 * gains[1] > 0


def test_adams_does_not_stall_at_the_first_node():
    """The chain's first node has sigma = 0.01: a landing by D is wrong by 6e-4 on any grid."""
    assert gaussian_error(Adams(), DDPMChain(), 100) < 3e-5
    assert gaussian_error(Adams(landing="denoise"), DDPMChain(), 100) > 3e-4


def test_times_between_nodes_are_for_labels_that_know_them():
    chain, x = DDPMChain(), torch.zeros(1, 2)

    def grid(label, solver):
        denoiser = EpsDenoiser(lambda x, t: 0 * x, chain, time=label)
        return sample(denoiser, x, solver, steps=10, seed=0).grid.times

    def whole(times):
        return torch.equal(times, times.round())

    continuous, rounded = chain.label, lambda t: t.round().long() - 1
    for solver in (Adams(), UniPC(), ERSDE()):
        assert not whole(grid(continuous, solver))
        assert whole(grid(rounded, solver))
    for solver in (DDIM(), DDIM(eta=1.0), Heun()):
        assert whole(grid(continuous, solver))
        assert whole(grid(rounded, solver))


def test_a_process_without_its_nodes_is_the_same():
    chain = DDPMChain()
    assert chain.unrounded == chain
    assert chain.unrounded.nodes is None
    assert chain.nodes is not None
    assert VPSDE().unrounded == VPSDE()
    Grid.power(chain.unrounded, 20).check_sde(chain)
