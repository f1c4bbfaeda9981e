"""Texts as numbers, which a network looks up: a text is a row of whole numbers >= 1, filled up with 0.

    bytes    1 + each byte of its UTF-8: any text, in any language, and nothing to learn or to keep
    words    1 + the numbers of a Hugging Face tokenizer (the library `tokenizers`), trained on one's own captions

**0 is no token.** The empty text is zeros alone, and so it is what a network is told where it is told nothing
(`scoresde.data.nothing`), as guidance without a classifier needs. A text that is too long, and a word or a character
that is not in the vocabulary, are errors: cut off, replaced or left out unseen, they would be another text. (What an
encoder of Hugging Face makes of characters that it does not know is its own tokenizer's affair, an <unk> for a T5.)
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scoresde.checks import check_count, nearest
from scoresde.files import write_whole

__all__ = [
    "ByteTokens",
    "PretrainedTokens",
    "Tokenizer",
    "WordTokens",
    "by_transformers",
    "tokenizer_of",
    "transformers",
]


_NONE = "\0 none"
"""A token that no vocabulary has."""


class Tokenizer(ABC):
    """tokenizer(texts, length) -> int64 (B, length), 0 where there is no token."""

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """How many tokens there are: numbers 1 to that."""

    @property
    @abstractmethod
    def words(self) -> str:
        """What `tokenizer_of` makes it again of."""

    @abstractmethod
    def numbers(self, text: str) -> list[int]:
        """Of one text, each >= 1; of the empty text none.

        Raises:
            ValueError: if it has a word that is not in the vocabulary.
        """

    def __call__(self, texts: Sequence[str], length: int | None = None) -> Tensor:
        """Texts as rows, filled up with 0 to that length, by default that of the longest.

        Raises:
            TypeError: if they are one text, or not texts.
            ValueError: if one has more tokens, or as `numbers`.

        >>> ByteTokens()(["no", ""])
        tensor([[111, 112],
                [  0,   0]])
        """
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"texts are {type(texts).__name__}: expected a list of strings, one for each sample")
        rows = [self.numbers(text) for text in texts]
        longest = max((len(row) for row in rows), default=0)
        N = longest if length is None else length
        if longest > N:
            text = next(text for text, row in zip(texts, rows, strict=True) if len(row) > N)
            raise ValueError(f"the text {text!r} has {longest} tokens, and the longest may have {N}: shorten it")
        return torch.tensor([row + [0] * (N - len(row)) for row in rows], dtype=torch.int64).reshape(len(rows), N)


class ByteTokens(Tokenizer):
    """The bytes of the UTF-8 of a text.

    >>> ByteTokens()(["a b"], length=4)
    tensor([[98, 33, 99,  0]])
    """

    @property
    def vocabulary(self) -> int:
        return 256

    @property
    def words(self) -> str:
        return "bytes"

    def numbers(self, text: str) -> list[int]:
        return [1 + byte for byte in text.encode()]

    def __repr__(self) -> str:
        return "ByteTokens()"


class WordTokens(Tokenizer):
    """Words, or parts of words, of a tokenizer of the library `tokenizers`.

    Args:
        tokenizer: a `tokenizers.Tokenizer`, or the text of its JSON file. Special tokens of its own, [CLS] say, are not
            added, so that the empty text has none. Of a text it gives every token or an error: what it does not know is
            never its token for that, nor nothing at all, as where a byte-pair encoding (BPE) has no such token and
            leaves a character out. What its normaliser and its splitting take away, accents or blanks, is none of the
            text; to have an unknown character read as something else, say so there (`tokenizers.normalizers.Replace`).

    Raises:
        ImportError: if the library is not installed.
        ValueError: if the text is no tokenizer; by the call, if a text has words or characters that it does not know,
            naming these.
    """

    def __init__(self, tokenizer: Any) -> None:
        words = tokenizer if isinstance(tokenizer, str) else tokenizer.to_str()
        try:
            self.tokenizer = _library().Tokenizer.from_str(words)  # a copy, for it is changed here
        except ImportError:
            raise
        except Exception as error:  # the library raises no other
            raise ValueError(f"it is no tokenizer of the library tokenizers: {error}") from error
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self._words = str(self.tokenizer.to_str())
        model = json.loads(self._words)["model"]
        named = model.get("unk_token") or ""
        self._unknown = model["unk_id"] if "unk_id" in model else self.tokenizer.token_to_id(named)
        if model["type"] == "BPE" and model["unk_token"] is None:
            self.tokenizer.model.unk_token = _NONE  # it raises where it would leave a character out

    @classmethod
    def trained(cls, texts: Sequence[str], size: int = 30_000) -> WordTokens:
        """The words of these texts, in lower case, punctuation by itself: the `size` that are most frequent.

        Raises:
            ImportError: if the library is not installed.
        """
        check_count(size=size)
        library = _library()
        from tokenizers import models, normalizers, pre_tokenizers, trainers

        tokenizer = library.Tokenizer(models.WordLevel(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(vocab_size=1 + size, special_tokens=["[UNK]"], show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, path: str | Path) -> WordTokens:
        """What `save` wrote, or another tokenizer.json of that library.

        Raises:
            FileNotFoundError: if there is no such file.
            ImportError: if the library is not installed.
            ValueError: if it is no tokenizer, naming the file.
        """
        try:
            return cls(Path(path).read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write it, whole or not at all, as JSON."""
        write_whole(Path(path), lambda file: file.write(self.words.encode()))

    @property
    def vocabulary(self) -> int:
        return int(max(self.tokenizer.get_vocab().values())) + 1

    @property
    def words(self) -> str:
        return self._words

    def numbers(self, text: str) -> list[int]:
        found = self._encoded(text)
        if found is None:
            words = [word for word in text.split() if self._encoded(word) is None] or [text]
            unknown = [c for c in dict.fromkeys("".join(words)) if self._encoded(c) is None]
            which = f"the characters {', '.join(map(repr, unknown))}" if unknown else "a part"
            raise ValueError(
                f"of the words {', '.join(map(repr, words))} of {text!r} the tokenizer does not know {which}, and has "
                "no token for that: leave them out of the text, or train a tokenizer on texts that have them"
            )
        if self._unknown in found.ids:
            start, end = found.offsets[found.ids.index(self._unknown)]
            known = self.tokenizer.get_vocab().keys() - {self.tokenizer.id_to_token(self._unknown)}
            near = nearest(text[start:end].lower(), known)
            hint = f"; {near!r} is" if near is not None else ""
            raise ValueError(f"the word {text[start:end]!r} of {text!r} is not among the {len(known)} known{hint}")
        return [1 + number for number in found.ids]

    def _encoded(self, text: str) -> Any:
        """What the library makes of it; None where it does not know a part, and has no token for that."""
        try:
            return self.tokenizer.encode(text, add_special_tokens=False)
        except Exception:  # the library raises no other
            return None

    def __repr__(self) -> str:
        return f"WordTokens({self.vocabulary} tokens)"


class PretrainedTokens(Tokenizer):
    """The tokenizer of a text encoder of Hugging Face.

    Args:
        name: of it, or the path of its folder.

    Raises:
        ImportError: if `transformers` is not installed.
        ValueError: if there is none.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.tokenizer = by_transformers(name, "AutoTokenizer")

    @property
    def vocabulary(self) -> int:
        return len(self.tokenizer)

    @property
    def words(self) -> str:
        return f"hf:{self.name}"

    def numbers(self, text: str) -> list[int]:
        return [1 + number for number in self.tokenizer(text)["input_ids"]] if text else []

    def __repr__(self) -> str:
        return f"PretrainedTokens({self.name!r})"


def tokenizer_of(words: str) -> Tokenizer:
    """The tokenizer: "bytes"; "hf:NAME", that of an encoder of `transformers`; or the JSON text of one of `tokenizers`.

    Raises:
        ImportError: if that is not installed, and is needed.
        ValueError: if the text is neither.
    """
    if words.startswith("hf:"):
        return PretrainedTokens(words.removeprefix("hf:"))
    return ByteTokens() if words == "bytes" else WordTokens(words)


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "words are taken apart by Hugging Face's tokenizers: pip install scoresde[text]; bytes need nothing"
        ) from error
    return tokenizers


def transformers() -> Any:
    """The library.

    Raises:
        ImportError: if it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "text encoders of Hugging Face need transformers: pip install scoresde[text]; a TextEncoder needs nothing"
        ) from error
    return transformers


def by_transformers(name: str, kind: str, **options: Any) -> Any:
    """What a class of `transformers` finds by a name, or in a folder, without running code of others.

    Raises:
        ImportError: if the library is not installed.
        ValueError: if it finds nothing.
    """
    made = getattr(transformers(), kind)
    try:
        return made.from_pretrained(name, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name}: {kind} of transformers finds no such thing ({' '.join(str(error).split())})"
        ) from error
