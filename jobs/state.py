"""The state of a run, derived from its records each time and stored nowhere.

done         a valid result.json
running      started, and its job is alive (or cannot be seen from here, as in another cluster: it counts as alive)
pending      claimed, and somebody alive is going to start it, or to start it again
failed, interrupted, cancelled    how its last attempt ended; failed, too, where its job ended by itself before starting it
lost         started, its job is dead and left no exit: killed
uncertain    claimed, not started, and nobody alive who would start it: its launcher was killed
broken       there is a result.json, or another record, that cannot be trusted
missing      none of these
"""

from __future__ import annotations

import contextlib
import hashlib
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from jobs.records import RESTORE, Receipt, SlurmClaim, read_record, record_of
from jobs.scheduler.client import Scheduler, SchedulerError
from jobs.scheduler.job_output import ENDED_EARLY, ended_early
from jobs.scheduler.own_jobs import SlurmJob, Snapshot
from jobs.sweep import Run
from vitpa.arguments import ConfigError
from vitpa.config_file import load_config
from vitpa.documents import YAML_BYTES, DocumentError, read_bytes
from vitpa.records import ProcessId, RunError, create_exclusive, read_json, to_json, utc_now
from vitpa.rundir import AttemptDir, Result, RunDir

STATES = ("done", "running", "pending", "interrupted", "lost", "uncertain", "missing", "failed", "cancelled", "broken")
LIVE = frozenset({"running", "pending"})
SUBMITTABLE = frozenset({"missing", "lost", "interrupted", "uncertain"})  # what `submit` takes
RETRYABLE = frozenset({"failed", "cancelled", "broken"})  # what only `retry` takes


@dataclass(frozen=True)
class RunState:
    """What is known of a run at one moment."""

    run: Run
    state: str
    reason: str = ""
    attempt: AttemptDir | None = None  # the last one
    result: Result | None = None
    unseen: bool = False  # counts as alive only because it cannot be seen from here
    job_id: str = ""  # SLURM's, by its own words or by our records: to be shown
    job: SlurmJob | None = None  # the job that SLURM has in its queue and calls ours: what may be cancelled
    cluster: str = ""  # that has its job, where it is another one than SLURM's commands ask here

    @property
    def ended_early(self) -> bool:
        """Whether its last job has ended before it started the run."""
        return self.state in ("failed", "uncertain") and ENDED_EARLY in self.reason

    @property
    def attempts(self) -> int:
        """Number of attempts so far."""
        return self.attempt.number if self.attempt else 0


class Survey:
    """One look at the runs below a root; what several runs have in common is looked at once.

    SLURM is asked before the records of a run are read, because a job ends after it has written them: a job that the queue
    no longer had has left all its records.
    """

    def __init__(self, root: Path, scheduler: Scheduler | None = None) -> None:
        self._root = root
        self._scheduler = scheduler or Scheduler()
        self._snapshot: Snapshot | None = None
        self._cluster: str | None = None  # that answers
        self._accounts: dict[tuple[str, int], SlurmJob] | None = None
        self._alive: dict[ProcessId, bool | None] = {}
        self._receipts: dict[str, Receipt | None] = {}
        self._looked_after: set[str] = set()  # submissions that had their jobs when SLURM was asked

    @property
    def scheduler_error(self) -> str:
        """Why SLURM could not be asked; empty if it could, or did not have to be."""
        return self._snapshot.error if self._snapshot is not None else ""

    @property
    def asked_slurm(self) -> bool:
        """Whether any of the runs is a matter for SLURM."""
        return self._snapshot is not None

    def states(self, runs: Iterable[Run]) -> list[RunState]:
        """The state of each run, in the same order."""
        return [self.state(run) for run in runs]

    def state(self, run: Run) -> RunState:
        """The state of one run.

        The order of reading matters, because the run goes on meanwhile: a worker writes exit.json before it ends, and its
        trainer writes result.json before that. So: is it alive, then how did it end, then is there a result.
        """
        directory = run.directory(self._root)
        result = _result(run, directory)
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
        result = _result(run, directory)
        if isinstance(result, Result):
            return RunState(run, "done", attempt=last, result=result)
        if isinstance(result, RunError):
            return RunState(run, "broken", str(result), last)
        if found.state == "done":
            return RunState(run, "missing", "its result.json was removed", last)
        return found

    def _of_attempt(self, run: Run, attempt: AttemptDir) -> RunState:
        claim = read_json(attempt.claim_json)
        if claim is not None and claim.get("executor") == "slurm":
            return self._of_slurm(run, attempt, claim)
        start = read_json(attempt.start_json)
        if start is None:
            return self._of_claim(run, attempt)
        process = _process(start, attempt.start_json)
        alive = self._is_alive(process)
        ended = read_json(attempt.exit_json)
        if ended is not None:
            state, reason = _end_of(ended, attempt)
            return RunState(run, state, reason, attempt)
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
        receipt = None
        if "submission" in claim:
            receipt = self._receipt(str(claim["submission"]))
            waiting = self._launchers(claim, attempt) if receipt is None else self._workers(claim, receipt)
        answers = [self._is_alive(process) for process in waiting]
        if True in answers:
            return RunState(run, "pending", attempt=attempt)
        if None in answers:
            return RunState(run, "pending", _where(claimer, None), attempt, unseen=True)
        return RunState(run, "uncertain", self._nobody_left(claim, receipt), attempt)

    def _nobody_left(self, claim: dict[str, Any], receipt: Receipt | None) -> str:
        reason = "claimed, but nobody is left to start it"
        if "submission" in claim:
            submission = self._root / str(claim["submission"])
            reason += f"; see {submission}/{'launch.log' if receipt is None else 'submitit/*.err'}"
        return reason

    def _of_slurm(self, run: Run, attempt: AttemptDir, claim: dict[str, Any]) -> RunState:
        """The state of a run whose last attempt belongs to a SLURM job."""
        task = record_of(SlurmClaim, claim, attempt.claim_json)
        token, index, submission = task.token, task.index, task.submission
        launchers: list[bool | None] = []
        if submission not in self._looked_after:  # first they, then the receipt: who is dead does not write it any more
            launchers = [self._is_alive(process) for process in self._launchers(claim, attempt)]
        job = self._job(token, index, submission)
        start, ended = read_json(attempt.start_json), read_json(attempt.exit_json)
        identity = job.id if job else _job_of(start)
        elsewhere = job is None and self._is_elsewhere(task)
        unseen, cluster = False, ""
        if start is not None and "withdrawn" in start:
            state, reason = str(start["withdrawn"]), str((ended or {}).get("reason") or "")
        elif ended is not None and not _may_go_on(ended):
            state, reason = _end_of(ended, attempt)
        elif elsewhere:
            state = "pending" if start is None or ended is not None else "running"
            reason, unseen, cluster = _in_another_cluster(task, str(self._cluster)), True, str(task.cluster)
        elif self.scheduler_error:
            state = "pending" if start is None or ended is not None else "running"
            reason, unseen = f"as far as is known: {self.scheduler_error}", True
        elif job is not None and job.live:
            waits = start is None or ended is not None or job.waiting
            state, reason = ("pending", _waits_for(job)) if waits else ("running", "")
        elif not identity and submission not in self._looked_after:
            unseen = True not in launchers and None in launchers
            where = _where(_process(claim, attempt.claim_json), None) if unseen else ""
            gone = not any(alive is not False for alive in launchers)
            state, reason = (
                ("uncertain", self._nobody_left(claim, None)) if gone else ("pending", f"being submitted {where}".strip())
            )
        else:
            receipt = self._receipt(submission) if not identity else None
            identity = receipt.jobs[0].task(index) if receipt and receipt.jobs else identity
            known = job or self._accounted(identity, token, index)
            if known is not None and known.live:
                state, unseen = "pending" if start is None or ended is not None or known.waiting else "running", True
                reason = f"squeue does not show its job {known.id}, but sacct says {known.state}: it counts as alive"
            else:
                state, reason = _over(attempt, identity, known.state if known else "", self._root / submission / "submitit")
        return RunState(run, state, reason, attempt, unseen=unseen, job_id=identity, job=job, cluster=cluster)

    def _is_elsewhere(self, task: SlurmClaim) -> bool:
        """Whether a task is of another cluster than the one that answers, which knows nothing of it."""
        if not task.cluster or self.scheduler_error:
            return False
        if self._cluster is None:
            try:
                self._cluster = self._scheduler.cluster()
            except SchedulerError as error:
                self._snapshot = Snapshot({}, str(error))
                return False
        return self._cluster not in ("", task.cluster)

    def _job(self, token: str, index: int, submission: str) -> SlurmJob | None:
        """The job of a claim. If it is not in the queue as last seen, it may have been submitted since."""
        if self._snapshot is None:
            self._look()
        assert self._snapshot is not None
        later = submission not in self._looked_after and (self._root / submission / "receipt.json").exists()
        if self._snapshot.of(token, index) is None and later:
            self._look()
        return self._snapshot.of(token, index)

    def _look(self) -> None:
        """Ask SLURM; remember whose jobs had been submitted before."""
        for path in self._root.glob("sweeps/*/submissions/*/receipt.json"):
            self._receipts.pop(str(path.parent.relative_to(self._root)), None)
            self._looked_after.add(str(path.parent.relative_to(self._root)))
        self._snapshot = self._scheduler.snapshot()

    def _accounted(self, identity: str, token: str, index: int) -> SlurmJob | None:
        """What accounting knows of a task that the queue does not have; None where it knows nothing, or not of ours."""
        if self._accounts is None:
            ids = {identity}
            for submission in self._looked_after:
                with contextlib.suppress(RunError):  # a damaged receipt concerns its own runs
                    receipt = self._receipt(submission)
                    ids |= {job.id for job in receipt.jobs} if receipt else set()
            self._accounts = self._scheduler.accounted(ids)
        return self._accounts.get((token, index))

    def _receipt(self, submission: str) -> Receipt | None:
        """What was written down after the jobs of a submission were started; None before that."""
        if submission not in self._receipts:
            self._receipts[submission] = read_record(Receipt, self._root / submission / "receipt.json")
        return self._receipts[submission]

    def _workers(self, claim: dict[str, Any], receipt: Receipt) -> list[ProcessId]:
        workers = [job.process for job in receipt.jobs if job.process is not None]
        if len(workers) < len(receipt.jobs):
            raise RunError(f"{self._root / str(claim['submission'])}/receipt.json: no usable `process` in it; {RESTORE}")
        return workers

    def _launchers(self, claim: dict[str, Any], attempt: AttemptDir) -> list[ProcessId]:
        """Who may still start the jobs of a submission: the launcher, and the helper that it has started."""
        launchers = [_process(claim, attempt.claim_json)]
        path = self._root / str(claim["submission"]) / "launch.json"
        launch = read_json(path)
        return launchers if launch is None or "process" not in launch else [*launchers, _process(launch, path)]

    def _is_alive(self, process: ProcessId) -> bool | None:
        if process not in self._alive:
            self._alive[process] = process.alive()
        return self._alive[process]


def _ended_state(ended: dict[str, Any], attempt: AttemptDir) -> str:
    state = str(ended.get("state"))
    if state not in ("done", "failed", "interrupted", "cancelled"):
        raise RunError(f"{attempt.exit_json}: state {state!r} is none of done, failed, interrupted, cancelled")
    return state


def _end_of(ended: dict[str, Any], attempt: AttemptDir) -> tuple[str, str]:
    return _ended_state(ended, attempt), str(ended.get("reason") or "")


def _job_of(start: dict[str, Any] | None) -> str:
    """The id of the job that has started an attempt; empty before that, or if it was withdrawn."""
    job = (start or {}).get("job")
    return str(job.get("id") or "") if isinstance(job, dict) else ""


def _may_go_on(ended: dict[str, Any]) -> bool:
    """Whether SLURM may go on with an attempt that ended like this; then the queue says whether it will.

    Not where it was one of a group and left it: the group's job goes on without it.
    """
    return not ended.get("left") and (bool(ended.get("requeued")) or ended.get("state") == "interrupted")


def _waits_for(job: SlurmJob) -> str:
    return f"{job.state.lower()} in SLURM" + (f": {job.reason}" if job.reason else "")


def _in_another_cluster(task: SlurmClaim, here: str) -> str:
    conf = f"SLURM_CONF={shlex.quote(task.slurm_conf)}" if task.slurm_conf else "SLURM_CONF to its slurm.conf"
    return (
        f"its job is in the SLURM cluster {task.cluster}, which cannot be seen from here, where SLURM is the cluster {here}: "
        f"it counts as alive, and is not started again; to see it, set {conf}, or work on a login node of {task.cluster}"
    )


def _over(attempt: AttemptDir, identity: str, last_words: str, output: Path) -> tuple[str, str]:
    """State and reason of a run whose job is over, in the state `last_words` if that is known."""
    ended = read_json(attempt.exit_json)
    if last_words == "CANCELLED":
        return "cancelled", "scancel"
    if ended is not None:  # it was to go on, and did not
        return _end_of(ended, attempt)
    if not attempt.start_json.exists():
        return ended_early(identity, last_words, output)
    return _killed(last_words, identity)


def _killed(last_words: str, identity: str) -> tuple[str, str]:
    """State and reason of a run whose job ended without writing its exit."""
    if last_words == "OUT_OF_MEMORY":
        return "failed", f"host out of memory: SLURM ended job {identity} (OUT_OF_MEMORY); ask for more with `mem`"
    if last_words in ("TIMEOUT", "PREEMPTED", "DEADLINE"):
        return "interrupted", f"SLURM ended job {identity}: {last_words}"
    return "lost", f"its job {identity} was killed" + (f" ({last_words})" if last_words else "")


def early_ends(state: RunState, root: Path) -> int:
    """How many jobs in a row, the last one among them, have ended before they started the run."""
    if not state.ended_early:
        return 0
    number = 1
    for attempt in reversed(state.run.directory(root).attempts()[:-1]):
        try:
            ended = read_json(attempt.exit_json) or {}
        except RunError:
            break
        if ENDED_EARLY not in str(ended.get("reason")):
            break
        number += 1
    return number


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


def _result(run: Run, directory: RunDir) -> Result | RunError | None:
    """The run's result, or why the one that is there cannot be trusted."""
    try:
        result = directory.result()
    except RunError as error:
        return error
    if result is None:
        return None
    if says := result.contradiction_of(run.config):
        return RunError(f"{directory.result_json}: {says}; it was edited by hand: delete it to train the run again")
    try:
        _check_config(run, directory, result)
    except (ConfigError, RunError) as error:
        return RunError(str(error))
    return result


def _check_config(run: Run, directory: RunDir, result: Result) -> None:
    """Raise RunError or ConfigError if config.yaml is not that of the run any more."""
    path = directory.config_yaml
    if result.config_sha256 is None:  # an older one
        return
    hint = "restore it, or move the run's directory away to train the run again"
    try:
        content = read_bytes(path, YAML_BYTES)
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror}); {hint}") from error
    except DocumentError as error:
        raise RunError(f"{path}: {error}; {hint}") from error
    if hashlib.sha256(content).hexdigest() != result.config_sha256 and load_config(path).signature != run.signature:
        raise RunError(f"{path}: was edited by hand, it is another experiment than {run.signature}; {hint}")


def _process(document: dict[str, Any], path: Path) -> ProcessId:
    try:
        return ProcessId.model_validate(document["process"])
    except (KeyError, TypeError, ValidationError) as error:
        raise RunError(f"{path}: no usable `process` in it; {RESTORE}") from error


def _where(process: ProcessId, alive: bool | None) -> str:
    return f"on {process.host}, which cannot be seen from here" if alive is None else ""
