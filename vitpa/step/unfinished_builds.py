"""What a killed process leaves unfinished in the caches of torch's compilers, which look only whether a file exists.

Inductor has the C++ compiler write libraries and objects in place, under a lock per library; all else is renamed into place,
and is empty at the most where the machine lost power. A library that cannot be loaded makes each later compilation fail, and
one of those by which Inductor finds out what the CPU can do makes the code slow.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout
from torch._inductor.runtime.cache_dir_utils import cache_dir

BUILT = (".so", ".o")
READ_BACK = (*BUILT, ".gch", ".cpp", ".h", ".py", ".json", ".best_config", ".cubin", ".ptx", ".ttir", ".ttgir", ".llir")
_ELF_HEADER_BYTES = 64


def cache_folders() -> list[Path]:
    """Where Inductor and Triton keep what they have compiled."""
    folders = [Path(cache_dir())]
    if triton := os.environ.get("TRITON_CACHE_DIR"):
        folders.append(Path(triton))
    return folders


def remove_unfinished() -> list[Path]:
    """Remove the unfinished files from the caches, unless a process is at work on them; which they were.

    What another process needs of them it compiles anew: it could not have used them.
    """
    locks = Path(cache_dir()) / "locks"
    return [path for folder in cache_folders() for path in _files_in(folder) if _remove_if_unfinished(path, locks)]


def _files_in(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != "locks" and not name.startswith("tmp.")]  # of live ones
        yield from (Path(parent) / name for name in names if name.endswith(READ_BACK) and not name.startswith((".", "_")))


def _remove_if_unfinished(path: Path, locks: Path) -> bool:
    if not _is_unfinished(path):
        return False
    try:
        locks.mkdir(exist_ok=True)
        with FileLock(locks / f"{path.name.split('.')[0]}.lock", timeout=0):  # Inductor's own, held while it builds
            if _is_unfinished(path):
                path.unlink()
                return True
    except (OSError, Timeout):
        pass
    return False


def _is_unfinished(path: Path) -> bool:
    """Whether a file is empty or, of those that the C++ compiler builds, ends before its table of sections (ELF-64)."""
    with suppress(OSError):
        size = path.stat().st_size
        if size == 0 or not path.name.endswith(BUILT):
            return size == 0
        with path.open("rb") as file:
            header = file.read(_ELF_HEADER_BYTES)
        if len(header) < _ELF_HEADER_BYTES or header[:5] != b"\x7fELF\x02":
            return header[:4] == b"\x7fELF"[: len(header)] and len(header) < _ELF_HEADER_BYTES
        (start,) = struct.unpack_from("<Q", header, 0x28)
        entry_bytes, entries = struct.unpack_from("<HH", header, 0x3A)
        return bool(size < start + entry_bytes * entries or start == 0)
    return False
