"""The only file that knows the .beton format: opening, checking, decoding, hashing, and the manifest beside the file.

FFCV 1.0.2 writes the format (its writer.py and types.py are the reference). It is not imported here: that costs 5 s, its
reader crashes on a file cut short, and its loader ignores undecodable images. Only the JPEG library that it is linked with is
used, through ctypes.
"""

from __future__ import annotations

import ctypes
import difflib
import errno
import functools
import hashlib
import importlib.util
import mmap
import os
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vitpa.datasets import DATASETS

Pixels = npt.NDArray[np.uint8]  # (H, W, 3), RGB
Ints = npt.NDArray[np.int64]

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
TJPF_RGB, TJ_FLAGS = 0, 2048 | 32768  # turbojpeg.h: red, green, blue; TJFLAG_FASTDCT, and TJFLAG_LIMITSCANS: 500 at most
JPEG, RAW = 0, 1  # ffcv.fields.rgb_image.IMAGE_MODES
MIN_PAGE_BYTES = 1 << 21
MOST_PIXELS = 178_956_970  # of a JPEG: Pillow, which reads the sources of `vitpa prep`, refuses larger images
MOST_PIXELS_PER_BYTE = 1024  # of a JPEG: one bit for a block of 64 pixels is Huffman's least, in channels of half the size
MOST_MANIFEST_BYTES = 1 << 28  # a manifest names the images that were left out


class BetonError(Exception):
    """A .beton or its manifest that cannot be used: one line saying what, where and how to mend it."""


def beton_path(data_dir: Path, dataset: str, split: str) -> Path:
    """Where `vitpa prep` puts a split: `<data_dir>/<dataset>/<split>.beton`."""
    return data_dir / dataset / f"{split}.beton"


def manifest_path(beton: Path) -> Path:
    """The manifest beside a .beton: `<split>.json`."""
    return beton.with_suffix(".json")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ImageSettings(_Record):
    """How images are stored. Two conversions of one source with equal settings hold equal samples."""

    resize: Literal["none", "short_side", "max_side"]  # which side is brought down to size_px; never up
    size_px: int | None = Field(ge=1)
    jpeg_share: float = Field(ge=0, le=1)  # share of samples stored as JPEG; the others are raw pixels
    jpeg_quality: int | None = Field(ge=1, le=100)
    white_level: int | None = Field(default=None, ge=1)  # what is white in images of more than 8 bits; None: all bits set

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.resize == "none") != (self.size_px is None):
            raise ValueError("size_px belongs to a resizing, and to nothing else")
        if (self.jpeg_share == 0) != (self.jpeg_quality is None):
            raise ValueError("jpeg_quality belongs to a jpeg_share above 0, and to nothing else")
        return self


class Manifest(_Record):
    """What a .beton holds and where it came from: `<split>.json`, written last.

    `source_sha256` is for noticing a changed source; how it is made is described at the sources in data_prep.
    `beton_sha256` is `BetonFile.content_sha256`: over the samples, not over the bytes of the file.
    """

    dataset: str
    split: str
    num_samples: int = Field(ge=1)
    class_names: tuple[str, ...]
    class_counts: tuple[int, ...]
    images: ImageSettings
    source: str
    source_sha256: str
    beton_sha256: str
    file_size_bytes: int
    skipped: tuple[str, ...]  # corrupt images of the source that were left out
    left_out: dict[str, int] = {}  # how many files and folders of each kind are no images
    notes: tuple[str, ...] = ()  # what else was found, as it was said
    tools: dict[str, str]
    created_utc: str
    duration_s: float = Field(ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.class_names) != len(self.class_counts):
            raise ValueError(f"{len(self.class_names)} class_names but {len(self.class_counts)} class_counts")
        if sum(self.class_counts) != self.num_samples:
            raise ValueError(f"class_counts add up to {sum(self.class_counts)}, num_samples is {self.num_samples}")
        return self

    @classmethod
    def read(cls, path: Path, dir_fd: int | None = None) -> Manifest:
        """Read a manifest; `dir_fd` as for `Beton.open`.

        Raises:
            BetonError: there is none, or it is not a whole manifest.
        """
        try:
            with os.fdopen(open_regular(path, dir_fd), "rb") as file:
                if os.fstat(file.fileno()).st_size > MOST_MANIFEST_BYTES:
                    raise BetonError(f"{path}: not a manifest: larger than {MOST_MANIFEST_BYTES >> 20} MiB; {_mend(path)}")
                return cls.model_validate_json(file.read(MOST_MANIFEST_BYTES))
        except FileNotFoundError:
            raise BetonError(f"{path}: no manifest beside the .beton, it was not finished; {_mend(path)}") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise BetonError(f"{path}: not a manifest: {where}: {first['msg']}; {_mend(path, '--force')}") from error


class BetonFile:
    """The samples of one .beton, checked but without its manifest.

    Everything is checked against the size of the file before it is followed. Reading is safe from many threads at once.

    Attributes:
        path: The file.
        labels: (N,) int64.
        heights: (N,) int64, pixels.
        widths: (N,) int64, pixels.
        is_jpeg: (N,) bool; False where the pixels are stored as they are.
        offsets: (N,) int64, where in the file the bytes of each image begin.
        sizes: (N,) int64, how many they are.
        status: Of the file when it was opened: size, inode and so on.
    """

    labels: Ints
    heights: Ints
    widths: Ints
    is_jpeg: npt.NDArray[np.bool_]
    offsets: Ints
    sizes: Ints
    status: os.stat_result

    def __init__(self, path: Path, dir_fd: int | None = None) -> None:
        """Open and check `path`.

        Args:
            path: The file.
            dir_fd: The folder of `path`, opened: the file is looked for there, by its name, and is no link. None for `path`.

        Raises:
            BetonError: no such file, not a .beton of ours, or damaged; the message says which.
        """
        self.path = path
        self.is_copy = False  # on a node's disk (staging.py), which errors then say
        self._bytes: npt.NDArray[np.uint8] | None
        self._bytes, self.status = _map(path, dir_fd)
        self._read_tables(self._bytes)
        same_size = np.ptp(self.heights) == 0 and np.ptp(self.widths) == 0
        self.image_size_px = (int(self.heights[0]), int(self.widths[0])) if same_size else None
        """(H, W) if all images are of one size, else None."""

    def __len__(self) -> int:
        return len(self.labels)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
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
        mend = _mend(self.path, "--force")
        if self.is_copy:
            mend = f"delete {self.path.parent.parent}, a copy on this node: it is made again"
        found, wanted = jpeg_size(self.stored(index)), (int(self.heights[index]), int(self.widths[index]))
        what = "cannot be decoded"
        if found not in (None, wanted):
            what += f": it has {found[1]} x {found[0]} pixels, its table says {wanted[1]} x {wanted[0]}"
        return BetonError(f"{self.path}: the JPEG of sample {index} {what}; {mend}")

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
        self._check_fields(data[HEADER.itemsize : fields_end].view(FIELD))

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
        self.offsets, self.sizes = self._allocations(data[table_start:].view(ALLOCATION), images["data_ptr"])

        self._check_samples(images["mode"], data_start, table_start)

    def _check_samples(self, modes: npt.NDArray[np.uint8], data_start: int, data_end: int) -> None:
        """Refuse a table by which samples lie outside of the pages or on each other, or are larger than their bytes can be."""
        outside = (self.offsets < data_start) | (self.sizes < 0) | (self.sizes > data_end - self.offsets)
        pixels = self.heights * self.widths
        raw_of_other_size = ~self.is_jpeg & (self.sizes != 3 * pixels)
        too_large = self.is_jpeg & ((pixels > MOST_PIXELS) | (pixels // MOST_PIXELS_PER_BYTE >= self.sizes))
        strange = outside | raw_of_other_size | too_large | (modes > RAW) | (pixels == 0)
        if not strange.any():
            order = np.argsort(self.offsets, kind="stable")
            ends = self.offsets + self.sizes
            strange[order[1:]] = self.offsets[order[1:]] < ends[order[:-1]]
        if strange.any():
            at = int(strange.argmax())
            claim = f"{self.widths[at]} x {self.heights[at]} pixels in {self.sizes[at]} bytes"
            raise self._damaged(f"sample {at} of its table is impossible ({claim})")

    def _check_fields(self, fields: npt.NDArray[np.void]) -> None:
        found = tuple((int(field["type_id"]), field["name"].tobytes().rstrip(b"\0")) for field in fields)
        if found != tuple((type_id, name.encode()) for type_id, name in FIELDS):
            raise self._damaged("not a .beton of images and labels, in this order")

    def _allocations(self, table: npt.NDArray[np.void], pointers: npt.NDArray[np.uint64]) -> tuple[Ints, Ints]:
        """Offset and size of each sample's bytes, from a table that is in the order in which the writers finished."""
        order = np.argsort(table["sample_id"], kind="stable")
        table = table[order]
        if not np.array_equal(table["sample_id"], np.arange(len(table))) or not np.array_equal(table["ptr"], pointers):
            raise self._damaged("its allocation table does not belong to its samples")
        return table["ptr"].astype(np.int64), table["size"].astype(np.int64)

    def _damaged(self, what: str) -> BetonError:
        return BetonError(f"{self.path}: {what}; {_mend(self.path, '--force')}")


class Beton(BetonFile):
    """A finished .beton: the file and the manifest beside it, which agree."""

    manifest: Manifest

    @classmethod
    def open(cls, path: Path, dataset: str | None = None, split: str | None = None, dir_fd: int | None = None) -> Beton:
        """Open a finished .beton.

        Args:
            path: The .beton; its manifest lies beside it.
            dataset: The data set it has to be of; None for any.
            split: The split it has to be; None for any.
            dir_fd: The folder of `path`, opened: both files are looked for there, and are no links. None for `path`.

        Raises:
            BetonError: missing, not finished, damaged, of another data set or split, or not what its manifest says.
        """
        beton = cls(path, dir_fd)
        beton.manifest = manifest = Manifest.read(manifest_path(path), dir_fd)
        num_classes = len(manifest.class_names)
        for what, wanted, found in (("data set", dataset, manifest.dataset), ("split", split, manifest.split)):
            if wanted is not None and wanted != found:
                raise BetonError(f"{path}: holds the {what} {found}, not {wanted}; {_mend(path, '--force')}")
        if (manifest.num_samples, manifest.file_size_bytes) != (len(beton), beton.status.st_size):
            raise BetonError(
                f"{path}: {len(beton)} samples in {beton.status.st_size} bytes where its manifest says "
                f"{manifest.num_samples} in {manifest.file_size_bytes}; {_mend(path, '--force')}"
            )
        in_range = beton.labels.min() >= 0 and beton.labels.max() < num_classes
        if not in_range or tuple(np.bincount(beton.labels, minlength=num_classes).tolist()) != manifest.class_counts:
            raise BetonError(f"{path}: its labels are not those that its manifest counts; {_mend(path, '--force')}")
        return beton


def decode_jpeg(stored: npt.NDArray[np.uint8], out: Pixels) -> bool:
    """Decode a JPEG into `out`, (H, W, 3) uint8 C-contiguous RGB; False if it is damaged or of another size.

    If True, each pixel of `out` has been written. The call and the flags are those of FFCV's `imdecode` (libffcv.cpp:
    TurboJPEG with the fast DCT), so the pixels are those of FFCV's loader. That one does not ask for the size, though: of a
    JPEG that is smaller than `out` it writes what there is, and a larger one it shrinks. Runs without Python's global lock.
    """
    height, width = out.shape[:2]
    with jpeg_decompressor() as (library, handle):
        if _size(library, handle, stored) != (height, width):
            return False
        place = stored.ctypes.data, stored.size, out.ctypes.data
        code: int = library.tjDecompress2(handle, *place, width, 0, height, TJPF_RGB, TJ_FLAGS)
    return code == 0  # after a warning, too, it is not


def jpeg_size(stored: npt.NDArray[np.uint8]) -> tuple[int, int] | None:
    """Height and width that a JPEG's header says; None if it cannot be read."""
    with jpeg_decompressor() as (library, handle):
        return _size(library, handle, stored)


def _size(library: ctypes.CDLL, handle: int, stored: npt.NDArray[np.uint8]) -> tuple[int, int] | None:
    found = _FOUND()
    at = ctypes.addressof(found)
    code = library.tjDecompressHeader3(handle, stored.ctypes.data, stored.size, at, at + 4, at + 8, at + 12)
    return (found[1], found[0]) if code == 0 else None


_FOUND = ctypes.c_int * 4  # width, height, subsampling, colours


class jpeg_decompressor:  # noqa: N801 - used as a function
    """TurboJPEG's decoder, new for each image: it keeps tables of the one before, and where in its header an error was."""

    def __enter__(self) -> tuple[ctypes.CDLL, int]:
        self.library = _turbojpeg()
        self.handle = self.library.tjInitDecompress()
        if not self.handle:
            raise MemoryError("TurboJPEG's decoder cannot be made")
        return self.library, self.handle

    def __exit__(self, *_: object) -> None:
        self.library.tjDestroy(self.handle)


@functools.cache
def _turbojpeg() -> ctypes.CDLL:
    """TurboJPEG, by way of FFCV's compiled library, which is linked with it."""
    spec = importlib.util.find_spec("ffcv")
    folders = spec.submodule_search_locations if spec else None
    libraries = [path for folder in folders or () for path in Path(folder).glob("_libffcv*.so")]
    if not libraries:
        raise BetonError("FFCV's compiled library is not installed; JPEG images need it: pip install ffcv")
    try:
        library = ctypes.CDLL(str(libraries[0]))
        pointer, length, number = ctypes.c_void_p, ctypes.c_ulong, ctypes.c_int
        for name, result, arguments in (
            ("tjInitDecompress", pointer, []),
            ("tjDestroy", number, [pointer]),
            ("tjGetErrorStr2", ctypes.c_char_p, [pointer]),
            ("tjDecompressHeader3", number, [pointer, pointer, length, *[pointer] * 4]),
            ("tjDecompress2", number, [pointer, pointer, length, pointer, *[number] * 5]),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise BetonError(f"{libraries[0]}: FFCV's compiled library cannot be used: {error}") from error
    return library


def open_regular(path: Path, dir_fd: int | None = None) -> int:
    """A descriptor of `path` to read from, which neither waits, as a pipe would have it, nor is one.

    Args:
        path: A regular file.
        dir_fd: The folder of `path`, opened: the file is looked for there, by its name, and is no link. None for `path`.

    Raises:
        BetonError: it is no regular file.
        OSError: it cannot be opened.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags) if dir_fd is None else os.open(path.name, flags | os.O_NOFOLLOW, dir_fd=dir_fd)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link, a socket
            raise BetonError(f"{path}: not a regular file; {_mend(path)}") from None
        raise OSError(error.errno, error.strerror, str(path)) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BetonError(f"{path}: not a regular file; {_mend(path)}")
    return descriptor


def _map(path: Path, dir_fd: int | None) -> tuple[npt.NDArray[np.uint8], os.stat_result]:
    try:
        descriptor = open_regular(path, dir_fd)
    except FileNotFoundError:
        raise BetonError(f"{path}: no such file; {_mend(path)}") from None
    try:
        status = os.fstat(descriptor)
        if status.st_size < HEADER.itemsize:
            raise BetonError(f"{path}: too short for a .beton file; {_mend(path, '--force')}")
        return np.frombuffer(mmap.mmap(descriptor, status.st_size, access=mmap.ACCESS_READ), np.uint8), status
    finally:
        os.close(descriptor)


def _mend(path: Path, option: str = "") -> str:
    """How to get the file at `path`, with the nearest known name if its data set is unknown."""
    dataset = path.parent.name
    command = f"`vitpa prep {dataset}{' ' + option if option else ''}`"
    if dataset in DATASETS:
        return f"make it with {command}"
    near = difflib.get_close_matches(dataset, DATASETS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known data sets: {', '.join(DATASETS)}"
    return f"make it with {command[:-1]} --source DIR` if it is your own ImageFolder ({hint})"
