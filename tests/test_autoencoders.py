"""Autoencoders: what their networks map, what their loss is, that training survives, and what a codec makes of them."""

from __future__ import annotations

import csv
import inspect
import json
import math
import os
import pickle
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from common import generator, normal

import scoresde
from scoresde import VPSDE, Latent, elbo
from scoresde.codecs import AutoencoderCodec, Encoded, Standardise
from scoresde.data import Colourisation, TrainingData
from scoresde.exact import Gaussian
from scoresde.nn import Autoencoder, KLAutoencoder, PatchDiscriminator, VQAutoencoder
from scoresde.training import (
    AutoencoderConfig,
    AutoencoderLoss,
    AutoencoderTrainer,
    CheckpointError,
    LatentData,
    ModelConfig,
    NonFiniteLossError,
    TrainConfig,
    Trainer,
    export_codec,
    load_autoencoder,
    load_codec,
    load_latent,
)
from scoresde.training.autoencoder_loss import AutoencoderWorker
from scoresde.training.autoencoders import CODEC, Measured, measured
from scoresde.training.perceptual import PerceptualDistance, classifier_distance, lpips, perceptual_distance
from scoresde.variance import AnalyticDenoiser, VarianceTable, estimate
from scoresde.variance.estimate import table_times

SMALL = {"image_channels": 1, "latent_channels": 2, "channels": 4, "multipliers": (1, 1, 2)}
X = normal(24, 1, 8, 8, seed=1, dtype=torch.float32).clamp(-1, 1)
KINDS = {"kl": {}, "vq": {"codes": 8}}


def net(kind="kl", **options):
    return AutoencoderConfig(kind, SMALL | KINDS[kind] | options).build(seed=0)


class TestNetworks:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(("dims", "patch"), [(1, 2), (2, 1), (3, 1)])
    def test_the_size_is_divided_and_comes_back(self, kind, dims, patch):
        one = net(kind, dims=dims, patch=patch, multipliers=(1, 2))
        x = normal(3, 1, *dims * [8], dtype=torch.float32)
        assert one.factor == 2 * patch
        shape = (2, *dims * [8 // one.factor])
        assert one.latent_shape(x.shape[1:]) == shape
        m = one.encode(x)
        m = m.mean if isinstance(m, Encoded) else m
        assert m.shape[1:] == shape
        assert one.decode(m).shape == x.shape
        found = one(x, torch.zeros_like(m))
        torch.testing.assert_close(found.x, one.decode(m))  # at the mean
        assert len(found.told) == len(one.tells)

    def test_the_options_of_a_codebook_s_network_are_those_of_every_autoencoder_and_two(self):
        """It names them itself, for whoever reads its signature: with the same order, kinds and defaults."""
        every = inspect.signature(Autoencoder).parameters
        own = dict(inspect.signature(VQAutoencoder).parameters)
        assert (own.pop("codes").default, own.pop("commitment").default) == (512, 0.25)
        assert list(own.values()) == list(every.values())

    def test_the_divergence_is_that_of_the_distributions(self):
        one = net()
        law = one.encode(X)
        q, p = torch.distributions.Normal(law.mean, law.std), torch.distributions.Normal(0.0, 1.0)
        kl = torch.distributions.kl_divergence(q, p).flatten(1).sum(1).mean()
        found = one(X, torch.zeros_like(law.mean))
        torch.testing.assert_close(found.told, kl[None])
        torch.testing.assert_close(found.cost, kl / 64)

    def test_the_nearest_vector_and_the_gradient_past_it(self):
        """By all distances; straight through: the gradient at m is the decoder's at e. The codebook's cost has the
        gradients of its two terms."""
        one = net("vq")
        m = normal(3, 2, 2, 2, dtype=torch.float32).requires_grad_()
        e = one.codebook.weight
        distances = (m.movedim(1, -1).unsqueeze(-2) - e).square().sum(-1)
        index = one.codebook.nearest(m)
        assert torch.equal(index, distances.argmin(-1))
        replaced = one.codebook.vectors(index)
        at_e = replaced.detach().requires_grad_()
        torch.testing.assert_close(one.decode(m), one.decoder.of(at_e))
        mine = torch.autograd.grad(one.decode(m).square().sum(), m)[0]
        torch.testing.assert_close(mine, torch.autograd.grad(one.decoder.of(at_e).square().sum(), at_e)[0])
        one.encoder = torch.nn.Identity()
        found = torch.autograd.grad(one(m, m).cost, (m, e))
        r = (m - replaced).detach() / m.numel()
        torch.testing.assert_close(found[0], 2 * one.commitment * r)
        mean = torch.zeros_like(e).index_add(0, index.flatten(), -2 * r.movedim(1, -1).flatten(0, -2))
        torch.testing.assert_close(found[1], mean)

    def test_how_the_codebook_is_used(self):
        book = net("vq").codebook
        torch.testing.assert_close(book.usage(torch.arange(8).reshape(2, 2, 2)), torch.tensor([8.0, 1.0]))
        torch.testing.assert_close(book.usage(torch.full((4, 4), 3)), torch.tensor([1.0, 1 / 8]))

    def test_the_discriminator_sees_an_item_and_a_patch_of_it(self):
        one = PatchDiscriminator(1, 4, layers=2)
        x = normal(3, 1, 48, 48, dtype=torch.float32).requires_grad_()
        logits = one(x)
        torch.testing.assert_close(one(x[1:2]), logits[1:2])
        # Without the norms, which know the whole item, a logit sees 34 pixels an axis.
        for i, layer in enumerate(one.body):
            if isinstance(layer, torch.nn.GroupNorm):
                one.body[i] = torch.nn.Identity()
        seen = torch.autograd.grad(one(x)[0, 0, 4, 4], x)[0][0, 0].abs()
        assert [int((seen.sum(axis) > 0).sum()) for axis in (0, 1)] == [34, 34]

    def test_what_does_not_fit_is_said(self):
        with pytest.raises(ValueError, match=r"items of shape \(1, 10, 8\): the autoencoder takes 1 channels.* f = 4"):
            net().latent_shape((1, 10, 8))
        with pytest.raises(ValueError, match=r"patch=0.*expected one level at least"):
            KLAutoencoder(patch=0)
        with pytest.raises(ValueError, match=r"commitment=-1"):
            VQAutoencoder(commitment=-1)
        with pytest.raises(ValueError, match="dims=0"):
            PatchDiscriminator(dims=0)
        assert PatchDiscriminator(1, 4, layers=2)(torch.zeros(1, 1, 12, 13)).shape == (1, 1, 1, 1)
        with pytest.raises(ValueError, match="autoencoder='gan'"):
            AutoencoderConfig("gan")


def worker(loss, step=0, kind="kl"):
    torch.manual_seed(0)
    players = loss.players(net(kind))
    distance = None if loss.features is None else perceptual_distance(loss.features)
    autocast = lambda: torch.autocast("cpu", enabled=False)  # noqa: E731
    return players, AutoencoderWorker(players, loss, distance, lambda: step, autocast)


class TestLoss:
    def test_the_adversarial_part_weighs_as_much_as_the_fit_at_the_last_layer(self):
        """Esser et al., 2021, eq. 7; and no player's part moves the other's weights."""
        loss = AutoencoderLoss(features="digits", adversarial=1.0, discriminator={"channels": 4, "layers": 1})
        players, work = worker(loss)
        theirs = list(players.discriminator.parameters())
        total, told = work(X, generator(3), {})
        alone, told_alone = worker(replace(loss, start=1))[1](X, generator(3), {})
        names = loss.tells(players.autoencoder)
        assert names == ("error", "perceptual", "kl", "generator", "discriminator", "adaptive_weight")
        said = dict(zip(names, told.tolist(), strict=True))
        torch.testing.assert_close(told_alone[:3], told[:3])
        assert told_alone[3:].tolist() == [0, 0, 0]
        expected = float(alone.detach()) + said["adaptive_weight"] * said["generator"] + said["discriminator"]
        assert math.isclose(float(total.detach()), expected, rel_tol=1e-5)
        last = players.autoencoder.last_layer
        both = torch.autograd.grad(total, last, retain_graph=True)[0]
        players2, work2 = worker(replace(loss, start=1))
        of_fit = torch.autograd.grad(work2(X, generator(3), {})[0], players2.autoencoder.last_layer)[0]
        torch.testing.assert_close((both - of_fit).norm(), of_fit.norm(), rtol=1e-3, atol=0)
        # H is the discriminator's own: its gradient there is that of the hinge of both.
        grads = torch.autograd.grad(total, theirs)
        y = players.autoencoder(X, torch.randn(24, 2, 2, 2, generator=generator(3))).x.detach()
        F = players.discriminator
        hinge = ((1 - F(X)).relu().mean() + (1 + F(y)).relu().mean()) / 2
        torch.testing.assert_close(grads, torch.autograd.grad(hinge, theirs), rtol=1e-4, atol=1e-6)

    def test_a_part_of_a_batch_draws_what_the_whole_has(self):
        from scoresde.training import Part

        _, work = worker(AutoencoderLoss(error="l2", cost=1.0))
        whole = work(X, generator(3), {})[0]
        parts = [work(X[i : i + 12], Part(generator(3), i, 24), {})[0] for i in (0, 12)]
        torch.testing.assert_close((parts[0] + parts[1]) / 2, whole)

    def test_the_distance_is_none_to_itself_and_symmetric(self):
        d = classifier_distance("fashion-mnist")
        y = X.roll(1, 0)
        torch.testing.assert_close(d(X, X), torch.zeros(24))
        torch.testing.assert_close(d(X, y), d(y, X))
        torch.testing.assert_close(d(X[:1], y[:1]), d(X, y)[:1])
        assert bool((d(X, y) > 0).all())
        with pytest.raises(ValueError, match="images of 3 channels: the features classifier of fashion-mnist are of 1"):
            d(X.expand(-1, 3, -1, -1), X.expand(-1, 3, -1, -1))
        with pytest.raises(ValueError, match="features='nothing'"):
            classifier_distance("nothing")

    def test_a_place_without_features_has_a_gradient(self):
        distance = PerceptualDistance([torch.nn.Identity()], [torch.ones(1)], 1)
        x = torch.zeros(1, 1, 2, 2, requires_grad=True)
        assert bool(torch.autograd.grad(distance(x, X[:1, :, :2, :2]).sum(), x)[0].isfinite().all())

    def test_lpips_is_the_paper_s_of_files_that_one_has(self, tmp_path):
        """Files of the published layout, of few channels; and the formula, written out."""
        widths = [3, 2, 2, 3, 3, 4, 4, 4, 2, 2, 2, 2, 2, 2]
        numbers = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
        vgg = {"classifier.0.weight": torch.zeros(2, 2)}
        for i, n in enumerate(numbers):
            vgg |= {f"features.{n}.weight": normal(widths[i + 1], widths[i], 3, 3, seed=i, dtype=torch.float32),
                    f"features.{n}.bias": normal(widths[i + 1], seed=50 + i, dtype=torch.float32)}  # fmt: skip
        ends = [2, 4, 7, 10, 13]
        heads = {f"lin{k}.model.1.weight": torch.rand(1, widths[end], 1, 1) for k, end in enumerate(ends)}
        for name, content in (("vgg16.pth", vgg), ("vgg.pth", heads)):
            torch.save(content, tmp_path / name)
        a, b = (normal(2, 3, 16, 16, seed=s, dtype=torch.float32) for s in (1, 2))
        found = perceptual_distance(f"lpips:{tmp_path}/vgg16.pth,{tmp_path}/vgg.pth")(a, b)
        mean = torch.tensor([-0.030, -0.088, -0.188]).reshape(3, 1, 1)
        f, expected = [(x - mean) / torch.tensor([0.458, 0.448, 0.450]).reshape(3, 1, 1) for x in (a, b)], 0.0
        for i, n in enumerate(numbers):
            f = [torch.conv2d(h, vgg[f"features.{n}.weight"], vgg[f"features.{n}.bias"], padding=1).relu() for h in f]
            if i + 1 in ends:
                u, v = (torch.nn.functional.normalize(h, dim=1) for h in f)
                head = heads[f"lin{ends.index(i + 1)}.model.1.weight"]
                expected = expected + (head * (u - v) ** 2).sum(1).mean((1, 2))
                f = [torch.max_pool2d(h, 2) for h in f] if i + 1 < 13 else f
        torch.testing.assert_close(found, expected)
        with pytest.raises(FileNotFoundError, match=r"LPIPS needs torchvision's VGG16.*nothing is downloaded"):
            lpips(tmp_path / "none.pth", tmp_path / "vgg.pth")
        with pytest.raises(ValueError, match=r"no finite tensor 'features\.0\.weight'"):
            lpips(tmp_path / "vgg.pth", tmp_path / "vgg16.pth")
        with pytest.raises(ValueError, match="two files"):
            perceptual_distance("lpips:one.pth")

    def test_a_file_from_elsewhere_runs_no_code(self, tmp_path):
        class Bomb:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "ran"),)

        (tmp_path / "evil.pth").write_bytes(pickle.dumps({"features.0.weight": Bomb()}))
        with pytest.raises(ValueError, match="cannot be read as a file of tensors"):
            lpips(tmp_path / "evil.pth", tmp_path / "evil.pth")
        assert not (tmp_path / "ran").exists()


GAME = AutoencoderLoss(features="digits", adversarial=0.5, start=3, discriminator={"channels": 4, "layers": 1})


def trainer(folder=None, kind="kl", loss=GAME, steps=6, data=X, **options):
    model = AutoencoderConfig(kind, SMALL | KINDS[kind])
    options = {"batch_size": 8, "log_every": 2, "checkpoint_every": 2, "warmup": 2, "schedule": "constant"} | options
    config = TrainConfig(steps=steps, threads=1, **options)
    return AutoencoderTrainer(model.build(seed=0), data, config, loss=loss, folder=folder, model=model)


class TestTraining:
    @pytest.mark.parametrize(("kind", "loss"), [("kl", GAME), ("vq", AutoencoderLoss())], ids=KINDS)
    def test_a_resumed_run_has_the_same_bits(self, kind, loss, tmp_path):
        """Cut before the discriminator's start and after: both players, the averages, the optimiser and the log."""
        whole = trainer(tmp_path / "whole", kind, loss).fit(progress=False)
        for steps in (2, 4, 6):
            parts = trainer(tmp_path / "parts", kind, loss, steps=steps).fit(progress=False)
        for mine, theirs in ((whole.net, parts.net), (whole.ema, parts.ema)):
            for a, b in zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True):
                assert torch.equal(a, b)
        logs = [(tmp_path / name / "log.csv").read_text().splitlines() for name in ("whole", "parts")]
        rows = [[{**row, "items_per_second": 0, "seconds": 0} for row in csv.DictReader(log)] for log in logs]
        assert rows[0] == rows[1]
        if kind == "vq":
            assert rows[0][-1].keys() >= {"error", "perplexity", "used"}
        else:
            assert rows[0][-1].keys() >= {"error", "perceptual", "kl", "generator", "adaptive_weight"}
            assert float(rows[0][0]["discriminator"]) == 0 < float(rows[0][-1]["discriminator"])
        assert (tmp_path / "whole" / CODEC).read_text() == (tmp_path / "parts" / CODEC).read_text()

    def test_it_learns(self):
        """Squares on a ground of their own grey: two numbers an item."""
        data = X[:, :, :1, :1].expand(-1, 1, 8, 8).clone()
        data[:, :, 2:6, 2:6] = X[:, :, 1:2, 1:2]
        loss = AutoencoderLoss(error="l2")
        found = trainer(loss=loss, steps=32, lr=1e-2, data=data, log_every=8).fit(progress=False)
        assert found.losses[-1][1] < 0.7 * found.losses[0][1]

    def test_it_stops_where_a_number_is_not_finite(self, tmp_path):
        one = trainer(tmp_path, log_every=1)
        one.augment = lambda batch, draws: batch / (one.step != 4)
        with pytest.raises(NonFiniteLossError, match="at step 4"):
            one.fit(progress=False)
        assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["00000002", "00000004"]

    def test_each_player_s_gradient_is_cut_by_itself(self):
        one = trainer(loss=replace(GAME, start=0), grad_clip=1e-3)
        assert [group["betas"] for group in one._optimiser.param_groups] == [(0.5, 0.9)] * 2
        one.fit(progress=False)
        for player in (one.net.autoencoder, one.net.discriminator):
            norm = torch.stack([p.grad.norm() for p in player.parameters()]).norm()
            assert float(norm) <= 1.001e-3

    def test_a_step_that_is_timed_changes_nothing(self):
        """As a run looks for the faster number of threads, where none is set: of both players."""
        one = trainer(loss=replace(GAME, start=0))
        before = [p.clone() for p in one.net.parameters()]
        one._trial()()
        assert all(torch.equal(a, b) for a, b in zip(before, one.net.parameters(), strict=True))
        assert all(p.grad is None for p in one.net.parameters())

    def test_another_run_is_refused(self, tmp_path):
        trainer(tmp_path, steps=2).fit(progress=False)
        with pytest.raises(CheckpointError, match=r"loss\.adversarial: 0\.5 in the file, 0\.25 here"):
            trainer(tmp_path, loss=replace(GAME, adversarial=0.25))
        with pytest.raises(CheckpointError, match="autoencoder: KLAutoencoder"):
            trainer(tmp_path, "vq")
        with pytest.raises(ValueError, match="takes 1 channels"):
            trainer(data=X.expand(-1, 3, -1, -1))
        with pytest.raises(ValueError, match=r"data \(1, 8, 8\): .* 3 \* 2\^layers = 12 an axis at least"):
            trainer(loss=AutoencoderLoss(adversarial=0.5, start=3, discriminator={"layers": 2}))
        with pytest.raises(ValueError, match="model= describes another autoencoder"):
            AutoencoderTrainer(net(channels=8), X, TrainConfig(steps=1), model=AutoencoderConfig("kl", SMALL))
        with pytest.raises(TypeError, match=r"Linear: expected one of scoresde\.nn"):
            AutoencoderTrainer(torch.nn.Linear(2, 2), X, TrainConfig(steps=1))
        with pytest.raises(ValueError, match="betas"):
            AutoencoderLoss(betas=(1.0, 0.9))


class TestCodec:
    def test_z_has_mean_0_and_variance_1_with_the_encoder_s_noise(self):
        one = net()
        with torch.no_grad():
            one.encoder.outward[-1].bias.copy_(torch.tensor([2.0, -1.0, -3.0, 0.5]))  # means, and log variances
        found = measured(one, TrainingData(X), items=24)
        codec = found.codec(one)
        law = codec.encoding(X)
        torch.testing.assert_close(law.mean.mean((0, 2, 3)), torch.zeros(2), rtol=0, atol=1e-5)
        torch.testing.assert_close((law.mean**2 + law.std**2).mean(), torch.tensor(1.0), rtol=1e-4, atol=0)
        z = law.draw(torch.randn(law.mean.shape, generator=generator(0)))
        error = (codec.decode(z) - X).square().mean().sqrt().detach()
        assert math.isclose(found.std, float(error), rel_tol=1e-4)  # the same draws

    def test_it_is_what_the_run_left_and_can_be_taken_away(self, tmp_path):
        one = trainer(tmp_path / "run", steps=2).fit(progress=False)
        codec = load_codec(tmp_path / "run")
        torch.testing.assert_close(codec.encode(X), one.codec.encode(X))
        export_codec(tmp_path / "run", tmp_path / "away")
        assert torch.equal(load_codec(tmp_path / "away").encode(X), codec.encode(X))
        with pytest.raises(FileExistsError):
            export_codec(tmp_path / "run", tmp_path / "away")
        with warnings.catch_warnings():
            trainer(tmp_path / "run", steps=4)._run(progress=False)  # as a kill would leave it, before it is measured
        with pytest.raises(CheckpointError, match="was measured with weights"):
            load_codec(tmp_path / "run")
        trainer(tmp_path / "run", steps=4).fit(progress=False)
        assert Measured.read(tmp_path / "run").items == 24
        (tmp_path / "away" / CODEC).unlink()
        with pytest.raises(FileNotFoundError, match="says how the latent is scaled"):
            load_codec(tmp_path / "away")
        text = (tmp_path / "run" / CODEC).read_text()
        (tmp_path / "run" / CODEC).write_text(text.replace('"items": 24', '"items": 25'))
        with pytest.raises(CheckpointError, match="is damaged"):
            load_codec(tmp_path / "run")

    def test_a_denoiser_s_run_is_none(self, tmp_path):
        model = ModelConfig(network="mlp", options={"event_shape": 2, "width": 8})
        Trainer(model.build(0), X[:, 0, 0, :2], TrainConfig(steps=1, threads=1), folder=tmp_path, model=model).fit(
            False
        )
        with pytest.raises(CheckpointError, match="is of a denoiser: expected the run of an AutoencoderTrainer"):
            load_autoencoder(tmp_path)


LABELS = torch.arange(24) % 3


class TestLatents:
    def test_they_are_the_codec_s(self, tmp_path):
        """Of items as training shows them: mirrored by the same coin, told the same, dropped likewise."""
        data = TrainingData(X, LABELS, flip=True, drop=0.3, seed=4)
        one = net()
        codec = measured(one, TrainingData(X)).codec(one)
        found = LatentData.of(data, codec, tmp_path, draw=False, batch_size=10)
        items, epochs = torch.tensor([5, 0, 23, 7, 7]), torch.tensor([0, 0, 1, 1, 2])
        mine, theirs = found.batch(items, epochs), data.batch(items, epochs)
        torch.testing.assert_close(mine.x, codec.encode(theirs.x).detach())
        assert torch.equal(mine.cond["label"], theirs.cond["label"])
        assert len(found) == 24
        assert found.shape == (2, 2, 2)
        assert found.network_options == {"num_classes": 3}

    def test_z_is_drawn_anew_in_each_epoch_from_the_encoder_s_law(self, tmp_path):
        one = net()
        with torch.no_grad():
            one.encoder.outward[-1].bias[2:] = 1.0
        codec = measured(one, TrainingData(X)).codec(one)
        found, law = LatentData.of(X, codec, tmp_path), codec.encoding(X)
        items = torch.arange(24)
        first, again, next_one = (found.batch(items, torch.full((24,), e)).x for e in (0, 0, 1))
        assert torch.equal(first, again)
        u = torch.stack([(x - law.mean) / law.std for x in (first, next_one)]).detach()
        assert abs(float(u.mean())) < 5 / math.sqrt(u.numel())
        assert abs(float((u[0] * u[1]).mean())) < 5 / math.sqrt(u[0].numel())
        assert abs(float(u.square().mean()) - 1) < 5 * math.sqrt(2 / u.numel())

    def test_they_are_encoded_once_and_refused_with_another_codec(self, tmp_path, monkeypatch):
        codec = Standardise(0.0, 2.0)
        data = LatentData.of(X, codec, tmp_path)
        torch.testing.assert_close(data.batch(torch.arange(3)).x, X[:3] / 2)
        monkeypatch.setattr(Standardise, "encode", None)  # from the files now
        assert torch.equal(LatentData.of(X, codec, tmp_path).batch(torch.arange(3)).x, X[:3] / 2)
        monkeypatch.undo()
        with pytest.raises(CheckpointError, match=r"has latents of something else\. codec: .*remove .*latents\.json"):
            LatentData.of(X, Standardise(0.0, torch.tensor(3.0)), tmp_path)
        with pytest.raises(CheckpointError, match=r"something else\. data: "):
            LatentData.of(X[:20], codec, tmp_path)
        with (tmp_path / "latents.npy").open("r+b") as file:
            file.seek(200)
            file.write(b"\0\0\0")
        with pytest.raises(CheckpointError, match=r"latents\.npy is truncated or damaged"):
            LatentData.of(X, codec, tmp_path)

    def test_conditions_of_pixels_are_refused(self, tmp_path):
        data = TrainingData(X.expand(-1, 3, -1, -1), conditions=(Colourisation(),))
        with pytest.raises(ValueError, match="is made of the item"):
            LatentData.of(data, Standardise(0.0, 1.0), tmp_path)

    def test_a_run_of_them_goes_on_and_knows_its_codec(self, tmp_path):
        config = TrainConfig(steps=2, batch_size=8, threads=1)
        model = ModelConfig(options={"image_channels": 1, "channels": 8, "multipliers": [1], "blocks": 1})

        def run(codec, steps):
            data = LatentData.of(X, codec, tmp_path / repr(codec))
            folder = tmp_path / "run"
            return Trainer(model.build(0), data, replace(config, steps=steps), folder=folder, model=model)

        run(Standardise(0.0, 2.0), 2).fit(progress=False)
        assert run(Standardise(0.0, 2.0), 2).step == 2
        with pytest.raises(CheckpointError, match=r"data: LatentData of 24 items, latents, of .* std=2\), .* std=3\)"):
            run(Standardise(0.0, 3.0), 2)


class Linear(torch.nn.Module):
    """x W^T, and a standard deviation for each entry if there is one."""

    def __init__(self, W, std=None):
        super().__init__()
        self.W, self.std = torch.nn.Parameter(W), std

    def forward(self, x):
        m = x @ self.W.T
        return m if self.std is None else (m, self.std.expand_as(m))


class TestLinearGaussian:
    """x = W m + s eps, m ~ N(0, I): log p(x) is known, and so is p(m | x); the encoder is another Gaussian."""

    s, scale = 0.5, 1.7
    W = normal(4, 2, seed=5)
    x = normal(3, 4, seed=6)
    std = torch.tensor([0.5, 0.8], dtype=torch.float64)
    codec = AutoencoderCodec(Linear(normal(2, 4, seed=7) / 3, std), Linear(W), scale=scale, std=s)
    prior = Gaussian([0.0, 0.0], std=scale)  # of z = scale m

    def known(self):
        """log p(x), and KL(q(m | x) | p(m | x)), which is the gap."""
        I = torch.eye(2, dtype=torch.float64)  # noqa: E741
        truth = torch.distributions.MultivariateNormal(
            torch.zeros(4).double(), self.W @ self.W.T + self.s**2 * torch.eye(4)
        )
        precision = I + self.W.T @ self.W / self.s**2
        posterior = torch.distributions.MultivariateNormal(
            self.x @ self.W @ precision.inverse() / self.s**2, precision_matrix=precision
        )
        law = self.codec.encoding(self.x)
        q = torch.distributions.MultivariateNormal(law.mean / self.scale, torch.diag(self.std**2))
        return truth.log_prob(self.x), torch.distributions.kl_divergence(q, posterior)

    def test_the_bound_is_below_by_exactly_the_gap(self):
        """To rounding: its terms are quadratic in z, so their means over q are those over 2 K points, mean +- sqrt(K)
        std e_i."""
        log_p, gap = self.known()
        law = self.codec.encoding(self.x)
        points = [sign * math.sqrt(2) * e for e in torch.eye(2).double() for sign in (-1, 1)]
        z = [law.draw(point) for point in points]
        decoding = torch.stack([self.codec.log_likelihood(self.x, one) for one in z]).mean(0)
        of_z = torch.stack([self.prior.log_prob(one) for one in z]).mean(0)
        torch.testing.assert_close(decoding + of_z + law.entropy(), log_p - gap, rtol=1e-10, atol=1e-10)

    def test_elbo_has_it_and_an_error_of_each_term(self):
        """By a diffusion whose prior is exact: in continuous time its own bound of z is tight, but for its ends, which
        are below 1e-3 nats here. 60 runs; means within five standard errors, and each term's stated error is the
        spread over the runs: the variance of 60 has a relative standard error of sqrt(2 / 59) = 0.18, and more where
        one run's draws are few."""
        log_p, gap = (value[:1].detach() for value in self.known())
        model = Latent(self.prior.denoiser(VPSDE()), self.codec)
        found = elbo(model, self.x[:1].expand(60, 4), draws=64, seed=list(range(60)))
        error = float(found.value.std()) / math.sqrt(60)
        assert abs(float(found.value.mean() - (log_p - gap))) < 5 * error + 1e-3
        assert found.stderrs.keys() == {"denoising", "reconstruction", "decoding"}
        total = sum(stderr**2 for stderr in found.stderrs.values())
        torch.testing.assert_close(total, found.stderr**2)
        for name, stderr in found.stderrs.items():
            spread = getattr(found, name).std()
            assert 0.4 < float(spread**2 / stderr.square().mean()) < 1.8, name
        assert torch.equal(found.entropy, found.entropy[:1].expand(60))


class TestCommands:
    def test_an_autoencoder_and_a_diffusion_of_its_latent(self, tmp_path, monkeypatch, capsys):
        """Trained, gone on with, drawn from, exported, with the bound in its terms; and each refusal in its place."""
        pytest.importorskip("msgspec")
        from scoresde.cli import main

        monkeypatch.chdir(tmp_path)
        np.save("x.npy", torch.randint(256, (12, 1, 8, 8), generator=generator(0)).to(torch.uint8).numpy())

        def run(*words):
            status = main([str(word) for word in words])
            return status, capsys.readouterr()

        own = ["--data", "x.npy", "--batch-size", 4, "--device", "cpu", "--quiet", "--set", "train.schedule=constant"]
        layers = ["--set", "loss.discriminator.layers=1"]
        codec = ["train-autoencoder", *own, "--set", "autoencoder.options.channels=4", "--out", "codec"]
        assert run(*codec, "--steps", 1)[0] == 0
        assert run("train-autoencoder", "--out", "codec", "--steps", 2, "--quiet")[1].out.startswith(
            "codec: 2 steps, psnr"
        )
        assert (tmp_path / "codec/samples/00000002.png").exists()
        assert "another" in run(*codec, "--steps", 2, "--adversarial", 0.5, *layers)[1].err
        assert "an autoencoder is of data" in run(*codec[:-1], "other", "--set", "data.codec=codec")[1].err
        assert "expected a power of two" in run(*codec, "--factor", 3)[1].err
        small = [*("--set", "model.options.channels=8", "--set", "evaluate.grid=2", "--set", "evaluate.nfe=1")]
        latent = ["train", *own, *small, "--codec", "codec", "--out", "latent"]
        assert run(*latent, "--steps", 1)[0] == 0
        assert run("train", "--out", "latent", "--steps", 2, "--quiet")[0] == 0
        draw = ["--n", 2, "--nfe", 1, "--quiet", "--out"]
        assert run("sample", "latent", *draw, "a.npz")[0] == 0
        assert run("export", "latent", "--out", "away")[0] == 0
        assert run("sample", "away", *draw, "b.npz")[0] == 0
        a, b = (np.load(name)["images"] for name in ("a.npz", "b.npz"))
        assert a.shape == (2, 1, 8, 8)
        assert (a == b).all()
        model = load_latent("latent")
        assert model.codec is not None
        with pytest.warns(UserWarning, match="its samples are latents: scoresde.training.load_latent decodes"):
            scoresde.load("latent")
        measure = ["likelihood", "latent", "--limit", 2, "--quiet", "--out", "bound.json"]
        assert "of data it has a bound alone" in run(*measure)[1].err
        assert run(*measure, "--bound", "--draws", 4)[0] == 0
        terms = json.loads((tmp_path / "bound.json").read_text())["bound"]["terms"]
        assert terms.keys() == {"decoding", "prior", "denoising", "reconstruction", "entropy"}
        assert "diffuses latents" in run("sample", "latent", "--clip", *draw, "c.npz")[1].err
        table = ["variance", "latent", "--samples", 3, "--times", 2, "--seed", 4, "--batch-size", 5, "--quiet"]
        assert run(*table, "--out", "v.npz")[0] == 0
        found = VarianceTable.load("v.npz", model.sde)  # of the latents that are diffused
        data = TrainingData(torch.from_numpy(np.load("x.npy")), levels=256, seed=4)
        z = LatentData.of(data, model.codec, "again").batch(torch.arange(12)).x
        expected = estimate(model, z, table_times(model.sde, 2), samples=3, seed=4, batch_size=5)
        torch.testing.assert_close(found.eps_square, expected.eps_square)
        ranges = []
        with monkeypatch.context() as patched:  # the levels of data bound no latent's variance
            own = lambda *given: (ranges.append(given[2]), AnalyticDenoiser(*given))[1]  # noqa: E731
            patched.setattr("scoresde.cli.drawing.AnalyticDenoiser", own)
            assert run("sample", "latent", "--variance", "v.npz", "--solver", "ddpm", *draw, "v1.npz")[0] == 0
        assert ranges == [None]
        hole = ["restore", "latent", "--input", "x.npy", "--operator", "random:0.5", "--quiet", "--out", "r.npz"]
        assert r"DPS(model, lambda z: A(model.codec.decode(z))" in run(*hole)[1].err
        assert run(*codec, "--steps", 3)[0] == 0
        assert "is another codec than --codec codec" in run(*latent, "--steps", 3)[1].err
        shutil.rmtree("latent/codec")
        assert "the codec of" in run("sample", "latent", *draw, "c.npz")[1].err
