"""Submission to a real SLURM: launchers and helpers killed at every moment, refusals, arrays, and how long it takes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs.grid import Sweep
from jobs.scheduler import Scheduler, SlurmJob, scheduler_environment
from jobs.state import RunState, Survey
from slurm.devcluster import DevCluster
from tests.jobs_sweeps import (
    finished_trainings,
    launch,
    make_sweep,
    slurm_profile,
    start_launcher,
    wait_for,
)
from vitpa.config import read_json

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
HOLD: dict[str, object] = {"additional_parameters": {"hold": True}}  # what is submitted stays in the queue


class Field:
    """A sweep of 2 x `seeds` runs of the stand-in on a cluster."""

    def __init__(self, root: Path, cluster: DevCluster) -> None:
        self.root = root
        self.cluster = cluster
        self.environment = cluster.environment
        self.sweep: Sweep = make_sweep(root, seeds=1)
        self.profile = slurm_profile(root, **HOLD)

    @property
    def scheduler(self) -> Scheduler:
        return Scheduler(scheduler_environment(self.environment))

    def vitpa(self, verb: str, *terms: str, profile: Path | None = None) -> subprocess.CompletedProcess[str]:
        return launch(self.root, profile or self.profile, verb, *terms, environment=self.environment)

    def slurm(self, *words: str) -> str:
        return subprocess.run(words, env=self.environment, capture_output=True, text=True, check=True, timeout=60).stdout

    def states(self) -> list[RunState]:
        return Survey(self.root, self.scheduler).states(self.sweep.runs)

    def jobs(self) -> dict[str, list[SlurmJob]]:
        """The live jobs of each run, by its signature."""
        found: dict[str, list[SlurmJob]] = {run.signature: [] for run in self.sweep.runs}
        snapshot = self.scheduler.snapshot()
        assert not snapshot.error
        for path in self.root.glob("sweeps/*/submissions/*/intent.json"):
            intent = read_json(path)
            assert intent is not None
            for index, run in enumerate(intent["runs"]):
                job = snapshot.of(intent["token"], index)
                if job is not None and job.live:
                    found[run["signature"]].append(job)
        return found

    def live(self) -> int:
        return sum(len(jobs) for jobs in self.jobs().values())

    def assert_one_job_each(self) -> None:
        assert {signature: len(jobs) for signature, jobs in self.jobs().items()} == dict.fromkeys(self.jobs(), 1)

    def release(self) -> None:
        self.slurm(
            "scontrol", "release", ",".join({job.id.partition("_")[0] for jobs in self.jobs().values() for job in jobs})
        )

    def assert_each_done_once(self) -> None:
        wait_for(lambda: all(state.state == "done" for state in self.states()), poll_s=0.3)
        assert finished_trainings(self.root) == sorted(run.signature for run in self.sweep.runs)
        wait_for(lambda: self.live() == 0, poll_s=0.3)

    def files(self, name: str) -> list[Path]:
        return list(self.root.glob(f"sweeps/*/submissions/*/{name}"))

    def helper(self) -> int:
        """The process that starts the jobs."""
        (path,) = self.files("launch.json")
        return int((read_json(path) or {})["process"]["pid"])

    def slow_sbatch(self, before_s: float, after_s: float) -> None:
        """From now on sbatch takes that long before and after it does its work."""
        folder = self.root / "bin"
        folder.mkdir(exist_ok=True)
        real = shutil.which("sbatch", path=self.cluster.environment["PATH"])
        lines = [
            "#!/bin/bash",
            f"touch {folder}/called; sleep {before_s}",
            f'{real} "$@"; code=$?',
            f"touch {folder}/submitted",
        ]
        (folder / "sbatch").write_text("\n".join(lines))
        (folder / "sbatch").chmod(0o755)
        self.environment = {**self.environment, "PATH": f"{folder}:{self.environment['PATH']}"}

    def usual_sbatch(self) -> None:
        self.environment = self.cluster.environment


@pytest.fixture
def field(tmp_path: Path, cluster: DevCluster) -> Iterator[Field]:
    made = Field(tmp_path, cluster)
    yield made
    scheduler = Scheduler(scheduler_environment(cluster.environment))
    scheduler.cancel([job.id for jobs in made.jobs().values() for job in jobs])
    wait_for(lambda: made.live() == 0, poll_s=0.2)


MOMENTS: dict[str, Callable[[Field], bool]] = {
    "intent": lambda field: bool(field.files("intent.json")),
    "claim": lambda field: bool(list(field.root.glob("runs/*/attempts/0001"))),
    "helper": lambda field: bool(field.files("launch.log")),
    "launch": lambda field: bool(field.files("launch.json")),
    "sbatch": lambda field: (field.root / "bin/called").exists(),
    "submitted": lambda field: (field.root / "bin/submitted").exists(),
    "receipt": lambda field: bool(field.files("receipt.json")),
}


@pytest.mark.parametrize("moment", list(MOMENTS))
def test_launcher_killed(field: Field, moment: str) -> None:
    """The helper ends what it has begun, or was never there."""
    field.slow_sbatch(1, 1)
    launcher = start_launcher(field.root, field.profile, environment=field.environment)
    wait_for(lambda: MOMENTS[moment](field))
    launcher.kill()
    launcher.wait()
    field.usual_sbatch()
    again = field.vitpa("submit")
    assert again.returncode == 0, again.stderr
    field.assert_one_job_each()
    field.release()
    field.assert_each_done_once()


@pytest.mark.parametrize("moment", ["launch", "sbatch", "submitted"])
def test_launcher_and_helper_killed(field: Field, moment: str) -> None:
    """SLURM knows whether it has the jobs, also those of an sbatch that has outlived its helper."""
    field.slow_sbatch(4, 4)
    launcher = start_launcher(field.root, field.profile, environment=field.environment)
    wait_for(lambda: MOMENTS[moment](field))
    launcher.kill()
    launcher.wait()
    os.kill(field.helper(), signal.SIGKILL)
    field.usual_sbatch()
    again = field.vitpa("submit")
    assert again.returncode == 0, again.stderr
    assert "adopted 2 jobs of " in again.stdout or moment == "launch"
    field.assert_one_job_each()
    field.release()
    field.assert_each_done_once()


def test_helper_killed_alone(field: Field) -> None:
    """The launcher sees to its jobs itself."""
    field.slow_sbatch(0, 4)
    launcher = start_launcher(field.root, field.profile, environment=field.environment)
    wait_for(lambda: MOMENTS["submitted"](field))
    os.kill(field.helper(), signal.SIGKILL)
    assert launcher.wait() == 0
    field.usual_sbatch()
    field.assert_one_job_each()
    assert "nothing to submit" in field.vitpa("submit").stdout
    field.release()
    field.assert_each_done_once()


def test_launchers_at_once(field: Field) -> None:
    for launcher in [start_launcher(field.root, field.profile, environment=field.environment) for _ in range(3)]:
        assert launcher.wait() == 0
    field.assert_one_job_each()
    field.release()
    field.assert_each_done_once()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"partition": "nowhere"}, "error: SLURM refused the jobs: invalid partition specified: nowhere; Batch job "),
        ({"constraint": "h100"}, "Batch job submission failed: Invalid feature specification"),
        ({"nodelist": "elsewhere"}, "Batch job submission failed: Invalid node name specified"),
        ({"additional_parameters": {"no_such": "1"}}, "unrecognized option '--no-such=1'"),
    ],
)
def test_refused_by_slurm(field: Field, values: dict[str, object], message: str) -> None:
    refused = field.vitpa("submit", profile=slurm_profile(field.root, "bad", **values))
    assert refused.returncode == 1
    assert message in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert [state.state for state in field.states()] == ["interrupted"] * 2
    assert field.vitpa("submit").returncode == 0
    field.assert_one_job_each()
