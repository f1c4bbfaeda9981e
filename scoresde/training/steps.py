"""Training a model over time: the loss of every step of a window, given the steps before it.

    sum over k of L(z_k | h_k),    h_k = state(u_1, ..., u_k),  u_k = (z_{k-1}, c_k),  z = x / s

(Rasul et al., 2021, algorithm 1), L denoising score matching with z_k in place of x_0. The states of a window are
computed in one pass, and its steps are entries of one batch, each with a time t and a noise of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from scoresde.checks import check_count
from scoresde.data.series import context_scale, step_inputs
from scoresde.denoiser import NetworkDenoiser
from scoresde.entries import entries_of
from scoresde.nn import Stepwise
from scoresde.training.loss import Draws, Part, dsm_loss

__all__ = ["step_loss"]


def step_loss(context: int, **options: Any) -> Callable[..., Tensor]:
    """A loss for `Trainer(denoiser, windows, config, cond={"covariates": ...}, loss=step_loss(context=48))`.

    The denoiser's network is a `scoresde.nn.Stepwise`; the windows are (N, L, d), those of `scoresde.data.windows` say,
    and covariates, known for each step beforehand, (N, L, c). Other conditions are of a window, and told at each of its
    steps. What is trained is rolled out by `scoresde.forecasting`.

    Args:
        context: C, the steps at a window's beginning that are given. Those after it, L - C, are learned, each from all
            steps before it. (Of steps in the context the scale would tell: it is of them.)
        options: of `dsm_loss`: weighting=, times=.

    Raises:
        ValueError: by the loss, if the network has no states or a window no step after the context.
    """
    check_count(context=context)

    def train(denoiser: NetworkDenoiser, x0: Tensor, draws: Draws, cond: Mapping[str, Any]) -> Tensor:
        if x0.ndim != 3 or x0.shape[1] <= context:
            raise ValueError(f"windows of shape {tuple(x0.shape)}: expected (B, L, d), L > context={context}")
        # It may be inside of another module, which compiles it or computes in half precision.
        nets = denoiser.net.modules() if isinstance(denoiser.net, nn.Module) else ()
        net = next((net for net in nets if isinstance(net, Stepwise)), None)
        if net is None:
            raise ValueError(f"{denoiser!r} has no states: its network is to be a scoresde.nn.Stepwise")
        K, more = x0.shape[1] - context, dict(cond)
        z = x0 / context_scale(x0[:, :context]) if net.scaled else x0
        inputs = step_inputs(z[:, :-1], more.pop("covariates", None))
        told = denoiser.prepared({"window": inputs})
        told = {name: value[:, context - 1 :].flatten(0, 1) for name, value in told.items()}
        told |= entries_of(more, torch.arange(len(x0)).repeat_interleave(K), len(x0))
        part = Part.of(draws, len(x0), x0.device)
        part = replace(part, start=part.start * K, size=part.size * K)
        return dsm_loss(denoiser, z[:, context:].flatten(0, 1), generator=part, cond=told, **options)

    train.__name__ = f"step_loss(context={context})"
    return train
