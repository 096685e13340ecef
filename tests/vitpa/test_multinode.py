"""One run on two nodes, as SLURM starts it: an agent of torchrun on each, a fixed address between them, two processes each."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.trainings import arguments, config_of, result_of, rows
from tests.support.waiting import wait_for
from vitpa.child_process import stat_of_living
from vitpa.rundir import CLAIMED

pytestmark = pytest.mark.slow

BOUND = [sys.executable, "-m", "jobs.execute.die_with_parent"]


class Nodes:
    """The agents of one run, an agent per node, all on this machine."""

    def __init__(self, words: list[str], logs: Path, *, nodes: int, processes: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        logs.mkdir(exist_ok=True)
        self.logs = [logs / f"node{rank}.txt" for rank in range(nodes)]
        self.agents: list[subprocess.Popen[bytes]] = []
        for rank, path in enumerate(self.logs):
            where = ["--rdzv-backend=static", "--master-addr=127.0.0.1", f"--master-port={port}", f"--node-rank={rank}"]
            agent = ["-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc-per-node={processes}", *where]
            command = [*BOUND, sys.executable, *agent, "--no-python", *BOUND, sys.executable, "-m", "vitpa.train", *words]
            environment = {key: value for key, value in os.environ.items() if key not in (CLAIMED, "OMP_NUM_THREADS")}
            environment |= {"VITPA_PARENT": str(os.getpid()), "OMP_NUM_THREADS": "1"}
            with path.open("ab") as log:
                self.agents.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *_: object) -> None:
        for agent in self.agents:
            agent.kill()  # its processes are bound to it
            agent.wait()

    def codes(self) -> list[int]:
        """The agents' exit codes, once all have ended."""
        wait_for(lambda: all(agent.poll() is not None for agent in self.agents))
        return [agent.returncode for agent in self.agents]

    def wait_until(self, condition: Callable[[], bool]) -> None:
        def looked() -> bool:
            assert all(agent.poll() is None for agent in self.agents), f"ended too early: {self.output()}"
            return condition()

        wait_for(looked)

    def processes(self, node: int) -> list[int]:
        """The training processes of a node, in the order of their ranks."""
        pid = self.agents[node].pid
        children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        ranks = {int(variable(child, "RANK")): child for child in children}
        return [ranks[rank] for rank in sorted(ranks)]

    def output(self) -> str:
        return "".join(path.read_text() for path in self.logs)


def variable(pid: int, name: str) -> str:
    entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(entry for entry in entries if entry.startswith(name.encode() + b"=")).split(b"=", 1)[1].decode()


def alive(pid: int) -> bool:
    return stat_of_living(pid) is not None


def test_two_nodes_stopped_and_parted_by_a_kill_end_bit_identical_to_one_node(digits: Path, tmp_path: Path) -> None:
    """A run whose stop is requested, bereft of a node by kill -9, and resumed; nothing hangs and nobody is left behind."""
    options = ["runtime.cpu_threads=1", "runtime.log_every_steps=1", "runtime.poll_every_steps=1", "train.epochs=2"]
    alone = arguments(digits, tmp_path / "alone", *options)
    with Nodes(alone, tmp_path / "alone", nodes=1, processes=4) as one_node:
        assert one_node.codes() == [0], one_node.output()

    words = arguments(digits, tmp_path, *options, "runtime.checkpoint_every_steps=3")
    run = config_of(words).run_dir
    with Nodes(words, tmp_path / "stopped", nodes=2, processes=2) as nodes:
        nodes.wait_until(lambda: rows(run) >= 5)
        run.stop.write_text('{"reason": "test"}\n')
        assert nodes.codes() == [0, 0], nodes.output()
        assert "stopped at step" in nodes.output()

    with Nodes(words, tmp_path / "node", nodes=2, processes=2) as nodes:
        nodes.wait_until(lambda: rows(run) >= 15)
        of_all = nodes.processes(0) + nodes.processes(1)
        nodes.agents[1].kill()
        assert nodes.codes() == [1, -signal.SIGKILL], nodes.output()
        assert not any(alive(pid) for pid in of_all)

    assert not run.result_json.exists()

    with Nodes(words, tmp_path / "last", nodes=2, processes=2) as nodes:
        assert nodes.codes() == [0, 0], nodes.output()
        assert "resumed at step" in nodes.output()
    result, reference = result_of(words), result_of(alone)
    assert result.weights_sha256 == reference.weights_sha256  # where the processes are makes no difference
    assert (result.val_top1, result.val_loss, result.steps) == (reference.val_top1, reference.val_loss, reference.steps)
    assert result.attempts == 3


def test_what_the_main_process_finds_ends_all_nodes_with_one_line(digits: Path, tmp_path: Path) -> None:
    words = arguments(digits, tmp_path, "train.epochs=1")
    run = config_of(words).run_dir
    run.path.mkdir(parents=True)
    run.config_yaml.write_text("dataset: cifar10\n")
    with Nodes(words, tmp_path / "refused", nodes=2, processes=1) as nodes:
        assert nodes.codes() == [1, 1], nodes.output()
        assert nodes.output().count("another experiment under the signature") == 1, nodes.output()
        assert "Connection" not in nodes.output()
