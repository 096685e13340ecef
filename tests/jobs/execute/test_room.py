"""A worker and a full disk: the run that ends on it is lost, those that wait for the worker are trained once there is room."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.repository import ROOT
from tests.support.waiting import run_to_end

PROGRAM = """
import sys
from pathlib import Path
from slurm.chaos.disk import PrivateDisk
root = Path(sys.argv[1])
try:
    disk = PrivateDisk(root)
except OSError:
    sys.exit(77)
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
    done = run_to_end([sys.executable, "-c", PROGRAM, str(tmp_path)], cwd=ROOT)
    if done.returncode == 77:
        pytest.skip("this machine gives no mount namespaces")
    assert (done.returncode, done.stderr) == (0, "")
