"""bits_per_dim: its units, its bounds against exact probabilities, and what its standard errors cover.

Where the ODE is not what is tested, log_prob is replaced by the exact density of the target.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from common import SDES, generator
from torch import Tensor

from scoresde import VPSDE, Denoiser, EpsDenoiser, NonFiniteError, sample_seeds
from scoresde.data import digit_levels, digits
from scoresde.exact import Gaussian, GaussianMixture
from scoresde.levels import outer_edges
from scoresde.likelihood import bits as discrete
from scoresde.likelihood.bits import bits_per_dim, dequantized
from scoresde.likelihood.flow import LogProb, log_prob

SDE = VPSDE()
EXACT = {"divergence": "exact", "steps": 40, "dtype": torch.float64}


@pytest.fixture
def exact_density(monkeypatch):
    """log_prob of an exact denoiser, in closed form: the density at t_min, or at t."""

    def closed_form(denoiser: Any, x: Tensor, *, t: float | None = None, **options: Any) -> LogProb:
        sde, dim = denoiser.sde, x[0].numel()
        alpha = float(sde.alpha(sde.t_min)) if t is None else 1.0
        value = denoiser.target.log_prob(alpha * x, sde, sde.t_min if t is None else t) + dim * math.log(alpha)
        zero = torch.zeros_like(value)
        return LogProb(value, zero, zero + math.inf, 1, x, value, zero, zero, zero, "complete", 1.0)

    monkeypatch.setattr(discrete, "log_prob", closed_form)


def probabilities(
    target: GaussianMixture, levels: int, data_range: tuple[float, float], t: float | None = None
) -> Tensor:
    """The model's probability of each level, in 1-D: alpha p_t(alpha v) integrated over the bins, (L,)."""
    t = SDE.t_min if t is None else t
    edges = torch.linspace(*data_range, levels + 1, dtype=torch.float64)[:, None]
    alpha, sigma = SDE.alpha(t), SDE.sigma(t)
    std = (target._variances[:, 0] + (sigma / alpha) ** 2).sqrt()
    below = torch.special.ndtr((edges - target._means[:, 0]) / std) @ target._log_weights.exp()
    return below.diff()


MIXTURE = GaussianMixture(means=[[-0.4], [0.1], [0.5]], weights=[0.3, 0.5, 0.2], std=[0.1, 0.05, 0.2])
ALL = torch.arange(16)[:, None]


# --- units -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [32, 256])
def test_the_range_of_the_data_changes_nothing_but_the_offset(levels):
    """The same images as data on [-1, 1] and on [0, 1], under models that are each other's images."""
    images = torch.randint(0, levels, (4, 1, 2, 2), generator=generator(1), dtype=torch.uint8)
    mean = torch.tensor([[[0.1, -0.2], [0.3, 0.0]]])
    wide, narrow = Gaussian(mean, std=0.3), Gaussian((mean + 1) / 2, std=0.15)
    options = {"divergence": "exact", "rtol": 1e-7, "atol": 1e-7, "dtype": torch.float64, "seed": 0}
    sde = VPSDE(beta_max=40.0)  # at whose t_max a mean of 0.5 leaves no trace: x_T is N(0, I) to 5e-5
    on_wide = bits_per_dim(wide.denoiser(sde), images, levels, **options)
    on_narrow = bits_per_dim(narrow.denoiser(sde), images, levels, data_range=(0.0, 1.0), **options)
    bits = math.log2(levels)
    assert (on_wide.offset, on_narrow.offset) == (bits - 1, bits)
    # The noise at t_min widens the two by different amounts, of relative size (1e-3 / 0.15)^2 = 4e-5 in the variance.
    assert torch.allclose(on_wide.per_image, on_narrow.per_image, atol=1e-3)
    x = dequantized(images, levels, seed=0, dtype=torch.float64)
    assert torch.allclose(on_wide.per_image, bits - 1 - wide.log_prob(x) / (4 * math.log(2)), atol=1e-3)
    assert on_wide.t == SDE.t_min


def test_a_model_that_knows_nothing_needs_all_the_bits(exact_density):
    """Under a density that is flat over the range, a level costs log2 L bits, at 5 and at 8."""
    for levels in (32, 256):
        flat = GaussianMixture(means=torch.linspace(-1.5, 1.5, 301)[:, None], std=0.05)
        found = bits_per_dim(flat.denoiser(SDE), torch.arange(levels)[:, None], levels, seed=0, dtype=torch.float64)
        # A third of the mass lies outside [-1, 1]; within, the comb of components is flat.
        bits = torch.full((levels,), math.log2(levels * 1.5), dtype=torch.float64)
        assert torch.allclose(found.per_image, bits, atol=5e-3)


def test_the_digits_with_a_level_at_each_end():
    """Data as `digits` scales them have their levels in the middle of the bins that `outer_edges` makes."""
    levels, labels = digit_levels()
    data, same = digits()
    data_range = outer_edges(-1.0, 1.0, 17)
    assert data_range == (-1.0625, 1.0625)
    assert torch.equal(labels, same)
    middle = dequantized(levels, 17, data_range=data_range, seed=0).sub(data)
    assert float(middle.abs().max()) <= 0.0625 + 1e-6
    lo, hi = outer_edges(0.0, 1.0, 256)
    assert (lo + hi, (hi - lo) / 256) == (1.0, pytest.approx(1 / 255, rel=1e-14))
    none = bits_per_dim(Gaussian(0.0, std=1.0).denoiser(SDE), torch.tensor([0, 16]), 17, data_range=data_range,
                        dequantize="none", **EXACT)  # fmt: skip
    expected = -torch.distributions.Normal(0.0, 1.0).log_prob(torch.tensor(1.0)) / math.log(2) + 3
    assert torch.allclose(none.per_image, expected.double().expand(2), atol=2e-3)


# --- bounds ----------------------------------------------------------------------------------------------------------


def test_every_noise_bounds_the_exact_probabilities(exact_density):
    """In 1-D, with the exact probability of each of 16 levels: the mean is above -log2 P by more than its error, and
    the bound's code lengths waste bits, sum 2^-bits <= 1.
    """
    denoiser = MIXTURE.denoiser(SDE)
    entropies = {}
    for noise in ("uniform", "truncated-normal"):
        found = bits_per_dim(denoiser, ALL, 16, dequantize=noise, repeats=2000, seed=0, dtype=torch.float64)
        P = probabilities(MIXTURE, 16, (-1.0, 1.0), found.t)
        exact = -P.log2()
        assert bool((found.per_image > exact - 5 * found.per_image_stderr).all())
        assert bool((found.per_image > exact + 5 * found.per_image_stderr).any())
        assert float((2**-found.per_image).sum()) <= 1
        # A code for levels from the true law costs its entropy at least.
        true = probabilities(MIXTURE, 16, (-1.0, 1.0))
        entropies[noise] = float(true @ found.per_image)
        assert entropies[noise] > float(-(true * true.log2()).sum()) - 5 * float(true @ found.per_image_stderr)
    assert found.t > SDE.t_min
    s = float(SDE.sigma(found.t) / SDE.alpha(found.t))
    assert s == pytest.approx(1 / 16 / 3)  # Delta / 2 = 3 s


@pytest.mark.parametrize("noise", ["uniform", "truncated-normal"])
def test_the_importance_weighted_bound_tends_to_the_probability(noise, exact_density):
    """K = 1000 gives log P to its standard error, which is that of a mean of K; the gap falls with K."""
    denoiser = MIXTURE.denoiser(SDE)
    options = {"levels": 16, "dequantize": noise, "seed": 3, "divergence": "exact", "dtype": torch.float64}
    few = bits_per_dim(denoiser, ALL, importance=4, repeats=250, **options)
    many = bits_per_dim(denoiser, ALL, importance=1000, **options)
    exact = -probabilities(MIXTURE, 16, (-1.0, 1.0), many.t).log2()
    assert many.t == few.t
    # Beside noise the bound has a bias of its variance / 2.
    bias = many.per_image_stderr**2 * math.log(2) / 2
    z = (many.per_image - exact - bias) / many.per_image_stderr
    assert float(z.abs().max()) < 4.5
    assert 0.4 < float(z.square().mean()) < 2.2  # chi^2 of 16, 5 sigma above
    one = bits_per_dim(denoiser, ALL, repeats=1000, **options)
    assert float((few.per_image - exact).mean()) < 0.75 * float((one.per_image - exact).mean())
    assert bool((few.per_image > exact - 5 * few.per_image_stderr).all())


def test_the_truncated_normal_stays_in_its_bin():
    """Its variance and density are those of N(0, s^2) cut at tau, for wide, narrow and hardly cut bins."""
    for tau in (0.1, 1.0, 3.0, 12.0):
        bins = discrete._Bins(0.0, 2.0, "truncated-normal", 0.5, 1.0, tau)
        y = torch.zeros(4000, 1, dtype=torch.int64)
        v, log_q = bins.draw(y, list(range(4000)))
        z = (v[:, 0] - 1.0) * tau  # s = 1 / tau
        assert float(z.abs().max()) <= tau + 1e-12
        normal = torch.distributions.Normal(0.0, 1.0)
        Z = math.erf(tau / math.sqrt(2))
        assert torch.allclose(log_q, normal.log_prob(z) + math.log(tau / Z), atol=1e-10)
        variance = 1 - 2 * tau * math.exp(-(tau**2) / 2) / math.sqrt(2 * math.pi) / Z
        assert float(z.square().mean()) == pytest.approx(variance, rel=5 * math.sqrt(2 / 4000))
        assert abs(float(z.mean())) < 5 * math.sqrt(variance / 4000)


def test_the_truncated_normal_starts_where_there_is_noise_enough():
    """On an SDE with more noise at t_min than a bin of 256 levels has room for, at t_min."""
    denoiser = Gaussian(torch.zeros(2), std=0.5).denoiser(SDES["ve"])
    images = torch.tensor([[3, 200]])
    found = bits_per_dim(denoiser, images, dequantize="truncated-normal", seed=0, **EXACT)
    assert found.t == SDES["ve"].t_min
    assert math.isfinite(found.value)
    later = bits_per_dim(denoiser, images, dequantize="truncated-normal", t=0.3, seed=0, **EXACT)
    assert later.t == 0.3


@pytest.mark.parametrize("name", ["vp", "subvp", "edm", "flow"])
def test_the_ode_from_a_time_between_gives_the_density_there(name):
    """With the ODE itself: dim log alpha_t is counted, on SDEs that shrink the data and on those that do not."""
    sde, target = SDES[name], Gaussian(torch.tensor([0.3, -0.1]), std=0.2)
    t = float(sde.time_at(3.0))
    found = bits_per_dim(target.denoiser(sde), torch.tensor([[20, 15]]), 32, dequantize="none", t=t, **EXACT)
    v = torch.tensor([[20.5, 15.5]], dtype=torch.float64) / 16 - 1
    smoothed = Gaussian(torch.tensor([0.3, -0.1]), std=math.hypot(0.2, math.exp(-3.0)))
    assert found.value == pytest.approx(-float(smoothed.log_prob(v)) / (2 * math.log(2)) + 4, abs=3e-3)


# --- standard errors -------------------------------------------------------------------------------------------------


def test_the_standard_error_covers_what_it_says(exact_density):
    """Over 200 sets of 25 images from the model itself, the 95 % interval covers the true mean as often; and over 200
    repetitions on one image, that of the repeats.
    """
    denoiser, P = MIXTURE.denoiser(SDE), probabilities(MIXTURE, 16, (-1.0, 1.0))
    drawn = torch.multinomial(P / P.sum(), 200 * 25, replacement=True, generator=generator(0)).reshape(200, 25, 1)
    repeats = {"levels": 16, "dtype": torch.float64}
    bits = bits_per_dim(denoiser, ALL, repeats=1000, seed=99, **repeats).per_image
    truth = float((P / P.sum()) @ bits)
    covered = 0
    for k, images in enumerate(drawn):
        low, high = bits_per_dim(denoiser, images, seed=k, **repeats).interval()
        covered += low < truth < high
    assert 178 <= covered <= 200  # 190, minus 4 sigma
    one = bits_per_dim(denoiser, ALL[8:9].expand(200, 1), repeats=20, seed=5, **repeats)
    inside = (one.per_image - bits[8]).abs() < 2.09 * one.per_image_stderr  # Student's t, 19 degrees of freedom
    assert 176 <= int(inside.sum()) <= 200
    single = bits_per_dim(denoiser, ALL[8:9], repeats=20, seed=5, **repeats)
    assert single.stderr == float(single.per_image_stderr[0]) > 0
    assert single.dof == 19
    low, high = single.interval()
    assert high - low == pytest.approx(2 * 2.093 * single.stderr, rel=1e-3)
    with pytest.raises(ValueError, match="level=95"):
        single.interval(95)


def test_the_probes_are_in_the_standard_error():
    """One image without noise in its bins has the probes' error; with it, and one repeat, none is known."""
    target = Gaussian(torch.zeros(1, 3, 3), cov=0.05 * torch.eye(9) + 0.03)
    images = torch.full((1, 1, 3, 3), 130)
    options = {"steps": 12, "dtype": torch.float64}
    exact = bits_per_dim(target.denoiser(SDE), images, dequantize="none", divergence="exact", **options)
    assert (exact.stderr, float(exact.probe_stderr)) == (0.0, 0.0)
    assert exact.dof == math.inf
    assert exact.interval() == (exact.value, exact.value)
    fifty = images.expand(50, -1, -1, -1)
    found = bits_per_dim(target.denoiser(SDE), fifty, dequantize="none", probes=4, seed=0, **options)
    assert bool((found.per_image_stderr == found.probe_stderr).all())
    assert found.dof == 49
    one = bits_per_dim(target.denoiser(SDE), images, dequantize="none", probes=4, seed=0, **options)
    assert 1 <= one.dof < math.inf
    z = (found.per_image - exact.value) / found.per_image_stderr
    assert 0.3 < float(z.square().mean()) < 3.0
    noisy = bits_per_dim(target.denoiser(SDE), images, probes=4, seed=0, **options)
    assert math.isnan(noisy.stderr)
    assert all(math.isnan(end) for end in noisy.interval())
    assert float(noisy.probe_stderr) > 0
    several = bits_per_dim(target.denoiser(SDE), images.expand(2, -1, -1, -1), probes=4, seed=0, **options)
    assert several.stderr == pytest.approx(abs(float(several.per_image.diff())) / 2)


# --- seeds and batches -----------------------------------------------------------------------------------------------


def test_an_image_is_the_same_alone_and_in_any_batch():
    denoiser = Gaussian(torch.zeros(1, 2, 2), cov=0.05 * torch.eye(4) + 0.02).denoiser(SDE)
    images = torch.randint(0, 256, (5, 1, 2, 2), generator=generator(0), dtype=torch.uint8)
    options = {"repeats": 3, "probes": 2, "steps": 6, "dtype": torch.float64, "dequantize": "truncated-normal"}
    before = torch.random.get_rng_state()
    whole = bits_per_dim(denoiser, images, seed=7, **options)
    for batch_size in (1, 4, 7):
        parts = bits_per_dim(denoiser, images, seed=7, batch_size=batch_size, **options)
        assert torch.allclose(parts.per_image, whole.per_image, rtol=1e-12)
        assert torch.allclose(parts.per_image_stderr, whole.per_image_stderr, rtol=1e-9)
        assert parts.nfe == math.ceil(15 / batch_size) * whole.nfe
    alone = bits_per_dim(denoiser, images[3:4], seed=[sample_seeds(7, 5)[3]], **options)
    assert torch.allclose(alone.per_image[0], whole.per_image[3], rtol=1e-12)
    assert bits_per_dim(denoiser, images, **options).value != bits_per_dim(denoiser, images, **options).value
    assert torch.equal(before, torch.random.get_rng_state())
    assert images.dtype == torch.uint8


def test_conditions_go_with_their_images():
    """A network whose condition is the mean of its data."""

    def net(x, t, mean, gain):
        alpha, sigma = float(SDE.alpha(float(t[0]))), float(SDE.sigma(float(t[0])))
        return sigma * (x - alpha * mean) / (0.04 * alpha**2 + sigma**2) * gain

    denoiser, images = EpsDenoiser(net, SDE), torch.tensor([[120], [130], [128]])
    means = torch.tensor([[-0.3], [0.0], [0.2]], dtype=torch.float64)
    cond = {"mean": means, "gain": torch.ones(1)}
    found = bits_per_dim(denoiser, images, repeats=2, batch_size=4, cond=cond, seed=0, **EXACT)
    for i in range(3):
        exact = Gaussian(means[i], std=0.2).denoiser(SDE)
        alone = bits_per_dim(exact, images[i : i + 1], repeats=2, seed=[sample_seeds(0, 3)[i]], **EXACT)
        assert torch.allclose(found.per_image[i], alone.per_image[0], atol=1e-9)


def test_unpacks_and_reads():
    found = bits_per_dim(MIXTURE.denoiser(SDE), ALL, 16, seed=0, divergence="exact", steps=5)
    value, stderr, nfe = found
    assert (value, stderr, nfe) == (found.value, found.stderr, 5)
    assert repr(found).startswith(f"BitsPerDim({value:.4f} +- ")
    assert found.error > 0


# --- errors ----------------------------------------------------------------------------------------------------------


class Forbidden(Denoiser):
    """No evaluation is made before the arguments are checked."""

    sde = SDE

    def posterior(self, x, t, /, **cond):
        raise AssertionError("evaluated")


@pytest.mark.parametrize(
    ("images", "arguments", "error", "match"),
    [
        (torch.zeros(2, 3), {}, TypeError, "images are torch.float32: give the raw levels 0 .. 255"),
        ([[1, 2]], {}, TypeError, "images are list"),
        (torch.zeros(2, 3, dtype=torch.bool), {}, TypeError, "levels=2"),
        (torch.tensor([[3, 32]]), {"levels": 32}, ValueError, "levels from 3 to 32: expected 0 .. 31"),
        (torch.tensor([[-1, 4]]), {}, ValueError, "levels from -1 to 4"),
        (torch.zeros(0, 3, dtype=torch.uint8), {}, ValueError, r"shape \(0, 3\)"),
        (torch.tensor(3), {}, ValueError, r"shape \(\)"),
        (ALL, {"levels": 0}, ValueError, "levels=0"),
        (ALL, {"data_range": (1.0, -1.0)}, ValueError, "lo < hi"),
        (ALL, {"data_range": (0.0, 1.0, 2.0)}, ValueError, "two finite numbers"),
        (ALL, {"dequantize": "flow"}, ValueError, "dequantize='flow'"),
        (ALL, {"repeats": 0}, ValueError, "repeats=0"),
        (ALL, {"batch_size": 0}, ValueError, "batch_size=0"),
        (ALL, {"importance": 5}, ValueError, "importance=5 needs divergence='exact'"),
        (ALL, {"importance": 5, "divergence": "hutch++"}, ValueError, "needs divergence='exact'"),
        (ALL, {"t": 1.0}, ValueError, "t=1.0: expected a time in"),
        (ALL, {"t": "late"}, ValueError, "t='late'"),
        (ALL, {"seed": [1, 2]}, ValueError, "2 seeds for 16 samples"),
        (ALL, {"seed": -1}, ValueError, "seed=-1"),
        (ALL, {"cond": {"label": torch.zeros(3)}}, ValueError, "3 entries for 16 samples"),
        (ALL, {"divergence": "none"}, ValueError, "none"),
        (ALL, {"speed": 3}, TypeError, "speed"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_named(images, arguments, error, match):
    with pytest.raises(error, match=match):
        bits_per_dim(Forbidden(), images, **arguments)


def test_a_wrong_range_or_denoiser_is_named():
    with pytest.raises(TypeError, match="expected a Denoiser"):
        bits_per_dim(lambda x, t: x, ALL)
    for arguments, match in (((0.0, 1.0, 1), "levels=1"), ((1.0, 1.0, 5), "lo < hi"), ((0.0, math.inf, 5), "finite")):
        with pytest.raises(ValueError, match=match):
            outer_edges(*arguments)


def test_a_density_that_is_not_finite_names_its_image():
    def net(x, t):
        return torch.where(x > 0.9, math.nan, x)

    images = torch.tensor([[10], [250], [20], [255], [30]])
    for options in ({"steps": 4}, {"batch_size": 2}, {"batch_size": 2, "repeats": 2}):
        with pytest.raises(NonFiniteError, match="image") as caught:
            bits_per_dim(EpsDenoiser(net, SDE), images, divergence="exact", seed=0, **options)
        assert set(caught.value.samples) <= {1, 3}
        assert caught.value.samples


def test_a_budget_that_runs_out_is_an_error():
    with pytest.raises(ArithmeticError, match="raise max_nfe="):
        bits_per_dim(MIXTURE.denoiser(SDE), ALL, 16, divergence="exact", max_nfe=9)


def test_the_stand_in_is_what_it_stands_for(exact_density):
    """The closed form that these tests use for log_prob agrees with it."""
    x = torch.linspace(-0.7, 0.7, 7, dtype=torch.float64)[:, None]
    for t in (None, 0.05):
        found = log_prob(MIXTURE.denoiser(SDE), x, divergence="exact", rtol=1e-7, atol=1e-7, t=t)
        assert torch.allclose(found.value, discrete.log_prob(MIXTURE.denoiser(SDE), x, t=t).value, atol=1e-3)
