"""Items of a continuous and a categorical part, each with a process of its own, in one time and under one denoiser.

    q(x_t, c_t | x_0, c_0) = q(x_t | x_0) q(c_t | c_0)        p(x_s, c_s | x_t, c_t) = p(x_s | .) p(c_s | .)

Given what the denoiser finds, which sees both parts, the steps of the two are independent, so every term of the bound
is the sum of its two parts. In continuous time the integrals are over lambda and over c = 1 - a, and t has one
density for each, in which that part has a small variance: times are drawn of both, half and half.

An item is one floating-point tensor (C, ...): its first `continuous` channels or columns are numbers, the others whole
states, written as numbers, which float32 holds exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from scoresde.categorical.denoiser import StateDenoiser, label_of, logits_of
from scoresde.categorical.process import CategoricalProcess, drawn
from scoresde.checks import ArgumentError, check_count, check_option
from scoresde.errors import not_finite, some
from scoresde.networks import Encodes, first_parameter
from scoresde.sde import SDE, Forward
from scoresde.tensors import Time, check_batch, expand_like, precise, shown
from scoresde.views import VIEWS, check_time, mean_of_view

__all__ = ["ProductDenoiser", "ProductPosterior", "ProductProcess"]


class ProductProcess(Forward):
    """A continuous and a categorical process in one time.

    Args:
        sde: of the first channels or columns.
        process: of the others: in continuous time with an SDE, or both chains of as many steps.
        continuous: n, how many are of the SDE, at least 1.

    Where the columns have different numbers of states, `process` has the largest: a masked one never shows a state that
    a column has not.

    Raises:
        TypeError: if they are no such processes.
        ValueError: if they do not have the same times.

    >>> from scoresde import VPSDE
    >>> ProductProcess(VPSDE(), CategoricalProcess.absorbing(states=3), continuous=2).t_max
    1.0
    """

    def __init__(self, sde: SDE, process: CategoricalProcess, continuous: int) -> None:
        if not isinstance(sde, SDE) or not isinstance(process, CategoricalProcess):
            raise TypeError(f"expected an SDE and a CategoricalProcess, not {sde!r} and {process!r}")
        check_count(continuous=continuous)
        if sde.t_max != process.t_max or (sde.nodes is None) != (process.steps is None):
            raise ArgumentError(
                f"{sde!r} has times to {sde.t_max:g} and {process!r} to {process.t_max:g}: a product has one time, "
                "VPSDE() with CategoricalProcess.absorbing(states), say"
            )
        self.sde, self.process, self.continuous = sde, process, continuous
        self.t_min, self.t_max, self.nodes = max(sde.t_min, process.t_min), sde.t_max, sde.nodes

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The numbers, and the states, int64."""
        return x[:, : self.continuous], x[:, self.continuous :].round().long()

    def check(self, x: Tensor, masked: bool = False, name: str = "x0") -> None:
        """Raises ValueError unless x is a floating-point batch with whole states in its later columns."""
        check_batch(x, name)
        if x.ndim < 2 or x.shape[1] <= self.continuous:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: expected (B, C, ...), C > {self.continuous}")
        if bad := not_finite(x):
            raise ValueError(f"{name} is not finite in items {some(bad)}")
        if not torch.equal(x[:, self.continuous :], self.split(x)[1].to(x.dtype)):
            raise ValueError(f"{name}[:, {self.continuous}:] are no whole states")
        self.process.check(self.split(x)[1], masked, name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ProductProcess) and all(
            getattr(self, name) == getattr(other, name) for name in ("sde", "process", "continuous")
        )

    def __hash__(self) -> int:
        return hash((self.sde, self.process, self.continuous))

    def __repr__(self) -> str:
        return f"ProductProcess({self.sde!r}, {self.process!r}, continuous={self.continuous})"


@shown
class ProductPosterior(NamedTuple):
    """What is known of x_0 given x_t.

    Attributes:
        mean: E[x_0 | x_t] of the numbers, shape (B, n, ...).
        log_probs: log p(x_0 = k | x_t) of the states, shape (B, C - n, ..., states).
    """

    mean: Tensor
    log_probs: Tensor


class ProductDenoiser(StateDenoiser[ProductPosterior]):
    """A network as a denoiser of both parts.

    Args:
        net: any callable `net(x, states, time, **cond)` that returns what it predicts of the numbers, of their shape,
            and logits of the states, (*states.shape, K). `scoresde.nn.Columns` makes one of a network for vectors.
        process: the `ProductProcess`.
        predicts: of the numbers: "eps", "x0", "v", "score" or "velocity".
        time: the network's label of t, by default t itself.

    Call it as `denoiser(x, t, **cond)`.

    Raises:
        ValueError: if what it predicts says nothing of x_0 at t_max (eps, where alpha is zero).
    """

    process: ProductProcess

    def __init__(
        self,
        net: Callable[..., tuple[Tensor, Tensor]],
        process: ProductProcess,
        *,
        predicts: str = "eps",
        time: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if not callable(net) or not isinstance(process, ProductProcess):
            raise TypeError(f"expected a callable and a ProductProcess, not {type(net).__name__} and {process!r}")
        check_option(VIEWS, predicts=predicts)
        self.net, self.process, self.predicts, self.time = net, process, predicts, time
        r, s = mean_of_view(predicts, process.sde, torch.tensor(process.t_max, dtype=torch.float64))
        if not bool(r.isfinite() & s.isfinite()):
            raise ArgumentError(f"predicts={predicts!r} says nothing of x_0 at t_max of {process.sde!r}: take 'v'")

    @property
    def device(self) -> torch.device:
        parameter = first_parameter(self.net)
        return torch.device("cpu") if parameter is None else parameter.device

    def with_net(self, net: Callable[..., Any]) -> ProductDenoiser:
        """The same denoiser around another network."""
        return ProductDenoiser(net, self.process, predicts=self.predicts, time=self.time)

    def prepared(self, cond: Mapping[str, Any] | None) -> dict[str, Any]:
        return self.net.encode(**(cond or {})) if isinstance(self.net, Encodes) else dict(cond or {})

    def label(self, t: Tensor) -> Tensor:
        """The network's time label of t, float64 of shape (B,)."""
        return t if self.time is None else self.time(t)

    def __call__(self, x: Tensor, t: Time, **cond: Any) -> ProductPosterior:
        self.check(x, noisy=True, name="x")
        check_time(t, len(x), self.process)
        return self.predicted(x, t, **cond)

    def predicted(self, x: Tensor, t: Time, /, **cond: Any) -> ProductPosterior:
        y, c = self.process.split(x)
        dtype = getattr(first_parameter(self.net), "dtype", y.dtype)
        N, logits = self.net(y.to(dtype), c, label_of(self, x, t), **cond)
        if N.shape != y.shape:
            raise ValueError(f"the network returned {tuple(N.shape)} for numbers of shape {tuple(y.shape)}")
        r, s = mean_of_view(self.predicts, self.process.sde, precise(t))
        mean = expand_like(r, y) * y + expand_like(s, y) * N.to(y.dtype)
        return ProductPosterior(mean, logits_of(logits, self.process.process, c, t, "others", self.net).log_softmax(-1))

    def finite(self, found: ProductPosterior) -> Tensor:
        mean, log_probs = (part.reshape(len(part), -1) for part in found)
        return mean.isfinite().all(1) & ~log_probs.isnan().any(1)

    def check(self, x: Tensor, noisy: bool = False, name: str = "x0") -> None:
        self.process.check(x, noisy, name)

    def _joined(self, y: Tensor, c: Tensor) -> Tensor:
        return torch.cat([y, c.to(y.dtype)], 1)

    def prior_of(self, noise: Tensor, t: float) -> Tensor:
        n, parts = self.process.continuous, self.process
        return self._joined(noise[:, :n] * parts.sde.prior_std_at(t), parts.process.prior_of(noise[:, n:]))

    def perturb(self, x0: Tensor, t: Time, noise: Tensor) -> Tensor:
        (y, c), n, parts = self.process.split(x0), self.process.continuous, self.process
        y = y.to(noise.dtype)
        return self._joined(parts.sde.perturb(y, t, noise[:, :n]), parts.process.perturb(c, t, noise[:, n:]))

    def back(self, x: Tensor, found: ProductPosterior, t: Time, s: Time, noise: Tensor) -> Tensor:
        (y, c), n, sde = self.process.split(x), self.process.continuous, self.process.sde
        alpha_t, sigma_t, alpha_s, sigma_s = (f(precise(time)) for time in (t, s) for f in (sde.alpha, sde.sigma))
        left = (alpha_t * sigma_s / (alpha_s * sigma_t)) ** 2
        drawn_y = expand_like(alpha_t / alpha_s * (sigma_s / sigma_t) ** 2, y) * y
        drawn_y = drawn_y + expand_like(alpha_s * (1 - left), y) * found.mean.to(y.dtype)
        drawn_y = drawn_y + expand_like(sigma_s * (1 - left).sqrt(), y) * noise[:, :n].to(y.dtype)
        p = found.log_probs.to(noise.dtype).exp()
        return self._joined(drawn_y, drawn(self.process.process.reverse(c, p, t, s), noise[:, n:]))

    # ---- the bound: the sum of those of the parts ----

    def parts(self, x0: Tensor, x: Tensor, found: ProductPosterior, t: Time, s: Time) -> tuple[Tensor, Tensor]:
        """`step_term` of the numbers and of the states."""
        (y, c), c_t, sde = self.process.split(x0), self.process.split(x)[1], self.process.sde
        t, s, error = precise(t), precise(s), _square(y - found.mean)
        lands, rise = s == 0, (sde.alpha(s) / sde.sigma(s)) ** 2 - (sde.alpha(t) / sde.sigma(t)) ** 2
        step = -_like(torch.where(lands, 0, rise), error) * error / 2
        numbers = torch.where(lands.to(error.device), self._decoded(y, found, t), step)
        states = self.process.process.divergence(c, c_t, found.log_probs.exp(), t, s)
        return numbers, -_total(states)

    def _decoded(self, y: Tensor, found: ProductPosterior, t: Time) -> Tensor:
        """log N(x_0; D, (sigma / alpha)^2), the decoder of `scoresde.elbo` in continuous time."""
        std = expand_like((-self.process.sde.half_log_snr(precise(t))).exp(), y)
        log: Tensor = Normal(found.mean.to(y.dtype), std.to(y.device)).log_prob(y)
        return _total(log)

    def prior_term(self, x0: Tensor, t: float) -> Tensor:
        (y, c), sde = self.process.split(x0), self.process.sde
        law = Normal(float(sde.alpha(t)) * y.double(), float(sde.sigma(t)))
        prior = Normal(torch.zeros_like(law.mean), sde.prior_std_at(t))
        numbers, states = kl_divergence(law, prior), self.process.process.prior_divergence(c)
        return -_total(numbers) - _total(states)

    def step_term(self, x0: Tensor, x: Tensor, found: ProductPosterior, t: Time, s: Time) -> Tensor:
        numbers, states = self.parts(x0, x, found, t, s)
        return numbers + states

    def last_term(self, x0: Tensor, x: Tensor, found: ProductPosterior, t: Time) -> Tensor:
        return self.step_term(x0, x, found, t, 0.0)

    @property
    def ends(self) -> tuple[float, float]:
        return self.process.t_max, self.process.t_min

    def _spans(self) -> tuple[Tensor, float]:
        """lambda at the two ends, and sqrt(c) at t_min; where alpha is zero at t_max, lambda begins at -9."""
        ends = torch.tensor(self.ends, dtype=torch.float64, device="cpu")
        first = 1 - self.process.process.kept(ends[1])
        return self.process.sde.half_log_snr(ends).clamp(min=-9), float(first.sqrt())

    def times(self, u: Tensor) -> Tensor:
        (low, high), first = self._spans()
        sde, process = self.process.sde, self.process.process
        by_lambda = sde.time_at(low + (high - low) * (2 * u).clamp(max=1))
        by_c = process.time_at((first + (1 - first) * (2 * u - 1).clamp(min=0)) ** 2)
        return torch.where(u < 0.5, by_lambda, by_c).clamp(*reversed(self.ends))

    def _rates(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-lambda', c' and the density of `times`, at t: float64."""
        sde, process, ((low, high), first) = self.process.sde, self.process.process, self._spans()
        alpha_dot, sigma_dot = sde.rates(t)
        fall = sigma_dot / sde.sigma(t) - alpha_dot / sde.alpha(t)
        rise = torch.func.jvp(lambda time: 1 - process.kept(time), (t,), (torch.ones_like(t),))[1]
        width = (high - low).to(t.device)
        by_lambda = torch.where(sde.half_log_snr(t) >= low.to(t.device), fall / width, 0)
        by_c = rise / (2 * (1 - process.kept(t)).sqrt() * (1 - first))
        return fall, rise, (by_lambda + by_c) / 2

    def rate_term(self, x0: Tensor, x: Tensor, found: ProductPosterior, t: Time) -> Tensor:
        (y, c), c_t, sde, t = self.process.split(x0), self.process.split(x)[1], self.process.sde, precise(t)
        fall, rise, density = self._rates(t)
        error = _square(y - found.mean)
        states = _total(self.process.process.rate_divergence(c, c_t, found.log_probs.exp(), t))
        numbers = _like((sde.alpha(t) / sde.sigma(t)) ** 2 * fall / density, error) * error
        return -numbers - _like(rise / density, error) * states

    def __repr__(self) -> str:
        return f"ProductDenoiser({type(self.net).__name__}, {self.process!r}, predicts={self.predicts!r})"


def _total(x: Tensor) -> Tensor:
    """Of each item, shape (B,)."""
    return x.reshape(len(x), -1).sum(1)


def _square(x: Tensor) -> Tensor:
    return _total(x.square())


def _like(c: Tensor, x: Tensor) -> Tensor:
    """A coefficient, () or (B,), as it multiplies numbers of items, (B,)."""
    return c.to(device=x.device, dtype=x.dtype)
