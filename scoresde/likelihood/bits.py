"""Bits per dimension of images whose entries are whole levels.

Level k of L fills the bin [lo + k Delta, lo + (k + 1) Delta] of the data that the model knows, Delta = (hi - lo) / L.
The model's probability of an image y is its density over the image's d bins, and with x ~ q on them, by Jensen,

    log P(y) = log int_bins p(x) dx >= E_q[log p(x) - log q(x)],    p(x) = alpha_t^d p_t(alpha_t x)
    bits/dim = -log P(y) / (d ln 2)

    uniform             x = lo + (y + u) Delta, u ~ U[0, 1)            log q = -d log Delta
    truncated normal    x = lo + (y + 1/2) Delta + s z, |z| <= tau     log q = sum_i log phi(z_i) - d log(s Z)
                        s = sigma_t / alpha_t,  tau = Delta / (2 s),  Z = erf(tau / sqrt 2)
    none                x = lo + (y + 1/2) Delta                       the midpoint rule: no bound

The term -log q / (d ln 2) of the uniform noise is the well-known offset, -log2 Delta = log2(L / (hi - lo)): 7 for 256
levels on [-1, 1], 8 on [0, 1]. The truncated normal makes alpha_t x what the data are at time t, up to the tails beyond
tau, so that the ODE starts where the network was trained (Zheng et al., 2023, "Improved techniques for maximum
likelihood estimation for diffusion ODEs"). The importance-weighted bound log (1/K) sum_k p(x_k) / q(x_k) (Burda et al.,
2016, "Importance weighted autoencoders") is tighter, and log P(y) itself as K grows.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from scoresde.checks import ArgumentError, check_count, check_option
from scoresde.denoiser import Denoiser, check_call
from scoresde.entries import entries_of
from scoresde.errors import NonFiniteError, not_finite
from scoresde.levels import check_levels
from scoresde.likelihood.flow import log_prob, state_of
from scoresde.likelihood.interval import student_interval
from scoresde.masked import own_of
from scoresde.masks import Own
from scoresde.noise import derive_seed, seeds_of
from scoresde.sde import SDE
from scoresde.wrappers import without_codec

__all__ = ["BitsPerDim", "Dequantize", "bits_per_dim", "dequantized"]

Dequantize = Literal["uniform", "none", "truncated-normal"]

_TAU = 3.0  # bins of three standard deviations each side: the truncated normal is then nearly a normal


@dataclass(frozen=True)
class BitsPerDim:
    """What `bits_per_dim` returns; `value, stderr, nfe = bits_per_dim(...)` works too. All in bits per dimension.

    Attributes:
        value: mean over the images.
        stderr: its standard error as an estimate for all images of that kind: the standard deviation of per_image over
            sqrt(N). The noise of repeats, importance draws and probes is in each of per_image, so their spread contains
            it already. For these very images only, it is sqrt(sum(per_image_stderr^2)) / N. Of a single image:
            per_image_stderr.
        dof: its degrees of freedom: N - 1; of a single image, those of the spread that per_image_stderr is from.
        nfe: network calls in all, each on a batch, as `LogProb.nfe` counts them.
        per_image: float64, shape (N,).
        per_image_stderr: float64, shape (N,): from the spread over repeats, which contains that of the probes; with
            one repeat, from the spread over importance draws (first order in it); with one and dequantize="none", from
            the probes. NaN where one draw of the dequantisation, or one probe, leaves it unknown: take repeats >= 2.
        probe_stderr: float64, shape (N,): the part of it that is due to the probes of the divergence, as `log_prob`
            states it; zero for the exact one.
        error: mean of the estimated discretisation error's size, |LogProb.error|: a bias that no stderr shows.
        offset: log2(levels / (hi - lo)), already added.
        t: the time at which the ODE started.
        dims: of a `scoresde.Masked` denoiser the number of entries of each image, int64, shape (N,), that its bits are
            divided by; value is the mean over the images, each counting once. None where all have those of an image.
    """

    value: float
    stderr: float
    dof: float
    nfe: int
    per_image: Tensor
    per_image_stderr: Tensor
    probe_stderr: Tensor
    error: float
    offset: float
    t: float
    dims: Tensor | None = None

    def __iter__(self) -> Iterator[float]:
        return iter((self.value, self.stderr, self.nfe))

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """The ends of value -+ t_{(1 + level) / 2}(dof) stderr, t(dof) the quantiles of Student's t.

        Args:
            level: in (0, 1), the share of such intervals that cover the mean over all images of that kind (of a single
                image: its own mean over the noise).

        Raises:
            ValueError: on another level.
        """
        value, stderr, dof = torch.tensor([self.value, self.stderr, self.dof], dtype=torch.float64, device="cpu")
        low, high = student_interval(value, stderr, dof, level)
        return float(low), float(high)

    def __repr__(self) -> str:
        return f"BitsPerDim({self.value:.4f} +- {self.stderr:.2g} over {len(self.per_image)} images, nfe={self.nfe})"


def bits_per_dim(
    denoiser: Denoiser,
    images: Tensor,
    levels: int = 256,
    *,
    dequantize: Dequantize = "uniform",
    data_range: tuple[float, float] = (-1.0, 1.0),
    repeats: int = 1,
    importance: int = 1,
    t: float | None = None,
    seed: int | Sequence[int] | None = None,
    batch_size: int | None = None,
    cond: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
    **options: Any,
) -> BitsPerDim:
    """Bits per dimension of images under the model, with a standard error.

    With dequantize="uniform" or "truncated-normal" the value is, in expectation, an upper bound on -log2 P(y) / d, so
    it compares with any code length. (With a Hutchinson divergence too: its probes are unbiased, and nothing here is
    non-linear in them.)

    Args:
        denoiser: the model; it computes where its network is. If it has a codec (`scoresde.Latent`) with a volume, the
            images are encoded; the truncated normal is meant for one that keeps lengths.
        images: raw levels 0 .. levels - 1, any integer dtype (uint8), shape (N, ...), any event shape.
        levels: L; 256 for 8 bits, 32 for 5.
        dequantize: the noise within the bins; "none" puts a level at the middle of its bin, which is no bound.
        data_range: (lo, hi), what the bins of all levels fill, in the units that the model was trained on; see
            `outer_edges` for data with a level at each end.
        repeats: independent estimates per image, averaged: new noise in the bins and new probes.
        importance: K, draws per estimate of the importance-weighted bound. Above 1 it needs divergence="exact": the
            mean of exp(log p + e) over the noise e of probes is larger than exp(log p), by a factor of
            E[exp(e)] = exp(stderr^2 / 2) where e is normal, and with it the bound is none.
        t: where the ODE starts. By default t_min; for the truncated normal where the bin is tau = 3 standard deviations
            to each side, Delta / 2 = 3 sigma_t / alpha_t, if that is later than t_min.
        seed: one integer, or one per image; without, from the operating system. Image i is the same alone or among
            others, and whatever the batch_size, up to rounding and, with adaptive steps, the tolerance.
        batch_size: of images times repeats times draws, how many are in a batch at most; all by default.
        cond: keyword arguments for the network, as for `sample`, a sample being an image.
        dtype: what x is computed in.
        progress: show a progress bar.
        **options: of `log_prob`: divergence=, probes=, steps=, rtol=, atol=, ...

    Raises:
        TypeError: if the images are floating point (give the raw levels), or the denoiser is none.
        ValueError: before any network call, if a level is out of range, or another argument is; if the denoiser's codec
            has no volume, so that only `elbo` has a bound.
        NonFiniteError: if the density of an image is not finite; its `samples` are indices of images.
        ArithmeticError: if the evaluations ran out (max_nfe) before an image's ODE ended.

    >>> from scoresde import VPSDE
    >>> from scoresde.exact import Gaussian
    >>> images = torch.tensor([[[[120, 130], [140, 128]]]], dtype=torch.uint8)
    >>> denoiser = Gaussian(torch.zeros(1, 2, 2), std=0.1).denoiser(VPSDE())
    >>> result = bits_per_dim(denoiser, images, divergence="exact", repeats=2, seed=0)
    >>> print(f"{result.value:.1f} bits/dim, of which the offset is {result.offset:.0f}")
    5.3 bits/dim, of which the offset is 7
    """
    denoiser, own = own_of(denoiser, images.shape if isinstance(images, Tensor) else (), cond)
    y = _checked(images if own.mask is None else own.only(images), levels, data_range)
    own = Own(own.shape, None if own.mask is None else own.mask.cpu())
    check_call(denoiser, y, cond, masks=True)
    check_option(get_args(Dequantize), dequantize=dequantize)
    check_count(repeats=repeats, importance=importance, batch_size=len(y) if batch_size is None else batch_size)
    if importance > 1 and options.get("divergence") != "exact":
        raise ArgumentError(
            f"importance={importance} needs divergence='exact': the probes' noise inside the exponential would lift "
            "the bound above the likelihood; take importance=1, or the exact divergence"
        )
    lo, hi = data_range
    if denoiser.codec is not None:
        first, told = y[:1].to(denoiser.device, dtype), entries_of(cond, [0], len(y))
        if denoiser.codec.log_volume(first, **told) is None:
            raise ValueError(
                f"{denoiser.codec!r} has no volume, so there is no density of data, only one of z: take the bound, "
                "elbo(denoiser, dequantized(images, levels)).of_levels(levels, data_range)"
            )
    bins = _Bins.of(denoiser.sde, dequantize, lo, (hi - lo) / levels, t)
    seeds = seeds_of(seed, len(y))
    shape, unit = (len(y), repeats, importance), torch.as_tensor(own.dims, device="cpu").double() * math.log(2)
    unit = unit.expand(len(y))
    rows = math.prod(shape)
    parts = [range(rows)[first : first + (batch_size or rows)] for first in range(0, rows, batch_size or rows)]
    found, nfe = [], 0
    with tqdm(desc="bits/dim", total=rows, unit="ode", disable=not progress, leave=False) as bar:
        for part in parts:
            index = list(zip(*(axis.tolist() for axis in np.unravel_index(part, shape)), strict=True))
            which = [i for i, _, _ in index]
            v, log_q = bins.draw(y[which], [derive_seed(seeds[i], r, k, 0) for i, r, k in index], own.take(which))
            run_seeds = [derive_seed(seeds[i], r, k, 1) for i, r, k in index]
            entries = entries_of(cond, which, len(y))
            log_p = log_density(
                denoiser, v.to(dtype), which, t=bins.t, alpha=bins.alpha, seed=run_seeds, cond=entries, **options
            )
            found.append(torch.stack([log_p.value - log_q, log_p.stderr, log_p.dof, log_p.error]))
            nfe += log_p.nfe
            bar.update(len(part))
    log_ratio, probe_stderr, probe_dof, error = (number.reshape(shape) for number in torch.cat(found, dim=1))
    per_image, per_image_stderr = _bounds(log_ratio, unit)
    probe_stderr = probe_stderr.square().sum((1, 2)).sqrt() / (repeats * unit)
    if repeats == importance == 1:
        per_image_stderr = probe_stderr if dequantize == "none" else torch.full_like(probe_stderr, math.nan)
    value, stderr = mean_and_stderr(per_image, per_image_stderr)
    counts = [n - 1 for n in shape if n > 1]  # of what the spread is taken over: images, else repeats, else draws
    dof = float(counts[0] if counts else probe_dof[0, 0, 0])
    discretisation = float((error.abs() / unit[:, None, None]).mean())
    if value < 0 and dequantize != "none":
        warnings.warn(
            f"{value:.3g} bits/dim, which cannot be; discretisation error about {discretisation:.2g}: take more "
            "steps, or lower tolerances",
            stacklevel=2,
        )
    return BitsPerDim(
        value=value,
        stderr=stderr,
        dof=dof,
        nfe=nfe,
        per_image=per_image,
        per_image_stderr=per_image_stderr,
        probe_stderr=probe_stderr,
        error=discretisation,
        offset=-math.log2(bins.Delta),
        t=denoiser.sde.t_min if bins.t is None else bins.t,
        dims=None if own.mask is None else own.dims.long(),
    )


def dequantized(
    images: Tensor,
    levels: int = 256,
    *,
    data_range: tuple[float, float] = (-1.0, 1.0),
    seed: int | Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Images as data, with uniform noise in the bins: x = lo + (y + u) Delta, shape of images, on the CPU.

    For such x, -log p(x) / (d ln 2) + log2(levels / (hi - lo)) is what `bits_per_dim` averages; with the same seed it
    begins with this x. So `elbo` of it, in those units, is a bound on the same number. Arguments and errors as there.

    >>> x = dequantized(torch.tensor([[0, 128, 255]]), data_range=(0.0, 256.0), seed=0)
    >>> x.floor()
    tensor([[  0., 128., 255.]])
    """
    y, (lo, hi) = _checked(images, levels, data_range), data_range
    seeds = [derive_seed(s, 0, 0, 0) for s in seeds_of(seed, len(y))]
    return _Bins(lo, (hi - lo) / levels, "uniform").draw(y, seeds)[0].to(dtype)


@dataclass(frozen=True)
class _Bins:
    """The bins and the noise q within them.

    Attributes:
        lo, Delta: level k fills [lo + k Delta, lo + (k + 1) Delta].
        noise: q.
        t: where the ODE starts; None where log_prob starts.
        alpha: alpha_t; 1 where t is None, as log_prob scales x itself.
        tau: half a bin in standard deviations of the truncated normal.
    """

    lo: float
    Delta: float
    noise: Dequantize
    t: float | None = None
    alpha: float = 1.0
    tau: float = 0.0

    @classmethod
    def of(cls, sde: SDE, noise: Dequantize, lo: float, Delta: float, t: float | None) -> _Bins:
        """Those of a model; Delta / 2 = tau sigma_t / alpha_t."""
        if t is None and noise == "truncated-normal":
            t = max(sde.t_min, float(sde.time_at(math.log(2 * _TAU / Delta))))
            t = t if sde.nodes is None else float(sde.nodes[sde.nodes >= t][0])  # a node, where a table can end
        if t is None:
            return cls(lo, Delta, noise)
        if isinstance(t, bool) or not isinstance(t, Real) or not 0 < t < sde.t_max:
            raise ArgumentError(f"t={t!r}: expected a time in (0, {sde.t_max:g}), t_min = {sde.t_min:g} say")
        tau = Delta / 2 * math.exp(float(sde.half_log_snr(float(t))))
        return cls(lo, Delta, noise, float(t), float(sde.alpha(float(t))), tau)

    def draw(self, y: Tensor, seeds: Sequence[int], own: Own | None = None) -> tuple[Tensor, Tensor]:
        """v ~ q given y, one draw per seed, and log q(v) of the own entries, by default all: float64, shapes of y and
        (B,), on the CPU.
        """
        own = own or Own(y.shape)
        d, n = own.dims, y[0].numel()
        counts = [n] * len(y) if own.mask is None else own.dims.long().tolist()
        log_q = torch.zeros(len(y), dtype=torch.float64, device="cpu") - d * math.log(self.Delta)
        middle = self.lo + (y.double() + 0.5) * self.Delta
        if self.noise == "none":
            return middle, log_q
        rows = torch.zeros(len(y), n, dtype=torch.float64, device="cpu")
        for row, seed, count in zip(rows, seeds, counts, strict=True):
            row[:count].uniform_(generator=torch.Generator("cpu").manual_seed(seed))
        u = own.placed(rows)
        if self.noise == "uniform":
            return middle + (u - 0.5) * self.Delta, log_q
        # z by its inverse distribution function; where Z rounds to 1, u = 0 must not be -infinity.
        Z = math.erf(self.tau / math.sqrt(2))
        z = (math.sqrt(2) * torch.erfinv(Z * (2 * u - 1))).clamp(-self.tau, self.tau)
        s = self.Delta / (2 * self.tau)
        log_normal = -own.sum(z.square()) / 2 - d * math.log(math.sqrt(2 * math.pi) * s * Z)
        return middle + s * z, log_normal


class LogDensity(NamedTuple):
    """What `log_prob` says of p(x) = alpha_t^d p_t(alpha_t x): float64 on the CPU."""

    value: Tensor
    stderr: Tensor
    dof: Tensor
    error: Tensor
    nfe: int
    of: Literal["x", "z"]


def log_density(
    denoiser: Denoiser, v: Tensor, which: Sequence[int], *, t: float | None = None, alpha: float = 1.0, **options: Any
) -> LogDensity:
    """log p of the rows of v, finite and complete, or an error that names whose they are: `which`."""
    try:
        x = v.to(denoiser.device)
        with torch.no_grad():
            z, log_volume, of = state_of(denoiser, x, options.get("cond"))
        found = log_prob(without_codec(denoiser), alpha * z.to(x.dtype), t=t, **options)
    except NonFiniteError as stop:
        raise non_finite([which[j] for j in stop.samples], str(stop), stop.step, stop.time) from stop
    if found.status != "complete":
        raise ArithmeticError(
            f"the {found.nfe} network calls allowed did not reach the end of the ODE for images {which[0]} to "
            f"{which[-1]}: raise max_nfe=, rtol= and atol=, or give steps="
        )
    if bad := not_finite(found.value):
        raise non_finite([which[j] for j in bad], f"log p = {found.value[bad[0]]:g}", None, None)
    numbers = (found.value, found.stderr, found.dof, found.error)
    value, stderr, dof, error = (number.detach().cpu().double() for number in numbers)
    value = (
        value
        + torch.as_tensor(denoiser.own(z.shape, options.get("cond") or {}).dims, device="cpu") * math.log(alpha)
        + (0.0 if log_volume is None else log_volume.detach().cpu())
    )
    return LogDensity(value, stderr, dof, error, found.nfe, of)


def non_finite(images: Sequence[int], message: str, step: int | None, time: float | None) -> NonFiniteError:
    """The error that names images, in place of one that names rows of a batch."""
    named = sorted(set(images))
    shown = ", ".join(map(str, named[:8])) + (", ..." if len(named) > 8 else "")
    return NonFiniteError(f"image{'s' * (len(named) > 1)} {shown}: {message}", step, time, named)


def mean_and_stderr(each: Tensor, each_stderr: Tensor) -> tuple[float, float]:
    """The mean and its standard error, from the spread of more than one."""
    spread = each.std() / math.sqrt(len(each)) if len(each) > 1 else each_stderr[0]
    return float(each.mean()), float(spread)


def _bounds(log_ratio: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Bits/dim of each image and its standard error, (N,), from log p(x) / q(x) of shape (N, repeats, K), and what
    one of them is in nats, (N,).
    """
    unit = unit[:, None]
    R, K = log_ratio.shape[1:]
    log_mean = log_ratio.logsumexp(2) - math.log(K)
    bits = -log_mean / unit
    if R > 1:
        return bits.mean(1), bits.std(1) / math.sqrt(R)
    weight = (log_ratio - log_mean[..., None]).exp()  # of mean 1, so that d log(mean) = d mean
    spread = weight.std(2) / (math.sqrt(K) * unit) if K > 1 else torch.full_like(bits, math.nan)
    return bits.mean(1), spread[:, 0]


def _checked(images: Tensor, levels: int, data_range: tuple[float, float]) -> Tensor:
    """The images as int64 on the CPU."""
    check_levels(levels, data_range)
    if not isinstance(images, Tensor) or images.is_floating_point() or images.is_complex():
        found = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(
            f"images are {found}: give the raw levels 0 .. {levels - 1} as a tensor of integers, uint8 say; the noise "
            "in the bins and the scaling to data_range are made here (the density of floating-point data: log_prob)"
        )
    if images.dtype == torch.bool:
        raise TypeError("images are torch.bool: give them as integers, images.to(torch.uint8) with levels=2")
    if images.ndim == 0 or images.numel() == 0:
        raise ValueError(f"images have shape {tuple(images.shape)}: expected (N, ...), N >= 1")
    y = images.detach().to(device="cpu", dtype=torch.int64)
    least, most = int(y.min()), int(y.max())
    if least < 0 or most >= levels:
        raise ArgumentError(
            f"images have levels from {least} to {most}: expected 0 .. {levels - 1}, or another levels="
        )
    return y
