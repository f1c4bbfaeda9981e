"""The trace of the derivative of a function from R^n to R^n, exact or by random probes, for a batch.

With J the derivative, and probes v with E[v v^T] = I, v^T J v is the trace on average (Hutchinson, 1990), with the
variance, for a symmetric J,

    Rademacher    v_i = +-1         2 (|J|_F^2 - sum_i J_ii^2)
    Gaussian      v ~ N(0, I)       2 |J|_F^2

which the products u = J v themselves tell, with n numbers for every probe: |u|^2 is |J|_F^2 on average, and with
d = v u and d' that of another probe, v_i = +-1,

    sum_i d_i^2 = |J|_F^2,    sum_i d_i d'_i = sum_i J_ii^2    on average

both taken of d less its mean over i, which leaves out much of their noise, and a share 2 / n of their difference.
(Where J is not symmetric this is an upper bound.) How well the variance is known they tell too, see `Spread`.

Hutch++ (Meyer, Musco, Musco and Woodruff, 2021) takes the trace on the range Q of J S, S a third of the probes,
exactly, with as many products, and probes the rest, (1 - Q Q^T) J (1 - Q Q^T), with another third: less where J has
few large directions. Here it does so with J less a multiple of the identity, which S tells: a denoiser's derivative is
often that and a few directions.

One call of the function gives its value and all products: by reverse mode, J^T v, whose quadratic form is the same, or
by forward mode, J v.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from scoresde.checks import ArgumentError, check_count, check_option
from scoresde.masks import Own
from scoresde.noise import Noise, as_source
from scoresde.tensors import shown

__all__ = ["Divergence", "Products"]

Function = Callable[[Tensor], Tensor]

_MOST = 2**24  # elements of the basis vectors that an exact trace passes at a time


@shown
class Products(NamedTuple):
    """What one evaluation gives: the value N, shape (B, ...); `base` + mean_k <v_k, u_k>, the estimates of the trace,
    with base of shape (B,) and v, u of shape (K, B, n), K = 0 where the trace is exact; the calls that it took; and the
    items' own entries, which stand first in v and u.
    """

    N: Tensor
    base: Tensor
    v: Tensor
    u: Tensor
    calls: int
    own: Own

    @property
    def trace(self) -> Tensor:
        """The estimate, shape (B,)."""
        return self.base + (self.own.total(self.v * self.u).mean(0) if len(self.v) else 0.0)


@dataclass(frozen=True)
class Divergence:
    """How a trace is taken.

    Args:
        kind: "exact", "hutchinson" or "hutch++".
        probes: K for each sample; multiples of three for "hutch++".
        distribution: of the probes, "rademacher" or "gaussian".
        mode: "vjp" (reverse) or "jvp" (forward, for which every operation of the network needs a forward derivative).
        chunk: directions differentiated at a time, by torch's vmap; 1 is a loop without it, for networks that vmap
            cannot batch. By default all probes, and for "exact" as many as fit.

    Raises:
        ValueError: on other words, or numbers that are not whole and >= 1.
    """

    kind: Literal["exact", "hutchinson", "hutch++"] = "hutchinson"
    probes: int = 1
    distribution: Literal["rademacher", "gaussian"] = "rademacher"
    mode: Literal["vjp", "jvp"] = "vjp"
    chunk: int | None = None

    def __post_init__(self) -> None:
        check_option(("exact", "hutchinson", "hutch++"), divergence=self.kind)
        check_option(("rademacher", "gaussian"), distribution=self.distribution)
        check_option(("vjp", "jvp"), mode=self.mode)
        check_count(probes=self.probes)
        if self.chunk is not None:
            check_count(chunk=self.chunk)
        if self.kind == "hutch++" and self.probes % 3:
            raise ArgumentError(f"probes={self.probes}: hutch++ takes a multiple of 3, a third for each of its parts")

    def within(self, n: int) -> Divergence:
        """The same for n dimensions: with as many probes as there are, or more, the exact trace is cheaper."""
        return replace(self, kind="exact") if self.kind == "hutchinson" and self.probes >= n > 1 else self

    def draw(self, x: Tensor, noise: Noise, row: int = 0) -> Tensor:
        """Probes for a batch, shape (P, *x.shape): K of them, for "hutch++" the two thirds that are random."""
        count = {"exact": 0, "hutchinson": self.probes, "hutch++": 2 * self.probes // 3}[self.kind]
        if count == 0:
            return x.new_empty(0, *x.shape)
        if self.distribution == "rademacher":
            return as_source(noise).signs(row, count, x)
        return torch.stack([noise(row, x) for _ in range(count)])

    def estimating(self, probes: Tensor) -> Tensor:
        """Those of the drawn probes that estimate, v of `Products`, (K, B, ...)."""
        return probes[len(probes) // 2 :] if self.kind == "hutch++" else probes

    def __call__(
        self,
        function: Function,
        x: Tensor,
        probes: Tensor,
        create_graph: bool = False,
        c: float = 0.0,
        own: Own | None = None,
    ) -> Products:
        """The value at x, shape (B, ...), and the trace of the derivative, each sample by itself.

        Args:
            function: of x, each sample's output depending on that sample alone.
            x: shape (B, ...).
            probes: of `draw`.
            create_graph: record gradients of all of it.
            c: J is taken to be about c times the identity: its trace is c n, and what is probed is the rest. (This
                changes nothing for Rademacher probes, and much for the others.)
            own: the entries that the trace is over, by default all; the function is zero at others.

        Raises:
            ValueError: if it is "hutch++", and there is a mask.
        """
        own, n = own or Own(x.shape), x[0].numel()
        if self.kind == "exact":
            return self._exact(function, x, create_graph, own)
        if self.kind == "hutch++" and own.mask is not None:
            raise ArgumentError(
                "hutch++ with masks: its directions are too many for small items; take hutchinson or exact"
            )
        differentiate = _Derivative(function, x, self.mode, self.chunk, create_graph, c)
        known, flat = x.new_zeros(len(x), dtype=torch.float64) + c * own.dims, partial(_flat, own)

        if self.kind == "hutchinson":
            u = differentiate(probes)
            return Products(differentiate.N, known, flat(probes), flat(u), differentiate.calls, own)
        # What the sketches find of the trace is taken out too, as a multiple delta of the identity for each sample, of
        # which no few directions are the range. Neither it nor Q has a gradient: whatever they are, the mean is right.
        S, v = flat(probes[: len(probes) // 2]), flat(self.estimating(probes))
        JS = flat(differentiate(probes[: len(probes) // 2])).detach()
        delta = (S * JS).sum(2).mean(0) / n
        Q, _ = torch.linalg.qr((JS - delta[:, None] * S).movedim(0, 2))  # (B, n, K / 3)

        def rest(w: Tensor) -> Tensor:
            """(J - c - delta) w for w of shape (K / 3, B, n)."""
            return flat(differentiate(w.reshape(-1, *x.shape).to(x.dtype))) - delta[:, None] * w

        def outside(w: Tensor) -> Tensor:
            """(1 - Q Q^T) w for w of shape (K / 3, B, n), Q^T w first."""
            return w - torch.einsum("bnq,kbq->kbn", Q, torch.einsum("bnq,kbn->kbq", Q, w))

        columns = Q.movedim(2, 0)
        inside = (columns * rest(columns)).sum((0, 2))
        u = outside(rest(outside(v)))
        return Products(differentiate.N, known + delta * n + inside, v, u, differentiate.calls, own)

    def _exact(self, function: Function, x: Tensor, create_graph: bool, own: Own) -> Products:
        n = own.most
        part = self.chunk or max(1, _MOST // x.numel())
        differentiate = _Derivative(function, x, self.mode, part, create_graph)
        diagonal = []
        for i in range(0, n, part):
            index = torch.arange(i, min(i + part, n), device=x.device)
            basis = torch.nn.functional.one_hot(index, n).to(x.dtype)  # (part, n)
            basis = own.placed(basis[:, None].expand(-1, len(x), n))
            u = _flat(own, differentiate(basis))
            diagonal.append(u[torch.arange(len(index), device=x.device), :, index])
        found = torch.cat(diagonal)  # of own entries, (n, B)
        trace = found.sum(0) if own.mask is None else own.total(found.T)
        empty = x.new_empty(0, len(x), n, dtype=torch.float64)
        return Products(differentiate.N, trace, empty, empty, differentiate.calls, own)


class _Derivative:
    """Products of the derivative at x, less c, with directions v (K, *x.shape): J^T v - c v, or J v - c v in forward
    mode. The function is called once in reverse mode; in forward mode once for each chunk.
    """

    def __init__(
        self, function: Function, x: Tensor, mode: str, chunk: int | None, create_graph: bool, c: float = 0.0
    ) -> None:
        self.function, self.mode, self.chunk, self.create_graph, self.c = function, mode, chunk, create_graph, c
        self.x = x if create_graph and x.requires_grad else x.detach()
        self.N: Tensor
        self.calls = 0
        if mode == "vjp":
            with torch.inference_mode(False), torch.enable_grad():
                self.x = self.x.clone() if self.x.is_inference() else self.x
                self.x = self.x if self.x.requires_grad else self.x.requires_grad_()
                self._output = self._call(self.x)
                if not self._output.requires_grad:
                    self._output = self._output.clone()  # a network may reuse the memory of its output
                    if not torch.equal(self._output, self._call(1.1 * self.x + 0.1)):
                        raise ValueError(
                            "the network's output has no derivative by x: it runs under no_grad or inference_mode, or "
                            "detaches x; take that away, or give mode='jvp'"
                        )
            self.N = self._output if create_graph else self._output.detach()

    def _call(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.function(x)

    def __call__(self, v: Tensor) -> Tensor:
        parts = v.split(self.chunk or max(1, len(v)))
        with torch.inference_mode(False):
            u = torch.cat([self._reverse(part) if self.mode == "vjp" else self._forward(part) for part in parts])
        return u - self.c * v if self.c else u

    def _reverse(self, v: Tensor) -> Tensor:
        if not self._output.requires_grad:  # a constant
            return torch.zeros_like(v)
        v = v.clone() if v.is_inference() else v
        single = len(v) == 1
        (u,) = torch.autograd.grad(
            self._output,
            self.x,
            v[0] if single else v,
            retain_graph=True,
            create_graph=self.create_graph,
            is_grads_batched=not single,
            materialize_grads=True,
        )
        return u[None] if single else u

    def _forward(self, v: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.create_graph):
            product: Any = partial(torch.func.jvp, self._call, (self.x,))
            if len(v) == 1:
                self.N, u = product((v[0],))
                return u[None]
            self.N, u = torch.func.vmap(lambda w: product((w,)), out_dims=cast(Any, (None, 0)), randomness="same")(v)
        return cast(Tensor, u)


def _flat(own: Own, v: Tensor) -> Tensor:
    """(K, B, ...) as (K, B, n), float64, own entries first."""
    return own.rows(v).double()
