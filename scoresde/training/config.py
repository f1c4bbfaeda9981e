"""What a run is, beside its model and data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any, Literal

from scoresde.checks import (
    ArgumentError,
    check_count,
    check_keys,
    check_nonnegative,
    check_option,
    check_positive,
    check_whole,
)
from scoresde.training.average import exponential
from scoresde.training.power import exponent, kept

__all__ = ["TrainConfig"]


@dataclass(frozen=True)
class TrainConfig:
    """What a run is, beside its model and data.

    Args:
        steps: optimiser steps in all.
        batch_size: items a step, in all processes together; a smaller data set is repeated.
        lr: learning rate of AdamW, reached linearly over `warmup` steps.
        warmup: steps.
        schedule: after the warm-up, "constant", or "cosine" down to zero at `steps`. A run may be resumed with other
            steps; the cosine is then theirs from there on, which a warning says.
        weight_decay: decoupled, as in AdamW.
        grad_clip: largest norm of the gradient; infinity for no limit.
        ema_decay: of the averaged weights, per step; early on min(ema_decay, (1 + n) / (10 + n)) after n steps. Several
            numbers for several averages.
        power: lengths of power averages (`scoresde.training.power`), in (0, 12^(-1/2)], as shares of training: with
            two, (0.05, 0.1) say, every other length can be had afterwards. They come after those of ema_decay.
        snapshot_every: steps between the snapshots of these that the run folder keeps for that, checkpoint_every by
            default; one is always written at the end. Each is written whole, before training goes on.
        seed: of everything random.
        checkpoint_every: steps between checkpoints; one is always written at the end.
        log_every: steps between readings of the loss.
        keep: checkpoints that are kept; older ones are removed once a new one stands.
        accumulate: parts that a step's batch is taken in, one after the other, to need less memory: at least so many in
            all processes together, as many in each. Changes the loss by rounding only (dropout's masks apart).
        precision: "float32", which is the network's own precision, or "bfloat16": the network under autocast, weights,
            loss and optimiser staying as they are.
        compile: the network by torch.compile; the name of a backend is taken too.
        evaluate_every: steps between evaluations, where the trainer has any; there is always one at the end.
        workers: processes that decode images, where the data are not in memory.
        tensorboard: write TensorBoard's files too, into the run folder.
        shard: of several processes each holds a part of the weights, gradients, optimiser and averages (FSDP2), and
            saves its own: for networks that do not fit into one. Without, each holds them whole (DDP). A run may go on
            either way.
        async_save: checkpoints are written in the background, from a copy in main memory, while training goes on; one
            at a time, and each counts once it is whole: a kill loses at most an interval and the steps that were done
            during one save.
        threads: of a CPU. By default, where the number is torch's own choice and no OMP_NUM_THREADS is set, a few steps
            are timed with one thread and with all of them, once, and the faster is taken, kept in the run folder
            (`threads.json`) and used again on resume: last bits may depend on it.

    Raises:
        ValueError: on a value out of its range.
    """

    steps: int
    batch_size: int = 128
    lr: float = 1e-3
    warmup: int = 100
    schedule: Literal["constant", "cosine"] = "cosine"
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    ema_decay: float | tuple[float, ...] = 0.999
    seed: int = 0
    checkpoint_every: int = 500
    log_every: int = 20
    keep: int = 3
    accumulate: int = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool | str = False
    evaluate_every: int | None = None
    workers: int = 2
    tensorboard: bool = False
    shard: bool = False
    async_save: bool = False
    threads: int | None = None
    power: tuple[float, ...] = ()
    snapshot_every: int | None = None

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "checkpoint_every", "log_every", "keep", "accumulate")
        own = {name: getattr(self, name) for name in (*counts, "evaluate_every", "threads", "snapshot_every")}
        check_count(**{name: n for name, n in own.items() if n is not None or name in counts})
        check_whole(warmup=self.warmup, seed=self.seed, workers=self.workers)
        check_nonnegative(weight_decay=self.weight_decay)
        check_positive(lr=self.lr)
        if not self.grad_clip > 0:
            raise ArgumentError(f"grad_clip={self.grad_clip!r}: expected a number > 0, inf for no limit")
        if isinstance(self.ema_decay, list | tuple):
            object.__setattr__(self, "ema_decay", tuple(self.ema_decay))
        if not self.ema_decays or not all(0 <= decay < 1 for decay in self.ema_decays):
            raise ValueError(f"ema_decay={self.ema_decay}: expected a number in [0, 1), or several")
        object.__setattr__(self, "power", tuple(self.power))
        for length in self.power:
            exponent(length)  # raises
        check_option(("constant", "cosine"), schedule=self.schedule)
        check_option(("float32", "bfloat16"), precision=self.precision)
        if self.accumulate > self.batch_size:
            raise ValueError(f"accumulate={self.accumulate}: a batch of {self.batch_size} has not so many parts")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> TrainConfig:
        """From a mapping, what TOML or JSON gives.

        Raises:
            ValueError: on a key that is none of the arguments, naming it; on a value out of its range, or no `steps`.

        >>> TrainConfig.of({"steps": 10, "ema_decay": [0.9, 0.99]}).ema_decay
        (0.9, 0.99)
        """
        check_keys(cls.__name__, settings, (f.name for f in fields(cls)))
        if "steps" not in settings:
            raise ValueError("TrainConfig needs steps, the number of optimiser steps")
        return cls(**settings)

    def to_dict(self) -> dict[str, Any]:
        """What `of` takes, of JSON's types."""
        found = asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}

    @property
    def ema_decays(self) -> tuple[float, ...]:
        """The decay of each average."""
        return self.ema_decay if isinstance(self.ema_decay, tuple) else (self.ema_decay,)

    @property
    def averages(self) -> list[Callable[[int], float]]:
        """For each average that is kept, the share of it that stays in the update after n others."""
        lengths = [partial(kept, exponent(length)) for length in self.power]
        return [*(partial(exponential, decay) for decay in self.ema_decays), *lengths]

    def lr_factor(self, step: int) -> float:
        """The learning rate of that step (from 0), as a share of lr."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        if self.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(1, self.steps - self.warmup)))
