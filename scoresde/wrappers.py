"""Wrappers: a denoiser in, a denoiser out, with another posterior mean."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from scoresde.codecs import Chained, Codec
from scoresde.denoiser import Denoiser, NetworkDenoiser, Posterior, check_denoiser
from scoresde.masks import Own
from scoresde.networks import contents
from scoresde.tensors import Time, expand_like
from scoresde.views import Affine

__all__ = [
    "Clip",
    "DynamicThreshold",
    "Latent",
    "Limit",
    "SameMean",
    "Tempered",
    "Wrapper",
    "below_limit",
    "lacks_variance",
    "parted",
    "without_codec",
]


class Wrapper(Denoiser):
    """A denoiser that changes another's posterior mean. One that leaves the variance alone hands `covariance` on.

    Attributes:
        masks: whether it may stand around or in a `scoresde.Masked`: it takes each entry by itself, or its means over
            an item's own.
    """

    masks: ClassVar[bool] = False

    def __init__(self, denoiser: Denoiser) -> None:
        check_denoiser(denoiser, type(self).__name__)
        self.denoiser = denoiser
        self.sde = denoiser.sde

    @property
    def device(self) -> torch.device:
        return self.denoiser.device

    def own(self, shape: Sequence[int], cond: Mapping[str, Any]) -> Own:
        return self.denoiser.own(shape, cond)

    @property
    def codec(self) -> Codec | None:
        return self.denoiser.codec

    @property
    def borrowed(self) -> bool:
        return self.denoiser.borrowed


class SameMean(Wrapper):
    """A wrapper that leaves the mean alone, and with it all that solvers step in: no digits are lost on the way."""

    def posterior(self, x: Tensor, t: Time, /, **cond: Any) -> Posterior:
        return self.denoiser.posterior(x, t, **cond)

    def covariance(self, t: Time) -> Tensor | None:
        return self.denoiser.covariance(t)

    def prepared(self, cond: Mapping[str, Any] | None) -> dict[str, Any]:
        return self.denoiser.prepared(cond)

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


class Latent(SameMean):
    """A denoiser of states z whose results are data x, by a codec: z = encode(x), x = decode(z).

    Shapes, x_T, trajectories and grids are of z, `sample` returns data and keeps z in `Solution.latent`, `log_prob`,
    `elbo` and `bits_per_dim` take data, and so do `encode` and the edits. To go on wrapping it is to wrap the denoiser:
    `Clip`, guidance and all other wrappers act on z and hand the codec on, unless they say otherwise.

    Args:
        denoiser: of z, in the shape and scale that it was trained on. If it has a codec itself, that stays next to it:
            x -> codec -> its codec -> z.
        codec: between data and z; None takes off the one that there is, so that results are z again.

    >>> import torch
    >>> from scoresde import VPSDE, sample
    >>> from scoresde.codecs import Standardise
    >>> from scoresde.exact import Gaussian
    >>> from scoresde.solvers import DDIM
    >>> denoiser = Gaussian(mean=[0.0], std=1.0).denoiser(VPSDE())
    >>> found = sample(Latent(denoiser, Standardise(mean=100.0, std=5.0)), (1000, 1), DDIM(), steps=20, seed=0)
    >>> bool((found.x - (100 + 5 * found.latent)).abs().max() < 1e-4)
    True
    """

    def __init__(self, denoiser: Denoiser, codec: Codec | None) -> None:
        super().__init__(denoiser)
        if codec is not None and not isinstance(codec, Codec):
            raise TypeError(f"codec is {type(codec).__name__}: expected a Codec of scoresde.codecs, or None")
        inner = denoiser.codec
        self._codec = codec if codec is None or inner is None else Chained(codec, inner)

    @property
    def codec(self) -> Codec | None:
        return self._codec

    def frozen_state(self) -> dict[str, Any]:
        """What the rows of a table are made of (`scoresde.tensors.frozen`): the codec has no part in them."""
        return {"denoiser": self.denoiser}

    def __repr__(self) -> str:
        return f"Latent({self.denoiser!r}, {self._codec!r})"


class Tempered(SameMean):
    """A denoiser whose runs start from another width of the prior, N(0, prior_std^2 / temperature I) (Popov et al.,
    2021, "Grad-TTS", section 4). With a `Latent` of `scoresde.codecs.Shift`, in either order, that is x_T ~ N(mu(c),
    I / temperature): above 1 samples are nearer to mu and differ less, below 1 they differ more.

    `sample`, `log_prob`, `elbo` and whatever else draws from the prior are those of this one; x_T that is given is not
    touched. The samples have another law than the data: that where the same solver takes a narrower or wider x_T.
    `scoresde.editing.rescale` counts a temperature of latents the other way, as a power of the density: its tau is
    1 / temperature here.

    Args:
        denoiser: the model. If it is tempered itself, temperatures multiply.
        temperature: > 0, one number for all.

    Raises:
        ValueError: unless temperature is a finite number > 0.

    >>> import torch
    >>> from scoresde import VPSDE, sample
    >>> from scoresde.codecs import Shift
    >>> from scoresde.exact import Gaussian
    >>> from scoresde.solvers import DPMSolverPP
    >>> from scoresde import X0Denoiser
    >>> unit = X0Denoiser(lambda x, t, mu: VPSDE().alpha(t)[:, None] * x, VPSDE())  # the flow of N(0, 1) stands still
    >>> model = Tempered(Latent(unit, Shift(lambda mu: mu)), temperature=4.0)
    >>> x = sample(model, (4000, 1), DPMSolverPP(), steps=20, seed=0, cond={"mu": torch.full((4000, 1), 7.0)}).x
    >>> f"{x.mean():.1f} {x.std():.1f}"
    '7.0 0.5'
    """

    masks = True

    def __init__(self, denoiser: Denoiser, temperature: float) -> None:
        super().__init__(denoiser)
        self.temperature = temperature
        self.sde = denoiser.sde.tempered(temperature)

    def frozen_state(self) -> dict[str, Any]:
        """What the rows of a table are made of (`scoresde.tensors.frozen`): the prior has no part in them."""
        return {"denoiser": self.denoiser}

    def __repr__(self) -> str:
        return f"Tempered({self.denoiser!r}, temperature={self.temperature!r})"


def without_codec(denoiser: Denoiser) -> Denoiser:
    """The denoiser with results of its own space: itself, where it has no codec."""
    return denoiser if denoiser.codec is None else Latent(denoiser, None)


class Limit(Wrapper):
    """A wrapper that limits the mean to the data's range. A subclass gives `limit`.

    Views follow the limited mean (eps is re-derived from it), as in DDPM and guided diffusion. What steps with that
    mean and with the eps of the mean before it, as diffusers' DDIM, is the solver `RawEps`.
    """

    masks = True

    @abstractmethod
    def limit(self, mean: Tensor) -> Tensor:
        """The limited mean, of the same shape."""

    def limited(self, mean: Tensor, own: Own) -> Tensor:
        """The same, where these are the items' own entries: for a limit that takes each entry by itself."""
        return self.limit(mean)

    def posterior(self, x: Tensor, t: Time, /, **cond: Any) -> Posterior:
        mean, var = self.denoiser.posterior(x, t, **cond)
        return Posterior(self.limited(mean, self.own(x.shape, cond)), var)

    def covariance(self, t: Time) -> Tensor | None:
        return self.denoiser.covariance(t)

    def prepared(self, cond: Mapping[str, Any] | None) -> dict[str, Any]:
        return self.denoiser.prepared(cond)


class Clip(Limit):
    """The posterior mean clipped to the data's range [low, high].

    Raises:
        ValueError: unless low < high.
    """

    def __init__(self, denoiser: Denoiser, low: float = -1.0, high: float = 1.0) -> None:
        super().__init__(denoiser)
        if not low < high:
            raise ValueError(f"Clip(low={low}, high={high}): expected low < high")
        self.low, self.high = low, high

    def limit(self, mean: Tensor) -> Tensor:
        return mean.clamp(self.low, self.high)


class DynamicThreshold(Limit):
    """Dynamic thresholding (Saharia et al., 2022, Imagen, section 2.3): with s the given quantile of |D| of each
    sample, raised to at least `bound` and cut to `cap`, D is clipped to [-s, s] and scaled by bound / s.

    Args:
        denoiser: the denoiser to wrap.
        quantile: in (0, 1].
        bound: the data's largest absolute value.
        cap: the largest s, diffusers' sample_max_value. Theirs is 1 by default, at which, with the default bound, the
            wrapper is `Clip`: a threshold that never moves.
        interpolate: the quantile by a line between the two values around it, as torch.quantile and diffusers have it,
            not the nearest value of rank quantile x number of elements.

    Raises:
        ValueError: if quantile, bound or cap is out of range.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        quantile: float = 0.995,
        bound: float = 1.0,
        *,
        cap: float = math.inf,
        interpolate: bool = False,
    ) -> None:
        super().__init__(denoiser)
        if not (0 < quantile <= 1 and 0 < bound <= cap):
            raise ValueError(
                f"quantile={quantile}, bound={bound}, cap={cap}: expected 0 < quantile <= 1 and 0 < bound <= cap"
            )
        self.quantile, self.bound, self.cap, self.interpolate = quantile, bound, cap, interpolate

    def limit(self, mean: Tensor) -> Tensor:
        return self.limited(mean, Own(mean.shape))

    def limited(self, mean: Tensor, own: Own) -> Tensor:
        sizes, alike = own.rows(mean).abs(), own.alike()
        q = torch.cat([self._quantile(sizes[which, :n]) for n, which in alike])
        if own.mask is not None:  # they came one number of entries after the other
            q = q[torch.cat([which for _, which in alike if isinstance(which, Tensor)]).argsort()]
        s = expand_like(q.clamp(self.bound, self.cap), mean)
        return mean.clamp(-s, s) * (self.bound / s)

    def _quantile(self, values: Tensor) -> Tensor:
        """Of each sample, (B,). By kthvalue: torch.quantile refuses more than 16 million elements."""
        count = values.shape[1]
        if not self.interpolate:
            return values.kthvalue(max(1, round(self.quantile * count)), dim=1).values
        below, share = divmod(self.quantile * (count - 1), 1)
        low = values.kthvalue(int(below) + 1, dim=1).values
        high = values.kthvalue(min(int(below) + 2, count), dim=1).values
        return torch.lerp(low, high, share)


def parted(denoiser: Denoiser) -> tuple[Denoiser, Callable[[Tensor], Tensor]] | None:
    """The denoiser whose mean a `Limit` limits, and how: for what needs both means of one evaluation. None where no
    mean is limited.

    Raises:
        ValueError: if something else than a `SameMean` is around the limit.
    """
    if isinstance(denoiser, Limit):
        return denoiser.denoiser, denoiser.limit
    if isinstance(denoiser, SameMean):
        if (parts := parted(denoiser.denoiser)) is None:
            return None
        again = copy.copy(denoiser)
        again.denoiser = parts[0]
        return again, parts[1]
    if any(isinstance(inner, Limit) for inner in contents(denoiser)):
        raise ValueError(
            f"{denoiser!r} changes the mean after it is limited: wrap it the other way round, Clip outside of guidance"
        )
    return None


def below_limit(denoiser: Denoiser, wrap: Callable[[Denoiser], Denoiser]) -> Denoiser:
    """The denoiser wrapped below what limits its mean: guidance, say, is of the network's own means, and what comes of
    it is clipped, as diffusers' pipelines have it. Where no mean is limited, wrap(denoiser).
    """
    if isinstance(denoiser, Limit):
        below = wrap(denoiser.denoiser)
    elif isinstance(denoiser, SameMean) and any(isinstance(inner, Limit) for inner in contents(denoiser)):
        below = below_limit(denoiser.denoiser, wrap)
    else:
        return wrap(denoiser)
    again = copy.copy(denoiser)
    again.denoiser = below
    return again


def lacks_variance(denoiser: Denoiser) -> bool:
    """Whether it is known to have no variance: a network for the mean alone."""
    return isinstance(denoiser, NetworkDenoiser) and type(denoiser).posterior is NetworkDenoiser.posterior
