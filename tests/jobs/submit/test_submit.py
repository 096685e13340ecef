"""Submission with real processes: launchers and workers killed with -9, several launchers at once, slots, cancel, retry."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.profile import LocalProfile
from jobs.scheduler.client import Scheduler
from jobs.state import StateReader
from jobs.submit.submit import prepare, submit
from jobs.sweep import Sweep, SweepDir
from tests.support.jobs_sweeps import (
    STAND_IN,
    assert_no_process_left,
    exits,
    finished_trainings,
    launch,
    make_sweep,
    most_at_a_time,
    processes_of,
    results,
    settle,
    start_launcher,
)
from tests.support.waiting import wait_for
from vitpa.records import read_json

pytestmark = pytest.mark.slow
SLOTS = 2


def claims(root: Path) -> int:
    return len(list(root.glob("runs/*/attempts/[0-9]*/claim.json")))


def starts(root: Path) -> int:
    return len(list(root.glob("runs/*/attempts/[0-9]*/start.json")))


def submissions(root: Path, file: str) -> int:
    return len(list(root.glob(f"sweeps/*/submissions/*/{file}")))


def assert_each_done_once(root: Path, sweep: Sweep) -> None:
    states = settle(root, sweep)
    assert [state.state for state in states] == ["done"] * len(sweep.runs)
    assert_no_process_left(root)
    assert [ends.count("done") for ends in exits(root, sweep)] == [1] * len(sweep.runs)
    assert finished_trainings(root) == sorted(run.signature for run in sweep.runs)
    assert len(results(root, sweep)) == len(sweep.runs)
    assert most_at_a_time(root) <= SLOTS


@pytest.mark.parametrize(
    "moment", ["intent 1", "claim 1", "claim 4", "claim 8", "helper 1", "receipt 1", "start 1", "start 5"]
)
def test_launcher_killed_then_submitted_again(tmp_path: Path, moment: str) -> None:
    sweep = make_sweep(tmp_path)
    kind, count = moment.split()
    look: Callable[[], int] = {
        "intent": lambda: submissions(tmp_path, "intent.json"),
        "claim": lambda: claims(tmp_path),
        "helper": lambda: submissions(tmp_path, "launch.log"),
        "receipt": lambda: submissions(tmp_path, "receipt.json"),
        "start": lambda: starts(tmp_path),
    }[kind]
    launcher = start_launcher(tmp_path, SLOTS)
    wait_for(lambda: look() >= int(count))
    launcher.kill()
    launcher.wait()
    again = launch(tmp_path, SLOTS)
    assert again.returncode == 0, again.stderr
    assert_each_done_once(tmp_path, sweep)


@pytest.mark.parametrize("launchers", [2, 4])
def test_launchers_at_once(tmp_path: Path, launchers: int) -> None:
    sweep = make_sweep(tmp_path)
    for launcher in [start_launcher(tmp_path, SLOTS) for _ in range(launchers)]:
        assert launcher.wait() == 0
    assert_each_done_once(tmp_path, sweep)
    wait_for(lambda: exits(tmp_path, sweep) == [["done"]] * len(sweep.runs))  # exit.json comes after the result


def test_two_sweeps_share_runs_and_slots(tmp_path: Path) -> None:
    small = make_sweep(tmp_path, seeds=2)
    large = make_sweep(tmp_path, seeds=4, name="large")
    assert {run.signature for run in small.runs} < {run.signature for run in large.runs}
    for launcher in [start_launcher(tmp_path, SLOTS, name=name) for name in ("small", "large")]:
        assert launcher.wait() == 0
    assert_each_done_once(tmp_path, large)


def test_nothing_is_imported_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = make_sweep(tmp_path, seeds=1)
    (tmp_path / "jobs.py").write_text("raise SystemExit('not me')")
    monkeypatch.chdir(tmp_path)
    states = StateReader(tmp_path).states(sweep.runs)
    profile = LocalProfile(slots=SLOTS, runtime={"device": "cpu", "data_dir": f"{tmp_path}/data"})
    monkeypatch.setattr("jobs.submit.submit.training_command", lambda processes: STAND_IN)
    plan = prepare(states, profile, tmp_path, [], Scheduler())
    assert submit("small", plan, tmp_path, Scheduler())[1] == {}
    assert_each_done_once(tmp_path, sweep)


def test_a_bad_run_directory_stops_only_its_own_run(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, seeds=1)
    bad = sweep.runs[0].directory(tmp_path)
    bad.path.mkdir(parents=True)
    bad.config_yaml.write_text("dataset: [")
    done = launch(tmp_path, SLOTS, "submit", "--wait")
    assert done.returncode == 4, done.stderr
    assert "not submitted: digits-content-s0: " in done.stdout
    assert "restore it, or move the run's directory away" in done.stdout
    assert "submitted 1 of 2 runs" in done.stdout
    assert [state.state for state in StateReader(tmp_path).states(sweep.runs)] == ["missing", "done"]


def test_submit_again_does_nothing(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, seeds=1)
    assert launch(tmp_path, SLOTS, "submit", "--wait").returncode == 0
    again = launch(tmp_path, SLOTS)
    assert again.returncode == 0
    assert "nothing to submit" in again.stdout
    assert submissions(tmp_path, "intent.json") == 1
    link = SweepDir(tmp_path, "small").by_name / "digits-positional-s0"
    assert link.resolve() == sweep.runs[1].directory(tmp_path).path.resolve()
    assert (link / "result.json").is_file()


def test_worker_killed(tmp_path: Path) -> None:
    """The training dies with its worker, the other worker goes on, and the resumed run ends as if nothing had happened."""
    undisturbed = make_sweep(tmp_path / "undisturbed", seeds=1, steps=20)
    assert launch(tmp_path / "undisturbed", SLOTS, "submit", "--wait").returncode == 0
    root = tmp_path / "killed"
    sweep = make_sweep(root, seeds=1, steps=20)
    (root / "hold").touch()
    assert launch(root, SLOTS).returncode == 0
    victim = sweep.runs[0].directory(root)
    wait_for(lambda: victim.metrics_jsonl.is_file() and len(victim.metrics_jsonl.read_text().splitlines()) > 5)
    start = read_json(victim.attempts()[0].start_json)
    assert start is not None
    os.kill(start["process"]["pid"], signal.SIGKILL)
    wait_for(lambda: not any("stand_in" in line and str(victim.path) in line for line in processes_of(root)))
    (root / "hold").unlink()
    states = settle(root, sweep)
    assert [state.state for state in states] == ["lost", "done"]
    assert "was killed" in states[0].reason
    assert launch(root, SLOTS, "submit", "--wait").returncode == 0
    assert "resumes at" in victim.attempts()[1].log.read_text()
    ours, theirs = results(root, sweep), results(tmp_path / "undisturbed", undisturbed)
    assert [result.weights_sha256 for result in ours] == [result.weights_sha256 for result in theirs]
    assert_no_process_left(root)


def test_all_workers_killed(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, steps=20)
    (tmp_path / "hold").touch()
    assert launch(tmp_path, SLOTS).returncode == 0
    wait_for(lambda: starts(tmp_path) == SLOTS)
    for path in tmp_path.glob("runs/*/attempts/*/start.json"):
        start = read_json(path)
        assert start is not None
        os.kill(start["process"]["pid"], signal.SIGKILL)
    assert [state.state for state in settle(tmp_path, sweep)] == ["lost"] * 2 + ["uncertain"] * 6
    assert_no_process_left(tmp_path)
    (tmp_path / "hold").unlink()
    assert launch(tmp_path, SLOTS, "submit", "--wait").returncode == 0
    assert_each_done_once(tmp_path, sweep)


BROKEN_WORKER = """import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == "jobs.execute.local":
            raise ModuleNotFoundError("No module named 'gone'")
if "submitit.core._submit" in sys.orig_argv:
    sys.meta_path.insert(0, Absent())
"""


def test_workers_that_cannot_be_started_are_not_tried_without_end(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, seeds=1)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "sitecustomize.py").write_text(BROKEN_WORKER)
    broken = {**os.environ, "PYTHONPATH": str(tmp_path / "broken")}
    for number, verb in enumerate(("submit", "retry", "submit"), start=1):
        assert "submitted 2 of 2 runs" in launch(tmp_path, SLOTS, verb, environment=broken).stdout
        assert [(state.state, state.attempts) for state in settle(tmp_path, sweep)] == [("failed", number)] * 2
    again = launch(tmp_path, SLOTS)
    assert (again.returncode, "nothing to submit" in again.stdout) == (4, True)
    cause = "its worker ended before it started the run: ModuleNotFoundError: No module named 'gone'"
    assert f"left alone: 3 jobs in a row ended too early ({cause}" in again.stdout
    assert "is left alone: it got 3 jobs in vain" in launch(tmp_path, SLOTS, "retry").stdout
    assert "No module named 'gone'" in launch(tmp_path, SLOTS, "logs", "--failed").stdout
    assert launch(tmp_path, SLOTS, "retry", "--force", "--wait").returncode == 0
    assert_each_done_once(tmp_path, sweep)


def test_worker_told_to_stop(tmp_path: Path) -> None:
    """SIGTERM: checkpoint, `interrupted`, nothing else is started by this worker; submit goes on from the checkpoint."""
    sweep = make_sweep(tmp_path, seeds=1, steps=10)
    (tmp_path / "hold").touch()
    assert launch(tmp_path, 1).returncode == 0
    first = sweep.runs[0].directory(tmp_path)
    wait_for(first.metrics_jsonl.is_file)
    start = read_json(first.attempts()[0].start_json)
    assert start is not None
    os.kill(start["process"]["pid"], signal.SIGTERM)
    states = settle(tmp_path, sweep)
    assert [state.state for state in states] == ["interrupted", "uncertain"]
    assert states[0].reason == "signal SIGTERM"
    assert re.fullmatch(r"claimed, but nobody is left to start it; see /.*/submissions/.*/submitit/\*\.err", states[1].reason)
    assert not first.stop.exists()
    (tmp_path / "hold").unlink()
    assert launch(tmp_path, 1, "submit", "--wait").returncode == 0
    assert "resumes at" in first.attempts()[1].log.read_text()
    wait_for(
        lambda: exits(tmp_path, sweep) == [["interrupted", "done"], ["interrupted", "done"]]
    )  # exit.json comes after the result


def test_cancel_and_retry(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, seeds=2, steps=10)
    (tmp_path / "hold").touch()
    assert launch(tmp_path, 1).returncode == 0
    first = sweep.runs[0].directory(tmp_path)
    wait_for(first.metrics_jsonl.is_file)
    dry = launch(tmp_path, 1, "cancel", "--dry-run")
    assert "would cancel digits-content-s0 (running)" in dry.stdout
    assert "3 cancelled while they waited, 1 asked to stop" in launch(tmp_path, 1, "cancel").stdout
    states = settle(tmp_path, sweep)
    assert [state.state for state in states] == ["cancelled"] * 4
    alone = launch(tmp_path, 1)
    assert alone.returncode == 4
    assert "4 cancelled, not touched by submit" in alone.stdout
    assert "nothing to submit" in alone.stdout
    (tmp_path / "hold").unlink()
    assert launch(tmp_path, 1, "retry", "seed=0", "attention=content", "--wait").returncode == 0
    assert [state.state for state in StateReader(tmp_path).states(sweep.runs)] == ["done"] + ["cancelled"] * 3
    assert "resumes at" in first.attempts()[1].log.read_text()


def test_cancel_now(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, seeds=1)
    (tmp_path / "hold").touch()
    assert launch(tmp_path, SLOTS).returncode == 0
    wait_for(lambda: starts(tmp_path) == 2)
    assert launch(tmp_path, SLOTS, "cancel", "--now").returncode == 0
    assert [state.state for state in settle(tmp_path, sweep)] == ["cancelled"] * 2
    assert_no_process_left(tmp_path)


def test_failure_is_left_alone_and_retried(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, seeds=1)
    mark = tmp_path / "fail" / sweep.runs[0].signature
    mark.parent.mkdir()
    mark.touch()
    assert launch(tmp_path, SLOTS, "submit", "--wait").returncode == 4
    state = StateReader(tmp_path).state(sweep.runs[0])
    assert (state.state, state.reason) == ("failed", "RuntimeError: the test wants this run to fail")
    failed = launch(tmp_path, SLOTS, "logs", "--failed")
    assert "other: 1 failed. To fix it: " in failed.stdout
    assert "digits-content-s0: RuntimeError: the test wants this run to fail" in failed.stdout
    assert "Traceback (most recent call last)" in failed.stdout
    assert "1 failed, not touched by submit" in launch(tmp_path, SLOTS).stdout
    assert launch(tmp_path, SLOTS, "retry", "state=failed", "--wait").returncode == 4
    refused = launch(tmp_path, SLOTS, "retry")
    assert refused.returncode == 4
    assert "failed twice in the same way" in refused.stdout
    mark.unlink()
    assert launch(tmp_path, SLOTS, "retry", "--force", "--wait").returncode == 0
    wait_for(lambda: exits(tmp_path, sweep) == [["failed", "failed", "done"], ["done"]])  # exit.json comes after the result


@pytest.mark.parametrize("how", ["cut", "of another seed"])
def test_broken_result_is_retried(tmp_path: Path, how: str) -> None:
    sweep = make_sweep(tmp_path, seeds=1)
    assert launch(tmp_path, SLOTS, "submit", "--wait").returncode == 0
    broken = sweep.runs[0].directory(tmp_path)
    text = broken.result_json.read_text()
    broken.result_json.write_text(text[:40] if how == "cut" else text.replace('"seed": 0', '"seed": 7'))
    assert launch(tmp_path, SLOTS).returncode == 4
    assert launch(tmp_path, SLOTS, "retry", "state=broken", "--wait").returncode == 0
    assert (broken.attempts()[1].path / "broken-result.json").is_file()
    assert len(results(tmp_path, sweep)) == 2


def test_jobs_outlive_the_launcher_s_session(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, seeds=1)
    (tmp_path / "hold").touch()
    launcher = start_launcher(tmp_path, SLOTS)
    assert launcher.wait() == 0
    wait_for(lambda: starts(tmp_path) == 2)
    for path in tmp_path.glob("runs/*/attempts/*/start.json"):
        start = read_json(path)
        assert start is not None
        assert os.getsid(start["process"]["pid"]) not in (os.getsid(0), launcher.pid)
    (tmp_path / "hold").unlink()
    assert_each_done_once(tmp_path, sweep)
