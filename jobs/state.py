"""The state of a run, derived from its records each time and stored nowhere.

done         a valid result.json
running      started, and its worker is alive (or on another host, where that cannot be seen: it counts as alive)
pending      claimed, and somebody alive is going to start it
failed, interrupted, cancelled    how its last attempt ended
lost         started, its worker is dead and left no exit: killed
uncertain    claimed, not started, and nobody alive who would start it: its launcher was killed
broken       there is a result.json, or another record, that cannot be trusted
missing      none of these
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from jobs.grid import Run
from vitpa.config import AttemptDir, ProcessId, Result, RunDir, RunError, create_exclusive, read_json, to_json, utc_now

STATES = ("done", "running", "pending", "interrupted", "lost", "uncertain", "missing", "failed", "cancelled", "broken")
LIVE = frozenset({"running", "pending"})
SUBMITTABLE = frozenset({"missing", "lost", "interrupted", "uncertain"})  # what `submit` takes
RETRYABLE = frozenset({"failed", "cancelled", "broken"})  # what only `retry` takes


_MEND = "it was edited by hand: restore it, or start the run again with `vitpa sweep retry`"


@dataclass(frozen=True)
class RunState:
    """What is known of a run at one moment."""

    run: Run
    state: str
    reason: str = ""
    attempt: AttemptDir | None = None  # the last one
    result: Result | None = None
    unseen: bool = False  # counts as alive only because it is on another host

    @property
    def attempts(self) -> int:
        """Number of attempts so far."""
        return self.attempt.number if self.attempt else 0


class Survey:
    """One look at the runs below a root; what several runs have in common is looked at once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._alive: dict[ProcessId, bool | None] = {}
        self._jobs: dict[str, list[ProcessId] | None] = {}

    def states(self, runs: Iterable[Run]) -> list[RunState]:
        """The state of each run, in the same order."""
        return [self.state(run) for run in runs]

    def state(self, run: Run) -> RunState:
        """The state of one run.

        The order of reading matters, because the run goes on meanwhile: a worker writes exit.json before it ends, and its
        trainer writes result.json before that. So: is it alive, then how did it end, then is there a result.
        """
        directory = run.directory(self._root)
        result = _result(directory)
        if isinstance(result, Result):
            attempts = directory.attempts()
            return RunState(run, "done", attempt=attempts[-1] if attempts else None, result=result)
        attempts = directory.attempts()
        last = attempts[-1] if attempts else None
        try:
            found = self._of_attempt(run, last) if last else RunState(run, "missing")
        except RunError as error:
            found = RunState(run, "broken", str(error), last)
        if found.state in LIVE:
            return found
        result = _result(directory)
        if isinstance(result, Result):
            return RunState(run, "done", attempt=last, result=result)
        if isinstance(result, RunError):
            return RunState(run, "broken", str(result), last)
        if found.state == "done":
            return RunState(run, "missing", "its result.json was removed", last)
        return found

    def _of_attempt(self, run: Run, attempt: AttemptDir) -> RunState:
        start = read_json(attempt.start_json)
        if start is None:
            return self._of_claim(run, attempt)
        process = _process(start, attempt.start_json)
        alive = self._is_alive(process)
        ended = read_json(attempt.exit_json)
        if ended is not None:
            state = str(ended.get("state"))
            if state not in ("done", "failed", "interrupted", "cancelled"):
                raise RunError(f"{attempt.exit_json}: state {state!r} is none of done, failed, interrupted, cancelled")
            return RunState(run, state, str(ended.get("reason") or ""), attempt)
        if "withdrawn" in start:  # whoever withdrew it was killed before writing exit.json
            return RunState(run, str(start["withdrawn"]), attempt=attempt)
        if alive is False:
            return RunState(run, "lost", f"its worker (process {process.pid} on {process.host}) was killed", attempt)
        return RunState(run, "running", _where(process, alive), attempt, unseen=alive is None)

    def _of_claim(self, run: Run, attempt: AttemptDir) -> RunState:
        claim = read_json(attempt.claim_json)
        if claim is None:
            raise RunError(f"{attempt.claim_json} is missing; it was removed by hand")
        claimer = _process(claim, attempt.claim_json)
        waiting = [claimer]
        if "submission" in claim:
            jobs = self._jobs_of(str(claim["submission"]))
            waiting = [claimer] if jobs is None else jobs
        answers = [self._is_alive(process) for process in waiting]
        if True in answers:
            return RunState(run, "pending", attempt=attempt)
        if None in answers:
            return RunState(run, "pending", _where(claimer, None), attempt, unseen=True)
        reason = "claimed, but nobody is left to start it"
        if "submission" in claim:
            submission = self._root / str(claim["submission"])
            reason += f"; see {submission}/{'launch.log' if jobs is None else 'submitit/*.err'}"
        return RunState(run, "uncertain", reason, attempt)

    def _jobs_of(self, submission: str) -> list[ProcessId] | None:
        """The processes that work through a submission; None as long as it has no receipt."""
        if submission not in self._jobs:
            path = self._root / submission / "receipt.json"
            receipt = read_json(path)
            jobs = [] if receipt is None else receipt.get("jobs")
            if not isinstance(jobs, list):
                raise RunError(f"{path}: no list `jobs` in it; {_MEND}")
            self._jobs[submission] = None if receipt is None else [_process(job, path) for job in jobs]
        return self._jobs[submission]

    def _is_alive(self, process: ProcessId) -> bool | None:
        if process not in self._alive:
            self._alive[process] = process.alive()
        return self._alive[process]


def withdraw(attempt: AttemptDir, state: str, reason: str) -> bool:
    """Take a claimed attempt out of circulation as `cancelled` or `interrupted`; False if it has been started.

    It goes through the same exclusive creation of start.json as a start, so that of the two exactly one happens.
    """
    utc = utc_now()
    start = {"process": ProcessId.mine().model_dump(), "withdrawn": state, "started_utc": utc}
    if not create_exclusive(attempt.start_json, to_json(start)):
        return False
    ended = {"state": state, "exit_code": None, "reason": reason, "finished_utc": utc, "duration_s": 0.0}
    create_exclusive(attempt.exit_json, to_json(ended))
    return True


def _result(directory: RunDir) -> Result | RunError | None:
    try:
        return directory.result()
    except RunError as error:
        return error


def _process(document: dict[str, Any], path: Path) -> ProcessId:
    try:
        return ProcessId.model_validate(document["process"])
    except (KeyError, TypeError, ValidationError) as error:
        raise RunError(f"{path}: no usable `process` in it; {_MEND}") from error


def _where(process: ProcessId, alive: bool | None) -> str:
    return f"on {process.host}, which cannot be seen from here" if alive is None else ""
