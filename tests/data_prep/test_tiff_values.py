"""TIFFs that are whole, and whose values are not those of an image as they are written: refused in one line."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from data_prep.images import CorruptImageError, load_photo

SHORT, LONG = 3, 4


def tiff(values: npt.NDArray[np.generic], photometric: int, *, more: dict[int, list[int]] | None = None) -> bytes:
    """A TIFF of one strip of (H, W) or (H, W, C) values, little-endian, with `more` tags of SHORT values."""
    height, width, *rest = values.shape
    channels, bits = (rest or [1])[0], values.dtype.itemsize * 8
    tags: dict[int, tuple[int, list[int]]] = {
        256: (LONG, [width]), 257: (LONG, [height]), 258: (SHORT, [bits] * channels), 259: (SHORT, [1]),
        262: (SHORT, [photometric]), 273: (LONG, [8]), 277: (SHORT, [channels]), 278: (LONG, [height]),
        279: (LONG, [values.nbytes]), **{tag: (SHORT, numbers) for tag, numbers in (more or {}).items()},
    }  # fmt: skip
    body, extra = bytearray(values.astype(values.dtype.newbyteorder("<")).tobytes()), bytearray()
    ifd_at = 8 + len(body) + len(body) % 2
    extra_at = ifd_at + 2 + 12 * len(tags) + 4
    entries = b""
    for tag, (kind, numbers) in sorted(tags.items()):
        packed = struct.pack(f"<{len(numbers)}{'H' if kind == SHORT else 'I'}", *numbers)
        if len(packed) > 4:
            entries += struct.pack("<HHII", tag, kind, len(numbers), extra_at + len(extra))
            extra += packed
        else:
            entries += struct.pack("<HHI", tag, kind, len(numbers)) + packed.ljust(4, b"\0")
    head = b"II*\0" + struct.pack("<I", ifd_at)
    return head + bytes(body).ljust(ifd_at - 8, b"\0") + struct.pack("<H", len(tags)) + entries + bytes(4) + bytes(extra)


RAMP = np.linspace(0, 1, 40 * 30).reshape(30, 40)
U16, U32 = (RAMP * 65535).astype(np.uint16), (RAMP * 4_000_000_000).astype(np.uint32)
CMYK = np.dstack([(RAMP * 4095).astype(np.uint16)] * 4)
INDICES = (RAMP * 255).astype(np.uint8)


def load(folder: Path, data: bytes, white_level: int | None = None) -> npt.NDArray[np.uint8]:
    (folder / "image.tif").write_bytes(data)
    return load_photo(folder / "image.tif", white_level).pixels


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (tiff(U16 // 16, 0), "values from 0 to 4,095, where white is 65,535: nearly black"),
        (tiff((RAMP * 127).astype(np.uint8), 1, more={339: [2]}), "signed values of 8 bits"),
        (tiff(CMYK, 5), "CMYK values of 16 bits that stay in their lower part"),
        (tiff(INDICES, 3, more={320: list(range(256)) * 3}), "a palette with values up to 255, where white is 65,535"),
        (tiff(U32, 1), r"32-bit grey values beyond 16 bits \(0 to 4,000,000,000\)"),
        (tiff(INDICES, 1, more={254: [1]}), "its first page is a preview of reduced size"),
    ],
    ids=["white is zero", "signed 8", "cmyk", "palette", "unsigned 32", "preview"],
)
def test_values_without_a_meaning_are_named(tmp_path: Path, data: bytes, reason: str) -> None:
    with pytest.raises(CorruptImageError, match=reason):
        load(tmp_path, data)


def test_the_same_with_their_full_range_are_taken(tmp_path: Path) -> None:
    grey = np.rint(RAMP * 255)
    assert np.abs(load(tmp_path, tiff(U16, 1))[..., 0] - grey).max() <= 1
    assert np.abs(load(tmp_path, tiff(U16, 0))[..., 0] - (255 - grey)).max() <= 1
    assert np.abs(load(tmp_path, tiff(U16 // 16, 0), 4095)[..., 0] - (255 - grey)).max() <= 1
    signed = tiff((RAMP * 32767).astype(np.uint16), 1, more={339: [2]})
    assert np.abs(load(tmp_path, signed)[..., 0] - grey).max() <= 1
    palette = [257 * value for value in range(256)] * 3
    assert np.abs(load(tmp_path, tiff(INDICES, 3, more={320: palette}))[..., 0] - grey).max() <= 1
    assert load(tmp_path, tiff(np.dstack([U16] * 4), 5)).any()


def test_pillow_reads_these_files() -> None:
    with Image.open(io.BytesIO(tiff(INDICES, 1))) as image:
        assert np.array_equal(np.asarray(image), INDICES)
