"""Folders of what was compiled, a file each: written whole, with a checksum, the oldest removed where there are many.

One file suits a shared file system better than the hundreds of small ones that Inductor and Triton write. What is in it is
executed, so it is read only if nobody but this user can have written it. Torch-free.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from vitpa.data.private_folder import user_name
from vitpa.records import write_atomic

MAX_BYTES = 2 * 2**30  # of all archives in a folder
HEADER = b"vitpa compiled 1 "  # and the SHA-256 of the zip archive that follows in the next line
_DIGEST = 64
TRITON_GROUP = "__grp__"  # of a kernel: a file with the paths of its files


class ArchiveError(Exception):
    """An archive that is not used: why, with its name."""


def read_archive(path: Path, into: Path) -> bool:
    """Unpack an archive into a folder; False if there is none.

    Raises:
        ArchiveError: it is damaged, or another user can have written it.
        OSError: it cannot be read, or unpacked.
    """
    try:
        check_owner(path.parent, path.parent.stat())
        with path.open("rb") as file:
            check_owner(path, os.fstat(file.fileno()))  # of what is read, whatever takes its name meanwhile
            content = file.read()
    except FileNotFoundError:
        return False
    with suppress(OSError):  # of a folder that can only be read
        os.utime(path)  # it was used: the oldest go first
    begin = len(HEADER) + _DIGEST + 1
    packed = memoryview(content)[begin:]
    if content[:begin] != _header(packed):
        raise ArchiveError(f"{path}: is damaged")
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        archive.extractall(into)
    for group in into.rglob(f"{TRITON_GROUP}*"):
        _put_in_place(group)
    return True


def write_archive(path: Path, folder: Path) -> None:
    """Pack the files of a folder, in place of the archive that is there; the oldest of the others go if all are too large.

    Raises:
        ArchiveError: another user can write there.
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    check_owner(path.parent, path.parent.stat())
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for file in files_in(folder):
            with suppress(FileNotFoundError):  # a process that compiles has renamed it
                archive.write(file, file.relative_to(folder))
    data = packed.getbuffer()
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        write_atomic(path, b"".join([_header(data), data]), descriptor)  # no rights for the group, whatever the umask
    finally:
        os.close(descriptor)
    _remove_oldest(path)


def files_in(folder: Path) -> Iterator[Path]:
    """What is kept of a compiler's folder: all but locks and what is being written."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name != "locks" and not name.startswith("tmp."))
        yield from (Path(parent) / name for name in sorted(names) if not name.endswith((".lock", ".tmp")))


def check_owner(path: Path, status: os.stat_result) -> None:
    """Refuse what another user owns, a folder that anybody may write to, a file that the group may write to.

    In a folder of the group's, others can put files of their own in place of ours, which are refused.

    Raises:
        ArchiveError: so it is.
    """
    what = None
    if status.st_uid != os.geteuid():
        what = f"belongs to {user_name(status.st_uid)}"
    elif status.st_mode & stat.S_IWOTH:
        what = "can be written to by anybody"
    elif status.st_mode & stat.S_IWGRP and not stat.S_ISDIR(status.st_mode):
        what = "can be written to by its group"
    if what is not None:
        raise ArchiveError(f"{path}: {what}, and what lies there would be executed; name another folder")


def _header(packed: memoryview) -> bytes:
    return HEADER + hashlib.sha256(packed).hexdigest().encode() + b"\n"


def _put_in_place(group: Path) -> None:
    """Triton names the files of a kernel by their absolute paths: have them name those beside this file."""
    children = json.loads(group.read_bytes())["child_paths"]
    group.write_text(json.dumps({"child_paths": {name: str(group.parent / Path(old).name) for name, old in children.items()}}))


def _remove_oldest(newest: Path) -> None:
    """Remove the archives, and what killed processes have left of some, that were used longest ago, until the rest fits."""
    found = []
    for path in newest.parent.iterdir():
        with suppress(FileNotFoundError):  # another process has removed it
            status = path.stat()
            found.append((path == newest, status.st_mtime_ns, status.st_size, path))
    total = sum(size for _, _, size, _ in found)
    for is_newest, _, size, path in sorted(found):
        if total <= MAX_BYTES or is_newest:
            return
        path.unlink(missing_ok=True)
        total -= size
