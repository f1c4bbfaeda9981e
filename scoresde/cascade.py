"""A cascade: models one after the other, each told what the one before has made (Ho et al., 2022, "Cascaded diffusion
models for high fidelity image generation").

    p(x_K | y) = integral p(x_K | x_{K-1}, y) ... p(x_2 | x_1, y) p(x_1 | y)

x_1, x_2, ... may be an image of growing resolution, each stage told the small one enlarged, or an embedding and then an
image of it (Ramesh et al., 2022, "Hierarchical text-conditional image generation with CLIP latents": prior, decoder,
upsamplers). Each stage is a denoiser, trained by itself on real x_{k-1}. What it is told in a cascade is a sample, and
the difference is hidden by spoiling both on purpose (`scoresde.data.AugmentedSuperResolution`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from scoresde.checks import ArgumentError, check_count
from scoresde.denoiser import Denoiser, check_denoiser
from scoresde.grid import Grid
from scoresde.noise import Noise, SeededNoise, seeds_of, stream_seeds
from scoresde.run import Solution, check_solver
from scoresde.sampling import sample
from scoresde.solvers.base import Solver
from scoresde.solvers.exponential import Adams
from scoresde.tensors import told as repr_of

__all__ = ["Cascade", "Cascaded", "Stage"]

Told = Callable[[Tensor, Noise], Mapping[str, Any]]
"""told(x, noise): what a stage is told of the samples of the one before, by the keywords of its network; noise(0, x) is
standard normal, each sample's own."""


@dataclass(frozen=True)
class Stage:
    """A model of a cascade.

    Args:
        denoiser: of x_k, wrapped as it will be used: guidance, clipping, a codec.
        shape: of a sample, without the batch; of its latent, where there is a codec.
        told: what it is told of x_{k-1}, beside the condition of the call: `up.at(noise=0.1).enlarged` of an
            `AugmentedSuperResolution`, or `lambda z, noise: {"vector": z}`. None for the first.
        takes: names of the conditions of the call that it is given; None for all of them.
        solver: of it.
        steps, nfe, grid: as of `sample`; 20 evaluations where none is given and the solver needs one.

    Raises:
        TypeError, ValueError: if these are none.
    """

    denoiser: Denoiser
    shape: tuple[int, ...]
    told: Told | None = None
    takes: Collection[str] | None = None
    solver: Solver = field(default_factory=Adams)
    steps: int | None = None
    nfe: int | None = None
    grid: Grid | None = None

    def __post_init__(self) -> None:
        check_denoiser(self.denoiser)
        check_solver(self.solver)
        object.__setattr__(self, "shape", tuple(self.shape))
        for n in self.shape:
            check_count(shape=n)
        if self.told is not None and not callable(self.told):
            raise TypeError(f"told is {type(self.told).__name__}: expected a function told(x, noise) -> conditions")
        if self.steps is None and self.nfe is None and self.grid is None and not self.solver.adaptive:
            object.__setattr__(self, "nfe", 20)

    def sample(self, x: Sequence[int] | Tensor, seed: Sequence[int], cond: Mapping[str, Any], **how: Any) -> Solution:
        """As `scoresde.sample`, in its steps."""
        return sample(
            self.denoiser, x, self.solver, steps=self.steps, nfe=self.nfe, grid=self.grid, seed=seed, cond=cond, **how
        )


@dataclass(frozen=True)
class Cascaded:
    """What a cascade returns.

    Attributes:
        solutions: of each stage that ran.
        made: the samples of every stage, those that were given among them.
    """

    solutions: tuple[Solution, ...]
    made: tuple[Tensor, ...]

    __repr__ = repr_of

    @property
    def x(self) -> Tensor:
        """The samples of the last stage."""
        return self.made[-1]

    @property
    def nfe(self) -> int:
        """Evaluations of all denoisers."""
        return sum(solution.nfe for solution in self.solutions)


class Cascade:
    """Models one after the other, each told what the one before has made.

    Sample i has streams of its own in every stage: it is the same in any batch, and with the same x_{k-1} given, a
    stage makes what it made in the whole.

    Args:
        stages: two or more, the first of which is told nothing of another.

    Raises:
        ValueError: if there are fewer, the first is told of another, or a later one is not.

    >>> from scoresde import VPSDE
    >>> from scoresde.exact import Gaussian
    >>> from scoresde.denoiser import X0Denoiser
    >>> z, sde = Gaussian(mean=[1.0], std=0.5), VPSDE()
    >>> def about(x, t, vector):  # D of x ~ N(vector, 0.1^2)
    ...     a, s = (v[:, None].to(x) for v in (sde.alpha(t), sde.sigma(t)))
    ...     return vector + 0.01 * a * (x - a * vector) / (0.01 * a**2 + s**2)
    >>> decoder = Stage(X0Denoiser(about, sde), (1,), told=lambda z, noise: {"vector": z})
    >>> found = Cascade(Stage(z.denoiser(sde), (1,)), decoder).sample(4096, seed=0)
    >>> found.nfe, abs(float(found.x.mean()) - 1) < 0.05, abs(float(found.x.var()) - 0.26) < 0.04
    (40, True, True)
    """

    def __init__(self, *stages: Stage) -> None:
        for stage in stages:
            if not isinstance(stage, Stage):
                raise TypeError(f"a cascade is of Stage(denoiser, shape, told=...), not {type(stage).__name__}")
        if len(stages) < 2 or stages[0].told is not None or any(stage.told is None for stage in stages[1:]):
            raise ValueError(
                f"stages told of another: {[stage.told is not None for stage in stages]}; expected two or more, each "
                "but the first with told=, what it is told of the one before"
            )
        self.stages = stages

    def sample(
        self,
        n: int,
        *,
        seed: int | Sequence[int] | None = None,
        cond: Mapping[str, Any] | None = None,
        given: Sequence[Tensor] = (),
        progress: bool = False,
        differentiable: bool = False,
    ) -> Cascaded:
        """Samples of the last stage.

        Args:
            n: how many.
            seed: one integer, or one for each sample; drawn by the operating system if None.
            cond: conditions, which each stage is told, or those that it `takes`, beside what it is told of the one
                before.
            given: the samples of the first stages, (n, ...) each, which then do not run: variations of one image have
                its embedding given.
            progress, differentiable: as of `scoresde.sample`.

        Raises:
            ValueError: before any evaluation, if there are not n of what is given, all are, or no stage that is
                left takes a condition; of a stage as `sample` does, and if it is told one thing twice.
            NonFiniteError: if samples are not finite; a note says of which stage.
        """
        check_count(n=n)
        seeds = seeds_of(seed, n)
        made = list(given)
        if len(made) >= len(self.stages):
            raise ArgumentError(f"given has {len(made)} of {len(self.stages)} stages: nothing is left to be sampled")
        for k, x in enumerate(made):
            if not isinstance(x, Tensor) or len(x) != n:
                raise ArgumentError(f"given[{k}] is {_described(x)}: expected {n} samples of stage {k}")
        taken = [stage.takes for stage in self.stages[len(made) :]]
        if None not in taken and (unknown := (cond or {}).keys() - {name for names in taken for name in names or ()}):
            raise ArgumentError(f"cond has {', '.join(sorted(unknown))}, which no stage that is left takes")
        solutions: list[Solution] = []
        for k in range(len(made), len(self.stages)):
            stage = self.stages[k]
            own = {name: value for name, value in (cond or {}).items() if stage.takes is None or name in stage.takes}
            if stage.told is not None:
                with torch.set_grad_enabled(differentiable):
                    of_before = stage.told(made[-1], SeededNoise(stream_seeds(seeds, 2 * k), made[-1].device))
                if twice := sorted(own.keys() & of_before.keys()):
                    raise ValueError(f"stage {k} is told {', '.join(twice)} by cond and by the stage before it")
                own |= of_before
            try:
                found = stage.sample(
                    (n, *stage.shape),
                    stream_seeds(seeds, 2 * k + 1),
                    own,
                    progress=progress,
                    differentiable=differentiable,
                )
            except Exception as error:
                error.add_note(f"in stage {k} of the cascade")
                raise
            solutions.append(found)
            made.append(found.x)
        return Cascaded(tuple(solutions), tuple(made))

    def __repr__(self) -> str:
        return f"Cascade({', '.join(f'{stage.denoiser!r}: {stage.shape}' for stage in self.stages)})"


def _described(x: object) -> str:
    return f"of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
