"""What heads are trained by (`scoresde.variance.heads`, `scoresde.variance.learned_range`).

    SN      |h - eps^2|^2 / d                   NPR     |h - (eps - eps_hat)^2|^2 / d
    OCM     |h + sigma r (J^T r)|^2 / d         hybrid  |eps_hat - eps|^2 / d + weight L_vlb

L_vlb is the bound of the chain whose variance the head says, for a step the Kullback-Leibler divergence between two
Gaussians,

    2 KL = c^2 / v_step - 1 + log(v_step / c^2) + b^2 (D - x_0)^2 / v_step

elementwise, and for the last one -log N(x_0; D, v_step) or that of its bin.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from scoresde.checks import check_nonnegative, check_option
from scoresde.denoiser import Denoiser, NetworkDenoiser, check_denoiser
from scoresde.entries import check_cond
from scoresde.grid import Grid
from scoresde.likelihood.decoder import Decoder, log_probability
from scoresde.masks import refuse_masks
from scoresde.sde import SDE
from scoresde.tensors import check_batch, expand_like
from scoresde.training.loss import Draws, NoisyBatch, error_of, noisy_batch
from scoresde.training.step import Loss
from scoresde.training.weights import TimeSampler
from scoresde.variance.learned_range import Step, chain_grid
from scoresde.variance.trunk import Head, Pair

__all__ = ["Reduction", "Regression", "hybrid_loss", "npr_loss", "ocm_loss", "sn_loss", "training_loss"]

Reduction = Literal["mean", "none"]


def sn_loss(
    denoiser: Denoiser,
    head: Head | None,
    x0: Tensor,
    *,
    times: TimeSampler | None = None,
    t: Tensor | None = None,
    noise: Tensor | None = None,
    generator: Draws | None = None,
    cond: Mapping[str, Any] | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """E |h - eps^2|^2 / d, whose minimiser is h = E[eps^2 | x_t].

    Args:
        denoiser: the trained denoiser. Gradients reach the head alone; what it shares with the denoiser must be frozen
            (`TrunkWithHead`).
        head: as in `SNDenoiser`; None for the second output of the denoiser's network.
        x0: clean data, shape (B, ...), floating point.
        times: the distribution of t; uniform and stratified by default.
        t: instead of drawing, the times, shape () or (B,), above 0.
        noise: instead of drawing, eps, shape of x0.
        generator: where t and noise are drawn from, on its own device; freshly seeded if not given. A `Part` where x0
            is part of a batch (`scoresde.training.loss`).
        cond: keyword arguments for the networks.
        reduction: "mean" over the batch, or "none" for shape (B,).

    Raises:
        TypeError: if there is no head.
        ValueError: if x0 is not floating point, shapes do not fit, t and times are both given, or a t is 0 or outside
            the SDE.
    """
    task = Regression.of(Pair.of(denoiser, head), x0, times, t, noise, generator, cond, reduction)
    return task.loss(task.second() - task.noise**2)


def npr_loss(
    denoiser: Denoiser,
    head: Head | None,
    x0: Tensor,
    *,
    times: TimeSampler | None = None,
    t: Tensor | None = None,
    noise: Tensor | None = None,
    generator: Draws | None = None,
    cond: Mapping[str, Any] | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """E |h - (eps - eps_hat)^2|^2 / d, whose minimiser is h = Var[eps | x_t] + (eps_hat - E[eps | x_t])^2.

    Arguments and errors: `sn_loss`.
    """
    task = Regression.of(Pair.of(denoiser, head), x0, times, t, noise, generator, cond, reduction)
    N, h = task.both(fixed=True)
    return task.loss(h - task.residual(N) ** 2)


def ocm_loss(
    denoiser: Denoiser,
    head: Head | None,
    x0: Tensor,
    *,
    times: TimeSampler | None = None,
    t: Tensor | None = None,
    noise: Tensor | None = None,
    probe: Tensor | None = None,
    generator: Draws | None = None,
    cond: Mapping[str, Any] | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """E |h + sigma r (J^T r)|^2 / d, J = d eps_hat / d x_t, whose minimiser is h = -sigma diag J, for the exact
    denoiser sigma^2 diag(Hessian of log p_t). A further evaluation of the denoiser makes the target, by its gradient.

    Args:
        probe: instead of drawing, r, numbers +1 and -1, shape of x0.

    The other arguments and the errors: `sn_loss`; the denoiser must be differentiable.
    """
    task = Regression.of(Pair.of(denoiser, head), x0, times, t, noise, generator, cond, reduction)
    batch = task.batch
    if probe is None:
        source = batch.part.generator
        bits = batch.part.draw(x0.shape, lambda shape: torch.randint(2, shape, generator=source, device=source.device))
        probe = (2 * bits - 1).to(x0)
    with torch.enable_grad():
        x_t = batch.x_t.detach().requires_grad_()
        (product,) = torch.autograd.grad((denoiser.eps(x_t, batch.t, **task.cond) * probe).sum(), x_t)
    target = expand_like(-denoiser.sde.sigma(batch.t), product) * probe * product
    return task.loss(task.second() - target)


def training_loss(loss: Callable[..., Tensor], denoiser: Denoiser | None = None, **options: Any) -> Loss:
    """One of these losses for `Trainer(..., loss=...)`.

    Args:
        loss: `sn_loss`, `npr_loss`, `ocm_loss` or `hybrid_loss`.
        denoiser: where the head is a network of its own, the denoiser beside it, and the trainer gets an adapter
            around the head, `denoiser.with_net(head)` say. Without, the trained denoiser's own network has two outputs.
        options: of the loss.

    >>> from scoresde import EpsDenoiser, VPSDE
    >>> from scoresde.nn import UNet
    >>> from scoresde.training import TrainConfig, Trainer
    >>> from scoresde.variance import NPRDenoiser, TrunkWithHead
    >>> unet, sde = UNet(channels=8), VPSDE()  # trained before
    >>> model = EpsDenoiser(TrunkWithHead(unet), sde, time=lambda t: 999 * t)
    >>> data = torch.zeros(32, 1, 8, 8)
    >>> trainer = Trainer(model, data, TrainConfig(steps=2, batch_size=8), loss=training_loss(npr_loss))
    >>> NPRDenoiser(trainer.fit(progress=False).ema)(data, 0.5).var.shape
    torch.Size([32, 1, 8, 8])
    """
    if denoiser is not None:
        check_denoiser(denoiser)

    def train(trained: NetworkDenoiser, x0: Tensor, generator: Draws, cond: Mapping[str, Any]) -> Tensor:
        beside, head = (trained, None) if denoiser is None else (denoiser, trained)
        return loss(beside, head, x0, generator=generator, cond=cond, **options)

    train.__name__ = loss.__name__ if denoiser is None else f"{loss.__name__} beside {type(denoiser).__name__}"
    return train


@dataclass(frozen=True)
class Regression:
    """A denoiser and its head before noisy data: what the losses are made of."""

    pair: Pair
    batch: NoisyBatch
    cond: Mapping[str, Any]
    reduction: Reduction

    @classmethod
    def of(
        cls, pair: Pair, x0: Tensor, times: TimeSampler | None, t: Tensor | None, noise: Tensor | None,
        generator: Draws | None, cond: Mapping[str, Any] | None, reduction: Reduction,
    ) -> Regression:  # fmt: skip
        """Before x0 at times that are drawn or given, t on its device. Arguments and errors: `sn_loss`."""
        check_batch(x0, "x0")
        refuse_masks(pair.denoiser, "a loss of heads")
        check_option(("mean", "none"), reduction=reduction)
        if t is not None and times is not None:
            raise ValueError("give t= or times=, not both")
        check_cond(cond, len(x0))
        batch = noisy_batch(pair.denoiser.sde, x0, times, t, noise, generator)
        return cls(pair, batch._replace(t=batch.t.to(x0.device)), cond or {}, reduction)

    @property
    def noise(self) -> Tensor:
        """eps."""
        return self.batch.noise

    def both(self, *, fixed: bool = False) -> tuple[Tensor, Tensor]:
        """N and h; fixed: no graph leads to N."""
        return self.pair.both(self.batch.x_t, self.batch.t, self.cond, fixed=fixed)

    def second(self) -> Tensor:
        """h."""
        return self.pair.second(self.batch.x_t, self.batch.t, self.cond)

    def residual(self, N: Tensor) -> Tensor:
        """eps_hat - eps."""
        return self.pair.eps(self.batch.x_t, self.batch.t, N) - self.noise

    def loss(self, error: Tensor) -> Tensor:
        """|error|^2 / d, each draw with its weight, reduced."""
        ratio = expand_like(self.batch.ratio, error).reshape(-1)
        return self.reduce(ratio * error.reshape(len(error), -1).square().mean(1))

    def reduce(self, values: Tensor) -> Tensor:
        """Of one value a sample, (B,)."""
        return values.mean() if self.reduction == "mean" else values


def hybrid_loss(
    denoiser: Denoiser,
    head: Head | None,
    x0: Tensor,
    *,
    grid: Grid | None = None,
    weight: float = 1e-3,
    levels: int | None = None,
    data_range: tuple[float, float] = (-1.0, 1.0),
    t: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    cond: Mapping[str, Any] | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Improved DDPM's L_simple + weight L_vlb (Nichol and Dhariwal, 2021, section 3.1), which trains mean and head
    together: L_simple = E |eps_hat - eps|^2 / d, and L_vlb is the bound of the chain with the learned variance, in nats
    per dimension, but for the prior's part; its gradients reach the head alone.

    Args:
        denoiser: the model, trained by L_simple.
        head: as in `sn_loss`; v = (h + 1) / 2.
        x0: clean data, shape (B, ...), floating point.
        grid: whose steps make the chain, as in `LearnedRangeDenoiser`. One step of it, uniformly drawn and stratified,
            stands for all.
        weight: of L_vlb.
        levels, data_range: of the decoder, as in `scoresde.likelihood.elbo`; without levels it is a density.
        t: instead of drawing, times of the grid, shape () or (B,).
        noise, generator, cond, reduction: as in `sn_loss`.

    Raises:
        TypeError, ValueError: as `sn_loss` and `LearnedRangeDenoiser`; if weight is negative, or x0 is outside the
            data range of the levels.
    """
    check_nonnegative(weight=weight)
    pair, whole = Pair.of(denoiser, head), chain_grid(denoiser.sde, grid)
    times = _NodesOf(whole) if t is None else None
    task = Regression.of(pair, x0, times, t, noise, generator, cond, reduction)
    N, h = task.both()
    error = task.residual(N)
    # D - x_0 = s (N - N*), which is finite at alpha = 0 too
    _, s = denoiser.affine(task.batch.t)
    distance = expand_like(s, h) * error_of(denoiser, N.detach(), task.batch.t, x0, task.noise)
    nats = _nats(Step.of(whole, task.batch.t), h, x0, distance, levels, data_range)
    return task.loss(error) + weight * whole.steps * task.reduce(nats.reshape(len(nats), -1).mean(1))


def _nats(
    step: Step, h: Tensor, x0: Tensor, distance: Tensor, levels: int | None, data_range: tuple[float, float]
) -> Tensor:
    """A step's part of the bound, elementwise: KL, or the code length of x_0 for the last. distance: D - x_0."""
    low, last = expand_like(step.log_low, h), expand_like(step.last, h).bool()
    log_ratio = (h + 1) / 2 * (expand_like(step.log_high, h) - low)  # log(v_step / c^2)
    square = (expand_like(step.log_b2, h) - low).exp() * distance**2
    kl = ((-log_ratio).expm1() + log_ratio + square * (-log_ratio).exp()) / 2
    # Where a branch is not taken, its input must be harmless: an infinity times zero is a NaN in the gradient.
    std = torch.where(last, (low + log_ratio) / 2, 0.0).exp()
    return torch.where(last, _code_length(x0, torch.where(last, distance, 0.0), std, levels, data_range), kl)


def _code_length(
    x0: Tensor, distance: Tensor, std: Tensor, levels: int | None, data_range: tuple[float, float]
) -> Tensor:
    """-log N(x_0; x_0 + distance, std^2) of each element, as a density or of its level's bin, shape of x0."""
    if levels is None:
        return (distance / std) ** 2 / 2 + std.log() + math.log(2 * math.pi) / 2
    bins = Decoder.of(x0, 1.0, levels, data_range)
    assert bins.below is not None
    assert bins.above is not None
    far = 1e3 * (data_range[1] - data_range[0])  # for the outer bins, whose infinity would be a NaN in the gradient
    below, above = bins.below.clamp(min=-far), bins.above.clamp(max=far)
    low, high = ((edge - distance.double()) / std.double() for edge in (below, above))
    return -log_probability(low, high).to(std.dtype)


class _NodesOf(TimeSampler):
    """The noisy times of a grid, each as likely."""

    stratified = True

    def __init__(self, grid: Grid) -> None:
        self.times = grid.times[:-1].flip(0)

    def quantile(self, sde: SDE, u: Tensor) -> Tensor:
        return self.times.to(u.device)[(u * len(self.times)).long()]
