"""Forward processes of whole states, 0 to K - 1 in each entry, each entry by itself:

    q(x_t = j | x_s = i) = Q_{s,t}[i, j]         Q_{r,t} = Q_{r,s} Q_{s,t}

and what follows from these matrices. With L_k = q(x_t | x_0 = k), the likelihood of a state, and probabilities p_k of
x_0 given x_t, the step back is, by Bayes' rule,

    p(x_s = j | x_t) = sum_k q(x_s = j | x_t, x_0 = k) p_k = Q_{s,t}[j, x_t] sum_k (p_k / L_k) Q_{0,s}[k, j]

Two families are closed forms at every time. A state is kept with probability a_t (`kept`, falling from 1), and else
drawn anew from pi:

    Q_{s,t} = (a_t / a_s) I + (1 - a_t / a_s) 1 pi'

- uniform: pi is 1 / K each (Sohl-Dickstein et al., 2015, for K = 2, the binomial process; Hoogeboom et al., 2021);
- absorbing: pi is a further state, the mask, which x_0 never has (Austin et al., 2021, D3PM).

With c = 1 - a in place of time, the entry jumps back from x to y != x, per unit of c, at the rate

    r_y = pi_x (w_y + (1 - a) / a pi_y sum_k w_k),    w_k = p_k / L_k

if p are probabilities of x_0 (a vector of zeros and a one where x_0 is known). The divergence of two such processes is,
per unit of c, sum_y r_y log(r_y / r'_y) - r_y + r'_y (Campbell et al., 2022): what the bound integrates. For the mask
it is cross-entropy / c (Sahoo et al., 2024; Shi et al., 2024). It does not depend on how a falls in time.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from scoresde.checks import ArgumentError, check_count, check_option
from scoresde.sde import Forward
from scoresde.tensors import Time, as_time, drawn_from, known_any, precise, same

__all__ = ["KEPT", "CategoricalProcess", "drawn", "kl"]

KEPT: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "linear": (lambda u: 1 - u, lambda a: 1 - a),
    "cosine": (lambda u: torch.cos(math.pi / 2 * u) ** 2, lambda a: torch.acos(a.sqrt()) * 2 / math.pi),
    "sine": (lambda u: 1 - torch.sin(math.pi / 2 * u), lambda a: torch.asin(1 - a) * 2 / math.pi),
}
"""Schedules by name: a of u = t / t_max, and its inverse. "linear" is the binomial process's, of T steps beta_t =
1 / (T - t + 1), and that of most masked models; "cosine" Nichol and Dhariwal's, which multinomial diffusion has; "sine"
masks cos(pi / 2 (1 - u)) of the entries, as MaskGIT does (Chang et al., 2022)."""
KEPT["binomial"] = KEPT["linear"]


class CategoricalProcess(Forward):
    """A forward process of whole states. Make one by `uniform`, `absorbing` or `chain`.

    x is an integer tensor (B, ...), of any rank; probabilities have one dimension more, the last. Times are () or (B,).

    Attributes:
        states: K, how many x_0 may have: 0 to K - 1.
        size: how many x_t may have: K, or K + 1 with a mask.
        mask: the state K that is one, or None.
        steps: T of a chain, whose times are 0, 1, ..., T; None in continuous time, from 0 to 1.
        prior_probs: law of an entry of x_T, float64, shape (size,).

    >>> process = CategoricalProcess.uniform(states=2, steps=100)  # the binomial process
    >>> process.marginal(torch.tensor([[1]]), 50)[0, 0].tolist()
    [0.25, 0.75]
    """

    states: int
    size: int
    mask: int | None = None
    steps: int | None
    prior_probs: Tensor

    @classmethod
    def uniform(cls, states: int = 2, schedule: str = "binomial", steps: int | None = None) -> CategoricalProcess:
        """A state that is not kept is any of the K, each as likely.

        Args:
            states: K, at least 2.
            schedule: a name in `KEPT`.
            steps: T of a chain; in continuous time without.

        Raises:
            ValueError: on another schedule, or fewer states.
        """
        return _Kept("uniform", states, schedule, steps)

    @classmethod
    def absorbing(cls, states: int = 2, schedule: str = "linear", steps: int | None = None) -> CategoricalProcess:
        """A state that is not kept is the mask, state K, for good.

        Args:
            states: K, of data, without the mask.
            schedule, steps: as for `uniform`.
        """
        return _Kept("absorbing", states, schedule, steps)

    @classmethod
    def chain(cls, matrices: Tensor) -> CategoricalProcess:
        """A chain of any matrices, multiplied in float64.

        Args:
            matrices: Q_1, ..., Q_T, shape (T, K, K): entry i, j of Q_t is q(x_t = j | x_{t-1} = i). Their rows sum to
                one. (That is the transpose of what acts on columns of probabilities, which raises no error where the
                columns sum to one as well.) The product should forget x_0: the prior is the mean of its rows.

        Raises:
            ValueError: on another shape, or if a row is no distribution.
        """
        return _Matrices(matrices)

    @abstractmethod
    def likelihood(self, x: Tensor, t: Time, dtype: torch.dtype = torch.float64) -> Tensor:
        """L, q(x_t = x | x_0 = k) of each k, shape (*x.shape, states)."""

    @abstractmethod
    def marginal(self, x0: Tensor, t: Time, dtype: torch.dtype = torch.float64) -> Tensor:
        """q(x_t | x_0), shape (*x0.shape, size)."""

    @abstractmethod
    def matrix(self, s: float, t: float) -> Tensor:
        """Q_{s,t}, float64, shape (size, size), on the host."""

    @abstractmethod
    def _to_s(self, w: Tensor, s: Time) -> Tensor:
        """sum_k w_k Q_{0,s}[k, j], shape (..., size)."""

    @abstractmethod
    def _from_s(self, x: Tensor, s: Time, t: Time, dtype: torch.dtype) -> Tensor:
        """Q_{s,t}[j, x] of each j, shape (*x.shape, size)."""

    def weights(self, x: Tensor, p: Tensor, t: Time) -> Tensor:
        """w = p / L, zero where x is impossible, shape of p: where L is zero, p is, for a posterior."""
        L = self.likelihood(x, t, p.dtype)
        possible = L > 0
        return torch.where(possible, p / torch.where(possible, L, 1), 0)

    def reverse(self, x: Tensor, p: Tensor, t: Time, s: Time) -> Tensor:
        """p(x_s | x_t) where x_0 has probabilities p given x_t, s < t: shape (*x.shape, size), in the dtype of p. With
        `onehot(x0)` for p it is q(x_s | x_t, x_0).
        """
        return self._to_s(self.weights(x, p, t), s) * self._from_s(x, s, t, p.dtype)

    def onehot(self, x0: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """Probabilities that know x_0, shape (*x0.shape, states)."""
        return F.one_hot(x0.long(), self.states).to(dtype)

    def perturb(self, x0: Tensor, t: Time, noise: Tensor) -> Tensor:
        """A draw of x_t given x_0, int64.

        Args:
            x0: data, integers, shape (B, ...).
            t: time, shape () or (B,).
            noise: standard normal, shape of x0, as an SDE's is: its distribution function makes the draw.

        Raises:
            ValueError: if x0 is not whole or outside 0 to K - 1, or the shapes do not fit.
        """
        self.check(x0)
        if noise.shape != x0.shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, x0 {tuple(x0.shape)}: they must be equal")
        return drawn(self.marginal(x0, t, _widest(x0)), noise)

    def prior(
        self,
        shape: Sequence[int],
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """A draw of x_T, int64, of that shape."""
        generator = drawn_from(generator, device or "cpu")
        return self.prior_of(torch.randn(tuple(shape), generator=generator, device=generator.device))

    def prior_of(self, noise: Tensor) -> Tensor:
        """The draw of x_T that standard normal numbers make."""
        probs = self.prior_probs.to(device=noise.device, dtype=_widest(noise))
        return drawn(probs.expand(*noise.shape, self.size), noise)

    def check(self, x: Tensor, masked: bool = False, name: str = "x0") -> None:
        """Raises ValueError unless x is a batch of whole states; the mask is one only if masked."""
        if not isinstance(x, Tensor) or x.is_floating_point() or x.is_complex() or x.ndim == 0:
            found = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} is {found}: expected whole states, an integer tensor (B, ...)")
        most = self.size if masked else self.states
        if x.dtype != torch.bool and known_any((x < 0) | (x >= most)):
            raise ValueError(f"{name} runs from {int(x.min())} to {int(x.max())}: {self!r} has states 0 to {most - 1}")

    # ---- in terms of c = 1 - a, of the two families alone ----

    def rates(self, x: Tensor, p: Tensor, t: Time) -> Tensor:
        """Rates of jumps back from x, per unit of c = 1 - a: r_y, and zero where y is x, shape (*x.shape, size).

        Raises:
            ValueError: of a chain of matrices, which has no continuous time.
        """
        raise ValueError(f"{self!r} is a chain of matrices: it has no rates of continuous time")

    def kept(self, t: Time) -> Tensor:
        """a_t, shape of t, float64: from 1 at t = 0 to 0 at t_max, both exactly.

        Raises:
            ValueError: as `rates`.
        """
        raise ValueError(f"{self!r} is a chain of matrices: it has no rates of continuous time")

    def time_at(self, c: Tensor) -> Tensor:
        """The time at which 1 - a is c, float64.

        Raises:
            ValueError: as `rates`.
        """
        raise ValueError(f"{self!r} is a chain of matrices: it has no rates of continuous time")

    def rate_divergence(self, x0: Tensor, x: Tensor, p: Tensor, t: Time) -> Tensor:
        """sum_y r_y log(r_y / r'_y) - r_y + r'_y, r given x_0 and r' given p: nats per unit of c, shape of x."""
        r, ours = self.rates(x, self.onehot(x0, p.dtype), t), self.rates(x, p, t)
        jumps = r > 0
        log = torch.where(jumps, ours, 1).log() - torch.where(jumps, r, 1).log()
        return torch.where(jumps, r * (torch.expm1(log) - log), ours).sum(-1)

    def divergence(self, x0: Tensor, x: Tensor, p: Tensor, t: Time, s: Time) -> Tensor:
        """KL(q(x_s | x_t, x_0) | p(x_s | x_t)), nats, shape of x."""
        return kl(self.reverse(x, self.onehot(x0, p.dtype), t, s), self.reverse(x, p, t, s))

    def prior_divergence(self, x0: Tensor) -> Tensor:
        """KL(q(x_T | x_0) | prior), shape of x0, float64."""
        dtype = _widest(x0)
        return kl(self.marginal(x0, self.t_max, dtype), self.prior_probs.to(device=x0.device, dtype=dtype))

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and same(vars(self), vars(other))

    def __hash__(self) -> int:
        return hash((type(self), self.states, self.steps))


class _Kept(CategoricalProcess):
    """A state is kept, or drawn anew from pi."""

    def __init__(self, kind: str, states: int, schedule: str, steps: int | None) -> None:
        check_count(states=states)
        if states < 2:
            raise ArgumentError(f"states={states}: expected 2 or more")
        check_option(KEPT, schedule=schedule)
        if steps is not None:
            check_count(steps=steps)
        self.kind, self.states, self.schedule, self.steps = kind, states, schedule, steps
        self.size = states + (kind == "absorbing")
        self.mask = states if kind == "absorbing" else None
        self.t_max = 1.0 if steps is None else float(steps)
        self.t_min = 1e-5 if steps is None else 1.0
        self.nodes = None if steps is None else torch.arange(1, steps + 1, dtype=torch.float64, device="cpu")
        each = [1 / states] * states if self.mask is None else [0.0] * states + [1.0]
        self.prior_probs = torch.tensor(each, dtype=torch.float64, device="cpu")

    def kept(self, t: Time) -> Tensor:
        u = precise(t) / self.t_max
        a = KEPT[self.schedule][0](u)
        return torch.where(u >= 1, 0.0, torch.where(u <= 0, 1.0, a))

    def time_at(self, c: Tensor) -> Tensor:
        return self.t_max * KEPT[self.schedule][1](1 - as_time(c).double())

    def _pi(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return self.prior_probs.to(device=x.device, dtype=dtype)

    def likelihood(self, x: Tensor, t: Time, dtype: torch.dtype = torch.float64) -> Tensor:
        x = x.long()
        a, other = _column(self.kept(t), x, dtype), _column(1 - self.kept(t), x, dtype)
        return a * F.one_hot(x, self.size)[..., : self.states] + other * self._pi(x, dtype)[x][..., None]

    def marginal(self, x0: Tensor, t: Time, dtype: torch.dtype = torch.float64) -> Tensor:
        return self._to_s(self.onehot(x0, dtype), t)

    def matrix(self, s: float, t: float) -> Tensor:
        a = self.kept(t) / self.kept(s)
        return a * torch.eye(self.size, dtype=torch.float64, device="cpu") + (1 - a) * self.prior_probs

    def _to_s(self, w: Tensor, s: Time) -> Tensor:
        a, other = (_column(f, w[..., 0], w.dtype) for f in (self.kept(s), 1 - self.kept(s)))
        return a * F.pad(w, (0, self.size - self.states)) + other * self._pi(w, w.dtype) * w.sum(-1, keepdim=True)

    def _from_s(self, x: Tensor, s: Time, t: Time, dtype: torch.dtype) -> Tensor:
        x, share = x.long(), self.kept(t) / self.kept(s)
        a, other = _column(share, x, dtype), _column(1 - share, x, dtype)
        return a * F.one_hot(x, self.size) + other * self._pi(x, dtype)[x][..., None]

    def rates(self, x: Tensor, p: Tensor, t: Time) -> Tensor:
        x, w, pi = x.long(), self.weights(x, p, t), self._pi(x, p.dtype)
        to = F.pad(w, (0, self.size - self.states))
        if self.mask is None:  # of the mask this is a jump from itself to itself
            to = to + _column((1 - self.kept(t)) / self.kept(t), x, p.dtype) * pi * w.sum(-1, keepdim=True)
        return torch.where(F.one_hot(x, self.size) == 1, 0, pi[x][..., None] * to)

    def __repr__(self) -> str:
        steps = "" if self.steps is None else f", steps={self.steps}"
        return f"CategoricalProcess.{self.kind}(states={self.states}, schedule={self.schedule!r}{steps})"


class _Matrices(CategoricalProcess):
    """A chain of any matrices."""

    def __init__(self, matrices: Tensor) -> None:
        Q = torch.as_tensor(matrices, dtype=torch.float64, device="cpu").detach()
        if Q.ndim != 3 or Q.shape[1] != Q.shape[2] or not len(Q) or Q.shape[1] < 2:
            raise ArgumentError(f"matrices has shape {tuple(Q.shape)}: expected (T, K, K), K >= 2")
        if not bool((Q >= 0).all()) or not torch.allclose(Q.sum(2), torch.ones_like(Q[..., 0]), atol=1e-9):
            raise ArgumentError("matrices: each row must be a distribution, entries >= 0 of sum 1 (rows are x_{t-1})")
        self.matrices, self.steps, self.states = Q.clone(), len(Q), Q.shape[1]
        self.size, self.t_min, self.t_max = self.states, 1.0, float(len(Q))
        self.nodes = torch.arange(1, len(Q) + 1, dtype=torch.float64, device="cpu")
        whole = [torch.eye(self.states, dtype=torch.float64, device="cpu")]
        for one in Q:
            whole.append(whole[-1] @ one)
        self._whole = torch.stack(whole)
        self.prior_probs = whole[-1].mean(0)

    def _node(self, t: Time) -> Tensor:
        t = as_time(t)
        if known_any((t != t.round()) | (t < 0) | (t > self.t_max)):
            raise ValueError(f"t = {t.tolist()}: {self!r} is known at its nodes 0, 1, ..., {self.steps} alone")
        return t.long()

    def _at(self, t: Time, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Q_{0,t}, shape (K, K), or (B, ..., K, K) that broadcasts to x."""
        n = self._node(t).to(like.device)
        Q = self._whole.to(device=like.device, dtype=dtype)[n]
        return Q if n.ndim == 0 else Q.reshape(len(n), *[1] * (like.ndim - 1), *Q.shape[1:])

    def likelihood(self, x: Tensor, t: Time, dtype: torch.dtype = torch.float64) -> Tensor:
        hot = F.one_hot(x.long(), self.size).to(dtype)[..., None]
        return (self._at(t, x, dtype) @ hot)[..., 0]

    def marginal(self, x0: Tensor, t: Time, dtype: torch.dtype = torch.float64) -> Tensor:
        return self._to_s(self.onehot(x0, dtype), t)

    def matrix(self, s: float, t: float) -> Tensor:
        found = torch.eye(self.states, dtype=torch.float64, device="cpu")
        for one in self.matrices[int(self._node(s)) : int(self._node(t))]:
            found = found @ one
        return found

    def _to_s(self, w: Tensor, s: Time) -> Tensor:
        return (w[..., None, :] @ self._at(s, w[..., 0], w.dtype))[..., 0, :]

    def _from_s(self, x: Tensor, s: Time, t: Time, dtype: torch.dtype) -> Tensor:
        pairs = torch.stack(torch.broadcast_tensors(self._node(s).cpu(), self._node(t).cpu()), -1).reshape(-1, 2)
        unique, which = pairs.unique(dim=0, return_inverse=True)
        Q = torch.stack([self.matrix(*pair) for pair in unique.tolist()])[which].to(device=x.device, dtype=dtype)
        Q = Q.reshape(len(pairs), *[1] * (x.ndim - 1), *Q.shape[1:])
        return (Q @ F.one_hot(x.long(), self.size).to(dtype)[..., None])[..., 0]

    def __repr__(self) -> str:
        return f"CategoricalProcess.chain(matrices of {self.states} states, {self.steps} steps)"

    def frozen_state(self) -> dict[str, Any]:
        """All but what follows from it (see `scoresde.tensors.frozen`)."""
        return {"matrices": self.matrices}


def _widest(x: Tensor) -> torch.dtype:
    """float64, or float32 on a device that has none."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def _column(c: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A coefficient, () or (B,), as it multiplies probabilities of x."""
    c = c.to(dtype=dtype, device=x.device)
    return c.reshape(-1, *[1] * x.ndim) if c.ndim else c


def drawn(probs: Tensor, noise: Tensor) -> Tensor:
    """States of those probabilities, by inversion: int64, of the shape of the noise. No state of probability zero.

    Args:
        probs: >= 0, shape (*noise.shape, K), float64, of any sum.
        noise: standard normal; Phi of it is uniform.
    """
    total = probs.cumsum(-1)
    u = torch.special.ndtr(noise.to(total.dtype)).clamp(max=1 - 2 * torch.finfo(total.dtype).eps)
    return (total <= (u * total[..., -1])[..., None]).sum(-1).clamp(max=probs.shape[-1] - 1)


def kl(q: Tensor, p: Tensor) -> Tensor:
    """sum_j q_j log(q_j / p_j) over the last dimension; infinite where p is zero and q is not."""
    there = q > 0
    p = p.expand_as(q)
    return torch.where(there, q * (torch.where(there, q, 1).log() - torch.where(there, p, 1).log()), 0).sum(-1)
