"""Sub-sequences of a chain's N nodes, as the toolkits of the field round them: K numbers counted from 0, theirs.

Their names are the same and their numbers are not. A node k of theirs is node k + 1 here, t = 0 being the data.

    like                  is what is run by
    None                  this library: exact arithmetic, ties to even in nodes that are counted from 1
    diffusers             its DDIM, DDPM and PNDM (and of these DDIM alone steps elsewhere: below)
    diffusers-multistep   its DPM-Solver (multistep), UniPC, DEIS and SA-Solver: K + 1 numbers without the lowest
    diffusers-sigmas      its Euler, Heun, LMS and KDPM2: "linspace" is not rounded, but sigma / alpha linear between
                          the nodes
    guided-diffusion      "leading" is its "ddimK", "linspace" its K or its sections, "10,15,20"
    ddim                  "leading" is its "uniform", "quadratic" its "quad"
    k-diffusion           "linspace", log(sigma / alpha) being linear between nodes

What they are not, they do not say: a sequence may be longer than K (range(0, N, N // K) has 31 numbers for K = 30 of
1000, and numpy.arange(N, 0, -N / K), of "trailing", one too many for 62 of the 1000 counts), and may have a number more
than once. `Grid.strided` tells of both.

diffusers' DDIM goes from a number k to k - N // K, whatever the next number is, and evaluates there as if it were the
next: its "trailing" does so at 984 of the 1000 counts of 1000 nodes, and its "linspace" at 998. Where the last one is
N // K it ends at the first node, not at the data, whatever set_alpha_to_one says: in "trailing" at 372 counts, 15 being
one, and in "leading" with an offset of 1 beyond 500. A grid here steps to the time that it evaluates at next.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scoresde.chain import DDPMChain
from scoresde.checks import ArgumentError, check_count, check_option, check_whole

__all__ = ["BETWEEN", "Spacing", "Toolkit", "label_between", "nodes_of", "stride"]

Spacing = Literal["leading", "trailing", "linspace", "quadratic"]
Toolkit = Literal["diffusers", "diffusers-multistep", "diffusers-sigmas", "guided-diffusion", "ddim", "k-diffusion"]
Nodes = NDArray[Any]

BETWEEN: dict[str, Literal["sigma", "half_log_snr"]] = {"diffusers-sigmas": "sigma", "k-diffusion": "half_log_snr"}
"""What is linear between the nodes of toolkits that stand there, sigma standing for sigma / alpha."""


def stride(N: int, K: int | Sequence[int], spacing: Spacing, like: Toolkit | None = None) -> Nodes:
    """The numbers that a toolkit evaluates at, from 0, in increasing order, as they are.

    Args:
        N: nodes of the chain.
        K: steps asked for, at most N; of "linspace" of guided-diffusion also their numbers in sections of the chain of
            equal length, those at the data first.
        spacing, like: as in the table above.

    Raises:
        ValueError: if the toolkit has no such spacing, K is no whole number or more than there are nodes, or there is
            no such sub-sequence: guided-diffusion's "ddimK" is an integer stride with exactly K numbers.

    >>> stride(1000, 4, "trailing", "diffusers").tolist()
    [249.0, 499.0, 749.0, 999.0]
    """
    check_option(get_args(Spacing), spacing=spacing)
    check_option((None, *get_args(Toolkit)), like=like)
    known = _STRIDES[like]
    if spacing not in known:
        raise ArgumentError(f"{like} has no spacing={spacing!r}, but {' and '.join(map(repr, known))}")
    if isinstance(K, Sequence) and not isinstance(K, str) and (like, spacing) == ("guided-diffusion", "linspace"):
        return _sections(N, K)
    check_count(steps=K)  # type: ignore[arg-type]
    assert isinstance(K, int | np.integer)
    if K > N:
        raise ArgumentError(f"steps={K}, but the chain has only {N} nodes")
    return np.sort(known[spacing](N, int(K)).astype(np.float64))


def nodes_of(
    chain: DDPMChain,
    steps: int | Sequence[int],
    spacing: Spacing,
    like: Toolkit | None,
    offset: int,
    end: float,
    stacklevel: int = 2,
) -> Tensor:
    """The decreasing times of such a sequence on a chain before the end, each once, with a warning where theirs is
    otherwise. Arguments and errors: `scoresde.grid.Grid.strided`.
    """
    nodes = stride(chain.steps, steps, spacing, like)
    check_whole(offset=offset)
    if offset and spacing != "leading":
        raise ArgumentError(f"offset={offset} is for spacing='leading': in others theirs counts for nothing")
    times = torch.from_numpy(nodes + (1 + offset)).flip(0)
    if like is None:
        return times
    whose = f"{spacing} of {steps} steps of {chain.steps}, as {like} has it,"
    times = _told_apart(times, end, whose, steps, stacklevel + 1)
    return _at_level(chain, times, BETWEEN.get(like))


def _told_apart(times: Tensor, end: float, whose: str, steps: int | Sequence[int], stacklevel: int) -> Tensor:
    """A toolkit's nodes before the end, each once, with a warning of what is different."""
    kept = times.unique_consecutive()
    kept = kept[(kept >= 1) & (kept != end)]
    K, said = sum(steps) if isinstance(steps, Sequence) else int(steps), []
    if (times < 1).any():
        said.append(
            "ends with an evaluation at label -1, in a table the last node's: left out here, as t = 0 is the data"
        )
    if len(times.unique_consecutive()) < len(times) or (times == end).any():
        said.append("takes steps from a node to itself: left out here")
    if len(kept) != K:
        said.append(f"takes {len(kept)} steps here")
    if said:
        warnings.warn(f"{whose} {'; '.join(said)}", stacklevel=stacklevel)
    return kept


def _at_level(chain: DDPMChain, times: Tensor, linear: str | None) -> Tensor:
    """The times of the noise levels on a line from node to node, in sigma / alpha or its logarithm."""
    whole = times == times.round()
    if linear is None or bool(whole.all()):
        return times
    low, high = (-chain.half_log_snr(node) for node in (times.floor(), times.ceil()))
    w = times - times.floor()
    line = torch.lerp(low, high, w) if linear == "half_log_snr" else torch.lerp(low.exp(), high.exp(), w).log()
    return torch.where(whole, times, chain.time_at(-line))


def label_between(chain: DDPMChain, linear: Literal["sigma", "half_log_snr"]) -> Callable[[Tensor], Tensor]:
    """A time label, `EpsDenoiser(net, chain, time=label_between(chain, "sigma"))`: the number, from 0, at which a line
    from node to node has the noise level of t. So k-diffusion tells a network of times between nodes ("half_log_snr"),
    and diffusers does, of Karras' levels ("half_log_snr") and in its Euler at "linspace" ("sigma", for sigma / alpha).
    `chain.label` has the same numbers at the nodes, and others between: by up to 0.1 on the first of the linear
    schedule's intervals, and 0.02 beyond the tenth. Before the first node it is t - 1, as there.

    >>> label_between(DDPMChain(), "sigma")(torch.tensor([1000.0, 1.5]).double()).round(decimals=4)
    tensor([9.9900e+02, 5.4820e-01], dtype=torch.float64)
    """
    check_option(("sigma", "half_log_snr"), linear=linear)

    def label(t: Tensor) -> Tensor:
        node = t.ceil().clamp(2, max(chain.steps, 2))
        low, high, at = (-chain.half_log_snr(time) for time in (node - 1, node, t))
        part, whole = at - low, high - low
        w = part / whole if linear == "half_log_snr" else part.expm1() / whole.expm1()
        return torch.where((t == t.round()) | (t < 1), t - 1, node - 2 + w)

    return label


def _sections(N: int, counts: Sequence[int]) -> Nodes:
    """Sections of N / len(counts) nodes, the first ones longer by one where it leaves a rest, each with its ends."""
    if not counts:
        raise ArgumentError(f"steps={counts!r}: expected the numbers of steps in one section or more")
    found, start = [], 0
    for i, K in enumerate(counts):
        check_count(steps=K)
        size = N // len(counts) + (i < N % len(counts))
        if size < K:
            raise ArgumentError(f"steps={K} in section {i} of {list(counts)}, which has only {size} nodes")
        found.append(start + _running(size, K))
        start += size
    return np.concatenate(found)


def _running(N: int, K: int) -> Nodes:
    """A running sum, with its rounding, rounded."""
    step = (N - 1) / (K - 1) if K > 1 else 1.0
    return np.round(np.concatenate([[0.0], np.cumsum(np.full(K - 1, step))]))


def _integer_stride(N: int, K: int) -> Nodes:
    """range(0, N, i) of K numbers, of the smallest i that has them."""
    i = -(-N // K)
    if -(-N // i) != K:
        raise ArgumentError(f"steps={K}: no integer stride of {N} nodes has exactly that many numbers")
    return np.arange(0, N, i)


def _linspace(N: int, K: int) -> Nodes:
    return np.linspace(0, N - 1, K)


def _falling(N: int, K: int) -> Nodes:
    return np.round(np.arange(N, 0, -N / K)) - 1


_DIFFUSERS: dict[Spacing, Callable[[int, int], Nodes]] = {
    "leading": lambda N, K: np.arange(K) * (N // K),
    "trailing": _falling,
    "linspace": lambda N, K: np.round(_linspace(N, K)),
}

_STRIDES: dict[Toolkit | None, dict[Spacing, Callable[[int, int], Nodes]]] = {
    None: {
        "leading": _DIFFUSERS["leading"],
        "trailing": lambda N, K: np.round(N - np.arange(K) * (N / K)) - 1,
        "linspace": lambda N, K: np.round(N - np.arange(K) * (N - 1) / max(K - 1, 1)) - 1,
        "quadratic": lambda N, K: np.floor((np.arange(K) * (math.sqrt(0.8 * N) / max(K - 1, 1))) ** 2),
    },
    "diffusers": _DIFFUSERS,
    "diffusers-multistep": {
        "leading": lambda N, K: np.arange(1, K + 1) * (N // (K + 1)),
        "trailing": _falling,
        "linspace": lambda N, K: np.round(_linspace(N, K + 1))[1:],
    },
    "diffusers-sigmas": _DIFFUSERS | {"linspace": _linspace},
    "guided-diffusion": {"leading": _integer_stride, "linspace": _running},
    "ddim": {
        "leading": lambda N, K: np.arange(0, N, N // K),
        "quadratic": lambda N, K: np.floor(np.linspace(0, np.sqrt(N * 0.8), K) ** 2),
    },
    "k-diffusion": {"linspace": _linspace},
}
