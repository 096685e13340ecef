"""The only file that knows the .beton format: opening, checking, reading and hashing.

FFCV 1.0.2 writes the format (its writer.py and types.py are the reference). It is not imported here: that costs 5 s, its
reader crashes on a file cut short, and its loader ignores undecodable images.
"""

from __future__ import annotations

import copy
import hashlib
import mmap
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from vitpa.data.decode.cpu import decode_jpeg, jpeg_size
from vitpa.data.manifest import BetonError, Ints, Manifest, Pixels, beton_path, manifest_path, open_file, prep_hint
from vitpa.datasets import SPLITS

VERSION = 2  # of the format; ffcv.types.CURRENT_VERSION
HEADER = np.dtype(
    [("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"), ("alloc_table_ptr", "<u8")],
    align=True,
)
FIELD = np.dtype([("type_id", "<u1"), ("name", ("<u1", 16)), ("arguments", ("<u1", (1024,)))], align=True)
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
SAMPLE = np.dtype([("", IMAGE), ("", "<i8")], align=True)  # f0 the image, f1 the label
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
FIELDS = ((2, "image"), (1, "label"))  # (type_id, name) in order; ffcv.types.TYPE_ID_HANDLER: 1 IntField, 2 RGBImageField
JPEG, RAW = 0, 1  # ffcv.fields.rgb_image.IMAGE_MODES
MIN_PAGE_BYTES = 1 << 21
OPENINGS = 2  # of a file and its manifest, where `vitpa prep --force` replaces them in between
MAX_PIXELS = 178_956_970  # of a JPEG: Pillow, which reads the sources of `vitpa prep`, refuses larger images
MAX_PIXELS_PER_BYTE = 1024  # of a JPEG: one bit for a block of 64 pixels is Huffman's least, in channels of half the size


class BetonFile:
    """The samples of one .beton, checked but without its manifest.

    Everything is checked against the size of the file before it is followed. Reading is safe from many threads at once.
    """

    labels: Ints  # (N,) int64
    heights: Ints  # (N,) int64, pixels
    widths: Ints  # (N,) int64, pixels
    is_jpeg: npt.NDArray[np.bool_]  # (N,) bool; False where the pixels are stored as they are
    offsets: Ints  # (N,) int64, where in the file the bytes of each image begin
    sizes: Ints  # (N,) int64, how many they are
    numbers: Ints  # (N,) int64, of the samples in the file: 0 to N - 1, unless this is a part of it
    status: os.stat_result  # of the file when it was opened: size, inode and so on

    def __init__(self, path: Path, dir_fd: int | None = None) -> None:
        """Open and check `path`; `dir_fd` as for `open_file`.

        Raises:
            BetonError: no such file, not a .beton of ours, or damaged; the message says which.
        """
        self.path = path
        self.is_copy = False  # on a node's disk (staging.py), which errors then say
        self._bytes: npt.NDArray[np.uint8] | None
        self._bytes, self.status = _map(path, dir_fd)
        self._read_tables(self._bytes)

    @property
    def image_size_px(self) -> tuple[int, int] | None:
        """(H, W) if all images are of one size, else None."""
        same_size = np.ptp(self.heights) == 0 and np.ptp(self.widths) == 0
        return (int(self.heights[0]), int(self.widths[0])) if same_size else None

    def __len__(self) -> int:
        return len(self.labels)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file; it is unmapped when the last read that is under way has ended."""
        self._bytes = None

    def read_image(self, index: int, out: Pixels | None = None) -> Pixels:
        """The pixels of one sample, decoded.

        Args:
            index: 0 to N - 1.
            out: (H, W, 3) uint8, C-contiguous, to be written to; a new array if None.

        Returns:
            (H, W, 3) uint8, RGB; `out` if it was given.

        Raises:
            BetonError: no such sample, the file is closed, or the stored JPEG cannot be decoded.
            ValueError: `out` is of another shape, type or layout.
        """
        stored = self.stored(index)
        shape = (int(self.heights[index]), int(self.widths[index]), 3)
        if out is None:
            if self.is_jpeg[index] and jpeg_size(stored) != shape[:2]:
                raise self.undecodable(index)  # before there is memory for what the table claims
            out = np.empty(shape, np.uint8)
        elif out.shape != shape or out.dtype != np.uint8 or not out.flags.c_contiguous or not out.flags.writeable:
            raise ValueError(f"out must be a writable C-contiguous uint8 array {shape}, not {out.dtype} {out.shape}")
        if not self.is_jpeg[index]:
            out[...] = stored.reshape(shape)
        elif not decode_jpeg(stored, out):
            raise self.undecodable(index)
        return out

    def undecodable(self, index: int) -> BetonError:
        """What to raise if the JPEG of a sample is damaged, or of another size than the table says."""
        hint = prep_hint(self.path, "--force")
        if self.is_copy:
            hint = f"delete {self.path.parent.parent}, a copy on this node: it is made again"
        found, wanted = jpeg_size(self.stored(index)), (int(self.heights[index]), int(self.widths[index]))
        what = "cannot be decoded"
        if found not in (None, wanted):
            what += f": it has {found[1]} x {found[0]} pixels, its table says {wanted[1]} x {wanted[0]}"
        return BetonError(f"{self.path}: the JPEG of sample {self.numbers[index]} {what}; {hint}")

    def stored(self, index: int) -> npt.NDArray[np.uint8]:
        """The bytes of one sample as they lie in the file, read-only and not copied: a JPEG, or (H, W, 3) RGB, flat.

        Raises:
            BetonError: no such sample, or the file is closed.
        """
        if self._bytes is None:
            raise BetonError(f"{self.path}: read after it was closed")
        if not 0 <= index < len(self):
            raise BetonError(f"{self.path}: there is no sample {index}, only 0 to {len(self) - 1}")
        return self._bytes[self.offsets[index] : self.offsets[index] + self.sizes[index]]

    def copy(self, begins: Ints, sizes: Ints, out: npt.NDArray[np.uint8]) -> None:
        """Copy pieces of the file, one after the other, other threads of Python running meanwhile.

        Args:
            begins: (P,) where each begins, bytes.
            sizes: (P,) bytes of each.
            out: (n,) uint8, to be filled; n is the sum of `sizes`.

        Raises:
            BetonError: the file is closed.
        """
        data = self._bytes
        if data is None:
            raise BetonError(f"{self.path}: read after it was closed")
        if len(begins):
            pieces = zip(begins.tolist(), (begins + sizes).tolist(), strict=True)
            np.concatenate([data[begin:end] for begin, end in pieces], out=out)

    def content_sha256(self, progress: Callable[[int], None] | None = None) -> str:
        """SHA-256 over the samples in order: label, storage mode, height, width, number of bytes, stored bytes.

        The bytes of a file depend on how its writers shared the work; this does not. `progress` is called with the
        number of samples hashed since the last call.
        """
        digest = hashlib.sha256()
        for index in range(len(self)):
            stored = self.stored(index)
            mode = JPEG if self.is_jpeg[index] else RAW
            digest.update(
                struct.pack("<qBHHQ", self.labels[index], mode, self.heights[index], self.widths[index], stored.size)
            )
            digest.update(stored.data)
            if progress and (index + 1) % 1000 == 0:
                progress(1000)
        if progress:
            progress(len(self) % 1000)
        return digest.hexdigest()

    def _read_tables(self, data: npt.NDArray[np.uint8]) -> None:
        header = data[: HEADER.itemsize].view(HEADER)[0]
        version, num_fields, page_bytes = int(header["version"]), int(header["num_fields"]), int(header["page_size"])
        num_samples, table_start = int(header["num_samples"]), int(header["alloc_table_ptr"])
        fields_end = HEADER.itemsize + num_fields * FIELD.itemsize
        if version != VERSION or page_bytes < MIN_PAGE_BYTES or page_bytes & (page_bytes - 1):
            raise self._damaged(f"not a .beton file of FFCV's format {VERSION}")
        if fields_end > data.size:
            raise self._damaged("it was cut or changed within its header")
        if num_fields != len(FIELDS):
            raise self._damaged(f"not a .beton of images and labels: {num_fields} fields instead of {len(FIELDS)}")
        fields = data[HEADER.itemsize : fields_end].view(FIELD)
        found = tuple((int(field["type_id"]), field["name"].tobytes().rstrip(b"\0").decode("latin-1")) for field in fields)
        if found != FIELDS:
            raise self._damaged("not a .beton of images and labels, in this order")

        samples_end = fields_end + num_samples * SAMPLE.itemsize
        data_start = -(-samples_end // page_bytes) * page_bytes
        file_end = table_start + num_samples * ALLOCATION.itemsize
        if num_samples == 0 or table_start == 0:
            raise self._damaged("its writing was not finished")
        if data.size != file_end:
            raise self._damaged(f"{data.size} bytes where its header says {file_end}: it was cut or changed")
        if table_start <= data_start or table_start % page_bytes:
            raise self._damaged("its tables contradict each other")

        samples = data[fields_end:samples_end].view(SAMPLE)
        images = samples["f0"]
        self.labels = samples["f1"].astype(np.int64)
        self.heights, self.widths = images["height"].astype(np.int64), images["width"].astype(np.int64)
        self.is_jpeg = images["mode"] == JPEG
        self.numbers = np.arange(num_samples)
        self.offsets, self.sizes = self._allocations(data[table_start:].view(ALLOCATION), images["data_ptr"])

        self._check_samples(images["mode"], data_start, table_start)

    def _check_samples(self, modes: npt.NDArray[np.uint8], data_start: int, data_end: int) -> None:
        """Refuse a table by which samples lie outside of the pages or on each other, or are larger than their bytes can be."""
        outside = (self.offsets < data_start) | (self.sizes < 0) | (self.sizes > data_end - self.offsets)
        pixels = self.heights * self.widths
        raw_of_other_size = ~self.is_jpeg & (self.sizes != 3 * pixels)
        too_large = self.is_jpeg & ((pixels > MAX_PIXELS) | (pixels // MAX_PIXELS_PER_BYTE >= self.sizes))
        strange = outside | raw_of_other_size | too_large | (modes > RAW) | (pixels == 0)
        if not strange.any():
            order = np.argsort(self.offsets, kind="stable")
            ends = self.offsets + self.sizes
            strange[order[1:]] = self.offsets[order[1:]] < ends[order[:-1]]
        if strange.any():
            at = int(strange.argmax())
            claim = f"{self.widths[at]} x {self.heights[at]} pixels in {self.sizes[at]} bytes"
            raise self._damaged(f"sample {at} of its table is impossible ({claim})")

    def _allocations(self, table: npt.NDArray[np.void], pointers: npt.NDArray[np.uint64]) -> tuple[Ints, Ints]:
        """Offset and size of each sample's bytes, from a table that is in the order in which the writers finished."""
        order = np.argsort(table["sample_id"], kind="stable")
        table = table[order]
        if not np.array_equal(table["sample_id"], np.arange(len(table))) or not np.array_equal(table["ptr"], pointers):
            raise self._damaged("its allocation table does not belong to its samples")
        return table["ptr"].astype(np.int64), table["size"].astype(np.int64)

    def _damaged(self, what: str) -> BetonError:
        return BetonError(f"{self.path}: {what}; {prep_hint(self.path, '--force')}")


class Beton(BetonFile):
    """A finished .beton: the file and the manifest beside it, which agree."""

    manifest: Manifest
    whole: Beton | None = None  # of which this is a part

    def is_in_place(self, dir_fd: int | None = None) -> bool:
        """Whether the file that is open is still the one of its name; else a manifest read since then may be another one's."""
        try:
            now = os.stat(self.path) if dir_fd is None else os.stat(self.path.name, dir_fd=dir_fd)  # noqa: PTH116 - of both
        except FileNotFoundError:
            return False
        return all(getattr(now, name) == getattr(self.status, name) for name in ("st_dev", "st_ino", "st_size", "st_mtime_ns"))

    def part(self, samples: Ints) -> Beton:
        """Some of the samples as a data set of their own, numbered from 0; it keeps the file's checksum.

        Args:
            samples: (n,) int64, increasing.
        """
        part = copy.copy(self)
        for name in ("labels", "heights", "widths", "is_jpeg", "offsets", "sizes", "numbers"):
            setattr(part, name, getattr(self, name)[samples])
        counts = np.bincount(part.labels, minlength=len(self.manifest.class_names)).tolist()
        part.manifest = self.manifest.model_copy(update={"num_samples": len(part), "class_counts": tuple(counts)})
        part.whole = self.whole or self
        return part

    @classmethod
    def open(cls, path: Path, dataset: str | None = None, split: str | None = None, dir_fd: int | None = None) -> Beton:
        """Open a finished .beton of that data set and split (None: any), with its manifest; `dir_fd` as for `open_file`.

        Raises:
            BetonError: missing, not finished, damaged, of another data set or split, or not what its manifest says.
        """
        for _ in range(OPENINGS):
            beton = cls(path, dir_fd)
            beton.manifest = manifest = Manifest.read(manifest_path(path), dir_fd)
            if beton.is_in_place(dir_fd):
                break
        else:
            raise BetonError(f"{path}: was made again while it was opened; start again when `vitpa prep` has ended")
        num_classes = len(manifest.class_names)
        for what, wanted, found in (("data set", dataset, manifest.dataset), ("split", split, manifest.split)):
            if wanted is not None and wanted != found:
                raise BetonError(f"{path}: holds the {what} {found}, not {wanted}; {prep_hint(path, '--force')}")
        if (manifest.num_samples, manifest.file_size_bytes) != (len(beton), beton.status.st_size):
            raise BetonError(
                f"{path}: {len(beton)} samples in {beton.status.st_size} bytes where its manifest says "
                f"{manifest.num_samples} in {manifest.file_size_bytes}; {prep_hint(path, '--force')}"
            )
        in_range = beton.labels.min() >= 0 and beton.labels.max() < num_classes
        if not in_range or tuple(np.bincount(beton.labels, minlength=num_classes).tolist()) != manifest.class_counts:
            raise BetonError(f"{path}: its labels are not those that its manifest counts; {prep_hint(path, '--force')}")
        return beton


def open_splits(data_dir: Path, dataset: str) -> dict[str, Beton]:
    """Both splits of a data set.

    Raises:
        BetonError: as for `Beton.open`.
    """
    return {split: Beton.open(beton_path(data_dir, dataset, split), dataset, split) for split in SPLITS}


def _map(path: Path, dir_fd: int | None) -> tuple[npt.NDArray[np.uint8], os.stat_result]:
    try:
        file = open_file(path, dir_fd)
    except FileNotFoundError:
        raise BetonError(f"{path}: no such file; {prep_hint(path)}") from None
    with file:
        status = os.fstat(file.fileno())
        if status.st_size < HEADER.itemsize:
            raise BetonError(f"{path}: too short for a .beton file; {prep_hint(path, '--force')}")
        return np.frombuffer(mmap.mmap(file.fileno(), status.st_size, access=mmap.ACCESS_READ), np.uint8), status
