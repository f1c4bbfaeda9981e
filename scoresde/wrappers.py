"""Wrappers: a denoiser in, a denoiser out, with another posterior mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from scoresde.denoiser import Denoiser, NetworkDenoiser, Posterior, check_denoiser
from scoresde.tensors import Time, expand_like
from scoresde.views import Affine

__all__ = ["Clip", "DynamicThreshold", "SameMean", "Wrapper", "lacks_variance"]


class Wrapper(Denoiser):
    """A denoiser that changes another's posterior mean. One that leaves the variance alone hands `covariance` on."""

    def __init__(self, denoiser: Denoiser) -> None:
        check_denoiser(denoiser, type(self).__name__)
        self.denoiser = denoiser
        self.sde = denoiser.sde

    @property
    def device(self) -> torch.device:
        return self.denoiser.device

    @property
    def borrowed(self) -> bool:
        return self.denoiser.borrowed


class SameMean(Wrapper):
    """A wrapper that leaves the mean alone, and with it all that solvers step in: no digits are lost on the way."""

    def posterior(self, x: Tensor, t: Time, /, **cond: Any) -> Posterior:
        return self.denoiser.posterior(x, t, **cond)

    def covariance(self, t: Time) -> Tensor | None:
        return self.denoiser.covariance(t)

    def view(self, name: str, x: Tensor, t: Time, /, **cond: Any) -> Tensor:
        return self.denoiser.view(name, x, t, **cond)

    def output(self, x: Tensor, t: Time, /, **cond: Any) -> Tensor:
        return self.denoiser.output(x, t, **cond)

    def outputs(self, times: Tensor) -> Callable[[int, Tensor, Mapping[str, Any]], Tensor]:
        return self.denoiser.outputs(times)

    def affine(self, t: Time) -> Affine:
        return self.denoiser.affine(t)

    def check_times(self, t: Tensor) -> None:
        self.denoiser.check_times(t)


class Clip(Wrapper):
    """The posterior mean clipped to the data's range [low, high].

    Views follow the clipped mean (eps is re-derived from it), as in DDPM and guided diffusion.

    Raises:
        ValueError: unless low < high.
    """

    def __init__(self, denoiser: Denoiser, low: float = -1.0, high: float = 1.0) -> None:
        super().__init__(denoiser)
        if not low < high:
            raise ValueError(f"Clip(low={low}, high={high}): expected low < high")
        self.low, self.high = low, high

    def posterior(self, x: Tensor, t: Time, /, **cond: Any) -> Posterior:
        mean, var = self.denoiser.posterior(x, t, **cond)
        return Posterior(mean.clamp(self.low, self.high), var)

    def covariance(self, t: Time) -> Tensor | None:
        return self.denoiser.covariance(t)


class DynamicThreshold(Wrapper):
    """Dynamic thresholding (Saharia et al., 2022, Imagen, section 2.3): with s the given quantile of |D| of each
    sample, raised to at least `bound`, D is clipped to [-s, s] and scaled by bound / s.

    Args:
        denoiser: the denoiser to wrap.
        quantile: in (0, 1].
        bound: the data's largest absolute value.

    Raises:
        ValueError: if quantile or bound is out of range.
    """

    def __init__(self, denoiser: Denoiser, quantile: float = 0.995, bound: float = 1.0) -> None:
        super().__init__(denoiser)
        if not (0 < quantile <= 1 and bound > 0):
            raise ValueError(f"quantile={quantile}, bound={bound}: expected 0 < quantile <= 1 and bound > 0")
        self.quantile, self.bound = quantile, bound

    def posterior(self, x: Tensor, t: Time, /, **cond: Any) -> Posterior:
        mean, var = self.denoiser.posterior(x, t, **cond)
        magnitude = mean.reshape(len(mean), -1).abs()
        # kthvalue, not quantile: torch.quantile refuses more than 16 million elements.
        rank = max(1, round(self.quantile * magnitude.shape[1]))
        s = expand_like(magnitude.kthvalue(rank, dim=1).values.clamp(min=self.bound), mean)
        return Posterior(mean.clamp(-s, s) * (self.bound / s), var)

    def covariance(self, t: Time) -> Tensor | None:
        return self.denoiser.covariance(t)


def lacks_variance(denoiser: Denoiser) -> bool:
    """Whether it is known to have no variance: a network for the mean alone."""
    return isinstance(denoiser, NetworkDenoiser) and type(denoiser).posterior is NetworkDenoiser.posterior
