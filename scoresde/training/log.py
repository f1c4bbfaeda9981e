"""What a run says of itself: a CSV file, TensorBoard's files, a progress bar."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scoresde.files import write_whole

__all__ = ["COLUMNS", "Log", "TensorBoard"]

COLUMNS = ("step", "epoch", "loss", "lr", "gradient_norm", "items_per_second", "seconds")


class Log:
    """Rows of numbers by step, appended to a CSV file, a whole line at a time. A row may have columns that no earlier
    row had (metrics): then the file is written anew.

    Args:
        path: the file.
        step: where the run goes on. Later rows, written by a session that was killed before it could save, are dropped,
            and so is a line that was cut off.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        columns, rows = _read(path)
        self._columns = list(COLUMNS) + [name for name in columns if name not in COLUMNS]
        self._write([row for row in rows if int(row["step"]) <= step])

    def add(self, row: Mapping[str, float]) -> None:
        """Append a row."""
        if new := [name for name in row if name not in self._columns]:
            _, rows = _read(self.path)
            self._columns += new
            self._write(rows)
        with self.path.open("a", newline="") as file:
            file.write(self._lines([row]))

    def _write(self, rows: list[dict[str, str]]) -> None:
        head = self._lines([dict(zip(self._columns, self._columns, strict=True))])
        write_whole(self.path, lambda file: file.write((head + self._lines(rows)).encode()))

    def _lines(self, rows: list[Any]) -> str:
        text = io.StringIO()
        csv.DictWriter(text, self._columns, restval="", lineterminator="\n").writerows(rows)
        return text.getvalue()


def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and whole rows of a file that may not exist."""
    text = path.read_text() if path.exists() else ""
    reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    rows = [row for row in reader if None not in row.values() and None not in row and (row["step"] or "").isdigit()]
    return list(reader.fieldnames or []), rows


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
