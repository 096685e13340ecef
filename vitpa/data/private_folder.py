"""Folders on a disk that others use, too, in which nobody else can have put, or can exchange, anything.

A folder is opened step by step without following links, has to be ours, and is held by its descriptor: all that is done in it
is done relative to that, so that nothing changes if another user renames or replaces it meanwhile.
"""

from __future__ import annotations

import os
import pwd
import stat
from contextlib import suppress
from pathlib import Path
from typing import Self

from vitpa.documents import open_regular
from vitpa.records import create_exclusive, write_atomic

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
MAX_BYTES = 1 << 20  # of what `read` reads


class NotOursError(Exception):
    """A folder or a file that others have made or may change: what, and whose it is."""


class PrivateFolder:
    """A folder of this user that nobody else can enter; with `with` it is closed at the end.

    Attributes:
        path: Its path, for words only.
        descriptor: What to use it by.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self.descriptor = path, descriptor

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open `path`, or make it. Links are followed up to its parent, which may be anybody's; it may not be one itself.

        Raises:
            NotOursError: another user owns it, others may write to it, or it is no folder.
            OSError: it cannot be made.
        """
        parent = os.open(path.parent, FOLDER)
        try:
            return cls(path, _open_below(parent, path))
        finally:
            os.close(parent)

    def folder(self, name: str) -> Self:
        """A folder in this one, which is made if it is not there; raises as `open`."""
        return type(self)(self.path / name, _open_below(self.descriptor, self.path / name))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)

    def names(self) -> list[str]:
        """What is in it."""
        return os.listdir(self.descriptor)  # noqa: PTH208 - by the descriptor

    def status(self, name: str) -> os.stat_result | None:
        """Of a file, or of a link itself; None if there is none."""
        try:
            return os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def read(self, name: str) -> bytes | None:
        """What a small file holds; None if there is none.

        Raises:
            NotOursError: it is no file of ours.
        """
        try:
            file = open_regular(self.path / name, self.descriptor)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise NotOursError(f"{self.path / name} cannot be read ({error.strerror})") from error
        with file:
            temporary = self._temporary_names(name, file.fileno())  # first: the file's own status must not be older
            if not is_private_file(os.fstat(file.fileno()), names=1 + temporary):
                raise NotOursError(f"{self.path / name} is not a file of your own")
            return file.read(MAX_BYTES)

    def _temporary_names(self, name: str, descriptor: int) -> int:
        """How many names beside `name` the file has from `create`, which takes the temporary one away last."""
        found = [self.status(other) for other in self.names() if other.startswith(f".{name}.")]
        return sum(os.path.samestat(status, os.fstat(descriptor)) for status in found if status is not None)

    def new_file(self, name: str) -> int:
        """A descriptor of a file that did not exist, to be written and read."""
        return os.open(name, NEW_FILE, 0o600, dir_fd=self.descriptor)

    def write(self, name: str, data: str) -> None:
        """Write a file so that it holds all of `data`, or what it held before."""
        write_atomic(self.path / name, data, self.descriptor)

    def create(self, name: str, data: str) -> bool:
        """Make a file with all of `data`; False if there is one. Exactly one of several callers gets True."""
        return create_exclusive(self.path / name, data, self.descriptor)

    def rename(self, name: str, to: str) -> None:
        """Rename a file; one that is there gives way."""
        os.replace(name, to, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there; of a link not what it leads to.

        Raises:
            NotOursError: it is a folder, which nobody has asked to be emptied.
        """
        try:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self.descriptor)
        except IsADirectoryError as error:
            raise NotOursError(f"{self.path / name} is a folder where a file should be; remove it") from error


def is_private_file(status: os.stat_result, names: int = 1) -> bool:
    """Whether this is a file of ours that nobody else can change, and that has no more names than `names`."""
    ours = status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return ours and stat.S_ISREG(status.st_mode) and status.st_nlink <= names


def _open_below(parent: int, path: Path) -> int:
    """Open `path`, which lies in the folder of the descriptor `parent`; it is made if it is not there."""
    with suppress(FileExistsError):
        os.mkdir(path.name, 0o700, dir_fd=parent)
    try:
        descriptor = os.open(path.name, FOLDER | os.O_NOFOLLOW, dir_fd=parent)
    except NotADirectoryError:  # also if it is a link
        status = os.stat(path.name, dir_fd=parent, follow_symlinks=False)
        what = "a link" if stat.S_ISLNK(status.st_mode) else "no folder"
        raise NotOursError(f"{path} is {what} (of {user_name(status.st_uid)}); {_hint(status.st_uid)}") from None
    except PermissionError:
        owner = os.stat(path.name, dir_fd=parent, follow_symlinks=False).st_uid
        raise NotOursError(f"{path} belongs to {user_name(owner)} and cannot be opened; {_hint(owner)}") from None
    try:
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid():
            raise NotOursError(f"{path} belongs to {user_name(status.st_uid)}; {_hint(status.st_uid)}")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise NotOursError(
                f"others may write to {path} (mode {stat.S_IMODE(status.st_mode):o}), so what lies there may be theirs; "
                f"remove it: rm -r {path}"
            )
        if status.st_mode & 0o077:
            os.fchmod(descriptor, 0o700)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def user_name(uid: int) -> str:
    """The name of a user, with the number where there is none."""
    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"user {uid}"


def _hint(owner: int) -> str:
    return "remove it" if owner == os.geteuid() else "have it removed, by that user or an administrator"
