"""The life of a job on a real SLURM: whatever happens to it, the run ends once, with the weights of an undisturbed run.

A grid of digits x 2 attentions and photos x content, x 3 seeds, goes through the cluster while its runs are disturbed,
all at the same time, each in another way. The same grid, undisturbed, through the local executor is the reference. A run
about to be disturbed freezes itself (SIGSTOP) as soon as it has a checkpoint, so that no run is over before its turn comes.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.execute.attempt import last_error
from jobs.sweep import Run
from tests.support.cluster import FaultyCluster
from tests.support.digits_sweeps import DIGITS, TERM, TRAIN, assert_ended
from tests.support.repository import ROOT
from tests.support.slurm_sweeps import MODEL, RUNTIME, Cell, make_cell, processes_left, started, trainers
from tests.support.waiting import wait_for
from vitpa.records import read_json

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

PHOTOS = {
    "dataset": "photos",
    "model": {**MODEL, "img_size": 32, "patch_size": 16},
    "train": {**TRAIN, "epochs": 3, "global_batch_size": 4},
    "optim": {"warmup_epochs": 0},
}
EVERY_STEPS = 20  # between checkpoints
FREEZE = f"""
import os, signal
replace, frozen = os.replace, []
def freezing(path, target, **folders):
    result = replace(path, target, **folders)
    if str(target).endswith("step_{EVERY_STEPS:09d}.pt") and not frozen:
        frozen.append(target)
        os.kill(os.getpid(), signal.SIGSTOP)
    return result
os.replace = freezing
"""
DISK_FULL = """
import errno, os
replace = os.replace
def full(path, target, **folders):
    folder = os.readlink(f"/proc/self/fd/{folders['dst_dir_fd']}") if folders else ""
    if os.environ.get("SLURM_RESTART_COUNT", "0") == "0" and f"{folder}/{target}".endswith("0001/exit.json"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
    return replace(path, target, **folders)
os.replace = full
"""


@dataclass
class Lives:
    """What came of it all."""

    grid: Cell
    local: Cell
    crash: Cell
    stand_in: Cell
    together: Cell
    during_restart: dict[str, str]  # states of the jobs of the grid after the controller was restarted
    steps: dict[str, int]  # by label: steps at a checkpoint just before the disturbance
    states: dict[str, str]  # what was said about runs in between
    left: list[str]  # processes, at the end

    @property
    def requeued(self) -> Run:
        return self.grid.run("content", 2)

    @property
    def cancelled(self) -> Run:
        return self.grid.run("content", 1)

    @property
    def untouched(self) -> Run:
        return self.grid.run("content", 0)

    @property
    def preempted_then_powerless(self) -> Run:
        return self.grid.run("positional", 0)

    @property
    def node_down(self) -> Run:
        return self.grid.run("positional", 1)

    @property
    def time_limit(self) -> Run:
        return self.grid.run("positional", 2)


def send(cell: Cell, run: Run, number: signal.Signals) -> None:
    for pid in trainers(cell.root, run):
        os.kill(pid, number)


def with_code(cell: Cell, code: str) -> list[str]:
    """A profile's `setup` by which the processes of a job run `code` first."""
    folder = cell.root / "first"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(code)
    return [f"export PYTHONPATH={folder}:$PYTHONPATH"]


def wait_until_frozen(cell: Cell, run: Run) -> None:
    """Its trainer runs FREEZE."""

    def stopped() -> bool:
        states = [Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] for pid in trainers(cell.root, run)]
        return bool(states) and set(states) == {"T"}

    cell.wait_until_trained(run)
    wait_for(stopped, poll_s=0.05)


def thaw_when_told_to_stop(cell: Cell, run: Run) -> None:
    """Or when it was killed: on a slow machine KillWait may be over first.

    SLURM's warnings let stopped processes go on: until it is told to stop, the trainer is stopped again.
    """
    stop = cell.directory(run).stop

    def told_to_stop() -> bool:
        if not stop.exists():
            send(cell, run, signal.SIGSTOP)
        return stop.exists() or not trainers(cell.root, run)

    wait_for(told_to_stop, poll_s=0.02)
    send(cell, run, signal.SIGCONT)


def requeue(lives: Lives) -> None:
    cell, run = lives.grid, lives.requeued
    cell.slurm("scontrol", "requeue", cell.job(run))
    thaw_when_told_to_stop(cell, run)
    cell.settle([run])


def cancel_and_retry(lives: Lives) -> None:
    cell, run = lives.grid, lives.cancelled
    cell.slurm("scancel", cell.job(run))
    thaw_when_told_to_stop(cell, run)
    lives.states["scancel"] = str([(state.state, state.reason) for state in cell.settle([run])])
    again = cell.vitpa("submit", "dataset=digits", "attention=content")
    lives.states["submit after scancel"] = again.stdout
    retried = cell.vitpa("retry", "dataset=digits", "attention=content", "seed=1")
    assert "submitted 1" in retried.stdout, retried.stdout + retried.stderr
    cell.settle([run])


def preempt_then_kill_the_node(lives: Lives) -> None:
    cell, run = lives.grid, lives.preempted_then_powerless
    node = str(cell.start(run)["nodes"])
    more_important = ["sbatch", "--partition=main", f"--nodelist={node}", "--cpus-per-task=8", "--output=/dev/null"]
    cell.slurm(*more_important, "--wrap=sleep 1")
    thaw_when_told_to_stop(cell, run)
    wait_for(lambda: started(cell, run, 2), poll_s=0.1)
    lives.steps["after preemption"] = int(cell.start(run)["step"])
    cell.wait_until_trained(run, lives.steps["after preemption"] + 1)
    cell.cluster.kill_node(node)
    lives.steps["at the loss of power"] = cell.directory(run).newest_step()
    wait_for(lambda: cell.states([run])[0].state == "pending", poll_s=0.5)  # SlurmdTimeout
    cell.cluster.start_node(node)
    cell.settle([run])


def set_node_down(lives: Lives) -> None:
    cell, run = lives.grid, lives.node_down
    send(cell, run, signal.SIGCONT)
    node = str(cell.start(run)["nodes"])
    cell.slurm("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
    wait_for(lambda: started(cell, run, 2), poll_s=0.1)
    cell.slurm("scontrol", "update", f"NodeName={node}", "State=RESUME")
    cell.settle([run])


def run_into_the_time_limit(lives: Lives) -> None:
    """The trainer stays frozen, so the run is not over; it thaws when it is told to stop."""
    cell, run = lives.grid, lives.time_limit
    thaw_when_told_to_stop(cell, run)
    cell.settle([run])


def kill_trainers(lives: Lives) -> None:
    """Out of memory, say, each time that the run has advanced: requeued until its attempts are used up; then `retry`.

    The first time the disk is full when that is to be written down.
    """
    cell, run = lives.crash, lives.crash.run("content", 0)
    for attempt in (1, 2):
        wait_for(partial(started, cell, run, attempt), poll_s=0.1)
        cell.wait_until_trained(run, int(cell.start(run)["step"]) + 1)
        send(cell, run, signal.SIGKILL)
    lives.states["killed twice"] = cell.settle([run])[0].state
    retried = cell.vitpa("retry")
    assert "submitted 1" in retried.stdout, retried.stdout + retried.stderr
    cell.settle([run])


def interrupt_without_progress(lives: Lives) -> None:
    """The stand-in's checkpoints do not count: one run is requeued again and again, one is cancelled while it waits."""
    cell = lives.stand_in
    idle, waiting = cell.run("content", 1), cell.run("positional", 1)
    for attempt in (1, 2):
        wait_for(partial(started, cell, idle, attempt), poll_s=0.1)
        cell.slurm("scontrol", "requeue", cell.job(idle))
        if attempt == 1:
            wait_for(partial(started, cell, waiting, 1), poll_s=0.1)
            cell.slurm("scontrol", "requeue", cell.job(waiting))
            wait_for(lambda: cell.states([waiting])[0].state == "pending", poll_s=0.1)
            cell.vitpa("cancel", "attention=positional", "seed=1")
    cell.settle()


def part_seeds_trained_together(lives: Lives) -> None:
    """One of three leaves, then the job of the two others is requeued; `retry` starts the one again."""
    cell = lives.together
    first, cancelled, other = cell.sweep.runs
    assert "would start 3 runs in 1 job\n" in cell.vitpa("submit", "--dry-run").stdout
    cell.submit(nodelist="127.0.0.4", setup=with_code(cell, FREEZE))
    wait_until_frozen(cell, first)
    assert "1 asked to stop at their next step, with a checkpoint" in cell.vitpa("cancel", "seed=1").stdout
    send(cell, first, signal.SIGCONT)
    wait_for(cell.directory(cancelled).attempts()[0].left_json.exists, poll_s=0.01)
    send(cell, first, signal.SIGSTOP)
    wait_for(lambda: [state.state for state in cell.states()] == ["running", "cancelled", "running"], poll_s=0.1)
    assert len({cell.job(run) for run in (first, other)}) == 1
    cell.slurm("scontrol", "requeue", cell.job(first))
    thaw_when_told_to_stop(cell, first)
    cell.settle()
    assert "submitted 1 of 3 runs" in cell.vitpa("retry").stdout
    cell.settle()
    wait_for(lambda: cell.ends(cancelled)[-1] == "done", poll_s=0.1)  # it comes after the result


@pytest.fixture(scope="session")
def lives(cluster: FaultyCluster, digits: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Lives:
    """All the disturbances at once."""
    base = tmp_path_factory.mktemp("lives")
    data = base / "data"
    data.mkdir()
    for source in (digits, photos):
        for dataset in source.iterdir():
            (data / dataset.name).symlink_to(dataset)
    recipes: dict[str, dict[str, Any]] = {"digits": DIGITS, "photos": PHOTOS}
    runtime = {"checkpoint_every_steps": EVERY_STEPS}
    few = {"exclude": [{"dataset": "photos", "attention": "positional"}]}  # each process imports for seconds
    grid = make_cell(base / "grid", cluster, recipes, seeds=3, data=data, runtime=runtime, grid=few)
    local = make_cell(base / "local", cluster, recipes, seeds=3, data=data, grid=few)
    crash = make_cell(base / "crash", cluster, {"digits": DIGITS}, data=data, runtime=runtime, attentions=["content"])
    stand_in_recipe = {**DIGITS, "train": {"epochs": 100_000}}
    stand_in = make_cell(base / "stand-in", cluster, {"digits": stand_in_recipe}, seeds=2, stand_in=True)
    recipe = {**DIGITS, "train": {**TRAIN, "epochs": 40}}
    more: dict[str, Any] = {"attentions": ["content"], "runtime": runtime, "profile": {"replicas": 3}}
    together = make_cell(base / "together", cluster, {"digits": recipe}, seeds=3, data=data, **more)
    lives = Lives(grid, local, crash, stand_in, together, {}, {}, {}, [])
    profile = base / "local.yaml"
    profile.write_text(yaml.safe_dump({"slots": 2, "runtime": {**RUNTIME, "data_dir": str(data)}}))
    words = [str(local.root / "life.yaml"), "--root", str(local.root), "--profile", str(profile), "--wait"]
    undisturbed = subprocess.Popen(
        [sys.executable, "-m", "vitpa.cli", "sweep", "submit", *words], cwd=ROOT, stdout=subprocess.DEVNULL
    )

    grid.profile["setup"] = with_code(grid, FREEZE)
    began_s = time.monotonic()
    grid.submit("attention=content", nodelist="127.0.0.1")  # an array of 3 digits and 3 photos
    grid.submit("attention=positional", "dataset=digits", "seed=0", partition="low", nodelist="127.0.0.2")
    grid.submit("attention=positional", "dataset=digits", "seed=1", exclude="127.0.0.1,127.0.0.2")
    crash.submit(nodelist="127.0.0.1", max_attempts=2, setup=with_code(crash, DISK_FULL))
    (stand_in.root / "fail").mkdir()
    for attention in ("content", "positional"):
        (stand_in.root / "fail" / stand_in.run(attention, 0).signature).touch()
    stand_in.submit(nodelist="127.0.0.4", max_idle_attempts=2)
    with ThreadPoolExecutor(10) as pool:
        early = [pool.submit(kill_trainers, lives), pool.submit(interrupt_without_progress, lives)]
        long = [run for run in grid.sweep.runs if run.dataset == "digits"]
        early_ones = [run for run in long if run != lives.time_limit]
        assert list(pool.map(lambda run: wait_until_frozen(grid, run), early_ones)) == [None] * 5
        limit_min = math.ceil((time.monotonic() - began_s + 30) / 60)  # no less than it takes this machine to start a run
        grid.submit(
            *("attention=positional", "dataset=digits", "seed=2"),
            nodelist="127.0.0.1",
            time=f"{limit_min}:00",
            signal_delay_s=20,
        )
        wait_until_frozen(grid, lives.time_limit)
        cluster.restart_controller()
        lives.during_restart |= {state.run.label: state.state for state in grid.states(long)}
        disturbances = [requeue, cancel_and_retry, preempt_then_kill_the_node, set_node_down, run_into_the_time_limit]
        disturbances.append(part_seeds_trained_together)
        futures = [pool.submit(disturb, lives) for disturb in disturbances]
        wait_for(lambda: "scancel" in lives.states or any(future.done() for future in futures), poll_s=0.1)
        send(grid, lives.untouched, signal.SIGCONT)
        for future in [*early, *futures]:
            future.result()
    grid.settle()
    wait_for(lambda: undisturbed.poll() is not None, poll_s=0.01)
    assert undisturbed.returncode == 0
    lives.left += processes_left([grid, crash, stand_in, together])
    return lives


def test_each_run_ends_once_bit_identical_to_an_undisturbed_one(lives: Lives) -> None:
    for cell in (lives.grid, lives.crash):
        for run in cell.sweep.runs:
            ours, theirs = cell.result(run), lives.local.result(run)
            assert ours.weights_sha256 == theirs.weights_sha256, run.label
            assert (ours.val_top1, ours.val_loss, ours.steps) == (theirs.val_top1, theirs.val_loss, theirs.steps)
            assert cell.values(run) == lives.local.values(run), run.label  # every row once, with the same numbers
            assert [end for end in cell.ends(run) if end == "done"] == ["done"], (run.label, cell.ends(run))


def test_the_table_is_that_of_the_local_executor(lives: Lives) -> None:
    tables = []
    for cell in (lives.grid, lives.local):
        collected = cell.vitpa("collect", "--json", "--allow-mixed")  # somebody may edit the code meanwhile
        assert collected.returncode == 0, collected.stderr
        table = json.loads(collected.stdout)
        assert table["complete"]
        others = ("code_versions", "ettr")  # the clock says how much of its time a disturbed run was training
        cells = [{key: value for key, value in row.items() if key not in others} for row in table["cells"]]
        tables.append((cells, table["differences_content_minus_positional"]))
    assert tables[0] == tables[1]
    assert len(tables[0][0]) == 3


def test_no_process_is_left(lives: Lives) -> None:
    assert lives.left == []


def test_scontrol_requeue_of_one_task_of_an_array(lives: Lives) -> None:
    cell, run = lives.grid, lives.requeued
    assert_ended(cell, run, TERM, "done")
    first, second = cell.start(run, 0), cell.start(run, 1)
    assert (first["job"]["id"], first["job"]["restart"]) == (second["job"]["id"], 0)
    assert second["job"]["restart"] == 1
    assert all(0 <= each["job"]["queue_s"] < 300 for each in (first, second)), "of each start, by SLURM's own times"
    assert int(first["job"]["id"].partition("_")[2]) > 0
    untouched = [lives.untouched, *(cell.run("content", seed, "photos") for seed in range(3))]
    assert [cell.ends(other) for other in untouched] == [["done"]] * 4
    jobs = {cell.start(other)["job"]["id"].partition("_")[0] for other in [run, *untouched]}
    assert len(jobs) == 1  # they are one array


def test_sigterm_loses_no_more_than_the_checkpoint_interval(lives: Lives) -> None:
    """The trainer hears of it by the file `stop` and writes a checkpoint, if SLURM leaves it the time: KillWait is 5 s."""
    for run in (lives.requeued, lives.cancelled, lives.preempted_then_powerless):
        resumed = lives.grid.start(run, 1)["step"]
        assert resumed >= EVERY_STEPS
        stopped = re.findall(r"stopped at step (\d+) of", lives.grid.directory(run).attempts()[0].log.read_text())
        assert [int(step) for step in stopped] in ([], [resumed])


def test_scancel_is_not_requeued_and_retry_goes_on(lives: Lives) -> None:
    cell, run = lives.grid, lives.cancelled
    assert lives.states["scancel"] == "[('cancelled', 'scancel')]"
    assert "nothing to submit" in lives.states["submit after scancel"]
    assert_ended(cell, run, TERM, "done")
    assert cell.start(run, 1)["job"]["restart"] == 0  # another job
    assert cell.start(run, 1)["step"] > 0


def test_preemption_and_loss_of_power(lives: Lives) -> None:
    cell, run = lives.grid, lives.preempted_then_powerless
    assert_ended(cell, run, TERM, "", "done")
    assert [cell.start(run, attempt)["job"]["restart"] for attempt in range(3)] == [0, 1, 2]
    assert lives.steps["after preemption"] > 0
    assert cell.start(run, 2)["step"] == lives.steps["at the loss of power"]


def test_node_set_down(lives: Lives) -> None:
    cell, run = lives.grid, lives.node_down
    assert cell.ends(run)[-1] == "done"
    assert cell.start(run, 0)["nodes"] != cell.start(run, 1)["nodes"]


def test_time_limit(lives: Lives) -> None:
    cell, run = lives.grid, lives.time_limit
    *limited, last = cell.ends(run)  # how many executions it takes is the machine's affair
    assert set(limited) == {"interrupted: time limit"}
    assert last == "done"
    end = read_json(cell.directory(run).attempts()[0].exit_json)
    assert end is not None
    assert end["requeued"] is True


def test_restart_of_the_controller(lives: Lives) -> None:
    assert set(lives.during_restart.values()) == {"running"}
    assert lives.grid.ends(lives.untouched) == ["done"]


def test_killed_trainers_are_requeued_as_long_as_there_are_attempts(lives: Lives) -> None:
    cell, run = lives.crash, lives.crash.run("content", 0)
    assert cell.ends(run) == ["", "failed: killed by SIGKILL (out of memory?)", "done"]
    said = "".join(path.read_text() for path in cell.root.glob("sweeps/life/submissions/*/submitit/*.out"))
    assert "0001/exit.json: No space left on device; the attempt ended as failed (killed by SIGKILL (out of memory?))" in said
    assert [cell.start(run, attempt)["job"]["restart"] for attempt in range(3)] == [0, 1, 0]
    end = read_json(cell.directory(run).attempts()[1].exit_json)
    assert end is not None
    assert (end["requeued"], end["not_requeued"]) == (False, "given up after 2 executions (max_attempts)")
    assert lives.states["killed twice"] == "failed"


def test_a_run_that_crashes_at_once_is_not_requeued(lives: Lives) -> None:
    cell = lives.stand_in
    for attention in ("content", "positional"):
        run = cell.run(attention, 0)
        assert cell.ends(run) == ["failed: RuntimeError: the test wants this run to fail"]
        end = read_json(cell.directory(run).attempts()[0].exit_json)
        assert end is not None
        assert end["not_requeued"] == "no new checkpoint in this attempt"


def test_a_run_that_never_advances_is_given_up(lives: Lives) -> None:
    given_up = "failed: given up: 2 executions in a row without a new checkpoint (max_idle_attempts)"
    assert_ended(lives.stand_in, lives.stand_in.run("content", 1), TERM, TERM, given_up)


def test_cancelled_while_it_waits_to_be_started_again(lives: Lives) -> None:
    assert_ended(lives.stand_in, lives.stand_in.run("positional", 1), TERM, "cancelled: cancelled while it waited to go on")


def test_seeds_trained_together(lives: Lives) -> None:
    """One of three is cancelled, the job of the others is requeued, the one is trained again alone: each is done once."""
    cell = lives.together
    runs = first, cancelled, other = cell.sweep.runs
    for run in (first, other):
        assert_ended(cell, run, TERM, "done")
        assert cell.start(run)["job"]["restart"] == 1
        assert cell.start(run)["step"] > 0
    assert cell.ends(cancelled) == ["cancelled: cancel", "done"]
    assert cell.start(cancelled)["step"] > 0
    together = [
        [(read_json(each.env_json) or {})["trained_with_seeds"] for each in cell.directory(run).attempts()] for run in runs
    ]
    assert together == [[[0, 1, 2], [0, 2]], [[0, 1, 2], [1]], [[0, 1, 2], [0, 2]]]
    for run in runs:
        assert cell.result(run).seed == run.seed
        assert len(set(cell.rows(run))) == len(cell.rows(run)), "every row once"
    assert [log.is_symlink() for log in (each.log for each in cell.directory(other).attempts())] == [True, True]


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("[rank1]: ValueError: bad\n[rank0]: RuntimeError: Connection closed by peer\n", "ValueError: bad"),
        ("Root Cause (first observed failure):\n traceback : Signal 11 (SIGSEGV) received by PID 7\n", "killed by SIGSEGV"),
        ("RuntimeError: Connection closed by peer\nlast\n", "RuntimeError: Connection closed by peer"),
    ],
)
def test_the_reason_is_not_the_loss_of_another_process(tmp_path: Path, log: str, reason: str) -> None:
    path = tmp_path / "log.txt"
    path.write_text(log)
    assert last_error(path) == reason
