"""Submission to a real SLURM: launchers and helpers killed at every moment, refusals, arrays, and how long it takes."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.cluster import BoundCluster, require_slurm, short_folder
from tests.support.cpu_time import assert_within, cpu_of_children_s
from tests.support.jobs_sweeps import Field, command, exits, most_at_a_time, slurm_profile, start_launcher
from tests.support.repository import ROOT
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.fixture
def field(tmp_path: Path, cluster: BoundCluster) -> Iterator[Field]:
    made = Field(tmp_path, cluster)
    yield made
    made.clear()


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
    field.usual_slurm()
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
    field.usual_slurm()
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
    field.usual_slurm()
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
        ({"partition": "nowhere"}, "vitpa sweep: SLURM would refuse it: invalid partition specified: nowhere"),
        ({"constraint": "h100"}, "vitpa sweep: SLURM would refuse it: Invalid feature specification"),
        ({"nodelist": "elsewhere"}, "vitpa sweep: SLURM would refuse it: Invalid node name specified"),
        ({"additional_parameters": {"no_such": "1"}}, "unrecognized option '--no-such=1'"),
        ({"nodes": 5}, "4 nodes of partition main have 1 CPU, 256M of memory, 5 are needed"),
    ],
)
def test_refused_by_slurm(field: Field, values: dict[str, object], message: str) -> None:
    """Before anything is written; by sbatch itself, if somebody insists."""
    bad = slurm_profile(field.root, "bad", **values)
    refused = field.vitpa("submit", profile=bad)
    assert refused.returncode == 1
    assert message in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert not (field.root / "runs").exists()
    planned = field.vitpa("plan", profile=bad)
    assert (planned.returncode, message.removeprefix("vitpa sweep: ") in planned.stdout) == (1, True)


def test_refused_by_sbatch_all_the_same(field: Field) -> None:
    insisted = field.vitpa("submit", "--force", profile=slurm_profile(field.root, "bad", constraint="h100"))
    assert insisted.returncode == 1
    assert "warning: SLURM would refuse it: Invalid feature specification" in insisted.stdout
    assert "vitpa sweep: SLURM refused the jobs: Batch job submission failed: Invalid feature specification" in insisted.stderr
    assert insisted.stderr.count("\n") == 1
    assert [state.state for state in field.states()] == ["interrupted"] * 2
    assert field.vitpa("submit").returncode == 0
    field.assert_one_job_each()


def test_nodes_out_of_service_are_waited_for(field: Field) -> None:
    """sbatch's own test refuses what sbatch takes: plan and submit say that it will wait."""
    field.slurm("scontrol", "update", "NodeName=127.0.0.[1-4]", "State=DRAIN", "Reason=test")
    try:
        words = "none of the 4 nodes of partition main with 1 CPU, 256M of memory is in service now: jobs will wait"
        for verb in ("plan", "submit"):
            done = field.vitpa(verb, profile=slurm_profile(field.root))
            assert (done.returncode, f"warning: {words}" in done.stdout) == (0, True), done.stderr
        field.assert_one_job_each()
    finally:
        field.slurm("scontrol", "update", "NodeName=127.0.0.[1-4]", "State=RESUME")
    field.assert_each_done_once()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"SLURM_CONF": "{root}/unreachable.conf"}, "Unable to contact slurm controller"),
        (
            {"PATH": "/nonexistent"},
            "vitpa sweep: scontrol: not found; is this a login node of the cluster, and SLURM in PATH?",
        ),
    ],
)
def test_slurm_does_not_answer(field: Field, environment: dict[str, str], message: str) -> None:
    """One line, exit code 3, and nothing is written that would have to be fixed."""
    conf = field.cluster.layout.slurm_conf.read_text()
    (field.root / "unreachable.conf").write_text(re.sub(r"SlurmctldPort=\d+", "SlurmctldPort=9", conf))
    field.environment |= {key: value.format(root=field.root) for key, value in environment.items()}
    refused = field.vitpa("submit")
    assert refused.returncode == 3
    assert message in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert not (field.root / "runs").exists()


def test_squeue_fails_after_sbatch_has(field: Field) -> None:
    """Nobody knows whether SLURM has the jobs: they are left as they are, and the next submit asks again."""
    gone = field.root / "gone"
    field.replace_program("sbatch", f'{field.real("sbatch")} "$@"; touch {gone}; exit 1')
    field.replace_program(
        "squeue", f'[ -e {gone} ] && {{ echo "no route" >&2; exit 1; }}', f'exec {field.real("squeue")} "$@"'
    )
    failed = field.vitpa("submit")
    assert failed.returncode == 3
    assert "vitpa sweep: squeue: no route. Whether it has the jobs of " in failed.stderr
    assert "is settled by the next submit" in failed.stderr
    looked = field.vitpa("status")
    assert "warning: squeue: no route; states are as far as the files tell" in looked.stderr
    assert "2 pending" in looked.stdout
    field.usual_slurm()
    assert "adopted 2 jobs of " in field.vitpa("submit").stdout
    field.assert_one_job_each()


def test_damaged_records_of_a_submission(field: Field) -> None:
    """They concern their own runs, in one clear line; jobs that SLURM has are found by their token."""
    assert field.vitpa("submit", "attention=content").returncode == 0
    (receipt,) = field.files("receipt.json")
    receipt.write_text(receipt.read_text()[:20])
    assert field.vitpa("submit").returncode == 0
    field.assert_one_job_each()
    assert "2 pending" in field.vitpa("status").stdout
    field.clear()
    (first, second) = [state.state for state in field.states()]
    assert (first, second) == ("cancelled", "cancelled")
    for path in [*field.files("intent.json"), *field.files("launch.json")]:
        path.write_text("{")
    for path in field.files("receipt.json"):
        path.unlink()
    again = field.vitpa("retry")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("intent.json: not valid JSON (") == 2
    assert "its runs are shown as uncertain, and can be submitted again" in again.stdout
    field.assert_one_job_each()


def test_arrays_no_larger_than_slurm_allows(tmp_path: Path) -> None:
    """The arrays of a submission share array_parallelism."""
    require_slurm()
    with BoundCluster(short_folder(), nodes=2, max_array_size=5) as small:
        field = Field(tmp_path, small, seeds=4, steps=10)
        profile = slurm_profile(tmp_path, "throttled", array_parallelism=3)
        done = field.vitpa("submit", profile=profile)
        assert f"submitted 8 of 8 runs to SLURM (profile {profile}), 3 at a time" in done.stdout, done.stderr
        scripts = [path.read_text() for path in field.files("submitit/*_submission.sh")]
        assert sorted(re.findall(r"--array=(\S+)", script)[0] for script in scripts) == ["0-2%1", "0-4%2"]
        field.assert_each_done_once()
        assert most_at_a_time(tmp_path) <= 3


def test_a_thousand_runs(tmp_path: Path, cluster: BoundCluster) -> None:
    field = Field(tmp_path, cluster, seeds=500)
    began, busy_s = time.monotonic(), cpu_of_children_s()
    done = field.vitpa("submit")
    submitted, busy_s = time.monotonic(), cpu_of_children_s() - busy_s
    assert "submitted 1000 of 1000 runs" in done.stdout, done.stderr
    assert field.live() == 1000
    asked = time.monotonic()
    assert "1000 cancelled while they waited" in field.vitpa("cancel").stdout
    print(f"submit of 1,000 runs: {submitted - began:.1f} s, cancel: {time.monotonic() - asked:.1f} s")
    assert_within(10, busy_s)
    assert {state.state for state in field.states()} == {"cancelled"}
    wait_for(lambda: field.live() == 0, poll_s=0.2)


def test_submitted_from_inside_a_job(field: Field) -> None:
    """The new job gets nothing of the old one's environment, and the same cluster."""
    variables = {
        "RANK": "1",
        "WORLD_SIZE": "4",
        "MASTER_ADDR": "elsewhere",
        "CUDA_VISIBLE_DEVICES": "1",
        "SLURM_CPU_BIND": "x",
    }
    profile = slurm_profile(field.root, "inner", setup=[f"env > {field.root}/inner.env"])
    line = command(field.root, profile, "submit", "attention=content")
    script = field.root / "outer.sh"
    exports = [f"export {name}={value}" for name, value in variables.items()]
    script.write_text("\n".join(["#!/bin/bash", *exports, "env > outer.env", f"cd {ROOT}", shlex.join(line)]) + "\n")
    field.slurm("sbatch", "--wait", f"--chdir={field.root}", "--gpus-per-node=1", "--cpus-per-task=2", str(script))
    wait_for(lambda: field.states()[0].state == "done", poll_s=0.3)
    outer, inner = (
        dict(line.split("=", 1) for line in (field.root / name).read_text().splitlines() if "=" in line)
        for name in ("outer.env", "inner.env")
    )
    assert outer.keys() >= variables.keys()
    assert not inner.keys() & variables.keys()
    assert inner["SLURM_CONF"] == outer["SLURM_CONF"]
    assert (outer["SLURM_CPUS_PER_TASK"], inner["SLURM_CPUS_PER_TASK"]) == ("2", "1")
    assert "SLURM_GPUS_PER_NODE" in outer
    assert "SLURM_GPUS_PER_NODE" not in inner


@pytest.mark.skipif(os.geteuid() != 0, reason="a file system of its own is for root to mount")
def test_full_disk(tmp_path: Path, cluster: BoundCluster) -> None:
    """One line that names the disk; when there is space again, each run gets its job."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", tmp_path], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        field = Field(tmp_path, cluster, seeds=4)
        filler = tmp_path / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        failed = field.vitpa("submit")
        assert failed.returncode == 1
        assert re.fullmatch(r"vitpa sweep: /\S+: No space left on device; free some space and start again\n", failed.stderr)
        filler.unlink()
        assert field.vitpa("submit").returncode == 0
        field.assert_one_job_each()
        field.clear()
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)


def test_odd_folders_and_little_environment(tmp_path: Path, cluster: BoundCluster) -> None:
    """Whatever SLURM takes literally is fine as a root; a job needs nothing of the environment in which it was submitted."""
    field = Field(tmp_path / "a b'c\"$,#d,ü(e)&;[f]", cluster)
    assert field.vitpa("submit", profile=slurm_profile(field.root, additional_parameters={"export": "NONE"})).returncode == 0
    field.assert_each_done_once()


def test_two_tasks_lead_no_run_together(field: Field) -> None:
    """A profile cannot ask for two; if they come up anyway, the first one trains and the other one ends."""
    more = "s/--ntasks=1/--ntasks=2/; s/--ntasks-per-node=1/--ntasks-per-node=2/"
    field.replace_program("sbatch", f"sed -i '{more}' \"$1\"", f'exec {field.real("sbatch")} "$@"')
    submitted = field.vitpa("submit", "attention=content", profile=slurm_profile(field.root))
    assert submitted.returncode == 0, submitted.stderr
    wait_for(lambda: exits(field.root, field.sweep)[0] == ["done"], poll_s=0.3)
    (said,) = field.files("submitit/*_1_log.out")
    assert "the job has several tasks on a node; the first one trains, not this" in said.read_text()
