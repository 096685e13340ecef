"""Records as files: written whole or not at all, created by one process only, and known by their checksums."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from vitpa.child_process import stat_of_living
from vitpa.documents import JSON_BYTES, DocumentError, parse_json, read_bytes
from vitpa.errors import UserError

Json = Mapping[str, Any]
RESTORE = "it was edited by hand: restore it, or start the run again with `vitpa sweep retry`"
RecordT = TypeVar("RecordT", bound="Record")


class RunError(UserError):
    """A run directory that cannot be used as it is: one line saying what, where and how to fix it."""


def utc_now() -> str:
    """The time in UTC to the second, for people; programs never compare it between hosts."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def write_atomic(path: Path, data: bytes | str, folder: int | None = None) -> None:
    """Write `data` so that `path` holds either its old content or all of `data`, also after a crash.

    `folder` is the descriptor of its folder, where that is found by it and not by its name; other users get no rights then.
    """
    with _folder_of(path, folder) as descriptor:
        temporary = _write_temporary(path, data, descriptor, 0o666 if folder is None else 0o600)
        try:
            os.replace(temporary, path.name, src_dir_fd=descriptor, dst_dir_fd=descriptor)
        except OSError:  # a folder is in the way
            os.unlink(temporary, dir_fd=descriptor)
            raise
        os.fsync(descriptor)


def create_exclusive(path: Path, data: bytes | str, folder: int | None = None) -> bool:
    """Create `path` with all of `data`; False if it exists already. Exactly one of several callers gets True.

    `folder` as for `write_atomic`.
    """
    with _folder_of(path, folder) as descriptor:
        temporary = _write_temporary(path, data, descriptor, 0o666 if folder is None else 0o600)
        try:  # atomic and exclusive, on NFS too
            os.link(temporary, path.name, src_dir_fd=descriptor, dst_dir_fd=descriptor, follow_symlinks=False)
        except FileExistsError:
            return False
        finally:
            os.unlink(temporary, dir_fd=descriptor)
        os.fsync(descriptor)
    return True


def make_folders(path: Path) -> None:
    """Make a folder, and those above it that are missing, so that a crash does not take them, with all that is in them.

    A record is on the disk only if the entries of the folders that it is in are, too.
    """
    missing, above = [path], path.parent
    while not os.path.lexists(above):
        missing.append(above)
        above = above.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)  # also if it was there: another process may have made it in this moment


def sync_folder(path: Path) -> None:
    """Have the disk hold the entries of a folder as they are now: what was made, renamed or removed in it."""
    _sync(path, os.O_DIRECTORY)


def sync_file(path: Path) -> None:
    """Have the disk hold the content of a file as it is now: one that was written by others, who did not see to that."""
    _sync(path, 0)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def next_claim(names: Iterable[str], held: Callable[[int], bool]) -> int:
    """The number of the next of numbered claims, to be created exclusively; 0 while the last one, which counts, is `held`."""
    last = max((int(name) for name in names if name.isdecimal()), default=0)
    return 0 if last and held(last) else last + 1


def write_json(path: Path, document: Json) -> None:
    """Write `document` as indented JSON, atomically. NaN is refused: JSON has none."""
    write_atomic(path, to_json(document))


def to_json(document: Json) -> str:
    """`document` as indented JSON with a final newline."""
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`; None if there is no such file.

    Raises:
        RunError: the file holds anything but one whole JSON object, within the bounds of `vitpa.documents`.
    """
    try:
        document = parse_json(read_bytes(path, JSON_BYTES))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror})") from error
    except DocumentError as error:
        raise RunError(f"{path}: {error}") from error
    if not isinstance(document, dict):
        raise RunError(f"{path}: expected a JSON object, found {type(document).__name__}")
    return document


def check_writable(path: Path) -> None:
    """Raise the OSError that `write_atomic` would raise; what is there stays as it is.

    Raises:
        RunError: it is no regular file, which would be replaced: a device, a pipe, a folder.
    """
    if path.exists() and not path.is_file():
        raise RunError(f"{path}: not a regular file; name a file")
    with _folder_of(path, None) as folder:
        os.unlink(_write_temporary(path, b"", folder, 0o666), dir_fd=folder)


@contextmanager
def _folder_of(path: Path, folder: int | None) -> Iterator[int]:
    """The descriptor of the folder of `path`; errors in the body name `path`, not a temporary file."""
    opened = None
    try:
        opened = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC) if folder is None else None
        yield folder if opened is None else opened  # type: ignore[misc]
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        if opened is not None:
            os.close(opened)


def _write_temporary(path: Path, data: bytes | str, folder: int, mode: int) -> str:
    temporary = f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with os.fdopen(os.open(temporary, flags, mode, dir_fd=folder), "wb") as file:
            file.write(data.encode(errors="surrogateescape") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with suppress(OSError):
            os.unlink(temporary, dir_fd=folder)  # a full disk leaves nothing half-written behind
        raise
    return temporary


class ProcessId(BaseModel):
    """A process that can be recognised again: a pid alone is reused, a pid with its start time is not."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    host: str
    boot_id: str
    pid: int
    start_ticks: int

    @staticmethod
    def of(pid: int) -> ProcessId:
        """The identity of a process of this host that is alive now.

        Raises:
            ProcessLookupError: there is no such process.
        """
        ticks = _start_ticks(pid)
        if ticks is None:
            raise ProcessLookupError(pid)
        return ProcessId(host=socket.gethostname(), boot_id=_boot_id(), pid=pid, start_ticks=ticks)

    @staticmethod
    def mine() -> ProcessId:
        """The identity of this process."""
        return ProcessId.of(os.getpid())

    def alive(self) -> bool | None:
        """Whether the process still runs; None if it ran on another host and cannot be seen from here."""
        if self.host != socket.gethostname():
            return None
        return self.boot_id == _boot_id() and _start_ticks(self.pid) == self.start_ticks


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _start_ticks(pid: int) -> int | None:
    """Start time of a live process in clock ticks since boot (proc(5), stat field 22); None if dead or a zombie."""
    fields = stat_of_living(pid)
    return None if fields is None else int(fields[19])


class Record(BaseModel):
    """What is read of a JSON file; other keys are left alone."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class Holder(Record):
    """Of a file that says who has something."""

    process: ProcessId


def read_record(model: type[RecordT], path: Path) -> RecordT | None:
    """A record; None if there is no such file.

    Raises:
        RunError: it has been cut or edited.
    """
    document = read_json(path)
    return None if document is None else record_of(model, document, path)


def record_of(model: type[RecordT], document: Json, path: Path) -> RecordT:
    """A document that was read from `path` as a record.

    Raises:
        RunError: it has been edited.
    """
    try:
        return model.model_validate(document)
    except ValidationError as error:
        *names, last = dict.fromkeys(f"`{each['loc'][0]}`" for each in error.errors())
        bad = f"{', '.join(names)} and {last}" if names else last
        raise RunError(f"{path}: no usable {bad} in it; {RESTORE}") from error


CHECKSUM = "record_sha256"
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)


def with_checksum(document: Json) -> dict[str, Any]:
    """`document` with the SHA-256 of its content, by which a change is noticed when it is read."""
    return {**document, CHECKSUM: hashlib.sha256(_CANONICAL.encode(document).encode()).hexdigest()}


def made_with(env_json: Path) -> dict[str, Any]:
    """What a run or an attempt was made with, by its env.json; empty if that is not there, or was changed."""
    try:
        return read_checked(env_json)[0] or {}
    except RunError:
        return {}


def read_checked(path: Path) -> tuple[dict[str, Any] | None, bool]:
    """A document without its checksum, None if there is no such file; and whether it had one, which older ones have not.

    Raises:
        RunError: as for `read_json`, or it was changed.
    """
    found = read_json(path)
    if found is None or CHECKSUM not in found:
        return found, False
    document = {key: value for key, value in found.items() if key != CHECKSUM}
    try:
        same = with_checksum(document) == found
    except ValueError:  # NaN
        same = False
    if not same:
        raise RunError(f"{path}: was changed after it was written; its {CHECKSUM} does not fit")
    return document, True
