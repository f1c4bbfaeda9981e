"""Monotonic alignment: which token each frame belongs to, when tokens are spoken in their order and none is left out.

With s_{n,t} the score of token n at frame t, log p(frame t | token n) say, and A(t) the token of frame t, the best

    A = argmax sum_t s_{A(t), t},   A(0) = 0,   A(T - 1) = N - 1,   A(t) - A(t - 1) in {0, 1}

is found by dynamic programming (Kim et al., 2020, "Glow-TTS: a generative flow for text-to-speech via monotonic
alignment search", section 3.2), Q the best sum up to token n at frame t, and read back from its end:

    Q_{n,t} = s_{n,t} + max(Q_{n,t-1}, Q_{n-1,t-1})
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from scoresde.checks import ArgumentError
from scoresde.errors import some
from scoresde.tensors import precise

__all__ = ["aligned", "monotonic_durations"]


@torch.no_grad()
def monotonic_durations(scores: Tensor, tokens: Tensor | None = None, frames: Tensor | None = None) -> Tensor:
    """How many frames each token takes in the best monotonic alignment. Every token takes one at least.

    It is a constant to autograd. Of alignments that are equally good it is the one whose tokens begin latest, the last
    token first. Scores beyond an item's own tokens and frames are not read: an item has the same in any batch.

    Args:
        scores: s_{n,t}, shape (B, N, T), floating point; -inf forbids.
        tokens: how many tokens each item has, shape (B,); N by default.
        frames: how many frames, shape (B,); T by default.

    Returns:
        Whole numbers, int64 of shape (B, N), whose sum over an item is its frames; 0 beyond its tokens.

    Raises:
        ValueError: if shapes do not fit, an item has fewer frames than tokens, or none of its alignments has a finite
            score.

    >>> near, far = 0.0, -9.0
    >>> monotonic_durations(torch.tensor([[[near, near, far, far], [far, far, near, far], [far, far, far, near]]]))
    tensor([[2, 1, 1]])
    """
    if scores.ndim != 3 or not scores.is_floating_point():
        raise ArgumentError(f"scores are {scores.dtype} of shape {tuple(scores.shape)}: expected floats (B, N, T)")
    B, N, T = scores.shape
    n, t = (_lengths(given, B, most, scores) for given, most in ((tokens, N), (frames, T)))
    if bad := (n > t).nonzero().flatten().tolist():
        raise ArgumentError(f"items {some(bad)} have fewer frames than tokens: each token takes one at least")
    s = precise(scores)
    best, stays = torch.full_like(s[:, :, 0], -math.inf), []
    best[:, 0] = s[:, 0, 0]
    end = best[:, 0].clone()
    for frame in range(1, T):
        before = F.pad(best[:, :-1], (1, 0), value=-math.inf)
        stays.append(best > before)  # where both are as good, the token before is left later
        best = torch.maximum(best, before) + s[:, :, frame]
        end = torch.where(t == frame + 1, best.gather(1, n[:, None] - 1)[:, 0], end)
    if bad := (~end.isfinite()).nonzero().flatten().tolist():
        raise ValueError(f"no alignment of items {some(bad)} has a finite score: NaN or too many -inf among them")
    durations, at = torch.zeros(B, N, dtype=torch.int64, device=s.device), n - 1
    for frame in range(T - 1, -1, -1):
        inside = frame < t
        durations.scatter_add_(1, at[:, None], inside.long()[:, None])
        if frame > 0:
            at = at - (inside & ~stays[frame - 1].gather(1, at[:, None])[:, 0]).long()
    return durations


def aligned(durations: Tensor, frames: int | None = None) -> Tensor:
    """The alignment of durations as a matrix A of zeros and ones, so that A @ h has each token's h at its frames.

    Args:
        durations: whole numbers >= 0, shape (B, N).
        frames: T, as many rows; by default those of the longest item.

    Returns:
        bool, shape (B, T, N); the rows beyond an item's frames are zero.

    Raises:
        ValueError: if durations are no such numbers, or an item has more frames than there are rows.

    >>> aligned(torch.tensor([[2, 1], [1, 0]])).int().tolist()
    [[[1, 0], [1, 0], [0, 1]], [[1, 0], [0, 0], [0, 0]]]
    """
    if durations.ndim != 2 or durations.is_floating_point() or bool((durations < 0).any()):
        kind = f"{durations.dtype} {tuple(durations.shape)}"
        raise ArgumentError(f"durations are {kind}: expected whole numbers >= 0, shape (B, N)")
    ends = durations.cumsum(1)
    longest = int(ends[:, -1].max())
    if frames is not None and longest > frames:
        raise ArgumentError(f"an item of {longest} frames in {frames}: they would be cut")
    t = torch.arange(longest if frames is None else frames, device=durations.device)[:, None]
    return (t < ends[:, None]) & (t >= (ends - durations)[:, None])


def _lengths(given: Tensor | None, batch: int, most: int, like: Tensor) -> Tensor:
    """How many of the `most` each item has."""
    if given is None:
        return torch.full((batch,), most, device=like.device)
    n = torch.as_tensor(given, device=like.device)
    if n.shape != (batch,) or n.is_floating_point() or bool(((n < 1) | (n > most)).any()):
        raise ArgumentError(f"lengths {n.tolist()}: expected {batch} whole numbers in 1..{most}")
    return n.long()
