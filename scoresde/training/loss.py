"""Denoising score matching (Vincent, 2011; Song and Ermon, 2019; Ho et al., 2020):

    E_{t, x_0, eps} [ w(t) |eps_hat(alpha x_0 + sigma eps, t) - eps|^2 / d ]

for any denoiser. The error is taken in what the network itself predicts, N with D = r x + s N: its target is
N* = (x_0 - r x_t) / s = ((1 - r alpha) x_0 - r sigma eps) / s, with D - x_0 = s (N - N*) and |eps_hat - eps| =
|alpha s / sigma| |N - N*|, so no digit is lost at either end and one formula serves eps, x0, v, score, velocity and EDM
networks. At alpha = 0 the loss is its limit (`scoresde.training.weights`); eps and score networks, which say nothing of
x_0 there, are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from scoresde.checks import ArgumentError, check_count, check_nonnegative
from scoresde.counter import normal
from scoresde.data.conditions import nothing
from scoresde.denoiser import Denoiser, check_denoiser
from scoresde.entries import check_cond, entries_of
from scoresde.masked import Masked, own_of
from scoresde.masks import MASK, Own, is_mask, mask_name
from scoresde.sde import SDE
from scoresde.tensors import as_time, check_batch, drawn_from, expand_like, known_any, shown
from scoresde.training.weights import OnX0, TimeSampler, UniformTimes, Weighting, simple
from scoresde.views import check_time, combine, first_where

__all__ = [
    "Draws",
    "NoisyBatch",
    "Part",
    "dsm_loss",
    "error_of",
    "joint_loss",
    "masked_loss",
    "noisy_batch",
    "refuse_unmasked",
]
__all__ += ["two_term_loss"]


@dataclass(frozen=True)
class Part:
    """Part of a batch, in place of the generator of the whole of it: what is drawn for it is what the whole batch would
    have been given, so that a batch may be split between processes, or in time, and its loss stays the same.

    Args:
        generator: of the whole batch, each part having its own copy in the same state.
        start: the first item of the part.
        size: items in the whole batch.
    """

    generator: torch.Generator
    start: int
    size: int

    @classmethod
    def of(cls, draws: torch.Generator | Part | None, items: int, device: torch.device) -> Part:
        """A generator as the part that is the whole batch of `items`; freshly seeded on `device` if there is none.

        Raises:
            ValueError: if a part of so many items goes beyond its batch.
        """
        if isinstance(draws, Part):
            if not 0 <= draws.start <= draws.size - items:
                raise ValueError(f"{items} items from {draws.start} on do not lie in a batch of {draws.size}")
            return draws
        return cls(drawn_from(draws, device), 0, items)

    def draw(self, shape: Sequence[int], draw: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
        """The part's share, of that shape, of what `draw` makes for the shape of the whole batch."""
        return draw((self.size, *shape[1:]))[self.start : self.start + shape[0]]


Draws = torch.Generator | Part
"""Where a loss draws from: a generator for the whole batch, or a part of it."""


def dsm_loss(
    denoiser: Denoiser,
    x0: Tensor,
    *,
    weighting: Weighting = simple,
    times: TimeSampler | None = None,
    t: Tensor | None = None,
    noise: Tensor | None = None,
    generator: Draws | None = None,
    cond: Mapping[str, Any] | None = None,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """The denoising score matching loss of a batch.

    Args:
        denoiser: the model; its network must be differentiable.
        x0: clean data, shape (B, ...), floating point.
        weighting: w(sde, t), the weight of the noise error; see `scoresde.training.weights`.
        times: the distribution of t; uniform and stratified by default.
        t: instead of drawing, the times, shape () or (B,), above 0.
        noise: instead of drawing, eps, shape of x0.
        generator: where t and noise are drawn from, on its own device; freshly seeded if not given. A `Part` where x0
            is part of a batch.
        cond: keyword arguments for the network; of a `scoresde.Masked` denoiser the mask among them. An item's loss
            then is the mean over its own entries, whatever the batch is filled up with and however far, to the last bit
            where the network is so; its noise too is of its own entries alone.
        reduction: "mean" over the batch, in which every item counts once, or "none" for shape (B,). (For every entry of
            masked items to count once take "none", and the mean with weights of as many entries as each has.)

    Returns:
        The loss, at least float32: a scalar, or (B,).

    Raises:
        TypeError: if the denoiser is none, or the generator no torch.Generator.
        ValueError: if x0 is not floating point, shapes do not fit, t and times are both given, or a t is 0 or outside
            the SDE. If there is a mask (`scoresde.masks.is_mask`), and the denoiser is not `Masked`. On the host also
            where the denoiser cannot be evaluated (an eps network at alpha = 0), or the loss has no limit.
    """
    check_denoiser(denoiser)
    sde = denoiser.sde
    check_batch(x0, "x0")
    denoiser, own = own_of(denoiser, x0.shape, cond)
    if own.mask is None:
        refuse_unmasked(cond)
    x0 = own.only(x0)
    if t is not None and times is not None:
        raise ValueError("give t= or times=, not both")
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction={reduction!r}: expected 'mean' or 'none'")
    check_cond(cond, len(x0))
    t, ratio, noise, x_t, _ = noisy_batch(sde, x0, times, t, noise, generator, own)
    denoiser.check_times(t)
    scale = ratio * _weight(weighting, denoiser, t)
    error = error_of(denoiser, denoiser.output(x_t, t.to(x0.device), **(cond or {})), t, x0, noise)
    loss = expand_like(scale, error).reshape(-1) * own.mean(error.square())
    return loss.mean() if reduction == "mean" else loss


def two_term_loss(
    denoiser: Denoiser,
    x0: Tensor,
    cond: Mapping[str, Any],
    *,
    unconditional: float,
    num_classes: int | None = None,
    generator: Draws | None = None,
    **options: Any,
) -> Tensor:
    """L(told the conditions) + unconditional * L(told nothing), of the same times and noise: what guidance without a
    classifier trains on (Ho and Salimans, 2022), with both terms in every batch. It is 1 + unconditional times the mean
    of dropping conditions with probability p = unconditional / (1 + unconditional), and its gradient has less variance;
    each step takes two evaluations of the network.

    Args:
        denoiser: the conditional model.
        x0: clean data, shape (B, ...), floating point.
        cond: keyword arguments for the network, B entries each.
        unconditional: the second term's weight, 0 or above.
        num_classes: K, where there is a label: its null class (`scoresde.data.nothing`).
        generator, options: as for `dsm_loss`.

    Returns:
        The loss, as `dsm_loss`.

    Raises:
        ValueError: if there is no condition, the weight is negative or not finite, or a label is without num_classes;
            as `dsm_loss`.
    """
    if not cond or not cond.keys() - {mask_name(denoiser)}:
        raise ValueError("two_term_loss: there is no condition to leave out")
    check_nonnegative(unconditional=unconditional)
    part = Part.of(generator, len(x0), x0.device)
    again = replace(part, generator=part.generator.clone_state())
    told = dsm_loss(denoiser, x0, cond=cond, generator=part, **options)
    untold = nothing(cond, num_classes) | {name: cond[name] for name in cond if name == mask_name(denoiser)}
    return told + unconditional * dsm_loss(denoiser, x0, cond=untold, generator=again, **options)


def masked_loss(loss: Callable[..., Tensor] = dsm_loss, name: str = "mask", **options: Any) -> Callable[..., Tensor]:
    """A loss on items of various sizes, for `Trainer(denoiser, data, config, cond={"mask": mask}, loss=masked_loss())`:
    that of `scoresde.Masked(denoiser, name)`. To sample from what is trained, wrap it so too.

    Args:
        loss: `dsm_loss`, or `two_term_loss` with its options.
        name: of the condition that is the mask.
        options: of the loss: weighting=, times=, ...
    """

    def train(denoiser: Denoiser, x0: Tensor, draws: Draws, cond: Mapping[str, Any]) -> Tensor:
        return loss(Masked(denoiser, name), x0, generator=draws, cond=cond, **options)

    train.__name__ = f"masked {loss.__name__}"
    return train


def joint_loss(frames: int, loss: Callable[..., Tensor] = dsm_loss, **options: Any) -> Callable[..., Tensor]:
    """A loss on clips and single frames jointly (Ho et al., 2022, "Video diffusion models", section 4.2), for
    `Trainer(denoiser, data, config, loss=joint_loss(8))`: an item (C, F + K, ...) is a clip of F = `frames` frames with
    K other frames appended, each an image by itself, of another clip or of none; every frame counts once,

        (F L(clip) + K L(images)) / (F + K)

    The appended frames are clips of length 1, (B K, C, 1, ...), in a call of their own, each with its own time and
    noise, and not frames behind the clip whose attention over time is masked: nothing has to be kept from the other
    frames, so nothing can leak, and no network needs to be told. It is the same arithmetic in two calls.

    Args:
        frames: F.
        loss: `dsm_loss`, or `two_term_loss` with its options.
        options: of the loss: weighting=, times=, ...

    Raises:
        ValueError: by the call, if items have no more frames than that, or the network is told an image. Of all else
            that it is told of an item, it is told the same of each of its K images.
    """
    check_count(frames=frames)

    def train(denoiser: Denoiser, x0: Tensor, draws: Draws, cond: Mapping[str, Any]) -> Tensor:
        if x0.ndim < 4 or x0.shape[2] <= frames or "image" in cond:
            raise ArgumentError(
                f"joint_loss({frames}) of items of shape {tuple(x0.shape[1:])}, told {sorted(cond)}: expected (C, "
                f"{frames} + K, ...), K >= 1 frames appended to a clip, and no image"
            )
        B, K = len(x0), x0.shape[2] - frames
        part = Part.of(draws, B, x0.device)
        images = x0[:, :, frames:].transpose(1, 2).flatten(0, 1).unsqueeze(2)
        each = replace(part, start=K * part.start, size=K * part.size)
        told = entries_of(cond, torch.arange(B, device="cpu").repeat_interleave(K), B)
        of_clips = loss(denoiser, x0[:, :, :frames], generator=part, cond=cond, **options)
        return (frames * of_clips + K * loss(denoiser, images, generator=each, cond=told, **options)) / (frames + K)

    train.__name__ = f"joint {loss.__name__} of {frames} frames"
    return train


def refuse_unmasked(cond: Mapping[str, Any] | None) -> None:
    """Raises ValueError if there is a mask among the conditions of a denoiser that is not `Masked`, which takes it for
    one of them, and would be trained on what fills up."""
    if any(is_mask(name, value) for name, value in (cond or {}).items()):
        raise ArgumentError(
            f"a mask among the conditions, {MASK!r}, of a denoiser that is not Masked: it would be trained on the "
            "entries that fill up. In a Trainer give loss=masked_loss(), with weighting= and times= as its options, "
            "elsewhere Masked(denoiser); or, if it is no mask of entries but something that the network is told, take "
            "another name or dtype than bool"
        )


def _weight(weighting: Weighting, denoiser: Denoiser, t: Tensor) -> Tensor:
    """Of |N - N*|^2, float64, shape (B,)."""
    sde, (_, s) = denoiser.sde, denoiser.affine(t)
    if isinstance(weighting, OnX0):
        return (weighting.root(sde, t) * s) ** 2
    alpha = sde.alpha(t)
    weight = weighting(sde, t) * (alpha * s / sde.sigma(t)) ** 2
    if known_any(lost := (alpha == 0) & ~weight.isfinite()):
        raise ValueError(
            f"the weighting is infinite at t = {first_where(t, lost)} of {sde!r}, where alpha is zero: give it by its "
            "part in the error of x_0, scoresde.training.OnX0, if the loss has a limit there"
        )
    return weight


def error_of(denoiser: Denoiser, N: Tensor, t: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """N - N* of the denoiser's output at x_t, in at least float32: D - x_0 = s (N - N*). t is of shape (B,)."""
    (r, s), alpha, sigma = denoiser.affine(t), denoiser.sde.alpha(t), denoiser.sde.sigma(t)
    return N - combine((1 - r * alpha) / s, x0, -r * sigma / s, noise)


@shown
class NoisyBatch(NamedTuple):
    """Noisy data x_t = alpha x_0 + sigma noise at t (B,), float64, the weights `ratio` (B,) of the times that were
    drawn, and what they were drawn from.
    """

    t: Tensor
    ratio: Tensor
    noise: Tensor
    x_t: Tensor
    part: Part


def noisy_batch(
    sde: SDE,
    x0: Tensor,
    times: TimeSampler | None,
    t: Tensor | None,
    noise: Tensor | None,
    generator: Draws | None,
    own: Own | None = None,
) -> NoisyBatch:
    """What the losses see of a batch: t and noise as given, or drawn, times before noise. Arguments and errors as for
    `dsm_loss`. With a mask a seed is drawn for each item, and its noise counted from there: as the item's place in the
    whole batch says, not how far that is filled up.
    """
    own = own or Own(x0.shape)
    part = Part.of(generator, len(x0), x0.device)
    source, sampler = part.generator, times or UniformTimes()
    if t is None:
        t = part.draw((len(x0),), lambda shape: sampler.draw(sde, shape[0], source))
        ratio = sampler.ratio(sde, t)
    else:
        t = as_time(t).double()
        check_time(t, len(x0), sde, sde.t_max)
        t = t.expand(len(x0))
        if known_any(t == 0):
            raise ValueError("t = 0: the data itself holds no noise to be learned, so its loss is undefined")
        ratio = torch.ones_like(t)
    if own.mask is not None:
        if noise is None:
            key = part.draw(
                (len(x0),), lambda shape: torch.randint(2**62, shape, generator=source, device=source.device)
            ).to(x0.device)
            noise = own.placed(normal(key, 0, 0, x0[0].numel(), x0.dtype))
        noise = own.only(noise)
    if noise is None:
        noise = part.draw(
            x0.shape, lambda shape: torch.randn(shape, generator=source, dtype=x0.dtype, device=source.device)
        ).to(x0.device)
    x_t = sde.perturb(x0, t, noise)
    return NoisyBatch(t, ratio, noise, x_t, part)
