"""SLURM_CONF names another cluster than the one that has the jobs: they are not lost, and not started twice."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster import BoundCluster, short_folder
from tests.support.jobs_sweeps import HOLD, Field, exits, slurm_profile, start_launcher
from tests.support.waiting import wait_for
from vitpa.records import read_json, write_json

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.fixture(scope="module")
def other(cluster: BoundCluster) -> Iterator[BoundCluster]:
    """A second cluster, which knows nothing of the jobs of the first."""
    with BoundCluster(short_folder(), nodes=1, gpus=0) as running:
        yield running


@pytest.fixture
def field(tmp_path: Path, cluster: BoundCluster) -> Iterator[Field]:
    made = Field(tmp_path, cluster, steps=100_000)
    yield made
    made.clear()


def test_jobs_of_another_cluster_count_as_alive(field: Field, other: BoundCluster) -> None:
    """One waits and one trains: neither is submitted again, both are said, and cancelling goes by their files."""
    waiting, training = field.sweep.runs
    field.vitpa("submit", "attention=content")
    field.vitpa("submit", "attention=positional", profile=slurm_profile(field.root, "free"))
    wait_for(training.directory(field.root).metrics_jsonl.exists)
    here = field.scheduler.cluster()
    jobs = field.jobs()

    field.environment = other.environment
    assert [(state.state, state.unseen, state.cluster) for state in field.states()] == [
        ("pending", True, here),
        ("running", True, here),
    ]
    line = f"its job is in the SLURM cluster {here}, which cannot be seen from here, where SLURM is the cluster "
    conf = f"set SLURM_CONF={field.cluster.environment['SLURM_CONF']}, or work on a login node of {here}"
    shown = field.vitpa("status")
    assert (shown.returncode, line in shown.stdout.replace("\n", " ")) == (3, True)
    again = field.vitpa("submit")
    assert (again.returncode, "nothing to submit" in again.stdout) == (3, True)
    assert again.stderr.startswith(f"warning: {waiting.label} and 1 more: {line}")
    assert again.stderr.endswith(f"it counts as alive, and is not started again; to see it, {conf}\n")
    assert again.stderr.count("\n") == 1
    cancelled = field.vitpa("cancel")
    assert cancelled.returncode == 3
    assert "1 cancelled while they waited, 1 asked to stop at their next step" in cancelled.stdout
    assert f"jobs in the SLURM cluster {here} cannot be reached from here" in cancelled.stdout

    field.usual_slurm()
    wait_for(lambda: exits(field.root, field.sweep) == [["cancelled"]] * 2, poll_s=0.2)
    assert [job.live for job in field.jobs()[waiting.signature]] == [True], "it is for its own cluster to end it"
    assert field.jobs()[waiting.signature] == jobs[waiting.signature]


def test_a_submission_cut_short_is_settled_where_its_jobs_are(field: Field, other: BoundCluster) -> None:
    field.slow_sbatch(0, 4)
    launcher = start_launcher(field.root, field.profile, environment=field.environment)
    wait_for((field.root / "bin/submitted").exists)
    launcher.kill()
    launcher.wait()
    os.kill(field.helper(), signal.SIGKILL)
    (submission,) = field.files(".")

    field.environment = other.environment
    again = field.vitpa("submit")
    assert again.returncode == 3, again.stdout + again.stderr
    assert f"{submission}: its launcher was killed, and whether the SLURM cluster " in again.stdout
    assert "nothing to submit" in again.stdout
    assert not field.files("receipt.json")

    field.usual_slurm()
    assert "adopted 2 jobs of " in field.vitpa("submit").stdout
    field.assert_one_job_each()


def test_claims_of_earlier_versions_do_not_name_their_cluster(field: Field, other: BoundCluster) -> None:
    """The cluster that answers is believed, as before."""
    run = field.sweep.runs[0]
    field.vitpa("submit", "attention=content", profile=slurm_profile(field.root, "held", **HOLD))
    path = run.directory(field.root).attempts()[0].claim_json
    claim = read_json(path) or {}
    assert (claim.pop("cluster"), bool(claim.pop("slurm_conf"))) == (field.scheduler.cluster(), True)
    write_json(path, claim)
    assert field.states()[0].state == "pending"
    field.environment = other.environment
    assert (field.states()[0].state, field.states()[0].cluster) == ("uncertain", "")
