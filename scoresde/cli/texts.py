"""What samples are to show, in words: --text and --negative."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from scoresde.cli.options import Options, option
from scoresde.data import nothing
from scoresde.denoiser import Denoiser
from scoresde.networks import networks

__all__ = ["Texts", "null_of_run"]


@dataclass(frozen=True, kw_only=True)
class Texts(Options):
    """The condition `text` of samples.

    Raises:
        ValueError: if there is a negative text, and none.
    """

    texts: list[str] = option(
        "what a sample is to show, in words, of a run of `scoresde train --captions`; several, each after a --text of "
        "its own, for samples in turn", metavar="TEXT", flags=("--text",), dest="text", action="append")  # fmt: skip
    negative: str | None = option("what it is not to show: told D_0 of --guidance, in place of nothing", metavar="TEXT",
        flags=("--negative",))  # fmt: skip

    def __post_init__(self) -> None:
        if self.texts is None and self.negative is not None:
            raise ValueError("--negative says what --text is guided away from: give that, too")

    def check(self, denoiser: Denoiser, guided: bool) -> None:
        """Raises ValueError unless the model reads texts, and a negative one is used."""
        if not any("text" in getattr(net, "condition_sizes", {}) for net in networks(denoiser)):
            raise ValueError(f"--text {self.texts[0]!r}: the model reads none (`scoresde train --captions` makes one)")
        if self.negative is not None and not guided:
            raise ValueError("--negative is for --guidance W: give that, too")

    def cond(self, items: range) -> dict[str, list[str]]:
        """The texts of these samples."""
        return {"text": [self.texts[i % len(self.texts)] for i in items]}


def null_of_run(cond: Mapping[str, Any], num_classes: int | None, texts: Texts | None) -> dict[str, Any]:
    """What tells a network nothing of these conditions, each being one value throughout; but the negative text."""
    null: dict[str, Any] = {
        key: value.flatten()[0].item() if isinstance(value, Tensor) else ""
        for key, value in nothing(cond, num_classes).items()
    }
    return null if texts is None or texts.negative is None else {**null, "text": texts.negative}
