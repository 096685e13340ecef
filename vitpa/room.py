"""Whether a disk has room: what cannot be written on a full one is no fault of whoever writes."""

from __future__ import annotations

import errno
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

WAIT_S = 1800.0  # for room on a full disk
POLL_S = 5.0
BYTES = 1 << 20  # more than the records of an attempt
GIB = 2**30
MIN_FREE_INODES = 1000
FULL = (errno.ENOSPC, errno.EDQUOT)


def is_full(error: OSError) -> bool:
    """Whether it says that the disk is full, or the user's quota of it used up."""
    return error.errno in FULL


def shortage(folder: Path, min_free_gib: float | None = None) -> str:
    """What the disk of `folder` is short of, in words; empty if BYTES can be written there and enough would be left.

    Args:
        folder: Where to look.
        min_free_gib: Enough, in GiB, beside MIN_FREE_INODES; None: any rest is.

    Raises:
        OSError: Something else than a full disk or quota is in the way.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:  # statvfs knows nothing of quotas and missing rights
            file.write(bytes(BYTES))
            file.flush()
            os.fsync(file.fileno())
        disk = os.statvfs(folder)
    except OSError as error:
        if is_full(error):
            return f"{folder}: {error.strerror}"
        raise
    free_gib = disk.f_bavail * disk.f_frsize / GIB
    if min_free_gib is not None and free_gib < min_free_gib:
        return f"{folder}: {free_gib:.1f} GiB free, {min_free_gib:g} are wanted"
    if min_free_gib is not None and disk.f_files and disk.f_favail < MIN_FREE_INODES:  # some file systems do not count
        return f"{folder}: room for {disk.f_favail} more files, {MIN_FREE_INODES} are wanted"
    return ""


def has_room(folder: Path) -> bool:
    """Whether BYTES can be written below `folder`; True, too, where something else than a full disk or quota is in the way."""
    return not _known_shortage(folder)


def wait_for_room(
    folder: Path, *, min_free_gib: float | None = None, stop: Callable[[], bool], limit_s: float = WAIT_S
) -> None:
    """Wait while the disk of `folder` is short of room, at most `limit_s` seconds and until `stop`.

    `min_free_gib`: what a run wants before it begins (see `shortage`); None: the disk just must not be full.
    """
    deadline = time.monotonic() + limit_s
    while (short := _known_shortage(folder, min_free_gib)) and time.monotonic() < deadline and not stop():
        print(f"{short}; waiting for room", flush=True)
        time.sleep(POLL_S)


def _known_shortage(folder: Path, min_free_gib: float | None = None) -> str:
    with suppress(OSError):  # whoever goes on says what else is in the way
        return shortage(folder, min_free_gib)
    return ""
