"""Any photo -> upright RGB pixels, and bringing pixels down to a size."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vitpa.data.beton import ImageSettings, Pixels


class CorruptImageError(Exception):
    """The content of an image is not usable: one line with the reason. A file that cannot be read is an OSError instead."""


def read_photo(path: Path) -> Pixels:
    """Read an image file of any kind as (H, W, 3) uint8 RGB.

    It is turned upright by its EXIF orientation. Transparent parts become white. 16-bit grey is scaled to 8 bits. Of an
    animation the first frame is taken.

    Raises:
        CorruptImageError: the bytes were read but are no whole image, or have no defined meaning as RGB.
        OSError: the file cannot be read.
    """
    if path.is_symlink() and not path.exists():
        raise CorruptImageError(f"a symbolic link to {path.readlink()}, where there is nothing")
    data = path.read_bytes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd EXIF entries and the like, which thousands of good photos have
            with Image.open(io.BytesIO(data)) as image:
                return _to_rgb(ImageOps.exif_transpose(image))
    except (CorruptImageError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise anything from SyntaxError to struct.error on damaged bytes
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "not an image of a known kind" if unknown else " ".join(f"{type(error).__name__}: {error}".split())
        raise CorruptImageError(reason) from error


def shrink(pixels: Pixels, settings: ImageSettings) -> Pixels:
    """Bring (H, W, 3) uint8 pixels down to the size of `settings`, antialiased bicubic; smaller ones stay as they are."""
    if settings.size_px is None:
        return pixels
    height, width = pixels.shape[:2]
    side = min(height, width) if settings.resize == "short_side" else max(height, width)
    if side <= settings.size_px:
        return pixels
    size = (max(1, round(width * settings.size_px / side)), max(1, round(height * settings.size_px / side)))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def _to_rgb(image: Image.Image) -> Pixels:
    if image.mode == "F":
        raise CorruptImageError("floating-point pixels, for which no white is defined")
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 0xFFFF:
            raise CorruptImageError("32-bit grey values beyond 16 bits, for which no white is defined")
        return np.repeat(np.rint(grey / 257).astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        seen = Image.new("RGBA", image.size, "white")
        seen.alpha_composite(image.convert("RGBA"))
        image = seen
    return np.asarray(image.convert("RGB"))
