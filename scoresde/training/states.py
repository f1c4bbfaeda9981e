"""The loss of denoisers of whole states: their bound, in nats of an entry,

    continuous time    E_t of what the bound integrates (`StateDenoiser.rate_term`), t of `StateDenoiser.times`
    a chain            T E_n KL(q(x_{n-1} | x_n, x_0) | p(x_{n-1} | x_n)), the step to t = 0 being -log p(x_0 | x_1)

without what does not depend on the network. In continuous time it does not depend on the schedule either: c = 1 - a is
uniform. Sources: Sohl-Dickstein et al. (2015); Austin et al. (2021); Campbell et al. (2022); Sahoo et al. (2024); Shi
et al. (2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from scoresde.categorical import StateDenoiser
from scoresde.categorical.solvers import check_states
from scoresde.checks import check_option
from scoresde.entries import check_cond
from scoresde.tensors import as_time
from scoresde.training.loss import Draws, Part

__all__ = ["bound_loss"]


def bound_loss(
    denoiser: StateDenoiser[Any],
    x0: Tensor,
    *,
    t: Tensor | None = None,
    noise: Tensor | None = None,
    generator: Draws | None = None,
    cond: Mapping[str, Any] | None = None,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """The bound of a batch, as a loss.

    Args:
        denoiser: the model; its network must be differentiable.
        x0: data, integers (B, ...), or what a product has.
        t: instead of drawing, times, shape (B,): of a chain nodes.
        noise: instead of drawing, standard normal numbers, shape of x0.
        generator: where t and noise are drawn from, as for `dsm_loss`; times are stratified.
        cond: keyword arguments for the network.
        reduction: "mean" over the batch, or "none" for shape (B,).

    Returns:
        The loss, float32 at least: a scalar, or (B,).

    Raises:
        TypeError: if the denoiser has no whole states.
        ValueError: if x0 are no such data, or shapes do not fit.
    """
    check_states(denoiser, bound_loss)
    check_option(("mean", "none"), reduction=reduction)
    denoiser.check(x0)
    check_cond(cond, len(x0))
    part, process = Part.of(generator, len(x0), x0.device), denoiser.process
    source = part.generator

    def strata(shape: tuple[int, ...]) -> Tensor:
        u = torch.rand(shape, dtype=torch.float64, generator=source, device=source.device)
        return (torch.arange(shape[0], device=u.device) + u) / shape[0]

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=source, device=source.device)

    chain = process.nodes is not None
    if t is None:
        u = part.draw((len(x0),), strata)
        t = (u * process.t_max).floor() + 1 if chain else denoiser.times(u)
    t = as_time(t).double().expand(len(x0)).to(x0.device)
    noise = part.draw(x0.shape, normal).to(x0.device) if noise is None else noise
    x_t = denoiser.perturb(x0, t, noise)
    x_t = x_t.to(x0.dtype) if x0.is_floating_point() else x_t
    found = denoiser.predicted(x_t, t, **(cond or {}))
    if chain:
        term = process.t_max * denoiser.step_term(x0, x_t, found, t, t - 1)
    else:
        term = denoiser.rate_term(x0, x_t, found, t)
    loss = -term / max(1, x0[0].numel())
    return loss.mean() if reduction == "mean" else loss
