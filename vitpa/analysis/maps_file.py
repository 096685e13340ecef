"""`<run>/analysis/maps.npz`: the matrices between patches after every epoch of which there are weights. Torch-free.

Patches are as they lie in the image, a permutation undone. Numbers are float16: a cosine is off by at most 0.0003, an
attention by at most a two-thousandth of itself. Axes: E epochs, L layers, H heads, n patches.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitpa.documents import DocumentError, read_bytes
from vitpa.records import RunError, write_atomic

MAPS_BYTES = 1 << 30
NAME = "maps.npz"
HINT = "make it again: vitpa analyze RUN"


@dataclass(frozen=True)
class SavedMaps:
    """What the file holds.

    Attributes:
        epochs: (E,), ascending; 0 is the initialisation.
        similarity: (E, n, n), cosines of the positional encodings.
        attention: (E, L, H, n, n) between patches, rows sum to 1; of content a mean over images. None: not measured.
        order: (n,), which patch of a permuted image shows each patch of the original; None: the images are not permuted.
        weights_sha256: Of the result whose weights are the last; empty: the run was not finished.
    """

    epochs: NDArray[np.float64]
    similarity: NDArray[np.float16]
    attention: NDArray[np.float16] | None
    order: NDArray[np.int64] | None
    weights_sha256: str

    @property
    def patches(self) -> int:
        """How many patches an image has."""
        return int(self.similarity.shape[1])


def write_maps(folder: Path, maps: SavedMaps) -> None:
    """Write the file into the folder `analysis` of a run; the same matrices make the same bytes."""
    arrays: dict[str, Any] = {name: value for name, value in vars(maps).items() if value is not None}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomic(folder / NAME, buffer.getvalue())


def read_maps(folder: Path) -> SavedMaps | None:
    """The maps in the folder `analysis` of a run; None if there are none.

    Raises:
        RunError: the file is damaged, or not of this form.
    """
    path = folder / NAME
    try:
        data = read_bytes(path, MAPS_BYTES)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if sum(each.file_size for each in archive.infolist()) > MAPS_BYTES:
                raise DocumentError(f"holds more than {MAPS_BYTES:,} bytes")
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise RunError(f"{path}: cannot be read ({error}); {HINT}") from error
    try:
        maps = SavedMaps(
            found["epochs"],
            found["similarity"],
            found.get("attention"),
            found.get("order"),
            str(found["weights_sha256"]),
        )
    except KeyError as error:
        raise RunError(f"{path}: has no {error.args[0]}; {HINT}") from error
    if not _fits(maps):
        raise RunError(f"{path}: its arrays do not fit one another; {HINT}")
    return maps


def _fits(maps: SavedMaps) -> bool:
    """Whether shapes and types are those of SavedMaps, and all numbers are finite."""
    if maps.epochs.ndim != 1 or maps.similarity.ndim != 3:
        return False
    E, n = len(maps.epochs), maps.patches
    shapes = maps.similarity.shape == (E, n, n) and E > 0 and round(n**0.5) ** 2 == n > 0
    floats: list[NDArray[Any]] = [maps.epochs, maps.similarity]
    if maps.attention is not None:
        shapes = shapes and maps.attention.ndim == 5 and maps.attention.shape[::4] == (E, n) and maps.attention.shape[3] == n
        floats.append(maps.attention)
    if maps.order is not None:
        shapes = shapes and maps.order.dtype.kind == "i" and sorted(maps.order.tolist()) == list(range(n))
    return shapes and all(each.dtype.kind == "f" and bool(np.isfinite(each).all()) for each in floats)
