"""A disk that is full, or low: a worker, and a job before its pre-flight, wait until it has room."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.private_disk import run_on_private_disk

PROGRAM = """
root = folder
from jobs.state import StateReader
from tests.support.jobs_sweeps import launch, make_sweep
from tests.support.slurm_sweeps import processes_below
from tests.support.waiting import wait_for
sweep = make_sweep(root, seeds=1, steps=200)
assert launch(root, 1).returncode == 0
first, second = (run.directory(root) for run in sweep.runs)
states = lambda: [state.state for state in StateReader(root).states(sweep.runs)]
wait_for(lambda: first.metrics_jsonl.exists(), poll_s=0.05)
second.path.mkdir(exist_ok=True)
(second.path / "stand-in-checkpoint.json").write_text('[198, ""]')
disk.fill()
wait_for(lambda: not processes_below(root, "stand_in_trainer"), poll_s=0.2)
assert not second.attempts()[0].start_json.exists()
disk.free()
wait_for(lambda: states()[1] == "done", poll_s=0.1)
wait_for(lambda: states()[0] in ("lost", "failed"), poll_s=0.1)
assert len(second.attempts()) == 1
"""


@pytest.mark.slow
def test_the_worker_waits_for_room(tmp_path: Path) -> None:
    """The run that ends on the full disk is lost, those that wait for the worker are trained once there is room."""
    done = run_on_private_disk(PROGRAM, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


LOW_DISK = """
import time
from jobs.failures import cause_of
from vitpa import room
from vitpa.preflight import check_disk
root, wanted = folder, 32 / 1024
room.POLL_S = 0.1
looks = []

def make_room():
    looks.append(check_disk(root, wanted))
    if len(looks) == 2:
        disk.fill(left=64 << 20)
    return False

disk.fill(left=8 << 20)
room.wait_for_room(root, stop=make_room)
assert not looks, "it is low, not full, and nothing else was asked for"
room.wait_for_room(root, min_free_gib=wanted, stop=make_room)
assert [(look.ok, look.blames, cause_of(look.detail, "").name) for look in looks] == [(False, "disk", "disk full")] * 2
assert check_disk(root, wanted).ok
disk.fill()
assert cause_of(check_disk(root, 0).detail, "").name == "disk full"
began_s = time.monotonic()
room.wait_for_room(root, min_free_gib=wanted, stop=lambda: True)
room.wait_for_room(root, min_free_gib=wanted, stop=lambda: False, limit_s=0.5)
assert time.monotonic() - began_s < 60
"""


def test_a_low_disk_is_waited_for_like_a_full_one(tmp_path: Path) -> None:
    done = run_on_private_disk(LOW_DISK, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[:2] == [f"{tmp_path}: 0.0 GiB free, 0.03125 are wanted; waiting for room"] * 2
    assert lines[2] == f"{tmp_path}: No space left on device; waiting for room"
