"""One conversion at a time: a lock file that names its holder and is taken over from a dead one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import ValidationError

from data_prep.errors import PrepError
from vitpa.records import ProcessId, RunError, create_exclusive, next_claim, read_json

LOCK_NAME = ".prep.lock"
GUARD_WAIT_S = 2.0  # a takeover takes milliseconds


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder`, which is made if missing, and removed at the end if nothing came into it.

    Raises:
        PrepError: another process holds it, or may hold it on another host.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / LOCK_NAME
    mine = ProcessId.mine().model_dump_json()
    if not create_exclusive(lock, mine):
        _remove_stale(lock, mine)
        if not create_exclusive(lock, mine):
            raise PrepError(f"{lock}: another conversion was faster; wait for it")
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        with suppress(OSError):  # there is something in it: the usual case
            folder.rmdir()


def _remove_stale(lock: Path, mine: str) -> None:
    """Remove the lock of a dead process. Only the holder of a second lock may, or two could remove each other's."""
    guard = _take_guard(lock, mine)
    try:
        holder = _holder(lock)
        if holder is None:
            return  # released in between
        if holder.alive() is None:
            raise PrepError(
                f"{lock}: held by process {holder.pid} on {holder.host}, which cannot be seen from here; "
                "if it is gone, delete this file"
            )
        if holder.alive():
            raise PrepError(f"{lock}: process {holder.pid} is converting this data set; wait for it or end it")
        lock.unlink(missing_ok=True)
    finally:
        guard.unlink()


def _take_guard(lock: Path, mine: str) -> Path:
    """The lock on taking over: numbered claims."""
    deadline = time.monotonic() + GUARD_WAIT_S
    guard = f"{lock}.takeover."

    def held(last: int) -> bool:
        holder = _holder(Path(f"{guard}{last}"))
        return holder is None or holder.alive() is not False  # None: gone since we looked: look again

    while time.monotonic() <= deadline:
        number = next_claim((path.name.rpartition(".")[2] for path in lock.parent.glob(f"{lock.name}.takeover.*")), held)
        if number and create_exclusive(Path(f"{guard}{number}"), mine):
            return Path(f"{guard}{number}")
        time.sleep(0.05)
    raise PrepError(f"{guard}*: another process is taking over the lock; if none is running, delete this file")


def _holder(lock: Path) -> ProcessId | None:
    try:
        document = read_json(lock)
        return ProcessId.model_validate(document) if document is not None else None
    except (RunError, ValidationError):
        raise PrepError(f"{lock}: does not say who holds it; if no conversion is running, delete this file") from None
