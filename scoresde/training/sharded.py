"""Networks that do not fit into one process: FSDP2, `torch.distributed.fsdp.fully_shard`.

Of each tensor every process holds a part of its rows: of the weights, their gradients, the optimiser's state and the
averages, 20 bytes for a weight and 4 more for each further average, divided by the number of processes. A unit, which
is an entry of an `nn.ModuleList` (a residual block, a transformer's block), is gathered when it computes, one after the
other, and what is in none of them with the network itself. The network is made by each process in main memory, as rank
0 draws it, and only its shards go to the GPU, if it was left there. Each process writes its own part of a checkpoint,
into a run folder that all must see.

With bfloat16, weights are gathered and computed with in bfloat16 under autocast; shards, the sum of the gradients over
the processes, the loss, the optimiser and the averages stay in the network's own precision.

Limits: units must be called, not only reached into; a weight is tied to others of its own unit only and has at least
one axis; buffers that training changes (batch norm's) are in a checkpoint as one of the processes has them. Between the
parts of a batch (accumulate) the gradient is held whole, so as to be sent once. Weights are laid out contiguously, also
where channels_last was asked for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from scoresde.training import parallel, shard_files
from scoresde.training.average import local_tensors, tensors
from scoresde.training.folder import SHARDED
from scoresde.training.layout import Layout

__all__ = ["Shards", "units"]


def units(net: nn.Module) -> list[nn.Module]:
    """What is gathered as one: the innermost entries of module lists that have weights."""
    containers = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)  # these are not called
    entries = [
        entry
        for module in net.modules()
        if isinstance(module, nn.ModuleList)
        for entry in module
        if not isinstance(entry, containers) and any(True for _ in entry.parameters())
    ]
    chosen = dict.fromkeys(entries)
    return [entry for entry in chosen if not any(m in chosen for m in entry.modules() if m is not entry)]


class Shards(Layout):
    """Every process has its shards.

    Args:
        precision: "float32", the network's own, or "bfloat16".
    """

    format = SHARDED

    def __init__(self, precision: str) -> None:
        kind = "cuda" if "nccl" in str(dist.get_backend()) else "cpu"
        self._mesh = init_device_mesh(kind, (parallel.world(),))
        self._policy = MixedPrecisionPolicy()
        if precision == "bfloat16":
            # Autocast casts what goes into each layer: casting inputs here would round the time label.
            self._policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        # Of the hosts, and for checkpoints alone: those in the background must not mix with training's messages.
        self._hosts = dist.new_group(backend="gloo")

    def place(self, net: nn.Module) -> None:
        for x in tensors(net):
            x.data = x.data.contiguous()
            dist.broadcast(x.data, 0, group=self._hosts if x.device.type == "cpu" else None)
        self._bare = _rebuilt(net, (torch.empty_like(x, device="meta") for x in tensors(net)))
        self._shard(net)

    def _shard(self, net: nn.Module) -> None:
        for module in [*units(net), net]:
            # The root too is sharded again after its forward, so that outside of one there are shards only.
            fully_shard(module, mesh=self._mesh, reshard_after_forward=True, mp_policy=self._policy)
        for name in ("both", "encode"):  # a head's network is called by the one, an `Encoding` by the other
            if hasattr(net, name):
                register_fsdp_forward_method(net, name)

    def twin(self, net: nn.Module) -> nn.Module:
        found = _rebuilt(self._bare, (torch.empty_like(x, device="cpu") for x in tensors(self._bare)))
        self._shard(found)
        with torch.no_grad():
            for mine, theirs in zip(local_tensors(found), local_tensors(net), strict=True):
                mine.copy_(theirs)
        return found

    @torch.no_grad()
    def whole(self, net: nn.Module) -> nn.Module:
        return _rebuilt(self._bare, (parallel.gathered(x).detach().clone() for x in tensors(net)))

    @contextmanager
    def lent(self, net: nn.Module, average: nn.Module) -> Iterator[nn.Module]:
        """A copy: rank 0 could not use the sharded one without the others."""
        yield self.whole(average).eval().requires_grad_(False)

    def compiled(self, net: nn.Module, backend: str) -> nn.Module:
        """Unit by unit, in place: what gathers them is not for a compiler."""
        for module in units(net) or [net]:
            module.compile(backend=backend)
        return net

    def worker(self, worker: nn.Module) -> nn.Module:
        return worker

    @contextmanager
    def quiet(self, worker: nn.Module) -> Iterator[None]:
        roots = [module for module in worker.modules() if isinstance(module, FSDPModule)][:1]
        for root in roots:
            root.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            for root in roots:
                root.set_requires_gradient_sync(True)

    def store(
        self,
        folder: Path,
        networks: Mapping[str, nn.Module],
        optimiser: torch.optim.Optimizer,
        background: bool,
    ) -> Callable[[], list[str]]:
        return shard_files.write(folder, networks, optimiser, self._hosts, background)


def _rebuilt(net: nn.Module, values: Iterable[Tensor]) -> nn.Module:
    """A copy of a network that is not sharded, with these parameters and buffers in place of its own."""
    memo: dict[int, object] = {}
    for old, new in zip(tensors(net), values, strict=True):
        memo[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    return copy.deepcopy(net, memo)
