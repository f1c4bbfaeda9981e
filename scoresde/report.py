"""Results as they are left behind: tables, files of numbers, finished parts that a killed run goes on from; and what a
user names as MODULE:NAME to have measured.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import math
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from scoresde.checks import nearest
from scoresde.files import sealed, unsealed, write_whole

__all__ = ["Cells", "attribute", "log_ticks", "table", "theirs", "without_nan", "write_json"]


def table(head: Iterable[object], rows: Iterable[Iterable[object]]) -> list[str]:
    """The lines of a Markdown table.

    >>> print("\\n".join(table(["solver", 5, 10], [["ddim", 0.2, 0.1]])))
    | solver | 5 | 10 |
    |---|---|---|
    | ddim | 0.2 | 0.1 |
    """
    titles = list(head)
    first, *lines = ("| " + " | ".join(map(str, row)) + " |" for row in (titles, *rows))
    return [first, "|" + "---|" * len(titles), *lines]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers in [low, high], low > 0, to label a logarithmic axis with: three at least, however short it is, and
    no more than half of it without one.

    >>> log_ticks(0.5, 2000), log_ticks(1.5, 12), log_ticks(41, 57)
    ([1.0, 10.0, 100.0, 1000.0], [2.0, 5.0, 10.0], [45.0, 50.0, 55.0])
    """

    def candidates() -> Iterator[list[float]]:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for digits in ((1,), (1, 3), (1, 2, 5), range(1, 10)):
            yield [float(f"{digit}e{k}") for k in decades for digit in digits]
        whole = 10.0 ** math.ceil(math.log10(high - low))
        for step in (whole * part for part in (1, 0.5, 0.2, 0.1, 0.05, 0.02)):
            yield [float(f"{n * step:.12g}") for n in range(math.ceil(low / step), math.floor(high / step) + 1)]

    half = math.sqrt(high / low)
    for found in candidates():
        found = [tick for tick in found if low <= tick <= high]
        if len(found) >= 3 and all(b / a <= half for a, b in itertools.pairwise([low, *found, high])):
            break
    return found


def write_json(path: Path, content: Any) -> None:
    """Write it, whole or not at all; NaN as null."""
    text = json.dumps(without_nan(content), indent=1, allow_nan=False) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))


def without_nan(content: Any) -> Any:
    """NaN and infinity, which JSON has not, as null."""
    if isinstance(content, Mapping):
        return {key: without_nan(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


@contextlib.contextmanager
def theirs(what: str) -> Iterator[None]:
    """The user's own code runs. What it raises is told in a line: which error, and the last line of it that ran.

    Raises:
        ImportError: instead of one.
        ValueError: instead of any other error.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and type(error) is not SystemExit:
            raise  # not theirs: we were told to stop
        elsewhere = (str(Path(__file__).parent), "site-packages", "<frozen", sysconfig.get_paths()["stdlib"])
        lines = [
            f"{Path(frame.filename).name}, line {frame.lineno}: "
            for frame in traceback.extract_tb(error.__traceback__)
            if not any(part in frame.filename for part in elsewhere)
        ]
        kind = ImportError if isinstance(error, ImportError) else ValueError
        raise kind(f"{what}: {''.join(lines[-1:])}{type(error).__name__}: {' '.join(str(error).split())}") from error


def attribute(option: str, text: str) -> tuple[Any, ModuleType]:
    """What MODULE:NAME is, and its module; the working folder is looked in too.

    Raises:
        ImportError: if the module cannot be imported.
        ValueError: if it has no such name, or raises something else.
    """
    module_name, _, name = text.partition(":")
    if not module_name or not name:
        raise ValueError(f"{option} {text!r}: expected MODULE:NAME, my_model:denoiser say")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # a console script's path does not have it
    with theirs(f"{option} {text}"):
        module = importlib.import_module(module_name)
    if not hasattr(module, name):
        near = nearest(name, (known for known in vars(module) if not known.startswith("_")))
        raise ValueError(f"{option} {text}: {module.__name__} has no {name!r}{f': {near!r} say' if near else ''}")
    return getattr(module, name), module


class Cells:
    """Finished parts, records by a key, in a file of JSON lines, the first of which says what they are good for. Each
    has a hash of itself; those that earlier versions wrote have none.

    A line that was being written when the run was killed is dropped: it has no end.

    Args:
        path: the file; written with the first record.
        program: whose it is, "scoresde likelihood" say.
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
        program: str,
        parts: str,
        made_for: dict[str, Any],
        key: Callable[[dict[str, Any]], Hashable],
        fresh: bool = False,
    ) -> None:
        self.path, self.made_for = path, json.loads(json.dumps(made_for))
        self.program, self.parts, self.key = program, parts, key
        self.format = f"{program.replace(' ', '-')}-1"
        self.done: dict[Hashable, dict[str, Any]] = {}
        self._sealed = False
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
            head = "" if file.tell() else sealed({"format": self.format, "made_for": self.made_for}) + "\n"
            file.write(head + sealed(record) + "\n")
        self.done[self.key(record)] = record

    def _check(self, line: str) -> None:
        made_for = self.made_for
        try:
            head, self._sealed = unsealed(line)
            known = head["format"] == self.format and len(head) == 2
            theirs = dict(head["made_for"])
        except (ValueError, TypeError, KeyError):
            known, theirs = False, {}
        if not known:
            raise ValueError(f"{self.path} is not a file of `{self.program}`: give another --out, or remove it")
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
            found, whole = unsealed(line)
            if self._sealed and not whole:
                raise ValueError("it has no hash")
            record = dict(found)
            self.key(record)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{self.path}: line {number} is damaged; --fresh forgets the file, or remove that line"
            ) from error
        return record
