"""Heads: networks that learn the variance of x_0 given x_t elementwise, beside a denoiser that stays as it is.

Since x_0 = (x_t - sigma eps) / alpha, Var[x_0 | x_t] = (sigma / alpha)^2 Var[eps | x_t]. With eps_hat the denoiser's
noise prediction, a head h(x_t, t) is regressed on a target whose mean is known, by |h - target|^2 / d:

    SN    eps^2                    var = (sigma / alpha)^2 (h - eps_hat^2)
    NPR   (eps - eps_hat)^2        var = (sigma / alpha)^2 h
    OCM   -sigma r (J^T r)         var = (sigma / alpha)^2 (1 + h)        J = d eps_hat / d x_t,  r = +-1 at random

SN (squared noise) takes the mean for perfect, and a small difference of large numbers. NPR (noise prediction residual)
learns E[(x_0 - D)^2 | x_t] itself, the best variance whatever the error of D. OCM's h is sigma^2 times the diagonal of
the Hessian of log p_t, since E[r (H r)] = diag H.

Each is a denoiser with `Posterior.var`, for everything that reads it. A head is a network of its own, or a branch on
the denoiser's last feature map (`scoresde.variance.trunk`), and then mean and variance cost one call.

Sources: Bao et al. (2022), "Estimating the Optimal Covariance with Imperfect Mean in Diffusion Probabilistic Models"
(SN, NPR); Ou et al. (2025), "Improving Probabilistic Diffusion Models With Optimal Diagonal Covariance Matching" (OCM).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from scoresde.checks import check_option, check_range
from scoresde.denoiser import Denoiser, NetworkDenoiser, Posterior
from scoresde.tensors import Time, check_batch, expand_like, known_any, precise
from scoresde.training.loss import Draws, NoisyBatch, noisy_batch
from scoresde.training.step import Loss
from scoresde.training.weights import TimeSampler
from scoresde.variance.trunk import Head, Pair
from scoresde.views import combine
from scoresde.wrappers import SameMean

__all__ = [
    "HeadDenoiser",
    "NPRDenoiser",
    "OCMDenoiser",
    "Regression",
    "SNDenoiser",
    "noisy",
    "npr_loss",
    "ocm_loss",
    "sn_loss",
    "training_loss",
]

Reduction = Literal["mean", "none"]


# ---- denoisers ----


class HeadDenoiser(SameMean):
    """A denoiser whose variance comes from a head. Its mean, and all that solvers read of it, is the denoiser's own."""

    def __init__(
        self,
        denoiser: Denoiser,
        head: Head | None = None,
        *,
        data_range: tuple[float, float] | None = None,
        average: bool = False,
    ) -> None:
        super().__init__(denoiser)
        Pair.of(denoiser, head)
        if data_range is not None:
            check_range(data_range)
        self.head, self.data_range, self.average = head, data_range, average

    @property
    def pair(self) -> Pair:
        """The denoiser and its head."""
        return Pair(self.denoiser, self.head)

    def posterior(self, x: Tensor, t: Time, /, **cond: Any) -> Posterior:
        N, h = self.pair.both(x, t, cond)
        r, s = self.denoiser.affine(t)
        known = precise(t)
        # At t = 0 the variance is zero whatever the head says, but eps_hat is not defined there.
        var = self._variance(torch.where(known == 0, self.sde.t_min, known), x, N, h)
        if self.average:
            var = var.reshape(len(var), -1).mean(1).reshape(-1, *[1] * (x.ndim - 1))
        most = None if self.data_range is None else check_range(self.data_range) ** 2
        return Posterior(combine(r, x, s, N), var.clamp(min=0, max=most))

    @abstractmethod
    def _variance(self, t: Tensor, x: Tensor, N: Tensor, h: Tensor) -> Tensor:
        """Var[x_0 | x_t] as the head has it, shape of x; t > 0."""

    def _of_noise(self, t: Tensor, var: Tensor) -> Tensor:
        """(sigma / alpha)^2 var."""
        if known_any(self.sde.alpha(t) == 0):
            raise ValueError(
                f"alpha is 0 at t = {t.flatten().tolist()[:4]} of {self.sde!r}, where the noise tells nothing of the "
                "variance of x_0: start the grid at a smaller t"
            )
        return expand_like((-2 * self.sde.half_log_snr(t)).exp(), var) * var


class SNDenoiser(HeadDenoiser):
    """var = (sigma / alpha)^2 (h - eps_hat^2), h a head trained by `sn_loss`.

    Args:
        denoiser: the denoiser, which keeps its mean.
        head: head(x, time, **cond), called like the denoiser's network; or an adapter around it with a time label of
            its own, EpsDenoiser(head, sde, time=...), of which the network's output is read; by default the second
            output of the denoiser's network (`TrunkWithHead`, `SplitOutput`): one call gives mean and variance.
        data_range: (lo, hi) of bounded data: the variance is at most ((hi - lo) / 2)^2. It is always at least 0, and
            never cut at (sigma / alpha)^2: that bounds its mean over x_t and elements, not each of its values.
        average: one variance for each sample, the mean over its elements, before the bounds.

    Raises:
        TypeError: if there is no head.
        ValueError: on another data_range; by the call, if the head's output has not the shape of x, or alpha = 0.
    """

    def _variance(self, t: Tensor, x: Tensor, N: Tensor, h: Tensor) -> Tensor:
        return self._of_noise(t, h - self.pair.eps(x, t, N) ** 2)


class NPRDenoiser(HeadDenoiser):
    """var = (sigma / alpha)^2 h, h a head trained by `npr_loss`. Arguments and errors: `SNDenoiser`."""

    def _variance(self, t: Tensor, x: Tensor, N: Tensor, h: Tensor) -> Tensor:
        return self._of_noise(t, h)


class OCMDenoiser(HeadDenoiser):
    """var = (sigma / alpha)^2 (1 + h), h a head trained by `ocm_loss`. Arguments and errors: `SNDenoiser`."""

    def _variance(self, t: Tensor, x: Tensor, N: Tensor, h: Tensor) -> Tensor:
        return self._of_noise(t, 1 + h)


# ---- losses ----


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
    pair = Pair.of(denoiser, head)
    task = Regression(pair, noisy(pair, x0, times, t, noise, generator), cond or {}, reduction)
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
    pair = Pair.of(denoiser, head)
    task = Regression(pair, noisy(pair, x0, times, t, noise, generator), cond or {}, reduction)
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
    pair = Pair.of(denoiser, head)
    batch = noisy(pair, x0, times, t, noise, generator)
    task = Regression(pair, batch, cond or {}, reduction)
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
    >>> from scoresde.variance import TrunkWithHead
    >>> unet, sde = UNet(channels=8), VPSDE()  # trained before
    >>> model = EpsDenoiser(TrunkWithHead(unet), sde, time=lambda t: 999 * t)
    >>> data = torch.zeros(32, 1, 8, 8)
    >>> trainer = Trainer(model, data, TrainConfig(steps=2, batch_size=8), loss=training_loss(npr_loss))
    >>> NPRDenoiser(trainer.fit(progress=False).ema)(data, 0.5).var.shape
    torch.Size([32, 1, 8, 8])
    """

    def train(trained: NetworkDenoiser, x0: Tensor, generator: Draws, cond: Mapping[str, Any]) -> Tensor:
        beside, head = (trained, None) if denoiser is None else (denoiser, trained)
        return loss(beside, head, x0, generator=generator, cond=cond, **options)

    train.__name__ = loss.__name__ if denoiser is None else f"{loss.__name__} beside {type(denoiser).__name__}"
    return train


# ---- what they share ----


def noisy(
    pair: Pair,
    x0: Tensor,
    times: TimeSampler | None,
    t: Tensor | None,
    noise: Tensor | None,
    generator: Draws | None,
) -> NoisyBatch:
    """What the losses see of x0, with t on its device. Arguments and errors: `sn_loss`."""
    check_batch(x0, "x0")
    if t is not None and times is not None:
        raise ValueError("give t= or times=, not both")
    batch = noisy_batch(pair.denoiser.sde, x0, times, t, noise, generator)
    return batch._replace(t=batch.t.to(x0.device))


@dataclass(frozen=True)
class Regression:
    """A denoiser and its head before noisy data: what the losses are made of.

    Raises:
        ValueError: on another reduction.
    """

    pair: Pair
    batch: NoisyBatch
    cond: Mapping[str, Any]
    reduction: Reduction

    def __post_init__(self) -> None:
        check_option(("mean", "none"), reduction=self.reduction)

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
