"""One attempt of one run: the training process, from start.json to how it ended. Used by every kind of job.

A request to stop is the file `stop` in the run's directory, {reason, attempt, now, utc}: the trainer reads it at a step
boundary, writes a checkpoint and exits 0 without a result. `attempt` says whom it is meant for. Signals to the job and its
time limit become such a file. The training never outlives the process that supervises it (jobs/bound.py).
"""

from __future__ import annotations

import json
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
from typing import Any

from jobs.bound import PARENT, child_environment
from jobs.causes import is_loss_of_peer
from vitpa.config import (
    CLAIMED,
    AttemptDir,
    RunDir,
    RunError,
    create_exclusive,
    load_config,
    read_json,
    to_json,
    utc_now,
    write_json,
)

Json = Mapping[str, Any]

POLL_S = 0.3
BOUND = (sys.executable, "-m", "jobs.bound")
TRAIN = (sys.executable, "-m", "vitpa.train")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


class Signals:
    """Whether this process has been told to stop, and by which signals."""

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
    """What the supervisor wants of its training: to stop with a checkpoint, or (`kill`) to be gone at once."""

    reason: str
    kill: bool = False


@dataclass(frozen=True)
class Ended:
    """How an attempt ended: `done`, `failed`, `interrupted` or `cancelled`."""

    state: str
    exit_code: int | None
    reason: str


def training_command(processes: int) -> list[str]:
    """How a run is trained by that many processes of one node; its config.yaml and overrides are appended."""
    if processes <= 1:
        return list(TRAIN)
    return [*TORCHRUN, "--standalone", f"--nproc-per-node={processes}", "--no-python", *BOUND, *TRAIN]


class Training:
    """The training process of an attempt. It belongs to this process, which has created the attempt's start.json."""

    def __init__(
        self, run: RunDir, attempt: AttemptDir, claim: Json, command: Sequence[str], environment: Mapping[str, str]
    ) -> None:
        self.run = run
        self.attempt = attempt
        self.claim = claim
        self.command = command
        self.environment = environment
        self._began = time.monotonic()

    def supervise(self, request: Callable[[], Request | None]) -> Ended:
        """Train until the end, or until `request` or the file `stop` ends it."""
        try:
            stop = self._take_stop()
            if stop is not None and stop.get("attempt", self.attempt.number) == self.attempt.number:  # not a left-over
                return Ended("cancelled", None, "cancelled before it started")
            self._set_broken_result_aside()
            process = self.start(self.attempt.log)
            code, killed_for = self.wait(process, request)
            return self._outcome(code, killed_for)
        except (OSError, RunError, ValueError) as error:  # nothing was trained: a full disk, an unusable config.yaml
            return Ended("failed", None, str(error))
        finally:
            self._take_stop()

    def record(self, ended: Ended, **more: object) -> None:
        """Write exit.json."""
        write_json(
            self.attempt.exit_json,
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
        recorded = load_config(self.run.config_yaml).runtime.model_dump(mode="json")
        changed = {key: value for key, value in self.claim["runtime"].items() if recorded.get(key) != value}
        overrides = [f"runtime.{key}={json.dumps(value)}" for key, value in changed.items()]
        environment = {key: value for key, value in child_environment().items() if not key.startswith("SUBMITIT_")}
        environment |= {
            **self.environment,
            CLAIMED: str(self.attempt.path),
            "PET_LOG_DIR": str(self.attempt.path / "torchrun"),  # its --log-dir; otherwise it leaves folders in /tmp
            PARENT: str(os.getpid()),
            "PYTHONUNBUFFERED": "1",
        }
        with log.open("ab") as file:
            return subprocess.Popen(
                [*BOUND, *self.command, str(self.run.config_yaml), *overrides],
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
                    killed_for = self._pass_on(request(), process) or killed_for
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _pass_on(self, request: Request | None, process: subprocess.Popen[bytes]) -> str:
        stop = read_stop(self.run.stop)
        if stop is None and request is not None and not request.kill:
            document = {"reason": request.reason, "attempt": self.attempt.number, "now": False, "utc": utc_now()}
            with suppress(OSError):  # a full disk: again at the next look
                create_exclusive(self.run.stop, to_json(document))
        if stop is not None and stop.get("now"):
            os.killpg(process.pid, signal.SIGKILL)
        elif request is not None and request.kill:
            os.killpg(process.pid, signal.SIGKILL)
            return request.reason
        return ""

    def _take_stop(self) -> dict[str, Any] | None:
        """Move `stop` out of the run's directory, and read it then: a request that comes in between is not lost."""
        taken = self.attempt.path / "stop.json"
        try:
            self.run.stop.replace(taken)
        except FileNotFoundError:
            return None
        return read_stop(taken)

    def _set_broken_result_aside(self) -> None:
        try:
            result, config = self.run.result(), load_config(self.run.config_yaml)
            trusted = result is None or (result.seed, result.attention) == (config.seed, config.model.attention)
        except RunError:
            trusted = False
        if not trusted:
            self.run.result_json.replace(self.attempt.path / "broken-result.json")

    def _outcome(self, code: int, killed_for: str) -> Ended:
        """State, exit code and reason of a training that has ended. A valid result decides; codes are only evidence."""
        try:
            if self.run.result() is not None:
                return Ended("done", code, "")
        except RunError as error:
            return Ended("failed", code, str(error))
        if killed_for:
            return Ended("failed", code, killed_for)
        stop = read_stop(self.run.stop)
        if stop is not None and (code == 0 or stop.get("now")):
            reason = str(stop.get("reason"))
            return Ended("cancelled" if reason == "cancel" else "interrupted", code, reason)
        return Ended("failed", code, failure_of(code, self.attempt.log))


def failure_of(code: int, log: Path) -> str:
    """Why a training with this exit code and log ended without a result."""
    if code == 0:
        return "the training ended without a result"
    return _killed_by(signal.Signals(-code).name) if code < 0 else last_error(log)


def _killed_by(name: str) -> str:
    return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def read_stop(path: Path) -> dict[str, Any] | None:
    """The request in a file `stop`; None if there is none. Made by hand (`touch stop`) it is a request, too."""
    try:
        return read_json(path)
    except RunError:
        return {"reason": "the file stop"}


def last_error(log: Path) -> str:
    """The line of a log that best says why a program failed.

    That is the last exception, of several processes that of one that did not just lose another one; or the signal that
    torchrun names as the root cause; otherwise the last line.
    """
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 100_000))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    exception = re.compile(r"^(\[rank\d+\]: ?)?([\w.]+(Error|Exception|Interrupt)\b.*)")
    found = [match[2] for line in lines if (match := exception.match(line)) and "ChildFailedError" not in line]
    causes = [line for line in found if not is_loss_of_peer(line)]
    root_cause = "".join(lines).rpartition("Root Cause (first observed failure)")[2]
    if not causes and (killed := re.search(r"Signal \d+ \((SIG\w+)\) received by PID", root_cause)):
        return _killed_by(killed[1])
    return (causes or found or lines or ["no output"])[-1][:300]
