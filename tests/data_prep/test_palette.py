"""Palettes that have no colour for some pixels, which Pillow makes black."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.image_files import chunk, decoded, encoded, photo, read, reason

COLOURS = np.random.default_rng(0).integers(60, 250, (256, 3), np.uint8)


def indices(bits: int, colours: int) -> bytes:
    """16 rows of 32 indices of so many bits, packed; the highest is that of the last colour."""
    values = np.arange(512).reshape(16, 32) % colours
    return np.packbits((values[..., None] >> np.arange(bits)[::-1] & 1).astype(np.uint8)).tobytes()


def png(bits: int, pixels: bytes, palette: bytes | None) -> bytes:
    rows = b"".join(b"\0" + pixels[at : at + 4 * bits] for at in range(0, len(pixels), 4 * bits))
    table = b"" if palette is None else chunk(b"PLTE", palette)
    body = chunk(b"IHDR", struct.pack(">IIBBBBB", 32, 16, bits, 3, 0, 0, 0)) + table + chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def bmp(bits: int, pixels: bytes, colours: bytes, said: int | None = None, begin: int | None = None) -> bytes:
    """A BMP; `colours`: three bytes each; `said`: how many its header says; `begin`: where it says that the pixels do."""
    count = len(colours) // 3
    table = b"".join(colours[at : at + 3] + b"\0" for at in range(0, len(colours), 3))
    at = 54 + len(table) if begin is None else begin
    head = struct.pack("<IiiHHIIiiII", 40, 32, 16, 1, bits, 0, len(pixels), 0, 0, count if said is None else said, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(table) + len(pixels), 0, 0, at) + head + table + pixels


def tiff(bits: int, pixels: bytes, colours: bytes) -> bytes:
    """A TIFF whose ColorMap has these colours, three bytes each."""
    planes = np.frombuffer(colours, np.uint8).reshape(-1, 3).T.astype("<u2") * 257
    at = 8 + len(pixels)
    tags = {256: 32, 257: 16, 258: bits, 259: 1, 262: 3, 273: 8, 277: 1, 278: 16, 279: len(pixels)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    entries += struct.pack("<HHII", 320, 3, planes.size, at + 2 + 12 * 10 + 4)
    return b"II*\0" + struct.pack("<I", at) + pixels + struct.pack("<H", 10) + entries + bytes(4) + planes.tobytes()


@pytest.mark.parametrize("kind", ["png", "bmp", "tiff"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_pixel_beyond_the_palette_is_corrupt(kind: str, bits: int, tmp_path: Path) -> None:
    if (kind, bits) == ("bmp", 2):
        return
    makers: dict[str, Callable[..., bytes]] = {"png": png, "bmp": bmp, "tiff": tiff}
    most, make = 1 << bits, makers[kind]
    whole = make(bits, indices(bits, most), COLOURS[:most].tobytes())
    np.testing.assert_array_equal(read(whole, tmp_path), decoded(whole))
    fewer = max(1, most - 3)
    enough = make(bits, indices(bits, fewer), COLOURS[:fewer].tobytes())
    np.testing.assert_array_equal(read(enough, tmp_path), decoded(enough))
    said = reason(make(bits, indices(bits, most), COLOURS[:fewer].tobytes()), tmp_path)
    assert said == f"a pixel of colour {most - 1}, where its palette has {fewer} (0 to {fewer - 1})"


def test_a_png_without_a_whole_palette_is_corrupt(tmp_path: Path) -> None:
    assert "it has no palette" in reason(png(8, indices(8, 4), None), tmp_path)
    assert reason(png(8, indices(8, 3), bytes(10)), tmp_path) == "its palette has 10 values, not three for each colour"


def test_a_bmp_whose_palette_is_cut_or_of_greys_only(tmp_path: Path) -> None:
    """Pillow takes pixels for colours, and reads indices of other sizes than there are."""
    cut = bmp(8, indices(8, 256), COLOURS[:9].tobytes(), said=0)
    assert reason(cut, tmp_path) == "its pixels begin within its palette"
    for count in (4, 255):
        greys = np.repeat(np.arange(count, dtype=np.uint8), 3).tobytes()
        assert f"a pixel of colour 255, where its palette has {count}" in reason(bmp(8, indices(8, 256), greys), tmp_path)
    greys = np.repeat(np.arange(16, dtype=np.uint8), 3).tobytes()
    assert "a palette of 16 greys for 4 bits" in reason(bmp(4, indices(4, 16), greys), tmp_path)
    assert "a palette of 2 greys for 8 bits" in reason(bmp(8, indices(8, 2), b"\0\0\0\xff\xff\xff"), tmp_path)
    black_white = encoded(photo(32, 16).convert("1"), "BMP")
    np.testing.assert_array_equal(read(black_white, tmp_path), decoded(black_white))
    grey = encoded(photo(32, 16).convert("L"), "BMP")
    np.testing.assert_array_equal(read(grey, tmp_path), decoded(grey))


def with_table(data: bytes, count: int | None) -> bytes:
    """A GIF of Pillow's with another global table of colours, of so many; None for no table."""
    table = 13 + 3 * (2 << (data[10] & 7))
    flags = data[10] & 0x78 if count is None else data[10] & 0x78 | 0x80 | (count.bit_length() - 2)
    return data[:10] + bytes([flags]) + data[11:13] + COLOURS[: count or 0].tobytes() + data[table:]


def test_a_gif_whose_table_is_short_or_missing_is_corrupt(tmp_path: Path) -> None:
    image = Image.fromarray(np.arange(512, dtype=np.uint8).reshape(16, 32) % 64, "P")
    image.putpalette(COLOURS.tobytes())
    data = encoded(image, "GIF", optimize=False)
    for count in (256, 64):
        whole = with_table(data, count)
        np.testing.assert_array_equal(read(whole, tmp_path), COLOURS[np.asarray(image)])
    for count in (32, 2):
        said = reason(with_table(data, count), tmp_path)
        assert said == f"a pixel of colour 63, where its palette has {count} (0 to {count - 1})"
    assert "it has no palette" in reason(with_table(data, None), tmp_path)
    local = with_table(data, None)
    at = local.index(b",\0\0\0\0\x20\0\x10\0") + 9
    local = local[:at] + bytes([local[at] | 0x85]) + COLOURS[:64].tobytes() + local[at + 1 :]  # a table of the frame's own
    np.testing.assert_array_equal(read(local, tmp_path), COLOURS[np.asarray(image)])


def test_a_transparent_pixel_needs_no_colour(tmp_path: Path) -> None:
    image = Image.fromarray(np.arange(512, dtype=np.uint8).reshape(16, 32) % 64, "P")
    image.putpalette(COLOURS.tobytes())
    data = with_table(encoded(image, "GIF", optimize=False, transparency=63, comment=b"with two" * 60), 64)
    wanted = np.where((np.asarray(image) == 63)[..., None], 255, COLOURS[np.asarray(image)])
    np.testing.assert_array_equal(read(data, tmp_path), wanted)
    last = np.minimum(np.asarray(image), 32)
    short = Image.fromarray(np.where(np.asarray(image) == 63, 63, last % 32).astype(np.uint8), "P")
    short.putpalette(COLOURS.tobytes())
    data = with_table(encoded(short, "GIF", optimize=False, transparency=63), 32)
    with Image.open(io.BytesIO(data)) as opened:
        assert np.asarray(opened).max() == 63
    assert (read(data, tmp_path)[np.asarray(short) == 63] == 255).all()
