"""Pictures: levels of images in [-1, 1], grids of them, PNG files."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from scoresde.data.pictures import check_pillow
from scoresde.files import write_whole

__all__ = ["grid", "is_picture", "write_png"]


def is_picture(shape: Sequence[int]) -> bool:
    """Whether an item of that shape can be shown: (1, H, W) or (3, H, W)."""
    return len(shape) == 3 and shape[0] in (1, 3)


def grid(images: Tensor, columns: int | None = None) -> Tensor:
    """Images, uint8, (N, C, H, W), side by side, row by row, with white between them: (C, H', W'). Small ones are
    enlarged by a whole factor to 32 pixels or more.
    """
    N, C, H, W = images.shape
    factor = max(1, math.ceil(32 / max(H, W)))
    images = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    H, W, columns = factor * H, factor * W, columns or math.ceil(math.sqrt(N))
    rows, gap = math.ceil(N / columns), 2
    page = torch.full((C, rows * (H + gap) + gap, columns * (W + gap) + gap), 255, dtype=torch.uint8, device="cpu")
    for i, image in enumerate(images):
        top, left = gap + (i // columns) * (H + gap), gap + (i % columns) * (W + gap)
        page[:, top : top + H, left : left + W] = image
    return page


def write_png(path: Path, image: Tensor) -> None:
    """Write an image, uint8, (1, H, W) or (3, H, W), whole or not at all."""
    array, file = image.movedim(0, -1).numpy(), io.BytesIO()
    check_pillow().fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(file, "PNG")
    write_whole(path, lambda out: out.write(file.getvalue()))
