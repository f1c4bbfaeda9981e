"""The laws of the networks: what they start as, what their output depends on, and that no precision rounds a label."""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from scoresde.nn import MLP, DiT, NoisyClassifier, TimeEmbedding, UNet
from scoresde.nn.blocks import (
    Attention,
    Double,
    Halve,
    InstanceNorm,
    ResidualBlock,
    attend,
    conv,
    shuffle,
    unshuffle,
)
from scoresde.nn.dit import positions
from scoresde.variance.trunk import TrunkWithHead

SMALL: dict[str, Any] = {"channels": 8, "multipliers": (1, 2), "blocks": 1}
BLOCK: dict[str, Any] = {**SMALL, "resample": "block"}
FIR: dict[str, Any] = {"fir": (1, 3, 3, 1)}
UNETS: dict[str, dict[str, Any]] = {
    "one level": {"channels": 8, "multipliers": (1,)},
    "two levels": {"channels": 8, "multipliers": (1, 2)},
    "three levels": {"channels": 8, "multipliers": (1, 2, 2), "blocks": 1},
    "four levels": {"channels": 8, "multipliers": (1, 1, 2, 2), "blocks": 1},
    "attention at the top": {"channels": 8, "multipliers": (1, 2), "attention": (0,), "blocks": 1, "heads": 2},
    "attention everywhere": {"channels": 8, "multipliers": (1, 2, 3), "attention": (0, 1, 2), "blocks": 1},
    "three blocks": {"channels": 8, "multipliers": (2, 1), "blocks": 3},
    "colour": {"image_channels": 3, **SMALL},
    "classes": {**SMALL, "num_classes": 4},
    "vector and image, twice the channels": {**SMALL, "vector": 5, "image_condition": 2, "out_channels": 2},
    "a context": {**SMALL, "context": 3, "heads": 2, "skip_scale": 0.5},
    "an image with an encoder of its own": {**SMALL, "image_condition": 2, "image_blocks": 1},
    "filtered convolutions": {**SMALL, **FIR, "fourier": 0.01},
    "blocks that resample": {**BLOCK, "multipliers": (1, 2, 2), "skip_scale": 0.5**0.5},
    "blocks that filter": {**BLOCK, **FIR},
    "ncsn": {**SMALL, "norm": "instance", "resample": "dilate"},
    "one axis": {**SMALL, "dims": 1, "multipliers": (1, 2, 2)},
    "one axis, dilated": {**SMALL, "dims": 1, "resample": "dilate"},
    "one axis, filtered": {**BLOCK, **FIR, "dims": 1},
    "three axes, blocks": {**BLOCK, "dims": 3},
    "clips": {**SMALL, "dims": 3, "time_attention": (0, 1), "heads": 2},
    "clips, all conditions": {
        **BLOCK,
        "dims": 3,
        "time_attention": (1,),
        "num_classes": 4,
        "vector": 2,
        "image_condition": 1,
        "image_blocks": 1,
        "context": 3,
    },
    "series of lines": {**SMALL, "dims": 2, "time_attention": ()},
    "three axes, filtered, all conditions": {
        **BLOCK,
        **FIR,
        "dims": 3,
        "num_classes": 4,
        "vector": 2,
        "image_condition": 1,
    },
}
DITS: dict[str, dict[str, Any]] = {
    "two axes": {"width": 16, "depth": 2},
    "colour, all conditions": {
        "image_channels": 3,
        "width": 16,
        "depth": 2,
        "num_classes": 4,
        "vector": 2,
        "image_condition": 1,
        "fourier": 0.01,
    },
    "a context": {"width": 16, "depth": 2, "context": 3},
    "one axis": {"width": 14, "depth": 1, "heads": 1, "dims": 1, "out_channels": 2},
    "three axes": {"width": 16, "depth": 1, "heads": 2, "dims": 3},
}
EVENTS = [(), (2,), (7,), (3, 4), (1, 4, 4)]
Batch = dict[str, Tensor]
Make = Callable[[], nn.Module]


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomised(net: nn.Module, seed: int = 0) -> nn.Module:
    """The network away from its start, where the last layers are zero and hide everything before them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return net.eval()


def conditions(options: dict[str, Any], x: Tensor) -> Batch:
    """What a network of these options is told beside x and time."""
    n, found = len(x), {}
    if "num_classes" in options:
        found["label"] = torch.arange(n) % options["num_classes"]
    if "vector" in options:
        found["vector"] = normal(n, options["vector"], seed=2)
    if channels := options.get("image_condition"):
        found["image"] = normal(n, channels, *x.shape[2:], seed=3)
    if "context" in options:
        found["context"] = normal(n, 4, options["context"], seed=4)
    return found


def image_batch(options: dict[str, Any], size: int, n: int = 3) -> Batch:
    """x, time, and what the network is conditional on."""
    x = normal(n, options.get("image_channels", 1), *options.get("dims", 2) * (size,))
    return {"x": x, "time": torch.linspace(5, 900, n), **conditions(options, x)}


def result_shape(options: dict[str, Any], x: Tensor) -> tuple[int, ...]:
    return (len(x), options.get("out_channels", x.shape[1]), *x.shape[2:])


def usual_size(options: dict[str, Any]) -> int:
    return 4 if options.get("dims") == 3 else 8


def cases() -> list[Any]:
    """(network maker, its batch): every U-Net and DiT at one size, every event of the MLP, with its conditions."""
    found = [
        pytest.param(lambda o=o, k=k: k(**o), image_batch(o, usual_size(o)), id=f"{k.__name__.lower()} {name}")
        for k, options in ((UNet, UNETS), (DiT, DITS))
        for name, o in options.items()
    ]
    for event in EVENTS:
        for o in ({}, {"num_classes": 4}, {"vector": 3, "fourier": 0.01}):
            x, time = normal(3, *event, seed=2), torch.linspace(5, 900, 3)
            make = lambda event=event, o=o: MLP(event, width=16, depth=2, **o)  # noqa: E731
            batch = {"x": x, "time": time, **conditions(o, x)}
            found.append(pytest.param(make, batch, id=f"mlp {event} {' '.join(o)}"))
    return found


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    """Initial weights come from the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


all_networks = pytest.mark.parametrize(("make", "batch"), cases())


@all_networks
def test_the_output_starts_at_zero_and_has_the_shape_of_x(make: Make, batch: Batch) -> None:
    net, x = make(), batch["x"]
    out = net(**batch)
    shape = x.shape
    if isinstance(net, UNet | DiT):
        shape = (len(x), net.outward.out_channels // net.patch**net.dims, *x.shape[2:])
    assert torch.equal(out, torch.zeros(shape))


def test_patches_are_channels() -> None:
    """The network of patch 2 is that of four channels on shuffled pixels."""
    net, plain = (randomised(UNet(c, channels=8, multipliers=(1, 2), blocks=1, patch=p)) for c, p in ((1, 2), (4, 1)))
    plain.load_state_dict(net.state_dict())
    x, time = image_batch({}, 12).values()
    expected = F.pixel_shuffle(plain(F.pixel_unshuffle(x, 2), time), 2)
    assert torch.equal(net(x, time), expected)
    assert float(expected.detach().std()) > 0.1


@pytest.mark.parametrize("size", [(6,), (6, 4), (4, 6, 2)])
def test_patches_are_shuffled_back(size: tuple[int, ...]) -> None:
    """And each patch is one position: of a single patch, the channels are its pixels in order."""
    x = normal(2, 3, *size)
    assert torch.equal(shuffle(unshuffle(x, 2), 2), x)
    assert torch.equal(unshuffle(x[..., : x.shape[-1]], 1), x)
    one = x[(slice(None), slice(None), *(slice(2, 4) if n > 2 else slice(0, 2) for n in size))]
    corner = tuple(1 if n > 2 else 0 for n in size)
    assert torch.equal(unshuffle(x, 2)[(slice(None), slice(None), *corner)], one.flatten(1))
    if len(size) == 2:
        assert torch.equal(unshuffle(x, 2), F.pixel_unshuffle(x, 2))


def sizes() -> list[Any]:
    of_unet, of_dit = {1: (1, 8, 9, 28), 2: (8, 9, 14), 3: (4, 5)}, {1: (2, 14), 2: (8, 14), 3: (4, 6)}
    return [
        pytest.param(k, o, size, id=f"{k.__name__.lower()} {name} {size}")
        for k, options, by_dims in ((UNet, UNETS, of_unet), (DiT, DITS, of_dit))
        for name, o in options.items()
        for size in by_dims[o.get("dims", 2)]
    ]


@pytest.mark.parametrize(("kind", "options", "size"), sizes())
def test_any_size_is_taken_and_every_pixel_reached(kind: Callable[..., nn.Module], options: Any, size: int) -> None:
    """Odd sizes too: no pixel of the output is left without the network, none of the input without effect."""
    batch = image_batch(options, size, n=2)
    x = batch["x"].requires_grad_()
    out = randomised(kind(**options))(**batch)
    assert out.shape == result_shape(options, x)
    assert bool((out != 0).all())
    out.square().sum().backward()
    assert x.grad is not None
    assert bool((x.grad != 0).all())


@pytest.mark.parametrize("options", [SMALL, BLOCK, {**SMALL, **FIR}, {**BLOCK, **FIR}], ids=str)
def test_unet_takes_images_that_are_not_square(options: dict[str, Any]) -> None:
    """Transposing the image, with kernels transposed likewise, transposes the output."""
    net = randomised(UNet(**{**options, "multipliers": (1, 2, 2)}))
    x, time = normal(2, 1, 9, 14), torch.tensor([1.0, 500.0])
    out = net(x, time)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.copy_(module.weight.mT.clone())
    torch.testing.assert_close(net(x.mT, time), out.mT, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [SMALL, BLOCK, {**SMALL, **FIR}, {**BLOCK, **FIR}], ids=str)
@pytest.mark.parametrize("dims", [1, 2])
def test_an_axis_of_length_one_is_none(options: dict[str, Any], dims: int) -> None:
    """Of the kernels only the middle meets data there: one implementation for 1, 2 and 3 axes is one function."""
    options = {**options, "multipliers": (1, 2, 2), "attention": (1,)}
    net, more = (randomised(UNet(**options, dims=d)).double() for d in (dims, dims + 1))
    with torch.no_grad():
        for p, q in zip(net.parameters(), more.parameters(), strict=True):
            (q if q.dim() == p.dim() else q[..., q.shape[-1] // 2]).copy_(p)
    x, time = normal(2, 1, *(9, 6)[:dims]).double(), torch.tensor([1.0, 500.0])
    torch.testing.assert_close(more(x[..., None], time)[..., 0], net(x, time), rtol=1e-9, atol=1e-9)


@all_networks
def test_the_output_depends_on_x_time_and_every_condition(make: Make, batch: Batch) -> None:
    """For each sample by itself, away from the start."""
    net = randomised(make())
    out = net(**batch).detach().flatten(1) if batch["x"].dim() > 1 else net(**batch).detach()[:, None]
    steps = {"x": 0.1, "time": 20, "vector": 1.0, "image": 1.0, "context": 1.0}
    for name, value in batch.items():
        changed = (value + 1) % 4 if name == "label" else value + steps[name]
        other = net(**{**batch, name: changed}).detach().reshape(out.shape)
        assert float((other - out).abs().amax(1).min()) > 1e-4, name


@all_networks
def test_gradients_reach_every_parameter(make: Make, batch: Batch) -> None:
    net = randomised(make())
    net(**batch).square().sum().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None, name
        assert bool(p.grad.isfinite().all()), name
        assert bool(p.grad.any()), name


@all_networks
def test_training_from_the_start_soon_reaches_every_parameter(make: Make, batch: Batch) -> None:
    """A zero layer blocks the gradient of those before it for one step; nested ones for a few, never for ever."""
    net = make()
    optimiser = torch.optim.SGD(net.parameters(), lr=0.01)
    for _ in range(4):
        optimiser.zero_grad()
        (net(**batch) - 1).square().mean().backward()
        optimiser.step()
    assert not [name for name, p in net.named_parameters() if p.grad is None or not bool(p.grad.any())]


@all_networks
def test_a_sample_alone_is_the_sample_in_the_batch(make: Make, batch: Batch) -> None:
    net = randomised(make())
    together = net(**batch)
    for i in range(len(batch["x"])):
        alone = net(**{name: b[i : i + 1] for name, b in batch.items()})
        torch.testing.assert_close(
            alone, together[i : i + 1], rtol=1e-5, atol=1e-5 * float(together.detach().abs().max())
        )


@all_networks
def test_a_state_dict_makes_the_network_again(make: Make, batch: Batch) -> None:
    net, other = randomised(make(), seed=0), randomised(make(), seed=1)
    assert not torch.equal(net(**batch), other(**batch))
    other.load_state_dict(net.state_dict())
    assert torch.equal(net(**batch), other(**batch))


@all_networks
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_network_in_another_dtype_is_the_same_function(make: Make, batch: Batch, dtype: torch.dtype) -> None:
    """Labels stay in float32, float64 or integers while x has the network's dtype, as the denoisers call it; so do
    the conditions.
    """
    net = randomised(make())
    expected = net(**batch)
    time = batch["time"]
    net = net.to(dtype)
    scale = float(expected.detach().abs().max())
    for t in (time, time.double(), time.round().long()):
        out = net(**{**batch, "x": batch["x"].to(dtype), "time": t})
        assert out.dtype == dtype
        if t.is_floating_point():
            tolerance = 0.2 if dtype == torch.bfloat16 else 1e-4
            torch.testing.assert_close(out.float(), expected, rtol=0, atol=tolerance * scale)


@all_networks
def test_autocast_is_the_same_function(make: Make, batch: Batch) -> None:
    """Forward, and backward into float32 gradients."""
    net = randomised(make())
    expected = net(**batch).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(**batch)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.2 * float(expected.abs().max()))
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in net.parameters())


@all_networks
def test_forward_mode_derivatives_are_those_of_reverse_mode(make: Make, batch: Batch) -> None:
    """w J v both ways, J v against a central difference, and J v of many v by vmap."""
    net, x = randomised(make()).double().requires_grad_(False), batch["x"].double()

    def f(x: Tensor) -> Tensor:
        return net(**{**batch, "x": x})

    out = f(x)
    v, w = normal(*x.shape, seed=5).double(), normal(*out.shape, seed=6).double()
    primal, jv = torch.func.jvp(f, (x,), (v,))
    torch.testing.assert_close(primal, out, rtol=1e-9, atol=1e-9)
    wj = torch.func.vjp(f, x)[1](w)[0]
    assert float((w * jv).sum()) == pytest.approx(float((wj * v).sum()), rel=1e-9, abs=1e-9 * float(jv.norm()))
    h = 1e-5
    torch.testing.assert_close((f(x + h * v) - f(x - h * v)) / (2 * h), jv, rtol=1e-5, atol=1e-6 * float(jv.norm()))
    both = torch.func.vmap(lambda v: torch.func.jvp(f, (x,), (v,))[1])(torch.stack([v, -2 * v]))
    torch.testing.assert_close(both, torch.stack([jv, -2 * jv]), rtol=1e-9, atol=1e-9)


def test_attention_is_one_function_fused_or_written_out() -> None:
    """And torch's switch gives it a second derivative."""
    q, k, v = (normal(2, 3, 5, 4, seed=s) for s in range(3))
    with forward_ad.dual_level():
        written = attend(q, k, v)
    torch.testing.assert_close(attend(q, k, v), written, rtol=1e-5, atol=1e-6)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(lambda q: attend(q, k.double(), v.double()), q.double().requires_grad_())


EVERYTHING: dict[str, Any] = {"num_classes": 4, "vector": 2, "image_condition": 1, "context": 3}
COMPILED: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "unet": (UNet, {**SMALL, **EVERYTHING}),
    "unet blocks": (UNet, {**BLOCK, **FIR, "multipliers": (1, 1), "dims": 1, "fourier": 0.01, "skip_scale": 0.7}),
    "dit": (DiT, {"width": 16, "depth": 1, **EVERYTHING}),
    "mlp": (lambda **options: MLP((1, 6, 6), width=16, depth=1, **options), {"num_classes": 4, "vector": 2}),
}


@pytest.mark.parametrize("name", COMPILED)
def test_a_network_is_one_graph(name: str) -> None:
    """fullgraph: any break is an error."""
    kind, options = COMPILED[name]
    net, batch = randomised(kind(**options)), image_batch(options, 6)
    torch.compiler.reset()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**batch), net(**batch), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (UNet, {**SMALL, "attention": (0,)}),
        (UNet, {**BLOCK, **FIR}),
        (UNet, {**BLOCK, "dims": 3}),
        (DiT, DITS["two axes"]),
        (DiT, DITS["three axes"]),
    ],
    ids=str,
)
def test_channels_last_is_a_layout_only(kind: Callable[..., nn.Module], options: dict[str, Any]) -> None:
    """Forward and backward, also where a frozen layer's output takes no gradient: there torch 2.13's own GroupNorm
    crashes on the CPU.
    """
    net, batch, found = randomised(kind(**options)).double(), image_batch(options, usual_size(options)), []
    layout = torch.channels_last_3d if options.get("dims") == 3 else torch.channels_last
    for to in (torch.contiguous_format, layout):
        net.to(memory_format=to)
        x = batch["x"].double().to(memory_format=to)
        for frozen in (False, True):
            net.zero_grad()
            net.inward.requires_grad_(not frozen)
            net.time.requires_grad_(not frozen)
            out = net(x, batch["time"])
            out.square().sum().backward()
            found.append([out.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)])
    whole, frozen, *others = found
    assert len(frozen) < len(whole)
    for expected, other in zip((whole, frozen), others, strict=True):
        for a, b in zip(expected, other, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("kind", "options"), [(UNet, SMALL), (UNet, BLOCK), (DiT, {"width": 16})], ids=str)
def test_dropout_acts_in_training_only(kind: Callable[..., nn.Module], options: dict[str, Any]) -> None:
    net = randomised(kind(**options, dropout=0.5))
    batch = image_batch({}, 8)
    assert torch.equal(net(**batch), net(**batch))
    net.train()
    assert not torch.equal(net(**batch), net(**batch))


def test_checkpoints_of_the_first_networks_fit() -> None:
    """The names and shapes, in order, that the U-Net and the MLP had when they were first released."""
    first = {
        "9fdb565d7fee18f3": UNet(),
        "1371403fdeefb4db": UNet(channels=8, num_classes=4, blocks=1),
        "7a3440110d67084d": UNet(3, channels=8, patch=2, multipliers=(1, 2, 2), attention=(1,), dropout=0.1),
        "143f1e1546acbb73": MLP((3,), width=16, num_classes=3),
    }
    for expected, net in first.items():
        names = "\n".join(f"{name} {tuple(value.shape)}" for name, value in net.state_dict().items())
        assert hashlib.sha256(names.encode()).hexdigest()[:16] == expected


# Conditions


CONDITIONAL: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: MLP((1, 4, 4), width=16, depth=1, num_classes=3),
    "unet": lambda: UNet(**SMALL, num_classes=3),
    "dit": lambda: DiT(width=16, depth=1, num_classes=3),
}


@pytest.mark.parametrize("name", CONDITIONAL)
def test_the_null_class_is_one_and_is_no_label_at_all(name: str) -> None:
    """It does not depend on the table of classes, and other classes do."""
    net, (x, time) = randomised(CONDITIONAL[name]()), image_batch({}, 4).values()
    none = net(x, time)
    for null in (3, torch.tensor(3), torch.full((3,), 3)):
        torch.testing.assert_close(net(x, time, null), none, rtol=0, atol=0)
    mixed = net(x, time, torch.tensor([3, 1, 3]))
    torch.testing.assert_close(mixed[::2], none[::2], rtol=1e-5, atol=1e-5)
    assert float((mixed[1] - none[1]).detach().abs().max()) > 1e-3
    with torch.no_grad():
        net.time.classes.weight.add_(1.0)
    assert torch.equal(net(x, time), none)
    with pytest.raises(IndexError):
        net(x, time, 4)


def test_a_vector_is_a_linear_offset_of_the_embedding() -> None:
    net, time, vector = TimeEmbedding(16, vector=3), torch.tensor([1.0, 2.0]), normal(2, 3)
    assert net.vectors is not None
    offset = net(time, vector=vector) - net(time, vector=torch.zeros(3))
    torch.testing.assert_close(offset, vector @ net.vectors.weight.mT, rtol=1e-5, atol=1e-6)
    assert torch.equal(net(time, vector=vector[:1]), net(time, vector=vector[0]))


@pytest.mark.parametrize("kind", [UNet, DiT])
def test_an_image_condition_is_further_channels_of_x(kind: Callable[..., nn.Module]) -> None:
    options: dict[str, Any] = SMALL if kind is UNet else {"width": 16, "depth": 1}
    net = randomised(kind(1, **options, patch=2, image_condition=2))
    plain = randomised(kind(3, **options, patch=2, out_channels=1))
    plain.load_state_dict(net.state_dict())
    batch = image_batch({"image_condition": 2}, 8)
    x, time, image = batch.values()
    assert torch.equal(net(**batch), plain(torch.cat([x, image], dim=1), time))


@pytest.mark.parametrize("patch", [1, 2])
def test_two_encodings_that_are_convolutions_are_one_of_both(patch: int) -> None:
    """F(x) + G(image) = conv([x, image]) without blocks, and with blocks as they start."""
    plain = randomised(UNet(1, **SMALL, patch=patch, image_condition=2))
    weight = plain.inward.weight
    for blocks in (0, 2):
        net = UNet(1, **SMALL, patch=patch, image_condition=2, image_blocks=blocks).eval()
        assert net.encoder is not None
        own = {name: value for name, value in plain.state_dict().items() if name != "inward.weight"}
        own |= {"inward.weight": weight[:, : patch**2], "encoder.inward.weight": weight[:, patch**2 :]}
        missing, unexpected = net.load_state_dict(own, strict=False)
        assert not unexpected
        assert all(name.startswith("encoder") for name in missing)
        with torch.no_grad():
            net.encoder.inward.bias.zero_()
        batch = image_batch({"image_condition": 2}, 8)
        torch.testing.assert_close(net(**batch), plain(**batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        ({"image_condition": 2}, {}, r"pass image= of shape \(2, 2, 8, 8\), not none"),
        ({"image_condition": 2}, {"image": torch.zeros(2, 1, 8, 8)}, r"not shape \(2, 1, 8, 8\)"),
        ({"image_condition": 2}, {"image": torch.zeros(1, 2, 8, 8)}, r"not shape \(1, 2, 8, 8\)"),
        ({}, {"image": torch.zeros(2, 1, 8, 8)}, "build it with image_condition="),
        ({"vector": 3}, {}, r"pass vector= of shape \(2, 3\), not none"),
        ({"vector": 3}, {"vector": torch.zeros(2, 2)}, r"not shape \(2, 2\)"),
        ({}, {"vector": torch.zeros(2, 2)}, "build it with vector="),
        ({"dims": 1}, {}, r"x of shape \(2, 1, 8, 8\): expected \(B, C\) and 1 axes"),
        ({"patch": 3}, {}, r"x of size \(8, 8\): expected multiples of patch=3"),
    ],
)
@pytest.mark.parametrize("kind", [UNet, DiT])
def test_conditions_must_fit(
    kind: Callable[..., nn.Module], options: dict[str, Any], call: dict[str, Tensor], message: str
) -> None:
    net = kind(**({**SMALL, **options} if kind is UNet else {"width": 16, "depth": 1, **options}))
    with pytest.raises(ValueError, match=message):
        net(torch.zeros(2, 1, 8, 8), torch.ones(2), **call)


# Sizes


FILTERS = [None, (1, 1), (1, 2, 1), (1, 3, 3, 1), (1, 5, 10, 10, 5, 1)]


@pytest.mark.parametrize("fir", FILTERS)
@pytest.mark.parametrize("size", [(1,), (2,), (7,), (8,), (5, 8), (1, 6), (3, 4, 5)])
def test_resampling_halves_and_doubles_and_keeps_constants(fir: Any, size: tuple[int, ...]) -> None:
    halve, double = Halve(len(size), fir), Double(len(size), fir)
    x = torch.tensor([2.0, -3.0]).reshape(1, 2, *len(size) * (1,)).expand(2, 2, *size)
    half = halve(x)
    assert half.shape == (2, 2, *((n + 1) // 2 for n in size))
    torch.testing.assert_close(half, x[(..., *(slice((n + 1) // 2) for n in size))], rtol=1e-6, atol=1e-6)
    for back in (size, [2 * n for n in half.shape[2:]]):
        again = double(half, back)
        assert again.shape == (2, 2, *back)
        torch.testing.assert_close(again.amax((0, *range(2, again.dim()))), torch.tensor([2.0, -3.0]))
        torch.testing.assert_close(again.amin((0, *range(2, again.dim()))), torch.tensor([2.0, -3.0]))


@pytest.mark.parametrize("size", [(7,), (8,), (5, 8), (3, 4, 5)])
def test_means_and_neighbours_are_the_filter_of_two_ones(size: tuple[int, ...]) -> None:
    x, dims = normal(2, 3, *size), len(size)
    torch.testing.assert_close(Halve(dims)(x), Halve(dims, (1, 1))(x))
    for n in (2 * s for s in size), (2 * s - 1 for s in size):
        finer = tuple(n)
        even = all(s % 2 == 0 for s in finer)
        expected = Double(dims, (1, 1))(x, finer)
        if even:  # for odd sizes nearest neighbours spread the shortage
            assert torch.equal(Double(dims)(x, finer), expected)


@pytest.mark.parametrize("fir", FILTERS[1:])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_doubling_is_the_adjoint_of_halving(fir: Any, dims: int) -> None:
    """2^dims <halve x, y> = <x, double y>, for x and y that are zero near the edges."""
    fine, coarse = dims * (16,), dims * (8,)
    x = F.pad(normal(1, 2, *dims * (8,)).double(), 2 * dims * [4])
    y = F.pad(normal(1, 2, *dims * (4,), seed=2).double(), 2 * dims * [2])
    halve, double = Halve(dims, fir).double(), Double(dims, fir).double()
    assert x.shape[2:] == fine
    assert y.shape[2:] == coarse
    left, right = (halve(x) * y).sum() * 2**dims, (x * double(y, fine)).sum()
    assert float(left) == pytest.approx(float(right), rel=1e-6)
    assert abs(float(left)) > 0.1


def test_resampling_moves_nothing() -> None:
    """A ramp stays the same ramp, each value at the centre of its pixels: filters that are off by a pixel shift it."""
    x = torch.arange(32.0).reshape(1, 1, -1)
    for fir in (None, (1, 1), (1, 3, 3, 1), (1, 5, 10, 10, 5, 1)):
        torch.testing.assert_close(Halve(1, fir)(x)[..., 2:-2], x[..., 4:-4:2] + 0.5)
    for fir in ((1, 3, 3, 1), (1, 5, 10, 10, 5, 1)):
        torch.testing.assert_close(Double(1, fir)(x, [64])[..., 4:-4], torch.arange(4.0, 60.0)[None, None] / 2 - 0.25)


@pytest.mark.parametrize("fir", [None, (1, 1), (1, 3, 3, 1), (1, 5, 10, 10, 5, 1)])
def test_resampling_commutes_with_flips_and_shifts(fir: Any) -> None:
    """Flips of even sizes, at the edges too; shifts by two pixels, or one coarse one, away from the edges."""
    x, halve, double = normal(2, 3, 12, 16), Halve(2, fir), Double(2, fir)
    torch.testing.assert_close(halve(x.flip(2)), halve(x).flip(2))
    torch.testing.assert_close(double(x.flip(3), [24, 32]), double(x, [24, 32]).flip(3))
    moved = halve(x.roll((2, 4), (2, 3)))
    torch.testing.assert_close(moved[..., 3:-3, 4:-4], halve(x).roll((1, 2), (2, 3))[..., 3:-3, 4:-4])
    moved = double(x.roll(1, 2), [24, 32])
    torch.testing.assert_close(moved[..., 6:-6, :], double(x, [24, 32]).roll(2, 2)[..., 6:-6, :])


# Attention knows no order, and a DiT's order is its positions


@pytest.mark.parametrize(
    ("dims", "size", "dilation"), [(1, (7,), 2), (2, (9, 6), 2), (2, (8, 8), 4), (3, (5, 4, 6), 2)]
)
def test_a_dilated_convolution_is_one_of_every_so_many_pixels(dims: int, size: tuple[int, ...], dilation: int) -> None:
    """Of the image of every d-th pixel it makes what the plain one does, from whichever pixel one starts."""
    dilated, plain = conv(dims, 2, 3, 3, dilation=dilation).double(), conv(dims, 2, 3, 3).double()
    plain.load_state_dict(dilated.state_dict())
    x = normal(2, 2, *size).double()
    out = dilated(x)
    assert out.shape[2:] == x.shape[2:]
    for first in torch.cartesian_prod(*dims * [torch.arange(dilation)]).reshape(-1, dims).tolist():
        part = (..., *(slice(i, None, dilation) for i in first))
        torch.testing.assert_close(out[part], plain(x[part]), rtol=1e-12, atol=1e-12)


def test_a_dilated_unet_halves_nothing() -> None:
    """No layer of it gives another size than that of its input; that of one level is the plain one."""
    net, shapes = UNet(channels=8, multipliers=(1, 2, 2), blocks=1, resample="dilate"), []
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, inputs, out: shapes.append((inputs[0].shape[2:], out.shape[2:])))
    net(normal(2, 1, 9, 7), torch.ones(2))
    assert {size for pair in shapes for size in pair} == {(9, 7)}
    assert {m.dilation[0] for m in net.modules() if isinstance(m, nn.Conv2d)} == {1, 2, 4}
    one, plain = (UNet(channels=8, multipliers=(1,), resample=how) for how in ("dilate", "conv"))
    plain.load_state_dict(one.state_dict())
    x, time = normal(2, 1, 6, 6), torch.ones(2)
    assert torch.equal(randomised(one)(x, time), randomised(plain)(x, time))


@pytest.mark.parametrize("size", [(5,), (4, 3), (2, 3, 4)])
def test_instance_norm_has_the_statistics_that_it_is_told(size: tuple[int, ...]) -> None:
    """Over the pixels channel k has standard deviation |gamma_k| and mean beta_k + alpha_k u_k, the u of mean 0 and
    variance 1; a label of its own for each sample; and no image's scale or offset is seen.
    """
    norm, (x, told) = InstanceNorm(6, 8, eps=0.0).double(), (normal(3, 6, *size).double(), normal(3, 8).double())
    out = norm(x, told)
    gamma, beta, alpha = norm.modulate(F.silu(told)).chunk(3, dim=1)
    flat = out.flatten(2)
    torch.testing.assert_close(flat.std(2, correction=0), (1 + gamma).abs(), rtol=1e-9, atol=1e-9)
    u = (flat.mean(2) - beta) / (1 + alpha)
    torch.testing.assert_close(u.mean(1), torch.zeros(3).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(u.var(1, correction=0), torch.ones(3).double(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(norm(3 * x - 2, told), out, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(norm(x, told.flip(0))[1], out[1], rtol=1e-12, atol=1e-12)
    assert float((norm(x, told.flip(0)) - out)[0].detach().abs().max()) > 0.1


def test_without_the_means_it_is_torchs_instance_norm() -> None:
    norm, x = InstanceNorm(6, 8), normal(3, 6, 4, 5)
    with torch.no_grad():
        norm.modulate.weight.zero_()
        norm.modulate.bias.copy_(torch.tensor([0.0, 0.0, -1.0]).repeat_interleave(6))
    torch.testing.assert_close(norm(x, torch.ones(3, 8)), F.instance_norm(x), rtol=1e-5, atol=1e-5)


def test_attention_commutes_with_any_order_of_the_pixels() -> None:
    net, x, order = randomised(Attention(8, 2)), normal(2, 8, 3, 4), torch.randperm(12)

    def permuted(x: Tensor) -> Tensor:
        return x.flatten(2)[..., order].reshape(x.shape)

    torch.testing.assert_close(net(permuted(x)), permuted(net(x)), rtol=1e-5, atol=1e-5)


def test_a_dit_without_positions_commutes_with_any_order_of_the_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    net, (x, time) = randomised(DiT(width=16, depth=2)), image_batch({}, 8).values()
    order = torch.randperm(16)

    def permuted(x: Tensor) -> Tensor:
        patches = F.pixel_unshuffle(x, 2)
        return F.pixel_shuffle(patches.flatten(2)[..., order].reshape(patches.shape), 2)

    there = net(permuted(x), time) - permuted(net(x, time))
    assert float(there.detach().abs().max()) > 1e-2
    monkeypatch.setattr("scoresde.nn.dit.positions", lambda size, width, device: torch.zeros(width, device=device))
    torch.testing.assert_close(net(permuted(x), time), permuted(net(x, time)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("size", "width"), [((9,), 16), ((5, 7), 16), ((5, 7), 18), ((3, 4, 5), 16)])
def test_positions_know_differences(size: tuple[int, ...], width: int) -> None:
    """Their inner products depend on the difference alone, are largest for none, and no two positions are one."""
    p = positions(size, width)
    assert p.shape == (torch.Size(size).numel(), width)
    products = (p @ p.mT).reshape(*size, *size)
    origin = len(size) * (0,)
    for index in ((1,) * len(size), tuple(n // 2 for n in size)):
        there = products[index][tuple(slice(i, None) for i in index)]
        here = products[origin][tuple(slice(n - i) for i, n in zip(index, size, strict=True))]
        torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-5)
    others = (p @ p.mT) - torch.eye(len(p)) * 1e9
    assert float(others.max()) < width // (2 * len(size)) * len(size)


def test_every_block_of_a_new_dit_is_the_identity() -> None:
    """Then a patch of the output knows its own patch of x only."""
    net, (x, time) = DiT(width=16, depth=3), image_batch({}, 8).values()
    nn.init.normal_(net.outward.weight)
    changed = x.clone()
    changed[:, :, 2:4, 6:8] += 1
    moved = (net(changed, time) - net(x, time)).detach() != 0
    inside = torch.zeros_like(moved)
    inside[:, :, 2:4, 6:8] = True
    assert torch.equal(moved, inside)


def test_a_head_fits_a_dit() -> None:
    net = randomised(DiT(width=16, depth=1))
    trunk, (x, time) = TrunkWithHead(net), image_batch({}, 8).values()
    first, second = trunk.both(x, time)
    assert torch.equal(first, net(x, time))
    assert torch.equal(second, torch.zeros_like(x))


def test_skip_scale_keeps_the_variance_of_a_sum() -> None:
    """Of two parts that are independent, with 1/sqrt(2): it is a factor of residual blocks and of attention alike."""
    x, embedding = normal(2, 8, 4, 4), normal(2, 4)
    for make, args in (
        (lambda s: ResidualBlock(8, 8, 4, 0.0, skip_scale=s), (x, embedding)),
        (lambda s: Attention(8, 2, skip_scale=s), (x,)),
    ):
        plain, scaled = randomised(make(1.0)), randomised(make(0.5**0.5))
        scaled.load_state_dict(plain.state_dict())
        torch.testing.assert_close(scaled(*args), plain(*args) / 2**0.5)
    net, x = UNet(**SMALL, attention=(0, 1), skip_scale=0.7), normal(2, 1, 4, 4)
    assert {m.skip_scale for m in net.modules() if isinstance(m, Attention | ResidualBlock)} == {0.7}


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
    for make, size in (
        (lambda: MLP(3, width=16, fourier=0.01), (3,)),
        (lambda: UNet(**BLOCK, **FIR, fourier=0.01), (1, 6, 6)),
        (lambda: DiT(width=16, depth=1), (1, 6, 6)),
    ):
        x, time = normal(2, *size), torch.tensor([1.0, 500.0])
        net = randomised(make())
        for assign in (True, False):
            with torch.device("meta"):
                empty = make()
            if not assign:
                empty.to_empty(device="cpu")
            empty.load_state_dict(net.state_dict(), assign=assign)
            assert torch.equal(empty(x, time), net(x, time))


def test_a_class_is_an_offset_of_the_embedding() -> None:
    net, time, label = TimeEmbedding(16, num_classes=3), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2, 0, 2])
    assert net.classes is not None
    offset = net(time, label) - net(time, torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(offset, net.classes.weight[label] - net.classes.weight[0], rtol=1e-5, atol=1e-6)


def test_fourier_frequencies_are_one_draw_and_are_never_rounded() -> None:
    """A normal one of that scale; the same whatever the global generator; float32 in a network of any dtype."""
    labels, net = torch.linspace(0, 1000, 50).double(), TimeEmbedding(512, fourier=16.0)
    torch.manual_seed(1)
    expected = net.angles(labels)
    assert torch.equal(TimeEmbedding(512, fourier=16.0).angles(labels), expected)
    assert not torch.equal(TimeEmbedding(512, fourier=16.0, seed=1).angles(labels), expected)
    torch.testing.assert_close(TimeEmbedding(512, fourier=1.0).angles(labels), expected / 16)
    draw = net.angles(torch.ones(1))[0] / (2 * torch.pi * 16)
    assert abs(float(draw.mean())) < 5 / 256**0.5
    assert abs(float(draw.square().mean()) - 1) < 5 * (2 / 256) ** 0.5
    assert "frequencies" not in dict(net.named_parameters())
    for convert in (net.half, net.bfloat16, net.float, net.double):
        convert()
        assert torch.equal(net.angles(labels), expected)
        assert net(labels).dtype == net.inward.weight.dtype


# What the docstrings state


def size(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_stated_numbers_of_parameters_hold_to_a_tenth() -> None:
    assert size(MLP(2, width=128, depth=3)) == pytest.approx(0.2e6, rel=0.1)
    assert size(MLP(2)) == size(MLP(2, width=128, depth=3))
    assert size(UNet()) == pytest.approx(1.0e6, rel=0.1)
    assert size(DiT()) == pytest.approx(2.8e6, rel=0.1)


PRESETS: dict[Any, tuple[Callable[..., nn.Module], int, float]] = {
    "unet 8": (UNet.preset, 8, 0.77e6),
    "unet 28": (UNet.preset, 28, 4.3e6),
    "unet 32": (UNet.preset, 32, 68e6),
    "unet 64": (UNet.preset, 64, 101e6),
    "dit 8": (DiT.preset, 8, 0.71e6),
    "dit 28": (DiT.preset, 28, 5.5e6),
    "dit 32": (DiT.preset, 32, 33e6),
    "dit 64": (DiT.preset, 64, 33e6),
    "dit S/2": (DiT.preset, "S/2", 33e6),
    "dit B/2": (DiT.preset, "B/2", 130e6),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_their_numbers_of_parameters_and_run_at_many_sizes(name: str) -> None:
    """On torch's meta device, which knows shapes and holds no numbers."""
    preset, key, stated = PRESETS[name]
    with torch.device("meta"):
        net = preset(key).eval()
        assert size(net) == pytest.approx(stated, rel=0.02)
        usual, channels = key if isinstance(key, int) else 32, 1 if key in (8, 28) else 3
        for n in (usual, *((usual - 1,) if name.startswith("unet") else (usual // 2,))):
            x = torch.empty(2, channels, n, n)
            assert net(x, torch.empty(2)).shape == x.shape


@pytest.mark.parametrize("kind", [UNet, DiT])
def test_presets_take_other_options(kind: Any) -> None:
    net = randomised(kind.preset(8, image_channels=2, num_classes=3))
    batch = image_batch({"image_channels": 2, "num_classes": 3}, 8)
    assert bool((net(**batch) != 0).all())
    with pytest.raises(ValueError, match="expected one of 8, 28, 32, 64"):
        kind.preset(256)


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
        (lambda: MLP(2, depth=0), "depth=0: expected a whole number >= 1"),
        (lambda: TimeEmbedding(8, num_classes=0), "num_classes=0"),
        (lambda: TimeEmbedding(8, vector=0), "vector=0"),
        (lambda: TimeEmbedding(8, fourier=0.0), "fourier=0.0: expected a positive scale"),
        (lambda: UNet(dims=4), "dims=4: expected one of 1, 2, 3"),
        (lambda: UNet(resample="nearest"), "resample='nearest': expected one of 'conv', 'block'"),
        (lambda: UNet(resample="dilate", fir=(1, 1)), "nothing is halved"),
        (lambda: UNet(norm="batch"), "norm='batch': expected one of 'group', 'instance'"),
        (lambda: UNet(blocks=0), "blocks=0: expected a whole number >= 1"),
        (lambda: UNet(channels=0), "channels=0"),
        (lambda: UNet(patch=0), "patch=0"),
        (lambda: UNet(out_channels=0), "out_channels=0"),
        (lambda: UNet(fir=(1, 2)), r"fir=\(1, 2\): expected a symmetric filter"),
        (lambda: UNet(fir=(1, 1, 1)), "even and odd taps"),
        (lambda: UNet(fir=(1,)), r"such as \(1, 3, 3, 1\)"),
        (lambda: UNet(fir=(0, 0)), "one positive sum"),
        (lambda: UNet(dropout=1.0), "dropout=1.0"),
        (lambda: UNet(image_condition=-1), "image_condition=-1"),
        (lambda: UNet(image_blocks=1), "image_blocks=1, image_condition=0"),
        (lambda: UNet(image_condition=1, image_blocks=-1), "image_blocks=-1"),
        (lambda: UNet(skip_scale=0.0), "skip_scale=0.0"),
        (lambda: UNet(vector=0), "vector=0"),
        (lambda: UNet(fourier=-1.0), "fourier=-1.0"),
        (lambda: ResidualBlock(8, 8, 8, 0.0, resample="half"), "resample='half'"),
        (lambda: DiT(dims=0), "dims=0"),
        (lambda: DiT(heads=5), "width=192: expected an even multiple of heads=5"),
        (lambda: DiT(width=4, heads=1, dims=3), "at least 6"),
        (lambda: DiT(depth=0), "depth=0"),
        (lambda: DiT(mlp_ratio=0.0), "mlp_ratio=0.0"),
        (lambda: DiT(dropout=-0.1), "dropout=-0.1"),
    ],
)
def test_constructors_refuse(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("kind", ["embedding", "mlp", "unet", "dit"])
def test_a_label_must_fit_the_network(kind: str) -> None:
    def call(classes: int | None, label: Tensor | None) -> None:
        time = torch.ones(2)
        if kind == "embedding":
            TimeEmbedding(8, num_classes=classes)(time, label)
        elif kind == "mlp":
            MLP(2, width=8, num_classes=classes)(torch.zeros(2, 2), time, label)
        elif kind == "unet":
            UNet(channels=8, num_classes=classes)(torch.zeros(2, 1, 8, 8), time, label)
        else:
            DiT(width=8, depth=1, num_classes=classes)(torch.zeros(2, 1, 8, 8), time, label)

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


@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize(("dims", "size"), [(1, (9,)), (2, (8, 6)), (3, (4, 5, 2))])
def test_a_classifier_of_noisy_data(dims: int, size: tuple[int, ...], placed: bool) -> None:
    """A row of logits for each item by itself, that depends on all of x and on the time, at any size, or at one; every
    parameter takes a gradient after one step, and its options make it again."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = NoisyClassifier(5, 2, 8, (1, 2), dims=dims, size=size if placed else None)
        x, time = torch.randn(3, 2, *size, requires_grad=True), torch.tensor([0.0, 400.0, 999.0])
    for _ in range(2):
        logits = net(x, time)
        gradients = torch.autograd.grad(logits.logsumexp(1).sum() + logits[:, 0].sum(), [x, *net.parameters()])
        with torch.no_grad():
            for p, g in zip(net.parameters(), gradients[1:], strict=True):
                p -= 0.1 * g
    assert logits.shape == (3, 5)
    assert all(bool((g != 0).any()) for g in gradients)
    assert bool((gradients[0] != 0).all())
    assert torch.allclose(net(x[1:2], time[1:2]), net(x, time)[1:2], atol=1e-5)
    assert not torch.allclose(net(x[:1], time[:1]), net(x[:1], time[1:2]), atol=1e-4)
    again = NoisyClassifier(**net.options)
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(x, time), net(x, time))


def test_a_classifier_of_noisy_data_refuses() -> None:
    for options, words in (
        ({"classes": 0}, "classes=0"),
        ({"classes": 2, "dropout": 1.0}, "a probability below 1"),
        ({"classes": 2, "multipliers": ()}, "a level"),
        ({"classes": 2, "dims": 4}, "dims=4"),
        ({"classes": 2, "size": (8, 8, 8)}, "expected 2 axes"),
    ):
        with pytest.raises(ValueError, match=words):
            NoisyClassifier(**options)
