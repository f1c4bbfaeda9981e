"""What an audited sampler is given, and what is watched of it: the model that it asks, and the noise that it draws.

A sampler is seen from the outside only. The model that it asks of x_0 writes down at which times, and of which states,
it was asked. Noise is taken where PyTorch makes it, whatever generator it is from, so that it can be another: the same
for a sample alone and in a batch, or a unit in one direction.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from scoresde.denoiser import Denoiser, Posterior
from scoresde.sde import SDE
from scoresde.tensors import Time, as_time
from scoresde.views import VIEWS

__all__ = ["PREDICTIONS", "Draws", "Form", "Given", "Model", "TooMany", "generators", "run_form"]

PREDICTIONS = tuple(name for name in VIEWS if name != "velocity")
"""What a model can be asked for: views that need no more than alpha and sigma."""


class TooMany(RuntimeError):
    """A sampler asked more often than it may."""


class Model:
    """The model of one run of a sampler: `model(x, t)` is the prediction at x_t = alpha x_0 + sigma eps.

    Args:
        denoiser: what is known of x_0.
        predicts: what a call returns: "x0", "eps", "score" or "v".
        most: evaluations after which it answers no more.

    Attributes:
        denoiser, sde, predicts: as given. On an `EDMSDE`, t is sigma: that is what samplers in sigmas see.
        asked: time of each evaluation, as it was asked for.
        states: the state of each evaluation, if `keep`.
    """

    def __init__(self, denoiser: Denoiser, predicts: str = "x0", *, most: int = 10**6, keep: bool = False) -> None:
        self.denoiser, self.sde, self.predicts, self.most, self.keep = denoiser, denoiser.sde, predicts, most, keep
        self.asked: list[float] = []
        self.states: list[Tensor] = []

    def __call__(self, x: Tensor, t: Time, **ignored: Any) -> Tensor:
        """The prediction, shape of x; t of one entry or one per sample."""
        return self.view(self.predicts, x, t)

    @property
    def nfe(self) -> int:
        """Evaluations so far."""
        return len(self.asked)

    def view(self, name: str, x: Tensor, t: Time) -> Tensor:
        """The prediction of that name; a time outside [0, t_limit] is written down, and answered at the nearest."""
        at = as_time(t).detach().to(torch.float64).reshape(-1)
        self.asked.append(float(at[0]) if bool((at == at[0]).all()) else math.nan)
        if self.nfe > self.most:
            raise TooMany(f"more than {self.most} evaluations")
        if self.keep:
            self.states.append(x.detach().clone())
        at = at.nan_to_num(nan=self.sde.t_max).clamp(0.0, self.sde.t_limit)
        if len(at) == 1:
            at = at[0]
        if name == "x0":
            return self.denoiser(x, at).mean
        return self.denoiser.view(name, x, at.clamp(min=1e-12 * self.sde.t_max))


Run = Callable[[Model, Tensor, Tensor, int], Any]
"""A sampler: (model, x_T, times or sigmas, nfe) to x, or (x, evaluations claimed)."""


@dataclass(frozen=True)
class Form:
    """A sampler of any library, in the one form that is audited.

    Attributes:
        name: what the page calls it.
        run: (model, x_T, times, nfe) to x, or (x, evaluations that it claims to have made). The times decrease, x_T
            stands at the first, and x is to stand at the last; nfe is their number less one.
        takes: "sigmas", x = x_0 + sigma eps, or "times" of `model.sde`.
        order: the order of convergence that it claims, or None.
        predicts: what its model may predict.
        as_used: for those that make their own grid: (model, x_T or None, steps) to (x, labels, sigmas), see `forms`.
        about: the package and its version.
        leaves: what its use changes of its own options for good.
    """

    name: str
    run: Run
    takes: str = "sigmas"
    order: int | None = None
    predicts: tuple[str, ...] = ("x0",)
    as_used: Callable[..., Any] | None = None
    about: str = ""
    leaves: str = ""


class Given(Denoiser):
    """Answers whatever it is asked with tensors that are fixed beforehand, one a call."""

    def __init__(self, sde: SDE, answer: Callable[[int, Tensor], Tensor]) -> None:
        self.sde, self.answer, self.calls = sde, answer, 0

    def posterior(self, x: Tensor, t: Time, /, **cond: Any) -> Posterior:
        self.calls += 1
        return Posterior(self.answer(self.calls - 1, x))


_NORMAL = {"randn", "randn_like", "normal", "normal_", "normal_functional"}
_OTHER = {"rand", "rand_like", "uniform_", "bernoulli", "bernoulli_", "randint", "randint_like", "random_", "randperm",
          "multinomial", "exponential_", "cauchy_", "log_normal_", "geometric_", "poisson"}  # fmt: skip


class Draws(TorchDispatchMode):
    """Within it, standard normal numbers are those of `replace(k, z)`: k counts the draws, the same numbers drawn again
    (a Brownian tree goes back to a seed) being the same draw, and z is what was drawn.

    Attributes:
        shapes: of each draw.
        other: names of the functions that drew anything but normal numbers.
    """

    def __init__(self, replace: Callable[[int, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.replace, self.other = replace, set[str]()
        self.shapes: list[tuple[int, ...]] = []
        self.drawn: list[Tensor] = []
        self._known: dict[bytes, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        if name not in _NORMAL:
            self.other |= {name} & _OTHER
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        if not isinstance(out, Tensor) or not out.is_floating_point():
            return out
        mean, std = _scale(name, args, kwargs)
        z = (out - mean) / std
        key = z.detach().double().cpu().numpy().tobytes()
        k = self._known.setdefault(key, len(self._known))
        if k == len(self.shapes):
            self.shapes.append(tuple(out.shape))
            self.drawn.append(z.detach().clone())
        if self.replace is not None:
            out.copy_(self.replace(k, z) * std + mean)
        return out


def _scale(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """Mean and standard deviation of a draw."""
    if name not in ("normal_", "normal", "normal_functional"):
        return 0.0, 1.0
    given: list[Any] = list(args[1:] if name != "normal" else args)
    mean = kwargs.get("mean", given[0] if given else 0.0)
    std = kwargs.get("std", given[1] if len(given) > 1 else 1.0)
    return mean, std


@contextmanager
def generators() -> Iterator[Callable[[], list[str]]]:
    """Within it, a function that names the global generators whose state has changed since; they are set back at the
    end.
    """
    numpys: Any = np.random.get_state()  # noqa: NPY002
    ours, pythons = torch.get_rng_state(), random.getstate()

    def changed() -> list[str]:
        now: Any = np.random.get_state()  # noqa: NPY002
        return [
            name
            for name, same in (
                ("torch's", torch.equal(ours, torch.get_rng_state())),
                ("numpy's", np.array_equal(numpys[1], now[1]) and numpys[2] == now[2]),
                ("Python's", pythons == random.getstate()),
            )
            if not same
        ]

    try:
        yield changed
    finally:
        torch.set_rng_state(ours)
        np.random.set_state(numpys)  # noqa: NPY002
        random.setstate(pythons)


def run_form(form: Form, model: Model, x_T: Tensor, times: Tensor, seed: int | None = 0) -> tuple[Tensor, int | None]:
    """One run, without gradients, of global generators with that seed: x, and the evaluations claimed."""
    if seed is not None:
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
    with torch.no_grad():
        out = form.run(model, x_T, times, len(times) - 1)
    x, claimed = out if isinstance(out, tuple) else (out, None)
    if not isinstance(x, Tensor):
        raise TypeError(f"{form.name} returned {type(x).__name__}: expected a tensor, or (tensor, evaluations)")
    return x, None if claimed is None else int(claimed)
