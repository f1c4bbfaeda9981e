"""Heads: networks that learn the variance of x_0 given x_t elementwise, beside a denoiser that stays as it is.

Since x_0 = (x_t - sigma eps) / alpha, Var[x_0 | x_t] = (sigma / alpha)^2 Var[eps | x_t]. With eps_hat the denoiser's
noise prediction, a head h(x_t, t) is regressed on a target whose mean is known, by |h - target|^2 / d:

    SN    eps^2                    var = (sigma / alpha)^2 (h - eps_hat^2)
    NPR   (eps - eps_hat)^2        var = (sigma / alpha)^2 h
    OCM   -sigma r (J^T r)         var = (sigma / alpha)^2 (1 + h)        J = d eps_hat / d x_t,  r = +-1 at random

SN (squared noise) takes the mean for perfect, and a small difference of large numbers. NPR (noise prediction residual)
learns E[(x_0 - D)^2 | x_t] itself, the best variance whatever the error of D. OCM's h is sigma^2 times the diagonal of
the Hessian of log p_t, since E[r (H r)] = diag H. Improved DDPM's head v = (h + 1) / 2 stands for the noise of one step
t -> s, between the two choices of DDPM:

    log v_step = v log(sigma_t^2 w) + (1 - v) log(sigma_s^2 w),    w = 1 - e^{-2 (lambda_s - lambda_t)}

Each is a denoiser with `Posterior.var`, for everything that reads it. A head is a network of its own, or a branch on
the denoiser's last feature map (`TrunkWithHead`), and then mean and variance cost one call.

Sources: Bao et al. (2022), "Estimating the Optimal Covariance with Imperfect Mean in Diffusion Probabilistic Models"
(SN, NPR); Ou et al. (2025), "Improving Probabilistic Diffusion Models With Optimal Diagonal Covariance Matching" (OCM);
Nichol and Dhariwal (2021), "Improved Denoising Diffusion Probabilistic Models".
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde.chain import DDPMChain
from scoresde.denoiser import Denoiser, NetworkDenoiser, Posterior, X0Denoiser
from scoresde.grid import Grid
from scoresde.nn.unet import UNet, _group_norm, _ResidualBlock, _zero
from scoresde.sde import SDE
from scoresde.solvers.base import check_nonnegative, check_option
from scoresde.tensors import Time, check_batch, expand_like, known_any, precise
from scoresde.training.loss import noisy_batch
from scoresde.training.trainer import Loss
from scoresde.training.weights import TimeSampler
from scoresde.variance.table import check_range
from scoresde.views import Affine, combine, view_of_mean
from scoresde.wrappers import SameMean

__all__ = [
    "LearnedRangeDenoiser",
    "NPRDenoiser",
    "OCMDenoiser",
    "SNDenoiser",
    "SplitOutput",
    "TrunkWithHead",
    "hybrid_loss",
    "npr_loss",
    "ocm_loss",
    "sn_loss",
    "training_loss",
]

Head = Callable[..., Tensor] | NetworkDenoiser
Reduction = Literal["mean", "none"]


# ---- networks with two outputs ----


class TrunkWithHead(nn.Module):
    """A U-Net with a further output on its last feature map: GroupNorm, SiLU and a 3 x 3 convolution that starts at
    zero. As a network it returns what the U-Net does, to the last bit; `both` returns the head's output too.

    Args:
        net: the trained `UNet`, or another module with `features(x, time, **cond)`, a feature map of the images' size,
            `readout(features)`, and the layers `outward` and, for block=True, `time`. It is held, not copied.
        channels: of the head's output, by default those of the image.
        block: put a residual block that knows the time before the head.
        freeze: the U-Net's weights take no gradients any more, and it stays in eval mode (no dropout) while the head
            is trained. False to train both together, as for `hybrid_loss`.

    Raises:
        TypeError: if net has not what is needed.
    """

    def __init__(self, net: UNet, channels: int | None = None, *, block: bool = False, freeze: bool = True) -> None:
        super().__init__()
        needed = ["features", "readout", "outward", *(["time"] if block else [])]
        if lacking := [name for name in needed if not hasattr(net, name)]:
            raise TypeError(
                f"{type(net).__name__} has no {', '.join(lacking)}: a head on its features needs a UNet; for other "
                "networks pass a head that is a network of its own"
            )
        self.net, self.frozen = net, freeze
        width = net.outward.in_channels
        self.block = _ResidualBlock(width, width, net.time.outward.out_features, 0.0) if block else None
        self.norm = _group_norm(width)
        self.outward = _zero(nn.Conv2d(width, channels or net.outward.out_channels, 3, padding=1))
        self.to(next(net.parameters()))
        if freeze:
            net.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> TrunkWithHead:
        super().train(mode)
        if self.frozen:
            self.net.eval()
        return self

    def forward(self, x: Tensor, time: Tensor, **cond: Any) -> Tensor:
        """What the U-Net returns."""
        out: Tensor = self.net(x, time, **cond)
        return out

    def both(self, x: Tensor, time: Tensor, **cond: Any) -> tuple[Tensor, Tensor]:
        """What the U-Net returns, and the head's output, from one evaluation of the U-Net."""
        h = self.net.features(x, time, **cond)
        g = h if self.block is None else self.block(h, self.net.time(time, cond.get("label")))
        return self.net.readout(h), self.outward(F.silu(self.norm(g)))


class SplitOutput(nn.Module):
    """A network whose output has twice the channels of x, (B, 2 C, ...), the prediction first, then the head's: the
    networks of improved DDPM and of guided diffusion.

    Args:
        net: the module; held, not copied.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, time: Tensor, **cond: Any) -> Tensor:
        """The first half."""
        return self.both(x, time, **cond)[0]

    def both(self, x: Tensor, time: Tensor, **cond: Any) -> tuple[Tensor, Tensor]:
        """The two halves.

        Raises:
            ValueError: if the network's output has not twice the channels of x.
        """
        out = self.net(x, time, **cond)
        if out.shape != (len(x), 2 * x.shape[1], *x.shape[2:]):
            raise ValueError(
                f"the network returned {tuple(out.shape)} for x of shape {tuple(x.shape)}: expected twice the channels"
            )
        first, second = out.chunk(2, dim=1)
        return first, second


class _Tap(nn.Module):
    """A network of two outputs that returns the first and keeps the second. One is made for each call, so that threads
    share nothing; it is a module since a denoiser reads the network's dtype from its parameters.
    """

    side: Tensor | None = None

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, time: Tensor, **cond: Any) -> Tensor:
        out, self.side = self.net.both(x, time, **cond)  # type: ignore[operator]
        return out


def _check_head(denoiser: Denoiser, head: Head | None) -> None:
    if not isinstance(denoiser, Denoiser):
        raise TypeError(f"expected a Denoiser, not {type(denoiser).__name__}")
    if head is not None and not callable(head):
        raise TypeError(f"head is {type(head).__name__}: expected a callable head(x, time, **cond)")
    if isinstance(head, Denoiser):
        if not isinstance(head, NetworkDenoiser):
            raise TypeError(f"head is {type(head).__name__}: expected a network, or an adapter around one")
        if head.sde != denoiser.sde:
            raise ValueError(f"the head was made for {head.sde!r}, the denoiser for {denoiser.sde!r}")
    if head is None and not (isinstance(denoiser, NetworkDenoiser) and hasattr(denoiser.net, "both")):
        raise TypeError(
            f"no head given, and {denoiser!r} has none: pass head=, or a denoiser around TrunkWithHead(unet) or "
            "SplitOutput(net)"
        )


def _head_output(denoiser: Denoiser, head: Head, x: Tensor, t: Time, cond: Mapping[str, Any]) -> Tensor:
    """The output of a head of its own, which sees x and the time label as the denoiser's network does."""
    if isinstance(head, NetworkDenoiser):
        return head.output(x, t, **cond)
    while isinstance(inner := getattr(denoiser, "denoiser", None), Denoiser):
        denoiser = inner
    adapter = denoiser.with_net(head) if isinstance(denoiser, NetworkDenoiser) else X0Denoiser(head, denoiser.sde)
    return adapter.output(x, t, **cond)


def _both(
    denoiser: Denoiser, head: Head | None, x: Tensor, t: Time, cond: Mapping[str, Any], *, train: bool = False
) -> tuple[Tensor, Tensor]:
    """The denoiser's own output N and the head's, in the dtype of x; in training no graph leads to N from outside."""
    if head is not None:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not train):
            N = denoiser.output(x, t, **cond)
        return N, _head_output(denoiser, head, x, t, cond)
    assert isinstance(denoiser, NetworkDenoiser)
    assert isinstance(denoiser.net, nn.Module)
    tap = _Tap(denoiser.net)
    N = denoiser.with_net(tap).output(x, t, **cond)
    if tap.side is None or tap.side.shape != x.shape:
        found = None if tap.side is None else tuple(tap.side.shape)
        raise ValueError(f"the head returned {found} for x of shape {tuple(x.shape)}: expected that shape")
    return N.detach() if train else N, tap.side.to(x.dtype)


def _noise_of_output(denoiser: Denoiser, t: Tensor) -> Affine:
    """(u, w) of eps_hat = u x + w N."""
    return denoiser.view_of_output(*view_of_mean("eps", denoiser.sde, t), t)


# ---- denoisers ----


class _HeadDenoiser(SameMean):
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
        _check_head(denoiser, head)
        if data_range is not None:
            check_range(data_range)
        self.head, self.data_range, self.average = head, data_range, average

    def posterior(self, x: Tensor, t: Time, /, **cond: Any) -> Posterior:
        N, h = _both(self.denoiser, self.head, x, t, cond)
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


class SNDenoiser(_HeadDenoiser):
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
        u, w = _noise_of_output(self.denoiser, t)
        return self._of_noise(t, h - combine(u, x, w, N) ** 2)


class NPRDenoiser(_HeadDenoiser):
    """var = (sigma / alpha)^2 h, h a head trained by `npr_loss`. Arguments and errors: `SNDenoiser`."""

    def _variance(self, t: Tensor, x: Tensor, N: Tensor, h: Tensor) -> Tensor:
        return self._of_noise(t, h)


class OCMDenoiser(_HeadDenoiser):
    """var = (sigma / alpha)^2 (1 + h), h a head trained by `ocm_loss`. Arguments and errors: `SNDenoiser`."""

    def _variance(self, t: Tensor, x: Tensor, N: Tensor, h: Tensor) -> Tensor:
        return self._of_noise(t, 1 + h)


class LearnedRangeDenoiser(_HeadDenoiser):
    """The learned variance of improved DDPM, as the Var[x_0 | x_t] with which c^2 + b^2 Var is the step's v_step in the
    module's docstring: c^2 = sigma_s^2 w and b = alpha_s w are DDPM's, so on the grid's own steps DDPM's chain with the
    posterior variance is improved DDPM's, re-spaced or not. At the last noisy time it is the decoder's variance.

    Args:
        denoiser, head, data_range, average: as in `SNDenoiser`; a head trained by `hybrid_loss`. v < 0, a variance
            below DDPM's smaller one, counts as 0.
        grid: whose steps are meant, ending at t = 0; by default all steps of a `DDPMChain`. At a time between two of
            its times, s is the next below.

    Raises:
        TypeError, ValueError: as for `SNDenoiser`; and if the grid has another SDE, fewer than two steps, does not end
            at 0, or is missing for an SDE that is no chain.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        head: Head | None = None,
        *,
        grid: Grid | None = None,
        data_range: tuple[float, float] | None = None,
        average: bool = False,
    ) -> None:
        super().__init__(denoiser, head, data_range=data_range, average=average)
        self.grid = _whole(denoiser.sde, grid)

    def _variance(self, t: Tensor, x: Tensor, N: Tensor, h: Tensor) -> Tensor:
        step = _Step.of(self.grid, t)
        low, v = expand_like(step.log_low, x), (h + 1) / 2
        excess = torch.expm1(v * (expand_like(step.log_high, x) - low)) + expand_like(step.last, x)
        return (low - expand_like(step.log_b2, x)).exp() * excess


# ---- losses ----


def sn_loss(
    denoiser: Denoiser,
    head: Head | None,
    x0: Tensor,
    *,
    times: TimeSampler | None = None,
    t: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
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
        generator: where t and noise are drawn from, on its own device; freshly seeded if not given.
        cond: keyword arguments for the networks.
        reduction: "mean" over the batch, or "none" for shape (B,).

    Raises:
        TypeError: if there is no head.
        ValueError: if x0 is not floating point, shapes do not fit, t and times are both given, or a t is 0 or outside
            the SDE.
    """
    draw = _Draw.of(denoiser, head, x0, times, t, noise, generator, reduction)
    return draw.loss(_head_alone(denoiser, head, draw, dict(cond or {})) - draw.noise**2)


def npr_loss(
    denoiser: Denoiser,
    head: Head | None,
    x0: Tensor,
    *,
    times: TimeSampler | None = None,
    t: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    cond: Mapping[str, Any] | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """E |h - (eps - eps_hat)^2|^2 / d, whose minimiser is h = Var[eps | x_t] + (eps_hat - E[eps | x_t])^2.

    Arguments and errors: `sn_loss`.
    """
    draw = _Draw.of(denoiser, head, x0, times, t, noise, generator, reduction)
    N, h = _both(denoiser, head, draw.x_t, draw.t, dict(cond or {}), train=True)
    u, w = _noise_of_output(denoiser, draw.t)
    return draw.loss(h - (draw.noise - combine(u, draw.x_t, w, N)) ** 2)


def ocm_loss(
    denoiser: Denoiser,
    head: Head | None,
    x0: Tensor,
    *,
    times: TimeSampler | None = None,
    t: Tensor | None = None,
    noise: Tensor | None = None,
    probe: Tensor | None = None,
    generator: torch.Generator | None = None,
    cond: Mapping[str, Any] | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """E |h + sigma r (J^T r)|^2 / d, J = d eps_hat / d x_t, whose minimiser is h = -sigma diag J, for the exact
    denoiser sigma^2 diag(Hessian of log p_t). A further evaluation of the denoiser makes the target, by its gradient.

    Args:
        probe: instead of drawing, r, numbers +1 and -1, shape of x0.

    The other arguments and the errors: `sn_loss`; the denoiser must be differentiable.
    """
    draw = _Draw.of(denoiser, head, x0, times, t, noise, generator, reduction)
    given = dict(cond or {})
    if probe is None:
        bits = torch.randint(2, x0.shape, generator=draw.generator, device=draw.generator.device)
        probe = (2 * bits - 1).to(x0)
    with torch.enable_grad():
        x_t = draw.x_t.detach().requires_grad_()
        (product,) = torch.autograd.grad((denoiser.eps(x_t, draw.t, **given) * probe).sum(), x_t)
    target = expand_like(-denoiser.sde.sigma(draw.t), product) * probe * product
    return draw.loss(_head_alone(denoiser, head, draw, given) - target)


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
    whole = _whole(denoiser.sde, grid)
    draw = _Draw.of(denoiser, head, x0, _NodesOf(whole), t, noise, generator, reduction, both=True)
    N, h = _both(denoiser, head, draw.x_t, draw.t, dict(cond or {}))
    u, w = _noise_of_output(denoiser, draw.t)
    error = combine(u, draw.x_t, w, N) - draw.noise
    step = _Step.of(whole, draw.t)
    low, last = expand_like(step.log_low, h), expand_like(step.last, h).bool()
    log_ratio = (h + 1) / 2 * (expand_like(step.log_high, h) - low)  # log v_step - log(sigma_s^2 w)
    # D - x_0 = -(sigma / alpha) (eps_hat - eps)
    distance = expand_like(-(-denoiser.sde.half_log_snr(draw.t)).exp(), h) * error.detach()
    square = (expand_like(step.log_b2, h) - low).exp() * distance**2
    kl = ((-log_ratio).expm1() + log_ratio + square * (-log_ratio).exp()) / 2
    # Where a branch is not taken, its input must be harmless: an infinity times zero is a NaN in the gradient.
    std = torch.where(last, (low + log_ratio) / 2, 0.0).exp()
    nll = _code_length(x0, torch.where(last, distance, 0.0), std, levels, data_range)
    vlb = torch.where(last, nll, kl)
    return draw.loss(error) + weight * whole.steps * draw.reduce(vlb.reshape(len(vlb), -1).mean(1))


def _head_alone(denoiser: Denoiser, head: Head | None, draw: _Draw, cond: Mapping[str, Any]) -> Tensor:
    """h, where the mean is not wanted: a head of its own is all that is called."""
    if head is None:
        return _both(denoiser, None, draw.x_t, draw.t, cond, train=True)[1]
    return _head_output(denoiser, head, draw.x_t, draw.t, cond)


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
    >>> unet, sde = UNet(channels=8), VPSDE()  # trained before
    >>> model = EpsDenoiser(TrunkWithHead(unet), sde, time=lambda t: 999 * t)
    >>> data = torch.zeros(32, 1, 8, 8)
    >>> trainer = Trainer(model, data, TrainConfig(steps=2, batch_size=8), loss=training_loss(npr_loss))
    >>> NPRDenoiser(trainer.fit(progress=False).ema)(data, 0.5).var.shape
    torch.Size([32, 1, 8, 8])
    """

    def train(trained: NetworkDenoiser, x0: Tensor, generator: torch.Generator, cond: Mapping[str, Any]) -> Tensor:
        beside, head = (trained, None) if denoiser is None else (denoiser, trained)
        return loss(beside, head, x0, generator=generator, cond=cond, **options)

    train.__name__ = loss.__name__ if denoiser is None else f"{loss.__name__} beside {type(denoiser).__name__}"
    return train


class _Draw(NamedTuple):
    """A batch of noisy data, as `dsm_loss` draws it."""

    t: Tensor
    ratio: Tensor
    noise: Tensor
    x_t: Tensor
    generator: torch.Generator
    reduction: Reduction

    @classmethod
    def of(
        cls,
        denoiser: Denoiser,
        head: Head | None,
        x0: Tensor,
        times: TimeSampler | None,
        t: Tensor | None,
        noise: Tensor | None,
        generator: torch.Generator | None,
        reduction: Reduction,
        both: bool = False,
    ) -> _Draw:
        """With `both`, t takes precedence over times."""
        check_batch(x0, "x0")
        _check_head(denoiser, head)
        check_option(("mean", "none"), reduction=reduction)
        if t is not None and times is not None and not both:
            raise ValueError("give t= or times=, not both")
        batch = noisy_batch(denoiser.sde, x0, times, t, noise, generator)
        return cls(*batch._replace(t=batch.t.to(x0.device)), reduction)

    def loss(self, error: Tensor) -> Tensor:
        return self.reduce(expand_like(self.ratio, error).reshape(-1) * error.reshape(len(error), -1).square().mean(1))

    def reduce(self, values: Tensor) -> Tensor:
        return values.mean() if self.reduction == "mean" else values


# ---- steps of a chain ----


class _Step(NamedTuple):
    """What the steps t -> s of a grid make of v, each float64, of the shape of t.

    Attributes:
        log_low: log(sigma_s^2 w), the posterior variance; for the last step, whose own is 0, of the step before.
        log_high: log(sigma_t^2 w).
        log_b2: log (alpha_s w)^2.
        last: 1 for the last step, else 0.
    """

    log_low: Tensor
    log_high: Tensor
    log_b2: Tensor
    last: Tensor

    @classmethod
    def of(cls, grid: Grid, t: Tensor) -> _Step:
        sde, times = grid.sde, grid.times.flip(0).to(t.device)
        # The next time below; t may be one of the grid's in float32.
        i = torch.searchsorted(times, (t * (1 - 1e-6)).contiguous()) - 1
        last = i <= 0
        s = torch.where(last, times[1], times[i.clamp(min=0)])
        above = torch.where(last, times[2], t)
        lam = sde.half_log_snr(s)
        w = -torch.expm1(2 * (sde.half_log_snr(above) - lam))
        high = torch.where(last, sde.sigma(t), sde.sigma(t) * w.sqrt())
        b = torch.where(last, 1.0, sde.alpha(s) * w)
        return cls(2 * sde.sigma(s).log() + w.log(), 2 * high.log(), 2 * b.log(), last.to(t))


class _NodesOf(TimeSampler):
    """The noisy times of a grid, each as likely."""

    stratified = True

    def __init__(self, grid: Grid) -> None:
        self.times = grid.times[:-1].flip(0)

    def quantile(self, sde: SDE, u: Tensor) -> Tensor:
        return self.times.to(u.device)[(u * len(self.times)).long()]


def _whole(sde: SDE, grid: Grid | None) -> Grid:
    """The grid of a chain with learned variance."""
    if grid is None:
        if not isinstance(sde, DDPMChain):
            raise ValueError(f"{sde!r} is no DDPMChain, whose steps the learned variance would be of: give grid=")
        grid = Grid(sde, torch.arange(sde.steps, -1, -1, dtype=torch.float64, device="cpu"))
    grid.check_sde(sde)
    if grid.steps < 2 or float(grid.times[-1]) != 0:
        raise ValueError(f"{grid!r}: expected at least two steps, the last to t = 0")
    return grid


def _code_length(
    x0: Tensor, distance: Tensor, std: Tensor, levels: int | None, data_range: tuple[float, float]
) -> Tensor:
    """-log N(x_0; x_0 + distance, std^2) of each element, as a density or of its level's bin, shape of x0."""
    if levels is None:
        return (distance / std) ** 2 / 2 + std.log() + math.log(2 * math.pi) / 2
    # Here, since it imports the solvers, and one of these imports this package.
    from scoresde.likelihood.bound import _Decoder, _log_probability

    bins = _Decoder.of(x0, 1.0, levels, data_range)
    assert bins.below is not None
    assert bins.above is not None
    far = 1e3 * (data_range[1] - data_range[0])  # for the outer bins, whose infinity would be a NaN in the gradient
    below, above = bins.below.clamp(min=-far), bins.above.clamp(max=far)
    low, high = ((edge - distance.double()) / std.double() for edge in (below, above))
    return -_log_probability(low, high).to(std.dtype)
