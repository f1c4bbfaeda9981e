"""Captions: texts that say what is in an image, one or several for each, from a list or a file beside the images.

    captions.txt      a line for each image, in the order of their names; or NAME, a tab and the caption
    captions.csv      with a head: the columns file_name (or image, file) and text (or caption)
    captions.jsonl    a line {"file_name": ..., "text": ...} for each, likewise: Hugging Face's metadata.jsonl

Where files are named, an image may have several captions, each in a line of its own, and one is shown in every epoch;
an image without one is an error, and so is a caption of no image.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scoresde.checks import ArgumentError
from scoresde.data.conditions import Condition, same_number
from scoresde.data.shown import Shown, picked
from scoresde.errors import some
from scoresde.nn.tokens import ByteTokens, Tokenizer

__all__ = ["CAPTION_FILES", "Captions", "read_captions"]

CAPTION_FILES = ("captions.jsonl", "captions.csv", "captions.txt", "metadata.jsonl", "metadata.csv")
"""Where an image folder has its captions, if nothing else is said: the first of these that is there."""

_NAMES, _TEXTS = ("file_name", "image", "file", "name"), ("text", "caption", "captions")
_SIDES = re.compile(r"\b(left|right)\b", re.IGNORECASE)


class Captions(Condition):
    """The text of each item, as tokens (`scoresde.nn.tokens`), for a `TextEncoder` in `scoresde.nn.Encoding`: what a
    network is told is {"text": tokens (B, length)}.

    The empty text is nothing, and what `TrainingData(drop=)` tells of items that are dropped.

    Args:
        texts: a text for each item, or several, of which a random one is shown in every epoch.
        tokenizer: of texts.
        length: the most tokens that one has, by default as many as the longest here: `length` of the encoder.
        names: of the items' files, where they are files.

    Raises:
        TypeError: if an item has no text.
        ValueError: if a text is longer, or has an unknown word; if there are not as many names.

    >>> Captions(["a three", "a dark seven"])
    Captions(2 of up to 12 tokens, ByteTokens())
    """

    def __init__(
        self,
        texts: Sequence[str | Sequence[str]],
        tokenizer: Tokenizer | None = None,
        length: int | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        self.texts = [(text,) if isinstance(text, str) else tuple(text) for text in texts]
        if bad := [i for i, own in enumerate(self.texts) if not own or not all(isinstance(t, str) for t in own)]:
            raise TypeError(f"items {some(bad)} have no text: expected a string, or several, for each")
        self.names = None if names is None else list(names)
        if self.names is not None and len(self.names) != len(self):
            raise ArgumentError(f"names={len(self.names)} of them: there are texts for {len(self)} items")
        self.tokenizer = ByteTokens() if tokenizer is None else tokenizer
        self._tokens = self.tokenizer([text for own in self.texts for text in own], length)
        self._first = torch.tensor([0, *(len(own) for own in self.texts)], device="cpu").cumsum(0)

    @property
    def length(self) -> int:
        """The most tokens that a text may have."""
        return self._tokens.shape[1]

    def __len__(self) -> int:
        return len(self.texts)

    def __repr__(self) -> str:
        return f"Captions({len(self)} of up to {self.length} tokens, {self.tokenizer!r})"

    @property
    def key(self) -> str:
        return "text"

    @property
    def fingerprint(self) -> str:
        return f"{self!r}, sha256 {hashlib.sha256(json.dumps(self.texts).encode()).hexdigest()[:12]}"

    def channels(self, shape: Sequence[int]) -> int:
        """The most tokens of a text."""
        return self.length

    def check(self, shape: Sequence[int], n: int) -> None:
        if len(self) != n:
            raise ValueError(f"{self!r} has texts for {len(self)} items, and there are {n}: give one for each")

    def __call__(self, x: Tensor, shown: Shown) -> Tensor:
        same_number(x, shown)
        first = self._first[shown.items]
        which = first + picked(shown, self._first[shown.items + 1] - first)
        return self._tokens.index_select(0, which).to(x.device)

    def taken(self, y: Tensor, shape: Sequence[int]) -> Tensor:
        return y

    @property
    def sides(self) -> str | None:
        """A text that speaks of left or right, and would be wrong of a mirrored image; None where there is none."""
        return next((text for texts in self.texts for text in texts if _SIDES.search(text)), None)

    def without(self, names: Collection[str]) -> Captions:
        own, gone = self.names or [], set(names)
        stems = {Path(name).with_suffix("") for name in gone.difference(own)}
        kept = [i for i, name in enumerate(own) if name not in gone and Path(name).with_suffix("") not in stems]
        return self if self.names is None else self._some(kept)

    def first(self, n: int) -> Captions:
        return self._some(range(len(self))[:n])

    def _some(self, kept: Sequence[int]) -> Captions:
        names = None if self.names is None else [self.names[i] for i in kept]
        return Captions([self.texts[i] for i in kept], self.tokenizer, self.length, names)


def read_captions(path: str | Path, names: Sequence[str] | None = None) -> list[tuple[str, ...]]:
    """The captions of a file, one or several for each item.

    Args:
        path: of the file; or of a folder that has one, of the names in `CAPTION_FILES`.
        names: of the items' files, within their folder; None where they are no files, and the captions are in order.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it cannot be read; if a file has no caption, or a caption no file, naming them.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in CAPTION_FILES if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{path} has no captions: expected a file {', '.join(CAPTION_FILES)}")
        path = found[0]
    try:
        rows = _READERS[path.suffix.lower()](path.read_text("utf-8-sig"))
    except KeyError as error:
        raise ArgumentError(f"{path}: expected captions as .txt, .csv or .jsonl") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not rows:
        raise ValueError(f"{path} has no captions")
    named = [name for name, _ in rows if name is not None]
    if not named or names is None:
        if names is not None and len(rows) != len(names):
            raise ValueError(f"{path} has {len(rows)} captions without names for {len(names)} files: give one for each")
        return [(text,) for _, text in rows]
    return _matched(path, rows, names)


def _matched(path: Path, rows: Sequence[tuple[str | None, str]], names: Sequence[str]) -> list[tuple[str, ...]]:
    texts: dict[str, list[str]] = {Path(name).as_posix(): [] for name in names}
    lost = []
    for name, text in rows:
        if name is None or Path(name).as_posix() not in texts:
            lost.append(name or text)
        else:
            texts[Path(name).as_posix()].append(text)
    if silent := [name for name, found in texts.items() if not found]:
        raise ValueError(f"{path} has no caption of {_few(silent)}")
    if lost:
        raise ValueError(f"{path} has captions of {_few(lost)}: there is no such file")
    return [tuple(found) for found in texts.values()]


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _lines(text: str) -> list[tuple[str | None, str]]:
    """A caption a line, with a name before a tab where every line has one. An empty line is an empty caption."""
    lines = text.splitlines()
    if lines and all("\t" in line for line in lines):
        return [(name, caption.strip()) for name, _, caption in (line.partition("\t") for line in lines)]
    return [(None, line.strip()) for line in lines]


def _table(text: str) -> list[tuple[str | None, str]]:
    return _records(list(csv.DictReader(io.StringIO(text, newline=""))))


def _json_lines(text: str) -> list[tuple[str | None, str]]:
    return _records([json.loads(line) for line in text.splitlines() if line.strip()])


def _records(rows: Sequence[Any]) -> list[tuple[str | None, str]]:
    """Of each row its name, if it has one, and its text or texts."""
    found: list[tuple[str | None, str]] = []
    for i, row in enumerate(rows):
        keys = row.keys() if isinstance(row, dict) else ()
        column = next((key for key in _TEXTS if key in keys), None)
        if column is None:
            raise ValueError(f"row {i + 1} has no column {' or '.join(_TEXTS)}")
        name = next((row[key] for key in _NAMES if key in keys), None)
        for text in row[column] if isinstance(row[column], list) and name is not None else [row[column]]:
            if not isinstance(text, str):
                raise ValueError(f"row {i + 1} has {text!r} for a text")
            found.append((name, text.strip()))
    return found


_READERS = {".txt": _lines, ".csv": _table, ".jsonl": _json_lines}
