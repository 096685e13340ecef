"""Whether the strips or tiles of a TIFF are whole, what libtiff says of them, and whether its values are an image's.

libtiff stops as soon as a strip has all its pixels. Whether the checksum behind them is right it does not look, nor whether
they were more than that because a code was damaged. Pillow takes no notice of some of its errors. Format: TIFF 6.0.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, _imaging

from data_prep.integrity import WARNINGS, inflated, jpeg_damage, wrong_size
from vitpa.data.manifest import Ints, Pixels

WIDTH, HEIGHT, BITS_PER_SAMPLE, COMPRESSION, PHOTOMETRIC, FILL_ORDER = 256, 257, 258, 259, 262, 266  # tags
SAMPLES_PER_PIXEL, ROWS_PER_STRIP, PLANAR, COLOR_MAP, SAMPLE_FORMAT, NEW_SUBFILE_TYPE = 277, 278, 284, 320, 339, 254
TILE_WIDTH, TILE_HEIGHT, JPEG_TABLES, SUBSAMPLING = 322, 323, 347, 530
STRIPS, STRIP_SIZES, TILES, TILE_SIZES = 273, 279, 324, 325
NONE, LZW, OLD_JPEG, JPEG, DEFLATE, PACK_BITS = 1, 5, 6, 7, (8, 32946), 32773  # kinds of compression
YCBCR, SEPARATE, LOW_BIT_FIRST, WHITE_IS_ZERO, SIGNED = 6, 2, 2, 0, 2  # other values
DEEP_WHITE = 0xFFFF  # of 16-bit values
NEARLY_BLACK = 4  # values that do not go beyond white divided by this had another white in mind
HEADER_BYTES = 8
REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))

CLEAR, END, FIRST = 256, 257, 258  # codes of LZW: bytes up to CLEAR, strings from FIRST on
MAX_CODES = 4096 + 1024 - FIRST  # between two CLEAR: the table is full, and libtiff takes so many more


@dataclass(frozen=True)
class _Piece:
    """A strip or a tile; sizes in bytes."""

    name: str  # such as `strip 3`
    offset: int  # in the file
    size: int | None  # as it is compressed; None if the file does not say
    needed: int  # what its pixels take when decompressed
    full: int  # the same of a strip with all its rows, as some programs write the last one, too


def tiff_damage(data: bytes, tags: Mapping[int, Any]) -> str:
    """What is wrong with the strips or tiles of a TIFF, all of whose bytes are `data`; empty if nothing is found."""
    compression = tags.get(COMPRESSION, NONE)
    if not {STRIPS, TILES} & {*tags} or compression == OLD_JPEG:  # the latter has another table
        return ""
    count, pieces = _pieces(tags)
    for piece in pieces:
        size = piece.needed if compression == NONE else piece.size
        if piece.offset < HEADER_BYTES or piece.offset + max(size or 0, 1) > len(data):
            return f"{piece.name} is not within the file"
        strip = data[piece.offset :] if piece.size is None else data[piece.offset : piece.offset + piece.size]
        if compression == JPEG:
            tables = tags.get(JPEG_TABLES, b"")  # they end with EOI, the strip begins with SOI
            damage = jpeg_damage(tables[:-2] + strip[2:] if tables else strip)
            damage = damage if damage.startswith(WARNINGS) else ""  # the rest are of colours, which are TIFF's to say
        else:
            damage = _damage(strip.translate(REVERSED) if tags.get(FILL_ORDER) == LOW_BIT_FIRST else strip, compression, piece)
        if damage:
            return f"{piece.name}: {damage}"
    return f"{len(pieces)} of its {count} strips" if len(pieces) < count else ""


def values_without_meaning(image: Image.Image, tags: Mapping[int, Any]) -> str:
    """Why the values of a sound TIFF make no image; empty if they do."""
    bits = max(tags.get(BITS_PER_SAMPLE, (8,)))
    if tags.get(NEW_SUBFILE_TYPE, 0) & 1:
        return "its first page is a preview of reduced size; save the page of full size alone"
    if is_signed(tags) and bits <= 8:
        return f"signed values of {bits} bits, for which no black is defined; save them unsigned"
    map_white = max(tags.get(COLOR_MAP, (DEEP_WHITE,)))
    if 0 < map_white <= DEEP_WHITE // NEARLY_BLACK:
        return f"a palette with values up to {map_white:,}, where white is {DEEP_WHITE:,}: nearly black; save it with 16 bits"
    if image.mode == "CMYK" and bits > 8 and 0 < np.asarray(image).max() <= 255 // NEARLY_BLACK:
        return f"CMYK values of {bits} bits that stay in their lower part: nearly no ink; save it with 8 bits"
    return ""


def is_signed(tags: Mapping[int, Any]) -> bool:
    """Whether the values are signed."""
    return bool(max(tags.get(SAMPLE_FORMAT, (1,))) == SIGNED)


def _pieces(tags: Mapping[int, Any]) -> tuple[int, list[_Piece]]:
    """How many strips or tiles there should be, and those that there are."""
    width, height, planar = tags[WIDTH], tags[HEIGHT], tags.get(PLANAR) == SEPARATE
    if TILES in tags:
        name, offsets, sizes = "tile", tags[TILES], tags.get(TILE_SIZES, ())
        rows, across = tags[TILE_HEIGHT], math.ceil(width / tags[TILE_WIDTH])
        width = tags[TILE_WIDTH]
    else:
        name, offsets, sizes = "strip", tags[STRIPS], tags.get(STRIP_SIZES, ())
        rows, across = min(tags.get(ROWS_PER_STRIP) or height, height), 1
    in_plane = across * math.ceil(height / rows)
    count = in_plane * (tags.get(SAMPLES_PER_PIXEL, 1) if planar else 1)
    full = _decoded_size(tags, width, rows)
    last = full if TILES in tags else _decoded_size(tags, width, height - (in_plane - 1) * rows)
    pieces = []
    for number, offset in enumerate(offsets[:count]):
        size = sizes[number] if number < len(sizes) and (sizes[number] or count > 1) else None  # 0 of one: to the end
        needed = last if number % in_plane == in_plane - 1 else full
        pieces.append(_Piece(f"{name} {number}", offset, size, needed, full))
    return count, pieces


def _decoded_size(tags: Mapping[int, Any], width: int, rows: int) -> int:
    """What pixels take in a strip or tile when decompressed, bytes."""
    bits, samples = int(tags.get(BITS_PER_SAMPLE, (1,))[0]), int(tags.get(SAMPLES_PER_PIXEL, 1))
    if tags.get(PLANAR) == SEPARATE:
        samples = 1
    elif tags.get(PHOTOMETRIC) == YCBCR and samples == 3:
        across, down = map(int, tags.get(SUBSAMPLING, (2, 2)))
        return math.ceil(math.ceil(width / across) * (across * down + 2) * bits / 8) * math.ceil(rows / down)
    return math.ceil(width * bits * samples / 8) * rows


def _damage(strip: bytes, compression: int, piece: _Piece) -> str:
    damage = ""
    if compression == NONE:
        size = min(len(strip), piece.needed)
    elif compression in DEFLATE:
        size, damage = inflated(strip, piece.full)
    elif compression == PACK_BITS:
        size = _unpacked_size(strip)
    elif compression == LZW and strip[:1] != b"\0":  # an older LZW begins with that
        size = _lzw_size(strip, piece.full)
    else:
        return ""
    return damage or wrong_size(size, piece.needed, piece.full)


def _unpacked_size(strip: bytes) -> int:
    """What PackBits decompress to, bytes; one byte more at the end is padding."""
    at = size = 0
    while at + 1 < len(strip):
        head = strip[at]
        size += head + 1 if head < 128 else 257 - head if head > 128 else 0
        at += head + 2 if head < 128 else 2 if head > 128 else 1
    return size - max(0, at - len(strip))  # of the last run some bytes are missing


def _lzw_size(strip: bytes, most: int) -> int:
    """What LZW decompresses to, bytes, up to a code that cannot be; if it is more than `most`, it may be less than all."""
    padded = np.frombuffer(strip + bytes(2), np.uint8)
    strings = FIRST + np.arange(MAX_CODES)  # the one that each code brings, which it may itself be the first to stand for
    strings[0] = CLEAR  # but the first code stands for a byte
    size = at = 0
    while size <= most:
        codes = _codes(padded, at)
        stops = np.flatnonzero((codes == CLEAR) | (codes == END) | (codes >= strings[: len(codes)]))
        stop = int(stops[0]) if stops.size else len(codes)
        size += _strings_size(codes[:stop])
        if not stops.size or codes[stop] != CLEAR or (at and stop == 0):  # one CLEAR after another might take for ever
            break
        at += int(_code_starts()[stop + 1])
    return size


@functools.cache
def _code_starts() -> Ints:
    """Where after a CLEAR each code begins, bits: it is 9 bits long, and longer the longer the table of strings is."""
    entries = np.maximum(FIRST, FIRST - 1 + np.arange(MAX_CODES))  # when the code is read
    lengths = 9 + (entries >= 511).astype(np.int64) + (entries >= 1023) + (entries >= 2047)
    return np.concatenate([[0], np.cumsum(lengths)])


def _codes(padded: Pixels, at: int) -> Ints:
    """The codes from the bit `at` on, as many as there may be up to the next CLEAR; `padded`: with two bytes more."""
    starts = at + _code_starts()
    starts = starts[: np.searchsorted(starts, 8 * (len(padded) - 2), side="right")]
    first, lengths = starts[:-1] >> 3, np.diff(starts)
    three = padded[first].astype(np.int64) << 16 | padded[first + 1].astype(np.int64) << 8 | padded[first + 2]
    codes: Ints = three >> (24 - (starts[:-1] & 7) - lengths) & ((1 << lengths) - 1)
    return codes


def _strings_size(codes: Ints) -> int:
    """How many bytes the codes since a CLEAR stand for.

    Code k > 0 brings string FIRST + k - 1: that of code k - 1, and a byte.
    """
    none = len(codes)  # stands for no code, of no bytes
    sizes = np.append(np.ones(none, np.int64), 0)
    prefix = np.append(np.where(codes < FIRST, none, codes - FIRST), none)  # the code whose string it makes longer
    while (prefix < none).any():  # sums along the chains of prefixes, whose steps double
        sizes, prefix = sizes + sizes[prefix], prefix[prefix]
    return int(sizes.sum())


_Handler = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)


@contextmanager
def libtiff_errors() -> Iterator[list[str]]:
    """The first error that Pillow's libtiff has, which it would otherwise print on stderr; none if there are none.

    The handler of errors is the process's, so that this is for one thread at a time.
    """
    said: list[str] = []

    def take(module: bytes | None, form: bytes, arguments: int | None) -> None:
        text = ctypes.create_string_buffer(300)
        ctypes.CDLL(None).vsnprintf(text, ctypes.c_size_t(len(text)), ctypes.c_char_p(form), ctypes.c_void_p(arguments))
        if not said:
            said.append(" ".join(text.value.decode(errors="replace").split()))

    set_handler = _set_error_handler()
    handler = _Handler(take)  # to be kept as long as it may be called
    before = set_handler(ctypes.cast(handler, ctypes.c_void_p)) if set_handler else None
    try:
        yield said
    finally:
        if set_handler:
            set_handler(before)


@functools.cache
def _set_error_handler() -> Callable[[object], object] | None:
    """TIFFSetErrorHandler of the libtiff that Pillow is linked with; None if it shows none."""
    try:
        function = ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler
    except (AttributeError, OSError):
        return None
    function.restype, function.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    return function
