"""Samplers of whole states: loops of the call that solvers have, `solver.iterate(denoiser, x, grid, noise, cond)`.

Where a step goes to t = 0 both draw x_0 of the denoiser's posterior, an evaluation like the others.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from scoresde.categorical.denoiser import ProbabilityDenoiser, StateDenoiser, wide
from scoresde.categorical.process import drawn
from scoresde.checks import ArgumentError, check_count
from scoresde.errors import NonFiniteError, some
from scoresde.grid import Grid
from scoresde.noise import Noise, as_source
from scoresde.sde import Forward
from scoresde.tableau import State

__all__ = ["STATE_SOLVERS", "Ancestral", "StateSolver", "TauLeaping", "check_states"]


class StateSolver(ABC):
    """A sampler of whole states. It holds no state of its own."""

    def grid(self, process: Forward, steps: int) -> Grid:
        """The grid that `sample(steps=...)` uses where none is given: uniform times; of a chain, nodes near these.

        Raises:
            ValueError: if a chain has fewer nodes.
        """
        check_count(steps=steps)
        if steps > process.most_steps:
            raise ArgumentError(f"steps={steps}: {process!r} has {int(process.most_steps)} nodes, a step each at most")
        times = Grid.uniform(process, steps).times
        return Grid(process, torch.cat([process.snapped(times[:-1]), times[-1:]]))

    @abstractmethod
    def step(self, denoiser: Any, x: Tensor, found: Any, t: float, s: float, noise: Tensor) -> Tensor:
        """x_s of x_t, s > 0 or a denoiser's own landing, by what an evaluation found."""

    def check(self, denoiser: StateDenoiser[Any]) -> None:
        """Raises ValueError if it cannot step the denoiser."""
        return

    def iterate(
        self,
        denoiser: StateDenoiser[Any],
        x: Tensor,
        grid: Grid,
        noise: Noise,
        cond: Mapping[str, Any] | None = None,
    ) -> Iterator[State]:
        """Run from x on the grid, yielding a `State` after each step.

        Args:
            denoiser: the model.
            x: x_T, integers (B, ...), or what a product has.
            grid: where to step, decreasing.
            noise: a function (row, x) that gives standard normal numbers of the shape and dtype of x, or a source of
                `scoresde.noise`.
            cond: keyword arguments for the denoiser.

        Raises:
            TypeError: if the denoiser has no whole states.
            ValueError: before any evaluation, if the grid has another process or goes up.
            NonFiniteError: at the end, if an evaluation was no number, naming step, time and samples.
        """
        check_states(denoiser, self)
        self.check(denoiser)
        grid.check_sde(denoiser.process)
        if grid.increasing:
            raise ValueError(
                f"an increasing grid encodes data, which {self!r} cannot: noise tells no whole states back"
            )
        return self._run(denoiser, x, grid, as_source(noise), dict(cond or {}))

    def _run(
        self, denoiser: StateDenoiser[Any], x: Tensor, grid: Grid, noise: Any, cond: dict[str, Any]
    ) -> Iterator[State]:
        times, like = grid.times.tolist(), wide(torch.zeros_like(x, dtype=torch.float32))
        bad_since = torch.full((len(x),), len(times), device=x.device)  # on the device: looked at once, at the end
        for i, (t, s) in enumerate(itertools.pairwise(times)):
            found = denoiser.predicted(x, t, **cond)
            bad_since = torch.where(denoiser.finite(found), bad_since, bad_since.clamp(max=i))
            x = self.step(denoiser, x, found, t, s, noise(i, like))
            if i == grid.steps - 1 and bool((bad := bad_since < len(times)).any()):
                first, samples = int(bad_since.min()), bad.nonzero().flatten().tolist()
                raise NonFiniteError(
                    f"the network's probabilities of sample{'s' * (len(samples) > 1)} {some(samples)} are no numbers, "
                    f"first in step {first}, at the evaluation at t = {times[first]:.6g}",
                    first,
                    times[first],
                    samples,
                )
            yield State(i, i + 1, i, True, t, x)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))


class Ancestral(StateSolver):
    """Each step draws x_s ~ sum_k q(x_s | x_t, x_0 = k) p(x_0 = k | x_t), each entry by itself (Sohl-Dickstein et al.,
    2015; Austin et al., 2021). On a chain with fewer steps than nodes s is not t - 1, and q is still exact.

    With the exact denoiser, data of one entry have their law in any number of steps; of more, as steps are added.
    """

    def step(self, denoiser: Any, x: Tensor, found: Any, t: float, s: float, noise: Tensor) -> Tensor:
        back: Tensor = denoiser.back(x, found, t, s, noise)
        return back


class TauLeaping(StateSolver):
    """The reverse process in continuous time with its rates held still during a step (Campbell et al., 2022): an entry
    jumps with probability 1 - exp(-R) to y with probability r_y / R, R = sum_y r_y.

    Where Poisson counts have more than one jump, which for states without an order have no sum, the first one stands
    (Campbell et al. discard them all). The rates are those of the middle of the step, in c = 1 - a, for the denoiser's
    probabilities at its beginning, where the uniform process's are infinite. First order: it meets `Ancestral` as steps
    are added, which needs no rates and is the better one with few. Not for chains of matrices, nor for products.
    """

    def check(self, denoiser: StateDenoiser[Any]) -> None:
        if not isinstance(denoiser, ProbabilityDenoiser):
            raise ValueError(f"TauLeaping() is for whole states alone: take Ancestral() for {denoiser!r}")
        denoiser.process.time_at(torch.tensor([0.5], dtype=torch.float64))  # says what has no rates

    def step(self, denoiser: Any, x: Tensor, found: Any, t: float, s: float, noise: Tensor) -> Tensor:
        if s == 0:
            back: Tensor = denoiser.back(x, found, t, s, noise)
            return back
        process, p = denoiser.process, wide(found).exp()
        c_t, c_s = (1 - float(process.kept(time)) for time in (t, s))
        rates = (c_t - c_s) * process.rates(x, p, process.time_at(torch.tensor((c_t + c_s) / 2, dtype=torch.float64)))
        total = rates.sum(-1, keepdim=True)
        jumps = -torch.expm1(-total) * rates / torch.where(total > 0, total, 1)
        stays = torch.nn.functional.one_hot(x, process.size) * (-total).exp()
        return drawn(jumps + stays, noise)


STATE_SOLVERS: dict[str, type[StateSolver]] = {"ancestral": Ancestral, "tau-leaping": TauLeaping}
"""Samplers of whole states by name."""


def check_states(denoiser: object, of: object = "this") -> None:
    """Raises TypeError unless the denoiser has whole states."""
    if not isinstance(denoiser, StateDenoiser):
        raise TypeError(
            f"{of!r} is for denoisers of whole states: expected CategoricalDenoiser(net, process), say, not "
            f"{type(denoiser).__name__}"
        )
