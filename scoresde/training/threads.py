"""CPU threads of a run: one, or all that torch would take, whichever makes the faster steps here and now.

On a busy machine, or one with a quota of its CPUs, threads wait for each other at every operation, and two may be ten
times slower than one. So a few steps are timed, once; the number is kept in the run folder and used again, because the
order of sums, and so the last bits, may depend on it.
"""

from __future__ import annotations

import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from scoresde.files import sealed, unsealed, write_whole

__all__ = ["by_default", "choose", "timed", "using"]

KEPT = "threads.json"
STEPS = 3
_AT_IMPORT = torch.get_num_threads()


def by_default() -> int | None:
    """The number of threads, if torch chose it: as many as this process has CPUs, or cores of two. None if it is the
    user's choice, by OMP_NUM_THREADS, MKL_NUM_THREADS or torch.set_num_threads.
    """
    now = torch.get_num_threads()
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    said = any(name in os.environ for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"))
    return None if said or now != _AT_IMPORT or now not in (cpus, cpus // 2) else now


def choose(
    folder: Path | None,
    trial: Callable[[], Callable[[], object]] | None,
    say: Callable[[str], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """How many threads a run takes: the user's choice; else what the folder has kept; else the faster number.

    Args:
        folder: of the run.
        trial: makes a step to time, with nothing of the run in it; None to time nothing.
        say: is told what was found, if there is one.
        clock: seconds.
    """
    most = by_default()
    if most is None or most == 1:
        return torch.get_num_threads()
    if folder is not None and (found := _kept(folder)) is not None and found <= most:
        return found
    if trial is None:
        return most
    seconds = timed(trial(), (1, most), clock)
    best = min(seconds, key=seconds.__getitem__)
    if say is not None:
        told = " and ".join(f"{value:.3g} s with {n}" for n, value in seconds.items())
        say(f"threads: a step takes about {told}, so {best} from here on")
    if folder is not None:
        text = sealed({"threads": best, "seconds": {str(n): round(s, 6) for n, s in seconds.items()}}) + "\n"
        write_whole(folder / KEPT, lambda file: file.write(text.encode()))
    return best


def timed(step: Callable[[], object], counts: tuple[int, ...], clock: Callable[[], float]) -> dict[int, float]:
    """Seconds of a step with each number of threads: the median of a few, the first of which warms up. A number that
    has taken twice as long as all steps of the one before is not tried further.
    """
    found: dict[int, float] = {}
    for n in counts:
        taken: list[float] = []
        with using(n):
            while len(taken) < STEPS and not (taken and found and sum(taken) > 2 * STEPS * min(found.values())):
                start = clock()
                step()
                taken.append(clock() - start)
        found[n] = statistics.median(taken)
    return found


@contextmanager
def using(threads: int) -> Iterator[None]:
    """Inside, torch takes so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _kept(folder: Path) -> int | None:
    path = folder / KEPT
    try:
        found = int(unsealed(path.read_text("utf-8"))[0]["threads"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        warnings.warn(f"{path} is damaged ({error}): the threads are chosen anew", stacklevel=4)
        return None
    return found if found >= 1 else None
