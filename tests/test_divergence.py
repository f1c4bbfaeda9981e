"""The trace of a derivative: exact, by random probes without bias and with the variance stated, by Hutch++."""

from __future__ import annotations

import math

import pytest
import torch
from common import generator, normal

from scoresde.likelihood.divergence import Divergence
from scoresde.likelihood.interval import degrees_of_freedom, student
from scoresde.likelihood.spread import Spread
from scoresde.noise import GeneratorNoise, SeededNoise, sample_seeds

CPU = torch.device("cpu")
SHAPES = [(3, 5), (2, 2, 3, 2), (4, 1)]
MODES = ["vjp", "jvp"]


def nonlinear(x):
    """Smooth, mixing all elements of a sample, each sample by itself, in its dtype."""
    flat = x.reshape(len(x), -1)
    n = flat.shape[1]
    W = (normal(n, n, seed=5) / math.sqrt(n)).to(x.dtype)
    return (torch.tanh(flat @ W) * flat.roll(1, 1) + flat**2 / 3).reshape(x.shape)


def jacobians(function, x):
    """(B, n, n), one sample at a time, by torch's own reverse mode."""
    n = x[0].numel()
    return torch.stack(
        [torch.autograd.functional.jacobian(lambda y: function(y[None])[0], one).reshape(n, n) for one in x]
    )


def traces(function, x):
    return jacobians(function, x).diagonal(dim1=1, dim2=2).sum(1)


def linear(J):
    return lambda x: x @ J.to(x.dtype).T


def symmetric(n, seed=1):
    J = normal(n, n, seed=seed)
    return (J + J.T) / 2


def low_rank(n, rank, seed=2):
    return normal(n, rank, seed=seed) @ normal(rank, n, seed=seed + 1)


def probes_of(divergence, x, seed=0):
    return divergence.draw(x, GeneratorNoise(generator(seed)))


def estimates(divergence, J, count, seed=0, **options):
    """Estimates of tr J, one a sample, and what the call gave."""
    x = torch.zeros(count, len(J), dtype=torch.float64)
    found = divergence(linear(J), x, probes_of(divergence, x, seed), **options)
    return found.trace, found


def within(samples, mean, sigmas=5.0):
    """Whether the mean of the samples is the expected one, to so many of its standard errors."""
    stderr = float(samples.std()) / math.sqrt(len(samples))
    return abs(float(samples.mean()) - mean) <= sigmas * stderr + 1e-12 * max(1.0, abs(mean))


class TestExact:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("chunk", [None, 1, 5, 1000])
    def test_it_is_the_trace_of_autograd_s_jacobian(self, shape, mode, chunk):
        x = normal(*shape)
        found = Divergence("exact", mode=mode, chunk=chunk)(nonlinear, x, x.new_empty(0, *shape))
        torch.testing.assert_close(found.trace, traces(nonlinear, x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.N, nonlinear(x), rtol=1e-14, atol=1e-14)
        assert found.N.shape == x.shape
        assert len(found.v) == len(found.u) == 0
        assert not found.trace.requires_grad
        assert not found.N.requires_grad

    def test_float32_traces_are_added_in_float64(self):
        x = normal(3, 5, dtype=torch.float32)
        found = Divergence("exact")(nonlinear, x, x.new_empty(0, 3, 5))
        assert found.N.dtype == torch.float32
        assert found.trace.dtype == torch.float64
        torch.testing.assert_close(found.trace, traces(nonlinear, x.double()), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("mode", MODES)
    def test_of_a_constant_it_is_zero(self, mode):
        x = normal(3, 5)
        found = Divergence("exact", mode=mode)(lambda y: torch.ones_like(y), x, x.new_empty(0, 3, 5))
        assert found.trace.tolist() == [0.0] * 3
        assert found.N.tolist() == torch.ones(3, 5).tolist()

    def test_it_draws_nothing(self):
        def refuse(row, x):
            raise AssertionError("an exact trace draws no probe")

        assert Divergence("exact", probes=4).draw(normal(3, 5), refuse).shape == (0, 3, 5)


class TestProducts:
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("chunk", [None, 1, 2])
    def test_they_are_the_jacobian_s(self, shape, chunk):
        x, n = normal(*shape), math.prod(shape[1:])
        J = jacobians(nonlinear, x)
        for mode, each in (("vjp", J.mT), ("jvp", J)):
            divergence = Divergence(probes=3, mode=mode, chunk=chunk)
            v = probes_of(divergence, x)
            found = divergence(nonlinear, x, v)
            flat = v.reshape(3, shape[0], n)
            torch.testing.assert_close(found.v, flat)
            torch.testing.assert_close(found.u, torch.einsum("bij,kbj->kbi", each, flat), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(found.trace, torch.einsum("kbi,bij,kbj->kb", flat, J, flat).mean(0))
            torch.testing.assert_close(found.N, nonlinear(x), rtol=1e-14, atol=1e-14)

    def test_reverse_mode_calls_the_function_once_and_forward_mode_once_a_chunk(self):
        calls = []

        def counted(x):
            calls.append(1)
            return nonlinear(x)

        x = normal(2, 6)
        for options, expected in (({"mode": "vjp", "chunk": 2}, 1), ({"mode": "jvp", "chunk": 2}, 3)):
            for kind in ("hutchinson", "exact"):
                calls.clear()
                divergence = Divergence(kind, probes=6, **options)
                divergence(counted, x, probes_of(divergence, x))
                assert len(calls) == expected

    @pytest.mark.parametrize("kind", ["exact", "hutchinson", "hutch++"])
    def test_a_sample_does_not_see_its_neighbours(self, kind):
        divergence, x = Divergence(kind, probes=6), normal(4, 7)
        v = probes_of(divergence, x)
        whole, alone = divergence(nonlinear, x, v), divergence(nonlinear, x[2:3], v[:, 2:3])
        torch.testing.assert_close(whole.trace[2:3], alone.trace, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("kind", ["exact", "hutchinson"])
    def test_gradients_of_the_trace_are_those_of_the_formula(self, kind, mode):
        def function(y, scale):
            return torch.tanh(y * scale) * y.roll(1, 1)

        divergence, x = Divergence(kind, probes=3, mode=mode), normal(2, 4)
        v, scale = probes_of(divergence, x), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

        def value(y, s):
            return float(divergence(lambda z: function(z, s), y, v).trace.sum())

        y = x.clone().requires_grad_()
        found = divergence(lambda z: function(z, scale), y, v, create_graph=True)
        of_x, of_scale = torch.autograd.grad(found.trace.sum(), (y, scale))
        h, direction = 1e-5, normal(2, 4, seed=8)
        with torch.no_grad():
            slope = (value(x + h * direction, scale) - value(x - h * direction, scale)) / (2 * h)
            slope_of_scale = (value(x, scale + h) - value(x, scale - h)) / (2 * h)
        assert math.isclose(float((of_x * direction).sum()), slope, rel_tol=1e-6)
        assert math.isclose(float(of_scale), slope_of_scale, rel_tol=1e-6)

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("kind", ["exact", "hutchinson", "hutch++"])
    def test_grad_modes_change_nothing(self, kind, mode):
        divergence, x = Divergence(kind, probes=3, mode=mode), normal(2, 4)
        v = probes_of(divergence, x)
        expected = divergence(nonlinear, x, v).trace
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                torch.testing.assert_close(divergence(nonlinear, x, v).trace, expected)
        with torch.inference_mode():
            inner, at = v.clone(), x.clone()
            torch.testing.assert_close(divergence(nonlinear, at, inner).trace, expected)
        wanted = x.clone().requires_grad_()
        found = divergence(nonlinear, wanted, v)
        assert not found.trace.requires_grad
        assert wanted.requires_grad
        assert wanted.grad is None
        assert not x.requires_grad


class TestHutchinson:
    @pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
    @pytest.mark.parametrize("K", [1, 4])
    def test_it_has_no_bias(self, distribution, K):
        J = normal(6, 6, seed=3)  # not symmetric
        found, _ = estimates(Divergence(probes=K, distribution=distribution), J, 20_000)
        assert within(found, float(J.trace()))

    @pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
    def test_its_variance_is_the_formula_s_and_falls_as_one_over_the_probes(self, distribution):
        J = symmetric(6)
        square, diagonal = float((J**2).sum()), float((J.diag() ** 2).sum())
        variance = 2 * (square - diagonal) if distribution == "rademacher" else 2 * square
        for K in (1, 4):
            found, _ = estimates(Divergence(probes=K, distribution=distribution), J, 20_000, seed=K)
            # The variance of squares of nearly normal numbers, some heavy-tailed: 2 to 6 V^2 each.
            assert abs(float(found.var()) * K / variance - 1) < 5 * math.sqrt(6 / 20_000)

    def test_it_is_exact_for_a_diagonal_and_in_one_dimension(self):
        for J in (torch.diag(normal(5)), normal(1, 1)):
            found, _ = estimates(Divergence(probes=1), J, 50)
            torch.testing.assert_close(found, J.trace().expand(50))

    def test_taking_out_the_identity_changes_nothing_for_signs(self):
        J = symmetric(6)
        for K in (1, 3):
            divergence = Divergence(probes=K)
            without, _ = estimates(divergence, J, 100)
            taken, found = estimates(divergence, J, 100, c=1.7)
            torch.testing.assert_close(taken, without, rtol=1e-12, atol=1e-12)
            assert found.base.tolist() == [1.7 * 6] * 100

    def test_taking_out_the_identity_changes_the_variance_alone_for_normals(self):
        J = symmetric(6) / 10 + 3 * torch.eye(6).double()
        divergence = Divergence(distribution="gaussian")
        without, _ = estimates(divergence, J, 20_000)
        taken, _ = estimates(divergence, J, 20_000, seed=1, c=3.0)
        assert within(taken, float(J.trace()))
        expected = float(((J - 3 * torch.eye(6)) ** 2).sum() / (J**2).sum())
        assert abs(float(taken.var() / without.var()) / expected - 1) < 5 * math.sqrt(2 * 6 / 20_000)
        nothing_left, _ = estimates(divergence, 3 * torch.eye(6).double(), 10, c=3.0)
        torch.testing.assert_close(nothing_left, torch.full((10,), 18.0).double())


class TestSpread:
    """What it says of the variance, on average over many samples, is the variance."""

    B = 20_000

    def added(self, J, K, distribution, weights, seed=0):
        """The variance that is stated of a weighted sum, (B,), and the sums themselves."""
        spread, total = Spread(distribution), torch.zeros(self.B).double()
        for i, weight in enumerate(weights):
            trace, found = estimates(Divergence(probes=K, distribution=distribution), J, self.B, seed=seed + 97 * i)
            spread.add(found.v, found.u, weight)
            total = total + weight * trace
        return torch.as_tensor(spread.variance, dtype=torch.float64).expand(self.B), total

    def truth(self, J, K, distribution, weights):
        S = (J + J.T) / 2
        square = (S**2).sum() - (0 if distribution == "gaussian" else (S.diag() ** 2).sum())
        return 2 * float(square) / K * sum(w**2 for w in weights)

    @pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 24])
    @pytest.mark.parametrize(("K", "weights"), [(1, [1.0, 1.0]), (1, [0.3, -2.0, 1.1]), (2, [1.0]), (5, [0.5, 2.0])])
    @pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
    def test_it_is_the_true_variance_of_a_symmetric_derivative(self, n, K, weights, distribution):
        J = symmetric(n, seed=n)
        stated, total = self.added(J, K, distribution, weights)
        truth = self.truth(J, K, distribution, weights)
        assert within(stated, truth)
        assert math.isclose(float(total.var()), truth, rel_tol=5 * math.sqrt(12 / self.B), abs_tol=1e-20)

    @pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
    def test_single_probes_tell_it_where_one_evaluation_stands_out(self, distribution):
        """Its square counts by its own weight, not by that of the next: five evaluations, one of them large, whose
        weights fall by half each time. (Of signs without a diagonal: what changes of it is counted.)
        """
        J, spread, truth = symmetric(8, seed=3), Spread(distribution), 0.0
        J = J - J.diag().diag()
        for i, (size, weight) in enumerate(zip((0.1, 1.0, 20.0, 1.0, 0.1), (8.0, 4.0, 2.0, 1.0, 0.5), strict=True)):
            _, found = estimates(Divergence(distribution=distribution), size * J, self.B, seed=11 * i)
            spread.add(found.v, found.u, weight)
            truth += self.truth(size * J, 1, distribution, [weight])
        assert within(spread.variance, truth)

    @pytest.mark.parametrize("K", [1, 2])
    @pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
    def test_it_is_an_upper_bound_of_another(self, K, distribution):
        J = normal(6, 6, seed=9)
        stated, total = self.added(J, K, distribution, [1.0, 0.7])
        truth = self.truth(J, K, distribution, [1.0, 0.7])
        assert math.isclose(float(total.var()), truth, rel_tol=5 * math.sqrt(12 / self.B))
        assert float(stated.mean()) > truth

    @pytest.mark.parametrize("rank", [1, 3, 24])
    @pytest.mark.parametrize(("K", "weights"), [(1, [1.0] * 12), (2, [1.0] * 6), (5, [1.0, 0.7]), (16, [1.0])])
    @pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
    def test_its_own_variance_is_stated_too_within_a_factor(self, rank, K, weights, distribution):
        """So that 95 % of intervals by Student's t cover, at most 2 % more or less, and 3 % less of rank one, where the
        error is no normal number.
        """
        A = normal(24, rank, seed=2)
        spread, error = Spread(distribution), -sum(weights) * float((A * A).sum())
        for i, weight in enumerate(weights):
            x = torch.zeros(4000, 24, dtype=torch.float64)
            divergence = Divergence(probes=K, distribution=distribution)
            found = divergence(linear(A @ A.T), x, probes_of(divergence, x, 97 * i))
            spread.add(found.v, found.u, weight)
            error = error + weight * found.trace
        assert 0.8 < float(spread.doubt.mean() / spread.variance.var()) < 4
        half = student(degrees_of_freedom(spread.variance, spread.doubt)) * spread.variance.sqrt()
        covered = float((error.abs() < half).double().mean())
        assert 0.95 - (0.03 if rank == 1 else 0.02) < covered < 0.98, covered

    def test_a_sample_alone_has_the_same(self):
        for K, n in ((1, 5), (3, 5), (2, 2), (1, 2)):
            whole, alone, J = Spread("rademacher"), Spread("rademacher"), symmetric(n)
            for i in range(4):
                _, found = estimates(Divergence(probes=K), J, 6, seed=i)
                whole.add(found.v, found.u, 0.5 + i)
                alone.add(found.v[:, 2:3], found.u[:, 2:3], 0.5 + i)
            torch.testing.assert_close(whole.variance[2:3], alone.variance, rtol=1e-12, atol=0)
            torch.testing.assert_close(whole.doubt[2:3], alone.doubt, rtol=1e-12, atol=0)

    def test_a_lone_probe_tells_no_less_than_the_variance(self):
        J = symmetric(6)
        stated, _ = self.added(J, 1, "rademacher", [1.0])
        assert float(stated.mean()) >= self.truth(J, 1, "rademacher", [1.0])

    @pytest.mark.parametrize("K", [1, 3])
    def test_where_signs_are_exact_it_is_zero(self, K):
        stated, _ = self.added(torch.diag(normal(6)), K, "rademacher", [1.0, 1.0])
        assert float(stated.abs().max()) < 1e-12

    def test_signs_that_are_all_alike_are_one_probe(self):
        """Of two dimensions, in which two signs are alike or exact: only those alike have a variance, four times J_12^2
        on average, and so much is their squared error.
        """
        spread, J = Spread("rademacher"), symmetric(2)
        for i in range(2):
            trace, found = estimates(Divergence(probes=2), J, self.B, seed=i)
            before = spread.variance
            spread.add(found.v, found.u)
        alike = (found.v[0] * found.v[1]).sum(1).abs() == 2
        added, square = spread.variance - before, 4 * float(J[0, 1] ** 2)
        assert within(added[alike], square)
        torch.testing.assert_close(
            (trace - J.trace())[alike].square(), torch.full((int(alike.sum()),), square).double()
        )
        assert float(added[~alike].abs().max()) < 1e-12
        assert float((trace - J.trace())[~alike].abs().max()) < 1e-12

    def test_exact_traces_have_none(self):
        spread, empty = Spread("rademacher"), torch.empty(0, 3, 4).double()
        spread.add(empty, empty)
        assert float(torch.as_tensor(spread.variance)) == 0.0


class TestHutchPlusPlus:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
    @pytest.mark.parametrize("identity", [0.0, 5.0])
    def test_it_is_nearly_exact_for_a_multiple_of_the_identity_and_few_directions(self, mode, distribution, identity):
        """As many as a third of the probes: what is left is how well the multiple is known, 1 / n of the trace or so.
        One direction less of the sketch than there are is no sketch of them.
        """
        J = low_rank(400, 2) + identity * torch.eye(400).double()
        errors = [
            float(
                (estimates(Divergence("hutch++", K, distribution, mode), J, 50)[0] - J.trace()).square().mean().sqrt()
            )
            for K in (3, 12)
        ]
        assert errors[1] < errors[0] / 10

    def test_it_makes_no_matrix_of_all_dimensions(self):
        """20,000 squared would be 3.2 GB."""
        n = 20_000
        x, scale = torch.zeros(1, n).double(), torch.linspace(0, 1, n).double()
        divergence, largest = Divergence("hutch++", 6), []

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                found = func(*args, **(kwargs or {}))
                largest.extend(t.numel() for t in torch.utils._pytree.tree_leaves(found) if torch.is_tensor(t))
                return found

        probes = probes_of(divergence, x)
        with Watch():
            divergence(lambda y: y * scale, x, probes)
        assert max(largest) <= 6 * n

    def test_its_gradient_has_no_bias(self):
        def function(y):
            return torch.tanh(y) * y.roll(1, 1)

        x, divergence = normal(1, 5).expand(10_000, 5).clone().requires_grad_(), Divergence("hutch++", 3)
        found = divergence(function, x, probes_of(divergence, x), create_graph=True)
        (gradient,) = torch.autograd.grad(found.trace.sum(), x)
        one = x[:1].detach().requires_grad_()
        exact = Divergence("exact")(function, one, one.new_empty(0, 1, 5), create_graph=True)
        (expected,) = torch.autograd.grad(exact.trace.sum(), one)
        for i in range(5):
            assert within(gradient[:, i], float(expected[0, i]))

    def test_with_enough_probes_it_is_exact_for_any(self):
        J = normal(4, 4)
        for K in (12, 18):
            found, _ = estimates(Divergence("hutch++", K), J, 20)
            torch.testing.assert_close(found, J.trace().expand(20), rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
    def test_it_has_no_bias(self, mode, distribution):
        J = normal(8, 8, seed=6)
        found, _ = estimates(Divergence("hutch++", 6, distribution, mode), J, 10_000)
        assert within(found, float(J.trace()))

    def test_its_error_falls_faster_where_few_directions_are_large(self):
        n = 200
        Q, _ = torch.linalg.qr(normal(n, n))
        J = Q @ torch.diag(1 / torch.arange(1, n + 1).double() ** 2) @ Q.T

        def error(kind, K):
            found, _ = estimates(Divergence(kind, K), J, 2000, seed=K)
            return float((found - J.trace()).square().mean().sqrt())

        plain = error("hutchinson", 12)
        errors = [error("hutch++", K) for K in (3, 6, 12)]
        assert errors[0] > 2 * errors[1] > 4 * errors[2]
        assert errors[2] < plain / 3

    def test_its_spread_is_its_variance(self):
        J, total, B = symmetric(10), 0.0, 10_000
        for K in (6, 12):
            spread = Spread("rademacher")
            total, found = estimates(Divergence("hutch++", K), J, B)
            spread.add(found.v, found.u)
            ratio = float(spread.variance.mean() / total.var())
            # Given the sketch the variance is known, and the mean does not depend on it.
            assert abs(ratio - 1) < 5 * math.sqrt(12 / B)


class TestProbes:
    def test_signs_or_normals_as_many_as_asked_for(self):
        x = normal(4000, 3, 2)
        signs = probes_of(Divergence(probes=2), x)
        assert signs.shape == (2, 4000, 3, 2)
        assert signs.abs().eq(1).all()
        assert abs(float(signs.mean())) < 5 / math.sqrt(signs.numel())
        normals = probes_of(Divergence(probes=2, distribution="gaussian"), x)
        assert abs(float(normals.var()) - 1) < 5 * math.sqrt(2 / normals.numel())
        assert probes_of(Divergence("hutch++", 6), x).shape == (4, 4000, 3, 2)
        assert Divergence("hutch++", 6).estimating(probes_of(Divergence("hutch++", 6), x)).shape[0] == 2

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_their_dtype_is_that_of_x(self, dtype):
        assert probes_of(Divergence(probes=2), normal(3, 2, dtype=dtype)).dtype == dtype

    def test_a_sample_s_own_seed_decides_wherever_it_stands(self):
        seeds, x, divergence = sample_seeds(3, 5), normal(5, 2, 3), Divergence(probes=3)
        whole, alone = SeededNoise(seeds, CPU), SeededNoise(seeds[3:4], CPU)
        for row in range(4):
            v = divergence.draw(x, whole, row)
            assert torch.equal(v[:, 3:4], divergence.draw(x[3:4], alone, row))
            assert not torch.equal(v[:, 0], v[:, 1])


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"kind": "skilling"}, "hutchinson"),
        ({"kind": "Exact"}, "exact"),
        ({"distribution": "uniform"}, "rademacher"),
        ({"mode": "forward"}, "jvp"),
        ({"probes": 0}, "probes=0"),
        ({"probes": 1.5}, "probes=1.5"),
        ({"probes": True}, "probes=True"),
        ({"kind": "hutch++", "probes": 4}, "multiple of 3"),
        ({"kind": "hutch++"}, "multiple of 3"),
        ({"chunk": 0}, "chunk=0"),
        ({"chunk": 2.0}, "chunk=2.0"),
    ],
    ids=str,
)
def test_bad_options_are_named(options, word):
    with pytest.raises(ValueError, match=word.replace("+", r"\+")):
        Divergence(**options)
