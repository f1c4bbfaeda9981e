"""Conditions that another network computes: of a text its tokens, of an image a vector, inside the loss.

    net(x, time, **encode(cond)),    encode: a raw condition y to e(y), by keywords of the network: vector, context, ...

It is a network like any other, so that an encoder e is trained along with it, averaged, saved and resumed as its other
weights are: the diffusion autoencoder is vector = e(x_0) (Preechakul et al., 2022, "Diffusion autoencoders: toward a
meaningful and decodable representation", section 3). Or it is frozen, as the text encoders of Imagen and of latent
diffusion are.

**Nothing** is said as everywhere (`scoresde.data.nothing`): an item whose raw condition is zero throughout, or an empty
string, is told nothing. Whatever the encoder makes of it is then replaced by zeros, False in the mask of a context and
the null class of a label, bit for bit what the network is told without. So 0 is padding in the ids of tokens, and an
image that is mid-grey in each of its pixels is none.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from scoresde.checks import check_keys
from scoresde.entries import leaves, mapped
from scoresde.networks import first_parameter

__all__ = ["Encoding"]


class _Shared(dict[str, nn.Module]):
    """Networks that never change: copies of what holds them hold the same ones."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self


class Encoding(nn.Module):
    """A network whose conditions are encoded by others.

    Args:
        net: net(x, time, **cond), as those of `scoresde.nn`.
        encoders: by the names of raw conditions, what makes keywords of the network of them: encoder(value) of the
            value of B items, a tensor, strings or a structure of them (`scoresde.entries`). It returns them as a dict,
            {"context": ..., "context_mask": ...} say, or as one tensor.
        keys: of encoders that return a tensor, which keyword it is, "vector" by default.
        frozen: names of encoders that are not trained; by default those that bring their weights (`pretrained`, as
            `PretrainedText` says it). They are put into eval mode, take no gradient, and stay so. They
            are no part of parameters and state_dict: copies of the network, averages among them, share them, and a
            checkpoint has a digest of each in place of its weights, by which another one is refused. They move with the
            network, and to the device of what they encode.

    Raises:
        ValueError: if there is no encoder, keys or frozen name another, or a raw condition has the name of what is made
            of it; by the call, if a raw condition is given together with what is made of it.

    >>> from scoresde.nn import MLP
    >>> net = Encoding(MLP(2, width=8, vector=3), {"source": nn.Linear(5, 3)})
    >>> x, time, source = torch.randn(4, 2), torch.ones(4), torch.randn(4, 5)
    >>> encoded = net.encode(source=source)
    >>> encoded["vector"].shape, torch.equal(net(x, time, source=source), net(x, time, **encoded))
    (torch.Size([4, 3]), True)
    """

    def __init__(
        self,
        net: nn.Module,
        encoders: Mapping[str, nn.Module],
        *,
        keys: Mapping[str, str] | None = None,
        frozen: Collection[str] | None = None,
    ) -> None:
        super().__init__()
        if frozen is None:
            frozen = [name for name, encoder in encoders.items() if getattr(encoder, "pretrained", False)]
        self.names, frozen = tuple(encoders), (frozen,) if isinstance(frozen, str) else tuple(frozen)
        if not self.names:
            raise ValueError("Encoding without encoders: pass the network by itself")
        check_keys("keys", keys or {}, self.names)
        check_keys("frozen", frozen, self.names)
        self.keys = {name: (keys or {}).get(name, "vector") for name in self.names}
        for name in self.names:
            self._check_keys(name, (self.keys[name],))
        self.net = net
        self.encoders = nn.ModuleDict({name: encoders[name] for name in self.names if name not in frozen})
        self.frozen: Mapping[str, nn.Module] = _Shared(
            {name: encoders[name].requires_grad_(False).eval() for name in frozen}
        )
        if hasattr(net, "both"):
            self.both = self._both

    @property
    def condition_sizes(self) -> dict[str, int]:
        """What it can be told: the raw conditions, and what the network can."""
        return {**dict.fromkeys(self.names, 1), **getattr(self.net, "condition_sizes", {})}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Encoding:
        """Frozen encoders too, of which other copies keep theirs."""
        super()._apply(fn, recurse)
        self.frozen = _Shared({name: _moved(encoder, fn) for name, encoder in self.frozen.items()})
        return self

    def forward(self, x: Tensor, time: Tensor, **cond: Any) -> Tensor:
        """x (B, ...) and time (B,) to the shape of x, under raw conditions, encoded ones, and others."""
        out: Tensor = self.net(x, time, **self._encoded(cond))
        return out

    def _both(self, x: Tensor, time: Tensor, **cond: Any) -> Any:
        """Of a network with a head, both outputs."""
        return self.net.both(x, time, **self._encoded(cond))  # type: ignore[operator]

    def encode(self, **cond: Any) -> dict[str, Any]:
        """The conditions with encoded ones in place of the raw ones, for the same results: `sample` does it once,
        before its first evaluation. Conditions that are encoded already stay as they are.
        """
        return self._encoded(cond)

    def _encoded(self, cond: Mapping[str, Any]) -> dict[str, Any]:
        """By itself, as FSDP makes `encode` a call of its own."""
        found = {key: value for key, value in cond.items() if key not in self.names}
        for name in self.names:
            if cond.get(name) is None:
                continue
            made = self._made(name, cond[name])
            if twice := sorted(made.keys() & found):
                raise ValueError(f"{name}= makes {', '.join(twice)}, given as well: pass the raw condition or these")
            found |= made
        return found

    def _made(self, name: str, value: Any) -> dict[str, Any]:
        """What the encoder of that name makes of its condition, and nothing of nothing."""
        encoder = self._here(name, value) if name in self.frozen else self.encoders[name]
        dtype = getattr(first_parameter(encoder), "dtype", None)
        made = encoder(mapped(lambda leaf: _cast(leaf, dtype), value))
        made = dict(made) if isinstance(made, Mapping) else {self.keys[name]: made}
        self._check_keys(name, made)
        if (told := _told(value)) is None:
            return made
        null = {"label": getattr(self.net, "condition_sizes", {}).get("label", 0)}
        return {
            key: y.masked_fill(~told.to(y.device).reshape(-1, *[1] * (y.ndim - 1)), null.get(key, 0))
            for key, y in made.items()
            if y is not None
        }

    def _check_keys(self, name: str, made: Collection[str]) -> None:
        """Raises ValueError if an encoder makes something by the name of a raw condition."""
        if raw := [key for key in made if key in self.names]:
            raise ValueError(
                f"an encoder of {name} that makes {', '.join(raw)}, the name of a raw condition: what is given by it "
                "could be either; name raw conditions after what they are, text= or tokens= say"
            )

    def _here(self, name: str, value: Any) -> nn.Module:
        """The frozen encoder, on the device of what it is to encode."""
        device = next((leaf.device for leaf in leaves(value) if isinstance(leaf, Tensor)), None)
        encoder = self.frozen[name]
        at = first_parameter(encoder)
        if device is None or at is None or at.device == device:
            return encoder
        self.frozen = _Shared({**self.frozen, name: (moved := _moved(encoder, lambda x: x.to(device)))})
        return moved


def _cast(leaf: Any, dtype: torch.dtype | None) -> Any:
    """Floating-point numbers in the dtype of the encoder."""
    return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() and dtype else leaf


def _told(value: Any) -> Tensor | None:
    """Of each item whether it is told anything, bool (B,); None where nothing in the condition has entries."""
    if isinstance(value, str):  # one text for all
        return torch.tensor([bool(value)], device="cpu")
    found: Tensor | None = None
    for leaf in leaves(value):
        if isinstance(leaf, Tensor) and leaf.ndim:
            told = leaf.reshape(leaf.shape[0], -1).ne(0).any(1)
        elif isinstance(leaf, list | tuple) and all(isinstance(text, str) for text in leaf):
            told = torch.tensor([bool(text) for text in leaf], device="cpu")
        else:
            continue
        found = told if found is None else found.to(told.device) | told
    return found


def _moved(encoder: nn.Module, fn: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy whose tensors are what the function makes of them: the same ones, where it leaves them alone."""
    with torch.no_grad():
        memo: dict[int, Any] = {
            id(x): nn.Parameter(fn(x), False) if isinstance(x, nn.Parameter) else fn(x)
            for x in itertools.chain(encoder.parameters(), encoder.buffers())
        }
    return copy.deepcopy(encoder, memo)
