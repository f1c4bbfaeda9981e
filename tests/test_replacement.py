"""Replacement, RePaint and DDNM against exact conditionals: what they keep, what they leave alone, and their bias."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from scoresde import SDE, VPSDE, Denoiser, Grid, NonFiniteError, Posterior, X0Denoiser, sample
from scoresde.exact import Gaussian
from scoresde.guidance.operators import (
    Downsample,
    FourierSampling,
    Grey,
    LinearOperator,
    Mask,
    Matrix,
    Quantise,
    box_mask,
)
from scoresde.guidance.projections import DDNM
from scoresde.guidance.replacement import RePaint, Replacement
from scoresde.likelihood.flow import log_prob
from scoresde.noise import sample_seeds
from scoresde.solvers import DDIM, DDPM, AdaptiveODE, Heun, PredictorCorrector, ReverseSDE, Solver, TimeTravel, UniPC
from scoresde.solvers.catalogue import available
from scoresde.variance.solver import OptimalVariance
from tests.common import SDES, Counting, Nonlinear, generator, normal, start_of

KNOWN = torch.tensor([True, False, True])
MEASURED = torch.tensor([[0.7, 0.0, -1.2]], dtype=torch.float64)

WITH_TABLE = {e.name: e.solver for e in available() if not e.adaptive and not isinstance(e.solver, ReverseSDE)} | {
    "pc, corrector first": PredictorCorrector(order="corrector", corrector_steps=2),
    "pc of heun": PredictorCorrector(Heun(), corrector_steps=2),
    "optimal variance": OptimalVariance(DDIM(1.0)),
    "travel of heun": TimeTravel(Heun(), jump=2, repeats=3),
}


class Wrong(LinearOperator):
    """A shift whose adjoint shifts the same way."""

    def __call__(self, x: Tensor) -> Tensor:
        return x.roll(1, -1)

    def adjoint(self, y: Tensor) -> Tensor:
        return y.roll(1, -1)


def independent() -> Gaussian:
    return Gaussian(mean=[0.5, -1.0, 0.3], std=[0.5, 0.8, 1.1])


def correlated() -> Gaussian:
    A = torch.tensor([[1.0, 0.8, 0.0], [0.8, 1.0, -0.3], [0.0, -0.3, 0.6]])
    return Gaussian(mean=[0.5, -1.0, 0.3], cov=A)


def grid_of(sde: SDE) -> Grid:
    """A grid at whose start every method is defined, with times that Restart's interval needs."""
    return Grid.power(sde, 9, start=start_of(sde))


@pytest.mark.parametrize("sde_name", ["vp", "ve", "flow", "chain"])
@pytest.mark.parametrize("name", WITH_TABLE)
def test_every_evaluation_sees_the_measurement_with_its_own_noise(name: str, sde_name: str) -> None:
    """With all noise zero, the known part of what the denoiser sees at t is alpha_t y: at each prediction, each
    correction and each stage.
    """
    sde = SDES[sde_name]
    seen: list[tuple[float, Tensor]] = []

    class Recording(Denoiser):
        def __init__(self) -> None:
            self.sde, self.inner = sde, correlated().denoiser(sde)

        def posterior(self, x: Tensor, t: Any, /, **cond: Any) -> Posterior:
            seen.append((float(t), x.clone()))
            return self.inner.posterior(x, t)

    solver = Replacement(WITH_TABLE[name], KNOWN, MEASURED)
    grid = grid_of(sde)
    solution = sample(Recording(), normal(2, 3), solver, grid=grid, noise=lambda row, x: torch.zeros_like(x))
    assert len(seen) == solution.nfe == solver.evaluations(grid)
    for t, x in seen:
        torch.testing.assert_close(x[:, KNOWN], float(sde.alpha(t)) * MEASURED[:, KNOWN].expand(2, 2))
    assert torch.equal(solution.x[:, KNOWN], MEASURED[:, KNOWN].expand(2, 2))


@pytest.mark.parametrize("name", [name for name in WITH_TABLE if not name.startswith("pc") or name == "pc-ald"])
def test_what_is_independent_of_the_measurement_is_left_alone(name: str) -> None:
    """Bit for bit the same samples as without one, so exact."""
    denoiser, solver, x = independent().denoiser(VPSDE()), WITH_TABLE[name], normal(2, 3)
    grid = Grid.karras(VPSDE(), 12)
    rows: dict[int, Tensor] = {}

    def noise(row: int, x: Tensor) -> Tensor:
        return rows.setdefault(row, normal(*x.shape, seed=row)).clone()

    alone = sample(denoiser, x, solver, grid=grid, noise=noise)
    restored = sample(denoiser, x, Replacement(solver, KNOWN, MEASURED), grid=grid, noise=noise)
    assert torch.equal(restored.x[:, ~KNOWN], alone.x[:, ~KNOWN])
    assert torch.equal(restored.x[:, KNOWN], MEASURED[:, KNOWN].expand(2, 2))
    assert restored.nfe == alone.nfe


OPERATORS: dict[str, tuple[LinearOperator, tuple[int, ...]]] = {
    "box": (box_mask((4, 5), (1, 1), (3, 4)), (3, 4, 5)),
    "mask of a line": (Mask(KNOWN), (3,)),
    "mask in space": (box_mask((2, 3, 2, 2), (0, 0, 0, 0), (2, 2, 1, 2)), (2, 3, 2, 2)),
    "grey": (Grey(), (3, 4, 5)),
    "area": (Downsample(2), (1, 4, 6)),
    "bicubic": (Downsample(2, "bicubic"), (4, 6)),
    "fourier": (FourierSampling(torch.rand(4, 5, generator=generator()) < 0.5), (4, 5)),
    "matrix": (Matrix(normal(2, 4)), (4,)),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_the_result_has_the_measurement_and_the_rest_is_the_mean(name: str) -> None:
    """A x = y at the end, exactly for a mask, in single precision; and what A does not see, the last evaluation's D."""
    operator, event = OPERATORS[name]
    denoiser = Nonlinear(VPSDE())
    last: list[Tensor] = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        last[:] = [denoiser.posterior(x, t).mean]
        return last[0]

    for batch in (1, 3):
        y = operator(normal(batch, *event, seed=1, dtype=torch.float32))
        for solver in (Replacement(DDPM(), operator, y), RePaint(operator, y, jump=2, resamplings=2)):
            x = sample(X0Denoiser(net, VPSDE()), (3, *event), solver, steps=6, seed=0).x
            if isinstance(operator, Mask):
                assert torch.equal(operator(x), y.expand(3, *y.shape[1:]))
            torch.testing.assert_close(operator(x), y.expand(3, *y.shape[1:]), atol=1e-5, rtol=1e-5)
            rest, expected = (v - operator.pseudo_inverse(operator(v)) for v in (x, last[0]))
            torch.testing.assert_close(rest, expected, atol=1e-5, rtol=1e-5)
        D = DDNM(X0Denoiser(net, VPSDE()), operator, y)(x, 0.4).mean
        torch.testing.assert_close(operator(D), y.expand(3, *y.shape[1:]), atol=1e-5, rtol=1e-5)
        x = sample(DDNM(X0Denoiser(net, VPSDE()), operator, y), (3, *event), UniPC(2), steps=6, seed=0).x
        torch.testing.assert_close(operator(x), y.expand(3, *y.shape[1:]), atol=1e-5, rtol=1e-5)


def test_a_mask_of_the_measurement_need_not_be_told_the_rest() -> None:
    """NaN outside of the mask is not read."""
    y = torch.where(KNOWN, MEASURED, math.nan)
    denoiser = correlated().denoiser(VPSDE())
    for wrapped, solver in ((denoiser, Replacement(DDPM(), KNOWN, y)), (DDNM(denoiser, Mask(KNOWN), y), DDPM())):
        x = sample(wrapped, normal(2, 3), solver, steps=5, seed=0).x
        assert torch.equal(x[:, KNOWN], MEASURED[:, KNOWN].expand(2, 2))
        assert bool(x.isfinite().all())


@pytest.mark.parametrize("make", [lambda y: Replacement(DDPM(), KNOWN, y), lambda y: RePaint(KNOWN, y, jump=2)])
def test_a_sample_is_the_same_in_any_batch(make: Any) -> None:
    denoiser, y = correlated().denoiser(VPSDE()), normal(4, 3)
    together = sample(denoiser, (4, 3), make(y), steps=8, seed=11)
    for i, seed in enumerate(sample_seeds(11, 4)):
        alone = sample(denoiser, (1, 3), make(y[i : i + 1]), steps=8, seed=[seed])
        torch.testing.assert_close(alone.x[0], together.x[i], atol=1e-6, rtol=1e-6)
    again = sample(denoiser, (4, 3), make(y), steps=8, seed=11, trajectory=True)
    assert torch.equal(again.x, together.x)
    assert again.trajectory is not None
    assert torch.equal(again.trajectory[-1], again.x)


def test_the_weight_of_grey_does_not_matter_and_colours_are_those_of_the_rotation() -> None:
    """Song et al. (2021): channel 0 of an orthonormal rotation whose first axis is (1, 1, 1) / sqrt(3) is inpainted."""
    denoiser = Nonlinear(VPSDE())
    y = normal(1, 1, 4, 5)
    axis = torch.full((3, 1), 3**-0.5, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.cat([axis, normal(3, 2)], dim=1)).Q
    rotation = rotation * torch.sign(rotation[0, 0])

    class Rotated(Denoiser):
        sde = denoiser.sde

        def posterior(self, x: Tensor, t: Any, /, **cond: Any) -> Posterior:
            mean = denoiser.posterior(torch.einsum("ij,bjhw->bihw", rotation, x), t).mean
            return Posterior(torch.einsum("ji,bjhw->bihw", rotation, mean))

    def noise(row: int, x: Tensor) -> Tensor:
        return normal(*x.shape, seed=row)

    def turned(row: int, x: Tensor) -> Tensor:
        return torch.einsum("ji,bjhw->bihw", rotation, noise(row, x))

    x_T, grid = normal(2, 3, 4, 5, seed=3), Grid.uniform(VPSDE(), 6)
    mean = sample(denoiser, x_T, Replacement(DDPM(), Grey(), y), grid=grid, noise=noise).x
    channel = 3**0.5 * y
    first = sample(denoiser, x_T, Replacement(DDPM(), Grey((3**-0.5,) * 3), channel), grid=grid, noise=noise).x
    torch.testing.assert_close(first, mean)
    mask = torch.tensor([True, False, False])[:, None, None]
    inpaint = Replacement(DDPM(), mask, channel * torch.ones(1, 3, 1, 1, dtype=torch.float64))
    start = torch.einsum("ji,bjhw->bihw", rotation, x_T)
    rotated = sample(Rotated(), start, inpaint, grid=grid, noise=turned).x
    torch.testing.assert_close(torch.einsum("ij,bjhw->bihw", rotation, rotated), mean)


# The law of the samples, on two correlated numbers of which one is known.

R = 0.9
PAIR = Gaussian(mean=[0.0, 0.0], cov=[[1.0, R], [R, 1.0]])
FIRST, Y = torch.tensor([True, False]), 1.5
EXACT_MEAN, EXACT_STD = R * Y, math.sqrt(1 - R**2)


def second(solver: Solver, steps: int, batch: int, denoiser: Denoiser | None = None) -> tuple[float, float]:
    """Mean and standard deviation of the unknown number."""
    denoiser = denoiser or PAIR.denoiser(VPSDE())
    x = sample(denoiser, normal(batch, 2), solver, steps=steps, generator=generator(1)).x
    assert bool((x[:, 0] == Y).all())
    return float(x[:, 1].mean()), float(x[:, 1].std())


def replaced_law(solver: Solver, steps: int) -> tuple[float, float]:
    """Mean and standard deviation of the unknown number as the table makes it, exactly: the known one is a fresh draw
    from N(alpha y, sigma^2) for every row, and D is linear.
    """
    sde = VPSDE()
    table = solver.tableau(solver.grid(sde, steps))
    assert bool(((table.p == 0) & (table.q == 1)).all())
    C = torch.tensor([[1.0, R], [R, 1.0]], dtype=torch.float64)
    mean, var = 0.0, 1.0
    for i in range(len(table)):
        alpha, sigma = float(sde.alpha(table.t[i])), float(sde.sigma(table.t[i]))
        gain = alpha * C @ torch.linalg.inv(alpha**2 * C + sigma**2 * torch.eye(2, dtype=torch.float64))
        a, b, c = float(table.a[i]), float(table.b[i, 0]), float(table.c[i])
        of_known, of_unknown = b * float(gain[1, 0]), a + b * float(gain[1, 1])
        mean = of_unknown * mean + of_known * alpha * Y
        var = of_unknown**2 * var + of_known**2 * sigma**2 + c**2
    return mean, math.sqrt(var)


@pytest.mark.parametrize("solver", [DDPM(), DDIM()], ids=["ddpm", "ddim"])
def test_replacement_has_the_law_of_its_chain(solver: Solver) -> None:
    batch = 40_000
    mean, std = second(Replacement(solver, FIRST, torch.tensor([[Y, 0.0]])), 20, batch)
    expected, width = replaced_law(solver, 20)
    assert mean == pytest.approx(expected, abs=5 * width / math.sqrt(batch))
    assert std == pytest.approx(width, abs=5 * width / math.sqrt(2 * batch))


def test_the_bias_of_replacement_does_not_go_away_with_steps() -> None:
    """On numbers of correlation 0.9 the mean comes out at 0.94 instead of 1.35, the width at 0.55 instead of 0.44."""
    laws = [replaced_law(DDPM(), steps) for steps in (100, 400, 1600)]
    assert laws[-1][0] == pytest.approx(0.94, abs=0.01)
    assert laws[-1][1] == pytest.approx(0.55, abs=0.01)
    assert abs(laws[2][0] - laws[1][0]) < 0.2 * abs(laws[1][0] - laws[0][0]) + 1e-3
    assert EXACT_MEAN - laws[-1][0] > 0.4


def test_resampling_takes_the_bias_away() -> None:
    """Each time the error of the mean falls by more than the samples' own, to less than a tenth of replacement's."""
    batch, errors = 10_000, []
    for resamplings in (1, 2, 5, 16):
        solver = RePaint(FIRST, torch.tensor([[Y, 0.0]]), jump=1, resamplings=resamplings)
        mean, std = second(solver, 30, batch)
        errors.append(EXACT_MEAN - mean)
    noise = 5 * EXACT_STD / math.sqrt(batch)
    assert all(before > after + noise for before, after in pairwise(errors))
    assert errors[-1] < 0.1 * errors[0]
    assert std == pytest.approx(EXACT_STD, abs=0.05)


def test_repaint_costs_its_resamplings() -> None:
    y = torch.tensor([[Y, 0.0]])
    denoiser = Counting(PAIR.denoiser(VPSDE()))
    for jump, resamplings, expected in ((5, 3, 15 * 3 + 5), (5, 1, 20), (10, 4, 10 * 4 + 10), (3, 2, 18 * 2 + 2)):
        solver = RePaint(FIRST, y, jump=jump, resamplings=resamplings)
        solution = sample(denoiser, normal(2, 2), solver, steps=20, seed=0)
        assert solution.nfe == len(denoiser.times) == solver.evaluations(solution.grid) == expected
        denoiser.times.clear()
    assert sample(denoiser, normal(2, 2), RePaint(FIRST, y, jump=5, resamplings=3), nfe=50, seed=0).nfe <= 50
    once = sample(denoiser, normal(2, 2), RePaint(FIRST, y, resamplings=1), steps=7, seed=0)
    assert torch.equal(once.x, sample(denoiser, normal(2, 2), Replacement(DDPM(), FIRST, y), steps=7, seed=0).x)


@pytest.mark.parametrize("resamplings", [1, 2])
@pytest.mark.parametrize("sde_name", ["vp", "ve"])
def test_a_noisy_measurement_is_denoised_by_the_model(sde_name: str, resamplings: int) -> None:
    """A number N(0.4, 0.7^2) that was measured with noise, apart from another: the posterior is known, and replacement
    up to the noise of y, then the model alone, samples it, if time travel does not go on below.
    """
    sde, noise_std, y = SDES[sde_name], 0.5, 1.2
    denoiser = Gaussian(mean=[0.4, -1.0], std=[0.7, 0.3]).denoiser(sde)
    precision = 1 / 0.7**2 + 1 / noise_std**2
    mean, std = (0.4 / 0.7**2 + y / noise_std**2) / precision, precision**-0.5
    batch = 20_000
    solver = RePaint(FIRST, torch.tensor([[y, 0.0]]), noise_std, jump=3, resamplings=resamplings)
    grid = Grid.log_snr(sde, 150)
    x = sample(denoiser, sde.prior_std * normal(batch, 2), solver, grid=grid, generator=generator(2)).x
    assert float(x[:, 0].mean()) == pytest.approx(mean, abs=5 * std / math.sqrt(batch) + 0.01)
    assert float(x[:, 0].std()) == pytest.approx(std, abs=5 * std / math.sqrt(2 * batch) + 0.01)
    assert float(x[:, 1].mean()) == pytest.approx(-1.0, abs=5 * 0.3 / math.sqrt(batch) + 0.01)
    assert float(x[:, 1].std()) == pytest.approx(0.3, abs=5 * 0.3 / math.sqrt(2 * batch) + 0.01)


def test_replacement_names_what_is_not_finite() -> None:
    class Breaking(Denoiser):
        sde = VPSDE()

        def posterior(self, x: Tensor, t: Any, /, **cond: Any) -> Posterior:
            bad = (torch.arange(len(x)) == 2) & (float(t) < 0.45)
            return Posterior(torch.where(bad[:, None], math.nan, x))

    for solver in (Replacement(DDPM(), KNOWN, MEASURED), Replacement(PredictorCorrector(), KNOWN, MEASURED)):
        with pytest.raises(NonFiniteError, match="sample 2 became non-finite") as error:
            sample(Breaking(), (4, 3), solver, steps=10, seed=0)
        assert error.value.samples == [2]
        assert error.value.time is not None
        assert error.value.time < 0.45


def test_gradients_flow_through_replacement() -> None:
    denoiser, x, y = Nonlinear(VPSDE()), normal(2, 3), MEASURED.clone()

    def run(x: Tensor, y: Tensor) -> Tensor:
        solver = Replacement(Heun(), KNOWN, y)
        return sample(
            denoiser, x, solver, steps=3, noise=lambda row, x: normal(*x.shape, seed=row), differentiable=True
        ).x

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), y.requires_grad_()))


def test_the_caller_s_tensors_are_not_changed() -> None:
    x, y = normal(2, 3), MEASURED.clone()
    before = x.clone()
    sample(Nonlinear(VPSDE()), x, Replacement(UniPC(3), KNOWN, y), steps=4, seed=0)
    assert torch.equal(x, before)
    assert torch.equal(y, MEASURED)


# DDNM


@pytest.mark.parametrize("name", ["ddpm", "ddim", "heun", "unipc3", "pc-ald"])
def test_ddnm_leaves_alone_what_is_independent(name: str) -> None:
    denoiser, x = independent().denoiser(VPSDE()), normal(2, 3)
    solver = WITH_TABLE[name]
    alone = sample(denoiser, x, solver, steps=7, seed=0)
    restored = sample(DDNM(denoiser, Mask(KNOWN), MEASURED), x, solver, steps=7, seed=0)
    torch.testing.assert_close(restored.x[:, ~KNOWN], alone.x[:, ~KNOWN], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(restored.x[:, KNOWN], MEASURED[:, KNOWN].expand(2, 2), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    "operator", [Mask(KNOWN), Matrix(normal(2, 3, seed=4)), Matrix(normal(4, 3, seed=4))], ids=repr
)
def test_ddnm_is_exact_for_white_data_and_a_noisy_measurement(operator: LinearOperator) -> None:
    """Prior N(0, s^2 I): the posterior of y = A x + noise is a Gaussian, whose denoiser DDNM is, so that it gives its
    density too.
    """
    s, noise_std, sde = 0.7, 0.4, VPSDE()
    A, y = operator.matrix((3,)), operator(normal(1, 3, seed=5))
    precision = torch.eye(3, dtype=torch.float64) / s**2 + A.T @ A / noise_std**2
    cov = torch.linalg.inv(precision)
    exact = Gaussian(mean=(cov @ A.T @ y[0]) / noise_std**2, cov=(cov + cov.T) / 2)
    mine = DDNM(Gaussian(mean=torch.zeros(3), std=s).denoiser(sde), operator, y, noise_std, data_std=s)
    x = normal(4, 3)
    for t in (1e-3, 0.3, 1.0, torch.tensor([0.1, 0.2, 0.5, 0.9])):
        torch.testing.assert_close(mine(x, t).mean, exact.denoiser(sde)(x, t).mean, atol=1e-9, rtol=1e-7)
    found = log_prob(mine, x[:2], divergence="exact", rtol=1e-6, atol=1e-6, t=1e-3)
    torch.testing.assert_close(found.value, exact.log_prob(x[:2], sde, 1e-3), atol=1e-3, rtol=1e-3)


def test_ddnm_is_biased_where_the_parts_depend_on_each_other() -> None:
    """A sample's own noise in the known part tells less of it than y does, and DDNM does not know."""
    denoiser = DDNM(PAIR.denoiser(VPSDE()), Mask(FIRST), torch.tensor([[Y, 0.0]]))
    mean, std = second(DDPM(), 100, 10_000, denoiser)
    assert 0.5 * EXACT_MEAN < mean < 0.8 * EXACT_MEAN
    assert std > 1.2 * EXACT_STD


@pytest.mark.parametrize("batch", [2, 5])
def test_a_measurement_of_the_wrong_batch_is_refused_before_the_network(batch: int) -> None:
    denoiser, y = Counting(Nonlinear(VPSDE())), normal(batch, 3)
    message = f"y has {batch} entries for 4 samples"
    for solver in (Replacement(DDPM(), KNOWN, y), RePaint(KNOWN, y)):
        with pytest.raises(ValueError, match=message):
            sample(denoiser, (4, 3), solver, steps=3, seed=0)
    with pytest.raises(ValueError, match=message):
        DDNM(denoiser, Mask(KNOWN), y)(normal(4, 3), 0.5)
    assert denoiser.times == []


def test_bad_input_is_named_before_the_network() -> None:
    denoiser, x = Counting(Nonlinear(VPSDE())), normal(4, 3)

    def run(solver: Solver, **how: Any) -> None:
        sample(denoiser, x, solver, **({"steps": 3, "seed": 0} | how))

    for y in (torch.zeros(3), torch.zeros(1, 4), torch.zeros(1, 3, dtype=torch.int64)):
        with pytest.raises(ValueError, match="gives \\(B, 3\\)"):
            run(Replacement(DDPM(), KNOWN, y))
        with pytest.raises(ValueError, match="gives \\(B, 3\\)"):
            DDNM(denoiser, Mask(KNOWN), y)(x, 0.5)
    with pytest.raises(ValueError, match="y is not finite"):
        run(Replacement(DDPM(), KNOWN, math.nan * MEASURED))
    with pytest.raises(ValueError, match="y is not finite"):
        DDNM(denoiser, Mask(KNOWN), math.nan * MEASURED)(x, 0.5)
    with pytest.raises(ValueError, match="fails the dot-product test"):
        run(Replacement(DDPM(), Wrong(), MEASURED))
    with pytest.raises(ValueError, match="fails the dot-product test"):
        DDNM(denoiser, Wrong(), MEASURED)(x, 0.5)
    with pytest.raises(ValueError, match="increasing grid"):
        run(Replacement(DDIM(), KNOWN, MEASURED), steps=None, grid=Grid.uniform(VPSDE(), 3, end=0.1).reversed())
    with pytest.raises(ValueError, match="does not broadcast"):
        run(Replacement(DDPM(), torch.ones(4), MEASURED))
    with pytest.raises(ValueError, match="path=True"):
        run(Replacement(DDPM(), KNOWN, MEASURED), path=True)
    for solver in (AdaptiveODE(), ReverseSDE(), Replacement(DDPM(), KNOWN, MEASURED)):
        with pytest.raises(TypeError, match="has no table"):
            run(Replacement(solver, KNOWN, MEASURED))
    grid = Grid.uniform(VPSDE(), 3)
    with pytest.raises(ValueError, match="draws noise"):
        Replacement(DDIM(), KNOWN, MEASURED).iterate(denoiser, x, grid)
    with pytest.raises(ValueError, match="the grid was made for"):
        Replacement(DDIM(), KNOWN, MEASURED).iterate(Nonlinear(SDES["ve"]), x, grid)
    assert denoiser.times == []
    for make in (lambda op: Replacement(DDPM(), op, MEASURED), lambda op: DDNM(denoiser, op, MEASURED)):
        with pytest.raises(TypeError, match="needs a LinearOperator"):
            make(Quantise())
    with pytest.raises(TypeError, match="wraps a solver"):
        Replacement(DDPM, KNOWN, MEASURED)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one singular value"):
        Replacement(DDPM(), Matrix(normal(2, 3)), MEASURED, noise_std=0.1)
    with pytest.raises(ValueError, match="noise_std=-1"):
        Replacement(DDPM(), KNOWN, MEASURED, noise_std=-1)
    with pytest.raises(ValueError, match="noise_std=-1"):
        DDNM(denoiser, Mask(KNOWN), MEASURED, noise_std=-1)
    with pytest.raises(ValueError, match="repeats=0"):
        RePaint(KNOWN, MEASURED, resamplings=0)
    with pytest.raises(ValueError, match="single steps"):
        RePaint(KNOWN, MEASURED, solver=UniPC(2))  # type: ignore[arg-type]
