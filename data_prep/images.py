"""Any photo -> upright RGB pixels, and bringing pixels down to a size."""

from __future__ import annotations

import errno
import functools
import io
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.PpmImagePlugin import PpmImageFile

from data_prep import integrity, tiff
from data_prep.palette import palette_damage
from data_prep.tiff import DEEP_WHITE, NEARLY_BLACK
from vitpa.data.manifest import ImageSettings, Pixels
from vitpa.documents import open_regular

FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "PPM", "GIF", "AVIF")  # of Pillow's many; that of EPS starts a program
MAX_FILE_BYTES = 1 << 30  # of an image
PNG_DEPTH_AT = 24  # bytes

Values = npt.NDArray[Any]  # integers of more than 8 bits

UPRIGHT: dict[int, Callable[[Values], Values]] = {  # (H, W, C) by EXIF orientation
    2: lambda values: values[:, ::-1],
    3: lambda values: values[::-1, ::-1],
    4: lambda values: values[::-1],
    5: lambda values: values.swapaxes(0, 1),
    6: lambda values: np.rot90(values, -1),
    7: lambda values: values[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90,
}


class CorruptImageError(Exception):
    """The content of an image is not usable: one line with the reason. A file that cannot be read is an OSError instead."""


@dataclass(frozen=True)
class Photo:
    """A photo as it is stored, and what of its file is not."""

    pixels: Pixels  # (H, W, 3) uint8 RGB, upright
    more_frames: bool = False  # whether there are more frames or pages, of which this is the first
    # the least and the largest value of an image of more than 8 bits, and its white
    value_range: tuple[int, int, int] | None = None


def load_photo(path: Path, white_level: int | None = None, stamp: tuple[int, int] | None = None) -> Photo:
    """Read an image file of any kind as (H, W, 3) uint8 RGB.

    It is turned upright by its EXIF orientation. Transparent parts become white. 16-bit values are scaled to 8 bits. Of an
    animation the first frame is taken. A JPEG or PNG of which only the last marker is missing is whole.

    Args:
        path: The file.
        white_level: The value that is white in images of more than 8 bits; None for the largest that has as many bits.
        stamp: Size in bytes and modification time in ns that the file has to have; None for any.

    Raises:
        CorruptImageError: the bytes were read but are no whole image, or have no defined meaning as RGB.
        OSError: the file cannot be read, or is not the one that `stamp` was taken of.
    """
    data, damage, cut = _read(path, stamp), "", False
    if data.startswith(integrity.JPEG_MAGIC):
        whole, reason = integrity.checked_jpeg(data)
        if reason:
            raise CorruptImageError(reason)
        data, cut = whole, len(whole) > len(data)
    elif data.startswith(integrity.PNG_MAGIC):
        data, damage = integrity.checked_png(data)
    with _reasons(), Image.open(io.BytesIO(data), formats=_formats()) as image:
        damage = damage or _damage(image, data)
        if damage:
            raise CorruptImageError(f"OSError: image file is truncated ({damage})" if cut else damage)
        return _decoded(image, data, white_level)


def _damage(image: Image.Image, data: bytes) -> str:
    """What is wrong with the file of an image that has been opened; empty if nothing is found."""
    match image.format:
        case "JPEG" | "MPO":
            return integrity.jpeg_damage(data)
        case "PNG":
            return integrity.png_damage(data)
        case "TIFF":
            tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
            return tiff.tiff_damage(data, tags) or tiff.values_without_meaning(image, tags)
        case "PPM":
            return _ppm_damage(image, data)
    return ""


def _decoded(image: Image.Image, data: bytes, white_level: int | None) -> Photo:
    if damage := palette_damage(image, data):
        raise CorruptImageError(damage)
    more_frames = image.format not in ("JPEG", "MPO") and _has_more_frames(image)  # a camera's MPO holds previews
    deep = _deep_values(image, data, white_level)
    if deep is None:
        return Photo(_to_rgb(ImageOps.exif_transpose(image)), more_frames)
    values, white = deep
    colours = values if values.ndim == 2 else values[..., :3]
    low, high = int(colours.min()), int(colours.max())
    _check_range(low, high, white, white_level)
    return Photo(_scaled(values, white_level or white), more_frames, (low, high, white_level or white))


def photo_size(path: Path) -> tuple[int, int] | None:
    """Width and height in pixels that the header of an image file says; None if it says none.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        with _open(path) as file:
            head = file.read(24)
            # of a PNG Pillow would read the texts, too, and not more than so many
            if head.startswith(integrity.PNG_MAGIC) and head[12:16] == b"IHDR":
                return int.from_bytes(head[16:20]), int.from_bytes(head[20:24])
            file.seek(0)
            with _reasons(), Image.open(file, formats=_formats()) as image:
                return image.size
    except CorruptImageError:
        return None


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


def _read(path: Path, stamp: tuple[int, int] | None) -> bytes:
    with _open(path) as file:
        before = os.fstat(file.fileno())
        if before.st_size > MAX_FILE_BYTES:
            raise CorruptImageError(f"{before.st_size:,} bytes, more than any image has")
        data = file.read(MAX_FILE_BYTES)
        after = os.fstat(file.fileno())
    stamps = {stamp_of(before), stamp_of(after), (len(data), before.st_mtime_ns), stamp or stamp_of(before)}
    if len(stamps) > 1:
        raise OSError(errno.EAGAIN, "changed while it was read; start again", str(path))
    return data


def stamp_of(status: os.stat_result) -> tuple[int, int]:
    """Size in bytes and modification time in ns, by which a file is known to be as it was."""
    return status.st_size, status.st_mtime_ns


def _open(path: Path) -> BinaryIO:
    """Open a regular file; a pipe in its place would be waited for."""
    try:
        return open_regular(path)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise CorruptImageError("a symbolic link that leads to itself") from None
        if error.errno == errno.ENOENT and path.is_symlink():
            raise CorruptImageError(f"a symbolic link to {path.readlink()}, where there is nothing") from None
        if error.errno in (errno.EINVAL, errno.EISDIR):
            raise CorruptImageError("not a regular file") from None
        raise


@contextmanager
def _reasons() -> Iterator[None]:
    """Turn whatever Pillow raises at damaged bytes, and what its libtiff finds wrong, into one line."""
    said: list[str] = []
    try:
        with warnings.catch_warnings(), tiff.libtiff_errors() as said:
            warnings.simplefilter("ignore")  # odd EXIF entries and the like, which thousands of good photos have
            yield
        if said:  # Pillow went on
            raise CorruptImageError(said[0])
    except (CorruptImageError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise CorruptImageError("not an image of a known kind") from error
    except Image.DecompressionBombError as error:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise CorruptImageError(f"more than {most:,} pixels, the most that are decoded; make it smaller") from error
    except Exception as error:  # Pillow's decoders raise anything from SyntaxError to struct.error on damaged bytes
        raise CorruptImageError(*said[:1] or [" ".join(f"{type(error).__name__}: {error}".split())]) from error


@functools.cache
def _formats() -> tuple[str, ...]:
    """The FORMATS that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _has_more_frames(image: Image.Image) -> bool:
    with suppress(Exception):  # a wild pointer to a next page, which says nothing of this one
        return bool(getattr(image, "is_animated", False))
    return False


def _to_rgb(image: Image.Image) -> Pixels:
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        seen = Image.new("RGBA", image.size, "white")
        seen.alpha_composite(image.convert("RGBA"))
        image = seen
    return np.asarray(image.convert("RGB"))


def _deep_values(image: Image.Image, data: bytes, white_level: int | None) -> tuple[Values, int] | None:
    """The values of an image of more than 8 bits, upright, and the largest that they may be; None if it has 8 bits.

    Returns:
        (H, W), (H, W, 3) RGB or (H, W, 4) RGBA; transparency is of 16 bits.
    """
    if image.mode == "F":
        raise CorruptImageError("floating-point pixels, for which no white is defined")
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    bits = max(tags.get(tiff.BITS_PER_SAMPLE, (8,)))
    if image.mode == "I" or image.mode.startswith("I;16"):
        white = (1 << bits) - 1 if 8 < bits < 16 else DEEP_WHITE
        inverted = tags.get(tiff.PHOTOMETRIC) == tiff.WHITE_IS_ZERO
        grey = np.asarray(ImageOps.exif_transpose(image))
        if bits == 16 and tiff.is_signed(tags):
            white = DEEP_WHITE // 2
        if bits == 32 and not tiff.is_signed(tags):
            grey = grey.view(np.uint32)  # Pillow takes them for signed ones
        transparent = grey == image.info.get("transparency")
        if inverted:
            _check_range(int(grey.min()), int(grey.max()), white, white_level)  # as they are stored
            grey = (white_level or white) - grey
        if not transparent.any():
            return grey, white
        return np.dstack([grey, grey, grey, np.where(transparent, 0, DEEP_WHITE)]), white
    maximum = _ppm_maximum(image)
    if max(bits, data[PNG_DEPTH_AT] if image.format == "PNG" else 8) <= 8 and maximum <= 255:
        return None
    return _deep_colours(image, data, maximum or DEEP_WHITE), maximum or DEEP_WHITE


def _ppm_maximum(image: Image.Image) -> int:
    """The white that the header of a PPM or PGM says, if Pillow scales its values by that; 0 if not."""
    tile = image.tile[0] if isinstance(image, PpmImageFile) and image.tile else None
    return int(tile.args[-1]) if tile and tile.codec_name.startswith("ppm") and isinstance(tile.args, tuple) else 0


def _ppm_damage(image: Image.Image, data: bytes) -> str:
    """Whether a PPM or PGM has values beyond its white, which Pillow clips; of plain ones it says so itself."""
    white = _ppm_maximum(image)
    if not white or not isinstance(image, PpmImageFile) or image.tile[0].codec_name != "ppm":
        return ""
    values = data[image.tile[0].offset :][: image.width * image.height * len(image.getbands()) * (1 if white < 256 else 2)]
    size = len(values) if white < 256 else len(values) // 2
    highest = int(np.frombuffer(values, np.uint8 if white < 256 else ">u2", size).max(initial=0))
    return f"values up to {highest:,}, where its header says that white is {white:,}" if highest > white else ""


def _deep_colours(image: Image.Image, data: bytes, white: int) -> Values:
    """The 16-bit colours of an image, upright; Pillow reads their upper 8 bits only."""
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)  # before Pillow decodes, which may remove it
    upper = ImageOps.exif_transpose(image)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    encoded = integrity.png_for_opencv(data) if image.format == "PNG" else data
    found = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_UNCHANGED)  # BGR or BGRA
    if found is None and image.format == "PNG":
        raise CorruptImageError("libpng finds it damaged")
    if found is not None and found.dtype == np.uint16 and found.ndim == 3 and image.mode in ("RGB", "RGBX", "RGBA"):
        transparent = image.mode == "RGBA" or "transparency" in image.info
        values: Values = UPRIGHT.get(orientation, np.asarray)(found[..., [2, 1, 0, 3] if transparent else [2, 1, 0]])
        seen = np.asarray(upper)[..., :3]
        if values.shape[:2] == seen.shape[:2] and np.abs(values[..., :3] * (255 / white) - seen).max() <= 1:
            return values
    pixels = _to_rgb(upper)
    if not pixels.any():
        raise CorruptImageError("black but for the lower half of its 16 bits, which cannot be read; save it with 8 bits")
    return pixels.astype(np.uint16) * np.uint16(DEEP_WHITE // 255)


def _scaled(values: Values, white: int) -> Pixels:
    """Scale (H, W), (H, W, 3) or (H, W, 4) values to (H, W, 3) uint8 RGB; transparent parts become white."""
    levels = values[..., None] if values.ndim == 2 else values[..., :3]
    levels = np.clip(levels * np.float32(255 / white), 0, 255)
    if values.ndim == 3 and values.shape[2] == 4:
        alpha = values[..., 3:] / np.float32(DEEP_WHITE)
        levels = levels * alpha + 255 * (1 - alpha)
    return np.ascontiguousarray(np.broadcast_to(np.rint(levels).astype(np.uint8), (*values.shape[:2], 3)))


def _check_range(low: int, high: int, white: int, asked: int | None) -> None:
    """Refuse values that have another white than `white`, or than the one asked for."""
    if low < 0:
        raise CorruptImageError(f"values from {low:,} to {high:,}: below 0, for which no black is defined; shift them")
    if asked is not None and high > asked:
        raise CorruptImageError(f"values from {low:,} to {high:,}, where --white-level says {asked:,}")
    if asked is None and high > white:
        raise CorruptImageError(
            f"32-bit grey values beyond 16 bits ({low:,} to {high:,}), for which no white is defined; give --white-level"
        )
    if asked is None and 0 < high <= white // NEARLY_BLACK:
        likely = (1 << max(8, high.bit_length())) - 1
        raise CorruptImageError(
            f"values from {low:,} to {high:,}, where white is {white:,}: nearly black; "
            f"give --white-level {likely} if that is white, or --white-level {white} if it is so dark"
        )
