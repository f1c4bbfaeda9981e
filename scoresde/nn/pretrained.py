"""A text encoder of Hugging Face's `transformers`, frozen, by its name or the path of its folder: the encoder of a T5,
as Imagen has it (Saharia et al., 2022), the text model of a CLIP, as Stable Diffusion has it (Rombach et al., 2022), or
any other that `AutoModel` knows.

    context = last_hidden_state,    context_mask = attention_mask

Weights are read from safetensors files alone, and no code that stands beside them is run. Its tokens are the numbers of
its own tokenizer and 1, as those of `scoresde.nn.tokens`, its special ones among them, but the empty text has none: it
is nothing, as everywhere here (T5 and CLIP themselves have outputs for it).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scoresde.nn.text import TextReader
from scoresde.nn.tokens import PretrainedTokens, by_transformers, transformers

__all__ = ["PretrainedText"]


class PretrainedText(TextReader):
    """encoder(text) -> {"context": (B, length, width), "context_mask": (B, length)}, of texts, a list of strings, or of
    their tokens, (B, N), N <= length: frozen in `scoresde.nn.Encoding`.

    Args:
        name: of the encoder, "google/t5-v1_1-small" say, or the path of its folder.
        length: the most tokens that a text has.

    Raises:
        ImportError: if `transformers` is not installed.
        ValueError: if there is no such encoder, or its weights are no safetensors files.
    """

    pretrained = True

    def __init__(self, name: str, length: int = 77) -> None:
        super().__init__(PretrainedTokens(name), length)
        config = by_transformers(name, "AutoConfig")
        kind = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel", "clip": "CLIPTextModel"}
        own = kind.get(config.model_type, "AutoModel")
        if torch.get_default_device().type == "meta":  # its shapes alone
            config = config.text_config if config.model_type == "clip" else config
            made = getattr(transformers(), own)
            self.model = made.from_config(config) if own == "AutoModel" else made(config)
        else:
            self.model = by_transformers(name, own, use_safetensors=True)
        self.model.eval().requires_grad_(False)

    @property
    def sizes(self) -> dict[str, int]:
        return {"context": self.model.config.hidden_size}

    @property
    def device(self) -> torch.device:
        found: torch.device = self.model.device
        return found

    def forward(self, text: Tensor | Sequence[str]) -> dict[str, Tensor]:
        tokens = self.tokens(text)
        counts = tokens != 0
        seen = counts.clone()
        seen[:, 0] = True  # of the empty text one, for there is no softmax over none
        found = self.model(input_ids=(tokens - 1).clamp(min=0), attention_mask=seen.long()).last_hidden_state
        return {"context": torch.where(counts[..., None], found, 0), "context_mask": counts}
