"""The folder of a development cluster: ours alone, and locked as long as the cluster lives; whether one does.

It lies where others may write, such as in /tmp, so it is held by descriptors: no link or folder that another user puts in its
place is followed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
from pathlib import Path
from typing import NamedTuple, Self

from slurm.devcluster_config import LOG, RUN_TIME_FOLDERS, Layout, resolved
from vitpa.documents import regular_descriptor
from vitpa.errors import UserError


class DevClusterError(UserError):
    """What is wrong with a cluster, where, and how to fix it."""


class AlreadyRunningError(DevClusterError):
    """There is a cluster in this folder."""


class Claim(NamedTuple):
    """The folder of a cluster, held by descriptors; with `with` they are closed at the end."""

    folder: int
    lock: int  # of a file in it; it is locked as long as a copy of this is open

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.lock)
        os.close(self.folder)


def claim(root: Path) -> Claim:
    """Make the folder and lock it.

    Raises:
        AlreadyRunningError: a cluster, or another `start`, holds it.
        DevClusterError: it is not ours alone or cannot be written.
    """
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        while True:
            folder = open_folder(root)
            if folder is None:  # removed since: by the cluster that ended in it
                root.mkdir(mode=0o700, exist_ok=True)
                continue
            with contextlib.ExitStack() as stack:
                stack.callback(os.close, folder)
                lock = _claim_lock(root, folder)
                if lock is not None:
                    stack.pop_all()
                    return Claim(folder, lock)
    except OSError as error:
        raise DevClusterError(f"{error.filename or root}: {error.strerror}; choose another folder with --dir") from None


def _claim_lock(root: Path, folder: int) -> int | None:
    """The lock, taken; None if its last holder removed it, or the folder, in the meantime."""
    name = Layout(root).lock.name
    is_there = name in os.listdir(folder)
    if not is_there and os.listdir(folder):
        raise DevClusterError(f"{root} holds other things; choose an empty or new folder with --dir")
    try:
        lock = open_lock(root, folder, os.O_CREAT)
    except FileNotFoundError:
        return None
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, lock)
        if not _lock(lock):
            raise AlreadyRunningError(f"a cluster runs in {root}")
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), os.stat(name, dir_fd=folder, follow_symlinks=False)):
                stack.pop_all()
                return lock
    return None


def open_folder(root: Path) -> int | None:
    """A descriptor of a cluster's folder, which is no link; None if there is no folder.

    Raises:
        DevClusterError: another user owns it, or others may write to it: they could put links there.
    """
    try:
        folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except PermissionError:
        owner = root.stat().st_uid
        raise DevClusterError(f"{root} belongs to {_name_of(owner)}; choose another folder with --dir") from None
    status = os.fstat(folder)
    what = "" if status.st_uid == os.geteuid() else f"belongs to {_name_of(status.st_uid)}; choose another folder with --dir"
    if not what and status.st_mode & 0o022:
        what = f"can be written to by others (mode {status.st_mode & 0o7777:o}); chmod 700 {root}"
    if what:
        os.close(folder)
        raise DevClusterError(f"{root} {what}")
    return folder


def open_lock(root: Path, folder: int, flags: int = 0) -> int:
    """A descriptor of the lock in the folder of the descriptor `folder`.

    Raises:
        DevClusterError: something else has its name.
        FileNotFoundError: there is none, and `flags` do not make one.
    """
    path = Layout(root).lock
    try:
        return regular_descriptor(path, flags | os.O_RDWR, folder)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DevClusterError(f"{path}: {error.strerror}; it is not the lock of a cluster; remove it") from None


def _name_of(uid: int) -> str:
    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"user {uid}"


def clear(layout: Layout, folder: int) -> None:
    """Remove what an earlier cluster has left in the folder of the descriptor `folder`, and make one for logs.

    Raises:
        DevClusterError: there are folders of such names that no cluster has made.
    """
    layout.remove(folder, keep_logs=True)
    layout.remove_folder(LOG, folder)
    strange = sorted({*RUN_TIME_FOLDERS, LOG} & set(os.listdir(folder)))
    if strange:
        raise DevClusterError(
            f"{layout.root / strange[0]} is not of a cluster; remove it, or choose another folder with --dir"
        )
    layout.make_folder(LOG, folder)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_running(root: Path) -> bool:
    """Whether a cluster lives in this folder.

    Raises:
        DevClusterError: it is not ours.
    """
    try:
        folder = open_folder(resolved(root))
    except NotADirectoryError:
        return False
    except OSError as error:
        raise DevClusterError(f"{error.filename}: {error.strerror}") from None
    if folder is None:
        return False
    try:
        lock = open_lock(root, folder)
    except FileNotFoundError:
        return False
    finally:
        os.close(folder)
    try:
        return not _lock(lock)
    finally:
        os.close(lock)
