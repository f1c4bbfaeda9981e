"""The trainer of a denoiser: denoising score matching, or another loss, in the loop of `scoresde.training.loop`.

The times t are drawn as the noise is, for the whole batch of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from scoresde.categorical import CategoricalDenoiser
from scoresde.denoiser import NetworkDenoiser
from scoresde.training.config import TrainConfig
from scoresde.training.feed import DataSource, source_of
from scoresde.training.identity import identity_of_run
from scoresde.training.loop import Loop
from scoresde.training.loss import Draws, dsm_loss, refuse_unmasked
from scoresde.training.model import CategoricalConfig, ModelConfig, check_model
from scoresde.training.states import bound_loss
from scoresde.training.step import Autocast, Loss, Trainable, Worker, check_trainable
from scoresde.training.weights import TimeSampler, UniformTimes, Weighting, simple

__all__ = ["Evaluate", "Trainer"]

D = TypeVar("D", bound=Trainable)

Evaluate = Callable[[Any, int], Mapping[str, float]]
"""evaluate(denoiser, step): numbers by name, of the denoiser with averaged weights."""


class Trainer(Loop[D]):
    """Trains the network of a denoiser.

    Args:
        denoiser: an `EpsDenoiser(net, sde, time=...)` or another adapter around an `nn.Module`; trained in place. One
            of whole states (`CategoricalDenoiser`, `ProductDenoiser`) is trained by its bound, `bound_loss`.
        data: clean data, shape (N, ...), floating point, or whole states for a `CategoricalDenoiser`; or a
            `DataSource`, an object with a length and `batch(items, epochs) -> (x, cond)`:
            `scoresde.data.training_data(...)` returns one.
        config: see `TrainConfig`.
        cond: for each keyword of the network, a tensor of N entries, a list of N strings, or a structure of these
            (`scoresde.entries`), given with the data item.
        weighting, times: of the loss; see `dsm_loss`.
        loss: another loss than `dsm_loss`, a `Loss`; a checkpoint knows it by its name only. It has its own weighting
            and times.
        folder: of the run: `checkpoints` and `log.csv` go there. None to keep nothing.
        augment: a function (batch, generator) -> batch, applied to each whole batch of data.
        evaluate: a function (denoiser, step) -> numbers by name, called with the averaged weights in place at each
            `config.evaluate_every` steps and at the end, by rank 0 alone (with a whole copy, where the run is sharded);
            its numbers go to the log.
        model: what the denoiser is in words, kept in the checkpoints so that `scoresde.training.load` can build it; of
            whole states a `CategoricalConfig`, for `load_categorical`.
        settings: what else is to be kept in their manifests, of JSON's types, under that name.

    Attributes:
        step: steps done so far.
        losses: mean loss of each interval of log_every steps, with the step that ended it.
        evaluations: what `evaluate` returned, with the step.
        path: the folder of the last checkpoint that stands, or None.
        threads: of the CPU that `fit` took, or None where it did not look: see `TrainConfig.threads`.

    Raises:
        TypeError, ValueError: if data, cond or the network do not fit; by `fit` and at construction. If both a loss and
            a weighting or times are given; if model is of another denoiser; if the batch cannot be split. If no
            parameter of the network takes a gradient, or it cannot be sampled from at t_max: an eps network where alpha
            is zero. If a mask is among the conditions, and the loss is not `masked_loss`, which trains on no entry that
            fills up, nor one of your own.
        ImportError: if a folder is given without safetensors, config.tensorboard without TensorBoard, or config.shard
            without FSDP2.
        CheckpointError: if `folder` holds a checkpoint of another SDE, parameterisation, configuration or network, or
            damaged ones only. Steps, and how often what is said, saved and measured, may change.

    If `folder` has a checkpoint, the run continues from it: from the newest of which every file is whole, with a
    warning if there are newer ones. While `fit` runs, no other run can write there.

    Where torch.distributed is initialised (`scoresde.training.start`), every process makes the same Trainer, on its own
    device, and each takes part of every batch; logs are written by rank 0. A run may go on with another number of
    processes. Gradients go through DistributedDataParallel, for which every weight that takes a gradient must be used
    in every step; or, with config.shard, through FSDP2: `scoresde.training.sharded`. Then `denoiser`, `ema` and
    `averaged` are for all processes to call together; `ema` is whole, and whoever has it can use it alone.
    """

    def __init__(
        self,
        denoiser: D,
        data: Tensor | DataSource,
        config: TrainConfig,
        *,
        cond: Mapping[str, Any] | None = None,
        weighting: Weighting = simple,
        times: TimeSampler | None = None,
        loss: Loss | None = None,
        folder: str | Path | None = None,
        augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
        evaluate: Evaluate | None = None,
        model: ModelConfig | CategoricalConfig | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        check_trainable(denoiser)
        if loss is not None and (times is not None or weighting is not simple):
            raise ValueError("weighting= and times= are dsm_loss's: give them to your loss itself, or leave loss= out")
        if not isinstance(denoiser, NetworkDenoiser) and (times is not None or weighting is not simple):
            raise ValueError("weighting= and times= are dsm_loss's: whole states are trained by their bound")
        source, about = source_of(data, cond, whole=isinstance(denoiser, CategoricalDenoiser))
        if isinstance(data, Tensor) and not isinstance(denoiser, NetworkDenoiser):
            denoiser.check(data, name="data")
        if loss is None:  # else, and of a `DataSource`, `dsm_loss` does, before the network is called
            refuse_unmasked(cond)
        if model is not None:
            check_model(model, denoiser)
        self.denoiser, self.loss = denoiser, loss
        self.weighting, self.times = weighting, times or UniformTimes()
        assert isinstance(denoiser.net, nn.Module)
        super().__init__(
            denoiser.net,
            source,
            config,
            made_for=identity_of_run(denoiser, about, config, weighting, self.times, loss),
            folder=folder,
            augment=augment,
            evaluate=evaluate,
            model=model,
            settings=settings,
        )

    @property
    def device(self) -> torch.device:
        return self.denoiser.device

    @property
    def ema(self) -> D:
        """The denoiser with the (first) averaged weights, a copy in eval mode: what to sample from."""
        net = self._layout.whole(self.averages[0].module).eval()
        return self._subject(net.requires_grad_(False))

    @contextmanager
    def averaged(self, i: int = 0) -> Iterator[D]:
        """With the i-th averaged weights in the trained network itself, in eval mode; afterwards its own are back, to
        the last bit, also after an exception.

        Raises:
            IndexError: if there is no such average.
        """
        with self._averaged(i):
            yield self.denoiser

    def _worker(self, net: nn.Module, bare: bool = False) -> nn.Module:
        if self.config.precision == "bfloat16":
            net = Autocast(net, self.denoiser.device.type)
        if self.config.compile and not bare:
            backend = self.config.compile if isinstance(self.config.compile, str) else "inductor"
            net = self._layout.compiled(net, backend)
        worker = Worker(net, self.denoiser if net is self.net else self._subject(net), self._loss_of)
        return worker if bare else self._layout.worker(worker)

    def _subject(self, net: nn.Module) -> D:
        return cast(D, self.denoiser.with_net(net))

    def _loss_of(self, denoiser: Trainable, x0: Tensor, draws: Draws, cond: Mapping[str, Any]) -> Tensor:
        if self.loss is not None:
            return self.loss(denoiser, x0, draws, cond)
        if not isinstance(denoiser, NetworkDenoiser):
            return bound_loss(denoiser, x0, generator=draws, cond=cond)
        return dsm_loss(denoiser, x0, weighting=self.weighting, times=self.times, generator=draws, cond=cond)
