"""What holds networks, denoisers and codecs, and what is asked of the networks in them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = ["Encodes", "Holder", "contents", "first_parameter", "in_eval_mode", "networks"]
__all__ += ["seeded_global_generators", "warn_of_training_mode"]


class Holder:
    """An object whose attributes, or lists and tuples of them, may be networks, or holders again."""


@runtime_checkable
class Encodes(Protocol):
    """A network that makes conditions of others by networks of its own: `scoresde.nn.Encoding`."""

    encoders: torch.nn.ModuleDict

    def encode(self, **cond: Any) -> dict[str, Any]:
        """The conditions with encoded ones in place of raw ones."""
        ...


def contents(holder: Holder) -> Iterator[Holder | torch.nn.Module]:
    """The modules and holders in it: a denoiser's network, the denoisers that it wraps, its codec, ..."""
    for attribute in vars(holder).values():
        for value in attribute if isinstance(attribute, list | tuple) else [attribute]:
            if isinstance(value, Holder | torch.nn.Module):
                yield value
            if isinstance(value, Holder):
                yield from contents(value)


def networks(holder: Holder) -> Iterator[torch.nn.Module]:
    """Of these the modules."""
    return (value for value in contents(holder) if isinstance(value, torch.nn.Module))


def first_parameter(net: object) -> Tensor | None:
    """A network's first floating-point parameter: its dtype and device, as they are now. None where it has none."""
    parameters = net.parameters() if isinstance(net, torch.nn.Module) else iter(())
    return next((p for p in parameters if p.is_floating_point()), None)


@contextmanager
def in_eval_mode(net: torch.nn.Module) -> Iterator[None]:
    """Eval mode inside; at the end each module's own is back, whatever happens."""
    modes = {module: module.training for module in net.modules()}
    try:
        net.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def warn_of_training_mode(holder: Holder, stacklevel: int) -> None:
    """Dropout draws from the global generator, and batch norm mixes the samples: seeds would mean nothing."""
    kinds = (torch.nn.modules.dropout._DropoutNd, torch.nn.modules.batchnorm._BatchNorm)
    layers = [layer for net in networks(holder) for layer in net.modules()]
    if any(layer.training and isinstance(layer, kinds) and getattr(layer, "p", 1.0) > 0 for layer in layers):
        message = "the network has dropout or batch norm in training mode: call net.eval() first"
        warnings.warn(message, stacklevel=stacklevel)


@contextmanager
def seeded_global_generators(seed: int | None, device: torch.device | None = None) -> Iterator[None]:
    """Seed the global generators, which initial weights and dropout draw from, by the operating system if None, and put
    them back as they were; that of a GPU too, if it is the device.
    """
    devices = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        if seed is None:
            seed = torch.default_generator.seed()
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed every GPU, and not put them back
        if devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
