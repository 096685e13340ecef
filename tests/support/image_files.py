"""Image files of many kinds, whole and byte by byte, and what prep makes of them."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from data_prep.images import CorruptImageError, load_photo
from vitpa.data.manifest import Pixels


def photo(width: int = 160, height: int = 120, seed: int = 0) -> Image.Image:
    """A coloured picture with noise, so that its codes are many."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray(np.clip(smooth + generator.integers(-20, 21, smooth.shape), 0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(data: bytes) -> Pixels:
    """What Pillow alone makes of it."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def read_photo(path: Path, white_level: int | None = None) -> Pixels:
    return load_photo(path, white_level).pixels


def read(data: bytes, folder: Path, white_level: int | None = None) -> Pixels:
    path = folder / "photo"
    path.write_bytes(data)
    return read_photo(path, white_level)


def reason(data: bytes, folder: Path, white_level: int | None = None) -> str:
    with pytest.raises(CorruptImageError) as caught:
        read(data, folder, white_level)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(values: Any, colours: int, *chunks: bytes) -> bytes:
    """A PNG of 16 bits by hand; `colours`: 0 grey, 2 RGB, 4 grey and alpha, 6 RGBA."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, colours, 0, 0, 0)
    body = chunk(b"IHDR", head) + b"".join(chunks) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


FULL = (np.arange(40 * 30 * 4) * 6553 % 65536).reshape(30, 40, 4).astype(np.uint16)


def deep_file(kind: str, values: npt.NDArray[np.uint16]) -> bytes:
    """A file of 16 bits with these values."""
    if kind == "grey tif":
        return encoded(Image.fromarray(values[..., 0]), "TIFF")
    if kind == "grey pgm":
        return b"P5 40 30 65535 " + values[..., 0].astype(">u2").tobytes()
    if kind == "rgb ppm":
        return b"P6 40 30 65535 " + values[..., :3].astype(">u2").tobytes()
    if kind == "rgb tif":
        _, array = cv2.imencode(".tiff", values[..., 2::-1])
        return bytes(array)
    colours = {"grey png": 0, "rgb png": 2, "la png": 4, "rgba png": 6}[kind]
    opaque = values.copy()
    opaque[..., 1 if colours == 4 else 3] = 65535
    return png(opaque[..., : {0: 1, 2: 3, 4: 2, 6: 4}[colours]], colours)
