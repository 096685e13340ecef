"""Whether a disk has room: what cannot be written on a full one is no fault of whoever writes."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

BYTES = 1 << 20  # more than the records of an attempt
FULL = (errno.ENOSPC, errno.EDQUOT)


def has_room(folder: Path) -> bool:
    """Whether BYTES can be written below `folder`; True, too, where something else than a full disk or quota is in the way."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:  # statvfs knows nothing of quotas
            file.write(bytes(BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno not in FULL
    return True
