"""Checkpoints, written one after the other, in the background where that is wanted."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scoresde.training import parallel
from scoresde.training.folder import begin, finish
from scoresde.training.layout import Layout

__all__ = ["Saver"]


class Saver:
    """Writes checkpoints, never two at once. Every process calls the same methods, `settle` apart.

    Args:
        layout: of what is saved.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._pending: Callable[[], Path | None] | None = None

    def start(
        self,
        folder: Path,
        step: int,
        networks: Mapping[str, nn.Module],
        optimiser: torch.optim.Optimizer,
        manifest: Mapping[str, Any],
        keep: int,
        background: bool,
    ) -> None:
        """Begin with a checkpoint, once the one before it stands; it stands after `wait`.

        Args:
            folder: of the run.
            step: of the run.
            networks: file name -> network, the optimiser's first.
            optimiser: its state is written.
            manifest: the rest of it.
            keep: how many checkpoints there are to be up to this one.
            background: whether a thread does the work, from a copy that is taken now; else `wait` does.
        """
        self.wait()
        partial = parallel.by_first(lambda: begin(folder, step))
        rest = self._layout.store(partial, networks, optimiser, background)
        whole = {"format": self._layout.format, "step": step, **manifest}
        first = parallel.rank() == 0

        def complete() -> Path | None:
            try:
                files = rest()
                return finish(partial, files, whole, keep) if first else None
            except BaseException:
                if first:
                    shutil.rmtree(partial, ignore_errors=True)
                raise

        self._pending = complete
        if background:
            # Not a daemon: at the interpreter's end it is waited for.
            executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
            self._pending = executor.submit(complete).result
            executor.shutdown(wait=False)

    def wait(self) -> Path | None:
        """Until the last checkpoint stands.

        Returns:
            its folder, or None if there was none under way.

        Raises:
            Exception: what went wrong with it; RuntimeError where that was in another process.
        """
        pending, self._pending = self._pending, None
        return None if pending is None else parallel.together(pending)

    def settle(self) -> None:
        """This process's share of what is under way, come to an end, good or bad: for when something else failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                pending()
            except Exception as error:
                warnings.warn(f"the checkpoint under way was not finished: {error}", stacklevel=2)
