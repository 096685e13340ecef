"""What a SLURM job does: trains the group of runs of its array index, and sees that SLURM goes on with it if it must.

Node 0 leads: it makes an attempt of each run, trains, writes exit.json and asks SLURM to requeue the job where that can help:
at the time limit or after a failure if a run has a newer checkpoint than at the start, after a failed pre-flight on another
node or, where the disk is short of room, once it has some. Whatever restarts the job (preemption, a dead node, `scontrol
requeue`), the next execution finds the records of the last one and makes the next attempts, but not of what is finished,
cancelled or has left the group. Other nodes follow: they join the training that node 0 has published; a group on several
nodes is a single run.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from jobs.execute import bad_nodes
from jobs.execute.attempt import BOUND, TORCHRUN, TRAIN, Member, Outcome, Request, Signals, Training, failure_of
from jobs.execute.node_check import preflight
from jobs.execute.requeue import FAILED_BEFORE, TIME_LIMIT, End, History, first_step, last_step, why_nothing_to_do
from jobs.failures import cause_of, is_loss_of_peer
from jobs.notify.outbox import tell_of_ended
from jobs.profile import SlurmProfile
from jobs.records import Claim, Exit, Intent, Start
from jobs.scheduler.client import Scheduler, SchedulerError
from jobs.scheduler.job_output import SETUP_FAILED, with_setup
from jobs.state import withdraw
from vitpa.arguments import literal_path
from vitpa.attempt import Left, cancel_requested
from vitpa.code_version import code_version
from vitpa.documents import append_regular
from vitpa.records import (
    ProcessId,
    RunError,
    create_exclusive,
    make_folders,
    read_json,
    read_record,
    to_json,
    utc_now,
    write_json,
)
from vitpa.room import WAIT_S, has_room, is_full, wait_for_room
from vitpa.rundir import AttemptDir, RunDir

EARLY_S = 90.0  # SLURM's warning comes up to a minute before it was asked for; what is left of the time is used
FOLLOWERS_GRACE_S = 5.0  # between the first failure of a node and the end of the others
REPORTS_WAIT_S = 45.0  # for the node that is to blame to say why; torchrun takes up to 30 s to end its processes
FOLLOWERS_WAIT_S = 600.0  # for node 0 to come up
REQUEUE_TRIES = 12
REQUEUE_WAIT_S = 5.0
POLL_S = 0.3
NOT_ENDED = "VITPA_NOT_ENDED"  # a file of the job's script (jobs/scheduler/sbatch.py)
_say = partial(print, flush=True)  # into the job's output


@dataclass(frozen=True)
class Place:
    """Where this process is: SLURM's variables."""

    job: str  # as scontrol takes it: 1234, or 1234_5 for task 5 of an array
    restart: int
    index: int  # of the task in the submission
    node: str
    node_rank: int
    num_nodes: int
    task_on_node: int = 0

    @staticmethod
    def here(environment: Mapping[str, str]) -> Place:
        """The place that SLURM's environment describes."""
        task = environment.get("SLURM_ARRAY_TASK_ID")
        array = f"{environment.get('SLURM_ARRAY_JOB_ID')}_{task}"
        return Place(
            job=environment["SLURM_JOB_ID"] if task is None else array,
            restart=int(environment.get("SLURM_RESTART_COUNT", "0")),
            index=int(task or "0"),
            node=environment.get("SLURMD_NODENAME") or socket.gethostname(),
            node_rank=int(environment.get("SLURM_NODEID", "0")),
            num_nodes=int(environment.get("SLURM_JOB_NUM_NODES", "1")),
            task_on_node=int(environment.get("SLURM_LOCALID", "0")),
        )


class SlurmIntent(Intent):
    """Of a submission to SLURM."""

    sweep: str
    profile: SlurmProfile
    processes_per_node: int
    cpus_per_node: int | None
    train_command: list[str]
    exclude: list[str]


def run_task(root: str, submission: str) -> None:
    """Execute the runs of `submission` (a path below `root`) that this job is for."""
    signals = Signals()
    signals.listen()
    intent = SlurmIntent.of(Path(root) / submission)
    place = Place.here(os.environ)
    if place.task_on_node:  # a profile asks for one task per node, and refuses what says otherwise
        _say(f"task {place.task_on_node} on {place.node}: the job has several tasks on a node; the first one trains, not this")
        sys.exit(0)
    job = _Job(Path(root), Path(root) / submission, intent, place, signals)
    try:
        sys.exit(job.lead() if place.node_rank == 0 else job.follow())
    finally:  # not where this process is killed: the job's script starts it again then
        if not_ended := os.environ.get(NOT_ENDED):
            with suppress(OSError):
                Path(not_ended).unlink()


class _Job:
    def __init__(self, root: Path, submission: Path, intent: SlurmIntent, place: Place, signals: Signals) -> None:
        self.root = root
        self.intent = intent
        self.place = place
        self.signals = signals
        self.scheduler = Scheduler()
        self.profile = intent.profile
        self.runs = [RunDir(root, signature) for signature in intent.signatures(place.index)]
        self.published = submission / "executions" / f"{place.job}-{place.restart}.json"  # what the other nodes wait for
        self._deadline: float | None = None
        self._queue_s: float | None = None
        self._first_failure_s: float | None = None

    def lead(self) -> int:
        """Train the runs; 0 if they are done, paused, cancelled or not ours any more."""
        left_s = self.scheduler.time_left_s(self.place.job)
        if left_s is not None:
            self._deadline = time.monotonic() + left_s - self.profile.signal_delay_s
        self._queue_s = self.scheduler.waited_s(self.place.job)
        self._wait_for_room()
        members = [member for run in self.runs if (member := self._next_attempt(run)) is not None]
        if not members:
            self._publish(None, "", 0)
            self._tell()
            return 0
        address, port = (address_of(self.place.node, os.environ) if self.place.num_nodes > 1 else ""), _free_port()
        self._publish(members[0].attempt, address, port)
        training = Training(members, self._command(address, port), {})
        for member in members:
            step = member.run.newest_step()
            _say(f"{member.run.path} attempt {member.attempt.number} on {self.place.node}, from step {step}")
        submitted, now = self.intent.code_version, code_version()
        if submitted != now:
            _say(f"WARNING: the code has changed since the submission: {submitted} then, {now} now (see --code snapshot)")
        ends, without_node = self._train(training)
        ends = [(member, self._with_setup(ended)) for member, ended in ends]
        self._end(training, ends, without_node)
        self._tell()
        states = {ended.state for ended in [*training.left, *(end for _, end in ends)]}
        return 0 if states <= {"done", "paused", "cancelled"} else 1

    def _wait_for_room(self) -> None:
        """Wait for as much as the pre-flight wants, not beyond the job's own time, and no longer than node 0 does."""

        def over() -> bool:
            return self._end_requested() or self.published.exists()

        limit_s = WAIT_S if self._deadline is None else min(WAIT_S, self._deadline - time.monotonic())
        min_free_gib = self.profile.min_free_gib if self.profile.preflight else None
        wait_for_room(self.root, min_free_gib=min_free_gib, stop=over, limit_s=limit_s)

    def _tell(self) -> None:
        """Send the messages that the profile's `notify` wants."""
        for line in tell_of_ended(self.root, self.intent.sweep, [run.signature for run in self.runs]):
            _say(line)

    def _with_setup(self, ended: Outcome) -> Outcome:
        """An end, with the lines of the profile's setup that have failed where they may be why."""
        if ended.state != "failed" and bad_nodes.PREFLIGHT not in ended.reason:
            return ended
        return replace(ended, reason=with_setup(ended.reason, os.environ.get(SETUP_FAILED, "")))

    def follow(self) -> int:
        """Take part in the training that node 0 leads."""
        self._wait_for_room()
        deadline = time.monotonic() + FOLLOWERS_WAIT_S
        while (published := read_json(self.published)) is None:
            if "SIGTERM" in self.signals.received or time.monotonic() > deadline:
                return 1
            time.sleep(POLL_S)
        if published["attempt"] is None:
            return 0
        (run,) = self.runs
        attempt = run.attempt(published["attempt"])
        member = Member(run, attempt)
        training = Training([member], self._command(published["master_addr"], published["master_port"]), {})
        problem, _ = self._preflight(member)
        if problem is not None:
            return self._report_node(attempt, problem.reason)
        log = attempt.path / f"log.node{self.place.node_rank}.txt"
        process = training.start(log)
        ended = Request("node 0 has ended", kill=True)
        code, killed_for = training.wait(
            process, lambda: ended if attempt.exit_json.exists() or _following(attempt).exists() else None
        )
        return self._report_node(attempt, failure_of(code, log)) if code and not killed_for else 0

    def _next_attempt(self, run: RunDir) -> Member | None:
        """The attempt of this execution, started; None if there is nothing to do, or another process has the run."""
        try:
            return self._claim_next(run, run.attempts())
        except RunError as error:  # a damaged record: the run's state says so, and the others go on
            _say(f"{error}; left alone")
            return None

    def _claim_next(self, run: RunDir, attempts: list[AttemptDir]) -> Member | None:
        last = attempts[-1] if attempts else None
        claim = read_record(Claim, last.claim_json) if last else None
        if last is None or claim is None or claim.token != self.intent.token:
            _say(f"{run.path}: another submission has this run now; nothing to do")
            return None
        if create_exclusive(last.start_json, to_json(self._start_document(run))):
            return Member(run, last)
        if reason := self._why_nothing_to_do(run, last):
            _say(f"{last.path}: {reason}; nothing to do")
            return None
        config = last.config_yaml.read_bytes() if last.config_yaml.is_file() else b""
        following = run.claim_attempt(last.number + 1, claim.again(), config)
        if following is None:
            return None
        if cancel_requested(run, last):  # when it was over already, or was killed before it could record that
            withdraw(following, "cancelled", "cancelled between two executions")
        elif reason := self._why_given_up(run):
            _say(reason)
            withdraw(following, "failed", reason)
        elif create_exclusive(following.start_json, to_json(self._start_document(run))):
            return Member(run, following)
        return None

    def _why_nothing_to_do(self, run: RunDir, last: AttemptDir) -> str:
        """Why there is nothing left to do after the last attempt, which has been started; empty if there is."""
        start, ended = read_record(Start, last.start_json), read_record(Exit, last.exit_json)
        left = read_record(Left, last.left_json)
        reason = why_nothing_to_do(self.place.job, run.result_json.exists(), start, ended, left)
        if reason == FAILED_BEFORE and left is not None:  # and whoever was to write it down was killed
            end = {"state": "failed", "exit_code": None, "reason": left.reason, "left": True}
            create_exclusive(last.exit_json, to_json({**end, "finished_utc": left.utc, "duration_s": None}))
        return reason

    def _why_given_up(self, run: RunDir) -> str:
        """Why there is no point in another execution after these; empty if there is one."""
        history, of = History.of(run, self.intent.token), self.profile
        return history.why_given_up(max_attempts=of.max_attempts, max_idle_attempts=of.max_idle_attempts)

    def _start_document(self, run: RunDir) -> dict[str, Any]:
        return {
            "process": ProcessId.mine().model_dump(),
            "host": socket.gethostname(),
            "nodes": os.environ.get("SLURM_JOB_NODELIST", self.place.node),
            "job": {"id": self.place.job, "restart": self.place.restart, "queue_s": self._queue_s},
            "step": run.newest_step(),
            "code_version": code_version(),
            "started_utc": utc_now(),
        }

    def _publish(self, attempt: AttemptDir | None, address: str, port: int) -> None:
        if self.place.num_nodes == 1:
            return
        make_folders(self.published.parent)
        number = None if attempt is None else attempt.number
        write_json(self.published, {"attempt": number, "master_addr": address, "master_port": port})

    def _command(self, master_addr: str, port: int) -> list[str]:
        if self.place.num_nodes == 1:
            return self.intent.train_command
        return [
            *TORCHRUN,
            f"--nnodes={self.place.num_nodes}",
            f"--node-rank={self.place.node_rank}",
            f"--nproc-per-node={self.intent.processes_per_node}",
            "--rdzv-backend=static",
            f"--master-addr={master_addr}",
            f"--master-port={port}",
            "--no-python",
            *BOUND,
            *TRAIN,
        ]

    def _train(self, training: Training) -> tuple[list[tuple[Member, Outcome]], str]:
        """How the attempts ended that are not recorded yet, and a node that is to blame for it and to be avoided."""
        problem, without_node = self._preflight(training.active[0])
        if problem is not None:
            return [(member, problem) for member in training.active], without_node
        ends = training.supervise(lambda: self._request(training))
        if self._end_requested():  # a training may have got the signal before it was deaf to it, or was too slow
            last = self.signals.received[-1]
            return [
                (member, Outcome("interrupted", ended.exit_code, f"signal {last}: {ended.reason}"))
                if ended.state == "failed"
                else (member, ended)
                for member, ended in ends
            ], ""
        if self.place.num_nodes == 1 or not ends:
            return ends, ""
        ((member, ended),) = ends
        ended, without_node = self._blame(ended, member.attempt)
        return [(member, ended)], without_node

    def _request(self, training: Training) -> Request | None:
        """What this execution wants of its training now."""
        if any(_following(member.attempt).exists() for member in training.active):
            return Request("another execution of this run has taken over", kill=True)
        failed = self._failed_nodes(training.active[0].attempt) if training.active else []
        if failed:
            self._first_failure_s = self._first_failure_s or time.monotonic()
            if time.monotonic() - self._first_failure_s > FOLLOWERS_GRACE_S:
                return Request(failed[0][1], kill=True)
        left_s = math.inf if self._deadline is None else self._deadline - time.monotonic()
        if left_s <= 0:
            return Request(TIME_LIMIT)
        told = [name for name in self.signals.received if name != "SIGUSR2" or not left_s < EARLY_S]
        return Request(f"signal {told[0]}") if told else None

    def _failed_nodes(self, attempt: AttemptDir) -> list[tuple[str, str]]:
        """Other nodes whose part of the training has failed, with the reason."""
        if self.place.num_nodes == 1:
            return []
        reports = [read_json(path) or {} for path in sorted(attempt.path.glob("node*.json"))]
        return [(str(report.get("node")), f"on {report.get('node')}: {report.get('reason')}") for report in reports]

    def _blame(self, ended: Outcome, attempt: AttemptDir) -> tuple[Outcome, str]:
        """Where several nodes have failed, prefer a reason that is not just the loss of the others."""
        if ended.state != "failed":
            return ended, ""
        deadline = time.monotonic() + REPORTS_WAIT_S
        while is_loss_of_peer(ended.reason) and not self._failed_nodes(attempt) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        for node, reason in self._failed_nodes(attempt):
            if bad_nodes.PREFLIGHT in reason:
                return Outcome("interrupted", None, reason), "" if _is_for_room(reason) else node
            if not is_loss_of_peer(reason) and is_loss_of_peer(ended.reason):
                return Outcome("failed", ended.exit_code, reason), ""
        return ended, ""

    def _report_node(self, attempt: AttemptDir, reason: str) -> int:
        write_json(attempt.path / f"node{self.place.node_rank}.json", {"node": self.place.node, "reason": reason})
        return 1

    def _preflight(self, member: Member) -> tuple[Outcome | None, str]:
        """Check this node: how the attempt ends, None if it is fit, and the node if that is to blame, which is recorded."""
        if not self.profile.preflight:
            return None, ""
        try:
            with append_regular(member.attempt.log) as log:
                report = preflight(self._preflight_command(member), log)
        except OSError as error:
            if is_full(error):
                return Outcome("interrupted", None, f"{bad_nodes.PREFLIGHT}: {error}"), ""
            return Outcome("failed", None, str(error)), ""
        failed = [check for check in report["checks"] if not check["ok"]]
        if not failed:
            return None, ""
        reason = f"{bad_nodes.PREFLIGHT}: " + "; ".join(f"{check['name']}: {check['detail']}" for check in failed)
        blamed = {check["blames"] for check in failed}
        if "node" in blamed:
            bad_nodes.record(self.root, self.intent.cluster or "", self.place.node, reason)
            return Outcome("interrupted", None, f"node {self.place.node}: {reason}"), self.place.node
        return Outcome("interrupted" if blamed == {"disk"} else "failed", None, reason), ""

    def _preflight_command(self, member: Member) -> list[str]:
        command = [sys.executable, "-m", "vitpa.preflight", literal_path(member.attempt.config_yaml)]
        command += [f"--gpus={self.profile.gpus_per_node}", f"--min-free-gib={self.profile.min_free_gib}"]
        cpus = self.intent.cpus_per_node
        return [*command, f"--cpus={cpus}"] if cpus else command

    def _end(self, training: Training, ends: list[tuple[Member, Outcome]], without_node: str) -> None:
        """Write exit.json, and have SLURM start the job again if that can help one of the runs."""
        unfinished = [(member, ended) for member, ended in ends if ended.state in ("interrupted", "failed")]
        step = last_step([member.run for member, _ in unfinished])
        refusals = [self._why_not_requeued(member, ended, without_node, step) for member, ended in unfinished]
        refusal = refusals[0] if all(refusals) and refusals else ""
        if unfinished and not refusal:
            for member, ended in ends:
                self._record(training, member, ended, requeued=(member, ended) in unfinished)
            refusal = self._requeue()
            if not refusal:
                self._leave_out(without_node)
                self._wait_for_the_end()
                return
        for member, ended in ends:
            why = refusal if (member, ended) in unfinished else ""
            _say(f"{ended.state} ({ended.reason})" + (f"; not requeued: {why}" if why else ""))
            self._record(training, member, ended, requeued=False, not_requeued=why)

    def _record(self, training: Training, member: Member, ended: Outcome, **more: object) -> None:
        """Write exit.json. Without it, on a full disk, the run counts as lost, and goes on from its checkpoint as well."""
        try:
            training.record(member, ended, **more)
        except OSError as error:
            _say(f"{error.filename}: {error.strerror}; the attempt ended as {ended.state} ({ended.reason})")

    def _why_not_requeued(self, member: Member, ended: Outcome, without_node: str, step: int) -> str:
        """Why the job is not requeued for a run after this end, whose runs all have a checkpoint of `step`; empty if it is."""
        return End(
            state=ended.state,
            reason=ended.reason,
            told_to_end=self._end_requested(),
            followed=_following(member.attempt).exists(),
            bad_node=bool(without_node),
            disk_full=_is_for_room(ended.reason) or not has_room(self.root),
            first_step=first_step(member.attempt),
            last_step=step,
            given_up=self._why_given_up(member.run),
        ).why_not_requeued

    def _end_requested(self) -> bool:
        return not {"SIGTERM", "SIGINT"}.isdisjoint(self.signals.received)

    def _requeue(self) -> str:
        """Have SLURM start this job again; why that cannot be, empty if it will."""
        refusal = ""
        for _ in range(REQUEUE_TRIES):
            if self._end_requested():  # also while the controller did not answer
                return "cancelled"
            try:
                with _shielded():
                    job = self.scheduler.job(self.place.job, self.intent.token)
                    if job is None:  # started by hand in an allocation that has other uses
                        return f"SLURM does not know job {self.place.job} as one of this submission"
                    self.scheduler.requeue(job)
            except SchedulerError as error:
                refusal = str(error)
                time.sleep(REQUEUE_WAIT_S)
            else:
                _say("requeued")
                return ""
        return refusal

    def _leave_out(self, without_node: str) -> None:
        """Have the next execution avoid a node, and those that have failed before."""
        if not without_node:
            return
        try:
            with _shielded():
                failed = bad_nodes.failed(self.root, self.intent.cluster or "", self.scheduler)
                names = dict.fromkeys([*(node.name for node in failed), without_node])
                wanted = self.scheduler.hostnames(self.profile.nodelist) if self.profile.nodelist else []
                left_out = [name for name in names if name not in wanted]  # else the job would wait for ever
                job = self.scheduler.job(self.place.job, self.intent.token)
                if job is not None and left_out:  # the list that SLURM has is replaced
                    self.scheduler.leave_out(job, [*filter(None, [self.profile.exclude]), *left_out])
        except SchedulerError as error:
            _say(f"cannot keep the job off {without_node}: {error}")

    def _wait_for_the_end(self) -> None:
        """SLURM ends a job that it requeues, in its own time."""
        deadline = time.monotonic() + 300
        while not self._end_requested() and time.monotonic() < deadline:
            time.sleep(POLL_S)


def _following(attempt: AttemptDir) -> Path:
    return attempt.path.with_name(f"{attempt.number + 1:04d}")


def _is_for_room(reason: str) -> bool:
    return cause_of(reason, "").name == "disk full"


@contextmanager
def _shielded() -> Iterator[None]:
    """Keep SIGTERM from what is started in the body: SLURM sends it to every process of a job as soon as that is requeued."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def address_of(node: str, environment: Mapping[str, str]) -> str:
    """Where others find node 0, which this is: by its name in SLURM, unless that is no host's (slurm.conf(5), NodeHostname).

    Else by the address of the node on which the job's script has called srun, which is node 0, too.
    """
    try:
        socket.getaddrinfo(node, None)
    except (OSError, UnicodeError):
        return environment.get("SLURM_LAUNCH_NODE_IPADDR") or node
    return node


def _free_port() -> int:
    """A port that is free on this node now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
