"""Data sets that need no download."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["digits"]


def digits() -> tuple[Tensor, Tensor]:
    """The 1,797 handwritten digits of scikit-learn (Alpaydin and Kaynak, 1998), from its wheel: no network needed.

    Returns:
        images: float32, shape (1797, 1, 8, 8), in [-1, 1] (17 grey levels).
        labels: int64, shape (1797,), 0 to 9.

    Raises:
        ImportError: if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("digits() reads them from scikit-learn: pip install scoresde[data]") from error
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float()[:, None] / 8 - 1
    return images, torch.from_numpy(bunch.target).long()
