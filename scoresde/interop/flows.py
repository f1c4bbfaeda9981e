"""Flow-matching networks, whose two conventions differ in the sign of the output and in the direction of time:

    data_at    x at time u                          the network's output    who
    1          u x_1 + (1 - u) x_0, x_0 noise       x_1 - x_0               flow_matching, SiT, LightningDiT
    0          (1 - u) data + u noise               noise - data            SD3, Flux, rectified flow: u is their sigma

Here data is at t = 0 (`FlowSDE`): u = 1 - t or t, and dx/dt is minus the output, or the output. The wrong one raises no
error, and gives samples many times as wide as the data.

Source: Lipman et al. (2023), "Flow matching for generative modeling"; Liu et al. (2023), "Flow straight and fast".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scoresde.checks import check_option, check_positive
from scoresde.denoiser import VelocityDenoiser
from scoresde.interop.diffusers_networks import Called
from scoresde.interop.model import Published, published
from scoresde.interop.reading import check_device
from scoresde.schedules import FlowSDE

__all__ = ["from_flow"]


def from_flow(
    net: Callable[..., Tensor],
    data_at: Literal[0, 1] = 1,
    *,
    scale: float = 1.0,
    shape: Sequence[int] | None = None,
    data: Tensor | None = None,
    cond: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
) -> Published:
    """A network that predicts the velocity of a straight path as a denoiser.

    Args:
        net: called as net(x, u, **cond), u of shape (B,); it may return a tensor, a tuple that begins with one, or an
            object with `.sample`. Of 2 C channels the first C are taken, as SiT's networks with learned sigma want it.
        data_at: the time at which x is data: 1 (flow_matching, SiT, LightningDiT) or 0 (SD3, Flux, rectified flow).
        scale: of the time that the network is told, scale u: 1000 for those that count to 1000.
        shape: of an item.
        data: items as it was trained on, (B, ...), on which `diagnose` is run.
        cond: conditions for that.
        device: where the network goes, if it is a module.

    Raises:
        TypeError: if net is no callable.
        ArgumentError: if data_at is neither 0 nor 1, or scale is not > 0.

    The network of a path from noise to zeros has x_1 - x_0 = -x / (1 - u), in the convention of data at 1:

    >>> import torch
    >>> from scoresde import sample
    >>> from scoresde.solvers import Heun
    >>> model = from_flow(lambda x, u: -x / (1 - u[:, None]).clamp(min=1e-3), data_at=1, shape=(2,))
    >>> bool(sample(model, (4, *model.shape), Heun("t"), steps=20, seed=0).x.abs().max() < 1e-3)
    True
    """
    check_option((0, 1), data_at=data_at)
    check_positive(scale=scale)
    check_device(device)
    if not callable(net):
        raise TypeError(f"net is {type(net).__name__}: expected a callable net(x, time, **cond)")
    if isinstance(net, nn.Module):
        net = net if device is None else net.to(device)
    sde = FlowSDE()
    denoiser = VelocityDenoiser(
        Called(net, -1 if data_at else 1), sde, time=lambda t: scale * (1 - t if data_at else t)
    )
    about = {
        "format": "flow",
        "data_at": data_at,
        "predicts": "-velocity" if data_at else "velocity",
        "scale": scale,
        "sde": repr(sde),
    }
    return published(denoiser, shape, about, data=data, cond=cond)
