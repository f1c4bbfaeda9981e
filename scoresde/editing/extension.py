"""Extension along an axis, window by window (Ho et al., 2022, "Video diffusion models", section 3.1): a model of
windows of w entries makes series, clips, strips of any length. The last o entries are known, and a sample of the model
given these brings w - o new ones,

    x_{n+1..n+w-o} ~ p(x_{o+1..w} | x_{1..o} = the last o of x_{1..n})        again and again

so it has the law of the whole where that is Markov of an order of at most o and the sampling is exact; what is longer
than o, the model forgets.

How a sample given the o is drawn is any of the methods of `scoresde.guidance` for a mask:

    replacement    lambda D, mask, y: (D, Replacement(DDPM(), mask, y))
    the paper's    lambda D, mask, y: (ReconstructionGuidance(D, mask, y, 2.0), Replacement(DDPM(), mask, y))
    PiGDM          lambda D, mask, y: (PiGDM(D, mask, y, 0.0), DDPM())
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from scoresde.checks import ArgumentError, check_count
from scoresde.denoiser import Denoiser, check_call
from scoresde.guidance.operators import Mask
from scoresde.noise import derive_seed, seeds_of
from scoresde.sampling import sample
from scoresde.solvers import Solver
from scoresde.tensors import check_batch

__all__ = ["Given", "extend"]

Given = Callable[[Denoiser, Mask, Tensor], tuple[Denoiser, Solver]]
"""(denoiser, mask, y) to the denoiser and solver that draw samples with what the mask knows of y."""


def extend(
    denoiser: Denoiser,
    x: Tensor,
    length: int,
    method: Given,
    *,
    window: int,
    overlap: int,
    dim: int = 2,
    steps: int | None = None,
    nfe: int | None = None,
    seed: int | Sequence[int] | None = None,
    cond: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Tensor:
    """x, followed by what a model of windows makes of its end.

    Args:
        denoiser: a model of windows, of the shape of x with `window` entries along dim. (A network that takes clips of
            any length is told nothing of its own: give the window that it was trained on.)
        x: what is known, shape (B, ...), with `overlap` entries along dim at least. It comes back as it is.
        length: entries of the result along dim.
        method: how to draw a window given its beginning: (denoiser, mask, y) to a denoiser and a solver, y being of the
            shape of a window, and what the mask does not know of it zero.
        window, overlap: w and o, 0 < o < w.
        dim: the axis: 2 are the frames of clips (B, C, F, ...), and the time of series (B, C, L).
        steps, nfe: as for `sample`, of each window.
        seed: one integer, or one for each sample: window k of sample i is the same in any batch.
        cond: as for `sample`, the same for each window.
        progress: a bar for each window.

    Returns:
        shape of x, with `length` entries along dim, in its dtype.

    Raises:
        ValueError: if x has fewer than `overlap` entries or more than `length`, dim is no axis of an event, w and o are
            not as above, or the denoiser has a codec, whose windows are not those of data; as `sample`.
        NonFiniteError: as for `sample`.

    >>> from scoresde import VPSDE
    >>> from scoresde.exact import Gaussian
    >>> from scoresde.guidance import MomentMatching
    >>> from scoresde.solvers import DDIM
    >>> walk = Gaussian(mean=torch.zeros(1, 2), cov=[[1.0, 0.8], [0.8, 1.0]]).denoiser(VPSDE())
    >>> exact = lambda D, mask, y: (MomentMatching(D, mask, y, 0.0), DDIM())
    >>> x = extend(walk, torch.ones(500, 1, 1), 3, exact, window=2, overlap=1, steps=30, seed=0)
    >>> [round(v, 1) for v in x.mean(0)[0].tolist()]  # x_{n+1} is N(0.8 x_n, 0.6^2)
    [1.0, 0.8, 0.7]
    """
    check_batch(x, "x")
    check_count(length=length, window=window, overlap=overlap)
    if not 1 <= dim < x.ndim:
        raise ArgumentError(
            f"dim={dim} of x of shape {tuple(x.shape)}: expected an axis of its events, 1 to {x.ndim - 1}"
        )
    if not overlap < window:
        raise ArgumentError(f"window={window}, overlap={overlap}: expected some entries of a window to be new")
    if not overlap <= x.shape[dim] <= length:
        raise ArgumentError(
            f"x of shape {tuple(x.shape)} has {x.shape[dim]} entries along dim={dim}: expected {overlap}, the overlap, "
            f"to {length}, the length"
        )
    check_call(denoiser, x, cond)
    if denoiser.codec is not None:
        raise ArgumentError(f"{denoiser!r} has a codec: extend a series of its latents by the denoiser of these")
    seeds = seeds_of(seed, len(x))
    known = torch.arange(window, device=x.device).reshape(-1, *[1] * (x.ndim - 1 - dim)) < overlap
    size = [window if axis == dim else n for axis, n in enumerate(x.shape)]
    k = 0
    while x.shape[dim] < length:
        y = x.new_zeros(size)
        y.narrow(dim, 0, overlap).copy_(x.narrow(dim, x.shape[dim] - overlap, overlap))
        given, solver = method(denoiser, Mask(known), y)
        drawn = sample(
            given,
            size,
            solver,
            steps=steps,
            nfe=nfe,
            seed=[derive_seed(own, k) for own in seeds],
            cond=cond,
            progress=progress,
            device=x.device,
        ).x
        new = drawn.narrow(dim, overlap, min(window - overlap, length - x.shape[dim]))
        x, k = torch.cat([x, new.to(x.dtype)], dim), k + 1
    return x
