"""One picture file as 8-bit levels: checked from its head, decoded, upright, opaque, grey or RGB, of a size.

    level k of 16 bits      round(k / 257): level 65,535 becomes 255
    opacity a in [0, 1]     a c + (1 - a) b, of colour c before the background b

Of a file with several pictures it is the first.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from scoresde.checks import ArgumentError, check_option

__all__ = ["SUFFIXES", "Decoder", "Mode", "bombs_refused", "check_pillow"]

Mode = Literal["L", "RGB"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
"""Of picture files."""

_GREY = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L")
_COLOUR = ("P", "RGB", "RGBA", "CMYK", "YCbCr")  # a palette's entries are RGB
_ORIENTATION = 0x0112  # EXIF: 5 to 8 are on their side


def check_pillow() -> Any:
    """Pillow's Image, or ImportError, saying what to install."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "image files are read and written with Pillow: pip install pillow, or scoresde[data]"
        ) from error
    return Image


@dataclass(frozen=True)
class Decoder:
    """What is made of a picture file.

    Args:
        size: height and width, or one number for both: cropped around the centre to that ratio, and resized (Lanczos).
            None for its own.
        mode: "L" (grey) or "RGB"; None for what it is.
        background: what shows through where it is transparent, a colour as Pillow knows it, "#808080" say; None for
            white.

    Raises:
        ValueError: on another size, mode or background; by its methods, if a file cannot be read, naming it.
        ImportError: if Pillow is not installed.
    """

    size: int | tuple[int, int] | None = None
    mode: Mode | None = None
    background: str | None = None

    def __post_init__(self) -> None:
        check_pillow()
        size = self.size if self.size is None or isinstance(self.size, tuple | list) else (self.size, self.size)
        if size is not None:
            if len(size) != 2 or not all(type(n) is int and n >= 1 for n in size):
                raise ArgumentError(f"size={self.size!r}: expected a whole number >= 1, or two, (height, width)")
            object.__setattr__(self, "size", tuple(size))
        if self.mode is not None:
            check_option(("L", "RGB"), mode=self.mode)
        if len(self._rgb()) != 3:
            raise ArgumentError(f"background={self.background!r}: expected an opaque colour, 'white' or '#808080' say")

    @property
    def made(self) -> tuple[int, int, int] | None:
        """The (C, H, W) that every picture is made, where size and mode say it."""
        if self.mode is None or not isinstance(self.size, tuple):
            return None
        return (1 if self.mode == "L" else 3, *self.size)

    def shape(self, path: Path) -> tuple[int, int, int]:
        """(C, H, W) of what `array` will return, from the file's head."""
        Image = check_pillow()
        with _opened(path) as image:
            width, height = image.size
            # A PNG file's own getexif decodes it.
            if Image.Image.getexif(image).get(_ORIENTATION, 1) in (5, 6, 7, 8):
                width, height = height, width
            mode = self.mode or ("L" if image.mode in _GREY else "RGB")
            assert not isinstance(self.size, int)
            return (1 if mode == "L" else 3, *(self.size or (height, width)))

    def pixels(self, path: Path) -> int:
        """How many it has, from the file's head."""
        with _opened(path) as image:
            return int(image.size[0] * image.size[1])

    def array(self, path: Path) -> np.ndarray:
        """The levels, uint8, shape (C, H, W)."""
        from PIL import Image, ImageOps

        with _opened(path) as image:
            mode = self.mode or ("L" if image.mode in _GREY else "RGB")
            found = _opaque(ImageOps.exif_transpose(image), self._rgb())
            if found.mode != mode:
                found = found.convert(mode)
            if self.size is not None:
                assert isinstance(self.size, tuple)
                found = ImageOps.fit(found, self.size[::-1], method=Image.Resampling.LANCZOS)
            levels = np.array(found)
        return levels[None] if mode == "L" else np.ascontiguousarray(levels.transpose(2, 0, 1))

    def _rgb(self) -> tuple[int, ...]:
        from PIL import ImageColor

        try:
            return ImageColor.getrgb("white" if self.background is None else self.background)
        except (ValueError, AttributeError) as error:
            raise ArgumentError(
                f"background={self.background!r}: expected a colour, 'white' or '#808080' say"
            ) from error


@contextmanager
def bombs_refused() -> Iterator[None]:
    """While it is open, pictures of more than `PIL.Image.MAX_IMAGE_PIXELS` are not read: decoded, they are larger than
    the memory may be. It is for the main thread, which sets the filter of warnings for all."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", check_pillow().DecompressionBombWarning)
        yield


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    Image = check_pillow()
    try:
        with Image.open(path) as image:
            if image.mode not in (*_GREY, *_COLOUR):
                raise ValueError(f"its mode is {image.mode}, expected grey or colour of 8 or 16 bits")
            yield image
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{path} cannot be read as an image: it begins as none of a known format") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{path} cannot be read as an image: it has more than {Image.MAX_IMAGE_PIXELS:,} pixels, "
            "PIL.Image.MAX_IMAGE_PIXELS"
        ) from error
    except Exception as error:  # what is damaged raises nearly anything
        raise ValueError(f"{path} cannot be read as an image: {error or type(error).__name__}") from error


def _opaque(image: Any, background: tuple[int, ...]) -> Any:
    """Of 8 bits a channel, before the background."""
    from PIL import Image

    if image.mode == "1" or image.mode.startswith("I"):
        k, key = np.asarray(image).astype(np.int32), image.info.get("transparency")
        full = 1 if image.mode == "1" else 65_535
        if k.min() < 0 or k.max() > full:
            raise ValueError(f"its levels are {k.min()} to {k.max()}, expected those of 8 or 16 bits")
        image = Image.fromarray(((k * 255 + full // 2) // full).astype(np.uint8))
        if key is not None:
            image.putalpha(Image.fromarray(np.where(k == min(key, full), 0, 255).astype(np.uint8)))
    if image.mode not in ("LA", "PA", "RGBA") and "transparency" not in image.info:
        return image
    image, canvas = image.convert("RGBA"), Image.new("RGB", image.size, background)
    canvas.paste(image, mask=image)
    return canvas
