"""What the headers of JPEGs say, as the tables that vitpa/kernels/jpeg.py decodes with.

FFCV writes all of a .beton's JPEGs through one encoder, so their headers differ in height and width only: each kind of
header is read once. Kinds that the kernels cannot decode are left to the CPU. Format: ITU-T T.81, annex B.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vitpa.data.augment.crop_boxes import Crops
from vitpa.data.manifest import Ints, Pixels

SHORT_BITS = 11  # of a code are looked up first
LONG_BITS = 5  # the rest of longer ones
MAX_LONG = 162  # tables for that: no more than there are codes
TABLE = (1 << SHORT_BITS) + (MAX_LONG << LONG_BITS)  # entries
IS_LONG = 0x4000

END = b"\xff\xd9"  # end of image
LONGEST = 4096  # bytes of a header that are looked at
SOF0, DHT, SOS, DQT = 0xC0, 0xC4, 0xDA, 0xDB
HARMLESS = {*range(0xE0, 0xEE), 0xEF, 0xFE}  # JFIF, application data but Adobe's (0xEE: what the colours are), comments
COMPONENTS = ((1, 0x22), (2, 0x11), (3, 0x11))  # Y, Cb, Cr: their numbers, and how many samples in how many pixels

BLOCK = 64  # samples
SEGMENT = 8  # MCUs of a row, which has an MCU for 16 x 16 pixels
MAX_BYTES = 1 << 25  # of a JPEG: where a segment begins is kept in 28 bits

# where the k-th coefficient of a block lies in 8 x 8, row by row (T.81, figure 5)
ZIGZAG = np.array(sorted(range(64), key=lambda at: (s := at // 8 + at % 8, at // 8 if s % 2 else at % 8)))


@dataclass(frozen=True)
class Header:
    """A kind of header."""

    before: bytes  # its bytes up to height and width
    after: bytes  # its bytes after them, up to the first code
    # (2, 2, TABLE) int16: of luma and chroma the codes of DC and of AC coefficients, see `code_table`
    codes: npt.NDArray[np.int16]
    # (2, 64) int32: of luma and chroma what each coefficient is multiplied by, and 2^16 times its place in the block, column
    # by column
    factors: npt.NDArray[np.int32]

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.before) + 4 + len(self.after)


class Headers:
    """The kinds of headers that have been met, up to `most`."""

    def __init__(self, most: int):
        self.most = most
        self.known: list[Header] = []  # grows only
        self.lock = threading.Lock()

    def find(self, jpeg: Pixels, height: int, width: int) -> int | None:
        """The number of a JPEG's kind of header in `known`; None if the kernels cannot decode it.

        It has to have that height and width, pixels.
        """
        head, end = jpeg[:LONGEST].tobytes(), jpeg[-2:].tobytes()
        if len(jpeg) > MAX_BYTES:
            return None
        size = height.to_bytes(2, "big") + width.to_bytes(2, "big")
        for number, kind in enumerate(self.known):
            at = len(kind.before)
            if head.startswith(kind.before) and head.startswith(kind.after, at + 4):
                return number if head.startswith(size, at) and end == END else None
        return self.find(jpeg, height, width) if self._add(head) else None

    def _add(self, head: bytes) -> bool:
        """Read a header; False if the kernels cannot decode what it heads, or there are too many kinds."""
        kind = read_header(head)
        with self.lock:
            if kind is None:
                return False
            if not any((kind.before, kind.after) == (each.before, each.after) for each in self.known):  # of another thread
                if len(self.known) == self.most:
                    return False
                self.known.append(kind)
        return True


class _UnusualError(Exception):
    """The kernels cannot decode this, or libjpeg would not."""


def read_header(head: bytes) -> Header | None:
    """What the first bytes of a JPEG say; None unless it is a baseline JPEG in YCbCr 4:2:0 with all in one scan."""
    try:
        return _read_header(head)
    except _UnusualError:
        return None


def _read_header(head: bytes) -> Header | None:
    if not head.startswith(b"\xff\xd8"):
        return None
    quantisation: dict[int, Ints] = {}
    huffman: dict[int, npt.NDArray[np.int16]] = {}
    frame: tuple[int, bytes] | None = None
    at = 2
    while at + 4 <= len(head) and head[at] == 0xFF:
        marker, size = head[at + 1], int.from_bytes(head[at + 2 : at + 4], "big")
        body = head[at + 4 : at + 2 + size]
        if len(body) < size - 2:
            return None
        if marker == DQT:
            quantisation |= _quantisation(body)
        elif marker == DHT:
            huffman |= _huffman(body)
        elif marker == SOF0:
            if frame:
                raise _UnusualError("a second frame")
            frame = at + 5, body
        elif marker == SOS:
            return _header(head[: at + 2 + size], frame, body, quantisation, huffman)
        elif marker not in HARMLESS:
            return None
        at += 2 + size
    return None


def _header(
    head: bytes,
    frame: tuple[int, bytes] | None,
    scan: bytes,
    quantisation: dict[int, Ints],
    huffman: dict[int, npt.NDArray[np.int16]],
) -> Header | None:
    if frame is None or len(frame[1]) != 15 or len(scan) != 10:
        return None
    at, body = frame
    components = tuple((body[i], body[i + 1]) for i in (6, 9, 12))
    factors = [body[i] for i in (8, 11, 14)]  # which tables
    codes = [(scan[i] >> 4, 16 + (scan[i] & 15)) for i in (2, 4, 6)]
    usual = (
        (body[0], body[5]) == (8, 3)  # bits, components
        and components == COMPONENTS
        and (scan[1], scan[3], scan[5]) == (1, 2, 3)
        and scan[0] == 3
        and scan[7:] == bytes([0, 63, 0])  # all coefficients at once
        and factors[1] == factors[2]
        and codes[1] == codes[2]
    )
    if not usual or not {factors[0], factors[1]} <= set(quantisation) or not {*codes[0], *codes[1]} <= set(huffman):
        return None
    places = (ZIGZAG % 8) * 8 + ZIGZAG // 8
    return Header(
        before=head[:at],
        after=head[at + 4 :],
        codes=np.stack([[huffman[number] for number in pair] for pair in codes[:2]]),
        factors=np.stack([places << 16 | quantisation[number] for number in factors[:2]]).astype(np.int32),
    )


def _quantisation(body: bytes) -> dict[int, Ints]:
    """Tables (64,) in the order of coefficients, by number."""
    tables: dict[int, Ints] = {}
    while len(body) >= 65 and body[0] < 4:
        tables[body[0]] = np.frombuffer(body[1:65], np.uint8).astype(np.int64)
        body = body[65:]
    if body:
        raise _UnusualError("a table of 16 bits, or part of one")
    return tables


def _huffman(body: bytes) -> dict[int, npt.NDArray[np.int16]]:
    """Tables by number, 16 more for a table of AC coefficients."""
    tables = {}
    while len(body) >= 17 and body[0] & 0xEF < 4 and len(body) >= 17 + sum(body[1:17]):
        counts, symbols = body[1:17], body[17 : 17 + sum(body[1:17])]
        if body[0] < 4 and max(symbols, default=0) > 15:
            raise _UnusualError("a DC coefficient of more than 15 bits")
        tables[body[0]] = code_table(counts, symbols)
        body = body[17 + len(symbols) :]
    if body:
        raise _UnusualError("a table with an impossible number, or part of one")
    return tables


def code_table(counts: bytes, symbols: bytes) -> npt.NDArray[np.int16]:
    """A Huffman code as a table to look codes up in (T.81, annex C and F.2.2.3).

    Args:
        counts: (16,) how many codes there are of 1, 2, ... 16 bits.
        symbols: What they stand for.

    Returns:
        (TABLE,): 256 * (bits of the code) + its symbol at the next SHORT_BITS bits; 0 where there is no such code. For
        longer codes IS_LONG + the number of the table that has, further back, the same at the LONG_BITS bits after those.
    """
    table = np.zeros(TABLE, np.int16)
    code, used, long_tables = 0, 0, 0
    for length, count in enumerate(counts, start=1):
        for symbol in symbols[used : used + count]:
            if code >> length:
                return np.zeros(TABLE, np.int16)  # more codes than there can be
            first = code << (SHORT_BITS + LONG_BITS - length)
            short = first >> LONG_BITS
            if length <= SHORT_BITS:
                table[short : short + (1 << (SHORT_BITS - length))] = length << 8 | symbol
            else:
                if not table[short] and long_tables == MAX_LONG:
                    return np.zeros(TABLE, np.int16)  # more than there are codes in any table
                if not table[short]:
                    table[short] = IS_LONG + long_tables
                    long_tables += 1
                number = int(table[short]) - IS_LONG
                at = (1 << SHORT_BITS) + (number << LONG_BITS) + (first & ((1 << LONG_BITS) - 1))
                table[at : at + (1 << (SHORT_BITS + LONG_BITS - length))] = length << 8 | symbol
            code += 1
        used += count
        code <<= 1
    return table


@dataclass(frozen=True)
class Plan:
    """What is to be decoded of a batch of JPEGs."""

    # (J, 19) int64. Of each image: where its codes begin, and their bytes; the first of its words (4 bytes each) without
    # stuffing; its kind of header; MCUs in a row, and rows of MCUs; of the MCUs that are wanted the first and the end of the
    # rows, then of the columns; the first of its blocks; height and width of the image; top, left, height and width of the
    # crop; the first of its segments in the table of those; where its pixels go
    table: Ints
    jobs: npt.NDArray[np.int32]  # (n, 2) int32: of each segment that is wanted the image, and which of its segments it is
    words: int  # of all images
    blocks: int  # the same
    pixel_bytes: int  # the same: (3, height, width) of each crop, in order
    most_pixels: int  # of one crop


def plan_of(
    begins: Ints, sizes: Ints, kinds: Ints, first_segments: Ints, crops: Crops, *, heights: Ints, widths: Ints
) -> Plan:
    """What the kernels have to do for J images, of which only what `crops` shows is decoded.

    Args:
        begins: (J,) where each image's codes begin, bytes.
        sizes: (J,) of the codes, bytes.
        kinds: (J,) of headers.
        first_segments: (J,) of each image in the table that says where segments begin.
        crops: Of the J images; none is empty.
        heights: (J,) of the images.
        widths: (J,) of the images.
    """

    def mcus(first: Ints, length: Ints, side: Ints) -> tuple[Ints, Ints]:
        """First and end of the MCUs for these pixels: with a sample of the chroma more on either side, where there is one."""
        begin = np.maximum((first >> 1) - 1, 0)
        end = np.minimum(((first + length - 1) >> 1) + 1, (side - 1) >> 1)
        return begin >> 3, (end >> 3) + 1

    def starts(lengths: Ints) -> tuple[Ints, int]:
        ends = np.cumsum(lengths)
        return ends - lengths, int(ends[-1]) if len(ends) else 0

    top, bottom = mcus(crops.top, crops.height, heights)
    left, right = mcus(crops.left, crops.width, widths)
    first_word, words = starts((sizes + 3) // 4 + 2)  # the kernel reads up to two words too many
    first_block, blocks = starts((bottom - top) * (right - left) * 6)
    pixels = crops.height * crops.width
    first_pixel, pixel_bytes = starts(3 * pixels)
    columns = [begins, sizes, first_word, kinds, -(-widths // 16), -(-heights // 16), top, bottom, left, right, first_block]
    columns += [heights, widths, crops.top, crops.left, crops.height, crops.width, first_segments, first_pixel]
    first, width = left // SEGMENT, -(-right // SEGMENT) - left // SEGMENT  # segments of a row
    first_job, num_jobs = starts((bottom - top) * width)
    image = np.repeat(np.arange(len(top)), (bottom - top) * width)
    row, column = np.divmod(np.arange(num_jobs) - first_job[image], width[image])
    segment = (top[image] + row) * -(-widths // (16 * SEGMENT))[image] + first[image] + column
    jobs = np.stack([image, segment], axis=1).astype(np.int32)
    return Plan(np.stack(columns, axis=1), jobs, words, blocks, pixel_bytes, int(pixels.max(initial=0)))


def num_segments(heights: Ints, widths: Ints) -> Ints:
    """How many segments (n,) images of these sizes (n,) have."""
    return -(-heights // 16) * -(-widths // (16 * SEGMENT))
