"""Classifier guidance (Song et al., 2021, section 5; Dhariwal and Nichol, 2021):

    score'(x_t) = score(x_t) + w grad_x log p(y | x_t)

with a classifier of noisy data, p(y | x_t, t), for which w = 1 is Bayes' rule, or one of clean data, read at D(x_t, t):
log p(y | x_t) is then taken to be log p(y | x_0 = D), which is wrong by what the posterior's width makes of it, and
the gradient goes through the denoiser (universal guidance; Bansal et al., 2023).

Both forms of Dhariwal and Nichol are steps of the guided denoiser D' = D + w (sigma_t^2 / alpha_t) g, g at x_t:

- their algorithm 2, a DDIM step with eps' = eps - w sigma_t g, is `DDIM` on D', exactly;
- their algorithm 1, a DDPM step whose mean mu moves to mu + w Sigma g. `DDPM` on D' moves the mean of
  x_s = a x_t + b D + c z, b = alpha_s (1 - e^{-2h}), by

      b (sigma_t^2 / alpha_t) w g = (alpha_s / alpha_t) beta w g,    beta = sigma_t^2 (1 - e^{-2h})

  so with Sigma = beta, the variance "beta", it is theirs times alpha_s / alpha_t, which is 1 / sqrt(1 - beta_n) on a
  chain and tends to 1 with the step. With Sigma = (sigma_s / sigma_t)^2 beta, the posterior variance, the ratio is
  (alpha_s / alpha_t) (sigma_t / sigma_s)^2: it tends to 1 as well, but on the last step, to sigma_s = 0, theirs does
  not guide at all. Theirs expands log p(y | x_s) to first order; D' keeps the mean E[x_s | x_t, y] itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from scoresde.denoiser import Denoiser
from scoresde.entries import check_entries
from scoresde.guidance.base import Guidance, Scale
from scoresde.guidance.gradients import guided_by, usable
from scoresde.sde import SDE
from scoresde.tensors import Time, dtype_of_label, known_any, precise, widen
from scoresde.training.loss import Draws, noisy_batch
from scoresde.training.weights import TimeSampler

__all__ = ["Classifier", "classifier_loss"]


class Classifier(Guidance):
    """A denoiser guided by a classifier.

    Args:
        denoiser: the denoiser to wrap.
        classifier: `classifier(x, time)`, or `classifier(x)` if clean, to logits or log-probabilities (B, classes): of
            either it takes log_softmax, which leaves log-probabilities alone. It is called in its own dtype.
        scale: w: a number, one per sample (B,), or a function of t. 0 is the wrapped denoiser, bit for bit; above 1
            samples are more typical of the class, and less varied.
        label: the class, a whole number, or one per sample, shape (B,); or the name of the condition that holds them,
            as in `sample(..., cond={"label": labels})`.
        clean: whether the classifier is one of clean data, read at D. (The network then is differentiated too.)
        time: what the classifier is told of t, as for `NetworkDenoiser`; t itself by default.
        conditional: whether the wrapped denoiser is given the label's condition as well: for a conditional model that a
            classifier guides further. Other conditions always go to it.

    Raises:
        TypeError: if denoiser is none, or the classifier cannot be called.
        ValueError: on another scale or label; by the call, before the network's, if a label or scale has neither one
            entry nor one per sample or the condition is missing, and after it if the label is outside the classes.

    >>> from scoresde import VPSDE
    >>> from scoresde.exact import Gaussian, GaussianMixture
    >>> sde, target = VPSDE(), GaussianMixture(means=[[-1.0], [1.0]], std=0.1)
    >>> def logits(x, t):  # exact: log N(x; alpha, S) - log N(x; -alpha, S) = 2 alpha x / S
    ...     alpha, S = sde.alpha(t)[:, None], (0.01 * sde.alpha(t) ** 2 + sde.sigma(t) ** 2)[:, None]
    ...     return torch.cat([0 * x, 2 * alpha * x / S], dim=1)
    >>> guided = Classifier(target.denoiser(sde), logits, label=1)
    >>> x = torch.linspace(-1, 1, 5)[:, None]
    >>> torch.allclose(guided(x, 0.3).mean, Gaussian([1.0], std=0.1).denoiser(sde)(x, 0.3).mean, atol=1e-5)
    True
    """

    def __init__(
        self,
        denoiser: Denoiser,
        classifier: Callable[..., Tensor],
        scale: Scale = 1.0,
        *,
        label: int | Tensor | str = "label",
        clean: bool = False,
        time: Callable[[Tensor], Tensor] | None = None,
        conditional: bool = False,
    ) -> None:
        super().__init__(denoiser, scale)
        if not callable(classifier):
            raise TypeError(f"classifier is {type(classifier).__name__}: expected a callable classifier(x, time)")
        if clean and time is not None:
            raise ValueError("time= is for a classifier of noisy data: a clean one is called as classifier(x)")
        self.classifier, self.clean, self.time, self.conditional = classifier, clean, time, conditional
        self.label = label if isinstance(label, str) else _labels(label, "label")

    def prepared(self, cond: Mapping[str, Any] | None) -> dict[str, Any]:
        """Of what the wrapped denoiser is given; the label stays beside it."""
        given = dict(cond or {})
        passed = dict(self.passed_on(given))
        found, name = self.denoiser.prepared(passed), self.label
        if not isinstance(name, str) or name not in given:
            return found
        if (name in passed) != (name in found):  # encoded, or made of another: it is told apart by its raw name alone
            return given
        return {**found, name: given[name]}

    def passed_on(self, cond: Mapping[str, Any]) -> Mapping[str, Any]:
        if not isinstance(self.label, str) or self.conditional:
            return cond
        return {name: value for name, value in cond.items() if name != self.label}

    def log_prob(self, x: Tensor, t: Time, label: Tensor) -> Tensor:
        """log p(label | x), shape (B,): x is x_t, or x_0 if the classifier is clean."""
        logits = _logits(self.classifier, x, None if self.clean else t, self.time)
        _check_range(label, logits.shape[1])
        label = label.to(x.device).expand(len(x))
        return logits.log_softmax(1).gather(1, label[:, None])[:, 0]

    def guided(self, x: Tensor, t: Time, cond: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        label = usable(self._label(cond, len(x)))
        return guided_by(
            self.denoiser, lambda x: self.log_prob(x, t, label), x, usable(t), self.passed_on(cond), self.clean
        )

    def _label(self, cond: Mapping[str, Any], batch: int) -> Tensor:
        if not isinstance(self.label, str):
            label, name = self.label, "label"
        elif self.label in cond:
            name = f"cond[{self.label!r}]"
            label = _labels(cond[self.label], name)
        else:
            found = ", ".join(map(repr, cond)) or "none"
            raise ValueError(
                f"no condition {self.label!r} (but {found}): pass cond={{{self.label!r}: labels}}, or "
                "Classifier(..., label=) a class"
            )
        check_entries(name, label, batch)
        return label

    def __repr__(self) -> str:
        return f"Classifier({self.denoiser!r}, {type(self.classifier).__name__}, scale={self.scale!r})"


def classifier_loss(
    classifier: Callable[..., Tensor],
    sde: SDE,
    x0: Tensor,
    labels: Tensor,
    *,
    time: Callable[[Tensor], Tensor] | None = None,
    times: TimeSampler | None = None,
    t: Tensor | None = None,
    noise: Tensor | None = None,
    generator: Draws | None = None,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """Cross-entropy -log p(y | x_t) of a classifier on noisy data: what trains one for `Classifier`.

    Args:
        classifier: `classifier(x, time)` to logits (B, classes), differentiable: any module.
        sde: of the denoiser that it is to guide.
        x0: clean data, shape (B, ...), floating point.
        labels: its classes, integers (B,).
        time: what the classifier is told of t: give `Classifier` the same.
        times, t, noise, generator, reduction: as for `dsm_loss`.

    Returns:
        The loss in nats, at least float32: a scalar, or (B,).

    Raises:
        ValueError: if shapes do not fit, a label is outside the classes, or as for `dsm_loss`.
    """
    labels = _labels(labels, "labels")
    if labels.shape != x0.shape[:1]:
        raise ValueError(f"labels has shape {tuple(labels.shape)} for {len(x0)} samples: expected ({len(x0)},)")
    if t is not None and times is not None:
        raise ValueError("give t= or times=, not both")
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction={reduction!r}: expected 'mean' or 'none'")
    drawn, ratio, _, x_t, _ = noisy_batch(sde, x0, times, t, noise, generator)
    logits = _logits(classifier, x_t, drawn, time)
    _check_range(labels, logits.shape[1])
    loss = ratio.to(logits) * F.cross_entropy(logits, labels.to(logits.device), reduction="none")
    return loss.mean() if reduction == "mean" else loss


def _logits(
    classifier: Callable[..., Tensor], x: Tensor, t: Time | None, time: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """The classifier's logits of x at t (of clean data where t is None), (B, classes), float32 at least."""
    parameters = classifier.parameters() if isinstance(classifier, torch.nn.Module) else iter(())
    dtype = next((p.dtype for p in parameters if p.is_floating_point()), x.dtype)
    seen: tuple[Tensor, ...] = (x.to(dtype),)
    if t is not None:
        times = precise(t).reshape(-1)
        told = times if time is None else time(times)
        kind = dtype_of_label(told, dtype)
        if told.shape == (1,) and told.device.type == "cpu":  # a copy to a GPU would stall it
            seen += (torch.full((len(x),), told.item(), dtype=kind, device=x.device),)
        else:
            seen += (told.to(device=x.device, dtype=kind).expand(len(x), *told.shape[1:]),)
    logits = classifier(*seen)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the classifier returned {found} for {len(x)} samples: expected logits ({len(x)}, classes)")
    return widen(logits)


def _labels(label: Any, name: str) -> Tensor:
    """Classes as integers of shape () or (B,)."""
    try:
        labels = torch.as_tensor(label)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}={label!r}: expected a class, or one per sample") from error
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool or labels.ndim > 1:
        raise ValueError(f"{name} is {labels.dtype} of shape {tuple(labels.shape)}: expected integers () or (B,)")
    if known_any(labels < 0):
        raise ValueError(f"{name} = {labels.tolist()}: a class is a whole number >= 0")
    return labels.long()


def _check_range(labels: Tensor, classes: int) -> None:
    if known_any(labels >= classes):
        raise ValueError(
            f"label {int(labels.max())} is outside the {classes} classes of the classifier: expected 0 to {classes - 1}"
        )
