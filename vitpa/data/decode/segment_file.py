"""The file with the places where the segments of a .beton's JPEGs begin, for later starts: they are found only once.

    <root>/jpeg_segments/<dataset>-<split>-<hash>.bin     the arrays of `Segments`, one after the other; SHA-256

It goes by the content and the tables of the .beton, so that copies on other disks share it. It may be deleted.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vitpa.data.beton import Beton
from vitpa.data.decode.jpeg_headers import LONGEST, SEGMENT, num_segments
from vitpa.data.manifest import Ints
from vitpa.documents import open_regular
from vitpa.records import make_folders, write_atomic

LAYOUT = 1  # of the file and of an entry
DIGEST_BYTES = 32


@dataclass(frozen=True)
class Segments:
    """Where the segments of N images begin; raw images have none."""

    entries: Ints  # (segments,): first bit and DCs, as vitpa/kernels/jpeg.py finds them; 0 of JPEGs that it does not decode
    header: npt.NDArray[np.int8]  # (N,): which of `kinds` an image has; -1 where it is not decoded by that
    kinds: npt.NDArray[np.uint8]  # (K, LONGEST): headers, filled up with zeros


class SegmentFile:
    """That of one .beton, or of a part of one."""

    def __init__(self, folder: Path, beton: Beton) -> None:
        """It lies in `folder`, which is made when it is written."""
        tables = beton.numbers, beton.sizes, beton.heights, beton.widths, beton.is_jpeg
        digest = hashlib.sha256(f"{LAYOUT} {SEGMENT} {beton.manifest.beton_sha256}".encode())
        for table in tables:
            digest.update(np.ascontiguousarray(table).data)
        self.identity = digest.hexdigest()
        self.num_images = len(beton)
        self.entry_bytes = 8 * int(num_segments(beton.heights, beton.widths)[beton.is_jpeg].sum())
        self.path = folder / f"{beton.manifest.dataset}-{beton.manifest.split}-{self.identity[:16]}.bin"

    def read(self) -> Segments | None:
        """What `write` has written; None if there is no such file, or it is damaged.

        Raises:
            OSError: it cannot be read.
        """
        try:
            with open_regular(self.path) as file:
                kinds_bytes = os.fstat(file.fileno()).st_size - self.entry_bytes - self.num_images - DIGEST_BYTES
                if kinds_bytes < 0 or kinds_bytes % LONGEST:
                    return None
                content = np.fromfile(file, np.uint8)
        except FileNotFoundError:
            return None
        content, digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
        if digest.tobytes() != self._digest(content):
            return None
        entries, header, kinds = np.split(content, [self.entry_bytes, self.entry_bytes + self.num_images])
        return Segments(entries.view(np.int64), header.view(np.int8), kinds.reshape(-1, LONGEST))

    def write(self, segments: Segments) -> None:
        """Write the file whole: any number of trainings may do so at once.

        Raises:
            OSError: it cannot be written.
        """
        parts = segments.entries, segments.header, segments.kinds
        make_folders(self.path.parent)
        write_atomic(self.path, b"".join([*(part.data for part in parts), self._digest(*parts)]))

    def _digest(self, *parts: npt.NDArray[np.generic]) -> bytes:
        digest = hashlib.sha256(self.identity.encode())
        for part in parts:
            digest.update(part.data)
        return digest.digest()
