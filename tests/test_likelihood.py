"""log p(x) by the ODE: the exact densities, its errors as stated, its gradients, and that nothing else moves it.

A model's density is that of its prior carried through the ODE. So that a prior which is not quite p_T costs no digits,
tests with an exact denoiser put the true log p_T(x_T) in the prior's place (`carried`): what is left is the ODE alone.
"""

from __future__ import annotations

import math

import pytest
import torch
from common import SDES, SOLVERS, STOCHASTIC, Counting, generator, network_for, normal

from scoresde import (
    EDMSDE,
    VPSDE,
    Denoiser,
    EDMDenoiser,
    EpsDenoiser,
    FlowSDE,
    Grid,
    Posterior,
    ScoreDenoiser,
    VDenoiser,
    VelocityDenoiser,
    X0Denoiser,
)
from scoresde.errors import NonFiniteError
from scoresde.exact import Gaussian, GaussianMixture
from scoresde.likelihood import log_prob
from scoresde.noise import sample_seeds
from scoresde.solvers import ExponentialAB, Heun, RungeKutta, UniPC, available
from scoresde.tensors import expand_like
from scoresde.wrappers import Clip

VP, EDM = VPSDE(), EDMSDE()


def rotated(variances, seed):
    """A covariance with these eigenvalues, in a basis drawn from the seed."""
    Q, _ = torch.linalg.qr(normal(len(variances), len(variances), seed=seed))
    return Q @ torch.diag(torch.as_tensor(variances, dtype=torch.float64)) @ Q.T


def spread_out(n, ratio):
    """n variances from 1 / ratio to ratio."""
    return torch.linspace(-math.log(ratio), math.log(ratio), n, dtype=torch.float64).exp()


GAUSSIAN = Gaussian([0.7, -0.4], cov=rotated([0.25, 2.0], 5))
IMAGE = Gaussian(normal(2, 3, 2, seed=3), cov=rotated(spread_out(12, 3.0), 2))
MIXTURE = GaussianMixture([[1.0, 0.0], [-1.0, 0.5], [0.2, -1.0]], weights=[1, 2, 3], std=0.4)
IMAGES = GaussianMixture(normal(3, 2, 3, 2, seed=7), std=0.6)
WIDE = Gaussian(normal(24, seed=3), cov=rotated(spread_out(24, 2.0), 2))
MIXTURES = {"mixture": MIXTURE, "image mixture": IMAGES}

WAYS = {"steps": {"steps": 80}, "adaptive": {"rtol": 1e-6, "atol": 1e-6}}
QUICK = {"steps": {"steps": 20}, "adaptive": {"rtol": 1e-4, "atol": 1e-4}}
ways = pytest.mark.parametrize("way", QUICK.values(), ids=QUICK)


def data(target, n=3, seed=1):
    return target.sample(n, generator(seed), torch.float64)


def noised(x, sde):
    """x as `log_prob` takes it: at t_min, with no noise added."""
    return x * float(sde.alpha(sde.t_min))


def carried(found, target, sde):
    """The density with the true p_T in the prior's place."""
    return found.value - found.prior + target.log_prob(found.latent, sde=sde, t=sde.t_max)


def far(a, b):
    return float((a - b).detach().abs().max())


class Linear(Denoiser):
    """The exact denoiser of independent Gaussians, quick."""

    def __init__(self, sde, mean=(0.7, -0.4), variance=(0.25, 2.0)):
        self.sde, self.mean, self.variance = sde, torch.tensor(mean).double(), torch.tensor(variance).double()
        self.target = Gaussian(self.mean, std=self.variance.sqrt())

    def posterior(self, x, t, **cond):
        alpha, sigma = float(self.sde.alpha(t)), float(self.sde.sigma(t))
        gain = alpha * self.variance / (alpha**2 * self.variance + sigma**2)
        return Posterior(self.mean + gain * (x - alpha * self.mean))


class MLP(torch.nn.Module):
    """A smooth network of few parameters, conditional if asked to be."""

    def __init__(self, dim=2, hidden=8, dtype=torch.float64):
        super().__init__()
        weights = [normal(hidden, dim, seed=1), normal(dim, hidden, seed=2), normal(hidden, seed=3)]
        self.inward, self.outward, self.of_time = (torch.nn.Parameter((w / 2).to(dtype)) for w in weights)
        self.calls = 0

    def forward(self, x, t, y=None):
        self.calls += 1
        flat = x.reshape(len(x), -1)
        h = flat @ self.inward.T + t[:, None].to(x.dtype) * self.of_time
        if y is not None:
            h = h + y.reshape(-1, 1).to(x.dtype)
        return (torch.tanh(h) @ self.outward.T).reshape(x.shape)


class TestExactDensities:
    @pytest.mark.parametrize("target", MIXTURES.values(), ids=MIXTURES)
    @pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
    def test_on_every_sde_and_shape(self, sde, target):
        x = data(target)
        truth = target.log_prob(noised(x, sde), sde=sde, t=sde.t_min)
        residual = x[0].numel() * math.log(float(sde.alpha(sde.t_min)))
        # A chain's nodes are few where the cosine one nears its end, alpha = 0.
        for way, tolerance in (("steps", 5e-4 if sde.nodes is not None else 2e-4), ("adaptive", 2e-5)):
            found = log_prob(target.denoiser(sde), x, divergence="exact", **WAYS[way])
            assert far(carried(found, target, sde), truth + residual) < tolerance
            assert far(found.value, found.prior + found.log_det + found.residual) < 1e-12
            torch.testing.assert_close(found.prior, sde.prior_log_prob(found.latent))
            assert far(found.residual, torch.full((3,), residual, dtype=torch.float64)) < 1e-12
            assert found.stderr.tolist() == [0.0] * 3
            assert found.dof.tolist() == [math.inf] * 3
            assert all(torch.equal(end, found.value) for end in found.interval(0.5))
            assert (found.status, found.t) == ("complete", sde.t_max)

    @pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
    def test_a_gaussian_s_terms_are_those_of_its_flow(self, sde):
        x = data(IMAGE)
        latent = IMAGE.flow(noised(x, sde), sde, sde.t_min, sde.t_max)
        variances = spread_out(12, 3.0)
        low, high = (sde.alpha(t) ** 2 * variances + sde.sigma(t) ** 2 for t in (sde.t_min, sde.t_max))
        log_det = float((high / low).log().sum() / 2)
        for way in WAYS.values():
            found = log_prob(IMAGE.denoiser(sde), x, divergence="exact", **way)
            torch.testing.assert_close(found.latent / sde.prior_std, latent / sde.prior_std, rtol=2e-5, atol=1e-5)
            assert far(found.log_det, torch.full((3,), log_det, dtype=torch.float64)) < 1e-5
            assert far(found.prior, sde.prior_log_prob(latent)) < 1e-4

    @pytest.mark.parametrize(
        ("sde", "tolerance"), [(FlowSDE(), 1e-4), (SDES["cosine chain"], 2e-3)], ids=["flow", "cosine chain"]
    )
    def test_the_value_is_the_data_s_density_where_the_prior_fits(self, sde, tolerance):
        x = data(MIXTURE, 8)
        found = log_prob(MIXTURE.denoiser(sde), x, divergence="exact", steps=60)
        assert far(found.value, MIXTURE.log_prob(x)) < tolerance

    @pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
    def test_at_other_times(self, sde):
        for half_log_snr in (1.5, -1.5):
            t = float(sde.time_at(half_log_snr))
            t = float(round(t)) if sde.t_max > 100 else t
            x = GAUSSIAN.flow(noised(data(GAUSSIAN), sde), sde, sde.t_min, t)
            for way in ({"steps": 40}, WAYS["adaptive"]):
                found = log_prob(GAUSSIAN.denoiser(sde), x, divergence="exact", t=t, **way)
                assert far(carried(found, GAUSSIAN, sde), GAUSSIAN.log_prob(x, sde=sde, t=t)) < 1e-4
                assert found.residual.tolist() == [0.0] * 3

    @pytest.mark.parametrize("t", [38.4, 914.0])
    def test_between_a_chain_s_nodes_or_with_too_few_it_is_right_or_refused(self, t):
        """38.4 is no node, and above 914 there are fewer than 100: x must not be taken to stand elsewhere."""
        sde = SDES["cosine chain"]
        x = GAUSSIAN.flow(noised(data(GAUSSIAN), sde), sde, sde.t_min, t)
        truth = GAUSSIAN.log_prob(x, sde=sde, t=t)
        found = log_prob(GAUSSIAN.denoiser(sde), x, divergence="exact", t=t, rtol=1e-6, atol=1e-6)
        assert far(carried(found, GAUSSIAN, sde), truth) < 1e-4
        try:
            found = log_prob(GAUSSIAN.denoiser(sde), x, divergence="exact", t=t, steps=100)
        except ValueError:
            return
        assert far(carried(found, GAUSSIAN, sde), truth) < 1e-5

    @pytest.mark.parametrize("method", ["dopri8", "bosh3"])
    def test_every_method(self, method):
        x = data(GAUSSIAN)
        found = log_prob(GAUSSIAN.denoiser(VP), x, divergence="exact", method=method, rtol=1e-5, atol=1e-5)
        truth = GAUSSIAN.log_prob(noised(x, VP), sde=VP, t=VP.t_min)
        assert far(carried(found, GAUSSIAN, VP) - found.residual, truth) < 1e-4

    def test_tolerances_of_1e_9_give_errors_of_1e_8(self):
        x, sde = data(MIXTURE), FlowSDE()
        found = log_prob(MIXTURE.denoiser(sde), x, divergence="exact", rtol=1e-9, atol=1e-9)
        assert far(found.value, MIXTURE.log_prob(x)) < 3e-8

    @pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
    def test_the_correction_reaches_the_data_to_second_order(self, way):
        x = data(MIXTURE, 6)
        errors = {False: [], True: []}
        for end in (0.2, 0.1, 0.05):
            sde = EDMSDE(t_min=end)
            for correct in (False, True):
                found = log_prob(MIXTURE.denoiser(sde), x, divergence="exact", correct=correct, **way)
                errors[correct].append(far(carried(found, MIXTURE, sde), MIXTURE.log_prob(x)))
                assert far(found.value, found.prior + found.log_det + found.residual) < 1e-12
        plain, corrected = errors[False], errors[True]
        # Halving sigma divides the errors by 4 and by 16.
        assert plain[0] / plain[2] > 2 ** (2 * 1.8)
        assert corrected[0] / corrected[2] > 2 ** (2 * 3.5)
        assert corrected[2] < plain[2] / 50


class TestOrder:
    def errors(self, solver, counts, t):
        x, denoiser = data(GAUSSIAN, 2), Linear(VP)
        at = VP.t_min if t is None else t
        truth = denoiser.target.log_prob(x if t else noised(x, VP), sde=VP, t=at)
        found = [log_prob(denoiser, x, divergence="exact", steps=n, solver=solver, t=t) for n in counts]
        return [far(carried(one, denoiser.target, VP) - one.residual, truth) for one in found]

    @pytest.mark.parametrize("solver", [None, UniPC(4, view="v")], ids=["default", "4"])
    def test_the_default_s_is_four_less_its_start_and_that_of_order_4_is(self, solver):
        """Order 3 and a corrector are four, with an error of order 3 from the first-order start."""
        order = 3.5 if solver is None else 4
        few, more, most = self.errors(solver, (15, 30, 60), None)
        assert few / more > 2**order
        assert more / most > 2**order
        assert few / most > 2 ** (2 * order)
        assert most < 5e-6

    def test_on_a_grid_of_modes_it_beats_order_4_in_the_tail(self):
        """Samples between modes, where the flow turns late and fast, have most of the error; on the mean over samples
        of |error| at 40 calls, the median of both being a thousandth of it.
        """
        axis = torch.linspace(-1, 1, 5, dtype=torch.float64)
        target = GaussianMixture(torch.cartesian_prod(axis, axis), std=0.05)
        x = target.sample(256, torch.Generator().manual_seed(1), torch.float64)
        fine = log_prob(target.denoiser(VP), x, divergence="exact", rtol=1e-7, atol=1e-7).value
        for steps, factor in ((32, 2), (40, 3), (60, 3)):
            new, old = (
                (log_prob(target.denoiser(VP), x, divergence="exact", steps=steps, solver=s).value - fine).abs()
                for s in (None, UniPC(4, view="v"))
            )
            assert float(new.quantile(0.95)) < float(old.quantile(0.95)) / factor
            assert float(new.max()) < float(old.max())

    @pytest.mark.parametrize(
        "entry",
        [e for e in available() if e.deterministic and e.solver.has_table],
        ids=lambda e: e.name,
    )
    def test_every_deterministic_solver_converges_to_it(self, entry):
        few, more = self.errors(entry.solver, (32, 64), float(VP.time_at(1.0)))
        # A multistep method's first step is of first order, its first corrector's of second: seen in half of them here.
        order = entry.order
        if entry.family == "multistep":
            order = min(order, 3 if isinstance(entry.solver, UniPC) and entry.solver.corrector else 2)
        assert math.log2(few / more) > order - 0.4

    @pytest.mark.parametrize("entry", [e for e in available() if not e.deterministic], ids=lambda e: e.name)
    def test_one_that_draws_noise_is_refused(self, entry):
        inner = Counting(Linear(VP))
        with pytest.raises((TypeError, ValueError), match=r"noise|table|deterministic"):
            log_prob(inner, data(GAUSSIAN), divergence="exact", steps=10, solver=entry.solver)
        assert inner.times == []

    def test_calls_are_those_of_the_table(self):
        for solver, expected in ((UniPC(3), 12), (Heun(), 24), (RungeKutta("rk4", "angle"), 48)):
            net = MLP()
            found = log_prob(VDenoiser(net, VP), normal(3, 2), steps=12, solver=solver, seed=0)
            assert found.nfe == net.calls == expected
        net = MLP()
        assert log_prob(VDenoiser(net, VP), normal(3, 2), steps=12).nfe == net.calls == 12
        net = MLP()
        assert log_prob(VDenoiser(net, VP), normal(3, 2), seed=0).nfe == net.calls


class Moved(Denoiser):
    """The denoiser of y = c R x + b, where x has another denoiser on the SDE whose noise is c times smaller."""

    def __init__(self, inner, sde, c, R, b):
        self.inner, self.sde, self.c, self.R, self.b = inner, sde, c, R, b

    def posterior(self, x, t, **cond):
        back = (x - float(self.sde.alpha(t)) * self.b) @ self.R / self.c
        return Posterior(self.c * self.inner.posterior(back, t / self.c).mean @ self.R.T + self.b)


class TestChangeOfVariables:
    @pytest.mark.parametrize("c", [1.0, 5.0])
    def test_an_affine_map_shifts_the_density_by_its_log_determinant(self, c):
        small, large = EDMSDE(), EDMSDE(t_min=0.002 * c, t_max=80.0 * c)
        R, b = torch.linalg.qr(normal(2, 2, seed=4))[0], torch.tensor([30.0, -20.0]).double()
        inner = MIXTURE.denoiser(small)
        outer = Moved(inner, large, c, R, b)
        x = data(MIXTURE)
        y = c * x @ R.T + b
        grid = Grid.karras(small, 40, last=0.002)
        grid = Grid(small, grid.times[:-1])
        moved = Grid(large, grid.times * c)
        # F = eps is the same at both scales, v is not; the volume is taken relative to unit Gaussian data.
        solver = UniPC(3, view="eps")
        for one, other, tolerance in (
            ({"grid": grid, "solver": solver}, {"grid": moved, "solver": solver}, 1e-9 if c == 1 else 1e-3),
            ({"rtol": 1e-5, "atol": 1e-5}, {"rtol": 1e-5, "atol": 1e-5}, 2e-4),
        ):
            of_x = log_prob(inner, x, divergence="exact", **one)
            of_y = log_prob(outer, y, divergence="exact", **other)
            torch.testing.assert_close(of_y.latent, c * of_x.latent @ R.T + b, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(of_y.log_det, of_x.log_det, rtol=tolerance, atol=tolerance)
            without = log_prob(Moved(inner, large, c, R, 0 * b), y - b, divergence="exact", **other)
            shift = 2 * math.log(c)
            torch.testing.assert_close(without.value, of_x.value - shift, rtol=tolerance, atol=tolerance)

    @ways
    def test_a_permutation_and_a_reshape_change_nothing(self, way):
        order = torch.randperm(12, generator=generator())
        mean, cov = IMAGE.moments()
        other = Gaussian(mean[order], cov=cov[order][:, order])
        x = data(IMAGE)
        one = log_prob(IMAGE.denoiser(VP), x, divergence="exact", **way)
        two = log_prob(other.denoiser(VP), x.reshape(3, 12)[:, order], divergence="exact", **way)
        torch.testing.assert_close(two.value, one.value, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(two.latent, one.latent.reshape(3, 12)[:, order], rtol=1e-8, atol=1e-8)


class TestItIsADensity:
    """Of a network that is no exact denoiser: nothing is known of it but that it integrates to one."""

    @ways
    def test_in_one_dimension(self, way):
        x = torch.linspace(-9, 9, 1201, dtype=torch.float64)[:, None]
        found = log_prob(VDenoiser(MLP(1), VP), x, divergence="exact", **way)
        assert abs(float(torch.trapezoid(found.value.exp(), x[:, 0])) - 1) < 1e-4
        assert float(found.value.exp()[[0, -1]].max()) < 1e-6

    def test_in_two_dimensions(self):
        axis = torch.linspace(-8, 8, 97, dtype=torch.float64)
        x = torch.cartesian_prod(axis, axis)
        density = log_prob(VDenoiser(MLP(2), VP), x, divergence="exact", steps=40).value.exp().reshape(97, 97)
        assert abs(float(torch.trapezoid(torch.trapezoid(density, axis), axis)) - 1) < 1e-4

    def test_without_a_batch_s_worth_of_dimensions(self):
        """x of shape (B,): an event of rank 0."""
        x = normal(4)
        net = lambda y, t: torch.tanh(y)  # noqa: E731
        for way in QUICK.values():
            for divergence in ("exact", "hutchinson"):
                flat = log_prob(VDenoiser(net, VP), x, divergence=divergence, **way).value
                deep = log_prob(VDenoiser(net, VP), x[:, None], divergence=divergence, **way).value
                torch.testing.assert_close(flat, deep)


def repeated(target, n, seed=1):
    """One sample, n times, to be given n seeds."""
    return target.sample(1, generator(seed), torch.float64).expand(n, *target.event_shape).clone()


def covers(found, exact):
    """The share of 95 % intervals that cover."""
    low, high = found.interval()
    return float(((low <= exact) & (exact <= high)).double().mean())


PROBES = {
    "1": {"probes": 1},
    "4": {"probes": 4},
    "1 normal": {"probes": 1, "distribution": "gaussian"},
    "hutch++": {"divergence": "hutch++", "probes": 6},
}


class TestProbes:
    N = 400

    @pytest.mark.parametrize("probes", PROBES.values(), ids=PROBES)
    @ways
    def test_the_standard_error_covers_the_truth(self, way, probes):
        x = repeated(WIDE, self.N)
        exact = log_prob(WIDE.denoiser(VP), x[:1], divergence="exact", **way).value
        found = log_prob(WIDE.denoiser(VP), x, seed=5, **probes, **way)
        error, stated = found.value - exact, found.stderr
        assert abs(float(error.mean())) < 5 * float(error.std()) / math.sqrt(self.N)
        # A standard deviation from N normal numbers is known to 1 / sqrt(2 N), 3.5 %; the adaptive solve has few
        # independent terms, each stating its variance from the probes at hand.
        assert abs(float(stated.square().mean().sqrt() / error.std()) - 1) < 5 / math.sqrt(2 * self.N)
        # 0.95 +- 5 sqrt(0.95 * 0.05 / 400) = 0.896 .. 1
        assert 0.895 < covers(found, exact) < 0.9976

    @ways
    def test_and_for_different_samples(self, way):
        x = data(WIDE, 200, seed=9)
        exact = log_prob(WIDE.denoiser(VP), x, divergence="exact", **way).value
        found = log_prob(WIDE.denoiser(VP), x, seed=5, **way)
        assert 0.88 < covers(found, exact) < 0.9976  # 200 of them: 0.873

    @pytest.mark.parametrize("probes", [1, 2, 4])
    @ways
    def test_and_where_one_direction_of_few_evaluations_makes_the_error(self, way, probes):
        """Two Gaussians far apart: between them D's derivative has one large direction while it is decided which. The
        error is then a square less its mean, and 1.96 standard errors are too few.
        """
        along = normal(24, seed=3)
        target = GaussianMixture(torch.stack([along, -along]), std=0.3)
        x = (0.1 * normal(4, 24, seed=4)).repeat(100, 1)
        exact = log_prob(target.denoiser(VP), x[:4], divergence="exact", **way).value.repeat(100)
        found = log_prob(target.denoiser(VP), x, seed=5, probes=probes, **way)
        plain = float(((found.value - exact).abs() < 1.96 * found.stderr).double().mean())
        assert plain < 0.95
        assert max(0.895, plain) < covers(found, exact)

    def test_the_interval_is_student_s(self):
        x, probability = repeated(WIDE, 8), torch.tensor([0.5, 0.95, 0.999]).double()
        found = log_prob(WIDE.denoiser(VP), x, seed=5, t=float(VP.time_at(1.0)), rtol=1e-3, atol=1e-3)
        assert (found.dof >= 1).all()
        half = torch.stack([(high - low) / 2 for low, high in map(found.interval, probability.tolist())]) / found.stderr
        nu = found.dof
        for h, p in zip(half, probability, strict=True):  # of Student's density, integrated to the end
            s = h * torch.linspace(0, 1, 2001).double()[:, None]
            density = (
                torch.exp(torch.lgamma((nu + 1) / 2) - torch.lgamma(nu / 2) - (nu + 1) / 2 * torch.log1p(s**2 / nu))
                / (math.pi * nu).sqrt()
            )
            torch.testing.assert_close(2 * torch.trapezoid(density, s, dim=0), p.expand(8), rtol=0, atol=1e-5)

    def test_more_probes_make_it_the_normal_distribution_s(self):
        x, way = repeated(WIDE, 8), {"steps": 10, "t": float(VP.time_at(1.0))}
        many = log_prob(WIDE.denoiser(VP), x, seed=5, probes=200, **way)
        one = log_prob(WIDE.denoiser(VP), x, seed=5, **way)
        assert float(many.dof.min()) > 20 * float(one.dof.max())
        low, high = many.interval()
        torch.testing.assert_close((high - low) / 2, 1.96 * many.stderr, rtol=2e-3, atol=0)

    @pytest.mark.parametrize("level", [0.0, 1.0, 95, -0.1, math.nan, True, "0.9"])
    def test_another_level_is_refused(self, level):
        found = log_prob(MIXTURE.denoiser(VP), data(MIXTURE), steps=4, seed=0)
        with pytest.raises(ValueError, match="level="):
            found.interval(level)

    @pytest.mark.parametrize("dim", [2, 3])
    @ways
    def test_and_in_few_dimensions(self, way, dim):
        target = Gaussian(normal(dim, seed=1), cov=rotated(spread_out(dim, 2.0), 2))
        x = repeated(target, self.N)
        exact = log_prob(target.denoiser(VP), x[:1], divergence="exact", **way).value
        for K in range(1, dim):
            found = log_prob(target.denoiser(VP), x, seed=3, probes=K, **way)
            ratio = float(found.stderr.square().mean().sqrt() / (found.value - exact).std())
            # One probe against its neighbour's: what changes of the diagonal meanwhile is counted too.
            assert 0.85 < ratio < (1.6 if K == 1 else 1.25)

    @ways
    def test_with_as_many_probes_as_dimensions_the_trace_is_exact(self, way):
        """Which takes no more products than the probes would."""
        denoiser, x = MIXTURE.denoiser(VP), data(MIXTURE)
        exact = log_prob(denoiser, x, divergence="exact", **way)
        assert float(log_prob(denoiser, x, probes=1, seed=0, **way).stderr.min()) > 0
        for K in (2, 5):
            found = log_prob(denoiser, x, probes=K, seed=0, **way)
            assert torch.equal(found.value, exact.value)
            assert found.stderr.tolist() == [0.0] * 3

    @ways
    def test_it_falls_as_one_over_the_root_of_the_probes(self, way):
        x, t = repeated(WIDE, 100), float(VP.time_at(1.0))
        one, four, sixteen = (
            float(log_prob(WIDE.denoiser(VP), x, seed=2, probes=K, t=t, **way).stderr.square().mean().sqrt())
            for K in (1, 4, 16)
        )
        assert one / four == pytest.approx(2, rel=0.15)
        assert four / sixteen == pytest.approx(2, rel=0.15)

    @ways
    def test_signs_are_exact_where_the_derivative_is_diagonal(self, way):
        denoiser, x = Linear(VP), data(GAUSSIAN)
        exact = log_prob(denoiser, x, divergence="exact", **way)
        # Of two dimensions: 24 signs that are all alike, and so tell nothing, have a probability of 1e-7.
        found = log_prob(denoiser, x, probes=24, seed=0, **way)
        tolerance = 1e-10 if "steps" in way else 1e-3
        assert far(found.value, exact.value) < tolerance
        assert float(found.stderr.max()) < 1e-6

    @ways
    def test_both_modes_and_any_chunk_give_the_same(self, way):
        x, denoiser = data(MIXTURE), VDenoiser(MLP(), VP)
        for divergence in ("exact", "hutch++"):
            same = {"divergence": divergence, "probes": 3, "seed": 1, "t": float(VP.time_at(0.0))}
            expected = log_prob(denoiser, x, **same, **way)
            chunked = log_prob(denoiser, x, chunk=1, **same, **way)
            torch.testing.assert_close(chunked.value, expected.value, rtol=1e-10, atol=1e-10)
            if divergence == "exact":
                forward = log_prob(denoiser, x, mode="jvp", **same, **way)
                torch.testing.assert_close(forward.value, expected.value, rtol=1e-10, atol=1e-10)
                assert forward.nfe == expected.nfe

    def test_a_generator_serves_as_well(self):
        x = data(MIXTURE)
        one, two, three = (log_prob(MIXTURE.denoiser(VP), x, steps=5, generator=generator(k)).value for k in (0, 0, 1))
        assert torch.equal(one, two)
        assert far(one, three) > 1e-6


class TestDiscretisationError:
    def ratios(self, target, sde, **way):
        x = data(target, 40)
        found = log_prob(target.denoiser(sde), x, divergence="exact", **way)
        truth = target.log_prob(noised(x, sde), sde=sde, t=sde.t_min)
        true = (carried(found, target, sde) - found.residual - truth).abs()
        return float((found.error / true).median()), float(found.error.median())

    @pytest.mark.parametrize(
        ("target", "sde"), [(MIXTURE, VP), (IMAGES, EDM), (MIXTURE, FlowSDE())], ids=["vp", "edm, images", "flow"]
    )
    def test_what_is_stated_of_it_is_near_it(self, sde, target):
        for steps in (12, 36):
            ratio, _ = self.ratios(target, sde, steps=steps)
            assert 0.1 < ratio < 30
        for tolerance in (1e-3, 1e-5):
            ratio, _ = self.ratios(target, sde, rtol=tolerance, atol=tolerance)
            assert 0.1 < ratio < 30

    @pytest.mark.parametrize("solver", [ExponentialAB(3, "v"), ExponentialAB(4, "v")], ids=["eab3-v", "eab4-v"])
    def test_of_other_solvers_too(self, solver):
        ratio, _ = self.ratios(MIXTURE, VP, steps=40, solver=solver)
        assert 0.1 < ratio < 30

    def test_it_shrinks(self):
        errors = [self.ratios(MIXTURE, VP, steps=n)[1] for n in (12, 24, 48)]
        assert errors[0] > 5 * errors[1] > 25 * errors[2]
        errors = [self.ratios(MIXTURE, VP, rtol=e, atol=e)[1] for e in (1e-4, 1e-6)]
        assert errors[0] > 10 * errors[1]

    def test_it_has_no_part_of_the_probes(self):
        x = repeated(WIDE, 20)
        exact = log_prob(WIDE.denoiser(VP), x[:1], divergence="exact", steps=24)
        found = log_prob(WIDE.denoiser(VP), x, seed=0, steps=24)
        assert far(found.error, exact.error) < 1e-9

    @pytest.mark.parametrize("solver", [Heun(), RungeKutta("rk4", "angle")], ids=["heun", "rk4"])
    def test_tables_of_several_evaluations_a_step_state_none(self, solver):
        found = log_prob(Linear(VP), data(GAUSSIAN), divergence="exact", steps=20, solver=solver)
        assert found.error.isnan().all()

    def test_nor_do_those_of_too_few_steps(self):
        for steps in (1, 2):
            found = log_prob(Linear(VP), data(GAUSSIAN), divergence="exact", steps=steps)
            assert found.error.isnan().all()
            assert found.value.isfinite().all()


class TestSamples:
    @pytest.mark.parametrize("divergence", ["exact", "hutchinson", "hutch++"])
    def test_by_a_table_one_alone_is_as_in_a_batch(self, divergence):
        x, options = data(WIDE, 5), {"divergence": divergence, "probes": 6, "steps": 20}
        whole = log_prob(WIDE.denoiser(VP), x, seed=3, **options)
        for i, seed in enumerate(sample_seeds(3, 5)):
            alone = log_prob(WIDE.denoiser(VP), x[i : i + 1], seed=[seed], **options)
            for name in ("value", "stderr", "dof", "latent", "log_det", "prior", "residual", "error"):
                one, other = getattr(whole, name)[i : i + 1], getattr(alone, name)
                torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)

    def test_adaptively_to_its_tolerance(self):
        x = torch.cat([data(MIXTURE, 4), torch.tensor([[1e3, -2e3], [40.0, 40.0]]).double()])
        options = {"divergence": "exact", "rtol": 1e-5, "atol": 1e-5}
        whole = log_prob(MIXTURE.denoiser(VP), x, **options)
        easy = log_prob(MIXTURE.denoiser(VP), x[:4], **options)
        assert far(whole.value[:4], easy.value) < 2e-4
        for i in range(1):
            alone = log_prob(MIXTURE.denoiser(VP), x[i : i + 1], **options)
            assert far(whole.value[i : i + 1], alone.value) < 2e-4

    def test_adaptively_with_the_same_probes(self):
        x = data(WIDE, 4)
        whole = log_prob(WIDE.denoiser(VP), x, seed=3, rtol=1e-7, atol=1e-7)
        alone = log_prob(WIDE.denoiser(VP), x[2:3], seed=[sample_seeds(3, 4)[2]], rtol=1e-7, atol=1e-7)
        assert far(whole.value[2:3], alone.value) < 1e-4
        assert far(whole.stderr[2:3], alone.stderr) < 1e-4

    @pytest.mark.parametrize("divergence", ["hutchinson", "hutch++"])
    @ways
    def test_a_seed_decides_and_the_global_generator_is_left_alone(self, way, divergence):
        x, options = data(WIDE, 2), {"divergence": divergence, "probes": 3} | way | {"t": float(VP.time_at(0.0))}
        before = torch.get_rng_state()
        one, two, other = (log_prob(WIDE.denoiser(VP), x, seed=s, **options).value for s in (1, 1, 2))
        log_prob(WIDE.denoiser(VP), x, **options)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(one, two)
        assert not torch.equal(one, other)


class TestTypes:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
    @ways
    def test_of_the_results(self, way, dtype):
        exact = log_prob(MIXTURE.denoiser(VP), data(MIXTURE).to(dtype).double(), divergence="exact", **way)
        found = log_prob(MIXTURE.denoiser(VP), data(MIXTURE).to(dtype), divergence="exact", **way)
        numbers = torch.promote_types(dtype, torch.float32)
        for name in ("value", "stderr", "dof", "prior", "log_det", "residual", "error"):
            assert getattr(found, name).dtype == numbers
            assert getattr(found, name).shape == (3,)
        assert found.latent.dtype == dtype
        # In another precision an adaptive solve of tolerance 1e-4 takes other steps.
        assert far(found.value, exact.value) < (1e-12 if dtype == torch.float64 else 1e-4 if "steps" in way else 1e-3)

    def test_a_float32_network_sees_float32(self):
        seen = []

        def net(x, t):
            seen.append((x.dtype, t.dtype))
            return torch.tanh(x)

        for way in QUICK.values():
            log_prob(VDenoiser(net, VP), normal(3, 2, dtype=torch.float32), seed=0, **way)
        assert set(seen) == {(torch.float32, torch.float32)}

    @pytest.mark.parametrize(("divergence", "mode"), [("exact", "vjp"), ("hutchinson", "vjp"), ("hutchinson", "jvp")])
    @pytest.mark.parametrize("way", [{"steps": 8}, {"rtol": 1e-2, "atol": 1e-2}], ids=QUICK)
    def test_grad_modes_change_nothing(self, way, divergence, mode):
        x, denoiser = data(MIXTURE), VDenoiser(MLP(), VP)
        options = {"divergence": divergence, "mode": mode, "seed": 0, "t": float(VP.time_at(0.0))} | way
        expected = log_prob(denoiser, x, **options)
        kept = x.clone()
        for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
            with context():
                found = log_prob(denoiser, x, **options)
            assert torch.equal(found.value, expected.value)
        with torch.inference_mode():
            assert torch.equal(log_prob(denoiser, x.clone(), **options).value, expected.value)
        assert torch.equal(x, kept)
        assert not x.requires_grad
        wanted = x.clone().requires_grad_()
        found = log_prob(denoiser, wanted, **options)
        assert torch.equal(found.value, expected.value)
        assert wanted.requires_grad
        assert wanted.grad is None
        for name in ("value", "stderr", "dof", "prior", "log_det", "residual", "error", "latent"):
            assert not getattr(found, name).requires_grad
        assert all(p.grad is None for p in denoiser.net.parameters())


def slopes(denoiser, x, y, options, h, weight):
    """Central differences of the weighted sum of values, in directions of x, y and each parameter, and those."""

    def value(at, of):
        return float((log_prob(denoiser, at, cond={"y": of}, **options).value * weight).sum())

    of_x, of_y = normal(*x.shape, seed=20), normal(*y.shape, seed=21)
    found = [
        (value(x + h * of_x, y) - value(x - h * of_x, y)) / (2 * h),
        (value(x, y + h * of_y) - value(x, y - h * of_y)) / (2 * h),
    ]
    directions = [of_x, of_y]
    for k, parameter in enumerate(denoiser.net.parameters()):
        step = normal(*parameter.shape, seed=22 + k)
        ends = []
        for sign in (1, -2):
            with torch.no_grad():
                parameter += sign * h * step
            ends.append(value(x, y))
        with torch.no_grad():
            parameter += h * step
        found.append((ends[0] - ends[1]) / (2 * h))
        directions.append(step)
    return found, directions


def gradients(denoiser, x, y, options, weight):
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    found = log_prob(denoiser, x, cond={"y": y}, **options)
    return torch.autograd.grad((found.value * weight).sum(), [x, y, *denoiser.net.parameters()])


class TestGradients:
    x, y, weight = normal(2, 2, seed=1), normal(2, seed=4), torch.tensor([1.0, -0.7]).double()

    def compare(self, options, h, tolerance):
        denoiser = VDenoiser(MLP(), VP)
        wanted, directions = slopes(denoiser, self.x, self.y, options, h, self.weight)
        found = gradients(denoiser, self.x, self.y, options | {"differentiable": True}, self.weight)
        for slope, gradient, direction in zip(wanted, found, directions, strict=True):
            assert math.isclose(float((gradient * direction).sum()), slope, rel_tol=tolerance, abs_tol=1e-7)

    @pytest.mark.parametrize(
        "options",
        [
            {"divergence": "exact"},
            {"divergence": "exact", "mode": "jvp", "chunk": 1},
            {"divergence": "exact", "solver": Heun()},
            {"divergence": "exact", "correct": True},
            {"divergence": "hutchinson", "probes": 2},
            {"divergence": "hutchinson", "distribution": "gaussian"},
        ],
        ids=lambda o: " ".join(f"{v.__class__.__name__ if k == 'solver' else v}" for k, v in o.items()),
    )
    def test_by_a_table_they_are_finite_differences(self, options):
        self.compare(options | {"steps": 10, "seed": 1}, 1e-5, 1e-5)

    def test_adaptively_too(self):
        self.compare({"divergence": "exact", "rtol": 1e-7, "atol": 1e-7}, 1e-3, 1e-4)

    @pytest.mark.parametrize("options", [{"divergence": "exact"}, {"probes": 2, "seed": 3}], ids=["exact", "probes"])
    def test_the_adjoint_s_are_those_of_backpropagation(self, options):
        denoiser = VDenoiser(MLP(), VP)
        options = options | {"rtol": 1e-5, "atol": 1e-5}
        direct = gradients(denoiser, self.x, self.y, options | {"differentiable": True}, self.weight)
        adjoint = gradients(denoiser, self.x, self.y, options | {"differentiable": "adjoint"}, self.weight)
        for one, other in zip(direct, adjoint, strict=True):
            assert far(one, other) < 2e-3 * float(one.abs().max())

    @pytest.mark.parametrize("way", [*WAYS.values(), {"differentiable": "adjoint"}], ids=[*WAYS, "adjoint"])
    def test_of_an_exact_denoiser_s_they_are_the_score(self, way):
        t = float(VP.time_at(1.0))
        x = data(GAUSSIAN).requires_grad_()
        found = log_prob(GAUSSIAN.denoiser(VP), x, divergence="exact", t=t, **({"differentiable": True} | way))
        truth = found.log_det + GAUSSIAN.log_prob(found.latent, sde=VP, t=VP.t_max)
        (gradient,) = torch.autograd.grad(truth.sum(), x)
        score = GAUSSIAN.denoiser(VP).score(x.detach(), t)
        assert far(gradient, score) < (5e-3 if "differentiable" in way else 1e-5)

    @ways
    def test_they_reach_parameters_where_x_wants_none(self, way):
        denoiser = VDenoiser(MLP(), VP)
        found = log_prob(denoiser, self.x, divergence="exact", differentiable=True, **way)
        wanted = log_prob(denoiser, self.x.clone().requires_grad_(), divergence="exact", differentiable=True, **way)
        parameters = list(denoiser.net.parameters())
        for one, other in zip(
            torch.autograd.grad(found.value.sum(), parameters),
            torch.autograd.grad(wanted.value.sum(), parameters),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)

    @ways
    def test_the_values_are_those_without(self, way):
        denoiser = VDenoiser(MLP(), VP)
        with torch.no_grad():  # asked for is asked for
            found = log_prob(denoiser, self.x, seed=0, differentiable=True, **way)
        plain = log_prob(denoiser, self.x, seed=0, **way)
        torch.testing.assert_close(found.value.detach(), plain.value, rtol=1e-12, atol=1e-12)
        assert found.value.requires_grad
        assert found.latent.requires_grad


class TestModels:
    @ways
    def test_conditions_reach_the_network_each_sample_its_own(self, way):
        denoiser, x, y = VDenoiser(MLP(), VP), normal(3, 2), torch.tensor([-1.0, 0.0, 2.0]).double()
        options = {"divergence": "exact"} | way
        whole = log_prob(denoiser, x, cond={"y": y}, **options)
        tolerance = 1e-10 if "steps" in way else 2e-3
        for i in range(3):
            alone = log_prob(denoiser, x[i : i + 1], cond={"y": y[i : i + 1]}, **options)
            assert far(whole.value[i : i + 1], alone.value) < tolerance
        without = log_prob(denoiser, x, **options)
        assert abs(float(whole.value[1] - without.value[1])) < tolerance
        assert abs(float(whole.value[2] - without.value[2])) > 0.05
        shared = log_prob(denoiser, x, cond={"y": y[2:]}, **options)
        assert abs(float(shared.value[2] - whole.value[2])) < tolerance

    @ways
    def test_whatever_the_network_predicts_the_density_is_one(self, way):
        x, exact = data(MIXTURE), MIXTURE.denoiser(VP)
        kinds = {
            "x0": X0Denoiser,
            "eps": EpsDenoiser,
            "v": VDenoiser,
            "score": ScoreDenoiser,
            "velocity": VelocityDenoiser,
        }
        options = {"divergence": "exact", "t": float(VP.time_at(1.0))} | way
        expected = log_prob(exact, x, **options)
        for view, kind in kinds.items():
            found = log_prob(kind(network_for(exact, view), VP), x, **options)
            assert far(found.value, expected.value) < 1e-6
            assert far(found.latent, expected.latent) < 1e-6

    @ways
    def test_preconditioning_is_part_of_the_model(self, way):
        sd, exact = 0.5, MIXTURE.denoiser(EDM)

        def net(x, label):
            t = (4 * label).exp()
            total = torch.hypot(t, torch.full_like(t, sd))
            y = expand_like(total, x) * x
            mean = exact.posterior(y, t).mean
            return (mean - expand_like(sd**2 / total**2, x) * y) / expand_like(t * sd / total, x)

        x, options = data(MIXTURE), {"divergence": "exact"} | way
        found = log_prob(EDMDenoiser(net, EDM, sigma_data=sd), x, **options)
        assert far(found.value, log_prob(exact, x, **options).value) < 1e-5

    @ways
    def test_wrappers_change_it_where_they_bite(self, way):
        x, denoiser = data(MIXTURE), VDenoiser(MLP(), VP)
        options = {"divergence": "exact"} | way
        wide = log_prob(Clip(denoiser, -100, 100), x, **options)
        assert far(wide.value, log_prob(denoiser, x, **options).value) < 1e-8
        y = torch.tensor([1.0, 2.0, 3.0]).double()
        conditional = log_prob(Clip(denoiser, -100, 100), x, cond={"y": y}, **options)
        assert far(conditional.value, log_prob(denoiser, x, cond={"y": y}, **options).value) < 1e-8
        # Data is a point at zero then: what is left of x is noise, N(0, sigma^2) at every time.
        nothing = Clip(Linear(VP), -1e-300, 1e-300)
        t = float(VP.time_at(0.0))
        found = log_prob(nothing, x, t=t, **options)
        sigma = float(VP.sigma(t))
        expected = -(x**2).sum(1) / (2 * sigma**2) - 2 * math.log(sigma * math.sqrt(2 * math.pi))
        carried_to = found.value - found.prior + Gaussian([0.0, 0.0], std=0.0).log_prob(found.latent, sde=VP, t=1.0)
        assert far(carried_to, expected) < (2e-3 if "steps" in way else 1e-3)


def broken(kind, samples=None):
    """A network of v that fails between t = 0.1 and 0.3, in some samples."""

    def net(x, t):
        out = torch.tanh(x)
        if not 0.1 < float(t[0]) < 0.3:
            return out
        where = torch.ones(len(x)) if samples is None else torch.zeros(len(x)).index_fill(0, torch.tensor(samples), 1.0)
        bad = torch.zeros(len(x), dtype=x.dtype).masked_fill(where == 1, {"nan": math.nan, "inf": math.inf}[kind])
        return out + expand_like(bad, x)

    return net


class TestFailures:
    @pytest.mark.parametrize("divergence", ["exact", "hutchinson", "hutch++"])
    @pytest.mark.parametrize("way", [{"steps": 20}, {"steps": 20, "solver": Heun()}, {}], ids=["steps", "heun", "ode"])
    @pytest.mark.parametrize("kind", ["nan", "inf"])
    def test_a_network_that_is_not_finite_is_named(self, kind, way, divergence):
        denoiser = VDenoiser(broken(kind, [0, 2]), VP)
        with pytest.raises(NonFiniteError, match=r"samples \[?0, 2\]?.*t = 0\.[12]") as caught:
            log_prob(denoiser, data(MIXTURE), divergence=divergence, probes=3, seed=0, **way)
        assert caught.value.samples == [0, 2]
        assert 0.1 < caught.value.time < 0.3

    @pytest.mark.parametrize("way", [{"steps": 20}, {}], ids=["steps", "ode"])
    def test_so_is_a_derivative_that_is_not(self, way):
        def net(x, t):  # finite itself
            kink = (x - x.detach()).abs().sqrt() if 0.1 < float(t[0]) < 0.3 else 0.0
            return torch.tanh(x) + kink

        with pytest.raises(NonFiniteError, match=r"t = 0\.[12]") as caught:
            log_prob(VDenoiser(net, VP), data(MIXTURE), divergence="exact", **way)
        assert 0.1 < caught.value.time < 0.3

    @pytest.mark.parametrize("way", [{"steps": 20}, {}], ids=["steps", "ode"])
    def test_so_is_data_that_is_not(self, way):
        x = data(MIXTURE)
        x[1, 0] = math.nan
        with pytest.raises((NonFiniteError, ValueError), match="finite"):
            log_prob(MIXTURE.denoiser(VP), x, **way)

    @pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
    @pytest.mark.parametrize("budget", [1, 7, 40])
    def test_a_budget_that_runs_out(self, budget, divergence):
        x, net = data(GAUSSIAN), MLP()
        found = log_prob(VDenoiser(net, VP), x, divergence=divergence, seed=0, max_nfe=budget)
        assert found.status == "max_nfe"
        assert found.nfe == net.calls == budget
        assert found.value.isnan().all()
        assert VP.t_min <= found.t < VP.t_max
        assert found.latent.isfinite().all()

    def test_its_latent_is_the_state_at_t(self):
        x = data(GAUSSIAN)
        found = log_prob(GAUSSIAN.denoiser(VP), x, divergence="exact", max_nfe=30)
        assert VP.t_min < found.t < VP.t_max
        expected = GAUSSIAN.flow(noised(x, VP), VP, VP.t_min, found.t)
        torch.testing.assert_close(found.latent, expected, rtol=1e-4, atol=1e-4)

    def test_a_budget_that_is_enough_changes_nothing(self):
        x = data(GAUSSIAN)
        full = log_prob(GAUSSIAN.denoiser(VP), x, divergence="exact")
        found = log_prob(GAUSSIAN.denoiser(VP), x, divergence="exact", max_nfe=full.nfe)
        assert found.status == "complete"
        assert torch.equal(found.value, full.value)
        assert log_prob(GAUSSIAN.denoiser(VP), x, divergence="exact", max_nfe=full.nfe - 1).status == "max_nfe"


UNIFORM = Grid.uniform(VP, 5, end=1e-5)

BAD = {
    "divergence": ({"divergence": "trace"}, "hutchinson"),
    "distribution": ({"distribution": "uniform"}, "rademacher"),
    "mode": ({"mode": "fwd"}, "jvp"),
    "probes": ({"probes": 0}, "probes=0"),
    "hutch++ probes": ({"divergence": "hutch++", "probes": 4}, "multiple of 3"),
    "chunk": ({"chunk": 0}, "chunk=0"),
    "steps and grid": ({"steps": 5, "grid": UNIFORM}, "at most one"),
    "another SDE's grid": ({"grid": Grid.uniform(EDM, 5, end=0.002)}, "EDMSDE"),
    "a grid from the middle": ({"grid": Grid.uniform(VP, 5, start=0.5, end=1e-5)}, "prior"),
    "a grid to the data": ({"grid": Grid.uniform(VP, 5)}, "sigma = 0"),
    "an increasing grid": ({"grid": UNIFORM.reversed()}, "prior"),
    "a list for a grid": ({"grid": [1.0, 0.5, 0.1]}, "expected a Grid"),
    "a grid past t": ({"grid": UNIFORM, "t": 0.3}, "t=0.3"),
    "a solver alone": ({"solver": UniPC()}, "steps="),
    "a solver's name": ({"steps": 5, "solver": "unipc"}, "table"),
    "a solver's class": ({"steps": 5, "solver": UniPC}, "table"),
    "t = 0": ({"t": 0.0}, "t=0.0"),
    "t = t_max": ({"t": 1.0}, "t=1.0"),
    "t beyond": ({"t": 1.5}, "t=1.5"),
    "t before": ({"t": -0.1}, "t=-0.1"),
    "t nan": ({"t": math.nan}, "nan"),
    "adjoint of a table": ({"steps": 5, "differentiable": "adjoint"}, "adaptive"),
    "differentiable": ({"differentiable": "yes"}, "adjoint"),
    "cond": ({"cond": {"y": torch.zeros(2)}}, "2 entries for 3"),
    "cond's type": ({"cond": [1.0]}, "mapping"),
    "steps = 0": ({"steps": 0}, "steps=0"),
    "steps = 2.5": ({"steps": 2.5}, "steps=2.5"),
    "steps = True": ({"steps": True}, "steps=True"),
    "method": ({"method": "rk45"}, "dopri5"),
    "rtol": ({"rtol": 0.0}, "rtol=0"),
    "atol": ({"atol": math.nan}, "atol=nan"),
    "first_step": ({"first_step": -1.0}, "first_step"),
    "max_nfe": ({"max_nfe": 0}, "max_nfe=0"),
    "seeds": ({"seed": [1, 2]}, "2 seeds for 3"),
    "seed": ({"seed": -1}, "seed=-1"),
    "seed and generator": ({"seed": 1, "generator": generator()}, "at most one"),
}


class TestBadArguments:
    @pytest.mark.parametrize(("options", "word"), BAD.values(), ids=BAD)
    def test_are_refused_before_any_call(self, options, word):
        net = MLP()
        with pytest.raises((TypeError, ValueError)) as caught:
            log_prob(VDenoiser(net, VP), normal(3, 2), **options)
        assert word in str(caught.value)
        assert net.calls == 0

    @pytest.mark.parametrize("way", [{"steps": 5}, {}], ids=["steps", "ode"])
    @pytest.mark.parametrize(
        ("x", "word"),
        [
            (torch.zeros(3, 2).long(), "floating-point"),
            (torch.zeros(3, 2, dtype=torch.uint8), "floating-point"),
            (torch.tensor(1.0), "floating-point"),
            ([[1.0, 2.0]], "floating-point"),
            (torch.zeros(0, 2), "empty"),
        ],
        ids=["long", "uint8", "number", "list", "empty"],
    )
    def test_so_is_x(self, x, word, way):
        net = MLP()
        with pytest.raises((TypeError, ValueError), match=word):
            log_prob(VDenoiser(net, VP), x, **way)
        assert net.calls == 0

    def test_a_network_is_no_denoiser(self):
        with pytest.raises(TypeError, match="EpsDenoiser"):
            log_prob(MLP(), normal(3, 2))

    @pytest.mark.parametrize("name", sorted(STOCHASTIC))
    def test_stochastic_solvers_on_a_grid_too(self, name):
        net = MLP()
        with pytest.raises(ValueError, match="noise"):
            log_prob(VDenoiser(net, VP), normal(3, 2), grid=UNIFORM, solver=SOLVERS[name])
        assert net.calls == 0

    def test_eps_networks_cannot_start_at_alpha_zero_by_either_way(self):
        calls = []

        def net(x, t):
            calls.append(t)
            return torch.tanh(x)

        sde = FlowSDE()
        with pytest.raises((ValueError, NonFiniteError)):
            log_prob(EpsDenoiser(net, sde), normal(3, 2), steps=5, solver=Heun("t"))
