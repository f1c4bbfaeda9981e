"""What a network is told beside x: the time label, and optionally a class, a vector and a context."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde.checks import check_count
from scoresde.nn.blocks import zero
from scoresde.nn.context import Tokens, tokens_of
from scoresde.tensors import known_any

__all__ = ["TimeEmbedding", "check_label", "onehot"]


class TimeEmbedding(nn.Module):
    """Features of the time label, sinusoidal (Vaswani et al., 2017; Ho et al., 2020) or Fourier (Tancik et al., 2020;
    Song et al., 2021), through an MLP of two layers; plus, optionally, those of a class, of a vector and of
    the mean of a context.

    The angles are computed in float32 or better whatever the network's dtype: rounded to bfloat16, 999 and 1000 are
    one number.

    The null class, for classifier-free guidance, is `num_classes` itself; no label at all is the same. Its embedding
    is zero: the last layer's bias could take up any other.

    Args:
        features: width of the result.
        max_period: the longest sinusoidal period; labels up to about a tenth of it are told apart. With labels in
            [0, 1000], as 999 t, the default is DDPM's.
        num_classes: number of classes, or None for an unconditional network.
        vector: length of the vector, or None.
        context: width of the tokens of a context, or None (`scoresde.nn.context`). What their mean adds starts at zero.
        fourier: None for sinusoidal features; else the standard deviation of Gaussian frequencies, in cycles per unit
            of the label: 16 for log sigma (Song et al.), about 1 for t in [0, 1], 0.001 for 999 t. They are drawn once
            from `seed`, held as a buffer and never trained.
        seed: of those frequencies.
        time_features: number of the sinusoidal or Fourier features, by default that of the result.
        null_class: False for a network that was trained with a class always: it then takes no call without one.

    Raises:
        ValueError: unless features is even and positive, counts are >= 1 and fourier is positive; by the call, if
            label or vector is unexpected, the vector is missing, or either has another shape or type; and without a
            class if null_class is False.
    """

    frequencies: Tensor | None

    def __init__(
        self,
        features: int,
        max_period: float = 10_000.0,
        num_classes: int | None = None,
        *,
        vector: int | None = None,
        context: int | None = None,
        fourier: float | None = None,
        seed: int = 0,
        time_features: int | None = None,
        null_class: bool = True,
    ) -> None:
        super().__init__()
        told = features if time_features is None else time_features
        if told < 2 or told % 2:
            raise ValueError(f"features={told}: expected an even number >= 2")
        counts = {"num_classes": num_classes, "vector": vector, "context": context}
        check_count(**{k: n for k, n in counts.items() if n is not None})
        if fourier is not None and not 0 < fourier < math.inf:
            raise ValueError(f"fourier={fourier}: expected a positive scale of the frequencies, or None")
        self.log_step, self.null_class = -math.log(max_period) / (told // 2), null_class
        self.inward, self.outward = nn.Linear(told, features), nn.Linear(features, features)
        self.classes = None if num_classes is None else nn.Embedding(num_classes, features)
        self.vectors = None if vector is None else nn.Linear(vector, features)
        self.contexts = None if context is None else zero(nn.Linear(context, features, bias=False))
        frequencies = None
        if fourier is not None:
            generator = torch.Generator().manual_seed(seed)
            frequencies = fourier * torch.randn(told // 2, generator=generator, device="cpu", dtype=torch.float32)
        self.register_buffer("frequencies", frequencies)

    @property
    def condition_sizes(self) -> dict[str, int]:
        """What it can be told: the name of each condition, with the number of classes or of entries."""
        found = {} if self.classes is None else {"label": self.classes.num_embeddings}
        if self.vectors is not None:
            found["vector"] = self.vectors.in_features
        return found if self.contexts is None else {**found, "context": self.contexts.in_features, "context_mask": 1}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TimeEmbedding:
        """Moves the frequencies with the network, and keeps them in float32 where its weights are rounded."""
        kept = self.frequencies
        super()._apply(fn, recurse)
        if kept is not None and self.frequencies is not None and not kept.is_meta:
            self.frequencies = kept.to(self.frequencies.device)
        return self

    def angles(self, time: Tensor) -> Tensor:
        """time (B,) times the frequencies, max_period^(-2 k / features) or Gaussian ones, (B, features / 2)."""
        time = time.to(torch.promote_types(time.dtype, torch.float32))
        if self.frequencies is not None:
            return 2 * math.pi * time[:, None] * self.frequencies
        k = torch.arange(self.inward.in_features // 2, dtype=time.dtype, device=time.device)
        return time[:, None] * (self.log_step * k).exp()

    def tokens(self, time: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tokens | None:
        """The context of the samples of time (B,), (B, N, width) with a mask (B, N), or one for all, as `forward` and
        cross-attention take it; None where the network is built without.

        Raises:
            ValueError: if it is unexpected, or as `tokens_of`.
        """
        if self.contexts is not None:
            if context is None and mask is None:
                context = time.new_zeros(1, 0, self.contexts.in_features)
            return tokens_of(context, mask, time.shape[0], self.contexts.in_features, self.contexts.weight.dtype)
        if context is not None or mask is not None:
            raise ValueError("this network takes no context: build it with context= the width of tokens to pass one")
        return None

    def forward(
        self,
        time: Tensor,
        label: Tensor | int | None = None,
        vector: Tensor | None = None,
        tokens: Tokens | None = None,
    ) -> Tensor:
        """time (B,), label, an integer or integers (B,), vector (B, length), or one for all, and tokens, of `tokens`,
        to (B, features).
        """
        self._check(time, label, vector)
        angles = self.angles(time)
        features = torch.cat([angles.cos(), angles.sin()], dim=1)
        features = self.outward(F.silu(self.inward(features.to(self.inward.weight.dtype))))
        if label is not None and self.classes is not None:
            label = torch.as_tensor(label, device=time.device).long().expand(time.shape)
            features = features + F.embedding(label, F.pad(self.classes.weight, (0, 0, 0, 1)))
        if vector is not None and self.vectors is not None:
            features = features + self.vectors(vector.to(self.vectors.weight.dtype))
        if tokens is not None and self.contexts is not None:
            features = features + self.contexts(tokens.mean)
        return features

    def _check(self, time: Tensor, label: Any, vector: Tensor | None) -> None:
        if self.classes is not None and not self.null_class:
            n = self.classes.num_embeddings
            if label is None or known_any(torch.as_tensor(label) >= n):
                raise ValueError(
                    f"label={label}: this network was never trained without a class: pass label= of 0 to {n - 1}, in "
                    "sampling cond={'label': ...}"
                )
        check_label(label, time, self.classes is not None)
        if self.vectors is None:
            if vector is not None:
                raise ValueError("this network takes no vector: build it with vector= its length to pass one")
            return
        n = self.vectors.in_features
        if vector is None or vector.shape not in ((n,), (1, n), (*time.shape, n)):
            found = "none" if vector is None else f"shape {tuple(vector.shape)}"
            raise ValueError(
                f"this network is conditional on a vector: pass vector= of shape {(*time.shape, n)}, not {found}"
            )


def check_label(label: Any, time: Tensor, classes: bool) -> None:
    """Raises ValueError unless label is None or, for a network of classes, an integer or integers of the shape of time,
    (B,).
    """
    if label is None:
        return
    if not classes:
        raise ValueError("this network has no classes: build it with num_classes= to pass a label")
    kind = label if isinstance(label, Tensor) else torch.as_tensor(label)
    if kind.shape not in ((), (1,), time.shape) or kind.is_floating_point():
        raise ValueError(
            f"label is {kind.dtype} of shape {tuple(kind.shape)}: expected integers {tuple(time.shape)}, or one for all"
        )


def onehot(label: Any, time: Tensor, K: int, dtype: torch.dtype) -> Tensor:
    """A checked label as rows of K entries, (B, K): one is 1; none is for no label, or the class K.

    Raises:
        ValueError: if it is below 0 or above K.
    """
    index = torch.as_tensor(K if label is None else label, device=time.device).long().expand(time.shape)
    try:
        return F.one_hot(index, K + 1)[:, :K].to(dtype)
    except RuntimeError as error:
        if not str(error).startswith("Class values"):
            raise
        given = index.unique().tolist()
        raise ValueError(f"label is {given}: expected classes 0 to {K - 1}, or {K} for none") from error
