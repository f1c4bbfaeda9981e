"""A sampler as one piece of tensor code: for `torch.compile`, which takes the whole of it, and for a file.

The table of a solver holds numbers known beforehand, and its loop branches on no tensor, so that grid, table, time
labels and coefficients can all be made first. What is left,

    x_{i+1} = a_i x_i + n_i N(x_i, label_i) + sum_k b_{i,k} F_{i-k} + c_i z_i,    i = 0, ..., R - 1,

N being the network, is `SamplerModule`: a module whose forward is this and nothing else. `save_sampler` writes it by
torch.export, with the weights, into one file that samples in a process without this package.

Nothing is looked at on the way: where `sample` tells of a NaN, by step, time and sample, a module returns it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from inspect import Parameter, Signature
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils import _pytree as pytree  # private by its name alone: torch's own interfaces are made of it

from scoresde.checks import ArgumentError, check_option
from scoresde.denoiser import Denoiser, check_call, check_denoiser
from scoresde.entries import counted, repeated
from scoresde.files import write_whole
from scoresde.grid import Grid
from scoresde.info import environment
from scoresde.masks import refuse_masks
from scoresde.networks import networks
from scoresde.noise import CounterNoise, Noise
from scoresde.run import check_solver, choose, process
from scoresde.solvers.base import Solver
from scoresde.solvers.captured import check_straight
from scoresde.tensors import widen

__all__ = ["SamplerModule", "save_sampler"]


_ANY = torch.export.Dim.AUTO  # of any size, if what is traced goes with any


class SamplerModule(nn.Module):
    """A sampler as a module: the loop of a table, with everything else made beforehand.

    Its results are those of `sample`, to the last bit where it runs as it is (a compiler rounds as it likes). Call it

        module(seeds)            int64 (B,), each in [0, 2^63): x_T and all z_i are drawn within, by counting; what
                                 sample(denoiser, (B, ...), solver, noise=CounterNoise(seeds)) returns
        module(x_T)              (B, ...), of a deterministic solver
        module(x_T, noise)       of a stochastic one: z, (K, B, ...), for the K rows that draw, in order, or seeds, of
                                 which they are drawn as by `CounterNoise`

    each with the conditions as further keywords, and under `torch.no_grad()` unless you want gradients. With a codec it
    returns data. A NaN is returned as it is: nothing looks for one, as `sample` does.

    The networks of the denoiser are submodules: the module is moved, cast and compiled with them. Options of the
    denoiser, a guidance's weight say, are read when it is called, and by a compiler once. Gradients by which a guidance
    steers (`Classifier`, `DPS`) are not for torch.export.

    Args:
        denoiser: the model, where it is to run.
        solver: one with a table.
        shape: (B, ...) of the states; the batch may be another in each call.
        steps, nfe, grid: exactly one of them, as for `sample`.

    Attributes:
        grid: that it steps on.
        rows: K, how many draw noise.

    Raises:
        TypeError: if denoiser or solver is none, or the solver has no table, as an adaptive one.
        ValueError: if steps, nfe and grid are not exactly one, or the denoiser cannot be evaluated on the grid; by the
            call, if x or noise has another shape, or noise is missing.

    >>> from scoresde import VPSDE, EpsDenoiser
    >>> from scoresde.solvers import DDPM
    >>> denoiser = EpsDenoiser(lambda x, t: 0.5 * x, VPSDE())
    >>> module = SamplerModule(denoiser, DDPM(), (8, 2), steps=5)
    >>> module(torch.arange(3)).shape, module.rows
    (torch.Size([3, 2]), 4)
    """

    def __init__(
        self,
        denoiser: Denoiser,
        solver: Solver,
        shape: Sequence[int],
        *,
        steps: int | None = None,
        nfe: int | None = None,
        grid: Grid | None = None,
    ) -> None:
        super().__init__()
        check_denoiser(denoiser)
        refuse_masks(denoiser, type(self).__name__)
        check_solver(solver)
        if not solver.has_table:
            raise TypeError(
                f"{solver!r} has no table: what it does depends on the states that it meets, and cannot be made "
                "beforehand. Take a solver with a table, UniPC() or DDPM() say"
            )
        check_straight(solver)
        solver, self.grid = choose(process(denoiser, solver, steps or nfe), solver, steps, nfe, grid)
        self.event, self._up = tuple(int(n) for n in shape[1:]), bool(self.grid.increasing)
        origin = CounterNoise([0], denoiser.device)
        solver.iterate(
            denoiser, torch.zeros(1, *self.event, device=denoiser.device), self.grid, origin
        )  # it may refuse
        self.networks = nn.ModuleList(networks(denoiser))
        self._ready = solver.tableau(self.grid).ready(denoiser, torch.float32)
        self._codec, self._output = denoiser.codec, self._ready.output(denoiser)
        self._order = {row: k for k, row in enumerate(self._ready.draws)}
        self._std = denoiser.sde.prior_std_at(float(self.grid.times[0]))
        self._about = f"SamplerModule({denoiser!r}, {solver!r}, {self.grid!r})"

    @property
    def rows(self) -> int:
        return len(self._order)

    def forward(self, x: Tensor, noise: Tensor | None = None, **cond: Any) -> Tensor:
        """The samples, shape (B, ...), in the dtype of x_T; of seeds float32."""
        if not x.is_floating_point():
            if noise is not None or x.ndim != 1 or self._up:
                raise ValueError("seeds are whole numbers (B,), of which all is drawn: give them alone, or x_T itself")
            source = CounterNoise.keyed(x)
            draw: Noise | None = source
            state, dtype = self._std * source.standard((x.shape[0], *self.event), torch.float32), torch.float32
        else:
            if tuple(x.shape[1:]) != self.event:
                raise ValueError(f"x has shape {tuple(x.shape)}: expected (B, ...) with {self.event} after the batch")
            state, dtype, draw = widen(x), x.dtype, self._draws(noise, x)
        if self._codec is not None and self._up:
            state = self._codec.encode(state, **cond)
        for row in self._ready.loop(self._output, state, draw, cond):  # noqa: B007
            pass
        end = row.x
        if self._codec is not None and not self._up:
            end = self._codec.decode(end, **cond)
        return end.to(dtype)

    def _draws(self, noise: Tensor | None, x: Tensor) -> Noise | None:
        """The source that `noise` is."""
        if not self._order:
            if noise is not None:
                raise ValueError("the solver draws nothing: give no noise")
            return None
        if noise is not None and noise.ndim == 1 and not noise.is_floating_point():
            return CounterNoise.keyed(noise)
        if noise is None or noise.shape[0] != self.rows or noise.shape[2:] != x.shape[1:]:
            found = "none" if noise is None else f"{noise.dtype} of shape {tuple(noise.shape)}"
            raise ValueError(
                f"noise is {found}: expected z, {(self.rows, *x.shape)}, for the rows that draw, or seeds, int64 (B,)"
            )
        return lambda row, x: noise[self._order[row]].to(x.dtype)

    def extra_repr(self) -> str:
        return self._about


def save_sampler(
    denoiser: Denoiser,
    solver: Solver,
    path: str | Path,
    *,
    shape: Sequence[int],
    steps: int | None = None,
    nfe: int | None = None,
    grid: Grid | None = None,
    cond: Mapping[str, Any] | None = None,
    takes: Literal["seeds", "noise"] = "seeds",
) -> int | None:
    """Write a sampler with its network into one file, which samples in a process without this package:

        program = torch.export.load("sampler.pt2").module()
        images = program(torch.arange(64), label=labels)          # a seed for each sample

    The file is torch.export's archive: the graph of all evaluations, one after the other, and the weights. **It is
    code**: load it from those alone whose programs you would run. It computes on the kind of device, and in the dtypes,
    that it was made with. The program returns a NaN where one arises, and looks for none.

    Args:
        denoiser, solver, steps, nfe, grid: as for `SamplerModule`.
        path: the file, which ends in .pt2; written whole or not at all.
        shape: (B, ...). B is the batch of the example that is traced. The file takes any other, from one up, unless the
            network fixes it; a warning then says so.
        cond: examples of the conditions, for B samples. Tensors become inputs by their names, of these shapes but for
            the batch; all else, numbers and texts, is what it is here for good.
        takes: "seeds": the program is program(seeds, **cond), int64 (B,): x_T and all noise are drawn within, as
            `sample(..., noise=CounterNoise(seeds))` does. "noise": program(x_T, **cond), or program(x_T, noise, **cond)
            for a stochastic solver, noise of shape (K, B, ...), standard normal.

    Returns:
        the batch that the file is fixed to, or None where it takes any.

    Raises:
        TypeError, ValueError: as `SamplerModule`; if path does not end in .pt2, or a condition is called x or noise.
    """
    check_option(("seeds", "noise"), takes=takes)
    if (path := Path(path)).suffix != ".pt2":
        raise ArgumentError(f"path={str(path)!r}: torch.export's files end in .pt2")
    module = SamplerModule(denoiser, solver, shape, steps=steps, nfe=nfe, grid=grid)
    if takes == "seeds" and module.grid.increasing:
        raise ArgumentError("takes='seeds', but the grid increases: it encodes data, so take 'noise', program(x)")
    B, cond = int(shape[0]), dict(cond or {})
    if taken := {"x", "noise"} & set(cond):
        raise ArgumentError(f"conditions called {sorted(taken)}: these are the program's own inputs; rename them")
    check_call(denoiser, torch.zeros(B, *module.event), cond)
    if B == 1:  # a batch of one is not traced as one of any size
        B, cond = 2, repeated(cond, 2, 1)
    inputs = {
        name: value for name, value in cond.items() if any(isinstance(v, Tensor) for v in pytree.tree_leaves(value))
    }
    device = denoiser.device
    args: tuple[Tensor, ...] = (torch.arange(B, device=device),)
    if takes == "noise":
        args = (torch.zeros(B, *module.event, device=device),)
        args += (torch.zeros(module.rows, *args[0].shape, device=device),) if module.rows else ()
    fixed_cond = {name: value for name, value in cond.items() if name not in inputs}
    whole = _Traced(module, fixed_cond, ["x", "noise"][: len(args)] + list(inputs))
    entries = {
        name: pytree.tree_map(lambda leaf: {0: _ANY} if counted(leaf) == B else None, value)
        for name, value in inputs.items()
    }
    sizes = {"x": {0: _ANY}, **({"noise": {1: _ANY}} if args[1:] else {}), **entries}
    with torch.no_grad():
        program = torch.export.export(whole, args, inputs, dynamic_shapes=sizes, strict=False)
    for name, value in program.state_dict.items():  # which else would record gradients
        program.state_dict[name] = nn.Parameter(value.detach(), False) if isinstance(value, nn.Parameter) else value
    batch = next(node for node in program.graph.nodes if node.name == "x").meta["val"].shape[0]
    fixed = B if statically_known_true(batch == B) else None
    if fixed is not None:
        warnings.warn(f"{path} takes batches of {B} alone: the network, traced, is of that size", stacklevel=2)
    about = {
        "format": "scoresde sampler 1",
        "sampler": module.extra_repr(),
        "times": module.grid.times.tolist(),
        "takes": takes,
        "shape": [fixed, *module.event],
        "cond": {name: str(pytree.tree_map(lambda v: list(v.shape), value)) for name, value in inputs.items()},
        "environment": environment(device),
    }
    written = BytesIO()
    torch.export.save(program, written, extra_files={"scoresde.json": json.dumps(about, indent=1)})
    write_whole(path, lambda out: out.write(written.getbuffer()))
    return fixed


class _Traced(nn.Module):
    """The module with the conditions that are no inputs; its inputs by their names."""

    def __init__(self, sampler: SamplerModule, cond: dict[str, Any], names: Sequence[str]) -> None:
        super().__init__()
        self.sampler = sampler

        def forward(*args: Tensor, **inputs: Any) -> Tensor:
            return cast(Tensor, sampler(*args, **cond, **inputs))

        own = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        forward.__signature__ = Signature(own)  # type: ignore[attr-defined]
        self.forward = forward
