"""The disk of a history: a real folder, whose file operations can be counted, delayed, cut short by a crash, and undone.

What was not synced can be lost: of a file all after its last fsync, of a folder the entries that came and went after its last
fsync, each folder for itself, as POSIX allows, until the kernel has written them by itself. As on NFS a host may go on for a
while not to see what it has looked for in vain, or not to list what is new in a folder that it has listed; creating an entry
exclusively fails there at once, since that is for the server to say.
"""

from __future__ import annotations

import builtins
import io
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.simulation.processes import Killed, Process, set_this_process, this_process

REAL: dict[str, Any] = {
    name: getattr(os, name)
    for name in (
        *("open", "close", "fdopen", "fsync", "link", "unlink", "remove", "rename", "replace", "mkdir", "rmdir", "symlink"),
        *("stat", "lstat", "listdir", "scandir", "readlink"),
    )
}
REAL_OPEN = builtins.open
ENTRIES_WRITTEN_S, DATA_WRITTEN_S = 5.0, 30.0  # by the kernel, unasked: ext4's defaults
SHADOW = ".shadow"  # beside the root: what was removed or replaced, as long as that can be undone


@dataclass(eq=False)
class Change:
    """An entry of a folder, or of two, that came or went, and how that is undone."""

    folders: tuple[int, ...]  # inodes
    undo: Callable[[dict[int, int]], None]  # given descriptors of folders by their inodes
    number: int
    time_s: float


@dataclass
class Written:
    """A file that was written to."""

    host: str
    size: int = 0
    synced: int = 0
    time_s: float = 0.0  # of the last write


@dataclass
class Faults:
    """How likely it is that an operation takes long, that an entry is seen late by others, and who notes operations."""

    pause: float = 0.0  # before or after a change
    look_pause: float = 0.0  # before a look
    late: float = 0.0
    late_s: float = 0.0  # at most
    watch: Callable[[Process, str, str, bool], None] | None = None  # each change: what, where, whether it is done


class Disk:
    """All file operations of simulated processes below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.faults = Faults()
        self.missed: dict[str, set[str]] = {}  # what a host has looked for in vain, or listed the folder of
        self.listed: dict[str, set[str]] = {}
        self.late: dict[tuple[str, str], float] = {}  # when a host finds an entry that is there
        self.late_in_list: dict[tuple[str, str], float] = {}
        self.descriptors: dict[int, str] = {}
        self.writing: dict[int, Written] = {}  # by descriptor
        self.written: dict[int, Written] = {}  # by inode
        self.changes: dict[int, list[Change]] = {}  # by the inode of the folder, oldest first
        self.number = 0

    def begin(self, faults: Faults) -> None:
        """An empty disk."""
        for folder in (self.root, self.root + SHADOW):
            shutil.rmtree(folder, ignore_errors=True)
            REAL["mkdir"](folder)
        self.faults, self.number = faults, 0
        for table in (
            *(self.missed, self.listed, self.late, self.late_in_list),
            *(self.descriptors, self.writing, self.written, self.changes),
        ):
            table.clear()

    # --- who sees what

    def path_of(self, path: Any, dir_fd: int | None) -> str | None:
        """The absolute path of something below the root; None for what is elsewhere."""
        if isinstance(path, int):
            return None
        text = os.fspath(path)
        if dir_fd is not None:
            folder = self.descriptors.get(dir_fd)
            return None if folder is None else f"{folder}/{text}"
        ours = isinstance(text, str) and text.startswith(self.root) and text[len(self.root) :][:1] in ("", "/")
        return text if ours else None

    def look(self, process: Process, path: str) -> None:
        """Before a process looks at something.

        Raises:
            FileNotFoundError: it does not see it yet.
        """
        if process.dead:
            raise Killed
        if self.faults.look_pause and process.park.random.random() < self.faults.look_pause:
            self._pause(process)
        if self.late and self._is_late(process, path):
            raise FileNotFoundError(2, "No such file or directory", path)

    def hides(self, now_s: float, *, host: str = "", folder: str = "") -> bool:
        """Whether a host, or any, does not find something yet at that time that is there, below a folder."""
        late = (*self.late.items(), *self.late_in_list.items())
        return any(until_s > now_s and host in ("", whose) and path.startswith(folder) for (whose, path), until_s in late)

    def _is_late(self, process: Process, path: str) -> bool:
        """Whether a process does not see an entry, or a folder that it is in, yet."""
        host, end = process.host.name, len(path)
        while end > len(self.root):
            if self.late.get((host, path[:end]), 0.0) > process.park.now_s:
                return True
            end = path.rfind("/", 0, end)
        return False

    def missing(self, process: Process, path: str) -> None:
        """A process has looked for something in vain: its host remembers that for a while."""
        if self.faults.late:
            self.missed.setdefault(process.host.name, set()).add(path)

    def names(self, process: Process, folder: str, names: list[str]) -> list[str]:
        """What a process is told of the names in a folder."""
        if self.faults.late:
            self.listed.setdefault(process.host.name, set()).add(folder)
        host, now_s = process.host.name, process.park.now_s
        return sorted(name for name in names if self.late_in_list.get((host, f"{folder}/{name}"), 0.0) <= now_s)

    def _pause(self, process: Process) -> None:
        park = process.park
        process.wait_until(park.now_s + park.random.choice((0.0, 0.0, 0.05, 0.4, 2.0)))

    # --- changes

    def before(self, process: Process, what: str, path: str) -> None:
        if process.dead:
            raise Killed
        if self.faults.pause and process.park.random.random() < self.faults.pause:
            self._pause(process)
        if self.faults.watch is not None:
            self.faults.watch(process, what, path, False)

    def after(self, process: Process, what: str, path: str) -> None:
        if self.faults.watch is not None:
            self.faults.watch(process, what, path, True)
        if self.faults.pause and process.park.random.random() < self.faults.pause:
            self._pause(process)

    def appears(self, process: Process, path: str) -> None:
        """A new entry is there: for its maker at once, for others when they do not rely on an earlier look any more."""
        park, folder = process.park, path.rpartition("/")[0]
        if not self.faults.late:
            return
        for hosts, what, late in ((self.missed, path, self.late), (self.listed, folder, self.late_in_list)):
            for host, seen in hosts.items():
                if host != process.host.name and what in seen and park.random.random() < self.faults.late:
                    late[host, path] = park.now_s + park.random.uniform(0, self.faults.late_s)
                    seen.discard(what)

    def found(self, process: Process, path: str) -> None:
        """A host has learnt from the server that an entry is there."""
        self.late.pop((process.host.name, path), None)

    def note(self, process: Process, folders: tuple[int, ...], undo: Callable[[dict[int, int]], None]) -> None:
        self.number += 1
        change = Change(tuple(dict.fromkeys(folders)), undo, self.number, process.park.now_s)
        for folder in change.folders:
            self.changes.setdefault(folder, []).append(change)

    def shadow(self, path: str) -> str | None:
        """Keep what is about to be removed or replaced; None for what is not there, or a folder."""
        try:
            if stat.S_ISDIR(REAL["lstat"](path).st_mode):
                return None
        except FileNotFoundError:
            return None
        self.number += 1
        kept = f"{self.root}{SHADOW}/{self.number}"
        REAL["link"](path, kept, follow_symlinks=False)
        return kept

    def synced(self, folder: int) -> None:
        """The entries of a folder are on the disk; with those that went to another one those that went before there."""
        for change in self.changes.pop(folder, []):
            for other in change.folders:
                theirs = self.changes.get(other, [])
                if other != folder and change in theirs:
                    rest = theirs[theirs.index(change) + 1 :]
                    self.changes[other] = theirs[: theirs.index(change) + 1]
                    self.synced(other)
                    self.changes[other] = rest

    # --- losses

    def lose_data(self, now_s: float, choose: Callable[[int], int], host: str | None = None) -> None:
        """Of files written by a host, or by all, lose what was not synced from some place on; `choose(n)` is one of 0 to n."""
        for folder, folders, names in os.walk(self.root):
            folders.sort()
            for name in sorted(names):
                path = f"{folder}/{name}"
                found = REAL["lstat"](path)
                written = self.written.get(found.st_ino)
                if written is None or (host is not None and written.host != host) or written.synced >= found.st_size:
                    continue
                if written.time_s < now_s - DATA_WRITTEN_S:
                    continue
                os.truncate(path, written.synced + choose(found.st_size - written.synced))
                written.size = written.synced = REAL["lstat"](path).st_size

    def lose_entries(self, now_s: float, choose: Callable[[int], int]) -> None:
        """Of each folder, undo the changes that were not synced from some change on; `choose(n)` is one of 0 to n."""
        lost: dict[int, Change] = {}
        for changes in self.changes.values():
            young = [change for change in changes if change.time_s >= now_s - ENTRIES_WRITTEN_S]
            for change in young[choose(len(young)) :]:
                lost[change.number] = change
        todo = list(lost.values())
        while todo:
            change = todo.pop()
            for folder in change.folders:
                for later in self.changes.get(folder, []):
                    if later.number > change.number and later.number not in lost:
                        lost[later.number] = later
                        todo.append(later)
        folders = {}
        for path in [self.root, *(f"{folder}/{name}" for folder, names, _ in os.walk(self.root) for name in names)]:
            if not stat.S_ISLNK(REAL["lstat"](path).st_mode):
                descriptor = REAL["open"](path, os.O_RDONLY | os.O_DIRECTORY)
                folders[os.fstat(descriptor).st_ino] = descriptor
        for number in sorted(lost, reverse=True):
            if all(folder in folders for folder in lost[number].folders):  # else it was removed itself
                lost[number].undo(folders)
        for descriptor in folders.values():
            REAL["close"](descriptor)
        self.changes.clear()
        self.late.clear()
        self.late_in_list.clear()


def is_there(path: str) -> bool:
    """Whether an entry is there, whoever sees it."""
    try:
        REAL["lstat"](path)
    except OSError:
        return False
    return True


def remove_entry(folder: int, name: str) -> None:
    """Remove an entry of a folder, given by its descriptor, whatever it is."""
    try:
        if stat.S_ISDIR(REAL["lstat"](name, dir_fd=folder).st_mode):
            shutil.rmtree(f"/proc/self/fd/{folder}/{name}")
        else:
            REAL["unlink"](name, dir_fd=folder)
    except FileNotFoundError:
        pass


def inode(path: str) -> int:
    return int(REAL["stat"](path).st_ino)


@contextmanager
def real_files() -> Iterator[None]:
    """In the body a simulated process has the real operations."""
    process = this_process()
    set_this_process(None)
    try:
        yield
    finally:
        set_this_process(process)


class WrittenFile:
    """A file that a simulated process writes: what it has not flushed is lost with it."""

    def __init__(self, disk: Disk, descriptor: int, *, text: bool, buffering: int = -1) -> None:
        self.disk, self.descriptor, self.text, self.buffering = disk, descriptor, text, buffering
        self.name = disk.descriptors[descriptor]
        self.buffer = b""
        self.closed = False

    def write(self, data: Any) -> int:
        self.buffer += data.encode() if self.text else bytes(data)
        if self.buffering == 0 or (self.buffering == 1 and self.buffer.endswith(b"\n")):
            self.flush()
        return len(data)

    def flush(self) -> None:
        process = this_process()
        if self.buffer and process is not None:
            self.disk.before(process, "write", self.name)
            os.write(self.descriptor, self.buffer)
            self.disk.writing[self.descriptor].size += len(self.buffer)
            self.disk.writing[self.descriptor].time_s = process.park.now_s
            self.buffer = b""
            self.disk.after(process, "write", self.name)

    def fileno(self) -> int:
        return self.descriptor

    def close(self) -> None:
        process = this_process()
        if self.closed:
            return
        self.closed = True
        try:
            if process is not None and not process.dead:
                self.flush()
        finally:
            os.close(self.descriptor)

    def __enter__(self) -> WrittenFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class Operations:
    """What replaces the functions of `os` while histories run; processes that are not simulated get the real ones."""

    disk: Disk
    replaced: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def installed(self) -> Iterator[None]:
        for name in REAL:
            setattr(os, name, getattr(self, name))
        builtins.open = io.open = self.open_file  # type: ignore[assignment]
        try:
            yield
        finally:
            for name, function in REAL.items():
                setattr(os, name, function)
            builtins.open = io.open = REAL_OPEN

    def _here(self, path: Any, dir_fd: int | None = None) -> tuple[Process, str] | None:
        process = this_process()
        if process is None:
            return None
        found = self.disk.path_of(path, dir_fd)
        return None if found is None else (process, found)

    def open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        here = self._here(path, dir_fd)
        if here is None:
            descriptor = REAL["open"](path, flags, mode, dir_fd=dir_fd)
            if this_process() is not None:
                self._forget(descriptor)
            return int(descriptor)
        process, name = here
        disk = self.disk
        writes = flags & (os.O_WRONLY | os.O_RDWR)
        new = False
        if flags & os.O_CREAT:
            new = not is_there(name)
            if new:
                disk.before(process, "create", name)
                new = not is_there(name)
            elif process.dead:
                raise Killed
        else:
            disk.look(process, name)
        try:
            descriptor = REAL["open"](path, flags, mode, dir_fd=dir_fd)
        except FileNotFoundError:
            disk.missing(process, name)
            raise
        except FileExistsError:
            disk.found(process, name)
            raise
        self._forget(descriptor)
        found = os.fstat(descriptor)
        disk.descriptors[descriptor] = name
        if writes:
            size = found.st_size
            disk.writing[descriptor] = disk.written.setdefault(found.st_ino, Written(process.host.name, size, size))
            disk.writing[descriptor].host = process.host.name
        if new:
            disk.written[found.st_ino] = disk.writing[descriptor] = Written(process.host.name)
            folder, _, entry = name.rpartition("/")
            number = inode(folder)
            disk.note(process, (number,), lambda folders: remove_entry(folders[number], entry))
            disk.appears(process, name)
            try:
                disk.after(process, "create", name)
            except Killed:
                os.close(descriptor)
                raise
        return int(descriptor)

    def _forget(self, descriptor: int) -> None:
        self.disk.descriptors.pop(descriptor, None)
        self.disk.writing.pop(descriptor, None)

    def close(self, descriptor: int) -> None:
        if this_process() is not None:
            self._forget(descriptor)
        REAL["close"](descriptor)

    def fdopen(self, descriptor: int, mode: str = "r", *more: Any, **keys: Any) -> Any:
        if this_process() is not None and descriptor in self.disk.writing:
            return WrittenFile(self.disk, descriptor, text="b" not in mode)
        return REAL["fdopen"](descriptor, mode, *more, **keys)

    def open_file(self, path: Any, mode: str = "r", buffering: int = -1, *more: Any, **keys: Any) -> Any:
        here = None if isinstance(path, int) else self._here(path)
        if here is None:
            return REAL_OPEN(path, mode, buffering, *more, **keys)
        if "r" in mode and "+" not in mode:
            return self._looking(here, lambda: REAL_OPEN(path, mode, buffering, *more, **keys))
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
        flags |= os.O_APPEND if "a" in mode else os.O_EXCL if "x" in mode else os.O_TRUNC
        return WrittenFile(self.disk, self.open(path, flags, 0o666), text="b" not in mode, buffering=buffering)

    def fsync(self, descriptor: int) -> None:
        process = this_process()
        name = self.disk.descriptors.get(descriptor) if process is not None else None
        if process is None or name is None:
            REAL["fsync"](descriptor)
            return
        self.disk.before(process, "fsync", name)
        found = os.fstat(descriptor)
        written = self.disk.written.get(found.st_ino)
        if stat.S_ISDIR(found.st_mode):
            self.disk.synced(found.st_ino)
        elif written is not None and written.host == process.host.name:  # what another host has is not for this one to write
            written.synced = written.size
        self.disk.after(process, "fsync", name)

    def link(
        self,
        source: Any,
        target: Any,
        *,
        src_dir_fd: int | None = None,
        dst_dir_fd: int | None = None,
        follow_symlinks: bool = True,
    ) -> None:
        here = self._here(target, dst_dir_fd)
        more = {"src_dir_fd": src_dir_fd, "dst_dir_fd": dst_dir_fd, "follow_symlinks": follow_symlinks}
        self._new_entry(here, "link", lambda: REAL["link"](source, target, **more))

    def symlink(self, source: Any, target: Any, target_is_directory: bool = False, *, dir_fd: int | None = None) -> None:
        make = REAL["symlink"]
        self._new_entry(self._here(target, dir_fd), "symlink", lambda: make(source, target, dir_fd=dir_fd))

    def mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        self._new_entry(self._here(path, dir_fd), "mkdir", lambda: REAL["mkdir"](path, mode, dir_fd=dir_fd))

    def _new_entry(self, here: tuple[Process, str] | None, what: str, make: Callable[[], None]) -> None:
        if here is None:
            make()
            return
        process, name = here
        disk = self.disk
        if process.dead:
            raise Killed
        if not is_there(name):
            disk.before(process, what, name)
        if is_there(name):  # refused, without a change
            disk.found(process, name)
            make()
            return
        make()
        folder, _, entry = name.rpartition("/")
        number = inode(folder)
        disk.note(process, (number,), lambda folders: remove_entry(folders[number], entry))
        disk.appears(process, name)
        disk.after(process, what, name)

    def unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        here = self._here(path, dir_fd)
        if here is None:
            REAL["unlink"](path, dir_fd=dir_fd)
            return
        process, name = here
        disk = self.disk
        disk.look(process, name)
        if is_there(name):
            disk.before(process, "unlink", name)
        folder, _, entry = name.rpartition("/")
        kept, number = disk.shadow(name), inode(folder)
        REAL["unlink"](path, dir_fd=dir_fd)
        if kept is not None:
            disk.note(process, (number,), lambda folders: _restore(kept, folders[number], entry))
        disk.after(process, "unlink", name)

    remove = unlink

    def rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        here = self._here(path, dir_fd)
        if here is None:
            REAL["rmdir"](path, dir_fd=dir_fd)
            return
        process, name = here
        self.disk.before(process, "rmdir", name)
        REAL["rmdir"](path, dir_fd=dir_fd)
        folder, _, entry = name.rpartition("/")
        number = inode(folder)
        self.disk.note(process, (number,), lambda folders: REAL["mkdir"](entry, dir_fd=folders[number]))
        self.disk.after(process, "rmdir", name)

    def rename(self, source: Any, target: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None:
        here, there = self._here(source, src_dir_fd), self._here(target, dst_dir_fd)
        if here is None or there is None:
            REAL["rename"](source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
            return
        process, old = here
        new = there[1]
        disk = self.disk
        disk.look(process, old)
        if is_there(old):
            disk.before(process, "rename", new)
        before = is_there(new)
        kept = disk.shadow(new)
        REAL["rename"](source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
        (from_folder, _, from_entry), (to_folder, _, to_entry) = old.rpartition("/"), new.rpartition("/")
        one, other = inode(from_folder), inode(to_folder)

        def undo(folders: dict[int, int]) -> None:
            REAL["rename"](to_entry, from_entry, src_dir_fd=folders[other], dst_dir_fd=folders[one])
            if kept is not None:
                _restore(kept, folders[other], to_entry)

        disk.note(process, (one, other), undo)
        if not before:
            disk.appears(process, new)
        disk.after(process, "rename", new)

    replace = rename

    def _looking(self, here: tuple[Process, str] | None, look: Callable[[], Any]) -> Any:
        if here is None:
            return look()
        self.disk.look(*here)
        try:
            return look()
        except FileNotFoundError:
            self.disk.missing(*here)
            raise

    def stat(self, path: Any, *, dir_fd: int | None = None, follow_symlinks: bool = True) -> os.stat_result:
        here = self._here(path, dir_fd)
        found: os.stat_result = self._looking(here, lambda: REAL["stat"](path, dir_fd=dir_fd, follow_symlinks=follow_symlinks))
        return found

    def lstat(self, path: Any, *, dir_fd: int | None = None) -> os.stat_result:
        return self.stat(path, dir_fd=dir_fd, follow_symlinks=False)

    def readlink(self, path: Any, *, dir_fd: int | None = None) -> Any:
        return self._looking(self._here(path, dir_fd), lambda: REAL["readlink"](path, dir_fd=dir_fd))

    def listdir(self, path: Any = ".") -> list[Any]:
        here = None if isinstance(path, int) else self._here(path)
        names = list(self._looking(here, lambda: REAL["listdir"](path)))
        return names if here is None else self.disk.names(*here, names)

    def scandir(self, path: Any = ".") -> Any:
        here = None if isinstance(path, int) else self._here(path)
        entries = self._looking(here, lambda: REAL["scandir"](path))
        if here is None:
            return entries
        with entries:
            by_name = {entry.name: entry for entry in entries}
        return _Entries([by_name[name] for name in self.disk.names(*here, list(by_name))])


class _Entries:
    """What `os.scandir` returns."""

    def __init__(self, entries: list[os.DirEntry[str]]) -> None:
        self.entries = iter(entries)

    def __iter__(self) -> Iterator[os.DirEntry[str]]:
        return self.entries

    def __next__(self) -> os.DirEntry[str]:
        return next(self.entries)

    def close(self) -> None:
        pass

    def __enter__(self) -> _Entries:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _restore(kept: str, folder: int, name: str) -> None:
    REAL["link"](kept, name, dst_dir_fd=folder, follow_symlinks=False)
