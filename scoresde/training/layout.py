"""Where a run's tensors are: whole in every process, or sharded over them. The trainer does not know which; a `Layout`
makes what differs.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from scoresde.training import parallel, whole_files
from scoresde.training.average import in_place_of
from scoresde.training.folder import WHOLE

__all__ = ["Copies", "Layout"]


class Layout(ABC):
    """Whole or sharded. Every process calls the same methods in the same order.

    Attributes:
        format: of the checkpoints.
    """

    format: str

    @abstractmethod
    def place(self, net: nn.Module) -> None:
        """Lay a network out, in place; once, before an optimiser takes its parameters."""

    @abstractmethod
    def twin(self, net: nn.Module) -> nn.Module:
        """A copy that is laid out in the same way."""

    @abstractmethod
    def whole(self, net: nn.Module) -> nn.Module:
        """A copy that each process can use alone."""

    @abstractmethod
    def lent(self, net: nn.Module, average: nn.Module) -> AbstractContextManager[nn.Module]:
        """A network in eval mode with the average's weights, which rank 0 can use alone for a while."""

    @abstractmethod
    def compiled(self, net: nn.Module, backend: str) -> nn.Module:
        """The network by torch.compile."""

    @abstractmethod
    def worker(self, worker: nn.Module) -> nn.Module:
        """A module that returns the loss, such that its backward leaves the mean gradient over the processes."""

    @abstractmethod
    def quiet(self, worker: nn.Module) -> AbstractContextManager[None]:
        """Inside, a backward only adds to what the process has, and nothing is sent."""

    @abstractmethod
    def store(
        self,
        folder: Path,
        networks: Mapping[str, nn.Module],
        optimiser: torch.optim.Optimizer,
        background: bool,
    ) -> Callable[[], list[str]]:
        """Write networks by name, of which the first is the optimiser's, and the optimiser's state.

        Args:
            folder: where to; it exists.
            networks: file name -> network.
            optimiser: of the first.
            background: if so, everything is copied now, and training may go on.

        Returns:
            what remains to be done, in each process, in a thread where that is wanted. In rank 0 it gives the names of
            all files, once all are on the disk.
        """


class Copies(Layout):
    """Every process has everything; gradients go through DistributedDataParallel."""

    format = WHOLE

    def place(self, net: nn.Module) -> None:
        pass

    def twin(self, net: nn.Module) -> nn.Module:
        return copy.deepcopy(net)

    def whole(self, net: nn.Module) -> nn.Module:
        return copy.deepcopy(net)

    @contextmanager
    def lent(self, net: nn.Module, average: nn.Module) -> Iterator[nn.Module]:
        with in_place_of(net, average):
            yield net

    def compiled(self, net: nn.Module, backend: str) -> nn.Module:
        found: nn.Module = torch.compile(net, backend=backend)  # type: ignore[assignment]
        return found

    def worker(self, worker: nn.Module) -> nn.Module:
        return DistributedDataParallel(worker) if parallel.world() > 1 else worker

    def quiet(self, worker: nn.Module) -> AbstractContextManager[None]:
        found: AbstractContextManager[None] = nullcontext()
        return worker.no_sync() if isinstance(worker, DistributedDataParallel) else found

    def store(
        self,
        folder: Path,
        networks: Mapping[str, nn.Module],
        optimiser: torch.optim.Optimizer,
        background: bool,
    ) -> Callable[[], list[str]]:
        """By rank 0."""
        return whole_files.write(folder, networks, optimiser, background) if parallel.rank() == 0 else list
