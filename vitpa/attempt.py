"""One execution of a run: who has the right to it, and the records it leaves in `attempts/0001`."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError

from vitpa.records import ProcessId, RunError, create_exclusive, read_json, to_json, utc_now, write_json
from vitpa.rundir import CLAIMED, AttemptDir, RunDir


@contextmanager
def claimed_attempt(run: RunDir, *, takeover: bool) -> Iterator[None]:
    """Hold the run while the body trains it; at the end record how the attempt ended.

    A launcher that has claimed the attempt says so in the environment; it then keeps the records, and nothing is done here.

    Raises:
        RunError: another process trains the run, or may be training it on another host.
    """
    if CLAIMED in os.environ:
        yield
        return
    attempts = run.attempts()
    if attempts:
        refuse_if_held(attempts[-1], takeover=takeover)
    me = {"process": ProcessId.mine().model_dump(), "utc": utc_now()}
    attempt = run.claim_attempt(attempts[-1].number + 1 if attempts else 1, {"by": "vitpa train", **me})
    if attempt is None:
        raise RunError(f"{run.path}: another process has just started this run")
    run.stop.unlink(missing_ok=True)  # it was meant for an earlier attempt
    create_exclusive(attempt.start_json, to_json(me))
    started_s = time.monotonic()

    def record(state: str, reason: str) -> None:
        if run.result_json.exists():
            state, reason = "done", ""
        elif left := read_json(attempt.left_json):  # it was dropped; what has become of the others says nothing about it
            state, reason = _state_left(run, left)
        end: dict[str, Any] = {"state": state, "reason": reason, "finished_utc": utc_now()}
        write_json(attempt.exit_json, {**end, "duration_s": time.monotonic() - started_s})

    try:
        yield
    except KeyboardInterrupt:
        record("interrupted", "interrupted from the keyboard")
        raise
    except BaseException as error:
        record("failed", f"{type(error).__name__}: {error}")
        raise
    record("cancelled" if was_cancelled(run) else "interrupted", f"stopped by the file {run.stop}")


def _state_left(run: RunDir, left: dict[str, Any]) -> tuple[str, str]:
    """State and reason of an attempt whose run has left those it was trained with."""
    state = left.get("state")
    if state == "stopped" and was_cancelled(run):
        state = "cancelled"
    return (state if state in ("failed", "cancelled") else "interrupted"), str(left.get("reason"))


def record_left(run: RunDir, state: str, reason: str) -> None:
    """Say in the newest attempt of a run that those it was to be trained with go on without it."""
    for attempt in run.attempts()[-1:]:
        write_json(attempt.left_json, {"state": state, "reason": reason, "utc": utc_now()})


def was_cancelled(run: RunDir) -> bool:
    """Whether the file `stop` says that the run is no longer wanted."""
    try:
        return (read_json(run.stop) or {}).get("reason") == "cancel"
    except RunError:
        return False  # made by hand, with `touch`


def refuse_if_held(attempt: AttemptDir, *, takeover: bool) -> None:
    """Raise RunError unless the attempt has ended: by its record, because its process is gone, or on the user's word.

    The user's word (`takeover`) counts where nobody can see better; a process seen alive is never taken over.
    """
    if attempt.exit_json.exists():
        return
    holder = read_json(attempt.start_json) or read_json(attempt.claim_json) or {}
    try:
        process = ProcessId.model_validate(holder.get("process"))
    except ValidationError as error:
        if takeover:
            return
        raise RunError(
            f"{attempt.path}: does not say who holds this run; if nobody does, set runtime.takeover=true"
        ) from error
    alive, started = process.alive(), attempt.start_json.exists()
    where = f"process {process.pid} on {process.host}"
    if started and alive:
        raise RunError(f"{attempt.path}: this run is being trained by {where}; wait for it, or stop that process")
    if takeover or (started and alive is False):
        return
    if not started:
        raise RunError(f"{attempt.path}: a sweep has queued this run ({where}); cancel it there, or set runtime.takeover=true")
    raise RunError(
        f"{attempt.path}: this run was started by {where}, which cannot be seen from here; "
        "if that process is gone, set runtime.takeover=true"
    )
