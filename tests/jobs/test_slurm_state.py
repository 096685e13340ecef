"""States of runs on a real SLURM: whatever becomes of their jobs; cancel and retry; without sacct and without squeue."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.state import RunState
from jobs.sweep import Run
from tests.support.cluster import BoundCluster
from tests.support.jobs_sweeps import HOLD, Field, exits, finished_trainings, slurm_profile
from tests.support.slurm_sweeps import processes_below, variable
from tests.support.waiting import wait_for
from vitpa.records import read_json

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
STEPS = 100_000  # hours: longer than any test, on any machine


@pytest.fixture
def field(tmp_path: Path, cluster: BoundCluster) -> Iterator[Field]:
    """Runs that go on until they are stopped, unless their checkpoint says that they are nearly done."""
    made = Field(tmp_path, cluster, steps=STEPS)
    made.profile = slurm_profile(tmp_path)
    yield made
    made.clear()


def started(field: Field, run: Run, steps: int = 3) -> bool:
    metrics = run.directory(field.root).metrics_jsonl
    return metrics.exists() and len(metrics.read_text().splitlines()) >= steps


def nearly_done(run: Run, root: Path) -> None:
    """The next execution has a step or two left."""
    path = run.directory(root).path / "stand-in-checkpoint.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'[{STEPS - 2}, ""]')


def of(field: Field, run: Run) -> RunState:
    return field.states()[field.sweep.runs.index(run)]


def test_cancel_and_retry(field: Field) -> None:
    """One waits in the queue, one trains, both leave it; nothing starts them again but `retry`, from the checkpoint."""
    waiting, training = field.sweep.runs
    assert field.vitpa("submit", "attention=positional").returncode == 0
    field.vitpa("submit", "attention=content", profile=slurm_profile(field.root, "held", **HOLD))
    wait_for(lambda: started(field, training))
    assert of(field, waiting).reason == "pending in SLURM: JobHeldUser"
    assert [state.state for state in field.states()] == ["pending", "running"]
    assert "1 cancelled while they waited, 1 asked to stop at their next step" in field.vitpa("cancel").stdout
    wait_for(lambda: field.live() == 0, poll_s=0.2)
    assert [state.state for state in field.states()] == ["cancelled"] * 2
    alone = field.vitpa("submit")
    assert (alone.returncode, "nothing to submit" in alone.stdout) == (4, True)
    nearly_done(training, field.root)
    nearly_done(waiting, field.root)
    assert "submitted 2 of 2 runs" in field.vitpa("retry").stdout
    field.assert_one_job_each()
    wait_for(lambda: all(state.state == "done" for state in field.states()), poll_s=0.3)
    assert "resumes at 99998" in training.directory(field.root).attempts()[1].log.read_text()
    wait_for(lambda: exits(field.root, field.sweep) == [["cancelled", "done"]] * 2)  # exit.json comes after the result


def test_cancel_now_and_while_it_waits_to_go_on(field: Field) -> None:
    waiting, training = field.sweep.runs
    assert field.vitpa("submit").returncode == 0
    wait_for(lambda: started(field, waiting) and started(field, training))
    field.slurm("scontrol", "requeue", of(field, waiting).job_id)
    wait_for(lambda: of(field, waiting).reason.startswith("pending in SLURM"), poll_s=0.2)
    assert "1 cancelled while they waited, 1 killed" in field.vitpa("cancel", "--now").stdout
    wait_for(lambda: field.live() == 0, poll_s=0.2)
    assert [state.state for state in field.states()] == ["cancelled"] * 2
    assert [len(run.directory(field.root).attempts()) for run in (waiting, training)] == [2, 1]


def test_one_of_a_group_is_cancelled_while_it_waits(tmp_path: Path, cluster: BoundCluster) -> None:
    """Its job stays in the queue for the others, and is withdrawn with the last of them."""
    field = Field(tmp_path, cluster, seeds=2)
    profile = slurm_profile(tmp_path, "held", replicas=2, **HOLD)
    submitted = field.vitpa("submit", "attention=content", profile=profile).stdout
    assert f"submitted 2 of 4 runs to SLURM (profile {profile}) in 1 job" in submitted
    content = [run for run in field.sweep.runs if run.attention == "content"]
    (first,), (second,) = (field.jobs()[run.signature] for run in content)
    assert first == second
    assert "1 cancelled while they waited" in field.vitpa("cancel", "seed=0").stdout
    assert [of(field, run).state for run in content] == ["cancelled", "pending"]
    assert field.live() == 2, "the job of both is in the queue"
    assert "1 cancelled while they waited" in field.vitpa("cancel", "seed=1").stdout
    wait_for(lambda: field.live() == 0, poll_s=0.2)
    field.vitpa("retry", profile=profile)
    field.vitpa("cancel", "seed=1")
    field.release()
    wait_for(lambda: of(field, content[0]).state == "done", poll_s=0.2)
    assert finished_trainings(field.root) == [content[0].signature]
    wait_for(lambda: exits(field.root, field.sweep)[::2] == [["cancelled", "done"], ["cancelled"] * 2])
    field.clear()


def test_ends_that_slurm_alone_knows(field: Field) -> None:
    """scancel of what waits and of what trains; with and without the queue's memory and accounting."""
    training = field.sweep.runs[1]
    field.vitpa("submit", "attention=content", profile=slurm_profile(field.root, "held", **HOLD))
    assert field.vitpa("submit", "attention=positional").returncode == 0
    wait_for(lambda: started(field, training))
    for state in field.states():
        field.slurm("scancel", state.job_id)
    wait_for(lambda: field.live() == 0, poll_s=0.2)
    assert [(state.state, state.reason) for state in field.states()] == [("cancelled", "scancel")] * 2
    field.replace_program("squeue", "exit 0")  # it has forgotten them
    wait_for(lambda: [state.state for state in field.states()] == ["cancelled"] * 2, poll_s=0.3)  # sacct lags behind
    field.replace_program("sacct", "echo 'accounting storage is disabled' >&2; exit 1")
    first, second = field.states()
    assert (first.state, "ended (unknown to SLURM) before it started the run" in first.reason) == ("uncertain", True)
    assert (second.state, second.reason) == ("interrupted", "signal SIGTERM")


def test_killed_hard(field: Field) -> None:
    """Without any warning: lost; the next submission goes on from the checkpoint."""
    other, run = field.sweep.runs
    assert field.vitpa("submit", "attention=positional").returncode == 0
    wait_for(lambda: started(field, run))
    identity = of(field, run).job_id
    start = read_json(run.directory(field.root).attempts()[0].start_json)
    assert start is not None
    job = variable(start["process"]["pid"], "SLURM_JOB_ID")
    (script,) = processes_below(field.cluster.root, f"job{int(job):05}/slurm_script")
    for pid in (script, start["process"]["pid"]):
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: of(field, run).state == "lost", poll_s=0.2)
    assert of(field, run).reason == f"its job {identity} was killed (FAILED)"
    nearly_done(run, field.root)
    nearly_done(other, field.root)
    assert field.vitpa("submit").returncode == 0
    wait_for(lambda: all(state.state == "done" for state in field.states()), poll_s=0.3)
    assert finished_trainings(field.root) == sorted(run.signature for run in field.sweep.runs)


def test_killed_wrapper(field: Field) -> None:
    """The job's script starts it again; nobody has to submit."""
    run = field.sweep.runs[0]
    assert field.vitpa("submit", "attention=content").returncode == 0
    wait_for(lambda: started(field, run))
    first = read_json(run.directory(field.root).attempts()[0].start_json)
    assert first is not None
    os.kill(first["process"]["pid"], signal.SIGKILL)
    directory = run.directory(field.root)
    wait_for(lambda: len(directory.attempts()) == 2 and directory.attempts()[1].start_json.exists(), poll_s=0.1)
    second = read_json(directory.attempts()[1].start_json)
    assert second is not None
    of_job = [(start["job"]["id"], start["job"]["restart"]) for start in (first, second)]
    assert of_job == [(of_job[0][0], 0)] * 2
    assert of(field, run).state == "running"


def test_killed_wrapper_where_srun_tells_of_memory(field: Field) -> None:
    """Then srun ends with 253, whatever it was that the kernel has killed: only a wrapper that was is started again."""
    run = field.sweep.runs[0]
    (field.root / "srun").write_text(f'#!/bin/sh\necho >> {field.root}/sruns\n{field.real("srun")} "$@"\nexit 253\n')
    (field.root / "srun").chmod(0o755)
    profile = slurm_profile(field.root, "cgroups", setup=[f"export PATH={field.root}:$PATH"])
    assert field.vitpa("submit", "attention=content", profile=profile).returncode == 0
    wait_for(lambda: started(field, run))
    (field.root / "fail").mkdir()
    (field.root / "fail" / run.signature).touch()
    first = read_json(run.directory(field.root).attempts()[0].start_json)
    assert first is not None
    os.kill(first["process"]["pid"], signal.SIGKILL)
    wait_for(lambda: field.live() == 0, poll_s=0.2)
    assert of(field, run).reason == "RuntimeError: the test wants this run to fail"
    assert (len(run.directory(field.root).attempts()), (field.root / "sruns").read_text()) == (2, "\n\n")


def test_a_line_of_setup_that_failed_is_said_with_the_failure(field: Field) -> None:
    """It did not end the job, and may be why the training has failed."""
    run = field.sweep.runs[0]
    (field.root / "fail").mkdir()
    (field.root / "fail" / run.signature).touch()
    profile = slurm_profile(field.root, "cd", setup=["cd /nowhere", "true"])
    assert "submitted 1 of 2 runs" in field.vitpa("submit", "attention=content", profile=profile).stdout
    wait_for(lambda: of(field, run).state == "failed", poll_s=0.2)
    failure = "RuntimeError: the test wants this run to fail; in setup `cd /nowhere` failed with status 1"
    assert of(field, run).reason == failure
    assert failure in field.vitpa("status").stdout.replace("\n", "")


def test_other_code_than_was_submitted(field: Field) -> None:
    run = field.sweep.runs[0]
    nearly_done(run, field.root)
    field.vitpa("submit", "attention=content", profile=slurm_profile(field.root, "held", **HOLD))
    (intent,) = field.files("intent.json")
    text = intent.read_text()
    assert '"code_version": "' in text
    intent.write_text(text.replace('"code_version": "', '"code_version": "old-'))
    field.release()
    wait_for(lambda: of(field, run).state == "done", poll_s=0.2)
    line = "digits-content-s0: ran other code than was submitted: old-"
    assert line in field.vitpa("status").stdout
    assert line in field.vitpa("plan").stdout


def test_a_snapshot_of_the_code_is_what_runs(field: Field) -> None:
    run = field.sweep.runs[0]
    nearly_done(run, field.root)
    done = field.vitpa("submit", "attention=content", "--code", "snapshot")
    assert done.returncode == 0, done.stderr
    wait_for(lambda: of(field, run).state == "done", poll_s=0.2)
    (script,) = field.files("submitit/*_submission.sh")
    (snapshot,) = (field.root / "code").iterdir()
    assert f"export PYTHONPATH={snapshot}" in script.read_text()
    assert "ran other code" not in field.vitpa("status").stdout


def test_squeue_fails_for_a_while(field: Field) -> None:
    field.vitpa("submit", profile=slurm_profile(field.root, "held", **HOLD))
    field.environment = {**field.environment, "SLURM_CONF": f"{field.root}/unreachable.conf"}
    conf = field.cluster.layout.slurm_conf.read_text()
    (field.root / "unreachable.conf").write_text(conf.replace("SlurmctldPort=", "SlurmctldPort=9\n# "))
    looked = field.vitpa("status")
    assert looked.stderr.startswith("warning: squeue: ")
    assert looked.stderr.count("\n") == 1
    assert "2 pending" in looked.stdout
    assert "nothing to submit" in field.vitpa("submit").stdout
    field.environment = field.cluster.environment
    assert field.vitpa("submit").returncode == 0
    field.assert_one_job_each()


def test_a_result_cut_in_half(field: Field) -> None:
    run, other = field.sweep.runs
    nearly_done(run, field.root)
    nearly_done(other, field.root)
    assert field.vitpa("submit").returncode == 0
    wait_for(lambda: exits(field.root, field.sweep) == [["done"]] * 2)
    result = run.directory(field.root).result_json
    result.write_text(result.read_text()[:100])
    shown = field.vitpa("status")
    assert f"{run.label} broken: {result}: not valid JSON" in shown.stdout
    assert shown.returncode == 4
    assert "1 of 2 done" in field.vitpa("submit").stdout
    assert "submitted 1 of 2 runs to SLURM" in field.vitpa("retry").stdout
    wait_for(lambda: exits(field.root, field.sweep) == [["done", "done"], ["done"]])


def test_a_job_that_ends_before_it_starts_its_run(field: Field) -> None:
    """Said with its cause everywhere; submit and retry try again, but not without end."""
    broken = slurm_profile(field.root, "broken", setup=["echo loading", "exit 7"])
    for number, verb in enumerate(("submit", "retry", "submit"), start=1):
        assert "submitted 1 of 2 runs" in field.vitpa(verb, "attention=content", profile=broken).stdout
        wait_for(lambda: field.states()[0].state == "failed", poll_s=0.2)
        assert field.states()[0].attempts == number
    cause = "its job ended (FAILED) before it started the run: setup ended the job with exit code 7: exit 7"
    assert cause in field.vitpa("status").stdout.replace("\n", "")
    for options in ([], ["--failed"]):
        shown = field.vitpa("logs", *options).stdout
        assert "setup ended the job with exit code 7: exit 7" in shown
        assert "loading" in shown
    again = field.vitpa("submit", "attention=content", profile=broken)
    assert (again.returncode, "nothing to submit" in again.stdout) == (4, True)
    assert f"left alone: 3 jobs in a row ended too early ({cause}" in again.stdout
    assert "is left alone: it got 3 jobs in vain" in field.vitpa("retry", profile=broken).stdout
    nearly_done(field.sweep.runs[0], field.root)
    assert "submitted 1 of 2 runs" in field.vitpa("retry", "--force", profile=slurm_profile(field.root)).stdout
    wait_for(lambda: field.states()[0].state == "done", poll_s=0.3)
