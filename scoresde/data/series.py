"""Series: a number of values at each step of time, (L, d), cut into windows, scaled by what is known of them.

    s_i = mean over the context of |x_i|,    z = x / s        (Salinas et al., 2020, "DeepAR", section 3.3)

The scale is of the context alone. Were what is to be forecast part of it, the model would be told of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scoresde.checks import check_count

__all__ = ["context_scale", "step_inputs", "windows"]


def windows(series: Tensor, length: int, stride: int = 1) -> Tensor:
    """All windows of a series, (L, d) -> (N, length, d): views of it, of which window k begins at step k * stride.

    Raises:
        ValueError: if the series has another number of axes, or fewer steps than a window.

    >>> windows(torch.arange(5.0)[:, None], length=3, stride=2)[..., 0]
    tensor([[0., 1., 2.],
            [2., 3., 4.]])
    """
    check_count(length=length, stride=stride)
    if series.ndim != 2 or len(series) < length:
        raise ValueError(f"a series of shape {tuple(series.shape)}: expected (L, d), L >= {length} (series[:, None])")
    return series.unfold(0, length, stride).mT


def context_scale(context: Tensor) -> Tensor:
    """s: the mean absolute value of each of a context's d series, (B, L, d) -> (B, 1, d); 1 where all are zero.

    >>> context_scale(torch.tensor([[[1.0, 0.0], [-3.0, 0.0]]]))
    tensor([[[2., 1.]]])
    """
    scale = context.abs().mean(1, keepdim=True)
    return torch.where(scale > 0, scale, 1.0)


def step_inputs(values: Tensor, covariates: Tensor | None = None) -> Tensor:
    """What a network of states sees before each step 1, ..., L: the value before it, and what is known of itself,

        u_k = (x_{k-1}, c_k)        (B, L, d) -> (B, L, d + c)

    Args:
        values: x_0, ..., x_{L-1}, shape (B, L, d).
        covariates: c_0, ..., c_L, shape (B, L + 1, c): what is known beforehand, the hour of the day say. c_0 is not
            used.

    Raises:
        ValueError: if the covariates have another number of steps. A shift by one step would raise no error elsewhere,
            and tell the network the hour of another step.
    """
    if covariates is None:
        return values
    B, L, _ = values.shape
    if covariates.ndim != 3 or covariates.shape[:2] != (B, L + 1):
        raise ValueError(
            f"covariates of shape {tuple(covariates.shape)} beside values {tuple(values.shape)}: expected one for each "
            f"step and one for the step to come, {(B, L + 1, 'c')}"
        )
    return torch.cat([values, covariates[:, 1:].to(values)], 2)
