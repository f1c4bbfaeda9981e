"""A transformer that reads texts (Vaswani et al., 2017), as GLIDE's (Nichol et al., 2021, section 3) does for images:

    h = embedding[tokens] + position, and one token more, the last, which is the same for all texts
    h = h + attention(norm(h)), h = h + MLP(norm(h))         `depth` times, over the tokens that there are
    out = norm(h)

A network of images is told both the last token's output, a `vector` for its norms, and the outputs of all tokens, a
`context` for its attention. Its tokens are whole numbers >= 1, filled up with 0 (`scoresde.nn.tokens`).

Every text is filled up to the same `length` before anything is computed, so that padding changes no bit of its result.
A text without a token is nothing: zeros for a vector, and a context of which no token counts, as
`scoresde.data.nothing` has it. That is the null condition of guidance without a classifier.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde.checks import check_count
from scoresde.nn.dit import Layer, norm, positions
from scoresde.nn.tokens import Tokenizer, tokenizer_of
from scoresde.tensors import known_any

__all__ = ["TextEncoder", "TextReader"]


class TextReader(nn.Module, ABC):
    """What reads texts, as tokens of a tokenizer, at most `length` of them.

    Args:
        tokenizer: of texts.
        length: the most tokens that a text has.
    """

    def __init__(self, tokenizer: Tokenizer, length: int) -> None:
        super().__init__()
        check_count(length=length)
        self.tokenizer, self.length = tokenizer, length

    @property
    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """What a network is to be built with to be told what this finds: its options `vector` and `context`."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Of its weights."""

    def tokens(self, text: Tensor | Sequence[str]) -> Tensor:
        """Texts, or one for all, as tokens (B, length), on this network's device.

        Raises:
            TypeError, ValueError: as the tokenizer; if given tokens are of another shape or kind, or out of range.
        """
        if not isinstance(text, Tensor):
            text = [text] if isinstance(text, str) else text
            return self.tokenizer(text, self.length).to(self.device)
        if text.ndim != 2 or text.shape[1] > self.length or text.is_floating_point() or text.dtype == torch.bool:
            raise ValueError(
                f"text is {text.dtype} of shape {tuple(text.shape)}: expected texts, or whole numbers (B, N), N <= "
                f"{self.length}"
            )
        if known_any((text < 0) | (text > self.tokenizer.vocabulary)):
            raise ValueError(
                f"tokens from {int(text.min())} to {int(text.max())}: expected 1 to {self.tokenizer.vocabulary}, and 0 "
                "for none"
            )
        return F.pad(text.long(), (0, self.length - text.shape[1]))


class TextEncoder(TextReader):
    """encoder(text) -> {"vector": (B, width), "context": (B, 1 + length, width), "context_mask": (B, 1 + length)}, of
    texts, a list of strings, or of their tokens, whole numbers (B, N), N <= length.

    >>> encoder = TextEncoder(width=16, depth=1, length=24)
    >>> {name: tuple(value.shape) for name, value in encoder(["a three", "a dark seven", ""]).items()}
    {'vector': (3, 16), 'context': (3, 25, 16), 'context_mask': (3, 25)}
    >>> encoder(["a three", "a dark seven", ""])["context_mask"].sum(1)  # bytes, and the last token
    tensor([ 8, 13,  0])

    Args:
        width: features of a token, even.
        depth: layers.
        heads: of attention, which divide the width.
        mlp_ratio: hidden features of the MLPs as a multiple of width.
        length: the most tokens that a text has.
        tokens: a `Tokenizer`; or in words, "bytes", or the JSON text of a tokenizer of Hugging Face's `tokenizers`.
        dropout: probability, on what each layer adds.

    Raises:
        ValueError: if an option is not one of those; by the call, if a text is longer, or the tokens are none of these.
        ImportError: if a tokenizer's library is not installed.
    """

    def __init__(
        self,
        width: int = 128,
        depth: int = 2,
        heads: int = 4,
        mlp_ratio: float = 4.0,
        *,
        length: int = 64,
        tokens: Tokenizer | str = "bytes",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(tokenizer_of(tokens) if isinstance(tokens, str) else tokens, length)
        check_count(width=width, depth=depth, heads=heads)
        if width % heads or width % 2 or not 0 <= dropout < 1 or not mlp_ratio * width >= 1:
            raise ValueError(
                f"width={width}, heads={heads}, dropout={dropout}, mlp_ratio={mlp_ratio}: expected an even multiple of "
                "the heads, a probability below 1 and a positive ratio"
            )
        self.width = width
        self.embedding = nn.Embedding(1 + self.tokenizer.vocabulary, width)  # of these 0 is the last token
        self.layers = nn.ModuleList(Layer(width, heads, int(mlp_ratio * width), dropout) for _ in range(depth))

    @property
    def sizes(self) -> dict[str, int]:
        return {"vector": self.width, "context": self.width}

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def forward(self, text: Tensor | Sequence[str]) -> dict[str, Tensor]:
        tokens = F.pad(self.tokens(text), (0, 1))
        counts = tokens != 0
        some = counts.any(1, keepdim=True)
        mask = torch.cat([counts[:, :-1], torch.ones_like(some)], 1)
        h = self.embedding(tokens)
        h = h + positions((tokens.shape[1],), self.width, h.device).to(h.dtype)
        for layer in self.layers:
            h = layer(h, mask)
        h, counts = norm(h), mask & some
        h = torch.where(counts[..., None], h, 0)
        return {"vector": h[:, -1], "context": h, "context_mask": counts}
