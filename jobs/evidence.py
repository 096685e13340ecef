"""What state.py has read of an attempt, and the state of the run that follows from it: pure functions of frozen records."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from jobs.records import Exit, SlurmClaim, Start
from jobs.scheduler.own_jobs import SlurmJob
from vitpa.records import ProcessId


@dataclass(frozen=True)
class Verdict:
    """The state of a run, and why."""

    state: str
    reason: str = ""
    unseen: bool = False  # counts as alive only because it cannot be seen from here
    cluster: str = ""  # that has its job, where SLURM's commands ask another one
    ended_early: bool = False  # its job ended before it started the run: what the job has printed says why


@dataclass(frozen=True)
class WorkerEvidence:
    """Of an attempt of a worker on this machine, or of `vitpa train`. Alive: None on another host."""

    claimer: ProcessId | None  # None: its claim is gone, and it was started
    start: Start | None
    exit: Exit | None
    worker: bool | None  # whether the process that started it is alive
    starters: tuple[bool | None, ...]  # whether those are alive who may still start it
    log: str  # what to look at if nobody is
    in_vain: bool = False  # they are workers, and none has started a run of its submission


def of_worker(found: WorkerEvidence) -> Verdict:  # noqa: PLR0911 - rules, the first that holds decides
    """The state of a run whose last attempt was claimed by a process of a machine."""
    start = found.start
    if start is None:
        if True in found.starters:
            return Verdict("pending")
        if None in found.starters:
            return Verdict("pending", not_seen(found.claimer) if found.claimer else "", unseen=True)
        return Verdict("uncertain", ended_early=True) if found.in_vain else nobody_left(found.log)
    if found.exit is not None:
        return Verdict(found.exit.state, found.exit.reason or "")
    if start.withdrawn is not None:  # whoever withdrew it was killed before writing exit.json
        return Verdict(start.withdrawn)
    if found.worker is False:
        return Verdict("lost", f"its worker (process {start.process.pid} on {start.process.host}) was killed")
    unseen = found.worker is None
    return Verdict("running", not_seen(start.process) if unseen else "", unseen=unseen)


@dataclass(frozen=True)
class SlurmEvidence:
    """Of an attempt of a SLURM job."""

    claim: SlurmClaim
    start: Start | None
    exit: Exit | None
    job: SlurmJob | None  # in SLURM's queue and ours
    identity: str  # of its job, by the queue or by our records; empty: none is known
    submitted: bool  # its submission had its jobs when SLURM was asked
    launchers: tuple[bool | None, ...]  # whether those are alive who may still submit it; None: on another host
    log: str  # what to look at if they are not
    here: str = ""  # the cluster that answers, where it is another one than the claim's
    error: str = ""  # why SLURM could not be asked
    accounted: SlurmJob | None = None  # by sacct; asked only where `in_progress` is None

    @property
    def started(self) -> bool:
        """Whether it runs, as far as the records tell, rather than waits to be started, or to go on."""
        return self.start is not None and self.exit is None

    @property
    def known(self) -> SlurmJob | None:
        """Its job as SLURM knows it: by the queue, or else by accounting."""
        return self.job or self.accounted


def in_progress(found: SlurmEvidence) -> Verdict | None:  # noqa: PLR0911 - rules, the first that holds decides
    """The state of a run by its records and the queue; None if its job is in the queue no more, or is ending."""
    start, ended, job = found.start, found.exit, found.job
    alive = "running" if found.started else "pending"
    if start is not None and start.withdrawn is not None:
        return Verdict(start.withdrawn, (ended.reason if ended else None) or "")
    if ended is not None and not ended.may_go_on and not (job is not None and job.waiting and ended.goes_on_if_started):
        return Verdict(ended.state, ended.reason or "")
    if job is None and found.here:
        return Verdict(alive, _in_another_cluster(found.claim, found.here), unseen=True, cluster=found.claim.cluster or "")
    if found.error:
        return Verdict(alive, f"as far as is known: {found.error}", unseen=True)
    if job is not None and job.live:
        if found.started and not job.waiting:
            return Verdict("running")
        after = f", after it {ended.state}: {ended.reason}" if ended is not None and job.state == "SPECIAL_EXIT" else ""
        return Verdict("pending", f"{job.state.lower()} in SLURM" + (f": {job.reason}" if job.reason else "") + after)
    if not found.identity and not found.submitted:
        if all(each is False for each in found.launchers):
            return nobody_left(found.log)
        unseen = True not in found.launchers
        where = not_seen(found.claim.process) if unseen else ""
        return Verdict("pending", f"being submitted {where}".strip(), unseen=unseen)
    return None


def out_of_the_queue(found: SlurmEvidence) -> Verdict:  # noqa: PLR0911 - rules, the first that holds decides
    """The state of a run whose job the queue does not have, or shows as ending: by accounting, then by its records."""
    known = found.known
    if known is not None and known.live:
        state = "running" if found.started and not known.waiting else "pending"
        reason = f"squeue does not show its job {known.id}, but sacct says {known.state}: it counts as alive"
        return Verdict(state, reason, unseen=True)
    last_words = known.state if known else ""
    if last_words == "CANCELLED":
        return Verdict("cancelled", "scancel")
    if found.exit is not None:  # it was to go on, and did not
        return Verdict(found.exit.state, found.exit.reason or "")
    if found.start is None:
        return Verdict("uncertain", ended_early=True)
    if last_words == "OUT_OF_MEMORY":
        reason = f"host out of memory: SLURM ended job {found.identity} (OUT_OF_MEMORY); ask for more with `mem`"
        return Verdict("failed", reason)
    if last_words in ("TIMEOUT", "PREEMPTED", "DEADLINE"):
        return Verdict("interrupted", f"SLURM ended job {found.identity}: {last_words}")
    return Verdict("lost", f"its job {found.identity} was killed" + (f" ({last_words})" if last_words else ""))


def nobody_left(log: str) -> Verdict:
    """The state of a run that was claimed by a launcher that is gone; `log` is what to look at, if there is anything."""
    return Verdict("uncertain", "claimed, but nobody is left to start it" + (f"; see {log}" if log else ""))


def not_seen(process: ProcessId) -> str:
    """Where a process is whose host is another one."""
    return f"on {process.host}, which cannot be seen from here"


def _in_another_cluster(claim: SlurmClaim, here: str) -> str:
    conf = f"SLURM_CONF={shlex.quote(claim.slurm_conf)}" if claim.slurm_conf else "SLURM_CONF to its slurm.conf"
    return (
        f"its job is in the SLURM cluster {claim.cluster}, which cannot be seen from here, where SLURM is the cluster {here}: "
        f"it counts as alive, and is not started again; to see it, set {conf}, or work on a login node of {claim.cluster}"
    )
