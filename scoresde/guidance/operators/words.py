"""Operators in words, as a command line has them: "box:8,8,12,12", "down:4:bicubic"."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from scoresde.checks import ArgumentError, nearest
from scoresde.data.folder import ImageFolder, read_image
from scoresde.guidance.operators.base import Operator
from scoresde.guidance.operators.imaging import Blur, Downsample, Grey
from scoresde.guidance.operators.known import FourierSampling, Mask, box_mask, random_mask
from scoresde.guidance.operators.nonlinear import Quantise

__all__ = ["OPERATORS", "Shape", "operator_of", "read_masks"]

Shape = tuple[int, ...]


def operator_of(text: str, shape: Shape) -> Operator:
    """A measurement of items of that shape, in words.

    Raises:
        ValueError: if there is none of that name, its argument is none, or it does not go with such items.
        OSError: if a mask cannot be read.

    >>> operator_of("box:2,3,4,4", (1, 8, 8)), operator_of("down:2:bicubic", (3, 8, 8))
    (Mask(48 of 64 known, shape=(8, 8)), Downsample(2, 'bicubic', dims=2))
    """
    name, _, argument = text.partition(":")
    if name not in OPERATORS:
        near = nearest(name, OPERATORS)
        hint = "" if near is None else f"{OPERATORS[near][0]}, or one of "
        raise ArgumentError(f"operator={text!r}: expected {hint}{', '.join(usage for usage, _ in OPERATORS.values())}")
    usage, make = OPERATORS[name]
    try:
        A = make(argument, shape)
        A(torch.zeros(1, *shape))
    except (ValueError, OSError) as error:
        raise ArgumentError(f"operator={text!r}: ", f"{error} (as in {usage})") from error
    return A


def read_masks(path: Path, shape: Shape) -> Tensor:
    """Where an image is white, (1, H, W), for items (C, H, W); of a folder of images, one for each item in the order of
    their names, (N, 1, H, W).

    Raises:
        ValueError, OSError, ImportError: if they cannot be read.
    """
    if not path.is_dir():
        return read_image(path, (1, *shape[1:]), "black") > 127
    folder = ImageFolder(path, size=(shape[1], shape[2]), mode="L", background="black")
    return folder.batch(range(len(folder))) > 127


def _plane(shape: Shape) -> Shape:
    """What a mask of all channels has for its shape."""
    return shape[1:] or shape


def _dims(shape: Shape) -> int:
    return max(1, len(shape) - 1)


def _mask(argument: str, shape: Shape) -> Operator:
    if len(shape) != 3:
        raise ValueError(f"the model's items {shape} are no pictures")
    white = read_masks(Path(argument), shape)
    return Mask(white, per_sample=white.ndim > len(shape))


def _box(argument: str, shape: Shape) -> Operator:
    numbers = [int(word) for word in argument.split(",")]
    if len(shape) < 3 or len(numbers) != 4:
        raise ValueError(f"{len(numbers)} numbers for items {shape}: expected TOP,LEFT,HEIGHT,WIDTH of pictures")
    top, left, height, width = numbers
    return box_mask(shape[-2:], (top, left), (top + height, left + width))


def _grey(argument: str, shape: Shape) -> Operator:
    if argument:
        raise ValueError("it takes no argument")
    return Grey((0.299, 0.587, 0.114))  # Pillow's "L", which files of grey images are likely to be


def _down(argument: str, shape: Shape) -> Operator:
    factor, _, kind = argument.partition(":")
    if kind not in ("", "area", "bicubic"):
        raise ValueError(f"expected area or bicubic, not {kind}")
    return Downsample(int(factor), "bicubic" if kind == "bicubic" else "area", dims=_dims(shape))


def _fourier(argument: str, shape: Shape) -> Operator:
    keep, (*rest, columns) = float(argument), _plane(shape)
    if not 0 < keep <= 1:
        raise ValueError("expected a share in (0, 1]")
    count = max(1, round(keep * columns))
    lowest = sorted(range(columns), key=lambda k: min(k, columns - k))
    order = torch.randperm(columns, generator=torch.Generator("cpu").manual_seed(0), device="cpu").tolist()
    first = lowest[: math.ceil(count / 3)]
    chosen = [*first, *(k for k in order if k not in first)][:count]
    mask = torch.zeros(columns, dtype=torch.bool, device="cpu")
    mask[chosen] = True
    return FourierSampling(mask.expand(*rest, columns))


OPERATORS: dict[str, tuple[str, Callable[[str, Shape], Operator]]] = {
    "mask": ("mask:FILE.png or mask:FOLDER", _mask),
    "box": ("box:TOP,LEFT,HEIGHT,WIDTH", _box),
    "random": ("random:0.3", lambda argument, shape: random_mask(_plane(shape), float(argument), seed=0)),
    "grey": ("grey", _grey),
    "blur": ("blur:1.5", lambda argument, shape: Blur(float(argument), dims=_dims(shape))),
    "down": ("down:4 or down:4:bicubic", _down),
    "fourier": ("fourier:0.25", _fourier),
    "quantise": ("quantise:10", lambda argument, shape: Quantise(float(argument))),
}
