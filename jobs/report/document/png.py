"""A matrix as a PNG with cividis as its palette."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# matplotlib's cividis at equal steps: can be told apart with any kind of colour vision
CIVIDIS = ("00224e", "123570", "3b496c", "575d6d", "707173", "8a8678", "a59c74", "c3b369", "e1cc55", "fee838")
SHADES = 255  # of the palette; the last entry is transparent


def png(image: NDArray[np.float64], low: float, high: float) -> bytes:
    """The file; what is `low` or less is darkest, `high` or more brightest, NaN transparent."""
    share = np.clip((image - low) / ((high - low) or 1.0), 0, 1)
    index = np.where(np.isnan(share), SHADES, np.rint(np.nan_to_num(share) * (SHADES - 1))).astype(np.uint8)
    picture, file = Image.fromarray(index), BytesIO()
    picture.putpalette(_palette())
    picture.save(file, "PNG", transparency=SHADES, optimize=True)
    return file.getvalue()


def _palette() -> bytes:
    stops = np.array([list(bytes.fromhex(colour)) for colour in CIVIDIS], dtype=float)
    at = np.linspace(0, len(stops) - 1, SHADES)
    shades = np.stack([np.interp(at, np.arange(len(stops)), channel) for channel in stops.T], axis=1)
    return bytes(np.rint(shades).astype(np.uint8).tobytes()) + b"\0\0\0"
