"""What an error of the operating system says to people: where, what, how to fix it."""

from __future__ import annotations

import errno

HINTS = {
    errno.ENOSPC: "free some space and start again",
    errno.EDQUOT: "free some of your quota and start again",
    errno.EACCES: "choose a place that you may read and write, or have its rights changed",
    errno.EPERM: "choose a place that you may read and write, or have its rights changed",
    errno.EROFS: "choose a place that can be written to",
}


def os_error_line(error: OSError) -> str:
    """`/root/runs: Permission denied; choose a place ...`."""
    if error.errno is None or error.strerror is None:  # not of the system: somebody's own words
        return str(error)
    where = f"{error.filename}: " if error.filename else ""
    hint = f"; {HINTS[error.errno]}" if error.errno in HINTS else ""
    return f"{where}{error.strerror}{hint}"
