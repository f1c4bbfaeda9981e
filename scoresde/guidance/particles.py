"""Sequential Monte Carlo with the twisted proposal, exact as particles grow (Wu et al., 2023, "Practical and
asymptotically exact conditional sampling in diffusion models", TDS).

A stochastic solver is a Markov chain p(x_s | x_t) = N(m, c^2), m = u x_t + v D(x_t, t), from x_T to x_0. Let the twist
~p(y | x_t) be any positive function, an approximation of p(y | x_t) say, that at t = 0 is the likelihood p(y | x_0).
Particles move with a shift of their mean towards y, and carry what that changed as a weight:

    x_s ~ N(m + d, c^2),    d = c^2 (alpha_t / alpha_s) w grad log ~p(y | x_t)

    W <- W  ~p(y | x_s) / ~p(y | x_t)  N(x_s; m, c^2) / N(x_s; m + d, c^2)

starting from W = ~p(y | x_T); w is the guidance's scale, 1. (N(x_s; m, c^2) ~p(y | x_s), the best proposal, has this
shift where ~p changes little over c, grad_s being about alpha_t / alpha_s times grad_t. The guided step of a solver, of
d = v (sigma_t^2 / alpha_t) w grad log ~p(y | x_t), is the same for small steps. For large ones of DDPM it is e^{2h}
times as long, many times c, and few particles survive it.)

Where the effective number of particles, (sum W)^2 / sum W^2, falls below a share of all, particles are drawn in
proportion to their weights, which then are equal. At the end the weighted particles are a sample of the chain's p(x_0)
p(y | x_0) / Z, and the product of the mean weights is an unbiased estimate of Z = p(y), for every twist: a poor one
costs particles, not correctness. What is left beside 1 / sqrt(particles) is that the chain's p(x_0) is the model's in
the limit of many steps only.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scoresde.checks import check_count
from scoresde.denoiser import Denoiser, check_call, check_denoiser
from scoresde.entries import counted, entries_of, named
from scoresde.errors import NonFiniteError, not_finite, some
from scoresde.grid import Grid
from scoresde.guidance.base import Guidance, Scale, scale_at, scaled
from scoresde.guidance.gradients import gradient
from scoresde.noise import Noise, NoiseSource, noise_source
from scoresde.run import choose, initial, results
from scoresde.solvers.base import Around, SingleStep, check_decreasing
from scoresde.solvers.first_order import DDPM
from scoresde.solvers.rows import Rows
from scoresde.tableau import State
from scoresde.tensors import Time, expand_like, known_any, shown, told
from scoresde.views import combine

__all__ = ["Particles", "Potential", "Twist", "Twisted", "TwistedSMC", "systematic", "twisted_smc"]


@shown
class Twist(NamedTuple):
    """What a twist says of x_t.

    Attributes:
        output: N, the wrapped network's own output, shape (B, ...).
        mean: D = r x + s N, unguided, shape (B, ...).
        log_prob: log ~p(y | x_t), shape (B,), up to what is the same for all x_t of one t and y.
        gradient: of log_prob by x_t, or near it: any is right, a good one saves particles. Shape (B, ...).
    """

    output: Tensor
    mean: Tensor
    log_prob: Tensor
    gradient: Tensor


class Twisted(Guidance):
    """A guidance that knows log ~p(y | x_t) and log p(y | x_0): what `TwistedSMC` takes. As a guidance it adds the
    twist's gradient to the score.
    """

    @abstractmethod
    def twist(self, x: Tensor, t: Time, cond: Mapping[str, Any]) -> Twist:
        """The twist at x_t, from one call of the network."""

    @abstractmethod
    def log_likelihood(self, x0: Tensor) -> Tensor:
        """log p(y | x_0) in nats, shape (B,), normalised in y, for x0 of shape (B, ...)."""

    def check_groups(self, x: Tensor, particles: int) -> None:
        """Raises ValueError if log p(y | x_0) is not known, or differs within a group of so many neighbours in x."""

    def guided(self, x: Tensor, t: Time, cond: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        found = self.twist(x, t, cond)
        return found.output, found.gradient


class Potential(Twisted):
    """The twist as a function, a classifier's log p(y | x_t) say.

    Args:
        denoiser: the model.
        log_twist: (x, t) to log ~p(y | x_t), shape (B,), differentiable by x, for x of shape (B, ...).
        log_likelihood: x_0 to log p(y | x_0), shape (B,); by default log_twist at t = 0.
        scale: w of the guidance.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        log_twist: Callable[[Tensor, Time], Tensor],
        log_likelihood: Callable[[Tensor], Tensor] | None = None,
        scale: Scale = 1.0,
    ) -> None:
        super().__init__(denoiser, scale)
        for name, function in (("log_twist", log_twist), ("log_likelihood", log_likelihood)):
            if function is not None and not callable(function):
                raise TypeError(f"{name} is {type(function).__name__}: expected a function")
        self.log_twist, self._log_likelihood = log_twist, log_likelihood

    def twist(self, x: Tensor, t: Time, cond: Mapping[str, Any]) -> Twist:
        value, g = gradient(lambda x: self.log_twist(x, t), x)  # first, as in `gradients.guided_by`
        N = self.denoiser.output(x, t, **cond)
        r, s = self.denoiser.affine(t)
        return Twist(N, combine(r, x, s, N), value, g)

    def log_likelihood(self, x0: Tensor) -> Tensor:
        return self.log_twist(x0, 0.0) if self._log_likelihood is None else self._log_likelihood(x0)


@dataclass(frozen=True)
class TwistedSMC(Around):
    """The particle method of the module's docstring, on a denoiser that is a `Twisted` guidance: `DPS` with a
    noise_std, `PiGDM`, `MomentMatching`, or `Potential`.

    Particles are neighbours in the batch: with P particles, samples 0..P-1 are the first group, P..2P-1 the second, and
    all of a group have the same y and the same condition (`y.repeat_interleave(P, dim=0)`). The samples that `sample`
    returns are drawn in proportion to the final weights, so that all count alike, and some are copies of each other;
    `twisted_smc` returns the weighted particles. One evaluation of the network and of the twist's gradient a step. The
    seeds of a group give that group, whatever the others are; a sample alone has no meaning.

    Args:
        solver: makes the steps of the chain, of one evaluation each. Where it draws nothing (DDIM(), and the step to
            t = 0) the chain is not steered, only weighted.
        particles: P, of each group.
        ess: particles are drawn again where the effective number falls below ess P: 0 is never, 1 at every step.

    Raises:
        ValueError: unless solver is a `SingleStep`, P >= 1 and 0 <= ess <= 1; by `iterate`, before any evaluation, if
            the batch is no multiple of P, y differs within a group, or a step of the solver has several evaluations.
        TypeError: by `iterate`, if the denoiser is no `Twisted`.

    >>> from scoresde import VPSDE, sample
    >>> from scoresde.exact import Gaussian
    >>> from scoresde.guidance.posterior_sampling import PiGDM
    >>> denoiser = Gaussian(mean=[0.0, 0.0], std=1.0).denoiser(VPSDE())
    >>> guided = PiGDM(denoiser, lambda x: x[:, :1], torch.ones(1, 1), noise_std=1.0)
    >>> x = sample(guided, (2000, 2), TwistedSMC(particles=2000), steps=50, seed=0).x
    >>> bool((x.mean(0) - torch.tensor([0.5, 0.0])).abs().max() < 0.1)
    True
    """

    solver: SingleStep = DDPM()  # noqa: RUF009 (frozen)
    particles: int = 64
    ess: float = 0.5

    def __post_init__(self) -> None:
        if not isinstance(self.solver, SingleStep):
            raise ValueError(f"solver={self.solver!r}: expected a solver of single steps, DDPM() or DDIM(eta=1.0) say")
        check_count(particles=self.particles)
        if isinstance(self.ess, bool) or not 0 <= self.ess <= 1:
            raise ValueError(f"ess={self.ess!r}: expected a share from 0 to 1")

    def evaluations(self, grid: Grid) -> int:
        return grid.steps + int(float(grid.times[-1]) > 0)

    def loop(
        self, denoiser: Denoiser, x: Tensor, grid: Grid, noise: NoiseSource | None, cond: dict[str, Any]
    ) -> Iterator[State]:
        assert noise is not None
        return (state for state, _ in self.run(denoiser, x, grid, noise, cond, equal=True))

    def run(
        self,
        denoiser: Denoiser,
        x: Tensor,
        grid: Grid,
        noise: NoiseSource,
        cond: Mapping[str, Any] | None,
        equal: bool,
    ) -> Iterator[tuple[State, _Weights]]:
        """The run, checked: states and weights; with equal weights at the end, or weighted."""
        if not isinstance(denoiser, Twisted):
            raise TypeError(
                f"{type(self).__name__} takes a guidance that knows log p(y | x_t), a PiGDM or MomentMatching around "
                f"the model say, not {type(denoiser).__name__}"
            )
        if len(x) % self.particles:
            raise ValueError(
                f"{len(x)} samples for particles={self.particles}: expected a multiple, groups of that many neighbours"
            )
        denoiser.check_groups(x, self.particles)
        _check_same(cond, len(x), self.particles)
        rows = self.solver.rows(grid.sde, grid.times[:-1], grid.times[1:])
        if len(rows.move) != grid.steps or rows.b.shape[1] != 1:
            raise ValueError(f"solver={self.solver!r} evaluates more than once a step: take DDPM() or DDIM(eta=1.0)")
        denoiser.check_times(grid.times[grid.times > 0])
        return self._loop(denoiser, x, grid, rows, noise, dict(cond or {}), equal)

    def _loop(
        self,
        denoiser: Twisted,
        x: Tensor,
        grid: Grid,
        rows: Rows,
        noise: NoiseSource,
        cond: dict[str, Any],
        equal: bool,
    ) -> Iterator[tuple[State, _Weights]]:
        u = (rows.a + rows.b[:, 0] * rows.p).tolist()
        v, c = (rows.b[:, 0] * rows.q).tolist(), rows.c.tolist()
        alpha_t, _, alpha_s, _ = grid.pairs()
        ratio, times = (alpha_t / alpha_s).tolist(), grid.times.tolist()
        found = denoiser.twist(x, times[0], cond)
        weights = _Weights.start(found.log_prob, self.particles)
        for i, (t, s) in enumerate(pairwise(times)):
            # Drawn whether it is used or not: what comes after must not depend on the weights.
            even, chosen = weights.resampled(_uniform(noise(2 * i, x), self.particles), self.ess)
            g = scaled(found.gradient, scale_at("scale", denoiser.scale, t, len(x)))
            x, D, g, before = (value[chosen] for value in (x, found.mean, g, found.log_prob))
            x, change = u[i] * x + v[i] * D, 0.0
            if c[i] > 0:
                z = noise(2 * i + 1, x)
                d = ratio[i] * c[i] ** 2 * g
                x, change = x + d + c[i] * z, -(d * z / c[i] + d**2 / (2 * c[i] ** 2)).double().flatten(1).sum(1)
            if s > 0:
                found = denoiser.twist(x, s, cond)
            after = found.log_prob if s > 0 else denoiser.log_likelihood(x)
            weights = even.times(change + (after - before).double())
            last = i == grid.steps - 1
            if last and equal:
                weights, chosen = weights.resampled(_uniform(noise(2 * i + 2, x), self.particles), 1.0)
                x = x[chosen]
            # Where the weights of a group are not numbers nothing was chosen: that must not pass for samples.
            x = torch.where(expand_like(weights.valid().double(), x) == 1, x, math.nan)
            yield State(i, i + 1 + int(last and s > 0), i, True, t, x), weights


def _check_same(cond: Mapping[str, Any] | None, n: int, particles: int) -> None:
    """Raises ValueError if a condition, as far as the host knows, differs within a group of particles."""
    firsts = entries_of(cond, torch.arange(n, device="cpu") // particles * particles, n)
    for (name, leaf), (_, first) in zip(named(cond or {}), named(firsts), strict=True):
        if counted(leaf) == n and (known_any(leaf != first) if isinstance(leaf, Tensor) else list(leaf) != first):
            raise ValueError(
                f"cond {name} differs within a group of {particles} particles: give that of each group as often"
            )


class _Weights(NamedTuple):
    """The weights of particles.

    Attributes:
        log: log W, shape (G, P), float64.
        log_mean: log of the product of the mean weights before particles were drawn, shape (G,).
    """

    log: Tensor
    log_mean: Tensor

    @staticmethod
    def start(log_prob: Tensor, particles: int) -> _Weights:
        log = log_prob.double().reshape(-1, particles)
        return _Weights(log, log.new_zeros(len(log)))

    def times(self, log_factor: Tensor) -> _Weights:
        return self._replace(log=self.log + log_factor.reshape(self.log.shape))

    def normalised(self) -> Tensor:
        """W / sum W."""
        return torch.softmax(self.log, dim=1)

    def effective(self) -> Tensor:
        """(sum W)^2 / sum W^2, shape (G,)."""
        return 1 / self.normalised().square().sum(1)

    def log_evidence(self) -> Tensor:
        return self.log_mean + torch.logsumexp(self.log, dim=1) - math.log(self.log.shape[1])

    def valid(self) -> Tensor:
        """For each particle, whether its group has weights, shape (G P,)."""
        return self.log_evidence().isfinite().repeat_interleave(self.log.shape[1])

    def resampled(self, u: Tensor, share: float) -> tuple[_Weights, Tensor]:
        """Where fewer than `share` of the particles are effective, those drawn again, with equal weights.

        Returns:
            the weights, and which particles of the batch follow, shape (G P,).
        """
        G, P = self.log.shape
        again = (self.effective() < share * P)[:, None]
        each = torch.arange(P, device=self.log.device)
        chosen = torch.where(again, systematic(self.normalised(), u), each)
        first = P * torch.arange(G, device=self.log.device)[:, None]
        weights = _Weights(
            torch.where(again, 0.0, self.log), torch.where(again[:, 0], self.log_evidence(), self.log_mean)
        )
        return weights, (first + chosen).flatten()


def systematic(weights: Tensor, u: Tensor) -> Tensor:
    """Systematic resampling: particle j is chosen P w_j times on average, and never more than one from it.

    The points (u + 0..P-1) / P are looked up in the running sum of the weights.

    Args:
        weights: w, shape (G, P), >= 0, each group with the sum one.
        u: a number in [0, 1) for each group, uniform: shape (G,).

    Returns:
        the chosen particles, ascending, shape (G, P).

    >>> systematic(torch.tensor([[0.5, 0.0, 0.25, 0.25]]), torch.tensor([0.5])).tolist()
    [[0, 0, 2, 3]]
    """
    P = weights.shape[1]
    total = weights.double().cumsum(1)
    points = (u.double()[:, None] + torch.arange(P, device=weights.device)) / P * total[:, -1:]
    return torch.searchsorted(total, points, right=True).clamp(max=P - 1)


def _uniform(z: Tensor, particles: int) -> Tensor:
    """A uniform number for each group, from the first normal number of its first particle."""
    return torch.special.ndtr(z.reshape(len(z), -1)[::particles, 0].double()).clamp(max=1 - 1e-15)


@dataclass(frozen=True)
class Particles:
    """What `twisted_smc` returns, for G groups of P particles.

    Attributes:
        x: the particles at the grid's end, shape (G, P, ...); decoded where the denoiser has a codec.
        log_weights: log of their weights, whose sum is one in each group, shape (G, P), float64.
        log_evidence: log of an unbiased estimate of p(y), in nats, shape (G,), float64.
        ess: effective number of particles after each step, shape (N, G), float64.
        nfe: evaluations of the network, each on the whole batch.
        grid: the grid that was stepped on.
        latent: what x is decoded of, shape (G, P, ...); None without codec.
    """

    x: Tensor
    log_weights: Tensor
    log_evidence: Tensor
    ess: Tensor
    nfe: int
    grid: Grid
    latent: Tensor | None = None

    __repr__ = told

    def mean(self, function: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The weighted mean of a function of the particles, x itself by default: an estimate of E[function(x_0) | y].

        Args:
            function: of (G P, ...), to a tensor of as many entries.

        Returns:
            shape (G, ...), float64.
        """
        G, P = self.log_weights.shape
        value = self.x if function is None else function(self.x.flatten(0, 1)).unflatten(0, (G, P))
        w = self.log_weights.exp()
        return (w.reshape(G, P, *[1] * (value.ndim - 2)) * value.double()).sum(1)


def twisted_smc(
    denoiser: Twisted,
    shape_or_x: Sequence[int] | Tensor,
    solver: TwistedSMC | None = None,
    *,
    steps: int | None = None,
    nfe: int | None = None,
    grid: Grid | None = None,
    seed: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    noise: Noise | None = None,
    cond: Mapping[str, Any] | None = None,
) -> Particles:
    """Weighted particles of the posterior, with an estimate of p(y).

    Args:
        denoiser: a `Twisted` guidance: `DPS` with a noise_std, `PiGDM`, `MomentMatching`, `Potential`.
        shape_or_x: (G P, ...), or x_T itself: G groups of P neighbours.
        solver: with the number P; `TwistedSMC()` by default.
        steps, nfe, grid: one of them, as for `sample`.
        seed, generator, noise, cond: as for `sample`.

    Raises:
        ValueError, TypeError: on bad arguments, before any evaluation.
        NonFiniteError: if the particles or the weights of a group are not finite.
    """
    solver = TwistedSMC() if solver is None else solver
    if not isinstance(solver, TwistedSMC):
        raise TypeError(f"solver={solver!r}: expected a TwistedSMC(...)")
    check_denoiser(denoiser)
    _, grid = choose(denoiser.sde, solver, steps, nfe, grid)
    check_decreasing(grid, solver)
    source = noise_source(denoiser.device, shape_or_x, seed, generator, noise)
    x_T, dtype = initial(denoiser, shape_or_x, grid, source)
    check_call(denoiser, x_T, cond)
    ess = []
    with torch.no_grad():
        told = denoiser.prepared(cond)
        for last, weights in solver.run(denoiser, x_T, grid, source, told, equal=False):
            state = last
            ess.append(weights.effective())
    if bad := not_finite(state.x):
        message = (
            f"particles {some(bad)} are not finite, or their weights are all zero: the network is not finite, or y is "
            "impossible under every particle (take more of them, or a larger noise_std)"
        )
        raise NonFiniteError(message, None, None, bad)
    with torch.no_grad():
        x, latent = results(denoiser, state.x, dtype, grid, cond)
    x, latent = x.unflatten(0, shape := weights.log.shape), None if latent is None else latent.unflatten(0, shape)
    return Particles(x, weights.log.log_softmax(1), weights.log_evidence(), torch.stack(ess), state.nfe, grid, latent)
