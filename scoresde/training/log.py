"""What a run says of itself: a CSV file, TensorBoard's files, a progress bar."""

from __future__ import annotations

import csv
import io
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import mode
from typing import Any

from tqdm.auto import tqdm

from scoresde.files import write_whole, writing
from scoresde.training.config import TrainConfig

__all__ = ["COLUMNS", "Log", "Rate", "Reports", "TensorBoard", "check_tensorboard", "duration"]

COLUMNS = ("step", "epoch", "loss", "lr", "gradient_norm", "items_per_second", "seconds")


class Reports:
    """All that a run says while it trains: rows in log.csv and TensorBoard; and on stderr a bar with the rate of the
    last seconds and, once, how long the rest takes.

    Args:
        config: of the run.
        step: where it goes on.
        folder: of the run, or None for no files.
        progress: whether there is a bar.
        clock: seconds.
    """

    def __init__(
        self,
        config: TrainConfig,
        step: int,
        folder: Path | None,
        progress: bool,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._config, self._step, self._progress = config, step, progress
        self._log = self._board = None
        if folder is not None and step < config.steps:
            self._log = Log(folder / "log.csv", step)
            if config.tensorboard:
                self._board = TensorBoard(folder / "tensorboard", step)
        self._rate = Rate(clock)
        self._bar = tqdm(total=config.steps, initial=step, desc="train", unit="step", disable=not progress)
        self._loss, self._told = "", False

    def say(self, text: str) -> None:
        """A remark, above the bar."""
        if self._progress:
            tqdm.write(f"train: {text}", file=sys.stderr)

    def step(self) -> None:
        """One more is done."""
        self._step += 1
        self._rate.add()
        if not self._progress:
            return
        seconds, left = self._rate.seconds, self._config.steps - self._step
        if not self._told and self._rate.settled and left:
            self._told = True
            rest = f"about {duration(seconds * left)} for the {left} left, evaluations apart"
            self.say(f"{seconds:.3g} s a step, {rest}")
        if seconds:
            speed = self._config.batch_size / seconds
            self._bar.set_postfix_str(f"{self._loss}items={speed:.0f}/s", refresh=False)
        self._bar.update()

    def row(self, row: Mapping[str, float]) -> None:
        """Numbers of this step."""
        self._loss = f"loss={row['loss']:.4f}, " if "loss" in row else self._loss
        for writer in (self._log, self._board):
            if writer is not None:
                writer.add({"step": self._step, **row})

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is not training."""
        yield
        self._rate.restart()

    def close(self) -> None:
        """The end."""
        self._bar.close()
        if self._board is not None:
            self._board.close()


class Rate:
    """Seconds of a step, over the last seconds.

    Args:
        clock: seconds.
        window: that many, or the last step if that took longer.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter, window: float = 10.0) -> None:
        self._clock, self._window = clock, window
        self.restart()

    def restart(self) -> None:
        """Steps begin now."""
        self._times = deque([self._clock()])
        self._begin, self._steps = self._times[0], 0

    def add(self) -> None:
        """A step has ended."""
        self._times.append(now := self._clock())
        self._steps += 1
        while len(self._times) > 2 and self._times[1] <= now - self._window:
            self._times.popleft()

    @property
    def seconds(self) -> float:
        """Of a step; 0 before the first."""
        return (self._times[-1] - self._times[0]) / max(1, len(self._times) - 1)

    @property
    def settled(self) -> bool:
        """Whether it says something: three steps and the window are over."""
        return self._steps >= 3 and self._times[-1] - self._begin >= self._window


def duration(seconds: float) -> str:
    """In words, of two units at most.

    >>> duration(47.2), duration(780), duration(10500), duration(9e5)
    ('47 s', '13 min', '2 h 55 min', '10 d 10 h')
    """
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


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
    n = mode(len(line) for line in lines or [head])  # the names may be what is damaged
    names = (head + [""] * n)[:n]
    more = [name or f"column {i}" for i, name in enumerate(names[len(COLUMNS) :], len(COLUMNS) + 1)]
    columns = [*COLUMNS, *more]  # whose places are known, whatever became of their names
    rows = {i: dict(zip(columns, line, strict=True)) for i, line in enumerate(lines, 2) if _whole(line, len(columns))}
    damaged = [str(i) for i in range(2, len(lines) + 2) if i not in rows]
    if lines and (len(head) != n or head[: len(COLUMNS)] != list(COLUMNS)):
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
