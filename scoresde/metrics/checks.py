"""What every distance asks of its two sets of features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scoresde.errors import not_finite, some

__all__ = ["as_features", "as_pair"]


def as_features(x: Any, name: str, least: int = 1, device: torch.device | None = None) -> Tensor:
    """The features in float64, detached; on the CPU where the device has no float64.

    Args:
        x: features, shape (n, d), floating point.
        name: of the set, for messages.
        least: n that is needed.
        device: where to; by default where they are.

    Raises:
        ValueError: if they are none, too few, or not finite; the message names the set and the rows.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim != 2 or len(x) < least or x.shape[1] == 0:
        found = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} is {found}: expected floating-point features (n, d), n >= {least}, d >= 1")
    device = x.device if device is None else device
    x = x.detach().to("cpu" if device.type == "mps" else device, torch.float64)
    if not bool(x.isfinite().all()):
        raise ValueError(f"a feature is not finite: of {name}, in rows {some(not_finite(x))}")
    return x


def as_pair(x: Any, y: Any, least: int = 1) -> tuple[Tensor, Tensor]:
    """Both sets in float64 on the device of the first, of one dimension d.

    Raises:
        ValueError: as `as_features`, or if they differ in d.
    """
    x = as_features(x, "x", least)
    y = as_features(y, "y", least, x.device)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"features of shapes {tuple(x.shape)} and {tuple(y.shape)}: expected (n, d) and (m, d)")
    return x, y
