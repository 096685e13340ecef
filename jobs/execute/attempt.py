"""One attempt of a group of runs: the training process, from start.json to how each ended. Used by every kind of job.

A request to stop is the file `stop` in the run's directory (`Stop`): the trainer reads it at a step
boundary, writes a checkpoint and exits 0 without a result; if it is for a part of the group only, that part is dropped, and
the others go on. `attempt` says whom it is meant for. Signals to the job and its time limit become such files, for all. The
training never outlives the process that supervises it (jobs/execute/die_with_parent.py).
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from jobs.execute.die_with_parent import PARENT
from jobs.failures import is_loss_of_peer
from jobs.groups import in_step
from jobs.records import Claim
from vitpa.arguments import ConfigError, literal_path
from vitpa.attempt import CANCEL, Left, Stop, check_unedited, reason_of_pause
from vitpa.child_process import child_environment
from vitpa.config_file import load_config
from vitpa.documents import append_regular, lines_at_end
from vitpa.records import RunError, create_exclusive, read_record, to_json, utc_now, write_json
from vitpa.rundir import CLAIMED, AttemptDir, RunDir

POLL_S = 0.3
BOUND = (sys.executable, "-m", "jobs.execute.die_with_parent")
TRAIN = (sys.executable, "-m", "vitpa.train")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


class Signals:
    """Whether signals have requested a stop of this process, and which ones."""

    def __init__(self) -> None:
        self.received: list[str] = []  # names, in order

    def listen(self) -> None:
        """From now on note these signals instead of dying of them."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received.append(signal.Signals(number).name)


@dataclass(frozen=True)
class Request:
    """What the supervisor wants of its training: all of it to stop with a checkpoint, or (`kill`) to be gone at once."""

    reason: str
    kill: bool = False


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended: `done`, `paused`, `failed`, `interrupted` or `cancelled`."""

    state: str
    exit_code: int | None
    reason: str


def training_command(processes: int) -> list[str]:
    """How a run is trained by that many processes of one node; its config.yaml is appended."""
    if processes <= 1:
        return list(TRAIN)
    return [*TORCHRUN, "--standalone", f"--nproc-per-node={processes}", "--no-python", *BOUND, *TRAIN]


@dataclass(frozen=True, eq=False)
class Member:
    """A run of a group, with the attempt whose start.json this process has created."""

    run: RunDir
    attempt: AttemptDir

    def stop(self) -> Stop | None:
        """The request to stop, also if it has been taken; None if there is none."""
        taken = Stop.read(self.attempt.stop_json)
        return Stop.read(self.run.stop) or (taken if taken is not None and self._is_for(taken) else None)

    def _is_for(self, taken: Stop) -> bool:
        """Whether a request is no left-over: who cancels may not have seen yet that SLURM has started the run again."""
        if taken.attempt in (None, self.attempt.number):
            return True
        theirs, ours = (read_record(Claim, each.claim_json) for each in (self.run.attempt(taken.attempt), self.attempt))
        submission = theirs.submission if theirs else None
        return taken.reason == CANCEL and submission is not None and ours is not None and ours.submission == submission

    def take_stop(self) -> None:
        """Move `stop` out of the run's directory; it is read afterwards: a request that comes in between is not lost."""
        with suppress(FileNotFoundError):
            self.run.stop.replace(self.attempt.stop_json)


class Training:
    """The training process of a group of runs, mostly of one. Their attempts belong to this process.

    Attempts that end while others of the group go on are recorded at once, with `left` in their exit.json.
    """

    def __init__(self, members: Sequence[Member], command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.active = list(members)  # those whose attempt has not been recorded as over
        self.left: list[Outcome] = []  # how the others ended
        self.command = command
        self.environment = environment
        self.log = members[0].attempt.log
        self._began = time.monotonic()
        self._asked = ""  # for what reason all were asked to stop

    def supervise(self, request: Callable[[], Request | None]) -> list[tuple[Member, Outcome]]:
        """Train until the end, or until `request` or the files `stop` end it; how the attempts not yet recorded ended."""
        try:
            refused = self._refused()
            if len(refused) == len(self.active):
                return refused
            for member, ended in refused:
                self._leave(member, ended)
            code, killed_for = self.wait(self.start(self.log), request)
            self._record_leavers()
            return [(member, self._outcome(member, code, killed_for)) for member in self.active]
        except (OSError, RunError, ValueError) as error:  # nothing was trained: a full disk, say
            return [(member, Outcome("failed", None, str(error))) for member in self.active]
        finally:
            for member in self.active:
                member.take_stop()

    def record(self, member: Member, ended: Outcome, **more: object) -> None:
        """Write exit.json."""
        write_json(
            member.attempt.exit_json,
            {
                "state": ended.state,
                "exit_code": ended.exit_code,
                "reason": ended.reason,
                **more,
                "finished_utc": utc_now(),
                "duration_s": round(time.monotonic() - self._began, 3),
            },
        )

    def start(self, log: Path) -> subprocess.Popen[bytes]:
        """Start the training; what it prints goes to `log`."""
        first, *others = self.active
        arguments = [literal_path(first.attempt.config_yaml)]
        for member in others:
            arguments += ["--with", literal_path(member.attempt.config_yaml)]
        for member in self.active:
            if member.attempt.log != self.log:
                with suppress(FileExistsError):
                    member.attempt.log.symlink_to(os.path.relpath(self.log, member.attempt.path))
        environment = {key: value for key, value in child_environment().items() if not key.startswith("SUBMITIT_")}
        environment |= {
            **self.environment,
            CLAIMED: str(first.attempt.path),
            "PET_LOG_DIR": str(first.attempt.path / "torchrun"),  # its --log-dir; otherwise it leaves folders in /tmp
            PARENT: str(os.getpid()),
            "PYTHONUNBUFFERED": "1",
        }
        with append_regular(log) as file:
            return subprocess.Popen(
                [*BOUND, *self.command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=environment,
                start_new_session=True,
            )

    def wait(self, process: subprocess.Popen[bytes], request: Callable[[], Request | None]) -> tuple[int, str]:
        """Wait for the training's end, passing on requests; its exit code, and why it was killed if it was by us."""
        killed_for = ""
        try:
            while True:
                try:
                    return process.wait(timeout=POLL_S), killed_for
                except subprocess.TimeoutExpired:
                    self._record_leavers()
                    killed_for = self._pass_on(request(), process) or killed_for
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _refused(self) -> list[tuple[Member, Outcome]]:
        """Members that cannot be trained, or not together with the first that can."""
        refused: list[tuple[Member, Outcome]] = []
        fit: list[Member] = []
        for member in self.active:
            member.take_stop()
            if member.stop() is not None:
                refused.append((member, Outcome("cancelled", None, "cancelled before it started")))
                continue
            try:
                check_unedited(member.attempt.config_yaml, load_config(member.attempt.config_yaml))
                _set_broken_result_aside(member)
            except (OSError, RunError, ValueError) as error:
                refused.append((member, Outcome("failed", None, str(error))))
            else:
                fit.append(member)
        for indices in in_step([member.run for member in fit])[1:]:
            reason = "no checkpoint of a step that the runs trained with it have, too: submit again, and it goes on by itself"
            refused += [(fit[index], Outcome("interrupted", None, reason)) for index in indices]
        return refused

    def _pass_on(self, request: Request | None, process: subprocess.Popen[bytes]) -> str:
        if request is not None and not request.kill:
            self._asked = self._asked or request.reason
            for member in self.active:
                if Stop.read(member.run.stop) is None:
                    asked = Stop(reason=self._asked, attempt=member.attempt.number, utc=utc_now())
                    with suppress(OSError):  # a full disk: again at the next look
                        create_exclusive(member.run.stop, to_json(asked.model_dump()))
        if self.active and all((stop := member.stop()) and stop.now for member in self.active):
            os.killpg(process.pid, signal.SIGKILL)
        elif request is not None and request.kill:
            os.killpg(process.pid, signal.SIGKILL)
            return request.reason
        return ""

    def _record_leavers(self) -> None:
        """Record the ends of those that the trainer has dropped, unless all are to stop."""
        for member in list(self.active):
            with suppress(OSError, RunError):  # a full disk: again at the next look
                left = read_record(Left, member.attempt.left_json)
                if left is None:
                    continue
                if left.state in ("failed", "apart"):
                    self._leave(member, Outcome("failed" if left.state == "failed" else "interrupted", None, left.reason))
                elif (stop := member.stop()) is not None and stop.reason != self._asked:
                    self._leave(member, _stopped(stop, None))

    def _leave(self, member: Member, ended: Outcome) -> None:
        member.take_stop()
        self.record(member, ended, left=True)
        self.active.remove(member)
        self.left.append(ended)

    def _outcome(self, member: Member, code: int, killed_for: str) -> Outcome:
        """How an attempt ended when the process did. A valid result decides; codes are only evidence."""
        try:
            if member.run.result() is not None:
                return Outcome("done", code, "")
            if paused := reason_of_pause(member.run, load_config(member.attempt.config_yaml).last_epoch):
                return Outcome("paused", code, paused)
        except (RunError, ConfigError) as error:
            return Outcome("failed", code, str(error))
        if killed_for:
            return Outcome("failed", code, killed_for)
        stop = member.stop()
        dropped = member.attempt.left_json.exists()  # as it was told, a moment before the others
        for_another = code == 1 and any(ended.state == "failed" for ended in self.left)
        if stop is not None and (code == 0 or dropped or for_another or stop.now):
            return _stopped(stop, code)
        return Outcome("failed", code, failure_of(code, self.log))


def _stopped(stop: Stop, code: int | None) -> Outcome:
    return Outcome("cancelled" if stop.reason == CANCEL else "interrupted", code, stop.reason)


def _set_broken_result_aside(member: Member) -> None:
    try:
        result, config = member.run.result(), load_config(member.run.config_yaml)
        trusted = result is None or not config.contradiction_of(result)
    except RunError:
        trusted = False
    if not trusted:
        member.run.result_json.replace(member.attempt.path / "broken-result.json")


def failure_of(code: int, log: Path) -> str:
    """Why a training with this exit code and log ended without a result."""
    if code == 0:
        return "the training ended without a result"
    return _killed_by(signal.Signals(-code).name) if code < 0 else last_error(log)


def _killed_by(name: str) -> str:
    return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def last_error(log: Path) -> str:
    """The line of a log that best says why a program failed.

    That is the last exception, of several processes that of one that did not just lose another one; or the signal that
    torchrun names as the root cause; otherwise the last line.
    """
    try:
        lines = lines_at_end(log)
    except OSError as error:
        return f"{log}: cannot be read ({error.strerror})"
    exception = re.compile(r"^(\[rank\d+\]: ?)?([\w.]+(Error|Exception|Interrupt)\b.*)")
    found = [match[2] for line in lines if (match := exception.match(line)) and "ChildFailedError" not in line]
    causes = [line for line in found if not is_loss_of_peer(line)]
    root_cause = "".join(lines).rpartition("Root Cause (first observed failure)")[2]
    if not causes and (killed := re.search(r"Signal \d+ \((SIG\w+)\) received by PID", root_cause)):
        return _killed_by(killed[1])
    return (causes or found or lines or ["no output"])[-1][:300]
