"""What a step of training is made of: the loss as a module, autocast, and what was measured since the last report."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scoresde.categorical import CategoricalDenoiser, ProductDenoiser
from scoresde.denoiser import Denoiser, NetworkDenoiser, check_denoiser
from scoresde.masks import mask_name
from scoresde.networks import Encodes, seeded_global_generators
from scoresde.training import parallel
from scoresde.training.loss import Draws

__all__ = [
    "Autocast",
    "Interval",
    "Loss",
    "NonFiniteLossError",
    "Totals",
    "Trainable",
    "Worker",
    "check_trainable",
    "loss_of",
    "trial",
]

Trainable = NetworkDenoiser | CategoricalDenoiser | ProductDenoiser
"""Denoisers that are an adapter around a network: what a `Trainer` takes."""

Loss = Callable[[Any, Tensor, Draws, Mapping[str, Any]], Tensor]
"""loss(denoiser, x0, draws, cond) of a batch: a scalar, its mean over the items, drawn from `draws` alone: a generator,
or a `Part` where x0 is part of a batch."""


def check_trainable(denoiser: object) -> None:
    """What can be said of a denoiser before its first step.

    Raises:
        TypeError: if it is no denoiser.
        ValueError: if it is no adapter around an nn.Module, no parameter takes a gradient, or it could not be sampled
            from afterwards, by the sampler's own rule at t_max (an eps network where alpha is zero).
    """
    if not isinstance(denoiser, CategoricalDenoiser | ProductDenoiser):
        check_denoiser(denoiser, "Trainer")
    if not isinstance(denoiser, Trainable) or not isinstance(denoiser.net, nn.Module):
        hint = (
            "; for masks give that in it, with loss=masked_loss()"
            if isinstance(denoiser, Denoiser) and mask_name(denoiser)
            else ""
        )
        raise ValueError(
            f"a Trainer needs an adapter around an nn.Module, EpsDenoiser(net, sde) say, not {denoiser!r}{hint}"
        )
    if not any(parameter.requires_grad for parameter in denoiser.net.parameters()):
        raise ValueError(
            f"no parameter of {type(denoiser.net).__name__} takes a gradient: it is frozen, as scoresde.load makes it. "
            "Call requires_grad_(True) on the parts to be trained"
        )
    if isinstance(denoiser, NetworkDenoiser):
        denoiser.check_times(torch.tensor([denoiser.sde.t_max], dtype=torch.float64, device="cpu"))


class NonFiniteLossError(ArithmeticError):
    """The loss, or its gradient, became NaN or infinite; `step` says when. Nothing was saved since."""

    def __init__(self, step: int, value: float, what: str = "loss") -> None:
        super().__init__(
            f"the {what} is {value} at step {step}: training stopped, and the last checkpoint is from before it; lower "
            "the learning rate, or look at the data of that step"
        )
        self.step = step


class Worker(nn.Module):
    """The loss as a module: DistributedDataParallel then sees the whole of it, whichever way the loss calls the network
    (heads ask for two outputs)."""

    def __init__(self, net: nn.Module, denoiser: Trainable, loss: Loss) -> None:
        super().__init__()
        self.net, self._denoiser, self._loss = net, denoiser, loss

    def forward(self, x0: Tensor, draws: Draws, cond: Mapping[str, Any]) -> Tensor:
        return self._loss(self._denoiser, x0, draws, cond)


class Autocast(nn.Module):
    """A network in bfloat16 where autocast finds it safe; its output, or outputs, come back in float32."""

    def __init__(self, net: nn.Module, device: str) -> None:
        super().__init__()
        self.net, self._device = net, device
        if hasattr(net, "both"):
            self.both = self._both
        if isinstance(net, Encodes):
            self.encoders, self.encode = net.encoders, self._encode

    def forward(self, *given: Tensor, **cond: Any) -> Tensor | tuple[Tensor, ...]:
        with torch.autocast(self._device, torch.bfloat16):
            out: Tensor | tuple[Tensor, ...] = self.net(*given, **cond)
        return out.float() if isinstance(out, Tensor) else tuple(part.float() for part in out)

    def _both(self, x: Tensor, time: Tensor, **cond: Any) -> tuple[Tensor, Tensor]:
        with torch.autocast(self._device, torch.bfloat16):
            first, second = self.net.both(x, time, **cond)  # type: ignore[operator]
        return first.float(), second.float()

    def _encode(self, **cond: Any) -> dict[str, Any]:
        with torch.autocast(self._device, torch.bfloat16):
            return self.net.encode(**cond)  # type: ignore[operator]


def loss_of(found: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
    """A worker's loss, and the numbers that it tells of itself, where it does."""
    return found if isinstance(found, tuple) else (found, None)


def trial(worker: nn.Module, x0: Tensor, cond: Mapping[str, Any]) -> Callable[[], None]:
    """What a step costs: forward and backward on the CPU, with draws of its own."""

    def step() -> None:
        with seeded_global_generators(0, x0.device):
            loss_of(worker(x0, torch.Generator(x0.device).manual_seed(0), cond))[0].backward()

    return step


class Totals(NamedTuple):
    loss: float
    norm: float
    steps: int
    seconds: float
    told: dict[str, float]


class Interval:
    """The losses and gradient norms since the last report: on the device until they are read, once for many steps.

    Args:
        values: a row for each step before: its loss, the gradient's norm, what the loss told of itself, and the norms
            of further groups of parameters.
        told: names of what the loss tells.
    """

    def __init__(self, values: list[list[float]] | None = None, told: Sequence[str] = ()) -> None:
        self.values, self.told = [list(row) for row in values or []], tuple(told)
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._steps, self._start = 0, time.perf_counter()

    def start(self) -> None:
        """The clock starts now."""
        self._steps, self._start = 0, time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since then."""
        return time.perf_counter() - self._start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is not on the clock."""
        begin = time.perf_counter()
        yield
        self._start += time.perf_counter() - begin

    def add(self, loss: Tensor, norm: Tensor) -> None:
        """Of one step: this process's share of the loss, (), or with what it tells, (1 + K,); and the norm or norms."""
        self._pending.append((loss, norm))
        self._steps += 1

    def read(self, step: int) -> None:
        """Read what is on the device, `step` steps having been done, and add up the processes' shares.

        Raises:
            NonFiniteLossError: if a loss or a norm is not finite.
        """
        if not self._pending:
            return
        n, K = len(self._pending), len(self.told)
        losses = parallel.total(torch.stack([loss for loss, _ in self._pending])).reshape(n, 1 + K)
        norms = torch.stack([norm for _, norm in self._pending]).reshape(n, -1)
        rows = torch.cat([losses.double(), norms.to(losses.device).double()], 1)
        order = [0, 1 + K, *range(1, 1 + K), *range(2 + K, rows.shape[1])]
        found = rows[:, order].tolist()
        names = ["loss", "gradient's norm", *self.told, *(rows.shape[1] - 2 - K) * ["gradient's norm"]]
        for i, values in enumerate(found):
            for what, value in zip(names, values, strict=True):
                if not math.isfinite(value):
                    raise NonFiniteLossError(step - n + i, value, what)
        self.values += found
        self._pending = []

    def end(self) -> Totals:
        """Means of the interval, and the steps and seconds of this session's part of it; the next one begins."""
        loss, norm, *more = (math.fsum(column) / len(column) for column in zip(*self.values, strict=True))
        told = dict(zip(self.told, more, strict=False))
        found = Totals(loss, norm, self._steps, self.seconds, told)
        self.values = []
        self.start()
        return found
