"""One execution of a run: who has the right to it, and the records it leaves in `attempts/0001`."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vitpa.config import RunConfig
from vitpa.errors import UserError
from vitpa.records import Holder, ProcessId, Record, RunError, create_exclusive, read_record, to_json, utc_now, write_json
from vitpa.rundir import CLAIMED, AttemptDir, RunDir

CANCEL = "cancel"  # the reason to stop a run that is no longer wanted


class RunsFailedError(UserError):
    """Some of the runs that were trained together have failed; the others have ended as they would have without them."""


class Stop(Record):
    """Of the file `stop`: a request to stop."""

    reason: str = "the file stop"
    attempt: int | None = None  # that it is meant for; None: any
    now: bool = False  # do not wait for a checkpoint
    utc: str | None = None

    @staticmethod
    def read(path: Path) -> Stop | None:
        """The request; None if there is none. A file made by hand (`touch stop`) is one, too."""
        try:
            return read_record(Stop, path)
        except RunError:
            return Stop()


class Left(Record):
    """Of `attempts/NNNN/left.json`: the trainer goes on without the run."""

    state: str  # failed, stopped, apart
    reason: str
    utc: str | None = None


def check_unedited(config_yaml: Path, config: RunConfig) -> None:
    """What was read from the `config_yaml` of an attempt is the experiment of its run.

    Raises:
        RunError: it is another one.
    """
    *_, signature, attempts, _, _ = ("", "", *config_yaml.absolute().parts)  # runs/SIGNATURE/attempts/NNNN/config.yaml
    if attempts == "attempts" and signature != config.signature:
        raise RunError(f"{config_yaml}: was edited by hand, it is another experiment: `vitpa sweep retry`")


@contextmanager
def claimed_attempt(run: RunDir, *, takeover: bool, last_epoch: int | None = None) -> Iterator[None]:
    """Hold the run while the body trains it up to `last_epoch` (None: to its end); at the end record how the attempt ended.

    A launcher that has claimed the attempt says so in the environment; it then keeps the records, and nothing is done here.

    Raises:
        RunError: another process trains the run, or may be training it on another host.
    """
    if CLAIMED in os.environ:
        yield
        return
    check_free(run, takeover=takeover)
    attempts = run.attempts()
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
        elif left := read_record(Left, attempt.left_json):  # it was dropped, whatever has become of the others
            cancelled = left.state == "stopped" and was_cancelled(run)
            state, reason = "cancelled" if cancelled else "failed" if left.state == "failed" else "interrupted", left.reason
        end: dict[str, Any] = {"state": state, "reason": reason, "finished_utc": utc_now()}
        write_json(attempt.exit_json, {**end, "duration_s": time.monotonic() - started_s})

    def record_end() -> None:
        if last_epoch is not None and (paused := reason_of_pause(run, last_epoch)):
            record("paused", paused)
        else:
            record("cancelled" if was_cancelled(run) else "interrupted", f"stopped by the file {run.stop}")

    try:
        yield
    except KeyboardInterrupt:
        record("interrupted", "interrupted from the keyboard")
        raise
    except RunsFailedError:
        record_end()
        raise
    except BaseException as error:
        record("failed", f"{type(error).__name__}: {error}")
        raise
    record_end()


def check_free(run: RunDir, *, takeover: bool) -> None:
    """See that nobody trains the run, as `claimed_attempt` will.

    Raises:
        RunError: another process trains it, or may be training it on another host.
    """
    if CLAIMED not in os.environ:
        for attempt in run.attempts()[-1:]:
            refuse_if_held(attempt, takeover=takeover)


def reason_of_pause(run: RunDir, last_epoch: int) -> str:
    """Why an attempt that was to train up to `last_epoch` is over: it paused there; empty if it did not.

    Raises:
        RunError: the record of the pause cannot be trusted.
    """
    pause = run.paused()
    return f"after epoch {pause.epoch}" if pause is not None and pause.epoch >= last_epoch else ""


def record_left(run: RunDir, state: str, reason: str) -> None:
    """Say in the newest attempt of a run that those it was to be trained with go on without it."""
    for attempt in run.attempts()[-1:]:
        write_json(attempt.left_json, Left(state=state, reason=reason, utc=utc_now()).model_dump())


def was_cancelled(run: RunDir) -> bool:
    """Whether the file `stop` says that the run is no longer wanted."""
    stop = Stop.read(run.stop)
    return stop is not None and stop.reason == CANCEL


def cancel_requested(run: RunDir, attempt: AttemptDir) -> bool:
    """Whether an attempt was asked to stop because the run is no longer wanted, whether or not it came to record that."""
    requests = (Stop.read(run.stop), Stop.read(attempt.stop_json))
    return any(stop is not None and (stop.reason, stop.attempt) == (CANCEL, attempt.number) for stop in requests)


def refuse_if_held(attempt: AttemptDir, *, takeover: bool) -> None:
    """Raise RunError unless the attempt has ended: by its record, because its process is gone, or on the user's word.

    The user's word (`takeover`) counts where nobody can see better; a process seen alive is never taken over.
    """
    if attempt.exit_json.exists():
        return
    holder = None
    with suppress(RunError):
        holder = read_record(Holder, attempt.start_json) or read_record(Holder, attempt.claim_json)
    if holder is None:
        if takeover:
            return
        raise RunError(f"{attempt.path}: does not say who holds this run; if nobody does, set runtime.takeover=true")
    process = holder.process
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
