"""Is a denoiser continuous in time, as a solver that chooses its own steps takes for granted?

A network that looks its time label up in a table, or rounds it, stands still between the labels and jumps from one to
the next. To an estimate of the local error a jump is an error that shorter steps hardly lessen: every one costs
rejected steps, and a tight tolerance thousands of evaluations. Two things are looked at before the first step.

The label L, on the host. In the middles m_i of 64 cells of width h, over the times of the run, a label that is
continuous moves over h / 1000 by about a thousandth of what it moves over the cell; it is in steps if in most of the
cells where it moves at all

    |L(m_i + h / 1000) - L(m_i)|  <  1e-4 |L(m_i + h / 2) - L(m_i - h / 2)|

Where it is not, the output, as the network may round what it is told: it is in steps if it is the same to the last bit
at t and (1 + 1e-5) t, for two times t, and not the same at both. That costs two evaluations, and up to four where the
first two are equal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scoresde.denoiser import Denoiser, NetworkDenoiser
from scoresde.networks import contents

__all__ = ["Steps", "in_steps", "label_in_steps"]

_CELLS, _NEAR, _FAR, _LEAST = 64, 1e-5, 1.4, 20


class Steps(NamedTuple):
    """What was found.

    Attributes:
        found: what is in steps, a clause for a message; empty where nothing is.
        calls: evaluations of the denoiser that it took to tell.
    """

    found: str
    calls: int


def in_steps(
    denoiser: Denoiser, x: Tensor, t: float, times: Iterable[float], cond: Mapping[str, Any] | None, budget: float
) -> Steps:
    """Whether the denoiser is piecewise constant in time over a run. Nothing is recorded, and the global generators are
    left as they are.

    Args:
        denoiser, cond: what is evaluated.
        x: the state that the run begins with, shape (B, ...), and t, its time.
        times: of the run, in any order; those > 0 say from where to where it goes.
        budget: evaluations that the run may make in all; with few of them only the label is looked at.
    """
    noisy = [time for time in times if time > 0]
    low, high = min(noisy), max(noisy)
    if (part := label_in_steps(denoiser, low, high)) is not None:
        return Steps(f"the time label of {part!r} is in steps, as of a table", 0)
    if low * _FAR * (1 + _NEAR) > high or budget < _LEAST:
        return Steps("", 0)
    sde, outputs = denoiser.sde, list[Tensor]()
    t_1 = min(max(float(sde.time_at(0.0)), low * _FAR), high / (1 + _NEAR))
    t_2 = t_1 / _FAR
    radius, own = float(sde.radius(t_1)), float(sde.radius(t))
    x = x.detach() * (radius / own)

    def same(i: int, time: float) -> bool:
        """Whether the output at that time is the i-th."""
        outputs.append(denoiser.output(x, time, **(cond or {})).clone())  # some networks reuse their memory
        return torch.equal(outputs[i], outputs[-1])

    with torch.no_grad(), torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
        same(0, t_1)
        found = same(0, t_1 * (1 + _NEAR)) and not same(0, t_2) and same(2, t_2 * (1 + _NEAR))
    where = f"the same at t = {t_1:.6g} and {t_1 * (1 + _NEAR):.6g}, another at {t_2:.6g}"
    return Steps(f"the output of {denoiser!r} is in steps, {where}" if found else "", len(outputs))


def label_in_steps(denoiser: Denoiser, low: float, high: float) -> NetworkDenoiser | None:
    """The network in a denoiser whose time label is in steps between two times, as the host can tell; None if none."""
    for part in (denoiser, *contents(denoiser)):
        if isinstance(part, NetworkDenoiser) and _label_in_steps(part, low, high):
            return part
    return None


def _label_in_steps(denoiser: NetworkDenoiser, low: float, high: float) -> bool:
    """By the formula of the module's docstring."""
    h = (high - low) / _CELLS
    edges = torch.linspace(low, high, _CELLS + 1, dtype=torch.float64, device="cpu")
    middles = (edges[1:] + edges[:-1]) / 2
    times = torch.cat([edges, middles, middles + h / 1000])
    labels = denoiser.label(times).detach().cpu().double()
    labels = labels.expand(len(times), *labels.shape[1:]).reshape(len(times), -1)
    edge, middle, near = labels.split([_CELLS + 1, _CELLS, _CELLS])
    moved = edge.diff(dim=0).abs().amax(1)
    still = (near - middle).abs().amax(1) < 1e-4 * moved
    return bool(2 * still.sum() > (moved > 0).sum())
