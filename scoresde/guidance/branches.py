"""Several evaluations of one state, of the same network under other conditions or of other models, that a guidance
combines: evaluated in as few calls as can be, and brought to what one of the networks predicts.

With D = r x + s N for one and D_i = r_i x + s_i N_i for another, D_i is what the first would have called

    N = ((r_i - r) / s) x + (s_i / s) N_i
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from scoresde.codecs import Codec
from scoresde.denoiser import Denoiser, Posterior, check_denoiser
from scoresde.entries import check_cond, counted, joined, leaves, like, mapped
from scoresde.guidance.base import known_all, ratio
from scoresde.tensors import Time, precise
from scoresde.views import VIEWS, Affine, combine, mean_of_view
from scoresde.wrappers import SameMean, Wrapper

__all__ = [
    "Branch",
    "Branching",
    "Call",
    "Combined",
    "Conditioned",
    "evaluate",
    "nested",
    "replaced",
    "samples_of",
    "times_of",
    "translated",
]

Branch = tuple[Denoiser, Mapping[str, Any]]
"""A denoiser and the conditions that it is evaluated under."""

Call = Callable[[Denoiser, Tensor, Mapping[str, Any]], Tensor]
"""call(denoiser, x, cond): its output N at the time of the evaluation; x may hold the batch several times over."""

Combined = Callable[..., Tensor]
"""combined(F_1, F_2, ...): what is made of the branches' predictions, each of the shape of x."""


_OWN, _BRANCHES, NULL = "own, prepared", "branches, prepared", "null, prepared"
"""Where `prepared` keeps what the denoisers in a wrapper are given of their own, beside the conditions of the call: in
`Conditioned`, in a `Branching`, and of D_0 in `ClassifierFree`. No keyword of a network is called so."""


class Conditioned(SameMean):
    """A denoiser under conditions of its own: one network, several models.

    Args:
        denoiser: the denoiser to wrap.
        drop: names of conditions that it is not given.
        cond: conditions that it is given in place of the call's, for all samples or with an entry per sample
            (`scoresde.entries`): a number, a string or a tensor is shaped like what it stands for.

    Raises:
        TypeError: if denoiser is none.
        ValueError: if a condition is both given and dropped; by the call, if it has neither one entry nor one per
            sample.

    >>> from scoresde import EpsDenoiser, VPSDE
    >>> denoiser = EpsDenoiser(lambda x, t, label: x * label, VPSDE())
    >>> Conditioned(denoiser, label=3).eps(torch.ones(2, 1), 0.5).flatten()
    tensor([3., 3.])
    """

    masks = True

    def __init__(self, denoiser: Denoiser, drop: Sequence[str] = (), **cond: Any) -> None:
        super().__init__(denoiser)
        self.drop, self.cond = (drop,) if isinstance(drop, str) else tuple(drop), cond
        if both := [name for name in self.drop if name in cond]:
            raise ValueError(f"conditions {both} are both given and dropped")

    def conditions(self, cond: Mapping[str, Any], x: Tensor) -> Mapping[str, Any]:
        """What the wrapped denoiser is given where the call has these conditions."""
        own: Mapping[str, Any] = cond[_OWN] if _OWN in cond else self._changed(cond, x.shape[0])
        return own

    def _changed(self, cond: Mapping[str, Any], n: int) -> dict[str, Any]:
        kept = {name: value for name, value in cond.items() if name not in self.drop}
        return replaced(kept, self.cond, n)

    def prepared(self, cond: Mapping[str, Any] | None) -> dict[str, Any]:
        """Its own conditions are encoded once as well, and go with the others from then on."""
        given = dict(cond or {})
        told = self._changed(given, samples_of(given, self.cond))
        found = self.denoiser.prepared(told)
        if found.keys() == told.keys():  # nothing was encoded
            return given
        return {k: v for k, v in given.items() if k in found or k not in told} | {_OWN: found}

    def posterior(self, x: Tensor, t: Time, /, **cond: Any) -> Posterior:
        return self.denoiser.posterior(x, t, **self.conditions(cond, x))

    def view(self, name: str, x: Tensor, t: Time, /, **cond: Any) -> Tensor:
        return self.denoiser.view(name, x, t, **self.conditions(cond, x))

    def output(self, x: Tensor, t: Time, /, **cond: Any) -> Tensor:
        return self.denoiser.output(x, t, **self.conditions(cond, x))

    def outputs(self, times: Tensor) -> Callable[[int, Tensor, Mapping[str, Any]], Tensor]:
        output = self.denoiser.outputs(times)
        return lambda i, x, cond: output(i, x, self.conditions(cond, x))

    def __repr__(self) -> str:
        given = mapped(lambda v: f"tensor of {tuple(v.shape)}" if isinstance(v, Tensor) else repr(v), self.cond)
        return f"Conditioned({self.denoiser!r}, drop={self.drop!r}{''.join(f', {k}={v}' for k, v in given.items())})"


class Branching(Wrapper):
    """A wrapper that combines branches. A subclass gives `branches`.

    Args:
        denoisers: all that branches are of. The codec handed on is that of the first that has one.
        steps_in: the view that it combines, and steps in; None for what the first denoiser's network predicts.
        batched: whether branches of one denoiser are evaluated in one call.

    The posterior variance is passed on where one branch runs alone, else None.

    Raises:
        TypeError: if one is no denoiser.
        ValueError: if there is none, or they are of different SDEs.
    """

    def __init__(self, denoisers: Sequence[Denoiser], steps_in: str | None = None, batched: bool = True) -> None:
        if not denoisers:
            raise ValueError(f"{type(self).__name__} was given no denoiser")
        super().__init__(denoisers[0])
        for other in denoisers[1:]:
            check_denoiser(other, type(self).__name__)
            if other.sde != self.sde:
                raise ValueError(f"denoisers of {self.sde!r} and of {other.sde!r}: they must have one SDE")
        self.denoisers, self.steps_in, self.batched = tuple(denoisers), steps_in, batched

    @property
    def codec(self) -> Codec | None:
        return next((denoiser.codec for denoiser in self.denoisers if denoiser.codec is not None), None)

    @property
    def borrowed(self) -> bool:
        return any(denoiser.borrowed for denoiser in self.denoisers)

    def prepared(self, cond: Mapping[str, Any] | None) -> dict[str, Any]:
        """Each denoiser's own, which go with what no one encodes from then on."""
        given = dict(cond or {})
        made = {id(denoiser): denoiser.prepared(given) for denoiser in self.denoisers}
        if all(found.keys() == given.keys() for found in made.values()):
            return given
        kept = {k: v for k, v in given.items() if all(k in found for found in made.values())}
        return kept | {_BRANCHES: {str(i): made[id(denoiser)] for i, denoiser in enumerate(self.denoisers)}}

    def told(self, denoiser: Denoiser, cond: Mapping[str, Any]) -> Mapping[str, Any]:
        """The conditions of one of the denoisers: what it has prepared, where it has."""
        if _BRANCHES not in cond:
            return cond
        number = next(i for i, other in enumerate(self.denoisers) if other is denoiser)
        own: Mapping[str, Any] = cond[_BRANCHES][str(number)]
        return own

    @abstractmethod
    def branches(self, x: Tensor, t: Time, cond: Mapping[str, Any]) -> tuple[list[Branch], Combined | None]:
        """The branches that are evaluated at t, and what is made of their predictions in the view that this steps in;
        None, and one branch, where it is known on the host that only that one counts.
        """

    def posterior(self, x: Tensor, t: Time, /, **cond: Any) -> Posterior:
        branches, combined = self.branches(x, t, cond)
        if combined is None:
            return branches[0][0].posterior(x, t, **branches[0][1])
        r, s = self.affine(t)
        return Posterior(combine(r, x, s, self.output(x, t, **cond)))

    def view(self, name: str, x: Tensor, t: Time, /, **cond: Any) -> Tensor:
        branches, combined = self.branches(x, t, cond)
        if combined is None:
            return branches[0][0].view(name, x, t, **branches[0][1])
        return super().view(name, x, t, **cond)

    def output(self, x: Tensor, t: Time, /, **cond: Any) -> Tensor:
        def call(denoiser: Denoiser, many: Tensor, cond: Mapping[str, Any]) -> Tensor:
            return denoiser.output(many, times_of(t, many.shape[0] // x.shape[0]), **cond)

        return self._output(x, t, cond, call)

    def outputs(self, times: Tensor) -> Callable[[int, Tensor, Mapping[str, Any]], Tensor]:
        numbers = times.tolist()
        known = {id(root): root.outputs(times) for root in map(_root, self.denoisers)}

        def at(i: int, x: Tensor, cond: Mapping[str, Any]) -> Tensor:
            return self._output(x, numbers[i], cond, lambda denoiser, x, cond: known[id(denoiser)](i, x, cond))

        return at

    def _output(self, x: Tensor, t: Time, cond: Mapping[str, Any], call: Call) -> Tensor:
        branches, combined = self.branches(x, t, cond)
        found = evaluate(branches, x, call, self.batched)
        F = [self._own(N, denoiser, x, t) for N, (denoiser, _) in zip(found, branches, strict=True)]
        return F[0] if combined is None else combined(*F)

    def _own(self, N: Tensor, source: Denoiser, x: Tensor, t: Time) -> Tensor:
        """What a branch predicted, in what this steps in; of a view 0 where sigma is, and nothing is known of it."""
        if self.steps_in is None:
            return translated(N, source, self.denoiser, x, t)
        m, k, l = VIEWS[self.steps_in](self.sde, precise(t))  # noqa: E741
        u, w = source.view_of_output(ratio(k, m), ratio(l, m), t)
        return combine(u, x, w, N)

    def affine(self, t: Time) -> Affine:
        return self.denoiser.affine(t) if self.steps_in is None else mean_of_view(self.steps_in, self.sde, precise(t))

    def check_times(self, t: Tensor) -> None:
        for denoiser in self.denoisers:
            denoiser.check_times(t)
        self.affine(t)


def evaluate(branches: Sequence[Branch], x: Tensor, call: Call, batched: bool) -> list[Tensor]:
    """The outputs N_i of the branches, each what its own network predicts: the branches of one denoiser in one call on
    the batch as often as there are branches, if batched and their conditions allow it, else one call after the other.
    """
    branches = [_unwrapped(branch, x) for branch in branches]
    found: list[Tensor | None] = [None] * len(branches)
    for i, (denoiser, cond) in enumerate(branches):
        if found[i] is not None:
            continue
        mine = [k for k, (other, _) in enumerate(branches) if other is denoiser]
        together = joined([branches[k][1] for k in mine], x) if batched and len(mine) > 1 else None
        if together is None:
            N = call(denoiser, x, cond)
            # A further call may be one of the same network, which may reuse the memory of its output.
            found[i] = N if i == len(branches) - 1 else N.clone()
        else:
            N = call(denoiser, torch.cat([x] * len(mine)), together)
            N = N if len(mine) == len(branches) else N.clone()
            for k, part in zip(mine, N.split(x.shape[0]), strict=True):
                found[k] = part
    return [N for N in found if N is not None]


def times_of(t: Time, k: int) -> Time:
    """The times of a batch that is repeated k times."""
    return t.repeat(k) if isinstance(t, Tensor) and t.ndim == 1 and len(t) > 1 else t


def translated(N: Tensor, source: Denoiser, target: Denoiser, x: Tensor, t: Time) -> Tensor:
    """What the target's network would have predicted for the D that the source's network did."""
    if source is target:
        return N
    (r, s), (r_i, s_i) = target.affine(t), source.affine(t)
    if known_all((r == r_i) & (s == s_i)):
        return N
    return combine(ratio(r_i - r, s), x, ratio(s_i, s), N)


def replaced(cond: Mapping[str, Any], values: Mapping[str, Any], n: int) -> dict[str, Any]:
    """The conditions of n samples with some of them replaced: each by itself, or shaped like what it replaces
    (`entries.like`).

    Raises:
        ValueError: if a value does not fit, or other tokens would be counted by the mask of those that they replace.
    """
    own = isinstance(values.get("context"), Tensor) and "context_mask" not in values
    if own and cond.get("context_mask") is not None:
        raise ValueError(
            "context is replaced, and its context_mask is not: give both, scoresde.nn.padded(tokens, length=N) with "
            "the N of what they replace"
        )
    made = dict(cond)
    for name, value in values.items():
        if name in cond:
            made[name] = like(cond[name], value, n, name)
        else:
            check_cond({name: value}, n)
            made[name] = value
    return made


def nested(cond: Mapping[str, Any]) -> bool:
    """Whether some of what was prepared is of denoisers further inside, whose conditions these no more are."""
    return not cond.keys().isdisjoint((_OWN, _BRANCHES, NULL))


def samples_of(*conds: Mapping[str, Any] | None) -> int:
    """How many samples conditions are for, as far as they say it: the most entries that one has, at least 1."""
    counts = [counted(leaf) for cond in conds for leaf in leaves(dict(cond or {}))]
    return max((n for n in counts if n is not None), default=1)


def _root(denoiser: Denoiser) -> Denoiser:
    while isinstance(denoiser, Conditioned):
        denoiser = denoiser.denoiser
    return denoiser


def _unwrapped(branch: Branch, x: Tensor) -> Branch:
    """The branch with the conditions of `Conditioned` among its own."""
    denoiser, cond = branch
    while isinstance(denoiser, Conditioned):
        cond = denoiser.conditions(cond, x)
        denoiser = denoiser.denoiser
    return denoiser, cond
