"""A table's loop as one CUDA graph: recorded once, then launched as a whole, so that the host has nothing to do between
the kernels of a run. It can be, for the loop branches on no value of the device and copies nothing to it.

What a graph reads stands in memory of its own: x_T, the conditions, the noise. A run copies them there, launches the
graph and copies the result out. Weights are read where they are, so that those changed in place are seen.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree  # private by its name alone: torch's own interfaces are made of it

from scoresde.checks import ArgumentError
from scoresde.denoiser import Denoiser
from scoresde.grid import Grid
from scoresde.networks import Holder
from scoresde.noise import CounterNoise, Noise, NoiseSource
from scoresde.solvers.base import SameTable, Solver
from scoresde.solvers.kept import ready
from scoresde.solvers.parallel import Parallel
from scoresde.tableau import Ready, State

__all__ = ["Captured"]

_MOST = 8  # graphs that one solver keeps: each holds the memory of a run


@dataclass(frozen=True)
class Captured(SameTable):
    """A solver with a table whose run is one CUDA graph: the samples of the solver itself, in less time where the
    network is small for its GPU, so that launching its kernels takes longer than running them.

    A graph belongs to a table, to the shape and dtype of x, to those of the conditions, and to the denoiser and its
    parameters; the first run with others warms up on a side stream and records one, which takes as long as a few plain
    runs, and the 8 that were used last are kept, each with the memory of a run. Use one instance for all runs:

        solver = Captured(UniPC(3))
        for seed in range(100):
            x = sample(denoiser, (64, 3, 32, 32), solver, steps=10, seed=seed).x

    Weights that are changed in place (`load_state_dict`, an optimiser's step) are seen by the next run; where a
    parameter or buffer is replaced (`net.to(dtype)`), a module's training mode, or an option of the denoiser that is a
    number, a tensor or a function changes, a new graph is recorded. Other attributes of a network are as they were at
    the recording, and so are numbers that its own code reads from the host: make a new `Captured` after changing them.

    The noise of a stochastic table is drawn beforehand, all rows of it, and kept; with `CounterNoise` it is drawn in
    the graph, from seeds that are its input, and takes no memory.

    The run is one piece: `iterate` shows its end alone, one `State` of the last row. `sample` with trajectory=True, and
    `Replacement`, which changes states on the way, run the solver itself (`by_rows`), as does the replay that says
    where a run became non-finite; a driver of your own that looks at states or changes them does likewise. So does
    every run on another device than a GPU (on a CPU there are no graphs: it is the plain loop), and one that records
    gradients.

    Args:
        solver: one with a table.

    Raises:
        TypeError: if it is no solver.
        ValueError: if it has no table, as an adaptive one, or is a `Parallel`; by the run, on a GPU, if a tensor among
            the conditions is not on the GPU (a graph would keep its number for good).

    >>> import scoresde
    >>> from scoresde.exact import Gaussian
    >>> from scoresde.solvers import DDIM
    >>> denoiser = Gaussian(mean=[3.0, -1.0], std=0.5).denoiser(scoresde.VPSDE())
    >>> plain, captured = (scoresde.sample(denoiser, (4, 2), s, steps=5, seed=0).x for s in (DDIM(), Captured(DDIM())))
    >>> torch.equal(plain, captured)
    True
    """

    masks: ClassVar[bool] = True

    solver: Solver
    _kept: OrderedDict[Hashable, _Recorded] = field(default_factory=OrderedDict, init=False, repr=False, compare=False)
    _lock: Any = field(default_factory=Lock, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.solver, Solver):
            raise TypeError(f"Captured wraps a solver, DDIM() say, not {self.solver!r}")
        if not self.solver.has_table:
            why = "it is adaptive, and chooses its steps" if self.solver.adaptive else "its coefficients depend"
            on = "by" if self.solver.adaptive else "on"
            raise ArgumentError(
                f"{self.solver!r} cannot be captured: {why} {on} the states that it meets. Take a solver with a table, "
                "UniPC() say"
            )
        check_straight(self.solver)

    @property
    def by_rows(self) -> Solver:
        return self.solver.by_rows

    def frozen_state(self) -> dict[str, Any]:
        """What grids and tables are made of (`scoresde.tensors.frozen`): the graphs have no part in them."""
        return {"solver": self.solver}

    def __getstate__(self) -> dict[str, Any]:
        """A copy, in this process or another, records graphs of its own."""
        return {"solver": self.solver}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in {**state, "_kept": OrderedDict(), "_lock": Lock()}.items():
            object.__setattr__(self, name, value)

    def loop(
        self, denoiser: Denoiser, x: Tensor, grid: Grid, noise: NoiseSource | None, cond: dict[str, Any]
    ) -> Iterator[State]:
        plain = self.solver.loop(denoiser, x, grid, noise, cond)  # which refuses what cannot be run
        if torch.is_grad_enabled() or not recordable(x):
            return plain
        return self._run(ready(self.solver, self.solver.tableau, grid, denoiser, x.dtype), denoiser, x, noise, cond)

    def _run(
        self, rows: Ready, denoiser: Denoiser, x: Tensor, noise: NoiseSource | None, cond: dict[str, Any]
    ) -> Iterator[State]:
        counter = (noise.stream, noise.drawn) if rows.draws and isinstance(noise, CounterNoise) else None
        drawn = _drawn(rows, x, noise)
        leaves, spec = pytree.tree_flatten(cond)
        given = [x, *([] if drawn is None else [drawn]), *(leaf for leaf in leaves if isinstance(leaf, Tensor))]
        if any(tensor.device != x.device for tensor in given):
            where = sorted({str(tensor.device) for tensor in given} - {str(x.device)})
            raise ValueError(f"Captured: conditions on {where} for x on {x.device}: move them there, x's device, first")
        key = (
            id(denoiser),
            tuple(rows.rows),
            tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in given),
            tuple(None if isinstance(leaf, Tensor) else _constant(leaf) for leaf in leaves),
            str(spec),
            counter,
            (autocast := _autocast(x.device)),
        )
        state = _state(denoiser)
        with self._lock:
            kept = self._kept.pop(key, None)
            if kept is None or kept.state != state.key:
                del kept  # its memory is free before the next is recorded
                while len(self._kept) >= _MOST:
                    self._kept.popitem(last=False)
                with torch.inference_mode(False), torch.no_grad():
                    kept = _record(rows, denoiser, given, counter, (leaves, spec), state, autocast)
            self._kept[key] = kept
            with torch.inference_mode(False), torch.no_grad():
                end = kept.launch(given)
        last = len(rows) - 1
        yield State(last, sum(row.n is not None for row in rows.rows), rows.steps[last], True, rows.rows[last].t, end)


def check_straight(solver: Solver) -> None:
    """Raises ValueError if a solver with a table does not run it row by row: `Parallel` stops by what it finds."""
    if isinstance(solver, Parallel):
        raise ArgumentError(
            f"{solver!r} stops by the states that it meets, so take the solver in it: {solver.solver!r}"
        )


def recordable(x: Tensor) -> bool:
    """Whether a run from x can be recorded: it is on a GPU, and none is being recorded or traced around it."""
    return (
        x.device.type == "cuda" and not torch.compiler.is_compiling() and not torch.cuda.is_current_stream_capturing()
    )


class _Held(NamedTuple):
    key: Hashable
    objects: list[Any]  # held, so that no other gets their ids


class _Recorded(NamedTuple):
    state: Hashable
    launch: Callable[[list[Tensor]], Tensor]
    held: Any


def _record(
    rows: Ready,
    denoiser: Denoiser,
    given: list[Tensor],
    counter: tuple[int, int] | None,
    cond: tuple[list[Any], Any],
    state: _Held,
    autocast: torch.dtype | None,
) -> _Recorded:
    """The graph of a run on inputs of the kind of those given."""
    inputs, x = [tensor.clone() for tensor in given], given[0]
    leaves, spec = cond
    rest = iter(inputs[1 + bool(rows.draws) :])
    own = pytree.tree_unflatten([next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)
    output, order = rows.output(denoiser), {row: k for k, row in enumerate(rows.draws)}

    def draws() -> Noise | None:
        if not order:
            return None
        if counter is not None:
            return CounterNoise.keyed(inputs[1], *counter)
        return lambda row, x: inputs[1][order[row]]

    def run() -> Tensor:
        # Without the cache of cast weights: a graph would read the weights that it held.
        casts = nullcontext() if autocast is None else torch.autocast(x.device.type, autocast, cache_enabled=False)
        with casts:
            *_, end = rows.loop(output, inputs[0], draws(), own)
        return end.x

    launch = recorded(run, x.device)

    def on(values: list[Tensor]) -> Tensor:
        return launch(lambda: [mine.copy_(value) for mine, value in zip(inputs, values, strict=True)])

    return _Recorded(state.key, on, (denoiser, state.objects))


def recorded(run: Callable[[], Tensor], device: torch.device) -> Callable[[Callable[[], Any]], Tensor]:
    """run() as a CUDA graph: a function of what fills its inputs, which returns a copy of its result."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.device(device):
        with torch.cuda.stream(side):
            run()  # libraries make their handles, and choose their kernels, at the first call
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may use the GPU
            result = run()
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(device))

    def launch(fill: Callable[[], Any]) -> Tensor:
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device)
            stream.wait_event(done)  # of the run before, which may be another stream's
            fill()
            graph.replay()
            copy = result.clone()
            done.record(stream)
        return copy

    return launch


def _drawn(rows: Ready, x: Tensor, noise: NoiseSource | None) -> Tensor | None:
    """What the graph draws of: seeds, or all noise, (K, B, ...)."""
    if not rows.draws or noise is None:
        return None
    if isinstance(noise, CounterNoise):
        return noise.ahead(x, len(rows.draws))
    z = x.new_empty(len(rows.draws), *x.shape)
    for k, row in enumerate(rows.draws):
        z[k] = noise(row, x)
    return z


def _constant(leaf: Any) -> Hashable:
    """What a condition that is no tensor adds to the key.

    Raises:
        TypeError: if it cannot be told from another.
    """
    try:
        hash(leaf)
    except TypeError:
        raise TypeError(f"Captured: a condition is {type(leaf).__name__}, which cannot be told from another") from None
    return type(leaf), leaf


def _autocast(device: torch.device) -> torch.dtype | None:
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _state(value: object) -> _Held:
    """A key that is another once the denoiser, its networks' parameters, or options that are numbers, tensors or
    functions have been replaced; of a network's parameters only what is done in place leaves it the same.
    """
    held: list[Any] = []

    def of(value: Any) -> Hashable:
        if isinstance(value, torch.nn.Module):
            tensors = [*value.parameters(), *value.buffers()]
            held.extend(tensors)
            modes = tuple(module.training for module in value.modules())
            return id(value), modes, tuple((id(t), t.data_ptr(), t.dtype, t.shape) for t in tensors)
        if isinstance(value, Holder):
            return type(value), tuple((name, of(own)) for name, own in vars(value).items())
        if isinstance(value, list | tuple):
            return type(value), tuple(map(of, value))
        if isinstance(value, Mapping):
            return type(value), tuple((str(name), of(own)) for name, own in value.items())
        if isinstance(value, int | float | str | type(None) | torch.dtype | torch.device):
            return type(value), value
        held.append(value)
        return id(value), value._version if isinstance(value, Tensor) and not value.is_inference() else None

    return _Held(of(value), held)
