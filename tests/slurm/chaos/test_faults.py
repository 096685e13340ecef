"""Faults that are done to jobs of a real SLURM strike the run that they are for, and no other."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from slurm.chaos.cluster import BreakableCluster
from slurm.chaos.faults import Scene, Victim, preemption, requeue, time_limit
from slurm.chaos.schedule import Fault
from slurm.chaos.sweep import Sweep
from tests.support.cluster import require_slurm
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

# what looks like a training under a job of submitit
RUN = "/runs/000000000000000$SLURM_ARRAY_TASK_ID/attempts/0001/config.yaml"
TRAINING = f"bash -c '{sys.executable} -m vitpa.train {RUN}; true' submitit"


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    """An array of two jobs that train on a cluster of two nodes."""
    require_slurm()
    (tmp_path / "vitpa").mkdir()
    (tmp_path / "vitpa/train.py").write_text("import time\ntime.sleep(600)\n")
    with (
        tempfile.TemporaryDirectory(prefix="vitpa-", dir="/tmp", ignore_cleanup_errors=True) as short,
        BreakableCluster(Path(short) / "slurm", nodes=2, gpus=0, cpus=1) as cluster,
    ):
        scene = Scene(cluster, Sweep(["demo"], tmp_path, tmp_path / "profile.yaml"), {}, None)
        options = ["--partition=low", "--array=0-1", "--requeue", "--time=60", "--output=/dev/null"]
        scene.ask("sbatch", *options, f"--export=ALL,PYTHONPATH={tmp_path}", f"--wrap={TRAINING}")
        wait_for(lambda: len(scene.victims()) == 2)
        yield scene


def facts(scene: Scene, victims: list[Victim], name: str) -> dict[str, str]:
    """What SLURM says of each, by its task."""
    found = [scene.ask("scontrol", "-o", "show", "job", victim.task) for victim in victims]
    words = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in found]
    return {each["ArrayTaskId"]: each[name] for each in words}


def test_an_arrays_last_task(scene: Scene) -> None:
    """Its number in SLURM is that of the whole array."""
    victims = scene.victims()
    (last,) = [number for number, each in enumerate(victims) if each.task.startswith(f"{each.job}_")]
    whom = Fault(0.0, "time limit", (last + 0.5) / 2, 0.0)
    assert scene.victim(whom) == victims[last]
    assert len(scene.ask("scontrol", "-o", "show", "job", victims[last].job).splitlines()) == 2, "SLURM takes it for the array"
    task = victims[last].task.partition("_")[2]
    other = str(1 - int(task))

    time_limit(scene, whom)
    assert facts(scene, victims, "TimeLimit") == {task: "00:02:00", other: "01:00:00"}
    requeue(scene, whom)
    wait_for(lambda: facts(scene, victims, "Restarts") == {task: "1", other: "0"})


def test_a_preemption_ends_with_what_it_says(scene: Scene) -> None:
    """A job with precedence that could not start, as where the node has failed meanwhile, strikes nobody later."""
    blow = preemption(scene, Fault(0.0, "preemption", 0.1, 3.0))
    (victim,) = blow.victims
    wait_for(lambda: scene.ask("squeue", "--noheader", "--states=RUNNING", "--partition=main") != "")
    late = preemption(scene, Fault(0.0, "preemption", 0.0, 600.0))  # waits, or takes the other node
    blow.after()
    scene.over.set()
    late.after()
    wait_for(lambda: scene.ask("squeue", "--noheader", "--partition=main", "--states=PENDING,RUNNING") == "")
    scene.over.clear()
    wait_for(lambda: len(scene.victims()) == 2)
    assert victim.task in {each.task for each in scene.victims()}
