"""A disk that can be full: a tmpfs that only this process and its children see, as root or not. Linux only.

It lies in a mount namespace of this process's own (unshare(2)), without root in a user namespace of its own, too; nothing
of it is left when the last process in it ends.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

CLONE_NEWNS, CLONE_NEWUSER = 0x0002_0000, 0x1000_0000  # unshare(2)
MS_REMOUNT, MS_REC, MS_PRIVATE = 0x20, 0x4000, 1 << 18  # mount(2)
MNT_DETACH = 2  # umount2(2)
PAGE = 4096


class PrivateDisk:
    """An empty file system at a path, which is full when it is told to be.

    Raises:
        OSError: this machine does not let the user have one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        _enter_namespace()
        _call("mount", b"none", b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None)
        _call("mount", b"tmpfs", os.fsencode(path), b"tmpfs", ctypes.c_ulong(0), b"mode=700")

    def fill(self, left: int = 0) -> None:
        """Leave no room but `left` bytes: it is hardly larger than what it holds."""
        found = os.statvfs(self.path)
        self._resize(str(max(PAGE, (found.f_blocks - found.f_bfree) * found.f_frsize + left)))  # 0 would mean any size

    def free(self) -> None:
        """Give it room again: half of the machine's memory, as a tmpfs has by default."""
        self._resize("50%")

    def leave(self) -> None:
        """Give up the disk and what it holds."""
        _call("umount2", os.fsencode(self.path), MNT_DETACH)

    def _resize(self, size: str) -> None:
        _call("mount", None, os.fsencode(self.path), None, ctypes.c_ulong(MS_REMOUNT), f"size={size}".encode())


def _enter_namespace() -> None:
    """Have mounts of this process's own; it must have one thread only."""
    user, group = os.geteuid(), os.getegid()
    try:
        _call("unshare", CLONE_NEWNS)
    except PermissionError:
        if user == 0:  # a root that may little; in a user namespace SLURM's daemons could not drop root's groups
            raise
        _call("unshare", CLONE_NEWNS | CLONE_NEWUSER)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")


def _call(name: str, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
