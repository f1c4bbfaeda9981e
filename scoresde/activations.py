"""Activations of a network at noise levels, as features of data (Baranchuk et al., 2022, "Label-efficient semantic
segmentation with diffusion models", section 3):

    f(x) = [resized(h_l(alpha_t x + sigma_t eps, t)) for every t, for every layer l]

h_l is what layer l returns. A diffusion model's network has learned what its data are made of without a label: small
classifiers of a pixel's features f(x) segment images after twenty that are labelled.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde.checks import ArgumentError, check_count, one_of
from scoresde.denoiser import Denoiser, NetworkDenoiser, check_call
from scoresde.entries import check_cond, entries_of
from scoresde.networks import first_parameter, in_eval_mode
from scoresde.noise import SeededNoise, seeds_of
from scoresde.tensors import check_batch, widen
from scoresde.views import check_time

__all__ = ["features", "layer_shapes"]


def features(
    model: Denoiser | nn.Module,
    x: Tensor,
    t: float | Sequence[float] | Tensor | None,
    layers: str | Sequence[str],
    *,
    cond: Mapping[str, Any] | None = None,
    size: Sequence[int] | None = None,
    seed: int | Sequence[int] = 0,
    noise: Tensor | None = None,
    batch_size: int | None = None,
    module: nn.Module | None = None,
    tokens: bool | None = None,
    grid: Sequence[int] | None = None,
    differentiable: bool = False,
) -> Tensor:
    """What the layers of a network return for noisy x, at each time, resized to one size and concatenated.

    >>> from scoresde import EpsDenoiser, VPSDE
    >>> from scoresde.nn import UNet
    >>> denoiser = EpsDenoiser(UNet(channels=16), VPSDE(), time=lambda t: 999 * t)
    >>> features(denoiser, torch.zeros(3, 1, 8, 8), [0.05, 0.15, 0.25], ["middle.1", "up.*"]).shape
    torch.Size([3, 528, 8, 8])

    Args:
        model: a denoiser around a network, which sees x_t as it does in sampling, with its own time label. Or a module
            that is none: it is called as it is, `net(x, t, **cond)`, or `net(x, **cond)` where t is None, and **nothing
            is noised**, since nothing is known of its process: t are its labels then.
        x: clean data, (B, C, n_1, ...) or (B, C), floating point; states are what a codec makes of them
            (`scoresde.Latent`).
        t: one time or several, each for the whole batch. At a noise level of 0 the network sees x itself.
        layers: names as `named_modules` of the network has them, or patterns in which * stands for any letters but
            dots: "up.*" are up.0, up.1, ... and not what is inside them. Each layer counts once.
        cond: keyword arguments of the network, with an entry for each item or one for all.
        size: n_1, ... of the result, by default those of x. Maps of another size are resized by linear, bilinear or
            trilinear interpolation, align_corners=False; one that is larger is sampled, not averaged.
        seed: of the noise; one for each item, or one integer. An item has one eps for all times, whatever the batch.
        noise: eps itself, in place of a seed's, of the shape of x, or of the states.
        batch_size: items at a time; all by default.
        module: the module that the names are of; by default the denoiser's network. For one that is inside a function:
            `EpsDenoiser(lambda x, t: unet(x, t).sample, sde)` with module=unet.
        tokens: whether three axes are (B, tokens, C), and not (B, C, n_1): by default so unless x has one axis itself,
            where it must be said if both are possible.
        grid: of the tokens, n_1, ...; by default that of square patches of x. With it the last tokens are those of the
            grid: what stands before, a class token say, is left out.
        differentiable: record gradients.

    Returns:
        (B, F, *size), the dtype of x: the channels of the first layer at the first time come first, then those of the
        other layers, then the other times. Of data without axes (B, F).

    The network is in eval mode meanwhile. Modes are as before afterwards and hooks are gone, after an error too. What a
    layer returned is copied at once, so that a later operation in place does not change it.

    Raises:
        TypeError: if model is neither, or holds no module and none is given.
        ValueError: on a name or pattern of no layer, naming the nearest; if a layer is not called, or several times, or
            returns no floating-point tensor, other than B items, or axes that are neither a map nor tokens on a grid;
            as `sample` does, if x, t, cond or seed are not what they should be, or the denoiser cannot be evaluated at
            a t.
    """
    net = _network(model, module)
    names = _matching(net, [layers] if isinstance(layers, str) else layers)
    with torch.set_grad_enabled(differentiable), in_eval_mode(net):
        state, times = _prepared(model, x, t, cond)
        B, dims = len(x), x.ndim - 2
        target = tuple(x.shape[2:]) if size is None else tuple(size)
        if len(target) != dims:
            raise ArgumentError(f"size={target}: expected {dims} numbers, for x of shape {tuple(x.shape)}")
        for n in target:
            check_count(size=n)
        check_count(batch_size=B if batch_size is None else batch_size)
        eps = _noise(model, state, times, seed, noise)

        def taken(name: str, out: Any) -> Tensor:
            return _resized(_map(name, out, state[part], tokens, grid), target)

        parts = []
        for start in range(0, B, batch_size or B):
            part = slice(start, start + (batch_size or B))
            told = entries_of(cond, part, B)
            columns = []
            for time in times:
                with _tapped(net, names, taken) as found:
                    _evaluate(model, state[part], time, None if eps is None else eps[part], told)
                columns += [_once(name, calls) for name, calls in found.items()]
            parts.append(torch.cat(columns, dim=1).to(x.dtype))
        return torch.cat(parts)


def layer_shapes(
    model: Denoiser | nn.Module,
    x: Tensor,
    t: float | None,
    *,
    cond: Mapping[str, Any] | None = None,
    module: nn.Module | None = None,
) -> dict[str, tuple[int, ...]]:
    """The layers that `features` can take, in the order of `named_modules`, each with the shape of what it returns for
    an item: those that are called once, and return a floating-point tensor of as many items as they are called on.

    Args:
        model, x, t, cond, module: as for `features`; the first item and one time are tried.

    Raises:
        TypeError, ValueError: as `features`.

    >>> from scoresde.nn import UNet
    >>> shapes = layer_shapes(UNet(channels=16, blocks=1), torch.zeros(1, 1, 8, 8), 0.5)
    >>> {name: shape for name, shape in shapes.items() if name.startswith("up.") and name.count(".") == 1}
    {'up.0': (32, 4, 4), 'up.1': (32, 4, 4), 'up.2': (16, 8, 8), 'up.3': (16, 8, 8)}
    """
    net = _network(model, module)
    check_batch(x, "x")
    one = {} if cond is None else entries_of(cond, slice(0, 1), len(x))

    def taken(name: str, out: Any) -> tuple[int, ...] | None:
        whole = isinstance(out, Tensor) and out.is_floating_point() and out.ndim > 0 and len(out) == 1
        return tuple(out.shape[1:]) if whole else None

    with torch.no_grad(), in_eval_mode(net):
        state, times = _prepared(model, x[:1], t, one)
        with _tapped(net, [name for name, _ in net.named_modules()], taken) as found:
            _evaluate(model, state, times[0], _noise(model, state, times, 0, None), one)
    return {name: calls[0] for name, calls in found.items() if len(calls) == 1 and calls[0] is not None}


# --- what is called --------------------------------------------------------------------------------------------------


def _network(model: Denoiser | nn.Module, module: nn.Module | None) -> nn.Module:
    """The module that the names are of."""
    if not isinstance(model, Denoiser | nn.Module):
        raise TypeError(f"model is {type(model).__name__}: expected a Denoiser, EpsDenoiser(net, sde) say, or a module")
    found: object = module or model
    while isinstance(found, Denoiser):
        found = found.net if isinstance(found, NetworkDenoiser) else getattr(found, "denoiser", None)
    if not isinstance(found, nn.Module):
        what = f"module is {type(module).__name__}" if module is not None else f"{model!r} is around no torch module"
        raise TypeError(f"{what}: give module=, the one whose layers are named")
    return found


def _prepared(
    model: Denoiser | nn.Module, x: Tensor, t: float | Sequence[float] | Tensor | None, cond: Mapping[str, Any] | None
) -> tuple[Tensor, Sequence[Any]]:
    """The state of x, and the times or, of a bare network, labels."""
    check_batch(x, "x")
    if x.ndim < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}: expected (B, C, n_1, ...), or (B, C)")
    if not isinstance(model, Denoiser):
        check_cond(cond, len(x))
        return widen(x), [None] if t is None else torch.as_tensor(t).reshape(-1).tolist()
    if t is None:
        raise ArgumentError("t=None: expected a time of the denoiser's SDE, or several")
    check_call(model, x, cond)
    times = torch.as_tensor(t, dtype=torch.float64, device="cpu").reshape(-1)
    for time in times.tolist():
        check_time(time, len(x), model.sde)
    model.check_times(times)
    return widen(x) if model.codec is None else model.codec.encode(widen(x), **(cond or {})), times.tolist()


def _noise(
    model: Denoiser | nn.Module, state: Tensor, times: Sequence[float], seed: int | Sequence[int], noise: Tensor | None
) -> Tensor | None:
    """eps of each item, where any of the times has noise."""
    seeds = seeds_of(seed, len(state))
    if not isinstance(model, Denoiser):
        if noise is not None:
            raise ArgumentError("noise= with a network that is no denoiser, whose input is taken as it is")
        return None
    if noise is not None:
        return noise.to(state)
    noisy = any(float(model.sde.sigma(time)) > 0 for time in times)
    return SeededNoise(seeds, state.device)(0, state) if noisy else None


def _evaluate(
    model: Denoiser | nn.Module, state: Tensor, time: float | None, eps: Tensor | None, cond: Mapping[str, Any]
) -> None:
    """A call of the network, for what it leaves in the hooks."""
    if isinstance(model, Denoiser):
        assert time is not None
        seen = state if eps is None or time == 0 else model.sde.perturb(state, time, eps)
        model.output(seen, time, **cond)
        return
    dtype = getattr(first_parameter(model), "dtype", state.dtype)
    # A whole number stays one: an embedding's tables take no other.
    label = () if time is None else (torch.as_tensor(time, device=state.device).expand(len(state)),)
    model(state.to(dtype), *label, **cond)


# --- what is found ---------------------------------------------------------------------------------------------------


def _matching(net: nn.Module, layers: Sequence[str]) -> list[str]:
    """The names of these layers, each once, in their order."""
    known = [name for name, _ in net.named_modules()]
    names: list[str] = []
    for layer in layers:
        pattern = re.compile(re.escape(str(layer)).replace(r"\*", r"[^.]*"))
        found = [name for name in known if name == layer or (name and pattern.fullmatch(name))]
        if not found:
            raise ArgumentError(
                f"layers={layer!r} of {type(net).__name__}: {one_of(layer, known)}; scoresde.activations.layer_shapes "
                "lists them, with their shapes"
            )
        names += found
    if not names:
        raise ArgumentError(f"layers={layers!r}: expected the name of a layer, or several")
    return list(dict.fromkeys(names))


@contextmanager
def _tapped(net: nn.Module, names: Sequence[str], take: Callable[[str, Any], Any]) -> Iterator[dict[str, list[Any]]]:
    """What `take` makes of what each layer returns, a list of its calls."""
    modules, handles = dict(net.named_modules()), []
    found: dict[str, list[Any]] = {name: [] for name in names}

    def hook(name: str) -> Callable[..., None]:
        return lambda module, given, out: found[name].append(take(name, out))

    try:
        for name in names:
            handles.append(modules[name].register_forward_hook(hook(name)))
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _once(name: str, calls: list[Tensor]) -> Tensor:
    """What the one call of a layer left."""
    if not calls:
        raise ValueError(
            f"layer {name!r} is not called: what it does is another's, or needs a condition that is not given (of a "
            "compiled network give the one that it was made of, which runs hooks)"
        )
    if len(calls) > 1:
        raise ValueError(
            f"layer {name!r} is called {len(calls)} times in an evaluation: take one around it, or, where a wrapper "
            "calls the whole network more than once, as guidance does, the denoiser inside"
        )
    return calls[0]


def _map(name: str, out: Any, state: Tensor, tokens: bool | None, grid: Sequence[int] | None) -> Tensor:
    """What a layer returned for the state, as (B, C, n_1, ...) of as many axes."""
    if not isinstance(out, Tensor) or not out.is_floating_point() or out.ndim < 2:
        what = f"{out.dtype} of shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"layer {name!r} returns {what}: expected floating-point (B, C, ...); take a layer inside it")
    B, *axes = len(state), *state.shape[2:]
    if len(out) != B:
        raise ValueError(
            f"layer {name!r} returns {len(out)} items for {B}: a wrapper, guidance say, calls the network on more; "
            "take the denoiser inside"
        )
    if out.ndim == 3 and axes:
        if tokens is None and len(axes) == 1 and axes[0] % out.shape[1] == 0:
            raise ArgumentError(
                f"layer {name!r} returns {tuple(out.shape)} for x of shape {tuple(state.shape)}, channels or tokens "
                "first: say tokens=True for (B, tokens, C), or tokens=False"
            )
        if tokens or (tokens is None and len(axes) > 1):
            sides = _patches(name, out.shape[1], axes) if grid is None else tuple(grid)
            if out.shape[1] < math.prod(sides) or len(sides) != len(axes):
                raise ArgumentError(f"grid={sides}: layer {name!r} has {out.shape[1]} tokens, and x {len(axes)} axes")
            out = out[:, -math.prod(sides) :].transpose(1, 2).unflatten(2, sides)
    if out.ndim != state.ndim:
        raise ValueError(
            f"layer {name!r} returns {tuple(out.shape)} for x of shape {tuple(state.shape)}: it has no place there"
        )
    return out


def _patches(name: str, count: int, axes: Sequence[int]) -> tuple[int, ...]:
    """The grid of so many square patches."""
    for patch in range(1, min(axes) + 1):
        sides = tuple(n // patch for n in axes)
        if math.prod(sides) == count and all(n % patch == 0 for n in axes):
            return sides
    raise ArgumentError(f"layer {name!r} has {count} tokens, no grid of square patches of {tuple(axes)}: give grid=")


def _resized(h: Tensor, size: tuple[int, ...]) -> Tensor:
    """A copy of that size, in float32 at least."""
    if tuple(h.shape[2:]) == size:
        return widen(h).clone()
    return F.interpolate(widen(h), size, mode=("linear", "bilinear", "trilinear")[len(size) - 1], align_corners=False)
