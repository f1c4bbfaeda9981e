"""Activations as features: those of linear networks are known exactly; and the rest of what a hook can get wrong."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from common import normal
from torch import nn
from torch.nn import functional as F

from scoresde import VPSDE, Clip, DDPMChain, EpsDenoiser, Latent, X0Denoiser, sample_seeds
from scoresde.activations import features, layer_shapes
from scoresde.codecs import Standardise
from scoresde.exact import Gaussian
from scoresde.guidance import ClassifierFree
from scoresde.interop.diffusers import library
from scoresde.metrics import NetworkFeatures
from scoresde.nn import DiT, UNet
from scoresde.nn.dit import positions

SDE = VPSDE()


class Maps(nn.Module):
    """Two convolutions of three sizes, one used twice, one never, one that an operation in place follows."""

    def __init__(self, dims: int = 2) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.one, self.small, self.back = conv(2, 3, 1), conv(3, 5, 2, stride=2), nn.Upsample(scale_factor=2)
        self.out, self.unused, self.several = conv(5, 2, 1), nn.Identity(), nn.Tanh()
        self.pair, self.told = Pair(), []

    def forward(self, x, time, label=None):
        self.told.append((time, label))
        h = self.several(self.several(self.one(x)))
        h = self.small(h).relu_()
        return self.pair(self.out(self.back(h)))[0]


class Pair(nn.Module):
    def forward(self, x):
        return x, x


def maps(seed=0, dims=2):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Maps(dims)


X = normal(4, 2, 6, 8, dtype=torch.float32)
EPS = normal(4, 2, 6, 8, seed=1, dtype=torch.float32)


def noisy(t, x=X, eps=EPS, sde=SDE):
    return float(sde.alpha(t)) * x + float(sde.sigma(t)) * eps


@pytest.mark.parametrize("sde", [SDE, DDPMChain.linear(1000)], ids=["vp", "chain"])
def test_features_of_a_linear_network_are_known(sde):
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4)).double()
    denoiser = X0Denoiser(lambda x, t: net(x), sde)
    x, eps, times = normal(5, 4), normal(5, 4, seed=1), [0.1 * sde.t_max, 0.7 * sde.t_max]
    found = features(denoiser, x, times, ["0", "1"], noise=eps, module=net)
    expected = []
    for t in times:
        h = (sde.alpha(t) * x + sde.sigma(t) * eps) @ net[0].weight.T + net[0].bias
        expected += [h, h @ net[1].weight.T + net[1].bias]
    torch.testing.assert_close(found, torch.cat(expected, 1), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_maps_are_resized_and_concatenated(dims):
    net, size = maps(dims=dims), (4, 6, 8)[-dims:]
    x, eps = (normal(3, 2, *size, seed=seed, dtype=torch.float32) for seed in (0, 1))
    found = features(EpsDenoiser(net, SDE), x, [0.2, 0.6], ["small", "one"], noise=eps, tokens=False)
    expected = []
    for t in (0.2, 0.6):
        with torch.no_grad():
            one = net.one(noisy(t, x, eps))
            half = net.small(one.tanh().tanh())
        half = F.interpolate(half, size, mode=("linear", "bilinear", "trilinear")[dims - 1], align_corners=False)
        expected += [half, one]
    torch.testing.assert_close(found, torch.cat(expected, 1))  # half as it was before relu_
    other = features(EpsDenoiser(net, SDE), x, 0.2, "small", noise=eps, tokens=False, size=(3,) * dims)
    assert other.shape == (3, 5, *(3,) * dims)


def test_an_item_has_its_noise_alone_and_in_any_batch_at_all_times():
    denoiser = EpsDenoiser(maps(), SDE)
    whole = features(denoiser, X, [0.3, 0.8], "one", seed=7)
    for size in (1, 3):
        torch.testing.assert_close(features(denoiser, X, [0.3, 0.8], "one", seed=7, batch_size=size), whole)
    alone = features(denoiser, X[2:3], [0.3, 0.8], "one", seed=[sample_seeds(7, 4)[2]])
    torch.testing.assert_close(alone, whole[2:3])
    each = [features(denoiser, X, t, "one", seed=7) for t in (0.3, 0.8)]
    assert torch.equal(torch.cat(each, 1), whole)
    assert not torch.equal(features(denoiser, X, [0.3, 0.8], "one", seed=8), whole)


def test_without_noise_the_network_sees_the_data():
    net = maps()
    denoiser = EpsDenoiser(net, SDE)
    with torch.no_grad():
        expected = net.one(X)
    assert torch.equal(features(denoiser, X, 0, "one"), expected)
    assert torch.equal(features(denoiser, X, [0.5, 0], "one", seed=3)[:, 3:], expected)
    assert torch.equal(features(EpsDenoiser(net, DDPMChain.linear(10)), X, 0, "one", noise=EPS), expected)


def test_the_network_is_told_its_own_labels_and_its_conditions():
    net = maps()
    denoiser = EpsDenoiser(net, SDE, time=lambda t: 999 * t)
    features(denoiser, X, [0.25, 0.5], "one", cond={"label": torch.arange(4)}, batch_size=3)
    assert [(time.tolist(), label.tolist()) for time, label in net.told] == [
        ([pytest.approx(999 * t)] * len(items), items) for items in ([0, 1, 2], [3]) for t in (0.25, 0.5)
    ]


def test_a_layer_has_a_name_or_a_pattern():
    net = UNet(channels=8, multipliers=(1, 2), blocks=1)
    denoiser = EpsDenoiser(net, SDE)
    x = normal(2, 1, 8, 8, dtype=torch.float32)
    found = features(denoiser, x, 0.3, ["up.3", "up.*", "up.0.block.conv1"])
    order = ["up.3", "up.0", "up.1", "up.2", "up.0.block.conv1"]
    assert torch.equal(found, torch.cat([features(denoiser, x, 0.3, name) for name in order], 1))
    shapes = layer_shapes(denoiser, x, 0.3)
    assert [shapes[name] for name in order[:4]] == [(8, 8, 8), (16, 4, 4), (16, 4, 4), (8, 8, 8)]
    assert found.shape[1] == sum(shapes[name][0] for name in order)
    with torch.no_grad():
        assert torch.equal(features(net, x, 0.3, ""), net(x, torch.full((2,), 0.3)))  # the network's own output


def test_what_cannot_be_taken_is_not_listed():
    shapes = layer_shapes(EpsDenoiser(maps(), SDE), X, 0.5)
    assert shapes == {"": (2, 6, 8), "one": (3, 6, 8), "small": (5, 3, 4), "back": (5, 6, 8), "out": (2, 6, 8)}


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        ("on", {}, r"layers='on' of Maps: expected 'one', or one of"),
        (["one", "smal*l.x"], {}, r"layers='smal\*l.x' of Maps: expected 'small', or one of"),
        ([], {}, r"layers=\[\]: expected the name of a layer"),
        ("unused", {}, "layer 'unused' is not called"),
        ("several", {}, "layer 'several' is called 2 times"),
        ("pair", {}, r"layer 'pair' returns tuple: expected floating-point \(B, C, \.\.\.\)"),
        ("one", {"size": (3,)}, r"size=\(3,\): expected 2 numbers"),
        ("one", {"size": (3, 0)}, "size=0: expected a whole number >= 1"),
        ("one", {"batch_size": 0}, "batch_size=0: expected"),
        ("one", {"t": 1.5}, r"t = 1.5 leaves \[0, 1.0\]"),
        ("one", {"t": None}, "t=None: expected a time of the denoiser's SDE"),
        ("one", {"seed": [1, 2]}, "2 seeds for 4 samples"),
        ("one", {"noise": EPS[:1]}, "noise has shape"),
        ("one", {"cond": {"label": torch.arange(3)}}, "has 3 entries for 4 samples"),
        ("one", {"x": X * torch.nan}, "what is given is not finite"),
    ],
)
def test_errors_name_the_fix_and_leave_the_network_as_it_was(layers, options, message):
    net = maps().train()
    net.out.eval()
    given = {"x": X, "t": 0.5} | options
    with pytest.raises(ValueError, match=message):
        features(EpsDenoiser(net, SDE), given.pop("x"), given.pop("t"), layers, **given)
    assert all(module.training == (module is not net.out) for module in net.modules())
    assert not any(module._forward_hooks for module in net.modules())


def test_hooks_are_gone_after_an_error_of_the_network():
    net = maps()
    with pytest.raises(RuntimeError):
        features(EpsDenoiser(net, SDE), X[:, :1], 0.5, "one")
    assert not any(module._forward_hooks for module in net.modules())


def test_no_gradients_unless_they_are_wanted_and_dropout_is_off():
    net = maps().train()
    net.back = nn.Sequential(net.back, nn.Dropout(0.5))
    denoiser = EpsDenoiser(net, SDE)
    found = features(denoiser, X, 0.5, ["out", "one"], noise=EPS)
    assert not found.requires_grad
    assert torch.equal(features(denoiser, X, 0.5, ["out", "one"], noise=EPS), found)
    with torch.no_grad():
        again = features(denoiser, X, 0.5, "one", noise=EPS, differentiable=True)
    again.sum().backward()
    torch.testing.assert_close(net.one.bias.grad, torch.full((3,), float(X[:, 0].numel())))


def test_tokens_lie_on_the_grid_of_their_patches():
    """The blocks of a transformer start as the identity: its tokens are those that it was given."""
    net = DiT(image_channels=2, width=16, depth=2, heads=2)
    denoiser = EpsDenoiser(net, SDE)
    patches = features(denoiser, X, 0.5, "inward", size=(3, 4))
    expected = patches + positions((3, 4), 16).T.unflatten(1, (3, 4))
    torch.testing.assert_close(features(denoiser, X, 0.5, "blocks.1", size=(3, 4)), expected)
    larger = F.interpolate(expected, (6, 8), mode="bilinear", align_corners=False)
    torch.testing.assert_close(features(denoiser, X, 0.5, "blocks.*"), torch.cat([larger, larger], 1))


class Tokens(nn.Module):
    """Pixels as tokens, after so many of another kind."""

    def __init__(self, before: int) -> None:
        super().__init__()
        self.before, self.tokens = before, nn.Identity()

    def forward(self, x, time=None):
        self.tokens(F.pad(x.flatten(2).transpose(1, 2), (0, 0, self.before, 0), value=9.0))
        return x


def test_tokens_of_another_kind_and_data_of_one_axis_need_a_word():
    assert torch.equal(features(Tokens(0), X, None, "tokens"), X)
    assert torch.equal(features(Tokens(1), X, None, "tokens", grid=(6, 8)), X)
    with pytest.raises(ValueError, match=r"layer 'tokens' has 49 tokens, no grid of square patches of \(6, 8\)"):
        features(Tokens(1), X, None, "tokens")
    with pytest.raises(ValueError, match=r"grid=\(6, 9\): layer 'tokens' has 49 tokens"):
        features(Tokens(1), X, None, "tokens", grid=(6, 9))
    line = X.flatten(2)
    with pytest.raises(ValueError, match=r"channels or tokens first: say tokens=True for \(B, tokens, C\)"):
        features(Tokens(0), line, None, "tokens")
    assert torch.equal(features(Tokens(0), line, None, "tokens", tokens=True), line)
    with pytest.raises(ValueError, match="it has no place there"):
        features(UNet(channels=8), X[:, :1, :4], 0.5, "time")  # the embedding of the time


def test_states_of_a_codec_and_wrappers():
    net = maps()
    denoiser = EpsDenoiser(net, SDE)
    latent = Clip(Latent(denoiser, Standardise(mean=1.0, std=2.0)))
    found = features(latent, X, 0.4, "one", noise=EPS)
    torch.testing.assert_close(found, features(denoiser, (X - 1) / 2, 0.4, "one", noise=EPS))
    guided = ClassifierFree(denoiser, weight=2.0, null={"label": 0})
    with pytest.raises(ValueError, match=r"take the denoiser inside|called 2 times in an evaluation"):
        features(guided, X, 0.4, "one", cond={"label": torch.ones(4)})


def test_half_precision_and_wide_data():
    net = maps().bfloat16()
    found = features(EpsDenoiser(net, SDE), X, 0.5, ["one", "small"], noise=EPS)
    assert found.dtype == torch.float32
    with torch.no_grad():
        one = net.one(noisy(0.5).bfloat16())
        half = net.small(one.tanh().tanh()).float()
    half = F.interpolate(half, (6, 8), mode="bilinear", align_corners=False)
    assert torch.equal(found, torch.cat([one.float(), half], 1))
    assert features(EpsDenoiser(maps(), SDE), X.double(), 0.5, "one").dtype == torch.float64


def test_any_network():
    """Bare: called as it is, with its own label; or inside a function."""
    net = maps()
    with torch.no_grad():
        expected = net.one(X)
    assert torch.equal(features(net, X, 3, "one"), expected)
    assert net.told[-1][0].tolist() == [3] * 4
    assert net.told[-1][0].dtype == torch.int64
    inside = EpsDenoiser(lambda x, t: SimpleNamespace(sample=net(x, t)).sample, SDE)
    with pytest.raises(TypeError, match="is around no torch module: give module="):
        features(inside, X, 0.5, "one")
    found = features(inside, X, 0.5, "one", module=net, noise=EPS)
    assert torch.equal(found, features(EpsDenoiser(net, SDE), X, 0.5, "one", noise=EPS))
    with pytest.raises(ValueError, match="whose input is taken as it is"):
        features(net, X, 3, "one", noise=EPS)
    with pytest.raises(TypeError, match="model is function: expected a Denoiser"):
        features(lambda x, t: x, X, 0.5, "one")
    with pytest.raises(TypeError, match="is around no torch module"):
        layer_shapes(Gaussian(mean=[0.0, 0.0], std=1.0).denoiser(SDE), X[:, :, 0, 0], 0.5)


def test_a_space_for_metrics():
    denoiser = EpsDenoiser(maps(), SDE)
    space = NetworkFeatures(lambda x: features(denoiser, x, 0.2, "small").mean((2, 3)), "denoiser at t = 0.2")
    assert space(X).shape == (4, 5)


def test_the_unet_of_diffusers():
    pytest.importorskip("diffusers", reason="diffusers is an optional extra: make test-interop")
    diffusers = library()
    net = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), norm_num_groups=4,
        layers_per_block=1, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    chain = DDPMChain.linear(1000)
    x = normal(2, 1, 8, 8, dtype=torch.float32)
    denoiser = EpsDenoiser(lambda x, t: net(x, t).sample, chain, time=chain.label)
    found = features(denoiser, x, [50, 150], "up_blocks.*", module=net, seed=1)
    shapes = layer_shapes(denoiser, x, 50, module=net)
    assert [shapes[f"up_blocks.{i}"] for i in range(2)] == [(16, 8, 8), (8, 8, 8)]
    assert found.shape == (2, 48, 8, 8)
    with pytest.raises(ValueError, match=r"layer 'down_blocks.0' returns tuple"):
        features(denoiser, x, 50, "down_blocks.0", module=net)
