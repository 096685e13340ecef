"""A sweep of real trainings on the digits: killed with its worker, resumed, and equal bit for bit to an undisturbed one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jobs.execute.attempt import BOUND, training_command
from jobs.state import StateReader
from jobs.sweep import Sweep, load_sweep
from tests.support.jobs_sweeps import assert_no_process_left, processes_of, results, settle
from tests.support.repository import ROOT
from tests.support.waiting import run_to_end, wait_for
from vitpa.records import read_json

pytestmark = pytest.mark.slow


OVERRIDES = {"model.depth": 1, "train.epochs": 3, "optim.warmup_epochs": 1, "runtime.checkpoint_every_steps": 5}


def make(root: Path) -> Sweep:
    root.mkdir()
    grid = {"name": "real", "recipes": ["digits"], "attentions": ["content", "positional"], "seeds": [0]}
    (root / "real.yaml").write_text(yaml.safe_dump({**grid, "overrides": OVERRIDES | {"runtime.log_every_steps": 5}}))
    return load_sweep(str(root / "real.yaml"), root)


def vitpa_sweep(root: Path, data: Path, verb: str, *rest: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "vitpa.cli", "sweep", verb, f"{root}/real.yaml", "--root", str(root), *rest]
    if verb in ("submit", "retry"):
        line += ["--data-dir", str(data), "runtime.device=cpu"]
    return run_to_end(line, cwd=ROOT)


def test_worker_killed_in_training(tmp_path: Path, digits: Path) -> None:
    undisturbed = make(tmp_path / "undisturbed")
    table = vitpa_sweep(tmp_path / "undisturbed", digits, "submit", "--wait")
    assert table.returncode == 0, table.stderr
    root = tmp_path / "killed"
    sweep = make(root)
    assert vitpa_sweep(root, digits, "submit").returncode == 0
    victim = sweep.runs[0].directory(root)
    wait_for(lambda: victim.checkpoints.is_dir() and any(victim.checkpoints.glob("*.pt")), poll_s=0.01)
    start = read_json(victim.attempts()[0].start_json)
    assert start is not None
    os.kill(start["process"]["pid"], signal.SIGKILL)
    assert [state.state for state in settle(root, sweep)] == ["lost", "done"]
    assert vitpa_sweep(root, digits, "submit", "--wait").returncode == 0
    assert [state.attempts for state in StateReader(root).states(sweep.runs)] == [2, 1]
    ours, theirs = results(root, sweep), results(tmp_path / "undisturbed", undisturbed)
    assert [result.weights_sha256 for result in ours] == [result.weights_sha256 for result in theirs]
    collected = vitpa_sweep(root, digits, "collect")
    assert collected.returncode == 0, collected.stderr
    assert "1/1" in collected.stdout
    assert_no_process_left(root)


def test_what_a_training_of_its_own_has_left_is_retried_as_plan_says(tmp_path: Path, digits: Path) -> None:
    """Though the sweep was never submitted. One that had no data has left nothing."""
    root = tmp_path / "refused"
    sweep = make(root)
    nothing = vitpa_sweep(root, digits, "retry")
    assert (nothing.returncode, "was never submitted" in nothing.stderr) == (1, True)
    changes = [f"{key}={value}" for key, value in OVERRIDES.items()]
    line = [sys.executable, "-m", "vitpa.train", "digits", *changes, f"runtime.root={root}", "runtime.device=cpu"]

    def refused(*words: str) -> str:
        found = run_to_end([*line, *words], cwd=ROOT)
        assert found.returncode == 1
        return found.stderr

    assert "no such file; make it with `vitpa prep digits`" in refused(f"runtime.data_dir={tmp_path}")
    assert [state.state for state in StateReader(root).states(sweep.runs)] == ["missing", "missing"]
    (tmp_path / "file").touch()
    assert refused(f"runtime.data_dir={digits}", f"runtime.stage_dir={tmp_path}/file")
    planned = vitpa_sweep(root, digits, "plan").stdout
    advice = re.search(
        r"1 failed, not touched by submit; to run again: vitpa (sweep retry .* state=failed)$", planned, re.MULTILINE
    )
    assert advice is not None, planned
    again = [sys.executable, "-m", "vitpa.cli", *advice[1].split(), "--wait", "--data-dir", str(digits), "runtime.device=cpu"]
    retried = run_to_end(again, cwd=ROOT)
    assert "submitted 1 of 2 runs" in retried.stdout, retried.stderr
    assert [state.state for state in StateReader(root).states(sweep.runs)] == ["done", "missing"]
    assert vitpa_sweep(root, digits, "collect").returncode == 4  # it is a sweep now


def test_several_processes_die_with_their_worker(tmp_path: Path, digits: Path) -> None:
    """torchrun itself leaves its processes behind when it is killed."""
    line = [*BOUND, *training_command(2), "digits", f"runtime.root={tmp_path}", f"runtime.data_dir={digits}"]
    worker = f"import subprocess; subprocess.Popen({[*line, 'runtime.device=cpu', 'train.epochs=100']}).wait()"
    process = subprocess.Popen([sys.executable, "-c", worker], cwd=ROOT)
    wait_for(lambda: any(tmp_path.glob("runs/*/metrics.jsonl")), poll_s=0.1)
    wait_for(lambda: len(processes_of(tmp_path)) == 4, poll_s=0.1)  # the worker, torchrun and two processes
    process.kill()
    process.wait()
    assert_no_process_left(tmp_path)
