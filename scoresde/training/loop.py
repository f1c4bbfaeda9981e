"""The loop of a training run, whatever is trained: AdamW, averaged weights, one or several processes, and runs that
survive a kill.

Everything random in step n (which items, which noise, the network's dropout) is a function of the seed and n alone. So
a checkpoint needs no generator states, and a run that was killed and resumed ends, on a CPU, with the same bits as one
that was not. What is drawn is drawn for the whole batch of a step, whoever takes which part of it, so W processes, or a
batch taken in parts, have the losses and gradients of one process with the whole batch, up to rounding (and the masks
of dropout).
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from scoresde.data.order import Order
from scoresde.entries import entries_of, mapped
from scoresde.networks import seeded_global_generators
from scoresde.noise import derive_seed
from scoresde.training import parallel, snapshots, threads
from scoresde.training.average import Average, in_place_of
from scoresde.training.config import TrainConfig
from scoresde.training.feed import DataSource, batches, look_at, split
from scoresde.training.folder import Checkpoint, newest
from scoresde.training.identity import versions
from scoresde.training.layouts import layout_of
from scoresde.training.lock import held_by_first
from scoresde.training.log import Reports, check_tensorboard
from scoresde.training.loss import Draws, Part
from scoresde.training.model import opened
from scoresde.training.resume import check_resume
from scoresde.training.saver import Saver
from scoresde.training.signals import Signals
from scoresde.training.step import Interval, loss_of, trial
from scoresde.training.whole_files import check_safetensors, weights_file

__all__ = ["InWords", "Loop"]

S = TypeVar("S")


class InWords(Protocol):
    """What is trained, in words that JSON can hold."""

    def to_dict(self) -> dict[str, Any]: ...


class Loop(ABC, Generic[S]):
    """A training run. Of what is trained it knows a module with parameters, and another that makes the loss of a part
    of a batch; a subclass, which is final, says which these are. S is what `evaluate` is given.

    Args:
        net: what is trained.
        data: what it is trained on.
        config: see `TrainConfig`.
        made_for: what its checkpoints are only good for.
        folder, augment, evaluate, model, settings: see `Trainer`.
        averaged: the part of net whose weights are averaged; all of it by default.
        told: names of what the loss tells of itself, beside its value: columns of the log.

    Attributes: see `Trainer`.
    """

    def __init__(
        self,
        net: nn.Module,
        data: DataSource,
        config: TrainConfig,
        *,
        made_for: dict[str, Any],
        folder: str | Path | None,
        augment: Callable[[Tensor, torch.Generator], Tensor] | None,
        evaluate: Callable[[S, int], Mapping[str, float]] | None,
        model: InWords | None,
        settings: Mapping[str, Any] | None,
        averaged: nn.Module | None = None,
        told: Sequence[str] = (),
    ) -> None:
        self.net, self.data, self.config, self.model, self.settings = net, data, config, model, settings
        self.augment, self.evaluate = augment, evaluate
        self.folder = None if folder is None else Path(folder)
        self._parts = split(config.batch_size, config.accumulate, parallel.rank(), parallel.world())
        if self.folder is not None:
            check_safetensors()
        if config.tensorboard:
            check_tensorboard()
            if self.folder is None:
                raise ValueError("TrainConfig(tensorboard=True) writes into the run's folder: give folder=")
        self._made_for, self._told = made_for, tuple(told)
        parallel.agreed("runs", {"config.shard": config.shard})
        self._layout = layout_of(config)
        self._layout.place(self.net)
        self._saver = Saver(self._layout)
        self._kept = self.net if averaged is None else averaged
        self.averages = [Average(self._layout.twin(self._kept), kept) for kept in config.averages]
        fused = self.device.type in ("cpu", "cuda", "mps", "xpu")  # where torch has it
        self._optimiser = torch.optim.AdamW(self._groups(), lr=config.lr, weight_decay=config.weight_decay, fused=fused)
        self._order = Order(len(self.data), config.batch_size, config.seed)
        self.step, self.seconds = 0, 0.0
        self.losses: list[tuple[int, float]] = []
        self.evaluations: list[tuple[int, dict[str, float]]] = []
        self.path: Path | None = None
        self.threads: int | None = None
        self._interval = Interval(told=self._told)
        there = self.folder
        if there is not None and (found := parallel.by_first(lambda: newest(there))) is not None:
            self._continue(found)
        else:
            look_at(self.data)

    # ---- what is trained ----

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the network is."""

    @abstractmethod
    def _worker(self, net: nn.Module, bare: bool = False) -> nn.Module:
        """What makes the loss of a part, `module(x, draws, cond)`, of net or a copy: a scalar, or that and what it
        tells of itself, (K,). Under torch.distributed, gradients are averaged over the processes; bare, they are not,
        and nothing is compiled."""

    @abstractmethod
    def _subject(self, net: nn.Module) -> S:
        """What `evaluate` is given, net being what is averaged, or a copy."""

    def _groups(self) -> list[dict[str, Any]]:
        """What the optimiser is given: the gradient of each group has a norm of its own."""
        return [{"params": list(self.net.parameters())}]

    def _finished(self) -> None:
        """The last step is done and kept; by rank 0."""

    @contextmanager
    def _averaged(self, i: int) -> Iterator[None]:
        """With the i-th averaged weights in what is averaged, in eval mode."""
        with in_place_of(self._kept, self.averages[i].module):
            yield

    # ---- the loop ----

    def fit(self, progress: bool = True, *, locked: bool = False) -> Self:
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
            if parallel.rank() == 0:
                self._finished()
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
        if self.threads is None and self.device.type == "cpu" and parallel.world() == 1:
            trial = self._trial if self.step < self.config.steps else None
            self.threads = threads.choose(self.folder, trial, partial(print, file=sys.stderr) if progress else None)
        return nullcontext() if self.threads is None else threads.using(self.threads)

    def _batches(self) -> Generator[tuple[Tensor, dict[str, Any]], None, None]:
        """This process's items of each step; the whole batch where it is to be augmented."""
        share = (0, 1) if self.augment is not None else (parallel.rank(), parallel.world())
        return batches(self.data, self._order.share(*share), self.step, self.config.steps, self.config.workers)

    def _train_step(self, worker: nn.Module, items: Tensor, cond: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """One optimiser step: this process's share of the loss and of what it tells, and the gradients' norms."""
        config, device, B = self.config, self.device, self.config.batch_size
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
                loss, told = loss_of(worker(x0[own], draws, entries_of(cond, own, len(x0))))
                # The layouts take the mean over the processes where the sum is wanted.
                (loss * (share * parallel.world()) if parted else loss).backward()
            row = loss.detach() if told is None else torch.cat([loss.detach()[None], told.detach()])
            losses.append(row * share if parted else row)
        groups = [group["params"] for group in self._optimiser.param_groups]
        norms = [parallel.gathered(nn.utils.clip_grad_norm_(group, config.grad_clip)) for group in groups]
        self._optimiser.step()
        for average in self.averages:
            average.update(self._kept, self.step)
        norm = norms[0] if len(norms) == 1 else torch.stack(norms)
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum(0), norm

    # ---- what it says ----

    @property
    def _epoch(self) -> float:
        return round(self.step * self.config.batch_size / len(self.data), 4)

    def _report(self) -> dict[str, float]:
        """The row of an interval, which ends here."""
        loss, norm, steps, seconds, told = self._interval.end()
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
            **told,
        }

    def _evaluate(self) -> dict[str, float]:
        """Evaluate by rank 0; the numbers are for all."""
        evaluate = self.evaluate
        assert evaluate is not None

        with self._interval.paused(), self._layout.lent(self._kept, self.averages[0].module) as net:
            subject = self._subject(net)
            found = parallel.by_first(lambda: {k: float(v) for k, v in evaluate(subject, self.step).items()})
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
        self._interval = Interval(progress["interval"], self._told)
