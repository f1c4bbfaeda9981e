"""Codecs: what they map and what densities need of them, and `Latent`, a denoiser of z whose results are data."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from common import normal

from scoresde import (
    EDMSDE,
    VPSDE,
    Clip,
    CosineVPSDE,
    DynamicThreshold,
    EpsDenoiser,
    FlowSDE,
    Grid,
    Latent,
    NonFiniteError,
    X0Denoiser,
    bits_per_dim,
    decode,
    diagnose,
    elbo,
    encode,
    log_prob,
    sample,
)
from scoresde.codecs import AutoencoderCodec, Chained, Codec, Encoded, Orthonormal, Shift, Standardise
from scoresde.editing import edit, interpolation, sdedit, variations
from scoresde.exact import Gaussian, GaussianMixture
from scoresde.guidance import (
    DPS,
    ClassifierFree,
    Conditioned,
    Energy,
    Potential,
    Product,
    TwistedSMC,
    distance,
    twisted_smc,
)
from scoresde.interop.model import Published
from scoresde.likelihood import dequantized
from scoresde.networks import networks
from scoresde.solvers import DDIM, DDPM, UniPC, available
from scoresde.tuning import choose
from scoresde.variance import AnalyticDenoiser, estimate

SDE = VPSDE()
MEANS, X = normal(3, 2, 2, seed=1), normal(5, 2, 2, seed=2)
Q = torch.linalg.qr(normal(4, 4, seed=3)).Q
ROTATION = Orthonormal(Q, shape=(4,), data_shape=(2, 2))
SIGNS = Orthonormal(torch.eye(4, dtype=torch.float64)[[2, 0, 3, 1]] * torch.tensor([1.0, -1.0, 1.0, -1.0]).double())
DATA = GaussianMixture(MEANS, std=0.6)


def rotated(codec: Codec, sde=SDE, target=DATA):
    """The model of the same data in the codec's space."""
    return Latent(GaussianMixture(codec.encode(MEANS), std=0.6).denoiser(sde), codec)


def z_noise(codec: Codec):
    """The noise of a run of x, one of a row alone, and the same noise in z."""
    return lambda row, x: normal(5, 2, 2, seed=100 + row), lambda row, z: codec.encode(normal(5, 2, 2, seed=100 + row))


class Halves(Codec):
    """A map that has no volume, and no bound: the first of the columns."""

    def encode(self, x, /, **cond):
        return x[..., :1]

    def decode(self, z, /, **cond):
        return z.repeat_interleave(2, -1)


class Line(torch.nn.Module):
    """m = w x + b, and its standard deviation if it has one."""

    def __init__(self, w, b=0.0, std=None, dtype=torch.float64):
        super().__init__()
        self.w, self.b, self.std = torch.nn.Parameter(torch.tensor(w, dtype=dtype)), b, std
        self.seen: list[torch.Tensor] = []

    def forward(self, x):
        self.seen.append(x)
        m = self.w * x + self.b
        return m if self.std is None else (m, torch.full_like(m, self.std))


CODECS = {
    "orthonormal": ROTATION,
    "signs": SIGNS,
    "pixels": Orthonormal(lambda x: x.flatten(1), lambda z: z.unflatten(1, (2, 2))),
    "standardise": Standardise(normal(2, 2), 0.5 + normal(2, 2).abs()),
    "number": Standardise(1.0, 3.0),
    "shift": Shift(lambda low, **_: low),
    "constant": Shift(normal(1, 2, 2)[0]),
    "chained": Chained(Standardise(1.0, 3.0), ROTATION),
    "autoencoder": AutoencoderCodec(Line(3.0, 1.0), Line(1 / 3, -1 / 3), scale=0.18, shift=0.5, batch=2),
}


class TestCodecs:
    @pytest.mark.parametrize("name", CODECS)
    def test_what_is_encoded_is_decoded(self, name):
        codec, cond = CODECS[name], {"low": X}
        z = codec.encode(X, **cond)
        torch.testing.assert_close(codec.decode(z, **cond), X, rtol=0, atol=1e-12)
        for dtype in (torch.float32, torch.bfloat16):
            assert codec.decode(codec.encode(X.to(dtype), **cond), **cond).dtype == dtype

    @pytest.mark.parametrize("name", [name for name in CODECS if name != "autoencoder"])
    def test_the_volume_is_that_of_the_derivative(self, name):
        codec, found = CODECS[name], CODECS[name].log_volume(X, low=X)

        def one(x):
            return codec.encode(x.reshape(1, 2, 2), low=torch.zeros(1, 2, 2).double()).flatten()

        J = torch.stack([torch.autograd.functional.jacobian(one, x.flatten()) for x in X])
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, torch.linalg.slogdet(J).logabsdet, rtol=0, atol=1e-12)

    def test_a_subspace_has_no_volume(self):
        plane = Orthonormal(Q[:2], data_shape=(2, 2))
        once = plane.decode(plane.encode(X))
        torch.testing.assert_close(plane.decode(plane.encode(once)), once)
        assert plane.log_volume(X) is None
        assert plane.encode(X).shape == (5, 2)

    def test_the_numbers_of_an_encoded_law(self):
        law = Encoded(X, torch.tensor(0.5, dtype=torch.float64))
        expected = torch.distributions.Normal(X, 0.5).entropy().sum((1, 2))
        torch.testing.assert_close(law.entropy(), expected)
        torch.testing.assert_close(law.draw(X), 1.5 * X)

    def test_the_published_scaling_and_the_decoder_s_likelihood(self):
        """z = scale (m - shift), per channel too; p(x | z) is the normal density."""
        scale, shift = torch.tensor([[2.0], [4.0]]).double(), torch.tensor([[1.0], [0.0]]).double()
        codec = AutoencoderCodec(Line(1.0, std=0.1), Line(1.0), scale=scale, shift=shift, std=0.3)
        torch.testing.assert_close(codec.encode(X), scale * (X - shift))
        law = codec.encoding(X)
        torch.testing.assert_close(law.mean, codec.encode(X))
        torch.testing.assert_close(law.std, (0.1 * scale).expand_as(X))
        z = codec.encode(X) + 0.1
        expected = torch.distributions.Normal(z / scale + shift, 0.3).log_prob(X).sum((1, 2))
        torch.testing.assert_close(codec.log_likelihood(X, z), expected)
        assert AutoencoderCodec(Line(1.0), Line(1.0)).encoding(X) is None

    def test_networks_are_called_in_their_own_dtype(self):
        half = AutoencoderCodec(Line(2.0, dtype=torch.bfloat16), Line(0.5, dtype=torch.bfloat16))
        latent = Latent(Gaussian([0.0, 0.0], std=1.0).denoiser(SDE), half)
        for dtype in (torch.float64, torch.float32, torch.float16):
            found = sample(latent, normal(3, 2, dtype=dtype), DDIM(), steps=2)
            assert found.x.dtype == found.latent.dtype == dtype
        assert {x.dtype for x in half.decoder.seen} == {torch.bfloat16}
        assert [*networks(latent)] == [half.encoder, half.decoder]

    def test_what_is_wrong_is_said(self):
        with pytest.raises(ValueError, match=r"not orthonormal, Q Q\^T - I reaches"):
            Orthonormal(2 * Q)
        with pytest.raises(ValueError, match="two functions"):
            Orthonormal(torch.sin)
        with pytest.raises(ValueError, match="expected a shape of 4 entries"):
            Orthonormal(Q, shape=(5,))
        with pytest.raises(ValueError, match=r"expected a floating-point matrix \(K, D\), K <= D"):
            Orthonormal(Q[:, :2])
        with pytest.raises(ValueError, match=r"items of shape \(3,\) have 3 entries, the codec's 4"):
            ROTATION.encode(normal(2, 3))
        with pytest.raises(ValueError, match="a finite std > 0"):
            Standardise(0.0, 0.0)
        with pytest.raises(ValueError, match=r"make \(5, 5, 2, 2\) of \(5, 2, 2\)"):
            Shift(normal(5, 1, 2, 2)).encode(X)
        with pytest.raises(ValueError, match=r"scale=0\.0: expected finite numbers > 0"):
            AutoencoderCodec(Line(1.0), Line(1.0), scale=0.0)
        with pytest.raises(TypeError, match="encoder is int: expected a callable"):
            AutoencoderCodec(1, Line(1.0))
        with pytest.raises(TypeError, match=r"codec is function: expected a Codec of scoresde\.codecs"):
            Latent(DATA.denoiser(SDE), lambda x: x)


FIXED = [entry for entry in available() if not entry.adaptive and entry.name != "reverse-sde"]
SEEDED = [entry for entry in available() if entry.name == "ddpm" or not (entry.deterministic or entry in FIXED)]


class TestSamples:
    @pytest.mark.parametrize("entry", FIXED, ids=lambda entry: entry.name)
    def test_an_orthonormal_codec_gives_the_same_samples(self, entry):
        """The law of the codec, to rounding, with the same noise; the trajectory is z's."""
        noise, noise_z = z_noise(ROTATION)
        mine = sample(DATA.denoiser(SDE), X, entry.solver, steps=4, noise=noise, trajectory=True)
        z_T = ROTATION.encode(X)
        found = sample(rotated(ROTATION), z_T, entry.solver, steps=4, noise=noise_z, trajectory=True)
        torch.testing.assert_close(found.x, mine.x, rtol=1e-10, atol=1e-10)
        assert torch.equal(found.trajectory[0], z_T)
        assert torch.equal(found.trajectory[-1], found.latent)
        torch.testing.assert_close(ROTATION.decode(found.latent), mine.x, rtol=1e-10, atol=1e-10)
        assert found.nfe == mine.nfe
        assert mine.latent is None

    @pytest.mark.parametrize("entry", [e for e in available() if e.deterministic and e.adaptive], ids=lambda e: e.name)
    def test_adaptive_steps_too(self, entry):
        """With turned signs and places, which tolerances of each entry do not see."""
        solver = replace(entry.solver, rtol=0.02, atol=0.02)
        mine, found = sample(DATA.denoiser(SDE), X, solver), sample(SIGNED, SIGNS.encode(X), solver)
        assert found.nfe == mine.nfe
        torch.testing.assert_close(found.x, mine.x, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("entry", SEEDED, ids=lambda entry: entry.name)
    def test_another_shape_is_the_same_to_the_bit(self, entry):
        """With seeds, for the solvers with Brownian paths of their own too: noise is drawn entry by entry."""
        steps = {} if entry.adaptive else {"steps": 3}
        solver = replace(entry.solver, rtol=0.1, atol=0.1) if entry.adaptive else entry.solver
        codec = CODECS["pixels"]
        flat = GaussianMixture(MEANS.flatten(1), std=0.6).denoiser(SDE)
        mine = sample(flat, X.flatten(1), solver, seed=[3, 1, 4, 1, 5], **steps)
        found = sample(Latent(flat, codec), X.flatten(1), solver, seed=[3, 1, 4, 1, 5], **steps)
        assert torch.equal(found.latent, mine.x)
        assert torch.equal(found.x, mine.x.unflatten(1, (2, 2)))

    def test_a_run_can_go_on_from_the_latent(self):
        grid, model = Grid.uniform(SDE, 6), rotated(ROTATION)
        whole = sample(model, ROTATION.encode(X), DDIM(), grid=grid)
        half = sample(model, ROTATION.encode(X), DDIM(), grid=Grid(SDE, grid.times[:4]))
        rest = sample(model, half.latent, DDIM(), grid=Grid(SDE, grid.times[3:]))
        torch.testing.assert_close(rest.x, whole.x)
        torch.testing.assert_close(half.x, ROTATION.decode(half.latent))

    def test_a_sample_does_not_depend_on_its_batch(self):
        exact = Conditioned(Gaussian([0.0, 0.0], std=1.0).denoiser(SDE), drop="low")
        model = Latent(exact, Shift(lambda low, **_: low))
        seeds, low = [7, 8, 9], normal(3, 2, dtype=torch.float32)
        whole = sample(model, (3, 2), DDPM(), steps=4, seed=seeds, cond={"low": low})
        alone = sample(model, (1, 2), DDPM(), steps=4, seed=[8], cond={"low": low[1:2]})
        torch.testing.assert_close(alone.x, whole.x[1:2])
        torch.testing.assert_close(whole.x - whole.latent, low)

    def test_codecs_follow_one_another_and_come_off(self):
        inner = rotated(ROTATION)
        model = Latent(inner, Standardise(10.0, 2.0))
        found = sample(model, ROTATION.encode(X), DDIM(), steps=3)
        torch.testing.assert_close(found.x, 10 + 2 * sample(inner, ROTATION.encode(X), DDIM(), steps=3).x)
        bare = Latent(model, None)
        assert bare.codec is None
        assert torch.equal(sample(bare, ROTATION.encode(X), DDIM(), steps=3).x, found.latent)

    def test_gradients_pass_through_the_codec(self):
        x_T = ROTATION.encode(X).requires_grad_()
        found = sample(rotated(ROTATION), x_T, DDIM(), steps=2, differentiable=True)
        assert torch.autograd.grad(found.x.sum(), x_T)[0].abs().sum() > 0
        assert not sample(rotated(ROTATION), x_T, DDIM(), steps=2).x.requires_grad

    def test_what_a_codec_makes_of_it_is_checked(self):
        model = Gaussian([0.0], std=1.0).denoiser(SDE)
        with pytest.raises(NonFiniteError, match="the codec's decode made samples 0, 1 non-finite"):
            sample(Latent(model, AutoencoderCodec(torch.nn.Identity(), lambda z: z / 0)), (2, 1), DDIM(), steps=2)
        with pytest.raises(ValueError, match=r"decode made torch.float64 of shape \(2, 1\) of torch.float32"):
            sample(Latent(model, Doubling()), (2, 1), DDIM(), steps=2)


class Doubling(Standardise):
    """A codec that does not keep the dtype."""

    def decode(self, z, /, **cond):
        return z.double()


SIGNED = Latent(
    GaussianMixture(SIGNS.encode(MEANS), std=0.6).denoiser(SDE),
    SIGNS,
)


class TestWrappers:
    def test_they_hand_the_codec_on_and_act_on_z(self):
        model, other = rotated(ROTATION), Gaussian(torch.zeros(4), std=1.0).denoiser(SDE)
        table = estimate(model, ROTATION.encode(X), [0.5, 1.0], samples=4)
        wrapped = [
            Clip(model),
            DynamicThreshold(model),
            Energy(model, distance(torch.zeros(4))),
            ClassifierFree(model, weight=1.5, null={"label": 0}),
            Product([other, model]),
            DPS(model, torch.sin, ROTATION.encode(X), noise_std=1.0),
            AnalyticDenoiser(model, table),
            Published(model, (4,), {"format": "none"}),
            Clip(Energy(model, distance(torch.zeros(4)))),
        ]
        assert all(one.codec is ROTATION for one in wrapped)
        clipped = sample(Clip(model, -0.2, 0.2), ROTATION.encode(X), DDIM(), steps=3)
        assert clipped.latent.abs().max() <= 0.2 < clipped.x.abs().max()
        published = wrapped[-2]
        assert torch.equal(published.encode(X), ROTATION.encode(X))
        torch.testing.assert_close(published.decode(published.encode(X)), X)
        AnalyticDenoiser(Latent(model, None), table)  # of the same model: a codec changes nothing of it

    def test_what_is_measured_of_data_is_measured_through_the_codec(self):
        """DPS of A(decode(z)) is that of A(x)."""
        y = X[:, 0]
        mine = DPS(DATA.denoiser(SDE), lambda x: x[:, 0], y, noise_std=0.5)
        model = rotated(ROTATION)
        found = DPS(model, lambda z: ROTATION.decode(z)[:, 0], y, noise_std=0.5)
        a, b = sample(mine, X, DDIM(), steps=4), sample(found, ROTATION.encode(X), DDIM(), steps=4)
        torch.testing.assert_close(b.x, a.x)

    def test_weighted_particles_are_data(self):
        seeds = {"noise": z_noise(ROTATION)[0]}, {"noise": z_noise(ROTATION)[1]}
        start = (X, ROTATION.encode(X))
        models = DATA.denoiser(SDE), rotated(ROTATION)
        energies = (lambda x, t: -(x.flatten(1)[:, 0] ** 2)), (lambda z, t: -(ROTATION.decode(z).flatten(1)[:, 0] ** 2))
        a, b = (
            twisted_smc(Potential(model, log), x, TwistedSMC(particles=5, ess=0.0), steps=4, **noise)
            for model, log, x, noise in zip(models, energies, start, seeds, strict=True)
        )
        assert b.x.shape == (1, 5, 2, 2)
        torch.testing.assert_close(b.x, a.x)
        torch.testing.assert_close(b.log_weights, a.log_weights)
        torch.testing.assert_close(ROTATION.decode(b.latent[0]), b.x[0])

    def test_what_is_chosen_is_chosen_on_z(self):
        model = Latent(DATA.denoiser(SDE), AutoencoderCodec(Line(1.0), lambda z: 1 / 0))
        shape = {"nfe": 4, "solvers": [DDIM(), UniPC(2)], "spacings": {}, "reference_nfe": 12}
        assert choose(model, (8, 2, 2), **shape).times == choose(Latent(model, None), (8, 2, 2), **shape).times


SPREAD = Standardise(torch.tensor([1.0, 3.0]).double(), torch.tensor([2.0, 0.5]).double())


class TestDensities:
    @pytest.mark.parametrize("sde", [VPSDE(), EDMSDE(), FlowSDE()], ids=lambda sde: type(sde).__name__)
    def test_of_data_where_there_is_a_volume(self, sde):
        """Exact Gaussians: those of the standardised or shifted data. The error is that of 60 steps."""
        target, low = Gaussian([1.0, 3.0], std=0.8), normal(4, 2, seed=5)
        x = target.sample(4, torch.Generator().manual_seed(0)).double()
        made = {
            "standardised": (Gaussian([0.0, 0.0], cov=torch.diag(0.64 / SPREAD.std**2)), SPREAD, 0.0),
            "shifted": (Gaussian([0.0, 0.0], std=0.8), Shift(lambda low, **_: low), low - torch.tensor([1.0, 3.0])),
        }
        for law, codec, moved in made.values():
            model = Latent(Conditioned(law.denoiser(sde), drop="low"), codec)
            found = log_prob(model, x + moved, cond={"low": low}, divergence="exact", steps=60)
            assert found.of == "x"
            torch.testing.assert_close(found.value, target.log_prob(x), rtol=0, atol=5e-3)
            terms = found.prior + found.log_det + found.residual + found.log_volume
            torch.testing.assert_close(found.value, terms)

    @pytest.mark.parametrize("how", [{"steps": 8}, {"rtol": 1e-3, "atol": 1e-3}], ids=["table", "adaptive"])
    def test_an_orthonormal_codec_gives_the_density_of_data(self, how):
        codec = SIGNS if "rtol" in how else ROTATION
        mine = log_prob(DATA.denoiser(SDE), X, divergence="exact", **how)
        found = log_prob(rotated(codec), X, divergence="exact", **how)
        torch.testing.assert_close(found.value, mine.value, rtol=1e-9, atol=1e-9)
        assert found.nfe == mine.nfe
        torch.testing.assert_close(codec.decode(found.latent), mine.latent)
        assert mine.of == found.of == "x"
        assert mine.log_volume is None

    def test_gradients_are_those_of_data(self):
        x, how = X.clone().requires_grad_(), {"divergence": "exact", "steps": 4, "differentiable": True}
        mine, found = (log_prob(model, x, **how).value.sum() for model in (DATA.denoiser(SDE), rotated(ROTATION)))
        torch.testing.assert_close(torch.autograd.grad(found, x), torch.autograd.grad(mine, x))

    def test_conditions_are_those_of_the_images(self):
        """In any batch: of image i the shift and the noise are its own."""
        low, images = normal(3, 2, seed=1), torch.randint(4, (3, 2), generator=torch.Generator().manual_seed(0))
        model = Latent(
            Conditioned(Gaussian([0.0, 0.0], std=1.0).denoiser(SDE), drop="low"), Shift(lambda low, **_: low)
        )
        how = {"divergence": "exact", "steps": 3, "seed": 0, "cond": {"low": low}, "dtype": torch.float64}
        whole, alone = bits_per_dim(model, images, 4, **how), bits_per_dim(model, images, 4, batch_size=1, **how)
        torch.testing.assert_close(alone.per_image, whole.per_image)

    def test_of_a_state_at_a_time_there_is_that_of_z(self):
        model, z = rotated(ROTATION), ROTATION.encode(X)
        found = log_prob(model, z, t=0.5, divergence="exact", steps=8)
        assert found.of == "z"
        assert torch.equal(found.value, log_prob(Latent(model, None), z, t=0.5, divergence="exact", steps=8).value)

    def test_without_a_volume_it_is_that_of_z(self):
        """And bits per dimension are refused, before any call of the network."""
        model = Latent(Gaussian([0.0], std=1.0).denoiser(SDE), Halves())
        found = log_prob(model, X[:, 0], divergence="exact", steps=8)
        assert found.of == "z"
        assert torch.equal(found.value, log_prob(Latent(model, None), X[:, 0, :1], divergence="exact", steps=8).value)
        images = torch.tensor([[0, 0], [3, 3]])
        with pytest.raises(
            ValueError, match=r"Halves object .* has no volume.*take the bound, elbo\(denoiser, dequantiz"
        ):
            bits_per_dim(model, images, 4, steps=4)
        bound = elbo(model, X[:, 0], draws=4, seed=0)
        assert bound.of == "z"
        assert torch.equal(bound.value, elbo(Latent(model, None), X[:, 0, :1], draws=4, seed=0).value)
        with pytest.raises(ValueError, match="the bound is of z, not of data"):
            _ = bound.bits_per_dim
        with pytest.raises(ValueError, match=r"levels=4 with .*: the bins of levels are of data"):
            elbo(model, X[:, 0], levels=4)

    @pytest.mark.parametrize("t", [None, 0.01])
    def test_bits_per_dim(self, t):
        """Of 4 levels of an image of 2 by 2, with the codec's offset: the same as of the data's own model."""
        images = torch.randint(4, (3, 2, 2), generator=torch.Generator().manual_seed(0))
        options = {"divergence": "exact", "steps": 6, "seed": 0, "dtype": torch.float64, "t": t}
        mine = bits_per_dim(DATA.denoiser(SDE), images, 4, **options)
        found = bits_per_dim(rotated(ROTATION), images, 4, **options)
        assert found.value == pytest.approx(mine.value, abs=1e-9)
        assert found.nfe == mine.nfe
        wider = Latent(rotated(ROTATION), Standardise(0.0, 8.0))
        wide = bits_per_dim(wider, images, 4, data_range=(-8.0, 8.0), **options)
        assert wide.value == pytest.approx(mine.value, abs=1e-6)

    def test_of_the_samples(self):
        """In the pass that makes them: with the volume of the codec, or z's, and it is said which."""
        mine = sample(DATA.denoiser(SDE), X, DDIM(), steps=8, log_prob="exact")
        found = sample(rotated(ROTATION), ROTATION.encode(X), DDIM(), steps=8, log_prob="exact")
        torch.testing.assert_close(found.log_prob, mine.log_prob)
        torch.testing.assert_close(found.x, mine.x)
        wider = Latent(rotated(ROTATION), Standardise(0.0, 8.0))
        wide = sample(wider, ROTATION.encode(X), DDIM(), steps=8, log_prob="exact")
        torch.testing.assert_close(wide.log_prob, mine.log_prob - 4 * math.log(8))
        line = Latent(Gaussian([0.0], std=1.0).denoiser(SDE), Halves())
        half = sample(line, normal(3, 1), DDIM(), steps=4, log_prob="exact")
        assert [mine.log_prob_of, wide.log_prob_of, half.log_prob_of] == ["x", "x", "z"]
        assert half.x.shape == (3, 2)


class TestBounds:
    def test_with_a_volume(self):
        model = Latent(Gaussian([0.0, 0.0], cov=torch.diag(0.64 / SPREAD.std**2)).denoiser(SDE), SPREAD)
        found = elbo(model, X[:, 0] + 1, draws=128, seed=0)
        assert found.of == "x"
        torch.testing.assert_close(found.log_volume, SPREAD.log_volume(X[:, 0]))
        torch.testing.assert_close(found.value, found.prior + found.denoising + found.reconstruction + found.log_volume)
        exact = Gaussian([1.0, 3.0], std=0.8).log_prob(X[:, 0] + 1)
        assert bool((found.value - exact < 5 * found.stderr).all())
        assert bool((found.value - exact > -0.1 - 5 * found.stderr).all())

    @pytest.mark.parametrize("chain", [False, True], ids=["continuous", "chain"])
    def test_of_an_encoder_with_noise(self, chain):
        """Linear Gaussians: x | z ~ N(z, s^2), z ~ N(0, 1 - s^2), and the encoder that is their posterior, so that the
        bound of data N(0, 1) is that of z: tight in continuous time, but for its ends, 0.1 nats. Means are held
        within five standard errors, and the stated error covers the draws of z.
        """
        s2 = 0.2
        w = 1 - s2  # E[z | x] = (1 - s2) x, Var = s2 (1 - s2)
        codec = AutoencoderCodec(Line(w, std=math.sqrt(s2 * w)), Line(1.0), scale=2.0, std=math.sqrt(s2))
        model = Latent(Gaussian([0.0, 0.0], std=2 * math.sqrt(w)).denoiser(SDE), codec)
        x = torch.tensor([[0.5, -1.0]]).double().expand(64, 2)
        how = {"solver": DDPM(), "grid": Grid.power(SDE, 50), "draws": 2} if chain else {"draws": 64}
        found = elbo(model, x, seed=list(range(64)), **how)
        total = found.prior + found.denoising + found.reconstruction + found.decoding + found.entropy
        torch.testing.assert_close(found.value, total)
        # The same by hand: a z for each of the 64, the bound of that z, and the two terms.
        z = codec.encoding(x).draw(normal(64, 2, seed=9)).detach()
        of_z = elbo(Latent(model, None), z, seed=list(range(64, 128)), **how)
        by_hand = (of_z.value + codec.log_likelihood(x, z) + codec.encoding(x).entropy()).detach()
        spread, other = found.value.std(), by_hand.std()
        assert found.of == "x"
        assert abs(float(found.value.mean() - by_hand.mean())) < 5 * float((spread**2 + other**2).sqrt()) / 8
        if not chain:
            gap = float(Gaussian([0.0, 0.0], std=1.0).log_prob(x[:1]) - found.value.mean())
            assert -5 * float(spread) / 8 < gap < 0.1 + 5 * float(spread) / 8
        # Over 64 runs the variance has a relative standard error of sqrt(2 / 63) = 0.18, and more where a run's draws
        # are few; stated errors are unbiased, or a little large.
        assert 0.5 < float(spread**2 / found.stderr.square().mean()) < 1.6
        assert found.bits_per_dim.shape == (64,)
        alone = elbo(model, x[:1], seed=[5], **how)
        torch.testing.assert_close(alone.value, found.value[5:6])

    def test_what_a_codec_adds_is_finite(self):
        codec = AutoencoderCodec(Line(1.0, std=0.1), lambda z: z / 0, std=1.0)
        with pytest.raises(NonFiniteError, match="what the codec adds is not finite for samples 0, 1"):
            elbo(Latent(Gaussian([0.0, 0.0], std=1.0).denoiser(SDE), codec), X[:2, 0], draws=2, seed=0)

    def test_of_whole_levels(self):
        """By way of dequantised data: the bound is above bits_per_dim's value, by what it misses."""
        images = torch.randint(4, (2, 2, 2), generator=torch.Generator().manual_seed(0))
        x = dequantized(images, 4, seed=0, dtype=torch.float64)
        bits, stderr = elbo(rotated(ROTATION), x, draws=64, seed=0).of_levels(4, (-1.0, 1.0))
        exact = bits_per_dim(DATA.denoiser(SDE), images, 4, divergence="exact", steps=20, seed=0, dtype=torch.float64)
        assert bool((bits > exact.per_image - 5 * stderr).all())
        assert bool((bits < exact.per_image + 0.1 + 5 * stderr).all())


class TestEdits:
    def test_encoding_and_decoding_are_between_data_and_noise_of_z(self):
        model = rotated(ROTATION)
        mine = encode(DATA.denoiser(SDE), X, UniPC(3), check=True, steps=6)
        found = encode(model, X, UniPC(3), check=True, steps=6)
        torch.testing.assert_close(ROTATION.decode(found.latent), mine.latent)
        torch.testing.assert_close(found.error, mine.error)
        back = decode(model, found.latent, UniPC(3), grid=found.grid)
        expected = decode(DATA.denoiser(SDE), mine.latent, UniPC(3), grid=mine.grid)
        torch.testing.assert_close(back.x, expected.x)

    def test_edits_are_those_of_data(self):
        model, own = rotated(ROTATION), DATA.denoiser(SDE)
        pairs = [
            (interpolation(own, X[:2], X[2:4], DDIM(), weights=3, steps=6),
             interpolation(model, X[:2], X[2:4], DDIM(), weights=3, steps=6)),
            (edit(own, X, DDIM(), strength=0.5, steps=6), edit(model, X, DDIM(), strength=0.5, steps=6)),
        ]  # fmt: skip
        for a, b in pairs:
            torch.testing.assert_close(b.x, a.x)
            assert b.latent.shape[-1] == 4

    def test_perturbations_are_of_z(self):
        """The noise is that of z: the same as of the encoded reference in a model of z."""
        model = rotated(ROTATION)
        bare, z = Latent(model, None), ROTATION.encode(X)
        for mask in (None, torch.tensor([True, False, False, True])):
            found = sdedit(model, X, DDPM(), strength=0.5, mask=mask, seed=0, steps=6)
            expected = sdedit(bare, z, DDPM(), strength=0.5, mask=mask, seed=0, steps=6)
            torch.testing.assert_close(found.latent, expected.x)
            torch.testing.assert_close(found.x, ROTATION.decode(expected.x))
        for by in ("perturbation", "encoding"):
            solver = DDIM()
            found = variations(model, X, 2, solver, by=by, seed=0, steps=6)
            expected = variations(bare, z, 2, solver, by=by, seed=0, steps=6)
            torch.testing.assert_close(found.latent, expected.latent)
            torch.testing.assert_close(found.x, ROTATION.decode(expected.x.flatten(0, 1)).unflatten(0, (2, 5)))


def test_a_network_is_told_and_a_codec_too():
    """The same condition: the network's and the shift's."""
    net = X0Denoiser(lambda x, t, low: 0 * x + low, SDE)
    found = sample(
        Latent(net, Shift(lambda low, **_: 10 * low)), (3, 2), DDIM(), steps=2, cond={"low": torch.ones(3, 2)}
    )
    torch.testing.assert_close(found.x, torch.full((3, 2), 11.0))


def test_diagnose_sees_the_network_through_the_codec():
    """What it tells of the adapter inside, it tells of the latent: here that the label is that of another schedule."""
    exact = Gaussian([0.0, 0.0], std=0.5).denoiser(CosineVPSDE())
    wrong = EpsDenoiser(exact.eps, VPSDE(t_max=0.99))
    z = 0.5 * normal(500, 2, seed=4)
    told = diagnose(wrong, z).better
    assert told
    assert diagnose(Latent(wrong, Standardise(5.0)), z).better == told
