"""The laws of a context: what is no token changes nothing, the order says nothing, and none at all is the null."""

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from scoresde import VPSDE, EpsDenoiser, load, log_prob, sample
from scoresde.data import GivenContext, TrainingData, dropped, nothing
from scoresde.guidance import ClassifierFree
from scoresde.guidance.branches import Conditioned
from scoresde.nn import DiT, TimeEmbedding, UNet, padded
from scoresde.nn.blocks import attend
from scoresde.nn.context import CrossAttention, tokens_of
from scoresde.solvers import DDIM, DDPM
from scoresde.training import ModelConfig, TrainConfig, Trainer, dsm_loss
from scoresde.training.export import export
from scoresde.training.loss import two_term_loss
from scoresde.training.weights import uniform_in
from scoresde.variance.trunk import TrunkWithHead

WIDTH = 3
SMALL: dict[str, Any] = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "heads": 2}
NETS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "unet": (UNet, {**SMALL, "attention": (0,), "num_classes": 4, "skip_scale": 0.5**0.5}),
    "unet, one axis": (UNet, {**SMALL, "dims": 1, "resample": "block"}),
    "dit": (DiT, {"width": 8, "depth": 2, "heads": 2}),
}
every_net = pytest.mark.parametrize("name", NETS)
TOKENS = [3, 0, 1, 5]  # of the samples of a batch; the longest has no padding


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    """Initial weights come from the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def randomised(net: nn.Module) -> nn.Module:
    """Away from its start, where last layers are zero, in float64."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return net.double().eval()


def made(name: str) -> tuple[nn.Module, Tensor, Tensor, dict[str, Tensor]]:
    """The network, x, time and the context's conditions."""
    kind, options = NETS[name]
    x = normal(len(TOKENS), 1, *options.get("dims", 2) * (4,), seed=2)
    cond = padded([normal(n, WIDTH, seed=3 + n) for n in TOKENS])
    return randomised(kind(**options, context=WIDTH)), x, torch.linspace(5, 900, len(x)), cond


def close(a: Tensor, b: Tensor, to: float = 1e-12) -> bool:
    return float((a - b).detach().abs().max()) <= to * max(1.0, float(b.detach().abs().max()))


# What does not count


@every_net
@pytest.mark.parametrize("filling", [1e3, math.inf, math.nan])
def test_padding_may_hold_anything(name: str, filling: float) -> None:
    """To the bit, forward and backward; and no gradient reaches it."""
    net, x, time, cond = made(name)
    other = {**cond, "context": torch.where(cond["context_mask"][..., None], cond["context"], filling)}
    found = []
    for given in (cond, other):
        context = given["context"].clone().requires_grad_()
        out = net(x, time, **{**given, "context": context})
        net.zero_grad()
        out.square().sum().backward()
        assert context.grad is not None
        assert torch.equal(context.grad.abs().sum(2) > 0, cond["context_mask"])
        found.append([out, context.grad, *(p.grad.clone() for p in net.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@every_net
def test_more_padding_and_another_order_change_nothing(name: str) -> None:
    """To rounding: sums over more or other entries are taken in another order. And a sample alone is as in the batch,
    without any padding then."""
    net, x, time, cond = made(name)
    expected = net(x, time, **cond)
    longer = padded([c[m] for c, m in zip(cond["context"], cond["context_mask"], strict=True)], length=9)
    assert close(net(x, time, **longer), expected)
    order = torch.tensor([4, 2, 0, 3, 1])
    assert close(net(x, time, **{k: v[:, order] for k, v in cond.items()}), expected)
    for i, (context, mask) in enumerate(zip(cond["context"], cond["context_mask"], strict=True)):
        assert close(net(x[i : i + 1], time[i : i + 1], context=context[mask][None]), expected[i : i + 1])


@every_net
def test_no_token_is_no_context_and_the_network_without(name: str) -> None:
    """To the bit: an empty context of any length, none, tokens of zeros alone, and the same weights without a context.
    What is not empty differs."""
    net, x, time, cond = made(name)
    kind, options = NETS[name]
    plain = kind(**options).double().eval()
    own = plain.state_dict().keys()
    plain.load_state_dict({key: value for key, value in net.state_dict().items() if key in own})
    expected, given = plain(x, time), net(x, time, **cond)
    for empty in (
        {},
        {"context": None},
        {"context": torch.full((4, 2, WIDTH), math.nan), "context_mask": torch.zeros(4, 2, dtype=torch.bool)},
        {"context": torch.zeros(1, 0, WIDTH)},
        {"context": torch.zeros(4, 3, WIDTH)},
        nothing(cond),
        nothing({"context": cond["context"]}),
    ):
        assert torch.equal(net(x, time, **empty), expected)
    different = (given - expected).flatten(1).abs().amax(1)
    assert torch.equal(different > 1e-3, torch.tensor(TOKENS) > 0)
    assert close(given[1], expected[1])


@every_net
def test_weights_of_a_network_without_start_one_with_a_context(name: str) -> None:
    """Their outputs are the same to the bit, whatever the context, until it is trained; which begins at once."""
    _, x, time, cond = made(name)
    kind, options = NETS[name]
    plain, started = randomised(kind(**options)), kind(**options, context=WIDTH).double()
    missing, unexpected = started.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all("cross" in key or "contexts" in key or ".norm." in key for key in missing)
    assert torch.equal(started(x, time, **cond), plain(x, time))
    started(x, time, **cond).square().sum().backward()
    last = [p for key, p in started.named_parameters() if "cross.project" in key or "contexts" in key]
    assert last
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in last)


@every_net
def test_derivatives_forward_and_reverse(name: str) -> None:
    """w J v both ways, by x and by the context; by vmap over v; and none by what does not count."""
    net, x, time, cond = made(name)
    net.requires_grad_(False)
    x, time, cond = x[:3], time[:3], {key: value[:3] for key, value in cond.items()}

    def f(x: Tensor, context: Tensor) -> Tensor:
        return net(x, time, context=context, context_mask=cond["context_mask"])

    at, w = (x, cond["context"]), normal(*x.shape, seed=9)
    v, u = normal(*x.shape, seed=7), normal(*cond["context"].shape, seed=8)
    out, jv = torch.func.jvp(f, at, (v, u))
    assert close(out, f(*at))
    by_x, by_context = torch.func.vjp(f, *at)[1](w)
    assert float((w * jv).sum()) == pytest.approx(float((by_x * v).sum() + (by_context * u).sum()), rel=1e-10)
    many = torch.func.vmap(lambda v, u: torch.func.jvp(f, at, (v, u))[1])(torch.stack([v, 2 * v]), torch.stack([u] * 2))
    assert close(many[0], jv)
    hidden = torch.where(cond["context_mask"][..., None], 0, u)
    assert not torch.func.jvp(f, at, (0 * v, hidden))[1].any()


def test_attention_under_a_mask_is_that_over_what_counts() -> None:
    """Fused and written out, in float64, to 1e-12; a mask for each sample and one for each pair."""
    q, k, v = normal(2, 3, 5, 4), normal(2, 3, 6, 4, seed=2), normal(2, 3, 6, 4, seed=3)
    pairs = normal(2, 1, 5, 6, seed=4) > 0
    pairs[..., 0] = True
    rows = pairs[:, :, :1]
    for mask in (pairs, rows):
        with forward_ad.dual_level():
            written = attend(q, k, v, mask)
        assert close(attend(q, k, v, mask), written)
        weights = (q @ k.mT / 2).exp() * mask
        assert close(written, (weights / weights.sum(-1, keepdim=True)) @ v)
    assert close(attend(q[:1], k[:1], v[:1], rows[:1]), attend(q[:1], k[:1, :, rows[0, 0, 0]], v[:1, :, rows[0, 0, 0]]))


def test_cross_attention_is_convex_combinations_of_values() -> None:
    """One token: its value, whatever asks. Twice the same tokens: the same."""
    cross = CrossAttention(4, WIDTH, 2).double()
    nn.init.eye_(cross.project.weight)
    h, context, weight = normal(2, 5, 4), normal(2, 6, WIDTH, seed=2), cross.kv.weight
    one, six, twelve = (
        tokens_of(c, None, 2, WIDTH, torch.float64) for c in (context[:, :1], context, context.repeat(1, 2, 1))
    )
    assert close(cross(h, one), (context[:, :1] @ weight[4:].mT).expand(2, 5, 4))
    assert close(cross(h, twelve), cross(h, six))


@every_net
def test_what_asks_is_normalised(name: str) -> None:
    """In the U-Net over pixels and groups of channels, in the transformer over the features of each patch."""
    kind, options = NETS[name]
    net, seen = kind(**options, context=WIDTH).double(), []
    for module in net.modules():
        if isinstance(module, CrossAttention):
            module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    net(normal(2, 1, *options.get("dims", 2) * (4,)) * 30, torch.ones(2))
    assert len(seen) == {"unet": 4, "unet, one axis": 1, "dit": 2}[name]
    for h in seen:
        axes = -1 if kind is DiT else (1, 2)
        assert close(h.mean(axes), h.new_zeros(()), 1e-9)
        assert close(h.square().mean(axes), h.new_ones(()), 1e-2)


def test_the_embedding_has_the_mean_of_what_counts() -> None:
    embedding = randomised(TimeEmbedding(8, context=WIDTH))
    assert embedding.condition_sizes == {"context": WIDTH, "context_mask": 1}
    time, cond = torch.linspace(0, 9, 4), padded([normal(n, WIDTH, seed=3 + n) for n in TOKENS])
    found = embedding(time, tokens=embedding.tokens(time, cond["context"], cond["context_mask"])) - embedding(time)
    means = torch.stack([c[m].mean(0) if m.any() else c[0] * 0 for c, m in zip(*cond.values(), strict=True)])
    assert close(found, means @ embedding.contexts.weight.mT)
    assert not found[1].any()


def test_checkpoints_from_before_are_the_same_networks() -> None:
    """Digests of initial weights, and sums of outputs in float64, as they were at 4af1aaf."""
    small = {"channels": 8, "multipliers": (1, 2), "blocks": 1}
    before: list[tuple[Any, dict[str, Any], str, list[float]]] = [
        (UNet, {**small, "num_classes": 4, "attention": (0,)}, "ff51eb309f95439d",
         [116.82122043477489, 290.25901805078956, -1.3315671685177968]),
        (UNet, {**small, "resample": "block", "fir": (1, 3, 3, 1), "skip_scale": 0.5**0.5, "vector": 3,
                "image_condition": 1}, "496caadadb8e542c",
         [102.49727207513935, 148.88403020753898, 0.8330833882153972]),
        (DiT, {"width": 16, "depth": 2, "num_classes": 4, "vector": 3}, "d5bfdcab98735fd2",
         [-87.37077527325744, 209.62736938389065, -1.7609024094896875]),
    ]  # fmt: skip
    given = {
        "num_classes": {"label": torch.tensor([0, 1, 4])},
        "vector": {"vector": torch.randn(3, 3, generator=torch.Generator().manual_seed(2)).double()},
        "image_condition": {"image": torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(3)).double()},
    }
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    for kind, options, digest, numbers in before:
        torch.manual_seed(0)
        net = randomised_in_float64(kind(**options))
        held = b"".join(key.encode() + value.numpy().tobytes() for key, value in net.state_dict().items())
        assert hashlib.sha256(held).hexdigest()[:16] == digest
        cond = {name: value for option in options if option in given for name, value in given[option].items()}
        with torch.no_grad():
            out = net(x, torch.tensor([5.0, 400.0, 900.0]), **cond)
        assert [float(out.sum()), float(out.square().sum()), float(out[1, 0, 3, 4])] == pytest.approx(
            numbers, rel=1e-11
        )


def randomised_in_float64(net: nn.Module) -> nn.Module:
    """The order of the two that those numbers were made in."""
    return randomised(net.double())


# Padding


def test_padded_holds_the_tokens() -> None:
    tokens = [normal(n, WIDTH, seed=n).float() for n in TOKENS]
    cond = padded(tokens)
    assert cond["context"].shape == (4, 5, WIDTH)
    assert cond["context"].dtype == torch.float32
    for context, mask, own in zip(*cond.values(), tokens, strict=True):
        assert torch.equal(context[mask], own)
    assert padded(tokens, length=8)["context_mask"].sum(1).tolist() == TOKENS
    assert padded([torch.zeros(0, 2)])["context"].shape == (1, 0, 2)
    for wrong, length in (
        ([], None),
        (tokens, 4),
        ([torch.zeros(2, 3), torch.zeros(2, 2)], None),
        ([torch.ones(3)], 3),
    ):
        with pytest.raises(ValueError, match=r"expected \(n_i, width\), of one width"):
            padded(wrong, length)


TRUE = torch.ones(2, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("options", "cond", "words"),
    [
        ({}, {"context": torch.zeros(2, 4, 3)}, "build it with context="),
        ({}, {"context_mask": TRUE}, "takes no context"),
        ({"context": 3}, {"context_mask": TRUE}, "context_mask without a context"),
        ({"context": 3}, {"context": torch.zeros(2, 4, 2)}, r"shape \(2, 4, 2\): expected \(2, tokens, 3\)"),
        ({"context": 3}, {"context": torch.zeros(4, 3)}, r"shape \(4, 3\)"),
        ({"context": 3}, {"context": torch.zeros(3, 4, 3)}, r"shape \(3, 4, 3\)"),
        ({"context": 3}, {"context": torch.zeros(2, 4, 3), "context_mask": TRUE[:, 1:]}, r"expected bool \(2, 4\)"),
        ({"context": 3}, {"context": torch.zeros(2, 4, 3), "context_mask": TRUE.long()}, r"attention_mask.bool\(\)"),
        ({"context": 0}, {}, "context=0"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], cond: dict[str, Tensor], words: str) -> None:
    for kind in (UNet, DiT):
        with pytest.raises(ValueError, match=words):
            kind(**(SMALL if kind is UNet else {"width": 8, "depth": 1}), **options)(
                torch.zeros(2, 1, 4, 4), torch.ones(2), **cond
            )


# In samplers, densities and guidance


def counted(net: nn.Module, calls: list[int]) -> nn.Module:
    net.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    return net.requires_grad_(False)


def test_guidance_is_between_the_context_and_none() -> None:
    """w D(c) + (1 - w) D(none), one call of both, also where no mask was given; w = 0 is the network without."""
    net, x, _, cond = made("unet")
    calls: list[int] = []
    denoiser = EpsDenoiser(counted(net, calls), VPSDE())
    whole = {"context": cond["context"].nan_to_num()}
    for given in (cond, whole):
        D_c, D_u = denoiser.eps(x, 0.5, **given), denoiser.eps(x, 0.5)
        for options in ({}, {"batched": False}, {"null": tuple(given)}):
            calls.clear()
            guided = ClassifierFree(denoiser, 3.0, **options)  # type: ignore[arg-type]
            assert close(guided.eps(x, 0.5, **given), 3 * D_c - 2 * D_u)
            assert calls == ([4, 4] if options else [8])
        assert torch.equal(ClassifierFree(denoiser, 0.0).eps(x, 0.5, **given), D_u)
        assert torch.equal(ClassifierFree(denoiser, 1.0).eps(x, 0.5, **given), D_c)
    labelled = {**cond, "label": torch.tensor([0, 1, 2, 3])}
    expected = 3 * denoiser.eps(x, 0.5, **labelled) - 2 * denoiser.eps(x, 0.5)
    assert close(ClassifierFree(denoiser, 3.0).eps(x, 0.5, **labelled), expected)


def test_other_tokens_are_given_with_their_mask() -> None:
    """A negative context, of its own length."""
    net, x, _, cond = made("dit")
    denoiser = EpsDenoiser(net.requires_grad_(False), VPSDE())
    negative = normal(2, WIDTH, seed=20)
    null = padded([negative], length=cond["context"].shape[1])
    expected = 3 * denoiser.eps(x, 0.5, **cond) - 2 * denoiser.eps(x, 0.5, context=negative[None])
    assert close(ClassifierFree(denoiser, 3.0, null=null).eps(x, 0.5, **cond), expected)
    nought = ClassifierFree(denoiser, 3.0, null={"context": 0}).eps(x, 0.5, **cond)
    assert close(nought, 3 * denoiser.eps(x, 0.5, **cond) - 2 * denoiser.eps(x, 0.5))
    for wrong in (
        ClassifierFree(denoiser, null={"context": null["context"]}),
        Conditioned(denoiser, context=null["context"]),
    ):
        with pytest.raises(ValueError, match="its context_mask is not: give both"):
            wrong(x, 0.5, **cond)


def test_samples_are_those_of_their_context_alone() -> None:
    """With a seed for each; and a context for all is one for each."""
    net, x, _, cond = made("dit")
    denoiser = ClassifierFree(EpsDenoiser(net.requires_grad_(False), VPSDE()), 2.0)
    seeds = [11, 12, 13, 14]
    found = sample(denoiser, x, DDPM(), steps=3, seed=seeds, cond=cond).x
    for i in range(4):
        own = {"context": cond["context"][i][cond["context_mask"][i]][None]}
        assert close(
            sample(denoiser, x[i : i + 1], DDPM(), steps=3, seed=[seeds[i]], cond=own).x, found[i : i + 1], 1e-9
        )
    one = {key: value[:1] for key, value in cond.items()}
    each = {key: value.expand(4, *value.shape[1:]) for key, value in one.items()}
    a, b = (sample(denoiser, x, DDIM(), steps=2, cond=c).x for c in (one, each))
    assert close(a, b, 1e-9)
    with pytest.raises(ValueError, match="3 entries for 4 samples"):
        sample(denoiser, x, DDIM(), steps=2, cond={**cond, "context_mask": cond["context_mask"][:3]})


def test_a_density_is_one_in_either_mode() -> None:
    """The exact divergence, forward and reverse, and that of a sample alone, on the same fixed steps."""
    kind, options = NETS["dit"]
    net = randomised(kind(**options, context=WIDTH, dims=1)).requires_grad_(False)
    denoiser, x = EpsDenoiser(net, VPSDE()), normal(2, 1, 4)
    cond = padded([normal(2, WIDTH), normal(1, WIDTH, seed=2)])
    a, b = (log_prob(denoiser, x, divergence="exact", mode=mode, steps=2, cond=cond).value for mode in ("jvp", "vjp"))  # type: ignore[arg-type]
    assert close(a, b, 1e-9)
    own = {"context": cond["context"][1:, :1]}
    assert close(log_prob(denoiser, x[1:], divergence="exact", steps=2, cond=own).value, a[1:], 1e-9)
    assert float((a - log_prob(denoiser, x, divergence="exact", steps=2).value).abs().min()) > 1e-6


def test_a_head_knows_the_context() -> None:
    net, x, time, cond = made("unet")
    head, seen = TrunkWithHead(net, block=True), []  # type: ignore[arg-type]
    assert head.block is not None
    head.block.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    assert torch.equal(head.both(x, time, **cond)[0], net(x, time, **cond))
    head.both(x, time)
    assert torch.equal(seen[0], net.time(time, tokens=net.time.tokens(time, *cond.values())))
    assert torch.equal(seen[1], net.time(time))
    assert not torch.equal(seen[0], seen[1])


# In training


def test_nothing_is_a_context_of_which_no_token_counts() -> None:
    """The second term of the loss is that of no context, with a mask and without."""
    net, x, _, cond = made("unet, one axis")
    null, some = nothing(cond), dropped(cond, torch.tensor([True, False, False, True]))
    assert null["context_mask"].dtype == some["context_mask"].dtype == torch.bool
    assert not null["context_mask"].any()
    assert some["context_mask"].sum(1).tolist() == [0, 0, 1, 0]
    denoiser, drawn = EpsDenoiser(net, VPSDE()), {"t": torch.tensor(0.4), "noise": normal(*x.shape)}
    for given in (cond, {"context": cond["context"]}):
        told, untold = (dsm_loss(denoiser, x, cond=c, **drawn) for c in (given, None))
        assert close(two_term_loss(denoiser, x, given, unconditional=0.5, **drawn), told + 0.5 * untold)


def sets(n: int = 48) -> tuple[Tensor, dict[str, Tensor]]:
    """x is what a set of one to three tokens says, whatever their order: their mean."""
    counts = torch.arange(n) % 3 + 1
    tokens = [
        torch.randn(k, 4, generator=torch.Generator().manual_seed(i)).sign() for i, k in enumerate(counts.tolist())
    ]
    return torch.stack([token.mean(0) for token in tokens])[:, None], padded(tokens)


CONFIG = ModelConfig(
    network="dit", options={"width": 16, "depth": 1, "heads": 2, "dims": 1, "context": 4}, predicts="x0"
)


def trained(data: TrainingData, steps: int, folder: Any = None, **options: Any) -> Trainer:
    config = TrainConfig(**{"steps": steps, "batch_size": 16, "lr": 1e-2, "warmup": 1, "workers": 0, "threads": 1,
                            "schedule": "constant", "log_every": 20, **options})  # fmt: skip
    weighting = uniform_in("x0")
    return Trainer(CONFIG.build(seed=0), data, config, folder=folder, model=CONFIG, weighting=weighting).fit(
        progress=False
    )


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor], to: float = 0.0) -> bool:
    return all(float((a[key] - b[key]).abs().max()) <= to for key in a)


def test_a_context_is_learnt_from() -> None:
    x, cond = sets()
    losses = [
        trained(TrainingData(x, conditions=(GivenContext(**cond),), drop=p), 60).losses[-1][1] for p in (0.0, 1.0)
    ]
    assert losses[0] < 0.6 * losses[1], losses


def test_a_run_goes_on_and_is_given_away(tmp_path: Any) -> None:
    """To the same weights; a batch in parts is the batch to rounding, whose items have as many tokens each as ever."""
    x, cond = sets()
    data = TrainingData(x, conditions=(GivenContext(**cond),), drop=0.3)
    assert data.network_options == {"context": 4}
    whole = trained(data, 4)
    trained(data, 2, tmp_path / "run")
    again = trained(data, 4, tmp_path / "run")
    assert equal(whole.net.state_dict(), again.net.state_dict())
    parts = trained(data, 4, accumulate=3)
    assert equal(whole.net.state_dict(), parts.net.state_dict(), to=1e-4)
    denoisers = [load(tmp_path / "run"), load(export(tmp_path / "run", tmp_path / "given"))]
    few = {key: value[:2] for key, value in cond.items()}
    a, b = (sample(ClassifierFree(d, 2.0), (2, 1, 4), DDIM(), steps=2, seed=0, cond=few).x for d in denoisers)
    assert torch.equal(a, b)


def test_contexts_of_an_item_are_one() -> None:
    """The tokens of several, one after the other; those of other widths, or not of the items, are refused."""
    x, cond = sets(6)
    first, mask = GivenContext(**cond), cond["context_mask"]
    data = TrainingData(x, conditions=(first, GivenContext(cond["context"][:, :2], mask[:, :2])))
    found = data.first(5).batch(torch.tensor([4, 1])).cond
    assert torch.equal(found["context"], torch.cat([cond["context"], cond["context"][:, :2]], 1)[[4, 1]])
    assert torch.equal(found["context_mask"], torch.cat([mask, mask[:, :2]], 1)[[4, 1]])
    assert data.network_options == {"context": 4}
    assert GivenContext(cond["context"].masked_fill(~mask[..., None], math.nan), mask).fingerprint == first.fingerprint
    assert first.fingerprint != GivenContext(cond["context"], torch.ones_like(mask)).fingerprint
    assert first.taken(cond["context"][:1], (1, 4)).shape == (1, *cond["context"].shape[1:])
    other = GivenContext(torch.ones(6, 2, 5), torch.ones(6, 2, dtype=torch.bool))
    for wrong, words in (
        (lambda: TrainingData(x, conditions=(first, other)).network_options, "tokens of 4 and of 5 entries"),
        (lambda: TrainingData(x[:5], conditions=(first,)), "6 entries for 5 items"),
        (lambda: GivenContext(cond["context"], mask.long()), "context_mask is torch.int64"),
        (lambda: GivenContext(cond["context"][0], mask), "expected floating point"),
        (lambda: GivenContext(cond["context"] * math.nan, mask), "items 0, 1, 2, 3, 4, 5"),
        (lambda: first.taken(torch.zeros(1, 2, 3), (1, 4)), r"expected \(B, n, 4\)"),
    ):
        with pytest.raises(ValueError, match=words):
            wrong()
