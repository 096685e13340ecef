"""Damage that Pillow passes over without a word: pixels that end early, strips of a TIFF, and what libraries print."""

from __future__ import annotations

import io
import itertools
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.tiff import _lzw_size
from tests.support.image_files import FULL, chunk, decoded, deep_file, encoded, photo, read, reason
from vitpa.data.manifest import Pixels

# ---- PNG

ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def interlaced(pixels: Pixels) -> bytes:
    """An interlaced PNG of (H, W, 3) pixels."""
    height, width = pixels.shape[:2]
    passes = [pixels[y::down, x::across] for x, y, across, down in ADAM7]
    rows = b"".join(b"\0" + row.tobytes() for each in passes if each.shape[1] for row in each)
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def with_stream(data: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """A PNG with another stream of pixels, and right CRCs."""
    chunks, at = [], 8
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4])
        chunks.append((data[at + 4 : at + 8], data[at + 8 : end - 4]))
        at = end
    stream = change(b"".join(body for kind, body in chunks if kind == b"IDAT"))
    before = b"".join(chunk(kind, body) for kind, body in chunks if kind not in (b"IDAT", b"IEND"))
    return data[:8] + before + chunk(b"IDAT", stream) + chunk(b"IEND", b"")


PNGS = {
    "rgb": encoded(photo(), "PNG"),
    "rgba": encoded(photo().convert("RGBA"), "PNG"),
    "palette": encoded(photo().quantize(64), "PNG"),
    "palette of 2 bits": encoded(photo(43, 30).quantize(4), "PNG", bits=2),
    "black and white": encoded(photo(43, 30).convert("1"), "PNG"),
    "interlaced": interlaced(np.asarray(photo(43, 30))),
    "interlaced, of 3 x 1": interlaced(np.asarray(photo(3, 1))),
    **{f"deep {kind}": deep_file(kind, FULL) for kind in ("grey png", "rgb png", "la png", "rgba png")},
}


@pytest.mark.parametrize("kind", PNGS)
def test_a_png_whose_pixels_are_fewer_or_more_is_corrupt(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = PNGS[kind]
    whole = read(data, tmp_path)
    if not kind.startswith("deep"):
        np.testing.assert_array_equal(whole, decoded(data))
    needed = len(zlib.decompress(with_stream(data, lambda stream: stream).split(b"IDAT")[1][:-16]))
    for size in (needed // 2, needed - 1, 0):
        said = reason(with_stream(data, lambda stream: zlib.compress(zlib.decompress(stream)[:size])), tmp_path)  # noqa: B023
        assert said == f"{size:,} bytes of pixels, not {needed:,}"
        assert reason(with_stream(data, lambda stream: stream[: len(stream) // 2]), tmp_path).endswith(f"not {needed:,}")
    assert "more than" in reason(with_stream(data, lambda stream: zlib.compress(zlib.decompress(stream) + b"x")), tmp_path)
    assert "incorrect data check" in reason(with_stream(data, lambda stream: stream[:-4] + b"abcd"), tmp_path)
    for harmless in (lambda stream: stream[:-4], lambda stream: stream + b"padding"):
        np.testing.assert_array_equal(read(with_stream(data, harmless), tmp_path), whole)
    assert capfd.readouterr().err == ""  # libpng's warnings


# ---- TIFF


def tags_of(data: bytes) -> dict[int, tuple[int, int, int]]:
    """Of each tag of a little-endian TIFF where its entry is, its type and its count."""
    (begin,) = struct.unpack("<I", data[4:8])
    entries = (begin + 2 + 12 * index for index in range(struct.unpack("<H", data[begin : begin + 2])[0]))
    return {struct.unpack("<H", data[at : at + 2])[0]: (at, *struct.unpack("<HI", data[at + 2 : at + 8])) for at in entries}


def put(data: bytes, tag: int, index: int, value: int) -> bytes:
    """The TIFF with another value of a tag."""
    at, kind, count = tags_of(data)[tag]
    size, form = {3: (2, "<H"), 4: (4, "<I")}[kind]
    base = at + 8 if count * size <= 4 else struct.unpack("<I", data[at + 8 : at + 12])[0]
    changed = bytearray(data)
    struct.pack_into(form, changed, base + size * index, value)
    return bytes(changed)


def strip_of(data: bytes, index: int) -> bytes:
    with Image.open(io.BytesIO(data)) as image:
        tags: Any = getattr(image, "tag_v2", {})
        return data[tags[273][index] :][: tags[279][index]]


def with_strip(data: bytes, index: int, strip: bytes) -> bytes:
    """The TIFF with another strip, which is put at its end."""
    return put(put(data + strip, 273, index, len(data)), 279, index, len(strip))


COMPRESSIONS = {"none": None, "deflate": "tiff_adobe_deflate", "old deflate": "tiff_deflate", "packbits": "packbits"}
COMPRESSIONS |= {"lzw": "tiff_lzw"}
MODES: dict[str, tuple[Image.Image, dict[int, int]]] = {
    "RGB": (photo(), {}),
    "RGB, predicted": (photo(), {317: 2}),
    "grey": (photo(43, 30).convert("L"), {}),
    "black and white": (photo(43, 30).convert("1"), {}),
    "16 bits": (Image.fromarray(FULL[..., 0]), {}),
    "CMYK": (photo(43, 30).convert("CMYK"), {}),
    "YCbCr": (photo(43, 30).convert("YCbCr"), {}),
    "palette": (photo(43, 30).quantize(64), {}),
}


def tiff_of(compression: str, mode: str = "RGB", rows: int = 16) -> bytes:
    """A TIFF with so many rows in a strip; its last strip has fewer."""
    image, more = MODES[mode]
    name = COMPRESSIONS[compression]
    if name in (None, "packbits"):
        more = {}
    return encoded(image, "TIFF", tiffinfo={278: rows, **more}, **({"compression": name} if name else {}))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_whole_tiff_is_taken(compression: str, mode: str, tmp_path: Path) -> None:
    for rows in (7, 16, 10_000):
        data = tiff_of(compression, mode, rows)
        pixels = read(data, tmp_path)
        if mode != "16 bits":
            np.testing.assert_array_equal(pixels, decoded(data))


@pytest.mark.parametrize("compression", ["deflate", "old deflate"])
def test_a_flipped_bit_in_a_deflated_tiff_is_corrupt(
    compression: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data, generator = tiff_of(compression), random.Random(0)
    for _ in range(100):
        index = generator.randrange(8)
        strip = bytearray(strip_of(data, index))
        strip[generator.randrange(len(strip))] ^= 1 << generator.randrange(8)
        assert reason(with_strip(data, index, bytes(strip)), tmp_path).startswith(f"strip {index}: ")
    whole = strip_of(data, 3)
    assert reason(with_strip(data, 3, whole[:-2]), tmp_path) == "strip 3: cut before its checksum"
    short = zlib.compress(zlib.decompress(whole)[:-480])
    assert reason(with_strip(data, 3, short), tmp_path) == "strip 3: 7,200 bytes of pixels, not 7,680"
    assert capfd.readouterr().err == ""


def packed(pixels: bytes) -> bytes:
    return b"".join(bytes([len(part := pixels[at : at + 100]) - 1]) + part for at in range(0, len(pixels), 100))


@pytest.mark.parametrize("compression", ["packbits", "lzw", "none"])
def test_a_strip_of_fewer_or_more_pixels_is_corrupt(
    compression: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def strip(size: int) -> bytes:
        """A strip that decompresses to so many bytes."""
        if compression != "lzw":
            return bytes(size) if compression == "none" else packed(bytes(size))
        image = Image.fromarray(np.random.default_rng(0).integers(0, 9, (1, size), np.uint8))
        return strip_of(encoded(image, "TIFF", compression="tiff_lzw"), 0)

    data = tiff_of(compression)
    for index, needed in ((0, 7680), (3, 7680), (7, 3840)):
        read(with_strip(data, index, strip(needed)), tmp_path)
        read(with_strip(data, index, strip(7680)), tmp_path)  # as some programs write the last one, too
        for size in (needed // 2, needed - 1):
            expected = f"strip {index}: {size:,} bytes of pixels, not {needed:,}"
            assert reason(with_strip(data, index, strip(size)) + bytes(8000), tmp_path) == expected
        if compression != "none":
            assert "more than 7,680 bytes" in reason(with_strip(data, index, strip(7681)), tmp_path)
    assert capfd.readouterr().err == ""  # libtiff's errors


def test_a_damaged_length_in_packbits_is_corrupt(tmp_path: Path) -> None:
    data = tiff_of("packbits")
    strip = bytearray(strip_of(data, 2))
    strip[strip[0] + 2] ^= 1  # the second run has a byte more or less; libtiff finds all pixels, in other places
    assert "bytes of pixels, not 7,680" in reason(with_strip(data, 2, bytes(strip)), tmp_path)
    assert reason(with_strip(data, 2, packed(bytes(7680))[:-5]), tmp_path) == "strip 2: 7,675 bytes of pixels, not 7,680"
    read(with_strip(data, 2, packed(bytes(7680)) + b"\0"), tmp_path)  # padding


def slow_lzw_size(strip: bytes) -> int:
    """The slow, obvious reference: code for code, as in TIFF 6.0, section 13."""
    bits, at, size = f"{int.from_bytes(strip):0{8 * len(strip)}b}", 0, 0
    lengths: list[int] = [1] * 258
    before = 0  # length of the string before; 0: the next code is the first
    while True:
        width = 9 + (len(lengths) >= 511) + (len(lengths) >= 1023) + (len(lengths) >= 2047)
        if at + width > len(bits):
            return size
        code, at = int(bits[at : at + width], 2), at + width
        if code == 256:
            lengths, before = [1] * 258, 0
            continue
        if code == 257 or code > len(lengths) - (not before) or (not before and code > 255):
            return size
        if before:
            lengths.append(before + 1)
        before = lengths[code]
        size += before


def test_the_size_of_lzw_is_that_of_a_slow_reference() -> None:
    generator = random.Random(0)
    for seed in range(12):
        image = photo(generator.randint(1, 90), generator.randint(1, 90), seed)
        image = image if seed % 3 else Image.new("RGB", image.size)
        strip = strip_of(encoded(image, "TIFF", compression="tiff_lzw", tiffinfo={278: 1000}), 0)
        assert _lzw_size(strip, 1 << 30) == slow_lzw_size(strip) == 3 * image.size[0] * image.size[1]
        for _ in range(10):
            damaged = bytearray(strip[: generator.choice([len(strip), generator.randint(0, len(strip))])] or b"\x80")
            damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
            assert _lzw_size(bytes(damaged), 1 << 30) == slow_lzw_size(bytes(damaged))


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_strips_that_are_not_there_are_named(compression: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = tiff_of(compression)
    for offset, index in itertools.product((0, 4, len(data) - 1, 1 << 30), (0, 7)):
        assert reason(put(data, 273, index, offset), tmp_path) == f"strip {index} is not within the file"
    fewer = bytearray(data)
    for tag in (273, 279):
        struct.pack_into("<I", fewer, tags_of(data)[tag][0] + 4, 5)
    assert reason(bytes(fewer), tmp_path) == "5 of its 8 strips"
    assert capfd.readouterr().err == ""


def test_what_libtiff_says_is_the_finding_and_not_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Of CCITT's codes Pillow takes no notice, and of the others it says `decoder error -2`."""
    grey = photo().convert("1")
    data = encoded(grey, "TIFF", compression="group3")
    np.testing.assert_array_equal(read(data, tmp_path), decoded(data))
    strip = strip_of(data, 0)
    assert "Bad code word at line 78" in reason(with_strip(data, 0, strip[: len(strip) // 2]), tmp_path)
    data = encoded(photo(), "TIFF", compression="zstd")
    assert "Not enough data at scanline 0" in reason(with_strip(data, 0, strip_of(data, 0)[:-3]), tmp_path)
    assert capfd.readouterr().err == ""


def test_a_bmp_whose_pixels_begin_within_its_header_is_corrupt(tmp_path: Path) -> None:
    data = encoded(photo(), "BMP")
    np.testing.assert_array_equal(read(data, tmp_path), np.asarray(photo()))
    for begin in (10, 14, 53):
        assert reason(data[:10] + struct.pack("<I", begin) + data[14:], tmp_path) == "its pixels begin within its header"


# ---- PPM


@pytest.mark.parametrize("white", [100, 1000])
@pytest.mark.parametrize("kind", ["P5", "P6"])
def test_values_beyond_the_white_of_a_ppm_are_corrupt(kind: str, white: int, tmp_path: Path) -> None:
    form = np.uint8 if white < 256 else ">u2"
    values = np.linspace(0, white, 4 * 3 * (1 if kind == "P5" else 3)).astype(form)
    head = f"{kind} 4 3 {white} ".encode()
    found = read(head + values.tobytes() + b"\xff\xff", tmp_path)
    assert found[0, 0, 0] == 0 and found[-1, -1, -1] == 255
    values[5] = white + 1
    said = f"values up to {white + 1:,}, where its header says that white is {white:,}"
    assert reason(head + values.tobytes(), tmp_path) == said


def test_a_plain_pbm_is_taken(tmp_path: Path) -> None:
    assert read(b"P1\n3 2\n1 0 1\n0 1 0\n", tmp_path)[..., 0].tolist() == [[0, 255, 0], [255, 0, 255]]


def test_a_png_that_does_not_begin_with_its_header_is_named(tmp_path: Path) -> None:
    data = encoded(photo(), "PNG")
    assert "CgBI" in reason(data[:8] + chunk(b"CgBI", b"\x50\0\x20\2") + data[8:], tmp_path)
    assert "begins with a chunk tEXt" in reason(data[:8] + chunk(b"tEXt", b"a\0x") + data[8:], tmp_path)
