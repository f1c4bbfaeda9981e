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
from typing import Any

import torch
from torch import Tensor

from scoresde.checks import check_range
from scoresde.denoiser import Denoiser, Posterior
from scoresde.tensors import Time, expand_like, known_any, precise
from scoresde.variance.trunk import Head, Pair
from scoresde.views import combine
from scoresde.wrappers import SameMean

__all__ = ["HeadDenoiser", "NPRDenoiser", "OCMDenoiser", "SNDenoiser"]


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
    def borrowed(self) -> bool:
        return False

    def covariance(self, t: Time) -> None:
        return None

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


# ---- what they share ----
