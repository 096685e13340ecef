"""How figures look and are written, as PNG and SVG.

Colours are Okabe and Ito's, and maps are cividis: both can be told apart with any kind of colour vision.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from vitpa.records import write_atomic

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#777777"
STYLE: Any = {  # for matplotlib.rc_context
    "svg.hashsalt": "vitpa",
    "svg.fonttype": "none",
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write a figure as PNG and as SVG; the same numbers make the same files."""
    for suffix, options in (("png", {"dpi": 150}), ("svg", {"metadata": {"Date": None}})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=suffix, **options)
        write_atomic(folder / f"{name}.{suffix}", buffer.getvalue())
