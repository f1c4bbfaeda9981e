"""Denoisers: what is known of x_0 given x_t = alpha x_0 + sigma eps.

A denoiser returns `Posterior(mean, var)`, mean D = E[x_0 | x_t]. Score, eps, v and velocity are affine views of D
(`scoresde.views`), and a network that predicts any of them is adapted by the same formula, read the other way.

A wrapper (`scoresde.wrappers`; clipping, thresholding, guidance, ...) takes a denoiser and is one again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from scoresde.checks import check_positive
from scoresde.codecs import Codec
from scoresde.entries import check_cond
from scoresde.errors import given_to, items_of, not_finite, some
from scoresde.masks import Own, refuse_masks
from scoresde.networks import Encodes, Holder, first_parameter, warn_of_training_mode
from scoresde.sde import SDE
from scoresde.tensors import Time, as_time, check_batch, dtype_of_label, expand_like, known_any, precise, told, widen
from scoresde.views import Affine, check_time, combine, first_where, mean_of_view, tells_nothing, view_of_mean

__all__ = [
    "Denoiser",
    "EDMDenoiser",
    "EpsDenoiser",
    "NetworkDenoiser",
    "Posterior",
    "ScoreDenoiser",
    "VDenoiser",
    "VelocityDenoiser",
    "X0Denoiser",
]


class Posterior(NamedTuple):
    """What is known of x_0 given x_t.

    Attributes:
        mean: E[x_0 | x_t], shape (B, ...).
        var: elementwise Var[x_0 | x_t], a tensor that broadcasts to (B, ...), or None if not known.
    """

    mean: Tensor
    var: Tensor | None = None

    def __repr__(self) -> str:
        return told(self)


class Denoiser(Holder, ABC):
    """E[x_0 | x_t] and its affine views. Subclasses set `sde` and implement `posterior`.

    Call it as `denoiser(x, t, **cond)` with x of shape (B, ...), floating point, of any rank, and t of shape () or
    (B,). The result has the dtype of x; coefficients are float64. At t = 0 the mean is x itself.

    Raises:
        ValueError: if x is not floating point or has no batch dimension, t has another shape, or a t on the host lies
            outside [0, t_max]. (A t on a GPU is not looked at: that would stall the device.)
    """

    sde: SDE
    mask_name: str | None = None  # of the condition that is a mask, in `scoresde.Masked`

    @abstractmethod
    def posterior(self, x: Tensor, t: Time, /, **cond: Any) -> Posterior:
        """The posterior itself, with x, in float32 or float64, and t already checked."""

    def __call__(self, x: Tensor, t: Time, **cond: Any) -> Posterior:
        self._check(x, t)
        mean, var = self.posterior(widen(x), t, **cond)
        known = as_time(t) == 0
        if known_any(known):  # x_0 is x itself, whatever the network makes of sigma = 0
            known = expand_like(known.double(), widen(x)) == 1
            mean, var = torch.where(known, x, mean), None if var is None else torch.where(known, 0.0, var)
        return Posterior(mean.to(x.dtype), None if var is None else var.to(x.dtype))

    def covariance(self, t: Time) -> Tensor | None:
        """Var[x_0 | x_t] where it is one number for all x_t and all entries, known beforehand: float64 of the shape of
        t. None where it is not: `posterior` may know it all the same.
        """
        return None

    def own(self, shape: Sequence[int], cond: Mapping[str, Any]) -> Own:
        """Which entries of a batch of that shape are its items' own: all, without a mask (`scoresde.Masked`)."""
        return Own(shape)

    @property
    def codec(self) -> Codec | None:
        """Between data and x, which is a state z then; None where x is of the space of data (`scoresde.Latent`)."""
        return None

    @property
    def borrowed(self) -> bool:
        """Whether `posterior` has the variance of another law than that of its mean: to sample with, and no more."""
        return False

    def prepared(self, cond: Mapping[str, Any] | None) -> dict[str, Any]:
        """The conditions of a run as its evaluations take them: where the network encodes some of them
        (`scoresde.nn.Encoding`), here, once, before the first. Wrappers that change conditions, or have several
        denoisers, keep what these are given beside them. One that does not know of it leaves them as they are: each
        evaluation encodes them then, with the same result.
        """
        return dict(cond or {})

    def score(self, x: Tensor, t: Time, **cond: Any) -> Tensor:
        """grad_x log p_t(x), shape of x."""
        return self.view("score", x, t, **cond)

    def eps(self, x: Tensor, t: Time, **cond: Any) -> Tensor:
        """E[eps | x_t] = -sigma score, shape of x."""
        return self.view("eps", x, t, **cond)

    def v(self, x: Tensor, t: Time, **cond: Any) -> Tensor:
        """E[alpha eps - sigma x_0 | x_t], shape of x."""
        return self.view("v", x, t, **cond)

    def velocity(self, x: Tensor, t: Time, **cond: Any) -> Tensor:
        """dx/dt of the probability-flow ODE, f x - g^2 score / 2 = alpha' E[x_0 | x_t] + sigma' E[eps | x_t]."""
        return self.view("velocity", x, t, **cond)

    def view(self, name: str, x: Tensor, t: Time, /, **cond: Any) -> Tensor:
        """The view of that name (a key of `VIEWS`), shape of x."""
        self._check(x, t)
        u, w = self.view_of_output(*view_of_mean(name, self.sde, precise(t)), t)
        wide = widen(x)
        return combine(u, wide, w, self.output(wide, t, **cond)).to(x.dtype)

    # A solver steps in the network's own output N, from which D = r x + s N, so that no digits are lost on the way to
    # D and back. A denoiser without a network of its own has N = D.

    def output(self, x: Tensor, t: Time, /, **cond: Any) -> Tensor:
        """N, what the network itself predicts, in the dtype of x; x and t are not checked again. Its memory may be one
        that the network's next call writes again, as a replayed CUDA graph does: use it before, or keep a copy.
        """
        return self.posterior(x, t, **cond).mean

    def outputs(self, times: Tensor) -> Callable[[int, Tensor, Mapping[str, Any]], Tensor]:
        """`output` at times on the host that are known beforehand, shape (R,): a function of (i, x, cond). What depends
        on the times alone is done once.
        """
        numbers = times.tolist()
        return lambda i, x, cond: self.output(x, numbers[i], **cond)

    def affine(self, t: Time) -> Affine:
        """(r, s) of D = r x + s N, float64, of the shape of t."""
        t = precise(t)
        return torch.zeros_like(t), torch.ones_like(t)

    def view_of_output(self, p: Tensor, q: Tensor, t: Time) -> Affine:
        """(u, w) of F = u x + w N for the view F = p x + q D."""
        r, s = self.affine(t)
        u = p + q * r
        # Where the network predicts the view itself, u is zero but for the rounding of p + q r.
        return torch.where(u.abs() <= 1e-13 * p.abs(), torch.zeros_like(u), u), q * s

    def check_times(self, t: Tensor) -> None:
        """Raises ValueError if the denoiser cannot be evaluated at these times, on the host, shape (R,)."""
        self.affine(t)

    @property
    def device(self) -> torch.device:
        """Where the denoiser computes: what `sample` draws a prior on."""
        return torch.device("cpu")

    def _check(self, x: Tensor, t: Time) -> None:
        check_batch(x, "x")
        check_time(t, len(x), self.sde)


class NetworkDenoiser(Denoiser):
    """A network as a denoiser. The subclasses say what the network predicts.

    Args:
        net: any callable `net(x, time, **cond)` that returns a tensor of the shape of x. It is called in its own dtype
            (that of its first floating-point parameter; of x if it has none) and its output is cast back.
        sde: the SDE that it was trained on.
        time: what the network is told of t: a function from t, float64 of shape (B,), or (1,) where all samples share
            it, to the label, of that shape or with further dimensions. The default is t itself. A wrong label gives dim
            or noisy samples and no error, so state it (and see `scoresde.diagnose`):
            `lambda t: 999 * t` (score_sde's VP), `chain.label` (t - 1: a chain's nodes, counted from 0),
            `lambda t: t.round().long() - 1` (the same for a table, which takes whole numbers alone, and keeps adaptive
            solvers from their work: `scoresde.continuity`), `sde.half_log_snr`, `lambda t: sde.sigma(t).log() / 4`, ...
            A floating-point label reaches the network in float32 (float64 if the network is), never in half precision.
    """

    predicts: ClassVar[str]

    def __init__(self, net: Callable[..., Tensor], sde: SDE, *, time: Callable[[Tensor], Tensor] | None = None) -> None:
        if not callable(net):
            raise TypeError(f"net is {type(net).__name__}: expected a callable net(x, time, **cond)")
        if not isinstance(sde, SDE):
            raise TypeError(f"sde is {type(sde).__name__}: expected an SDE, as in {type(self).__name__}(net, sde)")
        self.net, self.sde, self.time = net, sde, time

    @property
    def device(self) -> torch.device:
        parameter = first_parameter(self.net)
        return torch.device("cpu") if parameter is None else parameter.device

    def check_times(self, t: Tensor) -> None:
        (r, s), parameter = self.affine(t), first_parameter(self.net)
        dtype = torch.float64 if parameter is None else torch.promote_types(parameter.dtype, torch.float32)
        # D = r x + s N has no digit where 1 / r is below the rounding of x and N.
        if known_any(lost := (r.abs() * torch.finfo(dtype).eps >= 1) | (s.abs() > torch.finfo(dtype).max)):
            time = first_where(t, lost)
            raise tells_nothing(self.predicts, self.sde, time, f"{float(self.sde.alpha(time)):.3g}, none in {dtype},")
        label = self.label(precise(t))
        if not isinstance(label, Tensor):
            raise ValueError(f"time returned {type(label).__name__} for a tensor t: expected a tensor of labels")
        if not label.is_floating_point() and known_any(label < 0):
            raise ValueError(
                f"the integer time label is negative for a t in {t.tolist()}: evaluate at the chain's nodes"
            )
        if known_any(~label.isfinite()):
            where = first_where(t, (~label.isfinite()).reshape(len(t), -1).any(1))
            raise ValueError(
                f"the time label is not finite at t = {where} of {self.sde!r}: start the grid at a smaller "
                "t, or give another time="
            )

    def frozen_state(self) -> dict[str, Any]:
        """What the rows of a table are made of (`scoresde.tensors.frozen`): of the network its dtype alone."""
        return vars(self) | {"net": getattr(first_parameter(self.net), "dtype", None)}

    def with_net(self, net: Callable[..., Tensor]) -> NetworkDenoiser:
        """The same denoiser around another network, an averaged copy say."""
        return type(self)(net, self.sde, time=self.time)

    def prepared(self, cond: Mapping[str, Any] | None) -> dict[str, Any]:
        return self.net.encode(**(cond or {})) if isinstance(self.net, Encodes) else dict(cond or {})

    def affine(self, t: Time) -> Affine:
        return mean_of_view(self.predicts, self.sde, precise(t))

    def label(self, t: Tensor) -> Tensor:
        """The network's time label of t, float64 of shape (B,)."""
        return t if self.time is None else self.time(t)

    def input_scale(self, t: Tensor) -> Tensor | None:
        """Factor of x in what the network sees, float64 of the shape of t; None for 1."""
        return None

    def output(self, x: Tensor, t: Time, /, **cond: Any) -> Tensor:
        if not isinstance(t, Tensor) and not torch.compiler.is_compiling():
            return self.outputs(as_time(t).reshape(1))(0, x, cond)
        times = precise(t).reshape(-1)
        scale = self.input_scale(times)
        dtype = getattr(first_parameter(self.net), "dtype", x.dtype)
        label = self.label(times)
        time = label.to(device=x.device, dtype=dtype_of_label(label, dtype)).expand(len(x), *label.shape[1:])
        return self._evaluate(x, x if scale is None else expand_like(scale, x) * x, time, dtype, cond)

    def outputs(self, times: Tensor) -> Callable[[int, Tensor, Mapping[str, Any]], Tensor]:
        label, scale = self.label(precise(times)), self.input_scale(precise(times))
        label = label.expand(len(times), *label.shape[1:])
        # Numbers, not tensors: a copy to a GPU would stall it. A label of further dimensions is moved once, here.
        labels = label.tolist() if label.ndim == 1 else None
        moved = label if labels is not None else label.to(self.device)
        scales = None if scale is None else scale.tolist()
        parameter = first_parameter(self.net)
        label_dtypes: dict[torch.dtype, torch.dtype] = {}

        def at(i: int, x: Tensor, cond: Mapping[str, Any]) -> Tensor:
            B, dtype = x.shape[0], x.dtype if parameter is None else parameter.dtype
            if dtype not in label_dtypes:
                label_dtypes[dtype] = dtype_of_label(label, dtype)
            label_dtype = label_dtypes[dtype]
            if labels is not None:
                time = torch.full((B,), labels[i], dtype=label_dtype, device=x.device)
            else:
                time = moved[i : i + 1].to(device=x.device, dtype=label_dtype).expand(B, *moved.shape[1:])
            return self._evaluate(x, x if scales is None else x * scales[i], time, dtype, cond)

        return at

    def _evaluate(self, x: Tensor, seen: Tensor, time: Tensor, dtype: torch.dtype, cond: Mapping[str, Any]) -> Tensor:
        """The network on what it sees of x, checked, in the dtype of x."""
        seen = seen if seen.dtype == dtype else seen.to(dtype)
        if torch.compiler.is_compiling():  # what is traced has no version, and its errors are the compiler's
            version, out = None, self.net(seen, time, **cond)
        else:
            version = None if seen.is_inference() else seen._version
            try:
                out = self.net(seen, time, **cond)
            except Exception as error:
                error.add_note(given_to(self.net, seen, time, cond))
                raise
        if not isinstance(out, Tensor) or out.shape != x.shape:
            found = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(
                f"the network returned {found} for x of shape {tuple(x.shape)}, {items_of(x)}: expected a tensor of "
                "that shape (take the mean's channels of a network with learned variance, and the tensor out of an "
                "output object; a single item is a batch of one, x[None])"
            )
        if not out.is_floating_point():
            raise ValueError(f"the network returned {out.dtype}: expected floating-point numbers, as x has")
        if version is not None and seen._version != version:
            raise ValueError("the network changed its input in place: let it start with x = x.clone()")
        return out if out.dtype == x.dtype else out.to(x.dtype)

    def posterior(self, x: Tensor, t: Time, /, **cond: Any) -> Posterior:
        r, s = self.affine(t)
        return Posterior(combine(r, x, s, self.output(x, t, **cond)))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.net).__name__}, {self.sde!r})"


class EpsDenoiser(NetworkDenoiser):
    """The network predicts the noise, E[eps | x_t] (Ho et al., 2020). Arguments: `NetworkDenoiser`."""

    predicts = "eps"


class ScoreDenoiser(NetworkDenoiser):
    """The network predicts the score, grad_x log p_t(x) (Song et al., 2021). Arguments: `NetworkDenoiser`."""

    predicts = "score"


class X0Denoiser(NetworkDenoiser):
    """The network predicts the data, E[x_0 | x_t]. Arguments: `NetworkDenoiser`."""

    predicts = "x0"


class VDenoiser(NetworkDenoiser):
    """The network predicts v = alpha eps - sigma x_0 (Salimans and Ho, 2022). Arguments: `NetworkDenoiser`."""

    predicts = "v"


class VelocityDenoiser(NetworkDenoiser):
    """The network predicts the velocity dx/dt, as in flow matching (eps - x_0 on `FlowSDE`). Arguments:
    `NetworkDenoiser`.
    """

    predicts = "velocity"


class EDMDenoiser(NetworkDenoiser):
    """Karras preconditioning (Karras et al., 2022, eq. 7 and table 1), for any SDE by y = x / alpha, s = sigma / alpha:

        D = c_skip y + c_out net(c_in y, ln(s) / 4)
        c_skip = sd^2 / (s^2 + sd^2),  c_out = s sd / sqrt(s^2 + sd^2),  c_in = 1 / sqrt(s^2 + sd^2)

    Args:
        net, sde: as for `NetworkDenoiser`.
        sigma_data: sd, the standard deviation of the data.
        time: the label; by default ln(s) / 4 = -half_log_snr / 4.

    Raises:
        ValueError: unless sigma_data is finite and > 0.
    """

    predicts = "F"

    def __init__(
        self,
        net: Callable[..., Tensor],
        sde: SDE,
        *,
        sigma_data: float = 0.5,
        time: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(net, sde, time=time)
        check_positive(sigma_data=sigma_data)
        self.sigma_data = sigma_data

    def with_net(self, net: Callable[..., Tensor]) -> EDMDenoiser:
        return EDMDenoiser(net, self.sde, sigma_data=self.sigma_data, time=self.time)

    def label(self, t: Tensor) -> Tensor:
        return -self.sde.half_log_snr(t) / 4 if self.time is None else self.time(t)

    def _total_std(self, t: Tensor) -> Tensor:
        """Standard deviation of x_t, sqrt(alpha^2 sd^2 + sigma^2)."""
        return torch.hypot(self.sde.alpha(t) * self.sigma_data, self.sde.sigma(t))

    def affine(self, t: Time) -> Affine:
        t = precise(t)
        total = self._total_std(t)
        return self.sigma_data**2 * self.sde.alpha(t) / total**2, self.sde.sigma(t) * self.sigma_data / total

    def input_scale(self, t: Tensor) -> Tensor:
        return 1 / self._total_std(t)


def check_denoiser(denoiser: object, of: str = "") -> None:
    """Raises TypeError unless it is a denoiser, `of` something."""
    if not isinstance(denoiser, Denoiser):
        hint = getattr(denoiser, "no_numbers", "wrap the network, EpsDenoiser(net, sde, time=...)")
        raise TypeError(f"{of}{': ' * bool(of)}expected a Denoiser, not {type(denoiser).__name__}: {hint}")


def check_call(denoiser: Denoiser, x: Tensor, cond: Mapping[str, Any] | None, masks: bool = False) -> None:
    """What every run checks before its first evaluation; `masks`: whether it knows of them.

    Raises:
        TypeError: if the denoiser is none, or cond is no mapping.
        ValueError: if a tensor or list of strings in a condition has neither one entry nor one per sample; if the batch
            is empty, or not finite.
    """
    check_denoiser(denoiser)
    if not masks:
        refuse_masks(denoiser)
    if x.numel() == 0:
        raise ValueError(f"the batch has shape {tuple(x.shape)}: it is empty")
    with suppress(RuntimeError):  # nothing can be looked at, under vmap say
        if bad := not_finite(x):
            raise ValueError(f"what is given is not finite in samples {some(bad)}: no evaluation is made")
    check_cond(cond, len(x))
    warn_of_training_mode(denoiser, stacklevel=4)
