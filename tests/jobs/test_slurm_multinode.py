"""A run on two nodes with two processes each, and one on one node with two, through a real SLURM: disturbed, resumed, equal.

What is not done here, because there is one machine: nodes have names that are loopback addresses, and share their ports.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.execute import bad_nodes
from jobs.scheduler.client import Scheduler
from jobs.sweep import Run
from tests.support.cluster import FaultyCluster
from tests.support.digits_sweeps import DIGITS, TERM, assert_ended
from tests.support.repository import ROOT
from tests.support.slurm_sweeps import RUNTIME, Cell, make_cell, processes_left, started, trainers, variable
from tests.support.waiting import run_to_end, wait_for
from vitpa.records import read_json
from vitpa.rundir import Result

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

EVERY_STEPS = 10
TWO_BY_TWO = {"nodes": 2, "processes_per_node": 2, "cpus_per_task": 2}
ONE_BY_TWO = {"nodes": 1, "processes_per_node": 2, "cpus_per_task": 2}


def digits_recipe(epochs: int) -> dict[str, Any]:
    return {**DIGITS, "train": {"global_batch_size": 64, "precision": "float32", "epochs": epochs}}


@dataclass
class Lives:
    """What came of it all."""

    two_nodes: Cell
    one_node: Cell
    reference: dict[int, Result]  # by number of processes, of an undisturbed run on one node
    places: list[tuple[str, str, str]]  # of the training processes on two nodes: rank, node, address of the rendezvous
    left: list[str]  # processes, at the end


def disturb_two_nodes(cell: Cell, places: list[tuple[str, str, str]]) -> None:
    """`scontrol requeue`, then kill -9 of one training process on the second node."""
    run = cell.sweep.runs[0]
    cell.wait_until_trained(run)
    for pid in trainers(cell.root, run):
        places.append((variable(pid, "RANK"), variable(pid, "SLURMD_NODENAME"), variable(pid, "MASTER_ADDR")))
    cell.slurm("scontrol", "requeue", cell.job(run))
    wait_for(partial(started, cell, run, 2), poll_s=0.1)
    cell.wait_until_trained(run, int(cell.start(run)["step"]) + 1)
    victim = next(pid for pid in trainers(cell.root, run) if variable(pid, "RANK") == "3")
    os.kill(victim, signal.SIGKILL)
    cell.settle()


def disturb_one_node(cell: Cell) -> None:
    """`scontrol requeue`, and SIGTERM to every process of the step, torchrun's agent included."""
    run = cell.sweep.runs[0]
    cell.wait_until_trained(run)
    cell.slurm("scontrol", "requeue", cell.job(run))
    cell.settle()


def undisturbed(cell: Cell, processes: int) -> Result:
    run = cell.sweep.runs[0]
    cell.directory(run).path.mkdir(parents=True)
    config = cell.root / "alone.yaml"
    runtime = {**RUNTIME, "data_dir": cell.profile["runtime"]["data_dir"], "root": str(cell.root)}
    config.write_text(yaml.safe_dump({**run.config.experiment(), "runtime": runtime}))
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "vitpa.train"]
    done = run_to_end(
        [sys.executable, *torchrun, str(config)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return cell.result(run)


@pytest.fixture(scope="session")
def nodes(cluster: FaultyCluster, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Lives:
    base = tmp_path_factory.mktemp("nodes")
    recipes = {"digits": digits_recipe(epochs=12)}

    def cell(name: str, **profile: object) -> Cell:
        return make_cell(
            base / name,
            cluster,
            recipes,
            data=digits,
            attentions=["content"],
            runtime={"checkpoint_every_steps": EVERY_STEPS},
            profile=profile,
        )

    two, one = cell("two", **TWO_BY_TWO), cell("one", **ONE_BY_TWO)
    two.submit()
    one.submit()
    places: list[tuple[str, str, str]] = []
    with ThreadPoolExecutor(4) as pool:
        disturbed = [pool.submit(disturb_two_nodes, two, places), pool.submit(disturb_one_node, one)]
        references = {count: pool.submit(undisturbed, cell(f"alone-{count}"), count) for count in (2, 4)}
        for future in disturbed:
            future.result()
    results = {count: future.result() for count, future in references.items()}
    return Lives(two, one, results, places, processes_left([two, one]))


@pytest.mark.parametrize(("which", "processes"), [("two_nodes", 4), ("one_node", 2)])
def test_it_ends_bit_identical_to_an_undisturbed_run(nodes: Lives, which: str, processes: int) -> None:
    cell: Cell = getattr(nodes, which)
    ours, theirs = cell.result(cell.sweep.runs[0]), nodes.reference[processes]
    assert ours.weights_sha256 == theirs.weights_sha256
    assert (ours.val_top1, ours.val_loss, ours.steps) == (theirs.val_top1, theirs.val_loss, theirs.steps)
    rows = cell.rows(cell.sweep.runs[0])
    assert len(rows) == len(set(rows))


def test_the_processes_are_where_slurm_put_them(nodes: Lives) -> None:
    """Two on each node; the rendezvous is the name of the first node, as SLURM says it."""
    places = sorted(nodes.places)
    first, second = places[0][1], places[2][1]
    assert first != second
    assert [(rank, node) for rank, node, _ in places] == [("0", first), ("1", first), ("2", second), ("3", second)]
    assert {address for _, _, address in places} == {first}


def test_requeued_with_a_checkpoint_on_two_nodes(nodes: Lives) -> None:
    run = nodes.two_nodes.sweep.runs[0]
    assert nodes.two_nodes.ends(run)[-1] == "done"
    assert nodes.two_nodes.start(run, 1)["step"] >= EVERY_STEPS


def test_a_killed_process_on_the_second_node_ends_the_others_at_once(nodes: Lives) -> None:
    """The reason names the node and what happened to it, not that the others lost a peer; and the run goes on by itself."""
    cell, run = nodes.two_nodes, nodes.two_nodes.sweep.runs[0]
    assert len(cell.directory(run).attempts()) == 3
    attempt = cell.directory(run).attempts()[1]
    end = read_json(attempt.exit_json)
    assert end is not None
    assert end["state"] == "failed"
    assert end["requeued"] is True
    assert re.fullmatch(r"on 127\.0\.0\.\d: killed by SIGKILL \(out of memory\?\)", end["reason"])
    assert end["duration_s"] < 600  # gloo's own patience


def test_torchrun_on_one_node_writes_its_checkpoint_after_sigterm(nodes: Lives) -> None:
    cell, run = nodes.one_node, nodes.one_node.sweep.runs[0]
    assert_ended(cell, run, TERM, "done")
    resumed = cell.start(run, 1)["step"]
    stopped = re.findall(r"stopped at step (\d+) of", cell.directory(run).attempts()[0].log.read_text())
    assert [int(step) for step in stopped] in ([], [resumed])


def test_no_process_is_left(nodes: Lives) -> None:
    assert nodes.left == []


@pytest.mark.parametrize("count", [1, 2])
def test_a_node_that_fails_its_preflight_is_left_out(cluster: FaultyCluster, digits: Path, tmp_path: Path, count: int) -> None:
    """The last of the nodes that the job gets has too few CPUs; it goes on elsewhere by itself, and so does the next sweep.

    Nodes that this cluster does not know, which have failed elsewhere or are gone, hinder neither.
    """
    bad = f"127.0.0.{count}"
    cell = with_bad_node(bad, tmp_path, cluster, digits, nodes=count)
    bad_nodes.record(cell.root, "", "gone", "no GPU")
    bad_nodes.record(cell.root, "elsewhere", "127.0.0.4", "no GPU")
    first, second = cell.run("content", 0), cell.run("positional", 0)
    cell.submit("attention=content")
    cell.settle([first])
    assert processes_left([cell]) == []
    failed, done = cell.ends(first)
    assert re.fullmatch(rf"interrupted: .*{bad}: failed its pre-flight: cpus: 1 CPUs of 2 asked for.*", failed)
    assert done == "done"
    record = read_json(cell.root / "nodes" / Scheduler(cluster.environment).cluster() / f"{bad}.json")
    assert record is not None
    assert "cpus: 1 CPUs of 2" in record["reason"]
    again = cell.start(first)["job"]
    assert (again["id"], again["restart"]) == (cell.start(first, 0)["job"]["id"], 1)
    assert nodes_of(cell, first, 1).isdisjoint({bad})
    assert f"leaving out {bad}" in cell.vitpa("submit", "attention=positional", profile={"nodes": 1}).stdout
    cell.settle([second])
    assert processes_left([cell]) == []
    assert cell.ends(second) == ["done"]
    assert nodes_of(cell, second, 0).isdisjoint({bad})


def test_a_job_whose_nodelist_wants_a_bad_node_does_not_wait_for_ever(
    cluster: FaultyCluster, digits: Path, tmp_path: Path
) -> None:
    cell = with_bad_node("127.0.0.1", tmp_path, cluster, digits, nodelist="127.0.0.[1]", max_idle_attempts=2)
    run = cell.run("content", 0)
    cell.submit("attention=content")
    (state,) = cell.settle([run])
    assert processes_left([cell]) == []
    assert state.state == "interrupted"
    assert [end.partition(": cpus")[0] for end in cell.ends(run)] == ["interrupted: node 127.0.0.1: failed its pre-flight"] * 2
    refused = cell.vitpa("submit", "attention=content")
    assert refused.returncode != 0
    assert "the profile's nodelist=127.0.0.[1]: 127.0.0.1 failed its pre-flight: cpus: " in refused.stderr


def with_bad_node(bad: str, tmp_path: Path, cluster: FaultyCluster, digits: Path, **profile: Any) -> Cell:
    """A sweep for which a node of the cluster has too few CPUs."""
    (tmp_path / "bad").mkdir()
    broken = f"import os\nif os.environ.get('SLURMD_NODENAME') == '{bad}':\n    os.sched_getaffinity = lambda pid: {{0}}\n"
    (tmp_path / "bad" / "sitecustomize.py").write_text(broken)
    checks = {"preflight": True, "min_free_gib": 0, "setup": [f"export PYTHONPATH={tmp_path}/bad:$PYTHONPATH"]}
    return make_cell(
        tmp_path / "root",
        cluster,
        {"digits": digits_recipe(epochs=1)},
        data=digits,
        profile={"processes_per_node": 1, "cpus_per_task": 2, **checks, **profile},
    )


def test_too_little_room_is_waited_for_and_is_no_failure(cluster: FaultyCluster, digits: Path, tmp_path: Path) -> None:
    """As long as the job's time allows, which here is shorter than half an hour; no node is blamed, and `submit` goes on."""
    cell = make_cell(
        tmp_path / "root",
        cluster,
        {"digits": digits_recipe(epochs=1)},
        data=digits,
        attentions=["content"],
        profile={"nodes": 2, "processes_per_node": 1, "cpus_per_task": 1, "preflight": True, "max_idle_attempts": 2},
    )
    (run,) = cell.sweep.runs
    cell.submit(min_free_gib=1e9, time="1:00", signal_delay_s=30)
    (state,) = cell.settle()
    assert processes_left([cell]) == []
    said = r"interrupted: failed its pre-flight: disk: .* GiB free, 1e\+09 are wanted; make room"
    assert [bool(re.fullmatch(said, each)) for each in cell.ends(run)] == [True, True]
    end = read_json(cell.directory(run).attempts()[-1].exit_json)
    assert end is not None
    assert end["not_requeued"].startswith("given up: 2 executions in a row without a new checkpoint")
    assert state.state == "interrupted"
    assert not (cell.root / "nodes").exists()
    assert any("1e+09 are wanted; waiting for room" in path.read_text() for path in cell.root.glob("sweeps/**/*.out"))
    cell.submit(min_free_gib=0)
    assert [state.state for state in cell.settle()] == ["done"]


def nodes_of(cell: Cell, run: Run, attempt: int) -> set[str]:
    return set(cell.slurm("scontrol", "show", "hostnames", cell.start(run, attempt)["nodes"]).split())
