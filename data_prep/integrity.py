"""Whether the bytes of a JPEG or a PNG are whole: what Pillow passes over without a word.

libjpeg decodes on after damage and only counts a warning, which Pillow does not show; TurboJPEG, which FFCV's library is
linked with, reports it. Of a PNG's pixels Pillow checks no CRC, and leaves those black that are not there. Formats: ITU-T
T.81, annex B and G; the PNG specification.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from vitpa.data.decode.cpu import jpeg_decompressor

BITS = 8  # of a channel, as they are stored
JPEG_MAGIC, PNG_MAGIC = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"

MARKER = re.compile(rb"\xff([^\x00\x01\xff\xd0-\xd7])")  # but restarts, and bytes of a scan that look like one
SEQUENTIAL, PROGRESSIVE = {0xC0, 0xC1, 0xC9}, {0xC2, 0xCA}  # frames, SOFn; others do not consist of such scans
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
SOS, EOI, APP0 = 0xDA, 0xD9, 0xE0
END_OF_IMAGE = b"\xff\xd9"

TJPF_GRAY, TJPF_CMYK = 6, 11  # turbojpeg.h: pixel formats
STOP_ON_WARNING, LIMIT_SCANS = 8192, 32768  # the same: flags
SHRINK = 8  # decoding to an eighth reads all codes, and leaves most of the arithmetic out

WARNINGS = ("Corrupt JPEG data", "Premature end")

IEND = b"\x00\x00\x00\x00IEND\xaeB`\x82"
TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")
ORIENTATION_TEXTS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")  # where Pillow looks for an orientation
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by the colour type of a PNG
PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))  # x, y, steps
INPUT_BYTES = 1 << 14  # decompressed at once: to 16 MiB at most
CUT = "cut before its checksum"
MAX_TEXT_BYTES = 1 << 20  # of such a text when decompressed; Pillow's PngImagePlugin.MAX_TEXT_CHUNK


@dataclass
class _Scans:
    """What a JPEG's markers say."""

    ended: bool = False  # with its last marker, EOI
    frame: int = 0  # its kind, SOFn; 0 if there is none
    bits: int = 0  # of a channel
    size: tuple[int, int] = (0, 0)  # width and height, pixels
    # of each component the lowest bit of each of its 64 coefficients that the scans have brought; None for none
    low_bits: dict[int, list[int | None]] = field(default_factory=dict)
    revision_at: int | None = None  # where in the file JFIF's revision is

    def add(self, body: bytes) -> None:
        """Take in a scan, by what follows its marker and length."""
        count = body[0] if body else 0
        if len(body) < 2 * count + 4:
            return  # libjpeg will say so
        first, last, low_bit = body[2 * count + 1], body[2 * count + 2], body[2 * count + 3] & 15
        if self.frame in SEQUENTIAL:
            first, last, low_bit = 0, 63, 0
        for bits in (self.low_bits.get(body[2 * number + 1], []) for number in range(count)):
            bits[first : last + 1] = [low_bit] * len(bits[first : last + 1])


def checked_jpeg(data: bytes) -> tuple[bytes, str]:
    """A JPEG with its last marker, EOI, without which it may yet be whole; and why it is not supported, empty if it is."""
    scans = _read_scans(data)
    reason = f"a JPEG of {scans.bits} bits, which is not supported; save it with {BITS}" if scans.bits > BITS else ""
    return data if scans.ended else data + END_OF_IMAGE, reason


def jpeg_damage(data: bytes) -> str:
    """What is wrong with a JPEG that has its last marker (see `checked_jpeg`), in libjpeg's words; empty if it is whole."""
    scans = _read_scans(data)
    if scans.revision_at is not None and data[scans.revision_at] != 1:  # libjpeg warns of it; no pixel depends on it
        data = data[: scans.revision_at] + b"\x01" + data[scans.revision_at + 1 :]
    if 0 in scans.size:  # for TurboJPEG 0 means whatever the image has
        return "no frame with a width and a height"
    width, height = (-(-side // SHRINK) for side in scans.size)
    cmyk = len(scans.low_bits) == 4
    pixels = np.empty((height, width, 4 if cmyk else 1), np.uint8)
    size = width, 0, height, TJPF_CMYK if cmyk else TJPF_GRAY
    with jpeg_decompressor() as (library, decoder):
        if library.tjDecompress2(decoder, data, len(data), pixels.ctypes.data, *size, STOP_ON_WARNING | LIMIT_SCANS):
            reason: bytes = library.tjGetErrorStr2(decoder)
            return reason.decode(errors="replace")
    complete = all(bit == 0 for bits in scans.low_bits.values() for bit in bits)  # all bits of all coefficients have come
    return "" if complete or scans.frame not in SEQUENTIAL | PROGRESSIVE else "cut between two of its scans"


def _read_scans(data: bytes) -> _Scans:
    scans, at = _Scans(), 2
    while found := MARKER.search(data, at):
        marker, at = found[1][0], found.end()
        if marker == EOI:
            scans.ended = True
            break
        size = int.from_bytes(data[at : at + 2])
        body = data[at + 2 : at + size]
        if marker in FRAMES and len(body) >= 6:
            scans.frame, scans.bits, scans.size = marker, body[0], (int.from_bytes(body[3:5]), int.from_bytes(body[1:3]))
            scans.low_bits = {number: [None] * 64 for number in body[6::3]}
        elif marker == SOS:
            scans.add(body)
        elif marker == APP0 and body.startswith(b"JFIF\0") and len(body) > 5:
            scans.revision_at = at + 7
        at += max(size, 2)
    return scans


def checked_png(data: bytes) -> tuple[bytes, str]:
    """A PNG without its texts and colour profile, and what is wrong with it, which is empty if all CRCs are right.

    Pillow refuses files with long texts, of which nothing is used but the orientation. If only the last chunk is missing,
    it is added.
    """
    kept = [data[: len(PNG_MAGIC)]]
    for at, kind, end in _chunks(data):
        if at == len(PNG_MAGIC) and kind == b"CgBI":
            return data, "Apple's own kind of PNG (CgBI), which is not supported; convert it to PNG"
        if at == len(PNG_MAGIC) and kind != b"IHDR":
            return data, f"it begins with a chunk {_printable(kind)}, not with its header, IHDR"
        if end > len(data):
            return data, f"cut within a chunk {_printable(kind)}"
        if struct.pack(">I", zlib.crc32(data[at + 4 : end - 4])) != data[end - 4 : end]:
            return data, f"wrong checksum of a chunk {_printable(kind)}"
        if kind == b"IEND":
            break
        if kind != b"iCCP" and (kind not in TEXT_CHUNKS or _may_say_orientation(kind, data[at + 8 : end - 4])):
            kept.append(data[at:end])
    return b"".join([*kept, IEND]), ""


def png_damage(data: bytes) -> str:
    """What is wrong with the pixels of a PNG whose CRCs and header are good: a decoder leaves black what is not there."""
    width, height, depth, colours, interlaced = struct.unpack(">IIBBxxB", data[16:29])
    needed = 0
    for x, y, across, down in PASSES if interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-(width - x) // across), -(-(height - y) // down)
        row_bytes = 1 + -(-columns * CHANNELS[colours] * depth // 8)  # the first one says how the row is filtered
        needed += rows * row_bytes if columns > 0 else 0
    size, damage = inflated(_pixel_stream(data), needed)
    if damage == CUT:  # a checksum that is missing at their end is no damage, as the CRCs are right
        damage = ""
    return damage or wrong_size(size, needed)


def png_for_opencv(data: bytes) -> bytes:
    """A PNG that is whole, with nothing in it that libpng warns of on stderr: only its pixels, stored as they are."""
    pixels = zlib.compress(zlib.decompressobj().decompress(_pixel_stream(data)), level=0)
    chunks = [data[at:end] for at, kind, end in _chunks(data) if (kind, end - at) in ((b"IHDR", 25), (b"tRNS", 18))]
    body = b"IDAT" + pixels
    return b"".join([PNG_MAGIC, *chunks, struct.pack(">I", len(pixels)), body, struct.pack(">I", zlib.crc32(body)), IEND])


def _pixel_stream(data: bytes) -> bytes:
    return b"".join(data[at + 8 : end - 4] for at, kind, end in _chunks(data) if kind == b"IDAT")


def _chunks(data: bytes) -> Iterator[tuple[int, bytes, int]]:
    """The chunks of a PNG but the last one, IEND: where each begins, its kind, and where it ends."""
    at = len(PNG_MAGIC)
    while at < len(data) and not IEND.startswith(data[at:]):
        kind, end = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4])
        if kind == b"IEND" and data[at:end] == IEND:
            return
        yield at, kind, end
        at = end


def inflated(stream: bytes, most: int) -> tuple[int, str]:
    """What zlib makes of a stream, up to a little beyond `most`, bytes; and what is wrong with it, empty if nothing is."""
    decompressor, size = zlib.decompressobj(), 0
    try:
        for at in range(0, len(stream), INPUT_BYTES):
            size += len(decompressor.decompress(stream[at : at + INPUT_BYTES]))
            if decompressor.eof or size > most:
                return size, ""
    except zlib.error as error:
        return size, str(error).rpartition(": ")[2]
    return size, CUT


def wrong_size(size: int, *right: int) -> str:
    """What to say of pixels that decompress to `size` bytes; empty if that is one of the right ones."""
    more = "more than " if size > max(right) else ""
    return "" if size in right else f"{more}{min(size, max(right)):,} bytes of pixels, not {right[0]:,}"


def _may_say_orientation(kind: bytes, body: bytes) -> bool:
    """Whether a chunk of text may hold an orientation, and is not too long for Pillow."""
    if not body.startswith(ORIENTATION_TEXTS):
        return False
    keyword, _, rest = body.partition(b"\0")
    compressed = rest[1:] if kind == b"zTXt" else b""
    if kind == b"iTXt" and rest[:1] == b"\x01":
        compressed = rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    if not compressed:
        return len(keyword) + len(rest) <= MAX_TEXT_BYTES
    decompressor = zlib.decompressobj()
    try:
        decompressor.decompress(compressed, MAX_TEXT_BYTES)
    except zlib.error:
        return False
    return not decompressor.unconsumed_tail


def _printable(kind: bytes) -> str:
    return kind.decode("ascii", "backslashreplace") if kind.isalpha() else kind.hex()
