"""Linear forward SDEs. An SDE *is* its pair of scales:

    x_t = alpha_t x_0 + sigma_t eps,    eps ~ N(0, I)
    dx  = f(t) x dt + g(t) dw,          f = (log alpha)',    g^2 = (sigma^2)' - 2 f sigma^2 = -2 sigma^2 lambda'
    lambda_t = half_log_snr(t) = log(alpha_t / sigma_t)

Data is at t = 0, where alpha = 1 and sigma = 0 exactly. Every method takes a time of any shape, on any device, as a
float or a tensor, and returns a tensor of that shape in its dtype (a Python number counts as float64, a half-precision
time is raised to float32). Nothing here subtracts nearly equal numbers, so t = 1e-5 is accurate in float32.

Source: Song et al. (2021), "Score-Based Generative Modeling through Stochastic Differential Equations", sections 3.4
and B; the other families name theirs.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import wraps
from numbers import Number
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from scoresde.checks import ArgumentError, check_positive
from scoresde.masks import Own
from scoresde.tensors import Time, as_time, check_batch, drawn_from, expand_like, same

__all__ = ["NOT_NOISE", "SDE", "Forward"]

NOT_NOISE = 0.1
"""`SDE.signal_at` beyond which x_t is told from noise: a mean as large as the data's width is then seen in x_t."""


def _of_times(scale: Callable[[Any, Tensor], Tensor | float]) -> Callable[[Any, Time], Tensor]:
    """A scale as every caller may ask for it: of floats and integers too, and a constant in the shape of t."""

    @wraps(scale)
    def of(sde: Any, t: Time) -> Tensor:
        t = as_time(t)
        value = scale(sde, t)
        return value.to(t).expand_as(t) if isinstance(value, Tensor) else torch.full_like(t, value)

    return of


class Forward(ABC):
    """A forward process on [0, t_max], from data to noise: what the times of a `scoresde.Grid` belong to. The linear
    ones are an `SDE`, those of whole states `scoresde.categorical.CategoricalProcess`.

    Attributes:
        t_min: the smallest time that training draws and that logarithmic grids end at; in (0, t_max).
        t_max: the time of the prior.
        customary_grid: name of the `Grid` constructor that `sample(steps=N)` uses where the solver has no wish.
        nodes: the times at which the process is exact, where it is a chain with steps of its own: increasing, float64,
            shape (N,). None where it is continuous.
    """

    t_min: float
    t_max: float
    customary_grid: ClassVar[str] = "uniform"
    nodes: Tensor | None = None

    @property
    def t_limit(self) -> float:
        """The largest time at which the scales are defined: where a solver that adds noise (EDM's churn) may stand."""
        return self.t_max

    @property
    def most_steps(self) -> float:
        """The most steps that a grid to t = 0 can have: one a node, or infinitely many."""
        return math.inf if self.nodes is None else len(self.nodes)

    def snapped(self, times: Tensor) -> Tensor:
        """Strictly decreasing times moved to the nearest nodes that strictly decrease too; a process without nodes
        leaves them.

        Raises:
            ValueError: if there are more times than nodes.
        """
        if self.nodes is None:
            return times
        N, K = len(self.nodes), len(times)
        if N < K:
            raise ArgumentError(f"the chain has {N} nodes, not {K}: at most {N} steps to t = 0, {N - 1} to a noisy end")
        rank = torch.arange(K - 1, -1, -1, dtype=torch.float64, device="cpu")
        # n_i - (K - 1 - i) must not increase: the running maximum from the end, within the chain.
        slack = (times.round() - rank).clamp(min=1.0, max=N - K + 1.0)
        return slack.flip(0).cummax(0).values.flip(0) + rank


class SDE(Forward):
    """A linear forward SDE. A subclass gives alpha, sigma, t_min and t_max; everything else follows from them, and what
    it knows in closed form it may give too. Its alpha and sigma are given t as a floating tensor, and may return a
    number for all times.

    >>> class Cosine(SDE):
    ...     t_min, t_max = 1e-3, 0.99
    ...
    ...     def alpha(self, t):
    ...         return torch.cos(torch.pi / 2 * t)
    ...
    ...     def sigma(self, t):
    ...         return torch.sin(torch.pi / 2 * t)
    >>> print(f"{Cosine().diffusion(0.5):.4f} {Cosine().time_at(0.0):.4f}")
    1.7725 0.5000

    Attributes:
        t_min, t_max, customary_grid, nodes: see `Forward`.
        prior_std: standard deviation of the prior N(0, prior_std^2 I) that sampling starts from.
        prior_width: factor of it, by `tempered`, else 1. It is no part of the process: two that differ in it are equal,
            and take each other's grids and tables.
        data_std: s, the standard deviation of the data, where it is told: by a subclass, or by `for_data`. Else None.
        customary_prediction: what a network for it is usually trained to predict, a word of `ModelConfig(predicts=)`.
    """

    customary_prediction: ClassVar[str] = "v"
    data_std: float | None = None
    prior_width: float = 1.0

    @abstractmethod
    def alpha(self, t: Time) -> Tensor:
        """Scale of the data, alpha_t."""

    @abstractmethod
    def sigma(self, t: Time) -> Tensor:
        """Standard deviation of the noise, sigma_t."""

    def half_log_snr(self, t: Time) -> Tensor:
        """lambda_t = log(alpha_t / sigma_t), strictly decreasing in t; +inf at sigma = 0 and -inf at alpha = 0."""
        return self.alpha(t).log() - self.sigma(t).log()

    def time_at(self, half_log_snr: Time) -> Tensor:
        """The time at which `half_log_snr` is reached: zero at +inf. Closed forms for the SDEs here, else bisection."""
        wanted = as_time(half_log_snr)
        low, high = torch.zeros_like(wanted), torch.full_like(wanted, self.t_max)
        for _ in range(64):
            middle = (low + high) / 2
            noisier = self.half_log_snr(middle) < wanted
            low, high = torch.where(noisier, low, middle), torch.where(noisier, middle, high)
        return torch.where(wanted == math.inf, torch.zeros_like(low), (low + high) / 2)

    def drift(self, t: Time) -> Tensor:
        """f(t) = (log alpha)', the factor of x in the drift, per unit of time."""
        return self.rates(t)[0] / self.alpha(t)

    def diffusion(self, t: Time) -> Tensor:
        """g(t), the diffusion coefficient (not its square)."""
        sigma, (_, sigma_dot) = self.sigma(t), self.rates(t)
        return (2 * sigma * (sigma_dot - self.drift(t) * sigma)).sqrt()

    def rates(self, t: Time) -> tuple[Tensor, Tensor]:
        """(alpha', sigma') at t, so that the probability-flow velocity is alpha' E[x0|x] + sigma' E[eps|x]. In closed
        form for the SDEs here, else by automatic differentiation.
        """
        t = as_time(t)
        alpha_dot, sigma_dot = (
            torch.func.jvp(scale, (t,), (torch.ones_like(t),))[1] for scale in (self.alpha, self.sigma)
        )
        return alpha_dot, sigma_dot

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # Before @dataclass, which leaves what is there, would compare arrays as numbers, and knows no `for_data`.
        for name in ("__eq__", "__hash__", "__repr__"):
            if name not in vars(cls):
                setattr(cls, name, getattr(cls, name))
        for name in ("alpha", "sigma"):
            if name in vars(cls):
                setattr(cls, name, _of_times(vars(cls)[name]))

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and same(self._own, other._own)

    def __hash__(self) -> int:
        return hash((type(self), *(v for v in self._own.values() if isinstance(v, Number | str))))

    @property
    def _own(self) -> dict[str, Any]:
        """What the process is, without the width of a prior."""
        return {name: value for name, value in vars(self).items() if name != "prior_width"}

    def __repr__(self) -> str:
        told = vars(self).get("data_std")
        return self._call() + ("" if told is None else f".for_data({told!r})")

    def _call(self) -> str:
        """The repr without what `for_data` told."""
        options = (f"{k}={v!r}" for k, v in self._own.items() if k != "data_std")
        return f"{type(self).__name__}({', '.join(options)})"

    def for_data(self, std: float) -> Self:
        """The same process, told that the data has this standard deviation, in the units of x.

        Raises:
            ValueError: unless std is a finite number > 0.

        >>> from scoresde import FlowSDE
        >>> f"{FlowSDE().prior_std_at(0.5):.4f} {FlowSDE().for_data(0.1).prior_std_at(0.5):.4f}"
        '0.7071 0.5025'
        """
        check_positive(data_std=std)
        told = copy.copy(self)
        object.__setattr__(told, "data_std", float(std))  # some are frozen
        return told

    def tempered(self, temperature: float) -> Self:
        """The same process, from the prior N(0, prior_std^2 / temperature I) (Popov et al., 2021, "Grad-TTS", section
        4): its width is `prior_width` = 1 / sqrt(temperature) times what it was. See `scoresde.Tempered`.

        Raises:
            ValueError: unless temperature is a finite number > 0, or if a subclass of one's own overrides
                `prior_std_at`, which then knows nothing of it: let it override `width_at`.
        """
        check_positive(temperature=temperature)
        if type(self).prior_std_at is not SDE.prior_std_at:
            raise ArgumentError(
                f"temperature={temperature}: {type(self).__name__} overrides prior_std_at, whose number a temperature "
                "divides; override width_at instead"
            )
        told = copy.copy(self)
        object.__setattr__(told, "prior_width", self.prior_width / math.sqrt(temperature))
        return told

    @property
    def data_scale(self) -> float:
        """c, the scale of x_0 that grids, views and tolerances reckon with, so that x_0 / c is of order one: data_std
        where it is told, else 1. (VE and EDM, whose levels have the unit of the data, tell it by them.)
        """
        return 1.0 if self.data_std is None else self.data_std

    def scales(self, t: Time) -> tuple[Tensor, Tensor]:
        """(alpha c, sigma), with c = `data_scale`: the process of x_0 / c, which has no unit of its own."""
        return self.data_scale * self.alpha(t), self.sigma(t)

    def radius(self, t: Time) -> Tensor:
        """r = sqrt(alpha^2 c^2 + sigma^2): the width of x_t for data of width c = `data_scale` about zero."""
        return torch.hypot(*self.scales(t))

    def width_at(self, t: float) -> float:
        """Width of the prior for a run that starts at t, at temperature 1: `radius`, that of x_t."""
        return float(self.radius(t))

    def prior_std_at(self, t: float) -> float:
        """Width of the prior for a run that starts at t instead of t_max: `prior_width` times `width_at`."""
        return self.prior_width * self.width_at(t)

    @property
    def prior_std(self) -> float:
        return self.prior_std_at(self.t_max)

    def signal_at(self, t: float) -> float:
        """alpha c / sigma at t, what is left of the data beside the noise: beyond `NOT_NOISE` a draw from the prior is
        but a guess of x_t, whose mean and shape are the data's.
        """
        signal, noise = (float(scale) for scale in self.scales(t))
        return signal / noise if noise > 0 else math.inf

    def arrays(self) -> dict[str, Tensor]:
        """The numbers that its repr has a hash of only: with both, `sde_from` makes it again."""
        return {}

    @property
    def unrounded(self) -> Self:
        """The same process, on which grids do not round their times to nodes; equal to it."""
        if self.nodes is None:
            return self
        free = copy.copy(self)
        free.nodes = None
        return free

    def perturb(self, x0: Tensor, t: Time, noise: Tensor) -> Tensor:
        """x_t = alpha_t x0 + sigma_t noise.

        Args:
            x0: data, shape (B, ...), floating point.
            t: time, shape () or (B,).
            noise: standard normal, shape of x0.

        Raises:
            ValueError: if x0 is not floating point, or the shapes of x0, noise and t do not fit.
        """
        check_batch(x0, "x0")
        if noise.shape != x0.shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, x0 {tuple(x0.shape)}: they must be equal")
        t = as_time(t)
        return expand_like(self.alpha(t), x0) * x0 + expand_like(self.sigma(t), x0) * noise

    def prior(
        self,
        shape: Sequence[int],
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        t: float | None = None,
    ) -> Tensor:
        """A draw from N(0, prior_std^2 I).

        Args:
            shape: (B, ...).
            generator: drawn from, on its own device; without one, a freshly seeded generator on `device`.
            device: where the result lies; the generator's device by default.
            t: where the run starts, if not at t_max.
        """
        generator = drawn_from(generator, device or "cpu")
        std = self.prior_std if t is None else self.prior_std_at(t)
        x = std * torch.randn(tuple(shape), generator=generator, dtype=dtype, device=generator.device)
        return x if device is None else x.to(device)

    def prior_log_prob(self, x: Tensor, own: Own | None = None) -> Tensor:
        """log N(x; 0, prior_std^2 I) in nats, shape (B,), for x of shape (B, ...); of the items' own entries."""
        own, z = own or Own(x.shape), x / self.prior_std
        return -0.5 * own.sum(z**2) - own.dims * (math.log(self.prior_std) + 0.5 * math.log(2 * math.pi))


class VariancePreserving(SDE):
    """alpha^2 + sigma^2 = 1, by B(t) = int_0^t beta: alpha = e^{-B/2}, f = -beta / 2, g^2 = beta."""

    @abstractmethod
    def beta(self, t: Time) -> Tensor:
        """Noise rate beta(t), per unit of time."""

    @abstractmethod
    def integrated_beta(self, t: Time) -> Tensor:
        """B(t) = int_0^t beta = -2 log alpha."""

    @abstractmethod
    def time_at_integrated_beta(self, integrated_beta: Tensor) -> Tensor:
        """Inverse of `integrated_beta`."""

    def alpha(self, t: Time) -> Tensor:
        return (-self.integrated_beta(t) / 2).exp()

    def sigma(self, t: Time) -> Tensor:
        return (-torch.expm1(-self.integrated_beta(t))).sqrt()

    def half_log_snr(self, t: Time) -> Tensor:
        B = self.integrated_beta(t)
        return -(B + (-torch.expm1(-B)).log()) / 2

    def time_at(self, half_log_snr: Time) -> Tensor:
        minus_log_snr = -2 * as_time(half_log_snr)
        return self.time_at_integrated_beta(torch.logaddexp(minus_log_snr, torch.zeros_like(minus_log_snr)))

    def width_at(self, t: float) -> float:
        return math.sqrt(1 + (self.data_scale**2 - 1) * float(self.alpha(t)) ** 2)

    def drift(self, t: Time) -> Tensor:
        return -self.beta(t) / 2

    def diffusion(self, t: Time) -> Tensor:
        return self.beta(t).sqrt()

    def alpha_dot(self, t: Time) -> Tensor:
        """alpha', finite at alpha = 0 too, where f is not."""
        return self.drift(t) * self.alpha(t)

    def rates(self, t: Time) -> tuple[Tensor, Tensor]:
        alpha_dot = self.alpha_dot(t)
        # f sigma + g^2 / (2 sigma) would cancel where B is large
        return alpha_dot, -self.alpha(t) * alpha_dot / self.sigma(t)
