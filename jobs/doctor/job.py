"""The probe job of `vitpa doctor`: submitted with the profile, waited for, read, cancelled, and its files removed."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from jobs.doctor.cluster import Check
from jobs.profile import SlurmProfile
from jobs.scheduler.client import Scheduler, SchedulerError
from jobs.scheduler.own_jobs import SlurmJob
from jobs.scheduler.sbatch import ON_EXIT, slurm_executor
from vitpa.installation import KEEP_BYTECODE, NO_BYTECODE
from vitpa.records import RunError, read_json

PROBE = Path(__file__).resolve().with_name("probe.py")
TIME_S = 600  # limit of the job
RESTART_WAIT_S = 30  # SLURM may take minutes
LATE_S = 10.0  # a file of the job that is seen later than this is seen late
POLL_S, ASK_EVERY_S, SAY_EVERY_S = 0.1, 2.0, 15.0
COMMENT = "vitpa-doctor: "
LAST_WORDS = '$(printf %s "$said" | tail -n 1 | tr -c "[:alnum:] ./:_()-" " " | cut -c 1-300)'
SAY = f'scontrol update JobId=$SLURM_JOB_ID Comment="{COMMENT}{LAST_WORDS}"'


def script_of(profile: SlurmProfile, folder: Path, root: Path, specification: dict[str, Any]) -> str:
    """The probe's job script: as a run's, with a short time limit and no output files. Its token is the folder's name.

    What the probe says when it fails goes into the job's comment: it may be that it cannot write to the shared folder.

    Raises:
        ValueError: submitit does not know a parameter.
    """
    short = profile.model_copy(
        update={"time": str(min(TIME_S, profile.time_s) // 60), "signal_delay_s": 30, "mail_type": None, "mail_user": None}
    )
    executor = slurm_executor(
        short, folder, root=root, name="vitpa-doctor", token=folder.name, exclude=[], indices=[0], count=1
    )  # fmt: skip
    probe = shlex.join([sys.executable, "-P", str(PROBE), json.dumps(specification), str(folder)])
    inner = f"said=$({probe} 2>&1) || {SAY}"
    script: str = executor._make_submission_file_text(f"/bin/bash -c {shlex.quote(inner)}", "doctor")
    script = re.sub(re.escape(str(folder)) + r"/%j_[%\w]+_log\.(out|err)", "/dev/null", script)
    # what ends the job before the probe has a word: setup, or an srun that does not take its arguments
    script = script.replace(ON_EXIT, f"said=$({ON_EXIT} 2>&1); {SAY}")
    return re.sub(
        r"^(srun .*)$", lambda line: f"said=$({line[1]} 2>&1) || {SAY.replace('tail', 'head')}", script, flags=re.MULTILINE
    )


class ProbeJob:
    """One submitted probe; `with` sees that nothing of it stays."""

    def __init__(self, scheduler: Scheduler, folder: Path, script: str, say: Callable[[str], None]) -> None:
        self.scheduler, self.folder, self.script, self.say = scheduler, folder, script, say
        self.token = folder.name

    def __enter__(self) -> ProbeJob:
        with tempfile.NamedTemporaryFile("w", prefix=f"vitpa-{self.token}-", suffix=".sh") as file:
            file.write(self.script)
            file.flush()
            self.job = self.scheduler.submit(file.name, self.token)
        return self

    def __exit__(self, *_: object) -> None:
        if self._seen().live:
            self.scheduler.cancel([self.job])
            deadline = time.monotonic() + 20
            while self._seen().live and time.monotonic() < deadline:
                time.sleep(0.5)

    def checks(self, wait_s: float, nodes: int) -> Iterator[Check]:
        """What the job finds out; waits `wait_s` for its start, and again for its report."""
        self.say(f"probe job {self.job.id} is submitted; waiting up to {wait_s:.0f} s for it to start (Ctrl-C cancels it)")
        hello, seen = self._wait_for("hello.0.json", wait_s)
        if hello is None:
            yield self._never_seen(seen, wait_s)
            return
        yield Check("probe job", "ok", f"job {self.job.id} ran on {seen.nodes or hello['host']}")
        began_s, began = time.time(), time.monotonic()
        (self.folder / "ping").touch()
        pong, seen = self._wait_for("pong.json", wait_s)
        if pong is None:
            yield Check(
                "shared folder", "problem", f"{self.folder}: the job has not seen a file of ours in {wait_s:.0f} s", _SHARED
            )
            return
        yield from _of_sharing(self.folder.parent.parent, time.monotonic() - began, pong["utc_s"] - began_s)
        for node in range(nodes):
            report, seen = self._wait_for(f"report.{node}.json", wait_s)
            if report is None:
                yield Check("report", "problem", f"node {node} has not reported in {wait_s:.0f} s ({seen.state})", _WAIT)
                return
            yield from checks_of(report, prefix=f"{report.get('host')}: " if nodes > 1 else "")
        yield self._of_requeue(wait_s)

    def _of_requeue(self, wait_s: float) -> Check:
        asked, seen = self._wait_for("requeue.json", min(wait_s, 20))
        restarted, seen = self._wait_for("restarted.json", min(wait_s, RESTART_WAIT_S)) if asked else (None, seen)
        error = str((_read(self.folder / "requeue.json") or {}).get("error") or "")
        if restarted:
            return Check("requeue", "ok", f"the job was requeued from inside and came back (restart {restarted['restart']})")
        if error or not asked:
            return Check(
                "requeue",
                "problem",
                f"the job could not be requeued from inside: {error or 'it did not get so far'}",
                "runs end at the time limit then; set `time` so long that they are done, or submit again each time",
            )
        if seen.state in ("PENDING", "REQUEUED", "CONFIGURING", "COMPLETING"):
            return Check("requeue", "ok", "the job was requeued from inside; its restart was not waited for")
        return Check("requeue", "warning", f"the job was asked to be requeued and is now {seen.state}", _WAIT)

    def _never_seen(self, seen: SlurmJob, wait_s: float) -> Check:
        if seen.state == "PENDING":
            return Check(
                "probe job",
                "warning",
                f"it did not start in {wait_s:.0f} s ({seen.reason}); the other checks are done",
                _WAIT,
            )
        where = f" on {seen.nodes}" if seen.nodes else ""
        said = seen.comment.removeprefix(COMMENT) if seen.comment.startswith(COMMENT) else ""
        if said.startswith(("setup ended", "srun: ")):
            return Check("probe job", "problem", f"it ended{where} before the probe began: {said.strip()}", _SETUP)
        what = f"says: {said.strip()}" if said else f"is {seen.state}; it left no file in {self.folder}"
        return Check("shared folder", "problem", f"the probe job{where} {what}", _SHARED)

    def _wait_for(self, name: str, limit_s: float) -> tuple[dict[str, Any] | None, SlurmJob]:
        """A file of the job's, and how the job is; None if it does not come in time, or the job has ended without it."""
        deadline, asked_s, said_s = time.monotonic() + limit_s, 0.0, time.monotonic()
        seen = self.job
        while True:
            if (document := _read(self.folder / name)) is not None:
                return document, self._seen()
            now = time.monotonic()
            if now - asked_s > ASK_EVERY_S:
                asked_s, seen = now, self._seen()
            if not seen.live:  # what it has written may arrive late, unless it says that it could not write
                deadline = min(deadline, now + (0 if seen.comment.startswith(COMMENT) else LATE_S))
            if now > deadline:
                return None, self._seen()
            if now - said_s > SAY_EVERY_S:
                said_s = now
                self.say(f"still waiting: {seen.state}" + (f" ({seen.reason})" if seen.state == "PENDING" else ""))
            time.sleep(POLL_S)

    def _seen(self) -> SlurmJob:
        """The job, as SLURM shows it now; over if SLURM has forgotten it."""
        try:
            return self.scheduler.job(self.job.id, self.token) or replace(self.job, state="COMPLETED")
        except SchedulerError as error:
            return replace(self.job, state="COMPLETED" if "Invalid job id" in str(error) else "UNKNOWN")


_SHARED = "--root has to be a folder that every node can see and write to, under the same path"
_SETUP = "fix `setup`, `srun_args` or additional_parameters in the profile"
_WAIT = "try again later, or with a longer --wait-s"
_HINTS = {
    "cpus": "cpus_per_gpu or cpus_per_task in the profile",
    "disk": "make room, or choose another --root",
    "preflight": "see whether the package is installed where the job runs",
    "gpu_count": "gpus_per_node (or gres) in the profile says what a run gets",
    "data": "vitpa prep makes it; --data-dir says where it is, under a path that every node can see",
    "vitpa": "install it in an environment that every node can see, and start vitpa from there",
    "torch": "pip install torch in the environment of the jobs; `setup` in the profile can load modules",
    "ffcv": "pip install ffcv in the environment of the jobs, with its system packages; `setup` can load modules",
}


def _of_sharing(root: Path, round_trip_s: float, ahead_s: float) -> Iterator[Check]:
    text = f"{root}: what the job writes is seen here, and the other way; there and back in {round_trip_s:.1f} s"
    if round_trip_s > LATE_S:
        yield Check("shared folder", "warning", text, "states are shown that much late; ask for actimeo=1 or noac if it hurts")
    else:
        yield Check("shared folder", "ok", text)
    offset = ahead_s - round_trip_s / 2
    yield Check("clock", "ok", f"the node's clock is {offset:+.1f} s from ours, give or take {round_trip_s / 2:.1f} s")


class _Found(BaseModel):
    """What one check of the probe has found."""

    name: str = ""
    ok: bool
    detail: str
    compiled: bool = True  # a package, which was imported


class _Report(BaseModel):
    """What the probe reports; see `probe.look`."""

    host: str
    python: str
    cpus: int
    imports: dict[str, _Found]
    gpus: list[str]
    checks: list[_Found]


def checks_of(document: object, prefix: str = "", *, gpus_are_optional: bool = False) -> Iterator[Check]:
    """A report of the probe, as JSON or read from it, check by check."""
    try:
        report = _Report.model_validate_json(document) if isinstance(document, str) else _Report.model_validate(document)
    except ValidationError:
        yield Check("report", "problem", f"{prefix}what the probe reports is damaged: {str(document)[:200]}", _WAIT)
        return
    yield Check("python", "ok", f"{prefix}{report.python} on {report.host}, {report.cpus} CPUs")
    for name, found in report.imports.items():
        if found.compiled:
            yield _verdict(name, found.ok, f"{prefix}{found.detail}")
        else:
            yield Check(name, "warning", f"{prefix}{found.detail}; {NO_BYTECODE}", KEEP_BYTECODE)
    if report.gpus:
        yield Check("GPUs", "ok", f"{prefix}{'; '.join(report.gpus)}")
    elif gpus_are_optional:
        yield Check("GPUs", "warning", "none here (nvidia-smi): runs train on the CPU", "use a machine with one, or a cluster")
    for found in report.checks:
        yield _verdict(found.name, found.ok, f"{prefix}{found.detail}")


def _verdict(name: str, ok: bool, detail: str) -> Check:
    if ok:
        return Check(name, "ok", detail)
    return Check(name, "problem", detail, _HINTS.get(name.partition(" ")[0], "another node may do; tell the administrators"))


def _read(path: Path) -> dict[str, Any] | None:
    """A file of the job's; None if it is not there, or cannot be read."""
    try:
        return read_json(path)
    except RunError as error:
        if isinstance(error.__cause__, OSError):
            return None
        raise


def remove(folder: Path, root_was_there: bool) -> None:
    """Remove the probe's folder, `doctor` if it is empty, and the root if it was made for this."""
    shutil.rmtree(folder, ignore_errors=True)
    made = [folder.parent] if root_was_there else [folder.parent, folder.parent.parent]
    for path in made:
        with contextlib.suppress(OSError):  # not made, or others use it
            path.rmdir()
