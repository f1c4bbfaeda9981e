"""Cascades and what their stages are told: the law of a product, and conditioning augmentation."""

import math
from dataclasses import replace

import pytest
import torch

from scoresde import VPSDE, Cascade, Stage, X0Denoiser
from scoresde.data import AugmentedSuperResolution, Shown, SuperResolution, TrainingData, condition_of
from scoresde.data.augmented import blurred
from scoresde.errors import NonFiniteError
from scoresde.exact import Gaussian
from scoresde.nn import UNet
from scoresde.solvers import DDPM, UniPC

SDE = VPSDE()
D = torch.float64


def conditional(A: torch.Tensor, b: torch.Tensor, S: torch.Tensor) -> X0Denoiser:
    """The exact denoiser of x ~ N(A v + b, S) given the vector v."""

    def mean(x, t, vector):
        alpha, sigma, x, vector = SDE.alpha(t[0]), SDE.sigma(t[0]), x.to(D), vector.to(D)  # all at one time
        m = vector @ A.T + b
        gain = alpha * S @ torch.linalg.inv(alpha**2 * S + sigma**2 * torch.eye(len(b), dtype=D))
        return (m + (x - alpha * m) @ gain.T).float()

    return X0Denoiser(mean, SDE)


def within(found: torch.Tensor, expected: torch.Tensor, cov: torch.Tensor, n: int) -> None:
    """Mean and covariance of n samples of N(expected, cov), each entry within 6 standard errors (2e-9 each)."""
    var = cov.diagonal()
    assert bool(((found.mean(0) - expected).abs() < 6 * (var / n).sqrt()).all())
    bound = 6 * ((var[:, None] * var + cov**2) / n).sqrt()
    assert bool(((torch.cov(found.T) - cov).abs() < bound).all())


@pytest.mark.parametrize("s", [0.0, 0.6])
def test_a_cascade_on_gaussians_has_the_law_of_the_product(s):
    """x_1 ~ N(m, C), x_2 ~ N(A x_1, Q): told y = sqrt(1 - s^2) x_1 + s z, the second stage is x_2 given y, and the law
    of what it makes is that of x_2, whatever s is; and jointly with x_1 what is known of it through y.
    """
    m, C = torch.tensor([1.0, -0.5], dtype=D), torch.tensor([[0.5, 0.2], [0.2, 0.4]], dtype=D)
    A, Q = torch.tensor([[1.0, 0.5], [0.0, -1.0], [0.7, 0.1]], dtype=D), 0.1 * torch.eye(3, dtype=D)
    keep = math.sqrt(1 - s**2)
    gain = keep * C @ torch.linalg.inv(keep**2 * C + s**2 * torch.eye(2, dtype=D))  # of x_1 given y
    of_y = conditional(A @ gain, A @ (m - keep * gain @ m), A @ (C - keep * gain @ C) @ A.T + Q)

    def told(x, noise):
        return {"vector": keep * x + s * noise(0, x)}

    # UniPC of 40 steps misses these laws by less than 1e-4, where a standard error is 4e-3.
    how = {"solver": UniPC(3), "steps": 40}
    first = Stage(Gaussian(mean=m, cov=C).denoiser(SDE), (2,), **how)
    n = 20000
    found = Cascade(first, Stage(of_y, (3,), told=told, **how)).sample(n, seed=1)
    joint = torch.cat([A @ m, m])
    across = A @ gain @ (keep * C)
    cov = torch.cat([torch.cat([A @ C @ A.T + Q, across], 1), torch.cat([across.T, C], 1)])
    within(torch.cat([found.x, found.made[0]], 1).to(D), joint, cov, n)
    assert found.nfe == sum(solution.nfe for solution in found.solutions)


def prior_and_decoder(**how) -> Cascade:
    decoder = conditional(torch.tensor([[2.0]], dtype=D), torch.zeros(1, dtype=D), torch.tensor([[0.04]], dtype=D))
    of_z = Stage(decoder, (1,), told=lambda z, noise: {"vector": z + 0.1 * noise(0, z)}, **how)
    return Cascade(Stage(Gaussian(mean=[1.0], std=0.5).denoiser(SDE), (1,), **how), of_z)


def test_a_sample_is_its_own_in_any_batch_and_with_its_start_given():
    cascade = prior_and_decoder(solver=DDPM(), steps=5)
    seeds = [5, 6, 7, 8]
    whole, alone = cascade.sample(4, seed=seeds), cascade.sample(1, seed=seeds[2:3])
    torch.testing.assert_close(whole.x[2:3], alone.x, rtol=1e-6, atol=1e-6)
    again = cascade.sample(4, seed=seeds, given=[whole.made[0]])
    assert torch.equal(again.x, whole.x)
    assert again.nfe == 5
    assert not torch.equal(cascade.sample(4, seed=1).x, whole.x)
    varied = cascade.sample(4, seed=2, given=[whole.made[0][:1].expand(4, 1)])  # variations of one
    assert torch.equal(varied.made[0], whole.made[0][:1].expand(4, 1))
    assert len(varied.x.unique()) == 4


def test_a_stage_is_told_what_it_takes():
    told = []

    def mean(x, t, **cond):
        told.append(sorted(cond))
        return 0 * x

    first = Stage(X0Denoiser(mean, SDE), (1,), takes=["text"], nfe=1)
    second = Stage(X0Denoiser(mean, SDE), (1,), told=lambda x, noise: {"vector": x}, takes=(), nfe=1)
    Cascade(first, second).sample(2, seed=0, cond={"text": ["a", "b"]})
    assert told == [["text"], ["vector"]]
    with pytest.raises(ValueError, match="cond has text"):  # the stage that takes it does not run
        Cascade(first, second).sample(2, seed=0, cond={"text": ["a", "b"]}, given=[torch.zeros(2, 1)])


def test_what_is_no_cascade_is_refused():
    cascade = prior_and_decoder()
    first, second = cascade.stages
    for stages in ((first,), (first, first), (second, second)):
        with pytest.raises(ValueError, match="told="):
            Cascade(*stages)
    with pytest.raises(TypeError, match="Stage"):
        Cascade(first, second.denoiser)
    with pytest.raises(ValueError, match="nothing is left"):
        cascade.sample(2, given=[torch.zeros(2, 1)] * 2)
    with pytest.raises(ValueError, match="expected 2 samples of stage 0"):
        cascade.sample(2, given=[torch.zeros(3, 1)])
    with pytest.raises(ValueError, match="told vector by cond and by the stage before"):
        cascade.sample(2, given=[torch.zeros(2, 1)], cond={"vector": torch.zeros(2, 1)})
    choosy = Cascade(replace(first, takes=()), replace(second, takes=()))
    with pytest.raises(ValueError, match="cond has text, which no stage that is left takes"):
        choosy.sample(2, cond={"text": ["a", "b"]})
    with pytest.raises(ValueError, match="n=0"):
        cascade.sample(0)
    broken = Stage(X0Denoiser(lambda x, t, vector: x / 0, SDE), (1,), told=second.told, nfe=2)
    with pytest.raises(NonFiniteError) as error:
        Cascade(first, broken).sample(1, seed=0)
    assert "in stage 1 of the cascade" in error.value.__notes__


# --- conditioning augmentation ---------------------------------------------------------------------------------------


def images(n: int = 6, side: int = 8) -> torch.Tensor:
    return torch.randn(n, 1, side, side, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)


def shown(n: int, epoch: int = 0) -> Shown:
    return Shown(torch.arange(n), n, epoch, seed=3)


def test_without_strength_it_is_super_resolution_to_the_bit():
    x = images()
    none = AugmentedSuperResolution(2, noise=(0.0, 0.0), blur=(0.0, 0.0)).told(x, shown(6))
    assert torch.equal(none["image"], SuperResolution(2)(x, shown(6)))
    assert torch.equal(none["vector"], torch.zeros(6, 2))
    up = AugmentedSuperResolution(2, noise=(0.0, 0.5), blur=(0.0, 1.0)).at()
    small = SuperResolution(2).small(x)
    found = up.enlarged(small, lambda row, like: torch.randn_like(like))
    assert torch.equal(found["image"], none["image"])


def test_the_strengths_are_what_was_done():
    """Where the image is zero there is noise of standard deviation s alone, in the small image, which enlarging keeps
    in its mean square up to the interpolation's own factor, the same for all.
    """
    up = AugmentedSuperResolution(2, noise=(0.1, 0.9))
    told = up.told(torch.zeros(512, 1, 8, 8), shown(512))
    s, rms = told["vector"][:, 0], told["image"].square().mean((1, 2, 3)).sqrt()
    assert 0.1 <= float(s.min()) < 0.15
    assert 0.85 < float(s.max()) <= 0.9
    ratio = rms / s  # 16 numbers of noise each: a relative deviation of about 0.2
    assert float((ratio - ratio.mean()).abs().max()) < 5 * 0.25 * float(ratio.mean())
    assert float(torch.corrcoef(torch.stack([s, rms]))[0, 1]) > 0.8
    again, other = up.told(torch.zeros(512, 1, 8, 8), shown(512)), up.told(torch.zeros(512, 1, 8, 8), shown(512, 1))
    assert torch.equal(again["image"], told["image"])
    assert not torch.equal(other["vector"], told["vector"])


def test_a_blur_keeps_the_mean_and_has_its_width():
    x = torch.zeros(3, 1, 33, 33, dtype=D)
    x[:, :, 16, 16] = 1
    std = torch.tensor([0.0, 1.0, 2.0], dtype=D)
    y = blurred(x, std)
    assert torch.equal(y[0], x[0])
    torch.testing.assert_close(y.sum((1, 2, 3)), torch.ones(3, dtype=D))
    i = torch.arange(33, dtype=D) - 16
    # A sampled Gaussian's variance is its square, to exp(-2 pi^2 b^2) at the steps and exp(-16^2 / 2 b^2) at the ends.
    torch.testing.assert_close((y.sum((1, 2)) * i**2).sum(1), std**2, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(blurred(torch.ones_like(x), std), torch.ones_like(x))


def test_a_network_is_told_the_image_and_the_strength():
    up = AugmentedSuperResolution(2, noise=(0.0, 0.5), blur=(0.0, 1.0))
    data = TrainingData(images(), conditions=(up,), drop=0.5)
    assert data.network_options == {"image_condition": 1, "vector": 2}
    batch = data.batch(torch.arange(6))
    net = UNet(image_channels=1, channels=8, multipliers=(1,), blocks=1, **data.network_options)
    assert net(batch.x, torch.ones(6), **batch.cond).shape == batch.x.shape
    gone = batch.cond["vector"].eq(0).all(1)
    assert torch.equal(gone, batch.cond["image"].eq(0).flatten(1).all(1))
    small = SuperResolution(2).small(batch.x)
    assert [one.key for one in up.measured(small, (1, 8, 8))] == ["image", "vector"]


def test_augmentation_in_words_and_its_mistakes():
    assert condition_of("augmented-super-resolution:2:0.3") == AugmentedSuperResolution(2, noise=(0.0, 0.3))
    up = AugmentedSuperResolution(2, noise=(0.0, 0.3))
    for wrong in ({"noise": 0.4}, {"blur": 1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            up.at(**wrong)
    with pytest.raises(ValueError, match=r"noise=0: the network is trained on 0\.1 to 0\.5"):
        AugmentedSuperResolution(2, noise=(0.1, 0.5), blur=(0.0, 1.0)).at(blur=0.5)
    for wrong in ({"noise": (0.5, 0.2)}, {"noise": (0.0, 1.5)}, {"blur": (-1.0, 1.0)}, {"noise": None}, {"factor": 1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            AugmentedSuperResolution(**wrong)
    with pytest.raises(ValueError, match="noise="):  # measured images have no noise, which this one never saw
        AugmentedSuperResolution(2, noise=(0.1, 0.3)).measured(images(), (1, 8, 8))
    with pytest.raises(ValueError, match="choose the strengths"):
        up.enlarged(images(), lambda row, like: like)
    with pytest.raises(ValueError, match="augmented-super-resolution"):
        condition_of("augmented-super-resolution:x")
