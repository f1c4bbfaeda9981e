"""Measurements: adjoints, inverses against the dense matrix's, and what each operator is known to do."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv1d, conv2d, interpolate

from scoresde.guidance.operators import (
    Blur,
    Downsample,
    FourierSampling,
    Grey,
    LinearOperator,
    Mask,
    Matrix,
    Operator,
    PhaseMagnitude,
    Quantise,
    box_mask,
    check_adjoint,
    random_mask,
)
from scoresde.guidance.operators.checks import match_measurement
from tests.common import generator, normal


def frequencies(*shape: int, keep: float = 0.5, seed: int = 0) -> Tensor:
    return random_mask(shape, keep, seed).mask


def symmetric(mask: Tensor) -> Tensor:
    dims = tuple(range(mask.ndim))
    return mask | mask.flip(dims).roll([1] * mask.ndim, dims)


LINEAR: dict[str, tuple[LinearOperator, tuple[int, ...]]] = {
    "mask": (random_mask((5,), 0.4, seed=1), (5,)),
    "mask of pixels": (random_mask((5, 3), 0.4, seed=1), (2, 5, 3)),
    "box": (box_mask((5, 7), (1, 2), (4, 5)), (3, 5, 7)),
    "box in space": (box_mask((3, 5, 3), (0, 2, 1), (2, 4, 2)), (3, 5, 3)),
    "grey": (Grey(), (3, 5, 3)),
    "grey of a line": (Grey((0.299, 0.587, 0.114, 0.0)), (4, 5)),
    "blur": (Blur(1.3), (2, 7, 5)),
    "blur of a line": (Blur(0.6, dims=1), (9,)),
    "blur by a kernel": (Blur(normal(3, 4, seed=2)), (7, 5)),
    "blur by a wide kernel": (Blur(normal(9, seed=3)), (5,)),
    "blur, zero outside": (Blur(0.5, boundary="zero"), (2, 7, 5)),
    "blur by a kernel, zero outside": (Blur(normal(4, 3, seed=4), boundary="zero"), (5, 7)),
    "blur in space": (Blur(0.5, dims=3), (3, 5, 3)),
    "area": (Downsample(3), (2, 9, 3)),
    "area of a line": (Downsample(5, dims=1), (15,)),
    "bicubic": (Downsample(3, "bicubic"), (2, 15, 9)),
    "bicubic by 2": (Downsample(2, "bicubic"), (6, 10)),
    "bicubic of a line": (Downsample(3, "bicubic", dims=1), (2, 15)),
    "fourier": (FourierSampling(frequencies(5, 7)), (2, 5, 7)),
    "fourier, symmetric": (FourierSampling(symmetric(frequencies(5, 7))), (5, 7)),
    "fourier of a line": (FourierSampling(frequencies(8)), (3, 8)),
    "matrix": (Matrix(normal(4, 9, seed=5)), (9,)),
    "tall matrix": (Matrix(normal(9, 6, seed=5), (2, 3)), (2, 3)),
    "matrix without full rank": (Matrix(normal(6, 2, seed=5) @ normal(2, 9, seed=6)), (9,)),
    "composition": (Downsample(3) @ Grey() @ Blur(0.4), (3, 9, 3)),
    "masked frequencies of a mask": (FourierSampling(frequencies(5, keep=0.7)) @ random_mask((5,), 0.8, seed=3), (5,)),
}

CASES = [pytest.param(*case, id=name) for name, case in LINEAR.items()]


def dense_ridge(A: Tensor, y: Tensor, rho: float) -> Tensor:
    if rho == 0:
        return y @ torch.linalg.pinv(A, rtol=1e-10).T
    return y @ torch.linalg.solve(A @ A.T + rho * torch.eye(len(A), dtype=A.dtype), A)


@pytest.mark.parametrize(("operator", "event"), CASES)
def test_the_adjoint_is_the_transpose(operator: LinearOperator, event: tuple[int, ...]) -> None:
    x = normal(3, *event, seed=7)
    A, Ax = operator.matrix(event), operator(x)
    torch.testing.assert_close(Ax.reshape(3, -1), x.reshape(3, -1) @ A.T)
    y = normal(*Ax.shape, seed=8)
    torch.testing.assert_close(operator.adjoint(y).reshape(3, -1), y.reshape(3, -1) @ A)
    check_adjoint(operator, event)
    check_adjoint(operator, x.float())


@pytest.mark.parametrize(("operator", "event"), CASES)
def test_the_inverses_are_those_of_the_dense_matrix(operator: LinearOperator, event: tuple[int, ...]) -> None:
    """For a y inside and outside the range of A; of one ridge for all samples, and of one for each."""
    A, Ax = operator.matrix(event), operator(normal(3, *event, seed=7))
    for y in (Ax, normal(*Ax.shape, seed=8)):
        y = operator(operator.pseudo_inverse(y)) if "Sampling" in repr(operator) or "Mask" in repr(operator) else y
        flat = y.reshape(3, -1)
        scale = float(dense_ridge(A, flat, 0.0).abs().max())
        for rho in (0.0, 0.3, 20.0):
            mine = operator.ridge(y, rho)
            assert mine.shape == (3, *event)
            expected = dense_ridge(A, flat, rho)
            torch.testing.assert_close(mine.reshape(3, -1), expected, atol=1e-7 * scale, rtol=1e-6)
    each = torch.tensor([0.1, 1.0, 7.0], dtype=torch.float64)
    for i in range(3):
        alone = operator.ridge(y[i : i + 1], float(each[i]))
        torch.testing.assert_close(operator.ridge(y, each)[i : i + 1], alone, atol=1e-8 * scale, rtol=1e-6)


@pytest.mark.parametrize(("operator", "event"), CASES)
def test_measuring_a_restored_event_again_changes_nothing(operator: LinearOperator, event: tuple[int, ...]) -> None:
    """A A^+ A = A, in both precisions; and where A is said to have one singular value, it has."""
    x = normal(2, *event, seed=9)
    y = operator(x)
    torch.testing.assert_close(operator(operator.pseudo_inverse(y)), y, atol=1e-7, rtol=1e-7)
    single = operator(operator.pseudo_inverse(operator(x.float())))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), y, atol=1e-3, rtol=1e-3)
    A = operator.matrix(event)
    S = torch.linalg.svdvals(A)
    S = S[1e-9 * S[0] < S]
    same = bool((S - S[0]).abs().max() < 1e-12 * S[0])
    if operator.singular_value is not None:
        assert same
        assert operator.singular_value == pytest.approx(float(S[0]), rel=1e-12)
    elif not isinstance(operator, Blur | Downsample) and "@" not in repr(operator):
        assert not same


def test_a_mask_keeps_every_digit_and_reads_nothing_else() -> None:
    mask = box_mask((4, 5), (1, 1), (3, 4))
    x = normal(2, 3, 4, 5, dtype=torch.float32)
    y = mask(x)
    known = mask.mask.expand(3, 4, 5)
    assert torch.equal(y[:, known], x[:, known])
    assert bool((y[:, ~known] == 0).all())
    assert int((~mask.mask).sum()) == 2 * 3
    y[:, ~known] = math.nan
    assert torch.equal(mask.pseudo_inverse(y), mask(x))
    assert torch.equal(Mask(mask.mask.float())(x), mask(x))
    for keep in (0.01, 0.5, 1.0):
        assert int(random_mask((7, 9), keep, seed=0).mask.sum()) == max(1, round(keep * 63))
    assert torch.equal(random_mask((7, 9), 0.3, seed=5).mask, random_mask((7, 9), 0.3, seed=5).mask)
    assert not torch.equal(random_mask((7, 9), 0.3, seed=5).mask, random_mask((7, 9), 0.3, seed=6).mask)


def test_a_random_mask_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    random_mask((7, 9), 0.3, seed=5)
    check_adjoint(Grey(), (3, 4, 4))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("boundary", ["circular", "zero"])
def test_a_blur_is_the_convolution(boundary: Any) -> None:
    kernel, line, x = normal(3, 5), normal(5, seed=1), normal(2, 1, 7, 6, seed=2)
    mode = {"circular": "circular", "zero": "constant"}[boundary]
    padded = torch.nn.functional.pad(x, (2, 2, 1, 1), mode=mode)
    torch.testing.assert_close(Blur(kernel, boundary=boundary)(x), conv2d(padded, kernel.flip(0, 1)[None, None]))
    padded = torch.nn.functional.pad(x[:, 0], (2, 2), mode=mode)
    expected = conv1d(padded.reshape(14, 1, -1), line.flip(0)[None, None]).reshape(2, 7, 6)
    torch.testing.assert_close(Blur(line, boundary=boundary)(x[:, 0]), expected)


def test_a_gaussian_blur_keeps_the_mean_and_adds_its_variance() -> None:
    point = torch.zeros(1, 41, 41, dtype=torch.float64)
    point[0, 20, 20] = 1
    y = Blur(2.0)(point)[0]
    i = torch.arange(41, dtype=torch.float64) - 20
    assert float(y.sum()) == pytest.approx(1.0, abs=1e-12)
    assert float(y.sum(0) @ i**2) == pytest.approx(4.0, rel=5e-3)  # cut at four standard deviations
    assert float(y.sum(1) @ i) == pytest.approx(0.0, abs=1e-12)


def test_a_blur_gives_up_the_frequencies_that_it_loses() -> None:
    """In single precision a wide Gaussian leaves nothing of the highest ones: A^+ must not make noise of rounding."""
    blur, x = Blur(3.0), normal(1, 32, 32, dtype=torch.float32)
    restored = blur.pseudo_inverse(blur(x))
    assert float(restored.norm()) < 1.01 * float(x.norm())
    torch.testing.assert_close(blur(restored), blur(x), atol=1e-3, rtol=0.0)
    assert float(Blur(3.0, rtol=0.1).pseudo_inverse(blur(x)).norm()) < float(restored.norm())


def test_down_sampling_is_that_of_torch() -> None:
    x = normal(2, 3, 12, 20)
    torch.testing.assert_close(Downsample(4)(x), avg_pool2d(x, 4))
    bicubic = interpolate(x, size=(6, 10), mode="bicubic", antialias=True)
    torch.testing.assert_close(Downsample(2, "bicubic")(x), bicubic, atol=1e-6, rtol=1e-6)
    for method in ("area", "bicubic"):
        torch.testing.assert_close(Downsample(2, method)(torch.ones(1, 4, 6)), torch.ones(1, 2, 3))
        assert torch.equal(Downsample(1, method)(x), x)


def test_fourier_sampling_is_the_orthonormal_transform() -> None:
    x, mask = normal(2, 3, 6, 5), frequencies(6, 5)
    y = torch.view_as_complex(FourierSampling(mask)(x))
    full = torch.fft.fft2(x, norm="ortho")
    torch.testing.assert_close(y[..., mask], full[..., mask])
    assert bool((y[..., ~mask] == 0).all())
    everything = FourierSampling(torch.ones(6, 5))
    torch.testing.assert_close(everything.pseudo_inverse(everything(x)), x)
    torch.testing.assert_close(everything(x).norm(), x.norm())


@pytest.mark.parametrize("size", [(6, 5), (4, 8), (7,), (2,)], ids=str)
def test_what_a_transform_does_not_tell_is_not_read(size: tuple[int, ...]) -> None:
    """The imaginary part of a frequency that is its own mirror image is zero for real x: as many numbers say something
    as A A^T has rows that are not zero.
    """
    for A in (FourierSampling(frequencies(*size)), FourierSampling(torch.ones(size))):
        x = normal(2, 3, *size)
        y = A(x)
        assert torch.equal(A.observed(y), y)
        noisy = torch.where(A.observed(torch.ones_like(y)) == 1, y, math.nan)
        assert torch.equal(A.observed(noisy), y)
        assert torch.equal(A.adjoint(noisy), A.adjoint(y))
        rows = A.matrix((3, *size)).abs().amax(1) > 1e-12
        assert A.informative(y) == int(rows.sum())


def test_what_is_observed_is_what_the_outer_operator_reads() -> None:
    mask = random_mask((4, 4), 0.4, seed=1)
    for A in (mask, mask @ Blur(0.5), mask @ Grey((1.0, 2.0)), mask @ Quantise(50)):
        y = torch.full((2, 1, 4, 4), math.nan)
        y[:, :, mask.mask] = 1.0
        assert torch.equal(A.observed(y), mask.mask.expand(2, 1, 4, 4).float())
        assert A.informative(y) == int(mask.mask.sum())
    y = normal(2, 1, 4, 4)
    assert torch.equal(Blur(0.5).observed(y), y)
    assert Blur(0.5).informative(y) == 16


@pytest.mark.parametrize(("operator", "event"), CASES)
def test_an_operator_used_in_inference_mode_can_be_differentiated_afterwards(
    operator: LinearOperator, event: tuple[int, ...]
) -> None:
    kept = {
        "Blur": lambda: Blur(operator.kernel, boundary=operator.boundary),  # type: ignore[attr-defined]
        "Downsample": lambda: Downsample(operator.factor, operator.method, dims=operator.dims),  # type: ignore[attr-defined]
        "FourierSampling": lambda: FourierSampling(operator.mask),  # type: ignore[attr-defined]
        "Mask": lambda: Mask(operator.mask),  # type: ignore[attr-defined]
        "Matrix": lambda: Matrix(operator.A, operator.event_shape),  # type: ignore[attr-defined]
    }.get(type(operator).__name__, lambda: operator)
    with torch.inference_mode():
        operator = kept()
        y = operator(torch.ones(1, *event, dtype=torch.float64))
        operator.ridge(y, 0.5)
    x = normal(1, *event).requires_grad_()
    (g,) = torch.autograd.grad(operator.ridge(operator(x), 0.5).square().sum() / 2, x)
    value = operator.ridge(operator(x.detach()), 0.5)
    torch.testing.assert_close((g * x).sum(), value.square().sum(), atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(("operator", "event"), CASES)
def test_a_measurement_that_is_all_noise_says_nothing(operator: LinearOperator, event: tuple[int, ...]) -> None:
    y = operator(normal(2, *event, seed=7))
    assert bool((operator.ridge(y, math.inf) == 0).all())
    each = operator.ridge(y, torch.tensor([math.inf, 0.3], dtype=torch.float64))
    assert bool((each[0] == 0).all())
    torch.testing.assert_close(each[1], operator.ridge(y, 0.3)[1], atol=1e-8, rtol=1e-6)


def test_a_measurement_is_the_same_alone_as_among_others() -> None:
    x = normal(3, 3, 4, 4)
    operator = Downsample(2) @ Grey()
    y = operator.measure(x, 0.5)
    assert torch.equal(y[:1], operator.measure(x[:1], 0.5))
    assert torch.equal(operator.measure(x), operator(x))
    z = (y - operator(x)) / 0.5
    torch.testing.assert_close(operator.residual(x, y), 0.5 * z.square().mean((1, 2, 3)).sqrt())
    assert not torch.equal(z, (operator.measure(x, 0.5, seed=1) - operator(x)) / 0.5)


def test_a_residual_is_of_what_was_observed() -> None:
    operator = Mask(torch.tensor([True, False]))
    assert operator.residual(torch.tensor([[1.0, 7.0]]), torch.tensor([[4.0, 0.0]])).tolist() == [3.0]


def test_measurements_are_shown_as_events() -> None:
    small = torch.tensor([[[[1.0, 2.0]]]])
    assert Downsample(2).shown(small, (1, 2, 4)).tolist() == [[[[1, 1, 2, 2], [1, 1, 2, 2]]]]
    assert torch.equal(Grey().shown(small, (3, 1, 2)), small.expand(1, 3, 1, 2))
    assert Blur(1.0).shown(small, (1, 1, 2)) is small
    rows = Matrix(torch.eye(2, 3))
    assert rows.shown(torch.tensor([[5.0, 6.0]]), (3,)).tolist() == [[5, 6, 0]]
    with pytest.raises(TypeError, match="is no picture"):
        PhaseMagnitude(1).shown(small, (1, 1, 3))


def test_quantising_twice_is_quantising_once() -> None:
    for size in [(8, 8), (16, 24), (13, 7), (3, 9)]:
        x = normal(2, 3, *size).clamp(-1, 1)
        for quality in (5, 50, 90):
            y = Quantise(quality)(x)
            torch.testing.assert_close(Quantise(quality)(y), y, atol=1e-12, rtol=0.0)


def test_quantisation_loses_what_its_table_says() -> None:
    """Transformed back, each coefficient is within half of its Q, the error falls as the quality grows, and a constant
    image is rounded to multiples of 16 / 8 grey levels at quality 50.
    """
    x = normal(1, 1, 32, 32).clamp(-1, 1)
    errors = [float((Quantise(q)(x) - x).norm()) for q in (5, 25, 50, 75, 95, 100)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] <= 0.5 * (2 / 255) * 32  # Q = 1 for all at quality 100, and the transform is orthonormal
    flat = torch.full((1, 8, 8), 0.1234, dtype=torch.float64)
    levels = (0.1234 * 127.5 / 2).__round__() * 2 / 127.5
    torch.testing.assert_close(Quantise(50)(flat), torch.full_like(flat, levels))


def test_the_gradient_of_quantisation_is_straight_through() -> None:
    x, v = normal(2, 1, 11, 8).requires_grad_(), normal(2, 1, 11, 8, seed=1)
    (g,) = torch.autograd.grad((Quantise(20)(x) * v).sum(), x)
    torch.testing.assert_close(g, v)


def test_the_phase_magnitude_forgets_the_phase() -> None:
    x = normal(2, 3, 5, 4)
    operator = PhaseMagnitude()
    assert operator(x).shape == (2, 3, 10, 8)
    torch.testing.assert_close(operator(x).norm(), x.norm())
    torch.testing.assert_close(operator(-x), operator(x))
    torch.testing.assert_close(operator(x.flip(-1, -2)), operator(x))
    shifted = x.roll(1, -1)
    torch.testing.assert_close(PhaseMagnitude(oversample=1)(shifted), PhaseMagnitude(oversample=1)(x))
    assert float((operator(shifted) - operator(x)).abs().max()) > 0.1
    assert torch.autograd.gradcheck(operator, normal(1, 3, 2).requires_grad_())
    g = torch.zeros(1, 3, 2, requires_grad=True)
    operator(g).sum().backward()
    assert g.grad is not None
    assert bool(g.grad.isfinite().all())


@pytest.mark.parametrize(("operator", "event"), CASES)
def test_the_inverses_can_be_differentiated(operator: LinearOperator, event: tuple[int, ...]) -> None:
    """They are linear in y: the derivative along y is their value at it."""
    y = operator(normal(1, *event, seed=3))
    both: Any = torch.func.jvp(lambda v: operator.ridge(v, 0.5), (y,), (y,))
    value, tangent = both
    torch.testing.assert_close(tangent, value, atol=1e-7, rtol=1e-5)
    y.requires_grad_()
    (g,) = torch.autograd.grad(operator.ridge(y, 0.5).square().sum() / 2, y)
    torch.testing.assert_close((g * y).sum(), value.square().sum(), atol=1e-7, rtol=1e-5)


class Wrong(LinearOperator):
    """A shift whose adjoint shifts the same way."""

    def __call__(self, x: Tensor) -> Tensor:
        return x.roll(1, -1)

    def adjoint(self, y: Tensor) -> Tensor:
        return y.roll(1, -1)


class Reshaped(LinearOperator):
    def __call__(self, x: Tensor) -> Tensor:
        return x.flatten(1)

    def adjoint(self, y: Tensor) -> Tensor:
        return y


def test_a_wrong_adjoint_is_found() -> None:
    with pytest.raises(ValueError, match="fails the dot-product test"):
        check_adjoint(Wrong(), (5,))
    with pytest.raises(ValueError, match="the adjoint returns"):
        check_adjoint(Reshaped(), (2, 3))
    with pytest.raises(TypeError, match="needs a LinearOperator"):
        check_adjoint(Quantise(), (1, 8, 8))  # type: ignore[arg-type]


class Diagonal(LinearOperator):
    """Singular values from 1 to 1e-9, and no inverse in closed form."""

    def __call__(self, x: Tensor) -> Tensor:
        return torch.logspace(0, -9, x.shape[1], dtype=torch.float64).to(x) * x

    def adjoint(self, y: Tensor) -> Tensor:
        return self(y)


def test_conjugate_gradients_say_so_where_they_do_not_converge() -> None:
    y = normal(2, 1000)
    with pytest.raises(ArithmeticError, match="relative residual"):
        Diagonal().pseudo_inverse(y)
    with pytest.raises(ArithmeticError, match=r"relative residual of [0-9]"):  # a zero beside it, and gradients
        Diagonal().pseudo_inverse(torch.cat([y, torch.zeros(1, 1000)]).requires_grad_())
    torch.testing.assert_close(Diagonal().ridge(y, 1e-2), dense_ridge(Diagonal().matrix((1000,)), y, 1e-2))
    blur = Blur(4.0, boundary="zero", dims=1)  # what it loses does not matter to what it measures
    y = blur(normal(2, 64))
    torch.testing.assert_close(blur(blur.pseudo_inverse(y)), y, atol=1e-4, rtol=0.0)


def test_compositions_compose() -> None:
    x = normal(2, 3, 8, 8)
    jpeg = Quantise(30) @ Downsample(2)
    assert isinstance(jpeg, Operator)
    assert not isinstance(jpeg, LinearOperator)
    assert torch.equal(jpeg(x), Quantise(30)(Downsample(2)(x)))
    assert repr(jpeg) == "Quantise(quality=30, span=2) @ Downsample(2, 'area', dims=2)"
    with pytest.raises(TypeError):
        Downsample(2) @ 3  # type: ignore[operator]


def test_operators_follow_the_dtype() -> None:
    cases: list[tuple[Operator, tuple[int, ...]]] = [
        *LINEAR.values(),
        (Quantise(), (1, 9, 8)),
        (PhaseMagnitude(), (5, 3)),
    ]
    for operator, event in cases:
        x = torch.randn(1, *event, generator=generator())
        y = operator(x)
        assert y.dtype == torch.float32
        torch.testing.assert_close(
            y.double(), operator(x.double()), atol=1e-2 if "Quant" in repr(operator) else 1e-5, rtol=1e-5
        )
        if isinstance(operator, LinearOperator):
            assert operator.adjoint(y).dtype == operator.ridge(y, 1.0).dtype == torch.float32


def test_a_measurement_is_checked() -> None:
    x, grey = torch.zeros(4, 3, 8, 8), Grey()
    assert match_measurement(grey, torch.zeros(1, 1, 8, 8, dtype=torch.float64), x).dtype == torch.float32
    assert match_measurement(grey, torch.zeros(4, 1, 8, 8), x).shape == (4, 1, 8, 8)
    with pytest.raises(ValueError, match="y has 3 entries for 4 samples"):
        match_measurement(grey, torch.zeros(3, 1, 8, 8), x)
    for y in (torch.zeros(1, 8, 8), torch.zeros(1, 1, 8, 8).int(), None):
        with pytest.raises(ValueError, match="gives \\(B, 1, 8, 8\\)"):
            match_measurement(grey, y, x)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mask(torch.tensor([0.5, 1.0])), "mask is"),
        (lambda: Mask(torch.zeros(3)), "mask is"),
        (lambda: Mask([True]), "mask is list"),  # type: ignore[arg-type]
        (lambda: Mask(torch.ones(3))(torch.zeros(2, 4)), "does not broadcast"),
        (lambda: Mask(torch.ones(2, 3))(torch.zeros(2, 3)), "does not broadcast"),
        (lambda: box_mask((4, 4), (0, 2), (5, 3)), "box from"),
        (lambda: box_mask((4, 4), (0,), (5,)), "box from"),
        (lambda: box_mask((4,), (0,), (4,)), "mask is"),
        (lambda: random_mask((4,), 0.0, 0), "keep=0"),
        (lambda: Grey((0.0, 0.0)), "weights="),
        (lambda: Grey()(torch.zeros(2, 4, 5)), "3 weights"),
        (lambda: Blur(0.0), "std=0.0: expected a finite number > 0"),
        (lambda: Blur(torch.zeros(3)), "kernel is"),
        (lambda: Blur(1.0, boundary="mirror"), "boundary='mirror'"),  # type: ignore[arg-type]
        (lambda: Blur(1.0)(torch.zeros(2, 5)), "beside the batch"),
        (lambda: Downsample(0), "factor=0"),
        (lambda: Downsample(2, "lanczos"), "method='lanczos'"),  # type: ignore[arg-type]
        (lambda: Downsample(3)(torch.zeros(1, 9, 8)), "multiples of 3"),
        (lambda: Downsample(3)(torch.zeros(1, 9)), "multiples of 3"),
        (lambda: FourierSampling(torch.ones(4, 4))(torch.zeros(1, 4, 5)), "trailing dimensions"),
        (lambda: Matrix(torch.ones(3)), "expected a finite"),
        (lambda: Matrix(torch.ones(3, 4), (5,)), "event_shape"),
        (lambda: Matrix(torch.ones(3, 4))(torch.zeros(1, 5)), "expected \\(B, 4\\)"),
        (lambda: Quantise(0), "quality=0"),
        (lambda: Quantise()(torch.zeros(1, 8)), "H, W"),
        (lambda: PhaseMagnitude(0), "dims=0"),
        (lambda: PhaseMagnitude()(torch.zeros(1, 8)), "beside the batch"),
    ],
)
def test_bad_input_is_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
