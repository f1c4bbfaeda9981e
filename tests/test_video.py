"""The laws of clips: frames apart, attention over time, single frames as clips of length 1, and extension."""

from __future__ import annotations

import pytest
import torch
from common import generator, normal
from torch.nn import functional as F

import scoresde
from scoresde import VPSDE, EpsDenoiser, sample
from scoresde.editing import extend
from scoresde.exact import Gaussian
from scoresde.guidance import MomentMatching, PiGDM, ReconstructionGuidance, Replacement
from scoresde.nn import UNet
from scoresde.nn.frames import TimeAttention, apart, together, turned
from scoresde.solvers import DDIM, DDPM
from scoresde.training import ModelConfig, Part, TrainConfig, Trainer, dsm_loss, joint_loss
from scoresde.variance.trunk import TrunkWithHead

SMALL = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "heads": 2, "attention": (0,), "dims": 3}
VP = VPSDE()
TIMES = torch.tensor([5.0, 300.0, 900.0], dtype=torch.float64)


def clip_network(**options) -> UNet:
    """In float64, away from its start, where the last layers are zero."""
    draws = generator(3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = UNet(**SMALL, **options).double().eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=draws))
    return net.requires_grad_(False)


# --- the network -----------------------------------------------------------------------------------------------------


def test_without_attention_over_time_frames_are_images_of_their_own():
    """Permuted frames give permuted outputs; and the network is that of images, weight by weight."""
    net, x, order = clip_network(time_attention=()), normal(3, 1, 4, 8, 8), torch.tensor([2, 0, 3, 1])
    found = net(x, TIMES)
    torch.testing.assert_close(net(x[:, :, order], TIMES), found[:, :, order], rtol=0, atol=1e-12)
    images = UNet(**{**SMALL, "dims": 2}).double().eval()
    images.load_state_dict(net.state_dict())
    torch.testing.assert_close(images(x[:, :, 1], TIMES), found[:, :, 1], rtol=0, atol=1e-12)


def test_with_attention_over_time_they_are_not():
    """The order says something, for frames know how far they are apart; what is far away in space does not."""
    net, x, order = clip_network(time_attention=(0, 1)), normal(3, 1, 4, 8, 8), torch.tensor([2, 0, 3, 1])
    found = net(x, TIMES)
    assert (net(x[:, :, order], TIMES) - found[:, :, order]).abs().max() > 1e-2
    # Time reversed, which keeps all distances, too: the positions are directed.
    assert (net(x.flip(2), TIMES).flip(2) - found).abs().max() > 1e-2
    other = x.clone()
    other[:, :, 3] += 1
    changed = (net(other, TIMES) - found).abs().amax((0, 1, 3, 4))
    assert bool((changed > 1e-3).all())  # each frame sees each other


def test_positions_are_relative():
    q, k = normal(2, 9, 6, seed=1), normal(2, 9, 6, seed=2)
    same = q[:, :1].expand(2, 9, 6), k[:, :1].expand(2, 9, 6)
    scores = turned(same[0]) @ turned(same[1]).transpose(1, 2)
    for difference in range(-8, 9):
        along = scores.diagonal(difference, 1, 2)
        torch.testing.assert_close(along, along[:, :1].expand_as(along))
    assert (scores[:, 0, 1:] - scores[:, 1:, 0]).abs().min() > 1e-3
    torch.testing.assert_close(turned(q).norm(dim=-1), q.norm(dim=-1))
    torch.testing.assert_close(turned(q)[:, 0], q[:, 0])


def test_attention_over_time_is_position_by_position():
    """What happens at a pixel is of that pixel's features alone, but for the norm of its frame."""
    layer, h = TimeAttention(8, 2).double(), normal(2 * 5, 8, 3, 3)
    torch.nn.init.normal_(layer.project.weight, generator=generator())
    found = layer(h, 2)
    clip = together(layer.qkv(layer.norm(h)), 2)[:, :, :, 1, 2].transpose(1, 2)  # (B, F, 3 C)
    q, k, v = (part.unflatten(2, (2, 4)).transpose(1, 2) for part in clip.chunk(3, 2))
    seen = (turned(q) @ turned(k).transpose(-1, -2) / 2).softmax(-1) @ v
    by_hand = F.linear(seen.transpose(1, 2).flatten(2), layer.project.weight[:, :, 0, 0], layer.project.bias)
    torch.testing.assert_close(together(found - h, 2)[:, :, :, 1, 2].transpose(1, 2), by_hand)
    torch.testing.assert_close(together(apart(normal(2, 3, 4, 5)), 2), normal(2, 3, 4, 5))


def test_a_single_frame_is_a_clip_of_length_one_bit_for_bit():
    """Attention over one frame has the weight 1: that of its value alone, and no position. So an image is the same
    as a clip, as a frame of a batch of images, and by the network of images that has the value as a layer."""
    net, x = clip_network(time_attention=(0, 1)), normal(3, 1, 4, 8, 8)
    images = apart(x).unsqueeze(2)
    with_positions = net(images, TIMES.repeat_interleave(4))
    attends = [module for module in net.modules() if isinstance(module, TimeAttention)]
    plain = [(lambda h, clips, m=m: h + m.project(m.qkv(m.norm(h)).chunk(3, 1)[2])) for m in attends]
    for module, function in zip(attends, plain, strict=True):
        module.forward = function
    assert torch.equal(with_positions, net(images, TIMES.repeat_interleave(4)))
    # Frame by frame in a clip, attending to nothing else, it is that too, to the rounding of the time's embedding.
    torch.testing.assert_close(together(with_positions.squeeze(2), 3), net(x, TIMES), rtol=0, atol=1e-12)


def test_a_clip_does_not_depend_on_the_batch_and_takes_any_length():
    net, cond = clip_network(time_attention=(0, 1), num_classes=3, context=2), {"label": torch.tensor([0, 2, 1])}
    cond["context"] = normal(3, 4, 2, seed=8)
    x = normal(3, 1, 5, 8, 8)
    found = net(x, TIMES, **cond)
    for i in range(3):
        own = {name: value[i : i + 1] for name, value in cond.items()}
        torch.testing.assert_close(net(x[i : i + 1], TIMES[i : i + 1], **own), found[i : i + 1], rtol=0, atol=1e-12)
    told = (net(x, TIMES, label=cond["label"].flip(0), context=cond["context"]) - found).abs().amax((1, 2, 3, 4))
    assert told[0] > 1e-4
    assert told[1] == 0  # of the same class: others in the batch say nothing
    assert net(normal(3, 1, 9, 7, 6), TIMES, **cond).shape == (3, 1, 9, 7, 6)  # space of odd sizes
    assert clip_network(time_attention=(0,), patch=2)(normal(3, 1, 5, 8, 4), TIMES).shape == (3, 1, 5, 8, 4)


def test_samples_do_not_depend_on_the_batch():
    denoiser = EpsDenoiser(clip_network(time_attention=(1,)), VP, time=lambda t: 999 * t)
    x = sample(denoiser, (3, 1, 4, 4, 4), DDPM(), steps=3, seed=[4, 5, 6]).x
    alone = sample(denoiser, (1, 1, 4, 4, 4), DDPM(), steps=3, seed=[5]).x
    torch.testing.assert_close(x[1:2], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"time_attention": (2,)}, "levels"),
        ({"time_attention": (0,), "dims": 1}, "an axis of space"),
        ({"time_attention": (0,), "heads": 8}, "even number"),
        ({"time_attention": (0,), "heads": 3}, "does not divide"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        UNet(**{**SMALL, **options})


def test_a_head_on_the_features_of_clips():
    net = clip_network(time_attention=(1,), out_channels=1)
    x = normal(3, 1, 4, 8, 8)
    first, second = TrunkWithHead(net, block=True).both(x, TIMES)
    assert torch.equal(first, net(x, TIMES))
    assert second.shape == x.shape
    with pytest.raises(ValueError, match="patch=1"):
        TrunkWithHead(UNet(**{**SMALL, "patch": 2, "time_attention": ()}))


# --- training --------------------------------------------------------------------------------------------------------


def test_the_joint_loss_is_that_of_clips_and_that_of_images():
    """Every frame counts once, an image has its own time, and parts of a batch give the loss of the whole."""
    denoiser = EpsDenoiser(clip_network(time_attention=(0, 1), num_classes=3), VP, time=lambda t: 999 * t)
    x, cond, loss = normal(4, 1, 5, 4, 4), {"label": torch.tensor([0, 2, 1, 3])}, joint_loss(3)
    found = loss(denoiser, x, generator(1), cond)
    draws = generator(1)
    clips = dsm_loss(denoiser, x[:, :, :3], generator=draws, cond=cond)
    images = torch.stack([x[:, :, 3], x[:, :, 4]], 1).reshape(8, 1, 1, 4, 4)
    told = {"label": cond["label"].repeat_interleave(2)}
    assert torch.equal(found, (3 * clips + 2 * dsm_loss(denoiser, images, generator=draws, cond=told)) / 5)
    parts = [
        loss(denoiser, x[i : i + 2], Part(generator(1), i, 4), {"label": cond["label"][i : i + 2]}) for i in (0, 2)
    ]
    torch.testing.assert_close(sum(parts) / 2, found, rtol=1e-9, atol=1e-9)
    other = x.clone()
    other[:, :, 3:] = 0  # what is appended says nothing of the clip
    first = dsm_loss(denoiser, other[:, :, :3], generator=generator(1), cond=cond)
    assert torch.equal(first, clips)
    with pytest.raises(ValueError, match=r"expected \(C, 5 \+ K"):
        joint_loss(5)(denoiser, x, generator(), cond)


def test_a_run_on_clips_and_images_is_resumed_and_loaded_by_name(tmp_path):
    pytest.importorskip("safetensors")
    options = {**SMALL, "attention": (), "time_attention": (0, 1)}
    model = ModelConfig(options=options, predicts="v", time_scale=999)
    data = normal(8, 1, 4, 4, 4, dtype=torch.float32)

    def run(folder, steps):
        config = TrainConfig(steps=steps, batch_size=4, warmup=0, schedule="constant", checkpoint_every=1, threads=1)
        trainer = Trainer(model.build(0), data, config, folder=folder, model=model, loss=joint_loss(3))
        trainer.fit()
        return trainer

    run(tmp_path / "a", 1)
    resumed, whole = run(tmp_path / "a", 2), run(tmp_path / "b", 2)
    x, t = data[:2, :, :3], torch.tensor(0.5)
    with torch.no_grad():
        expected = whole.ema(x, t).mean
        assert torch.equal(resumed.ema(x, t).mean, expected)
        found = scoresde.load(tmp_path / "a")
        assert found.net.frames_apart
        assert torch.equal(found(x, t).mean, expected)
        assert found(data[:2, :, :1], t).mean.shape == (2, 1, 1, 4, 4)


# --- extension -------------------------------------------------------------------------------------------------------

RHO, WINDOW = 0.8, 4


def walk() -> Gaussian:
    """Windows of a stationary autoregression of order 1, of which two pixels go on by themselves: (1, 4, 2)."""
    i = torch.arange(WINDOW, dtype=torch.float64)
    cov = torch.kron(RHO ** (i[:, None] - i).abs(), torch.eye(2, dtype=torch.float64))
    return Gaussian(mean=torch.zeros(1, WINDOW, 2, dtype=torch.float64), cov=cov)


METHODS = {
    "moment matching": lambda D, mask, y: (MomentMatching(D, mask, y, 0.0, iterations=4), DDIM()),
    "replacement": lambda D, mask, y: (D, Replacement(DDPM(), mask, y)),
    "reconstruction": lambda D, mask, y: (ReconstructionGuidance(D, mask, y, 2.0), Replacement(DDPM(), mask, y)),
    "pigdm": lambda D, mask, y: (PiGDM(D, mask, y, 0.0), DDPM()),
}


@pytest.mark.parametrize("overlap", [1, 2])
def test_extension_by_an_exact_method_has_the_conditional_law(overlap):
    """x_{n+k} given x_n is N(rho^k x_n, 1 - rho^{2k}), frames later too, which windows pass on. 1000 series of two
    pixels: five standard errors of a slope are below 0.1, of a variance below 0.16."""
    x = normal(1000, 1, 2, 2)
    x[:, :, 1] = RHO * x[:, :, 0] + (1 - RHO**2) ** 0.5 * x[:, :, 1]
    options = {"window": WINDOW, "overlap": overlap, "steps": 30, "seed": 0}
    found = extend(walk().denoiser(VP), x, 7, METHODS["moment matching"], **options)
    assert torch.equal(found[:, :, :2], x)
    last = x[:, 0, 1].flatten()
    for k in (1, 2, 3, 5):
        new = found[:, 0, 1 + k].flatten()
        slope = float(new @ last / last.square().sum())
        assert abs(slope - RHO**k) < 0.1, (k, slope)
        assert abs(float((new - slope * last).var()) - (1 - RHO ** (2 * k))) < 0.16, k
    steps = found[:, 0, 1:] - RHO * found[:, 0, :-1]  # innovations, within windows and where they meet
    products = (steps[:, 1:] * steps[:, :-1]).mean((0, 2))
    assert float(products.abs().max()) < 0.05  # 0.36 / 2000^(1/2) is a standard error


@pytest.mark.parametrize("name", METHODS)
def test_an_extension_does_not_depend_on_the_batch(name):
    x, options = normal(3, 1, 2, 2), {"window": WINDOW, "overlap": 2, "steps": 5}
    denoiser = walk().denoiser(VP)
    found = extend(denoiser, x, 7, METHODS[name], seed=[4, 5, 6], **options)
    assert found.shape == (3, 1, 7, 2)
    assert torch.equal(found[:, :, :2], x)
    alone = extend(denoiser, x[1:2], 7, METHODS[name], seed=[5], **options)
    torch.testing.assert_close(found[1:2], alone, rtol=1e-9, atol=1e-9)
    assert len({round(v, 6) for v in found[0].flatten().tolist()}) == 14  # no noise twice
    assert torch.equal(extend(denoiser, x, 2, METHODS[name], seed=0, **options), x)


def test_the_bias_of_replacement_shows_and_guidance_mends_it():
    """Given x_1 = x_2 = 2, x_3 is N(1.6, 0.36). Replacement alone does not lead there; guidance by reconstruction goes
    most of the way. 2000 values: five standard errors of a mean are below 0.08."""
    means = {}
    for name in ("moment matching", "replacement", "reconstruction"):
        x = torch.full((1000, 1, 2, 2), 2.0, dtype=torch.float64)
        found = extend(walk().denoiser(VP), x, 3, METHODS[name], window=WINDOW, overlap=2, steps=30, seed=0)
        means[name] = float(found[:, :, 2].mean())
    assert abs(means["moment matching"] - 1.6) < 0.08
    assert abs(means["replacement"] - 1.6) > 2 * abs(means["reconstruction"] - 1.6), means


def test_wrong_extensions_are_refused():
    denoiser, x = walk().denoiser(VP), normal(3, 1, 2, 2)
    for options, message in (
        ({"overlap": 4}, "to be new"),
        ({"overlap": 3}, "2 entries along dim=2"),
        ({"dim": 4}, "an axis of its events"),
        ({"length": 1}, "2 entries along dim=2"),
        ({"seed": [1, 2]}, "2 seeds for 3 samples"),
    ):
        given = {"length": 6, "window": WINDOW, "overlap": 1, "steps": 2} | options
        with pytest.raises(ValueError, match=message):
            extend(denoiser, x, given.pop("length"), METHODS["pigdm"], **given)
