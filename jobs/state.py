"""The state of a run, derived from its records each time and stored nowhere.

done         a valid result.json
running      started, and its job is alive (or cannot be seen from here, as in another cluster: it counts as alive)
pending      claimed, and a living process or job is going to start it, or to start it again
paused       stopped after an epoch on purpose (runtime.stop_after_epoch), with a checkpoint to go on from
failed, interrupted, cancelled    how its last attempt ended; failed, too, where its job ended by itself before starting it
lost         started, its job is dead and left no exit: killed
uncertain    claimed, not started, and nobody alive who would start it: its launcher was killed
broken       there is a result.json, or another record, that cannot be trusted
missing      none of these
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from jobs.evidence import SlurmEvidence, WorkerEvidence, in_progress, of_worker, out_of_the_queue
from jobs.records import Claim, Exit, Intent, Launch, Receipt, SlurmClaim, Start, WantedRun, read_claim
from jobs.scheduler.client import Scheduler, SchedulerError
from jobs.scheduler.job_output import ENDED_EARLY, ended_early, worker_ended_early
from jobs.scheduler.own_jobs import SlurmJob, Snapshot
from jobs.sweep import Run
from vitpa.arguments import ConfigError
from vitpa.attempt import cancel_requested
from vitpa.config_file import load_config
from vitpa.documents import YAML_BYTES, DocumentError, read_bytes
from vitpa.records import RESTORE, ProcessId, RunError, create_exclusive, read_json, read_record, to_json, utc_now
from vitpa.rundir import AttemptDir, Result, RunDir

_ENDED_BADLY = ("failed", "cancelled", "broken")
STATES = ("done", "running", "pending", "paused", "interrupted", "lost", "uncertain", "missing", *_ENDED_BADLY)
LIVE = frozenset({"running", "pending"})
SUBMITTABLE = frozenset({"missing", "lost", "interrupted", "uncertain", "paused"})  # what `submit` takes
RETRYABLE = frozenset(_ENDED_BADLY)  # what only `retry` takes
MAX_EARLY_ENDS = 3  # jobs in a row that ended before they started the run


@dataclass(frozen=True)
class RunState:
    """What is known of a run at one moment."""

    run: Run
    state: str
    reason: str = ""
    attempt: AttemptDir | None = None  # the last one
    started: bool = False  # whether the last attempt had been, when it was looked at
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


class StateReader:
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
        self._is_alive = functools.cache(ProcessId.alive)
        self._receipts: dict[str, Receipt | None] = {}
        self._has_started_none = functools.cache(self._started_none)
        self._looked_after: set[str] = set()  # submissions that had their jobs when SLURM was asked
        self._seen_starts: set[Path] = set()  # of other submissions, that were there when SLURM was asked again

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
        last, damage = None, ""
        try:
            last = next(reversed(directory.attempts()), None)
        except RunError as error:  # a link into nowhere, a file in its place: the other runs are not concerned
            damage = str(error)
        if isinstance(result, Result):
            return RunState(run, "done", attempt=last, result=result)
        try:
            found = self._of_attempt(run, last) if last else RunState(run, "broken" if damage else "missing", damage)
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
        return _cancelled_if_asked(found, directory)

    def _of_attempt(self, run: Run, attempt: AttemptDir) -> RunState:
        claim = read_claim(attempt.claim_json)
        if isinstance(claim, SlurmClaim):
            return self._of_slurm(run, attempt, claim)
        start = read_record(Start, attempt.start_json)
        worker = self._is_alive(start.process) if start else None  # before its exit.json is read
        ended = read_record(Exit, attempt.exit_json)
        if start is None and claim is None:
            raise RunError(f"{attempt.claim_json} is missing; it was removed by hand")
        starters, log = self._starters(claim) if claim and start is None else ([], "")
        alive = tuple(self._is_alive(process) for process in starters)
        claimer = claim.process if claim else None
        submission = claim.submission if claim and set(alive) == {False} else None
        in_vain = submission is not None and self._receipt(submission) is not None and self._has_started_none(submission)
        verdict = of_worker(WorkerEvidence(claimer, start, ended, worker, alive, log, in_vain))
        state, reason = verdict.state, verdict.reason
        if verdict.ended_early:
            state, reason = worker_ended_early(self._root / str(submission) / "submitit")
        return RunState(run, state, reason, attempt, started=start is not None, unseen=verdict.unseen)

    def _started_none(self, submission: str) -> bool:
        """Whether the workers of a submission, which are over, have not started any run of it."""
        with contextlib.suppress(RunError):  # where a record is damaged, nobody knows
            intent = read_record(Intent, self._root / submission / "intent.json")
            return not any(self._was_started(submission, run) for run in (intent.runs if intent else []))
        return False

    def _was_started(self, submission: str, run: WantedRun) -> bool:
        """Whether a run has been started for a submission, not withdrawn."""
        attempt = RunDir(self._root, run.signature).attempt(run.attempt or 1)
        start = read_record(Start, attempt.start_json)
        if start is None or start.withdrawn is not None:
            return False
        claim = read_record(Claim, attempt.claim_json)
        return claim is not None and claim.submission == submission

    def _starters(self, claim: Claim) -> tuple[list[ProcessId], str]:
        """Who may still start a claimed run, and what to look at if nobody is left."""
        if claim.submission is None:
            return [claim.process], ""
        submission, receipt = self._root / claim.submission, self._receipt(claim.submission)
        if receipt is None:
            return self._launchers(claim), f"{submission}/launch.log"
        workers = [job.process for job in receipt.jobs if job.process is not None]
        if len(workers) < len(receipt.jobs):
            raise RunError(f"{submission}/receipt.json: no usable `process` in it; {RESTORE}")
        return workers, f"{submission}/submitit/*.err"

    def _of_slurm(self, run: Run, attempt: AttemptDir, claim: SlurmClaim) -> RunState:
        """The state of a run whose last attempt belongs to a SLURM job."""
        launchers: list[bool | None] = []
        if claim.submission not in self._looked_after:  # first they, then the receipt: who is dead does not write it any more
            launchers = [self._is_alive(process) for process in self._launchers(claim)]
        job = self._job(claim)
        start = read_record(Start, attempt.start_json)
        if job is None and start is not None and self._has_started_since(claim, attempt):
            self._look()
            job, start = self._job(claim), read_record(Start, attempt.start_json)
        found = SlurmEvidence(
            claim=claim,
            start=start,
            exit=read_record(Exit, attempt.exit_json),
            job=job,
            identity=job.id if job else start.job.id if start and start.job else "",
            submitted=claim.submission in self._looked_after,
            launchers=tuple(launchers),
            log=f"{self._root / claim.submission}/launch.log",
            here=self._other_cluster(claim) if job is None else "",
            error=self.scheduler_error,
        )
        verdict = in_progress(found)
        if verdict is None:
            found = self._with_accounting(found, attempt)
            verdict = out_of_the_queue(found)
        state, reason = verdict.state, verdict.reason
        if verdict.ended_early:
            last_words = found.known.state if found.known else ""
            state, reason = ended_early(found.identity, last_words, self._root / claim.submission / "submitit")
        return RunState(
            run,
            state,
            reason,
            attempt,
            started=found.start is not None,
            unseen=verdict.unseen,
            job_id=found.identity,
            job=job,
            cluster=verdict.cluster,
        )

    def _with_accounting(self, found: SlurmEvidence, attempt: AttemptDir) -> SlurmEvidence:
        """The evidence with what sacct knows, and with the records that the job may have written meanwhile, at its end."""
        identity, claim = found.identity, found.claim
        if not identity:
            receipt = self._receipt(claim.submission)
            identity = receipt.jobs[0].task(claim.index) if receipt and receipt.jobs else ""
        return replace(
            found,
            identity=identity,
            accounted=None if found.job else self._accounted(identity, claim.token, claim.index),
            start=read_record(Start, attempt.start_json),
            exit=read_record(Exit, attempt.exit_json),
        )

    def _other_cluster(self, claim: SlurmClaim) -> str:
        """The cluster that answers here, if it is not the claim's, of whose jobs it knows nothing; empty otherwise."""
        if not claim.cluster or self.scheduler_error:
            return ""
        if self._cluster is None:
            try:
                self._cluster = self._scheduler.cluster()
            except SchedulerError as error:
                self._snapshot = Snapshot({}, str(error))
                return ""
        return "" if self._cluster == claim.cluster else self._cluster

    def _job(self, claim: SlurmClaim) -> SlurmJob | None:
        """The job of a claim. If it is not in the queue as last seen, it may have been submitted since."""
        if self._snapshot is None:
            self._look()
        assert self._snapshot is not None
        later = claim.submission not in self._looked_after and (self._root / claim.submission / "receipt.json").exists()
        if self._snapshot.of(claim.token, claim.index) is None and later:
            self._look()
        return self._snapshot.of(claim.token, claim.index)

    def _has_started_since(self, claim: SlurmClaim, attempt: AttemptDir) -> bool:
        """Whether a job may have started a run after SLURM was asked; the starts that are there now will not have, next time.

        A file system that shows new files late may show a start before the receipt, which is older.
        """
        if claim.submission in self._looked_after or attempt.start_json in self._seen_starts:
            return False
        intent = read_record(Intent, self._root / claim.submission / "intent.json")
        runs = intent.runs if intent else []
        others = [RunDir(self._root, run.signature).attempt(run.attempt or 1).start_json for run in runs]
        self._seen_starts |= {attempt.start_json, *(path for path in others if path.exists())}
        return True

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

    def _launchers(self, claim: Claim) -> list[ProcessId]:
        """Who may still start the jobs of a submission: the launcher, and the helper that it has started."""
        launch = read_record(Launch, self._root / str(claim.submission) / "launch.json")
        return [claim.process, *([launch.process] if launch and launch.process else [])]


def early_ends(state: RunState, root: Path) -> int:
    """How many jobs in a row, the last one among them, have ended before they started the run."""
    if not state.ended_early:
        return 0
    number = 1
    for attempt in reversed(state.run.directory(root).attempts()[:-1]):
        try:
            ended = read_record(Exit, attempt.exit_json)
        except RunError:
            break
        if ended is None or ENDED_EARLY not in (ended.reason or ""):
            break
        number += 1
    return number


def fails_alike(state: RunState, root: Path) -> bool:
    """Whether the last two attempts failed for the same reason, or several jobs never came so far: another would, too."""
    if state.ended_early:
        return early_ends(state, root) >= MAX_EARLY_ENDS
    try:
        exits = [read_json(attempt.exit_json) or {} for attempt in state.run.directory(root).attempts()[-2:]]
    except RunError:  # nobody knows
        return False
    same = len(exits) == 2 and all(exits[0].get(key) == exits[1].get(key) for key in ("state", "reason"))
    return state.state == "failed" and same


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


def _cancelled_if_asked(found: RunState, directory: RunDir) -> RunState:
    """A run that was to be cancelled, and whose job ended before it recorded that, is: `submit` leaves it alone."""
    if found.attempt is None or found.state not in ("lost", "interrupted"):
        return found
    if cancel_requested(directory, found.attempt):
        return replace(found, state="cancelled", reason=f"cancelled ({found.reason})")
    return found


def _result(run: Run, directory: RunDir) -> Result | RunError | None:
    """The run's result, or why the one that is there cannot be trusted."""
    try:
        result = directory.result()
    except RunError as error:
        return error
    if result is None:
        return None
    if says := run.config.contradiction_of(result):
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
