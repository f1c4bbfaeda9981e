"""A small trainer: denoising score matching with Adam, an averaged copy of the weights, and runs that survive a kill.

Everything random in step n (which items, which t, which noise, the network's dropout) is a function of the seed and n
alone. So a checkpoint needs no generator states, and a run that was killed and resumed ends, on a CPU, with the same
bits as one that was not.
"""

from __future__ import annotations

import copy
import hashlib
import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm.auto import tqdm

from scoresde.denoiser import NetworkDenoiser
from scoresde.noise import derive_seed
from scoresde.sde import SDE
from scoresde.tensors import check_batch
from scoresde.training.checkpoint import CheckpointError, read_checkpoint, write_checkpoint
from scoresde.training.loss import dsm_loss
from scoresde.training.weights import TimeSampler, UniformTimes, Weighting, simple

__all__ = ["Loss", "NonFiniteLossError", "TrainConfig", "Trainer", "load_ema"]

Loss = Callable[[NetworkDenoiser, Tensor, torch.Generator, Mapping[str, Any]], Tensor]
"""loss(denoiser, x0, generator, cond) of a batch: a scalar, drawn from the generator alone."""


class NonFiniteLossError(ArithmeticError):
    """The loss became NaN or infinite; `step` says when. Nothing was saved since."""

    def __init__(self, step: int, loss: float) -> None:
        super().__init__(
            f"the loss is {loss} at step {step}: training stopped, and the last checkpoint is from before it; lower "
            "the learning rate, or look at the data of that step"
        )
        self.step = step


@dataclass(frozen=True)
class TrainConfig:
    """What a run is, beside its model and data.

    Args:
        steps: optimiser steps in all.
        batch_size: items a step; a smaller data set is repeated.
        lr: learning rate of Adam, reached linearly over `warmup` steps.
        warmup: steps.
        schedule: after the warm-up, "constant", or "cosine" down to zero at `steps`; only a constant one can be resumed
            with more steps.
        weight_decay: decoupled, as in AdamW.
        grad_clip: largest norm of the gradient.
        ema_decay: of the averaged weights, per step; early on min(ema_decay, (1 + n) / (10 + n)) after n steps.
        seed: of everything random.
        checkpoint_every: steps between checkpoints; one is always written at the end.
        log_every: steps between readings of the loss.

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
    ema_decay: float = 0.999
    seed: int = 0
    checkpoint_every: int = 500
    log_every: int = 20

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "checkpoint_every", "log_every"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or value < 1:
                raise ValueError(f"{name}={value!r}: expected a whole number >= 1")
        if not (self.lr > 0 and self.grad_clip > 0 and self.warmup >= 0 and self.weight_decay >= 0 and self.seed >= 0):
            raise ValueError(f"{self}: expected lr, grad_clip > 0 and warmup, weight_decay, seed >= 0")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay}: expected a number in [0, 1)")
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"schedule={self.schedule!r}: expected 'constant' or 'cosine'")

    def lr_factor(self, step: int) -> float:
        """The learning rate of that step (from 0), as a share of lr."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        if self.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(1, self.steps - self.warmup)))


class Trainer:
    """Trains the network of a denoiser on data in memory.

    Args:
        denoiser: an `EpsDenoiser(net, sde, time=...)` or another adapter around an `nn.Module`; trained in place.
        data: clean data, shape (N, ...), floating point.
        config: see `TrainConfig`.
        cond: for each keyword of the network, a tensor of N entries, given with the data item.
        weighting, times: of the loss; see `dsm_loss`.
        loss: another loss than `dsm_loss`, a `Loss`; a checkpoint knows it by its name only. It has its own weighting
            and times.
        folder: where the checkpoint lives (`checkpoint.pt`); None to keep nothing.
        augment: a function (batch, generator) -> batch, applied to each batch of data.

    Attributes:
        step: steps done so far.
        losses: mean loss of each interval of log_every steps, with the step that ended it.

    Raises:
        ValueError: if data, cond or the network do not fit; by `fit` and at construction. If both a loss and a
            weighting or times are given.
        CheckpointError: if `folder` holds a checkpoint of another SDE, parameterisation, configuration or network.

    If `folder` has a checkpoint, the run continues from it.
    """

    def __init__(
        self,
        denoiser: NetworkDenoiser,
        data: Tensor,
        config: TrainConfig,
        *,
        cond: Mapping[str, Tensor] | None = None,
        weighting: Weighting = simple,
        times: TimeSampler | None = None,
        loss: Loss | None = None,
        folder: str | Path | None = None,
        augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    ) -> None:
        if not isinstance(denoiser, NetworkDenoiser) or not isinstance(denoiser.net, nn.Module):
            raise ValueError(
                f"a Trainer needs an adapter around an nn.Module, EpsDenoiser(net, sde) say, not {denoiser!r}"
            )
        check_batch(data, "data")
        if len(data) == 0:
            raise ValueError(f"data has shape {tuple(data.shape)}: expected (N, ...), N >= 1")
        if not bool(data.isfinite().all()):
            bad = (~data.reshape(len(data), -1).isfinite().all(1)).nonzero().flatten().tolist()
            raise ValueError(f"data items {bad[:8]} are not finite")
        self.cond = dict(cond or {})
        for key, value in self.cond.items():
            if len(value) != len(data):
                raise ValueError(f"cond[{key!r}] has {len(value)} entries for {len(data)} data items")
        if loss is not None and (times is not None or weighting is not simple):
            raise ValueError("weighting= and times= are dsm_loss's: give them to your loss itself, or leave loss= out")
        self.denoiser, self.data, self.config, self.loss = denoiser, data, config, loss
        self.weighting, self.times, self.augment = weighting, times or UniformTimes(), augment
        self.net: nn.Module = denoiser.net
        self._average = AveragedModel(self.net, multi_avg_fn=_ema(config.ema_decay), use_buffers=True)
        self._optimiser = torch.optim.AdamW(self.net.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        self._epochs: dict[int, Tensor] = {}
        self.step = 0
        self.losses: list[tuple[int, float]] = []
        self.path = None if folder is None else Path(folder) / "checkpoint.pt"
        if self.path is not None and self.path.exists():
            self.load(self.path)

    @property
    def ema(self) -> NetworkDenoiser:
        """The denoiser with the averaged weights, in eval mode: what to sample from."""
        net = copy.deepcopy(self._average.module).eval()
        return self.denoiser.with_net(net.requires_grad_(False))

    def fit(self, progress: bool = True) -> Trainer:
        """Train up to config.steps, from wherever the run stands.

        Raises:
            NonFiniteLossError: if the loss is not finite, naming the step. Nothing is saved after it.
        """
        config = self.config
        bar = tqdm(total=config.steps, initial=self.step, desc="train", unit="step", disable=not progress)
        if self.losses:
            bar.set_postfix(loss=f"{self.losses[-1][1]:.4f}")
        pending: list[Tensor] = []
        self.net.train()
        try:
            while self.step < config.steps:
                pending.append(self._train_step())
                self.step += 1
                bar.update()
                save = self.step % config.checkpoint_every == 0 or self.step == config.steps
                # One read of the device an interval, and before every save.
                if save or self.step % config.log_every == 0:
                    losses = torch.stack(pending)
                    if not bool(losses.isfinite().all()):
                        first = int((~losses.isfinite()).int().argmax())
                        raise NonFiniteLossError(self.step - len(pending) + first, float(losses[first]))
                    self.losses.append((self.step, float(losses.mean())))
                    bar.set_postfix(loss=f"{self.losses[-1][1]:.4f}")
                    pending = []
                if save and self.path is not None:
                    self.save(self.path)
        finally:
            bar.close()
            self.net.eval()
        return self

    def _train_step(self) -> Tensor:
        config, device = self.config, self.denoiser.device
        generator = torch.Generator(device).manual_seed(derive_seed(config.seed, 1, self.step))
        index = self._batch(self.step)
        x0 = self.data[index].to(device)
        if self.augment is not None:
            x0 = self.augment(x0, generator)
        cond = {key: value[index].to(device) for key, value in self.cond.items()}
        for group in self._optimiser.param_groups:
            group["lr"] = config.lr * config.lr_factor(self.step)
        with _seeded_global_generators(derive_seed(config.seed, 2, self.step), device):
            if self.loss is not None:
                loss = self.loss(self.denoiser, x0, generator, cond)
            else:
                loss = dsm_loss(
                    self.denoiser, x0, weighting=self.weighting, times=self.times, generator=generator, cond=cond
                )
            self._optimiser.zero_grad(set_to_none=True)
            loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), config.grad_clip)
        self._optimiser.step()
        self._average.update_parameters(self.net)
        return loss.detach()

    def _batch(self, step: int) -> Tensor:
        """Indices of a step's items: consecutive entries of an endless sequence of shuffled epochs."""
        N, size = len(self.data), self.config.batch_size
        first, last = step * size, (step + 1) * size - 1
        wanted = range(first // N, last // N + 1)
        self._epochs = {e: self._epochs[e] if e in self._epochs else self._permutation(e) for e in wanted}
        return torch.cat(list(self._epochs.values()))[first % N : first % N + size]

    def _permutation(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.config.seed, 0, epoch))
        return torch.randperm(len(self.data), generator=generator)

    def _made_for(self) -> dict[str, Any]:
        # How long a run is, and how often it reports, may change between sessions with a constant learning rate only.
        config = {f.name: getattr(self.config, f.name) for f in fields(self.config)}
        for name in ("checkpoint_every", "log_every", *(["steps"] if self.config.schedule == "constant" else [])):
            del config[name]
        sde, u = self.denoiser.sde, torch.linspace(0.1, 0.9, 4, dtype=torch.float64)
        return {
            **_identity(self.denoiser),
            "data": f"{tuple(self.data.shape)} in [{self.data.min():.4g}, {self.data.max():.4g}], {_digest(self.data)}",
            "cond": ", ".join(f"{key} {_digest(value)}" for key, value in sorted(self.cond.items())) or "none",
            "weighting": _values(self.weighting(sde, _probe(sde))),
            "times": f"{type(self.times).__name__}, quantiles {_values(self.times.quantile(sde, u))}",
            **({} if self.loss is None else {"loss": getattr(self.loss, "__name__", type(self.loss).__name__)}),
            **{f"config.{name}": value for name, value in config.items()},
        }

    def save(self, path: str | Path) -> None:
        """Write a checkpoint, atomically."""
        content = {
            "step": self.step,
            "losses": self.losses,
            "net": self.net.state_dict(),
            "average": self._average.state_dict(),
            "optimiser": self._optimiser.state_dict(),
            "config": asdict(self.config),
            "versions": _versions(),
        }
        write_checkpoint(path, content, self._made_for())

    def load(self, path: str | Path) -> None:
        """Continue from a checkpoint.

        Raises:
            CheckpointError: if it is damaged, lacks or has unknown keys, or was made for another run.
        """
        content = read_checkpoint(path, self._made_for())
        expected = {"step", "losses", "net", "average", "optimiser", "config", "versions"}
        if set(content) != expected:
            raise CheckpointError(f"{path} has the keys {sorted(content)}, expected {sorted(expected)}")
        if content["versions"] != _versions():
            warnings.warn(
                f"{path} was written with {content['versions']}, this is {_versions()}: the run goes on, but its last "
                "bits will be others",
                stacklevel=2,
            )
        try:
            self.net.load_state_dict(content["net"])
            self._average.load_state_dict(content["average"])
            self._optimiser.load_state_dict(content["optimiser"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path} does not fit this network: {error}") from error
        self.step = content["step"]
        self.losses = [tuple(entry) for entry in content["losses"]]


def load_ema(path: str | Path, denoiser: NetworkDenoiser) -> NetworkDenoiser:
    """The denoiser with the averaged weights of a trainer's checkpoint, in eval mode: to sample without the data.

    Args:
        path: the `checkpoint.pt` of a `Trainer`.
        denoiser: built as for training; its network's weights do not matter, and are not changed.

    Raises:
        FileNotFoundError: if there is none.
        CheckpointError: if it is damaged, or was made for another SDE, parameterisation, time label or network.
    """
    if not isinstance(denoiser.net, nn.Module):
        raise ValueError(f"load_ema needs an adapter around an nn.Module, not {denoiser!r}")
    content = read_checkpoint(path, _identity(denoiser), whole=False)
    average = AveragedModel(denoiser.net, use_buffers=True)
    try:
        average.load_state_dict(content["average"])
    except (RuntimeError, KeyError) as error:
        raise CheckpointError(f"{path} does not fit this network: {error}") from error
    return denoiser.with_net(average.module.eval().requires_grad_(False))


def _probe(sde: SDE) -> Tensor:
    """A few times: functions cannot be compared, so their values there are."""
    return torch.linspace(sde.t_min, sde.t_min + 0.9 * (sde.t_max - sde.t_min), 4, dtype=torch.float64)


def _identity(denoiser: NetworkDenoiser) -> dict[str, Any]:
    """What a network's weights are only good for."""
    sde, t = denoiser.sde, _probe(denoiser.sde)
    assert isinstance(denoiser.net, nn.Module)
    return {
        "sde": f"{type(sde).__name__}, alpha {_values(sde.alpha(t))}, sigma {_values(sde.sigma(t))} at t {_values(t)}",
        "parameterisation": type(denoiser).__name__,
        "scale of the output": _values(denoiser.affine(t)[1]),
        "time label": _values(denoiser.label(t)),
        "network": f"{type(denoiser.net).__name__}, {sum(p.numel() for p in denoiser.net.parameters())} parameters",
    }


def _versions() -> str:
    return f"scoresde {version('scoresde')}, torch {torch.__version__}"


def _values(x: Tensor) -> str:
    """The numbers, to the six digits that name a function and not its rounding."""
    return ", ".join(f"{value:.6g}" for value in x.detach().cpu().double().flatten().tolist())


def _digest(x: Tensor) -> str:
    """A hash of a tensor's content."""
    content: Any = x.detach().cpu().contiguous().view(torch.uint8).numpy()
    return f"sha256 {hashlib.sha256(content).hexdigest()[:12]}"


def _ema(decay: float) -> Callable[[Any, Any, Any], None]:
    """torch's averaging rule for `AveragedModel`: exponential, with a warm-up that forgets the initial weights."""

    @torch.no_grad()
    def update(averaged: list[Tensor], current: list[Tensor], num_averaged: Tensor) -> None:
        n = int(num_averaged)
        weight = 1 - min(decay, (1 + n) / (10 + n))
        for average, value in zip(averaged, current, strict=True):
            if average.is_floating_point():
                average.lerp_(value, weight)
            else:
                average.copy_(value)

    return update


@contextmanager
def _seeded_global_generators(seed: int, device: torch.device) -> Any:
    """Seed the global generators, which dropout draws from, and put them back as they were."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed every GPU, and not put them back
        if devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
