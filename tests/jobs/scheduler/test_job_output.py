"""Jobs that end before they start their run: the state and its cause, the logs, and how often another one is tried."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from jobs.report.logs import follow, show, show_failures
from jobs.scheduler.job_output import ended_early
from jobs.scheduler.own_jobs import SlurmJob
from jobs.state import RunState, StateReader, early_ends, fails_alike
from jobs.submit.submit import _claim
from jobs.sweep import Run
from tests.support.claims import Queue, slurm_claim
from tests.support.jobs_sweeps import make_sweep
from vitpa.records import read_json

OUTPUT = "sweeps/small/submissions/s/submitit"
SETUP = "loading\nsetup ended the job with exit code 7: exit 7\n"
STEP = "srun: error: node1: task 0: Exited with exit code 1\n"
TRACEBACK = "Traceback (most recent call last):\n  File 'x', line 1\nModuleNotFoundError: No module named 'jobs'\n" + STEP
FAILED_LINE = "/var/spool/slurmd/job7/slurm_script: line 12: cd: /gone: No such file or directory\n"
FAILED_LINE += "setup: `cd /gone` failed with status 1\n"
LIMIT = "slurmstepd: error: *** JOB 7 ON node1 CANCELLED AT 2026-01-01T00:00:00 DUE TO TIME LIMIT ***\n"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_sweep(tmp_path, seeds=1).runs[0]


def print_as_job(root: Path, text: str, suffix: str = "err", identity: str = "7_0") -> None:
    path = root / OUTPUT / f"{identity}_0_log.{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def look(root: Path, run: Run, state: str = "FAILED") -> RunState:
    return StateReader(root, Queue(SlurmJob("7_0", state))).state(run)


@pytest.mark.parametrize(
    ("last_words", "text", "expected"),
    [
        ("FAILED", SETUP, ("failed", "setup ended the job with exit code 7: exit 7")),
        ("FAILED", FAILED_LINE, ("failed", "cd: /gone: No such file or directory; in setup `cd /gone` failed with status 1")),
        ("FAILED", FAILED_LINE + TRACEBACK, ("failed", "named 'jobs'; in setup `cd /gone` failed with status 1")),
        ("FAILED", FAILED_LINE + SETUP, ("failed", "setup ended the job with exit code 7: exit 7")),
        ("COMPLETED", "setup ended the job with exit code 0: exit 0\n", ("failed", "exit code 0: exit 0")),
        ("FAILED", TRACEBACK, ("failed", "ModuleNotFoundError: No module named 'jobs'")),
        ("FAILED", "srun: unrecognized option '--x'\nTry \"srun --help\"\n", ("failed", "srun: unrecognized option '--x'")),
        ("FAILED", "/bin/sh: 1: exec: /gone/python: not found\n" + STEP, ("failed", "/gone/python: not found")),
        ("TIMEOUT", LIMIT, ("failed", "DUE TO TIME LIMIT ***")),
        ("OUT_OF_MEMORY", "slurmstepd: error: Detected 1 oom_kill event\n", ("failed", "oom_kill event")),
        ("NODE_FAIL", "loading\n", ("uncertain", "loading")),
        ("FAILED", None, ("failed", "its node could not write there (full, gone, read-only?), or could not start it")),
    ],
)
def test_state_and_cause(tmp_path: Path, run: Run, last_words: str, text: str | None, expected: tuple[str, str]) -> None:
    slurm_claim(tmp_path, run)
    if text is not None:
        print_as_job(tmp_path, text)
    found = look(tmp_path, run, last_words)
    state, cause = expected
    assert found.state == state
    assert found.reason.startswith(f"its job ended ({last_words}) before it started the run: ")
    assert found.reason.endswith(f"{cause}; see {tmp_path / OUTPUT}")


@pytest.mark.parametrize(
    "make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("nowhere")], ids=["pipe", "folder", "link"]
)
def test_output_that_is_no_file(tmp_path: Path, run: Run, make: Callable[[Path], None]) -> None:
    slurm_claim(tmp_path, run)
    (tmp_path / OUTPUT).mkdir(parents=True)
    make(tmp_path / OUTPUT / "7_0_0_log.err")
    found = look(tmp_path, run)
    assert (found.state, found.reason) == (
        "failed",
        f"its job 7_0 ended (FAILED) before it started the run; see {tmp_path / OUTPUT}",
    )


def test_a_job_that_was_never_there(tmp_path: Path) -> None:
    assert ended_early("", "", tmp_path) == ("uncertain", f"it got no job before it started the run; see {tmp_path}")


def test_logs_show_what_the_job_has_printed(tmp_path: Path, run: Run) -> None:
    slurm_claim(tmp_path, run)
    print_as_job(tmp_path, SETUP)
    print_as_job(tmp_path, "module cuda/12\n", "out")
    print_as_job(tmp_path, "another job", identity="7_1")
    state = look(tmp_path, run)
    texts = []
    for print_logs in (show, show_failures):
        file = io.StringIO()
        print_logs([state], 15, Console(file=file, width=160))
        texts.append(file.getvalue())
    for text in texts:
        assert f"{OUTPUT}/7_0_0_log.err" in text
        assert "setup ended the job with exit code 7: exit 7" in text
        assert "module cuda/12" in text
        assert "another job" not in text
    assert texts[1].startswith("job ended early: 1 failed. To fix it: fix what it says (`setup` in the profile")


def test_followed_logs_show_it_too(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm_claim(tmp_path, run)
    print_as_job(tmp_path, SETUP)
    monkeypatch.setattr("jobs.state.Scheduler", lambda: Queue(SlurmJob("7_0", "FAILED")))
    file = io.StringIO()
    follow([run], tmp_path, Console(file=file, width=160))
    assert "setup ended the job with exit code 7: exit 7" in file.getvalue()


@pytest.mark.parametrize(("last_words", "state"), [("FAILED", "failed"), ("NODE_FAIL", "uncertain")])
def test_it_is_not_tried_without_end(tmp_path: Path, run: Run, last_words: str, state: str) -> None:
    slurm_claim(tmp_path, run)
    print_as_job(tmp_path, SETUP)
    claim = read_json(run.directory(tmp_path).attempts()[0].claim_json) or {}
    for number in (1, 2, 3):
        found = look(tmp_path, run, last_words)
        assert (found.state, found.attempts, early_ends(found, tmp_path)) == (state, number, number)
        assert fails_alike(found, tmp_path) == (number == 3)
        _claim(found, run.directory(tmp_path), claim, "")
