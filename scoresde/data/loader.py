"""The batches of an order, one step after the other, the same for any number of workers.

A batch is a function of its step alone, so the sampler of torch's `DataLoader` is the sequence of steps.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from scoresde.checks import check_count, check_whole
from scoresde.data.order import Order
from scoresde.data.training import Batch, TrainingData

__all__ = ["loader"]


def loader(
    data: TrainingData,
    order: Order,
    start_step: int = 0,
    stop_step: int | None = None,
    *,
    workers: int = 2,
    prefetch: int = 2,
    pin: bool | None = None,
) -> Iterator[Batch]:
    """The batches of the steps start_step, start_step + 1, ...: forever, or up to stop_step, which is not among them.

    Args:
        data: in memory they are indexed here and now; images that are decoded when wanted, and conditions that are
            made slowly, are so by `workers`.
        order: which items; `Order.share` gives the part of a process.
        start_step: >= 0.
        stop_step: None for no end.
        workers: processes that do; 0 for none beside this one.
        prefetch: batches that each of them has ready.
        pin: page-locked memory, for copies to a GPU that do not wait; by default where there is CUDA.

    Returns:
        an iterator; `close()` ends its workers, and so does letting it go.

    Raises:
        ValueError: if the arguments do not fit; while iterating, if a file is damaged, naming it, in whichever process.

    A worker takes no notice of SIGTERM and SIGINT, which a scheduler or a terminal sends to all processes: when to stop
    is for this process to say.
    """
    if order.n != len(data):
        raise ValueError(f"the order is of {order.n} items, the data are {len(data)}")
    check_count(prefetch=prefetch)
    check_whole(workers=workers, start_step=start_step, stop_step=0 if stop_step is None else stop_step)
    steps = _Steps(data, order)
    pin = torch.cuda.is_available() if pin is None else pin
    numbers = itertools.count(start_step) if stop_step is None else range(start_step, stop_step)
    if not data.lazy or workers == 0:
        return _here(steps, numbers, pin)
    return _elsewhere(steps, numbers, workers, prefetch, pin)


@dataclass(frozen=True)
class _Steps(Dataset[Batch | ValueError]):
    """Step s's batch, or what is wrong with it: an error that crosses processes as it is."""

    data: TrainingData
    order: Order

    def __getitem__(self, step: int) -> Batch | ValueError:
        try:
            return self.data.batch(self.order.items(step), self.order.epochs(step))
        except ValueError as error:
            return error


def _here(steps: _Steps, numbers: Iterator[int] | range, pin: bool) -> Iterator[Batch]:
    for step in numbers:
        batch = _checked(steps[step])
        yield _pinned(batch) if pin and batch.x.device.type == "cpu" else batch


def _elsewhere(
    steps: _Steps, numbers: Iterator[int] | range, workers: int, prefetch: int, pin: bool
) -> Iterator[Batch]:
    batches = DataLoader(
        steps,
        batch_size=None,  # a step is a batch already
        sampler=numbers,
        num_workers=workers,
        prefetch_factor=prefetch,
        collate_fn=_as_it_is,
        pin_memory=pin,
        worker_init_fn=_ignore_signals,
        generator=torch.Generator("cpu").manual_seed(0),  # else it draws from the global one
    )
    with _blocked():  # the workers start so: a signal may come before their first line of code
        found = iter(batches)
    for batch in found:
        yield _checked(batch)


def _checked(batch: Batch | ValueError) -> Batch:
    if isinstance(batch, ValueError):
        raise batch
    return batch


def _pinned(batch: Batch) -> Batch:
    return Batch(batch.x.pin_memory(), {key: value.pin_memory() for key, value in batch.cond.items()})


def _as_it_is(batch: Any) -> Any:
    return batch


_SIGNALS = {signal.SIGTERM, signal.SIGINT}


@contextmanager
def _blocked() -> Iterator[None]:
    """With the signals of a scheduler held back, here and in the processes that are started meanwhile."""
    if not hasattr(signal, "sigwaitinfo"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ignore_signals(worker: int) -> None:
    """In a worker: SIGTERM ends it only if its parent sent it, SIGINT never.

    A handler in Python is not told the sender, so they are blocked here, and waited for in a thread.
    """
    if not hasattr(signal, "sigwaitinfo"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # of the threads to come, too

    def wait() -> None:
        while True:
            found = signal.sigwaitinfo(_SIGNALS)
            if found.si_signo == signal.SIGTERM and found.si_pid == os.getppid():
                os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
