"""The Frechet distance against its closed forms."""

import math
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from scoresde.metrics import frechet_distance


def features(n: int, d: int, seed: int = 0) -> Tensor:
    """Correlated features, of mean and widths of order one."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=generator, dtype=torch.float64) / math.sqrt(d)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return x @ mixing + torch.randn(d, generator=generator, dtype=torch.float64)


def whitened(n: int, d: int, seed: int = 0) -> Tensor:
    """Features whose sample mean is 0 and sample covariance the identity, to rounding."""
    x = features(n, d, seed)
    x = x - x.mean(0)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(x.T.cov()), x.T, upper=False).T


@pytest.mark.parametrize(("n", "d"), [(10, 1), (100, 5), (300, 64)])
def test_a_set_is_at_no_distance_from_itself(n: int, d: int) -> None:
    x = features(n, d)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(x, x.flip(0)) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("d", [1, 5, 64])
def test_a_shift_costs_its_squared_length(d: int) -> None:
    x, shift = features(200, d), torch.linspace(1, 2, d, dtype=torch.float64)
    assert frechet_distance(x, x + shift) == pytest.approx(float(shift @ shift), rel=1e-10)


@pytest.mark.parametrize("factor", [0.0, 0.5, 3.0])
def test_a_scaling_costs_its_part_of_the_trace(factor: float) -> None:
    """C_y = c^2 C_x gives (1 - c)^2 tr C_x, about a common mean."""
    x = features(200, 6)
    x = x - x.mean(0)
    expected = (1 - factor) ** 2 * float(x.T.cov().trace())
    assert frechet_distance(x, factor * x) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("d", [2, 8])
def test_commuting_covariances(d: int) -> None:
    """With common axes the distance is that of the widths, |sd_x - sd_y|^2, whatever the axes."""
    sd_x, sd_y = torch.linspace(0.1, 3, d).double(), torch.linspace(2, 0.5, d).double()
    axes = torch.linalg.qr(features(d, d, seed=3)).Q
    x, y = (whitened(100, d, seed) * sd @ axes.T for seed, sd in ((1, sd_x), (2, sd_y)))
    assert frechet_distance(x, y) == pytest.approx(float((sd_x - sd_y).square().sum()), rel=1e-10)


@pytest.mark.parametrize(("n", "m", "d"), [(50, 80, 1), (50, 80, 3), (300, 200, 32)])
def test_agrees_with_the_usual_formula(n: int, m: int, d: int) -> None:
    """|mu_x - mu_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^{1/2}), by scipy (Heusel et al., 2017), of full rank."""
    x, y = features(n, d, 1), features(m, d, 2)
    C_x, C_y = (np.cov(z.numpy(), rowvar=False).reshape(d, d) for z in (x, y))
    root = scipy.linalg.sqrtm(C_x @ C_y).real
    expected = float((x.mean(0) - y.mean(0)).square().sum()) + np.trace(C_x + C_y - 2 * root)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(("n", "m", "d"), [(50, 80, 4), (5, 7, 12), (200, 3, 20)])
def test_symmetric_and_invariant_under_rigid_motions(n: int, m: int, d: int) -> None:
    x, y = features(n, d, 1), features(m, d, 2)
    rotation, shift = torch.linalg.qr(features(d, d, 3)).Q, torch.arange(d, dtype=torch.float64)
    distance = frechet_distance(x, y)
    assert frechet_distance(y, x) == pytest.approx(distance, rel=1e-6)
    assert frechet_distance(x @ rotation + shift, y @ rotation + shift) == pytest.approx(distance, rel=1e-6)


@pytest.mark.parametrize(("n", "d"), [(2, 3), (5, 20), (10, 100), (50, 300)])
def test_fewer_samples_than_features(n: int, d: int) -> None:
    """Rank-deficient covariances: zero from itself, never below zero, and |shift|^2 still.

    An eigenvalue that should be 0 is 1e-17, and its root 1e-9 or so, times the d of them: they must not add up.
    """
    x = features(n, d)
    assert frechet_distance(x, x) >= -1e-9
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + 1) == pytest.approx(d, rel=1e-9)
    assert frechet_distance(x, features(n, d, 1)) > 0


def test_features_that_never_vary() -> None:
    """A dead unit has no width in either set; constant sets differ by their means alone."""
    x, y = features(50, 3, 1), features(60, 3, 2)
    dead = [torch.cat([z, torch.zeros(len(z), 2, dtype=torch.float64)], dim=1) for z in (x, y)]
    assert frechet_distance(*dead) == pytest.approx(frechet_distance(x, y), rel=1e-7)
    assert frechet_distance(torch.zeros(3, 2), torch.ones(4, 2)) == 2


def test_float32_features_are_reduced_in_float64() -> None:
    """Features far from the origin, as activations are, lose their covariance to rounding in float32."""
    x = (features(200, 8) + 300).float()
    y = (features(200, 8, 1) + 300).float()
    assert frechet_distance(x, y) == frechet_distance(x.double(), y.double())


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(4), torch.zeros(4), "expected"),
        (torch.zeros(4, 2, 2), torch.zeros(4, 2, 2), "expected"),
        (torch.zeros(4, 2), torch.zeros(4, 3), "expected"),
        (torch.zeros(1, 2), torch.zeros(4, 2), "expected"),
        (torch.zeros(4, 2), torch.zeros(1, 2), "expected"),
        (torch.full((4, 2), math.nan), torch.zeros(4, 2), "not finite"),
        (torch.zeros(4, 2), torch.full((4, 2), math.inf), "not finite"),
    ],
)
def test_refuses(x: Any, y: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frechet_distance(x, y)
