"""Runs that have left their sweep, runs that several sweeps have, and jobs that several runs share, on a real SLURM."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.support.cluster import BoundCluster
from tests.support.jobs_sweeps import HOLD, Field, launch, slurm_profile
from tests.support.repository import ROOT
from tests.support.waiting import run_to_end, wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.fixture
def field(tmp_path: Path, cluster: BoundCluster) -> Iterator[Field]:
    made = Field(tmp_path, cluster)
    yield made
    made.clear()


def queue_of(field: Field) -> str:
    return field.slurm("squeue", "--noheader", "--array", "--format=%i")


def with_seeds(field: Field, *seeds: int, name: str = "small") -> None:
    path = field.root / "small.yaml"
    grid = yaml.safe_load(path.read_text())
    (field.root / f"{name}.yaml").write_text(yaml.safe_dump({**grid, "name": name, "seeds": list(seeds)}))


def test_runs_that_leave_the_sweep_stay_visible(tmp_path: Path, cluster: BoundCluster) -> None:
    field = Field(tmp_path, cluster, seeds=2)
    assert field.vitpa("submit").returncode == 0
    ids = [state.job_id for state in field.states() if state.run.seed == 1]
    with_seeds(field, 0)
    refused = field.vitpa("submit")
    assert refused.returncode == 1
    assert "2 of these runs are still in progress and would go on" in refused.stderr
    ends = "would cancel digits-content-s1 (pending, no longer in the sweep)"
    assert ends in field.vitpa("cancel", "--gone", "--dry-run").stdout
    updated = field.vitpa("submit", "--update")
    assert updated.returncode == 0
    line = f"2 no longer in the sweep, still in progress: digits-content-s1 (pending in job {ids[0]})"
    assert line in updated.stdout
    assert "--gone` ends them" in updated.stdout
    shown = field.vitpa("status")
    assert "no longer in the sweep, still in progress: 2" in shown.stdout
    assert all(identity in shown.stdout for identity in ids)
    document = json.loads(field.vitpa("status", "--json").stdout)
    assert [row["job"] for row in document["no_longer_in_sweep"]] == ids
    assert {row["seed"] for row in document["runs"]} == {0}
    assert ends in field.vitpa("cancel", "--dry-run").stdout
    assert "2 cancelled while they waited" in field.vitpa("cancel", "--gone").stdout
    wait_for(lambda: not any(identity in queue_of(field) for identity in ids), poll_s=0.2)
    assert {(state.run.seed, state.state) for state in field.states()} == {(0, "pending"), (1, "cancelled")}
    assert "no longer in the sweep" not in field.vitpa("status").stdout
    field.clear()


def test_changed_override_and_lost_recipe(field: Field) -> None:
    """A run that left has the label of one that came; without its recipe the sweep is still the one that was recorded."""
    assert field.vitpa("submit", "attention=content").returncode == 0
    old = field.states()[0].job_id
    recipe = yaml.safe_load((field.root / "recipe.yaml").read_text())
    (field.root / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "train": {"epochs": 5}}))
    assert field.vitpa("submit", "attention=content", "--update").returncode == 0
    (field.root / "recipe.yaml").unlink()
    (field.root / "small.yaml").unlink()
    lost = field.vitpa("status")
    assert lost.returncode == 1
    assert lost.stderr.endswith(f"and not in {field.root}/sweeps, where there is small\n")
    words = [sys.executable, "-m", "vitpa.cli", "sweep", "cancel", "small", "--root", str(field.root)]
    done = run_to_end(words, env=field.environment, cwd=ROOT)
    assert done.stderr.startswith("warning: ")
    assert done.stderr.endswith("; this is the sweep as it was submitted last\n")
    assert "2 cancelled while they waited" in done.stdout
    wait_for(lambda: old not in queue_of(field) and field.live() == 0, poll_s=0.2)


def test_a_run_that_another_sweep_has_too(field: Field) -> None:
    with_seeds(field, 0, name="other")
    assert field.vitpa("submit").returncode == 0
    assert launch(field.root, field.profile, "submit", name="other", environment=field.environment).returncode == 0
    dry = field.vitpa("cancel", "attention=content", "--dry-run").stdout
    assert "sweep other has 1 of these runs, too (digits-content-s0): what is cancelled here would be cancelled" in dry
    done = field.vitpa("cancel", "attention=content").stdout
    assert done.index("sweep other has 1 of these runs, too (digits-content-s0)") < done.index("1 cancelled")
    assert "vitpa sweep retry other" in done
    assert [state.state for state in field.states()] == ["cancelled", "pending"]


def test_a_job_that_another_sweep_s_run_shares(tmp_path: Path, cluster: BoundCluster) -> None:
    """Two seeds train in one job; a sweep that has only one of them does not take the job from the other."""
    field = Field(tmp_path, cluster, seeds=2)
    profile = slurm_profile(tmp_path, "held", replicas=2, **HOLD)
    assert field.vitpa("submit", "attention=content", profile=profile).returncode == 0
    with_seeds(field, 0, name="other")
    assert launch(tmp_path, profile, "submit", "seed=0", name="other", environment=field.environment).returncode == 0
    done = launch(tmp_path, profile, "cancel", "attention=content", name="other", environment=field.environment)
    assert "1 cancelled" in done.stdout
    content = [state for state in field.states() if state.run.attention == "content"]
    assert [state.state for state in content] == ["cancelled", "pending"]
    assert [job.id for job in field.jobs()[content[1].run.signature]] == [content[1].job_id], "it waits for the other"
    field.clear()
