"""Distances of samples from data against closed forms, brute force and the libraries that have them."""

import json
import math
import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from torch import Tensor

from scoresde.data import digits, fashion_mnist
from scoresde.metrics import (
    METRICS,
    PCA,
    Classifier,
    GaussianKernel,
    NetworkFeatures,
    Pixels,
    PolynomialKernel,
    RandomFeatures,
    Statistics,
    classifier_features,
    embedded,
    energy_distance,
    entropy_score,
    evaluate,
    frechet_distance,
    inception,
    kid,
    load_classifier,
    median_distance,
    mmd,
    pairwise,
    precision_recall,
    sliced_wasserstein,
)
from scoresde.metrics.classifier import WEIGHTS

ROOT = Path(__file__).parent.parent


def normal(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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


def test_samples_of_gaussians() -> None:
    """|m|^2 + sum (1 - s)^2 between N(0, I) and N(m, diag s^2); of a spread of 0.03 at these sizes."""
    m, s = torch.tensor([1.0, 0.0, -0.5]).double(), torch.tensor([1.0, 2.0, 0.5]).double()
    expected = float((m**2).sum() + ((1 - s) ** 2).sum())
    found = frechet_distance(normal(20_000, 3, 1), m + s * normal(20_000, 3, 2))
    assert found == pytest.approx(expected, abs=5 * 0.03)


# Statistics


def parts_of(x: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    return list(x.split([*sizes, len(x) - sum(sizes)]))


@pytest.mark.parametrize("d", [1, 7, 60])
@pytest.mark.parametrize("sizes", [(), (1,), (1, 1, 1), (20, 3, 50), (13,) * 7])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_a_stream_of_batches_is_the_whole(d: int, sizes: tuple[int, ...], offset: float) -> None:
    """Far from the origin too, where sums of squares would have lost every digit of the covariance."""
    x = (features(100, d) + offset).float().double()
    statistics = Statistics()
    for part in parts_of(x, sizes):
        statistics.update(part)
    exact = (x - offset).numpy()
    assert statistics.n == 100
    assert torch.allclose(statistics.mean, x.mean(0), rtol=1e-14, atol=1e-13)
    cov = torch.from_numpy(np.cov(exact, rowvar=False).reshape(d, d))
    assert torch.allclose(statistics.cov, cov, rtol=1e-8 if offset else 1e-11, atol=1e-8 if offset else 1e-12)
    assert len(statistics.root) <= max(d, 1)


def test_many_small_batches_cost_no_memory() -> None:
    statistics = Statistics()
    for part in features(3000, 4).split(2):
        statistics.update(part)
        assert sum(map(len, statistics._rows)) <= 1024 + 3
    assert torch.allclose(statistics.cov, features(3000, 4).T.cov(), rtol=1e-11)


@pytest.mark.parametrize(("n", "m", "d"), [(50, 80, 4), (5, 7, 12), (40, 3, 30), (300, 200, 32)])
def test_the_distance_of_statistics_is_that_of_the_features(n: int, m: int, d: int) -> None:
    """With fewer samples than features too: merged from parts, saved or not."""
    x, y = features(n, d, 1), features(m, d, 2)
    merged = Statistics.merge([Statistics.of(part) for part in x.split(2)])
    distance = frechet_distance(x, y)
    assert frechet_distance(merged, y) == pytest.approx(distance, rel=1e-9)
    assert frechet_distance(merged, Statistics.of(y)) == pytest.approx(distance, rel=1e-9)
    assert frechet_distance(merged, x) == pytest.approx(0, abs=1e-9)
    assert merged.n == n


def test_merging_leaves_the_parts_and_does_not_mind_empty_ones() -> None:
    x = features(30, 3)
    parts = [Statistics.of(part) for part in x.split(7)]
    before = [(part.n, part.mean.clone(), part.cov.clone()) for part in parts]
    total = Statistics.merge([Statistics(), *parts, Statistics()])
    total.update(features(9, 3, 1))
    for part, (n, mean, cov) in zip(parts, before, strict=True):
        assert part.n == n
        assert torch.equal(part.mean, mean)
        assert torch.equal(part.cov, cov)
    assert torch.allclose(total.cov, torch.cat([x, features(9, 3, 1)]).T.cov(), rtol=1e-11)
    again = pickle.loads(pickle.dumps(total))  # how torch.distributed carries it
    assert frechet_distance(again, total) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("n", "d"), [(40, 5), (5, 40), (2, 1)])
def test_a_saved_file_is_read_back(n: int, d: int, tmp_path: Path) -> None:
    x, y = features(n, d), features(60, d, 1)
    statistics, path = Statistics.of(x, "pixels"), tmp_path / "new" / "statistics.npz"
    statistics.save(path)
    again = Statistics.load(path)
    assert repr(again) == f"Statistics(n={n}, d={d}, features='pixels')"
    assert torch.equal(again.cov, statistics.cov)
    assert frechet_distance(again, y) == frechet_distance(statistics, y)
    again.update(y)  # it goes on where it stopped
    assert torch.allclose(again.cov, torch.cat([x, y]).T.cov(), rtol=1e-9, atol=1e-11)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_the_usual_statistics_files_are_read(dtype: Any, tmp_path: Path) -> None:
    """mu and sigma, of fewer samples than features too; and such programs read ours."""
    path, tolerance = tmp_path / "fid.npz", 1e-7 if dtype is np.float64 else 1e-4
    for n in (10, 200):
        x, y = features(n, 20), features(150, 20, 1)
        np.savez(path, mu=x.mean(0).numpy().astype(dtype), sigma=x.T.cov().numpy().astype(dtype))
        found = Statistics.load(path, "inception")
        assert (found.n, found.features) == (None, "inception")
        assert frechet_distance(found, y) == pytest.approx(frechet_distance(x, y), rel=tolerance)
        assert torch.allclose(found.cov, x.T.cov(), atol=1e-5)
        with pytest.raises(ValueError, match="does not say of how many samples"):
            found.update(y)
        with pytest.raises(ValueError, match="does not say of how many samples"):
            Statistics.merge([found])
        found.save(tmp_path / "again.npz")
        again = Statistics.load(tmp_path / "again.npz")
        assert frechet_distance(again, found) == pytest.approx(0, abs=1e-6 * float(found.cov.trace()))
    Statistics.of(x).save(path)
    with np.load(path) as file:
        assert np.allclose(file["mu"], x.mean(0))
        assert np.allclose(file["sigma"], x.T.cov())


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    good = tmp_path / "good.npz"
    Statistics.of(features(40, 3)).save(good)
    content = good.read_bytes()
    damaged = tmp_path / "statistics of mine.npz"
    for n in [*range(0, len(content), 97), len(content) - 1]:
        damaged.write_bytes(content[:n])
        with pytest.raises(ValueError, match=r"statistics of mine\.npz cannot be read as statistics"):
            Statistics.load(damaged)
    flipped = bytearray(content)
    flipped[content.index(b"mu.npy") + 160] ^= 1
    damaged.write_bytes(bytes(flipped))
    with pytest.raises(ValueError, match="statistics of mine"):
        Statistics.load(damaged)
    with np.load(good) as file:
        whole = dict(file)
    eye = np.eye(2)
    for arrays, words in [
        ({"x": eye}, "expected mu and sigma"),
        ({"mu": np.zeros(3), "sigma": eye}, r"shapes \(3,\) and \(2, 2\)"),
        ({"mu": np.zeros(2), "sigma": eye * math.nan}, "not finite"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 0.5], [0.2, 1.0]])}, "not symmetric"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 2.0], [2.0, 1.0]])}, "no covariance"),
        ({"mu": np.array([None, None]), "sigma": eye}, "allow_pickle"),
        (whole | {"root": 2 * whole["root"]}, "altered"),
        (whole | {"n": 1}, "altered"),
        (whole | {"format": "scoresde-statistics-9"}, "format"),
    ]:
        np.savez(damaged, **arrays)
        with pytest.raises(ValueError, match=f"statistics of mine.*{words}"):
            Statistics.load(damaged)
    with pytest.raises(FileNotFoundError):
        Statistics.load(tmp_path / "none.npz")


def test_statistics_refuse_what_does_not_fit(tmp_path: Path) -> None:
    statistics = Statistics.of(features(10, 3), "pixels")
    with pytest.raises(ValueError, match="d = 4, but those before have d = 3"):
        statistics.update(features(10, 4))
    with pytest.raises(ValueError, match=r"not finite: of features, in rows 2$"):
        statistics.update(torch.tensor([[0.0, 1, 2], [0, 1, 2], [0, math.inf, 2]]))
    assert statistics.n == 10
    with pytest.raises(ValueError, match="'pixels' and of 'inception' do not compare"):
        frechet_distance(statistics, Statistics.of(features(10, 3), "inception"))
    with pytest.raises(ValueError, match="do not compare"):
        Statistics.merge([statistics, Statistics.of(features(10, 3), "inception")])
    with pytest.raises(ValueError, match="no statistics"):
        Statistics.merge([])
    with pytest.raises(ValueError, match="no samples"):
        frechet_distance(Statistics(), statistics)
    with pytest.raises(ValueError, match="two samples at least"):
        Statistics.of(features(1, 3)).save(tmp_path / "one.npz")
    with pytest.raises(ValueError, match="d = 3 and of d = 4"):
        frechet_distance(statistics, features(10, 4))


# Kernels


@pytest.mark.parametrize(("n", "m", "d"), [(30, 20, 3), (9, 40, 40)])
def test_mmd_is_the_sum_over_pairs(n: int, m: int, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With scikit-learn's kernels, in blocks of a few rows."""
    from sklearn.metrics.pairwise import polynomial_kernel, rbf_kernel

    monkeypatch.setattr(pairwise, "BLOCK", 100)
    x, y = features(n, d, 1), features(m, d, 2)
    scales = (0.7, 2.0)

    def gaussians(a: Tensor, b: Tensor) -> np.ndarray:
        return np.mean([rbf_kernel(a, b, gamma=0.5 / s**2) for s in scales], axis=0)

    for ours, theirs in [
        (PolynomialKernel(), lambda a, b: polynomial_kernel(a, b, degree=3, coef0=1)),
        (PolynomialKernel(2, scale=0.3, offset=0.5), lambda a, b: polynomial_kernel(a, b, 2, gamma=0.3, coef0=0.5)),
        (GaussianKernel(*scales), gaussians),
    ]:
        xx, yy, xy = theirs(x, x), theirs(y, y), theirs(x, y)
        within = (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1))
        assert mmd(x, y, ours) == pytest.approx(within - 2 * xy.mean(), rel=1e-9, abs=1e-12)


def test_the_linear_kernel_sees_the_means() -> None:
    """|mean difference|^2 less the variance of either mean, which is what makes it unbiased."""
    x, y = features(30, 5, 1), features(20, 5, 2)
    expected = (x.mean(0) - y.mean(0)).square().sum() - x.T.cov().trace() / 30 - y.T.cov().trace() / 20
    assert mmd(x, y, PolynomialKernel(1, scale=1.0, offset=3.0)) == pytest.approx(float(expected), rel=1e-10)


@pytest.mark.parametrize("shift", [0.0, 0.5, 2.0])
def test_mmd_of_gaussians_is_unbiased(shift: float) -> None:
    """2 s / sqrt(s^2 + 2) (1 - exp(-m^2 / (2 s^2 + 4))) between N(0, 1) and N(m, 1), the mean of 400 small draws."""
    s = 0.8
    expected = 2 * s / math.sqrt(s**2 + 2) * (1 - math.exp(-(shift**2) / (2 * s**2 + 4)))
    draws = [mmd(normal(10, 1, 2 * i), normal(12, 1, 2 * i + 1) + shift, GaussianKernel(s)) for i in range(400)]
    values = torch.tensor(draws)
    assert abs(float(values.mean()) - expected) < 5 * float(values.std()) / 20


def test_bandwidths() -> None:
    x, y = features(30, 20, 1), features(20, 20, 2)
    expected = np.median(scipy.spatial.distance.pdist(torch.cat([x, y]).numpy()))
    assert median_distance(x, y) == pytest.approx(expected, rel=0.01)  # of an even number the lower of the two
    assert median_distance(torch.cat([x, y])) == median_distance(x, y)
    assert mmd(x, y) == mmd(x, y, GaussianKernel.median(x, y))
    shift = torch.full((20,), 1e4)
    assert mmd(x + shift, y + shift) == pytest.approx(mmd(x, y), rel=1e-6)
    assert mmd(100 * x, 100 * y) == pytest.approx(mmd(x, y), rel=1e-10)
    kernel = GaussianKernel.median(x, y, factors=(0.5, 1, 2))
    single = [mmd(x, y, GaussianKernel(s)) for s in kernel.bandwidths]
    assert mmd(x, y, kernel) == pytest.approx(sum(single) / 3, rel=1e-9)
    with pytest.raises(ValueError, match="give a bandwidth"):
        mmd(torch.zeros(5, 2), torch.zeros(4, 2))
    for wrong in ((), (0.0,), (1.0, math.inf), (-1,)):
        with pytest.raises(ValueError, match="expected one number > 0"):
            GaussianKernel(*wrong)


def test_kid_is_the_mean_of_mmd_over_disjoint_subsets() -> None:
    x, y = features(40, 6, 1), features(60, 6, 2)
    for subsets in (2, 4, 9):
        found = kid(x, y, subsets, 10, seed=3)
        assert found == kid(x, y, subsets, 10, seed=3)
        assert found.stderr == pytest.approx(found.std / math.sqrt(min(subsets, 4)))
    assert kid(x, y, 9, 10, seed=4).value != found.value
    # Linear, of one whole pass over both: the subsets are all the samples, each once.
    linear = PolynomialKernel(1, scale=1.0)
    x = y[torch.randperm(60, generator=torch.Generator().manual_seed(0))] + 1
    subset = kid(x, y, 3, 20, kernel=linear)
    assert subset.value == pytest.approx(6, abs=5 * subset.stderr)


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_kid_is_unbiased_and_its_error_is_one(shift: float) -> None:
    """Over 60 independent pairs of sets the mean is the true value within five standard errors, and (value - truth) /
    stderr has a mean square of about 1 (each stderr is of five subsets: Student's t of 4, whose variance is 2).
    """
    draws = [kid(normal(150, 4, 2 * i) + shift, normal(150, 4, 2 * i + 1), 5, 30) for i in range(60)]
    values = torch.tensor([draw.value for draw in draws])
    # With y = N(0, I) and x = y + m, E k = sum of moments of x . y / d + 1; by 10^6 draws of the pairs for m != 0.
    truth = 0.0
    if shift:
        a, b, c, e = (normal(1_000_000, 4, 1000 + i) for i in range(4))
        k = [((u * v).sum(1) / 4 + 1) ** 3 for u, v in ((a + shift, b + shift), (c, e), (a + shift, c))]
        truth = float(k[0].mean() + k[1].mean() - 2 * k[2].mean())
    assert abs(float(values.mean()) - truth) < 5 * float(values.std()) / math.sqrt(60)
    ratio = torch.tensor([(draw.value - truth) / draw.stderr for draw in draws]).square().mean()
    assert 0.5 < float(ratio) < 5


def test_kid_refuses_subsets_that_share_samples() -> None:
    x = features(30, 3)
    for wrong in ((10, 16), (10, 1), (1, 10)):
        with pytest.raises(ValueError, match="of 2 to 15 each"):
            kid(x, x, *wrong)


# Nearest neighbours


def by_loops(x: np.ndarray, y: np.ndarray, k: int) -> tuple[float, ...]:
    """The four by their definitions, with scikit-learn's neighbours."""
    from sklearn.neighbors import NearestNeighbors

    def radii(z: np.ndarray) -> np.ndarray:
        return NearestNeighbors(n_neighbors=k).fit(z).kneighbors()[0][:, -1]  # without the point itself

    between, r_x, r_y = scipy.spatial.distance.cdist(x, y), radii(x), radii(y)
    n, m = between.shape
    precision = sum(any(between[i, j] <= r_y[j] for j in range(m)) for i in range(n)) / n
    recall = sum(any(between[i, j] <= r_x[i] for i in range(n)) for j in range(m)) / m
    density = sum(between[i, j] <= r_y[j] for i in range(n) for j in range(m)) / (k * n)
    coverage = sum(any(between[i, j] <= r_y[j] for i in range(n)) for j in range(m)) / m
    return precision, recall, density, coverage


@pytest.mark.parametrize(("n", "m", "d", "k"), [(40, 30, 2, 3), (25, 50, 6, 1), (30, 30, 30, 5), (12, 60, 17, 11)])
def test_neighbours_by_brute_force(n: int, m: int, d: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairwise, "BLOCK", 128)
    x, y = 0.7 * features(n, d, 1) + 0.2, features(m, d, 1)[torch.arange(m).flip(0)]
    assert precision_recall(x, y, k) == pytest.approx(by_loops(x.numpy(), y.numpy(), k))


@pytest.mark.parametrize("d", [2, 40])
def test_neighbours_of_equal_and_of_disjoint_sets(d: int) -> None:
    x = features(50, d)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    same = precision_recall(x, x[order], k=3)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    assert same.density == pytest.approx(4 / 3)  # in a ball are its k neighbours and its centre
    assert precision_recall(x, x + 1000, k=3) == (0, 0, 0, 0)
    one_mode = precision_recall(torch.cat([x, x * 1.001]), torch.cat([x, x + 1000]), k=3)
    assert (one_mode.precision, one_mode.recall, one_mode.coverage) == (1, 0.5, 0.5)
    # Where more than k coincide a radius is 0, and the sphere counts as inside.
    atoms = x[:5].repeat(6, 1)
    assert precision_recall(atoms, atoms[torch.arange(30).flip(0)] + 0, k=3)[:2] == (1, 1)
    distant = precision_recall(x + 1e3, x[order] + 1e3, k=3)
    assert distant == same


def test_density_and_coverage_of_equal_laws() -> None:
    """Their expectations (Naeem et al., 2020): 1, and 1 - (M-1)...(M-k) / ((N+M-1)...(N+M-k)), over 100 draws."""
    n, m, k = 30, 40, 3
    draws = [precision_recall(normal(n, 2, 2 * i), normal(m, 2, 2 * i + 1), k) for i in range(100)]
    expected = 1 - math.prod((m - i) / (n + m - i) for i in range(1, k + 1))
    for name, value in (("density", 1.0), ("coverage", expected)):
        found = torch.tensor([getattr(draw, name) for draw in draws], dtype=torch.float64)
        assert abs(float(found.mean()) - value) < 5 * float(found.std()) / 10


def test_neighbours_refuse_too_few() -> None:
    with pytest.raises(ValueError, match=r"y is torch.float64 of shape \(5, 3\).*n >= 6"):
        precision_recall(features(20, 3), features(5, 3), k=5)
    with pytest.raises(ValueError, match="k=0"):
        precision_recall(features(20, 3), features(20, 3), k=0)


# Transport and energy


@pytest.mark.parametrize(("n", "m"), [(50, 50), (50, 80), (7, 30), (1, 9), (12, 18)])
def test_one_dimension_agrees_with_scipy(n: int, m: int) -> None:
    x, y = features(n, 1, 1), features(m, 1, 2)
    u, v = x[:, 0].numpy(), y[:, 0].numpy()
    expected = scipy.stats.wasserstein_distance(u, v)
    assert sliced_wasserstein(x, y, 3, order=1) == pytest.approx(expected, rel=1e-12)
    assert energy_distance(x, y) == pytest.approx(scipy.stats.energy_distance(u, v), rel=1e-7)


@pytest.mark.parametrize("order", [1, 2, 3.5])
def test_unequal_sizes_are_the_same_as_repeated_samples(order: float) -> None:
    x, y = features(6, 4, 1), features(10, 4, 2)
    equal = sliced_wasserstein(x.repeat(5, 1), y.repeat(3, 1), 16, order)
    assert sliced_wasserstein(x, y, 16, order) == pytest.approx(equal, rel=1e-12)
    gaps = (x.repeat(5, 1).sort(0).values - y.repeat(3, 1).sort(0).values).abs()  # along the axes
    expected = float((gaps**order).mean() ** (1 / order))
    assert sliced_wasserstein(x, y, torch.eye(4), order) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("order", [1, 2, 4])
def test_a_shift_moves_every_projection(order: int) -> None:
    """theta . s along each direction, so |s| / sqrt(d) in SW_2 over an orthonormal basis, whichever."""
    x, s, d = features(40, 5), torch.linspace(-1, 2, 5).double(), 5
    basis = torch.linalg.qr(features(d, d, 3)).Q
    expected = float(((basis @ s).abs() ** order).mean() ** (1 / order))
    assert sliced_wasserstein(x, x + s, basis, order) == pytest.approx(expected, rel=1e-12)
    if order == 2:
        assert expected == pytest.approx(float(s.norm()) / math.sqrt(d))
    random = sliced_wasserstein(x, x + s, 4000, 2)
    assert random == pytest.approx(float(s.norm()) / math.sqrt(d), rel=5 * 0.5 * math.sqrt(2 / 4000))


def test_sliced_wasserstein_between_gaussians() -> None:
    """sqrt(m^2 + (1 - s)^2) in one dimension, from quantiles in the place of samples."""
    z = torch.special.ndtri((torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000)[:, None]
    assert sliced_wasserstein(z, 0.4 + 0.7 * z, 1) == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("m", [0.0, 0.5, 3.0])
def test_energy_distance_between_gaussians(m: float) -> None:
    """E|X| of N(m, s^2) is s sqrt(2/pi) exp(-m^2 / 2 s^2) + m erf(m / (s sqrt 2)); s^2 = 2 for each difference."""
    n, s = 2000, math.sqrt(2)

    def absolute(mean: float) -> float:
        return s * math.sqrt(2 / math.pi) * math.exp(-(mean**2) / 4) + mean * math.erf(mean / (s * math.sqrt(2)))

    z = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None]
    expected = math.sqrt(2 * absolute(m) - 2 * absolute(0))
    assert energy_distance(z, z + m) == pytest.approx(expected, rel=2e-3, abs=1e-7)


@pytest.mark.parametrize("d", [3, 30])
def test_energy_distance_in_more_dimensions(d: int) -> None:
    x, y = features(40, d, 1), features(25, d, 2)
    pairs = [scipy.spatial.distance.cdist(a, b).mean() for a, b in ((x, y), (x, x), (y, y))]
    assert energy_distance(x, y) == pytest.approx(math.sqrt(2 * pairs[0] - pairs[1] - pairs[2]), rel=1e-9)
    assert energy_distance(x, x) == 0
    assert energy_distance(x, x.flip(0)) < 1e-4


def test_transport_refuses() -> None:
    x = features(5, 3)
    with pytest.raises(ValueError, match=r"order=0\.5: expected a number p >= 1"):
        sliced_wasserstein(x, x, order=0.5)
    for wrong in (torch.zeros(2, 3), torch.ones(2, 4), torch.ones(3)):
        with pytest.raises(ValueError, match=r"expected directions \(P, 3\), none of them 0"):
            sliced_wasserstein(x, x, wrong)
    with pytest.raises(ValueError, match="projections=0"):
        sliced_wasserstein(x, x, 0)


# All of them

DISTANCES: dict[str, Any] = {
    "frechet": frechet_distance,
    "mmd": lambda x, y: mmd(x, y, GaussianKernel(2.0)),
    "kid": lambda x, y: kid(x, y, 4, 10).value,
    "neighbours": lambda x, y: sum(precision_recall(x, y, 3)),
    "sliced": lambda x, y: sliced_wasserstein(x, y, 32),
    "energy": energy_distance,
}


@pytest.mark.parametrize("name", DISTANCES)
def test_no_generator_is_touched_and_no_input_changed(name: str) -> None:
    x, y = features(40, 20, 1).float(), features(50, 20, 2)
    before, state = (x.clone(), y.clone()), torch.get_rng_state()
    value = DISTANCES[name](x, y)
    assert math.isfinite(value)
    assert isinstance(value, float)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])
    assert DISTANCES[name](x.double().requires_grad_(), y) == value  # float32 is raised first, gradients are left


@pytest.mark.parametrize("name", sorted(set(DISTANCES) - {"kid"}))
def test_invariances(name: str) -> None:
    """Order for all; moving both sets for all but those that cut or project; turning them for all of these."""
    x, y = features(40, 20, 1), features(50, 20, 2)
    distance = DISTANCES[name]
    value = distance(x, y)
    assert distance(x.flip(0), y[torch.arange(50).roll(7)]) == pytest.approx(value, rel=1e-9)
    assert distance(x + 3, y + 3) == pytest.approx(value, rel=1e-9)
    if name != "sliced":
        rotation = torch.linalg.qr(features(20, 20, 3)).Q
        assert distance(x @ rotation, y @ rotation) == pytest.approx(value, rel=1e-9)
    if name != "neighbours":
        assert distance(y, x) == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("name", DISTANCES)
def test_every_distance_refuses_what_is_no_features(name: str) -> None:
    x = features(40, 3)
    broken = x.clone()
    broken[5, 1] = math.nan
    for a, b, words in [
        (x, broken, r"not finite: of y, in rows 5$"),
        (broken, x, r"not finite: of x, in rows 5$"),
        (x.long(), x, "x is torch.int64"),
        (x, x[0], r"y is torch.float64 of shape \(3,\)"),
        (x, x[:, :2], r"expected \(n, d\) and \(m, d\)"),
        (x[:0], x, "x is torch.float64"),
        (x.tolist(), x, "x is list"),
    ]:
        with pytest.raises(ValueError, match=words):
            DISTANCES[name](a, b)


# The entropy score


def test_the_entropy_score_is_entropies_and_between_one_and_the_classes() -> None:
    logits = 3 * features(50, 7, 1)
    p = logits.softmax(1)
    entropy = lambda p: -(p * p.log()).sum(-1)  # noqa: E731
    score = entropy_score(logits)
    assert score == pytest.approx(math.exp(float(entropy(p.mean(0)) - entropy(p).mean())))
    assert 1 < score < 7
    for same in (logits.flip(0), logits.roll(2, 1), logits + features(50, 1, 2), logits.repeat(3, 1), p.log()):
        assert entropy_score(same) == pytest.approx(score, rel=1e-12)
    assert entropy_score(logits[:1]) == pytest.approx(1, abs=1e-12)
    sure = torch.tensor([[1e4, 0.0, -1e4], [-1e4, 1e4, 0.0]])  # where exp is 0
    assert entropy_score(sure) == pytest.approx(2)
    assert entropy_score(sure.repeat_interleave(torch.tensor([1, 3]), 0)) == pytest.approx(4 / 3**0.75)
    with pytest.raises(ValueError, match=r"logits is torch\.int64"):
        entropy_score(torch.eye(3).long())


# Feature spaces


def test_random_features_are_two_layers_of_a_seed() -> None:
    generator = torch.Generator().manual_seed(5)
    first, second = (torch.randn(a, b, generator=generator, dtype=torch.float64) for a, b in ((12, 7), (7, 5)))
    x = features(6, 12).reshape(6, 3, 4)
    expected = (x.flatten(1) @ first * math.sqrt(2 / 12)).relu() @ second * math.sqrt(2 / 7)
    space = RandomFeatures((3, 4), width=7, features=5, seed=5)
    assert torch.allclose(space(x), expected.relu(), rtol=1e-12)
    assert repr(space) == "RandomFeatures((3, 4), width=7, features=5, seed=5)"
    with pytest.raises(ValueError, match=r"expected \(B, 3, 4\)"):
        space(x.flatten(1))


def test_principal_components() -> None:
    """As scikit-learn's up to signs; all of them are a rigid motion, so that no distance changes."""
    from sklearn.decomposition import PCA as Theirs

    data = features(60, 12).reshape(60, 3, 4)
    ours, theirs = PCA(data, 5), Theirs(5).fit(data.flatten(1).numpy())
    found, expected = ours(data), torch.from_numpy(theirs.transform(data.flatten(1).numpy()))
    signs = (found * expected).sum(0).sign()
    assert torch.allclose(found, expected * signs, rtol=1e-9, atol=1e-9)
    assert ours.explained == pytest.approx(theirs.explained_variance_ratio_.sum())
    assert torch.allclose(found.std(0), ours.std)
    assert bool((ours.axes.gather(0, ours.axes.abs().argmax(0, keepdim=True)) > 0).all())
    assert torch.allclose(PCA(data, 5, whiten=True)(data).T.cov(), torch.eye(5).double(), atol=1e-10)
    x, whole = data + 0.3, PCA(data, 12)
    assert frechet_distance(whole(x), whole(data)) == pytest.approx(
        frechet_distance(Pixels()(x), Pixels()(data)), rel=1e-9
    )
    for wrong, words in ((13, "vary in 12 directions"), (0, "components=0")):
        with pytest.raises(ValueError, match=words):
            PCA(data, wrong)
    with pytest.raises(ValueError, match="vary in 3 directions"):
        PCA(data[:4], 4)


def test_a_network_is_used_in_evaluation_mode_without_gradients() -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.Dropout(0.5))
    space, x = NetworkFeatures(net, "net", event_shape=(1, 5, 5), batch_size=3), features(7, 25).reshape(7, 1, 5, 5)
    net.train()
    found = space(x)
    assert (found.shape, found.dtype, found.requires_grad) == ((7, 18), torch.float64, False)
    assert torch.allclose(space(x[4:5]), found[4:5], atol=1e-6)
    assert repr(space) == "NetworkFeatures(net)"
    assert int(net[1].num_batches_tracked) == 0
    with pytest.raises(ValueError, match=r"expected \(B, 1, 5, 5\)"):
        space(x[..., :4])


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_classifiers_of_the_package(name: str) -> None:
    """They know what they say that they know: measured again, of clothes on the first thousand of the test set."""
    state = torch.get_rng_state()
    net, about = load_classifier(WEIGHTS[name])
    assert torch.equal(torch.get_rng_state(), state)
    assert WEIGHTS[name].stat().st_size < 500_000
    assert about["data"] == name
    if name == "digits":
        images, labels = digits()
        held_out = torch.randperm(1797, generator=torch.Generator().manual_seed(0))[:500]
        assert about["accuracy"] > 0.97
        assert net.accuracy(images[held_out], labels[held_out]) == pytest.approx(about["accuracy"], abs=0.005)
    else:
        assert about["accuracy"] > 0.90
        try:
            images, labels = fashion_mnist(split="test")
        except FileNotFoundError:
            pytest.skip("Fashion-MNIST is not installed")
        spread = 5 * math.sqrt(0.09 / 1000)
        assert net.accuracy(images[:1000], labels[:1000]) == pytest.approx(about["accuracy"], abs=spread)
    space = classifier_features(name)
    found = space(images[:40])
    assert found.shape == (40, 64)
    assert float(found.min()) == 0
    assert repr(space) == f"NetworkFeatures({name})"
    assert torch.allclose(net.head(found.float()), net(images[:40]), atol=1e-4)
    assert torch.allclose(space.logits(images[:40]).float(), net(images[:40]), atol=1e-4)
    assert torch.allclose(net.hidden(space.spatial(images[:40]).float()).double(), found, atol=1e-4)
    assert repr(space.spatial) == f"NetworkFeatures({name}, spatial)"
    assert int((found.std(0) > 0).sum()) > 55  # units that are not dead
    with pytest.raises(ValueError, match="expected"):
        space(images[:2, :, 1:])


def test_a_classifier_of_ones_own(tmp_path: Path) -> None:
    """Saved and read back, and saved again: the same file. Damaged ones are refused."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Classifier((3, 9, 7), classes=4, channels=(4, 6, 8), features=5)
    x = features(10, 189).reshape(10, 3, 9, 7).float()
    net(x)  # moves the running means
    path = tmp_path / "mine.npz"
    net.save(path, {"data": "my own", "accuracy": 0.25})
    again, about = load_classifier(path)
    assert about == {"data": "my own", "accuracy": 0.25}
    assert torch.allclose(again.embed(x), net.eval().embed(x), atol=5e-3)
    again.save(tmp_path / "again.npz", about)
    twice, _ = load_classifier(tmp_path / "again.npz")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), twice.state_dict().values(), strict=True))
    assert torch.equal(classifier_features(path)(x), again.embed(x).detach().double())
    content = path.read_bytes()
    for n in (0, 10, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:n])
        with pytest.raises(ValueError, match=r"mine\.npz cannot be read as a classifier"):
            classifier_features(path)
    with np.load(tmp_path / "again.npz") as file:
        arrays = dict(file)
    bias = arrays["weights/head.bias"]
    for changed, words in [
        ({"format": "other"}, "not of the format"),
        ({"weights/head.bias": bias * math.nan}, "not finite"),
        ({"weights/head.bias": bias[:2]}, "head.bias"),
        ({"about": "{"}, "cannot be read"),
    ]:
        np.savez(path, **(arrays | changed))
        with pytest.raises(ValueError, match=rf"mine\.npz.*{words}"):
            load_classifier(path)
    with pytest.raises(FileNotFoundError):
        classifier_features(tmp_path / "none.npz")
    with pytest.raises(ValueError, match=r"source='cifar': expected one of 'digits', 'fashion-mnist', 'a \.npz file'"):
        classifier_features("cifar")


def test_the_training_script(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """One epoch teaches it something, and a second run with --check trains nothing."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    import train_classifier

    path, state = tmp_path / "digits.npz", torch.get_rng_state()
    arguments = ["--data", "digits", "--out", str(path)]
    train_classifier.main([*arguments, "--epochs", "2"])
    content = path.read_bytes()
    assert "epoch 2 of 2" in capsys.readouterr().out
    train_classifier.main([*arguments, "--check"])
    printed = capsys.readouterr().out
    accuracy = load_classifier(path)[1]["accuracy"]
    assert accuracy > 0.7
    assert f"accuracy on 500 held-out images {accuracy:.2%} (measured now: {accuracy:.2%})" in printed
    assert path.read_bytes() == content
    assert torch.equal(torch.get_rng_state(), state)


def test_augmented_images_are_moved_and_mirrored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    import train_classifier

    x = torch.full((200, 2, 5, 6), -1.0)
    x[:, 0, 2, 1], x[:, 1, 2, 1] = 1, 2
    moved = train_classifier.augment(x, 1, True, torch.Generator().manual_seed(0))
    places = {tuple(place.tolist()) for place in (moved[:, 0] == 1).nonzero()[:, 1:]}
    assert places == {(row, column) for row in (1, 2, 3) for column in (0, 1, 2, 3, 4, 5)}
    assert torch.equal(moved[:, 1] == 2, moved[:, 0] == 1)
    assert torch.equal(train_classifier.augment(x, 0, False, torch.Generator()), x)


def test_inception_is_given_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for torch-fidelity: it sees uint8 of three channels, and its file of weights."""
    seen: list[Tensor] = []

    class Stub(torch.nn.Module):
        def __init__(self, name: str, layers: list[str], feature_extractor_weights_path: str | None = None) -> None:
            super().__init__()
            self.arguments = (name, layers, feature_extractor_weights_path)

        def forward(self, x: Tensor) -> tuple[Tensor]:
            seen.append(x)
            return (x.float().mean((2, 3)),)

    module: Any = ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Stub
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)
    space = inception("weights.pth", data_range=(0.0, 1.0), batch_size=2)
    x = torch.linspace(-0.1, 1.1, 3)[:, None, None, None].expand(3, 1, 4, 4)
    assert space(x).tolist() == [[0, 0, 0], [128, 128, 128], [255, 255, 255]]
    assert [(part.shape, part.dtype) for part in seen] == [((n, 3, 4, 4), torch.uint8) for n in (2, 1)]
    assert repr(space) == "NetworkFeatures(inception)"
    with pytest.raises(ValueError, match=r"expected images \(B, 3, H, W\)"):
        space(x[:, 0])
    with pytest.raises(ValueError, match="lo < hi"):
        inception(data_range=(1.0, 1.0))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ImportError, match=r"pip install scoresde\[fid\]"):
        inception()


# All at once


def test_an_evaluation_has_what_its_parts_have() -> None:
    x, y = (normal(n, 6, seed).reshape(n, 2, 3) + shift for n, seed, shift in ((60, 1, 0.2), (80, 2, 0.0)))
    space, state = RandomFeatures((2, 3), features=8), torch.get_rng_state()
    options: dict[str, Any] = {"halves": 3, "floors": 2, "k": 3, "projections": 16, "kid_subsets": 6}
    space.spatial, space.logits = (lambda x: x.flatten(1)), (lambda x: 3 * x[:, 0])
    found = evaluate(x, y, METRICS, space, seed=4, kid_subset_size=20, **options)
    a, b = space(x), space(y)
    expected = dict(zip(("precision", "recall", "density", "coverage"), precision_recall(a, b, 3), strict=True))
    expected |= {
        "frechet": frechet_distance(a, b),
        "spatial_frechet": frechet_distance(x.flatten(1), y.flatten(1)),
        "entropy_score": entropy_score(3 * x[:, 0]),
        "kid": kid(a, b, 6, 20, seed=4).value,
        "mmd": mmd(a, b, GaussianKernel(median_distance(b))),
        "sliced_wasserstein": sliced_wasserstein(a, b, 16, seed=4),
        "energy": energy_distance(a, b),
    }
    assert {name: score.value for name, score in found.scores.items()} == pytest.approx(expected, rel=1e-9)
    assert list(found.scores) == list(METRICS)
    assert all(math.isfinite(number) for score in found.scores.values() for number in score)
    assert found["kid"].stderr == kid(a, b, 6, 20, seed=4).stderr
    assert (found.samples, found.reference, found.floor_sizes, found.dimension) == (60, 80, (40, 40), 8)
    assert found == evaluate(x, y, METRICS, space, seed=4, kid_subset_size=20, batch_size=7, **options)
    real = embedded(y, space, METRICS)  # once, for many
    assert found == evaluate(x, real, METRICS, space, seed=4, kid_subset_size=20, **options)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_evaluation_of_a_mirror_image() -> None:
    """Pooled features do not know left from right, those before do; and what every space has not is refused."""
    x = normal(60, 12, 1).reshape(60, 1, 3, 4) + torch.tensor([1.0, 0.0, 0.0, 0.0])
    pooled = NetworkFeatures(lambda x: x.sum(3), "pooled", spatial=Pixels(), dtype=torch.float64)
    found = evaluate(x.flip(3), x, ["frechet", "spatial_frechet"], pooled, halves=2, floors=0)
    assert found["frechet"].value == pytest.approx(0, abs=1e-9)
    assert found["spatial_frechet"].value == pytest.approx(frechet_distance(x.flip(3).flatten(1), x.flatten(1)))
    assert found["spatial_frechet"].value > 3 * 2 * 0.5  # of the means alone, in three rows two columns move by about 1
    with pytest.raises(ValueError, match=r"entropy_score needs features with `logits`.*NetworkFeatures\(pooled\)"):
        evaluate(x, x, ["entropy_score"], pooled)
    with pytest.raises(ValueError, match="samples has 4 items: expected 8 at least"):
        evaluate(embedded(x[:4], pooled), x, ["frechet"], pooled)
    for features, metrics in ((pooled, ["spatial_frechet"]), (Pixels(), ["frechet"])):
        with pytest.raises(ValueError, match=r"samples is features of NetworkFeatures\(pooled\): expected features"):
            evaluate(embedded(x, pooled), x, metrics, features)


def test_the_floor_is_what_real_data_scores() -> None:
    x, y, real = normal(50, 3, 1) + 1, normal(90, 3, 2), normal(70, 3, 3)
    given = evaluate(x, y, ["frechet"], floor=real, halves=0, floors=8)
    assert given.floor_sizes == (50, 90)
    assert 0 < given["frechet"].floor < 0.5 < given["frechet"].value
    whole = evaluate(x, y, ["frechet"], floor=real[:30], halves=0, floors=8)  # nothing to choose
    assert whole.floor_sizes == (30, 90)
    assert whole["frechet"].floor == pytest.approx(frechet_distance(real[:30], y))
    assert math.isnan(whole["frechet"].floor_std)
    assert math.isnan(whole["frechet"].stderr)
    none = evaluate(x, y, ["frechet"], halves=0, floors=0)
    assert none.floor_sizes is None
    assert none.as_dict()["scores"]["frechet"] == {
        "value": pytest.approx(frechet_distance(x, y)),
        "stderr": None,
        "floor": None,
        "floor_std": None,
    }


def test_standard_errors_are_the_spread_of_new_draws() -> None:
    """Over 40 pairs of sets, of laws that differ: the standard deviation of the values beside the mean of the stated
    errors, which 40 draws tell to 11 %, and 20 halves each a little.
    """
    names = ["frechet", "energy", "sliced_wasserstein", "mmd", "precision", "coverage"]
    runs = [
        evaluate(normal(200, 2, 2 * i) * 1.3 + 0.5, normal(250, 2, 2 * i + 1), names, seed=i, floors=0, projections=8)
        for i in range(40)
    ]
    for name in names:
        spread = float(torch.tensor([run[name].value for run in runs]).std())
        stated = float(torch.tensor([run[name].stderr for run in runs]).square().mean().sqrt())
        assert 0.6 < stated / spread < 1.7, name


def test_an_evaluation_prints_as_a_table_and_as_json() -> None:
    x, y = normal(40, 2, 1), normal(40, 2, 2)
    found = evaluate(x, y, ["frechet", "precision_recall", "kid"], Pixels(), halves=2, floors=2, kid_subsets=2)
    lines = str(found).splitlines()
    assert lines[0].split() == ["value", "stderr", "real", "data", "std"]
    assert [line.split()[0] for line in lines[1:7]] == ["frechet", "precision", "recall", "density", "coverage", "kid"]
    assert f"{found['frechet'].value:.4g}" in lines[1]
    assert lines[7] == "40 samples against 40 (real data: 20 against 20), k=5, KID's subsets of 20, seed=0"
    assert lines[8] == "Pixels(), d = 2"
    again = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert again["scores"]["frechet"]["value"] == found["frechet"].value
    assert (again["samples"], again["floor_sizes"], again["features"]) == (40, [20, 20], "Pixels()")


def test_evaluate_refuses_and_names_the_samples() -> None:
    x = normal(40, 2, 1)
    broken = x.clone()
    broken[[3, 17], 0] = math.nan

    def nan_features(z: Tensor) -> Tensor:
        return z / (z[:, :1] != x[5, 0])

    for arguments, words in [
        ((broken, x), "samples 3, 17 not finite"),
        ((x, broken), "reference 3, 17 not finite"),
        ((x.long(), x), "samples is torch.int64"),
        ((x, x[:, :1]), r"samples has shape \(40, 2\), the reference \(40, 1\)"),
        ((x[:7], x), "expected 12 at least"),
        ((x, x, ["fid"]), "metric='fid': expected 'kid', or one of 'precision_recall', 'frechet'"),
        ((x, x, "frechet"), "expected a sequence of names"),
        ((x, x, []), "expected a sequence of names"),
        ((x, x, ["frechet"], lambda z: z[:, 0]), r"the features of 40 samples are \(40,\)"),
        ((x, x + 1, ["frechet"], nan_features), "features of samples 5 are not finite"),
    ]:
        with pytest.raises(ValueError, match=words):
            evaluate(*arguments)
    with pytest.raises(ValueError, match="floor 3, 17 not finite"):
        evaluate(x, x, floor=broken)
    for wrong in ({"halves": 1}, {"floors": -1}, {"k": 0}):
        with pytest.raises(ValueError, match="expected"):
            evaluate(x, x, **wrong)
