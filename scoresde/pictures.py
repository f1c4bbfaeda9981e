"""What numbers look like: grids of images, PNG files, and the results of a notebook in HTML."""

from __future__ import annotations

import base64
import html
import math
import struct
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from scoresde.files import write_whole
from scoresde.levels import to_levels

__all__ = ["enlarged", "grid", "html_of", "html_table", "is_picture", "picture", "png", "scatter", "write_png"]

_SHOWN, _POINTS = 64, 2000


def is_picture(shape: Sequence[int]) -> bool:
    """Whether an item of that shape can be shown: (1, H, W) or (3, H, W)."""
    return len(shape) == 3 and shape[0] in (1, 3)


def grid(images: Tensor, columns: int | None = None, factor: int | None = None) -> Tensor:
    """Images, uint8, (N, C, H, W), side by side, row by row, with white between them: (C, H', W').

    Args:
        images: what is shown.
        columns: of the grid; as many as rows by default.
        factor: what a pixel's side becomes; by default small images have 32 pixels or more.
    """
    N, C, H, W = images.shape
    images = enlarged(images, factor or max(1, math.ceil(32 / max(H, W))))
    (H, W), columns = images.shape[2:], columns or math.ceil(math.sqrt(N))
    rows, gap = math.ceil(N / columns), 2
    page = torch.full((C, rows * (H + gap) + gap, columns * (W + gap) + gap), 255, dtype=torch.uint8, device="cpu")
    for i, image in enumerate(images):
        top, left = gap + (i // columns) * (H + gap), gap + (i % columns) * (W + gap)
        page[:, top : top + H, left : left + W] = image
    return page


def enlarged(images: Tensor, factor: int) -> Tensor:
    """Images (..., H, W), each pixel made factor x factor of them (nearest neighbour)."""
    return images.repeat_interleave(factor, -2).repeat_interleave(factor, -1)


def png(image: Tensor) -> bytes:
    """The PNG file of an image, uint8, (1, H, W) or (3, H, W)."""
    C, H, W = image.shape
    lines = torch.cat([torch.zeros(H, 1, dtype=torch.uint8), image.movedim(0, -1).reshape(H, W * C)], 1)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", W, H, 8, {1: 0, 3: 2}[C], 0, 0, 0)  # 8 bits; grey or RGB
    content = zlib.compress(lines.numpy().tobytes())
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def write_png(path: Path, image: Tensor) -> None:
    """Write an image, uint8, (1, H, W) or (3, H, W), whole or not at all."""
    content = png(image)
    write_whole(path, lambda out: out.write(content))


# --- notebooks -------------------------------------------------------------------------------------------------------


def html_of(line: str, x: Tensor) -> str:
    """A line, and under it the samples x, (B, ...): images in [-1, 1] as a grid, points in the plane as they lie, other
    data not at all.
    """
    x = x.detach()
    shown = picture(x) if is_picture(x.shape[1:]) else scatter(x) if x.ndim == 2 and x.shape[1] == 2 else ""
    return f"<code>{html.escape(line)}</code>{'<br>' * bool(shown)}{shown}"


def picture(x: Tensor) -> str:
    """The first images of a batch in [-1, 1], (B, C, H, W), as a grid in HTML."""
    n = min(len(x), _SHOWN)
    content = base64.b64encode(png(grid(to_levels(x[:n])))).decode()
    return f'<img alt="{n} of {len(x)} images" src="data:image/png;base64,{content}">'


def scatter(x: Tensor, size: int = 280) -> str:
    """The first points of a batch in the plane, (B, 2), both axes alike, as SVG."""
    x = x[:_POINTS].double().cpu()
    x = x[x.isfinite().all(1)]
    if not len(x):
        return ""
    middle = (x.amax(0) + x.amin(0)) / 2
    half = max(float((x - middle).abs().max()), 1e-12) * 1.05
    places = ((x - middle) / half * torch.tensor([1.0, -1.0], dtype=torch.float64) + 1) * size / 2
    dots = "".join(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="1.5"/>' for a, b in places.tolist())
    box = f'width="{size}" height="{size}" viewBox="0 0 {size} {size}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box} fill="#1f77b4" fill-opacity="0.6">{dots}</svg>'


def html_table(line: str, head: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """A line, and under it a table."""
    first = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<code>{html.escape(line)}</code><table><thead><tr>{first}</tr></thead><tbody>{body}</tbody></table>"
