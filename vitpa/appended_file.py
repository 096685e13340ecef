"""A file that grows while a training goes on: what a full disk does not take is written once there is room."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vitpa.room import is_full

LOGGER = logging.getLogger(__name__)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have errors of writing name the file, which an open file's errors do not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


class AppendedFile:
    """A file to which bytes are appended, as whole as they come: a full disk takes none of them, rather than a part.

    Those are kept in memory, in order, and written before what is appended next.
    """

    def __init__(self, path: Path, *, new: bool = False) -> None:
        """Open the file at its end; as a `new` one, which must not be there.

        Raises:
            OSError: it cannot be opened.
        """
        self._path = path
        self._file = path.open("xb" if new else "ab", buffering=0)
        self._size = os.fstat(self._file.fileno()).st_size
        self._kept = b""  # what the disk has not taken
        self._full = False

    def append(self, data: bytes) -> None:
        """Write `data`, or keep it while the disk is full.

        Raises:
            OSError: it cannot be written for another reason.
        """
        self._kept += data
        try:
            self._write()
        except OSError as error:
            if not is_full(error):
                raise
            if not self._full:
                LOGGER.warning(f"{self._path}: no space left; what is missing is written once there is some")
            self._full = True

    def sync(self) -> None:
        """Have the disk hold everything.

        Raises:
            OSError: it does not take it.
        """
        self._write()
        with naming(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write what is left.

        Raises:
            OSError: the disk does not take it.
        """
        try:
            self._write()
        finally:
            with naming(self._path):
                self._file.close()

    def _write(self) -> None:
        left = memoryview(self._kept)
        with naming(self._path):
            try:
                while left:
                    left = left[self._file.write(left) :]
            except OSError:
                self._file.seek(self._file.truncate(self._size))
                raise
        self._size += len(self._kept)
        self._kept = b""
        self._full = False
