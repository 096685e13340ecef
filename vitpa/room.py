"""Whether a disk has room: what cannot be written on a full one is no fault of whoever writes."""

from __future__ import annotations

import errno
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

WAIT_S = 1800.0  # for room on a full disk
POLL_S = 5.0
BYTES = 1 << 20  # more than the records of an attempt
FULL = (errno.ENOSPC, errno.EDQUOT)


def is_full(error: OSError) -> bool:
    """Whether it says that the disk is full, or the user's quota of it used up."""
    return error.errno in FULL


def has_room(folder: Path) -> bool:
    """Whether BYTES can be written below `folder`; True, too, where something else than a full disk or quota is in the way."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:  # statvfs knows nothing of quotas
            file.write(bytes(BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return not is_full(error)
    return True


def wait_for_room(folder: Path, *, stop: Callable[[], bool], limit_s: float = WAIT_S) -> None:
    """Wait while the disk of `folder` is full, at most `limit_s` seconds and until `stop`; the next one would find it full."""
    deadline = time.monotonic() + limit_s
    while not has_room(folder) and time.monotonic() < deadline and not stop():
        print(f"{folder}: no space left; waiting for some", flush=True)
        time.sleep(POLL_S)
