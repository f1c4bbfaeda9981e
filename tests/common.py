"""What the tests share: SDEs, solvers, a non-linear denoiser, networks around an exact one, designs of cases."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scoresde import (
    SDE,
    CosineVPSDE,
    DDPMChain,
    Denoiser,
    Grid,
    Posterior,
    processes,
    sample,
)
from scoresde.files import sealed, unsealed
from scoresde.solvers import DDIM, DDPM, Euler, EulerMaruyama, Heun, Solver
from scoresde.tensors import as_time, expand_like

# All of the registry: an SDE that is added there meets the laws of the tests.
SDES: dict[str, SDE] = {name.replace("-", " "): make() for name, make in processes.SDES.items()}

# Those with alpha = 0 at their t_max from shortly before.
FINITE: dict[str, SDE] = {k: sde if sde.alpha(sde.t_max) else replace(sde, t_max=0.99) for k, sde in SDES.items()}

# With alpha = 0 at the start, and short chains: for the tests of the SDEs and grids themselves.
EVERY_SDE: dict[str, SDE] = SDES | {
    "cosine-1": CosineVPSDE(t_max=1.0),
    "chain-short": DDPMChain([0.1, 0.5, 0.02, 0.9]),
    "chain-to-noise": DDPMChain([0.1, 0.5, 0.02, 0.9, 1.0]),
}

SOLVERS: dict[str, Solver] = {
    "ddpm": DDPM(),
    "ddpm beta": DDPM(variance="beta"),
    "ddim": DDIM(),
    "ddim 0.5": DDIM(eta=0.5),
    "ddim 1": DDIM(eta=1.0),
    "euler-maruyama": EulerMaruyama(),
    "euler sigma": Euler(),
    "euler t": Euler(variable="t"),
    "heun sigma": Heun(),
    "heun t": Heun(variable="t"),
}

STOCHASTIC = {"ddpm", "ddpm beta", "ddim 0.5", "ddim 1", "euler-maruyama"}


class Nonlinear(Denoiser):
    """A smooth posterior mean that is not linear in x, mixes the components of a sample and depends on t."""

    def __init__(self, sde: SDE) -> None:
        self.sde = sde

    def posterior(self, x: Tensor, t: Any, **cond: Any) -> Posterior:
        shift = expand_like((as_time(t) / self.sde.t_max * 3).cos(), x)
        flat = x.reshape(len(x), -1)
        return Posterior(torch.tanh(0.8 * x + 0.3 * flat.roll(1, dims=1).reshape(x.shape) + shift) + 0.1 * shift)


class Counting(Denoiser):
    """Another denoiser that counts its evaluations and remembers their times."""

    def __init__(self, inner: Denoiser) -> None:
        self.inner, self.sde = inner, inner.sde
        self.times: list[float] = []

    def posterior(self, x: Tensor, t: Any, **cond: Any) -> Posterior:
        self.times.append(float(t))
        return self.inner.posterior(x, t, **cond)


def network_for(denoiser: Denoiser, view: str) -> Callable[..., Tensor]:
    """net(x, t) that predicts that view of a denoiser: what a perfectly trained network would be."""
    return lambda x, t: denoiser.view(view, x, t)


def descendants(kind: type) -> Iterator[type]:
    """All subclasses there are."""
    for child in kind.__subclasses__():
        yield child
        yield from descendants(child)


def start_of(sde: SDE) -> float:
    """A start where every method is defined, alpha > 0, and 1 / alpha costs few of float64's digits."""
    return min(sde.t_max, float(sde.time_at(-5.5)))


def end_of(sde: SDE) -> float:
    """An end with some noise left, well above t_min."""
    return float(sde.time_at(3.0))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def solve(denoiser: Denoiser, x: Tensor, solver: Solver, grid: Grid, z: list[Tensor] | None = None) -> Tensor:
    """The samples from x, with z[step] as the noise of each step."""
    steps = solver.tableau(grid).step.tolist()
    noise = None if z is None else (lambda row, _: z[steps[row]].clone())
    return sample(denoiser, x, solver, grid=grid, noise=noise).x


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint's manifest says."""
    found: dict[str, Any] = unsealed((checkpoint / "manifest.json").read_text())[0]
    return found


def write_manifest(checkpoint: Path, manifest: Mapping[str, Any]) -> None:
    """Another manifest, its hash included, as somebody could who means harm."""
    (checkpoint / "manifest.json").write_text(sealed(manifest))


def covering(*factors: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Rows, one level of each factor, in which every pair of levels of any two factors occurs: instead of their product
    where no interaction of three is claimed. Greedy: a row begins with the first pair that is left, of the largest
    factors first, and takes of each other factor the level that closes the most.
    """
    levels = [list(factor) for factor in factors]
    by_size = sorted(range(len(levels)), key=lambda k: -len(levels[k]))
    cells = [[(k, c) for c in range(len(levels[k]))] for k in by_size]
    left = dict.fromkeys(frozenset(pair) for two in combinations(cells, 2) for pair in product(*two))
    rows = []
    while left:
        row = dict(next(iter(left)))
        for k in by_size:
            if k not in row:
                closed = [sum(frozenset([(k, c), cell]) in left for cell in row.items()) for c in range(len(levels[k]))]
                row[k] = closed.index(max(closed))
        for pair in combinations(row.items(), 2):
            left.pop(frozenset(pair), None)
        rows.append(tuple(levels[k][row[k]] for k in range(len(levels))))
    return rows


def every_pair(**factors: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrises a test over the rows of `covering`, with the values of a mapping under the names of its keys."""

    def value(factor: Iterable[Any], level: Any) -> Any:
        return factor[level] if isinstance(factor, Mapping) else level

    rows = [
        pytest.param(*map(value, factors.values(), row), id="-".join(map(str, row)))
        for row in covering(*factors.values())
    ]
    return pytest.mark.parametrize(list(factors), rows)


@contextmanager
def named(case: str) -> Iterator[None]:
    """Says in an error which case of a loop it is from."""
    try:
        yield
    except Exception as error:
        error.add_note(case)
        raise
