"""Comparing a finished .beton with its source: every label, the content hash, and every or many images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from data_prep.errors import PrepError
from data_prep.images import CorruptImageError, shrink
from data_prep.sources import SMALL_PX, Split
from vitpa.data.beton import Beton
from vitpa.data.decode.cpu import decode_jpeg
from vitpa.data.manifest import BetonError, Pixels

SAMPLED_PHOTOS = 1000  # evenly spaced; of small images all are compared
JPEG_TOLERANCE = 3.0  # mean absolute difference, grey levels of 255; the versions of Pillow and OpenCV differ by up to 2
LISTED = 10


@dataclass(frozen=True)
class Report:
    """What was compared and what differs."""

    num_samples: int
    images_compared: int
    differences: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether the file holds what its source and its manifest say."""
        return not self.differences

    def lines(self) -> list[str]:
        """The report for a person."""
        if self.ok:
            return [
                f"verified: content hash, {self.num_samples:,} labels, {self.images_compared:,} of {self.num_samples:,} images"
            ]
        wrong = list(self.differences[:LISTED])
        if len(self.differences) > LISTED:
            wrong.append(f"and {len(self.differences) - LISTED} more differences")
        return [f"NOT VERIFIED: {line}" for line in wrong] + ["NOT VERIFIED: --force makes it again"]


def verify(beton: Beton, split: Split, progress: Callable[[int], None]) -> Report:
    """Compare `beton` with its source.

    Raw images must be equal. A JPEG must be within `JPEG_TOLERANCE` of the source image after it has been through the same
    JPEG quality, so that the loss of the compression itself does not count.
    """
    same = beton.content_sha256(progress) == beton.manifest.beton_sha256
    differences = [] if same else ["the content hash is not the manifest's"]
    source = split.without(set(beton.manifest.skipped))
    if source.class_names != beton.manifest.class_names or len(source) != len(beton):
        counts = f"{len(beton)} images of {len(beton.manifest.class_names)} classes"
        different = f"{counts}, its source has {len(source)} of {len(source.class_names)}, or others"
        return Report(len(beton), 0, (*differences, different))
    differences += [
        f"{source.describe(index)}: label {beton.labels[index]} where the source has {source.labels[index]}"
        for index in np.flatnonzero(beton.labels != source.labels).tolist()
    ]
    small = max(beton.heights.max(), beton.widths.max()) <= SMALL_PX
    every = 1 if small else -(-len(beton) // SAMPLED_PHOTOS)
    compared = range(0, len(beton), every)
    differences += [wrong for index in compared if (wrong := _difference(beton, source, index))]
    return Report(len(beton), len(compared), tuple(differences))


def _difference(beton: Beton, source: Split, index: int) -> str:
    """What is wrong with one image; empty if nothing is."""
    name = source.describe(index)
    try:
        stored = beton.read_image(index)
        settings = beton.manifest.images
        wanted = shrink(source.photo(index, settings.white_level).pixels, settings)
    except BetonError as error:
        return str(error)
    except CorruptImageError as error:
        return f"{name}: the source image is corrupt: {error}"
    if stored.shape != wanted.shape:
        return f"{name}: {stored.shape[1]}x{stored.shape[0]} px where the source gives {wanted.shape[1]}x{wanted.shape[0]}"
    if not beton.is_jpeg[index]:
        return "" if np.array_equal(stored, wanted) else f"{name}: its pixels differ from the source's"
    quality = beton.manifest.images.jpeg_quality
    error_levels = float(np.abs(stored.astype(np.int16) - _through_jpeg(wanted, quality or 0)).mean())
    if error_levels > JPEG_TOLERANCE:
        return f"{name}: {error_levels:.1f} grey levels from the source on average, more than {JPEG_TOLERANCE}"
    return ""


def _through_jpeg(pixels: Pixels, quality: int) -> Pixels:
    """Encode as FFCV's writer does and decode as its loader does."""
    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    decoded = np.empty_like(pixels)
    if not decode_jpeg(encoded.reshape(-1), decoded):
        raise PrepError(f"OpenCV's JPEG of {pixels.shape[1]}x{pixels.shape[0]} px cannot be decoded again")
    return decoded
