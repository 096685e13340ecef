"""The manifest beside a .beton: what prepared it, from what, and what it holds."""

from __future__ import annotations

import difflib
import errno
import os
from pathlib import Path
from typing import BinaryIO, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vitpa.datasets import DATASETS
from vitpa.documents import open_regular
from vitpa.errors import UserError

Pixels = npt.NDArray[np.uint8]  # (H, W, 3), RGB
Ints = npt.NDArray[np.int64]
MAX_MANIFEST_BYTES = 1 << 28  # a manifest names the images that were left out


class BetonError(UserError):
    """A .beton or its manifest that cannot be used: one line saying what, where and how to fix it."""


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
        """Read a manifest; `dir_fd` as for `open_file`.

        Raises:
            BetonError: there is none, or it is not a whole manifest.
        """
        try:
            with open_file(path, dir_fd) as file:
                if os.fstat(file.fileno()).st_size > MAX_MANIFEST_BYTES:
                    raise BetonError(f"{path}: not a manifest: larger than {MAX_MANIFEST_BYTES >> 20} MiB; {prep_hint(path)}")
                return cls.model_validate_json(file.read(MAX_MANIFEST_BYTES))
        except FileNotFoundError:
            raise BetonError(f"{path}: no manifest beside the .beton, it was not finished; {prep_hint(path)}") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise BetonError(f"{path}: not a manifest: {where}: {first['msg']}; {prep_hint(path, '--force')}") from error


def open_file(path: Path, folder: int | None = None) -> BinaryIO:
    """A .beton or its manifest, opened; `folder` as for `open_regular`.

    Raises:
        BetonError: it is no regular file.
        OSError: it cannot be opened.
    """
    try:
        return open_regular(path, folder)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EISDIR, errno.ELOOP):
            raise BetonError(f"{path}: not a regular file; {prep_hint(path)}") from None
        raise


def prep_hint(path: Path, option: str = "") -> str:
    """How to get the file at `path`, with the nearest known name if its data set is unknown."""
    dataset = path.parent.name
    command = f"`vitpa prep {dataset}{' ' + option if option else ''}`"
    if dataset in DATASETS:
        return f"make it with {command}"
    near = difflib.get_close_matches(dataset, DATASETS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known data sets: {', '.join(DATASETS)}"
    return f"make it with {command[:-1]} --source DIR` if it is your own ImageFolder ({hint})"
