"""What a run says of itself: a CSV file, TensorBoard's files, a progress bar."""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scoresde.files import write_whole, writing

__all__ = ["COLUMNS", "Log", "TensorBoard"]

COLUMNS = ("step", "epoch", "loss", "lr", "gradient_norm", "items_per_second", "seconds")


class Log:
    """Rows of numbers by step, appended to a CSV file, a whole line at a time. A row may have columns that no earlier
    row had (metrics): then the file is written anew.

    Args:
        path: the file.
        step: where the run goes on. Later rows, written by a session that was killed before it could save, are dropped,
            and so is a line that was cut off. Of a line that is damaged otherwise, and dropped, a warning tells.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        more, rows = _read(path)
        self._columns = [*COLUMNS, *more]
        self._write([row for row in rows if int(row["step"]) <= step])

    def add(self, row: Mapping[str, float]) -> None:
        """Append a row."""
        if new := [name for name in row if name not in self._columns]:
            _, rows = _read(self.path)
            self._columns += new
            self._write(rows)
        with writing(self.path), self.path.open("a", newline="") as file:
            file.write(self._lines([row]))

    def _write(self, rows: list[dict[str, str]]) -> None:
        head = self._lines([dict(zip(self._columns, self._columns, strict=True))])
        write_whole(self.path, lambda file: file.write((head + self._lines(rows)).encode()))

    def _lines(self, rows: list[Any]) -> str:
        text = io.StringIO()
        csv.DictWriter(text, self._columns, restval="", lineterminator="\n").writerows(rows)
        return text.getvalue()


def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The columns beside `COLUMNS`, and the whole rows, of a file that may not exist."""
    text = path.read_bytes().decode(errors="replace") if path.exists() else ""
    head, *lines = map(_fields, text.split("\n")[:-1] or [""])
    more = [name or f"column {i}" for i, name in enumerate(head[len(COLUMNS) :], len(COLUMNS) + 1)]
    columns = [*COLUMNS, *more]  # whose places are known, whatever became of their names
    rows = {i: dict(zip(columns, line, strict=True)) for i, line in enumerate(lines, 2) if _whole(line, len(columns))}
    damaged = [str(i) for i in range(2, len(lines) + 2) if i not in rows]
    if lines and head[: len(COLUMNS)] != list(COLUMNS):
        damaged.insert(0, "1, the names, which were restored")
    if damaged:
        warnings.warn(f"{path} is damaged in line {', '.join(damaged)}: it goes on without", stacklevel=4)
    return more, list(rows.values())


def _fields(line: str) -> list[str]:
    try:
        return next(csv.reader([line], strict=True), [])
    except csv.Error:
        return []


def _whole(line: list[str], n: int) -> bool:
    """Whether it is a step and numbers, as many as there are columns."""
    try:
        for x in line[1:]:
            float(x or 0)
    except ValueError:
        return False
    return len(line) == n and line[0].isdecimal()


class TensorBoard:
    """The same rows as TensorBoard's scalars.

    Args:
        folder: where its files go.
        step: where the run goes on; later points are dropped.

    Raises:
        ImportError: if tensorboard is not installed.
    """

    def __init__(self, folder: Path, step: int) -> None:
        check_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def add(self, row: Mapping[str, float]) -> None:
        """Write a row."""
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        """Write what is pending."""
        self._writer.close()


def check_tensorboard() -> None:
    """Raises ImportError, saying what to install, if TensorBoard is not there."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ImportError("TrainConfig(tensorboard=True) needs tensorboard: pip install tensorboard") from error
