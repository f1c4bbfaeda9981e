"""A condition of any length: tokens c_1, ..., c_n of one width, in any order, of which each sample has its own number.

    cross-attention    h + project(softmax(q(h) k(c)^T / sqrt(d)) v(c))    (Vaswani et al., 2017; Rombach et al., 2022)
    pooled             mean_j c_j, linearly into the embedding that norms are modulated by    (as Saharia et al., 2022)

In a batch they are (B, N, width), shorter ones filled up with anything, and a mask says which count. Their order says
nothing: what has one, a text say, carries its positions in the tokens.

No token at all is the null condition of guidance without a classifier: nothing is attended to, and nothing is added.
For that there is one token more, the first, of zeros, which counts where no other does. The maps have no biases, so
that tokens that are all zero add exactly zero: they are the null condition as well, with a mask and without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde.masks import batch_of
from scoresde.nn.blocks import attend, zero
from scoresde.tensors import shown

__all__ = ["CrossAttention", "Tokens", "padded", "tokens_of"]


@shown
class Tokens(NamedTuple):
    """Tokens (B, 1 + N, width), zero where they do not count, and which count, bool (B, 1 + N): one at least."""

    values: Tensor
    mask: Tensor

    @property
    def mean(self) -> Tensor:
        """Of those that count, (B, width)."""
        return self.values.sum(1) / self.mask.sum(1, keepdim=True)


def tokens_of(context: Tensor | None, mask: Tensor | None, n: int, width: int, dtype: torch.dtype) -> Tokens:
    """The context of n samples. Arguments: context (n, N, width) and mask (n, N), or one for all; without a mask all
    tokens count.

    Raises:
        ValueError: if either is of another shape, the mask is not bool, or there is a mask alone.
    """
    if context is None:
        raise ValueError("context_mask without a context: pass context= too, or neither")
    if context.ndim != 3 or context.shape[0] not in (1, n) or context.shape[2] != width:
        raise ValueError(
            f"context of shape {tuple(context.shape)}: expected ({n}, tokens, {width}), or one entry for all samples"
        )
    if mask is None:
        mask = torch.ones(context.shape[:2], dtype=torch.bool, device=context.device)
    if mask.dtype != torch.bool or mask.ndim != 2 or mask.shape[0] not in (1, n) or mask.shape[1] != context.shape[1]:
        raise ValueError(
            f"context_mask is {mask.dtype} of shape {tuple(mask.shape)}: expected bool {(n, context.shape[1])}, True "
            "where a token counts (a tokenizer's attention_mask.bool(), the opposite of torch's key_padding_mask)"
        )
    context, mask = context.expand(n, -1, -1), mask.expand(n, -1)
    values = torch.where(mask[:, :, None], context, 0).to(dtype)
    return Tokens(F.pad(values, (0, 0, 1, 0)), torch.cat([~mask.any(1, keepdim=True), mask], dim=1))


def padded(contexts: Sequence[Tensor], length: int | None = None) -> dict[str, Tensor]:
    """Tokens of several samples as the conditions of one batch, for `net(x, time, **cond)` and `sample(cond=)`.

    Args:
        contexts: of each sample its tokens, (n_i, width); n_i may be 0.
        length: N of the batch, by default the largest n_i.

    Returns:
        context (B, N, width), filled up with zeros, and context_mask (B, N).

    Raises:
        ValueError: if there are none, one is of another shape, or longer than that.

    >>> padded([torch.ones(2, 1), torch.ones(1, 1)])["context_mask"]
    tensor([[ True,  True],
            [ True, False]])
    """
    shapes = [tuple(context.shape) for context in contexts]
    longest = max((shape[0] for shape in shapes if shape), default=0)
    N = longest if length is None else length
    if not shapes or any(len(shape) != 2 or shape[1] != shapes[0][-1] for shape in shapes) or longest > N:
        raise ValueError(f"contexts of shapes {shapes}, length={length}: expected (n_i, width), of one width, n_i <= N")
    values, mask = batch_of(contexts, N)
    return {"context": values, "context_mask": mask[..., 0]}


class CrossAttention(nn.Module):
    """What features find in a context, to be added to them; its last layer starts at zero.

    Args:
        channels: of the features.
        width: of the tokens.
        heads: which divide the channels.
    """

    def __init__(self, channels: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv = nn.Linear(channels, channels, bias=False), nn.Linear(width, 2 * channels, bias=False)
        self.project = zero(nn.Linear(channels, channels, bias=False))

    def forward(self, h: Tensor, tokens: Tokens) -> Tensor:
        """h (B, M, channels), normalised, to the same shape."""
        q = self.q(h).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(tokens.values).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        found: Tensor = self.project(attend(q, k, v, tokens.mask[:, None, None]).transpose(1, 2).flatten(2))
        return found
