"""The laws of the networks: what they start as, what their output depends on, and that no precision rounds a label."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde.nn import MLP, TimeEmbedding, UNet

UNETS: dict[str, dict[str, Any]] = {
    "one level": {"channels": 8, "multipliers": (1,)},
    "two levels": {"channels": 8, "multipliers": (1, 2)},
    "three levels": {"channels": 8, "multipliers": (1, 2, 2), "blocks": 1},
    "four levels": {"channels": 8, "multipliers": (1, 1, 2, 2), "blocks": 1},
    "attention at the top": {"channels": 8, "multipliers": (1, 2), "attention": (0,), "blocks": 1, "heads": 2},
    "attention everywhere": {"channels": 8, "multipliers": (1, 2, 3), "attention": (0, 1, 2), "blocks": 1},
    "three blocks": {"channels": 8, "multipliers": (2, 1), "blocks": 3},
    "colour": {"image_channels": 3, "channels": 8, "multipliers": (1, 2), "blocks": 1},
    "classes": {"channels": 8, "multipliers": (1, 2), "blocks": 1, "num_classes": 4},
}
EVENTS = [(), (2,), (7,), (3, 4), (1, 4, 4)]


def randomised(net: nn.Module, seed: int = 0) -> nn.Module:
    """The network away from its start, where the last layers are zero and hide everything before them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return net.eval()


def image_batch(options: dict[str, Any], size: int, n: int = 3) -> tuple[Tensor, ...]:
    """(x, time) and, for a network with classes, the label."""
    x = torch.randn(n, options.get("image_channels", 1), size, size, generator=torch.Generator().manual_seed(1))
    inputs: tuple[Tensor, ...] = (x, torch.linspace(5, 900, n))
    return (*inputs, torch.arange(n) % 4) if "num_classes" in options else inputs


def cases() -> list[Any]:
    """(network maker, its batch): every U-Net at one size, every event of the MLP, with and without classes."""
    found = [pytest.param(lambda o=o: UNet(**o), image_batch(o, 8), id=f"unet {name}") for name, o in UNETS.items()]
    for event in EVENTS:
        for classes in (None, 4):
            x, time = torch.randn(3, *event, generator=torch.Generator().manual_seed(2)), torch.linspace(5, 900, 3)
            batch = (x, time) if classes is None else (x, time, torch.arange(3))
            make = lambda event=event, classes=classes: MLP(event, width=16, depth=2, num_classes=classes)  # noqa: E731
            found.append(pytest.param(make, batch, id=f"mlp {event} {classes}"))
    return found


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    """Initial weights come from the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


all_networks = pytest.mark.parametrize(("make", "batch"), cases())
Make = Callable[[], nn.Module]


@all_networks
def test_the_output_starts_at_zero_and_has_the_shape_of_x(make: Make, batch: tuple[Tensor, ...]) -> None:
    out = make()(*batch)
    assert torch.equal(out, torch.zeros_like(batch[0]))


def test_patches_are_channels() -> None:
    """The network of patch 2 is that of four channels on shuffled pixels."""
    net, plain = (randomised(UNet(c, channels=8, multipliers=(1, 2), blocks=1, patch=p)) for c, p in ((1, 2), (4, 1)))
    plain.load_state_dict(net.state_dict())
    x, time = image_batch({}, 12)
    expected = F.pixel_shuffle(plain(F.pixel_unshuffle(x, 2), time), 2)
    assert torch.equal(net(x, time), expected)
    assert float(expected.detach().std()) > 0.1


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("size", [8, 9, 28, 32])
def test_unet_takes_any_size_and_reaches_every_pixel(name: str, size: int) -> None:
    """Odd sizes too: no pixel of the output is left without the network, none of the input without effect."""
    batch = image_batch(UNETS[name], size, n=2)
    x = batch[0].requires_grad_()
    out = randomised(UNet(**UNETS[name]))(x, *batch[1:])
    assert out.shape == x.shape
    assert bool((out != 0).all())
    out.square().sum().backward()
    assert x.grad is not None
    assert bool((x.grad != 0).all())


def test_unet_takes_images_that_are_not_square() -> None:
    """Transposing the image, with kernels transposed likewise, transposes the output."""
    net = randomised(UNet(channels=8, multipliers=(1, 2, 2), blocks=1))
    x, time = torch.randn(2, 1, 9, 14, generator=torch.Generator().manual_seed(0)), torch.tensor([1.0, 500.0])
    out = net(x, time)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.copy_(module.weight.mT.clone())
    torch.testing.assert_close(net(x.mT, time), out.mT, rtol=1e-4, atol=1e-4)


@all_networks
def test_the_output_depends_on_x_time_and_label(make: Make, batch: tuple[Tensor, ...]) -> None:
    """For each sample by itself, away from the start."""
    net = randomised(make())
    out = net(*batch).detach().reshape(len(batch[0]), -1)
    changes = [(batch[0] + 0.1, *batch[1:]), (batch[0], batch[1] + 20, *batch[2:])]
    if len(batch) == 3:
        changes.append((*batch[:2], (batch[2] + 1) % 4))
    for changed in changes:
        other = net(*changed).detach().reshape(out.shape)
        assert float((other - out).abs().amax(1).min()) > 1e-4


@all_networks
def test_gradients_reach_every_parameter(make: Make, batch: tuple[Tensor, ...]) -> None:
    net = randomised(make())
    net(*batch).square().sum().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None, name
        assert bool(p.grad.isfinite().all()), name
        assert bool(p.grad.any()), name


@all_networks
def test_training_from_the_start_soon_reaches_every_parameter(make: Make, batch: tuple[Tensor, ...]) -> None:
    """A zero layer blocks the gradient of those before it for one step; nested ones for a few, never for ever."""
    net = make()
    optimiser = torch.optim.SGD(net.parameters(), lr=0.01)
    for _ in range(4):
        optimiser.zero_grad()
        (net(*batch) - 1).square().mean().backward()
        optimiser.step()
    assert not [name for name, p in net.named_parameters() if p.grad is None or not bool(p.grad.any())]


@all_networks
def test_a_sample_alone_is_the_sample_in_the_batch(make: Make, batch: tuple[Tensor, ...]) -> None:
    net = randomised(make())
    together = net(*batch)
    for i in range(len(batch[0])):
        alone = net(*(b[i : i + 1] for b in batch))
        torch.testing.assert_close(
            alone, together[i : i + 1], rtol=1e-5, atol=1e-5 * float(together.detach().abs().max())
        )


@all_networks
def test_a_state_dict_makes_the_network_again(make: Make, batch: tuple[Tensor, ...]) -> None:
    net, other = randomised(make(), seed=0), randomised(make(), seed=1)
    assert not torch.equal(net(*batch), other(*batch))
    other.load_state_dict(net.state_dict())
    assert torch.equal(net(*batch), other(*batch))


@all_networks
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_network_in_another_dtype_is_the_same_function(
    make: Make, batch: tuple[Tensor, ...], dtype: torch.dtype
) -> None:
    """Labels stay in float32, float64 or integers while x has the network's dtype, as the denoisers call it."""
    net = randomised(make())
    expected = net(*batch)
    x, time, *label = batch
    net = net.to(dtype)
    scale = float(expected.detach().abs().max())
    for t in (time, time.double(), time.round().long()):
        out = net(x.to(dtype), t, *label)
        assert out.dtype == dtype
        if t.is_floating_point():
            tolerance = 0.2 if dtype == torch.bfloat16 else 1e-4
            torch.testing.assert_close(out.float(), expected, rtol=0, atol=tolerance * scale)


def test_dropout_acts_in_training_only() -> None:
    net = randomised(UNet(channels=8, dropout=0.5))
    batch = image_batch({}, 8)
    assert torch.equal(net(*batch), net(*batch))
    net.train()
    assert not torch.equal(net(*batch), net(*batch))


# The time label


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("label_dtype", [torch.float32, torch.float64, torch.int64])
def test_neighbouring_labels_are_told_apart_in_every_dtype(dtype: torch.dtype, label_dtype: torch.dtype) -> None:
    """In bfloat16, 998 and 999 are one number: the label, and its angles, must not pass through it."""
    net = TimeEmbedding(64).to(dtype)
    for n in (1, 500, 998):
        pair = net(torch.tensor([n, n + 1], dtype=label_dtype))
        assert pair.dtype == dtype
        assert not torch.equal(pair[0], pair[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_embeds_the_label_that_float32_does(dtype: torch.dtype) -> None:
    """To the rounding of the two layers, whose inputs are at most 1: the angles of a rounded 999 would be off by 1."""
    net = TimeEmbedding(64)
    labels = torch.tensor([3.0, 97.3, 500.7, 998.9])
    expected = net(labels)
    half = net.to(dtype)(labels).float()
    torch.testing.assert_close(half, expected, rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_the_way_through_half_precision_leaves_the_frequencies_unrounded() -> None:
    labels, net = torch.linspace(0, 1000, 50), TimeEmbedding(32)
    expected = net.angles(labels)
    for convert in (net.half, net.bfloat16, net.float, net.double):
        convert()
        assert torch.equal(net.angles(labels), expected)
    assert bool(net(labels.double()).isfinite().all())


def test_frequencies_run_from_one_to_the_longest_period() -> None:
    """Geometric from 1, each by the factor max_period^(-2 / features)."""
    angles = TimeEmbedding(10, max_period=1e5).angles(torch.ones(1).double())
    assert angles[0].tolist() == pytest.approx([1, 1e-1, 1e-2, 1e-3, 1e-4], rel=1e-12)


def test_networks_may_be_built_without_memory() -> None:
    """On the meta device, then filled from a state: as large models are loaded."""
    x, time = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([1.0, 500.0])
    net = randomised(MLP(3, width=16))
    with torch.device("meta"):
        empty = MLP(3, width=16)
    empty.load_state_dict(net.state_dict(), assign=True)
    assert torch.equal(empty(x, time), net(x, time))


def test_a_class_is_an_offset_of_the_embedding() -> None:
    net, time, label = TimeEmbedding(16, num_classes=3), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2, 0, 2])
    assert net.classes is not None
    offset = net(time, label) - net(time, torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(offset, net.classes.weight[label] - net.classes.weight[0], rtol=1e-5, atol=1e-6)


# What the docstrings state


def size(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_stated_numbers_of_parameters_hold_to_a_tenth() -> None:
    assert size(MLP(2, width=128, depth=3)) == pytest.approx(0.2e6, rel=0.1)
    assert size(MLP(2)) == size(MLP(2, width=128, depth=3))
    assert size(UNet()) == pytest.approx(1.0e6, rel=0.1)


def test_an_event_of_an_int_is_one_of_that_length() -> None:
    assert MLP(5).event_shape == MLP((5,)).event_shape == (5,)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: UNet(multipliers=()), "0 levels"),
        (lambda: UNet(attention=(2,)), "levels"),
        (lambda: UNet(attention=(-1,)), "levels"),
        (lambda: UNet(heads=3), "heads=3"),
        (lambda: UNet(channels=6, multipliers=(1, 2), attention=(0,)), "heads=4 does not divide the 6"),
        (lambda: TimeEmbedding(0), "features=0"),
        (lambda: TimeEmbedding(7), "features=7"),
        (lambda: MLP(2, width=15), "features=15"),
    ],
)
def test_constructors_refuse(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("kind", ["embedding", "mlp", "unet"])
def test_a_label_must_fit_the_network(kind: str) -> None:
    def call(classes: int | None, label: Tensor | None) -> None:
        time = torch.ones(2)
        if kind == "embedding":
            TimeEmbedding(8, num_classes=classes)(time, label)
        elif kind == "mlp":
            MLP(2, width=8, num_classes=classes)(torch.zeros(2, 2), time, label)
        else:
            UNet(channels=8, num_classes=classes)(torch.zeros(2, 1, 8, 8), time, label)

    with pytest.raises(ValueError, match="pass label="):
        call(3, None)
    with pytest.raises(ValueError, match="no classes"):
        call(None, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="expected integers"):
        call(3, torch.zeros(2))
    with pytest.raises(ValueError, match="expected integers"):
        call(3, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="expected integers"):
        call(3, torch.zeros(2, 3, dtype=torch.int64))


def test_one_class_for_the_whole_batch() -> None:
    net, time = TimeEmbedding(16, num_classes=3), torch.tensor([1.0, 2.0, 3.0])
    expected = net(time, torch.full((3,), 2))
    for label in (2, torch.tensor(2), torch.tensor([2])):
        assert torch.equal(net(time, label), expected)
