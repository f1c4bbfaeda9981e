"""Several processes: what a trainer needs of torch.distributed, and what the same is without it.

    with start() as device:          # under torchrun: joins the group, and leaves it at the end; else nothing to join
        Trainer(...).fit()

Every function here also works in a single process, where the group has one member.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from scoresde.checks import ArgumentError

__all__ = ["Voice", "agreed", "by_first", "gathered", "local", "rank", "start", "together", "total", "world"]

T = TypeVar("T")


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number in the group, from 0."""
    return dist.get_rank() if _joined() else 0


def world() -> int:
    """Processes in the group."""
    return dist.get_world_size() if _joined() else 1


@contextmanager
def start(device: torch.device | str | None = None) -> Iterator[torch.device]:
    """Join the group that torchrun's environment describes (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT),
    and leave it at the end. Without that environment, or in a group already, only the device is chosen.

    Args:
        device: "cpu" or "cuda"; by default CUDA where there is one. Process LOCAL_RANK of a machine takes its GPU of
            that number.

    Yields:
        the device of this process. The backend is NCCL on CUDA, gloo elsewhere.

    Raises:
        ValueError: if a machine has more processes than GPUs.
    """
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if chosen.type == "cuda":
        if chosen.index is None:
            if local >= torch.cuda.device_count():
                raise ArgumentError(
                    f"process {local} of this machine has no GPU: there are {torch.cuda.device_count()}; start as many "
                    "with torchrun --nproc-per-node, or take device='cpu'"
                )
            chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)
    mine = "RANK" in os.environ and "WORLD_SIZE" in os.environ and not _joined()
    if mine:
        # torch's own limit, ten minutes with NCCL, is less than the others may wait while rank 0 evaluates.
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    try:
        yield chosen
    finally:
        if mine and _joined():
            dist.destroy_process_group()


def total(x: Tensor) -> Tensor:
    """The sum of x over the processes; x itself, which is overwritten, or unchanged in a single process."""
    if world() > 1:
        dist.all_reduce(x)
    return x


def local(x: Tensor) -> Tensor:
    """This process's part of a sharded tensor, with its memory; any other tensor itself."""
    # Not isinstance(x, DTensor): importing that takes a second, and only who shards has it.
    return x.to_local() if hasattr(x, "to_local") else x


def gathered(x: Tensor) -> Tensor:
    """The whole of a sharded tensor, for which every process must call; any other tensor itself."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def by_first(work: Callable[[], T]) -> T:
    """What rank 0 makes of it, a picklable object, given to all; the others wait.

    Raises:
        RuntimeError: in the others, if rank 0 failed, with its message. Rank 0 raises what it raised.
    """
    return together(work if rank() == 0 else lambda: None)  # type: ignore[return-value]


def to_first(part: T) -> list[T] | None:
    """Every process's part, in the first; None in the others."""
    if not _joined():
        return [part]
    parts: list[Any] | None = [None] * world() if rank() == 0 else None
    dist.gather_object(part, parts)
    return parts


def together(work: Callable[[], T]) -> T:
    """What rank 0's work gives, a picklable object, given to all once every process has done its own.

    Raises:
        RuntimeError: in all, if one failed, with its message. That one raises what it raised.
    """
    if world() == 1:
        return work()
    mine: list[Any] = [None, None]
    failure: Exception | None = None
    try:
        result = work()
        mine[0] = result if rank() == 0 else None
    except Exception as error:  # for the others, who would wait for ever
        failure, mine[1] = error, f"{type(error).__name__}: {error}"
    every: list[Any] = [None] * world()
    dist.all_gather_object(every, mine)
    if failure is not None:
        raise failure
    for other, (_, message) in enumerate(every):
        if message is not None:
            raise RuntimeError(f"rank {other} failed. {message}")
    first: T = every[0][0]
    return first


def agreed(what: str, value: dict[str, Any]) -> None:
    """Check that all processes were given the same.

    Raises:
        ValueError: in all of them, naming what differs.
    """
    if world() == 1:
        return
    every: list[Any] = [None] * world()
    dist.all_gather_object(every, value)
    differing = sorted({key for other in every for key in {*other, *value} if other.get(key) != value.get(key)})
    if any(other != every[0] for other in every):
        raise ValueError(f"the processes were given different {what}: {', '.join(differing) or 'see the other ranks'}")


class Voice:
    """A vote of the hosts, beside the devices' work: reading an answer from NCCL would wait for the GPU."""

    def __init__(self) -> None:
        self._group: Any = None
        if world() > 1:
            self._group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")

    def largest(self, number: int) -> int:
        """The largest number that any process has."""
        if self._group is None:
            return number
        box = torch.tensor(number, device="cpu")
        dist.all_reduce(box, dist.ReduceOp.MAX, group=self._group)
        return int(box)
