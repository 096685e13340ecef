"""Whether a palette has a colour for each pixel of an image: Pillow makes those black for which there is none."""

from __future__ import annotations

import numpy as np
from PIL import Image

OS2_HEADER_BYTES, FILE_HEADER_BYTES = 12, 14  # of a BMP
GIF_HEADER_BYTES, EXTENSION, FRAME = 13, 0x21, 0x2C
TABLE, TABLE_SIZE = 0x80, 7  # flags of a GIF: whether there is a table of colours, and the logarithm of its size, less 1


def palette_damage(image: Image.Image, data: bytes) -> str:
    """What is wrong with an image's palette, or with its pixels by it; empty if nothing is found or it has none.

    The image is decoded for this; `data` is all of its file.
    """
    colours, damage = _colours(image, data)
    if colours is None or damage:
        return damage
    if not colours:
        return "it has no palette, which would say the colours of its pixels"
    indices = np.asarray(image) if image.mode != "PA" else np.asarray(image)[..., 0]
    transparent = image.info.get("transparency")
    shown = indices[indices != transparent] if isinstance(transparent, int) else indices
    highest = int(shown.max(initial=0))
    return f"a pixel of colour {highest}, where its palette has {colours} (0 to {colours - 1})" if highest >= colours else ""


def _colours(image: Image.Image, data: bytes) -> tuple[int | None, str]:
    """How many colours its palette has, None without one; and what is wrong with it.

    Of BMP and GIF the file is asked, as Pillow forgets a palette of greys.
    """
    if image.format == "BMP":
        return _bmp_colours(image, data)
    if image.format == "GIF":
        return _gif_colours(data), ""
    if image.mode not in ("P", "PA"):
        return None, ""
    stored = image.palette.getdata()[1] if image.palette else b""
    return len(stored) // 3, "" if len(stored) % 3 == 0 else f"its palette has {len(stored)} values, not three for each colour"


def _bmp_colours(image: Image.Image, data: bytes) -> tuple[int | None, str]:
    begin, header = (int.from_bytes(data[at : at + 4], "little") for at in (10, 14))
    if 0 < begin < FILE_HEADER_BYTES + header:
        return None, "its pixels begin within its header"
    if header == OS2_HEADER_BYTES:
        bits, packed, colours, entry = data[24], False, 0, 3
    else:
        bits, packed, colours, entry = data[28], data[30] != 0, int.from_bytes(data[46:50], "little"), 4
    if bits > 8:
        return None, ""
    colours = colours or 1 << bits
    if FILE_HEADER_BYTES + header < begin < FILE_HEADER_BYTES + header + entry * colours:
        return colours, "its pixels begin within its palette"
    if image.mode != "P" and bits != (1 if image.mode == "1" else 8) and not packed:  # Pillow reads others than there are
        return colours, f"a palette of {colours} greys for {bits} bits, which is not supported; save it in another format"
    return colours, ""


def _gif_colours(data: bytes) -> int:
    """How many colours the first frame has."""
    colours = _table_size(data[10])
    at = GIF_HEADER_BYTES + 3 * colours
    while data[at] != FRAME:
        if data[at] == EXTENSION:
            at += 2
            while data[at]:
                at += 1 + data[at]
        at += 1
    return _table_size(data[at + 9]) or colours


def _table_size(flags: int) -> int:
    return 2 << (flags & TABLE_SIZE) if flags & TABLE else 0
