"""Samples against the very truth that they stand for: errors of each."""

from __future__ import annotations

from torch import Tensor

__all__ = ["psnr", "rms"]


def rms(x: Tensor) -> Tensor:
    """The root of the mean square of each entry of a batch, (B, ...) -> (B,)."""
    return x.reshape(len(x), -1).square().mean(1).sqrt()


def psnr(x: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, 20 log10(2 / rms error), of images in [-1, 1], to which x is cut.

    Args:
        x, truth: shape (B, ...).

    Returns:
        one number for each of the batch, shape (B,).

    >>> import torch
    >>> psnr(torch.full((1, 4), 0.2), torch.zeros(1, 4))
    tensor([20.])
    """
    return 20 * (2 / rms(x.clamp(-1, 1) - truth)).log10()
