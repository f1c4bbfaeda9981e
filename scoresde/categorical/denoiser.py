"""Denoisers of whole states: what is known of x_0 given x_t is probabilities, and there is no score and no eps.

`StateDenoiser` is what `sample`, `elbo` and the `Trainer` ask of one. A network is adapted by `CategoricalDenoiser`:

    p(x_0 = k | x_t) ~ q(x_t | x_0 = k) exp(logit_k)          each entry by itself

so that the network says what the other entries, the time and the conditions tell of an entry, and what it shows itself
is counted exactly: a network whose logits are all zero has the exact posterior of independent, uniform data. In a
masked process a state that is seen is kept, and the mask is never predicted (the two rules of Sahoo et al., 2024,
section 3.2.3, both of which follow). The probability of an item is the product over its entries: what a step
of many entries at once leaves out, and why more steps are better.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from scoresde.categorical.process import CategoricalProcess, drawn
from scoresde.checks import check_option
from scoresde.errors import given_to
from scoresde.networks import Encodes, Holder, first_parameter
from scoresde.sde import Forward
from scoresde.tensors import Time, as_time, dtype_of_label, precise, shown
from scoresde.views import check_time

__all__ = ["CategoricalDenoiser", "CategoricalPosterior", "ProbabilityDenoiser", "StateDenoiser", "logits_of"]
__all__ += ["label_of", "wide"]

P = TypeVar("P")


@shown
class CategoricalPosterior(NamedTuple):
    """What is known of x_0 given x_t.

    Attributes:
        log_probs: log p(x_0 = k | x_t) of each entry, shape (*x.shape, states); minus infinity for what cannot be.
    """

    log_probs: Tensor

    @property
    def probs(self) -> Tensor:
        """p(x_0 = k | x_t), shape (*x.shape, states)."""
        return self.log_probs.exp()


class StateDenoiser(Holder, ABC, Generic[P]):
    """A model that steps from x_t to x_s, some of whose entries are whole states. P is what an evaluation finds.

    Its noise is standard normal numbers of the shape of x, as a solver's: where a state is drawn, Phi of them is.
    Probabilities and divergences are float64.

    Attributes:
        process: the forward process.
    """

    process: Forward
    no_numbers: ClassVar[str] = (  # where a `scoresde.Denoiser` is asked for
        "it is of whole states (scoresde.categorical), which have no score and no eps; sample, elbo, Trainer and "
        "ClassifierFree take it"
    )

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return torch.device("cpu")

    def prepared(self, cond: Mapping[str, Any] | None) -> dict[str, Any]:
        """The conditions of a run as its evaluations take them: see `scoresde.Denoiser.prepared`."""
        return dict(cond or {})

    @abstractmethod
    def predicted(self, x: Tensor, t: Time, /, **cond: Any) -> P:
        """One evaluation, at x and t that are checked."""

    @abstractmethod
    def finite(self, found: P) -> Tensor:
        """Whether the evaluation is a number for each item, bool, shape (B,)."""

    @abstractmethod
    def check(self, x: Tensor, noisy: bool = False, name: str = "x0") -> None:
        """Raises ValueError unless x is a batch of data, or, if noisy, of x_t."""

    @abstractmethod
    def prior_of(self, noise: Tensor, t: float) -> Tensor:
        """The draw of x_T that standard normal numbers make, of a run that starts at t."""

    @abstractmethod
    def perturb(self, x0: Tensor, t: Time, noise: Tensor) -> Tensor:
        """The draw of x_t given x_0."""

    @abstractmethod
    def back(self, x: Tensor, found: P, t: Time, s: Time, noise: Tensor) -> Tensor:
        """The draw of x_s given x_t, s < t; at s = 0 of the data."""

    # ---- the bound, nats of each item, float64 or as what was found, shape (B,) ----

    @abstractmethod
    def prior_term(self, x0: Tensor, t: float) -> Tensor:
        """-KL(q(x_t | x_0) | prior), of a run that starts at t."""

    @abstractmethod
    def step_term(self, x0: Tensor, x: Tensor, found: P, t: Time, s: Time) -> Tensor:
        """-KL(q(x_s | x_t, x_0) | p(x_s | x_t))."""

    @abstractmethod
    def last_term(self, x0: Tensor, x: Tensor, found: P, t: Time) -> Tensor:
        """log p(x_0 | x_t)."""

    @property
    @abstractmethod
    def ends(self) -> tuple[float, float]:
        """(start, last) of continuous time: the integral's ends; where last > 0, the decoder's step is left."""

    @abstractmethod
    def times(self, u: Tensor) -> Tensor:
        """Times of continuous time by numbers in [0, 1): quantiles of the density that `rate_term` reckons with. In c =
        1 - a that of states is u^2: near the data an entry is another with probability c, and then its term is about 1
        / c, so that its mean square is 1 / c and the density of least variance 1 / sqrt(c).
        """

    @abstractmethod
    def rate_term(self, x0: Tensor, x: Tensor, found: P, t: Time) -> Tensor:
        """What the denoising term of the bound is the mean of over `times`."""


class ProbabilityDenoiser(StateDenoiser[Tensor]):
    """A denoiser whose evaluation is log p(x_0 | x_t). Subclasses set `process` and implement `log_probs`.

    Call it as `denoiser(x, t, **cond)` with integers x (B, ...) and t () or (B,).

    Raises:
        ValueError: if x is not whole, has no such state, or t is outside [0, t_max].
    """

    process: CategoricalProcess

    @abstractmethod
    def log_probs(self, x: Tensor, t: Time, /, **cond: Any) -> Tensor:
        """log p(x_0 | x_t), shape (*x.shape, states), of x and t that are checked."""

    def __call__(self, x: Tensor, t: Time, **cond: Any) -> CategoricalPosterior:
        self.check(x, noisy=True, name="x")
        check_time(t, len(x), self.process)
        return CategoricalPosterior(self.log_probs(x, t, **cond))

    def predicted(self, x: Tensor, t: Time, /, **cond: Any) -> Tensor:
        return self.log_probs(x, t, **cond)

    def finite(self, found: Tensor) -> Tensor:
        return ~found.isnan().reshape(len(found), -1).any(1)

    def check(self, x: Tensor, noisy: bool = False, name: str = "x0") -> None:
        self.process.check(x, noisy, name)

    def prior_of(self, noise: Tensor, t: float) -> Tensor:
        return self.process.prior_of(noise)

    def perturb(self, x0: Tensor, t: Time, noise: Tensor) -> Tensor:
        return self.process.perturb(x0, t, noise)

    def back(self, x: Tensor, found: Tensor, t: Time, s: Time, noise: Tensor) -> Tensor:
        p = wide(found).exp()
        landed = not isinstance(s, Tensor) and s == 0
        return drawn(p if landed else self.process.reverse(x, p, t, s), noise)

    def prior_term(self, x0: Tensor, t: float) -> Tensor:
        if t < self.process.t_max:
            raise ValueError(
                f"a bound from t = {t}: expected a grid from t_max = {self.process.t_max}, the prior's time"
            )
        return -_sum(self.process.prior_divergence(x0))

    def step_term(self, x0: Tensor, x: Tensor, found: Tensor, t: Time, s: Time) -> Tensor:
        return -_sum(self.process.divergence(x0, x, found.exp(), t, s))

    def last_term(self, x0: Tensor, x: Tensor, found: Tensor, t: Time) -> Tensor:
        return _sum(found.gather(-1, x0.long()[..., None])[..., 0])

    @property
    def ends(self) -> tuple[float, float]:
        return self.process.t_max, 0.0

    def times(self, u: Tensor) -> Tensor:
        return self.process.time_at(u.square())

    def rate_term(self, x0: Tensor, x: Tensor, found: Tensor, t: Time) -> Tensor:
        term = -_sum(self.process.rate_divergence(x0, x, found.exp(), t))
        weight = 2 * (1 - self.process.kept(t)).sqrt()  # dc / du
        return weight.to(term) * term


class CategoricalDenoiser(ProbabilityDenoiser):
    """A network as a denoiser of whole states.

    Args:
        net: any callable `net(x, time, **cond)` that returns logits, shape (*x.shape, states); with a mask also
            (*x.shape, states + 1), the last of which is not looked at. `scoresde.nn.OneHot` makes one of a network for
            floating-point data. x are the states themselves, int64.
        process: the `CategoricalProcess` that it was trained on.
        time: the network's label of t, as for `scoresde.NetworkDenoiser`; by default t itself.
        logits: what they are of: "others", of p(x_0) as the other entries tell it, so that q(x_t | x_0) comes on top;
            or "posterior", of p(x_0 | x_t) itself, as D3PM's are, where only what cannot be is left out. The wrong one
            raises no error: samples stay too noisy, or are sharpened twice.

    Raises:
        TypeError: if net is not callable, or process none.
        ValueError: by the call, if the network returns another shape.

    >>> process = CategoricalProcess.absorbing(states=3)
    >>> denoiser = CategoricalDenoiser(lambda x, time: torch.zeros(*x.shape, 3), process)
    >>> denoiser(torch.tensor([[2, 3]]), 0.5).probs.float()  # one that is seen, and a mask
    tensor([[[0.0000, 0.0000, 1.0000],
             [0.3333, 0.3333, 0.3333]]])
    """

    def __init__(
        self,
        net: Callable[..., Tensor],
        process: CategoricalProcess,
        *,
        time: Callable[[Tensor], Tensor] | None = None,
        logits: Literal["others", "posterior"] = "others",
    ) -> None:
        if not callable(net):
            raise TypeError(f"net is {type(net).__name__}: expected a callable net(x, time, **cond)")
        if not isinstance(process, CategoricalProcess):
            raise TypeError(f"process is {type(process).__name__}: expected CategoricalProcess.uniform(...), say")
        check_option(("others", "posterior"), logits=logits)
        self.net, self.process, self.time, self.logits = net, process, time, logits

    @property
    def device(self) -> torch.device:
        parameter = first_parameter(self.net)
        return torch.device("cpu") if parameter is None else parameter.device

    def with_net(self, net: Callable[..., Tensor]) -> CategoricalDenoiser:
        """The same denoiser around another network, an averaged copy say."""
        return CategoricalDenoiser(net, self.process, time=self.time, logits=self.logits)

    def prepared(self, cond: Mapping[str, Any] | None) -> dict[str, Any]:
        return self.net.encode(**(cond or {})) if isinstance(self.net, Encodes) else dict(cond or {})

    def label(self, t: Tensor) -> Tensor:
        """The network's time label of t, float64 of shape (B,)."""
        return t if self.time is None else self.time(t)

    def log_probs(self, x: Tensor, t: Time, /, **cond: Any) -> Tensor:
        found = self.net(x.long(), label_of(self, x, t), **cond)
        return logits_of(found, self.process, x, t, self.logits, self.net).log_softmax(-1)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.net).__name__}, {self.process!r})"


def label_of(denoiser: Any, x: Tensor, t: Time) -> Tensor:
    """What the network of a denoiser is told of t, shape (B, ...)."""
    label = denoiser.label(precise(t).reshape(-1))
    parameter = first_parameter(denoiser.net)
    dtype = torch.float32 if parameter is None else parameter.dtype
    found: Tensor = label.to(device=x.device, dtype=dtype_of_label(label, dtype))
    return found.expand(len(x), *label.shape[1:])


def logits_of(found: object, process: CategoricalProcess, x: Tensor, t: Time, kind: str, net: object) -> Tensor:
    """Logits of the posterior, float32 or wider, shape (*x.shape, states).

    Raises:
        ValueError: if what the network found has another shape.
    """
    K, size = process.states, process.size
    if not isinstance(found, Tensor) or found.shape[:-1] != x.shape or found.shape[-1] not in (K, size):
        what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        error = ValueError(f"the network returned {what} for x of shape {tuple(x.shape)}: expected logits "
                           f"{(*x.shape, K)}")  # fmt: skip
        error.add_note(given_to(net, x, as_time(t), {}))
        raise error
    found = found[..., :K].to(torch.promote_types(found.dtype, torch.float32))
    L = process.likelihood(x, t, found.dtype)
    return torch.where(L > 0, found + L.log() if kind == "others" else found, -torch.inf)


def wide(x: Tensor) -> Tensor:
    """Probabilities in float64, in float32 on a device that has none."""
    return x if x.device.type == "mps" else x.double()


def _sum(x: Tensor) -> Tensor:
    """Of each item, shape (B,)."""
    return x.reshape(len(x), -1).sum(1)
