"""The trainer: denoising score matching with AdamW, averaged weights, one or several processes, and runs that survive a
kill.

Everything random in step n (which items, which t, which noise, the network's dropout) is a function of the seed and n
alone. So a checkpoint needs no generator states, and a run that was killed and resumed ends, on a CPU, with the same
bits as one that was not. t and noise are drawn for the whole batch of a step, whoever takes which part of it, so W
processes, or a batch taken in parts, have the losses and gradients of one process with the whole batch, up to rounding
(and the masks of dropout).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scoresde.data.order import Order
from scoresde.denoiser import NetworkDenoiser
from scoresde.entries import entries_of, mapped
from scoresde.noise import derive_seed
from scoresde.training import parallel, snapshots, threads
from scoresde.training.average import Average, in_place_of
from scoresde.training.config import TrainConfig
from scoresde.training.feed import DataSource, batches, look_at, source_of, split
from scoresde.training.folder import Checkpoint, newest
from scoresde.training.identity import identity_of_run, versions
from scoresde.training.layouts import layout_of
from scoresde.training.lock import held_by_first
from scoresde.training.log import Reports, check_tensorboard
from scoresde.training.loss import Draws, Part, dsm_loss
from scoresde.training.model import ModelConfig, check_model, opened
from scoresde.training.resume import check_resume
from scoresde.training.saver import Saver
from scoresde.training.signals import Signals
from scoresde.training.step import Autocast, Interval, Loss, Worker, check_trainable, seeded_global_generators, trial
from scoresde.training.weights import TimeSampler, UniformTimes, Weighting, simple
from scoresde.training.whole_files import check_safetensors, weights_file

__all__ = ["Evaluate", "Trainer"]

Evaluate = Callable[[NetworkDenoiser, int], Mapping[str, float]]
"""evaluate(denoiser, step): numbers by name, of the denoiser with averaged weights."""


class Trainer:
    """Trains the network of a denoiser.

    Args:
        denoiser: an `EpsDenoiser(net, sde, time=...)` or another adapter around an `nn.Module`; trained in place.
        data: clean data, shape (N, ...), floating point; or a `DataSource`, an object with a length and
            `batch(items, epochs) -> (x, cond)`: `scoresde.data.training_data(...)` returns one.
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
        model: what the denoiser is in words, kept in the checkpoints so that `scoresde.training.load` can build it.
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
            is zero.
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
        denoiser: NetworkDenoiser,
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
        model: ModelConfig | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        check_trainable(denoiser)
        if loss is not None and (times is not None or weighting is not simple):
            raise ValueError("weighting= and times= are dsm_loss's: give them to your loss itself, or leave loss= out")
        self.data, about = source_of(data, cond)
        self._parts = split(config.batch_size, config.accumulate, parallel.rank(), parallel.world())
        if model is not None:
            check_model(model, denoiser)
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None:
            check_safetensors()
        if config.tensorboard:
            check_tensorboard()
            if self.folder is None:
                raise ValueError("TrainConfig(tensorboard=True) writes into the run's folder: give folder=")
        self.denoiser, self.config, self.loss, self.model = denoiser, config, loss, model
        self.settings = settings
        self.weighting, self.times, self.augment = weighting, times or UniformTimes(), augment
        self.evaluate = evaluate
        self.net: nn.Module = denoiser.net  # type: ignore[assignment]
        self._made_for = identity_of_run(denoiser, about, config, weighting, self.times, loss)
        parallel.agreed("runs", {"config.shard": config.shard})
        self._layout = layout_of(config)
        self._layout.place(self.net)
        self._saver = Saver(self._layout)
        self.averages = [Average(self._layout.twin(self.net), kept) for kept in config.averages]
        fused = denoiser.device.type in ("cpu", "cuda", "mps", "xpu")  # where torch has it
        self._optimiser = torch.optim.AdamW(
            self.net.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=fused
        )
        self._order = Order(len(self.data), config.batch_size, config.seed)
        self.step, self.seconds = 0, 0.0
        self.losses: list[tuple[int, float]] = []
        self.evaluations: list[tuple[int, dict[str, float]]] = []
        self.path: Path | None = None
        self.threads: int | None = None
        self._interval = Interval()
        if folder is not None and (found := parallel.by_first(lambda: newest(Path(folder)))) is not None:
            self._continue(found)
        else:
            look_at(self.data)

    @property
    def ema(self) -> NetworkDenoiser:
        """The denoiser with the (first) averaged weights, a copy in eval mode: what to sample from."""
        net = self._layout.whole(self.averages[0].module).eval()
        return self.denoiser.with_net(net.requires_grad_(False))

    @contextmanager
    def averaged(self, i: int = 0) -> Iterator[NetworkDenoiser]:
        """With the i-th averaged weights in the trained network itself, in eval mode; afterwards its own are back, to
        the last bit, also after an exception.

        Raises:
            IndexError: if there is no such average.
        """
        with in_place_of(self.net, self.averages[i].module):
            yield self.denoiser

    # ---- the loop ----

    def fit(self, progress: bool = True, *, locked: bool = False) -> Trainer:
        """Train up to config.steps, from wherever the run stands.

        Args:
            progress: show a bar.
            locked: the caller holds the folder already, by `scoresde.training.lock.held`.

        SIGTERM and Ctrl-C, in the main thread, let the current step end and save: the first then exits with status 143,
        the other raises KeyboardInterrupt (a second Ctrl-C does at once, and saves nothing).

        Raises:
            NonFiniteLossError: if the loss or its gradient is not finite, naming the step. Nothing is saved after it.
            InUseError: if another run is writing into the folder.
            ValueError: if the processes were not given the same.
        """
        parallel.agreed("runs", {**self._made_for, "step": self.step, "config.steps": self.config.steps})
        with (
            held_by_first(None if locked or self.step >= self.config.steps else self.folder),
            self._threads(progress),
        ):
            self._run(progress)
        return self

    def _run(self, progress: bool) -> None:
        config, lead = self.config, parallel.rank() == 0
        voice, worker = parallel.Voice(), self._worker(self.net)
        reports = Reports(config, self.step, self.folder if lead else None, progress and lead)
        self.net.train()
        self._interval.start()
        try:
            with Signals() as signals, closing(self._batches()) as feed:
                while self.step < config.steps:
                    self._interval.add(*self._train_step(worker, *next(feed)))
                    self.step += 1
                    reports.step()
                    stop, last = voice.largest(signals.received), self.step == config.steps
                    log = last or self.step % config.log_every == 0
                    test = self.evaluate is not None and (
                        last or (config.evaluate_every is not None and self.step % config.evaluate_every == 0)
                    )
                    save = last or stop or self.step % config.checkpoint_every == 0
                    if self.folder is not None and snapshots.due(config, self.step):
                        self._interval.read(self.step)  # nothing is kept after a loss that is not finite
                        snapshots.write(self.folder, self.step, self._powers, self._layout, self._manifest({}))
                    if log or save:
                        self._interval.read(self.step)
                    row: dict[str, float] = {}
                    if log:
                        row = self._report()
                    if test:
                        with reports.paused():
                            row |= self._evaluate()
                    if row:
                        reports.row({"epoch": self._epoch, **row})
                    if save and self.folder is not None:
                        self._land()
                        background = config.async_save and not (last or stop)
                        self._start_save(self.folder, background)
                        if not background:
                            self._land()
                    if stop:
                        if self.folder is not None:
                            reports.say(f"stopped; step {self.step} is kept, and the same program goes on from there")
                        signals.leave(stop)
        finally:
            self._saver.settle()
            reports.close()
            self.net.eval()

    def _worker(self, net: nn.Module, bare: bool = False) -> nn.Module:
        """What makes the loss of a part: under torch.distributed, gradients are averaged over the processes; bare, they
        are not, and nothing is compiled."""
        if self.config.precision == "bfloat16":
            net = Autocast(net, self.denoiser.device.type)
        if self.config.compile and not bare:
            backend = self.config.compile if isinstance(self.config.compile, str) else "inductor"
            net = self._layout.compiled(net, backend)
        worker = Worker(net, self.denoiser if net is self.net else self.denoiser.with_net(net), self._loss_of)
        return worker if bare else self._layout.worker(worker)

    def _trial(self) -> Callable[[], None]:
        """A step to time, of a copy."""
        worker = self._worker(self._layout.whole(self.net).train(), bare=True)
        with closing(batches(self.data, self._order.share(0, 1), self.step, self.step + 1, 0)) as feed:
            items, cond = next(feed)
        own = slice(*self._parts[0])
        return trial(worker, items[own], entries_of(cond, own, len(items)))

    def _threads(self, progress: bool) -> AbstractContextManager[None]:
        """Training's number of threads, on a CPU."""
        self.threads = self.config.threads
        if self.threads is None and self.denoiser.device.type == "cpu" and parallel.world() == 1:
            trial = self._trial if self.step < self.config.steps else None
            self.threads = threads.choose(self.folder, trial, partial(print, file=sys.stderr) if progress else None)
        return nullcontext() if self.threads is None else threads.using(self.threads)

    def _batches(self) -> Generator[tuple[Tensor, dict[str, Any]], None, None]:
        """This process's items of each step; the whole batch where it is to be augmented."""
        share = (0, 1) if self.augment is not None else (parallel.rank(), parallel.world())
        return batches(self.data, self._order.share(*share), self.step, self.config.steps, self.config.workers)

    def _train_step(self, worker: nn.Module, items: Tensor, cond: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """One optimiser step: this process's share of the loss, and the gradient's norm."""
        config, device, B = self.config, self.denoiser.device, self.config.batch_size
        generator = torch.Generator(device).manual_seed(derive_seed(config.seed, 1, self.step))
        x0 = items.to(device, non_blocking=True)
        cond = mapped(lambda v: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v, cond)
        if self.augment is not None:  # it sees the whole batch, and draws for it
            mine = slice(self._parts[0][0], self._parts[-1][1])
            x0, cond = self.augment(x0, generator)[mine], entries_of(cond, mine, len(x0))
        parted = len(x0) < B or len(self._parts) > 1
        state = generator.get_state() if parted else None
        for group in self._optimiser.param_groups:
            group["lr"] = config.lr * config.lr_factor(self.step)
        self._optimiser.zero_grad(set_to_none=True)
        offset, losses = self._parts[0][0], []
        for start, stop in self._parts:
            own, share = slice(start - offset, stop - offset), (stop - start) / B
            draws: Draws = generator
            if state is not None:
                draws = Part(generator.set_state(state), start, B)
            key = (2, self.step, start) if parted else (2, self.step)
            quiet = nullcontext() if stop == self._parts[-1][1] else self._layout.quiet(worker)
            with quiet, seeded_global_generators(derive_seed(config.seed, *key), device):
                loss = worker(x0[own], draws, entries_of(cond, own, len(x0)))
                # The layouts take the mean over the processes where the sum is wanted.
                (loss * (share * parallel.world()) if parted else loss).backward()
            losses.append(loss.detach() * share if parted else loss.detach())
        norm = parallel.gathered(nn.utils.clip_grad_norm_(self.net.parameters(), config.grad_clip))
        self._optimiser.step()
        for average in self.averages:
            average.update(self.net, self.step)
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum(), norm

    def _loss_of(self, denoiser: NetworkDenoiser, x0: Tensor, draws: Draws, cond: Mapping[str, Any]) -> Tensor:
        if self.loss is not None:
            return self.loss(denoiser, x0, draws, cond)
        return dsm_loss(denoiser, x0, weighting=self.weighting, times=self.times, generator=draws, cond=cond)

    # ---- what it says ----

    @property
    def _epoch(self) -> float:
        return round(self.step * self.config.batch_size / len(self.data), 4)

    def _report(self) -> dict[str, float]:
        """The row of an interval, which ends here."""
        loss, norm, steps, seconds = self._interval.end()
        self.losses.append((self.step, loss))
        lr = self.config.lr * self.config.lr_factor(self.step - 1)
        speed = steps * self.config.batch_size / max(seconds, 1e-9)
        self.seconds += seconds
        return {
            "loss": loss,
            "lr": lr,
            "gradient_norm": norm,
            "items_per_second": float(f"{speed:.4g}"),
            "seconds": round(self.seconds, 3),
        }

    def _evaluate(self) -> dict[str, float]:
        """Evaluate by rank 0; the numbers are for all."""
        evaluate = self.evaluate
        assert evaluate is not None

        with self._interval.paused(), self._layout.lent(self.net, self.averages[0].module) as net:
            denoiser = self.denoiser.with_net(net)
            found = parallel.by_first(lambda: {k: float(v) for k, v in evaluate(denoiser, self.step).items()})
        self.evaluations.append((self.step, found))
        return found

    # ---- checkpoints ----

    @property
    def _networks(self) -> dict[str, nn.Module]:
        """What a checkpoint has the weights of, by name."""
        return {weights_file(None): self.net, **{weights_file(i): a.module for i, a in enumerate(self.averages)}}

    @property
    def _powers(self) -> dict[str, nn.Module]:
        """The power averages, by the same names."""
        return dict(list(self._networks.items())[1 + len(self.config.ema_decays) :])

    def save(self, folder: str | Path) -> Path:
        """Write a checkpoint into a run folder: whole, or not at all. Every process calls it, and waits for the end.

        Returns:
            the checkpoint's folder.

        Raises:
            InUseError: if another run is writing into the folder.
        """
        self._land()
        with held_by_first(Path(folder)):
            self._start_save(Path(folder), background=False)
            found = self._saver.wait()
        assert found is not None
        return found

    def _land(self) -> None:
        """Until the checkpoint under way stands."""
        self.path = self._saver.wait() or self.path

    def _start_save(self, folder: Path, background: bool) -> None:
        """The saver is to write the state of now."""
        self._interval.read(self.step)
        progress = {
            "losses": list(self.losses),
            "evaluations": list(self.evaluations),
            "seconds": self.seconds + self._interval.seconds,
            "interval": list(self._interval.values),
        }
        keep, manifest = self.config.keep, self._manifest(progress)
        self._saver.start(folder, self.step, self._networks, self._optimiser, manifest, keep, background)

    def _manifest(self, progress: Mapping[str, Any]) -> dict[str, Any]:
        """What a checkpoint says of the run, its progress among it."""
        return {
            "made_for": self._made_for,
            "config": self.config.to_dict(),
            "model": None if self.model is None else self.model.to_dict(),
            "settings": self.settings,
            "progress": progress,
            "versions": versions(),
        }

    def load(self, path: str | Path) -> None:
        """Continue from a checkpoint: a run folder's newest, or the one that has this folder. Every process calls it.

        Raises:
            FileNotFoundError: if there is none.
            CheckpointError: if a file of it is damaged, it lacks or has unknown keys, or was made for another run.
        """
        self._continue(parallel.by_first(lambda: opened(path)))

    def _continue(self, found: Checkpoint) -> None:
        self._land()
        check_resume(found, self._made_for, self.config)
        for name, net in self._networks.items():
            found.weights(name, net)
        found.optimiser(self._optimiser, self.net)
        progress = found.manifest["progress"]
        self.step, self.path, self.seconds = found.manifest["step"], found.path, progress["seconds"]
        self.losses = [(step, loss) for step, loss in progress["losses"]]
        self.evaluations = [(step, values) for step, values in progress["evaluations"]]
        self._interval = Interval(progress["interval"])
