"""Finished parts of a long computation, in a file that a killed run goes on from."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

from scoresde.cli.common import without_nan

__all__ = ["Cells"]


class Cells:
    """Finished parts, records by a key, in a file of JSON lines, the first of which says what they are good for.

    A line that was being written when the run was killed is dropped: it has no end.

    Args:
        path: the file; written with the first record.
        command: whose it is, "likelihood" say.
        parts: what the records are called.
        made_for: what they depend on.
        key: of a record; it raises ValueError, TypeError or KeyError on what is none.
        fresh: forget the file.

    Attributes:
        done: record by key.

    Raises:
        ValueError: if the file is damaged, is another file, or was made for something else; the message names it, and
            each difference.
    """

    def __init__(
        self,
        path: Path,
        command: str,
        parts: str,
        made_for: dict[str, Any],
        key: Callable[[dict[str, Any]], Hashable],
        fresh: bool = False,
    ) -> None:
        self.path, self.made_for = path, json.loads(json.dumps(made_for))
        self.command, self.parts, self.key = command, parts, key
        self.format = f"scoresde-{command}-1"
        self.done: dict[Hashable, dict[str, Any]] = {}
        if fresh:
            path.unlink(missing_ok=True)
        if not path.exists():
            return
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        head, *lines = whole.decode(errors="replace").splitlines() or [""]
        if head or not content.startswith(b'{"format"'[: len(content)]):
            self._check(head)
        for number, line in enumerate(lines, 2):
            record = self._parse(number, line)
            self.done[self.key(record)] = record
        os.truncate(path, len(whole))

    def write(self, record: dict[str, Any]) -> None:
        """Keep a record, NaN as null."""
        record = json.loads(json.dumps(without_nan(record)))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            head = "" if file.tell() else json.dumps({"format": self.format, "made_for": self.made_for}) + "\n"
            file.write(head + json.dumps(record) + "\n")
        self.done[self.key(record)] = record

    def _check(self, line: str) -> None:
        made_for = self.made_for
        try:
            head = json.loads(line)
            known, theirs = head["format"] == self.format, dict(head["made_for"])
        except (ValueError, TypeError, KeyError):
            known, theirs = False, {}
        if not known:
            raise ValueError(
                f"{self.path} is not a file of `scoresde {self.command}`: give another --out, or remove it"
            )
        different = [
            f"{key}: {theirs.get(key, 'nothing')} in the file, {made_for.get(key, 'nothing')} now"
            for key in sorted({*theirs, *made_for})
            if theirs.get(key) != made_for.get(key)
        ]
        if different:
            raise ValueError(
                f"{self.path} holds {self.parts} of another run: {'; '.join(different)}. --fresh forgets them, another "
                "--out keeps them"
            )

    def _parse(self, number: int, line: str) -> dict[str, Any]:
        try:
            record = dict(json.loads(line))
            self.key(record)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{self.path}: line {number} is damaged; --fresh forgets the file, or remove that line"
            ) from error
        return record
