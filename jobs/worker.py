"""What a job does: works through the claimed runs of its submission, one at a time, and records how each ended.

It takes a run by creating its start.json, starts the training as a process, and waits. It never outlives its use: it ends
when every claim of its submission has been started by somebody. The training never outlives the worker (jobs/bound.py).

A request to stop is the file `stop` in the run's directory, {reason, attempt, now, utc}: the trainer reads it at a step
boundary, writes a checkpoint and exits 0 without a result. `attempt` says whom it is meant for. Signals to the worker
(SIGTERM, SIGINT, SIGUSR2) become such a file.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from jobs.bound import PARENT, child_environment
from jobs.profile import Slot
from jobs.slots import take_slot
from vitpa.config import (
    CLAIMED,
    AttemptDir,
    ProcessId,
    RunDir,
    RunError,
    create_exclusive,
    load_config,
    read_json,
    to_json,
    utc_now,
    write_json,
)

POLL_S = 0.3
BOUND = (sys.executable, "-m", "jobs.bound")


class Signals:
    """Whether this worker has been told to stop, and by which signal."""

    def __init__(self) -> None:
        self.received = ""

    def listen(self) -> None:
        """From now on note these signals instead of dying of them."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name


def work(root: str, submission: str) -> None:
    """Work through the claims of `submission` (a path below `root`)."""
    signals = Signals()
    signals.listen()
    intent = read_json(Path(root) / submission / "intent.json")
    assert intent is not None, "a job is started only after the intent is written"
    slots = [Slot.model_validate(slot) for slot in intent["slots"]]

    def useful() -> bool:
        return not signals.received and any(True for _ in waiting_claims(Path(root), intent))

    slot = take_slot(Path(root), slots, useful)
    if slot is None:
        return
    for run, attempt, claim in waiting_claims(Path(root), intent):
        if signals.received:
            return
        start = {
            "process": ProcessId.mine().model_dump(),
            "host": os.uname().nodename,
            "slot": slot.units,
            "gpus": slot.gpus,
            "started_utc": utc_now(),
        }
        if create_exclusive(attempt.start_json, to_json(start)):
            Training(run, attempt, claim, slot, intent["train_command"]).supervise(signals)


def waiting_claims(root: Path, intent: dict[str, Any]) -> Iterator[tuple[RunDir, AttemptDir, dict[str, Any]]]:
    """The claims of a submission that nobody has started or withdrawn, in order."""
    for entry in intent["runs"]:
        run = RunDir(root, entry["signature"])
        attempt = AttemptDir(run.attempts_dir / f"{entry['attempt']:04d}")
        if attempt.start_json.exists():
            continue
        try:
            claim = read_json(attempt.claim_json)
        except RunError:
            continue  # `status` shows it as broken; the others go on
        if claim is not None and claim.get("token") == intent["token"] and isinstance(claim.get("runtime"), dict):
            yield run, attempt, claim


class Training:
    """One attempt of one run, from start.json to exit.json. It belongs to this worker."""

    def __init__(self, run: RunDir, attempt: AttemptDir, claim: dict[str, Any], slot: Slot, command: list[str]) -> None:
        self.run = run
        self.attempt = attempt
        self.claim = claim
        self.slot = slot
        self.command = command

    def supervise(self, signals: Signals) -> None:
        """Train until the end or until told to stop, and write exit.json."""
        began = time.monotonic()
        try:
            state, code, reason = self._train(signals)
        except (OSError, RunError, ValueError) as error:  # nothing was trained: a full disk, an unusable config.yaml
            state, code, reason = "failed", None, str(error)
        self._take_stop()
        ended = {
            "state": state,
            "exit_code": code,
            "reason": reason,
            "finished_utc": utc_now(),
            "duration_s": round(time.monotonic() - began, 3),
        }
        write_json(self.attempt.exit_json, ended)

    def _train(self, signals: Signals) -> tuple[str, int | None, str]:
        stop = self._take_stop()
        if stop is not None and stop.get("attempt", self.attempt.number) == self.attempt.number:  # not a left-over
            return "cancelled", None, "cancelled before it started"
        self._set_broken_result_aside()
        process = self._start()
        try:
            while True:
                try:
                    code = process.wait(timeout=POLL_S)
                    break
                except subprocess.TimeoutExpired:
                    self._pass_on(signals, process)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return self._outcome(code)

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
            self.run.result()
        except RunError:
            self.run.result_json.replace(self.attempt.path / "broken-result.json")

    def _start(self) -> subprocess.Popen[bytes]:
        recorded = load_config(self.run.config_yaml).runtime.model_dump(mode="json")
        changed = {key: value for key, value in self.claim["runtime"].items() if recorded.get(key) != value}
        overrides = [f"runtime.{key}={json.dumps(value)}" for key, value in changed.items()]
        environment = {key: value for key, value in child_environment().items() if not key.startswith("SUBMITIT_")}
        environment |= {
            "CUDA_VISIBLE_DEVICES": ",".join(self.slot.gpus),
            CLAIMED: str(self.attempt.path),
            PARENT: str(os.getpid()),
            "PYTHONUNBUFFERED": "1",
        }
        with self.attempt.log.open("ab") as log:
            return subprocess.Popen(
                [*BOUND, *self.command, str(self.run.config_yaml), *overrides],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    def _pass_on(self, signals: Signals, process: subprocess.Popen[bytes]) -> None:
        stop = read_stop(self.run.stop)
        if stop is None and signals.received:
            request = {"reason": f"signal {signals.received}", "attempt": self.attempt.number, "now": False, "utc": utc_now()}
            create_exclusive(self.run.stop, to_json(request))
        if stop is not None and stop.get("now"):
            os.killpg(process.pid, signal.SIGKILL)

    def _outcome(self, code: int) -> tuple[str, int, str]:
        """State, exit code and reason of a training that has ended. A valid result decides; codes are only evidence."""
        try:
            if self.run.result() is not None:
                return "done", code, ""
        except RunError as error:
            return "failed", code, str(error)
        stop = read_stop(self.run.stop)
        if stop is not None and (code == 0 or stop.get("now")):
            reason = str(stop.get("reason"))
            return ("cancelled" if reason == "cancel" else "interrupted"), code, reason
        if code == 0:
            return "failed", code, "the training ended without a result"
        if code < 0:
            name = signal.Signals(-code).name
            return "failed", code, f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
        return "failed", code, last_error(self.attempt.log)


def read_stop(path: Path) -> dict[str, Any] | None:
    """The request in a file `stop`; None if there is none. Made by hand (`touch stop`) it is a request, too."""
    try:
        return read_json(path)
    except RunError:
        return {"reason": "the file stop"}


def last_error(log: Path) -> str:
    """The line of a log that best says why a program failed: the last exception, otherwise the last line."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 100_000))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    exception = re.compile(r"^(\[rank\d+\]: ?)?([\w.]+(Error|Exception|Interrupt)\b.*)")
    found = [match[2] for line in lines if (match := exception.match(line)) and "ChildFailedError" not in line]
    return (found or lines or ["no output"])[-1][:300]
